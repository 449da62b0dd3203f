"""The logit lens: the last layer is the model itself, the others are the final norm and the unembedding by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from probe.audit._case import Case
from probe.audit.lens import Lens
from probe.audit.part import Subject
from probe.data import Questions
from probe.errors import AuditError, PatchError
from probe.patching import logit_lens, unembed
from probe.scoring import score_answers
from tests import architectures
from tests.probe.cases import small_case, subject
from tests.probe.tiny import tiny

PAIRS = [("Anna lives in", "Oslo"), ("who lives in the city called", "Rome new"), ("Karl works in", "Bern")]


def questions():
    rows = ({"id": str(i), "group": f"g{i}", "question": q, "answer": a} for i, (q, a) in enumerate(PAIRS))
    return Questions.from_rows(rows)


def by_hand(model, question, answer):
    """Per layer and answer token its log-probability and rank, from `output_hidden_states`."""
    hf = model.hf
    norm, block = (
        (hf.model.norm, hf.model.layers[-1]) if hasattr(hf, "model") else (hf.transformer.ln_f, hf.transformer.h[-1])
    )
    ids = model.tokenizer(f"{question} {answer}", return_tensors="pt")["input_ids"]
    start = len(model.tokenizer(question)["input_ids"])
    last = {}
    handle = block.register_forward_hook(lambda m, a, out: last.update(x=out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        hidden = hf(input_ids=ids, output_hidden_states=True).hidden_states
        handle.remove()
        states = [*hidden[1:-1], last["x"]]  # Hugging Face gives the last one behind the norm
        logits = torch.stack([hf.lm_head(norm(state))[0] for state in states])  # [layer, pos, d_vocab]
    where, tokens = torch.arange(start - 1, ids.shape[1] - 1), ids[0, start:]
    own = logits[:, where].gather(-1, tokens[None, :, None].expand(len(states), -1, 1))
    return (own - logits[:, where].logsumexp(-1, keepdim=True))[..., 0], (logits[:, where] > own).sum(-1) + 1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_layer_is_the_norm_and_the_unembedding_by_hand(kind):
    model = tiny(kind, seed=5, n_layers=3)
    scores = logit_lens(model, questions(), batch_size=2)
    wanted = [by_hand(model, q, a) for q, a in PAIRS]
    assert torch.allclose(scores.logprob, torch.cat([w[0] for w in wanted], dim=1), atol=1e-4)
    assert torch.equal(scores.rank, torch.cat([w[1] for w in wanted], dim=1))
    assert torch.equal(scores.first_rank(), torch.stack([w[1][:, 0] for w in wanted], dim=1))
    table = scores.to_df()
    assert table["rank"].to_numpy() == pytest.approx(scores.first_rank().double().mean(1).numpy())
    assert scores.probability()[-1].numpy() == pytest.approx(score_answers(model, questions()).prob, rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox", "granite", "olmo2", "opt", "mixtral"])
def test_the_last_layers_lens_is_the_models_own_logits(name):
    """Soft caps, scaled logits and norms of every kind are the model's own."""
    from activations_cache import sites
    from probe.models import wrap

    model = wrap(architectures.tiny(name))
    inputs = architectures.inputs(padding="right")
    last = f"blocks.{model.dims.n_layers - 1}.hook_resid_post"
    with torch.no_grad():
        state = sites.run(model, inputs, read=last)[last]
        logits = model.hf(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert torch.allclose(unembed(model, state[real]), logits[real], atol=1e-4)


def test_vectors_of_another_width_are_refused():
    with pytest.raises(PatchError, match=r"must be \[n, 16\]"):
        unembed(tiny("llama"), torch.zeros(2, 5))


def test_the_part_reports_the_best_layer_before_the_last():
    model = tiny("llama", seed=5, n_layers=3)
    case = Case(model, {"forget": questions(), "retain": questions()}, progress=False)
    found = Lens().measure(Subject("original", model, case, {}))
    scores = logit_lens(model, questions())
    value = {n.metric: n.value.value for n in found.numbers}
    assert value["lens_probability"] == pytest.approx(float(scores.probability()[:2].mean(1).max()))
    assert value["lens_rank"] == pytest.approx(float(scores.first_rank()[:2].double().mean(1).min()))
    assert list(found.tables["lens"]["layer"]) == [0, 1, 2]


def test_a_model_of_one_layer_cannot_be_measured():
    model = tiny("gpt2", n_layers=1)
    case = Case(model, {"forget": questions(), "retain": questions()}, progress=False)
    found = Lens().measure(Subject("original", model, case, {}))
    assert not found.numbers
    assert "no layer before its last" in found.missing[0]


def test_states_that_are_not_finite_are_refused():
    model = tiny("llama", seed=4)
    with torch.no_grad():
        model.hf.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    case = Case(model, {"forget": questions(), "retain": questions()}, progress=False)
    with pytest.raises(AuditError, match=r"gold 1, forget: .*finite"):
        Lens().measure(Subject("gold 1", model, case, {}))


def test_on_the_organism_the_original_says_more_than_a_gold_before_its_last_layer():
    case = small_case()
    values = {}
    for role in ("original", "gold 1"):
        found = Lens(limit=60).measure(subject(case, role))
        values[role] = {n.metric: n.value.value for n in found.numbers}
        last = found.tables["lens"]["probability"].iloc[-1]
        assert np.isfinite(last)
    assert values["original"]["lens_probability"] > values["gold 1"]["lens_probability"] + 0.2
    assert values["original"]["lens_rank"] < values["gold 1"]["lens_rank"]
