"""The parts by name, imported when used: a new part is one file in this room and one row here."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module

from probe.audit.part import Part
from probe.errors import AuditError

# name: (module in probe.audit, class)
PARTS: dict[str, tuple[str, str]] = {
    "behaviour": ("behaviour", "Behaviour"),
    "tofu": ("tofu", "Tofu"),
    "muse": ("muse", "Muse"),
    "fluency": ("fluency", "Fluency"),
    "relearning": ("relearning", "Relearning"),
    "quantisation": ("quantisation", "Quantisation"),
    "context": ("context", "Context"),
    "sampling": ("sampling", "Sampling"),
    "prompts": ("prompts", "Prompts"),
    "readout": ("inside", "Readout"),
    "uds": ("uds", "UDS"),
    "lens": ("lens", "Lens"),
    "cka": ("cka", "Cka"),
    "traces": ("traces", "Traces"),
    "sae_latents": ("latents", "Latents"),
    "distance": ("distance", "Distance"),
    "membership": ("membership", "Membership"),
    "extraction": ("extraction", "Extraction"),
    "pruning": ("pruning", "Pruning"),
    "unrelated": ("unrelated", "Unrelated"),
    "latent": ("latent", "Latent"),
    "embedding": ("embedding", "Embedding"),
    "redteam": ("redteam", "RedTeam"),
}

# measured unless other parts are asked for, in the order of the card
DEFAULT: tuple[str, ...] = (
    "behaviour",
    "tofu",
    "muse",
    "fluency",
    "relearning",
    "quantisation",
    "context",
    "sampling",
    "prompts",
    "readout",
    "uds",
    "lens",
    "distance",
    "membership",
)


def part(name: str) -> Part:
    """Return a part with its default settings.

    Raises:
        AuditError: There is no such part.
    """
    if name not in PARTS:
        raise AuditError(f"the parts of an audit are {', '.join(PARTS)}; there is no {name!r}")
    module, cls = PARTS[name]
    made: Part = getattr(import_module(f"probe.audit.{module}"), cls)()
    return made


def chosen(parts: Iterable[str | Part] | str | None) -> list[Part]:
    """Return the parts that were asked for: by name, or with settings of their own; None for the default ones.

    Raises:
        AuditError: An unknown name, something that is no part, or a part given twice.
    """
    wanted = (
        [n for n in DEFAULT if n in PARTS]
        if parts is None
        else (parts,)
        if isinstance(parts, (str, Part))
        else tuple(parts)
    )
    found = [part(one) if isinstance(one, str) else one for one in wanted]
    for one in found:
        if not isinstance(one, Part):
            raise AuditError(f"parts must be names or Part objects; received {type(one).__name__}")
    names = [one.name for one in found]
    if len(set(names)) < len(names):
        raise AuditError(f"each part may be given once; received {', '.join(names)}")
    return found


def parts() -> dict[str, str]:
    """Return what there is: each part's name and what it measures."""
    return {name: part(name).title for name in PARTS}
