"""Router logits, chosen experts, their weights and outputs, against a loop over tokens and experts in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from activations_cache import sites
from activations_cache.errors import SiteError
from tests import architectures as zoo

LAYER = 1
PREFIX = f"blocks.{LAYER}.mlp.hook_"


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def route(architecture: str, hf: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen experts and weights for router logits `[..., n_experts]`, as each family's paper and code define them."""
    config = hf.config
    if architecture.startswith("deepseek"):
        gate = hf.model.layers[LAYER].mlp.gate
        pairs = [route_in_groups(config, gate, row) for row in logits.flatten(0, -2)]
        index, weights = (torch.stack(column).reshape(*logits.shape[:-1], -1) for column in zip(*pairs, strict=True))
        return index, weights
    if architecture == "gpt_oss":  # the softmax is over the chosen logits alone
        top, index = logits.topk(config.num_experts_per_tok, dim=-1)
        return index, top.softmax(-1)
    top, index = logits.softmax(-1).topk(config.num_experts_per_tok, dim=-1)
    renormalise = architecture == "mixtral" or getattr(config, "norm_topk_prob", False)
    return index, top / top.sum(-1, keepdim=True) if renormalise else top


def route_in_groups(config: Any, gate: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """DeepSeek's choice for one token `[n_experts]`, largest first.

    V2: softmax scores; a group is worth its best expert. V3: sigmoid scores; experts are chosen by score + correction,
    a group is worth its two best, and the scores alone, normalised, are the weights. The best groups' experts compete.
    """
    third = hasattr(gate, "e_score_correction_bias")
    scores = logits.sigmoid() if third else logits.softmax(-1)
    choice = (scores + gate.e_score_correction_bias if third else scores).tolist()
    groups = torch.arange(len(choice)).chunk(config.n_group)
    worth = {i: sum(sorted((choice[e] for e in group.tolist()), reverse=True)[: 2 if third else 1])
             for i, group in enumerate(groups)}  # fmt: skip
    limited = third or config.topk_method == "group_limited_greedy"
    best = sorted(worth, key=lambda i: -worth[i])[: config.topk_group if limited else config.n_group]
    candidates = [expert for i in best for expert in groups[i].tolist()]
    index = torch.tensor(sorted(candidates, key=lambda e: -choice[e])[: config.num_experts_per_tok])
    weights = scores[index]
    if third and config.norm_topk_prob:
        weights = weights / weights.sum()
    return index, weights * config.routed_scaling_factor


def ordered(index: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Slots in the order of their experts' numbers: DeepSeek's routers sort them in no way."""
    order = index.argsort(-1)
    return index.gather(-1, order), *(
        v.gather(-1, order) if v.ndim == order.ndim else v.gather(-2, order[..., None].expand_as(v)) for v in values
    )


def expert(architecture: str, experts: Any, which: int, x: Tensor) -> Tensor:
    """The output of one expert for one token `[d_model]`."""
    if architecture == "gpt_oss":
        gate_up = x @ experts.gate_up_proj[which] + experts.gate_up_proj_bias[which]
        gate, up = gate_up[0::2].clamp(max=experts.limit), gate_up[1::2].clamp(-experts.limit, experts.limit)
        hidden = (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
        return hidden @ experts.down_proj[which] + experts.down_proj_bias[which]
    gate, up = (experts.gate_up_proj[which] @ x).chunk(2)
    return experts.down_proj[which] @ (torch.nn.functional.silu(gate) * up)


def moe_layer(architecture: str, hf: Any, x: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Per-slot outputs `[batch, pos, top_k, d_model]` and the layer's output, token by token."""
    block = hf.model.layers[LAYER].mlp
    each = torch.zeros(*index.shape, x.shape[-1])
    for b, p, k in torch.cartesian_prod(*(torch.arange(n) for n in index.shape)).tolist():
        each[b, p, k] = expert(architecture, block.experts, int(index[b, p, k]), x[b, p])
    out = (each * weights[..., None]).sum(-2)
    if architecture == "qwen2_moe":
        out = out + torch.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)
    if architecture.startswith("deepseek"):
        out = out + block.shared_experts(x)
    return each, out


def mlp_input(hf: Any, run: Callable[[], Any]) -> Tensor:
    """What the MoE layer reads, caught by a hook of our own."""
    seen: list[Tensor] = []
    handle = hf.model.layers[LAYER].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    run()
    handle.remove()
    return seen[0]


def router_logits(architecture: str, hf: Any, x: Tensor) -> Tensor:
    block = hf.model.layers[LAYER].mlp
    router = block.router if architecture == "gpt_oss" else block.gate
    return x @ router.weight.T + (router.bias if architecture == "gpt_oss" else 0)


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("architecture", zoo.MOE)
def test_reading(architecture: str, padding: str | None) -> None:
    hf, inputs = zoo.tiny(architecture), zoo.inputs(padding=padding)
    x = mlp_input(hf, lambda: hf(**inputs))
    run = sites.run(hf, inputs, read=[f"{PREFIX}*", f"blocks.{LAYER}.hook_mlp_out"])
    logits = router_logits(architecture, hf, x)
    index, weights = route(architecture, hf, logits)
    each, out = moe_layer(architecture, hf, x, index, weights)
    index, weights, each = ordered(index, weights, each)
    seen = ordered(*(run[f"{PREFIX}{kind}"] for kind in ("expert_indices", "expert_weights", "expert_out")))
    assert seen[0].dtype == torch.int64
    assert torch.equal(seen[0], index)
    torch.testing.assert_close(run[f"{PREFIX}router_logits"], logits)
    torch.testing.assert_close(seen[1], weights)
    torch.testing.assert_close(seen[2], each, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run[f"blocks.{LAYER}.hook_mlp_out"], out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", zoo.MOE)
def test_replaced_logits_route_anew(architecture: str) -> None:
    """Reversed logits: other experts are chosen, and the layer's output is what those experts give."""
    hf, inputs = zoo.tiny(architecture), zoo.inputs()
    x = mlp_input(hf, lambda: hf(**inputs))
    before = sites.run(hf, inputs, read=f"{PREFIX}*")
    flip = {f"{PREFIX}router_logits": lambda v, s: -v}
    run = sites.run(hf, inputs, read=[f"{PREFIX}*", f"blocks.{LAYER}.hook_mlp_out"], interventions=flip)
    index, weights = route(architecture, hf, -before[f"{PREFIX}router_logits"])
    _, out = moe_layer(architecture, hf, x, index, weights)
    index, weights = ordered(index, weights)
    seen = ordered(run[f"{PREFIX}expert_indices"], run[f"{PREFIX}expert_weights"])
    assert not torch.equal(index, *ordered(before[f"{PREFIX}expert_indices"]))
    assert torch.equal(seen[0], index)
    torch.testing.assert_close(seen[1], weights)
    torch.testing.assert_close(run[f"blocks.{LAYER}.hook_mlp_out"], out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", zoo.MOE)
def test_an_expert_is_never_chosen_when_its_logit_is_low(architecture: str) -> None:
    hf, inputs = zoo.tiny(architecture), zoo.inputs()

    def forbid(value: Tensor, site: sites.Site) -> Tensor:
        return value.index_fill(-1, torch.tensor([2]), -1e4)

    names = [f"{PREFIX}expert_indices", f"{PREFIX}expert_weights"]
    before = sites.run(hf, inputs, read=names)
    after = sites.run(hf, inputs, read=names, interventions={f"{PREFIX}router_logits": forbid})
    assert (before[names[0]] == 2).any()
    assert not (after[names[0]] == 2).any()
    assert torch.isfinite(after[names[1]]).all()


@pytest.mark.parametrize("architecture", zoo.MOE)
def test_replaced_choices_and_weights(architecture: str) -> None:
    """Experts 3 and 0 (and 1) for every token, with weights .25 and .5 (and .125)."""
    hf, inputs = zoo.tiny(architecture), zoo.inputs()
    x = mlp_input(hf, lambda: hf(**inputs))
    top_k = hf.config.num_experts_per_tok
    index = torch.tensor([3, 0, 1][:top_k]).expand(*x.shape[:2], top_k)
    weights = torch.tensor([0.25, 0.5, 0.125][:top_k]).expand(*x.shape[:2], top_k)
    changes = {f"{PREFIX}expert_indices": lambda v, s: index, f"{PREFIX}expert_weights": lambda v, s: weights}
    read = [f"{PREFIX}expert_indices", f"{PREFIX}expert_out", f"blocks.{LAYER}.hook_mlp_out"]
    run = sites.run(hf, inputs, read=read, interventions=changes)
    each, out = moe_layer(architecture, hf, x, index, weights)
    assert torch.equal(run[f"{PREFIX}expert_indices"], index)
    torch.testing.assert_close(run[f"{PREFIX}expert_out"], each, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run[f"blocks.{LAYER}.hook_mlp_out"], out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", zoo.MOE)
def test_replaced_outputs_of_experts(architecture: str) -> None:
    """The first slot silenced, which is the same as giving it no weight."""
    hf, inputs = zoo.tiny(architecture), zoo.inputs()
    keep = torch.tensor([0.0, 1.0, 1.0])[: hf.config.num_experts_per_tok]
    silenced = sites.run(hf, inputs, interventions={f"{PREFIX}expert_out": lambda v, s: v * keep[:, None]})
    unweighted = sites.run(hf, inputs, interventions={f"{PREFIX}expert_weights": lambda v, s: v * keep})
    torch.testing.assert_close(silenced.logits, unweighted.logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(silenced.logits, hf(**inputs).logits, atol=1e-2)


def test_dense_layers_among_sparse_ones() -> None:
    """A dense layer has neurons and no router; a sparse one the other way round."""
    S = sites.Sites(zoo.tiny("qwen3_moe_mixed"))
    assert S["blocks.0.mlp.hook_post"].shape == (48,)
    assert S["blocks.1.mlp.hook_router_logits"].shape == (4,)
    with pytest.raises(SiteError, match=r"no site 'blocks\.1\.mlp\.hook_post'"):
        S["blocks.1.mlp.hook_post"]
    with pytest.raises(SiteError, match=r"no site 'blocks\.0\.mlp\.hook_router_logits'"):
        S["blocks.0.mlp.hook_router_logits"]


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("architecture", zoo.MOE)
def test_other_implementations_of_the_experts(architecture: str, implementation: str) -> None:
    """transformers computes the experts in one of several ways; all give the same sites, also when routed anew."""
    hf, inputs = zoo.tiny(architecture), zoo.inputs(padding="left")
    flip = {f"{PREFIX}router_logits": lambda v, s: -v}
    read = [f"{PREFIX}*", f"blocks.{LAYER}.hook_mlp_out"]
    expected = [sites.run(hf, inputs, read=read, interventions=change) for change in ({}, flip)]
    hf.set_experts_implementation(implementation)
    for change, before in zip(({}, flip), expected, strict=True):
        run = sites.run(hf, inputs, read=read, interventions=change)
        for name, value in before.values.items():
            torch.testing.assert_close(run[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("architecture", zoo.MOE)
def test_bfloat16(architecture: str, implementation: str) -> None:
    """Slots times weights, and the shared expert, make up the layer's output to bfloat16's rounding; types are told."""
    hf, inputs = zoo.tiny(architecture, dtype=torch.bfloat16), zoo.inputs(padding="left")
    hf.set_experts_implementation(implementation)
    arguments: list[tuple[Tensor, ...]] = []
    block = hf.model.layers[LAYER].mlp
    handle = block.experts.register_forward_pre_hook(lambda _, args: arguments.append(args))
    run = sites.run(hf, inputs, read=[f"{PREFIX}*", f"blocks.{LAYER}.hook_mlp_out"], stop=False)
    handle.remove()
    hidden, index, weights = arguments[0]
    values = {kind: run[f"{PREFIX}{kind}"] for kind in ("expert_indices", "expert_weights", "expert_out")}
    assert torch.equal(values["expert_indices"].reshape(index.shape), index)
    assert torch.equal(values["expert_weights"].reshape(weights.shape), weights)
    each = torch.stack([
        torch.stack([expert(architecture, block.experts, int(i), x) for i in chosen])
        for x, chosen in zip(hidden, index, strict=True)
    ])  # fmt: skip
    torch.testing.assert_close(values["expert_out"].reshape(each.shape), each, rtol=0.05, atol=0.05)
    out = (each.float() * weights.float()[..., None]).sum(1).reshape(3, 9, -1)
    x = hidden.reshape(out.shape)
    if architecture == "qwen2_moe":
        out += torch.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)
    if architecture.startswith("deepseek"):
        out += block.shared_experts(x)
    torch.testing.assert_close(run[f"blocks.{LAYER}.hook_mlp_out"].float(), out, rtol=0.05, atol=0.1)
    S = sites.Sites(hf)
    for kind in ("router_logits", "expert_weights", "expert_out"):
        site = S[f"{PREFIX}{kind}"]
        assert run[site.name].dtype == getattr(torch, site.dtype or "bfloat16")


@pytest.mark.parametrize("architecture", zoo.MOE)
def test_outputs_of_slots_are_not_computed_unless_asked_for(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hf, inputs = zoo.tiny(architecture), zoo.inputs()
    experts = hf.model.layers[LAYER].mlp.experts
    original, rows = experts.forward, []

    def counted(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        rows.append(index.numel())
        return original(hidden, index, weights)

    monkeypatch.setattr(experts, "forward", counted)
    pairs = 27 * hf.config.num_experts_per_tok
    sites.run(
        hf, inputs, read=[f"{PREFIX}router_logits", f"{PREFIX}expert_indices", f"{PREFIX}expert_weights"], stop=False
    )
    assert rows == [pairs]
    sites.run(hf, inputs, read=f"{PREFIX}expert_out", stop=False)
    assert rows == [pairs] * 3  # once more: each pair of a token and its expert


def test_an_expert_that_is_gone() -> None:
    """The catalogue that `run` keeps notices that a model has fewer experts than before."""
    hf, inputs = zoo.tiny("mixtral"), zoo.inputs()
    name = f"{PREFIX}router_logits"
    assert sites.run(hf, inputs, read=name)[name].shape == (3, 9, 4)
    block = hf.model.layers[LAYER].mlp
    for module in (block.gate, block.experts):
        module.num_experts = 3
        for key, parameter in list(module.named_parameters()):
            setattr(module, key, torch.nn.Parameter(parameter[:3].clone()))
    with sites.hooked(hf, {name: lambda v, s: None}) as S:
        assert S[name].shape == (3,)
    flipped = sites.run(hf, inputs, read=f"{PREFIX}expert_indices", interventions={name: lambda v, s: -v})
    assert int(flipped[f"{PREFIX}expert_indices"].max()) == 2


def test_a_router_that_cannot_be_routed_anew_says_so() -> None:
    hf, inputs = zoo.tiny("mixtral"), zoo.inputs()
    gate = hf.model.layers[LAYER].mlp.gate
    original = gate.forward

    def two_linear_maps(hidden: Tensor) -> Any:
        original(hidden)
        return original(hidden)

    gate.forward = two_linear_maps
    with pytest.raises(SiteError, match="hook_expert_indices"):
        sites.run(hf, inputs, interventions={f"{PREFIX}router_logits": lambda v, s: -v})
