"""The attention pattern: hooked through Hugging Face's attention interface, in eager mode.

The fused kernels (sdpa, flash) never form the pattern. While a pattern is hooked the model therefore runs its own
eager attention, through a function that is registered beside the fused ones; afterwards its former implementation is
back. Eager and fused attention agree up to rounding, and on rows that are all padding they need not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from activations_cache.sites.taps import Callback, Handle, checked

IMPLEMENTATION = "eager_with_pattern_hooks"
_CALLS = "_pattern_callbacks"  # attribute of a hooked attention module


def eager_function(attention: nn.Module) -> Callable[..., Any] | None:
    """The eager attention of the file that defines `attention`; None where it has none of the common form."""
    return getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)


def _attention(
    module: nn.Module,
    query: Float[Tensor, "batch n_heads query d_head"],
    key: Float[Tensor, "batch n_kv_heads key d_head"],
    value: Float[Tensor, "batch n_kv_heads key d_head"],
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch query n_heads d_head"], Float[Tensor, "batch n_heads query key"]]:
    """The module's own eager attention, with the callbacks run on the pattern; returns mixed values and pattern."""
    eager = eager_function(module)
    assert eager is not None  # only modules that have it are hooked or share this implementation
    out, pattern = eager(module, query, key, value, attention_mask, **kwargs)
    changed = pattern
    for call in module.__dict__.get(_CALLS, ()):
        new = call(changed)
        changed = changed if new is None else new
    if changed is pattern:
        return out, pattern
    spread = value.repeat_interleave(changed.shape[1] // value.shape[1], dim=1)  # [batch, n_heads, key, d_head]
    return torch.matmul(changed, spread).transpose(1, 2).contiguous(), changed


class _Restore:
    """Undoes one change when `remove` is called, like a hook's handle."""

    def __init__(self, undo: Callable[[], Any]) -> None:
        self.remove = undo


def use_pattern_attention(modules: Sequence[nn.Module]) -> Sequence[Handle]:
    """Switch the configs of `modules` to the hooked eager attention; the handles switch them back."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    configs = {id(config): config for module in modules if (config := getattr(module, "config", None)) is not None}
    return [_switch(config) for config in configs.values()]


def _switch(config: Any) -> Handle:
    before = config._attn_implementation_internal  # the setter would also overwrite the configs below this one
    config._attn_implementation_internal = IMPLEMENTATION

    def undo() -> None:
        config._attn_implementation_internal = before

    return _Restore(undo)


@dataclass(frozen=True, slots=True)
class PatternTap:
    """Softmaxed attention, `[batch, n_heads, query, key]`.

    `root` is the whole model: its config and that of every attention module decide which implementation runs.
    """

    name: str
    module: nn.Module
    root: nn.Module

    def attach(self, call: Callback) -> Sequence[Handle]:
        def run(pattern: Tensor) -> Tensor | None:
            return checked(call, pattern, self.name)

        calls: list[Callback] = self.module.__dict__.setdefault(_CALLS, [])
        calls.append(run)
        switched = use_pattern_attention([self.root, *(m for m in self.root.modules() if type(m) is type(self.module))])
        return [*switched, _Restore(lambda: self._forget(run))]

    def _forget(self, run: Callback) -> None:
        calls = self.module.__dict__[_CALLS]
        calls.remove(run)
        if not calls:
            del self.module.__dict__[_CALLS]
