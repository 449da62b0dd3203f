"""What a model says and prefers: ROUGE-L, exact memorisation, extraction strength, truth ratio, on every set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from probe.audit import metrics
from probe.audit._generation import answered, kept
from probe.audit.part import Measurement, Metric, Number, Part, Subject, by_group, spaced
from probe.data import Question, Questions
from probe.errors import AuditError, DataError, ProbeError
from probe.models import Model
from probe.scoring import score_answers

__all__ = ["Behaviour", "TruthScores", "score_truth", "truth"]

PARAPHRASED_ANSWER = "the paraphrased answer"
PARAPHRASED_QUESTION = "the answer under a paraphrased question"
ANSWER = "the answer itself"
FULL_SETS = ("forget", "retain")  # where metrics of several parts need the most rows
_IN_CONTEXT = ("given", "given_holdout")  # the answer stands in the question: nothing is remembered there


@dataclass(frozen=True)
class TruthScores:
    """Losses of right and of wrong answers to the same question, per row.

    Attributes:
        rows: Index of each row in the questions; rows without perturbed answers are left out.
        groups: The rows' groups.
        references: What stands for the right answer, per row (see `score_truth`).
        paraphrase_nll: Loss of the right answer, in nats per token; the mean where there are several.
        perturbed_nll: Loss of each wrong answer.
        items: Number of what was scored: phrasings of one fact that share their paraphrased question share it, and are
            one observation for a test.
        n_without: Rows that have no perturbed answer.
    """

    rows: Int[np.ndarray, " row"]
    groups: tuple[str, ...]
    references: tuple[str, ...]
    paraphrase_nll: Float[np.ndarray, " row"]
    perturbed_nll: tuple[Float[np.ndarray, " answer"], ...]
    items: Int[np.ndarray, " row"]
    n_without: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def distinct(self) -> Int[np.ndarray, " item"]:
        """The first row of each item."""
        return np.unique(self.items, return_index=True)[1]

    @property
    def log_ratio(self) -> Float[np.ndarray, " row"]:
        """Logarithm of each row's truth ratio."""
        pairs = zip(self.paraphrase_nll, self.perturbed_nll, strict=True)
        return np.array([metrics.log_truth_ratio(float(right), list(wrong)) for right, wrong in pairs])


def score_truth(
    model: Model, questions: Questions, *, batch_size: int = 64, bos: bool | None = None, chat: bool = False
) -> TruthScores:
    """Score the right answer of each question, in other words, and its wrong answers (TOFU, arXiv 2401.06121).

    The right answer is `paraphrased_answers` where a row has them. TOFU's reason for them is that the answer's own
    wording was trained on; so where there are none, the answer and the wrong answers are both scored under the row's
    first paraphrased question, and where there is none either, under the question itself.

    Raises:
        DataError: No row with perturbed answers, a perturbed answer that is the answer, or an answer without tokens.
        AuditError: Logits that are not finite.
    """
    rows = [i for i, row in enumerate(questions) if row.perturbed_answers]
    if not rows:
        raise DataError("a truth ratio needs perturbed_answers; no question has any")
    pairs: list[tuple[str, str]] = []
    numbers: dict[tuple[tuple[str, str], ...], int] = {}
    cuts, references, items = [0], [], []
    for i in rows:
        asked, right, reference = _asked(questions[i])
        references.append(reference)
        own = tuple((asked, answer) for answer in (*right, *questions[i].perturbed_answers))
        items.append(numbers.setdefault(own, len(numbers)))
        pairs += own
        cuts.append(len(pairs))
    nll = _losses(model, pairs, batch_size, bos, chat)
    losses = [nll[start:end] for start, end in pairwise(cuts)]
    n_wrong = [len(questions[i].perturbed_answers) for i in rows]
    return TruthScores(
        rows=np.array(rows),
        groups=tuple(questions[i].group for i in rows),
        references=tuple(references),
        paraphrase_nll=np.array([own[:-n].mean() for own, n in zip(losses, n_wrong, strict=True)]),
        perturbed_nll=tuple(own[-n:] for own, n in zip(losses, n_wrong, strict=True)),
        items=np.array(items),
        n_without=len(questions) - len(rows),
    )


def truth(subject: Subject, name: str, limit: int | None) -> TruthScores:
    """Score (at most `limit`) questions of a set as `score_truth` does, once for all parts that need it."""
    case = subject.case

    def make() -> TruthScores:
        rows = spaced(case.sets[name], limit)
        return score_truth(subject.model, rows, batch_size=case.batch_size, bos=case.bos, chat=case.chat)

    return kept(subject, ("truth", name, limit), make)


@dataclass(frozen=True)
class Behaviour(Part):
    """ROUGE-L recall, exact memorisation, extraction strength and truth ratio of every set.

    Exact memorisation and extraction strength come from the answers that are already scored, of every question.

    Attributes:
        limit: Questions of `forget` and of `retain` for which text is generated and wrong answers are scored, evenly
            spaced; None for all.
        other_limit: The same of every other set.
        new_tokens: Longest answer that is generated, in tokens (a model that ends its answers stops earlier).
        stem: Compare Porter's stems in ROUGE-L, as TOFU's evaluation does.
    """

    limit: int | None = 100
    other_limit: int | None = 24
    new_tokens: int = 32
    stem: bool = False

    name: ClassVar[str] = "behaviour"
    title: ClassVar[str] = "what it says and prefers: ROUGE-L, memorisation, extraction strength, truth ratio"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("rouge_l", "ROUGE-L recall", share=True),
        Metric("exact_memorisation", "exact memorisation", share=True),
        Metric("extraction_strength", "extraction strength", share=True),
        Metric("truth_ratio", "truth ratio (geometric mean; below 1 prefers the truth)"),
        Metric("truth_preference", "mean of max(0, 1 - truth ratio)", share=True),
        Metric("paraphrase_probability", "probability of the paraphrase", share=True),
    )
    evidence: ClassVar[tuple[tuple[str, str], ...]] = (
        ("forget", "rouge_l"),
        ("forget", "exact_memorisation"),
        ("forget", "extraction_strength"),
        ("forget", "truth_preference"),
        ("forget", "paraphrase_probability"),
        ("unseen", "rouge_l"),
        ("unseen", "exact_memorisation"),
        ("unseen", "extraction_strength"),
        ("unseen", "truth_preference"),
    )

    def measure(self, subject: Subject) -> Measurement:
        """Measure one model on every set but those with the answer in their context."""
        numbers: list[Number] = []
        missing: list[str] = []
        references: list[dict[str, object]] = []
        for name in subject.case.sets:
            if name in _IN_CONTEXT:
                continue
            numbers += memorised(subject, name)
            for found, lacking in (self._said(subject, name), self._preferred(subject, name, references)):
                numbers += found
                missing += lacking
        tables = {"truth_references": pd.DataFrame(references)} if references else {}
        return Measurement(tuple(numbers), tables, missing=tuple(missing))

    def _limit(self, name: str) -> int | None:
        return self.limit if name in FULL_SETS else self.other_limit

    def _said(self, subject: Subject, name: str) -> tuple[list[Number], list[str]]:
        rows, said = answered(subject, name, self._limit(name), self.new_tokens)
        return rouge_number(rows, said, name, "rouge_l", "recall", self.stem)

    def _preferred(
        self, subject: Subject, name: str, references: list[dict[str, object]]
    ) -> tuple[list[Number], list[str]]:
        if not any(row.perturbed_answers for row in spaced(subject.case.sets[name], self._limit(name))):
            return [], [f"truth ratio on {name}: no perturbed answers"]
        scores = truth(subject, name, self._limit(name))
        for reference, n in Counter(scores.references).items():
            references.append({"set": name, "reference": reference, "questions": n})
        lacking = [f"truth ratio on {name}: {scores.n_without} questions without perturbed answers are left out"]
        numbers, degenerate = _truth_numbers(scores, name)
        return numbers, degenerate + (lacking if scores.n_without else [])


def memorised(subject: Subject, name: str) -> list[Number]:
    """Return exact memorisation and extraction strength of every answer of a set, already scored."""
    own = subject.answers[name]
    matched = metrics.exact_memorisation(own.argmax_right, own.n_tokens)
    strength = metrics.extraction_strength(own.last_wrong, own.n_tokens)
    return [
        Number(name, "exact_memorisation", by_group(matched, own.groups)),
        Number(name, "extraction_strength", by_group(strength, own.groups)),
    ]


def rouge_number(
    rows: Questions, said: Sequence[str], name: str, metric: str, which: str, stem: bool = False
) -> tuple[list[Number], list[str]]:
    """Return one number: the mean ROUGE-L (`which`: precision, recall or f1) of what was said against the answers.

    Answers without ASCII letters or digits, which ROUGE cannot see, are left out, and that is said.
    """
    usable = [i for i, row in enumerate(rows) if metrics.rouge_tokens(row.answer)]
    n_lost = len(rows) - len(usable)
    lost = [f"{metric} on {name}: {n_lost} answers have no ASCII letters or digits"] if n_lost else []
    if not usable:
        return [], lost
    scores = [getattr(metrics.rouge_l(said[i], rows[i].answer, stem), which) for i in usable]
    return [Number(name, metric, by_group(scores, [rows[i].group for i in usable]))], lost


def _asked(row: Question) -> tuple[str, tuple[str, ...], str]:
    """The question, its right answers and what these are, for a truth ratio."""
    if row.answer.strip() in {wrong.strip() for wrong in row.perturbed_answers}:
        raise DataError(f"question {row.id}: the right answer {row.answer!r} is among its perturbed answers")
    if row.paraphrased_answers:
        return row.question, row.paraphrased_answers, PARAPHRASED_ANSWER
    if row.paraphrases:
        return row.paraphrases[0], (row.answer,), PARAPHRASED_QUESTION
    return row.question, (row.answer,), ANSWER


def _losses(
    model: Model, pairs: Sequence[tuple[str, str]], batch_size: int, bos: bool | None, chat: bool
) -> Float[np.ndarray, " pair"]:
    """Loss per token of each answer, in nats. A pair that occurs more than once is scored once."""
    distinct = list(dict.fromkeys(pairs))
    try:
        scores = score_answers(model, distinct, batch_size=batch_size, bos=bos, chat=chat)
    except DataError:
        raise
    except ProbeError as error:
        raise AuditError(f"truth ratio: {error}") from error
    found = dict(zip(distinct, -scores.logprob_sum / scores.n_tokens, strict=True))
    return np.array([found[pair] for pair in pairs])


def _truth_numbers(scores: TruthScores, name: str) -> tuple[list[Number], list[str]]:
    ratios = scores.log_ratio
    if scores.items.max() > 0 and np.ptp(ratios) <= 1e-9 * max(1.0, float(np.abs(ratios).max())):
        return [], [f"truth ratio on {name}: it is the same for every question"]
    numbers = []
    mean = by_group(ratios, scores.groups, function=np.exp)
    with np.errstate(over="ignore"):
        finite = bool(np.isfinite(mean.value))
    if finite:
        numbers.append(Number(name, "truth_ratio", mean))
    numbers.append(Number(name, "truth_preference", by_group(metrics.truth_preference(ratios), scores.groups)))
    if ANSWER not in scores.references:  # else it is the probability that every card has
        probability = np.exp(-scores.paraphrase_nll)
        numbers.append(Number(name, "paraphrase_probability", by_group(probability, scores.groups)))
    return numbers, [] if finite else [f"truth ratio on {name}: its mean is too large for a number"]
