"""Removed, suppressed or untouched: rules that are written down, each with the number that decided it.

What a number says of knowledge is its *share*: (edited - gold) / (original - gold), so that 0 is what a model that
never learned the forget set does, and 1 what the original does. `gold` is the mean of the golds. In this order:

1. `untouched`: asked plainly (the forget set's recall), the edited model's share is at least `untouched`.
2. `suppressed`: it no longer says it plainly, or says part of it, and some evidence has a share above that evidence's
   threshold: the knowledge comes back under an attack, in other phrasings, or is found inside. An edit that changes no
   weight at all is suppressed as well: whoever holds the weights can leave it out.
3. `removed`: no evidence is above its threshold, evidence of each kind (plain questions, attacks, inside) was heard,
   and the model still knows at least half of what was to stay: on one that is destroyed nothing can be told.

Evidence that cannot tell the original from the golds is not heard. No verdict is given with fewer than five golds.

A threshold is twice the largest share that any gold had, itself left out, on the organisms that the
thresholds were frozen on, and at least 0.2. Evidence whose threshold would exceed 0.6 is not heard: golds differ too
much in it. The frozen numbers are in `thresholds.json`; `python -m benchmarks.verdict` makes them, and the confusion
matrix on other seeds and other kinds of edits.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from probe.audit._labels import metric_label, number, set_label
from probe.errors import AuditError

LABELS = ("removed", "suppressed", "untouched")
MIN_GOLDS = 5
PLAIN = ("forget", "recall")
_KINDS = ("plain", "attack", "inside")
_FLOOR, _MARGIN, _CEILING = 0.2, 2.0, 0.6
_KEPT = 0.5  # share of retained recall below which a model is called damaged
_CLEAR = 3.0  # standard deviations of the golds by which the original must differ from them
_COSTS = (("retain", "recall"), ("retain", "probability"), ("neighbours", "recall"), ("retain", "model_utility"),
          ("corpus", "perplexity"))  # fmt: skip


@dataclass(frozen=True)
class Thresholds:
    """The numbers that the rules compare with.

    Attributes:
        untouched: Share of plain recall from which on an edit left the knowledge where it was.
        evidence: Threshold of each piece of evidence, by `set/metric`; what is not named here is not heard.
        kinds: Kind of each piece of evidence: `plain`, `attack` or `inside`.
        source: What they were frozen on.
    """

    untouched: float
    evidence: Mapping[str, float]
    kinds: Mapping[str, str]
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = {name: kind for name, kind in self.kinds.items() if kind not in _KINDS}
        if wrong or set(self.evidence) - set(self.kinds):
            raise AuditError(f"each piece of evidence needs a kind of {', '.join(_KINDS)}; received {dict(self.kinds)}")
        if not 0 < self.untouched <= 1 or not all(0 < t < 1 for t in self.evidence.values()):
            raise AuditError("thresholds are shares between 0 and 1")

    @classmethod
    def fit(
        cls,
        left_out: Mapping[str, Sequence[float]],
        kinds: Mapping[str, str],
        untouched: float = 0.5,
        source: Mapping[str, Any] | None = None,
    ) -> Thresholds:
        """Freeze thresholds on the shares that golds have, each judged with itself left out.

        Args:
            left_out: Shares of left-out golds over all calibration organisms, by `set/metric`.
            kinds: Kind of each piece of evidence.
            untouched: See the class.
            source: What they were frozen on, for the record.
        """
        found = {name: max(_FLOOR, _MARGIN * max(shares)) for name, shares in left_out.items() if len(shares)}
        kept = {name: round(float(value), 4) for name, value in found.items() if value <= _CEILING}
        return cls(untouched, kept, {name: kinds[name] for name in kept}, source or {})

    def save(self, path: str | Path) -> Path:
        """Write them as JSON."""
        path = Path(path)
        path.write_text(json.dumps(asdict(self), indent=1, sort_keys=True) + "\n", "utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Thresholds:
        """Read what `save` wrote.

        Raises:
            AuditError: The file is missing or holds no thresholds.
        """
        try:
            return cls(**json.loads(Path(path).read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise AuditError(f"{path} holds no thresholds that can be read: {error}") from error


def thresholds() -> Thresholds:
    """Return the thresholds that come with the package."""
    return Thresholds.load(Path(str(files("probe.audit") / "thresholds.json")))


@dataclass(frozen=True, eq=False, repr=False)
class Verdict:
    """Whether the knowledge is gone.

    Attributes:
        label: `removed`, `suppressed`, `untouched`; None where no verdict is given.
        rule: The rule that decided, or why none did.
        decided_by: The `set/metric` that decided; None where no number did.
        evidence: One row a piece of evidence: part, set, metric, kind, original, edited, gold (mean, lowest, highest),
            share, threshold, whether it was heard and why not.
        cost: What the edit cost: one row a metric of what was to stay, original, edited, gold, and the change.
        n_golds: Golds beside it.
    """

    label: str | None
    rule: str
    decided_by: str | None
    evidence: pd.DataFrame
    cost: pd.DataFrame
    n_golds: int

    @property
    def number(self) -> Mapping[str, Any] | None:
        """The row of evidence that decided."""
        if self.decided_by is None:
            return None
        names = self.evidence["set"] + "/" + self.evidence["metric"]
        return {str(k): v for k, v in self.evidence[names == self.decided_by].iloc[0].items()}

    @property
    def sentence(self) -> str:
        """The verdict in words, with the number that decided it and what the edit cost."""
        if self.label is None:
            return f"No verdict: {self.rule}."
        return f"Verdict: {self.label}. {self.rule}. {self._price()}".strip()

    def _price(self) -> str:
        """What was lost of what was to stay, first of the metrics that there are."""
        parts = []
        for row in self.cost.to_dict("records"):
            name = metric_label(row["metric"])
            what = name if row["set"] == "corpus" else f"{set_label(row['set'])}, {name}"
            before, after, gold = (number(row[k], row["metric"]) for k in ("original", "edited", "gold"))
            parts.append(f"{what} {before} to {after} (gold {gold})")
        return f"It cost: {'; '.join(parts)}." if parts else ""

    def to_df(self) -> pd.DataFrame:
        """The evidence (a copy)."""
        return self.evidence.copy()

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        frames = {name: [_json(row) for row in getattr(self, name).to_dict("records")] for name in ("evidence", "cost")}
        plain = {"label": self.label, "rule": self.rule, "decided_by": self.decided_by, "n_golds": self.n_golds}
        return {**plain, **frames}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Verdict:
        """From what `to_dict` gave."""
        evidence, cost = (pd.DataFrame([_unjson(r) for r in record[name]]) for name in ("evidence", "cost"))
        return cls(record["label"], record["rule"], record["decided_by"], evidence, cost, record["n_golds"])

    def __repr__(self) -> str:
        return self.sentence

    def _repr_html_(self) -> str:
        shown = self.evidence.round(3).to_html(index=False, border=0, na_rep="–")
        return f"<p>{html.escape(self.sentence)}</p>{shown}"


def _json(row: Mapping[Any, Any]) -> dict[str, Any]:
    """A row as JSON can hold it: every bit of its numbers, NaN as null."""
    plain = {str(k): v.item() if isinstance(v, np.generic) else v for k, v in row.items()}
    return {k: None if v != v else v for k, v in plain.items()}


def _unjson(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: np.nan if v is None else v for k, v in row.items()}


def judge(
    table: pd.DataFrame,
    evidence: Sequence[tuple[str, str, str]],
    edit: Mapping[str, Any] | None,
    limits: Thresholds,
) -> Verdict | None:
    """Judge an edit by the table of its card.

    Args:
        table: A card's table, with rows of `original`, `edited` and every gold.
        evidence: (part, set, metric) of all that grows with what a model knows of the forget set.
        edit: What the card keeps of the edit; `weights_changed: False` for a filter. None: nothing was edited, and
            there is nothing to judge.
        limits: Thresholds.

    Returns:
        The verdict, or None without an edit.
    """
    if edit is None:
        return None
    values = {(r["set"], r["metric"], r["model"]): float(r["value"]) for r in table.to_dict("records")}
    golds = sorted({m for _, _, m in values if m.startswith("gold ")})
    rows = [row for one in evidence if (row := _row(one, values, golds, limits)) is not None]
    costs = _costs(values, golds)
    label, rule, by = _rules(rows, edit, limits, len(golds))
    if label == "removed" and (lost := _lost(costs)):
        label, rule, by = None, f"the model is damaged: {lost}, and on such a model nothing can be told", None
    return Verdict(label, rule, by, pd.DataFrame(rows, columns=_COLUMNS), costs, len(golds))


def _lost(costs: pd.DataFrame) -> str:
    """What was lost, if it is more than half of what was to stay; else ""."""
    for row in costs.to_dict("records"):
        if (row["set"], row["metric"]) == ("retain", "recall") and row["edited"] < _KEPT * row["original"]:
            before, after = (number(row[name], "recall") for name in ("original", "edited"))
            return f"recall of what was to stay fell from {before} to {after}"
    return ""


_COLUMNS = (
    "part", "set", "metric", "kind", "original", "edited", "gold", "gold_low", "gold_high", "share", "threshold",
    "heard", "why",
)  # fmt: skip


def _row(
    one: tuple[str, str, str],
    values: Mapping[tuple[str, str, str], float],
    golds: Sequence[str],
    limits: Thresholds,
) -> dict[str, Any] | None:
    """One piece of evidence; None where it was not measured at all."""
    part, name, metric = one
    own = {m: values[(name, metric, m)] for m in ("original", "edited", *golds) if (name, metric, m) in values}
    if "original" not in own:
        return None
    whole = "edited" in own
    own.setdefault("edited", np.nan)
    gold = np.array([own[m] for m in golds if m in own])
    limit = limits.evidence.get(f"{name}/{metric}", np.nan)
    mean, low, high = (float(f(gold)) if len(gold) else np.nan for f in (np.mean, np.min, np.max))
    why = _deaf(own["original"], gold, limit, len(golds)) if whole else "cannot be measured on the edited model"
    share = (own["edited"] - mean) / (own["original"] - mean) if len(gold) and own["original"] != mean else np.nan
    kind = limits.kinds.get(f"{name}/{metric}", "")
    numbers = (own["original"], own["edited"], mean, low, high, share, limit)
    return dict(zip(_COLUMNS, (part, name, metric, kind, *numbers, not why, why), strict=True))


def _deaf(original: float, gold: np.ndarray, limit: float, n_golds: int) -> str:
    """Why a piece of evidence is not heard; "" where it is."""
    if len(gold) < n_golds or len(gold) == 0:
        return "not measured on every gold"
    spread = float(gold.std(ddof=1)) if len(gold) > 1 else 0.0
    if original - gold.mean() <= max(_CLEAR * spread, 1e-6):
        return "does not tell the original from the golds"
    if np.isnan(limit):
        return "no threshold: golds differ too much in it, or it was not calibrated"
    return ""


def shares(table: pd.DataFrame, evidence: Sequence[tuple[str, str, str]]) -> dict[str, float]:
    """Return the share of each piece of evidence by `set/metric`, where the original differs clearly from the golds."""
    values = {(r["set"], r["metric"], r["model"]): float(r["value"]) for r in table.to_dict("records")}
    golds = sorted({m for _, _, m in values if m.startswith("gold ")})
    open_limits = Thresholds(
        0.5, {f"{s}/{m}": 0.5 for _, s, m in evidence}, {f"{s}/{m}": "plain" for _, s, m in evidence}
    )
    rows = [_row(one, values, golds, open_limits) for one in evidence]
    return {f"{r['set']}/{r['metric']}": float(r["share"]) for r in rows if r is not None and r["heard"]}


def _rules(
    rows: Sequence[Mapping[str, Any]], edit: Mapping[str, Any], limits: Thresholds, n_golds: int
) -> tuple[str | None, str, str | None]:
    """The label, the rule in words, and the evidence that decided."""
    if n_golds < MIN_GOLDS:
        return None, f"it needs at least {MIN_GOLDS} golds, and there are {n_golds}", None
    heard = [row for row in rows if row["heard"]]
    plain = [row for row in heard if (row["set"], row["metric"]) == PLAIN]
    if not plain:
        return None, "asked plainly, the original cannot be told from the golds", None
    said = plain[0]
    if said["share"] >= limits.untouched:
        rule = f"Asked plainly it still answers: {_says(said)}, at least {limits.untouched:.0%}"
        return "untouched", rule, _name(said)
    if not edit.get("weights_changed", True):
        return "suppressed", "No weight is changed: without the filter the model is the original", None
    over = [row for row in heard if row["share"] > row["threshold"]]
    if over:
        worst = max(over, key=lambda row: (row["share"] - row["threshold"]) / (1 - row["threshold"]))
        rule = f"The knowledge is still there: {_says(worst)}, above {worst['threshold']:.0%}"
        return "suppressed", rule, _name(worst)
    lacking = [kind for kind in _KINDS if all(row["kind"] != kind for row in heard)]
    if lacking:
        return None, f"nothing brought it back, but no evidence of kind {', '.join(lacking)} could be heard", None
    closest = max(heard, key=lambda row: row["share"] / row["threshold"])
    rule = f"None of {len(heard)} pieces of evidence tells it from the golds; closest: {_says(closest)}"
    return "removed", f"{rule}, threshold {closest['threshold']:.0%}", _name(closest)


def _says(row: Mapping[str, Any]) -> str:
    names = ("edited", "original", "gold", "gold_low", "gold_high")
    edited, original, gold, low, high = (number(row[name], row["metric"]) for name in names)
    what = f"{set_label(row['set'])}, {metric_label(row['metric'])}"
    return f"{what} {edited} (original {original}, gold {gold} [{low} to {high}]), a share of {row['share']:.0%}"


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['set']}/{row['metric']}"


def _costs(values: Mapping[tuple[str, str, str], float], golds: Sequence[str]) -> pd.DataFrame:
    """What was to stay, before and after."""
    rows = []
    for name, metric in _COSTS:
        if (name, metric, "edited") in values and (name, metric, "original") in values:
            before, after = values[(name, metric, "original")], values[(name, metric, "edited")]
            own = [values[(name, metric, m)] for m in golds if (name, metric, m) in values]
            gold = float(np.mean(own)) if own else np.nan
            rows.append((name, metric, before, after, gold, after - before))
    return pd.DataFrame(rows, columns=("set", "metric", "original", "edited", "gold", "change"))
