"""One thread runs forwards; another places their rows in a buffer and writes the shard with its last batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from activations_cache._forward import Batch, Forward
from activations_cache._job import Job
from activations_cache.errors import CacheError
from activations_cache.plan import Shard
from activations_cache.store import NUMPY_TYPES, AnyArray, Moments, ShardBuffer, ShardEntry, write_shard

QUEUED_BATCHES = 1  # with the writer while the next forward runs; each costs the memory of its stored rows

Written = Callable[[Shard, ShardEntry, Mapping[str, Moments]], None]


def forward_of(job: Job) -> Forward:
    """The forwards of a capture, as a context manager."""
    settings = job.settings
    return Forward(
        job.hf,
        job.specs,
        job.tokens,
        job.selection,
        device=job.device,
        logprobs=settings["logprobs"],
        batch_tokens=settings["batch_tokens"],
    )


def run_shards(job: Job, shards: Iterable[Shard], written: Written, advance: Callable[[int], object]) -> None:
    """Capture shards one after the other, writing while the next forwards run.

    Args:
        job: The capture.
        shards: Shards of its plan.
        written: Called in the writer's thread with each shard that is durable, in order.
        advance: Called with the number of tokens of each batch.

    Raises:
        ActivationsCacheError, OSError: As soon as a forward or the writer fails; no later shard is written then.
    """
    waiting: deque[Future[None]] = deque()
    writer = _Writer(job, written)
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="activations-cache-writer")
    try:
        with forward_of(job) as running:
            for shard in shards:
                for number, batch in enumerate(shard.batches):
                    made = running.run(batch)
                    if len(waiting) >= QUEUED_BATCHES:
                        waiting.popleft().result()  # an error of the writer surfaces here
                    waiting.append(thread.submit(writer.place, shard, number, made))
                    del made
                    advance(int(job.plan.lengths[batch].sum()))
            while waiting:
                waiting.popleft().result()
    finally:
        thread.shutdown(wait=True, cancel_futures=True)


class _Writer:
    """Places batches in the shard's buffer, and writes the shard with its last batch. Runs in its own thread."""

    def __init__(self, job: Job, written: Written) -> None:
        self.job, self.written = job, written
        self.buffer: ShardBuffer | None = None
        self.memory = shard_memory(job)
        self.failed = False

    def place(self, shard: Shard, number: int, batch: Batch) -> None:
        """Take batch `number` of a shard; write the shard if it is the last. After a failure nothing more is taken."""
        if self.failed:
            return
        self.failed = True  # until this batch is through: a later shard must never be committed over a gap
        if self.buffer is None:
            self.buffer = _new_buffer(self.job, shard, self.memory)
        _place(self.buffer, shard.batches[number].tolist(), batch)
        if number == len(shard.batches) - 1:
            full, self.buffer = self.buffer, None
            self.written(shard, _write(self.job, shard, full), full.moments)
        self.failed = False


def shard_memory(job: Job) -> dict[str, AnyArray]:
    """Room for the sites of the largest shard, used for one after the other: fresh memory is slow to touch."""
    rows = max(shard.rows for shard in job.plan.shards)
    return {spec.name: np.empty((rows, *spec.shape), NUMPY_TYPES[spec.dtype]) for spec in job.specs}


def _new_buffer(job: Job, shard: Shard, memory: Mapping[str, AnyArray]) -> ShardBuffer:
    logprobs = job.settings["logprobs"]
    return ShardBuffer.allocate(job.specs, shard, job.tokens, job.selection, job.columns, logprobs, memory)


def _place(buffer: ShardBuffer, sequences: list[int], batch: Batch) -> None:
    rows = batch.rows()
    for name, (values, moments) in rows.sites.items():
        buffer.put(name, sequences, values)
        if moments is not None:
            buffer.moments[name].add(moments)
    for name, values in rows.fields.items():
        buffer.put(name, sequences, values)
    batch.give_back()


def _write(job: Job, shard: Shard, buffer: ShardBuffer) -> ShardEntry:
    short = [name for name, placed in buffer.placed.items() if placed != buffer.rows]
    if short:
        raise CacheError(f"{shard.file} would lack rows of {', '.join(short)}: the plan and the forwards disagree")
    compression = job.settings["compression"]
    return write_shard(job.out, shard.file, buffer, job.specs, job.manifest["identity"], compression)
