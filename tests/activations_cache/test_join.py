"""Joins and concatenations, held against arrays put together by numpy; and caches that do not go together."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from activations_cache._join import concat, join
from activations_cache.errors import CacheMismatchError, DataError
from tests.activations_cache.handmade import Content, assert_reads_as, part, random_content, write

SITE = "blocks.0.hook_a"


def without(content: Content, *names: str) -> Content:
    """A content without some sites or columns."""
    made = copy.copy(content)
    made.sites = {name: value for name, value in content.sites.items() if name not in names}
    made.columns = {name: value for name, value in content.columns.items() if name not in names}
    made.token_columns = {name: value for name, value in content.token_columns.items() if name not in names}
    return made


def appended(first: Content, second: Content) -> Content:
    """Two contents end to end; the columns that both have."""
    return Content(
        first.ids + second.ids,
        first.positions + second.positions,
        {name: (np.concatenate([v, second.sites[name][0]]), dtype) for name, (v, dtype) in first.sites.items()},
        {name: v + second.columns[name] for name, v in first.columns.items() if name in second.columns},
        {
            name: v + second.token_columns[name]
            for name, v in first.token_columns.items()
            if name in second.token_columns
        },
    )


WHOLE = random_content(sites=("a", "b", "c"))
LEFT, RIGHT = without(WHOLE, "blocks.2.hook_c", "named"), without(WHOLE, SITE, "blocks.1.hook_b", "author", "logprob")
MORE = random_content(n=11, seed=8, sites=("a", "b", "c"))


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two caches of the same rows, in shards of other sizes, and two more; do not change them."""
    place = tmp_path_factory.mktemp("join")
    return {
        "left": write(place / "left", LEFT, per_shard=7),
        "right": write(place / "right", RIGHT, per_shard=11, compression="gzip"),
        "whole": write(place / "whole", WHOLE, per_shard=9),
        "more": write(place / "more", MORE, per_shard=4),
    }


# --- join -----------------------------------------------------------------------------------------------------------


def joined_content() -> Content:
    sites = {name: WHOLE.sites[name] for name in (*LEFT.sites, "blocks.2.hook_c")}
    return Content(WHOLE.ids, WHOLE.positions, sites, WHOLE.columns, WHOLE.token_columns)


def test_a_join_has_the_sites_and_columns_of_all(caches: dict[str, Any]):
    made = join(caches["left"], caches["right"])
    assert_reads_as(made, joined_content())
    assert made.paths == (caches["left"].path, caches["right"].path)
    assert "blocks.2.hook_c.alias" in made
    assert "left" in made.info()
    assert "join" in made._repr_html_()
    assert made.plot().data


def test_batches_of_sites_of_several_caches_are_of_the_same_rows(caches: dict[str, Any]):
    made = join(caches["left"], caches["right"])
    left, right = WHOLE.sites[SITE][0], WHOLE.sites["blocks.2.hook_c"][0]
    together = {tuple(a.tolist()): tuple(b.tolist()) for a, b in zip(left, right, strict=True)}
    seen = 0
    for first, second in made.batches([SITE, "blocks.2.hook_c"], 6, buffer_bytes=2000):
        for a, b in zip(first, second, strict=True):
            assert together[tuple(a.tolist())] == tuple(b.tolist())
            seen += 1
    assert seen == len(made)


def test_parts_of_joins_and_joins_of_the_same_parts_agree(caches: dict[str, Any]):
    made = join(caches["left"], caches["right"]).where(toxic=True)
    parts = join(caches["left"].where(toxic=True), caches["right"].where(toxic=True))
    rows = np.isin(WHOLE.sequence, np.flatnonzero(WHOLE.columns["toxic"]))
    expected = part(joined_content(), rows, np.flatnonzero(WHOLE.columns["toxic"]))
    assert_reads_as(made, expected)
    assert_reads_as(parts, expected)


def test_caches_of_other_rows_do_not_join(caches: dict[str, Any], tmp_path: Path):
    left, right = caches["left"], caches["right"]
    with pytest.raises(CacheMismatchError, match="other token ids"):
        join(left, caches["more"])
    with pytest.raises(CacheMismatchError, match=r"has \d+ rows, not \d+"):
        join(left, right.where(toxic=True))
    with pytest.raises(CacheMismatchError, match="another choice of rows"):
        join(left.select(rows=range(9)), right.select(rows=range(1, 10)))
    moved = copy.copy(RIGHT)
    moved.positions = [list(range(len(kept))) for kept in WHOLE.positions]
    with pytest.raises(CacheMismatchError, match="other positions"):
        join(left, write(tmp_path / "moved", moved))


def test_a_site_in_two_types_does_not_join_and_one_held_twice_is_the_first(caches: dict[str, Any], tmp_path: Path):
    halves = copy.copy(LEFT)
    halves.sites = {SITE: (LEFT.sites[SITE][0].astype("<f2"), "float16")}
    with pytest.raises(CacheMismatchError, match=r"blocks.0.hook_a is float32 \[3\] in .* and float16 \[3\]"):
        join(caches["left"], write(tmp_path / "halves", halves))
    made = join(caches["left"], caches["whole"])
    assert made.sites == (*LEFT.sites, "blocks.2.hook_c")
    assert torch.equal(made[SITE][:], caches["left"][SITE][:])


def test_other_values_of_one_site_do_not_join(caches: dict[str, Any], tmp_path: Path):
    other = copy.copy(LEFT)
    other.sites = {**LEFT.sites, SITE: (LEFT.sites[SITE][0] * np.float32(1.1), "float32")}
    with pytest.raises(CacheMismatchError, match=r"blocks.0.hook_a has a mean norm of .* not the same activations"):
        join(caches["left"], write(tmp_path / "other", other))
    other.sites[SITE] = (LEFT.sites[SITE][0] * np.float32(1 + 1e-5), "float32")
    assert len(join(caches["left"], write(tmp_path / "near", other))) == len(caches["left"])


def test_columns_that_contradict_each_other_do_not_join(caches: dict[str, Any], tmp_path: Path):
    other = without(WHOLE, SITE)
    other.columns = {**WHOLE.columns, "n": WHOLE.columns["n"][::-1]}
    with pytest.raises(DataError, match="column 'n' is not the same in all caches"):
        join(caches["left"], write(tmp_path / "other", other))


# --- concat ---------------------------------------------------------------------------------------------------------


def test_a_concatenation_is_one_after_the_other(caches: dict[str, Any]):
    made = concat(caches["whole"], caches["more"])
    assert_reads_as(made, appended(WHOLE, MORE))
    assert f"{len(WHOLE.ids) + len(MORE.ids)} sequences" in made.info()
    assert made.manifest["data"]["tokens"] == sum(map(len, WHOLE.ids + MORE.ids))


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_parts_put_end_to_end_and_cut_again(data: st.DataObject, caches: dict[str, Any]):
    readers, contents = [], []
    for _ in range(data.draw(st.integers(2, 4))):
        name, content = data.draw(st.sampled_from([("whole", WHOLE), ("more", MORE)]))
        numbers = np.array(sorted(data.draw(st.sets(st.integers(0, len(content.ids) - 1), min_size=1))))
        readers.append(caches[name].select(sequences=numbers))
        contents.append(part(content, np.isin(content.sequence, numbers), numbers))
    made, expected = concat(*readers), contents[0]
    for content in contents[1:]:
        expected = appended(expected, content)
    assert_reads_as(made, expected)
    if len(made):
        mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(made), max_size=len(made))), dtype=bool)
        if mask.any():
            assert_reads_as(made.select(rows=mask), part(expected, mask, np.unique(expected.sequence[mask])))


def test_columns_that_not_all_hold_are_left_out_with_a_warning(caches: dict[str, Any], tmp_path: Path):
    other = without(MORE, "author", "entity")
    other.columns["n"] = [str(value) for value in MORE.columns["n"]]
    second = write(tmp_path / "other", other)
    with pytest.warns(UserWarning, match=r"not all caches hold them with one type: \['author', 'entity', 'n'\]"):
        made = concat(caches["whole"], second)
    first = without(WHOLE, "author", "entity", "n")
    assert_reads_as(made, appended(first, without(other, "n")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        concat(caches["whole"], caches["more"])


def test_caches_of_other_sites_or_types_do_not_concatenate(caches: dict[str, Any], tmp_path: Path):
    with pytest.raises(CacheMismatchError, match=r"same sites; .* differs in blocks.2.hook_c"):
        concat(caches["whole"], caches["left"])
    wide = copy.copy(MORE)
    wide.sites = {**MORE.sites, SITE: (np.zeros((len(MORE.sequence), 4), "<f4"), "float32")}
    with pytest.raises(CacheMismatchError, match=r"float32 \[3\] in .* and float32 \[4\] in"):
        concat(caches["whole"], write(tmp_path / "wide", wide))


# --- both -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("put", [join, concat])
def test_caches_of_other_models_do_not_go_together(put: Any, caches: dict[str, Any], tmp_path: Path):
    with pytest.raises(CacheMismatchError, match=r"weights aaaaaaaaaaaa.*weights bbbbbbbbbbbb"):
        put(caches["whole"], write(tmp_path / "b", WHOLE, weights="b" * 64))
    with pytest.raises(CacheMismatchError, match="models of another configuration"):
        put(caches["whole"], write(tmp_path / "c", WHOLE, config="d" * 64))
    unknown = write(tmp_path / "u", WHOLE, weights="unknown")
    with pytest.raises(CacheMismatchError, match="imported without its model"):
        put(unknown, unknown)


@pytest.mark.parametrize("put", [join, concat])
def test_fewer_than_two_caches_are_refused(put: Any, caches: dict[str, Any]):
    for bad in ([], [caches["left"]], [caches["left"], "acts/"], [[caches["left"], caches["right"]]]):
        with pytest.raises(DataError, match="needs two or more opened caches"):
            put(*bad)


def test_joins_of_concatenations(caches: dict[str, Any]):
    left = concat(caches["left"], caches["left"].where(toxic=True))
    right = concat(caches["right"], caches["right"].where(toxic=True))
    chosen = np.flatnonzero(WHOLE.columns["toxic"])
    again = part(joined_content(), np.isin(WHOLE.sequence, chosen), chosen)
    assert_reads_as(join(left, right), appended(joined_content(), again))
