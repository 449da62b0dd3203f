"""Probe: find where a language model holds something, cut it out of the weights, prove it, export the model.

    import probe

    model = probe.load("name-or-path")
    organism = probe.organisms.facts()

Names are loaded on first use: `import probe` does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from activations_cache._lazy import lazy

if TYPE_CHECKING:
    from probe import (
        audit,
        data,
        editing,
        errors,
        experts,
        features,
        models,
        organisms,
        patching,
        plots,
        probing,
        targets,
        unlearning,
    )
    from probe._export import export
    from probe._report import report
    from probe._run import run
    from probe.models import load

__version__ = "0.1.0"

__all__ = [
    "audit",
    "data",
    "editing",
    "errors",
    "experts",
    "export",
    "features",
    "load",
    "models",
    "organisms",
    "patching",
    "plots",
    "probing",
    "report",
    "run",
    "targets",
    "unlearning",
]

__getattr__, __dir__ = lazy(
    __name__,
    {"export": "_export", "load": "models", "report": "_report", "run": "_run"},
    modules=(
        "audit",
        "data",
        "editing",
        "errors",
        "experts",
        "features",
        "models",
        "organisms",
        "patching",
        "plots",
        "probing",
        "targets",
        "unlearning",
    ),
)
