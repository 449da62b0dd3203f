"""Labelled rows of a cache: which stored rows, with which binary label and group, and their activations.

Shared by the locators that read a cache (probing, features), so that they agree on what a label is and refuse the same
bad input in the same words.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from activations_cache.errors import CacheMismatchError, SiteError
from probe._stats import codes
from probe.errors import DataError, LabelError

Mode = Literal["last", "all", "mean"]
_BLOCK = 16_384  # rows read at once


@dataclass(frozen=True)
class Rows:
    """The rows that a locator works on: `n` of them, one label and one group each.

    Attributes:
        mode: "last" stored row of each sequence, "all" stored rows, or the "mean" over each sequence's stored rows.
        stored: number of each stored row that is read, ascending.
        slot: which of the n rows each stored row goes into (several go into one for "mean").
        sequence: sequence of each of the n rows.
        y: 1 for the positive class, 0 for the rest, [n].
        groups: group code of each row, [n].
        positive: what the positive class is called.
        negative: what the rest is called.
        per_row: whether labels were given per stored row, not per sequence.
        grouped: whether groups were given; otherwise each sequence is its own.
    """

    mode: Mode
    stored: Int[ndarray, " stored"]
    slot: Int[ndarray, " stored"]
    sequence: Int[ndarray, " n"]
    y: Int[ndarray, " n"]
    groups: Int[ndarray, " n"]
    positive: str
    negative: str
    per_row: bool
    grouped: bool

    def __len__(self) -> int:
        return len(self.y)

    def settings(self, label: Any, group: Any) -> dict[str, str]:
        """What a result records of the rows: the names of label and group, or that they were given as values."""
        given = "(given)"
        return {
            "label": label if isinstance(label, str) else given,
            "group": "sequence" if group is None else group if isinstance(group, str) else given,
            "positive": self.positive,
            "negative": self.negative,
            "rows": self.mode,
        }

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        return int(self.groups.max()) + 1

    def read(self, cache: Any, site: str) -> Float[Tensor, "n d"]:
        """The activations of one site in float32, streamed in blocks; sites of several axes are flattened.

        Raises:
            DataError: activations that are not finite.
        """
        rows: Tensor | None = None
        for start in range(0, len(cache), _BLOCK):
            first, last = np.searchsorted(self.stored, [start, start + _BLOCK])
            if first == last:
                continue
            block = cache[site][start : min(start + _BLOCK, len(cache))]
            block = block[torch.as_tensor(self.stored[first:last] - start)].flatten(1).float()  # [block, d]
            if rows is None:
                rows = block.new_zeros(len(self), block.shape[1])
            rows.index_add_(0, torch.as_tensor(self.slot[first:last]), block)
        assert rows is not None  # `select` admits no empty selection
        rows /= torch.as_tensor(np.bincount(self.slot, minlength=len(self)), dtype=torch.float32)[:, None]
        if not torch.isfinite(rows).all():
            bad = int((~torch.isfinite(rows)).any(dim=1).sum())
            raise DataError(
                f"Activations must be finite; {bad} of {len(rows)} rows of {site!r} are not. Capture it again."
            )
        return rows


def select(
    cache: Any, label: Any, group: Any = None, positive: Any = None, rows: Mode = "last", sequences: Any = None
) -> Rows:
    """Choose rows and give each its label and group.

    Args:
        cache: an opened cache.
        label: name of a label column of the cache, or one value per sequence (or per stored row).
        group: the same for the groups; None makes each sequence its own.
        positive: the class that counts as 1. With None there must be two classes, and the later one in sorted order
            (True, 1, ...) is positive.
        rows: "last", "all" or "mean".
        sequences: numbers or a mask of the sequences to use (those of the split that locates, say); None for all.

    Raises:
        LabelError: a missing column, a wrong length, NaN or empty labels, one class, or several without `positive`.
    """
    if rows not in ("last", "all", "mean"):
        raise DataError(f"rows must be 'last', 'all' or 'mean'; got {rows!r}.")
    if len(cache) == 0:
        raise DataError("The cache holds no rows.")
    sequence = np.asarray(cache.rows["sequence"]).astype(np.int64)  # [stored]
    values, per_row = _column(cache, label, "label", len(sequence))
    if per_row and rows == "mean":
        raise LabelError("Labels per stored row cannot be used with rows='mean'; use rows='all'.")
    stored, slot, of_slot = _slots(rows, sequence, np.asarray(cache.rows["position"]))
    if sequences is not None:
        used = np.isin(sequence[of_slot], _numbers(sequences, cache.n_sequences))
        stored, slot = stored[used[slot]], (np.cumsum(used) - 1)[slot[used[slot]]]
        of_slot = of_slot[used]
    own = sequence[of_slot]
    y, positive_name, negative_name = binary(values[of_slot if per_row else own], positive)
    groups = _groups(cache, group, own, of_slot)
    return Rows(rows, stored, slot, own, y, groups, positive_name, negative_name, per_row, group is not None)


def _numbers(sequences: Any, n: int) -> Int[ndarray, " chosen"]:
    """Sequence numbers from numbers or a mask."""
    index = np.asarray(sequences)
    if index.dtype == bool and index.shape == (n,):
        index = np.flatnonzero(index)
    if index.dtype.kind not in "iu" or index.ndim != 1 or not index.size or index.min() < 0 or index.max() >= n:
        raise DataError(f"sequences must be a mask over the {n} sequences or some of their numbers from 0 to {n - 1}.")
    return index


def _slots(mode: Mode, sequence: ndarray, position: ndarray) -> tuple[ndarray, ndarray, ndarray]:
    """Stored rows to read, the slot that each goes into, and a stored row of each slot."""
    everything = np.arange(len(sequence))
    if mode == "all":
        return everything, everything, everything
    if mode == "mean":
        return everything, codes(sequence), np.unique(sequence, return_index=True)[1]
    order = np.lexsort((position, sequence))
    ends = np.r_[sequence[order][1:] != sequence[order][:-1], True]
    last = np.sort(order[ends])
    return last, np.arange(len(last)), last


def _column(cache: Any, column: Any, what: str, n_stored: int) -> tuple[ndarray, bool]:
    """The values of a column, and whether they are per stored row."""
    n_sequences = cache.n_sequences
    if isinstance(column, str):
        if column in cache.sequences:
            return _flat(cache.sequences[column]), False
        if column in cache.rows:
            return _flat(cache.rows[column]), True
        known = sorted({*cache.sequences, *cache.rows} - {"input_ids"})
        near = difflib.get_close_matches(column, known, n=3, cutoff=0.4) or known
        raise LabelError(f"The cache has no {what} column {column!r}; it has: {', '.join(near) or 'none'}.")
    values = _flat(column)
    if len(values) not in (n_sequences, n_stored):
        raise LabelError(
            f"{what} needs one value per sequence ({n_sequences}) or per stored row ({n_stored}); got {len(values)}."
        )
    return values, len(values) != n_sequences


def _flat(values: Any) -> ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    array = np.asarray(list(values) if not isinstance(values, ndarray) else values)
    if array.ndim != 1:
        raise LabelError(f"Labels and groups must be one-dimensional; got shape {array.shape}.")
    return array


def _missing(values: ndarray) -> ndarray:
    if values.dtype.kind == "f":
        return np.isnan(values)
    return np.array([v is None or (isinstance(v, float) and v != v) or v == "" for v in values.tolist()], dtype=bool)


def binary(values: Sequence[Any] | ndarray, positive: Any = None) -> tuple[Int[ndarray, " n"], str, str]:
    """Turn labels into 0 and 1, with the names of the positive class and of the rest.

    Raises:
        LabelError: missing values, one class, several classes without `positive`, or a `positive` that does not occur.
    """
    values = _flat(values)
    gone = _missing(values)
    if gone.any():
        raise LabelError(
            f"Every row needs a label; {int(gone.sum())} of {len(values)} are NaN or empty. Drop those rows first."
        )
    names = np.array([_name(v) for v in values.tolist()])
    classes = sorted(set(values.tolist()), key=lambda v: (isinstance(v, str), v))
    kinds = [_name(v) for v in classes]
    if len(kinds) < 2:
        raise LabelError(f"A label needs two classes; all {len(values)} rows are {kinds[0] if kinds else 'missing'!r}.")
    if positive is None and len(kinds) > 2:
        raise LabelError(
            f"The label has {len(kinds)} classes ({', '.join(kinds[:6])}...); say which is positive=, the rest are 0."
        )
    chosen = kinds[-1] if positive is None else _name(positive)
    if chosen not in kinds:
        raise LabelError(f"positive={positive!r} does not occur; the classes are {', '.join(kinds[:10])}.")
    rest = [kind for kind in kinds if kind != chosen]
    return (names == chosen).astype(np.int64), chosen, rest[0] if len(rest) == 1 else f"not {chosen}"


def _name(value: Any) -> str:
    """One name for values that are equal: 1, 1.0 and np.int64(1); True stays "True"."""
    if isinstance(value, bytes):
        return value.decode()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _groups(cache: Any, group: Any, sequence: ndarray, stored: ndarray) -> Int[ndarray, " n"]:
    if group is None:
        return codes(sequence)
    values, per_row = _column(cache, group, "group", len(cache.rows["sequence"]))
    values = values[stored if per_row else sequence]
    gone = _missing(values)
    if gone.any():
        raise LabelError(f"Every row needs a group; {int(gone.sum())} of {len(values)} are NaN or empty.")
    return codes(values.astype(str))


def resolve_sites(cache: Any, sites: str | Sequence[str] | None) -> list[str]:
    """Sites of the cache, by name or pattern, in the cache's order. None: all that hold floating-point values.

    Raises:
        SiteError: a name or pattern that fits none, with the near ones.
    """
    known = list(cache.sites)
    if sites is None:
        return [name for name in known if cache[name][0:1].is_floating_point()]
    wanted = [sites] if isinstance(sites, str) else list(sites)
    found: set[str] = set()
    for name in wanted:
        hits = [cache[name].spec.name] if name in cache else fnmatch.filter(known, name)
        if not hits:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:5]
            raise SiteError(f"The cache has no site {name!r}; it has {len(known)}, the nearest: {', '.join(near)}.")
        found.update(hits)
    return [name for name in known if name in found]


def one_site(cache: Any, site: str) -> list[str]:
    """The one site that a name or pattern fits.

    Raises:
        SiteError: none fits, or several do.
    """
    names = resolve_sites(cache, site)
    if len(names) != 1:
        raise SiteError(f"One site is needed; {site!r} fits {len(names)}: {', '.join(names[:5])}.")
    return names


def layer_of(site: str) -> int | None:
    """The layer in a site's name, if there is one."""
    match = re.match(r"blocks\.(\d+)\.", site)
    return int(match.group(1)) if match else None


def model_hash(cache: Any, model: Any = None) -> str:
    """The weights hash of the model that the cache was captured from.

    Raises:
        CacheMismatchError: `model` is given and has other weights.
    """
    known = str(cache.model.weights_hash)
    if model is not None:
        from activations_cache.hashing import weights_hash

        actual = weights_hash(getattr(model, "hf", model))
        if actual != known:
            raise CacheMismatchError(
                f"The cache was captured from weights {known[:12] or '(unknown)'}, the model has {actual[:12]}. "
                "Capture again with this model, or pass the model that the cache came from."
            )
    return known
