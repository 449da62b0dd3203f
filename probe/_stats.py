"""Statistics that more than one locator needs: cluster bootstrap, label permutations, ranks.

Rows that share a group (a person, a template, a sequence) are not independent, so everything here resamples and
permutes groups, never rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

_CHUNK = 4_000_000  # numbers held at once by the vectorised bootstraps


def codes(values: Sequence[Any] | ndarray) -> Int[ndarray, " n"]:
    """Number the distinct values from 0, in sorted order."""
    return np.unique(np.asarray(values), return_inverse=True)[1].reshape(-1)


def resample_groups(
    groups: Int[ndarray, " n"], y: Int[ndarray, " n"], n_boot: int, rng: np.random.Generator
) -> Float[ndarray, "boot group"]:
    """How often each bootstrap replicate draws each group.

    Groups are drawn with replacement within the class that most of their rows have, so that a replicate keeps the
    number of groups per class, and both classes stay present.

    Args:
        groups: group code of each row, 0 .. n_groups - 1.
        y: binary label of each row.
        n_boot: replicates.
        rng: source of randomness.

    Returns:
        Counts, one row per replicate; each row sums to the number of groups.
    """
    n_groups = int(groups.max()) + 1
    share = np.bincount(groups, weights=y, minlength=n_groups) / np.bincount(groups, minlength=n_groups)
    weights = np.zeros((n_boot, n_groups))
    for members in (np.flatnonzero(share >= 0.5), np.flatnonzero(share < 0.5)):
        if len(members):
            weights[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=n_boot)
    return weights


def interval(draws: Float[ndarray, "boot *rest"], level: float = 0.95) -> tuple[Any, Any]:
    """Percentile interval over the first axis; replicates that are NaN (a class was missing) are left out."""
    tail = 50 * (1 - level)
    low, high = np.nanpercentile(draws, [tail, 100 - tail], axis=0)
    return low, high


def balanced_accuracy(hit: Bool[ndarray, "n label"], y: Int[ndarray, "n label"]) -> Float[ndarray, " label"]:
    """Mean of the hit rates of the two classes, for many labellings of the same rows at once."""
    positive = (hit & (y == 1)).sum(0) / np.maximum((y == 1).sum(0), 1)
    negative = (hit & (y == 0)).sum(0) / np.maximum((y == 0).sum(0), 1)
    return (positive + negative) / 2


def balanced_accuracy_bootstrap(
    hit: Bool[ndarray, " n"],
    y: Int[ndarray, " n"],
    groups: Int[ndarray, " n"],
    weights: Float[ndarray, "boot group"],
) -> Float[ndarray, " boot"]:
    """Balanced accuracy of every bootstrap replicate: per group sums once, then one matrix product."""
    n_groups = weights.shape[1]
    sums = [np.bincount(groups, weights=v, minlength=n_groups) for v in (hit * y, y, hit * (1 - y), 1 - y)]
    hit1, n1, hit0, n0 = (weights @ np.stack(sums, axis=1)).T  # each [boot]
    with np.errstate(invalid="ignore", divide="ignore"):
        return (hit1 / n1 + hit0 / n0) / 2


def auc(scores: Float[ndarray, " n"], y: Int[ndarray, " n"], strata: Int[ndarray, " n"] | None = None) -> float:
    """Area under the ROC curve, ties counted half.

    Args:
        scores: higher should mean the positive class.
        y: binary labels.
        strata: only pairs within one stratum are compared. Out-of-fold scores of different folds come from different
            probes with different offsets, so their pairs say nothing.

    Returns:
        Share of the (positive, negative) pairs that are ordered right; NaN if there is no pair.
    """
    ones = np.ones((1, len(y)))
    return float(_weighted_auc(scores, y, ones, strata)[0])


def auc_bootstrap(
    scores: Float[ndarray, " n"],
    y: Int[ndarray, " n"],
    groups: Int[ndarray, " n"],
    weights: Float[ndarray, "boot group"],
    strata: Int[ndarray, " n"] | None = None,
) -> Float[ndarray, " boot"]:
    """`auc` of every bootstrap replicate, in blocks of replicates of bounded memory."""
    step = max(1, _CHUNK // max(len(y), 1))
    blocks = [weights[i : i + step][:, groups] for i in range(0, len(weights), step)]  # each [block, n]
    return np.concatenate([_weighted_auc(scores, y, block, strata) for block in blocks])


def _weighted_auc(
    scores: ndarray, y: ndarray, weights: Float[ndarray, "boot n"], strata: ndarray | None
) -> Float[ndarray, " boot"]:
    strata = np.zeros(len(y), dtype=np.int64) if strata is None else strata
    order = np.lexsort((scores, strata))
    scores, y, strata, weights = scores[order], y[order], strata[order], weights[:, order]
    new_stratum = np.r_[True, strata[1:] != strata[:-1]]
    new_block = new_stratum | np.r_[True, scores[1:] != scores[:-1]]  # a block = tied scores of one stratum
    starts, stratum_starts = np.flatnonzero(new_block), np.flatnonzero(new_stratum)
    positive = np.add.reduceat(weights * y, starts, axis=1)  # [boot, block]
    negative = np.add.reduceat(weights * (1 - y), starts, axis=1)
    before = np.cumsum(negative, axis=1) - negative  # negatives in earlier blocks, of every stratum
    first = np.searchsorted(starts, stratum_starts)  # first block of each stratum
    sizes = np.diff(np.r_[first, len(starts)])
    below = before - np.repeat(before[:, first], sizes, axis=1)  # ... of this stratum
    wins = (positive * (below + negative / 2)).sum(1)
    n_pos, n_neg = (np.add.reduceat(side, first, axis=1) for side in (positive, negative))  # [boot, stratum]
    with np.errstate(invalid="ignore", divide="ignore"):
        return wins / (n_pos * n_neg).sum(1)


def permuted_labels(
    y: Int[ndarray, " n"], groups: Int[ndarray, " n"], n: int, rng: np.random.Generator
) -> Int[ndarray, "n label"]:
    """Labellings under which nothing about the rows predicts the label.

    The rows of one group that share a label are a cell; labels are permuted over cells. Where a group has one label
    this permutes labels over groups, so that the control keeps the dependence of rows within a group. With one row a
    group it is the ordinary row permutation.

    Args:
        y: binary labels.
        groups: group codes.
        n: number of permutations.
        rng: source of randomness.

    Returns:
        One labelling per column.
    """
    cell = codes(groups * 2 + y)
    of_cell = np.zeros(int(cell.max()) + 1, dtype=np.int64)
    of_cell[cell] = y
    return np.stack([rng.permutation(of_cell)[cell] for _ in range(n)], axis=1)


def corrected_p(
    observed: Float[ndarray, " tested"], null: Float[ndarray, "tested control"]
) -> Float[ndarray, " tested"]:
    """P-values corrected for the number of things tried, by the maximum over them in every control.

    Westfall and Young's single-step max statistic: p = (1 + #{controls whose maximum >= observed}) / (1 + controls).
    With c controls no p-value is below 1 / (1 + c).
    """
    largest = np.nanmax(null, axis=0)  # [control]
    return (1 + (largest[None, :] >= observed[:, None]).sum(1)) / (1 + null.shape[1])


def overlap_ratio(
    hit: Bool[ndarray, "n label"],
    y: Int[ndarray, "n label"],
    groups: Int[ndarray, " n"],
    weights: Float[ndarray, "boot group"],
) -> float:
    """By how much the bootstrap of out-of-fold predictions understates the spread of a cross-validated score.

    Training sets of different folds overlap, so the errors of different folds are correlated, which resampling the
    finished predictions cannot see. Labellings without signal show it: their scores are draws of the estimator at
    chance, and their real spread about 0.5 over their bootstrap spread is the ratio (measured 1.3-1.4 for five folds).

    Args:
        hit: whether each row was predicted right, for labellings that mean nothing.
        y: those labellings.
        groups: group codes.
        weights: bootstrap replicates, a hundred are enough.

    Returns:
        The ratio, at least 1.
    """
    spread = np.square(balanced_accuracy(hit, y) - 0.5).mean()
    draws = [balanced_accuracy_bootstrap(hit[:, i], y[:, i], groups, weights) for i in range(y.shape[1])]
    boot = np.mean([np.nanvar(draw) for draw in draws])
    return float(max(1.0, np.sqrt(spread / boot))) if boot > 0 else 1.0


def widened(estimate: float, draws: Float[ndarray, " boot"], ratio: float) -> tuple[float, float]:
    """The percentile interval, stretched about the estimate by `ratio` and cut to [0, 1]."""
    low, high = interval(estimate + ratio * (draws - estimate))
    return float(np.clip(low, 0, 1)), float(np.clip(high, 0, 1))
