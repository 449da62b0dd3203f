"""A case: what all models of an audit are measured on, with the original and the golds measured once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from probe.audit.part import spaced
from probe.data import Questions
from probe.models import Model

SPLITS = ("forget", "retain", "neighbours", "holdout", "real_authors", "world_facts")

_OF_FORGET = ("forget", "unseen", "deducible", "given")
_FAMILY = {
    "unseen": "forget",
    "deducible": "forget",
    "given": "forget",
    "unseen_retain": "retain",
    "neighbours": "retain",
}


@dataclass(frozen=True, eq=False)
class Case:
    """What all models of an audit are measured on.

    Attributes:
        original: The unedited model. While an edited model is measured, the edit is applied to it.
        sets: Questions by name: `forget` and `retain` always; where there are any, `unseen` and `unseen_retain`
            (phrasings never trained on), `neighbours` (retain rows of people who share attributes with forget people),
            `holdout` (people never trained on), `deducible` (facts of forget people that follow from retained ones),
            `given` and `given_holdout` (questions with the fact in their context).
        golds: Models trained without the forget set, one at a time (a sequence that may load on demand).
        attacks: Prompt attacks on the forget set by kind, where the organism has its own; else made from frames.
        corpus: Texts for perplexity and utility.
        batch_size: Rows a forward.
        bos: Whether a BOS token comes first; None leaves it to the tokenizer.
        chat: Put questions into the chat template.
        seed: Of everything random.
        n_boot: Bootstrap replicates.
        people: What a group is, in the plural.
        progress: Show bars.
        gold_names: What each gold is called, also where others are left out; default "gold 1", "gold 2", ...
    """

    original: Model
    sets: Mapping[str, Questions]
    golds: Sequence[Model] = ()
    attacks: Mapping[str, Questions] = field(default_factory=dict)
    corpus: tuple[str, ...] = ()
    batch_size: int = 64
    bos: bool | None = None
    chat: bool = False
    seed: int = 0
    n_boot: int = 1000
    people: str = "people"
    progress: bool = True
    gold_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.gold_names) != len(self.golds):  # none were given, or other golds took their place
            object.__setattr__(self, "gold_names", tuple(f"gold {i + 1}" for i in range(len(self.golds))))

    def has(self, name: str) -> bool:
        """Whether a set, `"gold"`, `"golds"` (two or more), `"attacks"` or `"corpus"` was given."""
        given = {"gold": bool(len(self.golds)), "golds": len(self.golds) > 1}
        given |= {"attacks": bool(self.attacks), "corpus": bool(self.corpus)}
        return given.get(name, name in self.sets)

    @classmethod
    def of(cls, organism: Any, n_gold: int = 5, limit: int | None = 800, **settings: Any) -> Case:
        """Return the case of an organism: its splits, its phrasings never trained on, its attacks, its golds.

        Facts of forget people that follow from retained ones are no part of `forget`: they are the set `deducible`.

        Args:
            organism: A `probe.organisms.Organism` with the splits `forget` and `retain`.
            n_gold: Golds; those that are not trained yet are trained.
            limit: At most so many questions of each set but those of forget people, evenly spaced; None for all.
            **settings: Any field of the case; `sets` replaces single sets.
        """
        replaced = settings.pop("sets", {})
        sets = {name: organism.splits[name] for name in SPLITS if name in organism.splits}
        sets |= _unseen(organism, sets)
        if hasattr(organism, "given"):
            sets |= {"given": organism.given("forget"), "given_holdout": organism.given("holdout")}
        attacks = organism.attacks("forget") if hasattr(organism, "attacks") else {}
        settings.setdefault("attacks", {kind: _secret(rows) for kind, rows in attacks.items()})
        deducible = sets["forget"].select(lambda row: bool(row.meta.get("deducible"))) if "forget" in sets else ()
        sets |= {name: _secret(sets[name]) for name in ("forget", "unseen", "given") if name in sets}
        if len(deducible):
            sets["deducible"] = deducible
        sets = _told_apart(_limited(sets, limit))
        golds = organism.gold.train(n_gold)[:n_gold] if n_gold else ()
        return cls(organism.model, {**sets, **replaced}, golds, **settings)


def _unseen(organism: Any, sets: Mapping[str, Questions]) -> dict[str, Questions]:
    """Phrasings never trained on, of the same people; those that only other people have are no set of their own."""
    found = {}
    for name, split in (("unseen", "forget"), ("unseen_retain", "retain")):
        if split in sets and split in organism._unseen:
            rows = organism.unseen(split)
            if len(rows) and set(rows.groups) <= set(sets[split].groups):
                found[name] = rows
    return found


def _limited(sets: Mapping[str, Questions], limit: int | None) -> dict[str, Questions]:
    """At most so many questions of each set that is not of forget people; parts of retain are of the people in it."""
    found = {name: rows if name in _OF_FORGET else spaced(rows, limit) for name, rows in sets.items()}
    if "retain" in found:
        kept = set(found["retain"].groups)
        for name in ("unseen_retain", "neighbours"):
            if name in sets:
                found[name] = spaced(sets[name].select(lambda row: row.group in kept), limit)
    return {name: rows for name, rows in found.items() if len(rows)}


def _told_apart(sets: Mapping[str, Questions]) -> dict[str, Questions]:
    """The sets, with groups that bear the split's name where forget and retain speak of the same things.

    The towns of a mixture of experts are in every domain: what is asked of them differs, and sets are drawn apart.
    """
    if "forget" not in sets or "retain" not in sets:
        return dict(sets)
    if not set(sets["forget"].groups) & set(sets["retain"].groups):
        return dict(sets)
    return {
        name: Questions((replace(row, group=f"{row.group} ({_FAMILY.get(name, name)})") for row in rows), rows.name)
        for name, rows in sets.items()
    }


def _secret(rows: Questions) -> Questions:
    """The rows without those whose answer follows from retained facts: a gold may know them."""
    return rows.select(lambda row: not row.meta.get("deducible"))


def of_organism(organism: Any, n_gold: int = 5, **settings: Any) -> Case:
    """`Case.of`."""
    return Case.of(organism, n_gold, **settings)
