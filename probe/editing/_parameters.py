"""From a changed parameter in memory to changes of checkpoint tensors: what the methods of this room share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from activations_cache.errors import ActivationsCacheError
from activations_cache.hashing import CheckpointMap, Group
from probe.editing.entries import smallest_replacement
from probe.editing.steps import Change
from probe.errors import EditError


class Parameters:
    """The parameters of one model by their names in memory, and how each is stored in the checkpoint."""

    def __init__(self, hf: Any) -> None:
        self.mapping = CheckpointMap(hf)
        self._group = {name: group for group in self.mapping.groups for name in group.memory}
        # a tied parameter is saved under one of its names only
        self._saved = {_place(tensor): name for name, tensor in self.mapping.state.items()}
        self._all = dict(hf.state_dict())

    def saved_name(self, name: str) -> str:
        """The name in memory under which a (possibly tied) parameter is saved."""
        if name in self._group:
            return name
        found = self._saved.get(_place(self._all[name])) if name in self._all else None
        if found is None:
            raise EditError(f"{name} is not among the tensors that the model would be saved with.")
        return found

    def __getitem__(self, name: str) -> Tensor:
        return self.mapping.state[self.saved_name(name)].detach()

    def group(self, name: str) -> Group:
        """The tensors that are converted together with the parameter."""
        return self._group[self.saved_name(name)]

    def direct(self, name: str) -> str | None:
        """The checkpoint name, if the parameter is stored there as it is; None if it is split or rearranged."""
        group = self.group(name)
        if len(group.memory) > 1 or len(group.checkpoint) > 1:
            return None
        stored = self.mapping.read(group)[group.checkpoint[0]]
        return group.checkpoint[0] if _place(stored) == _place(self[name]) else None

    def stored(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """The checkpoint tensors of the parameter's group, with `value` in the parameter's place."""
        saved = self.saved_name(name)
        tensors = {other: self.mapping.state[other].detach().to(value.dtype) for other in self.group(name).memory}
        return self.mapping.to_checkpoint({**tensors, saved: value})

    def replacement(self, name: str, value: Tensor) -> dict[str, Change]:
        """Changes that give the parameter exactly `value`: rows, columns or all of each stored tensor."""
        before = self.stored(name, self[name])
        changes = {}
        for stored, new in self.stored(name, value.to(self[name].dtype)).items():
            entry = smallest_replacement(before[stored], new)
            if entry is not None:
                changes[stored] = Change.of(entry, before[stored])
        return changes


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), str(tensor.device))


@contextmanager
def as_edit_errors() -> Iterator[None]:
    """Turn what the lower package refuses (an unknown class, a layer that is not there) into an `EditError`."""
    try:
        yield
    except ActivationsCacheError as error:
        raise EditError(str(error)) from error


def fill(weight: Tensor, axis: int, index: Sequence[int], value: float) -> Tensor:
    """A copy of `weight` with the slices `index` of `axis` set to `value`."""
    where = torch.as_tensor(list(index), device=weight.device)
    return weight.detach().clone().index_fill_(axis, where, value)
