"""Reading many short runs of rows: a few microseconds each where shards lie contiguously on disk."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable

import numpy as np

from activations_cache._shards import IntArray, ShardSet, Source
from activations_cache.store import AnyArray


def read_spans(
    source: Source, site: str, starts: IntArray, counts: IntArray, out: AnyArray, stopped: Callable[[], bool]
) -> None:
    """Fill `out` with `counts[i]` rows from `starts[i]` on, end to end.

    Args:
        source: Where the rows come from.
        site: Canonical site name.
        starts: First row of each run; ascending runs are the fastest.
        counts: Rows of each run.
        out: Contiguous raw values [sum of counts, *shape].
        stopped: Asked before each run; once it is true the rest of `out` is left as it is.
    """
    reader = None
    if isinstance(source, ShardSet) and source.compression is None:
        reader = _Contiguous(source, site, out)
    done = 0
    try:
        for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
            if stopped():
                return
            if reader is None or not reader.read(start, count, done):
                source.read_into(site, start, out[done : done + count])
            done += count
    finally:
        if reader is not None:
            reader.close()


class _Contiguous:
    """Reads runs that lie in one shard each with one system call, keeping the last shard's file open."""

    def __init__(self, shards: ShardSet, site: str, out: AnyArray) -> None:
        self.shards, self.site = shards, site
        self.starts: list[int] = shards.starts.tolist()
        self.row_bytes = shards.specs[site].row_bytes
        self.view: memoryview = out.reshape(-1).view(np.uint8).data
        self.handle = self.first = self.stop = self.offset = -1

    def read(self, start: int, count: int, place: int) -> bool:
        """Read into `out[place:]`; False where that was not possible, and the slow way finds out why."""
        if not (self.first <= start < self.stop) and not self._open(start):
            return False
        if start + count > self.stop:
            return False
        begin, n_bytes = place * self.row_bytes, count * self.row_bytes
        position = self.offset + (start - self.first) * self.row_bytes
        return os.preadv(self.handle, [self.view[begin : begin + n_bytes]], position) == n_bytes

    def _open(self, row: int) -> bool:
        self.close()
        number = bisect_right(self.starts, row) - 1
        shard = self.shards[number]
        try:
            self.handle = os.open(shard.path, os.O_RDONLY)
        except OSError:
            return False
        self.first, self.offset = self.starts[number], shard.offsets[self.site]
        self.stop = self.first + shard.entry.rows
        return True

    def close(self) -> None:
        """Close the file."""
        if self.handle >= 0:
            os.close(self.handle)
        self.handle = self.first = self.stop = -1
