"""`probe organism`: what it writes is what an audit takes, and what cannot work is said before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import probe
from probe.audit import Case
from probe.cli import main
from probe.data import Questions
from probe.organisms import _training


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache folder, in which nothing may be trained."""

    def trains(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("it trains")

    monkeypatch.setenv("PROBE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(_training, "_step", trains)


def test_the_questions_are_those_of_the_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["organism", "facts", "--size", "small", "--out", str(tmp_path / "out")]) == 0
    sets = Case.of(probe.organisms.facts("small", progress=False), 0).sets
    written = {path.stem: list(Questions.load(path)) for path in (tmp_path / "out").iterdir()}
    assert written == {name: list(rows) for name, rows in sets.items()}
    assert not any(row.meta["deducible"] for row in written["forget"])
    assert written["deducible"] and all(row.meta["deducible"] for row in written["deducible"])
    assert "forget.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["facts", "--seed", "99999999999999999999"], "seed may be at most"),
        (["facts", "--device", "cuda:99"], "device"),
        (["facts", "--device", "nonsense"], "device must be"),
        (["facts", "--out", "/proc/x"], "--out /proc/x cannot be written to"),
        (["facts", "--path", "."], "--path is for tofu"),
        (["tofu"], "tofu needs --path"),
        (["magic"], "no 'magic'"),
    ],
)
@pytest.mark.usefixtures("untrained")
def test_what_cannot_work_is_one_line_before_training(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["organism", *arguments, "--size", "small"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("probe: error:") and message in said[-1]


def test_tofu_is_read_from_its_path(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["organism", "tofu", "--path", str(shared_data / "tofu"), "--size", "small"]) == 0
    assert "TofuOrganism" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["organism", "--help"])
    shown = capsys.readouterr().out
    assert "tofu" in shown and "--path" in shown
