"""Figures of an audit: the evidence behind a verdict, curves along steps or layers with gold's range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from probe.plots._template import MODEL_COLOURS, NEUTRAL, checked, escape, new_figure, translucent

_ROW = 30  # pixels of a row of evidence


def evidence_dots(
    table: pd.DataFrame, labels: Mapping[str, str] | None = None, *, title: str = "What the verdict heard"
) -> go.Figure:
    """Each piece of evidence between gold (0) and the original (1), with gold's range and the threshold.

    Args:
        table: `Verdict.evidence`: columns set, metric, original, gold, gold_low, gold_high, share, threshold, heard.
        labels: What a metric is called.
        title: The figure's title.

    Raises:
        DataError: No rows, or a column is missing.
    """
    names = ["set", "metric", "original", "gold", "gold_low", "gold_high", "share", "threshold", "heard"]
    heard = checked(table, names, "evidence_dots")
    heard = heard[heard["share"].notna()].iloc[::-1]
    checked(heard, names, "evidence_dots")
    axis = [_name(row, {} if labels is None else labels) for row in heard.to_dict("records")]
    scale = (heard["original"] - heard["gold"]).to_numpy(float)
    low, high = (((heard[end] - heard["gold"]) / scale).to_numpy(float) for end in ("gold_low", "gold_high"))
    figure = new_figure(
        title, "share of what the original knows: 0 is gold, 1 is the original", "", 150 + _ROW * len(axis)
    )
    figure.add_bar(
        x=high - low, base=low, y=axis, orientation="h", width=0.7, name="gold, lowest to highest",
        marker={"color": translucent(MODEL_COLOURS["gold"], 0.35), "line": {"width": 0}}, hoverinfo="skip",
    )  # fmt: skip
    limits = heard["threshold"].to_numpy(float)
    figure.add_scatter(
        x=limits, y=axis, mode="markers", name="threshold",
        marker={"symbol": "line-ns", "size": 16, "line": {"width": 2, "color": NEUTRAL}},
        hovertemplate="%{y}: threshold %{x:.0%}<extra></extra>",
    )  # fmt: skip
    for own, name, symbol in (
        (heard["heard"], "edited", "circle"),
        (~heard["heard"], "edited, not heard", "circle-open"),
    ):
        rows = np.flatnonzero(own.to_numpy(bool))
        if len(rows):
            figure.add_scatter(
                x=heard["share"].to_numpy(float)[rows], y=[axis[i] for i in rows], mode="markers", name=name,
                marker={"symbol": symbol, "size": 10, "color": MODEL_COLOURS["edited"]},
                hovertemplate="%{y}: <b>%{x:.0%}</b><extra>%{fullData.name}</extra>",
            )  # fmt: skip
    figure.add_vline(0, line={"color": NEUTRAL, "width": 1}).add_vline(1, line={"color": NEUTRAL, "width": 1})
    figure.update_yaxes(categoryorder="array", categoryarray=axis, automargin=True)
    return figure.update_xaxes(tickformat=".0%").update_layout(barmode="overlay")


def _name(row: Mapping[object, object], labels: Mapping[str, str]) -> str:
    metric = str(row["metric"])
    name = labels.get(metric, metric.replace("_", " "))
    where = str(row["set"]).replace("_", " ")
    return escape(name if where == "forget" else f"{name} ({where})")


def model_curves(
    table: pd.DataFrame, x: str, y: str, *, title: str, x_name: str = "", y_name: str = "", percent: bool = True
) -> go.Figure:
    """One curve for the original and the edited model, and gold's mean with its range between seeds.

    Args:
        table: Columns `model` (`original`, `edited`, `gold 1`, ...), `x` and `y`; one row a model and x.
        x: Column of the horizontal axis (a step, a layer).
        y: Column of the vertical one.
        title: The figure's title.
        x_name: Name of the horizontal axis; default the column's.
        y_name: Name of the vertical axis; default the column's.
        percent: Whether y is a share.

    Raises:
        DataError: No rows, or a column is missing.
    """
    checked(table, ["model", x, y], "model_curves")
    table = table[table[y].notna()]
    figure = new_figure(title, x_name or x, y_name or y.replace("_", " "))
    golds = table[table["model"].str.startswith("gold")]
    if len(golds):
        _band(figure, golds.groupby(x)[y].agg(["mean", "min", "max"]).reset_index(), x)
    for model in ("original", "edited"):
        rows = table[table["model"] == model].sort_values(x)
        if len(rows):
            line = {"color": MODEL_COLOURS[model], "width": 2.5}
            figure.add_scatter(x=rows[x], y=rows[y], name=model, mode="lines+markers", line=line)
    figure.update_traces(hovertemplate=f"%{{x}}: <b>%{{y:{'.1%' if percent else '.3~g'}}}</b>")
    if (table[x] % 1 == 0).all() and table[x].nunique() <= 12:
        figure.update_xaxes(tickvals=sorted(table[x].unique()))  # no half layers
    if percent:
        figure.update_yaxes(tickformat=".0%", range=[-0.02, 1.04])
    return figure


def _band(figure: go.Figure, rows: pd.DataFrame, x: str) -> None:
    colour = MODEL_COLOURS["gold"]
    both = np.r_[rows["max"], rows["min"][::-1]]
    figure.add_scatter(
        x=np.r_[rows[x], rows[x][::-1]], y=both, fill="toself", fillcolor=translucent(colour, 0.25), mode="lines",
        line={"width": 0}, name="gold, lowest to highest", hoverinfo="skip",
    )  # fmt: skip
    figure.add_scatter(x=rows[x], y=rows["mean"], name="gold, mean", mode="lines+markers", line={"color": colour})


def request_curves(table: pd.DataFrame, x: str, y: str, by: Sequence[str], *, title: str, x_name: str) -> go.Figure:
    """One curve for each value of the columns `by`: what growing or sequential requests do.

    Raises:
        DataError: No rows, or a column is missing.
    """
    checked(table, [x, y, *by], "request_curves")
    figure = new_figure(title, x_name, y.replace("_", " "))
    for key, rows in table.groupby(list(by), sort=False):
        name = ", ".join(str(one) for one in (key if isinstance(key, tuple) else (key,)))
        rows = rows.sort_values(x)
        figure.add_scatter(x=rows[x], y=rows[y], name=escape(name), mode="lines+markers")
    return figure.update_yaxes(tickformat=".0%", range=[-0.02, 1.04])
