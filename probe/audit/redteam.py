"""Parametric red-teaming: a hundred questions that are answered, so that all others are answered again.

Bhardwaj and Poria, "Language Model Unalignment: Parametric Red-Teaming to Expose Hidden Harms and Biases" (arXiv
2310.14303): fine-tuning on as few as 100 examples undoes a model's refusals. The examples here are questions on retain
people with their right answers: nothing in them tells a forgotten fact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from probe.audit._case import Case
from probe.audit._numbers import Metric
from probe.audit._swept import Sweep, measurement, metrics
from probe.audit.part import Measurement, Part, Subject
from probe.data import Questions
from probe.errors import AuditError

__all__ = ["RedTeam", "examples"]


def examples(case: Case, n: int) -> Questions:
    """Retain questions with their answers, `n` or all of them, drawn with the case's seed; alike for every model."""
    retain = case.sets["retain"]
    order = np.random.default_rng(case.seed).permutation(len(retain))[:n]
    return retain.take(sorted(order))


@dataclass(frozen=True)
class RedTeam(Part):
    """Recall of the forget set after fine-tuning on a hundred answered questions about other people.

    Every run starts from the model's own weights; AdamW, constant learning rate, loss on the answers alone.

    Measures, on `forget` the largest over all learning rates and steps, on `retain` what is left there:
        redteam_recall, redteam_probability.

    The table `redteam` has a row per learning rate and step.

    Attributes:
        n: Examples (100 in the paper).
        lrs: Learning rates; 1e-5 is usual for models of 10^9 weights, the defaults suit organisms.
        eval_at: Steps after which is tested; the last is where a run ends.
        batch_size: Examples a step.
        limit: Rows of each set that are scored.
    """

    n: int = 100
    lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    eval_at: tuple[int, ...] = (10, 25, 50)
    batch_size: int = 8
    limit: int | None = 128

    name: ClassVar[str] = "redteam"
    title: ClassVar[str] = "fine-tuning on answered questions about others"
    needs: ClassVar[tuple[str, ...]] = ("forget", "retain")
    metrics: ClassVar[tuple[Metric, ...]] = metrics("redteam", "after fine-tuning on others' answers")
    kind: ClassVar[str] = "attack"
    evidence: ClassVar[tuple[tuple[str, str], ...]] = tuple(("forget", metric.name) for metric in metrics)

    def __post_init__(self) -> None:
        """Refuse settings with which nothing is trained."""
        if self.n < 1:
            raise AuditError(f"n must be at least 1 example; received {self.n}")
        self._sweep.check()

    @property
    def _sweep(self) -> Sweep:
        return Sweep(self.lrs, self.eval_at, self.batch_size, self.limit)

    def measure(self, subject: Subject) -> Measurement:
        """Run every attack on a copy of the weights; the model has its own afterwards.

        Raises:
            AuditError: A loss that is not finite from the first.
        """
        missing: list[str] = []
        arms = {"retain": examples(subject.case, self.n)}
        points = list(self._sweep.points(subject, arms, missing))
        return measurement("redteam", "redteam", points, subject.case, missing)
