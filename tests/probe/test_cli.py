"""The command line: every command on small inputs; errors are one line and exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from probe.cli import main
from probe.data import word_data
from tests.conftest import ROOT

COMMANDS = [
    "",
    "demo",
    "run",
    "capture",
    "generate",
    "cache",
    "cache info",
    "cache verify",
    "sae train",
    "sae eval",
    "patch",
    "experts",
    "edit apply",
    "edit show",
    "audit",
    "export",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert "usage: probe" in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    """Under a second is the promise; that no heavy module is imported is what keeps it."""
    code = """import sys
from probe.cli import main
try:
    main(["--help"])
except SystemExit:
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def files(tmp_path_factory, shared_data):
    """A real checkpoint, a few stories, questions and pairs, and a cache of them."""
    folder = tmp_path_factory.mktemp("cli")
    texts = json.loads((shared_data / "corpora" / "tinystories_1000.json").read_text())
    (folder / "stories.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[:40]))
    made = word_data(texts, "Lily", ["Tim", "Tom", "Ben", "Timmy", "Sam"], max_rows=24)
    for name in ("forget", "retain"):
        getattr(made, name).save(folder / f"{name}.jsonl")
    made.pairs.select(lambda pair: pair.wrong in ("Timmy", "Tim"))[:3].save(folder / "pairs.jsonl")
    model = str(shared_data / "stories260K")
    arguments = ["capture", model, "--data", str(folder / "stories.jsonl"), "--site", "blocks.1.hook_resid_post"]
    assert main([*arguments, "--out", str(folder / "acts"), "--max-length", "64"]) == 0
    return model, folder


def test_capture_then_info_and_verify(files, capsys):
    _, folder = files
    assert main(["cache", "info", str(folder / "acts")]) == 0
    assert "blocks.1.hook_resid_post" in capsys.readouterr().out
    assert main(["cache", "verify", str(folder / "acts")]) == 0
    assert "every byte" in capsys.readouterr().out


def test_generate_texts_and_then_their_activations(files, tmp_path, capsys):
    import activations_cache as ac

    model, _ = files
    (tmp_path / "prompts.jsonl").write_text('{"text": "Once upon a time", "n": 1}\n{"text": "Lily", "n": 2}\n')
    command = ["generate", model, "--data", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "g")]
    command += ["--max-new-tokens", "12", "--sample", "--temperature", "0.7", "--top-p", "0.9", "--samples", "2"]
    assert main(command) == 0
    assert "4 of 2 prompts" in capsys.readouterr().out
    texts = ac.Generations.load(tmp_path / "g").texts
    assert main([*command, "--site", "blocks.1.hook_resid_post", "--positions", "generated"]) == 0
    assert "blocks.1.hook_resid_post" in capsys.readouterr().out
    assert ac.Generations.load(tmp_path / "g").texts == texts
    cache = ac.open(tmp_path / "g")
    assert len(cache) == sum(len(row.ids) for row in ac.Generations.load(tmp_path / "g"))
    assert list(cache.sequences["n"]) == [1, 1, 2, 2]
    assert main([*command, "--seed", "1"]) == 2
    assert "setting seed (0 there, 1 asked for)" in capsys.readouterr().err
    assert main([*command[:6], "--out", str(tmp_path / "h"), "--temperature", "0.7"]) == 2
    assert "pass --sample" in capsys.readouterr().err


def test_generate_refuses_what_only_sites_use(files, tmp_path, capsys):
    model, folder = files
    command = ["generate", model, "--data", str(folder / "stories.jsonl"), "--out", str(tmp_path / "g")]
    for flag, value in (("--positions", "all"), ("--pool", "mean"), ("--dtype", "float16"), ("--shard-rows", "9")):
        assert main([*command, flag, value]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"probe: error: {flag}: of no effect without --site")
    assert not (tmp_path / "g").exists()


def test_the_notes_of_an_error_are_shown(files, tmp_path, capsys, monkeypatch):
    import activations_cache as ac
    from activations_cache.errors import CacheError

    def fails(*_args, **_settings):
        error = CacheError("the disk is full")
        error.add_note("1 of 5 shards are committed in acts;\nthe same capture with resume=True goes on")
        raise error

    monkeypatch.setattr(ac, "capture", fails, raising=False)
    model, folder = files
    command = ["capture", model, "--data", str(folder / "stories.jsonl"), "--site", "hook_embed"]
    assert main([*command, "--out", str(tmp_path / "new")]) == 2
    first, second = capsys.readouterr().err.splitlines()[-2:]
    assert first == "probe: error: the disk is full"
    assert second == "probe: note: 1 of 5 shards are committed in acts; the same command goes on"


def test_verify_exits_with_1_on_a_flipped_byte(files, tmp_path, capsys):
    import shutil

    _, folder = files
    shutil.copytree(folder / "acts", tmp_path / "acts")
    shard = next((tmp_path / "acts").glob("shard-*.h5"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert main(["cache", "verify", str(tmp_path / "acts")]) == 1
    assert shard.name in capsys.readouterr().out


def test_sae_from_the_command_line(files, tmp_path, capsys):
    _, folder = files
    site = ["--site", "blocks.1.hook_resid_post"]
    train = ["sae", "train", str(folder / "acts"), *site, "--out", str(tmp_path / "sae"), "--d-sae", "64", "--k", "4"]
    assert main([*train, "--tokens", "4096"]) == 0
    assert main(["sae", "eval", str(tmp_path / "sae"), "--cache", str(folder / "acts"), *site]) == 0
    assert "FVU" in capsys.readouterr().out


def test_patch_from_the_command_line(files, tmp_path, capsys):
    model, folder = files
    assert main(["patch", model, "--pairs", str(folder / "pairs.jsonl"), "--out", str(tmp_path / "s")]) == 0
    assert (tmp_path / "s" / "plot.html").is_file()
    assert "activation" in capsys.readouterr().out.lower()


def test_edit_apply_show_and_audit(files, tmp_path, capsys):
    import torch

    import probe
    from probe.targets import Direction

    model, folder = files
    loaded = probe.load(model)
    direction = Direction("blocks.4.hook_resid_post", torch.randn(64, generator=torch.Generator().manual_seed(0)))
    probe.editing.project_out(loaded, direction).save(tmp_path / "edit")
    assert main(["edit", "show", str(tmp_path / "edit")]) == 0
    apply = ["edit", "apply", "--base", model, "--edit", str(tmp_path / "edit"), "--out", str(tmp_path / "model")]
    assert main(apply) == 0
    assert main(apply) == 2  # the output exists
    assert "exists" in capsys.readouterr().err
    questions = ["--forget", str(folder / "forget.jsonl"), "--retain", str(folder / "retain.jsonl")]
    for what in (["--edit", str(tmp_path / "edit")], ["--edited", str(tmp_path / "model")]):
        audit = ["audit", "--base", model, *what, *questions, "--out", str(tmp_path / "card")]
        assert main([*audit, "--overwrite"]) == 0
    assert main(audit) == 2  # refused before anything is computed
    assert "--overwrite" in capsys.readouterr().err
    assert main(audit) == 2
    capsys.readouterr()
    assert main([*audit, "--overwrite"]) == 0
    assert "forget" in capsys.readouterr().out
    assert probe.audit.ReportCard.load(tmp_path / "card").to_df().shape[0] > 4


def test_experts_of_a_dense_model_is_one_clear_error(files, capsys):
    model, folder = files
    stories = str(folder / "stories.jsonl")
    assert main(["experts", model, "--forget", stories, "--retain", stories]) == 2
    assert "expert" in capsys.readouterr().err


def bad(files, tmp_path):
    model, folder = files
    empty, nowhere = tmp_path / "empty.txt", str(tmp_path / "nowhere")
    empty.write_text("")
    stories, site = str(folder / "stories.jsonl"), "blocks.1.hook_resid_post"
    return {
        "no model": ["capture", nowhere, "--data", stories, "--site", site, "--out", nowhere],
        "unknown site": ["capture", model, "--data", stories, "--site", "blocks.1.hook_resid_pots", "--out", nowhere],
        "empty data": ["capture", model, "--data", str(empty), "--site", site, "--out", nowhere],
        "no data": ["capture", model, "--data", nowhere, "--site", site, "--out", nowhere],
        "other settings": [
            "capture",
            model,
            "--data",
            stories,
            "--site",
            "blocks.2.hook_resid_post",
            "--out",
            str(folder / "acts"),
        ],
        "too long": [
            "capture",
            model,
            "--data",
            stories,
            "--site",
            site,
            "--out",
            nowhere,
            "--max-length",
            "9",
            "--overflow",
            "error",
        ],
        "no cache": ["cache", "info", nowhere],
        "no recipe": ["run", nowhere],
        "no edit": ["edit", "show", nowhere],
        "no questions": ["audit", "--base", model, "--edited", model, "--forget", nowhere, "--retain", nowhere],
    }


@pytest.mark.parametrize(
    "case",
    [
        "no model",
        "unknown site",
        "empty data",
        "no data",
        "other settings",
        "too long",
        "no cache",
        "no recipe",
        "no edit",
        "no questions",
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(case, files, tmp_path, capsys):
    before = {p: p.stat().st_mtime_ns for p in files[1].rglob("*") if p.is_file()}
    assert main(bad(files, tmp_path)[case]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in said if line.startswith("probe: error:")]
    assert len(errors) == 1
    assert said[-1] == errors[0]
    assert len(errors[0]) > 40
    assert {p: p.stat().st_mtime_ns for p in files[1].rglob("*") if p.is_file()} == before
    assert not (tmp_path / "nowhere").exists()


def test_the_near_sites_are_named(files, tmp_path, capsys):
    main(bad(files, tmp_path)["unknown site"])
    assert "blocks.1.hook_resid_post" in capsys.readouterr().err


def test_an_edit_to_apply_is_required(files, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["edit", "apply", "--base", files[0], "--out", str(tmp_path / "x")])
    assert stop.value.code == 2


def test_warnings_are_notes_of_one_line(files, tmp_path, capsys):
    model, folder = files
    capture = ["capture", model, "--data", str(folder / "stories.jsonl"), "--site", "blocks.0.hook_resid_post"]
    assert main([*capture, "--out", str(tmp_path / "a"), "--max-length", "16"]) == 0
    said = capsys.readouterr().err.strip().splitlines()
    assert [line for line in said if line.startswith("probe: note:") and "16 tokens" in line]
    assert not [line for line in said if "UserWarning" in line or "it/s" in line]


def test_debug_shows_the_traceback(tmp_path):
    from activations_cache.errors import ActivationsCacheError

    with pytest.raises(ActivationsCacheError):
        main(["cache", "info", str(tmp_path / "nowhere"), "--debug"])
