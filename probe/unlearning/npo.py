"""Negative preference optimisation: gradient ascent whose push fades as an answer becomes unlikely."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from probe.data import Questions
from probe.editing import Edit
from probe.errors import DataError, EditError
from probe.models import Model
from probe.unlearning._loop import Losses, StopOn, Training, check_weight, kept, train


def npo(
    model: Model,
    forget: Questions,
    retain: Questions | None = None,
    *,
    beta: float = 0.1,
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
    """Minimise the mean over rows of `npo_loss` plus λ ℓ̄_r: negative preference optimisation (NPO).

    As β goes to 0 its gradient becomes that of gradient ascent on ℓ (summed over an answer's tokens); at larger β a row
    stops counting once it is less likely than before. The reference is the model that is given, scored before training.
    Source: Zhang et al., arXiv 2404.05868; β = 0.1 as there.

    Args:
        model: The base; it is not changed.
        forget: What is to go.
        retain: What is to stay (NPO with a retain loss); no question with its answer is also in `forget`. None for NPO
            alone.
        beta: β.
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
    if isinstance(beta, bool) or not isinstance(beta, int | float) or not (math.isfinite(beta) and beta > 0):
        raise EditError(f"beta must be a positive number; received {beta!r}")
    check_weight(retain_weight)
    training = Training(lr, steps, batch_size, seed, device, progress, stop_at, stop_on, check_every, bos, chat)

    def objective(forget: Losses, retain: Losses | None) -> Float[Tensor, ""]:
        if forget.reference is None:
            raise DataError("NPO needs the reference model's losses")
        return npo_loss(forget.sums, forget.reference, beta).mean() + kept(retain, retain_weight)

    own = {"beta": beta, "retain_weight": retain_weight}
    return train(model, "npo", objective, forget, retain, training, reference=True, settings=own)


def npo_loss(nll: Float[Tensor, " row"], reference: Float[Tensor, " row"], beta: float = 0.1) -> Float[Tensor, " row"]:
    """NPO's loss of each row: -(2/β) log σ(β(ℓ - ℓ_ref)), arXiv 2404.05868.

    Args:
        nll: ℓ, the negative log-likelihood of the answer, summed over its tokens, in nats.
        reference: ℓ_ref, the same under the model before training.
        beta: β.
    """
    return -2 / beta * torch.nn.functional.logsigmoid(beta * (nll - reference))
