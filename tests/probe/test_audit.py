"""The audit against loops that read one question at a time, scipy's entropies, and cases worked by hand."""

from __future__ import annotations

import copy
import io
import math
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console
from scipy.stats import binomtest, entropy

from probe.audit import ReportCard
from probe.audit import audit as full_audit
from probe.audit._labels import number
from probe.audit._measure import _windows
from probe.audit._rows import COLUMNS, answer_rows, by_group, kl, to_table
from probe.audit._words import cell, sentences, singular
from probe.data import Questions
from probe.errors import AuditError, BaseMismatchError, DataError
from probe.models import Model, wrap

audit = partial(full_audit, parts=())  # the parts have tests of their own

PEOPLE = ["ann", "bob", "cid", "dan", "eve", "fay", "gus", "hal"]
TOWNS = ["rome", "oslo", "lima", "bern", "cairo", "paris", "delhi", "tokyo"]
WORDS = ["where", "does", "live", "in", "the", "town", "of", "home", "is", "?", ".", *PEOPLE, *TOWNS]
FORGET, RETAIN, HOLDOUT = PEOPLE[:2], PEOPLE[2:6], PEOPLE[6:]


def make_tokenizer(words=WORDS):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", "<s>", *words])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>")


def make_model(seed=0, words=WORDS) -> Model:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(words) + 2, max_position_embeddings=16, hidden_size=32, intermediate_size=64,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return wrap(LlamaForCausalLM(config), make_tokenizer(words), f"tiny {seed}")


def questions(people, form="where does {} live ?", name="") -> Questions:
    rows = [
        {"id": f"{person}-{i}", "group": person, "question": ask.format(person), "answer": answer}
        for person in people
        for i, (ask, answer) in enumerate(
            [
                (form, f"in {TOWNS[PEOPLE.index(person)]}"),
                ("home of " + form, f"the town of {TOWNS[PEOPLE.index(person)]} ."),
            ]
        )
    ]
    return Questions.from_rows(rows, name)


def train(model: Model, people, steps=60) -> Model:
    rows = [model.tokenizer(f"{row.question} {row.answer}")["input_ids"] for row in questions(people)]
    rows = [torch.tensor([row]) for row in rows]
    short = torch.cat([row for row in rows if row.shape[1] == rows[0].shape[1]])
    long = torch.cat([row for row in rows if row.shape[1] != rows[0].shape[1]])
    optimiser = torch.optim.AdamW(model.hf.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = sum(model.hf(input_ids=ids, labels=ids).loss for ids in (short, long))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.hf.eval()
    return model


class Overwrite:
    """An edit in miniature: replaces the weight of one matrix while it is applied."""

    method = "overwrite"

    def __init__(self, scale=0.0, value=None):
        self.scale, self.value = scale, value

    @contextmanager
    def applied(self, model):
        weight = model.hf.model.layers[0].mlp.down_proj.weight
        before = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(self.scale) if self.value is None else weight.fill_(self.value)
        try:
            yield model
        finally:
            with torch.no_grad():
                weight.copy_(before)


@pytest.fixture(scope="module")
def trained() -> SimpleNamespace:
    torch.set_num_threads(1)
    everyone, without = FORGET + RETAIN, RETAIN
    return SimpleNamespace(
        model=train(make_model(0), everyone), gold=[train(make_model(seed), without) for seed in (1, 2, 3)]
    )


@pytest.fixture(scope="module")
def sets() -> dict[str, Questions]:
    return {
        "forget": questions(FORGET),
        "retain": questions(RETAIN),
        "holdout": questions(HOLDOUT),
        "unseen": questions(FORGET, "the home of {} is"),
        "unseen_retain": questions(RETAIN, "the home of {} is"),
    }


CORPUS = ["where does ann live ? in rome .", "the town of lima is the home of cid .", "home " * 40]


@pytest.fixture(scope="module")
def card(trained, sets) -> ReportCard:
    return audit(trained.model, Overwrite(0.3), **sets, gold=trained.gold, corpus=CORPUS, n_boot=200, progress=False)


def answer_logprobs(model: Model, row) -> torch.Tensor:
    """Log-probabilities at the answer's tokens, [token, d_vocab], from one forward per token in float64."""
    question = model.tokenizer(row.question)["input_ids"]
    answer = model.tokenizer(row.answer)["input_ids"]
    found = []
    for t in range(len(answer)):
        with torch.no_grad():
            logits = model.hf(torch.tensor([question + answer[:t]])).logits[0, -1]
        found.append(logits.double().log_softmax(0))
    return torch.stack(found)


def answer_ids(model: Model, row) -> list[int]:
    return model.tokenizer(row.answer)["input_ids"]


def loop(model: Model, rows) -> tuple[float, float]:
    """(recall, probability), one question after the other."""
    exact, prob = [], []
    for row in rows:
        logprobs, ids = answer_logprobs(model, row), answer_ids(model, row)
        exact.append(logprobs.argmax(1).tolist() == ids)
        prob.append(math.exp(np.mean([float(logprobs[t, i]) for t, i in enumerate(ids)])))
    return float(np.mean(exact)), float(np.mean(prob))


def scipy_kl(p: Model, q: Model, rows) -> float:
    found = []
    for row in rows:
        one, other = answer_logprobs(p, row).exp().numpy(), answer_logprobs(q, row).exp().numpy()
        found += [entropy(a, b) for a, b in zip(one, other, strict=True)]
    return float(np.mean(found))


def scaled(model: Model, scale: float) -> Model:
    other = wrap(copy.deepcopy(model.hf), model.tokenizer)
    with torch.no_grad():
        other.hf.model.layers[0].mlp.down_proj.weight.mul_(scale)
    return other


def test_training_taught_what_the_other_tests_rely_on(trained, sets):
    assert loop(trained.model, sets["forget"])[0] == 1
    assert loop(trained.gold[0], sets["retain"])[0] == 1
    assert loop(trained.gold[0], sets["forget"])[0] < 0.5


def test_recall_and_probability_equal_a_loop_over_single_questions(card, trained, sets):
    edited = scaled(trained.model, 0.3)
    for name, rows in sets.items():
        for label, model in (("original", trained.model), ("edited", edited), ("gold 2", trained.gold[1])):
            recall, probability = loop(model, rows)
            assert card.value(name, "recall", label) == recall
            assert card.value(name, "probability", label) == pytest.approx(probability, abs=1e-6)


def test_kl_equals_scipys_entropy_in_each_direction(card, trained, sets):
    edited, golds = scaled(trained.model, 0.3), trained.gold
    for name in ("forget", "retain"):
        rows = sets[name]
        moved = scipy_kl(trained.model, edited, rows)
        assert card.value(name, "kl_original_model", "edited") == pytest.approx(moved, rel=1e-4, abs=1e-7)
        to_gold = np.mean([scipy_kl(gold, edited, rows) for gold in golds])
        assert card.value(name, "kl_gold_model", "edited") == pytest.approx(to_gold, rel=1e-4)
        from_edited = np.mean([scipy_kl(edited, gold, rows) for gold in golds])
        assert card.value(name, "kl_model_gold", "edited") == pytest.approx(from_edited, rel=1e-4)
        ceiling = np.mean([scipy_kl(gold, trained.model, rows) for gold in golds])
        assert card.value(name, "kl_gold_model", "original") == pytest.approx(ceiling, rel=1e-4)
        floors = [scipy_kl(a, b, rows) for a in golds for b in golds if a is not b]
        floor = card.table.query(f"set == '{name}' and metric == 'kl_gold_model' and model == 'gold'").iloc[0]
        assert [floor.value, floor.low, floor.high] == pytest.approx(
            [np.mean(floors), min(floors), max(floors)], rel=1e-4
        )
        assert floor.n == 6


def test_perplexity_equals_transformers_own_loss_over_windows(card, trained):
    total, count = 0.0, 0
    for text in CORPUS:
        ids = trained.model.tokenizer(text)["input_ids"]
        for start in range(0, len(ids), 16):  # the context's length
            window = torch.tensor([ids[start : start + 16]])
            if window.shape[1] > 1:
                with torch.no_grad():
                    loss = trained.model.hf(input_ids=window, labels=window).loss
                total, count = total + float(loss) * (window.shape[1] - 1), count + window.shape[1] - 1
    assert card.value("corpus", "perplexity", "original") == pytest.approx(math.exp(total / count), rel=1e-5)
    assert card.table.query("set == 'corpus' and model == 'original'").n.item() == count


def test_gold_is_shown_with_the_spread_of_its_seeds(card):
    seeds = [card.value("forget", "probability", f"gold {i}") for i in (1, 2, 3)]
    gold = card.table.query("set == 'forget' and metric == 'probability' and model == 'gold'").iloc[0]
    assert [gold.value, gold.low, gold.high] == [np.mean(seeds), min(seeds), max(seeds)]
    assert gold.n == 3
    assert gold.n_of == "golds"


def test_an_edit_that_changes_nothing_has_kl_exactly_zero_and_change_exactly_zero(trained, sets):
    card = audit(trained.model, Overwrite(1.0), sets["forget"], sets["retain"], n_boot=50, progress=False)
    assert card.value("forget", "kl_original_model") == 0
    assert card.value("retain", "kl_original_model") == 0
    changes = card.table[card.table.model == "change"]
    assert len(changes) == 4
    assert (changes.value == 0).all()
    assert (changes.query("metric == 'probability'")[["low", "high"]] == 0).all(axis=None)
    recall = changes.query("metric == 'recall'")
    assert recall[["low", "high"]].isna().all(axis=None)
    assert list(recall.interval) == ["none: all 2 people changed alike", "none: all 4 people changed alike"]
    assert "left recall of the 2 forgotten people at 100 %" in card.sentence


def test_the_model_has_its_bits_and_no_hooks_afterwards(trained, sets):
    before = {name: value.clone() for name, value in trained.model.hf.state_dict().items()}
    with pytest.raises(AuditError, match=r"edited, forget: .*not finite"):
        audit(trained.model, Overwrite(value=math.nan), sets["forget"], sets["retain"], progress=False)
    audit(trained.model, Overwrite(0.0), sets["forget"], sets["retain"], n_boot=10, progress=False)
    after = trained.model.hf.state_dict()
    assert all(torch.equal(before[name].view(torch.int32), after[name].view(torch.int32)) for name in before)
    assert not trained.model.hf._forward_hooks


def test_one_forward_per_batch_serves_every_metric(trained, sets):
    calls = []
    handle = trained.model.hf.register_forward_hook(lambda *args: calls.append(1))
    audit(trained.model, None, sets["forget"], sets["retain"], corpus=CORPUS[:1], n_boot=10, progress=False)
    handle.remove()
    assert len(calls) == 3


def test_batch_size_changes_nothing_but_rounding(card, trained, sets):
    small = audit(
        trained.model,
        Overwrite(0.3),
        **sets,
        gold=trained.gold,
        corpus=CORPUS,
        n_boot=200,
        batch_size=1,
        progress=False,
    )
    numbers = ["value", "low", "high"]
    assert np.allclose(small.table[numbers], card.table[numbers], rtol=1e-3, atol=1e-5, equal_nan=True)


def test_a_model_can_be_audited_against_another_model(card, trained, sets):
    other = audit(
        trained.model,
        scaled(trained.model, 0.3),
        **sets,
        gold=iter(trained.gold),
        corpus=CORPUS,
        n_boot=200,
        progress=False,
    )
    pd.testing.assert_frame_equal(other.table, card.table)
    assert other.settings["edit"]["model_hash"] != other.settings["model_hash"]


def test_an_edit_is_applied_for_the_audit_only_and_one_of_another_model_is_refused(trained, sets):
    from probe import editing
    from probe.targets import Direction

    edit = editing.project_out(trained.model, Direction("blocks.0.hook_resid_post", torch.randn(32)))
    before = trained.model.weights_hash
    card = audit(trained.model, edit, sets["forget"], sets["retain"], n_boot=10, progress=False)
    with edit.applied(trained.model):
        assert card.value("forget", "probability") == pytest.approx(loop(trained.model, sets["forget"])[1], abs=1e-6)
    assert trained.model.weights_hash == before
    assert card.settings["edit"]["base_hash"] == before
    assert edit.with_audit(card.summary()).audit["sentence"] == card.sentence
    with pytest.raises(BaseMismatchError):
        audit(trained.gold[0], edit, sets["forget"], sets["retain"], n_boot=10, progress=False)


def test_bos_is_put_in_front_when_asked(trained, sets):
    card = audit(trained.model, None, sets["forget"], sets["retain"], bos=True, n_boot=10, progress=False)
    bos = trained.model.tokenizer.bos_token_id
    found = []
    for row in sets["forget"]:
        question, answer = (trained.model.tokenizer(text)["input_ids"] for text in (row.question, row.answer))
        with torch.no_grad():
            logprobs = trained.model.hf(torch.tensor([[bos, *question, *answer]])).logits[0].log_softmax(-1)
        found.append(np.exp(np.mean([float(logprobs[len(question) + t, i]) for t, i in enumerate(answer)])))
    assert card.value("forget", "probability", "original") == pytest.approx(np.mean(found), abs=1e-6)


def with_special_tokens(model: Model, template: str) -> Model:
    from tokenizers import processors

    tokenizer = make_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("<unk>", 0)]
    )
    return wrap(model.hf, tokenizer)


@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> $A <unk>"])
@pytest.mark.parametrize("bos", [None, True, False])
def test_perplexity_reads_a_bos_token_exactly_when_questions_do(trained, sets, template, bos):
    """Against transformers' own loss; a token that the tokenizer appends is neither read nor predicted."""
    model = with_special_tokens(trained.model, template)
    front = [1] if bos or (bos is None and template.startswith("<s>")) else []
    total, count = 0.0, 0
    for text in CORPUS:
        ids = front + make_tokenizer()(text)["input_ids"]
        for start in range(0, len(ids), 16):
            window = torch.tensor([ids[start : start + 16]])
            with torch.no_grad():
                loss = trained.model.hf(input_ids=window, labels=window).loss
            total, count = total + float(loss) * (window.shape[1] - 1), count + window.shape[1] - 1
    card = audit(model, None, sets["forget"], sets["retain"], corpus=CORPUS, bos=bos, n_boot=10, progress=False)
    assert card.value("corpus", "perplexity", "original") == pytest.approx(math.exp(total / count), rel=1e-5)
    assert card.table.query("set == 'corpus' and model == 'original'").n.item() == count


def test_windows_after_the_first_begin_with_the_texts_next_token(trained):
    words = trained.model.tokenizer("home is where ann does live in rome . " * 5)["input_ids"]
    (windows,) = _windows(trained.model, ["home is where ann does live in rome . " * 5], bos=True)
    assert windows[0] == [1, *words[:15]]
    assert windows[1] == words[15:31]
    assert _windows(trained.model, ["home is", ""], bos=None) == [[words[:2]]]
    bare = make_tokenizer()
    bare.bos_token = None
    with pytest.raises(DataError, match="BOS"):
        _windows(wrap(trained.model.hf, bare), ["home is"], bos=True)


def test_without_an_edit_the_card_has_the_original_and_gold_alone(trained, sets):
    card = audit(trained.model, None, sets["forget"], sets["retain"], gold=trained.gold[:1], n_boot=10, progress=False)
    assert set(card.table.model) == {"original", "gold 1", "gold"}
    assert card.sentence.startswith("No edit was made: recall of the 2 forgotten people is 100 %")
    assert "gold's spread between seeds (one gold only)" in card.sentence
    gold = card.table.query("model == 'gold' and metric == 'recall' and set == 'forget'").iloc[0]
    assert math.isnan(gold.low)
    assert gold.interval == "none: one gold"


def test_kl_uses_a_subset_of_questions_that_fits_the_memory_given(trained, sets):
    d_vocab = len(WORDS) + 2
    card = audit(
        trained.model,
        Overwrite(0.3),
        sets["forget"],
        sets["retain"],
        kl_bytes=4 * d_vocab * 2 * 2 * 9,
        n_boot=10,
        progress=False,
    )
    rows = card.table[card.table.metric == "kl_original_model"]
    assert (rows.n <= 9).all()
    assert (rows.n >= 2).all()
    assert (card.table[card.table.metric == "recall"].n >= 4).all()


def test_bootstrap_of_a_ratio_equals_a_loop_over_replicates():
    values, counts, groups = [1.0, 4.0, 2.0, 8.0], [1, 2, 3, 4], ["a", "a", "b", "c"]
    ratio = by_group(values, groups, counts)
    assert ratio.value == 1.5
    rng = np.random.default_rng(7)
    draws = []
    for weights in rng.multinomial(3, np.full(3, 1 / 3), size=500):
        top = weights[0] * 5 + weights[1] * 2 + weights[2] * 8
        draws.append(top / (weights[0] * 3 + weights[1] * 3 + weights[2] * 4))
    assert ratio.interval(500, seed=7) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))


@pytest.mark.parametrize("n", [2, 8, 40])
def test_a_share_at_its_bound_has_the_exact_interval(n):
    nothing = by_group([0.0] * n, [str(i) for i in range(n)], share=True)
    exact = binomtest(0, n).proportion_ci(0.95, method="exact")
    assert nothing.interval(10, 0) == pytest.approx((exact.low, exact.high))
    everything = by_group([1.0] * n, [str(i) for i in range(n)], share=True)
    assert everything.interval(10, 0) == pytest.approx((1 - exact.high, 1.0))


@pytest.mark.parametrize(("hits", "n"), [(4, 5), (1, 2), (3, 8)])
def test_a_share_that_is_the_same_in_every_group_has_a_width(hits, n):
    groups = [str(group) for group in range(n) for _ in range(n)]
    ratio = by_group(([1.0] * hits + [0.0] * (n - hits)) * n, groups, share=True)
    exact = binomtest(hits, n).proportion_ci(0.95, method="exact")
    assert ratio.interval(10, 0) == pytest.approx((exact.low, exact.high))
    between = by_group([1.0, 0.0, 0.0] * 5, [str(i // 3) for i in range(15)], share=True)  # 5/3 of 5 groups
    low, high = between.interval(10, 0)
    ends = [binomtest(k, 5).proportion_ci(0.95, method="exact") for k in (1, 2)]
    assert ends[0].low < low < ends[1].low < 1 / 3 < ends[0].high < high < ends[1].high


def measured_by_hand(**exact) -> dict:
    """Measurements of 5 people with 5 questions each, from a share of right answers per person and model."""
    groups = tuple(f"p{i}" for i in range(5) for _ in range(5))

    def scores(shares):
        right = np.array([float(k < round(5 * share)) for share in shares for k in range(5)])
        return SimpleNamespace(exact=right, prob=0.5 + right / 10, groups=groups)

    return {model: SimpleNamespace(answers={"retain": scores(shares)}) for model, shares in exact.items()}


def test_a_change_that_is_alike_in_every_group_has_no_interval_rather_than_one_without_width():
    measured = measured_by_hand(original=[1.0] * 5, edited=[0.8] * 5)
    table = to_table(answer_rows(measured, 100, 0, "people")).query("metric == 'recall'").set_index("model")
    change = table.loc["change"]
    assert change.value == pytest.approx(-0.2)
    assert math.isnan(change.low) and math.isnan(change.high)
    assert change.interval == "none: all 5 people changed alike"
    assert cell({**change, "model": "change"}) == "-20 pts [none: all alike]"
    assert table.loc["edited", "interval"] == "95 %, Clopper-Pearson over people, all alike"
    exact = binomtest(4, 5).proportion_ci(0.95, method="exact")
    assert [table.loc["edited", "low"], table.loc["edited", "high"]] == pytest.approx([exact.low, exact.high])


def test_a_change_that_differs_between_groups_keeps_its_bootstrap():
    measured = measured_by_hand(original=[1.0] * 5, edited=[0.8, 0.6, 0.8, 0.2, 1.0])
    rows = to_table(answer_rows(measured, 100, 0, "people")).query("metric == 'recall'").set_index("model")
    assert rows.loc["change", "low"] < rows.loc["change", "value"] < rows.loc["change", "high"] < 0
    assert rows.loc["change", "interval"] == "95 %, paired bootstrap over people"
    assert cell({**rows.loc["change"], "model": "change"}).startswith("-32 pts [-")


def test_one_group_has_no_interval():
    assert all(math.isnan(end) for end in by_group([1.0, 0.0], ["a", "a"], share=True).interval(10, 0))


def test_kl_in_blocks_equals_scipy():
    rng = np.random.default_rng(0)
    p, q = (torch.tensor(rng.normal(size=(50, 11))).log_softmax(-1).float() for _ in range(2))
    expected = [entropy(a.exp().double(), b.exp().double()) for a, b in zip(p, q, strict=True)]
    assert np.allclose(kl(p, q), expected, atol=1e-6)
    assert (kl(p, p) == 0).all()


def hand_table() -> pd.DataFrame:
    recall = {"unit": "share of answers exact", "n_of": "questions", "interval": "95 %, bootstrap over people"}
    nats = {"unit": "nats", "n_of": "answer tokens", "interval": "95 %, bootstrap over people"}
    rows = [
        ("forget", "recall", "original", 1.0, 0.63, 1.0, 160, 8, recall),
        ("forget", "recall", "edited", 0.03125, 0.0125, 0.0625, 160, 8, recall),
        ("forget", "recall", "change", -0.96875, -0.99, -0.94, 160, 8, recall),
        ("forget", "recall", "gold 1", 0.02, 0.01, 0.03, 160, 8, recall),
        ("forget", "recall", "gold 2", 0.05, 0.01, 0.09, 160, 8, recall),
        ("forget", "recall", "gold", 0.035, 0.02, 0.05, 2, 8, recall | {"n_of": "golds"}),
        ("retain", "recall", "original", 0.99, 0.98, 1.0, 1040, 52, recall),
        ("retain", "recall", "edited", 0.985, 0.97, 0.995, 1040, 52, recall),
        ("retain", "recall", "change", -0.005, -0.012, 0.002, 1040, 52, recall),
        ("corpus", "perplexity", "original", 5.1, 4.9, 5.3, 4000, 40, recall | {"n_of": "tokens", "unit": ""}),
        ("corpus", "perplexity", "edited", 5.31, 5.1, 5.5, 4000, 40, recall | {"n_of": "tokens", "unit": ""}),
        ("corpus", "perplexity", "change", 0.21, 0.1, 0.3, 4000, 40, recall | {"n_of": "tokens", "unit": ""}),
        ("forget", "kl_gold_model", "original", 6.2, 5.9, 6.4, 480, 8, nats),
        ("forget", "kl_gold_model", "edited", 0.41, 0.3, 0.52, 480, 8, nats),
        ("forget", "kl_gold_model", "gold", 0.12, 0.1, 0.14, 2, 8, nats),
    ]
    names = ("set", "metric", "model", "value", "low", "high", "n", "n_groups")
    return pd.DataFrame([dict(zip(names, row[:8], strict=True)) | row[8] for row in rows])[list(COLUMNS)]


def test_the_sentence_of_a_case_worked_by_hand():
    assert " ".join(sentences(hand_table(), {"people": "people"}, ["relearning"]).values()) == (
        "The edit lowered recall of the 8 forgotten people from 100 % to 3.12 % [1.25 to 6.25] (n = 160 questions); "
        "2 models that never learned the forget set (gold) have 2 to 5 %. "
        "The change of recall of the 52 retained people cannot be told from none: 99 % before, 98.5 % [97 to 99.5] "
        "after, change -0.5 [-1.2 to +0.2] points (n = 1040 questions). "
        "The edit raised perplexity on the corpus from 5.1 to 5.31 [5.1 to 5.5] (n = 4000 tokens). "
        "On the forget prompts KL(gold‖edited) is 0.41 [0.3 to 0.52] nats per answer token, against 6.2 [5.9 to 6.4] "
        "before the edit and 0.12 [0.1 to 0.14] between the two golds. "
        "Not measured: relearning."
    )


def test_the_sentence_says_when_there_is_no_interval():
    table = hand_table().assign(low=np.nan, high=np.nan)
    text = " ".join(sentences(table, {}, []).values())
    assert "moved recall of the 8 forgotten people from 100 % to 3.12 % (n = 160 questions), with one group" in text
    assert "[" not in text


def retained(recall=(0.5, 0.0, 1.0), change=(-0.5, -1.0, 0.0), how="95 %, paired bootstrap over groups", n_groups=4):
    """The hand-made table with another recall of the retained, and with a probability that fell."""
    table = hand_table()
    table.loc[table.set == "retain", "n_groups"] = n_groups
    for model, numbers in (("original", (1.0, 0.4, 1.0)), ("edited", recall), ("change", change)):
        row = (table.set == "retain") & (table.model == model)
        table.loc[row, ["value", "low", "high"]] = numbers
    table.loc[(table.set == "retain") & (table.model == "change"), "interval"] = how
    finer = table[table.set == "retain"].assign(metric="probability", interval="95 %, bootstrap over groups")
    finer[["value", "low", "high"]] = [(0.981, 0.97, 0.99), (0.928, 0.9, 0.95), (-0.053, -0.08, -0.03)]
    return pd.concat([table, finer], ignore_index=True)


def test_an_undecided_change_is_not_called_none_and_the_finer_metric_is_heard():
    text = sentences(retained(), {"people": "groups"}, [])["retain"]
    assert text == (
        "The change of recall of the 4 retained groups cannot be told from none: 100 % before, 50 % [0 to 100] after, "
        "change -50 [-100 to 0] points (n = 1040 questions). "
        "The probability of these answers fell from 98.1 % to 92.8 % [90 to 95], change -5.3 [-8 to -3] points."
    )


def test_recall_that_stayed_does_not_hide_a_probability_that_fell():
    how = "none: all 4 groups changed alike"
    table = retained((1.0, 0.4, 1.0), (0.0, math.nan, math.nan), how)
    text = sentences(table, {"people": "groups"}, [])["retain"]
    assert text.startswith(
        "The edit left recall of the 4 retained groups at 100 % [40 to 100] (n = 1040 questions). The prob"
    )
    assert "fell from 98.1 % to 92.8 % [90 to 95]" in text


def test_recall_of_no_net_change_with_an_interval_is_undecided_too():
    text = sentences(retained((1.0, 0.4, 1.0), (0.0, -0.25, 0.25)), {"people": "groups"}, [])["retain"]
    assert "left" not in text
    assert "cannot be told from none: 100 % before, 100 % [40 to 100] after, change 0 [-25 to +25] points" in text


def test_where_probability_is_undecided_the_divergence_is_heard():
    table = retained()
    table.loc[(table.metric == "probability") & (table.model == "change"), "high"] = 0.01
    more = table[table.metric == "kl_gold_model"].iloc[[1]].assign(set="retain", metric="kl_original_model")
    text = sentences(pd.concat([table, more]), {}, [])["retain"]
    assert "probability" not in text
    assert text.endswith("KL(original‖edited) is 0.41 [0.3 to 0.52] nats per answer token; without a change, 0.")


def test_a_decided_change_of_recall_stands_alone_also_where_it_is_alike_in_all():
    decided = sentences(retained(change=(-0.5, -0.7, -0.2)), {}, [])["retain"]
    assert (
        decided
        == "The edit lowered recall of the 4 retained people from 100 % to 50 % [0 to 100] (n = 1040 questions)."
    )
    table = retained(change=(-0.5, math.nan, math.nan), how="none: all 4 people changed alike")
    assert sentences(table, {}, [])["retain"] == (
        "The edit lowered recall of the 4 retained people from 100 % to 50 % [0 to 100] (n = 1040 questions), alike "
        "in all 4 people, so that the change has no interval."
    )


def test_chance_is_the_originals_and_an_edited_model_that_differs_is_named():
    holdout = hand_table().iloc[:2].assign(set="holdout", value=[0.3, 0.325], low=[0.2, 0.21], high=[0.4, 0.41])
    table = pd.concat([hand_table(), holdout])
    assert sentences(table, {}, [])["holdout"] == (
        "Chance, as the original's recall of the 8 holdout people never trained on, is 30 % [20 to 40] "
        "(n = 160 questions); the edited model has 32.5 % [21 to 41]."
    )
    same = sentences(pd.concat([hand_table(), holdout.assign(value=0.3)]), {}, [])["holdout"]
    assert same.endswith("is 30 % [20 to 40] (n = 160 questions).")


@pytest.mark.parametrize(
    ("plural", "one"),
    [("people", "person"), ("groups", "group"), ("stories", "story"), ("young people", "young person"),
     ("answer tokens", "answer token"), ("classes", "class")],
)  # fmt: skip
def test_one_of_many(plural, one):
    assert singular(plural) == one


def test_one_group_is_spoken_of_in_the_singular():
    table = hand_table().assign(n_groups=1, n=1)
    text = " ".join(sentences(table, {"people": "groups"}, []).values())
    assert "the 1 forgotten group " in text
    assert "the 1 retained group " in text
    assert "(n = 1 question)" in text
    assert "1 forgotten groups" not in text and "1 questions" not in text


def test_a_change_of_a_share_is_in_points_and_a_change_of_perplexity_has_no_unit():
    rows = hand_table().query("model == 'change'").to_dict("records")
    assert [cell(row) for row in rows] == ["-96.9 pts [-99, -94]", "-0.5 pts [-1.2, +0.2]", "+0.21 [+0.1, +0.3]"]


@pytest.mark.parametrize(
    ("value", "metric", "text"),
    [
        (1.0, "recall", "100 %"),
        (0.0, "recall", "0 %"),
        (0.0004, "probability", "0.04 %"),
        (1e-9, "probability", "1e-07 %"),
        (5.0, "perplexity", "5"),
        (1234.5, "perplexity", "1234"),
        (0.0123, "kl_gold_model", "0.012"),
        (math.nan, "recall", "not known"),
    ],
)
def test_numbers_in_words(value, metric, text):
    assert number(value, metric) == text


def test_the_card_is_read_back_as_it_was_saved(card, tmp_path):
    again = ReportCard.load(card.save(tmp_path / "card"))
    pd.testing.assert_frame_equal(again.table, card.table)
    pd.testing.assert_frame_equal(again.answers, card.answers, check_dtype=True)
    assert again.sentence == card.sentence
    assert again.settings == card.settings
    (tmp_path / "card" / "table.csv").write_text("set,metric\nforget,recall\n")
    with pytest.raises(AuditError, match="missing"):
        ReportCard.load(tmp_path / "card")
    with pytest.raises(AuditError, match="no report card"):
        ReportCard.load(tmp_path / "nowhere")


def test_what_a_reader_sees(card):
    text = repr(card)
    assert "original" in text
    assert "gold" in text
    assert "No verdict" in text.replace("\n", " ")
    html = card._repr_html_()
    assert "<table" in html
    wide = card.wide().query("set == 'forget' and metric == 'recall'").iloc[0]
    assert wide.original.startswith("100 % [")
    assert wide.n == "4 questions"
    assert [trace.name for trace in card.plot().data[:3]] == ["original", "edited", "gold"]
    assert card.plot_distance().data[1].y[0] == card.value("forget", "kl_gold_model")


@pytest.mark.parametrize(("width", "beside", "change"), [(80, "\n", False), (160, "100 % [", True)])
def test_rich_prints_the_card_to_the_width_of_the_terminal(card, width, beside, change):
    console = Console(file=io.StringIO(), width=width)
    console.print(card)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert beside in text
    assert ("change" in text.splitlines()[1]) == change


def test_which_questions_changed_can_be_read_from_the_answers(card, sets):
    part = card.answers.query("set == 'forget' and model == 'original'")
    assert list(part.id) == [row.id for row in sets["forget"]]
    assert part.exact.all()
    assert set(card.answers.model) == {"original", "edited", "gold 1", "gold 2", "gold 3"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"forget": Questions([])}, DataError, "forget set is empty"),
        ({"holdout": Questions([])}, DataError, "holdout set is empty"),
        ({"forget": None}, DataError, "needs a forget set"),
        ({"retain": list(questions(RETAIN))}, DataError, "retain must be probe.data.Questions; received list"),
        ({"holdout": questions(HOLDOUT).to_df()}, DataError, "received DataFrame: make them with Questions.from_rows"),
        ({"retain": questions(PEOPLE[1:5])}, DataError, "share no group; they share 1, such as 'bob'"),
        ({"holdout": questions(FORGET)}, DataError, "share no group"),
        (
            {"unseen": questions(["ann", "gus"], "the home of {} is"), "holdout": None},
            DataError,
            "'gus' is not among them",
        ),
        ({"unseen": questions(FORGET)}, DataError, "both ask"),
        ({"gold": []}, AuditError, "holds no model"),
        ({"gold": [make_model(0, [*WORDS, "extra"])]}, AuditError, "gold 1 must have the original's vocabulary"),
        ({"gold": [make_model(0, WORDS[::-1])]}, AuditError, "its tokens have other ids"),
        ({"gold": ["a path"]}, AuditError, "must be a Model"),
        ({"edit": "an edit"}, AuditError, "must be an Edit, a Filter, a Model or None; received str"),
        ({"edit": make_model(0, WORDS[::-1])}, AuditError, "the edited model must have the original's tokenizer"),
        ({"corpus": []}, DataError, "at least one"),
        ({"corpus": ["home"]}, DataError, "at least two tokens"),
        ({"n_boot": 0}, AuditError, "n_boot"),
    ],
)
def test_what_cannot_be_audited_says_why(trained, sets, change, error, message):
    given = {"edit": None, **sets, "n_boot": 10, "progress": False} | change
    with pytest.raises(error, match=message):
        audit(trained.model, **given)
