"""The least training loop on questions: what attacks that train a model share.

It changes the weights where they are, so callers open `scratch` around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probe.data import Questions
from probe.errors import AuditError, DataError
from probe.models import Model, pad
from probe.scoring import AnswerTokens, answer_tokens, eval_mode

__all__ = ["Finetuned", "finetune"]


@dataclass(frozen=True)
class Finetuned:
    """What a finetuning did.

    Attributes:
        losses: Mean loss at the answer tokens of each step's batch, before the step, in nats a token.
        diverged: The step at which the loss or its gradient was no longer finite, and the loop stopped with the weights
            of the step before; None where that never happened.
    """

    losses: tuple[float, ...]
    diverged: int | None = None


def finetune(
    model: Model,
    rows: Questions | Iterable[AnswerTokens],
    *,
    steps: int,
    lr: float,
    batch_size: int = 16,
    seed: int = 0,
    eval_at: Iterable[int] = (),
    on_eval: Callable[[int], Any] | None = None,
    bos: bool | None = None,
    chat: bool = False,
    weight_decay: float = 0.0,
    clip: float = 1.0,
) -> Finetuned:
    """Train all weights of a model in place on the answers of questions, with AdamW at a constant learning rate.

    The learning rate is constant, so that what is seen at step s of a long run is what a run of s steps ends with.
    Dropout is off. Rows are shuffled anew in each pass, dealt into batches of like length, and the batches shuffled:
    all from `seed` alone. On a CPU the same call gives the same bits (with the same number of threads). Weights of less
    than 32 bits are trained through a float32 copy, in which small steps are not rounded away.

    Args:
        model: The model; open `scratch(model)` around the call to have its weights back.
        rows: Questions, or rows that `answer_tokens` has made already.
        steps: Optimiser steps.
        lr: Learning rate.
        batch_size: Rows a step.
        seed: Order of the rows.
        eval_at: Steps at which `on_eval` is called; 0 is before the first step. Steps past the end are left out.
        on_eval: Called with the step; the model is in eval mode and holds the weights after that many steps.
        bos: As in `probe.scoring.answer_tokens`.
        chat: As in `probe.scoring.answer_tokens`.
        weight_decay: Of AdamW.
        clip: Largest norm of the gradient.

    Raises:
        DataError: No rows, or rows that cannot be tokenised.
        AuditError: Steps, learning rate or batch size that are not positive, or a loss that is not finite from the
            first.
    """
    _check(steps, lr, batch_size)
    tokens = _tokens(model, rows, bos, chat)
    wanted, losses = set(eval_at), list[float]()
    with _trainable(model.hf) as parameters, eval_mode(model.hf):
        _report(0, wanted, on_eval)
        optimiser = _Masters(parameters, lr, weight_decay)
        for step, batch in zip(range(1, steps + 1), _batches(tokens, batch_size, seed), strict=False):
            with torch.enable_grad():
                loss = _loss(model, batch)
                if torch.isfinite(loss):
                    loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, clip) if torch.isfinite(loss) else loss
            if not torch.isfinite(norm):
                if step == 1:
                    raise AuditError("the loss or its gradient is not finite at the first step: check the weights")
                return Finetuned(tuple(losses), diverged=step)
            optimiser.step()
            losses.append(loss.item())
            _report(step, wanted, on_eval)
    return Finetuned(tuple(losses))


def _check(steps: int, lr: float, batch_size: int) -> None:
    if steps < 1 or batch_size < 1:
        raise AuditError(f"steps and batch_size must be at least 1; received {steps} and {batch_size}")
    if not (math.isfinite(lr) and lr > 0):
        raise AuditError(f"the learning rate must be positive; received {lr}")


def _tokens(model: Model, rows: Questions | Iterable[AnswerTokens], bos: bool | None, chat: bool) -> list[AnswerTokens]:
    """Rows as the model reads them."""
    if isinstance(rows, Questions):
        made = answer_tokens(model, [(row.question, row.answer) for row in rows], bos=bos, chat=chat)
    else:
        made = list(rows)
    if not made:
        raise DataError("finetuning needs at least one question; received none")
    return made


def _report(step: int, wanted: set[int], on_eval: Callable[[int], Any] | None) -> None:
    if on_eval is not None and step in wanted:
        on_eval(step)


def _batches(tokens: Sequence[AnswerTokens], batch_size: int, seed: int) -> Iterator[list[AnswerTokens]]:
    """Batches without end: every row once a pass."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(tokens), generator=generator).tolist()
        order.sort(key=lambda i: len(tokens[i].input_ids))  # rows of one length stay shuffled
        dealt = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        for i in torch.randperm(len(dealt), generator=generator).tolist():
            yield [tokens[j] for j in dealt[i]]


def _loss(model: Model, rows: Sequence[AnswerTokens]) -> Float[Tensor, ""]:
    """Mean negative log-likelihood of the batch's answer tokens, in float32."""
    batch = pad([row.input_ids for row in rows], model.pad_id, device=model.device)
    logits = model.hf(**batch, use_cache=False).logits  # [batch, pos, d_vocab]
    where = [(i, t) for i, row in enumerate(rows) for t in range(row.start, len(row.input_ids))]
    row, position = torch.tensor(where, device=logits.device).T  # [answer tokens] each
    target = batch["input_ids"].to(logits.device)[row, position]
    return torch.nn.functional.cross_entropy(logits[row, position - 1].float(), target)


@contextmanager
def _trainable(hf: Any) -> Iterator[list[Tensor]]:
    """All floating-point parameters, trainable while the block runs."""
    parameters = [p for p in hf.parameters() if p.is_floating_point()]
    flags = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(True)
    try:
        yield parameters
    finally:
        for p, flag in zip(parameters, flags, strict=True):
            p.grad = None
            p.requires_grad_(flag)


class _Masters:
    """AdamW whose weights are float32: the parameters themselves, or copies of those that have fewer bits."""

    def __init__(self, parameters: Sequence[Tensor], lr: float, weight_decay: float) -> None:
        self.parameters = parameters
        self.masters = [p if p.dtype.itemsize >= 4 else p.detach().float().requires_grad_() for p in parameters]
        self.optimiser = torch.optim.AdamW(self.masters, lr=lr, weight_decay=weight_decay, fused=True)

    def step(self) -> None:
        """One step from the parameters' gradients, which are dropped."""
        for p, master in zip(self.parameters, self.masters, strict=True):
            if master is not p:
                master.grad = None if p.grad is None else p.grad.float()
        self.optimiser.step()
        with torch.no_grad():
            for p, master in zip(self.parameters, self.masters, strict=True):
                p.grad = None
                if master is not p:
                    p.copy_(master)
