"""Which of many answers a hidden state holds: a linear readout of several classes, in memory, with its controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probe.errors import DataError, LabelError

ALPHAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class RidgeReadout:
    """A linear readout: state x has scores `x @ weight + bias`, one a class; the highest is what is read.

    Attributes:
        weight: `[d, class]`.
        bias: `[class]`.
        alpha: The penalty, as a share of the states' mean variance a dimension.
    """

    weight: Float[Tensor, "d class"]
    bias: Float[Tensor, " class"]
    alpha: float

    def predict(self, x: Float[Tensor, "n d"], among: Bool[Tensor, "n class"] | None = None) -> Int[Tensor, " n"]:
        """The class that is read from each state; `among` says which classes each may be."""
        scores = x.to(self.weight.dtype) @ self.weight + self.bias  # [n, class]
        if among is not None:
            scores = scores.masked_fill(~among.to(scores.device), -torch.inf)
        return scores.argmax(1)


def ridge_readouts(
    x: Float[Tensor, "n d"],
    y: Int[Tensor, " n"],
    n_classes: int,
    alphas: Sequence[float] = ALPHAS,
    *,
    balanced: bool = True,
) -> list[RidgeReadout]:
    """Fit one ridge regression of the classes' indicators per penalty, from one eigendecomposition.

    Minimises  sum_i s_i |W' x_i + b - onehot(y_i)|^2 + alpha t |W|^2 / d,  b not penalised, where t is the trace of the
    weighted scatter matrix of x: with the penalty relative to the variance the same alphas serve every layer. It is
    scikit-learn's `Ridge(alpha * t / d).fit(x, onehot(y), sample_weight=s)`.

    Args:
        x: States.
        y: Their classes, 0 to n_classes - 1; classes without a row are never read.
        n_classes: Classes.
        alphas: Penalties.
        balanced: Weight rows inversely to their class's frequency (the weights sum to the rows).

    Raises:
        DataError: No positive penalty, no rows, or states that are not finite.
        LabelError: Fewer than two classes have rows.
    """
    if not alphas or min(alphas) <= 0:
        raise DataError(f"a ridge readout needs penalties above 0; received {list(alphas)}")
    if len(x) == 0 or not torch.isfinite(x).all():
        raise DataError("a readout needs states that are finite, at least one; some are not, or there are none")
    counts = torch.bincount(y, minlength=n_classes)  # [class]
    if (counts > 0).sum() < 2:
        raise LabelError("a readout needs rows of at least two classes; all rows are of one")
    x, target = x.double(), torch.nn.functional.one_hot(y, n_classes).double()
    weights = 1 / counts[y].double() if balanced else torch.ones(len(y), dtype=torch.float64)
    weights = (weights * (len(y) / weights.sum()))[:, None]  # [n, 1]
    x_mean, y_mean = (weights * x).mean(0), (weights * target).mean(0)
    rows = (x - x_mean) * weights.sqrt()
    values, vectors = torch.linalg.eigh(rows.T @ rows)  # [d], [d, d]
    moment = vectors.T @ (rows.T @ ((target - y_mean) * weights.sqrt()))  # [d, class]
    scale = values.clamp_min(0).mean().clamp_min(torch.finfo(torch.float64).tiny)
    absent = torch.where(counts > 0, 0.0, -torch.inf).double()  # keeps classes without a row from being read
    found = []
    for alpha in alphas:
        weight = vectors @ (moment / (values.clamp_min(0) + alpha * scale)[:, None])
        found.append(RidgeReadout(weight, y_mean - x_mean @ weight + absent, float(alpha)))
    return found


def control_labels(
    labels: Sequence[Any], units: Sequence[Any], train: Bool[np.ndarray, " n"], seed: int
) -> Int[np.ndarray, " n"]:
    """Labels of a control task (Hewitt and Liang, arXiv 1909.03368): every unit gets a label that means nothing.

    All rows of a unit get the same one, drawn from the labels of the training units of its kind, so classes are as
    frequent as they were.

    Args:
        labels: Per row its class.
        units: Per row (kind, group): what the question asks for, and whom it asks about.
        train: Which rows are for training.
        seed: Of the draws.

    Raises:
        LabelError: A kind without training rows.
    """
    pools: dict[Any, dict[Any, int]] = {}
    for (kind, group), label, own in zip(units, labels, train, strict=True):
        if own:
            pools.setdefault(kind, {}).setdefault(group, int(label))
    rng, drawn = np.random.default_rng([seed, 3]), {}
    for unit in dict.fromkeys(units):
        if unit[0] not in pools:
            raise LabelError(f"a control label for {unit[0]!r} needs training rows of that kind; there are none")
        drawn[unit] = rng.choice(list(pools[unit[0]].values()))
    return np.array([drawn[unit] for unit in units])
