"""The ledger: the manifest of a cache that is being written. A shard that it does not name is not there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from activations_cache import _index
from activations_cache._job import Job, check_bytes, held_manifest, warn_of_changes
from activations_cache.plan import Shard
from activations_cache.store import Moments, ShardEntry, read_moments, remove_partials, write_manifest


class Ledger:
    """Takes over a directory for writing; call it under the lock.

    Opening it resumes: shards that the manifest names are checked and kept, and their statistics read back.

    Args:
        job: The capture.
        progress: Show a bar while committed shards are checked.

    Raises:
        CacheMismatchError: The directory holds another capture.
        CorruptCacheError: A committed shard is not as it was written.
    """

    def __init__(self, job: Job, progress: bool) -> None:
        self.job = job
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

    @property
    def todo(self) -> tuple[Shard, ...]:
        """Shards that are not, in order."""
        return self.job.plan.shards[self.done :]

    def commit(self, shard: Shard, entry: ShardEntry, moments: Mapping[str, Moments]) -> None:
        """Name a durable shard in the manifest; with the last one the index is written, and the cache is finished.

        Args:
            shard: The shard's place in the plan, which must be the next one.
            entry: Its file.
            moments: Its statistics.

        Raises:
            ValueError: It is another shard's turn.
        """
        if shard.index != self.done:
            raise ValueError(f"shard {shard.index} cannot be committed where {self.done} is the next")
        self._merge(moments)
        last = self.done + 1 == len(self.job.plan.shards)
        manifest = {
            **self.manifest,
            "finished": last,
            "rows": self.manifest["rows"] + entry.rows,
            "statistics": {name: found.to_json(vectors=last) for name, found in self.moments.items()},
            "shards": [*self.manifest["shards"], asdict(entry)],
        }
        if last:
            _index.write_index(self.job.out, manifest)
        write_manifest(self.job.out, manifest)
        self.manifest = manifest

    def _merge(self, moments: Mapping[str, Moments]) -> None:
        for name, found in moments.items():
            self.moments[name].add(found)
