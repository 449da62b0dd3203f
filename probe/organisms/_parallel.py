"""Gold retrains in processes of their own: training uses one thread, and machines have more.

`python -m probe.organisms._parallel JSON` trains one. The organism's cache folder and its lock are all that the
processes share, so a process that fails costs time only: whoever asks for that gold afterwards trains it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def training(kind: str, settings: Mapping[str, Any], root: Path, golds: Sequence[int]) -> Iterator[None]:
    """Train these golds, one process each, while the body runs; wait for them at its end.

    Args:
        kind: A kind of organism, as in `KINDS`.
        settings: The organism's settings.
        root: Its cache folder.
        golds: Numbers of the golds.
    """
    orders = [json.dumps({"kind": kind, "settings": dict(settings), "root": str(root), "gold": i}) for i in golds]
    command = [sys.executable, "-m", "probe.organisms._parallel"]
    null = subprocess.DEVNULL
    with ExitStack() as stack:
        said = [stack.enter_context(tempfile.TemporaryFile()) for _ in orders]
        pairs = zip(orders, said, strict=True)
        children = [subprocess.Popen([*command, order], stdin=null, stdout=null, stderr=log) for order, log in pairs]
        try:
            yield
            for i, child, log in zip(golds, children, said, strict=True):
                _note(i, child.wait(), log)
        finally:
            for child in children:
                if child.poll() is None:
                    child.terminate()
                    child.wait()


def _note(i: int, code: int, log: IO[bytes]) -> None:
    """Warn of a process that failed, with the last line that it wrote."""
    if code:
        log.seek(0)
        lines = log.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        warnings.warn(
            f"The process that was to train gold {i} ended with code {code} ({last}); it is trained in this one.",
            stacklevel=2,
        )


def main(order: str) -> None:
    """Train the gold that a JSON order names."""
    from probe.organisms._kinds import remake

    wanted = json.loads(order)
    organism = remake(wanted["kind"], wanted["settings"], Path(wanted["root"]))
    organism.gold.train_one(wanted["gold"])


if __name__ == "__main__":
    main(sys.argv[1])
