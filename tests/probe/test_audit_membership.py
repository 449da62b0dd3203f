"""Membership: scores by hand and by loop, AUC and rates against scikit-learn, the part on the organism."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from probe.audit.membership import (
    Membership,
    TokenStats,
    auc_estimate,
    gradient_norm,
    loss,
    min_k,
    min_k_plus_plus,
    reference,
    token_stats,
    tpr_at_fpr,
    zlib_ratio,
)
from probe.errors import AuditError, DataError
from tests.probe.cases import small_case, subject
from tests.probe.tiny import tiny

LINES = ["Anna Bell lives in Oslo", "Karl was born in the old city of Rome", "Otto"]


def test_scores_by_hand():
    rows = [np.array([-1.0, -5.0, -3.0, -2.0, -4.0]), np.array([-0.5])]
    assert loss(rows) == pytest.approx([3, 0.5])
    assert min_k(rows) == pytest.approx([4.5, 0.5])  # the two lowest of five; one token at least
    assert min_k(rows, 1.0) == pytest.approx(loss(rows))
    lines = ["aaaaaaaaaaaaaaaaaaaaaaaaa", "b"]
    assert zlib_ratio(rows, lines) == pytest.approx([15 / len(zlib.compress(lines[0].encode())), 0.5 / 9])
    assert reference(rows, [[r + 1 for r in rows], [r - 2 for r in rows]]) == pytest.approx([-0.5, -0.5])
    stats = TokenStats((np.array([-1.0, -4.0, -2.0]),), (np.array([-2.0, -2.0, -2.0]),), (np.array([1.0, 2.0, 0.5]),))
    assert min_k_plus_plus(stats) == pytest.approx([1.0])  # z = 1, -1, 0; the lowest one of three


def test_token_statistics_are_those_of_a_loop_over_tokens():
    model = tiny("llama")
    found = token_stats(model, LINES, batch_size=2)
    for i, line in enumerate(LINES):
        ids = model.tokenizer(line)["input_ids"]
        for t in range(1, len(ids)):
            with torch.no_grad():
                logp = model.hf(input_ids=torch.tensor([ids[:t]])).logits[0, -1].double().log_softmax(-1)
            p = logp.exp()
            mean = sum(float(a * b) for a, b in zip(p, logp, strict=True))
            variance = sum(float(a) * (float(b) - mean) ** 2 for a, b in zip(p, logp, strict=True))
            assert found.logprob[i][t - 1] == pytest.approx(float(logp[ids[t]]), abs=1e-4)
            assert found.mean[i][t - 1] == pytest.approx(mean, abs=1e-4)
            assert found.std[i][t - 1] == pytest.approx(variance**0.5, abs=1e-4)
        assert len(found.logprob[i]) == len(ids) - 1


def test_gradient_norm_is_that_of_backward():
    model = tiny("llama")
    model.hf.requires_grad_(False)
    norms = gradient_norm(model, LINES[:2])
    assert not any(p.requires_grad or p.grad is not None for p in model.hf.parameters())
    model.hf.requires_grad_(True)
    for line, norm in zip(LINES, norms, strict=False):
        ids = torch.tensor([model.tokenizer(line)["input_ids"]])
        model.hf.zero_grad()
        model.hf(input_ids=ids, labels=ids).loss.backward()
        grads = torch.cat([p.grad.flatten() for p in model.hf.parameters() if p.grad is not None])
        assert norm == pytest.approx(float(grads.norm()), rel=1e-4)


def test_auc_is_scikit_learns_with_the_forget_set_positive():
    rng = np.random.default_rng(0)
    members, others = rng.integers(0, 8, 60) / 4, rng.integers(3, 11, 80) / 4  # with ties
    y = np.r_[np.ones(60), np.zeros(80)]
    groups = [f"p{i // 4}" for i in range(60)], [f"q{i // 4}" for i in range(80)]
    found = auc_estimate(members, others, *groups)
    assert found.value == pytest.approx(roc_auc_score(y, -np.r_[members, others]))
    assert found.value > 0.7 and found.low < found.value < found.high and found.n_groups == 35


@pytest.mark.parametrize("fpr", [0.01, 0.05, 0.1, 0.5, 1.0])
def test_rates_are_scikit_learns(fpr):
    rng = np.random.default_rng(1)
    for grain in (1, 1000):
        members, others = (np.round(rng.normal(m, 1, 200) * grain) / grain for m in (-0.7, 0))
        rates = roc_curve(np.r_[np.ones(200), np.zeros(200)], -np.r_[members, others], drop_intermediate=False)
        assert tpr_at_fpr(members, others, fpr) == pytest.approx(rates[1][rates[0] <= fpr + 1e-9].max())


def test_what_cannot_be_told_is_no_number():
    one, two = ["a", "b"], ["c", "d"]
    with pytest.raises(AuditError, match="same score"):
        auc_estimate(np.ones(2), np.ones(2), one, two)
    with pytest.raises(AuditError, match="finite"):
        auc_estimate(np.array([1, np.nan]), np.ones(2), one, two)
    with pytest.raises(DataError, match="needs 100 others; there are 50"):
        tpr_at_fpr(np.ones(5), np.ones(50), 0.01)
    perfect = auc_estimate(np.zeros(2), np.ones(2), one, two)
    assert perfect.value == 1 and np.isnan(perfect.low) and "no width" in perfect.how
    assert "one group" in auc_estimate(np.array([0.0, 2]), np.ones(2), ["a", "a"], two).how


def test_bad_input_is_refused():
    with pytest.raises(DataError, match="share in"):
        min_k([np.ones(3)], 0.0)
    with pytest.raises(DataError, match="one has none"):
        loss([np.array([])])
    with pytest.raises(DataError, match="at least one reference"):
        reference([np.ones(3)], [])
    with pytest.raises(DataError, match="one text for each"):
        zlib_ratio([np.ones(3)], [])
    with pytest.raises(DataError, match="at least two tokens"):
        token_stats(tiny("llama", bos=False), ["Anna"])
    broken = tiny("llama")
    with torch.no_grad():
        broken.hf.get_output_embeddings().weight[0] = float("nan")
    with pytest.raises(AuditError, match="not finite"):
        token_stats(broken, LINES)


def numbers(measurement):
    return {n.metric: n.value.value for n in measurement.numbers}


def test_the_part_finds_the_members_of_the_original_and_none_of_gold():
    case = small_case(2)
    part = Membership(gradients=True, gradient_limit=24)
    original, gold = (part.measure(subject(case, role)) for role in ("original", "gold 1"))
    for key in ("loss", "zlib", "min_k", "min_k_plus_plus", "reference", "gradient"):
        assert numbers(original)[f"membership_{key}_auc"] > 0.8
        assert 0.15 < numbers(gold)[f"membership_{key}_auc"] < 0.85
    assert numbers(original)["membership_tpr_at_10"] > 0.8 > numbers(gold)["membership_tpr_at_10"]
    assert set(numbers(original)) == {metric.name for metric in Membership.metrics}
    assert original.tables["membership"]["score"].iloc[0] == "loss"


def test_the_part_says_what_it_cannot_measure():
    case = small_case(2)
    alone = replace(case, golds=case.golds[:1])
    found = Membership(limit=20).measure(subject(alone, "gold 1"))
    assert "no other gold" in found.missing[0] and "membership_reference_auc" not in numbers(found)
    assert any("false positive rate of 0.01" in line for line in found.missing)
    assert "membership_tpr_at_1" not in numbers(found) and "membership_tpr_at_10" in numbers(found)
    assert "needs holdout" in Membership().why_not(replace(case, sets={"forget": case.sets["forget"]}))


def test_it_is_no_evidence_of_what_a_model_knows():
    """A model of noise has an AUC too, of how the two sets' texts differ."""
    assert Membership.evidence == ()
