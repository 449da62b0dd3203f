"""Contamination: was an evaluation set in the training data, and is its score therefore memory?

With the corpus at hand, n-gram overlap answers. Without it, the model's own behaviour is evidence: low loss on the
least likely tokens, samples that all repeat the greedy answer, and completions that improve when the data set is named.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from tqdm.auto import tqdm

from probe.audit._numbers import Estimate, by_group
from probe.audit.distance import Samples, sample_answers
from probe.audit.membership import auc_estimate, min_k, token_stats
from probe.audit.metrics import rouge_l
from probe.errors import DataError
from probe.models import Model

__all__ = [
    "Contamination",
    "edit_distance",
    "guided_completion",
    "min_k_contamination",
    "ngram_overlap",
    "ngrams",
    "peak",
    "peakedness",
]

GENERAL = "The first half of a text follows. Write its second half so that the whole text makes sense."
GUIDED = (
    "The first half of a text from the {split} split of the {dataset} data set follows. "
    "Write its second half exactly as it stands in that data set."
)


@dataclass(frozen=True)
class Contamination:
    """What one test of contamination found, per item and together.

    Attributes:
        method: Name of the test.
        scores: Per item; NaN where the item cannot be measured. What it means is `score_name`.
        score_name: The meaning of a score.
        contaminated: Per item whether it counts as contaminated; NaN where that cannot be said.
        groups: Per item what must be resampled together.
        details: Further columns.
        missing: Sentences on what could not be measured, and why.
        comparison: What compares with texts known to be clean, where such were given.
        n_boot: Bootstrap replicates.
        seed: Of the bootstrap.
    """

    method: str
    scores: Float[np.ndarray, " item"]
    score_name: str
    contaminated: Float[np.ndarray, " item"]
    groups: tuple[str, ...]
    details: dict[str, Any] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    comparison: Estimate | None = None
    n_boot: int = 1000
    seed: int = 0

    @property
    def score(self) -> Estimate | None:
        """Mean score of the items that can be measured, with a bootstrap interval over groups; None if none can."""
        return self._mean(self.scores, share=False)

    @property
    def share(self) -> Estimate | None:
        """Share of items that count as contaminated, with its interval; None where that cannot be said."""
        return self._mean(self.contaminated, share=True)

    def _mean(self, values: np.ndarray, share: bool) -> Estimate | None:
        known = np.isfinite(values)
        if not known.any():
            return None
        ratio = by_group(values[known], [g for g, k in zip(self.groups, known, strict=True) if k], share=share)
        low, high = ratio.interval(self.n_boot, self.seed)
        how = "95 %, over groups" if np.isfinite(low) else "none: one group"
        return Estimate(ratio.value, int(known.sum()), len(ratio.top), low, high, how)

    def to_df(self) -> pd.DataFrame:
        """One row an item."""
        columns = {"group": self.groups, "score": self.scores, "contaminated": self.contaminated}
        return pd.DataFrame({"method": self.method, **columns, **self.details})

    def __repr__(self) -> str:
        shown = {name: getattr(self, name) for name in ("score", "share", "comparison")}
        parts = [f"{k} {v.value:.3f} [{v.low:.3f}, {v.high:.3f}]" for k, v in shown.items() if v is not None]
        return f"Contamination({self.method}: {len(self.scores)} items, {'; '.join(parts) or 'nothing measured'})"


def ngrams(text: str, n: int = 13) -> list[str]:
    """The word n-grams of a text: lower case, letters and digits alone (GPT-3, arXiv 2005.14165, appendix C)."""
    if n < 1:
        raise DataError(f"n must be at least 1; received {n}")
    words = re.findall(r"\w+", text.lower())
    return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]


def ngram_overlap(
    items: Sequence[str],
    corpus: Iterable[str],
    *,
    n: int = 13,
    threshold: float = 0.0,
    groups: Sequence[str] | None = None,
    n_boot: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> Contamination:
    """Share of each item's n-grams that occur in a training corpus.

    The corpus is streamed and only the items' own n-grams are held in memory, in a hash table of the n-grams
    themselves, so that no collision of hashes can invent a match. 13 words are GPT-3's; a shorter n finds more by
    accident.

    Args:
        items: Evaluation texts.
        corpus: Training documents, an iterable that is read once.
        n: Words.
        threshold: An item whose share is greater counts as contaminated. 0 is GPT-3's "any collision".
        groups: What is resampled together; each item alone unless given.
        n_boot: Bootstrap replicates.
        seed: Of the bootstrap.
        progress: Show a bar.

    Raises:
        DataError: No item, or a corpus that is empty or one string.
    """
    own, corpus = _groups(items, groups), _documents(corpus)
    grams = [set(ngrams(item, n)) for item in items]
    wanted, found, documents = set().union(*grams), set(), 0
    for document in tqdm(corpus, desc="corpus", disable=not progress):
        documents += 1
        found |= wanted.intersection(ngrams(document, n))
    if documents == 0:
        raise DataError("the corpus holds no document; nothing can be searched for in it")
    scores = np.array([len(one & found) / len(one) if one else np.nan for one in grams])
    short = int(np.isnan(scores).sum())
    missing = (f"{short} of {len(items)} items have fewer than {n} words; take a smaller n for them",) if short else ()
    flags = np.where(np.isnan(scores), np.nan, scores > threshold)
    details = {"ngrams": [len(one) for one in grams]}
    name = f"share of {n}-grams in the corpus"
    return Contamination("n-gram overlap", scores, name, flags, own, details, missing, n_boot=n_boot, seed=seed)


def min_k_contamination(
    model: Model,
    items: Sequence[str],
    clean: Sequence[str] | None = None,
    *,
    k: float = 0.2,
    groups: Sequence[str] | None = None,
    batch_size: int = 64,
    bos: bool | None = None,
    n_boot: int = 1000,
    seed: int = 0,
) -> Contamination:
    """Min-k % of evaluation texts (arXiv 2310.16789, whose k is 0.2): lower says more likely trained on.

    A score has no meaning alone, since easy texts are low too. With texts of the same kind that were certainly never
    trained on, `comparison` is the AUC of telling the two apart (0.5: they cannot be).

    Raises:
        DataError: No item, a text without a token to predict, or `k` outside (0, 1].
        AuditError: Logits that are not finite, or all scores alike.
    """
    own = _groups(items, groups)
    score = partial(token_stats, model, batch_size=batch_size, bos=bos)
    scores = min_k(score(list(items)).logprob, k)
    unknown, comparison = np.full(len(items), np.nan), None
    missing: tuple[str, ...] = ("no clean texts to compare with",)
    if clean is not None:
        names = [f"clean {i}" for i in range(len(clean))]
        others = min_k(score(list(clean)).logprob, k)
        comparison = auc_estimate(scores, others, own, names, n_boot=n_boot, seed=seed, people="groups")
        missing = ()
    name = f"minus mean of the lowest {k:.0%} of log p, nats"
    return Contamination("min-k", scores, name, unknown, own, {}, missing, comparison, n_boot, seed)


def edit_distance(a: Sequence[object], b: Sequence[object]) -> int:
    """Levenshtein distance: fewest insertions, deletions and substitutions that turn one into the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def peak(distances: Sequence[int], longest: int, alpha: float = 0.05) -> float:
    """Share of samples at most `alpha` times the longest sample's length from the greedy answer (arXiv 2402.15938)."""
    return float(np.mean(np.asarray(distances) <= alpha * longest))


def peakedness(
    model: Model,
    prompts: Sequence[str],
    *,
    n_samples: int = 50,
    alpha: float = 0.05,
    xi: float = 0.01,
    temperature: float = 0.8,
    max_new_tokens: int = 100,
    groups: Sequence[str] | None = None,
    batch_size: int = 64,
    bos: bool | None = None,
    n_boot: int = 1000,
    seed: int = 0,
) -> Contamination:
    """CDD (Dong et al., arXiv 2402.15938): the more samples repeat the greedy answer, the more likely it was learned.

    Distances are between tokens. An item counts as contaminated where its peak is above `xi`. On answers of a few
    tokens `alpha` times the length is below 1, so that only exact repetition counts: a model that is sure of its answer
    for good reasons is peaked as well, so compare with texts that are clean.

    Raises:
        DataError: No prompt, or one that with `max_new_tokens` exceeds the context.
        AuditError: Logits that are not finite.
    """
    own = _groups(prompts, groups)
    batch = model.tokens(list(prompts), bos=bos, device="cpu")
    ids = [row[keep.bool()].tolist() for row, keep in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    draw = partial(sample_answers, model, ids, max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed)
    greedy, samples = _answers(draw(1, temperature=0)), _answers(draw(n_samples, temperature=temperature))
    scores, means = [], []
    for i, (answer,) in enumerate(greedy[j : j + 1] for j in range(len(ids))):
        mine = samples[i * n_samples : (i + 1) * n_samples]
        distances = [edit_distance(answer, one) for one in mine]
        scores.append(peak(distances, max(map(len, mine)), alpha))
        means.append(float(np.mean(distances)))
    found = np.array(scores)
    name = f"share of samples within {alpha:g} of the greedy answer"
    details = {"mean_edit_distance": means}
    return Contamination("peakedness", found, name, (found > xi).astype(float), own, details, (), None, n_boot, seed)


def _answers(samples: Samples) -> list[tuple[int, ...]]:
    return [row[start:] for row, start in zip(samples.ids, samples.starts, strict=True)]


def guided_completion(
    model: Model | Callable[[list[str]], list[str]],
    items: Sequence[str],
    dataset: str,
    split: str = "test",
    *,
    guided: str = GUIDED,
    general: str = GENERAL,
    max_new_tokens: int = 64,
    groups: Sequence[str] | None = None,
    bos: bool | None = None,
    chat: bool = False,
    n_boot: int = 1000,
    seed: int = 0,
) -> Contamination:
    """Does naming the data set bring back the second half of its items (Golchin and Surdeanu, arXiv 2308.08493)?

    Each item is cut at half of its words. The model completes it once under an instruction that names the data set and
    once under one that does not; the score is the difference of their ROUGE-L with the true half. `comparison` is the
    one-sided p-value of the mean difference being 0 or less, (1 + replicates that are) / (1 + replicates).

    Args:
        model: A model that follows instructions (greedy), or any function from prompts to completions.
        items: Texts of the data set, at least two words each.
        dataset: Its name.
        split: Its split.
        guided: Instruction with `{dataset}` and `{split}`.
        general: Instruction that names neither.
        max_new_tokens: Longest completion.
        groups: What is resampled together.
        bos: As in `Model.tokens`.
        chat: Put the prompt into the chat template.
        n_boot: Bootstrap replicates.
        seed: Of the bootstrap.

    Raises:
        DataError: No item, an item of one word, completions of another number than prompts.
    """
    own, halves = _groups(items, groups), [_halves(item) for item in items]
    instructions = (guided.format(dataset=dataset, split=split), general)
    prompts = [f"{instruction}\n\n{first}" for instruction in instructions for first, _ in halves]
    if isinstance(model, Model):
        made = model.generate(prompts, max_new_tokens=max_new_tokens, bos=bos, chat=chat)
    else:
        made = model(prompts)
    if len(made) != len(prompts):
        raise DataError(f"{len(prompts)} prompts need as many completions; received {len(made)}")
    rouge = np.array([rouge_l(text, halves[i % len(halves)][1]).f1 for i, text in enumerate(made)]).reshape(2, -1)
    difference, unknown = rouge[0] - rouge[1], np.full(len(items), np.nan)
    ratio = by_group(difference, own)
    comparison = None
    missing: tuple[str, ...] = ("one group only, which has no spread",)
    if len(ratio.top) > 1:
        p = float((1 + (ratio.draws(n_boot, seed) <= 0).sum()) / (1 + n_boot))
        comparison = Estimate(p, len(items), len(ratio.top), how="none: a p-value, one-sided bootstrap over groups")
        missing = ()
    details = {"guided": rouge[0], "general": rouge[1], "completion": made[: len(items)]}
    name = "ROUGE-L when named minus when not"
    return Contamination(
        "guided completion", difference, name, unknown, own, details, missing, comparison, n_boot, seed
    )


def _halves(item: str) -> tuple[str, str]:
    words = item.split()
    if len(words) < 2:
        raise DataError(f"an item needs at least two words, so that it has two halves; received {item!r}")
    return " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])


def _groups(items: Sequence[str], groups: Sequence[str] | None) -> tuple[str, ...]:
    if isinstance(items, str) or len(items) == 0:
        raise DataError("at least one evaluation text is needed, in a list")
    own = tuple(str(i) for i in range(len(items))) if groups is None else tuple(groups)
    if len(own) != len(items):
        raise DataError(f"one group for each of {len(items)} items is needed; received {len(own)}")
    return own


def _documents(corpus: Iterable[str]) -> Iterable[str]:
    if isinstance(corpus, str):
        raise DataError("the corpus must be an iterable of documents; received one string")
    return corpus
