"""The one call: check what was given, measure every model on every set, put the numbers side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import combinations
from typing import Any

from probe.audit._card import ReportCard
from probe.audit._measure import Measured, Plan, Settings, make_plan, measure
from probe.audit._rows import answer_rows, corpus_rows, distance_rows, to_table
from probe.data import Questions
from probe.errors import AuditError, DataError
from probe.models import Model

_ALWAYS_MISSING = "whether the knowledge can be brought back (relearning, quantisation, prompts)"
_MISSING = {
    "edited": "an edited model",
    "holdout": "people never trained on (holdout)",
    "unseen": "phrasings never trained on",
    "gold": "what a model that never learned the forget set would do (gold)",
    "corpus": "perplexity on ordinary text (corpus)",
}


def audit(
    model: Model,
    edit: Any,
    forget: Questions,
    retain: Questions,
    holdout: Questions | None = None,
    *,
    unseen: Questions | None = None,
    unseen_retain: Questions | None = None,
    gold: Iterable[Model] | None = None,
    corpus: Iterable[str] | None = None,
    people: str = "people",
    bos: bool | None = None,
    chat: bool = False,
    batch_size: int = 64,
    n_boot: int = 1000,
    seed: int = 0,
    kl_bytes: int = 2 * 1024**3,
    progress: bool = True,
) -> ReportCard:
    """Measure what an edit did to a model.

    Each model (original, edited, every gold) makes one forward over each set, from which every number comes:

    - probability: exp(mean log p) of the answer's tokens, the mean over questions (TOFU, arXiv 2401.06121);
    - recall: share of questions of which every answer token is the argmax under teacher forcing;
    - KL at the answers' positions, mean over positions, in nats: KL(original‖model), KL(gold‖model) and KL(model‖gold),
      on forget and retain. Gold against gold is the floor, the original against gold the ceiling;
    - perplexity: exp(mean loss per token in nats) on the corpus, long texts in windows of the context's length. Every
      window after a text's first begins with the text's next token, without BOS; no window's first token is predicted,
      and neither is a special token that the tokenizer appends.

    Intervals are 95 % percentile bootstraps over groups (people; texts for perplexity). Where every group has the same
    recall a bootstrap has no width, and the interval is Clopper and Pearson's with the groups as n, which is
    conservative. Changes are paired: the same resampled groups before and after. A recall that changed by as much in
    every group has no interval of its change (NaN), and neither has anything with one group; the column `interval` says
    which. Gold is shown with the lowest and the highest of its seeds.

    Args:
        model: The original.
        edit: An `Edit` (or anything with `.applied(model)`), another `Model`, or None for the original alone. With an
            edit the model has its original bits again afterwards, also after an exception.
        forget: What was to go.
        retain: What was to stay; its people are others than those of `forget`.
        holdout: People that nothing was ever trained on: what chance looks like.
        unseen: The forget people in phrasings never trained on.
        unseen_retain: The retain people in phrasings never trained on.
        gold: Models trained without the forget set. One after the other is used, so a generator may load them.
        corpus: Texts for perplexity.
        people: What a group is, in the plural, for the sentence.
        bos: Whether questions, and the texts of the corpus, begin with a BOS token; None leaves it to the tokenizer
            (with `chat`, for questions to the template).
        chat: Put questions into the tokenizer's chat template. The corpus is never put into it: it is ordinary text.
        batch_size: Rows per forward.
        n_boot: Bootstrap replicates.
        seed: Of the bootstrap, and of the choice of questions for KL where not all fit.
        kl_bytes: Memory for the log-probabilities that KL needs; where all questions would take more, a seeded subset
            is used, and its size is the row's n.
        progress: Show a bar.

    Raises:
        DataError: A set that is no `Questions`, an empty set, sets that share people, phrasings that are not unseen, a
            corpus without tokens.
        AuditError: A model with another vocabulary, logits that are not finite, no model in `gold`, an unusable edit.
        BaseMismatchError: The edit was made for another model.
    """
    sets = _checked_sets(forget, retain, holdout, unseen, unseen_retain)
    golds = _checked_golds(gold)
    if n_boot < 1 or batch_size < 1:
        raise AuditError(f"n_boot and batch_size must be at least 1; received {n_boot} and {batch_size}")
    plan = make_plan(model, sets, corpus, Settings(batch_size, bos, chat, progress), kl_bytes // (2 + len(golds)), seed)
    measured: dict[str, Measured] = {}
    if edit is not None:  # first, so that an edit of another model is refused before anything is computed
        other, context = _edited(model, edit)
        with context:
            measured["edited"] = measure(other, plan, "edited")
    measured["original"] = measure(model, plan, "original")
    for i, one in enumerate(golds, start=1):
        _same_vocabulary(model, one, f"gold {i}")
        measured[f"gold {i}"] = measure(one, plan, f"gold {i}")
    return _card(model, edit, plan, measured, {"people": people, "n_boot": n_boot, "seed": seed})


def _card(
    model: Model, edit: Any, plan: Plan, measured: Mapping[str, Measured], settings: dict[str, Any]
) -> ReportCard:
    n_boot, seed, people = settings["n_boot"], settings["seed"], settings["people"]
    rows = answer_rows(measured, n_boot, seed, people)
    rows += corpus_rows(measured, n_boot, seed)
    rows += distance_rows(measured, n_boot, seed, people)
    golds = [name for name in measured if name.startswith("gold")]
    given = {*plan.sets, *measured, *(["gold"] if golds else []), *(["corpus"] if plan.windows else [])}
    missing = [text for key, text in _MISSING.items() if key not in given]
    if len(golds) == 1:
        missing.append("gold's spread between seeds (one gold only)")
    facts = {
        "model": model.name,
        "model_hash": model.weights_hash,
        "edit": None if edit is None else _edit_facts(edit),
        "golds": len(golds),
        "sets": {name: {"questions": len(rows), "groups": len(set(rows.groups))} for name, rows in plan.sets.items()},
        "texts": len(plan.windows),
        "batch_size": plan.settings.batch_size,
        "bos": plan.settings.bos,
        "chat": plan.settings.chat,
    }
    return ReportCard(to_table(rows), {**facts, **settings}, (*missing, _ALWAYS_MISSING), plan.answers_table(measured))


def _checked_sets(
    forget: Questions,
    retain: Questions,
    holdout: Questions | None,
    unseen: Questions | None,
    unseen_retain: Questions | None,
) -> dict[str, Questions]:
    """The sets that were given, by name, once none is empty and none shares people with one it must not."""
    given = {"forget": forget, "unseen": unseen, "retain": retain, "unseen_retain": unseen_retain, "holdout": holdout}
    sets = {name: rows for name, rows in given.items() if rows is not None}
    for name in ("forget", "retain"):
        if name not in sets:
            raise DataError(f"an audit needs a {name} set; received None")
    for name, rows in sets.items():
        if not isinstance(rows, Questions):
            raise DataError(
                f"{name} must be probe.data.Questions; received {type(rows).__name__}: "
                "make them with Questions.from_rows (of dictionaries) or Questions.load (of a file)"
            )
        if len(rows) == 0:
            raise DataError(f"the {name} set is empty; give at least one question, or None for a set that there is not")
    for one, other in combinations(sets, 2):
        if {one, other} not in ({"forget", "unseen"}, {"retain", "unseen_retain"}):
            _disjoint(one, sets[one], other, sets[other])
    _same_people(sets, "unseen", "forget")
    _same_people(sets, "unseen_retain", "retain")
    return sets


def _disjoint(one: str, rows: Questions, other: str, others: Questions) -> None:
    shared = sorted(set(rows.groups) & set(others.groups))
    if shared:
        raise DataError(
            f"{one} and {other} must share no group; they share {len(shared)}, such as {shared[0]!r}: "
            "what is to be forgotten would be counted as retained"
        )


def _same_people(sets: Mapping[str, Questions], unseen: str, trained: str) -> None:
    """Unseen phrasings are of the same people and are not among the questions that they are compared with."""
    if unseen not in sets:
        return
    strangers = sorted(set(sets[unseen].groups) - set(sets[trained].groups))
    if strangers:
        raise DataError(f"{unseen} must hold groups of {trained} only; {strangers[0]!r} is not among them")
    repeated = {row.question for row in sets[unseen]} & {row.question for row in sets[trained]}
    if repeated:
        raise DataError(f"{unseen} must hold phrasings that {trained} has not; both ask {min(repeated)!r}")


def _checked_golds(gold: Iterable[Model] | None) -> Sequence[Model]:
    """Gold as a sequence: one that loads its models on demand stays as it is."""
    if gold is None:
        return ()
    golds = gold if isinstance(gold, Sequence) else list(gold)
    if len(golds) == 0:
        raise AuditError("gold holds no model; give at least one retrained without the forget set, or None")
    return golds


def _edited(model: Model, edit: Any) -> tuple[Model, AbstractContextManager[Any]]:
    """The model to measure as `edited`, and what must be open meanwhile."""
    if isinstance(edit, Model):
        _same_vocabulary(model, edit, "the edited model")
        return edit, nullcontext()
    if not hasattr(edit, "applied"):
        raise AuditError(f"edit must be an Edit, a Model or None; received {type(edit).__name__}")
    return model, edit.applied(model)


def _same_vocabulary(model: Model, other: Model, name: str) -> None:
    """Numbers per token compare only where the tokens are the same."""
    if not isinstance(other, Model):
        raise AuditError(f"{name} must be a Model (probe.load, probe.models.wrap); received {type(other).__name__}")
    sizes = [one.hf.get_output_embeddings().weight.shape[0] for one in (model, other)]
    if sizes[0] != sizes[1]:
        raise AuditError(f"{name} must have the original's vocabulary of {sizes[0]} tokens; it has {sizes[1]}")
    if model.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise AuditError(f"{name} must have the original's tokenizer; its tokens have other ids")


def _edit_facts(edit: Any) -> dict[str, Any]:
    """What the card keeps of the edit: the edit's own record is beside it, in edit.json."""
    if isinstance(edit, Model):
        return {"model": edit.name, "model_hash": edit.weights_hash}
    facts = {"method": str(getattr(edit, "method", type(edit).__name__))}
    parameters = getattr(edit, "parameters", None)
    return facts | ({} if parameters is None else {"parameters": len(parameters), "base_hash": edit.base_hash})
