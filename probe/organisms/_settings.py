"""Settings of organisms: a size with overrides, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, TypeGuard

from probe.errors import OrganismError

MOST_SEED = 2**32 - 1  # golds add to it, and generators take 64 bits


def is_count(value: Any, least: int = 1) -> TypeGuard[int]:
    """Whether a value is a whole number of at least `least`; a truth value is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def device_type(device: Any) -> str:
    """Return the type of a device by its name, `"cpu"` for None.

    Raises:
        OrganismError: It is no device.
    """
    import torch

    try:
        return "cpu" if device is None else torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise OrganismError(f"device must be such as 'cpu' or 'cuda', got {device!r}.") from error


def check_device(device: Any) -> None:
    """Refuse a device that nothing can be computed on here, before anything is trained.

    Raises:
        OrganismError: It is no device, or there is none of it.
    """
    import torch

    if device_type(device) == "cpu":
        return
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch without CUDA asserts
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OrganismError(f"device={str(device)!r} cannot be used here ({reason}); leave it out: the CPU.") from error


def resolve(sizes: Mapping[str, Any], size: str, overrides: Mapping[str, Any]) -> Any:
    """Return the settings of a size with overrides, checked.

    Raises:
        OrganismError: An unknown size or setting, a number that is not positive, a seed out of range, or a width that
            the heads, which rotate pairs of dimensions, do not divide.
    """
    if not isinstance(size, str) or size not in sizes:
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
        if name == "seed" and value > MOST_SEED:
            raise OrganismError(f"seed may be at most {MOST_SEED}, got {value!r}.")
    made = replace(sizes[size], **overrides)
    if made.d_model % (2 * made.n_heads):
        raise OrganismError(f"d_model must be a multiple of 2 * n_heads, got {made.d_model} and {made.n_heads} heads.")
    return made
