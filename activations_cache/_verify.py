"""Verification: SHA-256 of every shard; of a shard that fails, the blocks of rows and the sequences that are hit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from activations_cache import _index
from activations_cache._shards import check_size
from activations_cache.store import (
    HDF5_TYPES,
    INDEX,
    NUMPY_TYPES,
    ShardEntry,
    SiteSpec,
    block_crcs,
    dataset_crc,
    file_sha256,
    read_manifest,
)

Kind = Literal["missing", "size", "altered", "foreign", "index"]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a cache.

    Attributes:
        file: Name of the file.
        kind: "missing", "size" (truncated, empty or grown), "altered" (bytes differ), "foreign" (a shard of another
            cache or another place) or "index".
        detail: What was found, in words.
        sequences: Numbers of the affected sequences; empty where only derived or descriptive data is hit.
    """

    file: str
    kind: Kind
    detail: str
    sequences: tuple[int, ...] = ()

    @property
    def described(self) -> str:
        """What was found and which sequences it hits, without the name of the file."""
        hit = ""
        if self.sequences:
            first, last = self.sequences[0], self.sequences[-1]
            hit = f"; {len(self.sequences)} sequences affected, between {first} and {last}"
        return f"{self.detail}{hit}"

    def __str__(self) -> str:
        return f"{self.file}: {self.described}"


def verify(directory: str | Path, progress: bool = False) -> list[Problem]:
    """Check every file of a cache against its manifest.

    Args:
        directory: The cache directory. It need not open otherwise: a shard may be missing.
        progress: Show a progress bar over the shards.

    Returns:
        What is wrong; nothing if all is well.

    Raises:
        CorruptCacheError: The manifest itself cannot be read.
    """
    from tqdm.auto import tqdm

    directory = Path(directory)
    manifest = read_manifest(directory)
    specs = [SiteSpec.from_json(entry) for entry in manifest["sites"]]
    problems: list[Problem] = []
    for raw in tqdm(manifest["shards"], desc="verify", unit="shard", disable=not progress):
        problem = verify_shard(directory, ShardEntry(**raw), specs, manifest["identity"])
        if problem is not None:
            problems.append(problem)
    wrong = _index.index_damage(directory, manifest)
    # An index is compared with one made afresh, which a missing or cut shard would make different by itself.
    untold = any(problem.kind in ("missing", "size") for problem in problems) and "altered" in (wrong or "")
    if wrong is not None and not untold:
        problems.append(Problem(INDEX, "index", wrong))
    return problems


def verify_shard(directory: Path, entry: ShardEntry, specs: list[SiteSpec], identity: str) -> Problem | None:
    """Hash one shard (about 1 GB/s); what is wrong with it, down to its datasets and sequences, or None."""
    path = directory / entry.file
    everything = tuple(range(entry.first_sequence, entry.first_sequence + entry.sequences))
    wrong = check_size(directory, entry)
    if wrong:
        return Problem(entry.file, "size" if path.is_file() else "missing", wrong, everything)
    if file_sha256(path) == entry.sha256:
        return None
    try:
        with h5py.File(path, "r") as file:
            if file.attrs.get("identity") != identity or file.attrs.get("first_sequence") != entry.first_sequence:
                return Problem(entry.file, "foreign", "is another cache's or another shard", everything)
            names, sequences = _damaged(file, specs)
    except (OSError, KeyError, RuntimeError, ValueError, UnicodeDecodeError) as error:
        return Problem(entry.file, "altered", f"has altered bytes and cannot be read ({error})", everything)
    if names:
        return Problem(entry.file, "altered", f"has altered bytes in {', '.join(names)}", sequences)
    return Problem(entry.file, "altered", "has altered bytes outside the data that the block CRCs cover", everything)


def _damaged(file: h5py.File, specs: list[SiteSpec]) -> tuple[list[str], tuple[int, ...]]:
    """Datasets of a shard whose CRCs fail, and the sequences of the failing blocks."""
    names, hit = [], set[int]()
    per_block = int(file.attrs["crc_rows"])
    starts = np.concatenate([[0], np.cumsum(_stored_rows(file))])  # first row of each sequence, within the shard
    for name, values in _covered(file, specs).items():
        stored = file[f"crc/{name}"][()]
        for block in np.flatnonzero(block_crcs(values, per_block) != stored).tolist():
            names.append(name)
            first = int(np.searchsorted(starts, block * per_block, side="right")) - 1
            last = int(np.searchsorted(starts, (block + 1) * per_block, side="left"))
            hit.update(range(first, min(last, len(starts) - 1)))
    for name, dataset in file["sequences"].items():
        if dataset_crc(dataset) != dataset.attrs["crc32"]:
            names.append(f"sequences/{name}")
            hit.update(range(len(starts) - 1))
    first_sequence = int(file.attrs["first_sequence"])
    return sorted(set(names)), tuple(sorted(first_sequence + number for number in hit))


def _stored_rows(file: h5py.File) -> Any:
    """Rows stored of each sequence: all its positions, or one where only the last was kept."""
    sequences, rows = int(file.attrs["sequences"]), int(file.attrs["rows"])
    return np.ones(sequences, np.int64) if rows == sequences else np.diff(file["sequences/offsets"][()])


def _covered(file: h5py.File, specs: list[SiteSpec]) -> Mapping[str, Any]:
    """Raw values of the datasets that have block CRCs."""
    found: dict[str, Any] = {f"rows/{name}": file[f"rows/{name}"][()] for name in file["rows"]}
    for spec in specs:
        dataset = file[f"sites/{spec.name}"]
        values = np.empty(dataset.shape, NUMPY_TYPES[spec.dtype])
        dataset.id.read(h5py.h5s.ALL, h5py.h5s.ALL, values, mtype=HDF5_TYPES[spec.dtype])
        found[f"sites/{spec.name}"] = values
    return found
