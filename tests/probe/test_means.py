"""probe._means against a plain loop over replicates, and against the interval that theory gives."""

from __future__ import annotations

import numpy as np

from probe._means import group_draws, group_means


def test_means_weights_and_counts_by_hand():
    values = np.array([[1.0, np.nan], [3.0, 4.0], [5.0, 8.0]])
    got = group_means(values, ["a", "a", "b"], weights=np.array([1.0, 1.0, 2.0]), n_boot=10)
    np.testing.assert_allclose(got.mean, [(1 + 3 + 10) / 4, (4 + 16) / 3])
    assert list(got.n) == [3, 2]


def test_replicates_equal_a_loop_over_drawn_groups():
    rng = np.random.default_rng(3)
    values, groups = rng.normal(size=(20, 3)), rng.integers(0, 6, 20)
    values[rng.random(values.shape) < 0.2] = np.nan
    weights = rng.random(20) + 0.5
    draws = group_draws(values, groups, 50, np.random.default_rng(0), weights)
    names = np.unique(groups)
    counts = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), size=50)
    for b, count in enumerate(counts):
        rows = np.concatenate([np.repeat(np.flatnonzero(groups == g), c) for g, c in zip(names, count, strict=True)])
        there = ~np.isnan(values[rows])
        mass = (weights[rows, None] * there).sum(0)
        np.testing.assert_allclose(draws[b], np.nansum(values[rows] * weights[rows, None], axis=0) / mass)


def test_interval_is_that_of_the_group_means():
    """With rows copied within groups the interval must not shrink: it is that of the 40 independent groups."""
    rng = np.random.default_rng(0)
    of_group = rng.normal(size=40)
    values, groups = np.repeat(of_group, 25)[:, None], np.repeat(np.arange(40), 25)
    got = group_means(values, groups, n_boot=4000, seed=1)
    half = 1.96 * of_group.std(ddof=0) / np.sqrt(40)
    np.testing.assert_allclose((got.high - got.low) / 2, half, rtol=0.08)
    assert got.low[0] < got.mean[0] < got.high[0]


def test_one_group_gives_no_interval_for_its_cell_alone():
    values = np.array([[1.0, 1.0], [2.0, np.nan]])
    got = group_means(values, ["a", "b"], n_boot=50)
    assert np.isfinite([got.low[0], got.high[0]]).all()
    assert np.isnan([got.low[1], got.high[1]]).all()
    np.testing.assert_allclose(got.mean, [1.5, 1.0])


def test_a_cell_without_a_row_is_nan():
    got = group_means(np.array([[np.nan], [np.nan]]), ["a", "b"], n_boot=20)
    assert np.isnan(got.mean[0])
    assert got.n[0] == 0
