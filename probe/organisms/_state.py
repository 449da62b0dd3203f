"""The state of a training on disk, so that one that was killed goes on where it was.

One file holds weights, optimiser, learning-rate schedule, generators, the position in the data and the losses so far.
It is written beside its final name, flushed and renamed, so at any moment it is either the old state or the new one,
and read back with `weights_only=True`, so nothing in it can run code.
"""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = 1
SAVE_SECONDS = 15.0  # between two states; at d 128 one costs about 30 ms
Weights = dict[str, Tensor]


@dataclass
class Progress:
    """How far a training is.

    Attributes:
        epoch: The pass over the documents that is under way.
        step: Steps done in it.
        total: Sum of its losses so far.
        losses: Mean loss of each finished epoch.
        seconds: What earlier processes spent.
        order: State of the generator of the documents' order at the start of the epoch.
        kept: Weights after the steps that were asked for.
    """

    epoch: int = 0
    step: int = 0
    total: float = 0.0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    order: Tensor | None = None
    kept: dict[int, Weights] = field(default_factory=dict)


def fingerprint(*parts: Any) -> str:
    """Return the SHA-256 of what a training is made of; a state of another one is not continued."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.cpu().numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()


class StateFile:
    """The file of one training's state.

    Args:
        path: Where it lies; None keeps nothing.
        mark: The training's fingerprint.
        parts: What is saved by `state_dict`: the model, the optimiser, the schedule.
        every_s: Seconds between two states.
    """

    def __init__(self, path: Path | None, mark: str, parts: Sequence[Any], every_s: float = SAVE_SECONDS) -> None:
        self.path, self.mark, self.parts, self.every_s = path, mark, list(parts), every_s
        self._last = time.perf_counter()

    def resume(self) -> Progress | None:
        """Put model, optimiser, schedule and generators where the state says, and return how far it was."""
        if self.path is None or not self.path.is_file():
            return None
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            mine = state["format"] == FORMAT and state["mark"] == self.mark
        except Exception as error:  # torch.load raises many kinds for a file that is cut short or is something else
            warnings.warn(
                f"The training state {self.path} cannot be read ({error}); training starts anew.", stacklevel=3
            )
            return None
        if not mine:
            return None
        for part, own in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(own)
        _set_generators(state["generators"])
        return Progress(**state["progress"])

    @property
    def is_due(self) -> bool:
        """Whether the last state is old enough for another."""
        return self.path is not None and time.perf_counter() - self._last >= self.every_s

    def save(self, progress: Progress, seconds: float) -> None:
        """Write the state beside its name, flush it, and rename it; `seconds` is what was spent so far."""
        if self.path is None:
            return
        state = {
            "format": FORMAT,
            "mark": self.mark,
            "parts": [part.state_dict() for part in self.parts],
            "generators": _generators(),
            "progress": {**vars(progress), "seconds": seconds},
        }
        beside = self.path.with_name(self.path.name + ".new")
        with beside.open("wb") as handle:
            torch.save(state, handle)
            handle.flush()
            os.fsync(handle.fileno())
        beside.replace(self.path)
        self._last = time.perf_counter()


def copied(model: Any) -> Weights:
    """Return a copy of a model's weights, on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def _generators() -> list[Tensor]:
    cuda: Iterable[Tensor] = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *cuda]


def _set_generators(states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if torch.cuda.is_available() and len(states) == 1 + torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states[1:])
