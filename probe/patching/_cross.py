"""Put one model's hidden states into another model, where it predicts an answer (arXiv 2401.06102, 2605.24614)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from activations_cache import sites
from probe.errors import PatchError
from probe.patching._states import AnswerStates, batch_inputs, by_length
from probe.scoring import AnswerTokens, eval_mode

if TYPE_CHECKING:
    from probe.models import Model


def patched_logprobs(
    model: Model,
    states: AnswerStates,
    site: str | None = None,
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> Float[Tensor, " position"]:
    """Log-probabilities of the answers' tokens while another model's values stand at one site.

    Every position that predicts an answer token gets the value of `states`; all earlier positions keep the model's own,
    also in the layers above, where they can be attended to.

    Args:
        model: The model that goes on from the states.
        states: What `answer_states` read from another model (or this one) that reads text as the same tokens.
        site: The site to replace; None leaves the model as it is.
        batch_size: Rows a forward.
        progress: Show a bar over the batches.

    Returns:
        Natural log-probabilities, computed in float32, in the order of `states`.

    Raises:
        PatchError: The site was not read, its values have another shape than the model's, or the logits are not finite.
    """
    if site is not None:
        _check(model, states, site)
    starts = states.first
    found = torch.empty(len(states.row))
    with torch.no_grad(), eval_mode(model.hf):
        for index in tqdm(list(by_length(states.rows, batch_size)), desc="patching", disable=not progress):
            rows = [states.rows[i] for i in index]
            where = torch.cat([torch.arange(int(starts[i]), int(starts[i]) + _count(states.rows[i])) for i in index])
            values = None if site is None else states[site][where]
            found[where] = _forward(model, rows, site, values)
    return found


def _check(model: Model, states: AnswerStates, site: str) -> None:
    if site not in states.values:
        raise PatchError(f"states of {site} are needed; these are of {', '.join(states.values)}")
    if len(states.row) != sum(_count(row) for row in states.rows):
        raise PatchError("states at every answer token are needed; these were read with first=True")
    wanted, given = sites.Sites(model.hf)[site].shape, tuple(states[site].shape[1:])
    if wanted != given:
        raise PatchError(f"{site} holds values of shape {wanted} in this model; the states given have shape {given}")


def _count(row: AnswerTokens) -> int:
    return len(row.input_ids) - row.start


def _forward(
    model: Model, rows: Sequence[AnswerTokens], site: str | None, values: Tensor | None
) -> Float[Tensor, " position"]:
    """One batch; `values` in the order of its rows and their positions."""
    inputs = batch_inputs(model, rows)
    batch = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([_count(row) for row in rows]))
    position = torch.cat([torch.arange(row.start - 1, len(row.input_ids) - 1) for row in rows])

    def replace(value: Tensor, _: sites.Site) -> Tensor:
        assert values is not None
        new = value.clone()  # [batch, pos, *shape]
        new[batch, position] = values.to(value)
        return new

    with sites.hooked(model, {} if site is None else {site: replace}):
        logits = model.hf(**inputs, use_cache=False).logits
    picked = logits[batch, position].float()  # [position, d_vocab]
    if not torch.isfinite(picked).all():
        raise PatchError("the model's logits at answer tokens are not finite; check its weights and its dtype")
    target = inputs["input_ids"][batch, position + 1].to(picked.device)
    return picked.log_softmax(-1).gather(-1, target[:, None])[:, 0].cpu()
