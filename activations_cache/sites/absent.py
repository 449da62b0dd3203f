"""Why a site that other models have is missing from this one."""

from __future__ import annotations

import re

from activations_cache.sites.layout import Layout

_NAME = re.compile(r"blocks\.(\d+|\*)\.(.+)")
_DENSE = frozenset({"mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post"})
_SPARSE = frozenset(f"mlp.hook_{kind}" for kind in ("router_logits", "expert_indices", "expert_weights", "expert_out"))
_PROJECTIONS = frozenset({"attn.hook_q", "attn.hook_k", "attn.hook_v"})


def reason(layout: Layout, name: str) -> str | None:
    """What about the architecture leaves no such site; None where the name is simply unknown.

    Args:
        layout: the model.
        name: a site or a pattern over the blocks, e.g. `blocks.3.attn.hook_q`, `blocks.*.hook_resid_mid`.
    """
    found = _NAME.fullmatch(name)
    if found is None or (found[1] != "*" and int(found[1]) >= len(layout.layers)):
        return None
    layers = range(len(layout.layers)) if found[1] == "*" else [int(found[1])]
    where, hook = ("no layer" if found[1] == "*" else f"layer {found[1]}"), found[2]
    if hook in _PROJECTIONS and all(_compressed(layout, layer) for layer in layers):
        return (
            "its attention is compressed (MLA): queries, keys and values are made of latent vectors and partly shared "
            "rotations inside the attention, so no projection's output is q, k or v per head; hook_z, hook_pattern and "
            "hook_attn_out are there"
        )
    if hook == "hook_resid_mid" and "Parallel" in type(layout.block).__name__:
        return "attention and MLP read the same residual stream in a parallel block, so there is none between them"
    if hook in _DENSE and all(layout.experts(layer) is not None for layer in layers):
        return "its MLPs are mixtures of experts there: mlp.hook_router_logits and mlp.hook_expert_* are what they have"
    if hook in _SPARSE and all(layout.experts(layer) is None for layer in layers):
        return f"{where} is a mixture of experts" if found[1] == "*" else f"{where} is dense: mlp.hook_post is there"
    return None


def _compressed(layout: Layout, layer: int) -> bool:
    attention = layout.child(layer, "attn")
    return attention is not None and isinstance(getattr(attention[1], "kv_lora_rank", None), int)
