"""Settings of organisms: a size with overrides, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from probe.errors import OrganismError


def resolve(sizes: Mapping[str, Any], size: str, overrides: Mapping[str, Any]) -> Any:
    """Return the settings of a size with overrides, checked.

    Raises:
        OrganismError: An unknown size or setting, a number that is not positive, or a width that the heads, which
            rotate pairs of dimensions, do not divide.
    """
    if size not in sizes:
        raise OrganismError(f"size must be one of {', '.join(sizes)}, got {size!r}.")
    known = asdict(sizes[size])
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise OrganismError(f"Unknown settings: {', '.join(unknown)}. The settings are {', '.join(known)}.")
    for name, value in overrides.items():
        wanted = type(known[name])
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise OrganismError(f"{name} must be {wanted.__name__}, got {value!r}.")
        zero = name == "seed" or known[name] == 0  # what a size leaves out may be left out
        if wanted in (int, float) and (value < 0 or (value == 0 and not zero)):
            raise OrganismError(f"{name} must be positive, got {value!r}.")
    made = replace(sizes[size], **overrides)
    if made.d_model % (2 * made.n_heads):
        raise OrganismError(f"d_model must be a multiple of 2 * n_heads, got {made.d_model} and {made.n_heads} heads.")
    return made
