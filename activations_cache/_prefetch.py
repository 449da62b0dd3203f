"""Filling shuffle buffers, in a background thread while the batches of the one before are drawn."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from activations_cache._gather import as_tensor, as_words
from activations_cache._order import EpochOrder, IntArray, Layout, Units, generator
from activations_cache._shards import Source
from activations_cache._spans import read_spans
from activations_cache.store import NUMPY_TYPES, AnyArray

Memory = dict[int, list[AnyArray]]  # per slot one array [rows, *shape] per site


@dataclass(frozen=True)
class Buffer:
    """A filled shuffle buffer.

    Attributes:
        epoch: The epoch that it belongs to.
        start: Units of the epoch before it.
        stop: And after its last.
        words: Per site the raw values of its rows, as machine words.
        index: First row, within the buffer, of each unit, in the order in which they are drawn.
        numbers: Row number of that row in the cache, if asked for.
    """

    epoch: int
    start: int
    stop: int
    words: tuple[Shaped[Tensor, "rows words"], ...]
    index: Int64[Tensor, " units"]
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

    def fill(self, slot: int, order: EpochOrder, number: int) -> Buffer:
        """Fill one slot with one buffer of an epoch. What the slot held before is gone."""
        places, counts = self.units.spans(*order.blocks_of(number))
        rows, held = counts + self.units.width - 1, self._slot(slot)
        done = int(rows.sum())
        for spec, values in zip(self.specs, held, strict=True):
            self._read(spec.name, places, rows, values[:done])
        words = tuple(
            as_words(as_tensor(values[:done], spec.dtype)) for spec, values in zip(self.specs, held, strict=True)
        )
        start, stop = order.bounds[number : number + 2].tolist()
        return Buffer(order.epoch, start, stop, words, *self._order(places, counts, order.epoch, number))

    def _slot(self, slot: int) -> list[AnyArray]:
        rows, held = self.layout.rows, self.memory.get(slot)
        if held is None or len(held[0]) != rows:
            held = [np.empty((rows, *spec.shape), NUMPY_TYPES[spec.dtype]) for spec in self.specs]
            self.memory[slot] = held
        return held

    def _order(self, places: IntArray, counts: IntArray, epoch: int, number: int) -> tuple[Tensor, Tensor | None]:
        """Where each unit begins in the buffer, and its row's number in the cache, in the order of drawing."""
        units = int(counts.sum())
        index = np.arange(units) if self.seed is None else generator(self.seed, epoch, number + 1).permutation(units)
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

        A buffer is valid until the next is asked for. What a fill raises is raised here; closing the iterator ends the
        thread.
        """
        jobs: Iterator[Callable[[], Buffer]] = (
            _job(self.fill, count % self.slots, *task) for count, task in enumerate(tasks)
        )
        if not ahead:
            for job in jobs:
                yield job()
            return
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="activations-cache-prefetch")
        try:
            waiting = deque[Future[Buffer]]()
            for job in jobs:
                waiting.append(pool.submit(job))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            self.stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)


def _job(fill: Callable[..., Buffer], *arguments: Any) -> Callable[[], Buffer]:
    return lambda: fill(*arguments)
