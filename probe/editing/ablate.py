"""Remove MLP neurons and attention heads from the weights: what they write becomes zero, or a constant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from probe.editing._parameters import Parameters, as_edit_errors, fill
from probe.editing.edit import Edit, bare, check_target
from probe.editing.steps import Change, Step
from probe.errors import EditError, TargetError

if TYPE_CHECKING:
    from activations_cache.sites import Weight
    from probe.targets import Heads, Neurons

__all__ = ["ablate"]


def ablate(
    model: Any,
    target: Neurons | Heads | Iterable[tuple[int, int]],
    *,
    values: Float[Tensor, " n"] | Sequence[float] | None = None,
) -> Edit:
    """The edit that silences neurons or heads by zeroing what they write (columns of W_out, of W_O).

    The edited model computes what a hook that sets `mlp.hook_post` (or `attn.hook_z`) to zero at these places would.

    Args:
        model: A `probe` Model or a bare Hugging Face model.
        target: Neurons or Heads; bare pairs (layer, neuron) mean neurons.
        values: Activation that each neuron is fixed at instead of zero (its mean, say), in the order of `target.index`;
            folded into the bias of W_out, so only for classes whose W_out has one.

    Returns:
        An edit of replaced columns (rows, where a class stores [in, out]), not yet applied.

    Raises:
        TargetError: empty, out of range, or of another model.
        EditError: neurons of a mixture of experts, or `values` where W_out has no bias or for heads.
    """
    from activations_cache.hashing import weights_hash

    hf = bare(model)
    made = _as_target(hf, target)
    levels = _levels(made, values)
    base = weights_hash(hf)
    check_target(made, base)
    parameters = Parameters(hf)
    changes: dict[str, Change] = {}
    for layer, index in made.by_layer().items():
        weight, axis, slots = _slots(hf, made.kind, layer, index, made.width)
        old = parameters[weight.name]
        changes |= parameters.replacement(weight.name, fill(old, axis, slots, 0.0))
        if levels is not None:
            level = torch.tensor([levels[layer, i] for i in index])
            changes |= _shift_bias(parameters, weight, old.index_select(axis, torch.tensor(slots)), axis, level)
    if not changes:
        raise EditError(f"All {len(made)} {made.kind} write nothing in this model already: there is nothing to ablate.")
    from probe.targets import to_jsonable

    settings = {"values": None if levels is None else list(levels.values())}
    step = Step(
        "ablate",
        base,
        changes,
        settings=settings,
        target=to_jsonable(made.summary()),
        evidence=dict(to_jsonable(made.evidence)),
    )
    return Edit.of(model, step)


def _as_target(hf: Any, target: Any) -> Any:
    from activations_cache.sites import Sites
    from probe.targets import Heads, Neurons

    with as_edit_errors():
        dims = Sites(hf).dims
    if not isinstance(target, Neurons | Heads):
        pairs = _pairs(target)
        if dims.d_mlp is None:
            raise EditError(
                "Every layer of this model is a mixture of experts: its neurons cannot be named (layer, i)."
            )
        target = Neurons(pairs, dims.d_mlp)
    width = dims.d_mlp if isinstance(target, Neurons) else dims.n_heads
    outside = [pair for pair in target.index if pair[0] >= dims.n_layers or (width is not None and pair[1] >= width)]
    if outside:
        raise TargetError(
            f"{outside[0]} is not one of the {dims.n_layers} layers x {width} {target.kind} of this model, from 0."
        )
    return target


def _pairs(target: Any) -> tuple[tuple[int, int], ...]:
    try:
        return tuple((int(layer), int(index)) for layer, index in target)
    except (TypeError, ValueError) as error:
        raise TargetError(f"ablate needs Neurons, Heads or pairs (layer, neuron); got {target!r}.") from error


def _slots(hf: Any, kind: str, layer: int, index: list[int], width: int) -> tuple[Weight, int, list[int]]:
    """The output matrix of the layer, its input axis, and the positions on that axis that belong to the components."""
    from activations_cache import sites

    with as_edit_errors():
        parts = sites.components(hf, layer)
    if kind == "heads":
        if parts.W_O is None:
            raise EditError(f"Layer {layer} has no W_O that can be found.")
        d_head = sites.Sites(hf).dims.d_head
        return parts.W_O, parts.W_O.in_axis, [h * d_head + i for h in index for i in range(d_head)]
    if parts.W_out is None or parts.W_out.expert_axis is not None:
        raise EditError(
            f"Layer {layer} is a mixture of experts, whose neurons are not named (layer, neuron); "
            "remove whole experts with remove_experts."
        )
    size = dict(hf.named_parameters())[parts.W_out.name].shape[parts.W_out.in_axis]
    if max(index) >= size:
        raise TargetError(f"Layer {layer} has {size} neurons, counted from 0; got {max(index)}.")
    return parts.W_out, parts.W_out.in_axis, index


def _levels(target: Any, values: Any) -> dict[tuple[int, int], float] | None:
    if values is None:
        return None
    if target.kind != "neurons":
        raise EditError("values are for neurons: a head's constant output is not one number.")
    numbers = torch.as_tensor(values, dtype=torch.float64).flatten()
    if len(numbers) != len(target) or not bool(torch.isfinite(numbers).all()):
        raise EditError(f"values must be {len(target)} finite numbers, one a neuron; got {len(numbers)}.")
    return dict(zip(target.index, numbers.tolist(), strict=True))


def _shift_bias(
    parameters: Parameters, weight: Weight, columns: Tensor, axis: int, level: Float[Tensor, " n"]
) -> dict[str, Change]:
    """Add to the bias what the neurons would write at a constant activation: the sum of columns times levels."""
    if weight.bias is None:
        raise EditError(
            f"{weight.name} has no bias to hold a constant, so these neurons can only be set to zero: leave out values."
        )
    bias = parameters[weight.bias]
    written = columns.movedim(axis, -1).double() @ level.double().to(columns.device)  # [d_model]
    return parameters.replacement(weight.bias, (bias.double() + written).to(bias.dtype))
