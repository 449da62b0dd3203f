"""SAEs trained from a real cache whose activations have known features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csc_array
from sklearn.metrics import roc_auc_score

import activations_cache as ac
import saes
from activations_cache.errors import SiteError
from saes import sparse
from saes.errors import SAEConfigError, SAEDataError, SAELoadError
from tests.planted import SITE, planted_cache

N, D, M, ACTIVE = 4000, 16, 24, 2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[ac.Cache, np.ndarray, np.ndarray]:
    """A cache of sparse sums of unit features plus an offset; the features; which are on in each row."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(M, D))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    on = rng.random((N, M)).argsort(axis=1) < ACTIVE  # exactly so many in every row
    rows = 3 * (on * rng.uniform(1, 2, size=(N, M))) @ features + rng.normal(size=D)
    first = on[::4, 0].tolist()  # a label per sequence of four rows
    cache, _ = planted_cache(tmp_path_factory.mktemp("sae") / "cache", rows.astype("f4"), {"first": first}, 4)
    return cache, features, on


def fit(cache: ac.Cache, **settings: Any) -> Any:
    settings = {"d_sae": 32, "k": ACTIVE, "epochs": 40, "batch_size": 256, "lr": 3e-3, "progress": False, **settings}
    return saes.train(cache, SITE, **settings)


@pytest.fixture(scope="module")
def trained(world: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    out = tmp_path_factory.mktemp("saved") / "sae"
    return fit(world[0], out=out, seed=1), out


def test_topk_finds_the_planted_features(world: Any, trained: Any) -> None:
    cache, features, _ = world
    decoder = torch.nn.functional.normalize(trained[0].W_dec.detach(), dim=1).numpy()
    best = np.abs(decoder @ features.T).max(0)
    assert np.mean(best > 0.95) > 0.8
    evaluation = saes.evaluate(trained[0], cache, SITE)
    assert evaluation.fvu < 0.25
    assert evaluation.l0 <= ACTIVE + 1e-9


def test_sae_lens_opens_what_was_saved_with_the_same_outputs(world: Any, trained: Any) -> None:
    from sae_lens import SAE

    rows = world[0][SITE][:500]
    loaded = SAE.load_from_disk(trained[1])
    assert torch.equal(loaded.encode(rows), trained[0].encode(rows))
    assert torch.equal(loaded(rows), trained[0](rows))
    assert loaded.cfg.architecture() == "topk"
    assert loaded.cfg.metadata.hook_name == SITE
    assert loaded.cfg.metadata.model_weights_hash == world[0].model.weights_hash
    assert sorted(p.name for p in trained[1].parent.iterdir()) == ["sae"]  # nothing half-written is left behind


def test_seed_decides_the_weights(world: Any) -> None:
    state = torch.random.get_rng_state()
    one, same, other = (fit(world[0], epochs=1, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.W_enc, same.W_enc)
    assert not torch.equal(one.W_enc, other.W_enc)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_training_on_some_rows_sees_no_others(world: Any) -> None:
    """Rows of six features alone: rows of the others are reconstructed far worse."""
    cache, _, on = world
    part = on[:, :6].sum(1) == ACTIVE
    sae = fit(cache, rows=part, d_sae=8, epochs=200, batch_size=128, few_rows="warn")
    inside = saes.evaluate(sae, cache, SITE, rows=np.flatnonzero(part))
    outside = saes.evaluate(sae, cache, SITE, rows=np.flatnonzero(on[:, :6].sum(1) == 0))
    assert inside.fvu < 0.3
    assert outside.fvu > 0.5
    assert inside.n == part.sum()


@pytest.mark.parametrize(
    ("normalization", "settings"),
    [
        ("none", {}),
        ("layer_norm", {"architecture": "standard", "l1_coefficient": 0.1}),
        ("expected_average_only_in", {}),
    ],
)
def test_normalisation_is_inside_the_saved_sae(world: Any, normalization: str, settings: Any) -> None:
    cache = world[0]
    sae = fit(cache, normalize_activations=normalization, epochs=20, **settings)
    rows = cache[SITE][:]
    out = sae(rows).detach()
    fvu = ((out - rows) ** 2).sum() / ((rows - rows.mean(0)) ** 2).sum()
    assert fvu.item() < 0.5  # on raw rows
    assert saes.evaluate(sae, cache, SITE).fvu == pytest.approx(fvu.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("standard", {"l1_coefficient": 0.5}), ("gated", {"l1_coefficient": 0.5}), ("jumprelu", {"l0_coefficient": 0.3})],
)
def test_other_architectures_train_and_reload(world: Any, tmp_path: Path, architecture: str, settings: Any) -> None:
    sae = fit(world[0], architecture=architecture, out=tmp_path / "sae", epochs=20, **settings)
    evaluation = saes.evaluate(saes.load(tmp_path / "sae"), world[0], SITE)
    assert sae.cfg.architecture() == architecture
    assert evaluation.fvu < 0.3
    assert evaluation.l0 < 16


def test_batchtopk_lets_k_latents_through_after_a_short_run(world: Any, tmp_path: Path) -> None:
    sae = fit(world[0], architecture="batchtopk", epochs=2, out=tmp_path / "sae")
    assert sae.cfg.architecture() == "jumprelu"  # sae-lens's inference form of it
    assert saes.evaluate(sae, world[0], SITE).l0 == pytest.approx(ACTIVE, rel=0.02)


def test_evaluation_against_numpy(world: Any, trained: Any, tmp_path: Path) -> None:
    cache, sae = world[0], trained[0]
    index = np.arange(100, 700, 3)
    rows = cache[SITE][:][torch.as_tensor(index)]
    acts = sae.encode(rows).detach().numpy()
    x, out = rows.double().numpy(), sae(rows).detach().double().numpy()
    found = saes.evaluate(sae, cache, SITE, rows=index, batch_size=37)
    assert found.n == len(index)
    assert found.l0 == pytest.approx((acts != 0).sum(1).mean())
    assert found.fvu == pytest.approx(((x - out) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(), rel=1e-6)
    assert found.explained_variance == pytest.approx(1 - found.fvu)
    cosine = (x * out).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(out, axis=1)
    assert found.cosine == pytest.approx(cosine.mean(), rel=1e-6)
    assert found.n_dead == int((acts != 0).any(0).__invert__().sum())
    np.testing.assert_allclose(found.frequency.numpy(), (acts != 0).mean(0), rtol=1e-6)
    again = saes.Evaluation.load(found.save(tmp_path / "evaluation.json"))
    assert again.to_dict() == found.to_dict()
    assert "L0" in repr(found)
    assert "fvu" in found._repr_html_()
    assert len(found.plot().data) == 1


def test_evaluation_of_rows_far_from_zero(world: Any, trained: Any) -> None:
    """A large common offset must not cancel the variance away."""
    from tests.memory_cache import MemoryCache

    rng = np.random.default_rng(1)
    x = (1e4 + rng.normal(size=(300, D))).astype("f4")
    found = saes.evaluate(trained[0], MemoryCache({SITE: x}), SITE, batch_size=64)
    out = trained[0](torch.as_tensor(x)).detach().double().numpy()
    exact = ((x - out) ** 2).sum() / ((x - x.astype("f8").mean(0)) ** 2).sum()
    assert found.fvu == pytest.approx(exact, rel=1e-6)


def test_separation_against_scikit_learn(world: Any, trained: Any) -> None:
    cache, _, on = world
    sae = trained[0]
    label = on[:, 0]
    table = saes.separation(sae, cache, SITE, label)
    acts = sae.encode(cache[SITE][:]).detach().numpy()
    for latent in range(0, 32, 5):
        assert table.auc[latent] == pytest.approx(roc_auc_score(label, acts[:, latent]), abs=1e-12)
        mean = acts[label, latent].mean() - acts[~label, latent].mean()
        assert table.mean_difference[latent] == pytest.approx(mean, rel=1e-4, abs=1e-6)
        assert table.frequency_positive[latent] == pytest.approx((acts[label, latent] != 0).mean())
    assert table.n_positive[0] == label.sum()
    assert table.auc.max() > 0.95  # the latent of the planted feature


def test_separation_by_column_equals_separation_by_array(world: Any, trained: Any) -> None:
    cache, _, on = world
    by_column = saes.separation(trained[0], cache, SITE, "first")
    by_array = saes.separation(trained[0], cache, SITE, np.repeat(on[::4, 0], 4))
    assert by_column.equals(by_array)
    part = np.arange(0, N, 4)
    subset = saes.separation(trained[0], cache, SITE, on[part, 0], rows=part)
    assert subset.auc.max() > 0.95


@pytest.mark.parametrize("seed", range(5))
def test_rank_sums_with_ties_and_negative_values(seed: int) -> None:
    rng = np.random.default_rng(seed)
    dense = rng.integers(-2, 4, size=(40, 7)) * (rng.random((40, 7)) < 0.5)
    dense[:, 0] = 0  # a silent latent
    y = np.stack([rng.permutation(40) % 2, rng.permutation(40) % 3 == 0], axis=1).astype(int)
    found = sparse.auc(*sparse.rank_excess(csc_array(dense.astype("f4"))), y)
    exact = [[roc_auc_score(y[:, j], dense[:, i]) for j in range(2)] for i in range(7)]
    np.testing.assert_allclose(found, exact, atol=1e-12)


def test_bad_settings_are_refused(world: Any) -> None:
    cache = world[0]
    with pytest.raises(SAEConfigError, match="k = 40 with d_sae = 32"):
        fit(cache, k=40)
    with pytest.raises(SAEConfigError, match="topk"):
        fit(cache, architecture="transformer")
    with pytest.raises(SAEConfigError, match="sparsity"):
        fit(cache, sparsity=3)
    with pytest.raises(SAEConfigError, match="layer_norm"):
        fit(cache, normalize_activations="layer_norm")
    with pytest.raises(SAEConfigError, match="not both"):
        fit(cache, epochs=1, n_tokens=100)
    with pytest.raises(SAEConfigError, match="positive"):
        fit(cache, epochs=0)
    with pytest.raises(SAEConfigError, match="float12"):
        fit(cache, dtype="float12")
    with pytest.raises(SiteError, match="hook_resid_pre"):
        saes.train(cache, "blocks.0.hook_resid_pree", d_sae=8, k=2)


def test_bad_activations_are_refused(world: Any, trained: Any) -> None:
    from tests.memory_cache import MemoryCache

    rng = np.random.default_rng(0)
    good = rng.normal(size=(200, D)).astype("f4")
    with_nan = good.copy()
    with_nan[7, 3] = np.nan
    with pytest.raises(SAEDataError, match="finite"):
        fit(MemoryCache({SITE: with_nan}))
    with pytest.raises(SAEDataError, match="finite"):
        saes.evaluate(trained[0], MemoryCache({SITE: with_nan}), SITE)
    constant = MemoryCache({SITE: np.tile(good[:1], (200, 1))})
    with pytest.raises(SAEDataError, match="constant"):
        fit(constant)
    with pytest.raises(SAEDataError, match="constant"):
        saes.evaluate(trained[0], constant, SITE)
    with pytest.raises(SAEDataError, match="width 8"):
        saes.evaluate(trained[0], MemoryCache({SITE: good[:, :8]}), SITE)
    with pytest.raises(SAEDataError, match="width 8"):
        saes.separation(trained[0], MemoryCache({SITE: good[:, :8]}), SITE, np.arange(200) % 2)
    with pytest.raises(SAEDataError, match="more than k"):
        fit(MemoryCache({SITE: good[:2]}))


def test_few_rows_warn_or_stop_by_choice() -> None:
    from tests.memory_cache import MemoryCache

    cache = MemoryCache({SITE: np.random.default_rng(0).normal(size=(100, D)).astype("f4")})
    with pytest.warns(UserWarning, match="at most 3 latents"):
        fit(cache, epochs=1)
    with pytest.raises(SAEDataError, match="at most 3 latents"):
        fit(cache, epochs=1, few_rows="error")


def test_bad_labels_are_refused(world: Any, trained: Any) -> None:
    cache, sae = world[0], trained[0]
    with pytest.raises(SAEDataError, match="first"):
        saes.separation(sae, cache, SITE, "frist")
    with pytest.raises(SAEDataError, match="two sets"):
        saes.separation(sae, cache, SITE, np.ones(N))
    with pytest.raises(SAEDataError, match="one value per row"):
        saes.separation(sae, cache, SITE, np.arange(10) % 2)
    with pytest.raises(SAEDataError, match="NaN"):
        saes.separation(sae, cache, SITE, np.r_[np.nan, np.arange(N - 1) % 2])


def test_saving_beside_other_files_is_refused(world: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SAEConfigError, match="holds no SAE"):
        fit(world[0], epochs=1, out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_loading_what_is_no_sae_is_one_clear_error(trained: Any, tmp_path: Path) -> None:
    with pytest.raises(SAELoadError, match=r"cfg\.json"):
        saes.load(tmp_path)
    for name in ("cfg.json", "sae_weights.safetensors"):
        (tmp_path / name).write_bytes((trained[1] / name).read_bytes())
    (tmp_path / "sae_weights.safetensors").write_bytes((trained[1] / "sae_weights.safetensors").read_bytes()[:100])
    with pytest.raises(SAELoadError, match="cannot open"):
        saes.load(tmp_path)


def test_progress_bar_names_what_matters(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fit(world[0], epochs=3, progress=True, d_sae=16)
    shown = capsys.readouterr().err
    assert all(word in shown for word in ("training SAE", "L0", "FVU", "dead"))
