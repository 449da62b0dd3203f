"""The files of a cache: storage types, reading, shuffling, verification, and every way to be malformed."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import activations_cache as ac
from activations_cache import conformance, store
from activations_cache.errors import CacheError, CacheLockedError, CorruptCacheError, DataError, SiteError
from activations_cache.plan import Shard
from activations_cache.positions import select
from activations_cache.tokens import Tokens
from tests.activations_cache.caches import RESID, contents, labelled_rows, small

SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache of several shards; do not change it."""
    out = tmp_path_factory.mktemp("made") / "acts"
    small(out, labelled_rows(40), RESID)
    return out


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to be harmed."""
    return Path(shutil.copytree(made, tmp_path / "acts"))


# --- storage --------------------------------------------------------------------------------------------------------


def allocated(spec: store.SiteSpec, ids: list[list[int]], first: int = 0) -> store.ShardBuffer:
    """A buffer for the sequences from `first` on, all their positions."""
    tokens = Tokens.from_rows(ids)
    rows = sum(map(len, ids[first:]))
    shard = Shard(0, first, len(ids) - first, 0, rows, rows, ())
    return store.ShardBuffer.allocate([spec], shard, tokens, select(tokens, "all"), {})


def test_bfloat16_is_a_real_type_that_plain_h5py_reads(tmp_path: Path):
    values = torch.tensor([[1.0, -2.5, 3e38, 1e-30], [0.0, -0.0, 65280.0, 1 / 3]], dtype=torch.bfloat16)
    spec = store.SiteSpec("s", "bfloat16", (4,))
    buffer = allocated(spec, [[1, 2]])
    buffer.put("s", [0], values.view(torch.int16).numpy().view("<u2"))
    store.write_shard(tmp_path, "shard-00000.h5", buffer, [spec], "id")
    with h5py.File(tmp_path / "shard-00000.h5") as file:
        dataset = file["sites/s"]
        assert dataset.dtype == np.float32
        assert dataset.id.get_type().get_size() == 2
        assert np.array_equal(dataset[:], values.float().numpy())
        assert np.array_equal(np.signbit(dataset[:]), np.signbit(values.float().numpy()))


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_rows_lie_in_sequence_order_whatever_the_batches(order: list[int]):
    spec = store.SiteSpec("s", "float32", (1,))
    ids = [[1], [2, 3, 4], [5, 6]]
    buffer = allocated(spec, [[9]] * 7 + ids, first=7)
    for number in order:
        buffer.put("s", [7 + number], np.array([[float(token)] for token in ids[number]]))
    assert buffer.sites["s"].ravel().tolist() == [1, 2, 3, 4, 5, 6]
    assert buffer.row_sequence().tolist() == [7, 8, 8, 8, 9, 9]
    assert buffer.fields["position"].tolist() == [0, 0, 1, 2, 0, 1]


def test_the_same_capture_gives_the_same_bytes(made: Path, tmp_path: Path):
    small(tmp_path / "again", labelled_rows(40), RESID)
    assert contents(tmp_path / "again") == contents(made)


def test_a_second_writer_is_refused(tmp_path: Path):
    with store.writer_lock(tmp_path):
        with pytest.raises(CacheLockedError, match=f"another process .pid {os.getpid()}. is writing"):
            small(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert small(tmp_path).finished


# --- reading --------------------------------------------------------------------------------------------------------


def everything(path: Path) -> np.ndarray:
    """The whole site by plain h5py."""
    parts = []
    for shard in sorted(path.glob("shard-*.h5")):
        with h5py.File(shard) as file:
            parts.append(file["sites"][SITE][:])
    return np.concatenate(parts)


def test_rows_by_slice_number_list_and_mask(made: Path):
    cache, plain = ac.open(made), everything(made)
    view, mask = cache[SITE], np.arange(len(plain)) % 7 == 3
    assert view.shape == plain.shape
    assert view.dtype == torch.float32
    assert len(cache) == len(view) == len(plain)
    keys = [
        slice(None),
        slice(5, 60),
        slice(-9, None),
        slice(9, 3),
        slice(0, 99, 7),
        slice(None, None, -1),
        slice(50, 9**9),
    ]
    keys += [
        0,
        -1,
        np.int64(3),
        [5, 2, 2, -1],
        range(4),
        np.array([[1, 2], [3, 4]]),
        torch.tensor([7, 1]),
        mask,
    ]
    for key in keys:
        numpy_key = np.asarray(key) if isinstance(key, tuple | range | torch.Tensor) else key
        assert np.array_equal(view[key].numpy(), plain[numpy_key]), key
    for wrong in ((1, 2), (slice(0, 2), 3), True, np.zeros(0, bool)):  # numpy's meanings of these are none of a row's
        with pytest.raises(DataError):
            view[wrong]
    assert view[[]].shape == (0, 32)
    assert torch.equal(view[torch.from_numpy(mask)], view[mask])


@pytest.mark.parametrize("rows", [10**6, -(10**6), [0, 10**6], 1.5, "x", None, [0.5], [True], np.zeros((2, 2), bool)])
def test_rows_that_are_none_are_refused(rows: Any, made: Path):
    with pytest.raises(DataError, match="row"):
        ac.open(made)[SITE][rows]


def test_unknown_sites_and_columns_list_what_there_is(made: Path):
    cache = ac.open(made)
    with pytest.raises(SiteError, match=r"blocks.1.hook_resid_pots.*did you mean blocks.1.hook_resid_post"):
        cache["blocks.1.hook_resid_pots"]
    with pytest.raises(DataError, match=r"no label column 'sex'.*'author'"):
        cache.labels("sex")
    with pytest.raises(KeyError, match="position"):
        cache.rows["posotion"]
    with pytest.raises(TypeError, match=r"cache\.batches"):
        iter(cache[SITE])
    assert SITE in cache
    assert "blocks.1.hook_out" in cache
    assert "other" not in cache


def test_labels_rows_and_sequences_go_together(made: Path):
    cache, rows = ac.open(made), labelled_rows(40)
    assert cache.rows["token"].tolist() == [token for row in rows for token in row["input_ids"]]
    assert cache.labels("toxic").dtype == bool
    for number in (0, 17, len(cache) - 1):
        source = rows[cache.rows["sequence"][number]]
        assert cache.labels("author")[number] == source["author"]
        assert cache.labels("score")[number] == source["score"]
        assert cache.tokens(number).tolist() == source["input_ids"]
    assert [len(ids) for ids in cache.sequences["input_ids"]] == cache.sequences["length"].tolist()
    assert set(cache.sequences) == {"input_ids", "length", "author", "toxic", "n", "score"}
    assert cache.n_sequences == 40


def test_info_shows_model_data_and_size(made: Path):
    cache = ac.open(made)
    text, page = cache.info(), cache._repr_html_()
    for shown in ("LlamaForCausalLM", "40 sequences", f"{len(cache)} in", "author (string)", SITE, "[32]", "finished"):
        assert shown in text
        assert shown.split()[0] in page
    assert cache.model.weights_hash[:12] in text
    assert str(len(cache)) in repr(cache)


# --- batches --------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_batches_through_the_cache_hold_the_chosen_rows(data: st.DataObject, made: Path):
    cache = ac.open(made)
    rows = data.draw(st.lists(st.integers(0, len(cache) - 1), min_size=1, max_size=50, unique=True))
    drawn = torch.cat(
        list(cache.batches(SITE, 7, seed=data.draw(st.integers(-5, 2**70)), dtype=torch.float64, rows=rows))
    )
    expected = cache[SITE][sorted(rows)].double()
    assert drawn.dtype == torch.float64
    assert torch.equal(drawn[drawn[:, 0].argsort()], expected[expected[:, 0].argsort()])


# --- malformed directories ------------------------------------------------------------------------------------------


def edit_manifest(path: Path, **changes: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    store.write_manifest(path, {**manifest, **changes})


def swap_shards(path: Path) -> None:
    """Exchange two shards of equal size, so that sizes alone do not tell."""
    manifest = json.loads((path / "manifest.json").read_text())
    first, second = path / "shard-00000.h5", path / "shard-00001.h5"
    first.rename(path / "x")
    second.rename(first)
    (path / "x").rename(second)
    sizes = [first.stat().st_size, second.stat().st_size]
    for entry, size in zip(manifest["shards"], sizes, strict=False):
        entry["bytes"] = size
    edit_manifest(path, shards=manifest["shards"])


def foreign_shard(path: Path) -> None:
    other = small(path.parent / "other", labelled_rows(40, seed=5), RESID)
    shutil.copy(other.path / "shard-00000.h5", path / "shard-00000.h5")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["shards"][0]["bytes"] = (path / "shard-00000.h5").stat().st_size
    edit_manifest(path, shards=manifest["shards"])


def link_out(path: Path) -> None:
    (path / "shard-00001.h5").rename(path.parent / "elsewhere.h5")
    (path / "shard-00001.h5").symlink_to(path.parent / "elsewhere.h5")


def flip(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 0x10
    path.write_bytes(bytes(raw))


MALFORMED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "has no manifest.json"),
    "no JSON": (lambda p: (p / "manifest.json").write_text("{"), "is no JSON"),
    "no object": (lambda p: (p / "manifest.json").write_text("[]"), "not the manifest of an activations cache"),
    "wrong version": (lambda p: edit_manifest(p, version=99), "format version 99; this package reads version 1"),
    "wrong format": (lambda p: edit_manifest(p, format="zarr"), "not the manifest of an activations cache"),
    "altered manifest": (lambda p: flip(p / "manifest.json", 400), "altered after it was written|no JSON"),
    "rows that do not add up": (lambda p: edit_manifest(p, rows=7), "promises 7 rows"),
    "a lost shard entry": (lambda p: edit_manifest(p, shards=[]), "its shards hold 0"),
    "a shard outside": (
        lambda p: edit_manifest(
            p,
            shards=[{**e, "file": "../" + e["file"]} for e in json.loads((p / "manifest.json").read_text())["shards"]],
        ),
        "must lie in the cache directory itself",
    ),
    "missing shard": (lambda p: (p / "shard-00001.h5").unlink(), r"shard-00001.h5 is missing; sequences \d+ to \d+"),
    "empty shard": (lambda p: (p / "shard-00001.h5").write_bytes(b""), r"shard-00001.h5 is empty; sequences"),
    "truncated shard": (lambda p: os.truncate(p / "shard-00002.h5", 5000), "shard-00002.h5 has 5000 bytes"),
    "link out": (link_out, "is a link out of the directory"),
    "swapped shards": (swap_shards, "is not the shard that belongs there|cannot be read"),
    "foreign shard": (foreign_shard, "belongs to another cache"),
    "shard of other bytes": (
        lambda p: (p / "shard-00000.h5").write_bytes(b"x" * (p / "shard-00000.h5").stat().st_size),
        "cannot be read as HDF5",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_directories_are_refused(name: str, copy: Path):
    harm, message = MALFORMED[name]
    harm(copy)
    with pytest.raises(CorruptCacheError, match=message):
        ac.open(copy)[SITE][:]
    assert conformance.failures(copy) != []


def test_no_directory_is_a_cache_error(tmp_path: Path):
    with pytest.raises(CacheError, match="there is no such directory"):
        ac.open(tmp_path / "nowhere")


def test_a_damaged_cache_opens_unchecked_and_reads_the_rest(copy: Path):
    (copy / "shard-00001.h5").unlink()
    cache = ac.open(copy, check=False)
    entry = cache.manifest["shards"][1]
    assert len(cache[SITE][: entry["first_row"]]) == entry["first_row"]
    with pytest.raises(CorruptCacheError, match="is missing"):
        cache[SITE][entry["first_row"]]
    with h5py.File(copy / "index.h5") as index:
        hole = index["sites"][SITE][entry["first_row"] : entry["first_row"] + entry["rows"]]
        assert np.isnan(hole).all()
        assert (index["rows/sequence"][entry["first_row"] : entry["first_row"] + entry["rows"]] == -1).all()
        last = index["sites"][SITE][entry["first_row"] + entry["rows"] :]
        assert np.isfinite(last).all()


# --- index and verification -----------------------------------------------------------------------------------------


def test_a_missing_or_foreign_index_is_rebuilt(copy: Path, tmp_path: Path):
    original = (copy / "index.h5").read_bytes()
    other = small(tmp_path / "other", labelled_rows(9, seed=5), RESID)
    harms = [lambda index: index.unlink(), lambda index: shutil.copy(other.path / "index.h5", index)]
    harms += [lambda index: index.write_bytes(b"no HDF5")]
    for harm in harms:
        harm(copy / "index.h5")
        ac.open(copy)
        assert (copy / "index.h5").read_bytes() == original


def test_opening_unchecked_writes_nothing(copy: Path):
    (copy / "index.h5").write_bytes(b"no HDF5")
    (problem,) = ac.open(copy, check=False).verify()
    assert problem.kind == "index"
    assert (copy / "index.h5").read_bytes() == b"no HDF5"


def test_batches_come_in_the_type_that_was_asked_for(made: Path):
    cache = ac.open(made)
    assert next(iter(cache.batches(SITE, 4, dtype="float64"))).dtype == torch.float64
    assert next(iter(cache.batches(SITE, 4))).dtype == torch.float32
    with pytest.raises(DataError, match="name of one; got 'float99'"):
        cache.batches(SITE, 4, dtype="float99")


def test_a_moved_cache_stays_right(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plain = everything(copy)
    moved = copy.rename(tmp_path / "moved")
    decoy = tmp_path / "decoy"
    decoy.mkdir()
    for shard in moved.glob("shard-*.h5"):
        (decoy / shard.name).write_bytes(b"not this one")
    monkeypatch.chdir(decoy)
    with h5py.File(moved / "index.h5") as index:
        assert np.array_equal(index["sites"][SITE][:], plain)
    assert np.array_equal(ac.open(moved)[SITE][:].numpy(), plain)


def test_a_stale_index_that_cannot_be_rebuilt_is_only_a_warning(copy: Path, monkeypatch: pytest.MonkeyPatch):
    (copy / "index.h5").unlink()

    def read_only(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("activations_cache._index.write_index", read_only)
    with pytest.warns(UserWarning, match=r"cannot be rebuilt.*Read-only"):
        cache = ac.open(copy)
    assert len(cache[SITE][:]) == len(cache)


def test_verify_finds_nothing_wrong_with_a_sound_cache(made: Path):
    assert ac.open(made).verify() == []
    assert conformance.failures(made) == []


def test_verify_names_the_sequences_of_a_flipped_value(copy: Path):
    cache = ac.open(copy)
    entry, row = cache.manifest["shards"][1], cache.manifest["shards"][1]["first_row"]
    with h5py.File(copy / entry["file"]) as file:
        offset = file["sites"][SITE].id.get_offset()
    flip(copy / entry["file"], offset + 3)
    (problem,) = cache.verify()
    assert (problem.file, problem.kind) == (entry["file"], "altered")
    assert f"sites/{SITE}" in problem.detail
    assert cache.rows["sequence"][row] in problem.sequences
    assert set(problem.sequences) <= set(range(entry["first_sequence"], entry["first_sequence"] + entry["sequences"]))


def test_verify_narrows_the_damage_to_a_block_of_rows(tmp_path: Path):
    cache = small(tmp_path / "acts", [[7] * 30] * 30, SITE, shard_rows=900, batch_tokens=300)
    with h5py.File(cache.path / "shard-00000.h5") as file:
        offset = file["sites"][SITE].id.get_offset()
    flip(cache.path / "shard-00000.h5", offset + 300 * 32 * 4)  # row 300, in the block of rows 256 to 511
    (problem,) = cache.verify()
    assert problem.sequences == tuple(range(8, 18))  # sequences 8 (rows 240 to 269) to 17 (510 to 539)
    assert "10 sequences affected, between 8 and 17" in str(problem)


@pytest.mark.parametrize("part", [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
@pytest.mark.parametrize("name", ["shard-00000.h5", "index.h5"])
def test_verify_finds_a_flipped_byte_anywhere(name: str, part: float, copy: Path):
    cache = ac.open(copy)
    flip(copy / name, int((copy / name).stat().st_size * part))
    (problem,) = cache.verify()
    assert problem.file == name


def test_verify_names_missing_truncated_and_swapped_files(copy: Path):
    cache = ac.open(copy)
    (copy / "shard-00000.h5").unlink()
    os.truncate(copy / "shard-00001.h5", 0)
    shutil.copy(copy / "shard-00003.h5", copy / "shard-00002.h5")
    (copy / "index.h5").unlink()
    found = {problem.file: problem for problem in cache.verify()}
    assert found["shard-00000.h5"].kind == "missing"
    assert found["shard-00001.h5"].kind == "size"
    assert "is empty" in found["shard-00001.h5"].detail
    assert found["shard-00002.h5"].kind in ("size", "foreign")
    assert found["index.h5"].kind == "index"
    assert len(found) == 4


@pytest.mark.parametrize("name", conformance.REQUIREMENTS)
def test_each_requirement_holds(name: str, made: Path):
    assert conformance.REQUIREMENTS[name](made) is None


def break_values(path: Path) -> None:
    """Write a NaN into a shard and make everything else agree with it, but for the CRC."""
    with h5py.File(path / "shard-00000.h5", "r+") as file:
        file["sites"][SITE][0, 0] = np.nan


def rename_column(path: Path, old: str, new: str) -> None:
    """Rename a label column in every shard and in the manifest."""
    manifest = store.read_manifest(path)
    columns = manifest["data"]["columns"]
    columns[new] = columns.pop(old)
    for entry in manifest["shards"]:
        with h5py.File(path / entry["file"], "r+") as file:
            file["sequences"].move(old, new)
        entry["bytes"] = (path / entry["file"]).stat().st_size
    store.write_manifest(path, manifest)


def test_a_column_of_a_reserved_name_breaks_the_format_and_is_read_as_the_column(copy: Path):
    authors = list(ac.open(copy).labels("author"))
    rename_column(copy, "author", "length")
    assert any(line.startswith("S7") and "reserved" in line for line in conformance.failures(copy))
    assert list(ac.open(copy).labels("length")) == authors


def test_requirements_notice_what_only_they_can(copy: Path):
    break_values(copy)
    broken = {line.split(":")[0] for line in conformance.failures(copy)}
    assert {"S1", "S4", "S8", "T1"} <= broken
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(ac.open(copy)) > 0  # opening does not read the data; verify does
    assert ac.open(copy).verify()[0].kind == "altered"
