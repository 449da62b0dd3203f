"""Unlearning depth score: is the answer gone from the hidden states, or only from the output?

The subject's hidden states are put into the original model, layer by layer; where the original can no longer say the
answer from them, the answer is not in them (UDS, arXiv 2605.24614).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from probe.audit import _states
from probe.audit._case import Case
from probe.audit.part import Measurement, Metric, Number, Part, Subject, by_group, spaced
from probe.errors import AuditError, PatchError
from probe.patching import AnswerStates, patched_logprobs

Drops = Float[np.ndarray, "*row layer"]


def uds(d1: Drops, d2: Drops, threshold: float = 0.05) -> Float[np.ndarray, "*row"]:
    """Return the unlearning depth score, UDS = sum_l d1 clip(d2 / d1, 0, 1) / sum_l d1 over layers with d1 > threshold.

    Args:
        d1: What the answer's log-probability loses, in nats a token, when layer l's states come from a model that never
            knew it (the retain model).
        d2: The same for the unlearned model's states.
        threshold: Layers below it do not carry the answer and are left out.

    Returns:
        0 where the answer is as much in the states as in the original's, 1 where it is as absent as from the retain
        model's; NaN where no layer is above the threshold.

    Raises:
        AuditError: Arrays of different shapes, or a threshold below 0.
    """
    d1, d2 = np.asarray(d1, dtype=float), np.asarray(d2, dtype=float)
    if d1.shape != d2.shape or threshold < 0:
        raise AuditError(f"UDS needs drops of one shape and a threshold from 0; received {d1.shape} and {d2.shape}")
    kept = d1 > threshold
    lost = np.where(kept, np.clip(d2, 0, d1), 0.0).sum(-1)  # d1 clip(d2 / d1, 0, 1) with d1 > 0
    total = np.where(kept, d1, 0.0).sum(-1)
    return np.divide(lost, total, out=np.full(total.shape, np.nan), where=total > 0)


@dataclass(frozen=True)
class UDS(Part):
    """How much of the answers is gone from the hidden states, from 0 (all there) to 1 (as gone as from a gold).

    States are exchanged at the positions that predict the answer's tokens; everything before them stays the original's
    own. A question's reference d1 is the mean over the golds; a gold itself is held against the other golds. Questions
    without a layer above the threshold under one of these references are left out for all models.

    Attributes:
        threshold: In nats a token.
        limit: Questions, evenly spaced.
    """

    threshold: float = 0.05
    limit: int = 160

    name: ClassVar[str] = "uds"
    title: ClassVar[str] = "Unlearning depth: hidden states put into the original"
    needs: ClassVar[tuple[str, ...]] = ("forget", "gold")
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("uds", "Unlearning depth score", share=True),
        Metric("uds_retained", "Answer left in hidden states (1 - UDS)", share=True),
    )
    kind: ClassVar[str] = "inside"
    evidence: ClassVar[tuple[tuple[str, str], ...]] = (("forget", "uds_retained"),)

    def measure(self, subject: Subject) -> Measurement:
        """Keep the subject's states for `compare`, when the original has its own weights.

        An edited model of other layers than the original's cannot be measured.

        Raises:
            AuditError: States that are not finite.
        """
        if other := _states.other_sizes(subject):
            return Measurement(missing=(f"UDS: {other}",))
        questions = spaced(subject.case.sets["forget"], self.limit)
        return Measurement(payload=_states.read(subject, questions, "forget", first=False))

    def compare(self, measured: Mapping[str, Measurement], case: Case) -> Mapping[str, Measurement]:
        """Put every model's states into the original.

        Raises:
            AuditError: A gold with other layers, another width or another tokenizer than the original.
        """
        states = {role: one.payload for role, one in measured.items() if one.payload is not None}
        golds = [role for role in states if role.startswith("gold")]
        if "original" not in states or not golds:
            return {}
        own = states["original"]
        base = patched_logprobs(case.original, own, batch_size=case.batch_size)
        drops = {role: _drops(case, role, one, own, base) for role, one in states.items() if role != "original"}
        # a model's own states change nothing
        drops["original"] = np.zeros_like(drops[golds[0]])
        people = spaced(case.sets["forget"], self.limit).groups
        return {role: self._of(role, drops, golds, people, list(own.values)) for role in states}

    def _of(
        self, role: str, drops: Mapping[str, Drops], golds: Sequence[str], people: Sequence[str], sites: Sequence[str]
    ) -> Measurement:
        """One model's numbers and its layers."""
        reference = _reference(role, drops, golds)
        if reference is None:
            return Measurement(missing=(f"UDS of {role}: it is the only gold, so there is none to hold it against",))
        references = [one for one in (_reference(r, drops, golds) for r in drops) if one is not None]
        usable = np.flatnonzero(np.all([(one > self.threshold).any(1) for one in references], axis=0))
        if len(usable) == 0:
            why = f"no layer of a gold takes more than {self.threshold} nats from the original's answers"
            return Measurement(missing=(f"UDS: {why}",))
        scores = uds(reference[usable], drops[role][usable], self.threshold)
        groups = [people[int(i)] for i in usable]
        numbers = (
            Number("forget", "uds", by_group(scores, groups)),
            Number("forget", "uds_retained", by_group(1 - scores, groups)),
        )
        dropped = len(people) - len(usable)
        note = f"UDS: {dropped} of {len(people)} questions, which no layer's states change"
        table = self._table(reference[usable], drops[role][usable], sites)
        return Measurement(numbers, {"uds": table}, missing=(note,) if dropped else ())

    def _table(self, d1: Drops, d2: Drops, sites: Sequence[str]) -> pd.DataFrame:
        """One row a layer: mean drops, questions that count, and the layer's own share."""
        kept = d1 > self.threshold
        lost, total = np.where(kept, np.clip(d2, 0, d1), 0).sum(0), np.where(kept, d1, 0).sum(0)
        share = np.divide(lost, total, out=np.full(len(sites), np.nan), where=total > 0)
        columns = {"d1": d1.mean(0), "d2": d2.mean(0), "n": kept.sum(0), "uds": share}
        return pd.DataFrame({"layer": range(len(sites)), "site": sites, **columns})


def _reference(role: str, drops: Mapping[str, Drops], golds: Sequence[str]) -> Drops | None:
    """Mean drops of the golds that a model is held against; None for the only gold."""
    chosen = [drops[gold] for gold in _states.others(role, golds)]
    return np.mean(chosen, axis=0) if chosen else None


def _drops(case: Case, role: str, states: AnswerStates, own: AnswerStates, base: torch.Tensor) -> Drops:
    """What each answer's mean log-probability a token loses in the original, `[row, layer]`."""
    if states.rows != own.rows or list(states.values) != list(own.values):
        raise AuditError(f"UDS puts {role}'s states into the original: both need the same layers and tokenizer")
    counts = torch.bincount(own.row)
    found = []
    for site in states.values:
        try:
            patched = patched_logprobs(case.original, states, site, batch_size=case.batch_size)
        except PatchError as error:
            raise AuditError(f"{role}: {error}") from error
        lost = (base - patched).double()
        found.append(torch.zeros(len(counts)).double().index_add_(0, own.row, lost) / counts)
    return torch.stack(found, dim=1).numpy()
