"""All shards of a site as one tensor in the process's address space, so that one gather reads from any of them.

Shards are mapped one after the other into a reserved range of addresses, each at a place where its rows fall on the
rows of the tensor. Nothing is copied: a gather reads the page cache at the speed of RAM. Only on Linux, and only where
the shards are contiguous and their offsets allow it; elsewhere rows are copied into a buffer first (`_prefetch`).
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from activations_cache._gather import INTEGER_VIEWS
from activations_cache._shards import IntArray, ShardSet, Source, damage
from activations_cache.errors import CorruptCacheError

PROT_NONE, PROT_READ = 0, 1
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_NORESERVE = 1, 2, 0x10, 0x20, 0x4000  # Linux's numbers
MADV_DONTNEED, MADV_POPULATE_READ = 4, 22
TOUCH_BYTES = 64 * 2**10
MOST_SHARDS = 10_000  # the kernel allows 65,530 maps a process
WORDS = {"8": np.int64, "4": np.int32, "2": np.int16}


@dataclass(frozen=True)
class RowMap:
    """One site of a cache as a tensor that lies on disk.

    Attributes:
        words: All rows as machine words. Between shards there are rows that must not be read.
        starts: First row of each shard in the cache.
        shift: Per shard what to add to a row's number in the cache to have its number in `words`.
        range: Address and length of what is mapped.
    """

    words: Shaped[Tensor, "places words"]
    starts: IntArray
    shift: IntArray
    range: tuple[int, int]

    @classmethod
    def of(cls, source: Source, site: str) -> RowMap | None:
        """Map a site; None where that cannot be done.

        Raises:
            CorruptCacheError: A shard is missing, truncated, or another's.
        """
        if sys.platform != "linux" or not isinstance(source, ShardSet) or source.compression is not None:
            return None
        row_bytes, n_shards = source.specs[site].row_bytes, len(source.entries)
        if not row_bytes or not source.rows or n_shards > MOST_SHARDS:
            return None
        offsets = [source[number].offsets[site] for number in range(n_shards)]
        places = _places(offsets, [entry.rows * row_bytes for entry in source.entries], row_bytes)
        size = next((size for size, _ in INTEGER_VIEWS if row_bytes % size == 0 and offsets[0] % size == 0), None)
        return None if places is None or size is None else cls._map(source, site, offsets, places, size)

    @classmethod
    def _map(cls, source: ShardSet, site: str, offsets: list[int], places: list[int], size: int) -> RowMap | None:
        row_bytes, page = source.specs[site].row_bytes, mmap.PAGESIZE
        ends = [p + o % page + e.rows * row_bytes for p, o, e in zip(places, offsets, source.entries, strict=True)]
        total = _up(max(ends), page)
        base = _mmap(None, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if base is None:
            return None
        for number, (place, offset, end) in enumerate(zip(places, offsets, ends, strict=True)):
            handle = _reopen(-1, source, number)
            try:
                start, wanted = offset - offset % page, source.entries[number].rows * row_bytes
                if os.fstat(handle).st_size < offset + wanted:  # a map would read zeros up to the end of the page
                    _munmap(base, total)
                    raise CorruptCacheError(damage(source.directory, source.entries[number], "ends too early"))
                if _mmap(base + place, end - place, PROT_READ, MAP_SHARED | MAP_FIXED, handle, start) is None:
                    _munmap(base, total)
                    return None
            finally:
                os.close(handle)
        first = base + offsets[0] % page
        rows = (total - offsets[0] % page) // row_bytes
        memory: Any = (ctypes.c_uint8 * (rows * row_bytes)).from_address(first)
        # the range lives as long as any tensor over it; at exit another thread may still read, and the system unmaps
        weakref.finalize(memory, _munmap, base, total).atexit = False
        words = torch.from_numpy(np.frombuffer(memory, WORDS[str(size)]).reshape(rows, row_bytes // size))
        begins = [(p + o % page - offsets[0] % page) // row_bytes for p, o in zip(places, offsets, strict=True)]
        return cls(words, source.starts, np.array(begins, np.int64) - source.starts, (base, total))

    def rows_at(self, rows: IntArray, places: IntArray, counts: IntArray) -> IntArray:
        """Numbers in `words` of runs of rows: `counts[i]` from `places[i]` on, end to end in `rows`."""
        first = np.searchsorted(self.starts, places, side="right") - 1
        last = np.searchsorted(self.starts, places + counts - 1, side="right") - 1
        found = rows + np.repeat(self.shift[first], counts)
        ends = np.cumsum(counts)
        for run in np.flatnonzero(first != last).tolist():
            part = slice(int(ends[run] - counts[run]), int(ends[run]))
            found[part] = rows[part] + self.shift[np.searchsorted(self.starts, rows[part], side="right") - 1]
        return found

    def release(self) -> None:
        """Give all pages back; they stay in the system's cache. One call: each interrupts the other processors."""
        _libc().madvise(*self.range, MADV_DONTNEED)

    def pages(self, places: IntArray, counts: IntArray) -> list[tuple[int, int]]:
        """Address and length of the pages of runs of rows, which are rows of the cache."""
        first = np.searchsorted(self.starts, places, side="right") - 1
        last = np.searchsorted(self.starts, places + counts - 1, side="right") - 1
        whole = first == last
        begins, stops = (
            [places[whole] + self.shift[first[whole]]],
            [(places + counts)[whole] + self.shift[first[whole]]],
        )
        for run in np.flatnonzero(~whole).tolist():  # cut where a shard ends: what lies between must not be touched
            shards = np.arange(first[run], last[run] + 1)
            cuts = np.concatenate([[places[run]], self.starts[shards[1:]], [places[run] + counts[run]]])
            begins.append(cuts[:-1] + self.shift[shards])
            stops.append(cuts[1:] + self.shift[shards])
        row_bytes, page = self.words.shape[1] * self.words.element_size(), mmap.PAGESIZE
        begin = (self.words.data_ptr() + np.concatenate(begins) * row_bytes) // page * page
        end = self.words.data_ptr() + np.concatenate(stops) * row_bytes
        return list(zip(begin.tolist(), (end - begin).tolist(), strict=True))


def bring(pages: Sequence[tuple[int, int]], stopped: Callable[[], bool]) -> bool:
    """Read pages into memory, without the interpreter's lock; whether that could be done."""
    advise = _libc().madvise
    return all(stopped() or advise(address, length, MADV_POPULATE_READ) == 0 for address, length in pages)


def map_all(source: Source, sites: Sequence[str]) -> list[RowMap]:
    """Map several sites; nothing unless all can be."""
    found = [RowMap.of(source, site) for site in sites]
    held = [one for one in found if one is not None]
    return held if len(held) == len(found) else []


def in_cache(source: ShardSet, site: str, rows: IntArray) -> bool:
    """Whether the system's cache holds some rows; False where it does not tell."""
    row_bytes, byte = source.specs[site].row_bytes, memoryview(bytearray(1))
    for row in rows.tolist():
        number = int(np.searchsorted(source.starts, row, side="right")) - 1
        handle = _reopen(-1, source, number)
        try:
            place = source[number].offsets[site] + (row - int(source.starts[number])) * row_bytes
            if os.preadv(handle, [byte], place, os.RWF_NOWAIT) != 1:
                return False
        except OSError:  # EAGAIN: it is not there; EOPNOTSUPP: this filesystem does not tell
            return False
        finally:
            os.close(handle)
    return True


def touch(source: ShardSet, site: str, starts: IntArray, counts: IntArray, stopped: Callable[[], bool]) -> None:
    """Bring runs of rows into the system's cache by reading them: where the kernel cannot (`bring`), or says that a
    file has not what it should.

    Args:
        source: The shards.
        site: Canonical site name.
        starts: First row of each run.
        counts: Rows of each run.
        stopped: Asked before each run; once it is true the rest is left.

    Raises:
        CorruptCacheError: A shard ends before its rows do.
    """
    row_bytes, scratch = source.specs[site].row_bytes, memoryview(bytearray(TOUCH_BYTES))
    ends = source.starts + [entry.rows for entry in source.entries]
    handle, held = -1, -1
    try:
        for start, stop in zip(starts.tolist(), (starts + counts).tolist(), strict=True):
            while start < stop and not stopped():
                number = int(np.searchsorted(source.starts, start, side="right")) - 1
                if number != held:
                    handle, held = _reopen(handle, source, number), number
                upto, first = min(stop, int(ends[number])), int(source.starts[number])
                begin = source[number].offsets[site] - first * row_bytes
                if not _touch(handle, begin + start * row_bytes, begin + upto * row_bytes, scratch):
                    raise CorruptCacheError(damage(source.directory, source.entries[number], "ends too early"))
                start = upto
    finally:
        if handle >= 0:
            os.close(handle)


def _reopen(handle: int, source: ShardSet, number: int) -> int:
    if handle >= 0:
        os.close(handle)
    try:
        return os.open(source[number].path, os.O_RDONLY)
    except FileNotFoundError as error:
        what = "is gone since the cache was opened (if its directory was moved, open it anew)"
        raise CorruptCacheError(damage(source.directory, source.entries[number], what)) from error


def _touch(handle: int, begin: int, end: int, scratch: memoryview) -> bool:
    """Read a part of a file; whether it goes so far."""
    while begin < end:
        count = os.preadv(handle, [scratch[: end - begin]], begin)
        if not count:
            return False
        begin += count
    return True


def _places(offsets: list[int], sizes: list[int], row_bytes: int) -> list[int] | None:
    """Where each shard's first page goes in the range, so that all rows are whole numbers of rows apart; or None."""
    page, places, end = mmap.PAGESIZE, list[int](), 0
    cycle = row_bytes // math.gcd(page, row_bytes)  # pages after which places repeat
    for offset, size in zip(offsets, sizes, strict=True):
        behind = offset % page - offsets[0] % page
        for place in range(end, end + cycle * page, page):
            if (place + behind) % row_bytes == 0 and place + behind >= 0:
                break
        else:
            return None
        places.append(place)
        end = _up(place + offset % page + size, page)
    return places


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@cache
def _libc() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    sizes = (ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
    library.mmap.argtypes = (ctypes.c_void_p, *sizes)
    library.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return library


def _mmap(address: int | None, length: int, protection: int, flags: int, handle: int, offset: int) -> int | None:
    found = _libc().mmap(address, length, protection, flags, handle, offset)
    return None if found is None or found == ctypes.c_void_p(-1).value else int(found)


def _munmap(base: int, length: int) -> None:
    _libc().munmap(base, length)
