"""Mixtures of experts: who is chosen for what, which experts hold a prompt set, what removing them does.

table = probe.experts.attribute(model, forget, retain)   # Scores, one row per layer and expert
probe.experts.removal(model, table, {"forget": forget, "retain": retain}, k=1)  # checked by switching them off
"""

from __future__ import annotations

from probe.experts._removal import removal, without
from probe.experts.routing import STATISTICS, Routing, attribute, attribute_cache, load

__all__ = ["STATISTICS", "Routing", "attribute", "attribute_cache", "load", "removal", "without"]
