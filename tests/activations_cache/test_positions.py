"""Selections of positions, against loops over the sequences and the tokens' own texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import activations_cache as ac
from activations_cache.errors import DataError
from activations_cache.positions import Selection, select
from activations_cache.tokens import Tokens, tokenize
from tests.activations_cache.caches import by_hand

THREE = Tokens.from_rows([[5, 6, 7], [8], [1, 2, 3, 4]])


def made(lengths: list[int]) -> Tokens:
    return Tokens.from_rows([[1] * n for n in lengths])


def chosen(selection: Selection) -> list[list[int]]:
    return [selection.of(number).tolist() for number in range(len(selection))]


def check(selection: Selection, expected: list[list[int]], pool: str | None) -> None:
    """A selection says in every way that it has what is expected."""
    assert chosen(selection) == expected
    rows = [own[-1:] if pool else own for own in expected]
    assert selection.counts.tolist() == [len(own) for own in rows]
    assert selection.counts.dtype == np.int64
    n = len(expected)
    for first, stop in {(0, n), (0, 1), (n - 1, n), (n // 2, n), (n // 3, 2 * n // 3), (n, n)}:
        positions = selection.row_positions(first, stop)
        assert positions.tolist() == [p for own in rows[first:stop] for p in own]
        assert positions.dtype == np.int32


@st.composite
def entries(draw: st.DrawFn) -> tuple[list[int], list[Any], list[list[int]]]:
    """Lengths, one entry per sequence in any of its forms, and the positions that it means."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=12))
    kinds = ["mask", "array", "tensor", "slice", "range", "list", "tuple", "negative"]
    only = draw(st.sampled_from([*kinds, "any"]))
    given_, meant = [], []
    for n in lengths:
        kind = draw(st.sampled_from(kinds)) if only == "any" else only
        if kind in ("slice", "range"):
            start, stop, step = draw(st.integers(0, n)), draw(st.integers(0, n)), draw(st.integers(1, 3))
            own = list(range(start, stop, step))
            given_.append(slice(start, stop, step) if kind == "slice" else range(start, stop, step))
        else:
            own = sorted(draw(st.sets(st.integers(0, n - 1))))
            mask = [p in own for p in range(n)]
            given_.append(
                {
                    "mask": mask,
                    "array": np.array(mask),
                    "tensor": torch.tensor(mask),
                    "list": own,
                    "tuple": tuple(own),
                    "negative": [p - n for p in own],
                }[kind]
            )
        meant.append(own)
    return lengths, given_, meant


@settings(max_examples=300)
@given(drawn=entries())
def test_every_form_of_entry_means_its_positions(drawn: tuple[list[int], list[Any], list[list[int]]]):
    lengths, given_, meant = drawn
    if not any(meant):
        with pytest.raises(DataError, match="select no token of any sequence"):
            select(made(lengths), given_)
        return
    selection = select(made(lengths), given_)
    assert selection.kind == "chosen"
    check(selection, meant, None)
    if all(meant):
        check(select(made(lengths), given_, "mean"), meant, "mean")
    else:
        empty = next(number for number, own in enumerate(meant) if not own)
        with pytest.raises(DataError, match=f"no token of sequence {empty}, of which pool"):
            select(made(lengths), given_, "mean")
    flat = np.array([p in own for n, own in zip(lengths, meant, strict=True) for p in range(n)])
    for mask in (flat, torch.tensor(flat)):
        again = select(made(lengths), mask)
        assert again.fingerprint() == selection.fingerprint()
        check(again, meant, None)


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12), pool=st.sampled_from([None, "mean"]))
def test_all_and_last(lengths: list[int], pool: Any):
    check(select(made(lengths), "all", pool), [list(range(n)) for n in lengths], pool)
    check(select(made(lengths), "last", pool), [[n - 1] for n in lengths], pool)


def test_many_sequences_of_mixed_forms_agree_with_a_loop():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 20, 10_000)
    given_: list[Any] = [slice(0, n // 2 + 1) for n in lengths[:5000]] + [[0, n] for n in lengths[5000:] - 1]
    given_ = [entry if entry != [0, 0] else [0] for entry in given_]
    meant = [list(range(n))[e] if isinstance(e, slice) else e for e, n in zip(given_, lengths.tolist(), strict=True)]
    check(select(made(lengths.tolist()), given_), meant, None)


def test_slices_are_cut_as_pythons_are():
    assert chosen(select(THREE, [slice(1, 99), slice(5, 9), slice(-2, None)])) == [[1, 2], [], [2, 3]]


def test_fingerprints_tell_selections_apart():
    selections = [
        select(THREE, [[0], [0], [0]]),
        select(THREE, [[0, 1], [0], [0]]),
        select(THREE, [[0], [0], [0, 1]]),
        select(THREE, [[0], [0], [1]]),
        select(THREE, [[0], [0], [0]], "mean"),
        select(THREE, "all", "mean"),
        select(THREE, "last", "mean"),
    ]
    assert len({selection.fingerprint() for selection in selections}) == len(selections)
    assert select(THREE, "all").fingerprint() is select(THREE, "last").fingerprint() is None
    assert select(THREE, [slice(0, 1)] * 3).fingerprint() == selections[0].fingerprint()


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ("first", "must be one of all, last, answer, mask"),
        ("answer", "needs texts with a column `answer`"),
        ("mask", "needs a column `mask`"),
        ([[0], [0]], "2 entries for 3 sequences"),
        (7, "must be a name or a list, one entry per sequence; got int"),
        (iter([[0]] * 3), "must be a name or a list"),
        ([[0], [1], [0]], "position 1 of sequence 1 is out of range: the sequence has 1"),
        ([[-4], [0], [0]], "position -4 of sequence 0 is out of range"),
        ([[0], [0], range(2, 5)], "position 4 of sequence 2 is out of range"),
        ([[1, 0], [0], [0]], "sequence 0 must ascend, each once; 0 comes after 1"),
        ([[0], [0], [1, 1]], "sequence 2 must ascend, each once; 1 comes after 1"),
        ([[0], [0], [-1, 3]], "sequence 2 must ascend"),
        ([[0], [0], range(3, 0, -1)], "sequence 2 must ascend"),
        ([slice(0, 1), slice(0, 1), slice(3, 0, -1)], "sequence 2 are a slice that goes backwards"),
        ([[True, False, True], [True], [True]], "mask of sequence 2 has 1 entries; the sequence has 4"),
        ([np.ones(2, bool), [0], [0]], "mask of sequence 0 has 2 entries; the sequence has 3"),
        ([0, 0, 0], "sequence 0 must be a mask, a slice, a range or a list of positions; got 0"),
        (np.array([0, 0, 0]), "sequence 0 must be a mask"),
        (["ab", [0], [0]], "sequence 0 must be a mask"),
        ([[0], [0.0], [0]], "sequence 1 must be integers, or all booleans"),
        ([[0], [0], [True, 2]], "sequence 2 must be integers, or all booleans"),
        ([[0], [0], [None]], "sequence 2 must be integers"),
        (np.ones(7, bool), r"a mask over 7 tokens; the data has 8"),
        ([[], [], []], "select no token of any sequence"),
    ],
)
def test_positions_that_cannot_be_used_are_refused(positions: Any, message: str):
    with pytest.raises(DataError, match=message):
        select(THREE, positions)


def test_other_pools_are_refused():
    with pytest.raises(DataError, match="pool must be None or 'mean'"):
        select(THREE, "all", "max")  # type: ignore[arg-type]


def test_a_long_flat_mask_is_read_in_blocks(monkeypatch: pytest.MonkeyPatch):
    from activations_cache import positions

    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, 300).tolist()
    mask = rng.random(sum(lengths)) < 0.4
    whole = select(made(lengths), mask)
    monkeypatch.setattr(positions, "_BLOCK", 7)
    check(select(made(lengths), mask), chosen(whole), None)
    assert select(made(lengths), mask).fingerprint() == whole.fingerprint()


# --- masks of the data ----------------------------------------------------------------------------------------------


def test_the_mask_column_is_cut_with_its_row():
    rows = [{"input_ids": [1, 2, 3, 4], "mask": [0, 1, 0, 1]}, {"input_ids": [5, 6], "mask": [True, False]}]
    tokens = tokenize(None, rows, max_length=3, positions="mask")
    assert tokens.masks is not None and tokens.masks.tolist() == [False, True, False, True, False]
    assert chosen(select(tokens, "mask")) == [[1], [0]]
    split = tokenize(None, rows, max_length=3, positions="mask", overflow="split")
    assert chosen(select(split, "mask")) == [[1], [0], [0]]
    assert tokenize(None, rows).masks is None


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([1, 0, 1], "row 1 has 3 values for 2 tokens"),
        ([1, 2], "row 1 holds 2; True and False"),
        (["x", "y"], "row 1 holds 'x'; True and False"),
        ([0.5, 1], "row 1 holds 0.5"),
        (None, "row 1 has no `mask`"),
        (1, "row 1 must have a list"),
    ],
)
def test_masks_that_fit_no_row_are_refused(mask: Any, message: str):
    with pytest.raises(DataError, match=message):
        tokenize(None, [{"input_ids": [3], "mask": [1]}, {"input_ids": [3, 4], "mask": mask}], positions="mask")


# --- answers --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["tokenizers/gpt2", "stories260K"])
def real(request: pytest.FixtureRequest, shared_data: Path) -> Any:
    """GPT-2's tokenizer, of bytes, without BOS of its own; and a Llama's, with."""
    from transformers import AutoTokenizer, GPT2TokenizerFast

    kind = GPT2TokenizerFast if "gpt2" in request.param else AutoTokenizer
    return kind.from_pretrained(shared_data / request.param)


def tofu(shared_data: Path, count: int) -> list[dict[str, str]]:
    raw = (shared_data / "tofu" / "forget01.json").read_text("utf-8")
    return [json.loads(line) for line in raw.splitlines() if line.strip()][:count]


def by_prefixes(tokenizer: Any, ids: list[int], start: int, stop: int) -> list[int]:
    """Tokens of the characters `start` to `stop`, from how long the text of each prefix is when decoded."""
    ends = [len(tokenizer.decode(ids[: i + 1], skip_special_tokens=True).rstrip("�")) for i in range(len(ids))]
    begins = [0, *ends[:-1]]
    return [i for i, (a, b) in enumerate(zip(begins, ends, strict=True)) if b > start and a < stop and b > a]


@pytest.mark.parametrize("bos", [None, True, False])
def test_answers_are_the_tokens_that_spell_them(real: Any, shared_data: Path, bos: bool | None):
    rows = tofu(shared_data, 40)
    tokens = tokenize(real, rows, bos=bos, positions="answer")
    selection = select(tokens, "answer")
    for number, row in enumerate(rows):
        text = f"{row['question']} {row['answer']}"
        ids = tokens.input_ids[number].tolist()
        assert ids == tokenize(real, [text], bos=bos).input_ids[0].tolist()
        own = selection.of(number).tolist()
        assert own == by_prefixes(real, ids, len(row["question"]) + 1, len(text))
        spelt = real.decode([ids[p] for p in own], skip_special_tokens=True)
        assert spelt.strip() == row["answer"].strip()
    assert tokens.columns["question"] == [row["question"] for row in rows]


def test_an_answer_in_a_text_is_its_last_occurrence(real: Any):
    rows = [
        {"text": "Paris? They say Paris, of course.", "answer": "Paris"},
        {"text": "naïve café – “déjà vu” 日本 naïve", "answer": "naïve"},
        {"text": "one two", "answer": "one two"},
    ]
    tokens = tokenize(real, rows, positions="answer")
    for number, row in enumerate(rows):
        start = row["text"].rindex(row["answer"])
        encoding = real(row["text"])
        expected = {  # tokenizers' own way from characters to tokens
            encoding.char_to_token(at)
            for at in range(start, start + len(row["answer"]))
            if encoding.char_to_token(at) is not None
        }
        own = select(tokens, "answer").of(number).tolist()
        assert set(own) >= expected and len(own) - len(expected) <= 2  # a character of several tokens has one of them
        assert row["answer"] in real.decode([tokens.input_ids[number][p] for p in own])


TEMPLATES = {
    "plain": "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "stripped": "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}[end of answer]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("bos", [None, True, False])
def test_in_a_chat_the_answer_is_the_assistants_turn(real: Any, shared_data: Path, template: str, bos: bool | None):
    rows = [*tofu(shared_data, 8), {"question": "Say answer, user.", "answer": " answer"}]
    held, real.chat_template = real.chat_template, TEMPLATES[template]
    try:
        tokens = tokenize(real, rows, chat=True, bos=bos, positions="answer")
    finally:
        real.chat_template = held
    for number, row in enumerate(rows):
        ids = tokens.input_ids[number].tolist()
        assert ids.count(real.bos_token_id) == (template == "stripped" if bos is None else bos)
        rendered = real.decode(ids, skip_special_tokens=True)
        if template == "plain":
            assert f"<user> {row['question']}\n<assistant> {row['answer']}\n" in rendered
        own = select(tokens, "answer").of(number)
        assert own.tolist() == list(range(own[0], own[-1] + 1))
        before, after = (real.decode(part, skip_special_tokens=True) for part in (ids[: own[0]], ids[own[-1] + 1 :]))
        spelt = real.decode([ids[p] for p in own], skip_special_tokens=True)
        assert row["answer"].strip() in spelt
        assert "assistant" in before and len(spelt) <= len(row["answer"]) + 3
        assert after.strip() in ("", "[end of answer]", "end of answer]", "of answer]")


def test_in_a_chat_a_text_is_the_users_turn(real: Any):
    held, real.chat_template = real.chat_template, TEMPLATES["plain"]
    try:
        tokens = tokenize(real, [{"text": " a user said user", "answer": "user"}], chat=True, positions="answer")
    finally:
        real.chat_template = held
    ids = tokens.input_ids[0].tolist()
    [(start, stop)] = tokens.spans.tolist() if tokens.spans is not None else []
    assert real.decode(ids[start:stop]).strip() == "user"
    assert real.decode(ids[:start], skip_special_tokens=True).strip().endswith("a user said")


def test_answers_that_are_not_there_are_refused(real: Any):
    rows = [{"text": "a b c", "answer": "b"}]
    for bad, message in (
        ({"text": "a b", "answer": "x"}, "row 1: its answer 'x' does not occur in its text"),
        ({"text": "a b", "answer": ""}, "row 1: its answer must be a text, not empty; got ''"),
        ({"text": "a b", "answer": 3}, "row 1: its answer must be a text, not empty; got 3"),
        ({"text": "a b"}, "row 1: its answer must be a text, not empty; got None"),
    ):
        with pytest.raises(DataError, match=message):
            tokenize(real, [*rows, bad], positions="answer")
    with pytest.raises(DataError, match="needs a column `answer`"):
        tokenize(real, ["a b"], positions="answer")
    with pytest.raises(DataError, match="holds token ids: give each row its positions"):
        tokenize(None, [{"input_ids": [1], "answer": "b"}], positions="answer")
    with pytest.raises(DataError, match="the question of row 0 must be a text"):
        tokenize(real, [{"question": "", "answer": "b"}], positions="answer")


def test_answers_that_are_cut_off_are_refused(real: Any):
    rows = [{"question": "a", "answer": "b"}, {"question": "one two three four five", "answer": "six seven eight"}]
    whole = tokenize(real, rows, positions="answer")
    assert whole.spans is not None
    [first, second] = whole.lengths.tolist()
    stop = int(whole.spans[1, 1])
    assert tokenize(real, rows, stop, positions="answer").spans is not None
    with pytest.raises(DataError, match=r"row 1: its answer is tokens \d+ to \d+, and max_length ends"):
        tokenize(real, rows, stop - 1, positions="answer")
    with pytest.raises(DataError, match=r"row 1: its answer is tokens .* and n_tokens ends"):
        tokenize(real, rows, positions="answer", n_tokens=first + second - 1 - (second - stop))
    assert len(tokenize(real, rows, positions="answer", n_tokens=first)) == 1
    with pytest.raises(DataError, match=r"row 1 has .* tokens and is split"):
        tokenize(real, rows, second - 1, positions="answer", overflow="split")


def test_answers_need_a_tokenizer_that_knows_characters(real: Any):
    class Slow:
        is_fast = False
        bos_token_id = None

    with pytest.raises(DataError, match=r"needs a fast tokenizer.*Slow does not"):
        tokenize(Slow(), [{"question": "a", "answer": "b"}], positions="answer")


def test_spans_that_fit_no_sequence_are_refused():
    for span in ([1, 1], [2, 1], [-1, 2], [0, 4]):
        with pytest.raises(DataError, match=r"answer of sequence 1 .* empty or cut off"):
            select(Tokens.from_rows([[1], [1, 2, 3]], spans=np.array([[0, 1], span])), "answer")


def test_answers_of_a_real_model_are_stored_and_pooled(shared_data: Path, tmp_path: Path):
    """Rows of a capture against a hook on the bare model, at the positions that decode to the answer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = shared_data / "stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    rows: list[dict[str, Any]] = [
        {**row, "who": [{"start": 0, "stop": 3, "label": "first"}]} for row in tofu(shared_data, 6)
    ]
    site = "blocks.2.hook_resid_post"
    asked: dict[str, Any] = {"tokenizer": tokenizer, "positions": "answer", "progress": False, "batch_tokens": 400}
    cache = ac.capture(model, rows, site, tmp_path / "rows", token_columns=["who"], **asked)
    pooled = ac.capture(model, rows, site, tmp_path / "pooled", pool="mean", **asked)
    ids = [tokenizer(f"{row['question']} {row['answer']}")["input_ids"] for row in rows]
    whole, at = by_hand(model, ids, 2), 0
    for number, row in enumerate(rows):
        question = len(row["question"]) + 1
        own = by_prefixes(tokenizer, ids[number], question, question + len(row["answer"]))
        stop = at + len(own)
        assert cache.rows["position"][at:stop].tolist() == own
        assert set(cache.rows["sequence"][at:stop].tolist()) == {number}
        torch.testing.assert_close(cache[site][at:stop], whole[number][own], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            pooled[site][number : number + 1][0], whole[number][own].mean(0), rtol=1e-4, atol=1e-4
        )
        at = stop
    assert len(cache) == at and len(pooled) == len(rows)
    assert cache.manifest["data"]["selection"] != pooled.manifest["data"]["selection"]
