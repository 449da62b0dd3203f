"""Everything that `probe` raises on purpose. The command line prints each as one line and exits with 2."""

from __future__ import annotations


class ProbeError(Exception):
    """The root of the package's errors."""


class LoadError(ProbeError):
    """A name or path that holds no model, or one that cannot be loaded as asked."""


class DataError(ProbeError):
    """Questions, pairs or labelled texts that cannot be used."""


class LabelError(DataError):
    """Labels of one class, of another length, missing, or inseparable from their groups."""


class TargetError(ProbeError):
    """A target that is empty, out of range, not finite, or of another model."""


class PatchError(ProbeError):
    """Patching pairs, a metric or a component that cannot be used."""


class ExpertError(ProbeError):
    """A model without experts, or experts that cannot be scored or removed as asked."""


class OrganismError(ProbeError):
    """Settings from which no organism can be trained."""


class EditError(ProbeError):
    """An edit that cannot be made, read or applied."""


class BaseMismatchError(EditError):
    """The edit was made for another base model."""


class AuditError(ProbeError):
    """An audit that cannot measure what was asked."""


class ExportError(ProbeError):
    """A directory that could not be written, or that did not reload to the same logits."""


class RecipeError(ProbeError):
    """A recipe that does not fit its schema, or asks for what the model does not have."""
