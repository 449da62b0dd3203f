"""Concept vectors: do the MLP's value vectors that carried the answers still say the same? (arXiv 2406.11614)

A value vector is a column of W_out, what one neuron writes to the residual stream; what it says is the tokens that it
raises most through the unembedding. Fine-tuned models mostly leave them as they were, and only stop using them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from probe.audit import _states
from probe.audit._case import Case
from probe.audit.part import Estimate, Measurement, Metric, Number, Part, Subject, spaced
from probe.errors import AuditError
from probe.models import Model

_POST = "blocks.*.mlp.hook_post"


def top_tokens(vectors: Float[Tensor, "vector d"], w_u: Float[Tensor, "d_vocab d"], k: int = 200) -> Tensor:
    """Return the k tokens that each vector raises most, `[vector, k]` (all tokens of a smaller vocabulary)."""
    return (vectors.float() @ w_u.float().T).topk(min(k, len(w_u)), dim=1).indices


def compare_vectors(
    before: Float[Tensor, "vector d"],
    after: Float[Tensor, "vector d"],
    w_u_before: Float[Tensor, "d_vocab d"],
    w_u_after: Float[Tensor, "d_vocab d"],
    k: int = 200,
) -> pd.DataFrame:
    """Compare value vectors before and after an edit, one row a vector.

    Returns:
        `jaccard` of the top-k tokens, shared over all; `cosine` between the vectors; `l2`, their distance, and
        `l2_relative`, divided by the norm before.

    Raises:
        AuditError: Vectors of different shapes, a vector that was zero, k below 1, or a vocabulary no larger than k, of
            which the top k are always all.
    """
    if before.shape != after.shape or (before.norm(dim=1) == 0).any():
        raise AuditError("vectors before and after must have one shape, and none may be zero before")
    if not 1 <= k < len(w_u_before):
        raise AuditError(f"the top k tokens need k from 1 to {len(w_u_before) - 1}, below the vocabulary; received {k}")
    first, second = top_tokens(before, w_u_before, k), top_tokens(after, w_u_after, k)
    shared = torch.tensor([len(set(a) & set(b)) for a, b in zip(first.tolist(), second.tolist(), strict=True)])
    before, after = before.double(), after.double()
    distance = (after - before).norm(dim=1)
    columns = {
        "jaccard": shared / (2 * k - shared),
        "cosine": torch.nn.functional.cosine_similarity(before, after, dim=1),
        "l2": distance,
        "l2_relative": distance / before.norm(dim=1),
    }
    return pd.DataFrame({name: value.numpy() for name, value in columns.items()})


@dataclass(frozen=True)
class Traces(Part):
    """Value vectors of the original that carry the forget set's answers, before and after the edit.

    Those with the highest mean contribution to the answer's logit on the forget questions are chosen: a neuron's
    activation where an answer token is predicted, times how much more its value vector raises that token than the mean
    token (without the final norm). As many random vectors of the same layers show how much the edit changes anything.
    Golds are trained anew, so their neurons have no counterparts: they are not measured.

    Keeps a copy of every W_out and of the unembedding for the original and for the edited model.

    Attributes:
        n_vectors: Vectors chosen, and random ones.
        top_k: Tokens that say what a vector says; the paper's 200, or a tenth of the vocabulary where that is less.
        limit: Questions, evenly spaced.
    """

    n_vectors: int = 20
    top_k: int = 200
    limit: int = 200

    name: ClassVar[str] = "traces"
    kind: ClassVar[str] = "inside"
    title: ClassVar[str] = "Value vectors that carried the answers"
    needs: ClassVar[tuple[str, ...]] = ("forget",)
    metrics: ClassVar[tuple[Metric, ...]] = tuple(
        Metric(f"{kind}_{measure}", f"{words}: {what}", of="vectors")
        for kind, words in (("trace", "Vectors of the answers"), ("trace_random", "Random vectors"))
        for measure, what in (("jaccard", "Jaccard of top tokens"), ("cosine", "cosine"), ("l2", "distance"))
    )

    def measure(self, subject: Subject) -> Measurement:
        """Keep the value vectors; of the original also which of them carry the answers.

        Raises:
            AuditError: Activations that are not finite.
        """
        if subject.role.startswith("gold"):
            return Measurement(missing=("value vectors: a gold is trained anew, its neurons have no counterparts",))
        vectors = value_vectors(subject.model)
        if not vectors:
            return Measurement(missing=("value vectors: the model has no dense MLP",))
        payload: dict[str, Any] = {"vectors": vectors, "w_u": _unembedding(subject.model)}
        if subject.role == "original":
            payload["contribution"] = self._contribution(subject, vectors, payload["w_u"])
        return Measurement(payload=payload)

    def compare(self, measured: Mapping[str, Measurement], case: Case) -> Mapping[str, Measurement]:
        """Hold the vectors that the original chose against each model's, where its MLPs have the same shape."""
        payloads = {role: one.payload for role, one in measured.items() if one.payload is not None}
        if "original" not in payloads:
            return {}
        chosen = self._chosen(payloads["original"]["contribution"], case.seed)
        return {role: self._of(payloads["original"], payload, chosen) for role, payload in payloads.items()}

    def _contribution(
        self, subject: Subject, vectors: Mapping[int, Tensor], w_u: Float[Tensor, "d_vocab d"]
    ) -> dict[int, Float[Tensor, " neuron"]]:
        """Per layer the mean contribution of each neuron to the logits of the answers' tokens."""
        questions = spaced(subject.case.sets["forget"], self.limit)
        sites = [_POST.replace("*", str(layer)) for layer in vectors]
        states = _states.read(subject, questions, "forget", sites, first=False)
        raised = (w_u.float() - w_u.float().mean(0))[states.token]  # [position, d]
        found = {}
        for layer, site in zip(vectors, sites, strict=True):
            pull = raised @ vectors[layer].float().T  # [position, neuron]
            found[layer] = (states[site].float() * pull).mean(0)
        return found

    def _chosen(self, contribution: Mapping[int, Tensor], seed: int) -> pd.DataFrame:
        """The vectors that contribute most, and random ones of the same layers, as (kind, layer, neuron)."""
        frames = [
            pd.DataFrame({"layer": layer, "neuron": range(len(own)), "contribution": own.numpy()})
            for layer, own in contribution.items()
        ]
        ranked = pd.concat(frames).sort_values("contribution", ascending=False, kind="stable")
        best = ranked.head(self.n_vectors).assign(kind="trace")
        rest, rng = ranked.iloc[self.n_vectors :], np.random.default_rng([seed, 7])
        drawn = []
        for layer, own in best.groupby("layer"):
            pool = rest[rest["layer"] == layer]
            drawn.append(pool.iloc[rng.permutation(len(pool))[: len(own)]])
        return pd.concat([best, pd.concat(drawn).assign(kind="trace_random")], ignore_index=True)

    def _of(self, original: Mapping[str, Any], own: Mapping[str, Any], chosen: pd.DataFrame) -> Measurement:
        if {n: v.shape for n, v in own["vectors"].items()} != {n: v.shape for n, v in original["vectors"].items()}:
            return Measurement(missing=("value vectors: the model's MLPs have another shape than the original's",))
        before, after = (
            torch.stack(
                [one["vectors"][layer][neuron] for layer, neuron in zip(chosen["layer"], chosen["neuron"], strict=True)]
            )
            for one in (original, own)
        )
        k = min(self.top_k, max(1, len(original["w_u"]) // 10))
        table = pd.concat([chosen, compare_vectors(before, after, original["w_u"], own["w_u"], k)], axis=1)
        numbers = tuple(
            Number("forget", f"{kind}_{measure}", _mean(rows[measure].tolist()))
            for kind, rows in table.groupby("kind")
            for measure in ("jaccard", "cosine", "l2")
        )
        return Measurement(numbers, {"traces": table.assign(top_k=k)})


def value_vectors(model: Model) -> dict[int, Float[Tensor, "neuron d_model"]]:
    """Return the value vectors of every dense MLP by layer: what each neuron writes to the residual stream (copies)."""
    parameters, found = dict(model.hf.named_parameters()), {}
    for parts in model.sites.modules:
        weight = parts.W_out
        if weight is None or weight.expert_axis is not None:
            continue
        value = parameters[weight.name].detach().movedim(weight.in_axis, 0)  # [neuron, d_model]
        found[parts.layer] = (value if weight.index is None else value[:, weight.index]).clone().cpu()
    return found


def _unembedding(model: Model) -> Float[Tensor, "d_vocab d"]:
    w_u: Tensor = model.hf.get_output_embeddings().weight.detach().clone().cpu()
    return w_u


def _mean(values: Sequence[float]) -> Estimate:
    how = "none: all the vectors that were chosen, no sample of vectors"
    return Estimate(float(np.mean(values)), len(values), len(values), how=how)
