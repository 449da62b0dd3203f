from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probe.data import Labelled, Pairs, Questions, group_folds, split_groups, word_data
from probe.errors import DataError, LabelError

ROW = {"id": "a", "group": "ann", "question": "Where does Ann live?", "answer": "Oslo", "paraphrases": ["Ann lives in"]}


def test_rows_survive_save_and_load(tmp_path):
    questions = Questions.from_rows([{**ROW, "attribute": "city"}, {**ROW, "id": "b", "perturbed_answers": ["Rome"]}])
    again = Questions.load(questions.save(tmp_path / "q.jsonl"))
    assert again.rows[1].perturbed_answers == ("Rome",)
    assert again.rows[0].meta["attribute"] == "city"
    assert again.to_df()["attribute"].iloc[0] == "city"
    assert [row.id for row in again] == ["a", "b"] and again.groups == ["ann", "ann"]


def test_json_list_is_read_too(tmp_path):
    path = tmp_path / "q.json"
    path.write_text(json.dumps([ROW]))
    assert Questions.load(path)[0].answer == "Oslo"


@pytest.mark.parametrize(
    ("kind", "rows", "says"),
    [
        (Questions, [], "at least one row"),
        (Questions, [{**ROW, "answer": ""}], "non-empty 'answer'"),
        (Questions, [{**ROW, "question": 3}], "must be a string"),
        (Questions, [ROW, ROW], "unique ids"),
        (Questions, [{**ROW, "paraphrases": "one"}], "list of strings"),
        (Pairs, [{"clean": "a", "corrupted": "b", "answer": "c"}], "non-empty 'wrong'"),
        (Labelled, [{"text": "a"}], "non-empty 'label'"),
    ],
)
def test_bad_rows_are_refused(kind, rows, says):
    with pytest.raises(DataError, match=says):
        kind.from_rows(rows)


@pytest.mark.parametrize("content", ["", "not json", '"a string"\n'])
def test_bad_files_are_refused(tmp_path, content):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(DataError):
        Questions.load(path)
    with pytest.raises(DataError, match="is not one"):
        Questions.load(tmp_path / "absent.jsonl")


def test_a_label_of_zero_is_a_label():
    assert Labelled.from_rows([{"text": "a", "label": 0}]).labels == [0]


@given(
    st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=8, max_size=60), st.integers(2, 5), st.integers(0, 3)
)
@settings(max_examples=60, deadline=None)
def test_folds_cover_every_row_once_and_no_group_twice(rows, n_folds, seed):
    groups, labels = [g for g, _ in rows], [y for _, y in rows]
    fewest = min(len({g for g, y in rows if y == label}) for label in set(labels))
    if fewest < 2:
        with pytest.raises(LabelError):
            group_folds(groups, n_folds, seed, labels)
        return
    folds = group_folds(groups, n_folds, seed, labels)
    assert Counter(int(i) for _, test in folds for i in test) == Counter(range(len(rows)))
    for train, test in folds:
        assert not {groups[i] for i in train} & {groups[i] for i in test}
        assert len(test) > 0


def test_folds_are_stratified_where_groups_allow():
    groups = [g for g in range(40) for _ in range(5)]
    labels = [g < 8 for g in groups]
    for _, test in group_folds(groups, 4, seed=3, labels=labels):
        assert sum(labels[i] for i in test) == 10  # two of the eight positive groups
        assert len(test) == 50


def test_split_shares_no_group():
    groups = list(np.repeat(np.arange(20), 3))
    parts = split_groups(groups, seed=1)
    sets = [{groups[i] for i in rows} for rows in parts.values()]
    assert [len(s) for s in sets] == [10, 5, 5] or sum(map(len, sets)) == 20
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]
    assert sorted(int(i) for rows in parts.values() for i in rows) == list(range(60))


def test_split_needs_a_group_a_part():
    with pytest.raises(DataError, match="at least as many groups"):
        split_groups(["a", "b"])
    with pytest.raises(DataError, match="positive"):
        split_groups(["a", "b"], {"x": 1.0, "y": 0.0})


STORIES = [
    f"Once there was a girl named {name}. She ran and ran. Then {name} ate. In the end {name} slept."
    for name in ["Lily", "Tom", "Lily", "Ben"] * 8
]


def test_word_data_cuts_contexts_before_the_second_mention():
    made = word_data(STORIES, "Lily", ["Tom", "Ben"], n_tokens=lambda text: len(text.split()))
    assert made.forget[0].question == "Once there was a girl named Lily. She ran and ran. Then"
    assert {row.answer for row in made.forget} == {"Lily"} and {row.answer for row in made.retain} == {"Tom", "Ben"}
    assert not set(made.forget.groups) & set(made.retain.groups)
    assert {row.label for row in made.labelled} == {"Lily", "Tom", "Ben"}
    for pair in made.pairs:
        assert pair.corrupted == pair.clean.replace("Lily", pair.wrong) and pair.answer == "Lily"


def test_word_data_shortens_at_sentences_and_keeps_the_mention():
    long = ["Lily came. " + "It was a day. " * 5 + "So Lily met Max. One day, Lily left." for _ in range(9)]
    others = ["There was Tom. Soon Tom left." for _ in range(9)]
    made = word_data(long + others, "Lily", ["Tom"], max_words=6)
    assert made.forget[0].question == "So Lily met Max. One day,"


@pytest.mark.parametrize(
    ("word", "others", "says"),
    [("Lily", ["Lily"], "also among"), ("Zoe", ["Tom"], "Only 0 contexts"), ("Lily", ["Zoe"], "Only 0")],
)
def test_word_data_says_what_is_missing(word, others, says):
    with pytest.raises(DataError, match=says):
        word_data(STORIES, word, others)


def test_word_data_needs_a_pair_of_equal_length():
    with pytest.raises(DataError, match="no pair"):
        word_data(STORIES, "Lily", ["Tom"], n_tokens=lambda text: len(text.replace("Tom", "T o m")))
