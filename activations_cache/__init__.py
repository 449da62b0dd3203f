"""Activations of a bare Hugging Face model: named sites, capture into HDF5, reading back.

    import activations_cache as ac

    cache = ac.capture(model, texts, sites=["blocks.*.hook_resid_post"], out="acts/")
    cache = ac.open("acts/")
    cache["blocks.3.hook_resid_post"][100:200]  # [100, d_model]
    for batch in cache.where(toxic=True).batches("blocks.3.hook_resid_post", batch_size=4096): ...

The package can be used without the rest of Probe. Names are loaded on first use, so that importing it is cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from activations_cache._lazy import lazy

if TYPE_CHECKING:
    from activations_cache import conformance, errors, hashing, sites
    from activations_cache._capture import capture
    from activations_cache._generations import Generations
    from activations_cache._import import import_saelens
    from activations_cache._join import concat, join
    from activations_cache._ray import capture_ray
    from activations_cache._repair import repair
    from activations_cache._verify import verify
    from activations_cache.cache import Cache, open
    from activations_cache.documents import Documents, Tokens, read_documents, tokenize
    from activations_cache.generation import capture_generation, generate

__all__ = [
    "Cache",
    "Documents",
    "Generations",
    "Tokens",
    "capture",
    "capture_generation",
    "capture_ray",
    "concat",
    "conformance",
    "errors",
    "generate",
    "hashing",
    "import_saelens",
    "join",
    "open",
    "read_documents",
    "repair",
    "sites",
    "tokenize",
    "verify",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "Cache": "cache",
        "Documents": "documents",
        "Generations": "_generations",
        "Tokens": "documents",
        "capture": "_capture",
        "capture_generation": "generation",
        "capture_ray": "_ray",
        "concat": "_join",
        "generate": "generation",
        "import_saelens": "_import",
        "join": "_join",
        "open": "cache",
        "read_documents": "documents",
        "repair": "_repair",
        "tokenize": "documents",
        "verify": "_verify",
    },
    modules=("conformance", "errors", "hashing", "sites"),
)
