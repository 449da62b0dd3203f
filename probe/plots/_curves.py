"""Scores along the depth of a model, with their intervals and their controls."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from probe.plots._template import (
    NEUTRAL,
    PALETTE,
    add_twins,
    checked,
    column,
    escape,
    new_figure,
    translucent,
    with_unit,
)

METHOD_NAMES = {"mean_diff": "difference of means", "logistic": "logistic regression"}
_BASELINES = {"majority": ("majority class", "dash"), "bag_of_tokens": ("bag of tokens", "dashdot")}


def probe_curves(
    table: pd.DataFrame,
    *,
    title: str = "Linear probes by layer",
    score_name: str = "balanced accuracy, out of fold",
    unit: str = "",
    twins: np.ndarray | Sequence[float] | None = None,
) -> go.Figure:
    """Probe accuracy by layer with its interval, its shuffled-label control and the baselines.

    Args:
        table: One row per site and method. Needs `method`, `score` and `site` or `layer`; draws `low`, `high`,
            `control`, `majority`, `bag_of_tokens`, and hovers `auc`, `selectivity`, `n`, `n_groups`, where it has them.
        title: The figure's title.
        score_name: What `score` is.
        unit: Its unit, if it has one.
        twins: Scores of random twins, shaded.

    Raises:
        DataError: No rows, or a column is missing.
    """
    checked(table, ["method", "score"], "probe_curves")
    table = table.assign(_x=_depth(table), _kind=_kinds(table))
    figure = new_figure(title, "layer", with_unit(score_name, unit))
    several = table["_kind"].nunique() > 1
    for i, ((method, kind), rows) in enumerate(table.groupby(["method", "_kind"], sort=False)):
        name = METHOD_NAMES.get(str(method), str(method)) + (f" · {kind}" if several else "")
        _curve(figure, rows.sort_values("_x"), escape(name), PALETTE[i % len(PALETTE)])
    _baselines(figure, table)
    add_twins(figure, twins, "y")
    _depth_axis(figure, table)
    return figure.update_yaxes(range=_reach(table))


def layer_curve(
    table: pd.DataFrame,
    *,
    title: str = "Score by layer",
    score_name: str = "score",
    unit: str = "",
    twins: np.ndarray | Sequence[float] | None = None,
) -> go.Figure:
    """One score per layer with its interval. `table` needs `layer` and `score`; see `probe_curves` for the rest."""
    checked(table, ["layer", "score"], "layer_curve")
    table = table.assign(_x=_depth(table)).sort_values("_x")
    figure = new_figure(title, "layer", with_unit(score_name, unit))
    _curve(figure, table, escape(score_name), PALETTE[0])
    add_twins(figure, twins, "y")
    _depth_axis(figure, table)
    return figure


def _reach(table: pd.DataFrame) -> list[float]:
    """From a little under the lowest of scores and controls, in steps of a tenth, to 1 at least."""
    keys = ("score", "low", "high", "control", "majority", "bag_of_tokens")
    values = np.concatenate([column(table, key) for key in keys])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    return [np.floor(10 * low - 0.5) / 10, max(1.0, high) + 0.02]


def _depth(table: pd.DataFrame) -> np.ndarray:
    """Where a row stands on the layer axis: embeddings at -1, what follows the last layer one past it."""
    layer = column(table, "layer")
    sites = table["site"].astype(str) if "site" in table.columns else pd.Series([""] * len(table))
    from_name = sites.str.extract(r"^blocks\.(\d+)\.")[0].astype(float).to_numpy()
    layer = np.where(np.isnan(layer), from_name, layer)
    last = np.nanmax(layer) if np.isfinite(layer).any() else -1.0
    outside = np.where(sites.str.contains("embed"), -1.0, last + 1)
    return np.where(np.isnan(layer), outside, layer)


def _kinds(table: pd.DataFrame) -> list[str]:
    """`resid_post` of `blocks.3.hook_resid_post`; sites outside the blocks continue the residual stream's curve."""
    if "site" not in table.columns:
        return [""] * len(table)
    kinds = [re.sub(r"^blocks\.\d+\.", "", str(site)).replace("hook_", "") for site in table["site"]]
    inside = [kind for kind, site in zip(kinds, table["site"], strict=True) if str(site).startswith("blocks.")]
    main = next((kind for kind in inside if kind.startswith("resid")), None)
    return [
        k if str(s).startswith("blocks.") or main is None else main for k, s in zip(kinds, table["site"], strict=True)
    ]


def _curve(figure: go.Figure, rows: pd.DataFrame, name: str, colour: str) -> None:
    """A line with its band, and its shuffled-label control as a dotted line of the same colour."""
    x, score, low, high = rows["_x"].to_numpy(), column(rows, "score"), column(rows, "low"), column(rows, "high")
    known = np.isfinite(low) & np.isfinite(high)
    if known.any():
        band_x, band_y = np.r_[x[known], x[known][::-1]], np.r_[high[known], low[known][::-1]]
        style = {"fill": "toself", "fillcolor": translucent(colour, 0.18), "line": {"width": 0}, "hoverinfo": "skip"}
        figure.add_scatter(
            x=band_x, y=band_y, mode="lines", name=f"{name}: 95 % interval", legendgroup=name, showlegend=False, **style
        )
    figure.add_scatter(
        x=x,
        y=score,
        name=name,
        legendgroup=name,
        mode="lines+markers",
        line={"color": colour, "width": 2.5},
        marker={"size": 7},
        text=[_hover(row) for row in rows.to_dict("records")],
        hovertemplate="layer %{x}: <b>%{y:.3f}</b><br>%{text}<extra>%{fullData.name}</extra>",
    )
    control = column(rows, "control")
    if np.isfinite(control).any():
        figure.add_scatter(
            x=x,
            y=control,
            name=f"{name}, shuffled labels",
            legendgroup=name,
            mode="lines",
            line={"color": colour, "width": 1.5, "dash": "dot"},
            customdata=np.stack([column(rows, "control_low"), column(rows, "control_high")], axis=-1),
            hovertemplate="layer %{x}: %{y:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}]"
            "<extra>%{fullData.name}</extra>",
        )


def _hover(row: Mapping[Any, Any]) -> str:
    parts = []
    for key in ("site", "low", "high", "auc", "selectivity", "n", "n_groups"):
        value = row.get(key)
        if value is None or (isinstance(value, float) and np.isnan(value)):
            continue
        parts.append(
            f"{key} {value:.3f}" if isinstance(value, float) and not value.is_integer() else f"{key} {escape(value)}"
        )
    return "<br>".join(parts)


def _baselines(figure: go.Figure, table: pd.DataFrame) -> None:
    """Horizontal lines for what needs no activations; one value per table, or the mean where the rows differ."""
    ends = [float(table["_x"].min()), float(table["_x"].max())]
    if ends[0] == ends[1]:
        ends = [ends[0] - 0.5, ends[1] + 0.5]
    for key, (name, dash) in _BASELINES.items():
        values = column(table, key)
        if np.isfinite(values).any():
            level = float(np.nanmean(values))
            figure.add_scatter(
                x=ends,
                y=[level, level],
                name=name,
                mode="lines",
                line={"color": NEUTRAL, "width": 1.8, "dash": dash},
                hovertemplate=f"{name}: %{{y:.3f}}<extra></extra>",
            )


def _depth_axis(figure: go.Figure, table: pd.DataFrame) -> None:
    """Whole layers as ticks, `embed` and `final` where there are such sites."""
    x = sorted({float(value) for value in table["_x"]})
    named = {-1.0: "embed"}
    if "site" in table.columns:
        after = table.loc[~table["site"].astype(str).str.contains("blocks|embed"), "_x"]
        named |= {float(value): "final" for value in after}
    step = max(1, -(-len(x) // 16))  # at most sixteen ticks
    ticks = [value for i, value in enumerate(x) if i % step == 0 or value in named]
    figure.update_xaxes(tickvals=ticks, ticktext=[named.get(value, f"{value:g}") for value in ticks])
