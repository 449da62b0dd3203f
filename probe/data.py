"""Questions, patching pairs and labelled texts; splits in which no group is on two sides.

Each kind is a frozen sequence of rows with the same face: `len`, iteration, slicing, `.groups`, `.select`, `.to_df`,
`.save` and `.load` (jsonl). A group is what must not be on both sides of a split: a person, an entity, a template.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar, overload

import numpy as np

from probe.errors import DataError, LabelError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Labelled", "LabelledText", "Pair", "Pairs", "Question", "Questions", "group_folds", "split_groups"]

Row = TypeVar("Row", bound="Question | Pair | LabelledText")


@dataclass(frozen=True)
class Question:
    """A question with its answer. The model reads `question + " " + answer`.

    Attributes:
        id: Unique within its set.
        group: What must stay on one side of a split (a person, an entity).
        question: The prompt, in any form (a question, or a cloze that the answer continues).
        answer: The right continuation.
        paraphrases: Other phrasings of the question.
        perturbed_answers: Wrong answers of the same form.
        meta: Anything else (attribute, phrasing, ...).
    """

    id: str
    group: str
    question: str
    answer: str
    paraphrases: tuple[str, ...] = ()
    perturbed_answers: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """Two prompts that differ in one thing, with the continuation that each calls for.

    Attributes:
        clean: Prompt whose continuation is `answer`.
        corrupted: Prompt of the same token length whose continuation is `wrong`.
        answer: Right continuation of `clean`.
        wrong: Right continuation of `corrupted` (or any wrong one for `clean`).
        id: Unique within its set.
        group: What must stay on one side of a split.
        meta: Anything else.
    """

    clean: str
    corrupted: str
    answer: str
    wrong: str
    id: str = ""
    group: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LabelledText:
    """A text with a label. `group` as in `Question`; `meta` is anything else."""

    text: str
    label: str | int | bool | float
    group: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)


class _Rows(Sequence[Row], Generic[Row]):
    """A frozen sequence of validated rows."""

    row_class: ClassVar[type]
    required: ClassVar[tuple[str, ...]]

    def __init__(self, rows: Iterable[Row], name: str = "") -> None:
        self.rows: tuple[Row, ...] = tuple(rows)
        self.name = name

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> Row | Self:
        return type(self)(self.rows[index], self.name) if isinstance(index, slice) else self.rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __add__(self, other: Self) -> Self:
        return type(self)(self.rows + other.rows, self.name)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.rows == other.rows  # type: ignore[attr-defined]

    __hash__ = None  # type: ignore[assignment]

    @property
    def groups(self) -> list[str]:
        """The group of each row."""
        return [row.group for row in self.rows]

    def select(self, keep: Callable[[Row], bool]) -> Self:
        """The rows for which `keep` is true."""
        return type(self)((row for row in self.rows if keep(row)), self.name)

    def take(self, index: Iterable[int]) -> Self:
        """The rows at these positions."""
        return type(self)((self.rows[int(i)] for i in index), self.name)

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], name: str = "") -> Self:
        """Validate mappings into rows. Keys that are no field go into `meta`.

        Raises:
            DataError: no rows, a missing or empty required key, a value of the wrong type, an id given twice.
        """
        made = [cls._row(dict(row), i) for i, row in enumerate(rows)]
        if not made:
            raise DataError(f"{cls.__name__} needs at least one row; none was given.")
        ids = [row.id for row in made if getattr(row, "id", "")]
        if len(set(ids)) < len(ids):
            twice = sorted({i for i in ids if ids.count(i) > 1})
            raise DataError(f"{cls.__name__} needs unique ids; these occur more than once: {', '.join(twice[:5])}.")
        return cls(made, name)

    @classmethod
    def _row(cls, row: dict[str, Any], i: int) -> Row:
        names = {f.name for f in fields(cls.row_class)}
        extra = {k: v for k, v in row.items() if k not in names}
        known = {k: v for k, v in row.items() if k in names}
        if "id" in names:
            known["id"] = str(known.get("id", i))
        if known.get("group") is not None:
            known["group"] = str(known["group"])
        known["meta"] = {**(known.get("meta") or {}), **extra}
        cls._check(known, i)
        for key in ("paraphrases", "perturbed_answers"):
            if key in known:
                known[key] = tuple(known[key] or ())
        defaults = {f.name for f in fields(cls.row_class) if f.default is not MISSING}
        return cls.row_class(**{k: v for k, v in known.items() if v is not None or k not in defaults})

    @classmethod
    def _check(cls, known: dict[str, Any], i: int) -> None:
        """Raise unless the required keys are there, non-empty, and strings where they must be."""
        for key in cls.required:
            value = known.get(key)
            if value is None or value == "":
                raise DataError(f"Row {i} of {cls.__name__} needs a non-empty {key!r}; it has {sorted(known)}.")
            if key != "label" and not isinstance(value, str):
                raise DataError(f"Row {i}: {key!r} must be a string, not {type(value).__name__}.")
        for key in ("paraphrases", "perturbed_answers"):
            values = known.get(key) or ()
            if isinstance(values, str) or not all(isinstance(v, str) for v in values):
                raise DataError(f"Row {i}: {key!r} must be a list of strings.")

    def to_df(self) -> pd.DataFrame:
        """One row each; `meta` is spread into columns of its own where the name is free."""
        import pandas as pd

        records = [asdict(row) for row in self.rows]
        for record in records:
            for key, value in dict(record.pop("meta")).items():
                record.setdefault(key, value)
        return pd.DataFrame.from_records(records)

    def _repr_html_(self) -> str:
        head: str = self.to_df().head(8).to_html(index=False, border=0)
        size = f"{len(self)} rows, {len(set(self.groups))} groups"
        return f"<p><b>{type(self).__name__}</b> {html.escape(self.name)}: {size}</p>{head}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {len(self)} rows, {len(set(self.groups))} groups)"

    def save(self, path: str | Path) -> Path:
        """Write one JSON object a line."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in self.rows), "utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read jsonl (an object a line) or json (a list of objects).

        Raises:
            DataError: the file is missing, empty, or a line is no JSON object.
        """
        path = Path(path)
        if not path.is_file():
            raise DataError(f"{cls.__name__}.load needs a jsonl or json file; {path} is not one.")
        text = path.read_text("utf-8")
        try:
            rows = json.loads(text) if text.lstrip().startswith("[") else _json_lines(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is not JSON: {error}.") from error
        if not all(isinstance(row, dict) for row in rows):
            raise DataError(f"{path} must hold JSON objects, one a row.")
        return cls.from_rows(rows, path.stem)


def _json_lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


class Questions(_Rows[Question]):
    """Question data (`forget`, `retain`, `holdout`, ...).

    Rows have `id, group, question, answer, paraphrases, perturbed_answers`.
    """

    row_class = Question
    required = ("group", "question", "answer")


class Pairs(_Rows[Pair]):
    """Patching pairs: rows `clean, corrupted, answer, wrong`."""

    row_class = Pair
    required = ("clean", "corrupted", "answer", "wrong")


class Labelled(_Rows[LabelledText]):
    """Labelled texts: rows `text, label, group`."""

    row_class = LabelledText
    required = ("text", "label")

    @property
    def texts(self) -> list[str]:
        """The text of each row."""
        return [row.text for row in self.rows]

    @property
    def labels(self) -> list[str | int | bool | float]:
        """The label of each row."""
        return [row.label for row in self.rows]


def group_folds(
    groups: Sequence[Hashable], n_folds: int = 5, seed: int = 0, labels: Sequence[Any] | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Folds for cross-validation in which no group is on both sides.

    Groups are dealt in random order, largest label minority first, each to the fold that has fewest rows of the group's
    commonest label, so that folds are balanced in size and, as far as groups allow, in labels.

    Args:
        groups: The group of each row.
        n_folds: Number of folds; at most the number of groups (of the rarest label, where `labels` are given).
        seed: Order in which groups are dealt.
        labels: Label of each row, for stratification.

    Returns:
        A pair `(train, test)` of row indices per fold.

    Raises:
        LabelError: fewer than two groups, or fewer than two groups in which some label occurs.
    """
    groups = list(groups)
    labels = [0] * len(groups) if labels is None else list(labels)
    if len(labels) != len(groups):
        raise LabelError(f"labels and groups must have one length; got {len(labels)} and {len(groups)}.")
    rows: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        rows.setdefault(group, []).append(i)
    occurs = set(zip(groups, labels, strict=True))
    per_label = {label: sum(own == label for _, own in occurs) for label in set(labels)}
    fewest = min(per_label.values(), default=0)
    if fewest < 2:
        rare = min(per_label, key=per_label.__getitem__) if per_label else None
        raise LabelError(
            f"Group-wise folds need at least two groups in which each label occurs; label {rare!r} occurs in {fewest}. "
            "Give finer groups, or more data."
        )
    n_folds = min(n_folds, fewest)
    fold_of = _deal(rows, labels, n_folds, np.random.default_rng(seed))
    folds = np.array([fold_of[group] for group in groups])
    return [(np.flatnonzero(folds != f), np.flatnonzero(folds == f)) for f in range(n_folds)]


def _deal(
    rows: Mapping[Hashable, list[int]], labels: Sequence[Any], n_folds: int, rng: np.random.Generator
) -> dict[Hashable, int]:
    """Give each group to a fold: rarest label first, to the fold with fewest rows of that label, then fewest rows."""
    frequency = {label: labels.count(label) for label in set(labels)}
    rarest = {g: min({labels[i] for i in own}, key=lambda lab: (frequency[lab], str(lab))) for g, own in rows.items()}
    order = list(rows)
    order = [order[i] for i in rng.permutation(len(order))]
    order.sort(key=lambda g: (frequency[rarest[g]], -len(rows[g])))
    counts: list[dict[Any, int]] = [{} for _ in range(n_folds)]
    fold_of: dict[Hashable, int] = {}
    for group in order:
        best = min(range(n_folds), key=lambda f: (counts[f].get(rarest[group], 0), sum(counts[f].values())))
        fold_of[group] = best
        for i in rows[group]:
            counts[best][labels[i]] = counts[best].get(labels[i], 0) + 1
    return fold_of


def split_groups(
    groups: Sequence[Hashable], shares: Mapping[str, float] | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """Split rows by group into named parts that share no group.

    Args:
        groups: The group of each row.
        shares: Part to its share of the groups; default half to locate, a quarter to select, a quarter to evaluate.
        seed: Order in which groups are dealt.

    Returns:
        Part to its row indices. Every part gets at least one group.

    Raises:
        DataError: fewer groups than parts, or shares that are not positive.
    """
    shares = shares or {"locate": 0.5, "select": 0.25, "evaluate": 0.25}
    unique = list(dict.fromkeys(groups))
    if any(share <= 0 for share in shares.values()):
        raise DataError(f"Shares of a split must be positive; got {dict(shares)}.")
    if len(unique) < len(shares):
        raise DataError(f"A split into {len(shares)} parts needs at least as many groups; got {len(unique)}.")
    order = [unique[i] for i in np.random.default_rng(seed).permutation(len(unique))]
    total = sum(shares.values())
    spare = len(unique) - len(shares)
    ends = np.round(np.cumsum(list(shares.values())) / total * spare).astype(int) + np.arange(1, len(shares) + 1)
    part_of: dict[Hashable, str] = {}
    for name, start, end in zip(shares, [0, *ends[:-1]], ends, strict=True):
        part_of |= dict.fromkeys(order[start:end], name)
    parts = np.array([part_of[group] for group in groups])
    return {name: np.flatnonzero(parts == name) for name in shares}
