"""The house template, its colours, and the small helpers that every figure shares."""

from __future__ import annotations

import html
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from probe.errors import DataError

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color/), without its yellow, which is too pale for lines on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MODEL_COLOURS = {"original": "#8A94A0", "edited": "#0072B2", "gold": "#E69F00"}
NEUTRAL = "#7A828C"  # baselines: readable on white and on black
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

# RdBu of ColorBrewer (Brewer, colorbrewer2.org), negative red and positive blue, its centre exactly at the middle.
DIVERGING = [
    [0.0, "#67001F"],
    [0.1, "#B2182B"],
    [0.2, "#D6604D"],
    [0.3, "#F4A582"],
    [0.4, "#FDDBC7"],
    [0.5, "#F7F7F7"],
    [0.6, "#D1E5F0"],
    [0.7, "#92C5DE"],
    [0.8, "#4393C3"],
    [0.9, "#2166AC"],
    [1.0, "#053061"],
]

_INKS = {
    "light": {"ink": "#1F2933", "grid": "#E4E7EB", "line": "#9AA5B1", "paper": "#FFFFFF", "hover": "#FFFFFF"},
    "dark": {"ink": "#E6EAEE", "grid": "#3A424C", "line": "#7B8794", "paper": "rgba(0,0,0,0)", "hover": "#1F2933"},
}


def template(mode: Literal["light", "dark"] = "light") -> go.layout.Template:
    """The house template.

    `light` has white paper, so that a figure is readable in a dark notebook and prints as it looks; `dark` is
    transparent with light ink, for a page that is dark behind it.
    """
    ink = _INKS[mode]
    axis: dict[str, Any] = {
        "gridcolor": ink["grid"],
        "linecolor": ink["line"],
        "tickcolor": ink["line"],
        "showline": True,
        "ticks": "outside",
        "ticklen": 4,
        "zeroline": False,
        "automargin": True,
        "title": {"standoff": 10},
    }
    layout = go.Layout(
        font={"family": FONT, "size": 14, "color": ink["ink"]},
        title={
            "x": 0,
            "xref": "paper",
            "xanchor": "left",
            "font": {"size": 17},
            "automargin": True,
            "yref": "container",
        },
        colorway=list(PALETTE),
        paper_bgcolor=ink["paper"],
        plot_bgcolor="rgba(0,0,0,0)",
        xaxis=axis,
        yaxis=axis,
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 0, "yref": "container", "yanchor": "bottom"},
        margin={"l": 56, "r": 16, "t": 48, "b": 48},
        hoverlabel={"bgcolor": ink["hover"], "bordercolor": ink["line"], "font": {"color": ink["ink"], "family": FONT}},
        hovermode="closest",
        colorscale={"diverging": DIVERGING},
        bargap=0.25,
    )
    ends = {"error_x": {"color": ink["ink"]}, "error_y": {"color": ink["ink"]}}  # readable on every bar
    return go.layout.Template(layout=layout, data={"bar": [go.Bar(ends)]})


def theme(figure: go.Figure, mode: Literal["light", "dark"]) -> go.Figure:
    """A copy of a figure in the light or the dark template."""
    return go.Figure(figure).update_layout(template=template(mode))


def new_figure(title: str, x: str, y: str, height: int = 420) -> go.Figure:
    """An empty figure in the light template with named axes."""
    figure = go.Figure()
    figure.update_layout(template=template(), title_text=escape(title), height=height)
    return figure.update_xaxes(title_text=x).update_yaxes(title_text=y)


def escape(text: object) -> str:
    """Text that plotly shows as it is: its own mark-up (`<s>`, `<b>`) and MathJax's dollars made harmless."""
    return html.escape(str(text), quote=False).replace("$", "&#36;")


def token_labels(tokens: Iterable[object], width: int = 14) -> list[str]:
    """Axis labels for tokens: white space made visible, long ones shortened, repeated ones numbered.

    A categorical axis merges equal labels, so `the cat the` would lose a column: it becomes `the₍₁₎ cat the₍₂₎`.

    Args:
        tokens: The tokens in order; sentencepiece's `▁` and byte-level BPE's `Ġ` count as a space.
        width: Characters after which a token is cut with an ellipsis.
    """
    shown = [_visible(str(token), width) for token in tokens]
    counts, seen = Counter(shown), Counter[str]()
    labels = []
    for text in shown:
        seen[text] += 1
        labels.append(escape(text) + (_subscript(seen[text]) if counts[text] > 1 else ""))
    return labels


def _visible(token: str, width: int) -> str:
    for raw, sign in (("Ġ", "·"), ("▁", "·"), (" ", "·"), ("Ċ", "⏎"), ("\r", "␍"), ("\n", "⏎"), ("\t", "⇥")):
        token = token.replace(raw, sign)
    token = "".join(c if c.isprintable() else "�" for c in token) or "∅"
    return token if len(token) <= width else token[: width - 1] + "…"


def _subscript(number: int) -> str:
    digits = str(number).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))
    return f"₍{digits}₎"


def checked(table: pd.DataFrame, columns: Sequence[str], what: str) -> pd.DataFrame:
    """The table itself, if it has rows and the columns.

    Raises:
        DataError: It has none, or lacks a column.
    """
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise DataError(f"{what} needs the columns {list(columns)}; missing {missing} in {list(table.columns)}")
    if len(table) == 0:
        raise DataError(f"{what} needs at least one row; the table is empty")
    return table


def column(table: pd.DataFrame, name: str) -> np.ndarray:
    """A numeric column as float64, NaN throughout when the table lacks it."""
    if name not in table.columns:
        return np.full(len(table), np.nan)
    return pd.to_numeric(table[name], errors="coerce").to_numpy(dtype=float)


def wrapped(text: str, width: int = 26) -> str:
    """Escaped text in lines of at most `width` characters: plotly does not wrap."""
    return "<br>".join(escape(line) for line in textwrap.wrap(text, width) or [""])


def with_unit(name: str, unit: str) -> str:
    """`score (nats)`, or the name alone when there is no unit."""
    return f"{name} ({unit})" if unit else name


def translucent(colour: str, alpha: float) -> str:
    """A `#RRGGBB` colour as rgba."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def interval_bars(value: np.ndarray, low: np.ndarray, high: np.ndarray, **style: Any) -> dict[str, Any] | None:
    """Plotly's error bars from interval ends; None where there is no interval at all."""
    if np.isnan(low).all() or np.isnan(high).all():
        return None
    up, down = np.nan_to_num(high - value), np.nan_to_num(value - low)
    return {
        "type": "data",
        "symmetric": False,
        "array": np.clip(up, 0, None),
        "arrayminus": np.clip(down, 0, None),
        "thickness": 1.5,
        "width": 4,
        **style,
    }


def twins_range(twins: np.ndarray | Sequence[float] | None) -> tuple[float, float, int] | None:
    """The central 95 % of the scores of random twins, and how many there were."""
    values = np.asarray([] if twins is None else twins, dtype=float).ravel()
    values = values[np.isfinite(values)]
    if values.size == 0:
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high), int(values.size)


def add_twins(figure: go.Figure, twins: np.ndarray | Sequence[float] | None, axis: Literal["x", "y"]) -> None:
    """Shade the central 95 % of random twins' scores across the axis that carries the score."""
    found = twins_range(twins)
    if found is None:
        return
    low, high, n = found
    name = f"95 % of {n} random twins"
    style = {"fillcolor": translucent(NEUTRAL, 0.22), "line_width": 0, "layer": "below"}
    if axis == "x":
        figure.add_vrect(x0=low, x1=high, name=name, showlegend=True, **style)
    else:
        figure.add_hrect(y0=low, y1=high, name=name, showlegend=True, **style)
