"""Every way for a directory to be wrong: its own error, nothing changed on disk; and no altered byte goes unfound."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import activations_cache as ac
from activations_cache import _examine, _index, _verify, conformance, store
from activations_cache.errors import CacheError, CorruptCacheError
from tests.activations_cache.caches import RESID, labelled_rows, llama, small, token_rows

SITE = "blocks.1.hook_resid_post"
SHARD, OTHER = "shard-00001.h5", "shard-00002.h5"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache of several shards; do not change it."""
    out = tmp_path_factory.mktemp("made") / "acts"
    small(out, labelled_rows(20), RESID)
    return out


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the same model from other data."""
    out = tmp_path_factory.mktemp("stranger") / "acts"
    small(out, labelled_rows(20, seed=5), RESID)
    return out


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "acts"))


def on_disk(directory: Path) -> dict[str, Any]:
    """Every name below a directory: a file's bytes and time, a link's target, or what else it is. No lock."""
    found: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_symlink():
            found[name] = ("link", str(path.readlink()))
        elif path.is_file():
            found[name] = (path.read_bytes(), path.stat().st_mtime_ns)
        else:
            found[name] = "directory" if path.is_dir() else "no plain file"
    found.pop(store.LOCK, None)
    return found


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest and give it a right digest, as another writer would."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    store.write_manifest(path, manifest)


def edit_entry(path: Path, number: int, **changes: Any) -> None:
    edit_manifest(path, lambda manifest: manifest["shards"][number].update(changes))


def edit_shard(path: Path, change: Callable[[h5py.File], Any]) -> None:
    """Change a shard and let the manifest agree on its size and checksum, so that only its content is wrong."""
    with h5py.File(path / SHARD, "r+") as file:
        change(file)
    edit_entry(path, 1, bytes=(path / SHARD).stat().st_size, sha256=store.file_sha256(path / SHARD))


def swap(path: Path) -> None:
    """Exchange two shards under entries of their new sizes and checksums."""
    for old, new in ((SHARD, "x"), (OTHER, SHARD), ("x", OTHER)):
        (path / old).rename(path / new)
    for number, name in ((1, SHARD), (2, OTHER)):
        edit_entry(path, number, bytes=(path / name).stat().st_size, sha256=store.file_sha256(path / name))


def instead(path: Path, make: Callable[[Path], Any]) -> None:
    (path / SHARD).unlink()
    make(path / SHARD)


VOUCHED = ("swapped shards", "site missing in a shard", "site of another shape", "shard of another capture")


def harmed(path: Path, name: str) -> Path:
    """Harm a directory; where the manifest vouches for the harm, so does the index, which reading would replace."""
    MALFORMED[name][0](path)
    if name in VOUCHED:
        _index.write_index(path, store.read_manifest(path))
    return path


def link_out(path: Path) -> None:
    (path / SHARD).rename(path.parent / "elsewhere.h5")
    (path / SHARD).symlink_to(path.parent / "elsewhere.h5")


def alter(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 0x10
    path.write_bytes(bytes(raw))


def manifest_version(version: Any) -> Callable[[Path], None]:
    return lambda path: edit_manifest(path, lambda manifest: manifest.update(version=version))


NO_FILE = rf"{SHARD} (is missing|is no file|is no plain file|is a directory|is no regular file)"
# what is done to the directory; what the message says
MALFORMED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda p: (p / "manifest.json").unlink(), r"no activations cache: it has no manifest\.json"),
    "empty manifest": (lambda p: (p / "manifest.json").write_bytes(b""), r"manifest\.json is no JSON"),
    "cut manifest": (lambda p: os.truncate(p / "manifest.json", 300), r"manifest\.json is no JSON"),
    "manifest of bytes": (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe"), r"manifest\.json is no JSON"),
    "manifest of another format": (
        lambda p: edit_manifest(p, lambda m: m.update(format="zarr")),
        "not the manifest of an activations cache",
    ),
    "manifest that is a list": (lambda p: (p / "manifest.json").write_text("[1]"), "not the manifest of an activat"),
    "version of tomorrow": (manifest_version(2), "format version 2; this package reads version 1"),
    "version as text": (manifest_version("1"), "format version '1'; this package reads version 1"),
    "wrong digest": (lambda p: alter(p / "manifest.json", 60), "altered after it was written|no JSON"),
    "field left out": (lambda p: edit_manifest(p, lambda m: m.pop("settings")), "lacks settings"),
    "shard entry too many": (
        lambda p: edit_manifest(p, lambda m: m["shards"].append(m["shards"][-1])),
        "does not begin where the shard before it ends",
    ),
    "shard entry lost": (lambda p: edit_manifest(p, lambda m: m["shards"].pop()), r"promises \d+ rows"),
    "shard entry without a field": (
        lambda p: edit_manifest(p, lambda m: m["shards"][1].pop("sha256")),
        "malformed shard entry",
    ),
    "shard entry above": (lambda p: edit_entry(p, 1, file="../x"), r"'\.\./x'; a shard must lie in the cache"),
    "shard entry elsewhere": (lambda p: edit_entry(p, 1, file="/etc/passwd"), "shard must lie in the cache"),
    "missing shard": (lambda p: (p / SHARD).unlink(), rf"{SHARD} is missing; sequences \d+ to \d+ \(rows"),
    "zero-length shard": (lambda p: (p / SHARD).write_bytes(b""), rf"{SHARD} is empty; sequences \d+ to \d+"),
    "truncated shard": (lambda p: os.truncate(p / SHARD, 5000), rf"{SHARD} has 5000 bytes; the manifest says \d+"),
    "grown shard": (lambda p: (p / SHARD).open("ab").write(b"x"), rf"{SHARD} has \d+ bytes; the manifest says \d+"),
    "directory for a shard": (lambda p: instead(p, Path.mkdir), NO_FILE),
    "fifo for a shard": (lambda p: instead(p, os.mkfifo), NO_FILE),
    "link out of the directory": (link_out, rf"{SHARD} is a link out of the directory"),
    "broken link": (lambda p: instead(p, lambda s: s.symlink_to("nowhere.h5")), rf"{SHARD} is (missing|a link)"),
    "swapped shards": (swap, "is not the shard that belongs there"),
    "site missing in a shard": (lambda p: edit_shard(p, lambda f: f["sites"].pop(SITE)), f"{SHARD}.*cannot be read"),
    "site of another shape": (
        lambda p: edit_shard(p, lambda f: (f["sites"].pop(SITE), f["sites"].create_dataset(SITE, data=np.ones(3)))),
        f"{SHARD} holds {SITE} as float64",
    ),
    "shard of another capture": (
        lambda p: edit_shard(p, lambda f: f.attrs.update(identity="0" * 64)),
        f"{SHARD} belongs to another cache",
    ),
    "shard that is no HDF5": (
        lambda p: (p / SHARD).write_bytes(b"x" * (p / SHARD).stat().st_size),
        f"{SHARD}.*cannot be read as HDF5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_it_is_refused_by_name_and_left_as_it_is(name: str, copy: Path):
    message = MALFORMED[name][1]
    before = on_disk(harmed(copy, name).parent)
    with pytest.raises(CorruptCacheError, match=message) as caught:
        ac.open(copy)[SITE][:]
    assert str(copy) in str(caught.value)
    assert on_disk(copy.parent) == before
    assert conformance.failures(copy) != []
    assert on_disk(copy.parent) == before


@pytest.mark.parametrize("name", [name for name in MALFORMED if name not in VOUCHED])  # these only reading finds
def test_no_capture_goes_on_with_it_or_changes_it(name: str, copy: Path):
    before = on_disk(harmed(copy, name))
    with pytest.raises(CacheError):
        small(copy, labelled_rows(20), RESID)
    assert on_disk(copy) == before


@pytest.mark.parametrize("name", [name for name in MALFORMED if "shard" in name and "entry" not in name])
def test_verify_names_the_shard_and_conformance_the_requirement(name: str, copy: Path):
    problems = ac.open(harmed(copy, name), check=False).verify()
    assert [problem.file for problem in problems] == ([] if name in VOUCHED else [SHARD])
    labels = {line.split(":")[0] for line in conformance.failures(copy)}
    assert labels & {"S1", "S2", "S3"}
    entry = store.read_manifest(copy)["shards"][1]
    whole = tuple(range(entry["first_sequence"], entry["first_sequence"] + entry["sequences"]))
    assert all(problem.sequences == whole for problem in problems)


def test_a_foreign_manifest_is_refused_by_its_shards(copy: Path, stranger: Path):
    shutil.copy(stranger / "manifest.json", copy / "manifest.json")
    before = on_disk(copy)
    with pytest.raises(CorruptCacheError, match=r"belongs to another cache|manifest says"):
        ac.open(copy)[SITE][:]
    assert on_disk(copy) == before
    assert {problem.kind for problem in ac.open(copy, check=False).verify()} <= {"foreign", "size", "index"}


def test_the_index_of_another_cache_is_named_and_replaced(copy: Path, stranger: Path):
    right = (copy / "index.h5").read_bytes()
    shutil.copy(stranger / "index.h5", copy / "index.h5")
    (problem,) = ac.open(copy, check=False).verify()
    assert (problem.file, problem.kind, problem.sequences) == ("index.h5", "index", ())
    assert "not the manifest's" in problem.detail
    assert any(line.startswith("I1") for line in conformance.failures(copy))
    ac.open(copy)
    assert (copy / "index.h5").read_bytes() == right


def test_a_read_only_directory_without_an_index_is_read(copy: Path, monkeypatch: pytest.MonkeyPatch):
    (copy / "index.h5").unlink()
    copy.chmod(0o555)
    if os.access(copy, os.W_OK):  # root writes where it likes; the kernel's answer to others is put in its place
        real = h5py.File

        def refuse(name: Any, mode: str = "r", **rest: Any) -> Any:
            if mode != "r":
                raise PermissionError(13, "Permission denied", str(name))
            return real(name, mode, **rest)

        monkeypatch.setattr(h5py, "File", refuse)
    before = on_disk(copy)
    try:
        with pytest.warns(UserWarning, match="cannot be rebuilt .*Permission denied"):
            cache = ac.open(copy)
        assert len(cache[SITE][:]) == len(cache)
        assert on_disk(copy) == before
    finally:
        copy.chmod(0o755)


# --- no altered byte goes unfound -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of several CRC blocks each."""
    out = tmp_path_factory.mktemp("blocks") / "acts"
    rng = np.random.default_rng(0)
    rows = [{"input_ids": rng.integers(3, 96, 30).tolist(), "author": f"ä{i}"} for i in range(40)]
    small(out, rows, SITE, shard_rows=660, batch_tokens=300)
    return out


def affected(shard: Path, position: int) -> set[int]:
    """The sequences whose stored values the byte at `position` belongs to, by the layout that plain h5py names."""
    with h5py.File(shard) as file:
        sequence, starts = file["rows/sequence"][()], file["sequences/offsets"][()]
        for name in (f"sites/{SITE}", "rows/sequence", "rows/position"):
            dataset = file[name]
            start, size = dataset.id.get_offset(), dataset.id.get_storage_size()
            if start <= position < start + size:
                return {int(sequence[(position - start) // (size // len(dataset))])}
        ids = file["sequences/input_ids"].id
        if ids.get_offset() <= position < ids.get_offset() + ids.get_storage_size():
            token = (position - ids.get_offset()) // 4
            return {int(file.attrs["first_sequence"]) + int(np.searchsorted(starts, token, side="right")) - 1}
    return set()


def check_one_altered_byte(directory: Path, name: str, part: float, bit: int) -> None:
    path = directory / name
    sound = path.read_bytes()
    position = min(int(part * len(sound)), len(sound) - 1)
    hit = affected(path, position) if name.startswith("shard") else set()
    altered = bytearray(sound)
    altered[position] ^= 1 << bit
    path.write_bytes(bytes(altered))
    try:
        if name == "manifest.json":
            with pytest.raises(CorruptCacheError, match=r"manifest\.json"):
                _verify.verify(directory)
            return
        (problem,) = _verify.verify(directory)
        assert problem.file == name
        if name.startswith("shard"):
            assert hit <= set(problem.sequences)
            entry = next(e for e in store.read_manifest(directory)["shards"] if e["file"] == name)
            first, stop = entry["first_sequence"], entry["first_sequence"] + entry["sequences"]
            assert set(problem.sequences) <= set(range(first, stop))
            if len(problem.sequences) == 0:  # said to be harmless: then plain h5py reads what was written
                assert_reads_the_same(path, sound)
    finally:
        path.write_bytes(sound)


def assert_reads_the_same(path: Path, sound: bytes) -> None:
    twin = path.parent.parent / "sound.h5"
    twin.write_bytes(sound)
    with h5py.File(path) as altered, h5py.File(twin) as right:
        for name in (f"sites/{SITE}", "rows/sequence", "rows/position", "sequences/input_ids", "sequences/author"):
            assert np.array_equal(altered[name][()], right[name][()])


FILES = st.sampled_from(["shard-00000.h5", "shard-00001.h5", "manifest.json", "index.h5"])
ALTERED = {"name": FILES, "part": st.floats(0, 1, exclude_max=True), "bit": st.integers(0, 7)}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**ALTERED)
def test_any_altered_bit_of_any_file_is_found(
    name: str, part: float, bit: int, blocks: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(_examine, "PATIENCE", 4.0)  # some bytes send HDF5 into an endless loop
    check_one_altered_byte(blocks, name, part, bit)


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**ALTERED)
def test_any_altered_bit_of_any_file_is_found_many_times(
    name: str, part: float, bit: int, blocks: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(_examine, "PATIENCE", 4.0)
    check_one_altered_byte(blocks, name, part, bit)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(part=0.0, bit=0)
@given(part=st.floats(0, 0.2, exclude_max=True), bit=st.integers(0, 7))
def test_altered_structures_of_hdf5_are_found(part: float, bit: int, blocks: Path, monkeypatch: pytest.MonkeyPatch):
    """The first fifth of a file is mostly headers, trees and heaps, where HDF5 may crash or hang."""
    monkeypatch.setattr(_examine, "PATIENCE", 4.0)
    check_one_altered_byte(blocks, "shard-00000.h5", part, bit)


def test_a_byte_on_which_hdf5_hangs_is_found(made: Path, copy: Path, monkeypatch: pytest.MonkeyPatch):
    """A group's tree that points at itself: h5py never returns from it, verify does."""
    monkeypatch.setattr(_examine, "PATIENCE", 3.0)
    raw = bytearray((copy / SHARD).read_bytes())
    at = raw.index(b"TREE")
    for position in range(at + 4, at + 8):
        raw[position] ^= 0xFF
    (copy / SHARD).write_bytes(bytes(raw))
    (problem,) = ac.open(copy, check=False).verify()
    assert problem.file == SHARD
    assert "cannot be read" in problem.detail
    entry = store.read_manifest(made)["shards"][1]
    assert len(problem.sequences) == entry["sequences"]


def test_the_damage_is_told_by_dataset_rows_and_sequences(blocks: Path, tmp_path: Path):
    out = Path(shutil.copytree(blocks, tmp_path / "acts"))
    entry = store.read_manifest(out)["shards"][1]
    with h5py.File(out / SHARD) as file:
        site, position = (file[name].id.get_offset() for name in (f"sites/{SITE}", "rows/position"))
        width = file[f"sites/{SITE}"].shape[1] * 4
    alter(out / SHARD, site + 260 * width)
    alter(out / SHARD, position + 4 * 3)
    (problem,) = ac.open(out).verify()
    first = entry["first_row"]
    found = {part.dataset: part.rows for part in problem.damage}
    assert found == {
        "rows/position": ((first, first + 256),),
        f"sites/{SITE}": ((first + 256, first + min(512, entry["rows"])),),
    }
    rows = ac.open(blocks).rows["sequence"]
    assert set(problem.sequences) == set(rows[first : first + min(512, entry["rows"])].tolist())
    table = _verify.table([problem])
    assert f"    sites/{SITE}  rows {first + 256}-" in table
    assert f"{SHARD}  has altered bytes; sequences affected: {problem.sequences[0]}-{problem.sequences[-1]}" in table


# --- generated texts ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of generated tokens, with the texts beside it."""
    out = tmp_path_factory.mktemp("generated") / "acts"
    settings = {"max_new_tokens": 5, "batch_tokens": 40, "shard_rows": 30, "progress": False}
    ac.capture_generation(llama(), token_rows(9), SITE, out, **settings)
    return out


@settings(max_examples=30, deadline=None)
@given(data=st.data(), part=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_altered_bit_of_generated_texts_is_found(data: st.DataObject, part: float, bit: int, generated: Path):
    assert _verify.verify(generated) == []
    path = data.draw(st.sampled_from(sorted((generated / "generations").glob("[bm]*"))))
    sound = path.read_bytes()
    altered = bytearray(sound)
    altered[int(part * len(sound))] ^= 1 << bit
    path.write_bytes(bytes(altered))
    try:
        (problem,) = _verify.verify(generated)
        assert problem.file == f"generations/{path.name}"
        assert "run the same capture_generation again" in problem.detail
    finally:
        path.write_bytes(sound)


def test_a_missing_batch_of_generated_texts_is_named(generated: Path, tmp_path: Path):
    out = Path(shutil.copytree(generated, tmp_path / "acts"))
    (out / "generations" / "batch-00001.jsonl").unlink()
    (problem,) = _verify.verify(out)
    assert (problem.file, problem.kind) == ("generations/batch-00001.jsonl", "missing")
