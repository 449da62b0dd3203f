"""Projection, ablation and expert removal against brute force and against the same intervention at run time."""

from __future__ import annotations

import pytest
import torch

from activations_cache import sites
from activations_cache.hashing import weights_hash
from probe.editing import Edit, ablate, project_out, remove_experts
from probe.errors import EditError, TargetError
from probe.targets import Direction, Experts, Heads, Latents, Neurons, Subspace
from tests.architectures import ARCHITECTURES, LISTED, MOE, inputs, tiny

RESIDUAL = ("hook_embed", "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")


def columns(k: int, width: int = 32, seed: int = 5) -> torch.Tensor:
    return torch.randn(width, k, generator=torch.Generator().manual_seed(seed))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs()).logits


def hooked_logits(model, hooks) -> torch.Tensor:
    with torch.no_grad(), sites.hooked(model, hooks):
        return model(**inputs()).logits


def residuals(model) -> dict[str, torch.Tensor]:
    names = [name for name in sites.Sites(model).names if name.endswith(RESIDUAL)]
    with torch.no_grad():
        return {name: value.detach() for name, value in sites.run(model, inputs(), read=names).values.items()}


def part(value: torch.Tensor, basis: torch.Tensor) -> float:
    """The largest share, over tokens, of the norm that lies in the span: plain h . v loops over tokens and columns."""
    worst = 0.0
    q = torch.linalg.qr(basis.double())[0]
    for h in value.double().reshape(-1, value.shape[-1]):
        inside = sum(float(h @ q[:, i]) ** 2 for i in range(q.shape[1])) ** 0.5
        worst = max(worst, inside / float(h.norm()))
    return worst


# ------------------------------------------------------------------ projection


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nothing_along_the_direction_is_left_at_any_site(name, k):
    model, basis = tiny(name), columns(k)
    assert max(part(value, basis) for value in residuals(model).values()) > 0.05
    with project_out(model, basis).applied(model):
        left = {site: part(value, basis) for site, value in residuals(model).items()}
    assert len(left) >= 9
    assert max(left.values()) < 1e-5, left


@pytest.mark.parametrize("name", LISTED)
def test_projection_equals_the_same_hooks_at_run_time(name):
    """Editing the weights is the same as projecting each addition to the residual stream, but for the unembedding."""
    model = tiny(name)
    r = columns(1)[:, 0]
    r = r / r.norm()
    remove = lambda value, site: value - (value @ r)[..., None] * r  # noqa: E731
    hooks = [n for n in sites.Sites(model).names if n.endswith(("hook_attn_out", "hook_mlp_out"))]
    start = "blocks.0.hook_resid_pre"
    expected = hooked_logits(model, dict.fromkeys([start, *hooks], remove))
    with project_out(model, r).applied(model):
        made = logits(model)
    # through a post-norm the weights lose g * r before the norm, so the norm's scale differs from the hook's
    if name in ("gemma2", "gemma3"):
        assert not torch.allclose(made, logits(model), atol=1e-3)
    else:
        assert torch.allclose(made, expected, atol=2e-4, rtol=1e-3)


def test_projection_through_a_post_norm_without_the_gain_would_fail():
    """What the gain is for: plain (I - r r^T) W before Gemma's post-norm leaves percents of the direction."""
    model, r = tiny("gemma2"), columns(1)
    q = r.double() / r.double().norm()
    layer = model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        layer.weight.copy_(((torch.eye(32).double() - q @ q.T) @ layer.weight.double()).float())
    naive = part(residuals(model)["blocks.0.hook_mlp_out"], r)
    fresh = tiny("gemma2")
    with project_out(fresh, r).applied(fresh):
        assert part(residuals(fresh)["blocks.0.hook_mlp_out"], r) < 1e-6
    assert naive > 1e-2


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_each_weight_is_the_brute_force_product(name):
    model, r = tiny(name), columns(1)[:, 0].double()
    r = r / r.norm()
    old = {writer.name: dict(model.named_parameters())[writer.name].detach().clone() for writer in sites.writers(model)}
    axes = {writer.name: writer.axis for writer in sites.writers(model)}
    with project_out(model, r).applied(model):
        new = {key: dict(model.named_parameters())[key].detach().clone() for key in old}
    for key, weight in old.items():
        expected = weight.double().clone()
        flat = expected if axes[key] == 0 or weight.ndim == 1 else expected.T  # [d_model, in]
        for column in flat.reshape(32, -1).T:
            column -= r * float(r @ column)
        assert torch.allclose(new[key].double(), expected, atol=1e-6), key


def test_bfloat16_leaves_about_a_percent():
    model, r = tiny("llama", dtype=torch.bfloat16), columns(1)
    edit = project_out(model, r)
    with edit.applied(model):
        assert max(part(value, r) for value in residuals(model).values()) < 0.02
    assert any("16 bits" in note for note in edit.steps[0].notes)


def test_strength_scales_what_is_removed():
    model, r = tiny("llama"), columns(1)
    q = r[:, 0] / r.norm()
    old = model.model.embed_tokens.weight.detach() @ q
    with project_out(model, r, strength=0.25).applied(model):
        assert torch.allclose(model.model.embed_tokens.weight.detach() @ q, 0.75 * old, atol=1e-6)


def test_chosen_layers_and_components_alone_are_edited():
    model, r = tiny("llama"), columns(1)
    assert {n.split(".")[2] for n in project_out(model, r, layers=[0]).parameters} == {"0"}
    assert {n.split(".")[2] for n in project_out(model, r, layers=-1).parameters} == {"1"}
    assert project_out(model, r, components=["embed"]).parameters == ("model.embed_tokens.weight",)
    mlp = project_out(model, r, components=["mlp_out"]).parameters
    assert {name.split(".")[3] for name in mlp} == {"mlp"}
    assert project_out(model, r, layers="all").parameters == project_out(model, r).parameters
    with project_out(model, r, layers=[0]).applied(model):
        after = residuals(model)
    assert part(after["blocks.0.hook_mlp_out"], r) < 1e-5
    assert part(after["blocks.1.hook_mlp_out"], r) > 1e-2


def test_tied_unembedding_is_kept_or_the_record_says_so():
    model, r = tiny("gpt2"), columns(1)
    head = model.lm_head.weight.detach().clone()
    with project_out(model, r).applied(model):
        assert torch.equal(model.lm_head.weight, head)
    edit = project_out(model, r, untie=False)
    with edit.applied(model):
        assert model.lm_head.weight is model.transformer.wte.weight
        assert float((model.lm_head.weight.detach() @ r).abs().max()) < 1e-5
    assert edit.config_patch == {}
    assert any("W_U lost" in note for note in edit.steps[0].notes)


def test_every_kind_of_target_with_a_basis_gives_the_same_edit():
    model, basis = tiny("llama"), columns(2)
    site = "blocks.0.hook_resid_post"
    made = []
    for target in (basis, Subspace(site, basis), Latents(site, (3, 4), basis.T)):
        with project_out(model, target).applied(model):
            made.append(logits(model))
    assert torch.allclose(made[0], made[1], atol=1e-5)
    assert torch.allclose(made[0], made[2], atol=1e-5)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.zeros(32), "zero"),
        (torch.full((32,), torch.nan), "finite"),
        (torch.randn(31), "31 dimensions"),
        (torch.ones(32, 2), "independent"),
        (torch.randn(32, 33), "rank 33"),
        (Neurons(((0, 1),), 48), "ablate"),
        (Direction("blocks.7.hook_resid_post", torch.randn(32)), "not a site of this model"),
        (Direction("blocks.0.mlp.hook_post", torch.randn(32)), "residual stream"),
    ],
)
def test_directions_that_cannot_be_removed_are_refused(target, message):
    with pytest.raises(TargetError, match=message):
        project_out(tiny("llama"), target)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"components": ["attention"]}, "components"),
        ({"layers": [9]}, "9"),
        ({"layers": "first"}, "layers"),
        ({"layers": [0], "components": ["embed"]}, "Nothing to edit"),
        ({"strength": 0.0}, "strength"),
        ({"strength": float("nan")}, "strength"),
    ],
)
def test_settings_that_select_nothing_are_refused(settings, message):
    with pytest.raises(EditError, match=message):
        project_out(tiny("llama"), columns(1), **settings)


# ------------------------------------------------------------------ neurons and heads

DENSE = [name for name in ARCHITECTURES if name not in MOE and name != "qwen3_moe_mixed"]


@pytest.mark.parametrize("name", DENSE)
def test_neuron_ablation_equals_zeroing_mlp_post(name):
    model = tiny(name)
    chosen = {0: [1, 30], 1: [7]}

    def zero(value, site):
        return value.index_fill(-1, torch.tensor(chosen[site.layer]), 0.0)

    expected = hooked_logits(model, {f"blocks.{layer}.mlp.hook_post": zero for layer in chosen})
    with ablate(model, [(0, 1), (0, 30), (1, 7)]).applied(model):
        made = logits(model)
    assert torch.allclose(made, expected, atol=1e-5)
    assert not torch.allclose(made, logits(model), atol=1e-3)


@pytest.mark.parametrize("name", LISTED)
def test_head_ablation_equals_zeroing_z(name):
    model = tiny(name)

    def zero(value, site):
        return value.index_fill(-2, torch.tensor([1, 3]), 0.0)

    expected = hooked_logits(model, {"blocks.1.attn.hook_z": zero})
    with ablate(model, Heads(((1, 1), (1, 3)), 4)).applied(model):
        assert torch.allclose(logits(model), expected, atol=1e-5)


def test_mean_ablation_equals_fixing_mlp_post_where_there_is_a_bias():
    model = tiny("gpt2")
    means = torch.tensor([0.7, -1.3])

    def fix(value, site):
        value = value.clone()
        value[..., [2, 9]] = means
        return value

    expected = hooked_logits(model, {"blocks.0.mlp.hook_post": fix})
    with ablate(model, Neurons(((0, 2), (0, 9)), 128), values=means).applied(model):
        assert torch.allclose(logits(model), expected, atol=1e-5)
    with pytest.raises(EditError, match="no bias"):
        ablate(tiny("mistral"), [(0, 2)], values=[1.0])


@pytest.mark.parametrize(
    ("name", "target", "error", "message"),
    [
        ("llama", [(0, 48)], TargetError, "48"),
        ("llama", [(5, 0)], TargetError, "layers"),
        ("llama", [], TargetError, "at least one"),
        ("llama", [(-1, 0)], TargetError, "range"),
        ("llama", "neurons", TargetError, "pairs"),
        ("llama", Neurons(((0, 60),), 64), TargetError, "48"),
        ("llama", Heads(((0, 5),), 6), TargetError, "heads"),
        ("mixtral", [(0, 1)], EditError, "mixture"),
        ("qwen3_moe_mixed", [(1, 1)], EditError, "mixture"),
    ],
)
def test_neurons_that_are_not_there_are_refused(name, target, error, message):
    with pytest.raises(error, match=message):
        ablate(tiny(name), target)


def test_ablating_what_is_silent_already_is_refused():
    model = tiny("mistral")
    ablate(model, [(0, 1)]).apply_(model)
    with pytest.raises(EditError, match="nothing to ablate"):
        ablate(model, [(0, 1)])


# ------------------------------------------------------------------ experts


def moe_layers(model) -> list[int]:
    names = sites.Sites(model).names
    return [layer for layer in range(2) if f"blocks.{layer}.mlp.hook_router_logits" in names]


@pytest.mark.parametrize("name", [*MOE, "qwen3_moe_mixed"])
def test_zeroed_expert_equals_zeroing_its_routing_weight(name):
    model = tiny(name)
    layer = moe_layers(model)[-1]
    indices = []

    def remember(value, site):
        indices.append(value.clone())

    def zero(value, site):
        return value.masked_fill(indices[-1] == 2, 0.0)

    prefix = f"blocks.{layer}.mlp.hook_expert"
    expected = hooked_logits(model, {f"{prefix}_indices": remember, f"{prefix}_weights": zero})
    edit = remove_experts(model, [(layer, 2)])
    with edit.applied(model):
        made = logits(model)
    assert torch.allclose(made, expected, atol=1e-6)
    assert not torch.allclose(made, logits(model), atol=1e-3)
    assert edit.steps[0].settings == {"method": "zero"}
    assert edit.config_patch == {}


GROUPED = ("deepseek_v2", "deepseek_v3_groups")  # their routers choose groups of experts first


@pytest.mark.parametrize("name", GROUPED)
def test_experts_in_groups_are_not_pruned(name):
    model = tiny(name)
    chosen = Experts(((moe_layers(model)[0], 1),), sites.Sites(model).dims.n_experts)
    with pytest.raises(EditError, match='groups of equal size, which pruning breaks; use method="zero"'):
        remove_experts(model, chosen, "prune")


@pytest.mark.parametrize("name", [name for name in (*MOE, "qwen3_moe_mixed") if name not in GROUPED])
def test_pruned_experts_equal_masking_the_router(name, tmp_path):
    model = tiny(name)
    digest = weights_hash(model)
    chosen = dict(zip(moe_layers(model), (1, 3), strict=False))

    def mask(value, site):
        return value.index_fill(-1, torch.tensor([chosen[site.layer]]), -torch.inf)

    expected = hooked_logits(model, {f"blocks.{layer}.mlp.hook_router_logits": mask for layer in chosen})
    edit = remove_experts(model, Experts(tuple(chosen.items()), 4), "prune")
    with edit.applied(model):
        assert torch.allclose(logits(model), expected, atol=1e-6)
        assert sites.Sites(model).dims.n_experts == 3
    assert sites.Sites(model).dims.n_experts == 4
    assert weights_hash(model) == digest
    assert list(edit.config_patch.values()) == [3]
    again = Edit.load(edit.save(tmp_path / "edit"))  # entries of one layer share an index; the file holds copies
    with again.applied(model):
        assert torch.allclose(logits(model), expected, atol=1e-6)


def test_masked_expert_equals_masking_the_router():
    model = tiny("gpt_oss")

    def mask(value, site):
        return value.index_fill(-1, torch.tensor([1]), -torch.inf)

    expected = hooked_logits(model, {"blocks.0.mlp.hook_router_logits": mask})
    with remove_experts(model, [(0, 1)], "mask").applied(model):
        assert torch.allclose(logits(model), expected, atol=1e-6)


def test_shared_experts_are_left_alone():
    edit = remove_experts(tiny("qwen2_moe"), [(0, 1), (1, 1)], "prune")
    assert not any("shared_expert" in name for name in edit.parameters)


@pytest.mark.parametrize(
    ("name", "target", "method", "error", "message"),
    [
        ("mixtral", [(0, 1)], "prune", EditError, "as many in each"),
        ("mixtral", [(0, 1)], "mask", EditError, "no bias"),
        ("mixtral", [(layer, e) for layer in (0, 1) for e in (0, 1, 2)], "prune", EditError, "chooses 2"),
        ("gpt_oss", [(0, e) for e in (0, 1, 2)], "mask", EditError, "chooses 2"),
        ("mixtral", [(0, 1)], "delete", EditError, "method"),
        ("mixtral", [(0, 4)], "zero", TargetError, "range"),
        ("mixtral", Experts(((0, 5),), 8), "zero", TargetError, "no expert"),
        ("mixtral", [(2, 0)], "zero", TargetError, "no expert"),
        ("mixtral", [], "zero", TargetError, "at least one"),
        ("mixtral", 3, "zero", TargetError, "pairs"),
        ("qwen3_moe_mixed", [(0, 1)], "zero", TargetError, "no expert"),
        ("llama", [(0, 1)], "zero", TargetError, "no experts"),
    ],
)
def test_experts_that_cannot_be_removed_are_refused(name, target, method, error, message):
    with pytest.raises(error, match=message):
        remove_experts(tiny(name), target, method)
