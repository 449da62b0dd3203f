"""A universal soft prompt: vectors that no text gives, learned on some people, tried on others.

Embedding-space attacks (Schwinn et al., "Soft Prompt Threats", arXiv 2402.09063) optimise input vectors. Tuned on a
question they can elicit anything from any model, known or not (arXiv 2502.15836), and so say nothing about it. What is
counted here is therefore only what a prompt learned on some people's answers brings back of other people, and gold's
own figure belongs beside it: a prompt can also teach what forget people have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probe.audit._case import Case
from probe.audit._finetune import _batches
from probe.audit._numbers import Metric, Number, by_group
from probe.audit._worst import worst_case
from probe.audit.latent import frozen, tokens
from probe.audit.part import Measurement, Part, Subject, people, spaced
from probe.data import Questions, split_groups
from probe.errors import AuditError
from probe.models import Model, pad
from probe.scoring import AnswerTokens, eval_mode

__all__ = ["Embedding", "halves", "prompt_losses", "tune_prompt"]


def halves(questions: Questions, seed: int = 0) -> tuple[Questions, Questions]:
    """Rows of half of the groups, and those of the others.

    Raises:
        DataError: Fewer than two groups.
    """
    parts = split_groups(questions.groups, {"tune": 0.5, "test": 0.5}, seed)
    return questions.take(parts["tune"]), questions.take(parts["test"])


def prompt_losses(
    model: Model, rows: Sequence[AnswerTokens], prompt: Float[Tensor, "n d_model"]
) -> tuple[Float[Tensor, " row"], Bool[Tensor, " row"]]:
    """Put a soft prompt between each question and its answer.

    Args:
        model: The model.
        rows: Questions with their answers.
        prompt: Input vectors; none of them (n = 0) is the plain model.

    Returns:
        Mean loss per answer token of each row, in nats, and whether each of its tokens is the argmax.
    """
    batch = pad([row.input_ids for row in rows], model.pad_id, device=model.device)
    embed = model.hf.get_input_embeddings()(batch["input_ids"])  # [batch, pos, d_model]
    n, own = len(prompt), prompt.to(embed.dtype)
    whole = [torch.cat([embed[i, : row.start], own, embed[i, row.start :]]) for i, row in enumerate(rows)]
    mask = torch.cat([batch["attention_mask"].new_ones(len(rows), n), batch["attention_mask"]], 1)
    logits = model.hf(inputs_embeds=torch.stack(whole), attention_mask=mask, use_cache=False).logits
    where = [(i, t) for i, row in enumerate(rows) for t in range(row.start, len(row.input_ids))]
    row, position = torch.tensor(where, device=logits.device).T  # [answer tokens] each
    picked, target = logits[row, position + n - 1].float(), batch["input_ids"][row, position]
    nats = torch.nn.functional.cross_entropy(picked, target, reduction="none")
    count = torch.bincount(row, minlength=len(rows))
    wrong = torch.zeros_like(count).index_add(0, row, (picked.argmax(-1) != target).long())
    return nats.new_zeros(len(rows)).index_add(0, row, nats) / count, wrong == 0


def tune_prompt(
    model: Model,
    rows: Sequence[AnswerTokens],
    n_tokens: int,
    *,
    steps: int,
    lr: float,
    batch_size: int = 16,
    seed: int = 0,
    eval_at: Sequence[int] = (),
    on_eval: Callable[[int, Tensor], None] | None = None,
) -> Float[Tensor, "n d_model"]:
    """Learn one soft prompt for all rows: Adam on the mean answer loss, from embeddings of tokens drawn at random.

    Args:
        model: The model; its weights get no gradient and are not changed.
        rows: What to learn on.
        n_tokens: Vectors.
        steps: Steps.
        lr: Learning rate, relative to the spread (standard deviation) of the embedding's entries.
        batch_size: Rows a step.
        seed: Of the start and the order of rows.
        eval_at: Steps after which `on_eval` is called with the step and the prompt.
        on_eval: See `eval_at`.

    Raises:
        AuditError: A loss that is not finite.
    """
    table = model.hf.get_input_embeddings().weight.detach().float()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(table), (n_tokens,), generator=generator)
    prompt: Tensor = table[drawn.to(table.device)].clone().requires_grad_()
    optimiser = torch.optim.Adam([prompt], lr=lr * float(table.std()))
    with frozen(model), eval_mode(model.hf), torch.enable_grad():
        for step, batch in zip(range(1, steps + 1), _batches(rows, batch_size, seed), strict=False):
            loss = prompt_losses(model, batch, prompt)[0].mean()
            if not torch.isfinite(loss):
                raise AuditError(f"the loss of the soft prompt is not finite at step {step}: check the weights")
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            if on_eval is not None and step in eval_at:
                on_eval(step, prompt.detach())
    return prompt.detach()


@dataclass(frozen=True)
class Embedding(Part):
    """Recall of some forget people under a soft prompt that was learned on the other ones.

    Measures, on `forget` (the people of the test half), the largest over lengths and steps:
        soft_prompt_recall.

    The table `embedding` has a row per length and step: recall on the people tuned on and on the others.

    Attributes:
        lengths: Vectors of the prompt.
        eval_at: Steps after which is tested; the last is where a run ends. After 60 steps a prompt does not yet bring
            back what an organism only hides.
        lr: Learning rate, relative to the spread of the embedding's entries.
        batch_size: Rows a step.
        limit: Rows of each half.
    """

    lengths: tuple[int, ...] = (1, 4, 16)
    eval_at: tuple[int, ...] = (20, 60, 150)
    lr: float = 0.3
    batch_size: int = 16
    limit: int | None = 64

    name: ClassVar[str] = "embedding"
    title: ClassVar[str] = "a soft prompt learned on other forget people"
    needs: ClassVar[tuple[str, ...]] = ("forget",)
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("soft_prompt_recall", "recall under a soft prompt learned on others, worst case", share=True),
    )
    kind: ClassVar[str] = "attack"
    evidence: ClassVar[tuple[tuple[str, str], ...]] = (("forget", "soft_prompt_recall"),)

    def __post_init__(self) -> None:
        """Refuse settings with which no prompt is learned."""
        if not self.lengths or min(self.lengths) < 1:
            raise AuditError(f"lengths must be at least 1; received {self.lengths}")
        grows = all(a < b for a, b in zip(self.eval_at, self.eval_at[1:], strict=False))
        if not self.eval_at or self.eval_at[0] < 1 or not grows:
            raise AuditError(f"eval_at must be steps from 1 on that grow; received {self.eval_at}")
        if not self.lr > 0 or self.batch_size < 1 or (self.limit is not None and self.limit < 1):
            raise AuditError(
                f"lr, batch_size and limit must be positive; received {self.lr}, {self.batch_size}, {self.limit}"
            )

    def why_not(self, case: Case) -> str | None:
        """Say why this cannot be measured: one group cannot be on both sides."""
        if reason := super().why_not(case):
            return reason
        return f"{self.title} (needs two forget {case.people})" if people(case.sets["forget"]) < 2 else None

    def measure(self, subject: Subject) -> Measurement:
        """Learn a prompt of each length and try it; the model is not changed.

        Raises:
            DataError: A forget set of one group.
            AuditError: A loss that is not finite, a prompt that does not fit into the context.
        """
        case, model = subject.case, subject.model
        tune, test = (spaced(part, self.limit) for part in halves(case.sets["forget"], case.seed))
        seen, unseen = (tokens(model, rows, case) for rows in (tune, test))
        _check_room(model, [*seen, *unseen], max(self.lengths))
        found: list[tuple[dict[str, Any], np.ndarray]] = []
        for length in self.lengths:

            def look(step: int, prompt: Tensor, length: int = length) -> None:
                known = _right(model, seen, prompt, case.batch_size)
                right = _right(model, unseen, prompt, case.batch_size)
                record = {"length": length, "step": step, "tuned_recall": known.mean(), "recall": right.mean()}
                found.append((record, right))

            how: dict[str, Any] = {"lr": self.lr, "batch_size": self.batch_size, "seed": case.seed}
            tune_prompt(model, seen, length, steps=self.eval_at[-1], eval_at=self.eval_at, on_eval=look, **how)
        ratios = [by_group(right, test.groups, share=True) for _, right in found]
        worst = worst_case(ratios, len(test), n_boot=case.n_boot, seed=case.seed, people=case.people)[1]
        table = pd.DataFrame([record for record, _ in found])
        return Measurement((Number("forget", "soft_prompt_recall", worst),), {"embedding": table}, payload=table)


def _check_room(model: Model, rows: Sequence[AnswerTokens], length: int) -> None:
    longest = max(len(row.input_ids) for row in rows)
    if longest + length > model.dims.n_ctx:
        raise AuditError(f"{longest} tokens and {length} vectors do not fit into a context of {model.dims.n_ctx}")


@torch.no_grad()
def _right(
    model: Model, rows: Sequence[AnswerTokens], prompt: Float[Tensor, "n d_model"], batch_size: int
) -> Bool[np.ndarray, " row"]:
    with eval_mode(model.hf):
        parts = [prompt_losses(model, rows[i : i + batch_size], prompt)[1] for i in range(0, len(rows), batch_size)]
    return torch.cat(parts).cpu().numpy()
