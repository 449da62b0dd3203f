"""The contexts on which a latent is most active, with its activation on every token of them."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from probe import _rows
from probe.errors import DataError
from probe.features._latents import _opened
from probe.models import token_strings
from saes.sparse import blocks, check_width


@dataclass(frozen=True)
class Context:
    """Tokens around a row on which a latent is active.

    Attributes:
        latent: the latent.
        activation: at the peak, which is token number `peak` of the window.
        sequence: which sequence of the cache.
        position: the peak's position in it.
        peak: index of the peak in the window.
        token_ids: the window.
        tokens: the same as text pieces (the ids as text where no tokenizer was given).
        activations: on each token of the window; NaN where the cache stores no row for it.
    """

    latent: int
    activation: float
    sequence: int
    position: int
    peak: int
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    activations: tuple[float, ...]

    @property
    def text(self) -> str:
        """The window as one string, the peak in brackets."""
        marked = [f"[{t}]" if i == self.peak else t for i, t in enumerate(self.tokens)]
        return "".join(marked)


class Contexts(Sequence[Context]):
    """Contexts, most active first within each latent."""

    def __init__(self, rows: Sequence[Context]) -> None:
        self.rows = tuple(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return Contexts(self.rows[index]) if isinstance(index, slice) else self.rows[index]

    def of(self, latent: int) -> Contexts:
        """Those of one latent."""
        return Contexts([row for row in self.rows if row.latent == latent])

    def to_df(self) -> pd.DataFrame:
        """One row each, with the marked text."""
        return pd.DataFrame([{**asdict(row), "text": row.text} for row in self.rows])

    def __repr__(self) -> str:
        shown = [f"latent {row.latent} {row.activation:.3g}: {row.text!r}" for row in self.rows[:20]]
        return "\n".join([f"Contexts: {len(self)}", *shown])

    def _repr_html_(self) -> str:
        return "".join(f"<p>latent {row.latent}, {row.activation:.3g}: {_shaded(row)}</p>" for row in self.rows)


def _shaded(row: Context) -> str:
    """The window with each token shaded by its activation."""
    top = max(row.activation, 1e-12)
    shades = [max(0.0, min(1.0, float(np.nan_to_num(act)) / top)) for act in row.activations]
    return "".join(
        f'<span style="background:rgba(214,96,77,{shade:.2f})">{html.escape(token)}</span>'
        for token, shade in zip(row.tokens, shades, strict=True)
    )


@torch.no_grad()
def contexts(
    cache: Any,
    site: str,
    sae: Any,
    latent: int | Sequence[int],
    n: int = 10,
    *,
    window: int = 8,
    tokenizer: Any = None,
    batch_size: int = 4096,
    progress: bool = False,
) -> Contexts:
    """The stored rows on which latents are most active, at most one per sequence, with the tokens around them.

    Args:
        cache: what `activations_cache.open` returns.
        site: the site that the SAE reads.
        sae: a sae-lens SAE, or the directory of a saved one.
        latent: one latent or several.
        n: contexts per latent; fewer where the latent is active in fewer sequences.
        window: tokens to each side of the peak.
        tokenizer: turns ids into text; without it the tokens are the ids.
        batch_size: rows encoded at once.
        progress: show a bar.

    Raises:
        DataError: a latent out of range.
        SiteError: the cache does not have the site.
        saes.errors.SAEDataError: an SAE of another width, or activations that are not finite.
    """
    (name,) = _rows.one_site(cache, site)
    _, sae = _opened(sae)
    wanted = [int(latent)] if isinstance(latent, int | np.integer) else [int(i) for i in latent]
    bad = [i for i in wanted if not 0 <= i < sae.cfg.d_sae]
    if bad or n < 1 or not wanted:
        raise DataError(
            f"contexts needs n >= 1 and latents from 0 to {sae.cfg.d_sae - 1}; got n = {n}, {bad or wanted}."
        )
    peaks = _peaks(cache, name, sae, wanted, n, batch_size, progress)
    return Contexts(
        [_context(cache, name, sae, own, row, window, tokenizer) for own, rows in peaks.items() for row in rows]
    )


def _peaks(
    cache: Any, site: str, sae: Any, wanted: list[int], n: int, batch_size: int, progress: bool
) -> dict[int, Int[ndarray, " n"]]:
    """The n most active rows of each latent, each of another sequence; memory does not grow with the rows."""
    sequence = np.asarray(cache.rows["sequence"])
    best: dict[int, tuple[ndarray, ndarray]] = {i: (np.zeros(0, np.int64), np.zeros(0)) for i in wanted}
    done = 0
    for block in blocks(cache, site, None, batch_size, progress, "contexts"):
        check_width(sae, block.shape[1], site)
        acts = _encoded(sae, block)[:, wanted].numpy()  # [batch, wanted]
        for i, own in enumerate(wanted):
            active = np.flatnonzero(acts[:, i] > 0)
            rows = np.r_[best[own][0], active + done]
            values = np.r_[best[own][1], acts[active, i]]
            order = np.lexsort((rows, -values))  # by activation, then by row, so that ties have one order
            first = np.sort(np.unique(sequence[rows[order]], return_index=True)[1])[:n]  # one a sequence
            best[own] = (rows[order][first], values[order][first])
        done += len(block)
    return {own: rows for own, (rows, _) in best.items()}


def _encoded(sae: Any, block: Float[Tensor, "b d"]) -> Float[Tensor, "b d_sae"]:
    return sae.encode(block.to(sae.device, sae.dtype)).float().cpu()


def _context(cache: Any, site: str, sae: Any, latent: int, row: int, window: int, tokenizer: Any) -> Context:
    sequence, position = int(cache.rows["sequence"][row]), int(cache.rows["position"][row])
    ids = np.asarray(cache.tokens(row))
    start, stop = max(0, position - window), min(len(ids), position + window + 1)
    own = np.arange(max(0, row - window), min(len(cache), row + window + 1))  # a sequence's rows are neighbours
    place = np.asarray(cache.rows["position"])[own] - start
    own = own[(np.asarray(cache.rows["sequence"])[own] == sequence) & (place >= 0) & (place < stop - start)]
    activations = np.full(stop - start, np.nan)
    values = _encoded(sae, cache[site][torch.as_tensor(own)].flatten(1).float())[:, latent].numpy()
    activations[np.asarray(cache.rows["position"])[own] - start] = values
    part = tuple(int(i) for i in ids[start:stop])
    tokens = tuple(token_strings(tokenizer, part) if tokenizer is not None else (f" {i}" for i in part))
    peak = position - start
    return Context(
        latent, float(activations[peak]), sequence, position, peak, part, tokens, tuple(float(a) for a in activations)
    )
