"""Remove experts of a mixture from the weights, in one of three ways that differ in what becomes of their tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from probe.editing._parameters import Parameters, as_edit_errors, fill
from probe.editing.edit import Edit, bare, check_target
from probe.editing.entries import Take
from probe.editing.steps import Change, Step
from probe.errors import EditError, TargetError

if TYPE_CHECKING:
    from activations_cache.sites import Components
    from probe.targets import Experts

__all__ = ["remove_experts"]

MASK = -30000.0
"""Bias of a masked expert: below any logit, and finite in float16."""

_COUNT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_NUMBER = re.compile(r"(?<=experts\.)(\d+)(?=\.)")


def remove_experts(model: Any, target: Experts | Iterable[tuple[int, int]], method: str = "zero") -> Edit:
    """The edit that removes experts.

    A softmax router without a bias (Mixtral, OLMoE, Qwen3-MoE) cannot be told by its weights never to choose an expert:
    logits are linear in the token. So there are three ways:

    - `"zero"` (default; any model, any set of experts): the expert's output matrix and bias become 0. It is still
      chosen, and its share of the routing weights is lost. Equals a hook that sets its entries of
      `mlp.hook_expert_weights` to 0.
    - `"prune"`: the expert and its router row are cut out and the experts after it renumbered; tokens go to their next
      best expert, with the routing weights of the rest. Equals a hook that sets its `mlp.hook_router_logits` to minus
      infinity. The configuration has one number of experts, so every MoE layer must lose equally many.
    - `"mask"` (routers with a bias, such as gpt-oss): its bias becomes -30000, so that it is never chosen. The effect
      of `"prune"` for any set of experts, with no change of shape.

    Args:
        model: A `probe` Model or a bare Hugging Face model.
        target: Experts, or pairs (layer, expert).
        method: As above.

    Returns:
        An edit, not yet applied. Shared experts are left alone.

    Raises:
        TargetError: empty, out of range, of another model, or in a layer without experts.
        EditError: a method that this model cannot express, or fewer experts left than the router chooses.
    """
    from activations_cache.hashing import weights_hash
    from probe.targets import to_jsonable

    hf = bare(model)
    if method not in ("zero", "prune", "mask"):
        raise EditError(f'method must be "zero", "prune" or "mask"; got {method!r}.')
    made, layers = _as_target(hf, target)
    base = weights_hash(hf)
    check_target(made, base)
    parameters = Parameters(hf)
    removed = made.by_layer()
    build = {"zero": _zero, "prune": _prune, "mask": _mask}[method]
    parts = build(hf, parameters, layers, removed)
    step = Step(
        "remove_experts",
        base,
        **parts,
        settings={"method": method},
        target=to_jsonable(made.summary()),
        evidence=dict(to_jsonable(made.evidence)),
    )
    return Edit.of(model, step)


def _as_target(hf: Any, target: Any) -> tuple[Experts, dict[int, Components]]:
    """The target, checked, and the MoE layers of the model."""
    from activations_cache import sites
    from probe.targets import Experts

    with as_edit_errors():
        dims = sites.Sites(hf).dims
        parts = {layer: sites.components(hf, layer) for layer in range(dims.n_layers)}
    layers = {layer: part for layer, part in parts.items() if part.W_out and part.W_out.expert_axis is not None}
    if not layers or dims.n_experts is None:
        raise TargetError(f"{type(hf).__name__} has no experts to remove.")
    if not isinstance(target, Experts):
        try:
            target = Experts(tuple((int(layer), int(expert)) for layer, expert in target), dims.n_experts)
        except (TypeError, ValueError) as error:
            raise TargetError(f"remove_experts needs Experts or pairs (layer, expert); got {target!r}.") from error
    for layer, expert in target.index:
        if layer not in layers or expert >= dims.n_experts:
            raise TargetError(
                f"({layer}, {expert}) is no expert of this model: it has {dims.n_experts} in layers {sorted(layers)}."
            )
    return target, layers


def _zero(
    hf: Any, parameters: Parameters, layers: Mapping[int, Components], removed: Mapping[int, list[int]]
) -> dict[str, Any]:
    changes: dict[str, Change] = {}
    for layer, experts in removed.items():
        weight = layers[layer].W_out
        for name in (weight.name, weight.bias) if weight else ():
            if name is not None:
                changes |= parameters.replacement(name, fill(parameters[name], 0, experts, 0.0))
    return {"changes": changes, "notes": ("The removed experts' share of the routing weights is lost.",)}


def _mask(
    hf: Any, parameters: Parameters, layers: Mapping[int, Components], removed: Mapping[int, list[int]]
) -> dict[str, Any]:
    _check_top_k(hf, removed)
    changes: dict[str, Change] = {}
    for layer, experts in removed.items():
        router = layers[layer].router
        if router is None or router.bias is None:
            raise EditError(
                f"The router of layer {layer} has no bias, so it cannot be told never to choose an expert; use "
                'method="zero", or method="prune" with as many experts in every layer.'
            )
        changes |= parameters.replacement(router.bias, fill(parameters[router.bias], 0, experts, MASK))
    return {"changes": changes}


def _prune(
    hf: Any, parameters: Parameters, layers: Mapping[int, Components], removed: Mapping[int, list[int]]
) -> dict[str, Any]:
    total = _check_prunable(hf, layers, removed)
    changes: dict[str, Change] = {}
    renamed: dict[str, str] = {}
    gone: list[str] = []
    for layer, experts in removed.items():
        stay = torch.tensor([e for e in range(total) if e not in set(experts)])
        for name in _expert_parameters(parameters, layers[layer], total):
            stored = parameters.direct(name)
            if stored is not None:  # one tensor with the experts (or router rows) along its first axis
                changes[stored] = Change.of(Take(stay), parameters[name])
                continue
            new_number = {int(old): new for new, old in enumerate(stay)}
            for stored in parameters.group(name).checkpoint:
                _renumber(stored, new_number, renamed, gone)
    left = total - len(next(iter(removed.values())))
    fields = [key for key in _COUNT_FIELDS if hf.config.get_text_config().to_dict().get(key) == total]
    if not fields:
        raise EditError(f"{type(hf.config).__name__} has no field for the number of experts that could be patched.")
    return {
        "changes": changes,
        "renamed": renamed,
        "removed": tuple(gone),
        "config_patch": dict.fromkeys(fields, left),
        "notes": ("Experts after a removed one have smaller numbers in the edited model.",),
    }


def _renumber(stored: str, new_number: Mapping[int, int], renamed: dict[str, str], gone: list[str]) -> None:
    """Record what becomes of one expert's tensor: removed, renamed, or left as it is."""
    found = _NUMBER.search(stored)
    if found is None:
        raise EditError(f"The checkpoint tensor {stored} carries no expert number, so experts cannot be cut out of it.")
    old = int(found.group())
    if old not in new_number:
        gone.append(stored)
    elif new_number[old] != old:
        renamed[stored] = _NUMBER.sub(str(new_number[old]), stored, count=1)


def _expert_parameters(parameters: Parameters, parts: Components, total: int) -> list[str]:
    """Names in memory of everything in a layer that has a slice an expert, the router included."""
    weights = [w for w in (parts.W_in, parts.W_gate, parts.W_out) if w is not None]
    names = [name for w in weights for name in (w.name, w.bias) if name is not None]
    if parts.router is None:
        raise EditError(f"Layer {parts.layer} has no router that can be found.")
    prefix = parts.router.name.rpartition(".")[0] + "."
    state = parameters.mapping.state
    names += [name for name, t in state.items() if name.startswith(prefix) and t.ndim and t.shape[0] == total]
    return list(dict.fromkeys(names))


def _check_prunable(hf: Any, layers: Mapping[int, Components], removed: Mapping[int, list[int]]) -> int:
    """The number of experts a layer, if the same number leaves every MoE layer and the router's settings allow it."""
    from activations_cache.sites import Sites

    counts = {layer: len(removed.get(layer, ())) for layer in layers}
    if len(set(counts.values())) > 1:
        raise EditError(
            "The configuration has one number of experts for all layers, so prune needs as many in each of the layers "
            f'{sorted(counts)}; got {list(counts.values())}. Use method="zero", or choose equally many.'
        )
    if getattr(hf.config.get_text_config(), "n_group", None) not in (None, 1):
        raise EditError('This router chooses among groups of equal size, which pruning breaks; use method="zero".')
    _check_top_k(hf, removed)
    total = Sites(hf).dims.n_experts
    if total is None:
        raise EditError("The number of experts is not known.")
    return total


def _check_top_k(hf: Any, removed: Mapping[int, list[int]]) -> None:
    from activations_cache.sites import Sites

    dims = Sites(hf).dims
    most = max(len(experts) for experts in removed.values())
    if dims.n_experts is not None and dims.top_k is not None and dims.n_experts - most < dims.top_k:
        raise EditError(
            f"The router chooses {dims.top_k} experts, but only {dims.n_experts - most} of {dims.n_experts} would stay."
        )
