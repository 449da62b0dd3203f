"""One reader for every way people hold their data: texts or token ids, with label columns beside them.

Files, data sets and generators are gone through once, row by row; texts and ids of more than a few MiB wait in a
temporary file (`activations_cache._spool`), so that a corpus need not fit in memory.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from activations_cache._spool import FlatArray, IdRows, NestedValues, Texts, is_nested
from activations_cache.columns import lone_surrogate, plain_scalar
from activations_cache.errors import DataError

FILE_SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
CHUNK_ROWS = 4096  # rows of a table that are held at once
TURNS = ("question", "answer")
MAX_ID = 2**31 - 1


@dataclass(frozen=True)
class Documents:
    """Documents as read: texts or token ids, one per row, and columns beside them.

    Attributes:
        texts: One string per document, or None when the data held token ids. A list, or a sequence that reads its
            texts from a temporary file.
        input_ids: One list of token ids per document, or None when the data held texts.
        columns: Every other column, as read; each has one entry per document.
        turns: The texts are the columns `question` and `answer`, joined by a space.
    """

    texts: Sequence[str] | None
    input_ids: Sequence[Sequence[int]] | None = None
    columns: dict[str, Sequence[Any]] = field(default_factory=dict)
    turns: bool = False

    def __len__(self) -> int:
        held = self.texts if self.texts is not None else self.input_ids
        return len(held) if held is not None else 0


def read_documents(data: Any, text_column: str = "text") -> Documents:
    """Read documents from whatever holds them.

    Args:
        data: A list of strings, of token-id lists or of row dicts; a path to a .txt (one document a line, blank lines
            are none), .jsonl, .json (a list, or lines), .csv, .tsv or .parquet file, or to a directory that a Hugging
            Face dataset's `save_to_disk` wrote; a pandas DataFrame; a Hugging Face dataset (one split); a generator of
            rows, used up; anything with `.to_df()`; or `Documents`, returned as they are.
        text_column: The column that holds the text. A column `input_ids` takes its place where there is one; rows with
            neither, but with columns `question` and `answer`, have the text `question + " " + answer`.

    Returns:
        The documents, with every other column beside them. Everything but a JSON list is read row by row; texts and
        ids beyond 32 MiB are kept in a temporary file, label columns in memory.

    Raises:
        DataError: No document, an empty document, no text column, an unreadable or unknown file, no room for the
            temporary file.
    """
    if isinstance(data, Documents):
        return _checked(data)
    if isinstance(data, list) and data and all(isinstance(text, str) for text in data):
        return _checked(Documents(texts=data))
    if isinstance(data, str | Path):
        path = Path(data)
        source, rows = str(path), _read_dataset(path) if path.is_dir() else _read_file(path, text_column)
    else:
        source, rows = "data", _rows_of(data)
    reader = _Reader(source, text_column, spool=not isinstance(data, list))
    for row in rows:
        reader.add(row)
    return reader.finish()


# --- rows, one after the other --------------------------------------------------------------------------------------


def _rows_of(data: Any) -> Iterator[Any]:
    """The rows of an object: strings, id lists or dicts."""
    if hasattr(data, "to_df"):
        data = data.to_df()
    if isinstance(data, Mapping):
        raise DataError(
            "data is a mapping (a dataset with several splits?); one split, or a list of rows, was required: "
            f"pass data[name] for one of {', '.join(map(str, data))}"
        )
    if hasattr(data, "to_dict") and hasattr(data, "columns"):  # a DataFrame
        return _rows_of_frame(data)
    if hasattr(data, "tolist") and getattr(data, "ndim", 0) < 2:  # a flat array, of texts perhaps
        data = data.tolist()
    if not isinstance(data, Iterable):
        raise DataError(f"data must be a list, a path, a DataFrame or a dataset; got {type(data).__name__}")
    return iter(data)


def _rows_of_frame(frame: Any) -> Iterator[Any]:
    for start in range(0, len(frame), CHUNK_ROWS):
        yield from frame.iloc[start : start + CHUNK_ROWS].to_dict("records")


def _read_dataset(path: Path) -> Iterator[Any]:
    """The rows of a Hugging Face dataset that was written with `save_to_disk`."""
    if not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
        raise DataError(f"{path} is a directory, but no Hugging Face dataset that was written with save_to_disk")
    from datasets import load_from_disk

    try:
        return _rows_of(load_from_disk(str(path)))
    except (ValueError, OSError) as error:
        raise DataError(f"{path} could not be read as a Hugging Face dataset: {error}") from error


def _read_file(path: Path, text_column: str) -> Iterator[Any]:
    if not path.is_file():
        raise DataError(f"no data file at {path}; expected a file ending in one of {', '.join(FILE_SUFFIXES)}")
    suffix = path.suffix.lower()
    if suffix not in FILE_SUFFIXES:
        raise DataError(f"{path}: unknown kind of data file {suffix!r}; expected one of {', '.join(FILE_SUFFIXES)}")
    try:
        if suffix == ".txt":
            yield from _read_txt(path)
        elif suffix == ".jsonl":
            yield from _read_jsonl(path)
        elif suffix == ".json":
            yield from _read_json(path)
        elif suffix == ".parquet":
            yield from _read_parquet(path)
        else:
            yield from _read_table(path, "\t" if suffix == ".tsv" else ",", text_column)
    except (ValueError, OSError) as error:  # bad UTF-8, bad JSON, bad parquet
        raise DataError(f"{path} could not be read as {suffix[1:]} in UTF-8: {error}") from error


def _read_txt(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield from (part for part in line.splitlines() if part.strip())


def _read_jsonl(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number} is no JSON: {error}") from error


def _read_json(path: Path) -> Iterator[Any]:
    """The rows of a JSON list; or of lines of JSON, which many data sets call .json as well."""
    if _has_lines(path):
        yield from _read_jsonl(path)
        return
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list):
        raise DataError(f"{path} must hold a JSON list of texts or of rows; got {type(rows).__name__}")
    yield from rows


def _has_lines(path: Path) -> bool:
    """Whether the first line is a whole JSON object, and not the only one."""
    with path.open(encoding="utf-8") as file:
        lines = (line for line in file if line.strip())
        first, second = next(lines, ""), next(lines, "")
    try:
        return bool(second) and isinstance(json.loads(first), dict)
    except json.JSONDecodeError:
        return False


def _read_parquet(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=CHUNK_ROWS):
            yield from pa.Table.from_batches([batch]).to_pandas().to_dict("records")


def _read_table(path: Path, separator: str, text_column: str) -> Iterator[Any]:
    """A csv or tsv through pandas, which types whole columns; the text stays text ("123", "NA")."""
    import pandas as pd

    try:
        names = pd.read_csv(path, sep=separator, nrows=0).columns
        texts = TURNS if text_column not in names and set(TURNS) <= set(names) else (text_column,)
        types = _table_types(path, separator, names, dict.fromkeys(texts, str))
        gaps: Any = {name: [""] for name, kind in types.items() if kind is not str and np.dtype(kind).kind == "f"}
        with pd.read_csv(
            path, sep=separator, dtype=types, keep_default_na=False, na_values=gaps, chunksize=CHUNK_ROWS
        ) as frames:
            for frame in frames:
                yield from frame.to_dict("records")
    except (pd.errors.EmptyDataError, pd.errors.ParserError) as error:
        raise DataError(f"{path} could not be read as a table: {error}") from error


def _table_types(path: Path, separator: str, names: Iterable[str], known: Mapping[str, Any]) -> dict[str, Any]:
    """The type of each column over the whole table, of which one part may look like numbers and another not.

    An empty cell among numbers is a missing number, so that they are floats; among anything else it is an empty text.
    """
    import pandas as pd

    found: dict[str, Any] = {}
    empty = set[str]()  # columns with a part of the table in which they have no value: it could be of any type
    gaps: Any = {name: [""] for name in names if name not in known}
    with pd.read_csv(
        path, sep=separator, dtype=dict(known), keep_default_na=False, na_values=gaps, low_memory=False,
        chunksize=16 * CHUNK_ROWS,
    ) as frames:  # fmt: skip
        for frame in frames:
            for name, column in frame.items():
                if column.isna().all():
                    empty.add(str(name))
                    continue
                kind = column.dtype if column.dtype.kind in "biuf" else str
                found[str(name)] = _wider(found.get(str(name), kind), kind)
    for name in empty & set(found):
        found[name] = _wider(found[name], np.dtype(np.float64))
    return {**dict.fromkeys(names, str), **found, **known}


def _wider(held: Any, kind: Any) -> Any:
    """The type of a column whose parts have these types: numbers stay numbers, anything else is text."""
    if held is str or kind is str or held == kind:
        return str if str in (held, kind) else kind
    return np.dtype(np.float64) if {held.kind, kind.kind} == {"i", "f"} else str


# --- rows into documents --------------------------------------------------------------------------------------------


class _ColumnRead:
    """A column under construction; values that are lists go to a spool, if they are not held elsewhere anyway."""

    def __init__(self, spool: bool) -> None:
        self.spool, self.values = spool, list[Any]()
        self.nested: NestedValues | None = None

    def put(self, number: int, value: Any) -> None:
        """Set the value of a row; rows that were passed over have None."""
        if self.nested is None and self.spool and is_nested(value):
            self.nested = NestedValues()
            for held in self.values:
                self.nested.append(held)
            self.values = []
        held = self.values if self.nested is None else self.nested
        while len(held) < number:
            held.append(None)
        held.append(value)

    def finish(self, rows: int) -> Sequence[Any]:
        """All values, one per row."""
        held = self.values if self.nested is None else self.nested
        while len(held) < rows:
            held.append(None)
        return held


class _Reader:
    """Takes rows one by one, checks each, and makes documents of them."""

    def __init__(self, source: str, text_column: str, spool: bool) -> None:
        self.source, self.text_column, self.spool = source, text_column, spool
        self.rows = 0
        self.kind: type | None = None
        self.main = ""  # the column that holds the text or the ids; empty for question and answer
        self.texts, self.ids, self.ends = Texts(), FlatArray(np.int32), array("q", [0])
        self.columns: dict[str, _ColumnRead] = {}

    def add(self, row: Any) -> None:
        """Take the next row.

        Raises:
            DataError: It is of another kind than the first, has no text, or an empty one.
        """
        kind = str if isinstance(row, str) else Mapping if isinstance(row, Mapping) else Sequence
        if self.kind is None:
            self.kind, self.first = kind, type(row).__name__
            self.main = self._main(row) if kind is Mapping else ""
        if kind is not self.kind:
            raise DataError(
                f"{self.source}: row {self.rows} is a {type(row).__name__}, the rows before it are {self.first}; "
                "all rows must be of one kind"
            )
        if kind is str:
            self._text(row)
        elif kind is Mapping:
            self._record(row)
        else:
            self._ids(row)
        self.rows += 1

    def _main(self, row: Mapping[str, Any]) -> str:
        if "input_ids" in row:
            return "input_ids"
        if self.text_column in row:
            return self.text_column
        if self.text_column == "text" and all(name in row for name in TURNS):
            return ""
        raise DataError(
            f"{self.source} has no column {self.text_column!r} (nor `input_ids`, nor `question` and `answer`); its "
            f"columns are {', '.join(map(repr, row))}. Name the one that holds the text with text_column="
        )

    def _record(self, row: Mapping[str, Any]) -> None:
        if self.main:
            value = row.get(self.main)
            if value is None:
                raise DataError(f"{self.source}: row {self.rows} has no {self.main!r}; every row needs one")
        else:
            value = self._joined(row)
        if self.main == "input_ids":
            self._ids(value)
        elif row.get("input_ids") is not None:
            raise DataError(f"{self.source}: row {self.rows} has `input_ids`, the rows before it have texts")
        else:
            self._text(value)
        drop = {"input_ids", "attention_mask"} if self.main == "input_ids" else {self.main}
        for name, entry in row.items():
            if name not in drop:
                self.columns.setdefault(str(name), _ColumnRead(self.spool)).put(self.rows, entry)

    def _joined(self, row: Mapping[str, Any]) -> str:
        for name in TURNS:
            value = row.get(name)
            if not isinstance(value, str) or not value.strip():
                raise DataError(f"{self.source}: the {name} of row {self.rows} must be a text; got {value!r}")
        return f"{row['question']} {row['answer']}"

    def _text(self, text: Any) -> None:
        check_text(text, self.rows, self.source, self.main if self.kind is Mapping else None)
        self.texts.append(text)

    def _ids(self, row: Any) -> None:
        self.ids.extend(ids_of(row, self.rows, self.source))
        self.ends.append(len(self.ids))

    def finish(self) -> Documents:
        """The documents.

        Raises:
            DataError: There was no row.
        """
        if not self.rows:
            raise DataError(f"{self.source} holds no document; at least one is required")
        columns = {name: column.finish(self.rows) for name, column in self.columns.items()}
        if self.kind is Sequence or self.main == "input_ids":
            rows = IdRows(self.ids.finish(), np.array(self.ends, np.int64), lists=True)
            return Documents(texts=None, input_ids=rows, columns=columns)
        return Documents(texts=self.texts, columns=columns, turns=self.kind is Mapping and not self.main)


def ids_of(row: Any, number: int, source: str) -> npt.NDArray[np.int32]:
    """The token ids of a row, checked.

    Raises:
        DataError: It is no list of integers of 0 and above, or empty.
    """
    values = row.tolist() if hasattr(row, "tolist") else row
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise DataError(f"{source}: row {number} must be a text or a list of token ids; got {type(row).__name__}")
    if not values:
        raise DataError(f"{source}: row {number} holds no token id; remove the row")
    plain = values if set(map(type, values)) == {int} else [plain_scalar(value) for value in values]
    if set(map(type, plain)) != {int} or min(plain) < 0:
        raise DataError(f"{source}: row {number} holds something else than token ids (integers of 0 and above)")
    if max(plain) > MAX_ID:
        raise DataError(f"{source}: row {number} holds token id {max(plain)}; ids beyond {MAX_ID} cannot be stored")
    return np.array(plain, np.int32)


def check_text(text: Any, number: int, source: str, column: str | None = None) -> None:
    """Refuse what is no text, an empty one, or one that UTF-8 cannot encode.

    Args:
        text: What should be a text.
        number: Of its row.
        source: Where the row is from.
        column: The column that the text is from, empty for question and answer; None where rows have no columns.

    Raises:
        DataError: It is one of these.
    """
    if not isinstance(text, str):
        raise DataError(f"{source}: the text of row {number} must be a string; got {type(text).__name__}")
    if not text.strip():
        raise DataError(f"{source}: the text of row {number} is empty; remove the row or give it a text")
    found = lone_surrogate(text)
    if found is not None:
        place = "" if column is None else f" (column {column!r})" if column else " (columns 'question' and 'answer')"
        raise DataError(
            f"{source}: the text of row {number}{place} holds the lone surrogate {found!r}, which is no character: "
            "correct or remove the row"
        )


def _checked(documents: Documents) -> Documents:
    """Refuse documents from elsewhere that cannot be captured."""
    if not len(documents):
        raise DataError("data holds no document; at least one is required")
    if documents.texts is not None and not isinstance(documents.texts, Texts):  # those were checked one by one
        for number, text in enumerate(documents.texts):
            check_text(text, number, "data")
    if documents.input_ids is not None and not isinstance(documents.input_ids, IdRows):
        for number, ids in enumerate(documents.input_ids):
            ids_of(ids, number, "data")
    for name, values in documents.columns.items():
        if len(values) != len(documents):
            raise DataError(f"data: column {name!r} has {len(values)} entries for {len(documents)} documents")
    return documents
