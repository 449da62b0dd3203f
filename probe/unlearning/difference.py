"""Gradient difference: up on the forget set, down on the retain set."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from probe.data import Questions
from probe.editing import Edit
from probe.errors import DataError
from probe.models import Model
from probe.unlearning._loop import Losses, StopOn, Training, check_weight, kept, train


def grad_diff(
    model: Model,
    forget: Questions,
    retain: Questions,
    *,
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
    """Raise the loss of the forget answers and hold that of the retain answers: minimise -ℓ̄_f + λ ℓ̄_r.

    Both are means over the batch's answer tokens. Source: Liu, Liu and Stone, arXiv 2203.12817, and TOFU (arXiv
    2401.06121); λ = 1 as in open-unlearning's `GradDiff`.

    Args:
        model: The base; it is not changed.
        forget: What is to go.
        retain: What is to stay; no question with its answer is also in `forget`.
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
    if retain is None:
        raise DataError("grad_diff needs a retain set; without one, use gradient_ascent")
    check_weight(retain_weight)
    training = Training(lr, steps, batch_size, seed, device, progress, stop_at, stop_on, check_every, bos, chat)

    def objective(forget: Losses, retain: Losses | None) -> Float[Tensor, ""]:
        return -forget.mean + kept(retain, retain_weight)

    own = {"retain_weight": retain_weight}
    return train(model, "grad_diff", objective, forget, retain, training, settings=own)
