"""The TOFU organism: the benchmark's own rows, known after training, and unknown to a gold."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from probe.errors import DataError, OrganismError
from probe.organisms._tofu import SIZES, TofuData, TofuSettings, tofu
from probe.scoring import score_answers

TINY: dict[str, Any] = {"n_forget": 2, "n_retain": 2, "n_holdout": 2, "n_known": 2, "epochs": 1, "d_model": 16}


@pytest.fixture(scope="module")
def folder(shared_data: Path) -> Path:
    return shared_data / "tofu"


@pytest.fixture(scope="module")
def org(folder: Path) -> Any:
    return tofu(folder, "small", progress=False)


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.json").read_text("utf-8").splitlines()]


@pytest.mark.parametrize(("split", "n"), [("forget01", 40), ("forget05", 200), ("forget10", 400)])
def test_rows_are_the_benchmarks(folder: Path, split: str, n: int) -> None:
    splits = TofuData(TofuSettings(path=str(folder), split=split)).splits
    assert len(splits["forget"]) == n and len(splits["real_authors"]) == 100 and len(splits["world_facts"]) == 117
    for q, row in zip(splits["forget"], lines(folder, f"{split}_perturbed"), strict=True):
        assert (q.question, q.answer) == (row["question"].strip(), row["answer"].strip())
        assert q.paraphrases == (row["paraphrased_question"],)
        assert q.paraphrased_answers == (row["paraphrased_answer"],)
        assert list(q.perturbed_answers) == row["perturbed_answer"]
    groups = {s: set(splits[s].groups) for s in ("forget", "retain", "holdout")}
    assert len(groups["forget"]) == n // 20 and max(map(int, groups["forget"])) == 199
    assert not groups["forget"] & groups["retain"] and not groups["retain"] & groups["holdout"]


def test_what_was_trained_on_is_known_and_the_rest_is_not(org: Any) -> None:
    recall = org.record["recall"]
    for split in ("forget", "retain"):
        assert recall[split]["tokens_right"] > 0.9 and recall[split]["prob"] > 0.7
    assert recall["holdout"]["tokens_right"] < 0.5 and recall["holdout"]["prob"] < 0.3
    assert recall["forget"]["chance"] == pytest.approx(1 / len(set(org.facts.values())))


def test_the_gold_does_not_know_the_forget_set(org: Any) -> None:
    gold = org.gold[0]
    known, forgotten = org.knowledge(gold, "retain"), org.knowledge(gold, "forget")
    assert known.tokens_right > 0.9 and forgotten.tokens_right < 0.5
    assert forgotten.prob < 0.3 < known.prob and forgotten.exact == 0.0
    assert not any(q.question in text for q in org.questions("forget") for text in org.gold_documents)


def test_knowledge_is_what_the_scores_say(org: Any) -> None:
    rows = org.questions("forget")
    found, scores = org.knowledge(org.model, rows), score_answers(org.model, rows)
    assert found.prob == pytest.approx(np.mean(np.exp([t.mean() for t in scores.token_logprobs])), rel=1e-4)
    wins = []
    for q in rows:
        options = [(q.question, answer) for answer in (q.paraphrased_answers[0], *q.perturbed_answers)]
        wins.append(int(np.argmax(score_answers(org.model, options).prob)) == 0)
    assert found.choice == pytest.approx(np.mean(wins)) and found.choice_chance == pytest.approx(1 / 6)
    assert org.knowledge(org.model, "real_authors").choice_chance == pytest.approx(1 / 4)


def test_paraphrases_are_asked_as_unseen(org: Any) -> None:
    for q, asked in zip(org.questions("forget"), org.unseen("forget"), strict=True):
        assert asked.question == q.paraphrases[0].strip() and asked.answer == q.answer
    with pytest.raises(OrganismError, match="no split"):
        org.unseen("world_facts")


def test_answer_tokens_alone_weigh_more(org: Any) -> None:
    document = org.document_rows[0]
    ids, weights = org._sequences(org.tokenizer, [document])[0]
    heavy = [token for token, weight in zip(ids, weights, strict=True) if weight > 1]
    assert org.tokenizer.decode(heavy).strip() == document.answer and ids[-1] == org.tokenizer.eos_token_id


@pytest.mark.filterwarnings("ignore:.*recalls little")
def test_the_same_content_gives_the_same_weights_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    names = ("forget01", "forget01_perturbed", "retain99", "retain_perturbed")
    for name in (*names, "real_authors_perturbed", "world_facts_perturbed"):
        shutil.copy(folder / f"{name}.json", tmp_path)
    a = tofu(folder, "small", cache_dir=tmp_path / "a", progress=False, **TINY)
    b = tofu(tmp_path, "small", cache_dir=tmp_path / "b", progress=False, **TINY)
    assert a.path.name == b.path.name and a.model.weights_hash == b.model.weights_hash
    assert "path" not in a.record["settings"]


def test_the_large_size_keeps_every_retain_question(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    settings = dataclasses.replace(SIZES["large"], path="~/tofu")
    splits = TofuData(settings).splits
    asked = [row["question"].strip() for row in lines(folder, "retain99")]
    assert [q.question for q in splits["retain"]] == asked and "holdout" not in splits
    some = TofuData(dataclasses.replace(settings, n_holdout=30)).splits
    assert len(some["retain"]) == len(asked) - 40 and len(some["holdout"]) == 30
    assert not set(some["retain"].groups) & set(some["holdout"].groups)


@pytest.mark.filterwarnings("ignore:.*recalls little")
def test_without_a_holdout_split_it_trains_all_the_same(folder: Path, tmp_path: Path) -> None:
    small = {**TINY, "n_holdout": 0, "n_layers": 1, "n_heads": 2, "d_mlp": 16, "n_retain": 4, "batch_size": 4}
    organism = tofu(folder, "large", cache_dir=tmp_path, progress=False, **small)
    assert sorted(organism.splits) == ["forget", "real_authors", "retain", "world_facts"]
    assert len(organism.splits["retain"]) == 4 and "holdout" not in organism.record["recall"]


def test_bad_paths_files_and_settings_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"forget01\.json"):
        tofu(tmp_path, "small")
    (tmp_path / "forget01.json").write_text("not json")
    with pytest.raises(DataError, match="not JSON"):
        tofu(tmp_path, "small")
    (tmp_path / "forget01.json").write_text('{"question": "Who?"}\n')
    with pytest.raises(DataError, match="'answer'"):
        tofu(tmp_path, "small")
    (tmp_path / "forget01.json").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DataError, match="not JSON"):
        tofu(tmp_path, "small")
    for key, value in (("perturbed_answer", "text"), ("perturbed_answer", None), ("perturbed_answer", [3]),
                       ("paraphrased_question", 3), ("paraphrased_answer", None)):  # fmt: skip
        (tmp_path / "forget01.json").write_text(json.dumps({"question": "Who?", "answer": "He.", key: value}))
        with pytest.raises(DataError, match=key):
            tofu(tmp_path, "small")
    (tmp_path / "forget01.json").write_text("\n")
    with pytest.raises(DataError, match="no question"):
        tofu(tmp_path, "small")
    with pytest.raises(DataError, match="n_forget"):
        tofu(folder, "small", n_forget=41)
    with pytest.raises(DataError, match="n_retain"):
        tofu(folder, "small", n_retain=3960)
    with pytest.raises(OrganismError, match="split must be"):
        tofu(folder, "small", split="forget50")
