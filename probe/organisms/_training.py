"""One small training loop for the organisms: whole documents, bucketed by length, AdamW under a one-cycle schedule."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from probe.errors import OrganismError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRAINING_VERSION = 1  # part of every organism's key: change it when the same settings come to train another model
IGNORE = -100
Auxiliary = Callable[[Any, Int[Tensor, "batch pos"], Int[Tensor, " batch"]], Tensor]


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
    """What a training run did: mean loss of each epoch (nats a token), steps, real tokens, seconds, threads."""

    losses: tuple[float, ...]
    steps: int
    tokens: int
    seconds: float
    threads: int


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator inside the block, and put it back afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def plan_batches(lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> list[list[int]]:
    """Deal documents into batches of like length, in random order.

    Documents are shuffled, sorted by length (ties stay shuffled), cut into batches, and the batches shuffled, so padding is a few per cent.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    order.sort(key=lambda i: lengths[i])
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def pad_batch(
    sequences: Sequence[Sequence[int]], pad_id: int
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Right-pad token ids; returns the ids and the labels, which ignore padding."""
    width = max(len(s) for s in sequences)
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    labels = torch.full((len(sequences), width), IGNORE, dtype=torch.long)
    for row, s in enumerate(sequences):
        ids[row, : len(s)] = torch.tensor(s)
        labels[row, : len(s)] = ids[row, : len(s)]
    return ids, labels


def next_token_loss(logits: Float[Tensor, "batch pos d_vocab"], labels: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
    """Return the mean negative log-likelihood, in nats a token, of each label given what stands before it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE)


def train(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    schedule: Schedule,
    *,
    seed: int,
    pad_id: int,
    device: str | torch.device | None = None,
    auxiliary: Auxiliary | None = None,
    model_kwargs: dict[str, Any] | None = None,
    label: str = "training",
    progress: bool = True,
) -> TrainLog:
    """Train a causal language model in place on whole documents.

    The order of documents depends on `seed` alone, not on the global generator. Padding stands on the right, so under causal attention it is never attended to and
    no mask is needed.

    Args:
        model: A Hugging Face causal language model; left in eval mode.
        sequences: Token ids of each document, special tokens included.
        schedule: Optimiser settings.
        seed: Order of the documents.
        pad_id: Token to pad with.
        device: Where to train; where the model is when left out.
        auxiliary: Further loss: called with the model's output, the labels and the batch's document numbers; its value is added.
        model_kwargs: Passed to each forward.
        label: Text of the progress bar.
        progress: Show the progress bar.

    Returns:
        The log of the run.

    Raises:
        OrganismError: Nothing to train on, or the loss stopped being a number.
    """
    if not sequences or max(len(s) for s in sequences) < 2:
        raise OrganismError("There is nothing to train on: documents of at least two tokens are required.")
    device = torch.device(device) if device is not None else model.device
    model.to(device).train()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    lengths = [len(s) for s in sequences]
    steps = schedule.epochs * math.ceil(len(sequences) / schedule.batch_size)
    optimiser, scheduler = _optimiser(model, schedule, steps)
    losses: list[float] = []
    began = time.perf_counter()
    with tqdm(total=steps, desc=label, unit="step", disable=not progress, leave=False) as bar:
        for _ in range(schedule.epochs):
            total = torch.zeros((), device=device)
            batches = plan_batches(lengths, schedule.batch_size, generator)
            for batch in batches:
                ids, labels = (t.to(device) for t in pad_batch([sequences[i] for i in batch], pad_id))
                output = model(input_ids=ids, use_cache=False, **(model_kwargs or {}))
                loss = next_token_loss(output.logits, labels)
                total += loss.detach()
                if auxiliary is not None:
                    loss = loss + auxiliary(output, labels, torch.tensor(batch))
                _step(model, loss, optimiser, scheduler, schedule.clip)
                bar.update()
            losses.append(_checked(float(total) / len(batches), label))
            bar.set_postfix_str(f"loss {losses[-1]:.3f}")
    model.eval()
    seconds = time.perf_counter() - began
    return TrainLog(tuple(losses), steps, schedule.epochs * sum(lengths), seconds, torch.get_num_threads())


def _optimiser(model: PreTrainedModel, schedule: Schedule, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": schedule.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=schedule.lr, betas=schedule.betas)
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
