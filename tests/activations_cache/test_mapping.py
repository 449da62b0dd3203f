"""Shards mapped as one tensor: every row at its place, whatever the offsets; and what cannot be mapped is not."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from activations_cache._mapping import RowMap, _places, bring, in_cache, touch
from activations_cache.cache import Cache
from activations_cache.errors import CorruptCacheError, DataError
from tests.activations_cache.caches import RESID, small, token_rows

SITE = "blocks.1.hook_resid_post"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="maps are made on Linux alone")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return small(tmp_path_factory.mktemp("cache") / "acts", token_rows(60), shard_rows=30)


def mapped(cache: Cache) -> RowMap:
    found = RowMap.of(cache._source, SITE)
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_row_of_every_shard_is_in_the_one_tensor(dtype: str, tmp_path: Path):
    cache = small(tmp_path / "acts", token_rows(60), RESID, shard_rows=30, dtype=dtype)
    found, rows = mapped(cache), np.arange(len(cache))
    assert len(cache.manifest["shards"]) > 5
    at = found.rows_at(rows, np.array([0]), np.array([len(cache)]))
    values = found.words[torch.from_numpy(at)].view(cache[SITE].dtype)
    assert torch.equal(values, cache[SITE][:])


def test_runs_are_cut_where_shards_end(cache: Cache):
    found = mapped(cache)
    total = len(cache)
    everything = found.pages(np.array([0]), np.array([total]))
    assert len(everything) == len(cache.manifest["shards"])  # one piece per shard, none of what lies between
    assert bring(everything, lambda: False)
    assert in_cache(cache._source, SITE, np.array([0, total // 2, total - 1]))
    found.release()
    touch(cache._source, SITE, np.array([0]), np.array([total]), lambda: False)


def test_the_tensor_may_outlive_everything_else(tmp_path: Path):
    cache = small(tmp_path / "acts", token_rows(9))
    words = mapped(cache).words
    expected = cache[SITE][:3].clone()
    del cache
    gc.collect()
    assert torch.equal(words[:3].view(torch.float32), expected)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 300)), min_size=1, max_size=8),
    st.integers(1, 700),
)
def test_places_are_whole_rows_apart_or_there_are_none(shards: list[tuple[int, int]], elements: int):
    row_bytes, page = 2 * elements, 4096
    offsets, sizes = [8 * place for place, _ in shards], [rows * row_bytes for _, rows in shards]
    found = _places(offsets, sizes, row_bytes)
    if found is None:  # then no page shift brings the offsets together
        step = np.gcd(page, row_bytes)
        assert len({offset % page % step for offset in offsets}) > 1
        return
    at = [place + offset % page for place, offset in zip(found, offsets, strict=True)]
    assert all((begin - at[0]) % row_bytes == 0 for begin in at)
    assert all(place % page == 0 for place in found)
    ends = [begin + size for begin, size in zip(at, sizes, strict=True)]
    assert all(begin >= end for begin, end in zip(found[1:], ends[:-1], strict=True))


def test_compressed_caches_and_parts_are_not_mapped(cache: Cache, tmp_path: Path):
    compressed = small(tmp_path / "acts", token_rows(9), compression="lzf")
    assert RowMap.of(compressed._source, SITE) is None
    assert RowMap.of(cache.select(sequences=[1, 2])._source, SITE) is None


def test_maps_are_given_back(cache: Cache):
    def held() -> int:
        return sum(str(cache.path) in line for line in Path("/proc/self/maps").read_text().splitlines())

    before = held()
    batches = iter(cache.batches(SITE, 16))
    next(batches)
    assert held() > before
    del batches
    gc.collect()
    assert held() == before


def test_a_shard_that_was_exchanged_is_noticed(tmp_path: Path):
    cache = small(tmp_path / "acts", token_rows(60), shard_rows=30)
    batches = cache.batches(SITE, 16)
    assert sum(len(batch) for batch in batches) == len(cache)
    shutil.copy(cache.path / "shard-00002.h5", cache.path / "shard-00003.h5")
    with pytest.raises(CorruptCacheError, match="shard-00003"):
        list(batches)
    with pytest.raises(CorruptCacheError, match="shard-00003"):
        cache[SITE][:]


def test_a_forked_child_is_told_to_iterate_anew(cache: Cache):
    view = cache.select(sequences=slice(0, 50))  # which is read by a thread
    batches = iter(view.batches(SITE, 4, buffer_bytes=4096))
    next(batches)
    child = os.fork()
    if child == 0:
        try:
            for _ in batches:
                pass
        except DataError as error:
            os._exit(7 if "forked" in str(error) else 1)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_an_iterator_that_is_left_at_exit_says_nothing(cache: Cache):
    script = (
        "import sys, activations_cache as ac\n"
        f"cache = ac.open({str(cache.path)!r}).select(sequences=slice(0, 50))\n"
        f"it = iter(cache.batches({SITE!r}, 4, buffer_bytes=4096)); next(it)\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")
