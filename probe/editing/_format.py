"""Read and write an edit: `edit.safetensors` and `edit.json`. The format is specified in docs/edit-format.md.

Nothing that is read is executed, and whatever is wrong with the files ends in one `EditError` that says what and where.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from probe.editing.entries import KINDS
from probe.editing.steps import Change, Step, finite
from probe.errors import EditError

FORMAT = "probe.edit"
VERSION = 1
TENSORS = "edit.safetensors"
RECORD = "edit.json"


def write(directory: Path, steps: tuple[Step, ...], header: Mapping[str, Any]) -> None:
    """Write both files, each beside its final name and then renamed, the record last."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    records = [_step_record(step, number, tensors) for number, step in enumerate(steps)]
    # cloned, since safetensors refuses tensors that share memory (one index that several entries take by)
    body = save({key: value.contiguous().clone() for key, value in tensors.items()}, metadata={"format": "pt"})
    record = {
        "format": FORMAT,
        "format_version": VERSION,
        **header,
        "tensors_sha256": hashlib.sha256(body).hexdigest(),
        "steps": records,
    }
    try:
        text = json.dumps(record, indent=1, allow_nan=False)
        directory.mkdir(parents=True, exist_ok=True)
        _replace(directory / TENSORS, body)
        _replace(directory / RECORD, text.encode())
    except (TypeError, ValueError) as error:
        raise EditError(
            f"The record cannot be written as JSON ({error}); settings and evidence must be plain."
        ) from error
    except OSError as error:
        raise EditError(f"The edit cannot be written to {directory}: {error}.") from error


def read(directory: Path) -> tuple[tuple[Step, ...], dict[str, Any]]:
    """The steps and the header of a saved edit.

    Raises:
        EditError: a file is missing, malformed, of another version, or the two do not belong together.
    """
    record = _read_record(directory / RECORD)
    tensors = _read_tensors(directory / TENSORS, _get(record, "tensors_sha256", str, RECORD))
    used: set[str] = set()
    try:
        steps = tuple(
            _read_step(entry, f"step {number}", tensors, used)
            for number, entry in enumerate(_get(record, "steps", list, RECORD))
        )
    except (TypeError, AttributeError) as error:
        raise EditError(f"{directory / RECORD} is malformed: {error}.") from error
    if not steps:
        raise EditError(f"{directory / RECORD} has no steps; an edit needs at least one.")
    unused = sorted(set(tensors) - used)
    if unused:
        raise EditError(f"{directory / TENSORS} holds {unused[0]}, which {RECORD} does not name.")
    header = {key: value for key, value in record.items() if key not in _OWN}
    _get(header, "base", dict, RECORD)
    return steps, header


_OWN = ("format", "format_version", "tensors_sha256", "steps")


def _step_record(step: Step, number: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    parameters = {}
    for name, change in step.changes.items():
        keys = {}
        for role, value in change.entry.tensors().items():
            keys[role] = f"{number}/{name}/{role}"
            tensors[keys[role]] = finite(value, f"The entry of {name}")
        parameters[name] = {
            "kind": change.entry.kind,
            "tensors": keys,
            "shape": list(change.shape),
            "dtype": change.dtype,
            "norm": change.norm,
            "change": change.change,
        }
    added = {}
    for name, source in step.added.items():
        if isinstance(source, str):
            added[name] = {"copy_of": source}
        else:
            tensors[f"{number}/{name}/added"] = source
            added[name] = {"tensor": f"{number}/{name}/added"}
    return {
        "method": step.method,
        "base_hash": step.base_hash,
        "settings": dict(step.settings),
        "seed": step.seed,
        "target": step.target,
        "evidence": dict(step.evidence),
        "notes": list(step.notes),
        "parameters": parameters,
        "added": added,
        "renamed": dict(step.renamed),
        "removed": list(step.removed),
        "config_patch": dict(step.config_patch),
    }


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise EditError(f"{path} does not exist: a saved edit has {RECORD} and {TENSORS}.") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise EditError(f"{path} is no readable JSON: {error}.") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise EditError(f'{path} is not the record of an edit: "format" must be "{FORMAT}".')
    if record.get("format_version") != VERSION:
        raise EditError(
            f"{path} has format version {record.get('format_version')!r}; this library reads {VERSION}. "
            "Use the version of probe-workbench that wrote it."
        )
    return record


def _read_tensors(path: Path, expected: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        body = path.read_bytes()
    except OSError as error:
        raise EditError(f"{path} cannot be read: {error}.") from error
    if hashlib.sha256(body).hexdigest() != expected:
        raise EditError(f"{path} is not the file that {RECORD} describes (its SHA-256 differs): copy both again.")
    try:
        return load(body)
    except (SafetensorError, ValueError, KeyError) as error:
        raise EditError(f"{path} is no readable safetensors file: {error}.") from error


def _read_step(record: Any, where: str, tensors: Mapping[str, Tensor], used: set[str]) -> Step:
    if not isinstance(record, dict):
        raise EditError(f"{where} must be an object.")
    changes = {
        name: _read_change(entry, f"{where}, {name}", tensors, used)
        for name, entry in _get(record, "parameters", dict, where).items()
    }
    added = {
        name: _read_added(entry, f"{where}, {name}", tensors, used)
        for name, entry in _get(record, "added", dict, where).items()
    }
    return Step(
        method=_get(record, "method", str, where),
        base_hash=_get(record, "base_hash", str, where),
        changes=changes,
        added=added,
        renamed=_names(_get(record, "renamed", dict, where), where),
        removed=tuple(_names(dict.fromkeys(_get(record, "removed", list, where), ""), where)),
        config_patch=_get(record, "config_patch", dict, where),
        settings=_get(record, "settings", dict, where),
        seed=_get(record, "seed", int | None, where),
        target=_get(record, "target", dict | None, where),
        evidence=_get(record, "evidence", dict, where),
        notes=tuple(_get(record, "notes", list, where)),
    )


def _read_change(record: Any, where: str, tensors: Mapping[str, Tensor], used: set[str]) -> Change:
    kind = KINDS.get(_get(record, "kind", str, where))
    if kind is None:
        raise EditError(f"{where}: unknown kind {record['kind']!r}; known are {', '.join(KINDS)}.")
    named = _get(record, "tensors", dict, where)
    roles = {role.name for role in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if set(named) != roles:
        raise EditError(f"{where}: {kind.kind} needs the tensors {sorted(roles)}; got {sorted(named)}.")
    shape = tuple(_get(record, "shape", list, where))
    if not all(isinstance(n, int) and n >= 0 for n in shape):
        raise EditError(f"{where}: shape must be a list of sizes.")
    entry = kind(**{role: finite(_tensor(key, tensors, used, where), where) for role, key in named.items()})
    try:
        entry.check(shape)
    except (EditError, RuntimeError, IndexError) as error:
        raise EditError(f"{where}: {error}.") from error
    norm, change = _get(record, "norm", float | int, where), _get(record, "change", float | int | None, where)
    return Change(entry, shape, _get(record, "dtype", str, where), norm, change)


def _read_added(record: Any, where: str, tensors: Mapping[str, Tensor], used: set[str]) -> Tensor | str:
    if isinstance(record, dict) and isinstance(record.get("copy_of"), str):
        return str(record["copy_of"])
    return _tensor(_get(record, "tensor", str, where), tensors, used, where)


def _tensor(key: Any, tensors: Mapping[str, Tensor], used: set[str], where: str) -> Tensor:
    if not isinstance(key, str) or key not in tensors:
        raise EditError(f"{where}: {TENSORS} has no tensor {key!r}.")
    used.add(key)
    return tensors[key]


def _names(value: dict[Any, Any], where: str) -> dict[str, str]:
    if not all(isinstance(k, str) and isinstance(v, str) for k, v in value.items()):
        raise EditError(f"{where}: tensor names must be strings.")
    return value


def _get(record: Any, key: str, kind: Any, where: str) -> Any:
    if not isinstance(record, dict) or key not in record:
        raise EditError(f"{where}: {key!r} is missing.")
    if not isinstance(record[key], kind):
        raise EditError(
            f"{where}: {key!r} must be {getattr(kind, '__name__', kind)}; got {type(record[key]).__name__}."
        )
    return record[key]


def _replace(path: Path, body: bytes) -> None:
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.write_bytes(body)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
