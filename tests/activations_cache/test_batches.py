"""Shuffled reading: every row once, in an order that can be found again; windows, parts, threads, workers, budgets."""

from __future__ import annotations

import gc
import itertools
import json
import threading
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from activations_cache import store
from activations_cache._batches import Batches
from activations_cache._gather import Outputs, gather_into
from activations_cache._shards import ShardSet
from activations_cache.errors import CacheMismatchError, CorruptCacheError, DataError, SiteError

FORMS: dict[str, Any] = {"a": ("float16", (4,)), "b": ("int32", (3,)), "c": ("bfloat16", (2, 3)), "d": ("int16", ())}


class Rows:
    """A source in RAM. Row i of every site holds i (mod 2048, or 256 in bfloat16) plus the place of the element."""

    def __init__(self, lengths: list[int], skip: int = 0, sites: str = "abcd", width: int | None = None) -> None:
        self.lengths = lengths
        self.sequence = np.repeat(np.arange(len(lengths)), lengths)
        self.position = np.concatenate([np.arange(n) * (1 + (i % 2) * skip) for i, n in enumerate(lengths)])
        self.rows, self.identity = len(self.sequence), "rows"
        forms = {name: (kind, (width,) if width else shape) for name, (kind, shape) in FORMS.items()}
        self.specs = {name: store.SiteSpec(name, *forms[name]) for name in sites}
        self.raw = {name: self._raw(spec) for name, spec in self.specs.items()}
        self.reads: Counter[int] = Counter()
        self.harm: Any = None

    def _raw(self, spec: store.SiteSpec) -> np.ndarray:
        n = int(np.prod(spec.shape, dtype=int))
        values = np.arange(self.rows)[:, None] % (256 - n if spec.dtype == "bfloat16" else 2048 - n) + np.arange(n)
        tensor = torch.from_numpy(values).to(store.TORCH_TYPES[spec.dtype]).reshape(self.rows, *spec.shape)
        return tensor.view(torch.int16).numpy().view("<u2") if spec.dtype == "bfloat16" else tensor.numpy()

    def tensor(self, site: str) -> torch.Tensor:
        """All rows of a site."""
        raw = self.raw[site]
        if self.specs[site].dtype == "bfloat16":
            return torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(raw)

    def read_into(self, site: str, start: int, out: np.ndarray) -> None:
        """As a source does."""
        if self.harm is not None:
            self.harm()
        self.reads.update(range(start, start + len(out)))
        out[...] = self.raw[site][start : start + len(out)]

    def gather(self, site: str, rows: np.ndarray) -> np.ndarray:
        """As a source does."""
        self.reads.update(rows.tolist())
        return self.raw[site][rows]

    def field(self, name: str) -> np.ndarray:
        """As a source does."""
        return {"rows/sequence": self.sequence, "rows/position": self.position}[name]


def numbers(batches: Batches) -> list[list[int]]:
    """The row numbers of each batch (of the first row, for windows)."""
    return [batch[-1].reshape(len(batch[-1]), -1)[:, 0].tolist() for batch in batches]


def flat(lists: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


def make(source: Any, sites: Any = "a", **chosen: Any) -> Batches:
    return Batches(source, sites, **{"batch_size": 16, "buffer_bytes": 4000, "with_rows": True, **chosen})


def brute_windows(source: Rows, rows: list[int], n: int) -> list[int]:
    """First row of every window, by trying each."""
    found = []
    for at in range(len(rows) - n + 1):
        part = rows[at : at + n]
        steps = itertools.pairwise(part)
        if all(
            after == before + 1
            and source.sequence[after] == source.sequence[before]
            and source.position[after] == source.position[before] + 1
            for before, after in steps
        ):
            found.append(part[0])
    return found


# --- what comes -----------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    batch_size=st.integers(1, 50),
    buffer_bytes=st.sampled_from([1, 300, 2000, 20_000, 2**20]),
    consecutive=st.integers(1, 5),
    world=st.integers(1, 4),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
    prefetch=st.integers(0, 2),
    seed=st.integers(-5, 2**70),
    data=st.data(),
)
def test_the_parts_of_an_epoch_hold_every_row_or_window_once(
    lengths: list[int],
    batch_size: int,
    buffer_bytes: int,
    consecutive: int,
    world: int,
    drop_last: bool,
    shuffle: bool,
    prefetch: int,
    seed: int,
    data: st.DataObject,
):
    source = Rows(lengths, skip=1)
    rows = data.draw(
        st.none()
        | st.lists(st.integers(0, source.rows - 1), min_size=1, unique=True)
        | st.integers(0, source.rows - 1).map(lambda first: list(range(first, source.rows)))
    )
    listed = list(range(source.rows)) if rows is None else sorted(rows) if shuffle else rows
    expected = brute_windows(source, listed, consecutive)
    chosen: dict[str, Any] = {"batch_size": batch_size, "buffer_bytes": buffer_bytes, "consecutive": consecutive}
    chosen |= {"drop_last": drop_last, "shuffle": shuffle, "prefetch": prefetch, "seed": seed}
    chosen["rows"] = None if rows is None else np.array(rows)
    if len(expected) < world:
        with pytest.raises(DataError, match=r"consecutive positions|would be empty"):
            len(make(source, part=(0, world), **chosen))
        return
    parts = [make(source, part=(rank, world), **chosen) for rank in range(world)]
    drawn = [numbers(part) for part in parts]
    for part, found in zip(parts, drawn, strict=True):
        assert len(found) == len(part)
        assert all(len(batch) == batch_size for batch in found[: None if drop_last else -1])
        assert numbers(part) == found
    every = [row for found in drawn for row in flat(found)]
    assert not Counter(every) - Counter(expected)
    if drop_last:
        assert {len(found) for found in drawn} == {len(expected) // world // batch_size}
    else:
        assert sorted(every) == sorted(expected)
        sizes = [sum(map(len, found)) for found in drawn]
        assert max(sizes) - min(sizes) <= 1
        if not shuffle:
            assert every == expected


@settings(max_examples=60, deadline=None)
@given(
    consecutive=st.integers(1, 4),
    sites=st.lists(st.sampled_from("abcd"), min_size=1, max_size=5),
    dtype=st.sampled_from([None, "float32", torch.float64, torch.bfloat16, "int32"]),
    buffer_bytes=st.sampled_from([1, 900, 2**20]),
    subset=st.booleans(),
)
def test_values_are_those_of_the_row_numbers(
    consecutive: int, sites: list[str], dtype: Any, buffer_bytes: int, subset: bool
):
    source = Rows([9, 1, 30, 5, 17])
    rows = np.array([2, 3, 4, 8, 11, *range(20, 50)]) if subset else None
    chosen = {"dtype": dtype, "consecutive": consecutive, "rows": rows, "buffer_bytes": buffer_bytes}
    for batch in make(source, sites, **chosen):
        *values, index = batch
        assert len(values) == len(sites)
        assert index.shape == ((len(index), consecutive) if consecutive > 1 else (len(index),))
        for site, found in zip(sites, values, strict=True):
            expected = source.tensor(site)[index]
            assert found.shape == (*index.shape, *source.specs[site].shape)
            wanted = (
                expected if dtype is None else expected.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
            )
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted)


def test_one_site_gives_tensors_and_a_sequence_gives_tuples():
    source = Rows([40])
    (single,) = Batches(source, "a", batch_size=40)
    assert isinstance(single, torch.Tensor) and single.dtype == torch.float16
    (listed,) = Batches(source, ["a"], batch_size=40)
    assert isinstance(listed, tuple) and torch.equal(listed[0], single)
    (numbered,) = Batches(source, "a", batch_size=40, with_rows=True)
    assert torch.equal(numbered[0], single) and numbered[1].dtype == torch.int64
    (windows,) = Batches(source, ["c", "d"], batch_size=40, consecutive=3)
    assert [tuple(part.shape) for part in windows] == [(38, 3, 2, 3), (38, 3)]


def test_the_order_is_fixed_by_seed_and_epoch_whatever_the_threads():
    source = Rows([50] * 8)
    first, second = numbers(make(source, epochs=2))[:25], numbers(make(source, epochs=2))[25:]
    assert first == numbers(make(source)) == numbers(make(source, prefetch=False)) == numbers(make(source, prefetch=0))
    assert first != second and sorted(flat(first)) == sorted(flat(second)) == list(range(400))
    assert first != numbers(make(source, seed=1))
    endless = iter(make(source, epochs=None))
    assert [next(endless)[-1].tolist() for _ in range(50)] == first + second
    assert numbers(make(source, epochs=0)) == []
    with pytest.raises(TypeError, match="never end"):
        len(make(source, epochs=None))


def test_rows_that_are_listed_twice_come_twice_and_keep_their_order_unshuffled():
    source = Rows([30])
    rows = np.array([7, 3, 3, 29, 8])
    assert numbers(make(source, rows=rows, shuffle=False)) == [rows.tolist()]
    assert sorted(numbers(make(source, rows=rows))[0]) == sorted(rows.tolist())


def test_shuffling_is_near_a_permutation_when_the_buffer_holds_all():
    """Mean distance between neighbours of a permutation of n is (n + 1) / 3; its standard error here is below 2 %."""
    source = Rows([1000])
    order = np.array(flat(numbers(make(source, buffer_bytes=2**20))))
    assert np.abs(np.diff(order)).mean() == pytest.approx(1001 / 3, rel=0.1)


def test_a_small_buffer_still_mixes_many_places():
    source = Rows([100] * 100)
    batch = numbers(make(source, batch_size=100, buffer_bytes=2 * 16 * 2000))[0]
    assert len({row // 100 for row in batch}) > 40  # a permutation of all rows would hit 63


# --- continuing -----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    batch_size=st.integers(1, 60),
    buffer_bytes=st.sampled_from([1, 1500, 6000, 2**20]),
    consecutive=st.integers(1, 3),
    rank=st.integers(0, 1),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
    prefetch=st.integers(0, 1),
)
def test_a_restored_iterator_goes_on_as_if_nothing_had_happened(
    batch_size: int, buffer_bytes: int, consecutive: int, rank: int, drop_last: bool, shuffle: bool, prefetch: int
):
    source = Rows([30, 60, 9, 80], sites="ac")

    def fresh() -> Batches:
        chosen = {"buffer_bytes": buffer_bytes, "consecutive": consecutive, "drop_last": drop_last, "shuffle": shuffle}
        return make(source, list("ac"), batch_size=batch_size, epochs=2, part=(rank, 2), prefetch=prefetch, **chosen)

    batches = fresh()
    whole, states = [], [batches.state_dict()]
    for batch in batches:
        whole.append(batch)
        states.append(batches.state_dict())
    assert len(states) == len(batches) + 1
    step = max(1, len(states) // 7)  # the last two, and some of the others
    for done in sorted({*range(0, len(states), step), len(states) - 2, len(states) - 1} - {-1}):
        again = fresh()
        again.load_state_dict(json.loads(json.dumps(states[done])))
        assert again.state_dict() == states[done]
        rest = list(again)
        assert len(rest) == len(whole) - done
        for one, other in zip(rest, whole[done:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert again.state_dict() == states[-1]
        assert len(list(again)) == len(whole)  # and then from the start


def test_going_on_reads_one_buffer_again_at_most():
    source = Rows([100] * 20)
    batches = make(source, buffer_bytes=24_000, prefetch=0)
    layout = batches.layout()
    capacity = layout.block * layout.blocks
    for number, _ in enumerate(batches):
        if number == 100:  # of 125
            state = batches.state_dict()
    again = make(source, buffer_bytes=24_000, prefetch=0)
    source.reads.clear()
    again.load_state_dict(state)
    rest = sum(len(batch[0]) for batch in again)
    assert rest == 2000 - 101 * 16
    assert rest <= source.reads.total() <= rest + capacity
    assert capacity < 1000


def test_a_state_of_other_settings_or_another_cache_is_refused():
    source = Rows([100])
    state = make(source).state_dict()
    changes: list[dict[str, Any]] = [{"seed": 1}, {"batch_size": 8}, {"shuffle": False}, {"drop_last": True}]
    changes += [{"consecutive": 2}, {"part": (0, 2)}, {"dtype": "float32"}, {"rows": np.arange(100)}]
    changes += [{"with_rows": False}, {"sites": ["a"]}, {"buffer_bytes": 400}]
    for change in changes:
        name = {"buffer_bytes": "block_rows|buffer_blocks", "sites": "single"}.get(*change, next(iter(change)))
        with pytest.raises(CacheMismatchError, match=name):
            make(source, **change).load_state_dict(state)
    for other in (Rows([99]), Rows([100], width=2)):
        with pytest.raises(CacheMismatchError, match="another cache"):
            make(other).load_state_dict(state)
    with pytest.raises(CacheMismatchError, match="another cache"):
        make(source, fingerprint="x").load_state_dict(state)
    make(source, prefetch=0, epochs=7).load_state_dict(state)  # neither changes what is in a batch


@pytest.mark.parametrize(
    "harm",
    [
        lambda state: None,
        lambda state: {},
        lambda state: {**state, "version": 2},
        lambda state: {**state, "epoch": -1},
        lambda state: {**state, "batch": 1.0},
        lambda state: {**state, "batch": True},
        lambda state: {**state, "batch": 7},
        lambda state: {**state, "settings": None},
        lambda state: {name: value for name, value in state.items() if name != "cache"},
    ],
)
def test_what_is_no_state_is_refused(harm: Any):
    source = Rows([100])
    with pytest.raises(DataError):
        make(source).load_state_dict(harm(make(source).state_dict()))


# --- threads and memory ---------------------------------------------------------------------------------------------


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "activations-cache" in thread.name]


def test_no_thread_is_left_when_the_iterator_is_dropped_or_done():
    source = Rows([500])
    iterator = iter(make(source))
    next(iterator)
    assert reading_threads()
    del iterator
    gc.collect()
    assert not reading_threads()
    assert len(numbers(make(source))) == 32
    assert not reading_threads()


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_an_error_while_reading_reaches_the_consumer(prefetch: int):
    source, count = Rows([500]), iter(range(10**6))

    def harm() -> None:
        if next(count) > 300:
            raise CorruptCacheError("the shard is gone")

    source.harm = harm
    seen = []
    with pytest.raises(CorruptCacheError, match="the shard is gone"):
        seen.extend(make(source, prefetch=prefetch))
    assert 0 < len(seen) < 32
    assert not reading_threads()


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize(
    ("chosen", "lengths"),
    [
        ({"width": 64}, [200] * 200),
        ({"width": 1}, [2000] * 200),
        ({"width": 16, "consecutive": 4}, [100] * 1000),
        ({"width": 2, "consecutive": 2}, [3] * 100_000),
        ({"width": 64, "dtype": "float64"}, [200] * 200),
    ],
)
def test_the_budget_holds(prefetch: int, chosen: dict[str, Any], lengths: list[int]):
    """Every array of the reader is numpy's, which tracemalloc counts."""
    source = Rows(lengths, sites="a", width=chosen["width"])
    given_ = {name: value for name, value in chosen.items() if name != "width"}
    budget = 2**20
    batches = make(source, batch_size=64, buffer_bytes=budget, prefetch=prefetch, **given_)
    layout = batches.layout()
    blocks = 16 * -(-batches.units.n // layout.block)
    source.read_into("a", 0, np.empty((1, chosen["width"]), np.float16))
    source.reads = type("None", (), {"update": lambda *_: None})()  # type: ignore[assignment]
    one_batch = 64 * chosen.get("consecutive", 1) * (chosen["width"] * 8 + 8)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in batches:
            pass
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak <= budget + 3 * one_batch + 5 * blocks + 200_000
    assert peak >= 0.3 * budget  # and is used


def test_a_batch_that_is_kept_is_never_written_again():
    source = Rows([400], sites="a")
    batches = make(source, dtype="float32", epochs=3)
    views = [batch[0][:, 1:3].T for batch in batches]  # a view alone holds the memory
    copies = [batch[0][:, 1:3].T.clone() for batch in batches]
    assert all(torch.equal(view, copy) for view, copy in zip(views, copies, strict=True))


def test_memory_that_nobody_holds_is_used_again():
    outputs = Outputs(keep=1)
    tensor = outputs.empty((4, 2), torch.float32)
    address = tensor.data_ptr()
    view = tensor[1:].numpy()
    del tensor
    assert outputs.empty((4, 2), torch.float32).data_ptr() != address
    del view
    assert outputs.empty((2, 2), torch.float32).data_ptr() == address


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.int16, torch.int32])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("scratch", [0, 5, 64, 4096])
def test_gathering_through_scratch_moves_and_converts_each_value(kind: torch.dtype, width: int, scratch: int):
    from activations_cache._gather import as_words

    values = (torch.randn(20, width) * 50).to(kind)
    index = torch.randint(0, 20, (33,))
    for wanted in (kind, torch.float32, torch.float64):
        out = torch.empty(33, width, dtype=wanted)
        gather_into(as_words(values), index, kind, out, torch.empty(scratch, dtype=torch.uint8))
        assert torch.equal(out, values[index].to(wanted))


# --- loaders --------------------------------------------------------------------------------------------------------


def test_a_loader_without_workers_gives_the_same_batches():
    source = Rows([30] * 10)
    plain, loaded = list(make(source, ["a", "b"])), list(make(source, ["a", "b"]).loader())
    assert len(plain) == len(loaded) == len(make(source).loader())
    for one, other in zip(plain, loaded, strict=True):
        assert isinstance(other, tuple)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_two_workers_share_an_epoch_without_duplicates():
    source = Rows([30] * 10)
    for batches in (
        make(source, ["a", "b"]),
        make(source, ["a", "b"], consecutive=2, drop_last=True),
        make(source, rows=np.arange(9)),
    ):
        found = list(batches.loader(num_workers=2))
        assert len(found) == len(batches)
        index = torch.cat([batch[-1] for batch in found])
        expected = batches.units.n // 16 * 16 if batches.drop_last else batches.units.n
        assert len({tuple(np.atleast_1d(row)) for row in index.numpy()}) == len(index) == expected
        assert torch.equal(torch.cat([batch[0] for batch in found]), source.tensor("a")[index])
    with pytest.raises(DataError, match="num_workers=0"):
        batches.state_dict()


def test_a_plain_dataloader_works_and_a_state_is_refused_in_its_workers():
    source = Rows([30] * 10)
    loaded = list(DataLoader(make(source), batch_size=None, num_workers=1))
    assert sorted(torch.cat([batch[-1] for batch in loaded]).tolist()) == list(range(300))
    batches = make(source)
    next(iter(batches))
    state = batches.state_dict()
    again = make(source)
    again.load_state_dict(state)
    with pytest.raises(DataError, match="num_workers=0"):
        list(DataLoader(again, batch_size=None, num_workers=1))
    with pytest.raises(DataError, match="worker processes"):
        make(source, device="meta").loader(num_workers=1)


# --- shards on disk -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Five shards of 20 sequences of 7 tokens; row i is i in every element."""
    folder, spec = tmp_path_factory.mktemp("shards"), store.SiteSpec("s", "float16", (3,))
    entries = []
    for number in range(5):
        values = np.repeat(np.arange(140 * number, 140 * (number + 1)), 3).reshape(140, 3).astype("<f2")
        lengths, position = np.full(20, 7), np.tile(np.arange(7, dtype="<i4"), 20)
        places = (20 * number, 140 * number, np.ones(140, np.int32), lengths, lengths)
        buffer = store.ShardBuffer(*places, {}, {"s": np.empty_like(values)}, {"position": position})
        buffer.put("s", range(20 * number, 20 * (number + 1)), values)
        entries.append(store.write_shard(folder, f"shard-{number:05d}.h5", buffer, [spec], "id"))
    return ShardSet(folder, entries, {"s": spec}, "id")


@pytest.mark.parametrize("rows", [None, np.arange(130, 150), np.arange(0, 700, 3)])
@pytest.mark.parametrize("consecutive", [1, 2])
def test_rows_are_read_across_shards(shards: ShardSet, rows: Any, consecutive: int):
    if consecutive == 2 and rows is not None and len(rows) > 20:
        with pytest.raises(DataError, match="consecutive"):
            len(make(shards, "s", rows=rows, consecutive=2))
        return
    found = list(make(shards, "s", rows=rows, consecutive=consecutive, buffer_bytes=900, shuffle=False))
    values, index = (torch.cat([batch[part] for batch in found]) for part in (0, 1))
    assert torch.equal(values[..., 0].long(), index)
    listed = np.arange(700) if rows is None else rows
    expected = listed if consecutive == 1 else [row for row in listed if row % 7 < 6 and row + 1 in listed]
    assert index.reshape(len(index), -1)[:, 0].tolist() == list(expected)


def test_a_shard_that_vanishes_is_an_error_that_names_it(shards: ShardSet, tmp_path: Path):
    moved = shards.directory / "shard-00003.h5"
    batches = make(shards, "s")
    assert sum(len(batch[0]) for batch in batches) == 700
    kept = moved.rename(tmp_path / "kept")
    try:
        with pytest.raises(CorruptCacheError, match="shard-00003"):
            list(batches)
    finally:
        kept.rename(moved)
    with moved.open("r+b") as file:
        content = file.read()
        file.truncate(shards[3].offsets["s"] + 300)  # of 840 bytes
    try:
        with pytest.raises(CorruptCacheError, match="shard-00003"):
            list(batches)
    finally:
        moved.write_bytes(content)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        {"batch_size": 0},
        {"batch_size": 1.5},
        {"buffer_bytes": 0},
        {"epochs": -1},
        {"consecutive": 0},
        {"prefetch": -1},
        {"part": (2, 2)},
        {"part": (-1, 2)},
        {"part": 3},
        {"part": (0, 101)},
        {"seed": "x"},
        {"dtype": "float3"},
        {"rows": np.zeros(0, np.int64)},
        {"rows": np.array([100])},
        {"rows": np.array([-1])},
        {"rows": np.array([0.5])},
        {"sites": []},
    ],
)
def test_bad_settings_are_refused(bad: dict[str, Any]):
    with pytest.raises(DataError):
        make(Rows([100]), **bad)


def test_an_unknown_site_and_windows_that_do_not_exist_are_refused():
    with pytest.raises(SiteError, match="'z'"):
        make(Rows([100]), ["a", "z"])
    with pytest.raises(DataError, match="no 8 consecutive positions"):
        list(make(Rows([7, 7]), consecutive=8))
