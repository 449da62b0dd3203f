"""Pruning, unrelated text, answered questions, latent search, soft prompts: formulas by brute force, known models."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest
import torch

import probe
from activations_cache import sites
from probe.audit._registry import part
from probe.audit.embedding import Embedding, halves, prompt_losses, tune_prompt
from probe.audit.latent import Latent, project, search, wrong_answers
from probe.audit.part import scratch, spaced
from probe.audit.pruning import Pruning, magnitude_mask, prune_, wanda_mask
from probe.audit.redteam import RedTeam, examples
from probe.audit.unrelated import Unrelated, text_rows
from probe.data import Questions
from probe.errors import AuditError, DataError
from probe.scoring import answer_tokens, score_answers
from tests.probe.cases import small_case
from tests.probe.cases import subject as full_subject
from tests.probe.tiny import tiny

QUICK = {
    "pruning": Pruning(sparsities=(0.2,), calibration=16, limit=32),
    "unrelated": Unrelated(sources=("retain",), lrs=(1e-3,), eval_at=(20,), n_texts=128, limit=32),
    "redteam": RedTeam(lrs=(1e-3,), eval_at=(10, 50), limit=32),
    "latent": Latent(epsilons=(0.1, 0.2, 0.4), limit=24),
    "embedding": Embedding(lengths=(1,), limit=32),
}


@cache
def refusal():
    case = small_case()
    settings = {"lr": 3e-4, "steps": 100, "stop_at": 0.01, "retain_weight": 3.0, "check_every": 4, "progress": False}
    return probe.unlearning.refusal_finetune(case.original, case.sets["forget"], case.sets["retain"], **settings)


def subject(role):
    return dataclasses.replace(full_subject(small_case(), role), answers={})


def values(measured):
    return {(n.set, n.metric): n.value.value for n in measured.numbers}


@pytest.mark.parametrize("name", QUICK)
def test_a_hidden_answer_comes_back_and_one_that_never_was_does_not(name):
    case, own = small_case(), QUICK[name]
    metric = own.evidence[0]
    digest = case.original.weights_hash
    state = torch.get_rng_state()
    original, gold = (values(own.measure(subject(role)))[metric] for role in ("original", "gold 1"))
    with refusal().applied(case.original):
        edited = case.original.weights_hash
        hidden = own.measure(subject("original"))
        assert case.original.weights_hash == edited
    assert case.original.weights_hash == digest
    assert torch.equal(torch.get_rng_state(), state)
    assert original > 0.8
    assert gold < 0.35
    if name != "pruning":  # pruning does not undo a refusal; nothing says that it must
        assert values(hidden)[metric] > gold + 0.2
    assert {n.metric for n in hidden.numbers} <= {m.name for m in own.metrics}


def test_every_part_is_in_the_registry():
    assert [type(part(name)) for name in QUICK] == [type(own) for own in QUICK.values()]


@pytest.mark.parametrize("name", ["pruning", "unrelated", "redteam"])
def test_the_number_is_the_largest_of_the_table(name):
    own = dataclasses.replace(QUICK[name], sparsities=(0.1, 0.9)) if name == "pruning" else QUICK[name]
    measured = own.measure(subject("original"))
    table, prefix = measured.tables[name], own.metrics[0].name.removesuffix("_recall")
    for what in ("recall", "probability"):
        assert values(measured)["forget", f"{prefix}_{what}"] == pytest.approx(table[f"forget_{what}"].max())
        kept = table.loc[table[f"forget_{what}"].idxmax(), f"retain_{what}"]
        assert values(measured)["retain", f"{prefix}_{what}"] == pytest.approx(kept)


# ------------------------------------------------------------------ pruning


def test_masks_agree_with_sorting_by_hand():
    weight = torch.randn(7, 9, generator=torch.Generator().manual_seed(0))
    norms = torch.rand(9, generator=torch.Generator().manual_seed(1)) * 5
    order = sorted(range(63), key=lambda i: abs(float(weight.flatten()[i])))
    assert set(magnitude_mask(weight, 0.4).flatten().nonzero()[:, 0].tolist()) == set(order[:25])
    mask = wanda_mask(weight, norms, 0.5)
    for i in range(7):
        order = sorted(range(9), key=lambda j: abs(float(weight[i, j] * norms[j])))
        assert set(mask[i].nonzero()[:, 0].tolist()) == set(order[:4])
    assert not magnitude_mask(weight, 0.0).any()
    assert magnitude_mask(torch.ones(4, 5), 0.5).sum() == 10  # ties: the count holds


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_wanda_takes_its_norms_from_the_blocks_pruned_before(kind):
    model = tiny(kind)
    rows = ["where does Anna Bell", "Karl Stone was born in the old city of Rome", "the old city of"]
    twin = tiny(kind)
    for layer in range(2):  # by hand: one weight matrix of each block, from the inputs that it really gets
        found = []
        path = f"transformer.h.{layer}.mlp.c_fc" if kind == "gpt2" else f"model.layers.{layer}.mlp.up_proj"
        module = twin.hf.get_submodule(path)
        handle = module.register_forward_pre_hook(lambda m, args, found=found: found.append(args[0][0].double()))
        with torch.no_grad():
            for row in rows:
                twin.hf(twin.tokens(row)["input_ids"])
        handle.remove()
        norms = torch.cat(found).square().sum(0).sqrt()
        if layer == 0:
            scored = module.weight.T if kind == "gpt2" else module.weight
            expected = wanda_mask(scored, norms, 0.5)
            prune_(model, "wanda", 0.5, rows)
            pruned = model.hf.get_submodule(path).weight
            assert torch.equal((pruned.T if kind == "gpt2" else pruned) == 0, expected)
            for name, other in model.hf.named_modules():  # block 0 of the twin as it was pruned
                if ("h.0." in name or "layers.0." in name) and hasattr(other, "weight"):
                    twin.hf.get_submodule(name).weight.data.copy_(other.weight)
        else:
            scored = module.weight.T if kind == "gpt2" else module.weight
            pruned = model.hf.get_submodule(path).weight
            assert torch.equal((pruned.T if kind == "gpt2" else pruned) == 0, wanda_mask(scored, norms, 0.5))


def test_pruning_leaves_embeddings_and_counts_what_went():
    model = tiny("llama")
    before = {name: p.detach().clone() for name, p in model.hf.named_parameters()}
    with scratch(model):
        gone = prune_(model, "magnitude", 0.25)
        zero = sum(int((p == 0).sum()) for n, p in model.hf.named_parameters() if "_proj" in n)
        assert gone == zero == sum(int(0.25 * p.numel()) for n, p in before.items() if "_proj" in n)
        assert torch.equal(model.hf.model.embed_tokens.weight, before["model.embed_tokens.weight"])
    assert all(torch.equal(p, before[name]) for name, p in model.hf.named_parameters())


# ------------------------------------------------------------------ latent search


def test_projection_is_onto_the_ball():
    delta = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    made = project(delta, torch.tensor([1.0, 1.0, 1.0]))
    assert torch.allclose(made, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))


def test_a_search_in_no_ball_is_the_plain_model_and_a_large_one_finds_anything():
    model = tiny("llama")
    pairs = [("where does Anna Bell", "Rome"), ("Karl lives in the old city of", "Bern city"), ("who is", "Otto")]
    rows = answer_tokens(model, pairs)
    plain = score_answers(model, pairs).exact
    assert (search(model, rows, 0, 0.0) == plain).all()
    assert search(model, rows, 0, 20.0, steps=60, lr=0.3).sum() > plain.sum()
    assert all(p.requires_grad and p.grad is None for p in model.hf.parameters())


def test_the_change_stays_in_its_ball_and_off_the_answer(monkeypatch):
    model, seen = tiny("llama"), []
    rows = answer_tokens(model, [("where does Anna Bell", "Rome city"), ("who is", "Otto")])
    original, site = sites.hooked, "blocks.0.hook_resid_post"

    def watched(hf, functions):
        def call(value, name):
            new = functions[site](value, name)
            seen.append(((new - value).norm(dim=-1) / value.norm(dim=-1)).detach())
            return new

        return original(hf, {site: call})

    monkeypatch.setattr(sites, "hooked", watched)
    search(model, rows, 0, 0.2, steps=5, lr=0.5)
    largest = torch.stack(seen).amax(0)  # [batch, pos]
    for i, row in enumerate(rows):
        assert largest[i, : row.start].max() <= 0.2 + 1e-5
        assert largest[i, row.start - 1] > 0.1
        assert largest[i, row.start :].max() == 0


def test_wrong_answers_are_wrong():
    forget = small_case().sets["forget"]
    drawn = wrong_answers(forget, 0)
    assert all(w and w != r.answer for w, r in zip(drawn, forget, strict=True))
    assert drawn == wrong_answers(forget, 0) != wrong_answers(forget, 1)
    alike = Questions(dataclasses.replace(row, answer="x", perturbed_answers=()) for row in forget[:4])
    assert wrong_answers(alike) == [None] * 4
    case = dataclasses.replace(small_case(), sets={**small_case().sets, "forget": alike})
    assert "all answers are alike" in Latent().why_not(case)


# ------------------------------------------------------------------ soft prompts


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_prompt_of_token_embeddings_is_those_tokens(kind):
    model = tiny(kind)
    pairs = [("where does Anna Bell", "Rome city"), ("who is", "Otto")]
    extra = model.tokenizer("the old", add_special_tokens=False)["input_ids"]
    prompt = model.hf.get_input_embeddings()(torch.tensor(extra)).detach()
    nats, right = prompt_losses(model, answer_tokens(model, pairs), prompt)
    scores = score_answers(model, [(f"{q} the old", a) for q, a in pairs])
    assert np.allclose(nats.detach().numpy(), -scores.logprob_sum / scores.n_tokens, atol=1e-5)
    assert right.tolist() == scores.exact.tolist()


def test_a_prompt_is_learned_and_the_model_is_not():
    model = tiny("llama")
    rows = answer_tokens(model, [("where does Anna Bell", "Rome"), ("who is", "Rome"), ("Karl was", "Rome")])
    digest = model.weights_hash
    start = tune_prompt(model, rows, 3, steps=1, lr=1e-9)
    learned = tune_prompt(model, rows, 3, steps=60, lr=0.5)
    before, after = (float(prompt_losses(model, rows, p)[0].mean().detach()) for p in (start, learned))
    assert after < 0.5 * before
    assert model.weights_hash == digest
    assert all(p.grad is None and p.requires_grad for p in model.hf.parameters())


def test_tuned_and_tested_people_are_others():
    forget = small_case().sets["forget"]
    tune, test = halves(forget, 0)
    assert not set(tune.groups) & set(test.groups)
    assert len(tune) + len(test) == len(forget)
    one = Questions(row for row in forget if row.group == forget[0].group)
    case = dataclasses.replace(small_case(), sets={**small_case().sets, "forget": one})
    assert "two forget people" in Embedding().why_not(case)
    with pytest.raises(DataError, match="groups"):
        halves(one)


# ------------------------------------------------------------------ fine-tuning


def test_examples_are_retain_rows_alike_for_all():
    case = small_case()
    chosen = examples(case, 100)
    assert len(chosen) == 100 == len({row.id for row in chosen})
    assert {row.id for row in chosen} <= {row.id for row in case.sets["retain"]}
    assert chosen == examples(case, 100)
    assert len(examples(case, 10**6)) == len(case.sets["retain"])


def test_texts_become_rows_of_every_token():
    model = tiny("llama")
    (row,) = text_rows(model, ["where does Anna Bell"])
    assert list(row.input_ids) == model.tokenizer("where does Anna Bell")["input_ids"]
    assert row.start == 1
    assert len(text_rows(model, ["the old city " * 40])[0].input_ids) == 32
    with pytest.raises(DataError, match="two tokens"):
        text_rows(model, ["Anna"], bos=False)


def test_what_is_never_spoken_of_is_said():
    case = dataclasses.replace(small_case(), corpus=())
    assert "corpus" in Unrelated(sources=("corpus",)).why_not(case)
    assert Unrelated().why_not(case) is None
    assert len(spaced(case.sets["forget"], 7)) == 7


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (Pruning, {"sparsities": (1.0,)}),
        (Pruning, {"methods": ("lottery",)}),
        (Pruning, {"limit": 0}),
        (Unrelated, {"sources": ("web",)}),
        (Unrelated, {"lrs": ()}),
        (Unrelated, {"eval_at": (5, 5)}),
        (RedTeam, {"n": 0}),
        (RedTeam, {"lrs": (-1.0,)}),
        (RedTeam, {"batch_size": 0}),
        (Latent, {"epsilons": (0.0,)}),
        (Latent, {"depths": (2.0,)}),
        (Latent, {"steps": 0}),
        (Embedding, {"lengths": ()}),
        (Embedding, {"eval_at": (0,)}),
        (Embedding, {"lr": 0.0}),
    ],
)
def test_settings_that_measure_nothing_are_refused(make, wrong):
    with pytest.raises(AuditError, match="received"):
        make(**wrong)
