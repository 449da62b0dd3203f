"""Reading a cache: `open`, and the cache itself; `_reader.py` holds what it shares with parts and joins."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from activations_cache import _index, _info, _verify
from activations_cache._reader import CachedModel, Reader, SiteStatistics, SiteView, StoredSequence, row_numbers
from activations_cache._shards import FieldKind, ShardSet, check_size, damage
from activations_cache.errors import CacheError, CorruptCacheError
from activations_cache.store import Moments, ShardEntry, SiteSpec, json_digest, read_manifest, read_moments

__all__ = ["Cache", "CachedModel", "SiteStatistics", "SiteView", "StoredSequence", "open", "row_numbers"]


class Cache(Reader):
    """An activations cache on disk, opened for reading: see `open`, and `Reader` for what can be read.

    Attributes:
        path: The directory.
        manifest: The manifest, as read.
        sites: Canonical names of the stored sites.
        finished: Whether the capture ran to its end.
        model: The model it was captured from.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.paths, self.identities = path, (path,), (manifest["identity"],)
        self.finished = manifest["finished"]
        model = manifest["model"]
        self.model = CachedModel(model["name"], model["weights_hash"], model["config_hash"], model["dtype"])
        specs = {entry["name"]: SiteSpec.from_json(entry) for entry in manifest["sites"]}
        entries = [ShardEntry(**entry) for entry in manifest["shards"]]
        data, settings = manifest["data"], manifest["settings"]
        per_row = {name: column["kind"] for name, column in (data.get("token_columns") or {}).items()}
        if settings.get("logprobs"):
            per_row["logprob"] = "float"
        self._shards = ShardSet(
            path, entries, specs, manifest["identity"], compression=settings.get("compression"), kinds=_kinds(data)
        )
        super().__init__(self._shards, manifest, data["columns"], per_row)

    @property
    def rows_key(self) -> str:
        """Which rows these are: equal for caches of the same token ids and the same positions of them."""
        data, settings = self.manifest["data"], self.manifest["settings"]
        chosen = settings["positions"] if settings["positions"] in ("all", "last") else "chosen"
        stored = [chosen, settings.get("pool"), data.get("selection"), len(self), self.n_sequences]
        return json_digest([data["fingerprint"], *stored])

    @property
    def nbytes(self) -> int:
        """Bytes of the committed shards."""
        return sum(entry.bytes for entry in self._shards.entries)

    def _statistics(self, site: str) -> SiteStatistics:
        """From the manifest; that of an unfinished cache holds no vectors, so its shards' are merged."""
        entry = self.manifest["statistics"].get(site)
        if self.finished and entry is not None:
            return SiteStatistics.of_manifest(entry)
        return SiteStatistics.of(self._partial[site])

    @cached_property
    def _partial(self) -> dict[str, Moments]:
        """Moments of every floating site, merged from the shards."""
        specs = list(self._specs.values())
        merged = {spec.name: Moments.empty(spec.shape) for spec in specs if spec.floating}
        for entry in self._shards.entries:
            for name, moments in read_moments(self.path / entry.file, specs).items():
                merged[name].add(moments)
        return merged

    def summary(self, site: str) -> tuple[float, float] | None:
        """Mean norm and total variance of a site, from the manifest; None for an integer site or no row."""
        entry = self.manifest["statistics"].get(site)
        return (entry["mean_norm"], entry["total_variance"]) if entry and entry["count"] else None

    def verify(self, progress: bool = False) -> list[_verify.Problem]:
        """Hash every shard and check everything that the manifest promises; an empty list means all is well.

        Nothing else but `capture`, before it goes on with a cache, finds an altered byte. Cost: one read of the cache,
        at about 1 GB/s.
        """
        return _verify.verify(self.path, progress=progress)

    def _facts(self) -> list[tuple[str, str]]:
        manifest, planned = self.manifest, self.manifest["plan"]["rows"]
        shards, all_shards = len(self._shards.entries), self.manifest["plan"]["shards"]
        state = "finished"
        if not self.finished:
            done = f"{len(self)} of {planned} rows, {shards} of {all_shards} shards are committed"
            state = f"unfinished: {done}; the same capture with resume=True goes on"
        return [
            ("cache", str(self.path)),
            ("state", state),
            *_info.model_facts(manifest),
            *_info.data_facts(manifest["data"], self.columns, self.token_columns),
            ("rows", f"{len(self)} in {shards} shards, {_info.size_text(self.nbytes)}"),
            *_info.setting_facts(manifest),
            ("sites", str(len(self.sites))),
        ]


def _kinds(data: Mapping[str, Any]) -> dict[str, FieldKind]:
    """What each column of a manifest holds, by dataset."""
    kinds = {f"sequences/{name}": FieldKind(kind) for name, kind in data["columns"].items()}
    for name, column in (data.get("token_columns") or {}).items():
        categories = column.get("categories")
        kinds[f"rows/{name}"] = FieldKind(column["kind"], None if categories is None else tuple(categories))
    return kinds


def open(path: str | Path, check: bool = True) -> Cache:
    """Open an activations cache for reading. A cache that is still being written opens with what is committed.

    Args:
        path: The cache directory.
        check: Check that every shard is there in its full size, and write index.h5 again if it is missing or stale.
            False opens a cache with missing or truncated shards too, and writes nothing; reading their rows then
            raises. Neither reads the shards' bytes: `Cache.verify` finds those that were altered.

    Raises:
        CacheError: No such directory.
        CorruptCacheError: No manifest or a malformed one, another format version, a missing or truncated shard.

    Warns:
        UserWarning: The cache is unfinished, or its index.h5 was stale and could not be rebuilt.
    """
    directory = Path(path).absolute()  # so that a change of the working directory changes nothing
    if not directory.is_dir():
        raise CacheError(f"no activations cache at {path}: there is no such directory")
    manifest = read_manifest(directory)
    cache = Cache(directory, manifest)
    if check:
        for entry in cache._shards.entries:
            wrong = check_size(directory, entry)
            if wrong:
                raise CorruptCacheError(damage(directory, entry, wrong))
    if not cache.finished:
        warnings.warn(
            f"{directory} is unfinished: {len(cache)} of {manifest['plan']['rows']} rows are committed; "
            "the same capture with resume=True goes on",
            stacklevel=2,
        )
    if check:
        _refresh_index(directory, manifest)
    return cache


def _refresh_index(directory: Path, manifest: Mapping[str, Any]) -> None:
    if _index.index_is_current(directory, manifest):
        return
    try:
        _index.write_index(directory, manifest)
    except OSError as error:
        warnings.warn(
            f"{directory / 'index.h5'} is missing or another cache's and cannot be rebuilt ({error}); "
            "this reader does not need it, others do",
            stacklevel=3,
        )
