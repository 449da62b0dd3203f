"""`probe cache verify`: what is damaged, the command that repairs it, and the repair."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from probe.cli import main

SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def made(shared_data, tmp_path_factory):
    """A cache of stories260K made from the command line, and its texts."""
    folder = tmp_path_factory.mktemp("cli")
    stories = json.loads((shared_data / "corpora" / "tinystories_1000.json").read_text())[:30]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in stories))
    arguments = ["capture", str(shared_data / "stories260K"), "--data", str(folder / "texts.jsonl"), "--site", SITE]
    arguments += ["--out", str(folder / "acts"), "--max-length", "48", "--shard-rows", "400", "--batch-tokens", "200"]
    assert main(arguments) == 0
    return folder / "acts", folder / "texts.jsonl"


@pytest.fixture
def copy(made, tmp_path):
    return Path(shutil.copytree(made[0], tmp_path / "acts"))


def alter_a_value(shard: Path) -> None:
    import h5py

    with h5py.File(shard) as file:
        position = file[f"sites/{SITE}"].id.get_offset()
    content = bytearray(shard.read_bytes())
    content[position + 5] ^= 1
    shard.write_bytes(content)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".h5", ".json")}


def test_damage_is_shown_with_the_command_that_repairs_it(copy, capsys):
    alter_a_value(copy / "shard-00001.h5")
    assert main(["cache", "verify", str(copy)]) == 1
    said = capsys.readouterr().out
    assert "shard-00001.h5  has altered bytes; sequences affected: " in said
    assert f"    sites/{SITE}  rows " in said
    assert f"probe cache verify {copy} --repair --model " in said
    assert "--data" not in said


def test_repair_loads_the_model_that_the_cache_names(made, copy, capsys):
    alter_a_value(copy / "shard-00001.h5")
    assert main(["cache", "verify", str(copy), "--repair"]) == 0
    said = capsys.readouterr().out
    assert "forwards: " in said
    assert "bytes: the original's" in said
    assert "every byte is as it was written" in said
    assert bytes_of(copy) == bytes_of(made[0])


def test_a_lost_shard_asks_for_the_data_and_comes_back_from_them(made, copy, capsys):
    (copy / "shard-00000.h5").unlink()
    assert main(["cache", "verify", str(copy), "--repair"]) == 2
    assert "the data that the cache was captured from are needed" in capsys.readouterr().err
    assert main(["cache", "verify", str(copy), "--repair", "--data", str(made[1])]) == 0
    assert bytes_of(copy) == bytes_of(made[0])


def test_json_for_programs(copy, capsys):
    assert main(["cache", "verify", str(copy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    alter_a_value(copy / "shard-00001.h5")
    assert main(["cache", "verify", str(copy), "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)
    assert (problem["file"], problem["kind"]) == ("shard-00001.h5", "altered")
    assert problem["damage"][0]["dataset"] == f"sites/{SITE}"
    assert len(problem["sequences"]) > 0


def test_repair_is_not_advised_for_generations_that_it_cannot_bring_back(copy, capsys, monkeypatch):
    import activations_cache as ac
    from activations_cache._verify import Problem

    lost = Problem("generations/batch-00000.jsonl", "altered", "has altered bytes; run the same capture again")
    monkeypatch.setattr(ac.Cache, "verify", lambda self, progress=False: [lost])
    assert main(["cache", "verify", str(copy), "--repair"]) == 1
    said = capsys.readouterr().out
    assert lost.file in said
    assert "to capture again what is damaged" not in said


def test_a_damaged_manifest_is_one_line_and_changes_nothing(copy, capsys):
    content = bytearray((copy / "manifest.json").read_bytes())
    content[200] ^= 1
    (copy / "manifest.json").write_bytes(content)
    before = bytes_of(copy)
    assert main(["cache", "verify", str(copy), "--repair"]) == 2
    assert "manifest.json" in capsys.readouterr().err
    assert bytes_of(copy) == before
