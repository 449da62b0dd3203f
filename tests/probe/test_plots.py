"""Figures: the data in the traces is the table's, zero is the middle of every map, no token loses its column."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from probe import plots
from probe.errors import DataError


@pytest.fixture
def sweep() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for method in ("mean_diff", "logistic"):
        for layer in range(4):
            score = 0.5 + 0.1 * layer + 0.01 * rng.random()
            rows.append(
                {
                    "site": f"blocks.{layer}.hook_resid_post",
                    "layer": layer,
                    "method": method,
                    "score": score,
                    "low": score - 0.05,
                }
                | {
                    "high": score + 0.04,
                    "auc": score,
                    "control": 0.5,
                    "control_low": 0.45,
                    "control_high": 0.55,
                    "selectivity": score - 0.5,
                }
                | {"majority": 0.5, "bag_of_tokens": 0.6, "n": 200, "n_groups": 20}
            )
    return pd.DataFrame(rows)


@pytest.fixture
def card() -> pd.DataFrame:
    rows = [
        (name, metric, model, value, value - 0.02, value + 0.03, 8)
        for metric in ("recall", "probability", "kl_gold_model")
        for name in ("retain", "forget", "unseen")
        for model, value in (("original", 0.9), ("edited", 0.2), ("gold", 0.1))
    ]
    return pd.DataFrame(rows, columns=["set", "metric", "model", "value", "low", "high", "n"])


def named(figure, name: str):
    return next(trace for trace in figure.data if trace.name == name)


def test_probe_curves_draw_the_table_and_every_control(sweep):
    figure = plots.probe_curves(sweep)
    for method, name in (("mean_diff", "difference of means"), ("logistic", "logistic regression")):
        rows = sweep[sweep.method == method]
        assert list(named(figure, name).y) == list(rows.score)
        assert list(named(figure, name).x) == [0, 1, 2, 3]
        assert list(named(figure, f"{name}, shuffled labels").y) == [0.5] * 4
        band = named(figure, f"{name}: 95 % interval")
        assert list(band.y) == [*rows.high, *rows.low[::-1]]
    assert set(named(figure, "majority class").y) == {0.5}
    assert np.allclose(named(figure, "bag of tokens").y, 0.6)
    assert figure.layout.xaxis.title.text == "layer"
    assert "balanced accuracy" in figure.layout.yaxis.title.text


def test_probe_curves_keep_site_kinds_apart_and_place_the_embedding_before_layer_zero(sweep):
    both = pd.concat([sweep, sweep.assign(site=sweep.site.str.replace("resid_post", "attn_out"))])
    assert "logistic regression · attn_out" in [trace.name for trace in plots.probe_curves(both).data]
    embed = pd.concat([sweep.head(1).assign(site="hook_embed", layer=None), sweep])
    figure = plots.probe_curves(embed)
    assert list(named(figure, "difference of means").x) == [-1, 0, 1, 2, 3]
    assert figure.layout.xaxis.ticktext[0] == "embed"


def test_layer_curve_without_intervals_has_no_band(sweep):
    figure = plots.layer_curve(sweep[sweep.method == "logistic"][["layer", "score"]], unit="nats")
    assert len(figure.data) == 1
    assert figure.layout.yaxis.title.text == "score (nats)"


def test_position_heatmap_centres_at_zero_and_keeps_repeated_tokens():
    tokens = ["<s>", " the", " cat", " the", "\n"]
    table = pd.DataFrame(
        [
            {"layer": i, "position": p, "token": tokens[p], "score": i - p / 10, "n": 3}
            for p in range(5)
            for i in range(3)
        ]
    ).sample(frac=1, random_state=0)
    figure = plots.position_heatmap(table)
    heat = figure.data[0]
    assert heat.zmid == 0
    assert heat.colorscale[5] == (0.5, "#F7F7F7")
    assert len(set(heat.x)) == 5
    assert list(heat.x) == ["&lt;s&gt;", "·the₍₁₎", "·cat", "·the₍₂₎", "⏎"]
    assert np.allclose(heat.z, [[i - p / 10 for p in range(5)] for i in range(3)])
    assert list(heat.y) == ["0", "1", "2"]


def test_positions_that_are_roles_keep_their_order():
    table = pd.DataFrame({"layer": [0, 0, 0], "position": ["name", "after", "last"], "score": [1.0, 2.0, 3.0]})
    heat = plots.position_heatmap(table).data[0]
    assert list(heat.x) == ["name", "after", "last"]
    assert heat.z.tolist() == [[1.0, 2.0, 3.0]]


def test_maps_leave_unmeasured_cells_empty_and_name_their_twins():
    table = pd.DataFrame({"layer": [0, 1, 1], "expert": [0, 0, 1], "score": [0.5, -1.0, 2.0]})
    figure = plots.expert_map(table, twins=np.linspace(-1, 1, 101))
    assert np.array_equal(figure.data[0].z, [[0.5, np.nan], [-1.0, 2.0]], equal_nan=True)
    assert "95 % of 101 random twins: -0.95 to 0.95" in figure.layout.title.text
    heads = plots.head_heatmap(table.rename(columns={"expert": "head"}), score_name="effect", unit="logits")
    assert heads.data[0].colorbar.title.text == "effect (logits)"
    assert heads.data[0].zmid == 0


def test_ranked_bars_sort_by_size_and_carry_intervals_and_contexts():
    table = pd.DataFrame(
        {"latent": [3, 5, 9], "score": [0.1, -0.9, 0.5], "low": [0.0, -1.0, 0.4], "high": [0.3, -0.7, 0.6]}
    )
    figure = plots.latent_bars(table.assign(context=["a", "<b>b", "c"]), k=2, signed=True, twins=[-0.1, 0.1])
    bar = figure.data[0]
    assert list(bar.y) == ["latent 5", "latent 9"]
    assert list(bar.x) == [-0.9, 0.5]
    assert np.allclose(bar.error_x.array, [0.2, 0.1])
    assert np.allclose(bar.error_x.arrayminus, [0.1, 0.1])
    assert bar.text[0] == "&lt;b&gt;b"
    assert figure.layout.shapes[0].name == "95 % of 2 random twins"
    assert list(plots.latent_bars(table, k=2).data[0].y) == ["latent 9", "latent 3"]
    neurons = plots.neuron_bars(pd.DataFrame({"layer": [1], "neuron": [7], "score": [2.0]}))
    assert list(neurons.data[0].y) == ["L1 N7"]


def test_direction_bars_and_latent_scatter(sweep):
    assert plots.direction_bars(sweep, k=1).data[0].y[0].startswith("blocks.3.hook_resid_post")
    table = pd.DataFrame({"latent": [0, 1, 2], "frequency": [0.0, 0.1, 0.5], "score": [0.5, 0.6, 0.7]})
    figure = plots.latent_scatter(table)
    assert list(figure.data[0].y) == [0.6, 0.7]
    assert "1 never fire" in figure.layout.title.text


def test_before_after_bars_put_gold_beside_with_its_spread(card):
    figure = plots.before_after_bars(card)
    assert [trace.name for trace in figure.data] == ["original", "edited", "gold"] * 2
    gold = figure.data[2]
    assert gold.x[0] == "forget"
    assert np.allclose(gold.y, 0.1)
    assert np.allclose(gold.error_y.array, 0.03)
    assert np.allclose(gold.error_y.arrayminus, 0.02)
    distance = plots.distance_bars(card)
    assert [trace.name for trace in distance.data] == ["original (ceiling)", "edited", "gold against gold (floor)"]
    assert distance.layout.yaxis.title.text == "KL(gold‖model) (nats)"


def test_themes_change_ink_and_nothing_else(sweep):
    light = plots.probe_curves(sweep)
    dark = plots.theme(light, "dark")
    assert light.layout.template.layout.paper_bgcolor == "#FFFFFF"
    assert dark.layout.template.layout.paper_bgcolor == "rgba(0,0,0,0)"
    assert json.dumps(light.to_plotly_json()["data"], default=list) == json.dumps(
        dark.to_plotly_json()["data"], default=list
    )


@pytest.mark.parametrize(
    ("draw", "table", "message"),
    [
        (plots.probe_curves, pd.DataFrame({"method": [], "score": []}), "empty"),
        (plots.probe_curves, pd.DataFrame({"score": [1.0]}), "method"),
        (
            plots.position_heatmap,
            pd.DataFrame({"layer": [0, 0], "position": [1, 1], "score": [1.0, 2.0]}),
            "one row per layer",
        ),
        (
            plots.position_heatmap,
            pd.DataFrame({"layer": [0, 1], "position": [1, 1], "token": ["a", "b"], "score": [1.0, 2.0]}),
            "one token per position",
        ),
        (
            plots.before_after_bars,
            pd.DataFrame({"set": ["a"], "metric": ["x"], "model": ["m"], "value": [1.0], "low": [0.0], "high": [1.0]}),
            "recall",
        ),
    ],
)
def test_tables_that_cannot_be_drawn_say_why(draw, table, message):
    with pytest.raises(DataError, match=message):
        draw(table)


def test_every_kind_of_scores_has_a_figure():
    assert set(plots.BY_KIND) == {"direction", "layer", "position", "head", "expert", "latent", "neuron"}
