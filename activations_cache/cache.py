"""Reading a cache: `open`, rows by number, shuffled batches, labels, verification and a summary."""

from __future__ import annotations

import difflib
import html
import operator
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float64, Shaped
from torch import Tensor

from activations_cache import _index, _verify
from activations_cache._batches import DEFAULT_BUFFER_BYTES, Batches, as_tensor
from activations_cache._shards import ShardSet, check_size, damage
from activations_cache.errors import CacheError, CorruptCacheError, DataError, SiteError
from activations_cache.store import TORCH_TYPES, ShardEntry, SiteSpec, read_manifest, read_moments


@dataclass(frozen=True)
class CachedModel:
    """The model that a cache was captured from.

    Attributes:
        name: Its name or path at the time.
        weights_hash: SHA-256 over its checkpoint tensors.
        config_hash: SHA-256 over its configuration.
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


class SiteView:
    """One site of a cache: index it by row number, slice, boolean mask or list of row numbers; get tensors.

    The values come in their storage type (`torch.bfloat16` included), read from disk at each access. Reading checks
    that a shard is the right file in its full size, not its bytes: those are `Cache.verify`'s.
    """

    def __init__(self, shards: ShardSet, spec: SiteSpec) -> None:
        self._shards, self.spec = shards, spec

    @property
    def shape(self) -> tuple[int, ...]:
        """[rows, *shape of one row]."""
        return (self._shards.rows, *self.spec.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Torch type of the values."""
        return TORCH_TYPES[self.spec.dtype]

    def __len__(self) -> int:
        return self._shards.rows

    def __getitem__(self, rows: Any) -> Shaped[Tensor, "..."]:
        name, dtype = self.spec.name, self.spec.dtype
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step == 1:
                return as_tensor(self._shards.read(name, start, max(start, stop)), dtype)
            return as_tensor(self._shards.gather(name, np.arange(start, stop, step)), dtype)
        index = row_numbers(rows, len(self))
        values = as_tensor(self._shards.gather(name, index.reshape(-1)), dtype)
        return values.reshape(*index.shape, *self.spec.shape)

    def __iter__(self) -> Iterator[Tensor]:
        raise TypeError(f"iterate over cache.batches({self.spec.name!r}), which reads blocks, not over single rows")

    def __repr__(self) -> str:
        return f"<{self.spec.name}: {self.spec.dtype} {list(self.shape)}>"


def row_numbers(rows: Any, total: int) -> npt.NDArray[np.int64]:
    """Row numbers from an int, a list, an array or tensor of ints, or a boolean mask; negative ones count from the end.

    Raises:
        DataError: Something else, a mask of another length, or a number out of range.
    """
    if not isinstance(rows, Tensor | np.ndarray | list | tuple | range):
        try:
            rows = operator.index(rows)
        except TypeError:
            raise DataError(f"rows must be integers, a slice, or a boolean mask; got {type(rows).__name__}") from None
    index = np.asarray(rows.cpu().numpy() if isinstance(rows, Tensor) else rows)
    if index.size == 0:
        return np.zeros(index.shape, np.int64)
    if index.dtype == bool:
        if index.shape != (total,):
            raise DataError(f"a mask over rows must have shape ({total},); got {index.shape}")
        return np.flatnonzero(index).astype(np.int64)
    if index.dtype.kind not in "iu":
        raise DataError(f"rows must be integers or a boolean mask; got {index.dtype}")
    if index.min() < -total or index.max() >= total:
        worst = int(index.max() if index.max() >= total else index.min())
        raise DataError(f"row {worst} is out of range: there are {total} rows")
    return np.where(index < 0, index + total, index).astype(np.int64)


def _torch_type(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not isinstance(found, torch.dtype):
        raise DataError(f"dtype must be a torch type or the name of one; got {dtype!r}")
    return found


class _Fields(Mapping[str, Any]):
    """Named arrays, read when first asked for."""

    def __init__(self, names: tuple[str, ...], load: Any) -> None:
        self._names, self._load, self._held = names, load, dict[str, Any]()

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(f"{name!r}; there are {', '.join(self._names)}")
        if name not in self._held:
            self._held[name] = self._load(name)
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Cache:
    """An activations cache on disk, opened for reading: see `open`.

    Attributes:
        path: The directory.
        manifest: The manifest, as read.
        sites: Canonical names of the stored sites.
        finished: Whether the capture ran to its end.
        model: The model it was captured from.
        rows: Per stored row: "sequence", "position" and "token" (the token id at that position).
        sequences: Per sequence: "input_ids" (a list of arrays, whole sequences), "length" (tokens) and every label
            column.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self._specs = {entry["name"]: SiteSpec.from_json(entry) for entry in manifest["sites"]}
        self._aliases = {alias: spec.name for spec in self._specs.values() for alias in spec.aliases}
        self.sites = tuple(self._specs)
        self.finished: bool = manifest["finished"]
        model = manifest["model"]
        self.model = CachedModel(model["name"], model["weights_hash"], model["config_hash"], model["dtype"])
        entries = [ShardEntry(**entry) for entry in manifest["shards"]]
        self._shards = ShardSet(path, entries, self._specs, manifest["identity"])
        self._columns: dict[str, str] = manifest["data"]["columns"]
        self.rows: Mapping[str, npt.NDArray[Any]] = _Fields(("sequence", "position", "token"), self._row_field)
        self.sequences: Mapping[str, Any] = _Fields(
            tuple(dict.fromkeys(("input_ids", "length", *self._columns))), self._sequence_field
        )

    def __len__(self) -> int:
        return self._shards.rows

    def __contains__(self, site: object) -> bool:
        return site in self._specs or site in self._aliases

    def __getitem__(self, site: str) -> SiteView:
        """The rows of a site, by its name or any alias.

        Raises:
            SiteError: The cache does not hold the site; near names are listed.
        """
        return SiteView(self._shards, self._spec(site))

    def _spec(self, site: str) -> SiteSpec:
        name = self._aliases.get(site, site)
        if name not in self._specs:
            near = difflib.get_close_matches(site, [*self._specs, *self._aliases], n=3) or list(self._specs)[:3]
            raise SiteError(f"{self.path} holds no site {site!r}; did you mean {' or '.join(near)}? See cache.sites")
        return self._specs[name]

    @property
    def n_sequences(self) -> int:
        """Sequences that are committed."""
        return sum(entry.sequences for entry in self._shards.entries)

    def _row_field(self, name: str) -> npt.NDArray[Any]:
        if name == "token":
            flat, starts = self._flat_ids
            return np.asarray(flat[starts[self.rows["sequence"]] + self.rows["position"]])
        return np.asarray(self._shards.field(f"rows/{name}", np.int64))

    def _sequence_field(self, name: str) -> Any:
        if name == "length" and name not in self._columns:  # `capture` refuses such a column; another writer may not
            return np.diff(self._flat_ids[1])
        if name == "input_ids":
            flat, starts = self._flat_ids
            return np.split(flat, starts[1:-1]) if self.n_sequences else []
        values = self._shards.field(f"sequences/{name}", object)
        return values.astype(bool) if self._columns[name] == "bool" else values

    @cached_property
    def _flat_ids(self) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """All token ids end to end [tokens], and where each sequence begins [sequences + 1]."""
        flat = self._shards.field("sequences/input_ids", np.int32)
        lengths = [np.diff(self._shards[n].field("sequences/offsets")) for n in range(len(self._shards.entries))]
        joined = np.concatenate([np.zeros(0, np.int64), *lengths])
        return flat, np.concatenate([[0], np.cumsum(joined)]).astype(np.int64)

    def labels(self, name: str) -> npt.NDArray[Any]:
        """A label column, one entry per stored row.

        Raises:
            DataError: No such column.
        """
        if name not in self._columns:
            raise DataError(f"{self.path} has no label column {name!r}; its columns are {sorted(self._columns)}")
        return np.asarray(self.sequences[name][self.rows["sequence"]])

    def tokens(self, row: int) -> npt.NDArray[np.int32]:
        """Token ids of the whole sequence that a stored row belongs to; the row is at `rows["position"][row]` in it."""
        number = int(row_numbers(row, len(self)))
        flat, starts = self._flat_ids
        sequence = int(self.rows["sequence"][number])
        return np.asarray(flat[starts[sequence] : starts[sequence + 1]])

    def batches(
        self,
        site: str,
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
    ) -> Batches:
        """Batches of a site's rows, shuffled by blocks through a buffer in RAM.

        Args:
            site: Site name or alias.
            batch_size: Rows per batch.
            seed: Fixes the order, together with the number of the epoch.
            epochs: Times through the rows; None goes on for ever.
            dtype: Type of the batches, e.g. torch.float32 or "float32"; None keeps the storage type.
            rows: Draw from these rows alone: row numbers or a boolean mask.
            shuffle: False gives the rows in order.
            drop_last: Leave out an epoch's last batch if it is smaller than the others.
            buffer_bytes: RAM for the shuffle buffer, 64 MiB by default. More mixes better.
            device: Where the batches go.

        Returns:
            An iterable of tensors [batch_size, *shape]; every row comes once per epoch.

        Raises:
            SiteError: The cache does not hold the site.
            DataError: A size out of range, or no rows.
            CorruptCacheError: A shard is missing, truncated or another's (while iterating). Altered bytes are not
                looked for here; `verify` finds them.
        """
        spec = self._spec(site)
        numbers = None if rows is None else np.sort(row_numbers(rows, len(self)).reshape(-1))
        return Batches(
            self._shards,
            spec.name,
            spec.dtype,
            batch_size=batch_size,
            seed=seed,
            epochs=epochs,
            cast=_torch_type(dtype),
            rows=numbers,
            shuffle=shuffle,
            drop_last=drop_last,
            buffer_bytes=buffer_bytes,
            device=device,
        )

    @cached_property
    def stats(self) -> dict[str, SiteStatistics]:
        """Mean, variance and norm of every floating site over the committed rows (as stored, not before the cast)."""
        if not self.finished:
            return self._partial_stats()
        found = {}
        for name, entry in self.manifest["statistics"].items():
            mean, var = (torch.tensor(entry[key], dtype=torch.float64) for key in ("mean", "var"))
            found[name] = SiteStatistics(entry["count"], mean, var, entry["mean_norm"])
        return found

    def _partial_stats(self) -> dict[str, SiteStatistics]:
        """The manifest of an unfinished cache holds no vectors: merge those of the shards."""
        merged: dict[str, Any] = {}
        for entry in self._shards.entries:
            for name, moments in read_moments(self.path / entry.file, list(self._specs.values())).items():
                if name in merged:
                    merged[name].add(moments)
                else:
                    merged[name] = moments
        found = {}
        for name, m in merged.items():
            mean, var = torch.from_numpy(m.mean), torch.from_numpy(m.m2 / m.count)
            found[name] = SiteStatistics(m.count, mean, var, m.norm_sum / m.count)
        return found

    def verify(self, progress: bool = False) -> list[_verify.Problem]:
        """Hash every shard and check everything that the manifest promises; an empty list means all is well.

        Nothing else but `capture`, before it goes on with a cache, finds an altered byte. Cost: one read of the cache,
        at about 1 GB/s.
        """
        return _verify.verify(self.path, progress=progress)

    @property
    def nbytes(self) -> int:
        """Bytes of the committed shards."""
        return sum(entry.bytes for entry in self._shards.entries)

    def info(self) -> str:
        """What is inside, how big, and from which model and data, as text."""
        return (
            "\n".join(f"{name:<11} {value}" for name, value in self._facts())
            + "\n"
            + "\n".join(f"  {name}  {dtype}  {shape}  norm {norm}" for name, dtype, shape, norm in self._site_table())
        )

    def _facts(self) -> list[tuple[str, str]]:
        manifest, data, plan = self.manifest, self.manifest["data"], self.manifest["plan"]
        state = "finished" if self.finished else f"unfinished: {len(self)} of {plan['rows']} rows, resume to go on"
        cut = f", {data['truncated']} truncated" if data["truncated"] else ""
        left_out = data.get("columns_left_out", [])
        settings = ", ".join(f"{key}={value}" for key, value in manifest["settings"].items() if key != "dtype")
        return [
            ("cache", str(self.path)),
            ("state", state),
            ("model", f"{self.model.name} ({self.model.dtype}, weights {self.model.weights_hash[:12]})"),
            ("data", f"{data['sequences']} sequences, {data['tokens']} tokens{cut}"),
            ("columns", ", ".join(f"{name} ({kind})" for name, kind in self._columns.items()) or "none"),
            *([("left out", f"columns {', '.join(left_out)}")] if left_out else []),
            ("rows", f"{len(self)} in {len(self._shards.entries)} shards, {self.nbytes / 2**20:.1f} MiB"),
            ("settings", settings),
            ("sites", str(len(self.sites))),
        ]

    def _site_table(self) -> list[tuple[str, str, str, str]]:
        stats = self.manifest["statistics"]
        return [
            (name, spec.dtype, str(list(spec.shape)), f"{stats[name]['mean_norm']:.3g}" if name in stats else "-")
            for name, spec in self._specs.items()
        ]

    def __repr__(self) -> str:
        state = "" if self.finished else ", unfinished"
        return f"<Cache {self.path}: {len(self)} rows x {len(self.sites)} sites{state}>"

    def _repr_html_(self) -> str:
        def table(rows: list[Any]) -> str:
            cells = ("".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows)
            return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"

        return table(self._facts()) + table([("site", "dtype", "shape", "mean norm"), *self._site_table()])


def open(path: str | Path, check: bool = True) -> Cache:
    """Open an activations cache for reading. A cache that is still being written opens with what is committed.

    Args:
        path: The cache directory.
        check: Check that every shard is there in its full size, and write index.h5 again if it is missing or stale.
            False opens a cache with missing or truncated shards too, and writes nothing; reading their rows then
            raises. Neither reads the shards' bytes: `Cache.verify` finds those that were altered.

    Raises:
        CacheError: No such directory.
        CorruptCacheError: No manifest or a malformed one, another format version, a missing or truncated shard.

    Warns:
        UserWarning: The cache is unfinished, or its index.h5 was stale and could not be rebuilt.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise CacheError(f"no activations cache at {directory}: there is no such directory")
    manifest = read_manifest(directory)
    cache = Cache(directory, manifest)
    if check:
        for entry in cache._shards.entries:
            wrong = check_size(directory, entry)
            if wrong:
                raise CorruptCacheError(damage(directory, entry, wrong))
    if not cache.finished:
        warnings.warn(
            f"{directory} is unfinished: {len(cache)} of {manifest['plan']['rows']} rows are committed; "
            "the same capture with resume=True goes on",
            stacklevel=2,
        )
    if check:
        _refresh_index(directory, manifest)
    return cache


def _refresh_index(directory: Path, manifest: Mapping[str, Any]) -> None:
    if _index.index_is_current(directory, manifest):
        return
    try:
        _index.write_index(directory, manifest)
    except OSError as error:
        warnings.warn(
            f"{directory / 'index.h5'} is missing or another cache's and cannot be rebuilt ({error}); "
            "this reader does not need it, others do",
            stacklevel=3,
        )
