"""Splits in which no group is on two sides."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from probe.errors import DataError, LabelError


def group_folds(
    groups: Sequence[Hashable], n_folds: int = 5, seed: int = 0, labels: Sequence[Any] | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Folds for cross-validation in which no group is on both sides.

    Groups are dealt in random order, largest label minority first, each to the fold that has fewest rows of the group's
    commonest label, so that folds are balanced in size and, as far as groups allow, in labels.

    Args:
        groups: The group of each row.
        n_folds: Number of folds; at most the number of groups (of the rarest label, where `labels` are given).
        seed: Order in which groups are dealt.
        labels: Label of each row, for stratification.

    Returns:
        A pair `(train, test)` of row indices per fold.

    Raises:
        LabelError: fewer than two groups, or fewer than two groups in which some label occurs.
    """
    groups = list(groups)
    labels = [0] * len(groups) if labels is None else list(labels)
    if len(labels) != len(groups):
        raise LabelError(f"labels and groups must have one length; got {len(labels)} and {len(groups)}.")
    rows: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        rows.setdefault(group, []).append(i)
    occurs = set(zip(groups, labels, strict=True))
    per_label = {label: sum(own == label for _, own in occurs) for label in set(labels)}
    fewest = min(per_label.values(), default=0)
    if fewest < 2:
        rare = min(per_label, key=per_label.__getitem__) if per_label else None
        raise LabelError(
            f"Group-wise folds need at least two groups in which each label occurs; label {rare!r} occurs in {fewest}. "
            "Give finer groups, or more data."
        )
    n_folds = min(n_folds, fewest)
    fold_of = _deal(rows, labels, n_folds, np.random.default_rng(seed))
    folds = np.array([fold_of[group] for group in groups])
    return [(np.flatnonzero(folds != f), np.flatnonzero(folds == f)) for f in range(n_folds)]


def _deal(
    rows: Mapping[Hashable, list[int]], labels: Sequence[Any], n_folds: int, rng: np.random.Generator
) -> dict[Hashable, int]:
    """Give each group to a fold: rarest label first, to the fold with fewest rows of that label, then fewest rows."""
    frequency = {label: labels.count(label) for label in set(labels)}
    rarest = {g: min({labels[i] for i in own}, key=lambda lab: (frequency[lab], str(lab))) for g, own in rows.items()}
    order = list(rows)
    order = [order[i] for i in rng.permutation(len(order))]
    order.sort(key=lambda g: (frequency[rarest[g]], -len(rows[g])))
    counts: list[dict[Any, int]] = [{} for _ in range(n_folds)]
    fold_of: dict[Hashable, int] = {}
    for group in order:
        best = min(range(n_folds), key=lambda f: (counts[f].get(rarest[group], 0), sum(counts[f].values())))
        fold_of[group] = best
        for i in rows[group]:
            counts[best][labels[i]] = counts[best].get(labels[i], 0) + 1
    return fold_of


def split_groups(
    groups: Sequence[Hashable], shares: Mapping[str, float] | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """Split rows by group into named parts that share no group.

    Args:
        groups: The group of each row.
        shares: Part to its share of the groups; default half to locate, a quarter to select, a quarter to evaluate.
        seed: Order in which groups are dealt.

    Returns:
        Part to its row indices. Every part gets at least one group.

    Raises:
        DataError: fewer groups than parts, or shares that are not positive.
    """
    shares = shares or {"locate": 0.5, "select": 0.25, "evaluate": 0.25}
    unique = list(dict.fromkeys(groups))
    if any(share <= 0 for share in shares.values()):
        raise DataError(f"Shares of a split must be positive; got {dict(shares)}.")
    if len(unique) < len(shares):
        raise DataError(f"A split into {len(shares)} parts needs at least as many groups; got {len(unique)}.")
    order = [unique[i] for i in np.random.default_rng(seed).permutation(len(unique))]
    total = sum(shares.values())
    spare = len(unique) - len(shares)
    ends = np.round(np.cumsum(list(shares.values())) / total * spare).astype(int) + np.arange(1, len(shares) + 1)
    part_of: dict[Hashable, str] = {}
    for name, start, end in zip(shares, [0, *ends[:-1]], ends, strict=True):
        part_of |= dict.fromkeys(order[start:end], name)
    parts = np.array([part_of[group] for group in groups])
    return {name: np.flatnonzero(parts == name) for name in shares}
