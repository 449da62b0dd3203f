"""Capture over a Ray cluster: the shards of one plan through actors of Ray Data, the same bytes as `capture`.

The driver decides the capture, holds the lock and commits; actors load the model, run whole shards and make them
durable in the cache directory, which all machines must share. Ray schedules, places and restarts them.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from activations_cache import errors, hashing
from activations_cache._job import Job, check_bytes, held_manifest, model_entry
from activations_cache._shares import Commits, run_part, writing
from activations_cache.cache import Cache
from activations_cache.cache import open as open_cache
from activations_cache.documents import Column
from activations_cache.errors import ActivationsCacheError, CacheMismatchError, DataError, ModelError, ParallelError
from activations_cache.store import ShardEntry

RESTARTS = 1  # of an actor whose process dies; Ray's own default is to go on for ever
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def capture_ray(
    model: str | Path | Callable[[], Any],
    data: Any,
    sites: str | Sequence[str],
    out: str | Path,
    *,
    concurrency: int = 2,
    num_cpus: float = 1,
    num_gpus: float = 0,
    device: str | None = None,
    resume: bool = True,
    progress: bool = True,
    **settings: Any,
) -> Cache:
    """Run a model over data on a Ray cluster and store the activations of some sites in a cache directory.

    The cache is that of `capture` with the same settings, to the byte where the actors' machines and threads are the
    same. Ray is started on this machine unless the program is connected to a cluster already. Killed at any moment,
    the directory holds a valid cache; the same call, or `capture`, goes on from there.

    Args:
        model: A folder or name for `AutoModelForCausalLM.from_pretrained`, with the tokenizer that lies there; or a
            function without arguments that returns what `capture` takes as model, for any other way of loading one.
            It is loaded once here, to decide the capture, and once in each actor.
        data: As in `capture`; read here.
        sites: As in `capture`.
        out: The cache directory, on a filesystem that every actor's machine has under the same path.
        concurrency: Actors, each with a copy of the model.
        num_cpus: CPUs that Ray reserves per actor.
        num_gpus: GPUs that Ray reserves per actor; 0.5 puts two actors on one.
        device: Where an actor puts the model; None is "cuda" with `num_gpus`, else where it was loaded.
        resume: As in `capture`.
        progress: Show a progress bar over all actors, with tokens per second.
        settings: The other settings of `capture`: tokenizer, positions, dtype, batch_tokens, shard_rows, ...

    Returns:
        The finished cache, opened.

    Raises:
        DataError: A setting that `capture` does not have; no actors asked for; unusable data.
        ModelError: The folder holds no model.
        CacheMismatchError: An actor loaded another model; or `out` holds another capture.
        ParallelError: Ray is not installed; an actor died, or raised an error that is none of this package's.
        ActivationsCacheError: What `capture` raises.
    """
    ray = _ray()
    _check(model, concurrency, settings)
    job = _prepare(model, data, sites, Path(out), {**settings, "progress": progress})
    device = device or ("cuda" if num_gpus else None)
    if device is not None:
        job.manifest["machine"]["device"] = device
    held = held_manifest(job, resume)
    if held is not None and held["finished"]:
        check_bytes(job, held, progress)
        return open_cache(out)
    with writing(job):
        commits = Commits(job, progress)
        workers = {"concurrency": concurrency, "num_cpus": num_cpus, "num_gpus": num_gpus}
        with commits.bar:
            for entry in _results(ray, job, model, device, commits.missing(), workers):
                commits.take(entry)
    return open_cache(out)


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ParallelError(f'capture_ray needs Ray ({error}): pip install "ray[data]"') from error
    return ray


def _check(model: Any, concurrency: int, settings: dict[str, Any]) -> None:
    if hasattr(model, "parameters") or not (isinstance(model, str | Path) or callable(model)):
        raise DataError(
            "capture_ray takes the folder or name of a model, or a function that loads it, since each actor loads its "
            f"own; got {type(model).__name__}"
        )
    if concurrency < 1:
        raise DataError(f"concurrency must be at least 1; got {concurrency}")
    unknown = sorted(set(settings) - set(_settings()))
    if unknown:
        raise DataError(f"{', '.join(unknown)}: no setting of capture; it has {', '.join(_settings())}")


def _settings() -> list[str]:
    """The settings of `capture` that describe the cache."""
    from activations_cache._capture import capture

    found = inspect.signature(capture).parameters.values()
    return [p.name for p in found if p.kind is p.KEYWORD_ONLY and p.name not in ("resume", "device", "progress")]


# --- in the actors --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Loaded:
    hf: Any
    tokenizer: Any


def _load(model: str | Path | Callable[[], Any]) -> Any:
    """The model of a folder or name with its tokenizer, or what a function makes.

    Raises:
        ModelError: There is no model.
    """
    if not isinstance(model, str | Path):
        return model()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        hf = AutoModelForCausalLM.from_pretrained(model)
        has_tokenizer = not Path(model).is_dir() or any((Path(model) / name).is_file() for name in TOKENIZER_FILES)
        return _Loaded(hf, AutoTokenizer.from_pretrained(model) if has_tokenizer else None)
    except (OSError, ValueError) as error:
        raise ModelError(f"no model can be loaded from {model}: {error}") from error


class _Actor:
    """Runs shards. What goes wrong is returned as a message: an exception would make Ray start the actor again."""

    def __init__(self, fetch: Callable[[], Job], model: Any, device: str | None) -> None:
        self._fetch, self._model, self._device = fetch, model, device
        self._job: Job | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        try:
            self._job = self._job or self._ready()
            found: list[ShardEntry] = []
            run_part(self._job, batch["shard"].tolist(), found.append, _go_on)
            return {"message": [json.dumps({"entries": list(map(dataclasses.asdict, found))})]}
        except Exception as error:
            kind = type(error).__name__
            text = str(error) if isinstance(error, ActivationsCacheError) else f"{kind}: {error}"
            return {"message": [json.dumps({"type": kind, "error": f"a Ray actor on {platform.node()}: {text}"})]}

    def _ready(self) -> Job:
        """The job with this actor's copy of the model, which is checked to be the driver's."""
        job = self._fetch()
        torch.set_num_threads(job.manifest["machine"]["threads"])  # Ray sets a number of its own
        hf = hashing.hf_model(_load(self._model))
        own, asked = model_entry(hf, hf), job.manifest["model"]
        wrong = [name for name in asked if name != "name" and own[name] != asked[name]]
        if wrong:
            raise CacheMismatchError(
                f"the model that it loaded is not the driver's (different: {', '.join(wrong)}): the folder holds other "
                "files there, or the function that loads it does not always load the same"
            )
        if self._device is not None:
            hf.to(self._device)
        return dataclasses.replace(job, hf=hf)


def _go_on() -> None:
    """Nothing ends an actor's shard but the end of the actor."""


# --- in the driver --------------------------------------------------------------------------------------------------


def _prepare(model: Any, data: Any, sites: str | Sequence[str], out: Path, settings: dict[str, Any]) -> Job:
    """The capture, decided, without its model: the driver runs none, and actors load their own."""
    from activations_cache._capture import decided

    job = decided(_load(model), data, sites, out, **settings)
    return dataclasses.replace(job, hf=None)


def _results(
    ray: Any, job: Job, model: Any, device: str | None, numbers: list[int], workers: dict[str, Any]
) -> Iterator[ShardEntry]:
    """Entries of the shards as actors finish them, in any order.

    Raises:
        ActivationsCacheError: An actor's error, of its own class if that is one of ours.
    """
    if not numbers:
        return
    context = ray.data.DataContext.get_current()
    before, context.enable_progress_bars = context.enable_progress_bars, False
    size = min(workers["concurrency"], len(numbers))
    try:
        rows = ray.data.from_items([{"shard": n} for n in numbers], override_num_blocks=len(numbers))
        with warnings.catch_warnings():  # Ray means to rename the argument for restarts, and has no other yet
            warnings.filterwarnings("ignore", "`ray_remote_args_fn` is deprecated")
            results = rows.map_batches(
                _Actor,
                fn_constructor_args=(partial(ray.get, ray.put(_portable(job))), model, device),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=size),
                num_cpus=workers["num_cpus"],
                num_gpus=workers["num_gpus"] or None,
                ray_remote_args_fn=_remote_args,
            )
        for row in results.iter_rows():
            yield from _entries(json.loads(row["message"]))
    except ray.exceptions.RayError as error:
        raise ParallelError(f"Ray could not run the capture: {str(error).strip().splitlines()[-1]}") from error
    finally:
        context.enable_progress_bars = before


def _remote_args() -> dict[str, int]:
    return {"max_restarts": RESTARTS, "max_task_retries": RESTARTS}


def _portable(job: Job) -> Job:
    """The job as actors get it: without what only decided it, and with its labels in lists, not in a file."""
    tokens = dataclasses.replace(job.tokens, columns={}, spans=None, masks=None)
    columns = {name: Column(column.kind, list(column.values)) for name, column in job.columns.items()}
    return dataclasses.replace(job, tokens=tokens, columns=columns)


def _entries(message: dict[str, Any]) -> list[ShardEntry]:
    if "error" in message:
        kind = getattr(errors, message["type"], ParallelError)
        error: ActivationsCacheError = kind(message["error"])
        error.add_note("what was committed is intact; the same call goes on from there")
        raise error
    return [ShardEntry(**entry) for entry in message["entries"]]
