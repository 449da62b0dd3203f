"""Parts of a cache, chosen by labels or by number, that read like a cache and copy nothing."""

from __future__ import annotations

import difflib
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from activations_cache import _info
from activations_cache._reader import Reader, row_numbers
from activations_cache._shards import IntArray, Source
from activations_cache.errors import DataError
from activations_cache.store import AnyArray, json_digest

SHOWN = 8  # existing values that an error message lists
LONG_RUN = 16  # rows on average in a run of neighbours, from which on runs are read in one go


class SubsetSource:
    """Some rows of a source, and some of its sequences, numbered anew; see `Source`.

    Args:
        source: What it is a part of.
        row_numbers: The rows, rising.
        sequence_numbers: The sequences, rising; every row's sequence is among them.
    """

    def __init__(self, source: Source, row_numbers: IntArray, sequence_numbers: IntArray) -> None:
        self.source, self.specs = source, source.specs
        self.row_numbers, self.sequence_numbers = row_numbers, sequence_numbers

    @property
    def rows(self) -> int:
        """Rows of the part."""
        return len(self.row_numbers)

    @property
    def n_sequences(self) -> int:
        """Sequences of the part."""
        return len(self.sequence_numbers)

    def read_into(self, site: str, start: int, out: AnyArray) -> None:
        """Fill contiguous `out` [n, *shape] with the raw rows from `start` on."""
        rows = self.row_numbers[start : start + len(out)]
        edges = np.flatnonzero(np.diff(rows) != 1) + 1
        if len(rows) < LONG_RUN * (len(edges) + 1):
            out[...] = self.source.gather(site, rows)
            return
        bounds = [0, *edges.tolist(), len(rows)]
        for first, stop in itertools.pairwise(bounds):
            if first < stop:
                self.source.read_into(site, int(rows[first]), out[first:stop])

    def gather(self, site: str, rows: IntArray) -> AnyArray:
        """Rows by number, in any order and with repeats, as raw values [len(rows), *shape]."""
        return self.source.gather(site, self.row_numbers[rows])

    def field(self, name: str) -> AnyArray:
        """A dataset outside /sites, cut to the part."""
        if name == "rows/sequence":
            return np.searchsorted(self.sequence_numbers, self.source.field(name)[self.row_numbers]).astype(np.int64)
        if name.startswith("rows/"):
            return np.asarray(self.source.field(name)[self.row_numbers])
        if name == "sequences/offsets":
            lengths = np.diff(self.source.field(name))[self.sequence_numbers]
            return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        if name == "sequences/input_ids":
            kept = np.zeros(self.source.n_sequences, bool)
            kept[self.sequence_numbers] = True
            return np.asarray(self.source.field(name)[np.repeat(kept, np.diff(self.source.field("sequences/offsets")))])
        return np.asarray(self.source.field(name)[self.sequence_numbers])

    def row_slice(self, name: str, start: int, stop: int) -> AnyArray:
        """`field(name)[start:stop]` of a "rows/<name>", read without the rest."""
        rows = self.row_numbers[start:stop]
        if not len(rows):
            return self.source.row_slice(name, 0, 0)
        values = self.source.row_slice(name, int(rows[0]), int(rows[-1]) + 1)[rows - rows[0]]
        return np.asarray(np.searchsorted(self.sequence_numbers, values) if name == "rows/sequence" else values)

    def row_span(self, sequence: int) -> tuple[int, int]:
        """First stored row of a sequence, and the one after its last."""
        first, stop = np.searchsorted(self.row_numbers, self.source.row_span(int(self.sequence_numbers[sequence])))
        return int(first), int(stop)

    def sequence_of(self, row: int) -> int:
        """The sequence that a stored row belongs to."""
        return int(np.searchsorted(self.sequence_numbers, self.source.sequence_of(int(self.row_numbers[row]))))

    def token_ids(self, sequence: int) -> npt.NDArray[np.int32]:
        """Token ids of a whole sequence."""
        return self.source.token_ids(int(self.sequence_numbers[sequence]))


class View(Reader):
    """A part of a cache, made by `where` or `select`: it reads like the cache, and nothing is copied.

    Attributes:
        parent: What it is a part of.
        row_numbers: The number of each of its rows there.
        sequence_numbers: The number of each of its sequences there.
        chosen_by: How it was chosen, in words.
    """

    def __init__(self, parent: Reader, rows: IntArray, sequences: IntArray, chosen_by: str) -> None:
        self.parent, self.row_numbers, self.sequence_numbers, self.chosen_by = parent, rows, sequences, chosen_by
        self.path, self.paths, self.identities = parent.path, parent.paths, parent.identities
        self.finished, self.model = parent.finished, parent.model
        source = SubsetSource(parent._source, rows, sequences)
        super().__init__(source, parent.manifest, parent.columns, parent.token_columns)

    @property
    def rows_key(self) -> str:
        """Which rows these are: equal for the same rows of caches of the same data."""
        parts = (self.row_numbers, self.sequence_numbers)
        digests = [hashlib.sha256(part.astype("<i8").tobytes()).hexdigest() for part in parts]
        return json_digest([self.parent.rows_key, *digests])

    def _facts(self) -> list[tuple[str, str]]:
        manifest = self.manifest
        part = f"{len(self)} of {len(self.parent)} rows, {self.n_sequences} of {self.parent.n_sequences} sequences"
        return [
            ("view", f"{part} of {self.parent.path}"),
            ("chosen by", self.chosen_by),
            ("rows", f"{len(self)}, {_info.size_text(self.nbytes)} of values"),
            *_info.model_facts(manifest),
            ("data", f"{self.n_sequences} sequences, {int(np.sum(self.sequences['length']))} tokens"),
            *_info.data_facts(manifest["data"], self.columns, self.token_columns)[1:],
            ("sites", str(len(self.sites))),
        ]

    @property
    def _title(self) -> str:
        return f"View of {self.parent._title} ({self.chosen_by})"


def select(reader: Reader, rows: Any, sequences: Any) -> View:
    """See `Reader.select`."""
    if rows is None and sequences is None:
        raise DataError("select needs rows= or sequences=: numbers in rising order, a slice, or a boolean mask")
    words = []
    kept, chosen = np.arange(len(reader)), None
    if sequences is not None:
        chosen = _rising(sequences, reader.n_sequences, "sequence")
        kept = _rows_of(reader, chosen)
        words.append(f"{len(chosen)} sequences")
    if rows is not None:
        asked = _rising(rows, len(reader), "row")
        kept = asked if sequences is None else np.intersect1d(asked, kept, assume_unique=True)
        words.append(f"{len(asked)} rows")
        chosen = None
    return _view(reader, kept, chosen, " and ".join(words))


def _view(reader: Reader, rows: IntArray, sequences: IntArray | None, words: str) -> View:
    """A view of rows; its sequences are those given, or those of the rows."""
    if not len(rows) and (sequences is None or not len(sequences)):
        raise DataError(f"{reader.path}: no row is left by {words}")
    if sequences is None:
        sequences = np.unique(reader.rows["sequence"][rows]).astype(np.int64)
    return View(reader, rows.astype(np.int64), sequences, words)


def _rising(numbers: Any, total: int, what: str) -> IntArray:
    """Numbers from numbers in rising order, a slice, or a mask."""
    if isinstance(numbers, slice):
        numbers = np.arange(total)[numbers]
    found = np.atleast_1d(row_numbers(numbers, total, what))
    if found.ndim != 1 or (np.diff(found) <= 0).any():
        raise DataError(
            f"{what}s of a view must be in rising order, each once: a view keeps the order of the cache. Sort them "
            "(numpy.unique does both), or index cache[site][rows] for another order"
        )
    return found


def _rows_of(reader: Reader, sequences: IntArray) -> IntArray:
    """All rows of some sequences; only their shards are asked where they are few."""
    if len(sequences) * 64 < reader.n_sequences:
        spans = [reader._source.row_span(int(number)) for number in sequences]
        return np.concatenate([np.zeros(0, np.int64), *(np.arange(first, stop) for first, stop in spans)])
    kept = np.zeros(reader.n_sequences, bool)
    kept[sequences] = True
    return np.flatnonzero(kept[reader.rows["sequence"]])


# --- conditions -----------------------------------------------------------------------------------------------------


def where(reader: Reader, conditions: Mapping[str, Any]) -> View:
    """See `Reader.where`."""
    per_sequence = [*(name for name in reader.sequences if name != "input_ids")]
    per_row = [name for name in reader.rows if name not in per_sequence and name != "sequence"]
    if not conditions:
        raise DataError(f"where needs a condition on one of {per_sequence + per_row}")
    sequences: npt.NDArray[np.bool_] | None = None
    rows: npt.NDArray[np.bool_] | None = None
    for name, condition in conditions.items():
        if name in per_sequence:
            mask = _mask(name, np.asarray(reader.sequences[name]), condition)
            sequences = mask if sequences is None else sequences & mask
        elif name in per_row:
            mask = _mask(name, np.asarray(reader.rows[name]), condition)
            rows = mask if rows is None else rows & mask
        else:
            near = difflib.get_close_matches(name, per_sequence + per_row, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{reader.path} has no column {name!r}; its columns are {per_sequence + per_row}{hint}")
    words = ", ".join(f"{name}={_condition_text(condition)}" for name, condition in conditions.items())
    return _part(reader, sequences, rows, words)


def _part(
    reader: Reader, sequences: npt.NDArray[np.bool_] | None, rows: npt.NDArray[np.bool_] | None, words: str
) -> View:
    if sequences is not None and not sequences.any():
        raise DataError(f"{reader.path}: no sequence has {words}")
    if rows is None:
        chosen = np.flatnonzero(sequences) if sequences is not None else np.arange(reader.n_sequences)
        return _view(reader, _rows_of(reader, chosen), chosen, words)
    if sequences is not None:
        rows = rows & sequences[reader.rows["sequence"]]
    return _view(reader, np.flatnonzero(rows), None, words)


def _condition_text(condition: Any) -> str:
    if callable(condition):
        return f"{getattr(condition, '__name__', type(condition).__name__)}()"
    shown = repr(list(condition) if isinstance(condition, np.ndarray | Tensor) else condition)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _mask(name: str, values: AnyArray, condition: Any) -> npt.NDArray[np.bool_]:
    """Where one condition on one column holds."""
    if callable(condition):
        return _called(name, values, condition)
    many = isinstance(condition, list | tuple | Set | range | np.ndarray | Tensor)
    wanted: Sequence[Any] = list(condition) if many else [condition]
    mask = np.zeros(len(values), bool)
    for value in wanted:
        plain = value.item() if isinstance(value, np.generic | Tensor) else value
        hit = _equal(values, plain)
        if not hit.any():
            raise DataError(f"column {name!r} has no value {plain!r}; {_existing(values, plain)}")
        mask |= hit
    return mask


def _equal(values: AnyArray, value: Any) -> npt.NDArray[np.bool_]:
    if isinstance(value, float) and np.isnan(value) and values.dtype.kind == "f":
        return np.isnan(values)
    if isinstance(value, str) != (values.dtype.kind == "O") or not isinstance(value, str | int | float | bool):
        return np.zeros(len(values), bool)
    return np.asarray(values == value, dtype=bool)


def _called(name: str, values: AnyArray, condition: Callable[[AnyArray], Any]) -> npt.NDArray[np.bool_]:
    found = condition(values)
    mask = np.asarray(found.cpu() if isinstance(found, Tensor) else found)
    if mask.dtype != bool or mask.shape != values.shape:
        raise DataError(
            f"the condition on {name!r} takes the whole column, an array {values.dtype} {values.shape}, and must "
            f"return a boolean array of its shape; it returned {type(found).__name__} {mask.dtype} {mask.shape}"
        )
    return mask


def _existing(values: AnyArray, wanted: Any) -> str:
    """The values that a column has, the nearest ones where there are many."""
    distinct = sorted(set(values.tolist()))
    if len(distinct) <= SHOWN:
        return f"its values are {', '.join(map(repr, distinct)) or 'none: it is empty'}"
    if isinstance(wanted, str) and isinstance(distinct[0], str):
        near = difflib.get_close_matches(wanted, distinct, n=3) or distinct[:3]
        return f"it has {len(distinct)} values, such as {', '.join(map(repr, near))}"
    return f"it has {len(distinct)} values from {distinct[0]!r} to {distinct[-1]!r}"
