"""Organisms: small models trained here with a known answer inside, and their gold retrains."""

from __future__ import annotations

from probe.organisms._facts import FactsOrganism, FactsSettings, facts
from probe.organisms._organism import Gold, Organism
from probe.organisms._recall import Recall

__all__ = ["FactsOrganism", "FactsSettings", "Gold", "Organism", "Recall", "facts"]
