"""Repair gives back the original bytes, runs no more batches than are hit, and asks for what it needs."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import activations_cache as ac
from activations_cache import _forward, conformance, store
from activations_cache._repair import repair
from activations_cache._verify import verify
from activations_cache.cache import open as open_cache
from activations_cache.errors import CacheError, CacheLockedError, CacheMismatchError
from activations_cache.plan import batches_of
from tests.activations_cache.caches import RESID, contents, die, in_child, llama, small
from tests.architectures import tiny

SITE = "blocks.1.hook_resid_post"
SHARD = "shard-00001.h5"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows() -> list[dict[str, Any]]:
    """Sequences of 20 to 40 tokens, so that a shard of 600 rows has three CRC blocks and several batches."""
    rng = np.random.default_rng(1)
    found = []
    for number in range(40):
        ids = rng.integers(3, 96, rng.integers(20, 40)).tolist()
        row = {"input_ids": ids, "author": f"ä{number}", "n": number, "score": number / 7, "toxic": number % 2 == 0}
        row["mask"] = [bool(i % 3) for i in range(len(ids))]
        row["weight"] = [i / 3 for i in range(len(ids))]
        row["tag"] = ["ab"[i % 2] for i in range(len(ids))]
        found.append(row)
    return found


KINDS: dict[str, dict[str, Any]] = {
    "all": {},
    "last": {"positions": "last", "shard_rows": 12},
    "mask": {"positions": "mask", "shard_rows": 400},
    "pooled": {"pool": "mean", "shard_rows": 12},
    "pooled mask": {"positions": "mask", "pool": "mean", "shard_rows": 12},
    "logprobs": {"logprobs": True},
    "token columns": {"token_columns": ["weight", "tag"]},
    "two types": {"dtype": {"*": "float16", "blocks.0.*": "bfloat16"}},
    "gzip": {"compression": "gzip"},
}


def capture(out: Path, **asked: Any) -> Any:
    asked = {"batch_tokens": 160, "shard_rows": 600, "columns": ["author", "n", "score", "toxic"], **asked}
    return small(out, rows(), RESID, **asked)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Finished caches by kind; do not change them."""
    held: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in held:
            held[kind] = tmp_path_factory.mktemp("made") / "acts"
            capture(held[kind], **KINDS[kind])
        return held[kind]

    return get


@pytest.fixture
def copy(made: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(made(kind), tmp_path / "acts"))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The batches that the model is run for from here on."""
    seen: list[list[int]] = []
    real = _forward.Forward.run

    def run(self: Any, batch: Any) -> Any:
        seen.append(np.asarray(batch).tolist())
        return real(self, batch)

    monkeypatch.setattr(_forward.Forward, "run", run)
    return seen


def place(shard: Path, name: str, row: int = 0) -> int:
    """Where a row of a dataset begins in the file; of a compressed one where its first chunk does."""
    with h5py.File(shard) as file:
        dataset = file[name]
        if dataset.chunks:
            return dataset.id.get_chunk_info(0).byte_offset + 20
        return dataset.id.get_offset() + row * dataset.id.get_storage_size() // max(1, len(dataset))


def alter(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 0x10
    path.write_bytes(bytes(raw))


def assert_as_new(out: Path, original: Path) -> None:
    assert contents(out) == contents(original)
    assert (out / "manifest.json").read_bytes() == (original / "manifest.json").read_bytes()
    assert verify(out) == []
    assert not list(out.glob(".*.partial"))


# --- the original comes back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_conforms(kind: str, made: Callable[[str], Path]):
    assert conformance.failures(made(kind)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_an_altered_value_is_captured_again_and_nothing_else(
    kind: str, made: Callable[[str], Path], copy: Callable[[str], Path], ran: list[list[int]]
):
    out = copy(kind)
    ran.clear()
    entry = store.read_manifest(out)["shards"][1]
    alter(out / SHARD, place(out / SHARD, f"sites/{SITE}", entry["rows"] - 1))
    (problem,) = verify(out)
    assert 0 < len(problem.sequences) <= entry["sequences"]
    done = repair(out, llama(), rows(), progress=False)
    assert done.exact
    assert done.sequences == problem.sequences
    assert_as_new(out, made(kind))
    with h5py.File(out / SHARD) as file:  # the plan of the shard, from its lengths alone
        lengths = np.diff(file["sequences/offsets"][()])
    first = entry["first_sequence"]
    hit = {number - first for number in problem.sequences}
    wanted = [batch.tolist() for batch in batches_of(lengths, 0, 160) if hit & set(batch.tolist())]
    assert ran == wanted
    assert done.forwards == len(wanted)


def test_a_block_costs_only_its_batches(tmp_path: Path, ran: list[list[int]]):
    """256 rows of sequences of 30 tokens are the first 9 sequences: of batches of 4, the first three."""
    out = tmp_path / "acts"
    data = np.random.default_rng(3).integers(3, 96, (40, 30)).tolist()
    small(out, data, SITE, batch_tokens=120, shard_rows=1200)
    before = contents(out)
    ran.clear()
    alter(out / "shard-00000.h5", place(out / "shard-00000.h5", f"sites/{SITE}", 3))
    done = repair(out, llama(), progress=False)
    assert done.sequences == tuple(range(9))
    assert ran == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert done.exact
    assert contents(out) == before


@pytest.mark.parametrize(
    "name",
    [f"statistics/{SITE}/mean", f"statistics/{SITE}/m2", f"crc/sites/{SITE}", "crc/rows/position", "rows/position"],
)
def test_what_follows_from_the_rows_needs_no_model(name: str, made: Callable[[str], Path], copy: Callable[[str], Path]):
    out = copy("all")
    alter(out / SHARD, place(out / SHARD, name))
    done = repair(out, progress=False)
    assert (done.exact, done.forwards, done.sequences) == (True, 0, ())
    assert_as_new(out, made("all"))


def test_the_rest_of_the_cache_is_left_alone_and_the_index_is_written_again(
    made: Callable[[str], Path], copy: Callable[[str], Path]
):
    out = copy("all")
    (out / "index.h5").unlink()
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    done = repair(out, progress=False)
    assert (done.shards, done.index) == ((), True)
    assert_as_new(out, made("all"))
    assert {name: (out / name).stat().st_mtime_ns for name in times if "shard" in name} == {
        name: time for name, time in times.items() if "shard" in name
    }
    assert str(repair(out, progress=False)) == f"{out}: nothing to repair"


HARMS: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "empty": lambda shard: shard.write_bytes(b""),
    "cut": lambda shard: os.truncate(shard, 3000),
    "another's": lambda shard: shutil.copy(shard.with_name("shard-00000.h5"), shard),
    "no HDF5": lambda shard: shard.write_bytes(b"x" * shard.stat().st_size),
    "token ids": lambda shard: alter(shard, place(shard, "sequences/input_ids", 5)),
    "offsets": lambda shard: alter(shard, place(shard, "sequences/offsets", 2)),
    "a label": lambda shard: alter(shard, place(shard, "sequences/n", 2)),
    "label and value": lambda shard: [alter(shard, place(shard, name, 2)) for name in ("sequences/n", f"sites/{SITE}")],
}


@pytest.mark.parametrize("harm", HARMS)
def test_what_only_the_data_know_needs_them(harm: str, made: Callable[[str], Path], copy: Callable[[str], Path]):
    out = copy("all")
    HARMS[harm](out / SHARD)
    before = contents(out)
    with pytest.raises(CacheError, match=rf"{SHARD}.*the data that the cache was captured from are needed.*--data"):
        repair(out, llama(), progress=False)
    assert contents(out) == before
    done = repair(out, llama(), rows(), progress=False)
    assert done.exact
    assert_as_new(out, made("all"))
    if harm in ("token ids", "offsets", "a label"):
        assert done.forwards == 0


@pytest.mark.parametrize("kind", ["all", "mask", "logprobs", "two types"])
def test_a_file_that_hdf5_cannot_read_loses_no_rows(
    kind: str, made: Callable[[str], Path], copy: Callable[[str], Path]
):
    """Its signature and a tree are altered, and one value: with the data, the rows are found where they must lie."""
    out = copy(kind)
    value = place(out / SHARD, f"sites/{SITE}", 0)
    alter(out / SHARD, 1)
    alter(out / SHARD, (out / SHARD).read_bytes().index(b"TREE"))
    entry = store.read_manifest(out)["shards"][1]
    done = repair(out, llama(), rows(), progress=False)
    assert (done.exact, done.forwards, done.sequences) == (True, 0, ())
    assert_as_new(out, made(kind))
    alter(out / SHARD, 1)
    alter(out / SHARD, value)
    done = repair(out, llama(), rows(), progress=False)
    assert done.exact
    assert 0 < len(done.sequences) < entry["sequences"]
    assert_as_new(out, made(kind))


@pytest.mark.parametrize("pool", [None, "mean"])
def test_positions_that_were_chosen_one_by_one_are_asked_for(pool: Any, tmp_path: Path):
    out, chosen = tmp_path / "acts", [slice(1, 4 + number % 3) for number in range(40)]
    capture(out, positions=chosen, pool=pool, shard_rows=30)
    before = contents(out)
    alter(out / SHARD, place(out / SHARD, f"sites/{SITE}", 0))
    if pool is None:  # the rows themselves say which
        assert repair(out, llama(), progress=False).exact
        (out / SHARD).unlink()
    with pytest.raises(CacheError, match="pass the same positions= as for the capture"):
        repair(out, llama(), rows(), progress=False)
    with pytest.raises(CacheMismatchError, match="other data or settings"):
        repair(out, llama(), rows(), positions=[slice(0, 3)] * 40, progress=False)
    assert repair(out, llama(), rows(), positions=chosen, progress=False).exact
    assert contents(out) == before


def test_several_shards_at_once(made: Callable[[str], Path], copy: Callable[[str], Path]):
    out = copy("all")
    (out / "shard-00000.h5").unlink()
    alter(out / SHARD, place(out / SHARD, f"sites/{SITE}", 3))
    (out / "index.h5").unlink()
    done = repair(out, llama(), rows(), progress=False)
    assert [shard.file for shard in done.shards] == ["shard-00000.h5", SHARD]
    assert_as_new(out, made("all"))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["all", "pooled mask", "gzip", "token columns"]),
    places=st.lists(
        st.tuples(st.sampled_from([SHARD, "shard-00000.h5", "index.h5"]), st.floats(0, 0.999)), min_size=1, max_size=2
    ),
)
def test_any_altered_bytes_are_repaired(
    kind: str, places: list[tuple[str, float]], made: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
):
    """With the model and the data, whatever is altered comes back bit by bit."""
    out = Path(shutil.copytree(made(kind), tmp_path_factory.mktemp("altered") / "acts"))
    for name, part in places:
        alter(out / name, int(part * (out / name).stat().st_size))
    assert repair(out, llama(), rows(), progress=False).exact
    assert_as_new(out, made(kind))
    shutil.rmtree(out)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_the_model_is_asked_for_and_must_be_the_same(copy: Callable[[str], Path]):
    out = copy("all")
    alter(out / SHARD, place(out / SHARD, f"sites/{SITE}", 3))
    before = contents(out)
    with pytest.raises(CacheError, match=rf"{SHARD}.*the model is needed to repair it.*--model"):
        repair(out, progress=False)
    with pytest.raises(CacheMismatchError, match="this model has another weights_hash"):
        repair(out, tiny("llama", seed=5), progress=False)
    assert contents(out) == before


def test_other_data_are_refused(copy: Callable[[str], Path]):
    out = copy("all")
    (out / SHARD).unlink()
    before = contents(out)
    with pytest.raises(CacheMismatchError, match=r"other data or settings \(different: data"):
        repair(out, llama(), rows()[::-1], progress=False)
    assert contents(out) == before


def test_a_writer_at_work_is_not_disturbed(copy: Callable[[str], Path]):
    out = copy("all")
    with store.writer_lock(out), pytest.raises(CacheLockedError):
        repair(out, progress=False)


# --- another machine ------------------------------------------------------------------------------------------------


def test_other_bytes_are_recorded_in_the_manifest(copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch):
    """A forward that rounds otherwise: the shard is right, new, and the manifest says so."""
    out = copy("all")
    before = store.read_manifest(out)
    alter(out / SHARD, place(out / SHARD, f"sites/{SITE}", 3))
    real = _forward.Forward.run

    def rounded(self: Any, batch: Any) -> Any:
        found = real(self, batch)
        for pending in found._pending.values():
            pending.stored *= 1 + 2**-20
        return found

    monkeypatch.setattr(_forward.Forward, "run", rounded)
    done = repair(out, llama(), progress=False)
    assert not done.exact
    (record,) = store.read_manifest(out)["repaired"]
    assert (record["file"], record["sha256_before"]) == (SHARD, before["shards"][1]["sha256"])
    assert record["sha256"] == store.file_sha256(out / SHARD) == done.shards[0].sha256
    assert record["libraries"]["torch"] == torch.__version__.split("+")[0] or record["libraries"]["torch"]
    assert [n for a, b in record["sequences"] for n in range(a, b)] == list(done.sequences)
    assert "recorded in the manifest" in str(done)
    assert "recorded in the manifest" in done._repr_html_()
    assert verify(out) == []
    assert conformance.failures(out) == []
    cache = open_cache(out)
    torch.testing.assert_close(cache.stats[SITE].mean, cache[SITE][:].double().mean(0))
    assert capture(out).finished  # and a capture of the same kind still takes it as its own


# --- the disk ---------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_cache_as_repairable_as_it_was(made: Callable[[str], Path], copy: Callable[[str], Path]):
    out = copy("all")
    alter(out / SHARD, place(out / SHARD, f"sites/{SITE}", 3))
    before = contents(out)

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        with pytest.raises(CacheError, match=r"cannot be written.*run the same repair again"):
            repair(out, llama(), progress=False)

    assert in_child(work) == 0
    assert contents(out) == before
    assert repair(out, llama(), progress=False).exact
    assert_as_new(out, made("all"))


# --- killed in the middle -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5, 6])
def test_a_killed_repair_can_be_run_again(call: int, made: Callable[[str], Path], copy: Callable[[str], Path]):
    out = copy("all")
    (out / "shard-00000.h5").unlink()
    alter(out / SHARD, place(out / SHARD, f"sites/{SITE}", 3))

    def work() -> None:
        seen = 0

        def counted(real: Any) -> Any:
            def step(*arguments: Any, **named: Any) -> Any:
                nonlocal seen
                seen += 1
                if seen == call:
                    die()
                return real(*arguments, **named)

            return step

        os.fsync, os.replace = counted(os.fsync), counted(os.replace)
        repair(out, llama(), rows(), progress=False)

    assert in_child(work) == -signal.SIGKILL
    assert repair(out, llama(), rows(), progress=False).exact
    assert_as_new(out, made("all"))


def test_generated_tokens_are_repaired_from_the_model_alone(tmp_path: Path):
    """Chosen positions and log-probabilities of a generation: everything but the rows stands in the shard."""
    out, prompts = tmp_path / "acts", np.random.default_rng(0).integers(3, 96, (9, 8)).tolist()
    asked = {"max_new_tokens": 5, "batch_tokens": 60, "shard_rows": 20, "positions": "generated", "progress": False}
    ac.capture_generation(llama(), prompts, RESID, out, **asked)
    before = contents(out)
    for name in (f"sites/{SITE}", "rows/logprob"):
        alter(out / SHARD, place(out / SHARD, name, 2))
    done = repair(out, llama(), progress=False)
    assert done.exact
    assert done.forwards > 0
    assert contents(out) == before
    assert verify(out) == []


def test_verify_lists_lost_and_cut_shards_of_a_cache_that_does_not_open(tmp_path: Path):
    small(tmp_path / "acts")
    (tmp_path / "acts" / "shard-00000.h5").unlink()
    os.truncate(tmp_path / "acts" / SHARD, 1000)
    found = {problem.file: problem.kind for problem in ac.verify(tmp_path / "acts")}
    assert found == {"shard-00000.h5": "missing", SHARD: "size"}


@pytest.mark.parametrize("stale", [False, True])
def test_an_unfinished_cache_needs_no_current_index(stale: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real, calls = _forward.Forward.run, []

    def run(self: Any, batch: Any) -> Any:
        calls.append(batch)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(_forward.Forward, "run", run)
    with pytest.raises(KeyboardInterrupt):
        small(tmp_path / "acts")
    index = tmp_path / "acts" / "index.h5"
    assert not index.exists()
    if stale:
        monkeypatch.setattr(_forward.Forward, "run", real)
        shutil.copy(small(tmp_path / "whole").path / "index.h5", index)
    assert ac.verify(tmp_path / "acts") == []


def test_a_finished_cache_needs_its_index(tmp_path: Path):
    small(tmp_path / "acts")
    (tmp_path / "acts" / "index.h5").unlink()
    assert [problem.kind for problem in ac.verify(tmp_path / "acts")] == ["index"]


def test_requirements_take_a_path_as_text(tmp_path: Path):
    small(tmp_path / "acts")
    for check in conformance.REQUIREMENTS.values():
        check(str(tmp_path / "acts"))
