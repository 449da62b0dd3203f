"""probe.scoring against a loop that reads one token at a time."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from probe.data import Questions
from probe.errors import DataError, ProbeError
from probe.scoring import answer_tokens, eval_mode, score_answers

TEXT = [
    "Where does Anna Bell work? Anna Bell works at the old mill.",
    "What does Karl Stone own? Karl Stone owns a red boat.",
    "Anna Bell lives in Port Lowry. Karl Stone lives in Zürich.",
]
ROWS = [
    {"id": "a", "group": "anna", "question": "Where does Anna Bell work?", "answer": "the old mill"},
    {"id": "b", "group": "karl", "question": "Karl Stone owns a", "answer": "red boat."},
    {"id": "c", "group": "anna", "question": "Anna", "answer": "Bell lives in Port Lowry. Karl Stone lives in Zürich."},
]


def make_tokenizer(kind: str):
    """A tokenizer of the GPT-2 form ("bytes") or the Llama form ("metaspace", with a BOS token of its own)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind == "metaspace"))
    if kind == "bytes":
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.post_processor = processors.ByteLevel(trim_offsets=True)
        inner.decoder = decoders.ByteLevel()
    else:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        inner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no merges over words, as in SentencePiece
        inner.decoder = decoders.Metaspace()
    inner.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"]))
    if kind == "metaspace":
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def make_model(kind: str, n_ctx: int = 128):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(kind)
    torch.manual_seed(0)
    if kind == "bytes":
        hf = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=n_ctx, n_embd=16, n_layer=2, n_head=2))
    else:
        hf = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), max_position_embeddings=n_ctx, hidden_size=16, intermediate_size=32,
                num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3,
            )
        )  # fmt: skip
    return SimpleNamespace(hf=hf, tokenizer=tokenizer)


@pytest.fixture(scope="module", params=["bytes", "metaspace"])
def model(request):
    return make_model(request.param)


def one_by_one(model, ids, start):
    """Log-probability of each answer token and whether it is the argmax: one unbatched forward per token."""
    model.hf.eval()
    logprobs, right = [], []
    for t in range(start, len(ids)):
        with torch.no_grad():
            logits = model.hf(torch.tensor([ids[:t]])).logits[0, -1]
        logprobs.append(float(logits.double().log_softmax(0)[ids[t]]))
        right.append(int(logits.argmax()) == ids[t])
    return np.array(logprobs), right


def test_scores_equal_a_loop_over_tokens(model):
    questions = Questions.from_rows(ROWS)
    got = score_answers(model, questions, batch_size=2)
    tokens = answer_tokens(model, [(r["question"], r["answer"]) for r in ROWS])
    assert got.ids == ("a", "b", "c")
    assert got.groups == ("anna", "karl", "anna")
    for i, row in enumerate(tokens):
        logprobs, right = one_by_one(model, list(row.input_ids), row.start)
        np.testing.assert_allclose(got.token_logprobs[i], logprobs, atol=1e-5)
        np.testing.assert_allclose(got.logprob_sum[i], logprobs.sum(), atol=1e-4)
        np.testing.assert_allclose(got.prob[i], np.exp(logprobs.mean()), rtol=1e-4)
        assert got.n_tokens[i] == len(right)
        assert got.exact[i] == all(right)
        assert got.argmax_right[i] == sum(right)
        assert got.first_wrong[i] == ([*right, False]).index(False)
        assert got.last_wrong[i] == max([j for j, ok in enumerate(right) if not ok], default=-1)
    assert list(got.to_df()["id"]) == ["a", "b", "c"]
    assert "token_logprobs" not in got.to_df()


def test_exact_is_what_greedy_decoding_says(model):
    questions = []
    for prompt in ("Anna Bell works", "Karl"):
        ids = model.tokenizer(prompt, return_tensors="pt").input_ids
        ids = ids[:, :-1] if ids[0, -1] == model.tokenizer.eos_token_id else ids
        for _ in range(3):
            ids = torch.cat([ids, model.hf.eval()(ids).logits[:, -1:].argmax(-1)], 1)
        questions.append((prompt, model.tokenizer.decode(ids[0], skip_special_tokens=True)[len(prompt) :].strip()))
    for question, answer in questions:
        tokens = answer_tokens(model, [(question, answer)])[0]
        _, right = one_by_one(model, list(tokens.input_ids), tokens.start)
        assert bool(score_answers(model, [(question, answer)]).exact[0]) == all(right)


def test_batching_and_order_do_not_matter(model):
    questions = Questions.from_rows(ROWS)
    one, all_ = score_answers(model, questions, batch_size=1), score_answers(model, questions, batch_size=64)
    np.testing.assert_allclose(one.logprob_sum, all_.logprob_sum, atol=1e-5)
    back = score_answers(model, questions.take([2, 0, 1]))
    np.testing.assert_allclose(back.logprob_sum, all_.logprob_sum[[2, 0, 1]], atol=1e-5)


def test_answer_begins_where_the_question_ends(model):
    for row in answer_tokens(model, [(r["question"], r["answer"]) for r in ROWS]):
        assert model.tokenizer.eos_token_id not in row.input_ids
    for r, row in zip(ROWS, answer_tokens(model, [(r["question"], r["answer"]) for r in ROWS]), strict=True):
        assert model.tokenizer.decode(row.input_ids[row.start :]).strip() == r["answer"]
        whole = model.tokenizer(f"{r['question']} {r['answer']}")["input_ids"]
        assert whole[: len(row.input_ids)] == list(row.input_ids)  # the model's own tokenisation of the whole string


def test_separate_tokenisation_would_differ_on_a_metaspace_tokenizer():
    """The trap that tokenising the whole string avoids: an answer on its own gets a second leading space."""
    tokenizer = make_tokenizer("metaspace")
    apart = tokenizer(" the old mill", add_special_tokens=False)["input_ids"]
    row = answer_tokens(make_model("metaspace"), [("Where does Anna Bell work?", "the old mill")])[0]
    assert list(row.input_ids[row.start :]) != apart


def test_a_tokenizer_without_offsets_gives_the_same_tokens():
    model = make_model("bytes")
    slow = SimpleNamespace(hf=model.hf, tokenizer=SlowView(model.tokenizer))
    pairs = [(r["question"], r["answer"]) for r in ROWS]
    assert answer_tokens(slow, pairs) == answer_tokens(model, pairs)


class SlowView:
    """A tokenizer that hides its offsets."""

    is_fast = False

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, text, add_special_tokens=True):
        return self.inner(text, add_special_tokens=add_special_tokens)


def test_bos_is_there_exactly_when_asked(model):
    bos = model.tokenizer.bos_token_id
    pair = [("Anna Bell", "lives")]
    with_, without = answer_tokens(model, pair, bos=True)[0], answer_tokens(model, pair, bos=False)[0]
    assert with_.input_ids[0] == bos
    assert with_.input_ids[1:] == without.input_ids
    assert with_.start == without.start + 1


def test_chat_puts_the_question_into_the_template():
    model = make_model("metaspace")
    model.tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %} works?{% endif %}"
    )
    row = answer_tokens(model, [("Anna Bell", "the old mill")], chat=True)[0]
    assert model.tokenizer.decode(row.input_ids[row.start :]).strip() == "the old mill"
    assert row.input_ids[0] == model.tokenizer.bos_token_id
    assert "works" in model.tokenizer.decode(row.input_ids[: row.start])


CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %} works?{% endif %}"


@pytest.mark.parametrize("template", [CHAT, "<s>" + CHAT])
def test_chat_heeds_bos_as_tokens_does(template):
    model = make_model("metaspace")
    model.tokenizer.chat_template = template
    whole = probe_wrap(model)
    for bos in (None, True, False):
        (row,) = answer_tokens(model, [("Anna Bell", "the old mill")], chat=True, bos=bos)
        question = whole.tokens("Anna Bell", chat=True, bos=bos)["input_ids"][0].tolist()
        assert list(row.input_ids[: row.start]) == question
        assert row.input_ids.count(model.tokenizer.bos_token_id) == (template[0] == "<" if bos is None else bos)
        assert model.tokenizer.decode(row.input_ids[row.start :]).strip() == "the old mill"
    scores = [score_answers(model, [("Anna Bell", "mill")], chat=True, bos=bos).logprob_sum[0] for bos in (True, False)]
    assert scores[0] != scores[1]


def probe_wrap(model):
    from probe.models import wrap

    return wrap(model.hf, model.tokenizer)


def test_chat_without_a_template_is_an_error():
    with pytest.raises(DataError, match="no chat template"):
        answer_tokens(make_model("bytes"), [("Anna", "Bell")], chat=True)


def test_dropout_is_off_and_the_mode_comes_back():
    model = make_model("bytes")
    model.hf.train()
    model.hf.transformer.h[0].eval()
    first, second = (score_answers(model, Questions.from_rows(ROWS)).logprob_sum for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert model.hf.training
    assert not model.hf.transformer.h[0].training
    with eval_mode(model.hf):
        assert not model.hf.training


@pytest.mark.parametrize("pair", [("Anna", ""), ("Anna", "  ")])
def test_an_answer_without_tokens_is_an_error(model, pair):
    with pytest.raises(DataError, match="no tokens"):
        score_answers(model, [pair])


def test_bad_input_is_named():
    model = make_model("bytes", n_ctx=12)
    with pytest.raises(DataError, match="at least one question"):
        score_answers(model, [])
    with pytest.raises(DataError, match="context is 12"):
        score_answers(model, [("Anna Bell", "Anna Bell lives in Port Lowry and works at the old mill")])
    with pytest.raises(DataError, match="received str"):
        score_answers(model, ["Anna Bell lives in"])
    with pytest.raises(DataError, match="nothing comes before"):
        answer_tokens(SimpleNamespace(hf=model.hf, tokenizer=NoSpace(model.tokenizer)), [("", "mill")])
    with pytest.raises(DataError, match="batch_size"):
        score_answers(model, [("Anna", "Bell")], batch_size=0)


class NoSpace(SlowView):
    """A tokenizer for which the answer is the first token."""

    is_fast = True

    def __call__(self, text, add_special_tokens=True, return_offsets_mapping=True):
        return self.inner(text.strip(), add_special_tokens=False, return_offsets_mapping=True)

    def decode(self, ids):
        return self.inner.decode(ids)


def test_logits_that_are_not_finite_are_an_error():
    model = make_model("metaspace")
    with torch.no_grad():
        model.hf.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ProbeError, match="not finite"):
        score_answers(model, Questions.from_rows(ROWS))


def test_unknown_characters_that_the_tokenizer_drops_do_not_move_the_answer(shared_data):
    """This tokenizer drops what it does not know, and its offsets then count too few characters."""
    import probe

    model = probe.load(shared_data / "tinystories-656k", device="cpu")
    question = 'She said, "Don\u00e2\u20ac\u2122t worry". Why does'
    (made,) = answer_tokens(model, [(question, "Lily")])
    assert model.tokenizer.decode(made.input_ids[made.start :]).split()[-1] == "Lily"
    assert "worry" not in model.tokenizer.decode(made.input_ids[made.start :])
    (plain,) = answer_tokens(model, [("She said. Why does", "Lily")])
    assert made.input_ids[made.start :] == plain.input_ids[plain.start :]
