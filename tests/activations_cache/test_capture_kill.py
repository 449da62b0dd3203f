"""A capture killed by SIGKILL, at every step of a commit and in between, then opened and resumed."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import activations_cache as ac
from activations_cache import _index, conformance, store
from tests.activations_cache.caches import contents, die, in_child, labelled_rows, llama, small

STEPS_PER_SHARD = 7  # shard: fsync, rename, fsync directory; manifest: rename, fsync directory; and what lies between
SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Forked children cannot use OpenMP's threads, and equal bytes need an equal number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A capture that nobody interrupted."""
    out = tmp_path_factory.mktemp("whole") / "acts"
    small(out)
    return out


def kill_at_step(out: Path, step: int) -> int:
    """Capture in a child that dies at its `step`-th fsync or rename (or runs to the end); its exit status."""

    def work() -> None:
        seen = 0

        def counted(real: Any) -> Any:
            def call(*args: Any) -> Any:
                nonlocal seen
                seen += 1
                if seen == step:
                    die()
                return real(*args)

            return call

        store.fsync = _index.fsync = counted(store.fsync)
        Path.replace = counted(Path.replace)  # type: ignore[method-assign]
        small(out)

    return in_child(work)


def check_prefix(out: Path, whole: Path) -> None:
    """What is committed is a conforming cache and equals the beginning of the uninterrupted one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache = ac.open(out)
    assert conformance.failures(out) == []
    assert cache.verify() == []
    assert torch.equal(cache[SITE][:], ac.open(whole)[SITE][: len(cache)])


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 6, 7, 8, 12, 23])
def test_killed_at_a_step_of_the_commit_and_resumed_equals_uninterrupted(step: int, whole: Path, tmp_path: Path):
    out = tmp_path / "acts"
    assert kill_at_step(out, step) == -signal.SIGKILL
    if (out / "manifest.json").exists():
        check_prefix(out, whole)
    cache = small(out)
    assert cache.finished
    assert contents(out) == contents(whole)
    assert cache.manifest["statistics"] == ac.open(whole).manifest["statistics"]
    assert not list(out.glob("*.partial")) + list(out.glob(".*.partial"))


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.integers(1, 4 * STEPS_PER_SHARD), min_size=2, max_size=3))
def test_killed_again_and_again(steps: list[int], whole: Path, tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("killed") / "acts"
    for step in steps:
        status = kill_at_step(out, step)
        assert status in (0, -signal.SIGKILL)
        if (out / "manifest.json").exists():
            check_prefix(out, whole)
    small(out)
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("delay", [0.02, 0.05])
def test_killed_at_any_time_during_the_forwards(delay: float, tmp_path: Path):
    data = labelled_rows(80)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        small(tmp_path / "killed", data)
        os._exit(0)
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("killed/shard-*")) and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (0, -signal.SIGKILL)
    resumed, straight = small(tmp_path / "killed", data), small(tmp_path / "straight", data)
    assert len(resumed.manifest["shards"]) > 5
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")
    assert resumed.manifest["statistics"] == straight.manifest["statistics"]


def test_an_unfinished_cache_says_so_and_reads_what_is_committed(whole: Path, tmp_path: Path):
    out = tmp_path / "acts"
    assert kill_at_step(out, 2 * STEPS_PER_SHARD) == -signal.SIGKILL
    with pytest.warns(UserWarning, match=r"unfinished: \d+ of \d+ rows"):
        cache = ac.open(out)
    reference = ac.open(whole)
    assert not cache.finished
    assert 0 < len(cache) < len(reference)
    assert "unfinished" in cache.info()
    assert "unfinished" in cache._repr_html_()
    assert list(cache.labels("n")) == list(reference.labels("n")[: len(cache)])
    expected = reference[SITE][: len(cache)].double()
    torch.testing.assert_close(cache.stats[SITE].mean, expected.mean(0))
    torch.testing.assert_close(cache.stats[SITE].var, expected.var(0, unbiased=False))
    assert sum(len(batch) for batch in cache.batches(SITE, 5)) == len(cache)


def test_the_lock_dies_with_its_process(tmp_path: Path):
    out = tmp_path / "acts"
    assert kill_at_step(out, 4) == -signal.SIGKILL
    with store.writer_lock(out):
        with pytest.raises(ac.errors.CacheLockedError, match=f"pid {os.getpid()}"):
            small(out)
        refused = in_child(lambda: ac.capture(llama(), labelled_rows(), SITE, out, batch_tokens=24, progress=False))
        assert refused == 1
    assert small(out).finished
