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
from functools import cached_property

import numpy as np
import numpy.typing as npt

from activations_cache.errors import DataError

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
        rows: How many rows it stores; at least one.
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

    @property
    def stop(self) -> int:
        """Number of the first sequence after it."""
        return self.first_sequence + self.sequences


@dataclass(frozen=True)
class Plan:
    """Every shard and batch of a capture, fixed before it starts.

    Attributes:
        shards: The shards, in the order of the data.
        lengths: Tokens of each sequence.
        stored: Stored rows of each sequence.
    """

    shards: tuple[Shard, ...]
    lengths: IntArray
    stored: IntArray

    @property
    def rows(self) -> int:
        """Rows that the finished cache stores."""
        return int(self.stored.sum())

    @property
    def tokens(self) -> int:
        """Tokens that go through the model, padding not counted."""
        return int(self.lengths.sum())

    @property
    def n_batches(self) -> int:
        """Number of forward passes."""
        return sum(len(shard.batches) for shard in self.shards)

    def fingerprint(self) -> str:
        """SHA-256 over the stored rows of each sequence, the shard boundaries and the members of every batch."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(self.stored.astype("<i8").tobytes())
        for shard in self.shards:
            digest.update(f"|{shard.first_sequence}+{shard.sequences}".encode())
            for batch in shard.batches:
                digest.update(b";" + batch.astype("<i8").tobytes())
        return digest.hexdigest()


def default_shard_rows(row_bytes: int, batch_tokens: int) -> int:
    """Rows per shard when none are asked for: about 128 MiB, and never less than one batch.

    Args:
        row_bytes: Bytes of one row over all sites together.
        batch_tokens: Token budget of a batch.
    """
    return max(batch_tokens, min(MAX_SHARD_ROWS, DEFAULT_SHARD_BYTES // max(row_bytes, 1)))


def make_plan(
    lengths: Sequence[int] | IntArray, stored: Sequence[int] | IntArray, *, batch_tokens: int, shard_rows: int
) -> Plan:
    """Plan a capture.

    Args:
        lengths: Tokens of each sequence, in the order of the data.
        stored: Rows to store of each sequence; none of some, but not of all.
        batch_tokens: Padded tokens allowed in a batch. A longer sequence gets a batch of its own.
        shard_rows: Rows allowed in a shard. A longer sequence gets a shard of its own. A shard also ends after
            64 * batch_tokens tokens, which matters where few positions are stored; but every shard stores a row, so
            sequences of which nothing is stored join the next one of which something is (at the end, the last shard).

    Raises:
        DataError: A setting out of range, counts that do not fit the lengths, an empty sequence, no row to store.
    """
    for name, value in (("batch_tokens", batch_tokens), ("shard_rows", shard_rows)):
        if value < 1:
            raise DataError(f"{name} must be at least 1; got {value}")
    sizes, kept = np.asarray(lengths, dtype=np.int64), np.asarray(stored, dtype=np.int64)
    _check(sizes, kept)
    rows, tokens = _sums(kept), _sums(sizes)
    shards: list[Shard] = []
    for index, (start, stop) in enumerate(_cuts(rows, tokens, shard_rows, SHARD_TOKENS_PER_BATCH * batch_tokens)):
        first_row, n_rows, n_tokens = int(rows[start]), int(rows[stop] - rows[start]), int(tokens[stop] - tokens[start])
        batches = batches_of(sizes[start:stop], start, batch_tokens)
        shards.append(Shard(index, start, stop - start, first_row, n_rows, n_tokens, batches))
    return Plan(tuple(shards), sizes, kept)


def _check(sizes: IntArray, kept: IntArray) -> None:
    if sizes.shape != kept.shape or sizes.ndim != 1:
        raise DataError(f"stored must have one count per sequence ({sizes.shape}); got {kept.shape}")
    if len(sizes) and sizes.min() < 1:
        raise DataError(f"sequence {int(sizes.argmin())} has no token; every sequence needs one")
    wrong = np.flatnonzero((kept < 0) | (kept > sizes))
    if len(wrong):
        number = int(wrong[0])
        raise DataError(f"{kept[number]} rows cannot be stored of sequence {number}, which has {sizes[number]} tokens")
    if len(kept) and not kept.any():
        raise DataError("no row is to be stored of any sequence; select at least one position")


def _sums(counts: IntArray) -> IntArray:
    """Running sums with a 0 in front: [n + 1]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])


def _cuts(rows: IntArray, tokens: IntArray, max_rows: int, max_tokens: int) -> Iterator[tuple[int, int]]:
    """Ranges of sequences whose rows and tokens stay within the limits (one sequence and one row at least).

    Args:
        rows: Stored rows before each sequence, and of all, [sequences + 1].
        tokens: The same for tokens.
        max_rows: Rows allowed in a range.
        max_tokens: Tokens allowed in a range.
    """
    start, end = 0, len(rows) - 1
    while start < end:
        by_rows = int(np.searchsorted(rows, rows[start] + max_rows, side="right")) - 1
        by_tokens = int(np.searchsorted(tokens, tokens[start] + max_tokens, side="right")) - 1
        first_kept = int(np.searchsorted(rows, rows[start], side="right"))  # up to and with the first row
        stop = max(min(by_rows, by_tokens), first_kept)
        if rows[stop] == rows[end]:  # nothing is stored of what is left
            stop = end
        yield start, stop
        start = stop


def batches_of(lengths: Sequence[int] | IntArray, first: int, batch_tokens: int) -> tuple[IntArray, ...]:
    """The batches of one shard: its sequences, longest first, in groups whose padded size stays within the budget.

    Args:
        lengths: Tokens of each sequence of the shard.
        first: Number of its first sequence.
        batch_tokens: Padded tokens allowed in a batch; a longer sequence is a batch of its own.

    Returns:
        Sequence numbers of each batch, ascending, in the order in which the batches are run.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    longest, numbers = sizes[order].tolist(), order + first
    batches, start = [], 0
    while start < len(order):
        count = max(1, batch_tokens // longest[start])
        batches.append(np.sort(numbers[start : start + count]))
        start += count
    return tuple(batches)
