"""Captures by several ranks in forked processes: the warm parent saves each rank the imports."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.activations_cache.caches import labelled_rows


def rich_rows() -> list[dict[str, Any]]:
    """Rows with a value per token and a mask, beside the labels."""
    rows = labelled_rows(20)
    return [
        {
            **row,
            "weight": [n / 3 for n in row["input_ids"]],
            "mask": [True] + [n % 2 == 0 for n in row["input_ids"][1:]],
        }
        for row in rows
    ]


def run_ranks(folder: Path, works: Sequence[Callable[[], Any]], limit: float = 60) -> list[str]:
    """Run each function as a rank of a gloo group in a process of its own; how each ended.

    "ok", or "<class>: <message>" of the exception, or "signal <n>" of what killed it. A rank that is not done after
    `limit` seconds is killed and reported as "hangs".
    """
    folder.mkdir(parents=True, exist_ok=True)
    start = folder / f"group-{time.monotonic_ns()}"
    children = [_forked(rank, len(works), start, work) for rank, work in enumerate(works)]
    until = time.monotonic() + limit
    return [_ended(child, Path(f"{start}-{rank}.json"), until) for rank, child in enumerate(children)]


def _forked(rank: int, size: int, start: Path, work: Callable[[], Any]) -> int:
    child = os.fork()
    if child == 0:
        outcome = "ok"
        try:
            torch.set_num_threads(1)
            torch.distributed.init_process_group("gloo", f"file://{start}", rank=rank, world_size=size)
            work()
            torch.distributed.destroy_process_group()
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        finally:
            Path(f"{start}-{rank}.json").write_text(json.dumps(outcome))
            os._exit(0)
    return child


def _ended(child: int, report: Path, until: float) -> str:
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
            return json.loads(report.read_text()) if code == 0 else f"signal {-code}"
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hangs"
