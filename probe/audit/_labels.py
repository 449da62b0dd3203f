"""What sets and metrics are called on a card, and how their numbers are written."""

from __future__ import annotations

from functools import cache

import numpy as np

from probe.audit._numbers import Metric
from probe.audit._registry import PARTS, part

SETS = {
    "forget": "forget",
    "unseen": "forget, unseen phrasings",
    "retain": "retain",
    "unseen_retain": "retain, unseen phrasings",
    "given": "forget, fact in context",
    "given_holdout": "holdout, fact in context",
    "deducible": "deducible from retained facts",
}
METRICS = {
    "recall": "recall",
    "probability": "probability",
    "perplexity": "perplexity",
    "kl_original_model": "KL(original‖model), nats",
    "kl_gold_model": "KL(gold‖model), nats",
    "kl_model_gold": "KL(model‖gold), nats",
}
_SHARES = ("recall", "probability")


def set_label(name: str) -> str:
    """What a set is called on the card."""
    return SETS.get(name, name.replace("_", " "))


def metric_label(name: str) -> str:
    """What a metric is called on the card."""
    own = metrics().get(name)
    if name in METRICS or own is None:
        return METRICS.get(name, name.replace("_", " "))
    return f"{own.label}, {own.unit}" if own.unit and not own.share else own.label


def is_share(name: str) -> bool:
    """Whether a metric is a share, shown in per cent."""
    own = metrics().get(name)
    return name in _SHARES or (own is not None and own.share)


@cache
def metrics() -> dict[str, Metric]:
    """Every part's metrics by name."""
    return {metric.name: metric for name in PARTS for metric in part(name).metrics}


def number(value: float, metric: str, signed: bool = False) -> str:
    """A share in per cent, anything else to three digits. A change (`signed`) of a share is in percentage points."""
    if np.isnan(value):
        return "not known"
    sign = "+" if signed and value > 0 else ""
    if is_share(metric):
        return f"{sign}{_plain(100 * value)} {'pts' if signed else '%'}"
    return f"{sign}{_plain(value)}"


def _plain(value: float) -> str:
    """Three significant digits, without exponents or trailing zeros for ordinary sizes; a small number is no zero."""
    if value == 0 or abs(value) < 1e-12:
        return "0"
    if abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) < 1e-4:
        return f"{value:.0e}"
    digits = 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}".rstrip("0").rstrip(".") if abs(value) >= 0.1 else f"{value:.2g}"
