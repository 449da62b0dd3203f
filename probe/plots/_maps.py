"""Scores over two axes of components: layer by position, layer by head, layer by expert. Zero is always white."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from probe.errors import DataError
from probe.plots._template import (
    DIVERGING,
    checked,
    column,
    escape,
    new_figure,
    token_labels,
    twins_range,
    with_unit,
    wrapped,
)


def position_heatmap(
    table: pd.DataFrame,
    value: str = "score",
    *,
    title: str = "Patching by layer and position",
    score_name: str = "score",
    unit: str = "",
    twins: np.ndarray | Sequence[float] | None = None,
) -> go.Figure:
    """Layer by position, the tokens written under the positions.

    Args:
        table: One row per layer and position: `layer`, `position`, the value; `token` labels the positions where it is
            there, `low`, `high`, `n` go into the hover.
        value: The column to draw.
        title: The figure's title.
        score_name: What the value is.
        unit: Its unit.
        twins: Scores of random twins; their central 95 % is named under the title.

    Raises:
        DataError: No rows, a missing column, two rows for one cell, or two tokens for one position.
    """
    checked(table, ["layer", "position", value], "position_heatmap")
    positions = _in_order(table["position"])
    labels = [escape(position) for position in positions]
    if "token" in table.columns:
        labels = token_labels(_one_token_each(table, positions))
    figure = _map(table, value, "position", labels, title, with_unit(score_name, unit), twins)
    many = len(labels) > 20  # every token keeps its label: plotly would leave some out
    tick = {"tickangle": -90, "tickfont_size": 11} if many else {"tickangle": -45}
    return figure.update_xaxes(title_text="position (token)", dtick=1, **tick)


def head_heatmap(
    table: pd.DataFrame,
    value: str = "score",
    *,
    title: str = "Heads",
    score_name: str = "score",
    unit: str = "",
    twins: np.ndarray | Sequence[float] | None = None,
) -> go.Figure:
    """Layer by attention head; `table` has `layer`, `head` and the value. Otherwise as `position_heatmap`."""
    return _component_map(table, value, "head", title, with_unit(score_name, unit), twins)


def expert_map(
    table: pd.DataFrame,
    value: str = "score",
    *,
    title: str = "Experts",
    score_name: str = "score",
    unit: str = "",
    twins: np.ndarray | Sequence[float] | None = None,
) -> go.Figure:
    """Layer by expert; `table` has `layer`, `expert` and the value. Otherwise as `position_heatmap`."""
    return _component_map(table, value, "expert", title, with_unit(score_name, unit), twins)


def _component_map(
    table: pd.DataFrame,
    value: str,
    across: str,
    title: str,
    label: str,
    twins: np.ndarray | Sequence[float] | None,
) -> go.Figure:
    checked(table, ["layer", across, value], f"a map of {across}s")
    labels = [escape(component) for component in _in_order(table[across])]
    figure = _map(table, value, across, labels, title, label, twins)
    return figure.update_xaxes(title_text=across, nticks=min(len(labels), 32))


def _map(
    table: pd.DataFrame,
    value: str,
    across: str,
    labels: list[str],
    title: str,
    label: str,
    twins: np.ndarray | Sequence[float] | None,
) -> go.Figure:
    """`layer` upwards, `across` to the right, colours symmetric about zero; cells never measured stay empty."""
    if table.duplicated(["layer", across]).any():
        raise DataError(
            f"a map needs one row per layer and {across}; some have several: select one component or method"
        )
    grids = {key: _grid(table.assign(**{key: column(table, key)}), key, across) for key in (value, "low", "high", "n")}
    layers = [escape(layer) for layer in _in_order(table["layer"])]
    figure = new_figure(_with_twins(title, twins), across, "layer", height=max(340, 150 + 26 * len(layers)))
    figure.add_heatmap(
        x=labels,
        y=layers,
        z=grids[value],
        zmid=0,
        colorscale=DIVERGING,
        xgap=1,
        ygap=1,
        customdata=np.stack([grids["low"], grids["high"], grids["n"]], axis=-1),
        hoverongaps=False,
        hovertemplate=_hover(table, across),
        colorbar={"title": {"text": wrapped(label), "side": "right"}, "thickness": 14, "outlinewidth": 0},
    )
    figure.update_xaxes(type="category", showgrid=False)
    return figure.update_yaxes(type="category", showgrid=False, nticks=min(len(layers), 24))


def _grid(table: pd.DataFrame, value: str, across: str) -> np.ndarray:
    """[layer, across], NaN where there is no row."""
    wide = table.pivot(index="layer", columns=across, values=value)
    grid: np.ndarray = wide.reindex(index=_in_order(table["layer"]), columns=_in_order(table[across])).to_numpy(float)
    return grid


def _in_order(values: pd.Series) -> list[Any]:
    """The distinct values: numbers sorted, names (such as the roles of positions) as they come."""
    distinct = list(values.unique())
    return sorted(distinct) if pd.api.types.is_numeric_dtype(values) else distinct


def _hover(table: pd.DataFrame, across: str) -> str:
    text = f"layer %{{y}}, {across} %{{x}}<br><b>%{{z:.3g}}</b>"
    if {"low", "high"} <= set(table.columns):
        text += " [%{customdata[0]:.3g}, %{customdata[1]:.3g}]"
    if "n" in table.columns:
        text += "<br>n = %{customdata[2]}"
    return text + "<extra></extra>"


def _with_twins(title: str, twins: np.ndarray | Sequence[float] | None) -> str:
    found = twins_range(twins)
    if found is None:
        return title
    return f"{title} (95 % of {found[2]} random twins: {found[0]:.3g} to {found[1]:.3g})"


def _one_token_each(table: pd.DataFrame, positions: list[Any]) -> list[str]:
    tokens = table.groupby("position")["token"].unique()
    several = [position for position in positions if len(tokens[position]) > 1]
    if several:
        raise DataError(
            f"position_heatmap needs one token per position; position {several[0]} has {list(tokens[several[0]])}"
        )
    return [str(tokens[position][0]) for position in positions]
