"""A cache under a hostile machine: killed, interrupted, starved of disk, moved and damaged in any order, then resumed.

After every step the directory holds a conforming cache that is exactly a beginning of the one that nobody interrupted.
Kills are real: SIGKILL to a child that is forked from this process, at a random moment, at a random system call of a
commit, or after a random byte of a write. They are counted, and the test fails if there were too few.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache as memo
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

import activations_cache as ac
from activations_cache import conformance, store
from activations_cache.errors import CacheError, CacheLockedError
from tests.activations_cache.caches import contents, die, labelled_rows, llama, small

SITE = "blocks.1.hook_resid_post"
KILLED, CUT_OFF = -signal.SIGKILL, -signal.SIGXFSZ
ENDED: Counter[int] = Counter()  # how often a child ended with each status
FULL_DISK, INTERRUPTED = 28, 130


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Forked children cannot use OpenMP's threads, and equal bytes need an equal number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def capture(out: Path) -> ac.Cache:
    return small(out, labelled_rows(16), shard_rows=20)


@memo
def reference() -> tuple[Path, dict[str, bytes], TemporaryDirectory[str]]:
    """The cache that nobody interrupted, and its bytes."""
    folder = TemporaryDirectory()
    out = Path(folder.name) / "acts"
    capture(out)
    return out, contents(out), folder


def child(out: Path, before: Callable[[], Any], delay: float | None = None, sent: int = signal.SIGKILL) -> int:
    """Capture in a forked child after `before`; after `delay` seconds it is sent a signal. Its exit status."""
    started, ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.dup2(os.open(out.parent / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            before()
            os.write(ready, b"x")
            capture(out)
            status = 0
        except KeyboardInterrupt as error:
            lift_the_limit()
            (out.parent / "notes").write_text("\n".join(getattr(error, "__notes__", [])))
            status = INTERRUPTED
        except CacheError as error:
            lift_the_limit()
            (out.parent / "notes").write_text(str(error))
            status = FULL_DISK
        finally:
            os._exit(status)
    os.read(started, 1)
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, sent)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(started)
    os.close(ready)
    ENDED[status] += 1
    return status


def die_at_call(number: int, tear: float | None) -> None:
    """Make this process kill itself at its `number`-th fsync or rename; `tear` first cuts the file that it syncs."""
    seen = 0

    def counted(real: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == number:
                if tear is not None and isinstance(arguments[0], int):
                    tear_open_file(arguments[0], tear)
                die()
            return real(*arguments, **named)

        return call

    os.fsync, os.replace = counted(os.fsync), counted(os.replace)


def tear_open_file(handle: int, part: float) -> None:
    """Leave a part of a file alone, as if the machine had stopped in the middle of its write."""
    path = Path(f"/proc/self/fd/{handle}").resolve()
    if path.is_file():
        os.truncate(path, int(part * path.stat().st_size))


def stop_at_byte(limit: int, by_signal: bool) -> None:
    """Let no file grow beyond `limit` bytes: the kernel kills the process at that byte, or says that it is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if by_signal else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def lift_the_limit() -> None:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


class Hostile(RuleBasedStateMachine):
    """One directory, and everything that can happen to it.

    Where a kill at a random moment leaves the directory is not for hypothesis to know: what is enabled and what is
    drawn must not hang on it, so a rule that does not apply does nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.out = Path(self.folder.name) / "acts"
        self.held = 0  # shards that were committed before; no event may lose one

    def teardown(self) -> None:
        self.resume()
        self.folder.cleanup()

    @initialize()
    def begin(self) -> None:
        self.sound, self.bytes, _ = reference()
        self.cache = ac.open(self.sound)

    def finished(self) -> bool:
        path = self.out / "manifest.json"
        return path.exists() and bool(json.loads(path.read_text())["finished"])

    @rule(call=st.integers(1, 40), tear=st.none() | st.floats(0, 1))
    def kill_at_a_system_call(self, call: int, tear: float | None) -> None:
        assert child(self.out, lambda: die_at_call(call, tear)) in (0, KILLED)

    @rule(delays=st.lists(st.floats(0, 0.12), min_size=1, max_size=4))
    def kill_at_a_moment(self, delays: list[float]) -> None:
        for delay in delays:
            assert child(self.out, lambda: None, delay) in (0, KILLED)

    @rule(calls=st.lists(st.integers(1, 12), min_size=2, max_size=5))
    def kill_again_and_again(self, calls: list[int]) -> None:
        for call in calls:
            assert child(self.out, lambda call=call: die_at_call(call, None)) in (0, KILLED)

    @rule()
    def begin_anew(self) -> None:
        if not self.finished():
            return
        shutil.rmtree(self.out)
        self.held = 0

    @rule(limit=st.integers(1, 30_000))
    def stop_in_the_middle_of_a_write(self, limit: int) -> None:
        if self.finished():
            return
        assert child(self.out, lambda: stop_at_byte(limit, by_signal=True)) in (0, CUT_OFF, KILLED)

    @rule(limit=st.integers(1, 30_000))
    def fill_the_disk(self, limit: int) -> None:
        if self.finished():
            return
        status = child(self.out, lambda: stop_at_byte(limit, by_signal=False))
        assert status in (0, FULL_DISK)
        if status == FULL_DISK:
            assert "run the same capture again to go on" in (self.out.parent / "notes").read_text()

    @rule(delay=st.floats(0, 0.12))
    def press_ctrl_c(self, delay: float) -> None:
        status = child(self.out, lambda: None, delay, signal.SIGINT)
        assert status in (0, INTERRUPTED)

    @rule()
    def a_second_writer_is_refused(self) -> None:
        if self.finished() or not self.out.exists():
            return
        before = contents(self.out)
        with store.writer_lock(self.out), pytest.raises(CacheLockedError, match=str(os.getpid())):
            capture(self.out)
        assert contents(self.out) == before

    @rule()
    def move(self) -> None:
        if self.out.exists():
            self.out = self.out.rename(self.out.with_name(self.out.name + "x"))

    @rule()
    def lose_the_index(self) -> None:
        (self.out / "index.h5").unlink(missing_ok=True)

    @rule(number=st.integers(0, 9), junk=st.binary(max_size=50))
    def find_leftovers(self, number: int, junk: bytes) -> None:
        """What the manifest does not name is no part of the cache: half a shard, or a whole one of another writer."""
        names = {entry["file"] for entry in self.entries()}
        for name in (f"shard-{number:05d}.h5", f".shard-{number:05d}.h5.partial", ".manifest.json.partial"):
            if name not in names and (self.out / "manifest.json").exists():
                (self.out / name).write_bytes(junk)

    @rule(
        shard=st.integers(0, 99),
        row=st.integers(0, 99),
        byte=st.integers(0, 99),
        bit=st.integers(0, 7),
        back=st.booleans(),
    )
    def damage_a_byte(self, shard: int, row: int, byte: int, bit: int, back: bool) -> None:
        """Found, named, and no capture goes on over it; repaired or put back, nothing is lost."""
        if not self.entries():
            return
        entry = self.entries()[shard % len(self.entries())]
        path, sound = self.out / entry["file"], (self.out / entry["file"]).read_bytes()
        with h5py.File(path) as file:
            dataset = file[f"sites/{SITE}"]
            row, width = row % entry["rows"], dataset.shape[1] * 4
            position = dataset.id.get_offset() + row * width + byte % width
            sequence = int(file["rows/sequence"][row])
        altered = bytearray(sound)
        altered[position] ^= 1 << bit
        path.write_bytes(bytes(altered))
        problems = {problem.file: problem for problem in quietly(self.out).verify()}
        assert sequence in problems[entry["file"]].sequences
        with pytest.raises(ac.errors.CorruptCacheError, match=entry["file"]):
            capture(self.out)
        if not back:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                assert ac.repair(self.out, llama(), progress=False).exact
            assert path.read_bytes() == sound
        else:
            path.write_bytes(sound)

    @rule()
    def resume(self) -> None:
        """It ends as if nothing had happened."""
        leftovers_stay = self.finished()  # a finished cache is returned as it is
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert capture(self.out).finished
        found = contents(self.out)
        assert {name: found[name] for name in self.bytes} == self.bytes
        assert leftovers_stay or not list(self.out.glob(".*.partial"))

    def entries(self) -> list[dict[str, Any]]:
        path = self.out / "manifest.json"
        return json.loads(path.read_text())["shards"] if path.exists() else []

    @invariant()
    def it_is_a_beginning_of_the_reference(self) -> None:
        entries = self.entries()
        assert entries == self.cache.manifest["shards"][: len(entries)]
        assert len(entries) >= self.held
        grown, self.held = len(entries) > self.held, len(entries)
        if not (self.out / "manifest.json").exists():
            return
        cache = quietly(self.out)
        assert torch.equal(cache[SITE][:], self.cache[SITE][: len(cache)])
        assert cache.verify() == []
        assert not grown or conformance.failures(self.out) == []
        with h5py.File(self.out / "index.h5") as index:
            assert np.array_equal(index["sites"][SITE][()], self.cache[SITE][: len(cache)].numpy())


def quietly(out: Path) -> ac.Cache:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it is unfinished
        return ac.open(out)


def run_until(kills: int, examples: int) -> int:
    """Run the machine until so many children were ended by SIGKILL; how many were. A round is `examples` sequences."""
    ENDED.clear()
    for _ in range(kills):
        run_state_machine_as_test(
            Hostile,
            settings=settings(
                max_examples=examples,
                stateful_step_count=12,
                deadline=None,
                derandomize=False,
                database=None,
                phases=[Phase.generate],  # the report holds every step; shrinking would take minutes of real captures
                suppress_health_check=list(HealthCheck),
            ),
        )
        if ENDED[KILLED] >= kills:
            break
    return ENDED[KILLED]


def test_a_cache_survives_fifty_kills():
    assert run_until(50, examples=3) >= 50


@pytest.mark.slow
def test_a_cache_survives_a_thousand_kills():
    assert run_until(1000, examples=40) >= 1000
    assert ENDED[CUT_OFF] > 20
    assert ENDED[FULL_DISK] > 20
    assert ENDED[INTERRUPTED] > 20


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.03, 0.06])
def test_ctrl_c_says_how_to_go_on(delay: float, tmp_path: Path):
    """A real SIGINT at four moments: whatever is committed by then is said, and the same call goes on."""
    out = tmp_path / "acts"
    pid_status = child(out, lambda: None, delay, signal.SIGINT)
    assert pid_status in (0, INTERRUPTED)
    if pid_status == INTERRUPTED and (out / "manifest.json").exists() and (tmp_path / "notes").read_text():
        committed = len(json.loads((out / "manifest.json").read_text())["shards"])
        assert f"{committed} of " in (tmp_path / "notes").read_text()
        assert "the same capture with resume=True goes on" in (tmp_path / "notes").read_text()
    assert capture(out).finished
    assert contents(out) == reference()[1]
    shutil.rmtree(out)


def test_ctrl_c_in_the_middle_is_said_on_the_terminal(tmp_path: Path):
    """SIGINT once two shards are committed: the child ends by KeyboardInterrupt, and its last words say how."""
    out, data = tmp_path / "acts", labelled_rows(120)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.dup2(os.open(tmp_path / "stderr", os.O_WRONLY | os.O_CREAT), 2)
            sys.stderr = os.fdopen(2, "w", buffering=1)
            small(out, data, shard_rows=20, progress=True)
            status = 0
        except KeyboardInterrupt:
            status = INTERRUPTED
        finally:
            os._exit(status)
    deadline = time.monotonic() + 60
    while not (out / "shard-00002.h5").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(pid, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == INTERRUPTED
    manifest = store.read_manifest(out)
    committed, total = len(manifest["shards"]), manifest["plan"]["shards"]
    said = (tmp_path / "stderr").read_text()
    assert f"interrupted: {committed} of {total} shards are committed in {out}" in said
    assert "the same capture with resume=True goes on" in said
    assert 2 <= committed < total
    assert quietly(out).verify() == []
    assert small(out, data, shard_rows=20).finished
    small(tmp_path / "straight", data, shard_rows=20)
    assert contents(out) == contents(tmp_path / "straight")
