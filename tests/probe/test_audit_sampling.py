"""Leak@k against enumeration, real samples and transformers' own logits processors."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from probe.audit._case import Case
from probe.audit.sampling import (
    Sampling,
    any_of,
    pass_at_k,
    sampled_hits,
    sampling_logprob,
    sequence_probability,
)
from probe.data import Questions
from probe.errors import AuditError, ProbeError
from probe.scoring import answer_tokens, score_answers

from .cases import small_case, subject
from .tiny import tiny


def questions() -> Questions:
    asked = [("Anna lives in", "Oslo"), ("Karl works in the old city of", "Rome Lima"), ("who is", "Mira")]
    return Questions.from_rows([{"group": q.split()[0], "question": q, "answer": a} for q, a in asked])


def tiny_case() -> Case:
    return Case(tiny("llama"), {"forget": questions(), "retain": questions()}, progress=False, n_boot=20)


def test_any_of_k():
    p = np.array([0.0, 0.25, 1.0])
    np.testing.assert_allclose(any_of(p, 1), p)
    np.testing.assert_allclose(any_of(p, 3), [0, 1 - 0.75**3, 1])
    np.testing.assert_allclose(any_of(np.array([1e-20]), 32), [32e-20], rtol=1e-12)  # 1 - (1 - p)^32 is 0 in floats
    for bad, k in ((p, 0), (np.array([1.1]), 1), (np.array([-0.1]), 1), (np.array([np.nan]), 1)):
        with pytest.raises(AuditError, match="probabilities"):
            any_of(bad, k)


def test_pass_at_k_is_the_share_of_draws_that_hold_a_hit():
    n = 7
    for hits in range(n + 1):
        samples = [i < hits for i in range(n)]
        for k in range(1, n + 1):
            draws = [any(draw) for draw in combinations(samples, k)]
            assert pass_at_k(np.array([hits]), n, k)[0] == pytest.approx(np.mean(draws))


def test_pass_at_k_is_unbiased():
    p, n, k = 0.15, 12, 5
    hits = np.random.default_rng(0).binomial(n, p, size=200_000)
    assert pass_at_k(hits, n, k).mean() == pytest.approx(any_of(np.array([p]), k)[0], abs=2e-3)
    naive = 1 - (1 - hits / n) ** k
    assert naive.mean() < pass_at_k(hits, n, k).mean() - 0.01


@pytest.mark.parametrize(("hits", "n", "k"), [(0, 4, 5), (0, 4, 0), (5, 4, 2), (-1, 4, 2)])
def test_pass_at_k_refuses(hits, n, k):
    with pytest.raises(AuditError, match="received"):
        pass_at_k(np.array([hits]), n, k)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_decoding_probabilities_are_those_of_transformers(temperature, top_p):
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    logits = 3 * torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    wanted = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits)).softmax(-1)
    found = sampling_logprob(logits, temperature, top_p).exp()
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.sum(-1), torch.ones(20))


def test_sequence_probability_is_the_product_over_the_answer():
    model, rows = tiny("llama"), questions()
    tokens = answer_tokens(model, [(row.question, row.answer) for row in rows])
    found = sequence_probability(model, tokens, [(1.0, 1.0), (0.5, 0.8)], batch_size=2)
    np.testing.assert_allclose(found[0], np.exp(score_answers(model, rows).logprob_sum), rtol=1e-4)
    for row, p in zip(tokens, found[1], strict=True):
        with torch.no_grad():
            logits = model.hf(torch.tensor([row.input_ids])).logits[0]
        wanted = 1.0
        for t in range(row.start, len(row.input_ids)):
            own = (logits[t - 1] / 0.5).softmax(-1).numpy()
            order = np.argsort(-own)
            kept = order[: int(np.searchsorted(np.cumsum(own[order]), 0.8) + 1)]
            wanted *= own[row.input_ids[t]] / own[kept].sum() if row.input_ids[t] in kept else 0.0
        assert p == pytest.approx(wanted, rel=1e-3, abs=1e-9)


def test_the_closed_form_agrees_with_samples():
    """Answers of one token that occurs nowhere else: what a sample begins with is all that counts (spare = 0)."""
    model, n = tiny("llama"), 4000
    rows = questions().take([0, 2])
    plain = np.exp(score_answers(model, rows).logprob_sum)
    state = torch.get_rng_state()
    hits = sampled_hits(model, rows, n, spare=0, batch_size=2 * n, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    spread = np.sqrt(plain * (1 - plain) / n)
    assert (np.abs(hits / n - plain) < 4 * spread).all() and (plain > 5e-3).all()
    again = sampled_hits(model, rows, n, spare=0, batch_size=2 * n, seed=1)
    np.testing.assert_array_equal(hits, again)
    assert not np.array_equal(hits, sampled_hits(model, rows, n, spare=0, batch_size=2 * n, seed=2))


def test_the_part_in_closed_form_and_from_samples():
    case = small_case()
    one, before = subject(case, "gold 1"), case.golds[0].weights_hash
    exact = Sampling(decodings=((1.0, 1.0),)).measure(one)
    numbers = {number.metric: number.value.value for number in exact.numbers}
    p = np.exp(one.answers["forget"].logprob_sum)
    for k in (1, 8, 32):
        assert numbers[f"leak_at_{k}"] == pytest.approx((1 - (1 - p) ** k).mean(), abs=1e-9)
    assert numbers["leak_at_1"] < numbers["leak_at_8"] < numbers["leak_at_32"]
    sampled = Sampling(decodings=((1.0, 1.0),), exact=False, n_samples=32, limit=24).measure(one)
    table = sampled.tables["sampling"].set_index("k").leak
    some = p[[int(i * len(p) / 24) for i in range(24)]]
    for k in (1, 8, 32):
        wanted = (1 - (1 - some) ** k).mean()
        assert wanted - 0.1 < table[k] < wanted + 0.15  # 24 questions, 32 samples each; samples may say it later
    assert case.golds[0].weights_hash == before


def test_the_worst_decoding_counts_and_the_original_leaks():
    case = small_case()
    found = {}
    for role in ("original", "gold 1"):
        measured = Sampling().measure(subject(case, role))
        table, found[role] = measured.tables["sampling"], {n.metric: n.value.value for n in measured.numbers}
        assert len(table) == 9 and not measured.missing
        for k, leak in table.groupby("k").leak.max().items():
            assert found[role][f"leak_at_{k}"] == pytest.approx(leak)
    assert found["original"]["leak_at_1"] > 0.95 and found["gold 1"]["leak_at_32"] < 0.5
    assert set(found["original"]) == {metric.name for metric in Sampling.metrics}


def test_a_model_of_nan_is_refused():
    case = tiny_case()
    one = subject(case)
    with torch.no_grad():
        next(case.original.hf.parameters()).fill_(float("nan"))
    with pytest.raises(ProbeError, match="not finite"):
        Sampling().measure(one)


@pytest.mark.parametrize(
    "bad",
    [
        {"decodings": ()}, {"decodings": ((0.0, 1.0),)}, {"decodings": ((1.0, 0.0),)}, {"decodings": ((1.0, 1.1),)},
        {"decodings": ((float("nan"), 1.0),)}, {"n_samples": 31}, {"limit": 0}, {"batch_size": 0},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_mean_nothing(bad):
    with pytest.raises(AuditError, match=r"must be|received"):
        Sampling(**bad)


@pytest.mark.parametrize("bad", [{"n": 0}, {"n": 2, "spare": -1}, {"n": 2, "temperature": -1.0}], ids=str)
def test_samples_that_cannot_be_drawn(bad):
    with pytest.raises(AuditError, match="received"):
        sampled_hits(tiny("llama"), questions(), **bad)


def test_one_question_is_enough_for_a_leak_but_not_for_an_interval():
    case = tiny_case()
    one = Case(case.original, {"forget": questions()[:1], "retain": questions()[1:]}, progress=False)
    number = Sampling().measure(subject(one)).numbers[0]
    assert 0 < number.value.value < 1 and np.isnan([number.value.low, number.value.high]).all()


def test_the_decoding_is_chosen_anew_in_every_bootstrap_replicate(monkeypatch):
    """Either decoding leaks all of one person and nothing of the other: one of them says so in every replicate."""
    case = tiny_case()
    people = np.array([row.group for row in case.sets["forget"]])
    first = (people == people[0]).astype(float)
    leaks = {(1.0, 1.0): dict.fromkeys((1, 8, 32), first), (0.7, 1.0): dict.fromkeys((1, 8, 32), 1 - first)}
    monkeypatch.setattr(Sampling, "_closed", lambda self, subject: (leaks, list(people)))
    value = Sampling().measure(subject(case)).numbers[0].value
    share = [first.mean(), 1 - first.mean()]
    assert value.value == pytest.approx(max(share)) and "chosen anew in each replicate" in value.how
    assert value.low > 0 and value.high == 1  # with one decoding a replicate without its people would be 0
