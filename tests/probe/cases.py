"""Cases for tests of the audit's parts: the small organism, and a subject of any model."""

from __future__ import annotations

from functools import cache

import probe.organisms
from probe.audit._case import Case, of_organism
from probe.audit.part import Subject
from probe.scoring import score_answers


@cache
def small_case(n_gold: int = 2, seed: int = 0) -> Case:
    """The small facts organism with some golds (from the cache folder, trained on first use)."""
    return of_organism(probe.organisms.facts("small", seed, progress=False), n_gold, progress=False)


def subject(case: Case, role: str = "original", model=None) -> Subject:
    """A subject whose answers are scored; `model` for the edited one."""
    number = int(role.split()[1]) - 1 if role.startswith("gold") else None
    model = model or (case.original if number is None else case.golds[number])
    answers = {n: score_answers(model, rows, bos=case.bos, chat=case.chat) for n, rows in case.sets.items()}
    return Subject(role, model, case, answers)
