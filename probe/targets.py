"""Targets (what was located, frozen, with its evidence) and `Scores` (the table that every locator returns).

    scores = probe.probing.sweep(cache, label="member", group="person")
    target = scores.top(1)                     # a Direction
    twins = target.random_twins(20, seed=0)    # random ones of the same kind, for comparison

Every target is saved as `target.json` and `target.safetensors`; `Target.load` gives back the right class.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from probe.errors import TargetError

__all__ = ["Direction", "Experts", "Heads", "Latents", "Neurons", "Scores", "Subspace", "Target", "WeightMask"]

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Target:
    """Components of one model.

    Attributes:
        model_hash: `weights_hash` of the model that they were located in; empty if not known.
        evidence: What chose them: method, scores, controls, settings. JSON-able.
    """

    kind: ClassVar[str] = ""
    model_hash: str = field(default="", kw_only=True)
    evidence: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    def __len__(self) -> int:
        raise TargetError("Target is the common base; use Direction, Subspace, Neurons, Heads, Experts or Latents.")

    def random_twins(self, n: int, seed: int = 0) -> list[Self]:
        """`n` random targets of the same kind and size, the control that any claim about this one needs."""
        rng = torch.Generator().manual_seed(seed)
        return [
            self._twin(rng, {"random twin of": self.evidence.get("method", self.kind), "seed": seed}) for _ in range(n)
        ]

    def _twin(self, rng: torch.Generator, evidence: Mapping[str, Any]) -> Self:
        raise TargetError(f"{type(self).__name__} has no random twins.")

    def summary(self) -> dict[str, Any]:
        """Kind, size and place in JSON-able form, without tensors."""
        plain = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("evidence",) and not _holds_tensors(getattr(self, f.name))
        }
        return {"kind": self.kind, "size": len(self), **plain}

    def save(self, directory: str | Path) -> Path:
        """Write `target.json` and `target.safetensors` into a directory (made if needed)."""
        from safetensors.torch import save_file

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.contiguous() for k, v in self._tensors().items()}
        save_file(tensors, str(directory / "target.safetensors"), metadata={"format": "pt"})
        record = {"format": FORMAT, **self.summary(), "evidence": to_jsonable(self.evidence)}
        (directory / "target.json").write_text(json.dumps(record, indent=1), "utf-8")
        return directory

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: v for f in dataclasses.fields(self) if isinstance(v := getattr(self, f.name), Tensor)}

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read a target of any kind (of this kind, if called on a subclass).

        Raises:
            TargetError: files missing, malformed, or of another kind.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        directory = Path(directory)
        try:
            record = json.loads((directory / "target.json").read_text("utf-8"))
            tensors = load_file(str(directory / "target.safetensors"))
            kind = _KINDS[record["kind"]]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise TargetError(f"{directory} holds no target that can be read: {error!r}.") from error
        if not issubclass(kind, cls):
            raise TargetError(f"{directory} holds a {kind.__name__}, not a {cls.__name__}.")
        return kind._from(record, tensors)

    @classmethod
    def _from(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        names = {f.name for f in dataclasses.fields(cls)}
        plain = {k: v for k, v in record.items() if k in names}
        try:
            return cls(**{**plain, **{k: v for k, v in tensors.items() if k in names}})
        except (TypeError, ValueError) as error:
            raise TargetError(f"A {cls.__name__} cannot be made of {sorted(record)}: {error}.") from error

    def __repr__(self) -> str:
        facts = ", ".join(f"{k}={v!r}" for k, v in self.summary().items() if k not in ("kind", "model_hash"))
        return f"{type(self).__name__}({facts})"

    def _repr_html_(self) -> str:
        rows = {**self.summary(), "evidence": json.dumps(to_jsonable(self.evidence))[:600]}
        return pd.Series({k: str(v)[:600] for k, v in rows.items()}).to_frame(type(self).__name__).to_html(border=0)


@dataclass(frozen=True, eq=False, repr=False)
class Direction(Target):
    """A direction of the residual stream (or of another site). `vector` is scaled to unit norm.

    Raises:
        TargetError: a vector that is zero, not finite, or not one-dimensional.
    """

    kind: ClassVar[str] = "direction"
    site: str
    vector: Float[Tensor, " d"]

    def __post_init__(self) -> None:
        vector = torch.as_tensor(self.vector).detach().to("cpu", torch.float32)
        if vector.ndim != 1 or not torch.isfinite(vector).all():
            raise TargetError(f"A direction must be a finite vector; got shape {tuple(vector.shape)} or NaN.")
        norm = vector.norm()
        if norm == 0:
            raise TargetError("A direction must not be the zero vector.")
        object.__setattr__(self, "vector", vector / norm)

    def __len__(self) -> int:
        return 1

    @property
    def basis(self) -> Float[Tensor, "d 1"]:
        """The direction as a subspace basis."""
        return self.vector[:, None]

    def _twin(self, rng: torch.Generator, evidence: Mapping[str, Any]) -> Self:
        return type(self)(self.site, torch.randn(self.vector.shape, generator=rng), evidence=evidence)


@dataclass(frozen=True, eq=False, repr=False)
class Subspace(Target):
    """A subspace; `basis` is made orthonormal (QR), its column span kept.

    Raises:
        TargetError: a basis that is empty, not finite, wider than it is tall, or of deficient rank.
    """

    kind: ClassVar[str] = "subspace"
    site: str
    basis: Float[Tensor, "d k"]

    def __post_init__(self) -> None:
        basis = torch.as_tensor(self.basis).detach().to("cpu", torch.float64)
        if basis.ndim != 2 or basis.shape[1] == 0 or not torch.isfinite(basis).all():
            raise TargetError(
                f"A subspace basis must be a finite [d, k] matrix; got shape {tuple(basis.shape)} or NaN."
            )
        if basis.shape[1] > basis.shape[0]:
            raise TargetError(f"A subspace of {basis.shape[0]} dimensions cannot have rank {basis.shape[1]}.")
        norms = basis.norm(dim=0)
        if (norms == 0).any() or torch.linalg.matrix_rank(basis / norms) < basis.shape[1]:
            raise TargetError(f"The {basis.shape[1]} columns of a subspace basis must be linearly independent.")
        orthonormal, upper = torch.linalg.qr(basis)
        object.__setattr__(self, "basis", (orthonormal * upper.diagonal().sign()).float())

    def __len__(self) -> int:
        return int(self.basis.shape[1])

    def _twin(self, rng: torch.Generator, evidence: Mapping[str, Any]) -> Self:
        return type(self)(self.site, torch.randn(self.basis.shape, generator=rng), evidence=evidence)


@dataclass(frozen=True, eq=False, repr=False)
class _Indexed(Target):
    """Components named by (layer, index); `width` is how many a layer has."""

    index: tuple[tuple[int, int], ...]
    width: int

    def __post_init__(self) -> None:
        pairs = tuple(sorted({(int(layer), int(i)) for layer, i in self.index}))
        if not pairs:
            raise TargetError(f"{type(self).__name__} needs at least one (layer, index); none was given.")
        bad = [pair for pair in pairs if pair[0] < 0 or not 0 <= pair[1] < self.width]
        if bad:
            raise TargetError(
                f"{type(self).__name__} has {self.width} a layer, counted from 0; out of range: {bad[:5]}."
            )
        object.__setattr__(self, "index", pairs)
        object.__setattr__(self, "width", int(self.width))

    def __len__(self) -> int:
        return len(self.index)

    def by_layer(self) -> dict[int, list[int]]:
        """Layer to its indices, both in order."""
        layers: dict[int, list[int]] = {}
        for layer, i in self.index:
            layers.setdefault(layer, []).append(i)
        return layers

    def _twin(self, rng: torch.Generator, evidence: Mapping[str, Any]) -> Self:
        """As many others of the same layers (with those of the target again where a layer has too few others)."""
        drawn: list[tuple[int, int]] = []
        for layer, own in self.by_layer().items():
            others = [i for i in range(self.width) if i not in set(own)]
            pool = others if len(others) >= len(own) else list(range(self.width))
            chosen = torch.randperm(len(pool), generator=rng)[: len(own)]
            drawn += [(layer, pool[int(i)]) for i in chosen]
        return type(self)(tuple(drawn), self.width, evidence=evidence)


@dataclass(frozen=True, eq=False, repr=False)
class Neurons(_Indexed):
    """MLP neurons (rows of W_in, columns of W_out); `width` is d_mlp."""

    kind: ClassVar[str] = "neurons"


@dataclass(frozen=True, eq=False, repr=False)
class Heads(_Indexed):
    """Attention heads; `width` is n_heads."""

    kind: ClassVar[str] = "heads"


@dataclass(frozen=True, eq=False, repr=False)
class Experts(_Indexed):
    """Routed experts of a mixture; `width` is n_experts."""

    kind: ClassVar[str] = "experts"


@dataclass(frozen=True, eq=False, repr=False)
class Latents(Target):
    """SAE latents: their numbers, decoder rows, and which SAE they belong to.

    Random twins are random directions of the decoder rows' norms; a locator that has the SAE at hand reports latents of
    the same activation frequency as well.
    """

    kind: ClassVar[str] = "latents"
    site: str
    index: tuple[int, ...]
    decoder: Float[Tensor, "n d"]
    sae: str = ""

    def __post_init__(self) -> None:
        index = tuple(int(i) for i in self.index)
        decoder = torch.as_tensor(self.decoder).detach().to("cpu", torch.float32)
        if not index or decoder.ndim != 2 or len(decoder) != len(index) or not torch.isfinite(decoder).all():
            raise TargetError(f"Latents need one finite decoder row each; got {len(index)} and {tuple(decoder.shape)}.")
        object.__setattr__(self, "index", index)
        object.__setattr__(self, "decoder", decoder)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def basis(self) -> Float[Tensor, "d n"]:
        """An orthonormal basis of the decoder rows' span."""
        return Subspace(self.site, rearrange(self.decoder, "n d -> d n")).basis

    def _twin(self, rng: torch.Generator, evidence: Mapping[str, Any]) -> Self:
        drawn = torch.randn(self.decoder.shape, generator=rng)
        drawn *= (self.decoder.norm(dim=1) / drawn.norm(dim=1))[:, None]
        return dataclasses.replace(self, decoder=drawn, sae="", evidence=evidence)


@dataclass(frozen=True, eq=False, repr=False)
class WeightMask(Target):
    """Entries of weights: parameter name to a boolean tensor of its shape."""

    kind: ClassVar[str] = "weight_mask"
    masks: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if not self.masks or not any(bool(mask.any()) for mask in self.masks.values()):
            raise TargetError("A weight mask must select at least one entry.")
        wrong = [name for name, mask in self.masks.items() if mask.dtype != torch.bool]
        if wrong:
            raise TargetError(f"A weight mask holds boolean tensors; these are not: {wrong[:3]}.")

    def __len__(self) -> int:
        return sum(int(mask.sum()) for mask in self.masks.values())

    def _tensors(self) -> dict[str, Tensor]:
        return dict(self.masks)

    @classmethod
    def _from(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(dict(tensors), model_hash=record.get("model_hash", ""), evidence=record.get("evidence", {}))

    def _twin(self, rng: torch.Generator, evidence: Mapping[str, Any]) -> Self:
        drawn = {
            name: mask.flatten()[torch.randperm(mask.numel(), generator=rng)].reshape(mask.shape)
            for name, mask in self.masks.items()
        }
        return type(self)(drawn, evidence=evidence)


_KINDS: dict[str, type[Target]] = {
    kind.kind: kind for kind in (Direction, Subspace, Neurons, Heads, Experts, Latents, WeightMask)
}


class Best:
    """The best row of a `Scores`: its columns as attributes, and `.target`, `.direction`."""

    def __init__(self, scores: Scores, row: int) -> None:
        self._scores, self._row = scores, row

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._scores.table:
            raise AttributeError(name)
        return self._scores.table.at[self._row, name]

    @property
    def direction(self) -> Direction:
        """The row's direction.

        Raises:
            TargetError: the scores are not of directions.
        """
        return self._scores.direction(self._row)

    @property
    def target(self) -> Target:
        """The row's component."""
        return self._scores.target([self._row])

    def to_dict(self) -> dict[str, Any]:
        """The row."""
        return to_jsonable(self._scores.table.loc[self._row].to_dict())

    def __repr__(self) -> str:
        return f"Best({', '.join(f'{k}={v}' for k, v in self.to_dict().items())})"


@dataclass(frozen=True, eq=False, repr=False)
class Scores:
    """A score per component, with intervals, controls and random twins: what every locator returns.

    Attributes:
        method: What computed them.
        kind: `"direction"`, `"position"`, `"neuron"`, `"head"`, `"expert"` or `"latent"`.
        table: A row per component: its place (`layer`, `site`, `position`, `head`, ...), `score`, its interval `low`,
            `high`, and `n`, on how many it rests; further columns are the method's.
        score_name: What `score` is, for axes and sentences.
        unit: Its unit; empty for a pure number.
        signed: Whether both ends matter; `.top` then ranks by magnitude.
        twins: Scores of random twins, however many there are, or None.
        twins_note: How the twins were drawn.
        controls: Further tables by name.
        settings: The method's settings; `warnings` among them are shown wherever the scores are.
        model_hash: Which model.
        vectors: Row number to its direction, where components are directions (decoder rows for latents).
    """

    method: str
    kind: str
    table: pd.DataFrame
    score_name: str = "score"
    unit: str = ""
    signed: bool = False
    twins: np.ndarray | None = None
    twins_note: str = ""
    controls: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    model_hash: str = ""
    vectors: Mapping[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        missing = {"score"} - set(self.table.columns)
        if missing or self.table.empty:
            raise TargetError(f"Scores need a table with rows and a column 'score'; got {list(self.table.columns)}.")
        object.__setattr__(self, "table", self.table.reset_index(drop=True))

    def __len__(self) -> int:
        return len(self.table)

    @property
    def warnings(self) -> list[str]:
        """What the reader must know before believing the numbers."""
        return list(self.settings.get("warnings", []))

    def ranking(self) -> list[int]:
        """Row numbers, best first (NaN last)."""
        score = self.table["score"].to_numpy(float)
        key = np.abs(score) if self.signed else score
        return [int(i) for i in np.argsort(-np.nan_to_num(key, nan=-np.inf), kind="stable")]

    @property
    def best(self) -> Best:
        """The row with the highest score."""
        return Best(self, self.ranking()[0])

    def top(self, k: int = 1) -> Target:
        """The best `k` components as one target.

        Directions give a `Direction` for k = 1 and the `Subspace` that they span for more.

        Raises:
            TargetError: `k` is not between 1 and the number of rows.
        """
        if not 1 <= k <= len(self):
            raise TargetError(f"top(k) needs 1 <= k <= {len(self)}; got {k}.")
        return self.target(self.ranking()[:k])

    def direction(self, row: int) -> Direction:
        """The direction of one row.

        Raises:
            TargetError: the rows have no directions.
        """
        if row not in self.vectors:
            raise TargetError(f"Scores of kind {self.kind!r} have no direction for row {row}.")
        site = str(self.table.at[row, "site"])
        return Direction(site, self.vectors[row], model_hash=self.model_hash, evidence=self.evidence([row]))

    def evidence(self, rows: Sequence[int]) -> dict[str, Any]:
        """What a target of these rows carries: method, settings, the rows with their controls, the twins' spread."""
        spread = None
        if self.twins is not None and self.twins.size:
            flat = np.asarray(self.twins, float).ravel()
            spread = {"n": flat.size, "mean": np.nanmean(flat), "sd": np.nanstd(flat), "note": self.twins_note}
        return to_jsonable(
            {
                "method": self.method,
                "score": self.score_name,
                "unit": self.unit,
                "rows": self.table.loc[list(rows)].to_dict("records"),
                "of": len(self),
                "twins": spread,
                "settings": dict(self.settings),
            }
        )

    def target(self, rows: Sequence[int]) -> Target:
        """The target made of these rows of the table."""
        common: dict[str, Any] = {"model_hash": self.model_hash, "evidence": self.evidence(rows)}
        part = self.table.loc[list(rows)]
        if self.kind in ("direction", "position"):
            return self._span(rows, common)
        if self.kind == "latent":
            decoder = torch.stack([self.vectors[row] for row in rows])
            site, sae = str(self.settings.get("site", "")), str(self.settings.get("sae", ""))
            return Latents(site, tuple(part["latent"].astype(int)), decoder, sae, **common)
        classes = {"neuron": Neurons, "head": Heads, "expert": Experts}
        widths = {"neuron": "d_mlp", "head": "n_heads", "expert": "n_experts"}
        if self.kind not in classes:
            raise TargetError(f"Scores of kind {self.kind!r} yield no target.")
        index = tuple(zip(part["layer"].astype(int), part[self.kind].astype(int), strict=True))
        width = self.settings.get(widths[self.kind], int(self.table[self.kind].max()) + 1)
        return classes[self.kind](index, int(width), **common)

    def _span(self, rows: Sequence[int], common: dict[str, Any]) -> Target:
        if len(rows) == 1:
            return self.direction(rows[0])
        basis = torch.stack([self.direction(row).vector for row in rows], dim=1)
        return Subspace(str(self.table.at[rows[0], "site"]), basis, **common)

    def to_df(self) -> pd.DataFrame:
        """The table (a copy)."""
        return self.table.copy()

    def plot(self, **settings: Any) -> Any:
        """A plotly figure that fits the kind, with its random twins; settings are the figure's (`title`, ...)."""
        from probe import plots

        draw = plots.BY_KIND.get(self.kind)
        if draw is None:
            raise TargetError(f"There is no picture for scores of kind {self.kind!r}.")
        own: dict[str, Any] = {"score_name": self.score_name, "unit": self.unit}
        if self.kind != "direction":  # a sweep's twins are its shuffled-label controls, which have lines already
            own["twins"] = self.twins
        if self.kind in ("latent", "neuron"):
            own["signed"] = self.signed
        return draw(self.table, **{**own, **settings})

    def save(self, directory: str | Path) -> Path:
        """Write `scores.json`, `table.parquet`, `arrays.safetensors` and a parquet file a control."""
        from safetensors.torch import save_file

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.table.to_parquet(directory / "table.parquet")
        for name, table in self.controls.items():
            table.to_parquet(directory / f"control-{name}.parquet")
        tensors = {f"vectors.{row}": vector.contiguous() for row, vector in self.vectors.items()}
        if self.twins is not None:
            tensors["twins"] = torch.as_tensor(np.ascontiguousarray(self.twins))
        save_file(tensors, str(directory / "arrays.safetensors"))
        plain = ("method", "kind", "score_name", "unit", "signed", "twins_note", "model_hash")
        record = {"format": FORMAT, **{k: getattr(self, k) for k in plain}, "settings": to_jsonable(self.settings)}
        record["controls"] = list(self.controls)
        (directory / "scores.json").write_text(json.dumps(record, indent=1), "utf-8")
        return directory

    @classmethod
    def load(cls, directory: str | Path) -> Scores:
        """Read what `save` wrote.

        Raises:
            TargetError: files missing or malformed.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        directory = Path(directory)
        try:
            record = json.loads((directory / "scores.json").read_text("utf-8"))
            table = pd.read_parquet(directory / "table.parquet")
            tensors = load_file(str(directory / "arrays.safetensors"))
            names = record.pop("controls")
            controls = {name: pd.read_parquet(directory / f"control-{name}.parquet") for name in names}
            record.pop("format")
            twins = tensors.pop("twins", None)
            vectors = {int(key.removeprefix("vectors.")): value for key, value in tensors.items()}
            array = None if twins is None else twins.numpy()
            return cls(table=table, controls=controls, twins=array, vectors=vectors, **record)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise TargetError(f"{directory} holds no scores that can be read: {error!r}.") from error

    def _head(self) -> str:
        twins = ""
        if self.twins is not None and np.size(self.twins):
            low, high = np.nanpercentile(np.asarray(self.twins, float), [2.5, 97.5])
            twins = f"; random twins {low:.3g} to {high:.3g} (95 % of {np.size(self.twins)})"
        return f"Scores: {self.method}, {len(self)} {self.kind}s, {self.score_name} {self.unit}".rstrip() + twins

    def __repr__(self) -> str:
        shown = self.table.loc[self.ranking()[:10]].to_string(index=False, float_format=lambda x: f"{x:.3f}")
        return "\n".join([self._head(), shown, *(f"warning: {w}" for w in self.warnings)])

    def _repr_html_(self) -> str:
        import html

        warned = "".join(f"<p><b>Warning:</b> {html.escape(w)}</p>" for w in self.warnings)
        rows: str = self.table.loc[self.ranking()[:10]].to_html(
            index=False, border=0, float_format=lambda x: f"{x:.3f}"
        )
        return f"<p><b>{html.escape(self._head())}</b></p>{warned}{rows}"


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (
        isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())
    )


def to_jsonable(value: Any) -> Any:
    """Plain Python of anything that evidence may hold: numpy and torch values, tables, paths; NaN becomes None."""
    if isinstance(value, Mapping):
        return {str(k): to_jsonable(v) for k, v in value.items()}
    if isinstance(value, pd.DataFrame):
        return to_jsonable(value.to_dict("records"))
    if isinstance(value, list | tuple | set | frozenset):
        return [to_jsonable(v) for v in value]
    if isinstance(value, np.ndarray | Tensor):
        return to_jsonable(value.tolist())
    if isinstance(value, np.generic):
        return to_jsonable(value.item())
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if value is None or isinstance(value, str | int | bool):
        return value
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
