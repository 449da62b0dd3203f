"""The training loop that all methods share: a copy of the model, an objective of two sets' losses, an `Edit`."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from probe.data import Questions
from probe.editing import Edit
from probe.errors import DataError, EditError
from probe.models import Model, pad, wrap
from probe.scoring import AnswerTokens, answer_tokens, score_answers

StopOn = Literal["recall", "probability"]


@dataclass(frozen=True)
class Losses:
    """A batch's losses.

    Attributes:
        sums: Per row the negative log-likelihood of its answer, summed over the answer's tokens, in nats (ℓ).
        counts: Per row its answer tokens.
        reference: `sums` under the model as it was before training; None unless the method needs it.
    """

    sums: Float[Tensor, " row"]
    counts: Int[Tensor, " row"]
    reference: Float[Tensor, " row"] | None = None

    @property
    def mean(self) -> Float[Tensor, ""]:
        """Mean over all answer tokens of the batch, what `transformers` calls the loss."""
        return self.sums.sum() / self.counts.sum()


Objective = Callable[[Losses, Losses | None], Float[Tensor, ""]]


@dataclass(frozen=True)
class Training:
    """How to train: every method's keyword arguments.

    Attributes:
        lr: Learning rate of AdamW; constant.
        steps: Most optimiser steps.
        batch_size: Rows of each set a step.
        seed: Order of the rows.
        device: Where to train; None for where the model is.
        progress: Show a bar.
        stop_at: Stop as soon as the forget set's recall (or probability) is at most this; None to make all steps.
        stop_on: `"recall"` (share of greedy answers that are right) or `"probability"` (mean of exp(-ℓ/|y|)).
        check_every: Steps between two looks at the forget set, where there is a `stop_at`; one follows the last step.
        bos: As in `probe.scoring.answer_tokens`.
        chat: As in `probe.scoring.answer_tokens`.
    """

    lr: float
    steps: int
    batch_size: int
    seed: int = 0
    device: str | torch.device | None = None
    progress: bool = True
    stop_at: float | None = None
    stop_on: StopOn = "recall"
    check_every: int = 1
    bos: bool | None = None
    chat: bool = False

    def __post_init__(self) -> None:
        counts = {"steps": self.steps, "batch_size": self.batch_size, "check_every": self.check_every}
        for name, value in counts.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise EditError(f"{name} must be at least 1, a whole number; received {value!r}")
        if not isinstance(self.seed, int) or not -(2**63) <= self.seed < 2**64:
            raise EditError(f"seed must be a whole number of at most 64 bits; received {self.seed!r}")
        if not (_is_real(self.lr) and self.lr > 0):
            raise EditError(f"lr must be a positive number; received {self.lr!r}")
        if self.stop_at is not None and not (_is_real(self.stop_at) and 0 <= self.stop_at < 1):
            raise EditError(f"stop_at must be a share from 0 to below 1; received {self.stop_at!r}")
        if self.device is not None:
            _check_device(self.device)
        if self.stop_on not in ("recall", "probability"):
            raise EditError(f"stop_on must be 'recall' or 'probability'; received {self.stop_on!r}")


def train(
    model: Model,
    method: str,
    objective: Objective,
    forget: Questions,
    retain: Questions | None,
    training: Training,
    *,
    trained_on: Questions | None = None,
    reference: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Edit:
    """Train a copy of the model on an objective, and return what changed.

    Each step takes `batch_size` rows of the forget set and as many of the retain set, each set shuffled anew in every
    pass. AdamW without weight decay, gradient norm at most 1 (the default of transformers' Trainer), dropout off. The
    copy is trained in float32 and rounded to the model's own types at the end.

    Args:
        model: The base; it is not changed.
        method: Name for the record.
        objective: From the forget batch's losses and the retain batch's (None without a retain set) to what is
            minimised.
        forget: What is to go; `stop_at` looks at these.
        retain: What is to stay, or None.
        training: How to train.
        trained_on: Rows to train on in place of `forget`, such as the same questions with other answers.
        reference: Whether the objective needs `Losses.reference` of the forget rows.
        settings: The method's own settings, for the record.

    Raises:
        DataError: No rows, sets that share a row, rows that cannot be tokenised, a model without tokenizer.
        EditError: A loss that is not finite, a forget set that is at `stop_at` before the first step, no change.
    """
    _check_sets(forget, retain)
    twin = _twin(model, training.device)
    rows = _tokens(twin, trained_on or forget, training)
    kept = None if retain is None else _tokens(twin, retain, training)
    known = _reference(twin, rows, training.batch_size) if reference else None
    done, notes = _run(twin, objective, rows, known, kept, training, forget)
    _round(twin, model)
    edit = Edit.from_models(model, twin, method=method, notes=notes)
    own: dict[str, Any] = {
        "lr": training.lr,
        "steps": done,
        "batch_size": training.batch_size,
        "stop_at": training.stop_at,
    }
    own |= {"stop_on": training.stop_on, "check_every": training.check_every, **(settings or {})}
    step = dataclasses.replace(edit.steps[0], settings=own, seed=training.seed)
    return Edit((step,), edit.base, edit.versions)


def losses(model: Model, rows: Sequence[AnswerTokens], reference: Float[Tensor, " row"] | None = None) -> Losses:
    """Compute a batch's losses in float32, with their graph."""
    batch = pad([row.input_ids for row in rows], model.pad_id, device=model.device)
    logits = model.hf(**batch, use_cache=False).logits  # [batch, pos, d_vocab]
    where = [(i, t) for i, row in enumerate(rows) for t in range(row.start, len(row.input_ids))]
    row, position = torch.tensor(where, device=logits.device).T  # [answer tokens] each; t is predicted at t - 1
    target = batch["input_ids"].to(logits.device)[row, position]
    nats = torch.nn.functional.cross_entropy(logits[row, position - 1].float(), target, reduction="none")
    sums = nats.new_zeros(len(rows)).index_add(0, row, nats)
    return Losses(sums, torch.bincount(row, minlength=len(rows)), reference)


def check_weight(weight: float) -> float:
    """Return the weight of a retain loss.

    Raises:
        EditError: It is negative, not finite or no number.
    """
    if not (_is_real(weight) and weight >= 0):
        raise EditError(f"retain_weight must be a number of at least 0; received {weight!r}")
    return weight


def check_rows(name: str, rows: object) -> None:
    """Refuse what are no questions.

    Raises:
        DataError: It is another type, or has no row.
    """
    if not isinstance(rows, Questions) or not len(rows):
        raise DataError(f"{name} must be probe.data.Questions with at least one row; received {rows!r}")


def kept(retain: Losses | None, weight: float) -> Float[Tensor, ""] | float:
    """The retain term of an objective; 0 without a retain set."""
    return 0.0 if retain is None else weight * retain.mean


def _check_sets(forget: Questions, retain: Questions | None) -> None:
    """Refuse what cannot be trained on; sets may speak of the same things (groups) where they ask for others."""
    check_rows("forget", forget)
    if retain is None:
        return
    check_rows("retain", retain)
    shared = sorted({(r.question, r.answer) for r in forget} & {(r.question, r.answer) for r in retain})
    if shared:
        raise DataError(
            f"forget and retain must share no question with its answer; they share {len(shared)}, such as {shared[0]!r}"
        )


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_device(device: str | torch.device) -> None:
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:  # torch without CUDA asserts
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise EditError(f"device {device!r} cannot be used here: {reason}") from error


def _tokens(model: Model, rows: Questions, training: Training) -> list[AnswerTokens]:
    pairs = [(row.question, row.answer) for row in rows]
    return answer_tokens(model, pairs, bos=training.bos, chat=training.chat)


def _twin(model: Model, device: str | torch.device | None) -> Model:
    """A copy in float32, in eval mode, without gradients."""
    hf = copy.deepcopy(model.hf).to(device or model.device)
    for parameter in hf.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
            parameter.grad = None
    return wrap(hf, model.tokenizer, model.name)


def _round(twin: Model, model: Model) -> None:
    """Give the copy's parameters the base's types and device."""
    twin.hf.to(model.device)
    for new, old in zip(twin.hf.parameters(), model.hf.parameters(), strict=True):
        new.data = new.data.to(old.dtype)


@torch.no_grad()
def _reference(model: Model, rows: Sequence[AnswerTokens], batch_size: int) -> Float[Tensor, " row"]:
    parts = [losses(model, rows[i : i + batch_size]).sums for i in range(0, len(rows), batch_size)]
    return torch.cat(parts)


def _batches(n: int, batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Row numbers without end: every row once a pass, in a new order each time."""
    while True:
        order = torch.randperm(n, generator=generator).tolist()
        yield from (order[i : i + batch_size] for i in range(0, n, batch_size))


def _run(
    twin: Model,
    objective: Objective,
    rows: Sequence[AnswerTokens],
    reference: Float[Tensor, " row"] | None,
    kept: Sequence[AnswerTokens] | None,
    training: Training,
    forget: Questions,
) -> tuple[int, tuple[str, ...]]:
    """Train in place; the steps made, and what the record should say of them."""
    parameters = [p for p in twin.hf.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=training.lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(training.seed)
    chosen = _batches(len(rows), training.batch_size, generator)
    others = None if kept is None else _batches(len(kept), training.batch_size, generator)
    reached = _reached(twin, forget, training, 0)
    if reached:
        raise EditError(f"nothing to unlearn: before the first step the {reached}")
    with tqdm(total=training.steps, desc="unlearning", unit="step", disable=not training.progress, leave=False) as bar:
        for step in range(1, training.steps + 1):
            index = next(chosen)
            first = losses(twin, [rows[i] for i in index], None if reference is None else reference[index])
            second = None if kept is None or others is None else losses(twin, [kept[i] for i in next(others)])
            _step(objective(first, second), parameters, optimiser, step)
            bar.update()
            if reached := _reached(twin, forget, training, step):
                return step, (f"Stopped after {step} steps: the {reached}.",)
    wish = "" if training.stop_at is None else f", without reaching a forget {training.stop_on} of {training.stop_at}"
    return training.steps, (f"Trained for {training.steps} steps{wish}.",)


def _step(loss: Float[Tensor, ""], parameters: list[Tensor], optimiser: torch.optim.Optimizer, step: int) -> None:
    optimiser.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    if not (torch.isfinite(loss) and torch.isfinite(norm)):
        raise EditError(f"the loss or its gradient is not finite at step {step}: lower lr, or stop earlier")
    optimiser.step()


def _reached(twin: Model, forget: Questions, training: Training, step: int) -> str:
    """In words what the forget set fell to, if it is time to look and it is low enough; else ""."""
    if training.stop_at is None or (step % training.check_every and step < training.steps):
        return ""
    scores = score_answers(twin, forget, batch_size=256, bos=training.bos, chat=training.chat)
    value = float((scores.exact if training.stop_on == "recall" else scores.prob).mean())
    low = value <= training.stop_at
    return f"forget {training.stop_on} is {value:.3f}, at most {training.stop_at}" if low else ""
