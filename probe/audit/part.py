"""What every part of an audit is: a measurement of one model at a time, and what can only be said of several together.

A part is a frozen dataclass whose fields are the method's settings. `measure` is called once for each model (the
original, every gold, the edited one while its edit is applied); `compare` once at the end, when the original has its
own weights again. Parts that attack a model change its weights inside `scratch`, which gives every bit back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd
import torch

from probe.audit._numbers import Estimate, Metric, Number, Ratio, by_group
from probe.data import Questions
from probe.errors import AuditError
from probe.models import Model
from probe.scoring import AnswerScores

if TYPE_CHECKING:
    from probe.audit._case import Case

__all__ = ["Estimate", "Measurement", "Metric", "Number", "Part", "Ratio", "Subject", "by_group", "scratch"]


@dataclass(frozen=True)
class Subject:
    """One model of an audit.

    Attributes:
        role: "original", "edited", "gold 1", "gold 2", ...
        model: The model, with the weights of that role. While the edited one is measured, `case.original` has the
            edit applied, so another model's weights may be read in `Part.compare` only.
        case: What all models are measured on.
        answers: Teacher-forced scores of the answers of each set (`case.sets`), already computed.
    """

    role: str
    model: Model
    case: Case
    answers: Mapping[str, AnswerScores]


@dataclass(frozen=True)
class Measurement:
    """What a part found out about one model.

    Attributes:
        numbers: Rows of the card.
        tables: Details by name (curves, one row a layer, ...); the card adds a column `model` and stacks them.
        payload: Whatever `compare` needs (on the CPU).
        missing: Sentences on what could not be measured on this model, and why.
    """

    numbers: tuple[Number, ...] = ()
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    payload: Any = None
    missing: tuple[str, ...] = ()


class Part(ABC):
    """A part of the audit. Subclasses are frozen dataclasses whose fields are the method's settings.

    Attributes:
        name: Its name in `audit(..., parts=...)`.
        title: What it measures, in a few words, for the card.
        needs: Names of sets (of `Case.sets`) and of `"gold"`, `"corpus"` that it cannot do without.
        metrics: Every metric that it reports.
        evidence: (set, metric) pairs that grow with what the model still knows of the forget set: what the verdict
            and the meta-evaluation look at.
        kind: What its evidence is: `plain` (asked as a user would), `attack`, or `inside`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ("forget",)
    metrics: ClassVar[tuple[Metric, ...]]
    evidence: ClassVar[tuple[tuple[str, str], ...]] = ()
    kind: ClassVar[str] = "plain"

    def why_not(self, case: Case) -> str | None:
        """Say why this part cannot be measured on a case; None where it can."""
        lacking = [name for name in self.needs if not case.has(name)]
        return f"{self.title} (needs {', '.join(lacking)})" if lacking else None

    @abstractmethod
    def measure(self, subject: Subject) -> Measurement:
        """Measure one model. Its weights, its mode and the global random state are afterwards as they were."""

    def compare(self, measured: Mapping[str, Measurement], case: Case) -> Mapping[str, Measurement]:
        """Return what can only be said of several models together, by role: further numbers and tables.

        Args:
            measured: What `measure` returned, by role: "original", "gold 1", ..., and "edited" if there is one.
            case: The case; `case.original` and `case.golds` have their own weights.
        """
        return {}


@contextmanager
def scratch(model: Model) -> Iterator[Model]:
    """Let the block change a model's weights; every bit, gradient flag and mode is put back at its end.

    The copy lives where the weights live: for a model of n bytes another n bytes for the time of the block.

    Raises:
        AuditError: Parameters were added, removed or replaced by ones of another shape inside the block.
    """
    hf = model.hf
    tensors = {**dict(hf.named_parameters()), **dict(hf.named_buffers())}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    flags = {name: tensor.requires_grad for name, tensor in hf.named_parameters()}
    modes = {module: module.training for module in hf.modules()}
    try:
        yield model
    finally:
        now = {**dict(hf.named_parameters()), **dict(hf.named_buffers())}
        if {n: t.shape for n, t in now.items()} != {n: t.shape for n, t in before.items()}:
            raise AuditError("parameters were added, removed or reshaped in place of being changed")
        with torch.no_grad():
            for name, tensor in now.items():
                tensor.copy_(before[name])
        for name, parameter in hf.named_parameters():
            parameter.requires_grad_(flags[name])
            parameter.grad = None
        for module, training in modes.items():
            module.training = training


def texts(questions: Questions) -> list[str]:
    """Return what a model reads of each row: `question + " " + answer`."""
    return [f"{row.question} {row.answer}" for row in questions]


def spaced(questions: Questions, limit: int | None) -> Questions:
    """Return at most `limit` rows, evenly spaced, so that all models and groups are seen alike."""
    if limit is None or len(questions) <= limit:
        return questions
    step = len(questions) / limit
    return questions.take(int(i * step) for i in range(limit))


def people(questions: Questions | Sequence[str]) -> int:
    """Return the number of groups."""
    groups = questions.groups if isinstance(questions, Questions) else questions
    return len(set(groups))
