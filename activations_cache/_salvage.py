"""What of a damaged shard is intact, as a buffer that can be filled up and written again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from activations_cache._examine import read_raw
from activations_cache._verify import Problem
from activations_cache.columns import Column
from activations_cache.plan import IntArray, batches_of
from activations_cache.positions import Selection
from activations_cache.store import (
    LOGPROB,
    NUMPY_TYPES,
    AnyArray,
    Moments,
    ShardBuffer,
    SiteSpec,
    block_crcs,
    read_moments,
)
from activations_cache.tokens import Tokens


@dataclass
class Salvage:
    """A shard under repair. Sequences and rows are counted from the shard's first.

    Attributes:
        tokens: Token ids of its sequences.
        selection: Which of their positions are stored.
        buffer: The rows, intact or not, and everything else that the shard holds.
        bad: Per dataset ("sites/NAME", "rows/logprob") which rows are damaged, [rows].
        described: Whether token ids, labels, positions and token columns are all there: without them, the data are
            needed.
        whole: Whether the file could be read in full, so that perhaps only a checksum or a header is wrong.
        moments: The statistics as the file holds them, if it does. They have no CRC.
    """

    tokens: Tokens
    selection: Selection
    buffer: ShardBuffer
    bad: dict[str, npt.NDArray[np.bool_]]
    described: bool
    whole: bool
    moments: dict[str, Moments] | None = field(default=None)

    @classmethod
    def of_job(cls, job: Any, number: int, kept: Salvage | None) -> Salvage:
        """The shard as the data say it is, with the rows that `kept` has intact."""
        shard = job.plan.shards[number]
        first, stop = shard.first_sequence, shard.first_sequence + shard.sequences
        logprobs = bool(job.manifest["settings"].get("logprobs"))
        buffer = ShardBuffer.allocate(job.specs, shard, job.tokens, job.selection, job.columns, logprobs)
        names = [f"sites/{spec.name}" for spec in job.specs] + ([f"rows/{LOGPROB}"] if logprobs else [])
        bad = {name: np.ones(buffer.rows, bool) for name in names}
        for name in names if kept is not None else ():
            target = _target(buffer, name)
            source = _target(kept.buffer, name) if kept is not None else target
            if source.shape == target.shape and kept is not None:
                target[~kept.bad[name]] = source[~kept.bad[name]]
                bad[name] = kept.bad[name]
        start, end = job.tokens.offsets[first], job.tokens.offsets[stop]
        tokens = Tokens(np.asarray(job.tokens.flat[start:end]), job.tokens.offsets[first : stop + 1] - start)
        moments = None if kept is None else kept.moments
        return cls(tokens, _cut(job.selection, first, stop), buffer, bad, True, False, moments)

    def take_over(self, template: Path, damaged: Path) -> None:
        """Take blocks of rows from a file that HDF5 cannot read, from where a shard of this content has them.

        The structures of a shard follow from its content, but for the values: `template` is a shard like this one
        with any values. A block is taken over if its CRC, from its own place in the damaged file, is right.
        """
        with h5py.File(template, "r") as file:
            block = int(file.attrs["crc_rows"])
            for name, bad in self.bad.items():
                start, crc_start = file[name].id.get_offset(), file[f"crc/{name}"].id.get_offset()
                if start is None or crc_start is None:  # no rows
                    continue
                target = _target(self.buffer, name)
                found = np.fromfile(damaged, target.dtype, target.size, offset=start).reshape(target.shape)
                crcs = np.fromfile(damaged, "<u4", len(file[f"crc/{name}"]), offset=crc_start)
                right = np.repeat(block_crcs(found, block) == crcs, block)[: len(bad)]
                target[right] = found[right]
                bad &= ~right

    def rows_of(self, sequences: IntArray) -> IntArray:
        """The rows of some sequences, one after the other."""
        offsets = self.buffer.offsets
        return np.concatenate([np.arange(offsets[n], offsets[n + 1]) for n in sequences]).astype(np.int64)

    def batches(self, batch_tokens: int) -> Iterator[IntArray]:
        """The batches that the capture ran for this shard."""
        yield from batches_of(self.buffer.lengths, 0, batch_tokens)

    def damaged_sequences(self) -> set[int]:
        """Sequences of which a row is damaged."""
        rows = np.zeros(self.buffer.rows, bool)
        for bad in self.bad.values():
            rows |= bad
        return set(np.repeat(np.arange(len(self.buffer.stored)), self.buffer.stored)[rows].tolist())

    def replace(self, name: str, batch: IntArray, values: AnyArray) -> None:
        """Put the damaged rows of a batch in their place; intact ones stay as they are."""
        rows = self.rows_of(batch)
        wrong = self.bad[name][rows]
        _target(self.buffer, name)[rows[wrong]] = values[wrong]


def _target(buffer: ShardBuffer, name: str) -> AnyArray:
    group, _, field_name = name.partition("/")
    return buffer.sites[field_name] if group == "sites" else buffer.fields[field_name]


def _cut(selection: Selection, first: int, stop: int) -> Selection:
    """A selection over some sequences alone."""
    lengths, counts = selection.lengths[first:stop], selection.counts[first:stop]
    if selection.flat is None or selection.starts is None:
        return Selection(selection.kind, selection.pool, lengths, counts)
    start, end = selection.starts[first], selection.starts[stop]
    flat = np.asarray(selection.flat[start:end])
    return Selection(selection.kind, selection.pool, lengths, counts, flat, selection.starts[first : stop + 1] - start)


def salvage(directory: Path, manifest: Mapping[str, Any], number: int, problem: Problem) -> Salvage | None:
    """What is intact of a damaged shard; None where nothing of it can be read.

    Only call it for a problem that `verify` has found: that process came back from the file, so this one will.
    """
    entry = manifest["shards"][number]
    unreadable = problem.kind != "altered" or "cannot be read" in problem.detail
    if unreadable:
        return None
    try:
        with h5py.File(directory / entry["file"], "r") as file:
            return _read(file, directory / entry["file"], entry, manifest, problem)
    except (OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError):
        return None  # a name or a type is altered: then nothing of the file is taken over


def _read(
    file: h5py.File, path: Path, entry: Mapping[str, Any], manifest: Mapping[str, Any], problem: Problem
) -> Salvage | None:
    damaged = {part.dataset: part.rows for part in problem.damage}
    lost = {name for name, rows in damaged.items() if not rows and not name.startswith("sequences/")}
    specs, settings = [SiteSpec.from_json(site) for site in manifest["sites"]], manifest["settings"]
    columns = {name: _column(file, name, kind) for name, kind in manifest["data"]["columns"].items()}
    names = [*(manifest["data"].get("token_columns") or {}), *([LOGPROB] if settings.get("logprobs") else [])]
    fields = {name: file[f"rows/{name}"][()] for name in ("position", *names)}
    sites = {}
    for spec in specs:
        name = f"sites/{spec.name}"
        empty = np.zeros((entry["rows"], *spec.shape), NUMPY_TYPES[spec.dtype])
        sites[spec.name] = empty if name in lost else _rows(file[name], damaged.get(name, ()), entry["first_row"])
    rows = [f"sites/{spec.name}" for spec in specs] + ([f"rows/{LOGPROB}"] if LOGPROB in names else [])
    bad = {name: _mask(damaged.get(name), name in lost, entry) for name in rows}
    flat, lengths = _sequences(file, entry)
    stored = _stored(file["rows/sequence"][()], settings, lengths, entry)
    selection = None if stored is None else _selection(settings, lengths, stored, fields["position"])
    consistent = stored is not None and int(stored.sum()) == entry["rows"] and len(flat) > 0
    if stored is None or not consistent:
        stored, selection = np.array([entry["rows"]]), None
    if selection is not None and selection.kind != "chosen":
        fields["position"] = selection.row_positions(0, len(lengths)).astype("<i4")
    buffer = ShardBuffer(entry["first_sequence"], entry["first_row"], flat, lengths, stored, columns, sites, fields)
    gone = set(damaged) - set(rows)
    if selection is not None and selection.kind != "chosen":
        gone -= {"rows/sequence", "rows/position"}
    described = consistent and not gone and (selection is not None or not problem.damage)
    chosen = selection or Selection("all", None, lengths, stored)
    return Salvage(
        Tokens(flat, _ends(lengths)), chosen, buffer, bad, described, consistent and not lost, _moments(path, specs)
    )


def _sequences(file: h5py.File, entry: Mapping[str, Any]) -> tuple[npt.NDArray[np.int32], IntArray]:
    """Token ids end to end, and lengths; no ids where the two contradict one another."""
    flat, offsets = file["sequences/input_ids"][()], file["sequences/offsets"][()]
    lengths = np.diff(offsets)
    right = len(lengths) == entry["sequences"] and bool((lengths > 0).all()) and len(flat) == offsets[-1]
    return (flat, lengths) if right else (flat[:0], np.ones(entry["sequences"], np.int64))


def _stored(
    sequence: npt.NDArray[np.int64], settings: Mapping[str, Any], lengths: IntArray, entry: Mapping[str, Any]
) -> IntArray | None:
    """Rows stored of each sequence: what the settings say, else what the rows say; None where these contradict."""
    if settings.get("pool") or settings["positions"] == "last":
        return np.ones_like(lengths)
    if settings["positions"] == "all":
        return lengths
    local = sequence - entry["first_sequence"]
    if len(local) and not (local.min() >= 0 and local.max() < len(lengths)):
        return None
    return np.bincount(local, minlength=len(lengths))


def _ends(lengths: IntArray) -> IntArray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _moments(path: Path, specs: Sequence[SiteSpec]) -> dict[str, Moments] | None:
    try:
        found = read_moments(path, specs)
    except (OSError, KeyError, RuntimeError, ValueError, TypeError):
        return None
    right = all(
        found[spec.name].mean.shape == found[spec.name].m2.shape == spec.shape for spec in specs if spec.floating
    )
    return found if right else None


def _rows(dataset: h5py.Dataset, damaged: Sequence[tuple[int, int]], first_row: int) -> AnyArray:
    """The rows of a site; damaged ones as far as they can be read (a compressed chunk may not be)."""
    try:
        return read_raw(dataset, 0, len(dataset))
    except (OSError, RuntimeError):
        sample = read_raw(dataset, 0, 0)
        out = np.zeros(dataset.shape, sample.dtype)
        edges = [0, *(edge - first_row for pair in damaged for edge in pair), len(dataset)]
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            out[start:stop] = read_raw(dataset, start, stop)
        return out


def _column(file: h5py.File, name: str, kind: Any) -> Column:
    dataset = file[f"sequences/{name}"]
    text = h5py.check_string_dtype(dataset.dtype) is not None
    return Column(kind, dataset.asstr(errors="replace")[()].tolist() if text else dataset[()].tolist())


def _mask(ranges: Sequence[tuple[int, int]] | None, lost: bool, entry: Mapping[str, Any]) -> npt.NDArray[np.bool_]:
    bad = np.full(entry["rows"], lost)
    for start, stop in ranges or ():
        bad[start - entry["first_row"] : stop - entry["first_row"]] = True
    return bad


def _selection(
    settings: Mapping[str, Any], lengths: IntArray, stored: IntArray, position: npt.NDArray[np.int32]
) -> Selection | None:
    """The selection that the stored rows name; None where they do not (a mean over positions that were chosen)."""
    kind, pool = settings["positions"], settings.get("pool")
    if kind in ("all", "last"):
        return Selection(kind, pool, lengths, stored)
    if pool:
        return None
    return Selection("chosen", None, lengths, stored, position, _ends(stored))
