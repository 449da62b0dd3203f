"""The kinds of organism: a new one is a file of its own and a row here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from probe.errors import OrganismError

# kind -> module in this package, function that makes it, dataclass of its settings
KINDS: dict[str, tuple[str, str, str]] = {
    "facts": ("_facts", "facts", "FactsSettings"),
    "experts": ("_experts", "experts", "ExpertsSettings"),
    "backdoor": ("_backdoor", "backdoor", "BackdoorSettings"),
    "hallucination": ("_hallucination", "hallucination", "HallucinationSettings"),
    "toxic": ("_toxic", "toxic", "ToxicSettings"),
    "skills": ("_skills", "skills", "SkillsSettings"),
    "induction": ("_induction", "induction", "InductionSettings"),
    "tofu": ("_tofu", "tofu", "TofuSettings"),
}


def maker(kind: str) -> tuple[Any, Any]:
    """Return the function that makes organisms of a kind, and the dataclass of its settings.

    Raises:
        OrganismError: There is no such kind.
    """
    if kind not in KINDS:
        raise OrganismError(f"The kinds of organism are {', '.join(KINDS)}; there is no {kind!r}.")
    name, make, settings = KINDS[kind]
    module = import_module(f"probe.organisms.{name}")
    return getattr(module, make), getattr(module, settings)


def remake(kind: str, settings: Mapping[str, Any], root: Path, device: str | None = None) -> Any:
    """Return the organism of a kind that all these settings describe; keys that are no setting are left out."""
    make, settings_class = maker(kind)
    names = {field.name for field in fields(settings_class)}
    own = {name: value for name, value in settings.items() if name in names}
    return make(cache_dir=root, device=device, progress=False, **own)
