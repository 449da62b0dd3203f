"""Shuffled batches from disk: random blocks of rows into a buffer in RAM, a permutation there, never a row at a time.

Reading whole blocks keeps the disk at its sequential speed; the buffer mixes many blocks, and so many sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Shaped
from torch import Tensor

from activations_cache._shards import ShardSet
from activations_cache.errors import DataError
from activations_cache.store import NUMPY_TYPES, AnyArray

DEFAULT_BUFFER_BYTES = 64 * 2**20
BLOCK_BYTES = 64 * 2**10  # one read: large enough for sequential speed, small enough that a buffer mixes many blocks
INTEGER_VIEWS = ((8, torch.int64), (4, torch.int32), (2, torch.int16))


def as_tensor(values: AnyArray, dtype: str) -> Tensor:
    """Raw values as a tensor of their storage type, sharing memory (bfloat16 arrives as uint16 bits)."""
    if not values.flags.writeable:
        values = values.copy()
    if dtype == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def gather_rows(values: Shaped[Tensor, "rows *shape"], index: Tensor) -> Shaped[Tensor, "picked *shape"]:
    """`values[index]`, moving rows as 8-byte integers where their size allows: 2-3 times faster than by half floats."""
    if values.element_size() >= 8 or not values.numel():
        return values.index_select(0, index)
    flat = values.reshape(len(values), -1)  # [rows, n]
    row_bytes = flat.shape[1] * flat.element_size()
    for size, kind in INTEGER_VIEWS:
        if row_bytes % size == 0:
            picked = flat.view(kind).index_select(0, index)  # [picked, row_bytes / size]
            return picked.view(values.dtype).reshape(len(index), *values.shape[1:])
    return values.index_select(0, index)


class Batches:
    """Batches of one site's rows, as an iterable; `len()` is the number of batches (of all epochs).

    Every row that was asked for comes exactly once per epoch, in an order that `seed` and the epoch's number fix; the
    last batch of an epoch may be smaller, and is dropped under `drop_last` alone. Iterating again starts again.

    Args:
        shards: The cache's shards.
        site: Canonical site name.
        dtype: Storage type of the site.
        batch_size: Rows per batch.
        seed: Fixes the order.
        epochs: Times through the rows; None goes on for ever.
        cast: Type of the batches; None keeps the storage type.
        rows: Row numbers to draw from; None draws from all.
        shuffle: False gives the rows in order.
        drop_last: Leave out an epoch's last batch if it is smaller.
        buffer_bytes: RAM for the shuffle buffer. More mixes better.
        device: Where the batches go.

    Raises:
        DataError: A size below 1, or no row to draw from.
    """

    def __init__(
        self,
        shards: ShardSet,
        site: str,
        dtype: str,
        *,
        batch_size: int,
        seed: int,
        epochs: int | None,
        cast: torch.dtype | None,
        rows: npt.NDArray[np.int64] | None,
        shuffle: bool,
        drop_last: bool,
        buffer_bytes: int,
        device: torch.device | str | None,
    ) -> None:
        if batch_size < 1 or (epochs is not None and epochs < 0) or buffer_bytes < 1:
            raise DataError(
                "batch_size and buffer_bytes must be at least 1 and epochs None or at least 0; "
                f"got {batch_size}, {buffer_bytes} and {epochs}"
            )
        self.shards, self.site, self.dtype = shards, site, dtype
        self.batch_size, self.seed, self.epochs, self.cast = batch_size, seed, epochs, cast
        self.rows, self.shuffle, self.drop_last, self.device = rows, shuffle, drop_last, device
        self.n_rows = shards.rows if rows is None else len(rows)
        if not self.n_rows:
            raise DataError("no rows to draw batches from: the cache holds none yet, or rows= selects none")
        row_bytes = max(shards.specs[site].row_bytes, 1)
        self.block_rows = max(1, min(BLOCK_BYTES // row_bytes, self.n_rows))
        self.buffer_blocks = max(1, buffer_bytes // (self.block_rows * row_bytes))

    @property
    def per_epoch(self) -> int:
        """Batches in one epoch."""
        return self.n_rows // self.batch_size if self.drop_last else math.ceil(self.n_rows / self.batch_size)

    def __len__(self) -> int:
        if self.epochs is None:
            raise TypeError("batches over epochs=None never end and have no length")
        return self.epochs * self.per_epoch

    def __iter__(self) -> Iterator[Tensor]:
        epoch = 0
        while self.epochs is None or epoch < self.epochs:
            for batch in self.epoch(epoch):
                moved = batch if self.device is None else batch.to(self.device)
                yield moved if self.cast is None else moved.to(self.cast)
            if not self.per_epoch:
                return
            epoch += 1

    def epoch(self, number: int) -> Iterator[Tensor]:
        """The batches of one epoch, in the storage type."""
        generator = np.random.default_rng([self.seed % 2**64, number])
        left: Tensor | None = None
        for buffer in self._buffers(generator):
            order = generator.permutation(len(buffer)) if self.shuffle else np.arange(len(buffer))
            index, start = torch.from_numpy(order), 0
            if left is not None:  # rows that the buffer before could not make a whole batch of
                start = self.batch_size - len(left)
                left = torch.cat([left, gather_rows(buffer, index[:start])])
                if len(left) < self.batch_size:
                    continue
                yield left
            stop = start + (len(buffer) - start) // self.batch_size * self.batch_size
            for first in range(start, stop, self.batch_size):
                yield gather_rows(buffer, index[first : first + self.batch_size])
            left = gather_rows(buffer, index[stop:]) if stop < len(buffer) else None
        if left is not None and not self.drop_last:
            yield left

    def _buffers(self, generator: np.random.Generator) -> Iterator[Tensor]:
        """Fill after fill of the shuffle buffer, each made of whole blocks."""
        n_blocks = math.ceil(self.n_rows / self.block_rows)
        order = generator.permutation(n_blocks) if self.shuffle else np.arange(n_blocks)
        spec = self.shards.specs[self.site]
        storage: AnyArray | None = None
        for first in range(0, n_blocks, self.buffer_blocks):
            blocks = order[first : first + self.buffer_blocks]
            spans = [(int(b) * self.block_rows, min((int(b) + 1) * self.block_rows, self.n_rows)) for b in blocks]
            size = sum(stop - start for start, stop in spans)
            if storage is None:  # the first fill is the largest but for a short last block
                capacity = min(self.buffer_blocks * self.block_rows, self.n_rows)
                storage = np.empty((capacity, *spec.shape), NUMPY_TYPES[self.dtype])
            self._fill(storage[:size], spans)
            yield as_tensor(storage[:size], self.dtype)

    def _fill(self, out: AnyArray, spans: list[tuple[int, int]]) -> None:
        done = 0
        for start, stop in spans:
            part = out[done : done + stop - start]
            if self.rows is None:
                self.shards.read_into(self.site, start, part)
            else:
                part[...] = self.shards.gather(self.site, self.rows[start:stop])
            done += stop - start
