"""Caches written with plain h5py, without the package's writer: any positions, columns and layout, values known."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

import activations_cache as ac
from activations_cache.cache import Cache
from activations_cache.store import HDF5_TYPES, write_manifest

BITS = {"bfloat16": "<u2", "float16": "<f2", "float32": "<f4", "int16": "<i2", "int32": "<i4"}
FILTERS = {"gzip": {"compression": "gzip"}, "lzf": {"compression": "lzf"}}


@dataclass
class Content:
    """What a cache is to hold, as plain arrays.

    Attributes:
        ids: Token ids of each sequence.
        positions: Stored positions of each sequence, rising; may be empty.
        sites: Raw values [rows, *shape] with their storage type.
        columns: One value per sequence.
        token_columns: One value per stored row.
    """

    ids: list[list[int]]
    positions: list[list[int]]
    sites: dict[str, tuple[np.ndarray, str]]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    token_columns: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def sequence(self) -> np.ndarray:
        """Sequence of each row."""
        return np.repeat(np.arange(len(self.ids)), [len(kept) for kept in self.positions])

    @property
    def position(self) -> np.ndarray:
        """Position of each row."""
        return np.array([place for kept in self.positions for place in kept], dtype=np.int64)


def random_content(n: int = 30, seed: int = 0, dtype: str = "float32", sites: Sequence[str] = ("a", "b")) -> Content:
    """Sequences of 1 to 9 tokens, of which some positions are stored; some have none."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, 90, rng.integers(1, 10)).tolist() for _ in range(n)]
    positions = [np.flatnonzero(rng.random(len(row)) < 0.6).tolist() for row in ids]
    rows = sum(map(len, positions))
    made: dict[str, tuple[np.ndarray, str]] = {}
    for number, site in enumerate(sites):
        values = rng.normal(size=(rows, 3 + number)).astype("<f4")
        bits = (values.view("<u4") >> 16).astype("<u2") if dtype == "bfloat16" else values.astype(BITS[dtype])
        made[f"blocks.{number}.hook_{site}"] = (bits, dtype)
    made["blocks.0.mlp.hook_expert_indices"] = (rng.integers(0, 8, (rows, 2)).astype("<i2"), "int16")
    columns = {
        "author": [f"ä{i % 3}" for i in range(n)],
        "toxic": [i % 2 == 0 for i in range(n)],
        "n": list(range(n)),
        "score": [float("nan") if i % 5 == 0 else i / 7 for i in range(n)],
    }
    tokens = {
        "entity": [("none", "person", "place")[i] for i in rng.integers(0, 3, rows)],
        "named": [bool(i) for i in rng.integers(0, 2, rows)],
        "depth": rng.integers(0, 5, rows).tolist(),
        "logprob": rng.normal(size=rows).astype("<f4").tolist(),
    }
    return Content(ids, positions, made, columns, tokens)


def _kind(values: list[Any]) -> str:
    return {bool: "bool", int: "int", float: "float", str: "string"}[type(values[0])]


def _coded(name: str, values: list[Any]) -> Any:
    """Token columns as the format has them."""
    if name == "logprob":
        return np.array(values, "<f4")
    kind = _kind(values)
    if kind == "string":
        return np.array([sorted(set(values)).index(value) for value in values], "<i4")
    return np.array(values).astype({"int": "<i8", "float": "<f8", "bool": "i1"}[kind])


def _site(file: h5py.File, name: str, values: np.ndarray, dtype: str, compression: str | None) -> None:
    options: dict[str, Any] = {}
    if compression and len(values):
        options = {"chunks": (min(4, len(values)), *values.shape[1:]), "shuffle": True, **FILTERS[compression]}
    kind = h5py.Datatype(HDF5_TYPES[dtype])
    dataset = file.create_dataset(f"sites/{name}", values.shape, kind, **options)
    dataset.id.write(h5py.h5s.ALL, h5py.h5s.ALL, np.ascontiguousarray(values), mtype=HDF5_TYPES[dtype])


def _statistics(content: Content) -> dict[str, Any]:
    found = {}
    for name, (values, dtype) in content.sites.items():
        if not dtype.startswith("int") and len(values):
            plain = as_float(values, dtype)
            norm = float(np.sqrt((plain.reshape(len(plain), -1) ** 2).sum(1)).mean())
            found[name] = {"count": len(plain), "mean_norm": norm, "total_variance": float(plain.var(0).sum())}
            found[name] |= {"mean": plain.mean(0).tolist(), "var": plain.var(0).tolist()}
    return found


def as_float(values: np.ndarray, dtype: str) -> np.ndarray:
    """Raw values as float64."""
    if dtype == "bfloat16":
        return (values.astype("<u4") << 16).view("<f4").astype(np.float64)
    return values.astype(np.float64)


def write(
    path: Path,
    content: Content,
    *,
    per_shard: int = 7,
    compression: str | None = None,
    weights: str = "a" * 64,
    config: str = "c" * 64,
) -> Cache:
    """Write the cache and open it."""
    path.mkdir(parents=True)
    ids, rows = content.ids, content.sequence
    identity = hashlib.sha256(str((path.name, weights)).encode()).hexdigest()
    shards, first_row = [], 0
    for number, first in enumerate(range(0, len(ids), per_shard)):
        stop = min(first + per_shard, len(ids))
        mine = np.flatnonzero((rows >= first) & (rows < stop))
        name = f"shard-{number:05d}.h5"
        entry = {"first_sequence": first, "sequences": stop - first, "first_row": first_row, "rows": len(mine)}
        with h5py.File(path / name, "w") as file:
            file.attrs.update({"format": "activations-cache", "version": 1, "identity": identity, "crc_rows": 256})
            file.attrs.update(entry)
            for site, (values, dtype) in content.sites.items():
                _site(file, site, values[mine], dtype, compression)
            file["rows/sequence"], file["rows/position"] = (
                rows[mine].astype("<i8"),
                content.position[mine].astype("<i4"),
            )
            for column, values in content.token_columns.items():
                file[f"rows/{column}"] = _coded(column, values)[mine]
            file["sequences/input_ids"] = np.concatenate([np.array(row, "<i4") for row in ids[first:stop]])
            file["sequences/offsets"] = np.cumsum([0, *map(len, ids[first:stop])]).astype("<i8")
            for column, values in content.columns.items():
                if _kind(values) == "string":
                    file["sequences"].create_dataset(column, data=values[first:stop], dtype=h5py.string_dtype())
                else:
                    kind = {"int": "<i8", "float": "<f8", "bool": "i1"}[_kind(values)]
                    file[f"sequences/{column}"] = np.array(values[first:stop]).astype(kind)
        raw = (path / name).read_bytes()
        shards.append({"file": name, **entry, "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()})
        first_row += len(mine)
    write_manifest(path, _manifest(content, identity, shards, compression, weights, config))
    return ac.open(path)


def _manifest(
    content: Content, identity: str, shards: list[Any], compression: str | None, weights: str, config: str
) -> Any:
    fingerprint = hashlib.sha256(str(content.ids).encode()).hexdigest()
    selection = hashlib.sha256(str(content.positions).encode()).hexdigest()
    tokens = sum(map(len, content.ids))
    per_token = {
        name: {"kind": _kind(values), **({"categories": sorted(set(values))} if _kind(values) == "string" else {})}
        for name, values in content.token_columns.items()
        if name != "logprob"
    }
    data = {"fingerprint": fingerprint, "columns_fingerprint": "", "sequences": len(content.ids), "tokens": tokens}
    data |= {"truncated": 2, "bos": False, "columns_left_out": ["<b>&"], "selection": selection}
    data |= {"columns": {name: _kind(values) for name, values in content.columns.items()}, "token_columns": per_token}
    sites = [
        {"name": name, "dtype": dtype, "shape": list(values.shape[1:]), "aliases": [f"{name}.alias"]}
        | {"kind": name.split("hook_")[1], "layer": int(name.split(".")[1])}
        for name, (values, dtype) in content.sites.items()
    ]
    rows = len(content.sequence)
    model = {"name": "<i>tiny</i>", "class": "Tiny", "config_hash": config, "weights_hash": weights}
    settings = {"positions": "chosen", "pool": None, "n_tokens": None, "compression": compression, "dtype": "float32"}
    settings |= {"logprobs": "logprob" in content.token_columns, "batch_tokens": 8, "shard_rows": 20}
    plan = {"fingerprint": "", "rows": rows, "sequences": len(content.ids), "tokens": tokens}
    return {
        "format": "activations-cache", "version": 1, "finished": True, "identity": identity,
        "model": model | {"dtype": "float32", "attention": "eager"}, "tokenizer": None, "data": data, "sites": sites,
        "settings": settings, "plan": plan | {"batches": 1, "shards": len(shards)}, "rows": rows,
        "statistics": _statistics(content), "libraries": {"python": "3"}, "machine": {"device": "cpu"},
        "created": "2026-01-01T00:00:00+00:00", "shards": shards,
    }  # fmt: skip


# --- the oracle -----------------------------------------------------------------------------------------------------


def part(content: Content, rows: np.ndarray, sequences: np.ndarray) -> Content:
    """Rows (a mask) and sequences (numbers) of a content, by plain indexing."""
    kept = set(np.flatnonzero(rows).tolist())
    row_of = {(int(s), int(p)): i for i, (s, p) in enumerate(zip(content.sequence, content.position, strict=True))}
    return Content(
        [content.ids[i] for i in sequences],
        [[place for place in content.positions[i] if row_of[int(i), place] in kept] for i in sequences],
        {name: (values[rows], dtype) for name, (values, dtype) in content.sites.items()},
        {name: [values[i] for i in sequences] for name, values in content.columns.items()},
        {name: [values[i] for i in sorted(kept)] for name, values in content.token_columns.items()},
    )


def assert_reads_as(reader: Any, content: Content) -> None:
    """Everything that can be read, held against the arrays that it was made from."""
    sequence, position = content.sequence, content.position
    assert (len(reader), reader.n_sequences) == (len(sequence), len(content.ids))
    assert reader.sites == tuple(content.sites)
    assert [row.tolist() for row in reader.sequences["input_ids"]] == content.ids
    assert reader.sequences["length"].tolist() == [len(row) for row in content.ids]
    assert reader.rows["sequence"].tolist() == sequence.tolist()
    assert reader.rows["position"].tolist() == position.tolist()
    assert reader.rows["token"].tolist() == [
        content.ids[s][p] for s, p in zip(sequence.tolist(), position.tolist(), strict=True)
    ]
    assert set(reader.columns) == set(content.columns)
    assert set(reader.token_columns) == set(content.token_columns)
    for name, values in content.columns.items():
        np.testing.assert_array_equal(reader.sequences[name], np.array(values, dtype=reader.sequences[name].dtype))
        np.testing.assert_array_equal(reader.labels(name), reader.sequences[name][sequence])
    for name, values in content.token_columns.items():
        np.testing.assert_array_equal(reader.rows[name], np.array(values, dtype=reader.rows[name].dtype))
        np.testing.assert_array_equal(reader.labels(name), reader.rows[name])
    for name, (values, dtype) in content.sites.items():
        np.testing.assert_array_equal(reader[name][:].double().numpy(), as_float(values, dtype))
        np.testing.assert_array_equal(reader[name][::-3].double().numpy(), as_float(values, dtype)[::-3])
        in_order = [batch.double().numpy() for batch in reader.batches(name, 5, shuffle=False)] if len(reader) else []
        np.testing.assert_array_equal(np.concatenate(in_order or [as_float(values, dtype)]), as_float(values, dtype))
    _assert_sequences(reader, content)
    _assert_statistics(reader, content)


def _assert_sequences(reader: Any, content: Content) -> None:
    for number, ids in enumerate(content.ids):
        found = reader.sequence(number)
        mine = content.sequence == number
        assert found.input_ids.tolist() == ids
        assert found.positions.tolist() == content.positions[number]
        for name, (values, dtype) in content.sites.items():
            np.testing.assert_array_equal(found.values[name].double().numpy(), as_float(values[mine], dtype))
        for row in np.flatnonzero(mine)[:2].tolist():
            assert reader.tokens(row).tolist() == ids


def _assert_statistics(reader: Any, content: Content) -> None:
    floating = {name: as_float(v, dtype) for name, (v, dtype) in content.sites.items() if not dtype.startswith("int")}
    assert set(reader.stats) == (set(floating) if len(reader) else set())
    for name in reader.stats:
        plain, stats = floating[name], reader.stats[name]
        assert stats.count == len(plain)
        np.testing.assert_allclose(stats.mean.numpy(), plain.mean(0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(stats.var.numpy(), plain.var(0), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(stats.norm, np.sqrt((plain.reshape(len(plain), -1) ** 2).sum(1)).mean(), rtol=1e-12)
        np.testing.assert_allclose(reader.summary(name), (stats.norm, float(stats.var.sum())), rtol=1e-9)
