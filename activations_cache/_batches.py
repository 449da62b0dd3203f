"""Shuffled batches from disk: a permutation of the rows of many random blocks, never a row of the disk at a time.

Reading whole blocks keeps the disk at its sequential speed; a buffer mixes many blocks, and so many sequences.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from activations_cache._gather import SCRATCH_BYTES, Outputs, as_tensor, gather_into, gather_rows
from activations_cache._order import EpochOrder, IntArray, Layout, Units, part_bounds
from activations_cache._prefetch import Buffer, Filler, Memory
from activations_cache._shards import ShardSet, Source
from activations_cache.errors import CacheMismatchError, DataError, SiteError
from activations_cache.store import TORCH_TYPES

__all__ = ["BLOCK_BYTES", "DEFAULT_BUFFER_BYTES", "Batches", "as_tensor", "gather_rows"]

DEFAULT_BUFFER_BYTES = 64 * 2**20
BLOCK_BYTES = 64 * 2**10  # one read: large enough for sequential speed, small enough that a buffer mixes many blocks
STATE_VERSION = 1
Batch = Tensor | tuple[Tensor, ...]


class Batches(IterableDataset[Batch]):
    """Batches of rows as an iterable and a torch dataset; `len()` is the number of batches (of all epochs).

    Every row that was asked for comes exactly once per epoch, in an order that `seed` and the epoch's number fix; the
    last batch of an epoch may be smaller, and is dropped under `drop_last` alone. Iterating again starts again, unless
    `load_state_dict` said where to go on.

    One site gives tensors [batch, *shape]; a sequence of sites gives tuples of such tensors, of the same rows, each in
    its own shape and type. `consecutive=n` gives [batch, n, *shape]: every window of n rows that are neighbours in the
    cache, in one sequence, at consecutive positions, once per epoch (a run of k such rows has k - n + 1 windows).
    `with_rows=True` appends the row numbers, int64 [batch], or [batch, n] for windows.

    RAM: `buffer_bytes` bounds the buffer that batches are drawn from, those that are filled ahead, their permutations
    and the memory for conversion, all together; each of 1 + max(prefetch, 1) buffers holds at least one unit. Where
    shards can be mapped, a buffer is no memory of this process but pages of the system's cache; the system maps the
    neighbours of a page with it, so that more of the process's size may be such pages (RssFile), which it takes back
    when it needs them. On top come 16 bytes per block of an epoch (64 KiB of rows, less under a small budget), the
    batch that was handed out, and two batches' worth of memory that is used again; for windows, 16 bytes per sequence,
    and once at the start the position and the sequence of every row. Memory of a batch is used again only when nothing
    refers to it; buffers are kept for the next iteration over the same object.

    In a `torch.utils.data.DataLoader` (`batch_size=None`, or `loader`) with workers, each worker reads its own run of
    an epoch's batches: together every row once. The workers share `buffer_bytes`, so buffers are smaller, and the
    batches are not those of a single process; over several epochs, workers may begin the next one a batch apart.

    Args:
        source: What to read: the cache's shards, or a view.
        sites: Canonical site name, or a sequence of them.
        dtype: Type of the batches, or its name; None keeps each site's storage type.
        batch_size: Rows (or windows) per batch.
        seed: Fixes the order.
        epochs: Times through the rows; None goes on for ever.
        rows: Row numbers to draw from, each as often as it is listed; None draws from all. `shuffle=False` keeps their
            order.
        shuffle: False gives the rows in order.
        drop_last: Leave out an epoch's last batch if it is smaller.
        buffer_bytes: RAM budget; see above.
        device: Where the batches go. For CUDA, rows are gathered into pinned memory, copied without waiting in their
            storage type and converted there.
        consecutive: Rows per window; 1 draws single rows.
        prefetch: Buffers that a background thread fills ahead; True is 1, False or 0 fills when needed. The order is
            the same for 0 and 1; more make each buffer smaller.
        part: (rank, world): draw the rank-th of `world` disjoint parts, which together hold every row once per epoch
            and differ by at most one in length, and change from epoch to epoch. With `drop_last`, all parts have
            equally many batches.
        with_rows: Append the row numbers.
        fingerprint: Names the content of the source, for `load_state_dict`; None uses the source's `identity`.

    Raises:
        DataError: A size below 1, a part that is none or has no row, an unknown type, no row or no window to draw from.
        SiteError: A site that the source does not hold.
    """

    def __init__(
        self,
        source: Source,
        sites: str | Sequence[str],
        dtype: torch.dtype | str | None = None,
        *,
        batch_size: int = 4096,
        seed: int = 0,
        epochs: int | None = 1,
        rows: npt.NDArray[np.int64] | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
        buffer_bytes: int = DEFAULT_BUFFER_BYTES,
        device: torch.device | str | None = None,
        consecutive: int = 1,
        prefetch: bool | int = True,
        part: tuple[int, int] | None = None,
        with_rows: bool = False,
        fingerprint: str | None = None,
    ) -> None:
        self.batch_size, self.buffer_bytes = (
            _at_least(1, batch_size=batch_size),
            _at_least(1, buffer_bytes=buffer_bytes),
        )
        self.epochs = None if epochs is None else _at_least(0, epochs=epochs)
        self.consecutive, self.prefetch = _at_least(1, consecutive=consecutive), _at_least(0, prefetch=prefetch)
        self.seed, self.shuffle, self.drop_last, self.with_rows = _whole("seed", seed), shuffle, drop_last, with_rows
        self.part = _part(part)
        self.source, self.single = source, isinstance(sites, str)
        self.sites = (sites,) if isinstance(sites, str) else tuple(sites)
        _check_sites(source, self.sites)
        self.cast = torch_type(dtype)
        self.device = None if device is None else torch.device(device)
        self.rows = None if rows is None else _row_list(rows, source.rows, shuffle)
        self._fingerprint = fingerprint
        self.n_rows = source.rows if self.rows is None else len(self.rows)
        if not self.n_rows:
            raise DataError("no rows to draw batches from: the cache holds none yet, or rows= selects none")
        if consecutive == 1:
            self._check_units(self.n_rows)
        self._position = self._begin = (0, 0)  # epoch, batch
        self._in_workers = False
        self._outputs = [Outputs() for _ in self.sites]
        self._memory: Memory = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without memory that is kept for the next iteration: a worker process has its own."""
        return {**self.__dict__, "_memory": {}, "_outputs": [Outputs() for _ in self.sites]}

    def _check_units(self, n_units: int) -> None:
        if n_units < self.part[1]:
            raise DataError(f"part= shares {n_units} rows or windows among {self.part[1]}: some part would be empty")

    @cached_property
    def units(self) -> Units:
        """What is drawn: rows or windows."""
        if self.consecutive == 1:
            return Units.single(self.n_rows)
        sequence, position = self.source.field("rows/sequence"), self.source.field("rows/position")
        if self.rows is not None:
            sequence, position = sequence[self.rows], position[self.rows]
        found = Units.windows(self.rows, sequence, position, self.consecutive)
        if not found.n:
            raise DataError(
                f"no {self.consecutive} consecutive positions of one sequence are among the {self.n_rows} rows; "
                "capture more positions, or ask for fewer consecutive ones"
            )
        self._check_units(found.n)
        return found

    def layout(self, workers: int = 1) -> Layout:
        """How blocks and buffers are cut to the budget, shared among worker processes."""
        budget = self.buffer_bytes // workers
        site_bytes = [self.source.specs[site].row_bytes for site in self.sites]
        bookkeeping = 8 + 24 * self.with_rows + 24 * (self.consecutive > 1)
        capacity = (budget - self._scratch_bytes(workers)) // self._slots
        return Layout.fit(self.units, capacity, BLOCK_BYTES, site_bytes, bookkeeping)

    @property
    def _slots(self) -> int:
        return 1 + max(1, self.prefetch)  # the same without prefetching, so that the order is the same

    def _scratch_bytes(self, workers: int) -> int:
        return min(SCRATCH_BYTES, self.buffer_bytes // workers // 16)

    @property
    def n_units(self) -> int:
        """Rows or windows that this part draws per epoch (under `drop_last`, that the smallest part draws)."""
        low, high = part_bounds(self.units.n, self.part)
        return self.units.n // self.part[1] if self.drop_last else high - low

    @property
    def per_epoch(self) -> int:
        """Batches in one epoch."""
        return self.n_units // self.batch_size if self.drop_last else math.ceil(self.n_units / self.batch_size)

    def __len__(self) -> int:
        if self.epochs is None:
            raise TypeError("batches over epochs=None never end and have no length")
        return self.epochs * self.per_epoch

    def __iter__(self) -> Iterator[Batch]:
        begin, self._begin = self._begin, (0, 0)
        if isinstance(self.source, ShardSet):
            self.source.check()
        worker = get_worker_info()
        if worker is None:
            return self._iterate(begin, 0, 1)
        if begin != (0, 0):
            raise DataError("a state can be continued in the main process alone; load it with num_workers=0")
        return self._iterate(begin, worker.id, worker.num_workers)

    def _iterate(self, begin: tuple[int, int], worker: int, workers: int) -> Iterator[Batch]:
        """The batches from `begin` on that belong to one worker."""
        low, high = part_bounds(self.per_epoch, (worker, workers))
        if low == high:
            return
        layout = self.layout(workers)
        seed = self.seed if self.shuffle else None
        memory, self._memory = self._memory, {}  # taken, so that a second iterator has its own
        filler = Filler(
            self.source,
            self.sites,
            self.rows,
            self.units,
            layout,
            seed,
            self._slots,
            memory,
            with_numbers=self.with_rows,
        )
        scratch = torch.from_numpy(np.empty(self._scratch_bytes(workers), np.uint8))
        buffers = filler.buffers(self._tasks(begin, low, high, layout), self.prefetch)
        try:
            held = next(buffers, None)
            for epoch, batch in self._numbers(begin, low, high):
                first, stop = self._units_of(batch)
                made = self._empty(stop - first)
                done = first
                while held is not None and done < stop:
                    if held.epoch != epoch or held.stop <= done:
                        held = next(buffers, None)
                        continue
                    upto = min(stop, held.stop)
                    self._draw(held, done, upto, [out[done - first : upto - first] for out in made], scratch)
                    done = upto
                self._position = (epoch, batch + 1) if batch + 1 < self.per_epoch else (epoch + 1, 0)
                yield self._finish(made)
                del made  # its memory is free for the next, unless the caller kept it
        finally:
            buffers.close()  # type: ignore[attr-defined]
            self._memory = filler.memory

    def _numbers(self, begin: tuple[int, int], low: int, high: int) -> Iterator[tuple[int, int]]:
        """The (epoch, batch) numbers from `begin` on, of batches `low` to `high` of each epoch."""
        epoch, batch = begin[0], max(begin[1], low)
        while self.epochs is None or epoch < self.epochs:
            for number in range(batch, high):
                yield epoch, number
            epoch, batch = epoch + 1, low

    def _units_of(self, batch: int) -> tuple[int, int]:
        return batch * self.batch_size, min((batch + 1) * self.batch_size, self.n_units)

    def _tasks(self, begin: tuple[int, int], low: int, high: int, layout: Layout) -> Iterator[tuple[EpochOrder, int]]:
        """The buffers that those batches are drawn from, in order."""
        seed, (epoch, batch) = self.seed if self.shuffle else None, begin
        first = max(batch, low)
        while self.epochs is None or epoch < self.epochs:
            order = EpochOrder.draw(self.units.n, layout, seed, epoch, self.part)
            last = self._units_of(high - 1)[1] - 1
            for number in range(order.buffer_of(self._units_of(first)[0]), order.buffer_of(last) + 1):
                yield order, number
            epoch, first = epoch + 1, low

    def _empty(self, n: int) -> list[Tensor]:
        """Memory for a batch of `n`: per site [n, width * elements], and the row numbers."""
        pinned = self.device is not None and self.device.type == "cuda"
        made = []
        for site, output in zip(self.sites, self._outputs, strict=True):
            spec = self.source.specs[site]
            kind = TORCH_TYPES[spec.dtype]
            shape = (n, self.consecutive * math.prod(spec.shape))
            if pinned:
                made.append(torch.empty(shape, dtype=kind, pin_memory=True))
            else:
                made.append(output.empty(shape, self.cast or kind))
        if self.with_rows:
            made.append(torch.empty(n, dtype=torch.int64, pin_memory=pinned))
        return made

    def _draw(self, held: Buffer, start: int, stop: int, outs: list[Tensor], scratch: Tensor) -> None:
        """Write the units `start` to `stop` of the epoch, all in this buffer, into the batch."""
        drawn = slice(start - held.start, stop - held.start)
        if held.numbers is not None:
            outs[-1].copy_(held.numbers[drawn])
        for site, words, first, out in zip(self.sites, held.words, held.index, outs, strict=False):
            kind, index = TORCH_TYPES[self.source.specs[site].dtype], self._spread(first[drawn])
            gather_into(words, index, kind, out.view(len(index), -1), scratch)

    def _spread(self, first: Int64[Tensor, " units"]) -> Int64[Tensor, " rows"]:
        """Each window's rows from its first row."""
        if self.consecutive == 1:
            return first
        return (first[:, None] + torch.arange(self.consecutive)).reshape(-1)

    def _finish(self, made: list[Tensor]) -> Batch:
        """Bring a batch to its device, type and shape."""
        pinned = self.device is not None and self.device.type == "cuda"
        moved = made if self.device is None else [part.to(self.device, non_blocking=pinned) for part in made]
        window = () if self.consecutive == 1 else (self.consecutive,)
        found = []
        for site, values in zip(self.sites, moved, strict=False):
            shaped = values.view(len(values), *window, *self.source.specs[site].shape)
            found.append(shaped if self.cast is None else shaped.to(self.cast))
        if self.with_rows:
            numbers = moved[-1]
            found.append(numbers[:, None] + torch.arange(*window, device=numbers.device) if window else numbers)
        return found[0] if self.single and not self.with_rows else tuple(found)

    def loader(self, num_workers: int = 0, pin_memory: bool = False, **settings: Any) -> DataLoader[Batch]:
        """A torch DataLoader over these batches.

        Args:
            num_workers: Processes that read; they share the RAM budget, and each holds `prefetch_factor` (2) batches.
            pin_memory: Whether the loader pins the batches.
            settings: Further arguments of the DataLoader.

        Raises:
            DataError: `device` is set and there are workers: a worker's batches must stay in RAM.
        """
        if num_workers and self.device is not None and self.device.type != "cpu":
            raise DataError(f"batches for {self.device} cannot come from worker processes; move them after loading")
        self._in_workers = num_workers > 0
        chosen = {"batch_size": None, "collate_fn": _unchanged, **settings}
        return DataLoader(self, num_workers=num_workers, pin_memory=pin_memory, **chosen)

    def state_dict(self) -> dict[str, Any]:
        """Where the iterator stands: what `load_state_dict` needs to go on with the next batch, as JSON values.

        It is the place of the iterator that gave the last batch. Batches that a DataLoader's workers read are not
        counted (a worker has its own copy); `loader` with workers makes this an error.

        Raises:
            DataError: The batches are read in a loader's workers.
        """
        if self._in_workers:
            raise DataError("batches read by a DataLoader's workers have no state here; use num_workers=0")
        epoch, batch = self._position
        state = {"version": STATE_VERSION, "epoch": epoch, "batch": batch}
        return {**state, "cache": self.fingerprint, "settings": dict(self._settings)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration begin where `state` was taken; the batches are the same to the last bit.

        Cost: at most one buffer is read that was read before.

        Raises:
            DataError: No state of this class.
            CacheMismatchError: The state is another cache's, or of other settings (which are named).
        """
        epoch, batch = self._checked(state)
        if state["cache"] != self.fingerprint:
            raise CacheMismatchError(
                f"the state is of another cache ({state['cache']}) than this ({self.fingerprint}); open the cache that "
                "it was taken from"
            )
        theirs = state["settings"]
        other = [name for name, value in self._settings.items() if name not in theirs or theirs[name] != value]
        if other:
            told = ", ".join(f"{name} {theirs.get(name)!r} (here {self._settings[name]!r})" for name in other)
            raise CacheMismatchError(f"the state was taken under other settings: {told}; use those to go on from it")
        if self.epochs is not None and epoch > self.epochs:
            raise DataError(f"the state stands in epoch {epoch}, counted from 0; here there are {self.epochs}")
        if batch > 0 and batch >= self.per_epoch:
            raise DataError(f"the state stands at batch {batch} of an epoch that has {self.per_epoch}")
        self._begin = self._position = (epoch, batch)

    def _checked(self, state: Mapping[str, Any]) -> tuple[int, int]:
        wanted = "the state of an iterator is what state_dict() gave"
        if not isinstance(state, Mapping) or not {"version", "epoch", "batch", "cache", "settings"} <= set(state):
            raise DataError(f"{wanted}; this has not its fields")
        if state["version"] != STATE_VERSION or not isinstance(state["settings"], Mapping):
            raise DataError(f"{wanted} in version {STATE_VERSION}; this is version {state['version']!r}")
        numbers = (state["epoch"], state["batch"])
        if any(isinstance(number, bool) or not isinstance(number, int) or number < 0 for number in numbers):
            raise DataError(f"{wanted}; epoch and batch must be whole numbers from 0 on, not {numbers}")
        return numbers

    @cached_property
    def fingerprint(self) -> str:
        """Names the rows that the source holds: SHA-256 over its identity, its number of rows and the sites' forms."""
        identity = self._fingerprint if self._fingerprint is not None else getattr(self.source, "identity", None)
        specs = [(site, self.source.specs[site].dtype, list(self.source.specs[site].shape)) for site in self.sites]
        return _digest(json.dumps([identity, self.source.rows, specs]).encode())

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """All that decides which rows are in which batch, and their type; as JSON values."""
        layout = self.layout()
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "sites": list(self.sites),
            "single": self.single,
            "dtype": None if self.cast is None else str(self.cast).removeprefix("torch."),
            "rows": None if self.rows is None else _digest(np.ascontiguousarray(self.rows, "<i8").tobytes()),
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "consecutive": self.consecutive,
            "part": list(self.part),
            "with_rows": self.with_rows,
            "block_rows": layout.block,
            "buffer_blocks": layout.blocks,
        }


def torch_type(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A torch type from itself or its name.

    Raises:
        DataError: Neither.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not isinstance(found, torch.dtype):
        raise DataError(f"dtype must be a torch type or the name of one; got {dtype!r}")
    return found


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise DataError(f"{name} must be a whole number; got {value!r}") from None


def _at_least(least: int, **setting: Any) -> int:
    ((name, value),) = setting.items()
    number = _whole(name, value)
    if number < least:
        raise DataError(f"{name} must be at least {least}; got {number}")
    return number


def _row_list(rows: Any, total: int, ascending: bool) -> IntArray:
    """Row numbers as an array, checked, and in ascending order where the order does not matter."""
    found = np.asarray(rows)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise DataError(f"rows must be a list of row numbers; got {found.dtype} {found.shape}")
    if found.size and (found.min() < 0 or found.max() >= total):
        raise DataError(f"rows must be numbers from 0 to {total - 1}; got {found.min()} to {found.max()}")
    numbers: IntArray = found.astype(np.int64)
    return np.sort(numbers) if ascending else numbers


def _part(part: tuple[int, int] | None) -> tuple[int, int]:
    if part is None:
        return 0, 1
    try:
        rank, world = (operator.index(number) for number in part)
    except (TypeError, ValueError):
        raise DataError(f"part must be (rank, world), two whole numbers; got {part!r}") from None
    if not 0 <= rank < world:
        raise DataError(f"part must be (rank, world) with 0 <= rank < world; got {part!r}")
    return rank, world


def _check_sites(source: Source, sites: tuple[str, ...]) -> None:
    if not sites:
        raise DataError("batches need at least one site; got none")
    missing = [site for site in sites if site not in source.specs]
    if missing:
        raise SiteError(f"no site {missing[0]!r}; there are {', '.join(source.specs)}")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _unchanged(batch: Batch) -> Batch:
    return batch
