"""index.h5: the whole cache as one HDF5 file of virtual datasets, for any reader that knows HDF5 and nothing of us.

The index is derived data. It names the shards by their bare file names, which HDF5 resolves beside the index, so a
moved directory stays right; and it fills what is missing with NaN or -1, so that a lost shard never reads as zeros.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from activations_cache.store import (
    FORMAT,
    HDF5_TYPES,
    INDEX,
    LOGPROB,
    PARTIAL,
    VERSION,
    SiteSpec,
    fsync,
    json_digest,
)

COLUMN_TYPES = {
    "int": h5py.h5t.STD_I64LE,
    "float": h5py.h5t.IEEE_F64LE,
    "bool": h5py.h5t.STD_I8LE,
    "string": h5py.h5t.py_create(h5py.string_dtype(), logical=True),
}
FILL = {"int": np.int64(-1), "float": np.float64(np.nan), "bool": np.int8(-1), "string": None}  # strings: empty
TOKEN_TYPES: dict[str, tuple[Any, Any]] = {
    "int": (h5py.h5t.STD_I64LE, np.int64(-1)),
    "float": (h5py.h5t.IEEE_F64LE, np.float64(np.nan)),
    "bool": (h5py.h5t.STD_I8LE, np.int8(-1)),
    "string": (h5py.h5t.STD_I32LE, np.int32(-1)),  # numbers of the manifest's categories
}
WRITER = f"h5py {h5py.version.version}, HDF5 {h5py.version.hdf5_version}"


def index_digest(manifest: Mapping[str, Any]) -> str:
    """What an index is an index of: identity, sites, columns and the committed shards."""
    return json_digest([manifest["identity"], manifest["sites"], manifest["data"]["columns"], manifest["shards"]])


def index_is_current(directory: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether index.h5 is there, opens, and is the manifest's."""
    try:
        with h5py.File(directory / INDEX, "r") as file:
            return bool(file.attrs.get("manifest") == index_digest(manifest)) and bool(
                file.attrs.get("finished") == manifest["finished"]
            )
    except OSError:
        return False


def write_index(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Write index.h5 beside its name and rename it. Shards that cannot be opened keep their place, as fill values.

    Raises:
        OSError: The directory cannot be written.
    """
    partial = directory / f".{INDEX}.{os.getpid()}{PARTIAL}"
    try:
        _write(partial, directory, manifest)
        fsync(partial)
        partial.replace(directory / INDEX)
        fsync(directory)
    finally:
        partial.unlink(missing_ok=True)


def _write(path: Path, directory: Path, manifest: Mapping[str, Any]) -> None:
    with h5py.File(path, "w") as file:
        file.attrs.update({"format": FORMAT, "version": VERSION, "identity": manifest["identity"]})
        file.attrs.update({"manifest": index_digest(manifest), "finished": manifest["finished"]})
        file.attrs.update({"rows": manifest["rows"], "sequences": _sequences(manifest), "writer": WRITER})
        _write_rows(file, manifest)
        _write_sequences(file, directory, manifest)


def _sequences(manifest: Mapping[str, Any]) -> int:
    return sum(entry["sequences"] for entry in manifest["shards"])


def _write_rows(file: h5py.File, manifest: Mapping[str, Any]) -> None:
    parts = [(entry["file"], entry["rows"]) for entry in manifest["shards"]]
    for spec in map(SiteSpec.from_json, manifest["sites"]):
        fill = np.float32(np.nan) if spec.floating else np.int32(-1)
        _virtual(file, f"sites/{spec.name}", HDF5_TYPES[spec.dtype], spec.shape, parts, fill)
    _virtual(file, "rows/sequence", h5py.h5t.STD_I64LE, (), parts, np.int64(-1))
    _virtual(file, "rows/position", h5py.h5t.STD_I32LE, (), parts, np.int32(-1))
    for name, column in manifest["data"].get("token_columns", {}).items():
        stored, missing = TOKEN_TYPES[column["kind"]]
        _virtual(file, f"rows/{name}", stored, (), parts, missing)
    if manifest["settings"].get("logprobs"):
        _virtual(file, f"rows/{LOGPROB}", h5py.h5t.IEEE_F32LE, (), parts, np.float32(np.nan))


def _write_sequences(file: h5py.File, directory: Path, manifest: Mapping[str, Any]) -> None:
    lengths = [_lengths(directory / entry["file"], entry["sequences"]) for entry in manifest["shards"]]
    joined = np.concatenate([np.zeros(0, "<i8"), *lengths])
    group = file.require_group("sequences")
    group["offsets"] = np.concatenate([[0], np.cumsum(joined)]).astype("<i8")
    files = [entry["file"] for entry in manifest["shards"]]
    tokens = list(zip(files, [int(part.sum()) for part in lengths], strict=True))
    _virtual(file, "sequences/input_ids", h5py.h5t.STD_I32LE, (), tokens, np.int32(-1))
    rows = [(entry["file"], entry["sequences"]) for entry in manifest["shards"]]
    for name, kind in manifest["data"]["columns"].items():
        _virtual(file, f"sequences/{name}", COLUMN_TYPES[kind], (), rows, FILL[kind])


def _lengths(shard: Path, sequences: int) -> Any:
    """Lengths of a shard's sequences; all 0 where it cannot be read, so that the others keep their offsets."""
    try:
        with h5py.File(shard, "r") as file:
            return np.diff(file["sequences/offsets"][()])
    except (OSError, KeyError):
        return np.zeros(sequences, "<i8")


def _virtual(
    file: h5py.File, name: str, kind: Any, shape: tuple[int, ...], parts: list[tuple[str, int]], fill: Any
) -> None:
    """A dataset [sum of rows, *shape] made of the same dataset in each (file, rows)."""
    total = sum(rows for _, rows in parts)
    space = h5py.h5s.create_simple((total, *shape))
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_obj_track_times(False)  # the same cache gives the same bytes
    if fill is not None:
        properties.set_fill_value(np.asarray(fill))
    start = 0
    for source, rows in parts:
        if rows:
            space.select_hyperslab((start, *(0,) * len(shape)), (rows, *shape))
            properties.set_virtual(space, source.encode(), name.encode(), h5py.h5s.create_simple((rows, *shape)))
        start += rows
    space.select_all()
    group = file.require_group(name.rpartition("/")[0])
    h5py.h5d.create(group.id, name.rpartition("/")[2].encode(), kind, space, properties)
