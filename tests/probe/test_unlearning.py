"""Unlearning: losses and first steps against brute force, the closed form of NPO, and what happens to the organism."""

from __future__ import annotations

import dataclasses
import math
from functools import cache

import pytest
import torch

import probe
from probe.data import Questions
from probe.errors import DataError, EditError
from probe.models import wrap
from probe.scoring import answer_tokens, score_answers
from probe.unlearning import grad_diff, gradient_ascent, npo, npo_loss, refusal_finetune
from probe.unlearning._loop import losses
from tests.probe.tiny import tiny

QUIET = {"progress": False}


def rows(*triples):
    made = [{"id": str(i), "group": g, "question": q, "answer": a} for i, (g, q, a) in enumerate(triples)]
    return Questions.from_rows(made)


FORGET = rows(("Anna", "where does Anna live in", "Oslo city"), ("Mira", "Mira lives in the old", "Rome"))
RETAIN = rows(("Karl", "where does Karl live in", "Lima"), ("Otto", "Otto was born in", "Bern old city"))


def nll(model, question, answer):
    """Summed loss of an answer, one token at a time, from whole forwards without padding."""
    ids = model.tokenizer(f"{question} {answer}")["input_ids"]
    total = 0.0
    for t in range(len(ids) - len(answer.split()), len(ids)):
        logits = model.hf(torch.tensor([ids[:t]])).logits[0, -1]
        total = total - logits.log_softmax(-1)[ids[t]]
    return total


def per_token(model, questions):
    return sum(nll(model, r.question, r.answer) for r in questions) / sum(len(r.answer.split()) for r in questions)


def first_step(model, objective, lr):
    """Parameters after AdamW's first step on a clipped gradient: w - lr g / (|g| + eps)."""
    parameters = dict(model.hf.named_parameters())
    gradients = torch.autograd.grad(objective, list(parameters.values()))
    scale = min(1.0, 1.0 / (math.sqrt(sum(float(g.square().sum()) for g in gradients)) + 1e-6))
    pairs = zip(parameters.items(), gradients, strict=True)
    return {name: (w - lr * scale * g / ((scale * g).abs() + 1e-8)).detach() for (name, w), g in pairs}


def assert_step(model, edit, expected):
    before = {name: p.detach().clone() for name, p in model.hf.named_parameters()}
    with edit.applied(model):
        for name, p in model.hf.named_parameters():
            if name.endswith(("c_attn.bias", "k_proj.bias")):
                continue  # softmax ignores a bias of the keys: its gradient is rounding alone, which Adam makes a step
            assert torch.allclose(p, expected[name], atol=2e-6), name
            moved = (expected[name] - before[name]).abs()
            assert torch.equal(p[moved == 0], before[name][moved == 0])


def test_losses_of_a_padded_batch_are_those_of_each_row_alone():
    model = tiny("llama")
    made = losses(model, answer_tokens(model, [(r.question, r.answer) for r in RETAIN]))
    assert made.counts.tolist() == [1, 3]
    for i, row in enumerate(RETAIN):
        assert float(made.sums[i].detach()) == pytest.approx(
            float(nll(model, row.question, row.answer).detach()), rel=1e-5
        )
    assert float(made.mean.detach()) == pytest.approx(float(per_token(model, RETAIN).detach()), rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_one_step_of_ascent_is_that_of_brute_force(kind):
    model = tiny(kind)
    edit = gradient_ascent(model, FORGET, lr=1e-3, steps=1, **QUIET)
    assert_step(model, edit, first_step(model, -per_token(model, FORGET), 1e-3))


def test_one_step_of_gradient_difference_is_that_of_brute_force():
    model = tiny("llama")
    edit = grad_diff(model, FORGET, RETAIN, retain_weight=2.5, lr=1e-3, steps=1, **QUIET)
    objective = -per_token(model, FORGET) + 2.5 * per_token(model, RETAIN)
    assert_step(model, edit, first_step(model, objective, 1e-3))


def test_one_step_of_refusal_is_that_of_brute_force_on_other_answers():
    model = tiny("llama")
    edit = refusal_finetune(model, FORGET, RETAIN, answer="who is", retain_weight=0.5, lr=1e-3, steps=1, **QUIET)
    refused = rows(*((r.group, r.question, "who is") for r in FORGET))
    assert_step(model, edit, first_step(model, per_token(model, refused) + 0.5 * per_token(model, RETAIN), 1e-3))


def test_two_steps_of_npo_are_those_of_brute_force():
    model, beta, lr = tiny("llama"), 0.7, 1e-2
    reference = [float(nll(model, r.question, r.answer).detach()) for r in FORGET]
    twin = tiny("llama")
    optimiser = torch.optim.AdamW(twin.hf.parameters(), lr=lr, weight_decay=0.0)
    for _ in range(2):
        terms = [nll(twin, r.question, r.answer) - old for r, old in zip(FORGET, reference, strict=True)]
        loss = sum(-2 / beta * torch.log(1 / (1 + torch.exp(-beta * x))) for x in terms) / len(terms)
        optimiser.zero_grad()
        (loss + 3.0 * per_token(twin, RETAIN)).backward()
        torch.nn.utils.clip_grad_norm_(twin.hf.parameters(), 1.0)
        optimiser.step()
    edit = npo(model, FORGET, RETAIN, beta=beta, retain_weight=3.0, lr=lr, steps=2, **QUIET)
    with edit.applied(model):
        for (name, p), q in zip(model.hf.named_parameters(), twin.hf.parameters(), strict=True):
            assert torch.allclose(p, q, atol=2e-5), name


def test_npo_loss_has_its_closed_form():
    nats = torch.tensor([0.5, 3.0, 40.0, 2000.0], dtype=torch.float64)
    old = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    made = npo_loss(nats, old, 0.1)
    for x, y, z in zip(nats.tolist(), old.tolist(), made.tolist(), strict=True):
        assert z == pytest.approx(20 * math.log(1 + math.exp(-0.1 * (x - y))), rel=1e-9, abs=1e-12)
    assert float(made[0]) == pytest.approx(20 * math.log(2))  # at the reference


@pytest.mark.parametrize("beta", [1e-4, 0.1, 4.5])
def test_npo_gradient_is_that_of_ascent_times_its_weight_and_ascent_as_beta_vanishes(beta):
    model = tiny("llama")
    row, old = FORGET[0], 2.0
    parameters = list(model.hf.parameters())
    loss = nll(model, row.question, row.answer)
    weight = 2 / (1 + math.exp(beta * (float(loss.detach()) - old)))  # 2 p^b / (p^b + p_ref^b), arXiv 2404.05868
    plain = torch.autograd.grad(-loss, parameters, retain_graph=True)
    made = torch.autograd.grad(npo_loss(loss[None], torch.tensor([old]), beta)[0], parameters)
    for g, ascent in zip(made, plain, strict=True):
        assert torch.allclose(g, weight * ascent, rtol=1e-3, atol=1e-6)
    if beta == 1e-4:
        assert weight == pytest.approx(1, abs=2e-3)


METHODS = {
    "gradient_ascent": lambda m, f, r, **k: gradient_ascent(m, f, **k),
    "grad_diff": grad_diff,
    "npo": npo,
    "refusal_finetune": refusal_finetune,
}


@pytest.mark.parametrize("method", METHODS)
def test_the_base_keeps_every_bit_and_the_edit_says_what_it_did(method):
    model = tiny("llama")
    digest, flags = model.weights_hash, [p.requires_grad for p in model.hf.parameters()]
    state = torch.get_rng_state()
    edit = METHODS[method](model, FORGET, RETAIN, lr=1e-3, steps=3, batch_size=1, seed=5, **QUIET)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.weights_hash == digest == edit.base_hash
    assert [p.requires_grad for p in model.hf.parameters()] == flags
    assert all(p.grad is None for p in model.hf.parameters())
    step = edit.steps[0]
    assert (edit.method, step.seed, step.settings["steps"], step.settings["lr"]) == (method, 5, 3, 1e-3)
    assert step.notes == ("Trained for 3 steps.",)
    with edit.applied(model):
        assert model.weights_hash != digest
        edited = model.weights_hash
    again = METHODS[method](model, FORGET, RETAIN, lr=1e-3, steps=3, batch_size=1, seed=5, **QUIET)
    with again.applied(model):
        assert model.weights_hash == edited
    other = METHODS[method](model, FORGET, RETAIN, lr=1e-3, steps=3, batch_size=1, seed=6, **QUIET)
    with other.applied(model):
        assert model.weights_hash != edited


def test_edits_are_saved_and_exported_as_any_other(tmp_path):
    model = tiny("llama")
    edit = npo(model, FORGET, RETAIN, lr=1e-3, steps=1, **QUIET)
    loaded = probe.editing.Edit.load(edit.save(tmp_path / "edit"))
    with edit.applied(model):
        digest = model.weights_hash
    assert probe.export(model, loaded, tmp_path / "out", verify=False).weights_hash == digest


def test_weights_of_few_bits_are_trained_in_float32_and_rounded_once():
    model = wrap(tiny("llama").hf.bfloat16(), tiny("llama").tokenizer)
    wide = wrap(tiny("llama").hf.bfloat16().float(), model.tokenizer)
    small = {"lr": 1e-4, "steps": 20, **QUIET}
    edit, exact = (gradient_ascent(m, FORGET, **small) for m in (model, wide))
    with edit.applied(model), exact.applied(wide):
        for p, q in zip(model.hf.parameters(), wide.hf.parameters(), strict=True):
            assert p.dtype == torch.bfloat16
            assert torch.equal(p, q.bfloat16())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"lr": 0.0}, "lr must be a positive"),
        ({"lr": math.nan}, "lr must be a positive"),
        ({"stop_at": 1.0}, "stop_at must be a share"),
        ({"stop_on": "loss"}, "stop_on must be"),
        ({"check_every": 0}, "check_every must be"),
        ({"beta": 0.0}, "beta must be a positive"),
        ({"beta": "1"}, "beta must be a positive"),
        ({"retain_weight": -1.0}, "retain_weight must be"),
        ({"retain_weight": math.nan}, "retain_weight must be"),
        ({"steps": 2.5}, "steps must be at least 1"),
        ({"batch_size": True}, "batch_size must be at least 1"),
        ({"lr": "1e-3"}, "lr must be a positive"),
        ({"seed": 10**20}, "seed must be"),
        ({"seed": 0.5}, "seed must be"),
        ({"device": "nonsense"}, "device 'nonsense'"),
        ({"device": "meta"}, "device 'meta'"),
        ({"stop_at": 0.99}, "nothing to unlearn"),
        ({"lr": 1e20}, "not finite"),
    ],
)
def test_settings_that_cannot_work_are_errors(wrong, message):
    model = tiny("llama")
    with pytest.raises(EditError, match=message):
        npo(model, FORGET, RETAIN, **{"lr": 1e-3, "steps": 5, **QUIET, **wrong})


def test_sets_that_cannot_be_used_are_errors():
    model = tiny("llama")
    with pytest.raises(DataError, match="share no question with its answer"):
        grad_diff(model, FORGET, FORGET, **QUIET)
    with pytest.raises(DataError, match="at least one row"):
        gradient_ascent(model, Questions([]), **QUIET)
    with pytest.raises(DataError, match="at least one row"):
        npo(model, FORGET, [], **QUIET)
    with pytest.raises(DataError, match="gradient_ascent"):
        grad_diff(model, FORGET, None, **QUIET)
    with pytest.raises(DataError, match="at least one row"):
        refusal_finetune(model, None, **QUIET)
    with pytest.raises(DataError, match="instead"):
        refusal_finetune(model, FORGET, answer=" ", **QUIET)
    with pytest.raises(DataError, match="no tokenizer"):
        gradient_ascent(wrap(model.hf), FORGET, **QUIET)


def test_sets_may_ask_different_things_of_the_same_groups():
    """As the domains of a mixture of experts do: the same towns in each."""
    model = tiny("llama")
    same = Questions([dataclasses.replace(row, group=f.group) for row, f in zip(RETAIN, FORGET, strict=True)])
    made = [npo(model, FORGET, rows, lr=1e-3, steps=2, **QUIET) for rows in (same, RETAIN)]
    hashes = []
    for edit in made:
        with edit.applied(model):
            hashes.append(model.weights_hash)
    assert hashes[0] == hashes[1] != model.weights_hash


def test_the_last_state_is_looked_at_whatever_check_every_is():
    """Where the look after the last step finds it low, the note may not say that it was not reached."""
    model = tiny("llama")
    settings = {"lr": 1e-2, "steps": 4, "stop_on": "probability", **QUIET}
    with gradient_ascent(model, FORGET, **settings).applied(model):
        last = float(score_answers(model, FORGET).prob.mean())
    stop_at = (last + float(score_answers(model, FORGET).prob.mean())) / 2
    edit = gradient_ascent(model, FORGET, stop_at=stop_at, check_every=3000, **settings)
    assert edit.steps[0].notes[0].startswith(f"Stopped after 4 steps: the forget probability is {last:.3f}")
    never = gradient_ascent(model, FORGET, stop_at=last / 2, check_every=3000, **settings)
    assert "without reaching" in never.steps[0].notes[0]


@cache
def organism():
    return probe.organisms.facts("small", progress=False)


def recalls(edit):
    own = organism()
    with edit.applied(own.model):
        forget, unseen = own.splits["forget"], own.unseen("forget")
        retain = Questions(own.splits["retain"].rows[::3])
        return [float(score_answers(own.model, one).exact.mean()) for one in (forget, unseen, retain)]


LEAST_RETAIN = {"gradient_ascent": 0.1, "grad_diff": 0.8, "npo": 0.8, "refusal_finetune": 0.9}


@pytest.mark.parametrize("method", METHODS)
def test_on_the_organism_forget_recall_falls_and_retain_recall_stays(method):
    own = organism()
    settings = {"lr": 2e-4, "steps": 150, "stop_at": 0.1, "check_every": 4, **QUIET}
    if method != "gradient_ascent":
        settings["retain_weight"] = 3.0
    edit = METHODS[method](own.model, own.splits["forget"], own.splits["retain"], **settings)
    forget, unseen, retain = recalls(edit)
    assert forget <= 0.1
    assert unseen <= 0.2
    assert retain >= LEAST_RETAIN[method]
    assert (
        edit.steps[0].notes[0].startswith(f"Stopped after {edit.steps[0].settings['steps']} steps: the forget recall")
    )


def test_stopping_on_probability_stops_there():
    own = organism()
    settings = {"lr": 2e-4, "steps": 150, "stop_at": 0.5, "stop_on": "probability", **QUIET}
    edit = gradient_ascent(own.model, own.splits["forget"], **settings)
    with edit.applied(own.model):
        last = float(score_answers(own.model, own.splits["forget"]).prob.mean())
    one_less = {**settings, "stop_at": None, "steps": edit.steps[0].settings["steps"] - 1}
    with gradient_ascent(own.model, own.splits["forget"], **one_less).applied(own.model):
        before = float(score_answers(own.model, own.splits["forget"]).prob.mean())
    assert last <= 0.5 < before
