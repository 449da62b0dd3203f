"""How well an SAE reconstructs cached activations, and how sparsely."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from saes.errors import SAEDataError, SAELoadError
from saes.sparse import blocks, check_origin, check_width

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """What an SAE does on the rows of a site.

    Attributes:
        site: the site.
        n: rows.
        l0: active latents per row, mean.
        fvu: fraction of variance unexplained, sum |x - x^|^2 / sum |x - mean x|^2.
        mse: mean of |x - x^|^2 per row.
        cosine: mean cosine of x and x^.
        n_dead: latents that were active on no row.
        n_dense: latents that were active on more than a tenth of the rows.
        frequency: share of the rows on which each latent was active, [d_sae].
    """

    site: str
    n: int
    l0: float
    fvu: float
    mse: float
    cosine: float
    n_dead: int
    n_dense: int
    frequency: Float[Tensor, " d_sae"]

    @property
    def explained_variance(self) -> float:
        """1 - FVU."""
        return 1 - self.fvu

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.frequency)

    def to_dict(self) -> dict[str, Any]:
        """Every number but the frequencies."""
        plain = {key: value for key, value in asdict(self).items() if key != "frequency"}
        return {**plain, "explained_variance": self.explained_variance, "d_sae": self.d_sae}

    def to_df(self) -> pd.DataFrame:
        """One row."""
        import pandas as pd

        return pd.DataFrame([self.to_dict()])

    def __repr__(self) -> str:
        return (
            f"Evaluation({self.site}, {self.n} rows: L0 {self.l0:.1f}, FVU {self.fvu:.4f}, cosine {self.cosine:.4f}, "
            f"{self.n_dead} of {self.d_sae} latents dead, {self.n_dense} dense)"
        )

    def _repr_html_(self) -> str:
        return self.to_df().to_html(index=False, border=0)

    def plot(self) -> Any:
        """Histogram of the latents' activation frequencies (log10), dead ones left out."""
        import plotly.graph_objects as go

        alive = self.frequency[self.frequency > 0].log10().tolist()
        figure = go.Figure(go.Histogram(x=alive, nbinsx=50))
        title = f"{self.site}: {self.n_dead} of {self.d_sae} latents dead on {self.n} rows"
        return figure.update_layout(title=title, xaxis_title="log10 activation frequency", yaxis_title="latents")

    def save(self, path: str | Path) -> Path:
        """Write one JSON file."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**asdict(self), "frequency": self.frequency.tolist()}), "utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read what `save` wrote.

        Raises:
            SAELoadError: the file is missing or malformed.
        """
        try:
            record = json.loads(Path(path).read_text("utf-8"))
            return cls(**{**record, "frequency": torch.tensor(record["frequency"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SAELoadError(f"{path} holds no evaluation: {error!r}.") from error


@torch.no_grad()
def evaluate(
    sae: Any, cache: Any, site: str, *, rows: Any = None, batch_size: int = 4096, progress: bool = False
) -> Evaluation:
    """Reconstruct rows of a cache and measure what is lost. Streams; sums in float64.

    Args:
        sae: a sae-lens SAE.
        cache: an opened cache.
        site: a site of it.
        rows: numbers of the stored rows to use (held-out ones, say); None for all.
        batch_size: rows at once.
        progress: show a bar.

    Raises:
        SAEDataError: an SAE of another width, no rows, or activations that are constant or not finite.
        activations_cache.errors.SiteError: the cache does not have the site.
    """
    import numpy as np

    chosen = None if rows is None else np.asarray(rows).reshape(-1)
    sums = _Sums()
    check_origin(sae, cache, site)
    for block in blocks(cache, site, chosen, batch_size, progress, "evaluating SAE"):
        check_width(sae, block.shape[1], site)
        x = block.to(sae.device, sae.dtype)
        acts = sae.encode(x)
        sums.add(x.double(), sae.decode(acts).double(), acts)
    return sums.result(site)


class _Sums:
    """Running sums over rows. Variances are taken about the first block's mean, so that nothing cancels."""

    def __init__(self) -> None:
        self.n = 0
        self.error = self.cosine = self.active = 0.0
        self.shift: Tensor | None = None

    def add(self, x: Float[Tensor, "b d"], out: Float[Tensor, "b d"], acts: Float[Tensor, "b d_sae"]) -> None:
        fired = (acts != 0).double()
        if self.shift is None:
            self.shift = x.mean(0)
            self.first, self.second = torch.zeros_like(self.shift), torch.zeros_like(self.shift)
            self.fired = fired.new_zeros(fired.shape[1])
        centred = x - self.shift
        self.first, self.second = self.first + centred.sum(0), self.second + centred.square().sum(0)
        self.fired = self.fired + fired.sum(0)
        self.error += float((x - out).square().sum())
        self.cosine += float(torch.nn.functional.cosine_similarity(x, out, dim=-1).sum())
        self.active += float(fired.sum())
        self.n += len(x)

    def result(self, site: str) -> Evaluation:
        if self.shift is None:
            raise SAEDataError(f"An evaluation needs rows; none of {site!r} were given.")
        variance = float((self.second - self.first.square() / self.n).sum())
        if variance <= 0:
            raise SAEDataError(f"The activations of {site!r} are constant over the {self.n} rows; FVU is not defined.")
        frequency = (self.fired / self.n).float().cpu()
        return Evaluation(
            site=site,
            n=self.n,
            l0=self.active / self.n,
            fvu=self.error / variance,
            mse=self.error / self.n,
            cosine=self.cosine / self.n,
            n_dead=int((frequency == 0).sum()),
            n_dense=int((frequency > 0.1).sum()),
            frequency=frequency,
        )
