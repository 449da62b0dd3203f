"""The conformance suite: another writer passes it, each requirement notices what breaks it, and it reads by blocks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import activations_cache as ac
from activations_cache import conformance, store
from activations_cache.errors import ConformanceError
from tests.activations_cache.caches import RESID, labelled_rows, small, token_rows
from tests.activations_cache.second_writer import read_cache, write_cache

SITE = "blocks.1.hook_resid_post"
SHARD = "shard-00001.h5"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "acts"
    small(out, labelled_rows(20), RESID)
    return out


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache by a writer that shares no code with the package."""
    out = tmp_path_factory.mktemp("second") / "acts"
    rng, ids = np.random.default_rng(0), token_rows(9)
    values = {f"site.{n}": [rng.normal(size=(len(row), 5)).astype("<f4") for row in ids] for n in range(2)}
    write_cache(out, ids, values, [f"ö{n % 3}" for n in range(9)])
    return out


# --- two writers, two readers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", conformance.REQUIREMENTS)
def test_another_writer_passes(name: str, second: Path):
    assert conformance.REQUIREMENTS[name](second) is None


def test_the_package_reads_what_another_writer_wrote(second: Path):
    index = (second / "index.h5").read_bytes()
    cache = ac.open(second)
    rows, places, ids = read_cache(second, "site.1")
    assert np.array_equal(cache["site.1"][:].numpy(), rows)
    assert list(zip(cache.rows["sequence"].tolist(), cache.rows["position"].tolist(), strict=True)) == places
    assert [row.tolist() for row in cache.sequences["input_ids"]] == ids
    assert list(cache.sequences["author"]) == [f"ö{n % 3}" for n in range(9)]
    assert (second / "index.h5").read_bytes() == index
    assert cache.verify() == []


def test_another_reader_reads_what_the_package_wrote(made: Path):
    rows, places, ids = read_cache(made, SITE)
    cache = ac.open(made)
    assert np.array_equal(rows, cache[SITE][:].numpy())
    assert places == list(zip(cache.rows["sequence"].tolist(), cache.rows["position"].tolist(), strict=True))
    assert ids == [row["input_ids"] for row in labelled_rows(20)]


# --- each requirement notices what breaks it ------------------------------------------------------------------------


def of_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def harm(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text())
        change(manifest)
        store.write_manifest(path, manifest)

    return harm


def of_shard(change: Callable[[h5py.File], Any]) -> Callable[[Path], None]:
    """Change a shard, and let the manifest agree on its size and checksum."""

    def harm(path: Path) -> None:
        with h5py.File(path / SHARD, "r+") as file:
            change(file)
        entry = {"bytes": (path / SHARD).stat().st_size, "sha256": store.file_sha256(path / SHARD)}
        of_manifest(lambda manifest: manifest["shards"][1].update(entry))(path)

    return harm


def of_index(change: Callable[[h5py.File], Any]) -> Callable[[Path], None]:
    def harm(path: Path) -> None:
        with h5py.File(path / "index.h5", "r+") as file:
            change(file)

    return harm


def replace(name: str, make: Callable[[Any], Any], **rest: Any) -> Callable[[h5py.File], None]:
    """Replace a dataset by one made from its values, with its attributes and, where it has blocks, the right CRCs."""

    def change(file: h5py.File) -> None:
        values, attributes = file[name][()], dict(file[name].attrs)
        del file[name]
        new = file.create_dataset(name, data=make(values), **rest)
        new.attrs.update(attributes)
        if "crc32" in attributes:
            new.attrs["crc32"] = np.uint32(conformance._running_crc(new))
        if f"crc/{name}" in file and rest.get("crc", True):
            file[f"crc/{name}"][...] = list(conformance._block_crcs(new[()], int(file.attrs["crc_rows"])))

    return change


def put(name: str, where: Any, value: Any) -> Callable[[h5py.File], None]:
    def change(values: Any) -> Any:
        values[where] = value
        return values

    return replace(name, change)


def repaired(manifest: dict[str, Any]) -> None:
    record = {"file": SHARD, "sha256_before": "0" * 64, "sha256": "1" * 64, "sequences": [], "libraries": {}}
    manifest["repaired"] = [{**record, "machine": {}, "time": "2026-01-01T00:00:00+00:00"}]


def latest_format(path: Path) -> None:
    with h5py.File(path / SHARD) as old, h5py.File(path / "new", "w", libver="latest") as new:
        new.attrs.update(old.attrs)
        for name in old:
            old.copy(name, new)
    (path / "new").replace(path / SHARD)
    of_shard(lambda file: None)(path)


BROKEN: dict[str, list[tuple[Callable[[Path], Any], str]]] = {
    "M1": [(of_manifest(lambda m: m.update(version=2)), "version is 2")],
    "M2": [(lambda p: (p / "manifest.json").open("ab").write(b" "), "not that of the file")],
    "M3": [
        (of_manifest(lambda m: m.pop("machine")), "lacks machine"),
        (of_manifest(lambda m: m["model"].pop("dtype")), "lacks model.dtype"),
    ],
    "M4": [
        (of_manifest(lambda m: m["sites"][0].update(aliases=[SITE])), "two names"),
        (of_manifest(lambda m: m["sites"][0].update(dtype="float8")), "float8"),
    ],
    "M5": [(of_manifest(lambda m: m.update(rows=3)), "rows is 3")],
    "M6": [
        (of_manifest(lambda m: m["settings"].update(pool="max")), "pool"),
        (of_manifest(lambda m: m["settings"].update(compression="zip")), "compression"),
        (of_manifest(lambda m: m["data"].update(token_columns={"position": {"kind": "int"}})), "reserved"),
        (of_manifest(lambda m: m["data"].update(token_columns={"tag": {"kind": "string"}})), "categories"),
    ],
    "M7": [(of_manifest(repaired), "not what its last repair left")],
    "S1": [(lambda p: (p / SHARD).unlink(), "missing"), (lambda p: (p / SHARD).open("ab").write(b"x"), "size")],
    "S2": [(of_shard(lambda f: f.attrs.update(first_row=0)), "first_row is")],
    "S3": [
        (of_shard(replace(f"sites/{SITE}", lambda v: v, chunks=True)), "not contiguous"),
        (of_shard(replace(f"sites/{SITE}", lambda v: v.astype("<f8"))), "no float32"),
        (of_shard(lambda f: f.create_dataset("sites/more", data=[1.0])), "holds"),
        (of_manifest(lambda m: m["settings"].update(compression="gzip")), "filters"),
    ],
    "S4": [(of_shard(put(f"sites/{SITE}", (2, 3), np.nan)), "no capture stores")],
    "S5": [(of_shard(put("sequences/input_ids", 0, -1)), "negative")],
    "S6": [
        (of_shard(put("rows/position", 0, 7)), "does not have|not in order"),
        (of_shard(replace("rows/position", lambda v: v.astype("<i8"))), "rows/position is int64"),
        (of_manifest(lambda m: m["settings"].update(positions="last")), "positions='last'"),
        (of_manifest(lambda m: m["settings"].update(pool="mean")), "pool='mean'"),
    ],
    "S7": [
        (of_manifest(lambda m: m["data"]["columns"].update(n="string")), "UTF-8"),
        (of_manifest(lambda m: m["data"]["columns"].pop("n")), "columns"),
        (of_manifest(lambda m: m["data"]["columns"].update(logprob="float")), "reserved"),
    ],
    "S8": [
        (of_shard(lambda f: f["crc/rows/position"].write_direct(np.array([7], "<u4"))), "CRCs of rows/position"),
        (of_shard(lambda f: f["sequences/author"].attrs.update(crc32=np.uint32(1))), "sequences/author"),
    ],
    "S9": [
        (of_manifest(lambda m: m["settings"].update(logprobs=True)), "lacks rows/logprob"),
        (of_manifest(lambda m: m["data"].update(token_columns={"tag": {"kind": "int"}})), "lacks rows/tag"),
    ],
    "S10": [(latest_format, "superblock")],
    "T1": [
        (of_shard(put(f"statistics/{SITE}/mean", 0, 99.0)), "mean is not"),
        (of_shard(lambda f: f[f"statistics/{SITE}"].attrs.update(norm_sum=0.0)), "norm_sum"),
        (of_manifest(lambda m: m["statistics"][SITE]["var"].reverse()), "var is not"),
    ],
    "I1": [
        (lambda p: (p / "index.h5").unlink(), "could not be checked"),
        (of_index(replace(f"sites/{SITE}", lambda v: v)), "not virtual"),
        (of_index(lambda f: f.attrs.update(finished=False)), "being finished"),
    ],
    "I2": [(of_index(put("sequences/offsets", 1, 0)), "do not add up")],
}  # fmt: skip


@pytest.mark.parametrize(("name", "number"), [(name, n) for name, harms in BROKEN.items() for n in range(len(harms))])
def test_each_requirement_notices_what_breaks_it(name: str, number: int, made: Path, tmp_path: Path):
    harm, message = BROKEN[name][number]
    out = Path(shutil.copytree(made, tmp_path / "acts"))
    harm(out)
    broken = dict(line.split(": ", 1) for line in conformance.failures(out))
    assert name in broken
    assert message in broken[name] or any(part in broken[name] for part in message.split("|"))


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of chosen positions, token columns and log-probabilities, compressed."""
    out = tmp_path_factory.mktemp("rich") / "acts"
    data = [
        {"input_ids": ids, "mask": [i % 2 == 0 for i in range(len(ids))], "tag": ["ab"[i % 2] for i in range(len(ids))]}
        for ids in token_rows(20)
    ]
    asked = {"positions": "mask", "token_columns": ["tag"], "logprobs": True, "compression": "gzip", "columns": []}
    small(out, data, SITE, **asked)
    return out


RICH: list[tuple[str, Callable[[Path], Any], str]] = [
    ("S9", of_shard(put("rows/tag", 1, 9)), "a number of no category"),
    ("S9", of_shard(put("rows/logprob", 1, 0.5)), "above 0|NaN elsewhere"),
    ("S9", of_shard(put("rows/logprob", slice(None), np.nan)), "NaN elsewhere than first"),
    ("S9", of_shard(replace("rows/logprob", lambda v: v.astype("<f8"))), "rows/logprob is float64"),
    ("S9", of_shard(lambda f: f["rows"].pop("tag")), "lacks rows/tag"),
    ("S3", of_shard(replace(f"sites/{SITE}", lambda v: v)), "filters"),
    ("S6", of_shard(put("rows/position", slice(None), 0)), "not in order"),
    ("S6", of_shard(put("rows/sequence", 0, 99)), "does not hold"),
    ("I1", of_index(lambda f: f["rows"].pop("logprob")), "logprob"),
    ("I1", of_index(lambda f: f["rows"].pop("tag")), "tag"),
]


@pytest.mark.parametrize("number", range(len(RICH)))
def test_requirements_on_what_few_caches_hold(number: int, rich: Path, tmp_path: Path):
    assert conformance.failures(rich) == []
    name, harm, message = RICH[number]
    out = Path(shutil.copytree(rich, tmp_path / "acts"))
    harm(out)
    broken = dict(line.split(": ", 1) for line in conformance.failures(out))
    assert any(part in broken[name] for part in message.split("|"))


def test_every_requirement_is_broken_by_something_and_stands_in_the_page(made: Path):
    assert set(BROKEN) == set(conformance.REQUIREMENTS)
    page = (Path(__file__).parents[2] / "docs" / "cache-format.md").read_text()
    assert [name for name in conformance.REQUIREMENTS if f"**{name}**" not in page] == []
    assert conformance.failures(made) == []


def test_harms_that_only_one_requirement_can_see(made: Path, tmp_path: Path):
    alone = [("M6", 0), ("M7", 0), ("S10", 0), ("I2", 0), ("M1", 0), ("M2", 0), ("M3", 0), ("S9", 0)]
    for name, number in alone:
        out = Path(shutil.copytree(made, tmp_path / f"{name}-{number}"))
        BROKEN[name][number][0](out)
        found = {line.split(":")[0] for line in conformance.failures(out)}
        assert name in found
        assert found <= {name, "S6", "I1"}, (name, found)


def test_a_manifest_with_nan_is_no_json(made: Path, tmp_path: Path):
    out = Path(shutil.copytree(made, tmp_path / "acts"))
    text = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(text.replace('"rows": ', '"nothing": NaN, "rows": ', 1))
    with pytest.raises(ConformanceError, match="NaN, which is no JSON"):
        conformance.REQUIREMENTS["M1"](out)


@pytest.mark.parametrize("size", [1, 100, 4096])
def test_reading_by_small_blocks_finds_the_same(size: int, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(conformance, "BLOCK_BYTES", size)
    assert conformance.failures(made) == []
    out = Path(shutil.copytree(made, tmp_path / "acts"))
    of_shard(put(f"sites/{SITE}", (-1, 3), np.inf))(out)
    assert {"S4", "T1"} <= {line.split(":")[0] for line in conformance.failures(out)}


def test_the_command_prints_a_line_per_requirement(made: Path, tmp_path: Path):
    command = [sys.executable, "-m", "activations_cache.conformance"]
    sound = subprocess.run([*command, str(made)], capture_output=True, text=True, check=True)
    assert [line.split()[:2] for line in sound.stdout.splitlines()] == [[n, "ok"] for n in conformance.REQUIREMENTS]
    out = Path(shutil.copytree(made, tmp_path / "acts"))
    (out / "index.h5").unlink()
    broken = subprocess.run([*command, str(out)], capture_output=True, text=True, check=False)
    assert broken.returncode == 1
    assert {line.split()[0] for line in broken.stdout.splitlines() if line.split()[1] == "FAILED"} == {"I1", "I2"}
    assert subprocess.run([*command, str(out / "no")], capture_output=True, check=False).returncode == 2
