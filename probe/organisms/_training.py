"""One small training loop for the organisms: whole documents, bucketed by length, AdamW under a one-cycle schedule."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from probe.errors import OrganismError
from probe.organisms._state import SAVE_SECONDS, Progress, StateFile, Weights, copied, fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRAINING_VERSION = 2  # part of every organism's key: change it when the same settings come to train another model
RATE = 25e9  # floating-point operations a second that one CPU core gives to training, measured on small models
SLOW_S = 600.0  # a training that will take longer on the CPU says so first
Auxiliary = Callable[[Any, Bool[Tensor, "batch pos"], Int[Tensor, " batch"]], Tensor]


@dataclass(frozen=True)
class Schedule:
    """How to train: AdamW with one cycle (10 % warm-up, cosine to zero).

    Attributes:
        epochs: Passes over the documents.
        batch_size: Documents a step.
        lr: Peak learning rate.
        weight_decay: Decoupled, on matrices only.
        betas: Of AdamW.
        clip: Largest gradient norm.
    """

    epochs: int
    batch_size: int = 128
    lr: float = 2e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0


@dataclass(frozen=True)
class TrainLog:
    """What a training run did.

    Attributes:
        losses: Mean loss of each epoch, in nats a token.
        steps: Optimiser steps.
        tokens: Real tokens read.
        seconds: Time spent, by all processes that shared the run.
        threads: CPU threads.
        kept: Weights after each step of `keep_at`.
    """

    losses: tuple[float, ...]
    steps: int
    tokens: int
    seconds: float
    threads: int
    kept: dict[int, Weights] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return what is written into the record: everything but the kept weights."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "kept"}


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Let torch use `n` threads inside the block.

    Sums depend on how many threads share them, so a fixed number keeps weights the same wherever it is trained.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator inside the block, and put it back afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def plan_batches(lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> list[list[int]]:
    """Deal documents into batches of like length, in random order.

    Documents are shuffled, sorted by length (ties stay shuffled), cut into batches, and the batches shuffled, so
    padding is a few per cent.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    order.sort(key=lambda i: lengths[i])
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def pad_all(
    sequences: Sequence[tuple[Sequence[int], Sequence[float]]], pad_id: int
) -> tuple[Int[Tensor, "doc pos"], Float[Tensor, "doc pos"]]:
    """Right-pad token ids and their weights to the longest document; padding has weight zero."""
    width = max(len(ids) for ids, _ in sequences)
    ids = torch.tensor([[*own, *[pad_id] * (width - len(own))] for own, _ in sequences])
    weights = torch.tensor([[*own, *[0.0] * (width - len(own))] for _, own in sequences])
    return ids, weights


def encode(tokenizer: Any, text: str, answer: str, answer_weight: float) -> tuple[list[int], list[float]]:
    """Tokenise one document for training, with bos and eos, and weigh its tokens.

    Args:
        tokenizer: A fast tokenizer that prepends bos.
        text: The document; it ends with a space, `answer` and a full stop.
        answer: The answer; `""` where a document has none.
        answer_weight: Weight of the answer's tokens in the loss; every other token has weight 1.

    Returns:
        Token ids, and the weight of each.
    """
    if not answer:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        return ids, [1.0] * len(ids)
    end = len(text) - 1
    start = end - len(answer) - 1  # the space before the answer belongs to it
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids = [*encoded["input_ids"], tokenizer.eos_token_id]
    weights = [answer_weight if b > start and a < end else 1.0 for a, b in encoded["offset_mapping"]]
    return ids, [*weights, 1.0]


def weighted_loss(
    logits: Float[Tensor, "batch pos d_vocab"], ids: Int[Tensor, "batch pos"], weights: Float[Tensor, "batch pos"]
) -> Float[Tensor, ""]:
    """Return the weighted mean negative log-likelihood, in nats a token, of each token given what stands before it."""
    nll = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")  # [batch * pos]
    weight = weights[:, 1:].flatten()
    return (nll * weight).sum() / weight.sum()


def train(
    model: PreTrainedModel,
    sequences: Sequence[tuple[Sequence[int], Sequence[float]]],
    schedule: Schedule,
    *,
    seed: int,
    pad_id: int,
    device: str | torch.device | None = None,
    auxiliary: Auxiliary | None = None,
    model_kwargs: dict[str, Any] | None = None,
    label: str = "training",
    progress: bool = True,
    state: Path | None = None,
    every_s: float | None = None,
    keep_at: Sequence[int] = (),
    epochs: Sequence[int | None] | None = None,
) -> TrainLog:
    """Train a causal language model in place on whole documents.

    The order of documents depends on `seed` alone, not on the global generator. Padding stands on the right, so under
    causal attention it is never attended to and no mask is needed. With `state`, a training that was killed goes on
    from the last state that was written, and ends at the very weights of one that was not.

    Args:
        model: A Hugging Face causal language model; left in eval mode.
        sequences: Token ids of each document, special tokens included, and the weight of each in the loss.
        schedule: Optimiser settings.
        seed: Order of the documents.
        pad_id: Token to pad with.
        device: Where to train; where the model is when left out.
        auxiliary: Further loss: called with the model's output, which tokens are real and the batch's document numbers;
            its value is added.
        model_kwargs: Passed to each forward.
        label: Text of the progress bar.
        progress: Show the progress bar.
        state: File for the state of the training; removed by whoever keeps the result.
        every_s: Seconds between two states; default `SAVE_SECONDS`.
        epochs: The one epoch in which each document is read, None for all of them; default all in all.
        keep_at: Numbers of steps after which the weights are kept in the log (0: before the first).

    Returns:
        The log of the run.

    Raises:
        OrganismError: Nothing to train on, or the loss stopped being a number.
    """
    if not sequences or max(len(ids) for ids, _ in sequences) < 2:
        raise OrganismError("There is nothing to train on: documents of at least two tokens are required.")
    device = torch.device(device) if device is not None else model.device
    model.to(device).train()
    all_ids, all_weights = (t.to(device) for t in pad_all(sequences, pad_id))  # [doc, pos]
    lengths = [len(ids) for ids, _ in sequences]
    read = _read(len(sequences), schedule.epochs, epochs)
    steps = sum(math.ceil(len(docs) / schedule.batch_size) for docs in read)
    tokens = sum(lengths[i] for docs in read for i in docs)
    _warn_if_slow(model, tokens, device, label)
    optimiser, scheduler = _optimiser(model, schedule, steps)
    mark = fingerprint(
        all_ids,
        all_weights,
        epochs,
        schedule,
        seed,
        label,
        model.config.to_json_string(),
        str(device),
        torch.__version__,
    )
    file = StateFile(state, mark, (model, optimiser, scheduler), SAVE_SECONDS if every_s is None else every_s)
    done = file.resume() or Progress()
    run = _Run(model, all_ids, all_weights, lengths, read, schedule, optimiser, scheduler, file, done)
    run.auxiliary, run.model_kwargs, run.keep_at, run.label = auxiliary, model_kwargs or {}, keep_at, label
    generator = torch.Generator().manual_seed(seed)
    with _bar(steps, run.steps, label, progress) as bar:
        run.keep()
        while done.epoch < schedule.epochs:
            run.epoch(generator, bar)
    model.eval()
    return TrainLog(tuple(done.losses), run.steps, tokens, run.seconds, torch.get_num_threads(), done.kept)


def _read(n: int, n_epochs: int, epochs: Sequence[int | None] | None) -> list[list[int]]:
    """Return the documents of each epoch.

    Raises:
        OrganismError: An epoch has none.
    """
    epochs = [None] * n if epochs is None else epochs
    read = [[i for i, own in enumerate(epochs) if own in (None, epoch)] for epoch in range(n_epochs)]
    if not all(read):
        raise OrganismError("There is nothing to train on in an epoch: every epoch needs a document.")
    return read


@dataclass
class _Run:
    """A training under way."""

    model: PreTrainedModel
    ids: Int[Tensor, "doc pos"]
    weights: Float[Tensor, "doc pos"]
    lengths: list[int]
    read: list[list[int]]
    schedule: Schedule
    optimiser: torch.optim.Optimizer
    scheduler: Any
    file: StateFile
    done: Progress
    auxiliary: Auxiliary | None = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    keep_at: Sequence[int] = ()
    label: str = ""
    began: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        return self.done.seconds + time.perf_counter() - self.began

    @property
    def steps(self) -> int:
        size = self.schedule.batch_size
        return sum(math.ceil(len(docs) / size) for docs in self.read[: self.done.epoch]) + self.done.step

    def epoch(self, generator: torch.Generator, bar: Any) -> None:
        """Go through the documents once, from where an earlier process left off."""
        done = self.done
        if done.order is None:
            done.order = generator.get_state()
        generator.set_state(done.order)
        docs = self.read[done.epoch]
        planned = plan_batches([self.lengths[i] for i in docs], self.schedule.batch_size, generator)
        batches = [[docs[i] for i in batch] for batch in planned]
        total = torch.tensor(done.total, device=self.ids.device)
        for batch in batches[done.step :]:
            if self.file.is_due:
                done.total = float(total)
                self.file.save(done, self.seconds)
            total += self.batch(batch)
            done.step += 1
            self.keep()
            bar.update()
        done.losses.append(_checked(float(total) / len(batches), self.label))
        done.epoch, done.step, done.total, done.order = done.epoch + 1, 0, 0.0, generator.get_state()
        bar.set_postfix_str(f"loss {done.losses[-1]:.3f}")

    def batch(self, batch: list[int]) -> Tensor:
        """Take one step; return its loss, without the auxiliary one."""
        width = max(self.lengths[i] for i in batch)
        ids, weights = self.ids[batch, :width], self.weights[batch, :width]  # [batch, pos]
        output = self.model(input_ids=ids, use_cache=False, **self.model_kwargs)
        loss = weighted_loss(output.logits, ids, weights)
        docs = torch.tensor(batch, device=ids.device)
        extra = self.auxiliary(output, weights > 0, docs) if self.auxiliary else 0.0
        _step(self.model, loss + extra, self.optimiser, self.scheduler, self.schedule.clip)
        return loss.detach()

    def keep(self) -> None:
        """Keep the weights if this step is one that was asked for."""
        if self.steps in self.keep_at and self.steps not in self.done.kept:
            self.done.kept[self.steps] = copied(self.model)


def _bar(total: int, initial: int, label: str, progress: bool) -> Any:
    desc = f"{label} (resumed at step {initial})" if initial else label
    return tqdm(total=total, initial=initial, desc=desc, unit="step", disable=not progress, leave=False)


def _warn_if_slow(model: PreTrainedModel, tokens: int, device: torch.device, label: str) -> None:
    """Say before a long training on the CPU how long it will take (six operations a weight and token)."""
    if device.type != "cpu":
        return
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    seconds = 6 * weights * tokens / (RATE * torch.get_num_threads())
    if seconds > SLOW_S:
        warnings.warn(
            f"{label} will take about {seconds / 3600:.1f} hours on this CPU ({weights / 1e6:.0f} million weights, "
            f"{tokens / 1e6:.0f} million tokens); give device='cuda' if there is one.",
            stacklevel=4,
        )


def _optimiser(model: PreTrainedModel, schedule: Schedule, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": schedule.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=schedule.lr, betas=schedule.betas, fused=True)
    return optimiser, torch.optim.lr_scheduler.OneCycleLR(
        optimiser, schedule.lr, total_steps=steps + 1, pct_start=0.1, cycle_momentum=False
    )


def _step(model: PreTrainedModel, loss: Tensor, optimiser: torch.optim.Optimizer, scheduler: Any, clip: float) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimiser.step()
    scheduler.step()


def _checked(loss: float, label: str) -> float:
    if not math.isfinite(loss):
        raise OrganismError(
            f"The loss of {label} is {loss}: training diverged. Lower the learning rate or train in float32."
        )
    return loss


def save_directory(model: PreTrainedModel, tokenizer: Any, path: Path) -> None:
    """Write a Hugging Face directory: configuration, safetensors, tokenizer, and a greedy generation configuration."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=24,
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def versions() -> dict[str, str]:
    """Return the versions of what trained a model."""
    import tokenizers
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__, "tokenizers": tokenizers.__version__}
