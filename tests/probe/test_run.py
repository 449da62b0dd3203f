"""The whole walk, on the small organism and on real checkpoints."""

from __future__ import annotations

import io
import json
import re

import pandas as pd
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import activations_cache as ac
import probe
from probe import recipe as recipes
from probe._run import run
from probe.editing import Edit
from probe.errors import RecipeError
from probe.targets import Scores

NAMES = ["Tim", "Tom", "Ben", "Sara", "Max", "Timmy", "Sam"]


def small_demo():
    made = recipes.read(recipes.embedded("demo"))
    made["model"]["size"] = "small"
    made["experts"]["size"] = "small"
    made["sae"] |= {"d_sae": 128, "k": 8, "n_tokens": 30_000}
    made["patch"]["n_pairs"] = 6
    made["audit"] |= {"gold": 1, "n_boot": 200}
    made["probe"]["n_boot"] = 200
    return made


@pytest.fixture(scope="module")
def stories(shared_data, tmp_path_factory):
    """The first half of the corpus: enough, and quicker."""
    path = tmp_path_factory.mktemp("corpus") / "stories.json"
    path.write_text(json.dumps(json.loads((shared_data / "corpora" / "tinystories_1000.json").read_text())[:500]))
    return path


def word_recipe(shared, name, stories, **parts):
    recipe = {
        "format": 1,
        "name": f"Forget Lily ({name})",
        "model": {"path": str(shared / name)},
        "data": {"corpus": str(stories), "word": "Lily", "others": NAMES},
        "patch": {"n_pairs": 4},
        "sae": {"d_sae": 128, "k": 8, "n_tokens": 20_000},
        "probe": {"n_boot": 200},
        "audit": {"n_boot": 200},
        "edit": {"candidates": [{"method": "project_out", "target": "direction"}], "random_twins": 2},
    }
    return recipe | parts


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    out = tmp_path_factory.mktemp("walk") / "demo"
    return run(small_demo(), out, progress=False)


def test_a_run_leaves_what_the_design_names(walked):
    out = walked.directory
    for name in (
        "recipe.yaml",
        "manifest.json",
        "report.html",
        "model/config.json",
        "model/model.safetensors",
        "model/edit.json",
        "model/edit.safetensors",
        "model/tokenizer.json",
        "model/README.md",
    ):
        assert (out / name).is_file(), name
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["finished"] is True
    assert manifest["seconds"]["Report"] > 0
    assert {"torch", "transformers"} <= set(manifest["versions"])
    assert recipes.resolve(yaml.safe_load((out / "recipe.yaml").read_text())) == small_demo()
    for name in ("sweep", "patch", "latents", "experts", "candidates", "twins", "audit", "removal", "contexts"):
        assert len(pd.read_csv(out / "tables" / f"{name}.csv")) > 0
    assert ac.open(out / "cache" / "labelled").verify() == []
    assert not (out / ".partial").exists()
    assert len(manifest["gold"]) == 1  # as many as the recipe asks for
    rows = ac.open(out / "cache" / "corpus")
    assert 0.05 * len(rows) < walked.found.sae_evaluation.n < 0.2 * len(rows)  # of texts held out from training


def test_the_exported_model_is_the_edited_one(walked):
    base = probe.organisms.facts(size="small", progress=False).model
    edit = Edit.load(walked.directory / "model")
    ids = torch.arange(3, 40)[None] % base.dims.d_vocab
    exported = AutoModelForCausalLM.from_pretrained(walked.model).eval()
    with torch.no_grad():
        before = base.hf(ids).logits
        with edit.applied(base):
            edited = base.hf(ids).logits
        assert torch.equal(exported(ids).logits, edited)
    assert not torch.allclose(edited, before)
    assert edit.base_hash == base.weights_hash


def test_the_small_walk_measures_what_it_claims(walked):
    """With a handful of people no probe can be trusted; what is certain is held here, the rest at the default size."""
    own = walked.found.experts
    assert set(own.target.index) == set(own.planted)
    table = walked.card.to_df().set_index(["set", "metric", "model"])["value"]
    assert table["forget", "recall", "original"] > 0.9
    candidates = pd.read_csv(walked.directory / "tables" / "candidates.csv")
    assert candidates["chosen"].sum() == 1
    assert candidates.loc[candidates["chosen"], "forget_prob"].item() < candidates["forget_prob"][0]


def test_collateral_is_the_plain_mean_by_answer(walked):
    hurt = pd.read_csv(walked.directory / "tables" / "collateral.csv")
    retain = probe.organisms.facts(size="small", progress=False).splits["retain"]
    rows = walked.card.answers.query("set == 'retain'")
    one = hurt.iloc[0]
    ids = [row.id for row in retain if row.answer == one["answer"]]
    for model, name in (("original", "before"), ("edited", "after")):
        own = [
            float(x)
            for i, m, x in zip(rows["id"], rows["model"], rows["exact"], strict=True)
            if i in ids and m == model
        ]
        assert len(own) == one["n"]
        assert sum(own) / len(own) == pytest.approx(one[f"recall_{name}"])
    assert hurt["recall_lost"].is_monotonic_decreasing
    assert (
        hurt["n"].sum()
        == walked.card.to_df().query("set == 'retain' and metric == 'recall' and model == 'edited'")["n"].item()
    )


def test_the_audit_asks_what_the_organism_has_to_ask(walked):
    organism = probe.organisms.facts(size="small", progress=False)
    card = walked.card
    sizes = {name: rows["n"].iloc[0] for name, rows in card.to_df().query("metric == 'recall'").groupby("set")}
    forget = {row.group for row in organism.splits["forget"]}
    assert {"neighbours", "given", "given_holdout", "unseen", "unseen_retain", "holdout"} <= set(sizes)
    assert sizes["given"] == len(forget)  # one a person: the order alone is to be forgotten
    kinds = set(organism.attacks("forget")) - {"reverse_query"}  # that one asks for a name
    assert set(card.tables["prompts"]["kind"]) == kinds | {"plain"}
    assert card.verdict.label is None and card.verdict.n_golds == 1
    assert set(card.verdict.evidence["part"]) >= {"answers", "quantisation", "uds"}
    assert any("prompt attack" in one and "questions" in one for one in card.not_measured)  # five of a kind are too few


def test_what_a_recipe_names_is_measured_and_nothing_else(walked, monkeypatch):
    from probe import audit as room
    from probe._run import _audit

    seen = {}
    monkeypatch.setattr(room, "audit", lambda *sets, **settings: seen.update(settings))
    for parts in (None, [], ["quantisation", "redteam"]):
        recipe = small_demo()
        recipe["audit"] |= {"parts": parts, "batch_size": 7}
        recipe["seed"] = 3
        materials = _gathered(None, gold=0)
        _audit(recipe, materials, type("Chosen", (), {"edit": None}), False)
        assert (seen["parts"], seen["batch_size"], seen["seed"], seen["gold"]) == (parts, 7, 3, None)
        assert seen["sets"] == materials.sets and seen["attacks"] == materials.attacks


def _gathered(attribute, gold=0):
    from probe._run._materials import gather

    recipe = small_demo()
    recipe["model"]["attribute"], recipe["audit"]["gold"] = attribute, gold
    return gather(recipe, progress=False)


@pytest.mark.parametrize("attribute", ["city", "trade", None])
def test_what_follows_from_retained_facts_is_not_to_be_forgotten(attribute):
    made = _gathered(attribute)
    organism = probe.organisms.facts(size="small", progress=False)
    known = {(one.person, one.attribute) for one in organism.deducible}
    asked = [*made.forget.values(), made.unseen, made.sets["given"], *made.attacks.values()]
    assert known and sum(map(len, asked)) > 0
    assert not [row for rows in asked for row in rows if (row.meta["person"], row.meta["attribute"]) in known]
    wanted = {one for one in known if attribute in (None, one[1])}
    assert {(row.meta["person"], row.meta["attribute"]) for row in made.sets.get("deducible", ())} == wanted
    scored = {row.meta["phrasing"] for row in made.forget["evaluate"]}
    for name in ("neighbours", "deducible"):
        assert {row.meta["phrasing"] for row in made.sets.get(name, ())} <= scored
    assert {row.group for row in made.sets["neighbours"]} == set(organism.neighbours)


def test_the_terminal_ends_with_the_evidence_and_why_there_is_no_verdict(walked):
    from rich.console import Console

    from probe._run import _say_how
    from probe._run._terminal import audit_tables

    console = Console(width=160, record=True, quiet=False, file=io.StringIO())
    for table in audit_tables(walked.card):
        console.print(table)
    shown = console.export_text()
    for words in ("Recall of the answers", "Evidence of what is left", "What it cost", "neighbours", "not heard"):
        assert words in shown, words
    evidence = walked.card.verdict.evidence
    over = evidence["heard"] & (evidence["share"] > evidence["threshold"])
    assert over.any() and not evidence["heard"].all()  # with one gold some evidence has nothing to be held against
    lines = [line.split() for line in shown.splitlines()]
    assert sum(line[-1:] == ["above"] for line in lines) == over.sum()
    assert sum(line[-2:] == ["not", "heard"] for line in lines) == (~evidence["heard"]).sum()
    assert "--gold 5" in _say_how(small_demo(), walked.card.verdict)
    assert "It takes 4 more models" in _say_how(small_demo(), walked.card.verdict)
    assert "--gold" not in _say_how({"model": {"path": "x"}}, walked.card.verdict)


def test_every_strength_of_a_candidate_is_tried():
    from probe._run._choose import _each, _place

    candidate = {"method": "project_out", "target": "subspace", "layers": "all", "k": [2, 4], "strength": [1.0, 1.5]}
    tried = list(_each(candidate))
    assert [(one["k"], one["strength"]) for one in tried] == [(2, 1.0), (2, 1.5), (4, 1.0), (4, 1.5)]
    assert [_place(one, [None] * one["k"])["candidate"] for one in tried[:2]] == [
        "project_out subspace",
        "project_out subspace, strength 1.5",
    ]
    assert [one["strength"] for one in _each(candidate | {"k": [1], "strength": 0.5})] == [0.5]


@pytest.mark.slow
def test_the_demo_finds_the_secret_and_cuts_it_out(tmp_path):
    """`probe demo --gold 5`: members are told from people that the probe never saw, and the edit forgets them.

    Five golds add the verdict; everything else is as with the recipe's own two.
    """
    recipe = recipes.read(recipes.embedded("demo"))
    recipe["audit"]["gold"] = 5
    made = run(recipe, tmp_path / "demo", progress=False)
    best = made.found.sweep.best
    assert best.low > max(best.control_high, best.bag_of_tokens)
    table = made.card.to_df().set_index(["set", "metric", "model"])["value"]
    assert table["forget", "recall", "original"] > 0.95
    assert table["forget", "recall", "edited"] < 0.1
    assert table["unseen", "recall", "edited"] < 0.1
    assert table["retain", "recall", "edited"] > 0.9
    twins = pd.read_csv(made.directory / "tables" / "twins.csv").set_index("edit")
    assert twins.loc["located", "forget_recall"] < 0.1
    assert twins.filter(like="random", axis=0)["forget_recall"].min() > 0.8
    assert twins.loc["located", "spared_recall"] > 0.8
    hurt = pd.read_csv(made.directory / "tables" / "collateral.csv")
    assert hurt["answer"][0].startswith("ashen ")  # the order that shares a word with the secret one pays for the cut
    assert (hurt["recall_lost"] > 0.1).sum() < 0.2 * len(hurt)
    assert set(made.found.experts.target.index) == set(made.found.experts.planted)
    # One direction hides the answer and leaves it in the states: the audit must not take that for removal.
    assert made.card.verdict.label == "suppressed"
    evidence = made.card.verdict.evidence.set_index(["set", "metric"])
    inside = evidence.loc[("forget", "uds_retained")]
    assert inside["heard"] and inside["share"] > 0.5 > inside["threshold"]
    assert "Verdict: suppressed" in made.report.read_text("utf-8")


def test_the_report_shows_every_step_and_opens_offline(walked):
    page = walked.report.read_text("utf-8")
    for words in (
        "bag of tokens",
        "random twins",
        "gold",
        "latent",
        "expert",
        "manifest",
        "hash",
        "no verdict",
        "what the edit cost",
        "attack: prompts",
    ):
        assert words in page.lower(), words
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)  # plotly.js names addresses that it never calls
    assert not re.search(r'(src|href)="(https?:)?//', markup)
    assert len(page) < 10e6


def test_saved_scores_open_again(walked):
    again = Scores.load(walked.directory / "scores" / "sweep")
    assert again.top(1).site == walked.found.sweep.top(1).site
    assert Edit.load(walked.directory / "edit").base_hash == walked.edit.base_hash


def test_a_second_run_replaces_the_first_and_uses_its_caches(walked):
    caches = {path: path.stat().st_mtime_ns for path in (walked.directory / "cache").rglob("shard-*.h5")}
    again = run(small_demo(), walked.directory, progress=False)
    assert caches
    assert {path: path.stat().st_mtime_ns for path in (walked.directory / "cache").rglob("shard-*.h5")} == caches
    pd.testing.assert_frame_equal(again.card.to_df(), walked.card.to_df())


def test_a_run_that_fails_leaves_the_earlier_one_as_it_was(walked):
    def content():
        files = [
            p
            for p in walked.directory.rglob("*")
            if p.is_file() and "cache" not in p.parts and ".partial" not in p.parts
        ]
        return {p: p.read_bytes() for p in files}

    before = content()
    wrong = small_demo()
    wrong["experts"]["domain"] = "cooking"
    with pytest.raises(RecipeError, match=r"no 'cooking'; the domains are"):
        run(wrong, walked.directory, progress=False)
    assert content() == before


def test_the_written_recipe_runs_again_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "r").mkdir()
    (tmp_path / "m").mkdir()
    recipe = {
        "format": 1,
        "name": "x",
        "model": {"path": "../m"},
        "data": {"corpus": "c.txt", "word": "a", "others": ["b"]},
        "edit": {"candidates": [{"method": "project_out", "target": "direction"}]},
    }
    (tmp_path / "r" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    made = recipes.read("r/recipe.yaml")
    (tmp_path / "elsewhere.yaml").write_text(yaml.safe_dump(made))
    assert recipes.read(tmp_path / "elsewhere.yaml") == made
    assert made["data"]["corpus"] == str(tmp_path / "r" / "c.txt")
    assert made["model"]["path"] == str(tmp_path / "m")


@pytest.mark.parametrize("attribute", ["order", "city", None])
def test_locating_selecting_and_scoring_share_no_phrasing(attribute):
    from probe._run._materials import gather

    for split in ({"locate": 0.5, "select": 0.25, "evaluate": 0.25}, {"locate": 0.2, "select": 0.4, "evaluate": 0.4}):
        recipe = small_demo()
        recipe["model"]["attribute"], recipe["splits"], recipe["audit"]["gold"] = attribute, split, 0
        made = gather(recipe, progress=False)
        phrasings = [{row.meta["phrasing"] for row in rows} for rows in made.forget.values()]
        assert not phrasings[0] & phrasings[1]
        assert not phrasings[0] & phrasings[2]
        assert not phrasings[1] & phrasings[2]
        asked = {row.question for part in ("select", "evaluate") for row in (*made.forget[part], *made.retain[part])}
        assert not asked & set(made.labelled.texts)
        assert not asked & {pair.clean for pair in made.pairs}
        assert not [text for text in made.texts if any(text.startswith(question) for question in asked)]


def test_a_name_that_looks_like_markup_is_only_a_name(tmp_path):
    recipe = small_demo() | {"name": "Forget [/Lily] [off]"}
    recipe["experts"]["domain"] = "cooking"  # ends the walk early
    with pytest.raises(RecipeError, match="cooking"):
        run(recipe, tmp_path / "x", progress=False, quiet=False)


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RecipeError, match="no run of probe"):
        run(small_demo(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("name", ["tinystories-656k", "stories260K"])
def test_the_same_walk_on_a_real_checkpoint(name, shared_data, stories, tmp_path):
    made = run(word_recipe(shared_data, name, stories), tmp_path / "out", progress=False)
    table = made.card.to_df().set_index(["set", "metric", "model"])["value"]
    assert table["forget", "probability", "edited"] < table["forget", "probability", "original"]
    exported = AutoModelForCausalLM.from_pretrained(made.model)
    assert exported.config.num_hidden_layers == probe.load(shared_data / name).dims.n_layers
    assert "Not measured" in made.card.sentence  # no gold, no holdout: said, not passed over


def test_a_word_that_the_corpus_lacks(shared_data, stories, tmp_path):
    recipe = word_recipe(shared_data, "stories260K", stories)
    recipe["data"]["word"] = "Zarathustra"
    with pytest.raises(probe.errors.DataError, match="Only 0 contexts"):
        run(recipe, tmp_path / "out", progress=False)


def test_questions_from_files(shared_data, stories, tmp_path):
    from activations_cache import read_documents
    from probe.data import word_data

    model = probe.load(shared_data / "stories260K")
    texts = read_documents(stories).texts
    made = word_data(texts, "Lily", NAMES, max_rows=40, n_tokens=lambda t: len(model.tokenizer(t)["input_ids"]))
    files = {
        key: str(getattr(made, key).save(tmp_path / f"{key}.jsonl"))
        for key in ("forget", "retain", "labelled", "pairs")
    }
    recipe = word_recipe(shared_data, "stories260K", stories, data={**files, "positive": "Lily"}, sae=False)
    result = run(recipe, tmp_path / "out", progress=False)
    assert result.found.latents is None
    assert result.report.is_file()
    labelled = {row.group for row in made.labelled}
    assert labelled  # the file holds every group; those that select or score the edit locate nothing
    n = json.loads((tmp_path / "out" / "cache" / "labelled" / "manifest.json").read_text())["rows"]
    assert 0 < n < len(made.labelled)
    recipe["data"]["positive"] = "nobody"
    with pytest.raises(probe.errors.DataError, match="does not occur"):
        run(recipe, tmp_path / "other", progress=False)
