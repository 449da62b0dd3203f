"""Which metrics can be trusted: every metric of the audit on organisms that know and organisms that do not.

    python -m benchmarks.meta_evaluation [--models 30] [--seeds 0 1 2] [--out FILE.json]

Every number of the default parts on the forget questions is judged. Faithfulness: the AUC with which it tells
`--models` organisms that were trained on the forget facts (half of them in cloze form only, so that they know them less
well) from as many that were not (half of them on wrong facts about the same people). Robustness: how little it moves
when unlearned models (gradient ascent, gradient difference, NPO and refusal, stopped as soon as answers flip, on the
organisms of `--seeds`) are relearned for one epoch on a quarter of the forget questions, or rounded to NF4.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks import unlearned

POOLS = ("knows", "does_not")
FIRST_SEED = 50_000


def bench_of(seed: int) -> Any:
    """The bench of one small organism with two golds, which no pool has."""
    import probe.organisms
    from probe.audit import Bench, Case

    organism = probe.organisms.facts("small", seed)
    return organism, Bench(Case.of(organism, 2, progress=False, n_boot=10))


def pool(organism: Any, n: int) -> dict[str, list[Any]]:
    """Paths of the models that know, and of those that do not."""
    documents = list(organism.document_rows)
    others = [d for d in documents if d.split != "forget"]
    secret = [d for d in documents if d.split == "forget"]
    cloze = [d for d in secret if "?" not in d.text and not d.text.split("{")[0].strip().endswith(":")]
    values = [d.answer for d in secret]
    kinds: dict[str, list[Callable[[int], list[Any]]]] = {
        "knows": [lambda seed: documents, lambda seed: others + cloze],
        "does_not": [lambda seed: others, lambda seed: others + wrong(secret, values, seed)],
    }
    found: dict[str, list[Any]] = {}
    for number, name in enumerate(POOLS):
        found[name] = []
        for i in unlearned.bar(list(range(n)), f"training: {name.replace('_', ' ')}"):
            seed = FIRST_SEED + 1000 * number + i
            rows = kinds[name][i % 2](seed)
            found[name].append(organism._variant(f"pool-{name}-{i % 2}", rows, seed))
    return found


def wrong(secret: list[Any], values: list[str], seed: int) -> list[Any]:
    """The forget documents with another person's value of the same attribute, the same one in all phrasings."""
    by_kind: dict[str, list[str]] = {}
    for d in secret:
        own = by_kind.setdefault(attribute_of(d), [])
        if d.answer not in own:
            own.append(d.answer)
    made = []
    for d in secret:
        others = [v for v in by_kind[attribute_of(d)] if v != d.answer]
        if others:
            answer = random.Random(f"{seed}-{d.group}-{attribute_of(d)}").choice(others)
            made.append(replace(d, text=f"{d.text[: -len(d.answer) - 1]}{answer}.", answer=answer))
    return made


def attribute_of(document: Any) -> str:
    """The attribute that a document speaks of: its phrasing is named after it."""
    return str(document.kind).split("-")[0]


def measured(bench: Any, model: Any) -> dict[str, float]:
    """Every number on the forget questions, in the trained and in unseen phrasings, by `set/metric`."""
    rows = bench.card(model).table.query("model == 'edited' and set in ('forget', 'unseen')").to_dict("records")
    return {f"{r['set']}/{r['metric']}": float(r["value"]) for r in rows}


def signs(bench: Any) -> dict[str, float]:
    """Whether a number grows with what a model knows (1) or falls (-1): the original against its golds."""
    rows = bench.card().table.query("model in ('original', 'gold')").to_dict("records")
    values = {(f"{r['set']}/{r['metric']}", r["model"]): float(r["value"]) for r in rows}
    names = {name for name, model in values if model == "original" and (name, "gold") in values}
    return {name: 1.0 if values[(name, "original")] >= values[(name, "gold")] else -1.0 for name in names}


def relearned(model: Any, case: Any) -> Any:
    """One epoch on a quarter of the forget questions."""
    from probe.audit._finetune import finetune

    own, forget = unlearned.copied(model), case.sets["forget"]
    rows = forget.take(range(0, len(forget), 4))
    finetune(own, rows, steps=max(1, len(rows) // 16), lr=1e-4, seed=3)
    return own


def quantised(model: Any, case: Any) -> Any:
    """Rounded to NF4."""
    from probe.audit.quantisation import quantise_

    own = unlearned.copied(model)
    quantise_(own.hf, "nf4")
    return own


def stacked(found: list[dict[str, float]]) -> dict[str, list[float]]:
    """One list a metric; metrics that some model lacks are left out."""
    names = [name for name in found[0] if all(name in one for one in found)]
    return {name: [one[name] for one in found] for name in names}


def edited_models(bench: Any) -> list[Any]:
    """The unlearned models of an organism, as models of their own."""
    made = []
    for name, make in unlearned.suppressed(bench.case).items():
        if name == "filter":
            continue
        own = unlearned.copied(bench.case.original)
        make().apply_(own)
        made.append(own)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=30, help="models in each pool")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="organisms whose edits test robustness")
    parser.add_argument("--out", type=Path, help="write the table as JSON")
    a = parser.parse_args()
    from probe.audit.meta import meta_table
    from probe.models import load

    organism, bench = bench_of(a.seeds[0])
    found = {}
    for name, paths in pool(organism, a.models).items():
        found[name] = stacked([measured(bench, load(str(p))) for p in unlearned.bar(paths, f"measuring: {name}")])
    states: dict[str, list[dict[str, float]]] = {"unlearned": [], "relearned": [], "quantised": []}
    for seed in unlearned.bar(a.seeds, "unlearning"):
        _, own = bench_of(seed)
        for model in edited_models(own):
            states["unlearned"].append(measured(own, model))
            states["relearned"].append(measured(own, relearned(model, own.case)))
            states["quantised"].append(measured(own, quantised(model, own.case)))
    sets = {**found, **{name: stacked(rows) for name, rows in states.items()}}
    way = signs(bench)
    names = [name for name in sets["knows"] if name in way and all(name in one for one in sets.values())]
    for name in POOLS:
        sets[name] = {metric: [way.get(metric, 1.0) * value for value in own] for metric, own in sets[name].items()}
    table = meta_table(*({n: own[n] for n in names} for own in sets.values()))
    print(table.round(3).to_string(index=False))
    print(f"\n{a.models} models that know, {a.models} that do not; {len(states['unlearned'])} unlearned models")
    if a.out is not None:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(json.dumps(table.to_dict("records"), indent=1))


if __name__ == "__main__":
    main()
