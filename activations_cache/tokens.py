"""One tokenizer call for all documents: token ids end to end, with what is known of each token beside them.

BOS, chat template, over-long documents and the number of tokens are each handled explicitly and recorded. Documents
are tokenized in chunks, and ids of more than a few MiB go to a temporary file, so memory is a chunk, not the corpus.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from activations_cache._encode import Encoded, Encoder
from activations_cache._reading import Documents, ids_of, read_documents
from activations_cache._spool import FlatArray, IdRows, NestedValues, Picked
from activations_cache.columns import check_name
from activations_cache.errors import DataError
from activations_cache.token_columns import TokenColumn, TokenValues, mask_values, row_values

Overflow = Literal["truncate", "error", "split"]
WRITE_TOKENS = 2**20  # tokens of finished documents that are held before they are written
BAR_DOCUMENTS = 1024  # fewer than these get no bar
BAR_SECONDS = 2.0


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokenized documents, in the order of the data.

    Attributes:
        flat: The ids of all sequences, end to end and without padding, int32 [tokens]. Of a large corpus a memory map
            of a temporary file that has no name.
        offsets: Where each sequence begins in `flat`, and its end, int64 [sequences + 1].
        n_truncated: How many documents were cut to `max_length`.
        bos: Whether every sequence begins with the tokenizer's BOS token.
        columns: The columns of the documents, one entry per sequence.
        spans: First token of each answer and the one after its last, int64 [sequences, 2]; None if not asked for.
        token_columns: Columns with one value per token, flat like `flat`.
        masks: The column `mask`, flat like `flat`; None if not asked for.
    """

    flat: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    n_truncated: int = 0
    bos: bool = False
    columns: dict[str, Sequence[Any]] = field(default_factory=dict)
    spans: npt.NDArray[np.int64] | None = None
    token_columns: dict[str, TokenColumn] = field(default_factory=dict)
    masks: npt.NDArray[np.bool_] | None = None

    @classmethod
    def from_rows(cls, rows: Iterable[Sequence[int]], **rest: Any) -> Tokens:
        """Tokens of plain lists of ids; `rest` are the other fields.

        Raises:
            DataError: A row is no list of token ids, or empty.
        """
        checked = [ids_of(row, number, "data") for number, row in enumerate(rows)]
        flat = np.concatenate(checked) if checked else np.zeros(0, np.int32)
        return cls(flat, _offsets([len(row) for row in checked]), **rest)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def input_ids(self) -> IdRows:
        """The sequences: `input_ids[i]` is the i-th's int32 array [tokens], a view."""
        return IdRows(self.flat, self.offsets)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each sequence, int64 [sequences]."""
        return np.diff(self.offsets)

    @property
    def n_tokens(self) -> int:
        """Number of tokens over all sequences."""
        return int(self.offsets[-1])


def _offsets(lengths: Sequence[int]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(lengths, np.int64))])


def tokenize(
    tokenizer: Any,
    documents: Documents | Any,
    max_length: int | None = None,
    bos: bool | None = None,
    chat: bool = False,
    overflow: Overflow = "truncate",
    *,
    n_tokens: int | None = None,
    token_columns: Sequence[str] | None = None,
    positions: str | None = None,
    progress: bool = True,
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
            Rows of `question` and `answer` become a user message and an assistant message.
        overflow: What happens to a sequence longer than `max_length`: "truncate" cuts it at its end and counts it;
            "error" refuses it, naming the row; "split" makes several sequences of it, each as long as may be (with
            bos=True each begins with BOS). The pieces repeat the columns of their document, whose number is in a
            column `document`, unless the data has one of that name.
        n_tokens: Exactly so many tokens: the documents are taken in order, and the last sequence is cut. None takes
            all.
        token_columns: Columns with one value per token. A row's entry is a list with one value per token of the row
            (tokens that the tokenizer adds may be left out and are unlabelled), or, for texts, a list of spans
            `{"start": 3, "stop": 8, "label": "x"}` in characters of the text: a token that shares a character with a
            span has its label, the last such span's. Unlabelled tokens have "", NaN, False or -1. Values are cut with
            the sequence.
        positions: "answer" finds the tokens of each row's answer, "mask" reads the column `mask`, a token column of
            booleans (a span in it needs no label). Anything else asks for neither.
        progress: Show a progress bar where it takes over two seconds.

    Returns:
        The token ids, with the number of truncated documents and whether all begin with BOS.

    Raises:
        DataError: A text of no token, a text too long under overflow="error", BOS or chat asked of a tokenizer that
            has none, or either of them asked for token ids; fewer tokens than `n_tokens`; a token column that is
            missing, has a reserved name, another length than its row, or values of several types; an answer that is
            not in its text, or was cut off; answers or spans with a tokenizer that cannot tell which characters a token
            stands for.
    """
    documents = read_documents(documents)
    _check_settings(documents, max_length, bos, chat, overflow, n_tokens)
    wanted = _wanted(documents, token_columns, positions)
    encoder = Encoder(tokenizer, documents, bos, chat, chars=bool(wanted), answers=positions == "answer")
    fit = _Fit(max_length, overflow, n_tokens, repeat_bos=bool(bos))
    writer = _Writer(documents, fit, wanted, positions, getattr(tokenizer, "bos_token_id", None))
    for number, row in enumerate(_with_bar(encoder, len(documents), progress)):
        writer.add(number, row)
        if writer.full:
            break
    return writer.finish(len(documents))


def _check_settings(
    documents: Documents, max_length: int | None, bos: bool | None, chat: bool, overflow: str, n_tokens: int | None
) -> None:
    if overflow not in ("truncate", "error", "split"):
        raise DataError(f"overflow must be 'truncate', 'error' or 'split'; got {overflow!r}")
    if documents.input_ids is not None and (bos is not None or chat):
        raise DataError("bos= and chat= apply to texts; the data holds token ids, which are taken as they are")
    check_count("max_length", max_length, least=2 if overflow == "split" and bos else 1)
    check_count("n_tokens", n_tokens)


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Refuse a setting that is no number of things; None, where nothing was asked for, passes.

    Raises:
        DataError: It is no integer (True and 8.0 are none either), or less than `least`.
    """
    if value is None:
        return
    if type(value) is not int:
        raise DataError(f"{name} must be an integer; got {value!r}, which is {type(value).__name__}")
    if value < least:
        raise DataError(f"{name} must be at least {least}; got {value}")


def _wanted(documents: Documents, names: Sequence[str] | None, positions: str | None) -> dict[str, Sequence[Any]]:
    """The columns with a value per token, the mask among them."""
    if isinstance(names, str):
        raise DataError(f"token_columns must be a list of names; got the text {names!r}")
    for name in names or ():
        check_name(name, "token_columns")
    wanted = [*(names or ()), *(["mask"] if positions == "mask" else [])]
    unknown = [name for name in wanted if name not in documents.columns]
    if unknown:
        raise DataError(
            f"no column {unknown[0]!r} in the data, which has {sorted(documents.columns)}; a value per token is "
            "needed there, a list in each row"
        )
    return {name: documents.columns[name] for name in wanted}


def _with_bar(encoder: Encoder, total: int, progress: bool) -> Iterator[Encoded]:
    """The encoded documents, with a bar where there are many."""
    if total < BAR_DOCUMENTS:
        yield from encoder
        return
    from tqdm.auto import tqdm

    yield from tqdm(
        encoder, total=total, desc="tokenize", unit="doc", delay=BAR_SECONDS, disable=not progress, leave=False
    )


@dataclass(frozen=True)
class _Piece:
    """Tokens `start` to `stop` of a document, after a repeated BOS if `again`."""

    start: int
    stop: int
    again: bool = False

    def __len__(self) -> int:
        return self.stop - self.start + self.again

    def of(self, values: Any) -> Any:
        """The piece of a list or an array with one value per token of the document."""
        cut = values[self.start : self.stop]
        if not self.again:
            return cut
        return [values[0], *cut] if isinstance(values, list) else np.concatenate([values[:1], cut])


class _Fit:
    """Cuts documents to the length and to the number of tokens that are allowed."""

    def __init__(self, max_length: int | None, overflow: Overflow, n_tokens: int | None, repeat_bos: bool) -> None:
        self.max_length, self.overflow, self.n_tokens, self.repeat_bos = max_length, overflow, n_tokens, repeat_bos
        self.too_long: list[int] = []  # number and length of the first document that is too long
        self.n_long = 0

    def pieces(self, number: int, length: int, left: int | None) -> list[_Piece]:
        """What becomes of a document of `length` tokens, of which `left` more are wanted."""
        made = [_Piece(0, length)]
        if self.max_length is not None and length > self.max_length:
            self.n_long += 1
            self.too_long = self.too_long or [number, length]
            made = self._split(length, self.max_length) if self.overflow == "split" else [_Piece(0, self.max_length)]
        return made if left is None else list(_first(made, left))

    def _split(self, length: int, most: int) -> list[_Piece]:
        step = most - self.repeat_bos
        rest = [_Piece(start, min(start + step, length), self.repeat_bos) for start in range(most, length, step)]
        return [_Piece(0, most), *rest]

    def check(self) -> None:
        """Refuse documents that were too long, if they are to be refused."""
        if self.overflow == "error" and self.too_long:
            number, length = self.too_long
            raise DataError(
                f"row {number} has {length} tokens, {self.max_length} are allowed"
                + (f" ({self.n_long} rows are too long)" if self.n_long > 1 else "")
                + '; shorten it, raise max_length up to the context of the model, or pass overflow="truncate" or '
                'overflow="split"'
            )


def _first(pieces: Sequence[_Piece], left: int) -> Iterator[_Piece]:
    """The pieces up to `left` tokens, the last one cut."""
    for piece in pieces:
        if left <= 0:
            return
        if len(piece) > left:
            piece = _Piece(piece.start, piece.start + left - piece.again, piece.again)
        yield piece
        left -= len(piece)


class _Writer:
    """Puts documents end to end, piece by piece, until there are enough tokens."""

    def __init__(
        self, documents: Documents, fit: _Fit, wanted: dict[str, Sequence[Any]], positions: str | None, bos: int | None
    ) -> None:
        self.documents, self.fit, self.wanted, self.positions, self.bos = documents, fit, wanted, positions, bos
        self.flat, self.total = FlatArray(np.int32), 0
        self.lengths, self.sources, self.spans = array("q"), array("q"), array("q")
        self.values = {name: TokenValues(name) for name in wanted}
        self.all_bos = bos is not None
        self.parts: list[npt.NDArray[np.int32]] = []

    @property
    def full(self) -> bool:
        """Whether no further token is wanted."""
        return self.fit.n_tokens is not None and self.total >= self.fit.n_tokens

    def add(self, number: int, row: Encoded) -> None:
        """Take the next document.

        Raises:
            DataError: Its answer or one of its token values cannot be used.
        """
        left = None if self.fit.n_tokens is None else self.fit.n_tokens - self.total
        pieces = self.fit.pieces(number, len(row.ids), left)
        if self.positions == "answer":
            self.spans.extend(self._span(number, row, pieces))
        marks = {name: self._marks(name, column[number], row, number) for name, column in self.wanted.items()}
        for piece in pieces:
            ids = piece.of(row.ids)
            self.parts.append(ids)
            self.lengths.append(len(ids))
            self.sources.append(number)
            self.total += len(ids)
            self.all_bos = self.all_bos and bool(ids[0] == self.bos)
            for name, values in marks.items():
                self.values[name].extend(piece.of(values), number)
        if self.total - len(self.flat) >= WRITE_TOKENS:
            self._flush()

    def _flush(self) -> None:
        if self.parts:
            self.flat.extend(np.concatenate(self.parts))
        self.parts = []

    def _marks(self, name: str, value: Any, row: Encoded, number: int) -> list[Any]:
        if name == "mask":
            return mask_values(value, row, number)
        return row_values(name, value, row, number)

    def _span(self, number: int, row: Encoded, pieces: Sequence[_Piece]) -> tuple[int, int]:
        start, stop = row.answer_tokens(number)
        if len(pieces) > 1:
            raise DataError(
                f"row {number} has {len(row.ids)} tokens and is split, so its answer is in no one sequence for sure; "
                'with positions="answer" shorten the row, raise max_length, or pass overflow="truncate"'
            )
        if stop > pieces[0].stop:
            by = "n_tokens" if self.full_after(pieces[0]) else "max_length"
            raise DataError(
                f"row {number}: its answer is tokens {start} to {stop - 1}, and {by} ends the sequence after "
                f"{pieces[0].stop}; choose another {by}, or shorten or remove the row"
            )
        return start, stop

    def full_after(self, piece: _Piece) -> bool:
        """Whether a piece is the last that is wanted."""
        return self.fit.n_tokens is not None and self.total + len(piece) >= self.fit.n_tokens

    def finish(self, n_documents: int) -> Tokens:
        """All that was taken.

        Raises:
            DataError: A document was too long, or there are not enough tokens.
        """
        self.fit.check()
        if self.fit.n_tokens is not None and self.total < self.fit.n_tokens:
            raise DataError(
                f"n_tokens={self.fit.n_tokens} were asked for, and the data hold {self.total}; nothing is repeated: "
                "give more data, or ask for fewer"
            )
        self._flush()
        columns = {name: made.finish() for name, made in self.values.items()}
        mask = columns.pop("mask") if self.positions == "mask" else None
        spans = np.array(self.spans, np.int64).reshape(-1, 2) if self.positions == "answer" else None
        return Tokens(
            self.flat.finish(),
            _offsets(self.lengths),
            n_truncated=self.fit.n_long if self.fit.overflow == "truncate" else 0,
            bos=self.all_bos,
            columns=self._columns(n_documents),
            spans=spans,
            token_columns=columns,
            masks=None if mask is None else mask.values.view(np.bool_),
        )

    def _columns(self, n_documents: int) -> dict[str, Sequence[Any]]:
        """The documents' columns, one entry per sequence."""
        sources, held = np.array(self.sources, np.int64), dict(self.documents.columns)
        if len(sources) != n_documents or not np.array_equal(sources, np.arange(n_documents)):
            held = {name: _picked(values, sources) for name, values in held.items()}
        if self.fit.overflow == "split":
            held.setdefault("document", sources.tolist())
        return held


def _picked(values: Sequence[Any], numbers: npt.NDArray[np.int64]) -> Sequence[Any]:
    if isinstance(values, NestedValues):
        return Picked(values, numbers)
    return [values[number] for number in numbers.tolist()]
