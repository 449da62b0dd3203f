"""The steps of a walk that look: capture, probe sweep, patching, SAE, experts. Each returns what the report shows."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool

from probe._run._materials import Materials
from probe.data import Questions, split_groups
from probe.errors import RecipeError
from probe.targets import Experts, Scores, Target

POSITIVE = "to forget"  # the label of what is looked for, in the cache of labelled texts


@dataclass(frozen=True)
class Found:
    """What the locating steps of a walk found; None where the recipe left a step out."""

    sweep: Scores | None = None
    subspace: Mapping[int, Target] | None = None
    patch: Scores | None = None
    latents: Scores | None = None
    contexts: pd.DataFrame | None = None
    sae: Any = None
    sae_evaluation: Any = None
    experts: ExpertsFound | None = None


@dataclass(frozen=True)
class ExpertsFound:
    """Expert attribution on a small mixture, with the removal that checks it."""

    organism: Any
    domain: str
    scores: Scores
    target: Experts
    removal: pd.DataFrame
    planted: list[tuple[int, int]]


def capture(recipe: Mapping[str, Any], materials: Materials, out: Path, progress: bool) -> Any:
    """Activations of the labelled texts, at their last token."""
    rows = materials.labelled
    labels = [POSITIVE if label == materials.positive else "other" for label in rows.labels]
    frame = pd.DataFrame({"text": rows.texts, "label": labels, "group": rows.groups})
    settings = recipe["capture"]
    return _captured(
        out / "cache" / "labelled",
        materials.model,
        frame,
        settings["sites"],
        positions="last",
        dtype=settings["dtype"],
        batch_tokens=settings["batch_tokens"],
        progress=progress,
    )


def _captured(place: Path, model: Any, data: Any, sites: list[str], **settings: Any) -> Any:
    """Capture; a cache of something else that an earlier run left in this run's own directory is replaced."""
    import activations_cache as ac
    from activations_cache.errors import CacheMismatchError

    try:
        return ac.capture(model, data, sites, place, **settings)
    except CacheMismatchError:
        shutil.rmtree(place)
        return ac.capture(model, data, sites, place, **settings)


def sweep(recipe: Mapping[str, Any], materials: Materials, cache: Any, progress: bool) -> Scores:
    """One probe a layer and method, with its controls."""
    from probe import probing

    settings = recipe["probe"]
    return probing.sweep(
        cache,
        "label",
        "group",
        methods=settings["methods"],
        positive=POSITIVE,
        folds=settings["folds"],
        seed=recipe["seed"],
        n_boot=settings["n_boot"],
        progress=progress,
    )


def subspaces(recipe: Mapping[str, Any], materials: Materials, cache: Any, site: str) -> dict[int, Target]:
    """A contrast subspace of each rank that a candidate asks for."""
    from probe import probing

    ranks = {k for c in recipe["edit"]["candidates"] if c.get("target") == "subspace" for k in c["k"]}
    return {
        k: probing.subspace(cache, site, "label", POSITIVE, "group", k=k, seed=recipe["seed"]) for k in sorted(ranks)
    }


def patch(recipe: Mapping[str, Any], materials: Materials, progress: bool) -> Scores:
    """Exact activation patching of the pairs."""
    from probe import patching

    component = recipe["patch"]["component"]
    return patching.patch(materials.model, materials.pairs, component=component, seed=recipe["seed"], progress=progress)


def latents(
    recipe: Mapping[str, Any], materials: Materials, cache: Any, site: str, home: Path, out: Path, progress: bool
) -> tuple[Any, Any, Scores, pd.DataFrame]:
    """An SAE of one site, trained on the corpus; its latents scored by how they separate the labels."""
    import saes
    from probe import features

    settings = recipe["sae"]
    place = home / "cache" / "corpus"
    texts = _captured(place, materials.model, list(materials.texts), [site], dtype="float32", progress=progress)
    held_out = _held_out(texts, recipe["seed"])
    sae = saes.train(
        texts,
        site,
        rows=~held_out,
        architecture=settings["architecture"],
        d_sae=settings["d_sae"],
        k=settings["k"],
        n_tokens=settings["n_tokens"],
        seed=recipe["seed"],
        out=out,
        progress=progress,
    )
    scores = features.latents(cache, site, sae, "label", POSITIVE, "group", seed=recipe["seed"], progress=progress)
    top = [int(i) for i in scores.table["latent"].to_numpy()[scores.ranking()[:5]]]
    shown = features.contexts(texts, site, sae, top, n=3, tokenizer=materials.model.tokenizer)
    evaluation = saes.evaluate(sae, texts, site, rows=np.flatnonzero(held_out))
    return sae, evaluation, scores, shown.to_df()


def _held_out(cache: Any, seed: int, share: float = 0.1) -> Bool[np.ndarray, " row"]:
    """Which rows belong to the texts that the SAE is evaluated on and not trained on."""
    sequence = np.asarray(cache.rows["sequence"])
    order = np.random.default_rng(seed).permutation(np.unique(sequence))
    return np.isin(sequence, order[: max(1, int(share * len(order)))])


def experts(recipe: Mapping[str, Any], out: Path, progress: bool) -> ExpertsFound:
    """Which expert of a small mixture holds a domain, and what switching it off does."""
    from probe import experts as room
    from probe import organisms

    settings = recipe["experts"]
    organism = organisms.experts(size=settings["size"], kind=settings["kind"], seed=recipe["seed"], progress=progress)
    domain = settings["domain"] or organism.domains[0]
    if domain not in organism.domains:
        raise RecipeError(f"experts.domain: there is no {domain!r}; the domains are {', '.join(organism.domains)}.")
    asked = {name: _halves(organism.splits[name]) for name in organism.domains}
    forget = asked[domain][0]
    retain = Questions(row for name, (located, _) in asked.items() if name != domain for row in located)
    scores = room.attribute(
        organism.model,
        forget,
        retain,
        seed=recipe["seed"],
        cache_dir=out / "cache" / "experts",
        progress=progress,
    )
    planted = list(organism.planted.get(domain, []))
    target = scores.top(max(1, len(planted)))
    assert isinstance(target, Experts)
    sets = {name: held_out for name, (_, held_out) in asked.items()}
    removal = room.removal(organism.model, target, sets, n_random=5, seed=recipe["seed"], progress=progress)
    return ExpertsFound(organism, domain, scores, target, removal, planted)


def _halves(questions: Questions) -> tuple[Questions, Questions]:
    """Half of the groups to locate with, half to evaluate on."""
    parts = split_groups(questions.groups, {"locate": 1, "evaluate": 1})
    return questions.take(parts["locate"]), questions.take(parts["evaluate"])
