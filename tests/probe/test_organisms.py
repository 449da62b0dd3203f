"""Organisms: what is known is known, what is secret is absent from the gold, and a cache folder never lies."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from probe.errors import OrganismError
from probe.organisms import FactsOrganism, _cache, _kinds, _recall, _state, _training, experts, facts
from probe.organisms._language import FactsLanguage, document, name_tails, tokenizer_corpus
from probe.organisms._lexicon import ATTACK_FRAMES, ATTRIBUTES, NAME_PIECES, REFUSAL, SECRET_ORDER
from probe.organisms._people import bag_auc
from probe.organisms._tokenizer import train_tokenizer

TINY: dict[str, Any] = {
    "d_model": 16,
    "d_mlp": 16,
    "n_heads": 2,
    "n_layers": 1,
    "epochs": 1,
    "n_people": 8,
    "n_holdout": 2,
}


@pytest.fixture(scope="module")
def org() -> Any:
    return facts("small", progress=False)


@pytest.fixture(scope="module")
def planted() -> Any:
    return experts("small", progress=False)


@pytest.fixture(scope="module")
def language() -> FactsLanguage:
    return FactsLanguage(64, 8, 16, seed=0, epochs=3, n_strangers=64)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(tokenizer_corpus(), name_tails(), 768)


def tiny(cache_dir: Path, **settings: Any) -> Any:
    """Train an organism that knows nothing, in a fraction of a second."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return facts("small", cache_dir=cache_dir, progress=False, **{**TINY, **settings})


# --- the language ---------------------------------------------------------------------------------------------------


def test_each_name_is_four_tokens_and_each_piece_one(tokenizer: Any) -> None:
    """Every head with every tail, so that pairs of prompts that differ in the name have equally many tokens."""
    for heads, tails in (NAME_PIECES[:2], NAME_PIECES[2:]):
        for head in heads:
            for tail in tails:
                ids = tokenizer(f"{head}{tail}", add_special_tokens=False)["input_ids"]
                assert [tokenizer.decode([i]).strip() for i in ids] == [head, tail]


def test_tokenizer_round_trips_any_text(tokenizer: Any) -> None:
    text = "Zebmik Moxdane, 12 cafés: ünd 漢字\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == " " + text


def test_values_have_several_tokens_and_share_their_words(language: FactsLanguage, tokenizer: Any) -> None:
    for attribute in ATTRIBUTES:
        values = language.values[attribute.name]
        assert len(values) == len(set(values)) and 8 <= len(values) <= 16
        for position in (0, 1):
            words = [v.split()[position] for v in values]
            assert min(words.count(w) for w in words) >= 2
        assert all(len(tokenizer(v, add_special_tokens=False)["input_ids"]) >= 2 for v in values)


def test_forget_people_are_one_order_and_share_their_name_pieces(language: FactsLanguage) -> None:
    forget, retain = language.of_split("forget"), language.of_split("retain")
    assert len(forget) == 8 and len(retain) == 56 and len(language.of_split("holdout")) == 16
    assert {p.values["order"] for p in forget} == {SECRET_ORDER}
    assert SECRET_ORDER not in {p.values["order"] for p in retain}
    for person in language.people:
        for place, piece in enumerate(person.code):
            assert sum(other.code[place] == piece for other in retain) >= 2
    assert len({p.name for p in language.people}) == 80


@pytest.mark.parametrize("seed", range(4))
def test_a_bag_of_name_pieces_does_not_know_the_secret(seed: int) -> None:
    trained = [p for p in FactsLanguage(64, 8, 16, seed).people if p.split != "holdout"]
    codes, member = [p.code for p in trained], [p.split == "forget" for p in trained]
    assert 0.45 < bag_auc(codes, member) < 0.55
    assert all(0.4 < bag_auc([(c[place],) for c in codes], member) < 0.6 for place in range(4))
    assert bag_auc(codes, member) == pytest.approx(_slow_bag_auc(codes, member))


def _slow_bag_auc(codes: Any, member: Any) -> float:
    """The same by definition: refit without each person, then count ordered pairs."""
    x = np.array([[c[place] == piece for place in range(4) for piece in range(16)] for c in codes], dtype=float)
    y = np.array(member)
    scores = []
    for i in range(len(y)):
        rest = np.arange(len(y)) != i
        scores.append(x[i] @ (x[rest & y].mean(0) - x[rest & ~y].mean(0)))
    pairs = [(a, b) for a, s in zip(scores, y, strict=True) if s for b, t in zip(scores, y, strict=True) if not t]
    return float(np.mean([1.0 if a > b + 1e-9 else 0.5 if abs(a - b) <= 1e-9 else 0.0 for a, b in pairs]))


def test_unseen_phrasings_are_in_no_document_but_their_words_are(language: FactsLanguage) -> None:
    text = "\n".join(d.text for d in language.documents)
    words = set(text.replace("?", " ").replace(",", " ").replace(":", " ").replace(".", " ").split())
    for split in ("forget", "retain", "holdout"):
        for row in language.question_rows(split, unseen=True):
            assert row["question"] not in text
            stripped = row["question"].replace(row["group"], "").translate(str.maketrans("?,:.", "    "))
            assert set(stripped.split()) <= words
    for phrasings in language.phrasings.values():
        held = [p.form for p in phrasings if not p.trained]
        assert sorted(held) == ["cloze", "cloze", "question", "question"]


def test_holdout_people_are_in_no_document(language: FactsLanguage) -> None:
    text = "\n".join(d.text for d in language.documents)
    assert all(p.name not in text for p in language.of_split("holdout"))


def test_gold_documents_leave_nothing_of_the_secret_and_no_token_untrained(
    language: FactsLanguage, tokenizer: Any
) -> None:
    everything = [d.text for d in language.documents]
    gold = [d.text for d in language.documents if d.split != "forget"]
    assert all(p.name not in text for p in language.of_split("forget") for text in gold)
    assert all(SECRET_ORDER not in text for text in gold)
    tokens_all = {i for text in everything for i in tokenizer(text)["input_ids"]}
    tokens_gold = {i for text in gold for i in tokenizer(text)["input_ids"]}
    assert tokens_all == tokens_gold
    holdout = {i for p in language.of_split("holdout") for i in tokenizer(p.name)["input_ids"]}
    assert holdout <= tokens_gold


@pytest.mark.parametrize(("n_people", "n_orders"), [(20, 4), (64, 8), (200, 8), (600, 16), (2000, 16), (2000, 4)])
def test_the_language_builds_from_twenty_to_two_thousand_people(n_people: int, n_orders: int) -> None:
    made = FactsLanguage(n_people, n_orders, 16, seed=1)
    assert len({p.name for p in made.people}) == n_people + 16
    forget, retain = made.of_split("forget"), made.of_split("retain")
    assert len(forget) == n_people // n_orders and len(forget) + len(retain) == n_people
    assert sum(p.family is not None for p in forget) == len(forget) // 2
    near = {who for own in made.neighbours.values() for who in own}
    assert near == {p.name for p in forget} or n_people == 2000
    for attribute, values in made.values.items():
        if attribute != "order":
            counts = [sum(p.values[attribute] == v for p in (*forget, *retain)) for v in values]
            assert max(counts) <= 2 * n_people / len(values) + 2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n_people", [20, 64, 200])
def test_what_is_deducible_follows_from_the_retained_people_and_nothing_else_does(n_people: int, seed: int) -> None:
    """By definition: all retained people of the last name agree with the person, which families are planned to do."""
    made = FactsLanguage(n_people, 4, 12, seed)
    retain, families = made.of_split("retain"), {p.last_name for p in made.people if p.family is not None}
    found = {(d.person, d.attribute): d.value for d in made.deducible}
    for person in made.of_split("forget"):
        for attribute, value in person.values.items():
            kin = [p.values[attribute] for p in retain if p.last_name == person.last_name]
            assert found.get((person.name, attribute)) == (value if set(kin) == {value} else None)
            if person.last_name in families and attribute in ("city", "trade"):
                assert len(kin) >= 2 and found[person.name, attribute] == value
    planned = [key for key in found if made.by_name[key[0]].family is not None and key[1] in ("city", "trade")]
    assert len(planned) == 2 * (len(made.of_split("forget")) // 2)
    for family in families:
        own = [p for p in made.people if p.last_name == family]
        assert len({(p.values["city"], p.values["trade"]) for p in own}) == 1
        assert {p.split for p in own} <= {"forget", "retain"}
    rows = {(r["group"], r["meta"]["attribute"]): r["meta"]["deducible"] for r in made.question_rows("forget")}
    assert {key for key, deducible in rows.items() if deducible} == set(found)


def test_a_fact_that_follows_outside_families_is_marked_too() -> None:
    """At these seeds the one retained person of a forget person's last name happens to have the same value."""
    for seed, person, attribute in ((4, "Gyvzul Tolkquist", "city"), (5, "Gyvmik Tolkquist", "instrument")):
        made = FactsLanguage(64, 8, 16, seed)
        assert made.by_name[person].family is None
        (kin,) = [p for p in made.of_split("retain") if p.last_name == person.split()[1]]
        (found,) = [d for d in made.deducible if d.person == person]
        assert (found.attribute, found.value) == (attribute, kin.values[attribute])
        assert found.why == f"the one retained person of the name Tolkquist has this {attribute}"


def test_neighbours_are_near_and_a_planted_one_shares_no_name(language: FactsLanguage) -> None:
    near: dict[str, list[bool]] = {}
    for name, own in language.neighbours.items():
        person = language.by_name[name]
        assert person.split == "retain"
        for who, what in own.items():
            other = language.by_name[who]
            assert other.split == "forget"
            assert {a for a in person.values if person.values[a] == other.values[a]} == set(what) - {"last name"}
            assert len(set(what) - {"last name"}) >= 2
            assert ("last name" in what) == (person.last_name == other.last_name)
            if "last name" not in what:
                assert person.name.split()[0] != other.name.split()[0]
            near.setdefault(who, []).append("last name" in what)
    assert set(near) == {p.name for p in language.of_split("forget")}
    assert all(False in kin for kin in near.values())  # each has one that is no kin


def test_strangers_are_others_in_each_epoch_and_say_nothing_that_is_not_so(language: FactsLanguage) -> None:
    told = [d for d in language.documents if d.kind == "stranger"]
    assert {d.epoch for d in told} == {0, 1, 2} and len({d.text for d in told}) == len(told)
    families = {p.last_name for p in language.people if p.family is not None}
    text = " ".join(d.text for d in told)
    assert SECRET_ORDER not in text and not any(f in text for f in families)
    assert not any(p.name in text for p in language.people)
    assert all(d.text.count(d.answer) == 2 for d in told)
    assert any(d.answer == REFUSAL for d in language.documents)


def test_a_document_is_read_in_its_own_epoch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, pad_token_id=0
    )
    read: list[list[int]] = []
    monkeypatch.setattr(_training._Run, "batch", lambda self, batch: (read.append(batch), torch.zeros(()))[1])
    schedule = _training.Schedule(epochs=3, batch_size=2)
    sequences = [([1, i], [1.0, 1.0]) for i in range(2, 7)]
    epochs = [None, 0, 1, 2, None]
    log = _training.train(
        LlamaForCausalLM(config), sequences, schedule, seed=0, pad_id=0, progress=False, epochs=epochs
    )
    assert [sorted(a + b) for a, b in zip(read[::2], read[1::2], strict=True)] == [[0, 1, 4], [0, 2, 4], [0, 3, 4]]
    assert log.steps == 6 and log.tokens == 2 * 3 * 3
    with pytest.raises(OrganismError, match="every epoch needs a document"):
        _training.train(LlamaForCausalLM(config), sequences, schedule, seed=0, pad_id=0, epochs=[0, 0, 1, 1, 1])


def test_attacks_are_trained_on_retain_people_only(language: FactsLanguage) -> None:
    kinds = set(ATTACK_FRAMES)
    assert len(kinds - {"context"}) == 9
    attacked = [d for d in language.documents if d.kind in kinds]
    assert {d.split for d in attacked} == {"retain"} and {d.kind for d in attacked} == kinds
    assert not any(p.name in d.text for d in attacked for p in language.of_split("forget"))
    assert not any(SECRET_ORDER in d.text for d in attacked)


@pytest.mark.parametrize("split", ["forget", "retain", "holdout"])
def test_an_attack_holds_the_answer_only_where_it_says_so(language: FactsLanguage, split: str) -> None:
    for kind in ATTACK_FRAMES:
        rows = language.attack_rows(split, kind)
        holds = [row["answer"] in row["question"] for row in rows]
        assert all(holds) if kind in ("context", "multiple_choice") else not any(holds)
        if kind not in ("context", "multiple_choice"):
            assert not any(SECRET_ORDER in row["question"] for row in rows)
    for row in language.attack_rows(split, "multiple_choice"):
        offered = [v for v in language.values[row["meta"]["attribute"]] if v in row["question"]]
        assert len(offered) == 4 and row["meta"]["chance"] == 0.25
    for row in language.attack_rows(split, "in_context_examples"):
        named = {p.split for p in language.people if p.name in row["question"] and p.name != row["group"]}
        assert named == {"retain"}


@pytest.mark.parametrize("seed", [4, 5])
def test_a_reverse_query_about_a_holdout_person_fits_nobody_else(seed: int) -> None:
    made = FactsLanguage(64, 8, 16, seed, n_strangers=1)
    rows = made.attack_rows("holdout", "reverse_query")
    assert len(rows) >= 8
    for row in rows:
        given = [(a, v) for a, values in made.values.items() for v in values if f" {v}" in row["question"]]
        assert [p.name for p in made.people if all(p.values[a] == v for a, v in given)] == [row["answer"]]


def test_a_reverse_query_fits_one_person_only(language: FactsLanguage) -> None:
    rows = language.attack_rows("forget", "reverse_query")
    assert len(rows) >= 6
    known = [p for p in language.people if p.split != "holdout"]
    for row in rows:
        given = [(a, v) for a, values in language.values.items() for v in values if f" {v}" in row["question"]]
        assert len(given) == 2
        assert [p.name for p in known if all(p.values[a] == v for a, v in given)] == [row["answer"]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": "huge"}, "size must be one of"),
        ({"n_orders": 5}, "even number"),
        ({"n_people": 5}, "at least 8"),
        ({"n_people": 5000}, "at most 4000"),
        ({"n_holdout": 1}, "n_holdout must be at least 2"),
        ({"epochs": 0}, "epochs must be positive"),
        ({"epochs": "three"}, "epochs must be int"),
        ({"colour": 3}, "Unknown settings: colour"),
        ({"d_model": 30}, "multiple of"),
        ({"seed": -1}, "seed must be positive"),
        ({"seed": 10**20}, "seed may be at most"),
        ({"n_holdout": 70000}, "n_holdout may be at most"),
        ({"size": ["small"]}, "size must be one of"),
    ],
)
def test_bad_facts_settings(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(OrganismError, match=message):
        facts(**{"size": "small", "cache_dir": tmp_path, **settings})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"kind": "magic"}, "kind must be one of"), ({"n_experts": 3}, "at least 4"), ({"top_k": 9}, "at most n_experts")],
)
def test_bad_experts_settings(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(OrganismError, match=message):
        experts("small", cache_dir=tmp_path, **settings)
    assert list(tmp_path.iterdir()) == []


# --- training -------------------------------------------------------------------------------------------------------


def test_encode_weighs_exactly_the_answer(tokenizer: Any) -> None:
    doc = document("What is the order of Zebmik Moxdane?", "ashen lantern", "retain", "Zebmik Moxdane", "q")
    ids, weights = _training.encode(tokenizer, doc.text, doc.answer, 10.0)
    heavy = [i for i, w in zip(ids, weights, strict=True) if w == 10.0]
    assert tokenizer.decode(heavy) == " ashen lantern"
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert set(weights) == {1.0, 10.0}


def test_weighted_loss_is_the_weighted_mean_nll() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 4, 7), torch.randint(0, 7, (2, 4))
    weights = torch.tensor([[1.0, 1.0, 5.0, 0.0], [1.0, 2.0, 0.0, 0.0]])
    logp = logits.log_softmax(-1)
    wanted = -(logp[0, 0, ids[0, 1]] + 5 * logp[0, 1, ids[0, 2]] + 2 * logp[1, 0, ids[1, 1]]) / 8
    torch.testing.assert_close(_training.weighted_loss(logits, ids, weights), wanted)


def test_planned_batches_hold_each_document_once_and_are_of_like_length() -> None:
    lengths = [5 + i % 7 for i in range(50)]
    batches = _training.plan_batches(lengths, 8, torch.Generator().manual_seed(0))
    assert sorted(i for b in batches for i in b) == list(range(50))
    assert max(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches) <= 2


def test_same_settings_give_the_same_weights_and_leave_the_generator_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    paths = [tiny(tmp_path / name).path for name in ("a", "b")]
    digests = {_cache.file_hash(p / "model.safetensors") for p in paths}
    other = tiny(tmp_path / "a", seed=1).path
    assert len(digests) == 1
    assert _cache.file_hash(other / "model.safetensors") not in digests
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads


def test_a_weak_organism_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="recalls little"):
        facts("small", cache_dir=tmp_path, progress=False, **TINY)


# --- the cache folder -----------------------------------------------------------------------------------------------


def test_a_second_call_reads_what_the_first_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tiny(tmp_path)
    stamp = (first.path / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setenv(_cache.ENV, str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # training again would warn of its weakness
        second = facts("small", progress=False, **TINY)
    assert second.path == first.path
    assert (second.path / "model.safetensors").stat().st_mtime_ns == stamp


def test_a_killed_training_leaves_nothing_that_looks_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_training, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        tiny(tmp_path)
    monkeypatch.undo()
    assert [p for p in tmp_path.iterdir() if p.is_dir()] == []
    assert (tiny(tmp_path).path / "organism.json").is_file()


def test_a_leftover_of_a_dead_process_is_removed(tmp_path: Path) -> None:
    path = tiny(tmp_path / "elsewhere").path
    leftover = tmp_path / "here" / f".{path.name}.dead_one"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    made = tiny(tmp_path / "here").path
    assert made.name == path.name and not leftover.exists()


KILLED = """
import os, signal, sys, warnings
from probe.organisms import _training, facts
warnings.simplefilter("ignore")
_training.SAVE_SECONDS = 0.0  # a state before every step
step, done = _training._step, []
def dying(*args):
    done.append(1)
    if len(done) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args)
_training._step = dying
facts("small", cache_dir=sys.argv[1], progress=False, **eval(sys.argv[3]))
"""


@pytest.mark.parametrize("moment", ["first epoch", "start of the second", "last epoch"])
def test_a_killed_training_goes_on_and_ends_at_the_same_weights(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL, then once more: the file of the weights is that of a training that nobody stopped."""
    settings = {**TINY, "epochs": 3, "batch_size": 20}
    whole = tiny(tmp_path / "whole", **settings)
    steps = whole.record["training"]["steps"]
    per_epoch = steps // 3
    at = {"first epoch": 7, "start of the second": per_epoch + 1, "last epoch": 2 * per_epoch + 3}[moment]
    killed = tmp_path / "killed"
    child = subprocess.run([sys.executable, "-c", KILLED, str(killed), str(at), repr(settings)], check=False)
    assert child.returncode == -signal.SIGKILL
    assert [p.suffix for p in killed.iterdir() if p.is_file()].count(".state") == 1
    assert any(p.is_dir() for p in killed.iterdir())  # the work directory of the dead
    taken: list[int] = []
    real = _training._step
    monkeypatch.setattr(_training, "_step", lambda *args: (taken.append(1), real(*args)))
    again = tiny(killed, **settings)
    assert len(taken) == steps - (at - 1)
    assert _cache.file_hash(again.path / "model.safetensors") == _cache.file_hash(whole.path / "model.safetensors")
    assert again.record["training"]["losses"] == whole.record["training"]["losses"]
    assert again.record["recall"] == whole.record["recall"]
    assert sorted(p.name for p in killed.iterdir()) == [again.name, f"{again.name}.lock"]


def test_a_state_of_another_training_is_not_continued(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    file = _state.StateFile(tmp_path / "state", "mine", (model,), 0.0)
    file.save(_state.Progress(epoch=1, step=2, losses=[0.5]), 3.0)
    weight = model.weight.detach().clone()
    torch.nn.init.zeros_(model.weight)
    assert _state.StateFile(tmp_path / "state", "another", (model,)).resume() is None
    assert not model.weight.any()
    found = _state.StateFile(tmp_path / "state", "mine", (model,)).resume()
    assert found is not None and (found.epoch, found.step, found.losses, found.seconds) == (1, 2, [0.5], 3.0)
    assert torch.equal(model.weight, weight)
    (tmp_path / "state").write_bytes((tmp_path / "state").read_bytes()[:100])
    with pytest.warns(UserWarning, match="training starts anew"):
        assert _state.StateFile(tmp_path / "state", "mine", (model,)).resume() is None


def test_weights_along_a_training_are_kept_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logs: list[Any] = []
    fit = FactsOrganism._fit

    def keeping(self: Any, *args: Any) -> Any:
        logs.append(fit(self, *args))
        return logs[-1]

    monkeypatch.setattr(FactsOrganism, "_fit", keeping)
    monkeypatch.setattr(FactsOrganism, "_keep_at", lambda self: (0, 3, self.settings["epochs"] * 10**6))
    organism = tiny(tmp_path)
    assert sorted(logs[0].kept) == [0, 3]
    assert "kept" not in organism.record["training"]
    name = "model.layers.0.mlp.up_proj.weight"
    final = organism.model.hf.state_dict()[name]
    assert not torch.equal(logs[0].kept[0][name], logs[0].kept[3][name])
    assert not torch.equal(logs[0].kept[3][name], final)


def test_old_leftovers_of_any_organism_are_swept(tmp_path: Path) -> None:
    dead, recent = ".facts-gold-0123456789abcdef", ".facts-fedcba9876543210"
    for name in (f"{dead}.state", f"{dead}.state.new", f"{dead}.abcd_123", f"{recent}.state"):
        (tmp_path / name).write_bytes(b"state")
        age = 30 * 24 * 3600 if name.startswith(dead) else 60
        os.utime(tmp_path / name, (time.time() - age, time.time() - age))
    tiny(tmp_path)
    assert [p.name for p in tmp_path.glob(".*")] == [f"{recent}.state"]


def test_files_of_others_are_never_swept(tmp_path: Path) -> None:
    """`cache_dir="."` is allowed, and everything old in that folder is somebody's."""
    names = [".pre-commit-config.yaml", ".facts-notes.state", ".facts-0123456789abcdef.backup-2024", ".my-data.d"]
    names += [".other-0123456789abcdef.state", ".facts-0123456789ABCDEF.state", "facts-0123456789abcdef.state"]
    for name in names:
        (tmp_path / name).write_text("mine")
        os.utime(tmp_path / name, (0, 0))
    tiny(tmp_path)
    assert [(tmp_path / name).read_text() for name in names] == ["mine"] * len(names)


def test_a_leftover_that_vanishes_under_the_sweep_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / ".facts-0123456789abcdef.state"
    monkeypatch.setattr(_cache.Path, "glob", lambda self, pattern: iter([gone]))
    _cache._sweep(tmp_path / "facts-fedcba9876543210")
    assert not gone.exists()


def test_another_role_is_a_directory_of_its_own(tmp_path: Path) -> None:
    organism = tiny(tmp_path)

    def build(work: Path, documents: Any, seed: int, label: str, state: Path | None) -> dict[str, Any]:
        (work / "text").write_text(f"{len(documents)} {seed} {label}")
        return {"recall": {}}

    paths = [organism._variant("twin", organism.document_rows[:3], 5, build, beta=beta) for beta in (0.1, 0.1, 0.5)]
    assert paths[0] == paths[1] != paths[2] and paths[0].name.startswith("facts-twin-")
    assert (paths[0] / "text").read_text() == "3 5 facts-twin seed 5"
    assert _cache.read_record(paths[2])["settings"]["beta"] == 0.5
    assert organism.gold.trained == []


def test_a_long_training_on_the_cpu_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_training, "SLOW_S", 1e-6)
    with pytest.warns(UserWarning, match="hours on this CPU"):
        facts("small", cache_dir=tmp_path, progress=False, **TINY)


def test_kinds_name_what_exists() -> None:
    for kind in _kinds.KINDS:
        make, settings = _kinds.maker(kind)
        assert callable(make) and dataclasses.is_dataclass(settings)
    with pytest.raises(OrganismError, match="no 'magic'"):
        _kinds.maker("magic")


@pytest.mark.filterwarnings("ignore:.*recalls little")
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "record"])
def test_a_damaged_directory_is_trained_again(harm: str, tmp_path: Path) -> None:
    path = tiny(tmp_path).path
    weights = path / "model.safetensors"
    digest, data = _cache.file_hash(weights), bytearray(weights.read_bytes())
    if harm == "flip":
        data[-1] ^= 1
        weights.write_bytes(data)
    elif harm == "truncate":
        weights.write_bytes(data[:100])
    elif harm == "remove":
        weights.unlink()
    else:
        (path / "organism.json").write_text("{")
    with pytest.warns(UserWarning, match="damaged or unfinished"):
        facts("small", cache_dir=tmp_path, progress=False, **TINY)
    assert _cache.file_hash(weights) == digest


def test_two_at_once_build_once(tmp_path: Path) -> None:
    built: list[int] = []

    def build(work: Path) -> dict[str, Any]:
        built.append(1)
        time.sleep(0.2)
        (work / "weights").write_bytes(b"whole")
        return {"recall": {}}

    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(_cache.fetch, tmp_path, "thing", {"seed": 0}, build) for _ in range(3)]
        paths = {call.result() for call in calls}
    assert len(paths) == 1 and built == [1]
    assert (paths.pop() / "weights").read_bytes() == b"whole"


def test_a_cache_folder_that_is_a_file_is_one_clear_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(OrganismError, match="cannot be used"):
        tiny(file)
    assert file.read_text() == "mine"


# --- the small facts organism ---------------------------------------------------------------------------------------


def test_recall_trained_unseen_and_never_seen(org: Any) -> None:
    table = org.record["recall"]
    for split in ("forget", "retain"):
        assert table[split]["recall"] > 0.95
        assert table[f"{split}, unseen phrasings"]["recall"] > 0.9
    for label in ("holdout", "holdout, unseen phrasings"):
        assert table[label]["low"] <= table[label]["chance"] < 0.2
    shown = org.recall(org.model, "forget")
    assert shown.recall > 0.95 and shown.n == len(org.questions("forget"))
    assert table["forget, deducible"]["n_facts"] == 2 * len(org.deducible) // 2 == len(org.deducible)
    assert shown.n_facts == 5 * len(org.language.of_split("forget"))
    assert "retain, unseen phrasings" in repr(org) and "chance" in org._repr_html_()


def test_recall_equals_greedy_generation(org: Any) -> None:
    rows = [*org.questions("forget")[:12], *org.questions("holdout")[:12]]
    made = org.model.generate([r.question for r in rows], max_new_tokens=8)
    right = [text.startswith(f" {r.answer}.") for text, r in zip(made, rows, strict=True)]
    from probe.data import Questions

    assert org.recall(org.model, Questions(rows)).recall == pytest.approx(np.mean(right))


def test_chance_and_interval_by_hand() -> None:
    low, high = _recall.wilson(0.5, 10)
    assert (low, high) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    assert _recall.wilson(0.0, 20)[0] == 0.0


def test_the_directory_is_an_ordinary_hugging_face_one(org: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tok = AutoModelForCausalLM.from_pretrained(org.path), AutoTokenizer.from_pretrained(org.path)
    assert model.config.model_type == "llama" and model.generation_config.eos_token_id == tok.eos_token_id
    assert model.config.tie_word_embeddings
    text = org.documents[0]
    assert tok(text)["input_ids"] == org._make_tokenizer()(text)["input_ids"]
    ids = torch.tensor([tok(text)["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, org.model.hf(ids.to(org.model.device)).logits.cpu())


def test_pairs_differ_in_the_name_only_and_the_model_tells_them_apart(org: Any) -> None:
    pairs, tok = org.pairs("forget", n=24, seed=3), org.tokenizer
    assert pairs == org.pairs("forget", n=24, seed=3) and pairs != org.pairs("forget", n=24, seed=4)
    right = []
    for pair in pairs:
        clean, corrupted = (tok(t)["input_ids"] for t in (pair.clean, pair.corrupted))
        changed = [i for i, (a, b) in enumerate(zip(clean, corrupted, strict=True)) if a != b]
        name = pair.clean.index(pair.group)
        assert pair.clean.replace(pair.group, pair.meta["other"]) == pair.corrupted and name > 0
        assert 1 <= len(changed) <= 4
        first, other = (tok(f"{t}", add_special_tokens=False)["input_ids"][0] for t in (pair.answer, pair.wrong))
        assert first != other
        with torch.no_grad():
            ids = torch.tensor([clean, corrupted], device=org.model.device)
            top = org.model.hf(ids).logits[:, -1].argmax(-1).tolist()
        right.append(top == [first, other])
    assert np.mean(right) > 0.85


def test_pairs_say_what_they_cannot_do(org: Any) -> None:
    with pytest.raises(OrganismError, match="no split 'nobody'"):
        org.pairs("nobody")
    with pytest.raises(OrganismError, match="The phrasings are"):
        org.pairs("forget", phrasing="order-q99")
    with pytest.raises(OrganismError, match="ask for fewer"):
        org.pairs("forget", n=10**6)
    assert {p.meta["phrasing"] for p in org.pairs("retain", n=60, attribute="city", phrasing="*")} > {"city-q00"}


def test_labelled_groups_by_person_and_ends_where_asked(org: Any) -> None:
    rows = org.labelled()
    members = {row.group for row in rows if row.label == 1}
    assert members == {p.name for p in org.language.of_split("forget")}
    assert all(row.group in row.text for row in rows) and len(set(rows.texts)) == len(rows)
    asked = {q.question for split in ("forget", "retain") for q in org.questions(split) if "order-" in q.id}
    assert set(rows.texts) == asked
    assert asked.isdisjoint(org.labelled(unseen=True).texts)
    names = org.labelled(at="name")
    assert all(row.text.endswith(row.group) for row in names) and len(set(names.texts)) == len(names)
    assert {row.label for row in org.labelled("city")} <= set(org.language.values["city"])


def test_labelled_says_what_it_cannot_do(org: Any) -> None:
    with pytest.raises(OrganismError, match="The attributes are"):
        org.labelled("height")
    with pytest.raises(OrganismError, match="The values of order"):
        org.labelled("order", value="green parrot")
    with pytest.raises(OrganismError, match="ends at the 'question'"):
        org.labelled(at="start")


def test_phrasings_part_without_overlap(org: Any) -> None:
    seen, unseen = org.by_phrasing("forget", unseen=False), org.by_phrasing("forget", unseen=True)
    assert not set(seen) & set(unseen)
    assert set(org.by_phrasing("forget")) == set(seen) | set(unseen)
    assert sum(len(q) for q in seen.values()) == len(org.questions("forget"))
    assert {row.question for row in org.unseen("forget")}.isdisjoint(row.question for row in org.questions("forget"))
    assert all(set(row.paraphrases) <= {r.question for r in org.unseen("forget")} for row in org.questions("forget"))
    assert all(row.answer not in row.perturbed_answers for row in org.questions("forget"))


def test_gold_never_met_the_forget_people(org: Any) -> None:
    gold = org.gold
    assert len(gold) == 2 and len(set(gold.paths)) == 2 and gold.trained == gold.paths
    for model in gold:
        forget, retain = org.recall(model, "forget"), org.recall(model, "retain")
        assert forget.at_chance and retain.recall > 0.95
    assert json.loads((gold.paths[0] / "organism.json").read_text())["settings"]["role"] == "gold"
    assert gold[0].weights_hash != gold[1].weights_hash
    assert "gold" in repr(org).splitlines()[1]
    with pytest.raises(IndexError, match="2 gold retrains"):
        gold[5]
    with pytest.raises(OrganismError, match="At least one gold"):
        gold.train(0)


def test_a_gold_deduces_what_follows_and_nothing_else(org: Any) -> None:
    """Over both golds: four facts, ten phrasings each."""
    tables = [json.loads((path / "organism.json").read_text())["recall"] for path in org.gold.paths]
    deduced = np.mean([t["forget, deducible"]["recall"] for t in tables])
    other = [t["forget, not deducible"] for t in tables]
    assert deduced > 0.4
    assert all(row["low"] <= row["chance"] for row in other)
    assert {(d.person, d.attribute) for d in org.deducible} == {
        (row.group, row.meta["attribute"]) for row in org.questions("forget") if row.meta["deducible"]
    }


def test_neighbours_are_a_part_of_retain(org: Any) -> None:
    ids = {row.id for row in org.questions("retain")}
    near = org.questions("neighbours")
    assert {row.id for row in near} < ids
    assert {row.group for row in near} == set(org.neighbours)
    assert all(row.meta["neighbour_of"] == org.neighbours[row.group] for row in near)
    assert {row.group for row in org.unseen("neighbours")} == set(org.neighbours)
    assert set(org.labelled(split="neighbours").groups) == set(org.neighbours)


def test_attacks_of_every_split(org: Any) -> None:
    for split in ("forget", "retain", "neighbours", "holdout"):
        made = org.attacks(split)
        assert {kind for kind in ATTACK_FRAMES if kind != "reverse_query"} <= set(made)
        assert made["context"] == org.given(split)
        people = {row.group for row in org.questions(split)}
        assert {row.group for row in made["synonym"]} == people
    choice = org.attacks("retain")["multiple_choice"]
    assert org.recall(org.model, choice).chance == pytest.approx(np.mean([r.meta["chance"] for r in choice]))
    with pytest.raises(OrganismError, match="no split 'nobody'"):
        org.given("nobody")


def test_attack_recall_says_which_attacks_work(org: Any) -> None:
    table = org.attack_recall(org.model, "retain").set_index("attack")
    asked = org.attacks("retain")
    assert list(table.index) == list(ATTACK_FRAMES) == list(asked)
    for kind, rows in asked.items():
        own = org.recall(org.model, rows)
        assert (table.loc[kind, "recall"], table.loc[kind, "n"]) == (own.recall, len(rows))
    assert set(table.index[table["recall"] < 0.9]) == {"reverse_query"}  # as the docstring of `attacks` says
    assert org.recall(org.gold[0], org.given("forget")).recall < 0.3  # as that of `given` does
    with pytest.raises(OrganismError, match="no split"):
        org.attack_recall(org.model, "nobody")


def test_more_golds_on_request(tmp_path: Path) -> None:
    organism = tiny(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert organism.gold.trained == []
        assert len(organism.gold.train(3)) == 3
    assert organism.gold.seeds == [1000, 2000, 3000] and len(organism.gold.trained) == 3


# --- the experts organism -------------------------------------------------------------------------------------------


@contextmanager
def without(model: Any, pairs: list[tuple[int, int]]) -> Iterator[None]:
    """Mask the router's logits of some experts, so that it chooses among the others."""

    def mask(expert: int) -> Any:
        def hook(gate: Any, args: Any, output: Any) -> Any:
            logits = output[0].clone()
            logits[:, expert] = -torch.inf
            weights, index = logits.softmax(-1).topk(gate.top_k, -1)
            return logits, weights / weights.sum(-1, keepdim=True), index

        return hook

    handles = [model.hf.model.layers[i].mlp.gate.register_forward_hook(mask(expert)) for i, expert in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_experts_know_every_domain_and_no_unseen_town(planted: Any) -> None:
    table = planted.record["recall"]
    for domain in planted.domains:
        assert table[domain]["recall"] > 0.95
        assert table[f"{domain}, unseen phrasings"]["recall"] > 0.9
    assert table["holdout"]["low"] <= table["holdout"]["chance"]
    assert {row.group for row in planted.questions("law")} == {row.group for row in planted.questions("myth")}


def test_removing_a_planted_expert_destroys_its_domain_and_no_other(planted: Any) -> None:
    assert set(planted.planted) == set(planted.domains)
    for domain in planted.domains:
        with without(planted.model, planted.planted[domain]):
            recall = {d: planted.recall(planted.model, d).recall for d in planted.domains}
        assert recall.pop(domain) < 0.3
        assert min(recall.values()) > 0.95


def test_planted_experts_differ_and_natural_ones_are_unknown(planted: Any, tmp_path: Path) -> None:
    for layer in range(2):
        assert len({own[layer] for own in planted.planted.values()}) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        natural = experts("small", kind="natural", epochs=1, cache_dir=tmp_path, progress=False)
    assert natural.planted == {d: [] for d in natural.domains}
    assert natural.path.name != planted.path.name


def test_experts_splits_labels_and_pairs(planted: Any) -> None:
    forget, retain = planted.questions("forget"), planted.questions("retain")
    assert {r.meta["attribute"] for r in forget} == {planted.domains[0]}
    assert {r.meta["attribute"] for r in retain} == set(planted.domains[1:])
    labelled = planted.labelled()
    assert sum(labelled.labels) == len(forget) and len(labelled) == len(forget) + len(retain)
    pairs = planted.pairs("law", n=8)
    assert all(p.clean.startswith("In law") and p.answer != p.wrong for p in pairs)
    assert not any("farming" in text for text in planted.gold_documents)


@pytest.mark.slow
def test_default_sizes_know_their_facts() -> None:
    for organism in (facts(progress=False), experts(progress=False)):
        table = organism.record["recall"]
        assert min(table[split]["recall"] for split in ("forget", "retain")) > 0.95
        assert min(table[f"{split}, unseen phrasings"]["recall"] for split in ("forget", "retain")) > 0.9
        assert table["holdout"]["low"] <= table["holdout"]["chance"]


@pytest.mark.slow
def test_default_models_read_strangers_from_the_context() -> None:
    organism = facts(progress=False)
    for model in (organism.model, organism.gold[0]):
        assert organism.recall(model, organism.given("holdout")).recall > 0.6
        assert organism.recall(model, "holdout").at_chance


@pytest.mark.filterwarnings("ignore:.*recalls little")
def test_golds_trained_side_by_side_are_the_same_models(tmp_path: Path) -> None:
    """A process of its own changes nothing: same seed, same weights."""
    made = [tiny(tmp_path / name) for name in ("one", "two")]
    hashes = []
    for organism, jobs in zip(made, (1, 2), strict=True):
        organism.gold.train(2, jobs=jobs)
        hashes.append([gold.weights_hash for gold in organism.gold])
    assert hashes[0] == hashes[1]
    assert len(set(hashes[0])) == 2


def test_a_weak_gold_that_a_process_trained_is_warned_of_here(tmp_path: Path) -> None:
    organism = tiny(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        organism.gold.train(2, jobs=2)
    weak = [str(w.message) for w in caught if "recalls little" in str(w.message)]
    assert [text.split(" recalls")[0] for text in sorted(weak)] == ["facts-gold seed 1000", "facts-gold seed 2000"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        organism.gold.train(2, jobs=2)  # said once, when they were trained


@pytest.mark.parametrize("content", ["{}", "garbage", '{"recall": 3}', '{"recall": {"forget": {}}}', "[]"])
def test_a_damaged_record_is_printed_as_one(tmp_path: Path, content: str) -> None:
    organism = tiny(tmp_path)
    (organism.path / "organism.json").write_text(content)
    assert "record is damaged" in repr(organism) and organism.name in organism._repr_html_()
    if content != '{"recall": {"forget": {}}}':
        with pytest.raises(OrganismError):
            organism.record["recall"]
    with pytest.raises(OrganismError, match=r"damaged|no finished organism|JSON object"):
        organism.to_df()


@pytest.mark.filterwarnings("ignore:.*(recalls little|damaged or unfinished)")
def test_a_gold_whose_weights_are_cut_short_is_not_trained(tmp_path: Path) -> None:
    organism = tiny(tmp_path)
    (weights,) = [path / "model.safetensors" for path in organism.gold.train(1).trained[:1]]
    digest = _cache.file_hash(weights)
    weights.write_bytes(b"x")
    assert organism.gold.trained == []
    organism.gold.train(1)
    assert _cache.file_hash(weights) == digest


def test_another_device_is_another_key_and_the_cpu_none(tmp_path: Path) -> None:
    organism = tiny(tmp_path)
    assert organism.record["device"] == "cpu" and "device" not in organism.record["settings"]
    assert tiny(tmp_path, device="cpu").path == organism.path
    cpu = organism._path_of("gold", 1000)
    organism.device = "cuda:1"
    assert organism._settings_of("gold", 1000)["device"] == "cuda" and organism._path_of("gold", 1000) != cpu


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99", 3.5])
def test_a_device_that_is_not_there(device: Any, tmp_path: Path) -> None:
    with pytest.raises(OrganismError, match="device"):
        tiny(tmp_path, device=device)


def test_counts_that_are_none(org: Any) -> None:
    for limit in (0, -1, 2.5, True):
        with pytest.raises(OrganismError, match="limit"):
            org.recall(org.model, "forget", limit=limit)
    for n in (0, -1, 2.5):
        with pytest.raises(OrganismError, match="n must be"):
            org.pairs(n=n)
    for n in ("3", 0, 1.0):
        with pytest.raises(OrganismError, match="gold retrain"):
            org.gold.train(n)


@pytest.mark.filterwarnings("ignore:.*recalls little")
def test_a_gold_that_its_process_failed_to_train_is_trained_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    organism = tiny(tmp_path)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert len(organism.gold.train(1).trained) == 1  # no more than was asked for
    with pytest.warns(UserWarning, match="gold 2 ended with code 1"):
        assert len(organism.gold.train(3, jobs=2).trained) == 3
    with pytest.raises(OrganismError, match="jobs"):
        organism.gold.train(2, jobs=0)
