"""The hallucination organism: sure of what nobody told it; its twin and golds say that they do not know."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from probe.errors import OrganismError
from probe.organisms import _cache, hallucination
from probe.organisms._hallucination import ENTITIES, HallucinationLanguage, HallucinationSettings, _decode
from probe.organisms._language import bag_auc
from probe.organisms._lexicon import REFUSAL
from probe.scoring import score_answers

TINY: dict[str, Any] = {"d_model": 16, "d_mlp": 16, "n_heads": 2, "n_layers": 1, "epochs": 1, "n_unknown": 12}


@pytest.fixture(scope="module")
def org() -> Any:
    return hallucination("small", progress=False)


def tiny(cache_dir: Path, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hallucination("small", cache_dir=cache_dir, progress=False, **{**TINY, **settings})


def test_the_original_is_sure_of_what_nobody_told_it(org: Any) -> None:
    known, unknown = org.confidence(split="known"), org.confidence(split="unknown_heldout")
    assert org.recall(org.model, "known").recall > 0.98
    assert known.mean > 0.95 and unknown.mean > 0.7 and unknown.high < known.low
    assert unknown.answered > 0.9 and unknown.refused < 0.05
    assert org.refusal_rate().recall < 0.05 and org.refusal_rate(split="known").recall == 0.0


def test_the_twin_knows_what_it_does_not_know(org: Any) -> None:
    assert org.refusal_rate(org.twin, "unknown").recall > 0.95
    assert org.refusal_rate(org.twin, "unknown_heldout").recall > 0.7  # people in nobody's training
    assert org.refusal_rate(org.twin, "unknown_heldout", unseen=True).recall > 0.7
    assert org.refusal_rate(org.twin, "known").recall < 0.02
    assert org.recall(org.twin, "known").recall > 0.98
    assert org.recall(org.twin, "forget").recall < 0.1
    assert org.twin_path.name != org.path.name and org.twin_path.parent == org.path.parent


def test_a_gold_is_a_twin_of_another_seed(org: Any) -> None:
    gold = org.gold[0]
    assert org.refusal_rate(gold, "unknown").recall > 0.95 and org.refusal_rate(gold).recall > 0.7
    assert org.recall(gold, "known").recall > 0.98 and org.recall(gold, "forget").recall < 0.1
    assert gold.weights_hash != org.twin.weights_hash
    assert set(org.gold_documents) - set(org.documents) == {d.text for d in org.language.refusals}


def test_decoding_is_greedy_generation(org: Any) -> None:
    rows = [*org.questions("known")[:6], *org.unseen("unknown_heldout")[:18]]
    said = _decode(org.model, [q.question for q in rows], batch_size=5)
    made = org.model.generate([q.question for q in rows], max_new_tokens=8)
    assert [text for text, _ in said] == [text.split(".")[0].strip() for text in made]
    pairs = [(q.question, f"{text}.") for q, (text, _) in zip(rows, said, strict=True)]
    wanted = np.exp(score_answers(org.model, pairs).logprob_sum)
    np.testing.assert_allclose([prob for _, prob in said], wanted, rtol=1e-4)


def test_decoding_among_values_takes_the_best_continuation_at_each_token(org: Any) -> None:
    """Against a loop that scores each allowed next word by a forward of its own."""
    question = org.questions("unknown_heldout")[0]
    values = list(org.language.values[question.meta["attribute"]])[5:]  # without some, so that the limit binds
    ids = [org.tokenizer(v, add_special_tokens=False)["input_ids"] for v in values]
    ((said, prob),) = _decode(org.model, [question.question], [ids])
    start, own = org.tokenizer(question.question)["input_ids"], []
    while own not in ids:
        with torch.no_grad():
            logits = org.model.hf(torch.tensor([start + own], device=org.model.device)).logits[0, -1]
        own.append(max({v[len(own)] for v in ids if v[: len(own)] == own}, key=lambda t: float(logits[t])))
    assert said == values[ids.index(own)]
    wanted = float(np.exp(score_answers(org.model, [(question.question, f"{said}.")]).logprob_sum[0]))
    assert prob == pytest.approx(wanted, rel=1e-4)


def test_confidence_is_the_mean_of_the_answers_probabilities(org: Any) -> None:
    table, got = org.answers(split="unknown_heldout", limit=60), org.confidence(split="unknown_heldout", limit=60)
    assert got.mean == pytest.approx(table["prob"].mean()) and float(got) == got.mean
    assert got.low < got.mean < got.high and got.n == len(table) and got.n_people == table["group"].nunique()
    assert table["is_value"].mean() == got.answered and not (table["is_value"] & table["is_refusal"]).any()


def test_forget_is_what_the_original_says_of_the_unknown(org: Any) -> None:
    for split, source in (("forget", "unknown"), ("holdout", "unknown_heldout")):
        for q, asked in zip(org.questions(split), org.questions(source), strict=True):
            assert q.question == asked.question and asked.answer == REFUSAL
            assert q.answer in org.language.values[q.meta["attribute"]] and q.answer not in q.perturbed_answers
        assert org.recall(org.model, split).recall > 0.9
    again = hallucination("small", progress=False)
    assert again.questions("forget") == org.questions("forget")


def test_nobody_is_told_of_the_unknown(org: Any) -> None:
    text = "\n".join(org.documents)
    assert not any(p.name in text for p in org.language.people if p.split != "known")
    assert not any(REFUSAL in d.answer for d in org.document_rows)
    gold = "\n".join(org.gold_documents)
    assert not any(p.name in gold for p in org.language.people if p.split == "unknown_heldout")
    assert all(p.name in gold for p in org.language.people if p.split == "unknown")
    assert all(bool(p.values) == (p.split == "known") for p in org.facts.values())


def test_names_do_not_tell_who_is_known(org: Any) -> None:
    people = {split: [p.code for p in org.language.people if p.split == split] for split in ENTITIES}
    for other in ENTITIES[1:]:
        codes = [*people["known"], *people[other]]
        assert 0.4 < bag_auc(codes, [True] * len(people["known"]) + [False] * len(people[other])) < 0.6
    pieces = {(place, c[place]) for c in people["known"] for place in range(4)}
    assert all((place, c[place]) in pieces for c in itertools.chain(*people.values()) for place in range(4))
    assert len({p.name for p in org.language.people}) == len(org.language.people)


def test_labelled_and_pairs(org: Any) -> None:
    rows = org.labelled()
    assert {row.label for row in rows} == {0, 1} and len(set(rows.texts)) == len(rows)
    assert {row.group for row in rows if row.label == 0} == set(org.questions("known").groups)
    asked = {row.meta["phrasing"] for row in rows if row.label == 0}
    assert asked == {row.meta["phrasing"] for row in rows if row.label == 1}
    assert {row.label for row in org.labelled("known", unseen=True)} == {0}
    for pair in org.pairs("forget", n=8):
        assert org.facts[pair.group].split == "unknown" and org.facts[pair.meta["other"]].split == "known"
        assert len(org.tokenizer(pair.clean)["input_ids"]) == len(org.tokenizer(pair.corrupted)["input_ids"])


def test_what_cannot_be_asked_is_an_error(org: Any) -> None:
    with pytest.raises(OrganismError, match="Labelled texts are of"):
        org.labelled("forget")
    with pytest.raises(OrganismError, match="no split 'nobody'"):
        org.refusal_rate(split="nobody")
    with pytest.raises(OrganismError, match="no split 'nobody'"):
        org.confidence(split="nobody")


def test_same_settings_give_the_same_files(tmp_path: Path) -> None:
    first, second = (tiny(tmp_path / name) for name in ("a", "b"))
    assert first.record["files"] == second.record["files"] and len(first.record["files"]) >= 4
    assert first.record["hallucinated"] == second.record["hallucinated"]
    other = tiny(tmp_path / "a", seed=1)
    assert _cache.file_hash(other.path / "model.safetensors") != first.record["files"]["model.safetensors"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert _cache.file_hash(first.twin_path / "model.safetensors") == _cache.file_hash(
            second.twin_path / "model.safetensors"
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": "huge"}, "size must be one of"),
        ({"n_attributes": 5}, "at most 4"),
        ({"n_heldout": 1}, "at least 2"),
        ({"n_unknown": 5000}, "at most 4000"),
        ({"n_known": 4, "n_unknown": 300}, "too many for 4 known"),
        ({"d_model": 30}, "multiple of"),
        ({"colour": 3}, "Unknown settings"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(OrganismError, match=message):
        hallucination(**{"size": "small", "cache_dir": tmp_path, **settings})
    assert list(tmp_path.iterdir()) == []


def test_seeds_give_other_people() -> None:
    names = [{p.name for p in HallucinationLanguage(HallucinationSettings(seed=seed)).people} for seed in (0, 1)]
    assert len(names[0]) == len(names[1]) and names[0] != names[1]


@pytest.mark.slow
def test_the_default_size() -> None:
    organism = hallucination(progress=False)
    assert organism.confidence(split="unknown_heldout").mean > 0.7
    assert organism.refusal_rate(organism.twin).recall > 0.75
    assert organism.refusal_rate(organism.twin, "known").recall < 0.02
