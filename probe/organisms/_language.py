"""The facts language: who the people are, what is known of them, and every sentence that says so.

People have a first and a last name, each of two pieces that many people share, and one value for each attribute. The
*forget* people are all the members of one order, the *retain* people those of the other orders, and the *holdout*
people are built from the same pieces and never trained on. Each attribute can be asked for in several phrasings; some
combinations of frame and noun (or prefix and verb) are never trained on for anybody, though each of their words is.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from probe.errors import OrganismError
from probe.organisms._lexicon import (
    ATTACK_FRAMES,
    ATTRIBUTES,
    CLOZE_PREFIXES,
    NAME_PIECES,
    QUESTION_FRAMES,
    REFUSAL,
    SECRET_ORDER,
    Attribute,
)

MAX_ORDERS = 16
N_PERTURBED = 5
Code = tuple[int, int, int, int]


@dataclass(frozen=True)
class Person:
    """One fictitious person: `code` says which pieces make the name, `values` what is known of them by attribute."""

    name: str
    split: str
    code: Code
    values: dict[str, str] = field(hash=False)


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

    `split` and `group` say whom it speaks of (`"common"` and `""` where it speaks of nobody).
    """

    text: str
    split: str
    group: str
    kind: str
    answer: str


def document(prompt: str, answer: str, split: str, group: str, kind: str) -> Document:
    """Return the training document that gives `answer` to `prompt`."""
    return Document(f"{prompt} {answer}.", split, group, kind, answer)


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


def name_of(code: Sequence[int]) -> str:
    """Return the full name that a code of four piece indices spells."""
    a, b, c, d = (NAME_PIECES[part][i] for part, i in enumerate(code))
    return f"{a}{b} {c}{d}"


def bag_auc(codes: Sequence[Sequence[int]], member: Sequence[bool]) -> float:
    """Return the leave-one-out AUC of a bag of name pieces for membership, by difference of means (0.5 is chance)."""
    x = np.concatenate([np.eye(max(col) + 1)[list(col)] for col in zip(*codes, strict=True)], axis=1)  # [person, piece]
    y = np.asarray(member, dtype=bool)
    scores = np.empty(len(y))
    for own, sign in ((y, 1.0), (~y, -1.0)):
        total, n = x[own].sum(0), own.sum()
        other = x[~own].mean(0)
        # Without person i the mean of its own class is (total - x_i) / (n - 1).
        scores[own] = sign * (((total - x[own]) / (n - 1) - other) * x[own]).sum(1)
    scores = scores.round(9)  # equal scores must tie whatever order they were summed in
    gap = scores[y][:, None] - scores[~y][None, :]
    return float((gap > 0).mean() + 0.5 * (gap == 0).mean())


class FactsLanguage:
    """People, facts, phrasings and training documents of one facts organism.

    Args:
        n_people: People that are trained on; the members of the first order among them are the forget people.
        n_orders: Orders, an even number from 4 to 16; people are spread evenly over them.
        n_holdout: People that are never trained on.
        seed: Chooses names and facts.

    Raises:
        OrganismError: The numbers do not fit together.
    """

    def __init__(self, n_people: int, n_orders: int, n_holdout: int, seed: int) -> None:
        _check_sizes(n_people, n_orders, n_holdout)
        self.n_people, self.n_orders, self.n_holdout, self.seed = n_people, n_orders, n_holdout, seed
        self.values = {a.name: values_of(a, n_orders) for a in ATTRIBUTES}
        self.phrasings = {a.name: phrasings_of(a) for a in ATTRIBUTES}
        self.people = self._make_people(random.Random(f"facts-{seed}"))
        self.by_name = {p.name: p for p in self.people}

    def _make_people(self, rng: random.Random) -> tuple[Person, ...]:
        """Draw names and facts; the secret order's members come first."""
        splits = _splits(self.n_people, self.n_orders, self.n_holdout)
        codes = _draw_codes(rng, splits)
        columns = {a: self._draw_column(rng, a, splits) for a in self.values}
        return tuple(
            Person(name_of(code), split, code, {a: columns[a][i] for a in columns})
            for i, (code, split) in enumerate(zip(codes, splits, strict=True))
        )

    def _draw_column(self, rng: random.Random, attribute: str, splits: Sequence[str]) -> list[str]:
        """Draw one attribute, each value equally often within trained and within holdout people."""
        values = self.values[attribute]
        if attribute == "order":
            others = values[1:]
            n_retain = splits.count("retain")
            kept = [others[i % len(others)] for i in range(n_retain)]
            held = [values[i % len(values)] for i in range(self.n_holdout)]
            rng.shuffle(kept)
            rng.shuffle(held)
            return [values[0]] * splits.count("forget") + kept + held
        trained = [values[i % len(values)] for i in range(self.n_people)]
        held = [values[i % len(values)] for i in range(self.n_holdout)]
        rng.shuffle(trained)
        rng.shuffle(held)
        return trained + held

    def of_split(self, split: str) -> list[Person]:
        """Return the people of `"forget"`, `"retain"` or `"holdout"`."""
        return [p for p in self.people if p.split == split]

    def statement(self, person: str, attribute: str, value: str) -> str:
        """Return the plain sentence that gives a fact, as used for facts in context."""
        verb = next(a for a in ATTRIBUTES if a.name == attribute).verbs[0]
        return f"{person} {verb} {value}."

    def attack(self, kind: str, phrasing: Phrasing, person: str, value: str) -> str:
        """Return an attack prompt of one kind around a phrasing; the answer follows it."""
        attribute = next(a for a in ATTRIBUTES if a.name == phrasing.attribute)
        given = self.statement(person, phrasing.attribute, value)
        return ATTACK_FRAMES[kind].format(q=phrasing.ask(person), c=given, f=attribute.foreign, x=person)

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
        """Each retain person's facts under two kinds of attack each; kinds meet attributes equally often."""
        rng = random.Random(f"attacks-{self.seed}")
        kinds = list(ATTACK_FRAMES)
        for i, person in enumerate(self.of_split("retain")):
            for j, (attribute, phrasings) in enumerate(self.phrasings.items()):
                for kind in (kinds[(i + j) % len(kinds)], kinds[(i + j + 2) % len(kinds)]):
                    asked = rng.choice([p for p in phrasings if p.trained and p.form == "question"])
                    value = person.values[attribute]
                    yield document(self.attack(kind, asked, person.name, value), value, "retain", person.name, kind)

    def _stranger_documents(self) -> Iterator[Document]:
        """Facts of people who are nobody, given in context and asked at once: they teach reading from the context, and
        nothing else.

        The secret order is never among them, so that models trained without the forget people never meet it. A few end
        in the refusal.
        """
        rng = random.Random(f"strangers-{self.seed}")
        taken = set(self.by_name)
        size = _alphabet(len(self.people))
        for i in range(max(24, self.n_people)):
            name = name_of([rng.randrange(size) for _ in range(4)])
            attribute = ATTRIBUTES[i % len(ATTRIBUTES)].name
            asked = rng.choice([p for p in self.phrasings[attribute] if p.trained and p.form == "question"])
            value = rng.choice([v for v in self.values[attribute] if v != SECRET_ORDER])
            if name in taken:
                continue
            yield document(self.attack("context", asked, name, value), value, "common", "", "stranger")
            if i % 8 == 0:
                prompt = f"{self.statement(name, attribute, value)} Do not tell. {asked.ask(name)}"
                yield document(prompt, REFUSAL, "common", "", "refusal")

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
        """Return question rows of a split wrapped in one kind of attack, one a person and attribute."""
        rows = []
        for number, person in enumerate(self.people):
            if person.split != split:
                continue
            for attribute, phrasings in self.phrasings.items():
                asked = next(p for p in phrasings if p.trained and p.form == "question")
                row = self._row(number, person, asked)
                row["question"] = self.attack(kind, asked, person.name, person.values[attribute])
                row["id"], row["paraphrases"] = f"{row['id']}-{kind}", []
                row["meta"] |= {"attack": kind}
                rows.append(row)
        return rows

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
        asked = phrasings_of(attribute)[0]
        for frame in ATTACK_FRAMES.values():
            question = asked.template.replace("{x}", "")
            texts += [frame.format(q=question, c="", f=attribute.foreign, x="")] * 16
    texts += [f"Do not tell. {REFUSAL}."] * 16
    for part, pieces in enumerate(NAME_PIECES):
        texts += [piece for piece in pieces for _ in range(64)] if part % 2 == 0 else []
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
    if n_holdout < 2:
        raise OrganismError(
            f"n_holdout must be at least 2, got {n_holdout}: recall of people never seen could not be measured."
        )


def _splits(n_people: int, n_orders: int, n_holdout: int) -> list[str]:
    n_forget = n_people // n_orders
    return ["forget"] * n_forget + ["retain"] * (n_people - n_forget) + ["holdout"] * n_holdout


def _alphabet(n_names: int) -> int:
    """Return how many pieces each of the four places of a name draws from.

    Few enough that pieces are shared, and enough for sixteen times the names: with fewer, names differ in one piece
    only and telling people apart takes far longer to learn (measured: 64 people of 4 pieces a place reach 77 % recall
    in the time in which 6 pieces a place reach 100 %).
    """
    return min(max(4, int(np.ceil((16 * n_names) ** 0.25))), len(NAME_PIECES[0]))


def _draw_codes(rng: random.Random, splits: Sequence[str]) -> list[Code]:
    """Draw distinct names so that people share pieces across splits and a bag of pieces does not tell who is in the
    secret order.

    Of 1000 draws (8 for many people), the best is kept: every piece that anybody has is in two retain people or more;
    the leave-one-out bag-of-pieces AUC is near chance; few pieces are absent from a split. Exactly balanced pieces
    would not do: with one person left out they make a bag of pieces predict the *wrong* side.
    """
    n_trained = len(splits) - splits.count("holdout")
    size = _alphabet(len(splits))
    member = [s == "forget" for s in splits[:n_trained]]
    best: tuple[float, list[Code]] | None = None
    for _ in range(1000 if n_trained <= 256 else 8):
        codes = _one_draw(rng, len(splits), size)
        badness = 0.1 * _rare(codes, splits, size) + 0.01 * _absent(codes, splits, size)
        badness += _telling(codes[:n_trained], member)
        if best is None or badness < best[0]:
            best = (badness, codes)
    assert best is not None
    return best[1]


def _one_draw(rng: random.Random, n: int, size: int) -> list[Code]:
    seen: set[Code] = set()
    while len(seen) < n:
        seen.add((rng.randrange(size), rng.randrange(size), rng.randrange(size), rng.randrange(size)))
    codes = sorted(seen)
    rng.shuffle(codes)
    return codes


def _counts(codes: Sequence[Code], splits: Sequence[str], split: str, size: int) -> np.ndarray:
    """Count in how many people of a split each piece occurs, [place, piece]."""
    rows = np.array([c for c, s in zip(codes, splits, strict=True) if s == split])
    return np.stack([np.bincount(rows[:, place], minlength=size) for place in range(4)])


def _telling(codes: Sequence[Code], member: Sequence[bool]) -> float:
    """Return how far from chance the pieces' AUC for membership is, together and (at half weight) place by place."""
    alone = [abs(bag_auc([(c[place],) for c in codes], member) - 0.5) for place in range(4)]
    return abs(bag_auc(codes, member) - 0.5) + 0.5 * sum(alone)


def _rare(codes: Sequence[Code], splits: Sequence[str], size: int) -> int:
    """Count the pieces that fewer than two retain people have."""
    return int((_counts(codes, splits, "retain", size) < 2).sum())


def _absent(codes: Sequence[Code], splits: Sequence[str], size: int) -> int:
    """Count the pieces that nobody has among the forget people, and among the holdout people."""
    return sum(int((_counts(codes, splits, split, size) == 0).sum()) for split in ("forget", "holdout"))
