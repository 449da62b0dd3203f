"""The exact edit between two checkpoints, in memory or on disk, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from activations_cache.errors import ActivationsCacheError
from activations_cache.hashing import (
    CheckpointMap,
    checkpoint_files,
    checkpoint_hash,
    config_hash,
    weights_hash,
)
from probe.editing.entries import smallest_replacement
from probe.editing.steps import Change, Step
from probe.errors import EditError

_HEADS = ("lm_head.weight", "embed_out.weight")


@dataclass(frozen=True)
class _Checkpoint:
    """One side of the comparison: tensor names in reading order, a reader, the configuration's fields."""

    names: list[str]
    read: Callable[[str], Tensor]
    config: dict[str, Any]
    name: str
    architecture: str
    digest: Callable[[], str]

    @property
    def tied(self) -> bool:
        return bool(self.config.get("tie_word_embeddings", False))


def difference(base: Any, edited: Any, method: str, notes: tuple[str, ...]) -> tuple[Step, dict[str, Any]]:
    """The step from `base` to `edited`, and the record's words for the base."""
    try:
        old, new = _open(base), _open(edited)
        changes, added, patch = _compare(old, new)
        weights = old.digest()
    except ActivationsCacheError as error:
        raise EditError(str(error)) from error
    if not changes and not added:
        raise EditError("The two models have the same weights: there is no edit between them.")
    step = Step(method, weights, changes, added=added, config_patch=patch, settings={"edited": new.name}, notes=notes)
    described = {
        "name": old.name,
        "class": old.architecture,
        "model_type": str(old.config.get("model_type", "")),
        "weights_hash": weights,
        "config_hash": config_hash(old.config),
    }
    return step, described


def _compare(old: _Checkpoint, new: _Checkpoint) -> tuple[dict[str, Change], dict[str, Tensor | str], dict[str, Any]]:
    extra = sorted(set(new.names) - set(old.names))
    missing = sorted(set(old.names) - set(new.names))
    untied = old.tied and not new.tied and len(extra) == 1 and extra[0].endswith(_HEADS)
    if missing or (extra and not untied):
        raise EditError(
            f"The models are not of one architecture: {(missing or extra)[0]} is in "
            f"{'the base' if missing else 'the edited model'} alone ({len(missing)} and {len(extra)} such tensors)."
        )
    changes = {}
    for name in old.names:
        before, after = old.read(name), new.read(name)
        if before.shape != after.shape or before.dtype != after.dtype:
            raise EditError(
                f"{name} is {tuple(before.shape)} {before.dtype} in the base and {tuple(after.shape)} {after.dtype} in "
                "the edited model; load both in one type, and give models of one architecture."
            )
        entry = smallest_replacement(before, after.to(before.device))
        if entry is not None:
            changes[name] = Change.of(entry, before)
    added: dict[str, Tensor | str] = {name: new.read(name).cpu().clone() for name in extra}
    return changes, added, {"tie_word_embeddings": False} if untied else {}


def _open(source: Any) -> _Checkpoint:
    return _on_disk(Path(source)) if isinstance(source, str | Path) else _in_memory(source)


def _in_memory(model: Any) -> _Checkpoint:
    from probe.editing.edit import bare

    hf = bare(model)
    mapping = CheckpointMap(hf)
    last: dict[str, Any] = {"group": None, "tensors": {}}

    def read(name: str) -> Tensor:
        group = mapping.group_of[name]
        if last["group"] is not group:  # a fused parameter is taken apart once, not once an expert
            last.update(group=group, tensors=mapping.read(group))
        tensor: Tensor = last["tensors"][name].detach()
        return tensor

    names = [name for group in mapping.groups for name in group.checkpoint]
    label = str(getattr(model, "name", "") or getattr(hf.config, "_name_or_path", ""))
    config = hf.config.get_text_config().to_dict()
    return _Checkpoint(names, read, config, label, type(hf).__name__, lambda: weights_hash(hf))


def _on_disk(path: Path) -> _Checkpoint:
    from safetensors import safe_open

    files = checkpoint_files(path)
    config_file = path / "config.json"
    if not config_file.is_file():
        raise EditError(f"{path} has no config.json: a Hugging Face model directory is required.")
    config = json.loads(config_file.read_text(encoding="utf-8"))

    def read(name: str) -> Tensor:
        with safe_open(files[name], framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(name)
        return tensor

    tied = bool(config.get("tie_word_embeddings", False))
    names = [name for name in files if not (tied and name.endswith(_HEADS))]
    if tied and not any("emb" in name or "wte" in name for name in names):
        raise EditError(
            f"{path} holds a tied embedding under its head's name only, which is not how save_pretrained writes it; "
            "load both models and pass them instead of directories."
        )
    architecture = str((config.get("architectures") or [""])[0])
    return _Checkpoint(names, read, config, str(path), architecture, lambda: checkpoint_hash(path))
