"""Filling shuffle buffers, in a background thread while the batches of the one before are drawn.

Where the cache can be mapped (`_mapping`), a buffer is no copy: filling it brings its pages into the system's cache,
and batches are gathered from there. Where it cannot, its rows are copied into memory.
"""

from __future__ import annotations

import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from activations_cache._gather import as_tensor, as_words
from activations_cache._mapping import bring, in_cache, map_all, touch
from activations_cache._order import EpochOrder, IntArray, Layout, Units, permutation
from activations_cache._shards import ShardSet, Source
from activations_cache._spans import read_spans
from activations_cache.errors import DataError
from activations_cache.store import NUMPY_TYPES, AnyArray

SAMPLED = 8  # blocks of a buffer that are asked for whether they are in the system's cache
Memory = dict[int, list[AnyArray]]  # per slot one array [rows, *shape] per site


@dataclass(frozen=True)
class Buffer:
    """A filled shuffle buffer.

    Attributes:
        epoch: The epoch that it belongs to.
        start: Units of the epoch before it.
        stop: And after its last.
        words: Per site raw values as machine words: those of its rows, or of all rows, mapped.
        index: Per site the first row in `words` of each unit, in the order in which they are drawn.
        numbers: Row number of that row in the cache, if asked for.
    """

    epoch: int
    start: int
    stop: int
    words: tuple[Shaped[Tensor, "rows words"], ...]
    index: tuple[Int64[Tensor, " units"], ...]
    numbers: Int64[Tensor, " units"] | None


class Filler:
    """Fills buffers from a source.

    Args:
        source: Where values come from.
        sites: Names of the sites.
        rows: Row numbers to draw from; None for all.
        units: What is drawn.
        layout: Size of a buffer.
        seed: Fixes the order in which a buffer's units are drawn; None keeps them in order.
        slots: Buffers that are in use at a time.
        memory: Their memory, where an earlier filler left it; kept up to date.
        with_numbers: Whether buffers carry row numbers.
    """

    def __init__(
        self,
        source: Source,
        sites: Sequence[str],
        rows: IntArray | None,
        units: Units,
        layout: Layout,
        seed: int | None,
        slots: int,
        memory: Memory,
        with_numbers: bool,
    ) -> None:
        self.source, self.rows, self.units, self.layout = source, rows, units, layout
        self.seed, self.slots, self.with_numbers = seed, slots, with_numbers
        self.specs = [source.specs[site] for site in sites]
        self.stopped = threading.Event()
        self.memory = memory
        self.maps = map_all(source, sites) if rows is None else []

    def fill(self, slot: int, order: EpochOrder, number: int, near: bool = False) -> Buffer:
        """Fill one slot with one buffer of an epoch. What the slot held before is gone.

        Args:
            slot: The slot.
            order: The epoch.
            number: The buffer.
            near: It is mapped and in the system's cache: the gather brings its pages itself, on all processors.
        """
        places, counts = self.units.spans(*order.blocks_of(number))
        if self.maps:
            self._exchange(places, counts + self.units.width - 1, near)
            return self._point_at(places, counts, order, number)
        rows, held = counts + self.units.width - 1, self._slot(slot)
        done = int(rows.sum())
        for spec, values in zip(self.specs, held, strict=True):
            self._read(spec.name, places, rows, values[:done])
        words = tuple(
            as_words(as_tensor(values[:done], spec.dtype)) for spec, values in zip(self.specs, held, strict=True)
        )
        start, stop = order.bounds[number : number + 2].tolist()
        index, numbers = self._order(places, counts, order.epoch, number)
        return Buffer(order.epoch, start, stop, words, (index,) * len(words), numbers)

    def _point_at(self, places: IntArray, counts: IntArray, order: EpochOrder, number: int) -> Buffer:
        """A buffer that says where its rows lie in the maps, once their pages are in memory."""
        rows = np.repeat(places - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))
        drawn = slice(None) if self.seed is None else permutation(len(rows), self.seed, order.epoch, number + 1)
        index = [torch.from_numpy(found.rows_at(rows, places, counts)[drawn]) for found in self.maps]
        numbers = torch.from_numpy(rows[drawn]) if self.with_numbers else None
        start, stop = order.bounds[number : number + 2].tolist()
        return Buffer(order.epoch, start, stop, tuple(found.words for found in self.maps), tuple(index), numbers)

    def _exchange(self, places: IntArray, counts: IntArray, near: bool) -> None:
        """Exchange the pages in memory for those of these runs; what is still drawn from comes back by itself."""
        assert isinstance(self.source, ShardSet)  # nothing else is mapped
        self.source.check()  # a file that was cut short would end the process when its pages are touched
        for spec, found in zip(self.specs, self.maps, strict=True):
            found.release()
            if not near and not bring(found.pages(places, counts), self.stopped.is_set):
                touch(self.source, spec.name, places, counts, self.stopped.is_set)

    def _slot(self, slot: int) -> list[AnyArray]:
        rows, held = self.layout.rows, self.memory.get(slot)
        if held is None or len(held[0]) != rows:
            held = [np.empty((rows, *spec.shape), NUMPY_TYPES[spec.dtype]) for spec in self.specs]
            self.memory[slot] = held
        return held

    def _order(self, places: IntArray, counts: IntArray, epoch: int, number: int) -> tuple[Tensor, Tensor | None]:
        """Where each unit begins in the buffer, and its row's number in the cache, in the order of drawing."""
        units = int(counts.sum())
        index = np.arange(units) if self.seed is None else permutation(units, self.seed, epoch, number + 1)
        before = np.cumsum(counts) - counts  # units before each span
        numbers = None
        if self.with_numbers:
            listed = index + np.repeat(places - before, counts)[index]
            numbers = torch.from_numpy(listed if self.rows is None else self.rows[listed])
        if self.units.width > 1:  # each span also holds the rest of its last unit
            index += np.repeat(np.arange(len(counts)) * (self.units.width - 1), counts)[index]
        return torch.from_numpy(index), numbers

    def _read(self, site: str, places: IntArray, counts: IntArray, out: AnyArray) -> None:
        """Read `counts` rows from each of `places` of the list of rows, end to end."""
        if self.rows is None:
            read_spans(self.source, site, places, counts, out, self.stopped.is_set)
            return
        done = 0
        for place, count in zip(places.tolist(), counts.tolist(), strict=True):
            if self.stopped.is_set():
                return
            self._read_chosen(site, self.rows[place : place + count], out[done : done + count])
            done += count

    def _read_chosen(self, site: str, rows: IntArray, out: AnyArray) -> None:
        """Read rows by number: runs of neighbours where there are, else one by one."""
        breaks = np.concatenate([[0], np.flatnonzero(np.diff(rows) != 1) + 1, [len(rows)]])
        if len(breaks) - 1 > max(1, len(rows) // 16):
            out[...] = self.source.gather(site, rows)
        else:
            read_spans(self.source, site, rows[breaks[:-1]], np.diff(breaks), out, self.stopped.is_set)

    def buffers(self, tasks: Iterator[tuple[EpochOrder, int]], ahead: int) -> Iterator[Buffer]:
        """Fill after fill, up to `ahead` of them in a thread before they are asked for.

        What lies in the system's cache already is not worth a thread, which would take a processor from the gather: it
        is filled when it is asked for. A buffer is valid until the next is asked for. What a fill raises is raised
        here; closing the iterator ends the thread.
        """
        pool: ThreadPoolExecutor | None = None
        current = os.getpid  # at exit, when a generator that was left is closed, modules may be empty
        waiting, process = deque[Callable[[], Buffer]](), current()
        futures: list[Future[Buffer]] = []
        try:
            for count, task in enumerate(tasks):
                near = self._is_near(*task)
                fill = functools.partial(self.fill, count % self.slots, *task, near)
                if ahead and not near:
                    pool = pool or ThreadPoolExecutor(1, thread_name_prefix="activations-cache-prefetch")
                    futures = [*(future for future in futures if not future.done()), pool.submit(fill)]
                    waiting.append(functools.partial(_result, futures[-1], process))
                else:
                    waiting.append(fill)
                if len(waiting) > ahead:
                    yield waiting.popleft()()
            while waiting:
                yield waiting.popleft()()
        finally:
            self.stopped.set()
            for future in futures:
                future.cancel()
            if pool is not None and current() == process:
                pool.shutdown(wait=True)

    def _is_near(self, order: EpochOrder, number: int) -> bool:
        """Whether a sample of a buffer's rows is in the system's cache, where they would be drawn from."""
        if not self.maps:
            return False
        assert isinstance(self.source, ShardSet)
        places, counts = self.units.spans(*order.blocks_of(number))
        sample = np.linspace(0, len(places) - 1, SAMPLED).astype(np.int64)
        return all(in_cache(self.source, spec.name, (places + counts - 1)[sample]) for spec in self.specs)


def _result(future: Future[Buffer], process: int) -> Buffer:
    """What a fill made, in the process whose thread it is.

    Raises:
        DataError: The process was forked since; the thread is not in this one.
    """
    if os.getpid() != process:
        raise DataError("this iterator was begun before the process was forked; iterate anew in the child")
    return future.result()
