"""The bench: references measured once, golds judged with themselves left out, parts combined into one card."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch

from probe.audit import Bench, Case, Estimate, Measurement, Metric, Number, Part, ReportCard, Thresholds, scratch
from probe.audit.part import by_group
from probe.data import Questions
from probe.errors import AuditError, DataError
from probe.models import wrap
from tests.probe.test_audit import FORGET, HOLDOUT, RETAIN, WORDS, make_model, make_tokenizer, questions

LIMITS = Thresholds(0.5, {"forget/spread": 0.3}, {"forget/spread": "inside"})


@dataclass(frozen=True)
class Spread(Part):
    """A part of a test: the standard deviation of the unembedding, and its distance to the golds' mean."""

    shift: float = 0.0
    name: ClassVar[str] = "spread"
    title: ClassVar[str] = "spread of the unembedding"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("spread", "spread"), Metric("beyond", "beyond gold"), Metric("shown", "shown", share=True),
    )  # fmt: skip
    evidence: ClassVar[tuple[tuple[str, str], ...]] = (("forget", "spread"),)
    kind: ClassVar[str] = "inside"

    def measure(self, subject):
        calls.append(subject.role)
        value = float(subject.model.hf.lm_head.weight.detach().std()) + self.shift
        rows = subject.case.sets["forget"]
        numbers = (
            Number("forget", "spread", Estimate(value, 1, 1)),
            Number("forget", "shown", by_group(np.ones(len(rows)), rows.groups)),
        )
        return Measurement(numbers, {"spread": pd.DataFrame({"layer": [0], "value": [value]})}, value, ("a remark",))

    def compare(self, measured, case):
        golds = [m.payload for role, m in measured.items() if role.startswith("gold")]
        if "edited" not in measured:
            return {}
        beyond = Estimate(measured["edited"].payload - np.mean(golds), 1, 1)
        return {"edited": Measurement((Number("forget", "beyond", beyond),))}


calls: list[str] = []


@pytest.fixture
def case():
    calls.clear()
    sets = {"forget": questions(FORGET), "retain": questions(RETAIN), "holdout": questions(HOLDOUT)}
    return Case(make_model(0), sets, [make_model(i) for i in range(1, 6)], progress=False, n_boot=20)


def test_references_are_measured_once_and_every_edit_anew(case):
    bench = Bench(case, [Spread()], LIMITS)
    first, second = bench.card(make_model(7)), bench.card(make_model(8), name="eight")
    assert calls == ["edited", "original", "gold 1", "gold 2", "gold 3", "gold 4", "gold 5", "edited"]
    for card, seed in ((first, 7), (second, 8)):
        assert card.value("forget", "spread") == pytest.approx(float(make_model(seed).hf.lm_head.weight.std()))
    assert second.settings["edit"]["name"] == "eight"


def test_what_parts_give_stands_on_the_card(case):
    card = Bench(case, [Spread(shift=1.0)], LIMITS).card(make_model(7))
    golds = [float(gold.hf.lm_head.weight.std()) + 1 for gold in case.golds]
    own = card.value("forget", "spread")
    assert card.value("forget", "beyond") == pytest.approx(own - np.mean(golds))
    gold = card.table.query("metric == 'spread' and model == 'gold'").iloc[0]
    assert (gold["value"], gold["low"], gold["high"]) == pytest.approx((np.mean(golds), min(golds), max(golds)))
    assert set(card.tables["spread"]["model"]) == {"original", "edited", *(f"gold {i}" for i in range(1, 6))}
    assert "a remark" in card.not_measured  # of every model: no list of them
    assert card.settings["parts"] == {"spread": {"shift": 1.0}}
    assert card.settings["seconds"]["spread"] >= 0
    row = card.verdict.evidence.query("metric == 'spread'").iloc[0]
    assert row["kind"] == "inside" and row["share"] == pytest.approx(
        (own - np.mean(golds)) / (card.value("forget", "spread", "original") - np.mean(golds))
    )


def test_a_gold_is_judged_with_itself_left_out(case):
    bench = Bench(case, [Spread()], LIMITS)
    card = bench.gold_card(2)
    assert card.settings["golds"] == 4 and card.verdict.label is None  # four are too few for a verdict
    assert card.value("forget", "spread") == pytest.approx(float(case.golds[2].hf.lm_head.weight.std()))
    others = [float(g.hf.lm_head.weight.std()) for i, g in enumerate(case.golds) if i != 2]
    assert card.value("forget", "spread", "gold") == pytest.approx(np.mean(others))
    assert calls.count("edited") == 0  # nothing was measured again
    with pytest.raises(AuditError, match="gold 9"):
        bench.gold_card(9)


def test_an_edit_that_ends_in_a_gold_is_judged_without_it(case):
    bench = Bench(case, [Spread()], LIMITS)
    own, left_out = bench.card(case.golds[2]), bench.gold_card(2)
    assert own.settings["golds"] == 4
    pd.testing.assert_frame_equal(own.table, left_out.table)


def test_golds_are_trainings_of_their_own(case):
    twice = replace(case, golds=[*case.golds[:2], case.golds[0]])
    with pytest.raises(AuditError, match="gold 3 has the very weights of gold 1"):
        Bench(twice, ()).card()
    with pytest.raises(AuditError, match="gold 2 has the very weights of original"):
        Bench(replace(case, golds=[case.golds[0], case.original]), ()).card()


def test_an_original_that_changed_is_not_what_was_measured(case):
    bench = Bench(case, (), LIMITS)
    bench.card()
    case.original.hf.lm_head.weight.data.mul_(1.5)
    with pytest.raises(AuditError, match="have changed since"):
        bench.card(make_model(7))


def test_a_question_counts_once(case):
    rows = case.sets["forget"].rows
    twice = Questions([*rows, replace(rows[0], id="again")])
    with pytest.raises(DataError, match="the forget set must ask each question once"):
        Bench(replace(case, sets={**case.sets, "forget": twice}), ())
    copied = Questions([*case.sets["retain"], replace(rows[0], id="copy", group="nobody")])
    with pytest.raises(DataError, match="retain and forget must share no question"):
        Bench(replace(case, sets={**case.sets, "retain": copied}), ())


def test_another_bench_takes_over_what_was_measured(case):
    bench = Bench(case, [Spread()], LIMITS)
    bench.card()
    calls.clear()
    fewer = Bench(replace(bench.case, golds=case.golds[1:]), bench.parts, LIMITS)
    fewer.adopt(bench)
    card = fewer.card(make_model(7))
    assert calls == ["edited"]
    assert card.value("forget", "spread", "gold 1") == pytest.approx(float(case.golds[1].hf.lm_head.weight.std()))
    with pytest.raises(AuditError, match="same original"):
        Bench(replace(bench.case, seed=1), bench.parts, LIMITS).adopt(bench)


def test_a_card_with_parts_and_a_verdict_survives_saving(case, tmp_path):
    card = Bench(case, [Spread()], LIMITS).card(make_model(7))
    again = ReportCard.load(card.save(tmp_path))
    pd.testing.assert_frame_equal(card.table, again.table)
    pd.testing.assert_frame_equal(card.tables["spread"], again.tables["spread"])
    assert again.sentence == card.sentence and again.verdict.label == card.verdict.label
    pd.testing.assert_frame_equal(card.verdict.evidence, again.verdict.evidence, check_exact=True)
    pd.testing.assert_frame_equal(card.groups, again.groups, check_dtype=False)


def test_an_unmeasurable_part_is_named_and_the_rest_measured(case):
    case = replace(case, golds=())

    @dataclass(frozen=True)
    class Needy(Spread):
        needs: ClassVar[tuple[str, ...]] = ("forget", "gold")

    card = Bench(case, [Needy()], LIMITS).card(make_model(7))
    assert any("spread of the unembedding (needs gold)" in one for one in card.not_measured)
    assert not (card.table["metric"] == "spread").any() and card.verdict.label is None


def other_sizes():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=len(WORDS) + 2, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16)  # fmt: skip
    return wrap(LlamaForCausalLM(config), make_tokenizer())


def other_class():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=len(WORDS) + 2, n_embd=32, n_layer=1, n_head=2, n_positions=16)
    return wrap(GPT2LMHeadModel(config), make_tokenizer())


@pytest.mark.parametrize(
    ("gold", "message"),
    [
        (other_sizes, "gold 2 must have the original's sizes"),
        (other_class, "gold 2 must be of the original's class LlamaForCausalLM; it is a GPT2LMHeadModel"),
        (lambda: make_model(0, [*WORDS, "extra"]), "gold 2 must have the original's vocabulary"),
    ],
)
def test_a_gold_that_is_no_gold(case, gold, message):
    with pytest.raises(AuditError, match=message):
        Bench(replace(case, golds=[case.golds[0], gold()]), ()).card()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ("nothing", "there is no 'nothing'"),
        ([Spread(), Spread(1.0)], "given once"),
        ([3], "names or Part objects; received int"),
    ],
)
def test_parts_that_are_none(case, parts, message):
    with pytest.raises(AuditError, match=message):
        Bench(case, parts)


def test_a_number_of_an_undeclared_metric_or_given_twice_is_refused(case):
    @dataclass(frozen=True)
    class Odd(Spread):
        def measure(self, subject):
            one = Number("forget", "undeclared", Estimate(1.0, 1, 1))
            return Measurement((one,))

        def compare(self, measured, case):
            return {}

    @dataclass(frozen=True)
    class Twice(Odd):
        def measure(self, subject):
            return Measurement((Number("forget", "spread", Estimate(1.0, 1, 1)),) * 2)

    for part, message in ((Odd(), "no metric"), (Twice(), "given twice")):
        with pytest.raises(AuditError, match=message):
            Bench(case, [part], LIMITS).card()


def test_numbers_are_finite():
    with pytest.raises(AuditError, match="finite"):
        Estimate(float("nan"), 1, 1)


def test_sets_may_share_people_only_where_that_is_their_meaning(case):
    near = {**case.sets, "neighbours": questions(RETAIN[:1])}
    assert set(Bench(replace(case, sets=near), ()).case.sets) == {"forget", "retain", "holdout", "neighbours"}
    with pytest.raises(DataError, match="neighbours must hold groups of retain only"):
        Bench(replace(case, sets={**case.sets, "holdout": None, "neighbours": questions(HOLDOUT[:1])}), ())
    with pytest.raises(DataError, match="share no group"):
        Bench(replace(case, sets={**case.sets, "mine": questions(FORGET)}), ())
    with pytest.raises(DataError, match="the retain set is empty"):
        Bench(replace(case, sets={**case.sets, "retain": Questions([])}), ())


def test_scratch_gives_everything_back():
    model = make_model(0)
    model.hf.train()
    next(model.hf.parameters()).requires_grad_(False)
    before = model.weights_hash

    def change():
        with scratch(model):
            model.hf.eval()
            for parameter in model.hf.parameters():
                parameter.requires_grad_(True)
                parameter.data.add_(1.0)
                parameter.grad = torch.ones_like(parameter)
            assert model.weights_hash != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        change()
    assert model.weights_hash == before and model.hf.training
    assert not next(model.hf.parameters()).requires_grad
    assert all(parameter.grad is None for parameter in model.hf.parameters())


def test_scratch_says_when_it_cannot():
    model = make_model(0)
    with pytest.raises(AuditError, match="added, removed or reshaped"), scratch(model):
        model.hf.register_parameter("extra", torch.nn.Parameter(torch.ones(1)))


def test_a_case_of_an_organism_is_limited_and_its_sets_belong_together():
    import probe.organisms

    organism = probe.organisms.facts("small", 0, progress=False)
    case = Case.of(organism, 0, limit=40, progress=False)
    sizes = {name: len(rows) for name, rows in case.sets.items()}
    assert sizes["retain"] == sizes["holdout"] == 40 and sizes["unseen_retain"] <= 40
    whole = Case.of(organism, 0, limit=None, progress=False)
    assert len(whole.sets["retain"]) == len(organism.splits["retain"])
    assert sizes["forget"] == len(whole.sets["forget"])  # what is to go is asked for whole
    assert set(case.sets["neighbours"].groups) <= set(case.sets["retain"].groups)
    assert not any(row.meta["deducible"] for row in case.sets["forget"])
    assert all(row.meta["deducible"] for row in case.sets["deducible"])
    assert len(case.sets["forget"]) + len(case.sets["deducible"]) == len(organism.splits["forget"])
    Bench(case, ())  # no set is refused
