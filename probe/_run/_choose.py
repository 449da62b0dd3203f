"""Candidate edits, scored on the select split; the chosen one beside its random twins on the evaluate split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from probe._run._materials import Materials
from probe._run._steps import Found
from probe.errors import EditError, RecipeError, TargetError
from probe.scoring import score_answers
from probe.targets import Target


@dataclass(frozen=True)
class Chosen:
    """The edit that the select split chose.

    Attributes:
        edit: The edit.
        target: What it removes.
        candidate: The recipe's candidate, with the rank that won.
        table: Every candidate with its scores on the select split.
        twins: The chosen edit and its random twins on the evaluate split.
        failures: Candidates that could not be made, with the reason.
    """

    edit: Any
    target: Target
    candidate: dict[str, Any]
    table: pd.DataFrame
    twins: pd.DataFrame
    failures: list[str]


def choose(recipe: Mapping[str, Any], materials: Materials, found: Found) -> Chosen:
    """Measure every candidate on the select split; take the one that forgets most among those that keep enough.

    Raises:
        RecipeError: no candidate could be made; the message gives the reasons.
    """
    settings = recipe["edit"]
    options, failures = _options(settings["candidates"], materials, found)
    if not options:
        raise RecipeError(f"No edit candidate can be made: {'; '.join(failures)}.")
    before = _measure(materials, None, "select")
    records = [
        {**_place(candidate, target), **_measure(materials, edit, "select")} for candidate, target, edit in options
    ]
    table = pd.DataFrame([{"candidate": "unedited", **before}, *records])
    table["retain_drop"] = 1 - table["retain_prob"] / before["retain_prob"]
    table["forget_drop"] = 1 - table["forget_prob"] / before["forget_prob"]
    best = _best(table, settings["max_retain_drop"])
    table["chosen"] = table.index == best
    table["rank"] = table["rank"].astype("Int64")
    candidate, target, edit = options[best - 1]
    twins = _twins(materials, candidate, target, edit, settings["random_twins"], recipe["seed"])
    return Chosen(edit, target, candidate, table, twins, failures)


def _options(
    candidates: list[dict[str, Any]], materials: Materials, found: Found
) -> tuple[list[tuple[dict[str, Any], Target, Any]], list[str]]:
    options, failures = [], []
    for candidate in candidates:
        for own in _each(candidate):
            try:
                target = _target(own, found)
                options.append((own, target, _edit(own, materials, target)))
            except (TargetError, EditError) as error:
                failures.append(f"{own['target']} with k = {own['k']}: {error}")
    return options, failures


def _each(candidate: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A candidate at each of its ranks and strengths."""
    strengths = candidate["strength"] if isinstance(candidate["strength"], list) else [candidate["strength"]]
    for k in candidate["k"]:
        for strength in strengths:
            yield {**candidate, "k": k, "strength": strength}


def _target(candidate: Mapping[str, Any], found: Found) -> Target:
    kind, k = candidate["target"], candidate["k"]
    if kind == "subspace":
        return dict(found.subspace or {})[k]
    scores = {"direction": found.sweep, "patch": found.patch, "latents": found.latents}[kind]
    if scores is None:
        raise TargetError(f"nothing was located for target {kind!r}")
    return scores.top(k)


def _edit(candidate: Mapping[str, Any], materials: Materials, target: Any) -> Any:
    from probe import editing

    return editing.project_out(
        materials.model,
        target,
        candidate["layers"],
        components=candidate["components"],
        strength=candidate["strength"],
    )


def _place(candidate: Mapping[str, Any], target: Target) -> dict[str, Any]:
    layers = candidate["layers"] if candidate["layers"] == "all" else ",".join(map(str, candidate["layers"]))
    where = "" if layers == "all" else f", layers {layers}"
    more = "" if candidate["strength"] == 1 else f", strength {candidate['strength']:g}"
    name = f"{candidate['method']} {candidate['target']}{where}{more}"
    return {
        "candidate": name,
        "rank": len(target),
        "strength": candidate["strength"],
        "layers": layers,
        "site": getattr(target, "site", ""),
    }


def _measure(materials: Materials, edit: Any, part: str) -> dict[str, float]:
    """Mean probability and recall of the forget and retain questions of one part."""
    from contextlib import nullcontext

    made: dict[str, float] = {}
    with nullcontext() if edit is None else edit.applied(materials.model):
        for name, sets in (("forget", materials.forget), ("retain", materials.retain), ("spared", materials.spared)):
            if not sets:
                continue
            scores = score_answers(materials.model, sets[part])
            made |= {f"{name}_prob": float(np.mean(scores.prob)), f"{name}_recall": float(np.mean(scores.exact))}
    return made


def _best(table: pd.DataFrame, most: float) -> int:
    """Row of the candidate that forgets most among those that keep enough; else the best difference of the two."""
    tried = table.iloc[1:]
    kept = tried[tried["retain_drop"] <= most]
    tried, gain = (kept, kept["forget_drop"]) if len(kept) else (tried, tried["forget_drop"] - tried["retain_drop"])
    return int(tried.index.to_numpy()[gain.to_numpy().argmax()])


def _twins(
    materials: Materials, candidate: dict[str, Any], target: Target, edit: Any, n: int, seed: int
) -> pd.DataFrame:
    rows = [
        {"edit": "unedited", **_measure(materials, None, "evaluate")},
        {"edit": "located", **_measure(materials, edit, "evaluate")},
    ]
    for i, twin in enumerate(target.random_twins(n, seed)):
        rows.append(
            {"edit": f"random twin {i + 1}", **_measure(materials, _edit(candidate, materials, twin), "evaluate")}
        )
    return pd.DataFrame(rows)


def sentences(chosen: Chosen, most: float, split_by: str) -> list[str]:
    """How the edit was chosen, in words, and what must be known before believing it."""
    row = chosen.table[chosen.table["chosen"]].iloc[0]
    tried = len(chosen.table) - 1
    if row["retain_drop"] <= most:
        rule = f"the most forgetting at a loss of at most {most:.0%} of the retained probability"
    else:
        rule = f"none kept all but {most:.0%} of the retained probability, so the best difference of the two was taken"
    made = [
        f"Of {tried} candidate edit{'s' if tried > 1 else ''}, {row['candidate']} of rank {row['rank']} was chosen on "
        f"{split_by}s that neither located the target nor score the edit: {rule}."
    ]
    if row["forget_drop"] <= 0:
        made.append("The chosen edit did not lower the probability of what is to be forgotten: nothing was cut.")
    if chosen.table["forget_recall"].iloc[0] < 0.05:
        made.append("The unedited model hardly recalls what is to be forgotten, so there was little to cut.")
    if chosen.failures:
        made.append(f"Not tried: {'; '.join(chosen.failures)}.")
    twins = chosen.twins[chosen.twins["edit"].str.startswith("random")]
    if len(twins):
        before, after = (chosen.twins["forget_recall"].iloc[i] for i in (0, 1))
        low, high = twins["forget_recall"].min(), twins["forget_recall"].max()
        made.append(
            f"The same edit of {len(twins)} random target{'s' if len(twins) > 1 else ''} of its size leaves recall of "
            f"the forget questions at {low:.0%} to {high:.0%} ({before:.0%} before, {after:.0%} for the located one)."
        )
    return made


def spared_sentence(chosen: Chosen, noun: str) -> str:
    """What the edit did to what else is known of the same people; empty where there is nothing else."""
    if "spared_recall" not in chosen.twins:
        return ""
    recall = chosen.twins.set_index("edit")["spared_recall"].astype(float).to_dict()
    before, after = recall["unedited"], recall["located"]
    return (
        f"What else is known of the same {noun} was not to be forgotten: recall {before:.1%} before, {after:.1%} after."
    )
