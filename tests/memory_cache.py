"""The reading side of a cache over arrays in memory, for tests that need activations with a known answer.

It has what the locators use of `activations_cache.Cache`; that the two agree is tested in tests/probe/test_probing.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


@dataclass
class _View:
    values: torch.Tensor
    spec: Any

    def __getitem__(self, rows: Any) -> torch.Tensor:
        return self.values[rows]


@dataclass
class MemoryCache:
    """One stored row per sequence unless `sequence` says otherwise."""

    data: dict[str, np.ndarray]
    columns: dict[str, Any] = field(default_factory=dict)
    input_ids: list[list[int]] | None = None
    sequence: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = len(next(iter(self.data.values())))
        sequence = np.arange(n) if self.sequence is None else np.asarray(self.sequence)
        starts = np.r_[0, np.flatnonzero(np.diff(sequence)) + 1]
        position = np.arange(n) - np.repeat(starts, np.diff(np.r_[starts, n]))
        self.n_sequences = int(sequence.max()) + 1
        ids = self.input_ids or [[i] * int((sequence == i).sum()) for i in range(self.n_sequences)]
        token = np.array([ids[s][p] for s, p in zip(sequence, position, strict=True)])
        self.rows = {"sequence": sequence, "position": position, "token": token}
        self.sequences = {"input_ids": [np.asarray(i) for i in ids], **self.columns}
        self.sites = tuple(self.data)
        self.model = SimpleNamespace(name="memory", weights_hash="0" * 64)

    def __len__(self) -> int:
        return len(self.rows["sequence"])

    def __contains__(self, site: object) -> bool:
        return site in self.data

    def __getitem__(self, site: str) -> _View:
        return _View(torch.as_tensor(self.data[site]), SimpleNamespace(name=site))

    @property
    def stats(self) -> dict[str, Any]:
        found = {}
        for name, rows in self.data.items():
            x = torch.as_tensor(rows).double()
            norm = float(x.flatten(1).norm(dim=1).mean())
            found[name] = SimpleNamespace(count=len(x), mean=x.mean(0), var=x.var(0, unbiased=False), norm=norm)
        return found

    def tokens(self, row: int) -> np.ndarray:
        return self.sequences["input_ids"][self.rows["sequence"][row]]

    def batches(
        self,
        site: str,
        batch_size: int = 4096,
        seed: int = 0,
        epochs: int | None = 1,
        dtype: torch.dtype | None = None,
        **_: Any,
    ) -> Any:
        values = torch.as_tensor(self.data[site])
        values = values if dtype is None else values.to(dtype)
        rng = torch.Generator().manual_seed(seed)
        epoch = 0
        while epochs is None or epoch < epochs:
            order = torch.randperm(len(values), generator=rng)
            for part in order.split(batch_size):
                yield values[part]
            epoch += 1
