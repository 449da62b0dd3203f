"""Mixtures of experts: router logits, the chosen experts and their weights, read and written.

Hugging Face keeps the router in one module, which returns `(logits, weights, indices)`, or the logits alone, for the
tokens of the batch in one row after the other, and hands indices and weights to a module with all experts. Editing the
returned logits changes nothing where the router has chosen already, so a replacement makes the router choose again.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from activations_cache.errors import SiteError
from activations_cache.sites.taps import Callback, Handle, Tokens, checked, put

ARGUMENTS = {"expert_indices": 1, "expert_weights": 2}  # position in the arguments of an experts module


class _ReplaceLogits(TorchFunctionMode):
    """While active, the one linear map to `n_experts` outputs gives `logits` instead of its product."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.used = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and out.shape[-1] == self.logits.shape[-1]:
            self.used += 1
            return self.logits.reshape(out.shape).to(out.dtype)
        return out


def reroute(
    router: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    logits: Float[Tensor, "rows n_experts"],
    name: str,
) -> Any:
    """What `router` returns for these inputs when its logits are `logits`: its own top-k, softmax and scaling.

    Raises:
        SiteError: if the router does not compute its logits by one linear map.
    """
    with _ReplaceLogits(logits) as mode:
        output = router.forward(*args, **kwargs)
    if mode.used != 1:
        raise SiteError(
            f"{name} cannot be replaced: {type(router).__name__} computes no single linear map to its experts; "
            "intervene on hook_expert_indices and hook_expert_weights instead"
        )
    return output


@dataclass(frozen=True, slots=True)
class RouterTap:
    """The router's logits, `[batch, pos, n_experts]`, before any softmax; writing them routes anew."""

    name: str
    block: nn.Module
    router: nn.Module
    item: int = 0

    def attach(self, call: Callback) -> Sequence[Handle]:
        tokens = Tokens(self.block)

        def hook(router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            raw: Tensor = output[self.item] if isinstance(output, tuple) else output
            value = tokens.unflatten(raw)
            new = checked(call, value, self.name)
            if new is None:
                return None
            new = new.reshape(raw.shape)
            return reroute(router, args, kwargs, new, self.name) if isinstance(output, tuple) else new

        return [tokens.handle, self.router.register_forward_hook(hook, with_kwargs=True)]


@dataclass(frozen=True, slots=True)
class ExpertsTap:
    """The chosen experts or their weights, `[batch, pos, top_k]`: arguments of the module with all experts."""

    name: str
    block: nn.Module
    experts: nn.Module
    position: int

    def attach(self, call: Callback) -> Sequence[Handle]:
        keyword = list(inspect.signature(self.experts.forward).parameters)[self.position]
        tokens = Tokens(self.block)

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            where: int | str = self.position if len(args) > self.position else keyword
            raw: Tensor = args[where] if isinstance(where, int) else kwargs[where]
            value = tokens.unflatten(raw)
            new = checked(call, value, self.name)
            if new is None or (new is value and not value.requires_grad):
                return None
            return put(args, kwargs, where, new.reshape(raw.shape))

        return [tokens.handle, self.experts.register_forward_pre_hook(hook, with_kwargs=True)]


@dataclass(frozen=True, slots=True)
class ExpertOutTap:
    """What each chosen expert gives for a token, before its weight: `[batch, pos, top_k, d_model]`.

    The experts' module adds the weighted outputs up without ever holding them apart, so it is run once more, on every
    pair of a token and one of its experts, with weights of one: as many products again as the layer's experts cost, and
    none of it unless this site is asked for. A replacement is weighted and added up here.
    """

    name: str
    block: nn.Module
    experts: nn.Module

    def attach(self, call: Callback) -> Sequence[Handle]:
        tokens = Tokens(self.block)

        def hook(experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            bound = inspect.signature(experts.forward).bind(*args, **kwargs)
            hidden, index, weights = list(bound.arguments.values())[:3]  # [rows, d_model], [rows, top_k] twice
            one = torch.ones_like(weights).reshape(-1, 1)  # [rows * top_k, 1]
            pairs = hidden.repeat_interleave(index.shape[1], dim=0)  # [rows * top_k, d_model]
            each = experts.forward(pairs, index.reshape(-1, 1), one).reshape(*index.shape, -1)  # [rows, top_k, d_model]
            value = each.reshape(*tokens.shape, *each.shape[1:])
            new = checked(call, value, self.name)
            if new is None or (new is value and not value.requires_grad):
                return None
            mixed: Tensor = (new.reshape(each.shape) * weights[..., None]).sum(1)  # [rows, d_model]
            return mixed.to(output.dtype).reshape(output.shape)

        return [tokens.handle, self.experts.register_forward_hook(hook, with_kwargs=True)]


def find_experts(block: nn.Module) -> nn.Module | None:
    """The child of an MoE layer that holds all its experts and takes `(hidden, indices, weights)`."""
    for child in block.children():
        stacked = any(p.ndim == 3 for p in child.parameters(recurse=False))
        if stacked and len(inspect.signature(child.forward).parameters) >= 3:
            return child
    return None


def find_router(block: nn.Module, experts: nn.Module, declared: nn.Module | None) -> nn.Module | None:
    """The router of an MoE layer: the one TransformerLens declares, else the child with a row of weights per expert."""
    if declared is not None:
        return declared
    n_experts = expert_count(experts)
    for child in block.children():
        weight = getattr(child, "weight", None)
        if child is not experts and isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[0] == n_experts:
            return child
    return None


def router_types(router: nn.Module, d_model: int, model_type: torch.dtype) -> tuple[str | None, str | None]:
    """The types of a router's logits and weights where they are float32 in a model of another type, else None.

    The router's own code says so, on a copy without numbers (the meta device); what it does not return, or what cannot
    run without numbers, is taken to have the model's type.
    """
    twin = copy.deepcopy(router).to("meta")
    try:
        output = type(router).forward(twin, torch.empty(1, d_model, dtype=model_type, device="meta"))
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError):
        return None, None
    parts = output if isinstance(output, tuple) else (output,)
    types = [p.dtype if isinstance(p, Tensor) and p.dtype != model_type else None for p in parts]
    logits, weights = ("float32" if kind == torch.float32 else None for kind in (*types, None, None)[:2])
    return logits, weights


def expert_count(experts: nn.Module) -> int:
    """How many experts the stacked parameters of `experts` hold."""
    return next(p.shape[0] for p in experts.parameters(recurse=False) if p.ndim == 3)


def expert_width(experts: nn.Module) -> int | None:
    """Hidden width of one expert, from its stacked W_out; None where that has another name than `down_proj`."""
    weight = getattr(experts, "down_proj", None)
    if not isinstance(weight, Tensor) or weight.ndim != 3:
        return None
    return int(weight.shape[1] if getattr(experts, "is_transposed", False) else weight.shape[2])


def as_int(value: Any) -> int | None:
    """`value` as an int, None where the config has none."""
    return int(value) if isinstance(value, int | torch.SymInt) and value > 0 else None
