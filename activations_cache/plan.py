"""The plan of a capture: which sequences go into which shard, and which of them share a batch.

Padding and batch shape change floating-point results, so a resumed capture equals an uninterrupted one only when both
run the same batches. The plan is therefore computed once, from the lengths and the settings alone, before the first
forward, and its fingerprint is part of the manifest.

Shards are consecutive runs of sequences in the order of the data. Batches never cross a shard; inside one, sequences of
similar length share a batch, the longest first, so that memory runs out at once or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from activations_cache.errors import DataError

Positions = Literal["all", "last"]
IntArray = npt.NDArray[np.int64]

DEFAULT_SHARD_BYTES = 128 * 2**20
MAX_SHARD_ROWS = 2**20
SHARD_TOKENS_PER_BATCH = 64  # a shard ends after this many batches' worth of tokens: the work that a kill can lose


@dataclass(frozen=True)
class Shard:
    """One shard of a plan: sequences `first_sequence` to `first_sequence + sequences`, in order.

    Attributes:
        index: Number of the shard, from 0.
        first_sequence: Number of its first sequence in the data.
        sequences: How many sequences it holds.
        first_row: Number of its first stored row in the whole cache.
        rows: How many rows it stores.
        tokens: How many tokens its sequences have.
        batches: Sequence numbers of each batch, in the order in which they are run.
    """

    index: int
    first_sequence: int
    sequences: int
    first_row: int
    rows: int
    tokens: int
    batches: tuple[IntArray, ...]

    @property
    def file(self) -> str:
        """File name of the shard inside the cache directory."""
        return f"shard-{self.index:05d}.h5"


@dataclass(frozen=True)
class Plan:
    """Every shard and batch of a capture, fixed before it starts."""

    shards: tuple[Shard, ...]
    lengths: IntArray
    positions: Positions

    @property
    def rows(self) -> int:
        """Rows that the finished cache stores."""
        return sum(shard.rows for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Tokens that go through the model, padding not counted."""
        return int(self.lengths.sum())

    @property
    def n_batches(self) -> int:
        """Number of forward passes."""
        return sum(len(shard.batches) for shard in self.shards)

    def fingerprint(self) -> str:
        """SHA-256 over the shard boundaries and the members of every batch."""
        digest = hashlib.sha256(self.positions.encode())
        for shard in self.shards:
            digest.update(f"|{shard.first_sequence}+{shard.sequences}".encode())
            for batch in shard.batches:
                digest.update(b";" + batch.astype("<i8").tobytes())
        return digest.hexdigest()

    def stored(self, shard: Shard) -> IntArray:
        """Stored rows of each sequence of a shard."""
        part = self.lengths[shard.first_sequence : shard.first_sequence + shard.sequences]
        return part if self.positions == "all" else np.ones_like(part)


def default_shard_rows(row_bytes: int, batch_tokens: int) -> int:
    """Rows per shard when none are asked for: about 128 MiB, and never less than one batch.

    Args:
        row_bytes: Bytes of one row over all sites together.
        batch_tokens: Token budget of a batch.
    """
    return max(batch_tokens, min(MAX_SHARD_ROWS, DEFAULT_SHARD_BYTES // max(row_bytes, 1)))


def make_plan(lengths: Sequence[int], *, positions: Positions, batch_tokens: int, shard_rows: int) -> Plan:
    """Plan a capture.

    Args:
        lengths: Tokens of each sequence, in the order of the data.
        positions: "all" stores one row per token, "last" one per sequence.
        batch_tokens: Padded tokens allowed in a batch. A longer sequence gets a batch of its own.
        shard_rows: Rows allowed in a shard. A longer sequence gets a shard of its own. A shard also ends after
            64 * batch_tokens tokens, which matters where few positions are stored.

    Raises:
        DataError: A setting out of range.
    """
    if positions not in ("all", "last"):
        raise DataError(f"positions must be 'all' or 'last'; got {positions!r}")
    for name, value in (("batch_tokens", batch_tokens), ("shard_rows", shard_rows)):
        if value < 1:
            raise DataError(f"{name} must be at least 1; got {value}")
    sizes = np.asarray(lengths, dtype=np.int64)
    stored = sizes if positions == "all" else np.ones_like(sizes)
    shards: list[Shard] = []
    first_row = 0
    for index, (start, stop) in enumerate(_cuts(sizes, stored, shard_rows, SHARD_TOKENS_PER_BATCH * batch_tokens)):
        rows = int(stored[start:stop].sum())
        batches = tuple(_batches(sizes, start, stop, batch_tokens))
        shards.append(Shard(index, start, stop - start, first_row, rows, int(sizes[start:stop].sum()), batches))
        first_row += rows
    return Plan(tuple(shards), sizes, positions)


def _cuts(sizes: IntArray, stored: IntArray, max_rows: int, max_tokens: int) -> Iterator[tuple[int, int]]:
    """Ranges of sequences whose rows and tokens stay within the limits (one sequence at least)."""
    start = rows = tokens = 0
    for number, (size, kept) in enumerate(zip(sizes.tolist(), stored.tolist(), strict=True)):
        if number > start and (rows + kept > max_rows or tokens + size > max_tokens):
            yield start, number
            start, rows, tokens = number, 0, 0
        rows += kept
        tokens += size
    if len(sizes):
        yield start, len(sizes)


def _batches(sizes: IntArray, start: int, stop: int, batch_tokens: int) -> Iterator[IntArray]:
    """Sequences of one shard, longest first, in groups whose padded size stays within the budget."""
    order = start + np.argsort(-sizes[start:stop], kind="stable")
    first = 0
    while first < len(order):
        count = max(1, batch_tokens // int(sizes[order[first]]))
        yield np.sort(order[first : first + count])
        first += count
