"""Repair: write damaged shards again, running the model only for the batches that hold a damaged row.

What is intact is kept: rows of blocks whose CRC is right stay as they are, statistics are summed again from the stored
rows in the order of the capture. A shard that comes back with the SHA-256 that the manifest names is the original to
the last bit. Otherwise (another machine, other versions) the manifest gets the new checksum and a record of it.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from activations_cache import _device, _index, hashing
from activations_cache._forward import Forward, batch_moments
from activations_cache._job import Job, Request, _machine, libraries, prepare
from activations_cache._salvage import Salvage, salvage
from activations_cache._verify import Problem, index_damage, ranges_text, runs, verify
from activations_cache.errors import CacheError, CacheMismatchError
from activations_cache.store import (
    LOGPROB,
    PARTIAL,
    TORCH_TYPES,
    AnyArray,
    Moments,
    ShardEntry,
    SiteSpec,
    _write_shard,
    file_sha256,
    fsync,
    read_manifest,
    read_moments,
    remove_partials,
    write_manifest,
    writer_lock,
)


@dataclass(frozen=True)
class RepairedShard:
    """One shard that was written again.

    Attributes:
        file: Its name.
        sequences: Numbers of the sequences whose rows the model was run for.
        forwards: How many batches that took; 0 where everything could be rebuilt from what is intact.
        sha256_before: The checksum that the manifest named.
        sha256: The checksum that it has now.
    """

    file: str
    sequences: tuple[int, ...]
    forwards: int
    sha256_before: str
    sha256: str

    @property
    def exact(self) -> bool:
        """Whether it has the original's bytes."""
        return self.sha256 == self.sha256_before


@dataclass(frozen=True)
class Repair:
    """What `repair` did.

    Attributes:
        path: The cache directory.
        shards: The shards that were written again.
        index: Whether index.h5 was written again.
    """

    path: Path
    shards: tuple[RepairedShard, ...]
    index: bool

    @property
    def sequences(self) -> tuple[int, ...]:
        """Numbers of all sequences that were captured again."""
        return tuple(sorted({number for shard in self.shards for number in shard.sequences}))

    @property
    def forwards(self) -> int:
        """Batches that were run."""
        return sum(shard.forwards for shard in self.shards)

    @property
    def exact(self) -> bool:
        """Whether every shard has the original's bytes again."""
        return all(shard.exact for shard in self.shards)

    def _lines(self) -> list[tuple[str, str, str, str]]:
        return [
            (
                shard.file,
                ranges_text(runs(shard.sequences)) or "none",
                str(shard.forwards),
                "the original's" if shard.exact else f"new ({shard.sha256[:12]}), recorded in the manifest",
            )
            for shard in self.shards
        ]

    def __str__(self) -> str:
        lines = [
            f"{file}: sequences captured again: {sequences}; forwards: {forwards}; bytes: {bytes_}"
            for file, sequences, forwards, bytes_ in self._lines()
        ]
        lines += ["index.h5: written again"] if self.index else []
        return "\n".join(lines) or f"{self.path}: nothing to repair"

    def _repr_html_(self) -> str:
        head = ("shard", "sequences captured again", "forwards", "bytes")
        rows = [head, *self._lines()] + ([("index.h5", "", "", "written again")] if self.index else [])
        cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
        return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def repair(
    path: str | Path,
    model: Any = None,
    data: Any = None,
    *,
    tokenizer: Any = None,
    positions: Any = None,
    text_column: str = "text",
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Repair:
    """Verify a cache, and write again what is damaged. Killed at any moment, it may be run again.

    Three things may be needed, and each is asked for by an error that says so:

    - nothing: headers, statistics, checksums or index.h5 are damaged; they are made again from the rows.
    - the model: rows are damaged. The batches of the plan that hold them are run, and only damaged blocks replaced.
    - the model and the data: a shard is missing, cut or unreadable, or its token ids, labels or chosen positions are
      damaged. Rows that are intact in an unreadable file are found all the same, and not computed again.

    Args:
        path: The cache directory.
        model: The model that the cache was captured from, as for `capture`.
        data: The data that it was captured from, as for `capture`.
        tokenizer: For texts; by default `model.tokenizer`.
        positions: The positions that were asked for, if they were chosen one by one (settings.positions is "chosen").
        text_column: The column of the data that holds the text.
        device: Move the model there first; None leaves it where it is.
        progress: Show progress bars.

    Returns:
        What was done; its `exact` says whether every byte is the original's again.

    Raises:
        CorruptCacheError: The manifest itself cannot be read.
        CacheError: The model or the data is needed and was not given; the directory cannot be written.
        CacheMismatchError: They are not those of the cache.
        CacheLockedError: Another process is writing there.

    Cost: one read of the cache; per damaged shard one read and one write of it, and the forwards of the batches
    that are hit.
    """
    directory = Path(path)
    manifest = read_manifest(directory)
    if device is not None and model is not None:
        _device.move(hashing.hf_model(model), device)
    try:
        with writer_lock(directory):
            remove_partials(directory)
            shards = {entry["file"] for entry in manifest["shards"]}
            problems = [problem for problem in verify(directory, progress) if problem.file in shards]
            source = _Source(directory, manifest, model, data, tokenizer, positions, text_column, progress)
            done = _repair_all(source, problems, progress)
            index = index_damage(directory, source.manifest) is not None
            if index:
                _index.write_index(directory, source.manifest)
    except OSError as error:
        raise CacheError(
            f"{directory} cannot be written: {error}. What is intact stays so: make room or give access, and run the "
            "same repair again"
        ) from error
    return Repair(directory, tuple(done), index)


def _repair_all(source: _Source, problems: Sequence[Problem], progress: bool) -> list[RepairedShard]:
    from tqdm.auto import tqdm

    numbers = {entry["file"]: number for number, entry in enumerate(source.manifest["shards"])}
    bar = tqdm(problems, desc="repair", unit="shard", disable=not progress or not problems)
    return [_repair_shard(source, numbers[problem.file], problem) for problem in bar]


class _Source:
    """Where a repair takes things from: the manifest, and model and data, which are checked when first used."""

    def __init__(
        self,
        directory: Path,
        manifest: dict[str, Any],
        model: Any,
        data: Any,
        tokenizer: Any,
        positions: Any,
        text_column: str,
        progress: bool,
    ) -> None:
        self.directory, self.manifest = directory, manifest
        self.specs = [SiteSpec.from_json(entry) for entry in manifest["sites"]]
        self._model, self._data, self._tokenizer = model, data, tokenizer
        self._positions, self._text_column, self._progress = positions, text_column, progress
        self._hf: Any = None
        self._job: Job | None = None

    def hf(self, why: str) -> Any:
        """The bare model, which must be the manifest's."""
        if self._hf is None:
            known = self.manifest["model"]
            if self._model is None:
                raise CacheError(
                    f"{why}: the model is needed to repair it; pass model={known['name']!r} loaded ({known['dtype']}, "
                    f"weights {known['weights_hash'][:12]}), or on the command line --model"
                )
            hf = hashing.hf_model(self._model)
            found = {
                "weights_hash": hashing.weights_hash(hf),
                "config_hash": hashing.config_hash(hf.config),
                "dtype": str(hf.dtype).removeprefix("torch."),
                "attention": getattr(hf.config, "_attn_implementation", None),
            }
            other = [f"{name} ({known.get(name)} in the cache)" for name in found if found[name] != known.get(name)]
            if other:
                raise CacheMismatchError(
                    f"{self.directory} was captured from {known['name']}, and this model has another {', '.join(other)}"
                )
            self._hf = hf
        return self._hf

    def job(self, why: str) -> Job:
        """The capture as it was asked for, from the same model and data."""
        if self._job is None:
            if self._data is None:
                raise CacheError(
                    f"{why}: the data that the cache was captured from are needed to repair it; pass data=, or on the "
                    "command line --data"
                )
            self.hf(why)
            job = prepare(self._request(why))
            if job.manifest["identity"] != self.manifest["identity"]:
                parts = ("data", "tokenizer", "settings", "plan")
                other = [part for part in parts if job.manifest[part] != self.manifest[part]]
                raise CacheMismatchError(
                    f"{self.directory} was captured from other data or settings (different: {', '.join(other)}); pass "
                    "the same data, tokenizer and text_column as for the capture"
                )
            self._job = job
        return self._job

    def _request(self, why: str) -> Request:
        settings, data = self.manifest["settings"], self.manifest["data"]
        names = ("pool", "dtype", "batch_tokens", "shard_rows", "n_tokens", "max_length", "bos", "chat", "overflow")
        chosen: dict[str, Any] = {name: settings.get(name) for name in (*names, "compression")}
        positions = settings["positions"]
        if positions == "chosen":
            if self._positions is None:
                raise CacheError(
                    f"{why}: positions were chosen one by one; pass the same positions= as for the capture"
                )
            positions = self._positions
        chosen |= {"positions": positions, "logprobs": bool(settings.get("logprobs")), "columns": list(data["columns"])}
        chosen |= {"token_columns": list(data.get("token_columns") or {}) or None, "text_column": self._text_column}
        sites = [site["name"] for site in self.manifest["sites"]]
        request = Request(self._model, self._data, sites, self.directory, **chosen)
        return replace(request, tokenizer=self._tokenizer, progress=self._progress)


def _repair_shard(source: _Source, number: int, problem: Problem) -> RepairedShard:
    """Try what needs least: rebuild from the file alone; then run the model for what is damaged."""
    raw = source.manifest["shards"][number]
    entry = ShardEntry(**raw)
    why = f"{source.directory / entry.file} {problem.detail}"
    kept = salvage(source.directory, source.manifest, number, problem)
    if kept is not None and kept.whole:
        for moments in (kept.moments, _summed(source, kept)):  # damaged statistics are no original's; SHA-256 tells
            if moments is not None and _write(source, entry, kept, moments) == entry.sha256:
                return _settle(source, number, (), 0, entry.sha256)
    if kept is None or not kept.described:
        known = kept
        kept = Salvage.of_job(source.job(why), number, known)
        if known is None and problem.kind == "altered" and not source.manifest["settings"].get("compression"):
            _write(source, entry, kept, kept.buffer.moments)
            kept.take_over(_partial(source, entry.file), source.directory / entry.file)
    sequences, forwards = _recapture(source, kept, why)
    stored = [kept.moments] if kept.moments is not None else []
    digest = ""
    for moments in (*stored, _summed(source, kept)):
        digest = _write(source, entry, kept, moments)
        if digest == entry.sha256:
            break
    first = entry.first_sequence
    return _settle(source, number, tuple(first + sequence for sequence in sequences), forwards, digest)


def _recapture(source: _Source, kept: Salvage, why: str) -> tuple[list[int], int]:
    """Run the batches that hold a damaged row, and replace the damaged rows alone; the sequences, and the forwards."""
    hit = kept.damaged_sequences()
    if not hit:
        return [], 0
    hf, settings = source.hf(why), source.manifest["settings"]
    batches = [batch for batch in kept.batches(settings["batch_tokens"]) if hit & set(batch.tolist())]
    specs = [spec for spec in source.specs if kept.bad[f"sites/{spec.name}"].any()]
    logprobs = bool(settings.get("logprobs"))
    forward = Forward(
        hf,
        specs,
        kept.tokens,
        kept.selection,
        device=_device.input_device(hf),
        logprobs=logprobs,
        batch_tokens=settings["batch_tokens"],
    )
    with forward if specs or logprobs else nullcontext():
        for batch in batches:
            rows = forward.run(batch).rows()
            for name, (values, _) in rows.sites.items():
                kept.replace(f"sites/{name}", batch, values)
            if logprobs:
                kept.replace(f"rows/{LOGPROB}", batch, rows.fields[LOGPROB])
    return sorted(hit), len(batches)


def _summed(source: _Source, kept: Salvage) -> dict[str, Moments]:
    """The statistics of a shard's rows, batch by batch as the capture summed them, on the same kind of device."""
    found, device = {}, _device_of(source.manifest)
    batches = list(kept.batches(source.manifest["settings"]["batch_tokens"]))
    for spec in source.specs:
        if spec.floating:
            found[spec.name] = Moments.empty(spec.shape)
            for batch in batches:
                rows = kept.buffer.sites[spec.name][kept.rows_of(batch)]
                found[spec.name].add(batch_moments(_tensor(rows, spec).to(device)))
    return found


def _device_of(manifest: Mapping[str, Any]) -> torch.device:
    """Where the capture summed: another kind of device adds in another order. The CPU if there is none here."""
    kind = str(manifest.get("machine", {}).get("device", "cpu")).partition(":")[0]
    return torch.device("cuda" if kind == "cuda" and torch.cuda.is_available() else "cpu")


def _tensor(rows: AnyArray, spec: SiteSpec) -> torch.Tensor:
    if spec.dtype == "bfloat16":
        return torch.from_numpy(rows.view("<i2")).view(TORCH_TYPES[spec.dtype])
    return torch.from_numpy(rows)


def _write(source: _Source, entry: ShardEntry, kept: Salvage, moments: Mapping[str, Moments]) -> str:
    """Write a candidate beside the shard's name, durably; its SHA-256."""
    partial = _partial(source, entry.file)
    kept.buffer.moments = dict(moments)
    compression = source.manifest["settings"].get("compression")
    try:
        _write_shard(partial, kept.buffer, source.specs, source.manifest["identity"], compression)
    except RuntimeError as error:  # what h5py makes of a failed write when it closes the file
        raise OSError(str(error)) from error
    fsync(partial)
    return file_sha256(partial)


def _partial(source: _Source, file: str) -> Path:
    return source.directory / f".{file}{PARTIAL}"


def _settle(source: _Source, number: int, sequences: tuple[int, ...], forwards: int, digest: str) -> RepairedShard:
    """Put the candidate in the shard's place; if it is not the original, say so in the manifest."""
    old = source.manifest["shards"][number]
    partial, target = _partial(source, old["file"]), source.directory / old["file"]
    size = partial.stat().st_size
    if target.is_dir() and not target.is_symlink():
        raise CacheError(f"{target} is a directory; move it away, and run the same repair again")
    partial.replace(target)
    fsync(source.directory)
    done = RepairedShard(old["file"], sequences, forwards, old["sha256"], digest)
    if not done.exact:
        source.manifest = _with_record(source, number, done, size)
        write_manifest(source.directory, source.manifest)
    return done


def _with_record(source: _Source, number: int, done: RepairedShard, size: int) -> dict[str, Any]:
    manifest = source.manifest
    shards = [dict(entry) for entry in manifest["shards"]]
    shards[number] |= {"bytes": size, "sha256": done.sha256}
    record = {
        **{name: value for name, value in asdict(done).items() if name in ("file", "sha256_before", "sha256")},
        "sequences": [list(run) for run in runs(done.sequences)],
        "libraries": libraries(),
        "machine": _machine(source._hf) if source._hf is not None else {},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    merged = {spec.name: Moments.empty(spec.shape) for spec in source.specs if spec.floating}
    readable = [entry for entry in shards if _is_sound(source.directory, entry)]
    statistics = manifest["statistics"]
    if len(readable) == len(shards):  # with the last repaired shard; until then the old ones stand
        for entry in shards:
            for name, moments in read_moments(source.directory / entry["file"], source.specs).items():
                merged[name].add(moments)
        statistics = {name: moments.to_json(vectors=manifest["finished"]) for name, moments in merged.items()}
    return {**manifest, "shards": shards, "statistics": statistics, "repaired": [*manifest.get("repaired", []), record]}


def _is_sound(directory: Path, entry: Mapping[str, Any]) -> bool:
    path = directory / entry["file"]
    return path.is_file() and path.stat().st_size == entry["bytes"] and file_sha256(path) == entry["sha256"]
