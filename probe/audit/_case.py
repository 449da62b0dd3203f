"""A case: what all models of an audit are measured on, with the original and the golds measured once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from probe.data import Questions
from probe.models import Model

SPLITS = ("forget", "retain", "neighbours", "holdout", "deducible")


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

    def has(self, name: str) -> bool:
        """Whether a set, `"gold"`, `"golds"` (two or more), `"attacks"` or `"corpus"` was given."""
        given = {"gold": bool(len(self.golds)), "golds": len(self.golds) > 1}
        given |= {"attacks": bool(self.attacks), "corpus": bool(self.corpus)}
        return given.get(name, name in self.sets)


def of_organism(organism: Any, n_gold: int = 5, **settings: Any) -> Case:
    """Return the case of an organism: its splits, its phrasings never trained on, its attacks, its golds.

    Args:
        organism: A `probe.organisms.Organism` with the splits `forget` and `retain`.
        n_gold: Golds; those that are not trained yet are trained.
        **settings: Any field of `Case`; `sets` replaces single sets.
    """
    replaced = settings.pop("sets", {})
    sets = {name: organism.splits[name] for name in SPLITS if name in organism.splits}
    sets |= {"unseen": organism.unseen("forget"), "unseen_retain": organism.unseen("retain")}
    if hasattr(organism, "given"):
        sets |= {"given": organism.given("forget"), "given_holdout": organism.given("holdout")}
    if hasattr(organism, "attacks"):
        settings.setdefault("attacks", organism.attacks("forget"))
    golds = organism.gold.train(n_gold)[:n_gold] if n_gold else ()
    return Case(organism.model, {**sets, **replaced}, golds, **settings)
