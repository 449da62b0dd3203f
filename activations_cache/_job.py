"""A capture decided in full before anything is written: its data, sites, plan, and the manifest that it will fill.

Also the comparison with what a directory already holds: the same capture (go on, or return it) or another (refuse,
and say in which facts it differs).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import platform
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch

from activations_cache import _verify, hashing
from activations_cache import sites as site_catalogue
from activations_cache._device import input_device
from activations_cache._generations import FOLDER
from activations_cache._shards import check_size, damage
from activations_cache.documents import (
    Column,
    Overflow,
    TokenColumn,
    Tokens,
    read_documents,
    storable_columns,
    tokenize,
    unstorable_columns,
)
from activations_cache.errors import CacheError, CacheMismatchError, CorruptCacheError, DataError, SiteError
from activations_cache.plan import Plan, default_shard_rows, make_plan
from activations_cache.positions import Positions, Selection, select
from activations_cache.store import (
    FORMAT,
    LARGEST,
    LOCK,
    MANIFEST,
    PARTIAL,
    TOKEN_TYPES,
    VERSION,
    Compression,
    ShardEntry,
    SiteSpec,
    Storage,
    json_digest,
    read_manifest,
)
from activations_cache.tokens import check_count

COUNTS = ("batch_tokens", "shard_rows", "n_tokens", "max_length")
StorageTypes = str | torch.dtype | Mapping[str, str | torch.dtype] | None


@dataclass(frozen=True)
class Request:
    """What the caller of `capture` asked for, as asked; see there."""

    model: Any
    data: Any
    sites: str | Sequence[str]
    out: Path
    tokenizer: Any = None
    positions: Positions = "all"
    pool: Literal["mean"] | None = None
    dtype: StorageTypes = None
    batch_tokens: int = 8192
    shard_rows: int | None = None
    n_tokens: int | None = None
    max_length: int | None = None
    bos: bool | None = None
    chat: bool = False
    overflow: Overflow = "truncate"
    columns: Sequence[str] | None = None
    token_columns: Sequence[str] | None = None
    logprobs: bool = False
    compression: Compression | None = None
    text_column: str = "text"
    progress: bool = True


@dataclass(frozen=True)
class Job:
    """A capture, decided.

    Attributes:
        hf: The bare model.
        tokens: Token ids of every sequence.
        selection: Which of their positions are stored.
        columns: Label columns to store.
        specs: The sites, in forward order.
        plan: Shards and batches.
        manifest: The manifest of the cache before its first shard.
        out: The cache directory.
        dropped: Columns that nobody chose to leave out and that cannot be stored, each with the reason.
    """

    hf: Any
    tokens: Tokens
    selection: Selection
    columns: dict[str, Column]
    specs: tuple[SiteSpec, ...]
    plan: Plan
    manifest: dict[str, Any]
    out: Path
    dropped: dict[str, str]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings as the manifest records them."""
        return cast(dict[str, Any], self.manifest["settings"])

    @property
    def max_length(self) -> int:
        """Tokens after which a document is cut."""
        return int(self.settings["max_length"])

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return input_device(self.hf)


def prepare(asked: Request) -> Job:
    """Read the data, resolve the sites, plan the batches and write down what the cache will be.

    Raises:
        DataError: Unusable data or settings.
        SiteError: A site that is unknown or cannot be cached.
        ModelError: A model whose sites cannot be named.
    """
    hf, catalogue = hashing.hf_model(asked.model), site_catalogue.Sites(asked.model)
    check_counts({name: getattr(asked, name) for name in COUNTS})
    if asked.compression not in (None, "gzip", "lzf"):
        raise DataError(f"compression must be None, 'gzip' or 'lzf'; got {asked.compression!r}")
    tokenizer = getattr(asked.model, "tokenizer", None) if asked.tokenizer is None else asked.tokenizer
    max_length = _max_length(asked, catalogue.dims.n_ctx)
    specs = _specs(asked, catalogue, hf)
    tokens = _tokens(asked, tokenizer, max_length)
    _check_ids(tokens, catalogue.dims.d_vocab)
    selection = select(tokens, asked.positions, asked.pool)
    columns = storable_columns(tokens.columns, asked.columns)
    shard_rows = asked.shard_rows
    if shard_rows is None:
        shard_rows = default_shard_rows(sum(spec.row_bytes for spec in specs), asked.batch_tokens)
    plan = make_plan(selection.lengths, selection.counts, batch_tokens=asked.batch_tokens, shard_rows=shard_rows)
    settings = {
        "positions": asked.positions if isinstance(asked.positions, str) else "chosen",
        "pool": asked.pool,
        "dtype": _dtype_setting(asked.dtype, hf),
        "batch_tokens": asked.batch_tokens,
        "shard_rows": shard_rows,
        "n_tokens": asked.n_tokens,
        "max_length": max_length,
        "bos": asked.bos,
        "chat": asked.chat,
        "overflow": asked.overflow,
        "logprobs": asked.logprobs,
        "compression": asked.compression,
    }
    manifest: dict[str, Any] = {"format": FORMAT, "version": VERSION, "finished": False, "identity": ""}
    manifest |= {"model": model_entry(hf, asked.model), "tokenizer": _tokenizer_entry(tokenizer)}
    manifest |= {"data": data_entry(tokens, selection, columns), "sites": [spec.to_json() for spec in specs]}
    manifest |= {"settings": settings, "plan": _plan_entry(plan), "rows": 0, "statistics": {}}
    manifest |= {"libraries": libraries(), "machine": _machine(hf)}
    manifest |= {"created": datetime.now(UTC).isoformat(timespec="seconds"), "shards": []}
    manifest["identity"] = json_digest(_facts(manifest))
    dropped = unstorable_columns(tokens.columns) if asked.columns is None else {}
    return Job(hf, tokens, selection, columns, specs, plan, manifest, asked.out, dropped)


def check_counts(settings: Mapping[str, Any]) -> None:
    """Refuse settings that must be numbers of things and are none.

    Raises:
        DataError: One of those in `COUNTS` is no integer of 1 or above, nor None where None is allowed.
    """
    if "batch_tokens" in settings and settings["batch_tokens"] is None:
        raise DataError("batch_tokens must be an integer; got None")
    for name in COUNTS:
        check_count(name, settings.get(name))


def cacheable_sites(catalogue: Any, patterns: str | Sequence[str]) -> list[Any]:
    """The sites to capture, in forward order. A pattern passes over those that have no row per token.

    Raises:
        SiteError: An unknown site; one without a row per token that is named in full; a pattern that fits no other.
    """
    for item in [patterns] if isinstance(patterns, str | site_catalogue.Site) else patterns:
        found = catalogue.resolve(item)
        if any(site.cacheable for site in found):
            continue
        if "*" in str(item):
            raise SiteError(
                f"{item!r} fits only sites that have no row per token and cannot be cached ({found[0].name})"
            )
        raise SiteError(f"{found[0].name} has no row per token and cannot be cached; read it with sites.run")
    return [site for site in catalogue.resolve(patterns) if site.cacheable]


def _tokens(asked: Request, tokenizer: Any, max_length: int) -> Tokens:
    documents = read_documents(asked.data, asked.text_column)
    return tokenize(
        tokenizer,
        documents,
        max_length,
        asked.bos,
        asked.chat,
        asked.overflow,
        n_tokens=asked.n_tokens,
        token_columns=asked.token_columns,
        positions=asked.positions if isinstance(asked.positions, str) else None,
        progress=asked.progress,
    )


def _max_length(asked: Request, n_ctx: int) -> int:
    if asked.max_length is None:
        return n_ctx
    if n_ctx and asked.max_length > n_ctx:
        raise DataError(f"max_length={asked.max_length} is more than the context of this model, {n_ctx} tokens")
    return asked.max_length


def _check_ids(tokens: Tokens, d_vocab: int) -> None:
    if not len(tokens.flat) or int(tokens.flat.max()) < d_vocab:
        return
    at = int(np.argmax(tokens.flat >= d_vocab))
    raise DataError(
        f"row {int(np.searchsorted(tokens.offsets, at, side='right')) - 1} holds token id {int(tokens.flat[at])}; the "
        f"model's vocabulary ends at {d_vocab - 1}. Is this another model's tokenizer?"
    )


def _specs(asked: Request, catalogue: Any, hf: Any) -> tuple[SiteSpec, ...]:
    """The sites and how each is stored. In a mapping of patterns to types, the last pattern that fits decides."""
    sites = cacheable_sites(catalogue, asked.sites)
    types = asked.dtype if isinstance(asked.dtype, Mapping) else {"*": asked.dtype}
    names = {site.name: (site.name, *site.aliases) for site in sites}
    for pattern in types:
        if not any(fnmatchcase(name, pattern) for all_names in names.values() for name in all_names):
            raise SiteError(f"dtype names {pattern!r}, which is none of the sites to capture: {', '.join(names)}")
    found = []
    for site in sites:
        fits = [kind for pattern, kind in types.items() if any(fnmatchcase(n, pattern) for n in names[site.name])]
        kind = fits[-1] if fits else None
        found.append(_spec(site, _storage(site.dtype if kind is None else kind, hf), catalogue.dims.n_experts))
        if asked.pool and site.integer:
            raise SiteError(f"{site.name} holds indices, which have no mean; capture it without pool")
    return tuple(found)


def _dtype_setting(dtype: StorageTypes, hf: Any) -> str | dict[str, str]:
    if isinstance(dtype, Mapping):
        return {pattern: _storage(kind, hf) for pattern, kind in dtype.items()}
    return _storage(dtype, hf)


def _storage(dtype: str | torch.dtype | None, hf: Any) -> Storage:
    own = str(hf.dtype).removeprefix("torch.")
    name = (own if own in LARGEST else "float32") if dtype is None else str(dtype).removeprefix("torch.")
    if name not in LARGEST:
        raise DataError(f"dtype must be one of {', '.join(LARGEST)}; got {name!r}")
    return cast(Storage, name)


def _spec(site: Any, dtype: Storage, n_experts: int | None) -> SiteSpec:
    if site.integer:
        dtype = "int16" if n_experts is not None and n_experts < 2**15 else "int32"
    return SiteSpec(site.name, dtype, tuple(site.shape), tuple(site.aliases), site.kind, site.layer)


# --- the parts of a manifest ----------------------------------------------------------------------------------------


def model_entry(hf: Any, model: Any) -> dict[str, Any]:
    """The `model` field of a manifest."""
    name = getattr(model, "name", "") or getattr(hf.config, "_name_or_path", "") or type(hf).__name__
    return {
        "name": str(name),
        "class": type(hf).__name__,
        "config_hash": hashing.config_hash(hf.config),
        "weights_hash": hashing.weights_hash(hf),
        "dtype": str(hf.dtype).removeprefix("torch."),
        "attention": getattr(hf.config, "_attn_implementation", None),
    }


def _tokenizer_entry(tokenizer: Any) -> dict[str, Any] | None:
    if tokenizer is None:
        return None
    return {"hash": hashing.tokenizer_hash(tokenizer), "name": str(getattr(tokenizer, "name_or_path", ""))}


def data_entry(tokens: Tokens, selection: Selection, columns: Mapping[str, Column]) -> dict[str, Any]:
    """The `data` field of a manifest."""
    return {
        "fingerprint": ids_digest(tokens),
        "columns_fingerprint": json_digest({name: _exact(column.values) for name, column in columns.items()}),
        "sequences": len(tokens),
        "tokens": tokens.n_tokens,
        "truncated": tokens.n_truncated,
        "bos": tokens.bos,
        "columns": {name: column.kind for name, column in columns.items()},
        "columns_left_out": sorted(set(tokens.columns) - set(columns) - set(tokens.token_columns)),
        "token_columns": {name: _token_column(column) for name, column in tokens.token_columns.items()},
        "selection": selection.fingerprint(),
    }


def _plan_entry(plan: Plan) -> dict[str, Any]:
    return {
        "fingerprint": plan.fingerprint(),
        "rows": plan.rows,
        "sequences": len(plan.lengths),
        "tokens": plan.tokens,
        "batches": plan.n_batches,
        "shards": len(plan.shards),
    }


def ids_digest(tokens: Tokens) -> str:
    """SHA-256 over the sequences: of each its length in 8 bytes, then its ids in 4 bytes each, little-endian."""
    digest = hashlib.sha256()
    for row in tokens.input_ids:
        digest.update(len(row).to_bytes(8, "little") + np.asarray(row, dtype="<i4").tobytes())
    return digest.hexdigest()


def _token_column(column: TokenColumn) -> dict[str, Any]:
    digest = hashlib.sha256()
    kind = TOKEN_TYPES[column.kind]
    for start in range(0, len(column.values), 2**20):
        digest.update(np.asarray(column.values[start : start + 2**20]).astype(kind).tobytes())
    named = {} if column.categories is None else {"categories": list(column.categories)}
    return {"kind": column.kind, **named, "fingerprint": digest.hexdigest()}


def _exact(values: Sequence[Any]) -> list[Any]:
    """Values as JSON can hold them, NaN included."""
    return [repr(value) if isinstance(value, float) and not math.isfinite(value) else value for value in values]


def libraries() -> dict[str, str]:
    """Versions of what has a hand in the numbers."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "transformer-lens", "h5py", "numpy", "tokenizers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def _machine(hf: Any) -> dict[str, Any]:
    return {"device": str(input_device(hf)), "threads": torch.get_num_threads(), "platform": platform.platform()}


# --- what a directory already holds ---------------------------------------------------------------------------------


def _facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What two captures must agree in to be one, each fact under the words that a mismatch is reported in."""
    model, data = manifest["model"], manifest["data"]
    return {
        "model weights": model["weights_hash"],
        "model configuration": model["config_hash"],
        "model dtype": model["dtype"],
        "attention implementation": model["attention"],
        "tokenizer": manifest["tokenizer"] and manifest["tokenizer"]["hash"],
        "token ids of the data": data["fingerprint"],
        "label columns": [data["columns"], data["columns_fingerprint"]],
        "per-token columns": data["token_columns"],
        "positions chosen": data["selection"],
        "sites": [[site["name"], site["dtype"], site["shape"]] for site in manifest["sites"]],
        **{f"setting {name}": value for name, value in manifest["settings"].items()},
        "plan of batches": manifest["plan"]["fingerprint"],
    }


def held_manifest(job: Job, resume: bool) -> dict[str, Any] | None:
    """The manifest that the directory holds of this very capture; None if it holds none. Touches nothing.

    A cache of another capture that has no shard yet holds nothing either, and counts as none.

    Raises:
        CacheError: The directory is not empty and holds no cache; or it holds one and `resume` is False.
        CacheMismatchError: It holds another capture.
        CorruptCacheError: Its manifest is malformed, or a shard is missing or truncated.
    """
    if not (job.out / MANIFEST).exists():
        _check_empty(job.out)
        return None
    held = read_manifest(job.out)
    if not resume:
        raise CacheError(
            f"{job.out} already holds a cache, and resume=False: nothing is overwritten. "
            "Choose another directory, delete this one yourself, or pass resume=True"
        )
    if held["identity"] != job.manifest["identity"] and not held["shards"]:
        return None
    _check_same(job, held)
    return held


def _check_empty(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise CacheError(f"{out} is a file; a directory for the cache is required")
    ours = {LOCK, FOLDER}  # a capture of generated tokens has put the texts there
    others = sorted(path.name for path in out.iterdir() if path.name not in ours and not path.name.endswith(PARTIAL))
    if others:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise CacheError(f"{out} is not empty ({shown}) and holds no cache; choose an empty or new directory")


def _check_same(job: Job, held: Mapping[str, Any]) -> None:
    """Refuse another capture's directory, and damaged shards."""
    if held["identity"] != job.manifest["identity"]:
        raise CacheMismatchError(
            f"{job.out} holds another capture (of {held['model']['name']}). Different: {_differences(job, held)}. "
            "Choose another directory, or capture with the same model, data and settings"
        )
    for entry in (ShardEntry(**raw) for raw in held["shards"]):
        wrong = check_size(job.out, entry)
        if wrong:
            raise CorruptCacheError(damage(job.out, entry, wrong))


def check_bytes(job: Job, held: Mapping[str, Any], progress: bool) -> None:
    """Compare every committed shard with the SHA-256 that the manifest names: one read of the cache.

    Raises:
        CorruptCacheError: A byte is not as it was written; the datasets and sequences that are hit are named.
    """
    from tqdm.auto import tqdm

    for raw in tqdm(held["shards"], desc="check", unit="shard", disable=not progress, leave=False):
        problem = _verify.verify_shard(job.out, ShardEntry(**raw), list(job.specs), held["identity"])
        if problem is not None:
            raise CorruptCacheError(
                f"{job.out / problem.file} {problem.described}. Restore the file, or repair it (ac.repair, "
                f"`probe cache verify {job.out} --repair`)"
            )


def _differences(job: Job, held: Mapping[str, Any]) -> str:
    ours, theirs = _facts(job.manifest), _facts(held)
    names = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
    if len(names) > 1 and "plan of batches" in names:
        names.remove("plan of batches")  # follows from the others
    return "; ".join(_difference(name, theirs.get(name), ours.get(name)) for name in names) or "identity"


def _difference(name: str, held: Any, asked: Any) -> str:
    if name == "sites":
        return f"sites ({_names(held)} in the cache, {_names(asked)} asked for)"
    if name in ("per-token columns", "positions chosen"):
        return name
    if name == "label columns":
        return f"label columns ({sorted(held[0])} in the cache, {sorted(asked[0])} asked for, or their values)"
    if isinstance(held, str) and isinstance(asked, str) and len(held) == len(asked) == 64:
        return f"{name} ({held[:8]} in the cache, {asked[:8]} asked for)"
    return f"{name} ({held!r} in the cache, {asked!r} asked for)"


def _names(entries: Sequence[Sequence[Any]]) -> str:
    shown = [f"{name} {dtype}" for name, dtype, _ in entries[:3]]
    return ", ".join(shown) + (f" and {len(entries) - 3} more" if len(entries) > 3 else "")


def warn_of_changes(job: Job, held: Mapping[str, Any]) -> None:
    """Warn if an interrupted cache was begun with other library versions or on another machine."""
    for part in ("libraries", "machine"):
        changed = [name for name, value in job.manifest[part].items() if held.get(part, {}).get(name) != value]
        if changed:
            warnings.warn(
                f"{job.out} was begun with another {', '.join(changed)}; the rows to come may differ from an "
                "uninterrupted capture's in the last bits of their floats",
                stacklevel=3,
            )
