"""Train a sparse autoencoder on a cache, through sae-lens's own trainer, classes and files."""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from saes._load import load
from saes.errors import SAEConfigError, SAEDataError

_WITH_K = ("topk", "batchtopk")
ARCHITECTURES = ("topk", "batchtopk", "standard", "gated", "jumprelu")
_ROWS_PER_LATENT = 32  # fewer than this in the cache, and latents start to describe single rows
_CALIBRATION_ROWS = 16_384


def train(
    cache: Any,
    site: str,
    *,
    d_sae: int,
    architecture: str = "topk",
    k: int = 32,
    n_tokens: int | None = None,
    epochs: float | None = None,
    rows: Any = None,
    batch_size: int = 2048,
    lr: float | None = None,
    normalize_activations: Literal["expected_average_only_in", "none", "layer_norm"] = "expected_average_only_in",
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = torch.float32,
    out: str | Path | None = None,
    few_rows: Literal["warn", "error"] = "warn",
    progress: bool = True,
    **settings: Any,
) -> Any:
    """Train one SAE on the stored rows of one site.

    Every step is `sae_lens.SAETrainer.step`: Adam, gradient norm clipped at 1, linear warm-up over 5 % of the steps and
    decay over the last 20 %. The decoder bias starts at the mean of the rows. A BatchTopK SAE gets its threshold set,
    after training, to the value at which `k` latents a row are active on average (the moving average that sae-lens
    keeps has not converged on short runs, and would let two to three times as many through). Cost: 6 x rows x d_in x
    d_sae multiply-adds, forward and backward.

    Args:
        cache: what `activations_cache.open` returns.
        site: a site of the cache; sites of several axes (hook_z) are flattened.
        d_sae: number of latents.
        architecture: "topk", "batchtopk", "standard", "gated" or "jumprelu".
        k: latents active per row ("batchtopk": on average); the others' sparsity is set by a coefficient in `settings`.
        n_tokens: rows to train on, with repetition where the cache has fewer.
        epochs: the same in passes over the cache; default 10 if neither is given.
        rows: numbers or a mask of the stored rows to train on; None for all.
        batch_size: rows per step.
        lr: peak learning rate, for rows scaled as below; None takes 0.05 / sqrt(d_sae), at most 3e-3 (it falls with the
            width as in Gao et al. 2024, arXiv 2406.04093; the constant suits runs of some thousand steps).
        normalize_activations: "expected_average_only_in" scales rows so that their mean norm is sqrt(d_in), by the
            cache's own statistics, and folds the factor into the weights at the end, so that the SAE takes raw
            activations; "layer_norm" normalises each row at run time (not for the TopK kinds); "none" leaves them.
        seed: weights and order of the rows.
        device: default the GPU if there is one.
        dtype: of the weights.
        out: directory to save to; `sae_lens.SAE.load_from_disk` opens it.
        few_rows: what to do when there are fewer than 32 rows per latent.
        progress: show a bar with loss, L0, FVU and dead latents.
        **settings: further fields of sae-lens's training configuration: `l1_coefficient`, `l0_coefficient`, ...

    Returns:
        A sae-lens inference `SAE`: what loading `out` gives.

    Raises:
        SAEConfigError: a width below k, an unknown architecture or setting.
        SAEDataError: activations that are constant or not finite, or too few.
        activations_cache.errors.SiteError: the cache does not have the site.
    """
    d_in = int(cache[site][0:1].flatten(1).shape[1])
    lr = min(3e-3, 0.05 / max(d_sae, 1) ** 0.5) if lr is None else lr
    n_rows = len(cache) if rows is None else _count(rows)
    _check_config(architecture, d_sae, k, batch_size, lr, out)
    _check_rows(cache, site, n_rows, d_sae, k, few_rows)
    total = _total(n_rows, n_tokens, epochs)
    batch_size = min(batch_size, n_rows, total)
    device = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    common = {"d_in": d_in, "d_sae": d_sae, "device": device, "dtype": str(dtype).removeprefix("torch.")}
    with torch.random.fork_rng(devices=[device] if device.startswith("cuda") else []):
        torch.manual_seed(seed)
        sae = _untrained(architecture, k, {**common, "normalize_activations": normalize_activations, **settings})
    batches = _rows(cache, site, rows, batch_size, seed, sae.dtype)
    trainer = _trainer(sae, batches, total, batch_size, lr, device)
    _start_from_statistics(trainer, cache, site)
    _run(trainer, batches, total, progress)
    if architecture == "batchtopk":
        _calibrate(sae, cache, site, k)
    _describe(sae, cache, site, {"seed": seed, "n_tokens": total, "batch_size": batch_size, "lr": lr})
    return _saved(sae, out, device)


def _check_config(architecture: str, d_sae: int, k: int, batch_size: int, lr: float, out: str | Path | None) -> None:
    path = None if out is None else Path(out)
    if path and path.exists() and (not path.is_dir() or (any(path.iterdir()) and not (path / "cfg.json").exists())):
        raise SAEConfigError(f"{path} exists and holds no SAE; give a new or empty directory.")
    if architecture not in ARCHITECTURES:
        raise SAEConfigError(f"architecture must be one of {', '.join(ARCHITECTURES)}; got {architecture!r}.")
    if d_sae < 1 or batch_size < 1 or not lr > 0:
        raise SAEConfigError(f"d_sae, batch_size and lr must be positive; got {d_sae}, {batch_size}, {lr}.")
    if architecture in _WITH_K and not 1 <= k <= d_sae:
        raise SAEConfigError(f"k must be between 1 and d_sae; got k = {k} with d_sae = {d_sae}.")


def _count(rows: Any) -> int:
    if isinstance(rows, slice):
        raise SAEDataError("rows must be row numbers or a mask; for a part of a cache pass cache.select(rows=...)")
    index = torch.as_tensor(rows)
    return int(index.sum()) if index.dtype == torch.bool else index.numel()


def _check_rows(cache: Any, site: str, n_rows: int, d_sae: int, k: int, few_rows: str) -> None:
    """Refuse rows from which nothing can be learnt; warn (or refuse) where they are few for the width."""
    stats = cache.stats[cache[site].spec.name]
    if not torch.isfinite(stats.mean).all() or not torch.isfinite(stats.var).all():
        raise SAEDataError(f"The activations of {site!r} are not all finite; capture them in a wider type.")
    if not stats.var.any():
        raise SAEDataError(
            f"The activations of {site!r} are constant over all {stats.count} rows; there is nothing to learn."
        )
    if n_rows <= k:
        raise SAEDataError(f"There are {n_rows} rows to train on; an SAE with k = {k} needs more than k of them.")
    if n_rows >= _ROWS_PER_LATENT * d_sae:
        return
    message = (
        f"{n_rows} rows for {d_sae} latents are few (under {_ROWS_PER_LATENT} each): expect many dead latents and "
        "latents that describe single rows. Capture more text, or train at most "
        f"{max(n_rows // _ROWS_PER_LATENT, 1)} latents."
    )
    if few_rows == "error":
        raise SAEDataError(message)
    warnings.warn(message, stacklevel=3)


def _total(rows: int, n_tokens: int | None, epochs: float | None) -> int:
    if n_tokens is not None and epochs is not None:
        raise SAEConfigError("Give n_tokens or epochs, not both.")
    total = int(rows * (10 if epochs is None else epochs)) if n_tokens is None else int(n_tokens)
    if total < 1:
        raise SAEConfigError(f"n_tokens and epochs must be positive; got {n_tokens} and {epochs}.")
    return total


def _untrained(architecture: str, k: int, settings: dict[str, Any]) -> Any:
    """A sae-lens training SAE of the architecture, freshly initialised."""
    from sae_lens.registry import get_sae_training_class

    if settings["normalize_activations"] == "layer_norm" and architecture in _WITH_K:
        raise SAEConfigError(
            f"sae-lens cannot train {architecture!r} with normalize_activations='layer_norm' (its auxiliary loss for "
            "dead latents would be in other units); use 'expected_average_only_in' or 'none'."
        )
    sae_class, config_class = get_sae_training_class(architecture)
    known = {field.name for field in dataclasses.fields(config_class)} - {"metadata"}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise SAEConfigError(
            f"{architecture!r} has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}."
        )
    if architecture in _WITH_K:
        settings["k"] = k if architecture == "topk" else float(k)
    try:
        return sae_class(config_class(**settings))
    except (TypeError, ValueError, KeyError) as error:
        raise SAEConfigError(f"sae-lens refuses these settings of {architecture!r}: {error}") from error


def _rows(
    cache: Any, site: str, rows: Any, batch_size: int, seed: int, dtype: torch.dtype
) -> Iterator[Float[Tensor, "batch d_in"]]:
    """Shuffled batches without end, all of one size."""
    batches = cache.batches(site, batch_size=batch_size, seed=seed, epochs=None, dtype=dtype, rows=rows, drop_last=True)
    for batch in batches:
        yield batch.flatten(1)


def _trainer(sae: Any, batches: Iterator[Tensor], total: int, batch_size: int, lr: float, device: str) -> Any:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    steps = max(total // batch_size, 1)
    config = SAETrainerConfig(
        total_training_samples=total,
        train_batch_size_samples=batch_size,
        lr=lr,
        lr_end=lr / 10,  # None fails an assertion inside the trainer
        lr_warm_up_steps=steps // 20,
        lr_decay_steps=steps // 5,
        device=device,
        dead_feature_window=max(10, min(1000, steps // 10)),  # a short run must be able to find its dead latents
        feature_sampling_window=max(100, min(2000, steps // 2)),
    )
    sae.to(device)
    return SAETrainer(config, sae, batches)


@torch.no_grad()
def _start_from_statistics(trainer: Any, cache: Any, site: str) -> None:
    """Scaling factor and decoder bias from the cache's exact statistics, not from a sample of batches."""
    sae, stats = trainer.sae, cache.stats[cache[site].spec.name]
    factor = 1.0
    if sae.cfg.normalize_activations == "expected_average_only_in":
        factor = sae.cfg.d_in**0.5 / stats.norm
        trainer.activation_scaler.scaling_factor = factor
    if sae.cfg.normalize_activations != "layer_norm":
        sae.b_dec.copy_((stats.mean.flatten() * factor).to(sae.b_dec))


def _run(trainer: Any, batches: Iterator[Tensor], total: int, progress: bool) -> None:
    """The trainer's loop over its public steps, with a bar of our own."""
    with tqdm(total=total, desc="training SAE", unit="row", unit_scale=True, disable=not progress) as bar:
        while trainer.n_training_samples < total:
            trainer.maybe_reset_sparsity()
            output = trainer.step(next(batches))
            trainer.n_training_steps += 1
            bar.update(len(output.sae_in))
            if progress and trainer.n_training_steps % 20 == 1:
                bar.set_postfix(_progress(trainer, output))
    if not torch.isfinite(output.loss):
        raise SAEDataError(f"Training diverged (loss {float(output.loss)}); lower lr, or normalise the activations.")
    if trainer.activation_scaler.scaling_factor is not None:
        trainer.sae.fold_activation_norm_scaling_factor(trainer.activation_scaler.scaling_factor)
        trainer.activation_scaler.scaling_factor = None
    trainer.set_final_sae_metadata()


@torch.no_grad()
def _progress(trainer: Any, output: Any) -> dict[str, str]:
    rows, acts = output.sae_in.float(), output.feature_acts
    variance = (rows - rows.mean(0)).square().sum()
    return {
        "loss": f"{float(output.loss):.3g}",
        "L0": f"{float(acts.bool().float().sum(-1).mean()):.1f}",
        "FVU": f"{float((output.sae_out.float() - rows).square().sum() / variance):.3f}",
        "dead": str(int(trainer.dead_neurons.sum())),
    }


@torch.no_grad()
def _calibrate(sae: Any, cache: Any, site: str, k: float) -> None:
    """Set the threshold of a BatchTopK SAE to where k latents a row are active on average, on rows spread evenly."""
    step = max(len(cache) // _CALIBRATION_ROWS, 1)
    rows = cache[site][0 : len(cache) : step].flatten(1).to(sae.device, sae.dtype)
    kept: Tensor = sae.W_dec.new_zeros(0)
    wanted = int(k * len(rows))
    for block in rows.split(2048):
        _, pre = sae.encode_with_hidden_pre(block)  # [block, d_sae], scaled as the threshold is
        pool = torch.cat([kept, pre.relu().flatten()])
        kept = pool.topk(min(wanted, len(pool)), sorted=False).values
    sae.topk_threshold = kept.min().double().clamp_min(0)


def _describe(sae: Any, cache: Any, site: str, run: dict[str, Any]) -> None:
    """Write into the SAE's metadata where it came from."""
    metadata = sae.cfg.metadata
    metadata.model_name, metadata.hook_name = cache.model.name, site
    metadata.model_weights_hash = cache.model.weights_hash
    metadata.cache_rows = len(cache)
    metadata.training_run = run


def _saved(sae: Any, out: str | Path | None, device: str) -> Any:
    """Save the inference SAE (whole or not at all) and give back what loading it gives."""
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            sae.save_inference_model(folder)
            return load(folder, device=device)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        for path in sae.save_inference_model(folder):
            Path(path).replace(out / Path(path).name)
    return load(out, device=device)
