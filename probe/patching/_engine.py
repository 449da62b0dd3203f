"""The forwards of a patching sweep: pairs of one length, one layer at a time, many cells in one batch.

Every number here is exact: each cell is a whole forward of the base run with one thing replaced.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from activations_cache import sites
from activations_cache.sites import Site
from probe.patching._pairs import Slot, Tokenised
from probe.patching.metrics import Metric


@dataclass(frozen=True)
class Plan:
    """What a sweep does.

    Attributes:
        sites: The sites to patch, one a layer.
        heads: Heads of a site that are patched one by one; 0 where the whole site is.
        denoise: Patch clean values into the corrupted run; otherwise corrupted ones into the clean run.
        metric: What is read at the last position.
        n_random: Random twins per pair and cell.
        batch_size: Runs per forward.
        seed: Seed of the twins.
    """

    sites: tuple[Site, ...]
    heads: int
    denoise: bool
    metric: Metric
    n_random: int
    batch_size: int
    seed: int


@dataclass(frozen=True)
class Effects:
    """What one pair gave. Values of the metric, not normalised.

    Attributes:
        clean: Metric of the clean run.
        corrupted: Metric of the corrupted run.
        raw: Metric of each patched run, [variant, layer, slot, head]; variant 0 is the patch, the others its twins.
        difference: Clean minus corrupted value, mean over the slot's positions, [layer, slot, *shape].
    """

    clean: float
    corrupted: float
    raw: Float[np.ndarray, "variant layer slot head"]
    difference: Float[Tensor, "layer slot *shape"]


@dataclass(frozen=True)
class Batch:
    """Pairs of equal token length that are run together, with their indices in the data set and their slots."""

    pairs: Sequence[Tokenised]
    index: Sequence[int]
    slots: Sequence[Sequence[Slot]]


def batches(pairs: Sequence[Tokenised], slots: Sequence[Sequence[Slot]], size: int) -> Iterator[Batch]:
    """Group pairs by length and by number of slots, at most `size` together."""
    alike: dict[tuple[int, int], list[int]] = {}
    for i, pair in enumerate(pairs):
        alike.setdefault((len(pair), len(slots[i])), []).append(i)
    for members in alike.values():
        for start in range(0, len(members), size):
            index = members[start : start + size]
            yield Batch([pairs[i] for i in index], index, [slots[i] for i in index])


def last_logits(hf: Any, ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch d_vocab"]:
    """Logits at the last position; only that one is unembedded where the model can be told so."""
    short = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(hf.forward).parameters else {}
    logits: Tensor = hf(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **short).logits
    return logits[:, -1]


class Sweep:
    """All cells of one `Batch`.

    Args:
        hf: The bare model.
        batch: Pairs of one length.
        plan: What to do.
    """

    def __init__(self, hf: Any, batch: Batch, plan: Plan) -> None:
        self.hf, self.batch, self.plan = hf, batch, plan
        device = next(hf.parameters()).device
        self.clean = torch.tensor([pair.clean for pair in batch.pairs], device=device)  # [pair, pos]
        self.corrupted = torch.tensor([pair.corrupted for pair in batch.pairs], device=device)  # [pair, pos]
        self.answer = _tokens([pair.answer for pair in batch.pairs], device)  # [pair]
        self.wrong = _tokens([pair.wrong for pair in batch.pairs], device)  # [pair]
        self.mask = self._mask(device)  # [pair, slot, pos]

    def run(self) -> Iterator[list[Effects] | int]:
        """Yield the number of patched runs after each layer; last, the pairs' effects."""
        clean_values, clean = self._read(self.clean)
        corrupted_values, corrupted = self._read(self.corrupted)
        raw, differences = [], []
        for site in self.plan.sites:
            pair_values = clean_values.pop(site.name), corrupted_values.pop(site.name)  # each [pair, pos, *shape]
            source, base = pair_values if self.plan.denoise else pair_values[::-1]
            raw.append(self._layer(site, source, base))
            differences.append(self._slot_means(pair_values[0] - pair_values[1]))
            yield raw[-1].size
        stacked = np.stack(raw, axis=2)  # [variant, pair, layer, slot, head]
        vectors = torch.stack(differences, dim=1)  # [pair, layer, slot, *shape]
        yield [
            Effects(float(clean[i]), float(corrupted[i]), stacked[:, i], vectors[i])
            for i in range(len(self.batch.pairs))
        ]

    def _read(self, ids: Int[Tensor, "pair pos"]) -> tuple[dict[str, Tensor], Tensor]:
        """Values at every site of the plan, and the metric of the run as it is."""
        kept: dict[str, Tensor] = {}

        def keep(value: Tensor, site: Site) -> None:
            kept[site.name] = value.detach().clone()

        with sites.hooked(self.hf, {site.name: keep for site in self.plan.sites}):
            logits = last_logits(self.hf, ids)
        return kept, self.plan.metric(logits, self.answer, self.wrong)

    def _layer(self, site: Site, source: Tensor, base: Tensor) -> Float[np.ndarray, "variant pair slot head"]:
        """Every slot (and head) of one site: the source's value put into the base run, and the random twins of that."""
        twins = (base + self._twin(site, source - base, draw) for draw in range(self.plan.n_random))
        sources = torch.stack([source, *twins])  # [variant, pair, pos, *shape]
        shape = (len(sources), *self.mask.shape[:2], max(self.plan.heads, 1))
        rows = np.stack(np.unravel_index(np.arange(np.prod(shape)), shape), axis=1)  # [row, 4]
        found = [self._forward(site, sources, part) for part in _chunks(rows, self.plan.batch_size)]
        return np.concatenate(found).reshape(shape)

    def _twin(self, site: Site, step: Float[Tensor, "pair pos *shape"], draw: int) -> Tensor:
        """A random direction of the same norm as `step`, per position (and per head). Does not depend on batching."""
        drawn = []
        for index in self.batch.index:
            seed = np.random.SeedSequence([self.plan.seed, index, site.layer or 0, draw]).generate_state(1)[0]
            rng = torch.Generator().manual_seed(int(seed))
            drawn.append(torch.randn(step.shape[1:], generator=rng))
        noise = torch.stack(drawn).to(step)  # [pair, pos, *shape]
        return noise * (step.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))

    def _forward(self, site: Site, sources: Tensor, rows: Int[np.ndarray, "row 4"]) -> Float[np.ndarray, " row"]:
        """The metric of one batch of patched runs; a row is (variant, pair, slot, head)."""
        variant, pair, slot, head = torch.from_numpy(rows).to(self.clean.device).T
        where = self._where(self.mask[pair, slot], head)  # [row, pos, *1]

        def replace(value: Tensor, _: Site) -> Tensor:
            return torch.where(where, sources[variant, pair].to(value), value)

        ids = (self.corrupted if self.plan.denoise else self.clean)[pair]
        with sites.hooked(self.hf, {site.name: replace}):
            logits = last_logits(self.hf, ids)
        return self.plan.metric(logits, self.answer[pair], self.wrong[pair]).double().cpu().numpy()

    def _where(self, positions: Bool[Tensor, "row pos"], head: Int[Tensor, " row"]) -> Tensor:
        """Which entries of the site's value a row replaces: [row, pos, 1] or [row, pos, n_heads, 1]."""
        if not self.plan.heads:
            extra = len(self.plan.sites[0].shape)
            return positions.reshape(*positions.shape, *[1] * extra)
        chosen = head[:, None] == torch.arange(self.plan.heads, device=head.device)  # [row, n_heads]
        return rearrange(positions, "r p -> r p 1 1") & rearrange(chosen, "r h -> r 1 h 1")

    def _mask(self, device: torch.device) -> Bool[Tensor, "pair slot pos"]:
        mask = torch.zeros(len(self.batch.pairs), len(self.batch.slots[0]), self.clean.shape[1], dtype=torch.bool)
        for i, own in enumerate(self.batch.slots):
            for j, slot in enumerate(own):
                mask[i, j, list(slot.positions)] = True
        return mask.to(device)

    def _slot_means(self, difference: Float[Tensor, "pair pos *shape"]) -> Float[Tensor, "pair slot *shape"]:
        """Mean over each slot's positions."""
        weight = self.mask.float() / self.mask.sum(-1, keepdim=True)  # [pair, slot, pos]
        flat = difference.float().flatten(2)  # [pair, pos, d]
        return torch.bmm(weight, flat).unflatten(-1, difference.shape[2:]).cpu()


def _tokens(values: Sequence[int | None], device: torch.device) -> Int[Tensor, " pair"]:
    return torch.tensor([-1 if value is None else value for value in values], device=device)


def _chunks(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
