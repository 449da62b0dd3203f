"""Leak@k: how often k sampled answers hold the right one. Greedy decoding shows one answer and hides the others.

"Leak@k: Unlearning Does Not Make LLMs Forget Under Probabilistic Decoding" (arXiv 2511.04934); the estimator from n
samples is pass@k's ("Evaluating Large Language Models Trained on Code", arXiv 2107.03374).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from probe.audit._case import Case
from probe.audit._numbers import Metric, Number, by_group
from probe.audit._worst import worst_case
from probe.audit.part import Measurement, Part, Subject, spaced
from probe.data import Questions
from probe.errors import AuditError, ProbeError
from probe.models import Model, pad
from probe.scoring import AnswerTokens, answer_tokens, eval_mode

__all__ = ["Sampling", "any_of", "pass_at_k", "sampled_hits", "sampling_logprob", "sequence_probability"]


def any_of(probability: Float[np.ndarray, " row"], k: int) -> Float[np.ndarray, " row"]:
    """Return the probability that at least one of k independent samples is a hit: 1 - (1 - p)^k.

    Computed through logarithms, so that it is right for p of 1e-20 as well.

    Raises:
        AuditError: k below 1, or probabilities outside 0 to 1.
    """
    p = np.asarray(probability, dtype=float)
    if k < 1 or not ((p >= 0) & (p <= 1)).all():
        raise AuditError(f"k must be at least 1 and probabilities from 0 to 1; received k = {k}")
    with np.errstate(divide="ignore"):  # p = 1: log 0, and the result is 1
        found: np.ndarray = -np.expm1(k * np.log1p(-p))
    return found


def pass_at_k(hits: Int[np.ndarray, " row"], n: int, k: int) -> Float[np.ndarray, " row"]:
    """Return the unbiased estimate of `any_of` from n samples with c hits: 1 - C(n - c, k) / C(n, k).

    It is the share of all draws of k from the n samples that hold a hit (arXiv 2107.03374).

    Raises:
        AuditError: k outside 1 to n, or hits outside 0 to n.
    """
    c = np.asarray(hits, dtype=int)
    if not 1 <= k <= n or (c < 0).any() or (c > n).any():
        raise AuditError(f"k must be from 1 to n and hits from 0 to n; received k = {k}, n = {n}")
    # C(n - c, k) / C(n, k) is the product over i < k of (n - c - i) / (n - i)
    i = np.arange(k)
    found: np.ndarray = 1 - np.clip((n - c[..., None] - i) / (n - i), 0, None).prod(-1)
    return found


def sampling_logprob(
    logits: Float[Tensor, "token d_vocab"], temperature: float = 1.0, top_p: float = 1.0
) -> Float[Tensor, "token d_vocab"]:
    """Return the log-probabilities that sampling really draws from.

    Logits are divided by the temperature; then the most probable tokens are kept until their sum reaches `top_p`
    (nucleus sampling, arXiv 1904.09751: a token stays if those before it sum to less than `top_p`, so the first always
    does), and what is kept is scaled to sum to one. Dropped tokens have minus infinity.

    Raises:
        AuditError: A temperature that is not positive, or a `top_p` that is not above 0 and at most 1.
    """
    _check_decoding(temperature, top_p)
    logprob = (logits.float() / temperature).log_softmax(-1)
    if top_p >= 1:
        return logprob
    ordered, index = logprob.sort(dim=-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    dropped = (before >= top_p).scatter(-1, index, before >= top_p)
    return logprob.masked_fill(dropped, -math.inf).log_softmax(-1)


def _check_decoding(temperature: float, top_p: float) -> None:
    if not (math.isfinite(temperature) and temperature > 0 and 0 < top_p <= 1):
        raise AuditError(
            "sampling needs a positive temperature and a top_p above 0 and at most 1; "
            f"received {temperature} and {top_p}"
        )


@torch.no_grad()
def sequence_probability(
    model: Model, rows: Sequence[AnswerTokens], decodings: Sequence[tuple[float, float]], *, batch_size: int = 64
) -> Float[np.ndarray, "decoding row"]:
    """Return, per (temperature, top_p), the probability that a sample begins with exactly the answer's tokens.

    One teacher-forced forward serves all decodings: each token's probability is the one that the decoding would draw it
    with after the right tokens before it.

    Raises:
        ProbeError: Logits that are not finite.
    """
    found = np.zeros((len(decodings), len(rows)))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    with eval_mode(model.hf):
        for start in range(0, len(order), batch_size):
            index = order[start : start + batch_size]
            batch = pad([rows[i].input_ids for i in index], model.pad_id, device=model.device)
            logits = model.hf(**batch, use_cache=False).logits  # [batch, pos, d_vocab]
            for i, own in zip(index, logits, strict=True):
                found[:, i] = _row_probability(own, rows[i], decodings)
    return found


def _row_probability(
    logits: Float[Tensor, "pos d_vocab"], row: AnswerTokens, decodings: Sequence[tuple[float, float]]
) -> list[float]:
    target = torch.tensor(row.input_ids[row.start :], device=logits.device)
    own = logits[row.start - 1 : len(row.input_ids) - 1]  # token t is predicted at position t - 1
    if not torch.isfinite(own).all():
        raise ProbeError("the model's logits at answer tokens are not finite; check its weights and its dtype")
    sums = [sampling_logprob(own, *how).gather(-1, target[:, None]).double().sum() for how in decodings]
    return [math.exp(min(0.0, float(total))) for total in sums]


def sampled_hits(
    model: Model,
    questions: Questions,
    n: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    spare: int = 4,
    bos: bool | None = None,
    chat: bool = False,
    batch_size: int = 64,
    seed: int = 0,
) -> Int[np.ndarray, " row"]:
    """Sample n answers to each question and count those that hold the right one.

    A sample holds the answer if it occurs in it as whole words, whatever the case and the spaces. Prompts are
    left-padded and sampled together with a key-value cache; torch's random state is as before afterwards.

    Args:
        model: The model.
        questions: What is asked.
        n: Samples a question.
        temperature: As in `sampling_logprob`.
        top_p: As in `sampling_logprob`.
        spare: Tokens a sample may have more than the longest answer.
        bos: As in `probe.scoring.answer_tokens`.
        chat: As in `probe.scoring.answer_tokens`.
        batch_size: Samples drawn together.
        seed: Of the samples.

    Raises:
        AuditError: n below 1, or a decoding that cannot be sampled.
        DataError: No questions, or one that leaves no room for an answer in the context.
    """
    _check_decoding(temperature, top_p)
    if n < 1 or spare < 0 or batch_size < 1:
        raise AuditError(f"n and batch_size must be at least 1, spare 0; received {n}, {batch_size} and {spare}")
    rows = answer_tokens(model, [(row.question, row.answer) for row in questions], bos=bos, chat=chat)
    longest = max((len(row.input_ids) - row.start for row in rows), default=1)
    how = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0, "num_return_sequences": n}
    with _own_randomness(model):
        made = model.generate(
            [row.question for row in questions],
            max_new_tokens=longest + spare,
            bos=bos,
            chat=chat,
            batch_size=max(1, batch_size // n),
            seed=seed,
            **how,
        )
    wanted = [_words(row.answer) for row in questions for _ in range(n)]
    held = np.array([want in _words(text) for want, text in zip(wanted, made, strict=True)])
    hits: np.ndarray = held.reshape(-1, n).sum(1)
    return hits


@contextmanager
def _own_randomness(model: Model) -> Iterator[None]:
    """Put the random state back afterwards, on the model's GPU too."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def _words(text: str) -> str:
    """The text's words in lower case, a space on either side of each, punctuation apart."""
    spaced_out = "".join(char if char.isalnum() else " " for char in text.lower())
    return f" {' '.join(spaced_out.split())} "


@dataclass(frozen=True)
class Sampling(Part):
    """Leak@k on the forget set: the probability that k samples hold the answer at least once, mean over questions.

    By default no sample is drawn. The probability p that a sample begins with the answer is the product of the answer
    tokens' probabilities under teacher forcing, and leak@k is 1 - (1 - p)^k: exact, without the noise of sampling, and
    at the price of one forward. It is a lower bound of what sampling finds, where the answer may also come later in the
    sample or in other tokens. With `exact=False`, n samples are drawn and `pass_at_k` is taken of the hits.

    Measures, on `forget`: `leak_at_k` for k = 1, 8 and 32, each under the decoding that leaks most of it (the worst
    case over `decodings`; its interval chooses anew in every bootstrap replicate).

    The table `sampling` has a row per decoding and k: temperature, top_p, k, leak.

    Attributes:
        decodings: Pairs of temperature and top_p.
        exact: Closed form; else samples.
        n_samples: Samples a question where samples are drawn; at least 32, the largest k.
        limit: Rows where samples are drawn; the closed form takes all.
        batch_size: Samples drawn together.
    """

    decodings: tuple[tuple[float, float], ...] = ((1.0, 1.0), (0.7, 1.0), (1.0, 0.9))
    exact: bool = True
    n_samples: int = 64
    limit: int | None = 64
    batch_size: int = 1024

    name: ClassVar[str] = "sampling"
    title: ClassVar[str] = "answers found by sampling (Leak@k)"
    ks: ClassVar[tuple[int, ...]] = (1, 8, 32)
    metrics: ClassVar[tuple[Metric, ...]] = tuple(
        Metric(f"leak_at_{k}", f"answer among {k} samples" if k > 1 else "answer in one sample", share=True) for k in ks
    )
    kind: ClassVar[str] = "attack"
    evidence: ClassVar[tuple[tuple[str, str], ...]] = tuple(("forget", metric.name) for metric in metrics)

    def __post_init__(self) -> None:
        """Refuse decodings that cannot be sampled, and fewer samples than the largest k."""
        if not self.decodings:
            raise AuditError("sampling needs at least one decoding, a pair of temperature and top_p; received none")
        for temperature, top_p in self.decodings:
            _check_decoding(temperature, top_p)
        if self.n_samples < max(self.ks) or (self.limit is not None and self.limit < 1) or self.batch_size < 1:
            raise AuditError(f"n_samples must be at least {max(self.ks)}, limit and batch_size at least 1")

    def measure(self, subject: Subject) -> Measurement:
        """Compute (or estimate from samples) the leak of every decoding and k.

        Raises:
            ProbeError: Logits that are not finite.
        """
        leaks, groups = self._closed(subject) if self.exact else self._sampled(subject)
        numbers, rows, case = [], list[dict[str, Any]](), subject.case
        how_often: dict[str, Any] = {"n_boot": case.n_boot, "seed": case.seed, "people": case.people}
        for k in self.ks:
            means = {how: float(leak[k].mean()) for how, leak in leaks.items()}
            ratios = [by_group(leak[k], groups, share=True) for leak in leaks.values()]
            numbers.append(Number("forget", f"leak_at_{k}", worst_case(ratios, len(groups), **how_often)[1]))
            rows += [{"temperature": t, "top_p": p, "k": k, "leak": mean} for (t, p), mean in means.items()]
        return Measurement(tuple(numbers), {"sampling": pd.DataFrame(rows)})

    def _closed(self, subject: Subject) -> tuple[Mapping[tuple[float, float], dict[int, np.ndarray]], Sequence[str]]:
        """Per decoding and k the leak of each question; temperature 1 without top_p is known already."""
        scores, case = subject.answers["forget"], subject.case
        plain = np.exp(np.minimum(0.0, scores.logprob_sum))
        others = [how for how in self.decodings if how != (1.0, 1.0)]
        found = dict(zip(others, _forced(subject.model, case, others), strict=True)) if others else {}
        probability = {how: found.get(how, plain) for how in self.decodings}
        return {how: {k: any_of(p, k) for k in self.ks} for how, p in probability.items()}, scores.groups

    def _sampled(self, subject: Subject) -> tuple[Mapping[tuple[float, float], dict[int, np.ndarray]], Sequence[str]]:
        case, rows = subject.case, spaced(subject.case.sets["forget"], self.limit)
        how: dict[str, Any] = {"bos": case.bos, "chat": case.chat, "batch_size": self.batch_size, "seed": case.seed}
        leaks = {}
        for temperature, top_p in self.decodings:
            hits = sampled_hits(subject.model, rows, self.n_samples, temperature=temperature, top_p=top_p, **how)
            leaks[temperature, top_p] = {k: pass_at_k(hits, self.n_samples, k) for k in self.ks}
        return leaks, rows.groups


def _forced(model: Model, case: Case, decodings: Sequence[tuple[float, float]]) -> Float[np.ndarray, "decoding row"]:
    pairs = [(row.question, row.answer) for row in case.sets["forget"]]
    rows = answer_tokens(model, pairs, bos=case.bos, chat=case.chat)
    return sequence_probability(model, rows, decodings, batch_size=case.batch_size)
