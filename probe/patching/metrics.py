"""What a patch is measured by: a number per run, read from the logits at the last position."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probe.errors import PatchError

__all__ = ["METRICS", "Metric", "log_prob", "logit_diff", "resolve"]

Logits = Float[Tensor, "batch d_vocab"]
Tokens = Int[Tensor, " batch"]
Values = Float[Tensor, " batch"]


def logit_diff(logits: Logits, answer: Tokens, wrong: Tokens) -> Values:
    """logit(answer) - logit(wrong), in nats."""
    return _pick(logits, answer) - _pick(logits, wrong)


def log_prob(logits: Logits, answer: Tokens, wrong: Tokens) -> Values:
    """log p(answer), in nats."""
    return _pick(logits.log_softmax(-1), answer)


def _pick(values: Logits, token: Tokens) -> Values:
    return values.gather(-1, token[:, None])[:, 0]


@dataclass(frozen=True)
class Metric:
    """A metric with what it needs.

    Attributes:
        name: For tables and pictures.
        unit: Its unit before normalisation.
        reads: Answer tokens that it needs: 0 none, 1 the answer's first, 2 the first at which answer and wrong differ.
        function: `(logits, answer, wrong) -> values`, on float32 logits [batch, d_vocab] and token ids [batch] (-1
            where there is none).
    """

    name: str
    unit: str
    reads: int
    function: Callable[[Tensor, Tensor, Tensor], Tensor]

    def __call__(self, logits: Logits, answer: Tokens, wrong: Tokens) -> Values:
        """One value per run.

        Raises:
            PatchError: The values are no float tensor [batch], or not finite.
        """
        value: Any = self.function(logits.float(), answer, wrong)
        if not isinstance(value, Tensor) or value.shape != answer.shape or not value.is_floating_point():
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise PatchError(f"metric {self.name!r} must return a float tensor of shape ({len(answer)},); got {got}")
        bad = (~torch.isfinite(value)).sum().item()
        if bad:
            raise PatchError(
                f"metric {self.name!r} returned NaN or infinity for {bad} of {len(value)} runs; check the model's "
                "weights and dtype, and that the metric is defined for every pair"
            )
        return value


METRICS: dict[str, Metric] = {
    "logit_diff": Metric("logit_diff", "nats", 2, logit_diff),
    "log_prob": Metric("log_prob", "nats", 1, log_prob),
}


def resolve(metric: str | Callable[..., Tensor], has_answer: bool, has_wrong: bool) -> Metric:
    """A metric by name, or your own: `f(logits)` or `f(logits, answer, wrong)`.

    Raises:
        PatchError: An unknown name, or a function of other arguments.
    """
    if isinstance(metric, str):
        if metric not in METRICS:
            raise PatchError(f"metric must be one of {', '.join(METRICS)} or a function of logits; got {metric!r}")
        return METRICS[metric]
    if not callable(metric):
        raise PatchError(f"metric must be a name or a function; got {type(metric).__name__}")
    name = getattr(metric, "__name__", type(metric).__name__)
    count = _arguments(metric)
    if count == 1:
        return Metric(name, "", 0, lambda logits, answer, wrong: metric(logits))
    if count == 3:
        return Metric(name, "", int(has_answer) + int(has_answer and has_wrong), metric)
    raise PatchError(f"metric {name!r} must take (logits) or (logits, answer, wrong); it takes {count} arguments")


def _arguments(function: Callable[..., Any]) -> int:
    """Positional arguments without a default."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return sum(1 for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty)
