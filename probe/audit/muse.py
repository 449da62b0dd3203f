"""MUSE's four numbers (arXiv 2407.06460): verbatim and knowledge memory, utility, and leakage of membership."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from jaxtyping import Float

from probe._stats import auc
from probe.audit import metrics
from probe.audit._generation import answered, continuations
from probe.audit._numbers import Estimate
from probe.audit.behaviour import rouge_number
from probe.audit.membership import min_k
from probe.audit.part import Measurement, Metric, Number, Part, Subject, by_group, spaced
from probe.errors import AuditError
from probe.scoring import answer_tokens

__all__ = ["Muse", "member_scores", "membership_auc"]


@dataclass(frozen=True)
class Muse(Part):
    """Verbatim memory, knowledge memory, utility preservation and privacy leakage.

    - verbatim memory: ROUGE-L F1 of what the model says after the beginning of a forget text (`question answer`)
      against how the text goes on, both of the same number of tokens, at most `new_tokens`;
    - knowledge memory: ROUGE-L F1 of its answers to the forget questions, of at most `answer_tokens` tokens;
    - utility preservation: the same of retain;
    - privacy leakage: how far from gold's the AUC is with which Min-k % of the answers' tokens ranks forget above
      holdout, in per cent: near -100 for a model that knows the forget set, 0 for one like gold; see
      `probe.audit.metrics.privacy_leakage`. It is relative to the mean AUC of the golds; a gold is judged against the
      others. Needs `holdout` and gold. (Metrics `membership_*_auc` are turned round: 1 where members are told apart.)

    Attributes:
        limit: Questions a set for what is generated, evenly spaced; None for all.
        prefix: Share of a text's tokens that the model is given of it. A question of a dozen tokens says only in its
            last words who is asked about, so a smaller share would ask for what nobody can know.
        prefix_tokens: How many tokens it is given at most.
        new_tokens: Longest continuation, in tokens.
        answer_tokens: Longest answer, in tokens.
        k: Share of the tokens that Min-k looks at.
    """

    limit: int | None = 100
    prefix: float = 0.75
    prefix_tokens: int = 200
    new_tokens: int = 128
    answer_tokens: int = 32
    k: float = 0.4

    name: ClassVar[str] = "muse"
    title: ClassVar[str] = "MUSE's memory, utility and privacy leakage"
    needs: ClassVar[tuple[str, ...]] = ("forget", "retain")
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("verbatim_memory", "verbatim memory (ROUGE-L F1)", share=True, of="texts"),
        Metric("knowledge_memory", "knowledge memory (ROUGE-L F1)", share=True),
        Metric("utility_preservation", "utility preservation (ROUGE-L F1)", share=True),
        Metric("privacy_leakage", "privacy leakage against gold", unit="%"),
    )
    evidence: ClassVar[tuple[tuple[str, str], ...]] = (("forget", "verbatim_memory"), ("forget", "knowledge_memory"))

    def measure(self, subject: Subject) -> Measurement:
        """Measure what is said; keep the membership scores for `compare`."""
        numbers, missing = self._verbatim(subject)
        for name, metric in (("forget", "knowledge_memory"), ("retain", "utility_preservation")):
            rows, said = answered(subject, name, self.limit, self.answer_tokens)
            found, lacking = rouge_number(rows, said, name, metric, "f1")
            numbers, missing = numbers + found, missing + lacking
        payload = None
        if subject.case.has("holdout"):
            payload = {name: member_scores(subject, name, self.k) for name in ("forget", "holdout")}
        return Measurement(tuple(numbers), payload=payload, missing=tuple(missing))

    def compare(self, measured: Mapping[str, Measurement], case: Any) -> Mapping[str, Measurement]:
        """Set every model's AUC against gold's."""
        aucs: dict[str, float] = {}
        found: dict[str, Measurement] = {}
        for role, one in measured.items():
            try:
                if one.payload is None:
                    raise AuditError("no holdout")
                aucs[role] = membership_auc(one.payload["forget"], one.payload["holdout"])
            except AuditError as error:
                found[role] = Measurement(missing=(f"privacy leakage of {role}: {error}",))
        size = [len(case.sets[name]) for name in ("forget", "holdout") if case.has(name)]
        groups = {g for name in ("forget", "holdout") if case.has(name) for g in case.sets[name].groups}
        return found | {role: _leakage(role, aucs, sum(size), len(groups)) for role in aucs}

    def _verbatim(self, subject: Subject) -> tuple[list[Number], list[str]]:
        case, model = subject.case, subject.model
        rows = spaced(case.sets["forget"], self.limit)
        tokens = answer_tokens(model, [(row.question, row.answer) for row in rows], bos=case.bos, chat=case.chat)
        ids = [list(one.input_ids) for one in tokens]
        cuts = [min(max(1, int(len(own) * self.prefix)), self.prefix_tokens) for own in ids]
        wanted = [own[cut : cut + self.new_tokens] for own, cut in zip(ids, cuts, strict=True)]
        prompts = [own[:cut] for own, cut in zip(ids, cuts, strict=True)]
        longest = max(len(one) for one in wanted)
        said = continuations(model, prompts, longest, batch_size=case.batch_size)
        decode = model.tokenizer.decode
        scores, groups = [], []
        for row, made, true in zip(rows, said, wanted, strict=True):
            reference = decode(true, skip_special_tokens=True)
            if metrics.rouge_tokens(reference):
                said_text = decode(made[: len(true)], skip_special_tokens=True)
                scores.append(metrics.rouge_l(said_text, reference).f1)
                groups.append(row.group)
        n_lost = len(rows) - len(scores)
        lost = [f"verbatim memory: {n_lost} texts go on without ASCII letters or digits"] if n_lost else []
        return ([Number("forget", "verbatim_memory", by_group(scores, groups))] if scores else []), lost


def member_scores(subject: Subject, name: str, k: float = 0.4) -> Float[np.ndarray, " row"]:
    """Return minus Min-k of each answer of a set, already scored: low for what was trained on."""
    return min_k(subject.answers[name].token_logprobs, k)


def membership_auc(forget: Float[np.ndarray, " row"], holdout: Float[np.ndarray, " row"]) -> float:
    """Return the share of (forget, holdout) pairs in which the forget row has the higher score; ties count half.

    This is MUSE's AUC: forget is the positive class and the score is low for members, so a model that knows the forget
    set is near 0. (The membership part's AUCs, `membership_*_auc`, are turned round: 1 where members are told apart.)

    Raises:
        AuditError: An empty side, scores that are not finite, or scores that are all the same.
    """
    if len(forget) == 0 or len(holdout) == 0:
        raise AuditError("an AUC needs rows of forget and of holdout")
    scores = np.concatenate([forget, holdout])
    if not np.isfinite(scores).all():
        raise AuditError("the membership scores are not finite")
    if np.ptp(scores) <= 1e-9 * max(1.0, float(np.abs(scores).max())):
        raise AuditError("every answer has the same membership score")
    return auc(scores, np.repeat([1, 0], [len(forget), len(holdout)]))


def _leakage(role: str, aucs: Mapping[str, float], n: int, n_groups: int) -> Measurement:
    golds = [aucs[gold] for gold in aucs if gold.startswith("gold") and gold != role]
    if not golds:
        return Measurement(missing=(f"privacy leakage of {role}: there is no (other) gold to compare it with",))
    mean = float(np.mean(golds))
    if mean == 0:
        return Measurement(missing=(f"privacy leakage of {role}: gold's AUC is 0, to which nothing is relative",))
    each = [metrics.privacy_leakage(aucs[role], gold) for gold in golds if gold > 0]
    value = metrics.privacy_leakage(aucs[role], mean)
    how = f"lowest to highest of {len(golds)} golds" if len(each) > 1 else "none: one gold"
    ends = (min(each), max(each)) if len(each) > 1 else (float("nan"), float("nan"))
    table = pd.DataFrame([{"auc": aucs[role], "auc_gold": mean, "privacy_leakage": value}])
    estimate = Estimate(value, n, n_groups, *ends, how=how)
    return Measurement((Number("forget", "privacy_leakage", estimate),), {"privacy_leakage": table})
