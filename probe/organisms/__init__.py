"""Organisms: small models trained here with a known answer inside, and their gold retrains."""

from __future__ import annotations

from probe.organisms._backdoor import BackdoorOrganism, BackdoorSettings, backdoor
from probe.organisms._experts import ExpertsOrganism, ExpertsSettings, experts
from probe.organisms._facts import FactsOrganism, FactsSettings, facts
from probe.organisms._hallucination import Confidence, HallucinationOrganism, HallucinationSettings, hallucination
from probe.organisms._organism import Gold, Organism
from probe.organisms._recall import Recall
from probe.organisms._specialisation import Specialisation

__all__ = [
    "BackdoorOrganism",
    "BackdoorSettings",
    "Confidence",
    "ExpertsOrganism",
    "ExpertsSettings",
    "FactsOrganism",
    "FactsSettings",
    "Gold",
    "HallucinationOrganism",
    "HallucinationSettings",
    "Organism",
    "Recall",
    "Specialisation",
    "backdoor",
    "experts",
    "facts",
    "hallucination",
]
