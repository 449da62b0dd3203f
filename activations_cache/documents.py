"""Texts and token ids in: one reader for every way people hold their data, and one tokenizer call for all of it.

`read_documents` turns a list, a file, a DataFrame or a Hugging Face dataset into `Documents`; `tokenize` turns those
into `Tokens`, with BOS, chat template and over-long texts each handled explicitly and recorded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from activations_cache.errors import DataError

Overflow = Literal["truncate", "error"]
Scalar = str | int | float | bool
FILE_SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Documents:
    """Documents as read: texts or token ids, one per row, and label columns beside them.

    Attributes:
        texts: One string per document, or None when the data held token ids.
        input_ids: One list of token ids per document, or None when the data held texts.
        columns: Every other column, as read; each list has one entry per document.
    """

    texts: list[str] | None
    input_ids: list[list[int]] | None = None
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        held = self.texts if self.texts is not None else self.input_ids
        return len(held or [])


@dataclass(frozen=True)
class Tokens:
    """Tokenized documents, in the order of the data.

    Attributes:
        input_ids: Unpadded token ids, one list per document.
        n_truncated: How many documents were cut to `max_length`.
        bos: Whether every sequence begins with the tokenizer's BOS token.
        columns: The label columns of the documents.
    """

    input_ids: list[list[int]]
    n_truncated: int = 0
    bos: bool = False
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def n_tokens(self) -> int:
        """Number of tokens over all sequences."""
        return sum(map(len, self.input_ids))


def read_documents(data: Any, text_column: str = "text") -> Documents:
    """Read documents from whatever holds them.

    Args:
        data: A list of strings, of token-id lists or of row dicts; a path to a .txt (one document a line, blank lines
            are none), .jsonl, .json (a list), .csv, .tsv or .parquet file, or to a directory that a Hugging Face
            dataset's `save_to_disk` wrote; a pandas DataFrame; a Hugging Face dataset (one split); anything with
            `.to_df()`; or `Documents`, returned as they are.
        text_column: The column that holds the text. A column `input_ids` takes its place where there is one.

    Returns:
        The documents, with every other column beside them.

    Raises:
        DataError: No document, an empty document, no text column, an unreadable or unknown file.
    """
    if isinstance(data, Documents):
        return _checked(data, "data")
    if isinstance(data, str | Path):
        path = Path(data)
        rows = _read_dataset(path) if path.is_dir() else _read_file(path, text_column)
        return _checked(_from_rows(rows, text_column, str(path)), str(path))
    return _checked(_from_rows(_rows_of(data), text_column, "data"), "data")


def _rows_of(data: Any) -> list[Any]:
    """The rows of an in-memory object: strings, id lists or dicts."""
    if hasattr(data, "to_df"):
        data = data.to_df()
    if isinstance(data, Mapping):
        raise DataError(
            "data is a mapping (a dataset with several splits?); one split, or a list of rows, was required: "
            f"pass data[name] for one of {', '.join(map(str, data))}"
        )
    if hasattr(data, "to_dict") and hasattr(data, "columns"):  # a DataFrame
        return list(data.to_dict("records"))
    if hasattr(data, "tolist"):  # a tensor or array of ids
        data = data.tolist()
    if not isinstance(data, Iterable):
        raise DataError(f"data must be a list, a path, a DataFrame or a dataset; got {type(data).__name__}")
    return list(data)


def _read_dataset(path: Path) -> list[Any]:
    """The rows of a Hugging Face dataset that was written with `save_to_disk`."""
    if not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
        raise DataError(f"{path} is a directory, but no Hugging Face dataset that was written with save_to_disk")
    from datasets import load_from_disk

    try:
        return _rows_of(load_from_disk(str(path)))
    except (ValueError, OSError) as error:
        raise DataError(f"{path} could not be read as a Hugging Face dataset: {error}") from error


def _read_file(path: Path, text_column: str) -> list[Any]:
    if not path.is_file():
        raise DataError(f"no data file at {path}; expected a file ending in one of {', '.join(FILE_SUFFIXES)}")
    suffix = path.suffix.lower()
    try:
        if suffix == ".txt":
            return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if suffix == ".jsonl":
            return _read_jsonl(path)
        if suffix == ".json":
            return _read_json(path)
        if suffix in (".csv", ".tsv"):
            return _read_table(path, "\t" if suffix == ".tsv" else ",", text_column)
        if suffix == ".parquet":
            import pandas as pd

            return list(pd.read_parquet(path).to_dict("records"))
    except (ValueError, OSError) as error:  # bad UTF-8, bad JSON, bad parquet
        raise DataError(f"{path} could not be read as {suffix[1:]} in UTF-8: {error}") from error
    raise DataError(f"{path}: unknown kind of data file {suffix!r}; expected one of {', '.join(FILE_SUFFIXES)}")


def _read_jsonl(path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number} is no JSON: {error}") from error
    return rows


def _read_json(path: Path) -> list[Any]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list):
        raise DataError(f"{path} must hold a JSON list of texts or of rows; got {type(rows).__name__}")
    return rows


def _read_table(path: Path, separator: str, text_column: str) -> list[Any]:
    """A csv or tsv through pandas, which types whole columns; the text stays text ("123", "NA")."""
    import pandas as pd

    try:
        frame = pd.read_csv(path, sep=separator, dtype={text_column: str}, keep_default_na=False)
    except (pd.errors.EmptyDataError, pd.errors.ParserError) as error:
        raise DataError(f"{path} could not be read as a table: {error}") from error
    return list(frame.to_dict("records"))


def _from_rows(rows: list[Any], text_column: str, source: str) -> Documents:
    if not rows:
        raise DataError(f"{source} holds no document; at least one is required")
    first = rows[0]
    for number, row in enumerate(rows):
        if isinstance(row, str) != isinstance(first, str) or isinstance(row, Mapping) != isinstance(first, Mapping):
            raise DataError(
                f"{source}: row {number} is a {type(row).__name__}, the rows before it are {type(first).__name__}; "
                "all rows must be of one kind"
            )
    if isinstance(first, str):
        return Documents(texts=rows)
    if isinstance(first, Mapping):
        return _from_records(rows, text_column, source)
    return Documents(texts=None, input_ids=[_ids(row, number, source) for number, row in enumerate(rows)])


def _from_records(rows: list[Mapping[str, Any]], text_column: str, source: str) -> Documents:
    names = list(dict.fromkeys(name for row in rows for name in row))
    main = "input_ids" if "input_ids" in names else text_column
    if main not in names:
        raise DataError(
            f"{source} has no column {text_column!r} (nor `input_ids`); its columns are {', '.join(map(repr, names))}. "
            "Name the one that holds the text with text_column="
        )
    missing = next((number for number, row in enumerate(rows) if row.get(main) is None), None)
    if missing is not None:
        raise DataError(f"{source}: row {missing} has no {main!r}; every row needs one")
    drop = {main, "attention_mask"} if main == "input_ids" else {main}
    columns = {str(name): [row.get(name) for row in rows] for name in names if name not in drop}
    if main == "input_ids":
        ids = [_ids(row[main], number, source) for number, row in enumerate(rows)]
        return Documents(texts=None, input_ids=ids, columns=columns)
    return Documents(texts=[row[main] for row in rows], columns=columns)


def _ids(row: Any, number: int, source: str) -> list[int]:
    values = row.tolist() if hasattr(row, "tolist") else row
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise DataError(f"{source}: row {number} must be a text or a list of token ids; got {type(row).__name__}")
    plain = [_plain(value) for value in values]
    if not all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in plain):
        raise DataError(f"{source}: row {number} holds something else than token ids (integers of 0 and above)")
    return plain


def _plain(value: Any) -> Any:
    """A numpy or torch scalar as Python's; everything else, arrays included, as it is."""
    if type(value) is int or getattr(value, "ndim", None) != 0:
        return value
    return value.item()


def _checked(documents: Documents, source: str) -> Documents:
    """Refuse what cannot be captured: nothing at all, a text that is no string, an empty document."""
    if not len(documents):
        raise DataError(f"{source} holds no document; at least one is required")
    for number, text in enumerate(documents.texts or []):
        if not isinstance(text, str):
            raise DataError(f"{source}: the text of row {number} must be a string; got {type(text).__name__}")
        if not text.strip():
            raise DataError(f"{source}: the text of row {number} is empty; remove the row or give it a text")
    for number, ids in enumerate(documents.input_ids or []):
        if not ids:
            raise DataError(f"{source}: row {number} holds no token id; remove the row")
    for name, values in documents.columns.items():
        if len(values) != len(documents):
            raise DataError(f"{source}: column {name!r} has {len(values)} entries for {len(documents)} documents")
    return documents


def tokenize(
    tokenizer: Any,
    documents: Documents | Any,
    max_length: int | None = None,
    bos: bool | None = None,
    chat: bool = False,
    overflow: Overflow = "truncate",
) -> Tokens:
    """Tokenize documents, without padding.

    Args:
        tokenizer: A Hugging Face tokenizer. Not needed (may be None) for documents that are token ids already.
        documents: `Documents`, or anything that `read_documents` takes.
        max_length: Longest sequence allowed, in tokens, special tokens included; None allows any length.
        bos: None leaves special tokens to the tokenizer (or to the chat template); True gives exactly one BOS token in
            front and no other special token; False gives none. With a chat template, True and False add or remove the
            leading BOS alone.
        chat: Wrap each text as one user message in the tokenizer's chat template, with the generation prompt after it.
        overflow: "truncate" cuts a longer sequence at its end and counts it; "error" refuses it, naming the row.

    Returns:
        The token ids, with the number of truncated documents and whether all begin with BOS.

    Raises:
        DataError: A text of no token, a text too long under overflow="error", BOS or chat asked of a tokenizer that
            has none, or either of them asked for token ids.
    """
    documents = read_documents(documents)
    if overflow not in ("truncate", "error"):
        raise DataError(f"overflow must be 'truncate' or 'error'; got {overflow!r}")
    if documents.input_ids is not None:
        if bos is not None or chat:
            raise DataError("bos= and chat= apply to texts; the data holds token ids, which are taken as they are")
        ids = documents.input_ids
    else:
        ids = _encode(tokenizer, documents.texts or [], bos, chat)
    cut, n_truncated = _fit(ids, max_length, overflow)
    bos_id = getattr(tokenizer, "bos_token_id", None)
    has_bos = bos_id is not None and all(row[0] == bos_id for row in cut)
    return Tokens(input_ids=cut, n_truncated=n_truncated, bos=has_bos, columns=documents.columns)


def _encode(tokenizer: Any, texts: list[str], bos: bool | None, chat: bool) -> list[list[int]]:
    if tokenizer is None:
        raise DataError("texts need a tokenizer: pass tokenizer=, or give token ids instead of texts")
    bos_id = tokenizer.bos_token_id
    if bos and bos_id is None:
        raise DataError("bos=True, but this tokenizer has no BOS token; pass bos=None or bos=False")
    if chat:
        ids = _encode_chat(tokenizer, texts)
        if bos is not None and bos_id is not None:
            ids = [_without(row, bos_id) for row in ids]
    else:
        # verbose=False: the tokenizer's own length warning is ours to give
        ids = tokenizer(texts, add_special_tokens=bos is None, verbose=False)["input_ids"]
    if bos:
        ids = [[bos_id, *row] for row in ids]
    empty = next((number for number, row in enumerate(ids) if not row), None)
    if empty is not None:
        raise DataError(f"the text of row {empty} has no token: {texts[empty]!r}")
    return [list(row) for row in ids]


def _encode_chat(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("chat=True, but this tokenizer has no chat template; pass chat=False or set its chat_template")
    messages = [[{"role": "user", "content": text}] for text in texts]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: list[list[int]] = tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _without(row: list[int], bos_id: int) -> list[int]:
    return row[1:] if row and row[0] == bos_id else row


def _fit(ids: list[list[int]], max_length: int | None, overflow: Overflow) -> tuple[list[list[int]], int]:
    if max_length is None:
        return ids, 0
    if max_length < 1:
        raise DataError(f"max_length must be at least 1; got {max_length}")
    long = [number for number, row in enumerate(ids) if len(row) > max_length]
    if long and overflow == "error":
        raise DataError(
            f"row {long[0]} has {len(ids[long[0]])} tokens, {max_length} are allowed"
            + (f" ({len(long)} rows are too long)" if len(long) > 1 else "")
            + '; shorten it, raise max_length up to the context of the model, or pass overflow="truncate"'
        )
    return [row[:max_length] for row in ids], len(long)


# what a cache calls its own fields: a column of that name could not be told from them
RESERVED = ("input_ids", "length", "offsets", "position", "sequence", "token")


@dataclass(frozen=True)
class Column:
    """A label column made ready to be stored: one type for all its values.

    Attributes:
        kind: "string", "int", "float" or "bool".
        values: One per sequence, all of that type. A missing float is NaN, a missing string is empty.
    """

    kind: Literal["string", "int", "float", "bool"]
    values: list[Scalar]


def storable_columns(columns: Mapping[str, list[Any]], wanted: Sequence[str] | None = None) -> dict[str, Column]:
    """Choose the columns that a cache can hold and give each one type.

    Args:
        columns: Columns as read.
        wanted: Names to keep; None keeps every column whose values are strings, numbers or booleans. Those that are
            not kept then, `unstorable_columns` explains.

    Raises:
        DataError: A wanted column is missing or cannot be stored; a column to keep has a name in `RESERVED`.
    """
    unknown = [name for name in wanted or () if name not in columns]
    if unknown:
        raise DataError(f"no column {unknown[0]!r} in the data; its columns are {sorted(columns)}")
    kept: dict[str, Column] = {}
    for name in columns if wanted is None else wanted:
        if name in RESERVED and (wanted is not None or not _all_nested(columns[name])):
            raise DataError(
                f"column {name!r} has a name that every cache uses itself ({', '.join(RESERVED)}): rename it in the "
                "data, or leave it out by naming the columns to keep with columns="
            )
        column = _column(columns[name]) if _name_fits(name) else None
        if column is None and wanted is not None:
            raise DataError(
                f"column {name!r} cannot be stored: {_obstacle(name, columns[name])}. A label column holds all "
                "strings, all numbers or all booleans"
            )
        if column is not None:
            kept[name] = column
    return kept


def unstorable_columns(columns: Mapping[str, list[Any]]) -> dict[str, str]:
    """The columns that might have been meant as labels and cannot be stored, each with the reason.

    A column that holds nothing but lists, mappings or arrays is no label by its form, and is not among them.
    """
    return {
        name: _obstacle(name, values)
        for name, values in columns.items()
        if not _all_nested(values) and (not _name_fits(name) or _column(values) is None)
    }


def _all_nested(values: list[Any]) -> bool:
    held = [value for value in values if value is not None]
    return bool(held) and all(
        isinstance(value, list | tuple | set | Mapping) or getattr(value, "ndim", 0) > 0 for value in held
    )


def _name_fits(name: str) -> bool:
    """Whether HDF5 can take a dataset of this name."""
    return not ("/" in name or name in ("", ".", "..") or "\0" in name)


def _obstacle(name: str, values: list[Any]) -> str:
    """Why a column cannot be stored, in words."""
    if not _name_fits(name):
        return "its name has a '/' or is none that HDF5 takes"
    plain = _scalars(values)
    kinds = sorted({type(value).__name__ for value in plain if value is not None})
    if not kinds:
        return "it has no value"
    if len(kinds) > 1:
        return f"its values are of several types ({', '.join(kinds)})"
    if kinds[0] == "bool" and None in plain:
        return "it has missing values beside booleans"
    if kinds[0] == "int":
        return "it has integers beyond 64 bits"
    return "it has texts with a NUL character" if kinds[0] == "str" else f"its values are of type {kinds[0]}"


def _scalars(values: list[Any]) -> list[Any]:
    """Python's own scalars; among strings a NaN, by which pandas marks a missing one, is None."""
    plain = [_plain(value) for value in values]
    if any(isinstance(value, str) for value in plain):
        return [None if isinstance(value, float) and math.isnan(value) else value for value in plain]
    return plain


def _column(values: list[Any]) -> Column | None:
    plain = _scalars(values)
    kinds = {type(value) for value in plain if value is not None}
    missing = any(value is None for value in plain)
    if kinds == {bool} and not missing:
        return Column("bool", plain)
    if kinds == {int} and not missing:
        return Column("int", plain) if all(-(2**63) <= value < 2**63 for value in plain) else None
    if kinds and kinds <= {int, float}:
        return Column("float", [math.nan if value is None else float(value) for value in plain])
    if kinds == {str}:
        return None if any("\0" in (value or "") for value in plain) else Column("string", [v or "" for v in plain])
    return None
