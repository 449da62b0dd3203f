"""Several caches of one model read as one: `join` puts their sites side by side, `concat` their rows end to end."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from activations_cache import _info
from activations_cache._reader import UNKNOWN, Reader, SiteStatistics
from activations_cache._shards import IntArray, Source
from activations_cache.errors import CacheMismatchError, DataError
from activations_cache.store import NUMPY_TYPES, AnyArray, Moments, SiteSpec, json_digest

NORM_TOLERANCE = 0.01  # batches of another shape change the last bits of a value, not its norm


class JoinedSet:
    """Sites of several sources of the same rows; see `Source`.

    Args:
        sources: The sources. Tokens and positions are read from the first.
        owner: Which of them each site is read from.
        fields: Which of them each further dataset is read from, e.g. "sequences/author".
    """

    def __init__(self, sources: Sequence[Source], owner: Mapping[str, int], fields: Mapping[str, int]) -> None:
        self.sources, self.owner, self.fields = list(sources), dict(owner), dict(fields)
        self.specs: Mapping[str, SiteSpec] = {name: self.sources[n].specs[name] for name, n in self.owner.items()}

    @property
    def rows(self) -> int:
        """Stored rows."""
        return self.sources[0].rows

    @property
    def n_sequences(self) -> int:
        """Sequences."""
        return self.sources[0].n_sequences

    def read_into(self, site: str, start: int, out: AnyArray) -> None:
        """Fill contiguous `out` [n, *shape] with the raw rows from `start` on."""
        self.sources[self.owner[site]].read_into(site, start, out)

    def gather(self, site: str, rows: IntArray) -> AnyArray:
        """Rows by number, in any order and with repeats, as raw values [len(rows), *shape]."""
        return self.sources[self.owner[site]].gather(site, rows)

    def field(self, name: str) -> AnyArray:
        """A whole dataset outside /sites, of the source that has it."""
        return self.sources[self.fields.get(name, 0)].field(name)

    def row_slice(self, name: str, start: int, stop: int) -> AnyArray:
        """`field(name)[start:stop]` of a "rows/<name>", read without the rest."""
        return self.sources[self.fields.get(name, 0)].row_slice(name, start, stop)

    def row_span(self, sequence: int) -> tuple[int, int]:
        """First stored row of a sequence, and the one after its last."""
        return self.sources[0].row_span(sequence)

    def sequence_of(self, row: int) -> int:
        """The sequence that a stored row belongs to."""
        return self.sources[0].sequence_of(row)

    def token_ids(self, sequence: int) -> npt.NDArray[np.int32]:
        """Token ids of a whole sequence."""
        return self.sources[0].token_ids(sequence)


class ConcatSet:
    """Rows and sequences of several sources end to end; see `Source`."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self.specs: Mapping[str, SiteSpec] = self.sources[0].specs
        self.row_starts = np.cumsum([0, *(source.rows for source in self.sources)])
        self.sequence_starts = np.cumsum([0, *(source.n_sequences for source in self.sources)])

    @property
    def rows(self) -> int:
        """Stored rows."""
        return int(self.row_starts[-1])

    @property
    def n_sequences(self) -> int:
        """Sequences."""
        return int(self.sequence_starts[-1])

    def read_into(self, site: str, start: int, out: AnyArray) -> None:
        """Fill contiguous `out` [n, *shape] with the raw rows from `start` on."""
        done = 0
        while done < len(out):
            number, local = self._place(self.row_starts, start + done)
            count = min(len(out) - done, self.sources[number].rows - local)
            self.sources[number].read_into(site, local, out[done : done + count])
            done += count

    def gather(self, site: str, rows: IntArray) -> AnyArray:
        """Rows by number, in any order and with repeats, as raw values [len(rows), *shape]."""
        spec = self.specs[site]
        out = np.empty((len(rows), *spec.shape), NUMPY_TYPES[spec.dtype])
        numbers = np.searchsorted(self.row_starts, rows, side="right") - 1
        for number in np.unique(numbers).tolist():
            where = np.flatnonzero(numbers == number)
            out[where] = self.sources[number].gather(site, rows[where] - self.row_starts[number])
        return out

    def field(self, name: str) -> AnyArray:
        """A whole dataset outside /sites, end to end."""
        parts = [source.field(name) for source in self.sources]
        if name == "sequences/offsets":
            return np.concatenate([[0], np.cumsum(np.concatenate([np.diff(part) for part in parts]))]).astype(np.int64)
        if name == "rows/sequence":
            parts = [part + first for part, first in zip(parts, self.sequence_starts[:-1], strict=True)]
        return np.concatenate([part for part in parts if len(part)] or parts[:1])

    def row_slice(self, name: str, start: int, stop: int) -> AnyArray:
        """`field(name)[start:stop]` of a "rows/<name>", read without the rest."""
        parts, row = [], start
        while row < stop:
            number, local = self._place(self.row_starts, row)
            count = min(stop - row, self.sources[number].rows - local)
            part = self.sources[number].row_slice(name, local, local + count)
            parts.append(part + self.sequence_starts[number] if name == "rows/sequence" else part)
            row += count
        return np.concatenate(parts) if parts else self.sources[0].row_slice(name, 0, 0)

    def row_span(self, sequence: int) -> tuple[int, int]:
        """First stored row of a sequence, and the one after its last."""
        number, local = self._place(self.sequence_starts, sequence)
        first, stop = self.sources[number].row_span(local)
        return first + int(self.row_starts[number]), stop + int(self.row_starts[number])

    def sequence_of(self, row: int) -> int:
        """The sequence that a stored row belongs to."""
        number, local = self._place(self.row_starts, row)
        return self.sources[number].sequence_of(local) + int(self.sequence_starts[number])

    def token_ids(self, sequence: int) -> npt.NDArray[np.int32]:
        """Token ids of a whole sequence."""
        number, local = self._place(self.sequence_starts, sequence)
        return self.sources[number].token_ids(local)

    @staticmethod
    def _place(starts: IntArray, index: int) -> tuple[int, int]:
        """Which source an index falls into, and the index there. Empty sources are stepped over."""
        number = int(np.searchsorted(starts, index, side="right")) - 1
        return number, index - int(starts[number])


class _Several(Reader):
    """What joins and concatenations have in common."""

    def __init__(
        self, parts: Sequence[Reader], source: Source, data: dict[str, Any], columns: Any, token_columns: Any
    ) -> None:
        self.parts = tuple(parts)
        self.path = parts[0].path
        self.paths = tuple(path for part in parts for path in part.paths)
        self.identities = tuple(dict.fromkeys(name for part in parts for name in part.identities))
        self.finished, self.model = all(part.finished for part in parts), parts[0].model
        manifest = {"model": parts[0].manifest["model"], "tokenizer": _common(parts, "tokenizer"), "data": data}
        manifest |= {"finished": self.finished, "sites": [spec.to_json() for spec in source.specs.values()]}
        manifest |= {"settings": parts[0].manifest["settings"], "rows": source.rows}
        super().__init__(source, manifest, columns, token_columns)

    def _facts(self) -> list[tuple[str, str]]:
        kind = type(self).__name__.lower()
        return [
            *((kind if n == 0 else "and", repr(part)) for n, part in enumerate(self.parts)),
            ("rows", f"{len(self)}, {_info.size_text(self.nbytes)} of values"),
            *_info.model_facts(self.manifest),
            *_info.data_facts(self.manifest["data"], self.columns, self.token_columns),
            ("sites", str(len(self.sites))),
        ]

    @property
    def _title(self) -> str:
        return f"{type(self).__name__} of {len(self.parts)}"


class Join(_Several):
    """Caches of the same rows, their sites side by side: see `join`.

    Attributes:
        parts: The caches.
    """

    def __init__(self, parts: Sequence[Reader]) -> None:
        self._owner: dict[str, int] = {}
        for n, part in enumerate(parts):
            self._owner |= {name: n for name in part.sites if name not in self._owner}
        fields, columns, token_columns = dict[str, int](), dict[str, str](), dict[str, str]()
        for n, part in enumerate(parts):
            columns |= part.columns  # the same values wherever a name occurs twice: `join` has compared them
            token_columns |= part.token_columns
            fields |= {f"sequences/{name}": n for name in part.columns}
            fields |= {f"rows/{name}": n for name in part.token_columns}
        source = JoinedSet([part._source for part in parts], self._owner, fields)
        super().__init__(parts, source, {**parts[0].manifest["data"], "columns": columns}, columns, token_columns)

    def _statistics(self, site: str) -> SiteStatistics:
        return self.parts[self._owner[site]].stats[site]

    def summary(self, site: str) -> tuple[float, float] | None:
        """Mean norm and total variance of a site where its cache knows them."""
        return self.parts[self._owner[site]].summary(site)

    @property
    def rows_key(self) -> str:
        """Which rows these are: the first cache's."""
        return self.parts[0].rows_key


class Concat(_Several):
    """Caches of the same sites, their rows end to end: see `concat`.

    Attributes:
        parts: The caches.
    """

    def __init__(self, parts: Sequence[Reader], columns: Mapping[str, str], token_columns: Mapping[str, str]) -> None:
        held = [part.manifest["data"] for part in parts]
        data: dict[str, Any] = {name: sum(one.get(name) or 0 for one in held) for name in ("tokens", "truncated")}
        data |= {"sequences": sum(part.n_sequences for part in parts), "columns": dict(columns)}
        data |= {"fingerprint": json_digest([one["fingerprint"] for one in held])}
        data |= {"bos": all(one.get("bos") for one in held)}
        super().__init__(parts, ConcatSet([part._source for part in parts]), data, columns, token_columns)

    def _statistics(self, site: str) -> SiteStatistics:
        moments = Moments.empty(self.spec(site).shape)
        for part in self.parts:
            if len(part):
                moments.add(part.stats[site].moments())
        return SiteStatistics.of(moments)

    def summary(self, site: str) -> tuple[float, float] | None:
        """Mean norm and total variance of a site where every part knows its own."""
        known = all(part.summary(site) is not None for part in self.parts if len(part))
        if not known or site not in self.stats:
            return None
        return self.stats[site].norm, float(self.stats[site].var.sum())

    @property
    def rows_key(self) -> str:
        """Which rows these are: the parts', in order."""
        return json_digest(["concat", *(part.rows_key for part in self.parts)])


def _common(parts: Sequence[Reader], key: str) -> Any:
    first = parts[0].manifest.get(key)
    return first if all(part.manifest.get(key) == first for part in parts) else None


def join(*caches: Reader) -> Join:
    """Read caches of the same model over the same rows as one: their sites side by side, nothing copied.

    Captures of a model over the same data and positions, of other sites each, are such caches; so are the same parts
    (`where`, `select`) of them. Where two hold one site, it is read from the first. Label and token columns are united.

    Args:
        *caches: Two or more caches or views.

    Returns:
        A join: it reads like a cache (sites, batches, labels, where, statistics, export).

    Raises:
        DataError: Fewer than two; a column that two of them hold with different values.
        CacheMismatchError: Another model, other data or other positions; one site in two types or shapes, or with
            other values (their mean norms differ); an imported cache whose model is not known.
    """
    _check_models(caches, "join")
    first = caches[0]
    for other in caches[1:]:
        if other.rows_key != first.rows_key:
            raise CacheMismatchError(f"join needs caches of the same rows; {other!r} has {_difference(first, other)}")
    _check_sites(caches)
    _check_values(caches)
    for name in {name for cache in caches for name in (*cache.columns, *cache.token_columns)}:
        _check_column(name, caches)
    return Join(caches)


def concat(*caches: Reader) -> Concat:
    """Read caches of the same model and the same sites as one: their rows end to end, nothing copied.

    Sequences are numbered on: those of the second cache follow those of the first. The columns that all of them hold
    with one type are kept.

    Args:
        *caches: Two or more caches or views.

    Returns:
        A concatenation: it reads like a cache. Its statistics are merged from its parts'.

    Raises:
        DataError: Fewer than two.
        CacheMismatchError: Another model, other sites, a site in two types or shapes; an imported cache whose model is
            not known.

    Warns:
        UserWarning: A column is left out because not all caches hold it with one type.
    """
    _check_models(caches, "concat")
    for other in caches[1:]:
        if set(other.sites) != set(caches[0].sites):
            odd = sorted(set(other.sites) ^ set(caches[0].sites))
            raise CacheMismatchError(f"concat needs caches of the same sites; {other!r} differs in {', '.join(odd)}")
    _check_sites(caches)
    kinds = [(one.manifest["settings"].get("positions"), one.manifest["settings"].get("pool")) for one in caches]
    if len({pool for _, pool in kinds}) > 1:
        raise CacheMismatchError("concat needs rows of one kind; some caches hold a row per token, others means")
    columns = _shared([cache.columns for cache in caches])
    token_columns = _shared([cache.token_columns for cache in caches])
    left = {name for cache in caches for name in (*cache.columns, *cache.token_columns)} - {*columns, *token_columns}
    if left:
        warnings.warn(f"columns left out, not all caches hold them with one type: {sorted(left)}", stacklevel=2)
    return Concat(caches, columns, token_columns)


def _shared(columns: Sequence[Mapping[str, str]]) -> dict[str, str]:
    return {name: kind for name, kind in columns[0].items() if all(one.get(name) == kind for one in columns)}


def _check_models(caches: Sequence[Reader], what: str) -> None:
    if len(caches) < 2 or not all(isinstance(cache, Reader) for cache in caches):
        kinds = ", ".join(type(cache).__name__ for cache in caches) or "nothing"
        raise DataError(f"{what} needs two or more opened caches, each an argument; got {kinds}")
    first = caches[0]
    for cache in caches:
        if cache.model.weights_hash == UNKNOWN:
            raise CacheMismatchError(f"{cache!r} was imported without its model, so {what} cannot know that it fits")
        if cache.model.weights_hash != first.model.weights_hash:
            ours, theirs = (one.model for one in (first, cache))
            raise CacheMismatchError(
                f"{what} needs caches of one model; {first!r} is of {ours.name} (weights {ours.weights_hash[:12]}), "
                f"{cache!r} of {theirs.name} (weights {theirs.weights_hash[:12]})"
            )
        if cache.model.config_hash != first.model.config_hash:
            raise CacheMismatchError(f"{what}: {first!r} and {cache!r} are of models of another configuration")


def _check_sites(caches: Sequence[Reader]) -> None:
    """One site must have one type and shape in all caches that hold it."""
    seen: dict[str, tuple[Reader, SiteSpec]] = {}
    for cache in caches:
        for name in cache.sites:
            spec = cache.spec(name)
            holder, known = seen.setdefault(name, (cache, spec))
            if (spec.dtype, spec.shape) != (known.dtype, known.shape):
                raise CacheMismatchError(
                    f"{name} is {known.dtype} {list(known.shape)} in {holder!r} and {spec.dtype} {list(spec.shape)} in "
                    f"{cache!r}; one type and shape is needed"
                )


def _check_values(caches: Sequence[Reader]) -> None:
    """A site that several hold of the same rows must have one mean norm, as far as it is known without reading."""
    seen: dict[str, tuple[Reader, float]] = {}
    for cache in caches:
        for name in cache.sites:
            known = cache.summary(name)
            if known is not None:
                holder, norm = seen.setdefault(name, (cache, known[0]))
                if abs(known[0] - norm) > NORM_TOLERANCE * norm:
                    raise CacheMismatchError(
                        f"{name} has a mean norm of {norm:.6g} in {holder!r} and of {known[0]:.6g} in {cache!r}: these "
                        "are not the same activations"
                    )


def _difference(first: Reader, other: Reader) -> str:
    ours, theirs = first.manifest, other.manifest
    if ours["data"]["fingerprint"] != theirs["data"]["fingerprint"]:
        return "other token ids"
    if len(first) != len(other):
        return f"{len(other)} rows, not {len(first)}"
    return "other positions or another choice of rows"


def _check_column(name: str, caches: Sequence[Reader]) -> None:
    """A column that several caches hold must say the same in each."""
    kinds: list[Mapping[str, Any]] = [cache.sequences for cache in caches if name in cache.columns]
    kinds += [cache.rows for cache in caches if name in cache.token_columns]
    first = np.asarray(kinds[0][name]) if len(kinds) > 1 else None
    for other in kinds[1:]:
        values = np.asarray(other[name])
        if first is None or first.dtype != values.dtype or first.shape != values.shape or not _same(first, values):
            raise DataError(
                f"column {name!r} is not the same in all caches; leave it out of one of them (capture with columns=)"
            )


def _same(first: AnyArray, second: AnyArray) -> bool:
    return bool(np.array_equal(first, second, equal_nan=first.dtype.kind == "f"))
