"""Worst-case forget sets: which people of a given number are the hardest to forget?

An average over random forget sets hides that some are much harder. Fan et al. (arXiv 2403.07362) look for the forget
set on which unlearning does worst, by a bilevel problem; on small models it can be approached directly, since an edit
costs seconds: by enumeration where there are few subsets, else greedily, and by any score of a person that predicts it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from probe.audit.sequential import MakeEdit, edited
from probe.data import Questions
from probe.errors import AuditError, DataError
from probe.models import Model
from probe.scoring import score_answers

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["WorstCase", "difficulty", "hardness_of", "worst_case"]

Hardness = Callable[[tuple[str, ...]], float]


@dataclass(frozen=True)
class WorstCase:
    """The hardest subsets that were found, beside random ones.

    Attributes:
        size: Groups in a subset.
        table: A row a subset: how it was chosen (random, exact, greedy, or score), `groups`, `hardness`.
        n_groups: Groups to choose from.
    """

    size: int
    table: pd.DataFrame
    n_groups: int

    @property
    def worst(self) -> tuple[str, ...]:
        """The hardest subset of all that were tried."""
        at = int(np.argmax(self.table["hardness"].to_numpy(dtype=float)))
        return tuple(self.table["groups"].iloc[at])

    def percentile(self, how: str) -> float:
        """Share of the random subsets that are easier than the hardest that `how` found, ties counted half.

        Raises:
            DataError: Nothing was chosen that way, or no random subset was tried.
        """
        mine = self.table.loc[self.table["how"] == how, "hardness"]
        random = self.table.loc[self.table["how"] == "random", "hardness"]
        if mine.empty or random.empty:
            raise DataError(f"there are subsets chosen by {sorted(set(self.table['how']))}; none by {how!r} and random")
        return float(((random < mine.max()) + 0.5 * (random == mine.max())).mean())

    def to_df(self) -> pd.DataFrame:
        """The table, a copy."""
        return self.table.copy()

    def plot(self) -> go.Figure:
        """The hardness of random subsets in order, with the chosen ones as lines across."""
        from probe.plots._template import NEUTRAL, PALETTE, new_figure

        figure = new_figure(f"Forget sets of {self.size} of {self.n_groups}", "share of random subsets", "hardness")
        random = np.sort(self.table.loc[self.table["how"] == "random", "hardness"].to_numpy(dtype=float))
        if len(random):
            at = (np.arange(len(random)) + 0.5) / len(random)
            figure.add_scatter(x=at, y=random, name="random", mode="lines+markers", line={"color": NEUTRAL})
        for colour, how in zip(PALETTE, ("exact", "greedy", "score"), strict=False):
            rows = self.table.loc[self.table["how"] == how, "hardness"]
            if len(rows):
                figure.add_scatter(x=[0, 1], y=[rows.max()] * 2, name=how, mode="lines", line={"color": colour})
        return figure


def worst_case(
    groups: Sequence[str],
    hardness: Hardness,
    size: int,
    *,
    scores: Mapping[str, float] | None = None,
    n_random: int = 20,
    max_exact: int = 200,
    greedy: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> WorstCase:
    """Look for the subset of `size` groups that is hardest to forget.

    - random: `n_random` subsets, what an average reports (all different where there are enough);
    - exact: every subset, where there are at most `max_exact`;
    - greedy: one group after another, each time the one that makes the subset hardest: at most size x groups edits;
    - score: the `size` groups of the highest scores (loss, influence, ...), one edit.

    Args:
        groups: What to choose from.
        hardness: Of a subset (a sorted tuple); higher is harder. See `hardness_of`. Called once a subset.
        size: Groups in a subset.
        scores: A score for each group that should predict how hard it is.
        n_random: Random subsets.
        max_exact: Most subsets that are all tried.
        greedy: Whether to search greedily.
        seed: Of the random subsets.
        progress: Show a bar.

    Raises:
        DataError: Groups given twice, a size that is not from 1 to one less than their number, a score missing.
        AuditError: A hardness that is not finite.
    """
    names = sorted(groups)
    if len(set(names)) < len(names) or not 1 <= size < len(names):
        raise DataError(
            f"{len(names)} different groups and a size from 1 to {len(names) - 1} are needed; size is {size}"
        )
    if scores is not None and not (set(names) <= set(scores) and np.isfinite([scores[n] for n in names]).all()):
        raise DataError("scores must hold a finite number for each group")
    with tqdm(desc="forget sets", disable=not progress) as bar:
        known = _Known(hardness, bar)
        rows = [("random", subset) for subset in _random(names, size, n_random, seed)]
        if comb(len(names), size) <= max_exact:
            rows += [("exact", max(combinations(names, size), key=known))]
        if greedy:
            rows += [("greedy", _greedy(names, size, known))]
        if scores is not None:
            rows += [("score", tuple(sorted(sorted(names, key=lambda n: (-scores[n], n))[:size])))]
        table = [{"how": how, "groups": subset, "hardness": known(subset)} for how, subset in rows]
    if not table:
        raise DataError("nothing to try: no random subsets, too many for all, no greedy search, no scores")
    return WorstCase(size, pd.DataFrame(table), len(names))


class _Known:
    """Each subset's hardness, computed once."""

    def __init__(self, hardness: Hardness, bar: tqdm[Any]) -> None:
        self.hardness, self.bar = hardness, bar
        self.found: dict[tuple[str, ...], float] = {}

    def __call__(self, subset: Sequence[str]) -> float:
        key = tuple(sorted(subset))
        if key not in self.found:
            value = float(self.hardness(key))
            if not np.isfinite(value):
                raise AuditError(f"the hardness of a forget set must be finite; {key} has {value}")
            self.found[key] = value
            self.bar.update()
        return self.found[key]


def _random(names: Sequence[str], size: int, n: int, seed: int) -> list[tuple[str, ...]]:
    rng, found = np.random.default_rng(seed), dict[tuple[str, ...], None]()
    wanted = min(n, comb(len(names), size))
    while len(found) < wanted:
        found[tuple(names[i] for i in sorted(rng.choice(len(names), size, replace=False)))] = None
    return list(found)


def _greedy(names: Sequence[str], size: int, known: Hardness) -> tuple[str, ...]:
    chosen: tuple[str, ...] = ()
    for _ in range(size):
        left = [name for name in names if name not in chosen]
        chosen = max((tuple(sorted((*chosen, name))) for name in left), key=known)
    return chosen


def hardness_of(
    model: Model,
    forget: Questions,
    retain: Questions,
    make_edit: MakeEdit,
    *,
    bos: bool | None = None,
    chat: bool = False,
    batch_size: int = 64,
) -> Hardness:
    """What is left after the edit: the mean probability of the subset's answers, with its groups asked to be forgotten.

    Groups of `forget` that are not in the subset are retained (added to `retain`), as they would be.

    Args:
        model: The original.
        forget: Questions of all groups that a subset may hold.
        retain: What must stay in any case.
        make_edit: As in `probe.audit.sequential.sequential`.
        bos: As in `score_answers`.
        chat: As in `score_answers`.
        batch_size: Rows a forward.

    Returns:
        A function from a subset to a number from 0 (forgotten) to 1 (as sure as can be).
    """

    def hardness(subset: tuple[str, ...]) -> float:
        asked = forget.select(lambda row: row.group in subset)
        kept = retain + forget.select(lambda row: row.group not in subset)
        with edited(model, make_edit(model, asked, kept)) as current:
            return float(score_answers(current, asked, bos=bos, chat=chat, batch_size=batch_size).prob.mean())

    return hardness


def difficulty(model: Model, forget: Questions, *, bos: bool | None = None, chat: bool = False) -> dict[str, float]:
    """A score for each group for `worst_case`: minus its mean loss per answer token. What is known best may be hardest.

    One forward over the set, no edit. Whether it predicts hardness is what the comparison with greedy shows.
    """
    scores = score_answers(model, forget, bos=bos, chat=chat)
    table = pd.DataFrame({"group": scores.groups, "score": scores.logprob_sum / scores.n_tokens})
    return {str(group): float(value) for group, value in table.groupby("group")["score"].mean().items()}
