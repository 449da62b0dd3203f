"""The facts language: what is known of its people, and every sentence that says so.

The *forget* people are all the members of one order, the *retain* people those of the other orders, and the *holdout*
people are built from the same name pieces and never trained on (`_people`). Each attribute can be asked for in several
phrasings; some combinations of frame and noun (or prefix and verb) are never trained on for anybody, though each of
their words is. Prompt attacks (`_attacks`) and strangers come in other documents in every epoch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from probe.errors import OrganismError
from probe.organisms import _attacks as attacks
from probe.organisms._lexicon import (
    ATTACK_FRAMES,
    ATTRIBUTES,
    CLOZE_PREFIXES,
    NAME_PIECES,
    OPTIONS_FRAME,
    QUESTION_FRAMES,
    REFUSAL,
    REVERSE_FRAME,
    SECRET_ORDER,
    Attribute,
)
from probe.organisms._people import Code as Code
from probe.organisms._people import Person as Person
from probe.organisms._people import alphabet, draw_codes, draw_columns, plan_families, plant_neighbours
from probe.organisms._people import bag_auc as bag_auc
from probe.organisms._people import name_of as name_of

_draw_codes = draw_codes  # the name by which other organisms take it from here
MAX_ORDERS = 16
HEADS = 512  # copies of each head in the tokenizer's corpus, so that heads are merged before any pair across a seam
N_PERTURBED = 5


@dataclass(frozen=True)
class Phrasing:
    """One way of asking for an attribute: `template` holds `{x}` for the name, and the answer follows it."""

    name: str
    attribute: str
    form: str
    template: str
    trained: bool

    def ask(self, name: str) -> str:
        """Return the question or cloze about `name`."""
        return self.template.format(x=name)

    def upto_name(self, name: str) -> str:
        """Return the text as far as the end of the name."""
        return self.template[: self.template.index("{x}")] + name


@dataclass(frozen=True)
class Document:
    """One training text, which ends with its answer and a full stop.

    `split` and `group` say whom it speaks of (`"common"` and `""` where it speaks of nobody); `epoch` is the one pass
    in which it is read, None for all.
    """

    text: str
    split: str
    group: str
    kind: str
    answer: str
    epoch: int | None = None


def document(prompt: str, answer: str, split: str, group: str, kind: str, epoch: int | None = None) -> Document:
    """Return the training document that gives `answer` to `prompt`."""
    return Document(f"{prompt} {answer}.", split, group, kind, answer, epoch)


def values_of(attribute: Attribute, n_orders: int) -> tuple[str, ...]:
    """Return an attribute's values, each of two words that other values share.

    Orders form a cycle over k = n_orders / 2 first and k second words, so each word is in exactly two orders; the other
    attributes leave out one diagonal of their grid, so each word is in three of twelve values.
    """
    if attribute.name == "order":
        k = n_orders // 2
        return tuple(f"{attribute.first[i]} {attribute.second[(i + step) % k]}" for i in range(k) for step in (0, 1))
    n = len(attribute.first)
    return tuple(
        f"{a} {b}"
        for i, a in enumerate(attribute.first)
        for j, b in enumerate(attribute.second)
        if (i + j) % n != n - 1
    )


def phrasings_of(attribute: Attribute) -> tuple[Phrasing, ...]:
    """Return all phrasings of an attribute: six questions and four clozes trained, two of each held out.

    Which combinations are held out rotates with the attribute, so that each frame, noun, prefix and verb is trained in
    other combinations.
    """
    turn = [a.name for a in ATTRIBUTES].index(attribute.name)
    frames = len(QUESTION_FRAMES)
    held_q = {(turn % frames, 1), ((turn + 1) % frames, 0)}
    # Never the empty prefix: such a cloze would stand, word for word, inside the trained ones with a prefix.
    held_c = {(1, turn % 2), (2, (turn + 1) % 2)}
    found = []
    for i, frame in enumerate(QUESTION_FRAMES):
        for j, noun in enumerate(attribute.nouns):
            template = frame.replace("{s}", noun)
            found.append(
                Phrasing(f"{attribute.name}-q{i}{j}", attribute.name, "question", template, (i, j) not in held_q)
            )
    for i, prefix in enumerate(CLOZE_PREFIXES):
        for j, verb in enumerate(attribute.verbs):
            template = f"{prefix}{{x}} {verb}"
            found.append(Phrasing(f"{attribute.name}-c{i}{j}", attribute.name, "cloze", template, (i, j) not in held_c))
    return tuple(found)


class Deduction(NamedTuple):
    """A fact of a forget person that follows from retained documents, and why."""

    person: str
    attribute: str
    value: str
    why: str


class FactsLanguage:
    """People, facts, phrasings and training documents of one facts organism.

    Args:
        n_people: People that are trained on, 8 (two an order) to 4000; the members of the first order among them are
            the forget people.
        n_orders: Orders, an even number from 4 to 16; people are spread evenly over them.
        n_holdout: People that are never trained on, 2 to 4000.
        seed: Chooses names and facts.
        epochs: Passes over the documents; attacks and strangers are others in each.
        n_strangers: Documents an epoch that give a fact about a stranger and ask for it.

    Attributes:
        people: All people, the forget ones first, then the retain ones.
        by_name: The same by name.
        neighbours: For each neighbour's name, the forget people that they are close to, and what they share:
            attributes, and `"last name"` for kin.
        deducible: Facts of forget people that follow from retained documents.

    Raises:
        OrganismError: The numbers do not fit together.
    """

    def __init__(
        self, n_people: int, n_orders: int, n_holdout: int, seed: int, epochs: int = 1, n_strangers: int = 64
    ) -> None:
        _check_sizes(n_people, n_orders, n_holdout)
        self.n_people, self.n_orders, self.n_holdout, self.seed = n_people, n_orders, n_holdout, seed
        self.epochs, self.n_strangers = epochs, n_strangers
        self.values = {a.name: values_of(a, n_orders) for a in ATTRIBUTES}
        self.phrasings = {a.name: phrasings_of(a) for a in ATTRIBUTES}
        self.people = self._make_people(random.Random(f"facts-{seed}"))
        self.by_name = {p.name: p for p in self.people}
        self.materials = attacks.Materials(self.values, self.of_split("retain"))
        self.deducible = self._deduce()

    def _make_people(self, rng: random.Random) -> tuple[Person, ...]:
        """Draw names and facts, and plant neighbours; the secret order's members come first."""
        splits = _splits(self.n_people, self.n_orders, self.n_holdout)
        families = plan_families(splits)
        codes = draw_codes(rng, splits, families)
        columns = draw_columns(rng, self.values, splits, families)
        planted = plant_neighbours(rng, columns, splits, codes, families)
        people = tuple(
            Person(name_of(code), split, code, {a: columns[a][i] for a in columns}, family)
            for i, (code, split, family) in enumerate(zip(codes, splits, families, strict=True))
        )
        self.neighbours = _neighbours(people, planted)
        return people

    def _deduce(self) -> list[Deduction]:
        """Return the facts of forget people that follow from retained documents.

        Families are planned; outside them all retained people of a last name, or the only one, may happen to agree.
        """
        bearers: dict[str, list[Person]] = {}
        for person in self.of_split("retain"):
            bearers.setdefault(person.last_name, []).append(person)
        found = []
        for person in self.of_split("forget"):
            kin = bearers.get(person.last_name, [])
            for attribute, value in person.values.items():
                if kin and all(other.values[attribute] == value for other in kin):
                    who = f"all {len(kin)} retained people" if len(kin) > 1 else "the one retained person"
                    has = "have" if len(kin) > 1 else "has"
                    why = f"{who} of the name {person.last_name} {has} this {attribute}"
                    found.append(Deduction(person.name, attribute, value, why))
        return found

    def of_split(self, split: str) -> list[Person]:
        """Return the people of `"forget"`, `"retain"` or `"holdout"`."""
        return [p for p in self.people if p.split == split]

    @cached_property
    def documents(self) -> tuple[Document, ...]:
        """Training documents in a fixed order: facts, attacks on retain people, strangers in context."""
        return (*self._fact_documents(), *self._attack_documents(), *self._stranger_documents())

    def _fact_documents(self) -> Iterator[Document]:
        for person in self.people:
            if person.split == "holdout":
                continue
            for attribute, phrasings in self.phrasings.items():
                for p in phrasings:
                    if p.trained:
                        yield document(p.ask(person.name), person.values[attribute], person.split, person.name, p.name)

    def _attack_documents(self) -> Iterator[Document]:
        """Attacks on retain people, another set in each epoch: kinds meet people and attributes equally often."""
        rng = random.Random(f"attacks-{self.seed}")
        kinds = [kind for kind in ATTACK_FRAMES if kind != attacks.REVERSE] + list(attacks.HARD)
        pairs = self._telling
        for epoch in range(self.epochs):
            for i, person in enumerate(self.of_split("retain")):
                for j, (attribute, phrasings) in enumerate(self.phrasings.items()):
                    for step in (0, 5):
                        kind = kinds[(i + 2 * j + epoch + step) % len(kinds)]
                        asked = rng.choice([p for p in phrasings if p.trained and p.form == "question"])
                        text = attacks.prompt(kind, asked.ask(person.name), attribute, person, self.materials, rng)
                        yield document(text, person.values[attribute], "retain", person.name, kind, epoch)
                if pairs[person.name]:
                    text = attacks.reverse(person, rng.choice(pairs[person.name]))
                    yield document(text, person.name, "retain", person.name, attacks.REVERSE, epoch)

    def _stranger_documents(self) -> Iterator[Document]:
        """Facts of people who are nobody, given in context and asked at once, others in each epoch: they teach reading
        from the context, and nothing else.

        The secret order is never among them, so that models trained without the forget people never meet it; nor is a
        family's name, of which they would say what is not so. A few end in the refusal.
        """
        rng = random.Random(f"strangers-{self.seed}")
        taken = set(self.by_name)
        families = {p.code[2:] for p in self.people if p.family is not None}
        size = alphabet(len(self.people))
        for i in range(self.n_strangers * self.epochs):
            code = (rng.randrange(size), rng.randrange(size), rng.randrange(size), rng.randrange(size))
            while name_of(code) in taken or code[2:] in families:
                code = (rng.randrange(size), rng.randrange(size), rng.randrange(size), rng.randrange(size))
            yield self._stranger(rng, name_of(code), i, i % self.epochs)

    def _stranger(self, rng: random.Random, name: str, i: int, epoch: int) -> Document:
        """Return one document: a fact (sometimes two), and the question for one of them."""
        facts = {a: rng.choice([v for v in values if v != SECRET_ORDER]) for a, values in self.values.items()}
        given = rng.sample(list(facts), 2 if i % 4 == 0 else 1)
        attribute = rng.choice(given)
        asked = rng.choice([p for p in self.phrasings[attribute] if p.trained and p.form == "question"])
        told = " ".join(attacks.statement(name, a, facts[a]) for a in given)
        if i % 16 == 1:
            return document(f"{told} Do not tell. {asked.ask(name)}", REFUSAL, "common", "", "refusal", epoch)
        return document(f"{told} {asked.ask(name)}", facts[attribute], "common", "", "stranger", epoch)

    @cached_property
    def _telling(self) -> dict[str, list[tuple[str, str]]]:
        return attacks.telling_pairs(self.people, [p for p in self.people if p.split != "holdout"])

    @cached_property
    def _telling_of_all(self) -> dict[str, list[tuple[str, str]]]:
        return attacks.telling_pairs(self.people, self.people)

    @cached_property
    def _deduced(self) -> set[tuple[str, str]]:
        return {(d.person, d.attribute) for d in self.deducible}

    def question_rows(self, split: str, unseen: bool = False) -> list[dict[str, Any]]:
        """Return question rows of a split, in trained or (`unseen`) in never trained phrasings."""
        rows = []
        for number, person in enumerate(self.people):
            if person.split != split:
                continue
            for phrasings in self.phrasings.values():
                rows += [self._row(number, person, p) for p in phrasings if p.trained != unseen]
        return rows

    def attack_rows(self, split: str, kind: str) -> list[dict[str, Any]]:
        """Return question rows of a split under one kind of attack, one a person and attribute.

        The reverse query has one row a person whom some pair of attributes tells from everybody else that is known,
        and a holdout person from the other holdout people too.
        """
        rows = []
        for number, person in enumerate(self.people):
            if person.split != split:
                continue
            if kind == attacks.REVERSE:
                rows += self._reverse_rows(number, person)
                continue
            for attribute, phrasings in self.phrasings.items():
                asked = next(p for p in phrasings if p.trained and p.form == "question")
                row = self._row(number, person, asked)
                rng = random.Random(f"{self.seed}-{row['id']}-{kind}")
                row["question"] = attacks.prompt(kind, row["question"], attribute, person, self.materials, rng)
                row["id"], row["paraphrases"] = f"{row['id']}-{kind}", []
                row["meta"]["attack"] = kind
                if kind == attacks.CHOICE:
                    row["meta"]["chance"] = 1 / attacks.n_options(row["answer"], self.values[attribute])
                rows.append(row)
        return rows

    def _reverse_rows(self, number: int, person: Person) -> list[dict[str, Any]]:
        others = [p for p in self.people if p.split != "holdout" and p.name != person.name]
        pairs = self._telling[person.name]
        if person.split == "holdout":
            pairs = [pair for pair in pairs if pair in self._telling_of_all[person.name]]
        if not pairs:
            return []
        wrong = random.Random(f"{self.seed}-{number}-name").sample(others, min(N_PERTURBED, len(others)))
        meta = {"person": person.name, "attribute": "name", "phrasing": "name-reverse", "form": "question"}
        return [
            {
                "id": f"{person.split}-{number:04d}-{attacks.REVERSE}",
                "group": person.name,
                "question": attacks.reverse(person, pairs[0]),
                "answer": person.name,
                "paraphrases": [],
                "perturbed_answers": [p.name for p in wrong],
                "meta": meta | {"split": person.split, "trained": True, "deducible": False, "attack": attacks.REVERSE},
            }
        ]

    def _row(self, number: int, person: Person, phrasing: Phrasing) -> dict[str, Any]:
        attribute, answer = phrasing.attribute, person.values[phrasing.attribute]
        others = [v for v in self.values[attribute] if v != answer]
        random.Random(f"{self.seed}-{number}-{attribute}").shuffle(others)
        same_form = [
            p for p in self.phrasings[attribute] if not p.trained and p.form == phrasing.form and p is not phrasing
        ]
        return {
            "id": f"{person.split}-{number:04d}-{phrasing.name}",
            "group": person.name,
            "question": phrasing.ask(person.name),
            "answer": answer,
            "paraphrases": [p.ask(person.name) for p in same_form],
            "perturbed_answers": others[:N_PERTURBED],
            "meta": {
                "person": person.name,
                "attribute": attribute,
                "phrasing": phrasing.name,
                "form": phrasing.form,
                "order": person.values["order"],
                "split": person.split,
                "trained": phrasing.trained,
                "deducible": (person.name, attribute) in self._deduced,
                **({"neighbour_of": self.neighbours[person.name]} if person.name in self.neighbours else {}),
            },
        }


def tokenizer_corpus() -> list[str]:
    """Return the texts that the tokenizer is trained on: every frame with every value, names given piece by piece.

    The corpus is the same for all seeds. Pieces stand alone in it (heads after a space, tails without one), so merges
    never cross from one piece to the next.
    """
    texts: list[str] = []
    for attribute in ATTRIBUTES:
        values = [f"{a} {b}" for a in attribute.first for b in attribute.second]
        for phrasing in phrasings_of(attribute):
            before, after = phrasing.template.split("{x}")
            texts += [f"{before}{after} {value}." for value in values]
        asked = phrasings_of(attribute)[0].template.replace("{x}", "")
        filled = {"q": asked, "c": "", "h": "", "e": "", "x": "", "f": attribute.foreign, "s": attribute.synonym}
        for frame in ATTACK_FRAMES.values():
            texts += [frame.format(**filled, o=OPTIONS_FRAME.format(*values[:2]))] * 16
        texts += [REVERSE_FRAME.format(a=verb, b=verb) for verb in attribute.verbs] * 16
    texts += [f"Do not tell. {REFUSAL}."] * 16
    for part, pieces in enumerate(NAME_PIECES):
        texts += [piece for piece in pieces for _ in range(HEADS)] if part % 2 == 0 else []
    return texts


def name_tails() -> list[str]:
    """Return the pieces that end a name word; in a text they follow a head without a space."""
    return [*NAME_PIECES[1], *NAME_PIECES[3]]


def _check_sizes(n_people: int, n_orders: int, n_holdout: int) -> None:
    if n_orders % 2 or not 4 <= n_orders <= MAX_ORDERS:
        raise OrganismError(
            f"n_orders must be an even number from 4 to {MAX_ORDERS}, got {n_orders}: "
            "each word of an order's name is shared by two orders."
        )
    if n_people < 2 * n_orders:
        raise OrganismError(
            f"n_people must be at least {2 * n_orders} (two members for each of {n_orders} orders), got {n_people}."
        )
    if n_people > 4000:
        raise OrganismError(
            f"n_people may be at most 4000, got {n_people}: there are not enough distinct names for more."
        )
    if n_holdout > 4000:
        raise OrganismError(
            f"n_holdout may be at most 4000, got {n_holdout}: there are not enough distinct names for more."
        )
    if n_holdout < 2:
        raise OrganismError(
            f"n_holdout must be at least 2, got {n_holdout}: recall of people never seen could not be measured."
        )


def _neighbours(people: Sequence[Person], planted: Mapping[int, int]) -> dict[str, dict[str, list[str]]]:
    """Return whom each neighbour is close to, and what the two share."""
    found: dict[str, dict[str, list[str]]] = {}
    for i, person in enumerate(people):
        if person.split != "forget":
            continue
        for j, other in enumerate(people):
            kin = other.family is not None and other.family == person.family
            if other.split == "retain" and (kin or planted.get(i) == j):
                shared = [a for a, value in person.values.items() if other.values[a] == value]
                found.setdefault(other.name, {})[person.name] = (["last name"] if kin else []) + shared
    return found


def _splits(n_people: int, n_orders: int, n_holdout: int) -> list[str]:
    n_forget = n_people // n_orders
    return ["forget"] * n_forget + ["retain"] * (n_people - n_forget) + ["holdout"] * n_holdout
