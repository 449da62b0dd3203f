"""What identifies a model, a configuration and a tokenizer: the hashes that caches and edits carry.

The weights hash belongs to the *checkpoint*: names, types, shapes and bytes as ``save_pretrained`` writes them, so
that a model in memory and the directory that it was saved to have the same hash. Mixtral, OLMoE and Qwen3-MoE hold
fused 3-D expert parameters in memory and one matrix per expert on disk; `CheckpointMap` goes between the two with
transformers' own weight conversion, one group of parameters at a time, so that memory stays bounded by the largest
fused parameter.

A weight that accelerate has offloaded (`device_map=...`, `cpu_offload`) is on the meta device in the model. It is
hashed from where it rests, one group at a time as well.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from activations_cache._device import hooks_of
from activations_cache.errors import DataError, ModelError

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of the tensor types, as the safetensors format spells them."""

_VOLATILE_CONFIG = frozenset(
    {
        "transformers_version",
        "architectures",
        "dtype",
        "torch_dtype",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "use_cache",
    }
)


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors spelling of a torch type, such as ``BF16``; other types keep torch's name."""
    return DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


class Group(NamedTuple):
    """Parameters that are converted together: names in memory, and the names that the checkpoint has for them."""

    memory: tuple[str, ...]
    checkpoint: tuple[str, ...]


class CheckpointMap:
    """The correspondence between a Hugging Face model's tensors in memory and those of its checkpoint.

    Only what ``save_pretrained`` would write is in it: a tied weight once, under the name that is kept; no
    non-persistent buffers. A model from ``from_pretrained`` maps back to the names that it was loaded from.

    Args:
        model: a Hugging Face model, or anything with one as ``.hf``.
        offloaded: accept weights that accelerate has offloaded: `state` has them on the meta device, `read` reads them.

    Raises:
        ModelError: no such model, or weights that cannot be read.
    """

    def __init__(self, model: Any, *, offloaded: bool = False) -> None:
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.hf = hf_model(model)
        forward = _conversions(self.hf)
        backward = [conversion.reverse_transform() for conversion in reversed(forward)]
        self._load = _Direction(
            [c for c in forward if isinstance(c, WeightRenaming)],
            [c for c in forward if isinstance(c, WeightConverter)],
        )
        self._save = _Direction(
            [c for c in backward if isinstance(c, WeightRenaming)],
            [c for c in backward if isinstance(c, WeightConverter)],
        )
        self.state: dict[str, Tensor] = saved_state(self.hf, offloaded=offloaded)
        self.groups: list[Group] = self._find_groups()
        self.group_of: dict[str, Group] = {name: group for group in self.groups for name in group.checkpoint}

    @property
    def names(self) -> list[str]:
        """Every tensor's checkpoint name, sorted."""
        return sorted(self.group_of)

    def read(self, group: Group) -> dict[str, Tensor]:
        """The group's tensors under their checkpoint names. Unfused ones share storage with the model's parameters."""
        return self.to_checkpoint({name: _present(self.hf, name, self.state[name]) for name in group.memory})

    def to_checkpoint(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by memory name (whole groups) -> tensors by checkpoint name."""
        return self._save.convert(tensors, self.hf, renamings_first=False)

    def to_memory(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by checkpoint name (whole groups) -> tensors by memory name: the inverse of `to_checkpoint`."""
        return self._load.convert(tensors, self.hf, renamings_first=True)

    def _find_groups(self) -> list[Group]:
        memory: dict[str, list[str]] = {}
        for name in _natural(self.state):
            key, _ = self._save.key(name, renamings_first=False)
            memory.setdefault(key, []).append(name)
        groups = []
        for names in memory.values():
            # shapes only: meta tensors run through the same conversion without touching the weights
            meta = {name: torch.empty_like(self.state[name], device="meta") for name in names}
            groups.append(Group(tuple(names), tuple(self.to_checkpoint(meta))))
        return groups


class _Direction:
    """One direction (load or save) of transformers' weight conversion."""

    def __init__(self, renamings: list[Any], converters: list[Any]) -> None:
        self.renamings = renamings
        self.converters = converters
        self.by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}

    def key(self, name: str, *, renamings_first: bool) -> tuple[str, str | None]:
        """(name after conversion, or the first of them; pattern of the converter that matched, if one did)."""
        from transformers.core_model_loading import apply_converters, apply_renamings

        if renamings_first:
            renamed, pattern = apply_converters(apply_renamings(name, self.renamings), self.converters)
            return renamed, pattern
        renamed, pattern = apply_converters(name, self.converters)
        return (renamed if pattern is not None else apply_renamings(name, self.renamings)), pattern

    def convert(self, tensors: Mapping[str, Tensor], hf: Any, *, renamings_first: bool) -> dict[str, Tensor]:
        from transformers.core_model_loading import apply_renamings

        out: dict[str, Tensor] = {}
        pending: dict[str, Any] = {}
        for name in _natural(tensors):
            key, pattern = self.key(name, renamings_first=renamings_first)
            if pattern is None:
                out[key] = tensors[name]
                continue
            if key not in pending:
                pending[key] = deepcopy(self.by_pattern[pattern])
            pending[key].add_tensor(key, name, pattern, tensors[name])
        for key, converter in pending.items():
            for target, value in converter.convert(key, model=hf, config=hf.config).items():
                final = target if renamings_first else apply_renamings(target, self.renamings)
                out[final] = value[0] if isinstance(value, list) else value
        return out


def hf_model(model: Any) -> Any:
    """The bare Hugging Face model of ``model``: itself, or its ``.hf``.

    Raises:
        ModelError: if it is neither.
    """
    hf = getattr(model, "hf", model)
    if not hasattr(hf, "state_dict") or not hasattr(hf, "config"):
        raise ModelError(
            f"A Hugging Face model (or an object with one as .hf) is required; got {type(model).__name__}. "
            "Load one with probe.load(name_or_path)."
        )
    return hf


def saved_state(hf: Any, *, offloaded: bool = False) -> dict[str, Tensor]:
    """The state that ``save_pretrained`` would write, under memory names: tied weights once, ignored keys left out.

    Args:
        hf: a Hugging Face model.
        offloaded: leave the weights that accelerate has offloaded in the state, as tensors on the meta device.

    Raises:
        ModelError: weights on the meta device, offloaded or (with `offloaded`) not even that.
    """
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = dict(hf.state_dict())
    for key in getattr(hf, "_keys_to_ignore_on_save", None) or ():
        state.pop(key, None)
    away = [name for name, tensor in state.items() if tensor.is_meta]
    lost = away if not offloaded else [name for name in away if _resting_place(hf, name) is None]
    if lost:
        raise ModelError(
            f"The model has tensors on the meta device ({lost[0]}, {len(lost)} in all): its weights cannot be read. "
            "Load it fully first."
        )
    if away:
        _drop_offloaded_ties(hf, state)
    kept: dict[str, Tensor] = remove_tied_weights_from_state_dict(state, hf)
    return kept


def _resting_place(hf: Any, name: str) -> tuple[Mapping[str, Tensor], str] | None:
    """Where accelerate keeps an offloaded tensor, and its name there: on the innermost module that has a map."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        for hook in hooks_of(hf.get_submodule(".".join(parts[:depth]))):
            weights, own = getattr(hook, "weights_map", None), ".".join(parts[depth:])
            if weights is not None:
                return weights, own
    return None


def _present(hf: Any, name: str, tensor: Tensor) -> Tensor:
    """A tensor of the state itself; one that is offloaded is read, in the type in which the model computes."""
    place = _resting_place(hf, name) if tensor.is_meta else None
    if place is None:
        return tensor
    weights, own = place
    try:
        return weights[own].to(tensor.dtype)
    except (KeyError, OSError) as error:
        raise ModelError(f"The offloaded weight {name} cannot be read ({error!r}): load the model again.") from error


def _drop_offloaded_ties(hf: Any, state: dict[str, Tensor]) -> None:
    """Leave out tied weights that are offloaded: on the meta device they share no storage by which to tell them."""
    for target, source in (getattr(hf, "all_tied_weights_keys", None) or {}).items():
        if target not in state or source not in state or not (state[target].is_meta or state[source].is_meta):
            continue
        pair = [_present(hf, name, state[name]).cpu() for name in (target, source)]
        if torch.equal(*pair):
            del state[target]


def checkpoint_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield (checkpoint name, tensor) for everything that ``save_pretrained`` would write, one group at a time.

    Args:
        model: a Hugging Face model or anything with one as ``.hf``.

    Yields:
        Names as on disk (``...experts.0.w1.weight``), tensors on the model's device in the model's types. Unfused
        tensors share storage with the parameters: do not write to them. Offloaded ones are read as they are reached.
    """
    mapping = CheckpointMap(model, offloaded=True)
    for group in mapping.groups:
        yield from mapping.read(group).items()


def weights_hash(model: Any, *, threads: int | None = None) -> str:
    """SHA-256 over the sorted (name, type, shape, SHA-256 of bytes) of the model's checkpoint, ties counted once.

    Names and tensors are the checkpoint's, so this equals `checkpoint_hash` of a directory that ``save_pretrained``
    wrote, whenever the model is in the checkpoint's own types.

    Args:
        model: a Hugging Face model or anything with one as ``.hf``.
        threads: hashing threads; default one per core, at most 8.

    Returns:
        64 hexadecimal digits.
    """
    loaders = ((name, _constant(tensor)) for name, tensor in checkpoint_tensors(model))
    return _combine(_digests(loaders, threads))


def checkpoint_hash(directory: str | os.PathLike[str], *, threads: int | None = None) -> str:
    """`weights_hash` of a checkpoint on disk, streamed tensor by tensor from its safetensors files.

    It equals `weights_hash` of the loaded model for checkpoints in the spelling that ``save_pretrained`` uses, loaded
    in their own types. Published checkpoints may differ: names without the base-model prefix (``gpt2``), a tied
    embedding under its head's name alone, left-over buffers, or a type other than the one loaded. A second copy of a
    tied embedding is counted once, as in memory.

    Args:
        directory: holds ``model.safetensors``, or shards with ``model.safetensors.index.json``.
        threads: hashing threads; default one per core, at most 8.

    Raises:
        DataError: no safetensors there, a shard missing or unreadable.
    """
    path = Path(directory)
    digests = _digests(_file_loaders(path), threads)
    return _combine(_drop_tied_copies(digests, path))


def config_hash(config: Any) -> str:
    """SHA-256 of a model configuration, without the fields that change with version, folder, type or run-time options.

    Args:
        config: a ``PretrainedConfig`` or its dictionary.
    """
    fields = config if isinstance(config, Mapping) else config.to_dict()
    return _json_hash(_stable_fields(fields))


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of what a tokenizer does: vocabulary, merges, normaliser, special tokens, chat template.

    The padding and truncation state of the last call, and the folder that it came from, do not count.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        body = json.loads(backend.to_str())
        body.pop("padding", None)
        body.pop("truncation", None)
    else:
        body = {"class": type(tokenizer).__name__, "vocab": dict(sorted(tokenizer.get_vocab().items()))}
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    return _json_hash(
        {"tokenizer": body, "special": special, "chat_template": getattr(tokenizer, "chat_template", None)}
    )


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def combine_digests(entries: Iterable[tuple[str, str, Iterable[int], str]]) -> str:
    """The weights hash of (checkpoint name, safetensors type, shape, SHA-256 of bytes) entries in any order."""
    return _combine({name: (dtype, tuple(shape), digest) for name, dtype, shape, digest in entries})


_Loader = Callable[[], Tensor]
_Digest = tuple[str, tuple[int, ...], str]


def _combine(digests: Mapping[str, _Digest]) -> str:
    total = hashlib.sha256()
    for name in sorted(digests):
        dtype, shape, digest = digests[name]
        total.update(f"{name}\t{dtype}\t{','.join(map(str, shape))}\t{digest}\n".encode())
    return total.hexdigest()


def _digests(loaders: Iterable[tuple[str, _Loader]], threads: int | None) -> dict[str, _Digest]:
    """Hash tensors on a thread pool (hashlib releases the GIL), holding at most two per thread at a time."""
    workers = threads or min(8, os.cpu_count() or 1)
    found: dict[str, _Digest] = {}
    waiting: deque[tuple[str, Future[_Digest]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for name, load in loaders:
            waiting.append((name, pool.submit(_digest, load)))
            if len(waiting) >= 2 * workers:
                done, future = waiting.popleft()
                found[done] = future.result()
        found.update((name, future.result()) for name, future in waiting)
    return found


def _digest(load: _Loader) -> _Digest:
    tensor = load()
    return dtype_name(tensor.dtype), tuple(tensor.shape), tensor_digest(tensor)


def _constant(tensor: Tensor) -> _Loader:
    return lambda: tensor


def checkpoint_files(directory: str | os.PathLike[str]) -> dict[str, Path]:
    """Checkpoint name -> the safetensors file that holds it, for a single-file or sharded checkpoint.

    Raises:
        DataError: no safetensors there, a shard missing or unreadable, or a tensor that its shard lacks.
    """
    path = Path(directory)
    index = path / "model.safetensors.index.json"
    single = path / "model.safetensors"
    if index.is_file():
        named: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        held = {file: set(_open_names(path / file)) for file in sorted(set(named.values()))}
        lost = sorted(name for name, file in named.items() if name not in held[file])
        if lost:
            raise DataError(f"{index} names tensors that its shards lack ({lost[0]}, {len(lost)} in all): incomplete.")
        return {name: path / file for name, file in named.items()}
    if single.is_file():
        return dict.fromkeys(_open_names(single), single)
    raise DataError(
        f"A checkpoint with model.safetensors (or its index and shards) is required; {path} has neither. "
        "Save it with save_pretrained, which writes safetensors."
    )


def _open_names(file: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise DataError(f"The checkpoint's shard {file} is missing: download or save the checkpoint again.")
    try:
        with safe_open(file, framework="pt") as handle:
            return list(handle.keys())
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file} is no readable safetensors file ({error}): download or save it again.") from error


def _file_loaders(path: Path) -> Iterator[tuple[str, _Loader]]:
    from safetensors import safe_open

    by_file: dict[Path, list[str]] = {}
    for name, file in checkpoint_files(path).items():
        by_file.setdefault(file, []).append(name)
    for file, names in sorted(by_file.items()):
        with safe_open(file, framework="pt") as handle:
            for name in names:
                yield name, _constant(handle.get_tensor(name))


def _drop_tied_copies(digests: dict[str, _Digest], path: Path) -> dict[str, _Digest]:
    """Where the configuration ties embeddings, leave out an output head that is the same bytes as another tensor."""
    config = path / "config.json"
    fields = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if not fields.get("tie_word_embeddings", False):
        return digests
    heads = {name for name in digests if name.split(".")[-2:] in (["lm_head", "weight"], ["embed_out", "weight"])}
    others = {digest for name, digest in digests.items() if name not in heads}
    return {name: digest for name, digest in digests.items() if name not in heads or digest not in others}


def _conversions(hf: Any) -> list[Any]:
    """The weight conversions that loaded the model, or those that its class would be saved with."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    used = getattr(hf, "_weight_conversions", None)
    if used is not None:
        return list(used)
    # As in save_pretrained: without a load there is no telling whether a prefix was there, so none is changed.
    return [c for c in get_model_conversion_mapping(hf, add_legacy=False) if not isinstance(c, PrefixChange)]


def _natural(names: Iterable[str]) -> list[str]:
    """Names sorted with their numbers as numbers: experts.2 before experts.10, as transformers stacks them."""
    from transformers.core_model_loading import dot_natural_key

    return sorted(names, key=dot_natural_key)


def _stable_fields(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            str(k): _stable_fields(v)
            for k, v in value.items()
            if str(k) not in _VOLATILE_CONFIG and not str(k).startswith("_")
        }
    return [_stable_fields(v) for v in value] if isinstance(value, list | tuple) else value


def _json_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
