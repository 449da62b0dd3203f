"""Bars: ranked components with their random twins, and an audit's models side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from probe.errors import DataError
from probe.plots._template import (
    MODEL_COLOURS,
    NEUTRAL,
    PALETTE,
    add_twins,
    checked,
    column,
    escape,
    interval_bars,
    new_figure,
    template,
    with_unit,
)

SETS = ("forget", "unseen", "retain", "unseen_retain", "holdout", "corpus")
SET_NAMES = {
    "unseen": "forget,<br>unseen<br>phrasing",
    "unseen_retain": "retain,<br>unseen<br>phrasing",
    "given": "forget,<br>fact in<br>context",
    "given_holdout": "holdout,<br>fact in<br>context",
    "real_authors": "real<br>authors",
    "world_facts": "world<br>facts",
}
METRIC_NAMES = {
    "recall": "recall (answers exact)",
    "probability": "probability per token",
    "perplexity": "perplexity",
    "nll": "loss (nats per token)",
    "kl_gold_model": "KL(gold‖model) (nats)",
    "kl_model_gold": "KL(model‖gold) (nats)",
    "kl_original_model": "KL(original‖model) (nats)",
}


def latent_bars(
    table: pd.DataFrame,
    k: int = 20,
    *,
    title: str = "Top latents",
    score_name: str = "score",
    unit: str = "",
    signed: bool = False,
    twins: np.ndarray | Sequence[float] | None = None,
) -> go.Figure:
    """The k best latents, best first, intervals on the bars.

    Args:
        table: `latent` and `score`; `low`, `high` are drawn; a `context` column goes into the hover.
        k: How many to draw.
        title: The figure's title.
        score_name: What the score is.
        unit: Its unit.
        signed: Whether a large negative score is as good as a large positive one.
        twins: Scores of random twins, shaded.

    Raises:
        DataError: No rows, or a column is missing.
    """
    checked(table, ["latent", "score"], "latent_bars")
    names = [f"latent {latent}" for latent in table["latent"]]
    return _ranked(table, names, k, title, "SAE latent", with_unit(score_name, unit), signed, twins)


def neuron_bars(
    table: pd.DataFrame,
    k: int = 20,
    *,
    title: str = "Top neurons",
    score_name: str = "score",
    unit: str = "",
    signed: bool = False,
    twins: np.ndarray | Sequence[float] | None = None,
) -> go.Figure:
    """The k best MLP neurons; needs `layer`, `neuron` and `score`. Otherwise as `latent_bars`."""
    checked(table, ["layer", "neuron", "score"], "neuron_bars")
    names = [f"L{layer} N{neuron}" for layer, neuron in zip(table["layer"], table["neuron"], strict=True)]
    return _ranked(table, names, k, title, "neuron", with_unit(score_name, unit), signed, twins)


def direction_bars(
    table: pd.DataFrame,
    k: int = 20,
    *,
    title: str = "Directions",
    score_name: str = "score",
    unit: str = "",
    signed: bool = False,
    twins: np.ndarray | Sequence[float] | None = None,
) -> go.Figure:
    """The k best directions, named by site and method. Otherwise as `latent_bars`."""
    checked(table, ["site", "score"], "direction_bars")
    methods = table["method"] if "method" in table.columns else [""] * len(table)
    names = [f"{site} {method}".strip() for site, method in zip(table["site"], methods, strict=True)]
    return _ranked(table, names, k, title, "direction", with_unit(score_name, unit), signed, twins)


def latent_scatter(
    table: pd.DataFrame,
    x: str = "frequency",
    y: str = "score",
    *,
    title: str = "Latents",
    x_name: str = "share of tokens on which the latent fires (log scale)",
    score_name: str = "score",
) -> go.Figure:
    """Every latent as a dot: how often it fires against its score. Latents that never fire are left out and counted."""
    checked(table, ["latent", x, y], "latent_scatter")
    alive = table[column(table, x) > 0]
    dead = len(table) - len(alive)
    figure = new_figure(f"{title} ({dead} never fire)" if dead else title, x_name, escape(score_name))
    figure.add_scattergl(
        x=column(alive, x),
        y=column(alive, y),
        mode="markers",
        marker={"size": 6, "color": PALETTE[0], "opacity": 0.6},
        text=[escape(latent) for latent in alive["latent"]],
        hovertemplate="latent %{text}<br>fires on %{x:.2%}<br><b>%{y:.3f}</b><extra></extra>",
    )
    return figure.update_xaxes(type="log", tickformat=".1~%")


def before_after_bars(
    table: pd.DataFrame,
    metrics: Sequence[str] = ("recall", "probability"),
    *,
    title: str = "Before and after, against gold",
) -> go.Figure:
    """Original, edited and gold side by side for every set, one row of bars per metric.

    Error bars are the table's `low` and `high`: an interval over people for the original and the edited model, the
    spread between seeds for gold.

    Args:
        table: A report card's table: `set, metric, model, value, low, high` (`n` goes into the hover).
        metrics: Which metrics to draw; those that the table lacks are left out.
        title: The figure's title.

    Raises:
        DataError: No rows, a missing column, or none of the metrics is there.
    """
    checked(table, ["set", "metric", "model", "value", "low", "high"], "before_after_bars")
    found = [metric for metric in metrics if (table["metric"] == metric).any()]
    if not found:
        raise DataError(
            f"before_after_bars needs one of {list(metrics)}; the table has {sorted(table['metric'].unique())}"
        )
    figure = make_subplots(rows=len(found), cols=1, vertical_spacing=0.28 / len(found))
    figure.update_layout(template=template(), title_text=escape(title), barmode="group", height=120 + 260 * len(found))
    for i, metric in enumerate(found, start=1):
        for model, colour in MODEL_COLOURS.items():
            rows = _ordered(table[(table["metric"] == metric) & (table["model"] == model)])
            if len(rows):
                figure.add_trace(_model_bar(rows, model, colour, legend=i == 1), row=i, col=1)
        figure.update_yaxes(title_text=METRIC_NAMES.get(metric, escape(metric)), rangemode="tozero", row=i, col=1)
        if metric in ("recall", "probability"):
            figure.update_yaxes(tickformat=".0%", range=[0, 1.04], row=i, col=1)
    return figure


def distance_bars(table: pd.DataFrame, metric: str = "kl_gold_model", *, title: str = "Distance to gold") -> go.Figure:
    """How far the original (ceiling) and the edited model are from gold; gold against gold is the floor.

    Args and errors as `before_after_bars`.
    """
    figure = before_after_bars(table, (metric,), title=title)
    names = {"original": "original (ceiling)", "gold": "gold against gold (floor)"}
    return figure.for_each_trace(lambda bar: bar.update(name=names.get(bar.name, bar.name)))


def _ordered(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows in the order in which sets are read: forget first, what must survive after it."""
    rank = {name: i for i, name in enumerate(SETS)}
    return rows.iloc[np.argsort([rank.get(name, len(rank)) for name in rows["set"]], kind="stable")]


def _model_bar(rows: pd.DataFrame, model: str, colour: str, legend: bool) -> go.Bar:
    value = column(rows, "value")
    return go.Bar(
        x=[SET_NAMES.get(name, escape(name)) for name in rows["set"]],
        y=value,
        name=model,
        legendgroup=model,
        showlegend=legend,
        marker={"color": colour, "line": {"color": colour, "width": 2}},  # a bar at 0 is a line, not a gap
        error_y=interval_bars(value, column(rows, "low"), column(rows, "high")),
        customdata=np.stack([column(rows, key) for key in ("low", "high", "n")], axis=-1),
        hovertemplate="%{x}: <b>%{y:.3~g}</b> [%{customdata[0]:.3~g}, %{customdata[1]:.3~g}], n = %{customdata[2]}"
        "<extra>%{fullData.name}</extra>",
    )


def _ranked(
    table: pd.DataFrame,
    names: list[str],
    k: int,
    title: str,
    what: str,
    label: str,
    signed: bool,
    twins: np.ndarray | Sequence[float] | None,
) -> go.Figure:
    """Horizontal bars, the best at the top."""
    score = column(table, "score")
    key = np.abs(score) if signed else score
    order = np.argsort(-np.nan_to_num(key, nan=-np.inf), kind="stable")[:k]
    rows = table.iloc[order]
    figure = new_figure(title, escape(label), what, height=max(260, 130 + 24 * len(rows)))
    contexts = rows["context"] if "context" in rows.columns else [""] * len(rows)
    figure.add_bar(
        x=score[order],
        y=[escape(names[i]) for i in order],
        orientation="h",
        name=escape(label),
        showlegend=False,
        marker_color=PALETTE[0],
        error_x=interval_bars(score[order], column(rows, "low"), column(rows, "high")),
        text=[escape(context) for context in contexts],
        textposition="none",
        hovertemplate="%{y}: <b>%{x:.3g}</b><br>%{text}<extra></extra>",
    )
    add_twins(figure, twins, "x")
    figure.update_xaxes(zeroline=True, zerolinecolor=NEUTRAL)
    return figure.update_yaxes(autorange="reversed", type="category", showgrid=False, dtick=1)
