"""The format's requirements as functions of a cache directory, for this writer and for any other.

Each function checks one requirement of `docs/cache-format.md` with json, hashlib and h5py alone: nothing here uses this
package's own reader or writer, so that another implementation can be held against the format and not against ours.

    for name, requirement in conformance.REQUIREMENTS.items():
        requirement(directory)          # raises ConformanceError, naming what is wrong

or all at once: `conformance.failures(directory)`.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from activations_cache.errors import ConformanceError

Requirement = Callable[[Path], None]
REQUIREMENTS: dict[str, Requirement] = {}

FLOATS = ("float16", "bfloat16", "float32")
_BFLOAT16 = h5py.h5t.IEEE_F32LE.copy()
_BFLOAT16.set_fields(15, 7, 8, 0, 7)
_BFLOAT16.set_size(2)
_BFLOAT16.set_ebias(127)
SITE_TYPES = {
    "float16": h5py.h5t.IEEE_F16LE,
    "bfloat16": _BFLOAT16,
    "float32": h5py.h5t.IEEE_F32LE,
    "int16": h5py.h5t.STD_I16LE,
    "int32": h5py.h5t.STD_I32LE,
}
RAW_TYPES = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4", "int16": "<i2", "int32": "<i4"}
COLUMN_TYPES = {"int": "<i8", "float": "<f8", "bool": "i1"}
ROW_TYPES = {**COLUMN_TYPES, "string": "<i4"}  # per token, strings are numbers of their category


def requirement(name: str) -> Callable[[Requirement], Requirement]:
    """Register a function as the check of the requirement `name` (its number in the specification)."""

    def add(function: Requirement) -> Requirement:
        REQUIREMENTS[name] = function
        return function

    return add


def failures(directory: str | Path) -> list[str]:
    """Check every requirement; one line per requirement that is broken, none for a conforming cache."""
    found = []
    for name, check in REQUIREMENTS.items():
        try:
            check(Path(directory))
        except ConformanceError as error:
            found.append(f"{name}: {error}")
        except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
            found.append(f"{name}: could not be checked ({type(error).__name__}: {error})")
    return found


def _require(condition: Any, message: str) -> None:
    if not condition:
        raise ConformanceError(message)


def _manifest(directory: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    return manifest


@contextmanager
def _shards(directory: Path) -> Iterator[Iterator[tuple[dict[str, Any], h5py.File]]]:
    """Every (manifest entry, open shard)."""

    def each() -> Iterator[tuple[dict[str, Any], h5py.File]]:
        for entry in _manifest(directory)["shards"]:
            with h5py.File(directory / entry["file"], "r") as file:
                yield entry, file

    shards = each()
    try:
        yield shards
    finally:
        shards.close()  # type: ignore[attr-defined]  # a generator


def _raw(dataset: h5py.Dataset, dtype: str) -> Any:
    """The stored bits of a site."""
    values = np.empty(dataset.shape, RAW_TYPES[dtype])
    dataset.id.read(h5py.h5s.ALL, h5py.h5s.ALL, values, mtype=SITE_TYPES[dtype])
    return values


# --- the manifest ---------------------------------------------------------------------------------------------------


@requirement("M1")
def manifest_is_json_of_this_format(directory: Path) -> None:
    """manifest.json is a UTF-8 JSON object with format "activations-cache" and version 1."""
    _require((directory / "manifest.json").is_file(), "there is no manifest.json")
    manifest = _manifest(directory)
    _require(isinstance(manifest, dict), "the manifest is no JSON object")
    _require(manifest.get("format") == "activations-cache", f"format is {manifest.get('format')!r}")
    _require(manifest.get("version") == 1, f"version is {manifest.get('version')!r}")


@requirement("M2")
def digest_covers_the_file(directory: Path) -> None:
    """`digest` is the SHA-256 of the file's bytes with the digest's own digits replaced by zeros."""
    raw = (directory / "manifest.json").read_bytes()
    found = re.search(rb'"digest": "([0-9a-f]{64})"', raw)
    if found is None:
        raise ConformanceError("there is no digest")
    blank = raw[: found.start(1)] + b"0" * 64 + raw[found.end(1) :]
    _require(hashlib.sha256(blank).hexdigest().encode() == found[1], "the digest is not that of the file")


@requirement("M3")
def fields_are_there(directory: Path) -> None:
    """Every field that the specification lists is present."""
    manifest = _manifest(directory)
    top = "finished identity model tokenizer data sites settings plan rows statistics libraries machine created shards"
    inner = {
        "model": "name config_hash weights_hash dtype",
        "data": "fingerprint columns_fingerprint sequences tokens truncated bos columns",
        "settings": "positions dtype batch_tokens shard_rows max_length bos chat overflow",
        "plan": "fingerprint rows sequences tokens batches shards",
    }
    missing = [name for name in top.split() if name not in manifest]
    missing += [
        f"{part}.{name}" for part, names in inner.items() for name in names.split() if name not in manifest[part]
    ]
    _require(not missing, f"the manifest lacks {', '.join(missing)}")


@requirement("M4")
def sites_are_described(directory: Path) -> None:
    """Each site has a name, a known dtype and a shape; no name or alias occurs twice."""
    names: list[str] = []
    for site in _manifest(directory)["sites"]:
        _require(site["dtype"] in SITE_TYPES, f"{site['name']} has dtype {site['dtype']!r}")
        _require(all(isinstance(size, int) and size > 0 for size in site["shape"]), f"{site['name']}: {site['shape']}")
        names += [site["name"], *site["aliases"]]
    _require(names and len(set(names)) == len(names), "there is no site, or one is there under two names")


@requirement("M5")
def rows_add_up(directory: Path) -> None:
    """Shards follow one another without gap; `rows` is their sum; finished means all that was planned."""
    manifest = _manifest(directory)
    row = sequence = 0
    for entry in manifest["shards"]:
        _require((entry["first_row"], entry["first_sequence"]) == (row, sequence), f"a gap before {entry['file']}")
        row, sequence = row + entry["rows"], sequence + entry["sequences"]
    _require(manifest["rows"] == row, f"rows is {manifest['rows']}, the shards hold {row}")
    plan = manifest["plan"]
    whole = (row, sequence, len(manifest["shards"])) == (plan["rows"], plan["sequences"], plan["shards"])
    _require(manifest["finished"] == whole, f"finished is {manifest['finished']} with {row} of {plan['rows']} rows")


# --- the shards -----------------------------------------------------------------------------------------------------


@requirement("S1")
def shards_are_the_manifests(directory: Path) -> None:
    """Each shard is a plain file in the directory with the size and the SHA-256 that the manifest names."""
    for entry in _manifest(directory)["shards"]:
        path = directory / entry["file"]
        _require(re.fullmatch(r"shard-\d{5,}\.h5", entry["file"]), f"{entry['file']!r} is no shard's name")
        _require(path.is_file(), f"{entry['file']} is missing")
        _require(path.resolve().parent == directory.resolve(), f"{entry['file']} is a link out of the directory")
        _require(path.stat().st_size == entry["bytes"], f"{entry['file']} has another size than {entry['bytes']}")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        _require(digest == entry["sha256"], f"{entry['file']} has another SHA-256")


@requirement("S2")
def shards_name_themselves(directory: Path) -> None:
    """The root attributes of a shard repeat format, version, identity and its place."""
    manifest = _manifest(directory)
    common = {"format": "activations-cache", "version": 1, "identity": manifest["identity"]}
    with _shards(directory) as shards:
        for entry, file in shards:
            place = {name: entry[name] for name in ("first_sequence", "sequences", "first_row", "rows")}
            for name, wanted in {**common, **place}.items():
                _require(file.attrs[name] == wanted, f"{entry['file']}: {name} is {file.attrs[name]!r}, not {wanted!r}")


@requirement("S3")
def sites_are_contiguous(directory: Path) -> None:
    """/sites holds exactly the manifest's sites, [rows, *shape], little-endian, contiguous and unfiltered."""
    sites = {site["name"]: site for site in _manifest(directory)["sites"]}
    with _shards(directory) as shards:
        for entry, file in shards:
            _require(set(file["sites"]) == set(sites), f"{entry['file']} holds {sorted(file['sites'])}")
            for name, site in sites.items():
                dataset, where = file["sites"][name], f"{entry['file']}, {name}"
                _require(dataset.shape == (entry["rows"], *site["shape"]), f"{where}: shape {dataset.shape}")
                _require(
                    dataset.id.get_type() == SITE_TYPES[site["dtype"]], f"{where}: no {site['dtype']}, little-endian"
                )
                _require(dataset.id.get_offset() is not None, f"{where} is not contiguous")


@requirement("S4")
def values_are_finite(directory: Path) -> None:
    """No stored float is NaN or infinite; no stored index is negative."""
    sites = _manifest(directory)["sites"]
    with _shards(directory) as shards:
        for entry, file in shards:
            for site in sites:
                values = file["sites"][site["name"]][()]
                fine = np.isfinite(values) if site["dtype"] in FLOATS else values >= 0
                _require(fine.all(), f"{entry['file']}, {site['name']}: a value that no capture stores")


@requirement("S5")
def sequences_are_whole(directory: Path) -> None:
    """/sequences holds int32 input_ids end to end and int64 offsets of every sequence of the shard, none empty."""
    tokens = 0
    with _shards(directory) as shards:
        for entry, file in shards:
            ids, offsets = file["sequences/input_ids"], file["sequences/offsets"]
            _require(ids.dtype == np.dtype("<i4") and offsets.dtype == np.dtype("<i8"), f"{entry['file']}: wrong types")
            starts = offsets[()]
            _require(starts.shape == (entry["sequences"] + 1,) and starts[0] == 0, f"{entry['file']}: wrong offsets")
            _require((np.diff(starts) > 0).all() and starts[-1] == len(ids), f"{entry['file']}: offsets do not add up")
            _require((ids[()] >= 0).all(), f"{entry['file']}: a negative token id")
            tokens += len(ids)
    manifest = _manifest(directory)
    _require(not manifest["finished"] or tokens == manifest["plan"]["tokens"], f"{tokens} tokens in a finished cache")


@requirement("S6")
def rows_say_where_they_are_from(directory: Path) -> None:
    """/rows/sequence (int64) and /rows/position (int32) are in order and are the positions that were asked for."""
    positions = _manifest(directory)["settings"]["positions"]
    with _shards(directory) as shards:
        for entry, file in shards:
            sequence, position = file["rows/sequence"], file["rows/position"]
            _require(sequence.dtype == np.dtype("<i8"), f"{entry['file']}: rows/sequence is {sequence.dtype}")
            _require(position.dtype == np.dtype("<i4"), f"{entry['file']}: rows/position is {position.dtype}")
            lengths, first = np.diff(file["sequences/offsets"][()]), entry["first_sequence"]
            numbers = np.arange(first, first + entry["sequences"])
            if positions == "all":
                numbers, wanted = np.repeat(numbers, lengths), np.concatenate([np.arange(n) for n in lengths])
            else:
                wanted = lengths - 1
            right = np.array_equal(sequence[()], numbers) and np.array_equal(position[()], wanted)
            _require(right, f"{entry['file']}: the rows are not {positions} positions in order")


@requirement("S7")
def columns_are_typed(directory: Path) -> None:
    """/sequences holds each label column of the manifest and no other, one entry per sequence, of its type."""
    columns = _manifest(directory)["data"]["columns"]
    taken = {"input_ids", "length", "offsets", "position", "sequence", "token"} & set(columns)
    _require(not taken, f"columns have the reserved names {sorted(taken)}")
    with _shards(directory) as shards:
        for entry, file in shards:
            held = set(file["sequences"]) - {"input_ids", "offsets"}
            _require(held == set(columns), f"{entry['file']} holds the columns {sorted(held)}, not {sorted(columns)}")
            for name, kind in columns.items():
                dataset, where = file["sequences"][name], f"{entry['file']}, column {name}"
                _require(dataset.shape == (entry["sequences"],), f"{where}: shape {dataset.shape}")
                if kind == "string":
                    info = h5py.check_string_dtype(dataset.dtype)
                    _require(info is not None and info.encoding == "utf-8", f"{where} is no UTF-8 string")
                else:
                    _require(dataset.dtype == np.dtype(COLUMN_TYPES[kind]), f"{where} is {dataset.dtype}, not {kind}")


@requirement("S8")
def crcs_are_right(directory: Path) -> None:
    """/crc holds the CRC-32 of each block of `crc_rows` rows; datasets of /sequences carry theirs as attribute."""
    sites = _manifest(directory)["sites"]
    with _shards(directory) as shards:
        for entry, file in shards:
            covered = {f"sites/{site['name']}": _raw(file["sites"][site["name"]], site["dtype"]) for site in sites}
            covered |= {f"rows/{name}": file["rows"][name][()] for name in file["rows"]}
            size = int(file.attrs["crc_rows"])
            for name, values in covered.items():
                blocks = [zlib.crc32(values[i : i + size].tobytes()) for i in range(0, len(values), size)]
                _require(file["crc"][name][()].tolist() == blocks, f"{entry['file']}: CRCs of {name}")
            for name, dataset in file["sequences"].items():
                values = dataset[()]
                text = h5py.check_string_dtype(dataset.dtype) is not None
                raw = b"".join(value + b"\0" for value in values) if text else values.tobytes()
                _require(dataset.attrs["crc32"] == zlib.crc32(raw), f"{entry['file']}: CRC of sequences/{name}")


# --- statistics and index -------------------------------------------------------------------------------------------


@requirement("T1")
def statistics_are_of_the_stored_rows(directory: Path) -> None:
    """/statistics of a shard and, once finished, the manifest's are those of the stored values."""
    manifest = _manifest(directory)
    for site in manifest["sites"]:
        if site["dtype"] not in FLOATS:
            continue
        parts = []
        with _shards(directory) as shards:
            for entry, file in shards:
                values = file["sites"][site["name"]][()].astype(np.float64)
                parts.append(values)
                group, where = file["statistics"][site["name"]], f"{entry['file']}, {site['name']}"
                _require(group.attrs["count"] == len(values), f"{where}: count")
                _close(group["mean"][()], values.mean(0), values, f"{where}: mean")
                _close(group["m2"][()] / len(values), values.var(0), values, f"{where}: m2")
        if manifest["finished"]:
            values, found = np.concatenate(parts), manifest["statistics"][site["name"]]
            _require(found["count"] == len(values), f"{site['name']}: count")
            _close(np.array(found["mean"]), values.mean(0), values, f"{site['name']}: mean")
            _close(np.array(found["var"]), values.var(0), values, f"{site['name']}: var")
            norm = np.linalg.norm(values.reshape(len(values), -1), axis=1).mean()
            _close(np.array(found["mean_norm"]), norm, values, f"{site['name']}: mean_norm")


def _close(found: Any, wanted: Any, values: Any, what: str) -> None:
    scale = float(np.nanmax(np.abs(values))) + 1e-30
    _require(found.shape == np.shape(wanted), f"{what} has shape {found.shape}")
    _require(np.allclose(found, wanted, rtol=1e-5, atol=1e-5 * max(scale, scale**2)), f"{what} is not the stored rows'")


@requirement("I1")
def index_shows_the_shards(directory: Path) -> None:
    """index.h5 shows every dataset of the shards end to end, by relative names, filled with NaN or -1."""
    manifest = _manifest(directory)
    files = [entry["file"] for entry in manifest["shards"]]
    with h5py.File(directory / "index.h5", "r") as index:
        _require(index.attrs["identity"] == manifest["identity"], "the index is of another cache")
        _require(index.attrs["finished"] == manifest["finished"], "the index says another thing about being finished")
        _require(index.attrs["rows"] == manifest["rows"], "the index has another number of rows")
        names = [f"sites/{site['name']}" for site in manifest["sites"]] + ["rows/sequence", "rows/position"]
        names += [f"sequences/{name}" for name in ("input_ids", *manifest["data"]["columns"])]
        for name in names:
            dataset = index[name]
            _require(dataset.is_virtual or not files, f"{name} is not virtual")
            sources = [source.file_name for source in dataset.virtual_sources()] if files else []
            _require(sources == files, f"{name} is made of {sources}")
            _check_fill(dataset, name)
            parts = []
            with _shards(directory) as shards:
                parts = [file[name][()] for _, file in shards]
            same = np.array_equal(dataset[()], np.concatenate(parts)) if parts else len(dataset) == 0
            _require(same, f"{name} differs from the shards")


def _check_fill(dataset: h5py.Dataset, name: str) -> None:
    if h5py.check_string_dtype(dataset.dtype) is None:
        fill = dataset.fillvalue
        _require(np.isnan(fill) if dataset.dtype.kind == "f" else fill == -1, f"{name} is filled with {fill}")


@requirement("I2")
def index_offsets_are_global(directory: Path) -> None:
    """/sequences/offsets of the index are positions in the index's own input_ids."""
    lengths = []
    with _shards(directory) as shards:
        lengths = [np.diff(file["sequences/offsets"][()]) for _, file in shards]
    wanted = np.cumsum(np.concatenate([[0], *lengths]))
    with h5py.File(directory / "index.h5", "r") as index:
        _require(np.array_equal(index["sequences/offsets"][()], wanted), "the offsets do not add up")
