"""The commands `probe audit` and `probe organism`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SETS = ("unseen", "unseen_retain", "neighbours", "deducible", "given", "given_holdout")


class ListParts(argparse.Action):
    """`probe audit --parts`: print what can be measured, and stop."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "nargs": 0})

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from probe.audit import parts
        from probe.audit._registry import DEFAULT

        for name, title in parts().items():
            print(f"{name:<14}{'' if name in DEFAULT else 'when asked for: '}{title}")
        parser.exit()


def add_audit(commands: Any, add: Callable[..., Any], overwrite: Callable[[Any], None]) -> None:
    """Add `probe audit`."""
    made = add(
        commands,
        "audit",
        "measure what an edit did",
        audit,
        "probe audit --base MODEL --edit EDIT --forget forget.jsonl --retain retain.jsonl --out card/",
    )
    made.add_argument("--base", required=True, help="hub name or directory of the unedited model")
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument("--edit", type=Path, help="directory of an edit")
    what.add_argument("--edited", help="hub name or directory of an edited model")
    for name in ("forget", "retain", "holdout"):
        made.add_argument(f"--{name}", type=Path, required=name != "holdout", help="jsonl of questions")
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help=f"further questions: {', '.join(SETS)}, or a name of your own; may be given several times",
    )
    made.add_argument("--gold", action="append", default=[], help="a gold retrain; may be given several times")
    made.add_argument("--corpus", type=Path, help="texts for perplexity")
    made.add_argument(
        "--part", action="append", metavar="NAME", help="measure these parts only (`none` for the answers alone)"
    )
    made.add_argument("--parts", action=ListParts, help="list the parts and what they measure, and stop")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--batch-size", type=int, default=64, help="questions a forward")
    made.add_argument(
        "--people", default="groups", help="what a group of the questions is, in sentences (default: groups)"
    )
    made.add_argument("--out", type=Path, help="directory for the report card, and for its page report.html")
    overwrite(made)


def audit(a: argparse.Namespace) -> int:
    """Measure an edit; print the card, and write it."""
    from probe.audit import audit as measure
    from probe.cli import bars, texts
    from probe.data import Questions
    from probe.editing import Edit
    from probe.models import load

    card = measure(
        load(a.base),
        Edit.load(a.edit) if a.edit else load(a.edited),
        Questions.load(a.forget),
        Questions.load(a.retain),
        Questions.load(a.holdout) if a.holdout else None,
        sets=_sets(a.set),
        gold=[load(path) for path in a.gold] or None,
        corpus=texts(a.corpus) if a.corpus else None,
        parts=None if a.part is None else [name for name in a.part if name != "none"],
        people=a.people,
        seed=a.seed,
        batch_size=a.batch_size,
        progress=bars(),
    )
    print(card)
    if a.out is not None:
        from probe._report import report

        card.save(a.out)
        page = report({"audit": card, "title": f"Audit of {Path(str(a.edit or a.edited)).name}"}, a.out / "report.html")
        print(f"report card: {a.out}\npage: {page}")
    return 0


def _sets(given: list[str]) -> dict[str, Any]:
    """Questions by name from NAME=FILE."""
    from probe.data import Questions
    from probe.errors import DataError

    found = {}
    for one in given:
        name, equals, path = one.partition("=")
        if not (name and equals and path):
            raise DataError(f"--set needs NAME=FILE, such as neighbours=neighbours.jsonl; received {one!r}")
        found[name] = Questions.load(path)
    return found


def add_organism(commands: Any, add: Callable[..., Any], overwrite: Callable[[Any], None]) -> None:
    """Add `probe organism`."""
    made = add(
        commands,
        "organism",
        "train a small model with a known answer, or show one",
        organism,
        "probe organism facts --size small --gold 5 --out organism/",
    )
    made.add_argument("kind", help="facts, backdoor, experts, toxic, hallucination, skills, induction")
    made.add_argument("--size", default="default", help="small, default or large (default: default)")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--gold", type=int, default=0, help="how many gold retrains to train beside it")
    made.add_argument("--device", help="where to train (default: cpu)")
    made.add_argument("--out", type=Path, help="directory for its questions, one jsonl a split")
    overwrite(made)


def organism(a: argparse.Namespace) -> int:
    """Train an organism; print what it knows and where it is."""
    from probe.cli import bars
    from probe.organisms._kinds import maker

    made = maker(a.kind)[0](a.size, a.seed, device=a.device, progress=bars())
    if a.gold:
        made.gold.train(a.gold)
    print(made)
    print(f"model: {made.path}")
    for path in made.gold.trained if a.gold else []:
        print(f"gold: {path}")
    if a.out is not None:
        for name, rows in made.splits.items():
            print(f"questions: {rows.save(a.out / f'{name}.jsonl')}", file=sys.stdout)
    return 0
