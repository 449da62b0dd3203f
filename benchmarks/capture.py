"""Capture of residual sites: this project, the bare trunk, TransformerBridge, nnsight and SAELens.

    python -m benchmarks.capture [--sites last|all] [--pairs N] [--rounds N] [--sequences N] [--out FILE.json]

Two measurements of the same model (random GPT-2, d 768, 12 layers). In the first, the bare trunk and capture take turns
over many tokens, so that what is paid once a capture weighs what it does in a short one and not more; their ratio is
the target's. In the second, all arms take turns over fewer tokens. Every round runs each arm once, in another order, so
that whatever else the machine does hits all of them. Reported: medians, the ratio to the bare trunk of the same round
(median and bootstrap interval), processor time, and floors: the blocks' matrix products alone, and the stored bytes
written alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """What is run."""

    sequences: int = 96
    length: int = 128
    batch: int = 8
    repeats: int = 7
    layers: int = 12
    d_model: int = 768
    heads: int = 12
    vocab: int = 50257
    sites: str = "last"
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Tokens per round and arm."""
        return self.sequences * self.length


def random_gpt2(settings: Settings) -> Any:
    """GPT-2's shape with random weights, in eval mode."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(settings.seed)
    config = GPT2Config(
        vocab_size=settings.vocab,
        n_embd=settings.d_model,
        n_layer=settings.layers,
        n_head=settings.heads,
        n_positions=max(1024, settings.length),
    )
    return GPT2LMHeadModel(config).eval()


class Bench:
    """The model, the data and one method per arm. Each method returns [sequences, length, d_model] of the last site."""

    def __init__(self, settings: Settings, model: Any, folder: Path) -> None:
        self.settings, self.model, self.folder = settings, model, folder
        torch.manual_seed(settings.seed)
        self.ids = torch.randint(0, settings.vocab, (settings.sequences, settings.length))
        self.site = f"blocks.{settings.layers - 1}.hook_resid_post"
        self.patterns = self.site if settings.sites == "last" else "blocks.*.hook_resid_post"
        self.last_seconds: float | None = None
        self.setup_seconds = 0.0
        self.runs = 0

    @cached_property
    def bridge(self) -> Any:
        """A TransformerBridge that shares the model's weights."""
        from probe import models

        return models.wrap(self.model, None, name="gpt2").bridge

    @cached_property
    def saved_model(self) -> Path:
        """The model as a directory, which SAELens loads."""
        path = self.folder / "model"
        self.model.save_pretrained(path)
        _save_tokenizer(self.settings.vocab, path)
        return path

    def fresh(self) -> Path:
        """A directory that nobody has written to."""
        self.runs += 1
        return self.folder / f"run-{self.runs}"

    def batches(self) -> tuple[Tensor, ...]:
        """The ids in batches [batch, length]."""
        return self.ids.split(self.settings.batch)

    @torch.no_grad()
    def bare_trunk(self) -> Tensor:
        """The blocks alone, no head and no hook."""
        kept: list[Tensor] = []
        handle = self.model.transformer.h[-1].register_forward_hook(lambda _m, _i, out: kept.append(_first(out)))
        try:
            for ids in self.batches():
                self.model.transformer(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        finally:
            handle.remove()
        return torch.cat(kept)

    def capture(self) -> Tensor:
        """`activations_cache.capture` to disk, hashing of the weights included; notes when its first forward begins."""
        import activations_cache as ac

        started, began = time.perf_counter(), []
        self.captured = self.fresh()
        budget = self.settings.batch * self.settings.length
        handle = self.model.register_forward_pre_hook(lambda *_: began.append(time.perf_counter()))
        try:
            cache = ac.capture(self.model, self.ids, self.patterns, self.captured, batch_tokens=budget, progress=False)
        finally:
            handle.remove()
        self.last_seconds = time.perf_counter() - started  # before the check reads the rows back
        self.setup_seconds = began[0] - started
        return _last(cache, self)

    @torch.no_grad()
    def check_every_site(self) -> None:
        """The rows of the latest capture equal what hooks of our own see in the first batch, bit for bit."""
        import activations_cache as ac

        cache, ids, seen = ac.open(self.captured), self.batches()[0], {}
        for layer, block in enumerate(self.model.transformer.h):
            name = f"blocks.{layer}.hook_resid_post"
            if name in cache.sites:
                block.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: _first(out)}))
        self.model.transformer(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        for block in self.model.transformer.h:
            block._forward_hooks.clear()
        for name, value in seen.items():
            if not torch.equal(cache[name][: ids.numel()], value.flatten(0, 1)):
                raise SystemExit(f"{name}: the captured rows are not those of the forward")
        if len(seen) != len(cache.sites):
            raise SystemExit(f"{len(cache.sites)} sites were captured, {len(seen)} compared")

    @torch.no_grad()
    def transformer_bridge(self) -> Tensor:
        """`TransformerBridge.run_with_cache` into RAM, stopped after the last block."""
        kept = []
        layers = range(self.settings.layers)
        names = [self.site] if self.settings.sites == "last" else [f"blocks.{i}.hook_resid_post" for i in layers]
        for ids in self.batches():
            _, cache = self.bridge.run_with_cache(ids, names_filter=names, stop_at_layer=self.settings.layers)
            kept.append(cache[self.site])
        return torch.cat(kept)

    @torch.no_grad()
    def nnsight(self) -> Tensor:
        """`nnsight`: a trace per batch that saves the blocks' outputs into RAM and stops after the last block."""
        import nnsight

        traced, kept = nnsight.NNsight(self.model), []
        first = self.settings.layers - 1 if self.settings.sites == "last" else 0
        for ids in self.batches():
            with traced.trace(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False) as tracer:
                outputs = nnsight.save([])
                for block in traced.transformer.h[first:]:
                    outputs.append(block.output)
                tracer.stop()
            kept.append(_first(outputs[-1]))
        return torch.cat(kept)

    def saelens(self) -> Tensor:
        """`sae_lens.CacheActivationsRunner` to disk (it stores one site); loading of the model not counted."""
        runner = self.saelens_runner()
        started = time.perf_counter()
        dataset = runner.run()
        self.last_seconds = time.perf_counter() - started
        rows = dataset.with_format("torch")[runner.cfg.hook_name]
        return rows[:] if not isinstance(rows, Tensor) else rows

    def saelens_runner(self) -> Any:
        """A runner over the same ids, in order, in float32."""
        from datasets import Dataset
        from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

        config = CacheActivationsRunnerConfig(
            dataset_path="ids",
            model_name=str(self.saved_model),
            model_class_name="AutoModelForCausalLM",
            model_batch_size=self.settings.batch,
            hook_name=f"transformer.h.{self.settings.layers - 1}",
            d_in=self.settings.d_model,
            training_tokens=self.settings.tokens,
            context_size=self.settings.length,
            new_cached_activations_path=str(self.fresh()),
            shuffle=False,
            dtype="float32",
            device="cpu",
            prepend_bos=False,
            streaming=False,
            buffer_size_gb=self.settings.tokens * self.settings.d_model * 4 / 1e9,
        )
        data = Dataset.from_dict({"input_ids": self.ids.tolist()})
        return CacheActivationsRunner(config, override_dataset=data)

    def matrix_products(self) -> None:
        """The floor of any forward: the blocks' weight products on inputs of the right shape."""
        d, rows = self.settings.d_model, self.settings.batch * self.settings.length
        if not hasattr(self, "_operands"):
            shapes = [(d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)]
            self._operands = [(torch.randn(rows, m), torch.randn(m, n)) for m, n in shapes]
        for _ in self.batches():
            for _layer in range(self.settings.layers):
                for left, right in self._operands:
                    left @ right

    def bytes_written(self) -> None:
        """The floor of any storage: as many bytes as capture stores, written and fsynced."""
        sites = 1 if self.settings.sites == "last" else self.settings.layers
        raw = np.ones((self.settings.tokens, self.settings.d_model * sites), np.float32)
        path = self.fresh()
        with path.open("wb") as file:
            file.write(raw.data)
            file.flush()
            os.fsync(file.fileno())


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _last(cache: Any, bench: Bench) -> Float[Tensor, "seq pos d_model"]:
    rows = cache[bench.site][:]
    return rows.reshape(bench.settings.sequences, bench.settings.length, -1)


def _save_tokenizer(vocab: int, folder: Path) -> None:
    """SAELens wants a tokenizer beside the model; the ids never pass through it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w0", bos_token="w1", eos_token="w2", pad_token="w2"
    )
    made.save_pretrained(folder)


def timed(arm: Callable[[], Any], bench: Bench) -> tuple[float, float, Any]:
    """Seconds and processor seconds of one call (seconds of what the arm says it measured, where it says so)."""
    bench.last_seconds = None
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    result = arm()
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    processor = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return (seconds if bench.last_seconds is None else bench.last_seconds), processor, result


BARE, OURS = "bare trunk", "activations_cache.capture"


def arms_of(bench: Bench, names: str) -> dict[str, Callable[[], Any]]:
    """The arms of the first measurement ("pair") or of the second ("peers")."""
    arms: dict[str, Callable[[], Any]] = {BARE: bench.bare_trunk, OURS: bench.capture}
    if names == "peers":
        arms["TransformerBridge.run_with_cache (RAM only)"] = bench.transformer_bridge
        arms["nnsight trace (RAM only)"] = bench.nnsight
        if bench.settings.sites == "last":
            arms["SAELens CacheActivationsRunner"] = bench.saelens
        arms |= {"floor: matrix products": bench.matrix_products, "floor: bytes written": bench.bytes_written}
    return arms


def measure(bench: Bench, names: str) -> dict[str, Any]:
    """Run every arm in every round; check the results; summarise."""
    arms, settings = arms_of(bench, names), bench.settings
    times: dict[str, list[float]] = {name: [] for name in arms}
    processor: dict[str, list[float]] = {name: [] for name in arms}
    setup: list[float] = []
    for round_number in range(settings.repeats + 1):  # the first round warms up and is checked, not counted
        results = {}
        for name in _turned(list(arms), round_number):
            seconds, used, results[name] = timed(arms[name], bench)
            if round_number:
                times[name].append(seconds)
                processor[name].append(used)
        setup.append(bench.setup_seconds)
        if not round_number:
            bench.check_every_site()
        worst = _check(results)
        for path in bench.folder.glob("run-*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    rows = [_row(name, values, times[BARE], settings) for name, values in times.items()]
    for row, used in zip(rows, processor.values(), strict=True):
        row["processor s"] = statistics.median(used)
        row["processor ratio"] = float(np.median(np.array(used) / np.array(processor[BARE])))
    streaming = [a - b for a, b in zip(times[OURS], setup[1:], strict=True)]
    rows.insert(2, _row("  of it after the set-up (hashing, planning)", streaming, times[BARE], settings))
    return {
        "settings": {**asdict(settings), "tokens": settings.tokens},
        "largest difference": worst,
        "machine": {"platform": platform.platform(), "threads": torch.get_num_threads(), "load": os.getloadavg()},
        "versions": {"torch": torch.__version__},
        "rows": rows,
        "seconds": times,
        "processor seconds": processor,
        "set-up seconds": setup[1:],
    }


def _turned(names: list[str], by: int) -> list[str]:
    return names[by % len(names) :] + names[: by % len(names)]


def _check(results: dict[str, Any]) -> float:
    """Every arm that stores the last site must have stored the same values."""
    reference, worst = results["bare trunk"], 0.0
    for name, values in results.items():
        if isinstance(values, Tensor):
            if values.shape != reference.shape:
                raise SystemExit(f"{name} gave {tuple(values.shape)}, the bare trunk {tuple(reference.shape)}")
            worst = max(worst, float((values - reference).abs().max() / reference.abs().max()))
    if worst > 1e-4:
        raise SystemExit(f"the arms disagree: relative difference {worst:.2g}")
    return worst


def _row(name: str, seconds: Sequence[float], base: Sequence[float], settings: Settings) -> dict[str, Any]:
    ratios = np.array(seconds) / np.array(base)
    low, high = bootstrap_median(ratios)
    return {
        "arm": name,
        "median s": statistics.median(seconds),
        "tokens/s": settings.tokens / statistics.median(seconds),
        "ratio": float(np.median(ratios)),
        "low": low,
        "high": high,
    }


def bootstrap_median(values: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the median."""
    picks = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    low, high = np.quantile(np.median(values[picks], axis=1), [0.025, 0.975])
    return float(low), float(high)


def table(result: dict[str, Any]) -> str:
    """The rows as a markdown table."""
    settings, machine = result["settings"], result["machine"]
    lines = [
        f"{settings['sites']} resid_post: {settings['tokens']} tokens in batches of {settings['batch']} x "
        f"{settings['length']}, GPT-2 of {settings['layers']} layers, d {settings['d_model']}, float32; "
        f"{settings['repeats']} rounds; {machine['threads']} threads, load {machine['load'][0]:.1f}; "
        f"results agree to {result['largest difference']:.1g}",
        "",
        "| arm | median s | tokens/s | processor s (ratio) | ratio to the bare trunk (95 %) |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        ratio = f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        used = f"{row['processor s']:.2f} ({row['processor ratio']:.3f})" if "processor s" in row else ""
        lines.append(f"| {row['arm']} | {row['median s']:.3f} | {row['tokens/s']:,.0f} | {used} | {ratio} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.capture", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sites", choices=["last", "all"], help="the last resid_post, or every one; both by default")
    parser.add_argument("--pairs", type=int, default=Settings.repeats, help="rounds of bare trunk and capture")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of all arms, over 2,048 tokens; 0 leaves it out")
    parser.add_argument("--sequences", type=int, default=Settings.sequences, help="sequences of 128 tokens in a pair")
    parser.add_argument("--layers", type=int, default=Settings.layers)
    parser.add_argument("--out", type=Path, help="also write everything as json")
    return parser.parse_args()


def main() -> None:
    """Parse the arguments, measure, print the tables."""
    asked, results = arguments(), {}
    base = Settings(layers=asked.layers, repeats=asked.pairs, sequences=asked.sequences)
    model = random_gpt2(base)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for which in [asked.sites] if asked.sites else ["last", "all"]:
            pair = replace(base, sites=which)
            peers = replace(pair, sequences=16, repeats=asked.rounds)
            for names, settings in (("pair", pair), ("peers", peers)):
                if settings.repeats:
                    results[f"{which} {names}"] = measure(Bench(settings, model, Path(folder)), names)
                    print(table(results[f"{which} {names}"]), flush=True)
                    print()
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
