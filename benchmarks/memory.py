"""Memory while capturing and while reading: it stays at model + one batch + one shard, however large the cache is.

    python -m benchmarks.memory [--times 1 10 50] [--out FILE.json]

Each row is a process of its own. It imports everything, captures a few rows once, and takes the memory it then holds as
its base. Then it loads the model, runs one bare batch, captures a cache of the given size from a file of token ids, and
reads it all in shuffled batches. The bound is counted, not fitted: the model's parameters, what one bare batch needed
beyond them with the rows that it stores, and the bytes of one shard. Peaks are the kernel's (VmHWM), over the base.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

MIB = 2**20
LENGTH, BATCH, LAYERS, WIDTH, VOCAB = 128, 4, 4, 64, 4096
SITES = ["blocks.*.hook_resid_post", "blocks.*.mlp.hook_post"]
ROW_BYTES = LAYERS * (WIDTH + 4 * WIDTH) * 4
SHARD_ROWS = 6400  # 31 MiB
BUFFER = 16 * MIB  # of the reader


def status(field: str) -> int:
    """Bytes that /proc says of this process: VmRSS now, VmHWM at the most since `reset_peak`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    """Give what is free back to the system, and let VmHWM begin at what is held now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def write_ids(path: Path, sequences: int) -> None:
    """A jsonl file with token ids."""
    random = np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(sequences):
            file.write(json.dumps({"input_ids": random.integers(3, VOCAB, LENGTH).tolist()}) + "\n")


def model() -> Any:
    """A GPT-2 of 4 layers, d 64, with random weights."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=4, **ends)).eval()


def capture(hf: Any, ids: Path, out: Path) -> Any:
    """The cache of all sites."""
    import activations_cache as ac

    settings: dict[str, Any] = {"batch_tokens": BATCH * LENGTH, "shard_rows": SHARD_ROWS, "progress": False}
    return ac.capture(hf, ids, SITES, out, **settings)


def read(cache: Any) -> tuple[int, int, int]:
    """Go through one site in shuffled batches; the rows seen, and the most of memory of its own and of mapped pages."""
    site = f"blocks.{LAYERS - 1}.mlp.hook_post"
    seen, own, mapped = 0, 0, 0
    for number, batch in enumerate(cache.batches(site, batch_size=1024, buffer_bytes=BUFFER)):
        seen += len(batch)
        if number % 4 == 0:
            own, mapped = max(own, status("RssAnon")), max(mapped, status("RssFile"))
    return seen, own, mapped


def child(folder: Path) -> dict[str, Any]:
    """Measure in this process: `folder` holds the ids."""
    import torch

    warm = capture(model(), folder / "few.jsonl", folder / "warm")
    read(warm)
    del warm
    reset_peak()
    base = status("VmRSS")
    hf = model()
    parameters = sum(p.numel() * p.element_size() for p in hf.parameters())
    reset_peak()
    held = status("VmRSS")
    with torch.no_grad():
        ids = torch.randint(3, VOCAB, (BATCH, LENGTH))
        hf.transformer(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    forward = status("VmHWM") - held
    reset_peak()
    started = time.perf_counter()
    cache = capture(hf, folder / "ids.jsonl", folder / "acts")
    seconds, peak = time.perf_counter() - started, status("VmHWM") - base
    hf = None
    reset_peak()
    own, mapped = status("RssAnon"), status("RssFile")
    rows, most_own, most_mapped = read(cache)
    problems = cache.verify()
    if problems or rows != len(cache):
        raise SystemExit(f"{rows} of {len(cache)} rows were read; {len(problems)} problems: {problems[:3]}")
    batch = forward + BATCH * LENGTH * ROW_BYTES
    return {
        "cache": sum(path.stat().st_size for path in (folder / "acts").glob("*.h5")),
        "rows": rows,
        "model": parameters,
        "batch": batch,
        "shard": SHARD_ROWS * ROW_BYTES,
        "peak": peak,
        "reading": most_own - own,
        "mapped": most_mapped - mapped,
        "seconds": seconds,
    }


def measure(times: int) -> dict[str, Any]:
    """A child process with a cache of `times` the bound."""
    bound = SHARD_ROWS * ROW_BYTES + 16 * MIB  # no less than what the child counts exactly
    sequences = -(-times * bound // (ROW_BYTES * LENGTH))
    with tempfile.TemporaryDirectory() as name:
        write_ids(Path(name) / "few.jsonl", 2 * BATCH)
        write_ids(Path(name) / "ids.jsonl", sequences)
        command = [sys.executable, "-m", "benchmarks.memory", "--child", name]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a markdown table."""
    lines = [
        f"GPT-2 of {LAYERS} layers, d {WIDTH}, {len(SITES) * LAYERS} sites, {ROW_BYTES} bytes a token in float32; "
        f"batches of {BATCH} x {LENGTH} tokens, shards of {SHARD_ROWS} rows; reader's buffer {BUFFER // MIB} MiB",
        "",
        "| cache MiB | times the bound | bound MiB: model + batch + shard | peak MiB, capturing | of the bound "
        "| own MiB, reading | mapped MiB | s |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        parts = [row["model"], row["batch"], row["shard"]]
        bound = sum(parts)
        shown = " + ".join(f"{part / MIB:.1f}" for part in parts)
        lines.append(
            f"| {row['cache'] / MIB:,.0f} | {row['cache'] / bound:.1f} | {bound / MIB:.1f}: {shown} | "
            f"{row['peak'] / MIB:.1f} | {row['peak'] / bound:.2f} | {row['reading'] / MIB:.1f} | "
            f"{row['mapped'] / MIB:.1f} | "
            f"{row['seconds']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse the arguments, measure, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--times", type=int, nargs="+", default=[1, 10, 50], help="sizes of the cache, in bounds")
    parser.add_argument("--out", type=Path, help="also write everything as json")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments.child)))
        return
    rows = [measure(times) for times in arguments.times]
    print(table(rows))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"platform": platform.platform(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
