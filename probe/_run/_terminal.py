"""What a walk says in the terminal: each step, how long it took, what it found."""

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
