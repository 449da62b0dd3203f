"""What a damaged shard has lost: the blocks of rows whose CRC fails, and the sequences they belong to.

HDF5 trusts the structures inside a file: one altered byte there can send the library into an endless loop, or crash it.
So a file whose SHA-256 is wrong is only ever opened in a process of its own, which may be killed:

    python -m activations_cache._examine DIRECTORY FILE

prints what `examine` found as JSON. It needs json, zlib and h5py alone, no torch, so that it starts quickly.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from activations_cache.conformance import COLUMN_TYPES, RAW_TYPES, REQUIREMENTS, ROW_TYPES, SITE_TYPES
from activations_cache.errors import ConformanceError

PATIENCE = 30.0  # seconds that opening a damaged file may take; reading it has BYTES_PER_SECOND on top
BYTES_PER_SECOND = 20e6
BLOCKS_PER_READ = 64
IntArray = npt.NDArray[np.int64]
# what h5py makes of structures that contradict themselves is not limited to OSError
_UNREADABLE = (OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError, OverflowError, MemoryError)


def examine_apart(directory: Path, file: str, size: int, manifest: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`examine` in a process of its own.

    Args:
        directory: The cache directory.
        file: Name of the shard.
        size: Its bytes, which bound the time it may take.
        manifest: Examine it against this manifest; by default the directory's.

    Returns:
        What `examine` returns; {"unreadable": why} if HDF5 crashed or did not come back.
    """
    return _apart([str(directory.absolute()), file], size, manifest)


def index_apart(directory: Path, size: int) -> dict[str, Any]:
    """`examine_index` in a process of its own."""
    return _apart([str(directory.absolute())], size, None)


def _apart(arguments: list[str], size: int, manifest: Mapping[str, Any] | None) -> dict[str, Any]:
    command = [sys.executable, "-m", "activations_cache._examine", *arguments]
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        done = subprocess.run(
            [*command, "-"] if manifest is not None else command,
            input=b"" if manifest is None else json.dumps(manifest).encode(),
            capture_output=True,
            timeout=PATIENCE + size / BYTES_PER_SECOND,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
    except subprocess.TimeoutExpired:
        return {"unreadable": "HDF5 does not come back from it"}
    if done.returncode != 0:
        return {"unreadable": f"HDF5 ends with status {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def examine(directory: Path, name: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Hold a shard against its manifest entry, dataset by dataset and block by block. It may be altered anywhere.

    Returns:
        {"unreadable": why}, {"foreign": why}, or {"damage": {dataset: [[first row, last row + 1], ...]}, "sequences":
        [...], "wrong": [...]}: rows counted in the shard ([] where a dataset has no rows or cannot be read at all),
        numbers of the affected sequences in the data, and what else is not as the manifest says.
    """
    entry = next(entry for entry in manifest["shards"] if entry["file"] == name)
    try:
        with h5py.File(directory / name, "r") as file:
            place = ("first_sequence", "sequences", "first_row", "rows")
            wrong = [key for key in place if file.attrs.get(key) != entry[key]]
            if file.attrs.get("identity") != manifest["identity"] or len(wrong) > 1:
                return {"foreign": "is another cache's or another shard"}
            return {**_damage(file, entry, manifest), "wrong": wrong}
    except _UNREADABLE as error:
        return {"unreadable": f"{type(error).__name__}: {error}"}


def _damage(file: h5py.File, entry: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    rows, block = entry["rows"], int(file.attrs["crc_rows"])
    if block < 1:
        raise ValueError(f"crc_rows is {block}")
    first, count = entry["first_sequence"], entry["sequences"]
    damage = {name: _bad_rows(file, name, kind, (rows, *shape), block) for name, kind, shape in covered(manifest, file)}
    bounds = _sequence_bounds(file, damage["rows/sequence"], rows, first, first + count)
    hit: set[int] = set()
    for ranges in damage.values():
        for start, stop in ranges or ():
            hit |= _sequences_of(bounds, start, stop)
        if ranges is None:
            hit |= set(range(first, first + count))
    for name, kind in (("input_ids", "<i4"), ("offsets", "<i8"), *manifest["data"]["columns"].items()):
        if not _sequence_dataset_is_right(file, name, COLUMN_TYPES.get(kind, kind), count):
            damage[f"sequences/{name}"] = []
            hit |= set(range(first, first + count))
    found = {name: ranges or [] for name, ranges in damage.items() if ranges is None or ranges or "sequences/" in name}
    return {"damage": found, "sequences": sorted(hit)}


def covered(manifest: Mapping[str, Any], file: h5py.File) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
    """(name, HDF5 type or None for any, shape of a row) of the datasets with block CRCs: what must be, what else is."""
    for site in manifest["sites"]:
        yield f"sites/{site['name']}", SITE_TYPES[site["dtype"]], tuple(site["shape"])
    names = {"sequence": "<i8", "position": "<i4"}
    for name, entry in manifest["data"].get("token_columns", {}).items():
        names[name] = ROW_TYPES[entry["kind"]]
    if manifest["settings"].get("logprobs"):
        names["logprob"] = "<f4"
    for name, kind in names.items():
        yield f"rows/{name}", h5py.h5t.py_create(np.dtype(kind)), ()
    for name in set(file["rows"]) - set(names):
        yield f"rows/{name}", None, file["rows"][name].shape[1:]


def _bad_rows(file: h5py.File, name: str, kind: Any, shape: tuple[int, ...], block: int) -> list[list[int]] | None:
    """Ranges of rows whose CRC fails; None if the dataset is not there as it must be."""
    try:
        dataset, crcs = file[name], file[f"crc/{name}"][()]
        blocks = -(-shape[0] // block)
        if dataset.shape != shape or crcs.shape != (blocks,) or (kind and dataset.id.get_type() != kind):
            return None
        bad: list[int] = []
        for start in range(0, blocks, BLOCKS_PER_READ):
            bad += _bad_blocks(dataset, crcs, block, range(start, min(start + BLOCKS_PER_READ, blocks)))
    except _UNREADABLE:
        return None
    ranges: list[list[int]] = []
    for number in bad:
        if ranges and ranges[-1][1] == number * block:
            ranges[-1][1] = min((number + 1) * block, shape[0])
        else:
            ranges.append([number * block, min((number + 1) * block, shape[0])])
    return ranges


def _bad_blocks(dataset: h5py.Dataset, crcs: Any, block: int, numbers: range) -> list[int]:
    """Those of the blocks that cannot be read or whose CRC fails."""
    first = numbers[0] * block
    try:
        values = read_raw(dataset, first, min(numbers[-1] * block + block, dataset.shape[0]))
    except _UNREADABLE:  # a chunk that does not decompress hides the others: one by one
        if len(numbers) == 1:
            return list(numbers)
        return [n for single in numbers for n in _bad_blocks(dataset, crcs, block, range(single, single + 1))]
    found = []
    for number in numbers:
        part = values[number * block - first : (number + 1) * block - first]
        if zlib.crc32(np.ascontiguousarray(part).tobytes()) != crcs[number]:
            found.append(number)
    return found


def read_raw(dataset: h5py.Dataset, start: int, stop: int) -> npt.NDArray[Any]:
    """Rows `start` to `stop` of a dataset as they are stored; bfloat16 as uint16."""
    kind = dataset.id.get_type()
    name = next((name for name, known in SITE_TYPES.items() if kind == known), None)
    values = np.empty((stop - start, *dataset.shape[1:]), RAW_TYPES[name] if name else dataset.dtype)
    if len(values):
        target, source = h5py.h5s.create_simple(values.shape), dataset.id.get_space()
        source.select_hyperslab((start, *(0,) * (len(dataset.shape) - 1)), values.shape)
        dataset.id.read(target, source, values, mtype=kind)
    return values


def _sequence_bounds(
    file: h5py.File, bad: list[list[int]] | None, rows: int, first: int, stop: int
) -> tuple[IntArray, IntArray]:
    """Lowest and highest sequence that each row can belong to: known where /rows/sequence is intact, else bracketed."""
    if bad is None:
        return np.full(rows, first), np.full(rows, stop - 1)
    low = np.asarray(read_raw(file["rows/sequence"], 0, rows), dtype=np.int64)
    high = low.copy()
    for start, end in bad:
        low[start:end] = low[start - 1] if start else first
    for start, end in reversed(bad):
        high[start:end] = high[end] if end < rows else stop - 1
    return low, high


def _sequences_of(bounds: tuple[IntArray, IntArray], start: int, stop: int) -> set[int]:
    low, high = bounds[0][start:stop], bounds[1][start:stop]
    if np.array_equal(low, high):
        return {int(number) for number in np.unique(low)}
    return set(range(int(low.min()), int(high.max()) + 1))


def _sequence_dataset_is_right(file: h5py.File, name: str, kind: str, count: int) -> bool:
    """Whether a dataset of /sequences is there, of its type and length, with the CRC that it carries."""
    try:
        dataset = file[f"sequences/{name}"]
        text = h5py.check_string_dtype(dataset.dtype)
        if (text is None or text.encoding != "utf-8") if kind == "string" else dataset.dtype != np.dtype(kind):
            return False
        if name != "input_ids" and dataset.shape != (count + (name == "offsets"),):
            return False
        values = dataset[()]
        raw = values.tobytes() if text is None else b"".join(bytes(value) + b"\0" for value in values)
        return bool(dataset.attrs["crc32"] == zlib.crc32(raw))
    except _UNREADABLE:
        return False


def examine_index(directory: Path) -> dict[str, Any]:
    """What index.h5 says of itself, and whether it shows the shards as they are."""
    try:
        with h5py.File(directory / "index.h5", "r") as file:
            said = {name: file.attrs.get(name) for name in ("manifest", "writer", "finished")}
    except _UNREADABLE as error:
        return {"unreadable": f"{type(error).__name__}: {error}"}
    broken = [name for name in ("I1", "I2") if not _holds(name, directory)]
    return {"manifest": str(said["manifest"]), "writer": str(said["writer"]), "finished": bool(said["finished"])} | {
        "broken": broken
    }


def _holds(requirement: str, directory: Path) -> bool:
    try:
        REQUIREMENTS[requirement](directory)
    except (ConformanceError, *_UNREADABLE):
        return False
    return True


def main(arguments: list[str]) -> None:
    """Entry point of the process: print what was found as JSON."""
    directory = Path(arguments[0])
    if len(arguments) == 1:
        print(json.dumps(examine_index(directory)))
        return
    text = sys.stdin.read() if len(arguments) > 2 else (directory / "manifest.json").read_text(encoding="utf-8")
    print(json.dumps(examine(directory, arguments[1], json.loads(text))))


if __name__ == "__main__":
    main(sys.argv[1:])
