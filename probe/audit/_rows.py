"""From measurements to the rows of the card: ratios of sums per group, paired bootstraps, KL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from probe.audit._measure import KL_SETS, LogProbs, Measured
from probe.audit._numbers import Estimate, Metric, Number, Ratio, by_group, same
from probe.errors import AuditError

COLUMNS = ("set", "metric", "model", "value", "low", "high", "n", "unit", "n_of", "n_groups", "interval")
UNITS = {"recall": "share of answers exact", "probability": "probability per token", "perplexity": ""}
_KL_CELLS = 2**24  # log-probabilities that a KL takes at a time, in float64


def answer_rows(measured: Mapping[str, Measured], n_boot: int, seed: int, people: str) -> list[dict[str, Any]]:
    """Recall and probability, per set and model."""
    rows = []
    for name in measured["original"].answers:
        for metric, attribute, share in (("recall", "exact", True), ("probability", "prob", False)):
            ratios = {}
            for model, one in measured.items():
                scores = one.answers[name]
                ratios[model] = by_group(getattr(scores, attribute), scores.groups, share=share)
            common = {"set": name, "metric": metric, "unit": UNITS[metric], "n_of": "questions"}
            rows += _side_by_side(ratios, common, n_boot, seed, people)
    return rows


def corpus_rows(measured: Mapping[str, Measured], n_boot: int, seed: int) -> list[dict[str, Any]]:
    """Perplexity, per model; none without a corpus."""
    if len(measured["original"].loss) == 0:
        return []
    ratios = {model: Ratio(one.loss, one.n_tokens.astype(float), np.exp) for model, one in measured.items()}
    common = {"set": "corpus", "metric": "perplexity", "unit": UNITS["perplexity"], "n_of": "tokens"}
    return _side_by_side(ratios, common, n_boot, seed, "texts")


def distance_rows(measured: Mapping[str, Measured], n_boot: int, seed: int, people: str) -> list[dict[str, Any]]:
    """KL to the original, and both ways between each model and gold, on forget and retain."""
    rows = []
    for name in KL_SETS:
        logprobs = {model: one.logprobs[name] for model, one in measured.items()}
        golds = [model for model in logprobs if model.startswith("gold")]
        pairs = _Pairs(logprobs, {"set": name, "unit": "nats", "n_of": "answer tokens"}, n_boot, seed, people)
        others = [model for model in ("original", "edited") if model in logprobs]
        if "edited" in logprobs:
            rows.append(pairs.row("kl_original_model", "edited", [("original", "edited")]))
        if golds:
            rows.append(pairs.seeds("kl_original_model", [("original", gold) for gold in golds]))
            for model in others:
                rows.append(pairs.row("kl_gold_model", model, [(gold, model) for gold in golds]))
                rows.append(pairs.row("kl_model_gold", model, [(model, gold) for gold in golds]))
        if len(golds) > 1:
            floor = list(permutations(golds, 2))
            rows += [pairs.seeds(metric, floor) for metric in ("kl_gold_model", "kl_model_gold")]
    return rows


def part_rows(
    numbers: Mapping[str, Sequence[Number]], metrics: Mapping[str, Metric], n_boot: int, seed: int, people: str
) -> list[dict[str, Any]]:
    """Rows of the parts' numbers, a metric of a set at a time, in the order in which the parts gave them.

    Raises:
        AuditError: A part gave a number twice, or one of a metric that it does not declare.
    """
    found: dict[tuple[str, str], dict[str, Ratio | Estimate]] = {}
    for role, own in numbers.items():
        for number in own:
            if number.metric not in metrics:
                raise AuditError(f"{number.metric!r} is no metric of a part that was measured")
            values = found.setdefault((number.set, number.metric), {})
            if role in values:
                raise AuditError(f"{number.metric!r} of {role} on {number.set!r} was given twice")
            values[role] = number.value
    rows = []
    for (name, metric), values in found.items():
        what = metrics[metric]
        common = {"set": name, "metric": metric, "unit": what.unit, "n_of": what.of}
        ratios = {r: replace(v, share=what.share) for r, v in values.items() if isinstance(v, Ratio)}
        if len(ratios) == len(values):
            rows += _side_by_side(ratios, common, n_boot, seed, people)
        else:
            rows += _estimates(values, common, n_boot, seed, people, what.share)
    return rows


def _estimates(
    values: Mapping[str, Ratio | Estimate], common: dict[str, str], n_boot: int, seed: int, people: str, share: bool
) -> list[dict[str, Any]]:
    """Every model's row, the change without an interval, and gold's mean with its spread."""
    rows = []
    for role, value in values.items():
        if isinstance(value, Ratio):
            value = replace(value, share=share)
            rows.append(_bootstrapped(value, {**common, "model": role}, n_boot, seed, people))
            continue
        own = {"value": value.value, "low": value.low, "high": value.high, "n": value.n, "n_groups": value.n_groups}
        rows.append({**common, **own, "model": role, "interval": value.how})
    rows.sort(key=lambda row: (row["model"].startswith("gold"), row["model"] == "edited"))
    if {"original", "edited"} <= set(values):
        change = values["edited"].value - values["original"].value
        first = rows[0]
        own = {"value": change, "low": np.nan, "high": np.nan, "n": first["n"], "n_groups": first["n_groups"]}
        rows.append({**common, **own, "model": "change", "interval": "none: no paired bootstrap of this metric"})
    golds = [row for row in rows if row["model"].startswith("gold ")]
    if golds:
        what = {**common, "n_of": "golds", "n_groups": golds[0]["n_groups"]}
        rows.append(_spread([row["value"] for row in golds], what))
    return rows


def group_table(measured: Mapping[str, Measured], numbers: Mapping[str, Sequence[Number]]) -> pd.DataFrame:
    """The sums per group that ratios were made of: what a bootstrap over several cards needs.

    Columns: set, metric, model, number (of the group, in sorted order), top, bottom. Ratios under a function, such as
    perplexity, are left out.
    """
    found: list[tuple[str, str, str, Ratio]] = []
    for role, one in measured.items():
        for name, scores in one.answers.items():
            for metric, attribute in (("recall", "exact"), ("probability", "prob")):
                found.append((name, metric, role, by_group(getattr(scores, attribute), scores.groups)))
    for role, own in numbers.items():
        found += [(n.set, n.metric, role, n.value) for n in own if isinstance(n.value, Ratio)]
    plain = [one for one in found if one[3].plain]
    frames = [
        pd.DataFrame(
            {"set": s, "metric": m, "model": role, "number": range(len(r.top)), "top": r.top, "bottom": r.bottom}
        )
        for s, m, role, r in plain
    ]
    return pd.concat(frames, ignore_index=True)


def kl(p: Float[Tensor, "token d_vocab"], q: Float[Tensor, "token d_vocab"]) -> Float[np.ndarray, " token"]:
    """KL(p‖q) = Σ p (log p − log q) in nats at each token, from log-probabilities; rounding below 0 is cut off."""
    step = max(1, _KL_CELLS // p.shape[-1])
    parts = []
    for start in range(0, len(p), step):
        own, other = p[start : start + step].double(), q[start : start + step].double()
        parts.append((own.exp() * (own - other)).sum(-1).clamp_min(0))  # [step]
    return torch.cat(parts).numpy()


def to_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The card's table, its columns in their order."""
    return pd.DataFrame(rows, columns=list(COLUMNS))


class _Pairs:
    """Divergences between the models of one set; each pair is computed once."""

    def __init__(
        self, logprobs: Mapping[str, LogProbs], common: dict[str, str], n_boot: int, seed: int, people: str
    ) -> None:
        self.logprobs, self.common, self.n_boot, self.seed, self.people = logprobs, common, n_boot, seed, people
        self.known: dict[tuple[str, str], Float[np.ndarray, " token"]] = {}

    def of(self, pair: tuple[str, str]) -> Float[np.ndarray, " token"]:
        if pair not in self.known:
            p, q = pair
            self.known[pair] = kl(self.logprobs[p].values, self.logprobs[q].values)
        return self.known[pair]

    def row(self, metric: str, model: str, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """The mean over pairs (over golds), its interval over people."""
        groups = next(iter(self.logprobs.values())).groups
        ratio = by_group(np.mean([self.of(pair) for pair in pairs], axis=0), groups)
        common = {**self.common, "metric": metric, "model": model}
        return _bootstrapped(ratio, common, self.n_boot, self.seed, self.people)

    def seeds(self, metric: str, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """Gold's row: the mean over pairs, and the lowest and the highest pair."""
        values = [float(self.of(pair).mean()) for pair in pairs]
        n_groups = len(set(next(iter(self.logprobs.values())).groups))
        what = "pairs of golds" if pairs[0][0] != "original" else "golds"
        return _spread(values, {**self.common, "metric": metric, "n_of": what, "n_groups": n_groups})


def _side_by_side(
    ratios: Mapping[str, Ratio], common: dict[str, str], n_boot: int, seed: int, people: str
) -> list[dict[str, Any]]:
    """Every model's row, the paired change, and gold's mean with its spread."""
    rows = [_bootstrapped(r, {**common, "model": model}, n_boot, seed, people) for model, r in ratios.items()]
    rows.sort(key=lambda row: (row["model"].startswith("gold"), row["model"] == "edited"))
    if "edited" in ratios:
        rows.append(_change(ratios["original"], ratios["edited"], common, n_boot, seed, people))
    golds = [ratio for model, ratio in ratios.items() if model.startswith("gold")]
    if golds:
        what = {**common, "n_of": "golds", "n_groups": len(golds[0].top)}
        rows.append(_spread([ratio.value for ratio in golds], what))
    return rows


def _bootstrapped(ratio: Ratio, common: dict[str, str], n_boot: int, seed: int, people: str) -> dict[str, Any]:
    low, high = ratio.interval(n_boot, seed)
    how = f"95 %, Clopper-Pearson over {people}, all alike" if ratio.alike else f"95 %, bootstrap over {people}"
    how = "none: one group" if np.isnan(low) else how
    numbers = {"value": ratio.value, "low": low, "high": high, "n": int(ratio.bottom.sum())}
    return {**common, **numbers, "n_groups": len(ratio.top), "interval": how}


def _change(before: Ratio, after: Ratio, common: dict[str, str], n_boot: int, seed: int, people: str) -> dict[str, Any]:
    """Edited minus original, with the interval of the paired difference; none where a share changed alike in all."""
    low = high = np.nan
    n = len(before.top)
    if n < 2:
        how = "none: one group"
    elif before.share and same(after.top / after.bottom - before.top / before.bottom):
        how = f"none: all {n} {people} changed alike"
    else:
        draws = after.draws(n_boot, seed) - before.draws(n_boot, seed)
        low, high = (float(end) for end in np.quantile(draws, [0.025, 0.975]))
        how = f"95 %, paired bootstrap over {people}"
    numbers = {"value": after.value - before.value, "low": low, "high": high, "n": int(before.bottom.sum())}
    return {**common, **numbers, "model": "change", "n_groups": n, "interval": how}


def _spread(values: Sequence[float], common: Mapping[str, Any]) -> dict[str, Any]:
    """Gold: the mean over seeds, the lowest and the highest; no spread from one."""
    ends = (min(values), max(values)) if len(values) > 1 else (np.nan, np.nan)
    how = "lowest and highest" if len(values) > 1 else "none: one gold"
    numbers = {"value": float(np.mean(values)), "low": ends[0], "high": ends[1], "n": len(values)}
    return {**common, **numbers, "model": "gold", "interval": how}
