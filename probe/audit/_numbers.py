"""Numbers that carry what their intervals need: ratios of sums per group, estimates with their bootstrap draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.special import betaincinv

from probe.errors import AuditError

_ROUNDING = 1e-12  # shares of groups that differ by less are the same


@dataclass(frozen=True)
class Ratio:
    """A number that is a sum over groups divided by a sum over groups, such as a mean over questions.

    Attributes:
        top: Numerator per group.
        bottom: Denominator per group: questions, or tokens.
        function: Applied to the ratio: exp for perplexity; None leaves it.
        share: Whether it is a share of yes or no answers; a bootstrap of shares that are the same in every group has
            no width, which would be read as certainty.
    """

    top: Float[np.ndarray, " group"]
    bottom: Float[np.ndarray, " group"]
    function: Callable[[Any], Any] | None = None
    share: bool = False

    @property
    def plain(self) -> bool:
        """Whether it is the ratio itself."""
        return self.function is None

    @property
    def value(self) -> float:
        """The number."""
        return float(self._of(self.top.sum() / self.bottom.sum()))

    def _of(self, ratio: Any) -> Any:
        return ratio if self.function is None else self.function(ratio)

    @property
    def alike(self) -> bool:
        """Whether this is a share, and the same in every group."""
        return self.share and same(self.top / self.bottom)

    def draws(self, n_boot: int, seed: int) -> Float[np.ndarray, " boot"]:
        """The ratio in every bootstrap replicate: groups drawn with replacement, alike for every model."""
        n = len(self.top)
        weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_boot)  # [boot, group]
        draws: np.ndarray = self._of((weights @ self.top) / (weights @ self.bottom))
        return draws

    def interval(self, n_boot: int, seed: int) -> tuple[float, float]:
        """95 %; NaN with one group, Clopper and Pearson's over groups where a share is the same in each of them."""
        n = len(self.top)
        if n < 2:
            return np.nan, np.nan
        if self.alike:
            return _clopper_pearson(n * self.value, n)
        low, high = np.quantile(self.draws(n_boot, seed), [0.025, 0.975])
        return float(low), float(high)


def same(values: Float[np.ndarray, " group"]) -> bool:
    """Whether all values are the same but for rounding."""
    return bool(np.ptp(values) < _ROUNDING)


def _clopper_pearson(hits: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of `n`; `hits` may be a fraction.

    Quantiles of Beta(hits, n - hits + 1) and Beta(hits + 1, n - hits) (Clopper and Pearson 1934). For groups whose
    shares are alike it is conservative: no distribution on [0, 1] spreads more about its mean than yes and no do.
    """
    low = betaincinv(hits, n - hits + 1, 0.025) if hits > 0 else 0.0
    high = betaincinv(hits + 1, n - hits, 0.975) if hits < n else 1.0
    return float(low), float(high)


def by_group(
    values: Sequence[float] | np.ndarray, groups: Sequence[str], counts: Sequence[float] | None = None, **kind: Any
) -> Ratio:
    """Sum values (and counts, 1 each unless given) over the rows of each group."""
    codes = np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
    weights = np.ones(len(codes)) if counts is None else np.asarray(counts, dtype=float)
    tops = np.bincount(codes, weights=np.asarray(values, dtype=float))
    return Ratio(tops, np.bincount(codes, weights=weights), **kind)


@dataclass(frozen=True)
class Estimate:
    """A number that is no ratio of sums: an AUC, a p-value, a harmonic mean, a maximum over a sweep.

    Attributes:
        value: The number; finite. What cannot be measured is no number: a part says so in `Measurement.missing`.
        n: On how many (questions, samples) it rests.
        n_groups: On how many groups.
        low: Lower end of its 95 % interval; NaN for none.
        high: The upper end.
        how: What the interval is, e.g. `95 %, bootstrap over people`, or `none: ...` and why.
    """

    value: float
    n: int
    n_groups: int
    low: float = float("nan")
    high: float = float("nan")
    how: str = "none"

    def __post_init__(self) -> None:
        if not np.isfinite(self.value):
            raise AuditError(f"a measured number must be finite; received {self.value}")


@dataclass(frozen=True)
class Metric:
    """What a metric is called and how it is shown.

    Attributes:
        name: Its name in the table, in lower_snake_case.
        label: As a reader of the card sees it.
        unit: Unit, or "".
        share: Whether it is a share from 0 to 1, shown in per cent.
        of: What `n` counts, in the plural.
    """

    name: str
    label: str
    unit: str = ""
    share: bool = False
    of: str = "questions"


@dataclass(frozen=True)
class Number:
    """One number of one model: a metric on a set."""

    set: str
    metric: str
    value: Ratio | Estimate
