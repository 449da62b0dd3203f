"""Pruning: what comes back when small weights are set to zero.

A compressed model is what is deployed. An edit made of many small changes can be pruned away, like one that is rounded
away (see `quantisation`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from probe.audit._case import Case
from probe.audit._numbers import Metric
from probe.audit._swept import Point, measurement, metrics, score
from probe.audit.part import Measurement, Part, Subject, scratch, spaced, texts
from probe.errors import AuditError, ProbeError
from probe.models import Model

__all__ = ["Pruning", "magnitude_mask", "prune_", "wanda_mask"]

METHODS = ("magnitude", "wanda")


def magnitude_mask(weight: Float[Tensor, "out d_in"], sparsity: float) -> Bool[Tensor, "out d_in"]:
    """Which weights go: the smallest in magnitude of the whole matrix, `int(sparsity * n)` of them.

    Of equal ones those that come first go. This is the baseline of Wanda (arXiv 2306.11695): one threshold a matrix.
    """
    return _lowest(weight.abs().flatten(), sparsity).view_as(weight)


def wanda_mask(
    weight: Float[Tensor, "out d_in"], norms: Float[Tensor, " d_in"], sparsity: float
) -> Bool[Tensor, "out d_in"]:
    """Which weights go: in each row those with the smallest |W_ij| ‖x_j‖, `int(sparsity * d_in)` of them.

    Source: Wanda, arXiv 2306.11695.

    Args:
        weight: Outputs by inputs.
        norms: ‖x_j‖: the L2 norm of each input over all calibration tokens.
        sparsity: Share of each row that goes, from 0 to below 1.
    """
    return _lowest(weight.abs() * norms.to(weight), sparsity)


def _lowest(scores: Float[Tensor, "... n"], sparsity: float) -> Bool[Tensor, "... n"]:
    if not 0 <= sparsity < 1:
        raise AuditError(f"a sparsity must be from 0 to below 1; received {sparsity}")
    order = scores.argsort(dim=-1, stable=True)[..., : int(sparsity * scores.shape[-1])]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True)


def prune_(model: Model, method: str, sparsity: float, calibration: Sequence[str] = (), bos: bool | None = None) -> int:
    """Set weights of the linear layers to zero in place: not of embeddings, the head, or fused experts.

    Wanda goes block by block: the inputs of a block are those that the pruned blocks before it give.

    Args:
        model: The model; open `scratch(model)` around the call to have its weights back.
        method: `"magnitude"` or `"wanda"`.
        sparsity: Share of each matrix (of each of its rows for Wanda) that goes.
        calibration: Texts for Wanda's norms.
        bos: As in `Model.tokens`.

    Returns:
        How many weights are zero now that were not.

    Raises:
        AuditError: An unknown method, no linear layers, Wanda without texts.
    """
    if method not in METHODS:
        raise AuditError(f"the methods are {', '.join(METHODS)}; there is no {method!r}")
    if method == "wanda" and not calibration:
        raise AuditError("Wanda needs texts to calibrate on; received none")
    blocks = _blocks(model.hf)
    if not blocks:
        raise AuditError("the model has no linear layers whose weights could be pruned")
    batches = _same_lengths(model, calibration, bos) if method == "wanda" else []
    gone = 0
    with torch.no_grad():
        for layers in blocks.values():
            norms = _norms(model, layers, batches)
            for layer in layers:
                weight = layer.weight.T if _crossed(layer) else layer.weight  # [out, in], a view
                own = norms.get(layer)
                mask = magnitude_mask(weight, sparsity) if own is None else wanda_mask(weight, own, sparsity)
                gone += int((mask & (weight != 0)).sum())
                weight[mask] = 0
    return gone


def _crossed(layer: Any) -> bool:
    """Whether a layer's weight is stored as inputs by outputs."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)


def _blocks(hf: Any) -> dict[str, list[Any]]:
    """Linear layers by the number of their block, in the order of the forward pass."""
    head = hf.get_output_embeddings()
    found: dict[str, list[Any]] = {}
    for name, module in hf.named_modules():
        if module is not head and (isinstance(module, nn.Linear) or _crossed(module)):
            number = re.search(r"\.(\d+)\.", name)
            found.setdefault(number.group(1) if number else "", []).append(module)
    return found


def _same_lengths(model: Model, calibration: Sequence[str], bos: bool | None) -> list[Tensor]:
    """Batches of texts of one length each, so that no padding enters the norms."""
    by_length: dict[int, list[Tensor]] = {}
    for text in calibration:
        ids = model.tokens(text, bos=bos, overflow="truncate")["input_ids"]  # [1, pos]
        by_length.setdefault(ids.shape[1], []).append(ids)
    return [torch.cat(own) for own in by_length.values()]


def _norms(model: Model, layers: Sequence[Any], batches: Sequence[Tensor]) -> Mapping[Any, Float[Tensor, " d_in"]]:
    """L2 norm of each input of each layer over all tokens; a layer that no token reaches has norms of 0."""
    if not batches:
        return {}
    squares = {layer: torch.zeros(_d_in(layer), dtype=torch.float64, device=layer.weight.device) for layer in layers}

    def add(layer: Any, args: tuple[Any, ...], output: Any) -> None:
        squares[layer] += args[0].detach().double().flatten(0, -2).square().sum(0)

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(add).remove)
        for ids in batches:
            model.hf(ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return {layer: square.sqrt() for layer, square in squares.items()}


def _d_in(layer: Any) -> int:
    return int(layer.weight.shape[0 if _crossed(layer) else 1])


@dataclass(frozen=True)
class Pruning(Part):
    """Recall and probability after pruning the weights by magnitude and by Wanda, over several sparsities.

    Measures, on `forget` the largest over all settings, on `retain` what is left at that setting:
        pruned_recall, pruned_probability.

    The table `pruning` has a row per method and sparsity.

    Attributes:
        methods: Of `magnitude` and `wanda` (arXiv 2306.11695).
        sparsities: Shares of the weights that go.
        calibration: Retain texts for Wanda (128 texts of a corpus in the paper).
        limit: Rows of each set.
    """

    methods: tuple[str, ...] = METHODS
    sparsities: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    calibration: int = 128
    limit: int | None = 128

    name: ClassVar[str] = "pruning"
    title: ClassVar[str] = "pruning small weights"
    needs: ClassVar[tuple[str, ...]] = ("forget", "retain")
    metrics: ClassVar[tuple[Metric, ...]] = metrics("pruned", "after pruning")
    kind: ClassVar[str] = "attack"
    evidence: ClassVar[tuple[tuple[str, str], ...]] = tuple(("forget", metric.name) for metric in metrics)

    def __post_init__(self) -> None:
        """Refuse settings with which nothing is pruned."""
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown or not self.methods:
            raise AuditError(f"methods must be of {', '.join(METHODS)}; received {self.methods}")
        if not self.sparsities or any(not 0 < share < 1 for share in self.sparsities):
            raise AuditError(f"sparsities must be above 0 and below 1; received {self.sparsities}")
        if self.calibration < 1 or (self.limit is not None and self.limit < 1):
            raise AuditError(f"calibration and limit must be at least 1; received {self.calibration} and {self.limit}")

    def measure(self, subject: Subject) -> Measurement:
        """Prune a copy of the weights with each setting; the model has its own afterwards.

        Raises:
            AuditError: Nothing to prune.
        """
        missing: list[str] = []
        points = list(self._points(subject.model, subject.case, missing))
        return measurement("pruned", "pruning", points, subject.case, missing)

    def _points(self, model: Model, case: Case, missing: list[str]) -> Iterator[Point]:
        rows = texts(spaced(case.sets["retain"], self.calibration))
        for method in self.methods:
            for sparsity in self.sparsities:
                with scratch(model):
                    prune_(model, method, sparsity, rows, case.bos)
                    try:
                        yield score(model, case, {"method": method, "sparsity": sparsity}, self.limit)
                    except ProbeError as error:  # a model that pruning has broken: the other settings still count
                        missing.append(f"pruning ({method}, {sparsity:.0%}): {error}")
