"""One linear probe per site and method, out of fold by group, never without its controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor
from tqdm.auto import tqdm

from probe import _rows, _stats
from probe.data import group_folds
from probe.errors import DataError
from probe.probing import controls
from probe.probing.probes import METHODS, Fitter, Logistic
from probe.targets import Scores

_N_MEMORISED = 3  # labellings for the split that ignores groups: its mean is all that is shown
_FEW_GROUPS = 10  # fewer per class than this, and the interval is coarse


@dataclass(frozen=True)
class _Design:
    """What all sites and methods share: rows, folds, labellings (the real one first) and bootstrap draws."""

    rows: _rows.Rows
    folds: list[tuple[ndarray, ndarray]]
    y: Int[ndarray, "n label"]
    fold: Int[ndarray, " n"]
    weights: Float[ndarray, "boot group"]
    seed: int

    @property
    def has_repeats(self) -> bool:
        """Whether any group has several rows (otherwise a split by rows is a split by groups)."""
        return self.rows.n_groups < len(self.rows)


def sweep(
    cache: Any,
    label: str | Sequence[Any],
    group: str | Sequence[Any] | None = None,
    sites: str | Sequence[str] | None = None,
    methods: Sequence[str | Fitter] = ("mean_diff", "logistic"),
    *,
    positive: Any = None,
    rows: _rows.Mode = "last",
    sequences: Any = None,
    folds: int = 5,
    seed: int = 0,
    n_boot: int = 1000,
    n_controls: int = 20,
    l2: float = 1.0,
    model: Any = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Scores:
    """Fit linear probes at every site of a cache and score them on groups that they were not fitted on.

    `score` is the balanced accuracy out of fold. Its interval is a bootstrap over groups, widened by what the shuffled
    labels show that bootstrapping misses (`probe._stats.overlap_ratio`). Standardisation is fitted in training folds.
    The vectors are the unit directions, in activation space, of probes fitted on all rows. Cost: sites x methods x
    folds fits, real label and controls together; one site in memory at a time (12 bytes x rows x width).

    Args:
        cache: what `activations_cache.open` returns.
        label: column of the cache, or one value per sequence (or per stored row). Two classes, or any with `positive`.
        group: what must not be on both sides of a split, as `label`. None: each sequence is its own group.
        sites: names or patterns; None: every floating-point site of the cache.
        methods: names of `probe.probing.METHODS`, or fitters with `name` and `fit`.
        positive: the class that counts as 1; the directions point to it.
        rows: "last" stored row of each sequence, "mean" over its rows, or "all" rows.
        sequences: numbers or a mask of the sequences to use (the split that locates); None for all.
        folds: number of folds; reduced, with a warning, where a class has fewer groups.
        seed: folds, bootstrap and permutations.
        n_boot: bootstrap replicates.
        n_controls: shuffled labellings; the smallest p-value is 1 / (1 + n_controls).
        l2: penalty of "logistic" (scikit-learn's 1 / C), on standardised rows.
        model: when given, refused unless it is the model that the cache was captured from.
        device: where probes are fitted; default the CPU.
        progress: show a bar.

    Returns:
        Scores of kind "direction", a row per site and method: `site, layer, method, score, low, high, auc, auc_low,
        auc_high, accuracy, control, control_low, control_high, selectivity, p, memorised, majority,
        majority_accuracy, bag_of_tokens, n, n_groups`. `control` is the mean over shuffled labels, with the 95 % range
        of single ones; `selectivity` = score - control (Hewitt and Liang 2019); `p` is corrected for all sites and
        methods tried (maximum over them in every shuffled labelling); `memorised` is what shuffled labels reach when
        folds ignore groups; baselines are balanced accuracies on the same folds.

    Raises:
        LabelError: labels of one class, NaN, missing, of another length, or groups that allow no split.
        SiteError: a site that the cache does not have.
        DataError: activations that are not finite, an unknown method.
        CacheMismatchError: the cache is of another model than `model`.
    """
    names = _rows.resolve_sites(cache, sites)
    model_hash = _rows.model_hash(cache, model)
    fitters = _fitters(methods, l2)
    chosen = _rows.select(cache, label, group, positive, rows, sequences)
    design = _design(chosen, folds, seed, n_boot, n_controls)
    baselines = _baselines(cache, design, l2)
    results: list[_Result] = []
    for site in tqdm(names, desc="probing", unit="site", disable=not progress):
        x = chosen.read(cache, site).to(device or "cpu")
        results += [_probe(site, x, fitter, design) for fitter in fitters]
    settings = {
        **chosen.settings(label, group),
        "folds": len(design.folds),
        "seed": seed,
        "n_boot": n_boot,
        "n_controls": n_controls,
        "l2": l2,
        "bag_of_tokens_auc": baselines["bag_of_tokens_auc"],
    }
    return _scores(results, design, baselines, settings, model_hash, folds)


def _fitters(methods: Sequence[str | Fitter], l2: float) -> list[Fitter]:
    if isinstance(methods, str):
        methods = [methods]
    unknown = [m for m in methods if isinstance(m, str) and m not in METHODS]
    if unknown or not methods:
        raise DataError(f"methods must name probes among {', '.join(METHODS)}; got {list(methods)}.")
    made = {"logistic": lambda: Logistic(l2)}
    return [made.get(m, METHODS[m])() if isinstance(m, str) else m for m in methods]


def _design(rows: _rows.Rows, n_folds: int, seed: int, n_boot: int, n_controls: int) -> _Design:
    if n_folds < 2 or n_controls < 1 or n_boot < 1:
        raise DataError(
            f"folds must be at least 2, n_controls and n_boot at least 1; got {n_folds}, {n_controls}, {n_boot}."
        )
    folds = group_folds(rows.groups.tolist(), n_folds, seed, rows.y.tolist())
    shuffled = controls.shuffled_labels(rows, folds, n_controls, seed)
    weights = _stats.resample_groups(rows.groups, rows.y, n_boot, np.random.default_rng([seed, 0]))
    y = np.concatenate([rows.y[:, None], shuffled], axis=1)
    return _Design(rows, folds, y, controls.fold_of(folds, len(rows)), weights, seed)


def _baselines(cache: Any, design: _Design, l2: float) -> dict[str, float]:
    rows = design.rows
    balanced, plain = controls.majority(rows.y, design.folds)
    scores = controls.bag_of_tokens(cache, rows, design.folds, l2)
    hit = (scores > 0) == rows.y
    bag = float(_stats.balanced_accuracy(hit[:, None], rows.y[:, None])[0])
    low, high = _stats.interval(_stats.balanced_accuracy_bootstrap(hit, rows.y, rows.groups, design.weights))
    return {
        "majority": balanced,
        "majority_accuracy": plain,
        "bag_of_tokens": bag,
        "bag_of_tokens_low": float(low),
        "bag_of_tokens_high": float(high),
        "bag_of_tokens_auc": _stats.auc(scores, rows.y, design.fold),
    }


@dataclass(frozen=True)
class _Result:
    """One probe: its row of the table, its controls' scores, its direction."""

    record: dict[str, Any]
    control: Float[ndarray, " control"]
    direction: Float[Tensor, " d"]
    width: int


def _probe(site: str, x: Float[Tensor, "n d"], fitter: Fitter, design: _Design) -> _Result:
    """Fit and score one method at one site, on the real and the shuffled labels together."""
    y, groups = design.y, design.rows.groups
    labels = torch.as_tensor(y, device=x.device)
    scores = controls.out_of_fold(fitter, x, labels, design.folds)  # [n, label]
    hit = (scores > 0) == y
    estimate = _stats.balanced_accuracy(hit, y)  # [label]
    ratio = _stats.overlap_ratio(hit[:, 1:], y[:, 1:], groups, design.weights[:100])
    draws = _stats.balanced_accuracy_bootstrap(hit[:, 0], y[:, 0], groups, design.weights)
    low, high = _stats.widened(estimate[0], draws, ratio)
    area = _stats.auc(scores[:, 0], y[:, 0], design.fold)
    area_draws = _stats.auc_bootstrap(scores[:, 0], y[:, 0], groups, design.weights, design.fold)
    area_low, area_high = _stats.widened(area, area_draws, ratio)
    control_low, control_high = _stats.interval(estimate[1:])
    record = {
        "site": site,
        "layer": _rows.layer_of(site),
        "method": fitter.name,
        "score": estimate[0],
        "low": low,
        "high": high,
        "auc": area,
        "auc_low": area_low,
        "auc_high": area_high,
        "accuracy": hit[:, 0].mean(),
        "control": estimate[1:].mean(),
        "control_low": control_low,
        "control_high": control_high,
        "selectivity": estimate[0] - estimate[1:].mean(),
        "memorised": _memorised(fitter, x, design, float(estimate[1:].mean())),
    }
    direction = fitter.fit(x, labels[:, :1]).directions[:, 0].float().cpu()
    return _Result(record, estimate[1:], direction, x.shape[1])


def _memorised(fitter: Fitter, x: Float[Tensor, "n d"], design: _Design, control: float) -> float:
    if not design.has_repeats:
        return control
    return controls.memorised(fitter, x, design.y[:, 1 : 1 + _N_MEMORISED], len(design.folds), design.seed)


def _scores(
    results: list[_Result],
    design: _Design,
    baselines: dict[str, float],
    settings: dict[str, Any],
    model_hash: str,
    folds_asked: int,
) -> Scores:
    table = pd.DataFrame([result.record for result in results])
    table["layer"] = table["layer"].astype("Int64")
    null = np.stack([result.control for result in results])  # [tested, control]
    table.insert(list(table).index("memorised"), "p", _stats.corrected_p(table["score"].to_numpy(), null))
    for name in ("majority", "majority_accuracy", "bag_of_tokens"):
        table[name] = baselines[name]
    table["n"], table["n_groups"] = len(design.rows), design.rows.n_groups
    width = max(result.width for result in results)
    settings = {**settings, "warnings": _warnings(table, design, baselines, width, folds_asked)}
    return Scores(
        method="probing.sweep",
        kind="direction",
        table=table,
        score_name="balanced accuracy",
        twins=null,
        twins_note="the same probe on labels permuted between groups",
        controls={"shuffled": _shuffled_table(table, null), "baselines": pd.DataFrame([baselines])},
        settings=settings,
        model_hash=model_hash,
        vectors={i: result.direction for i, result in enumerate(results)},
    )


def _shuffled_table(table: pd.DataFrame, null: Float[ndarray, "tested control"]) -> pd.DataFrame:
    """One row per probe and shuffled labelling."""
    n = null.shape[1]
    long = table.loc[table.index.repeat(n), ["site", "layer", "method"]].reset_index(drop=True)
    return long.assign(control=np.tile(np.arange(n), len(table)), score=null.ravel())


def _warnings(
    table: pd.DataFrame, design: _Design, baselines: dict[str, float], width: int, folds_asked: int
) -> list[str]:
    """What a reader must know before believing the table."""
    rows, best = design.rows, table.iloc[int(table["score"].to_numpy().argmax())]
    smallest = min(len(np.unique(rows.groups[rows.y == c])) for c in (0, 1))
    n_train = min(len(train) for train, _ in design.folds)
    found = [
        (
            not rows.grouped,
            "no group was given, so each sequence is its own; where sequences share a person, scores are too high.",
        ),
        (
            smallest < _FEW_GROUPS,
            f"the rarer class has {smallest} groups: the interval and the control rest on few independent units.",
        ),
        (
            n_train < width,
            f"fewer rows to fit on ({n_train}) than dimensions ({width}): a probe can fit any labels of them; "
            "only the out-of-fold score means something.",
        ),
        (
            len(design.folds) < folds_asked,
            f"{len(design.folds)} folds instead of {folds_asked}, as many as the rarer class has groups.",
        ),
        (
            best["p"] > 0.05,
            f"the best score is not above shuffled labels, corrected for {len(table)} probes (p = {best['p']:.2f}).",
        ),
        (
            baselines["bag_of_tokens"] >= best["low"],
            f"a bag of tokens reaches {baselines['bag_of_tokens']:.2f} without the model, not below the best probe.",
        ),
    ]
    return [text for holds, text in found if holds]
