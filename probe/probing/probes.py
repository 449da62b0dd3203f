"""Linear probes: a fitter each, and one frozen result.

Both fitters take many labellings of the same rows at once, because a probe is never fitted without its controls:
the expensive work on the rows is then shared between the real label and all of them.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probe.errors import DataError, LabelError


@dataclass(frozen=True)
class LinearProbes:
    """Fitted linear probes of one site, one column per labelling. A row x is scored `x @ weight + bias`.

    Attributes:
        method: which fitter made it.
        weight: in activation space (any standardisation is folded in), [d, labels].
        bias: [labels]; the decision threshold is at score 0.
    """

    method: str
    weight: Float[Tensor, "d label"]
    bias: Float[Tensor, " label"]

    def scores(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n label"]:
        """Signed scores; above 0 the positive class is predicted."""
        return x.to(self.weight.dtype) @ self.weight + self.bias

    def predict(self, x: Float[Tensor, "n d"]) -> Int[Tensor, "n label"]:
        """0 or 1 for each row and labelling."""
        return (self.scores(x) > 0).long()

    @property
    def directions(self) -> Float[Tensor, "d label"]:
        """Unit columns that point from the negative to the positive class."""
        return self.weight / self.weight.norm(dim=0).clamp_min(torch.finfo(self.weight.dtype).tiny)


class Fitter(Protocol):
    """What `sweep` needs of a probe: a name, and a fit of many labellings of the same rows."""

    name: str

    def fit(self, x: Float[Tensor, "n d"], y: Int[Tensor, "n label"]) -> LinearProbes: ...


class MeanDifference:
    """Difference of class means; the threshold is halfway between them.

    Streams: call `update` on blocks of rows, then `result`. All labellings take one matrix product a block.
    """

    name = "mean_diff"

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._counts: Tensor = torch.zeros(0)

    def update(self, x: Float[Tensor, "n d"], y: Int[Tensor, "n label"]) -> MeanDifference:
        """Add a block of rows."""
        x, y = x.double(), y.double()
        sides = torch.stack([y, 1 - y])  # [2, n, label]
        sums = torch.einsum("snl,nd->sld", sides, x)
        counts = sides.sum(1)  # [2, label]
        self._sums, self._counts = (sums, counts) if self._sums is None else (self._sums + sums, self._counts + counts)
        return self

    def result(self) -> LinearProbes:
        """The probes of all rows so far.

        Raises:
            LabelError: a labelling has one class only.
        """
        if self._sums is None or (self._counts == 0).any():
            raise LabelError("a probe needs rows of both classes; some labelling has one class only.")
        positive, negative = self._sums / self._counts[..., None]  # each [label, d]
        weight = (positive - negative).T
        middle = (positive + negative).T / 2
        return LinearProbes(self.name, weight, -(middle * weight).sum(0))

    def fit(self, x: Float[Tensor, "n d"], y: Int[Tensor, "n label"]) -> LinearProbes:
        """Fit all rows at once, forgetting earlier updates."""
        self._sums = None
        return self.update(x, y).result()


class Logistic:
    """Logistic regression with an L2 penalty, the optimum of scikit-learn's objective.

    Minimises  sum_i s_i log(1 + exp(-t_i (w.x_i + b)))  +  (l2 / 2) |w|^2  (t = +-1, b not penalised), which is
    `LogisticRegression(C=1/l2)`. Rows are standardised on the training rows first unless told otherwise.

    Solved for all labellings together by Newton's method, the steps by conjugate gradients in coordinates in which
    the Hessian at p = 1/2 is the identity: those come from one eigendecomposition that the labellings share. With
    fewer rows than dimensions the problem is solved in the span of the rows, where the optimum lies.

    Args:
        l2: penalty; 1 / C of scikit-learn.
        balanced: weight classes inversely to their frequency (`class_weight="balanced"`).
        standardise: subtract the mean and divide by the standard deviation of the training rows.
        tol: stop when the largest gradient entry, in the coordinates above and divided by the rows, is below it.
        max_iter: Newton steps.
    """

    name = "logistic"

    def __init__(
        self,
        l2: float = 1.0,
        *,
        balanced: bool = True,
        standardise: bool = True,
        tol: float = 1e-10,
        max_iter: int = 100,
    ) -> None:
        if not l2 > 0:
            raise DataError(f"Logistic needs l2 > 0, got {l2}: without a penalty separable classes have no optimum.")
        self.l2, self.balanced, self.standardise, self.tol, self.max_iter = l2, balanced, standardise, tol, max_iter

    def fit(self, x: Float[Tensor, "n d"], y: Int[Tensor, "n label"]) -> LinearProbes:
        """Fit every labelling.

        Raises:
            LabelError: a labelling has one class only.
        """
        x, y = x.double(), y.double()
        counts = y.sum(0)
        if ((counts == 0) | (counts == len(y))).any():
            raise LabelError("a probe needs rows of both classes; some labelling has one class only.")
        mean = x.mean(0)
        scale = _scale(x, mean) if self.standardise else torch.ones_like(mean)
        rows = (x - mean) / scale
        to_w, penalty = _coordinates(rows, self.l2)  # [d, r], [r]
        weights = y * (len(y) / (2 * counts)) + (1 - y) * (len(y) / (2 * (len(y) - counts)))
        problem = _Problem(rows @ to_w, y, weights if self.balanced else torch.ones_like(y), penalty)
        u, b = problem.solve(self.tol * len(y), self.max_iter)
        weight = (to_w @ u) / scale[:, None]
        return LinearProbes(self.name, weight, b - mean @ weight)


def _scale(x: Float[Tensor, "n d"], mean: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """Standard deviations; 1 where a dimension is constant, as scikit-learn does."""
    scale = (x - mean).square().mean(0).sqrt()
    constant = scale <= 10 * torch.finfo(x.dtype).eps * mean.abs()
    return torch.where(constant, torch.ones_like(scale), scale)


def _coordinates(rows: Float[Tensor, "n d"], l2: float) -> tuple[Float[Tensor, "d r"], Float[Tensor, " r"]]:
    """A change of variables w = M u under which rows^T rows / 4 + l2 I is the identity, and its penalty on u."""
    n, d = rows.shape
    if n >= d:
        values, vectors = torch.linalg.eigh(rows.T @ rows)  # [d], [d, d]
        values = values.clamp_min(0)
    else:
        values, left = torch.linalg.eigh(rows @ rows.T)
        keep = values > values[-1] * n * torch.finfo(rows.dtype).eps
        values = values[keep]
        vectors = rows.T @ left[:, keep] / values.sqrt()  # [d, r], orthonormal
    curvature = values / 4 + l2
    return vectors / curvature.sqrt(), l2 / curvature


class _Problem:
    """The penalised logistic losses of all labellings, as a function of u [r, label] and b [label]."""

    def __init__(
        self,
        z: Float[Tensor, "n r"],
        y: Float[Tensor, "n label"],
        weights: Float[Tensor, "n label"],
        penalty: Float[Tensor, " r"],
    ) -> None:
        ones = torch.full((len(z), 1), 2 / len(z) ** 0.5, dtype=z.dtype, device=z.device)  # scaled like z's columns
        self.z = torch.cat([z, ones], dim=1)  # [n, r + 1]
        self.bias_scale = float(ones[0, 0])
        self.sign, self.weights = 2 * y - 1, weights
        self.penalty = torch.cat([penalty, penalty.new_zeros(1)])[:, None]  # [r + 1, 1]

    def _part(self, columns: Bool[Tensor, " label"]) -> _Problem:
        """The same problem for some of the labellings."""
        part = copy(self)
        part.sign, part.weights = self.sign[:, columns], self.weights[:, columns]
        return part

    def _back(self, rows: Float[Tensor, "n label"]) -> Float[Tensor, "r1 label"]:
        """z^T rows, in the order of multiplication that reads z along its memory."""
        return (rows.T.contiguous() @ self.z).T

    def loss(self, v: Float[Tensor, "r1 label"]) -> Float[Tensor, " label"]:
        margin = self.sign * (self.z @ v)
        data = (self.weights * torch.nn.functional.softplus(-margin)).sum(0)
        return data + (self.penalty * v.square()).sum(0) / 2

    def gradient(self, v: Tensor) -> tuple[Float[Tensor, "r1 label"], Float[Tensor, "n label"]]:
        """The gradient, and the Hessian's weight of each row."""
        p = torch.sigmoid(-self.sign * (self.z @ v))  # probability of the wrong class
        gradient = self.penalty * v - self._back(self.weights * self.sign * p)
        return gradient, self.weights * p * (1 - p)

    def solve(self, tol: float, max_iter: int) -> tuple[Float[Tensor, "r label"], Float[Tensor, " label"]]:
        v = self.z.new_zeros(self.z.shape[1], self.sign.shape[1])
        left = torch.ones(v.shape[1], dtype=torch.bool, device=v.device)  # labellings that have not converged
        for _ in range(max_iter):
            part, own = self._part(left), v[:, left]
            gradient, curvature = part.gradient(own)
            far = gradient.abs().amax(0) >= tol
            if not far.any():
                break
            left = left.masked_scatter(left, far)
            part, own, gradient = part._part(far), own[:, far], gradient[:, far]
            step = part._newton_step(gradient, curvature[:, far])
            v[:, left] = own + part._length(own, step, gradient) * step
        return v[:-1], v[-1] * self.bias_scale

    def _newton_step(self, gradient: Tensor, curvature: Tensor, n_iter: int = 250) -> Tensor:
        """Conjugate gradients on H s = -g, every column on its own, stopped when the residual is small enough."""
        step, residual = torch.zeros_like(gradient), -gradient
        direction, square = residual.clone(), residual.square().sum(0)
        # Eisenstat and Walker's forcing: the step is as exact as the gradient is small, so convergence is fast
        goal = square * torch.minimum(square.new_tensor(0.01), square / self.z.shape[0] ** 2).clamp_min(1e-24)
        for _ in range(n_iter):
            active = square > goal
            if not active.any():
                break
            product = self._back(curvature * (self.z @ direction)) + self.penalty * direction
            alpha = torch.where(active, square / (direction * product).sum(0).clamp_min(1e-300), square.new_zeros(()))
            step, residual = step + alpha * direction, residual - alpha * product
            previous, square = square, torch.where(active, residual.square().sum(0), square)
            direction = torch.where(active, residual + square / previous * direction, direction)
        return step

    def _length(self, v: Tensor, step: Tensor, gradient: Tensor) -> Float[Tensor, " label"]:
        """Backtracking: the longest of 1, 1/2, 1/4 ... that lowers the loss enough (Armijo), for each column."""
        start, slope = self.loss(v), (gradient * step).sum(0)
        length = torch.ones_like(start)
        for _ in range(30):
            # the tolerance admits steps so near the optimum that the loss no longer shows them
            short = self.loss(v + length * step) > start + 1e-4 * length * slope + 1e-12 * start.abs()
            if not short.any():
                break
            length = torch.where(short, length / 2, length)
        return length


METHODS: dict[str, type[MeanDifference] | type[Logistic]] = {"mean_diff": MeanDifference, "logistic": Logistic}
