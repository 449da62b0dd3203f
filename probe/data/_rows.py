"""Questions, patching pairs and labelled texts: frozen sequences of validated rows."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar, overload

from probe.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

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
        paraphrased_answers: The right answer in other words, as in TOFU.
    """

    id: str
    group: str
    question: str
    answer: str
    paraphrases: tuple[str, ...] = ()
    perturbed_answers: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    paraphrased_answers: tuple[str, ...] = ()


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


_LISTS = ("paraphrases", "perturbed_answers", "paraphrased_answers")


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
        return type(self) is type(other) and self.rows == other.rows

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
        ids = [str(own) for row in made if (own := getattr(row, "id", ""))]
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
        for key in _LISTS:
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
        for key in _LISTS:
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

    Rows have `id, group, question, answer, paraphrases, perturbed_answers, paraphrased_answers`.
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
