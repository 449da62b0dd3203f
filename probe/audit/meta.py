"""How far a metric can be trusted: does it tell models that know from models that do not, and does it hold still.

Following the meta-evaluation of OpenUnlearning (arXiv 2506.12618) and of the unlearning-depth score (arXiv 2605.24614).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from probe._stats import auc
from probe.errors import AuditError

__all__ = ["faithfulness", "harmonic_mean", "meta_table", "robustness"]


def faithfulness(
    knows: Sequence[float], does_not: Sequence[float], *, n_boot: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Return the AUC with which a metric tells models that know from models that do not, with a 95 % interval.

    AUC = share of (knows, does not) pairs that the metric orders right, ties counted half. The interval is a percentile
    bootstrap over models, drawn within each pool.

    Args:
        knows: The metric of each model that was trained on the forget set.
        does_not: The metric of each that was not.
        n_boot: Bootstrap replicates.
        seed: Of the bootstrap.

    Raises:
        AuditError: An empty pool, or values that are not finite.
    """
    pools = [np.asarray(values, dtype=float) for values in (knows, does_not)]
    if not all(len(pool) and np.isfinite(pool).all() for pool in pools):
        raise AuditError("both pools need at least one model, and finite values")
    rng = np.random.default_rng(seed)
    drawn = [pool[rng.integers(len(pool), size=(n_boot, len(pool)))] for pool in pools]
    low, high = np.quantile([_auc(a, b) for a, b in zip(*drawn, strict=True)], [0.025, 0.975])
    return _auc(*pools), float(low), float(high)


def _auc(knows: Float[ndarray, " know"], does_not: Float[ndarray, " not"]) -> float:
    labels = np.r_[np.ones(len(knows), dtype=np.int64), np.zeros(len(does_not), dtype=np.int64)]
    return auc(np.r_[knows, does_not], labels)


def robustness(before: Sequence[float], after: Sequence[float]) -> float:
    """Return how little a metric moves when an unlearned model is relearned or quantised, from 0 to 1.

    The mean over models of 1 - |a - b| / (|a| + |b|), a before and b after; 1 where both are zero.

    Raises:
        AuditError: No models, or not as many after as before.
    """
    a, b = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if len(a) == 0 or a.shape != b.shape:
        raise AuditError(f"robustness needs as many values after as before, and one at least; got {len(a)}, {len(b)}")
    total = np.abs(a) + np.abs(b)
    moved = np.divide(np.abs(a - b), total, out=np.zeros_like(total), where=total > 0)
    return float(np.mean(1 - moved))


def harmonic_mean(values: Sequence[float]) -> float:
    """Return the harmonic mean; 0 if a value is 0."""
    found = np.asarray(values, dtype=float)
    return 0.0 if (found <= 0).any() else float(len(found) / (1 / found).sum())


def meta_table(
    knows: Mapping[str, Sequence[float]],
    does_not: Mapping[str, Sequence[float]],
    unlearned: Mapping[str, Sequence[float]],
    relearned: Mapping[str, Sequence[float]],
    quantised: Mapping[str, Sequence[float]],
) -> pd.DataFrame:
    """Return one row a metric: faithfulness with its interval, robustness, and their harmonic mean.

    Args:
        knows: By metric, its value on each model of the pool that knows.
        does_not: On each model of the pool that does not.
        unlearned: On each unlearned model.
        relearned: On the same models after relearning.
        quantised: On the same models after quantisation.
    """
    rows = []
    for name in knows:
        area, low, high = faithfulness(knows[name], does_not[name])
        held = [robustness(unlearned[name], moved[name]) for moved in (relearned, quantised)]
        robust = harmonic_mean(held)
        rows.append(
            {
                "metric": name,
                "faithfulness": area,
                "low": low,
                "high": high,
                "relearning": held[0],
                "quantisation": held[1],
                "robustness": robust,
                "overall": harmonic_mean([area, robust]),
                "knows": float(np.mean(knows[name])),
                "does not": float(np.mean(does_not[name])),
            }
        )
    return pd.DataFrame(rows).sort_values("overall", ascending=False, ignore_index=True)
