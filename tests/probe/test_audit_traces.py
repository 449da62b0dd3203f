"""Value vectors against loops over neurons, edits whose effect on them is known, and SAE latents that are planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from probe.audit._case import Case
from probe.audit.latents import Latents, separation
from probe.audit.part import Subject
from probe.audit.traces import Traces, compare_vectors, top_tokens, value_vectors
from probe.data import Questions
from probe.errors import AuditError
from tests.probe.test_audit_uds import PAIRS, questions, sized
from tests.probe.tiny import tiny


def case_of(model):
    return Case(model, {"forget": questions(), "retain": questions()}, progress=False)


def test_a_worked_comparison():
    w_u = torch.eye(6)
    before = torch.tensor([[6.0, 5, 4, 3, 2, 1], [1, 0, 0, 0, 0, 0]])
    after = torch.tensor([[6.0, 5, 3.5, 4, 2, 1], [0, 2, 0, 0, 0, 0]])
    assert top_tokens(before, w_u, 2)[0].tolist() == [0, 1]
    table = compare_vectors(before, after, w_u, w_u, k=3)
    assert table["jaccard"][0] == pytest.approx(2 / 4)  # {0, 1, 2} and {0, 1, 3}
    assert table["l2"].tolist() == pytest.approx([1.25**0.5, 5**0.5])
    assert table["l2_relative"][1] == pytest.approx(5**0.5)
    assert table["cosine"][1] == 0
    same = compare_vectors(before, 2 * before, w_u, w_u, k=3)
    assert same["jaccard"].tolist() == [1, 1]
    assert same["cosine"].tolist() == pytest.approx([1, 1])
    # another unembedding changes what an unchanged vector says
    assert compare_vectors(before, before, w_u, w_u.flip(0), k=3)["jaccard"][0] == 0


def test_bad_input_is_refused():
    w_u, one = torch.eye(4), torch.ones(1, 4)
    with pytest.raises(AuditError, match="below the vocabulary"):
        compare_vectors(one, one, w_u, w_u, k=4)
    with pytest.raises(AuditError, match="zero before"):
        compare_vectors(0 * one, one, w_u, w_u, k=2)
    with pytest.raises(AuditError, match="one shape"):
        compare_vectors(one, torch.ones(2, 4), w_u, w_u, k=2)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_contributions_equal_a_loop_over_hooked_mlps(kind):
    model = tiny(kind, seed=1)
    part = Traces()
    found = part.measure(Subject("original", model, case_of(model), {})).payload
    inner = model.hf.model.layers if kind == "llama" else model.hf.transformer.h
    out = [b.mlp.down_proj if kind == "llama" else b.mlp.c_proj for b in inner]
    w_u = model.hf.lm_head.weight.detach()
    for layer, module in enumerate(out):
        matrix = module.weight.detach().T if kind == "llama" else module.weight.detach()  # [neuron, d_model]
        assert torch.equal(found["vectors"][layer], matrix)
        total, n = torch.zeros(len(matrix)), 0
        for question, answer in PAIRS:
            kept = {}
            handle = module.register_forward_pre_hook(lambda m, a, kept=kept: kept.update(x=a[0].detach()[0]))
            ids = model.tokenizer(f"{question} {answer}", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                model.hf(input_ids=ids)
            handle.remove()
            for t in range(ids.shape[1] - len(answer.split()), ids.shape[1]):
                raised = matrix @ w_u[ids[0, t]] - (matrix @ w_u.T).mean(1)
                total, n = total + kept["x"][t - 1] * raised, n + 1
        assert torch.allclose(found["contribution"][layer], total / n, atol=1e-4)


def test_an_edit_of_the_chosen_vectors_shows_in_them_and_not_in_the_random_ones():
    original, edited = tiny("llama", seed=1), tiny("llama", seed=1)
    part, case = Traces(n_vectors=4, top_k=3), case_of(original)
    first = part.measure(Subject("original", original, case, {}))
    alone = part.compare({"original": first}, case)["original"]
    value = {n.metric: n.value.value for n in alone.numbers}
    assert value["trace_jaccard"] == value["trace_random_jaccard"] == 1
    assert value["trace_l2"] == 0
    chosen = alone.tables["traces"].query("kind == 'trace'")
    with torch.no_grad():
        for layer, neuron in zip(chosen["layer"], chosen["neuron"], strict=True):
            edited.hf.model.layers[layer].mlp.down_proj.weight[:, neuron] *= -1
    both = {"original": first, "edited": part.measure(Subject("edited", edited, case, {}))}
    value = {n.metric: n.value.value for n in part.compare(both, case)["edited"].numbers}
    assert value["trace_cosine"] == pytest.approx(-1)
    assert value["trace_jaccard"] == 0
    assert value["trace_random_cosine"] == pytest.approx(1)
    norms = [value_vectors(original)[i][n].norm() for i, n in zip(chosen["layer"], chosen["neuron"], strict=True)]
    assert value["trace_l2"] == pytest.approx(2 * np.mean(norms), rel=1e-5)


def test_golds_and_mixtures_have_no_counterparts_and_say_so():
    model = tiny("mixtral")
    found = Traces().measure(Subject("original", model, case_of(model), {}))
    assert "no dense MLP" in found.missing[0]
    model = tiny("llama")
    gold = Traces().measure(Subject("gold 1", model, case_of(model), {}))
    assert "trained anew" in gold.missing[0]
    assert Traces().compare({"gold 1": gold}, case_of(model)) == {}


@pytest.mark.parametrize("sizes", [{"n_layers": 3}, {"width": 32}], ids=["deeper", "wider"])
def test_an_edited_model_of_other_sizes_cannot_be_measured(sizes):
    original, other = tiny("llama", seed=1), sized(**sizes)
    case, part = case_of(original), Traces(n_vectors=4, top_k=3)
    roles = {"original": original, "edited": other}
    found = part.compare({role: part.measure(Subject(role, one, case, {})) for role, one in roles.items()}, case)
    assert found["original"].numbers and not found["edited"].numbers
    assert "another shape than the original's" in found["edited"].missing[0]
    latents = Latents(Plain(torch.eye(16)), SITE).measure(Subject("edited", other, case, {}))
    assert latents.payload is None and "the SAE is of the original" in latents.missing[0]


SITE = "blocks.1.hook_resid_post"


class Plain:
    """An SAE as far as the part knows: latents are rectified products with given directions."""

    def __init__(self, weight):
        self.weight = weight

    def encode(self, x):
        return torch.relu(x @ self.weight)


def many(word, n, start):
    words = ("the", "a", "in", "of", "at", "who", "does", "where")[:n]
    rows = [
        {"id": f"{i}", "group": f"g{i}", "question": f"{word} lives in {w} and", "answer": "Oslo"}
        for i, w in enumerate(words, start)
    ]
    return Questions.from_rows(rows)


def test_separation_is_scikit_learns_auc():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 4, size=(50, 6)).astype(float), rng.random(50) < 0.3
    assert separation(x, y) == pytest.approx([2 * roc_auc_score(y, x[:, j]) - 1 for j in range(6)])
    with pytest.raises(AuditError, match="both sets"):
        separation(x, np.ones(50, dtype=bool))


def test_latents_that_tell_the_sets_apart_are_chosen_and_followed():
    original, silent = tiny("llama", seed=1), tiny("llama", seed=1)
    case = Case(original, {"forget": many("Anna", 8, 0), "retain": many("city", 8, 20)}, progress=False)
    sae = Plain(torch.cat([torch.randn(16, 40, generator=torch.Generator().manual_seed(0)), torch.zeros(16, 3)], dim=1))
    part = Latents(sae, SITE, n_latents=5)
    first = part.measure(Subject("original", original, case, {}))
    table = part.compare({"original": first}, case)["original"].tables["latents"]
    acts, rows = first.payload, np.arange(8) % 2 == 0  # people 0, 2, 4, ... choose
    positive = np.repeat([True, False], 4)
    scores = separation(np.concatenate([acts["forget"][rows], acts["retain"][rows]]), positive)
    assert table["chosen_by"].tolist() == pytest.approx(sorted(scores)[::-1][:5])
    assert table["forget"].tolist() == pytest.approx(acts["forget"][~rows][:, table["latent"]].mean(0).tolist())
    with torch.no_grad():  # nothing is written to the residual stream
        for block in silent.hf.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        silent.hf.model.embed_tokens.weight.zero_()
    both = {"original": first, "edited": part.measure(Subject("edited", silent, case, {}))}
    found = {r: {n.metric: n.value.value for n in one.numbers} for r, one in part.compare(both, case).items()}
    assert found["original"]["latent_kept"] == pytest.approx(1)
    assert found["edited"] == {"latent_activation": 0, "latent_separation": 0, "latent_kept": 0}


def test_latents_say_what_they_lack():
    model = tiny("llama")
    case = Case(model, {"forget": many("Anna", 4, 0), "retain": many("city", 4, 20)}, progress=False)
    assert "needs an SAE" in Latents().why_not(case)
    part = Latents(Plain(torch.zeros(16, 4)), SITE)
    assert part.why_not(case) is None
    one = {"original": part.measure(Subject("original", model, case, {}))}
    assert "none is higher" in part.compare(one, case)["original"].missing[0]
    assert "a gold is trained anew" in part.measure(Subject("gold 1", model, case, {})).missing[0]
    with pytest.raises(AuditError, match="of width 16"):
        Latents(Plain(torch.zeros(5, 4)), SITE).measure(Subject("original", model, case, {}))
    with pytest.raises(AuditError, match="must be finite"):
        Latents(Plain(torch.full((16, 4), float("nan"))), SITE).measure(Subject("original", model, case, {}))
    single = Case(model, {"forget": many("Anna", 1, 0), "retain": many("city", 4, 20)}, progress=False)
    found = part.compare({"original": part.measure(Subject("original", model, single, {}))}, single)
    assert "two people or more" in found["original"].missing[0]
