"""Sparse autoencoders trained, loaded and scored on cached activations alone.

    import saes

    sae = saes.train(cache, "blocks.3.hook_resid_post", architecture="topk", d_sae=4096, k=32)
    saes.evaluate(sae, cache, "blocks.3.hook_resid_post")

Classes and files are sae-lens's own: `sae_lens.SAE.load_from_disk` opens what `saes.train(..., out=...)` writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from activations_cache._lazy import lazy

if TYPE_CHECKING:
    from saes import errors
    from saes._evaluate import Evaluation, evaluate
    from saes._load import load
    from saes._separation import separation
    from saes._train import train

__all__ = ["Evaluation", "errors", "evaluate", "load", "separation", "train"]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "Evaluation": "_evaluate",
        "evaluate": "_evaluate",
        "load": "_load",
        "separation": "_separation",
        "train": "_train",
    },
    modules=("errors",),
)
