"""Names, patterns, errors, and how a forward is hooked and stopped."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from activations_cache import sites
from activations_cache.errors import ModelError, SiteError
from tests import architectures as zoo


@pytest.fixture(scope="module")
def llama() -> Any:
    return zoo.tiny("llama")


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    return zoo.inputs(padding="left")


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# -------------------------------------------------------------------- names


def test_names_of_a_llama_in_forward_order(llama: Any) -> None:
    layer = ["hook_resid_pre", "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_pattern", "attn.hook_z"]
    layer += ["hook_attn_out", "hook_resid_mid", "mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post"]
    layer += ["hook_mlp_out", "hook_resid_post"]
    expected = ["hook_embed", *(f"blocks.{i}.{n}" for i in (0, 1) for n in layer), "ln_final.hook_normalized"]
    assert list(sites.Sites(llama).names) == expected


def test_dims() -> None:
    assert sites.Sites(zoo.tiny("llama")).dims == sites.Dims(2, 32, 4, 2, 12, 48, 96, 64)
    assert sites.Sites(zoo.tiny("gpt2")).dims == sites.Dims(2, 32, 4, 4, 8, 128, 96, 64)
    assert sites.Sites(zoo.tiny("mixtral")).dims == sites.Dims(2, 32, 4, 2, 12, None, 96, 64, 4, 2, 48)
    assert sites.Sites(zoo.tiny("qwen3_moe")).dims == sites.Dims(2, 32, 4, 2, 12, None, 96, 64, 4, 2, 24)
    assert sites.Sites(zoo.tiny("gpt_oss")).dims == sites.Dims(2, 32, 4, 2, 12, None, 96, 64, 4, 2, 32)


def test_a_site_says_what_it_is(llama: Any) -> None:
    S = sites.Sites(llama)
    z = S["blocks.1.attn.hook_z"]
    assert (z.name, z.layer, z.kind, z.shape, z.integer, z.cacheable) == (
        "blocks.1.attn.hook_z", 1, "z", (4, 12), False, True,
    )  # fmt: skip
    assert S["blocks.1.attn.hook_k"].shape == (2, 12)
    assert S["blocks.0.mlp.hook_post"].shape == (48,)
    assert S["hook_embed"].layer is None
    assert not S["blocks.0.attn.hook_pattern"].cacheable
    moe = sites.Sites(zoo.tiny("mixtral"))
    assert moe["blocks.0.mlp.hook_expert_indices"].integer
    assert moe["blocks.0.mlp.hook_expert_indices"].shape == (2,)
    assert moe["blocks.0.mlp.hook_router_logits"].shape == (4,)
    assert moe["blocks.0.mlp.hook_expert_out"].shape == (2, 32)


def test_aliases_fold_to_one_site(llama: Any) -> None:
    S = sites.Sites(llama)
    assert S["blocks.0.hook_out"].name == "blocks.0.hook_resid_post"
    assert S["blocks.0.attn.o.hook_in"].name == "blocks.0.attn.hook_z"
    assert S["blocks.0.mlp.out.hook_in"].name == "blocks.0.mlp.hook_post"
    assert S["embed.hook_out"].name == "hook_embed"
    both = S.resolve(["blocks.*.hook_out", "blocks.*.hook_resid_post", "blocks.1.hook_resid_post"])
    assert [site.name for site in both] == ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    assert "blocks.0.hook_out" in S
    assert "blocks.0.hook_nothing" not in S
    # where a post-norm stands between the module and the stream, the module's output is no alias of what is added
    assert "blocks.0.attn.hook_out" in S
    assert "blocks.0.attn.hook_out" not in sites.Sites(zoo.tiny("gemma2"))


def test_reading_by_alias_gives_the_canonical_name(llama: Any, inputs: dict[str, Tensor]) -> None:
    run = sites.run(llama, inputs, read=["blocks.0.hook_out"])
    assert list(run.values) == ["blocks.0.hook_resid_post"]


@pytest.mark.parametrize(
    ("patterns", "layers", "expected"),
    [
        ("blocks.*.hook_resid_post", None, ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]),
        ("blocks.*.hook_resid_post", -1, ["blocks.1.hook_resid_post"]),
        ("*hook_z", [1, 0], ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]),
        (["blocks.1.hook_resid_pre", "hook_embed"], None, ["hook_embed", "blocks.1.hook_resid_pre"]),
        (["hook_embed", "blocks.*.hook_mlp_out"], 0, ["hook_embed", "blocks.0.hook_mlp_out"]),
        ("hook_*", None, ["hook_embed"]),
        (["blocks.0.attn.hook_q"] * 3, None, ["blocks.0.attn.hook_q"]),
    ],
)
def test_resolve(llama: Any, patterns: Any, layers: Any, expected: list[str]) -> None:
    assert [site.name for site in sites.Sites(llama).resolve(patterns, layers)] == expected


def test_resolve_takes_sites_back(llama: Any) -> None:
    S = sites.Sites(llama)
    found = S.resolve("blocks.*.hook_resid_pre")
    assert S.resolve(found) == found


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("blocks.0.hook_resid_pots", "blocks.0.hook_resid_post"),
        ("blocks.0.attn.hook_zz", "blocks.0.attn.hook_z"),
        ("blocks.7.hook_resid_post", "layers 0 to 1"),
        ("blocks.*.hook_nonsense", "no site"),
        ("hook_pos_embed", "hook_embed"),
        ("", "no site"),
    ],
)
def test_unknown_sites_name_the_near_ones(llama: Any, inputs: dict[str, Tensor], name: str, hint: str) -> None:
    with pytest.raises(SiteError, match=hint.replace(".", r"\.")):
        sites.Sites(llama).resolve(name)
    with pytest.raises(SiteError, match=hint.replace(".", r"\.")):
        sites.run(llama, inputs, read=[name])
    with pytest.raises(SiteError), sites.hooked(llama, {name: lambda v, s: None}):
        llama(**inputs)
    assert hook_count(llama) == 0


def test_unknown_layers_and_empty_selections(llama: Any) -> None:
    S = sites.Sites(llama)
    with pytest.raises(SiteError, match="layer 2 does not exist"):
        S.resolve("blocks.*.hook_resid_post", layers=[0, 2])
    with pytest.raises(SiteError, match="no site is left"):
        S.resolve("blocks.0.hook_resid_post", layers=1)
    with pytest.raises(SiteError, match="no site is left"):
        S.resolve([])


def test_a_parallel_block_has_no_middle() -> None:
    assert "blocks.0.hook_resid_mid" in sites.Sites(zoo.tiny("gpt_neox_sequential"))
    with pytest.raises(SiteError, match="hook_resid_mid"):
        sites.Sites(zoo.tiny("gpt_neox"))["blocks.0.hook_resid_mid"]


@pytest.mark.parametrize(
    ("architecture", "name", "why"),
    [
        ("deepseek_v2", "blocks.1.attn.hook_q", "compressed"),
        ("deepseek_v2_lite", "blocks.*.attn.hook_q", "compressed"),
        ("deepseek_v3", "blocks.*.attn.hook_v", "compressed"),
        ("gpt_neox", "blocks.1.hook_resid_mid", "parallel block"),
        ("phi", "blocks.*.hook_resid_mid", "parallel block"),
        ("mixtral", "blocks.0.mlp.hook_post", "mixtures of experts"),
        ("qwen3_moe_mixed", "blocks.1.mlp.hook_pre", "mixtures of experts"),
        ("qwen3_moe_mixed", "blocks.0.mlp.hook_expert_out", "layer 0 is dense"),
        ("llama", "blocks.*.mlp.hook_router_logits", "no layer is a mixture"),
    ],
)
def test_what_an_architecture_cannot_have_is_said(architecture: str, name: str, why: str) -> None:
    with pytest.raises(SiteError, match=why):
        sites.Sites(zoo.tiny(architecture)).resolve(name)


def test_a_fused_matrix_that_the_map_cannot_split() -> None:
    """Falcon's newer layout interleaves groups of heads, which TransformerLens 3.9's map does not know."""
    import transformers

    config = transformers.FalconConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        new_decoder_architecture=True, num_kv_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    falcon = transformers.FalconForCausalLM(config).eval()
    inputs = zoo.inputs()
    with pytest.raises(SiteError, match="cannot tell q, k, v apart"):
        sites.run(falcon, inputs, read="blocks.0.attn.hook_q")
    assert hook_count(falcon) == 0
    assert sites.run(falcon, inputs, read="blocks.0.hook_resid_post")["blocks.0.hook_resid_post"].shape == (3, 9, 32)


@pytest.mark.parametrize("family", ["Bloom", "Cohere"])
def test_what_attention_and_mlp_add(family: str) -> None:
    """Bloom's modules return their output with the residual added; Cohere's block is parallel. The sites are the sums'
    terms all the same: the last linear maps' own outputs, by hooks of our own."""
    import transformers

    kinds = {"Bloom": {"n_head": 4, "n_layer": 2}, "Cohere": {"num_attention_heads": 4, "num_hidden_layers": 2,
             "intermediate_size": 48, "num_key_value_heads": 2}}  # fmt: skip
    config = getattr(transformers, f"{family}Config")(
        vocab_size=96, hidden_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, **kinds[family]
    )
    config._attn_implementation = "eager"
    hf = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    zoo.perturb(hf)
    parts = {"Bloom": ("self_attention.dense", "mlp.dense_4h_to_h"), "Cohere": ("self_attn.o_proj", "mlp.down_proj")}
    block = (hf.transformer.h if family == "Bloom" else hf.model.layers)[1]
    seen: list[Tensor] = []
    handles = [
        block.get_submodule(p).register_forward_hook(lambda _m, _i, out: seen.append(out)) for p in parts[family]
    ]
    names = [f"blocks.1.hook_{kind}" for kind in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
    run = sites.run(hf, zoo.inputs(), read=names, stop=False)
    for handle in handles:
        handle.remove()
    before, attn, mlp, after = (run[name] for name in names)
    assert torch.equal(attn, seen[0])
    assert torch.equal(mlp, seen[1])
    torch.testing.assert_close(before + attn + mlp, after)


# -------------------------------------------------------------------- what is no model


@pytest.mark.parametrize("thing", ["a path", None, 3, nn.Linear(2, 2)])
def test_not_a_model(thing: Any) -> None:
    with pytest.raises(ModelError, match="Hugging Face model"):
        sites.Sites(thing)


def test_encoders_trunks_and_unknown_architectures() -> None:
    import transformers

    small = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**small, intermediate_size=16))
    with pytest.raises(ModelError, match="decoder language model"):
        sites.Sites(bert)
    with pytest.raises(ModelError, match="head"):
        sites.Sites(zoo.tiny("llama").model)
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(ModelError, match="decoder language model"):
        sites.Sites(t5)
    distil = transformers.DistilBertForMaskedLM(
        transformers.DistilBertConfig(vocab_size=32, dim=16, n_layers=1, n_heads=2, hidden_dim=16)
    )
    with pytest.raises(ModelError, match="no adapter"):
        sites.Sites(distil)


def test_takes_anything_with_hf(llama: Any, inputs: dict[str, Tensor]) -> None:
    class Wrapped:
        hf = llama

    direct = sites.run(llama, inputs, read="hook_embed")["hook_embed"]
    assert torch.equal(sites.run(Wrapped(), inputs, read="hook_embed")["hook_embed"], direct)
    assert sites.writers(Wrapped()) == sites.writers(llama)


# -------------------------------------------------------------------- running


def test_nothing_after_the_last_site_runs(llama: Any, inputs: dict[str, Tensor]) -> None:
    ran: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda m, a, n=name: ran.append(n)) for name, module in llama.named_modules()
    ]
    try:
        run = sites.run(llama, inputs, read=["blocks.0.hook_attn_out", "blocks.0.hook_resid_pre"])
        assert run.logits is None
        assert "model.layers.0.self_attn.o_proj" in ran
        assert not [name for name in ran if "mlp" in name or "layers.1" in name or name == "lm_head"]
        ran.clear()
        full = sites.run(llama, inputs, read="blocks.0.hook_attn_out", stop=False)
        assert "lm_head" in ran
        assert full.logits is not None
    finally:
        for handle in handles:
            handle.remove()


def test_logits_without_reading(llama: Any, inputs: dict[str, Tensor]) -> None:
    run = sites.run(llama, inputs)
    assert run.values == {}
    assert torch.equal(run.logits, llama(**inputs).logits)


def test_values_come_in_forward_order(llama: Any, inputs: dict[str, Tensor]) -> None:
    names = ["ln_final.hook_normalized", "blocks.1.attn.hook_z", "hook_embed", "blocks.0.hook_resid_post"]
    expected = ["hook_embed", "blocks.0.hook_resid_post", "blocks.1.attn.hook_z", "ln_final.hook_normalized"]
    assert list(sites.run(llama, inputs, read=names).values) == expected


def test_a_changed_site_is_read_as_changed(inputs: dict[str, Tensor]) -> None:
    for architecture in ("llama", "gpt2", "gpt_neox", "mixtral", "gpt_oss", "opt", "granite"):
        model = zoo.tiny(architecture)
        for site in sites.Sites(model):
            if site.integer or site.kind == "expert_weights":
                continue
            run = sites.run(model, inputs, read=[site], interventions={site.name: lambda v, s: v * 0.5 + 0.1})
            plain = sites.run(model, inputs, read=[site])
            torch.testing.assert_close(run[site.name], plain[site.name] * 0.5 + 0.1, msg=f"{architecture} {site}")


def test_functions_on_one_site_run_one_after_the_other(llama: Any, inputs: dict[str, Tensor]) -> None:
    seen: list[str] = []

    def add(value: Tensor, site: sites.Site) -> Tensor:
        seen.append(site.name)
        return value + 1

    double = {"blocks.0.hook_resid_post": add, "blocks.*.hook_out": lambda v, s: v * 2}
    run = sites.run(llama, inputs, read="blocks.0.hook_resid_post", interventions=double)
    plain = sites.run(llama, inputs, read="blocks.0.hook_resid_post")
    name = "blocks.0.hook_resid_post"
    assert torch.equal(run[name], (plain[name] + 1) * 2)
    assert seen == [name]


def test_hooked_leaves_nothing_behind(llama: Any, inputs: dict[str, Tensor]) -> None:
    names = list(sites.Sites(llama).names)
    before = llama(**inputs).logits
    with sites.hooked(llama, dict.fromkeys(names, lambda v, s: None)):
        assert hook_count(llama) > len(names) - 4
        inside = llama(**inputs).logits
    assert hook_count(llama) == 0
    assert torch.equal(inside, before)
    assert llama.config._attn_implementation == "eager"
    assert not any("_pattern_callbacks" in m.__dict__ for m in llama.modules())


def test_exceptions_pass_through_and_leave_nothing_behind(llama: Any, inputs: dict[str, Tensor]) -> None:
    model = copy.deepcopy(llama)
    model.set_attn_implementation("sdpa")

    def fail(value: Tensor, site: sites.Site) -> None:
        raise RuntimeError("on purpose")

    for name in ("blocks.1.attn.hook_pattern", "blocks.0.hook_resid_mid", "ln_final.hook_normalized"):
        with pytest.raises(RuntimeError, match="on purpose"):
            sites.run(model, inputs, read=list(sites.Sites(model).names), interventions={name: fail})
        assert hook_count(model) == 0
        assert model.config._attn_implementation == "sdpa"
        assert not any("_pattern_callbacks" in m.__dict__ for m in model.modules())


def test_a_replacement_must_keep_its_shape(llama: Any, inputs: dict[str, Tensor]) -> None:
    with pytest.raises(SiteError, match=r"shape \(3, 9, 4, 12\), got \(3, 9, 4\)"):
        sites.run(llama, inputs, interventions={"blocks.0.attn.hook_z": lambda v, s: v.sum(-1)})
    with pytest.raises(SiteError, match="got float"):
        sites.run(llama, inputs, interventions={"blocks.0.attn.hook_z": lambda v, s: 0.0})
    assert hook_count(llama) == 0


def test_a_site_that_the_forward_does_not_reach(llama: Any) -> None:
    with pytest.raises(SiteError, match=r"did not reach.*hook_embed"):
        sites.run(llama, {"inputs_embeds": torch.zeros(1, 3, 32)}, read=["hook_embed", "blocks.0.hook_resid_post"])


def test_nested_hooks(llama: Any, inputs: dict[str, Tensor]) -> None:
    """An outer `hooked` acts inside a `run`, and stays after it."""
    name = "blocks.0.hook_resid_post"
    plain = sites.run(llama, inputs, read=name)[name]
    with sites.hooked(llama, {name: lambda v, s: v + 1, "blocks.0.attn.hook_pattern": lambda v, s: None}):
        assert torch.equal(sites.run(llama, inputs, read=[name, "*hook_pattern"])[name], plain + 1)
        assert torch.equal(sites.run(llama, inputs, read=name)[name], plain + 1)
    assert hook_count(llama) == 0


def test_values_are_safe_from_later_changes_in_place(llama: Any, inputs: dict[str, Tensor]) -> None:
    """Also from those that `hook_resid_mid` makes itself, and from a function that misbehaves downstream."""
    names = [site.name for site in sites.Sites(llama) if site.layer == 0 and "resid" in site.kind]
    before = sites.run(llama, inputs, read=names).values

    def spoil(value: Tensor, site: sites.Site) -> None:
        value.zero_()

    after = sites.run(llama, inputs, read=names, interventions={"blocks.1.hook_resid_pre": spoil}, stop=False).values
    assert all(torch.equal(before[name], after[name]) for name in names)
    assert len({value.untyped_storage().data_ptr() for value in after.values()}) == len(names)


def test_reading_holds_no_larger_tensor_alive(inputs: dict[str, Tensor]) -> None:
    q = sites.run(zoo.tiny("gpt2"), inputs, read="blocks.0.attn.hook_q")["blocks.0.attn.hook_q"]
    assert q.untyped_storage().nbytes() == q.numel() * 4


@pytest.mark.parametrize(
    "architecture", ["llama", "gpt2", "gpt_neox", "gemma2", "mixtral", "gpt_oss", "opt", "granite"]
)
def test_gradients_at_every_site(architecture: str, inputs: dict[str, Tensor]) -> None:
    """With gradients on, `run.values` are on the graph: the same gradient as that of a zero added at the site."""
    model = zoo.tiny(architecture)
    read = [s.name for s in sites.Sites(model) if not s.integer]
    with torch.enable_grad():
        run = sites.run(model, inputs, read=read, stop=False)
        gradients = torch.autograd.grad(run.logits[:, -1].square().sum(), [run[name] for name in read])
        for name, gradient in zip(read, gradients, strict=True):
            zero = torch.zeros_like(gradient, requires_grad=True)
            add = {name: lambda v, s, zero=zero: v + zero}
            metric = sites.run(model, inputs, interventions=add).logits[:, -1].square().sum()
            (expected,) = torch.autograd.grad(metric, zero)
            assert expected.any(), name
            assert (gradient - expected).abs().max() <= 1e-4 * expected.abs().max(), name


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "mixtral", "gpt_oss"])
def test_bfloat16(architecture: str, inputs: dict[str, Tensor]) -> None:
    model = zoo.tiny(architecture, dtype=torch.bfloat16)
    S = sites.Sites(model)
    run = sites.run(model, inputs, read=list(S.names), stop=False)
    assert torch.equal(run.logits, model(**inputs).logits)
    for name, value in run.values.items():
        assert value.dtype == torch.int64 if S[name].integer else value.dtype in (torch.bfloat16, torch.float32)
        assert torch.isfinite(value.float()).all()
    half = sites.run(model, inputs, interventions={"blocks.0.attn.hook_q": lambda v, s: v.float() * 0.5})
    assert half.logits.dtype == torch.bfloat16


def test_inference_mode_and_batches_of_one(llama: Any) -> None:
    with torch.inference_mode():
        for batch, pos in ((1, 1), (1, 5), (2, 1)):
            inputs = zoo.inputs(batch=batch, pos=pos)
            change = {"blocks.0.hook_resid_mid": lambda v, s: v.flip(-1)}
            run = sites.run(llama, inputs, read="blocks.*.hook_resid_mid", interventions=change)
            assert run["blocks.1.hook_resid_mid"].shape == (batch, pos, 32)


def test_a_view_of_the_value_may_be_returned(llama: Any, inputs: dict[str, Tensor]) -> None:
    """The first position's middle everywhere: the replacement shares memory with what it replaces."""
    name = "blocks.0.hook_resid_mid"
    view = sites.run(llama, inputs, interventions={name: lambda v, s: v[:, :1].expand_as(v)}).logits
    clone = sites.run(llama, inputs, interventions={name: lambda v, s: v[:, :1].expand_as(v).clone()}).logits
    assert torch.equal(view, clone)


def test_catalogues_are_kept_per_model_and_freed_with_it() -> None:
    model = zoo.tiny("llama")
    sites.run(model, zoo.inputs(), read="hook_embed")
    twin = copy.deepcopy(model)
    change = {"hook_embed": lambda v, s: torch.zeros_like(v)}
    assert not sites.run(twin, zoo.inputs(), read="hook_embed", interventions=change)["hook_embed"].any()
    assert sites.run(model, zoo.inputs(), read="hook_embed")["hook_embed"].any()
    model.model.layers[1] = twin.model.layers[1]  # a replaced block is noticed
    run = sites.run(model, zoo.inputs(), read="blocks.1.hook_resid_post")
    assert run["blocks.1.hook_resid_post"].shape == (3, 9, 32)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_saving_is_unaffected(tmp_path: Any) -> None:
    import transformers

    model = zoo.tiny("gpt2")
    sites.run(model, zoo.inputs(), read="*hook_pattern")
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(again(**zoo.inputs()).logits, model(**zoo.inputs()).logits)


@pytest.mark.parametrize("name", ["tinystories-656k", "stories260K"])
def test_real_checkpoints(name: str, shared_data: Any) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(shared_data / name, dtype=torch.float32)
    S = sites.Sites(model)
    inputs = {"input_ids": torch.arange(5, 25)[None]}
    run = sites.run(model, inputs, read=[s.name for s in S if s.cacheable], stop=False)
    assert torch.equal(run.logits, model(**inputs).logits)
    last = S.dims.n_layers - 1
    stream = run["hook_embed"] + sum(run[f"blocks.{i}.hook_{k}_out"] for i in range(last + 1) for k in ("attn", "mlp"))
    torch.testing.assert_close(stream, run[f"blocks.{last}.hook_resid_post"], rtol=1e-4, atol=1e-4)
