"""The formulas of the output-based metrics: arrays and strings in, numbers out.

Nothing here knows a model. What cannot be measured (no token, one value only, nothing to compare) is an error, so that
a part can say so in place of giving a number.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from probe.errors import AuditError, DataError

__all__ = [
    "Composite",
    "KolmogorovSmirnov",
    "RougeL",
    "composite",
    "exact_memorisation",
    "extraction_strength",
    "forget_quality",
    "harmonic_mean",
    "lcs_length",
    "log_truth_ratio",
    "model_utility",
    "ngram_entropy",
    "normalised_probability",
    "privacy_leakage",
    "probability",
    "repetition",
    "rouge_l",
    "rouge_tokens",
    "truth_preference",
    "truth_ratio",
]

_NOT_WORD = re.compile(r"[^a-z0-9]+")
_UDS_EPSILON = 1e-12  # what the published rows add to each part of privacy and of the overall score


@dataclass(frozen=True)
class RougeL:
    """ROUGE-L (Lin 2004): the longest common subsequence over the candidate's, and over the reference's length."""

    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class KolmogorovSmirnov:
    """A two-sample Kolmogorov-Smirnov test: its p-value and its distance D."""

    p: float
    d: float


@dataclass(frozen=True)
class Composite:
    """The composite scores of the unlearning depth paper (arXiv 2605.24614)."""

    memorisation: float
    privacy: float
    overall: float


def probability(token_logprobs: Float[np.ndarray, " token"]) -> float:
    """Return exp(mean log p) of an answer's tokens (TOFU, arXiv 2401.06121).

    Raises:
        DataError: No token.
        AuditError: A log-probability that is no number, or above 0.
    """
    return float(np.exp(_logprobs(token_logprobs).mean()))


def normalised_probability(right_nll: float, wrong_nll: Sequence[float]) -> float:
    """Return p(right) / (p(right) + sum of p(wrong)), each p the exp(-loss per token); TOFU's outside the retain set.

    Raises:
        DataError: No wrong answer.
        AuditError: A loss that is not finite.
    """
    losses = _finite([right_nll, *wrong_nll], "losses")
    if len(losses) < 2:
        raise DataError("a probability is normalised over the right and at least one wrong answer; received no wrong")
    weights = np.exp(losses.min() - losses)  # the largest is 1, so that none overflows
    return float(weights[0] / weights.sum())


def rouge_tokens(text: str, stem: bool = False) -> list[str]:
    """Return the words that ROUGE compares: lower case, cut at everything but ASCII letters and digits.

    Args:
        text: Any text.
        stem: Reduce words of more than three letters to Porter's stems, as TOFU's evaluation does.
    """
    words = [word for word in _NOT_WORD.split(text.lower()) if word]
    if not stem:
        return words
    from probe.audit._porter import porter_stem

    return [porter_stem(word) if len(word) > 3 else word for word in words]


def lcs_length(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """Return the length of the longest common subsequence, by Hyyro's bit-parallel recurrence (2004).

    Costs one addition of a `len(one)`-bit integer for each item of `other`.
    """
    where: dict[Hashable, int] = {}
    for i, item in enumerate(one):
        where[item] = where.get(item, 0) | 1 << i
    full = (1 << len(one)) - 1
    row = full  # bit i is 0 where the table's row grows from column i to i + 1
    for item in other:
        hit = row & where.get(item, 0)
        row = ((row + hit) | (row - hit)) & full
    return len(one) - row.bit_count()


def rouge_l(candidate: str, reference: str, stem: bool = False) -> RougeL:
    """Compare what was said with what should have been said.

    An empty candidate scores 0. An empty reference leaves nothing to recall.

    Raises:
        DataError: A reference without ASCII letters or digits.
    """
    said, wanted = rouge_tokens(candidate, stem), rouge_tokens(reference, stem)
    if not wanted:
        raise DataError(f"ROUGE needs a reference with ASCII letters or digits; received {reference!r}")
    common = lcs_length(said, wanted)
    if common == 0:
        return RougeL(0.0, 0.0, 0.0)
    precision, recall = common / len(said), common / len(wanted)
    return RougeL(precision, recall, 2 * precision * recall / (precision + recall))


def exact_memorisation(
    argmax_right: Int[np.ndarray, " row"], n_tokens: Int[np.ndarray, " row"]
) -> Float[np.ndarray, " row"]:
    """Return per answer the share of tokens whose argmax is right under teacher forcing (Tirumala et al. 2022).

    Raises:
        DataError: An answer without tokens.
    """
    _has_tokens(n_tokens)
    share: np.ndarray = np.asarray(argmax_right) / np.asarray(n_tokens)
    return share


def extraction_strength(
    last_wrong: Int[np.ndarray, " row"], n_tokens: Int[np.ndarray, " row"]
) -> Float[np.ndarray, " row"]:
    """Return per answer 1 - k / |y|, k the shortest prefix after which every argmax is right (Carlini et al. 2021).

    Args:
        last_wrong: Index within the answer of the last token whose argmax is wrong; -1 if none is. k is one more.
        n_tokens: Tokens of the answer.

    Raises:
        DataError: An answer without tokens.
    """
    _has_tokens(n_tokens)
    strength: np.ndarray = 1 - (np.asarray(last_wrong) + 1) / np.asarray(n_tokens)
    return strength


def log_truth_ratio(paraphrase_nll: float, perturbed_nll: Sequence[float]) -> float:
    """Return the logarithm of `truth_ratio`: paraphrase_nll - mean(perturbed_nll), in nats per token.

    Raises:
        DataError: No perturbed answer.
        AuditError: A loss that is not finite.
    """
    if len(perturbed_nll) == 0:
        raise DataError("a truth ratio needs at least one perturbed (wrong) answer; received none")
    right, *wrong = _finite([paraphrase_nll, *perturbed_nll], "losses")
    return float(right - np.mean(wrong))


def truth_ratio(paraphrase_nll: float, perturbed_nll: Sequence[float]) -> float:
    """Return exp(-mean l_perturbed) / exp(-l_paraphrase): below 1 where the model prefers the truth.

    l is a loss per token. The mean over the wrong answers is inside the exponent, as in the code that made the
    published figures (TOFU, arXiv 2401.06121); a mean of probabilities gives other p-values.

    Raises:
        DataError: No perturbed answer.
        AuditError: A loss, or the ratio, that is not finite.
    """
    with np.errstate(over="ignore"):
        ratio = float(np.exp(log_truth_ratio(paraphrase_nll, perturbed_nll)))
    if not np.isfinite(ratio):
        raise AuditError("the truth ratio overflows; compare its logarithm (log_truth_ratio)")
    return ratio


def truth_preference(log_ratio: Float[np.ndarray, " row"]) -> Float[np.ndarray, " row"]:
    """Return max(0, 1 - truth ratio) of logarithms of truth ratios: TOFU's third part of utility, in [0, 1]."""
    preferred: np.ndarray = -np.expm1(np.minimum(np.asarray(log_ratio, dtype=float), 0.0))
    return preferred + 0.0  # no negative zero


def forget_quality(model: Sequence[float] | np.ndarray, gold: Sequence[float] | np.ndarray) -> KolmogorovSmirnov:
    """Compare a model's truth ratios with those of a model that never saw the forget set (TOFU, arXiv 2401.06121).

    Ratios or their logarithms: the test heeds their order alone. A high p is no proof that both are alike: with few
    questions it is high for any two models, so D stands beside it.

    Raises:
        AuditError: Fewer than two values on a side, values that are no numbers, or a side of equal values (a model that
            answers everything alike), of which an order says nothing.
    """
    from scipy.stats import ks_2samp

    sides = [np.asarray(side, dtype=float) for side in (model, gold)]
    for name, side in zip(("the model", "gold"), sides, strict=True):
        if len(side) < 2 or not np.isfinite(side).all():
            raise AuditError(f"forget quality needs two or more finite truth ratios of {name}; received {len(side)}")
        if np.ptp(side) <= 1e-9 * max(1.0, float(np.abs(side).max())):
            raise AuditError(f"forget quality cannot be measured: every truth ratio of {name} is {side[0]:.4g}")
    test = ks_2samp(*sides)
    return KolmogorovSmirnov(float(test.pvalue), float(test.statistic))


def harmonic_mean(values: Sequence[float]) -> float:
    """Return n / sum(1 / value); 0 where a value is 0, which is its limit.

    Raises:
        AuditError: No value, one below 0, or one that is not finite.
    """
    parts = _finite(values, "values")
    if len(parts) == 0 or (parts < 0).any():
        raise AuditError(f"a harmonic mean needs values from 0 up; received {list(values)}")
    if (parts == 0).any():
        return 0.0
    return float(len(parts) / (1 / parts).sum())


def model_utility(parts: Mapping[str, Sequence[float]]) -> float:
    """Return TOFU's model utility (arXiv 2401.06121): a harmonic mean over three parts of each set.

    Args:
        parts: By set (`retain`, `authors`, `world`, or those of them that there are): probability (normalised over the
            options outside retain), ROUGE-L recall, and the mean of max(0, 1 - truth ratio).

    Raises:
        AuditError: No set, a set without its three parts, or a part that is no number from 0 up.
    """
    for name, own in parts.items():
        if len(own) != 3:
            raise AuditError(f"utility has 3 parts a set (probability, ROUGE-L, truth); {name} has {len(own)}")
    return harmonic_mean([value for own in parts.values() for value in own])


def composite(row: Mapping[str, float]) -> Composite:
    """Return the composite scores of one model of the unlearning depth paper (arXiv 2605.24614).

    memorisation = HM(1 - ES, 1 - EM, 1 - paraphrase probability, 1 - truth ratio), privacy = HM(UDS, MIA),
    overall = HM(memorisation, privacy, relative utility). High is good: little is remembered. To each part of the last
    two means 1e-12 is added, as in the published rows, where a part of 0 so gives a mean of about 0.

    Args:
        row: `one_minus_es`, `one_minus_em`, `one_minus_paraprob`, `one_minus_truth`, `uds`, `privacy_mia` and
            `utility_rel`, as in the published rows.

    Raises:
        DataError: A row without one of them.
        AuditError: A value that is no number from 0 up.
    """
    memory = ("one_minus_es", "one_minus_em", "one_minus_paraprob", "one_minus_truth")
    lacking = [key for key in (*memory, "uds", "privacy_mia", "utility_rel") if key not in row]
    if lacking:
        raise DataError(f"a composite score needs {', '.join(lacking)}; the row has {', '.join(sorted(row))}")
    memorisation = harmonic_mean([row[key] for key in memory])
    privacy = harmonic_mean([row["uds"] + _UDS_EPSILON, row["privacy_mia"] + _UDS_EPSILON])
    parts = (memorisation, privacy, row["utility_rel"])
    return Composite(memorisation, privacy, harmonic_mean([part + _UDS_EPSILON for part in parts]))


def privacy_leakage(auc: float, auc_gold: float) -> float:
    """Return (AUC - AUC of gold) / AUC of gold * 100 (PrivLeak; MUSE, arXiv 2407.06460), in per cent.

    The AUC takes forget for the positive class and a score that is low for members (here minus Min-k), unturned: near 0
    where every forget row looks like training data, 0.5 where nothing tells the two apart. So a model that was not
    unlearned leaks near -100, and one whose forget set looks stranger than what was never seen leaks positively. The
    membership part's AUCs (`membership_*_auc`) are turned round, 1 where members are told apart: they do not fit here.

    Raises:
        AuditError: An AUC outside [0, 1], or a gold's of 0, to which nothing is relative.
    """
    if not (0 <= auc <= 1 and 0 < auc_gold <= 1):
        raise AuditError(f"privacy leakage needs AUCs from 0 to 1, gold's above 0; received {auc} and {auc_gold}")
    return (auc - auc_gold) / auc_gold * 100


def ngram_entropy(tokens: Sequence[Hashable], weights: Mapping[int, float] | None = None) -> float:
    """Return the weighted entropy of a text's 2- and 3-grams, in bits (fluency of ROME, arXiv 2202.05262, and RWKU).

    1/3 of the bigrams' and 2/3 of the trigrams' entropy: the weights 2/3 and 4/3 of their code, averaged over the two.
    Low where a text repeats itself. It grows with length, so compare texts of one length.

    Args:
        tokens: Words, or token ids.
        weights: Weight of each n; None for {2: 1/3, 3: 2/3}.

    Raises:
        DataError: A text that is shorter than the longest n-gram.
    """
    weights = {2: 1 / 3, 3: 2 / 3} if weights is None else weights
    return sum(weight * _entropy(_ngrams(tokens, n)) for n, weight in weights.items())


def repetition(tokens: Sequence[Hashable], n: int = 4) -> float:
    """Return the share of a text's n-grams that occurred before: 1 - distinct / all (seq-rep-n, arXiv 1908.04319).

    Raises:
        DataError: A text of fewer than n tokens.
    """
    grams = _ngrams(tokens, n)
    return 1 - len(set(grams)) / len(grams)


def _ngrams(tokens: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    if n < 1 or len(tokens) < n:
        raise DataError(f"{n}-grams need n of at least 1 and as many tokens; received {len(tokens)} tokens")
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def _entropy(items: Sequence[Hashable]) -> float:
    """Of the items' frequencies, in bits."""
    share = np.array(list(Counter(items).values())) / len(items)
    return float(-(share * np.log2(share)).sum()) + 0.0  # no negative zero


def _logprobs(values: Sequence[float] | np.ndarray) -> Float[np.ndarray, " token"]:
    if len(values) == 0:
        raise DataError("log-probabilities of at least one token are needed; received none")
    logprobs = np.asarray(values, dtype=float)
    if np.isnan(logprobs).any() or (logprobs > 1e-6).any():
        raise AuditError("log-probabilities must be numbers of at most 0; check the model's weights and dtype")
    return logprobs


def _finite(values: Sequence[float] | np.ndarray, what: str) -> Float[np.ndarray, " value"]:
    array = np.asarray(values, dtype=float)
    if not np.isfinite(array).all():
        raise AuditError(f"{what} must be finite numbers; received {array.tolist()}")
    return array


def _has_tokens(n_tokens: Int[np.ndarray, " row"]) -> None:
    if len(np.atleast_1d(n_tokens)) == 0 or (np.asarray(n_tokens) < 1).any():
        raise DataError("every answer needs at least one token")
