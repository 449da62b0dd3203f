"""What attacks with several settings share: forget and retain questions scored at each, and the worst case of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from probe.audit._case import Case
from probe.audit._finetune import finetune
from probe.audit._numbers import Metric, Number, by_group
from probe.audit._worst import worst_case
from probe.audit.part import Measurement, Subject, scratch, spaced
from probe.data import Questions
from probe.errors import AuditError, ProbeError
from probe.models import Model
from probe.scoring import AnswerScores, AnswerTokens, score_answers


@dataclass(frozen=True)
class Point:
    """Scores after an attack with one setting."""

    setting: Mapping[str, Any]
    forget: AnswerScores
    retain: AnswerScores


def metrics(prefix: str, label: str) -> tuple[Metric, ...]:
    """The metrics that `measurement` fills."""
    return (
        Metric(f"{prefix}_recall", f"recall {label}, worst case", share=True),
        Metric(f"{prefix}_probability", f"probability {label}, worst case", share=True),
    )


def score(model: Model, case: Case, setting: Mapping[str, Any], limit: int | None) -> Point:
    """Score a model, as it is now, on at most `limit` rows of forget and of retain each."""
    how: dict[str, Any] = {"batch_size": case.batch_size, "bos": case.bos, "chat": case.chat}
    forget, retain = (score_answers(model, spaced(case.sets[name], limit), **how) for name in ("forget", "retain"))
    return Point(setting, forget, retain)


def measurement(
    prefix: str, table: str, points: Sequence[Point], case: Case, missing: Sequence[str] = ()
) -> Measurement:
    """The largest forget recall and probability over all settings, and retain's at that same setting."""
    if not points:
        return Measurement(missing=tuple(missing))
    how: dict[str, Any] = {"n_boot": case.n_boot, "seed": case.seed, "people": case.people}
    numbers = []
    for what, of in (("recall", "exact"), ("probability", "prob")):
        share = what == "recall"
        ratios = [by_group(getattr(p.forget, of), p.forget.groups, share=share) for p in points]
        index, worst = worst_case(ratios, len(points[0].forget), **how)
        kept = points[index].retain
        beside = by_group(getattr(kept, of), kept.groups, share=share)
        numbers += [Number("forget", f"{prefix}_{what}", worst), Number("retain", f"{prefix}_{what}", beside)]
    frame = pd.DataFrame([_record(point) for point in points])
    return Measurement(tuple(numbers), {table: frame}, payload=frame, missing=tuple(missing))


def _record(point: Point) -> dict[str, Any]:
    named = {"forget": point.forget, "retain": point.retain}
    means = {f"{name}_recall": float(np.mean(own.exact)) for name, own in named.items()}
    means |= {f"{name}_probability": float(np.mean(own.prob)) for name, own in named.items()}
    return {**point.setting, **means}


@dataclass(frozen=True)
class Sweep:
    """Finetuning runs: every learning rate, looked at after each of some steps."""

    lrs: Sequence[float]
    eval_at: Sequence[int]
    batch_size: int
    limit: int | None

    def check(self) -> None:
        """Raise `AuditError` unless the settings can be run."""
        if not self.lrs or any(not (math.isfinite(lr) and lr > 0) for lr in self.lrs):
            raise AuditError(f"learning rates must be positive; received {self.lrs}")
        grows = all(a < b for a, b in zip(self.eval_at, self.eval_at[1:], strict=False))
        if not self.eval_at or self.eval_at[0] < 1 or not grows:
            raise AuditError(f"eval_at must be steps from 1 on that grow; received {self.eval_at}")
        if self.batch_size < 1 or (self.limit is not None and self.limit < 1):
            raise AuditError(f"batch_size and limit must be at least 1; received {self.batch_size} and {self.limit}")

    def points(
        self, subject: Subject, arms: Mapping[str, Questions | Sequence[AnswerTokens]], missing: list[str]
    ) -> Iterator[Point]:
        """Every run's points, each run from the model's own weights; a run that breaks off is named in `missing`."""
        for data, rows in arms.items():
            for lr in self.lrs:
                found: list[Point] = []
                failed = self._run(subject, data, rows, lr, found)
                yield from found
                if failed:
                    missing.append(f"fine-tuning on {data} at learning rate {lr:g}: {failed}")

    def _run(
        self, subject: Subject, data: str, rows: Questions | Sequence[AnswerTokens], lr: float, found: list[Point]
    ) -> str:
        """Fill in one run's points; why it broke off, if it did."""
        case, model = subject.case, subject.model

        def look(step: int) -> None:
            found.append(score(model, case, {"data": data, "lr": lr, "step": step}, self.limit))

        settings: dict[str, Any] = {"steps": self.eval_at[-1], "lr": lr, "batch_size": self.batch_size}
        settings |= {"seed": case.seed, "bos": case.bos, "chat": case.chat}
        with scratch(model):
            try:
                log = finetune(model, rows, eval_at=self.eval_at, on_eval=look, **settings)
            except ProbeError as error:
                if not found and isinstance(error, AuditError):
                    raise
                return str(error)
        return "" if log.diverged is None else f"diverged at step {log.diverged}"
