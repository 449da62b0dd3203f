"""`Edit`: a change of one base model's weights, not yet applied, with its record.

edit = probe.editing.project_out(model, direction)
with edit.applied(model):
    ...                                   # the edited model
edit.save("edits/direction")              # edit.json and edit.safetensors
both = edit + other                       # in this order
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from probe.editing import _format
from probe.editing._apply import Application
from probe.editing.steps import Step
from probe.errors import EditError, TargetError

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

__all__ = ["Edit"]

# What is applied to each model at the moment, innermost last.
_APPLIED: WeakKeyDictionary[nn.Module, list[tuple[Edit, Application]]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False, repr=False)
class Edit:
    """Changes of one base model's weights, in order, with what they were made from. Made by the functions of this room.

    Attributes:
        steps: What each method did; several after composition.
        base: Name, class, weights hash and config hash of the model that the first step was made for.
        versions: Of the libraries that made it.
        audit: Summary of an audit, where there was one.
    """

    steps: tuple[Step, ...]
    base: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=dict)
    audit: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.steps:
            raise EditError("An edit needs at least one step.")

    @classmethod
    def of(cls, model: Any, step: Step) -> Edit:
        """An edit of one step, for the model that it was computed from."""
        return cls((step,), describe_base(model, step.base_hash), library_versions())

    @classmethod
    def from_models(cls, base: Any, edited: Any, *, method: str = "difference", notes: tuple[str, ...] = ()) -> Edit:
        """The edit that turns one model into another of the same architecture, exactly.

        So other people's edited or unlearned checkpoints can be audited and compared. Each tensor is replaced by the
        smallest of rows, columns or all of its values; equal tensors are left out. Directories are streamed.

        Args:
            base: A model in memory, or a checkpoint directory.
            edited: The same.
            method: Name for the record.
            notes: Remarks for the record.

        Raises:
            EditError: other tensors, shapes or types, or no difference.
        """
        from probe.editing._difference import difference

        step, described = difference(base, edited, method, notes)
        return cls((step,), described, library_versions())

    @classmethod
    def compose(cls, *edits: Edit) -> Edit:
        """All the edits, one after the other.

        Each must have been made for the first one's base, or for the model with the earlier ones applied (this is
        checked when they are applied). Low-rank changes of one tensor add up; of two replacements of the same values
        the later one holds: see `conflicts`.

        Raises:
            EditError: no edits, or edits of models with other tensors.
        """
        if not edits:
            raise EditError("compose needs at least one edit.")
        steps: list[Step] = []
        for step in (step for edit in edits for step in edit.steps):
            steps.append(_without_repeats(step, steps))
        return cls(tuple(steps), edits[0].base, library_versions())

    def __add__(self, other: Edit) -> Edit:
        if not isinstance(other, Edit):
            return NotImplemented
        return Edit.compose(self, other)

    @contextmanager
    def applied(self, model: Any, *, force: bool = False) -> Iterator[Any]:
        """The edited model inside the block; the original bits on the way out, also after an exception.

        Parameters are changed in place. Where an edit reshapes or unties tensors they get new storage inside the block:
        take `model.bridge` again there.

        Args:
            model: The base model: a `probe` Model or a bare Hugging Face model.
            force: Apply to a model with other weights as well.

        Yields:
            `model`.

        Raises:
            BaseMismatchError: the model's weights are not the base's, and `force` is false.
            EditError: the edit does not fit the model.
        """
        hf = bare(model)
        application = self._apply(hf, force)
        try:
            yield model
        finally:
            _unwind(hf, application)

    def apply_(self, model: Any, *, force: bool = False) -> Any:
        """Edit the model until `revert_`. Arguments and errors as in `applied`; returns `model`."""
        self._apply(bare(model), force)
        return model

    def revert_(self, model: Any) -> Any:
        """Undo `apply_`, bit for bit; returns `model`.

        Raises:
            EditError: the edit is not applied to the model, or another was applied after it.
        """
        hf = bare(model)
        stack = _APPLIED.get(hf, [])
        if not any(edit is self for edit, _ in stack):
            raise EditError("This edit is not applied to this model, so there is nothing to revert.")
        if stack[-1][0] is not self:
            raise EditError(f"{stack[-1][0]!r} was applied after this edit: revert it first.")
        _unwind(hf, stack[-1][1])
        return model

    def _apply(self, hf: Any, force: bool) -> Application:
        application = Application()
        application.run(hf, self.steps, force=force)
        _APPLIED.setdefault(hf, []).append((self, application))
        return application

    @property
    def base_hash(self) -> str:
        """Weights hash of the model that the edit is applied to."""
        return self.steps[0].base_hash

    @property
    def method(self) -> str:
        """The steps' methods, joined by ` + `."""
        return " + ".join(step.method for step in self.steps)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Checkpoint names of every tensor that is changed, added, renamed or removed, sorted."""
        names = {n for s in self.steps for n in (*s.changes, *s.added, *s.renamed, *s.removed)}
        return tuple(sorted(names))

    @property
    def config_patch(self) -> dict[str, Any]:
        """Configuration fields that the edit changes."""
        return {key: value for step in self.steps for key, value in step.config_patch.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(step.nbytes for step in self.steps)

    def conflicts(self) -> list[str]:
        """Tensors that two steps computed from the same base both change: order matters there, or changes add up.

        To make a second edit follow exactly from the first, compute it inside `with first.applied(model):`.
        """
        seen: dict[tuple[str, str], int] = {}
        for step in self.steps:
            for name in step.changes:
                seen[step.base_hash, name] = seen.get((step.base_hash, name), 0) + 1
        return sorted(name for (_, name), count in seen.items() if count > 1)

    def with_audit(self, summary: Mapping[str, Any]) -> Edit:
        """The same edit with an audit's summary in its record."""
        return dataclasses.replace(self, audit=dict(summary))

    def to_df(self) -> pd.DataFrame:
        """A row a changed tensor: kind of change, bytes stored, ``|W' - W|`` and that over ``|W|`` (Frobenius)."""
        import pandas as pd

        rows = [row for number, step in enumerate(self.steps) for row in _rows(number, step)]
        columns = ["step", "method", "parameter", "kind", "shape", "bytes", "change", "relative_change"]
        return pd.DataFrame(rows, columns=columns)

    def save(self, directory: str | Path) -> Path:
        """Write `edit.safetensors` and `edit.json` into a directory (made if needed); returns it.

        Raises:
            EditError: values that are not finite, a record that is no JSON, or a disk that refuses.
        """
        header = {"base": dict(self.base), "versions": dict(self.versions), "audit": self.audit}
        _format.write(Path(directory), self.steps, header)
        return Path(directory)

    @classmethod
    def load(cls, directory: str | Path) -> Edit:
        """Read a saved edit.

        Raises:
            EditError: files missing, malformed, of another version, or not belonging together.
        """
        steps, header = _format.read(Path(directory))
        audit = header.get("audit")
        if audit is not None and not isinstance(audit, dict):
            raise EditError(f"{directory}: 'audit' must be an object or null.")
        return cls(steps, header["base"], header.get("versions") or {}, audit)

    def __repr__(self) -> str:
        size = f"{len(self.parameters)} tensors, {self.nbytes:,} bytes"
        return f"Edit({self.method}: {size}, base {self.base.get('name') or self.base_hash[:12]})"

    def _repr_html_(self) -> str:
        notes = "".join(f"<li>{html.escape(note)}</li>" for step in self.steps for note in step.notes)
        table = self.to_df().head(20).to_html(index=False, border=0, float_format=lambda x: f"{x:.3g}")
        return f"<p><b>{html.escape(repr(self))}</b></p><ul>{notes}</ul>{table}"


def _without_repeats(step: Step, earlier: list[Step]) -> Step:
    """The step without copies that an earlier step of the same base makes too (both untie the same embedding)."""
    made = {
        name: source for other in earlier if other.base_hash == step.base_hash for name, source in other.added.items()
    }
    repeated = {name for name, source in step.added.items() if isinstance(source, str) and made.get(name) == source}
    if not repeated:
        return step
    return dataclasses.replace(step, added={k: v for k, v in step.added.items() if k not in repeated})


def _rows(number: int, step: Step) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    for name, change in step.changes.items():
        relative = None if change.change is None else change.change / max(change.norm, 1e-30)
        size = change.entry.nbytes
        kind = change.entry.describe()
        rows.append((number, step.method, name, kind, change.shape, size, change.change, relative))
    for name, source in step.added.items():
        kind = f"added, copy of {source}" if isinstance(source, str) else "added"
        size = 0 if isinstance(source, str) else source.numel() * source.element_size()
        rows.append((number, step.method, name, kind, None, size, None, None))
    rows += [(number, step.method, name, "removed", None, 0, None, None) for name in step.removed]
    rows += [(number, step.method, old, f"renamed to {new}", None, 0, None, None) for old, new in step.renamed.items()]
    return rows


def _unwind(hf: Any, application: Application) -> None:
    """Undo `application` and whatever was applied after it, last first."""
    stack = _APPLIED.get(hf, [])
    while any(entry is application for _, entry in stack):
        stack.pop()[1].undo()


def bare(model: Any) -> Any:
    """The bare Hugging Face model, or an `EditError` that says what was given."""
    from activations_cache.errors import ModelError
    from activations_cache.hashing import hf_model

    try:
        return hf_model(model)
    except ModelError as error:
        raise EditError(str(error)) from error


def describe_base(model: Any, weights: str) -> dict[str, Any]:
    """The record's words for a base model: name, class, hashes."""
    from activations_cache.hashing import config_hash

    hf = bare(model)
    name = getattr(model, "name", "") or getattr(hf.config, "_name_or_path", "")
    return {
        "name": str(name),
        "class": type(hf).__name__,
        "model_type": hf.config.model_type,
        "weights_hash": weights,
        "config_hash": config_hash(hf.config),
    }


def library_versions() -> dict[str, str]:
    """Versions of Python and the libraries that edits depend on."""
    import platform
    import sys

    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "probe-workbench": sys.modules["probe"].__version__,  # importing the package would import upwards
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def check_target(target: Any, weights: str) -> None:
    """Refuse a target that was located in another model.

    Raises:
        TargetError: its `model_hash` is not `weights`.
    """
    found = getattr(target, "model_hash", "")
    if found and found != weights:
        raise TargetError(
            f"The target was located in a model with weights {found[:12]}; this one has {weights[:12]}. "
            "Locate it again in this model, or clear its model_hash to use it anyway."
        )
