"""The verdict's rules on tables worked by hand, thresholds by arithmetic, intervals over seeds against closed forms."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from probe.audit import ReportCard, Thresholds, across, judge, thresholds
from probe.audit._rows import COLUMNS
from probe.errors import AuditError

EVIDENCE = [("answers", "forget", "recall"), ("relearning", "forget", "relearn"), ("uds", "forget", "depth")]
KINDS = {"forget/recall": "plain", "forget/relearn": "attack", "forget/depth": "inside"}
LIMITS = Thresholds(0.5, {"forget/recall": 0.2, "forget/relearn": 0.4, "forget/depth": 0.3}, KINDS)
GOLDS = {"recall": [0.04, 0.06, 0.05, 0.05, 0.05], "relearn": [0.1, 0.2, 0.1, 0.2, 0.15], "depth": [0.0] * 5}
ORIGINAL = {"recall": 1.0, "relearn": 0.95, "depth": 1.0}


def rows(edited: dict[str, float], n_golds: int = 5, original=ORIGINAL, retain=None) -> pd.DataFrame:
    found = []

    def row(metric, model, value, name="forget"):
        found.append(dict.fromkeys(COLUMNS, "") | {"set": name, "metric": metric, "model": model, "value": value})

    for metric, golds in GOLDS.items():
        if metric in original:
            row(metric, "original", original[metric])
        if metric in edited:
            row(metric, "edited", edited[metric])
        for i, value in enumerate(golds[:n_golds], start=1):
            row(metric, f"gold {i}", value)
    for model, value in (retain or {}).items():
        row("recall", model, value, "retain")
    return pd.DataFrame(found)


def verdict(edited, n_golds=5, edit=None, limits=LIMITS, **more):
    facts = {"method": "x", "weights_changed": True} if edit is None else edit
    return judge(rows(edited, n_golds, **more), EVIDENCE, facts, limits)


@pytest.mark.parametrize(
    ("edited", "label", "by"),
    [
        ({"recall": 1.0, "relearn": 0.95, "depth": 1.0}, "untouched", "forget/recall"),
        ({"recall": 0.525, "relearn": 0.15, "depth": 0.0}, "untouched", "forget/recall"),  # a share of exactly one half
        ({"recall": 0.05, "relearn": 0.9, "depth": 0.5}, "suppressed", "forget/relearn"),  # .94 over .4, .5 over .3
        ({"recall": 0.05, "relearn": 0.15, "depth": 0.31}, "suppressed", "forget/depth"),
        ({"recall": 0.45, "relearn": 0.15, "depth": 0.0}, "suppressed", "forget/recall"),  # .42 of it is still said
        ({"recall": 0.05, "relearn": 0.15, "depth": 0.0}, "removed", None),
        ({"recall": 0.0, "relearn": 0.0, "depth": 0.0}, "removed", None),  # below the golds
    ],
)
def test_the_rules(edited, label, by):
    found = verdict(edited)
    assert found.label == label
    assert by is None or found.decided_by == by
    assert found.n_golds == 5 and label in found.sentence


def test_the_share_is_worked_by_hand_and_the_number_that_decided_is_there():
    found = verdict({"recall": 0.05, "relearn": 0.9, "depth": 0.0})
    # gold's mean is .15 and the original has .95: (.9 - .15) / (.95 - .15)
    assert found.number["share"] == pytest.approx(0.9375)
    assert (found.number["gold_low"], found.number["gold_high"]) == (0.1, 0.2)
    assert "0.9 (original 0.95, gold 0.15 [0.1 to 0.2]), a share of 94%, above 40%" in found.sentence


def test_no_verdict_below_five_golds_and_none_without_an_edit():
    found = verdict({"recall": 1.0, "relearn": 0.95, "depth": 1.0}, n_golds=4)
    assert found.label is None and "at least 5 golds, and there are 4" in found.sentence
    assert judge(rows(ORIGINAL), EVIDENCE, None, LIMITS) is None


def test_a_filter_that_changes_no_weight_is_suppression():
    found = verdict({"recall": 0.0, "relearn": 0.0, "depth": 0.0}, edit={"weights_changed": False})
    assert found.label == "suppressed" and "No weight is changed" in found.rule
    loud = verdict({"recall": 1.0, "relearn": 0.95, "depth": 1.0}, edit={"weights_changed": False})
    assert loud.label == "untouched"


def test_removed_needs_evidence_of_every_kind():
    found = verdict({"recall": 0.05, "relearn": 0.15})
    assert found.label is None and "kind inside" in found.rule
    # what comes back decides all the same
    assert verdict({"recall": 0.05, "relearn": 0.9}).label == "suppressed"


def test_evidence_that_cannot_tell_the_original_from_the_golds_is_not_heard():
    # golds of relearn have a standard deviation of .05: an original of .29 is within three of them of their mean
    found = verdict({"recall": 0.05, "relearn": 0.29, "depth": 0.0}, original={**ORIGINAL, "relearn": 0.29})
    row = found.evidence[found.evidence["metric"] == "relearn"].iloc[0]
    assert not row["heard"] and "does not tell" in row["why"]
    assert found.label is None  # no attack was heard
    silent = verdict({"recall": 0.05, "relearn": 0.15, "depth": 0.0}, original={**ORIGINAL, "recall": 0.05})
    assert silent.label is None and "asked plainly" in silent.rule
    unknown = Thresholds(0.5, {"forget/recall": 0.2}, {"forget/recall": "plain"})
    why = verdict({"recall": 0.05, "depth": 0.9}, limits=unknown).evidence.set_index("metric")["why"]
    assert "no threshold" in why["depth"] and "cannot be measured on the edited model" in why["relearn"]


def test_what_it_cost():
    retain = {"original": 1.0, "edited": 0.8, "gold 1": 0.98, "gold 2": 0.96}
    found = verdict({"recall": 0.05, "relearn": 0.15, "depth": 0.0}, retain=retain)
    own = found.cost.iloc[0]
    assert (own["set"], own["metric"]) == ("retain", "recall")
    assert own["change"] == pytest.approx(-0.2) and own["gold"] == pytest.approx(0.97)
    assert "retain, recall 100 % to 80 % (gold 97 %)" in found.sentence


def test_on_a_destroyed_model_nothing_can_be_told_but_what_comes_back_is_heard():
    silent = {"recall": 0.0, "relearn": 0.0, "depth": 0.0}
    ruined = {"original": 1.0, "edited": 0.4, "gold 1": 1.0}
    found = verdict(silent, retain=ruined)
    assert found.label is None and "damaged: recall of what was to stay fell from 100 % to 40 %" in found.rule
    assert verdict({**silent, "relearn": 0.9}, retain=ruined).label == "suppressed"
    assert verdict(silent, retain={**ruined, "edited": 0.5}).label == "removed"


def test_thresholds_are_frozen_as_they_are_said_to_be(tmp_path):
    left_out = {"forget/recall": [0.0, 0.02], "forget/relearn": [0.1, 0.2, -0.1], "forget/depth": [0.1, 0.5]}
    made = Thresholds.fit(left_out, KINDS, source={"seeds": [1, 2]})
    assert made.evidence == {"forget/recall": 0.2, "forget/relearn": pytest.approx(0.4)}  # 2 * .5 is over .6
    again = Thresholds.load(made.save(tmp_path / "t.json"))
    assert again == made and json.loads((tmp_path / "t.json").read_text())["source"] == {"seeds": [1, 2]}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Thresholds(0.5, {"a/b": 0.2}, {}), "needs a kind"),
        (lambda: Thresholds(0.5, {"a/b": 0.2}, {"a/b": "odd"}), "needs a kind"),
        (lambda: Thresholds(0.5, {"a/b": 1.2}, {"a/b": "plain"}), "between 0 and 1"),
        (lambda: Thresholds.load("nowhere.json"), "holds no thresholds"),
    ],
)
def test_bad_thresholds(make, message):
    with pytest.raises(AuditError, match=message):
        make()


def test_the_thresholds_of_the_package_are_of_evidence_that_there_is():
    from probe.audit import part, parts

    known = {f"{s}/{m}" for name in parts() for s, m in part(name).evidence}
    known |= {"forget/recall", "unseen/recall"}
    own = thresholds()
    assert set(own.evidence) <= known
    assert "plain" in own.kinds.values() and 0.2 <= min(own.evidence.values()) <= max(own.evidence.values()) <= 0.6


# --- several seeds -----------------------------------------------------------------------------------------------


def card(i: int, original=1.0, edited=0.2, golds=(0.0, 0.1), groups=True) -> ReportCard:
    values = {"original": original, "edited": edited, "change": edited - original, "gold": float(np.mean(golds))}
    values |= {f"gold {j}": g for j, g in enumerate(golds, start=1)}
    empty = dict.fromkeys(COLUMNS, math.nan) | {
        "set": "forget",
        "metric": "recall",
        "unit": "",
        "n_of": "",
        "interval": "",
    }
    table = pd.DataFrame([{**empty, "model": m, "value": v} for m, v in values.items()])
    sums = [
        {"set": "forget", "metric": "recall", "model": m, "number": g, "top": v * 10, "bottom": 10.0}
        for m, v in values.items() if m not in ("change", "gold") for g in range(4)
    ]  # fmt: skip
    return ReportCard(table, {"model_hash": str(i), "edit": None}, groups=pd.DataFrame(sums if groups else []))


def test_means_and_the_spread_of_seeds_when_groups_agree():
    edited = [0.1, 0.2, 0.3, 0.4, 0.5]
    found = across([card(i, edited=e) for i, e in enumerate(edited)], n_boot=4000)
    row = found.table[found.table["model"] == "edited"].iloc[0]
    assert row["value"] == pytest.approx(0.3) and row["n_seeds"] == 5
    # every group has its card's value, so all the spread is that of five seeds drawn with replacement
    rng = np.random.default_rng(1)
    means = rng.choice(edited, (100_000, 5)).mean(1)
    assert np.allclose([row["low"], row["high"]], np.quantile(means, [0.025, 0.975]), atol=0.015)
    change = found.table[found.table["model"] == "change"].iloc[0]
    assert change["value"] == pytest.approx(-0.7)


def test_without_groups_seeds_alone_are_drawn_and_the_interval_is_the_same_where_groups_agree():
    own = [card(i, edited=e) for i, e in enumerate([0.1, 0.5, 0.3])]
    bare = [card(i, edited=e, groups=False) for i, e in enumerate([0.1, 0.5, 0.3])]
    columns = ["value", "low", "high"]
    one, two = (across(cards).table[columns].to_numpy(float) for cards in (own, bare))
    assert np.allclose(one, two)


def test_groups_widen_the_interval():
    def uneven(i):
        made = card(i, edited=0.5)
        groups = made.groups.copy()
        groups.loc[groups["model"] == "edited", "top"] = [0.0, 10.0, 0.0, 10.0]
        return ReportCard(made.table, made.settings, groups=groups)

    row = across([uneven(i) for i in range(4)], n_boot=4000).table.query("model == 'edited'").iloc[0]
    # cards do not differ, so what is left is the mean of 4 x 4 draws of 0 or 1: a binomial of 16
    low, high = stats.binom(16, 0.5).ppf([0.025, 0.975]) / 16
    assert (row["low"], row["high"]) == pytest.approx((low, high), abs=1e-9)


def test_equivalence_is_two_one_sided_tests():
    edited = [0.06, 0.04, 0.05, 0.07]  # gold's mean is .05, the original 1: shares of a hundredth or so
    found = across([card(i, edited=e) for i, e in enumerate(edited)]).equivalence.iloc[0]
    shares = (np.array(edited) - 0.05) / 0.95
    high = stats.ttest_1samp(shares, 0.1, alternative="less").pvalue
    low = stats.ttest_1samp(shares, -0.1, alternative="greater").pvalue
    assert found["p"] == pytest.approx(max(high, low)) and found["equivalent"]
    assert found["share"] == pytest.approx(shares.mean())
    far = across([card(i, edited=e) for i, e in enumerate([0.1, 0.2, 0.3, 0.2])]).equivalence.iloc[0]
    assert not far["equivalent"]


def test_where_the_original_does_what_gold_does_there_is_no_scale_and_no_test():
    found = across([card(i, original=0.12, golds=(0.05, 0.1)) for i in range(3)])
    assert found.equivalence.empty and len(found.table)


@pytest.mark.parametrize(("ids", "message"), [([0, 1], "at least 3"), ([0, 1, 1], "same original")])
def test_seeds_that_are_none(ids, message):
    with pytest.raises(AuditError, match=message):
        across([card(i) for i in ids])


def test_what_a_reader_sees_of_several_seeds():
    found = across([card(i, edited=e) for i, e in enumerate([0.1, 0.2, 0.3])])
    assert "3 seeds" in repr(found) and "20 %" in repr(found)
    assert "<table" in found._repr_html_()
