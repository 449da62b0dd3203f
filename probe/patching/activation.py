"""Exact activation patching by layer and position, or by layer and head, over a data set of pairs.

Denoising puts an activation of the clean run into the corrupted run and asks how much of the clean behaviour returns;
noising puts the corrupted activation into the clean run and asks how much is lost (Heimersheim and Nanda, arXiv
2404.15255; the method is Vig et al.'s and, for facts, Meng et al.'s causal tracing, arXiv 2202.05262).

Pairs of different length need a rule that says which positions share a column (`align`). `"start"` and `"end"` count
from there, restricted to positions that all pairs have; `"auto"` is as `positions` are counted, else `"start"` where
all pairs are equally long, else `"end"`. `"span"` patches by role, the positions of a role together: before the first
changed token; first, middle, last changed token; all from the first to the last changed one; after them; the last token
of the prompt.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from probe._means import GroupMeans, group_means
from probe.data import Pairs
from probe.errors import PatchError
from probe.patching import metrics
from probe.patching._engine import Effects, Plan, Sweep, batches
from probe.patching._pairs import Slot, Tokenised, as_pairs, choose_align, labels, slots, tokenise
from probe.scoring import eval_mode
from probe.targets import Scores

if TYPE_CHECKING:
    from probe.models import Model

__all__ = ["COMPONENTS", "patch"]

COMPONENTS: dict[str, str] = {
    "resid_pre": "blocks.*.hook_resid_pre",
    "resid_mid": "blocks.*.hook_resid_mid",
    "resid_post": "blocks.*.hook_resid_post",
    "attn_out": "blocks.*.hook_attn_out",
    "mlp_out": "blocks.*.hook_mlp_out",
    "z": "blocks.*.attn.hook_z",
}
"""What can be patched, and its site. `z` is patched head by head, the others by position."""


def patch(
    model: Model,
    clean: Pairs | str | Sequence[str],
    corrupted: str | Sequence[str] | None = None,
    metric: str | Callable[..., Tensor] = "logit_diff",
    component: str = "resid_pre",
    *,
    answer: str | Sequence[str] | None = None,
    wrong: str | Sequence[str] | None = None,
    direction: Literal["denoise", "noise"] = "denoise",
    layers: int | Sequence[int] | None = None,
    positions: Sequence[int] | Literal["all"] | None = None,
    align: Literal["auto", "start", "end", "span"] = "auto",
    bos: bool | None = None,
    batch_size: int = 64,
    n_random: int = 1,
    min_gap: float = 0.05,
    seed: int = 0,
    n_boot: int = 1000,
    progress: bool = True,
) -> Scores:
    """Patch every (layer, position), or every (layer, head), and measure how much of the clean behaviour it carries.

    For each pair, `score = (m(patched) - m(corrupted)) / (m(clean) - m(corrupted))` when denoising: 0 is the corrupted
    run, 1 the clean one. When noising, `score = (m(clean) - m(patched)) / (m(clean) - m(corrupted))`: the share that is
    lost, so that higher always means more involved; the column `normalised` keeps corrupted 0 and clean 1 in both. A
    cell is the mean over pairs, with a 95 % bootstrap interval over the pairs' groups (NaN for fewer than two groups).

    Args:
        model: The model, with its tokenizer.
        clean: `Pairs`, or the clean prompt(s).
        corrupted: Corrupted prompt(s), each of as many tokens as its clean one. Not with `Pairs`.
        metric: `"logit_diff"` (at the first token at which `answer` and `wrong` differ; what they share before it is
            appended to both prompts), `"log_prob"` (of the answer's first token), or a function `f(logits)` or
            `f(logits, answer, wrong)` of the logits at the last position [batch, d_vocab] and token ids [batch], that
            gives [batch]. Answers follow the prompt after one space.
        component: A key of `COMPONENTS`.
        answer: Right continuation(s) of the clean prompt. Not with `Pairs`.
        wrong: What to compare with, for `logit_diff`. Not with `Pairs`.
        direction: `"denoise"` (clean into corrupted) or `"noise"` (corrupted into clean).
        layers: Layers to patch; default all.
        positions: Token positions to patch one by one, from the front, or negative ones from the end; `"all"` patches
            the whole sequence of a layer at once. Default every position that all pairs have. With `component="z"` the
            given positions are patched together, by default all.
        align: How positions of pairs of different length are put into one column; see the module.
        bos: Whether a BOS token comes first; None leaves it to the tokenizer.
        batch_size: Runs per forward; bounds the memory.
        n_random: Random twins per pair and cell: instead of the difference of the two runs, a random vector of the same
            norm (at each position, and head) is added to the base run. 0 for none.
        min_gap: Pairs with |m(clean) - m(corrupted)| below this share of the largest are left out, because a share of
            nearly nothing means nothing. They are counted in the warnings.
        seed: Of the twins and the bootstrap. The result does not depend on `batch_size`, but for rounding.
        n_boot: Bootstrap replicates.
        progress: Show a bar over the patched runs.

    Returns:
        Scores of kind `"position"` with columns layer, position, token, site, score, low, high, raw (mean metric),
        normalised, twin_mean, twin_low, twin_high, n; `.top(1)` is the mean difference clean - corrupted at the best
        cell, as a `Direction`. For `z`, kind `"head"` with `head` in place of position and token; `.top(k)` is `Heads`.
        `.twins` holds one score per twin and cell, each a mean over the pairs, as `score` is. The control `pairs` lists
        each pair with its metrics and whether it was used.

    Raises:
        PatchError: No pairs; prompts of different length or without a difference; answers without a differing token; a
            metric that is not finite; no pair that the metric tells apart; positions or settings out of range.
        SiteError: A component that the architecture lacks (GPT-NeoX with parallel residuals has no resid_mid).
    """
    _check_settings(component, direction, batch_size, n_random, min_gap)
    measure, pairs = _read_pairs(model, clean, corrupted, metric, answer, wrong, bos)
    chosen = choose_align(pairs, align, positions)
    own, keys = _slots(pairs, chosen, positions, component)
    found_sites = tuple(model.sites.resolve(COMPONENTS[component], layers))
    heads = found_sites[0].shape[0] if component == "z" else 0
    plan = Plan(found_sites, heads, direction == "denoise", measure, n_random, batch_size, seed)
    with torch.no_grad(), eval_mode(model.hf):
        effects = _run(model.hf, pairs, own, plan, progress)
    used = _usable(effects, min_gap)
    settings = {
        "metric": measure.name, "component": component, "direction": direction, "align": chosen, "bos": bos,
        "n_pairs": len(pairs), "n_used": int(used.sum()), "n_random": n_random, "min_gap": min_gap, "seed": seed,
        "n_boot": n_boot, "batch_size": batch_size, "warnings": _warnings(pairs, effects, used, min_gap),
    }  # fmt: skip
    cells = _Cells(plan, tuple(keys), tuple(labels(model, pairs, keys, chosen)))
    return _scores(cells, pairs, own, effects, used, settings, model.weights_hash)


def _scores(
    cells: _Cells,
    pairs: Sequence[Tokenised],
    own: Sequence[Sequence[Slot]],
    effects: Sequence[Effects],
    used: Bool[np.ndarray, " pair"],
    settings: dict[str, Any],
    model_hash: str,
) -> Scores:
    """The result of the runs: the table, the twins, the pairs as a control, the directions."""
    plan = cells.plan
    table, twins = _table(cells, pairs, own, effects, used, settings["n_boot"])
    return Scores(
        method=f"activation patching ({settings['direction']}, {settings['component']})",
        kind="head" if plan.heads else "position",
        table=table,
        score_name=f"share of {plan.metric.name} {'restored' if plan.denoise else 'lost'}",
        twins=twins,
        twins_note="a random vector of the same norm as the difference of the two runs, added to the base run",
        controls={"pairs": _pair_table(pairs, effects, used, plan.metric.unit)},
        settings=settings | ({"n_heads": plan.heads} if plan.heads else {}),
        model_hash=model_hash,
        vectors={} if plan.heads else _vectors(cells, own, effects, used),
    )


def _check_settings(component: str, direction: str, batch_size: int, n_random: int, min_gap: float) -> None:
    if component not in COMPONENTS:
        raise PatchError(f"component must be one of {', '.join(COMPONENTS)}; got {component!r}")
    if direction not in ("denoise", "noise"):
        raise PatchError(f"direction must be 'denoise' or 'noise'; got {direction!r}")
    if batch_size < 1 or n_random < 0 or not 0 <= min_gap < 1:
        raise PatchError(
            "patch needs batch_size >= 1, n_random >= 0 and 0 <= min_gap < 1; "
            f"got batch_size={batch_size}, n_random={n_random}, min_gap={min_gap}"
        )


def _read_pairs(
    model: Model, clean: Any, corrupted: Any, metric: Any, answer: Any, wrong: Any, bos: bool | None
) -> tuple[metrics.Metric, list[Tokenised]]:
    rows = as_pairs(clean, corrupted, answer, wrong)
    measure = metrics.resolve(metric, all(row.answer for row in rows), all(row.wrong for row in rows))
    return measure, tokenise(model, rows, reads=measure.reads, bos=bos)


def _slots(
    pairs: Sequence[Tokenised], align: str, positions: Sequence[int] | str | None, component: str
) -> tuple[list[list[Slot]], list[int | str]]:
    """Slots as `positions` says; for heads one slot of all the positions together."""
    if component != "z":
        return slots(pairs, align, positions)
    own, _ = slots(pairs, align, "all" if positions is None and align != "span" else positions)
    return [[Slot("all", tuple({p for slot in pair for p in slot.positions}))] for pair in own], ["all"]


def _run(
    hf: Any, pairs: Sequence[Tokenised], own: Sequence[Sequence[Slot]], plan: Plan, progress: bool
) -> list[Effects]:
    cells = sum(map(len, own)) * len(plan.sites) * max(plan.heads, 1) * (1 + plan.n_random)
    found: dict[int, Effects] = {}
    with tqdm(total=cells, desc="patching", unit="run", disable=not progress) as bar:
        for batch in batches(pairs, own, plan.batch_size):
            for step in Sweep(hf, batch, plan).run():
                if isinstance(step, int):
                    bar.update(step)
                else:
                    found.update(zip(batch.index, step, strict=True))
    return [found[i] for i in range(len(pairs))]


def _usable(effects: Sequence[Effects], min_gap: float) -> Bool[np.ndarray, " pair"]:
    """Pairs whose clean and corrupted runs the metric tells apart.

    Raises:
        PatchError: It tells none apart.
    """
    gap = np.abs([effect.clean - effect.corrupted for effect in effects])
    level = np.abs([effect.clean for effect in effects])
    used = (gap >= min_gap * gap.max()) & (gap > 1e-5 * (1 + level))
    if not used.any():
        raise PatchError(
            f"the metric is the same on clean and corrupted prompts (largest difference {gap.max():.2g} over "
            f"{len(effects)} pairs), so there is nothing to normalise by; choose pairs on which it differs"
        )
    return used


def _warnings(
    pairs: Sequence[Tokenised], effects: Sequence[Effects], used: Bool[np.ndarray, " pair"], min_gap: float
) -> list[str]:
    notes = []
    if not used.all():
        names = [pair.id for pair, keep in zip(pairs, used, strict=True) if not keep]
        notes.append(
            f"{len(names)} of {len(pairs)} pairs left out: clean and corrupted differ by less than {min_gap:g} of the "
            f"largest difference ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
        )
    up = np.array([effect.clean > effect.corrupted for effect in effects])[used]
    if 0 < up.sum() < len(up):
        notes.append(f"the metric is higher on clean in {up.sum()} pairs and lower in {len(up) - up.sum()}")
    shared = sum(pair.shared > 0 for pair in pairs)
    if shared:
        notes.append(f"{shared} pairs: answer and wrong begin alike; the shared tokens were appended to the prompts")
    if len({pair.group for pair, keep in zip(pairs, used, strict=True) if keep}) < 2:
        notes.append("fewer than two groups: there is no interval")
    if not used.all():
        warnings.warn(notes[0], UserWarning, stacklevel=3)
    return notes


@dataclass(frozen=True)
class _Cells:
    """The rows of the table: the product of layers, keys and heads, in this order.

    Attributes:
        plan: What was done.
        keys: Slot keys.
        tokens: A label per key.
    """

    plan: Plan
    keys: tuple[int | str, ...]
    tokens: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.plan.sites), len(self.keys), max(self.plan.heads, 1)

    def frame(self) -> pd.DataFrame:
        """layer, site and position with token, or head."""
        rows = itertools.product(self.plan.sites, zip(self.keys, self.tokens, strict=True), range(self.shape[2]))
        frame = pd.DataFrame(
            [(site.layer, key, token, head, site.name) for site, (key, token), head in rows],
            columns=["layer", "position", "token", "head", "site"],
        )
        return frame.drop(columns=["position", "token"] if self.plan.heads else "head")

    def spread(self, own: Sequence[Slot], values: Float[np.ndarray, "variant layer slot head"]) -> np.ndarray:
        """One pair's values laid out over the cells, NaN where it has no such slot: [variant, cell]."""
        full = np.full((len(values), *self.shape), np.nan)
        full[:, :, [self.keys.index(slot.key) for slot in own]] = values
        return full.reshape(len(values), -1)


def _table(
    cells: _Cells,
    pairs: Sequence[Tokenised],
    own: Sequence[Sequence[Slot]],
    effects: Sequence[Effects],
    used: Bool[np.ndarray, " pair"],
    n_boot: int,
) -> tuple[pd.DataFrame, Float[np.ndarray, "draw cell"] | None]:
    """The table of the scores, and the score of every random twin."""
    keep = np.flatnonzero(used).tolist()
    raw = np.stack([cells.spread(own[i], effects[i].raw) for i in keep])  # [pair, variant, cell]
    ends = np.array([(effects[i].corrupted, effects[i].clean) for i in keep])[..., None, None]  # [pair, 2, 1, 1]
    normalised = (raw - ends[:, 0]) / (ends[:, 1] - ends[:, 0])
    score = normalised if cells.plan.denoise else 1 - normalised
    groups = [pairs[i].group for i in keep]

    def means(values: np.ndarray) -> GroupMeans:
        return group_means(values, groups, n_boot=n_boot, seed=cells.plan.seed)

    main = means(score[:, 0])
    table = cells.frame().assign(
        score=main.mean, low=main.low, high=main.high, raw=_mean(raw[:, 0]), normalised=_mean(normalised[:, 0])
    )
    draws = None
    if cells.plan.n_random:
        twins = means(score[:, 1:].mean(1))
        table = table.assign(twin_mean=twins.mean, twin_low=twins.low, twin_high=twins.high)
        draws = _mean(score[:, 1:])  # [draw, cell]
    return table.assign(n=main.n), draws


def _mean(values: Float[np.ndarray, "pair *rest"]) -> Float[np.ndarray, " *rest"]:
    """Mean over the pairs that have the cell (every cell is some used pair's or NaN)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a role that only pairs left out have: NaN is the answer
        return np.nanmean(values, axis=0)


def _pair_table(
    pairs: Sequence[Tokenised], effects: Sequence[Effects], used: Bool[np.ndarray, " pair"], unit: str
) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "id": [pair.id for pair in pairs],
            "group": [pair.group for pair in pairs],
            "n_tokens": [len(pair) for pair in pairs],
            "clean": [effect.clean for effect in effects],
            "corrupted": [effect.corrupted for effect in effects],
            "unit": unit,
            "used": used,
        }
    )


def _vectors(
    cells: _Cells, own: Sequence[Sequence[Slot]], effects: Sequence[Effects], used: Bool[np.ndarray, " pair"]
) -> dict[int, Tensor]:
    """Per row the mean difference clean - corrupted, scaled to unit norm; none where it is zero."""
    n_layers, n_keys, _ = cells.shape
    total = torch.zeros(n_layers, n_keys, *effects[0].difference.shape[2:])  # [layer, key, d_model]
    for i in np.flatnonzero(used).tolist():
        columns = [cells.keys.index(slot.key) for slot in own[i]]
        total[:, columns] += effects[i].difference
    flat = total.flatten(0, 1)  # [row, d_model]
    norms = flat.norm(dim=-1)
    return {row: flat[row] / norms[row] for row in range(len(flat)) if norms[row] > 0}
