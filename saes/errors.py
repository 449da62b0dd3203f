"""Everything that `saes` raises on purpose."""

from __future__ import annotations


class SAEError(Exception):
    """The root of the package's errors."""


class SAEConfigError(SAEError):
    """Settings that cannot be trained (a width below k, an unknown architecture)."""


class SAEDataError(SAEError):
    """Activations that cannot be used: too few, constant, not finite, or of another width."""


class SAELoadError(SAEError):
    """A path that holds no SAE, or one that the package cannot read."""
