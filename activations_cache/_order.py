"""In what order an epoch's rows come: windows of neighbouring rows, blocks of windows, buffers of blocks.

A unit is what one entry of a batch is made of: a row, or a window of `width` neighbouring positions of one sequence.
Units are numbered in the order of the rows. A block is a run of neighbouring units, read in one piece; an epoch draws
the blocks in random order, fills a buffer with some, and draws the buffer's units in random order. Everything here
follows from seed, epoch and sizes alone, so that any batch can be found again without reading those before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

IntArray = npt.NDArray[np.int64]
MANY_BLOCKS, FEWEST_BLOCKS = 1024, 64  # of a buffer: rows of one block meet in one batch, so many mix better
PAGE_BYTES = 4096  # less is never read at a time, but for a buffer of fewer than `FEWEST_BLOCKS` pages


@dataclass(frozen=True)
class Units:
    """The units of a list of rows, as runs of neighbouring ones.

    Attributes:
        starts: Place in the list of each run's first row [runs].
        before: Units before each run, and in the end all [runs + 1].
        width: Rows of a unit.
    """

    starts: IntArray
    before: IntArray
    width: int = 1

    @property
    def n(self) -> int:
        """How many units there are."""
        return int(self.before[-1])

    @classmethod
    def single(cls, n_rows: int) -> Units:
        """Every row a unit."""
        return cls(np.zeros(1, np.int64), np.array([0, n_rows], np.int64))

    @classmethod
    def windows(cls, rows: IntArray | None, sequence: IntArray, position: IntArray, width: int) -> Units:
        """Every `width` rows that lie next to each other in the list and have consecutive positions of one sequence.

        Args:
            rows: Row numbers of the list, or None for all rows.
            sequence: Sequence of each row in the list.
            position: Position of each row in its sequence.
            width: Rows of a window.
        """
        linked = (np.diff(sequence) == 0) & (np.diff(position) == 1)
        if rows is not None:
            linked &= np.diff(rows) == 1
        starts = np.concatenate([[0], np.flatnonzero(~linked) + 1]).astype(np.int64)
        counts = np.diff(np.append(starts, len(sequence))) - width + 1
        kept = counts > 0
        return cls(starts[kept], np.concatenate([[0], np.cumsum(counts[kept])]).astype(np.int64), width)

    def runs_of(self, units: IntArray) -> IntArray:
        """The run of each unit."""
        return np.searchsorted(self.before, units, side="right") - 1

    def spans(self, firsts: IntArray, stops: IntArray) -> tuple[IntArray, IntArray]:
        """Blocks of units, cut where a run ends: place of the first row, and units, of each span.

        Args:
            firsts: First unit of each block.
            stops: One past the last unit of each block.
        """
        low, high = self.runs_of(firsts), self.runs_of(stops - 1)
        touched = high - low + 1  # runs of each block
        skipped = np.repeat(np.cumsum(touched) - touched - low, touched)
        run = np.arange(len(skipped)) - skipped
        begin = np.maximum(self.before[run], np.repeat(firsts, touched))
        end = np.minimum(self.before[run + 1], np.repeat(stops, touched))
        return self.starts[run] + begin - self.before[run], end - begin

    def most_rows(self, block: int) -> int:
        """The most rows that a block of `block` units needs."""
        firsts = np.arange(0, self.n, block)
        stops = np.minimum(firsts + block, self.n)
        runs = self.runs_of(stops - 1) - self.runs_of(firsts) + 1
        return int((stops - firsts + runs * (self.width - 1)).max())


@dataclass(frozen=True)
class Layout:
    """How units make blocks and blocks make buffers.

    Attributes:
        block: Units of a block.
        blocks: Blocks of a buffer.
        rows: The most rows that a buffer holds.
    """

    block: int
    blocks: int
    rows: int

    @classmethod
    def fit(cls, units: Units, capacity: int, block_bytes: int, site_bytes: list[int], unit_bytes: int) -> Layout:
        """The layout whose buffers take at most `capacity` bytes, or hold one unit if not even that fits.

        Args:
            units: The units.
            capacity: Bytes of one buffer.
            block_bytes: Bytes to read in one piece, where the capacity allows it.
            site_bytes: Bytes of a row of each site.
            unit_bytes: Bytes of bookkeeping per unit.
        """
        row_bytes = max(sum(site_bytes), 1)
        wanted = max(block_bytes // max(*site_bytes, 1), 4 * (units.width - 1))
        share = max(capacity // MANY_BLOCKS, min(PAGE_BYTES, capacity // FEWEST_BLOCKS))  # bytes of one block
        fitting = (share - (units.width - 1) * row_bytes) // (row_bytes + unit_bytes)
        block = max(1, min(wanted, fitting, units.n))
        most = units.most_rows(block)
        all_blocks = math.ceil(units.n / block)
        blocks = min(max(1, capacity // (most * row_bytes + block * unit_bytes)), all_blocks)
        return cls(block, blocks, blocks * most)


@dataclass(frozen=True)
class EpochOrder:
    """The blocks of one epoch in the order in which they are read.

    Attributes:
        epoch: Number of the epoch.
        firsts: First unit of each block.
        stops: One past the last unit of each block.
        bounds: Units of the epoch before each buffer, and in the end all [buffers + 1].
        blocks: Blocks of a buffer.
    """

    epoch: int
    firsts: IntArray
    stops: IntArray
    bounds: IntArray
    blocks: int

    @classmethod
    def draw(
        cls, n_units: int, layout: Layout, seed: int | None, epoch: int, part: tuple[int, int] = (0, 1)
    ) -> EpochOrder:
        """Draw the order of an epoch's blocks, and cut this part out of it.

        Args:
            n_units: All units.
            layout: Their blocks and buffers.
            seed: Fixes the order together with `epoch`; None keeps the order of the units.
            epoch: Number of the epoch.
            part: (rank, world): the rank-th of `world` parts, which are as long as each other to within one unit.
        """
        n_blocks = math.ceil(n_units / layout.block)
        order = np.arange(n_blocks) if seed is None else generator(seed, epoch).permutation(n_blocks)
        firsts = order * layout.block
        stops = np.minimum(firsts + layout.block, n_units)
        low, high = part_bounds(n_units, part)
        ends = np.cumsum(stops - firsts)
        kept = slice(int(np.searchsorted(ends, low, "right")), int(np.searchsorted(ends, high, "left")) + 1)
        behind = ends[kept] - high  # units of each block that lie past this part
        ahead = low - (ends - stops + firsts)[kept]  # and before it
        firsts, stops = firsts[kept] + np.maximum(ahead, 0), stops[kept] - np.maximum(behind, 0)
        sizes = np.concatenate([[0], np.cumsum(stops - firsts)])
        bounds = np.append(sizes[: -1 : layout.blocks], sizes[-1])
        return cls(epoch, firsts, stops, bounds.astype(np.int64), layout.blocks)

    def buffer_of(self, unit: int) -> int:
        """The buffer that holds the unit-th unit of the epoch."""
        return int(np.searchsorted(self.bounds, unit, side="right")) - 1

    def blocks_of(self, buffer: int) -> tuple[IntArray, IntArray]:
        """The blocks of a buffer in the order of the file: their first units, and one past their last."""
        kept = slice(buffer * self.blocks, (buffer + 1) * self.blocks)
        return np.sort(self.firsts[kept]), np.sort(self.stops[kept])


def part_bounds(n_units: int, part: tuple[int, int]) -> tuple[int, int]:
    """Where the rank-th of `world` parts of an epoch begins and ends."""
    rank, world = part
    return n_units * rank // world, n_units * (rank + 1) // world


def generator(seed: int, *numbers: int) -> np.random.Generator:
    """The generator that belongs to a seed and further numbers."""
    return np.random.default_rng([seed % 2**64, *numbers])


def permutation(n: int, seed: int, *numbers: int) -> IntArray:
    """A permutation of n; torch's, which is twice as fast as numpy's."""
    source = torch.Generator().manual_seed(int(generator(seed, *numbers).integers(2**63)))
    return torch.randperm(n, generator=source).numpy()
