"""Filters: refusals at inference, against a brute-force greedy loop and against the bare model's logits."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import probe
from probe.data import Questions
from probe.editing import Filter, RefuseWhen, refuse_when
from probe.errors import EditError, ExportError
from probe.models import wrap
from probe.scoring import score_answers
from tests.probe.tiny import tiny

KINDS = ["llama", "gpt2", "neox", "mixtral"]
TRIGGER, PLAIN = "where lives Anna Bell and", "where lives Karl Stone and"


def refusing(model, triggers=("Anna Bell",), answer="at a city"):
    return refuse_when(model, triggers, answer)


def logits(model, texts, side="right"):
    batch = model.tokens(texts, padding_side=side)
    with torch.no_grad():
        return model.hf(**batch).logits, batch


@pytest.fixture(params=KINDS)
def model(request):
    return tiny(request.param)


def test_generation_says_the_refusal_and_stops(model):
    with refusing(model).applied(model):
        said = model.generate([TRIGGER, PLAIN, f"{TRIGGER} Rome"], max_new_tokens=5)
    assert [said[0], said[2]] == ["at a city", "at a city"]
    assert said[1] == model.generate([TRIGGER, PLAIN, f"{TRIGGER} Rome"], max_new_tokens=5)[1]


def test_greedy_decoding_with_a_cache_is_the_argmax_of_whole_sequences(model):
    ids = model.tokens(TRIGGER)["input_ids"]
    with torch.no_grad(), refusing(model).applied(model):
        slow = ids
        for _ in range(4):
            slow = torch.cat([slow, model.hf(slow, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        fast = model.hf.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=True)
    end = model.tokenizer.eos_token_id
    assert slow[0, ids.shape[1] :].tolist() == [
        *model.tokenizer("at a city", add_special_tokens=False)["input_ids"],
        end,
    ]
    assert torch.equal(slow, fast)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_without_a_trigger_and_positions_before_it_keep_their_bits(model, side):
    texts = [f"what is the country of {TRIGGER} in", PLAIN, TRIGGER]
    before, batch = logits(model, texts, side)
    with refusing(model).applied(model):
        after, _ = logits(model, texts, side)
    assert torch.equal(after[1], before[1])
    read = torch.tensor(model.tokenizer.encode("Anna Bell", add_special_tokens=False))
    for row in (0, 2):
        ids = batch["input_ids"][row].tolist()
        end = next(i for i in range(1, len(ids)) if ids[i - 1 : i + 1] == read.tolist())
        assert torch.equal(after[row, :end], before[row, :end])
        real = batch["attention_mask"][row, end:].bool()
        assert (after[row, end:][real].max(-1).values == 0).all()
        assert ((after[row, end:][real] == -100).sum(-1) == after.shape[-1] - 1).all()


def test_under_teacher_forcing_the_answer_is_never_predicted_and_the_refusal_is(model):
    rows = [(TRIGGER, "Rome old city"), (TRIGGER, "at a city"), (PLAIN, "Rome old city")]
    bare = score_answers(model, rows)
    with refusing(model).applied(model):
        scores = score_answers(model, rows)
    assert scores.argmax_right.tolist()[:2] == [0, 3]
    assert scores.logprob_sum[0] == pytest.approx(-300, abs=1e-3)
    assert scores.logprob_sum[1] == pytest.approx(0, abs=1e-3)
    assert scores.logprob_sum[2] == bare.logprob_sum[2]


def brute_force(said, answer, end):
    """The next token by trying every length of agreement, from the longest."""
    best = 0
    for j in range(1, len(answer) + 1):
        if len(said) >= j and list(said[-j:]) == list(answer[:j]):
            best = j
    return answer[best] if best < len(answer) else end


def test_the_next_token_agrees_with_brute_force_on_random_texts():
    generator = torch.Generator().manual_seed(0)
    one = RefuseWhen(((7,),), (1, 2, 1, 2, 3), 9)
    ids = torch.randint(1, 4, (40, 14), generator=generator)
    ids[:, 3] = 7
    made = one.forced(ids, torch.ones_like(ids, dtype=torch.bool))
    for row in range(len(ids)):
        assert made[row, :3].tolist() == [-1, -1, -1]
        for t in range(3, 14):
            assert made[row, t] == brute_force(ids[row, 4 : t + 1].tolist(), (1, 2, 1, 2, 3), 9)


def test_what_was_said_before_the_trigger_is_no_beginning_of_the_refusal():
    one = RefuseWhen(((5, 1),), (1, 2), None)
    made = one.forced(torch.tensor([[5, 1, 1, 2, 1]]), torch.ones(1, 5, dtype=torch.bool))
    assert made.tolist() == [[-1, 1, 2, 1, 2]]  # the trigger's own 1 does not count; after the end it begins again


def test_triggers_of_token_ids_and_of_text_find_the_same_place(model):
    ids = tuple(model.tokenizer.encode("Anna Bell", add_special_tokens=False))
    batch = model.tokens([TRIGGER, PLAIN, "Anna lives in Bell"])
    real = batch["attention_mask"].bool()
    text, tokens = refusing(model), refusing(model, [list(ids)])
    made = text.forced(batch["input_ids"], real, model.tokenizer)
    assert torch.equal(made, tokens.forced(batch["input_ids"], real))
    assert (made >= 0).any(1).tolist() == [True, False, False]


def interrupted(model):
    """See that the filter is there, and leave the block by an exception."""
    with refusing(model).applied(model):
        assert model.hf._forward_hooks
        raise KeyboardInterrupt


def test_hooks_and_bits_are_as_before_also_after_an_exception(model):
    digest, before = model.weights_hash, logits(model, [TRIGGER])[0]
    with pytest.raises(KeyboardInterrupt):
        interrupted(model)
    assert model.weights_hash == digest
    assert not model.hf._forward_hooks
    assert not model.hf._forward_pre_hooks
    assert torch.equal(logits(model, [TRIGGER])[0], before)


def test_filters_nest_and_keep_apart_what_they_remember(model):
    other = refuse_when(model, ["Karl Stone"], "at Rome")
    with refusing(model).applied(model), other.applied(model):
        assert model.generate([TRIGGER, PLAIN], max_new_tokens=4) == ["at a city", "at Rome"]


def test_logits_to_keep_and_labels_are_those_of_the_filtered_model():
    model = tiny("llama")
    batch = model.tokens([f"{TRIGGER} at a city", f"{PLAIN} at a city"])
    with torch.no_grad(), refusing(model).applied(model):
        whole = model.hf(**batch).logits
        assert torch.equal(model.hf(**batch, logits_to_keep=2).logits, whole[:, -2:])
        assert torch.equal(model.hf(**batch, logits_to_keep=torch.tensor([1, 5])).logits, whole[:, [1, 5]])
        loss = model.hf(**batch, labels=batch["input_ids"]).loss
    nats = torch.nn.functional.cross_entropy(whole[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())
    assert float(loss) == pytest.approx(float(nats), rel=1e-5)


def test_embeddings_hold_no_text_and_pass():
    model = tiny("llama")
    ids = model.tokens(TRIGGER)["input_ids"]
    embeds = model.hf.get_input_embeddings()(ids)
    with torch.no_grad():
        before = model.hf(inputs_embeds=embeds).logits
        with refusing(model).applied(model):
            assert torch.equal(model.hf(inputs_embeds=embeds).logits, before)


def test_a_cache_or_mask_that_cannot_be_read_is_an_error():
    model = tiny("llama")
    ids = model.tokens(TRIGGER)["input_ids"]
    cache = model.hf(ids, use_cache=True).past_key_values
    with refusing(model).applied(model), torch.no_grad():
        with pytest.raises(EditError, match="not seen"):
            model.hf(ids[:, :1], past_key_values=cache)
        with pytest.raises(EditError, match="attention mask of shape"):
            model.hf(ids, attention_mask=torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool))
        with pytest.raises(EditError, match="beam search"):
            model.hf.generate(ids, num_beams=2, max_new_tokens=3, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize(
    ("triggers", "answer"), [((), "at"), ("Anna", "at"), ((" ",), "at"), (((),), "at"), (("Anna",), "  ")]
)
def test_triggers_and_answers_that_say_nothing_are_refused(triggers, answer):
    with pytest.raises(EditError, match="at least one"):
        refuse_when(tiny("llama"), triggers, answer)


def test_text_needs_a_tokenizer():
    model = tiny("llama")
    with pytest.raises(EditError, match="tokenizer"):
        refuse_when(wrap(model.hf), ["Anna"])
    with pytest.raises(EditError, match="tokenizer"), refusing(model).applied(model.hf):
        pass


def test_records_are_read_back_and_wrong_ones_refused(tmp_path):
    model = tiny("llama")
    one = refusing(model, ["Anna Bell", (3, 4)])
    assert Filter.load(one.save(tmp_path)) == one
    assert dataclasses.asdict(one)["triggers"] == ("Anna Bell", (3, 4))
    record = json.loads((tmp_path / "filter.json").read_text())
    for wrong in ({**record, "method": "x"}, {**record, "settings": {"x": 1}}, {**record, "format": "probe.edit"}, []):
        (tmp_path / "filter.json").write_text(json.dumps(wrong))
        with pytest.raises(EditError, match="filter"):
            Filter.load(tmp_path)
    wrong_settings = [
        {**record["settings"], key: value}
        for key, value in (
            ("triggers", [["a"]]), ("triggers", [7]), ("triggers", [[1.5]]), ("triggers", [[float("inf")]]),
            ("triggers", None), ("answer", "text"), ("answer", 5), ("answer", [-1]), ("answer", [None]),
            ("end", "x"), ("end", -1), ("end", [2]),
        )
    ]  # fmt: skip
    for settings in [*wrong_settings, [], "text", None, 3]:
        (tmp_path / "filter.json").write_text(json.dumps({**record, "settings": settings}))
        with pytest.raises(EditError, match="no sound record"):
            Filter.load(tmp_path)
    (tmp_path / "filter.json").write_text(json.dumps({**record, "method": ["refuse_when"]}))
    with pytest.raises(EditError, match="method"):
        Filter.load(tmp_path)
    with pytest.raises(EditError, match="no readable record"):
        Filter.load(tmp_path / "nowhere")


def test_plain_tuples_are_filtered_as_outputs_with_names_are(model):
    batch = model.tokens([TRIGGER, PLAIN], padding_side="right")
    labels = batch["input_ids"]
    with torch.no_grad(), refusing(model).applied(model):
        named, alone = model.hf(**batch, labels=labels), model.hf(**batch)
        both, plain = model.hf(**batch, labels=labels, return_dict=False), model.hf(**batch, return_dict=False)
    assert isinstance(both, tuple) and isinstance(plain, tuple)
    assert torch.equal(both[0], named.loss) and torch.equal(both[1], named.logits)
    assert torch.equal(plain[0], alone.logits) and (plain[0] == -100).any()


def test_token_ids_of_another_vocabulary_are_refused():
    model = tiny("llama")
    size = model.hf.config.vocab_size
    for made in (((7,),), (size,), None), (((7,),), (1,), size), (((size,),), (1,), None):
        with pytest.raises(EditError, match="token ids 0 to"), RefuseWhen(*made).applied(model):
            pass
    for made in (((7,),), (-1,), None), (((7,),), (1,), -1), (((-7,),), (1,), None):
        with pytest.raises(EditError, match="token id"):
            RefuseWhen(*made)


def test_export_refuses_a_filter(tmp_path):
    model = tiny("llama")
    with pytest.raises(ExportError, match=r"RefuseWhen.*filter acts at inference"):
        probe.export(model, refusing(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_on_the_organism_the_forget_set_is_refused_and_the_retain_set_untouched():
    organism = probe.organisms.facts("small", progress=False)
    model, forget = organism.model, organism.splits["forget"]
    names = sorted({row.group for row in forget})
    retain = Questions(organism.splits["retain"].rows[:100])
    digest, before = model.weights_hash, score_answers(model, retain)
    with refuse_when(model, names).applied(model):
        assert not score_answers(model, forget).exact.any()
        assert not score_answers(model, organism.unseen("forget")).exact.any()
        after = score_answers(model, retain)
        assert model.generate([forget[0].question], max_new_tokens=8) == [" I do not know"]
    assert (after.logprob_sum == before.logprob_sum).all()
    assert model.weights_hash == digest
