"""Apply steps to a Hugging Face model in memory, in place, and put every bit back.

Parameters keep their identity and, where shapes allow, their storage, so that a bridge or an optimiser that shares
them sees the edit. Fused expert parameters are taken apart and put together again by transformers' own conversion.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from activations_cache.hashing import CheckpointMap, weights_hash
from probe.editing.steps import Step
from probe.errors import BaseMismatchError, EditError


class Application:
    """Steps applied to one model, with what is needed to undo them.

    Memory: a copy on the CPU of every parameter that is changed, and while a step runs the largest fused parameter a
    second time.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def run(self, hf: Any, steps: tuple[Step, ...], *, force: bool) -> None:
        """Apply `steps` in order; on any error the model is as before.

        Raises:
            BaseMismatchError: a step was computed from other weights, and `force` is false.
            EditError: a step does not fit the model.
        """
        try:
            for number, step in enumerate(steps):
                # Steps computed from the same base as the first are independent changes of it.
                if not force and (number == 0 or step.base_hash != steps[0].base_hash):
                    _check_base(hf, step, number)
                self._apply(hf, step)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Put everything back, last change first."""
        while self._undo:
            self._undo.pop()()

    def _apply(self, hf: Any, step: Step) -> None:
        mapping = CheckpointMap(hf)
        step.check_names(mapping.names)
        sources = {source for source in step.added.values() if isinstance(source, str)}
        copies = {name: mapping.read(mapping.group_of[name])[name].detach().clone() for name in sources}
        rewritten = sorted({*step.changes, *step.renamed, *step.removed})
        for group in dict.fromkeys(mapping.group_of[name] for name in rewritten):
            memory = mapping.to_memory(step.rewrite(mapping.read(group)))
            if set(memory) != set(group.memory):
                raise EditError(
                    f"{step.method} moves tensors between {group.memory[0]} and other parameters, which cannot be done "
                    "in memory for this class."
                )
            for name, value in memory.items():
                self._write(hf, name, value)
        for name, value in mapping.to_memory(step.new_tensors(copies)).items():
            self._add(hf, name, value)
        self._patch(hf, step.config_patch)

    @torch.no_grad()
    def _write(self, hf: Any, name: str, value: Tensor) -> None:
        """Give the parameter or buffer `name` new values: into its storage if they fit it, else into new storage."""
        tensor = _tensor(hf, name)
        if tensor.shape == value.shape and tensor.dtype == value.dtype:
            kept = tensor.detach().to("cpu", copy=True)
            self._undo.append(lambda: _copy(tensor, kept))
            tensor.copy_(value)
            return
        storage = tensor.data
        self._undo.append(lambda: setattr(tensor, "data", storage))
        tensor.data = value.detach().clone().contiguous()

    def _add(self, hf: Any, name: str, value: Tensor) -> None:
        """Register a parameter of its own where there was none, or one that was tied."""
        path, _, leaf = name.rpartition(".")
        try:
            module = hf.get_submodule(path)
        except AttributeError as error:
            raise EditError(f"The model has no module {path} for the added tensor {name}.") from error
        old = module._parameters.get(leaf)
        like = old if old is not None else next(hf.parameters())
        fresh = nn.Parameter(value.to(like.device, like.dtype), requires_grad=like.requires_grad)
        self._undo.append(lambda: module.register_parameter(leaf, old))
        module.register_parameter(leaf, fresh)

    def _patch(self, hf: Any, patch: Mapping[str, Any]) -> None:
        """Change the configuration, and the numbers that modules derived from it when they were built."""
        if not patch:
            return
        config = hf.config.get_text_config()
        unknown = sorted(key for key in patch if not hasattr(config, key))
        if unknown:
            raise EditError(f"The configuration {type(config).__name__} has no field {unknown[0]!r} to patch.")
        before = _derived(hf)
        for key, value in patch.items():
            old = getattr(config, key)
            self._undo.append(lambda key=key, old=old: setattr(config, key, old))  # type: ignore[misc]
            setattr(config, key, value)
        after = _derived(hf)
        for name, module in hf.named_modules():
            for key in before.get(name, {}).keys() & after.get(name, {}).keys():
                if before[name][key] != after[name][key] and key in vars(module):
                    self._set(module, key, after[name][key])

    def _set(self, module: nn.Module, key: str, value: Any) -> None:
        old, owner = vars(module)[key], ref(module)  # weak: what is applied must not keep the model alive
        self._undo.append(lambda: setattr(owner(), key, old))
        setattr(module, key, value)


def _check_base(hf: Any, step: Step, number: int) -> None:
    found = weights_hash(hf)
    if found != step.base_hash:
        raise BaseMismatchError(
            f"Step {number + 1} ({step.method}) was made for weights {step.base_hash[:12]}; this model has "
            f"{found[:12]}. Load the base model in the type that it had, or pass force=True."
        )


def _derived(hf: Any) -> dict[str, dict[str, Any]]:
    """Module path -> its plain numbers, in a model built without weights from the configuration as it is now."""
    with torch.device("meta"):
        bare = type(hf)(copy.deepcopy(hf.config))
    return {
        name: {
            key: value for key, value in vars(module).items() if isinstance(value, int | float) and key != "training"
        }
        for name, module in bare.named_modules()
    }


def _tensor(hf: Any, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    module = hf.get_submodule(path)
    found: Tensor = module._parameters[leaf] if leaf in module._parameters else module._buffers[leaf]
    return found


@torch.no_grad()
def _copy(tensor: Tensor, values: Tensor) -> None:
    tensor.copy_(values)
