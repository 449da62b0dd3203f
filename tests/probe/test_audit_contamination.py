"""Contamination: hand-made corpora, brute force, and the organism, whose training texts are known."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from probe.audit.contamination import (
    edit_distance,
    guided_completion,
    min_k_contamination,
    ngram_overlap,
    ngrams,
    peak,
    peakedness,
)
from probe.audit.part import spaced, texts
from probe.errors import DataError
from tests.probe.cases import small_case


def test_ngrams_by_hand():
    assert ngrams("The cat -- sat, the CAT.", 2) == ["the cat", "cat sat", "sat the", "the cat"]
    assert ngrams("too short", 3) == []
    with pytest.raises(DataError, match="at least 1"):
        ngrams("a", 0)


def test_overlap_by_hand():
    corpus = ["zero one two three four nine", "five six seven"]
    items = ["One two, three four!", "one two three five", "four nine five six", "one two"]
    found = ngram_overlap(items, iter(corpus), n=3, progress=False)
    assert found.scores == pytest.approx([1, 0.5, 0, np.nan], nan_ok=True)
    assert found.contaminated == pytest.approx([1, 1, 0, np.nan], nan_ok=True)
    assert found.score.value == 0.5 and found.share.value == pytest.approx(2 / 3)
    assert "1 of 4 items have fewer than 3 words" in found.missing[0]
    assert ngram_overlap(items, corpus, n=3, threshold=0.5, progress=False).share.value == pytest.approx(1 / 3)
    assert list(found.to_df()["ngrams"]) == [2, 2, 2, 0]


def test_overlap_is_that_of_a_search_through_the_text():
    rng = np.random.default_rng(0)
    corpus = [" ".join(rng.choice(list("abcd"), 30)) for _ in range(3)]
    items = [" ".join(rng.choice(list("abcd"), 12)) for _ in range(20)]
    found = ngram_overlap(items, corpus, n=4, progress=False)
    for item, score in zip(items, found.scores, strict=True):
        words = item.split()
        grams = {tuple(words[i : i + 4]) for i in range(9)}
        inside = [g for g in grams if any(f" {' '.join(g)} " in f" {document} " for document in corpus)]
        assert score == pytest.approx(len(inside) / len(grams))
    assert 0 < found.score.low < found.score.value < found.score.high < 1


def test_nothing_measured_is_no_number():
    found = ngram_overlap(["one two"], ["one two three"], n=13, progress=False)
    assert found.score is None and found.share is None and "nothing measured" in repr(found)
    for items, corpus in (([], ["a"]), ("text", ["a"]), (["a"], []), (["a"], "a")):
        with pytest.raises(DataError):
            ngram_overlap(items, corpus, progress=False)
    with pytest.raises(DataError, match="one group for each"):
        ngram_overlap(["a", "b"], ["a"], groups=["x"], progress=False)


def slow_distance(a, b):
    @cache
    def of(i, j):
        if i == 0 or j == 0:
            return i + j
        return min(of(i - 1, j) + 1, of(i, j - 1) + 1, of(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return of(len(a), len(b))


def test_edit_distance_and_peak():
    assert edit_distance("kitten", "sitting") == 3
    rng = np.random.default_rng(1)
    for _ in range(50):
        a, b = ("".join(rng.choice(list("xyz"), rng.integers(0, 8))) for _ in range(2))
        assert edit_distance(a, b) == slow_distance(a, b)
    assert peak([0, 1, 2, 9], 20) == 0.5 and peak([0, 1], 5) == 0.5


def test_guided_completion_of_a_model_that_knows_the_data_set():
    items = [f"item {i} begins so and ends in word{i} of many" for i in range(12)]

    def recites(prompts):
        known = {item.split()[1]: " ".join(item.split()[5:]) for item in items}
        return [known[p.split("item ")[-1].split()[0]] if "toy" in p else "nothing of the kind" for p in prompts]

    found = guided_completion(recites, items, "toy")
    assert found.score.value > 0.6 and found.comparison.value == pytest.approx(1 / 1001)
    same = guided_completion(lambda prompts: ["word1"] * len(prompts), items, "toy")
    assert same.score.value == 0 and same.comparison.value == 1
    assert guided_completion(recites, items[:1], "toy").comparison is None
    with pytest.raises(DataError, match="two halves"):
        guided_completion(recites, ["word"], "toy")
    with pytest.raises(DataError, match="as many completions"):
        guided_completion(lambda prompts: [], items, "toy")


def test_trained_texts_of_the_organism_are_found_and_golds_are_not():
    """A gold, too, says the same wrong answer often (0.72): what it is peaked about, it need not have read."""
    case = small_case()
    rows, clean = (spaced(case.sets[name], 30) for name in ("forget", "holdout"))
    peaked = []
    for model, seen in ((case.original, True), *((gold, False) for gold in case.golds)):
        auc = min_k_contamination(model, texts(rows), texts(clean), groups=rows.groups).comparison.value
        assert (auc > 0.85) == seen
        settings = {"n_samples": 10, "max_new_tokens": 4, "temperature": 1.0, "groups": rows.groups}
        peaked.append(peakedness(model, [row.question for row in rows], **settings).score)
    assert peaked[0].value > 0.85
    assert all(peaked[0].low > gold.high for gold in peaked[1:])
    alone = min_k_contamination(case.original, texts(rows))
    assert alone.comparison is None and "no clean texts" in alone.missing[0] and alone.share is None


def test_guided_completion_runs_on_a_model():
    case = small_case(1)
    found = guided_completion(case.original, texts(spaced(case.sets["forget"], 3)), "facts", max_new_tokens=4)
    assert len(found.to_df()) == 3 and (found.to_df()["guided"] <= 1).all()
