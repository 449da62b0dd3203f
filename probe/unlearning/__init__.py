"""Unlearning by gradients: methods that train a copy of a model on forget and retain questions and return an `Edit`.

edit = probe.unlearning.npo(model, forget, retain, lr=1e-3, steps=60)
with edit.applied(model):
    ...

The model that is given keeps its weights. One training loop serves all methods; a method is its objective.
"""

from __future__ import annotations

from probe.unlearning.ascent import gradient_ascent
from probe.unlearning.difference import grad_diff
from probe.unlearning.npo import npo, npo_loss
from probe.unlearning.refusal import refusal_finetune

__all__ = ["grad_diff", "gradient_ascent", "npo", "npo_loss", "refusal_finetune"]
