"""Reading shards: each is checked when it is first opened, then its values are read as raw bytes at memory speed.

The format stores a site contiguously unless compression was asked for, so rows are read with `pread` at the dataset's
offset in the file (h5py's own conversion of bfloat16 runs at 36 MB/s, and its point selections are slower still), or
gathered from a memory map. Compressed sites go through HDF5's filters, whole chunks at a time.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
import numpy.typing as npt

from activations_cache.errors import CorruptCacheError
from activations_cache.store import HDF5_TYPES, NUMPY_TYPES, AnyArray, ShardEntry, SiteSpec

IntArray = npt.NDArray[np.int64]

FILTERS = {"gzip": (h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE), "lzf": (h5py.h5z.FILTER_SHUFFLE, 32000)}
OPEN_FILES = 32  # of compressed shards, whose HDF5 handles (with their chunk caches) are kept


class Source(Protocol):
    """Rows that can be read: one cache's shards, several caches side by side or end to end, or a part of one.

    Rows are in the order of their sequences, and in a sequence in the order of positions.

    Attributes:
        specs: The sites, by canonical name.
    """

    specs: Mapping[str, SiteSpec]

    @property
    def rows(self) -> int:
        """Stored rows."""

    @property
    def n_sequences(self) -> int:
        """Sequences, those without a stored row included."""

    def read_into(self, site: str, start: int, out: AnyArray) -> None:
        """Fill contiguous `out` [n, *shape] with the raw rows from `start` on."""

    def gather(self, site: str, rows: IntArray) -> AnyArray:
        """Rows by number, in any order and with repeats, as raw values [len(rows), *shape]."""

    def field(self, name: str) -> AnyArray:
        """A whole dataset outside /sites, end to end: "rows/<name>" [rows] or "sequences/<name>" [sequences].

        "sequences/input_ids" is [tokens], "sequences/offsets" [sequences + 1]. Strings are str, booleans bool.
        """

    def row_slice(self, name: str, start: int, stop: int) -> AnyArray:
        """`field(name)[start:stop]` of a "rows/<name>", read without the rest."""

    def row_span(self, sequence: int) -> tuple[int, int]:
        """First stored row of a sequence, and the one after its last."""

    def sequence_of(self, row: int) -> int:
        """The sequence that a stored row belongs to."""

    def token_ids(self, sequence: int) -> npt.NDArray[np.int32]:
        """Token ids of a whole sequence."""


@dataclass(frozen=True)
class FieldKind:
    """What the values of a column are.

    Attributes:
        kind: "string", "int", "float" or "bool".
        categories: The texts that the codes of a string column per row stand for; None where the texts are stored.
    """

    kind: str
    categories: tuple[str, ...] | None = None

    def decode(self, values: AnyArray) -> AnyArray:
        """Stored values as a reader wants them: booleans as bool, codes as texts.

        Raises:
            ValueError: A code that stands for no text.
        """
        if self.kind == "bool":
            return values.astype(bool)
        if self.categories is None:
            return values
        if values.size and (values.min() < 0 or values.max() >= len(self.categories)):
            raise ValueError(f"a code outside the {len(self.categories)} categories of the manifest")
        texts = np.empty(len(self.categories), object)
        texts[:] = self.categories
        return np.asarray(texts[values])


def read(source: Source, site: str, start: int, stop: int) -> AnyArray:
    """Rows `start` to `stop` as raw values [stop - start, *shape]."""
    spec = source.specs[site]
    out = np.empty((stop - start, *spec.shape), NUMPY_TYPES[spec.dtype])
    source.read_into(site, start, out)
    return out


def check_size(directory: Path, entry: ShardEntry) -> str | None:
    """Say what is wrong with a shard's file as far as its size tells, or None."""
    path = directory / entry.file
    if path.is_symlink() and path.resolve().parent != directory.resolve():
        return f"is a link out of the directory, to {path.resolve()}"
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size == entry.bytes:
        return None
    return "is empty" if size == 0 else f"has {size} bytes; the manifest says {entry.bytes}"


def damage(directory: Path, entry: ShardEntry, what: str) -> str:
    """One line about a damaged shard: what, which sequences, what to do."""
    last = entry.first_sequence + entry.sequences - 1
    return (
        f"{directory / entry.file} {what}; sequences {entry.first_sequence} to {last} "
        f"(rows {entry.first_row} to {entry.first_row + entry.rows - 1}) are affected. Restore the file, or repair it "
        f"(ac.repair, `probe cache verify {directory} --repair`)"
    )


class Handles:
    """Open HDF5 files of compressed shards, the least recently used let go first; none survives a fork."""

    def __init__(self) -> None:
        self._files: OrderedDict[tuple[Path, int], h5py.File] = OrderedDict()

    def get(self, path: Path) -> h5py.File:
        """The file, opened for reading."""
        key = (path, os.getpid())
        file = self._files.pop(key, None) or h5py.File(path, "r")
        self._files[key] = file
        while len(self._files) > OPEN_FILES:
            self._files.popitem(last=False)  # closed once nobody reads from it any more
        return file


class ShardReader:
    """One committed shard.

    Args:
        directory: The cache directory.
        number: The shard's place in the manifest.
        entry: Its manifest entry.
        specs: The cache's sites.
        identity: The cache's identity, which the shard must carry.
        compression: How its sites are stored: "gzip", "lzf" or None.
        handles: Where files of compressed sites are kept open.

    Raises:
        CorruptCacheError: The file is missing, truncated, of another cache, or not the shard that belongs here.
    """

    def __init__(
        self,
        directory: Path,
        number: int,
        entry: ShardEntry,
        specs: Mapping[str, SiteSpec],
        identity: str,
        compression: str | None = None,
        handles: Handles | None = None,
    ) -> None:
        self.directory, self.entry, self.specs, self.compression = directory, entry, specs, compression
        self.path, self._handles = directory / entry.file, handles or Handles()
        self._maps: dict[str, AnyArray] = {}
        self._starts: IntArray | None = None
        wrong = check_size(directory, entry)
        if wrong:
            raise self._corrupt(wrong)
        self._file = self._look()
        self.offsets = self._open(number, identity)

    def _look(self) -> tuple[int, ...]:
        return _identity(self._lost(self.path.stat))

    @property
    def changed(self) -> bool:
        """Whether the file is another than when it was opened.

        Raises:
            CorruptCacheError: It is gone.
        """
        return self._look() != self._file

    def _corrupt(self, what: str) -> CorruptCacheError:
        return CorruptCacheError(damage(self.directory, self.entry, what))

    def _open(self, number: int, identity: str) -> dict[str, int]:
        """Check the header and the layout; where the bytes of each contiguous site begin."""
        try:
            with h5py.File(self.path, "r") as file:
                self._check_header(file, identity)
                return {name: self._offset(file, spec) for name, spec in self.specs.items()}
        except (OSError, KeyError, RuntimeError) as error:
            raise self._corrupt(f"(shard {number}) cannot be read as HDF5: {error}") from error

    def _check_header(self, file: h5py.File, identity: str) -> None:
        if file.attrs.get("identity") != identity:
            raise self._corrupt("belongs to another cache")
        for name in ("first_sequence", "sequences", "first_row", "rows"):
            if file.attrs.get(name) != getattr(self.entry, name):
                found, wanted = file.attrs.get(name), getattr(self.entry, name)
                raise self._corrupt(f"is not the shard that belongs there ({name} {found}, manifest {wanted})")

    def _offset(self, file: h5py.File, spec: SiteSpec) -> int:
        dataset = file[f"sites/{spec.name}"]
        right = dataset.shape == (self.entry.rows, *spec.shape) and dataset.id.get_type() == HDF5_TYPES[spec.dtype]
        filters, wanted = _filters(dataset), FILTERS[self.compression] if self.compression else ()
        layout = "contiguous" if self.compression is None else f"shuffled and {self.compression}-compressed"
        if not right or (self.entry.rows and (filters != wanted or (dataset.chunks is None) != (not wanted))):
            how = "contiguous" if dataset.chunks is None else f"in chunks with filters {list(filters)}"
            found = f"holds {spec.name} as {dataset.dtype} {dataset.shape}, {how}"
            raise self._corrupt(f"{found}; {layout} {spec.dtype} {(self.entry.rows, *spec.shape)} was required")
        offset = None if wanted else dataset.id.get_offset()
        if offset is None and not wanted and self.entry.rows:
            raise self._corrupt(f"holds no values of {spec.name}")
        return int(offset or 0)

    def read(self, site: str, start: int, out: AnyArray) -> None:
        """Fill contiguous `out` [n, *shape] with the rows from `start` on (numbered within the shard)."""
        if self.compression is not None:
            self._decompress(site, start, out)
            return
        view: memoryview = out.reshape(-1).view(np.uint8).data
        position = self.offsets[site] + start * self.specs[site].row_bytes
        handle = self._lost(lambda: os.open(self.path, os.O_RDONLY))
        try:
            if _identity(os.fstat(handle)) != self._file:
                raise self._corrupt("was changed since the cache was opened")
            done = 0
            while done < len(view):
                count = os.preadv(handle, [view[done:]], position + done)
                if count == 0:
                    raise self._corrupt("ends too early")
                done += count
        finally:
            os.close(handle)

    def _lost(self, reach: Callable[[], Any]) -> Any:
        """Call `reach`; a file that is gone since the cache was opened is an error that says so."""
        try:
            return reach()
        except FileNotFoundError as error:
            raise self._corrupt(
                "is gone since the cache was opened (if its directory was moved, open it anew)"
            ) from error

    def _decompress(self, site: str, start: int, out: AnyArray) -> None:
        spec = self.specs[site]
        try:
            dataset = self._lost(lambda: self._handles.get(self.path))[f"sites/{site}"]
            space = dataset.id.get_space()
            space.select_hyperslab((start, *(0,) * len(spec.shape)), out.shape)
            # the dataset's own type: no conversion, bfloat16 arrives as its 16 bits
            dataset.id.read(h5py.h5s.create_simple(out.shape), space, out, mtype=HDF5_TYPES[spec.dtype])
        except (OSError, KeyError, RuntimeError) as error:
            raise self._corrupt(f"cannot be decompressed ({site}): {error}") from error

    def gather(self, site: str, rows: IntArray) -> AnyArray:
        """Rows by number within the shard, in any order."""
        if self.compression is not None:
            return self._gather_chunks(site, rows)
        if site not in self._maps:
            spec = self.specs[site]
            shape = (self.entry.rows, *spec.shape)
            kind, offset = NUMPY_TYPES[spec.dtype], self.offsets[site]
            if self.changed:
                raise self._corrupt("was changed since the cache was opened")
            self._maps[site] = self._lost(lambda: np.memmap(self.path, kind, "r", offset, shape))
        return np.asarray(self._maps[site][rows])

    def _gather_chunks(self, site: str, rows: IntArray) -> AnyArray:
        """Each chunk that holds one of the rows is decompressed once."""
        spec = self.specs[site]
        out = np.empty((len(rows), *spec.shape), NUMPY_TYPES[spec.dtype])
        if not len(rows):
            return out
        chunk = int(self._lost(lambda: self._handles.get(self.path))[f"sites/{site}"].chunks[0])
        order = np.argsort(rows // chunk, kind="stable")
        for where in np.split(order, np.flatnonzero(np.diff(rows[order] // chunk)) + 1):
            first = int(rows[where[0]] // chunk) * chunk
            held = np.empty((min(chunk, self.entry.rows - first), *spec.shape), out.dtype)
            self._decompress(site, first, held)
            out[where] = held[rows[where] - first]
        return out

    def field(self, name: str, part: slice = slice(None)) -> AnyArray:
        """A dataset outside /sites, e.g. "rows/position", or a slice of it; strings as str.

        Raises:
            CorruptCacheError: It is not there, or of another length than the manifest says.
        """
        try:
            with h5py.File(self.path, "r") as file:
                dataset = file[name]
                wanted = {"rows": self.entry.rows, "sequences": self.entry.sequences}.get(name.partition("/")[0])
                if name != "sequences/input_ids" and len(dataset) != (wanted or 0) + (name == "sequences/offsets"):
                    raise self._corrupt(f"has {len(dataset)} values in {name}; the manifest says {wanted}")
                text = h5py.check_string_dtype(dataset.dtype) is not None
                return np.asarray(dataset.asstr()[part] if text else dataset[part])
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            raise self._corrupt(f"has no readable {name}: {error}") from error

    @property
    def starts(self) -> IntArray:
        """First stored row of each sequence, within the shard [sequences + 1]."""
        if self._starts is None:
            numbers = self.entry.first_sequence + np.arange(self.entry.sequences + 1)
            self._starts = np.searchsorted(self.field("rows/sequence"), numbers).astype(np.int64)
        return self._starts


def _identity(found: os.stat_result) -> tuple[int, ...]:
    """What tells one file from another of the same name."""
    return found.st_ino, found.st_size, found.st_mtime_ns


def _filters(dataset: h5py.Dataset) -> tuple[int, ...]:
    properties = dataset.id.get_create_plist()
    return tuple(int(properties.get_filter(n)[0]) for n in range(properties.get_nfilters()))


class ShardSet:
    """All committed shards of a cache, opened when first needed.

    Args:
        directory: The cache directory.
        entries: The shards, in order.
        specs: The cache's sites.
        identity: The cache's identity.
        compression: How the sites are stored.
        kinds: What the columns hold, by dataset, e.g. "rows/entity".
    """

    def __init__(
        self,
        directory: Path,
        entries: Sequence[ShardEntry],
        specs: Mapping[str, SiteSpec],
        identity: str,
        *,
        compression: str | None = None,
        kinds: Mapping[str, FieldKind] | None = None,
    ) -> None:
        self.directory, self.entries, self.specs, self.identity = directory, list(entries), specs, identity
        self.compression, self.kinds = compression, dict(kinds or {})
        self.starts = np.array([entry.first_row for entry in self.entries], dtype=np.int64)
        self._first_sequences = np.array([entry.first_sequence for entry in self.entries], dtype=np.int64)
        self.rows = sum(entry.rows for entry in self.entries)
        self.n_sequences = sum(entry.sequences for entry in self.entries)
        self._open: dict[int, ShardReader] = {}
        self._handles = Handles()

    def __getstate__(self) -> dict[str, Any]:
        """Without open files and memory maps: another process opens its own."""
        return {**self.__dict__, "_open": {}, "_handles": Handles()}

    def check(self) -> None:
        """Look whether the files that were opened are still those.

        Raises:
            CorruptCacheError: One is gone, cut short, or another shard.
        """
        for number in list(self._open):
            if self._open[number].changed:
                del self._open[number]
                self[number]

    def __getitem__(self, number: int) -> ShardReader:
        if number not in self._open:
            entry = self.entries[number]
            self._open[number] = ShardReader(
                self.directory, number, entry, self.specs, self.identity, self.compression, self._handles
            )
        return self._open[number]

    def read(self, site: str, start: int, stop: int) -> AnyArray:
        """Rows `start` to `stop` as raw values [stop - start, *shape]."""
        return read(self, site, start, stop)

    def read_into(self, site: str, start: int, out: AnyArray) -> None:
        """Fill contiguous `out` [n, *shape] with the rows from `start` on."""
        done = 0
        while done < len(out):
            row = start + done
            number = int(np.searchsorted(self.starts, row, side="right")) - 1
            local = row - int(self.starts[number])
            count = min(len(out) - done, self.entries[number].rows - local)
            self[number].read(site, local, out[done : done + count])
            done += count

    def gather(self, site: str, rows: IntArray) -> AnyArray:
        """Rows by number, in any order and with repeats, as raw values [len(rows), *shape]."""
        spec = self.specs[site]
        out = np.empty((len(rows), *spec.shape), NUMPY_TYPES[spec.dtype])
        numbers = np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(numbers).tolist():
            where = np.flatnonzero(numbers == number)
            out[where] = self[number].gather(site, rows[where] - self.starts[number])
        return out

    def field(self, name: str) -> AnyArray:
        """A dataset outside /sites over all shards, end to end; see `Source`."""
        parts = [self[number].field(name) for number in range(len(self.entries))]
        if name == "sequences/offsets":
            lengths = np.concatenate([np.zeros(0, np.int64), *(np.diff(part) for part in parts)])
            return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return self._decoded(name, parts)

    def row_slice(self, name: str, start: int, stop: int) -> AnyArray:
        """`field(name)[start:stop]` of a "rows/<name>", read without the rest."""
        parts, row = [], start
        while row < stop:
            number = int(np.searchsorted(self.starts, row, side="right")) - 1
            entry = self.entries[number]
            last = min(stop, entry.first_row + entry.rows)
            parts.append(self[number].field(name, slice(row - entry.first_row, last - entry.first_row)))
            row = last
        return self._decoded(name, parts)

    def _decoded(self, name: str, parts: list[AnyArray]) -> AnyArray:
        kind = self.kinds.get(name, FieldKind("int"))
        if not parts:
            return np.zeros(0, {"string": object, "float": np.float64, "bool": bool}.get(kind.kind, np.int64))
        try:
            return kind.decode(np.concatenate(parts))
        except ValueError as error:
            raise CorruptCacheError(f"{self.directory}: {name} holds {error}; verify the cache") from error

    def row_span(self, sequence: int) -> tuple[int, int]:
        """First stored row of a sequence, and the one after its last."""
        shard, local = self._shard_of(sequence)
        first, stop = shard.starts[local : local + 2].tolist()
        return shard.entry.first_row + first, shard.entry.first_row + stop

    def sequence_of(self, row: int) -> int:
        """The sequence that a stored row belongs to."""
        shard = self[int(np.searchsorted(self.starts, row, side="right")) - 1]
        local = int(np.searchsorted(shard.starts, row - shard.entry.first_row, side="right")) - 1
        return shard.entry.first_sequence + local

    def token_ids(self, sequence: int) -> npt.NDArray[np.int32]:
        """Token ids of a whole sequence."""
        shard, local = self._shard_of(sequence)
        first, stop = shard.field("sequences/offsets")[local : local + 2].tolist()
        return shard.field("sequences/input_ids", slice(first, stop))

    def _shard_of(self, sequence: int) -> tuple[ShardReader, int]:
        number = int(np.searchsorted(self._first_sequences, sequence, side="right")) - 1
        return self[number], sequence - self.entries[number].first_sequence
