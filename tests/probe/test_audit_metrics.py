"""The formulas of the output-based metrics, against hand-worked cases, brute force, scipy and published logs."""

from __future__ import annotations

import json
import math
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import entropy, ks_2samp

from probe.audit import metrics
from probe.audit._porter import porter_stem
from probe.errors import AuditError, DataError


def brute_lcs(one, other) -> int:
    """Longest subsequence of `one` that is one of `other`, by trying all."""
    for size in range(len(one), 0, -1):
        for chosen in combinations(one, size):
            rest = iter(other)
            if all(item in rest for item in chosen):
                return size
    return 0


def test_lcs_is_that_of_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(300):
        one, other = (rng.integers(0, 4, size=rng.integers(0, 9)).tolist() for _ in range(2))
        assert metrics.lcs_length(one, other) == brute_lcs(one, other), (one, other)


def test_rouge_l_by_hand():
    # "police killed the gunman" / "police kill the gunman": 3 words in common, of 4 and 4
    score = metrics.rouge_l("police kill the gunman", "police killed the gunman")
    assert (score.precision, score.recall, score.f1) == (0.75, 0.75, 0.75)
    # the same words in another order: "the gunman" alone is in order
    assert metrics.rouge_l("The gunman kill police!", "police killed the gunman").recall == 0.5
    long = metrics.rouge_l("a cat and a dog and a bird", "a dog")
    assert (long.precision, long.recall) == (2 / 8, 1.0)
    assert long.f1 == pytest.approx(2 * 0.25 / 1.25)
    assert metrics.rouge_l("police kill", "police killed", stem=True).recall == 1.0


def test_rouge_l_of_nothing():
    assert metrics.rouge_l("", "police") == metrics.RougeL(0.0, 0.0, 0.0)
    assert metrics.rouge_tokens("It's 3rd, O'Neill—x") == ["it", "s", "3rd", "o", "neill", "x"]
    with pytest.raises(DataError, match="ASCII letters or digits"):
        metrics.rouge_l("police", "北京")


@pytest.mark.parametrize("stem", [True, False])
def test_rouge_l_is_that_of_the_published_logs(shared_data, stem):
    """TOFU's evaluation stems; without stemming no recall can be higher, and most answers do not differ."""
    ours, published = [], []
    for name in ("full", "retain90"):
        log = json.loads((shared_data / f"tofu/eval_logs/llama2-7b_{name}_wd0.01.json").read_text())
        for table in log.values():
            for key, (_, said, true) in table["generated_text"].items():
                ours.append(metrics.rouge_l(said, true, stem).recall)
                published.append(table["rougeL_recall"][key])
    assert len(ours) == 1634
    gap = np.array(published) - np.array(ours)
    if stem:
        np.testing.assert_allclose(gap, 0, atol=1e-12)
    else:
        assert gap.min() > -1e-12 and 0.9 < (gap < 1e-12).mean() < 1


def test_porter_stems_of_the_paper():
    pairs = {
        "caresses": "caress", "ponies": "poni", "cats": "cat", "feed": "feed", "agreed": "agre",
        "plastered": "plaster", "motoring": "motor", "sing": "sing", "conflated": "conflat", "sized": "size",
        "hopping": "hop", "falling": "fall", "filing": "file", "happy": "happi", "sky": "sky",
        "relational": "relat", "digitizer": "digit", "triplicate": "triplic", "electrical": "electr",
        "adoption": "adopt",
        "controll": "control", "rate": "rate", "bowdlerize": "bowdler", "dies": "die", "is": "is",
    }  # fmt: skip
    assert {word: porter_stem(word) for word in pairs} == pairs


def test_probability():
    assert metrics.probability(np.log([0.5, 0.125])) == pytest.approx(0.25)
    assert metrics.normalised_probability(0.0, [math.log(2), math.log(4)]) == pytest.approx(1 / 1.75)
    assert metrics.normalised_probability(5000.0, [5000.0]) == 0.5  # no underflow
    for bad in ([math.nan], [0.5]):
        with pytest.raises(AuditError, match="log-probabilities"):
            metrics.probability(np.array(bad))
    with pytest.raises(DataError, match="at least one token"):
        metrics.probability(np.array([]))
    with pytest.raises(DataError, match="no wrong"):
        metrics.normalised_probability(1.0, [])


def test_memorisation_is_what_its_definition_says():
    """Extraction strength by trying every prefix length; exact memorisation by counting."""
    rng = np.random.default_rng(1)
    flags = [rng.random(rng.integers(1, 7)) < 0.6 for _ in range(200)]
    n_tokens = np.array([len(own) for own in flags])
    last_wrong = np.array([max((i for i, right in enumerate(own) if not right), default=-1) for own in flags])
    shortest = [next(k for k in range(len(own) + 1) if own[k:].all()) for own in flags]
    wanted = [1 - k / len(own) for k, own in zip(shortest, flags, strict=True)]
    np.testing.assert_allclose(metrics.extraction_strength(last_wrong, n_tokens), wanted)
    right = np.array([own.sum() for own in flags])
    np.testing.assert_allclose(metrics.exact_memorisation(right, n_tokens), [own.mean() for own in flags])
    for function in (metrics.extraction_strength, metrics.exact_memorisation):
        with pytest.raises(DataError, match="at least one token"):
            function(np.array([0]), np.array([0]))
        with pytest.raises(DataError, match="at least one token"):
            function(np.array([]), np.array([]))


def test_truth_ratio_has_its_mean_inside_the_exponent():
    assert metrics.truth_ratio(math.log(2), [math.log(8), math.log(2)]) == pytest.approx(0.5)  # 2 / sqrt(16)
    assert metrics.truth_ratio(1.0, [1.0]) == 1
    np.testing.assert_allclose(metrics.truth_preference(np.log([0.25, 1.0, 3.0])), [0.75, 0, 0])
    np.testing.assert_allclose(metrics.truth_preference(np.array([2000.0, -2000.0])), [0, 1])
    with pytest.raises(DataError, match="perturbed"):
        metrics.truth_ratio(1.0, [])
    with pytest.raises(AuditError, match="finite"):
        metrics.truth_ratio(math.nan, [1.0])
    with pytest.raises(AuditError, match="overflows"):
        metrics.truth_ratio(2000.0, [1.0])


def test_forget_quality_is_scipys():
    rng = np.random.default_rng(2)
    one, other = np.exp(rng.normal(size=40)), np.exp(rng.normal(0.8, 1, size=30))
    test = ks_2samp(one, other)
    assert metrics.forget_quality(one, other) == metrics.KolmogorovSmirnov(test.pvalue, test.statistic)
    assert metrics.forget_quality(np.log(one), np.log(other)) == metrics.forget_quality(one, other)  # order alone
    grid = np.sort(np.r_[one, other])  # D by its definition: the largest gap of the two empirical distributions
    gap = np.abs((one[:, None] <= grid).mean(0) - (other[:, None] <= grid).mean(0)).max()
    assert metrics.forget_quality(one, other).d == pytest.approx(gap)


@pytest.mark.parametrize("bad", [[1.0], [], [1.0, math.nan], [0.7, 0.7, 0.7], [0.7, 0.7 + 1e-13]])
def test_forget_quality_of_nothing_is_no_number(bad):
    with pytest.raises(AuditError, match="forget quality"):
        metrics.forget_quality(bad, [1.0, 2.0, 3.0])
    with pytest.raises(AuditError, match="of gold"):
        metrics.forget_quality([1.0, 2.0, 3.0], bad)


def test_harmonic_mean_and_utility():
    assert metrics.harmonic_mean([1, 0.5, 0.25]) == pytest.approx(3 / 7)
    assert metrics.harmonic_mean([1, 0]) == 0
    parts = {"retain": (1, 0.5, 0.25), "authors": (1, 1, 1), "world": (0.5, 0.5, 0.5)}
    assert metrics.model_utility(parts) == pytest.approx(9 / (7 + 3 + 6))
    for bad in ([], [-0.1, 1], [math.nan]):
        with pytest.raises(AuditError):
            metrics.harmonic_mean(bad)
    with pytest.raises(AuditError, match="3 parts"):
        metrics.model_utility({"retain": (1, 1)})
    with pytest.raises(AuditError, match="harmonic mean"):
        metrics.model_utility({})


def test_composite_recomputes_every_published_row(shared_data):
    rows = json.loads((shared_data / "uds/method_results.json").read_text())["models"]
    assert len(rows) == 152
    for row in rows:
        made = metrics.composite(row)
        assert abs(made.memorisation - row["mem"]) < 1e-11
        assert abs(made.privacy - row["privacy"]) < 1e-11
        assert abs(made.overall - row["overall"]) < 1e-11
    with pytest.raises(DataError, match="utility_rel"):
        metrics.composite({key: value for key, value in rows[0].items() if key != "utility_rel"})
    with pytest.raises(AuditError, match="finite"):
        metrics.composite({**rows[0], "uds": math.nan})


def test_utility_recomputes_every_published_row(shared_data):
    rows = json.loads((shared_data / "uds/method_results.json").read_text())["models"]
    for row in rows:
        parts = {s: [row[f"{s}_{m}"] for m in ("q_prob", "q_rouge", "truth_ratio")] for s in ("retain", "ra", "wf")}
        assert metrics.model_utility(parts) == pytest.approx(row["model_utility"], abs=1e-11)


def test_privacy_leakage():
    assert metrics.privacy_leakage(1.0, 0.5) == 100
    assert metrics.privacy_leakage(0.0, 0.5) == -100
    assert metrics.privacy_leakage(0.4, 0.4) == 0
    for bad in ((0.5, 0.0), (1.1, 0.5), (math.nan, 0.5)):
        with pytest.raises(AuditError, match="AUC"):
            metrics.privacy_leakage(*bad)


def test_ngram_entropy_is_scipys_by_hand():
    text = ["a", "b", "a", "b", "c"]  # bigrams ab ba ab bc, trigrams aba bab abc
    wanted = entropy([2, 1, 1], base=2) / 3 + 2 * entropy([1, 1, 1], base=2) / 3
    assert metrics.ngram_entropy(text) == pytest.approx(wanted)
    assert wanted == pytest.approx(1.5 / 3 + 2 * math.log2(3) / 3)
    assert metrics.ngram_entropy([7] * 50) == 0  # one word for ever
    assert metrics.ngram_entropy(text, {1: 1.0}) == pytest.approx(entropy([2, 2, 1], base=2))
    with pytest.raises(DataError, match="3-grams"):
        metrics.ngram_entropy(["a", "b"])


def test_repetition():
    assert metrics.repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert metrics.repetition([7] * 10) == pytest.approx(6 / 7)
    assert metrics.repetition(range(10)) == 0
    with pytest.raises(DataError, match="4-grams"):
        metrics.repetition([1, 2, 3])
