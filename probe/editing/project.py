"""Remove a direction or a subspace from everything that writes to the residual stream (directional ablation).

With orthonormal columns V [d_model, k], every writer's output loses its part in the span: ``W <- (I - V V^T) W`` for a
weight stored [out, in], on whichever axis the output runs. Directional ablation of a unit direction is k = 1 (Arditi et
al., arXiv 2406.11717, "weight orthogonalization").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from probe.editing._parameters import Parameters, as_edit_errors
from probe.editing.edit import Edit, bare, check_target
from probe.editing.entries import Dense, Entry, LowRank
from probe.editing.steps import Change, Step
from probe.errors import EditError, TargetError

if TYPE_CHECKING:
    from activations_cache.sites import Writer
    from probe.targets import Direction, Latents, Subspace

__all__ = ["project_out"]

COMPONENTS = {
    "embed": ("embed", "pos_embed"),
    "pos_embed": ("pos_embed",),
    "attn_out": ("attn_out",),
    "mlp_out": ("mlp_out", "expert_out"),
    "expert_out": ("expert_out",),
}


def project_out(
    model: Any,
    target: Direction | Subspace | Latents | Float[Tensor, " d_model"] | Float[Tensor, "d_model k"],
    layers: int | Sequence[int] | str | None = None,
    *,
    components: Sequence[str] = ("embed", "attn_out", "mlp_out"),
    strength: float = 1.0,
    untie: bool = True,
) -> Edit:
    """The edit that removes `target` from what the model writes to its residual stream.

    With all layers, all components and strength 1, no residual activation of the edited model has a part in the span
    (1e-5 of its norm in float32; rounding leaves about 1 % in bfloat16). With chosen layers, only what those blocks add
    loses its part.

    Through a post-norm (Gemma 2 and 3) what is added is ``g * y / rms(y)``, so ``g * V``, made orthonormal, is removed
    from ``y``. Embeddings that are also the unembedding are untied, so that W_U stays as it was.

    Args:
        model: A `probe` Model or a bare Hugging Face model.
        target: Direction, subspace, latents (the span of their decoder rows), or a tensor ``[d_model]`` or
            ``[d_model, k]`` whose columns are made orthonormal.
        layers: Blocks whose writers are edited; None or `"all"` for all of them and the embeddings.
        components: Of `"embed"` (with learned positions), `"attn_out"`, `"mlp_out"` (with experts).
        strength: 1 removes, 0.5 halves; ``W <- (I - strength V V^T) W``.
        untie: Give the unembedding its own copy where an edited embedding is tied to it. If false, W_U changes too.

    Returns:
        An edit of low-rank changes, not yet applied.

    Raises:
        TargetError: zero, NaN, of another width, of another site's space, or of another model.
        EditError: an unknown component or layer, nothing selected, or a strength that is 0 or not finite.
    """
    from activations_cache.hashing import weights_hash

    hf = bare(model)
    if not strength or not math.isfinite(strength):
        raise EditError(f"strength must be a finite number other than 0; got {strength}.")
    chosen = _writers(hf, layers, components)
    basis = _basis(hf, target)
    base = weights_hash(hf)
    check_target(target, base)
    parameters = Parameters(hf)
    changes: dict[str, Change] = {}
    for writer in chosen:
        own = _through_norm(parameters, writer, basis)
        if own is not None:
            changes |= _changes(parameters, writer, own, strength)
    head = _untied(hf, parameters, chosen) if untie else {}
    step = Step(
        "project_out",
        base,
        changes,
        added=head,
        config_patch={"tie_word_embeddings": False} if head else {},
        settings=_settings(layers, components, strength, untie, basis),
        target=_summary(target, basis),
        evidence=_evidence(target),
        notes=tuple(_notes(hf, chosen, bool(head))),
    )
    return Edit.of(model, step)


def _settings(
    layers: int | Sequence[int] | str | None, components: Sequence[str], strength: float, untie: bool, basis: Tensor
) -> dict[str, Any]:
    return {
        "layers": list(layers) if isinstance(layers, Sequence) and not isinstance(layers, str) else layers,
        "components": list(components),
        "strength": strength,
        "untie": untie,
        "rank": basis.shape[1],
    }


def _writers(hf: Any, layers: int | Sequence[int] | str | None, components: Sequence[str]) -> list[Writer]:
    from activations_cache import sites

    unknown = [name for name in components if name not in COMPONENTS]
    if unknown or isinstance(components, str):
        raise EditError(f"components must be among {', '.join(COMPONENTS)}; got {components!r}.")
    if isinstance(layers, str) and layers != "all":
        raise EditError(f'layers must be None, "all", an integer or a list of integers; got {layers!r}.')
    wanted = {kind for name in components for kind in COMPONENTS[name]}
    with as_edit_errors():
        found = sites.writers(hf, None if layers == "all" or isinstance(layers, str) else layers)
    chosen = [writer for writer in found if writer.component in wanted]
    if not chosen:
        raise EditError(
            f"Nothing to edit: components {tuple(components)} and layers {layers} select no parameter. "
            "The embeddings are edited only when layers is None."
        )
    return chosen


def _basis(hf: Any, target: Any) -> Float[Tensor, "d_model k"]:
    """The target's columns, orthonormal to float64 precision."""
    from activations_cache.sites import Sites
    from probe.targets import Direction, Subspace

    if isinstance(target, Tensor):
        target = Direction("", target) if target.ndim == 1 else Subspace("", target)
    basis = getattr(target, "basis", None)
    if not isinstance(basis, Tensor):
        raise TargetError(
            f"project_out needs a Direction, Subspace, Latents or tensor; got {type(target).__name__}. "
            "Neurons and heads are removed by ablate, experts by remove_experts."
        )
    with as_edit_errors():
        sites = Sites(hf)
    _check_site(sites, str(getattr(target, "site", "")))
    if basis.shape[0] != sites.dims.d_model:
        raise TargetError(f"The target has {basis.shape[0]} dimensions; the residual stream has {sites.dims.d_model}.")
    return torch.linalg.qr(basis.double().cpu())[0]


def _check_site(sites: Any, site: str) -> None:
    """A target must live in the space of the residual stream; one of no named site is taken to."""
    if not site:
        return
    if site not in sites:
        raise TargetError(f"The target's site {site} is not a site of this model: it was located in another one.")
    found = sites[site]
    if tuple(found.shape) != (sites.dims.d_model,) or found.kind in ("pre", "pre_linear", "post"):
        raise TargetError(
            f"The target's site {site} holds {found.shape} per token and is not in the space of the residual stream; "
            "locate the direction at a residual site, attn_out or mlp_out."
        )


def _through_norm(parameters: Parameters, writer: Writer, basis: Tensor) -> Tensor | None:
    """What to remove from the writer so that `basis` is gone after its post-norm: an orthonormal basis of g * V."""
    if writer.post_norm is None:
        return basis
    path = writer.post_norm.rpartition(".")[0]
    if f"{path}.bias" in parameters.mapping.state:
        raise EditError(f"{path} adds a bias after {writer.name}: no projection of the weights before it is exact.")
    gain = parameters[writer.post_norm].double().cpu() + writer.gain_offset  # [d_model]
    left, size, _ = torch.linalg.svd(gain[:, None] * basis, full_matrices=False)
    kept = size > 1e-12 * gain.abs().max()  # a direction that the gain removes anyway leaves nothing to do
    return left[:, kept] if bool(kept.any()) else None


def _changes(parameters: Parameters, writer: Writer, basis: Tensor, strength: float) -> dict[str, Change]:
    weight = parameters[writer.name]
    name = parameters.direct(writer.name)
    if name is not None:
        return {name: Change.of(projection_entry(weight, writer.axis, basis, strength), weight)}
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    before = parameters.stored(writer.name, wide)
    after = parameters.stored(writer.name, projected(wide, writer.axis, basis, strength))
    changes = {}
    for stored, new in after.items():
        if not torch.equal(new, before[stored]):
            entry = _fitting(before[stored], new, weight.dtype, basis, strength)
            changes[stored] = Change.of(entry, before[stored].to(weight.dtype))
    return changes


def projected(weight: Tensor, axis: int, basis: Tensor, strength: float = 1.0) -> Tensor:
    """``(I - strength V V^T)`` on one axis of a tensor of any shape."""
    v = basis.to(weight.device, weight.dtype)
    moved = weight.movedim(axis, -1)
    return (moved - strength * (moved @ v) @ v.T).movedim(-1, axis)


def projection_entry(weight: Tensor, axis: int, basis: Tensor, strength: float) -> Entry:
    """`projected` as an entry: low rank where that is smaller than the tensor, replacement values otherwise."""
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    v = basis.to(wide.device, wide.dtype)
    axis %= weight.ndim
    rank, width = basis.shape[1], weight.shape[axis]
    factors = 4 * rank * (width + weight.numel() // width)  # bytes
    if weight.ndim < 2 or axis < weight.ndim - 2 or factors >= weight.numel() * weight.element_size():
        return Dense(projected(wide, axis, basis, strength).to(weight.dtype).contiguous().cpu())
    if axis == weight.ndim - 1:  # [.., in, out]
        return LowRank((-strength * (wide @ v)).float().cpu(), v.T.float().contiguous().cpu())
    return LowRank((-strength * v).float().cpu(), (v.T @ wide).float().contiguous().cpu())  # [.., out, in]


def _fitting(before: Tensor, after: Tensor, dtype: torch.dtype, basis: Tensor, strength: float) -> Entry:
    """The projection of `before` that gives `after`; which axis the conversion left the output on is seen by trying."""
    for axis in range(before.ndim):
        if before.shape[axis] != basis.shape[0]:
            continue
        made = projected(before, axis, basis, strength)
        if torch.allclose(made, after, rtol=1e-4, atol=1e-5 * float(before.abs().max())):
            return projection_entry(before.to(dtype), axis, basis, strength)
    return Dense(after.to(dtype).contiguous().cpu())


def _untied(hf: Any, parameters: Parameters, chosen: Sequence[Writer]) -> dict[str, Tensor | str]:
    """The unembedding as a copy of the embedding as it was, where an edited embedding is tied to it."""
    tied = [writer for writer in chosen if writer.tied]
    if not tied:
        return {}
    head = hf.get_output_embeddings()
    path = next(name for name, module in hf.named_modules() if module is head)
    weight = parameters[tied[0].name]
    added = next(iter(parameters.mapping.to_checkpoint({f"{path}.weight": weight})))
    return {added: parameters.group(tied[0].name).checkpoint[0]}


def _notes(hf: Any, chosen: Sequence[Writer], untied: bool) -> list[str]:
    notes = []
    if untied:
        notes.append("The embedding was tied to the unembedding; they are two tensors now, and W_U is unchanged.")
    elif any(writer.tied for writer in chosen):
        notes.append("The embedding is tied to the unembedding, so W_U lost the directions too.")
    if any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in hf.parameters()):
        notes.append("Rounding to 16 bits leaves about 1 % of the removed component.")
    if any(writer.post_norm for writer in chosen):
        notes.append("Post-norms: the directions were removed through the norms' gains.")
    return notes


def _summary(target: Any, basis: Tensor) -> dict[str, Any]:
    if isinstance(target, Tensor):
        return {"kind": "tensor", "shape": list(target.shape), "basis": basis.float().tolist()}
    from probe.targets import to_jsonable

    return {**to_jsonable(target.summary()), "basis": basis.float().tolist()}


def _evidence(target: Any) -> dict[str, Any]:
    from probe.targets import to_jsonable

    return dict(to_jsonable(getattr(target, "evidence", {})))
