"""Which parameters write to the residual stream, and which matrices make up a layer: tried by editing them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from activations_cache import sites
from activations_cache.errors import ModelError, SiteError
from tests import architectures as zoo


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def parameters(hf: Any) -> dict[str, Tensor]:
    return dict(hf.named_parameters())


def remove(direction: Tensor, weight: Tensor, axis: int) -> None:
    """`W -= r (r . W)` with `r` along `axis`, in place."""
    moved = weight.movedim(axis, -1)  # [..., d_model], a view
    moved -= (moved @ direction)[..., None] * direction


@pytest.mark.parametrize("architecture", zoo.ARCHITECTURES)
def test_the_writers_are_all_that_writes(architecture: str) -> None:
    """A direction taken out of every writer is gone from the residual stream, wherever it is read."""
    hf, inputs = zoo.tiny(architecture), zoo.inputs()
    named = parameters(hf)
    r = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(5)), dim=0)
    for writer in sites.writers(hf):
        weight = named[writer.name]
        assert weight.shape[writer.axis] == 32
        target = r
        if writer.post_norm is not None:
            target = torch.nn.functional.normalize((named[writer.post_norm] + writer.gain_offset) * r, dim=0)
        remove(target, weight, writer.axis)
    run = sites.run(hf, inputs, read=["blocks.*.hook_resid_pre", "blocks.*.hook_resid_post"])
    for name, value in run.values.items():
        assert (value @ r).abs().max() < 2e-5 * value.norm(dim=-1).max(), name
        assert value.norm(dim=-1).min() > 0.1


@pytest.mark.parametrize("architecture", zoo.ARCHITECTURES)
def test_no_writer_is_superfluous(architecture: str) -> None:
    """With one writer left as it was, the direction is back (all tokens and both layers see it)."""
    r = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(5)), dim=0)
    writers = sites.writers(zoo.tiny(architecture))
    assert len({writer.name for writer in writers}) == len(writers)
    for kept in writers:
        hf = zoo.tiny(architecture)
        named = parameters(hf)
        for writer in writers:
            if writer.name != kept.name:
                gain = 1.0 if writer.post_norm is None else named[writer.post_norm] + writer.gain_offset
                remove(torch.nn.functional.normalize(gain * r, dim=0), named[writer.name], writer.axis)
        value = sites.run(hf, zoo.inputs(), read="blocks.1.hook_resid_post")["blocks.1.hook_resid_post"]
        assert (value @ r).abs().max() > 1e-3, kept.name


def test_components_and_axes() -> None:
    gpt2 = {w.name.removeprefix("transformer."): w for w in sites.writers(zoo.tiny("gpt2"))}
    assert gpt2["h.0.attn.c_proj.weight"].axis == 1  # Conv1D keeps [in, out]
    assert gpt2["wte.weight"].tied
    assert gpt2["wpe.weight"].component == "pos_embed"
    assert [w.component for w in sites.writers(zoo.tiny("llama"), layers=-1)] == [
        "attn_out", "attn_out", "mlp_out", "mlp_out",
    ]  # fmt: skip
    mixtral = [w for w in sites.writers(zoo.tiny("mixtral"), [0]) if w.component == "expert_out"]
    assert [(w.axis, w.expert_axis, w.bias) for w in mixtral] == [(1, 0, False)]
    oss = [w for w in sites.writers(zoo.tiny("gpt_oss"), [0]) if w.component == "expert_out"]
    assert [(w.axis, w.expert_axis, w.bias) for w in oss] == [(2, 0, False), (1, 0, True)]
    assert {w.layer for w in sites.writers(zoo.tiny("llama"))} == {None, 0, 1}


@pytest.mark.parametrize(
    ("architecture", "norms", "offset"), [("gemma2", True, 1.0), ("gemma3", True, 1.0), ("olmo2", True, 0.0),
                                          ("llama", False, 0.0), ("qwen3", False, 0.0)],
)  # fmt: skip
def test_post_norms(architecture: str, norms: bool, offset: float) -> None:
    hf = zoo.tiny(architecture)
    for writer in sites.writers(hf, [0, 1]):
        assert (writer.post_norm is not None) == norms
        assert writer.gain_offset == offset
        if writer.post_norm is not None:
            part = "attention" if writer.component == "attn_out" else "feedforward"
            assert writer.post_norm == f"model.layers.{writer.layer}.post_{part}_layernorm.weight"
            assert writer.post_norm in parameters(hf)


def test_tied_embeddings() -> None:
    assert not sites.writers(zoo.tiny("llama"))[0].tied
    assert sites.writers(zoo.tiny("llama", tie_word_embeddings=True))[0].tied
    assert sites.writers(zoo.tiny("gemma3"))[0].tied


@pytest.mark.parametrize(
    ("architecture", "scale"), [("gemma2", 32**0.5), ("gemma3", 32**0.5), ("granite", 3.0), ("gpt2", 1.0), ("opt", 1.0)]
)
def test_embedding_scale(architecture: str, scale: float) -> None:
    assert sites.writers(zoo.tiny(architecture))[0].scale == pytest.approx(scale, rel=1e-5)


def test_bad_layers_and_missing_weights() -> None:
    hf = zoo.tiny("llama")
    for call in (lambda: sites.writers(hf, [2]), lambda: sites.components(hf, 5)):
        with pytest.raises(SiteError, match="does not exist: the model has layers 0 to 1"):
            call()
    with pytest.raises(ModelError, match="meta device"):
        sites.writers(zoo.tiny("llama").to("meta"))


# -------------------------------------------------------------------- components

DENSE = [name for name in zoo.ARCHITECTURES if name not in zoo.MOE]


@pytest.mark.parametrize("architecture", DENSE)
def test_neurons(architecture: str) -> None:
    """Zeroing a neuron's input of W_out equals zeroing its activation; W_in and W_gate give what the sites give."""
    hf, inputs = zoo.tiny(architecture), zoo.inputs()
    parts = sites.components(hf, 0)
    pre, post = "blocks.0.mlp.hook_pre", "blocks.0.mlp.hook_post"
    silent = sites.run(hf, inputs, interventions={post: lambda v, s: v.index_fill(-1, torch.tensor([3]), 0)}).logits
    named = parameters(hf)
    first = parts.W_gate or parts.W_in
    weight = named[first.name].movedim(first.out_axis, 0)  # [outputs, d_model]
    weight = weight if first.index is None else weight[first.index]
    assert weight.shape == (sites.Sites(hf).dims.d_mlp, 32)
    gated = parts.W_gate is not None
    assert gated == ("blocks.0.mlp.hook_pre_linear" in sites.Sites(hf))
    before = sites.run(hf, inputs, read=pre)[pre]
    rows = named[first.name].movedim(first.out_axis, 0)
    (rows if first.index is None else rows[first.index])[7].mul_(2)  # a view: changes the model
    if first.bias is not None:
        bias = named[first.bias]
        (bias if first.index is None else bias[first.index])[7].mul_(2)
    after = sites.run(hf, inputs, read=pre)[pre]
    torch.testing.assert_close(after[..., 7], 2 * before[..., 7])
    assert torch.equal(after[..., :7], before[..., :7])
    hf = zoo.tiny(architecture)
    out = parts.W_out
    parameters(hf)[out.name].select(out.in_axis, 3).zero_()
    torch.testing.assert_close(hf(**inputs).logits, silent, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", zoo.ARCHITECTURES)
def test_heads(architecture: str) -> None:
    """Zeroing a head's inputs of W_O equals zeroing its z."""
    hf, inputs = zoo.tiny(architecture), zoo.inputs()
    name = "blocks.1.attn.hook_z"
    heads, width = sites.Sites(hf)[name].shape
    silent = sites.run(hf, inputs, interventions={name: lambda v, s: v.index_fill(-2, torch.tensor([2]), 0)}).logits
    out = sites.components(hf, 1).W_O
    weight = parameters(hf)[out.name].movedim(out.in_axis, 0)  # [n_heads * d_head, d_model]
    assert weight.shape == (heads * width, 32)
    weight[2 * width : 3 * width] = 0
    torch.testing.assert_close(hf(**inputs).logits, silent, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", [name for name in zoo.ARCHITECTURES if name not in zoo.MLA])
@pytest.mark.parametrize("kind", ["q", "k", "v"])
def test_query_key_value(architecture: str, kind: str) -> None:
    """Doubling the outputs of one matrix doubles its site and leaves the others."""
    hf, inputs = zoo.tiny(architecture), zoo.inputs()
    names = [f"blocks.0.attn.hook_{k}" for k in "qkv"]
    before = sites.run(hf, inputs, read=names)
    part = getattr(sites.Sites(hf).modules[0], f"W_{kind.upper()}")
    for name, axis in [(part.name, part.out_axis), (part.bias, 0)]:
        if name is not None:
            rows = parameters(hf)[name].movedim(axis, 0)
            rows[slice(None) if part.index is None else part.index] *= 2
    after = sites.run(hf, inputs, read=names)
    for name in names:
        torch.testing.assert_close(after[name], before[name] * (2 if name.endswith(kind) else 1))


@pytest.mark.parametrize("architecture", zoo.MOE)
def test_experts(architecture: str) -> None:
    """An expert whose W_out is zero gives nothing (but its bias); the router's rows are the experts' logits."""
    hf, inputs = zoo.tiny(architecture), zoo.inputs()
    parts = sites.components(hf, 1)
    named = parameters(hf)
    n, d_expert = sites.Sites(hf).dims.n_experts, sites.Sites(hf).dims.d_expert
    for part, in_features in ((parts.W_gate, 32), (parts.W_in, 32), (parts.W_out, d_expert)):
        weight = named[part.name]
        assert weight.shape[part.expert_axis] == n
        assert weight.shape[part.in_axis] == in_features
        assert len({part.expert_axis, part.in_axis, part.out_axis}) == 3
        outputs = range(weight.shape[part.out_axis])
        assert len(outputs if part.index is None else outputs[part.index]) == (d_expert if in_features == 32 else 32)
    logits, index, each = (f"blocks.1.mlp.hook_{k}" for k in ("router_logits", "expert_indices", "expert_out"))
    before = sites.run(hf, inputs, read=[logits, index, each])
    for name in (parts.W_out.name, parts.W_out.bias):
        if name is not None:
            named[name].select(parts.W_out.expert_axis, 1).zero_()
    named[parts.router.name].select(parts.router.out_axis, 0).mul_(2)
    if parts.router.bias is not None:
        named[parts.router.bias][0] *= 2
    after = sites.run(hf, inputs, read=[logits, index, each])
    torch.testing.assert_close(after[logits][..., 0], 2 * before[logits][..., 0])
    torch.testing.assert_close(after[logits][..., 1:], before[logits][..., 1:])
    chosen = after[index] == 1
    assert chosen.any()
    assert not after[each][chosen].any()
    assert after[each][~chosen].abs().sum(-1).min() > 0


def test_halves_of_the_experts_gate_and_up() -> None:
    """In gpt-oss they alternate, elsewhere they follow one another."""
    oss, mixtral = sites.components(zoo.tiny("gpt_oss"), 0), sites.components(zoo.tiny("mixtral"), 0)
    assert (oss.W_gate.index, oss.W_in.index) == (slice(0, 64, 2), slice(1, 64, 2))
    assert (mixtral.W_gate.index, mixtral.W_in.index) == (slice(0, 48), slice(48, 96))
    assert oss.W_in.bias == "model.layers.0.mlp.experts.gate_up_proj_bias"


def test_shared_experts_write_too() -> None:
    hf = zoo.tiny("qwen2_moe")
    (shared,) = sites.components(hf, 0).shared
    assert shared.name == "model.layers.0.mlp.shared_expert.down_proj.weight"
    assert shared.name in {writer.name for writer in sites.writers(hf)}
