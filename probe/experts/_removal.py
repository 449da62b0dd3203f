"""Switch experts off at run time and measure what the model still answers, beside random experts of the same layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from activations_cache import sites
from activations_cache.sites import Site
from probe._means import group_means
from probe.data import Questions
from probe.errors import ExpertError
from probe.experts.routing import routing_sites
from probe.scoring import AnswerScores, score_answers
from probe.targets import Experts, Scores

if TYPE_CHECKING:
    from probe.models import Model

__all__ = ["removal", "without"]


@contextmanager
def without(model: Model, experts: Experts) -> Iterator[None]:
    """While active, the model routes as if these experts were not there.

    Their router logits are set to minus infinity before the top k are chosen, so that each token goes to the best of
    those left, with the weights that the router gives them. That a removed expert never takes part is checked in every
    forward.

    Args:
        model: The model.
        experts: What to switch off.

    Raises:
        ExpertError: A dense model; an expert or layer that is not there; fewer experts left than a token needs; a
            router that chooses a removed expert all the same (one that does not rank its experts by their logits).
    """
    _check(model, experts)
    functions: dict[str, Any] = {}
    for layer, gone in experts.by_layer().items():
        off = _Off(gone)
        functions[f"blocks.{layer}.mlp.hook_router_logits"] = off.logits
        functions[f"blocks.{layer}.mlp.hook_expert_indices"] = off.indices
        functions[f"blocks.{layer}.mlp.hook_expert_weights"] = off.weights
    with sites.hooked(model.hf, functions):
        yield


def removal(
    model: Model,
    experts: Experts | Scores,
    evaluate: Mapping[str, Questions],
    *,
    k: int = 1,
    n_random: int = 3,
    seed: int = 0,
    batch_size: int = 64,
    bos: bool | None = None,
    n_boot: int = 1000,
    progress: bool = True,
) -> pd.DataFrame:
    """Remove experts at run time, measure every question set, and do the same with random experts.

    Args:
        model: A mixture of experts.
        experts: The experts, or `Scores` of which the best `k` are taken.
        evaluate: Name to questions. Use questions that did not choose the experts.
        k: How many of the `Scores`.
        n_random: Random twins: as many other experts of the same layers. Fewer where there are not so many choices.
        seed: Of the random twins and the bootstrap.
        batch_size: Questions per forward.
        bos: As in `score_answers`.
        n_boot: Bootstrap replicates over the questions' groups.
        progress: Show a bar.

    Returns:
        A row per arm and set: arm ("intact", "removed", "random"), draw (number of the random twin, else 0), experts
        ("layer.expert" joined by spaces), set; prob (p(a) of TOFU) and recall (all answer tokens are the argmax), each
        with low and high (95 %); prob_change and recall_change against the intact model on the same questions, with
        low and high; load_forget (summed score column `forget` of the removed experts where `Scores` were given: what
        the removed experts carried); n (questions).

    Raises:
        ExpertError: As `without`; no question set.
    """
    if not evaluate:
        raise ExpertError("removal needs at least one question set in evaluate={name: questions}")
    load = _loads(experts)
    target = _target(experts, k)
    _check(model, target)
    arms = [("removed", 0, target), *(("random", i, twin) for i, twin in enumerate(_twins(target, n_random, seed)))]
    rows = []
    with tqdm(total=(1 + len(arms)) * len(evaluate), desc="removal", disable=not progress) as bar:
        for name, questions in evaluate.items():
            intact = score_answers(model, questions, batch_size=batch_size, bos=bos)
            found = [_Arm("intact", 0, None, intact)]
            bar.update()
            for arm, draw, chosen in arms:
                with without(model, chosen):
                    found.append(
                        _Arm(arm, draw, chosen, score_answers(model, questions, batch_size=batch_size, bos=bos))
                    )
                bar.update()
            rows += [{"set": name, **one.row(intact, load, n_boot, seed)} for one in found]
    order = ["arm", "draw", "experts", "set"]
    frame = pd.DataFrame(rows)
    return frame[[*order, *(column for column in frame if column not in order)]]


@dataclass(frozen=True)
class _Arm:
    """One condition on one question set."""

    name: str
    draw: int
    experts: Experts | None
    scores: AnswerScores

    def row(
        self, intact: AnswerScores, load: Mapping[tuple[int, int], float], n_boot: int, seed: int
    ) -> dict[str, Any]:
        values = self._values(self.scores)
        # [question, prob recall prob_change recall_change]
        got = group_means(
            np.concatenate([values, values - self._values(intact)], axis=1),
            self.scores.groups,
            n_boot=n_boot,
            seed=seed,
        )
        index = self.experts.index if self.experts else ()
        row: dict[str, Any] = {
            "arm": self.name, "draw": self.draw, "experts": " ".join(f"{layer}.{expert}" for layer, expert in index),
        }  # fmt: skip
        for i, column in enumerate(("prob", "recall", "prob_change", "recall_change")):
            row |= {column: got.mean[i], f"{column}_low": got.low[i], f"{column}_high": got.high[i]}
        row["load_forget"] = sum(load[pair] for pair in index) if load else np.nan
        return row | {"n": len(self.scores)}

    @staticmethod
    def _values(scores: AnswerScores) -> Float[np.ndarray, "question 2"]:
        return np.stack([scores.prob, scores.exact.astype(float)], axis=1)


def _target(experts: Experts | Scores, k: int) -> Experts:
    target = experts.top(k) if isinstance(experts, Scores) else experts
    if not isinstance(target, Experts):
        raise ExpertError(f"removal needs Experts, or Scores of kind 'expert'; got {type(target).__name__}")
    return target


def _loads(experts: Experts | Scores) -> dict[tuple[int, int], float]:
    """Statistic of each expert on the forget set, where scores say it."""
    if not isinstance(experts, Scores) or "forget" not in experts.table or "expert" not in experts.table:
        return {}
    table = experts.table
    return dict(zip(zip(table["layer"], table["expert"], strict=True), table["forget"], strict=True))


def _twins(target: Experts, n: int, seed: int) -> list[Experts]:
    """Up to `n` different random twins."""
    distinct: dict[tuple[tuple[int, int], ...], Experts] = {}
    for twin in target.random_twins(8 * n, seed=seed):
        distinct.setdefault(twin.index, twin)
    distinct.pop(target.index, None)
    return list(distinct.values())[:n]


def _check(model: Model, experts: Experts) -> None:
    """Raise unless the model has these experts and can do without them."""
    catalogue = model.sites
    names = routing_sites(catalogue, None, type(model.hf).__name__)
    n_experts, top_k = catalogue.dims.n_experts or 0, catalogue.dims.top_k or 1
    with_experts = {catalogue[name].layer for name in names}
    for layer, gone in experts.by_layer().items():
        if layer not in with_experts:
            raise ExpertError(f"layer {layer} has no experts; those with experts are {sorted(with_experts, key=str)}")
        if max(gone) >= n_experts:
            raise ExpertError(f"expert {max(gone)} of layer {layer} is out of range: a layer has {n_experts} experts")
        if n_experts - len(gone) < top_k:
            raise ExpertError(
                f"removing {len(gone)} of the {n_experts} experts of layer {layer} leaves {n_experts - len(gone)}, but "
                f"each token needs {top_k}"
            )


class _Off:
    """Three hooks of one layer: mask the logits of removed experts, then check what the router made of it.

    A removed expert may still be named in the top k, at weight 0, where the softmax underflows for all that are left:
    no harm. It must not carry weight, and must not take the place of an expert that has a chance.
    """

    def __init__(self, gone: list[int]) -> None:
        self.gone = gone
        self.masked = self.index = torch.empty(0)

    def logits(self, value: Float[Tensor, "batch pos n_experts"], _: Site) -> Tensor:
        gone = torch.tensor(self.gone, device=value.device)
        self.masked = value.index_fill(-1, gone, float("-inf"))
        return self.masked

    def indices(self, value: Int[Tensor, "batch pos top_k"], _: Site) -> None:
        self.index = value

    def weights(self, value: Float[Tensor, "batch pos top_k"], site: Site) -> None:
        named = torch.isin(self.index, torch.tensor(self.gone, device=value.device))  # [batch, pos, top_k]
        if not named.any():
            return
        spare = self.masked.float().softmax(-1).scatter(-1, self.index, 0.0)  # chance of those not chosen
        displaced = named.any(-1) & (spare > 0).any(-1)  # [batch, pos]
        if displaced.any() or (value[named] != 0).any():
            raise ExpertError(
                f"the router before {site.name} chose a removed expert although its logit is -inf: it ranks experts by "
                "more than their logits (a selection bias), so they cannot be switched off in this way"
            )
