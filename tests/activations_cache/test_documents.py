"""Reading documents from everything that holds them, and tokenizing them."""

from __future__ import annotations

import itertools
import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from activations_cache import _encode, _reading, _spool
from activations_cache import tokens as tokens_module
from activations_cache.documents import (
    RESERVED,
    Documents,
    Tokens,
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


# --- as much as there is --------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything goes to temporary files, and is read and tokenized a few rows at a time."""
    monkeypatch.setattr(_spool, "SPOOL_BYTES", 8)
    monkeypatch.setattr(_spool, "READ_AHEAD", 3)
    monkeypatch.setattr(_reading, "CHUNK_ROWS", 3)
    monkeypatch.setattr(_spool, "READ_BYTES", 40)
    monkeypatch.setattr(_encode, "CHUNK_DOCUMENTS", 4)
    monkeypatch.setattr(_encode, "CHUNK_CHARACTERS", 30)
    monkeypatch.setattr(tokens_module, "WRITE_TOKENS", 5)


def many(count: int) -> list[dict[str, Any]]:
    words = ["one", "two", "three", "naïve", "日本"]
    return [
        {"text": " ".join(words[: 1 + n % 5]), "label": n, "score": n / 2, "tags": [n, n + 1], "who": f"p{n % 3}"}
        for n in range(count)
    ]


def write_many(kind: str, folder: Path, rows: list[dict[str, Any]]) -> Path:
    path, frame = folder / f"many.{kind}", pd.DataFrame(rows)
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif kind in ("csv", "tsv"):
        frame.drop(columns="tags").to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
    else:
        frame.to_parquet(path)
    return path


@pytest.mark.usefixtures("tiny_buffers")
@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet", "generator", "frame", "dataset", "saved"])
def test_what_does_not_fit_in_memory_reads_the_same(kind: str, tmp_path: Path):
    rows = many(50)
    data: Any = {"generator": lambda: iter(rows), "frame": lambda: pd.DataFrame(rows)}.get(kind, lambda: None)()
    if kind in ("dataset", "saved"):
        datasets = pytest.importorskip("datasets")
        data = datasets.Dataset.from_list(rows)
        if kind == "saved":
            data.save_to_disk(tmp_path / "saved")
            data = tmp_path / "saved"
    read = read_documents(write_many(kind, tmp_path, rows) if data is None else data)
    texts = [row["text"] for row in rows]
    assert read.texts == texts and list(read.texts or []) == texts
    assert (read.texts or [])[7] == texts[7] and (read.texts or [])[-1] == texts[-1]
    assert (read.texts or [])[3:11] == texts[3:11] and (read.texts or [])[40::-3] == texts[40::-3]
    for name in ("label", "score", "who", *(["tags"] if kind not in ("csv", "tsv") else [])):
        assert [v.tolist() if hasattr(v, "tolist") else v for v in read.columns[name]] == [r[name] for r in rows], name
    assert list(storable_columns(read.columns)) == ["label", "score", "who"]
    assert unstorable_columns(read.columns) == {}
    with pytest.raises(IndexError):
        (read.texts or [])[50]


@pytest.mark.usefixtures("tiny_buffers")
def test_what_does_not_fit_in_memory_is_tokenized_the_same(tokenizer: Any, tmp_path: Path):
    rows = many(50)
    tokens = tokenize(tokenizer, write_many("jsonl", tmp_path, rows), max_length=4, token_columns=None)
    expected = [tokenizer(row["text"])["input_ids"][:4] for row in rows]
    assert tokens.input_ids == expected
    assert tokens.flat.dtype == np.int32 and tokens.offsets.tolist() == [0, *np.cumsum([len(e) for e in expected])]
    assert (tokens.n_tokens, tokens.n_truncated) == (sum(map(len, expected)), 20)
    assert tokens.lengths.tolist() == [len(e) for e in expected]
    assert [row.tolist() for row in tokens.input_ids[5:9]] == expected[5:9]
    ids = read_documents(iter([row[:] for row in expected]))
    assert tokenize(None, ids).input_ids == expected
    assert tokenize(None, ids).flat.base is not None  # a map of a file


def test_a_generator_of_texts_and_one_of_ids_are_used_up():
    source = iter(["one", "two"])
    assert read_documents(source).texts == ["one", "two"]
    assert next(source, None) is None
    assert read_documents(np.array(row) for row in ([1, 2], [3])).input_ids == [[1, 2], [3]]


def test_a_table_has_one_type_per_column_however_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_reading, "CHUNK_ROWS", 2)
    n = 2 * 16 * 3
    mixed, number = ["7"] * (n - 1) + ["x"], ["1"] * (n - 1) + ["1.5"]
    frame = pd.DataFrame({"text": ["1"] * n, "mixed": mixed, "number": number, "whole": range(n), "flag": [True] * n})
    frame.to_csv(tmp_path / "a.csv", index=False)
    read = read_documents(tmp_path / "a.csv")
    assert {name: column.kind for name, column in storable_columns(read.columns).items()} == {
        "mixed": "string", "number": "float", "whole": "int", "flag": "bool"
    }  # fmt: skip
    assert read.columns["mixed"] == mixed


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_an_empty_cell_among_numbers_is_a_missing_number(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    table = "text,n,x,who,flag,none,late,code\n1,1,0.5,p,True,,,7\n2,,,,,,,8\nNA,3,2,q,False,,,9\n4,4,2,q,True,,5,NA\n"
    (tmp_path / f"a.{kind}").write_text(table.replace(",", "\t" if kind == "tsv" else ","))
    for rows in (_reading.CHUNK_ROWS, 1):
        monkeypatch.setattr(_reading, "CHUNK_ROWS", rows)
        read = read_documents(tmp_path / f"a.{kind}")
        assert list(read.texts or ()) == ["1", "2", "NA", "4"]
        columns = storable_columns(read.columns)
        for name, expected in {"n": [1, None, 3, 4], "x": [0.5, None, 2, 2], "late": [None, None, None, 5]}.items():
            assert columns[name].kind == "float"
            assert [None if np.isnan(value) else value for value in columns[name].values] == expected
        strings = {"who": ["p", "", "q", "q"], "none": [""] * 4, "code": ["7", "8", "9", "NA"]}
        strings["flag"] = ["True", "", "False", "True"]
        for name, expected in strings.items():
            assert (columns[name].kind, columns[name].values) == ("string", expected)


def test_a_part_of_a_table_without_values_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_reading, "CHUNK_ROWS", 1)  # types are found over parts of 16 rows
    cells = {"who": [""] * 16 + ["p"] * 16, "n": [""] * 16 + ["1"] * 16, "m": ["1"] * 16 + ["", "2"] * 8}
    cells |= {"flag": ["True"] * 16 + [""] * 16}
    pd.DataFrame({"text": ["t"] * 32, **cells}).to_csv(tmp_path / "a.csv", index=False)
    columns = storable_columns(read_documents(tmp_path / "a.csv").columns)
    for name in ("who", "flag"):
        assert (columns[name].kind, columns[name].values) == ("string", cells[name])
    for name in ("n", "m"):
        assert columns[name].kind == "float"
        assert ["" if np.isnan(value) else str(int(value)) for value in columns[name].values] == cells[name]


def test_an_index_of_a_parquet_file_is_no_column(tmp_path: Path):
    pd.DataFrame(ROWS, index=["p", "q"]).to_parquet(tmp_path / "a.parquet")
    assert list(read_documents(tmp_path / "a.parquet").columns) == ["label", "who"]


def test_lines_may_be_called_json(tmp_path: Path, shared_data: Path):
    path = tmp_path / "a.json"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    assert read_documents(path) == read_documents(ROWS)
    path.write_text('{"text": "one"}\n{oops')
    with pytest.raises(DataError, match="line 2 is no JSON"):
        read_documents(path)
    tofu = read_documents(shared_data / "tofu" / "forget01.json")
    assert len(tofu) == 40 and tofu.turns and set(tofu.columns) == {"question", "answer"}
    halu = read_documents(shared_data / "halueval-general" / "general_data.json", "chatgpt_response")
    lines = (shared_data / "halueval-general" / "general_data.json").read_text("utf-8").splitlines()
    assert halu.texts == [json.loads(line)["chatgpt_response"] for line in lines]


def test_columns_may_come_and_go(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "x": 1}\n{"text": "b", "y": [1]}\n{"text": "c"}\n{"text": "d", "x": 2, "y": null}\n')
    read = read_documents(path)
    assert read.columns == {"x": [1, None, None, 2], "y": [None, [1], None, None]}


def test_a_full_temporary_folder_is_said(monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_spool, "SPOOL_BYTES", 8)
    monkeypatch.setattr(_spool.tempfile, "TemporaryFile", full)
    with pytest.raises(DataError, match=r"No space left on device\. Make room there, or set TMPDIR"):
        read_documents(iter(["a long text", "another"]))


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux, which limits and counts the heap")
def test_memory_is_a_chunk_and_not_the_corpus(tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    """60 MiB of texts and 40 MiB of ids are read and tokenized in a process that may take 32 MiB more than it has."""
    monkeypatch.setattr(_spool, "SPOOL_BYTES", 2**20)

    class Words:
        """As fast as a tokenizer can be: the same ids for every text."""

        is_fast, bos_token_id, ids = True, None, list(range(3000))

        def __call__(self, texts: list[str], **_: Any) -> dict[str, Any]:
            return {"input_ids": [self.ids] * len(texts)}

    def corpus() -> Iterator[str]:
        for number in range(3500):
            yield f"{number:6d}" + "x" * 18_000

    pid = os.fork()
    if not pid:
        status = 1
        try:
            held = Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]  # KiB
            resource.setrlimit(resource.RLIMIT_DATA, (int(held) * 1024 + 32 * 2**20, -1))
            tokens = tokenize(Words(), read_documents(corpus()), progress=False)
            status = 0 if tokens.n_tokens == 3500 * 3000 and tokens.input_ids[3499][-1] == 2999 else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


# --- questions and answers ------------------------------------------------------------------------------------------


def test_questions_and_answers_are_joined(tmp_path: Path, tokenizer: Any):
    rows = [{"question": "one two", "answer": "three", "id": 7}]
    read = read_documents(rows)
    assert read.texts == ["one two three"] and read.turns
    assert read.columns == {"question": ["one two"], "answer": ["three"], "id": [7]}
    assert read_documents([{**rows[0], "text": "x"}]).texts == ["x"]
    with pytest.raises(DataError, match="no column 'body'"):
        read_documents(rows, text_column="body")
    pd.DataFrame([{"question": "1", "answer": "2"}]).to_csv(tmp_path / "a.csv", index=False)
    assert read_documents(tmp_path / "a.csv").texts == ["1 2"]
    chat = tokenize(tokenizer, rows, chat=True).input_ids
    assert chat == [[1, 6, 7, 3, 4, 8, 7, 5]]  # <s> user : one two assistant : three


@pytest.mark.parametrize(
    "row", [{"question": "a", "answer": None}, {"question": "a", "answer": " "}, {"question": "a"}]
)
def test_a_question_without_an_answer_is_refused(row: dict[str, Any]):
    with pytest.raises(DataError, match="the answer of row 1 must be a text"):
        read_documents([{"question": "q", "answer": "a"}, row])


# --- how many tokens ------------------------------------------------------------------------------------------------


@st.composite
def corpora(draw: st.DrawFn) -> tuple[list[list[int]], int | None, str, int | None]:
    rows = draw(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=9))
    max_length = draw(st.none() | st.integers(1, 6))
    return rows, max_length, draw(st.sampled_from(["truncate", "split"])), draw(st.none() | st.integers(1, 40))


@settings(max_examples=300)
@given(drawn=corpora())
def test_exactly_the_tokens_asked_for(drawn: tuple[list[list[int]], int | None, str, int | None]):
    rows, max_length, overflow, n_tokens = drawn
    expected: list[list[int]] = []
    sources: list[int] = []
    for number, row in enumerate(rows):
        step = max_length or len(row)
        pieces = [row[i : i + step] for i in range(0, len(row), step)]
        for piece in pieces if overflow == "split" else pieces[:1]:
            room = len(piece) if n_tokens is None else n_tokens - sum(map(len, expected))
            if room > 0:
                expected.append(piece[:room])
                sources.append(number)
    data = [{"input_ids": row, "label": n, "tag": [f"{n}.{t}" for t in row]} for n, row in enumerate(rows)]
    asked: dict[str, Any] = {"max_length": max_length, "overflow": overflow, "n_tokens": n_tokens}
    if n_tokens is not None and sum(map(len, expected)) < n_tokens:
        with pytest.raises(
            DataError, match=f"n_tokens={n_tokens} were asked for, and the data hold {sum(map(len, expected))}"
        ):
            tokenize(None, data, **asked)
        return
    tokens = tokenize(None, data, **asked, token_columns=["tag"])
    assert tokens.input_ids == expected
    assert tokens.columns["label"] == sources
    assert tokens.columns.get("document") == (sources if overflow == "split" else None)
    assert list(tokens.columns["tag"]) == [data[n]["tag"] for n in sources]
    column = tokens.token_columns["tag"]
    assert column.categories is not None
    numbers = [number for number, row in zip(sources, expected, strict=True) for _ in row]
    flat = list(itertools.chain.from_iterable(expected))
    assert [column.categories[code] for code in column.values] == [
        f"{n}.{t}" for n, t in zip(numbers, flat, strict=True)
    ]
    seen = rows[: max(sources) + 1]
    long = sum(max_length is not None and len(row) > max_length for row in seen)
    assert tokens.n_truncated == (long if overflow == "truncate" else 0)


def test_a_split_document_keeps_its_bos_and_the_datas_own_numbers(tokenizer: Any):
    text = "one two three one two three one"
    assert tokenize(tokenizer, [text], 3, overflow="split").input_ids == [[1, 3, 4], [5, 3, 4], [5, 3]]
    again = tokenize(tokenizer, [text, "one"], 3, bos=True, overflow="split")
    assert again.input_ids == [[1, 3, 4], [1, 5, 3], [1, 4, 5], [1, 3], [1, 3]]
    assert again.bos and again.columns == {"document": [0, 0, 0, 0, 1]} and again.n_truncated == 0
    cut = tokenize(tokenizer, [text], 3, bos=True, overflow="split", n_tokens=5)
    assert cut.input_ids == [[1, 3, 4], [1, 5]]
    own = tokenize(tokenizer, [{"text": text, "document": "d"}], 4, overflow="split")
    assert own.columns == {"document": ["d", "d"]}
    with pytest.raises(DataError, match="max_length must be at least 2"):
        tokenize(tokenizer, [text], 1, bos=True, overflow="split")
    with pytest.raises(DataError, match="n_tokens must be at least 1"):
        tokenize(tokenizer, [text], n_tokens=0)


def test_documents_beyond_the_tokens_asked_for_are_not_tokenized(tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_encode, "CHUNK_DOCUMENTS", 2)
    called: list[int] = []

    class Counting:
        bos_token_id = None
        is_fast = True

        def __call__(self, texts: list[str], **more: Any) -> Any:
            called.append(len(texts))
            return tokenizer(texts, **more)

    assert tokenize(Counting(), ["one"] * 100, n_tokens=5).n_tokens == 5
    assert sum(called) == 4


# --- one value per token --------------------------------------------------------------------------------------------


def test_values_per_token_of_ids():
    rows = [
        {"input_ids": [1, 2, 3], "pos": ["N", "V", None], "is": [True, False, True], "n": [1, 2, 3], "x": [1, 2.5, 3]},
        {"input_ids": [4, 5], "pos": ["V", "N"], "is": np.array([False, True]), "n": [None, 2**62], "x": None},
    ]
    made = tokenize(None, rows, token_columns=["pos", "is", "n", "x"]).token_columns
    assert {name: (column.kind, column.values.dtype) for name, column in made.items()} == {
        "pos": ("string", np.int32), "is": ("bool", np.int8), "n": ("int", np.int64), "x": ("float", np.float64)
    }  # fmt: skip
    assert made["pos"].categories == ("", "N", "V") and made["pos"].values.tolist() == [1, 2, 0, 2, 1]
    assert made["is"].values.tolist() == [1, 0, 1, 0, 1]
    assert made["n"].values.tolist() == [1, 2, 3, -1, 2**62]
    np.testing.assert_array_equal(made["x"].values, [1, 2.5, 3, np.nan, np.nan])
    assert made["x"].categories is None


def test_integers_become_floats_when_a_float_comes_and_wait_for_their_first_value():
    rows = [{"input_ids": [1, 2], "x": entry} for entry in (None, [1, None], [0.5, 2], [3, None])]
    column = tokenize(None, rows, token_columns=["x"]).token_columns["x"]
    np.testing.assert_array_equal(column.values, [np.nan, np.nan, 1, np.nan, 0.5, 2, 3, np.nan])


@pytest.mark.usefixtures("tiny_buffers")
def test_values_per_token_of_a_large_corpus(tmp_path: Path):
    rows = [{"input_ids": [n] * (1 + n % 3), "x": list(range(n, n + 1 + n % 3)), "k": n} for n in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokens = tokenize(None, tmp_path / "a.jsonl", 2, overflow="split", token_columns=["x"])
    expected = [row["x"][i : i + 2] for row in rows for i in range(0, len(row["x"]), 2)]
    assert tokens.token_columns["x"].values.tolist() == list(itertools.chain.from_iterable(expected))
    assert tokens.columns["k"] == [row["k"] for row in rows for _ in range(0, len(row["x"]), 2)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 2, 3], "column 'x': row 1 has 3 values for 2 tokens"),
        (7, "column 'x': row 1 must have a list, one value per token; got 7"),
        ([1, "a"], "row 1 holds values of type int, str"),
        ([True, 1], "row 1 holds values of type bool, int"),
        (["a", "b"], "row 1 holds values of type string, the rows before it int"),
        ([True, False], "row 1 holds values of type bool, the rows before it int"),
        ([[1], [2]], "row 1 holds values of type list"),
        ([2**64, 1], "row 1 holds an integer beyond 64 bits"),
        ([{"start": 0, "stop": 1, "label": 1}], "column 'x': row 1 has 1 values for 2 tokens"),
    ],
)
def test_values_that_fit_no_token_are_refused(values: Any, message: str):
    with pytest.raises(DataError, match=message):
        tokenize(None, [{"input_ids": [1], "x": [1]}, {"input_ids": [1, 2], "x": values}], token_columns=["x"])


def test_token_columns_must_be_there():
    row = {"input_ids": [1], "x": [None], "mask": [1], "a/b": [1]}
    for asked, message in (
        (["y"], "no column 'y' in the data"),
        ("x", "must be a list of names"),
        (["mask"], "column 'mask' has a name .* token_columns="),
        (["a/b"], "column 'a/b' cannot be stored: its name has a '/'"),
    ):
        with pytest.raises(DataError, match=message):
            tokenize(None, [row], token_columns=asked)
    with pytest.raises(DataError, match="column 'x' has no value for any token"):
        tokenize(None, [row], token_columns=["x"])


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def real(request: pytest.FixtureRequest, shared_data: Path) -> Any:
    """GPT-2's tokenizer, of bytes; and a Llama's, which adds BOS and a space in front."""
    from transformers import AutoTokenizer, GPT2TokenizerFast

    if request.param == "gpt2":
        return GPT2TokenizerFast.from_pretrained(shared_data / "tokenizers" / "gpt2")
    return AutoTokenizer.from_pretrained(shared_data / "stories260K")


@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("chat", [False, True])
@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.text(min_size=1, max_size=12).filter(str.strip), min_size=1, max_size=6))
def test_texts_are_tokenized_as_one_by_one(real: Any, bos: bool | None, chat: bool, texts: list[str]):
    held, real.chat_template = real.chat_template, "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}"
    try:
        expected = []
        for text in texts:
            own = f"<u>{text}</u>" if chat else text
            plain = real(own, add_special_tokens=False)["input_ids"]
            whole = plain if chat else real(own)["input_ids"]
            expected.append(whole if bos is None else [real.bos_token_id, *plain] if bos else plain)
        if not all(expected):
            with pytest.raises(DataError, match="has no token"):
                tokenize(real, texts, bos=bos, chat=chat)
            return
        tokens = tokenize(real, texts, bos=bos, chat=chat)
    finally:
        real.chat_template = held
    assert tokens.input_ids == expected
    assert tokens.bos == all(row[0] == real.bos_token_id for row in expected)


def naive(tokenizer: Any, ids: list[int], start: int, stop: int) -> list[bool]:
    """Whether a token spells a character of a span, from what the tokens up to it decode to.

    A Llama's first token may be the space that it puts in front, which counts as the first character.
    """
    ends = [len(tokenizer.decode(ids[: i + 1], skip_special_tokens=True)) for i in range(len(ids))]
    front = [own not in tokenizer.all_special_ids and not end and not start for own, end in zip(ids, ends, strict=True)]
    spelt = [b > start and a < stop and b > a for a, b in itertools.pairwise([0, *ends])]
    return [a or b for a, b in zip(front, spelt, strict=True)]


@pytest.mark.parametrize("bos", [None, True, False])
@settings(max_examples=40, deadline=None)
@given(
    words=st.lists(st.sampled_from(["Paris", "the", "unbelievable", "a", "42"]), min_size=1, max_size=6), data=st.data()
)
def test_spans_label_the_tokens_that_spell_them(real: Any, bos: bool | None, words: list[str], data: st.DataObject):
    text = " ".join(words)
    start = data.draw(st.integers(0, len(text) - 1))
    stop = data.draw(st.integers(start + 1, len(text)))
    span = {"start": start, "stop": stop, "label": "x"}
    row = {"text": text, "label": [span], "mask": [{"start": start, "stop": stop}]}
    tokens = tokenize(real, [row], bos=bos, token_columns=["label"], positions="mask")
    ids = tokens.input_ids[0].tolist()
    expected = naive(real, ids, start, stop)
    assert tokens.token_columns["label"].values.tolist() == [int(held) for held in expected]
    assert tokens.masks is not None and tokens.masks.tolist() == expected


def test_spans_meet_miss_and_are_cut(real: Any):
    text = "The quick brown fox"
    spans = [
        {"start": 4, "stop": 9, "label": 1},
        {"start": 10, "stop": 15, "label": 2},
        {"start": 4, "stop": 19, "label": 3},
    ]
    for held in (spans[:2], spans, []):
        rows = [{"text": text, "x": held}, {"text": "quick", "x": spans[:1] and [{"start": 0, "stop": 5, "label": 9}]}]
        tokens = tokenize(real, rows, 4, token_columns=["x"])
        expected = []
        for row in rows:
            ids = tokenize(real, [row["text"]]).input_ids[0].tolist()
            own = [-1] * len(ids)
            for span in row["x"]:  # the last wins
                inside = naive(real, ids, span["start"], span["stop"])
                own = [span["label"] if yes else old for yes, old in zip(inside, own, strict=True)]
            expected += own[:4]
        assert tokens.token_columns["x"].values.tolist() == expected


def test_values_per_token_of_texts_may_leave_out_what_the_tokenizer_adds(real: Any):
    text = "The quick brown fox"
    own = len(real(text, add_special_tokens=False)["input_ids"])
    for bos in (None, True, False):
        whole = tokenize(real, [text], bos=bos).n_tokens
        for count in {own, whole}:
            tokens = tokenize(real, [{"text": text, "x": list(range(count))}], bos=bos, token_columns=["x"])
            assert tokens.token_columns["x"].values.tolist() == [-1] * (whole - count) + list(range(count))
    with pytest.raises(DataError, match=f"row 0 has {own - 1} values for {whole} tokens"):
        tokenize(real, [{"text": text, "x": list(range(own - 1))}], bos=False, token_columns=["x"])


def test_spans_follow_their_text_into_a_chat(real: Any):
    held, real.chat_template = (
        real.chat_template,
        "{% for m in messages %}<{{ m.role }}> {{ m.content | trim }} Paris{% endfor %}",
    )
    try:
        row = {"text": "  Paris is big. ", "x": [{"start": 2, "stop": 7, "label": True}]}
        tokens = tokenize(real, [row], chat=True, token_columns=["x"])
        turns = {"question": "Where?", "answer": "Paris", "x": [{"start": 0, "stop": 2, "label": True}]}
        with pytest.raises(DataError, match="the chat template leaves no one place for its text"):
            tokenize(real, [turns], chat=True, token_columns=["x"])
    finally:
        real.chat_template = held
    marked = tokens.token_columns["x"].values.astype(bool)
    ids = tokens.flat
    assert real.decode(ids[marked]).strip() == "Paris"
    assert real.decode(ids[: marked.argmax()]).strip() == "<user>"


@pytest.mark.parametrize(
    ("span", "message"),
    [
        ({"start": 0, "stop": 4, "label": 1}, "0 <= start < stop <= 3"),
        ({"start": 2, "stop": 2, "label": 1}, "0 <= start < stop <= 3"),
        ({"start": -1, "stop": 2, "label": 1}, "0 <= start < stop <= 3"),
        ({"start": 0.0, "stop": 2, "label": 1}, "must be characters"),
        ({"stop": 2, "label": 1}, "must be characters"),
        ({"start": 0, "stop": 2}, "a span without a label"),
    ],
)
def test_spans_that_are_none_are_refused(tokenizer: Any, span: Any, message: str):
    rows = [{"text": "one", "x": []}, {"text": "one", "x": [span]}]
    with pytest.raises(DataError, match=message) as caught:
        tokenize(tokenizer, rows, token_columns=["x"])
    assert "column 'x': row 1" in str(caught.value)


def test_rows_of_ids_make_tokens():
    tokens = Tokens.from_rows([[1, 2], np.array([3]), torch.tensor([4, 5, 6])], bos=True)
    assert tokens.input_ids == [[1, 2], [3], [4, 5, 6]] and tokens.bos
    assert (len(tokens), tokens.n_tokens, tokens.lengths.tolist()) == (3, 6, [2, 1, 3])
    assert tokens.input_ids[-1].tolist() == [4, 5, 6] and tokens.input_ids[0].dtype == np.int32
    assert tokens.input_ids[1:] == [[3], [4, 5, 6]]
    assert [row.tolist() for row in tokens.input_ids[::2]] == [[1, 2], [4, 5, 6]]
    assert tokens.input_ids != [[1, 2], [3], [4, 5, 7]] and tokens.input_ids != [[1, 2]]
    with pytest.raises(IndexError):
        tokens.input_ids[3]
    with pytest.raises(DataError, match="row 1 holds no token id"):
        Tokens.from_rows([[1], []])
    with pytest.raises(DataError, match="row 0 holds token id 2147483648; ids beyond"):
        Tokens.from_rows([[2**31]])


# --- what UTF-8 cannot encode ---------------------------------------------------------------------------------------

LONE = "a\ud800b"


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (["fine", LONE], r"the text of row 1 holds"),
        (Documents(["fine", LONE]), r"the text of row 1 holds"),
        (({"text": text} for text in ("fine", LONE)), r"the text of row 1 \(column 'text'\) holds"),
        ([{"question": "q", "answer": LONE}], r"the text of row 0 \(columns 'question' and 'answer'\) holds"),
    ],
)
def test_a_text_with_half_a_surrogate_pair_is_refused(data: Any, place: str):
    with pytest.raises(DataError, match=place + r" the lone surrogate '\\ud800'"):
        read_documents(data)


def test_a_file_can_spell_half_a_surrogate_pair(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a \\ud83d\\ude00"}\n{"text": "a \\ud83d"}\n')  # a whole pair, and a half
    with pytest.raises(DataError, match=r"the text of row 1 \(column 'text'\) holds the lone surrogate '\\ud83d'"):
        read_documents(path)
    path.write_text('{"text": "a \\ud83d\\ude00"}\n')
    assert list(read_documents(path).texts or ()) == ["a \U0001f600"]


@pytest.mark.parametrize("chosen", [True, False])
def test_labels_and_names_with_half_a_surrogate_pair_are_refused(chosen: bool):
    for columns, message in [
        ({"who": ["x", None, LONE], "n": [1, 2, 3]}, r"column 'who': row 2 holds the lone surrogate '\\ud800'"),
        ({LONE: [1, 2, 3], "n": [1, 2, 3]}, r"column 'a\\ud800b' cannot be stored: its name holds the lone surrogate"),
    ]:
        with pytest.raises(DataError, match=message):
            storable_columns(columns, list(columns) if chosen else None)
        assert set(storable_columns(columns, ["n"])) == {"n"}


def test_token_columns_with_half_a_surrogate_pair_are_refused():
    rows = [{"input_ids": [1, 2], "tag": ["x", "y"]}, {"input_ids": [3], "tag": [LONE]}]
    with pytest.raises(DataError, match=r"column 'tag': row 1 holds the lone surrogate '\\ud800'"):
        tokenize(None, rows, token_columns=["tag"])
    with pytest.raises(DataError, match=r"column 'a\\ud800b' cannot be stored: its name holds the lone surrogate"):
        tokenize(None, [{"input_ids": [1], LONE: [1]}], token_columns=[LONE])


def test_the_columns_to_keep_are_a_list():
    with pytest.raises(DataError, match=r"columns must be a list of names; got the text 'ab': pass \['ab'\]"):
        storable_columns({"a": [1], "b": [2]}, "ab")
