"""A word that a real model knows, as forget data: contexts of a corpus that call for it, and for others of its kind."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from probe.data._rows import Labelled, Pairs, Questions
from probe.errors import DataError


@dataclass(frozen=True)
class WordData:
    """What `word_data` makes. The group of every row is its text; `forget` and `retain` share no text.

    Attributes:
        forget: Contexts that call for the word.
        retain: Contexts that call for one of the others, from texts without the word.
        labelled: All these contexts, each labelled with the word that it calls for.
        pairs: Contexts of the word beside the same with another word in its place.
    """

    forget: Questions
    retain: Questions
    labelled: Labelled
    pairs: Pairs


def word_data(
    texts: Sequence[str],
    word: str,
    others: Sequence[str],
    *,
    max_rows: int = 160,
    max_words: int = 60,
    n_tokens: Callable[[str], int] | None = None,
    seed: int = 0,
) -> WordData:
    """Cut contexts out of texts at the point where a word comes that was mentioned before.

    A model of any size can continue such a context by looking back, and one that knows the word's kind does: the answer
    can be measured without anybody having to write questions.

    Args:
        texts: The corpus.
        word: The word to forget, such as a character's name; letter case counts.
        others: Words of the same kind, to retain.
        max_rows: Rows of `forget`, and of `retain`; at most one occurrence of a word a text.
        max_words: Longest context, in words; longer ones lose sentences at the front.
        n_tokens: Length of a text in tokens; pairs are kept only if both sides have the same. Without it all are kept.
        seed: Which rows are taken where there are more.

    Raises:
        DataError: the word is among the others, or fewer than 8 contexts call for it, or for the others.
    """
    if word in others:
        raise DataError(f"The word to forget, {word!r}, is also among the words to retain.")
    rng = np.random.default_rng(seed)
    forget = _sample([*_contexts(texts, [word], max_words)], max_rows, rng)
    without = ["" if re.search(rf"\b{re.escape(word)}\b", text) else text for text in texts]
    retain = _sample([*_contexts(without, list(others), max_words)], max_rows, rng)
    for rows, words in ((forget, [word]), (retain, others)):
        if len(rows) < 8:
            raise DataError(
                f"Only {len(rows)} contexts of at most {max_words} words call for {', '.join(words)} a second time; "
                "at least 8 are needed. Give more text, longer contexts or a commoner word."
            )
    labelled = [{"text": row["question"], "label": row["answer"], "group": row["group"]} for row in forget + retain]
    return WordData(
        Questions.from_rows(forget, "forget"),
        Questions.from_rows(retain, "retain"),
        Labelled.from_rows(labelled, "labelled"),
        _pairs(forget, word, list(others), n_tokens, rng),
    )


def _contexts(texts: Sequence[str], words: list[str], max_words: int) -> Iterator[dict[str, Any]]:
    """The second mention of each word in each text, with what stands before it."""
    pattern = re.compile(r"(?<= )(" + "|".join(map(re.escape, words)) + r")\b")
    for i, text in enumerate(texts):
        seen: set[str] = set()
        for match in pattern.finditer(text):
            word = match.group(1)
            context = _shorten(text[: match.start()].rstrip(" "), max_words)
            if word in seen or not re.search(rf"\b{re.escape(word)}\b", context):
                continue
            seen.add(word)
            yield {"id": f"{i}-{word}", "group": f"text {i}", "question": context, "answer": word}


def _shorten(context: str, max_words: int) -> str:
    """Drop sentences at the front until the rest is short enough (the last one is cut if it must be)."""
    starts = [0, *(match.end() for match in re.finditer(r"(?<=[.!?])\s+", context))]
    for start in starts:
        if len(context[start:].split()) <= max_words:
            return context[start:]
    return " ".join(context.split()[-max_words:])


def _sample(rows: list[dict[str, Any]], most: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    return rows if len(rows) <= most else [rows[i] for i in sorted(rng.permutation(len(rows))[:most])]


def _pairs(
    forget: list[dict[str, Any]],
    word: str,
    others: list[str],
    n_tokens: Callable[[str], int] | None,
    rng: np.random.Generator,
) -> Pairs:
    rows = []
    for row in forget:
        clean = row["question"]
        for other in (others[i] for i in rng.permutation(len(others))):
            corrupted = re.sub(rf"\b{re.escape(word)}\b", other, clean)
            if other not in clean and (n_tokens is None or n_tokens(clean) == n_tokens(corrupted)):
                ids = {"id": row["id"], "group": row["group"]}
                rows.append({"clean": clean, "corrupted": corrupted, "answer": word, "wrong": other, **ids})
                break
    if not rows:
        raise DataError(
            f"None of {', '.join(others)} has as many tokens as {word!r} in any context; no pair can be made."
        )
    return Pairs.from_rows(rows, "pairs")
