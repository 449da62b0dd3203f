"""Distances over whole answers: against enumeration, closed forms and plain Monte Carlo; the part on the organism."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import log_softmax

from probe.audit.distance import (
    Distance,
    kl_on_samples,
    relearning_time_ratio,
    sample_answers,
    share_of_distance,
    symmetric_kl,
)
from probe.errors import AuditError, DataError
from probe.models import Model
from tests.probe.cases import small_case, subject
from tests.probe.tiny import tiny

END = 3


class Bigram(torch.nn.Module):
    """A model whose next token depends on the last one alone."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(torch.tensor(table, dtype=torch.float32))
        self.config = SimpleNamespace(pad_token_id=0, max_position_embeddings=64)
        self.config.get_text_config = lambda: self.config

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=False):
        return SimpleNamespace(logits=self.table[input_ids])


def bigram(seed: int, scale: float = 1.0) -> tuple[Model, np.ndarray]:
    table = scale * np.random.default_rng(seed).normal(size=(4, 4))
    return Model(Bigram(table), SimpleNamespace(eos_token_id=END)), log_softmax(table.astype(np.float32), axis=1)


def all_answers(logp: np.ndarray, start: int, steps: int) -> dict[tuple[int, ...], float]:
    """Every answer of at most `steps` tokens that the end token closes, with its log-probability."""
    found = {}
    for length in range(1, steps + 1):
        for answer in product(range(4), repeat=length):
            closed = answer[-1] == END or length == steps
            if closed and END not in answer[:-1]:
                found[answer] = sum(logp[a, b] for a, b in zip((start, *answer), answer, strict=False))
    return found


def enumerated_kl(p: np.ndarray, q: np.ndarray, start: int, steps: int) -> float:
    of_p, of_q = all_answers(p, start, steps), all_answers(q, start, steps)
    assert np.isclose(np.exp(list(of_p.values())).sum(), 1)
    return sum(np.exp(lp) * (lp - of_q[answer]) for answer, lp in of_p.items())


def test_kl_of_answers_is_the_enumerated_one():
    (a, p), (b, q) = bigram(0), bigram(1)
    samples = sample_answers(a, [[0], [1, 2]], 4000, max_new_tokens=4, batch_size=1000, seed=3)
    nats = kl_on_samples(a, b, samples, batch_size=1000).reshape(2, -1)
    for row, start in zip(nats, (0, 2), strict=True):
        assert abs(row.mean() - enumerated_kl(p, q, start, 4)) < 4 * row.std() / np.sqrt(len(row))
        assert row.std() < 2  # not so wide that the line above says nothing
    assert (nats >= 0).all()


def test_kl_after_one_token_has_no_sampling_error():
    (a, p), (b, q) = bigram(2), bigram(3)
    samples = sample_answers(a, [[1]], 3, max_new_tokens=1)
    closed = (np.exp(p[1]) * (p[1] - q[1])).sum()
    assert kl_on_samples(a, b, samples) == pytest.approx([closed] * 3, rel=1e-5)


def test_less_variance_than_plain_monte_carlo_and_the_same_mean():
    (a, p), (b, q) = bigram(4), bigram(5)
    samples = sample_answers(a, [[0]], 6000, max_new_tokens=5, batch_size=2000)
    exact_steps = kl_on_samples(a, b, samples, batch_size=2000)
    plain = np.array([sum(p[s, t] - q[s, t] for s, t in pairwise(row)) for row in samples.ids])
    spread = np.sqrt(plain.var() / len(plain) + exact_steps.var() / len(plain))
    assert abs(plain.mean() - exact_steps.mean()) < 4 * spread
    assert exact_steps.std() < 0.8 * plain.std()


def test_samples_have_the_models_frequencies_and_end_where_they_should():
    a, p = bigram(6)
    samples = sample_answers(a, [[2]], 8000, max_new_tokens=3, batch_size=4000)
    drawn = pd.Series([row[1:] for row in samples.ids]).value_counts(normalize=True)
    for answer, logp in all_answers(p, 2, 3).items():
        assert abs(drawn.get(answer, 0) - np.exp(logp)) < 5 * np.sqrt(np.exp(logp) / 8000) + 1e-9
    assert all(END not in row[1:-1] for row in samples.ids)


def test_sampling_depends_on_neither_batches_nor_padding_nor_the_global_state():
    model = tiny("llama")
    prompts = [[1, 5, 6], [1, 7], [1, 8, 9, 10, 11], [1, 4]]
    before = torch.random.get_rng_state()
    one = sample_answers(model, prompts, 3, max_new_tokens=5, batch_size=12, seed=1)
    assert one.ids == sample_answers(model, prompts, 3, max_new_tokens=5, batch_size=1, seed=1).ids
    assert one.ids != sample_answers(model, prompts, 3, max_new_tokens=5, seed=2).ids
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_real_model_against_a_loop_without_cache_or_padding():
    a, b = tiny("llama", 0), tiny("llama", 1)
    samples = sample_answers(a, [[1, 5, 6], [1, 7]], 2, max_new_tokens=4)
    wanted = []
    for row, start in zip(samples.ids, samples.starts, strict=True):
        total = 0.0
        for t in range(start, len(row)):
            ids = torch.tensor([row[:t]])
            with torch.no_grad():
                p, q = (m.hf(input_ids=ids).logits[0, -1].double().log_softmax(-1) for m in (a, b))
            total += float((p.exp() * (p - q)).sum())
        wanted.append(total)
    assert kl_on_samples(a, b, samples, batch_size=3) == pytest.approx(wanted, rel=1e-4)


def test_temperature_zero_is_greedy_generation():
    model = tiny("llama")
    prompts = [[1, 5, 6], [1, 7]]
    ours = sample_answers(model, prompts, 1, max_new_tokens=6, temperature=0)
    for prompt, row in zip(prompts, ours.ids, strict=True):
        theirs = model.hf.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert list(row) == theirs[0].tolist()[: len(row)]


def test_symmetric_and_zero_to_itself():
    a, b = tiny("llama", 0), tiny("llama", 1)
    prompts = [[1, 5], [1, 6, 7]]
    assert symmetric_kl(a, b, prompts, 3) == pytest.approx(symmetric_kl(b, a, prompts, 3))
    assert symmetric_kl(a, a, prompts, 3) == pytest.approx([0, 0], abs=1e-9)
    assert (symmetric_kl(a, b, prompts, 3) > 0.01).all()
    assert torch.is_grad_enabled()


def test_bad_models_and_prompts_are_refused():
    (a, _), (b, _) = bigram(0), bigram(1)
    with pytest.raises(DataError, match="needs a prompt"):
        sample_answers(a, [])
    with pytest.raises(DataError, match="context is 64"):
        sample_answers(a, [[0] * 60])
    samples = sample_answers(a, [[0]], 2)
    with torch.no_grad():
        b.hf.table[0, 0] = float("nan")
    with pytest.raises(AuditError, match="not finite"):
        sample_answers(b, [[0]])
    with pytest.raises(AuditError, match="not finite"):
        kl_on_samples(a, b, samples)
    with pytest.raises(AuditError, match="one vocabulary"):
        kl_on_samples(a, tiny("llama"), samples)


def test_share_by_hand():
    found = share_of_distance(np.array([3.0, 5.0]), np.array([1.0, 1.0]), np.array([9.0, 9.0]), n_boot=200)
    assert found.value == pytest.approx(6 / 16)
    assert (found.low, found.high) == pytest.approx((2 / 8, 4 / 8))
    with pytest.raises(AuditError, match="no scale"):
        share_of_distance(np.ones(3), np.ones(3), np.ones(3))
    with pytest.raises(AuditError, match="no scale"):  # above the floor on the whole, but not in enough replicates
        share_of_distance(np.ones(2), np.array([0.0, 3.0]), np.array([4.0, 0.0]))


@pytest.fixture(scope="module")
def measured():
    case = small_case(3)
    part = Distance(limit=20)
    found = {role: part.measure(subject(case, role)) for role in ("original", "gold 1", "gold 2", "gold 3")}
    return case, part, found


def value(measurement, name, metric):
    return next(n.value.value for n in measurement.numbers if (n.set, n.metric) == (name, metric))


@pytest.fixture(scope="module")
def compared(measured):
    case, part, found = measured
    return part.compare(found, case)


def test_the_original_is_further_from_gold_than_gold_is(compared):
    found = compared
    floor = [value(found[f"gold {i}"], "forget", "distance_to_gold") for i in (1, 2, 3)]
    assert value(found["original"], "forget", "distance_to_gold") > 2 * max(floor)
    assert value(found["original"], "retain", "distance_to_gold") < 0.5 * min(floor)
    shares = {role: value(one, "forget", "distance_share") for role, one in compared.items()}
    assert shares["original"] == 1
    assert all(abs(shares[f"gold {i}"]) < 0.4 for i in (1, 2, 3))


def test_the_part_is_the_function_on_the_same_questions(measured, compared):
    from probe.audit.part import spaced
    from probe.scoring import answer_tokens

    case, found = measured[0], compared
    rows = spaced(case.sets["forget"], 20)
    prompts = [t.input_ids[: t.start] for t in answer_tokens(case.original, [(r.question, r.answer) for r in rows])]
    alone = [symmetric_kl(case.original, gold, prompts, 2, seed=case.seed).mean() for gold in case.golds]
    assert value(found["original"], "forget", "distance_to_gold_answer") == pytest.approx(np.mean(alone), rel=1e-4)


def test_an_edited_model_that_is_a_gold_is_as_gold_and_an_untouched_one_as_the_original(measured):
    case, part, found = measured
    same = part.compare({**found, "edited": part.measure(subject(case, "edited", case.original))}, case)
    assert value(same["edited"], "forget", "distance_to_gold") == value(same["original"], "forget", "distance_to_gold")
    assert value(same["edited"], "forget", "distance_share") == pytest.approx(1)
    # a gold's distance to itself is 0, to the others gold's
    twin = part.compare({**found, "edited": part.measure(subject(case, "edited", case.golds[0]))}, case)
    pairs = value(twin["gold 1"], "forget", "distance_to_gold_answer")
    assert value(twin["edited"], "forget", "distance_to_gold_answer") == pytest.approx(pairs * 2 / 3, rel=1e-5)


class OnDemand(Sequence):
    """Golds of which each look makes a new object."""

    def __init__(self, golds):
        self.golds = golds

    def __len__(self):
        return len(self.golds)

    def __getitem__(self, i):
        return copy.copy(self.golds[i])


def test_golds_that_load_on_demand_keep_their_share(measured, compared):
    case, part, _ = measured
    again = replace(case, golds=OnDemand(case.golds))
    assert again.golds[0] is not again.golds[0]
    found = {role: part.measure(subject(again, role)) for role in ("original", "gold 1", "gold 2", "gold 3")}
    made = part.compare(found, again)
    for role in made:
        assert value(made[role], "forget", "distance_share") == value(compared[role], "forget", "distance_share")


def test_a_gold_that_is_left_out_is_in_nobodys_numbers(measured):
    case, part, found = measured
    left = replace(case, golds=case.golds[1:], gold_names=case.gold_names[1:])
    roles = {"edited": "gold 1", "original": "original", "gold 1": "gold 2", "gold 2": "gold 3"}
    made = part.compare({role: found[name] for role, name in roles.items()}, left)
    anew = {role: part.measure(subject(left, role)) for role in ("original", "gold 1", "gold 2")}
    wanted = part.compare(anew, left)  # measured where the first gold never was
    for role in wanted:
        for metric in ("distance_to_gold", "distance_to_gold_answer"):
            for name in ("forget", "retain"):
                assert value(made[role], name, metric) == pytest.approx(value(wanted[role], name, metric))
    assert value(made["edited"], "forget", "distance_share") == pytest.approx(
        value(part.compare(found, case)["gold 1"], "forget", "distance_share")
    )
    renamed = replace(left, gold_names=("gold 8", "gold 9"))
    with pytest.raises(AuditError, match="other names"):
        part.compare({role: found[name] for role, name in roles.items()}, renamed)


def test_what_one_gold_cannot_say_is_said():
    case = replace(small_case(2), golds=small_case(2).golds[:1], gold_names=())
    part = Distance(limit=4, n_samples=1)
    found = {role: part.measure(subject(case, role)) for role in ("original", "gold 1")}
    assert "needs another gold" in found["gold 1"].missing[0]
    assert "two other golds" in part.compare(found, case)["original"].missing[0]
    with pytest.raises(AuditError, match="max_bytes"):
        Distance(max_bytes=10).measure(subject(case))
    assert "needs gold" in part.why_not(replace(case, golds=()))


def curves(**recalls) -> pd.DataFrame:
    rows = [
        {"model": name.replace("_", " "), "lr": 1e-3, "data": "forget", "step": 10 * i, "recall": value}
        for name, values in recalls.items()
        for i, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("edited", "gold", "ratio", "kind"),
    [
        ([0, 0.95, 1], [0, 0, 0.5, 0.7, 0.9], 10 / 40, "exact"),
        ([0, 0.1, 0.2], [0, 0.95], 20 / 10, "at least"),
        ([0, 1.0], [0, 0.1, 0.1], 10 / 20, "at most"),
        ([0, 0.1], [0, 0.1], np.nan, "none"),
        ([0.9, 0.9], [0, 0, 1], 0.0, "exact"),
        ([0, 1.0], [1.0, 1.0], np.nan, "none"),
    ],
)
def test_relearning_time_ratio_by_hand(edited, gold, ratio, kind):
    (row,) = relearning_time_ratio(curves(original=[1.0], edited=edited, gold_1=gold)).to_dict("records")
    assert row["kind"] == kind and row["level"] == 0.9
    assert row["ratio"] == pytest.approx(ratio, nan_ok=True)


def test_relearning_time_ratio_takes_the_median_gold_and_refuses_what_lacks_one():
    table = curves(original=[1.0], edited=[0, 1], gold_1=[0, 0, 1], gold_2=[0, 0, 0, 1], gold_3=[0, 0, 0, 0])
    assert relearning_time_ratio(table)["ratio"][0] == pytest.approx(10 / 30)
    assert relearning_time_ratio(table, level=0.5)["level"][0] == 0.5
    with pytest.raises(DataError, match="of gold are needed"):
        relearning_time_ratio(curves(original=[1.0], edited=[0, 1]))
    with pytest.raises(DataError, match="original's level"):
        relearning_time_ratio(curves(edited=[0, 1], gold_1=[0, 1]))
    with pytest.raises(DataError, match="recall missing"):
        relearning_time_ratio(table.drop(columns="recall"))
