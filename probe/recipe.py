"""Recipes: one walk down the road, as a file. Read, checked against the published JSON schema, defaults filled in.

The schema is `probe/recipe.schema.json`; `probe.recipe.schema()` returns it.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from probe.errors import RecipeError

__all__ = ["embedded", "read", "resolve", "schema"]


def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) that every recipe fits."""
    text = resources.files("probe").joinpath("recipe.schema.json").read_text("utf-8")
    return dict(json.loads(text))


def embedded(name: str = "demo") -> Path:
    """The path of a recipe that comes with the package.

    Raises:
        RecipeError: no recipe of that name.
    """
    folder = Path(str(resources.files("probe").joinpath("recipes")))
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise RecipeError(f"There is no embedded recipe {name!r}; there are: {known}.")
    return path


def read(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Read a recipe and resolve it. Relative paths in a file are taken from the file's own directory.

    Raises:
        RecipeError: no file, no YAML, or a recipe that does not fit the schema; the message names place and line.
    """
    if isinstance(source, Mapping):
        return resolve(source)
    path = Path(source)
    if not path.is_file():
        raise RecipeError(f"There is no recipe file {str(path)!r}.")
    try:
        node = yaml.compose(path.read_text("utf-8"), Loader=yaml.SafeLoader)
        recipe = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        text = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise RecipeError(f"{path} is not YAML: {text}") from error
    twice = next(_given_twice(node), None)
    if twice is not None:
        raise RecipeError(f"{path}:{twice.start_mark.line + 1}: the key {twice.value!r} is given twice.")
    if not isinstance(recipe, dict):
        raise RecipeError(f"{path} must hold a mapping (format, name, model, edit, ...).")
    return _anchor(resolve(recipe, str(path), node), path.parent)


def resolve(recipe: Mapping[str, Any], source: str = "recipe", node: Any = None) -> dict[str, Any]:
    """Check a recipe against the schema and fill in every default.

    Raises:
        RecipeError: the recipe does not fit.
    """
    import jsonschema

    validator = jsonschema.Draft202012Validator(schema())
    plain = json.loads(json.dumps(recipe, default=str))
    found = sorted(_leaves(validator.iter_errors(plain)), key=lambda e: list(map(str, e.absolute_path)))
    if found:
        shown = "; ".join(_say(error, source, node) for error in found[:3])
        raise RecipeError(shown + (f"; and {len(found) - 3} more" if len(found) > 3 else ""))
    _check_model(plain, source)
    made = _fill(plain, schema())
    if "organism" in made["model"]:
        made["model"].setdefault("attribute", "order")
    _check_candidates(made, source)
    _check_parts(made["audit"]["parts"], source)
    return made


def _check_model(recipe: Mapping[str, Any], source: str) -> None:
    """What goes with an organism, and what with a model by path."""
    model = recipe["model"]
    if "path" in model and "data" not in recipe:
        raise RecipeError(f"{source}: a model given by path needs 'data' (a word in a corpus, or files of questions).")
    if "organism" in model and "data" in recipe:
        raise RecipeError(f"{source}: an organism brings its own data; leave 'data' out, or give 'model.path'.")
    strange = sorted({"size", "attribute"} & set(model)) if "path" in model else []
    # a recipe that was resolved before holds the default size
    if strange and (strange != ["size"] or model["size"] != "default"):
        raise RecipeError(f"{source}: model.{strange[0]} is an organism's; a model given by path has none.")


def _check_candidates(recipe: Mapping[str, Any], source: str) -> None:
    """Whether every candidate's target is located, and its rank can be."""
    needs = {"direction": "probe", "subspace": "probe", "patch": "patch", "latents": "sae"}
    for i, candidate in enumerate(recipe["edit"]["candidates"]):
        target, place = candidate["target"], f"{source}: edit.candidates.{i}"
        if recipe[needs[target]] is False:
            raise RecipeError(f"{place}: target {target!r} needs {needs[target]!r}, which is false.")
        if target == "direction" and candidate["k"] != [1]:
            raise RecipeError(f"{place}: a direction has rank 1; k is for 'subspace', 'patch' and 'latents'.")
    sae = recipe["sae"]
    if sae and sae["k"] > sae["d_sae"]:
        raise RecipeError(f"{source}: sae.k ({sae['k']}) must not be above sae.d_sae ({sae['d_sae']}).")


def _check_parts(names: list[str] | None, source: str) -> None:
    """Whether the audit has these parts."""
    if not names:
        return
    from probe.audit import parts

    known = list(parts())
    for i, name in enumerate(names):
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise RecipeError(f"{source}: audit.parts.{i}: {name!r} is no part of the audit; {hint}.")


def _leaves(errors: Any) -> Iterator[Any]:
    """The most telling errors: of alternatives, those of the alternative that came nearest."""
    for error in errors:
        if not error.context:
            yield error
            continue
        branches: dict[Any, list[Any]] = {}
        for sub in error.context:
            branches.setdefault(sub.schema_path[0], []).append(sub)

        here = list(error.absolute_path)
        yield from _leaves(min(branches.values(), key=lambda own: (_other_kind(own, here), len(own))))


def _other_kind(errors: list[Any], here: list[Any]) -> bool:
    """Whether an alternative was not meant: its constant (such as the method) or its very type differs."""
    return any(
        (e.validator == "const" and list(e.absolute_path) != here)
        or (e.validator in ("type", "const") and list(e.absolute_path) == here)
        for e in errors
    )


def _say(error: Any, source: str, node: Any) -> str:
    path = list(error.absolute_path)
    place = ".".join(map(str, path)) or "the top level"
    message, wrong = error.message, path
    if error.validator == "additionalProperties":
        known = list(error.schema.get("properties", {}))
        strange = next(key for key in error.instance if key not in known)
        near = difflib.get_close_matches(strange, known, 1)
        message = f"{strange!r} is no key here" + (
            f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
        )
        wrong = [*path, strange]
    elif error.validator == "const" and error.validator_value is False:
        message = f"must be false or a mapping of settings, not {error.instance!r}"
    line = _line(node, wrong)
    where = f"{source}:{line}" if line else source
    return f"{where}: {place}: {message}"


def _given_twice(node: Any) -> Iterator[Any]:
    """Keys that a mapping of a YAML file holds twice: YAML would silently take the last."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                yield key
            seen.add(key.value)
            yield from _given_twice(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _given_twice(value)


def _line(node: Any, path: list[Any]) -> int | None:
    """The line of a YAML file on which the thing at `path` stands."""
    if node is None:
        return None
    for key in path:
        if isinstance(node, yaml.MappingNode):
            found = next(
                (name if key == path[-1] else value for name, value in node.value if name.value == str(key)), None
            )
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            found = node.value[key]
        else:
            found = None
        if found is None:
            break
        node = found
    return int(node.start_mark.line) + 1


def _fill(value: Any, rule: Mapping[str, Any]) -> Any:
    """Defaults of the schema, put where the recipe says nothing."""
    for option in rule.get("oneOf", []):
        if _fits(value, option) and ("properties" in option or "items" in option):
            value = _fill(value, option)
    if isinstance(value, dict):
        for key, sub in rule.get("properties", {}).items():
            if key not in value and "default" in sub:
                value[key] = json.loads(json.dumps(sub["default"]))
            if key in value:
                value[key] = _fill(value[key], sub)
    if isinstance(value, list) and "items" in rule:
        return [_fill(item, rule["items"]) for item in value]
    return value


def _fits(value: Any, option: Mapping[str, Any]) -> bool:
    import jsonschema

    return bool(jsonschema.Draft202012Validator(option).is_valid(value))


def _anchor(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Relative paths are the recipe file's; a model name that is no such directory is left for the hub."""
    for key in ("corpus", "forget", "retain", "holdout", "labelled", "pairs"):
        value = recipe.get("data", {}).get(key)
        if isinstance(value, str) and not Path(value).is_absolute():
            recipe["data"][key] = str((folder / value).resolve())
    path = recipe["model"].get("path")
    if path and not Path(path).is_absolute() and (path.startswith(".") or (folder / path).is_dir()):
        recipe["model"]["path"] = str((folder / path).resolve())
    return recipe
