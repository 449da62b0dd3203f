"""Who the people of a facts organism are: names that share pieces, families, facts, and neighbours.

Half of the people belong to *families*: all who bear a family's last name live in one city and have one trade, so what
a forget person shares with a family follows from its retained members. All others bear common last names, from which
nothing follows. *Neighbours* are retained people close to a forget one: kin, or people planted to share two attributes.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from probe.errors import OrganismError
from probe.organisms._lexicon import FAMILY_ATTRIBUTES, NAME_PIECES

Code = tuple[int, int, int, int]
Columns = dict[str, list[str]]
SHARE = 4  # at most one name in four is drawn
MANY = 256  # people from which on fewer draws of names are tried


@dataclass(frozen=True)
class Person:
    """One fictitious person: `code` says which pieces make the name, `values` what is known of them by attribute.

    `family` is the number of the person's family, or None.
    """

    name: str
    split: str
    code: Code
    values: dict[str, str] = field(hash=False)
    family: int | None = None

    @property
    def last_name(self) -> str:
        """The last name."""
        return self.name.split()[1]


def name_of(code: Sequence[int]) -> str:
    """Return the full name that a code of four piece indices spells."""
    a, b, c, d = (NAME_PIECES[part][i] for part, i in enumerate(code))
    return f"{a}{b} {c}{d}"


def plan_families(splits: Sequence[str]) -> list[int | None]:
    """Return the family of each person, None for half of the forget and retain people and all holdout people.

    Where there are enough people, half of the families have no forget member, so that bearing a family's name says
    nothing about being a forget person. Every family has two retained members or more.
    """
    n_forget, n_retain = splits.count("forget") // 2, splits.count("retain") // 2
    n = min(max(n_forget, min(2 * n_forget, n_retain // 3)), alphabet(len(splits)) ** 2 // 2)
    left = {"forget": n_forget, "retain": n_retain, "holdout": 0}
    found: list[int | None] = []
    for split in splits:
        left[split] -= 1
        found.append(left[split] % n if left[split] >= 0 else None)
    return found


def draw_columns(
    rng: random.Random, values: Mapping[str, Sequence[str]], splits: Sequence[str], families: Sequence[int | None]
) -> Columns:
    """Draw each attribute, each value about equally often within trained and within holdout people."""
    trained = [i for i, split in enumerate(splits) if split != "holdout"]
    columns: Columns = {}
    for attribute, own in values.items():
        if attribute == "order":
            first = [own[0]] * splits.count("forget")
            column = first + _even(rng, own[1:], splits.count("retain"))
        elif attribute in FAMILY_ATTRIBUTES:
            column = _by_family(rng, own, [families[i] for i in trained])
        else:
            column = _even(rng, own, len(trained))
        columns[attribute] = column + _even(rng, own, len(splits) - len(trained))
    return columns


def _even(rng: random.Random, values: Sequence[str], n: int) -> list[str]:
    """Return `n` values in random order, each equally often."""
    drawn = [values[i % len(values)] for i in range(n)]
    rng.shuffle(drawn)
    return drawn


def _by_family(rng: random.Random, values: Sequence[str], families: Sequence[int | None]) -> list[str]:
    """Return one value for each family's members, and for all others values that even out the counts."""
    order = list(values)
    rng.shuffle(order)
    column = ["" if f is None else order[f % len(order)] for f in families]
    counts = {value: column.count(value) for value in order}
    fill = []
    for _ in range(column.count("")):
        value = min(order, key=lambda v: counts[v])
        counts[value] += 1
        fill.append(value)
    rng.shuffle(fill)
    return [value or fill.pop() for value in column]


def plant_neighbours(
    rng: random.Random,
    columns: Columns,
    splits: Sequence[str],
    codes: Sequence[Code],
    families: Sequence[int | None],
) -> dict[int, int]:
    """Give each forget person a retained neighbour of another name who shares two attributes with them.

    Values are exchanged among retained people, so each occurs as often as before. A neighbour is outside all families
    and shares neither first nor last name with the forget person, or the gold could guess from the name.

    Returns:
        The neighbour of each forget person, by position.
    """
    retain = [i for i, split in enumerate(splits) if split == "retain"]
    outside = [i for i in retain if families[i] is None]
    rng.shuffle(outside)
    found: dict[int, int] = {}
    pinned: set[tuple[int, str]] = set()
    for person in (i for i, split in enumerate(splits) if split == "forget"):
        free = [i for i in outside if i not in found.values() and _unlike(codes[i], codes[person])]
        if not free:
            continue
        found[person] = mate = free[0]
        shareable = [a for a in columns if a != "order" and (families[person] is None or a not in FAMILY_ATTRIBUTES)]
        for attribute in rng.sample(shareable, 2):
            pool = outside if attribute in FAMILY_ATTRIBUTES else retain
            _give(
                columns[attribute], mate, columns[attribute][person], [i for i in pool if (i, attribute) not in pinned]
            )
            pinned.add((mate, attribute))
    return found


def _unlike(a: Code, b: Code) -> bool:
    return a[:2] != b[:2] and a[2:] != b[2:]


def _give(column: list[str], person: int, value: str, pool: Sequence[int]) -> None:
    """Give a person a value, in exchange with somebody of the pool who has it, if there is one."""
    owner = next((i for i in pool if column[i] == value and i != person), None)
    if column[person] != value and owner is not None:
        column[owner] = column[person]
    column[person] = value


def alphabet(n_names: int) -> int:
    """Return how many pieces each of the four places of a name draws from.

    Few enough that pieces are shared, and enough for sixteen times the names: with fewer, names differ in one piece
    only and telling people apart takes far longer to learn (measured: 64 people of 4 pieces a place reach 77 % recall
    in the time in which 6 pieces a place reach 100 %).
    """
    return min(max(4, int(np.ceil((16 * n_names) ** 0.25))), len(NAME_PIECES[0]))


def draw_codes(rng: random.Random, splits: Sequence[str], families: Sequence[int | None] | None = None) -> list[Code]:
    """Draw distinct names so that people share pieces across splits and a bag of pieces does not tell who is in the
    secret order.

    Members of a family share their last name with one another and with nobody else. Of 1000 draws (8 for many people),
    the best is kept: every piece that anybody has is in two retain people or more; the leave-one-out bag-of-pieces AUC
    is near chance; few pieces are absent from a split. Exactly balanced pieces would not do: with one person left out
    they make a bag of pieces predict the *wrong* side.

    Raises:
        OrganismError: More people than there are names for.
    """
    most = len(NAME_PIECES[0]) ** 4 // SHARE
    if len(splits) > most:
        raise OrganismError(f"At most {most} people can be named, all splits together; {len(splits)} were asked for.")
    n_trained = len(splits) - splits.count("holdout")
    size = alphabet(len(splits))
    families = [None] * len(splits) if families is None else families
    member = [s == "forget" for s in splits[:n_trained]]
    best: tuple[float, list[Code]] | None = None
    for _ in range(1000 if n_trained <= MANY else 8):
        codes = _one_draw(rng, families, size)
        badness = 0.1 * _rare(codes, splits, size) + 0.01 * _absent(codes, splits, size)
        if best is None or badness < best[0]:  # the rest costs most
            badness += _telling(codes[:n_trained], member)
        if best is None or badness < best[0]:
            best = (badness, codes)
    assert best is not None
    return best[1]


def _one_draw(rng: random.Random, families: Sequence[int | None], size: int) -> list[Code]:
    n = 1 + max((f for f in families if f is not None), default=-1)
    if not n:
        return _without_families(rng, len(families), size)
    lasts = [(c, d) for c in range(size) for d in range(size)]
    rng.shuffle(lasts)
    own, common = lasts[:n], lasts[n:]
    codes: dict[Code, None] = {}
    for family in families:
        before = len(codes)
        while len(codes) == before:
            c, d = common[rng.randrange(len(common))] if family is None else own[family]
            codes[rng.randrange(size), rng.randrange(size), c, d] = None
    return list(codes)


def _without_families(rng: random.Random, n: int, size: int) -> list[Code]:
    seen: set[Code] = set()
    while len(seen) < n:
        seen.add((rng.randrange(size), rng.randrange(size), rng.randrange(size), rng.randrange(size)))
    codes = sorted(seen)
    rng.shuffle(codes)
    return codes


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
