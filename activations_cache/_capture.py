"""Capture: run a model over data and store the activations of chosen sites, so that being killed costs one shard at most.

Everything that can be wrong with the request is found before anything is written: data, sites, plan, and whether the
directory already holds this very capture (go on, or return it) or another one (refuse).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import platform
import sys
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from activations_cache import _index, hashing
from activations_cache import sites as site_catalogue
from activations_cache._shards import check_size, damage
from activations_cache.cache import Cache
from activations_cache.cache import open as open_cache
from activations_cache.documents import (
    Column,
    Overflow,
    Tokens,
    read_documents,
    storable_columns,
    tokenize,
)
from activations_cache.errors import (
    ActivationsCacheError,
    CacheError,
    CacheMismatchError,
    CorruptCacheError,
    DataError,
    ModelError,
    NumericsError,
    SiteError,
)
from activations_cache.plan import Plan, Positions, Shard, default_shard_rows, make_plan
from activations_cache.store import (
    FORMAT,
    LOCK,
    MANIFEST,
    PARTIAL,
    VERSION,
    AnyArray,
    Moments,
    ShardBuffer,
    ShardEntry,
    SiteSpec,
    Storage,
    json_digest,
    read_manifest,
    read_moments,
    remove_partials,
    write_manifest,
    write_shard,
    writer_lock,
)

LARGEST = {
    "float16": 65504.0,
    "bfloat16": float(torch.finfo(torch.bfloat16).max),
    "float32": float(torch.finfo(torch.float32).max),
}
TORCH_TYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "int16", "int32")}
QUEUED_BATCHES = 2  # batches that may wait for the writer while the next forward runs


@dataclass(frozen=True)
class _Job:
    """A capture, decided in full before anything is written."""

    hf: Any
    tokens: Tokens
    columns: dict[str, Column]
    specs: tuple[SiteSpec, ...]
    plan: Plan
    manifest: dict[str, Any]  # of a cache that holds nothing yet
    out: Path
    device: torch.device


def capture(
    model: Any,
    data: Any,
    sites: str | Sequence[str],
    out: str | Path,
    *,
    tokenizer: Any = None,
    positions: Positions = "all",
    dtype: str | torch.dtype | None = None,
    batch_tokens: int = 8192,
    shard_rows: int | None = None,
    max_length: int | None = None,
    bos: bool | None = None,
    chat: bool = False,
    overflow: Overflow = "truncate",
    columns: Sequence[str] | None = None,
    text_column: str = "text",
    resume: bool = True,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Cache:
    """Run a model over data and store the activations of some sites in a cache directory.

    Killed at any moment, the directory holds a valid cache of the shards that were committed; the same call goes on from
    there, and ends with the same bytes as a run that was never interrupted (on one machine, with the same versions).
    The forward stops after the last site that is needed, and writing overlaps with it.

    Args:
        model: A Hugging Face causal language model, or anything with one as `.hf` (and perhaps `.tokenizer`, `.name`).
            It is put in eval mode meanwhile.
        data: Whatever `read_documents` takes: texts or token ids, in memory or in a file.
        sites: Names or patterns of sites, e.g. "blocks.*.hook_resid_post". Aliases are stored once.
        out: The cache directory; made if need be.
        tokenizer: For texts; by default `model.tokenizer`.
        positions: "all" stores a row per token, "last" one per sequence, its last token's.
        dtype: Storage type of float sites: "float16", "bfloat16" or "float32"; None takes the model's own, which loses
            nothing. Integer sites (chosen experts) are stored as integers.
        batch_tokens: Padded tokens per forward.
        shard_rows: Rows per shard; None aims at 128 MiB.
        max_length: Longest sequence in tokens; None is the model's context.
        bos: As in `tokenize`.
        chat: As in `tokenize`.
        overflow: As in `tokenize`.
        columns: Label columns to store per sequence; None stores all whose values are strings, numbers or booleans.
        text_column: The column of the data that holds the text.
        resume: Go on with an interrupted capture of the same kind, and return a finished one at once. False refuses
            any existing cache; nothing is ever deleted.
        device: Move the model there first; None leaves it where it is.
        progress: Show a progress bar with tokens per second.

    Returns:
        The finished cache, opened.

    Raises:
        DataError: Unusable data or settings, a text too long under overflow="error".
        SiteError: An unknown site, or one that has no row per token (attention patterns).
        CacheMismatchError: `out` holds a cache of another model, other data or other settings.
        CacheLockedError: Another process is writing there.
        CacheError: `out` is not empty and holds no cache; the disk is full; a cache exists and resume=False.
        CorruptCacheError: A shard of the cache to go on with is damaged.
        NumericsError: An activation is NaN or does not fit the storage type.
        ModelError: The forward ran out of memory, or the model's sites cannot be named.

    Cost: one forward up to the last site over all tokens; bytes written = rows x sum of site widths x 2 or 4.
    """
    hf = site_catalogue.Sites(model).layout.hf
    if device is not None:
        hf.to(device)
    settings = {"positions": positions, "batch_tokens": batch_tokens, "bos": bos, "chat": chat, "overflow": overflow}
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    job = _prepare(
        model, hf, _Request(data, sites, Path(out), tokenizer, dtype, shard_rows, max_length, columns, text_column), settings
    )
    if _already_finished(job, resume):
        return open_cache(out)
    _run(job, progress)
    return open_cache(out)


@dataclass(frozen=True)
class _Request:
    """What the caller asked for, as asked."""

    data: Any
    sites: str | Sequence[str]
    out: Path
    tokenizer: Any
    dtype: str | torch.dtype | None
    shard_rows: int | None
    max_length: int | None
    columns: Sequence[str] | None
    text_column: str


# --- before anything is written -------------------------------------------------------------------------------------


def _prepare(model: Any, hf: Any, asked: _Request, settings: dict[str, Any]) -> _Job:
    """Read the data, resolve the sites, plan the batches and write down what the cache will be."""
    catalogue = site_catalogue.Sites(hf)
    dims = catalogue.dims
    max_length = dims.n_ctx if asked.max_length is None else asked.max_length
    if dims.n_ctx and max_length > dims.n_ctx:
        raise DataError(f"max_length={max_length} is more than the context of this model, {dims.n_ctx} tokens")
    documents = read_documents(asked.data, asked.text_column)
    tokens = tokenize(
        asked.tokenizer, documents, max_length, bos=settings["bos"], chat=settings["chat"], overflow=settings["overflow"]
    )
    _check_ids(tokens, dims.d_vocab)
    columns = storable_columns(tokens.columns, asked.columns)
    dtype = _storage(asked.dtype, hf)
    specs = tuple(_spec(site, dtype, dims.n_experts) for site in catalogue.resolve(asked.sites))
    batch_tokens = settings["batch_tokens"]
    shard_rows = asked.shard_rows
    if shard_rows is None:
        shard_rows = default_shard_rows(sum(spec.row_bytes for spec in specs), batch_tokens)
    plan = make_plan(
        [len(row) for row in tokens.input_ids],
        positions=settings["positions"],
        batch_tokens=batch_tokens,
        shard_rows=shard_rows,
    )
    full = {**settings, "dtype": dtype, "max_length": max_length, "shard_rows": shard_rows}
    job = _Job(hf, tokens, columns, specs, plan, {}, asked.out, next(hf.parameters()).device)
    return replace(job, manifest=_new_manifest(job, model, asked.tokenizer, full))


def _check_ids(tokens: Tokens, d_vocab: int) -> None:
    for number, row in enumerate(tokens.input_ids):
        if max(row) >= d_vocab:
            raise DataError(
                f"row {number} holds token id {max(row)}; the model's vocabulary ends at {d_vocab - 1}. "
                "Is this another model's tokenizer?"
            )


def _storage(dtype: str | torch.dtype | None, hf: Any) -> Storage:
    own = str(hf.dtype).removeprefix("torch.")
    name = (own if own in LARGEST else "float32") if dtype is None else str(dtype).removeprefix("torch.")
    if name not in LARGEST:
        raise DataError(f"dtype must be one of {', '.join(LARGEST)}; got {name!r}")
    return cast(Storage, name)


def _spec(site: Any, dtype: Storage, n_experts: int | None) -> SiteSpec:
    if not site.cacheable:
        raise SiteError(f"{site.name} has no row per token and cannot be cached; read it with sites.run or sites.hooked")
    if site.integer:
        dtype = "int16" if n_experts is not None and n_experts < 2**15 else "int32"
    return SiteSpec(site.name, dtype, tuple(site.shape), tuple(site.aliases), site.kind, site.layer)


def _new_manifest(job: _Job, model: Any, tokenizer: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """The manifest of the cache before its first shard. What `_facts` reads from it decides whether a resume may go on."""
    hf, plan = job.hf, job.plan
    left_out = sorted(set(job.tokens.columns) - set(job.columns))
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "finished": False,
        "identity": "",
        "model": {
            "name": str(getattr(model, "name", "") or getattr(hf.config, "_name_or_path", "") or type(hf).__name__),
            "class": type(hf).__name__,
            "config_hash": hashing.config_hash(hf.config),
            "weights_hash": hashing.weights_hash(hf),
            "dtype": str(hf.dtype).removeprefix("torch."),
            "attention": getattr(hf.config, "_attn_implementation", None),
        },
        "tokenizer": None if tokenizer is None else {"hash": hashing.tokenizer_hash(tokenizer)},
        "data": {
            "fingerprint": _ids_digest(job.tokens.input_ids),
            "columns_fingerprint": json_digest({name: _exact(column.values) for name, column in job.columns.items()}),
            "sequences": len(job.tokens),
            "tokens": job.tokens.n_tokens,
            "truncated": job.tokens.n_truncated,
            "bos": job.tokens.bos,
            "columns": {name: column.kind for name, column in job.columns.items()},
            "columns_left_out": left_out,
        },
        "sites": [spec.to_json() for spec in job.specs],
        "settings": settings,
        "plan": {
            "fingerprint": plan.fingerprint(),
            "rows": plan.rows,
            "tokens": plan.tokens,
            "batches": plan.n_batches,
            "shards": len(plan.shards),
        },
        "rows": 0,
        "statistics": {},
        "libraries": _libraries(),
        "machine": {"device": job.device.type, "threads": torch.get_num_threads(), "platform": platform.platform()},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "shards": [],
    }
    manifest["identity"] = json_digest(_facts(manifest))
    return manifest


def _ids_digest(input_ids: Sequence[Sequence[int]]) -> str:
    digest = hashlib.sha256()
    for row in input_ids:
        digest.update(len(row).to_bytes(8, "little") + np.asarray(row, dtype="<i4").tobytes())
    return digest.hexdigest()


def _exact(values: Sequence[Any]) -> list[Any]:
    """Values as JSON can hold them, NaN included."""
    return [repr(value) if isinstance(value, float) and not math.isfinite(value) else value for value in values]


def _libraries() -> dict[str, str]:
    names = ("torch", "transformers", "transformer-lens", "h5py", "numpy", "tokenizers")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def _facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What two captures must agree in to be one: said in words, so that a mismatch can be named."""
    model, data = manifest["model"], manifest["data"]
    facts = {f"setting {name}": value for name, value in manifest["settings"].items()}
    return {
        "model weights": model["weights_hash"],
        "model configuration": model["config_hash"],
        "model dtype": model["dtype"],
        "attention implementation": model["attention"],
        "tokenizer": manifest["tokenizer"] and manifest["tokenizer"]["hash"],
        "token ids of the data": data["fingerprint"],
        "label columns": [data["columns"], data["columns_fingerprint"]],
        "sites": [[site["name"], site["dtype"], site["shape"]] for site in manifest["sites"]],
        **facts,
        "plan of batches": manifest["plan"]["fingerprint"],
    }


def _already_finished(job: _Job, resume: bool) -> bool:
    """Compare the directory with the job, touching nothing. True if the very cache is there and finished."""
    if not (job.out / MANIFEST).exists():
        _check_empty(job.out)
        return False
    held = read_manifest(job.out)
    if not resume:
        raise CacheError(
            f"{job.out} already holds a cache, and resume=False: nothing is overwritten. "
            "Choose another directory, delete this one yourself, or pass resume=True"
        )
    _check_same(job, held)
    return bool(held["finished"])


def _check_empty(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise CacheError(f"{out} is a file; a directory for the cache is required")
    others = [path.name for path in out.iterdir() if path.name != LOCK and not path.name.endswith(PARTIAL)]
    if others:
        raise CacheError(
            f"{out} is not empty ({', '.join(sorted(others)[:3])}{', ...' if len(others) > 3 else ''}) and holds no "
            "cache; choose an empty or new directory"
        )


def _check_same(job: _Job, held: Mapping[str, Any]) -> None:
    """Refuse another capture's directory, and damaged shards."""
    ours, theirs = _facts(job.manifest), _facts(held)
    different = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
    if len(different) > 1 and "plan of batches" in different:
        different.remove("plan of batches")  # follows from the others
    if different or held["identity"] != job.manifest["identity"]:
        listed = "; ".join(_difference(name, theirs.get(name), ours.get(name)) for name in different)
        raise CacheMismatchError(
            f"{job.out} holds another capture (of {held['model']['name']}). Different: {listed or 'identity'}. "
            "Choose another directory, or capture with the same model, data and settings"
        )
    for entry in map(lambda raw: ShardEntry(**raw), held["shards"]):
        wrong = check_size(job.out, entry)
        if wrong:
            raise CorruptCacheError(damage(job.out, entry, wrong))
    for part in ("libraries", "machine"):
        changed = [name for name, value in job.manifest[part].items() if held.get(part, {}).get(name) != value]
        if changed and not held["finished"]:
            warnings.warn(
                f"{job.out} was begun under another {', '.join(changed)}; the rows to come may differ from it in the "
                "last bits of their floats",
                stacklevel=4,
            )


def _difference(name: str, held: Any, asked: Any) -> str:
    if name == "sites":
        return f"sites ({_names(held)} in the cache, {_names(asked)} asked for)"
    if name == "label columns":
        return f"label columns ({sorted(held[0])} in the cache, {sorted(asked[0])} asked for, or their values)"
    if isinstance(held, str) and isinstance(asked, str) and len(held) == len(asked) == 64:
        return f"{name} ({held[:8]} in the cache, {asked[:8]} asked for)"
    return f"{name} ({held!r} in the cache, {asked!r} asked for)"


def _names(entries: Sequence[Sequence[Any]]) -> str:
    shown = [f"{name} {dtype}" for name, dtype, _ in entries[:3]]
    return ", ".join(shown) + (f" and {len(entries) - 3} more" if len(entries) > 3 else "")


# --- the run --------------------------------------------------------------------------------------------------------


def _run(job: _Job, progress: bool) -> None:
    try:
        job.out.mkdir(parents=True, exist_ok=True)
        with writer_lock(job.out):
            writer = _Writer(job)
            try:
                _forward_all(job, writer, progress)
            except BaseException as error:
                _say_how_to_go_on(job, writer, error, progress)
                raise
    except OSError as error:
        raise CacheError(
            f"{job.out} cannot be written: {error}. What was committed is intact; make room or give access, and run the "
            "same capture again to go on"
        ) from error


def _say_how_to_go_on(job: _Job, writer: _Writer, error: BaseException, progress: bool) -> None:
    done, total = len(writer.manifest["shards"]), len(job.plan.shards)
    note = f"{done} of {total} shards are committed in {job.out}; the same capture with resume=True goes on from there"
    error.add_note(note)
    if progress and isinstance(error, KeyboardInterrupt):
        print(f"interrupted: {note}", file=sys.stderr)


class _Writer:
    """Places batches in the shard's buffer, and commits the shard with its last batch. Runs in its own thread.

    Opening it resumes: shards that the manifest names are kept and their statistics read back.
    """

    def __init__(self, job: _Job) -> None:
        self.job = job
        self.buffer: ShardBuffer | None = None
        self.moments = {spec.name: Moments.empty(spec.shape) for spec in job.specs if spec.floating}
        remove_partials(job.out)
        if (job.out / MANIFEST).exists():
            self.manifest = read_manifest(job.out)
            _check_same(job, self.manifest)  # again, now that nobody else can write
            for entry in self.manifest["shards"]:
                self._merge(read_moments(job.out / entry["file"], job.specs))
        else:
            self.manifest = dict(job.manifest)
            write_manifest(job.out, self.manifest)

    @property
    def done(self) -> int:
        """Shards that are committed."""
        return len(self.manifest["shards"])

    def _merge(self, moments: Mapping[str, Moments]) -> None:
        for name, moment in moments.items():
            self.moments[name].add(moment)

    def place(self, shard: Shard, number: int, values: dict[str, tuple[AnyArray, Moments | None]]) -> None:
        """Take batch `number` of a shard; commit the shard if it is the last."""
        if self.buffer is None:
            self.buffer = self._new_buffer(shard)
        for name, (rows, moments) in values.items():
            self.buffer.put(name, shard.batches[number].tolist(), rows)
            if moments is not None:
                self.buffer.moments[name].add(moments)
        if number == len(shard.batches) - 1:
            full, self.buffer = self.buffer, None
            self._commit(shard, full)

    def _new_buffer(self, shard: Shard) -> ShardBuffer:
        job, start, stop = self.job, shard.first_sequence, shard.first_sequence + shard.sequences
        columns = {name: Column(column.kind, column.values[start:stop]) for name, column in job.columns.items()}
        ids = job.tokens.input_ids[start:stop]
        return ShardBuffer.allocate(job.specs, start, shard.first_row, ids, columns, job.plan.positions == "last")

    def _commit(self, shard: Shard, buffer: ShardBuffer) -> None:
        entry = write_shard(self.job.out, shard.file, buffer, self.job.specs, self.manifest["identity"])
        self._merge(buffer.moments)
        last = shard.index == len(self.job.plan.shards) - 1
        manifest = {
            **self.manifest,
            "finished": last,
            "rows": self.manifest["rows"] + entry.rows,
            "statistics": {name: moments.to_json(vectors=last) for name, moments in self.moments.items()},
            "shards": [*self.manifest["shards"], asdict(entry)],
        }
        if last:
            _index.write_index(self.job.out, manifest)
        write_manifest(self.job.out, manifest)
        self.manifest = manifest


def _forward_all(job: _Job, writer: _Writer, progress: bool) -> None:
    """Run every batch that is not committed yet, at most `QUEUED_BATCHES` ahead of the writer."""
    from tqdm.auto import tqdm

    if job.tokens.n_truncated:
        warnings.warn(
            f"{job.tokens.n_truncated} of {len(job.tokens)} documents were cut to "
            f"{job.manifest['settings']['max_length']} tokens",
            stacklevel=5,
        )
    waiting: deque[Future[None]] = deque()
    done = sum(shard.tokens for shard in job.plan.shards[: writer.done])
    bar = tqdm(total=job.plan.tokens, initial=done, unit="tok", unit_scale=True, desc="capture", disable=not progress)
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="activations-cache-writer")
    try:
        with bar, _Collector(job) as collector:
            for shard in job.plan.shards[writer.done :]:
                for number, batch in enumerate(shard.batches):
                    if len(waiting) >= QUEUED_BATCHES:
                        waiting.popleft().result()  # an error of the writer surfaces here
                    waiting.append(thread.submit(writer.place, shard, number, collector.run(batch)))
                    bar.update(int(job.plan.lengths[batch].sum()))
            while waiting:
                waiting.popleft().result()
    finally:
        thread.shutdown(wait=True, cancel_futures=True)


class _Enough(BaseException):
    """Ends a forward once every site is read. No `Exception`, so that no handler inside a model takes it."""


class _Collector:
    """Runs batches with hooks on the sites; each value is cut to the stored rows, checked and cast as it appears."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        self.specs = {spec.name: spec for spec in job.specs}
        self.values: dict[str, tuple[AnyArray, Moments | None]] = {}
        self.keep: Int[Tensor, " rows"] | None = None
        self.batch = np.zeros(0, np.int64)

    def __enter__(self) -> _Collector:
        self._stack = self._hooked()
        self._stack.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        hf, training = self.job.hf, self.job.hf.training
        hf.eval()
        try:
            with torch.no_grad(), site_catalogue.hooked(hf, dict.fromkeys(self.specs, self._read)):
                yield
        finally:
            hf.train(training)

    def run(self, batch: Any) -> dict[str, tuple[AnyArray, Moments | None]]:
        """One forward over the sequences `batch`; per site the raw stored rows and their moments."""
        self.batch, self.values = batch, {}
        inputs = self._pad(batch)
        try:
            self.job.hf(**inputs, use_cache=False)
        except _Enough:
            return self.values
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if isinstance(error, ActivationsCacheError) or not _is_memory(error):
                raise
            shape = tuple(inputs["input_ids"].shape)
            raise ModelError(
                f"the forward of a batch of {shape[0]} x {shape[1]} tokens ran out of memory; capture into a new directory "
                f"with batch_tokens below {self.job.manifest['settings']['batch_tokens']}"
            ) from error
        missing = sorted(set(self.specs) - set(self.values))
        raise SiteError(f"the forward did not reach {missing}: these modules did not run for this input")

    def _pad(self, batch: Any) -> dict[str, Tensor]:
        """Right-padded ids and mask [batch, pos]; sets which of the flattened positions are stored."""
        rows = [self.job.tokens.input_ids[number] for number in batch.tolist()]
        lengths = torch.tensor([len(row) for row in rows])
        width = int(lengths.max())
        ids = torch.zeros(len(rows), width, dtype=torch.long)  # id 0 is as good as any under the mask
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
        mask = torch.arange(width) < lengths[:, None]  # [batch, pos]
        stored = mask if self.job.plan.positions == "all" else torch.arange(width) == lengths[:, None] - 1
        keep = stored.flatten().nonzero().squeeze(1)
        self.keep = None if bool(stored.all()) else keep.to(self.job.device)
        return {"input_ids": ids.to(self.job.device), "attention_mask": mask.long().to(self.job.device)}

    def _read(self, value: Shaped[Tensor, "batch pos *shape"], site: Any) -> None:
        spec = self.specs[site.name]
        rows = value.detach().reshape(-1, *spec.shape)  # [batch * pos, *shape]
        if self.keep is not None:
            rows = rows.index_select(0, self.keep.to(rows.device))  # [rows, *shape]
        if spec.floating:
            self._check(spec, rows)
        # the model may go on to change its tensor in place while the writer reads this one
        stored = rows.to(TORCH_TYPES[spec.dtype], copy=self.keep is None)
        moments = batch_moments(stored) if spec.floating else None
        self.values[spec.name] = (_raw(stored), moments)
        if len(self.values) == len(self.specs):
            raise _Enough

    def _check(self, spec: SiteSpec, rows: Tensor) -> None:
        low, high = rows.aminmax()  # both are NaN if any value is
        largest = float(torch.maximum(-low, high))
        if largest <= LARGEST[spec.dtype]:
            return
        bad = ~(rows.flatten(1).abs() <= LARGEST[spec.dtype]).all(1)
        where = f"in sequence {self._sequence_of(int(bad.nonzero()[0]))}"
        if math.isnan(largest):
            raise NumericsError(f"{spec.name} is NaN {where}; check the model's weights and the input")
        if math.isinf(largest):
            raise NumericsError(f"{spec.name} is infinite {where}; run the model in bfloat16 or float32")
        raise NumericsError(
            f"{spec.name} reaches {largest:.6g} {where}, beyond {spec.dtype}'s {LARGEST[spec.dtype]:g}; "
            'capture it with dtype="bfloat16" or dtype="float32" into a new directory'
        )

    def _sequence_of(self, row: int) -> int:
        lengths = self.job.plan.lengths[self.batch]
        counts = lengths if self.job.plan.positions == "all" else np.ones_like(lengths)
        return int(self.batch[np.searchsorted(np.cumsum(counts), row, side="right")])


def _is_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _raw(stored: Tensor) -> AnyArray:
    """The bits of a tensor in RAM; bfloat16, which numpy lacks, as uint16."""
    host = stored.cpu().contiguous()
    return host.view(torch.int16).numpy().view("<u2") if host.dtype == torch.bfloat16 else host.numpy()


def batch_moments(rows: Shaped[Tensor, "rows *shape"]) -> Moments:
    """Mean, centred second moment and norms of some rows, summed in float64.

    The values are shifted by their mean in float32 before they are squared, so that the sums lose no more than the rows'
    own rounding; no copy of the batch in float64 is made.
    """
    flat = rows.flatten(1).float() if rows.device.type != "mps" else rows.cpu().flatten(1).float()  # [rows, n]
    count = len(flat)
    shift = flat.mean(0)  # [n]
    centred = flat - shift
    first = centred.sum(0, dtype=torch.float64)  # [n], near 0
    second = centred.square_().sum(0, dtype=torch.float64)
    norms = torch.linalg.vector_norm(flat, dim=1).sum(dtype=torch.float64)
    shape = tuple(rows.shape[1:])
    mean = (shift.double() + first / count).cpu().numpy().reshape(shape)
    m2 = (second - first**2 / count).clamp_(min=0).cpu().numpy().reshape(shape)
    return Moments(count, mean, m2, float(norms))


