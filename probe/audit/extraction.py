"""Extraction, inference and reconstruction of what was to be forgotten.

The three attacks on personal data of Lukas et al. (arXiv 2302.00539), in the form that questions allow: extraction lets
the model continue a prefix; inference gives it the candidates and asks which is the likeliest; reconstruction takes the
person's name out of a sentence and asks which candidate makes the whole sentence likeliest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
from jaxtyping import Float

from probe.audit._case import Case
from probe.audit.membership import loss, token_stats
from probe.audit.part import Measurement, Metric, Number, Part, Subject, by_group, spaced
from probe.data import Question, Questions
from probe.errors import DataError
from probe.models import Model
from probe.scoring import score_answers

__all__ = ["Extraction", "above_chance", "extracted_in", "gaps", "hits"]


def extracted_in(logprob_sum: Float[np.ndarray, " row"], n: int) -> Float[np.ndarray, " row"]:
    """Probability that at least one of `n` samples at temperature 1 begins with the continuation: 1 - (1 - p)^n.

    Probabilistic discoverable extraction (Hayes et al., arXiv 2410.19482); p = exp(logprob_sum) is the continuation's
    probability, so nothing is sampled.
    """
    if n < 1:
        raise DataError(f"at least one sample is needed; received n={n}")
    p = np.minimum(np.exp(np.asarray(logprob_sum, dtype=float)), 1.0)
    with np.errstate(divide="ignore"):
        chance: np.ndarray = -np.expm1(n * np.log1p(-p))
    return chance


def hits(scores: Sequence[Float[np.ndarray, " candidate"]]) -> Float[np.ndarray, " row"]:
    """Per row 1 if the first candidate has the highest score, 0 if not; a tie of m candidates for the top counts 1/m.

    Raises:
        DataError: A row with fewer than two candidates, or a score that is no number.
    """
    found = []
    for row in scores:
        if len(row) < 2 or np.isnan(row).any():
            raise DataError("each row needs at least two candidates with scores that are numbers")
        best = np.flatnonzero(row == np.max(row))
        found.append((1 / len(best)) if 0 in best else 0.0)
    return np.array(found)


def above_chance(hit: Float[np.ndarray, " row"], n_candidates: Sequence[int]) -> Float[np.ndarray, " row"]:
    """(hit - 1/n) / (1 - 1/n) per row: mean 0 for a guess among n, 1 for always right."""
    chance = 1 / np.asarray(n_candidates, dtype=float)
    scaled: np.ndarray = (hit - chance) / (1 - chance)
    return scaled


def gaps(
    questions: Questions, known: Questions, n_candidates: int, seed: int
) -> list[tuple[Question, tuple[str, ...]]]:
    """The rows that name their group, each with the names that may fill the gap, the true one first.

    Candidates are other groups of `known`, drawn with the seed, whose own answer to the same question is another one: a
    sentence that is also true of a candidate has no right filling. Rows without a candidate are left out.

    Args:
        questions: Rows to take the name out of.
        known: Where candidates and their answers come from.
        n_candidates: Candidates a row, the true one included.
        seed: Of the draw.
    """
    names, rng = sorted(set(known.groups)), np.random.default_rng(seed)
    answers = {(row.group, row.question.replace(row.group, "\0")): row.answer for row in known}
    found = []
    for row in questions:
        frame = row.question.replace(row.group, "\0")
        if "\0" not in frame:
            continue
        others = [n for n in names if n != row.group and answers.get((n, frame)) != row.answer]
        if others:
            drawn = rng.choice(len(others), min(n_candidates - 1, len(others)), replace=False)
            found.append((row, (row.group, *(others[i] for i in drawn))))
    return found


@dataclass(frozen=True)
class Extraction(Part):
    """Three attacks on the forget set.

    - extracted: share of questions whose answer greedy decoding gives verbatim (discoverable extraction, Carlini et
      al., arXiv 2202.07646, with the question as the prefix, or with the first `prefix` of the text's tokens);
    - extracted_in_n: expected share of which at least one of `n` samples gives it, in closed form (arXiv 2410.19482);
    - inferred: the right answer has a higher probability per token than each perturbed one; 0 is chance, 1 always;
    - reconstructed: with the person's name taken out of `question + " " + answer`, the right name makes the whole
      sentence likeliest per token, among `n_candidates` people of the same set; 0 is chance, 1 always.

    Attributes:
        n: Samples.
        n_candidates: Names that may fill the gap.
        prefix: Share of a text's tokens that is given; None gives the question.
        limit: Questions, evenly spaced.
    """

    n: int = 100
    n_candidates: int = 4
    prefix: float | None = None
    limit: int = 64

    name: ClassVar[str] = "extraction"
    title: ClassVar[str] = "whether the facts can be extracted, inferred or reconstructed"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("extracted", "extracted verbatim, greedy", share=True),
        Metric("extracted_in_n", "extracted in n samples (n in the table)", share=True),
        Metric("inferred", "inferred among candidates (0 is chance)"),
        Metric("reconstructed", "name reconstructed (0 is chance)"),
    )
    kind: ClassVar[str] = "attack"
    evidence: ClassVar[tuple[tuple[str, str], ...]] = (
        ("forget", "extracted_in_n"),
        ("forget", "inferred"),
        ("forget", "reconstructed"),
    )

    def measure(self, subject: Subject) -> Measurement:
        """Run the three attacks; the table `extraction` has a row a question (`n` is the number of samples)."""
        case, rows = subject.case, spaced(subject.case.sets["forget"], self.limit)
        extracted, in_n = self._extract(subject.model, rows, case)
        numbers = [
            Number("forget", "extracted", by_group(extracted, rows.groups, share=True)),
            Number("forget", "extracted_in_n", by_group(in_n, rows.groups)),
        ]
        table = pd.DataFrame({"id": [r.id for r in rows], "extracted": extracted, "extracted_in_n": in_n, "n": self.n})
        missing = []
        for metric, attack in (("inferred", self._infer), ("reconstructed", self._reconstruct)):
            options, scores = attack(subject.model, rows, case)
            if not options:
                why = (
                    "no perturbed answers" if metric == "inferred" else "no question names its group, or one group only"
                )
                missing.append(f"{metric}: {why}")
                continue
            values = above_chance(hits(scores), [len(one) for one in scores])
            numbers.append(Number("forget", metric, by_group(values, [row.group for row in options])))
            table = table.merge(pd.DataFrame({"id": [r.id for r in options], metric: hits(scores)}), "left", "id")
        return Measurement(tuple(numbers), {"extraction": table}, missing=tuple(missing))

    def _extract(self, model: Model, rows: Questions, case: Case) -> tuple[np.ndarray, np.ndarray]:
        """Whether greedy decoding gives the rest of each text, and the chance that one of n samples does."""
        scores = score_answers(model, self._cut(model, rows), batch_size=case.batch_size, bos=case.bos, chat=case.chat)
        return scores.exact.astype(float), extracted_in(scores.logprob_sum, self.n)

    def _cut(self, model: Model, rows: Questions) -> list[tuple[str, str]]:
        """(prefix, rest) of each text; with `prefix` at the word where that share of the text's words ends."""
        if self.prefix is None:
            return [(row.question, row.answer) for row in rows]
        if not 0 < self.prefix < 1:
            raise DataError(f"prefix must be a share between 0 and 1; received {self.prefix}")
        words = [f"{row.question} {row.answer}".split() for row in rows]
        at = [min(max(1, int(len(one) * self.prefix)), len(one) - 1) for one in words]
        return [(" ".join(one[:cut]), " ".join(one[cut:])) for one, cut in zip(words, at, strict=True)]

    def _infer(self, model: Model, rows: Questions, case: Case) -> tuple[list[Question], list[np.ndarray]]:
        options = [row for row in rows if set(row.perturbed_answers) - {row.answer}]
        pairs = [[(r.question, a) for a in (r.answer, *sorted({*r.perturbed_answers} - {r.answer}))] for r in options]
        if not options:
            return [], []
        flat = [pair for one in pairs for pair in one]
        scores = score_answers(model, flat, batch_size=case.batch_size, bos=case.bos, chat=case.chat)
        return options, _split(scores.logprob_sum / scores.n_tokens, pairs)

    def _reconstruct(self, model: Model, rows: Questions, case: Case) -> tuple[list[Question], list[np.ndarray]]:
        made = gaps(rows, case.sets["forget"], self.n_candidates, case.seed)
        if not made:
            return [], []
        lines = [[f"{row.question} {row.answer}".replace(row.group, name) for name in names] for row, names in made]
        flat = [line for one in lines for line in one]
        stats = token_stats(model, flat, batch_size=case.batch_size, bos=case.bos)
        return [row for row, _ in made], _split(-loss(stats.logprob), lines)


def _split(flat: np.ndarray, like: Sequence[Sequence[object]]) -> list[np.ndarray]:
    return np.split(flat, np.cumsum([len(one) for one in like])[:-1])
