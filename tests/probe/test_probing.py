"""Probes and their controls against scikit-learn, brute force, and data whose answer is planted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.preprocessing import StandardScaler

from activations_cache.errors import CacheMismatchError, SiteError
from probe import _rows, _stats
from probe.data import group_folds
from probe.errors import DataError, LabelError
from probe.probing import Logistic, MeanDifference, _subspace, controls, subspace, sweep
from probe.probing._sweep import _design, _probe
from probe.targets import Direction, Scores, Subspace
from tests.memory_cache import MemoryCache
from tests.planted import SITE, planted_cache

POST = "blocks.{}.hook_resid_post"


def grouped(n_groups: int, per: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Group of each row, and a label that is constant within groups and balanced over them."""
    group = np.repeat(np.arange(n_groups), per)
    return group, np.random.default_rng(seed).permutation(np.arange(n_groups) % 2)[group]


@pytest.fixture(scope="module")
def signal() -> tuple[MemoryCache, np.ndarray]:
    """Three layers: no signal in the first, a planted direction of growing strength in the others."""
    rng = np.random.default_rng(0)
    group, y = grouped(100, 4)
    direction = rng.normal(size=32)
    direction /= np.linalg.norm(direction)
    data = {
        POST.format(layer): (
            rng.normal(size=(400, 32))
            + layer * np.outer(2 * y - 1, direction)
            + 0.3 * rng.normal(size=(100, 32))[group]
        ).astype("f4")
        for layer in range(3)
    }
    columns = {"split": np.array(["retain", "forget"], dtype=object)[y], "person": [f"p{g}" for g in group]}
    ids = [list(map(int, rng.integers(0, 50, size=5))) for _ in range(400)]
    return MemoryCache(data, columns, ids, np.arange(400)), direction


@pytest.fixture(scope="module")
def swept(signal: Any) -> Scores:
    return sweep(signal[0], "split", "person", positive="forget", progress=False)


# probes against scikit-learn


@pytest.mark.parametrize(("n", "d"), [(300, 20), (50, 80)])
@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("l2", [0.1, 1.0, 30.0])
def test_logistic_is_the_optimum_of_scikit_learns_objective(n: int, d: int, balanced: bool, l2: float) -> None:
    rng = np.random.default_rng(n)
    x = rng.normal(size=(n, d)) * np.logspace(-1, 1, d) + 5
    y = np.stack([(x[:, -1] + 10 * rng.normal(size=n) > 5), rng.random(n) < 0.2], axis=1).astype(int)
    scaler = StandardScaler().fit(x)
    for standardise in (True, False):
        found = Logistic(l2, balanced=balanced, standardise=standardise).fit(torch.tensor(x), torch.tensor(y))
        rows = scaler.transform(x) if standardise else x
        for label in range(2):
            peer = LogisticRegression(
                C=1 / l2,
                class_weight="balanced" if balanced else None,
                solver="newton-cholesky",
                tol=1e-12,
                max_iter=1000,
            ).fit(rows, y[:, label])
            coefficient = peer.coef_[0] / (scaler.scale_ if standardise else 1)
            np.testing.assert_allclose(found.weight[:, label], coefficient, rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(found.scores(torch.tensor(x))[:, label], peer.decision_function(rows), atol=1e-5)


def test_logistic_copes_with_constant_dimensions_and_separable_classes() -> None:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).double()
    x[:, 2] = 7.0
    y = (x[:, :1] > 0).long()
    found = Logistic().fit(x, y)
    assert torch.isfinite(found.weight).all()
    assert found.weight[2].abs() < 1e-9
    assert (found.predict(x) == y).all()


def test_mean_difference_streams_and_is_the_difference_of_means() -> None:
    rng = np.random.default_rng(0)
    x, y = torch.tensor(rng.normal(size=(90, 5))), torch.tensor(rng.integers(0, 2, size=(90, 3)))
    at_once = MeanDifference().fit(x, y)
    fitter = MeanDifference()
    for start in range(0, 90, 7):
        fitter.update(x[start : start + 7], y[start : start + 7])
    streamed = fitter.result()
    torch.testing.assert_close(streamed.weight, at_once.weight)
    for label in range(3):
        positive, negative = x[y[:, label] == 1].mean(0), x[y[:, label] == 0].mean(0)
        torch.testing.assert_close(at_once.weight[:, label], positive - negative)
        middle = (positive + negative)[None] / 2
        assert float(at_once.scores(middle)[0, label]) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("fitter", [MeanDifference(), Logistic()])
def test_probes_refuse_one_class(fitter: Any) -> None:
    with pytest.raises(LabelError, match="both classes"):
        fitter.fit(torch.randn(10, 3), torch.ones(10, 1, dtype=torch.long))


# statistics against brute force


def test_auc_and_balanced_accuracy_against_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, size=60)
    scores = rng.integers(0, 8, size=60) / 3  # with ties
    assert _stats.auc(scores, y) == pytest.approx(roc_auc_score(y, scores), abs=1e-12)
    strata = rng.integers(0, 3, size=60)
    pairs = [(strata == s, (strata == s)[y == 1].sum() * (strata == s)[y == 0].sum()) for s in range(3)]
    expected = sum(roc_auc_score(y[own], scores[own]) * n for own, n in pairs) / sum(n for _, n in pairs)
    assert _stats.auc(scores, y, strata) == pytest.approx(expected, abs=1e-12)
    hit = (scores > 1) == y
    found = _stats.balanced_accuracy(hit[:, None], y[:, None])[0]
    assert found == pytest.approx(balanced_accuracy_score(y, scores > 1))


def test_bootstrap_replicates_are_those_of_the_repeated_rows() -> None:
    rng = np.random.default_rng(1)
    group, y = grouped(12, 3)
    scores = rng.normal(size=36).round(1)
    hit = (scores > 0) == y
    weights = _stats.resample_groups(group, y, 50, rng)
    areas = _stats.auc_bootstrap(scores, y, group, weights)
    accuracies = _stats.balanced_accuracy_bootstrap(hit, y, group, weights)
    assert (weights.sum(1) == 12).all()
    assert (weights[:, y[::3] == 1].sum(1) == 6).all()  # classes keep their number of groups
    for draw in range(50):
        rows = np.repeat(np.arange(36), weights[draw, group].astype(int))
        assert areas[draw] == pytest.approx(roc_auc_score(y[rows], scores[rows]), abs=1e-12)
        assert accuracies[draw] == pytest.approx(balanced_accuracy_score(y[rows], scores[rows] > 0))


def test_permuted_labels_keep_the_rows_of_a_group_together() -> None:
    rng = np.random.default_rng(0)
    group, y = grouped(20, 5)
    drawn = _stats.permuted_labels(y, group, 200, rng)
    assert (drawn.reshape(20, 5, 200).std(axis=1) == 0).all()
    assert (drawn.sum(0) == y.sum()).all()
    assert abs(np.corrcoef(drawn.mean(1), y)[0, 1]) < 0.5
    mixed = np.tile([0, 1], 50)  # both classes in each group: cells of a group and a label move together
    cells = _stats.permuted_labels(mixed, group, 50, rng)
    assert all(len(np.unique(cells[(group == g) & (mixed == c), 0])) == 1 for g in range(20) for c in (0, 1))


def test_p_values_are_corrected_by_the_maximum() -> None:
    null = np.array([[0.5, 0.6, 0.4], [0.7, 0.2, 0.3]])  # maxima .7 .6 .4
    assert _stats.corrected_p(np.array([0.65, 0.1, 0.9]), null) == pytest.approx([2 / 4, 4 / 4, 1 / 4])


# the sweep


def test_planted_direction_is_found_and_controls_stay_at_chance(signal: Any, swept: Scores) -> None:
    table = swept.to_df()
    assert swept.best.layer == 2
    assert abs(float(swept.best.direction.vector @ torch.tensor(signal[1]).float())) > 0.95
    assert float(swept.best.direction.vector @ torch.tensor(signal[1]).float()) > 0  # it points to the positive class
    assert (table.score[table.layer == 2] > 0.9).all()
    assert table.control.between(0.42, 0.58).all()
    assert (table.selectivity[table.layer == 2] > 0.35).all()
    assert (table.p[table.layer == 2] == 1 / 21).all()
    assert (table.p[table.layer == 0] > 0.1).all()
    assert table.bag_of_tokens.between(0.4, 0.6).all()
    assert (table.majority == 0.5).all()
    assert (table.n == 400).all()
    assert (table.n_groups == 100).all()
    assert (table.low <= table.score).all()
    assert (table.score <= table.high).all()


def test_targets_carry_their_controls(swept: Scores) -> None:
    best = swept.top(1)
    assert isinstance(best, Direction)
    assert isinstance(swept.top(2), Subspace)
    (row,) = best.evidence["rows"]
    assert {"control", "selectivity", "p", "majority", "bag_of_tokens", "n_groups", "low", "high"} <= set(row)
    assert best.evidence["settings"]["positive"] == "forget"
    assert best.evidence["twins"]["n"] == 6 * 20


def test_scores_are_those_of_scikit_learn_on_the_same_folds(signal: Any, swept: Scores) -> None:
    cache, _ = signal
    x, y = cache.data[POST.format(1)].astype("f8"), (cache.columns["split"] == "forget").astype(int)
    group = _stats.codes(cache.columns["person"])
    out, fold_areas = np.zeros(400), []
    for train, test in group_folds(group.tolist(), 5, 0, y.tolist()):
        scaler = StandardScaler().fit(x[train])
        peer = LogisticRegression(C=1.0, class_weight="balanced", tol=1e-10, max_iter=1000)
        out[test] = peer.fit(scaler.transform(x[train]), y[train]).decision_function(scaler.transform(x[test]))
        pairs = y[test].sum() * (1 - y[test]).sum()
        fold_areas.append((roc_auc_score(y[test], out[test]), pairs))
    row = swept.table[(swept.table.layer == 1) & (swept.table.method == "logistic")].iloc[0]
    assert row.score == pytest.approx(balanced_accuracy_score(y, out > 0))
    assert row.auc == pytest.approx(sum(a * n for a, n in fold_areas) / sum(n for _, n in fold_areas))
    assert row.accuracy == pytest.approx(((out > 0) == y).mean())


def test_same_seed_same_table(signal: Any, swept: Scores) -> None:
    again = sweep(signal[0], "split", "person", positive="forget", progress=False)
    assert again.table.equals(swept.table)


def test_intervals_cover_chance_and_p_values_hold_without_signal() -> None:
    """200 data sets without signal, rows dependent within groups: the 95 % interval covers 0.5 in 90-98.5 %."""
    covered, area_covered, small = [], [], []
    group, _ = grouped(40, 3)
    for seed in range(200):
        rng = np.random.default_rng(seed)
        _, y = grouped(40, 3, seed)
        x = torch.tensor(rng.normal(size=(120, 12)) + rng.normal(size=(40, 12))[group])
        rows = _rows.select(MemoryCache({"s": x.numpy()}), y, group)
        found = _probe("s", x, MeanDifference(), _design(rows, 5, seed, 300, 20))
        covered.append(found.record["low"] <= 0.5 <= found.record["high"])
        area_covered.append(found.record["auc_low"] <= 0.5 <= found.record["auc_high"])
        small.append(_stats.corrected_p(np.array([found.record["score"]]), found.control[None])[0] <= 0.1)
    assert 0.90 <= np.mean(covered) <= 0.985
    assert 0.90 <= np.mean(area_covered) <= 0.985
    assert np.mean(small) <= 0.15


def test_a_split_by_groups_exposes_what_a_naive_split_memorises() -> None:
    """Rows show who they are about and nothing about the label, which belongs to the person."""
    rng = np.random.default_rng(0)
    group, y = grouped(40, 8)
    x = (4 * rng.normal(size=(40, 64))[group] + rng.normal(size=(320, 64))).astype("f4")
    cache = MemoryCache({POST.format(0): x}, {"y": y.astype(object), "person": group.astype(object)})
    with_groups = sweep(cache, "y", "person", progress=False)
    without = sweep(cache, "y", progress=False)
    assert with_groups.table.score.max() < 0.7
    assert (with_groups.table.low < 0.5).all()
    assert (with_groups.table.memorised > 0.85).any()
    assert without.best.score > 0.9
    assert any("no group" in warning for warning in without.warnings)


def test_bag_of_tokens_baseline_sees_labels_that_are_in_the_words() -> None:
    rng = np.random.default_rng(0)
    group, y = grouped(60, 2)
    x = rng.normal(size=(120, 8)).astype("f4") + 3 * y[:, None].astype("f4")
    ids = [[int(100 + label), *map(int, rng.integers(0, 20, 4))] for label in y]
    cache = MemoryCache({POST.format(0): x}, {"y": y.astype(object), "g": group.astype(object)}, ids, np.arange(120))
    found = sweep(cache, "y", "g", progress=False)
    assert found.table.bag_of_tokens[0] == 1.0
    assert any("bag of tokens" in warning for warning in found.warnings)
    assert "bag of tokens" in repr(found)


def test_controls_are_shown_and_saved_with_the_scores(swept: Scores, tmp_path: Path) -> None:
    for shown in (repr(swept), swept._repr_html_()):
        assert all(word in shown for word in ("control", "selectivity", "majority", "bag_of_tokens", "random twins"))
    again = Scores.load(swept.save(tmp_path / "scores"))
    assert again.table.score.tolist() == swept.table.score.tolist()
    assert torch.equal(again.top(1).vector, swept.top(1).vector)
    shuffled = again.controls["shuffled"]
    assert len(shuffled) == 6 * 20
    mean = shuffled[(shuffled.layer == 2) & (shuffled.method == "logistic")].score.mean()
    row = swept.table[(swept.table.layer == 2) & (swept.table.method == "logistic")].iloc[0]
    assert mean == pytest.approx(row.control)


def test_plot_draws_the_table(swept: Scores) -> None:
    figure = swept.plot()
    assert len(figure.data) >= 2


def test_rows_last_mean_and_all() -> None:
    rng = np.random.default_rng(0)
    sequence = np.repeat(np.arange(30), rng.integers(1, 5, size=30))
    x = rng.normal(size=(len(sequence), 3, 2)).astype("f4")
    cache = MemoryCache({"blocks.0.attn.hook_z": x}, sequence=sequence)
    y = np.arange(30) % 2
    for mode, expected in {
        "last": np.stack([x[sequence == s][-1] for s in range(30)]),
        "mean": np.stack([x[sequence == s].mean(0) for s in range(30)]),
        "all": x,
    }.items():
        rows = _rows.select(cache, y, rows=mode)  # type: ignore[arg-type]
        found = rows.read(cache, "blocks.0.attn.hook_z")
        np.testing.assert_allclose(found, expected.reshape(len(expected), 6), rtol=1e-6)
        assert rows.y.tolist() == (y[sequence] if mode == "all" else y).tolist()
        assert rows.n_groups == 30


def test_reading_in_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    sequence = np.repeat(np.arange(20), 5)
    cache = MemoryCache({"s": rng.normal(size=(100, 4)).astype("f4")}, sequence=sequence)
    for mode in ("last", "mean", "all"):
        rows = _rows.select(cache, np.arange(20) % 2, rows=mode)  # type: ignore[arg-type]
        whole = rows.read(cache, "s")
        with monkeypatch.context() as patch:
            patch.setattr(_rows, "_BLOCK", 7)
            torch.testing.assert_close(rows.read(cache, "s"), whole)


def test_some_sequences_are_as_a_cache_of_those() -> None:
    rng = np.random.default_rng(0)
    sequence = np.repeat(np.arange(60), rng.integers(1, 4, size=60))
    x = (rng.normal(size=(len(sequence), 4)) + sequence[:, None] % 2).astype("f4")
    y = np.array([s % 2 if s < 40 else np.nan for s in range(60)])  # what is left out needs no label
    group = np.arange(60) // 4
    mask = np.arange(60) < 40
    kept = mask[sequence]
    cache, alone = MemoryCache({"s": x}, sequence=sequence), MemoryCache({"s": x[kept]}, sequence=sequence[kept])
    for mode in ("last", "mean", "all"):
        part = _rows.select(cache, y, group, None, mode, mask)  # type: ignore[arg-type]
        whole = _rows.select(alone, y[:40], group[:40], None, mode)  # type: ignore[arg-type]
        np.testing.assert_array_equal(part.y, whole.y)
        np.testing.assert_array_equal(part.groups, whole.groups)
        torch.testing.assert_close(part.read(cache, "s"), whole.read(alone, "s"))
    by_number = _rows.select(cache, y, sequences=[3, 8, 1])
    assert by_number.sequence.tolist() == [1, 3, 8]
    for bad in ([60], [-1], np.ones(59, bool), [0.5], []):
        with pytest.raises(DataError, match="mask over the 60"):
            _rows.select(cache, y, sequences=bad)


def test_labels_per_stored_row() -> None:
    rng = np.random.default_rng(0)
    sequence = np.repeat(np.arange(40), 6)
    y = rng.integers(0, 2, size=240)
    x = (rng.normal(size=(240, 4)) + 3 * y[:, None]).astype("f4")
    cache = MemoryCache(
        {POST.format(0): x}, sequence=sequence, input_ids=[[int(v) for v in y[sequence == s]] for s in range(40)]
    )
    found = sweep(cache, y, rows="all", progress=False)
    assert found.best.score > 0.95
    assert found.table.n[0] == 240
    assert found.table.n_groups[0] == 40  # rows of a sequence stay together
    assert found.table.bag_of_tokens[0] == 1.0  # the row's own token


def test_one_against_the_rest_and_names_of_classes() -> None:
    y, positive, negative = _rows.binary(["a", "b", "c", "a"], "a")
    assert (y.tolist(), positive, negative) == ([1, 0, 0, 1], "a", "not a")
    assert _rows.binary([True, False])[1] == "True"
    assert _rows.binary([0.0, 1.0])[1] == "1"
    assert _rows.binary(np.array([0, 1]), 0)[0].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("label", "group", "message"),
    [
        (np.zeros(40), None, "two classes"),
        (np.r_[np.nan, np.arange(39) % 2], None, "NaN"),
        (["a"] * 20 + [None] * 20, None, "NaN or empty"),
        (np.arange(40) % 3, None, "positive="),
        (np.arange(39) % 2, None, "40"),
        ("labl", None, "label"),
        ("label", "persn", "person"),
        ("label", np.zeros(40), "at least two groups"),
        ("label", "label", "at least two groups"),
    ],
)
def test_unusable_labels_and_groups(label: Any, group: Any, message: str) -> None:
    x = np.random.default_rng(0).normal(size=(40, 4)).astype("f4")
    cache = MemoryCache({"s": x}, {"label": np.arange(40) % 2, "person": np.arange(40) // 2})
    with pytest.raises(LabelError, match=message):
        sweep(cache, label, group, progress=False)


def test_other_bad_input() -> None:
    x = np.random.default_rng(0).normal(size=(40, 4)).astype("f4")
    y = np.arange(40) % 2
    cache = MemoryCache({POST.format(0): x}, {"label": y})
    with pytest.raises(LabelError, match="does not occur"):
        sweep(cache, "label", positive=2, progress=False)
    with pytest.raises(SiteError, match="resid_post"):
        sweep(cache, "label", sites="blocks.0.hook_resid_psot", progress=False)
    with pytest.raises(DataError, match="mean_diff"):
        sweep(cache, "label", methods=["svm"], progress=False)
    with pytest.raises(DataError, match="folds"):
        sweep(cache, "label", folds=1, progress=False)
    with pytest.raises(DataError, match="rows must be"):
        sweep(cache, "label", rows="first", progress=False)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="l2 > 0"):
        sweep(cache, "label", l2=0.0, progress=False)
    broken = x.copy()
    broken[3, 1] = np.inf
    with pytest.raises(DataError, match="finite"):
        sweep(MemoryCache({POST.format(0): broken}, {"label": y}), "label", progress=False)


def test_statistical_trouble_is_a_warning_in_the_result() -> None:
    rng = np.random.default_rng(0)
    group, y = grouped(8, 3)
    cache = MemoryCache({POST.format(0): rng.normal(size=(24, 64)).astype("f4")})
    found = sweep(cache, y, group, folds=5, progress=False)
    text = " ".join(found.warnings)
    assert all(part in text for part in ("4 groups", "dimensions (64)", "4 folds instead of 5"))
    assert all(warning in repr(found) for warning in found.warnings)
    assert all(warning in found.top(1).evidence["settings"]["warnings"] for warning in found.warnings)


def test_real_cache_gives_what_arrays_give(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    group, y = grouped(40, 3)
    x = (rng.normal(size=(120, 8)) + 2 * np.outer(y, rng.normal(size=8))).astype("f4")
    columns = {"kind": ["forget" if v else "retain" for v in y], "person": [f"p{g}" for g in group]}
    cache, model = planted_cache(tmp_path / "cache", x, columns)
    memory = MemoryCache({SITE: x}, columns)
    real = sweep(cache, "kind", "person", positive="forget", model=model, progress=False)
    fake = sweep(memory, "kind", "person", positive="forget", progress=False)
    assert real.table.equals(fake.table)
    assert real.model_hash == cache.model.weights_hash
    assert real.top(1).model_hash == real.model_hash
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(CacheMismatchError, match="Capture again"):
        sweep(cache, "kind", "person", positive="forget", model=model, progress=False)
    with pytest.raises(CacheMismatchError, match="Capture again"):
        subspace(cache, SITE, "kind", "forget", "person", k=2, model=model)


def test_shuffled_labels_leave_both_classes_in_every_training_fold() -> None:
    cache = MemoryCache({"s": np.zeros((4, 2), "f4")})
    rows = _rows.select(cache, [0, 1, 0, 1])
    folds = group_folds(rows.groups.tolist(), 2, 0, rows.y.tolist())
    drawn = controls.shuffled_labels(rows, folds, 5, 0)
    assert all(0 < drawn[train].mean() < 1 for train, _ in folds)


# the contrast subspace


def contrast_world(seed: int = 0) -> tuple[MemoryCache, np.ndarray]:
    """Persons of the forget set differ inside a planted plane; retain rows vary elsewhere."""
    rng = np.random.default_rng(seed)
    plane = np.linalg.qr(rng.normal(size=(16, 2)))[0]
    person = np.repeat(np.arange(60), 5)
    forget = person < 30
    x = rng.normal(size=(300, 16)) * np.linspace(0.5, 2, 16)
    x -= x @ plane @ plane.T * 0.7
    x += forget[:, None] * (3 * rng.normal(size=(60, 2))[person] @ plane.T)
    columns = {"split": np.where(forget, "forget", "retain").astype(object), "person": person.astype(object)}
    return MemoryCache({POST.format(1): x.astype("f4")}, columns), plane


def test_subspace_spans_the_generalised_eigenvectors_of_scipy() -> None:
    cache, _ = contrast_world()
    found = subspace(cache, POST.format(1), "split", "forget", "person", k=3, shrinkage=0.2)
    x = cache.data[POST.format(1)].astype("f8")
    forget = cache.columns["split"] == "forget"
    person = cache.columns["person"][forget]
    means = np.stack([x[forget][person == p].mean(0) for p in range(30)]) - x[forget].mean(0)
    scatter = means.T @ means / 30
    covariance = np.cov(x[~forget].T, bias=True)
    covariance = 0.8 * covariance + 0.2 * np.trace(covariance) / 16 * np.eye(16)
    values, vectors = scipy.linalg.eigh(scatter, covariance)
    expected = scipy.linalg.orth(vectors[:, -3:])
    assert scipy.linalg.subspace_angles(found.basis.double().numpy(), expected).max() < 1e-5
    np.testing.assert_allclose(found.evidence["eigenvalues"], values[::-1][:3], rtol=1e-6)
    first = vectors[:, -1] / np.linalg.norm(vectors[:, -1])
    assert abs(found.basis[:, 0].double().numpy() @ first) == pytest.approx(1, abs=1e-6)


def test_planted_plane_is_found_and_beats_random_subspaces_on_groups_left_out() -> None:
    cache, plane = contrast_world()
    found = subspace(cache, POST.format(1), "split", "forget", "person", k=2)
    assert np.rad2deg(scipy.linalg.subspace_angles(found.basis.double().numpy(), plane)).max() < 25
    evidence = found.evidence
    assert evidence["captured_left_out"]["positive_scatter"] > 2 * evidence["random"]["positive_scatter"]["high"]
    assert evidence["captured"]["negative_variance"] < evidence["random"]["negative_variance"]["mean"]
    assert evidence["n"] == {"positive": 150, "negative": 150, "groups": 30}
    assert 0 < evidence["captured_left_out"]["positive_scatter"] <= 1


def test_subspace_without_group_structure_does_not_generalise() -> None:
    """Persons that differ in nothing: the fitted share is high, the share on persons left out is that of chance."""
    rng = np.random.default_rng(0)
    person = np.repeat(np.arange(40), 5)
    columns = {"split": np.where(person < 20, "forget", "retain").astype(object), "person": person.astype(object)}
    cache = MemoryCache({POST.format(0): rng.normal(size=(200, 16)).astype("f4")}, columns)
    evidence = subspace(cache, POST.format(0), "split", "forget", "person", k=4).evidence
    assert evidence["captured"]["positive_scatter"] > evidence["random"]["positive_scatter"]["high"]
    assert evidence["captured_left_out"]["positive_scatter"] < evidence["random"]["positive_scatter"]["high"] + 0.05


def test_between_group_scatter_is_what_within_scatter_leaves() -> None:
    rng = np.random.default_rng(0)
    x, group = rng.normal(size=(50, 4)), rng.integers(0, 6, size=50)
    within = sum((own - own.mean(0)).T @ (own - own.mean(0)) for own in (x[group == g] for g in range(6))) / 50
    np.testing.assert_allclose(_subspace.between_groups(x, group) + within, np.cov(x.T, bias=True), atol=1e-12)


def test_subspace_refuses_what_cannot_be() -> None:
    cache, _ = contrast_world()
    site = POST.format(1)
    with pytest.raises(LabelError, match="needs group="):
        subspace(cache, site, "split", "forget")
    wide = MemoryCache({site: np.random.default_rng(0).normal(size=(300, 64)).astype("f4")}, cache.columns)
    with pytest.raises(LabelError, match="30 groups"):
        subspace(wide, site, "split", "forget", "person", k=40)
    with pytest.raises(DataError, match="between 1 and 15"):
        subspace(cache, site, "split", "forget", "person", k=16)
    with pytest.raises(DataError, match="shrinkage"):
        subspace(cache, site, "split", "forget", "person", k=2, shrinkage=0.0)
    with pytest.raises(SiteError, match="nearest"):
        subspace(cache, "blocks.7.hook_resid_post", "split", "forget", "person", k=2)
    flat = MemoryCache({site: np.ones((300, 16), "f4")}, cache.columns)
    with pytest.raises(DataError, match="do not vary"):
        subspace(flat, site, "split", "forget", "person", k=2)


def test_a_model_that_knows_little_does_not_look_as_if_it_knew(shared_data: Path, tmp_path: Path) -> None:
    """Toxicity in the states of a TinyStories model of 656k parameters: read off the words, and the result says so."""
    import csv

    import activations_cache as ac
    import probe

    with (shared_data / "paradetox" / "paradetox.tsv").open(encoding="utf-8") as file:
        pairs = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[:250]
    sides = {"toxic": "toxic", "neutral1": "neutral"}
    texts = [(pair[key].lower(), label, i) for i, pair in enumerate(pairs) for key, label in sides.items()]
    rows = [{"text": text, "label": label, "pair": f"pair {i}"} for text, label, i in texts]
    model = probe.load(shared_data / "tinystories-656k")
    cache = ac.capture(model, rows, "blocks.*.hook_resid_post", tmp_path / "cache", max_length=64, progress=False)
    found = sweep(cache, "label", "pair", positive="toxic", model=model, progress=False)
    assert found.best.low > 0.5  # something is there to be read
    assert found.best.p <= 0.05
    assert found.table.control.between(0.42, 0.58).all()
    assert found.best.bag_of_tokens > found.best.low  # but not more than in the words
    assert any("bag of tokens" in warning for warning in found.warnings)
