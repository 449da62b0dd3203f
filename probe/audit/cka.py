"""Linear CKA between models' hidden states (Kornblith et al., arXiv 1905.00414).

Similar states are no sign that a fact is still there, nor are others a sign that it is gone: held against models whose
answer is known, CKA is one of the least faithful measures (AUC .648, arXiv 2605.24614). So it is no evidence here; it
says how much of the whole representation an edit has moved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from probe.audit import _states
from probe.audit._case import Case
from probe.audit.part import Estimate, Measurement, Metric, Number, Part, Subject, spaced
from probe.errors import AuditError

_SETS = ("forget", "retain")


def linear_cka(x: Float[Tensor, "n d"], y: Float[Tensor, "n e"], weights: Float[Tensor, "n"] | None = None) -> float:
    """Return the linear centred kernel alignment of two representations of the same rows.

    CKA = |Y'X|_F^2 / (|X'X|_F |Y'Y|_F) with centred columns, from 0 to 1. It does not change when either is rotated,
    scaled or shifted.

    Args:
        x: One representation.
        y: The other; its width may differ.
        weights: How often each row counts; once by default.

    Raises:
        AuditError: Fewer than two rows, not the same rows, values that are not finite, or a representation that is the
            same for all rows.
    """
    if len(x) != len(y) or len(x) < 2:
        raise AuditError(f"CKA needs two representations of the same rows, at least 2; received {len(x)} and {len(y)}")
    x, y = x.double(), y.double()
    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise AuditError("CKA needs finite values; some are NaN or infinite")
    share = torch.ones(len(x), dtype=torch.float64) if weights is None else weights.double()
    share = (share / share.sum())[:, None]
    a, b = ((v - (share * v).sum(0)) * share.sqrt() for v in (x, y))
    sizes = [(v.T @ v).norm() if v.shape[1] < len(v) else (v @ v.T).norm() for v in (a, b)]
    floor = [1e-12 * v.square().sum(1).mean() for v in (x, y)]
    if any(size <= least for size, least in zip(sizes, floor, strict=True)):
        raise AuditError("CKA needs states that differ between rows; these are the same for all of them")
    return float((b.T @ a).square().sum() / (sizes[0] * sizes[1]))


@dataclass(frozen=True)
class Cka(Part):
    """Linear CKA of a model's states with the original's and the golds', at the last token of the question.

    Numbers are means over the layers (and over the golds; a gold is held against the others). Their intervals are a
    bootstrap over people.

    Attributes:
        limit: Questions of each set, evenly spaced.
        n_boot: Bootstrap replicates; 0 for no intervals.
    """

    limit: int = 200
    n_boot: int = 100

    name: ClassVar[str] = "cka"
    title: ClassVar[str] = "Similarity of hidden states (linear CKA)"
    needs: ClassVar[tuple[str, ...]] = ("forget", "retain")
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("cka_original", "CKA with the original's states"),
        Metric("cka_gold", "CKA with golds' states"),
    )

    def measure(self, subject: Subject) -> Measurement:
        """Keep the subject's states.

        Raises:
            AuditError: States that are not finite.
        """
        sets = {name: spaced(subject.case.sets[name], self.limit) for name in _SETS}
        return Measurement(payload={name: _states.read(subject, rows, name).values for name, rows in sets.items()})

    def compare(self, measured: Mapping[str, Measurement], case: Case) -> Mapping[str, Measurement]:
        """Hold every model's states against the original's and the golds'."""
        states = {role: one.payload for role, one in measured.items() if one.payload is not None}
        golds = [role for role in states if role.startswith("gold")]
        return {role: self._of(role, states, golds, case) for role in states}

    def _of(
        self, role: str, states: Mapping[str, Mapping[str, Mapping[str, Tensor]]], golds: Sequence[str], case: Case
    ) -> Measurement:
        numbers, records, missing = [], [], []
        against = {"cka_original": ["original"], "cka_gold": _states.others(role, golds)}
        for name in _SETS:
            people = spaced(case.sets[name], self.limit).groups
            for metric, roles in against.items():
                references = [states[other][name] for other in roles if other in states]
                try:
                    found = self._numbers(states[role][name], references, people, case.seed)
                except AuditError as error:
                    missing.append(f"{metric} on {name}: {error}")
                    continue
                if found is not None:
                    numbers.append(Number(name, metric, found[0]))
                    records += [{"set": name, "metric": metric, "layer": i, "cka": v} for i, v in enumerate(found[1])]
        return Measurement(tuple(numbers), {"cka": pd.DataFrame.from_records(records)}, missing=tuple(missing))

    def _numbers(
        self, own: Mapping[str, Tensor], references: Sequence[Mapping[str, Tensor]], people: Sequence[str], seed: int
    ) -> tuple[Estimate, list[float]] | None:
        """The mean over layers with its interval, and each layer's value."""
        if not references:
            return None
        layers = _layers(own, references, None)
        codes = np.unique(people, return_inverse=True)[1]
        n_groups = int(codes.max()) + 1
        if not self.n_boot or n_groups < 2:
            return Estimate(
                float(np.mean(layers)), len(people), n_groups, how="none: one group or no bootstrap"
            ), layers
        counts = np.random.default_rng(seed).multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=self.n_boot)
        draws = [
            np.mean(_layers(own, references, torch.from_numpy(row[codes]))) for row in counts if (row > 0).sum() > 1
        ]
        low, high = np.quantile(draws, [0.025, 0.975])
        how = "95 %, bootstrap over groups"
        return Estimate(float(np.mean(layers)), len(people), n_groups, float(low), float(high), how), layers


def _layers(
    own: Mapping[str, Tensor], references: Sequence[Mapping[str, Tensor]], weights: Tensor | None
) -> list[float]:
    """CKA of each layer, the mean over the references."""
    for other in references:
        if list(other) != list(own):
            raise AuditError("CKA is taken layer by layer; the models have different layers")
    return [float(np.mean([linear_cka(own[site], other[site], weights) for other in references])) for site in own]
