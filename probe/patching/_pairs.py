"""Patching pairs made ready: token ids of equal length, the tokens that the metric reads, and which positions align."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from probe.data import Pair, Pairs
from probe.errors import DataError, PatchError
from probe.models import token_strings
from probe.scoring import answer_tokens

if TYPE_CHECKING:
    from probe.models import Model

ROLES = ("before", "first changed", "middle changed", "last changed", "all changed", "after", "last")


@dataclass(frozen=True)
class Tokenised:
    """One pair as the model sees it.

    Attributes:
        id: The pair's id.
        group: The unit of the bootstrap.
        clean: Token ids, [pos].
        corrupted: Token ids, [pos], the same length.
        answer: The token whose logit the metric reads at the last position; None where the metric reads none.
        wrong: The token that it is compared with; None where the metric compares none.
        shared: How many tokens the answers share at their start; they are part of both prompts.
    """

    id: str
    group: str
    clean: tuple[int, ...]
    corrupted: tuple[int, ...]
    answer: int | None
    wrong: int | None
    shared: int = 0

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def changed(self) -> tuple[int, int]:
        """First and last position at which the two prompts differ."""
        where = [i for i, (a, b) in enumerate(zip(self.clean, self.corrupted, strict=True)) if a != b]
        return where[0], where[-1]


@dataclass(frozen=True)
class Slot:
    """Positions of one pair that are patched together, and the column that the result belongs to.

    Attributes:
        key: The column: a position from the front, a negative one from the end, a number of `ROLES`, or "all".
        positions: Token positions.
    """

    key: int | str
    positions: tuple[int, ...]


def as_pairs(
    clean: Pairs | str | Sequence[str],
    corrupted: str | Sequence[str] | None,
    answer: str | Sequence[str] | None,
    wrong: str | Sequence[str] | None,
) -> list[Pair]:
    """Rows of `Pairs`, or of one string or a list of strings for each part.

    Raises:
        PatchError: No pair, or parts of different length.
    """
    if isinstance(clean, Pairs):
        if corrupted is not None or answer is not None or wrong is not None:
            raise PatchError("Pairs hold corrupted, answer and wrong already; give them there or as strings, not both")
        rows = list(clean)
    else:
        parts = [_strings(part) for part in (clean, corrupted, answer, wrong)]
        if corrupted is None:
            raise PatchError("patch needs a corrupted prompt for each clean one; received none")
        full = [part if part is not None else [""] * len(parts[0] or []) for part in parts]
        if len({len(part) for part in full}) > 1:
            raise PatchError(f"clean, corrupted, answer and wrong must be as many; got {[len(p) for p in full]}")
        rows = [Pair(*row) for row in zip(*full, strict=True)]
    if not rows:
        raise PatchError("patch needs at least one pair; received none")
    return rows


def _strings(part: str | Sequence[str] | None) -> list[str] | None:
    if part is None or isinstance(part, str):
        return part if part is None else [part]
    if not isinstance(part, Sequence) or not all(isinstance(text, str) for text in part):
        raise PatchError(f"prompts and answers must be Pairs, a string or a list of strings; got {type(part).__name__}")
    return list(part)


def tokenise(model: Model, rows: Sequence[Pair], *, reads: int, bos: bool | None) -> list[Tokenised]:
    """Tokenise every pair.

    Args:
        model: The model with its tokenizer.
        rows: The pairs.
        reads: How many answer tokens the metric needs: 0 none, 1 the answer's first, 2 the first at which answer and
            wrong differ (tokens that they share before it are appended to both prompts).
        bos: As in `Model.tokens`.

    Raises:
        PatchError: Prompts of different length or without a difference, answers that are missing or equal.
    """
    unnamed = not any(row.group for row in rows)
    made = []
    for i, row in enumerate(rows):
        name = row.id or str(i)
        made.append(_tokenise(model, row, name, name if unnamed else row.group, reads, bos))
    return made


def _tokenise(model: Model, row: Pair, name: str, group: str, reads: int, bos: bool | None) -> Tokenised:
    answer = wrong = None
    shared = 0
    clean, right = _prompt_and_answer(model, row.clean, row.answer, name, reads > 0, bos)
    corrupted, _ = _prompt_and_answer(model, row.corrupted, row.answer, name, reads > 0, bos)
    if reads > 0:
        answer = right[0]
    if reads > 1:
        other = _prompt_and_answer(model, row.clean, row.wrong, name, True, bos)[1]
        shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(right, other, strict=False))))
        if shared >= min(len(right), len(other)):
            raise PatchError(
                f"pair {name!r}: answer {row.answer!r} and wrong {row.wrong!r} have no token at which they differ "
                f"({right} and {other}); logit_diff needs one"
            )
        answer, wrong = right[shared], other[shared]
    head = right[:shared]
    _check_lengths(model, name, clean, corrupted)
    return Tokenised(name, group, (*clean, *head), (*corrupted, *head), answer, wrong, shared)


def _prompt_and_answer(
    model: Model, prompt: str, answer: str, name: str, needed: bool, bos: bool | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of the prompt, and of the answer as the continuation of the prompt."""
    if not prompt.strip():
        raise PatchError(f"pair {name!r}: clean and corrupted must not be empty; got {prompt!r}")
    if not needed:
        return tuple(int(t) for t in model.tokens(prompt, bos=bos)["input_ids"][0]), ()
    if not answer.strip():
        raise PatchError(f"pair {name!r}: this metric reads the answer's tokens; answer or wrong is empty")
    try:
        row = answer_tokens(model, [(prompt, answer.strip())], bos=bos)[0]
    except DataError as error:
        raise PatchError(f"pair {name!r}: {error}") from error
    return row.input_ids[: row.start], row.input_ids[row.start :]


def _check_lengths(model: Model, name: str, clean: tuple[int, ...], corrupted: tuple[int, ...]) -> None:
    if len(clean) != len(corrupted):
        pieces = [[decode(model, token) for token in ids] for ids in (clean, corrupted)]
        raise PatchError(
            f"pair {name!r}: clean and corrupted must have the same number of tokens; "
            f"clean has {len(clean)}: {pieces[0]}, corrupted has {len(corrupted)}: {pieces[1]}"
        )
    if clean == corrupted:
        raise PatchError(f"pair {name!r}: clean and corrupted are the same tokens; they must differ somewhere")


def decode(model: Model, token: int) -> str:
    """One token as readable text."""
    text = token_strings(model.tokenizer, [token])[0]
    return text.strip(" ") or text


def choose_align(pairs: Sequence[Tokenised], align: str, positions: Sequence[int] | str | None) -> str:
    """Settle `align="auto"`: as the positions are counted, else from the front where all pairs are equally long.

    Raises:
        PatchError: An unknown alignment, or positions that do not go with it.
    """
    if align not in ("auto", "start", "end", "span"):
        raise PatchError(f"align must be 'auto', 'start', 'end' or 'span'; got {align!r}")
    if isinstance(positions, str) and positions != "all":
        raise PatchError(f"positions must be None, 'all' or a list of integers; got {positions!r}")
    if align == "auto":
        front = len({len(pair) for pair in pairs}) == 1
        if positions is not None and not isinstance(positions, str):
            front = not any(p < 0 for p in positions)
        align = "start" if front else "end"
    if align == "span" and positions is not None:
        raise PatchError("align='span' patches by role (before, changed, after, last); positions= does not go with it")
    return align


def slots(
    pairs: Sequence[Tokenised], align: str, positions: Sequence[int] | str | None
) -> tuple[list[list[Slot]], list[int | str]]:
    """The slots of each pair, and all their keys in order. Positions beyond the shortest pair are not patched.

    Raises:
        PatchError: A position that the shortest pair does not have.
    """
    if isinstance(positions, str):
        return [[Slot("all", tuple(range(len(pair))))] for pair in pairs], ["all"]
    if align == "span":
        made = [list(_span(pair)) for pair in pairs]
        present = {slot.key for own in made for slot in own}
        return made, [key for key in range(len(ROLES)) if key in present]
    shortest = min(len(pair) for pair in pairs)
    everywhere = range(shortest) if align == "start" else range(-shortest, 0)
    keys = list(everywhere) if positions is None else list(dict.fromkeys(int(p) for p in positions))
    bad = [key for key in keys if key not in everywhere]
    if bad or not keys:
        raise PatchError(
            f"positions must lie in {everywhere.start} .. {everywhere.stop - 1}, counted from the {align} (the "
            f"shortest prompt has {shortest} tokens); got {bad or 'none'}"
        )
    return [[Slot(key, (key % len(pair),)) for key in keys] for pair in pairs], [*keys]


def _span(pair: Tokenised) -> Iterator[Slot]:
    """The pair's positions by role; a prompt may lack some roles."""
    first, last = pair.changed
    end = len(pair) - 1
    single = first == last
    places = (
        range(first),
        range(0) if single else range(first, first + 1),
        range(first + 1, last),
        range(last, last + 1),
        range(first, last + 1),
        range(last + 1, end),
        range(max(end, last + 1), end + 1),
    )
    for key, place in enumerate(places):
        if place:
            yield Slot(key, tuple(place))


def labels(model: Any, pairs: Sequence[Tokenised], keys: Sequence[int | str], align: str) -> list[str]:
    """A readable name for each key: the role, or the clean token there.

    Where pairs have different tokens at a position, the first pair's is followed by the number of others.
    """
    if align == "span":
        return [ROLES[key] if isinstance(key, int) else key for key in keys]
    made = []
    for key in keys:
        if isinstance(key, str):
            made.append("all positions")
            continue
        tokens = list(dict.fromkeys(pair.clean[key] for pair in pairs))
        text = decode(model, tokens[0])
        made.append(text if len(tokens) == 1 else f"{text} (+{len(tokens) - 1})")
    return made
