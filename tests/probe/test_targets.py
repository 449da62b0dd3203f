from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch

from probe.errors import TargetError
from probe.targets import Direction, Experts, Heads, Latents, Neurons, Scores, Subspace, Target, WeightMask, to_jsonable

RNG = torch.Generator().manual_seed(0)


def a(*shape):
    return torch.randn(*shape, generator=RNG)


TARGETS = [
    Direction("blocks.1.hook_resid_post", a(8), model_hash="h", evidence={"score": np.float32(0.5)}),
    Subspace("blocks.1.hook_resid_post", a(8, 3)),
    Neurons(((1, 4), (0, 2), (1, 4)), 16),
    Heads(((0, 1),), 4),
    Experts(((1, 7),), 8),
    Latents("blocks.0.hook_resid_post", (3, 9), a(2, 8), "sae/"),
    WeightMask({"w": torch.tensor([[True, False], [False, True]])}, model_hash="h"),
]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.kind)
def test_targets_survive_save_and_load(target, tmp_path):
    again = Target.load(target.save(tmp_path / "t"))
    assert type(again) is type(target) and len(again) == len(target)
    assert again.summary() == target.summary()
    assert again.model_hash == target.model_hash
    for name, tensor in target._tensors().items():
        torch.testing.assert_close(again._tensors()[name], tensor, rtol=0, atol=1e-6)
    assert again.evidence == to_jsonable(target.evidence)


def test_load_of_another_kind_is_refused(tmp_path):
    TARGETS[0].save(tmp_path)
    with pytest.raises(TargetError, match="holds a Direction, not a Heads"):
        Heads.load(tmp_path)


@pytest.mark.parametrize("harm", ["json", "kind", "tensors", "gone"])
def test_malformed_files_are_refused(harm, tmp_path):
    TARGETS[0].save(tmp_path)
    record = tmp_path / "target.json"
    if harm == "json":
        record.write_text("{")
    elif harm == "kind":
        record.write_text(json.dumps({"kind": "nonsense"}))
    elif harm == "tensors":
        (tmp_path / "target.safetensors").write_bytes(b"\0" * 5)
    else:
        record.unlink()
    with pytest.raises(TargetError):
        Target.load(tmp_path)


def test_a_direction_has_unit_norm_and_a_subspace_is_orthonormal_with_its_span_kept():
    vector, basis = a(8), a(8, 3)
    assert Direction("s", vector).vector.norm().item() == pytest.approx(1)
    made = Subspace("s", basis).basis
    torch.testing.assert_close(made.T @ made, torch.eye(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(made @ made.T @ basis, basis, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Direction("s", torch.zeros(4)),
        lambda: Direction("s", torch.tensor([1.0, float("nan")])),
        lambda: Direction("s", torch.ones(2, 2)),
        lambda: Subspace("s", torch.ones(4, 2)),
        lambda: Subspace("s", torch.zeros(4, 0)),
        lambda: Subspace("s", torch.eye(3)[:2]),
        lambda: Neurons((), 4),
        lambda: Neurons(((0, 4),), 4),
        lambda: Neurons(((-1, 0),), 4),
        lambda: Latents("s", (1, 2), torch.ones(1, 4)),
        lambda: WeightMask({"w": torch.zeros(2, dtype=torch.bool)}),
        lambda: WeightMask({"w": torch.ones(2)}),
    ],
)
def test_bad_targets_are_refused(make):
    with pytest.raises(TargetError):
        make()


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.kind)
def test_random_twins_match_in_size_differ_and_repeat_by_seed(target):
    twins = target.random_twins(5, seed=1)
    assert [len(t) for t in twins] == [len(target)] * 5
    assert all(type(t) is type(target) for t in twins)
    again = target.random_twins(5, seed=1)
    assert [t.summary() for t in again] == [t.summary() for t in twins]
    tensors = [torch.cat([x.double().flatten() for x in t._tensors().values()]) for t in twins if t._tensors()]
    assert all(
        torch.equal(x, torch.cat([y.double().flatten() for y in t._tensors().values()]))
        for x, t in zip(tensors, again, strict=False)
    )
    assert len({str(t.summary()) for t in twins}) > 1 or len({tuple(x.tolist()) for x in tensors}) > 1


def test_twins_of_neurons_avoid_the_target_and_keep_its_layers():
    target = Neurons(((0, 1), (0, 2), (2, 5)), 10)
    for twin in target.random_twins(20):
        assert {k: len(v) for k, v in twin.by_layer().items()} == {0: 2, 2: 1}
        assert not set(twin.index) & set(target.index)


def scores(kind="direction", **more):
    table = pd.DataFrame(
        {
            "site": ["x", "y", "z"],
            "layer": [0, 1, 2],
            "score": [0.5, 0.9, float("nan")],
            "head": [3, 1, 2],
            "position": [0, 1, 2],
            "n": [4, 4, 4],
        }
    )
    return Scores("m", kind, table, vectors={0: a(4), 1: a(4), 2: a(4)}, settings={"n_heads": 4}, **more)


def test_top_gives_a_direction_then_a_subspace_with_evidence():
    made = scores(model_hash="h", twins=np.array([0.1, 0.3]))
    one = made.top(1)
    assert isinstance(one, Direction) and one.site == "y" and one.model_hash == "h"
    assert one.evidence["rows"][0]["score"] == 0.9 and one.evidence["twins"]["mean"] == pytest.approx(0.2)
    assert isinstance(made.top(2), Subspace) and len(made.top(2)) == 2
    assert made.best.layer == 1 and made.best.direction.site == "y"
    with pytest.raises(AttributeError):
        _ = made.best.nonsense
    with pytest.raises(TargetError, match="1 <= k <= 3"):
        made.top(4)


def test_top_of_heads_and_signed_ranking():
    made = scores("head")
    assert made.top(2).index == ((0, 3), (1, 1)) and made.top(1).width == 4
    table = pd.DataFrame({"layer": [0, 0], "head": [0, 1], "score": [0.1, -0.5]})
    assert Scores("m", "head", table, signed=True).top(1).index == ((0, 1),)


def test_scores_survive_save_and_load(tmp_path):
    made = scores(twins=np.arange(3.0), controls={"null": pd.DataFrame({"a": [1]})})
    again = Scores.load(made.save(tmp_path))
    pd.testing.assert_frame_equal(again.table, made.table)
    assert again.controls["null"]["a"].tolist() == [1]
    np.testing.assert_array_equal(again.twins, made.twins)
    torch.testing.assert_close(again.vectors[1], made.vectors[1])
    (tmp_path / "scores.json").write_text("[]")
    with pytest.raises(TargetError):
        Scores.load(tmp_path)


def test_warnings_are_shown_wherever_scores_are():
    made = Scores(
        "m", "head", pd.DataFrame({"layer": [0], "head": [1], "score": [1.0]}), settings={"warnings": ["few <rows>"]}
    )
    assert "few <rows>" in repr(made) and "few &lt;rows&gt;" in made._repr_html_()


def test_empty_scores_are_refused():
    with pytest.raises(TargetError):
        Scores("m", "head", pd.DataFrame({"score": []}))


@pytest.mark.parametrize("kind", ["direction", "position", "head"])
def test_plots_show_the_scores_with_name_and_unit(kind):
    extra = {"method": ["mean_diff"] * 3, "low": [0.4, 0.8, 0.1], "high": [0.6, 1.0, 0.3], "token": ["a", "b", "c"]}
    made = scores(kind)
    made = Scores(
        "m", kind, made.table.assign(**extra), score_name="effect", unit="nats", twins=np.array([0.1, 0.2, 0.3])
    )
    drawn = made.plot(title="mine").to_json()
    assert "effect" in drawn
    assert "nats" in drawn
    assert "mine" in drawn


def test_a_kind_without_a_picture_says_so():
    with pytest.raises(TargetError, match="no picture"):
        Scores("m", "nonsense", pd.DataFrame({"score": [1.0]})).plot()
