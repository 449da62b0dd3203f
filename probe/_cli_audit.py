"""The commands `probe audit` and `probe organism`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile
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
    made.add_argument("kind", help="facts, backdoor, experts, toxic, hallucination, skills, induction, tofu")
    made.add_argument("--path", type=Path, help="for tofu: the folder with the benchmark's files")
    made.add_argument("--size", default="default", help="small, default or large (default: default)")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--gold", type=int, default=0, help="how many gold retrains to train beside it")
    made.add_argument("--device", help="where to train (default: cpu)")
    made.add_argument(
        "--out", type=Path, help="directory for its questions, one jsonl a set, as `probe audit` takes them"
    )
    overwrite(made)


def organism(a: argparse.Namespace) -> int:
    """Train an organism; print what it knows and where it is."""
    from probe.cli import bars
    from probe.organisms._kinds import maker

    make, first = maker(a.kind)[0], _path_of(a)
    if a.out is not None:
        _make_folder(a.out)
    made = make(*first, a.size, a.seed, device=a.device, progress=bars())
    if a.gold:
        made.gold.train(a.gold)
    print(made)
    print(f"model: {made.path}")
    for path in made.gold.trained if a.gold else []:
        print(f"gold: {path}")
    if a.out is not None:
        for name, rows in _sets_of(made).items():
            print(f"questions: {rows.save(a.out / f'{name}.jsonl')}", file=sys.stdout)
    return 0


def _path_of(a: argparse.Namespace) -> tuple[Path, ...]:
    """The folder that TOFU is read from; no other kind has one."""
    from probe.errors import OrganismError

    if a.kind == "tofu" and a.path is None:
        raise OrganismError("tofu needs --path, the folder with the benchmark's files.")
    if a.kind != "tofu" and a.path is not None:
        raise OrganismError(f"--path is for tofu; {a.kind} reads no files.")
    return () if a.path is None else (a.path,)


def _make_folder(path: Path) -> None:
    """Make a directory that can be written to, before anything is trained."""
    from probe.errors import OrganismError

    try:
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OrganismError(f"--out {path} cannot be written to: {error}.") from error


def _sets_of(made: Any) -> dict[str, Any]:
    """An organism's splits, and its questions as an audit takes them: what can be deduced is no part of `forget`."""
    from probe.audit import Case

    return {**made.splits, **Case.of(made, 0, progress=False).sets}
