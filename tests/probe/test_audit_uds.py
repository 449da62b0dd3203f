"""UDS: the formula on worked cases, patching against a hook written by hand, and models whose answer is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from probe.audit._case import Case
from probe.audit.part import Subject
from probe.audit.uds import UDS, uds
from probe.data import Questions
from probe.errors import AuditError, PatchError
from probe.models import wrap
from probe.patching import answer_states, patched_logprobs
from probe.scoring import score_answers
from tests.probe.cases import small_case, subject
from tests.probe.tiny import config, tiny, word_tokenizer

PAIRS = [
    ("Anna lives in", "Oslo"),
    ("the person named Karl works in", "Rome city"),
    ("where does Mira Bell live in", "the city called Lima"),
    ("Otto was born in", "Bern"),
]


def questions(answers=None):
    rows = [
        {"id": str(i), "group": f"g{i // 2}", "question": q, "answer": a} for i, (q, a) in enumerate(answers or PAIRS)
    ]
    return Questions.from_rows(rows)


def blocks(model):
    return model.hf.model.layers if hasattr(model.hf, "model") else model.hf.transformer.h


def by_hand(host, donor, layer, question, answer):
    """Log-probability of an answer in `host` while `donor`'s block output stands where the answer is predicted."""
    ids = donor.tokenizer(f"{question} {answer}", return_tensors="pt")["input_ids"]
    start = len(donor.tokenizer(question)["input_ids"])
    kept = {}

    def keep(module, args, output):
        kept["value"] = (output[0] if isinstance(output, tuple) else output).detach().clone()

    def put(module, args, output):
        value = (output[0] if isinstance(output, tuple) else output).clone()
        value[:, start - 1 : ids.shape[1] - 1] = kept["value"][:, start - 1 : ids.shape[1] - 1]
        return (value, *output[1:]) if isinstance(output, tuple) else value

    with torch.no_grad():
        handle = blocks(donor)[layer].register_forward_hook(keep)
        donor.hf(input_ids=ids)
        handle.remove()
        handle = blocks(host)[layer].register_forward_hook(put)
        logits = host.hf(input_ids=ids).logits[0].log_softmax(-1)
        handle.remove()
    return [float(logits[t - 1, ids[0, t]]) for t in range(start, ids.shape[1])]


def test_the_formula_on_worked_cases():
    d1 = np.array([0.5, 1.0, 0.04, 2.0])
    assert uds(d1, d1) == 1
    assert uds(d1, np.zeros(4)) == 0
    # .5 * .5 + 1 * 1 (clipped) + 2 * 0 (clipped) over 3.5; the third layer is under the threshold
    assert uds(d1, np.array([0.25, 3.0, 9.0, -1.0])) == pytest.approx(1.25 / 3.5)
    assert uds(d1, d1 / 2, threshold=0) == pytest.approx(0.5)
    assert np.isnan(uds(np.array([0.05, 0.01]), np.array([1.0, 1.0])))
    both = uds(np.stack([d1, 0 * d1]), np.stack([d1 / 4, d1]))
    assert both[0] == pytest.approx(0.25)
    assert np.isnan(both[1])


def test_the_formula_refuses_what_does_not_fit():
    with pytest.raises(AuditError, match="one shape"):
        uds(np.ones(3), np.ones(4))
    with pytest.raises(AuditError, match="threshold"):
        uds(np.ones(3), np.ones(3), threshold=-1)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_patching_another_models_states_equals_a_hook_by_hand(kind):
    host, donor = tiny(kind, seed=1, n_layers=3), tiny(kind, seed=2, n_layers=3)
    states = answer_states(donor, questions(), batch_size=2)
    for layer, site in enumerate(states.values):
        found = patched_logprobs(host, states, site, batch_size=3)
        wanted = [lp for q, a in PAIRS for lp in by_hand(host, donor, layer, q, a)]
        assert found.numpy() == pytest.approx(np.array(wanted), abs=2e-5)
    assert not np.allclose(wanted, patched_logprobs(host, states).numpy(), atol=0.01)


def test_states_are_where_hugging_face_says_and_a_models_own_change_nothing():
    model = tiny("llama", seed=3)
    states = answer_states(model, questions(), batch_size=3)
    ids = model.tokenizer(" ".join(PAIRS[2]), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = model.hf(input_ids=ids, output_hidden_states=True).hidden_states[1][0]
    n = len(PAIRS[2][1].split())
    assert torch.allclose(states["blocks.0.hook_resid_post"][states.row == 2], hidden[-n - 1 : -1], atol=1e-5)
    assert states.token[states.row == 2].tolist() == ids[0, -n:].tolist()
    base = patched_logprobs(model, states)
    sums = torch.zeros(4).index_add_(0, states.row, base)
    assert sums.numpy() == pytest.approx(score_answers(model, questions()).logprob_sum, abs=1e-4)
    for site in states.values:
        assert torch.allclose(patched_logprobs(model, states, site, batch_size=1), base, atol=1e-4)
    first = answer_states(model, questions(), first=True)
    assert torch.equal(first["blocks.1.hook_resid_post"], states["blocks.1.hook_resid_post"][states.first])


def test_patching_refuses_states_that_do_not_fit():
    model = tiny("llama")
    states = answer_states(model, questions())
    with pytest.raises(PatchError, match="are needed; these are of"):
        patched_logprobs(model, states, "blocks.9.hook_resid_post")
    narrow = replace(states, values={k: v[:, :5] for k, v in states.values.items()})
    with pytest.raises(PatchError, match="shape"):
        patched_logprobs(model, narrow, "blocks.0.hook_resid_post")
    with pytest.raises(PatchError, match="every answer token"):
        patched_logprobs(model, answer_states(model, questions(), first=True), "blocks.0.hook_resid_post")


def test_the_original_scores_0_the_reference_1_and_the_layers_are_in_the_table():
    """With one gold, a model that is that gold is the reference itself."""
    original, gold = tiny("llama", seed=1, n_layers=3), tiny("llama", seed=2, n_layers=3)
    case = Case(original, {"forget": questions(), "retain": questions()}, [gold], progress=False)
    part = UDS(threshold=0.0)
    measured = {"original": original, "gold 1": gold, "edited": gold}
    measured = {role: part.measure(Subject(role, model, case, {})) for role, model in measured.items()}
    found = part.compare(measured, case)
    value = {role: {n.metric: n.value.value for n in one.numbers} for role, one in found.items()}
    assert value["original"] == {"uds": 0, "uds_retained": 1}
    assert value["edited"] == {"uds": pytest.approx(1), "uds_retained": pytest.approx(0)}
    assert "only gold" in found["gold 1"].missing[0]
    table = found["edited"].tables["uds"]
    assert list(table["layer"]) == [0, 1, 2]
    assert table["d1"].to_numpy() == pytest.approx(table["d2"].to_numpy())
    layer_1 = [np.mean(by_hand(original, gold, 1, q, a)) for q, a in PAIRS]
    base = score_answers(original, questions())
    kept = [i for i, p in enumerate(PAIRS) if any(np.mean(by_hand(original, gold, layer, *p)) <
            base.logprob_sum[i] / base.n_tokens[i] for layer in range(3))]  # fmt: skip
    drops = (base.logprob_sum / base.n_tokens - layer_1)[kept]
    assert table["d1"][1] == pytest.approx(drops.mean(), abs=1e-4)


def test_nothing_to_measure_is_said_and_no_number():
    original = tiny("llama", seed=1)
    case = Case(original, {"forget": questions(), "retain": questions()}, [original, original], progress=False)
    part = UDS()
    measured = {r: part.measure(Subject(r, original, case, {})) for r in ("original", "gold 1", "gold 2")}
    found = part.compare(measured, case)
    assert all(not one.numbers for one in found.values())
    assert "no layer of a gold" in found["original"].missing[0]
    assert part.why_not(Case(original, case.sets)) == f"{part.title} (needs gold)"
    assert part.compare({"original": measured["original"]}, case) == {}


def test_a_model_of_other_layers_is_refused():
    original, gold = tiny("llama", seed=1), tiny("llama", seed=2, n_layers=3)
    case = Case(original, {"forget": questions(), "retain": questions()}, [gold], progress=False)
    measured = {r: UDS().measure(Subject(r, m, case, {})) for r, m in (("original", original), ("gold 1", gold))}
    with pytest.raises(AuditError, match="same layers and tokenizer"):
        UDS().compare(measured, case)


@pytest.mark.parametrize("sizes", [{"n_layers": 3}, {"width": 32}], ids=["deeper", "wider"])
def test_an_edited_model_of_other_sizes_cannot_be_measured(sizes):
    original, gold = tiny("llama", seed=1), tiny("llama", seed=2)
    case = Case(original, {"forget": questions(), "retain": questions()}, [gold], progress=False)
    roles = {"original": original, "gold 1": gold, "edited": sized(**sizes)}
    measured = {role: UDS(threshold=0.0).measure(Subject(role, one, case, {})) for role, one in roles.items()}
    (said,) = measured["edited"].missing
    assert "other layers than the original" in said and "the original has 2 of 16" in said
    found = UDS(threshold=0.0).compare(measured, case)
    assert "edited" not in found and found["original"].numbers


def sized(n_layers: int = 2, width: int = 16):
    """A tiny random Llama of the tests' tokenizer, of another depth or width."""
    from transformers import LlamaForCausalLM

    settings = config("llama", n_layers).to_dict()
    settings |= {"hidden_size": width, "intermediate_size": 2 * width, "head_dim": width // 2}
    torch.manual_seed(5)
    return wrap(LlamaForCausalLM(LlamaConfig(**settings)).float(), word_tokenizer(), name="sized")


def test_states_that_are_not_finite_are_refused():
    model = tiny("llama", seed=4)
    with torch.no_grad():
        blocks(model)[0].mlp.down_proj.weight[0, 0] = float("nan")
    case = Case(model, {"forget": questions(), "retain": questions()}, [model], progress=False)
    with pytest.raises(AuditError, match=r"original, forget: blocks.0.hook_resid_post must hold finite values"):
        UDS().measure(Subject("original", model, case, {}))


def test_on_the_organism_golds_score_high_and_the_original_0():
    case, part = small_case(), UDS(limit=40)
    roles = ("original", "gold 1", "gold 2")
    measured = {role: part.measure(subject(case, role)) for role in roles}
    found = {r: {n.metric: n.value.value for n in one.numbers} for r, one in part.compare(measured, case).items()}
    assert found["original"]["uds"] == 0
    assert min(found["gold 1"]["uds"], found["gold 2"]["uds"]) > 0.6
