"""Label columns made ready to be stored: one value per sequence, one type per column."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from activations_cache._spool import NestedValues, Picked, is_nested
from activations_cache.errors import DataError

Scalar = str | int | float | bool

# what a cache calls its own fields: a column of that name could not be told from them
RESERVED = ("input_ids", "length", "logprob", "mask", "offsets", "position", "sequence", "token")


_LEAVE_OUT = "Correct it in the data, or leave the column out by naming the columns to keep with columns="


@dataclass(frozen=True)
class Column:
    """A label column made ready to be stored: one type for all its values.

    Attributes:
        kind: "string", "int", "float" or "bool".
        values: One per sequence, all of that type. A missing float is NaN, a missing string is empty.
    """

    kind: Literal["string", "int", "float", "bool"]
    values: list[Scalar]


def storable_columns(columns: Mapping[str, Sequence[Any]], wanted: Sequence[str] | None = None) -> dict[str, Column]:
    """Choose the columns that a cache can hold and give each one type.

    Args:
        columns: Columns as read.
        wanted: Names to keep; None keeps every column whose values are strings, numbers or booleans. Those that are
            not kept then, `unstorable_columns` explains.

    Raises:
        DataError: A wanted column is missing or cannot be stored; a column to keep has a name in `RESERVED`, or has a
            lone surrogate in its name or in a value; `wanted` is a text.
    """
    if isinstance(wanted, str):
        raise DataError(f"columns must be a list of names; got the text {wanted!r}: pass [{wanted!r}]")
    unknown = [name for name in wanted or () if name not in columns]
    if unknown:
        raise DataError(f"no column {unknown[0]!r} in the data; its columns are {sorted(columns)}")
    kept: dict[str, Column] = {}
    for name in columns if wanted is None else wanted:
        if name in RESERVED and (wanted is not None or not _all_nested(columns[name])):
            check_name(name, "columns")
        _check_characters(name, columns[name])
        column = _column(columns[name]) if _name_fits(name) else None
        if column is None and wanted is not None:
            raise DataError(
                f"column {name!r} cannot be stored: {_obstacle(name, columns[name])}. A label column holds all "
                "strings, all numbers or all booleans"
            )
        if column is not None:
            kept[name] = column
    return kept


def unstorable_columns(columns: Mapping[str, Sequence[Any]]) -> dict[str, str]:
    """The columns that might have been meant as labels and cannot be stored, each with the reason.

    A column that holds nothing but lists, mappings or arrays is no label by its form, and is not among them.
    """
    return {
        name: _obstacle(name, values)
        for name, values in columns.items()
        if not _all_nested(values) and (not _name_fits(name) or _column(values) is None)
    }


def _all_nested(values: Sequence[Any]) -> bool:
    base = values.held if isinstance(values, Picked) else values
    if isinstance(base, NestedValues):
        return base.all_nested
    held = [value for value in values if value is not None]
    return bool(held) and all(map(is_nested, held))


def check_name(name: str, setting: str) -> None:
    """Refuse a name that a cache uses itself or that HDF5 cannot take; `setting` is where it can be left out.

    Raises:
        DataError: It is one of these.
    """
    if name in RESERVED:
        raise DataError(
            f"column {name!r} has a name that every cache uses itself ({', '.join(RESERVED)}): rename it in the data, "
            f"or leave it out by naming the columns to keep with {setting}="
        )
    if not _name_fits(name):
        raise DataError(f"column {name!r} cannot be stored: {_obstacle(name, [])}")


def _name_fits(name: str) -> bool:
    """Whether HDF5 can take a dataset of this name."""
    return not ("/" in name or name in ("", ".", "..") or "\0" in name or lone_surrogate(name) is not None)


def lone_surrogate(text: str) -> str | None:
    """The first half of a surrogate pair without the other: JSON can spell one, UTF-8 and HDF5 cannot hold it."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return text[error.start]
    return None


def _check_characters(name: str, values: Sequence[Any]) -> None:
    """Refuse a label column that UTF-8 cannot encode: the data are damaged, so that it is not left out silently.

    Raises:
        DataError: Its name or one of its values holds a lone surrogate.
    """
    if _all_nested(values):
        return
    if lone_surrogate(name) is not None:
        raise DataError(f"column {name!r} cannot be stored: {_obstacle(name, values)}. {_LEAVE_OUT}")
    for number, value in enumerate(values):
        found = lone_surrogate(value) if isinstance(value, str) else None
        if found is not None:
            raise DataError(
                f"column {name!r}: row {number} holds the lone surrogate {found!r}, which is no character. {_LEAVE_OUT}"
            )


def plain_scalar(value: Any) -> Any:
    """A numpy or torch scalar as Python's; everything else, arrays included, as it is."""
    if type(value) is int or getattr(value, "ndim", None) != 0:
        return value
    return value.item()


def _obstacle(name: str, values: Sequence[Any]) -> str:
    """Why a column cannot be stored, in words."""
    if lone_surrogate(name) is not None:
        return f"its name holds the lone surrogate {lone_surrogate(name)!r}, which is no character"
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


def _scalars(values: Sequence[Any]) -> list[Any]:
    """Python's own scalars; among strings a NaN, by which pandas marks a missing one, is None."""
    plain = [plain_scalar(value) for value in values]
    if any(isinstance(value, str) for value in plain):
        return [None if isinstance(value, float) and math.isnan(value) else value for value in plain]
    return plain


def _column(values: Sequence[Any]) -> Column | None:
    if is_nested(next((value for value in values if value is not None), None)):
        return None
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
