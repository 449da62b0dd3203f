"""How each latent separates two sets of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from saes import sparse
from saes.errors import SAEDataError

if TYPE_CHECKING:
    import pandas as pd


def separation(
    sae: Any,
    cache: Any,
    site: str,
    labels: Any,
    *,
    positive: Any = None,
    rows: Any = None,
    batch_size: int = 4096,
    progress: bool = False,
) -> pd.DataFrame:
    """Score every latent by how its activation tells two sets of rows apart.

    Args:
        sae: a sae-lens SAE.
        cache: an opened cache.
        site: a site of it.
        labels: a label column of the cache, or one value per stored row (per row of `rows`, where given).
        positive: the label of the first set, all others form the second; None for labels of two classes, where the
            later in sorted order (True, 1) is the first set.
        rows: stored rows to use, ascending; None for all.
        batch_size: rows encoded at once.
        progress: show a bar.

    Returns:
        A row per latent: `latent`, `auc` (that the activation is higher on a positive than on a negative row, ties
        half), `mean_difference`, `mean_positive`, `mean_negative`, `frequency_positive`, `frequency_negative` (share of
        the rows on which it is active), `n_positive`, `n_negative`. A description of these rows, without intervals:
        those and the controls come with `probe.features.latents`.

    Raises:
        SAEDataError: labels of one class, of another length, missing, or an SAE of another width.
    """
    chosen = None if rows is None else np.asarray(rows).reshape(-1)
    y = _binary(cache, labels, chosen, positive)
    acts = sparse.encode(sae, cache, site, chosen, batch_size=batch_size, progress=progress)
    return table(acts, y)


def table(acts: Any, y: Int[ndarray, " n"]) -> pd.DataFrame:
    """`separation` of latents whose activations are at hand: sparse [rows, latents], and binary labels of the rows."""
    import pandas as pd

    excess, zero_rank = sparse.rank_excess(acts)
    sides = np.stack([y, 1 - y], axis=1).astype(np.float64)  # [n, 2]
    counts = sides.sum(0)
    means = (acts.T @ sides) / counts  # [latent, 2]
    frequency = ((acts != 0).astype(np.float64).T @ sides) / counts
    return pd.DataFrame(
        {
            "latent": np.arange(acts.shape[1]),
            "auc": sparse.auc(excess, zero_rank, y[:, None])[:, 0],
            "mean_difference": means[:, 0] - means[:, 1],
            "mean_positive": means[:, 0],
            "mean_negative": means[:, 1],
            "frequency_positive": frequency[:, 0],
            "frequency_negative": frequency[:, 1],
            "n_positive": int(counts[0]),
            "n_negative": int(counts[1]),
        }
    )


def _binary(cache: Any, labels: Any, rows: ndarray | None, positive: Any) -> Int[ndarray, " n"]:
    if isinstance(labels, str):
        if labels not in cache.sequences:
            known = ", ".join(sorted(set(cache.sequences) - {"input_ids"}))
            raise SAEDataError(f"The cache has no label column {labels!r}; it has: {known}.")
        values = np.asarray(cache.sequences[labels])[cache.rows["sequence"]]
        values = values if rows is None else values[rows]
    else:
        values = np.asarray(labels)
    wanted = len(cache) if rows is None else len(rows)
    if values.shape != (wanted,):
        raise SAEDataError(f"labels need one value per row ({wanted}); got shape {values.shape}.")
    if any(v is None or v != v for v in values.tolist()):
        raise SAEDataError("labels must not be missing or NaN; leave those rows out with rows=.")
    classes = sorted(set(values.tolist()), key=lambda v: (isinstance(v, str), v))
    if (
        len(classes) < 2
        or (positive is None and len(classes) > 2)
        or (positive is not None and positive not in classes)
    ):
        raise SAEDataError(f"separation needs two sets of rows; labels are {classes[:8]}, positive={positive!r}.")
    return (values == (classes[-1] if positive is None else positive)).astype(np.int64)
