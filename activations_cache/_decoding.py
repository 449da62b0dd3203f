"""One batch of generation: left-padded prompts in, token ids with their sampling log-probabilities out.

transformers' own `generate` runs the model and its key-value cache; what it reads besides, the model's
`generation_config`, is set aside meanwhile, so that no penalty, length or temperature acts that nobody asked for.

Sampling is by inversion: the number in [0, 1) that decides a token depends on the seed, the prompt's number, the
sample's number and the token's position alone. So the batches, the device and the other prompts move a draw by
rounding only, and no global random state is read or written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from activations_cache._device import input_device
from activations_cache._generations import Finish, Generation
from activations_cache.errors import ModelError, NumericsError

CONTEXT = 8  # prompt tokens before a continuation that are decoded with it, for the spaces and bytes at its border


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen, decided.

    Attributes:
        max_new_tokens: Longest continuation, in tokens.
        do_sample: Draw tokens; otherwise the most probable one is taken.
        temperature: Divides the logits.
        top_p: Keep the most probable tokens that together have this probability.
        top_k: Keep this many tokens; 0 keeps all.
        seed: Of all draws.
        eos: Token ids that end a sequence.
        stop_strings: Texts that end a sequence.
    """

    max_new_tokens: int
    do_sample: bool
    temperature: float
    top_p: float
    top_k: int
    seed: int
    eos: tuple[int, ...]
    stop_strings: tuple[str, ...]


@dataclass(frozen=True)
class Prompt:
    """One continuation to make: the prompt's number and ids, and which of its samples."""

    number: int
    sample: int
    ids: tuple[int, ...]


class Chooser:
    """A logits processor: leaves the score of the chosen token alone finite, so that taking the largest takes it.

    Args:
        decoding: How to choose.
        draws: `[batch, max_new_tokens]` numbers in [0, 1), one per token to choose.
        width: Tokens of the padded prompts.
    """

    def __init__(self, decoding: Decoding, draws: Float[Tensor, "batch new"], width: int) -> None:
        from transformers.generation.logits_process import (
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        self.draws, self.width = draws, width
        self.logprobs: dict[int, Float[Tensor, " batch"]] = {}
        self.broken = torch.zeros(len(draws), dtype=torch.bool, device=draws.device)
        self.warpers: list[Any] = []
        if decoding.temperature != 1.0:
            self.warpers.append(TemperatureLogitsWarper(decoding.temperature))
        if decoding.top_k:
            self.warpers.append(TopKLogitsWarper(decoding.top_k))
        if decoding.top_p < 1.0:
            self.warpers.append(TopPLogitsWarper(decoding.top_p))
        self.sample = decoding.do_sample

    def __call__(self, input_ids: Int[Tensor, "batch pos"], scores: Float[Tensor, "batch vocab"]) -> Tensor:
        self.broken |= ~scores.amax(-1).isfinite().to(self.broken.device)
        if not self.sample:
            return scores
        for warp in self.warpers:
            scores = warp(input_ids, scores)
        step = input_ids.shape[1] - self.width
        logprobs = scores.to(self.draws.device).double().log_softmax(-1)  # [batch, vocab]
        chosen = invert(logprobs.exp(), self.draws[:, step])  # [batch, 1]
        self.logprobs[step] = logprobs.gather(1, chosen).squeeze(1).float()
        return torch.full_like(scores, -torch.inf).scatter(1, chosen.to(scores.device), 0.0)

    def drawn(self, new: int) -> Float[Tensor, "batch new"] | None:
        """Log-probabilities of the tokens of the first `new` steps, each under what it was drawn from."""
        return torch.stack([self.logprobs[step] for step in range(new)], 1).cpu() if self.sample else None


def invert(probabilities: Float[Tensor, "batch vocab"], draws: Float[Tensor, " batch"]) -> Int[Tensor, "batch 1"]:
    """The token whose interval of the cumulative distribution holds each draw; never one of probability 0."""
    total = probabilities.cumsum(-1)  # [batch, vocab]
    # right=True: the first place where the sum exceeds the draw, which is where it grows
    place = torch.searchsorted(total, draws[:, None] * total[:, -1:], right=True)
    return place.clamp_(max=probabilities.shape[-1] - 1)  # NaN logits find no place; they are refused after the batch


class StopAt:
    """A stopping criterion: a row is done once its generated text holds one of the stop strings."""

    def __init__(self, tokenizer: Any, prompts: Sequence[Prompt], strings: Sequence[str], width: int) -> None:
        self.tokenizer, self.prompts, self.strings, self.width = tokenizer, prompts, strings, width

    def __call__(self, input_ids: Int[Tensor, "batch pos"], scores: Any = None, **_: Any) -> Bool[Tensor, " batch"]:
        done = [
            self.holds(prompt, row)
            for prompt, row in zip(self.prompts, input_ids[:, self.width :].tolist(), strict=True)
        ]
        return torch.tensor(done, device=input_ids.device)

    def holds(self, prompt: Prompt, ids: Sequence[int]) -> bool:
        """Whether a stop string is in the text of a continuation."""
        text = continuation(self.tokenizer, prompt.ids, ids)
        return any(string in text for string in self.strings)

    def end(self, prompt: Prompt, ids: Sequence[int]) -> int | None:
        """Tokens of the shortest beginning of a continuation that holds a stop string; None if none does."""
        counts = range(1, len(ids) + 1) if self.strings else ()
        return next((count for count in counts if self.holds(prompt, ids[:count])), None)


def continuation(tokenizer: Any, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
    """The text that `ids` add to that of the prompt, special tokens left out.

    A few tokens of the prompt are decoded with them: on its own, the first token would lose its space.
    """
    before = list(prompt_ids[-CONTEXT:])
    start = tokenizer.decode(before, skip_special_tokens=True)
    whole = tokenizer.decode([*before, *ids], skip_special_tokens=True)
    if whole.startswith(start):
        return str(whole[len(start) :])
    # the prompt ends within a character of several bytes, which the continuation completes
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


@torch.no_grad()
def decode_batch(hf: Any, tokenizer: Any, prompts: Sequence[Prompt], decoding: Decoding) -> list[Generation]:
    """Generate one continuation for each prompt of a batch; `alone` must hold around it.

    Raises:
        NumericsError: A logit is NaN or infinite.
        ModelError: No memory.
    """
    device = input_device(hf)
    ids, mask = _pad_left(prompts, device)
    width = ids.shape[1]
    draws = torch.from_numpy(np.stack([_draws(prompt, decoding) for prompt in prompts]))
    draws = draws if device.type == "mps" else draws.to(device)  # which has no float64
    chooser = Chooser(decoding, draws, width)
    stop = StopAt(tokenizer, prompts, decoding.stop_strings, width)
    with _fenced(device, decoding.seed + prompts[0].number):
        out = _run(hf, ids, mask, chooser, stop, decoding)[:, width:]  # [batch, new]
    if bool(chooser.broken.any()):
        number = prompts[int(chooser.broken.nonzero()[0])].number
        raise NumericsError(f"the logits after prompt {number} are NaN or infinite; check the model's weights")
    logprobs = chooser.drawn(out.shape[1])
    return [
        _generation(prompt, row, None if logprobs is None else logprobs[number].tolist(), tokenizer, stop, decoding)
        for number, (prompt, row) in enumerate(zip(prompts, out.tolist(), strict=True))
    ]


def _run(
    hf: Any, ids: Int[Tensor, "batch pos"], mask: Tensor, chooser: Chooser, stop: StopAt, decoding: Decoding
) -> Int[Tensor, "batch pos_new"]:
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    settings = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,  # the chooser draws
        eos_token_id=list(decoding.eos) or None,
        pad_token_id=0,  # fills rows that are done; cut off below
    )
    try:
        out: Tensor = hf.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=settings,
            logits_processor=LogitsProcessorList([chooser]),
            stopping_criteria=StoppingCriteriaList([stop] if stop.strings else []),
        )
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "out of memory" not in str(error) and "allocate" not in str(error):
            raise
        raise ModelError(
            f"generating {decoding.max_new_tokens} tokens after {ids.shape[0]} x {ids.shape[1]} ran out of memory; "
            "generate with a smaller batch_tokens"
        ) from error
    return out


def _pad_left(prompts: Sequence[Prompt], device: Any) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Ids and mask; transformers counts positions by the mask, so that padding has none."""
    width = max(len(prompt.ids) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
        mask[row, width - len(prompt.ids) :] = 1
    return ids.to(device), mask.to(device)


def _draws(prompt: Prompt, decoding: Decoding) -> Any:
    entropy = np.random.SeedSequence([decoding.seed, prompt.number, prompt.sample])
    return np.random.default_rng(entropy).random(decoding.max_new_tokens)


def _generation(
    prompt: Prompt, ids: list[int], logprobs: list[float] | None, tokenizer: Any, stop: StopAt, decoding: Decoding
) -> Generation:
    """Cut a row of the batch where it ended: the rest is padding, or what came while others went on."""
    ends: dict[int, Finish] = {len(ids): "length"}
    at = stop.end(prompt, ids)
    if at is not None:
        ends[at] = "stop"
    eos = next((count for count, token in enumerate(ids, start=1) if token in decoding.eos), None)
    if eos is not None:
        ends[eos] = "eos"
    end = min(ends)
    texts: tuple[str | None, str | None] = (None, None)
    if tokenizer is not None:
        texts = (continuation(tokenizer, prompt.ids, ids[:end]), tokenizer.decode(list(prompt.ids)))
    kept = None if logprobs is None else tuple(logprobs[:end])
    return Generation(prompt.number, prompt.sample, prompt.ids, tuple(ids[:end]), ends[end], *texts, kept)


@contextmanager
def _fenced(device: torch.device, seed: int) -> Iterator[None]:
    """Keep torch's random state: a model in eval mode draws nothing, and should one do so (a noisy router), then from
    a seed of this batch's own, and what runs after is not moved by it."""
    with torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def alone(hf: Any) -> Iterator[None]:
    """Eval mode, and a generation config that says nothing; both are given back on the way out."""
    from transformers import GenerationConfig

    modes = [(module, module.training) for module in hf.modules()]
    held = hf.generation_config
    try:
        hf.eval()
        hf.generation_config = GenerationConfig()
        yield
    finally:
        hf.generation_config = held
        for module, training in modes:
            module.training = training
