"""Rounding against loops that look for the nearest level, NF4 against scipy's normal quantiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import norm

from probe.audit import quantisation as room
from probe.audit._case import Case
from probe.audit.quantisation import NF4_LEVELS, Quantisation, group_absmax, nf4, quantise_
from probe.data import Questions
from probe.errors import AuditError
from probe.models import Model, wrap
from probe.scoring import score_answers

from .cases import small_case, subject
from .tiny import tiny


def nearest(value: float, levels) -> float:
    return min(levels, key=lambda level: abs(level - value))


def random_weight(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny_case(model: Model) -> Case:
    made = {}
    for name, people in (("forget", ["Anna", "Karl"]), ("retain", ["Mira", "Otto"])):
        rows = [{"group": p, "question": f"who is {p} born in", "answer": c} for p in people for c in ("Oslo", "Rome")]
        made[name] = Questions.from_rows(rows)
    return Case(model, made, progress=False, n_boot=20)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [None, 4, 5, 100])
def test_absmax_rounds_to_the_nearest_level_of_its_group(bits, group):
    weight = random_weight(3, 10)
    weight[1] = 0.0
    found, top = group_absmax(weight, bits, group), 2 ** (bits - 1) - 1
    size = group or 10
    for row in range(3):
        for start in range(0, 10, size):
            block = weight[row, start : start + size].double()
            scale = float(block.abs().max()) / top
            levels = [scale * i for i in range(-top, top + 1)]
            wanted = [nearest(float(w), levels) for w in block]
            np.testing.assert_allclose(found[row, start : start + size], wanted, atol=1e-6)
    assert (found[1] == 0).all() and found.shape == weight.shape


def test_absmax_takes_experts_as_so_many_matrices_and_keeps_the_type():
    weight = random_weight(4, 6, 8)
    stacked = torch.stack([group_absmax(own, 4, 4) for own in weight])
    assert torch.equal(group_absmax(weight, 4, 4), stacked)
    half = weight.bfloat16()
    rounded = group_absmax(half, 8)
    assert rounded.dtype == torch.bfloat16 and not torch.equal(rounded, half)
    assert torch.equal(group_absmax(weight, 16), group_absmax(group_absmax(weight, 16), 16))


def test_nf4_levels_are_normal_quantiles_with_an_exact_zero():
    # the outermost quantile is the mean of 1 - 1/32 and 1 - 1/30: half a level of 16 and of 15 from the end
    outer = (1 - 1 / 32 + 1 - 1 / 30) / 2
    above = norm.ppf(np.linspace(outer, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(outer, 0.5, 8)[:-1])
    wanted = np.sort([*above, 0.0, *below]) / above.max()
    np.testing.assert_allclose(NF4_LEVELS, wanted, atol=1e-6)
    assert len(NF4_LEVELS) == 16 and NF4_LEVELS[7] == 0.0


@pytest.mark.parametrize("block", [7, 64])
def test_nf4_rounds_runs_of_memory_to_the_nearest_level(block):
    weight = random_weight(9, 11)
    flat = weight.flatten()
    wanted = []
    for start in range(0, len(flat), block):
        own = flat[start : start + block]
        top = float(own.abs().max())
        wanted += [top * nearest(float(w) / top, NF4_LEVELS) for w in own]
    np.testing.assert_allclose(nf4(weight, block).flatten(), wanted, atol=1e-6)
    assert (nf4(torch.zeros(3, 3)) == 0).all()


KINDS = {
    # kind: which of a layer's weights are linear or fused experts, and which of those are stored [in, out]
    "llama": (7, ()),
    "gpt2": (4, ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
    "neox": (4, ()),
    "mixtral": (6, ()),
    "gpt_oss": (6, ("experts.gate_up_proj", "experts.down_proj")),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["8bit", "4bit", "nf4"])
def test_every_linear_weight_is_rounded_by_output_and_nothing_else(kind, scheme):
    model = tiny(kind)
    before = {name: p.detach().clone() for name, p in model.hf.named_parameters()}
    per_layer, crossed = KINDS[kind]
    assert quantise_(model.hf, scheme) == 2 * per_layer
    changed = []
    for name, now in model.hf.named_parameters():
        old = before[name]
        if torch.equal(now, old):
            continue
        changed.append(name)
        if scheme == "nf4":
            wanted = nf4(old)
        else:
            group = None if scheme == "8bit" else 64
            turned = any(part in name for part in crossed)
            view = old.transpose(-1, -2) if turned else old
            wanted = group_absmax(view, int(scheme[0]), group)
            wanted = wanted.transpose(-1, -2) if turned else wanted
        torch.testing.assert_close(now.detach(), wanted, atol=0, rtol=0)
    assert len(changed) == 2 * per_layer and not any("norm" in name or "embed" in name for name in changed)


def test_embeddings_and_head_are_rounded_when_asked_and_a_tied_one_once():
    model = tiny("llama")
    assert quantise_(model.hf, "8bit", embeddings=True) == 2 * 7 + 2
    tied = tiny("gpt2")
    end = tied.hf.get_input_embeddings().weight
    before = end.detach().clone()
    assert quantise_(tied.hf, "8bit", embeddings=True) == 2 * 4 + 1
    assert torch.equal(end.detach(), group_absmax(before, 8)) and not torch.equal(end.detach(), before)


def test_eight_bits_change_little_four_bits_more():
    model, texts = tiny("llama"), ["Anna lives in Oslo", "the old city of Rome"]
    batch = model.tokens(texts)
    with torch.no_grad():
        plain = model.hf(**batch).logits
        moved = {}
        for scheme in ("8bit", "4bit", "nf4"):
            other = tiny("llama")
            quantise_(other.hf, scheme)
            moved[scheme] = float((other.hf(**batch).logits - plain).norm() / plain.norm())
    assert 0 < moved["8bit"] < 0.03 and moved["8bit"] < moved["nf4"] < 1 and moved["8bit"] < moved["4bit"] < 1


def test_the_part_scores_the_rounded_model_and_gives_the_bits_back():
    model = tiny("llama")
    case = tiny_case(model)
    one, before = subject(case), model.weights_hash
    found = Quantisation().measure(one)
    assert model.weights_hash == before
    numbers = {(number.set, number.metric): number.value.value for number in found.numbers}
    assert len(numbers) == len(found.numbers) == 12
    assert {metric for _, metric in numbers} == {metric.name for metric in Quantisation.metrics}
    for scheme in ("8bit", "4bit", "nf4"):
        other = tiny("llama")
        quantise_(other.hf, scheme)
        for name in ("forget", "retain"):
            scores = score_answers(other, case.sets[name])
            assert numbers[name, f"quantised_{scheme}_probability"] == pytest.approx(scores.prob.mean())
            assert numbers[name, f"quantised_{scheme}_recall"] == pytest.approx(scores.exact.mean())


def test_weights_come_back_after_an_exception(monkeypatch):
    model = tiny("llama")
    one, before = subject(tiny_case(model)), model.weights_hash

    def stop(*_args, **_settings):
        assert model.weights_hash != before
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "score_answers", stop)
    with pytest.raises(KeyboardInterrupt):
        Quantisation().measure(one)
    assert model.weights_hash == before


def test_rounding_brings_back_what_a_small_edit_hid():
    """The edit takes from each weight less than half a step of the grid: 8 bits undo it to the bit."""
    import copy

    case = small_case()
    model = wrap(copy.deepcopy(case.original.hf), case.original.tokenizer)
    quantise_(model.hf, "8bit")
    clean = score_answers(model, case.sets["forget"]).prob.mean()
    known = {name: p.detach().clone() for name, p in model.hf.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _name, weight, _ in room._weights(model.hf, False):
            step = weight.abs().amax(1, keepdim=True) / 127
            top = weight.abs() == weight.abs().amax(1, keepdim=True)  # what sets the scale stays
            noise = 0.45 * step * (2 * torch.rand(weight.shape, generator=generator) - 1)
            weight.add_(torch.where(top, 0.0, noise))
    hidden = model.weights_hash
    one = subject(case, "edited", model)
    found = {(n.set, n.metric): n.value.value for n in Quantisation(("8bit",), limit=None).measure(one).numbers}
    assert model.weights_hash == hidden
    assert found["forget", "quantised_8bit_probability"] == pytest.approx(clean, abs=1e-5)
    quantise_(model.hf, "8bit")
    for name, p in model.hf.named_parameters():
        torch.testing.assert_close(p.detach(), known[name], atol=1e-6, rtol=0)


def test_a_weight_that_is_not_finite_is_refused():
    model = tiny("llama")
    with torch.no_grad():
        model.hf.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(AuditError, match=r"up_proj\.weight holds weights that are not finite"):
        quantise_(model.hf, "8bit")


def test_what_cannot_be_rounded():
    with pytest.raises(AuditError, match="no '3bit'"):
        quantise_(tiny("llama").hf, "3bit")
    for bad in ({"bits": 1}, {"bits": 17}, {"bits": 4, "group": 0}):
        with pytest.raises(AuditError, match="received"):
            group_absmax(torch.ones(2, 2), **bad)
    with pytest.raises(AuditError, match="at least 1"):
        nf4(torch.ones(2, 2), 0)


@pytest.mark.parametrize("bad", [{"schemes": ()}, {"schemes": ("8bit", "8bit")}, {"schemes": ("5bit",)}, {"limit": 0}])
def test_settings_that_mean_nothing(bad):
    with pytest.raises(AuditError, match="received"):
        Quantisation(**bad)


def test_gold_stays_ignorant_when_rounded():
    case = small_case()
    found = {}
    for role in ("original", "gold 1"):
        numbers = Quantisation(limit=64).measure(subject(case, role)).numbers
        found[role] = {(n.set, n.metric): n.value.value for n in numbers}
    for _, metric in Quantisation.evidence:
        assert found["original"]["forget", metric] > 0.8 > 0.4 > found["gold 1"]["forget", metric]
    assert found["gold 1"]["retain", "quantised_8bit_recall"] > 0.9
