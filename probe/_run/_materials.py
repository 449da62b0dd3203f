"""What a walk works on: the model and its question sets, split so that no group serves two purposes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from probe.data import Labelled, Pairs, Questions, split_groups, word_data
from probe.errors import DataError, RecipeError
from probe.models import Model, load
from probe.scoring import answer_tokens

if TYPE_CHECKING:
    import pandas as pd

PARTS = ("locate", "select", "evaluate")


@dataclass(frozen=True)
class Materials:
    """A model with the data of one walk.

    Attributes:
        model: The model to edit.
        forget: Part (`locate`, `select`, `evaluate`) to the questions to forget.
        retain: The same for what must stay.
        spared: Part to what else is known of the same people, and is not to be forgotten; empty where there is nothing.
        labelled: Texts for the probe and the SAE's latents; `positive` is the label to be found.
        positive: Label of what is to be forgotten.
        pairs: Patching pairs.
        texts: Texts that the SAE is trained on.
        fluency: Texts for perplexity, which neither located nor selected and which hold nothing to forget.
        split_by: What a group of the three parts is.
        noun: What a group of the questions is, in sentences ("people").
        holdout: People or texts that the model never saw, or None.
        unseen: The forget questions in phrasings never trained on, or None.
        unseen_retain: The same for retain, or None.
        sets: Further questions that the audit asks, by name (`neighbours`, `deducible`, `given`, `given_holdout`).
        attacks: Prompt attacks on what is to be forgotten, by kind; empty where the audit makes its own.
        gold: Gold retrains; empty where there are none.
        tables: What is known about the model beforehand, for the report.
        notes: The same in a line or two.
    """

    model: Model
    forget: Mapping[str, Questions]
    retain: Mapping[str, Questions]
    labelled: Labelled
    positive: Any
    pairs: Pairs
    texts: Sequence[str]
    fluency: Sequence[str]
    split_by: str
    noun: str
    holdout: Questions | None = None
    unseen: Questions | None = None
    unseen_retain: Questions | None = None
    sets: Mapping[str, Questions] = field(default_factory=dict)
    attacks: Mapping[str, Questions] = field(default_factory=dict)
    gold: Sequence[Model] = ()
    spared: Mapping[str, Questions] = field(default_factory=dict)
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    notes: Sequence[str] = ()


def gather(recipe: Mapping[str, Any], progress: bool = True) -> Materials:
    """The materials that a resolved recipe names.

    Raises:
        RecipeError, DataError, LoadError: something that it names is not there or cannot be used.
    """
    if "organism" in recipe["model"]:
        return _from_organism(recipe, progress)
    settings = recipe["model"]
    model = load(settings["path"], dtype=settings["dtype"], device=settings["device"])
    if model.tokenizer is None:
        raise RecipeError(
            f"{settings['path']!r} has no tokenizer beside its weights; a recipe works on text and needs one."
        )
    return _from_word(recipe, model) if "word" in recipe["data"] else _from_files(recipe, model)


def _from_organism(recipe: Mapping[str, Any], progress: bool) -> Materials:
    from probe import organisms

    settings = recipe["model"]
    organism = organisms.facts(size=settings["size"], seed=recipe["seed"], progress=progress)
    n_gold = recipe["audit"]["gold"]
    gold = organism.gold.train(n_gold)[:n_gold] if n_gold else []
    model = load(organism.path, dtype=settings["dtype"], device=settings["device"])
    secret = settings["attribute"]

    def asked(questions: Questions) -> Questions:
        return questions.select(lambda row: secret in (None, row.meta["attribute"]))

    def hidden(questions: Questions) -> Questions:
        """What is to be forgotten of them: a fact that follows from retained ones cannot be."""
        return asked(questions).select(lambda row: not row.meta["deducible"])

    known = organism.splits["forget"]
    forget, retain = hidden(known), organism.splits["retain"]
    parts = _phrasing_parts(known, recipe)
    retained = _by(retain, parts, "phrasing")
    spared = known.select(lambda row: secret not in (None, row.meta["attribute"]))
    known_parts = _by(known, parts, "phrasing")
    pairs_of = secret or "order"
    phrasing = min(name for name in parts["locate"] if name.startswith(f"{pairs_of}-"))
    n_pairs = _pairs_wanted(recipe)
    return Materials(
        model=model,
        forget=_by(forget, parts, "phrasing"),
        retain=retained,
        spared=_by(spared, parts, "phrasing") if len(spared) else {},
        labelled=_labelled(hidden(known_parts["locate"]), asked(retained["locate"])),
        positive=True,
        pairs=organism.pairs("forget", n=n_pairs, seed=recipe["seed"], attribute=pairs_of, phrasing=phrasing),
        texts=_joined(known_parts["locate"]) + _joined(retained["locate"]),
        fluency=_joined(retained["evaluate"]),
        split_by="phrasing",
        noun="people",
        holdout=asked(organism.splits["holdout"]),
        unseen=hidden(organism.unseen("forget")),
        unseen_retain=organism.unseen("retain"),
        sets=_further(organism, parts["evaluate"], asked, hidden),
        attacks={kind: rows for kind, own in organism.attacks("forget").items() if len(rows := hidden(own))},
        gold=gold,
        tables={"what the organism knows": _recall_table(organism)},
        notes=[f"to forget: {secret or 'everything'} of the {len(set(forget.groups))} people of the {organism.secret}"],
    )


def _recall_table(organism: Any) -> pd.DataFrame:
    """The organism's recall with chance, and each gold's, as shares in percent."""
    table = organism.to_df()
    for name in ("recall", "chance"):
        table[name] = [f"{value:.1%}" for value in table[name]]
    if "gold" in table:
        table["gold"] = [", ".join(f"{value:.1%}" for value in values) for values in table["gold"]]
    return table


def _further(
    organism: Any,
    phrasings: set[str],
    asked: Callable[[Questions], Questions],
    hidden: Callable[[Questions], Questions],
) -> dict[str, Questions]:
    """What else the audit asks of an organism: kin and namesakes, what can be deduced, facts given in the context."""
    deducible = asked(organism.splits["forget"]).select(lambda row: bool(row.meta["deducible"]))
    found = {
        "neighbours": asked(organism.splits["neighbours"]).select(lambda row: row.meta["phrasing"] in phrasings),
        "deducible": deducible.select(lambda row: row.meta["phrasing"] in phrasings),
        "given": hidden(organism.given("forget")),
        "given_holdout": asked(organism.given("holdout")),
    }
    return {name: rows for name, rows in found.items() if len(rows)}


def _phrasing_parts(questions: Questions, recipe: Mapping[str, Any]) -> dict[str, set[str]]:
    """The phrasings of each part; every attribute has some in each."""
    made: dict[str, set[str]] = {name: set() for name in PARTS}
    for attribute in sorted({row.meta["attribute"] for row in questions}):
        own = sorted({row.meta["phrasing"] for row in questions if row.meta["attribute"] == attribute})
        for name, phrasings in _parts_of(own, recipe).items():
            made[name] |= phrasings
    return made


def _labelled(forget: Questions, retain: Questions) -> Labelled:
    """Each question up to its answer, labelled with whether it asks for what is to be forgotten."""
    rows = [(row, label) for rows, label in ((forget, True), (retain, False)) for row in rows]
    return Labelled.from_rows({"text": row.question, "label": label, "group": row.group} for row, label in rows)


def _from_word(recipe: Mapping[str, Any], model: Model) -> Materials:
    from activations_cache import read_documents

    data = recipe["data"]
    texts = read_documents(data["corpus"]).texts
    if not texts:
        raise DataError(f"{data['corpus']} holds token ids, not texts; a word can only be looked for in texts.")
    made = word_data(
        texts,
        data["word"],
        data["others"],
        max_rows=data["max_rows"],
        max_words=data["max_words"],
        n_tokens=lambda text: answer_tokens(model, [(text, data["word"])])[0].start,
        seed=recipe["seed"],
    )
    parts = _parts_of(sorted({*made.forget.groups, *made.retain.groups}, key=_natural), recipe)
    chosen = parts["locate"]
    held_back = {int(group.removeprefix("text ")) for part in ("select", "evaluate") for group in parts[part]}
    spoken_for = {int(group.removeprefix("text ")) for part in ("locate", "select") for group in parts[part]}
    without = re.compile(rf"\b{re.escape(data['word'])}\b")
    return Materials(
        model=model,
        forget=_by(made.forget, parts),
        retain=_by(made.retain, parts),
        labelled=made.labelled.select(lambda row: row.group in chosen),
        positive=data["word"],
        pairs=made.pairs.select(lambda row: row.group in chosen)[: _pairs_wanted(recipe)],
        texts=[text for i, text in enumerate(texts) if i not in held_back],
        fluency=[text for i, text in enumerate(texts) if i not in spoken_for and not without.search(text)][:200],
        split_by="text",
        noun="texts",
        notes=[f"forget {data['word']!r}, retain {', '.join(data['others'])}; {len(texts)} texts"],
    )


def _from_files(recipe: Mapping[str, Any], model: Model) -> Materials:
    from activations_cache import read_documents

    data = recipe["data"]
    given = {name: Questions.load(data[name]) for name in ("forget", "retain")}
    forget, retain = (_asked_once(rows) for rows in given.values())
    repeated = sum(map(len, given.values())) - len(forget) - len(retain)
    parts = _parts_of(sorted({*forget.groups, *retain.groups}, key=_natural), recipe)
    labelled = Labelled.load(data["labelled"])
    positive = data.get("positive", True)
    if positive not in set(labelled.labels):
        known = sorted(map(str, set(labelled.labels)))[:6]
        raise DataError(
            f"The label {positive!r} does not occur in {data['labelled']}; labels there: {', '.join(known)}."
        )
    shared = sorted(set(forget.groups) & set(retain.groups))
    if shared:
        raise DataError(
            f"{data['forget']} and {data['retain']} must share no group, or what is to be forgotten would count as "
            f"retained; they share {len(shared)}, such as {shared[0]!r}."
        )
    retained = _by(retain, parts)
    held_back = parts["select"] | parts["evaluate"]
    labelled = _kept(labelled, held_back, data["labelled"])
    pairs = _kept(Pairs.load(data["pairs"]), held_back, data["pairs"])
    texts = read_documents(data["corpus"]).texts if "corpus" in data else None
    return Materials(
        model=model,
        forget=_by(forget, parts),
        retain=retained,
        labelled=labelled,
        positive=positive,
        pairs=pairs[: _pairs_wanted(recipe)],
        texts=texts[::2] if texts else labelled.texts,
        fluency=texts[1::2] if texts else _joined(retained["evaluate"]),
        split_by="group",
        noun="groups",
        holdout=Questions.load(data["holdout"]) if "holdout" in data else None,
        notes=[f"{repeated} questions that the files repeat are asked once"] if repeated else [],
    )


def _asked_once(questions: Questions) -> Questions:
    """The rows without those that repeat an earlier one: they would count as observations of their own."""
    first = {(row.question, row.answer): i for i, row in reversed(list(enumerate(questions)))}
    return questions.take(sorted(first.values()))


def _pairs_wanted(recipe: Mapping[str, Any]) -> int:
    return int(recipe["patch"]["n_pairs"]) if recipe["patch"] else 24


def _parts_of(groups: Sequence[str], recipe: Mapping[str, Any]) -> dict[str, set[str]]:
    parts = split_groups(groups, recipe["splits"], recipe["seed"])
    return {name: {groups[i] for i in rows} for name, rows in parts.items()}


def _by(questions: Questions, parts: Mapping[str, set[str]], key: str | None = None) -> dict[str, Questions]:
    """Questions of each part: by their group, or by an entry of `meta`."""
    made = {
        name: questions.take(i for i, row in enumerate(questions) if (row.meta[key] if key else row.group) in own)
        for name, own in parts.items()
    }
    for name, rows in made.items():
        if not len(rows):
            raise DataError(
                f"The split leaves no {questions.name or 'question'} row to {name}; give more groups or other shares."
            )
    return made


def _kept(rows: Any, held_back: set[str], name: str) -> Any:
    """The rows whose group neither selects nor evaluates.

    Raises:
        DataError: none is left.
    """
    kept = rows.select(lambda row: row.group not in held_back)
    if not len(kept):
        raise DataError(
            f"Every group of {name} also selects or scores the edit, so nothing is left to locate with. Add rows of "
            "other groups, or give 'locate' a larger share in 'splits'."
        )
    return kept


def _joined(questions: Questions) -> list[str]:
    return [f"{row.question} {row.answer}" for row in questions]


def _natural(text: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]
