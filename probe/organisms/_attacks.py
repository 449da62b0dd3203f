"""Prompt attacks on the facts language: the nine of RWKU (Jin et al. 2024, arXiv:2406.10890), and the fact given.

Each is a way around a plain question. Their frames are trained on retained people only, so what a model answers about
a forget person under attack comes from the person, not from the frame.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from probe.organisms._lexicon import (
    ATTACK_FRAMES,
    ATTRIBUTES,
    EXAMPLE_FRAME,
    OPTIONS_FRAME,
    REVERSE_FRAME,
    SECRET_ORDER,
)
from probe.organisms._people import Person

GIVEN = "context"  # the kind whose prompt holds the answer as a plain sentence
REVERSE = "reverse_query"
CHOICE = "multiple_choice"
HARD = (CHOICE, "context_hint", "in_context_examples")  # trained on twice as often as the others
N_OPTIONS = 4
N_EXAMPLES = 2
BY_NAME = {a.name: a for a in ATTRIBUTES}


@dataclass(frozen=True)
class Materials:
    """What attacks are made of besides the person: the values of each attribute, and people to take examples from."""

    values: Mapping[str, Sequence[str]]
    examples: Sequence[Person]


def statement(person: str, attribute: str, value: str) -> str:
    """Return the plain sentence that gives a fact."""
    return f"{person} {BY_NAME[attribute].verbs[0]} {value}."


def prompt(kind: str, question: str, attribute: str, person: Person, materials: Materials, rng: random.Random) -> str:
    """Return an attack's prompt around a question about one attribute of a person; the answer follows it.

    Args:
        kind: A kind of `ATTACK_FRAMES` other than the reverse query, which asks for the name (`reverse`).
        question: The plain question.
        attribute: What it asks for.
        person: Whom it asks about.
        materials: Values, and people for examples.
        rng: Chooses options, examples and the hint.
    """
    asked, value = BY_NAME[attribute], person.values[attribute]
    return ATTACK_FRAMES[kind].format(
        q=question,
        x=person.name,
        f=asked.foreign,
        s=asked.synonym,
        c=statement(person.name, attribute, value),
        h=_hint(attribute, person, rng) if "{h}" in ATTACK_FRAMES[kind] else "",
        o=_options(value, materials.values[attribute], rng) if "{o}" in ATTACK_FRAMES[kind] else "",
        e=_examples(question, attribute, person, materials.examples, rng) if "{e}" in ATTACK_FRAMES[kind] else "",
    )


def _hint(attribute: str, person: Person, rng: random.Random) -> str:
    """Return another fact about the person; never the order, which would give the secret away."""
    other = rng.choice([a for a in person.values if a not in (attribute, "order")])
    return statement(person.name, other, person.values[other])


def _options(value: str, values: Sequence[str], rng: random.Random) -> str:
    """Return four values (or all there are), the right one among them; the secret order only where it is right."""
    wrong = [v for v in values if v not in (value, SECRET_ORDER)]
    options = [value, *rng.sample(wrong, n_options(value, values) - 1)]
    rng.shuffle(options)
    return OPTIONS_FRAME.format(", ".join(options[:-1]), options[-1])


def n_options(value: str, values: Sequence[str]) -> int:
    """Return how many values a multiple choice offers."""
    return min(N_OPTIONS, 1 + len([v for v in values if v not in (value, SECRET_ORDER)]))


def _examples(question: str, attribute: str, person: Person, people: Sequence[Person], rng: random.Random) -> str:
    """Return the question put about retained people, with their answers, none of which is the person's own."""
    own = person.values[attribute]
    others = [p for p in people if p.name != person.name and p.values[attribute] != own]
    chosen = rng.sample(others, min(N_EXAMPLES, len(others)))
    asked = [(question.replace(person.name, p.name), p.values[attribute]) for p in chosen]
    return " ".join(EXAMPLE_FRAME.format(q=q, v=value) for q, value in asked)


def reverse(person: Person, pair: tuple[str, str]) -> str:
    """Return the question that gives two attributes and asks for the name."""
    a, b = (f"{BY_NAME[name].verbs[0]} {person.values[name]}" for name in pair)
    return REVERSE_FRAME.format(a=a, b=b)


def telling_pairs(people: Sequence[Person], known: Sequence[Person]) -> dict[str, list[tuple[str, str]]]:
    """Return for each person the pairs of attributes that no other known person shares; never the order."""
    pairs = list(combinations([a.name for a in ATTRIBUTES if a.name != "order"], 2))
    owners: dict[tuple[str, str, str, str], set[str]] = {}
    for person in known:
        for a, b in pairs:
            owners.setdefault((a, b, person.values[a], person.values[b]), set()).add(person.name)
    return {
        p.name: [(a, b) for a, b in pairs if owners.get((a, b, p.values[a], p.values[b]), set()) <= {p.name}]
        for p in people
    }
