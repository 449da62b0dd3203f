"""Which tap belongs to which site, for one model: the adapter's aliases followed down to Hugging Face modules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from activations_cache.errors import ModelError, SiteError
from activations_cache.sites import moe
from activations_cache.sites._types import Dims, Site
from activations_cache.sites.adapter import bare, build_adapter, follow, hf_path, join, shadow, submodule
from activations_cache.sites.pattern import PatternTap, eager_function
from activations_cache.sites.taps import InputTap, NormalizedTap, OutputTap, Tap, View


@dataclass(frozen=True, slots=True)
class Place:
    """Where TransformerLens's map says that a hook lives: a module's input or output."""

    path: str  # TransformerLens's path, e.g. "attn.o"
    side: str  # "hook_in" or "hook_out"
    hf: str  # full name of the Hugging Face module
    module: nn.Module


@dataclass
class Layout:
    """A Hugging Face model, its adapter, and what follows from the two.

    Raises:
        ModelError: on construction, if TransformerLens has no adapter for the model or its blocks are not found.
    """

    hf: Any
    adapter: Any = field(init=False)

    def __post_init__(self) -> None:
        self.hf = bare(self.hf)
        self.adapter = build_adapter(self.hf)
        self.mapping = self.adapter.get_component_mapping()
        if "blocks" not in self.mapping or not isinstance(submodule(self.hf, self.blocks_path), nn.ModuleList):
            raise ModelError(
                f"{type(self.hf).__name__} has no list of blocks at {self.mapping.get('blocks')}; a decoder language "
                "model with its head, as AutoModelForCausalLM loads it, is required"
            )
        self.block = self.mapping["blocks"]

    @property
    def blocks_path(self) -> str:
        """Name of the Hugging Face list of blocks, e.g. `model.layers`."""
        return str(self.mapping["blocks"].name)

    @cached_property
    def layers(self) -> list[nn.Module]:
        """The Hugging Face blocks, in order."""
        return list(submodule(self.hf, self.blocks_path).children())  # type: ignore[union-attr]

    def top(self, component: str) -> tuple[str, nn.Module] | None:
        """Name and module of a component outside the blocks (`embed`, `pos_embed`, `ln_final`, `unembed`)."""
        declared = self.mapping.get(component)
        path = None if declared is None else str(declared.name)
        module = None if path is None else submodule(self.hf, path)
        return None if path is None or module is None else (path, module)

    def place(self, layer: int, hook: str) -> Place | None:
        """Follow TransformerLens's aliases from `hook` of a block to the Hugging Face module, None where there is none.

        Example: `place(3, "attn.hook_z")` of a Llama is the input of `model.layers.3.self_attn.o_proj`.
        """
        for path, side in follow(self.block, hook):
            below = hf_path(self.block, path)
            module = None if below is None else submodule(self.layers[layer], below)
            if below is not None and module is not None:
                return Place(path, side, join(self.blocks_path, str(layer), below), module)
        return None

    def component(self, path: str) -> Any:
        """TransformerLens's component at `path` below a block (`attn`, `mlp`, `attn.o`), None if not declared."""
        component = self.block
        for part in path.split("."):
            component = component.submodules.get(part)
            if component is None:
                return None
        return component

    def child(self, layer: int, path: str) -> tuple[str, nn.Module] | None:
        """Full name and module of a declared component of a layer, e.g. `child(0, "attn.o")`."""
        found = self.place(layer, f"{path}.hook_out") if self.component(path) is not None else None
        if found is not None and found.path == path:
            return found.hf, found.module
        below = hf_path(self.block, path)
        module = None if below is None else submodule(self.layers[layer], below)
        return None if below is None or module is None else (join(self.blocks_path, str(layer), below), module)

    @cached_property
    def dims(self) -> Dims:
        """The model's sizes: from the adapter's config, the MLP's and experts' from the parameters themselves."""
        cfg = self.adapter.cfg
        experts = next((e for i in range(len(self.layers)) if (e := self.experts(i)) is not None), None)
        width = next((w for i in range(len(self.layers)) if (w := self.mlp_width(i)) is not None), None)
        return Dims(
            n_layers=len(self.layers),
            d_model=int(cfg.d_model),
            n_heads=int(cfg.n_heads),
            n_kv_heads=int(getattr(cfg, "n_key_value_heads", None) or cfg.n_heads),
            d_head=int(cfg.d_head),
            d_mlp=width,
            d_vocab=int(cfg.d_vocab),
            n_ctx=int(cfg.n_ctx),
            n_experts=None if experts is None else moe.expert_count(experts),
            top_k=None if experts is None else self.top_k(),
            d_expert=None if experts is None else moe.expert_width(experts),
        )

    def top_k(self) -> int | None:
        """How many experts a token is sent to."""
        config = getattr(self.hf.config, "text_config", None) or self.hf.config
        found = moe.as_int(getattr(self.adapter.cfg, "experts_per_token", None))
        return found or moe.as_int(getattr(config, "num_experts_per_tok", None))

    def mlp_width(self, layer: int) -> int | None:
        """Inputs of W_out of a dense MLP, None for a mixture of experts."""
        out = self.mlp_out(layer)
        if out is None:
            return None
        shape = weight_of(out[1]).shape
        return int(shape[0] if is_conv1d(out[1]) else shape[1])

    def experts(self, layer: int) -> nn.Module | None:
        """The module with all experts of a layer, None for a dense layer."""
        mlp = self.child(layer, "mlp")
        return None if mlp is None else moe.find_experts(mlp[1])

    def router(self, layer: int) -> nn.Module | None:
        """The router of a layer, None for a dense layer."""
        mlp, experts = self.child(layer, "mlp"), self.experts(layer)
        if mlp is None or experts is None:
            return None
        declared = self.child(layer, "mlp.gate")
        return moe.find_router(mlp[1], experts, None if declared is None else declared[1])

    @cached_property
    def router_types(self) -> tuple[str | None, str | None]:
        """As `moe.router_types`, of the first router (all layers of a model have the same kind)."""
        router = next((r for i in range(len(self.layers)) if (r := self.router(i)) is not None), None)
        return (None, None) if router is None else moe.router_types(router, self.dims.d_model, self.hf.dtype)

    def mlp_out(self, layer: int) -> tuple[str, nn.Module] | None:
        """Name and module of W_out of a dense MLP (also of the dense layers among sparse ones)."""
        if self.experts(layer) is not None:
            return None
        found = self.child(layer, "mlp.out") or self.child(layer, "mlp.dense_out")
        return found if found is not None and hasattr(found[1], "weight") else None

    # ---------------------------------------------------------------- fused projections

    @cached_property
    def fused_qkv(self) -> dict[str, tuple[str, slice | Tensor]]:
        """Where q, k and v are in the output of a fused projection: see `split_index`; empty where they are apart."""
        split = getattr(self.component("attn"), "split_qkv_matrix", None)
        found = self.child(0, "attn")
        return {} if split is None or found is None else split_index(found[1], split, ("q", "k", "v"))

    @cached_property
    def fused_gate_up(self) -> dict[str, tuple[str, slice | Tensor]]:
        """Where the gate and the linear half are in the output of a fused gate-and-up projection."""
        split = getattr(self.component("mlp"), "split_gate_up_matrix", None)
        found = self.child(0, "mlp")
        return {} if split is None or found is None else split_index(found[1], split, ("pre", "pre_linear"))


def weight_of(module: nn.Module) -> Tensor:
    """The module's weight.

    Raises:
        ModelError: if it has none (a module that is no plain linear map or embedding).
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise ModelError(f"a module with a weight is required, received {type(module).__name__}")
    return weight


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module keeps its weight as `[in, out]` (GPT-2), unlike torch's `[out, in]`."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def split_index(module: nn.Module, split: Any, names: tuple[str, ...]) -> dict[str, tuple[str, slice | Tensor]]:
    """Ask an adapter's function that splits a fused matrix which of its outputs go where.

    The function is given a copy of `module` whose matrices hold, in every row (output), the row's own number; what it
    returns then names the rows. No weight is read and no architecture is known here.

    Returns:
        per name the child of `module` that computes it and the outputs of that child, in order.

    Raises:
        SiteError: if the function mixes outputs of different matrices, or does not fit this configuration.
    """
    numbered: dict[str, nn.Module] = {}
    first, offsets = 0, {}
    for child_name, child in module.named_children():
        weight = getattr(child, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2:
            n_out, n_in = reversed(weight.shape) if is_conv1d(child) else weight.shape
            rows = torch.arange(first, first + n_out, dtype=torch.float32)
            codes = rows[None, :].expand(n_in, n_out) if is_conv1d(child) else rows[:, None].expand(n_out, n_in)
            numbered[child_name] = shadow(child, {"weight": codes})
            offsets[child_name] = range(first, first + n_out)
            first += n_out
    twin = shadow(module, {})
    twin._modules.update(numbered)
    found: dict[str, tuple[str, slice | Tensor]] = {}
    try:
        outputs = split(twin)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise SiteError(
            f"TransformerLens's map of {type(module).__name__} cannot tell {', '.join(names)} apart in their "
            f"common matrix for this configuration ({error}); hook_z and the residual stream do not depend on it"
        ) from error
    for name, part in zip(names, outputs, strict=True):
        rows = part.weight.detach()[:, 0].long()  # [outputs of this part]
        child_name = next(n for n, span in offsets.items() if int(rows[0]) in span)
        index = rows - offsets[child_name].start
        if int(index.min()) < 0 or int(index.max()) >= len(offsets[child_name]):
            raise SiteError(f"cannot tell which outputs of {type(module).__name__} are {name}")
        found[name] = (child_name, as_slice(index))
    return found


def as_slice(index: Tensor) -> slice | Tensor:
    """A run of consecutive numbers as a slice (a view when indexed), any other index unchanged."""
    start = int(index[0])
    consecutive = torch.equal(index, torch.arange(start, start + len(index)))
    return slice(start, start + len(index)) if consecutive else index


# -------------------------------------------------------------------- sites


def enumerate_sites(layout: Layout) -> Iterator[tuple[Site, Tap | None]]:
    """Every site of the model in forward order, with its tap (None where the tap is made on first use)."""
    d_model = layout.dims.d_model
    embed = layout.top("embed")
    if embed is not None:
        site = Site("hook_embed", None, "embed", (d_model,), aliases=("embed.hook_out",))
        yield site, OutputTap(site.name, embed[1])
    position = layout.top("pos_embed")
    if position is not None:
        batch_of = None if embed is None else embed[1]
        site = Site("hook_pos_embed", None, "pos_embed", (d_model,), aliases=("pos_embed.hook_out",))
        yield site, OutputTap(site.name, position[1], batch_of=batch_of)
    for layer in range(len(layout.layers)):
        yield from _block_sites(layout, layer)
    norm = layout.top("ln_final")
    if norm is not None:
        name = "ln_final.hook_normalized"
        yield Site(name, None, "normalized", (d_model,)), NormalizedTap(name, norm[1])


def _block_sites(layout: Layout, layer: int) -> Iterator[tuple[Site, Tap | None]]:
    yield from _plain(layout, layer, "resid_pre", "hook_resid_pre")
    yield from _attention_sites(layout, layer)
    yield from _plain(layout, layer, "attn_out", "hook_attn_out")
    yield from _plain(layout, layer, "resid_mid", "hook_resid_mid")
    if layout.experts(layer) is None:
        yield from _mlp_sites(layout, layer)
    else:
        yield from _expert_sites(layout, layer)
        yield from _expert_out(layout, layer)
    yield from _plain(layout, layer, "mlp_out", "hook_mlp_out")
    yield from _plain(layout, layer, "resid_post", "hook_resid_post")


FLAT = frozenset({"resid_mid", "pre", "pre_linear", "post", "mlp_out"})  # may be computed with one row per token


def _tap(layout: Layout, site: Site, place: Place, view: View = View()) -> Tap:  # noqa: B008 (frozen)
    block = layout.layers[site.layer] if site.layer is not None and site.kind in FLAT else None
    if place.side == "hook_in":
        return InputTap(site.name, place.module, view, site.kind == "resid_mid", block)
    return OutputTap(site.name, place.module, view, block=block)


def _plain(layout: Layout, layer: int, kind: str, hook: str) -> Iterator[tuple[Site, Tap | None]]:
    """A site of the residual stream, `[batch, pos, d_model]`."""
    scale = 1.0
    place = layout.place(layer, hook)
    if place is None and hook in ("hook_attn_out", "hook_mlp_out"):
        # blocks that scale what they add (Granite) have no alias for it: the module's output times a constant
        scale = float(getattr(layout.block, "residual_contribution_scale", 0.0))
        part = getattr(layout.block, f"scaled_{kind.removesuffix('_out')}_submodule", None)
        place = layout.place(layer, f"{part}.hook_out") if scale and part else None
    if place is None:
        return
    name = f"blocks.{layer}.{hook}"
    aliases = (f"blocks.{layer}." + join(place.path, place.side),) if scale == 1.0 else ()
    site = Site(name, layer, kind, (layout.dims.d_model,), aliases=aliases)
    yield site, _tap(layout, site, place, View(scale=scale))


def _attention_sites(layout: Layout, layer: int) -> Iterator[tuple[Site, Tap | None]]:
    dims = layout.dims
    heads = {"q": dims.n_heads, "k": dims.n_kv_heads, "v": dims.n_kv_heads, "z": dims.n_heads}
    attention = layout.child(layer, "attn")
    if attention is None:
        return
    fused = getattr(layout.component("attn"), "split_qkv_matrix", None) is not None
    for kind in ("q", "k", "v", "pattern", "z"):
        name = f"blocks.{layer}.attn.hook_{kind}"
        if kind == "pattern":
            if eager_function(attention[1]) is not None:
                site = Site(name, layer, kind, (dims.n_heads,), cacheable=False)
                yield site, PatternTap(name, attention[1], layout.hf)
            continue
        place = layout.place(layer, f"attn.hook_{kind}")
        shape = (heads[kind], dims.d_head) if place is None else _head_shape(place, heads[kind], dims.d_head)
        aliases = (f"blocks.{layer}.attn.{kind}.hook_out",) if kind != "z" else (f"blocks.{layer}.attn.o.hook_in",)
        site = Site(name, layer, kind, shape, aliases=aliases)
        if place is not None:
            yield site, _tap(layout, site, place, View(heads=shape[1]))
        elif fused and kind != "z":
            yield site, None


def _head_shape(place: Place, n_heads: int, d_head: int) -> tuple[int, int]:
    """`(heads, width)` of q, k, v or z, from the projection itself: values may be wider than keys (DeepSeek)."""
    shape = weight_of(place.module).shape
    n_in, n_out = shape if is_conv1d(place.module) else (shape[1], shape[0])
    return (n_heads, n_in // n_heads) if place.side == "hook_in" else (n_out // d_head, d_head)


def _mlp_sites(layout: Layout, layer: int) -> Iterator[tuple[Site, Tap | None]]:
    width = layout.mlp_width(layer)
    if width is None:
        return
    dense = layout.child(layer, "mlp.dense_out") is not None  # a dense layer of a model whose other layers are sparse
    gate = "mlp.dense_gate.hook_out" if layout.child(layer, "mlp.dense_gate") else "mlp.dense_in.hook_out"
    hooks = {"pre": gate, "pre_linear": "mlp.dense_in.hook_out", "post": "mlp.dense_out.hook_in"}
    fused = getattr(layout.component("mlp"), "split_gate_up_matrix", None) is not None
    for kind in ("pre", "pre_linear", "post"):
        name = f"blocks.{layer}.mlp.hook_{kind}"
        place = layout.place(layer, hooks[kind] if dense else f"mlp.hook_{kind}")
        if place is not None and place.path != "mlp":
            aliases = (f"blocks.{layer}." + join(place.path, place.side),)
            site = Site(name, layer, kind, (width,), aliases=aliases)
            yield site, _tap(layout, site, place)
        elif fused and kind != "post":
            yield Site(name, layer, kind, (width,)), None


def _expert_sites(layout: Layout, layer: int) -> Iterator[tuple[Site, Tap | None]]:
    block, experts, router = layout.child(layer, "mlp"), layout.experts(layer), layout.router(layer)
    if block is None or experts is None:
        return
    prefix = f"blocks.{layer}.mlp.hook_"
    types = layout.router_types
    if router is not None:
        item = int(getattr(layout.component("mlp.gate"), "logits_index", 0))
        declared = (f"blocks.{layer}.mlp.gate.hook_out",) if layout.child(layer, "mlp.gate") else ()
        shape = (moe.expert_count(experts),)
        site = Site(prefix + "router_logits", layer, "router_logits", shape, aliases=declared, dtype=types[0])
        yield site, moe.RouterTap(site.name, block[1], router, item)
    top_k = layout.top_k()
    if top_k is None:
        return
    for kind, position in moe.ARGUMENTS.items():
        integer = kind == "expert_indices"
        site = Site(prefix + kind, layer, kind, (top_k,), integer=integer, dtype=None if integer else types[1])
        yield site, moe.ExpertsTap(site.name, block[1], experts, position)


def _expert_out(layout: Layout, layer: int) -> Iterator[tuple[Site, Tap | None]]:
    block, experts, top_k = layout.child(layer, "mlp"), layout.experts(layer), layout.top_k()
    if block is not None and experts is not None and top_k is not None:
        site = Site(f"blocks.{layer}.mlp.hook_expert_out", layer, "expert_out", (top_k, layout.dims.d_model))
        yield site, moe.ExpertOutTap(site.name, block[1], experts)


def fused_tap(layout: Layout, site: Site) -> Tap:
    """The tap of a site inside a fused projection: which outputs belong to it is found on first use."""
    attention = site.kind in ("q", "k", "v")
    parts = layout.fused_qkv if attention else layout.fused_gate_up
    parent = layout.child(site.layer or 0, "attn" if attention else "mlp")
    child_name, index = parts[site.kind]
    module = None if parent is None else submodule(parent[1], child_name)
    if module is None:
        raise SiteError(f"{site.name}: the fused projection {child_name} is missing from layer {site.layer}")
    return OutputTap(site.name, module, View(heads=layout.dims.d_head if attention else 0, index=index))
