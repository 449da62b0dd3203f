"""Locating by cause: what changes in the output when one run's activation is put into another run.

heat = probe.patching.patch(model, pairs, metric="logit_diff", component="resid_pre")
heat.plot()
heat.top(1)  # the Direction clean - corrupted at the most causal layer and position
"""

from __future__ import annotations

from probe.patching.activation import COMPONENTS, patch
from probe.patching.metrics import METRICS, log_prob, logit_diff

__all__ = ["COMPONENTS", "METRICS", "log_prob", "logit_diff", "patch"]
