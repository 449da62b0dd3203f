"""The subspace in which the members of one class differ from each other and other rows do not vary.

A probe's direction tells the class apart. What a model knows about each member of the class (which person has which
attribute) lies elsewhere: in how the members differ. Of all directions, those in which the class's groups are spread
most, measured in units of the other rows' variance, hold most of it at the least cost to the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from probe import _rows
from probe.data import group_folds
from probe.errors import DataError, LabelError
from probe.targets import Subspace


def between_groups(x: Float[ndarray, "n d"], groups: Sequence[Any] | ndarray) -> Float[ndarray, "d d"]:
    """Between-group scatter: sum over groups of n_g (mean_g - mean)(mean_g - mean)^T, divided by the rows."""
    number = np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
    counts = np.bincount(number)
    sums = np.zeros((len(counts), x.shape[1]))
    np.add.at(sums, number, x)
    means = sums / counts[:, None] - x.mean(0)  # [group, d]
    return (means * counts[:, None]).T @ means / len(x)


def shrunk_covariance(x: Float[ndarray, "n d"], shrinkage: float) -> Float[ndarray, "d d"]:
    """(1 - s) S + s (tr S / d) I, with S the covariance about the mean (divided by n)."""
    centred = x - x.mean(0)
    covariance = centred.T @ centred / len(x)
    d = x.shape[1]
    return (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / d * np.eye(d)


def contrast_basis(
    scatter: Float[ndarray, "d d"], covariance: Float[ndarray, "d d"], k: int
) -> tuple[Float[ndarray, "d k"], Float[ndarray, " k"]]:
    """Top-k generalised eigenvectors of scatter w = e covariance w, orthonormalised in order, and their eigenvalues."""
    whiten = np.linalg.inv(np.linalg.cholesky(covariance))  # [d, d], covariance^-1 = whiten^T whiten
    values, vectors = np.linalg.eigh(whiten @ scatter @ whiten.T)
    basis, _ = np.linalg.qr(whiten.T @ vectors[:, ::-1][:, :k])
    return basis, values[::-1][:k]


def subspace(
    cache: Any,
    site: str,
    label: str | Sequence[Any],
    positive: Any = None,
    group: str | Sequence[Any] | None = None,
    k: int = 8,
    *,
    shrinkage: float = 0.1,
    rows: _rows.Mode = "last",
    sequences: Any = None,
    n_random: int = 100,
    folds: int = 5,
    seed: int = 0,
    model: Any = None,
) -> Subspace:
    """Directions that carry the positive class's between-group scatter, relative to the other rows' covariance.

    The basis is fitted on all rows. The evidence says what share of the positive class's between-group scatter and of
    the other rows' variance it holds: on the fitted groups, on groups left out (a basis from the other folds; the
    mean over folds), and for random subspaces of the same rank.

    Args:
        cache: what `activations_cache.open` returns.
        site: one site of the cache.
        label: column of the cache, or a value per sequence.
        positive: the class whose groups are to be told apart (the forget set); the rest is what must not change.
        group: what the positive class's members are (persons); needed, since the scatter is between them.
        k: rank.
        shrinkage: of the covariance towards a multiple of the identity, in (0, 1].
        rows: which rows of each sequence, as in `sweep`.
        sequences: which sequences, as in `sweep`.
        n_random: random subspaces.
        folds: folds over the positive class's groups.
        seed: folds and random subspaces.
        model: when given, refused unless it is the cache's.

    Raises:
        LabelError: labels that cannot be used, no group, or fewer than k + 1 groups of the positive class.
        SiteError: the cache does not have the site.
        DataError: a rank or shrinkage out of range, or activations that do not vary.
    """
    (name,) = _rows.one_site(cache, site)
    model_hash = _rows.model_hash(cache, model)
    if group is None:
        raise LabelError("subspace needs group=: it looks for what tells the groups of the positive class apart.")
    chosen = _rows.select(cache, label, group, positive, rows, sequences)
    x = chosen.read(cache, name).double().numpy()  # [n, d]
    held, rest, members = x[chosen.y == 1], x[chosen.y == 0], chosen.groups[chosen.y == 1]
    _check(held, rest, members, k, shrinkage)
    covariance = shrunk_covariance(rest, shrinkage)
    basis, values = contrast_basis(between_groups(held, members), covariance, k)
    evidence = {
        "method": "probing.subspace",
        "site": name,
        "positive": chosen.positive,
        "negative": chosen.negative,
        "n": {"positive": len(held), "negative": len(rest), "groups": len(np.unique(members))},
        "settings": {"k": k, "shrinkage": shrinkage, "rows": rows, "seed": seed, "folds": folds},
        "eigenvalues": values.tolist(),
        "captured": _captured(basis, between_groups(held, members), rest),
        "captured_left_out": _left_out(held, members, rest, covariance, k, folds, seed),
        "random": _random(held, members, rest, k, n_random, seed),
    }
    return Subspace(name, torch.from_numpy(basis), model_hash=model_hash, evidence=evidence)


def _check(held: ndarray, rest: ndarray, members: ndarray, k: int, shrinkage: float) -> None:
    d, n_groups = held.shape[1], len(np.unique(members))
    if not 1 <= k < d:
        raise DataError(f"k must be between 1 and {d - 1} (the site's width less one); got {k}.")
    if not 0 < shrinkage <= 1:
        raise DataError(f"shrinkage must be in (0, 1]; got {shrinkage}.")
    if n_groups <= k:
        raise LabelError(
            f"{n_groups} groups of the positive class span at most {max(n_groups - 1, 0)} directions; k is {k}."
        )
    if not rest.var(0).any() or not held.var(0).any():
        raise DataError("The activations of a class do not vary; there is nothing to contrast.")


def _captured(basis: ndarray, scatter: ndarray, rest: ndarray) -> dict[str, float]:
    """Share of the between-group scatter and of the other rows' variance inside the subspace."""
    centred = rest - rest.mean(0)
    return {
        "positive_scatter": float(np.trace(basis.T @ scatter @ basis) / np.trace(scatter)),
        "negative_variance": float(np.square(centred @ basis).sum() / np.square(centred).sum()),
    }


def _left_out(
    held: ndarray, members: ndarray, rest: ndarray, covariance: ndarray, k: int, folds: int, seed: int
) -> dict[str, float] | None:
    """The same shares on groups that the basis was not fitted on; None where too few groups are left."""
    shares = []
    for train, test in group_folds(members.tolist(), folds, seed):
        if len(np.unique(members[train])) <= k or len(np.unique(members[test])) < 2:
            return None
        basis, _ = contrast_basis(between_groups(held[train], members[train]), covariance, k)
        shares.append(_captured(basis, between_groups(held[test], members[test]), rest))
    return {key: float(np.mean([share[key] for share in shares])) for key in shares[0]}


def _random(held: ndarray, members: ndarray, rest: ndarray, k: int, n: int, seed: int) -> dict[str, Any]:
    """The shares of random subspaces of the same rank: mean and 95 % range."""
    rng = np.random.default_rng([seed, 3])
    scatter = between_groups(held, members)
    drawn = [np.linalg.qr(rng.standard_normal((held.shape[1], k)))[0] for _ in range(n)]
    shares = [_captured(basis, scatter, rest) for basis in drawn]
    found: dict[str, Any] = {"n": n}
    for key in ("positive_scatter", "negative_variance"):
        values = [share[key] for share in shares]
        low, high = np.percentile(values, [2.5, 97.5])
        found[key] = {"mean": float(np.mean(values)), "low": float(low), "high": float(high)}
    return found
