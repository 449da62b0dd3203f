"""Utility of larger models by the tasks of lm-evaluation-harness (the extra `harness`).

What an edit costs in general ability is measured on public tasks, which small organisms cannot do. The harness reads
the very model in memory: nothing is copied, so an applied edit is measured as it is.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from probe.errors import AuditError
from probe.models import Model
from probe.scoring import eval_mode

__all__ = ["harness", "results_table"]

COLUMNS = (
    "task",
    "metric",
    "filter",
    "value",
    "stderr",
    "low",
    "high",
    "n",
    "num_fewshot",
    "version",
    "higher_is_better",
)


def harness(
    model: Model,
    tasks: str | Sequence[str | Mapping[str, Any]],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    own_tasks: bool = True,
    batch_size: int = 16,
    bos: bool | None = None,
    chat: bool = False,
    seed: int = 0,
    bootstrap_iters: int = 1000,
    progress: bool = True,
    **settings: Any,
) -> pd.DataFrame:
    """Evaluate a model on tasks of lm-evaluation-harness (Gao et al., github.com/EleutherAI/lm-evaluation-harness).

    Tasks usually download their data. The configuration of a task of one's own may name Python functions, which are
    then run: give only an `include_path` that you trust.

    Args:
        model: The model, with an edit applied or not. Weights, mode, tokenizer and random states stay as they are.
        tasks: Names, or configurations of tasks.
        limit: First rows of each task; None for all.
        num_fewshot: Examples before each question; None is the task's own number.
        include_path: Folder of further tasks (YAML files).
        own_tasks: Whether the harness's own tasks can be named too; listing its thousands takes seconds.
        batch_size: Requests a forward.
        bos: Whether a BOS token comes first; None leaves it to the harness.
        chat: Put requests into the chat template.
        seed: Of Python, numpy, torch and the choice of examples.
        bootstrap_iters: For standard errors of metrics that have no closed form.
        progress: Show the harness's bars.
        **settings: Passed to `lm_eval.simple_evaluate`.

    Returns:
        A row for each task and metric: value, standard error, 95 % interval (1.96 standard errors, NaN where the
        harness has none), n.

    Raises:
        AuditError: lm_eval is not installed, no task, an unknown task, or a model without tokenizer.
    """
    names = [tasks] if isinstance(tasks, str) else [dict(t) if isinstance(t, Mapping) else t for t in tasks]
    if not names:
        raise AuditError("at least one task is needed; received none")
    if model.tokenizer is None:
        raise AuditError("the harness reads text; this model has no tokenizer: pass one to probe.models.wrap")
    evaluate, manager_class, adapter = _imported()
    manager = manager_class(
        include_path=None if include_path is None else str(include_path), include_defaults=own_tasks
    )
    unknown = [name for name in names if isinstance(name, str) and not manager.match_tasks([name])]
    if unknown:
        raise AuditError(f"lm_eval has no task {', '.join(unknown)}; give a name of its list, or an include_path")
    seeds = {f"{key}_random_seed": seed for key in ("numpy", "torch", "fewshot")} | {"random_seed": seed}
    with _untouched(model, progress), eval_mode(model.hf):
        lm = _adapted(adapter, model, batch_size, bos)
        found = evaluate(
            model=lm, tasks=names, task_manager=manager, limit=limit, num_fewshot=num_fewshot, apply_chat_template=chat,
            bootstrap_iters=bootstrap_iters, log_samples=False, **seeds, **settings,
        )  # fmt: skip
    return results_table(found)


def results_table(found: Mapping[str, Any]) -> pd.DataFrame:
    """What `lm_eval.simple_evaluate` returned, as a table; see `harness`."""
    rows = []
    for task, values in found["results"].items():
        sizes = found.get("n-samples", {}).get(task, {})
        for key, value in values.items():
            metric, _, name = key.partition(",")
            if not name or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,{name}")
            error = float(error) if isinstance(error, (int, float)) else np.nan
            ends = {"stderr": error, "low": value - 1.96 * error, "high": value + 1.96 * error}
            facts = {"n": sizes.get("effective"), "num_fewshot": found.get("n-shot", {}).get(task)}
            facts |= {"version": found.get("versions", {}).get(task)}
            facts |= {"higher_is_better": found.get("higher_is_better", {}).get(task, {}).get(metric)}
            rows.append({"task": task, "metric": metric, "filter": name, "value": float(value), **ends, **facts})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _imported() -> tuple[Any, Any, Any]:
    try:
        names = ("lm_eval", "lm_eval.tasks", "lm_eval.models.huggingface")
        evaluator, tasks, models = (import_module(name) for name in names)
    except ImportError as error:
        raise AuditError(
            f"utility by tasks needs lm-evaluation-harness ({error}); install the extra: "
            "pip install 'probe-workbench[harness]'"
        ) from error
    return evaluator.simple_evaluate, tasks.TaskManager, models.HFLM


def _adapted(adapter: Any, model: Model, batch_size: int, bos: bool | None) -> Any:
    """The harness's view of the model in memory, with a tokenizer of its own, to which it may add a pad token.

    The adapter ties the weights again when it is made, which would undo an edit that unties them: for that moment the
    method does nothing.
    """
    hf = model.hf
    hf.tie_weights = lambda *args, **kwargs: None
    try:
        return adapter(
            pretrained=hf, tokenizer=copy.deepcopy(model.tokenizer), backend="causal", batch_size=batch_size,
            add_bos_token=bos,
        )  # fmt: skip
    finally:
        del hf.tie_weights


@contextmanager
def _untouched(model: Model, progress: bool) -> Iterator[None]:
    """Put the random states and tqdm's setting back after the block; the harness seeds them globally."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        try:
            with _bars(progress):
                yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextmanager
def _bars(progress: bool) -> Iterator[None]:
    """Silence the harness's bars: it has no argument for that, but tqdm reads the environment when a bar is made."""
    before = os.environ.get("TQDM_DISABLE")
    if not progress:
        os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        if not progress:
            if before is None:
                del os.environ["TQDM_DISABLE"]
            else:
                os.environ["TQDM_DISABLE"] = before
