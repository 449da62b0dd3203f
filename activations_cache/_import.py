"""Import of the directories that SAELens's `CacheActivationsRunner` writes, into the format of this package."""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from activations_cache import hashing, store
from activations_cache import sites as site_catalogue
from activations_cache._batches import torch_type
from activations_cache._capture import disk_errors
from activations_cache._job import Job, data_entry, libraries, model_entry
from activations_cache._job import _plan_entry as plan_entry
from activations_cache._job import _tokenizer_entry as tokenizer_entry
from activations_cache._ledger import Ledger
from activations_cache._reader import BLOCK_BYTES, UNKNOWN, block_moments
from activations_cache._spool import FlatArray
from activations_cache.errors import CacheMismatchError, DataError, NumericsError, SiteError
from activations_cache.plan import Shard, default_shard_rows, make_plan
from activations_cache.positions import select
from activations_cache.store import AnyArray, ShardBuffer, SiteSpec, Storage, json_digest
from activations_cache.tokens import Tokens

if TYPE_CHECKING:
    from activations_cache.cache import Cache

TOKENS = "token_ids"
ID_CONTEXTS = 1024  # contexts whose ids are read at once
TOLERANCE = 0.02  # relative distance of imported rows from the model's own: float16 and autocast stay far below it
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Contexts:
    """A SAELens directory: `n` contexts of equal length, their token ids and the activations of one hook.

    Attributes:
        directory: Where it lies.
        dataset: The Hugging Face dataset, memory-mapped.
        hook: Name of the hook.
        length: Tokens of a context.
        width: Elements of a row.
        dtype: Type of the values.
    """

    directory: Path
    dataset: Any
    hook: str
    length: int
    width: int
    dtype: str

    def __len__(self) -> int:
        return len(self.dataset)

    def ids(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Token ids of some contexts [contexts, length]."""
        found = np.asarray(self.dataset[start:stop][TOKENS])
        if found.shape != (stop - start, self.length) or found.min() < 0:
            raise DataError(
                f"{self.directory}: contexts {start} to {stop - 1} do not have {self.length} token ids each"
            )
        return found.astype(np.int32)

    def rows(self, start: int, stop: int) -> AnyArray:
        """Activations of some contexts [contexts * length, width]."""
        return np.asarray(self.dataset[start:stop][self.hook]).reshape(-1, self.width)


def import_saelens(
    directory: str | Path,
    out: str | Path,
    *,
    site: str | None = None,
    model: Any = None,
    tokenizer: Any = None,
    dtype: str | torch.dtype | None = None,
    shard_rows: int | None = None,
    progress: bool = True,
) -> Cache:
    """Make a cache of a directory of activations that SAELens's `CacheActivationsRunner` has written.

    Such a directory is a Hugging Face dataset of contexts of one length, with the token ids and one hook's activations.
    Each context becomes a sequence; its rows get the positions in it. Memory is a shard's. An interrupted import goes
    on where it stopped when it is called again.

    SAELens does not write down which model it was. Without `model`, the name and hashes of the model are "unknown",
    and the cache cannot be joined with others. With it, the model's facts are recorded after the first context was run
    through it and gave the imported activations.

    Args:
        directory: What `CacheActivationsRunner` wrote (`new_cached_activations_path`).
        out: The cache directory; made if need be.
        site: Name of the site in the cache; None takes SAELens's hook name. Needed with `model` where that is the name
            of a Hugging Face module ("transformer.h.3" is "blocks.3.hook_resid_post").
        model: The model that the activations are of, as in `capture`.
        tokenizer: For the record; by default `model.tokenizer`.
        dtype: Storage type; None keeps the directory's.
        shard_rows: Rows per shard; None aims at 128 MiB.
        progress: Show a progress bar.

    Returns:
        The cache, opened.

    Raises:
        DataError: The directory is not one that SAELens wrote, or a setting is out of range.
        SiteError: The model has no such site.
        CacheMismatchError: The model does not give these activations; `out` holds another cache.
        CacheError: `out` is not empty and holds no cache, or cannot be written.
        NumericsError: A value is not finite, or does not fit `dtype`.
    """
    from activations_cache.cache import open as open_cache

    contexts = read_contexts(Path(directory))
    storage = _storage(contexts, dtype)
    spec = _spec(contexts, site, model, storage)
    if shard_rows is None:
        shard_rows = default_shard_rows(spec.row_bytes, contexts.length)
    if model is not None:
        _check_model(contexts, spec, model)
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    job = _job(contexts, spec, shard_rows, model, tokenizer, Path(out))
    with disk_errors(job):
        job.out.mkdir(parents=True, exist_ok=True)
        with store.writer_lock(job.out):
            _copy(contexts, job, progress)
    return open_cache(out)


# --- the SAELens side -----------------------------------------------------------------------------------------------


def read_contexts(directory: Path) -> Contexts:
    """Open a SAELens directory.

    Raises:
        DataError: It is none.
    """
    wanted = "a directory that SAELens's CacheActivationsRunner wrote is required"
    if not (directory / "state.json").is_file() or not (directory / "dataset_info.json").is_file():
        raise DataError(f"{directory} is no Hugging Face dataset written with save_to_disk; {wanted}")
    from datasets import Array2D, Dataset

    try:
        dataset = Dataset.load_from_disk(str(directory)).with_format("numpy")
    except (ValueError, OSError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{directory} cannot be read as a Hugging Face dataset ({error}); {wanted}") from error
    hooks = [name for name, feature in dataset.features.items() if isinstance(feature, Array2D)]
    if len(hooks) != 1 or set(dataset.features) != {hooks[0], TOKENS} or not len(dataset):
        columns = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in dataset.features.items())
        raise DataError(
            f"{directory} has {len(dataset)} rows with the columns {columns or 'none'}; {wanted}: one column of "
            f"activations (Array2D) and {TOKENS}"
        )
    length, width = dataset.features[hooks[0]].shape
    return Contexts(directory, dataset, hooks[0], length, width, dataset.features[hooks[0]].dtype)


def _storage(contexts: Contexts, dtype: str | torch.dtype | None) -> Storage:
    name = contexts.dtype if dtype is None else str(torch_type(dtype)).removeprefix("torch.")
    if name not in ("float16", "bfloat16", "float32"):
        raise DataError(f"activations cannot be stored as {name}; pass dtype= float16, bfloat16 or float32")
    return cast(Storage, name)


def _spec(contexts: Contexts, site: str | None, model: Any, dtype: Storage) -> SiteSpec:
    """How the site is stored; with a model under its canonical name and in its shape."""
    name = contexts.hook if site is None else site
    if model is None:
        layer = _LAYER.search(name)
        kind = name.rpartition(".")[2].removeprefix("hook_")
        if not name or "/" in name or "\0" in name:
            raise DataError(f"a site cannot be named {name!r}; pass site=")
        return SiteSpec(name, dtype, (contexts.width,), (), kind, int(layer[1]) if layer else None)
    try:
        (found,) = site_catalogue.Sites(model).resolve(name)
    except (SiteError, ValueError) as error:
        raise SiteError(f"{error}; pass the name of the site that {contexts.hook!r} is, as site=") from error
    if int(np.prod(found.shape)) != contexts.width:
        raise CacheMismatchError(f"{contexts.hook} has rows of {contexts.width}; {found.name} has {list(found.shape)}")
    return SiteSpec(found.name, dtype, tuple(found.shape), tuple(found.aliases), found.kind, found.layer)


def _check_model(contexts: Contexts, spec: SiteSpec, model: Any) -> None:
    """Run the first context through the model and compare."""
    ids = torch.from_numpy(contexts.ids(0, 1)).long()
    hf = hashing.hf_model(model)
    vocabulary = hf.get_input_embeddings().weight.shape[0]
    if int(ids.max()) >= vocabulary:
        raise CacheMismatchError(f"{contexts.directory} has token id {int(ids.max())}; the model has {vocabulary}")
    with torch.no_grad(), _eval(hf):
        found = site_catalogue.run(model, {"input_ids": ids.to(hf.device)}, read=spec.name).values[spec.name]
    own = found.reshape(contexts.length, contexts.width).double().cpu()
    held = torch.from_numpy(contexts.rows(0, 1).astype(np.float64))
    distance = float((own - held).norm() / own.norm())
    if not distance <= TOLERANCE:
        raise CacheMismatchError(
            f"the model does not give the activations of {contexts.directory}: at {spec.name} the first context "
            f"differs by {distance:.3g} of their norm ({TOLERANCE} is allowed). Is it another model or another site?"
        )


@contextmanager
def _eval(hf: Any) -> Iterator[None]:
    modes = [(module, module.training) for module in hf.modules()]
    hf.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


# --- the cache side -------------------------------------------------------------------------------------------------


def _job(contexts: Contexts, spec: SiteSpec, shard_rows: int, model: Any, tokenizer: Any, out: Path) -> Job:
    """The import as a capture that needs no forward."""
    tokens = _tokens(contexts, getattr(tokenizer, "bos_token_id", None))
    selection = select(tokens, "all")
    plan = make_plan(tokens.lengths, selection.counts, batch_tokens=contexts.length, shard_rows=shard_rows)
    manifest = _manifest(contexts, spec, shard_rows, model, tokenizer) | {"data": data_entry(tokens, selection, {})}
    manifest["plan"] = plan_entry(plan)
    manifest["identity"] = json_digest([manifest, _values_digest(contexts)])
    manifest |= {"libraries": libraries(), "machine": {"device": "imported", "platform": platform.platform()}}
    manifest |= {"created": datetime.now(UTC).isoformat(timespec="seconds")}
    hf = None if model is None else hashing.hf_model(model)
    return Job(hf, tokens, selection, {}, (spec,), plan, manifest, out, {})


def _tokens(contexts: Contexts, bos_id: int | None) -> Tokens:
    """The contexts' ids, in a temporary file where they are many."""
    flat, bos = FlatArray(np.int32), bos_id is not None
    for start in range(0, len(contexts), ID_CONTEXTS):
        ids = contexts.ids(start, min(start + ID_CONTEXTS, len(contexts)))
        bos = bos and bool((ids[:, 0] == bos_id).all())
        flat.extend(ids.reshape(-1))
    return Tokens(flat.finish(), np.arange(len(contexts) + 1, dtype=np.int64) * contexts.length, bos=bos)


def _manifest(contexts: Contexts, spec: SiteSpec, shard_rows: int, model: Any, tokenizer: Any) -> dict[str, Any]:
    """The fields that do not follow from the tokens."""
    settings: dict[str, Any] = {"positions": "all", "pool": None, "n_tokens": None, "logprobs": False}
    settings |= {"dtype": spec.dtype, "compression": None, "batch_tokens": contexts.length, "shard_rows": shard_rows}
    settings |= {"max_length": contexts.length, "bos": None, "chat": False, "overflow": "truncate"}
    blank = dict.fromkeys(("name", "class", "config_hash", "weights_hash", "dtype"), UNKNOWN) | {"attention": None}
    return {
        "format": store.FORMAT,
        "version": store.VERSION,
        "finished": False,
        "identity": "",
        "model": blank if model is None else model_entry(hashing.hf_model(model), model),
        "tokenizer": tokenizer_entry(tokenizer),
        "sites": [spec.to_json()],
        "settings": settings,
        "source": {"program": "sae_lens", "hook_name": contexts.hook},
        "rows": 0,
        "statistics": {},
        "shards": [],
    }


def _values_digest(contexts: Contexts) -> str:
    """SHA-256 over the first and the last context's activations: other activations of the same tokens differ there."""
    digest = hashlib.sha256()
    for number in (0, len(contexts) - 1):
        digest.update(np.ascontiguousarray(contexts.rows(number, number + 1)).tobytes())
    return digest.hexdigest()


def _copy(contexts: Contexts, job: Job, progress: bool) -> None:
    """Write every shard that is not committed yet, and commit each."""
    from tqdm.auto import tqdm

    ledger = Ledger(job, progress)
    for shard in tqdm(ledger.todo, desc="import", unit="shard", disable=not progress):
        buffer = _buffer(contexts, job, shard)
        entry = store.write_shard(job.out, shard.file, buffer, job.specs, job.manifest["identity"])
        ledger.commit(shard, entry, buffer.moments)


def _buffer(contexts: Contexts, job: Job, shard: Shard) -> ShardBuffer:
    """One shard, read a few MiB at a time."""
    (spec,), first, stop = job.specs, shard.first_sequence, shard.first_sequence + shard.sequences
    buffer = ShardBuffer.allocate(job.specs, shard, job.tokens, job.selection, {})
    step = max(1, BLOCK_BYTES // (contexts.length * spec.row_bytes))
    for start in range(first, stop, step):
        numbers = range(start, min(start + step, stop))
        values = _stored(contexts, spec, numbers)
        buffer.moments[spec.name].add(block_moments(values))
        raw = values.view(torch.int16).numpy().view("<u2") if spec.dtype == "bfloat16" else values.numpy()
        buffer.put(spec.name, numbers, raw)
    return buffer


def _stored(contexts: Contexts, spec: SiteSpec, numbers: range) -> Tensor:
    """The rows of some contexts in the storage type."""
    held = torch.tensor(contexts.rows(numbers.start, numbers.stop))
    values = held.to(store.TORCH_TYPES[spec.dtype]).reshape(-1, *spec.shape)
    if not torch.isfinite(values).all():
        what = f"that {spec.dtype} cannot hold" if torch.isfinite(held).all() else "that is not finite"
        which = f"contexts {numbers.start} to {numbers.stop - 1}"
        raise NumericsError(f"{contexts.directory}, {which}: there is a value {what}; pass another dtype, or mend it")
    return values
