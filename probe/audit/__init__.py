"""What an edit did: the edited model beside the original and beside models that never learned what was to be forgotten.

card = probe.audit.audit(model, edit, forget, retain, holdout, unseen=unseen, gold=organism.gold, corpus=texts)
card.verdict
card.plot()

bench = probe.audit.Bench(probe.audit.Case.of(organism))  # golds measured once, for many edits
cards = [bench.card(edit) for edit in edits]
"""

from __future__ import annotations

from probe.audit._across import Across, across
from probe.audit._audit import audit
from probe.audit._bench import Bench
from probe.audit._card import ReportCard
from probe.audit._case import Case
from probe.audit._registry import part, parts
from probe.audit.part import Estimate, Measurement, Metric, Number, Part, Subject, scratch
from probe.audit.verdict import Thresholds, Verdict, judge, thresholds

__all__ = [
    "Across",
    "Bench",
    "Case",
    "Estimate",
    "Measurement",
    "Metric",
    "Number",
    "Part",
    "ReportCard",
    "Subject",
    "Thresholds",
    "Verdict",
    "across",
    "audit",
    "judge",
    "part",
    "parts",
    "scratch",
    "thresholds",
]
