"""How one site is read from, and written into, a Hugging Face module.

A tap attaches plain torch hooks to a module and hands the site's value, as `[batch, pos, *shape]`, to a callback. The
callback returns None to leave it, or a tensor of the same shape to put in its place. A tap that is only read costs a
view of the tensor that is there anyway (a gather where the projections q, k and v are interleaved in one matrix).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from activations_cache.errors import SiteError
from activations_cache.sites.adapter import shadow

Callback = Callable[[Tensor], Tensor | None]
Handle = Any  # torch.utils.hooks.RemovableHandle, or anything with .remove()


class Tap(Protocol):
    """Attaches a callback to the place in the model where a site's value lives."""

    def attach(self, call: Callback) -> Sequence[Handle]:
        """Install the hooks; the handles remove them."""


def checked(call: Callback, value: Tensor, name: str) -> Tensor | None:
    """`call(value)`, held to the shape of `value` and cast to its dtype and device; None where it is left alone.

    Raises:
        SiteError: if the replacement is no tensor of that shape.
    """
    new = call(value)
    if new is None:
        return None
    if not isinstance(new, Tensor) or new.shape != value.shape:
        received = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
        raise SiteError(f"an intervention on {name} must return a tensor of shape {tuple(value.shape)}, got {received}")
    return new if new is value else new.to(value)


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, int | str]:
    """A module's main input and where it is: position 0, or the keyword that holds it."""
    if args and isinstance(args[0], Tensor):
        return args[0], 0
    for key in ("hidden_states", "input", "x", "input_ids"):
        if isinstance(kwargs.get(key), Tensor):
            return kwargs[key], key
    raise SiteError(f"found no input tensor among {len(args)} arguments and the keywords {sorted(kwargs)}")


def put(args: tuple[Any, ...], kwargs: dict[str, Any], where: int | str, new: Tensor) -> tuple[Any, dict[str, Any]]:
    """The arguments of a forward with the one at `where` replaced."""
    if isinstance(where, int):
        return (*args[:where], new, *args[where + 1 :]), kwargs
    return args, {**kwargs, where: new}


class Tokens:
    """Remembers `(batch, pos)` of a module's input, for what is computed below it with one row per token."""

    def __init__(self, module: nn.Module) -> None:
        self.shape: tuple[int, int] = (0, 0)
        self.handle = module.register_forward_pre_hook(self._remember, with_kwargs=True)

    def _remember(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, _where = first_tensor(args, kwargs)
        self.shape = (hidden.shape[0], hidden.shape[1])

    def unflatten(self, rows: Shaped[Tensor, "... n"]) -> Shaped[Tensor, "batch pos n"]:
        """`[batch * pos, n] -> [batch, pos, n]`, a view; anything else is left as it is."""
        return rows.reshape(*self.shape, rows.shape[-1]) if rows.ndim == 2 else rows


@dataclass(frozen=True, slots=True)
class View:
    """From a module's tensor `[batch, pos, features]` to a site's value, and back.

    Attributes:
        heads: split the last axis into `[-1, heads]`; 0 leaves it.
        index: the features that belong to the site, as a slice or as an index tensor, in the site's order.
        scale: the value is this multiple of the module's tensor (Granite adds `residual_multiplier * output`).
    """

    heads: int = 0
    index: slice | Tensor | None = None
    scale: float = 1.0

    def read(self, raw: Float[Tensor, "batch pos features"]) -> Float[Tensor, "batch pos *shape"]:
        """`[batch, pos, features] -> [batch, pos, *shape]`, a view wherever that is possible."""
        value = raw
        if self.index is not None:
            index = self.index.to(raw.device) if isinstance(self.index, Tensor) else self.index
            value = raw[..., index]  # [batch, pos, selected]
        if self.scale != 1.0:
            value = value * self.scale
        if self.heads:
            value = value.reshape(*value.shape[:-1], -1, self.heads)  # [batch, pos, n_heads, d_head]
        return value

    def write(
        self, raw: Float[Tensor, "batch pos features"], new: Float[Tensor, "batch pos *shape"]
    ) -> Float[Tensor, "batch pos features"]:
        """The module's tensor with the site's part replaced by `new`; `raw` itself is not changed."""
        if self.heads:
            new = new.flatten(-2)  # [batch, pos, n_heads * d_head]
        if self.scale != 1.0:
            new = new / self.scale
        if self.index is None:
            return new
        out = raw.clone()
        index = self.index.to(raw.device) if isinstance(self.index, Tensor) else self.index
        out[..., index] = new
        return out


@dataclass(frozen=True, slots=True)
class InputTap:
    """The input of a module.

    `in_place` also changes the tensor for everyone else who holds it: the residual stream between attention and MLP is
    the input of a norm *and* the skip connection around it, and the model keeps one tensor for both.
    `block` is the block around a module that may see one row per token (the MLP of OPT).
    """

    name: str
    module: nn.Module
    view: View = View()
    in_place: bool = False
    block: nn.Module | None = None

    def attach(self, call: Callback) -> Sequence[Handle]:
        tokens = None if self.block is None else Tokens(self.block)

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            raw, where = first_tensor(args, kwargs)
            whole = raw if tokens is None else tokens.unflatten(raw)
            value = self.view.read(whole)
            if self.in_place and value is not raw and value.requires_grad:
                value = value.clone()  # a view of what is about to be overwritten would leave the graph with it
            new = checked(call, value, self.name)
            if new is None or (new is value and value is raw):
                return None
            new = self.view.write(whole, new).reshape(raw.shape)
            if self.in_place:
                overwrite(raw, new)
                return None
            return put(args, kwargs, where, new)

        return [*([] if tokens is None else [tokens.handle]), self._register(hook)]

    def _register(self, hook: Callable[..., Any]) -> Handle:
        return self.module.register_forward_pre_hook(hook, with_kwargs=True)


def overwrite(raw: Tensor, new: Tensor) -> None:
    """Copy `new` into the memory of `raw`, also where `new` is a view of it."""
    if new.untyped_storage().data_ptr() == raw.untyped_storage().data_ptr():
        new = new.clone()
    raw.copy_(new)


@dataclass(frozen=True, slots=True)
class OutputTap:
    """The output of a module, or the element `item` of it where it returns a tuple.

    `block` is as in `InputTap`; `batch_of` is the token embedding where the output may lack the batch axis, or have it
    broadcast (learned positions).
    """

    name: str
    module: nn.Module
    view: View = View()
    item: int = 0
    batch_of: nn.Module | None = None
    block: nn.Module | None = None

    def attach(self, call: Callback) -> Sequence[Handle]:
        shape: list[torch.Size] = []
        tokens = None if self.block is None else Tokens(self.block)

        def remember(_: nn.Module, __: Any, output: Tensor) -> None:
            shape[:] = [output.shape]

        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            raw: Tensor = output[self.item] if isinstance(output, tuple) else output
            whole = raw.expand(shape[0]) if shape else raw
            whole = whole if tokens is None else tokens.unflatten(whole)
            value = self.view.read(whole)
            new = checked(call, value, self.name)
            if new is None or (new is value and value is raw):
                return None
            new = self.view.write(whole, new)
            new = new if shape else new.reshape(raw.shape)
            return (*output[: self.item], new, *output[self.item + 1 :]) if isinstance(output, tuple) else new

        handles = [] if tokens is None else [tokens.handle]
        handles += [self.batch_of.register_forward_hook(remember)] if self.batch_of is not None else []
        return [*handles, self.module.register_forward_hook(hook)]


@dataclass(frozen=True, slots=True)
class NormalizedTap:
    """What a norm holds before its gain and bias: `(x - mean) / std` or `x / rms`, TransformerLens's `hook_normalized`.

    The norm's own forward computes it, with the gain set to one and the bias to zero; a replacement goes through the
    gain and bias as they are.
    """

    name: str
    module: nn.Module

    def attach(self, call: Callback) -> Sequence[Handle]:
        offset = gain_offset(self.module)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            raw, _ = first_tensor(args, kwargs)
            value = without_gain(module, offset).forward(raw)  # [batch, pos, d_model]
            new = checked(call, value, self.name)
            if new is None or (new is value and not value.requires_grad):
                return None
            return with_gain(module, offset, new).to(output.dtype)

        return [self.module.register_forward_hook(hook, with_kwargs=True)]


def without_gain(norm: nn.Module, offset: float) -> Any:
    """A copy of `norm` with unit gain and no shift; the input of `forward` decides the device and dtype."""
    parameters: dict[str, Tensor | None] = {}
    for name, value in norm.named_parameters(recurse=False):
        parameters[name] = torch.zeros_like(value) if name == "bias" else torch.full_like(value, 1.0 - offset)
    return shadow(norm, parameters)


def with_gain(
    norm: nn.Module, offset: float, normalized: Float[Tensor, "*rows d_model"]
) -> Float[Tensor, "*rows d_model"]:
    """`normalized * (weight + offset) + bias`, leaving out what the norm does not have."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    out = normalized if weight is None else normalized * (weight + offset)
    return out if bias is None else out + bias


def gain_offset(norm: nn.Module) -> float:
    """What a norm adds to its weight to get its gain: 1.0 in Gemma, whose norms compute `x / rms * (1 + w)`, else 0.0.

    Asked of the module itself: with a weight of zero, only an offset leaves anything.
    """
    zeros = {name: torch.zeros(p.shape) for name, p in norm.named_parameters(recurse=False)}
    if not zeros:
        return 0.0
    width = next(iter(zeros.values())).shape[-1]
    with torch.no_grad():
        out = shadow(norm, dict(zeros)).forward(torch.ones(1, width).cumsum(-1))
    return 1.0 if bool(out.abs().sum() > 0) else 0.0
