"""probe.patching against plain torch hooks, TransformerLens's own patching, and identities that must hold exactly."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from activations_cache.errors import SiteError
from probe.data import Pairs
from probe.errors import PatchError
from probe.models import wrap
from probe.patching import COMPONENTS, METRICS, logit_diff, patch
from probe.targets import Direction, Heads, Scores, Subspace
from tests.probe.tiny import tiny

COLUMNS = ("clean", "corrupted", "answer", "wrong", "group")
ROWS = [
    dict(zip(COLUMNS, row, strict=True))
    for row in (
        ("Anna Bell lives in", "Mira Bell lives in", "Oslo", "Lima", "a"),
        ("Karl Stone works in", "Otto Hill works in", "Rome", "Bern", "b"),
        ("old Karl Lane was born in", "old Anna Hill was born in", "Kyiv", "Rome", "a"),
    )
]
PAIRS = Pairs.from_rows(ROWS)
ONE = Pairs.from_rows(ROWS[:1])


@pytest.fixture(scope="module", params=["llama", "gpt2", "neox"])
def model(request):
    return tiny(request.param)


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


def blocks(hf):
    """The list of blocks of the three architectures."""
    return (
        hf.gpt_neox.layers
        if hasattr(hf, "gpt_neox")
        else hf.transformer.h
        if hasattr(hf, "transformer")
        else hf.model.layers
    )


def out_projection(block):
    """The attention's output projection, whose input is z."""
    attn = next(getattr(block, n) for n in ("self_attn", "attention", "attn") if hasattr(block, n))
    return next(getattr(attn, n) for n in ("o_proj", "dense", "c_proj") if hasattr(attn, n))


def place(hf, component, layer):
    """(module, whether its input rather than its output is the site), by hand."""
    block = blocks(hf)[layer]
    if component == "resid_pre":
        return block, True
    if component == "resid_post":
        return block, False
    if component == "attn_out":
        return out_projection(block), False
    if component == "mlp_out":
        return block.mlp, False
    return out_projection(block), True


def forward(hf, ids, module=None, is_input=False, change=None):
    """Logits at the last position, with `change(tensor)` applied at one plain torch hook."""

    def pre(_, args, kwargs):
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    def post(_, __, output):
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = None
    if module is not None:
        handle = (
            module.register_forward_pre_hook(pre, with_kwargs=True) if is_input else module.register_forward_hook(post)
        )
    try:
        with torch.no_grad():
            return hf(input_ids=torch.tensor([ids])).logits[0, -1]
    finally:
        if handle is not None:
            handle.remove()


def value_at(hf, ids, module, is_input):
    kept = []
    forward(hf, ids, module, is_input, lambda x: kept.append(x.clone()) or x)
    return kept[0]


def naive(model, row, component, layer, positions, head=None, noise=False):
    """Metric of one patched run, with one forward per cell."""
    clean, corrupted = (model.tokenizer(row[k]).input_ids for k in ("clean", "corrupted"))
    source, base = (corrupted, clean) if noise else (clean, corrupted)
    module, is_input = place(model.hf, component, layer)
    value = value_at(model.hf, source, module, is_input)

    def change(x):
        x = x.clone()
        part = slice(None) if head is None else slice(head * 8, head * 8 + 8)
        for p in positions:
            x[:, p, part] = value[:, p, part]
        return x

    return difference(model, row, forward(model.hf, base, module, is_input, change))


def difference(model, row, logits):
    answer, wrong = (model.tokenizer(row[k], add_special_tokens=False).input_ids[0] for k in ("answer", "wrong"))
    return float(logits[answer] - logits[wrong])


def metric_of(model, row, which):
    return difference(model, row, forward(model.hf, model.tokenizer(row[which]).input_ids))


@pytest.mark.parametrize("component", ["resid_pre", "resid_post", "attn_out", "mlp_out"])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_every_position_equals_a_loop_of_plain_hooks(model, component, direction):
    got = patch(model, PAIRS, component=component, direction=direction, n_random=0, progress=False, batch_size=5)
    assert set(got.table.position) == {-5, -4, -3, -2, -1}  # the shortest prompt has five tokens with its BOS
    ends = [(metric_of(model, row, "corrupted"), metric_of(model, row, "clean")) for row in ROWS]
    for cell in got.table.itertuples():
        raw = np.array(
            [naive(model, r, component, cell.layer, [cell.position], noise=direction == "noise") for r in ROWS]
        )
        corrupted, clean = np.array(ends).T
        share = (raw - corrupted) / (clean - corrupted)
        np.testing.assert_allclose(cell.raw, raw.mean(), atol=1e-5)
        np.testing.assert_allclose(cell.normalised, share.mean(), rtol=1e-4, atol=1e-4)
        expected = share if direction == "denoise" else 1 - share
        np.testing.assert_allclose(cell.score, expected.mean(), rtol=1e-4, atol=1e-4)
        assert cell.n == 3


def test_every_head_equals_a_loop_of_plain_hooks(model):
    got = patch(model, PAIRS, component="z", n_random=0, progress=False)
    assert got.kind == "head"
    for cell in got.table.itertuples():
        raw = [
            naive(model, r, "z", cell.layer, range(len(model.tokenizer(r["clean"]).input_ids)), cell.head) for r in ROWS
        ]
        np.testing.assert_allclose(cell.raw, np.mean(raw), atol=1e-5)
    assert isinstance(got.top(2), Heads)
    assert got.top(1).width == 2


def test_heads_at_chosen_positions(llama):
    got = patch(llama, ONE, component="z", positions=[-1], n_random=0, progress=False)
    raw = [naive(llama, ROWS[0], "z", c.layer, [-1], c.head) for c in got.table.itertuples()]
    np.testing.assert_allclose(got.table.raw, raw, atol=1e-5)


def test_resid_mid_equals_a_hook_that_changes_both_branches(llama):
    """Patching resid_mid everywhere in the last layer gives the clean run; a Llama's resid_mid feeds MLP and skip."""
    got = patch(llama, ONE, component="resid_mid", positions="all", n_random=0, progress=False)
    np.testing.assert_allclose(got.table.score, 1, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_equals_transformer_lens(kind):
    """Every component against TransformerLens's own patching functions, through the bridge."""
    import transformer_lens.patching as tl

    theirs = {
        "resid_pre": tl.get_act_patch_resid_pre,
        "attn_out": tl.get_act_patch_attn_out,
        "mlp_out": tl.get_act_patch_mlp_out,
        "z": tl.get_act_patch_attn_head_out_all_pos,
    }
    model = tiny(kind, seed=1)
    row = ROWS[1]
    bridge = wrap(model.hf, name=kind).bridge
    clean, corrupted = (torch.tensor([model.tokenizer(row[k]).input_ids]) for k in ("clean", "corrupted"))
    answer, wrong = (model.tokenizer(row[k], add_special_tokens=False).input_ids[0] for k in ("answer", "wrong"))
    with torch.no_grad():
        _, cache = bridge.run_with_cache(clean)
    for component, function in theirs.items():
        with torch.no_grad():
            grid = function(bridge, corrupted, cache, lambda logits: logits[0, -1, answer] - logits[0, -1, wrong])
        ours = patch(model, Pairs.from_rows([row]), component=component, n_random=0, progress=False).table
        columns = "head" if component == "z" else "position"
        table = ours.pivot(index="layer", columns=columns, values="raw")
        np.testing.assert_allclose(table.to_numpy(), grid.numpy(), atol=1e-5, err_msg=component)


def test_identities_of_the_first_layer(model):
    whole = patch(model, PAIRS, positions="all", n_random=0, progress=False)
    np.testing.assert_allclose(whole.table.score, 1, atol=1e-4)  # all of the residual stream: the clean run itself
    assert list(whole.table.position) == ["all", "all"]
    spans = patch(model, PAIRS, align="span", n_random=0, layers=0, progress=False).table.set_index("token").score
    np.testing.assert_allclose(spans["all changed"], 1, atol=1e-4)
    np.testing.assert_allclose(spans[["before", "after", "last"]], 0, atol=1e-5)  # same tokens there: same embeddings
    single = patch(model, ONE, align="span", n_random=0, layers=0, progress=False).table.set_index("token").score
    np.testing.assert_allclose(single["last changed"], 1, atol=1e-4)  # one token differs: it is the whole difference


def test_noising_everything_loses_everything(llama):
    got = patch(llama, PAIRS, direction="noise", positions="all", n_random=0, progress=False)
    np.testing.assert_allclose(got.table.score, 1, atol=1e-4)
    np.testing.assert_allclose(got.table.normalised, 0, atol=1e-4)


def test_batching_does_not_matter(llama):
    for component in ("resid_pre", "z"):
        one = patch(llama, PAIRS, component=component, batch_size=1, n_random=2, progress=False)
        many = patch(llama, PAIRS, component=component, batch_size=64, n_random=2, progress=False)
        np.testing.assert_allclose(one.table.score, many.table.score, atol=1e-4)
        np.testing.assert_allclose(one.twins, many.twins, atol=1e-3)  # the twins' draws are the same as well


def test_twins_add_a_vector_of_the_same_norm(llama):
    """At resid_pre of layer 0 a twin is a random embedding change of the size of the real one; its effect by hand."""
    got = patch(llama, ONE, layers=0, positions=[1], n_random=3, seed=5, progress=False)
    block = blocks(llama.hf)[0]
    clean, corrupted = (
        llama.hf.model.embed_tokens(torch.tensor(llama.tokenizer(ROWS[0][k]).input_ids)) for k in ("clean", "corrupted")
    )
    norm = (clean - corrupted).norm(dim=-1)[1]
    rng = torch.Generator().manual_seed(int(np.random.SeedSequence([5, 0, 0, 0]).generate_state(1)[0]))
    noise = torch.randn(clean.shape, generator=rng)[1]

    def change(x):
        x = x.clone()
        x[:, 1] += noise * norm / noise.norm()
        return x

    raw = difference(
        llama, ROWS[0], forward(llama.hf, llama.tokenizer(ROWS[0]["corrupted"]).input_ids, block, True, change)
    )
    low, high = metric_of(llama, ROWS[0], "corrupted"), metric_of(llama, ROWS[0], "clean")
    np.testing.assert_allclose(got.twins[0, 0], (raw - low) / (high - low), rtol=1e-3, atol=1e-4)
    assert got.twins.shape == (3, 1)
    np.testing.assert_allclose(got.table.twin_mean, got.twins.mean(), rtol=1e-5)


def test_intervals_are_over_groups(llama):
    got = patch(llama, PAIRS, n_boot=200, progress=False).table
    assert (got.low <= got.score + 1e-9).all()
    assert (got.high >= got.score - 1e-9).all()
    assert patch(llama, PAIRS, n_boot=0, progress=False).table.low.isna().all()
    single = patch(llama, ONE, progress=False)
    assert single.table.low.isna().all()
    assert any("fewer than two groups" in note for note in single.warnings)


def test_vectors_are_the_mean_difference(llama):
    got = patch(llama, PAIRS, component="resid_post", positions=[-1], progress=False)
    parts = []
    for row in ROWS:
        clean, corrupted = (value_at(llama.hf, llama.tokenizer(row[k]).input_ids, blocks(llama.hf)[1], False)[0, -1]
                            for k in ("clean", "corrupted"))  # fmt: skip
        parts.append(clean - corrupted)
    expected = torch.stack(parts).mean(0)
    row = got.table.index[got.table.layer == 1][0]
    torch.testing.assert_close(got.vectors[row], expected / expected.norm(), atol=1e-5, rtol=1e-4)
    top = got.top(1)
    assert isinstance(top, Direction)
    assert top.site == got.best.site
    assert isinstance(patch(llama, PAIRS, layers=1, progress=False).top(2), Subspace)


def test_where_nothing_differs_there_is_no_direction(llama):
    got = patch(llama, ONE, layers=0, progress=False)
    assert set(got.vectors) == {1}  # BOS and the tokens after the name are the same in both prompts


def test_single_strings_equal_a_data_set_of_one(llama):
    row = ROWS[0]
    got = patch(llama, row["clean"], row["corrupted"], answer=row["answer"], wrong=row["wrong"], progress=False)
    np.testing.assert_allclose(got.table.score, patch(llama, ONE, progress=False).table.score, atol=1e-6)


@pytest.mark.parametrize("form", ["one argument", "three arguments"])
def test_a_metric_of_your_own(llama, form):
    ids = {k: llama.tokenizer(ROWS[0][k], add_special_tokens=False).input_ids[0] for k in ("answer", "wrong")}

    def mine(logits):
        return logits[:, ids["answer"]] - logits[:, ids["wrong"]]

    got = patch(llama, ONE, metric=mine if form == "one argument" else logit_diff, n_random=0, progress=False)
    named = patch(llama, ONE, metric="logit_diff", n_random=0, progress=False)
    np.testing.assert_allclose(got.table.raw, named.table.raw, atol=1e-6)
    assert got.settings["metric"] == ("mine" if form == "one argument" else "logit_diff")


def test_log_prob_reads_the_answer_alone(llama):
    row = ROWS[0]
    got = patch(
        llama, row["clean"], row["corrupted"], metric="log_prob", answer=row["answer"], n_random=0, progress=False
    )
    token = llama.tokenizer(row["answer"], add_special_tokens=False).input_ids[0]
    expected = [
        float(forward(llama.hf, llama.tokenizer(row[k]).input_ids).log_softmax(-1)[token])
        for k in ("clean", "corrupted")
    ]
    np.testing.assert_allclose(got.controls["pairs"][["clean", "corrupted"]].to_numpy()[0], expected, atol=1e-5)


def test_answers_that_begin_alike_are_read_where_they_part(llama):
    rows = [{**ROWS[0], "answer": "old city Oslo", "wrong": "old city Lima"}]
    got = patch(llama, Pairs.from_rows(rows), n_random=0, progress=False)
    longer = {**ROWS[0], "clean": ROWS[0]["clean"] + " old city", "corrupted": ROWS[0]["corrupted"] + " old city"}
    expected = patch(llama, Pairs.from_rows([longer]), n_random=0, progress=False)
    np.testing.assert_allclose(got.table.raw, expected.table.raw, atol=1e-6)
    assert any("begin alike" in note for note in got.warnings)


def test_tokens_label_the_positions(llama):
    equal = patch(llama, Pairs.from_rows(ROWS[:2]), layers=0, n_random=0, progress=False)
    assert list(equal.table.position) == [0, 1, 2, 3, 4]
    assert list(equal.table.token) == ["<s>", "Anna (+1)", "Bell (+1)", "lives (+1)", "in"]
    assert equal.settings["align"] == "start"
    chosen = patch(llama, Pairs.from_rows(ROWS[:2]), layers=0, positions=[-1, -2], n_random=0, progress=False)
    assert list(chosen.table.position) == [-1, -2]
    front = patch(llama, PAIRS, layers=0, positions=[1], n_random=0, progress=False)  # of pairs of different length
    assert list(front.table.token) == ["Anna (+2)"]


def test_result_has_a_picture_and_survives_disk(llama, tmp_path):
    for component in ("resid_pre", "z"):
        got = patch(llama, PAIRS, component=component, n_boot=50, progress=False)
        assert got.plot().data
        back = Scores.load(got.save(tmp_path / component))
        np.testing.assert_array_equal(back.table.score, got.table.score)
        np.testing.assert_array_equal(back.twins, got.twins)
        assert back.top(1).model_hash == llama.weights_hash
    assert patch(llama, PAIRS, positions="all", progress=False).plot().data


def test_the_model_is_left_alone(llama):
    before = llama.weights_hash
    llama.hf.train()
    patch(llama, ONE, progress=False)
    assert llama.hf.training
    llama.hf.eval()
    assert llama.weights_hash == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.hf.modules())


def test_facts_are_read_at_the_name_early_and_at_the_end_late():
    """On a model trained to know people, the answer sits at the name first and at the last token in the end."""
    import probe

    organism = probe.organisms.facts(size="small", n_layers=4, progress=False)
    pairs = organism.pairs("forget", n=16, phrasing="*")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a pair or two that the model does not know
        pre, post = (
            patch(organism.model, pairs, component=f"resid_{side}", align="span", progress=False)
            for side in ("pre", "post")
        )
    early, late = (t.pivot(index="layer", columns="token", values="score") for t in (pre.table, post.table))
    end = int(post.table.layer.max())
    np.testing.assert_allclose(early.loc[0, ["all changed", "last"]], [1, 0], atol=1e-3)
    np.testing.assert_allclose(late.loc[end, ["last", "all changed", "after", "before"]], [1, 0, 0, 0], atol=1e-3)
    assert early.loc[end, "all changed"] < 0.7  # on the way the answer leaves the name
    assert early.loc[end, "last"] > 0.3  # and comes to where it is read
    cells = post.table.set_index(["layer", "token"])
    assert cells.loc[(end, "last"), "low"] > cells.loc[(end, "last"), "twin_high"]  # a random change does not do it
    assert pre.settings["n_used"] >= 8


def test_a_real_checkpoint(shared_data):
    """A model that nobody here trained: patching all of a layer gives the clean run, patching equal tokens nothing."""
    import probe

    model = probe.load(shared_data / "tinystories-656k", device="cpu")
    clean = "Once upon a time there was a girl named Lily. She had a brother. One day,"
    corrupted = "Once upon a time there was a boy named Lily. She had a brother. One day,"
    settings = {"answer": "she", "wrong": "he", "n_random": 1, "progress": False}
    whole = patch(model, clean, corrupted, positions="all", **settings)
    np.testing.assert_allclose(whole.table.score, 1, atol=1e-3)
    first = patch(model, clean, corrupted, align="span", layers=0, **settings).table.set_index("token").score
    np.testing.assert_allclose(first[["last changed", "all changed"]], 1, atol=1e-3)
    np.testing.assert_allclose(first[["before", "after", "last"]], 0, atol=1e-3)


def test_pairs_that_the_metric_cannot_tell_apart_are_left_out_and_counted(llama):
    token = llama.tokenizer("Anna", add_special_tokens=False).input_ids[0]

    def blunt(logits, answer, wrong):  # the same value for the first pair, whatever the prompt
        first = answer == llama.tokenizer("Oslo", add_special_tokens=False).input_ids[0]
        return torch.where(first, torch.ones_like(logits[:, token]), logits[:, token])

    with pytest.warns(UserWarning, match="1 of 3 pairs left out"):
        got = patch(llama, PAIRS, metric=blunt, n_random=0, progress=False)
    assert set(got.table.n) == {2}
    assert list(got.controls["pairs"].used) == [False, True, True]
    with pytest.raises(PatchError, match="the same on clean and corrupted"):
        patch(llama, PAIRS, metric=lambda logits: torch.ones(len(logits)), progress=False)


def test_unequal_lengths_name_the_pair_and_both_token_lists(llama):
    rows = [ROWS[0], {**ROWS[1], "id": "the long one", "corrupted": "old Otto Hill works in"}]
    with pytest.raises(PatchError) as caught:
        patch(llama, Pairs.from_rows(rows), progress=False)
    message = str(caught.value)
    assert "the long one" in message
    assert "clean has 5: ['<s>', 'Karl', 'Stone', 'works', 'in']" in message
    assert "corrupted has 6: ['<s>', 'old', 'Otto', 'Hill', 'works', 'in']" in message


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"wrong": "Oslo"}, "no token at which they differ"),
        ({"answer": "Oslo Rome", "wrong": "Oslo"}, "no token at which they differ"),
        ({"corrupted": "Anna Bell lives in"}, "same tokens"),
    ],
)
def test_useless_pairs_are_errors(llama, change, match):
    with pytest.raises(PatchError, match=match):
        patch(llama, Pairs.from_rows([{**ROWS[0], **change}]), progress=False)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"component": "resid"}, "component must be one of"),
        ({"direction": "both"}, "direction must be"),
        ({"metric": "rank"}, "metric must be one of"),
        ({"metric": 3}, "name or a function"),
        ({"metric": lambda a, b: a}, "takes 2 arguments"),
        ({"metric": lambda logits: logits}, r"shape \(1,\)"),
        ({"metric": lambda logits: logits[:, 0] * float("nan")}, "NaN"),
        ({"positions": [9]}, "positions must lie in 0 .. 4"),
        ({"positions": []}, "got none"),
        ({"positions": "last"}, "positions must be"),
        ({"positions": [0], "align": "span"}, "does not go with"),
        ({"align": "middle"}, "align must be"),
        ({"batch_size": 0}, "batch_size"),
        ({"n_random": -1}, "n_random"),
        ({"corrupted": "Mira"}, "not both"),
    ],
)
def test_bad_settings_are_errors(llama, settings, match):
    with pytest.raises(PatchError, match=match):
        patch(llama, ONE, progress=False, **settings)


def test_bad_strings_are_errors(llama):
    with pytest.raises(PatchError, match="at least one pair"):
        patch(llama, Pairs([]), progress=False)
    with pytest.raises(PatchError, match="list of strings; got list"):
        patch(llama, [1], ["Anna"], answer=["Oslo"], wrong=["Lima"], progress=False)
    with pytest.raises(PatchError, match="corrupted prompt"):
        patch(llama, "Anna", answer="Oslo", wrong="Lima", progress=False)
    with pytest.raises(PatchError, match="as many"):
        patch(llama, ["Anna", "Karl"], ["Mira"], answer=["Oslo", "Rome"], wrong=["Lima", "Bern"], progress=False)
    with pytest.raises(PatchError, match="answer or wrong is empty"):
        patch(llama, "Anna lives in", "Karl lives in", progress=False)
    with pytest.raises(PatchError, match="must not be empty"):
        patch(llama, " ", "Karl", answer="Oslo", wrong="Lima", progress=False)


def test_a_site_that_the_architecture_lacks():
    with pytest.raises(SiteError, match="resid_mid"):
        patch(tiny("neox"), ONE, component="resid_mid", progress=False)
    with pytest.raises(SiteError, match="layer 7"):
        patch(tiny("llama"), ONE, layers=[7], progress=False)


def test_names_are_documented():
    assert set(COMPONENTS) == {"resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z"}
    assert set(METRICS) == {"logit_diff", "log_prob"}
