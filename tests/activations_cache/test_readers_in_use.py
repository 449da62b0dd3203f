"""Views, joins and concatenations where the other packages take a cache: what a cache of the rows gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import activations_cache as ac
import saes
from activations_cache._join import concat, join
from probe import probing
from tests.activations_cache.caches import labelled_rows, small

LEFT, RIGHT = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One cache of two sites, and the same rows as a join and as a concatenation of parts; and a cache of a part."""
    place, rows = tmp_path_factory.mktemp("readers"), labelled_rows(40)
    whole = small(place / "whole", rows, [LEFT, RIGHT])
    one, two = (small(place / name, rows, site) for name, site in (("one", LEFT), ("two", RIGHT)))
    parts = concat(whole.select(sequences=slice(0, 15)), whole.select(sequences=slice(15, None)))
    return {"whole": whole, "join": join(one, two), "concat": parts, "view": whole.select(rows=slice(None))}


@pytest.mark.parametrize("name", ["join", "concat", "view"])
def test_batches_are_the_same_whatever_the_rows_are_read_through(name: str, readers: dict[str, Any]):
    expected = list(readers["whole"].batches([LEFT, RIGHT], 16, seed=3, with_rows=True))
    found = list(readers[name].batches([LEFT, RIGHT], 16, seed=3, with_rows=True))
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours[2], theirs[2])
        torch.testing.assert_close(ours[0], theirs[0])
        torch.testing.assert_close(ours[1], theirs[1])


def test_windows_stay_within_the_sequences_of_a_view(readers: dict[str, Any]):
    view = readers["whole"].where(toxic=True)
    sequence, position = view.rows["sequence"], view.rows["position"]
    seen = []
    for values, rows in view.batches(LEFT, 8, consecutive=3, with_rows=True):
        assert torch.equal(values, view[LEFT][rows])
        assert (sequence[rows] == sequence[rows[:, :1]]).all()
        assert (np.diff(position[rows], axis=1) == 1).all()
        seen += rows[:, 0].tolist()
    lengths = [len(row["input_ids"]) for row in labelled_rows(40) if row["toxic"]]
    assert len(seen) == len(set(seen)) == sum(max(0, length - 2) for length in lengths)


@pytest.mark.parametrize("name", ["join", "concat", "view"])
def test_sweeps_and_saes_of_a_reader_are_those_of_the_cache(name: str, readers: dict[str, Any]):
    settings: dict[str, Any] = {"folds": 3, "n_boot": 20, "n_controls": 2, "progress": False}
    tables = [probing.sweep(readers[key], "toxic", **settings).to_df() for key in ("whole", name)]
    assert tables[0].drop(columns="seconds", errors="ignore").equals(tables[1].drop(columns="seconds", errors="ignore"))
    trained = []
    for key in ("whole", name):
        sae = saes.train(
            readers[key], RIGHT, d_sae=64, k=4, n_tokens=2000, batch_size=64, few_rows="warn", progress=False
        )
        trained.append(sae.W_enc.detach())
        assert sae.cfg.metadata.model_weights_hash == readers["whole"].model.weights_hash
    torch.testing.assert_close(*trained)


def test_an_sae_of_a_part_sees_its_rows_alone(readers: dict[str, Any], tmp_path: Path):
    """Training on a view equals training on a cache that holds nothing but its rows."""
    kept = [row for row in labelled_rows(40) if row["author"] == "ä1"]
    alone = small(tmp_path / "alone", kept, RIGHT)
    view = readers["whole"].where(author="ä1")
    np.testing.assert_allclose(view[RIGHT][:].numpy(), alone[RIGHT][:].numpy(), atol=1e-4)
    np.testing.assert_allclose(view.stats[RIGHT].var.numpy(), alone.stats[RIGHT].var.numpy(), rtol=1e-3, atol=1e-4)
    assert view.rows["token"].tolist() == alone.rows["token"].tolist()


def test_the_capture_of_token_columns_and_positions_is_read_back(tmp_path: Path):
    """Written by `capture`, not by hand: the reader and the writer agree on every row field."""
    rows: list[dict[str, Any]] = labelled_rows(12)
    for row in rows:
        row["entity"] = [("none", "person")[token % 2] for token in row["input_ids"]]
    chosen = [list(range(0, len(row["input_ids"]), 2)) for row in rows]
    cache = small(
        tmp_path / "acts", rows, RIGHT, positions=chosen, token_columns=["entity"], logprobs=True, compression="gzip"
    )
    whole = small(tmp_path / "whole", rows, RIGHT, token_columns=["entity"], columns=["author"])
    picked = [place for row, kept in zip(rows, chosen, strict=True) for place in kept]
    assert cache.rows["position"].tolist() == picked
    assert cache.rows["entity"].tolist() == [
        row["entity"][place] for row, kept in zip(rows, chosen, strict=True) for place in kept
    ]
    assert np.isnan(cache.rows["logprob"][cache.rows["position"] == 0]).all()
    mask = whole.rows["position"] % 2 == 0
    torch.testing.assert_close(cache[RIGHT][:], whole[RIGHT][mask])
    people = cache.where(entity="person")
    assert set(people.rows["entity"]) == {"person"}
    assert ac.open(cache.path).where(entity="person").row_numbers.tolist() == people.row_numbers.tolist()
