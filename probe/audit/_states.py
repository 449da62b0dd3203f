"""Hidden states of a subject on its case, with errors that say which model and which set."""

from __future__ import annotations

from collections.abc import Sequence

from probe.audit._case import Case
from probe.audit.part import Subject
from probe.data import Questions
from probe.errors import AuditError, PatchError
from probe.patching import AnswerStates, answer_states

RESID = "blocks.*.hook_resid_post"


def read(
    subject: Subject, questions: Questions, name: str, site: str | Sequence[str] = RESID, *, first: bool = True
) -> AnswerStates:
    """Values of sites where the answers of a set's questions are predicted; `first` keeps the question's end alone.

    Raises:
        AuditError: Values that are not finite.
    """
    case = subject.case
    try:
        return answer_states(
            subject.model, questions, site, first=first, batch_size=case.batch_size, bos=case.bos, chat=case.chat
        )
    except PatchError as error:
        raise AuditError(f"{subject.role}, {name}: {error}") from error


def other_sizes(subject: Subject) -> str:
    """Say that an edited model, which may be any with the original's tokenizer, has not its layers; else ""."""
    sizes = [(one.dims.n_layers, one.dims.d_model) for one in (subject.model, subject.case.original)]
    if subject.role != "edited" or sizes[0] == sizes[1]:
        return ""
    layers, width = sizes[0]
    return (
        f"the model has other layers than the original: {layers} of width {width}, "
        f"where the original has {sizes[1][0]} of {sizes[1][1]}"
    )


def golds(case: Case) -> list[str]:
    """The roles of a case's golds."""
    return [f"gold {i + 1}" for i in range(len(case.golds))]


def others(role: str, roles: Sequence[str]) -> list[str]:
    """The golds that a model is held against: all of them, or for a gold all but itself."""
    return [gold for gold in roles if gold != role]
