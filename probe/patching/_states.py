"""Values of sites at the positions that predict an answer, one question or one answer token a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from activations_cache import sites
from probe.errors import DataError, PatchError
from probe.models import pad
from probe.scoring import AnswerTokens, answer_tokens, eval_mode

if TYPE_CHECKING:
    from probe.data import Questions
    from probe.models import Model

RESID = "blocks.*.hook_resid_post"


@dataclass(frozen=True)
class AnswerStates:
    """What some sites held where a model predicts answers, under teacher forcing.

    Answer token t of a row is predicted at position t - 1, so the first position of a row is the last token of its
    question. Rows come in the order of the questions, positions in the order of the text.

    Attributes:
        values: Per site, in forward order, `[position, *shape]`, on the CPU, in the model's dtype.
        row: Which question each position belongs to.
        token: The answer token that is predicted at each position.
        rows: Every question as the model read it.
    """

    values: dict[str, Tensor]
    row: Int[Tensor, " position"]
    token: Int[Tensor, " position"]
    rows: tuple[AnswerTokens, ...]

    def __getitem__(self, site: str) -> Tensor:
        return self.values[site]

    @property
    def first(self) -> Int[Tensor, " row"]:
        """The index of each row's first position: the end of its question."""
        return torch.searchsorted(self.row, torch.arange(len(self.rows)))


def answer_states(
    model: Model,
    questions: Questions | Sequence[tuple[str, str]],
    site: str | Sequence[str] = RESID,
    *,
    first: bool = False,
    batch_size: int = 64,
    bos: bool | None = None,
    chat: bool = False,
    progress: bool = False,
) -> AnswerStates:
    """Read sites at the positions that predict each question's answer, in one forward a batch.

    Args:
        model: A causal language model with its tokenizer.
        questions: Questions, or (question, answer) tuples.
        site: Names or patterns of sites with one row a token; the residual stream after every block by default.
        first: Keep the last position of the question alone (where the answer's first token is predicted).
        batch_size: Rows a forward.
        bos: Whether a BOS token comes first; None leaves it to the tokenizer.
        chat: Put questions into the chat template.
        progress: Show a bar over the batches.

    Raises:
        DataError: No questions, or what `probe.scoring.answer_tokens` refuses.
        PatchError: Values that are not finite.
        SiteError: A site that the model does not have.
    """
    rows = tokenised(model, questions, bos=bos, chat=chat)
    kept: dict[str, list[Tensor | None]] = {}
    with torch.no_grad(), eval_mode(model.hf):
        for index in tqdm(list(by_length(rows, batch_size)), desc="states", disable=not progress):
            run = sites.run(model, batch_inputs(model, [rows[i] for i in index]), read=site)
            for name, value in run.values.items():
                own = kept.setdefault(name, [None] * len(rows))
                for b, i in enumerate(index):
                    end = rows[i].start if first else len(rows[i].input_ids) - 1
                    own[i] = value[b, rows[i].start - 1 : end].cpu()
    values = {name: torch.cat([part for part in own if part is not None]) for name, own in kept.items()}
    _check_finite(values)
    counts = [1] * len(rows) if first else _lengths(rows)
    row = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(counts))
    tokens = [t for one, n in zip(rows, counts, strict=True) for t in one.input_ids[one.start : one.start + n]]
    return AnswerStates(values, row, torch.tensor(tokens), rows)


def tokenised(
    model: Model, questions: Questions | Sequence[tuple[str, str]], *, bos: bool | None, chat: bool
) -> tuple[AnswerTokens, ...]:
    """Tokenise questions with their answers.

    Raises:
        DataError: There are none, or what `probe.scoring.answer_tokens` refuses.
    """
    pairs = [row if isinstance(row, tuple) else (row.question, row.answer) for row in questions]
    if not pairs:
        raise DataError("hidden states are read on questions; at least one is needed, none was given")
    return tuple(answer_tokens(model, pairs, bos=bos, chat=chat))


def by_length(rows: Sequence[AnswerTokens], batch_size: int) -> Iterator[list[int]]:
    """Row numbers in batches of about the same length."""
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1; received {batch_size}")
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def batch_inputs(model: Model, rows: Sequence[AnswerTokens]) -> dict[str, Tensor]:
    """Token ids, padded on the right, and their mask."""
    return pad([row.input_ids for row in rows], model.pad_id, device=model.device)


def _lengths(rows: Sequence[AnswerTokens]) -> list[int]:
    return [len(row.input_ids) - row.start for row in rows]


def _check_finite(values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        if not torch.isfinite(value).all():
            raise PatchError(f"{name} must hold finite values; some are NaN or infinite: check weights and dtype")
