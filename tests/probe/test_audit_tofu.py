"""TOFU's figures: recomputed from published logs to their printed digits, and on the small organism."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import hmean, ks_2samp

from probe.audit import metrics
from probe.audit.behaviour import truth
from probe.audit.part import Measurement, scratch
from probe.audit.tofu import Tofu, from_logs, load_tofu, log_truth_ratios, read_eval_log, utility_parts
from probe.data import Questions
from probe.errors import DataError
from tests.probe.cases import small_case, subject

PART = Tofu(limit=40)


@pytest.fixture(scope="module")
def logs(shared_data):
    return [read_eval_log(shared_data / f"tofu/eval_logs/llama2-7b_{n}_wd0.01.json") for n in ("full", "retain90")]


@pytest.fixture(scope="module")
def case():
    full = small_case()
    return replace(full, sets={name: full.sets[name] for name in ("forget", "retain", "holdout")})


@pytest.fixture(scope="module")
def subjects(case):
    return {role: subject(case, role) for role in ("original", "gold 1", "gold 2")}


@pytest.fixture(scope="module")
def measured(subjects):
    return {role: PART.measure(one) for role, one in subjects.items()}


def found(measurement) -> dict:
    return {one.metric: one.value for one in measurement.numbers}


def test_published_figures_to_their_digits(logs):
    full, retain = logs
    made = from_logs(full, retain)
    assert f"{made.model_utility:.4f}" == "0.6227"
    assert f"{from_logs(retain).model_utility:.4f}" == "0.6137"
    assert f"{made.forget_quality.p:.2e}" == "1.83e-21"
    assert f"{made.forget_quality.d:.3f}" == "0.397"
    assert from_logs(full).forget_quality is None


def test_truth_ratios_of_the_logs_are_the_logged_ones(logs):
    """The logs carry their own truth ratios (in half precision of their losses)."""
    names = {"retain": "eval_log.json", "forget": "eval_log_forget.json"}
    for log in logs:
        for name, file in names.items():
            logged = list(log[file]["truth_ratio"].values())
            np.testing.assert_allclose(np.exp(log_truth_ratios(log, name)), logged, rtol=1e-5)


def test_the_mean_of_probabilities_would_give_another_p(logs):
    """The trap: the mean over wrong answers taken outside the exponent."""
    ratios = []
    for log in logs:
        table = log["eval_log_forget.json"]
        right, wrong = table["avg_paraphrased_loss"], table["average_perturb_loss"]
        ratios.append([np.mean(np.exp(-np.array(wrong[i]))) / np.exp(-right[i]) for i in right])
    assert f"{ks_2samp(*ratios).pvalue:.0e}" == "6e-23"


def test_logs_that_cannot_be_read(tmp_path, logs):
    path = tmp_path / "log.json"
    with pytest.raises(DataError, match="is not a file"):
        read_eval_log(path)
    path.write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        read_eval_log(path)
    for bad in ([], {}, {"eval_log.json": {"avg_gt_loss": {}}}):
        path.write_text(json.dumps(bad))
        with pytest.raises(DataError, match="must have"):
            read_eval_log(path)
    broken = json.loads(json.dumps(logs[0]))
    broken["eval_log_forget.json"]["average_perturb_loss"]["0"] = []
    with pytest.raises(DataError, match="perturbed"):
        log_truth_ratios(broken)


def test_gold_is_like_gold_and_the_original_is_not(measured, case):
    compared = {role: found(one) for role, one in PART.compare(measured, case).items()}
    assert compared["original"]["forget_quality"].value < 1e-3
    assert compared["original"]["ks_distance"].value > 0.6
    for role in ("gold 1", "gold 2"):
        assert compared[role]["ks_distance"].value < compared["original"]["ks_distance"].value - 0.2
        assert compared[role]["forget_quality"].value > compared["original"]["forget_quality"].value


def test_forget_quality_is_scipys_median_over_golds(measured, subjects, case):
    ratios = {}
    for role, one in subjects.items():
        scores = truth(one, "forget", PART.limit)
        ratios[role] = scores.log_ratio[scores.distinct]
    tests = [ks_2samp(ratios["original"], ratios[gold]) for gold in ("gold 1", "gold 2")]
    made = PART.compare(measured, case)
    own = found(made["original"])
    assert own["forget_quality"].value == pytest.approx(np.median([test.pvalue for test in tests]))
    assert own["ks_distance"].value == pytest.approx(np.median([test.statistic for test in tests]))
    assert (own["ks_distance"].low, own["ks_distance"].high) == tuple(sorted(test.statistic for test in tests))
    assert own["ks_distance"].n == len(ratios["original"])
    assert made["original"].tables["forget_quality"]["gold"].tolist() == ["gold 1", "gold 2"]
    assert made["gold 1"].tables["forget_quality"]["gold"].tolist() == ["gold 2"]
    assert found(made["gold 1"])["forget_quality"].how == "none: one gold"


def test_phrasings_that_share_a_paraphrase_count_once(subjects, case):
    scores = truth(subjects["original"], "forget", None)
    made = Tofu(limit=None).measure(subjects["original"])
    asked = {(row.paraphrases[0], row.answer, row.perturbed_answers) for row in case.sets["forget"]}
    assert len(made.payload) == len(asked) < len(scores) == len(case.sets["forget"])


def test_utility_is_scipys_harmonic_mean(measured, subjects):
    for role, one in subjects.items():
        parts = utility_parts(one, "retain", PART.limit)
        own = found(measured[role])["model_utility"]
        assert own.value == pytest.approx(hmean([ratio.value for ratio in parts.values()]))
        assert own.low <= own.value <= own.high
        assert own.value > 0.8
        assert "no authors, world; it is over retain" in measured[role].missing[0]


def test_utility_parts_are_of_the_answers(subjects):
    """Probability on retain is that of every card, on the rows that were looked at."""
    one = subjects["gold 1"]
    parts = utility_parts(one, "retain", None)
    assert parts["probability"].value == pytest.approx(one.answers["retain"].prob.mean())
    scores = truth(one, "retain", None)
    assert parts["truth"].value == pytest.approx(np.maximum(0, 1 - np.exp(scores.log_ratio)).mean())


def test_nine_parts_where_authors_and_world_are_there(case):
    """Outside retain the probability is over the options."""
    other = case.sets["holdout"]
    sets = {"forget": case.sets["forget"], "retain": case.sets["retain"], "authors": other[:20], "world": other[20:40]}
    one = subject(replace(case, sets=sets), "gold 1")
    measured = PART.measure(one)
    assert measured.missing == ()
    table = measured.tables["utility_parts"]
    assert len(table) == 9
    assert found(measured)["model_utility"].value == pytest.approx(hmean(table["value"]))
    assert "harmonic mean of 9" in found(measured)["model_utility"].how
    scores = truth(one, "authors", PART.limit)
    nll = -one.answers["authors"].logprob_sum / one.answers["authors"].n_tokens
    wrong = [np.exp(-own).sum() for own in scores.perturbed_nll]
    wanted = np.mean([np.exp(-own) / (np.exp(-own) + w) for own, w in zip(nll, wrong, strict=True)])
    own = table.query("set == 'authors' and part == 'probability'")["value"].item()
    assert own == pytest.approx(wanted)


def test_sets_under_the_names_of_the_benchmarks_files(case):
    other = case.sets["holdout"]
    base = {"forget": case.sets["forget"], "retain": case.sets["retain"]}
    ours, theirs = (
        PART.measure(subject(replace(case, sets={**base, authors: other[:20], world: other[20:40]})))
        for authors, world in (("authors", "world"), ("real_authors", "world_facts"))
    )
    assert found(ours)["model_utility"] == found(theirs)["model_utility"]
    assert ours.tables["utility_parts"].equals(theirs.tables["utility_parts"])


@pytest.mark.parametrize(("split", "n"), [("forget01", 40), ("forget05", 200), ("forget10", 400)])
def test_questions_of_the_benchmark(shared_data, split, n):
    sets = load_tofu(shared_data / "tofu", split)
    assert {name: len(own) for name, own in sets.items()} == {"forget": n, "retain": 400, "authors": 100, "world": 117}
    assert {len(row.perturbed_answers) for name in ("forget", "retain") for row in sets[name]} == {5}
    assert all(row.paraphrased_answers for row in sets["forget"])
    assert not set(sets["forget"].groups) & set(sets["retain"].groups)
    row = sets["authors"][0]
    assert row.perturbed_answers and row.paraphrased_answers == ()


def test_questions_of_no_benchmark(shared_data, tmp_path):
    with pytest.raises(DataError, match="split must be"):
        load_tofu(shared_data / "tofu", "forget02")
    with pytest.raises(DataError, match="n_retain"):
        load_tofu(shared_data / "tofu", n_retain=0)
    with pytest.raises(DataError, match="not there"):
        load_tofu(tmp_path)


def test_without_perturbed_answers_nothing_is_made_up(case):
    bare = {name: Questions([replace(row, perturbed_answers=()) for row in case.sets[name][:4]]) for name in case.sets}
    one = subject(replace(case, sets=bare))
    measured = PART.measure(one)
    assert measured.numbers == () and measured.payload is None
    assert "forget quality: the forget set has no perturbed answers" in measured.missing
    assert any(text.startswith("utility of retain") for text in measured.missing)
    assert PART.compare({"original": measured, "gold 1": measured}, case) == {}


def test_without_another_gold_there_is_no_forget_quality(measured, case):
    alone = PART.compare({"original": measured["original"]}, case)
    assert alone["original"] == Measurement(missing=("forget quality: no gold",))
    one = PART.compare({role: measured[role] for role in ("original", "gold 1")}, case)
    assert "no other gold" in one["gold 1"].missing[0]
    assert found(one["original"])["ks_distance"].how == "none: one gold"


def test_one_question_is_no_sample(case):
    sets = {"forget": case.sets["forget"][:1], "retain": case.sets["retain"][:1]}
    measured = {role: PART.measure(subject(replace(case, sets=sets), role)) for role in ("original", "gold 1")}
    assert "needs two or more" in PART.compare(measured, replace(case, sets=sets))["original"].missing[0]
    own = found(measured["original"])["model_utility"]
    assert own.how.startswith("none: one group") and np.isnan(own.low)


def test_a_model_that_answers_everything_alike_has_no_forget_quality(measured, case):
    with scratch(case.original) as model:
        with torch.no_grad():
            next(p for name, p in model.hf.named_parameters() if "layers" not in name and "norm" in name).zero_()
        edited = PART.measure(subject(case, "edited", model))
    made = PART.compare({**measured, "edited": edited}, case)["edited"]
    assert made.numbers == () and "every truth ratio of the model is" in made.missing[0]
    assert found(edited)["model_utility"].value == 0  # ROUGE-L is 0, and so is the mean


def test_degenerate_gold_is_named():
    with pytest.raises(Exception, match="of gold"):
        metrics.forget_quality([0.1, 0.2], [1.0, 1.0])
