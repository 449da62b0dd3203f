"""Latent activations of many rows in sparse form, and what can be computed on them for all latents at once.

A latent is zero on almost all rows, so rows x latents is held as one compressed sparse column matrix: memory is
12 bytes per non-zero, not 4 bytes per entry.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor
from tqdm.auto import tqdm

from saes.errors import SAEDataError


def check_width(sae: Any, width: int, site: str) -> None:
    """Refuse an SAE whose input is not as wide as the site.

    Raises:
        SAEDataError: the widths differ.
    """
    if int(sae.cfg.d_in) != width:
        raise SAEDataError(
            f"The SAE takes rows of width {sae.cfg.d_in}, the site {site!r} has width {width}. "
            f"It was trained on {getattr(sae.cfg.metadata, 'hook_name', None) or 'an unknown site'}."
        )


def check_origin(sae: Any, cache: Any, site: str) -> None:
    """Warn if the SAE says that it was trained on another site, or on a model with other weights.

    Both can be meant (the same SAE before and after an edit), so it is no error; but such a mix is never silent.
    """
    metadata = sae.cfg.metadata
    trained_on, weights = (getattr(metadata, name, None) for name in ("hook_name", "model_weights_hash"))
    if trained_on and trained_on != site:
        warnings.warn(f"the SAE was trained on {trained_on}, and reads {site} here", stacklevel=3)
    held = getattr(getattr(cache, "model", None), "weights_hash", None)
    if weights and held and weights != held:
        text = f"the SAE was trained on activations of another model ({weights[:12]}) than the cache's ({held[:12]})"
        warnings.warn(text, stacklevel=3)


def blocks(
    cache: Any, site: str, rows: Int[ndarray, " n"] | None, batch_size: int, progress: bool = False, desc: str = "rows"
) -> Iterator[Float[Tensor, "batch d_in"]]:
    """Rows of a site in order, in float32, several axes flattened to one.

    Raises:
        SAEDataError: activations that are not finite.
    """
    total = len(cache) if rows is None else len(rows)
    for start in tqdm(range(0, total, batch_size), desc=desc, unit="batch", disable=not progress):
        part = slice(start, min(start + batch_size, total))
        block = cache[site][part if rows is None else torch.as_tensor(rows[part])].flatten(1).float()  # [batch, d_in]
        if not torch.isfinite(block).all():
            raise SAEDataError(
                f"Activations must be finite; those of {site!r} are not, near row {start}. Capture again."
            )
        yield block


@torch.no_grad()
def encode(
    sae: Any,
    cache: Any,
    site: str,
    rows: Int[ndarray, " n"] | None = None,
    *,
    batch_size: int = 4096,
    progress: bool = False,
) -> Any:
    """Latent activations of rows of a cache.

    Args:
        sae: a sae-lens SAE.
        cache: an opened cache.
        site: the site that the SAE reads.
        rows: stored rows, ascending; None for all.
        batch_size: rows encoded at once.
        progress: show a bar.

    Returns:
        scipy `csc_array` [rows, d_sae] of float32.

    Raises:
        SAEDataError: an SAE of another width, or activations that are not finite.
    """
    from scipy.sparse import csc_array

    row_parts: list[ndarray] = [np.zeros(0, np.int64)]
    latent_parts: list[ndarray] = [np.zeros(0, np.int64)]
    value_parts: list[ndarray] = [np.zeros(0, np.float32)]
    done = 0
    check_origin(sae, cache, site)
    for block in blocks(cache, site, rows, batch_size, progress, "encoding"):
        check_width(sae, block.shape[1], site)
        acts = sae.encode(block.to(sae.device, sae.dtype)).float().cpu()  # [batch, d_sae]
        row, latent = acts.nonzero(as_tuple=True)
        row_parts.append(row.numpy() + done)
        latent_parts.append(latent.numpy())
        value_parts.append(acts[row, latent].numpy())
        done += len(block)
    index = (np.concatenate(row_parts), np.concatenate(latent_parts))
    return csc_array((np.concatenate(value_parts), index), shape=(done, int(sae.cfg.d_sae)))


def rank_excess(acts: Any) -> tuple[Any, Float[ndarray, " latent"]]:
    """Ranks of each column (ties share their mean rank), less the rank that the column's zeros share.

    Args:
        acts: sparse [rows, latents].

    Returns:
        A sparse matrix of the same pattern, [rows, latents], and the zeros' rank of each latent. The rank sum of rows S
        in a latent is `excess[S].sum() + len(S) * zero_rank`.
    """
    acts = acts.tocsc()
    n = acts.shape[0]
    latent = np.repeat(np.arange(acts.shape[1]), np.diff(acts.indptr))
    order = np.lexsort((acts.data, latent))
    value, column = acts.data[order], latent[order]
    nonzero = np.diff(acts.indptr)
    negative = np.bincount(latent[acts.data < 0], minlength=acts.shape[1])
    zeros = n - nonzero
    rank = np.arange(len(value)) - acts.indptr[column] + 1.0  # 1-based within the column's non-zeros
    rank += np.where(value > 0, zeros[column], 0)
    new = np.r_[True, (value[1:] != value[:-1]) | (column[1:] != column[:-1])][: len(value)]
    block = np.cumsum(new) - 1  # ties share a block
    mean_rank = (np.bincount(block, weights=rank) / np.maximum(np.bincount(block), 1))[block] if len(value) else rank
    zero_rank = negative + (zeros + 1) / 2
    excess = acts.astype(np.float64)
    excess.data[order] = mean_rank - zero_rank[column]
    return excess, zero_rank


def auc(
    excess: Any, zero_rank: Float[ndarray, " latent"], y: Int[ndarray, "n label"]
) -> Float[ndarray, "latent label"]:
    """Area under the ROC curve of every latent for every labelling, from `rank_excess` (Mann-Whitney U).

    Each latent's activation is the score, ties (the rows where it is silent) count half. One sparse matrix product.
    """
    n_pos = y.sum(0).astype(np.float64)  # [label]
    n_neg = len(y) - n_pos
    rank_sum = excess.T @ y.astype(np.float64) + zero_rank[:, None] * n_pos  # [latent, label]
    with np.errstate(invalid="ignore", divide="ignore"):
        return (rank_sum - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg)
