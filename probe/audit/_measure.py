"""One model's forwards: answers, the log-probabilities that KL needs, and the loss on ordinary text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from probe.data import Questions
from probe.errors import AuditError, DataError, ProbeError
from probe.models import Model, pad
from probe.scoring import AnswerScores, AnswerTokens, answer_tokens, eval_mode, score_answers

KL_SETS = ("forget", "retain")
_LOGITS = 2**27  # logits held at once when measuring perplexity (half a GiB in float32)


@dataclass(frozen=True)
class Settings:
    """How forwards are made; `bos` and `chat` as in `probe.scoring.score_answers`. The corpus heeds `bos` alone."""

    batch_size: int = 64
    bos: bool | None = None
    chat: bool = False
    progress: bool = True


@dataclass(frozen=True)
class Plan:
    """What every model is measured on, so that all are measured on the same."""

    sets: Mapping[str, Questions]
    tokens: Mapping[str, list[AnswerTokens]]
    kl_rows: Mapping[str, list[int]]  # per set the rows whose log-probabilities are kept, in order
    windows: list[list[list[int]]]  # per text its token ids, cut to the context's length
    settings: Settings

    def answers_table(self, measured: Mapping[str, Measured]) -> pd.DataFrame:
        """One row per set, model and question."""
        tables = [
            scores.to_df().assign(set=name, model=model)
            for model, one in measured.items()
            for name, scores in one.answers.items()
        ]
        table = pd.concat(tables, ignore_index=True)
        first = ["set", "model", "id", "group"]
        return table[first + [column for column in table.columns if column not in first]]


@dataclass(frozen=True)
class LogProbs:
    """Log-probabilities over the vocabulary at the answer tokens of some rows, and which group each token is of."""

    values: Float[Tensor, "token d_vocab"]
    groups: Sequence[str]


@dataclass(frozen=True)
class Measured:
    """One model on everything: answers per set, log-probabilities per KL set, loss and tokens per text."""

    answers: Mapping[str, AnswerScores]
    logprobs: Mapping[str, LogProbs]
    loss: Float[np.ndarray, " text"] = field(default_factory=lambda: np.zeros(0))
    n_tokens: Int[np.ndarray, " text"] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


def make_plan(
    model: Model,
    sets: Mapping[str, Questions],
    corpus: Iterable[str] | None,
    settings: Settings,
    kl_bytes: int,
    seed: int,
) -> Plan:
    """Tokenise everything once and choose the questions for KL, of which one model may take `kl_bytes`.

    Raises:
        DataError: A model without tokenizer, answers or texts without tokens, texts that are no strings.
    """
    if model.tokenizer is None:
        raise DataError("an audit needs the model's tokenizer; give it to probe.models.wrap(hf, tokenizer)")
    pairs = {name: [(row.question, row.answer) for row in rows] for name, rows in sets.items()}
    tokens = {n: answer_tokens(model, own, bos=settings.bos, chat=settings.chat) for n, own in pairs.items()}
    d_vocab = int(model.hf.get_output_embeddings().weight.shape[0])
    limit = kl_bytes // (4 * d_vocab * len(KL_SETS))  # float32 answer tokens of one set
    kl_rows = {name: _fitting(tokens[name], limit, seed) for name in KL_SETS}
    return Plan(sets, tokens, kl_rows, _windows(model, corpus, settings.bos), settings)


def measure(model: Model, plan: Plan, name: str) -> Measured:
    """One forward of the model over every set and the corpus.

    Raises:
        AuditError: Logits that are not finite.
    """
    answers, logprobs, how = {}, {}, plan.settings
    for set_name in tqdm(plan.sets, desc=f"audit: {name}", disable=not how.progress, leave=False):
        rows = plan.sets[set_name]
        wanted = [plan.tokens[set_name][i] for i in plan.kl_rows.get(set_name, [])]
        try:
            with _keeping(model, wanted) as kept:
                answers[set_name] = score_answers(model, rows, batch_size=how.batch_size, bos=how.bos, chat=how.chat)
        except DataError:
            raise
        except ProbeError as error:
            raise AuditError(f"{name}, {set_name}: {error}") from error
        if set_name in plan.kl_rows:
            logprobs[set_name] = _stacked(wanted, kept, [rows[i].group for i in plan.kl_rows[set_name]])
    loss, n_tokens = _corpus_loss(model, plan, name)
    return Measured(answers, logprobs, loss, n_tokens)


def _fitting(tokens: Sequence[AnswerTokens], limit: int, seed: int) -> list[int]:
    """As many random rows as have `limit` answer tokens together (at least one row), in their order."""
    order = np.random.default_rng(seed).permutation(len(tokens))
    total = np.cumsum([len(tokens[i].input_ids) - tokens[i].start for i in order])
    return sorted(int(i) for i in order[: max(1, int(np.searchsorted(total, limit, side="right")))])


@contextmanager
def _keeping(
    model: Model, rows: Sequence[AnswerTokens]
) -> Iterator[dict[tuple[int, ...], Float[Tensor, "token vocab"]]]:
    """While open, keep the log-probabilities at the answer tokens of these rows from whatever forwards are made.

    A hook on the model, so that the forward that scores the answers is the one that KL is computed from. Rows are
    recognised by their token ids.
    """
    kept: dict[tuple[int, ...], Tensor] = {}
    starts: dict[tuple[int, ...], int] = {}
    for row in rows:  # the same text may be split into question and answer in two ways: keep from the earlier one
        starts[row.input_ids] = min(row.start, starts.get(row.input_ids, row.start))

    def hook(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        lengths = kwargs["attention_mask"].sum(1).tolist()
        for ids, length, logits in zip(kwargs["input_ids"].tolist(), lengths, output.logits, strict=True):
            key = tuple(ids[:length])
            if key in starts:  # token t is predicted at position t - 1
                kept[key] = logits[starts[key] - 1 : length - 1].float().log_softmax(-1).cpu()

    handle = model.hf.register_forward_hook(hook, with_kwargs=True)
    try:
        yield kept
    finally:
        handle.remove()


def _stacked(rows: Sequence[AnswerTokens], kept: Mapping[tuple[int, ...], Tensor], groups: Sequence[str]) -> LogProbs:
    parts = [kept[row.input_ids][-(len(row.input_ids) - row.start) :] for row in rows]  # [answer tokens, d_vocab]
    return LogProbs(torch.cat(parts), [g for g, part in zip(groups, parts, strict=True) for _ in range(len(part))])


def _windows(model: Model, corpus: Iterable[str] | None, bos: bool | None) -> list[list[list[int]]]:
    """Per text its token ids in windows no longer than the context; windows of one token predict nothing and go.

    `bos` decides how a text's first window begins. Its later windows begin with the text's next token, whatever `bos`
    is; that token is read and not predicted.
    """
    if corpus is None:
        return []
    texts = [corpus] if isinstance(corpus, str) else list(corpus)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DataError("corpus must be an iterable of texts with at least one; received none, or something else")
    size = int(getattr(model.hf.config.get_text_config(), "max_position_embeddings", 0) or 1024)
    encoded = [_text_ids(model.tokenizer, text, bos) for text in texts]
    cut = [[ids[i : i + size] for i in range(0, len(ids), size) if len(ids) > i + 1] for ids in encoded]
    cut = [windows for windows in cut if windows]
    if not cut:
        raise DataError("corpus must have a text of at least two tokens; none has")
    return cut


def _text_ids(tokenizer: Any, text: str, bos: bool | None) -> list[int]:
    """A text's ids, `bos` as in `activations_cache.tokenize`, without what a tokenizer appends: no text to predict."""
    if bos and tokenizer.bos_token_id is None:
        raise DataError("bos=True needs a tokenizer with a BOS token; this one has none: pass bos=None or bos=False")
    plain = list(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])
    if not plain:
        return []
    if bos is not None:
        return [tokenizer.bos_token_id, *plain] if bos else plain
    ids = list(tokenizer(text, truncation=False, verbose=False)["input_ids"])
    ends = (i for i in range(len(plain), len(ids) + 1) if ids[i - len(plain) : i] == plain)
    return ids[: next(ends, len(ids))]


@torch.no_grad()
def _corpus_loss(model: Model, plan: Plan, name: str) -> tuple[Float[np.ndarray, " text"], Int[np.ndarray, " text"]]:
    """Summed loss in nats and number of predicted tokens, per text."""
    flat = [(text, ids) for text, windows in enumerate(plan.windows) for ids in windows]
    flat.sort(key=lambda pair: len(pair[1]))
    loss, count = np.zeros(len(plan.windows)), np.zeros(len(plan.windows), dtype=np.int64)
    d_vocab = int(model.hf.get_output_embeddings().weight.shape[0])
    start, size = 0, plan.settings.batch_size
    with eval_mode(model.hf), tqdm(total=len(flat), desc=f"{name}: corpus", disable=not plan.settings.progress) as bar:
        while start < len(flat):
            longest = len(flat[min(start + size, len(flat)) - 1][1])
            batch = flat[start : start + max(1, min(size, _LOGITS // (longest * d_vocab)))]
            for (text, ids), nats in zip(batch, _losses(model, [ids for _, ids in batch]), strict=True):
                loss[text] += nats
                count[text] += len(ids) - 1
            start += len(batch)
            bar.update(len(batch))
    if not np.isfinite(loss).all():
        raise AuditError(f"{name}, corpus: the model's loss is not finite; check its weights and its dtype")
    return loss, count


def _losses(model: Model, rows: Sequence[Sequence[int]]) -> list[float]:
    """Per row the sum over its tokens but the first of -log p, in nats."""
    batch = pad(rows, model.pad_id, device=model.device)
    ids, mask = batch["input_ids"], batch["attention_mask"]  # [batch, pos]
    logits = model.hf(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    logprob = logits.log_softmax(-1).gather(-1, ids[:, 1:, None].to(logits.device))[..., 0]  # [batch, pos - 1]
    nats: list[float] = (-logprob.double() * mask[:, 1:].to(logits.device)).sum(1).tolist()
    return nats
