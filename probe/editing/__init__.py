"""Editing: closed-form changes of weights, as artefacts that can be applied, undone, composed, saved and exported.

edit = probe.editing.project_out(model, direction)      # or ablate, remove_experts, Edit.from_models
with edit.applied(model):
    ...
edit.save("edits/name")
"""

from __future__ import annotations

from probe.editing.ablate import ablate
from probe.editing.edit import Edit
from probe.editing.entries import Columns, Dense, Entry, LowRank, Rows, Take
from probe.editing.experts import remove_experts
from probe.editing.filters import Filter, RefuseWhen, refuse_when
from probe.editing.project import project_out
from probe.editing.steps import Change, Step

__all__ = [
    "Change",
    "Columns",
    "Dense",
    "Edit",
    "Entry",
    "Filter",
    "LowRank",
    "RefuseWhen",
    "Rows",
    "Step",
    "Take",
    "ablate",
    "project_out",
    "refuse_when",
    "remove_experts",
]
