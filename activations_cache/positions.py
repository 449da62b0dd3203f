"""Which positions of each sequence are stored: all, the last, a mask's, an answer's, or those that the caller names.

A selection may also be pooled: then one row is stored per sequence, the mean over its selected positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from activations_cache._spool import FlatArray
from activations_cache.errors import DataError
from activations_cache.tokens import Tokens

Kind = Literal["all", "last", "chosen"]
Pool = Literal["mean"]
Positions = Literal["all", "last", "answer", "mask"] | Sequence[Any]
NAMES = ("all", "last", "answer", "mask")

IntArray = npt.NDArray[np.int64]
_CHUNK = 4096  # entries that are resolved at once
_BLOCK = 2**22  # tokens of a mask that are read at once


@dataclass(frozen=True, eq=False)
class Selection:
    """The positions that are stored of each sequence.

    Attributes:
        kind: "all", "last", or "chosen", where `flat` names them.
        pool: None stores a row per position; "mean" one per sequence, the mean over its positions.
        lengths: Tokens of each sequence, int64 [sequences].
        counts: Stored rows of each sequence, int64 [sequences]; 1 under `pool`.
        flat: Positions in their sequences, end to end, int32; None but for "chosen".
        starts: Where each sequence's begin in `flat`, and the end, int64 [sequences + 1]; None but for "chosen".
    """

    kind: Kind
    pool: Pool | None
    lengths: IntArray
    counts: IntArray
    flat: npt.NDArray[np.int32] | None = None
    starts: IntArray | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def of(self, sequence: int) -> npt.NDArray[np.int32]:
        """The positions selected of a sequence, ascending, before any pooling."""
        length = int(self.lengths[sequence])
        if self.kind == "chosen":
            assert self.flat is not None and self.starts is not None
            return self.flat[self.starts[sequence] : self.starts[sequence + 1]]
        return np.arange(0 if self.kind == "all" else length - 1, length, dtype=np.int32)

    def row_positions(self, first: int, stop: int) -> npt.NDArray[np.int32]:
        """The position of each row that is stored of sequences `first` to `stop`; of a pooled one its last."""
        lengths = self.lengths[first:stop]
        if self.kind == "last" or (self.kind == "all" and self.pool):
            return (lengths - 1).astype(np.int32)
        if self.kind == "all":
            return _expand(np.zeros_like(lengths), lengths)
        assert self.flat is not None and self.starts is not None
        if self.pool:
            return self.flat[self.starts[first + 1 : stop + 1] - 1]
        return self.flat[self.starts[first] : self.starts[stop]]

    def fingerprint(self) -> str | None:
        """SHA-256 over the chosen positions and the pooling; None for all or the last, unpooled: names say it."""
        if self.kind != "chosen" and self.pool is None:
            return None
        digest = hashlib.sha256(f"{self.kind}|{self.pool}|".encode())
        if self.flat is not None and self.starts is not None:
            digest.update(self.starts.astype("<i8").tobytes())
            for start in range(0, len(self.flat), _BLOCK):
                digest.update(self.flat[start : start + _BLOCK].astype("<i4").tobytes())
        return digest.hexdigest()


def select(tokens: Tokens, positions: Positions, pool: Pool | None = None) -> Selection:
    """Decide which positions are stored.

    Args:
        tokens: The sequences. For "answer" and "mask", `tokenize` was told of them (`positions=`).
        positions: "all"; "last", the last token of each sequence; "answer", the tokens of each row's answer; "mask",
            where the column `mask` is true; or one entry per sequence, each a boolean mask over its tokens, a slice
            (as Python's: ends beyond the sequence are cut), a range, or an ascending list of positions. Negative
            positions count from the end, before any padding. A flat boolean array over the tokens of all sequences
            will do too. An entry may be empty.
        pool: "mean" stores one row per sequence, the mean over its selected positions.

    Raises:
        DataError: An unknown name; another number of entries than sequences; a mask of another length than its
            sequence; positions that are out of range, not ascending, or no integers; nothing selected of any sequence,
            or of one of them under `pool`.
    """
    if pool not in (None, "mean"):
        raise DataError(f"pool must be None or 'mean'; got {pool!r}")
    lengths = tokens.lengths
    if isinstance(positions, str) and positions in ("all", "last"):
        counts = np.ones_like(lengths) if pool or positions == "last" else lengths
        return Selection("all" if positions == "all" else "last", pool, lengths, counts)
    flat, counts = _flat_and_counts(tokens, positions)
    if not counts.any():
        raise DataError("positions select no token of any sequence; at least one is required")
    if pool and not counts.all():
        raise DataError(
            f"positions select no token of sequence {int(np.argmin(counts))}, of which pool='mean' needs one at least; "
            "leave the sequence out, or select one of its positions"
        )
    starts = _sums(counts)
    return Selection("chosen", pool, lengths, np.ones_like(counts) if pool else counts, flat, starts)


def _flat_and_counts(tokens: Tokens, positions: Positions) -> tuple[npt.NDArray[np.int32], IntArray]:
    """Chosen positions end to end, and how many there are of each sequence."""
    if isinstance(positions, str):
        if positions == "answer":
            return _of_answers(tokens)
        if positions == "mask":
            if tokens.masks is None:
                raise DataError('positions="mask" needs a column `mask` with one boolean per token; the data has none')
            return _of_mask(tokens.masks, tokens.offsets)
        raise DataError(f"positions must be one of {', '.join(NAMES)}, or one entry per sequence; got {positions!r}")
    mask = _flat_mask(tokens, positions)
    if mask is not None:
        return _of_mask(mask, tokens.offsets)
    if not hasattr(positions, "__len__") or not hasattr(positions, "__getitem__"):
        raise DataError(f"positions must be a name or a list, one entry per sequence; got {type(positions).__name__}")
    if len(positions) != len(tokens):
        raise DataError(f"positions have {len(positions)} entries for {len(tokens)} sequences; one each is required")
    flat, counts = FlatArray(np.int32), []
    for first in range(0, len(tokens), _CHUNK):
        stop = min(first + _CHUNK, len(tokens))
        made, kept = _resolve(positions[first:stop], tokens.lengths[first:stop], first)
        flat.extend(made)
        counts.append(kept)
    return flat.finish(), np.concatenate(counts)


def _of_answers(tokens: Tokens) -> tuple[npt.NDArray[np.int32], IntArray]:
    spans = tokens.spans
    if spans is None:
        raise DataError('positions="answer" needs texts with a column `answer`; the data has none')
    wrong = np.flatnonzero((spans[:, 0] < 0) | (spans[:, 1] <= spans[:, 0]) | (spans[:, 1] > tokens.lengths))
    if len(wrong):
        number = int(wrong[0])
        raise DataError(
            f"the answer of sequence {number} is tokens {spans[number, 0]} to {spans[number, 1] - 1} of its "
            f"{tokens.lengths[number]}: it is empty or cut off; correct or remove the row"
        )
    counts = spans[:, 1] - spans[:, 0]
    return _expand(spans[:, 0], counts), counts


def _flat_mask(tokens: Tokens, positions: Any) -> npt.NDArray[np.bool_] | None:
    """A mask over the tokens of all sequences, if that is what was given."""
    if getattr(positions, "ndim", 0) != 1 or "bool" not in str(positions.dtype):
        return None
    mask: npt.NDArray[np.bool_] = np.asarray(positions.cpu() if hasattr(positions, "cpu") else positions)
    if len(mask) != tokens.n_tokens:
        raise DataError(f"positions are a mask over {len(mask)} tokens; the data has {tokens.n_tokens}")
    return mask


def _of_mask(mask: npt.NDArray[np.bool_], offsets: IntArray) -> tuple[npt.NDArray[np.int32], IntArray]:
    """Positions in their sequences where a flat mask is true; block by block, since it may be longer than memory."""
    flat, counts = FlatArray(np.int32), np.zeros(len(offsets) - 1, np.int64)
    for start in range(0, len(mask), _BLOCK):
        found = np.flatnonzero(mask[start : start + _BLOCK]) + start
        sequences = np.searchsorted(offsets, found, side="right") - 1
        flat.extend(found - offsets[sequences])
        counts += np.bincount(sequences, minlength=len(counts))
    return flat.finish(), counts


def _sums(counts: IntArray) -> IntArray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])


def _expand(begins: IntArray, counts: IntArray, steps: IntArray | int = 1) -> npt.NDArray[np.int32]:
    """For each entry `count` positions from `begin` on, end to end."""
    number = np.arange(int(counts.sum())) - np.repeat(_sums(counts)[:-1], counts)
    if not isinstance(steps, int):
        number = number * np.repeat(steps, counts)
    return (np.repeat(begins, counts) + number).astype(np.int32)


# --- one entry per sequence -----------------------------------------------------------------------------------------


def _resolve(entries: Sequence[Any], lengths: IntArray, first: int) -> tuple[npt.NDArray[np.int64], IntArray]:
    """Positions and counts of some entries; `first` is the number of the first one's sequence."""
    types = set(map(type, entries))
    if types == {slice}:
        return _of_slices([entry.indices(n) for entry, n in zip(entries, lengths.tolist(), strict=True)], first)
    if types == {list}:
        held = list(chain.from_iterable(entries))
        inner = set(map(type, held))
        counts = np.fromiter(map(len, entries), np.int64, len(entries))
        if inner == {bool} and counts.all():  # an empty list is no positions, not a mask of no tokens
            return _of_masks(np.array(held), counts, lengths, first)
        if inner <= {int}:
            return _checked(np.array(held, np.int64), counts, lengths, first)
    one_by_one = [_entry(entry, int(n), first + i) for i, (entry, n) in enumerate(zip(entries, lengths, strict=True))]
    counts = np.array([len(made) for made in one_by_one], np.int64)
    return _checked(np.concatenate(one_by_one), counts, lengths, first)


def _of_slices(ends: Sequence[tuple[int, int, int]], first: int) -> tuple[npt.NDArray[np.int64], IntArray]:
    starts, stops, steps = np.array(ends, np.int64).T
    if steps.min() < 1:
        raise DataError(f"positions of sequence {first + int(steps.argmin())} are a slice that goes backwards")
    counts = np.maximum(0, -((starts - stops) // steps))
    return _expand(starts, counts, steps).astype(np.int64), counts


def _of_masks(
    mask: npt.NDArray[np.bool_], counts: IntArray, lengths: IntArray, first: int
) -> tuple[npt.NDArray[np.int64], IntArray]:
    wrong = np.flatnonzero(counts != lengths)
    if len(wrong):
        raise _mask_length(first + int(wrong[0]), int(counts[wrong[0]]), int(lengths[wrong[0]]))
    flat, kept = _of_mask(mask, _sums(lengths))
    return flat.astype(np.int64), kept


def _mask_length(number: int, held: int, length: int) -> DataError:
    return DataError(f"the mask of sequence {number} has {held} entries; the sequence has {length} tokens")


def _entry(entry: Any, length: int, number: int) -> npt.NDArray[np.int64]:
    """The positions of one entry, of any kind."""
    if isinstance(entry, slice):
        entry = range(*entry.indices(length))
    if isinstance(entry, range):
        return np.arange(entry.start, entry.stop, entry.step, dtype=np.int64)
    if isinstance(entry, str) or not hasattr(entry, "__len__") or getattr(entry, "ndim", 1) != 1:
        raise DataError(
            f"positions of sequence {number} must be a mask, a slice, a range or a list of positions; got {entry!r}"
        )
    values = np.asarray(entry.cpu() if hasattr(entry, "cpu") else entry)
    if not len(values):
        return np.zeros(0, np.int64)
    if values.dtype == np.bool_:
        if len(values) != length:
            raise _mask_length(number, len(values), length)
        return np.flatnonzero(values)
    mixed = isinstance(entry, list | tuple) and any(isinstance(value, bool | np.bool_) for value in entry)
    if values.dtype.kind not in "iu" or mixed:
        raise DataError(f"positions of sequence {number} must be integers, or all booleans; got {entry!r}")
    return values.astype(np.int64)


def _checked(
    flat: npt.NDArray[np.int64], counts: IntArray, lengths: IntArray, first: int
) -> tuple[npt.NDArray[np.int64], IntArray]:
    """Positions counted from the front, in range and ascending."""
    owner = np.repeat(np.arange(len(counts)), counts)
    length = lengths[owner]
    wrong = np.flatnonzero((flat < -length) | (flat >= length))
    if len(wrong):
        at = wrong[0]
        raise DataError(
            f"position {flat[at]} of sequence {first + owner[at]} is out of range: the sequence has {length[at]} tokens"
        )
    flat = np.where(flat < 0, flat + length, flat)
    back = np.flatnonzero((np.diff(flat) <= 0) & (np.diff(owner) == 0))
    if len(back):
        at = back[0] + 1
        raise DataError(
            f"positions of sequence {first + owner[at]} must ascend, each once; {flat[at]} comes after {flat[at - 1]}"
        )
    return flat, counts
