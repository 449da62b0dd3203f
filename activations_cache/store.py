"""Writing a cache directory: storage types, shards, the manifest, the lock. `docs/cache-format.md` specifies the files.

The order of a commit is what makes a cache crash-safe: a shard is written beside its final name, flushed, fsynced,
renamed, its directory fsynced, and only then does an atomically replaced manifest name it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import numpy.typing as npt
import torch

from activations_cache.documents import Column, Tokens
from activations_cache.errors import CacheLockedError, CorruptCacheError
from activations_cache.plan import Shard
from activations_cache.positions import Selection

FORMAT = "activations-cache"
VERSION = 1
MANIFEST = "manifest.json"
INDEX = "index.h5"
LOCK = ".lock"
PARTIAL = ".partial"
CRC_ROWS = 256
GZIP_LEVEL = 1  # activations are mostly noise: higher levels gain next to nothing
LOGPROB = "logprob"

Storage = Literal["float16", "bfloat16", "float32", "int16", "int32"]
Compression = Literal["gzip", "lzf"]
AnyArray = npt.NDArray[Any]


def _bfloat16_type() -> Any:
    """bfloat16 as an HDF5 float type: sign, 8 exponent bits (bias 127), 7 mantissa bits. h5py reads it as float32."""
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(15, 7, 8, 0, 7)
    kind.set_size(2)
    kind.set_ebias(127)
    return kind


HDF5_TYPES: dict[str, Any] = {
    "float16": h5py.h5t.IEEE_F16LE,
    "bfloat16": _bfloat16_type(),
    "float32": h5py.h5t.IEEE_F32LE,
    "int16": h5py.h5t.STD_I16LE,
    "int32": h5py.h5t.STD_I32LE,
}
TORCH_TYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in HDF5_TYPES}
# bfloat16 has no numpy type: its bits travel as uint16
NUMPY_TYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "float32": np.dtype("<f4"),
    "int16": np.dtype("<i2"),
    "int32": np.dtype("<i4"),
}
# per-token columns; strings are numbers of the categories that the manifest lists
TOKEN_TYPES: dict[str, np.dtype[Any]] = {
    "int": np.dtype("<i8"),
    "float": np.dtype("<f8"),
    "bool": np.dtype("i1"),
    "string": np.dtype("<i4"),
}
LARGEST = {name: float(torch.finfo(TORCH_TYPES[name]).max) for name in ("float16", "bfloat16", "float32")}
CHUNK_BYTES = 2**20  # of a compressed site: one read of a shuffled block decompresses no more than this


@dataclass(frozen=True)
class SiteSpec:
    """How one site is stored.

    Attributes:
        name: Canonical site name.
        dtype: Storage type.
        shape: Shape of one row.
        aliases: Other names of the same values.
        kind: What the site is, e.g. "resid_post".
        layer: Its layer, or None.
    """

    name: str
    dtype: Storage
    shape: tuple[int, ...]
    aliases: tuple[str, ...] = ()
    kind: str = ""
    layer: int | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored row."""
        return int(np.prod(self.shape, dtype=np.int64)) * NUMPY_TYPES[self.dtype].itemsize

    @property
    def floating(self) -> bool:
        """Whether the values are floats."""
        return self.dtype in ("float16", "bfloat16", "float32")

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> SiteSpec:
        """Read a `sites` entry of a manifest."""
        shape, aliases = tuple(entry["shape"]), tuple(entry.get("aliases", ()))
        return cls(entry["name"], entry["dtype"], shape, aliases, entry.get("kind", ""), entry.get("layer"))

    def to_json(self) -> dict[str, Any]:
        """The `sites` entry of a manifest."""
        return {**asdict(self), "shape": list(self.shape), "aliases": list(self.aliases)}


@dataclass(frozen=True)
class ShardEntry:
    """A committed shard, as the manifest names it."""

    file: str
    first_sequence: int
    sequences: int
    first_row: int
    rows: int
    bytes: int
    sha256: str


@dataclass
class Moments:
    """Running mean, centred second moment and norm of one site, in float64 (Chan, Golub and LeVeque 1983).

    Attributes:
        count: Rows seen.
        mean: Mean row.
        m2: Sum of squared deviations from the mean, per element.
        norm_sum: Sum of the rows' Euclidean norms (over all elements of a row).
    """

    count: int
    mean: npt.NDArray[np.float64]
    m2: npt.NDArray[np.float64]
    norm_sum: float = 0.0

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> Moments:
        """No rows yet."""
        return cls(0, np.zeros(shape), np.zeros(shape))

    def add(self, other: Moments) -> None:
        """Merge the moments of further rows."""
        if not other.count:
            return
        count = self.count + other.count
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (other.count / count)
        self.m2 = self.m2 + other.m2 + delta**2 * (self.count * other.count / count)
        self.norm_sum += other.norm_sum
        self.count = count

    def to_json(self, vectors: bool) -> dict[str, Any]:
        """The `statistics` entry of a manifest: scalars always, mean and var when asked."""
        count = max(self.count, 1)
        entry: dict[str, Any] = {"count": self.count, "mean_norm": self.norm_sum / count}
        entry["total_variance"] = float(self.m2.sum() / count)
        if vectors:
            entry |= {"mean": self.mean.tolist(), "var": (self.m2 / count).tolist()}
        return entry


@dataclass
class ShardBuffer:
    """One shard in RAM, filled batch by batch in any order.

    Attributes:
        first_sequence: Number of the shard's first sequence.
        first_row: Number of its first row in the cache.
        flat: Token ids of its sequences, whole, end to end.
        lengths: Tokens of each sequence.
        stored: Rows stored of each sequence.
        columns: Label columns, cut to its sequences.
        sites: Per site the raw values [rows, *shape].
        fields: Further values per row [rows], by name: the position, per-token columns, log-probabilities.
        moments: Per floating site the statistics of the shard.
    """

    first_sequence: int
    first_row: int
    flat: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]
    stored: npt.NDArray[np.int64]
    columns: dict[str, Column]
    sites: dict[str, AnyArray]
    fields: dict[str, AnyArray]
    moments: dict[str, Moments] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.offsets = np.concatenate([[0], np.cumsum(self.stored)])
        self.placed = dict.fromkeys((*self.sites, *({LOGPROB} & set(self.fields))), 0)

    @property
    def rows(self) -> int:
        """Rows of the shard."""
        return int(self.offsets[-1])

    @classmethod
    def allocate(
        cls,
        specs: Sequence[SiteSpec],
        shard: Shard,
        tokens: Tokens,
        selection: Selection,
        columns: Mapping[str, Column],
        logprobs: bool = False,
        memory: Mapping[str, AnyArray] | None = None,
    ) -> ShardBuffer:
        """Make an empty buffer for the sequences of a shard, in `memory` where that has room for a site."""
        first, stop = shard.first_sequence, shard.first_sequence + shard.sequences
        stored, position = selection.counts[first:stop], selection.row_positions(first, stop)
        rows = int(stored.sum())
        room = memory or {}
        values = {
            spec.name: room[spec.name][:rows]
            if spec.name in room
            else np.empty((rows, *spec.shape), NUMPY_TYPES[spec.dtype])
            for spec in specs
        }
        fields: dict[str, AnyArray] = {"position": np.asarray(position, "<i4")}
        at = np.repeat(tokens.offsets[first:stop], stored) + position  # of each stored row among all tokens
        for name, column in tokens.token_columns.items():
            fields[name] = np.asarray(column.values[at], TOKEN_TYPES[column.kind])
        if logprobs:
            fields[LOGPROB] = np.empty(rows, "<f4")
        flat = np.asarray(tokens.flat[tokens.offsets[first] : tokens.offsets[stop]])
        cut = {name: Column(column.kind, column.values[first:stop]) for name, column in columns.items()}
        moments = {spec.name: Moments.empty(spec.shape) for spec in specs if spec.floating}
        lengths = np.diff(tokens.offsets[first : stop + 1])
        return cls(first, shard.first_row, flat, lengths, stored, cut, values, fields, moments)

    def put(self, name: str, sequences: Sequence[int], values: AnyArray) -> None:
        """Place the rows of a batch in a site or field: those of `sequences` (numbers in the data), one by one."""
        target = self.sites[name] if name in self.sites else self.fields[name]
        local = np.asarray(sequences) - self.first_sequence
        if len(local) == local[-1] - local[0] + 1:  # neighbours, in order
            target[self.offsets[local[0]] : self.offsets[local[-1] + 1]] = values
        elif 8 * len(local) > len(values):  # few rows of each: one gather-like assignment is faster than many slices
            counts = self.stored[local]
            within = np.arange(len(values)) - np.repeat(np.cumsum(counts) - counts, counts)
            target[np.repeat(self.offsets[local], counts) + within] = values
        else:
            start = 0
            for first, last in zip(self.offsets[local].tolist(), self.offsets[local + 1].tolist(), strict=True):
                target[first:last] = values[start : start + last - first]
                start += last - first
        self.placed[name] += len(values)

    def row_sequence(self) -> npt.NDArray[np.int64]:
        """Sequence number of each row."""
        numbers = self.first_sequence + np.arange(len(self.stored))
        return np.repeat(numbers, self.stored).astype("<i8")


def block_crcs(values: AnyArray, block_rows: int = CRC_ROWS) -> npt.NDArray[np.uint32]:
    """CRC-32 (zlib's) of the raw bytes of each block of rows."""
    flat = np.ascontiguousarray(values)
    blocks = range(0, len(flat), block_rows)
    return np.array([zlib.crc32(flat[start : start + block_rows].data) for start in blocks], dtype="<u4")


def write_shard(
    directory: Path,
    name: str,
    buffer: ShardBuffer,
    specs: Sequence[SiteSpec],
    identity: str,
    compression: Compression | None = None,
) -> ShardEntry:
    """Write a shard beside its final name, make it durable, then rename it.

    Args:
        directory: The cache directory.
        name: Final file name.
        buffer: A full buffer.
        specs: The sites, in order.
        identity: The cache's identity, repeated in every shard.
        compression: How sites are compressed; None stores them contiguously.

    Returns:
        The entry for the manifest, which the caller commits next.
    """
    partial = directory / f".{name}{PARTIAL}"
    try:
        _write_shard(partial, buffer, specs, identity, compression)
    except RuntimeError as error:  # what h5py makes of a failed write when it closes the file
        raise OSError(str(error)) from error
    fsync(partial)
    digest, size = file_sha256(partial), partial.stat().st_size
    partial.replace(directory / name)
    fsync(directory)
    first, count = buffer.first_sequence, len(buffer.stored)
    return ShardEntry(name, first, count, buffer.first_row, buffer.rows, size, digest)


def _write_shard(
    partial: Path, buffer: ShardBuffer, specs: Sequence[SiteSpec], identity: str, compression: Compression | None
) -> None:
    with h5py.File(partial, "w") as file:
        file.attrs.update({"format": FORMAT, "version": VERSION, "identity": identity, "crc_rows": CRC_ROWS})
        numbers = {"first_sequence": buffer.first_sequence, "sequences": len(buffer.stored)}
        file.attrs.update({**numbers, "first_row": buffer.first_row, "rows": buffer.rows})
        for spec in specs:
            _write_raw(file, f"sites/{spec.name}", buffer.sites[spec.name], HDF5_TYPES[spec.dtype], compression)
            file[f"crc/sites/{spec.name}"] = block_crcs(buffer.sites[spec.name])
        for row_name, values in {"sequence": buffer.row_sequence(), **buffer.fields}.items():
            file[f"rows/{row_name}"] = values
            file[f"crc/rows/{row_name}"] = block_crcs(values)
        _write_sequences(file, buffer)
        _write_moments(file, buffer.moments)
        file.flush()


def _write_raw(file: h5py.File, name: str, values: AnyArray, kind: Any, compression: Compression | None) -> None:
    """Write the bits of `values` as a dataset of the given HDF5 type: contiguous, or in compressed chunks of rows."""
    group = file.require_group(name.rpartition("/")[0])
    space = h5py.h5s.create_simple(values.shape)
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_obj_track_times(False)  # the same content gives the same bytes, whenever it is written
    if compression is not None and len(values):
        row_bytes = max(1, values[0].nbytes)
        properties.set_chunk((min(len(values), max(1, CHUNK_BYTES // row_bytes)), *values.shape[1:]))
        properties.set_shuffle()
        if compression == "gzip":
            properties.set_deflate(GZIP_LEVEL)
        else:
            properties.set_filter(h5py.h5z.FILTER_LZF, h5py.h5z.FLAG_OPTIONAL)
    dataset = h5py.h5d.create(group.id, name.rpartition("/")[2].encode(), kind, space, properties)
    dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, np.ascontiguousarray(values), mtype=kind)


def _write_sequences(file: h5py.File, buffer: ShardBuffer) -> None:
    """Token ids of whole sequences, end to end, with offsets; and one dataset per label column."""
    group = file.create_group("sequences")
    group["input_ids"] = buffer.flat.astype("<i4")
    group["offsets"] = np.concatenate([[0], np.cumsum(buffer.lengths)]).astype("<i8")
    for name, column in buffer.columns.items():
        if column.kind == "string":
            group.create_dataset(name, data=column.values, dtype=h5py.string_dtype())
        else:  # booleans as 0 and 1, so that -1 can mean missing
            kind = {"int": "<i8", "float": "<f8", "bool": "i1"}[column.kind]
            group[name] = np.asarray(column.values).astype(kind)
    for dataset in group.values():
        dataset.attrs["crc32"] = np.uint32(dataset_crc(dataset))


def dataset_crc(dataset: h5py.Dataset) -> int:
    """CRC-32 of a whole dataset: of its raw bytes, or of its strings in UTF-8, each ended by a NUL byte."""
    values = dataset[()]
    if h5py.check_string_dtype(dataset.dtype) is not None:
        return zlib.crc32(b"".join(bytes(value) + b"\0" for value in values))
    return zlib.crc32(np.ascontiguousarray(values).tobytes())


def _write_moments(file: h5py.File, moments: Mapping[str, Moments]) -> None:
    for name, moment in moments.items():
        group = file.create_group(f"statistics/{name}")
        group["mean"], group["m2"] = moment.mean, moment.m2
        group.attrs["count"], group.attrs["norm_sum"] = moment.count, moment.norm_sum


def read_moments(path: Path, specs: Sequence[SiteSpec]) -> dict[str, Moments]:
    """Read the statistics that a shard holds of its own rows."""
    found = {}
    with h5py.File(path, "r") as file:
        for spec in specs:
            if spec.floating:
                group = file[f"statistics/{spec.name}"]
                count, norm_sum = int(group.attrs["count"]), float(group.attrs["norm_sum"])
                found[spec.name] = Moments(count, group["mean"][()], group["m2"][()], norm_sum)
    return found


def fsync(path: Path) -> None:
    """Make a file, or the names in a directory, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(value: Any) -> str:
    """SHA-256 of a JSON value in one canonical spelling."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


NO_DIGEST = "0" * 64
_DIGEST = re.compile(rb'"digest": "([0-9a-f]{64})"')


def manifest_text(manifest: Mapping[str, Any]) -> bytes:
    """The manifest as it is written, a line per field and per list entry.

    Its field `digest` is the SHA-256 of the whole file in which that digest's own digits are zeros.
    """
    fields = {"digest": NO_DIGEST, **{name: value for name, value in manifest.items() if name != "digest"}}
    lines = ",\n".join(f"{json.dumps(name)}: {_json_lines(value)}" for name, value in fields.items())
    text = f"{{\n{lines}\n}}\n".encode()
    return text.replace(NO_DIGEST.encode(), hashlib.sha256(text).hexdigest().encode(), 1)


def _json_lines(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return "[\n " + ",\n ".join(json.dumps(entry, allow_nan=False) for entry in value) + "\n]"
    if isinstance(value, Mapping) and value:
        entries = (f"{json.dumps(name)}: {json.dumps(entry, allow_nan=False)}" for name, entry in value.items())
        return "{\n " + ",\n ".join(entries) + "\n}"
    return json.dumps(value, allow_nan=False)


def write_manifest(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Replace the manifest atomically and durably."""
    partial = directory / f".{MANIFEST}{PARTIAL}"
    with partial.open("wb") as file:
        file.write(manifest_text(manifest))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(directory / MANIFEST)
    fsync(directory)


REQUIRED = ("finished", "identity", "model", "data", "sites", "settings", "plan", "rows", "statistics", "shards")


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read and check a manifest.

    Raises:
        CorruptCacheError: No manifest, no JSON, another format or version, missing fields, rows that do not add up.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise CorruptCacheError(f"{directory} is no activations cache: it has no {MANIFEST}")
    raw = path.read_bytes()
    try:
        manifest = json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptCacheError(f"{path} is no JSON ({error}); the cache must be captured again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CorruptCacheError(f"{path} is not the manifest of an activations cache")
    if manifest.get("version") != VERSION:
        raise CorruptCacheError(
            f"{path} has format version {manifest.get('version')!r}; this package reads version {VERSION}"
        )
    if not _digest_is_right(raw):
        raise CorruptCacheError(
            f"{path} was altered after it was written (its digest is wrong). This does not touch the shards: a copy of "
            f"{MANIFEST} restores the cache"
        )
    missing = [name for name in REQUIRED if name not in manifest]
    if missing:
        raise CorruptCacheError(f"{path} lacks {', '.join(missing)}; the cache must be captured again")
    _check_shards(path, manifest)
    return manifest


def _digest_is_right(raw: bytes) -> bool:
    found = _DIGEST.search(raw)
    if found is None:
        return False
    blank = raw[: found.start(1)] + NO_DIGEST.encode() + raw[found.end(1) :]
    return hashlib.sha256(blank).hexdigest().encode() == found[1]


def _check_shards(path: Path, manifest: Mapping[str, Any]) -> None:
    row = sequence = 0
    try:
        for entry in (ShardEntry(**raw) for raw in manifest["shards"]):
            if entry.first_row != row or entry.first_sequence != sequence:
                raise CorruptCacheError(f"{path}: {entry.file} does not begin where the shard before it ends")
            if Path(entry.file).name != entry.file:
                raise CorruptCacheError(f"{path} names {entry.file!r}; a shard must lie in the cache directory itself")
            row, sequence = row + entry.rows, sequence + entry.sequences
    except TypeError as error:
        raise CorruptCacheError(f"{path} has a malformed shard entry: {error}") from error
    if row != manifest["rows"] or (manifest["finished"] and row != manifest["plan"]["rows"]):
        raise CorruptCacheError(
            f"{path} promises {manifest['rows']} rows of {manifest['plan']['rows']} planned; its shards hold {row}"
        )


@contextmanager
def writer_lock(directory: Path) -> Iterator[None]:
    """Hold the directory against a second writer; the lock dies with the process.

    Raises:
        CacheLockedError: Another process holds it.
    """
    handle = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(handle, 64, 0).decode(errors="replace").strip() or "unknown"
            raise CacheLockedError(
                f"another process (pid {holder}) is writing to {directory}; wait for it, or choose another directory"
            ) from error
        os.truncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def remove_partials(directory: Path) -> None:
    """Remove what a killed writer left beside the final names. Call it under the lock."""
    for path in directory.glob(f".*{PARTIAL}"):
        path.unlink()
