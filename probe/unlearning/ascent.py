"""Gradient ascent on the forget set: the least that is called unlearning."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from probe.data import Questions
from probe.editing import Edit
from probe.models import Model
from probe.unlearning._loop import Losses, StopOn, Training, train


def gradient_ascent(
    model: Model,
    forget: Questions,
    *,
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
    """Raise the loss of the forget answers: minimise -ℓ̄_f, the mean over the batch's answer tokens.

    Nothing bounds the loss, so the model is destroyed if it goes on: with `stop_at` it stops as soon as the answers
    flip. Stopped there, much of the knowledge is still in the weights. Source: Jang et al., arXiv 2210.01504; the
    per-token mean is open-unlearning's `GradAscent`.

    Args:
        model: The base; it is not changed.
        forget: What is to go.
        lr: Learning rate of AdamW. 1e-5 (open-unlearning) suits 10^9 weights; the organisms here need 1e-4 to 1e-3.
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
        DataError: No rows, rows that cannot be tokenised, a model without tokenizer.
        EditError: Settings out of range, a loss that is not finite, a forget set already at `stop_at`.
    """
    training = Training(lr, steps, batch_size, seed, device, progress, stop_at, stop_on, check_every, bos, chat)
    return train(model, "gradient_ascent", _objective, forget, None, training)


def _objective(forget: Losses, retain: Losses | None) -> Float[Tensor, ""]:
    return -forget.mean
