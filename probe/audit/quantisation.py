"""Quantisation: what comes back when the weights are rounded to 8 or 4 bits.

"Does your LLM truly unlearn?" (arXiv 2410.16454): an edit that moves weights by less than half a step of the grid is
rounded away with it, and the knowledge that it hid is back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from probe.audit._case import Case
from probe.audit._numbers import Metric, Number, by_group
from probe.audit.part import Measurement, Part, Subject, scratch, spaced
from probe.data import Questions
from probe.errors import AuditError, DataError, ProbeError
from probe.models import Model
from probe.scoring import AnswerScores, score_answers

__all__ = ["NF4_LEVELS", "Quantisation", "group_absmax", "nf4", "quantise_"]

# The 16 levels of 4-bit NormalFloat, QLoRA (arXiv 2305.14314), appendix E: quantiles of a normal distribution that hold
# zero exactly, eight above and seven below it, scaled to [-1, 1].
NF4_LEVELS: tuple[float, ...] = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def group_absmax(
    weight: Float[Tensor, "... out d_in"], bits: int, group: int | None = None
) -> Float[Tensor, "... out d_in"]:
    """Round each weight to the nearest of 2^bits - 1 levels, evenly spaced and symmetric about zero.

    Every group of `group` inputs of an output (all of them for None: one scale per output channel) is scaled by its
    largest magnitude over 2^(bits - 1) - 1. The last group may be shorter. Ties round to even. A group of zeros stays.

    Args:
        weight: Outputs by inputs.
        bits: 2 to 16.
        group: Inputs that share a scale.

    Raises:
        AuditError: Bits out of range, or a group smaller than 1.
    """
    if not 2 <= bits <= 16 or (group is not None and group < 1):
        raise AuditError(f"bits must be from 2 to 16 and a group at least 1; received {bits} and {group}")
    top = 2 ** (bits - 1) - 1
    blocks, d_in = _blocks(weight.float(), group)
    scale = blocks.abs().amax(-1, keepdim=True) / top
    levels = torch.where(scale > 0, blocks / scale, 0.0).round().clamp(-top, top)
    rounded: Tensor = (levels * scale).flatten(-2)[..., :d_in].to(weight.dtype)
    return rounded


def nf4(weight: Float[Tensor, "..."], block: int = 64) -> Float[Tensor, "..."]:
    """Round each weight to the nearest level of 4-bit NormalFloat, times the largest magnitude of its block.

    Blocks are runs of `block` weights in the order of memory, across rows, as in QLoRA (arXiv 2305.14314), whose block
    is 64; the scales stay in float32 (no double quantisation). A block of zeros stays.

    Raises:
        AuditError: A block smaller than 1.
    """
    if block < 1:
        raise AuditError(f"a block must hold at least 1 weight; received {block}")
    blocks, n = _blocks(weight.float().flatten(), block)
    scale = blocks.abs().amax(-1, keepdim=True)
    levels = torch.tensor(NF4_LEVELS, device=weight.device)
    edges = (levels[1:] + levels[:-1]) / 2  # between two levels the nearer one changes here
    nearest = torch.bucketize(torch.where(scale > 0, blocks / scale, 0.0), edges)
    return (levels[nearest] * scale).flatten()[:n].view_as(weight).to(weight.dtype)


def _blocks(weight: Float[Tensor, "... d"], size: int | None) -> tuple[Float[Tensor, "... block size"], int]:
    """The last axis in blocks, the last one filled up with zeros; and its length."""
    d = weight.shape[-1]
    size = min(size or d, d)
    padded = nn.functional.pad(weight, (0, -d % size))
    return padded.reshape(*padded.shape[:-1], -1, size), d


SCHEMES: dict[str, Callable[[Tensor], Tensor]] = {
    "8bit": lambda weight: group_absmax(weight, 8),
    "4bit": lambda weight: group_absmax(weight, 4, 64),
    "nf4": nf4,
}


def quantise_(hf: nn.Module, scheme: str, embeddings: bool = False) -> int:
    """Round a model's weights in place, and leave them in their own type (fake quantisation).

    What is rounded: the weights of linear layers (GPT-2's `Conv1D` too) and fused expert weights. What is not: norms,
    biases, routers that are no linear layers, and (unless asked) embeddings and the output head, as bitsandbytes does.

    Args:
        hf: The model.
        scheme: `8bit` (a scale per output channel), `4bit` (a scale per 64 inputs of one) or `nf4` (QLoRA's).
        embeddings: Round the embeddings and the output head too.

    Returns:
        How many tensors were rounded.

    Raises:
        AuditError: No such scheme, no weights to round, or weights that are not finite.
    """
    if scheme not in SCHEMES:
        raise AuditError(f"the schemes are {', '.join(SCHEMES)}; there is no {scheme!r}")
    done: set[int] = set()
    with torch.no_grad():
        for name, weight, transposed in _weights(hf, embeddings):
            if weight.data_ptr() in done:  # tied
                continue
            done.add(weight.data_ptr())
            if not torch.isfinite(weight).all():
                raise AuditError(f"{name} holds weights that are not finite; they cannot be rounded")
            view = weight.transpose(-1, -2) if transposed else weight  # [..., out, in]
            weight.copy_(_rounded(weight, view, scheme, transposed))
    if not done:
        raise AuditError("the model has no linear layer or fused experts whose weights could be rounded")
    return len(done)


def _rounded(weight: Tensor, view: Tensor, scheme: str, transposed: bool) -> Tensor:
    """NF4 follows the order of memory; the others follow output channels."""
    if scheme == "nf4":
        return SCHEMES[scheme](weight)
    rounded = SCHEMES[scheme](view)
    return rounded.transpose(-1, -2) if transposed else rounded


def _weights(hf: Any, embeddings: bool) -> Iterator[tuple[str, Tensor, bool]]:
    """Name and weight of each tensor to round, and whether it is stored as inputs by outputs."""
    from transformers.pytorch_utils import Conv1D

    ends = [hf.get_input_embeddings(), hf.get_output_embeddings()]
    kept = {end.weight.data_ptr() for end in ends if end is not None}
    for name, module in hf.named_modules():
        for own, weight in module.named_parameters(recurse=False):
            is_end = weight.data_ptr() in kept
            linear = isinstance(module, (nn.Linear, Conv1D)) and own == "weight"
            fused = weight.ndim == 3 and weight.is_floating_point() and not isinstance(module, nn.Conv1d)
            wanted = embeddings if is_end else linear or fused
            if wanted:
                crossed = isinstance(module, Conv1D) or (fused and bool(getattr(module, "is_transposed", False)))
                yield f"{name}.{own}", weight, crossed


@dataclass(frozen=True)
class Quantisation(Part):
    """Recall and probability after rounding the weights, on forget and retain questions.

    Measures, on `forget` and `retain`, for each scheme s: `quantised_s_recall` and `quantised_s_probability`. Beside
    them belong the plain ones: what rounding brings back is the difference. On retain they say what rounding itself
    costs.

    The table `quantisation` has a row per scheme and set: recall and probability, and how many tensors were rounded.

    Attributes:
        schemes: Of `8bit`, `4bit`, `nf4`; see `quantise_`.
        embeddings: Round embeddings and the output head too.
        limit: Rows of each set.
    """

    schemes: tuple[str, ...] = ("8bit", "4bit", "nf4")
    embeddings: bool = False
    limit: int | None = 128

    name: ClassVar[str] = "quantisation"
    title: ClassVar[str] = "rounding the weights to 8 and 4 bits"
    needs: ClassVar[tuple[str, ...]] = ("forget", "retain")
    metrics: ClassVar[tuple[Metric, ...]] = tuple(
        Metric(f"quantised_{scheme}_{what}", f"{what}, {label}", share=True)
        for scheme, label in {"8bit": "8 bits", "4bit": "4 bits", "nf4": "4 bits (NF4)"}.items()
        for what in ("recall", "probability")
    )
    kind: ClassVar[str] = "attack"
    evidence: ClassVar[tuple[tuple[str, str], ...]] = tuple(("forget", metric.name) for metric in metrics)

    def __post_init__(self) -> None:
        """Refuse schemes that there are not."""
        unknown = [scheme for scheme in self.schemes if scheme not in SCHEMES]
        if unknown or not self.schemes or len(set(self.schemes)) < len(self.schemes):
            raise AuditError(f"schemes must be different ones of {', '.join(SCHEMES)}; received {self.schemes}")
        if self.limit is not None and self.limit < 1:
            raise AuditError(f"limit must be at least 1; received {self.limit}")

    def measure(self, subject: Subject) -> Measurement:
        """Round a copy of the weights by each scheme in turn; the model has its own afterwards.

        Raises:
            AuditError: Nothing to round, or weights that are not finite.
        """
        numbers: list[Number] = []
        rows: list[dict[str, Any]] = []
        missing: list[str] = []
        for scheme in self.schemes:
            with scratch(subject.model) as model:
                rounded = quantise_(model.hf, scheme, self.embeddings)
                for name in self.needs:
                    questions = spaced(subject.case.sets[name], self.limit)
                    scores = _scores(model, questions, subject.case)
                    if scores is None:
                        missing.append(f"answers after rounding ({scheme}, {name}): logits are not finite")
                        continue
                    numbers += _numbers(scheme, name, scores)
                    shares = {"recall": float(scores.exact.mean()), "probability": float(scores.prob.mean())}
                    rows.append({"scheme": scheme, "set": name, **shares, "n": len(scores), "tensors": rounded})
        return Measurement(tuple(numbers), {"quantisation": pd.DataFrame(rows)}, missing=tuple(missing))


def _scores(model: Model, questions: Questions, case: Case) -> AnswerScores | None:
    """The answers of the rounded model; None where rounding has broken it."""
    try:
        return score_answers(model, questions, batch_size=case.batch_size, bos=case.bos, chat=case.chat)
    except DataError:
        raise
    except ProbeError:
        return None


def _numbers(scheme: str, name: str, scores: AnswerScores) -> list[Number]:
    recall = by_group(scores.exact, scores.groups, share=True)
    probability = by_group(scores.prob, scores.groups)
    return [
        Number(name, f"quantised_{scheme}_recall", recall),
        Number(name, f"quantised_{scheme}_probability", probability),
    ]
