"""Score SAE latents by how they separate two label sets, with intervals, shuffled labels and matched twins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor
from tqdm.auto import tqdm

import saes
from probe import _rows, _stats
from probe.errors import DataError
from probe.targets import Scores
from saes import sparse
from saes._separation import table as separation_table

_CHUNK = 4_000_000  # weighted non-zeros held at once by the bootstrap
_N_TWINNED = 10  # latents whose twins are shown as the spread of the whole result


def latents(
    cache: Any,
    site: str,
    sae: Any,
    label: str | Sequence[Any],
    positive: Any = None,
    group: str | Sequence[Any] | None = None,
    *,
    rows: _rows.Mode = "last",
    sequences: Any = None,
    n_controls: int = 100,
    n_boot: int = 1000,
    n_intervals: int = 100,
    n_twins: int = 20,
    seed: int = 0,
    batch_size: int = 4096,
    model: Any = None,
    progress: bool = True,
) -> Scores:
    """Score every live latent by how much higher it is on the positive class.

    `score` is 2 AUC - 1 of the latent's activation (rank-biserial correlation): 1 if it is higher on every positive row
    than on any other, 0 without relation, negative if it is higher on the rest. The best of thousands of latents
    separates any labels by luck; so `p` holds each score against the highest score of any latent under labels
    permuted between groups.

    Cost: one encoding of the rows; controls are one sparse matrix product; memory 12 bytes per non-zero activation.

    Args:
        cache: what `activations_cache.open` returns.
        site: the site that the SAE reads.
        sae: a sae-lens SAE, or the directory of a saved one.
        label: column of the cache, or one value per sequence (or per stored row).
        positive: the class that counts as 1, as in `probe.probing.sweep`.
        group: what rows share (a person, a template); None: each sequence is its own group.
        rows: "last" stored row of each sequence, the "mean" activation over its rows, or "all" rows.
        sequences: numbers or a mask of the sequences to use (the split that locates); None for all.
        n_controls: permuted labellings; the smallest p-value is 1 / (1 + n_controls).
        n_boot: bootstrap replicates over groups.
        n_intervals: how many of the best latents get an interval (the others' `low`, `high` are NaN).
        n_twins: random latents of similar activation frequency to hold each latent against.
        seed: permutations, bootstrap and twins.
        batch_size: rows encoded at once.
        model: when given, refused unless it is the cache's.
        progress: show bars.

    Returns:
        Scores of kind "latent"; `.top(k)` gives `Latents` with decoder rows. Columns: `site, layer, latent, score, low,
        high, auc, mean_difference, frequency_positive, frequency_negative, frequency, control, control_low,
        control_high, p, twin, twin_high, n, n_groups`; `twin` is the mean score of the
        latent's twins, `twin_high` the highest.

    Raises:
        LabelError: labels that cannot be used.
        SiteError: the cache does not have the site.
        saes.errors.SAEDataError: an SAE of another width, or activations that are not finite.
        DataError: no latent is active on any row.
    """
    (name,) = _rows.one_site(cache, site)
    model_hash = _rows.model_hash(cache, model)
    sae_name, sae = _opened(sae)
    chosen = _rows.select(cache, label, group, positive, rows, sequences)
    acts = _activations(cache, name, sae, chosen, batch_size, progress)  # [n, d_sae], sparse
    table, null = _table(acts, chosen, n_controls, seed)
    _add_intervals(table, acts, chosen, n_boot, n_intervals, seed, progress)
    twins = _add_twins(table, n_twins, seed)
    _add_place(table, name, chosen)
    settings = {
        **{"site": name, "sae": sae_name, **chosen.settings(label, group)},
        **{"d_sae": acts.shape[1], "n_live": len(table), "n_controls": n_controls, "n_boot": n_boot},
        **{"n_twins": n_twins, "seed": seed, "warnings": _warnings(table, chosen)},
    }
    return _scores(table, twins, null, settings, sae.W_dec.detach().float().cpu(), model_hash)


def _scores(
    table: pd.DataFrame,
    twins: Float[ndarray, "best twin"],
    null: Float[ndarray, "latent control"],
    settings: dict[str, Any],
    decoder: Float[Tensor, "d_sae d"],
    model_hash: str,
) -> Scores:
    note = f"{settings['n_twins']} random latents of similar activation frequency for each of the best {_N_TWINNED}"
    return Scores(
        method="features.latents",
        kind="latent",
        table=table,
        score_name="separation (2 AUC - 1)",
        twins=twins,
        twins_note=note,
        controls={"shuffled": pd.DataFrame({"control": np.arange(null.shape[1]), "highest": null.max(0)})},
        settings=settings,
        model_hash=model_hash,
        vectors={i: decoder[latent].clone() for i, latent in enumerate(table["latent"])},
    )


def _opened(sae: Any) -> tuple[str, Any]:
    """The SAE, and a name for it: its path, or what its metadata says."""
    if isinstance(sae, str | Path):
        return str(sae), saes.load(sae)
    metadata = sae.cfg.metadata
    return str(getattr(metadata, "sae_name", None) or f"{sae.cfg.architecture()}-{sae.cfg.d_sae}"), sae


def _activations(cache: Any, site: str, sae: Any, rows: _rows.Rows, batch_size: int, progress: bool) -> Any:
    """Latent activations of the chosen rows, [n, d_sae] sparse; averaged over a sequence's stored rows for "mean"."""
    acts = sparse.encode(sae, cache, site, rows.stored, batch_size=batch_size, progress=progress)
    if rows.mode != "mean":
        return acts
    from scipy.sparse import csr_array

    counts = np.bincount(rows.slot, minlength=len(rows))
    average = csr_array(
        (1 / counts[rows.slot], (rows.slot, np.arange(len(rows.slot)))), shape=(len(rows), len(rows.slot))
    )
    return (average @ acts).tocsc()


def _add_place(table: pd.DataFrame, site: str, rows: _rows.Rows) -> None:
    table.insert(0, "layer", pd.Series([_rows.layer_of(site)] * len(table), dtype="Int64"))
    table.insert(0, "site", site)
    table["n"], table["n_groups"] = len(rows), rows.n_groups


def _table(
    acts: Any, rows: _rows.Rows, n_controls: int, seed: int
) -> tuple[pd.DataFrame, Float[ndarray, "latent control"]]:
    """Scores and permutation controls of the latents that are active at all."""
    live = np.flatnonzero(np.diff(acts.indptr))
    if not len(live):
        raise DataError(f"None of the {acts.shape[1]} latents is active on any of the {len(rows)} rows.")
    acts = acts[:, live]
    table = separation_table(acts, rows.y).assign(latent=live)
    shuffled = _stats.permuted_labels(rows.y, rows.groups, n_controls, np.random.default_rng([seed, 1]))
    null = 2 * sparse.auc(*sparse.rank_excess(acts), shuffled) - 1  # [latent, control]
    table.insert(1, "score", 2 * table["auc"] - 1)
    low, high = _stats.interval(null.T)
    return (
        table.assign(
            frequency=np.diff(acts.indptr) / acts.shape[0],
            control=np.nanmean(null, axis=1),
            control_low=low,
            control_high=high,
            p=_stats.corrected_p(table["score"].to_numpy(), null),
        ).drop(columns=["n_positive", "n_negative", "mean_positive", "mean_negative"]),
        null,
    )


def _add_intervals(
    table: pd.DataFrame, acts: Any, rows: _rows.Rows, n_boot: int, n_intervals: int, seed: int, progress: bool
) -> None:
    weights = _stats.resample_groups(rows.groups, rows.y, n_boot, np.random.default_rng([seed, 0]))
    best = np.argsort(-table["score"].to_numpy(), kind="stable")[:n_intervals]
    low, high = np.full(len(table), np.nan), np.full(len(table), np.nan)
    for row in tqdm(best, desc="bootstrap", unit="latent", disable=not progress):
        column = acts[:, [int(table["latent"].iloc[row])]].tocoo()
        draws = 2 * _auc_draws(column.data, column.coords[0], rows, weights) - 1
        low[row], high[row] = _stats.interval(draws)
    table.insert(2, "low", low)
    table.insert(3, "high", high)


def _auc_draws(
    values: Float[ndarray, " nonzero"],
    where: Int[ndarray, " nonzero"],
    rows: _rows.Rows,
    weights: Float[ndarray, "boot group"],
) -> Float[ndarray, " boot"]:
    """AUC of one latent in every replicate. The silent rows are one block of ties, so only active rows are sorted."""
    n_groups = weights.shape[1]
    n_pos = weights @ np.bincount(rows.groups, weights=rows.y, minlength=n_groups)  # [boot]
    n_neg = weights @ np.bincount(rows.groups, weights=1 - rows.y, minlength=n_groups)
    step = max(1, _CHUNK // max(len(values), 1))
    parts = [
        _wins(
            values,
            rows.y[where],
            weights[i : i + step][:, rows.groups[where]],
            n_pos[i : i + step],
            n_neg[i : i + step],
        )
        for i in range(0, len(weights), step)
    ]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.concatenate(parts) / (n_pos * n_neg)


def _wins(values: ndarray, y: ndarray, weights: ndarray, n_pos: ndarray, n_neg: ndarray) -> Float[ndarray, " boot"]:
    """Weighted pairs in which the positive row is higher, ties half; `values` are the non-zero ones."""
    order = np.argsort(values, kind="stable")
    values, y, weights = values[order], y[order], weights[:, order]
    starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
    positive = np.add.reduceat(weights * y, starts, axis=1)  # [boot, block]
    negative = np.add.reduceat(weights * (1 - y), starts, axis=1)
    zero_pos, zero_neg = n_pos - positive.sum(1), n_neg - negative.sum(1)
    above = values[starts] > 0
    below = np.cumsum(negative, axis=1) - negative + np.where(above, zero_neg[:, None], 0)
    silent = zero_pos * (negative[:, ~above].sum(1) + zero_neg / 2)
    return (positive * (below + negative / 2)).sum(1) + silent


def _add_twins(table: pd.DataFrame, n_twins: int, seed: int) -> Float[ndarray, "best twin"]:
    """Hold each latent against random ones drawn from those nearest to it in activation frequency."""
    rng = np.random.default_rng([seed, 4])
    score = table["score"].to_numpy()
    by_frequency = np.argsort(table["frequency"].to_numpy(), kind="stable")
    place = np.argsort(by_frequency)
    n = min(n_twins, len(table) - 1)
    drawn = np.full((len(table), n_twins), np.nan)
    for row in range(len(table) if n else 0):
        half = 2 * n
        start = int(np.clip(place[row] - half, 0, max(len(table) - 2 * half - 1, 0)))
        near = by_frequency[start : start + 2 * half + 1]
        drawn[row, :n] = score[rng.choice(near[near != row], size=n, replace=False)]
    table["twin"], table["twin_high"] = (np.nanmean(drawn, axis=1), np.nanmax(drawn, axis=1)) if n else (np.nan, np.nan)
    return drawn[np.argsort(-score, kind="stable")[:_N_TWINNED]]


def _warnings(table: pd.DataFrame, rows: _rows.Rows) -> list[str]:
    best = table.iloc[int(table["score"].to_numpy().argmax())]
    smallest = min(len(np.unique(rows.groups[rows.y == c])) for c in (0, 1))
    found = [
        (
            not rows.grouped,
            "no group was given, so each sequence is its own; where some share a person, intervals are too narrow.",
        ),
        (
            smallest < 10,
            f"the rarer class has {smallest} groups: intervals and p-values rest on few independent units.",
        ),
        (
            best["p"] > 0.05,
            f"the best latent is not above the best of {len(table)} under shuffled labels (p = {best['p']:.2f}).",
        ),
    ]
    return [text for holds, text in found if holds]
