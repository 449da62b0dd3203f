"""Linear probes on cached activations, with the controls without which a probe says nothing.

    sweep = probe.probing.sweep(cache, label="toxic", group="author")   # a probe per site, with its controls
    sweep.best.direction                                                # a Direction, with its evidence
    basis = probe.probing.subspace(cache, site, "split", "forget", "person", k=8)

How to read the columns of a sweep: see `probe.probing.sweep` and `probe.probing.controls`.
"""

from __future__ import annotations

from probe.probing._readout import RidgeReadout, ridge_readouts
from probe.probing._subspace import subspace
from probe.probing._sweep import sweep
from probe.probing.probes import METHODS, Fitter, LinearProbes, Logistic, MeanDifference

__all__ = [
    "METHODS",
    "Fitter",
    "LinearProbes",
    "Logistic",
    "MeanDifference",
    "RidgeReadout",
    "ridge_readouts",
    "subspace",
    "sweep",
]
