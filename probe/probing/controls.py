"""What a probe is held against: permuted labels, the majority class, a bag of tokens, and a split that ignores groups.

How to read them: `control` is what the same probe reaches on labels that mean nothing (same rows, same folds, labels
permuted between groups); `bag_of_tokens` is what the words alone give without the model; `memorised` is what
meaningless labels reach when rows of a group may be on both sides of a split - the part of any result without
group-wise splits that says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from probe import _stats
from probe._rows import Rows
from probe.errors import LabelError
from probe.probing.probes import Fitter

Folds = Sequence[tuple[ndarray, ndarray]]


def out_of_fold(
    fitter: Fitter, x: Float[Tensor, "n d"], y: Int[Tensor, "n label"], folds: Folds
) -> Float[ndarray, "n label"]:
    """Scores of each row by a probe that was fitted on the other folds, for every labelling."""
    scores = torch.zeros(y.shape, dtype=torch.float64, device=x.device)
    for train, test in folds:
        train_index, test_index = torch.as_tensor(train, device=x.device), torch.as_tensor(test, device=x.device)
        scores[test_index] = fitter.fit(x[train_index], y[train_index]).scores(x[test_index])
    return scores.cpu().numpy()


def fold_of(folds: Folds, n: int) -> Int[ndarray, " n"]:
    """The test fold of each row."""
    number = np.zeros(n, dtype=np.int64)
    for i, (_, test) in enumerate(folds):
        number[test] = i
    return number


def shuffled_labels(rows: Rows, folds: Folds, n: int, seed: int) -> Int[ndarray, "n label"]:
    """Labels permuted between groups (see `probe._stats.permuted_labels`), both classes present in every training set.

    Raises:
        LabelError: groups so few that hardly any permutation leaves both classes in every training set.
    """
    rng = np.random.default_rng([seed, 1])
    kept: list[ndarray] = []
    for _ in range(100):
        drawn = _stats.permuted_labels(rows.y, rows.groups, n, rng)
        usable = np.all([(drawn[train].mean(0) > 0) & (drawn[train].mean(0) < 1) for train, _ in folds], axis=0)
        kept += list(drawn[:, usable].T)
        if len(kept) >= n:
            return np.stack(kept[:n], axis=1)
    raise LabelError(
        f"{rows.n_groups} groups are too few for a shuffled-label control: permuted labels leave some training "
        "fold with one class. Give more groups, or finer ones."
    )


def memorised(fitter: Fitter, x: Float[Tensor, "n d"], y: Int[ndarray, "n label"], n_folds: int, seed: int) -> float:
    """Balanced accuracy on meaningless labels when folds ignore the groups; the mean over the labellings given."""
    order = np.random.default_rng([seed, 2]).permutation(len(y))
    parts = np.array_split(order, n_folds)
    folds = [(np.setdiff1d(order, part), part) for part in parts]
    usable = np.all([(y[train].mean(0) > 0) & (y[train].mean(0) < 1) for train, _ in folds], axis=0)
    if not usable.any():
        return float("nan")
    y = y[:, usable]
    scores = out_of_fold(fitter, x, torch.as_tensor(y, device=x.device), folds)
    return float(_stats.balanced_accuracy((scores > 0) == y, y).mean())


def majority(y: Int[ndarray, " n"], folds: Folds) -> tuple[float, float]:
    """Balanced accuracy and accuracy of always saying the commoner class of the training folds."""
    said = np.zeros_like(y)
    for train, test in folds:
        said[test] = int(y[train].mean() > 0.5)
    hit = said == y
    return float(_stats.balanced_accuracy(hit[:, None], y[:, None])[0]), float(hit.mean())


def bag_of_tokens(cache: Any, rows: Rows, folds: Folds, l2: float = 1.0) -> Float[ndarray, " n"]:
    """Out-of-fold scores of a logistic regression on token counts, on the same rows and folds.

    The counts are those of the row's whole sequence; where labels are per stored row, the row's own token alone.
    """
    from sklearn.linear_model import LogisticRegression

    counts = _counts(cache, rows)
    scores = np.zeros(len(rows))
    for train, test in folds:
        fitted = LogisticRegression(C=1 / l2, class_weight="balanced", max_iter=1000).fit(counts[train], rows.y[train])
        scores[test] = fitted.decision_function(counts[test])
    return scores


def _counts(cache: Any, rows: Rows) -> Any:
    """Token counts of each row, [n, tokens that occur], sparse."""
    from scipy.sparse import csr_array

    if rows.per_row:
        tokens, lengths = np.asarray(cache.rows["token"])[rows.stored], np.ones(len(rows), dtype=np.int64)
    else:
        ids = cache.sequences["input_ids"]
        own = [np.asarray(ids[s]) for s in rows.sequence]
        tokens, lengths = np.concatenate(own), np.array([len(t) for t in own])
    row = np.repeat(np.arange(len(rows)), lengths)
    column = _stats.codes(tokens)
    return csr_array((np.ones(len(column)), (row, column)), shape=(len(rows), int(column.max()) + 1))
