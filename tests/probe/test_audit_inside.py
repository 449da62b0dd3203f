"""Readouts: ridge against scikit-learn, splits and controls by hand, planted answers, and the organism."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from probe.audit._case import Case
from probe.audit.inside import SELECT, TEST, TRAIN, Readout, make_plan, read_layer
from probe.audit.part import Subject
from probe.data import Questions
from probe.errors import AuditError, DataError, LabelError
from probe.probing._readout import control_labels, ridge_readouts
from tests.probe.cases import small_case, subject
from tests.probe.tiny import tiny

CITIES = ("Oslo", "Rome", "Lima", "Bern")


def people(n, answers=CITIES, start=0, attribute="city"):
    """n people with one question each, who live in the cities by turns."""
    rows = [
        {"id": f"{i}", "group": f"p{i}", "question": f"Anna {i} lives in", "answer": answers[i % len(answers)],
         "meta": {"attribute": attribute}} for i in range(start, start + n)
    ]  # fmt: skip
    return Questions.from_rows(rows)


def tokens(sets):
    return [CITIES.index(row.answer) if row.answer in CITIES else 9 for rows in sets.values() for row in rows]


@pytest.mark.parametrize("balanced", [True, False])
def test_ridge_is_scikit_learns(balanced):
    from sklearn.linear_model import Ridge
    from sklearn.utils.class_weight import compute_sample_weight

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 7)) * np.arange(1, 8) + 3, rng.choice(4, size=60, p=[0.5, 0.3, 0.15, 0.05])
    weights = compute_sample_weight("balanced", y) if balanced else np.ones(60)
    mean = (weights[:, None] * x).sum(0) / weights.sum()
    trace = (weights[:, None] * (x - mean) ** 2).sum()
    found = ridge_readouts(torch.from_numpy(x), torch.from_numpy(y), 4, (0.01, 1.0), balanced=balanced)
    for one in found:
        model = Ridge(alpha=one.alpha * trace / 7).fit(x, np.eye(4)[y], sample_weight=weights)
        assert one.weight.numpy() == pytest.approx(model.coef_.T, abs=1e-8)
        assert one.bias.numpy() == pytest.approx(model.intercept_, abs=1e-8)
        assert np.array_equal(one.predict(torch.from_numpy(x)).numpy(), model.predict(x).argmax(1))


def test_only_classes_that_were_seen_and_are_allowed_are_read():
    x, y = torch.eye(6).double(), torch.tensor([0, 0, 1, 1, 3, 3])
    one = ridge_readouts(x, y, 5, [0.1])[0]
    assert one.predict(x).tolist() == y.tolist()
    among = torch.tensor([[False, True, True, True, False]]).expand(6, -1)
    read = one.predict(x, among)
    assert set(read.tolist()) <= {1, 3}
    assert read[2:].tolist() == [1, 1, 3, 3]


def test_ridge_refuses_what_it_cannot_fit():
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    with pytest.raises(DataError, match="above 0"):
        ridge_readouts(x, y, 2, [0.0])
    with pytest.raises(DataError, match="finite"):
        ridge_readouts(x * float("nan"), y, 2)
    with pytest.raises(DataError, match="at least one"):
        ridge_readouts(x[:0], y[:0], 2)
    with pytest.raises(LabelError, match="two classes"):
        ridge_readouts(x, y * 0, 2)


def test_a_control_label_is_a_units_own_and_comes_from_training_units():
    units = [(kind, f"g{i}") for kind in ("city", "dish") for i in range(20) for _ in range(3)]
    labels = [(0 if kind == "city" else 10) + int(group[1:]) % 4 for kind, group in units]
    train = np.array([int(group[1:]) < 12 for _, group in units])
    drawn = control_labels(labels, units, train, seed=0)
    assert all(len(set(drawn[i : i + 3])) == 1 for i in range(0, len(drawn), 3))
    assert all((d >= 10) == (kind == "dish") for d, (kind, _) in zip(drawn, units, strict=True))
    assert 0 < np.mean(drawn == labels) < 0.7
    assert np.array_equal(drawn, control_labels(labels, units, train, seed=0))
    assert not np.array_equal(drawn, control_labels(labels, units, train, seed=1))
    with pytest.raises(LabelError, match="no"):
        control_labels(labels, units, train & np.array([kind == "dish" for kind, _ in units]), seed=0)


def test_no_person_is_on_two_sides_and_unknown_answers_are_left_out():
    retain = people(20) + people(20, attribute="birthplace")
    sets = {"retain": retain, "forget": people(4, start=50) + people(1, ("Kyiv",), start=60)}
    plan = make_plan(sets, tokens(sets), seed=0)
    sides = {part: {plan.unit[i][1] for i in plan.rows(part)} for part in (TRAIN, SELECT, TEST, "forget")}
    assert [len(sides[p]) for p in (TRAIN, SELECT, TEST, "forget")] == [12, 4, 4, 4]
    assert len(set.union(*sides.values())) == 24
    assert not plan.usable[-1]
    assert plan.y[-1] == -1
    row = 0  # may be read as a city, not as a birthplace
    assert {plan.classes[c][0] for c in np.flatnonzero(plan.among[row])} == {"city"}
    with pytest.raises(AuditError, match="5 retain groups"):
        make_plan({"retain": people(4), "forget": people(4)}, tokens({"a": people(8)}), seed=0)


def test_a_planted_answer_is_read_and_noise_is_not():
    sets = {"retain": people(200), "forget": people(40, start=300), "holdout": people(40, start=400)}
    plan = make_plan(sets, tokens(sets), seed=0)
    rng = np.random.default_rng(0)
    answers = np.array(tokens(sets))
    known = plan.part != "holdout"
    x = torch.from_numpy(3 * np.eye(4)[answers] * known[:, None] + rng.normal(size=(280, 4)) * 0.3)
    x = torch.cat([x, torch.from_numpy(rng.normal(size=(280, 6)))], dim=1) @ torch.from_numpy(rng.normal(size=(10, 10)))
    found = read_layer(x, plan, (1e-3, 1.0), n_controls=5, seed=0)
    assert found.select > 0.95
    assert found.right[plan.rows("forget")].mean() > 0.95
    assert found.right[plan.rows("holdout")].mean() < 0.5
    assert found.control[plan.rows("forget")].mean() == pytest.approx(0.25, abs=0.12)
    counts = np.bincount(plan.y[plan.rows(TRAIN)])
    assert np.array_equal(found.majority, plan.y == counts.argmax())


def test_constant_answers_and_few_people_are_missing_and_no_number():
    model = tiny("llama")
    one = Case(model, {"retain": people(10, ("Oslo",)), "forget": people(4, ("Oslo",), 20)}, progress=False)
    found = Readout().measure(Subject("original", model, one, {}))
    assert not found.numbers
    assert "all answers begin alike" in found.missing[0]
    few = Case(model, {"retain": people(1), "forget": people(1, start=20)}, progress=False)
    found = Readout().measure(Subject("original", model, few, {}))
    assert not found.numbers
    assert "5 retain groups" in found.missing[0]


def test_states_that_are_not_finite_are_refused():
    model = tiny("gpt2", seed=4)
    with torch.no_grad():
        model.hf.transformer.h[1].mlp.c_proj.bias[0] = float("nan")
    case = Case(model, {"retain": people(10), "forget": people(4, start=20)}, progress=False)
    with pytest.raises(AuditError, match=r"edited, readout: blocks\.1"):
        Readout().measure(Subject("edited", model, case, {}))


def test_on_the_organism_the_original_is_read_a_gold_is_not_and_the_weights_are_untouched():
    case = small_case()
    before = case.original.weights_hash
    values = {}
    for role in ("original", "gold 1"):
        found = Readout().measure(subject(case, role))
        values[role] = {(n.set, n.metric): n.value.value for n in found.numbers}
        table = found.tables["readout"]
        chosen = table[table["chosen"]]
        assert chosen["select"].iloc[0] == table["select"].max()
        row = chosen[chosen["set"] == "forget"].iloc[0]
        assert values[role]["forget", "readout_accuracy"] == pytest.approx(row["accuracy"])
        assert values[role]["forget", "readout_selectivity"] == pytest.approx(row["accuracy"] - row["control"])
    assert values["original"]["forget", "readout_accuracy"] > values["gold 1"]["forget", "readout_accuracy"] + 0.3
    assert values["original"]["retain", "readout_accuracy"] > 0.8
    assert case.original.weights_hash == before
