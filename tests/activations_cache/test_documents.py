"""Reading documents from everything that holds them, and tokenizing them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from activations_cache.documents import (
    RESERVED,
    Documents,
    read_documents,
    storable_columns,
    tokenize,
    unstorable_columns,
)
from activations_cache.errors import DataError

ROWS = [{"text": "one two", "label": 1, "who": "a"}, {"text": "three", "label": 0, "who": "b"}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A word tokenizer that adds BOS by itself and has a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "one", "two", "three", "user", ":", "assistant"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.chat_template = (
        "<s>{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}assistant :{% endif %}"
    )
    return made


def write(kind: str, folder: Path) -> Path:
    path, frame = folder / f"data.{kind}", pd.DataFrame(ROWS)
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind in ("csv", "tsv"):
        frame.to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
    else:
        frame.to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_file_of_rows_reads_the_same(kind: str, tmp_path: Path):
    read = read_documents(write(kind, tmp_path))
    assert read == Documents(["one two", "three"], None, {"label": [1, 0], "who": ["a", "b"]})


def test_every_object_of_rows_reads_the_same():
    datasets = pytest.importorskip("datasets")
    expected = read_documents(ROWS)
    assert expected.columns == {"label": [1, 0], "who": ["a", "b"]}
    assert read_documents(pd.DataFrame(ROWS)) == expected
    assert read_documents(datasets.Dataset.from_list(ROWS)) == expected
    assert read_documents(expected) is expected


def test_txt_is_one_document_a_line(tmp_path: Path):
    path = tmp_path / "data.txt"
    path.write_text("first\n\n  second ü \n", encoding="utf-8")
    assert read_documents(path).texts == ["first", "  second ü "]
    assert read_documents(str(path)).texts == ["first", "  second ü "]


def test_a_csv_keeps_text_as_text(tmp_path: Path):
    path = tmp_path / "data.csv"
    path.write_text("text,label\n123,NA\nNA,x\n")
    assert read_documents(path) == Documents(["123", "NA"], None, {"label": ["NA", "x"]})


@pytest.mark.parametrize(
    "ids",
    [
        [[1, 2], [3]],
        [np.array([1, 2]), np.array([3])],
        [torch.tensor([1, 2]), (3,)],
        [[np.int64(1), np.uint8(2)], [np.int32(3)]],
        [list(torch.tensor([1, 2])), [3]],
    ],
)
def test_token_ids_in_any_container(ids: Any):
    read = read_documents(ids).input_ids or []
    assert read == [[1, 2], [3]]
    assert all(type(value) is int for row in read for value in row)


def test_token_ids_as_a_column_and_as_a_matrix():
    rows = [{"input_ids": [1, 2], "attention_mask": [1, 1], "text": "x", "label": "p"}]
    read = read_documents(rows)
    assert read.input_ids == [[1, 2]]
    assert read.columns == {"text": ["x"], "label": ["p"]}
    assert read_documents(torch.tensor([[1, 2], [3, 4]])).input_ids == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no document"),
        (["fine", " \n"], "row 1 is empty"),
        ([[1], []], "row 1 holds no token"),
        ([{"body": "x"}], "no column 'text'.*'body'"),
        ([{"text": "x"}, {"text": None}], "row 1 has no 'text'"),
        ([{"text": 5}], "row 0 must be a string"),
        (["x", [1]], "row 1 is a list"),
        ([[1, -2]], "row 0 holds something else than token ids"),
        ([[1.5]], "row 0 holds something else than token ids"),
        ([[np.float32(1)]], "row 0 holds something else than token ids"),
        ([[1], [np.bool_(True)]], "row 1 holds something else than token ids"),
        ([[np.int64(-1)]], "row 0 holds something else than token ids"),
        ([3], "row 0 must be a text or a list"),
        ({"train": ROWS}, "several splits"),
        (7, "must be a list"),
        (Path("nowhere.jsonl"), "no data file at nowhere.jsonl"),
    ],
)
def test_unusable_data_is_refused_with_the_row(data: Any, message: str):
    with pytest.raises(DataError, match=message):
        read_documents(data)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n \n", "no document"),
        ("a.jsonl", '{"text": "x"}\n{oops\n', "line 2 is no JSON"),
        ("a.json", '{"text": "x"}', "must hold a JSON list"),
        ("a.csv", "", "could not be read as a table"),
        ("a.csv", "text\n", "no document"),
        ("a.docx", "x", "unknown kind of data file '.docx'"),
        ("a.parquet", "no parquet", "could not be read as parquet"),
    ],
)
def test_unusable_files_are_refused(name: str, content: str, message: str, tmp_path: Path):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_documents(path)


def test_text_in_another_encoding_is_refused(tmp_path: Path):
    path = tmp_path / "latin.txt"
    path.write_bytes("ü".encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        read_documents(path)


def test_bos_is_what_was_asked_for(tokenizer: Any):
    data = ["one two", "three"]
    assert tokenize(tokenizer, data).input_ids == [[1, 3, 4], [1, 5]]
    assert tokenize(tokenizer, data, bos=True).input_ids == [[1, 3, 4], [1, 5]]
    assert tokenize(tokenizer, data, bos=False).input_ids == [[3, 4], [5]]
    assert tokenize(tokenizer, data).bos
    assert not tokenize(tokenizer, data, bos=False).bos


def test_chat_wraps_and_has_one_bos(tokenizer: Any):
    wrapped = [1, 6, 7, 3, 8, 7]  # <s> user : one assistant :
    assert tokenize(tokenizer, ["one"], chat=True).input_ids == [wrapped]
    assert tokenize(tokenizer, ["one"], chat=True, bos=True).input_ids == [wrapped]
    assert tokenize(tokenizer, ["one"], chat=True, bos=False).input_ids == [wrapped[1:]]


def test_too_long_is_cut_and_counted_or_refused(tokenizer: Any):
    data = ["one two three", "one", "two two two"]
    cut = tokenize(tokenizer, data, max_length=3)
    assert cut.input_ids == [[1, 3, 4], [1, 3], [1, 4, 4]]
    assert cut.n_truncated == 2
    assert cut.n_tokens == 8
    with pytest.raises(DataError, match=r"row 0 has 4 tokens, 3 are allowed \(2 rows"):
        tokenize(tokenizer, data, max_length=3, overflow="error")
    assert tokenize(tokenizer, data, max_length=4, overflow="error").n_truncated == 0


def test_what_a_tokenizer_cannot_do_is_refused(tokenizer: Any):
    with pytest.raises(DataError, match="texts need a tokenizer"):
        tokenize(None, ["one"])
    with pytest.raises(DataError, match="taken as they are"):
        tokenize(tokenizer, [[1, 2]], bos=True)
    with pytest.raises(DataError, match="overflow must be"):
        tokenize(tokenizer, ["one"], overflow="wrap")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="max_length must be"):
        tokenize(tokenizer, ["one"], max_length=0)
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match="no BOS token"):
        tokenize(bare, ["one"], bos=True)
    with pytest.raises(DataError, match="no chat template"):
        tokenize(bare, ["one"], chat=True)


def test_columns_get_one_type_each():
    columns = {
        "flag": [True, False],
        "np_flag": [np.bool_(True), np.bool_(False)],
        "count": [1, np.int64(2)],
        "score": [1, 2.5],
        "holed": [None, 2],
        "name": ["a", None],
        "lists": [[1], [2]],
        "mixed": ["a", 1],
        "big": [2**70, 1],
        "nul": ["a\0", "b"],
        "a/b": [1, 2],
    }
    kept = storable_columns(columns)
    kinds = {name: column.kind for name, column in kept.items()}
    assert kinds == {
        "flag": "bool", "np_flag": "bool", "count": "int", "score": "float", "holed": "float", "name": "string"
    }  # fmt: skip
    assert kept["name"].values == ["a", ""]
    assert np.isnan(kept["holed"].values[0])
    assert list(storable_columns(columns, ["count"])) == ["count"]
    with pytest.raises(DataError, match="no column 'absent'"):
        storable_columns(columns, ["absent"])
    with pytest.raises(DataError, match="column 'lists' cannot be stored"):
        storable_columns(columns, ["lists"])


def test_columns_that_cannot_be_stored_have_a_reason():
    columns = {
        "good": ["a", None, float("nan")],
        "lists": [[1], [2], None],
        "arrays": [np.array([1, 2]), np.array([3]), None],
        "two": [True, 1, 2],
        "holed": [True, None, False],
        "mixed": [3, "x", "y"],
        "a/b": ["p", "q", "r"],
        "big": [2**70, 1, 2],
        "nul": ["a\0", "b", float("nan")],
        "none": [None, None, None],
        "dates": [np.datetime64("2020-01-01")] * 3,
    }
    reasons = unstorable_columns(columns)
    assert set(storable_columns(columns)) == {"good"}
    assert set(reasons) == set(columns) - {"good", "lists", "arrays"}
    assert "several types (bool, int)" in reasons["two"]
    assert "missing values" in reasons["holed"]
    assert "several types (int, str)" in reasons["mixed"]
    assert "'/'" in reasons["a/b"]
    assert "64 bits" in reasons["big"]
    assert "NUL" in reasons["nul"]
    assert "no value" in reasons["none"]
    assert "of type date" in reasons["dates"]
    for name, reason in reasons.items():
        with pytest.raises(DataError) as caught:
            storable_columns(columns, [name])
        assert f"column {name!r} cannot be stored: {reason}" in str(caught.value)


@pytest.mark.parametrize("name", RESERVED)
def test_a_column_may_not_be_called_like_a_field_of_the_cache(name: str):
    columns = {name: ["short", "long"], "label": [0, 1]}
    for wanted in (None, [name]):
        with pytest.raises(DataError, match=f"column '{name}' has a name .* rename it .* columns="):
            storable_columns(columns, wanted)
    assert list(storable_columns(columns, ["label"])) == ["label"]
    assert list(storable_columns({name: [[1], [2]], "label": [0, 1]})) == ["label"]  # lists: no label by their form


def test_real_corpora_and_tokenizer(shared_data: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "stories260K")
    stories = read_documents(shared_data / "corpora" / "tinystories_1000.json")
    assert len(stories) == 1000
    tokens = tokenize(tokenizer, Documents(stories.texts[:20] if stories.texts else None), max_length=64, bos=True)
    assert all(row[0] == tokenizer.bos_token_id and len(row) <= 64 for row in tokens.input_ids)
    text = (stories.texts or [""])[0]
    assert text.startswith(tokenizer.decode(tokens.input_ids[0], skip_special_tokens=True).strip()[:100])


def test_a_saved_hugging_face_dataset_is_read(tmp_path):
    from datasets import Dataset, DatasetDict

    dataset = Dataset.from_list([{"text": "one", "label": 1}, {"text": "two", "label": 0}])
    dataset.save_to_disk(tmp_path / "one")
    made = read_documents(tmp_path / "one")
    assert made.texts == ["one", "two"]
    assert made.columns["label"] == [1, 0]
    DatasetDict({"train": dataset}).save_to_disk(tmp_path / "many")
    with pytest.raises(DataError, match="train"):
        read_documents(tmp_path / "many")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="is a directory"):
        read_documents(tmp_path / "none")
