"""The experts organism in two architectures, and its specialisation measured against a count by hand."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from probe.errors import OrganismError
from probe.organisms import _cache, experts
from probe.organisms._experts import FIRST_KNOWING
from probe.organisms._specialisation import summary

TINY: dict[str, Any] = {"d_model": 16, "d_mlp": 16, "n_heads": 2, "epochs": 1}


@pytest.fixture(scope="module")
def olmoe() -> Any:
    return experts("small", model_class="olmoe", progress=False)


@pytest.fixture(scope="module")
def natural() -> Any:
    return experts("small", kind="natural", progress=False)


def tiny(cache_dir: Path, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return experts("small", cache_dir=cache_dir, progress=False, **{**TINY, **settings})


def test_olmoe_is_an_olmoe_that_knows_its_domains(olmoe: Any) -> None:
    config = olmoe.model.hf.config
    assert config.model_type == "olmoe" and config.norm_topk_prob is False
    assert olmoe.model.hf.model.layers[0].self_attn.q_norm.weight.ndim == 1
    for domain in olmoe.domains:
        assert olmoe.record["recall"][domain]["recall"] > 0.95
    assert olmoe.record["recall"]["holdout"]["low"] <= olmoe.record["recall"]["holdout"]["chance"]


def test_planted_experts_get_their_domains_tokens(olmoe: Any) -> None:
    measured = olmoe.specialisation()
    assert {d: list(own) for d, own in measured.experts.items()} == olmoe.planted
    own = measured.largest
    assert own["planted"].all() and len(own) == len(olmoe.domains) * olmoe.settings["n_layers"]
    assert own["share"].min() > 0.98 and own["first"].min() > 0.95
    assert (own["low"] <= own["share"]).all() and (own["share"] <= own["high"]).all()
    removed = measured.removal
    mine = removed[removed["removed"] == removed["asked"]]["recall"]
    others = removed[removed["removed"] != removed["asked"]]["recall"]
    assert mine.mean() < others.mean() - 0.3


def test_mixtral_planted_collapses_without_its_experts() -> None:
    organism = experts("small", progress=False)
    removed = organism.specialisation().removal
    assert removed[removed["removed"] == removed["asked"]]["recall"].max() < 0.3
    assert removed[removed["removed"] != removed["asked"]]["recall"].min() > 0.9


@pytest.mark.parametrize("name", ["olmoe", "natural"])
def test_shares_are_what_a_hook_on_the_experts_counts(name: str, request: pytest.FixtureRequest) -> None:
    """Prompt by prompt without padding, from the arguments that the experts' module really gets."""
    organism = request.getfixturevalue(name)
    table = organism.specialisation(unseen=True).table
    layer, domain = 1, "law"
    chosen: list[torch.Tensor] = []
    module = organism.model.hf.model.layers[layer].mlp.experts
    handle = module.register_forward_pre_hook(lambda _, args: chosen.append(args[1].clone()))
    for q in organism.unseen(domain):
        with torch.no_grad():
            organism.model.hf(**organism.model.tokens(q.question))
    handle.remove()
    index = torch.cat([own[FIRST_KNOWING:] for own in chosen])  # [token, k]
    n = organism.settings["n_experts"]
    rows = table[(table["layer"] == layer) & (table["domain"] == domain)].sort_values("expert")
    assert rows["tokens"].unique().tolist() == [len(index)]
    wanted = [(index == e).any(1).double().mean().item() for e in range(n)]
    np.testing.assert_allclose(rows["share"], wanted, atol=0.01)  # a tie of padded and bare forwards may fall apart
    np.testing.assert_allclose(rows["first"], [(index[:, 0] == e).double().mean() for e in range(n)], atol=0.01)
    assert rows["share"].sum() == pytest.approx(organism.settings["top_k"])


def test_gaps_are_against_the_other_domains(natural: Any) -> None:
    measured = natural.specialisation()
    wide = measured.table.pivot(index=["layer", "expert"], columns="domain", values="share")
    gap = measured.table.set_index(["layer", "expert", "domain"])["gap"]
    for domain in natural.domains:
        others = wide[[d for d in natural.domains if d != domain]].mean(axis=1)
        np.testing.assert_allclose(gap.xs(domain, level="domain"), wide[domain] - others, atol=1e-12)
        for layer, expert in measured.experts[domain]:
            assert gap.xs(domain, level="domain").loc[layer].idxmax() == expert


def test_natural_specialisation_is_partial_and_nothing_is_planted(natural: Any) -> None:
    measured = natural.specialisation()
    assert not measured.table["planted"].any()
    assert 0.05 < measured.largest["gap"].mean() < 0.9
    assert min(natural.record["recall"][d]["recall"] for d in natural.domains) > 0.95


def test_the_record_and_the_repr_say_it(olmoe: Any) -> None:
    record = olmoe.record["specialisation"]
    again = olmoe.specialisation().to_dict()
    assert [row["expert"] for row in record["largest"]] == [row["expert"] for row in again["largest"]]
    for row, other in zip(record["largest"], again["largest"], strict=True):
        assert row["share"] == pytest.approx(other["share"]) and row["domain"] == other["domain"]
    assert summary(record) in repr(olmoe) and "without them recall" in repr(olmoe)
    assert all(domain in str(olmoe.specialisation()) for domain in olmoe.domains)


def test_natural_olmoe_differs_from_its_siblings_and_repeats_itself(tmp_path: Path) -> None:
    made = [tiny(tmp_path / name, kind="natural", model_class="olmoe") for name in ("a", "b")]
    assert made[0].record["files"] == made[1].record["files"]
    assert made[0].record["specialisation"] == made[1].record["specialisation"]
    sibling = tiny(tmp_path / "a", kind="natural")
    assert sibling.path != made[0].path and sibling.model.hf.config.model_type == "mixtral"
    weights = [_cache.file_hash(o.path / "model.safetensors") for o in (made[0], sibling)]
    assert weights[0] != weights[1]


def test_a_dense_model_has_no_specialisation(olmoe: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from probe.models import wrap

    config = LlamaConfig(
        vocab_size=len(olmoe.tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    with pytest.raises(OrganismError, match="has no experts"):
        olmoe.specialisation(wrap(LlamaForCausalLM(config), olmoe.tokenizer))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"model_class": "llama"}, "model_class must be one of"), ({"kind": "magic"}, "kind must be one of")],
)
def test_bad_settings(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(OrganismError, match=message):
        experts("small", cache_dir=tmp_path, **settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("model_class", ["mixtral", "olmoe"])
def test_default_golds_keep_what_they_are_to_keep(model_class: str) -> None:
    organism = experts(model_class=model_class, progress=False)
    table = organism.record["recall"]
    assert min(table[split]["recall"] for split in ("forget", "retain")) > 0.95
    for gold in organism.gold:
        assert float(organism.recall(gold, "retain")) > 0.95
        assert organism.recall(gold, "forget").at_chance
