"""What a walk says in the terminal: each step, how long it took, what it found; at its end the audit, in short."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Teller:
    """Numbers the steps, times them, and prints a line for each when it ends (nothing if `quiet`)."""

    total: int
    quiet: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    console: Any = None

    def __post_init__(self) -> None:
        if self.console is None:
            from rich.console import Console

            self.console = Console(quiet=self.quiet, highlight=False)

    @contextmanager
    def step(self, name: str) -> Iterator[list[str]]:
        """Time a step; the lines that its body appends are printed below its name."""
        number = len(self.seconds) + 1
        self.console.print(f"[bold cyan]\\[{number}/{self.total}][/] [bold]{name}[/]")
        started = time.perf_counter()
        found: list[str] = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            yield found
        found += [
            f"note: {text}" for text in dict.fromkeys(str(w.message) for w in caught if w.category is UserWarning)
        ]
        self.seconds[name] = time.perf_counter() - started
        for line in found:
            self.console.print(f"      {line}", markup=False, soft_wrap=True)
        self.console.print(f"      [dim]{self.seconds[name]:.1f} s[/]")


def audit_tables(card: Any) -> list[Any]:
    """An audit in short (rich tables): what each model says, what the verdict rests on, what the edit cost.

    Everything that was measured is in the report, and in the card's own table.
    """
    shown = [_answers(card)]
    if card.verdict is not None:
        shown += [_evidence(card.verdict.evidence)] if len(card.verdict.evidence) else []
        shown += [_costs(card.verdict.cost)] if len(card.verdict.cost) else []
    return shown


def _answers(card: Any) -> Any:
    """Recall of each set, and perplexity."""
    wide = card.wide()
    rows = wide[wide["metric"].isin(["recall", "perplexity"])]
    models = [name for name in ("original", "edited", "gold") if name in rows.columns]
    table = _table("Recall of the answers", *models)
    for row in rows.to_dict("records"):
        what = row["set"] if row["metric"] == "recall" else f"perplexity of the {row['set']}"
        table.add_row(f"{what} ({row['n']})", *(row[name] for name in models))
    return table


_STYLES = {"above": "bold", "": "", "not heard": "dim"}


def _evidence(evidence: Any) -> Any:
    from probe.audit._labels import metric_label, number, set_label

    table = _table("Evidence of what is left", "original", "edited", "gold", "share", "threshold", "")
    for row in evidence.to_dict("records"):
        where = "" if row["set"] == "forget" else f" ({set_label(row['set'])})"
        values = (number(float(row[name]), row["metric"]) for name in ("original", "edited", "gold"))
        shares = ("–" if row[name] != row[name] else f"{row[name]:.0%}" for name in ("share", "threshold"))
        above = "above" if row["share"] > row["threshold"] else ""
        mark = above if row["heard"] else "not heard"
        table.add_row(f"{metric_label(row['metric'])}{where}", *values, *shares, mark, style=_STYLES[mark])
    return table


def _costs(cost: Any) -> Any:
    from probe.audit._labels import metric_label, number, set_label

    table = _table("What it cost", "original", "edited", "gold", "change")
    for row in cost.to_dict("records"):
        values = (number(float(row[name]), row["metric"]) for name in ("original", "edited", "gold"))
        change = number(float(row["change"]), row["metric"], signed=True)
        table.add_row(f"{metric_label(row['metric'])}, {set_label(row['set'])}", *values, change)
    return table


def _table(title: str, *columns: str) -> Any:
    from rich import box
    from rich.table import Table

    made = Table(title, box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        made.add_column(name, justify="right", no_wrap=True)
    return made
