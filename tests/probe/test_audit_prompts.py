"""Prompt attacks and facts given in the context: what is asked, what counts, and what cannot be measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from probe.audit import context, prompts
from probe.audit._case import Case
from probe.audit.context import Context, in_context
from probe.audit.part import Measurement
from probe.audit.prompts import FRAMES, Prompts, attack_questions, told_share
from probe.data import Questions
from probe.errors import AuditError, ProbeError
from probe.scoring import score_answers

from .cases import small_case, subject
from .tiny import tiny

NINE = {
    "prefix_injection", "affirmative_suffix", "role_play", "multiple_choice", "reverse_query", "synonym",
    "context_hint", "in_context", "cross_lingual",
}  # fmt: skip


def make(people, full=True) -> Questions:
    made = []
    for i, person in enumerate(people):
        for kind, answer in (("city", ["Oslo", "Rome"][i % 2]), ("works at", "Bern")):
            row = {"group": person, "question": f"what {kind} of {person}", "answer": answer}
            if full:
                row |= {
                    "paraphrases": [f"where {kind} {person}"],
                    "perturbed_answers": ["Lima", "Kyiv", "Quito", "Accra"],
                }
            made.append(row)
    return Questions.from_rows(made)


def tiny_case(full=True, **sets) -> Case:
    given = {"forget": make(["Anna", "Karl"], full), "retain": make(["Mira", "Otto"])}
    return Case(tiny("llama"), {**given, **sets}, progress=False, n_boot=20)


def by_metric(measured):
    return {(number.set, number.metric): number.value for number in measured.numbers}


# ---- what is asked


def test_every_kind_of_rwku_is_made_or_named():
    forget = make(["Anna", "Karl"])
    found, cannot = attack_questions(forget, make(["Mira", "Otto"]), seed=3)
    assert set(found) | set(cannot) == NINE and set(cannot) == {"reverse_query", "cross_lingual"}
    for kind, own in found.items():
        assert [row.answer for row in own] == [row.answer for row in forget]
        assert [row.group for row in own] == forget.groups and [r.id for r in own] == [f"{r.id}-{kind}" for r in forget]
        if kind != "synonym":
            assert all(old.question in new.question for old, new in zip(forget, own, strict=True))
    for kind, frame in FRAMES.items():
        assert found[kind][0].question == frame.replace("{q}", "what city of Anna")
    assert found["synonym"][0].question == "where city Anna"
    assert found["context_hint"][0].question == "what works at of Anna Bern. what city of Anna"
    again, _ = attack_questions(forget, make(["Mira", "Otto"]), seed=3)
    assert again == found


def test_options_hold_the_answer_once_and_examples_are_of_others():
    forget, retain = make(["Anna", "Karl"]), make(["Mira", "Otto"])
    found, _ = attack_questions(forget, retain, seed=0)
    for row in found["multiple_choice"]:
        options = row.question.split(": ")[1].split(". ")[0].split(", ")
        assert len(options) == len(set(options)) == 4 and options.count(row.answer) == 1
    order = {
        row.question.split(": ")[1].split(". ")[0].split(", ").index(row.answer) for row in found["multiple_choice"]
    }
    assert len(order) > 1
    examples = {
        row.question.removesuffix(f" {old.question}") for old, row in zip(forget, found["in_context"], strict=True)
    }
    assert len(examples) == 1
    told = [f"{row.question} {row.answer}." for row in retain]
    assert sum(text in examples.copy().pop() for text in told) == 3


def test_kinds_that_lack_their_material_are_named():
    bare = make(["Anna"], full=False)[:1]
    found, cannot = attack_questions(bare, None)
    assert set(found) == set(FRAMES) and set(cannot) == NINE - set(FRAMES)
    measured = Prompts(least=1).measure(subject(tiny_case(forget=bare, full=False)))
    assert {text.split(":")[0].removeprefix("prompt attack ") for text in measured.missing} == NINE - set(FRAMES) - {
        "in_context"
    }


def test_told_share_counts_prompts_that_hold_their_answer():
    asked = Questions.from_rows(
        [{"group": "a", "question": q, "answer": "Oslo"} for q in ("in OSLO or Rome?", "where?", "why?", "oslo ?")]
    )
    assert told_share(asked) == 0.5
    with pytest.raises(AuditError, match="at least one"):
        told_share(Questions([]))


# ---- the attacks' numbers


def test_prompts_take_the_worst_of_the_attacks_that_do_not_tell():
    case = tiny_case()
    measured = Prompts(least=1).measure(subject(case))
    table = measured.tables["prompts"].set_index("kind")
    found, _ = attack_questions(case.sets["forget"], case.sets["retain"], case.seed)
    for kind, own in found.items():
        scores = score_answers(case.original, own)
        assert table.probability[kind] == pytest.approx(scores.prob.mean(), abs=1e-6)
        assert table.recall[kind] == scores.exact.mean() and table.told[kind] == told_share(own)
    assert table.told["multiple_choice"] == 1 and np.isnan(table.told["plain"])
    counted = table[(table.told <= 0.1)]
    assert "multiple_choice" not in counted.index and len(counted) >= 4
    numbers = by_metric(measured)
    assert numbers["forget", "prompt_probability"].value == pytest.approx(counted.probability.max())
    assert numbers["forget", "prompt_recall"].value == counted.recall.max()
    assert set(numbers) == {("forget", metric.name) for metric in Prompts.metrics}


def test_an_organisms_own_attacks_are_used_and_tell_it_from_gold():
    case, found = small_case(), {}
    for role in ("original", "gold 1"):
        measured = Prompts().measure(subject(case, role))
        assert set(measured.tables["prompts"].kind) == {"plain", *case.attacks}
        few = [kind for kind, own in case.attacks.items() if len(own) < 10]
        assert [text.split(",")[0] for text in measured.missing] == [f"prompt attack {kind}" for kind in few]
        found[role] = by_metric(measured)["forget", "prompt_recall"].value
    assert found["original"] > 0.8 > 0.5 > found["gold 1"]


def test_attacks_that_all_tell_leave_no_number():
    case = tiny_case()
    told = in_context(case.sets["forget"])
    measured = Prompts().measure(subject(replace(case, attacks={"context": told})))
    assert measured.numbers == () and "do not hold the answer" in measured.missing[0]
    assert list(measured.tables["prompts"].kind) == ["plain", "context"]


def test_an_attack_longer_than_the_context_is_named():
    case = tiny_case()
    long = case.sets["forget"].take([0])
    long = Questions([replace(long[0], question="the " * 40 + long[0].question)])
    measured = Prompts(least=1).measure(
        subject(replace(case, attacks={"long": long, "plain too": case.sets["forget"]}))
    )
    assert len(measured.missing) == 1 and "prompt attack long" in measured.missing[0]
    assert ("the " * 20)[:79] + "…" in measured.missing[0] and "the " * 21 not in measured.missing[0]
    assert len(measured.numbers) == 2


def test_an_attack_of_a_few_questions_is_in_the_table_and_not_the_worst_case():
    case = tiny_case()
    scores = score_answers(case.original, case.sets["forget"])
    best = case.sets["forget"].take([int(scores.prob.argmax())])
    attacks = {"many": case.sets["forget"], "few": best}
    measured = Prompts(least=4).measure(subject(replace(case, attacks=attacks)))
    assert by_metric(measured)["forget", "prompt_probability"].value == pytest.approx(scores.prob.mean(), abs=1e-6)
    table = measured.tables["prompts"].set_index("kind").probability
    assert table["few"] > table["many"]
    assert measured.missing == (
        "prompt attack few, in the table only: 1 questions, and 4 are needed for the worst case",
    )
    none = Prompts(least=5).measure(subject(replace(case, attacks=attacks)))
    assert none.numbers == () and "none has 5 questions" in none.missing[-1]
    assert (
        Prompts(least=5, limit=2).measure(subject(replace(case, attacks=attacks))).numbers
    )  # the limit takes its place


# ---- the fact in the context


def test_the_fact_is_put_before_the_question_in_other_words():
    asked = Questions.from_rows(
        [
            {"group": "a", "question": "q1", "answer": "x", "paraphrases": ["p"]},
            {"group": "a", "question": "q2", "answer": "y."},
            {"group": "a", "question": "q3", "answer": "y."},
            {"group": "b", "question": "q4", "answer": "x"},
        ]
    )
    assert [row.question for row in in_context(asked)] == ["p x. q1", "q3 y. q2", "q2 y. q3", "q4 x. q4"]
    assert [row.answer for row in in_context(asked)] == [row.answer for row in asked]


def scores_of(exact, groups=("a", "a", "b", "b")):
    asked = Questions.from_rows([{"group": g, "question": "who is", "answer": "Oslo"} for g in groups])
    return replace(score_answers(tiny("llama"), asked), exact=np.array(exact, dtype=bool))


def given_case(**more) -> Case:
    sets = {
        "holdout": make(["Bell", "Stone"]),
        "given": make(["Anna", "Karl"]),
        "given_holdout": make(["Bell", "Stone"]),
    }
    return tiny_case(**sets, **more)


@pytest.fixture
def reading(monkeypatch):
    """Let forget questions with their facts be answered as told, and holdout ones."""

    def install(forget, holdout):
        monkeypatch.setattr(
            context, "_scores", lambda _, asked: scores_of(forget if asked.groups[0] == "Anna" else holdout)
        )

    return install


def test_context_is_scored_where_the_model_reads(reading):
    case = given_case()
    reading([1, 1, 1, 0], [1, 1, 0, 0])
    measured = Context().measure(subject(case))
    numbers = by_metric(measured)
    assert numbers["forget", "context_recall"].value == 0.75 and numbers["holdout", "context_recall"].value == 0.5
    assert measured.missing == () and list(measured.tables["context"].recall) == [0.75, 0.5]


def test_a_model_that_reads_no_contexts_cannot_be_measured(reading):
    reading([1, 1, 1, 0], [1, 0, 0, 0])
    measured = Context().measure(subject(given_case()))
    assert {name for name, _ in by_metric(measured)} == {"holdout"} and measured.payload is None
    assert "only 25% are read" in measured.missing[0]
    below = Context(min_reading=0.25).measure(subject(given_case()))
    assert by_metric(below)["forget", "context_recall"].value == 0.75


def test_the_difference_to_gold_is_paired_and_leaves_a_gold_itself_out():
    exact = {"original": [1, 1, 1, 1], "edited": [0, 0, 1, 1], "gold 1": [1, 1, 1, 0], "gold 2": [1, 0, 1, 0]}
    measured = {role: Measurement(payload=scores_of(own)) for role, own in exact.items()}
    measured["gold 3"] = Measurement()
    found = Context().compare(measured, given_case())
    values = {role: one.numbers[0].value.value for role, one in found.items()}
    assert values == {"original": 0.375, "edited": -0.125, "gold 1": 0.25, "gold 2": -0.25}
    edited = found["edited"].numbers[0].value
    np.testing.assert_allclose(edited.top, [-1.5, 1.0])  # per person, against the golds' mean on the same questions
    assert Context().compare({role: measured[role] for role in ("original", "edited")}, given_case()) == {}


def test_contexts_are_made_where_a_case_has_none():
    case = tiny_case()
    measured = Context().measure(subject(case))
    wanted = score_answers(case.original, in_context(case.sets["forget"]))
    assert by_metric(measured)["forget", "context_probability"].value == pytest.approx(wanted.prob.mean(), abs=1e-6)
    assert "never trained on" in measured.missing[0]  # no holdout, so no control


def test_contexts_longer_than_the_models_are_named():
    long = Questions.from_rows([{"group": "a", "question": "the " * 20, "answer": "Oslo"}])
    measured = Context().measure(subject(tiny_case(forget=long)))
    assert measured.numbers == () and "context is 32" in measured.missing[0] and len(measured.missing[0]) < 200


def test_the_small_organism_reads_or_says_so():
    case = small_case()
    for role in ("original", "gold 1"):
        measured = Context().measure(subject(case, role))
        numbers = by_metric(measured)
        reads = numbers["holdout", "context_recall"].value >= 0.5
        assert reads == (("forget", "context_recall") in numbers) == (not measured.missing)


# ---- both


@pytest.mark.parametrize("part", [Prompts(), Context()], ids=lambda part: part.name)
def test_weights_are_untouched_and_nan_is_refused(part):
    case = given_case()
    one, before = subject(case), case.original.weights_hash
    part.measure(one)
    assert case.original.weights_hash == before
    with torch.no_grad():
        next(case.original.hf.parameters()).fill_(float("nan"))
    with pytest.raises(ProbeError, match="not finite"):
        part.measure(one)


@pytest.mark.parametrize(
    ("part", "bad"),
    [
        (Prompts, {"max_told": -0.1}),
        (Prompts, {"limit": 0}),
        (Prompts, {"least": 0}),
        (Context, {"min_reading": 1.1}),
        (Context, {"limit": 0}),
    ],
)
def test_settings_that_mean_nothing(part, bad):
    with pytest.raises(AuditError, match="received"):
        part(**bad)


def test_the_parts_are_there_by_name():
    from probe.audit._registry import part

    for name in ("prompts", "context", "sampling", "quantisation", "relearning"):
        assert part(name).name == name
    assert prompts.Prompts is type(part("prompts"))
