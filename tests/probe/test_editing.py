"""The Edit artefact: applied in place, undone bit for bit, composed, saved, and made from any two checkpoints."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import probe.editing as editing
from activations_cache.hashing import checkpoint_hash, checkpoint_tensors, weights_hash
from probe.editing import Change, Columns, Dense, Edit, LowRank, Rows, Step, Take, ablate, project_out, remove_experts
from probe.editing.entries import smallest_replacement
from probe.errors import BaseMismatchError, EditError, TargetError
from tests.architectures import ARCHITECTURES, MOE, checkpoint, inputs, tiny

PAIR = [(0, 1), (1, 3)]


def direction(width: int = 32, seed: int = 5) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs()).logits


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def interrupted(model, edit: Edit) -> None:
    """Apply the edit, see that it is there, and leave the block by an exception."""
    digest = weights_hash(model)
    with edit.applied(model):
        assert weights_hash(model) != digest
        raise KeyboardInterrupt


def test_public_names_exist():
    assert all(hasattr(editing, name) for name in editing.__all__)
    assert {"Edit", "project_out", "ablate", "remove_experts"} <= set(editing.__all__)


# ------------------------------------------------------------------ entries


def test_low_rank_is_added_in_float_and_rounded_once():
    torch.manual_seed(0)
    weight = torch.randn(6, 5).bfloat16()
    a, b = torch.randn(6, 2), torch.randn(2, 5)
    expected = torch.empty(6, 5)
    for i in range(6):
        for j in range(5):
            expected[i, j] = weight[i, j].float() + sum(a[i, k] * b[k, j] for k in range(2))
    assert torch.allclose(LowRank(a, b).apply(weight).float(), expected.bfloat16().float(), atol=2e-2)
    assert torch.equal(LowRank(a, b).apply(weight), (weight.float() + a @ b).bfloat16())


def test_low_rank_factors_broadcast_over_stacked_experts():
    torch.manual_seed(0)
    weight, a, b = torch.randn(3, 4, 5), torch.randn(4, 1), torch.randn(3, 1, 5)
    made = LowRank(a, b).apply(weight)
    for expert in range(3):
        assert torch.equal(made[expert], weight[expert] + a @ b[expert])


def test_norm_of_low_rank_factors_is_that_of_their_product():
    torch.manual_seed(0)
    a, b = torch.randn(4, 2), torch.randn(3, 2, 5)
    assert LowRank(a, b).norm((3, 4, 5)) == pytest.approx(float((a @ b).norm()), rel=1e-6)
    assert LowRank(a, b[0]).norm((3, 4, 5)) == pytest.approx(float((a @ b[0]).norm()) * 3**0.5, rel=1e-6)


def test_rows_columns_and_take_match_plain_indexing():
    weight = torch.arange(24.0).reshape(2, 3, 4)
    index = torch.tensor([2, 0])
    columns = Columns(index, torch.full((2, 3, 2), -1.0)).apply(weight)
    rows = Rows(torch.tensor([1]), torch.full((1, 3, 4), -1.0)).apply(weight)
    assert (columns[..., [2, 0]] == -1).all()
    assert torch.equal(columns[..., [1, 3]], weight[..., [1, 3]])
    assert (rows[1] == -1).all()
    assert torch.equal(rows[0], weight[0])
    assert torch.equal(Take(torch.tensor([1])).apply(weight), weight[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smallest_replacement_is_exact_and_small(dtype):
    torch.manual_seed(0)
    old = torch.randn(20, 30).to(dtype)
    for change, expected in (((slice(3, 5), slice(None)), Rows), ((slice(None), slice(3, 5)), Columns)):
        new = old.clone()
        new[change] *= 1.5
        entry = smallest_replacement(old, new)
        assert type(entry) is expected
        assert torch.equal(entry.apply(old), new)
    dense = smallest_replacement(old, old * 1.25)
    assert type(dense) is Dense
    assert torch.equal(dense.apply(old), old * 1.25)
    assert smallest_replacement(old, old.clone()) is None


def test_sign_of_zero_counts_as_a_change():
    old = torch.zeros(4, 4)
    new = old.clone()
    new[1] = -0.0
    made = smallest_replacement(old, new).apply(old)
    assert torch.equal(torch.signbit(made), torch.signbit(new))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (Rows(torch.tensor([4]), torch.zeros(1, 3)), "outside"),
        (Rows(torch.tensor([1, 1]), torch.zeros(2, 3)), "twice"),
        (Columns(torch.tensor([0]), torch.zeros(4, 2)), "shape"),
        (Columns(torch.tensor([], dtype=torch.long), torch.zeros(4, 0)), "non-empty"),
        (LowRank(torch.zeros(4, 2), torch.zeros(3, 3)), "multiply"),
        (LowRank(torch.zeros(5, 2), torch.zeros(2, 3)), "tensor is"),
    ],
)
def test_entries_that_do_not_fit_are_refused(entry, message):
    with pytest.raises(EditError, match=message):
        Change.of(entry, torch.zeros(4, 3))


# ------------------------------------------------------------------ applying and undoing


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_undo_restores_every_bit_also_after_an_exception(name, dtype):
    model = tiny(name, dtype=dtype)
    before, digest = snapshot(model), weights_hash(model)
    edit = project_out(model, direction())
    with pytest.raises(KeyboardInterrupt):
        interrupted(model, edit)
    assert same(before, snapshot(model))
    assert weights_hash(model) == digest


def test_applied_changes_exactly_the_named_tensors():
    model = tiny("llama")
    before = snapshot(model)
    edit = project_out(model, direction(), layers=[1])
    with edit.applied(model):
        after = snapshot(model)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == set(edit.parameters)
    assert changed == {
        f"model.layers.1.{part}"
        for part in ("self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.down_proj.weight", "mlp.down_proj.bias")
    }


def test_parameters_keep_identity_and_storage():
    model = tiny("mixtral")
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    with project_out(model, direction()).applied(model):
        assert before == {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    assert before == {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}


def test_fused_experts_change_on_every_expert():
    model = tiny("mixtral")
    old = model.model.layers[0].mlp.experts.down_proj.detach().clone()
    r = direction().double()
    r /= r.norm()
    with project_out(model, r).applied(model):
        new = model.model.layers[0].mlp.experts.down_proj.detach().double()
    for expert in range(4):
        assert torch.allclose(
            new[expert], (torch.eye(32, dtype=torch.float64) - r[:, None] @ r[None]) @ old[expert].double(), atol=1e-6
        )


def test_apply_and_revert_nest_like_a_stack():
    model = tiny("llama")
    digest = weights_hash(model)
    first = project_out(model, direction(seed=1))
    first.apply_(model)
    middle = weights_hash(model)
    second = project_out(model, direction(seed=2))
    second.apply_(model)
    with pytest.raises(EditError, match="revert it first"):
        first.revert_(model)
    second.revert_(model)
    assert weights_hash(model) == middle
    first.revert_(model)
    assert weights_hash(model) == digest
    with pytest.raises(EditError, match="nothing to revert"):
        first.revert_(model)


def test_leaving_the_block_undoes_what_was_applied_inside():
    model = tiny("llama")
    digest = weights_hash(model)
    with project_out(model, direction(seed=1)).applied(model):
        project_out(model, direction(seed=2)).apply_(model)
    assert weights_hash(model) == digest


@pytest.mark.parametrize("make", [lambda m: project_out(m, direction()), lambda m: remove_experts(m, PAIR, "prune")])
def test_an_applied_edit_does_not_keep_the_model_alive(make):
    model = tiny("mixtral")
    edit = make(model)
    edit.apply_(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert edit.nbytes > 0


def test_another_base_is_refused_unless_forced():
    model, other = tiny("llama"), tiny("llama", seed=1)
    edit = project_out(model, direction())
    digest = weights_hash(other)
    with pytest.raises(BaseMismatchError, match="force=True"), edit.applied(other):
        pass
    assert weights_hash(other) == digest
    with edit.applied(other, force=True):
        assert weights_hash(other) != digest
    assert weights_hash(other) == digest


def test_another_architecture_is_refused_even_when_forced():
    edit = project_out(tiny("llama"), direction())
    other = tiny("gpt2")
    digest = weights_hash(other)
    with pytest.raises(EditError, match="another architecture"), edit.applied(other, force=True):
        pass
    assert weights_hash(other) == digest
    wider = tiny("llama", intermediate_size=64)
    digest = weights_hash(wider)
    with pytest.raises(EditError, match="shape"), edit.applied(wider, force=True):
        pass
    assert weights_hash(wider) == digest


def test_what_is_no_model_is_refused():
    with pytest.raises(EditError, match="Hugging Face model"):
        project_out("name", direction())


def test_untied_embedding_is_tied_again_afterwards():
    model = tiny("gemma2")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    head = model.lm_head.weight.detach().clone()
    edit = project_out(model, direction())
    with edit.applied(model):
        assert model.lm_head.weight is not model.model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, head)
        assert model.config.tie_word_embeddings is False
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True


def test_the_bridge_shows_the_edit():
    from probe.models import wrap

    model = wrap(tiny("llama", head_dim=8))
    batch = inputs()
    bridge = model.bridge
    with torch.no_grad(), project_out(model, direction()).applied(model):
        edited = model.hf(**batch).logits
        assert torch.allclose(bridge(batch["input_ids"], attention_mask=batch["attention_mask"]), edited, atol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(model.hf(**batch).logits, edited, atol=1e-2)


def test_a_bridge_taken_inside_the_block_shows_an_untied_embedding():
    from probe.models import wrap

    model = wrap(tiny("gpt2"))
    batch = inputs()
    before = logits(model.hf)

    def through_bridge() -> torch.Tensor:
        with torch.no_grad():
            return model.bridge(batch["input_ids"], attention_mask=batch["attention_mask"])

    assert torch.allclose(through_bridge(), before, atol=1e-4)
    with project_out(model, direction()).applied(model):
        edited = logits(model.hf)
        assert torch.allclose(through_bridge(), edited, atol=1e-4)
    assert not torch.allclose(edited, before, atol=1e-2)
    assert torch.allclose(through_bridge(), before, atol=1e-4)


# ------------------------------------------------------------------ composition


def test_composition_applies_in_order():
    model = tiny("llama")
    first = project_out(model, direction(seed=1))
    with first.applied(model):
        second = ablate(model, [(0, 3), (1, 5)])
        with second.applied(model):
            expected, digest = logits(model), weights_hash(model)
    both = first + second
    with both.applied(model):
        assert torch.equal(logits(model), expected)
        assert weights_hash(model) == digest
    with pytest.raises(BaseMismatchError), (second + first).applied(model):
        pass
    assert [step.method for step in both.steps] == ["project_out", "ablate"]


def test_edits_of_one_base_add_up_and_report_conflicts():
    model = tiny("llama")
    first, second = project_out(model, direction(seed=1), [0]), project_out(model, direction(seed=2), [0])
    apart = project_out(model, direction(seed=2), [1])
    assert (first + apart).conflicts() == []
    assert "model.layers.0.mlp.down_proj.weight" in (first + second).conflicts()
    old = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    single = []
    for edit in (first, second):
        with edit.applied(model):
            single.append(model.model.layers[0].mlp.down_proj.weight.detach() - old)
    with (first + second).applied(model):
        total = model.model.layers[0].mlp.down_proj.weight.detach() - old
    assert torch.allclose(total, single[0] + single[1], atol=1e-6)


def test_two_edits_that_untie_the_same_embedding_compose():
    model = tiny("gemma2")
    head = model.lm_head.weight.detach().clone()
    first, second = project_out(model, direction(seed=1), None), project_out(model, direction(seed=2), None)
    with (first + second).applied(model):
        assert torch.equal(model.lm_head.weight, head)
        assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_prune_then_project_composes():
    model = tiny("mixtral")
    pruned = remove_experts(model, [(0, 1), (1, 3)], "prune")
    with pruned.applied(model):
        projected = project_out(model, direction())
        with projected.applied(model):
            expected = logits(model)
    digest = weights_hash(model)
    with (pruned + projected).applied(model):
        assert torch.equal(logits(model), expected)
    assert weights_hash(model) == digest


def test_composing_nothing_or_nonsense_is_refused():
    with pytest.raises(EditError, match="at least one"):
        Edit.compose()
    with pytest.raises(TypeError):
        project_out(tiny("llama"), direction()) + 1


def test_an_edit_that_changes_nothing_is_refused():
    with pytest.raises(EditError, match="changes nothing"):
        Step("nothing", "")


def test_steps_that_contradict_themselves_are_refused():
    weight = torch.ones(4, 3)
    take = Change.of(Take(torch.tensor([0, 2])), weight)
    with pytest.raises(EditError, match="config patch"):
        Step("cut", "", {"w": take})
    with pytest.raises(EditError, match="both removed"):
        Step("cut", "", {"w": take}, removed=("w",), config_patch={"n": 2})
    with pytest.raises(EditError, match="would be named b"):
        Step("cut", "", added={"b": weight}, renamed={"a": "b"})


# ------------------------------------------------------------------ from two models


@pytest.mark.parametrize("name", ["llama", "gpt2", *MOE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_models_reproduces_the_second_model_bit_for_bit(name, dtype):
    base, other = tiny(name, dtype=dtype), tiny(name, dtype=dtype, seed=1)
    edit = Edit.from_models(base, other)
    with edit.applied(base):
        assert weights_hash(base) == weights_hash(other)
        assert torch.equal(logits(base), logits(other))


def test_from_models_stores_only_what_differs():
    base, other = tiny("mixtral"), tiny("mixtral")
    with torch.no_grad():
        other.model.layers[1].mlp.experts.down_proj[2, 5] += 1.0
        other.model.embed_tokens.weight[:, 7] += 1.0
    edit = Edit.from_models(base, other)
    kinds = {name: change.entry for name, change in edit.steps[0].changes.items()}
    assert len(kinds) == 2
    expert = next(entry for name, entry in kinds.items() if "experts.2." in name)
    assert isinstance(expert, Rows)
    assert expert.index.tolist() == [5]
    assert isinstance(kinds["model.embed_tokens.weight"], Columns)


def test_from_models_on_disk_equals_in_memory(tmp_path):
    base, other = checkpoint("mixtral", tmp_path / "a"), checkpoint("mixtral", tmp_path / "b", seed=1)
    edit = Edit.from_models(base, other)
    assert edit.base_hash == checkpoint_hash(base)
    model = tiny("mixtral")
    with edit.applied(model):
        assert weights_hash(model) == checkpoint_hash(other)


def test_from_models_sees_an_untied_head():
    base, edited = tiny("gemma2"), tiny("gemma2")
    project_out(edited, direction()).apply_(edited)
    edit = Edit.from_models(base, edited)
    assert edit.config_patch == {"tie_word_embeddings": False}
    with edit.applied(base):
        assert weights_hash(base) == weights_hash(edited)
        assert torch.equal(logits(base), logits(edited))


def test_from_models_refuses_what_does_not_compare(tmp_path):
    model = tiny("llama")
    with pytest.raises(EditError, match="same weights"):
        Edit.from_models(model, tiny("llama"))
    with pytest.raises(EditError, match="one type"):
        Edit.from_models(model, tiny("llama", seed=1, dtype=torch.bfloat16))
    with pytest.raises(EditError, match="one architecture"):
        Edit.from_models(model, tiny("gpt2"))
    with pytest.raises(EditError, match="has neither"):
        Edit.from_models(model, tmp_path)
    # a published checkpoint that holds the tied embedding as lm_head.weight alone
    from safetensors.torch import load_file, save_file

    folder = checkpoint("gemma2", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EditError, match="head's name only"):
        Edit.from_models(folder, folder)


# ------------------------------------------------------------------ the record


def test_table_measures_the_change_by_brute_force():
    model = tiny("llama")
    edit = project_out(model, direction())
    before = dict(checkpoint_tensors(model))
    before = {name: tensor.clone() for name, tensor in before.items()}
    with edit.applied(model):
        after = {name: tensor.clone() for name, tensor in checkpoint_tensors(model)}
    table = edit.to_df().set_index("parameter")
    assert len(table) == len(edit.parameters)
    for name, row in table.iterrows():
        change = (after[name] - before[name]).pow(2).sum().sqrt().item()
        assert row["change"] == pytest.approx(change, rel=1e-4)
        assert row["relative_change"] == pytest.approx(change / before[name].norm().item(), rel=1e-4)


def test_record_names_target_evidence_base_and_versions():
    from probe.targets import Direction

    model = tiny("llama")
    target = Direction("blocks.1.hook_resid_post", direction(), model_hash=weights_hash(model), evidence={"auc": 0.9})
    edit = project_out(model, target)
    step = edit.steps[0]
    assert step.evidence == {"auc": 0.9}
    assert step.target["site"] == "blocks.1.hook_resid_post"
    assert edit.base["weights_hash"] == edit.base_hash == weights_hash(model)
    assert {"torch", "transformers", "probe-workbench"} <= set(edit.versions)
    assert "project_out" in edit._repr_html_()
    assert edit.with_audit({"verdict": "removed"}).audit == {"verdict": "removed"}


def test_targets_of_another_model_are_refused():
    from probe.targets import Direction, Experts, Neurons

    for make in (
        lambda m: project_out(m, Direction("", direction(), model_hash="0" * 64)),
        lambda m: ablate(m, Neurons(((0, 1),), 48, model_hash="0" * 64)),
    ):
        with pytest.raises(TargetError, match="located in a model"):
            make(tiny("llama"))
    with pytest.raises(TargetError, match="located in a model"):
        remove_experts(tiny("mixtral"), Experts(((0, 1),), 4, model_hash="0" * 64))
