"""Export an edited model as a Hugging Face directory, with its record, and prove that it reloads to the same logits.

The directory appears whole or not at all: it is written beside its place, checked there, and renamed. The check is part
of the export: the weights on disk have the hash of the edited model in memory, and a fresh process with transformers
alone gives its logits bit for bit.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probe.editing import Edit
from probe.editing.edit import bare
from probe.errors import ExportError

__all__ = ["ExportResult", "export"]


@dataclass(frozen=True)
class ExportResult:
    """An exported directory; usable wherever a path is.

    Attributes:
        path: The directory.
        weights_hash: Of the weights in it.
        verified: Whether a fresh process reloaded it to the same logits.
    """

    path: Path
    weights_hash: str
    verified: bool

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def _repr_html_(self) -> str:
        check = "reloads bit for bit in a fresh process" if self.verified else "not checked"
        return f"<p><b>{self.path}</b>: weights {self.weights_hash[:12]}, {check}</p>"


def export(
    model: Any,
    edit: Edit | None,
    out: str | Path,
    *,
    overwrite: bool = False,
    verify: bool = True,
    dtype: torch.dtype | str | None = None,
) -> ExportResult:
    """Write the edited model as a directory that `transformers.AutoModelForCausalLM.from_pretrained` loads.

    Tokenizer, chat template and generation configuration come along; `edit.json`, `edit.safetensors` and a model card
    (`README.md`) lie beside the weights. The model in memory is as before afterwards.

    Args:
        model: The base model: a `probe` Model, or a bare Hugging Face model (then no tokenizer is written).
        edit: What to apply; None exports the model as it is.
        out: The directory to make.
        overwrite: Replace an earlier model directory at `out`.
        verify: Reload in a fresh process and compare the logits bit for bit.
        dtype: Store in this floating-point type; default the model's own. Takes a second copy of the model in memory.

    Returns:
        The path, the weights hash, and whether it was verified.

    Raises:
        ExportError: `out` exists, `edit` is no edit (filters cannot be exported), the disk refuses, or the reload gives
            other weights or logits; nothing is left at `out` then.
        BaseMismatchError: the edit was made for another model.
    """
    if edit is not None and not isinstance(edit, Edit):
        raise ExportError(
            f"Only weight edits can be exported; got {type(edit).__name__}. A filter acts at inference and is not in "
            "the weights: use it with applied(model)."
        )
    hf = bare(model)
    place = Path(out).absolute()
    _check_place(place, overwrite, str(getattr(model, "name", "")))
    with _beside(place) as folder, _edited(model, hf, edit) as _, _as_type(hf, _dtype(dtype)) as exported:
        weights = _write(exported, getattr(model, "tokenizer", None), folder)
        _write_record(folder, edit, weights, verify)
        if verify:
            _check_reload(exported, folder)
        _move(folder, place)
    return ExportResult(place, weights, verify)


def _check_place(place: Path, overwrite: bool, base: str) -> None:
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    if base and Path(base).exists() and Path(base).resolve() == place.resolve():
        raise ExportError(f"{place} holds the base model; export to another directory.")
    if not overwrite:
        raise ExportError(f"{place} exists; choose another directory, or pass overwrite=True.")
    if not place.is_dir() or not (place / "config.json").is_file():
        raise ExportError(f"{place} is not a model directory, so it is not overwritten; choose another.")


@contextmanager
def _beside(place: Path) -> Iterator[Path]:
    """A folder on the disk of `place`, gone afterwards if it was not renamed. Disk errors end as `ExportError`."""
    from safetensors import SafetensorError

    folder: Path | None = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
        yield folder
    except (OSError, SafetensorError) as error:
        raise ExportError(f"The model could not be written to {place}: {error}. Nothing was left there.") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _edited(model: Any, hf: Any, edit: Edit | None) -> Iterator[None]:
    """The model edited, in eval mode, and as it was afterwards (saving writes to its configuration)."""
    training, config = hf.training, hf.config
    kept = {key: getattr(config, key) for key in ("dtype", "architectures") if hasattr(config, key)}
    with edit.applied(model) if edit is not None else nullcontext():
        hf.eval()
        try:
            yield
        finally:
            hf.train(training)
            for key, value in kept.items():
                setattr(config, key, value)


@contextmanager
def _as_type(hf: Any, dtype: torch.dtype | None) -> Iterator[Any]:
    """The model itself, or a copy with its parameters in another type (buffers stay, as in `from_pretrained`)."""
    if dtype is None or all(p.dtype == dtype for p in hf.parameters()):
        yield hf
        return
    twin = copy.deepcopy(hf)
    for parameter in twin.parameters():
        parameter.data = parameter.data.to(dtype)
    yield twin


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    made = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(made, torch.dtype) or not made.is_floating_point:
        raise ExportError(f"dtype must be a floating-point type such as 'bfloat16'; got {dtype!r}.")
    return made


def _write(hf: Any, tokenizer: Any, folder: Path) -> str:
    """Save the model and its tokenizer; the weights hash, equal on disk and in memory."""
    from activations_cache.hashing import checkpoint_hash, weights_hash

    try:
        hf.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except ValueError as error:  # transformers refuses a generation configuration that contradicts itself, say
        raise ExportError(f"transformers refuses to save this model: {' '.join(str(error).split())}") from error
    in_memory, on_disk = weights_hash(hf), checkpoint_hash(folder)
    if in_memory != on_disk:
        raise ExportError(
            f"The weights written ({on_disk[:12]}) are not those in memory ({in_memory[:12]}): save_pretrained changed "
            "them for this class. Nothing was exported."
        )
    return on_disk


def _write_record(folder: Path, edit: Edit | None, weights: str, verified: bool) -> None:
    if edit is not None:
        edit.save(folder)
    (folder / "README.md").write_text(_card(edit, weights, verified), encoding="utf-8")


def _check_reload(hf: Any, folder: Path) -> None:
    """Raise `ExportError` unless a fresh process gives the logits of the model in memory, bit for bit."""
    inputs = _inputs(hf)
    expected = _logits(hf, inputs)
    found = _reloaded_logits(hf, folder, inputs)
    if found.shape == expected.shape and found.dtype == expected.dtype:
        if torch.equal(_bits(found), _bits(expected)):
            return
        worst = float((found.double() - expected.double()).abs().max())
        detail = f"the largest difference is {worst:.3g}"
    else:
        detail = f"{tuple(found.shape)} {found.dtype} against {tuple(expected.shape)} {expected.dtype}"
    raise ExportError(
        f"The exported directory reloads to other logits ({detail}), though its weights are those in memory. "
        f"{_suspects(hf)} Nothing was exported."
    )


def _suspects(hf: Any) -> str:
    """What of the model is not in its weights: buffers of another type than loading gives them, else hooks."""
    with torch.device("meta"):
        fresh = type(hf)._from_config(copy.deepcopy(hf.config), dtype=hf.dtype)
    types = {name: buffer.dtype for name, buffer in fresh.named_buffers()}
    odd = [name for name, buffer in hf.named_buffers() if types.get(name, buffer.dtype) != buffer.dtype]
    if odd:
        return (
            f"Its buffer {odd[0]} is not of the type that loading gives it ({types[odd[0]]}): load the model with "
            "dtype=... instead of converting it with .to(...)."
        )
    return "Hooks on the model, or settings that are not saved, do that."


def _inputs(hf: Any) -> dict[str, Tensor]:
    """Fixed token ids, two rows of up to 16, with their mask."""
    vocabulary = hf.get_input_embeddings().weight.shape[0]
    longest = getattr(hf.config.get_text_config(), "max_position_embeddings", None) or 16
    length = min(16, longest)
    ids = (torch.arange(2 * length).reshape(2, length) * 7 + 3) % vocabulary
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def _logits(hf: Any, inputs: dict[str, Tensor]) -> Float[Tensor, "batch pos d_vocab"]:
    device = next(hf.parameters()).device
    logits: Tensor = hf(**{name: ids.to(device) for name, ids in inputs.items()}, use_cache=False).logits
    return logits.cpu()


def _reloaded_logits(hf: Any, folder: Path, inputs: dict[str, Tensor]) -> Float[Tensor, "batch pos d_vocab"]:
    from safetensors.torch import load_file, save_file

    settings = {"attn_implementation": hf.config._attn_implementation, "trust_remote_code": hf.is_remote_code()}
    experts = getattr(hf.config, "_experts_implementation", None)
    if experts is not None:
        settings["experts_implementation"] = experts
    with tempfile.TemporaryDirectory(prefix=".check.", dir=folder.parent) as scratch:
        files = {
            "inputs": str(Path(scratch, "inputs.safetensors")),
            "outputs": str(Path(scratch, "logits.safetensors")),
        }
        save_file(inputs, files["inputs"])
        order = {
            "directory": str(folder),
            "settings": settings,
            "device": str(next(hf.parameters()).device),
            "threads": torch.get_num_threads(),
            "matmul_precision": torch.get_float32_matmul_precision(),
            **files,
        }
        _run_fresh(order)
        return load_file(files["outputs"])["logits"]


def _run_fresh(order: dict[str, Any]) -> None:
    script = Path(__file__).with_name("_reload_check.py")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    environment["OMP_NUM_THREADS"] = str(order["threads"])
    done = subprocess.run(  # -P: nothing of this folder shadows a library
        [sys.executable, "-P", str(script)],
        input=json.dumps(order),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise ExportError(
            f"The exported directory does not load in a fresh process: {lines[-1]}. Nothing was exported."
        )


def _move(folder: Path, place: Path) -> None:
    """Rename the finished folder to its place; an earlier directory there goes only once the new one is in it."""
    folder.chmod(0o755)
    if not place.exists():
        folder.rename(place)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{place.name}.old.", dir=place.parent))
    earlier = old / place.name
    place.rename(earlier)
    try:
        folder.rename(place)
    except OSError:
        earlier.rename(place)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _card(edit: Edit | None, weights: str, verified: bool) -> str:
    """The model card: what was done to which model, and how to load the result."""
    base = "" if edit is None else str(edit.base.get("name") or "the base model")
    lines = ["---", "library_name: transformers", "tags:", "- probe-workbench", "---", ""]
    lines += ["# " + (f"{Path(base).name}, edited" if edit is not None else "Exported model"), ""]
    lines += _card_steps(edit) if edit is not None else ["Exported unchanged.", ""]
    lines += [
        "```python",
        "from transformers import AutoModelForCausalLM",
        'model = AutoModelForCausalLM.from_pretrained("this directory")',
        "```",
        "",
        f"Weights (SHA-256 over names, types, shapes and bytes): `{weights}`.",
        "Reloaded in a fresh process to the same logits, bit for bit." if verified else "The reload was not checked.",
        "",
    ]
    return "\n".join(lines)


def _card_steps(edit: Edit) -> list[str]:
    lines = [f"Base: {edit.base.get('name') or 'unnamed'} (weights `{edit.base_hash}`).", "", "## What was done", ""]
    for step in edit.steps:
        settings = ", ".join(f"{key} {value}" for key, value in step.settings.items())
        counts = {"changed": step.changes, "added": step.added, "removed": step.removed, "renamed": step.renamed}
        words = ", ".join(f"{len(names)} {what}" for what, names in counts.items() if names)
        lines.append(f"- **{step.method}** ({settings or 'no settings'}): tensors {words}")
        if step.target:
            shown = {key: value for key, value in step.target.items() if key not in ("basis", "model_hash")}
            lines.append(f"  - target: {json.dumps(shown)[:300]}")
        if step.config_patch:
            lines.append(f"  - configuration: {json.dumps(dict(step.config_patch))}")
        lines += [f"  - {note}" for note in step.notes]
    if edit.audit:
        lines += ["", "## Audit", "", f"```json\n{json.dumps(edit.audit, indent=1)[:4000]}\n```"]
    lines += ["", "The whole record is in `edit.json`, the change in `edit.safetensors`.", ""]
    return lines
