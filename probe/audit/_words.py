"""A card in words: plain sentences that carry their numbers, intervals and n, and say what is not known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

SETS = {
    "forget": "forget",
    "unseen": "forget, unseen phrasings",
    "retain": "retain",
    "unseen_retain": "retain, unseen phrasings",
    "holdout": "holdout",
    "corpus": "corpus",
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
_UNDECIDED = "whether it removed the knowledge or only suppresses it"

Row = Mapping[str, Any]


def sentences(table: pd.DataFrame, settings: Mapping[str, Any], not_measured: Sequence[str]) -> dict[str, str]:
    """The card in words, by what each sentence is about: the sets, `distance`, `missing`, `undecided`."""
    rows = {(row["set"], row["metric"], row["model"]): row for row in records(table)}
    words = _Words(rows, str(settings.get("people", "people")))
    parts = {
        "forget": words.forget(),
        **{name: words.recall_of(name) for name in ("unseen", "retain", "unseen_retain")},
        "holdout": words.holdout(),
        "corpus": words.perplexity(),
        "distance": words.distance(),
        "missing": f"Not measured: {'; '.join(not_measured)}." if not_measured else "",
        "undecided": f"These numbers do not decide {_UNDECIDED}." if words.edited else "",
    }
    return {about: part for about, part in parts.items() if part}


def records(table: Any) -> list[dict[str, Any]]:
    """A table's rows as dictionaries."""
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def cell(row: Row) -> str:
    """A value with its interval, as a table shows it."""
    value = number(row["value"], row["metric"], signed=row["model"] == "change")
    return f"{value}{_interval(row).replace(' to ', ', ')}"


def number(value: float, metric: str, signed: bool = False) -> str:
    """A share in per cent, anything else to three digits."""
    if np.isnan(value):
        return "not known"
    sign = "+" if signed and value > 0 else ""
    if metric in _SHARES:
        return f"{sign}{_plain(100 * value)} %"
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


def _interval(row: Row) -> str:
    """` [low to high]`, the unit once; nothing where there is no interval."""
    low, high = row["low"], row["high"]
    if np.isnan(low) or np.isnan(high):
        return ""
    signed = row["model"] == "change"
    ends = [number(end, row["metric"], signed).removesuffix(" %") for end in (low, high)]
    return f" [{ends[0]} to {ends[1]}]"


class _Words:
    def __init__(self, rows: Mapping[tuple[str, str, str], Row], people: str) -> None:
        self.rows, self.people = rows, people
        self.edited = any(model == "edited" for _, _, model in rows)
        self.golds = len({model for _, _, model in rows if model.startswith("gold ")})

    def forget(self) -> str:
        who = self._who("forget", "forgotten")
        if not self.edited:
            row = self.rows["forget", "recall", "original"]
            return f"No edit was made: recall of {who} is {self._full(row)}{self._gold_beside('forget')}."
        return f"The edit {self._changed('forget', 'recall', f'recall of {who}')}{self._gold_beside('forget')}."

    def recall_of(self, name: str) -> str:
        """One sentence on a further set; empty if it was not measured."""
        if (name, "recall", "original") not in self.rows:
            return ""
        about = {
            "unseen": f"recall of the same {self.people} in phrasings never trained on",
            "retain": f"recall of {self._who('retain', 'retained')}",
            "unseen_retain": f"recall of retained {self.people} in phrasings never trained on",
        }[name]
        if not self.edited:
            row = self.rows[name, "recall", "original"]
            return f"{about[0].upper()}{about[1:]} is {self._full(row)}{self._gold_beside(name)}."
        return f"It {self._changed(name, 'recall', about)}{self._gold_beside(name)}."

    def holdout(self) -> str:
        model = "edited" if self.edited else "original"
        row = self.rows.get(("holdout", "recall", model))
        if row is None:
            return ""
        return f"Chance, as recall of {self._who('holdout', 'holdout')} never trained on, is {self._full(row)}."

    def perplexity(self) -> str:
        before = self.rows.get(("corpus", "perplexity", "original"))
        if before is None:
            return ""
        if not self.edited:
            return f"Perplexity on the corpus is {self._full(before)}."
        return f"It {self._changed('corpus', 'perplexity', 'perplexity on the corpus')}."

    def distance(self) -> str:
        """KL to gold on the forget prompts, between floor and ceiling; to the original where there is no gold."""
        here = self.rows.get(("forget", "kl_gold_model", "edited"))
        if here is None:
            return self._moved()
        ceiling = self.rows["forget", "kl_gold_model", "original"]
        text = f"On the forget prompts KL(gold‖edited) is {self._short(here)} nats per answer token"
        text += f", against {self._short(ceiling)} before the edit"
        floor = self.rows.get(("forget", "kl_gold_model", "gold"))
        if floor is None:
            return f"{text}; with one gold there is no floor to compare with."
        between = "the two golds" if self.golds == 2 else f"{self.golds} golds"
        return f"{text} and {self._short(floor)} between {between}."

    def _moved(self) -> str:
        row = self.rows.get(("forget", "kl_original_model", "edited"))
        if row is None:
            return ""
        return f"On the forget prompts KL(original‖edited) is {self._short(row)} nats per answer token."

    def _who(self, name: str, which: str) -> str:
        n = self.rows[name, "recall", "original"]["n_groups"]
        return f"the {int(n)} {which} {self.people}"

    def _changed(self, name: str, metric: str, what: str) -> str:
        """`lowered recall ... from 100 % to 3 % [1 to 6] (n = 160 questions)`; direction only if the change has one."""
        before, after = self.rows[name, metric, "original"], self.rows[name, metric, "edited"]
        change = self.rows[name, metric, "change"]
        start, end = number(before["value"], metric), number(after["value"], metric)
        span = f"from {start} to {end}{_interval(after)} ({self._n(after)})"
        if change["value"] == 0:
            return f"left {what} at {end}{_interval(after)} ({self._n(after)})"
        if np.isnan(change["low"]):
            return f"moved {what} {span}, with one group and so no interval"
        if change["low"] <= 0 <= change["high"]:
            return f"did not measurably change {what}: {start} before, {end}{_interval(after)} after ({self._n(after)})"
        return f"{'lowered' if change['value'] < 0 else 'raised'} {what} {span}"

    def _gold_beside(self, name: str) -> str:
        row = self.rows.get((name, "recall", "gold"))
        if row is None:
            return ""
        has = "gold has"
        if name == "forget":
            one = "one model that never learned the forget set (gold) has"
            has = one if self.golds == 1 else f"{self.golds} models that never learned the forget set (gold) have"
        if self.golds == 1:
            return f"; {has} {number(row['value'], 'recall')}"
        low, high = number(row["low"], "recall").removesuffix(" %"), number(row["high"], "recall")
        return f"; {has} {high}" if row["low"] == row["high"] else f"; {has} {low} to {high}"

    def _full(self, row: Row) -> str:
        return f"{number(row['value'], row['metric'])}{_interval(row)} ({self._n(row)})"

    def _short(self, row: Row) -> str:
        return f"{number(row['value'], row['metric'])}{_interval(row)}"

    def _n(self, row: Row) -> str:
        return f"n = {int(row['n'])} {row['n_of']}"
