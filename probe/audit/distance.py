"""Distance to gold as distributions over whole answers: symmetric KL, each model scored on samples of both.

Next-token KL on the reference answers alone says how two models differ where the truth is; a model that was taught to
refuse or to babble differs elsewhere. So each model answers by itself, and both are read on both models' answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from probe._stats import codes
from probe.audit._case import Case
from probe.audit.part import Estimate, Measurement, Metric, Number, Part, Ratio, Subject, spaced
from probe.audit.relearning import relearning_time_ratio
from probe.data import Questions
from probe.errors import AuditError, DataError
from probe.models import Model, pad
from probe.scoring import answer_tokens, eval_mode

__all__ = [
    "Distance",
    "Samples",
    "kl_on_samples",
    "relearning_time_ratio",
    "sample_answers",
    "share_of_distance",
    "symmetric_kl",
]

SETS = ("forget", "retain")


@dataclass(frozen=True)
class Samples:
    """Answers that a model drew.

    Attributes:
        ids: Per sample the tokens of its prompt and its answer, an end token included.
        starts: Per sample the index of the answer's first token.
        prompts: Per sample the index of its prompt.
    """

    ids: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    prompts: Int[np.ndarray, " sample"]

    @property
    def lengths(self) -> Int[np.ndarray, " sample"]:
        """Answer tokens of each sample."""
        return np.array([len(row) - start for row, start in zip(self.ids, self.starts, strict=True)])


def sample_answers(
    model: Model,
    prompts: Sequence[Sequence[int]],
    n: int = 4,
    *,
    max_new_tokens: int = 8,
    batch_size: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
) -> Samples:
    """Draw `n` answers to each prompt from the model itself, nothing cut from the distribution.

    An answer ends with the end token or after `max_new_tokens`. The uniform numbers are drawn beforehand and turned
    into tokens by the inverse of the cumulative distribution, so the samples depend on neither the batch size nor the
    global random state, and equal models draw equal answers.

    Args:
        model: The model.
        prompts: Token ids, [token] each.
        n: Answers a prompt.
        max_new_tokens: Longest answer.
        batch_size: Answers a batch.
        temperature: Logits are divided by it; 0 is greedy. 1 is the model's own distribution.
        seed: Of the uniform numbers.

    Raises:
        DataError: No prompt, an empty one, one that with its answer exceeds the context, or a count below 1.
        AuditError: Logits that are not finite.
    """
    if not prompts or n < 1 or max_new_tokens < 1 or not temperature >= 0:
        raise DataError("sampling needs a prompt, an answer a prompt, a new token and a temperature of at least 0")
    limit = getattr(model.hf.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, prompts)) + max_new_tokens
    if limit is not None and longest > limit:
        raise DataError(f"the longest prompt and its answer have {longest} tokens; the model's context is {limit}")
    uniform = torch.from_numpy(np.random.default_rng(seed).random((len(prompts) * n, max_new_tokens)))
    which = np.repeat(np.arange(len(prompts)), n)
    ids: list[tuple[int, ...]] = []
    with torch.no_grad(), eval_mode(model.hf):
        for start in range(0, len(which), batch_size):
            rows = [prompts[int(i)] for i in which[start : start + batch_size]]
            new = _draw(model, rows, uniform[start : start + batch_size], temperature)
            ids += [(*row, *answer) for row, answer in zip(rows, new, strict=True)]
    return Samples(tuple(ids), tuple(len(prompts[int(i)]) for i in which), which)


def _draw(
    model: Model, rows: Sequence[Sequence[int]], uniform: Float[Tensor, "batch step"], temperature: float
) -> list[list[int]]:
    """One answer to each row, up to and including the end token."""
    stops, given = _stops(model), pad(rows, model.pad_id, "left", str(model.device))
    alive, drawn, past = torch.ones(len(rows), dtype=torch.bool), [], None
    ids, mask, positions = given["input_ids"], given["attention_mask"], given["position_ids"]
    for step in range(uniform.shape[1]):
        now = {"input_ids": ids, "position_ids": positions}
        if past is not None:
            now = {"input_ids": ids[:, -1:], "position_ids": positions[:, -1:], "past_key_values": past}
        out = model.hf(attention_mask=mask, use_cache=True, **now)
        past = getattr(out, "past_key_values", None)  # a model without a cache reads everything again
        token = _next(out.logits[:, -1], uniform[:, step], temperature)
        drawn.append(torch.where(alive, token, -1))
        alive = alive & ~torch.isin(token, stops)
        if not alive.any():
            break
        ids = torch.cat([ids, token[:, None].to(ids.device)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        positions = torch.cat([positions, positions[:, -1:] + 1], 1)
    return [[i for i in row if i >= 0] for row in torch.stack(drawn, 1).tolist()]


def _next(
    logits: Float[Tensor, "batch d_vocab"], uniform: Float[Tensor, " batch"], temperature: float
) -> Int[Tensor, " batch"]:
    if not torch.isfinite(logits).all():
        raise AuditError("the model's logits are not finite; check its weights and its dtype")
    if temperature == 0:
        return logits.argmax(-1).cpu()
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1).cpu()
    at = (uniform.double() * cumulative[:, -1])[:, None]
    return torch.searchsorted(cumulative, at, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _stops(model: Model) -> Int[Tensor, " stop"]:
    """Ids that end an answer: the tokenizer's end token and those of the generation settings."""
    found = [getattr(model.tokenizer, "eos_token_id", None)]
    own = getattr(getattr(model.hf, "generation_config", None), "eos_token_id", None)
    found += own if isinstance(own, list) else [own]
    return torch.tensor(sorted({int(i) for i in found if i is not None}), dtype=torch.long)


def _logprobs(model: Model, samples: Samples, batch_size: int) -> Iterator[Float[Tensor, "token d_vocab"]]:
    """Log-probabilities over the vocabulary at every answer token, a batch of samples at a time, float32 on the CPU."""
    for first in range(0, len(samples.ids), batch_size):
        part = slice(first, first + batch_size)
        yield _batch_logprobs(model, samples.ids[part], samples.starts[part])


def _batch_logprobs(
    model: Model, rows: Sequence[Sequence[int]], starts: Sequence[int]
) -> Float[Tensor, "token d_vocab"]:
    batch = pad(rows, model.pad_id, device=str(model.device))
    with torch.no_grad(), eval_mode(model.hf):  # here and not around a yield, where two generators would cross
        logits = model.hf(**batch, use_cache=False).logits
    where = [(i, t - 1) for i, row in enumerate(rows) for t in range(starts[i], len(row))]
    at = torch.tensor(where, device=logits.device).T
    picked = logits[at[0], at[1]].float()
    if not torch.isfinite(picked).all():
        raise AuditError("the model's logits are not finite; check its weights and its dtype")
    return picked.log_softmax(-1).cpu()


def _kl(p: Float[Tensor, "token d_vocab"], q: Float[Tensor, "token d_vocab"]) -> Float[Tensor, " token"]:
    """KL(p‖q) of log-probabilities, in nats, summed in float64."""
    if p.shape != q.shape:
        raise AuditError(f"distances need one vocabulary; the models' have {p.shape[1]} and {q.shape[1]} tokens")
    p, q = p.double(), q.double()
    return (p.exp() * (p - q)).sum(-1).clamp_min(0)  # below 0 by rounding alone


def kl_on_samples(
    a: Model | Sequence[Float[Tensor, "token d_vocab"]], b: Model, samples: Samples, *, batch_size: int = 64
) -> Float[np.ndarray, " sample"]:
    """KL(a‖b) of whole answers, estimated on samples of `a`, in nats per answer.

    log p(answer) is a sum over its tokens, so KL(a‖b) is the expectation over a's answers of the sum over their
    positions of the next-token KL. That KL is taken exactly over the vocabulary, and only the prefixes are sampled
    (Rao-Blackwell: same mean as log a(y) - log b(y), less variance, never negative). The answers' distribution is that
    of sequences cut after `max_new_tokens`, for which this is unbiased.

    Args:
        a: The model that drew the samples, or its log-probabilities there, in batches of `batch_size` samples.
        b: The other model.
        samples: What `a` drew.
        batch_size: Samples a forward.

    Raises:
        AuditError: Another vocabulary, or logits that are not finite.
    """
    own = _logprobs(a, samples, batch_size) if isinstance(a, Model) else iter(a)
    per_token = [_kl(p, q) for p, q in zip(own, _logprobs(b, samples, batch_size), strict=True)]
    first = np.r_[0, np.cumsum(samples.lengths)[:-1]]
    return np.add.reduceat(torch.cat(per_token).numpy(), first)


def symmetric_kl(
    a: Model, b: Model, prompts: Sequence[Sequence[int]], n: int = 4, *, batch_size: int = 64, **settings: Any
) -> Float[np.ndarray, " prompt"]:
    """KL(a‖b) on samples of `a` plus KL(b‖a) on samples of `b`: nats per answer, the mean over `n` samples a prompt.

    Further settings are those of `sample_answers`, which also says what is raised.
    """
    total = np.zeros(len(prompts))
    for one, other in ((a, b), (b, a)):
        samples = sample_answers(one, prompts, n, batch_size=batch_size, **settings)
        total += kl_on_samples(one, other, samples, batch_size=batch_size).reshape(len(prompts), n).mean(1)
    return total


@dataclass(frozen=True)
class _Drawn:
    """A model's samples of one set, with its own log-probabilities there."""

    samples: Samples
    logprobs: tuple[Float[Tensor, "token d_vocab"], ...]


@dataclass(frozen=True)
class _Far:
    """How far a model is from each gold on one set, by the gold's name: sums over the questions of each group.

    Attributes:
        nats: Symmetric KL of the answers.
        tokens: Tokens of an answer, the mean of both sides.
        count: Questions.
    """

    nats: dict[str, Float[np.ndarray, " group"]]
    tokens: dict[str, Float[np.ndarray, " group"]]
    count: Float[np.ndarray, " group"]


@dataclass
class _Memo:
    """What the golds of one case drew, and what is known of pairs of them: by set and gold."""

    drawn: dict[tuple[str, int], _Drawn] = field(default_factory=dict)
    nats: dict[tuple[str, int, int], Float[np.ndarray, " group"]] = field(default_factory=dict)


_GOLDS: WeakKeyDictionary[Case, dict[Distance, _Memo]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Distance(Part):
    """Symmetric KL between a model and each gold, over answers that both sample (FADE, arXiv 2510.12981).

    The golds' own distances to each other are the floor, the original's the ceiling. Per set and model, the mean over
    the golds (a gold leaves itself out):

    - distance_to_gold_answer: KL(model‖gold) on the model's answers + KL(gold‖model) on gold's, nats per answer;
    - distance_to_gold: the same over the mean number of tokens of those answers, nats per token;
    - distance_share (forget): (distance - floor) / (ceiling - floor) per answer. 0 is as far from gold as gold is, 1
      as far as the original; it may be negative, or above 1 (a model that is further off than one that knows all). For
      a gold, the floor and the ceiling are those of the other golds, so that it is not part of its own yardstick.

    All of them are over the golds of the case at hand: a gold that is judged as if it were an edit, with itself left
    out (`Bench.gold_card`), is no part of anybody's numbers.

    Attributes:
        n_samples: Answers a question.
        max_new_tokens: Longest answer.
        limit: Questions of each set, evenly spaced.
        max_bytes: Memory for the golds' log-probabilities; fewer questions are used where they need more.
    """

    n_samples: int = 2
    max_new_tokens: int = 8
    limit: int = 48
    max_bytes: int = 2**30

    name: ClassVar[str] = "distance"
    title: ClassVar[str] = "how far the model's answers are from gold's, as distributions"
    needs: ClassVar[tuple[str, ...]] = ("forget", "gold")
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("distance_to_gold", "distance to gold, per token", "nats", of="answer tokens"),
        Metric("distance_to_gold_answer", "distance to gold, per answer", "nats"),
        Metric("distance_share", "distance to gold, from gold's floor (0) to the original (1)"),
    )

    def measure(self, subject: Subject) -> Measurement:
        """Draw the model's answers, score them under every gold, and the golds' answers under the model.

        The golds are models of their own, so they may run while the edit is applied; their answers are drawn once.
        """
        own = int(subject.role.removeprefix("gold ")) - 1 if subject.role.startswith("gold ") else None
        golds = [i for i in range(len(subject.case.golds)) if i != own]
        if not golds:
            return Measurement(missing=("distance to gold: a gold needs another gold",))
        sets = [name for name in SETS if subject.case.has(name)]
        return Measurement(payload={name: self._one_set(subject, name, own, golds) for name in sets})

    def _one_set(self, subject: Subject, name: str, own: int | None, golds: Sequence[int]) -> _Far:
        """One set's distances to each gold; `own` is the subject's number where it is a gold."""
        case, memo = subject.case, _GOLDS.setdefault(subject.case, {}).setdefault(self, _Memo())
        rows = self._questions(case, subject.model, name)
        mine = self._golds_drawn(case, memo, name, own, rows) if own is not None else self._drawn(subject, rows)
        nats, tokens = {}, {}
        for i in tqdm(golds, desc=f"{subject.role}: distance, {name}", disable=not case.progress):
            gold = self._golds_drawn(case, memo, name, i, rows)
            if own is None:
                there = self._by_group(
                    kl_on_samples(mine.logprobs, case.golds[i], mine.samples, batch_size=case.batch_size), rows
                )
                back = self._by_group(
                    kl_on_samples(gold.logprobs, subject.model, gold.samples, batch_size=case.batch_size), rows
                )
            else:
                there, back = (self._between(case, memo, name, a, b, rows) for a, b in ((own, i), (i, own)))
            nats[case.gold_names[i]] = there + back
            lengths = (mine.samples.lengths + gold.samples.lengths) / 2
            tokens[case.gold_names[i]] = self._by_group(lengths, rows)
        return _Far(nats, tokens, np.bincount(codes(rows.groups)).astype(float))

    def _between(self, case: Case, memo: _Memo, name: str, a: int, b: int, rows: Questions) -> np.ndarray:
        """KL(gold a‖gold b), each direction of each pair computed once."""
        if (name, a, b) not in memo.nats:
            drawn = self._golds_drawn(case, memo, name, a, rows)
            found = kl_on_samples(drawn.logprobs, case.golds[b], drawn.samples, batch_size=case.batch_size)
            memo.nats[name, a, b] = self._by_group(found, rows)
        return memo.nats[name, a, b]

    def _golds_drawn(self, case: Case, memo: _Memo, name: str, i: int, rows: Questions) -> _Drawn:
        if (name, i) not in memo.drawn:
            memo.drawn[name, i] = self._draw(case.golds[i], case, rows)
        return memo.drawn[name, i]

    def _drawn(self, subject: Subject, rows: Questions) -> _Drawn:
        return self._draw(subject.model, subject.case, rows)

    def _draw(self, model: Model, case: Case, rows: Questions) -> _Drawn:
        tokens = answer_tokens(model, [(row.question, row.answer) for row in rows], bos=case.bos, chat=case.chat)
        prompts = [row.input_ids[: row.start] for row in tokens]
        context = int(getattr(model.hf.config.get_text_config(), "max_position_embeddings", 0) or 0)
        room = context - max(len(one) for one in prompts) if context else self.max_new_tokens
        settings = {"max_new_tokens": min(self.max_new_tokens, room), "batch_size": case.batch_size, "seed": case.seed}
        samples = sample_answers(model, prompts, self.n_samples, **settings)
        return _Drawn(samples, tuple(_logprobs(model, samples, case.batch_size)))

    def _questions(self, case: Case, model: Model, name: str) -> Questions:
        d_vocab = model.hf.get_output_embeddings().weight.shape[0]
        models = (len(case.golds) + 1) * len(SETS)
        fit = self.max_bytes // (4 * d_vocab * self.max_new_tokens * self.n_samples * models)
        if fit < 1:
            raise AuditError(f"distance needs more than {self.max_bytes} bytes for one question; raise max_bytes")
        return spaced(case.sets[name], min(self.limit, fit))

    def _by_group(self, values: Float[np.ndarray, " sample"], rows: Questions) -> Float[np.ndarray, " group"]:
        """Mean over a question's samples, summed over the questions of each group."""
        return np.bincount(codes(rows.groups), weights=values.reshape(len(rows), self.n_samples).mean(1))

    def compare(self, measured: Mapping[str, Measurement], case: Case) -> Mapping[str, Measurement]:
        """Give each model's distances, and put it between gold's floor and the original's ceiling."""
        far: dict[str, dict[str, _Far]] = {role: one.payload for role, one in measured.items() if one.payload}
        found = {}
        for role in far:
            _known(role, far[role], case)
            golds = [name for name in case.gold_names if name != _name(role, case)]
            missing: tuple[str, ...] = ()
            numbers = [n for name, one in far[role].items() for n in _distances(name, one, golds)]
            if "original" in far:
                share, missing = self._share({r: one["forget"] for r, one in far.items()}, role, golds, case)
                numbers += share
            found[role] = Measurement(tuple(numbers), missing=missing)
        return found

    def _share(
        self, far: Mapping[str, _Far], role: str, golds: Sequence[str], case: Case
    ) -> tuple[list[Number], tuple[str, ...]]:
        """The share, or why there is none."""
        own = {_name(other, case): one.nats for other, one in far.items() if other.startswith("gold ")}
        pairs = [own[a][b] for a, b in combinations(golds, 2) if a in own]
        if not pairs:
            return [], (f"distance as a share: {role} needs two other golds, whose distance is the floor",)
        sums = [np.mean([far[which].nats[gold] for gold in golds], axis=0) for which in (role, "original")]
        try:
            found = share_of_distance(sums[0], np.mean(pairs, axis=0), sums[1], case.n_boot, case.seed, case.people)
        except AuditError as error:
            return [], (f"distance as a share: {error}",)
        return [Number("forget", "distance_share", found)], ()


def _name(role: str, case: Case) -> str | None:
    """What the case calls the gold of a role such as "gold 1"; None for other roles."""
    return case.gold_names[int(role.removeprefix("gold ")) - 1] if role.startswith("gold ") else None


def _known(role: str, far: Mapping[str, _Far], case: Case) -> None:
    lacking = {name for name in case.gold_names if name != _name(role, case)} - set(far["forget"].nats)
    if lacking:
        raise AuditError(f"{role} was measured against golds of other names than the case has: no {min(lacking)!r}")


def _distances(name: str, far: _Far, golds: Sequence[str]) -> tuple[Number, ...]:
    """One set's mean distances to some golds, a token and an answer; none where there is no such gold."""
    if not golds:
        return ()
    nats, tokens = (np.mean([own[gold] for gold in golds], axis=0) for own in (far.nats, far.tokens))
    return (
        Number(name, "distance_to_gold", Ratio(nats, tokens)),
        Number(name, "distance_to_gold_answer", Ratio(nats, far.count)),
    )


def share_of_distance(
    distance: Float[np.ndarray, " group"],
    floor: Float[np.ndarray, " group"],
    ceiling: Float[np.ndarray, " group"],
    n_boot: int = 1000,
    seed: int = 0,
    people: str = "people",
) -> Estimate:
    """(distance - floor) / (ceiling - floor) of sums over groups, with a bootstrap that draws the same groups for all.

    Raises:
        AuditError: The ceiling is not above the floor, or not in 97.5 % of the replicates: the original is no further
            from gold than gold is, so there is no scale.
    """
    d, low, high = (np.asarray(one, dtype=float) for one in (distance, floor, ceiling))
    n = len(d)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_boot)  # [boot, group]
    span, spans = (high - low).sum(), drawn @ (high - low)
    if span <= 0 or np.mean(spans <= 0) > 0.025:
        raise AuditError("the original is no further from gold than gold is from gold, so there is no scale")
    value = float((d - low).sum() / span)
    kept = spans > 0
    draws = (drawn[kept] @ (d - low)) / spans[kept]
    if n < 2 or np.ptp(draws) == 0:
        return Estimate(value, n, n, how="none: " + ("one group" if n < 2 else "alike in every group"))
    ends = np.quantile(draws, [0.025, 0.975])
    return Estimate(value, n, n, float(ends[0]), float(ends[1]), f"95 %, bootstrap over {people}")
