"""Small caches for the tests, and the plain loop that they are held against."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import cache as memo
from pathlib import Path
from typing import Any

import numpy as np
import torch

from activations_cache import _capture
from activations_cache.cache import Cache
from tests.architectures import tiny

RESID = "blocks.*.hook_resid_post"


@memo
def llama() -> Any:
    """One tiny random Llama for all tests that do not change it."""
    return tiny("llama")


def token_rows(n: int = 13, seed: int = 0, longest: int = 12) -> list[list[int]]:
    """Random token ids, of lengths 1 to `longest`."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 96, size=rng.integers(1, longest + 1)).tolist() for _ in range(n)]


def labelled_rows(n: int = 13, seed: int = 0) -> list[dict[str, Any]]:
    """Random token ids with a label column of each kind."""
    rows = token_rows(n, seed)
    return [
        {"input_ids": ids, "author": f"ä{i % 3}", "toxic": i % 2 == 0, "n": i, "score": i / 7}
        for i, ids in enumerate(rows)
    ]


def small(out: Path, data: Any = None, sites: Any = RESID, model: Any = None, **settings: Any) -> Cache:
    """Capture with shards and batches so small that there are several of each."""
    settings = {"batch_tokens": 24, "shard_rows": 20, "progress": False, **settings}
    return _capture.capture(
        llama() if model is None else model, labelled_rows() if data is None else data, sites, out, **settings
    )


def by_hand(model: Any, rows: list[list[int]], layer: int) -> list[torch.Tensor]:
    """The residual stream after a block by a plain torch hook, one unpadded sequence at a time: [pos, d_model] each."""
    found: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        found.append(hidden[0].detach().clone())

    handle = model.model.layers[layer].register_forward_hook(keep)
    try:
        with torch.no_grad():
            for row in rows:
                model(input_ids=torch.tensor([row]))
    finally:
        handle.remove()
    return found


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a cache that must not depend on how it came about."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.suffix == ".h5"}


def in_child(work: Callable[[], Any]) -> int:
    """Run `work` in a forked child of one thread; its exit status (negative: the signal that killed it)."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die() -> None:
    """End this process as the kernel would."""
    os.kill(os.getpid(), signal.SIGKILL)
