"""Flat arrays and lists of texts that grow without growing the process: beyond a size they go to a temporary file.

The file has no name (it is unlinked when it is made), so nothing is left behind however the process ends. It lies in
the system's folder for temporary files, which the variable TMPDIR names.
"""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import IO, Any, Generic, TypeVar, overload

import numpy as np
import numpy.typing as npt

from activations_cache.errors import DataError

T = TypeVar("T")
AnyArray = npt.NDArray[Any]

SPOOL_BYTES = 32 * 2**20  # what is held in RAM before the file is begun
READ_AHEAD = 1024  # records read at once when a spool is gone through,
READ_BYTES = 2**21  # or bytes, if those are fewer records


class Spool:
    """Bytes, end to end: in RAM up to `SPOOL_BYTES`, in an unnamed temporary file beyond."""

    def __init__(self) -> None:
        self.size = 0
        self._parts: list[bytes] = []
        self._held = 0
        self._file: IO[bytes] | None = None

    def append(self, data: bytes) -> None:
        """Add bytes at the end.

        Raises:
            DataError: The temporary file cannot be written.
        """
        self._parts.append(data)
        self._held += len(data)
        self.size += len(data)
        if self._held > SPOOL_BYTES:
            self._to_file()

    def _to_file(self) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="activations-cache-")  # noqa: SIM115
            self._file.writelines(self._parts)
            self._file.flush()
        except OSError as error:
            raise DataError(
                f"the data take {self.size / 2**20:.0f} MiB and more in the temporary folder {tempfile.gettempdir()}, "
                f"which cannot be written: {error}. Make room there, or set TMPDIR to another folder"
            ) from error
        self._parts, self._held = [], 0

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop`, without mapping the file into memory."""
        if self._file is None:
            return self._in_ram()[start:stop]
        if self._parts:
            self._to_file()
        return os.pread(self._file.fileno(), stop - start, start)

    def _in_ram(self) -> bytes:
        if len(self._parts) > 1:
            self._parts = [b"".join(self._parts)]
        return self._parts[0] if self._parts else b""

    def as_array(self, dtype: npt.DTypeLike) -> AnyArray:
        """All bytes as one array, which may be written to; a memory map where they are in a file."""
        if not self.size:
            return np.zeros(0, dtype)
        if self._file is None:
            return np.frombuffer(bytearray(self._in_ram()), dtype)
        if self._parts:
            self._to_file()
        return np.memmap(self._file, dtype, mode="r+").view(np.ndarray)


class FlatArray:
    """A one-dimensional array under construction.

    Args:
        dtype: Its type.
    """

    def __init__(self, dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self._spool = Spool()

    def __len__(self) -> int:
        return self._spool.size // self.dtype.itemsize

    def extend(self, values: npt.ArrayLike) -> None:
        """Add values at the end."""
        self._spool.append(np.ascontiguousarray(values, self.dtype).tobytes())

    def finish(self) -> AnyArray:
        """The whole array; nothing can be added after."""
        return self._spool.as_array(self.dtype)


class Records(Sequence[T], Generic[T]):
    """A list of records of any length in a spool; equal to any sequence of equal records.

    Args:
        encode: A record's bytes.
        decode: The record of some bytes.
    """

    def __init__(self, encode: Callable[[T], bytes], decode: Callable[[bytes], T]) -> None:
        self._encode, self._decode = encode, decode
        self._spool, self._ends = Spool(), array("q", [0])

    def append(self, record: T) -> None:
        """Add a record at the end."""
        self._spool.append(self._encode(record))
        self._ends.append(self._spool.size)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        numbers = range(len(self))[index]
        if isinstance(numbers, int):
            return self._decode(self._spool.read(self._ends[numbers], self._ends[numbers + 1]))
        if numbers.step == 1:
            return self._run(numbers.start, numbers.stop)
        return [self[number] for number in numbers]

    def _run(self, first: int, stop: int) -> list[T]:
        if stop <= first:
            return []
        ends = self._ends[first : stop + 1]
        raw, base = self._spool.read(ends[0], ends[-1]), ends[0]
        return [self._decode(raw[a - base : b - base]) for a, b in pairwise(ends)]

    def __iter__(self) -> Iterator[T]:
        first = 0
        while first < len(self):
            within = bisect_right(self._ends, self._ends[first] + READ_BYTES, first, len(self) + 1) - 1
            stop = min(max(within, first + 1), first + READ_AHEAD)
            yield from self._run(first, stop)
            first = stop

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sequence)
            and len(self) == len(other)
            and all(a == b for a, b in zip(self, other, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]  # as a list's

    def __repr__(self) -> str:
        shown = ", ".join(repr(record) for record in self[:2])
        return f"[{shown}{', ...' if len(self) > 2 else ''}] ({len(self)})"


def is_nested(value: Any) -> bool:
    """Whether a value is no scalar by its form: a list, a mapping, an array."""
    return isinstance(value, list | tuple | set | Mapping) or getattr(value, "ndim", 0) > 0


class Texts(Records[str]):
    """A list of texts in a spool."""

    def __init__(self) -> None:
        super().__init__(
            lambda text: text.encode("utf-8", "surrogatepass"), lambda raw: raw.decode("utf-8", "surrogatepass")
        )


class NestedValues(Records[Any]):
    """A list in a spool of values as JSON holds them; arrays become lists.

    Attributes:
        all_nested: Whether every value but None is a list or a mapping.
    """

    def __init__(self) -> None:
        super().__init__(lambda value: json.dumps(value, default=_plain).encode(), json.loads)
        self.all_nested = True

    def append(self, record: Any) -> None:
        """Add a value at the end."""
        self.all_nested &= record is None or is_nested(record)
        super().append(record)


def _plain(value: Any) -> Any:
    """What JSON can hold of a value that it cannot: numbers and lists as such, of others the type, which none takes."""
    return value.tolist() if hasattr(value, "tolist") else {"of type": type(value).__name__}


class Picked(Sequence[T], Generic[T]):
    """Entries of a sequence by number, looked up when they are read.

    Args:
        held: The sequence.
        numbers: Which of its entries, in order.
    """

    def __init__(self, held: Sequence[T], numbers: npt.NDArray[np.int64]) -> None:
        self.held, self.numbers = held, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self.held[number] for number in self.numbers[index].tolist()]
        return self.held[int(self.numbers[index])]


class IdRows(Sequence[Any]):
    """Rows of numbers that lie end to end: `rows[i]` is a view of the i-th, an int32 array.

    Equal to any sequence of rows with the same numbers. A slice is again such a sequence, without a copy.

    Args:
        flat: All rows, end to end.
        offsets: Where each begins, and the end, [rows + 1].
        lists: Give rows as lists of Python's integers.
    """

    def __init__(self, flat: AnyArray, offsets: npt.NDArray[np.int64], lists: bool = False) -> None:
        self.flat, self.offsets, self.lists = flat, offsets, lists

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Length of each row."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            numbers = range(len(self))[index]
            if numbers.step != 1:
                return [self[number] for number in numbers]
            stop = max(numbers.stop, numbers.start)
            return IdRows(self.flat, self.offsets[numbers.start : stop + 1], self.lists)
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index = int(index) % len(self)
        row = self.flat[self.offsets[index] : self.offsets[index + 1]]
        return row.tolist() if self.lists else row

    def __iter__(self) -> Iterator[Any]:
        for index in range(len(self)):
            yield self[index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(np.array_equal(a, b) for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as a list's

    def __repr__(self) -> str:
        shown = ", ".join(repr(list(map(int, row))) for row in self[:2])
        return f"[{shown}{', ...' if len(self) > 2 else ''}] ({len(self)} rows)"
