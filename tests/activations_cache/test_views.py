"""Whole sequences, parts by label and by number, compressed sites: held against the arrays they were made from."""

from __future__ import annotations

import copy
import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import activations_cache as ac
from activations_cache.errors import CorruptCacheError, DataError, SiteError
from tests.activations_cache.handmade import Content, as_float, assert_reads_as, part, random_content, write

SITE = "blocks.0.hook_a"
CONTENT = random_content()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache of some positions with every kind of column; do not change it."""
    return write(tmp_path_factory.mktemp("views") / "acts", CONTENT)


# --- whole caches and sequences -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("compression", [None, "gzip", "lzf"])
def test_every_field_reads_as_it_was_written(dtype: str, compression: str | None, tmp_path: Path):
    content = random_content(seed=3, dtype=dtype)
    made = write(tmp_path / "acts", content, compression=compression)
    assert_reads_as(made, content)
    values, numbers = as_float(content.sites[SITE][0], dtype), np.array([5, 0, 0, len(made) - 1, 17, 5])
    np.testing.assert_array_equal(made[SITE][numbers].double().numpy(), values[numbers])
    drawn = torch.cat(list(made.batches(SITE, 7, buffer_bytes=200))).double().numpy()
    assert sorted(map(tuple, drawn.tolist())) == sorted(map(tuple, values.tolist()))


def test_a_sequence_is_read_from_its_shard_alone(cache: Any, tmp_path: Path):
    broken = Path(shutil.copytree(cache.path, tmp_path / "acts"))
    (broken / "shard-00001.h5").unlink()
    opened = ac.open(broken, check=False)
    found = opened.sequence(-1, SITE)
    assert found.input_ids.tolist() == CONTENT.ids[-1]
    np.testing.assert_array_equal(
        found.values.numpy(), CONTENT.sites[SITE][0][CONTENT.sequence == len(CONTENT.ids) - 1]
    )
    with pytest.raises(CorruptCacheError, match=r"shard-00001.h5 is missing; sequences 7 to 13"):
        opened.sequence(8, SITE)


def test_a_sequence_of_several_sites_and_aliases(cache: Any):
    values, ids, positions = cache.sequence(4, [SITE, "blocks.1.hook_b.alias"])
    assert list(values) == [SITE, "blocks.1.hook_b.alias"]
    assert (ids.tolist(), positions.tolist()) == (CONTENT.ids[4], CONTENT.positions[4])
    empty = next(number for number, kept in enumerate(CONTENT.positions) if not kept)
    assert cache.sequence(empty, SITE).values.shape == (0, 3)


@pytest.mark.parametrize("number", [99, -99, 1.5, "x", [1, 2], None])
def test_sequences_that_are_none_are_refused(number: Any, cache: Any):
    with pytest.raises(DataError, match="sequence"):
        cache.sequence(number, SITE)


def test_unknown_sites_of_a_sequence_are_refused(cache: Any):
    with pytest.raises(SiteError, match=r"did you mean blocks\.0\.hook_a"):
        cache.sequence(0, "blocks.0.hook_aa")


# --- where ----------------------------------------------------------------------------------------------------------


def masks(content: Content, chosen: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Row mask and sequence numbers of a filter, by brute force over rows."""
    by_sequence = {"author", "toxic", "n"} & set(chosen)
    fits = [all(content.columns[name][i] in chosen[name] for name in by_sequence) for i in range(len(content.ids))]
    rows = np.array(
        [
            fits[s] and all(content.token_columns[name][r] in chosen[name] for name in set(chosen) - by_sequence)
            for r, s in enumerate(content.sequence.tolist())
        ],
        dtype=bool,
    )
    if set(chosen) - by_sequence:
        return rows, np.unique(content.sequence[rows])
    return rows, np.flatnonzero(fits)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_where_is_a_filter_by_brute_force(data: st.DataObject, cache: Any):
    values = {**CONTENT.columns, **CONTENT.token_columns}
    names = data.draw(st.lists(st.sampled_from(["author", "toxic", "n", "entity", "named"]), min_size=1, unique=True))
    chosen = {
        name: data.draw(st.lists(st.sampled_from(sorted(set(values[name]))), min_size=1, max_size=20, unique=True))
        for name in names
    }
    rows, sequences = masks(CONTENT, chosen)
    asked = {
        name: found[0]
        if len(found) == 1
        else (lambda column, kept=found: np.isin(column, kept))
        if name == "n"
        else found
        for name, found in chosen.items()
    }
    if not rows.any() and not len(sequences):
        with pytest.raises(DataError, match=r"no row is left by|no sequence has"):
            cache.where(asked)
        return
    view = cache.where(asked)
    assert view.row_numbers.tolist() == np.flatnonzero(rows).tolist()
    assert view.sequence_numbers.tolist() == sequences.tolist()
    assert_reads_as(view, part(CONTENT, rows, sequences))


def test_where_takes_sets_tensors_functions_missing_values_and_the_cache_own_fields(cache: Any):
    n = np.array(CONTENT.columns["n"])
    assert cache.where(n={3, 5}).sequence_numbers.tolist() == [3, 5]
    assert cache.where(n=torch.tensor([5, 3])).sequence_numbers.tolist() == [3, 5]
    assert cache.where(n=range(4, 6)).sequence_numbers.tolist() == [4, 5]
    assert cache.where(n=lambda v: v > 20).sequence_numbers.tolist() == n[n > 20].tolist()
    assert cache.where(score=math.nan).sequence_numbers.tolist() == n[n % 5 == 0].tolist()
    lengths = np.array([len(row) for row in CONTENT.ids])
    assert cache.where(length=lambda v: v > 5).sequence_numbers.tolist() == np.flatnonzero(lengths > 5).tolist()
    assert cache.where(position=0).row_numbers.tolist() == np.flatnonzero(CONTENT.position == 0).tolist()
    confident = np.array(CONTENT.token_columns["logprob"]) > 0
    assert cache.where(logprob=lambda v: v > 0).row_numbers.tolist() == np.flatnonzero(confident).tolist()


BAD_CONDITIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no condition": ({}, "where needs a condition on one of"),
    "unknown column": ({"auther": "a"}, r"no column 'auther'; its columns are \[.*did you mean 'author'"),
    "unknown value": ({"author": "ä9"}, r"column 'author' has no value 'ä9'; its values are 'ä0', 'ä1', 'ä2'"),
    "one unknown of several": ({"author": ["ä0", "ä9"]}, "has no value 'ä9'"),
    "unknown number": ({"n": 99}, "it has 30 values from 0 to 29"),
    "another type": ({"toxic": "yes"}, "has no value 'yes'; its values are False, True"),
    "None": ({"author": None}, "has no value None"),
    "nothing fits all": ({"author": "ä0", "n": 1}, "no sequence has author='ä0', n=1"),
    "no row fits": ({"n": 0, "logprob": lambda v: v > 1e9}, "no row is left by"),
    "a function of single values": (
        {"n": lambda v: True},
        r"must return a boolean array of its shape; it returned bool",
    ),
    "a function of numbers": ({"n": lambda v: v}, "it returned ndarray int64"),
    "the ids": ({"input_ids": 3}, "no column 'input_ids'"),
}


@pytest.mark.parametrize("name", BAD_CONDITIONS)
def test_conditions_that_fit_nothing_say_what_there_is(name: str, cache: Any):
    conditions, message = BAD_CONDITIONS[name]
    with pytest.raises(DataError, match=message):
        cache.where(conditions)


# --- select ---------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_select_is_indexing_and_views_of_views_compose(data: st.DataObject, cache: Any):
    content, reader = CONTENT, cache
    for _ in range(data.draw(st.integers(1, 3))):
        n_rows, n_sequences = len(content.sequence), len(content.ids)
        by_rows = data.draw(st.booleans()) and n_rows > 0
        size = n_rows if by_rows else n_sequences
        numbers = np.array(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=size))))
        mask = np.zeros(size, bool)
        mask[numbers] = True
        if by_rows:
            rows, sequences = mask, np.unique(content.sequence[mask])
            reader = reader.select(rows=data.draw(st.sampled_from([numbers, mask, numbers.tolist()])))
        else:
            rows, sequences = np.isin(content.sequence, numbers), numbers
            reader = reader.select(sequences=data.draw(st.sampled_from([numbers, mask, numbers.tolist()])))
        content = part(content, rows, sequences)
    assert_reads_as(reader, content)


def test_select_of_both_is_what_is_in_both(cache: Any):
    view = cache.select(rows=slice(10, 60), sequences=slice(0, None, 2))
    expected = [row for row in range(10, 60) if CONTENT.sequence[row] % 2 == 0]
    assert view.row_numbers.tolist() == expected
    assert view.sequence_numbers.tolist() == sorted({int(CONTENT.sequence[row]) for row in expected})


def test_reading_runs_of_neighbours_gives_the_same_as_gathering(tmp_path: Path):
    content = random_content(n=400, seed=9)
    made = write(tmp_path / "acts", content, per_shard=90)
    rows = np.concatenate([np.arange(3, 300), [310, 320], np.arange(400, 700)])
    view = made.select(rows=rows)
    np.testing.assert_array_equal(view[SITE][:].numpy(), content.sites[SITE][0][rows])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "needs rows= or sequences="),
        ({"rows": [3, 1]}, "rows of a view must be in rising order"),
        ({"rows": [1, 1]}, "each once"),
        ({"sequences": [2, 0]}, "sequences of a view must be in rising order"),
        ({"rows": [10**6]}, "row 1000000 is out of range"),
        ({"sequences": [30]}, "sequence 30 is out of range: there are 30 sequences"),
        ({"rows": "x"}, "must be integers"),
        ({"rows": []}, "no row is left"),
        ({"sequences": []}, "no row is left"),
        ({"rows": np.zeros((2, 2), int)}, "rising order|each once"),
    ],
)
def test_selections_that_cannot_be_are_refused(asked: dict[str, Any], message: str, cache: Any):
    with pytest.raises(DataError, match=message):
        cache.select(**asked)


# --- statistics, pages, other processes -----------------------------------------------------------------------------


def test_statistics_of_a_view_read_one_site_when_it_is_asked_for(cache: Any, tmp_path: Path):
    view = cache.where(toxic=True)
    assert view.summary(SITE) is None
    assert view.to_df()["mean_norm"].isna().all()
    view.stats[SITE]
    table = view.to_df().set_index("site")
    assert table.loc[SITE, "mean_norm"] == view.stats[SITE].norm
    assert table["mean_norm"].notna().sum() == 1
    with pytest.raises(KeyError, match="expert_indices"):
        view.stats["blocks.0.mlp.hook_expert_indices"]


def test_pages_say_what_is_inside_and_escape_it(cache: Any):
    text, page = cache.info(), cache._repr_html_()
    for shown in ("30 sequences", "2 documents truncated", "author (string)", "entity (string)", "logprob (float)"):
        assert shown in text
        assert shown in page
    assert "<i>tiny</i>" in text
    assert "columns <b>&" in text
    assert "<i>tiny" not in page
    assert "&lt;i&gt;tiny&lt;/i&gt;" in page
    assert "columns &lt;b&gt;&amp;" in page
    assert all(len(line) <= 100 for line in text.splitlines())
    norm = np.linalg.norm(CONTENT.sites[SITE][0].astype(float), axis=1).mean()
    (line,) = [line for line in text.splitlines() if line.startswith(SITE)]
    assert f"{norm:.4g}" in line
    view = cache.where(author="ä1", toxic=False)
    assert "author='ä1', toxic=False" in view.info()
    assert f"{len(view)} of {len(cache)} rows" in view.info()
    assert "author=" in repr(view)
    assert view._repr_html_().count("<table>") == 2


def test_long_names_keep_the_columns_of_the_table_aligned(tmp_path: Path):
    content = random_content(n=4)
    long = "blocks.0.a.very.long.name.of.a.site.that.does.not.fit.its.column.hook_out"
    content.sites[long] = content.sites.pop(SITE)
    text = write(tmp_path / "acts", content).info()
    table = text[text.index("\n\n") + 2 :].splitlines()
    after = table[table.index(long) + 1]
    assert after.startswith(" ")
    assert after.index("float32") == table[0].index("dtype")


def test_the_figure_shows_norm_and_spread_by_layer(cache: Any):
    figure = cache.plot()
    lines = {(line.name, line.yaxis): line for line in figure.data}
    assert set(lines) == {("a", "y"), ("a", "y2"), ("b", "y"), ("b", "y2")}
    values = CONTENT.sites["blocks.1.hook_b"][0].astype(float)
    assert lines["b", "y"].x == (1,)
    np.testing.assert_allclose(lines["b", "y"].y, np.linalg.norm(values, axis=1).mean())
    np.testing.assert_allclose(lines["b", "y2"].y, math.sqrt(values.var(0).mean()))
    assert (figure.layout.yaxis.type, figure.layout.yaxis2.type) == ("log", "log")
    assert "activation units" in figure.layout.yaxis.title.text
    integers = write(cache.path.parent / "integers", Content(CONTENT.ids, CONTENT.positions, {
        "blocks.0.hook_i": CONTENT.sites["blocks.0.mlp.hook_expert_indices"]}))  # fmt: skip
    with pytest.raises(DataError, match="nothing to plot"):
        integers.plot()


def test_readers_travel_to_other_processes(cache: Any):
    view = cache.where(toxic=True)
    before = view[SITE][:]
    cache[SITE][[3, 1]]  # a memory map that must stay behind
    for source in (pickle.loads(pickle.dumps(view._source)), copy.deepcopy(view._source)):
        assert torch.equal(torch.from_numpy(source.gather(SITE, np.arange(len(view)))), before)
    assert len(pickle.dumps(view._source)) < 20_000


def test_a_directory_that_moves_away_while_open_is_an_error_that_says_so(cache: Any, tmp_path: Path):
    opened = ac.open(shutil.copytree(cache.path, tmp_path / "acts"))
    opened[SITE][:3]
    opened.path.rename(tmp_path / "elsewhere")
    with pytest.raises(CorruptCacheError, match="gone since the cache was opened"):
        opened[SITE][:3]


# --- malformed content that only the reader of these fields can find ------------------------------------------------


def rewritten(cache: Any, path: Path, change: Any) -> Any:
    """A copy of the cache whose first shard was changed, the manifest's size with it."""
    from activations_cache.store import read_manifest, write_manifest

    shutil.copytree(cache.path, path)
    with h5py.File(path / "shard-00000.h5", "r+") as file:
        change(file)
    manifest = read_manifest(path)
    manifest["shards"][0]["bytes"] = (path / "shard-00000.h5").stat().st_size
    write_manifest(path, manifest)
    return ac.open(path)


def shorten(file: h5py.File) -> None:
    del file["rows/entity"]
    file["rows/entity"] = np.zeros(1, "<i4")


def test_codes_and_lengths_that_cannot_be_are_corruption(cache: Any, tmp_path: Path):
    harmed = rewritten(cache, tmp_path / "codes", lambda file: file["rows/entity"].write_direct(
        np.full(len(file["rows/entity"]), 7, "<i4")))  # fmt: skip
    with pytest.raises(CorruptCacheError, match="a code outside the 3 categories"):
        harmed.rows["entity"]
    with pytest.raises(CorruptCacheError, match="has 1 values in rows/entity; the manifest says"):
        rewritten(cache, tmp_path / "short", shorten).rows["entity"]
    with pytest.raises(CorruptCacheError, match=r"has no readable rows/named.*sequences 0 to 6"):
        rewritten(cache, tmp_path / "gone", lambda file: file.pop("rows/named")).labels("named")


@pytest.mark.parametrize("compression", ["gzip", "lzf"])
def test_a_compressed_site_with_altered_bytes_names_the_sequences(compression: str, tmp_path: Path):
    content = random_content(n=40, seed=4)
    content.sites[SITE][0][...] = 1  # what does not get smaller, HDF5 stores as it is
    made = write(tmp_path / "acts", content, per_shard=20, compression=compression)
    with h5py.File(made.path / "shard-00001.h5") as file:
        chunk = file["sites"][SITE].id.get_chunk_info(0)
    raw = bytearray((made.path / "shard-00001.h5").read_bytes())
    raw[chunk.byte_offset : chunk.byte_offset + chunk.size] = b"\xff" * chunk.size
    (made.path / "shard-00001.h5").write_bytes(raw)
    opened = ac.open(made.path)
    with pytest.raises(CorruptCacheError, match=r"cannot be decompressed .blocks.0.hook_a.*sequences 20 to 39"):
        opened[SITE][:]
    np.testing.assert_array_equal(opened[SITE][:5].numpy(), content.sites[SITE][0][:5])


@pytest.mark.parametrize(("written", "said"), [(None, "gzip"), ("gzip", None), ("gzip", "lzf")])
def test_a_layout_that_is_not_the_manifests_is_refused(written: str | None, said: str | None, tmp_path: Path):
    from activations_cache.store import read_manifest, write_manifest

    made = write(tmp_path / "acts", random_content(), compression=written)
    manifest = read_manifest(made.path)
    write_manifest(made.path, {**manifest, "settings": {**manifest["settings"], "compression": said}})
    with pytest.raises(CorruptCacheError, match="was required"):
        ac.open(made.path)[SITE][:]


def test_many_compressed_shards_keep_few_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("activations_cache._shards.OPEN_FILES", 2)
    content = random_content(n=40, seed=5)
    made = write(tmp_path / "acts", content, per_shard=3, compression="gzip")
    for _ in range(2):
        np.testing.assert_array_equal(made[SITE][:].numpy(), content.sites[SITE][0])
    assert len(made._shards._handles._files) == 2
