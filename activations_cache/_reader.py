"""The reading side that caches, their parts (`where`, `select`), joins and concatenations have in common."""

from __future__ import annotations

import difflib
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Float64, Int32, Shaped
from torch import Tensor

from activations_cache import _info
from activations_cache._batches import DEFAULT_BUFFER_BYTES, Batches, as_tensor
from activations_cache._shards import Source, read
from activations_cache.errors import DataError, SiteError
from activations_cache.store import TORCH_TYPES, Moments, SiteSpec, json_digest

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from activations_cache._views import View

BLOCK_BYTES = 8 * 2**20  # read at a time where a whole site is streamed
Value = TypeVar("Value")
UNKNOWN = "unknown"  # a fact that an imported cache does not have


@dataclass(frozen=True)
class CachedModel:
    """The model that a cache was captured from.

    Attributes:
        name: Its name or path at the time.
        weights_hash: SHA-256 over its checkpoint tensors; "unknown" for a cache imported without its model.
        config_hash: SHA-256 over its configuration; "unknown" likewise.
        dtype: Type of its parameters.
    """

    name: str
    weights_hash: str
    config_hash: str
    dtype: str


@dataclass(frozen=True)
class SiteStatistics:
    """Statistics of one site over all stored rows, in float64.

    Attributes:
        count: Rows.
        mean: Mean row.
        var: Variance (divided by n) of each element.
        norm: Mean Euclidean norm of a row.
    """

    count: int
    mean: Float64[Tensor, "*shape"]
    var: Float64[Tensor, "*shape"]
    norm: float

    @classmethod
    def of(cls, moments: Moments) -> SiteStatistics:
        """From running moments over at least one row."""
        mean, var = torch.as_tensor(moments.mean), torch.as_tensor(moments.m2 / moments.count)
        return cls(moments.count, mean, var, moments.norm_sum / moments.count)

    @classmethod
    def of_manifest(cls, entry: Mapping[str, Any]) -> SiteStatistics:
        """From an entry of a manifest's `statistics`."""
        mean, var = (torch.tensor(entry[key], dtype=torch.float64) for key in ("mean", "var"))
        return cls(entry["count"], mean, var, entry["mean_norm"])

    def moments(self) -> Moments:
        """As running moments, to be merged with others'."""
        return Moments(self.count, self.mean.numpy(), self.var.numpy() * self.count, self.norm * self.count)


class StoredSequence(NamedTuple):
    """One sequence of a cache: `values, input_ids, positions = cache.sequence(3, site)`.

    Attributes:
        values: Its stored rows [rows, *shape]; a dict of them by site where several sites were asked for.
        input_ids: Token ids of the whole sequence [tokens].
        positions: Position of each stored row in it [rows].
    """

    values: Any
    input_ids: Int32[np.ndarray, " tokens"]
    positions: Int32[np.ndarray, " rows"]


class SiteView:
    """One site of a cache: index it by row number, slice, boolean mask or list of row numbers; get tensors.

    The values come in their storage type (`torch.bfloat16` included), read from disk at each access. Reading checks
    that a shard is the right file in its full size, not its bytes: those are `Cache.verify`'s.
    """

    def __init__(self, source: Source, spec: SiteSpec) -> None:
        self._source, self.spec = source, spec

    @property
    def shape(self) -> tuple[int, ...]:
        """[rows, *shape of one row]."""
        return (self._source.rows, *self.spec.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Torch type of the values."""
        return TORCH_TYPES[self.spec.dtype]

    def __len__(self) -> int:
        return self._source.rows

    def __getitem__(self, rows: Any) -> Shaped[Tensor, "..."]:
        name, dtype = self.spec.name, self.spec.dtype
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step == 1:
                return as_tensor(read(self._source, name, start, max(start, stop)), dtype)
            return as_tensor(self._source.gather(name, np.arange(start, stop, step)), dtype)
        index = row_numbers(rows, len(self))
        values = as_tensor(self._source.gather(name, index.reshape(-1)), dtype)
        return values.reshape(*index.shape, *self.spec.shape)

    def __iter__(self) -> Iterator[Tensor]:
        raise TypeError(f"iterate over cache.batches({self.spec.name!r}), which reads blocks, not over single rows")

    def __repr__(self) -> str:
        return f"<{self.spec.name}: {self.spec.dtype} {list(self.shape)}>"


def row_numbers(rows: Any, total: int, what: str = "row") -> npt.NDArray[np.int64]:
    """Row numbers from an int, a list, an array or tensor of ints, or a boolean mask; negative ones count from the end.

    Raises:
        DataError: Something else, a mask of another length, or a number out of range.
    """
    if isinstance(rows, bool | tuple):
        raise DataError(f"one index over {what}s was required: a number, a slice, a list or a mask; got {rows!r}")
    if not isinstance(rows, Tensor | np.ndarray | list | range):
        try:
            rows = operator.index(rows)
        except TypeError:
            kind = type(rows).__name__
            raise DataError(f"{what}s must be integers, a slice, or a boolean mask; got {kind}") from None
    index = np.asarray(rows.cpu().numpy() if isinstance(rows, Tensor) else rows)
    if index.size == 0 and (index.dtype != bool or index.shape == (total,)):
        return np.zeros(index.shape, np.int64)
    if index.dtype == bool:
        if index.shape != (total,):
            raise DataError(f"a mask over {what}s must have shape ({total},); got {index.shape}")
        return np.flatnonzero(index).astype(np.int64)
    if index.dtype.kind not in "iu":
        raise DataError(f"{what}s must be integers or a boolean mask; got {index.dtype}")
    if index.min() < -total or index.max() >= total:
        worst = int(index.max() if index.max() >= total else index.min())
        raise DataError(f"{what} {worst} is out of range: there are {total} {what}s")
    return np.where(index < 0, index + total, index).astype(np.int64)


def chosen_rows(rows: Any, total: int) -> npt.NDArray[np.int64]:
    """Row numbers [n] as `row_numbers` takes them, or from a slice."""
    if isinstance(rows, slice):
        return np.arange(total)[rows]
    return row_numbers(rows, total).reshape(-1)


class Lazy(Mapping[str, Value]):
    """Named values, each made when first asked for."""

    def __init__(self, names: Sequence[str], load: Callable[[str], Value]) -> None:
        self._names, self._load, self._held = tuple(names), load, dict[str, Value]()

    def made(self, name: str) -> bool:
        """Whether the value of this name was asked for before."""
        return name in self._held

    def __getitem__(self, name: str) -> Value:
        if name not in self._names:
            raise KeyError(f"{name!r}; there are {', '.join(self._names)}")
        if name not in self._held:
            self._held[name] = self._load(name)
        return self._held[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __repr__(self) -> str:
        return f"<{', '.join(self._names)}; each read when it is asked for>"

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Reader(ABC):
    """Rows of some sites, with their tokens and labels: a `Cache`, or a view of one or several.

    Attributes:
        path: The directory (of several caches: the first one's).
        paths: The directories of all caches that are read.
        identities: Their identities.
        manifest: The manifest, as read; of a view what holds for it too (a join has no shards, for one).
        sites: Canonical names of the stored sites.
        finished: Whether the capture ran to its end.
        model: The model it was captured from.
        columns: Label columns, one value per sequence: name to "string", "int", "float" or "bool".
        token_columns: Columns with one value per stored row, "logprob" among them: name to kind.
        rows: Per stored row: "sequence", "position", "token" (the token id at that position) and every token column.
        sequences: Per sequence: "input_ids" (a list of arrays, whole sequences), "length" (tokens) and every label
            column.
    """

    path: Path
    paths: tuple[Path, ...]
    identities: tuple[str, ...]
    finished: bool
    model: CachedModel

    def __init__(
        self, source: Source, manifest: dict[str, Any], columns: Mapping[str, str], token_columns: Mapping[str, str]
    ) -> None:
        self._source, self.manifest = source, manifest
        self._specs = dict(source.specs)
        self._aliases = {alias: spec.name for spec in self._specs.values() for alias in spec.aliases}
        self.sites = tuple(self._specs)
        self.columns, self.token_columns = dict(columns), dict(token_columns)
        row_fields = dict.fromkeys(("sequence", "position", "token", *self.token_columns))
        self.rows: Mapping[str, npt.NDArray[Any]] = Lazy(tuple(row_fields), self._row_field)
        sequence_fields = dict.fromkeys(("input_ids", "length", *self.columns))
        self.sequences: Mapping[str, Any] = Lazy(tuple(sequence_fields), self._sequence_field)

    def __len__(self) -> int:
        return self._source.rows

    def __contains__(self, site: object) -> bool:
        return site in self._specs or site in self._aliases

    def __getitem__(self, site: str) -> SiteView:
        """The rows of a site, by its name or any alias.

        Raises:
            SiteError: The cache does not hold the site; near names are listed.
        """
        return SiteView(self._source, self.spec(site))

    def spec(self, site: str) -> SiteSpec:
        """How a site is stored, by its name or any alias.

        Raises:
            SiteError: The cache does not hold the site; near names are listed.
        """
        name = self._aliases.get(site, site) if isinstance(site, str) else ""
        if name not in self._specs:
            near = difflib.get_close_matches(str(site), [*self._specs, *self._aliases], n=3) or list(self._specs)[:3]
            raise SiteError(f"{self.path} holds no site {site!r}; did you mean {' or '.join(near)}? See cache.sites")
        return self._specs[name]

    @property
    def n_sequences(self) -> int:
        """Sequences that are committed, those without a stored row included."""
        return self._source.n_sequences

    @property
    def nbytes(self) -> int:
        """Bytes of the sites' values."""
        return len(self) * sum(spec.row_bytes for spec in self._specs.values())

    # --- tokens and labels ------------------------------------------------------------------------------------------

    def _row_field(self, name: str) -> npt.NDArray[Any]:
        if name == "token" and name not in self.token_columns:
            flat, starts = self._flat_ids
            return np.asarray(flat[starts[self.rows["sequence"]] + self.rows["position"]])
        return self._source.field(f"rows/{name}")

    def _sequence_field(self, name: str) -> Any:
        if name == "length" and name not in self.columns:  # `capture` refuses such a column; another writer may not
            return np.diff(self._source.field("sequences/offsets"))
        if name == "input_ids":
            flat, starts = self._flat_ids
            return np.split(flat, starts[1:-1]) if self.n_sequences else []
        return self._source.field(f"sequences/{name}")

    @cached_property
    def _flat_ids(self) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """All token ids end to end [tokens], and where each sequence begins [sequences + 1]."""
        return self._source.field("sequences/input_ids"), self._source.field("sequences/offsets")

    def labels(self, name: str) -> npt.NDArray[Any]:
        """A label column or a token column, one entry per stored row (a label column's value, for each of its rows).

        Raises:
            DataError: No such column.
        """
        if name in self.columns:
            return np.asarray(self.sequences[name][self.rows["sequence"]])
        if name in self.token_columns:
            return self.rows[name]
        known = sorted({*self.columns, *self.token_columns})
        raise DataError(f"{self.path} has no label column {name!r}; its columns are {known}")

    def tokens(self, row: int) -> npt.NDArray[np.int32]:
        """Token ids of the whole sequence that a stored row belongs to; the row is at `rows["position"][row]` in it."""
        found = row_numbers(row, len(self))
        if found.ndim:
            raise DataError(f"one row number was required; got {row!r}")
        number = int(found)
        return self._source.token_ids(self._source.sequence_of(number))

    def sequence(self, number: int, site: str | Sequence[str] | None = None) -> StoredSequence:
        """The stored rows of one sequence, and its tokens, read from its shard alone.

        Args:
            number: The sequence; a negative number counts from the end.
            site: A site, for its rows as a tensor; several, or None for all, for a dict of tensors by the names given.

        Returns:
            `values` (no row at all where none of its positions was stored), `input_ids` and `positions`.

        Raises:
            DataError: No such sequence.
            SiteError: The cache does not hold a site.
        """
        index = row_numbers(number, self.n_sequences, "sequence")
        if index.ndim:
            raise DataError(f"one sequence number was required; got {number!r} (for several: cache.select(sequences=))")
        first, stop = self._source.row_span(int(index))
        names = [site] if isinstance(site, str) else self.sites if site is None else site
        values = {name: self[name][first:stop] for name in names}
        found = values[site] if isinstance(site, str) else values
        positions = self._source.row_slice("rows/position", first, stop)
        return StoredSequence(found, self._source.token_ids(int(index)), positions)

    # --- parts ------------------------------------------------------------------------------------------------------

    def where(self, conditions: Mapping[str, Any] | None = None, /, **columns: Any) -> View:
        """The part of the cache whose labels are as asked: a view that reads like a cache, without a copy.

        `cache.where(toxic=True, author=["a", "b"], n=lambda n: n > 3)`. Conditions on label columns (and "length")
        choose sequences; conditions on token columns, "logprob", "position" and "token" choose rows. All must hold.

        Args:
            conditions: Column to condition, for names that are no identifiers.
            **columns: The same as keywords. A value; a list, set or array of values; or a function that takes the
                column (one array) and returns a boolean array.

        Returns:
            The view. It has the sequences that fulfil the conditions on sequences; if there are conditions on rows,
            those of them that keep a row.

        Raises:
            DataError: An unknown column, a value that the column does not have, or nothing that fulfils all of it.
        """
        from activations_cache._views import where

        return where(self, {**(conditions or {}), **columns})

    def select(self, *, rows: Any = None, sequences: Any = None) -> View:
        """Chosen rows, or all rows of chosen sequences: a view that reads like a cache, without a copy.

        Args:
            rows: Row numbers in rising order, a slice, or a boolean mask. The view has the sequences of these rows.
            sequences: The same for sequences. With both, the rows that are in both.

        Returns:
            The view; its rows and sequences are numbered anew, and its `row_numbers` and `sequence_numbers` say which
            they are here.

        Raises:
            DataError: Neither is given, numbers out of range, repeated or not in order, or no row is left.
        """
        from activations_cache._views import select

        return select(self, rows, sequences)

    # --- batches ----------------------------------------------------------------------------------------------------

    def batches(
        self,
        site: str | Sequence[str],
        batch_size: int = 4096,
        seed: int = 0,
        epochs: int | None = 1,
        dtype: torch.dtype | str | None = None,
        *,
        rows: Any = None,
        shuffle: bool = True,
        drop_last: bool = False,
        buffer_bytes: int = DEFAULT_BUFFER_BYTES,
        device: torch.device | str | None = None,
        consecutive: int = 1,
        prefetch: bool | int = True,
        part: tuple[int, int] | None = None,
        with_rows: bool = False,
    ) -> Batches:
        """Batches of rows, shuffled by blocks through a buffer in RAM that is filled in the background.

        Args:
            site: Site name or alias; a sequence of them for tuples of tensors of the same rows.
            batch_size: Rows (or windows) per batch.
            seed: Fixes the order, together with the number of the epoch.
            epochs: Times through the rows; None goes on for ever.
            dtype: Type of the batches, e.g. torch.float32 or "float32"; None keeps the storage type.
            rows: Draw from these rows alone: row numbers, a slice, or a boolean mask. `shuffle=False` keeps their
                order.
            shuffle: False gives the rows in order.
            drop_last: Leave out an epoch's last batch if it is smaller than the others.
            buffer_bytes: RAM for the shuffle buffers, 64 MiB by default. See `Batches` for what it bounds.
            device: Where the batches go.
            consecutive: n above 1 gives windows [batch, n, *shape] of n neighbouring positions of one sequence.
            prefetch: Buffers filled ahead by a background thread; False fills when needed.
            part: (rank, world): the rank-th of `world` disjoint parts of the rows.
            with_rows: Append the row numbers to each batch.

        Returns:
            An iterable of tensors [batch_size, *shape] (tuples of them for several sites or `with_rows`), and a torch
            `IterableDataset`; every row comes once per epoch. `state_dict` and `load_state_dict` go on from the middle
            of an epoch.

        Raises:
            SiteError: The cache does not hold the site.
            DataError: A size out of range, or no rows.
            CorruptCacheError: A shard is missing, truncated or another's (while iterating). Altered bytes are not
                looked for here; `verify` finds them.
        """
        sites = self.spec(site).name if isinstance(site, str) else tuple(self.spec(name).name for name in site)
        return Batches(
            self._source,
            sites,
            dtype,
            batch_size=batch_size,
            seed=seed,
            epochs=epochs,
            rows=None if rows is None else chosen_rows(rows, len(self)),
            shuffle=shuffle,
            drop_last=drop_last,
            buffer_bytes=buffer_bytes,
            device=device,
            consecutive=consecutive,
            prefetch=prefetch,
            part=part,
            with_rows=with_rows,
            fingerprint=json_digest([self.rows_key, *self.identities]),
        )

    # --- statistics -------------------------------------------------------------------------------------------------

    @cached_property
    def stats(self) -> Lazy[SiteStatistics]:
        """Mean, variance and norm of every floating site over the rows (as stored, not before the cast), by name.

        A cache has them in its manifest and its shards; a concatenation merges its parts' (Chan, Golub and LeVeque
        1983); a part made by `where` or `select` reads the site's rows once, when it is first asked for them.
        """
        return Lazy([spec.name for spec in self._specs.values() if spec.floating and len(self)], self._statistics)

    def _statistics(self, site: str) -> SiteStatistics:
        return SiteStatistics.of(stream_moments(self._source, self._specs[site]))

    def summary(self, site: str) -> tuple[float, float] | None:
        """Mean norm and total variance of a site where they are known without reading its rows, else None."""
        if not self.stats.made(site):
            return None
        held = self.stats[site]
        return held.norm, float(held.var.sum())

    @property
    @abstractmethod
    def rows_key(self) -> str:
        """Which rows these are: equal for the same rows of caches of the same data, in hexadecimal digits."""

    # --- what is inside ---------------------------------------------------------------------------------------------

    @abstractmethod
    def _facts(self) -> list[tuple[str, str]]:
        """What `info` says above the table of sites: names and values."""

    def info(self) -> str:
        """What is inside, how big, and from which model and data, as text of at most 100 columns."""
        return _info.text(self._facts(), self.to_rows())

    def to_rows(self) -> list[_info.SiteRow]:
        """One row per site: how it is stored, its size, and its statistics where they are known."""
        return [_info.SiteRow.of(spec, len(self), self.summary(name)) for name, spec in self._specs.items()]

    def to_df(self) -> pd.DataFrame:
        """A table of the sites: site, kind, layer, dtype, shape, rows, bytes, mean_norm, total_variance.

        The last two are missing for integer sites, and for a view whose statistics nobody asked for yet (`stats`).
        """
        return _info.frame(self.to_rows())

    def plot(self) -> go.Figure:
        """Mean norm of a row and root mean variance of its elements, layer by layer, a line per kind of site.

        Raises:
            DataError: No floating site of a layer, or no row.
        """
        return _info.figure([(self._specs[name], stats) for name, stats in self.stats.items()])

    def export(
        self,
        site: str,
        path: str | Path,
        dtype: torch.dtype | str | None = None,
        *,
        rows: Any = None,
        overwrite: bool = False,
        progress: bool = True,
    ) -> Path:
        """Write a site's rows to a .npy or .safetensors file, block by block, beside its name and then renamed.

        Args:
            site: Site name or alias.
            path: The file; its ending says which. A .safetensors file holds one tensor under the site's name, and the
                model and the cache in its metadata.
            dtype: Type in the file; None keeps the storage type. numpy has no bfloat16.
            rows: These rows alone, in this order: row numbers, a slice or a boolean mask.
            overwrite: Replace an existing file.
            progress: Show a progress bar.

        Returns:
            The path.

        Raises:
            SiteError: The cache does not hold the site.
            DataError: Another ending, a type that the file or the values do not admit, rows out of range.
            NumericsError: A value does not fit the type asked for (beyond 65504 for float16).
            CacheError: The file exists, or cannot be written (nothing is left of it then).
        """
        from activations_cache._export import export

        return export(self, site, Path(path), dtype, rows=rows, overwrite=overwrite, progress=progress)

    @property
    def _title(self) -> str:
        return f"{type(self).__name__} {self.path}"

    def __repr__(self) -> str:
        state = "" if self.finished else ", unfinished"
        return f"<{self._title}: {len(self)} rows x {len(self.sites)} sites{state}>"

    def _repr_html_(self) -> str:
        return _info.page(self._facts(), self.to_rows())


def stream_moments(source: Source, spec: SiteSpec) -> Moments:
    """Moments of all rows of a floating site, read once in blocks, in float64."""
    moments = Moments.empty(spec.shape)
    step = max(1, BLOCK_BYTES // max(1, spec.row_bytes))
    for start in range(0, source.rows, step):
        values = as_tensor(read(source, spec.name, start, min(start + step, source.rows)), spec.dtype)
        moments.add(block_moments(values))
    return moments


def block_moments(values: Float[Tensor, "rows *shape"]) -> Moments:
    """Moments of rows that are in memory, in float64."""
    block = values.double().numpy()
    mean = block.mean(0)
    norm = float(np.sqrt((block.reshape(len(block), -1) ** 2).sum(1)).sum())
    return Moments(len(block), mean, ((block - mean) ** 2).sum(0), norm)
