"""The format's requirements as functions of a cache directory, for this writer and for any other.

Each function checks one requirement of `docs/cache-format.md` with json, hashlib and h5py alone: nothing here uses this
package's own reader or writer, so that another implementation can be held against the format and not against ours.

    for name, requirement in conformance.REQUIREMENTS.items():
        requirement(directory)          # raises ConformanceError, naming what is wrong

or all at once: `conformance.failures(directory)`; or from a shell, with a line per requirement and exit status 1 if one
is broken: `python -m activations_cache.conformance DIRECTORY`. Everything is read in blocks of at most `BLOCK_BYTES`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from activations_cache.errors import ConformanceError

Requirement = Callable[[str | Path], None]
REQUIREMENTS: dict[str, Requirement] = {}

BLOCK_BYTES = 2**24
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
RESERVED = {"input_ids", "length", "logprob", "mask", "offsets", "position", "sequence", "token"}
ROW_TYPES = {**COLUMN_TYPES, "string": "<i4"}  # per token, strings are numbers of their category


def requirement(name: str) -> Callable[[Callable[[Path], None]], Requirement]:
    """Register a function as the check of the requirement `name` (its number in the specification)."""

    def add(function: Callable[[Path], None]) -> Requirement:
        @wraps(function)
        def check(directory: str | Path) -> None:
            function(Path(directory))

        REQUIREMENTS[name] = check
        return check

    return add


def failures(directory: str | Path) -> list[str]:
    """Check every requirement; one line per requirement that is broken, none for a conforming cache."""
    found = []
    for name, check in REQUIREMENTS.items():
        try:
            check(directory)
        except ConformanceError as error:
            found.append(f"{name}: {error}")
        except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
            found.append(f"{name}: could not be checked ({type(error).__name__}: {error})")
    return found


def _require(condition: Any, message: str) -> None:
    if not condition:
        raise ConformanceError(message)


def _manifest(directory: Path) -> dict[str, Any]:
    def refuse(name: str) -> Any:
        raise ConformanceError(f"the manifest holds {name}, which is no JSON")

    text = (directory / "manifest.json").read_text(encoding="utf-8")
    manifest: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return manifest


@contextmanager
def _shards(directory: Path) -> Iterator[Iterator[tuple[dict[str, Any], h5py.File]]]:
    """Every (manifest entry, open shard). Anything but a plain file is not opened: a pipe would never come back."""

    def each() -> Iterator[tuple[dict[str, Any], h5py.File]]:
        for entry in _manifest(directory)["shards"]:
            _require((directory / entry["file"]).is_file(), f"{entry['file']} is missing or no file")
            with h5py.File(directory / entry["file"], "r") as file:
                yield entry, file

    shards = each()
    try:
        yield shards
    finally:
        shards.close()  # type: ignore[attr-defined]  # a generator


def _blocks(dataset: h5py.Dataset, dtype: str | None = None, multiple: int = 1) -> Iterator[tuple[int, Any]]:
    """(first row, values) of a dataset, a bounded number of rows at a time; with `dtype` the stored bits of a site."""
    row_bytes = max(1, dataset.dtype.itemsize * int(np.prod(dataset.shape[1:], dtype=np.int64)))
    step = max(1, BLOCK_BYTES // row_bytes // multiple) * multiple
    for start in range(0, len(dataset), step):
        shape = (min(step, len(dataset) - start), *dataset.shape[1:])
        if dtype is None:
            yield start, dataset[start : start + step]
            continue
        values = np.empty(shape, RAW_TYPES[dtype])
        space = dataset.id.get_space()
        space.select_hyperslab((start, *(0,) * (len(shape) - 1)), shape)
        dataset.id.read(h5py.h5s.create_simple(shape), space, values, mtype=SITE_TYPES[dtype])
        yield start, values


def _row_fields(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Datasets of /rows that the manifest promises, with their types."""
    columns = manifest["data"].get("token_columns") or {}
    fields = {"sequence": "<i8", "position": "<i4"}
    fields |= {name: ROW_TYPES[entry["kind"]] for name, entry in columns.items()}
    return fields | ({"logprob": "<f4"} if manifest["settings"].get("logprobs") else {})


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


@requirement("M6")
def settings_say_what_is_stored(directory: Path) -> None:
    """positions, pool, compression and the token columns are of the known kinds; dtype is a type or a map of them."""
    manifest = _manifest(directory)
    settings, columns = manifest["settings"], manifest["data"].get("token_columns") or {}
    known: dict[str, tuple[Any, ...]] = {
        "positions": ("all", "last", "answer", "mask", "chosen"),
        "pool": (None, "mean"),
    }
    known |= {"compression": (None, "gzip", "lzf"), "logprobs": (None, False, True)}
    for name, values in known.items():
        _require(settings.get(name) in values, f"settings.{name} is {settings.get(name)!r}, none of {values}")
    dtypes = settings["dtype"].values() if isinstance(settings["dtype"], dict) else [settings["dtype"]]
    _require(set(dtypes) <= set(FLOATS), f"settings.dtype is {settings['dtype']!r}")
    taken = {"sequence", "position", "logprob"} & set(columns)
    _require(not taken, f"token columns have the reserved names {sorted(taken)}")
    for name, entry in columns.items():
        _require(entry["kind"] in ROW_TYPES, f"token column {name} is of kind {entry['kind']!r}")
        categories = entry.get("categories")
        right = isinstance(categories, list) and categories[:1] == [""] and len(set(categories)) == len(categories)
        _require(
            right or entry["kind"] != "string", f"token column {name} has no list of categories that begins with ''"
        )


@requirement("M7")
def repairs_are_recorded(directory: Path) -> None:
    """Each entry of `repaired`, if there are any, names a committed shard, both checksums, sequences and versions."""
    manifest = _manifest(directory)
    entries = {entry["file"]: entry for entry in manifest["shards"]}
    latest: dict[str, str] = {}
    for record in manifest.get("repaired", []):
        lacks = {"file", "sha256_before", "sha256", "sequences", "libraries", "machine", "time"} - set(record)
        _require(not lacks, f"a repair lacks {sorted(lacks)}")
        _require(record["file"] in entries, f"{record['file']!r} was repaired, and is no shard")
        _require(
            record["file"] not in latest or latest[record["file"]] == record["sha256_before"], "repairs do not chain"
        )
        latest[record["file"]] = record["sha256"]
    for name, digest in latest.items():
        _require(entries[name]["sha256"] == digest, f"{name} is not what its last repair left")


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
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
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
def sites_are_as_described(directory: Path) -> None:
    """/sites holds exactly the manifest's sites, [rows, *shape], little-endian; contiguous, or chunked and filtered."""
    manifest = _manifest(directory)
    sites, compression = {site["name"]: site for site in manifest["sites"]}, manifest["settings"].get("compression")
    with _shards(directory) as shards:
        for entry, file in shards:
            _require(set(file["sites"]) == set(sites), f"{entry['file']} holds {sorted(file['sites'])}")
            for name, site in sites.items():
                dataset, where = file["sites"][name], f"{entry['file']}, {name}"
                _require(dataset.shape == (entry["rows"], *site["shape"]), f"{where}: shape {dataset.shape}")
                _require(dataset.id.get_type() == SITE_TYPES[site["dtype"]], f"{where}: no {site['dtype']}")
                _check_layout(dataset, compression, where)


def _check_layout(dataset: h5py.Dataset, compression: str | None, where: str) -> None:
    properties = dataset.id.get_create_plist()
    filters = [properties.get_filter(number)[0] for number in range(properties.get_nfilters())]
    if compression is None:
        contiguous = properties.get_layout() == h5py.h5d.CONTIGUOUS and not filters
        _require(contiguous and (dataset.id.get_offset() is not None or not len(dataset)), f"{where} is not contiguous")
        return
    wanted = {"gzip": h5py.h5z.FILTER_DEFLATE, "lzf": h5py.h5z.FILTER_LZF}[compression]
    _require(
        filters == [h5py.h5z.FILTER_SHUFFLE, wanted], f"{where} has the filters {filters}, not shuffle, {compression}"
    )


@requirement("S4")
def values_are_finite(directory: Path) -> None:
    """No stored float is NaN or infinite; no stored index is negative."""
    sites = _manifest(directory)["sites"]
    with _shards(directory) as shards:
        for entry, file in shards:
            for site in sites:
                for _, values in _blocks(file["sites"][site["name"]]):
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
    settings = _manifest(directory)["settings"]
    with _shards(directory) as shards:
        for entry, file in shards:
            sequence, position = file["rows/sequence"], file["rows/position"]
            _require(sequence.dtype == np.dtype("<i8"), f"{entry['file']}: rows/sequence is {sequence.dtype}")
            _require(position.dtype == np.dtype("<i4"), f"{entry['file']}: rows/position is {position.dtype}")
            same = sequence.shape == position.shape == (entry["rows"],)
            _require(same, f"{entry['file']}: {sequence.shape} sequences and {position.shape} positions")
            lengths = np.diff(file["sequences/offsets"][()])
            local = sequence[()] - entry["first_sequence"]
            wrong = _wrong_rows(local, position[()], lengths, settings)
            _require(wrong is None, f"{entry['file']}: {wrong}")


def _wrong_rows(
    sequence: npt.NDArray[Any], position: npt.NDArray[Any], lengths: npt.NDArray[Any], settings: Mapping[str, Any]
) -> str | None:
    """Say why rows (sequences counted in the shard) are not the selected ones in order, or None."""
    if len(sequence) and not (sequence.min() >= 0 and sequence.max() < len(lengths)):
        return "a row of a sequence that the shard does not hold"
    if not ((position >= 0) & (position < lengths[sequence])).all():
        return "a position that its sequence does not have"
    step, forward = np.diff(sequence), np.diff(position) > 0
    if not ((step > 0) | ((step == 0) & forward)).all():
        return "the rows are not in order"
    kind, counts = settings["positions"], np.bincount(sequence, minlength=len(lengths))
    if settings.get("pool") or kind == "last":
        right = (counts == 1).all() and (kind not in ("all", "last") or (position == lengths - 1).all())
    else:
        right = kind != "all" or (counts == lengths).all()
    return None if right else f"the rows are not those of positions={kind!r}, pool={settings.get('pool')!r}"


@requirement("S7")
def columns_are_typed(directory: Path) -> None:
    """/sequences holds each label column of the manifest and no other, one entry per sequence, of its type."""
    columns = _manifest(directory)["data"]["columns"]
    taken = RESERVED & set(columns)
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
    sites = {f"sites/{site['name']}": site["dtype"] for site in _manifest(directory)["sites"]}
    with _shards(directory) as shards:
        for entry, file in shards:
            names = sites | {f"rows/{name}": None for name in file["rows"]}
            size = int(file.attrs["crc_rows"])
            _require(size > 0, f"{entry['file']}: crc_rows is {size}")
            for name, dtype in names.items():
                found = file["crc"][name]
                crcs = [crc for _, values in _blocks(file[name], dtype, size) for crc in _block_crcs(values, size)]
                right = found.dtype == np.dtype("<u4") and found[()].tolist() == crcs
                _require(right, f"{entry['file']}: CRCs of {name}")
            for name, dataset in file["sequences"].items():
                right = dataset.attrs["crc32"] == _running_crc(dataset)
                _require(right, f"{entry['file']}: CRC of sequences/{name}")


def _block_crcs(values: npt.NDArray[Any], size: int) -> Iterator[int]:
    for start in range(0, len(values), size):
        yield zlib.crc32(values[start : start + size].tobytes())


def _running_crc(dataset: h5py.Dataset) -> int:
    crc, text = 0, h5py.check_string_dtype(dataset.dtype) is not None
    for _, values in _blocks(dataset):
        crc = zlib.crc32(b"".join(value + b"\0" for value in values) if text else values.tobytes(), crc)
    return crc


@requirement("S9")
def row_fields_are_typed(directory: Path) -> None:
    """/rows holds each token column and, if captured, logprob: of their types, categories in range, no log above 0."""
    manifest = _manifest(directory)
    columns, pooled = manifest["data"].get("token_columns") or {}, manifest["settings"].get("pool")
    with _shards(directory) as shards:
        for entry, file in shards:
            for name, kind in _row_fields(manifest).items():
                _require(name in file["rows"], f"{entry['file']} lacks rows/{name}")
                dataset, where = file["rows"][name], f"{entry['file']}, rows/{name}"
                _require(dataset.dtype == np.dtype(kind), f"{where} is {dataset.dtype}, not {kind}")
                _require(dataset.shape == (entry["rows"],), f"{where}: shape {dataset.shape}")
                if columns.get(name, {}).get("kind") == "string":
                    codes, last = dataset[()], len(columns[name]["categories"])
                    _require(((codes >= 0) & (codes < last)).all(), f"{where}: a number of no category")
            if "logprob" in _row_fields(manifest):
                values, first = file["rows/logprob"][()], file["rows/position"][()] == 0
                missing = np.isnan(values)
                _require(pooled or (missing == first).all(), f"{entry['file']}: logprob is NaN elsewhere than first")
                _require((values[~missing] <= 0).all(), f"{entry['file']}: a log-probability above 0")


@requirement("S10")
def files_are_of_the_earliest_format(directory: Path) -> None:
    """A shard is a file of HDF5's earliest format (superblock 0), which opens after its writer was killed."""
    for entry in _manifest(directory)["shards"]:
        _require((directory / entry["file"]).is_file(), f"{entry['file']} is missing or no file")
        with (directory / entry["file"]).open("rb") as raw:
            start = raw.read(9)
        _require(start == b"\x89HDF\r\n\x1a\n\0", f"{entry['file']} is no HDF5 file of superblock version 0")


# --- statistics and index -------------------------------------------------------------------------------------------


class _Sums:
    """Count, mean, squared deviations and norms of rows that come block by block, in float64."""

    def __init__(self) -> None:
        self.count, self.norm, self.largest = 0, 0.0, 0.0
        self.mean: Any = 0.0
        self.m2: Any = 0.0

    def add(self, values: npt.NDArray[np.float64]) -> None:
        with np.errstate(invalid="ignore"):  # a value that is not finite is S4's, and fails here in the comparison
            self._add(values)

    def _add(self, values: npt.NDArray[np.float64]) -> None:
        count, mean = len(values), values.mean(0)
        total, delta = self.count + count, mean - self.mean
        self.m2 = self.m2 + ((values - mean) ** 2).sum(0) + delta**2 * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.norm += float(np.linalg.norm(values.reshape(count, -1), axis=1).sum())
        self.count, self.largest = total, max(self.largest, float(np.nanmax(np.abs(values))))


@requirement("T1")
def statistics_are_of_the_stored_rows(directory: Path) -> None:
    """/statistics of a shard and, once finished, the manifest's are those of the stored values."""
    manifest = _manifest(directory)
    for site in (site for site in manifest["sites"] if site["dtype"] in FLOATS):
        whole = _Sums()
        with _shards(directory) as shards:
            for entry, file in shards:
                part = _Sums()
                for _, values in _blocks(file["sites"][site["name"]]):
                    part.add(values.astype(np.float64))
                    whole.add(values.astype(np.float64))
                if entry["rows"]:
                    _check_group(file["statistics"][site["name"]], part, f"{entry['file']}, {site['name']}")
        if manifest["finished"] and whole.count:
            found = manifest["statistics"][site["name"]]
            _require(found["count"] == whole.count, f"{site['name']}: count")
            _close(np.array(found["mean"]), whole.mean, whole, f"{site['name']}: mean")
            _close(np.array(found["var"]), whole.m2 / whole.count, whole, f"{site['name']}: var")
            _close(np.array(found["mean_norm"]), whole.norm / whole.count, whole, f"{site['name']}: mean_norm")


def _check_group(group: h5py.Group, sums: _Sums, where: str) -> None:
    _require(group.attrs["count"] == sums.count, f"{where}: count")
    _close(group["mean"][()], sums.mean, sums, f"{where}: mean")
    _close(group["m2"][()] / sums.count, sums.m2 / sums.count, sums, f"{where}: m2")
    _close(np.array(group.attrs["norm_sum"]) / sums.count, sums.norm / sums.count, sums, f"{where}: norm_sum")


def _close(found: Any, wanted: Any, sums: _Sums, what: str) -> None:
    scale = sums.largest + 1e-30
    _require(np.shape(found) == np.shape(wanted), f"{what} has shape {np.shape(found)}")
    near = math.isfinite(scale) and np.allclose(found, wanted, rtol=1e-5, atol=1e-5 * max(scale, scale**2))
    _require(near, f"{what} is not the stored rows'")


@requirement("I1")
def index_shows_the_shards(directory: Path) -> None:
    """index.h5 shows every dataset of the shards end to end, by relative names, filled with NaN or -1."""
    manifest = _manifest(directory)
    with h5py.File(directory / "index.h5", "r") as index:
        _require(index.attrs["identity"] == manifest["identity"], "the index is of another cache")
        _require(index.attrs["finished"] == manifest["finished"], "the index says another thing about being finished")
        _require(index.attrs["rows"] == manifest["rows"], "the index has another number of rows")
        names = [f"sites/{site['name']}" for site in manifest["sites"]]
        names += [f"rows/{name}" for name in _row_fields(manifest)]
        names += [f"sequences/{name}" for name in ("input_ids", *manifest["data"]["columns"])]
        for name in names:
            _check_virtual(index[name], name, [entry["file"] for entry in manifest["shards"]])
            _check_shown(index[name], name, directory)


def _check_virtual(dataset: h5py.Dataset, name: str, files: list[str]) -> None:
    if files:
        _require(dataset.is_virtual, f"{name} is not virtual")
        sources = [source.file_name for source in dataset.virtual_sources()]
        _require(sources == files, f"{name} is made of {sources}")
    if h5py.check_string_dtype(dataset.dtype) is None:
        fill = dataset.fillvalue
        _require(np.isnan(fill) if dataset.dtype.kind == "f" else fill == -1, f"{name} is filled with {fill}")


def _check_shown(dataset: h5py.Dataset, name: str, directory: Path) -> None:
    row = 0
    with _shards(directory) as shards:
        for entry, file in shards:
            _require(dataset.id.get_type() == file[name].id.get_type(), f"{name} has another type than {entry['file']}")
            for start, values in _blocks(file[name]):
                shown = dataset[row + start : row + start + len(values)]
                same = np.array_equal(shown, values, equal_nan=values.dtype.kind == "f")
                _require(same, f"{name} differs from {entry['file']}")
            row += len(file[name])
    _require(len(dataset) == row, f"{name} has {len(dataset)} entries, the shards {row}")


@requirement("I2")
def index_offsets_are_global(directory: Path) -> None:
    """/sequences/offsets of the index are positions in the index's own input_ids."""
    lengths = []
    with _shards(directory) as shards:
        lengths = [np.diff(file["sequences/offsets"][()]) for _, file in shards]
    wanted = np.cumsum(np.concatenate([[0], *lengths]))
    with h5py.File(directory / "index.h5", "r") as index:
        _require(np.array_equal(index["sequences/offsets"][()], wanted), "the offsets do not add up")


def main(arguments: list[str]) -> int:
    """Print a line per requirement for the directory in `arguments`; 1 if one is broken, 2 if none was given."""
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print("usage: python -m activations_cache.conformance DIRECTORY", file=sys.stderr)
        return 2
    broken = dict(line.split(": ", 1) for line in failures(arguments[0]))
    for name, check in REQUIREMENTS.items():
        what = (check.__doc__ or "").strip()
        print(f"{name:<4}FAILED  {broken[name]}" if name in broken else f"{name:<4}ok      {what}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
