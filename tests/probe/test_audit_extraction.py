"""Extraction, inference, reconstruction: by hand, by loop, and on the organism."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binom

from probe.audit.extraction import Extraction, above_chance, extracted_in, gaps, hits
from probe.audit.part import spaced
from probe.data import Questions
from probe.errors import DataError
from tests.probe.cases import small_case, subject


def test_the_chance_of_extraction_is_the_binomials():
    p = np.array([0.0, 1e-6, 0.02, 0.5, 1.0])
    with np.errstate(divide="ignore"):
        found = extracted_in(np.log(p), 100)
    assert found == pytest.approx(binom.sf(0, 100, p))
    assert extracted_in(np.array([1e-9]), 3) == pytest.approx([1])  # a probability above 1 by rounding
    with pytest.raises(DataError, match="at least one sample"):
        extracted_in(np.zeros(1), 0)


def test_hits_split_ties_so_that_a_model_without_preference_is_at_chance():
    assert hits([np.array([2, 1, 0]), np.array([1, 2.0]), np.zeros(4)]) == pytest.approx([1, 0, 0.25])
    assert above_chance(hits([np.zeros(4), np.array([1.0, 0])]), [4, 2]) == pytest.approx([0, 1])
    assert above_chance(np.array([0.0, 0.0, 0.0, 1.0]), [4] * 4).mean() == pytest.approx(0)
    with pytest.raises(DataError, match="two candidates"):
        hits([np.array([1.0])])
    with pytest.raises(DataError, match="two candidates"):
        hits([np.array([1.0, np.nan])])


def rows(*triples) -> Questions:
    return Questions.from_rows(
        {"group": g, "question": q, "answer": a, "id": str(i)} for i, (g, q, a) in enumerate(triples)
    )


def test_candidates_of_whom_the_sentence_is_true_too_are_left_out():
    known = rows(
        ("Anna", "Where is Anna?", "Rome"),
        ("Otto", "Where is Otto?", "Rome"),
        ("Mira", "Where is Mira?", "Bern"),
        ("Karl", "Who is it?", "Karl"),
    )
    found = {row.id: set(names) for row, names in gaps(known, known, 9, 0)}
    assert found == {
        "0": {"Anna", "Mira", "Karl"},
        "1": {"Otto", "Mira", "Karl"},
        "2": {"Anna", "Otto", "Mira", "Karl"},
    }
    assert all(names[0] == row.group for row, names in gaps(known, known, 2, 0))
    assert all(len(names) == 2 for _, names in gaps(known, known, 2, 0))


def test_the_prefix_is_a_share_of_the_words():
    line = rows(("Anna", "one two three four", "five six"))
    assert Extraction()._cut(None, line) == [("one two three four", "five six")]
    assert Extraction(prefix=0.5)._cut(None, line) == [("one two three", "four five six")]
    assert Extraction(prefix=0.99)._cut(None, line) == [("one two three four five", "six")]
    with pytest.raises(DataError, match="between 0 and 1"):
        Extraction(prefix=1.0)._cut(None, line)


@pytest.fixture(scope="module")
def case():
    return small_case(2)


def test_the_part_on_original_and_gold(case):
    found = {role: Extraction().measure(subject(case, role)) for role in ("original", "gold 1")}
    values = {role: {n.metric: n.value.value for n in one.numbers} for role, one in found.items()}
    assert all(value > 0.8 for value in values["original"].values())
    assert values["gold 1"]["extracted"] < 0.3
    assert abs(values["gold 1"]["inferred"]) < 0.35 and abs(values["gold 1"]["reconstructed"]) < 0.35
    assert set(values["original"]) == {metric.name for metric in Extraction.metrics}
    assert found["original"].missing == ()


def test_extraction_is_what_greedy_generation_gives(case):
    part, gold = Extraction(limit=12), case.golds[0]
    table = part.measure(subject(case, "gold 1")).tables["extraction"]
    for row, extracted in zip(spaced(case.sets["forget"], 12), table["extracted"], strict=True):
        ids = torch.tensor([gold.tokenizer(row.question)["input_ids"]])
        answer = gold.tokenizer(f"{row.question} {row.answer}")["input_ids"][ids.shape[1] :]
        made = gold.hf.generate(ids, max_new_tokens=len(answer), do_sample=False, pad_token_id=0)
        assert (made[0, ids.shape[1] :].tolist() == answer) == bool(extracted)


def test_what_cannot_be_attacked_is_said(case):
    bare = Questions(
        replace(row, perturbed_answers=(), group=f"group {row.group}") for row in spaced(case.sets["forget"], 8)
    )
    found = Extraction().measure(subject(replace(case, sets={**case.sets, "forget": bare})))
    assert found.missing[0] == "inferred: no perturbed answers" and "names its group" in found.missing[1]
    assert [n.metric for n in found.numbers] == ["extracted", "extracted_in_n"]


def test_the_number_of_samples_is_the_settings_and_stands_in_the_table(case):
    few = replace(case, sets={**case.sets, "forget": spaced(case.sets["forget"], 4)})
    found = Extraction(n=7).measure(subject(few))
    assert set(found.tables["extraction"]["n"]) == {7}
    assert not any(character.isdigit() for character in Extraction.metrics[1].label)
