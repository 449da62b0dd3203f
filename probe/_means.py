"""Means over rows with bootstrap intervals over groups: the statistic of patching sweeps and of routing tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from probe._stats import codes, interval

__all__ = ["GroupMeans", "group_draws", "group_means"]


@dataclass(frozen=True)
class GroupMeans:
    """Per cell: the mean, its 95 % interval and the number of rows.

    The interval is NaN where fewer than two groups contribute: one group says nothing about another.
    """

    mean: Float[np.ndarray, " cell"]
    low: Float[np.ndarray, " cell"]
    high: Float[np.ndarray, " cell"]
    n: Int[np.ndarray, " cell"]


def group_means(
    values: Float[np.ndarray, "row cell"],
    groups: Sequence[Any],
    *,
    n_boot: int = 1000,
    seed: int = 0,
    weights: Float[np.ndarray, " row"] | None = None,
) -> GroupMeans:
    """Weighted mean of each column over its rows, with a percentile bootstrap that resamples whole groups.

    Args:
        values: A row per observation; NaN where a row has no value for a cell.
        groups: The group of each row.
        n_boot: Bootstrap replicates; 0 leaves the intervals NaN.
        seed: Seed of the replicates.
        weights: How much each row counts (tokens of a sequence); default 1.
    """
    total, mass = _sums(values, groups, weights)
    there = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total.sum(0) / mass.sum(0)
    low, high = np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    enough = (mass > 0).sum(0) >= 2
    if n_boot > 0 and enough.any():
        draws = _draw(total[:, enough], mass[:, enough], n_boot, np.random.default_rng(seed))
        low[enough], high[enough] = interval(draws)
    return GroupMeans(mean, low, high, there.sum(0))


def group_draws(
    values: Float[np.ndarray, "row cell"],
    groups: Sequence[Any],
    n_boot: int,
    rng: np.random.Generator,
    weights: Float[np.ndarray, " row"] | None = None,
) -> Float[np.ndarray, "boot cell"]:
    """The bootstrap replicates of `group_means`; NaN where a replicate drew no row of a cell."""
    return _draw(*_sums(values, groups, weights), n_boot, rng)


def _sums(
    values: np.ndarray, groups: Sequence[Any], weights: np.ndarray | None
) -> tuple[Float[np.ndarray, "group cell"], Float[np.ndarray, "group cell"]]:
    """Per group the weighted sum of the values and the weight of those that are there."""
    group = codes(np.asarray(groups))
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)
    there = np.where(np.isnan(values), 0.0, weights[:, None])  # [row, cell]
    total, mass = (np.zeros((int(group.max()) + 1, values.shape[1])) for _ in range(2))
    np.add.at(total, group, np.nan_to_num(values) * there)
    np.add.at(mass, group, there)
    return total, mass


def _draw(total: np.ndarray, mass: np.ndarray, n_boot: int, rng: np.random.Generator) -> np.ndarray:
    n_groups = len(total)
    drawn = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=n_boot)  # [boot, group]
    with np.errstate(invalid="ignore", divide="ignore"):
        return (drawn @ total) / (drawn @ mass)
