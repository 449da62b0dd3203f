"""Capture: run a model over data and store the activations of chosen sites; being killed costs one shard at most.

Everything that can be wrong with the request is found before anything is written (`_job.py`). Then forwards and writing
overlap (`_pipeline.py`), and each finished shard is named in the manifest (`_ledger.py`).
"""

from __future__ import annotations

import errno
import functools
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from activations_cache import _device, _parallel, hashing
from activations_cache._job import Job, Request, StorageTypes, check_bytes, held_manifest, prepare
from activations_cache._ledger import Ledger
from activations_cache._pipeline import run_shards
from activations_cache.cache import Cache
from activations_cache.cache import open as open_cache
from activations_cache.documents import Overflow
from activations_cache.errors import CacheError
from activations_cache.positions import Positions
from activations_cache.store import Compression, writer_lock


def capture(
    model: Any,
    data: Any,
    sites: str | Sequence[str],
    out: str | Path,
    *,
    tokenizer: Any = None,
    positions: Positions = "all",
    pool: Literal["mean"] | None = None,
    dtype: StorageTypes = None,
    batch_tokens: int = 8192,
    shard_rows: int | None = None,
    n_tokens: int | None = None,
    max_length: int | None = None,
    bos: bool | None = None,
    chat: bool = False,
    overflow: Overflow = "truncate",
    columns: Sequence[str] | None = None,
    token_columns: Sequence[str] | None = None,
    logprobs: bool = False,
    compression: Compression | None = None,
    text_column: str = "text",
    resume: bool = True,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Cache:
    """Run a model over data and store the activations of some sites in a cache directory.

    Killed at any moment, the directory holds a valid cache of the shards that were committed; the same call goes on
    from there, and ends with the same bytes as a run that was never interrupted (one machine, the same versions).
    The forward stops after the last site that is needed, and writing overlaps with it. In RAM are the model, a batch or
    two and one shard, however large the data.

    Under `torchrun` or `accelerate launch` every process calls this alike; the shards are shared out among them.

    Before a cache is gone on with or returned as finished, every byte of its committed shards is compared with their
    SHA-256 (about 1 GB/s from a disk that is as fast). `open` does not do that: it looks at sizes alone.

    Args:
        model: A Hugging Face causal language model, or anything with one as `.hf` (and perhaps `.tokenizer`, `.name`).
            It is put in eval mode meanwhile; then each module gets its own mode back.
        data: Whatever `read_documents` takes: texts or token ids, in memory or in a file.
        sites: Names or patterns of sites, e.g. "blocks.*.hook_resid_post". Aliases are stored once.
        out: The cache directory; made if need be.
        tokenizer: For texts; by default `model.tokenizer`.
        positions: Which tokens are stored. "all"; "last", each sequence's last; "answer", those of the answer in rows
            with `question` and `answer`; "mask", those that the rows' column `mask` marks; or one entry per sequence: a
            boolean mask over its tokens, a slice or range, or a list of positions. The token ids of whole sequences
            are kept in any case.
        pool: "mean" stores one row per sequence, the mean over its stored positions (in float32). Token columns then
            hold the value of the last of these positions.
        dtype: Storage type of float sites: "float16", "bfloat16" or "float32"; None takes the model's own, which loses
            nothing. A mapping of site patterns to types gives each site its own; the last pattern that fits decides.
            Integer sites (chosen experts) are stored as integers.
        batch_tokens: Padded tokens per forward.
        shard_rows: Rows per shard; None aims at 128 MiB.
        n_tokens: Capture exactly this many tokens: documents from the first on, the last of them cut. None takes all.
        max_length: Longest sequence in tokens; None is the model's context.
        bos: As in `tokenize`.
        chat: As in `tokenize`.
        overflow: As in `tokenize`.
        columns: Label columns to store per sequence; None stores all whose values are strings, numbers or booleans.
            No column may be called input_ids, length, offsets, position, sequence or token, which are a cache's own
            fields: rename it, or leave it out by naming the others here.
        token_columns: Columns that hold a value per token, stored beside the rows.
        logprobs: Store each row's log p(token | all before it) of the model too, in nats, as `rows["logprob"]`. The
            forward then runs to its end. Under pool="mean" it is the mean over the stored positions without the
            sequence's first token; NaN if there is no other.
        compression: "gzip" or "lzf" compresses the sites: a little smaller, much slower to write and to read. None
            stores them as they are.
        text_column: The column of the data that holds the text.
        resume: Go on with an interrupted capture of the same kind, and return a finished one without running the
            model. False refuses any existing cache; nothing is ever deleted.
        device: Move the model there first; None leaves it where it is.
        progress: Show a progress bar with tokens per second.

    Returns:
        The finished cache, opened.

    Raises:
        DataError: Unusable data or settings, a text too long under overflow="error", a column of a reserved name,
            fewer tokens than n_tokens, no position to store.
        SiteError: An unknown site, or one that has no row per token (attention patterns).
        CacheMismatchError: `out` holds a cache of another model, other data or other settings.
        CacheLockedError: Another process is writing there.
        CacheError: `out` is not empty and holds no cache; the disk is full; a cache exists and resume=False.
        CorruptCacheError: A committed shard of the cache to go on with, or to return, is missing, truncated, or has a
            byte that is not as it was written.
        NumericsError: An activation is NaN or does not fit the storage type.
        ModelError: The forward ran out of memory, or the model's sites cannot be named.

    Warns:
        UserWarning: Documents were cut; columns were left out because no cache can hold them (values of several types,
            booleans with gaps, a '/' in the name); the cache was begun with other library versions.

    Cost: one forward up to the last site over all tokens; bytes written = rows x sum of site widths x 2 or 4.
    """
    if device is not None:
        _device.move(hashing.hf_model(model), device)
    settings = {
        "tokenizer": tokenizer,
        "positions": positions,
        "pool": pool,
        "dtype": dtype,
        "batch_tokens": batch_tokens,
        "shard_rows": shard_rows,
        "n_tokens": n_tokens,
        "max_length": max_length,
        "bos": bos,
        "chat": chat,
        "overflow": overflow,
        "columns": columns,
        "token_columns": token_columns,
        "logprobs": logprobs,
        "compression": compression,
        "text_column": text_column,
    }
    world = _parallel.world()
    if world is not None:
        make = functools.partial(decided, model, data, sites, out, progress=progress and world.rank == 0, **settings)
        _parallel.run(world, make, resume, progress)
        return open_cache(out)
    job = decided(model, data, sites, out, progress=progress, **settings)
    held = held_manifest(job, resume)
    if held is None or not held["finished"]:
        _run(job, progress)
    else:
        check_bytes(job, held, progress)
    return open_cache(out)


def decided(model: Any, data: Any, sites: str | Sequence[str], out: str | Path, **settings: Any) -> Job:
    """A capture, decided in full; nothing is written yet. Takes what `capture` takes, and warns of what it warns of."""
    job = prepare(Request(model, data, sites, Path(out), **settings))
    warn_of_data(job)
    return job


def warn_of_data(job: Job) -> None:
    """Warn of what of the data does not reach the cache."""
    if job.tokens.n_truncated:
        cut = f"{job.tokens.n_truncated} of {len(job.tokens)} documents were cut to {job.max_length} tokens"
        warnings.warn(cut, stacklevel=4)
    if job.dropped:
        reasons = "; ".join(f"{name!r}: {reason}" for name, reason in job.dropped.items())
        warnings.warn(f"columns left out of the cache, no labels can be had of them: {reasons}", stacklevel=4)


def _run(job: Job, progress: bool) -> None:
    """Do what is not done yet, alone in the directory."""
    with disk_errors(job):
        job.out.mkdir(parents=True, exist_ok=True)
        with writer_lock(job.out):
            ledger = Ledger(job, progress)
            try:
                _capture(job, ledger, progress)
            except BaseException as error:
                _say_how_to_go_on(job, ledger, error, progress)
                raise


def _capture(job: Job, ledger: Ledger, progress: bool) -> None:
    from tqdm.auto import tqdm

    done = job.plan.tokens - sum(shard.tokens for shard in ledger.todo)
    bar = tqdm(total=job.plan.tokens, initial=done, unit="tok", unit_scale=True, desc="capture", disable=not progress)
    with bar:
        run_shards(job, ledger.todo, ledger.commit, bar.update)


@contextmanager
def disk_errors(job: Job) -> Iterator[None]:
    """Turn the system's errors about a job's directory into our own.

    Raises:
        CacheError: It cannot be written, or the disk is full.
    """
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"{job.out} cannot be written: {_cause(job, error)}. What was committed is intact: make room or give "
            "access, and run the same capture again to go on"
        ) from error


def _cause(job: Job, error: OSError) -> str:
    """The error, with the room on the disk where that explains it: HDF5 says strange things of a full disk."""
    row_bytes = sum(spec.row_bytes for spec in job.specs)
    shard = max(shard.rows for shard in job.plan.shards) * row_bytes
    place = next(path for path in (job.out, *job.out.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free >= shard or error.errno not in (None, errno.ENOSPC):
        return str(error)
    return (
        f"no room is left on the disk: {free / 2**20:.1f} MiB are free, one shard takes about {shard / 2**20:.1f} MiB "
        f"and the whole cache {job.plan.rows * row_bytes / 2**20:.1f} MiB ({error})"
    )


def _say_how_to_go_on(job: Job, ledger: Ledger, error: BaseException, progress: bool) -> None:
    total = len(job.plan.shards)
    note = f"{ledger.done} of {total} shards are committed in {job.out}; the same capture with resume=True goes on"
    error.add_note(note)
    if progress and isinstance(error, KeyboardInterrupt):
        print(f"interrupted: {note}", file=sys.stderr)
