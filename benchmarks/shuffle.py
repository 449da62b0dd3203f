"""How well block shuffling mixes: rows of one sequence in a batch, against the RAM budget, beside a permutation's.

    python -m benchmarks.shuffle [--width 768] [--rows N] [--batch N] [--out FILE.json]

No values are read: the order of an epoch follows from sizes and seed alone. For every batch of one epoch: the share of
the sequence that has most rows in it, the pairs of rows that come from one sequence, and the sequences that it holds.
For a permutation of all N rows in sequences of L rows, a batch of b holds b (b - 1) / 2 * (L - 1) / (N - 1) such pairs
and N / L * (1 - C(N - L, b) / C(N, b)) sequences on average (hypergeometric); the table shows both, and a drawn one.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from activations_cache._batches import Batches
from activations_cache.store import AnyArray, SiteSpec

BUDGETS_MB = (4, 16, 64, 256, 1024)


@dataclass(frozen=True)
class Settings:
    """What is mixed: float16 rows of sequences of one length."""

    width: int = 768
    rows: int = 2**20
    length: int = 128
    batch: int = 4096
    seed: int = 0


class NoValues:
    """A source of rows whose values nobody looks at."""

    def __init__(self, settings: Settings) -> None:
        self.rows, self.specs = settings.rows, {"site": SiteSpec("site", "float16", (settings.width,))}

    def read_into(self, site: str, start: int, out: AnyArray) -> None:
        """Leave `out` as it is."""


def measure(settings: Settings, batches: Iterable[npt.NDArray[np.int64]]) -> dict[str, float]:
    """The means over the batches of an epoch, each given by its row numbers."""
    shares, pairs, sequences, seen = [], [], [], []
    for rows in batches:
        _, counts = np.unique(rows // settings.length, return_counts=True)
        shares.append(counts.max() / len(rows))
        pairs.append(float((counts * (counts - 1) // 2).sum()))
        sequences.append(len(counts))
        seen.append(rows)
    if not np.array_equal(np.sort(np.concatenate(seen)), np.arange(settings.rows)):
        raise SystemExit("an epoch did not hold every row once")
    return {
        "share": float(np.mean(shares)),
        "worst share": float(np.max(shares)),
        "pairs": float(np.mean(pairs)),
        "sequences": float(np.mean(sequences)),
    }


def expected(settings: Settings) -> dict[str, float]:
    """The means of a permutation of all rows, in closed form."""
    n, length, batch = settings.rows, settings.length, settings.batch
    missing = sum(math.log1p(-batch / (n - step)) for step in range(length))  # log of C(n - length, b) / C(n, b)
    return {
        "pairs": batch * (batch - 1) / 2 * (length - 1) / (n - 1),
        "sequences": n / length * -math.expm1(missing),
    }


def block_shuffle(settings: Settings, budget_mb: int) -> dict[str, Any]:
    """One epoch of our batches under a RAM budget."""
    source: Any = NoValues(settings)
    batches = Batches(
        source,
        ["site"],
        batch_size=settings.batch,
        seed=settings.seed,
        buffer_bytes=budget_mb * 2**20,
        prefetch=False,
        with_rows=True,
    )
    layout = batches.layout()
    found = measure(settings, (numbers.numpy() for _, numbers in batches))
    return {"budget MB": budget_mb, "block rows": layout.block, "blocks": layout.blocks, **found}


def permutation(settings: Settings) -> dict[str, Any]:
    """One epoch of a drawn permutation of all rows."""
    order = np.random.default_rng(settings.seed).permutation(settings.rows)
    return measure(settings, np.split(order, range(settings.batch, settings.rows, settings.batch)))


def in_order(settings: Settings) -> dict[str, Any]:
    """No shuffling at all."""
    order = np.arange(settings.rows)
    return measure(settings, np.split(order, range(settings.batch, settings.rows, settings.batch)))


def table(result: dict[str, Any]) -> str:
    """The figures as a markdown table."""
    s = result["settings"]
    lines = [
        f"{s['rows']:,} rows of d {s['width']} float16 in sequences of {s['length']}; means over the batches of "
        f"{s['batch']} of one epoch",
        "",
        "| order | blocks x rows in a buffer | largest share of one sequence (worst) | pairs | sequences |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    named = [("in the order of the data", "-", result["in order"])]
    for row in result["budgets"]:
        named.append((f"budget {row['budget MB']} MiB", f"{row['blocks']} x {row['block rows']}", row))
    named.append(("permutation of all rows", "-", result["permutation"]))
    for name, blocks, row in named:
        share = f"{100 * row['share']:.3f} % ({100 * row['worst share']:.3f} %)"
        lines.append(f"| {name} | {blocks} | {share} | {row['pairs']:,.0f} | {row['sequences']:,.0f} |")
    known = result["expected"]
    lines.append(f"| permutation, expected | - | - | {known['pairs']:,.0f} | {known['sequences']:,.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the arguments, draw the epochs, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shuffle", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--width", type=int, default=Settings.width)
    parser.add_argument("--rows", type=int, default=Settings.rows)
    parser.add_argument("--batch", type=int, default=Settings.batch)
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS_MB, help="RAM budgets in MiB")
    parser.add_argument("--out", type=Path, help="also write everything as json")
    arguments = parser.parse_args()
    rows = arguments.rows // Settings.length * Settings.length
    settings = Settings(width=arguments.width, rows=rows, batch=arguments.batch)
    result = {
        "settings": asdict(settings),
        "in order": in_order(settings),
        "budgets": [block_shuffle(settings, budget) for budget in arguments.budgets],
        "permutation": permutation(settings),
        "expected": expected(settings),
    }
    print(table(result))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
