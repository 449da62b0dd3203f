"""The folder where trained organisms are kept, keyed by their settings.

An organism is trained into a directory beside its final place and renamed when it is whole, so a killed training leaves
nothing that looks finished. A file lock keeps two processes from training the same thing twice. What is read back is
checked against the SHA-256 of each file that was written.

The key is made of the settings and of the version of the language and of the training code. The versions of torch and
transformers are recorded beside the weights and are not part of the key: an upgrade of either should not silently
retrain what an earlier result was measured on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from probe.errors import OrganismError
from probe.organisms._kinds import KINDS

ENV = "PROBE_CACHE_DIR"
RECORD = "organism.json"
STALE_S = 7 * 24 * 3600.0  # a training that has not been touched for so long is not coming back
# What `state_of`, `StateFile.save` and `mkdtemp` call their files; the folder may hold files of others.
_LEFTOVER = re.compile(rf"\.({'|'.join(KINDS)})(-\w+)*-[0-9a-f]{{16}}\.(state(\.new)?|[a-z0-9_]{{8}})")


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """Return the folder for organisms: `cache_dir`, else PROBE_CACHE_DIR, else the user's cache folder."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    if os.environ.get(ENV):
        return Path(os.environ[ENV]).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("probe-workbench")) / "organisms"


def key_of(settings: Mapping[str, Any]) -> str:
    """Return a short hash of settings (canonical JSON)."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fetch(root: Path, name: str, settings: Mapping[str, Any], build: Callable[[Path], Mapping[str, Any]]) -> Path:
    """Return the directory of what `settings` describe, building it first where there is none.

    Args:
        root: The cache folder.
        name: Start of the directory's name.
        settings: What the thing is made from; the key.
        build: Writes the files into the directory that it is given, and returns what else to record.

    Returns:
        A finished directory whose files are those that were written.

    Raises:
        OrganismError: The folder cannot be written to.
    """
    from filelock import FileLock

    path = root / f"{name}-{key_of(settings)}"
    if is_whole(path, settings):
        return path
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(str(path) + ".lock"):
            if not is_whole(path, settings):
                _discard(path)
                _build(path, settings, build)
    except OSError as error:
        raise OrganismError(
            f"Organisms are kept in {root}, which cannot be used: {error}. Give cache_dir=, or set {ENV}."
        ) from error
    return path


def read_record(path: Path) -> dict[str, Any]:
    """Return the record of a finished directory.

    Raises:
        OrganismError: There is none, or it is no JSON.
    """
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OrganismError(
            f"{path} holds no finished organism ({RECORD} is missing or unreadable): {error}"
        ) from error
    if not isinstance(record, dict):
        raise OrganismError(f"{path / RECORD} must hold a JSON object, and holds a {type(record).__name__}.")
    return record


def is_whole(path: Path, settings: Mapping[str, Any]) -> bool:
    """Say whether a directory is finished, made from these settings, and has every file as it was written."""
    try:
        record = read_record(path)
    except OrganismError:
        return False
    if record.get("settings") != json.loads(json.dumps(settings)):
        return False
    files = record.get("files")
    return isinstance(files, dict) and bool(files) and all(_has(path / name, digest) for name, digest in files.items())


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _has(path: Path, digest: str) -> bool:
    return path.is_file() and file_hash(path) == digest


def _discard(path: Path) -> None:
    """Remove a directory that is not whole, saying so."""
    if path.exists():
        warnings.warn(f"The organism in {path} is damaged or unfinished; it is trained again.", stacklevel=4)
        shutil.rmtree(path)


def _build(path: Path, settings: Mapping[str, Any], build: Callable[[Path], Mapping[str, Any]]) -> None:
    """Build beside the final place; rename when the record, which is written last, is on disk."""
    _sweep(path)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        extra = build(work)
        files = {str(p.relative_to(work)): file_hash(p) for p in sorted(work.rglob("*")) if p.is_file()}
        record = {**extra, "settings": dict(settings), "files": files}
        with (work / RECORD).open("w", encoding="utf-8") as handle:
            json.dump(record, handle, indent=1)
            handle.flush()
            os.fsync(handle.fileno())
        work.chmod(0o755)
        work.replace(path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    state_of(path).unlink(missing_ok=True)


def state_of(path: Path) -> Path:
    """Return the file that holds the state of a training while it is under way; see `_state`."""
    return path.with_name(f".{path.name}.state")


def _sweep(path: Path) -> None:
    """Remove what killed trainings left: work directories of this one (its lock is ours), all traces of old ones.

    Only names that this module gives are looked at: the folder may be anything, such as the working directory. The
    state of this training stays: it is where training goes on.
    """
    old = time.time() - STALE_S
    for left in path.parent.glob(".*-*.*"):
        if left == state_of(path) or not _LEFTOVER.fullmatch(left.name):
            continue
        with suppress(FileNotFoundError):  # another process may sweep at the same time
            if left.name.startswith(f".{path.name}.") or left.lstat().st_mtime < old:
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
