"""Organisms: small models trained here with a known answer inside, and their gold retrains."""

from __future__ import annotations

from probe.organisms._backdoor import BackdoorOrganism, BackdoorSettings, backdoor
from probe.organisms._experts import ExpertsOrganism, ExpertsSettings, experts
from probe.organisms._facts import FactsOrganism, FactsSettings, facts
from probe.organisms._hallucination import Confidence, HallucinationOrganism, HallucinationSettings, hallucination
from probe.organisms._induction import InductionOrganism, InductionSettings, RepeatLoss, induction
from probe.organisms._organism import Gold, Organism
from probe.organisms._recall import Recall
from probe.organisms._skills import SkillsOrganism, SkillsSettings, skills
from probe.organisms._specialisation import Specialisation
from probe.organisms._tofu import Knowledge, TofuOrganism, TofuSettings, tofu
from probe.organisms._toxic import SentencePair, Toxicity, ToxicOrganism, ToxicSettings, toxic

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
    "InductionOrganism",
    "InductionSettings",
    "Knowledge",
    "Organism",
    "Recall",
    "RepeatLoss",
    "SentencePair",
    "SkillsOrganism",
    "SkillsSettings",
    "Specialisation",
    "TofuOrganism",
    "TofuSettings",
    "ToxicOrganism",
    "ToxicSettings",
    "Toxicity",
    "backdoor",
    "experts",
    "facts",
    "hallucination",
    "induction",
    "skills",
    "tofu",
    "toxic",
]
