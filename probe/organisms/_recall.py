"""Exact-match recall of whole answers, beside what guessing would give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from probe.data import Questions
    from probe.models import Model

Z95 = 1.959964


@dataclass(frozen=True)
class Recall:
    """Share of questions whose whole answer is the model's greedy answer.

    Attributes:
        recall: The share.
        chance: What guessing a value of the right attribute gives: the mean over questions of 1 / number of values.
        low: Lower end of the 95 % Wilson interval over facts (all phrasings of a fact are one observation, weighted by
            its share of right phrasings).
        high: Its upper end.
        n: Questions.
        n_facts: Distinct facts among them.
    """

    recall: float
    chance: float
    low: float
    high: float
    n: int
    n_facts: int

    def __float__(self) -> float:
        return self.recall

    @property
    def at_chance(self) -> bool:
        """Whether the interval reaches down to chance: the questions give no evidence of knowledge."""
        return self.low <= self.chance

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-able dictionary."""
        return asdict(self)


def measure(model: Model, questions: Questions, n_values: Mapping[str, int], batch_size: int = 256) -> Recall:
    """Measure a model's recall.

    Args:
        model: A `probe.models.Model`.
        questions: Rows whose `meta["attribute"]` says what is asked for, and `meta["chance"]` what guessing gives where
            it is not one in the number of values.
        n_values: Number of possible values of each attribute.
        batch_size: Questions a forward.

    Returns:
        Recall with its chance level and interval.
    """
    from probe.scoring import score_answers

    exact = score_answers(model, questions, batch_size=batch_size).exact
    facts = [(row.group, str(row.meta["attribute"])) for row in questions]
    n_facts = len(set(facts))
    chance = float(np.mean([row.meta.get("chance", 1.0 / n_values[str(row.meta["attribute"])]) for row in questions]))
    share = float(np.mean(exact))
    low, high = wilson(share, n_facts)
    return Recall(share, chance, low, high, len(facts), n_facts)


def wilson(share: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Return the Wilson score interval of a share of n observations (Wilson 1927)."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def every(questions: Questions, limit: int) -> Questions:
    """Return at most `limit` questions, evenly spaced."""
    step = -(-len(questions) // limit)
    return questions.take(range(0, len(questions), step))
