"""Plotly figures of everything that Probe measures, in one house style.

Every function takes a plain table and returns a `plotly.graph_objects.Figure`, so nothing here knows models, targets or
audits, and a table read back from a csv draws the same picture. `BY_KIND` maps the kind of a `Scores` to its function;
all of those share the keywords `title`, `score_name`, `unit` and `twins` (the scores of random twins).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from probe.plots._audit import evidence_dots, model_curves, request_curves
from probe.plots._bars import (
    before_after_bars,
    direction_bars,
    distance_bars,
    latent_bars,
    latent_scatter,
    neuron_bars,
)
from probe.plots._curves import METHOD_NAMES, layer_curve, probe_curves
from probe.plots._maps import expert_map, head_heatmap, position_heatmap
from probe.plots._template import MODEL_COLOURS, PALETTE, template, theme, token_labels

BY_KIND: dict[str, Callable[..., Any]] = {
    "direction": probe_curves,
    "layer": layer_curve,
    "position": position_heatmap,
    "head": head_heatmap,
    "expert": expert_map,
    "latent": latent_bars,
    "neuron": neuron_bars,
}

__all__ = [
    "BY_KIND",
    "METHOD_NAMES",
    "MODEL_COLOURS",
    "PALETTE",
    "before_after_bars",
    "direction_bars",
    "distance_bars",
    "evidence_dots",
    "expert_map",
    "head_heatmap",
    "latent_bars",
    "latent_scatter",
    "layer_curve",
    "model_curves",
    "neuron_bars",
    "position_heatmap",
    "probe_curves",
    "request_curves",
    "template",
    "theme",
    "token_labels",
]
