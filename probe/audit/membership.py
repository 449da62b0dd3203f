"""Membership inference: can texts that were trained on be told from texts of the same kind that never were?

One sign for every score here: low means member, and the forget set is the positive class. So an AUC above 0.5 says that
the model still favours the forget texts, and a model that never saw them is at the AUC of gold, which need not be 0.5:
the two sets may differ in more than membership.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from probe import _stats
from probe.audit._case import Case
from probe.audit.part import Estimate, Measurement, Metric, Number, Part, Subject, spaced, texts
from probe.errors import AuditError, DataError
from probe.models import Model, pad
from probe.scoring import eval_mode

__all__ = [
    "Membership",
    "TokenStats",
    "auc_estimate",
    "gradient_norm",
    "loss",
    "min_k",
    "min_k_plus_plus",
    "reference",
    "token_stats",
    "tpr_at_fpr",
    "zlib_ratio",
]

PerToken = Sequence[Float[np.ndarray, " token"]]
_FLAT = 1e-6  # smallest spread of log p over the vocabulary that a z-score is taken of


@dataclass(frozen=True)
class TokenStats:
    """Per text and predicted token, in nats.

    Attributes:
        logprob: log p(token | tokens before it).
        mean: Mean of log p over the vocabulary, under p itself: minus the entropy.
        std: Standard deviation of log p over the vocabulary, under p.
    """

    logprob: tuple[Float[np.ndarray, " token"], ...]
    mean: tuple[Float[np.ndarray, " token"], ...]
    std: tuple[Float[np.ndarray, " token"], ...]


def token_stats(model: Model, lines: Sequence[str], *, batch_size: int = 64, bos: bool | None = None) -> TokenStats:
    """Read each text and keep what the scores need; the first token of a text is never predicted.

    Raises:
        DataError: No text, or one without a token to predict.
        AuditError: Logits that are not finite.
    """
    ids = _token_ids(model, lines, bos)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found: dict[int, Float[np.ndarray, "3 token"]] = {}
    with torch.no_grad(), eval_mode(model.hf):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            stats = _batch_stats(model, [ids[i] for i in rows])  # [3, batch, pos]
            found |= {row: stats[:, i, : len(ids[row]) - 1] for i, row in enumerate(rows)}
    columns = [tuple(found[i][kind] for i in range(len(ids))) for kind in range(3)]
    return TokenStats(*columns)


def _token_ids(model: Model, lines: Sequence[str], bos: bool | None) -> list[list[int]]:
    if not lines:
        raise DataError("membership scores need at least one text; received none")
    batch = model.tokens(list(lines), bos=bos, device="cpu")
    ids: list[list[int]] = [
        row[keep.bool()].tolist() for row, keep in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    short = [line for line, row in zip(lines, ids, strict=True) if len(row) < 2]
    if short:
        raise DataError(f"every text needs at least two tokens, so that one is predicted; {short[0]!r} has fewer")
    return ids


def _batch_stats(model: Model, rows: Sequence[Sequence[int]]) -> Float[np.ndarray, "3 batch pos"]:
    batch = pad(rows, model.pad_id, device=str(model.device))
    ids, mask = batch["input_ids"], batch["attention_mask"]  # [batch, pos]
    logits = model.hf(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    if not torch.isfinite(logits[mask[:, 1:].to(logits.device).bool()]).all():
        raise AuditError("the model's logits are not finite; check its weights and its dtype")
    logp = logits.log_softmax(-1)  # [batch, pos - 1, d_vocab]
    p = logp.exp()
    mean = (p * logp).sum(-1)
    std = (p * (logp - mean[..., None]).square()).sum(-1).sqrt()
    own = logp.gather(-1, ids[:, 1:, None].to(logp.device))[..., 0]
    stats: np.ndarray = torch.stack([own, mean, std]).double().cpu().numpy()
    return stats


def loss(logprobs: PerToken) -> Float[np.ndarray, " text"]:
    """Mean negative log-probability per token, in nats (Yeom et al. 2018, arXiv 1709.01604). Low: member."""
    return np.array([-np.mean(row) for row in _checked(logprobs)])


def zlib_ratio(logprobs: PerToken, lines: Sequence[str]) -> Float[np.ndarray, " text"]:
    """Summed negative log-probability over the text's zlib-compressed length in bytes. Low: member.

    Carlini et al. 2021 (arXiv 2012.07805): a text that is likely because it repeats itself also compresses well.
    """
    nats = np.array([-np.sum(row) for row in _checked(logprobs)])
    lengths = np.array([len(zlib.compress(line.encode())) for line in lines])
    if len(nats) != len(lengths):
        raise DataError(f"one text for each row of log-probabilities is needed; received {len(lengths)}, {len(nats)}")
    ratio: np.ndarray = nats / lengths
    return ratio


def min_k(logprobs: PerToken, k: float = 0.4) -> Float[np.ndarray, " text"]:
    """Minus the mean of the lowest share `k` of the tokens' log-probabilities, in nats. Low: member.

    Min-k % (Shi et al. 2023, arXiv 2310.16789), with its sign turned. At least one token of each text is taken; the
    number of tokens is rounded down. `k` = 0.4 is MUSE's (arXiv 2407.06460).

    Raises:
        DataError: A text without tokens, or `k` outside (0, 1].
    """
    return _lowest(logprobs, k)


def min_k_plus_plus(stats: TokenStats, k: float = 0.4) -> Float[np.ndarray, " text"]:
    """`min_k` of (log p - mean) / std, mean and deviation over the vocabulary (arXiv 2404.02936). Low: member."""
    rows = zip(stats.logprob, stats.mean, stats.std, strict=True)
    return _lowest([(own - mean) / np.maximum(std, _FLAT) for own, mean, std in rows], k)


def reference(logprobs: PerToken, others: Sequence[PerToken]) -> Float[np.ndarray, " text"]:
    """Loss minus the mean loss of reference models that never saw the texts, in nats per token. Low: member.

    Difficulty calibration (Watson et al. 2021, arXiv 2111.08440): a text that every model finds easy is no evidence.
    """
    if not others:
        raise DataError("reference needs at least one reference model; received none")
    calibrated: np.ndarray = loss(logprobs) - np.mean([loss(other) for other in others], axis=0)
    return calibrated


def gradient_norm(model: Model, lines: Sequence[str], *, bos: bool | None = None) -> Float[np.ndarray, " text"]:
    """L2 norm of the gradient of each text's mean loss by all parameters. Low: member (arXiv 2402.17012).

    One backward a text. Gradient flags and gradients are as before afterwards.
    """
    ids = _token_ids(model, lines, bos)
    parameters = list(model.hf.parameters())
    flags = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad(), eval_mode(model.hf):
            return np.array([_one_norm(model, row, parameters) for row in ids])
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)


def _one_norm(model: Model, row: list[int], parameters: list[Tensor]) -> float:
    ids = torch.tensor([row], device=model.device)  # [1, pos]
    logits = model.hf(input_ids=ids, use_cache=False).logits[0, :-1].float()
    value = torch.nn.functional.cross_entropy(logits, ids[0, 1:].to(logits.device))
    grads = torch.autograd.grad(value, parameters, allow_unused=True)
    norm = float(torch.stack([g.double().square().sum() for g in grads if g is not None]).sum().sqrt())
    if not np.isfinite(norm):
        raise AuditError("the gradient of a text is not finite; check the model's weights and its dtype")
    return norm


def _lowest(values: PerToken, k: float) -> Float[np.ndarray, " text"]:
    if not 0 < k <= 1:
        raise DataError(f"k must be a share in (0, 1]; received {k}")
    return np.array([-np.mean(np.sort(row)[: max(1, int(len(row) * k))]) for row in _checked(values)])


def _checked(values: PerToken) -> PerToken:
    if any(len(row) == 0 for row in values):
        raise DataError("every text needs at least one predicted token; one has none")
    return values


def tpr_at_fpr(members: Float[np.ndarray, " m"], others: Float[np.ndarray, " n"], fpr: float) -> float:
    """Largest share of members below a threshold that at most a share `fpr` of the others is below (low: member).

    Raises:
        DataError: Fewer than 1 / fpr others, which cannot show so small a rate.
    """
    if not 0 < fpr <= 1 or len(others) * fpr < 1 - 1e-9:
        raise DataError(
            f"a false positive rate of {fpr:g} needs {int(np.ceil(1 / fpr))} others; there are {len(others)}"
        )
    # the threshold may reach up to, not including, the first value that would be one false positive too many
    allowed = int(np.floor(len(others) * fpr + 1e-9))
    ordered = np.sort(others)
    return float(np.mean(members < ordered[allowed])) if allowed < len(ordered) else 1.0


def auc_estimate(
    members: Float[np.ndarray, " m"],
    others: Float[np.ndarray, " n"],
    member_groups: Sequence[str],
    other_groups: Sequence[str],
    *,
    n_boot: int = 1000,
    seed: int = 0,
    people: str = "people",
) -> Estimate:
    """AUC of telling members (low scores) from others, ties counted half, with a bootstrap interval over groups.

    Raises:
        AuditError: Scores that are not finite, or all alike: nothing can be told from them.
    """
    scores = np.concatenate([members, others])
    if not np.isfinite(scores).all():
        raise AuditError("membership scores must be finite")
    if np.ptp(scores) == 0:
        raise AuditError("every text has the same score, so members cannot be told from others by it")
    y: Int[np.ndarray, " n"] = np.r_[np.ones(len(members), dtype=int), np.zeros(len(others), dtype=int)]
    groups = _stats.codes([*(f"1{g}" for g in member_groups), *(f"0{g}" for g in other_groups)])
    value, n_groups = _stats.auc(-scores, y), int(groups.max()) + 1
    if min(len(set(member_groups)), len(set(other_groups))) < 2:
        return Estimate(value, len(y), n_groups, how="none: one group on a side")
    weights = _stats.resample_groups(groups, y, n_boot, np.random.default_rng(seed))
    draws = _stats.auc_bootstrap(-scores, y, groups, weights)
    if np.ptp(draws) == 0:
        return Estimate(value, len(y), n_groups, how="none: every pair is ordered alike, a bootstrap has no width")
    low, high = _stats.interval(draws)
    return Estimate(value, len(y), n_groups, float(low), float(high), f"95 %, bootstrap over {people}")


_SCORES = {
    "loss": "loss",
    "zlib": "loss / zlib length",
    "min_k": "Min-k %",
    "min_k_plus_plus": "Min-k++ %",
    "reference": "loss - gold's loss",
    "gradient": "gradient norm",
}
_OF_GOLDS: WeakKeyDictionary[Case, dict[tuple[int, int | None], TokenStats]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Membership(Part):
    """Forget texts against holdout texts, each `question + " " + answer`, by six scores.

    The texts are read as ordinary text, never in a chat template. The reference of the fifth score is the mean loss of
    the golds, of which a gold leaves itself out; with one gold, gold itself has no such score.

    AUCs are 1 where members (forget) are told apart by their low scores, 0.5 where nothing tells them apart. MUSE's
    privacy leakage takes the same AUC unturned, near 0 for a model that knows.

    The reference stays the mean over all golds of the case also where one of them is judged with itself left out
    (`Bench.gold_card`): the original's and the other golds' `membership_reference_auc` are then measured against that
    one too.

    Attributes:
        k: Share of the tokens that Min-k takes.
        limit: Texts of each set, evenly spaced; None for all.
        gradients: Whether to measure gradient norms too (one backward a text).
        gradient_limit: Texts of each set for those.
    """

    k: float = 0.4
    limit: int | None = 128
    gradients: bool = False
    gradient_limit: int = 64

    name: ClassVar[str] = "membership"
    title: ClassVar[str] = "whether forget texts can be told from texts never trained on (membership inference)"
    needs: ClassVar[tuple[str, ...]] = ("forget", "holdout")
    metrics: ClassVar[tuple[Metric, ...]] = (
        *(Metric(f"membership_{key}_auc", f"membership AUC, {label}", of="texts") for key, label in _SCORES.items()),
        Metric("membership_tpr_at_1", "members found at 1 % false alarms, Min-k %", share=True, of="texts"),
        Metric("membership_tpr_at_10", "members found at 10 % false alarms, Min-k %", share=True, of="texts"),
    )
    # no evidence: a damaged model's AUC says how the texts of the two sets differ, not what it knows

    def measure(self, subject: Subject) -> Measurement:
        """Score both sets; the table `membership` has every score's AUC and true positive rates."""
        case = subject.case
        rows = [spaced(case.sets[name], self.limit) for name in ("forget", "holdout")]
        lines, cut, own = texts(rows[0]) + texts(rows[1]), len(rows[0]), gold_index(subject.role)
        stats = self._stats(subject.model, lines, case, own)
        found = self._scores(stats, lines)
        golds = [i for i in range(len(case.golds)) if i != own]
        others = [self._stats(case.golds[i], lines, case, i).logprob for i in golds]
        if others:
            found["reference"] = reference(stats.logprob, others)
        groups = dict.fromkeys(found, (rows[0].groups, rows[1].groups))
        scores = {key: (values[:cut], values[cut:]) for key, values in found.items()}
        missing = [] if others else ["membership by loss against gold: no other gold"]
        if self.gradients:
            few = [spaced(one, self.gradient_limit) for one in rows]
            scores["gradient"] = tuple(gradient_norm(subject.model, texts(one), bos=case.bos) for one in few)  # type: ignore[assignment]
            groups["gradient"] = (few[0].groups, few[1].groups)
        return _measurement(scores, groups, case, missing)

    def _scores(self, stats: TokenStats, lines: Sequence[str]) -> dict[str, Float[np.ndarray, " text"]]:
        return {
            "loss": loss(stats.logprob),
            "zlib": zlib_ratio(stats.logprob, lines),
            "min_k": min_k(stats.logprob, self.k),
            "min_k_plus_plus": min_k_plus_plus(stats, self.k),
        }

    def _stats(self, model: Model, lines: list[str], case: Case, gold: int | None) -> TokenStats:
        """Of both sets' texts; a gold reads them once a case."""
        memo = _OF_GOLDS.setdefault(case, {})
        if gold is not None and (gold, self.limit) in memo:
            return memo[gold, self.limit]
        stats = token_stats(model, lines, batch_size=case.batch_size, bos=case.bos)
        if gold is not None:
            memo[gold, self.limit] = stats
        return stats


def gold_index(role: str) -> int | None:
    """0 for "gold 1", 1 for "gold 2", ...; None for other roles."""
    return int(role.removeprefix("gold ")) - 1 if role.startswith("gold ") else None


def _measurement(
    scores: Mapping[str, tuple[np.ndarray, np.ndarray]],
    groups: Mapping[str, tuple[list[str], list[str]]],
    case: Case,
    missing: list[str],
) -> Measurement:
    numbers, table, settings = [], [], {"n_boot": case.n_boot, "seed": case.seed, "people": case.people}
    for key, (members, others) in scores.items():
        try:
            auc = auc_estimate(members, others, *groups[key], **settings)  # type: ignore[arg-type]
        except AuditError as error:
            missing.append(f"membership by {_SCORES[key]}: {error}")
            continue
        numbers.append(Number("forget", f"membership_{key}_auc", auc))
        row = {"score": key, "auc": auc.value, "low": auc.low, "high": auc.high}
        for per_cent in (1, 10):
            try:
                rate = tpr_at_fpr(members, others, per_cent / 100)
            except DataError as error:
                rate = np.nan
                if key == "min_k":
                    missing.append(f"membership: {error}")
            row[f"tpr_at_{per_cent}"] = rate
            if key == "min_k" and np.isfinite(rate):
                value = Estimate(rate, len(members) + len(others), auc.n_groups, how="none: a rate at a threshold")
                numbers.append(Number("forget", f"membership_tpr_at_{per_cent}", value))
        table.append(row)
    return Measurement(tuple(numbers), {"membership": pd.DataFrame(table)}, missing=tuple(missing))
