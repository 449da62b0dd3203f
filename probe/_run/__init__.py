"""`run`: one walk down the road, from a recipe to a report and an exported model.

The run directory holds `recipe.yaml` as resolved, `manifest.json` (versions, seeds, hashes, timings), `cache/`,
`scores/`, `tables/` (csv), `sae/`, `edit/`, `card/`, `report.html` and `model/`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from rich.markup import escape

from probe import recipe as recipes
from probe._run import _choose, _steps
from probe._run._collateral import collateral
from probe._run._collateral import sentence as worst_hit
from probe._run._materials import Materials, gather
from probe._run._terminal import Teller, audit_tables
from probe.errors import RecipeError

__all__ = ["RunResult", "run"]

MARK = "probe run"
PARTIAL = ".partial"
MADE = ("scores", "tables", "edit", "card", "model", "sae", "report.html", "recipe.yaml", "manifest.json")


@dataclass(frozen=True)
class RunResult:
    """What a walk made.

    Attributes:
        directory: The run directory.
        report: The page.
        model: The exported Hugging Face directory.
        card: The report card of the chosen edit.
        edit: The chosen edit.
        found: What each locating step found.
        seconds: Step to its duration.
    """

    directory: Path
    report: Path
    model: Path
    card: Any
    edit: Any
    found: _steps.Found
    seconds: Mapping[str, float]

    def _repr_html_(self) -> str:
        return str(self.card._repr_html_())


@dataclass
class _Walk:
    """One walk. What it makes lies in `out`, a folder inside `home`, until everything is done; caches lie in `home`."""

    recipe: dict[str, Any]
    home: Path
    out: Path
    teller: Teller
    progress: bool
    command: str
    results: dict[str, Any] = field(default_factory=dict)

    def table(self, name: str, table: Any) -> None:
        folder = self.out / "tables"
        folder.mkdir(exist_ok=True)
        table.to_csv(folder / f"{name}.csv", index=False)

    def scores(self, name: str, scores: Any) -> None:
        scores.save(self.out / "scores" / name)
        self.table(name, scores.to_df())


def run(
    recipe: str | Path | Mapping[str, Any],
    out: str | Path | None = None,
    *,
    progress: bool = True,
    quiet: bool = True,
    command: str = "",
) -> RunResult:
    """Walk down the road that a recipe describes.

    Args:
        recipe: A YAML file, or the recipe itself.
        out: The run directory; default `runs/` and the file's name. An earlier run there is replaced; its caches
            are used again where they fit.
        progress: Progress bars of the single steps.
        quiet: Say nothing in the terminal.
        command: What the report names as the command to reproduce it.

    Raises:
        RecipeError: the recipe does not fit the schema, or `out` holds something that is no run.
        ProbeError, ActivationsCacheError, SAEError: from the step that could not be done.
    """
    made = recipes.read(recipe)
    name = "run" if isinstance(recipe, Mapping) else Path(recipe).stem
    folder = Path(out) if out is not None else Path("runs") / name
    steps = (
        5 + bool(made["probe"] or made["sae"]) + sum(bool(made[key]) for key in ("probe", "patch", "sae", "experts"))
    )
    teller = Teller(steps, quiet)
    _prepare(folder, made)
    if not progress:
        _hide_loading_bars()
    walk = _Walk(made, folder, folder / PARTIAL, teller, progress, command or f"probe run recipe.yaml --out {folder}")
    teller.console.print(f"[bold]{escape(made['name'])}[/] [dim]→ {escape(str(folder))}[/]")
    return _go(walk)


def _go(walk: _Walk) -> RunResult:
    with walk.teller.step("Model and data") as found:
        materials = gather(walk.recipe, walk.progress)
        found += _say_materials(materials)
    located = _locate(walk, materials)
    with walk.teller.step("Choose an edit on the select split") as found:
        chosen = _choose.choose(walk.recipe, materials, located)
        found += _say_chosen(chosen)
        walk.table("candidates", chosen.table)
        walk.table("twins", chosen.twins)
    with walk.teller.step("Audit on the evaluate split") as found:
        card = _audit(walk.recipe, materials, chosen, walk.progress)
        card.save(walk.out / "card")
        walk.table("audit", card.to_df())
        hurt = collateral(card, materials.retain["evaluate"])
        walk.table("collateral", hurt)
        found += [*card.sentences.values(), worst_hit(hurt)]
    with walk.teller.step("Export, and reload in a fresh process") as found:
        edit = chosen.edit.with_audit({"sentence": card.sentence})
        edit.save(walk.out / "edit")
        made = _export(walk, materials, edit)
        found.append(f"{walk.home / 'model'}: same logits, bit for bit")
    with walk.teller.step("Report") as found:
        page = _report(walk, materials, located, chosen, edit, card, hurt, made)
        found.append(f"{walk.home / page.name} ({page.stat().st_size / 1e6:.1f} MB, opens offline)")
    _finish(walk, materials, chosen, made)
    _say_end(walk, card)
    home = walk.home
    return RunResult(home, home / "report.html", home / "model", card, edit, located, dict(walk.teller.seconds))


def _locate(walk: _Walk, materials: Materials) -> _steps.Found:
    recipe = walk.recipe
    found: dict[str, Any] = {}
    cache: Any = None
    if recipe["probe"] or recipe["sae"]:
        with walk.teller.step("Capture") as lines:
            cache = _steps.capture(recipe, materials, walk.home, walk.progress)
            lines.append(f"{len(cache.sites)} sites, {len(materials.labelled)} texts at their last token")
    if recipe["probe"]:
        with walk.teller.step("Probe every layer, with controls") as lines:
            found["sweep"] = sweep = _steps.sweep(recipe, materials, cache, walk.progress)
            found["subspace"] = _steps.subspaces(recipe, materials, cache, str(sweep.best.site))
            walk.scores("sweep", sweep)
            lines += _say_sweep(sweep)
    if recipe["patch"]:
        with walk.teller.step("Patch activations by layer and position") as lines:
            found["patch"] = _steps.patch(recipe, materials, walk.progress)
            walk.scores("patch", found["patch"])
            lines.append(_say_best(found["patch"]))
    if recipe["sae"]:
        with walk.teller.step("Train a sparse autoencoder, rank its latents") as lines:
            site = str(found["sweep"].best.site) if "sweep" in found else list(cache.sites)[-1]
            made = _steps.latents(recipe, materials, cache, site, walk.home, walk.out / "sae", walk.progress)
            found |= dict(zip(("sae", "sae_evaluation", "latents", "contexts"), made, strict=True))
            walk.scores("latents", found["latents"])
            walk.table("contexts", found["contexts"])
            held_out = str(found["sae_evaluation"]).splitlines()[0]
            lines += [f"on texts that it was not trained on: {held_out}", _say_best(found["latents"])]
    if recipe["experts"]:
        with walk.teller.step("Find a domain's expert in a mixture, switch it off") as lines:
            found["experts"] = own = _steps.experts(recipe, walk.home, walk.progress)
            walk.scores("experts", own.scores)
            walk.table("removal", own.removal)
            lines += _say_experts(own)
    return _steps.Found(**found)


def _audit(recipe: Mapping[str, Any], materials: Materials, chosen: _choose.Chosen, progress: bool) -> Any:
    from probe.audit import audit

    settings = recipe["audit"]
    return audit(
        materials.model,
        chosen.edit,
        materials.forget["evaluate"],
        materials.retain["evaluate"],
        materials.holdout,
        unseen=materials.unseen,
        unseen_retain=materials.unseen_retain,
        sets=materials.sets,
        attacks=materials.attacks or None,
        gold=materials.gold or None,
        corpus=materials.fluency,
        parts=settings["parts"],
        people=materials.noun,
        batch_size=settings["batch_size"],
        n_boot=settings["n_boot"],
        seed=recipe["seed"],
        progress=progress,
    )


def _export(walk: _Walk, materials: Materials, edit: Any) -> Any:
    from probe._export import export

    place = walk.out / "model"
    return export(materials.model, edit, place, overwrite=True, dtype=walk.recipe["export"]["dtype"])


def _report(
    walk: _Walk,
    materials: Materials,
    found: _steps.Found,
    chosen: _choose.Chosen,
    edit: Any,
    card: Any,
    hurt: pd.DataFrame,
    made: Any,
) -> Path:
    from probe._report import report

    own, sae = found.experts, found.sae_evaluation
    summary = [
        worst_hit(hurt),
        _choose.spared_sentence(chosen, materials.noun),
        *_choose.sentences(chosen, walk.recipe["edit"]["max_retain_drop"], materials.split_by),
        *(f"Warning on the probe: {text}" for text in (found.sweep.warnings if found.sweep else [])),
    ]
    results = {
        "title": walk.recipe["name"],
        "sweep": found.sweep,
        "patch": found.patch,
        "latents": found.latents,
        "contexts": found.contexts,
        "experts": own.scores if own else None,
        "removal": own.removal if own else None,
        "candidates": chosen.table,
        "twins": chosen.twins,
        "edit": edit,
        "audit": card,
        "tables": {
            **({"the sparse autoencoder on texts that it was not trained on": sae.to_df()} if sae else {}),
            "retained answers by what the edit cost them (the worst ten)": hurt.head(10),
            **materials.tables,
        },
        "summary": [text for text in summary if text],
        "manifest": _manifest(walk, materials, chosen, made),
        "recipe": (walk.out / "recipe.yaml").read_text("utf-8"),
        "command": walk.command,
    }
    return report({key: value for key, value in results.items() if value is not None}, walk.out / "report.html")


def _manifest(walk: _Walk, materials: Materials, chosen: _choose.Chosen, made: Any) -> dict[str, Any]:
    from probe.editing.edit import library_versions

    return {
        "kind": MARK,
        "name": walk.recipe["name"],
        "command": walk.command,
        "seed": walk.recipe["seed"],
        "model": {
            "name": materials.model.name,
            "class": type(materials.model.hf).__name__,
            "hash": chosen.edit.base_hash,
        },
        "exported": {"directory": "model", "hash": made.weights_hash},
        "gold": [{"name": gold.name, "hash": gold.weights_hash} for gold in materials.gold],
        "rows": {
            name: {part: len(rows) for part, rows in sets.items()}
            for name, sets in (("forget", materials.forget), ("retain", materials.retain))
        },
        "split by": materials.split_by,
        "versions": library_versions(),
        "seconds": {name: round(value, 2) for name, value in walk.teller.seconds.items()},
    }


def _prepare(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Make the run directory. What an earlier run made stays until this one is done; its caches are used again.

    Raises:
        RecipeError: the directory holds something that is no run.
    """
    manifest = folder / "manifest.json"
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not _is_run(manifest))):
        raise RecipeError(f"{folder} holds something that is no run of probe; give another --out, or remove it.")
    folder.mkdir(parents=True, exist_ok=True)
    if not manifest.exists():
        _write_json(manifest, {"kind": MARK, "name": recipe["name"], "finished": False})
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)
    (folder / PARTIAL).mkdir()
    text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
    (folder / PARTIAL / "recipe.yaml").write_text(text, "utf-8")


def _hide_loading_bars() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


def _is_run(manifest: Path) -> bool:
    try:
        return bool(json.loads(manifest.read_text("utf-8")).get("kind") == MARK)
    except (OSError, ValueError, AttributeError):
        return False


def _finish(walk: _Walk, materials: Materials, chosen: _choose.Chosen, made: Any) -> None:
    """Put what was made in the place of what an earlier run made, the manifest last."""
    _write_json(walk.out / "manifest.json", {**_manifest(walk, materials, chosen, made), "finished": True})
    for name in MADE:
        old, new = walk.home / name, walk.out / name
        if old.is_dir():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)
        if new.exists():
            new.replace(old)
    walk.out.rmdir()


def _write_json(path: Path, value: Any) -> None:
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(value, indent=1), "utf-8")
    beside.replace(path)


def _say_materials(materials: Materials) -> list[str]:
    dims = materials.model.dims
    lines = [
        f"{materials.model.name}: {type(materials.model.hf).__name__}, {dims.n_layers} layers, d_model {dims.d_model}",
        f"forget {sum(map(len, materials.forget.values()))} and retain {sum(map(len, materials.retain.values()))} "
        f"questions, split by {materials.split_by}; {len(materials.gold)} gold retrains",
    ]
    return lines + list(materials.notes)


def _say_sweep(sweep: Any) -> list[str]:
    best = sweep.best
    lines = [
        f"best: layer {best.layer}, {best.method}: {sweep.score_name} {best.score:.2f} "
        f"[{best.low:.2f}, {best.high:.2f}]",
        f"controls: shuffled labels {best.control:.2f}, majority {best.majority:.2f}, "
        f"bag of tokens {best.bag_of_tokens:.2f}",
    ]
    return lines + [f"warning: {warning}" for warning in sweep.warnings]


def _say_best(scores: Any) -> str:
    row = scores.best.to_dict()
    keys = ("layer", "position", "token", "head", "expert", "latent")
    place = ", ".join(f"{key} {row[key]}" for key in keys if row.get(key) is not None)
    twin = next((f"; random twins {row[key]:.2f}" for key in ("twin_mean", "twin") if row.get(key) is not None), "")
    return f"best of {len(scores)}: {place}: {row['score']:.2f} {scores.score_name}{twin}"


def _say_experts(own: _steps.ExpertsFound) -> list[str]:
    known = f"; planted there: {own.planted}" if own.planted else ""
    lines = [f"{own.domain}: layer, expert {list(own.target.index)}{known}"]
    arms = own.removal[own.removal["set"] == own.domain].groupby("arm")["recall"].mean()
    others = own.removal[own.removal["set"] != own.domain].groupby("arm")["recall"].mean()
    for name, part in ((own.domain, arms), ("other domains", others)):
        lines.append(
            f"recall on {name}: {part['intact']:.0%} intact, {part['removed']:.0%} without the expert, "
            f"{part['random']:.0%} without a random one"
        )
    return lines


def _say_chosen(chosen: _choose.Chosen) -> list[str]:
    row = chosen.table[chosen.table["chosen"]].iloc[0]
    return [
        f"{row['candidate']}, rank {row['rank']}: forget probability {row['forget_prob']:.3f}, "
        f"retain {row['retain_prob']:.3f} (of {len(chosen.table) - 1} candidates)",
        *(f"not tried: {failure}" for failure in chosen.failures),
    ]


def _say_how(recipe: Mapping[str, Any], verdict: Any) -> str:
    """How the evidence is read; without a verdict for want of golds, how one is had."""
    from probe.audit.verdict import MIN_GOLDS

    told = "Evidence above its threshold speaks of knowledge that is still there."
    if verdict.label is not None or verdict.n_golds >= MIN_GOLDS or "organism" not in recipe["model"]:
        return told
    return (
        f"{told} A verdict holds the edit against the spread of {MIN_GOLDS} golds: `probe demo --gold {MIN_GOLDS}`, or "
        f"`audit: {{gold: {MIN_GOLDS}}}` in a recipe. It takes {MIN_GOLDS - verdict.n_golds} more models."
    )


def _say_end(walk: _Walk, card: Any) -> None:
    console, home = walk.teller.console, walk.home
    for table in audit_tables(card):
        console.print(table)
    if card.verdict is not None:
        console.print(card.verdict.sentence, style="bold", markup=False)
        console.print(_say_how(walk.recipe, card.verdict), markup=False, soft_wrap=True)
    total = sum(walk.teller.seconds.values())
    load = f"AutoModelForCausalLM.from_pretrained({str(home / 'model')!r})"
    console.print(f"\n{total:.0f} s in all. Load the model with {load}\n", soft_wrap=True, markup=False)
    console.print(f"Report: {home / 'report.html'}\nModel:  {home / 'model'}", soft_wrap=True, markup=False)
