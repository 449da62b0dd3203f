"""SAE latents as components, on an SAE whose latents and data whose answer are planted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from activations_cache.errors import CacheMismatchError, SiteError
from probe import _stats
from probe.errors import DataError, LabelError
from probe.features import Contexts, _latents, contexts, latents
from probe.targets import Latents, Scores
from saes.errors import SAEDataError
from tests.memory_cache import MemoryCache
from tests.planted import SITE, planted_cache

D, M = 12, 24
PLANTED = 5


@pytest.fixture(scope="module")
def sae() -> Any:
    """A ReLU SAE: latent 2i is the positive part of coordinate i, latent 2i + 1 the negative one."""
    from sae_lens import StandardSAE, StandardSAEConfig

    made = StandardSAE(StandardSAEConfig(d_in=D, d_sae=M))
    signed = torch.stack([torch.eye(D), -torch.eye(D)], dim=1).reshape(M, D)
    with torch.no_grad():
        made.W_enc.copy_(signed.T)
        made.W_dec.copy_(signed)
        made.b_enc.fill_(-0.5)
        made.b_dec.zero_()
    return made


def world(seed: int = 0, strength: float = 2.0, n_groups: int = 60, per: int = 4) -> tuple[MemoryCache, np.ndarray]:
    """Latent 5 (minus coordinate 2) is higher on forget rows by `strength`."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(n_groups), per)
    y = rng.permutation(np.arange(n_groups) % 2)[group]
    x = rng.normal(size=(len(y), D))
    x[:, 2] -= strength * y
    columns = {"split": np.where(y == 1, "forget", "retain").astype(object), "person": group.astype(object)}
    return MemoryCache({SITE: x.astype("f4")}, columns), y


@pytest.fixture(scope="module")
def found(sae: Any) -> Scores:
    return latents(world()[0], SITE, sae, "split", "forget", "person", progress=False)


def test_planted_latent_is_found(sae: Any, found: Scores) -> None:
    best = found.best
    assert best.latent == PLANTED
    assert best.p == 1 / 101
    assert best.low > 0.5
    assert best.low <= best.score <= best.high
    assert best.twin_high < best.low
    assert best.control_low < 0 < best.control_high
    others = found.table[~found.table.latent.isin([PLANTED, PLANTED - 1])]
    assert (others.p > 0.05).mean() > 0.9
    target = found.top(2)
    assert isinstance(target, Latents)
    assert target.index[0] == PLANTED
    assert torch.equal(target.decoder[0], sae.W_dec[PLANTED].detach())
    assert {"control", "p", "twin", "low", "high", "n_groups"} <= set(target.evidence["rows"][0])


def test_scores_against_scikit_learn_and_numpy(sae: Any, found: Scores) -> None:
    cache, y = world()
    acts = sae.encode(torch.as_tensor(cache.data[SITE])).detach().numpy()
    for row in found.table.itertuples():
        own = acts[:, row.latent]
        assert row.auc == pytest.approx(roc_auc_score(y, own), abs=1e-12)
        assert row.score == pytest.approx(2 * row.auc - 1)
        assert row.frequency == pytest.approx((own != 0).mean())
        assert row.mean_difference == pytest.approx(own[y == 1].mean() - own[y == 0].mean(), abs=1e-6)


def test_bootstrap_replicates_are_those_of_the_repeated_rows() -> None:
    from probe import _rows

    rng = np.random.default_rng(0)
    values = (rng.integers(-2, 5, size=60) / 2).astype("f8")  # zeros, ties and negative values
    y = np.repeat(np.arange(20) % 2, 3)
    rows = _rows.select(MemoryCache({"s": np.zeros((60, 1), "f4")}), y, np.repeat(np.arange(20), 3))
    group = rows.groups
    weights = _stats.resample_groups(group, y, 40, rng)
    active = np.flatnonzero(values)
    draws = _latents._auc_draws(values[active], active, rows, weights)
    for draw in range(40):
        repeated = np.repeat(np.arange(60), weights[draw, group].astype(int))
        assert draws[draw] == pytest.approx(roc_auc_score(y[repeated], values[repeated]), abs=1e-12)


def test_without_signal_the_best_latent_is_within_its_null(sae: Any) -> None:
    """The p-value is held against the best of all latents: without signal it is small as seldom as it says."""
    small = [
        latents(world(seed, 0.0)[0], SITE, sae, "split", "forget", "person", n_boot=20, progress=False).best.p <= 0.1
        for seed in range(40)
    ]
    assert np.mean(small) <= 0.25  # 10 % expected; the binomial 99 % limit of 40
    weak = latents(world(3, 0.0)[0], SITE, sae, "split", "forget", "person", n_boot=20, progress=False)
    assert any("shuffled labels" in warning for warning in weak.warnings)


def test_twins_have_a_similar_activation_frequency() -> None:
    import pandas as pd

    rng = np.random.default_rng(0)
    frequency = rng.permutation(np.geomspace(1e-3, 1, 400))
    # the score is the log frequency, so that a twin's score says how often it is active
    table = pd.DataFrame({"score": np.log10(frequency), "frequency": frequency})
    _latents._add_twins(table, 10, 0)
    assert (table.twin - table.score).abs().max() < 0.4
    assert (table.twin_high >= table.twin).all()


def test_mean_over_a_sequences_rows(sae: Any) -> None:
    rng = np.random.default_rng(0)
    sequence = np.repeat(np.arange(40), rng.integers(1, 6, size=40))
    x = rng.normal(size=(len(sequence), D)).astype("f4")
    cache = MemoryCache({SITE: x}, sequence=sequence)
    y = np.arange(40) % 2
    table = latents(cache, SITE, sae, y, rows="mean", progress=False).table.set_index("latent")
    acts = sae.encode(torch.as_tensor(x)).detach().numpy()
    mean = np.stack([acts[sequence == s].mean(0) for s in range(40)])
    for latent in (0, 7, 23):
        assert table.auc[latent] == pytest.approx(roc_auc_score(y, mean[:, latent]), abs=1e-12)


def test_result_is_shown_saved_and_drawn(found: Scores, tmp_path: Path) -> None:
    assert all(word in repr(found) for word in ("control", "twin", "random twins", "latent"))
    again = Scores.load(found.save(tmp_path / "scores"))
    assert again.top(3).index == found.top(3).index
    assert torch.equal(again.top(3).decoder, found.top(3).decoder)
    assert again.controls["shuffled"].highest.tolist() == found.controls["shuffled"].highest.tolist()
    assert len(found.plot().data) >= 1


def test_contexts_are_the_most_active_rows_one_a_sequence(sae: Any) -> None:
    rng = np.random.default_rng(0)
    sequence = np.repeat(np.arange(12), 5)
    x = rng.normal(size=(60, D)).astype("f4")
    ids = rng.integers(0, 99, size=(12, 5)).tolist()
    cache = MemoryCache({SITE: x}, input_ids=ids, sequence=sequence)
    acts = sae.encode(torch.as_tensor(x)).detach().numpy()
    shown = contexts(cache, SITE, sae, [3, 8], 4, window=1, batch_size=7)
    assert isinstance(shown, Contexts)
    for latent in (3, 8):
        peaks = acts[:, latent].reshape(12, 5).max(1)
        expected = np.argsort(-peaks)[:4]
        own = shown.of(latent)
        assert [row.sequence for row in own] == expected.tolist()
        for row in own:
            assert row.activation == pytest.approx(peaks[row.sequence])
            start = max(0, row.position - 1)
            window = slice(start, row.position + 2)
            assert list(row.token_ids) == ids[row.sequence][window]
            np.testing.assert_allclose(row.activations, acts[:, latent].reshape(12, 5)[row.sequence, window], rtol=1e-6)
            assert row.token_ids[row.peak] == ids[row.sequence][row.position]
            assert f"[ {row.token_ids[row.peak]}]" in row.text
    assert len(shown.to_df()) == 8
    assert "background" in shown._repr_html_()
    assert "latent 3" in repr(shown)


def test_contexts_where_only_the_last_position_is_stored(sae: Any) -> None:
    x = np.random.default_rng(0).normal(size=(6, D)).astype("f4")
    cache = MemoryCache({SITE: x})
    cache.sequences["input_ids"] = [np.arange(4) + 10 * s for s in range(6)]
    cache.rows["position"] = np.full(6, 3)
    (top,) = contexts(cache, SITE, sae, 0, 1)
    assert top.peak == 3
    assert np.isnan(top.activations[:3]).all()
    assert top.activations[3] == pytest.approx(top.activation)


def test_a_latent_that_never_fires_has_no_context(sae: Any) -> None:
    cache = MemoryCache({SITE: np.zeros((4, D), "f4")})
    assert len(contexts(cache, SITE, sae, 0)) == 0
    with pytest.raises(DataError, match="None of the 24"):
        latents(cache, SITE, sae, [0, 1, 0, 1], progress=False)


def test_real_cache_and_saved_sae(sae: Any, tmp_path: Path) -> None:
    memory, _ = world()
    sae.save_model(tmp_path / "sae")
    columns = {"split": memory.columns["split"].tolist(), "person": [f"p{g}" for g in memory.columns["person"]]}
    cache, model = planted_cache(tmp_path / "cache", memory.data[SITE], columns)
    real = latents(cache, SITE, tmp_path / "sae", "split", "forget", "person", model=model, progress=False)
    assert real.best.latent == PLANTED
    assert real.settings["sae"] == str(tmp_path / "sae")
    assert real.top(1).model_hash == cache.model.weights_hash
    assert contexts(cache, SITE, tmp_path / "sae", PLANTED, 2)[0].activation > 0
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(CacheMismatchError, match="Capture again"):
        latents(cache, SITE, sae, "split", "forget", "person", model=model, progress=False)


def test_bad_input(sae: Any) -> None:
    cache, _ = world()
    with pytest.raises(SiteError, match="hook_resid_pre"):
        latents(cache, "blocks.0.hook_resid_prr", sae, "split", progress=False)
    with pytest.raises(LabelError, match="split"):
        latents(cache, SITE, sae, "splt", progress=False)
    with pytest.raises(LabelError, match="two classes"):
        latents(cache, SITE, sae, np.ones(240), progress=False)
    narrow = MemoryCache({SITE: np.ones((240, 4), "f4")}, cache.columns)
    with pytest.raises(SAEDataError, match="width 4"):
        latents(narrow, SITE, sae, "split", progress=False)
    with pytest.raises(SAEDataError, match="width 4"):
        contexts(narrow, SITE, sae, 0)
    with pytest.raises(DataError, match="from 0 to 23"):
        contexts(cache, SITE, sae, 24)
