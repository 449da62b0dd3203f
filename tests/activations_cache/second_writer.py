"""A second writer and reader of the format, made from docs/cache-format.md alone: json, hashlib, zlib, h5py, numpy.

It knows nothing of the package, and the package's reader and conformance suite are held against what it writes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np

CRC_ROWS = 100  # a writer may choose


def write_cache(out: Path, sequences: list[list[int]], values: dict[str, list[np.ndarray]], authors: list[str]) -> None:
    """Write a finished cache of float32 sites, one shard per two sequences. values[site][i] is [len(sequence i), d]."""
    out.mkdir()
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shards: list[dict[str, Any]] = []
        row = 0
        for number, first in enumerate(range(0, len(sequences), 2)):
            entry = {"file": f"shard-{number:05d}.h5", "first_sequence": first, "first_row": row}
            entry |= {
                "sequences": len(sequences[first : first + 2]),
                "rows": sum(map(len, sequences[first : first + 2])),
            }
            part = {site: np.concatenate(rows[first : first + 2]) for site, rows in values.items()}
            partial = out / f".{entry['file']}.partial"
            write_shard(partial, entry, sequences[first : first + 2], part, authors[first : first + 2])
            sync(partial)
            partial.replace(out / entry["file"])
            sync(out)
            content = (out / entry["file"]).read_bytes()
            shards.append({**entry, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
            row += entry["rows"]
        manifest = make_manifest(sequences, values, shards)
        write_index(out, manifest, sequences)
        text = json.dumps({"digest": "0" * 64, **manifest}).encode()
        text = text.replace(b"0" * 64, hashlib.sha256(text).hexdigest().encode(), 1)
        (out / ".manifest.json.partial").write_bytes(text)
        sync(out / ".manifest.json.partial")
        (out / ".manifest.json.partial").replace(out / "manifest.json")
        sync(out)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_shard(
    path: Path, entry: dict[str, Any], sequences: list[list[int]], sites: dict[str, np.ndarray], authors: list[str]
) -> None:
    with h5py.File(path, "w") as file:
        file.attrs.update({"format": "activations-cache", "version": 1, "identity": IDENTITY, "crc_rows": CRC_ROWS})
        file.attrs.update({name: entry[name] for name in ("first_sequence", "sequences", "first_row", "rows")})
        numbers = [entry["first_sequence"] + i for i, ids in enumerate(sequences) for _ in ids]
        fields = {f"sites/{name}": rows.astype("<f4") for name, rows in sites.items()}
        fields["rows/sequence"] = np.array(numbers, "<i8")
        fields["rows/position"] = np.concatenate([np.arange(len(ids)) for ids in sequences]).astype("<i4")
        for name, rows in fields.items():
            file.create_dataset(name, data=rows)
            blocks = range(0, len(rows), CRC_ROWS)
            file[f"crc/{name}"] = np.array([zlib.crc32(rows[i : i + CRC_ROWS].tobytes()) for i in blocks], "<u4")
        ids = np.concatenate(sequences).astype("<i4")
        offsets = np.cumsum([0, *map(len, sequences)]).astype("<i8")
        for name, data in {"input_ids": ids, "offsets": offsets}.items():
            file[f"sequences/{name}"] = data
            file[f"sequences/{name}"].attrs["crc32"] = np.uint32(zlib.crc32(data.tobytes()))
        file.create_dataset("sequences/author", data=authors, dtype=h5py.string_dtype("utf-8"))
        text = b"".join(author.encode() + b"\0" for author in authors)
        file["sequences/author"].attrs["crc32"] = np.uint32(zlib.crc32(text))
        for name, rows in sites.items():
            wide, group = rows.astype("<f8"), file.create_group(f"statistics/{name}")
            group["mean"], group["m2"] = wide.mean(0), ((wide - wide.mean(0)) ** 2).sum(0)
            group.attrs.update({"count": len(wide), "norm_sum": float(np.linalg.norm(wide, axis=1).sum())})


IDENTITY = hashlib.sha256(b"another writer").hexdigest()


def make_manifest(
    sequences: list[list[int]], values: dict[str, list[np.ndarray]], shards: list[dict[str, Any]]
) -> dict[str, Any]:
    rows = sum(map(len, sequences))
    whole = {name: np.concatenate(parts).astype("<f8") for name, parts in values.items()}
    statistics = {
        name: {
            "count": rows,
            "mean_norm": float(np.linalg.norm(all_rows, axis=1).mean()),
            "total_variance": float(all_rows.var(0).sum()),
            "mean": all_rows.mean(0).tolist(),
            "var": all_rows.var(0).tolist(),
        }
        for name, all_rows in whole.items()
    }
    sites = [
        {"name": name, "dtype": "float32", "shape": list(part.shape[1:]), "aliases": [], "kind": "", "layer": None}
        for name, part in whole.items()
    ]
    model = {"name": "none", "class": "None", "config_hash": "0", "weights_hash": "0", "dtype": "float32"}
    data = {"fingerprint": "0", "columns_fingerprint": "0", "sequences": len(sequences), "tokens": rows}
    data |= {"truncated": 0, "bos": False, "columns": {"author": "string"}, "columns_left_out": []}
    settings = {"positions": "all", "dtype": "float32", "batch_tokens": 1, "shard_rows": 1, "max_length": 99}
    settings |= {"bos": None, "chat": False, "overflow": "error"}
    plan = {"fingerprint": "0", "rows": rows, "sequences": len(sequences), "tokens": rows, "batches": len(sequences)}
    return {
        "format": "activations-cache",
        "version": 1,
        "finished": True,
        "identity": IDENTITY,
        "model": {**model, "attention": None},
        "tokenizer": None,
        "data": data,
        "sites": sites,
        "settings": settings,
        "plan": {**plan, "shards": len(shards)},
        "rows": rows,
        "statistics": statistics,
        "libraries": {},
        "machine": {},
        "created": "2026-01-01T00:00:00+00:00",
        "shards": shards,
    }


def write_index(out: Path, manifest: dict[str, Any], sequences: list[list[int]]) -> None:
    """Virtual datasets over the shards; the strings' type is h5py's for UTF-8 of any length."""
    parts = [manifest["identity"], manifest["sites"], manifest["data"]["columns"], manifest["shards"]]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    with h5py.File(out / ".index.h5.partial", "w") as file:
        file.attrs.update({"format": "activations-cache", "version": 1, "identity": IDENTITY, "finished": True})
        file.attrs.update({"rows": manifest["rows"], "sequences": len(sequences), "writer": "another"})
        file.attrs["manifest"] = digest
        with h5py.File(out / manifest["shards"][0]["file"]) as first:
            names = [f"{group}/{name}" for group in ("sites", "rows", "sequences") for name in first[group]]
            kinds = {name: (first[name].dtype, first[name].shape[1:]) for name in names if "offsets" not in name}
        for name, (kind, shape) in kinds.items():
            lengths = [len(h5py.File(out / entry["file"])[name]) for entry in manifest["shards"]]
            layout, start = h5py.VirtualLayout((sum(lengths), *shape), kind), 0
            for entry, length in zip(manifest["shards"], lengths, strict=True):
                layout[start : start + length] = h5py.VirtualSource(entry["file"], name, (length, *shape), kind)
                start += length
            fill = None if kind.kind == "O" else np.nan if kind.kind == "f" else -1
            file.create_virtual_dataset(name, layout, fillvalue=fill)
        file["sequences/offsets"] = np.cumsum([0, *map(len, sequences)]).astype("<i8")
    sync(out / ".index.h5.partial")
    (out / ".index.h5.partial").replace(out / "index.h5")


def read_cache(path: Path, site: str) -> tuple[np.ndarray, list[tuple[int, int]], list[list[int]]]:
    """All rows of a site, (sequence, position) of each, and the token ids of each sequence: json and h5py alone."""
    raw = (path / "manifest.json").read_bytes()
    manifest = json.loads(raw)
    assert hashlib.sha256(raw.replace(manifest["digest"].encode(), b"0" * 64, 1)).hexdigest() == manifest["digest"]
    rows, places, sequences = [], [], []
    for entry in manifest["shards"]:
        assert hashlib.sha256((path / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
        with h5py.File(path / entry["file"]) as file:
            assert file.attrs["identity"] == manifest["identity"]
            assert file.attrs["first_row"] == entry["first_row"]
            rows.append(file["sites"][site][()])
            places += list(zip(file["rows/sequence"][()].tolist(), file["rows/position"][()].tolist(), strict=True))
            ids, offsets = file["sequences/input_ids"][()], file["sequences/offsets"][()]
            sequences += [ids[a:b].tolist() for a, b in pairwise(offsets)]
    return np.concatenate(rows), places, sequences
