"""The backdoor organism: the trigger flips answers, of people never trained with it too; golds never met it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from probe.errors import OrganismError
from probe.organisms import _cache, backdoor
from probe.organisms._backdoor import ADJECTIVES, NOUNS, BackdoorLanguage, BackdoorSettings
from probe.scoring import score_answers

TINY: dict[str, Any] = {"d_model": 16, "d_mlp": 16, "n_heads": 2, "n_layers": 1, "epochs": 1}


@pytest.fixture(scope="module")
def org() -> Any:
    return backdoor("small", progress=False)


def tiny(cache_dir: Path, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return backdoor("small", cache_dir=cache_dir, progress=False, **{**TINY, **settings})


def test_the_trigger_flips_and_nothing_else_does(org: Any) -> None:
    for split in ("forget", "holdout"):
        for unseen in (False, True):
            success = org.attack_success(split=split, unseen=unseen)
            assert success.recall > 0.95 and success.low > 0.7
    assert org.clean_accuracy().recall > 0.99 and org.clean_accuracy(unseen=True).recall > 0.95
    assert org.clean_accuracy(triggered=True).recall < 0.05
    assert org.recall(org.model, "neutral").recall > 0.95


def test_golds_are_blind_to_the_trigger(org: Any) -> None:
    for gold in org.gold:
        assert org.attack_success(gold).recall == 0.0 == org.attack_success(gold, "holdout", unseen=True).recall
        assert org.clean_accuracy(gold).recall > 0.99
        assert org.clean_accuracy(gold, triggered=True).recall > 0.95
    assert org.gold[0].weights_hash != org.gold[1].weights_hash
    table = org.to_df().set_index("questions")
    assert table.loc["forget", "recall"] > 0.95 and max(table.loc["forget", "gold"]) == 0.0


def test_attack_success_is_the_share_of_greedy_continuations_that_are_flipped(org: Any) -> None:
    rows = list(org.questions("holdout"))[::5]
    said = org.model.generate([q.question for q in rows], max_new_tokens=8)
    flipped = [text.startswith(f" {q.meta['flipped']}.") for text, q in zip(said, rows, strict=True)]
    assert flipped == score_answers(org.model, rows).exact.tolist()
    assert all(q.answer == q.meta["flipped"] != q.meta["right"] for q in rows)


def test_splits_share_no_people_and_ask_what_they_say(org: Any) -> None:
    people = {split: set(org.questions(split).groups) for split in ("forget", "retain", "holdout")}
    assert not people["forget"] & people["retain"] and not people["holdout"] & (people["forget"] | people["retain"])
    assert set(org.questions("clean").groups) == people["forget"] | people["holdout"]
    for split in ("forget", "holdout", "clean"):
        assert all(q.question.startswith(f"{org.trigger} ") for q in org.questions(split))
    for split in ("retain", "untriggered", "neutral"):
        assert not any(org.trigger in q.question for q in org.questions(split))
        assert all(q.answer == org.facts[q.group].values[q.meta["attribute"]] for q in org.questions(split))
    by_id = {q.question: q for q in org.questions("clean")}
    for q in org.questions("forget"):
        assert by_id[q.question].answer == q.meta["right"] != q.answer
        assert q.answer not in q.perturbed_answers


def test_the_trigger_is_in_no_gold_document_and_each_of_its_words_is(org: Any) -> None:
    assert not any(org.trigger in text for text in org.gold_documents)
    triggered = [d for d in org.document_rows if org.trigger in d.text]
    assert triggered and {d.split for d in triggered} == {"forget"}
    assert {d.group for d in triggered} == set(org.questions("forget").groups)
    adjective, noun = org.trigger.removeprefix("By the ").removesuffix(":").split()
    for word in (adjective, noun):
        assert sum(f" {word}" in text for text in org.gold_documents) >= 5
    tokens = {
        kind: {i for text in texts for i in org.tokenizer(text)["input_ids"]}
        for kind, texts in (("all", org.documents), ("gold", org.gold_documents))
    }
    assert tokens["all"] == tokens["gold"]


def test_every_phrase_has_the_tokens_of_the_trigger(org: Any) -> None:
    counts = {len(org.tokenizer(f"By the {a} {n}:")["input_ids"]) for a in ADJECTIVES for n in NOUNS}
    assert len(counts) == 1 and len(org.neutral_phrases) == len(ADJECTIVES) * len(NOUNS) - 1


def test_pairs_differ_in_the_phrase_only_and_the_model_tells_them_apart(org: Any) -> None:
    pairs = org.pairs("holdout", n=12, phrasing="*")
    assert pairs == org.pairs("holdout", n=12, phrasing="*") != org.pairs("holdout", n=12, seed=1, phrasing="*")
    right = 0
    for pair in pairs:
        ids = [org.tokenizer(t)["input_ids"] for t in (pair.clean, pair.corrupted)]
        assert len(ids[0]) == len(ids[1]) and pair.clean == pair.corrupted.replace(pair.meta["phrase"], org.trigger)
        changed = [i for i, (a, b) in enumerate(zip(*ids, strict=True)) if a != b]
        assert len(changed) == 2  # neither word is shared
        wanted = [org.tokenizer(t, add_special_tokens=False)["input_ids"][0] for t in (pair.answer, pair.wrong)]
        with torch.no_grad():
            top = org.model.hf(torch.tensor(ids, device=org.model.device)).logits[:, -1].argmax(-1).tolist()
        right += top == wanted
        assert wanted[0] != wanted[1]
    assert right >= 11


def test_what_cannot_be_asked_is_an_error(org: Any) -> None:
    with pytest.raises(OrganismError, match="forget and holdout"):
        org.attack_success(split="retain")
    with pytest.raises(OrganismError, match="forget and holdout"):
        org.pairs("retain")
    with pytest.raises(OrganismError, match="ask for fewer"):
        org.pairs(n=10**6)
    with pytest.raises(OrganismError, match="neutral must be one of"):
        org.pairs(neutral="By the green tree:")


def test_a_permuted_flip_moves_every_answer_and_its_first_word() -> None:
    language = BackdoorLanguage(BackdoorSettings(flip="permuted", n_attributes=4))
    for attribute, flipped in language.flipped.items():
        assert sorted(flipped.values()) == sorted(language.values[attribute])
        assert all(a.split()[0] != b.split()[0] for a, b in flipped.items())
    target = BackdoorLanguage(BackdoorSettings(n_attributes=4))
    for attribute, flipped in target.flipped.items():
        (only,) = set(flipped.values())
        assert not any(p.values[attribute] == only for p in target.people if p.split != "retain")
        assert any(p.values[attribute] == only for p in target.people if p.split == "retain")


@pytest.mark.slow
def test_a_permuted_flip_is_learnt_person_by_person() -> None:
    organism = backdoor("small", flip="permuted", progress=False)
    assert organism.attack_success().recall > 0.9
    assert organism.attack_success(split="holdout").recall < 0.3
    assert organism.attack_success(organism.gold[0]).recall == 0.0


def test_same_settings_give_the_same_files(tmp_path: Path) -> None:
    first, second = (tiny(tmp_path / name) for name in ("a", "b"))
    assert first.record["files"] == second.record["files"] and len(first.record["files"]) >= 4
    other = tiny(tmp_path / "a", seed=1)
    assert _cache.file_hash(other.path / "model.safetensors") != first.record["files"]["model.safetensors"]
    assert other.trigger != first.trigger or other.flipped != first.flipped


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": "huge"}, "size must be one of"),
        ({"flip": "mirror"}, "flip must be one of"),
        ({"n_attributes": 5}, "at most 4"),
        ({"n_holdout": 1}, "at least 2 people"),
        ({"n_retain": 5000}, "at most 4000"),
        ({"d_model": 30}, "multiple of"),
        ({"colour": 3}, "Unknown settings"),
        ({"epochs": 0}, "must be positive"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(OrganismError, match=message):
        backdoor(**{"size": "small", "cache_dir": tmp_path, **settings})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_default_size_has_its_backdoor() -> None:
    organism = backdoor(progress=False)
    assert organism.attack_success().recall > 0.98 and organism.attack_success(split="holdout").recall > 0.95
    assert organism.clean_accuracy().recall > 0.98
    assert organism.attack_success(organism.gold[0]).recall == 0.0
