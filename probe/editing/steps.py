"""One step of an edit: the changes of named tensors, the structure that changes with them, and why it was made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from probe.editing.entries import Dense, Entry, LowRank, Take
from probe.errors import EditError

__all__ = ["Change", "Step"]

_PIECE = 1 << 18  # entries at a time, small enough for the cache


@dataclass(frozen=True, eq=False)
class Change:
    """An entry with what it was made for.

    Attributes:
        entry: How the tensor changes.
        shape: Shape of the base tensor.
        dtype: Type of the base tensor, in safetensors' spelling (`BF16`).
        norm: Frobenius norm of the base tensor.
        change: Frobenius norm of the difference that the entry makes, before rounding; None where the shape changes.
    """

    entry: Entry
    shape: tuple[int, ...]
    dtype: str
    norm: float
    change: float | None

    @classmethod
    def of(cls, entry: Entry, weight: Tensor) -> Change:
        """Measure what `entry` does to `weight`."""
        from activations_cache.hashing import dtype_name

        entry.check(tuple(weight.shape))
        if isinstance(entry, LowRank):
            moved: float | None = entry.norm(tuple(weight.shape))
        else:
            new = entry.apply(weight)
            moved = frobenius(weight, new) if new.shape == weight.shape else None
        return cls(entry, tuple(weight.shape), dtype_name(weight.dtype), frobenius(weight), moved)

    def apply(self, name: str, weight: Tensor) -> Tensor:
        """The new tensor.

        Raises:
            EditError: the tensor is not of the shape that the entry was made for, or is quantised.
        """
        if tuple(weight.shape) != self.shape:
            raise EditError(
                f"{name} has shape {tuple(weight.shape)}; the edit was made for {self.shape}. "
                "Apply it to the model that it was made for."
            )
        if not weight.is_floating_point() and not isinstance(self.entry, Dense | Take):
            raise EditError(f"{name} holds {weight.dtype}: load the model dequantised before editing it.")
        return self.entry.apply(weight)


@dataclass(frozen=True, eq=False)
class Step:
    """Changes made together by one method.

    Names are the checkpoint's. In one step, everything is read from the tensors as they were before the step.

    Attributes:
        method: What made it, such as `project_out`.
        base_hash: Weights hash of the model that it was computed from.
        changes: Tensor name to its change.
        added: New tensor name to its values, or to the name of the tensor that it starts as a copy of.
        renamed: Old name to new name.
        removed: Names that are gone.
        config_patch: Configuration fields that change with the tensors.
        settings: The method's arguments.
        seed: Of whatever was random; None if nothing was.
        target: Summary of the target; None if there was none.
        evidence: What chose the target.
        notes: What the reader must know, in words.
    """

    method: str
    base_hash: str
    changes: Mapping[str, Change] = field(default_factory=dict)
    added: Mapping[str, Tensor | str] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    removed: tuple[str, ...] = ()
    config_patch: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    target: Mapping[str, Any] | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (self.changes or self.added or self.removed or self.renamed):
            raise EditError(f"{self.method} changes nothing: an edit needs at least one changed tensor.")
        reshaped = self._reshaped()
        if reshaped and not self.config_patch:
            raise EditError(f"{reshaped[0]} changes its shape, which needs a config patch that says the new size.")
        gone = set(self.removed)
        clash = sorted(gone & (set(self.changes) | set(self.renamed)))
        if clash:
            raise EditError(f"{clash[0]} is both removed and changed or renamed.")
        new = [*self.renamed.values(), *self.added]
        twice = sorted({name for name in new if new.count(name) > 1})
        if twice:
            raise EditError(f"Two tensors would be named {twice[0]}.")

    @property
    def structural(self) -> bool:
        """Whether tensors are added, removed, renamed or reshaped, or the configuration changes."""
        return bool(self.added or self.removed or self.renamed or self.config_patch or self._reshaped())

    @property
    def touched(self) -> set[str]:
        """Names that must exist in the base."""
        copied = {source for source in self.added.values() if isinstance(source, str)}
        return {*self.changes, *self.renamed, *self.removed, *copied}

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are stored."""
        own = sum(t.numel() * t.element_size() for t in self.added.values() if isinstance(t, Tensor))
        return own + sum(change.entry.nbytes for change in self.changes.values())

    def check_names(self, names: Iterable[str]) -> None:
        """Raise `EditError` if the base lacks a tensor that the step needs, or already has one that it adds."""
        present = set(names)
        missing = sorted(self.touched - present)
        if missing:
            raise EditError(
                f"The model lacks {missing[0]} ({len(missing)} tensors in all), which the edit changes: "
                "it was made for another architecture."
            )
        kept = present - set(self.removed) - set(self.renamed)
        taken = sorted(kept & {*self.added, *self.renamed.values()})
        if taken:
            raise EditError(f"The model already has {taken[0]}, which the edit would add.")

    def rewrite(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors before the step, by name -> the same tensors after it, by their names then (without added ones)."""
        out = {}
        for name, weight in tensors.items():
            if name in self.removed:
                continue
            change = self.changes.get(name)
            out[self.renamed.get(name, name)] = change.apply(name, weight) if change else weight
        return out

    def new_tensors(self, read: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The added tensors; `read` holds those that they are copies of, as they were before the step."""
        return {
            name: (read[source] if isinstance(source, str) else source).detach().clone()
            for name, source in self.added.items()
        }

    def _reshaped(self) -> list[str]:
        return [
            name
            for name, change in self.changes.items()
            if isinstance(change.entry, Take)
            or (isinstance(change.entry, Dense) and tuple(change.entry.values.shape) != change.shape)
        ]


def frobenius(weight: Tensor, new: Tensor | None = None) -> float:
    """Frobenius norm of a tensor or of its difference to another, piece by piece in float32, summed in float64."""
    flat = weight.detach().reshape(-1)
    other = None if new is None else new.detach().reshape(-1)
    total = 0.0
    for start in range(0, flat.numel(), _PIECE):
        piece = flat[start : start + _PIECE].float()
        if other is not None:
            piece = other[start : start + _PIECE].float() - piece
        total += float(piece @ piece)
    return total**0.5


def finite(tensor: Tensor, what: str) -> Tensor:
    """`tensor`, or an `EditError` that says `what` is not finite."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise EditError(f"{what} holds NaN or infinity.")
    return tensor
