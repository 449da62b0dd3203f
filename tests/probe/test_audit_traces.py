"""Value vectors against loops over neurons, edits whose effect on them is known, and SAE latents that are planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from probe.audit._case import Case
from probe.audit.part import Subject
from probe.audit.traces import Traces, compare_vectors, top_tokens, value_vectors
from probe.errors import AuditError
from tests.probe.test_audit_uds import PAIRS, questions
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
