from __future__ import annotations

import json

import jsonschema
import pytest
import yaml

from probe import recipe
from probe.errors import RecipeError

GOOD = {
    "format": 1,
    "name": "x",
    "model": {"organism": "facts"},
    "edit": {"candidates": [{"method": "project_out", "target": "direction"}]},
}


def changed(**parts):
    made = json.loads(json.dumps(GOOD))
    for path, value in parts.items():
        *outer, last = path.split("__")
        place = made
        for key in outer:
            place = place[int(key) if key.isdigit() else key]
        place[last] = value
    return made


def test_the_schema_is_valid_and_its_defaults_fit_it():
    jsonschema.Draft202012Validator.check_schema(recipe.schema())
    made = recipe.resolve(GOOD)
    assert recipe.resolve(made) == made  # resolving is idempotent: what is written can be run again
    assert made["probe"]["folds"] == 5 and made["edit"]["candidates"][0]["layers"] == "all"
    assert made["model"]["size"] == "default" and made["experts"] is False


def test_the_audit_of_a_recipe_has_the_default_parts_unless_it_names_some():
    assert recipe.resolve(GOOD)["audit"] == {"gold": 2, "n_boot": 1000, "parts": None, "batch_size": 64}
    for parts in ([], ["uds", "redteam"], None):
        assert recipe.resolve(changed(audit={"parts": parts}))["audit"]["parts"] == parts
    made = recipe.resolve(changed(edit__candidates__0__strength=[1.0, 1.2]))
    assert made["edit"]["candidates"][0]["strength"] == [1.0, 1.2] and recipe.resolve(made) == made


@pytest.mark.parametrize("name", [p.stem for p in recipe.embedded().parent.glob("*.yaml")])
def test_embedded_recipes_fit(name):
    made = recipe.read(recipe.embedded(name))
    assert made["format"] == 1


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"nonsense": 1}, "nonsense"),
        ({"format": 2}, "format: 1 was expected"),
        ({"model": {}}, "model"),
        ({"model": {"organism": "facts", "path": "x"}}, "model"),
        ({"model__path": "x", "model__organism": None}, "model"),
        ({"edit__candidates": []}, "edit.candidates"),
        ({"edit__candidates__0__target": "magic"}, "edit.candidates.0.target: 'magic' is not one of"),
        ({"edit__candidates__0__method": "magic"}, "edit.candidates.0"),
        ({"probe": {"folds": 1}}, "probe.folds: 1 is less than the minimum of 2"),
        ({"probe": {"fold": 3}}, "probe: 'fold' is no key here; did you mean 'folds'"),
        ({"probe": True}, "probe: must be false or a mapping of settings, not True"),
        ({"probe": False}, "needs 'probe', which is false"),
        ({"edit__candidates__0__k": [3]}, "a direction has rank 1"),
        ({"sae": {"d_sae": 4, "k": 8}}, "sae.k .8. must not be above sae.d_sae .4."),
        ({"data": {"corpus": "c", "word": "a", "others": ["b"]}}, "an organism brings its own data"),
        (
            {"model": {"path": "x", "attribute": "city"}, "data": {"corpus": "c", "word": "a", "others": ["b"]}},
            "organism's",
        ),
        ({"model": {"path": "x"}}, "needs 'data'"),
        ({"patch": False, "edit__candidates__0__target": "patch"}, "needs 'patch'"),
        ({"audit": {"parts": ["quantization"]}}, "audit.parts.0: 'quantization' is no part.*mean 'quantisation'"),
        ({"audit": {"parts": ["uds", "magic"]}}, "audit.parts.1: 'magic' is no part of the audit; known: behaviour"),
        ({"audit": {"parts": ["uds", "uds"]}}, "audit.parts: .* has non-unique elements"),
        ({"audit": {"parts": "uds"}}, "audit.parts"),
        ({"audit": {"batch_size": 0}}, "audit.batch_size: 0 is less than"),
        ({"edit__candidates__0__strength": [1.0, 0]}, "edit.candidates.0.strength.1: 0 is less than or equal"),
        ({"edit__candidates__0__strength": []}, "edit.candidates.0.strength"),
    ],
)
def test_bad_recipes_are_refused_with_the_place(parts, says):
    with pytest.raises(RecipeError, match=says):
        recipe.resolve(changed(**parts))


def test_a_wrong_key_has_its_own_line_and_a_key_twice_is_refused(tmp_path):
    path = tmp_path / "r.yaml"
    text = yaml.safe_dump(GOOD, sort_keys=False)
    path.write_text(text + "audits: {}\n")
    with pytest.raises(RecipeError, match=rf"r\.yaml:{len(text.splitlines()) + 1}: .*did you mean 'audit'"):
        recipe.read(path)
    path.write_text(text + "name: again\n")
    with pytest.raises(RecipeError, match=rf"r\.yaml:{len(text.splitlines()) + 1}: the key 'name' is given twice"):
        recipe.read(path)


def test_the_message_names_the_line(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(GOOD, sort_keys=False) + "probe:\n  folds: 1\n")
    line = path.read_text().splitlines().index("  folds: 1") + 1
    with pytest.raises(RecipeError, match=rf"r\.yaml:{line}: probe\.folds"):
        recipe.read(path)


@pytest.mark.parametrize("content", ["a: [", "- 1\n", "\x00"])
def test_files_that_are_no_recipe(tmp_path, content):
    path = tmp_path / "r.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError):
        recipe.read(path)
    with pytest.raises(RecipeError, match="no recipe file"):
        recipe.read(tmp_path / "absent.yaml")


def test_paths_are_the_recipes_own(tmp_path):
    (tmp_path / "m").mkdir()
    path = tmp_path / "r.yaml"
    data = {"corpus": "c.txt", "word": "a", "others": ["b"]}
    path.write_text(yaml.safe_dump({**GOOD, "model": {"path": "m"}, "data": data}))
    made = recipe.read(path)
    assert made["model"]["path"] == str(tmp_path / "m") and made["data"]["corpus"] == str(tmp_path / "c.txt")
    path.write_text(yaml.safe_dump({**GOOD, "model": {"path": "org/name"}, "data": data}))
    assert recipe.read(path)["model"]["path"] == "org/name"
