"""Capture: run a model over data and store the activations of chosen sites; being killed costs one shard at most.

Everything that can be wrong with the request is found before anything is written (`_job.py`). Then one thread runs
forwards, and another places their rows in the shard's buffer and commits shards.
"""

from __future__ import annotations

import errno
import math
import shutil
import sys
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from activations_cache import _index, hashing
from activations_cache import sites as site_catalogue
from activations_cache._job import LARGEST, Job, Request, check_bytes, held_manifest, prepare, warn_of_changes
from activations_cache.cache import Cache
from activations_cache.cache import open as open_cache
from activations_cache.documents import Column, Overflow
from activations_cache.errors import ActivationsCacheError, CacheError, ModelError, NumericsError, SiteError
from activations_cache.plan import Positions, Shard
from activations_cache.store import (
    TORCH_TYPES,
    AnyArray,
    Moments,
    ShardBuffer,
    SiteSpec,
    read_moments,
    remove_partials,
    write_manifest,
    write_shard,
    writer_lock,
)

QUEUED_BATCHES = 2  # batches that may wait for the writer while the next forward runs


def capture(
    model: Any,
    data: Any,
    sites: str | Sequence[str],
    out: str | Path,
    *,
    tokenizer: Any = None,
    positions: Positions = "all",
    dtype: str | torch.dtype | None = None,
    batch_tokens: int = 8192,
    shard_rows: int | None = None,
    max_length: int | None = None,
    bos: bool | None = None,
    chat: bool = False,
    overflow: Overflow = "truncate",
    columns: Sequence[str] | None = None,
    text_column: str = "text",
    resume: bool = True,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Cache:
    """Run a model over data and store the activations of some sites in a cache directory.

    Killed at any moment, the directory holds a valid cache of the shards that were committed; the same call goes on
    from there, and ends with the same bytes as a run that was never interrupted (one machine, the same versions).
    The forward stops after the last site that is needed, and writing overlaps with it.

    Before a cache is gone on with or returned as finished, every byte of its committed shards is compared with their
    SHA-256 (about 1 GB/s from a disk that is as fast). `open` does not do that: it looks at sizes alone.

    Args:
        model: A Hugging Face causal language model, or anything with one as `.hf` (and perhaps `.tokenizer`, `.name`).
            It is put in eval mode meanwhile; then each module gets its own mode back.
        data: Whatever `read_documents` takes: texts or token ids, in memory or in a file.
        sites: Names or patterns of sites, e.g. "blocks.*.hook_resid_post". Aliases are stored once.
        out: The cache directory; made if need be.
        tokenizer: For texts; by default `model.tokenizer`.
        positions: "all" stores a row per token, "last" one per sequence, its last token's.
        dtype: Storage type of float sites: "float16", "bfloat16" or "float32"; None takes the model's own, which loses
            nothing. Integer sites (chosen experts) are stored as integers.
        batch_tokens: Padded tokens per forward.
        shard_rows: Rows per shard; None aims at 128 MiB.
        max_length: Longest sequence in tokens; None is the model's context.
        bos: As in `tokenize`.
        chat: As in `tokenize`.
        overflow: As in `tokenize`.
        columns: Label columns to store per sequence; None stores all whose values are strings, numbers or booleans.
            No column may be called input_ids, length, offsets, position, sequence or token, which are a cache's own
            fields: rename it, or leave it out by naming the others here.
        text_column: The column of the data that holds the text.
        resume: Go on with an interrupted capture of the same kind, and return a finished one without running the
            model. False refuses any existing cache; nothing is ever deleted.
        device: Move the model there first; None leaves it where it is.
        progress: Show a progress bar with tokens per second.

    Returns:
        The finished cache, opened.

    Raises:
        DataError: Unusable data or settings, a text too long under overflow="error", a column of a reserved name.
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
        hashing.hf_model(model).to(device)
    request = (model, data, sites, Path(out), tokenizer, positions, dtype, batch_tokens, shard_rows, max_length)
    job = prepare(Request(*request, bos, chat, overflow, columns, text_column))
    if job.tokens.n_truncated:
        cut = f"{job.tokens.n_truncated} of {len(job.tokens)} documents were cut to {job.max_length} tokens"
        warnings.warn(cut, stacklevel=2)
    if job.dropped:
        reasons = "; ".join(f"{name!r}: {reason}" for name, reason in job.dropped.items())
        warnings.warn(f"columns left out of the cache, no labels can be had of them: {reasons}", stacklevel=2)
    held = held_manifest(job, resume)
    if held is None or not held["finished"]:
        _run(job, progress)
    else:
        check_bytes(job, held, progress)
    return open_cache(out)


def _run(job: Job, progress: bool) -> None:
    """Do what is not done yet, alone in the directory."""
    try:
        job.out.mkdir(parents=True, exist_ok=True)
        with writer_lock(job.out):
            writer = _Writer(job, progress)
            try:
                _forward_all(job, writer, progress)
            except BaseException as error:
                _say_how_to_go_on(job, writer, error, progress)
                raise
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


def _say_how_to_go_on(job: Job, writer: _Writer, error: BaseException, progress: bool) -> None:
    total = len(job.plan.shards)
    note = f"{writer.done} of {total} shards are committed in {job.out}; the same capture with resume=True goes on"
    error.add_note(note)
    if progress and isinstance(error, KeyboardInterrupt):
        print(f"interrupted: {note}", file=sys.stderr)


class _Writer:
    """Places batches in the shard's buffer, and commits the shard with its last batch. Runs in its own thread.

    Opening it resumes: shards that the manifest names are checked and kept, and their statistics read back.
    """

    def __init__(self, job: Job, progress: bool) -> None:
        self.job = job
        self.buffer: ShardBuffer | None = None
        self.failed = False
        self.moments = {spec.name: Moments.empty(spec.shape) for spec in job.specs if spec.floating}
        remove_partials(job.out)
        held = held_manifest(job, resume=True)  # again, now that nobody else can write
        if held is None:
            self.manifest = dict(job.manifest)
            write_manifest(job.out, self.manifest)
        else:
            self.manifest = held
            warn_of_changes(job, held)
            check_bytes(job, held, progress)
            for entry in held["shards"]:
                self._merge(read_moments(job.out / entry["file"], job.specs))

    @property
    def done(self) -> int:
        """Shards that are committed."""
        return len(self.manifest["shards"])

    def _merge(self, moments: Mapping[str, Moments]) -> None:
        for name, moment in moments.items():
            self.moments[name].add(moment)

    def place(self, shard: Shard, number: int, values: dict[str, tuple[AnyArray, Moments | None]]) -> None:
        """Take batch `number` of a shard; commit the shard if it is the last. After a failure nothing more is taken."""
        if self.failed:
            return
        self.failed = True  # until this batch is through: a later shard must never be committed over a gap
        if self.buffer is None:
            self.buffer = self._new_buffer(shard)
        for name, (rows, moments) in values.items():
            self.buffer.put(name, shard.batches[number].tolist(), rows)
            if moments is not None:
                self.buffer.moments[name].add(moments)
        if number == len(shard.batches) - 1:
            full, self.buffer = self.buffer, None
            self._commit(shard, full)
        self.failed = False

    def _new_buffer(self, shard: Shard) -> ShardBuffer:
        job, start, stop = self.job, shard.first_sequence, shard.first_sequence + shard.sequences
        columns = {name: Column(column.kind, column.values[start:stop]) for name, column in job.columns.items()}
        ids = job.tokens.input_ids[start:stop]
        return ShardBuffer.allocate(job.specs, start, shard.first_row, ids, columns, job.plan.positions == "last")

    def _commit(self, shard: Shard, buffer: ShardBuffer) -> None:
        entry = write_shard(self.job.out, shard.file, buffer, self.job.specs, self.manifest["identity"])
        self._merge(buffer.moments)
        last = shard.index == len(self.job.plan.shards) - 1
        manifest = {
            **self.manifest,
            "finished": last,
            "rows": self.manifest["rows"] + entry.rows,
            "statistics": {name: moments.to_json(vectors=last) for name, moments in self.moments.items()},
            "shards": [*self.manifest["shards"], asdict(entry)],
        }
        if last:
            _index.write_index(self.job.out, manifest)
        write_manifest(self.job.out, manifest)
        self.manifest = manifest


def _forward_all(job: Job, writer: _Writer, progress: bool) -> None:
    """Run every batch that is not committed yet, at most `QUEUED_BATCHES` ahead of the writer."""
    from tqdm.auto import tqdm

    waiting: deque[Future[None]] = deque()
    done = sum(shard.tokens for shard in job.plan.shards[: writer.done])
    bar = tqdm(total=job.plan.tokens, initial=done, unit="tok", unit_scale=True, desc="capture", disable=not progress)
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="activations-cache-writer")
    try:
        with bar, _Collector(job) as collector:
            for shard in job.plan.shards[writer.done :]:
                for number, batch in enumerate(shard.batches):
                    if len(waiting) >= QUEUED_BATCHES:
                        waiting.popleft().result()  # an error of the writer surfaces here
                    waiting.append(thread.submit(writer.place, shard, number, collector.run(batch)))
                    bar.update(int(job.plan.lengths[batch].sum()))
            while waiting:
                waiting.popleft().result()
    finally:
        thread.shutdown(wait=True, cancel_futures=True)


class _Enough(BaseException):
    """Ends a forward once every site is read. No `Exception`, so that no handler inside a model takes it."""


class _Collector:
    """Runs batches with hooks on the sites; each value is cut to the stored rows, checked and cast as it appears."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.specs = {spec.name: spec for spec in job.specs}
        self.values: dict[str, tuple[AnyArray, Moments | None]] = {}
        self.keep: Int[Tensor, " rows"] | None = None
        self.batch = np.zeros(0, np.int64)

    def __enter__(self) -> _Collector:
        self._open = ExitStack()
        hf = self.job.hf
        self._open.callback(_restore_modes, [(module, module.training) for module in hf.modules()])
        hf.eval()
        self._open.enter_context(torch.no_grad())
        self._open.enter_context(site_catalogue.hooked(hf, dict.fromkeys(self.specs, self._read)))
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.close()

    def run(self, batch: Any) -> dict[str, tuple[AnyArray, Moments | None]]:
        """One forward over the sequences `batch`; per site the raw stored rows and their moments."""
        self.batch, self.values = batch, {}
        inputs = self._pad(batch)
        try:
            self.job.hf(**inputs, use_cache=False)
        except _Enough:
            return self.values
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if isinstance(error, ActivationsCacheError) or not _is_memory(error):
                raise
            shape = tuple(inputs["input_ids"].shape)
            raise ModelError(
                f"the forward of a batch of {shape[0]} x {shape[1]} tokens ran out of memory; capture into a new "
                f"directory with batch_tokens below {self.job.manifest['settings']['batch_tokens']}"
            ) from error
        missing = sorted(set(self.specs) - set(self.values))
        raise SiteError(f"the forward did not reach {missing}: these modules did not run for this input")

    def _pad(self, batch: Any) -> dict[str, Tensor]:
        """Right-padded ids and mask [batch, pos]; sets which of the flattened positions are stored."""
        rows = [self.job.tokens.input_ids[number] for number in batch.tolist()]
        lengths = torch.tensor([len(row) for row in rows])
        width = int(lengths.max())
        ids = torch.zeros(len(rows), width, dtype=torch.long)  # id 0 is as good as any under the mask
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
        mask = torch.arange(width) < lengths[:, None]  # [batch, pos]
        stored = mask if self.job.plan.positions == "all" else torch.arange(width) == lengths[:, None] - 1
        keep = stored.flatten().nonzero().squeeze(1)
        self.keep = None if bool(stored.all()) else keep.to(self.job.device)
        return {"input_ids": ids.to(self.job.device), "attention_mask": mask.long().to(self.job.device)}

    def _read(self, value: Shaped[Tensor, "batch pos *shape"], site: Any) -> None:
        spec = self.specs[site.name]
        rows = value.detach().reshape(-1, *spec.shape)  # [batch * pos, *shape]
        if self.keep is not None:
            rows = rows.index_select(0, self.keep.to(rows.device))  # [rows, *shape]
        if spec.floating:
            self._check(spec, rows)
        # the model may go on to change its tensor in place while the writer reads this one
        stored = rows.to(TORCH_TYPES[spec.dtype], copy=self.keep is None)
        moments = batch_moments(stored) if spec.floating else None
        self.values[spec.name] = (_raw(stored), moments)
        if len(self.values) == len(self.specs):
            raise _Enough

    def _check(self, spec: SiteSpec, rows: Tensor) -> None:
        low, high = rows.aminmax()  # both are NaN if any value is
        largest = float(torch.maximum(-low, high))
        if largest <= LARGEST[spec.dtype]:
            return
        bad = ~(rows.flatten(1).abs() <= LARGEST[spec.dtype]).all(1)
        where = f"in sequence {self._sequence_of(int(bad.nonzero()[0]))}"
        if math.isnan(largest):
            raise NumericsError(f"{spec.name} is NaN {where}; check the model's weights and the input")
        if math.isinf(largest):
            raise NumericsError(f"{spec.name} is infinite {where}; run the model in bfloat16 or float32")
        raise NumericsError(
            f"{spec.name} reaches {largest:.6g} {where}, beyond {spec.dtype}'s {LARGEST[spec.dtype]:g}; "
            'capture it with dtype="bfloat16" or dtype="float32" into a new directory'
        )

    def _sequence_of(self, row: int) -> int:
        lengths = self.job.plan.lengths[self.batch]
        counts = lengths if self.job.plan.positions == "all" else np.ones_like(lengths)
        return int(self.batch[np.searchsorted(np.cumsum(counts), row, side="right")])


def _restore_modes(modes: Sequence[tuple[torch.nn.Module, bool]]) -> None:
    """Give each module its own mode back; `train()` on the whole would set all of them alike."""
    for module, training in modes:
        module.training = training


def _is_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _raw(stored: Tensor) -> AnyArray:
    """The bits of a tensor in RAM; bfloat16, which numpy lacks, as uint16."""
    host = stored.cpu().contiguous()
    return host.view(torch.int16).numpy().view("<u2") if host.dtype == torch.bfloat16 else host.numpy()


def batch_moments(rows: Shaped[Tensor, "rows *shape"]) -> Moments:
    """Mean, centred second moment and norms of some rows, summed in float64.

    The values are shifted by their mean in float32 before they are squared, so that the sums lose no more than the
    rows' own rounding, without a copy of the batch in float64. Where float32 squares would overflow, float64 is used.
    """
    flat = (rows.cpu() if rows.device.type == "mps" else rows).flatten(1)  # [rows, n]
    found = _moments(flat.float(), tuple(rows.shape[1:]))
    if not (math.isfinite(found.norm_sum) and np.isfinite(found.m2).all()):
        found = _moments(flat.double(), tuple(rows.shape[1:]))
    return found


def _moments(flat: Float[Tensor, "rows n"], shape: tuple[int, ...]) -> Moments:
    count = len(flat)
    norms = torch.linalg.vector_norm(flat, dim=1).sum(dtype=torch.float64)
    shift = flat.mean(0)  # [n]
    centred = flat - shift
    first = centred.sum(0, dtype=torch.float64)  # [n], near 0
    second = centred.square_().sum(0, dtype=torch.float64)  # [n]
    mean = (shift.double() + first / count).cpu().numpy().reshape(shape)
    m2 = (second - first**2 / count).clamp_(min=0).cpu().numpy().reshape(shape)
    return Moments(count, mean, m2, float(norms))
