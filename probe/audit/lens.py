"""The logit lens as a part of the audit: does a layer before the last still say the answer?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd

from probe.audit.part import Measurement, Metric, Number, Part, Subject, by_group, spaced
from probe.errors import AuditError, PatchError
from probe.patching import LensScores, logit_lens


@dataclass(frozen=True)
class Lens(Part):
    """Every layer's residual stream through the final norm and the unembedding (nostalgebraist, 2020).

    `lens_probability` is the mean over questions of exp(mean log p of the answer's tokens), teacher-forced, at the
    layer before the last where it is highest; `lens_rank` that of the rank of the answer's first token, at the layer
    where it is lowest. Both layers are chosen on the forget set itself and so a little too good, for golds alike; the
    interval holds the layer fixed.

    Attributes:
        limit: Questions, evenly spaced.
    """

    limit: int = 200

    name: ClassVar[str] = "lens"
    title: ClassVar[str] = "Answers read from earlier layers by the logit lens"
    needs: ClassVar[tuple[str, ...]] = ("forget",)
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("lens_probability", "Answer's probability before the last layer", share=True),
        Metric("lens_rank", "Answer's rank before the last layer"),
    )
    kind: ClassVar[str] = "inside"
    evidence: ClassVar[tuple[tuple[str, str], ...]] = (("forget", "lens_probability"),)

    def measure(self, subject: Subject) -> Measurement:
        """Read the answers from every layer.

        Raises:
            AuditError: Values that are not finite.
        """
        case, questions = subject.case, spaced(subject.case.sets["forget"], self.limit)
        try:
            scores = logit_lens(subject.model, questions, batch_size=case.batch_size, bos=case.bos, chat=case.chat)
        except PatchError as error:
            raise AuditError(f"{subject.role}, forget: {error}") from error
        tables = {"lens": _table(scores)}
        if len(scores.logprob) < 2:
            return Measurement((), tables, missing=("logit lens: the model has no layer before its last",))
        probability, rank = scores.probability()[:-1], scores.first_rank()[:-1].double()  # [layer - 1, row]
        best, lowest = int(probability.mean(1).argmax()), int(rank.mean(1).argmin())
        numbers = (
            Number("forget", "lens_probability", by_group(probability[best].numpy(), questions.groups)),
            Number("forget", "lens_rank", by_group(rank[lowest].numpy(), questions.groups)),
        )
        return Measurement(numbers, tables)


def _table(scores: LensScores) -> pd.DataFrame:
    return scores.to_df().assign(n=scores.first_rank().shape[1])
