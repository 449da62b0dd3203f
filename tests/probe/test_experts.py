"""probe.experts against routing recomputed in numpy, a plain loop over experts, and a mixture with a planted answer."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import activations_cache as ac
from probe import experts
from probe.data import Questions
from probe.errors import ExpertError, TargetError
from probe.experts import Routing
from probe.models import wrap
from probe.scoring import score_answers
from probe.targets import Experts, Heads, Scores
from tests.probe.tiny import tiny

FORGET = [
    "Anna Bell lives in Oslo",
    "Anna works in Rome and Anna was born in Oslo",
    "Anna the old Anna",
    "Anna and Anna",
]
RETAIN = ["Karl lives in Oslo", "Otto Hill works in Bern", "Mira was born in a old city", "the person called Otto Lane"]
QUESTIONS = Questions.from_rows(
    [
        {"id": str(i), "group": name, "question": f"{name} {rest}", "answer": answer}
        for i, (name, rest, answer) in enumerate(
            [
                ("Anna", "Bell lives in", "Oslo"),
                ("Anna", "was born in the city of", "new Rome"),
                ("Karl", "lives in", "Lima"),
                ("Otto", "Hill works in the old city", "Bern Kyiv Quito"),
            ]
        )
    ]
)
SITES = [f"blocks.*.mlp.hook_{kind}" for kind in ("router_logits", "expert_indices", "expert_weights")]


@pytest.fixture(scope="module")
def model():
    """A Mixtral of 2 layers, 6 experts, top 2; in layer 0 the token "Anna" goes to expert 3, planted in the router."""
    made = tiny("mixtral")
    layer = made.hf.model.layers[0]
    anna = made.tokenizer("Anna", add_special_tokens=False).input_ids[0]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()  # so that the router of layer 0 sees the token alone
        embed = made.hf.model.embed_tokens.weight
        embed[:, :2] = torch.tensor([0.0, 1.0])  # two dimensions that tell "Anna" from all other tokens
        embed[anna, :2] = torch.tensor([1.0, 0.0])
        layer.mlp.gate.weight[3] = torch.tensor([8.0, -8.0] + [0.0] * 14)
    return made


@pytest.fixture(scope="module")
def caches(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("routing")
    rows = [{"text": text, "group": f"g{i % 3}"} for i, text in enumerate(FORGET)]
    return (
        ac.capture(model, rows, SITES, folder / "forget", progress=False),
        ac.capture(model, RETAIN, SITES, folder / "retain", progress=False),
    )


def route(logits: np.ndarray, top_k: int) -> np.ndarray:
    """Mixtral's gate by hand: softmax over the experts, the top k renormalised, all others 0."""
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    kept = np.zeros_like(p)
    for row, probs in enumerate(p):
        best = np.argsort(-probs)[:top_k]
        kept[row, best] = probs[best] / probs[best].sum()
    return kept


def gates_by_hand(model, text: str) -> np.ndarray:
    """Gate weight of every token and expert, [pos, layer, expert], from plain hooks on the routers' inputs."""
    seen: list[torch.Tensor] = []
    gates = [layer.mlp.gate for layer in model.hf.model.layers]
    handles = [gate.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for gate in gates]
    with torch.no_grad():
        model.hf(**model.tokenizer(text, return_tensors="pt", return_token_type_ids=False))
    for handle in handles:
        handle.remove()
    pairs = zip(seen, gates, strict=True)
    return np.stack([route((h @ g.weight.T).detach().double().numpy(), 2) for h, g in pairs], axis=1)


def test_routing_equals_numpy(model, caches):
    got = Routing.of(caches[0])
    assert (got.layers, got.n_experts, got.top_k) == ((0, 1), 6, 2)
    assert got.groups == ("g0", "g1", "g2", "g0")
    for i, text in enumerate(FORGET):
        gates = gates_by_hand(model, text)
        np.testing.assert_allclose(got.mass[i], gates.sum(0), atol=1e-5)
        np.testing.assert_array_equal(got.count[i], (gates > 0).sum(0))
        assert got.tokens[i] == len(gates)


def test_blocks_of_rows_do_not_matter(caches, monkeypatch):
    whole = Routing.of(caches[0])
    monkeypatch.setattr("probe.experts.routing._BLOCK", 3)
    parts = Routing.of(caches[0])
    np.testing.assert_allclose(parts.mass, whole.mass)
    np.testing.assert_array_equal(parts.count, whole.count)


def test_load_is_the_share_of_tokens(model, caches):
    table = experts.load(caches[0])
    gates = np.concatenate([gates_by_hand(model, text) for text in FORGET])  # [token, layer, expert]
    np.testing.assert_allclose(table.share, (gates > 0).mean(0).ravel(), atol=1e-9)
    np.testing.assert_allclose(table.gate_mass, gates.mean(0).ravel(), atol=1e-6)
    np.testing.assert_allclose(table.groupby("layer").share.sum(), 2)
    np.testing.assert_allclose(table.groupby("layer").gate_mass.sum(), 1, atol=1e-6)
    assert (table.low <= table.share + 1e-9).all()
    assert set(table.tokens) == {len(gates)}


@pytest.mark.parametrize("statistic", ["gate_mass", "frequency"])
def test_scores_equal_numpy(model, caches, statistic):
    got = experts.attribute_cache(*caches, statistic=statistic, n_permutations=20, n_boot=50)
    means = []
    for texts in (FORGET, RETAIN):
        gates = np.concatenate([gates_by_hand(model, text) for text in texts])
        means.append((gates if statistic == "gate_mass" else gates > 0).mean(0).ravel())
    np.testing.assert_allclose(got.table.forget, means[0], atol=1e-5)
    np.testing.assert_allclose(got.table.retain, means[1], atol=1e-5)
    np.testing.assert_allclose(got.table.score, means[0] - means[1], atol=1e-5)
    assert list(zip(got.table.layer, got.table.expert, strict=True)) == [(i, j) for i in range(2) for j in range(6)]
    assert (got.table.n == 8).all()
    assert (got.table.low <= got.table.high).all()


def test_null_equals_a_loop_over_permutations(caches):
    got = experts.attribute_cache(*caches, n_permutations=30, seed=4, n_boot=0)
    first, second = (Routing.of(cache) for cache in caches)
    units = []  # (mass, tokens) of every group of either set
    for routing in (first, second):
        for group in sorted(set(routing.groups)):
            rows = [i for i, g in enumerate(routing.groups) if g == group]
            units.append((routing.mass[rows].sum(0).ravel(), routing.tokens[rows].sum()))
    label = np.arange(len(units)) < len(set(first.groups))
    rng = np.random.default_rng(4)
    for row in got.twins:
        drawn = rng.permutation(label)
        sides = []
        for side in (True, False):
            chosen = [unit for unit, own in zip(units, drawn, strict=True) if own == side]
            sides.append(sum(mass for mass, _ in chosen) / sum(tokens for _, tokens in chosen))
        np.testing.assert_allclose(row, sides[0] - sides[1], atol=1e-9)
    assert got.table.low.isna().all()


def test_permuted_labels_are_rarely_significant(model, tmp_path):
    """Two halves of one set: no expert's difference should stand out from the null."""
    rows = [{"text": text, "group": str(i)} for i, text in enumerate(FORGET + RETAIN)]
    halves = [ac.capture(model, rows[i::2], SITES, tmp_path / str(i), progress=False) for i in (0, 1)]
    got = experts.attribute_cache(*halves, n_permutations=200)
    assert got.table.p.min() > 0.05


def test_the_planted_expert_is_found(model, tmp_path):
    got = experts.attribute(model, FORGET, RETAIN, cache_dir=tmp_path, progress=False)
    assert got.kind == "expert"
    assert (got.best.layer, got.best.expert) == (0, 3)
    assert got.best.low > 0
    assert got.best.p < 0.05
    top = got.top(1)
    assert isinstance(top, Experts)
    assert (top.index, top.width, top.model_hash) == (((0, 3),), 6, model.weights_hash)
    back = experts.attribute_cache(ac.open(tmp_path / "forget"), ac.open(tmp_path / "retain"))
    np.testing.assert_array_equal(back.table.score, got.table.score)


def test_questions_are_read_with_their_answers_and_groups(model):
    got = experts.attribute(model, QUESTIONS[:2], QUESTIONS[2:], progress=False, n_boot=20, n_permutations=5)
    texts = [f"{row.question} {row.answer}" for row in QUESTIONS]
    gates = [np.concatenate([gates_by_hand(model, t) for t in part]).mean(0).ravel() for part in (texts[:2], texts[2:])]
    np.testing.assert_allclose(got.table.score, gates[0] - gates[1], atol=1e-5)
    assert got.settings["forget_groups"] == 1  # Anna twice
    assert any("one group" in note for note in got.warnings)


def test_chosen_layers(model, caches):
    assert set(experts.attribute(model, FORGET, RETAIN, layers=[1], progress=False).table.layer) == {1}
    assert set(experts.attribute_cache(*caches, layers=1).table.layer) == {1}


def test_result_has_a_picture_and_survives_disk(caches, tmp_path):
    got = experts.attribute_cache(*caches)
    assert got.plot().data
    back = Scores.load(got.save(tmp_path / "scores"))
    assert back.top(3).index == got.top(3).index
    np.testing.assert_array_equal(back.twins, got.twins)


class PlainMixture(nn.Module):
    """Mixtral's MoE layer as a loop over tokens and experts, in which some experts do not exist."""

    def __init__(self, block, gone):
        super().__init__()
        self.block, self.gone = block, gone

    def forward(self, hidden):
        out = torch.zeros_like(hidden)
        left = [e for e in range(self.block.gate.weight.shape[0]) if e not in self.gone]
        for b, p in np.ndindex(*hidden.shape[:2]):
            x = hidden[b, p]
            logits = torch.stack([self.block.gate.weight[e] @ x for e in left])
            best = logits.topk(2)
            for weight, slot in zip(best.values.softmax(0), best.indices, strict=True):
                e = left[int(slot)]
                gate, up = (self.block.experts.gate_up_proj[e] @ x).chunk(2)
                out[b, p] += weight * (self.block.experts.down_proj[e] @ (nn.functional.silu(gate) * up))
        return out


def plainly_without(model, target):
    """A copy of the model whose layers never had the experts."""
    hf = copy.deepcopy(model.hf)
    for layer, gone in target.by_layer().items():
        hf.model.layers[layer].mlp = PlainMixture(hf.model.layers[layer].mlp, gone)
    return wrap(hf, model.tokenizer)


TARGETS = [Experts(((0, 3),), 6), Experts(((0, 0), (0, 3), (1, 5)), 6), Experts(tuple((1, e) for e in range(4)), 6)]


@pytest.mark.parametrize("target", TARGETS, ids=["one", "several", "all but top k"])
def test_switching_off_equals_a_model_that_never_had_them(model, target):
    expected = score_answers(plainly_without(model, target), QUESTIONS)
    with experts.without(model, target):
        got = score_answers(model, QUESTIONS)
    np.testing.assert_allclose(got.logprob_sum, expected.logprob_sum, atol=1e-4)
    intact = score_answers(model, QUESTIONS)
    assert np.abs(got.logprob_sum - intact.logprob_sum).max() > 1e-3  # it did something, and it is over


def test_a_router_so_sure_that_its_softmax_underflows(model):
    """Then all other experts tie at 0 and the top 2 may name a removed one, with weight 0: no harm, and no error."""
    sure = wrap(copy.deepcopy(model.hf), model.tokenizer)
    with torch.no_grad():
        sure.hf.model.layers[0].mlp.gate.weight.mul_(100)
    for target in (Experts(((0, expert),), 6) for expert in range(6)):
        expected = score_answers(plainly_without(sure, target), QUESTIONS)
        with experts.without(sure, target):
            got = score_answers(sure, QUESTIONS)
        np.testing.assert_allclose(got.logprob_sum, expected.logprob_sum, atol=1e-4)


@pytest.mark.parametrize("kind", ["olmoe", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_what_is_switched_off_has_no_influence(kind):
    """On every kind of router: with experts off, their weights do not matter; with them on, they do."""
    made = tiny(kind)
    got = experts.attribute(made, FORGET, RETAIN, layers=[1], n_boot=0, n_permutations=0, progress=False)
    target = Experts(tuple((1, int(e)) for e in got.table.sort_values("forget").expert[-2:]), 6)
    with experts.without(made, target):
        before = score_answers(made, QUESTIONS).logprob_sum
    on = score_answers(made, QUESTIONS).logprob_sum
    stacked = [p for p in made.hf.get_submodule("model.layers.1.mlp").parameters() if p.ndim == 3]
    with torch.no_grad():
        for parameter in stacked:
            parameter[[e for _, e in target.index]] *= 3
    with experts.without(made, target):
        np.testing.assert_array_equal(score_answers(made, QUESTIONS).logprob_sum, before)
    assert stacked
    assert np.abs(score_answers(made, QUESTIONS).logprob_sum - on).max() > 1e-3


def test_removal_table(model):
    target = Experts(((0, 3), (1, 2)), 6)
    sets = {"forget": QUESTIONS[:2], "all": QUESTIONS}
    table = experts.removal(model, target, sets, n_random=3, n_boot=50, progress=False)
    assert list(table.arm) == ["intact", "removed", "random", "random", "random"] * 2
    assert len(set(table.experts)) == 5  # the twins differ from each other and from the target
    for row in table[(table.set == "all") & (table.arm != "intact")].itertuples():
        chosen = Experts(tuple(tuple(map(int, pair.split("."))) for pair in row.experts.split()), 6)
        assert sorted(chosen.by_layer()) == [0, 1]
        expected = score_answers(plainly_without(model, chosen), QUESTIONS)
        np.testing.assert_allclose(row.prob, expected.prob.mean(), rtol=1e-4)
        np.testing.assert_allclose(row.recall, expected.exact.mean())
        intact = score_answers(model, QUESTIONS)
        np.testing.assert_allclose(row.prob_change, (expected.prob - intact.prob).mean(), rtol=1e-3, atol=1e-7)
        assert row.prob_low <= row.prob <= row.prob_high
        assert row.n == 4
    intact = table[table.arm == "intact"]
    assert (intact.prob_change == 0).all()
    assert table.load_forget.isna().all()


def test_removal_of_scores_takes_the_best(model, caches):
    scores = experts.attribute_cache(*caches)
    table = experts.removal(model, scores, {"all": QUESTIONS}, k=1, n_random=100, progress=False)
    assert list(table[table.arm == "removed"].experts) == ["0.3"]
    assert sorted(table[table.arm == "random"].experts) == ["0.0", "0.1", "0.2", "0.4", "0.5"]  # there are no more
    load = scores.table.set_index(["layer", "expert"]).forget
    np.testing.assert_allclose(table[table.arm == "removed"].load_forget, load[0, 3])


@pytest.fixture(scope="module")
def planted():
    """A mixture trained on four domains, each of whose tokens go to a known expert of each layer."""
    import probe

    return probe.organisms.experts(size="small", kind="planted", progress=False)


def test_attribution_finds_the_planted_experts(planted):
    for domain, answer in planted.planted.items():
        others = Questions([q for name in planted.domains if name != domain for q in planted.splits[name]])
        got = experts.attribute(planted.model, planted.splits[domain][:50], others, n_boot=200, progress=False)
        assert got.top(2).index == tuple(sorted(answer)), domain
        assert (got.table.loc[got.ranking()[:2], "p"] < 0.05).all()
        assert got.table.loc[got.ranking()[2], "score"] < 0.1


def test_removing_a_domains_experts_removes_the_domain_alone(planted):
    """Located on half of the towns, checked on the others; random experts of no domain do nothing."""
    domain, *others = planted.domains
    towns = sorted(set(planted.splits[domain].groups))
    locate = set(towns[::2])
    scores = experts.attribute(
        planted.model,
        planted.splits[domain].select(lambda q: q.group in locate),
        planted.splits["retain"].select(lambda q: q.group in locate),
        n_boot=0,
        progress=False,
    )
    unused = [set(range(8)) - {pairs[layer][1] for pairs in planted.planted.values()} for layer in range(2)]
    sets = {name: planted.splits[name].select(lambda q: q.group not in locate) for name in planted.domains}
    table = experts.removal(planted.model, scores, sets, k=2, n_random=20, n_boot=50, progress=False)
    removed = table[table.arm == "removed"].set_index("set")
    assert removed.recall[domain] < 0.3
    assert (removed.recall[others] > 0.95).all()
    bystanders = {f"0.{a} 1.{b}" for a in unused[0] for b in unused[1]}
    random = table[(table.arm == "random") & table.experts.isin(bystanders)]
    assert len(random) >= 3
    assert (random.recall > 0.95).all()


def test_the_model_is_left_alone(model):
    before = model.weights_hash
    with pytest.raises(RuntimeError, match="inside"), experts.without(model, TARGETS[0]):
        raise RuntimeError("inside")
    assert model.weights_hash == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())


def test_a_router_that_ranks_by_more_than_its_logits_is_found_out():
    """DeepSeek-V3 adds a bias for the choice alone: a removed expert can be chosen with weight 0 and waste a place."""
    made = tiny("deepseek_v3")
    made.hf.model.layers[1].mlp.gate.e_score_correction_bias[2] = 5
    with pytest.raises(ExpertError, match="ranks experts by more"), experts.without(made, Experts(((1, 2),), 6)):
        score_answers(made, QUESTIONS)


def test_a_model_that_ignores_the_mask_is_found_out(model, monkeypatch):
    monkeypatch.setattr("probe.experts._removal._Off.logits", lambda self, value, site: setattr(self, "masked", value))
    with pytest.raises(ExpertError, match="although its logit"), experts.without(model, TARGETS[2]):
        score_answers(model, QUESTIONS)


def test_a_dense_model_is_an_error():
    dense = tiny("llama")
    with pytest.raises(ExpertError, match="LlamaForCausalLM has no experts"):
        experts.attribute(dense, FORGET, RETAIN, progress=False)
    with pytest.raises(ExpertError, match="LlamaForCausalLM has no experts"):
        experts.removal(dense, TARGETS[0], {"all": QUESTIONS}, progress=False)


@pytest.mark.parametrize(
    ("target", "match"),
    [
        (Experts(((2, 0),), 6), "layer 2 has no experts"),
        (Experts(((0, 6),), 8), "expert 6 of layer 0 is out of range"),
        (Experts(tuple((0, e) for e in range(6)), 6), "leaves 0"),
        (Experts(tuple((0, e) for e in range(5)), 6), "leaves 1, but each token needs 2"),
        (Heads(((0, 1),), 2), "got Heads"),
    ],
)
def test_experts_that_cannot_be_removed(model, target, match):
    with pytest.raises(ExpertError, match=match):
        experts.removal(model, target, {"all": QUESTIONS}, progress=False)


def test_bad_input_is_named(model, caches, tmp_path):
    with pytest.raises(ExpertError, match="at least one question set"):
        experts.removal(model, TARGETS[0], {}, progress=False)
    with pytest.raises(ExpertError, match="statistic must be one of"):
        experts.attribute(model, FORGET, RETAIN, statistic="entropy", progress=False)
    with pytest.raises(ExpertError, match="statistic must be one of"):
        experts.attribute_cache(*caches, statistic="entropy")
    with pytest.raises(ExpertError, match="method must be one of"):
        experts.attribute(model, FORGET, RETAIN, method="gradient", progress=False)
    with pytest.raises(ExpertError, match="routing of layers"):
        experts.attribute_cache(*caches, layers=[5])
    with pytest.raises(ac.errors.SiteError, match="layer 9"):
        experts.attribute(model, FORGET, RETAIN, layers=9, progress=False)
    with pytest.raises(ac.errors.DataError, match="no document"):
        experts.attribute(model, [], RETAIN, progress=False)
    with pytest.raises(TargetError, match="out of range"):
        Experts(((0, 6),), 6)


def test_caches_that_do_not_go_together(model, caches, tmp_path):
    residual = ac.capture(model, FORGET, "blocks.0.hook_resid_post", tmp_path / "residual", progress=False)
    with pytest.raises(ExpertError, match="holds no routing"):
        experts.load(residual)
    other = ac.capture(tiny("mixtral", seed=1), RETAIN, SITES, tmp_path / "other", progress=False)
    with pytest.raises(ExpertError, match="different models"):
        experts.attribute_cache(caches[0], other)
    names = [site.replace("*", "1") for site in SITES]
    part = ac.capture(model, RETAIN, names, tmp_path / "part", progress=False)
    with pytest.raises(ExpertError, match="different layers"):
        experts.attribute_cache(caches[0], part)
