"""The bench: every model of a case under every part; the original and the golds once, however many edits follow."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from probe.audit._card import ReportCard
from probe.audit._case import Case
from probe.audit._measure import Measured, Plan, Settings, make_plan, measure
from probe.audit._registry import chosen
from probe.audit._rows import answer_rows, corpus_rows, distance_rows, group_table, part_rows, to_table
from probe.audit.part import Measurement, Part, Subject
from probe.audit.verdict import Thresholds, judge, thresholds
from probe.data import Questions
from probe.errors import AuditError, DataError
from probe.models import Model

_LONGEST = 240  # characters of a sentence on what is missing: it may quote a prompt
_MISSING = {
    "edited": "an edited model",
    "holdout": "people never trained on (holdout)",
    "unseen": "phrasings never trained on",
    "gold": "what a model that never learned the forget set would do (gold)",
    "corpus": "perplexity on ordinary text (corpus)",
}
_MAY_SHARE = (  # pairs of sets that are of the same people
    {"forget", "unseen"}, {"forget", "deducible"}, {"forget", "given"}, {"unseen", "deducible"}, {"unseen", "given"},
    {"deducible", "given"}, {"retain", "unseen_retain"}, {"retain", "neighbours"}, {"unseen_retain", "neighbours"},
    {"holdout", "given_holdout"},
)  # fmt: skip


@dataclass(frozen=True)
class Tested:
    """Everything that was measured on one model."""

    base: Measured
    parts: Mapping[str, Measurement]
    seconds: Mapping[str, float] = field(default_factory=dict)


class Bench:
    """Audits many edits of one model: what the original and the golds do is measured once.

    bench = probe.audit.Bench(probe.audit.Case.of(organism))
    cards = [bench.card(edit) for edit in edits]

    Args:
        case: What all models are measured on.
        parts: Names of parts, or parts with settings of their own; None for the default ones. `()` measures recall,
            probability, KL and perplexity alone.
        thresholds: Of the verdict; None for the ones that the package was calibrated with.
        kl_bytes: Memory for the log-probabilities that KL needs; where all questions would take more, a seeded subset
            is used, and its size is the row's n.

    Raises:
        DataError: A set that is no `Questions`, an empty set, sets that share people, phrasings that are not unseen, a
            corpus without tokens.
        AuditError: A gold of another architecture or tokenizer, an unknown part.
    """

    def __init__(
        self,
        case: Case,
        parts: Iterable[str | Part] | str | None = None,
        thresholds: Thresholds | None = None,
        kl_bytes: int = 2 * 1024**3,
    ) -> None:
        if case.n_boot < 1 or case.batch_size < 1:
            raise AuditError(f"n_boot and batch_size must be at least 1; received {case.n_boot} and {case.batch_size}")
        self.case = replace(case, sets=check_sets(case.sets))
        asked = chosen(parts)
        why_not = {part.name: part.why_not(self.case) for part in asked}
        self.parts = tuple(part for part in asked if why_not[part.name] is None)
        self.skipped = tuple(reason for reason in why_not.values() if reason)
        self.thresholds = thresholds
        how = Settings(case.batch_size, case.bos, case.chat, case.progress)
        budget = kl_bytes // (2 + len(case.golds))
        self.plan: Plan = make_plan(case.original, self.case.sets, case.corpus or None, how, budget, case.seed)
        self._known: dict[str, Tested] = {}
        self._hashes: dict[str, str] = {}  # weights of what is known

    @property
    def golds(self) -> list[str]:
        """The golds' roles."""
        return [f"gold {i + 1}" for i in range(len(self.case.golds))]

    def card(self, edit: Any = None, *, name: str | None = None) -> ReportCard:
        """Measure what an edit did.

        Args:
            edit: An `Edit`, a `Filter` (anything with `.applied(model)`), another `Model`, or None for the original
                alone. With an edit the model has its original bits again afterwards, also after an exception.
            name: What to call it in the card.

        Raises:
            AuditError: A model with another vocabulary, logits that are not finite, an unusable edit.
            BaseMismatchError: The edit was made for another model.
        """
        if edit is None:
            return self._card(self._references(), self.case, None)
        base = self.case.original.weights_hash
        other, context = _edited(self.case.original, edit)
        with context:  # first, so that an edit of another model is refused before anything is computed
            weights = other.weights_hash
            tested = {"edited": self._test("edited", other)}
        tested |= self._references()
        facts = {**_edit_facts(edit), "weights_changed": weights != base}
        facts |= {} if name is None else {"name": name}
        twin = next((i for i, role in enumerate(self.golds) if self._hashes[role] == weights), None)
        if twin is not None:  # an edit that ends in a gold is judged without that gold
            return self._left_out(twin, tested["edited"], facts)
        return self._card(tested, self.case, facts)

    def gold_card(self, i: int) -> ReportCard:
        """Audit gold number `i` (from 0) as if it were an edit, against the other golds: itself is left out.

        Raises:
            AuditError: There is no such gold, or no other one.
        """
        if not 0 <= i < len(self.golds) or len(self.golds) < 2:
            raise AuditError(f"gold {i} cannot be audited against others: the case has {len(self.golds)}")
        known = self._references()[self.golds[i]]
        return self._left_out(i, known, {"method": "gold retrain", "name": self.golds[i], "weights_changed": True})

    def _left_out(self, i: int, edited: Tested, facts: dict[str, Any]) -> ReportCard:
        """The card of a model that is gold number `i`, beside the other golds."""
        known = self._references()
        others = [j for j in range(len(self.golds)) if j != i]
        tested = {"edited": edited, "original": known["original"]}
        tested |= {f"gold {n + 1}": known[self.golds[j]] for n, j in enumerate(others)}
        names = tuple(self.case.gold_names[j] for j in others)
        case = replace(self.case, golds=[self.case.golds[j] for j in others], gold_names=names)
        return self._card(tested, case, facts)

    def _references(self) -> dict[str, Tested]:
        """The original and every gold, measured on first use.

        Raises:
            AuditError: The original's weights are no longer those that were measured; a gold that is no gold.
        """
        original = self.case.original
        weights = original.weights_hash
        if self._hashes.setdefault("original", weights) != weights:
            raise AuditError("the original's weights have changed since the bench measured it; make a bench anew")
        if "original" not in self._known:
            self._known["original"] = self._test("original", original)
        for i, role in enumerate(self.golds):
            if role not in self._known:
                gold = self.case.golds[i]
                same_vocabulary(original, gold, role)
                same_architecture(original, gold, role)
                self._hashes[role] = self._of_its_own(gold.weights_hash, role)
                self._known[role] = self._test(role, gold)
        return {role: self._known[role] for role in ("original", *self.golds)}

    def _of_its_own(self, weights: str, role: str) -> str:
        """A gold's weights, if no other model of the case has them."""
        twin = next((name for name, own in self._hashes.items() if own == weights and name != role), None)
        if twin is not None:
            raise AuditError(f"{role} has the very weights of {twin}; each gold must be a training of its own")
        return weights

    def _test(self, role: str, model: Model) -> Tested:
        """Measure one model under every part."""
        began = time.perf_counter()
        base = measure(model, self.plan, role)
        seconds = {"answers": time.perf_counter() - began}
        subject = Subject(role, model, self.case, base.answers)
        found = {}
        for part in tqdm(self.parts, desc=f"audit: {role}", unit="part", disable=not self.case.progress, leave=False):
            with _named(role, part):
                began = time.perf_counter()
                found[part.name] = part.measure(subject)
                seconds[part.name] = time.perf_counter() - began
        return Tested(base, found, seconds)

    def _card(self, tested: Mapping[str, Tested], case: Case, edit: dict[str, Any] | None) -> ReportCard:
        measured = {role: one.base for role, one in tested.items()}
        rows = answer_rows(measured, case.n_boot, case.seed, case.people)
        rows += corpus_rows(measured, case.n_boot, case.seed)
        rows += distance_rows(measured, case.n_boot, case.seed, case.people)
        numbers, tables, missing, compared = self._parts_of(tested, case)
        rows += part_rows(numbers, self._metrics(), case.n_boot, case.seed, case.people)
        table = to_table(rows)
        ruling = judge(table, self.evidence(), edit, self.thresholds or thresholds())
        settings = {**self._facts(case, edit), "seconds": _seconds(tested, compared)}
        not_measured = (*self._missing(measured, case), *self.skipped, *missing)
        answers = self.plan.answers_table(measured)
        groups = group_table(measured, numbers)
        return ReportCard(table, settings, not_measured, answers, tables, ruling, groups)

    def _parts_of(
        self, tested: Mapping[str, Tested], case: Case
    ) -> tuple[dict[str, list[Any]], dict[str, pd.DataFrame], list[str], dict[str, float]]:
        """Numbers by role, tables by name, what could not be measured, and what comparing cost."""
        numbers: dict[str, list[Any]] = {role: [] for role in tested}
        frames: dict[str, list[pd.DataFrame]] = {}
        missing: dict[str, list[str]] = {}
        seconds = {}
        for part in self.parts:
            own = {role: one.parts[part.name] for role, one in tested.items()}
            began = time.perf_counter()
            with _named("models side by side", part):
                further = part.compare(own, case)
            seconds[part.name] = time.perf_counter() - began
            for role, found in [*own.items(), *further.items()]:
                numbers[role] += found.numbers
                for name, frame in found.tables.items():
                    frames.setdefault(name, []).append(frame.assign(model=role))
                for sentence in found.missing:
                    missing.setdefault(sentence, []).append(role)
        tables = {name: pd.concat(parts, ignore_index=True) for name, parts in frames.items()}
        return numbers, tables, _said(missing, len(tested)), seconds

    def _metrics(self) -> dict[str, Any]:
        return {metric.name: metric for part in self.parts for metric in part.metrics}

    def evidence(self) -> list[tuple[str, str, str]]:
        """(part, set, metric) of all that grows with what a model knows of the forget set."""
        return [one[:3] for one in self.kinds()]

    def kinds(self) -> list[tuple[str, str, str, str]]:
        """(part, set, metric, kind) of the same."""
        base = [("answers", "forget", "recall", "plain"), ("answers", "unseen", "recall", "plain")]
        return base + [(part.name, *one, part.kind) for part in self.parts for one in part.evidence]

    def adopt(self, other: Bench) -> None:
        """Take over what another bench measured on the same models.

        Raises:
            AuditError: Benches of other originals, sets, settings or parts.
        """
        same = self.parts == other.parts and self.plan.sets == other.plan.sets
        if not same or self.case.original is not other.case.original or self.case.seed != other.case.seed:
            raise AuditError("a bench can take over from one with the same original, sets, seed and parts only")
        known = {id(model): role for role, model in zip(other.golds, other.case.golds, strict=True)}
        names = dict(zip(other.golds, other.case.gold_names, strict=True))
        own = [
            names.get(known.get(id(gold), ""), name)
            for gold, name in zip(self.case.golds, self.case.gold_names, strict=True)
        ]
        self.case = replace(self.case, gold_names=tuple(own))
        for role, gold in zip(self.golds, self.case.golds, strict=True):
            if id(gold) in known and known[id(gold)] in other._known:
                self._known[role] = other._known[known[id(gold)]]
                self._hashes[role] = other._hashes[known[id(gold)]]
        if "original" in other._known:
            self._known["original"] = other._known["original"]
            self._hashes["original"] = other._hashes["original"]

    def _missing(self, measured: Mapping[str, Measured], case: Case) -> list[str]:
        golds = [role for role in measured if role.startswith("gold")]
        given = {*case.sets, *measured, *(["gold"] if golds else []), *(["corpus"] if self.plan.windows else [])}
        missing = [text for key, text in _MISSING.items() if key not in given]
        if len(golds) == 1:
            missing.append("gold's spread between seeds (one gold only)")
        return missing

    def _facts(self, case: Case, edit: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "model": case.original.name,
            "model_hash": case.original.weights_hash,
            "edit": edit,
            "golds": len(case.golds),
            "sets": {
                name: {"questions": len(rows), "groups": len(set(rows.groups))} for name, rows in case.sets.items()
            },
            "texts": len(self.plan.windows),
            "parts": {part.name: _fields(part) for part in self.parts},
            "batch_size": case.batch_size,
            "bos": case.bos,
            "chat": case.chat,
            "people": case.people,
            "n_boot": case.n_boot,
            "seed": case.seed,
        }


def _said(missing: Mapping[str, Sequence[str]], n_models: int) -> list[str]:
    """What could not be measured, and of which models unless of all; sentences that differ in a number are one."""
    together: dict[str, tuple[str, list[str]]] = {}
    for sentence, roles in missing.items():
        sentence = sentence if len(sentence) <= _LONGEST else f"{sentence[: _LONGEST - 1]}…"
        together.setdefault(re.sub(r"\d+(\.\d+)?", "#", sentence), (sentence, []))[1].extend(roles)
    return [s if len(set(r)) == n_models else f"{s} ({', '.join(dict.fromkeys(r))})" for s, r in together.values()]


def _seconds(tested: Mapping[str, Tested], compared: Mapping[str, float]) -> dict[str, float]:
    """Seconds by part, over all models; the original's and the golds' count once a bench."""
    total: dict[str, float] = {}
    for seconds in [*(one.seconds for one in tested.values()), compared]:
        for name, own in seconds.items():
            total[name] = round(total.get(name, 0.0) + own, 3)
    return total


def _fields(part: Part) -> dict[str, Any]:
    """A part's settings as JSON can hold them."""
    return {name: value if _plain(value) else repr(value) for name, value in vars(part).items()}


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_plain(one) for one in value)
    return value is None or isinstance(value, (bool, int, float, str))


@contextmanager
def _named(role: str, part: Part) -> Iterator[None]:
    """Say in an error of a part whom it was measuring."""
    try:
        yield
    except AuditError as error:
        raise AuditError(f"{role}, {part.name}: {error}") from error


def check_sets(sets: Mapping[str, Questions]) -> dict[str, Questions]:
    """Return the sets that were given, by name, once none is empty and none shares people with one that it must not.

    Raises:
        DataError: No forget or retain set, a set that is no `Questions` or is empty, sets that share people, unseen
            phrasings of other people or that are not unseen.
    """
    sets = {name: rows for name, rows in sets.items() if rows is not None}
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
        if {one, other} not in _MAY_SHARE:
            _disjoint(one, sets[one], other, sets[other])
    for part, whole in (("unseen", "forget"), ("unseen_retain", "retain"), ("neighbours", "retain")):
        _same_people(sets, part, whole)
    for unseen, trained in (("unseen", "forget"), ("unseen_retain", "retain")):
        _unseen(sets, unseen, trained)
    for name, rows in sets.items():
        _once(name, rows)
        if name in ("retain", "holdout", "neighbours"):
            _not_asked_twice(name, rows, sets["forget"])
    return sets


def _once(name: str, rows: Questions) -> None:
    """A question given twice would count as two observations."""
    asked = [(row.question, row.answer) for row in rows]
    if len(set(asked)) < len(asked):
        twice = next(one for one in asked if asked.count(one) > 1)
        raise DataError(f"the {name} set must ask each question once; it asks {twice[0]!r} more than once")


def _not_asked_twice(name: str, rows: Questions, forget: Questions) -> None:
    shared = {(row.question, row.answer) for row in rows} & {(row.question, row.answer) for row in forget}
    if shared:
        raise DataError(f"{name} and forget must share no question; both ask {min(shared)[0]!r}")


def _disjoint(one: str, rows: Questions, other: str, others: Questions) -> None:
    shared = sorted(set(rows.groups) & set(others.groups))
    if shared:
        raise DataError(
            f"{one} and {other} must share no group; they share {len(shared)}, such as {shared[0]!r}: "
            "what is to be forgotten would be counted as retained"
        )


def _same_people(sets: Mapping[str, Questions], part: str, whole: str) -> None:
    """What is a part of a set, or asks of it in other words, is of the same people."""
    if part in sets:
        strangers = sorted(set(sets[part].groups) - set(sets[whole].groups))
        if strangers:
            raise DataError(f"{part} must hold groups of {whole} only; {strangers[0]!r} is not among them")


def _unseen(sets: Mapping[str, Questions], unseen: str, trained: str) -> None:
    """Unseen phrasings are not among the questions that they are compared with."""
    if unseen in sets:
        repeated = {row.question for row in sets[unseen]} & {row.question for row in sets[trained]}
        if repeated:
            raise DataError(f"{unseen} must hold phrasings that {trained} has not; both ask {min(repeated)!r}")


def check_golds(gold: Iterable[Model] | None) -> Sequence[Model]:
    """Return gold as a sequence: one that loads its models on demand stays as it is.

    Raises:
        AuditError: There is no model in it.
    """
    if gold is None:
        return ()
    golds = gold if isinstance(gold, Sequence) else list(gold)
    if len(golds) == 0:
        raise AuditError("gold holds no model; give at least one retrained without the forget set, or None")
    return golds


def _edited(model: Model, edit: Any) -> tuple[Model, AbstractContextManager[Any]]:
    """The model to measure as `edited`, and what must be open meanwhile."""
    if isinstance(edit, Model):
        same_vocabulary(model, edit, "the edited model")
        return edit, nullcontext()
    if not hasattr(edit, "applied"):
        raise AuditError(f"edit must be an Edit, a Filter, a Model or None; received {type(edit).__name__}")
    return model, edit.applied(model)


def same_vocabulary(model: Model, other: Model, name: str) -> None:
    """Refuse a model whose tokens are others: numbers per token compare only where the tokens are the same.

    Raises:
        AuditError: No `Model`, another vocabulary, another tokenizer.
    """
    if not isinstance(other, Model):
        raise AuditError(f"{name} must be a Model (probe.load, probe.models.wrap); received {type(other).__name__}")
    if other.tokenizer is None:
        raise AuditError(f"{name} must have a tokenizer; give it to probe.models.wrap(hf, tokenizer)")
    sizes = [one.hf.get_output_embeddings().weight.shape[0] for one in (model, other)]
    if sizes[0] != sizes[1]:
        raise AuditError(f"{name} must have the original's vocabulary of {sizes[0]} tokens; it has {sizes[1]}")
    if model.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise AuditError(f"{name} must have the original's tokenizer; its tokens have other ids")


def same_architecture(model: Model, other: Model, name: str) -> None:
    """Refuse a gold that is not the original trained on other data.

    Raises:
        AuditError: Another class, or parameters of other names or shapes.
    """
    classes = [type(one.hf).__name__ for one in (model, other)]
    if classes[0] != classes[1]:
        raise AuditError(f"{name} must be of the original's class {classes[0]}; it is a {classes[1]}")
    shapes = [{n: tuple(p.shape) for n, p in one.hf.named_parameters()} for one in (model, other)]
    if shapes[0] != shapes[1]:
        odd = min(n for n in {*shapes[0], *shapes[1]} if shapes[0].get(n) != shapes[1].get(n))
        raise AuditError(
            f"{name} must have the original's sizes; {odd} is {shapes[0].get(odd)} there and {shapes[1].get(odd)} here"
        )


def _edit_facts(edit: Any) -> dict[str, Any]:
    """What the card keeps of the edit: the edit's own record is beside it, in edit.json."""
    if isinstance(edit, Model):
        return {"model": edit.name, "model_hash": edit.weights_hash}
    facts = {"method": str(getattr(edit, "method", type(edit).__name__))}
    parameters = getattr(edit, "parameters", None)
    return facts | ({} if parameters is None else {"parameters": len(parameters), "base_hash": edit.base_hash})
