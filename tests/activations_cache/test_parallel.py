"""Two and more ranks over gloo: the bytes of one process, whoever fails, dies or joins in the middle."""

from __future__ import annotations

import copy
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import activations_cache as ac
from activations_cache import _job, _parallel, _pipeline, _shares, conformance, store
from activations_cache.errors import CacheError, ParallelError
from tests.activations_cache.caches import contents, die, in_child, labelled_rows, llama, small
from tests.activations_cache.ranks import rich_rows, run_ranks
from tests.conftest import ROOT


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Forked children cannot use OpenMP's threads, and equal bytes need an equal number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A capture by one process that nobody interrupted."""
    out = tmp_path_factory.mktemp("whole") / "acts"
    small(out, labelled_rows(30))
    assert len(ac.open(out).manifest["shards"]) >= 8
    return out


def capturing(out: Path, **settings: Any) -> Callable[[], Any]:
    return lambda: small(out, labelled_rows(30), **settings)


def at_shard(act: Callable[[int], Any]) -> None:
    """From now on in this process, `act` with its number when a shard is begun; the one before it is durable then."""
    real = _pipeline._new_buffer

    def told(job: Any, shard: Any, *rest: Any) -> Any:
        act(shard.index)
        return real(job, shard, *rest)

    _pipeline._new_buffer = told


def dying_at(number: int, out: Path) -> Callable[[], Any]:
    def work() -> None:
        at_shard(lambda begun: die() if begun == number else None)
        small(out, labelled_rows(30))

    return work


def noting(ran: Path, out: Path) -> Callable[[], Any]:
    """A rank that writes down which shards it runs."""

    def note(number: int) -> None:
        with ran.open("a") as file:
            file.write(f"{torch.distributed.get_rank()} {number}\n")

    def work() -> None:
        at_shard(note)
        small(out, labelled_rows(30))

    return work


def check_finished(out: Path, whole: Path) -> None:
    """The cache is that of one process: every byte of the HDF5 files, the statistics, and no file more."""
    assert contents(out) == contents(whole)
    made, expected = store.read_manifest(out), store.read_manifest(whole)
    for manifest in (made, expected):
        del manifest["created"], manifest["digest"]
    assert made == expected
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    assert conformance.failures(out) == []


def check_unfinished(out: Path, whole: Path) -> int:
    """What is committed is a valid beginning of the whole; how many shards it has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache = ac.open(out)
    assert not cache.finished
    assert conformance.failures(out) == []
    assert cache.verify() == []
    shards = cache.manifest["shards"]
    assert shards == store.read_manifest(whole)["shards"][: len(shards)]
    return len(shards)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_give_the_bytes_of_one_process(size: int, whole: Path, tmp_path: Path):
    out, opened = tmp_path / "acts", tmp_path / "opened"
    opened.mkdir()

    def work() -> None:
        cache = small(out, labelled_rows(30))
        (opened / f"{torch.distributed.get_rank()}").write_text(f"{cache.finished} {len(cache)}")

    assert run_ranks(tmp_path, [work] * size) == ["ok"] * size
    check_finished(out, whole)
    assert {path.read_text() for path in opened.iterdir()} == {f"True {len(ac.open(whole))}"}
    assert len(list(opened.iterdir())) == size


@pytest.mark.parametrize(
    "settings",
    [
        {
            "positions": "mask",
            "token_columns": ["weight"],
            "logprobs": True,
            "dtype": {"*": "bfloat16", "*1*": "float32"},
        },
        {"positions": "last", "compression": "gzip", "n_tokens": 90},
        {"pool": "mean", "columns": ["author"]},
    ],
    ids=["mask", "last", "mean"],
)
def test_every_kind_of_capture_is_shared_alike(settings: dict[str, Any], tmp_path: Path):
    small(tmp_path / "whole", rich_rows(), shard_rows=6, **settings)
    works = [lambda: small(tmp_path / "acts", rich_rows(), shard_rows=6, **settings)] * 2
    assert run_ranks(tmp_path, works) == ["ok", "ok"]
    assert len(store.read_manifest(tmp_path / "whole")["shards"]) >= 3
    check_finished(tmp_path / "acts", tmp_path / "whole")


def test_every_rank_takes_every_nth_shard(whole: Path, tmp_path: Path):
    ran = tmp_path / "ran"
    assert run_ranks(tmp_path, [noting(ran, tmp_path / "acts")] * 2) == ["ok", "ok"]
    shards = len(store.read_manifest(whole)["shards"])
    assert sorted(ran.read_text().splitlines()) == sorted(f"{n % 2} {n}" for n in range(shards))


def test_a_finished_cache_runs_no_model(whole: Path, tmp_path: Path):
    def refuse() -> None:
        _pipeline.forward_of = lambda *_: 1 / 0
        small(whole, labelled_rows(30))

    assert run_ranks(tmp_path, [refuse, refuse]) == ["ok", "ok"]


def test_any_number_of_processes_may_go_on(whole: Path, tmp_path: Path):
    out = tmp_path / "acts"

    def alone() -> None:
        real = store.write_manifest

        def killed_at_two(directory: Path, manifest: Any) -> None:
            real(directory, manifest)
            if len(manifest["shards"]) == 2:
                die()

        for module in [m for name, m in sys.modules.items() if name.startswith("activations_cache")]:
            if getattr(module, "write_manifest", None) is real:
                module.write_manifest = killed_at_two  # type: ignore[attr-defined]
        small(out, labelled_rows(30))

    assert in_child(alone) == -signal.SIGKILL
    assert check_unfinished(out, whole) == 2
    outcomes = run_ranks(tmp_path, [dying_at(6, out), capturing(out)])  # rank 0 runs 2, 4, 6
    assert outcomes[0] == "signal 9"
    assert check_unfinished(out, whole) >= 3
    small(out, labelled_rows(30))
    check_finished(out, whole)


# -------------------------------------------------------------------- failures


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others_and_any_resume_gives_the_same_bytes(victim: int, whole: Path, tmp_path: Path):
    out = tmp_path / "acts"

    works = [capturing(out), capturing(out)]
    works[victim] = dying_at(4 + victim, out)
    outcomes = run_ranks(tmp_path, works)
    assert outcomes[victim] == "signal 9"
    assert outcomes[1 - victim].startswith(f"ParallelError: rank {victim} of 2 failed: its process is gone (")
    assert check_unfinished(out, whole) <= 4 + victim
    assert run_ranks(tmp_path, [capturing(out)] * 2) == ["ok", "ok"]
    check_finished(out, whole)


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_time_by_any_number_of_ranks(seed: int, whole: Path, tmp_path: Path):
    """Runs of one to three ranks in turn, some of which die after a random time; then one that finishes."""
    chance, out = random.Random(seed), tmp_path / "acts"

    def dying(delay: float | None) -> Callable[[], Any]:
        def work() -> None:
            if delay is not None:
                threading.Timer(delay, die).start()
            small(out, labelled_rows(30))

        return work

    for _ in range(3):
        delays = [chance.uniform(0.05, 0.5) if chance.random() < 0.7 else None for _ in range(chance.randint(1, 3))]
        for outcome in run_ranks(tmp_path, [dying(delay) for delay in delays]):
            assert outcome in ("ok", "signal 9") or outcome.startswith("ParallelError: rank "), outcome
        if (out / "manifest.json").exists() and not store.read_manifest(out)["finished"]:
            check_unfinished(out, whole)
    small(out, labelled_rows(30))
    check_finished(out, whole)


def test_a_rank_that_fails_is_named_on_every_rank(whole: Path, tmp_path: Path):
    out = tmp_path / "acts"

    def fails() -> None:
        def fail(number: int) -> None:
            if number == 4:
                raise ZeroDivisionError("the model divides by zero")

        at_shard(fail)
        small(out, labelled_rows(30))

    outcomes = run_ranks(tmp_path, [capturing(out), fails, capturing(out)])
    told = "ParallelError: rank 1 of 3 failed: ZeroDivisionError: the model divides by zero"
    assert outcomes == [told, "ZeroDivisionError: the model divides by zero", told]
    assert check_unfinished(out, whole) <= 4
    small(out, labelled_rows(30))
    check_finished(out, whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_ours_keeps_its_class(rank: int, tmp_path: Path):
    """A value that no float16 holds, in a sequence that one rank runs."""
    big = copy.deepcopy(llama())
    with torch.no_grad():
        big.model.embed_tokens.weight[7] = 1e6
    rows = [[3, 4, 5, 6]] * 10 + [[7] * 20] + [[3, 4, 5, 6]] * 10
    if rank == 1:
        rows = rows[5:]
    settings = {"model": big, "dtype": "float16", "sites": "blocks.0.hook_resid_pre"}
    outcomes = run_ranks(tmp_path, [lambda: small(tmp_path / "acts", rows, **settings)] * 2)
    own = outcomes[rank]
    assert own.startswith("NumericsError: blocks.0.hook_resid_pre reaches")
    assert outcomes[1 - rank] == own.replace("NumericsError: ", f"NumericsError: rank {rank} of 2 failed: ")


def test_a_rank_with_other_data_is_refused_on_both(tmp_path: Path):
    out = tmp_path / "acts"
    outcomes = run_ranks(tmp_path, [capturing(out), lambda: small(out, labelled_rows(30, seed=1))])
    said = "the processes ask for different captures: rank 1 differs from rank 0 in token ids of the data"
    assert all(outcome.startswith("CacheMismatchError: ") and said in outcome for outcome in outcomes)
    assert not out.exists()


def test_a_rank_with_another_model_or_setting_is_refused_on_both(tmp_path: Path):
    other = copy.deepcopy(llama())
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight[0, 0] += 1
    for settings, fact in (({"model": other}, "model weights"), ({"batch_tokens": 25}, "setting batch_tokens")):
        out = tmp_path / fact
        outcomes = run_ranks(tmp_path, [capturing(out), capturing(out, **settings)])
        assert all(o.startswith("CacheMismatchError: ") and fact in o for o in outcomes), outcomes


def test_a_rank_of_other_threads_or_versions_is_warned_of(tmp_path: Path):
    def careful() -> None:
        warnings.filterwarnings("error", "rank 1")
        small(tmp_path / "acts")

    def other() -> None:
        real = _job._machine
        _job._machine = lambda hf: {**real(hf), "threads": 64}
        small(tmp_path / "acts")

    outcomes = run_ranks(tmp_path, [careful, other])
    assert outcomes[0].startswith("UserWarning: rank 1 runs other library versions or another number of threads")


def test_a_rank_whose_request_is_wrong_stops_the_others(tmp_path: Path):
    outcomes = run_ranks(tmp_path, [capturing(tmp_path / "a"), capturing(tmp_path / "a", dtype="int3")])
    assert outcomes[1].startswith("DataError: dtype must be")
    assert outcomes[0].startswith("DataError: rank 1 of 2 failed: dtype must be")
    assert not (tmp_path / "a").exists()


def test_what_the_directory_holds_is_refused_on_every_rank(whole: Path, tmp_path: Path):
    out = tmp_path / "acts"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert all(o.startswith("CacheError: ") for o in run_ranks(tmp_path, [capturing(out)] * 2))
    for settings, kind in (({"shard_rows": 21}, "CacheMismatchError"), ({"resume": False}, "CacheError")):
        outcomes = run_ranks(tmp_path, [capturing(whole, **settings)] * 2)
        assert [o.partition(":")[0] for o in outcomes] == [kind] * 2
    with store.writer_lock(out):
        (out / "notes.txt").unlink()
        outcomes = run_ranks(tmp_path, [capturing(out)] * 2)
    assert [o.partition(":")[0] for o in outcomes] == ["CacheLockedError"] * 2


def test_ranks_must_share_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_shares, "SIGHT_SECONDS", 0.2)
    outcomes = run_ranks(tmp_path, [capturing(tmp_path / "here"), capturing(tmp_path / "there")])
    assert "cannot be seen here: all processes of a capture must write to one directory" in outcomes[1]
    assert outcomes[0].startswith("CacheError: rank 1 of 2 failed: ")


# -------------------------------------------------------------------- finished before their turn


def ahead(out: Path) -> None:
    """Rank 0 dies at shard 0; rank 1 has finished shards 1 and 3 by then, which cannot be committed yet."""

    def wait_and_die(_number: int) -> None:
        _shares.in_sight(_Folder(out), ".shard-00003.h5.entry.partial")  # type: ignore[arg-type]
        die()

    def rank_0() -> None:
        at_shard(wait_and_die)
        small(out, labelled_rows(30))

    assert run_ranks(out.parent, [rank_0, capturing(out)])[0] == "signal 9"


class _Folder:
    def __init__(self, out: Path) -> None:
        self.out = out


def shards_run(out: Path, folder: Path) -> list[int]:
    """Finish the capture with two ranks; the shards that were run for it."""
    assert run_ranks(folder, [noting(folder / "ran", out)] * 2) == ["ok", "ok"]
    return sorted(int(line.split()[1]) for line in (folder / "ran").read_text().splitlines())


def test_shards_finished_before_their_turn_are_adopted(whole: Path, tmp_path: Path):
    out = tmp_path / "acts"
    ahead(out)
    assert check_unfinished(out, whole) == 0
    ran = shards_run(out, tmp_path)
    assert 1 not in ran and 3 not in ran and 0 in ran
    check_finished(out, whole)


@pytest.mark.parametrize("harm", ["shard", "entry", "other", "plan"])
def test_what_is_adopted_is_checked(harm: str, whole: Path, tmp_path: Path):
    out = tmp_path / "acts"
    ahead(out)
    shard, entry = out / "shard-00001.h5", out / ".shard-00001.h5.entry.partial"
    if harm == "shard":
        raw = bytearray(shard.read_bytes())
        raw[len(raw) // 2] ^= 1
        shard.write_bytes(raw)
    else:
        text = entry.read_text()
        identity = store.read_manifest(out)["identity"]
        changed = {"entry": text[:40], "other": text.replace(identity, identity[::-1]), "plan": "[]"}
        entry.write_text(changed[harm])
    ran = shards_run(out, tmp_path)
    assert 1 in ran and 3 not in ran
    check_finished(out, whole)


def test_one_process_goes_on_after_ranks_that_were_ahead(whole: Path, tmp_path: Path):
    ahead(tmp_path / "acts")
    small(tmp_path / "acts", labelled_rows(30))
    check_finished(tmp_path / "acts", whole)


# -------------------------------------------------------------------- who takes part


def test_a_process_alone_is_no_world(monkeypatch: pytest.MonkeyPatch):
    assert _parallel.world() is None
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert _parallel.world() is None
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert _parallel.world() == _parallel.World(3, 4)


def test_errors_know_their_place():
    assert issubclass(ParallelError, CacheError)
    error = _parallel._as_error(
        {"kind": "failed", "rank": 2, "type": "ValueError", "error": "x"}, _parallel.World(0, 3)
    )
    assert type(error) is ParallelError  # no class but the package's own is ever named


SCRIPT = """
import sys
import torch
from tests.activations_cache.caches import labelled_rows, small
torch.set_num_threads(1)
for out in sys.argv[1:]:  # twice: the group is made and ended each time
    cache = small(out, labelled_rows(30))
    assert cache.finished and not torch.distributed.is_initialized()
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers(launcher: str, whole: Path, tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    modules = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        "accelerate": ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"],
    }
    outs = [tmp_path / "first", tmp_path / "second"]
    command = [sys.executable, "-m", *modules[launcher], str(script), *map(str, outs)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for out in outs:
        check_finished(out, whole)
