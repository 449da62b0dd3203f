"""Greedy continuations from the very tokens that teacher forcing sees, checked for finite logits, made once a model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from probe.audit.part import Subject, spaced
from probe.data import Questions
from probe.errors import AuditError
from probe.models import Model, pad
from probe.scoring import answer_tokens, eval_mode

Made = TypeVar("Made")


def kept(subject: Subject, key: Hashable, make: Callable[[], Made]) -> Made:
    """Return what several parts need of one model: made once, and kept for as long as the subject lives."""
    store: dict[Hashable, Any] = subject.__dict__.setdefault("_kept", {})
    if key not in store:
        store[key] = make()
    made: Made = store[key]
    return made


def answered(subject: Subject, name: str, limit: int | None, new_tokens: int) -> tuple[Questions, list[str]]:
    """Return (at most `limit`) questions of a set and what the model says to each, greedily.

    Raises:
        AuditError: Logits that are no numbers, or no room in the context.
    """
    return kept(subject, ("answered", name, limit, new_tokens), lambda: _answered(subject, name, limit, new_tokens))


def _answered(subject: Subject, name: str, limit: int | None, new_tokens: int) -> tuple[Questions, list[str]]:
    case, model = subject.case, subject.model
    rows = spaced(case.sets[name], limit)
    tokens = answer_tokens(model, [(row.question, row.answer) for row in rows], bos=case.bos, chat=case.chat)
    prompts = [one.input_ids[: one.start] for one in tokens]
    made = continuations(model, prompts, new_tokens, batch_size=case.batch_size)
    return rows, [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in made]


@torch.no_grad()
def continuations(
    model: Model, prompts: Sequence[Sequence[int]], new_tokens: int, *, batch_size: int = 64, through: bool = False
) -> list[list[int]]:
    """Continue token ids greedily, whatever the model's own generation settings are.

    Args:
        model: The model.
        prompts: Token ids of each prompt.
        new_tokens: At most this many new tokens, and no more than a batch's longest prompt leaves in the context.
        batch_size: Prompts a batch; prompts of like length are put together.
        through: Go on past the end of text (which is then never chosen), so that every continuation has one length.

    Returns:
        The new token ids of each prompt, without the end of text.

    Raises:
        AuditError: No prompt, logits that are no numbers, or a prompt that fills the context.
    """
    if not prompts or min(map(len, prompts)) == 0 or new_tokens < 1:
        raise AuditError("a continuation needs a prompt of at least one token and at least one new token")
    room = min(new_tokens, model.dims.n_ctx - max(map(len, prompts)))
    if room < 1:
        raise AuditError(f"the longest prompt has {max(map(len, prompts))} tokens and fills the model's context")
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    made: dict[int, list[int]] = {}
    with eval_mode(model.hf):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            made.update(zip(batch, _batch(model, [prompts[i] for i in batch], room, through), strict=True))
    return [made[i] for i in range(len(prompts))]


def _batch(model: Model, prompts: Sequence[Sequence[int]], new_tokens: int, through: bool) -> list[list[int]]:
    inputs = pad(prompts, model.pad_id, side="left", device=model.device)
    inputs.pop("position_ids")  # generate derives them from the mask
    ends = _ends(model)
    settings: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "use_cache": True}
    settings |= {"max_new_tokens": new_tokens, "pad_token_id": model.pad_id, "eos_token_id": ends or None}
    if through:
        settings["min_new_tokens"] = new_tokens
    out = model.hf.generate(**inputs, **settings, logits_processor=[_check])  # [batch, pos]
    return [_cut(row, ends) for row in out[:, inputs["input_ids"].shape[1] :].tolist()]


def _ends(model: Model) -> list[int]:
    """Ids that end a text, as the model's generation settings or else its tokenizer have them."""
    configured = getattr(getattr(model.hf, "generation_config", None), "eos_token_id", None)
    own = configured if configured is not None else getattr(model.tokenizer, "eos_token_id", None)
    return [] if own is None else [int(i) for i in (own if isinstance(own, (list, tuple)) else [own])]


def _cut(ids: list[int], ends: Sequence[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


def _check(_ids: Tensor, scores: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, "batch d_vocab"]:
    """Minus infinity is how forbidden tokens are marked; anything else must be a number."""
    if torch.isnan(scores).any() or torch.isposinf(scores).any():
        raise AuditError("the model's logits are not finite while it generates; check its weights and its dtype")
    return scores
