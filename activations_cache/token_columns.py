"""Columns with one value per token: read from lists or from spans of characters, given one type, and kept flat."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from activations_cache._encode import Encoded
from activations_cache._spool import FlatArray
from activations_cache.columns import lone_surrogate, plain_scalar
from activations_cache.errors import DataError

Kind = Literal["int", "float", "bool", "string"]
DTYPES: dict[Kind, Any] = {"int": np.int64, "float": np.float64, "bool": np.int8, "string": np.int32}
UNLABELLED: dict[Kind, Any] = {"int": -1, "float": math.nan, "bool": 0, "string": 0}
_NONE = np.iinfo(np.int64).min  # an unlabelled token of an integer column until all values are known
_BLOCK = 2**20


@dataclass(frozen=True)
class TokenColumn:
    """A column with one value per token.

    Attributes:
        kind: "int", "float", "bool" or "string".
        values: int64, float64, int8 (0 or 1), or int32 codes of strings, [tokens]. Unlabelled tokens have -1, NaN, 0,
            or the code 0.
        categories: The strings by their code, the empty string first and the others in the order in which they appear;
            None for other kinds.
    """

    kind: Kind
    values: npt.NDArray[Any]
    categories: tuple[str, ...] | None = None


def row_values(name: str, value: Any, row: Encoded, number: int, default: Any = None) -> list[Any]:
    """The values of a document's tokens, None for those that are unlabelled.

    Args:
        name: The column.
        value: The document's entry in it: None, a list with one value per token, or a list of spans.
        row: The tokens.
        number: Number of the document.
        default: The label of a span that has none.

    Raises:
        DataError: Neither of these, another number of values than tokens, or a span outside of the text.
    """
    if value is None:
        return [None] * len(row.ids)
    held = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(held, list | tuple):
        raise DataError(f"column {name!r}: row {number} must have a list, one value per token; got {value!r}")
    if row.text is not None and all(isinstance(entry, Mapping) for entry in held):
        return _of_spans(name, held, row, number, default)
    if len(held) == len(row.ids):
        return list(held)
    own = None if row.added is None else np.flatnonzero(~row.added)
    if own is None or len(held) != len(own):
        apart = (
            "" if own is None or len(own) == len(row.ids) else f" ({len(own)} without those that the tokenizer adds)"
        )
        raise DataError(f"column {name!r}: row {number} has {len(held)} values for {len(row.ids)} tokens{apart}")
    values: list[Any] = [None] * len(row.ids)
    for position, entry in zip(own.tolist(), held, strict=True):
        values[position] = entry
    return values


def _of_spans(name: str, spans: Sequence[Mapping[str, Any]], row: Encoded, number: int, default: Any) -> list[Any]:
    values: list[Any] = [None] * len(row.ids)
    for span in spans:
        start, stop = _ends(name, span, row, number)
        label = span.get("label", default)
        if label is None:
            raise DataError(f"column {name!r}: row {number} has a span without a label: {dict(span)!r}")
        for position in row.tokens_of(start, stop).tolist():
            values[position] = label
    return values


def _ends(name: str, span: Mapping[str, Any], row: Encoded, number: int) -> tuple[int, int]:
    """First and last character of a span, counted in the string that was tokenized."""
    start, stop, text = span.get("start"), span.get("stop"), row.text or ""
    if type(start) is not int or type(stop) is not int or not 0 <= start < stop <= len(text):
        raise DataError(
            f"column {name!r}: row {number} has the span {dict(span)!r}; `start` and `stop` must be characters of its "
            f"text, 0 <= start < stop <= {len(text)}"
        )
    if row.chars is None:
        raise DataError(
            f"column {name!r} has spans of characters, which need a fast tokenizer, one that tells the characters of "
            "each token; give one value per token instead"
        )
    if row.text_at is None:
        raise DataError(
            f"column {name!r}: row {number} has a span, but the chat template leaves no one place for its text; give "
            "one value per token instead"
        )
    return start + row.text_at, stop + row.text_at


def mask_values(value: Any, row: Encoded, number: int) -> list[Any]:
    """The column `mask` of a document: True, False or 0, 1 for each token, or spans, which are True.

    Raises:
        DataError: Another value; and as `row_values`.
    """
    if value is None:
        raise DataError(f"row {number} has no `mask`; every row needs one")
    values = [plain_scalar(entry) for entry in row_values("mask", value, row, number, default=True)]
    wrong = [entry for entry in values if entry is not None and (isinstance(entry, str) or entry not in (0, 1))]
    if wrong:
        raise DataError(f"column 'mask': row {number} holds {wrong[0]!r}; True and False are allowed, or 1 and 0")
    return [bool(entry) for entry in values]


class TokenValues:
    """A token column under construction, document by document.

    Args:
        name: Of the column, for messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.kind: Kind | None = None
        self.flat = FlatArray(np.int64)
        self.codes: dict[str, int] = {"": 0}
        self.waiting = 0  # unlabelled tokens before the first label, whose type is not known yet

    def extend(self, values: Sequence[Any], number: int) -> None:
        """Add the values of a document's tokens, None for those that are unlabelled.

        Raises:
            DataError: They are of several types, or of another than those before them.
        """
        plain = [plain_scalar(value) for value in values]
        kind = self._kind_of(plain, number)
        if kind is None and self.kind is None:
            self.waiting += len(plain)
            return
        self._become(kind or self.kind, number)
        self.flat.extend(self._stored(plain, number))

    def _kind_of(self, values: Sequence[Any], number: int) -> Kind | None:
        types = {type(value) for value in values} - {type(None)}
        if not types:
            return None
        for kind, allowed in (("bool", {bool}), ("int", {int}), ("float", {int, float}), ("string", {str})):
            if types <= allowed:
                return kind  # type: ignore[return-value]
        names = ", ".join(sorted(held.__name__ for held in types))
        raise DataError(
            f"column {self.name!r}: row {number} holds values of type {names}; all strings, all numbers or all "
            "booleans are allowed"
        )

    def _become(self, kind: Kind | None, number: int) -> None:
        """Take the type of further values; integers become floats when a float comes."""
        assert kind is not None
        if self.kind is None:
            self.kind, self.flat = kind, FlatArray(DTYPES[kind])
            for start in range(0, self.waiting, _BLOCK):
                self.flat.extend(self._stored([None] * min(_BLOCK, self.waiting - start), number))
        elif self.kind == "int" and kind == "float":
            held, self.flat, self.kind = self.flat.finish(), FlatArray(np.float64), "float"
            for block in _blocks(held):
                self.flat.extend(np.where(block == _NONE, np.nan, block))
        elif kind != self.kind and (self.kind, kind) != ("float", "int"):
            raise DataError(
                f"column {self.name!r}: row {number} holds values of type {kind}, the rows before it {self.kind}; all "
                "strings, all numbers or all booleans are allowed"
            )

    def _stored(self, values: Sequence[Any], number: int) -> npt.NDArray[Any]:
        assert self.kind is not None
        if self.kind == "string":
            for value in {value for value in values if value is not None and value not in self.codes}:
                if (found := lone_surrogate(value)) is not None:
                    raise DataError(
                        f"column {self.name!r}: row {number} holds the lone surrogate {found!r}, which is no character"
                    )
            codes = [0 if value is None else self.codes.setdefault(value, len(self.codes)) for value in values]
            return np.array(codes, np.int32)
        none = _NONE if self.kind == "int" else UNLABELLED[self.kind]
        try:
            return np.array([none if value is None else value for value in values], DTYPES[self.kind])
        except OverflowError as error:
            raise DataError(f"column {self.name!r}: row {number} holds an integer beyond 64 bits") from error

    def finish(self) -> TokenColumn:
        """The column.

        Raises:
            DataError: No token has a value.
        """
        if self.kind is None:
            raise DataError(f"column {self.name!r} has no value for any token; leave it out of token_columns=")
        values = self.flat.finish()
        for block in _blocks(values) if self.kind == "int" else ():
            block[block == _NONE] = UNLABELLED["int"]
        return TokenColumn(self.kind, values, tuple(self.codes) if self.kind == "string" else None)


def _blocks(values: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    for start in range(0, len(values), _BLOCK):
        yield values[start : start + _BLOCK]
