"""Locating by cause: what changes in the output when one run's activation is put into another run.

heat = probe.patching.patch(model, pairs, metric="logit_diff", component="resid_pre")
heat.plot()
heat.top(1)  # the Direction clean - corrupted at the most causal layer and position
probe.patching.logit_lens(model, questions).to_df()  # the answer's probability and rank after every layer
"""

from __future__ import annotations

from probe.patching._cross import patched_logprobs
from probe.patching._states import AnswerStates, answer_states
from probe.patching.activation import COMPONENTS, patch
from probe.patching.lens import LensScores, logit_lens, unembed
from probe.patching.metrics import METRICS, log_prob, logit_diff

__all__ = [
    "COMPONENTS",
    "METRICS",
    "AnswerStates",
    "LensScores",
    "answer_states",
    "log_prob",
    "logit_diff",
    "logit_lens",
    "patch",
    "patched_logprobs",
    "unembed",
]
