"""Ununlearning: the fact is given back in the context, and the model reads it from there.

"UnUnlearning: Unlearning is not sufficient for content regulation in advanced generative AI" (arXiv 2407.00106).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from probe.audit._case import Case
from probe.audit._numbers import Metric, Number, by_group
from probe.audit.part import Measurement, Part, Subject, spaced
from probe.audit.prompts import shortened
from probe.data import Question, Questions
from probe.errors import AuditError, DataError
from probe.scoring import AnswerScores, score_answers

__all__ = ["Context", "in_context"]


def in_context(questions: Questions) -> Questions:
    """Put before each question its fact, as another phrasing of the question with the answer.

    The other phrasing is the row's first paraphrase, else another question of the same group with the same answer, else
    the question itself.
    """
    same: dict[tuple[str, str], list[str]] = {}
    for row in questions:
        same.setdefault((row.group, row.answer), []).append(row.question)

    def told(row: Question) -> Question:
        others = [*row.paraphrases, *same[row.group, row.answer], row.question]
        other = next((text for text in others if text != row.question), row.question)
        stop = "" if row.answer.rstrip().endswith((".", "!", "?")) else "."
        return replace(row, question=f"{other} {row.answer}{stop} {row.question}")

    return Questions((told(row) for row in questions), f"{questions.name} in context".strip())


@dataclass(frozen=True)
class Context(Part):
    """Recall with the fact in the context, on forget people and on people whom nothing was ever trained on.

    A gold model reads a fact from its context as well, so this is no evidence that anything was only suppressed: it
    says what unlearning cannot keep from being used once somebody tells it. What matters is the difference to gold. An
    edited model that reads less about forget people than gold does refuses, rather than does not know.

    Questions are the case's own (`given`, `given_holdout`) or made by `in_context`. A model that does not read contexts
    about strangers (`min_reading`) has no `context_recall` on `forget`: it cannot be measured.

    Measures:
        context_recall, context_probability: On `forget` and, as the control, on `holdout`.
        context_over_gold: Recall on `forget` minus the mean of the golds, question by question (of a gold: the other
            golds).

    The table `context` has a row per set: recall and probability with the fact given, recall without.

    Attributes:
        min_reading: Recall on `holdout` with the fact given below which a model counts as one that reads no contexts.
        limit: Rows of each set.
    """

    min_reading: float = 0.5
    limit: int | None = 128

    name: ClassVar[str] = "context"
    title: ClassVar[str] = "the fact given back in the context"
    needs: ClassVar[tuple[str, ...]] = ("forget",)
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("context_recall", "recall with the fact in the context", share=True),
        Metric("context_probability", "probability with the fact in the context", share=True),
        Metric("context_over_gold", "recall with the fact in the context, minus gold's"),
    )

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        if not 0 <= self.min_reading <= 1 or (self.limit is not None and self.limit < 1):
            raise AuditError(
                f"min_reading must be from 0 to 1 and limit at least 1; received {self.min_reading}, {self.limit}"
            )

    def measure(self, subject: Subject) -> Measurement:
        """Score the questions with their facts before them.

        Raises:
            ProbeError: Logits that are not finite.
        """
        case, numbers, rows = subject.case, list[Number](), list[dict[str, Any]]()
        scores: dict[str, AnswerScores] = {}
        for name, given in _given(case).items():
            try:
                scores[name] = _scores(subject, spaced(given, self.limit))
            except DataError as error:
                why = shortened(str(error), given)
                return Measurement(missing=(f"recall with the fact in the context: {why}",))
            rows.append(_record(name, scores[name], subject))
        missing = self._unreadable(scores)
        for name, own in scores.items():
            if name == "holdout" or not missing:
                numbers.append(Number(name, "context_recall", by_group(own.exact, own.groups, share=True)))
                numbers.append(Number(name, "context_probability", by_group(own.prob, own.groups)))
        if "holdout" not in scores:
            missing.append("whether facts in contexts are read at all (people never trained on)")
        told = scores["forget"] if any(number.set == "forget" for number in numbers) else None
        return Measurement(tuple(numbers), {"context": pd.DataFrame(rows)}, payload=told, missing=tuple(missing))

    def _unreadable(self, scores: Mapping[str, AnswerScores]) -> list[str]:
        """Why what a model says of forget people with the fact before it means nothing; empty where it does."""
        if "holdout" not in scores or (reading := float(scores["holdout"].exact.mean())) >= self.min_reading:
            return []
        return [
            "recall with the fact in the context: of strangers' facts only "
            f"{reading:.0%} are read from it, {self.min_reading:.0%} are needed"
        ]

    def compare(self, measured: Mapping[str, Measurement], case: Case) -> Mapping[str, Measurement]:
        """Each model's recall minus the golds', question by question."""
        exact = {role: one.payload.exact.astype(float) for role, one in measured.items() if one.payload is not None}
        groups = next((one.payload.groups for one in measured.values() if one.payload is not None), ())
        found = {}
        for role, own in exact.items():
            golds = [other for name, other in exact.items() if name.startswith("gold") and name != role]
            if golds:
                over = by_group(own - np.mean(golds, axis=0), groups)
                found[role] = Measurement((Number("forget", "context_over_gold", over),))
        return found


def _given(case: Case) -> dict[str, Questions]:
    """Questions with their facts before them: the case's own, or made."""
    found = {"forget": case.sets.get("given") or in_context(case.sets["forget"])}
    if case.has("given_holdout") or case.has("holdout"):
        found["holdout"] = case.sets.get("given_holdout") or in_context(case.sets["holdout"])
    return found


def _scores(subject: Subject, questions: Questions) -> AnswerScores:
    case = subject.case
    return score_answers(subject.model, questions, batch_size=case.batch_size, bos=case.bos, chat=case.chat)


def _record(name: str, scores: AnswerScores, subject: Subject) -> dict[str, Any]:
    plain = float(subject.answers[name].exact.mean()) if name in subject.answers else np.nan
    with_fact = {"recall": float(scores.exact.mean()), "probability": float(scores.prob.mean())}
    return {"set": name, **with_fact, "recall_without": plain, "n": len(scores)}
