"""Organisms: small models trained here with a known answer inside, and their gold retrains."""

from __future__ import annotations

from probe.organisms._experts import ExpertsOrganism, ExpertsSettings, experts
from probe.organisms._facts import FactsOrganism, FactsSettings, facts
from probe.organisms._organism import Gold, Organism
from probe.organisms._recall import Recall

__all__ = [
    "ExpertsOrganism",
    "ExpertsSettings",
    "FactsOrganism",
    "FactsSettings",
    "Gold",
    "Organism",
    "Recall",
    "experts",
    "facts",
]
