"""Edits of a facts organism whose verdict is known: what the benchmarks of the audit judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from probe.audit import Case
from probe.models import Model

# Gentle enough that what is to stay stays: at three times this rate retained recall falls below 60 %.
LR, STEPS, RETAIN_WEIGHT = 1e-4, 400, 3.0


def untouched(case: Case) -> dict[str, Callable[[], Any]]:
    """Models that still know: the original, and the original with every weight off by a thousandth of its spread."""
    return {"none": lambda: case.original, "noise": lambda: perturbed(case.original, 1e-3)}


def suppressed(case: Case) -> dict[str, Callable[[], Any]]:
    """Edits that hide: a filter, a refusal, gradient methods stopped as soon as the answers flip."""
    from probe import unlearning
    from probe.editing import filters

    model, forget, retain = case.original, case.sets["forget"], case.sets["retain"]
    names = sorted(set(forget.groups))
    how: dict[str, Any] = {"lr": LR, "steps": STEPS, "progress": False}
    both = {**how, "retain_weight": RETAIN_WEIGHT}
    return {
        "filter": lambda: filters.refuse_when(model, names),
        "refusal": lambda: unlearning.refusal_finetune(model, forget, retain, stop_at=0.01, **both),
        "ascent": lambda: unlearning.gradient_ascent(model, forget, stop_at=0.1, **how),
        "difference": lambda: unlearning.grad_diff(model, forget, retain, stop_at=0.05, **both),
        "npo": lambda: unlearning.npo(model, forget, retain, stop_at=0.05, **both),
    }


def removed(case: Case) -> dict[str, Callable[[], Any]]:
    """Models that never learned it and are no gold: golds with noise, rounded to 8 bits, trained on with retain."""
    gold = case.golds[len(case.golds) - 1]
    return {
        "gold, noise": lambda: perturbed(gold, 1e-3),
        "gold, 8 bits": lambda: rounded(gold),
        "gold, tuned on": lambda: tuned(gold, case),
    }


def perturbed(model: Model, size: float) -> Model:
    """A copy with normal noise of `size` times each tensor's standard deviation."""
    import torch

    own = copied(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in own.hf.parameters():
            spread = p.std() if p.numel() > 1 else torch.ones(())
            p.add_(torch.randn(p.shape, generator=generator) * spread * size)
    return own


def rounded(model: Model) -> Model:
    """A copy rounded to 8 bits."""
    from probe.audit.quantisation import quantise_

    own = copied(model)
    quantise_(own.hf, "8bit")
    return own


def tuned(model: Model, case: Case) -> Model:
    """A copy trained for twenty more steps on retain."""
    from probe.audit._finetune import finetune

    own = copied(model)
    finetune(own, case.sets["retain"], steps=20, lr=1e-4, seed=7)
    return own


def copied(model: Model) -> Model:
    """A copy of a model."""
    import copy

    from probe.models import wrap

    return wrap(copy.deepcopy(model.hf), model.tokenizer, model.name)


def without_last_gold(case: Case) -> Case:
    """The case for what is made from the last gold: that gold is no reference of its own copy."""
    from dataclasses import replace

    return replace(case, golds=[case.golds[i] for i in range(len(case.golds) - 1)])


def bar(items: list[Any], text: str) -> Iterator[Any]:
    """A progress bar."""
    from tqdm.auto import tqdm

    return iter(tqdm(items, desc=text))
