"""Where an edit hurt what it should have kept: a mean over retained questions hides the one answer that pays for it."""

from __future__ import annotations

from typing import Any

import pandas as pd

from probe.data import Questions


def collateral(card: Any, retain: Questions) -> pd.DataFrame:
    """Recall and probability of the retained questions by their answer, before and after, worst first.

    Args:
        card: A report card, with its answers.
        retain: The retained questions that it measured.

    Returns:
        Columns `answer, n, recall_before, recall_after, recall_lost, prob_before, prob_after`.
    """
    answer = {row.id: row.answer for row in retain}
    rows = card.answers[card.answers["set"] == "retain"]
    rows = rows.assign(answer=rows["id"].map(answer), exact=rows["exact"].astype(float))
    by = rows.groupby(["answer", "model"])[["exact", "prob"]].mean().unstack("model")
    made = pd.DataFrame(
        {
            "n": rows[rows["model"] == "original"].groupby("answer").size(),
            "recall_before": by["exact", "original"],
            "recall_after": by["exact", "edited"],
            "recall_lost": by["exact", "original"] - by["exact", "edited"],
            "prob_before": by["prob", "original"],
            "prob_after": by["prob", "edited"],
        }
    )
    made["prob_lost"] = made["prob_before"] - made["prob_after"]
    ranked = made.sort_values(["recall_lost", "prob_lost"], ascending=False).drop(columns="prob_lost")
    return ranked.reset_index()


def sentence(table: pd.DataFrame, much: float = 0.1) -> str:
    """The worst-hit answer in words, and how many lost more than `much` of their recall."""
    worst, hit = table.iloc[0], int((table["recall_lost"] > much).sum())
    if not hit:
        return f"None of the {len(table)} retained answers lost more than {much:.0%} of its recall."
    return (
        f"The mean hides where it hurts: {hit} of the {len(table)} retained answers lost more than {much:.0%} of their "
        f"recall, most of all {worst['answer']!r}, from {worst['recall_before']:.0%} to {worst['recall_after']:.0%} "
        f"(n = {worst['n']} questions)."
    )
