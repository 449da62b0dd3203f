"""Fine-tuning on unrelated text: what comes back without anybody teaching it.

An edit that only hides something is easily undone by training on anything else: shown for harmless data by Qi et al.
(arXiv 2310.03693) and for unlearning by Łucki et al. (arXiv 2409.18025).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from probe.audit._case import Case
from probe.audit._numbers import Metric
from probe.audit._swept import Sweep, measurement, metrics
from probe.audit.part import Measurement, Part, Subject, spaced, texts
from probe.errors import AuditError, DataError
from probe.models import Model
from probe.scoring import AnswerTokens

__all__ = ["Unrelated", "text_rows"]

SOURCES = ("corpus", "retain")


def text_rows(model: Model, given: Iterable[str], bos: bool | None = None) -> list[AnswerTokens]:
    """Texts as rows for language modelling: every token but the first is predicted.

    Longer texts are cut to the context; those of one token are left out.

    Raises:
        DataError: No text has two tokens.
    """
    ids = [model.tokens(text, bos=bos, overflow="truncate")["input_ids"][0].tolist() for text in given]
    rows = [AnswerTokens(tuple(own), 1) for own in ids if len(own) > 1]
    if not rows:
        raise DataError("language modelling needs a text of at least two tokens; received none")
    return rows


@dataclass(frozen=True)
class Unrelated(Part):
    """Recall of the forget set while the model is trained on text that has nothing to do with it.

    Plain language modelling (every token is predicted) on the corpus, and on the retain questions with their answers
    as text. Every run starts from the model's own weights; AdamW, constant learning rate.

    Measures, on `forget` the largest over all sources, learning rates and steps, on `retain` what is left there:
        unrelated_recall, unrelated_probability.

    The table `unrelated` has a row per source, learning rate and step.

    Attributes:
        sources: Of `corpus` (where the case has one) and `retain`.
        lrs: Learning rates; 1e-5 is usual for models of 10^9 weights, the defaults suit organisms.
        eval_at: Steps after which is tested; the last is where a run ends.
        batch_size: Texts a step.
        n_texts: Texts of each source.
        limit: Rows of each set that are scored.
    """

    sources: tuple[str, ...] = SOURCES
    lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    eval_at: tuple[int, ...] = (10, 30, 60)
    batch_size: int = 16
    n_texts: int | None = 512
    limit: int | None = 128

    name: ClassVar[str] = "unrelated"
    title: ClassVar[str] = "fine-tuning on unrelated text"
    needs: ClassVar[tuple[str, ...]] = ("forget", "retain")
    metrics: ClassVar[tuple[Metric, ...]] = metrics("unrelated", "after fine-tuning on unrelated text")
    kind: ClassVar[str] = "attack"
    evidence: ClassVar[tuple[tuple[str, str], ...]] = tuple(("forget", metric.name) for metric in metrics)

    def __post_init__(self) -> None:
        """Refuse settings with which nothing is trained."""
        if not self.sources or any(source not in SOURCES for source in self.sources):
            raise AuditError(f"sources must be of {', '.join(SOURCES)}; received {self.sources}")
        self._sweep.check()

    @property
    def _sweep(self) -> Sweep:
        return Sweep(self.lrs, self.eval_at, self.batch_size, self.limit)

    def why_not(self, case: Case) -> str | None:
        """Say why this cannot be measured: no sets, or no source."""
        if reason := super().why_not(case):
            return reason
        return None if self._given(case) else f"{self.title} (needs corpus)"

    def _given(self, case: Case) -> list[str]:
        return [source for source in self.sources if source != "corpus" or case.has("corpus")]

    def measure(self, subject: Subject) -> Measurement:
        """Run every attack on a copy of the weights; the model has its own afterwards.

        Raises:
            DataError: Texts without tokens.
            AuditError: A loss that is not finite from the first.
        """
        case, missing = subject.case, list[str]()
        arms = {}
        for source in self._given(case):
            found = case.corpus if source == "corpus" else texts(spaced(case.sets["retain"], self.n_texts))
            arms[source] = text_rows(subject.model, found[: self.n_texts], case.bos)
        points = list(self._sweep.points(subject, arms, missing))
        return measurement("unrelated", "unrelated", points, case, missing)
