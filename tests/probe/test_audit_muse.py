"""MUSE's four numbers, on the small organism and against scikit-learn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from probe.audit import metrics
from probe.audit._generation import answered
from probe.audit.muse import Muse, member_scores, membership_auc
from probe.audit.part import Measurement, scratch
from probe.errors import AuditError
from tests.probe.cases import small_case, subject

PART = Muse(limit=30)


@pytest.fixture(scope="module")
def case():
    full = small_case()
    return replace(full, sets={name: full.sets[name] for name in ("forget", "retain", "holdout")})


@pytest.fixture(scope="module")
def subjects(case):
    return {role: subject(case, role) for role in ("original", "gold 1", "gold 2")}


@pytest.fixture(scope="module")
def measured(subjects):
    return {role: PART.measure(one) for role, one in subjects.items()}


def values(measurement) -> dict:
    return {one.metric: one.value.value for one in measurement.numbers}


def test_memory_is_of_what_was_trained_on(measured):
    known, unknown = values(measured["original"]), values(measured["gold 1"])
    assert known["knowledge_memory"] > 0.85 and known["utility_preservation"] > 0.85
    assert unknown["knowledge_memory"] < 0.6 < unknown["utility_preservation"]
    assert known["verbatim_memory"] > unknown["verbatim_memory"] + 0.2


def test_knowledge_memory_is_the_mean_f1_of_the_answers(measured, subjects):
    rows, said = answered(subjects["gold 1"], "forget", PART.limit, PART.answer_tokens)
    each = [metrics.rouge_l(text, row.answer).f1 for row, text in zip(rows, said, strict=True)]
    assert values(measured["gold 1"])["knowledge_memory"] == pytest.approx(np.mean(each))


def test_verbatim_memory_against_a_loop(subjects):
    """One text at a time: three quarters of it are given, and as many tokens asked for as it goes on with."""
    one, part = subjects["original"], Muse(limit=6)
    model, each = one.model, []
    for i in range(6):
        row = one.case.sets["forget"][i * len(one.case.sets["forget"]) // 6]
        ids = model.tokenizer(f"{row.question} {row.answer}")["input_ids"]
        ids = ids[:-1] if ids[-1] == model.tokenizer.eos_token_id else ids
        cut = int(len(ids) * 0.75)
        made = ids[:cut]
        for _ in range(len(ids) - cut):
            with torch.no_grad():
                made = [*made, int(model.hf(torch.tensor([made])).logits[0, -1].argmax())]
            if made[-1] == model.tokenizer.eos_token_id:
                break
        texts = [model.tokenizer.decode(own[cut:], skip_special_tokens=True) for own in (made, ids)]
        each.append(metrics.rouge_l(*texts).f1)
    assert values(part.measure(one))["verbatim_memory"] == pytest.approx(np.mean(each))


def test_auc_is_scikit_learns_with_forget_positive():
    rng = np.random.default_rng(0)
    forget, holdout = rng.integers(0, 6, 30) / 5, rng.integers(1, 8, 40) / 5  # with ties
    labels = np.repeat([1, 0], [30, 40])
    assert membership_auc(forget, holdout) == pytest.approx(roc_auc_score(labels, np.r_[forget, holdout]))
    assert membership_auc(np.array([0.0, 1]), np.array([2.0, 3])) == 0  # low is what was trained on


def test_auc_of_nothing_is_no_number():
    some = np.array([1.0, 2])
    for forget, holdout in ((some[:0], some), (some, some[:0]), (some, np.array([np.nan])), (some[:1], some[:1])):
        with pytest.raises(AuditError):
            membership_auc(forget, holdout)


def test_member_scores_are_minus_the_lowest_log_probabilities(subjects):
    one = subjects["gold 2"]
    own = one.answers["holdout"].token_logprobs
    wanted = [-np.mean(sorted(row)[: max(1, int(len(row) * 0.4))]) for row in own]
    np.testing.assert_allclose(member_scores(one, "holdout"), wanted, rtol=1e-6)


def test_privacy_leakage_by_scikit_learn(measured, subjects, case):
    labels, aucs = np.repeat([1, 0], [len(case.sets["forget"]), len(case.sets["holdout"])]), {}
    for role, one in subjects.items():
        scores = np.r_[member_scores(one, "forget"), member_scores(one, "holdout")]
        aucs[role] = roc_auc_score(labels, scores)  # raw: low for members, forget positive
    made = PART.compare(measured, case)
    mean = (aucs["gold 1"] + aucs["gold 2"]) / 2
    own = made["original"].numbers[0].value
    assert own.value == pytest.approx((aucs["original"] - mean) / mean * 100)
    ends = sorted((aucs["original"] - aucs[gold]) / aucs[gold] * 100 for gold in ("gold 1", "gold 2"))
    assert [own.low, own.high] == pytest.approx(ends)
    other = made["gold 1"].numbers[0].value
    assert other.value == pytest.approx((aucs["gold 1"] - aucs["gold 2"]) / aucs["gold 2"] * 100)
    assert own.value < -60 < -abs(other.value)
    assert (own.n, own.n_groups) == (len(labels), len({*case.sets["forget"].groups, *case.sets["holdout"].groups}))


def test_the_sign_of_privacy_leakage_by_hand(case):
    """A model that knows has low raw scores on forget: AUC 1/9 against gold's 5/9, so -80 %, as MUSE has it."""
    knows = {"forget": np.array([0.1, 0.2, 1.5]), "holdout": np.array([1.0, 2.0, 3.0])}
    gold = {"forget": np.array([0.5, 1.5, 3.5]), "holdout": np.array([1.0, 2.0, 1.2])}
    aucs = [roc_auc_score([1, 1, 1, 0, 0, 0], np.r_[one["forget"], one["holdout"]]) for one in (knows, gold)]
    assert aucs == pytest.approx([1 / 9, 5 / 9])
    assert [membership_auc(one["forget"], one["holdout"]) for one in (knows, gold)] == pytest.approx(aucs)
    measured = {"edited": Measurement(payload=knows), "gold 1": Measurement(payload=gold)}
    assert PART.compare(measured, case)["edited"].numbers[0].value.value == pytest.approx(-80)


def test_privacy_leakage_that_cannot_be_measured(measured, subjects, case):
    alone = PART.compare({"original": measured["original"]}, case)
    assert "no (other) gold" in alone["original"].missing[0]
    without = replace(case, sets={name: case.sets[name] for name in ("forget", "retain")})
    bare = {role: PART.measure(replace(one, case=without)) for role, one in subjects.items()}
    made = PART.compare(bare, without)
    assert all(one.numbers == () and "no holdout" in one.missing[0] for one in made.values())
    zero = Measurement(payload={"forget": np.array([1.0, 2]), "holdout": np.array([3.0, 4])})
    assert "gold's AUC is 0" in PART.compare({**measured, "gold 1": zero, "gold 2": zero}, case)["original"].missing[0]
    flat = Measurement(payload={"forget": np.ones(3), "holdout": np.ones(3)})
    made = PART.compare({**measured, "edited": flat}, case)
    assert made["edited"].numbers == () and "same membership score" in made["edited"].missing[0]


def test_a_model_that_answers_everything_alike(case):
    with scratch(case.original) as model:
        with torch.no_grad():
            next(p for name, p in model.hf.named_parameters() if "layers" not in name and "norm" in name).zero_()
        edited = PART.measure(subject(case, "edited", model))
    assert values(edited)["knowledge_memory"] == 0
    golds = {role: PART.measure(subject(case, role)) for role in ("gold 1", "gold 2")}
    made = PART.compare({**golds, "edited": edited}, case)["edited"]
    assert made.numbers == () and "same membership score" in made.missing[0]


def test_one_question(case):
    sets = {name: case.sets[name][:1] for name in ("forget", "retain", "holdout")}
    one = subject(replace(case, sets=sets))
    found = values(PART.measure(one))
    assert found["knowledge_memory"] == 1
    assert found["utility_preservation"] == 1


def test_declared_metrics_are_those_reported(measured, case):
    numbers = [*measured["original"].numbers, *PART.compare(measured, case)["original"].numbers]
    assert {one.metric for one in numbers} == {metric.name for metric in PART.metrics}
