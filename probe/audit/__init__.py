"""What an edit did: the edited model beside the original and beside models that never learned what was to be forgotten.

    card = probe.audit.audit(model, edit, forget, retain, holdout, unseen=unseen, gold=organism.gold, corpus=texts)
    card.sentence
    card.plot()

An audit measures and compares; it passes no verdict. Whether knowledge was removed or only suppressed cannot be read
from the outputs alone, and the card says what it did not measure.
"""

from __future__ import annotations

from probe.audit._audit import audit
from probe.audit._card import ReportCard

__all__ = ["ReportCard", "audit"]
