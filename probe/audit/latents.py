"""SAE latents that tell forget questions from retain questions: do they still fire after the edit?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy.stats import rankdata
from torch import Tensor

from probe.audit import _states
from probe.audit._case import Case
from probe.audit.part import Estimate, Measurement, Metric, Number, Part, Subject, spaced
from probe.data import Questions
from probe.errors import AuditError

_ROWS = 4096  # rows encoded at a time


def separation(
    activations: Float[np.ndarray, "n latent"], positive: Bool[np.ndarray, " n"]
) -> Float[np.ndarray, " latent"]:
    """Return 2 AUC - 1 of each latent's activation: 1 if it is higher on every positive row than on any other.

    Raises:
        AuditError: Rows of one side only.
    """
    n, n_positive = len(positive), int(positive.sum())
    if n_positive in (0, n):
        raise AuditError("separation needs rows of both sets; all are of one")
    ranks = rankdata(activations, axis=0)[positive].sum(0)
    auc = (ranks - n_positive * (n_positive + 1) / 2) / (n_positive * (n - n_positive))
    found: np.ndarray = 2 * auc - 1
    return found


@dataclass(frozen=True)
class Latents(Part):
    """Activations of the latents of a given SAE that separate forget from retain, before and after the edit.

    The latents are chosen on the original, on the questions of every other person of each set; what is reported is on
    the other people. An SAE speaks the language of the model that it was trained on: golds, which are trained anew, are
    not measured.

    Attributes:
        sae: What `saes.load` returns, or anything with `encode(x [n, d]) -> [n, d_sae]`.
        site: The site that the SAE reads.
        n_latents: Latents chosen: those with the highest separation, as far as it is above 0.
        limit: Questions of each set, evenly spaced; read at the question's last token.
    """

    sae: Any = None
    site: str = ""
    n_latents: int = 10
    limit: int = 200

    name: ClassVar[str] = "sae_latents"
    kind: ClassVar[str] = "inside"
    title: ClassVar[str] = "SAE latents that tell forget from retain"
    needs: ClassVar[tuple[str, ...]] = ("forget", "retain")
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("latent_activation", "Chosen latents' mean activation", of="latents"),
        Metric("latent_kept", "Chosen latents' activation, as a share of the original's", of="latents"),
        Metric("latent_separation", "Chosen latents' separation of forget from retain (2 AUC - 1)", of="latents"),
    )

    def why_not(self, case: Case) -> str | None:
        """Say what is lacking: an SAE and its site, or a set."""
        if self.sae is None or not self.site:
            return f"{self.title} (needs an SAE and its site: Latents(sae, site))"
        return super().why_not(case)

    def measure(self, subject: Subject) -> Measurement:
        """Encode the subject's states.

        Raises:
            AuditError: States or activations that are not finite, or an SAE of another width than the site.
            SiteError: A site that the model does not have.
        """
        if subject.role.startswith("gold"):
            return Measurement(missing=("latents: the SAE is of the original; a gold is trained anew",))
        if other := _states.other_sizes(subject):
            return Measurement(missing=(f"latents: the SAE is of the original, and {other}",))
        sets = {name: spaced(subject.case.sets[name], self.limit) for name in ("forget", "retain")}
        states = {name: _states.read(subject, rows, name, self.site)[self.site] for name, rows in sets.items()}
        return Measurement(payload={name: self._encoded(value, subject) for name, value in states.items()})

    def compare(self, measured: Mapping[str, Measurement], case: Case) -> Mapping[str, Measurement]:
        """Choose latents on the original and report them on every model."""
        payloads = {role: one.payload for role, one in measured.items() if one.payload is not None}
        if "original" not in payloads:
            return {}
        sets = {name: spaced(case.sets[name], self.limit) for name in ("forget", "retain")}
        sides = {name: _every_other(rows) for name, rows in sets.items()}
        if any(side.all() or not side.any() for side in sides.values()):
            missing = ("latents: two people or more of each set are needed, to choose on some and report on others",)
            return {role: Measurement(missing=missing) for role in payloads}
        scores = _separations(payloads["original"], sides)
        chosen = np.argsort(-scores, kind="stable")[: self.n_latents]
        chosen = chosen[scores[chosen] > 0]
        if len(chosen) == 0:
            missing = ("latents: none is higher on forget than on retain questions in the original",)
            return {role: Measurement(missing=missing) for role in payloads}
        held_out = {name: ~side for name, side in sides.items()}
        original = payloads["original"]["forget"][held_out["forget"]][:, chosen].mean(0)
        people = len({g for g, own in zip(sets["forget"].groups, held_out["forget"], strict=True) if own})
        return {
            role: self._of(payload, chosen, original, held_out, scores, people) for role, payload in payloads.items()
        }

    def _of(
        self,
        payload: Mapping[str, np.ndarray],
        chosen: np.ndarray,
        original: np.ndarray,
        held_out: Mapping[str, np.ndarray],
        scores: np.ndarray,
        people: int,
    ) -> Measurement:
        forget, retain = (payload[name][held_out[name]][:, chosen] for name in ("forget", "retain"))
        separations = _separations({"forget": forget, "retain": retain})
        columns = {"latent": chosen, "chosen_by": scores[chosen], "forget": forget.mean(0), "retain": retain.mean(0)}
        table = pd.DataFrame({**columns, "separation": separations, "original": original})
        how = "none: the chosen latents, no sample of latents"
        values = {"latent_activation": forget.mean(), "latent_separation": separations.mean()}
        missing: tuple[str, ...] = ()
        if original.sum() > 0:
            values["latent_kept"] = forget.mean(0).sum() / original.sum()
        else:
            missing = ("latents: those that were chosen are silent on the other forget people of the original",)
        numbers = tuple(
            Number("forget", m, Estimate(float(v), len(chosen), people, how=how)) for m, v in values.items()
        )
        return Measurement(numbers, {"latents": table}, missing=missing)

    @torch.no_grad()
    def _encoded(self, states: Float[Tensor, "n d"], subject: Subject) -> Float[np.ndarray, "n d_sae"]:
        where, dtype = getattr(self.sae, "device", "cpu"), getattr(self.sae, "dtype", torch.float32)
        try:
            found = torch.cat([self.sae.encode(part.to(where, dtype)).cpu() for part in states.split(_ROWS)])
        except RuntimeError as error:
            wide = states.shape[1]
            raise AuditError(f"the SAE must read {self.site}, of width {wide}; encoding failed: {error}") from error
        if found.ndim != 2 or not torch.isfinite(found).all():
            raise AuditError(f"{subject.role}: the SAE's activations must be finite, [row, latent]")
        return found.float().numpy()


def _every_other(questions: Questions) -> Bool[np.ndarray, " row"]:
    """Whether a row's person is one of every other."""
    first = set(list(dict.fromkeys(questions.groups))[::2])
    return np.array([group in first for group in questions.groups])


def _separations(
    activations: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray] | None = None
) -> Float[np.ndarray, " latent"]:
    parts = {name: value if rows is None else value[rows[name]] for name, value in activations.items()}
    positive = np.repeat([True, False], [len(parts["forget"]), len(parts["retain"])])
    return separation(np.concatenate([parts["forget"], parts["retain"]]), positive)
