"""Which parameters write to the residual stream, and which make up a layer: names and orientations for editors.

All names are those of `model.named_parameters()` in memory (experts are fused 3-D parameters there, also where the
checkpoint on disk keeps one matrix per expert).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from activations_cache.errors import ModelError
from activations_cache.sites.adapter import join, submodule
from activations_cache.sites.catalogue import sites_of
from activations_cache.sites.layout import Layout, is_conv1d, weight_of
from activations_cache.sites.taps import gain_offset

Component = Literal["embed", "pos_embed", "attn_out", "mlp_out", "expert_out"]
OUT_NAMES = frozenset({"down_proj", "w2", "c_proj", "fc2", "output_linear", "dense_4h_to_h", "out_proj"})


@dataclass(frozen=True, slots=True)
class Writer:
    """A parameter whose product is added to the residual stream.

    Attributes:
        name: the parameter's name in memory.
        axis: the axis of the parameter that is indexed by d_model of the output. To remove a unit direction r from what
            is written, contract r with this axis: `W -= outer(r, r @ W)` with the axis moved first.
        component: what part of the model writes.
        layer: the block, None for the embeddings.
        expert_axis: the axis over experts, None for a parameter of one module.
        bias: whether it is an added vector and no matrix.
        post_norm: name of the gain of the norm between this parameter and the residual stream (Gemma 2 and 3, OLMo 2),
            None where the product is added as it is. The gain is `weight + gain_offset`: what reaches the residual is
            `gain * y / rms(y)`, so remove the direction `gain * r` from the parameter.
        gain_offset: 1.0 where the norm computes `x / rms * (1 + w)` (Gemma), else 0.0.
        tied: whether the parameter is also the unembedding, so that changing it changes W_U too.
        scale: the constant by which the product is multiplied on its way (Gemma's embedding: sqrt(d_model)); the
            directions it writes are not affected.
    """

    name: str
    axis: int
    component: Component
    layer: int | None = None
    expert_axis: int | None = None
    bias: bool = False
    post_norm: str | None = None
    gain_offset: float = 0.0
    tied: bool = False
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Weight:
    """One matrix of a layer, which may be a part of a fused parameter.

    Attributes:
        name: the parameter's name in memory.
        in_axis: the axis that its input runs along.
        out_axis: the axis that its output runs along.
        bias: name of its bias, which runs along the same outputs, or None.
        expert_axis: the axis over experts, or None.
        index: the positions along `out_axis` that are this matrix, where the parameter holds several (fused q, k and v;
            fused gate and up); None for all. The same positions hold in the bias.
    """

    name: str
    in_axis: int
    out_axis: int
    bias: str | None = None
    expert_axis: int | None = None
    index: slice | Tensor | None = None


@dataclass(frozen=True, slots=True)
class Components:
    """The matrices of one layer; None for what it does not have.

    A dense layer has `W_in`, `W_out` and, if gated, `W_gate`; neuron n is position n along the outputs of W_in and
    W_gate and along the inputs of W_out. A sparse layer has the same three with an `expert_axis`, and a `router`, whose
    `out_axis` runs over the experts. `shared` are the output matrices of experts that every token uses.
    """

    layer: int
    W_Q: Weight | None = None
    W_K: Weight | None = None
    W_V: Weight | None = None
    W_O: Weight | None = None
    W_in: Weight | None = None
    W_gate: Weight | None = None
    W_out: Weight | None = None
    router: Weight | None = None
    shared: tuple[Weight, ...] = ()


# -------------------------------------------------------------------- writers


def writers(model: Any, layers: int | Sequence[int] | None = None) -> list[Writer]:
    """Every parameter that writes to the residual stream: embeddings, W_O, W_out, every expert's W_out, their biases.

    Args:
        model: a Hugging Face model with its weights loaded, or anything whose `.hf` is one.
        layers: only these blocks (negative from the end); the embeddings are listed only if this is None.

    Raises:
        ModelError: if the model's architecture is unknown, or a layer has no W_O or W_out that could be found.
        SiteError: for a layer that is not there.
    """
    sites = sites_of(model)
    layout = sites.layout
    found: list[Writer] = list(_embeddings(layout)) if layers is None else []
    for layer in sorted(sites.layer_set(layers)):
        found += _layer_writers(layout, layer)
    return found


def _embeddings(layout: Layout) -> Iterator[Writer]:
    names = _names(layout.hf)
    head = layout.hf.get_output_embeddings()
    for component in ("embed", "pos_embed"):
        found = layout.top(component)
        if found is None:
            continue
        weight = weight_of(found[1])
        tied = head is not None and getattr(head, "weight", None) is weight
        scale = _embed_scale(layout) if component == "embed" else 1.0
        kind: Component = "embed" if component == "embed" else "pos_embed"
        yield Writer(names[id(weight)], weight.ndim - 1, kind, tied=tied, scale=scale)


def _embed_scale(layout: Layout) -> float:
    """What the token embedding is multiplied by before the first block, measured on one token.

    Token rows differ from what enters block 0 by this factor and by the position embedding, so it is the slope of the
    difference between two tokens at the same position.
    """
    from activations_cache.sites.hooks import run

    embed = layout.top("embed")
    if embed is None:
        return 1.0
    weight = weight_of(embed[1])
    if weight.is_meta:
        raise ModelError("writers needs the weights: this model is on the meta device; load it first")
    ids = torch.tensor([[0], [1]], device=weight.device)
    with torch.no_grad():
        resid = run(layout.hf, {"input_ids": ids}, read="blocks.0.hook_resid_pre").values["blocks.0.hook_resid_pre"]
        rows, seen = (weight[0] - weight[1]).double(), (resid[0, 0] - resid[1, 0]).double()
    power = float(rows @ rows)
    return round(float(rows @ seen) / power, 6) if power > 0 else 1.0


def _layer_writers(layout: Layout, layer: int) -> list[Writer]:
    parts = components(layout.hf, layer)
    if parts.W_O is None or parts.W_out is None:
        missing = "W_O" if parts.W_O is None else "W_out"
        raise ModelError(f"TransformerLens's map names no {missing} in layer {layer} of {type(layout.hf).__name__}")
    attn, mlp = _post_norm(layout, layer, "attn"), _post_norm(layout, layer, "mlp")
    found = [*_writer(parts.W_O, "attn_out", layer, attn)]
    kind: Component = "mlp_out" if parts.W_out.expert_axis is None else "expert_out"
    found += _writer(parts.W_out, kind, layer, mlp)
    for shared in parts.shared:
        found += _writer(shared, "mlp_out", layer, mlp)
    return found


def _writer(weight: Weight, component: Component, layer: int, norm: tuple[str | None, float]) -> Iterator[Writer]:
    post_norm, offset = norm
    yield Writer(weight.name, weight.out_axis, component, layer, weight.expert_axis, False, post_norm, offset)
    if weight.bias is not None:
        axis = 0 if weight.expert_axis is None else 1  # [d_model] or [n_experts, d_model]
        yield Writer(weight.bias, axis, component, layer, weight.expert_axis, True, post_norm, offset)


def _post_norm(layout: Layout, layer: int, part: str) -> tuple[str | None, float]:
    """Gain of the norm that stands between the attention or MLP and the residual stream, and its offset."""
    place = layout.place(layer, f"hook_{part}_out")
    if place is None or place.path.split(".")[0] == part:
        return None, 0.0
    return join(place.hf, "weight"), gain_offset(place.module)


# -------------------------------------------------------------------- components


def components(model: Any, layer: int) -> Components:
    """The matrices of one layer by name and orientation, for ablating neurons and removing experts.

    Raises:
        ModelError: if the model's architecture is unknown.
        SiteError: for a layer that is not there.
    """
    sites = sites_of(model)
    layout = sites.layout
    (layer,) = sites.layer_set(layer)
    output = layout.child(layer, "attn.o")
    found: dict[str, Any] = {"W_O": None if output is None else _weight(*output)}
    found |= _projections(layout, layer, "attn", {"W_Q": "q", "W_K": "k", "W_V": "v"}, layout.fused_qkv)
    experts = layout.experts(layer)
    if experts is not None:
        found |= _experts(layout, layer, experts)
        return replace(Components(layer, shared=_shared(layout, layer, experts)), **found)
    prefix = "dense_" if layout.child(layer, "mlp.dense_out") else ""
    parts = {"W_in": f"{prefix}in", "W_gate": f"{prefix}gate"}
    fused = {"gate": "pre", "in": "pre_linear"}
    index = {name: layout.fused_gate_up[kind] for name, kind in fused.items() if kind in layout.fused_gate_up}
    found |= _projections(layout, layer, "mlp", parts, index)
    out = layout.mlp_out(layer)
    return replace(Components(layer, W_out=None if out is None else _weight(*out)), **found)


def _weight(name: str, module: nn.Module, index: slice | Tensor | None = None) -> Weight:
    """The matrix of a linear module: `[out, in]`, or `[in, out]` for GPT-2's Conv1D."""
    bias = join(name, "bias") if getattr(module, "bias", None) is not None else None
    in_axis, out_axis = (0, 1) if is_conv1d(module) else (1, 0)
    return Weight(join(name, "weight"), in_axis, out_axis, bias, None, index)


def _projections(
    layout: Layout, layer: int, part: str, wanted: dict[str, str], fused: dict[str, tuple[str, slice | Tensor]]
) -> dict[str, Weight | None]:
    """Matrices of the attention or MLP, each a module of its own or a part of a fused one."""
    found: dict[str, Weight | None] = {}
    parent = layout.child(layer, part)
    for key, name in wanted.items():
        own = layout.child(layer, f"{part}.{name}")
        if own is not None:
            found[key] = _weight(*own)
        elif parent is not None and name in fused:
            child_name, index = fused[name]
            module = submodule(parent[1], child_name)
            found[key] = None if module is None else _weight(join(parent[0], child_name), module, index)
    return found


def _experts(layout: Layout, layer: int, experts: nn.Module) -> dict[str, Weight | None]:
    """The stacked matrices of all experts, and the router."""
    names = _names(layout.hf)
    transposed = bool(getattr(experts, "is_transposed", False))  # [n_experts, in, out], as in gpt-oss
    in_axis, out_axis = (1, 2) if transposed else (2, 1)

    def stacked(leaf: str, index: slice | Tensor | None = None) -> Weight | None:
        weight, bias = getattr(experts, leaf, None), getattr(experts, f"{leaf}_bias", None)
        if not isinstance(weight, Tensor) or weight.ndim != 3:
            return None
        bias_name = names[id(bias)] if isinstance(bias, Tensor) else None
        return Weight(names[id(weight)], in_axis, out_axis, bias_name, 0, index)

    found: dict[str, Weight | None] = {"W_out": stacked("down_proj")}
    fused = getattr(experts, "gate_up_proj", None)
    if isinstance(fused, Tensor):
        n = fused.shape[out_axis]
        halves = (slice(0, n // 2), slice(n // 2, n))
        if not getattr(experts, "is_concatenated", True):  # gate and up alternate, as in gpt-oss
            halves = (slice(0, n, 2), slice(1, n, 2))
        found |= {"W_gate": stacked("gate_up_proj", halves[0]), "W_in": stacked("gate_up_proj", halves[1])}
    else:
        found |= {"W_gate": stacked("gate_proj"), "W_in": stacked("up_proj")}
    router = layout.router(layer)
    if router is not None:
        weight, bias = next(p for p in router.parameters() if p.ndim == 2), getattr(router, "bias", None)
        bias_name = names[id(bias)] if isinstance(bias, nn.Parameter) else None
        found["router"] = Weight(names[id(weight)], 1, 0, bias_name)
    return found


def _shared(layout: Layout, layer: int, experts: nn.Module) -> tuple[Weight, ...]:
    """Output matrices, beside the experts, of an MoE layer: the experts that every token uses."""
    prefix, block = layout.child(layer, "mlp")  # type: ignore[misc]
    inside = {id(module) for module in experts.modules()}
    return tuple(
        _weight(join(prefix, name), module)
        for name, module in block.named_modules()
        if id(module) not in inside and isinstance(module, nn.Linear) and name.split(".")[-1] in OUT_NAMES
    )


def _names(hf: nn.Module) -> dict[int, str]:
    """Parameter names by identity (a tied parameter has the first of its names)."""
    return {id(parameter): name for name, parameter in reversed(list(hf.named_parameters()))}


__all__ = ["Component", "Components", "Weight", "Writer", "components", "writers"]
