"""How one tensor changes: low-rank factors, replaced rows or columns, replaced values, or a selection of slices.

An entry is a pure function of the base tensor. Replacement entries hold values, never differences, so that applying
them is exact in every floating-point type; a low-rank entry means ``(W.float() + A @ B).to(W.dtype)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probe.errors import EditError

__all__ = ["KINDS", "Columns", "Dense", "Entry", "LowRank", "Rows", "Take", "smallest_replacement"]


class Entry:
    """A change of one tensor. Subclasses say how; `apply` never writes to its argument."""

    kind: ClassVar[str]

    def apply(self, weight: Tensor) -> Tensor:
        """The new tensor, on the device and in the type of `weight`."""
        raise EditError("Entry is the common base; use LowRank, Rows, Columns, Dense or Take.")

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that `edit.safetensors` holds for this entry, by role."""
        return {key: value for key, value in vars(self).items() if isinstance(value, Tensor)}

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise `EditError` unless the entry fits a tensor of this shape."""

    @property
    def nbytes(self) -> int:
        """Bytes of the entry's tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def describe(self) -> str:
        """A few words for tables."""
        return self.kind


@dataclass(frozen=True, eq=False)
class LowRank(Entry):
    """``W <- (W.float() + A @ B).to(W.dtype)``; leading dimensions broadcast as in `torch.matmul`.

    Attributes:
        A: float32 factor, its columns span the change of the output of a torch Linear.
        B: float32 factor.
    """

    kind: ClassVar[str] = "low_rank"
    A: Float[Tensor, "*batch m k"]
    B: Float[Tensor, "*batch k n"]

    def apply(self, weight: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        change = self.A.to(weight.device, wide) @ self.B.to(weight.device, wide)  # [*batch, m, n]
        return (weight.to(wide) + change).to(weight.dtype)

    def check(self, shape: tuple[int, ...]) -> None:
        if self.A.ndim < 2 or self.B.ndim < 2 or self.A.shape[-1] != self.B.shape[-2]:
            raise EditError(f"factors of shapes {tuple(self.A.shape)} and {tuple(self.B.shape)} do not multiply")
        made = (self.A.shape[-2], self.B.shape[-1])
        if made != tuple(shape[-2:]) or any(not _broadcasts(f.shape[:-2], shape[:-2]) for f in (self.A, self.B)):
            raise EditError(
                f"factors of shapes {tuple(self.A.shape)} and {tuple(self.B.shape)} give {made}; "
                f"the tensor is {tuple(shape)}"
            )

    def norm(self, shape: tuple[int, ...]) -> float:
        """Frobenius norm of ``A @ B`` broadcast to `shape`, from the factors' Gram matrices: ``tr(A^T A B B^T)``."""
        a, b = self.A.double(), self.B.double()
        inner = ((a.mT @ a) * (b @ b.mT).mT).sum(dim=(-2, -1))  # [*batch]
        return float(inner.expand(shape[:-2]).sum().clamp_min(0)) ** 0.5

    @property
    def rank(self) -> int:
        """The number of columns of A."""
        return int(self.A.shape[-1])

    def describe(self) -> str:
        return f"low rank ({self.rank})"


@dataclass(frozen=True, eq=False)
class _Slices(Entry):
    index: Int[Tensor, " n"]
    values: Tensor
    axis: ClassVar[int]

    def apply(self, weight: Tensor) -> Tensor:
        values = self.values.to(weight.device, weight.dtype)
        return weight.detach().clone().index_copy_(self.axis % weight.ndim, self.index.to(weight.device), values)

    def check(self, shape: tuple[int, ...]) -> None:
        _check_index(self.index, shape, self.axis)
        if self.index.unique().numel() != self.index.numel():
            raise EditError(f"{self.kind} are named twice")
        expected = list(shape)
        expected[self.axis] = len(self.index)
        if list(self.values.shape) != expected:
            raise EditError(f"values have shape {tuple(self.values.shape)}, {tuple(expected)} was required")

    def describe(self) -> str:
        return f"{len(self.index)} {self.kind}"


@dataclass(frozen=True, eq=False)
class Rows(_Slices):
    """Replacement values for some indices of the first axis: `values` is `[n, *rest]`."""

    kind: ClassVar[str] = "rows"
    axis: ClassVar[int] = 0


@dataclass(frozen=True, eq=False)
class Columns(_Slices):
    """Replacement values for some indices of the last axis: `values` is `[*rest, n]`."""

    kind: ClassVar[str] = "columns"
    axis: ClassVar[int] = -1


@dataclass(frozen=True, eq=False)
class Dense(Entry):
    """Replacement of the whole tensor; another shape is a reshaped tensor and needs a config patch."""

    kind: ClassVar[str] = "dense"
    values: Tensor

    def apply(self, weight: Tensor) -> Tensor:
        return self.values.to(weight.device, weight.dtype).clone()


@dataclass(frozen=True, eq=False)
class Take(Entry):
    """Keep these slices of the first axis, in this order: a reshaped tensor (router rows of the experts that stay)."""

    kind: ClassVar[str] = "take"
    index: Int[Tensor, " n"]

    def apply(self, weight: Tensor) -> Tensor:
        return weight.detach().index_select(0, self.index.to(weight.device))

    def check(self, shape: tuple[int, ...]) -> None:
        _check_index(self.index, shape, 0)

    def describe(self) -> str:
        return f"keeps {len(self.index)} slices"


KINDS: dict[str, type[Entry]] = {entry.kind: entry for entry in (LowRank, Rows, Columns, Dense, Take)}
"""Entry classes by the `kind` that edit.json names."""


def smallest_replacement(old: Tensor, new: Tensor) -> Entry | None:
    """The smallest exact entry that turns `old` into `new` (of the same shape and type); None if they are equal.

    Equality is of bits, so that a zero whose sign changed, or a NaN, is replaced too.
    """
    differs = _bits(old) != _bits(new)
    if not differs.any():
        return None
    choices: list[Entry] = [Dense(new.detach().cpu().clone())]
    if old.ndim >= 1 and old.shape[0] > 1:
        rows = differs.reshape(old.shape[0], -1).any(dim=1).nonzero().flatten()
        choices.append(Rows(rows.cpu(), new.detach().index_select(0, rows).cpu()))
    if old.ndim >= 2:
        columns = differs.reshape(-1, old.shape[-1]).any(dim=0).nonzero().flatten()
        choices.append(Columns(columns.cpu(), new.detach().index_select(old.ndim - 1, columns).cpu().contiguous()))
    return min(choices, key=lambda entry: entry.nbytes)


def _bits(tensor: Tensor) -> Tensor:
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().cpu().contiguous().view(sizes[tensor.element_size()])


def _broadcasts(own: tuple[int, ...], full: tuple[int, ...]) -> bool:
    """Whether leading dimensions `own` broadcast to `full` without enlarging it."""
    tail = full[len(full) - len(own) :] if own else ()
    return len(own) <= len(full) and all(n in (1, m) for n, m in zip(own, tail, strict=True))


def _check_index(index: Tensor, shape: tuple[int, ...], axis: int) -> None:
    if index.ndim != 1 or index.dtype != torch.int64 or index.numel() == 0:
        raise EditError("indices must be a non-empty one-dimensional int64 tensor")
    if not shape or int(index.min()) < 0 or int(index.max()) >= shape[axis]:
        raise EditError(f"an index is outside a tensor of shape {tuple(shape)}")
