"""Shuffled reading of float16 rows into float32 batches: this project, the same gather from RAM, SAELens, memory maps.

    python -m benchmarks.reading [--widths 128 768 4096] [--mb N] [--repeats N] [--out FILE.json]

Every arm reads one epoch of the same rows, in turn within a round, so that whatever else the machine does hits all of
them; each batch is summed up to one number in float64 from a few of its columns, and an epoch's sum must be the data's.
Warm: the files are in the page cache. Cold: their pages are dropped first (`posix_fadvise`), where the system does so;
what lies below (a virtual disk's own cache) stays as it is. Reported: median rows per second, and the time as a ratio
to the gather from RAM of the same round (median and bootstrap interval).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import torch
from jaxtyping import Float, Float16
from torch import Tensor

from benchmarks.capture import _turned, bootstrap_median

LENGTH = 128  # tokens per sequence
RAM = "RAM: index_select, then float()"
WORDS = "RAM: index_select of int64 words, then float()"
OURS = "activations_cache batches"


@dataclass(frozen=True)
class Settings:
    """What is read."""

    mb: int = 256
    batch: int = 4096
    buffer_mb: int = 64
    repeats: int = 5
    cold_repeats: int = 2
    seed: int = 0


class Files:
    """The same rows in every arm's form, and one method per arm that goes through them once."""

    def __init__(self, settings: Settings, width: int, folder: Path) -> None:
        self.settings, self.width, self.folder = settings, width, folder
        wanted = settings.mb * 2**20 // (2 * width)
        self.n = max(wanted // settings.batch, 1) * settings.batch
        self.values = _values(self.n, width, settings.seed)
        self.total = float(checked(self.values.float()))
        self.epoch = 0
        self.shards = self._shards()
        self.batches = {prefetch: self._batches(prefetch) for prefetch in (True, False)}
        np.save(folder / "rows.npy", self.values.numpy())
        self._safetensors()
        self.arms: dict[str, Callable[[], Iterator[Tensor]]] = {
            OURS: self.ours,
            f"{OURS}, prefetch=False": lambda: self.ours(prefetch=False),
            RAM: self.ram,
            WORDS: self.words,
            "numpy memory map: random rows": self.memmap,
            "safetensors: random rows": self.safetensors,
        }
        if width == 128:
            self._arrow()
            self.arms["SAELens ActivationsStore, mixing 64 contexts of 512"] = lambda: self.saelens(64 * 512)
            self.arms["SAELens ActivationsStore, mixing two batches"] = lambda: self.saelens(2 * settings.batch)
            self.arms["SAELens ActivationsStore, in order"] = lambda: self.saelens(0)

    def _shards(self) -> Any:
        """A cache's shards, written as capture writes them."""
        from activations_cache import store
        from activations_cache._shards import ShardSet

        folder = self.folder / "cache"
        folder.mkdir()
        spec, entries = store.SiteSpec("site", "float16", (self.width,)), []
        per_shard = max(1, 64 * 2**20 // (2 * self.width * LENGTH)) * LENGTH
        for number, first in enumerate(range(0, self.n, per_shard)):
            values = self.values[first : first + per_shard].numpy()
            sequences = len(values) // LENGTH
            buffer = _buffer(store, spec, first, sequences)
            buffer.put("site", range(first // LENGTH, first // LENGTH + sequences), values)
            entries.append(store.write_shard(folder, f"shard-{number:05d}.h5", buffer, [spec], "benchmark"))
        return ShardSet(folder, entries, {"site": spec}, "benchmark")

    def _safetensors(self) -> None:
        from safetensors.torch import save_file

        save_file({"rows": self.values}, self.folder / "rows.safetensors")

    def _arrow(self) -> None:
        """The rows as SAELens caches them by default: float32 arrays [context, d_in] and token ids, in a dataset."""
        from datasets import Array2D, Dataset, Features, Sequence, Value

        features = Features(
            {
                "site": Array2D(shape=(LENGTH, self.width), dtype="float32"),
                "token_ids": Sequence(Value("int32"), length=LENGTH),
            }
        )
        ids = np.zeros(LENGTH, np.int32)
        blocks = self.values.reshape(-1, LENGTH, self.width)

        def rows() -> Iterator[dict[str, Any]]:
            for block in blocks:
                yield {"site": block.float().numpy(), "token_ids": ids}

        data = Dataset.from_generator(rows, features=features, cache_dir=str(self.folder / "made"))
        data.save_to_disk(str(self.folder / "arrow"))

    def next_seed(self) -> int:
        """Every epoch is in another order."""
        self.epoch += 1
        return self.settings.seed + self.epoch

    def permutation(self) -> Tensor:
        """A permutation of all rows."""
        return torch.randperm(self.n, generator=torch.Generator().manual_seed(self.next_seed()))

    def ours(self, prefetch: bool = True) -> Iterator[Tensor]:
        """Blocks from disk into a buffer, permuted there."""
        return iter(self.batches[prefetch])

    def _batches(self, prefetch: bool) -> Any:
        from activations_cache._batches import Batches

        budget = self.settings.buffer_mb * 2**20
        batch, seed = self.settings.batch, self.settings.seed
        return Batches(
            self.shards, "site", torch.float32, batch_size=batch, seed=seed, buffer_bytes=budget, prefetch=prefetch
        )

    def ram(self) -> Iterator[Float[Tensor, "batch d"]]:
        """All rows in RAM, each batch the next rows of a permutation of all."""
        for index in self.permutation().split(self.settings.batch):
            yield self.values.index_select(0, index).float()

    def words(self) -> Iterator[Float[Tensor, "batch d"]]:
        """The same, moving the rows as 8-byte integers."""
        words = self.values.view(torch.int64)
        for index in self.permutation().split(self.settings.batch):
            yield words.index_select(0, index).view(torch.float16).float()

    def memmap(self) -> Iterator[Float[Tensor, "batch d"]]:
        """numpy's fancy index on a memory map of the rows."""
        mapped = np.load(self.folder / "rows.npy", mmap_mode="r")
        for index in self.permutation().split(self.settings.batch):
            yield torch.from_numpy(mapped[index.numpy()]).float()

    def safetensors(self) -> Iterator[Float[Tensor, "batch d"]]:
        """torch's gather from the tensor that safetensors maps."""
        from safetensors import safe_open

        with safe_open(self.folder / "rows.safetensors", "pt") as file:
            rows = file.get_tensor("rows")
            for index in self.permutation().split(self.settings.batch):
                yield rows.index_select(0, index).float()

    def saelens(self, mixed: int) -> Iterator[Float[Tensor, "batch d"]]:
        """SAELens's reader of its cached activations, through its mixing buffer of `mixed` rows, or in order.

        The buffer is copied whole for every batch that is read, so a larger one is slower; two batches are the fewest
        it takes. Its tutorials use 64 contexts of 512 tokens.
        """
        from sae_lens.training.activations_store import ActivationsStore
        from sae_lens.training.mixing_buffer import mixing_buffer

        rows = (mixed or 2 * self.settings.batch) // LENGTH
        self.store = ActivationsStore(
            model=None,  # nothing is run
            dataset=None,
            streaming=False,
            hook_name="site",
            hook_head_index=None,
            context_size=LENGTH,
            d_in=self.width,
            n_batches_in_buffer=rows,
            total_training_tokens=self.n,
            store_batch_size_prompts=self.settings.batch // LENGTH,
            train_batch_size_tokens=self.settings.batch,
            prepend_bos=False,
            normalize_activations="none",
            device=torch.device("cpu"),
            dtype="float32",
            cached_activations_path=str(self.folder / "arrow"),
        )

        def once() -> Iterator[Tensor]:  # its own loader goes on for ever; this is the same up to the epoch's end
            for _ in range(self.n // self.settings.batch):
                yield self.store.get_filtered_llm_batch(raise_on_epoch_end=True)

        yield from mixing_buffer(rows * LENGTH, self.settings.batch, once(), 0.5) if mixed else once()

    def drop_pages(self) -> bool:
        """Ask the system to forget the files' pages; whether it has a way to be asked."""
        if not hasattr(os, "posix_fadvise"):
            return False
        for path in self.folder.rglob("*"):
            if path.is_file():
                handle = os.open(path, os.O_RDONLY)
                os.fsync(handle)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(handle)
        return True


def _values(n: int, width: int, seed: int) -> Float16[Tensor, "n width"]:
    """Random rows, made block by block."""
    made = torch.empty(n, width, dtype=torch.float16)
    source = torch.Generator().manual_seed(seed)
    for block in made.split(2**22 // width):
        block.copy_(torch.randn(block.shape, generator=source))
    return made


def _buffer(store: Any, spec: Any, first: int, sequences: int) -> Any:
    lengths, position = np.full(sequences, LENGTH), np.tile(np.arange(LENGTH, dtype=np.int32), sequences)
    ids, values = np.zeros(sequences * LENGTH, np.int32), np.empty((sequences * LENGTH, *spec.shape), np.float16)
    shape = (first // LENGTH, first, ids, lengths, lengths)
    return store.ShardBuffer(*shape, {}, {spec.name: values}, {"position": position})


def checked(batch: Float[Tensor, "batch d"]) -> float:
    """The sum of three values of every row: each row adds to it."""
    return float(batch[:, [0, batch.shape[1] // 2, -1]].sum(dtype=torch.float64))


def timed(arm: Callable[[], Iterator[Tensor]], files: Files, check: bool) -> float:
    """Seconds of one epoch; checks that it was every row once, by number, type and sum."""
    started, rows, total = time.perf_counter(), 0, 0.0
    for batch in arm():
        rows += len(batch)
        if check:
            total += checked(batch)
    seconds = time.perf_counter() - started
    if rows != files.n or batch.dtype != torch.float32:
        raise SystemExit(f"an epoch had {rows} rows of {batch.dtype}; {files.n} of float32 were to come")
    if check and abs(total - files.total) > 1e-6 * files.n:
        raise SystemExit(f"an epoch's sum was {total}; the data's is {files.total}")
    return seconds


def measure(settings: Settings, width: int, folder: Path) -> dict[str, Any]:
    """Every arm in every round, warm; then the arms that read files, cold."""
    files = Files(settings, width, folder)
    warm: dict[str, list[float]] = {name: [] for name in files.arms}
    for round_number in range(settings.repeats + 1):  # the first round warms up and is checked, not counted
        for name in _turned(list(files.arms), round_number):
            seconds = timed(files.arms[name], files, check=round_number == 0)
            if round_number:
                warm[name].append(seconds)
    cold: dict[str, list[float]] = {name: [] for name in files.arms if not name.startswith("RAM")}
    dropped = True
    for round_number in range(settings.cold_repeats):
        for name in _turned(list(cold), round_number):
            dropped = files.drop_pages() and dropped
            cold[name].append(timed(files.arms[name], files, check=False))
    rows = [_row(name, files, values, warm, cold.get(name)) for name, values in warm.items()]
    return {"width": width, "rows": files.n, "pages dropped": dropped, "arms": rows, "warm": warm, "cold": cold}


def _row(
    name: str, files: Files, seconds: list[float], warm: dict[str, list[float]], cold: list[float] | None
) -> dict[str, Any]:
    best = [min(pair) for pair in zip(warm[RAM], warm[WORDS], strict=True)]
    ratios = np.array(seconds) / np.array(best)
    low, high = bootstrap_median(ratios)
    found = {"arm": name, "rows/s": files.n / statistics.median(seconds), "ratio": float(np.median(ratios))}
    found |= {"low": low, "high": high, "cold rows/s": files.n / statistics.median(cold) if cold else None}
    against = np.array(seconds) / np.array(warm[OURS])
    return {**found, "ours is faster by": float(np.median(against)), "interval": bootstrap_median(against)}


def table(result: dict[str, Any]) -> str:
    """One markdown table per width."""
    settings, machine = result["settings"], result["machine"]
    lines = [
        f"float16 rows to float32 batches of {settings['batch']}, {settings['mb']} MiB per width, buffers "
        f"{settings['buffer_mb']} MiB; {settings['repeats']} rounds ({settings['cold_repeats']} cold); "
        f"{machine['threads']} threads, load {machine['load'][0]:.1f}; ratios are times, to the faster gather from RAM"
    ]
    for width in result["widths"]:
        cold = "cold Mrow/s" if width["pages dropped"] else "cold: pages cannot be dropped here"
        lines += ["", f"| d {width['width']}, {width['rows']:,} rows | warm Mrow/s | ratio to RAM (95 %) | {cold} |"]
        lines += ["| --- | ---: | ---: | ---: |"]
        for row in width["arms"]:
            slow = "-" if row["cold rows/s"] is None else f"{row['cold rows/s'] / 1e6:.3f}"
            ratio = f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
            lines.append(f"| {row['arm']} | {row['rows/s'] / 1e6:.3f} | {ratio} | {slow} |")
        for row in width["arms"]:
            if row["arm"].startswith("SAELens"):
                low, high = row["interval"]
                factor = f"{row['ours is faster by']:.1f} ({low:.1f} to {high:.1f})"
                lines += ["", f"At d {width['width']} warm reading is {factor} times as fast as {row['arm']}."]
    return "\n".join(lines)


def main() -> None:
    """Parse the arguments, measure, print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reading", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 768, 4096])
    parser.add_argument("--mb", type=int, default=Settings.mb, help="MiB of float16 rows per width")
    parser.add_argument("--buffer-mb", type=int, default=Settings.buffer_mb, help="RAM budget of the shuffle")
    parser.add_argument("--repeats", type=int, default=Settings.repeats, help="rounds that are counted")
    parser.add_argument("--out", type=Path, help="also write everything as json")
    arguments = parser.parse_args()
    settings = Settings(mb=arguments.mb, buffer_mb=arguments.buffer_mb, repeats=arguments.repeats)
    found = []
    for width in arguments.widths:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(measure(settings, width, Path(folder)))
    result = {
        "settings": asdict(settings),
        "machine": {"platform": platform.platform(), "threads": torch.get_num_threads(), "load": os.getloadavg()},
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "widths": found,
    }
    print(table(result))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
