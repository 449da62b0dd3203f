"""The verdict on edits whose answer is known: thresholds are frozen on some organisms and tested on others.

    python -m benchmarks.verdict [--freeze 0 1 2 3] [--test 4 5 6 7] [--size small] [--write] [--out FILE.json]

Thresholds come from the golds of the first organisms alone, each judged with itself left out. The test organisms have
other seeds, and other kinds of edits besides. `--write` replaces the thresholds that come with the package; without it
the packaged ones are tested.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pandas as pd

from benchmarks import unlearned

N_GOLD = 6  # one more than a verdict needs: copies of a gold are judged without it
PACKAGED = Path(__file__).parents[1] / "probe" / "audit" / "thresholds.json"


def bench_of(size: str, seed: int, thresholds: Any = None) -> Any:
    """The bench of one organism."""
    import probe.organisms
    from probe.audit import Bench, Case

    organism = probe.organisms.facts(size, seed)
    return Bench(Case.of(organism, N_GOLD, progress=False, n_boot=100), thresholds=thresholds)


def freeze(size: str, seeds: list[int]) -> Any:
    """Thresholds from the shares of left-out golds."""
    from probe.audit import Thresholds
    from probe.audit.verdict import shares

    found: dict[str, list[float]] = {}
    kinds: dict[str, str] = {}
    for seed in unlearned.bar(seeds, "freezing"):
        bench = bench_of(size, seed)
        kinds |= {f"{s}/{m}": kind for _, s, m, kind in bench.kinds()}
        for i in range(N_GOLD):
            for name, share in shares(bench.gold_card(i).table, bench.evidence()).items():
                found.setdefault(name, []).append(share)
    source = {"organism": f"facts, {size}", "seeds": seeds, "golds": N_GOLD, "edits": "left-out golds"}
    return Thresholds.fit(found, kinds, source=source)


def judged(size: str, seeds: list[int], thresholds: Any) -> pd.DataFrame:
    """One row a case: seed, edit, what it is, what the verdict says, and by which number."""
    from probe.audit import Bench

    rows = []

    def note(seed: int, name: str, truth: str, card: Any, began: float) -> None:
        ruling = card.verdict
        recall = card.value("forget", "recall")
        keep = card.value("retain", "recall")
        row = {"seed": seed, "edit": name, "truth": truth, "verdict": ruling.label, "by": ruling.decided_by}
        rows.append(
            {**row, "forget": recall, "retain": keep, "seconds": time.perf_counter() - began, "rule": ruling.rule}
        )
        print(f"seed {seed}, {name} ({truth}): {ruling.label}. {ruling.rule}", flush=True)

    for seed in unlearned.bar(seeds, "testing"):
        bench = bench_of(size, seed, thresholds)
        for i in range(N_GOLD):
            note(seed, "gold", "removed", bench.gold_card(i), time.perf_counter())
        for truth, makers in (("untouched", unlearned.untouched), ("suppressed", unlearned.suppressed)):
            for name, make in makers(bench.case).items():
                began = time.perf_counter()
                note(seed, name, truth, bench.card(make()), began)
        other = Bench(unlearned.without_last_gold(bench.case), thresholds=thresholds)
        other.adopt(bench)
        for name, make in unlearned.removed(bench.case).items():
            began = time.perf_counter()
            note(seed, name, "removed", other.card(make()), began)
    return pd.DataFrame(rows)


def confusion(rows: pd.DataFrame, by: str = "truth") -> pd.DataFrame:
    """How often each verdict was given, by what the case is."""
    shown = rows.assign(verdict=rows["verdict"].fillna("no verdict"))
    return pd.crosstab(shown[by], shown["verdict"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--freeze", type=int, nargs="+", default=[0, 1, 2, 3], help="seeds that thresholds come from")
    parser.add_argument("--test", type=int, nargs="*", default=[4, 5, 6, 7], help="seeds that are judged")
    parser.add_argument("--size", default="small", help="of the organisms that are judged")
    parser.add_argument("--write", action="store_true", help="replace the thresholds that come with the package")
    parser.add_argument("--out", type=Path, help="write every case as JSON")
    a = parser.parse_args()
    from probe.audit import thresholds

    used = thresholds()
    if a.write:
        used = freeze("small", a.freeze)
        used.save(PACKAGED)
    if not a.write and a.freeze != parser.get_default("freeze"):
        parser.error("--freeze needs --write: without it the packaged thresholds are tested")
    if set(a.test) & set(used.source.get("seeds", [])) and a.size == "small":
        parser.error("a seed that thresholds were frozen on cannot test them")
    if not a.test:
        return
    rows = judged(a.size, a.test, used)
    with pd.option_context("display.width", 160, "display.max_rows", 200, "display.max_colwidth", 60):
        print(rows.drop(columns="rule").round(3).to_string(index=False))
        print(f"\nBy what they are, {len(a.test)} organisms ({a.size}):\n{confusion(rows)}")
        print(f"\nBy edit:\n{confusion(rows, 'edit')}")
        wrong = rows[rows["truth"] != rows["verdict"]]
        print(f"\n{len(rows) - len(wrong)} of {len(rows)} right")
        for row in wrong.to_dict("records"):
            print(f"  seed {row['seed']}, {row['edit']} ({row['truth']}): {row['verdict']}: {row['rule']}")
    if a.out is not None:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(json.dumps(rows.to_dict("records"), indent=1))


if __name__ == "__main__":
    main()
