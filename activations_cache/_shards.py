"""Reading shards: each is checked when it is first opened, then its values are read as raw bytes at memory speed.

The format stores every site contiguously, so rows are read with `pread` at the dataset's offset in the file (h5py's own
conversion of bfloat16 runs at 36 MB/s, and its point selections are slower still), or gathered from a memory map.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from activations_cache.errors import CorruptCacheError
from activations_cache.store import HDF5_TYPES, NUMPY_TYPES, AnyArray, ShardEntry, SiteSpec

IntArray = npt.NDArray[np.int64]


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
        f"(rows {entry.first_row} to {entry.first_row + entry.rows - 1}) are affected. Restore the file, or delete the "
        "cache and capture it again"
    )


class ShardReader:
    """One committed shard.

    Args:
        directory: The cache directory.
        number: The shard's place in the manifest.
        entry: Its manifest entry.
        specs: The cache's sites.
        identity: The cache's identity, which the shard must carry.

    Raises:
        CorruptCacheError: The file is missing, truncated, of another cache, or not the shard that belongs here.
    """

    def __init__(
        self, directory: Path, number: int, entry: ShardEntry, specs: Mapping[str, SiteSpec], identity: str
    ) -> None:
        self.directory, self.entry, self.specs = directory, entry, specs
        self.path = directory / entry.file
        self._maps: dict[str, AnyArray] = {}
        wrong = check_size(directory, entry)
        if wrong:
            raise CorruptCacheError(damage(directory, entry, wrong))
        self.offsets = self._open(number, identity)

    def _open(self, number: int, identity: str) -> dict[str, int]:
        """Check the header and find where each site's bytes begin."""
        try:
            with h5py.File(self.path, "r") as file:
                self._check_header(file, identity)
                return {name: self._offset(file, spec) for name, spec in self.specs.items()}
        except (OSError, KeyError, RuntimeError) as error:
            what = f"(shard {number}) cannot be read as HDF5: {error}"
            raise CorruptCacheError(damage(self.directory, self.entry, what)) from error

    def _check_header(self, file: h5py.File, identity: str) -> None:
        if file.attrs.get("identity") != identity:
            raise CorruptCacheError(damage(self.directory, self.entry, "belongs to another cache"))
        for name in ("first_sequence", "sequences", "first_row", "rows"):
            if file.attrs.get(name) != getattr(self.entry, name):
                found, wanted = file.attrs.get(name), getattr(self.entry, name)
                what = f"is not the shard that belongs there ({name} {found}, manifest {wanted})"
                raise CorruptCacheError(damage(self.directory, self.entry, what))

    def _offset(self, file: h5py.File, spec: SiteSpec) -> int:
        dataset = file[f"sites/{spec.name}"]
        offset = dataset.id.get_offset()
        right = dataset.shape == (self.entry.rows, *spec.shape) and dataset.id.get_type() == HDF5_TYPES[spec.dtype]
        if not right or dataset.chunks is not None or (offset is None and self.entry.rows):
            what = f"holds {spec.name} as {dataset.dtype} {dataset.shape}, not contiguous {spec.dtype} {spec.shape}"
            raise CorruptCacheError(damage(self.directory, self.entry, what))
        return int(offset or 0)

    def read(self, site: str, start: int, out: AnyArray) -> None:
        """Fill `out` [n, *shape] with the rows from `start` on (numbered within the shard)."""
        spec = self.specs[site]
        view: memoryview = out.reshape(-1).view(np.uint8).data  # contiguous by contract
        position = self.offsets[site] + start * spec.row_bytes
        handle = os.open(self.path, os.O_RDONLY)
        try:
            done = 0
            while done < len(view):
                count = os.preadv(handle, [view[done:]], position + done)
                if count == 0:
                    raise CorruptCacheError(damage(self.directory, self.entry, "ends too early"))
                done += count
        finally:
            os.close(handle)

    def gather(self, site: str, rows: IntArray) -> AnyArray:
        """Rows by number within the shard, in any order."""
        if site not in self._maps:
            spec = self.specs[site]
            shape = (self.entry.rows, *spec.shape)
            kind, offset = NUMPY_TYPES[spec.dtype], self.offsets[site]
            self._maps[site] = np.memmap(self.path, kind, "r", offset, shape)
        return np.asarray(self._maps[site][rows])

    def field(self, name: str) -> Any:
        """A whole dataset outside /sites, e.g. "rows/position"; strings as str."""
        try:
            with h5py.File(self.path, "r") as file:
                dataset = file[name]
                if h5py.check_string_dtype(dataset.dtype) is not None:
                    return dataset.asstr()[()]
                return dataset[()]
        except (OSError, KeyError, RuntimeError) as error:
            raise CorruptCacheError(damage(self.directory, self.entry, f"has no readable {name}: {error}")) from error


class ShardSet:
    """All committed shards of a cache, opened when first needed."""

    def __init__(
        self, directory: Path, entries: Sequence[ShardEntry], specs: Mapping[str, SiteSpec], identity: str
    ) -> None:
        self.directory, self.entries, self.specs, self.identity = directory, list(entries), specs, identity
        self.starts = np.array([entry.first_row for entry in self.entries], dtype=np.int64)
        self.rows = sum(entry.rows for entry in self.entries)
        self._open: dict[int, ShardReader] = {}

    def __getitem__(self, number: int) -> ShardReader:
        if number not in self._open:
            entry = self.entries[number]
            self._open[number] = ShardReader(self.directory, number, entry, self.specs, self.identity)
        return self._open[number]

    def read(self, site: str, start: int, stop: int) -> AnyArray:
        """Rows `start` to `stop` as raw values [stop - start, *shape]."""
        spec = self.specs[site]
        out = np.empty((stop - start, *spec.shape), NUMPY_TYPES[spec.dtype])
        self.read_into(site, start, out)
        return out

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

    def field(self, name: str, kind: Any) -> Any:
        """A dataset outside /sites over all shards, end to end."""
        parts = [self[number].field(name) for number in range(len(self.entries))]
        return np.concatenate(parts) if parts else np.zeros(0, kind)
