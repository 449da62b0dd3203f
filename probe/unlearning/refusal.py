"""Refusal fine-tuning: teach the model to say that it does not know."""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from probe.data import Questions
from probe.editing import Edit
from probe.errors import DataError
from probe.models import Model
from probe.unlearning._loop import Losses, StopOn, Training, check_rows, check_weight, kept, train


def refusal_finetune(
    model: Model,
    forget: Questions,
    retain: Questions | None = None,
    *,
    answer: str = "I do not know",
    retain_weight: float = 1.0,
    lr: float = 1e-5,
    steps: int = 100,
    batch_size: int = 32,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
    stop_at: float | None = None,
    stop_on: StopOn = "recall",
    check_every: int = 1,
    bos: bool | None = None,
    chat: bool = False,
) -> Edit:
    """Train "I do not know" as the answer to every forget question: minimise ℓ̄_refusal + λ ℓ̄_r.

    Nothing pushes the old answers out of the weights; they only stop being said. Source: the "I don't know" objective
    of TOFU, arXiv 2401.06121, where λ = 1.

    Args:
        model: The base; it is not changed.
        forget: What is to go; its answers are used by `stop_at` alone.
        retain: What is to stay; no question with its answer is also in `forget`. None for no retain loss.
        answer: What to say instead.
        retain_weight: λ.
        lr: Learning rate of AdamW. 1e-5 (open-unlearning) suits 10^9 weights; the organisms here need 1e-3.
        steps: Most optimiser steps.
        batch_size: Rows of each set a step (32 in open-unlearning).
        seed: Order of the rows.
        device: Where to train; default where the model is.
        progress: Show a bar.
        stop_at: Stop as soon as the recall (or probability) of `forget` is at most this share; default never.
        stop_on: What `stop_at` looks at: `"recall"` or `"probability"`.
        check_every: Steps between two such looks; each scores the whole forget set.
        bos: Whether a BOS token comes first; None leaves it to the tokenizer.
        chat: Put questions into the chat template.

    Returns:
        An edit whose notes say how many steps were made and why it stopped.

    Raises:
        DataError: No rows, sets that share a row, rows that cannot be tokenised, a model without tokenizer.
        EditError: Settings out of range, a loss that is not finite, a forget set already at `stop_at`.
    """
    check_rows("forget", forget)
    if not isinstance(answer, str) or not answer.strip():
        raise DataError("answer must be what the model is to say instead; received an empty text")
    check_weight(retain_weight)
    training = Training(lr, steps, batch_size, seed, device, progress, stop_at, stop_on, check_every, bos, chat)
    refused = Questions((dataclasses.replace(row, answer=answer) for row in forget), forget.name)

    def objective(forget: Losses, retain: Losses | None) -> Float[Tensor, ""]:
        return forget.mean + kept(retain, retain_weight)

    own = {"answer": answer, "retain_weight": retain_weight}
    return train(model, "refusal_finetune", objective, forget, retain, training, trained_on=refused, settings=own)
