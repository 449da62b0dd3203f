"""Several organisms, one edit: intervals in which the organism's seed is the unit, and equivalence to gold."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from probe.audit._card import ReportCard
from probe.audit._labels import metric_label, number, set_label
from probe.errors import AuditError

_MODELS = ("original", "edited", "gold", "change")
_MIN_SEEDS = 3


@dataclass(frozen=True, eq=False, repr=False)
class Across:
    """Cards of the same edit on organisms of several seeds. Made by `across`.

    Attributes:
        table: A row per set, metric and model (`original`, `edited`, `gold`, `change`): the mean over seeds, its 95 %
            interval, the number of seeds.
        equivalence: A row per set and metric in which the original differs from the golds (by three of their standard
            deviations, on every seed): the mean over seeds of edited minus gold as a share of
            original minus gold, its 90 % interval (two one-sided tests at 5 %), the margin, the p-value, and whether
            it is equivalent to gold.
        verdicts: The label of each card.
    """

    table: pd.DataFrame
    equivalence: pd.DataFrame
    verdicts: tuple[str | None, ...]

    def to_df(self) -> pd.DataFrame:
        """The table (a copy)."""
        return self.table.copy()

    def wide(self) -> pd.DataFrame:
        """For reading: a row per set and metric, a formatted column per model with its interval over seeds."""
        rows = []
        for key, part in self.table.groupby(["set", "metric"], sort=False):
            name, metric = (str(one) for one in key)
            cells = {str(r["model"]): _cell(r, metric) for r in part.to_dict("records")}
            shown = {model: cells.get(model, "–") for model in _MODELS}
            rows.append(
                {"set": set_label(name), "metric": metric_label(metric), **shown, "seeds": int(part["n_seeds"].max())}
            )
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        counts = ", ".join(
            f"{label or 'no verdict'}: {self.verdicts.count(label)}" for label in dict.fromkeys(self.verdicts)
        )
        return f"Across({len(self.verdicts)} seeds; {counts})\n{self.wide().to_string(index=False)}"

    def _repr_html_(self) -> str:
        first = html.escape(repr(self).splitlines()[0])
        shown: str = self.wide().to_html(index=False, border=0)
        return f"<p>{first}</p>{shown}"


def across(cards: Sequence[ReportCard], *, n_boot: int = 1000, seed: int = 0, margin: float = 0.1) -> Across:
    """Put the cards of several organisms together: the organism's seed is the statistical unit.

    Intervals are percentile bootstraps in two stages: seeds are drawn with replacement, and within each drawn seed its
    groups (hierarchical bootstrap; Davison and Hinkley 1997, ch. 3.8). Numbers that are no means over groups (an AUC, a
    worst case) are drawn by seed alone. "As good as gold" is an equivalence test, not a missing difference: the shares
    (edited - gold) / (original - gold) of the seeds must lie within ± `margin` by two one-sided t-tests (Schuirmann
    1987).

    Args:
        cards: One card a seed, of the same parts. At least three: fewer have no interval worth the name.
        n_boot: Bootstrap replicates.
        seed: Of the bootstrap.
        margin: Of equivalence, as a share of the distance from gold to the original.

    Raises:
        AuditError: Fewer than three cards, or two of the same original.
    """
    if len(cards) < _MIN_SEEDS:
        raise AuditError(f"intervals over seeds need at least {_MIN_SEEDS} cards; received {len(cards)}")
    hashes = [card.settings.get("model_hash") for card in cards]
    if len(set(hashes)) < len(hashes):
        raise AuditError("every card must be of an organism of its own; two cards have the same original")
    keys = list(dict.fromkeys((r["set"], r["metric"]) for card in cards for r in card.table.to_dict("records")))
    draws = _Draws(cards, n_boot, seed)
    rows = [row for key in keys for model in _MODELS if (row := draws.row(*key, model)) is not None]
    equal = [row for key in keys if (row := _equivalent(cards, *key, margin)) is not None]
    labels = tuple(card.verdict.label if card.verdict is not None else None for card in cards)
    return Across(pd.DataFrame(rows), pd.DataFrame(equal), labels)


class _Draws:
    """Replicates of every number: which seeds, and which groups within them."""

    def __init__(self, cards: Sequence[ReportCard], n_boot: int, seed: int) -> None:
        self.cards, self.n_boot, self.seed = cards, n_boot, seed
        rng = np.random.default_rng(seed)
        self.seeds = rng.integers(len(cards), size=(n_boot, len(cards)))  # [boot, drawn]
        self.values = [_values(card) for card in cards]
        self.groups = [_groups(card) for card in cards]
        self._kept: tuple[tuple[int, int], np.ndarray] = ((-1, -1), np.zeros(0))

    def row(self, name: str, metric: str, model: str) -> dict[str, object] | None:
        """The mean over seeds with its interval; None where a card lacks it."""
        values = [own.get((name, metric, model)) for own in self.values]
        if any(value is None for value in values):
            return None
        plain = np.array(values, dtype=float)
        drawn = np.stack(
            [self._one(i, name, metric, model, plain[i]) for i in range(len(plain))]
        )  # [card, boot, place]
        boot, place = np.indices(self.seeds.shape)
        means = drawn[self.seeds, boot, place].mean(1)  # [boot]; a card drawn twice has groups of its own each time
        low, high = np.quantile(means, [0.025, 0.975])
        own = {"value": float(plain.mean()), "low": float(low), "high": float(high), "n_seeds": len(plain)}
        return {"set": name, "metric": metric, "model": model, **own, "sd_seeds": float(plain.std(ddof=1))}

    def _one(self, i: int, name: str, metric: str, model: str, value: float) -> Float[np.ndarray, "boot place"]:
        """One card's replicates: its groups resampled, alike for all models; constant where it has none."""
        wanted = ["edited", "original"] if model == "change" else [model]
        if model == "gold":
            wanted = [m for s, k, m in self.groups[i] if (s, k) == (name, metric) and m.startswith("gold ")]
        sums = [self.groups[i][(name, metric, m)] for m in wanted if (name, metric, m) in self.groups[i]]
        if not sums or len(sums) < len(wanted):
            return np.full(self.seeds.shape, value)
        weights = self._weights(i, len(sums[0][0]))  # [boot, place, group]
        found = np.stack([(weights @ top) / (weights @ bottom) for top, bottom in sums])
        drawn: np.ndarray = found[0] - found[1] if model == "change" else found.mean(0)
        return drawn

    def _weights(self, i: int, n: int) -> Float[np.ndarray, "boot place group"]:
        """How often each replicate draws each of a card's n groups; the last is kept, as models share it."""
        if self._kept[0] != (i, n):
            rng = np.random.default_rng([self.seed, i, n])
            drawn = rng.multinomial(n, np.full(n, 1 / n), size=self.seeds.shape).astype(float)
            self._kept = ((i, n), drawn)
        return self._kept[1]


def _values(card: ReportCard) -> dict[tuple[str, str, str], float]:
    return {(r["set"], r["metric"], r["model"]): float(r["value"]) for r in card.table.to_dict("records")}


def _groups(card: ReportCard) -> dict[tuple[str, str, str], tuple[np.ndarray, np.ndarray]]:
    if card.groups.empty:
        return {}
    parts = card.groups.groupby(["set", "metric", "model"], sort=False)
    return {tuple(map(str, key)): (p["top"].to_numpy(float), p["bottom"].to_numpy(float)) for key, p in parts}  # type: ignore[misc]


def _equivalent(cards: Sequence[ReportCard], name: str, metric: str, margin: float) -> dict[str, object] | None:
    """Two one-sided t-tests over seeds on the share of the way from gold to the original."""
    shares = []
    for values in map(_values, cards):
        own = [values.get((name, metric, model)) for model in ("original", "edited", "gold")]
        if None in own or not _tells(values, name, metric):
            return None
        shares.append((own[1] - own[2]) / (own[0] - own[2]))  # type: ignore[operator]
    found = np.array(shares)
    n, mean = len(found), float(found.mean())
    error = max(float(found.std(ddof=1)) / np.sqrt(n), 1e-12)
    p = max(stats.t.sf((mean + margin) / error, n - 1), stats.t.sf((margin - mean) / error, n - 1))
    half = stats.t.ppf(0.95, n - 1) * error
    numbers = {"share": mean, "low": mean - half, "high": mean + half, "margin": margin, "p": float(p), "n_seeds": n}
    return {"set": name, "metric": metric, **numbers, "equivalent": bool(p < 0.05)}


def _tells(values: Mapping[tuple[str, str, str], float], name: str, metric: str) -> bool:
    """Whether the original lies outside what golds do by three of their standard deviations: else there is no scale."""
    golds = [value for (s, m, model), value in values.items() if (s, m) == (name, metric) and model.startswith("gold ")]
    if not golds:
        return False
    spread = float(np.std(golds, ddof=1)) if len(golds) > 1 else 0.0
    return abs(values[name, metric, "original"] - float(np.mean(golds))) > max(3 * spread, 1e-6)


def _cell(row: dict[object, object], metric: str) -> str:
    signed = row["model"] == "change"
    value, low, high = (number(float(row[k]), metric, signed) for k in ("value", "low", "high"))  # type: ignore[arg-type]
    return f"{value} [{low.split()[0]}, {high.split()[0]}]"
