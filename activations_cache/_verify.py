"""Verification: SHA-256 of every shard; of a shard that fails, the blocks of rows and the sequences that are hit."""

from __future__ import annotations

import filecmp
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from activations_cache import _index
from activations_cache._examine import examine_apart, index_apart
from activations_cache._generations import FOLDER, batch_file
from activations_cache._shards import check_size
from activations_cache.store import INDEX, MANIFEST, ShardEntry, SiteSpec, file_sha256, read_manifest
from activations_cache.store import _digest_is_right as digest_is_right

Kind = Literal["missing", "size", "altered", "foreign", "index"]
SHOWN_RANGES = 6
NO_INDEX = "is missing; opening the cache writes it again"
OLD_INDEX = "is not the manifest's; opening the cache replaces it"


@dataclass(frozen=True)
class Damage:
    """A dataset of a shard that is not as it was written.

    Attributes:
        dataset: Its name in the file, e.g. "sites/blocks.3.hook_resid_post".
        rows: Ranges (first, last + 1) of the blocks of rows that fail, counted in the whole cache; empty where the
            dataset has no rows, or cannot be told apart.
    """

    dataset: str
    rows: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a cache.

    Attributes:
        file: Name of the file.
        kind: "missing", "size" (truncated, empty or grown), "altered" (bytes differ), "foreign" (a shard of another
            cache or another place) or "index".
        detail: What was found, in words.
        sequences: Numbers of the affected sequences; empty where only derived or descriptive data is hit.
        damage: The datasets that are hit, where they can be told.
    """

    file: str
    kind: Kind
    detail: str
    sequences: tuple[int, ...] = ()
    damage: tuple[Damage, ...] = ()

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

    @property
    def lines(self) -> list[str]:
        """For a terminal: the file and the sequences that are affected, and a line per damaged dataset."""
        sequences = ranges_text(runs(self.sequences)) or "none"
        detail = "has altered bytes" if self.damage else self.detail
        head = f"{self.file}  {detail}; sequences affected: {sequences} ({len(self.sequences)})"
        return [head, *(f"    {part.dataset}  rows {ranges_text(part.rows) or 'unknown'}" for part in self.damage)]

    @property
    def needs(self) -> tuple[str, ...]:
        """What `repair` will ask for: nothing, "model", or "model" and "data"."""
        if self.kind == "index" or not self.sequences:
            return ()
        kept = ("sites/", "rows/sequence", "rows/position", "rows/logprob")
        if self.damage and all(part.dataset.startswith(kept) for part in self.damage):
            return ("model",)
        return ("model", "data")

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON holds them."""
        return asdict(self)


def verify(directory: str | Path, progress: bool = False) -> list[Problem]:
    """Check every file of a cache against its manifest.

    Args:
        directory: The cache directory. It need not open otherwise: a shard may be missing.
        progress: Show a progress bar over the bytes.

    Returns:
        What is wrong; nothing if all is well. Files that the manifest does not name are no part of the cache, and no
        problem; neither is an index.h5 that an unfinished cache does not have yet, or has of an earlier state.

    Raises:
        CorruptCacheError: The manifest itself cannot be read, or a byte of it is not as it was written.

    Cost: one read of the cache; about 1 s more per damaged shard, which is opened in a process of its own.
    """
    from tqdm.auto import tqdm

    directory = Path(directory)
    manifest = read_manifest(directory)
    specs = [SiteSpec.from_json(entry) for entry in manifest["sites"]]
    problems: list[Problem] = []
    total = sum(entry["bytes"] for entry in manifest["shards"])
    with tqdm(total=total, desc="verify", unit="B", unit_scale=True, disable=not progress) as bar:
        for raw in manifest["shards"]:
            problem = verify_shard(directory, ShardEntry(**raw), specs, manifest["identity"])
            if problem is not None:
                problems.append(problem)
            bar.update(raw["bytes"])
    # An index is compared with one made afresh, which takes the lengths of the sequences from the shards.
    if not problems or not (directory / INDEX).is_file():
        wrong = index_damage(directory, manifest)
        if wrong is not None and (manifest["finished"] or wrong not in (NO_INDEX, OLD_INDEX)):
            problems.append(Problem(INDEX, "index", wrong))
    if (directory / FOLDER / MANIFEST).exists():
        problems += _generation_problems(directory / FOLDER)
    return problems


def _generation_problems(folder: Path) -> Iterator[Problem]:
    """What is wrong with the texts that the sequences were generated as: every byte, and every batch is there."""
    again = "delete it and run the same capture_generation again"
    if not digest_is_right((folder / MANIFEST).read_bytes()):
        yield Problem(f"{FOLDER}/{MANIFEST}", "altered", f"has altered bytes; {again}")
        return
    manifest = json.loads((folder / MANIFEST).read_bytes())
    for number in range(int(manifest["plan"]["batches"])):
        path = folder / batch_file(number)
        if not path.is_file():
            yield Problem(f"{FOLDER}/{path.name}", "missing", "is missing; run the same capture_generation again")
            continue
        head, _, body = path.read_bytes().partition(b"\n")
        said = {"batch": number, "identity": manifest["identity"], "rows": body.count(b"\n")}
        if head != json.dumps({**said, "sha256": hashlib.sha256(body).hexdigest()}).encode():
            yield Problem(f"{FOLDER}/{path.name}", "altered", f"has altered bytes; {again}")


def verify_shard(directory: Path, entry: ShardEntry, specs: Sequence[SiteSpec], identity: str) -> Problem | None:
    """Hash one shard (about 1 GB/s); what is wrong with it, down to its datasets and sequences, or None."""
    path = directory / entry.file
    everything = tuple(range(entry.first_sequence, entry.first_sequence + entry.sequences))
    wrong = check_size(directory, entry)
    if wrong:
        return Problem(entry.file, "size" if path.is_file() else "missing", wrong, everything)
    if file_sha256(path) == entry.sha256:
        return None
    found = examine_apart(directory, entry.file, entry.bytes)
    if "foreign" in found:
        return Problem(entry.file, "foreign", found["foreign"], everything)
    if "unreadable" in found:
        return Problem(
            entry.file, "altered", f"has altered bytes and cannot be read ({found['unreadable']})", everything
        )
    if not found["damage"]:
        where = "has altered bytes outside the data of its sequences (in headers, checksums' padding or statistics)"
        return Problem(entry.file, "altered", where)
    damage = tuple(Damage(name, _shifted(ranges, entry.first_row)) for name, ranges in sorted(found["damage"].items()))
    detail = f"has altered bytes in {', '.join(_dataset(part) for part in damage)}"
    return Problem(entry.file, "altered", detail, tuple(found["sequences"]), damage)


def _shifted(ranges: Sequence[Sequence[int]], by: int) -> tuple[tuple[int, int], ...]:
    return tuple((start + by, stop + by) for start, stop in ranges)


def _dataset(damage: Damage) -> str:
    rows = ranges_text(damage.rows)
    return f"{damage.dataset} (rows {rows})" if rows else damage.dataset


def index_damage(directory: Path, manifest: Mapping[str, Any]) -> str | None:
    """Say what is wrong with index.h5, or None. The shards must be sound.

    The index must have the bytes of one made afresh. Another writer or another version of h5py makes other bytes: such
    an index, which shows in its size or in being by the version that the capture ran under, is held against the shards
    dataset by dataset instead.
    """
    path = directory / INDEX
    if not path.is_file():
        return NO_INDEX
    with TemporaryDirectory() as folder:
        fresh = Path(folder) / INDEX
        _index._write(fresh, directory, manifest)
        if filecmp.cmp(fresh, path, shallow=False):
            return None
        same_size = fresh.stat().st_size == path.stat().st_size
    found = index_apart(directory, path.stat().st_size)
    if found.get("manifest") != _index.index_digest(manifest) or found.get("finished") != manifest["finished"]:
        return OLD_INDEX
    captured_by = f"h5py {manifest.get('libraries', {}).get('h5py')}, "
    by_another = not same_size or (found["writer"] != _index.WRITER and found["writer"].startswith(captured_by))
    if by_another and not found["broken"]:
        return None
    return "has altered bytes; delete it, and opening the cache writes it again"


# --- for people -----------------------------------------------------------------------------------------------------


def ranges_text(ranges: Sequence[tuple[int, int]]) -> str:
    """Half-open ranges as people read them: "3-7, 12"."""
    shown = [str(start) if stop - start == 1 else f"{start}-{stop - 1}" for start, stop in ranges[:SHOWN_RANGES]]
    return ", ".join(shown) + (f" and {len(ranges) - SHOWN_RANGES} more ranges" if len(ranges) > SHOWN_RANGES else "")


def runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Sorted numbers as half-open ranges."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found


def table(problems: Sequence[Problem]) -> str:
    """The problems as a table: a line per file, and below it one per damaged dataset."""
    return "\n".join(line for problem in problems for line in problem.lines)
