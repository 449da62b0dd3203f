"""Moving rows inside RAM: raw values as tensors, gathering as machine words, batches in memory that is used again."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from activations_cache.store import TORCH_TYPES, AnyArray

INTEGER_VIEWS = ((8, torch.int64), (4, torch.int32), (2, torch.int16))
SCRATCH_BYTES = 4 * 2**20  # rows gathered before they are converted: less is slower with threads, more no faster


def as_tensor(values: AnyArray, dtype: str) -> Tensor:
    """Raw values as a tensor of their storage type, sharing memory (bfloat16 arrives as uint16 bits)."""
    if not values.flags.writeable:
        values = values.copy()
    if dtype == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def as_words(values: Shaped[Tensor, "rows *shape"]) -> Shaped[Tensor, "rows words"]:
    """The same bytes as the largest integers that divide a row."""
    flat = values.reshape(len(values), -1)  # [rows, n]
    row_bytes = flat.shape[1] * flat.element_size()
    for size, kind in INTEGER_VIEWS:
        if row_bytes and row_bytes % size == 0:
            return flat.view(kind)
    return flat


def gather_rows(values: Shaped[Tensor, "rows *shape"], index: Tensor) -> Shaped[Tensor, "picked *shape"]:
    """`values[index]`, moving rows as 8-byte integers where their size allows: never slower than by half floats."""
    picked = as_words(values).index_select(0, index)
    return picked.view(values.dtype).reshape(len(index), *values.shape[1:])


def gather_into(
    words: Shaped[Tensor, "rows words"],
    index: Int64[Tensor, " picked"],
    kind: torch.dtype,
    out: Shaped[Tensor, "picked n"],
    scratch: Shaped[Tensor, " bytes"],
) -> None:
    """Write `values[index]` to contiguous `out`, converted to its type piece by piece through `scratch`.

    Args:
        words: The values as words.
        index: Rows to take.
        kind: Type of the values.
        out: Where they go, in any type.
        scratch: Bytes to gather into before the conversion; at least one row is gathered at a time.
    """
    if out.dtype == kind:
        torch.index_select(words, 0, index, out=as_words(out))
        return
    row_bytes = words.shape[1] * words.element_size()
    step = max(1, scratch.shape[0] // max(row_bytes, 1))
    held = scratch if scratch.shape[0] >= row_bytes else scratch.new_empty(row_bytes)
    piece = held[: step * row_bytes].view(words.dtype).reshape(step, words.shape[1])
    total = index.shape[0]
    for start in range(0, total, step):
        stop = min(start + step, total)
        picked = piece[: stop - start]
        torch.index_select(words, 0, index[start:stop], out=picked)
        out[start:stop].copy_(picked.view(kind))


class Outputs:
    """Memory of batches, taken again once nobody holds the batch.

    Fresh memory costs a page fault every 4 KiB, at large rows more than the gather itself. A tensor made from a numpy
    array holds a reference to it for as long as its storage lives, in whatever view, so the array's reference count
    tells whether its memory is free.

    Args:
        keep: Arrays that are kept for another batch.
    """

    def __init__(self, keep: int = 2) -> None:
        self.keep, self._held = keep, list[AnyArray]()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""
        n_bytes = math.prod(shape) * dtype.itemsize
        return torch.from_numpy(self._bytes(n_bytes)[:n_bytes]).view(dtype).reshape(tuple(shape))

    def _bytes(self, n_bytes: int) -> AnyArray:
        for place in range(len(self._held)):
            if sys.getrefcount(self._held[place]) == UNSHARED and len(self._held[place]) >= n_bytes:
                return self._held[place]
        fresh = np.empty(max(n_bytes, 1), np.uint8)
        if len(self._held) < self.keep:
            self._held.append(fresh)
        return fresh


def _unshared() -> int:
    """What `sys.getrefcount` says of an array that its list alone holds."""
    held = [np.empty(1)]
    return sys.getrefcount(held[0])


UNSHARED = _unshared()
__all__ = ["SCRATCH_BYTES", "TORCH_TYPES", "Outputs", "as_tensor", "as_words", "gather_into", "gather_rows"]
