"""Everything that `activations_cache` raises on purpose."""

from __future__ import annotations


class ActivationsCacheError(Exception):
    """The root of the package's errors."""


class SiteError(ActivationsCacheError):
    """A site that the model does not have, or that cannot be used as asked."""


class ModelError(ActivationsCacheError):
    """A model whose architecture cannot be read, or a path that holds none."""


class DataError(ActivationsCacheError):
    """Text or token ids that cannot be used."""


class NumericsError(ActivationsCacheError):
    """Activations that are not finite, or do not fit the storage type."""


class CacheError(ActivationsCacheError):
    """Something about a cache directory."""


class CacheMismatchError(CacheError):
    """The directory holds a cache of another model, other data or other settings."""


class CorruptCacheError(CacheError):
    """A file of the cache is missing, truncated, altered or of another version."""


class UnfinishedCacheError(CacheError):
    """A finished cache was required; this one was interrupted."""


class CacheLockedError(CacheError):
    """Another process is writing to the directory."""


class ConformanceError(CacheError):
    """A cache directory breaks a requirement of the format."""


class ParallelError(CacheError):
    """Another process of a shared capture is gone, or failed with an error that is none of this package's."""
