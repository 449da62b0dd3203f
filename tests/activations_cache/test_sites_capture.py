"""Mixtures of experts in a cache: read back with plain h5py and held to the brute force of `test_sites_experts`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

import activations_cache as ac
from tests import architectures as zoo
from tests.activations_cache import test_sites_experts as brute

KINDS = ("router_logits", "expert_indices", "expert_weights", "expert_out")
SITES = [f"{brute.PREFIX}{kind}" for kind in KINDS] + [f"blocks.{brute.LAYER}.hook_mlp_out"]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def documents(lengths: tuple[int, ...] = (7, 3, 9, 4, 1)) -> list[list[int]]:
    """Token ids of several lengths: a batch of them is padded."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 96, (n,), generator=generator).tolist() for n in lengths]


def stored(folder: Path) -> dict[str, np.ndarray]:
    """Every site of a cache of one shard, with h5py alone."""
    with h5py.File(folder / "shard-00000.h5", "r") as file:
        return {kind: file[f"sites/{name}"][()] for kind, name in zip((*KINDS, "mlp_out"), SITES, strict=True)}


@pytest.mark.parametrize("architecture", zoo.MOE)
def test_a_cache_holds_what_the_routing_rule_gives(architecture: str, tmp_path: Path) -> None:
    """Per sequence, alone and without padding: the rule, each chosen expert by hand, and the layer's output."""
    hf, data = zoo.tiny(architecture), documents()
    cache = ac.capture(hf, data, SITES, tmp_path / "acts", batch_tokens=32, progress=False)
    rows = stored(tmp_path / "acts")
    top_k, n_experts = hf.config.num_experts_per_tok, hf.model.layers[brute.LAYER].mlp.experts.down_proj.shape[0]
    assert rows["expert_indices"].dtype == np.int16
    assert rows["expert_indices"].shape == (24, top_k)
    assert rows["router_logits"].shape == (24, n_experts)
    assert rows["expert_out"].shape == (24, top_k, 32)
    assert torch.equal(cache[SITES[1]][:].long(), torch.from_numpy(rows["expert_indices"]).long())
    start = 0
    for ids in data:
        here = {kind: torch.from_numpy(values[start : start + len(ids)]) for kind, values in rows.items()}
        check_sequence(architecture, hf, ids, here)
        start += len(ids)


def check_sequence(architecture: str, hf: Any, ids: list[int], rows: dict[str, Tensor]) -> None:
    x = brute.mlp_input(hf, lambda: hf(input_ids=torch.tensor([ids])))
    logits = brute.router_logits(architecture, hf, x)
    index, weights = brute.route(architecture, hf, logits)
    each, out = brute.moe_layer(architecture, hf, x, index, weights)
    index, weights, each = brute.ordered(index, weights, each)
    seen = brute.ordered(rows["expert_indices"].long(), rows["expert_weights"], rows["expert_out"])
    close = {"rtol": 1e-4, "atol": 1e-4}
    assert torch.equal(seen[0], index[0])
    torch.testing.assert_close(rows["router_logits"], logits[0], **close)
    torch.testing.assert_close(seen[1], weights[0], **close)
    torch.testing.assert_close(seen[2], each[0], **close)
    torch.testing.assert_close(rows["mlp_out"], out[0], **close)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "deepseek_v3_groups"])
def test_a_cache_of_a_bfloat16_model(architecture: str, implementation: str, tmp_path: Path) -> None:
    """Bit for bit what the experts' module was given in the same forward, and what it makes of each pair."""
    hf, data = zoo.tiny(architecture, dtype=torch.bfloat16), documents((6, 6, 6))
    hf.set_experts_implementation(implementation)
    experts = hf.model.layers[brute.LAYER].mlp.experts
    given: list[tuple[Tensor, ...]] = []
    handle = experts.register_forward_pre_hook(lambda _, args: given.append(args))
    hf(input_ids=torch.tensor(data), attention_mask=torch.ones(3, 6, dtype=torch.long))
    handle.remove()
    hidden, index, weights = given[0]
    cache = ac.capture(hf, data, SITES, tmp_path / "acts", dtype="float32", batch_tokens=18, progress=False)
    rows = stored(tmp_path / "acts")
    assert np.array_equal(rows["expert_indices"], index.numpy())
    assert np.array_equal(rows["expert_weights"], weights.float().numpy())
    pairs = experts(
        hidden.repeat_interleave(index.shape[1], 0), index.reshape(-1, 1), weights.new_ones(index.numel(), 1)
    )
    assert np.array_equal(rows["expert_out"], pairs.reshape(*index.shape, -1).float().numpy())
    assert cache[SITES[3]].dtype == torch.float32


@pytest.mark.parametrize("architecture", ["mixtral", "olmoe", "deepseek_v2"])
def test_what_is_computed_in_float32_is_stored_so(architecture: str, tmp_path: Path) -> None:
    """Without a dtype nothing is lost: each site has the type that the model computes it in."""
    hf, data = zoo.tiny(architecture, dtype=torch.bfloat16), documents((6, 6))
    given: list[tuple[Tensor, ...]] = []
    handle = hf.model.layers[brute.LAYER].mlp.experts.register_forward_pre_hook(lambda _, args: given.append(args))
    hf(input_ids=torch.tensor(data), attention_mask=torch.ones(2, 6, dtype=torch.long))
    handle.remove()
    cache = ac.capture(hf, data, SITES, tmp_path / "acts", batch_tokens=12, progress=False)
    weights = cache[SITES[2]][:]
    assert weights.dtype == given[0][2].dtype
    assert torch.equal(weights, given[0][2])
    assert cache[SITES[3]].dtype == torch.bfloat16
