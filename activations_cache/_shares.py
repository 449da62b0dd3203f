"""The parts of a capture that is shared out: shards run anywhere and in any order, committed in the order of the plan.

A shard that is finished before its turn waits beside its manifest entry (`.shard-00007.h5.entry.partial`). The next
run checks and adopts it, so that a kill costs each process one shard at most, not all that it was ahead.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from activations_cache._job import Job
from activations_cache.errors import CacheError
from activations_cache.plan import Shard
from activations_cache.store import PARTIAL, ShardEntry, file_sha256, read_moments, writer_lock

SIGHT_SECONDS = 60.0  # until another machine's file is seen: clients of network filesystems cache names
ENTRY = f".entry{PARTIAL}"
Finished = Callable[[ShardEntry], object]


@contextmanager
def writing(job: Job) -> Iterator[None]:
    """Hold the directory of a job against other writers; make it if need be.

    Raises:
        CacheLockedError: Another capture holds it.
        CacheError: It cannot be written.
    """
    from activations_cache._capture import disk_errors

    with disk_errors(job):
        job.out.mkdir(parents=True, exist_ok=True)
        with writer_lock(job.out):
            yield


class Commits:
    """Commits shards in the order of the plan, whoever ran them and whenever they come. Open it under the lock.

    Attributes:
        job: The capture.
        waiting: Finished shards that others must go before, by number.
        bar: The progress bar, over all tokens.
    """

    def __init__(self, job: Job, progress: bool) -> None:
        from tqdm.auto import tqdm

        from activations_cache._ledger import Ledger

        self.job = job
        found = list(adoptable(job))
        self.ledger = Ledger(job, progress)  # checks what is committed, and removes all partial files
        done = sum(shard.tokens for shard in job.plan.shards[: self.ledger.done])
        self.bar = tqdm(
            total=job.plan.tokens, initial=done, unit="tok", unit_scale=True, desc="capture", disable=not progress
        )
        self.waiting: dict[int, ShardEntry] = {}
        self._one = (
            threading.Lock()
        )  # a rank's own shards come from its writer's thread, the others' from their messages
        for entry in found:
            if number_of(entry) >= self.ledger.done:
                write_entry(job, entry)
                self.take(entry)

    @property
    def left(self) -> int:
        """How many shards are not committed yet."""
        return len(self.job.plan.shards) - self.ledger.done

    def missing(self) -> list[int]:
        """Numbers of the shards that nobody has run."""
        return [n for n in range(self.ledger.done, len(self.job.plan.shards)) if n not in self.waiting]

    def take(self, entry: ShardEntry) -> None:
        """A shard is durable: commit it, and those that waited for it, or let it wait for its turn."""
        with self._one:
            number = number_of(entry)
            self.bar.update(self.job.plan.shards[number].tokens)
            self.waiting[number] = entry
            self._commit()

    def _commit(self) -> None:
        while self.ledger.done in self.waiting:
            shard = self.job.plan.shards[self.ledger.done]
            ready = self.waiting.pop(shard.index)
            in_sight(self.job, ready.file)
            self.ledger.commit(shard, ready, read_moments(self.job.out / ready.file, self.job.specs))
            entry_path(self.job, ready.file).unlink(missing_ok=True)


def run_part(job: Job, numbers: Iterable[int], finished: Finished, between: Callable[[], object]) -> None:
    """Run some shards of a job and make each durable, with its entry beside it.

    Args:
        job: The capture, with its model.
        numbers: Which shards, in order.
        finished: Called in the writer's thread with the entry of each.
        between: Called after every forward; it may raise to end the work.

    Raises:
        CacheError: The directory cannot be written.
    """
    from activations_cache._capture import disk_errors
    from activations_cache._pipeline import run_shards

    def written(_shard: Shard, entry: ShardEntry, _moments: object) -> None:
        write_entry(job, entry)
        finished(entry)

    shards = [job.plan.shards[number] for number in numbers]
    if shards:
        with disk_errors(job):
            run_shards(job, shards, written, lambda _tokens: between())


# --- entries beside shards ------------------------------------------------------------------------------------------


def number_of(entry: ShardEntry) -> int:
    """The number of a shard, from its file name."""
    return int(Path(entry.file).stem.removeprefix("shard-"))


def entry_path(job: Job, file: str) -> Path:
    """Where the entry of a shard that waits for its turn lies."""
    return job.out / f".{file}{ENTRY}"


def write_entry(job: Job, entry: ShardEntry) -> None:
    """Put the entry of a durable shard beside it, at once or not at all."""
    target = entry_path(job, entry.file)
    partial = target.with_name(f"{target.name}{PARTIAL}")
    partial.write_text(json.dumps({"identity": job.manifest["identity"], "entry": asdict(entry)}), encoding="utf-8")
    partial.replace(target)


def adoptable(job: Job) -> Iterator[ShardEntry]:
    """Entries of finished shards of this very capture whose files are what the entries say, to the byte."""
    for path in sorted(job.out.glob(f".shard-*.h5{ENTRY}")):
        try:
            held = json.loads(path.read_text("utf-8"))
            entry = ShardEntry(**held["entry"])
            if held["identity"] == job.manifest["identity"] and _is_whole(job, entry):
                yield entry
        except (ValueError, KeyError, TypeError):  # half an entry: its shard is run again
            continue


def _is_whole(job: Job, entry: ShardEntry) -> bool:
    number, path = number_of(entry), job.out / entry.file
    if not 0 <= number < len(job.plan.shards) or not path.is_file() or path.stat().st_size != entry.bytes:
        return False
    shard = job.plan.shards[number]
    place = (shard.file, shard.first_sequence, shard.sequences, shard.first_row, shard.rows)
    said = (entry.file, entry.first_sequence, entry.sequences, entry.first_row, entry.rows)
    return place == said and file_sha256(path) == entry.sha256


def in_sight(job: Job, name: str) -> None:
    """Wait until a file that another process has written is there.

    Raises:
        CacheError: It does not appear: the processes do not share a directory.
    """
    until = time.monotonic() + SIGHT_SECONDS
    while not (job.out / name).is_file():
        if time.monotonic() > until:
            raise CacheError(
                f"{job.out / name}, which another process has written, cannot be seen here: all processes of a capture "
                "must write to one directory, on a filesystem that they share"
            )
        time.sleep(0.02)
