"""What a capture stores under each of its options, held against one unpadded forward per sequence and plain h5py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from activations_cache.errors import CacheMismatchError, DataError, NumericsError, SiteError
from tests.activations_cache.caches import by_hand, contents, llama, small, token_rows
from tests.architectures import tiny

FIRST, SITE = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"


def raw(out: Path, name: str) -> Any:
    """A dataset of the index by plain h5py."""
    with h5py.File(out / "index.h5") as file:
        return file[name][()]


def chosen(rows: list[list[int]], seed: int = 0) -> list[list[bool]]:
    rng = np.random.default_rng(seed)
    masks = [(rng.random(len(row)) < 0.4).tolist() for row in rows]
    masks[2] = [False] * len(rows[2])  # a sequence may store nothing
    return masks


# --- positions ------------------------------------------------------------------------------------------------------


def test_a_mask_stores_the_marked_positions_alone(tmp_path: Path):
    rows = token_rows(13)
    masks = chosen(rows)
    cache = small(tmp_path / "acts", rows, positions=masks)
    expected = torch.cat([one[torch.tensor(mask)] for one, mask in zip(by_hand(llama(), rows, 1), masks, strict=True)])
    torch.testing.assert_close(cache[SITE][:], expected, rtol=1e-5, atol=1e-6)
    assert raw(tmp_path / "acts", "rows/position").tolist() == [i for mask in masks for i, on in enumerate(mask) if on]
    assert [ids.tolist() for ids in cache.sequences["input_ids"]] == rows
    assert len(cache.manifest["shards"]) == 2
    assert cache.verify() == []


def test_a_mask_may_be_a_column_and_spans_may_be_slices(tmp_path: Path):
    rows = token_rows(9)
    masks = [[i % 2 == 0 for i in range(len(row))] for row in rows]
    data = [{"input_ids": row, "mask": mask} for row, mask in zip(rows, masks, strict=True)]
    from_column = small(tmp_path / "column", data, positions="mask")
    from_slices = small(tmp_path / "slices", rows, positions=[slice(0, None, 2)] * 9)
    assert torch.equal(from_column[SITE][:], from_slices[SITE][:])
    assert from_column.manifest["settings"]["positions"] == "mask"


def test_other_positions_are_another_capture(tmp_path: Path):
    rows = token_rows(9)
    small(tmp_path / "acts", rows, positions=chosen(rows))
    with pytest.raises(CacheMismatchError, match="positions chosen"):
        small(tmp_path / "acts", rows, positions=chosen(rows, seed=1))


@pytest.mark.parametrize("positions", ["all", "last", "mask"])
def test_mean_pooling_is_the_mean_of_the_stored_positions(positions: str, tmp_path: Path):
    rows = token_rows(13)
    masks = [[True, *mask[1:]] for mask in chosen(rows)]
    data = [{"input_ids": row, "mask": mask} for row, mask in zip(rows, masks, strict=True)]
    cache = small(tmp_path / "acts", data, positions=positions, pool="mean", dtype="float16")
    keep = {"all": lambda m: [True] * len(m), "last": lambda m: [False] * (len(m) - 1) + [True], "mask": lambda m: m}
    wanted = [torch.tensor(keep[positions](mask)) for mask in masks]
    hand = by_hand(llama(), rows, 1)
    expected = torch.stack([one[on].double().mean(0) for one, on in zip(hand, wanted, strict=True)])
    torch.testing.assert_close(cache[SITE][:].double(), expected, rtol=1e-3, atol=1e-3)
    assert cache.rows["sequence"].tolist() == list(range(13))
    assert cache.rows["position"].tolist() == [int(on.nonzero().max()) for on in wanted]


def test_indices_have_no_mean(tmp_path: Path):
    with pytest.raises(SiteError, match=r"hook_expert_indices holds indices, which have no mean"):
        small(tmp_path / "acts", token_rows(3), "blocks.0.mlp.hook_expert_indices", model=tiny("mixtral"), pool="mean")
    assert not (tmp_path / "acts").exists()


# --- types, columns, log-probabilities ------------------------------------------------------------------------------


def test_each_site_has_its_own_type(tmp_path: Path):
    cache = small(tmp_path / "acts", dtype={"*": "float16", SITE: torch.bfloat16})
    whole = small(tmp_path / "whole")
    assert (cache[FIRST].dtype, cache[SITE].dtype) == (torch.float16, torch.bfloat16)
    assert torch.equal(cache[FIRST][:], whole[FIRST][:].half())
    assert torch.equal(cache[SITE][:], whole[SITE][:].bfloat16())
    assert cache.manifest["settings"]["dtype"] == {"*": "float16", SITE: "bfloat16"}


def test_a_type_for_no_site_is_refused(tmp_path: Path):
    with pytest.raises(SiteError, match=r"dtype names 'blocks.7.\*', which is none of the sites to capture"):
        small(tmp_path / "acts", dtype={"blocks.7.*": "float16"})


def test_the_overflow_check_names_the_one_site(tmp_path: Path):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e9)
    with pytest.raises(NumericsError, match=r"blocks.1.hook_resid_post reaches .* in sequence \d+, beyond float16"):
        small(tmp_path / "acts", token_rows(5), model=model, dtype="float16")
    cache = small(tmp_path / "new", token_rows(5), model=model, dtype={"*": "float16", SITE: "bfloat16"})
    assert float(cache[SITE][:].float().abs().max()) > 65504


def test_columns_per_token_follow_their_tokens(tmp_path: Path):
    rows = token_rows(9)
    data = [
        {
            "input_ids": row,
            "depth": list(range(len(row))),
            "loud": [i % 3 == 0 for i in row],
            "kind": ["odd" if i % 2 else "even" for i in row],
            "score": [i / 7 for i in row],
        }
        for row in rows
    ]
    names = ("depth", "loud", "kind", "score")
    cache = small(tmp_path / "acts", data, positions=chosen(rows), token_columns=names)
    flat = [
        (row[name][i]) for name in names for row, m in zip(data, chosen(rows), strict=True) for i in np.flatnonzero(m)
    ]
    found = [value for name in names for value in cache.rows[name].tolist()]
    assert found == flat
    assert cache.labels("kind").tolist() == cache.rows["kind"].tolist()
    assert sorted(cache.manifest["data"]["token_columns"]["kind"]["categories"]) == ["", "even", "odd"]
    assert raw(tmp_path / "acts", "rows/depth").tolist() == cache.rows["depth"].tolist()
    assert "left out" not in cache.info()  # they are stored, per token


@pytest.mark.parametrize("positions", ["all", "last"])
def test_log_probabilities_are_the_models(positions: str, tmp_path: Path):
    rows = token_rows(9)
    cache = small(tmp_path / "acts", rows, positions=positions, logprobs=True)
    expected: list[float] = []
    for row in rows:
        with torch.no_grad():
            logits = llama()(input_ids=torch.tensor([row])).logits[0].double()
        scores = [float("nan")] + [float(logits[i - 1].log_softmax(-1)[row[i]]) for i in range(1, len(row))]
        expected += scores if positions == "all" else scores[-1:]
    np.testing.assert_allclose(cache.rows["logprob"], expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    plain = small(tmp_path / "plain", rows, positions=positions)
    torch.testing.assert_close(cache[SITE][:], plain[SITE][:])


def test_pooled_log_probabilities_leave_out_the_first_token(tmp_path: Path):
    rows = token_rows(9)
    whole = small(tmp_path / "whole", rows, logprobs=True)
    pooled = small(tmp_path / "pooled", rows, logprobs=True, pool="mean")
    parts = [whole.rows["logprob"][whole.rows["sequence"] == i] for i in range(9)]
    expected = [np.mean(part[1:]) if len(part) > 1 else np.nan for part in parts]
    np.testing.assert_allclose(pooled.rows["logprob"], expected, rtol=1e-5, equal_nan=True)


# --- exactly so many tokens, compression ----------------------------------------------------------------------------


def test_exactly_the_tokens_that_were_asked_for(tmp_path: Path):
    rows = token_rows(13)
    n = sum(map(len, rows[:6])) + len(rows[6]) // 2 + 1
    cache = small(tmp_path / "acts", rows, n_tokens=n)
    assert len(cache) == n == cache.manifest["plan"]["tokens"]
    whole = small(tmp_path / "whole", rows)
    torch.testing.assert_close(cache[SITE][:], whole[SITE][:n])
    total = sum(map(len, rows))
    assert len(small(tmp_path / "all", rows, n_tokens=total)) == total
    with pytest.raises(DataError, match=f"{total}"):
        small(tmp_path / "more", rows, n_tokens=total + 1)
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize("compression", ["gzip", "lzf"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_compressed_cache_holds_the_same_values(compression: str, dtype: str, tmp_path: Path):
    rows = [[5] * 60] * 20
    settings = {"batch_tokens": 600, "shard_rows": 600, "dtype": dtype}
    plain = small(tmp_path / "plain", rows, **settings)
    cache = small(tmp_path / "acts", rows, compression=compression, **settings)
    assert torch.equal(cache[SITE][:], plain[SITE][:])
    assert torch.equal(cache[SITE][[200, 3, 3]], plain[SITE][[200, 3, 3]])
    assert np.array_equal(raw(tmp_path / "acts", f"sites/{SITE}"), raw(tmp_path / "plain", f"sites/{SITE}"))
    assert cache.verify() == []
    assert cache.nbytes < plain.nbytes
    batches = torch.cat(list(cache.batches(SITE, 100, seed=1)))
    assert torch.equal(batches, torch.cat(list(plain.batches(SITE, 100, seed=1))))
    assert contents(small(tmp_path / "again", rows, compression=compression, **settings).path) == contents(cache.path)


def test_an_unknown_compression_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="compression must be None, 'gzip' or 'lzf'; got 'zip'"):
        small(tmp_path / "acts", compression="zip")
