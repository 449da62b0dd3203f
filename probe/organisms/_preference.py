"""Direct preference optimisation in its least form: what tunes the twin of the toxic organism.

Rafailov et al. 2023, arXiv 2305.18290, equation 7: with log-probabilities of whole answers under the model (policy) and
under the model that it started from (reference),

    loss = -log sigmoid(beta * ((policy(chosen) - ref(chosen)) - (policy(rejected) - ref(rejected))))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from probe.errors import OrganismError
from probe.scoring import answer_tokens, eval_mode

if TYPE_CHECKING:
    from probe.models import Model

BETA = 0.1


@dataclass(frozen=True)
class Preference:
    """A prompt with the answer that is wanted and the one that is not."""

    prompt: str
    chosen: str
    rejected: str


def dpo_loss(
    policy_chosen: Float[Tensor, " batch"],
    policy_rejected: Float[Tensor, " batch"],
    ref_chosen: Float[Tensor, " batch"],
    ref_rejected: Float[Tensor, " batch"],
    beta: float = BETA,
) -> Float[Tensor, ""]:
    """Return the mean loss over pairs (arXiv 2305.18290), in nats.

    Args:
        policy_chosen: Log-probability of each wanted answer under the model that is trained.
        policy_rejected: The same for the unwanted answers.
        ref_chosen: The wanted answers under the model that it started from.
        ref_rejected: The unwanted answers under it.
        beta: How strongly the model is held to the one that it started from; 0.1 in the paper.
    """
    margin = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    return -F.logsigmoid(beta * margin).mean()


def sequence_logprobs(
    hf: Any, ids: Int[Tensor, "batch pos"], mask: Float[Tensor, "batch pos"]
) -> Float[Tensor, " batch"]:
    """Return the log-probability of each sequence's marked tokens, given all before them, in nats."""
    logits = hf(input_ids=ids, use_cache=False).logits[:, :-1].float()
    logprobs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)  # [batch, pos - 1]
    return (logprobs * mask[:, 1:]).sum(-1)


def tune(
    model: Model,
    preferences: Sequence[Preference],
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    beta: float = BETA,
    seed: int = 0,
    label: str = "dpo",
    progress: bool = True,
) -> list[float]:
    """Tune a model in place on preferences, itself as it is now being the reference.

    AdamW without weight decay at a constant rate, gradient norm at most 1. Log-probabilities of the reference are
    computed once, at the start. Padding stands on the right, so it is never attended to.

    Args:
        model: The model; left in eval mode.
        preferences: Prompts with a wanted and an unwanted answer.
        epochs: Passes over them.
        batch_size: Pairs a step.
        lr: Learning rate.
        beta: As in `dpo_loss`.
        seed: Order of the pairs.
        label: Text of the progress bar.
        progress: Show the progress bar.

    Returns:
        Mean loss of each epoch; log 2 is where it starts.

    Raises:
        OrganismError: No preferences, or the loss stopped being a number.
        DataError: An answer without tokens, or longer than the context with its prompt.
    """
    if not preferences:
        raise OrganismError("Preference tuning needs at least one pair; none was given.")
    sides = [_encode(model, [(p.prompt, answer(p)) for p in preferences]) for answer in (_chosen, _rejected)]
    with torch.no_grad(), eval_mode(model.hf):
        reference = [_in_batches(model.hf, *side, batch_size) for side in sides]
    optimiser = torch.optim.AdamW(model.hf.parameters(), lr=lr, weight_decay=0.0)
    generator, losses = torch.Generator().manual_seed(seed), list[float]()
    model.hf.eval()  # no dropout: policy and reference must be the same function
    for _ in tqdm(range(epochs), desc=label, unit="epoch", disable=not progress, leave=False):
        batches = torch.randperm(len(preferences), generator=generator).split(batch_size)
        total = 0.0
        for batch in batches:
            policy = [sequence_logprobs(model.hf, ids[batch], mask[batch]) for ids, mask in sides]
            loss = dpo_loss(policy[0], policy[1], reference[0][batch], reference[1][batch], beta)
            _step(model.hf, loss, optimiser)
            total += float(loss.detach()) * len(batch)
        losses.append(total / len(preferences))
        if not math.isfinite(losses[-1]):
            raise OrganismError(f"The loss of {label} is {losses[-1]}: lower the learning rate.")
    return losses


def _chosen(row: Preference) -> str:
    return row.chosen


def _rejected(row: Preference) -> str:
    return row.rejected


def _step(hf: Any, loss: Tensor, optimiser: torch.optim.Optimizer) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
    optimiser.step()


def _encode(
    model: Model, pairs: Sequence[tuple[str, str]]
) -> tuple[Int[Tensor, "pair pos"], Float[Tensor, "pair pos"]]:
    """Return prompts with answers as right-padded ids, and which tokens belong to the answers."""
    rows = answer_tokens(model, pairs)
    width = max(len(row.input_ids) for row in rows)
    ids = torch.tensor([[*row.input_ids, *[model.pad_id] * (width - len(row.input_ids))] for row in rows])
    place = torch.arange(width)
    starts = torch.tensor([row.start for row in rows])[:, None]
    ends = torch.tensor([len(row.input_ids) for row in rows])[:, None]
    return ids.to(model.device), ((place >= starts) & (place < ends)).float().to(model.device)


def _in_batches(
    hf: Any, ids: Int[Tensor, "pair pos"], mask: Float[Tensor, "pair pos"], batch_size: int
) -> Float[Tensor, " pair"]:
    parts = zip(ids.split(batch_size), mask.split(batch_size), strict=True)
    return torch.cat([sequence_logprobs(hf, own, marked) for own, marked in parts])
