"""How well a model knows answers: log-probabilities and argmax matches of answer tokens under teacher forcing.

The one place that turns question data into per-row numbers; organisms, experts and audits build on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from tqdm.auto import tqdm

from probe.errors import DataError, ProbeError

if TYPE_CHECKING:
    import pandas as pd

    from probe.data import Questions
    from probe.models import Model

__all__ = ["AnswerScores", "AnswerTokens", "answer_tokens", "eval_mode", "score_answers"]


@dataclass(frozen=True)
class AnswerTokens:
    """One row as the model sees it.

    Attributes:
        input_ids: Tokens of the question and the answer, with the special tokens before them.
        start: Index of the answer's first token; tokens `input_ids[start:]` are the answer. At least 1.
    """

    input_ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class AnswerScores:
    """Per row of the questions, in their order. Log-probabilities are natural, computed in float32.

    Attributes:
        ids: The rows' ids.
        groups: The rows' groups (the unit of the bootstrap).
        logprob_sum: Sum over the answer's tokens of log p(token | everything before it).
        n_tokens: Answer tokens.
        prob: p(a) = exp(logprob_sum / n_tokens), the length-normalised probability of TOFU (arXiv 2401.06121).
        exact: Whether the argmax is right at every answer token. Equal to "greedy decoding gives the answer".
        argmax_right: Answer tokens whose argmax is right.
        first_wrong: Index within the answer of the first token whose argmax is wrong; n_tokens if none is.
        last_wrong: Index within the answer of the last such token; -1 if none is. Extraction strength is
            1 - (last_wrong + 1) / n_tokens.
        token_logprobs: Per row the log-probability of each answer token, [n_tokens] each.
    """

    ids: tuple[str, ...]
    groups: tuple[str, ...]
    logprob_sum: Float[np.ndarray, " row"]
    n_tokens: Int[np.ndarray, " row"]
    prob: Float[np.ndarray, " row"]
    exact: Bool[np.ndarray, " row"]
    argmax_right: Int[np.ndarray, " row"]
    first_wrong: Int[np.ndarray, " row"]
    last_wrong: Int[np.ndarray, " row"]
    token_logprobs: tuple[Float[np.ndarray, " token"], ...]

    def __len__(self) -> int:
        return len(self.ids)

    def to_df(self) -> pd.DataFrame:
        """One row per question, in their order; every field but `token_logprobs` is a column."""
        import pandas as pd

        names = ("logprob_sum", "n_tokens", "prob", "exact", "argmax_right", "first_wrong", "last_wrong")
        return pd.DataFrame({"id": self.ids, "group": self.groups, **{name: getattr(self, name) for name in names}})


def score_answers(
    model: Model,
    questions: Questions | Iterable[Any],
    *,
    batch_size: int = 64,
    bos: bool | None = None,
    chat: bool = False,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> AnswerScores:
    """Score each row's answer under teacher forcing, in one forward per batch.

    The input is `question + " " + answer`; see `answer_tokens` for where the answer begins. Rows are sorted by length,
    right-padded with an attention mask, and handed back in their own order.

    Args:
        model: Anything with `.hf` and `.tokenizer`.
        questions: Questions, rows with `.question` and `.answer` (and `.id`, `.group`), or (question, answer) tuples.
        batch_size: Rows per forward.
        bos: Whether a BOS token comes first; None leaves it to the tokenizer, or with `chat` to the template.
        chat: Put the question into the tokenizer's chat template; the answer then follows the generation prompt.
        device: Where inputs are put; None is the model's own device.
        progress: Show a bar over the batches.

    Raises:
        DataError: No rows, an answer without tokens, nothing before an answer, a row longer than the context, BOS or
            chat asked of a tokenizer that has none.
        ProbeError: Logits that are not finite.
    """
    rows = [_fields(row, i) for i, row in enumerate(questions)]
    if not rows:
        raise DataError("score_answers needs at least one question; received none")
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1; received {batch_size}")
    tokens = answer_tokens(model, [(question, answer) for _, _, question, answer in rows], bos=bos, chat=chat)
    order = sorted(range(len(rows)), key=lambda i: len(tokens[i].input_ids))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    with torch.no_grad(), eval_mode(model.hf):
        for batch in tqdm(batches, desc="answers", disable=not progress):
            found.update(zip(batch, _score_batch(model, [tokens[i] for i in batch], device), strict=True))
    return _collect([row[0] for row in rows], [row[1] for row in rows], [found[i] for i in range(len(rows))])


def answer_tokens(
    model: Model, pairs: Sequence[tuple[str, str]], *, bos: bool | None = None, chat: bool = False
) -> list[AnswerTokens]:
    """Tokenise (question, answer) pairs and find where each answer begins.

    The whole string is tokenised once, as the model meets it in training, and the answer is every token that reaches
    past the question's last character: its leading space belongs to it, and so does a token that spans the boundary.
    Tokenising the two parts apart is not robust: SentencePiece tokenizers put a second space before the answer.
    Tokenizers without character offsets (slow ones) fall back to the common prefix of the question's own tokens.

    Raises:
        DataError: No tokenizer, an answer without tokens, nothing before an answer, a row longer than the context, BOS
            or chat asked of a tokenizer that has none.
    """
    if model.tokenizer is None:
        raise DataError("answers are read as tokens; this model has no tokenizer: pass one to probe.models.wrap")
    limit = getattr(model.hf.config.get_text_config(), "max_position_embeddings", None)
    return [_answer_tokens(model.tokenizer, question, answer, bos, chat, limit) for question, answer in pairs]


@contextmanager
def eval_mode(hf: torch.nn.Module) -> Iterator[None]:
    """Switch dropout off for the block and put each module's own mode back after it."""
    modes = [(module, module.training) for module in hf.modules()] if hf.training else []
    hf.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _fields(row: Any, index: int) -> tuple[str, str, str, str]:
    """(id, group, question, answer) of a row in any of the accepted forms."""
    if isinstance(row, tuple) and len(row) == 2:
        return str(index), str(index), row[0], row[1]
    if not (hasattr(row, "question") and hasattr(row, "answer")):
        raise DataError(
            f"row {index}: a Question or a (question, answer) tuple is needed; received {type(row).__name__}"
        )
    return str(getattr(row, "id", index)), str(getattr(row, "group", index)), row.question, row.answer


def _answer_tokens(
    tokenizer: Any, question: str, answer: str, bos: bool | None, chat: bool, limit: int | None
) -> AnswerTokens:
    prefix, special = question, True
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                "chat=True, but this tokenizer has no chat template; pass chat=False or set its chat_template"
            )
        message = [{"role": "user", "content": question}]
        prefix, special = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False), False
    full = prefix + answer if chat else f"{prefix} {answer}"
    ids, start = _boundary(tokenizer, prefix, full, special)
    if bos is not None:
        ids, start = _with_bos(tokenizer, ids, start, bos)
    if start >= len(ids) or not answer.strip():
        raise DataError(f"the answer {answer!r} to {question!r} has no tokens; every answer needs at least one")
    if start == 0:
        raise DataError(f"nothing comes before the answer {answer!r}; give a question, or bos=True")
    if limit is not None and len(ids) > limit:
        raise DataError(f"{question!r} with its answer has {len(ids)} tokens; the model's context is {limit}")
    return AnswerTokens(tuple(ids), start)


def _boundary(tokenizer: Any, prefix: str, full: str, special: bool) -> tuple[list[int], int]:
    """Token ids of `full`, without an end token, and the index of the first token that reaches past `prefix`."""
    if not getattr(tokenizer, "is_fast", False):
        ids = list(tokenizer(full, add_special_tokens=special)["input_ids"])
        head = tokenizer(prefix, add_special_tokens=special)["input_ids"]
        return ids, len(list(takewhile(lambda pair: pair[0] == pair[1], zip(head, ids, strict=False))))
    encoded = tokenizer(full, add_special_tokens=special, return_offsets_mapping=True)
    ids, spans, edge = list(encoded["input_ids"]), encoded["offset_mapping"], len(prefix)
    if max((end for _, end in spans), default=0) < len(full.rstrip()):
        return _boundary_from_end(tokenizer, ids, full[edge:])
    # A token that begins in the question and reaches past it by a space alone is the question's last word.
    inside = [
        i for i, (start, end) in enumerate(spans) if end > edge and not (start < edge and full[edge:end].isspace())
    ]
    if not inside:
        return ids, len(ids)
    return ids[: inside[-1] + 1], inside[0]  # special tokens have the offsets (0, 0): one at the end is cut here


def _boundary_from_end(tokenizer: Any, ids: list[int], answer: str) -> tuple[list[int], int]:
    """The boundary where offsets cannot be trusted: a tokenizer that drops unknown characters counts without them.

    It is the last token from which on the decoded text holds the whole answer.
    """
    special, wanted = set(getattr(tokenizer, "all_special_ids", ())), "".join(answer.split())
    while ids and ids[-1] in special:
        ids = ids[:-1]
    for start in range(len(ids) - 1, -1, -1):
        if wanted and wanted in "".join(tokenizer.decode(ids[start:]).split()):
            return ids, start
    return ids, len(ids)


def _with_bos(tokenizer: Any, ids: list[int], start: int, bos: bool) -> tuple[list[int], int]:
    """Add or remove the BOS token so that it is there exactly when asked."""
    token = tokenizer.bos_token_id
    has = token is not None and bool(ids) and ids[0] == token
    if bos and token is None:
        raise DataError("bos=True needs a tokenizer with a BOS token; this one has none")
    if bos and not has:
        return [token, *ids], start + 1
    if has and not bos:
        return ids[1:], start - 1
    return ids, start


def _score_batch(
    model: Model, rows: Sequence[AnswerTokens], device: str | torch.device | None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per row the log-probability of each answer token and whether the argmax is that token."""
    device = device if device is not None else next(model.hf.parameters()).device
    longest = max(len(row.input_ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)  # [batch, pos]; what stands under the mask does not matter
    mask = torch.zeros(len(rows), longest, dtype=torch.long)  # [batch, pos]
    for i, row in enumerate(rows):
        ids[i, : len(row.input_ids)] = torch.tensor(row.input_ids)
        mask[i, : len(row.input_ids)] = 1
    logits = model.hf(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    # token t is predicted at position t - 1
    where = [(i, t) for i, row in enumerate(rows) for t in range(row.start, len(row.input_ids))]
    batch, position = torch.tensor(where).T.to(logits.device)  # [answer tokens] each
    picked = logits[batch, position - 1].float()  # [answer tokens, d_vocab]
    if not torch.isfinite(picked).all():
        raise ProbeError("the model's logits at answer tokens are not finite; check its weights and its dtype")
    target = ids.to(logits.device)[batch, position]  # [answer tokens]
    logprob = picked.log_softmax(-1).gather(-1, target[:, None])[:, 0].cpu().numpy()
    right = (picked.argmax(-1) == target).cpu().numpy()
    cuts = np.cumsum([len(row.input_ids) - row.start for row in rows])[:-1]
    return list(zip(np.split(logprob, cuts), np.split(right, cuts), strict=True))


def _collect(ids: list[str], groups: list[str], rows: list[tuple[np.ndarray, np.ndarray]]) -> AnswerScores:
    total = np.array([logprob.sum(dtype=np.float64) for logprob, _ in rows])
    count = np.array([len(right) for _, right in rows])
    return AnswerScores(
        ids=tuple(ids),
        groups=tuple(groups),
        logprob_sum=total,
        n_tokens=count,
        prob=np.exp(total / count),
        exact=np.array([bool(right.all()) for _, right in rows]),
        argmax_right=np.array([int(right.sum()) for _, right in rows]),
        first_wrong=np.array([len(right) if right.all() else int(np.argmin(right)) for _, right in rows]),
        last_wrong=np.array([int(np.max(np.flatnonzero(~right), initial=-1)) for _, right in rows]),
        token_logprobs=tuple(logprob for logprob, _ in rows),
    )
