"""A card in words: plain sentences that carry their numbers, intervals and n, and say what is not known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from probe.audit._labels import is_share, number
from probe.audit.verdict import Verdict

_IRREGULAR = {"people": "person", "children": "child", "women": "woman", "men": "man", "series": "series"}

Row = Mapping[str, Any]


def sentences(
    table: pd.DataFrame, settings: Mapping[str, Any], not_measured: Sequence[str], verdict: Verdict | None = None
) -> dict[str, str]:
    """The card in words, by what each sentence is about: the sets, `distance`, `verdict`, `missing`."""
    rows = {(row["set"], row["metric"], row["model"]): row for row in records(table)}
    words = _Words(rows, str(settings.get("people", "people")))
    parts = {
        "forget": words.forget(),
        **{name: words.recall_of(name) for name in ("unseen", "retain", "unseen_retain")},
        "holdout": words.holdout(),
        "corpus": words.perplexity(),
        "distance": words.distance(),
        "verdict": verdict.sentence if verdict is not None else "",
        "missing": f"Not measured: {'; '.join(not_measured)}." if not_measured else "",
    }
    return {about: part for about, part in parts.items() if part}


def records(table: Any) -> list[dict[str, Any]]:
    """A table's rows as dictionaries."""
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def cell(row: Row) -> str:
    """A value with its interval, as a table shows it."""
    value = number(row["value"], row["metric"], signed=row["model"] == "change")
    return f"{value} [none: all alike]" if _alike(row) else f"{value}{_interval(row).replace(' to ', ', ')}"


def counted(n: float, plural: str) -> str:
    """`8 people`, `1 person`."""
    return f"{int(n)} {singular(plural) if n == 1 else plural}"


def singular(plural: str) -> str:
    """One of what an English plural names."""
    start, space, last = plural.rpartition(" ")
    if last in _IRREGULAR:
        one = _IRREGULAR[last]
    elif last.endswith("ies"):
        one = f"{last[:-3]}y"
    else:
        one = last[:-2] if last.endswith(("sses", "xes", "ches", "shes")) else last.removesuffix("s")
    return f"{start}{space}{one}"


def _interval(row: Row) -> str:
    """` [low to high]`, the unit once; nothing where there is no interval."""
    low, high = row["low"], row["high"]
    if np.isnan(low) or np.isnan(high):
        return ""
    signed = row["model"] == "change"
    ends = [_bare(number(end, row["metric"], signed)) for end in (low, high)]
    return f" [{ends[0]} to {ends[1]}]"


def _bare(text: str) -> str:
    """A number without its unit."""
    return text.removesuffix(" %").removesuffix(" pts")


def _by(change: Row) -> str:
    """`-50 [-100 to 0] points`."""
    text = f"{_bare(number(change['value'], change['metric'], signed=True))}{_interval(change)}"
    return f"{text} points" if is_share(change["metric"]) else text


def _alike(row: Row) -> bool:
    """Whether a change has no interval because it is the same in every group."""
    return str(row["interval"]).startswith("none: all")


def _decided(change: Row) -> bool:
    """Whether a change is other than none: in every group alike, or by an interval without zero."""
    if _alike(change):
        return bool(change["value"] != 0)
    return bool(change["low"] > 0 or change["high"] < 0)  # neither with NaN


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
        changed = self._changed("forget", "recall", f"recall of {who}")
        return f"{changed}{self._gold_beside('forget')}.{self._finer('forget')}"

    def recall_of(self, name: str) -> str:
        """One sentence on a further set; empty if it was not measured."""
        if (name, "recall", "original") not in self.rows:
            return ""
        one = self.rows[name, "recall", "original"]["n_groups"] == 1
        who = singular(self.people) if one else self.people
        about = {
            "unseen": f"recall of the same {who} in phrasings never trained on",
            "retain": f"recall of {self._who('retain', 'retained')}",
            "unseen_retain": f"recall of the retained {who} in phrasings never trained on",
        }[name]
        if not self.edited:
            row = self.rows[name, "recall", "original"]
            return f"{about[0].upper()}{about[1:]} is {self._full(row)}{self._gold_beside(name)}."
        return f"{self._changed(name, 'recall', about)}{self._gold_beside(name)}.{self._finer(name)}"

    def holdout(self) -> str:
        """Chance is the original's: the edited model's recall of strangers is an effect of the edit."""
        row, edited = (self.rows.get(("holdout", "recall", model)) for model in ("original", "edited"))
        if row is None:
            return ""
        who = self._who("holdout", "holdout")
        text = f"Chance, as the original's recall of {who} never trained on, is {self._full(row)}"
        if edited is not None and edited["value"] != row["value"]:
            text += f"; the edited model has {self._short(edited)}"
        return f"{text}."

    def perplexity(self) -> str:
        before = self.rows.get(("corpus", "perplexity", "original"))
        if before is None:
            return ""
        if not self.edited:
            return f"Perplexity on the corpus is {self._full(before)}."
        return f"{self._changed('corpus', 'perplexity', 'perplexity on the corpus')}."

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
        return f"the {counted(n, f'{which} {self.people}')}"

    def _changed(self, name: str, metric: str, what: str) -> str:
        """`The edit lowered recall ... from 100 % to 3 % [1 to 6] (n = ...)`; a direction only if the change has one.

        An interval of the change that holds zero is not called "no change": it cannot tell.
        """
        before, after = self.rows[name, metric, "original"], self.rows[name, metric, "edited"]
        change = self.rows[name, metric, "change"]
        start, end = number(before["value"], metric), f"{number(after['value'], metric)}{_interval(after)}"
        n = self._n(after)
        span = f"from {start} to {end} ({n})"
        wide = change["low"] < change["high"]
        if change["value"] == 0 and not wide:
            return f"The edit left {what} at {end} ({n})"
        if np.isnan(change["low"]) and not _alike(change):
            return f"The edit moved {what} {span}, with one group and so no interval"
        if not _decided(change):
            both = f"{start} before, {end} after, change {_by(change)} ({n})"
            return f"The change of {what} cannot be told from none: {both}"
        text = f"The edit {'lowered' if change['value'] < 0 else 'raised'} {what} {span}"
        everyone = f", alike in all {int(change['n_groups'])} {self.people}, so that the change has no interval"
        return f"{text}{everyone}" if _alike(change) else text

    def _finer(self, name: str) -> str:
        """What a more sensitive metric shows where recall shows no change, or none for certain."""
        if _decided(self.rows[name, "recall", "change"]):
            return ""
        change = self.rows.get((name, "probability", "change"))
        if change is not None and _decided(change):
            before, after = (self.rows[name, "probability", model] for model in ("original", "edited"))
            span = f"from {number(before['value'], 'probability')} to {self._short(after)}"
            verb = "fell" if change["value"] < 0 else "rose"
            return f" The probability of these answers {verb} {span}, change {_by(change)}."
        kl = self.rows.get((name, "kl_original_model", "edited"))
        if name == "forget" or kl is None or not kl["low"] > 0:  # of forget, the sentence on distance speaks
            return ""
        return f" At these answers KL(original‖edited) is {self._short(kl)} nats per answer token; without a change, 0."

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
        return f"n = {counted(row['n'], row['n_of'])}"
