"""Texts to token ids, with the characters that each token stands for where they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from activations_cache._reading import Documents
from activations_cache.errors import DataError

CHUNK_DOCUMENTS = 1024  # what is tokenized at once: so many documents,
CHUNK_CHARACTERS = 2**21  # or so many characters if those are fewer documents


@dataclass(frozen=True)
class Encoded:
    """One document's tokens.

    Attributes:
        ids: Token ids, int32 [tokens].
        text: The document's text; None for a document of ids.
        chars: First character of each token and the one after its last, int64 [tokens, 2]; None if not asked for, or
            if the tokenizer cannot tell.
        added: Whether a token is one that the tokenizer adds to the text, [tokens]; None if not asked for.
        text_at: Where `text` begins in the string that was tokenized; None if it is not in it in one piece.
        answer: First character of the answer in that string, and the one after its last; None if not asked for.
    """

    ids: npt.NDArray[np.int32]
    text: str | None = None
    chars: npt.NDArray[np.int64] | None = None
    added: npt.NDArray[np.bool_] | None = None
    text_at: int | None = 0
    answer: tuple[int, int] | None = None

    def tokens_of(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Tokens that share a character with those from `start` to `stop` of the tokenized string."""
        assert self.chars is not None
        return np.flatnonzero((self.chars[:, 1] > start) & (self.chars[:, 0] < stop))

    def answer_tokens(self, number: int) -> tuple[int, int]:
        """First token of the answer, and the one after its last.

        Raises:
            DataError: No token stands for it.
        """
        assert self.answer is not None
        found = self.tokens_of(*self.answer)
        if not len(found):
            raise DataError(f"row {number}: no token stands for its answer; correct or remove the row")
        return int(found[0]), int(found[-1]) + 1


class Encoder:
    """Tokenizes documents chunk by chunk.

    Args:
        tokenizer: A Hugging Face tokenizer, or None for documents of ids.
        documents: The documents.
        bos: As in `tokenize`.
        chat: As in `tokenize`.
        chars: Whether the characters of each token are of use, if the tokenizer can tell them.
        answers: Whether the answers' characters are needed.

    Raises:
        DataError: The tokenizer lacks what is asked of it, or the documents have no answers.
    """

    def __init__(
        self, tokenizer: Any, documents: Documents, bos: bool | None, chat: bool, chars: bool, answers: bool
    ) -> None:
        self.tokenizer, self.documents, self.bos, self.chat = tokenizer, documents, bos, chat
        self.answers: Sequence[Any] | None = None
        if documents.texts is not None:
            self._check_tokenizer()
        if answers:
            self._check_answers()
            self.answers = documents.columns["answer"]
        self.chars = (chars or answers) and bool(getattr(tokenizer, "is_fast", False))
        self.special = chars

    def _check_tokenizer(self) -> None:
        if self.tokenizer is None:
            raise DataError("texts need a tokenizer: pass tokenizer=, or give token ids instead of texts")
        if self.bos and self.tokenizer.bos_token_id is None:
            raise DataError("bos=True, but this tokenizer has no BOS token; pass bos=None or bos=False")
        if self.chat and not getattr(self.tokenizer, "chat_template", None):
            raise DataError(
                "chat=True, but this tokenizer has no chat template; pass chat=False or set its chat_template"
            )

    def _check_answers(self) -> None:
        if self.documents.texts is None:
            raise DataError('positions="answer" needs texts; the data holds token ids: give each row its positions')
        if "answer" not in self.documents.columns:
            raise DataError('positions="answer" needs a column `answer`; the data has none')
        if not getattr(self.tokenizer, "is_fast", False):
            raise DataError(
                'positions="answer" needs a fast tokenizer, which tells the characters that a token stands for; '
                f"{type(self.tokenizer).__name__} does not"
            )

    def __iter__(self) -> Iterator[Encoded]:
        """The documents' tokens, in order.

        Raises:
            DataError: A text has no token; an answer is not in its text.
        """
        for row in self.documents.input_ids if self.documents.input_ids is not None else ():
            yield Encoded(np.asarray(row, np.int32))
        first, texts, size = 0, list[str](), 0
        for text in self.documents.texts if self.documents.texts is not None else ():
            texts.append(text)
            size += len(text)
            if len(texts) >= CHUNK_DOCUMENTS or size >= CHUNK_CHARACTERS:
                yield from self._encode(texts, first)
                first, texts, size = first + len(texts), [], 0
        if texts:
            yield from self._encode(texts, first)

    def _encode(self, texts: list[str], first: int) -> Iterator[Encoded]:
        """Some texts in one call; `first` is the number of the first."""
        strings = self._render(texts, first) if self.chat else texts
        specials = self.bos is None and not self.chat
        asked = {"return_offsets_mapping": self.chars, "return_special_tokens_mask": self.special}
        more = {name: True for name, wanted in asked.items() if wanted}
        # verbose=False: the tokenizer's own length warning is ours to give
        made = self.tokenizer(strings, add_special_tokens=specials, verbose=False, **more)
        for local, text in enumerate(texts):
            number, string = first + local, strings[local]
            ids = np.array(made["input_ids"][local], np.int32)
            chars = np.array(made["offset_mapping"][local], np.int64).reshape(-1, 2) if self.chars else None
            added = np.array(made["special_tokens_mask"][local], np.bool_) if self.special else None
            ids, chars, added = self._with_bos(ids, chars, added)
            if not len(ids):
                raise DataError(f"the text of row {number} has no token: {text!r}")
            at = self._text_at(string, text) if self.chat else 0
            answer = self._answer(number, text, string, at) if self.answers is not None else None
            yield Encoded(ids, text, chars, added, at, answer)

    def _with_bos(self, ids: Any, chars: Any, added: Any) -> tuple[Any, Any, Any]:
        """One BOS in front or none, as was asked."""
        bos_id = self.tokenizer.bos_token_id
        if self.chat and self.bos is not None and bos_id is not None and len(ids) and ids[0] == bos_id:
            ids, chars, added = (None if held is None else held[1:] for held in (ids, chars, added))
        if self.bos:
            ids = np.concatenate([[bos_id], ids]).astype(np.int32)
            chars = None if chars is None else np.concatenate([np.zeros((1, 2), np.int64), chars])
            added = None if added is None else np.concatenate([[True], added])
        return ids, chars, added

    # --- chat ---

    def _render(self, texts: Sequence[str], first: int) -> list[str]:
        if not self.documents.turns:
            return self._template([[_user(text)] for text in texts], prompt=True)
        columns = self.documents.columns
        pairs = [(columns["question"][first + i], columns["answer"][first + i]) for i in range(len(texts))]
        return self._template([[_user(q), {"role": "assistant", "content": a}] for q, a in pairs], prompt=False)

    def _template(self, messages: list[list[dict[str, str]]], prompt: bool) -> list[str]:
        rendered: list[str] = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        return rendered

    def _text_at(self, string: str, text: str) -> int | None:
        """Where a text stands in its rendered message; templates may strip it of spaces at both ends."""
        found = string.rfind(text)
        if found < 0:
            found = string.rfind(text.strip())
            found = found - (len(text) - len(text.lstrip())) if found >= 0 else found
        return None if found < 0 or self.documents.turns else found

    # --- answers ---

    def _answer(self, number: int, text: str, string: str, at: int | None) -> tuple[int, int]:
        assert self.answers is not None
        answer = self.answers[number]
        if not isinstance(answer, str) or not answer.strip():
            raise DataError(f"row {number}: its answer must be a text, not empty; got {answer!r}")
        if self.documents.turns and self.chat:
            return self._answer_in_turn(number, answer, string)
        if self.documents.turns:
            return len(text) - len(answer), len(text)
        found = text.rfind(answer)
        if found < 0 or at is None:
            raise DataError(
                f"row {number}: its answer {answer!r} does not occur in its text; correct or remove the row, or give "
                "`question` and `answer` without a text"
            )
        return at + found, at + found + len(answer)

    def _answer_in_turn(self, number: int, answer: str, string: str) -> tuple[int, int]:
        """The answer after what is the same without it: the question with the generation prompt."""
        [prompt] = self._template([[_user(self.documents.columns["question"][number])]], prompt=True)
        answer = answer.strip()  # templates may strip it
        differ = (i for i, (a, b) in enumerate(zip(prompt, string, strict=False)) if a != b)
        found = string.find(answer, next(differ, min(len(prompt), len(string))))
        if found < 0:
            raise DataError(f"row {number}: its answer {answer!r} does not occur in the chat template's rendering")
        return found, found + len(answer)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
