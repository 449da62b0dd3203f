"""Latent search: is there a small change of the residual stream at which the model gives the answer?

Latent adversarial attacks (arXiv 2407.15549) search a ball about the hidden states. In a large enough ball every answer
can be had, known or not. So each search for the right answer is held against a search for a wrong one, from the same
question and in the same ball; only what the right one has ahead of it counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from activations_cache import sites
from probe.audit._case import Case
from probe.audit._numbers import Metric, Number, by_group
from probe.audit._worst import worst_case
from probe.audit.part import Measurement, Part, Subject, spaced
from probe.data import Question, Questions
from probe.errors import AuditError
from probe.models import Model, pad
from probe.scoring import AnswerTokens, answer_tokens, eval_mode

__all__ = ["Latent", "project", "search", "wrong_answers"]


def project(delta: Float[Tensor, "... d"], radius: Float[Tensor, "..."]) -> Float[Tensor, "... d"]:
    """The nearest point of the L2 ball of each vector's radius."""
    norm = delta.norm(dim=-1)
    shrunk: Tensor = delta * (radius / norm.clamp_min(1e-30)).clamp_max(1.0)[..., None]
    return shrunk


def search(
    model: Model,
    rows: Sequence[AnswerTokens],
    layer: int,
    epsilon: float,
    *,
    steps: int = 16,
    lr: float = 0.05,
) -> Bool[np.ndarray, " row"]:
    """Search the residual stream after a block for a change with which each answer is given.

    A change is added at every token before the answer; at each of them its L2 norm is at most `epsilon` times that of
    the hidden state there. It is found by projected gradient descent on the answer's mean loss per token (Adam, its
    unit the hidden state's norm), from 0, each row for itself.

    Args:
        model: The model; its weights get no gradient and are not changed.
        rows: Questions with the answers to search for.
        layer: Block after which the stream is changed.
        epsilon: Radius, relative to the norm of the hidden state; with 0 nothing is changed.
        steps: Steps of the descent.
        lr: Learning rate of Adam.

    Returns:
        Whether every token of the answer was the argmax after some step (the start counts too).
    """
    batch = pad([row.input_ids for row in rows], model.pad_id, device=model.device)
    open_ = torch.zeros_like(batch["input_ids"], dtype=torch.bool)  # [batch, pos]
    for i, row in enumerate(rows):
        open_[i, : row.start] = True
    task = _Task(model, rows, batch, f"blocks.{layer}.hook_resid_post", open_)
    with frozen(model), eval_mode(model.hf):
        return task.descend(epsilon, steps, lr)


@dataclass
class _Task:
    """One batch of searches."""

    model: Model
    rows: Sequence[AnswerTokens]
    batch: dict[str, Tensor]
    site: str
    open: Bool[Tensor, "batch pos"]

    def descend(self, epsilon: float, steps: int, lr: float) -> Bool[np.ndarray, " row"]:
        with torch.no_grad():
            hidden = sites.run(self.model.hf, self.batch, read=self.site).values[self.site]
        norm = hidden.float().norm(dim=-1) * self.open  # [batch, pos]
        unit = torch.zeros_like(hidden, dtype=torch.float32).requires_grad_()
        optimiser = torch.optim.Adam([unit], lr=lr)
        found, right = self._forward((unit * norm[..., None]).to(hidden.dtype))
        for _ in range(steps if epsilon > 0 else 0):
            optimiser.zero_grad()
            torch.autograd.backward(found)
            optimiser.step()
            with torch.no_grad():
                unit.copy_(project(unit, torch.full_like(norm, epsilon)))
            found, now = self._forward((unit * norm[..., None]).to(hidden.dtype))
            right |= now
        return right

    def _forward(self, delta: Float[Tensor, "batch pos d"]) -> tuple[Float[Tensor, ""], Bool[np.ndarray, " row"]]:
        """Sum over rows of the mean loss, and which rows are right, with `delta` added."""
        with torch.enable_grad(), sites.hooked(self.model.hf, {self.site: lambda value, site: value + delta}):
            logits = self.model.hf(**self.batch, use_cache=False).logits
        where = [(i, t) for i, row in enumerate(self.rows) for t in range(row.start, len(row.input_ids))]
        row, position = torch.tensor(where, device=logits.device).T  # [answer tokens] each
        picked, target = logits[row, position - 1].float(), self.batch["input_ids"][row, position]
        nats = torch.nn.functional.cross_entropy(picked, target, reduction="none")
        count = torch.bincount(row, minlength=len(self.rows))
        wrong = torch.zeros_like(count).index_add(0, row, (picked.argmax(-1) != target).long())
        return (nats / count[row]).sum(), (wrong == 0).cpu().numpy()


@contextmanager
def frozen(model: Model) -> Iterator[None]:
    """No gradients for the weights inside the block."""
    flags = {parameter: parameter.requires_grad for parameter in model.hf.parameters()}
    for parameter in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def wrong_answers(questions: Questions, seed: int = 0) -> list[str | None]:
    """Draw a wrong answer for each row: one of its perturbed answers, else an answer of another row that differs.

    None where there is no other answer.
    """
    rng = np.random.default_rng(seed)
    answers = list(dict.fromkeys(row.answer for row in questions))
    return [_wrong(row, answers, rng) for row in questions]


def _wrong(row: Question, answers: Sequence[str], rng: np.random.Generator) -> str | None:
    others = [one for one in row.perturbed_answers or answers if one.strip().lower() != row.answer.strip().lower()]
    return others[int(rng.integers(len(others)))] if others else None


@dataclass(frozen=True)
class Latent(Part):
    """Latent search for right answers, held against the same search for wrong ones, over layers and radii.

    Measures, on `forget`, each the largest over layers and radii:
        latent_advantage: Share of questions whose right answer is found less the share whose wrong one is.
        latent_recall: Share of questions whose right answer is found, at the layer and radius of `latent_advantage`.

    The table `latent` has a row per layer and radius: right, wrong, advantage.

    Attributes:
        depths: Where the stream is changed, as shares of the blocks: 0 after the first, 1 after the last but one.
        epsilons: Radii relative to the norm of each token's hidden state. The source's 2 is an absolute norm, for one
            model; a relative one fits any.
        steps: Of the descent (16 in the source).
        lr: Of the descent (5e-2 in the source).
        limit: Questions.
    """

    depths: tuple[float, ...] = (0.0, 0.5)
    epsilons: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8)
    steps: int = 16
    lr: float = 0.05
    limit: int | None = 48

    name: ClassVar[str] = "latent"
    title: ClassVar[str] = "a search in the hidden states"
    needs: ClassVar[tuple[str, ...]] = ("forget",)
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("latent_advantage", "latent search, right answers less wrong ones, worst case"),
        Metric("latent_recall", "latent search, right answers found", share=True),
    )
    kind: ClassVar[str] = "attack"
    evidence: ClassVar[tuple[tuple[str, str], ...]] = (("forget", "latent_advantage"),)

    def __post_init__(self) -> None:
        """Refuse settings with which nothing is searched."""
        if not self.depths or any(not 0 <= share <= 1 for share in self.depths):
            raise AuditError(f"depths must be shares from 0 to 1; received {self.depths}")
        if not self.epsilons or any(not (math.isfinite(e) and e > 0) for e in self.epsilons):
            raise AuditError(f"epsilons must be positive; received {self.epsilons}")
        if self.steps < 1 or not self.lr > 0 or (self.limit is not None and self.limit < 1):
            raise AuditError(f"steps, lr and limit must be positive; received {self.steps}, {self.lr}, {self.limit}")

    def why_not(self, case: Case) -> str | None:
        """Say why this cannot be measured: no row has a wrong answer to hold the right one against."""
        if reason := super().why_not(case):
            return reason
        none = not any(wrong_answers(case.sets["forget"], case.seed))
        return f"{self.title} (no wrong answers: all answers are alike)" if none else None

    def measure(self, subject: Subject) -> Measurement:
        """Search for right and for wrong answers; the model is not changed.

        Raises:
            AuditError: A forget set without wrong answers, hidden states that are not finite.
        """
        case, model = subject.case, subject.model
        chosen, wrong = self._rows(case)
        right, control = (tokens(model, rows, case) for rows in (chosen, wrong))
        settings: list[dict[str, Any]] = []
        hits: list[np.ndarray] = []
        misses: list[np.ndarray] = []
        for setting in self._settings(model):
            settings.append(setting)
            for rows, found in ((right, hits), (control, misses)):
                found.append(self._search(model, rows, case, **setting))
        ahead = [by_group(hit.astype(float) - miss, chosen.groups) for hit, miss in zip(hits, misses, strict=True)]
        index, worst = worst_case(ahead, len(chosen), n_boot=case.n_boot, seed=case.seed, people=case.people)
        recall = by_group(hits[index], chosen.groups, share=True)
        table = pd.DataFrame(
            {**setting, "right": hit.mean(), "wrong": miss.mean(), "advantage": hit.mean() - miss.mean()}
            for setting, hit, miss in zip(settings, hits, misses, strict=True)
        )
        numbers = (Number("forget", "latent_advantage", worst), Number("forget", "latent_recall", recall))
        return Measurement(numbers, {"latent": table}, payload=table)

    def _rows(self, case: Case) -> tuple[Questions, Questions]:
        """Questions with right answers, and the same with wrong ones."""
        forget = case.sets["forget"]
        drawn = wrong_answers(forget, case.seed)
        kept = [i for i, answer in enumerate(drawn) if answer]
        if not kept:
            raise AuditError("a latent search needs wrong answers to compare with; all answers of forget are alike")
        pairs = Questions(replace(forget[i], meta={"wrong": drawn[i]}) for i in kept)
        chosen = spaced(pairs, self.limit)
        return chosen, Questions(replace(row, answer=str(row.meta["wrong"])) for row in chosen)

    def _settings(self, model: Model) -> Iterator[dict[str, Any]]:
        last = max(model.dims.n_layers - 2, 0)
        for layer in dict.fromkeys(round(depth * last) for depth in self.depths):
            for epsilon in self.epsilons:
                yield {"layer": layer, "epsilon": epsilon}

    def _search(
        self, model: Model, rows: Sequence[AnswerTokens], case: Case, layer: int, epsilon: float
    ) -> Bool[np.ndarray, " row"]:
        size = case.batch_size
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        found = [search(model, part, layer, epsilon, steps=self.steps, lr=self.lr) for part in parts]
        return np.concatenate(found)


def tokens(model: Model, rows: Questions, case: Case) -> list[AnswerTokens]:
    """Questions with their answers as the model reads them."""
    return answer_tokens(model, [(row.question, row.answer) for row in rows], bos=case.bos, chat=case.chat)
