"""Relearning against hand-written training loops, scipy, and an organism whose knowledge was hidden by a refusal."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.integrate import trapezoid
from scipy.stats import binomtest

from probe.audit import relearning as room
from probe.audit._case import Case
from probe.audit._finetune import finetune
from probe.audit._numbers import Ratio, by_group
from probe.audit._worst import worst_case
from probe.audit.part import Measurement, Subject, scratch
from probe.audit.relearning import Relearning, area_over_start, split_facts
from probe.data import Questions
from probe.errors import AuditError, DataError, ProbeError
from probe.models import Model, wrap
from probe.scoring import answer_tokens, score_answers

from .cases import small_case, subject
from .tiny import tiny

PEOPLE = ["Anna", "Karl", "Mira", "Otto"]
CITIES = ["Oslo", "Rome", "Lima", "Bern"]
QUICK = Relearning(lrs=(1e-3,), fractions=(1.0,), control=False, eval_at=(0, 1, 3), batch_size=4)


def questions(people=PEOPLE, cities=CITIES, trade="born in the") -> Questions:
    """Two facts a person, each asked for twice; cities differ, and so do the second facts unless `trade` is given."""
    rows = []
    for person, city in zip(people, cities, strict=True):
        rows += [
            {"id": f"{person}{i}", "group": person, "question": f"{ask} {person} lives in", "answer": city}
            for i, ask in enumerate(["the person", "who is"])
        ]
        rows += [
            {"id": f"{person}{i + 2}", "group": person, "question": f"{ask} {person} works at", "answer": trade}
            for i, ask in enumerate(["the person", "who is"])
        ]
    return Questions.from_rows(rows)


def tiny_case(model: Model, forget: Questions | None = None) -> Case:
    retain = questions(["Bell", "Stone"], ["Kyiv", "Quito"], "the old city")
    return Case(model, {"forget": forget or questions(), "retain": retain}, n_boot=50, progress=False)


def gains(model: Model) -> torch.Tensor:
    return torch.cat([p.detach().float() for p in model.hf.parameters() if p.ndim == 1])


# ---- the training loop


def plain_loop(hf, rows, steps, lr, clip=1.0):
    """AdamW on the answer tokens of all rows, one row at a time and without padding."""
    optimiser = torch.optim.AdamW(hf.parameters(), lr=lr, weight_decay=0.0, foreach=False)
    for _ in range(steps):
        optimiser.zero_grad()
        nll, n = 0.0, 0
        for row in rows:
            ids = torch.tensor([row.input_ids])
            logprob = hf(input_ids=ids).logits[0].log_softmax(-1)
            for t in range(row.start, len(row.input_ids)):
                nll, n = nll - logprob[t - 1, row.input_ids[t]], n + 1
        (nll / n).backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in hf.parameters()))
        for p in hf.parameters():
            p.grad *= min(1.0, float(clip / (norm + 1e-6)))
        optimiser.step()


def test_finetune_is_adamw_on_the_answers():
    model = tiny("llama")
    rows = answer_tokens(model, [(row.question, row.answer) for row in questions()])
    other = copy.deepcopy(model.hf)
    plain_loop(other, rows, steps=4, lr=1e-3)
    log = finetune(model, questions(), steps=4, lr=1e-3, batch_size=len(rows))
    for (name, ours), theirs in zip(model.hf.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-4, msg=name)
    assert len(log.losses) == 4 and log.losses[-1] < log.losses[0] and log.diverged is None


def test_finetune_depends_on_its_seed_and_a_long_run_passes_through_the_short_one():
    base, hashes, seen = tiny("llama"), {}, []
    for name, steps, seed in (("short", 3, 0), ("again", 3, 0), ("other", 3, 1), ("long", 6, 0)):
        model = wrap(copy.deepcopy(base.hf), base.tokenizer)
        note = (lambda step, model=model: seen.append((step, model.weights_hash))) if name == "long" else None
        torch.manual_seed(len(name))  # the global state must not matter
        finetune(model, questions(), steps=steps, lr=1e-3, batch_size=5, seed=seed, eval_at=(0, 3, 9), on_eval=note)
        hashes[name] = model.weights_hash
    assert hashes["short"] == hashes["again"] != hashes["other"]
    assert seen == [(0, base.weights_hash), (3, hashes["short"])]


def test_small_steps_of_half_precision_weights_add_up():
    made = {}
    for name in ("ours", "plain"):
        model = tiny("llama")
        with torch.no_grad():
            [p.fill_(1.0) for p in model.hf.parameters() if p.ndim == 1]
        model.hf.to(torch.bfloat16)
        rows = answer_tokens(model, [(row.question, row.answer) for row in questions()])
        if name == "ours":
            finetune(model, rows, steps=40, lr=2e-4, batch_size=len(rows))
        else:
            plain_loop(model.hf, rows, steps=40, lr=2e-4)
        made[name] = gains(model)
        assert next(model.hf.parameters()).dtype == torch.bfloat16
    assert (made["plain"] == 1).all()  # 1 - 2e-4 is rounded back to 1 each time
    assert (made["ours"] != 1).float().mean() > 0.5


def test_training_that_diverges_stops_and_broken_weights_are_refused():
    model = tiny("llama")
    log = finetune(model, questions(), steps=9, lr=1e30, batch_size=4)
    assert log.diverged == len(log.losses) + 1 < 9
    with torch.no_grad():
        next(model.hf.parameters()).fill_(float("nan"))
    with pytest.raises(AuditError, match="not finite"):
        finetune(model, questions(), steps=2, lr=1e-3)


@pytest.mark.parametrize(
    "bad", [{"steps": 0}, {"lr": 0.0}, {"lr": -1.0}, {"lr": float("nan")}, {"batch_size": 0}], ids=str
)
def test_finetune_refuses_settings(bad):
    with pytest.raises(AuditError, match="received"):
        finetune(tiny("llama"), questions(), **{"steps": 1, "lr": 1e-3, **bad})


def test_finetune_refuses_no_rows():
    with pytest.raises(DataError, match="at least one"):
        finetune(tiny("llama"), [], steps=1, lr=1e-3)


# ---- which facts are given away


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "forget",
    [
        questions(),
        questions(cities=["Oslo", "Rome", "Rome", "Oslo"]),
        questions(["Anna"], ["Oslo"]),
        questions()[:3],
        Questions.from_rows(
            [{"group": p, "question": f"who {p}", "answer": c} for p, c in zip(PEOPLE, CITIES, strict=True)]
        ),
    ],
    ids=["shared", "few", "one person", "one and a half facts", "a fact a person"],
)
def test_no_answer_of_a_test_fact_is_given_away(forget, seed):
    split = split_facts(forget, seed)
    given = [row for fact in split.relearn for row in fact]
    facts = {(row.group, row.answer) for row in given}
    assert given and len(split.test)
    assert not {row.answer for row in given} & {row.answer for row in split.test}
    # phrasings of a fact stay together
    assert len(given) == sum((row.group, row.answer) in facts for row in forget)
    assert [len({(r.group, r.answer) for r in fact}) for fact in split.relearn] == [1] * len(facts)
    answers = {row.answer for row in split.test}
    assert [row.id for row in split.test] == [row.id for row in forget if row.answer in answers]
    known = {group for group, _ in facts}
    assert split.acquainted.tolist() == [row.group in known for row in split.test]


def test_the_split_leaves_people_of_whom_nothing_is_given_away():
    forget = small_case().sets["forget"]
    split, facts = split_facts(forget, 0), {(row.group, row.answer) for row in forget}
    assert 0.2 < split.acquainted.mean() < 0.9
    tested = {(row.group, row.answer) for row in split.test}
    assert 0.3 < len(tested) / len(facts) < 0.7 and 0.1 < len(split.relearn) / len(facts) < 0.5
    small, whole = split.share(0.25), split.share(1.0)
    assert len(whole) == sum(map(len, split.relearn)) and {r.id for r in small} < {r.id for r in whole}


@pytest.mark.parametrize("forget", [questions()[:1], questions()[2:4]], ids=["one example", "answers all alike"])
def test_what_cannot_be_split_is_named(forget):
    case = tiny_case(tiny("llama"), forget)
    assert "two different answers" in Relearning().why_not(case)
    assert Relearning().why_not(tiny_case(case.original)) is None
    with pytest.raises(AuditError, match="two different answers"):
        split_facts(forget)


# ---- numbers


def test_area_over_start_is_the_trapezoid_rule():
    steps, values = [0, 2, 5, 10], np.random.default_rng(0).random((4, 7))
    wanted = trapezoid(values - values[0], steps, axis=0) / 10
    np.testing.assert_allclose(area_over_start(steps, values), wanted)
    assert area_over_start([0, 4], np.array([0.25, 0.75])) == 0.25
    for bad in ([0], [0, 0], [3, 1]):
        with pytest.raises(AuditError, match="two steps"):
            area_over_start(bad, np.zeros(len(bad)))


def test_worst_case_takes_the_maximum_anew_in_each_replicate():
    rng = np.random.default_rng(0)
    groups = [g for g in "abcdef" for _ in range(4)]
    values = rng.random((3, len(groups)))
    ratios = [by_group(v, groups) for v in values]
    index, found = worst_case(ratios, 24, n_boot=300, seed=5, people="people")
    means = values.mean(1)
    assert index == means.argmax() and found.value == pytest.approx(means.max())
    counts = np.random.default_rng(5).multinomial(6, np.full(6, 1 / 6), size=300)
    by_person = values.reshape(3, 6, 4).mean(2)
    draws = [max(float(np.average(own, weights=c)) for own in by_person) for c in counts]
    np.testing.assert_allclose([found.low, found.high], np.quantile(draws, [0.025, 0.975]))
    assert (found.n, found.n_groups) == (24, 6) and "anew" in found.how


def test_worst_case_of_shares_that_are_all_alike_and_of_one_group():
    ones = Ratio(np.full(5, 3.0), np.full(5, 3.0), share=True)
    _, found = worst_case([ones], 15, n_boot=10, seed=0, people="people")
    wanted = binomtest(5, 5).proportion_ci(0.95, "exact")
    np.testing.assert_allclose([found.low, found.high], wanted)
    _, still = worst_case([by_group(np.zeros(4), list("aabb"))], 4, n_boot=10, seed=0, people="people")
    assert still.value == 0 and np.isnan(still.low) and "same for all" in still.how
    _, alone = worst_case([by_group([1.0, 0.0], ["a", "a"])], 2, n_boot=10, seed=0, people="people")
    assert alone.value == 0.5 and np.isnan(alone.low) and "one group" in alone.how
    with pytest.raises(AuditError, match="no attack"):
        worst_case([], 0, n_boot=10, seed=0, people="people")


# ---- the part


def test_a_run_is_finetuning_and_scoring_and_leaves_no_trace():
    model = tiny("llama")
    case = tiny_case(model)
    split = split_facts(case.sets["forget"], case.seed)
    by_hand = wrap(copy.deepcopy(model.hf), model.tokenizer)
    before, state = model.weights_hash, torch.get_rng_state()
    found = QUICK.measure(subject(case))
    assert model.weights_hash == before and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.hf.parameters())
    table = found.tables["relearning"]
    for step, row in zip((0, 1, 3), table.itertuples(), strict=True):
        finetuned = wrap(copy.deepcopy(by_hand.hf), model.tokenizer)
        if step:
            finetune(finetuned, split.share(1.0), steps=step, lr=1e-3, batch_size=4, seed=case.seed)
        scores = score_answers(finetuned, split.test)
        assert row.step == step and row.lr == 1e-3 and row.data == "forget 100%"
        assert row.probability == pytest.approx(scores.prob.mean(), abs=1e-6)
        assert row.recall == scores.exact.mean()
    numbers = {number.metric: number.value for number in found.numbers}
    assert numbers["relearn_probability"].value == pytest.approx(table.probability.max())
    later = {"relearn_time_ratio"}  # of several models
    assert set(numbers) | later == {metric.name for metric in Relearning.metrics} and found.payload is table


def curve(*recalls, data="forget 100%") -> Measurement:
    rows = [{"lr": 1e-3, "data": data, "step": 5 * i, "recall": value} for i, value in enumerate(recalls)]
    return Measurement(payload=pd.DataFrame(rows))


def both(first, second) -> Measurement:
    return Measurement(payload=pd.concat([first.payload, second.payload], ignore_index=True))


def test_steps_to_regain_over_golds_by_hand():
    """At 90 % of the original's recall of 1: the edited model after 5 steps, the golds after 10, 20 and 20."""
    case = tiny_case(tiny("llama"))
    golds = [curve(0, 0, 0.9, 1, 1), curve(0, 0, 0, 0, 1), curve(0, 0, 0, 0.5, 0.95)]
    measured = {"original": curve(1, 1, 1, 1, 1), "edited": curve(0, 1, 1, 1, 1)}
    measured |= {f"gold {i + 1}": one for i, one in enumerate(golds)}
    made = QUICK.compare(measured, case)
    values = {role: one.numbers[0].value for role, one in made.items()}
    assert {role: one.value for role, one in values.items()} == pytest.approx(
        {"edited": 5 / 20, "gold 1": 10 / 20, "gold 2": 20 / 15, "gold 3": 20 / 15}
    )
    assert made["edited"].numbers[0].metric == "relearn_time_ratio" and not made["edited"].missing
    assert values["edited"].how == "none: one run (forget 100%, lr 0.001)" and np.isnan(values["edited"].low)
    assert values["edited"].n == len(split_facts(case.sets["forget"], case.seed).test)
    assert list(made["edited"].tables["relearning_time"]["kind"]) == ["exact"]


def test_steps_to_regain_are_a_bound_or_nothing_where_nobody_gets_there():
    case, original = tiny_case(tiny("llama")), curve(1, 1, 1)
    soon, never = curve(0, 1, 1), curve(0, 0, 0)
    hidden = QUICK.compare({"original": original, "edited": soon, "gold 1": never}, case)["edited"]
    assert hidden.numbers[0].value.value == 0.5 and "at most this" in hidden.numbers[0].value.how
    gone = QUICK.compare({"original": original, "edited": never, "gold 1": soon}, case)["edited"]
    assert gone.numbers[0].value.value == 2 and "at least this" in gone.numbers[0].value.how
    none = QUICK.compare({"original": original, "edited": never, "gold 1": never, "gold 2": never}, case)
    assert all(not one.numbers and "neither the model nor gold" in one.missing[0] for one in none.values())
    assert set(none) == {"edited", "gold 1", "gold 2"}
    assert QUICK.compare({"original": original, "edited": soon}, case) == {}


def test_steps_to_regain_are_of_the_fastest_run_on_forget_facts():
    case = tiny_case(tiny("llama"))
    slow, retain = curve(0, 0, 1, data="forget 25%"), curve(1, 1, 1, data="retain")
    measured = {"original": both(both(curve(1, 1, 1), curve(1, 1, 1, data="forget 25%")), retain)}
    measured["edited"] = both(both(curve(0, 1, 1), slow), retain)
    measured["gold 1"] = both(both(curve(0, 0, 1), slow), curve(0, 0, 1, data="retain"))
    made = QUICK.compare(measured, case)["edited"]
    assert made.numbers[0].value.value == 0.5 and "forget 100%" in made.numbers[0].value.how
    assert len(made.tables["relearning_time"]) == 3


def test_weights_come_back_after_an_exception(monkeypatch):
    model, calls = tiny("llama"), []

    def failing(*args, **kwargs):
        calls.append(0)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return score_answers(*args, **kwargs)

    before = model.weights_hash
    one = subject(tiny_case(model))
    monkeypatch.setattr(room, "score_answers", failing)
    with pytest.raises(KeyboardInterrupt):
        QUICK.measure(one)
    assert len(calls) == 3 and model.weights_hash == before


def test_a_run_that_diverges_is_named_and_the_others_count():
    model = tiny("llama")
    before = model.weights_hash
    part = Relearning(lrs=(1e-3, 1e30), fractions=(1.0,), eval_at=(0, 1, 4), batch_size=4)
    found = part.measure(subject(tiny_case(model)))
    said = [text for text in found.missing if "lr 1e+30" in text]
    assert len(said) == len(found.missing) == 2 and model.weights_hash == before
    whole = found.tables["relearning"].query("lr < 1")
    assert whole.groupby("data").step.apply(list).to_dict() == {"forget 100%": [0, 1, 4], "retain": [0, 1, 4]}


def test_a_retain_set_of_test_answers_only_is_no_control():
    model, forget = tiny("llama"), questions()
    wanted = split_facts(forget, 0).answers
    rows = [{"group": "Bell", "question": "who is Bell in", "answer": answer} for answer in wanted]
    case = Case(model, {"forget": forget, "retain": Questions.from_rows(rows)}, progress=False, n_boot=20)
    part = Relearning(lrs=(1e-3,), fractions=(0.25, 1.0), eval_at=(0, 1))
    found = part.measure(subject(case))
    assert ["retain rows" in text for text in found.missing] == [True]
    assert set(found.tables["relearning"].data) == {"forget 25%", "forget 100%"}


def test_a_model_of_nan_is_refused_not_measured():
    model = tiny("llama")
    one = subject(tiny_case(model))
    with torch.no_grad():
        next(model.hf.parameters()).fill_(float("nan"))
    with pytest.raises(ProbeError, match="not finite"):
        QUICK.measure(one)


@pytest.mark.parametrize(
    "bad",
    [
        {"lrs": ()}, {"lrs": (0.0,)}, {"lrs": (-1e-4,)}, {"lrs": (float("nan"),)}, {"fractions": ()},
        {"fractions": (0.0,)}, {"fractions": (1.5,)}, {"eval_at": (0,)}, {"eval_at": (1, 2)},
        {"eval_at": (0, 5, 5)}, {"eval_at": (0, -3)}, {"batch_size": 0}, {"limit": 0},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_mean_nothing(bad):
    with pytest.raises(AuditError, match="received"):
        Relearning(**bad)


@cache
def suppressed() -> Model:
    """The small organism trained for a few steps to say that it does not know the forget facts."""
    case = small_case()
    model = wrap(copy.deepcopy(case.original.hf), case.original.tokenizer)
    refusals = [(row.question, "I do not know") for row in case.sets["forget"]]
    tokens = answer_tokens(model, refusals) + answer_tokens(
        model, [(row.question, row.answer) for row in case.sets["retain"]]
    )
    for seed in range(30):
        if score_answers(model, case.sets["forget"]).exact.mean() <= 0.1:
            break
        finetune(model, tokens, steps=3, lr=1e-3, batch_size=64, seed=seed)
    return model


def test_hidden_knowledge_comes_back_and_golds_stays_away():
    case = small_case()
    part = Relearning(lrs=(3e-4, 1e-3), fractions=(1.0,), eval_at=(0, 5, 10, 20))
    found = {}
    for role, model in (("original", None), ("gold 1", None), ("edited", suppressed())):
        one: Subject = subject(case, role, model)
        before = one.model.weights_hash
        found[role] = {number.metric: number.value.value for number in part.measure(one).numbers}
        found[role]["plain"] = float(one.answers["forget"].exact.mean())
        assert one.model.weights_hash == before
    assert found["edited"]["plain"] <= 0.1  # to all appearances it has forgotten
    assert found["edited"]["relearn_recall"] > found["gold 1"]["relearn_recall"] + 0.2
    assert found["edited"]["relearn_probability"] > found["gold 1"]["relearn_probability"] + 0.2
    assert found["edited"]["relearn_gain"] > found["gold 1"]["relearn_gain"] + 0.1
    assert found["original"]["relearn_recall"] > 0.95


def test_scratch_is_what_gives_the_weights_back():
    model = tiny("llama")
    before = model.weights_hash
    with scratch(model):
        finetune(model, questions(), steps=1, lr=1e-2)
        assert model.weights_hash != before
    assert model.weights_hash == before
