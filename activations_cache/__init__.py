"""Activations of a bare Hugging Face model: named sites, capture into HDF5, reading back.

    import activations_cache as ac

    cache = ac.capture(model, texts, sites=["blocks.*.hook_resid_post"], out="acts/")
    cache = ac.open("acts/")
    cache["blocks.3.hook_resid_post"][100:200]  # [100, d_model]

The package can be used without the rest of Probe. Names are loaded on first use, so that importing it is cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from activations_cache._lazy import lazy

if TYPE_CHECKING:
    from activations_cache import conformance, errors, hashing, sites
    from activations_cache._capture import capture
    from activations_cache.cache import Cache, open
    from activations_cache.documents import Documents, Tokens, read_documents, tokenize

__all__ = [
    "Cache",
    "Documents",
    "Tokens",
    "capture",
    "conformance",
    "errors",
    "hashing",
    "open",
    "read_documents",
    "sites",
    "tokenize",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "Cache": "cache",
        "Documents": "documents",
        "Tokens": "documents",
        "capture": "_capture",
        "open": "cache",
        "read_documents": "documents",
        "tokenize": "documents",
    },
    modules=("conformance", "errors", "hashing", "sites"),
)
