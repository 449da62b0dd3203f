"""Linear readouts by layer: is the answer still written in the model's states where its question ends?

A readout is fitted on questions about retain people, whose answers the model says, and used on forget people, whose
answers it may know without saying them. It is fitted on each model's own states, so a rotation of the residual stream
by an edit changes nothing. What it cannot find is an answer that is written in another code for forget people than for
all others; a probe fitted on forget people could, but with few of them it would find noise too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probe.audit import _states
from probe.audit.part import Measurement, Metric, Number, Part, Subject, by_group, spaced
from probe.data import Questions
from probe.errors import AuditError
from probe.patching import AnswerStates
from probe.probing._readout import ALPHAS, RidgeReadout, control_labels, ridge_readouts

TRAIN, SELECT, TEST = "train", "select", "retain"
_SHARES = (0.6, 0.2)  # of the retain people: training, choosing layer and penalty; the rest is the ceiling


@dataclass(frozen=True)
class Plan:
    """Which rows are for what, and which classes each may be.

    Attributes:
        part: Per row `train`, `select`, `retain` (held out), `forget` or `holdout`.
        y: Per row its class, -1 where no training row has its answer.
        among: Which classes are answers to what the row asks.
        unit: Per row (kind, group): what the question asks for, and about whom.
        usable: Rows whose answer occurs in training and whose kind has several.
        classes: (kind, first token of the answer) of each class.
    """

    part: np.ndarray
    y: Int[np.ndarray, " row"]
    among: Bool[Tensor, "row class"]
    unit: Sequence[tuple[str, str]]
    usable: Bool[np.ndarray, " row"]
    classes: Sequence[tuple[str, int]]

    def rows(self, part: str) -> Int[np.ndarray, " row"]:
        """The usable rows of a part."""
        return np.flatnonzero((self.part == part) & self.usable)


@dataclass(frozen=True)
class LayerReadout:
    """One layer's readout: which rows it reads rightly, and how often its control twins do.

    Attributes:
        right: Per row whether the answer is read.
        control: Per row how often readouts of meaningless answers read theirs.
        majority: Per row whether the commonest training answer of its kind is right.
        select: Accuracy on the people by whom layer and penalty are chosen.
        alpha: The chosen penalty.
    """

    right: Bool[np.ndarray, " row"]
    control: Float[np.ndarray, " row"]
    majority: Bool[np.ndarray, " row"]
    select: float
    alpha: float


def make_plan(sets: Mapping[str, Questions], first_tokens: Sequence[int], seed: int) -> Plan:
    """Divide retain people into training, selection and ceiling, and number the classes.

    A class is the first token of the answer to one kind of question (`meta["attribute"]`, or one kind for all): that
    is what the state at the question's end is used for. On the default organism this reads what the model says; whole
    answers of two tokens, of which a third as many people share each, do not (1.00 against .37 for retain people).

    Args:
        sets: `retain`, `forget` and perhaps `holdout`; rows in this order.
        first_tokens: Per row the answer's first token.
        seed: Of the division.

    Raises:
        AuditError: Fewer than five retain people.
    """
    rows = [row for questions in sets.values() for row in questions]
    part = np.array([name for name, questions in sets.items() for _ in questions], dtype=object)
    sides = _sides(sets["retain"].groups, seed)
    part[: len(sets["retain"])] = [sides[group] for group in sets["retain"].groups]
    train = part == TRAIN
    labels = [(str(row.meta.get("attribute", "")), int(t)) for row, t in zip(rows, first_tokens, strict=True)]
    classes = sorted({label for label, own in zip(labels, train, strict=True) if own})
    number = {label: i for i, label in enumerate(classes)}
    y = np.array([number.get(label, -1) for label in labels])
    kinds = np.array([label[0] for label in labels])
    among = torch.from_numpy(kinds[:, None] == np.array([kind for kind, _ in classes])[None])  # [row, class]
    usable = (y >= 0) & (among.sum(1).numpy() > 1)
    units = [(label[0], row.group) for label, row in zip(labels, rows, strict=True)]
    return Plan(part, y, among, units, usable, classes)


def _sides(groups: Sequence[str], seed: int) -> dict[str, str]:
    people = sorted(set(groups))
    if len(people) < 5:
        raise AuditError(f"a readout needs 5 retain groups or more, to train, choose and test; there are {len(people)}")
    order = np.random.default_rng([seed, 5]).permutation(len(people))
    n_train, n_select = (max(1, round(share * len(people))) for share in _SHARES)
    names = [TRAIN] * n_train + [SELECT] * n_select + [TEST] * (len(people) - n_train - n_select)
    return {people[i]: name for i, name in zip(order, names, strict=True)}


def read_layer(
    x: Float[Tensor, "row d"], plan: Plan, alphas: Sequence[float], n_controls: int, seed: int
) -> LayerReadout:
    """Fit one layer: the penalty by the accuracy on the selection people, control twins with the same penalty."""
    train, select = plan.rows(TRAIN), plan.rows(SELECT)
    fitted = ridge_readouts(x[train], torch.from_numpy(plan.y[train]), len(plan.classes), alphas)
    scores = [float(_right(one, x, plan, plan.y)[select].mean()) for one in fitted]
    best = int(np.argmax(scores))
    control = np.zeros(len(x))
    for draw in range(n_controls):
        drawn = _control(plan, seed + draw)
        twin = ridge_readouts(x[train], torch.from_numpy(drawn[train]), len(plan.classes), [alphas[best]])[0]
        control += _right(twin, x, plan, drawn) / n_controls
    right = _right(fitted[best], x, plan, plan.y)
    return LayerReadout(right, control, _majority(plan), scores[best], alphas[best])


def _right(readout: RidgeReadout, x: Float[Tensor, "row d"], plan: Plan, y: Int[np.ndarray, " row"]) -> np.ndarray:
    right: np.ndarray = readout.predict(x, plan.among).numpy() == y
    return right


def _control(plan: Plan, seed: int) -> Int[np.ndarray, " row"]:
    """Meaningless labels for the usable rows; -1 for the others."""
    rows = np.flatnonzero(plan.usable)
    drawn = np.full(len(plan.y), -1)
    units = [plan.unit[int(i)] for i in rows]
    train = plan.part[rows] == TRAIN
    for attempt in count(seed * 1000):  # few people may all draw the same answer, which is no task
        drawn[rows] = control_labels(plan.y[rows].tolist(), units, train, attempt)
        if len(set(drawn[rows][train])) > 1:
            return drawn
    raise AssertionError("unreachable")


def _majority(plan: Plan) -> Bool[np.ndarray, " row"]:
    """Whether the commonest training answer to what a row asks is its answer."""
    counts = torch.from_numpy(np.bincount(plan.y[plan.rows(TRAIN)], minlength=len(plan.classes)))
    said = counts.masked_fill(~plan.among, -1).argmax(1).numpy()
    majority: np.ndarray = said == plan.y
    return majority


@dataclass(frozen=True)
class Readout(Part):
    """Linear probes of every layer for the first token of the answer, at the last token of the question.

    Attributes:
        train_limit: Retain questions, evenly spaced; 60 % of their people train, 20 % choose layer and penalty, the
            rest is the ceiling.
        limit: Forget questions, and holdout questions.
        alphas: Ridge penalties to choose from, as shares of the states' mean variance.
        n_controls: Control tasks (arXiv 1909.03368): meaningless answers, one a person.
    """

    train_limit: int = 800
    limit: int = 200
    alphas: tuple[float, ...] = ALPHAS
    n_controls: int = 3

    name: ClassVar[str] = "readout"
    title: ClassVar[str] = "Answers read from hidden states by linear probes"
    needs: ClassVar[tuple[str, ...]] = ("forget", "retain")
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("readout_accuracy", "First token read by a linear probe", share=True),
        Metric("readout_selectivity", "First token read by a linear probe, less control task"),
    )
    kind: ClassVar[str] = "inside"
    evidence: ClassVar[tuple[tuple[str, str], ...]] = (("forget", "readout_accuracy"),)

    def measure(self, subject: Subject) -> Measurement:
        """Fit a readout a layer on retain people; report the layer that is best on other retain people.

        Raises:
            AuditError: States that are not finite.
        """
        sets = self._sets(subject)
        states = _states.read(subject, _joined(sets), "readout")
        try:
            plan = make_plan(sets, states.token.tolist(), subject.case.seed)
        except AuditError as error:
            return Measurement(missing=(f"readout: {error}",))
        lacking = [part for part in (TRAIN, SELECT, TEST, "forget") if len(plan.rows(part)) == 0]
        if lacking:
            why = "all answers begin alike, or as none of the training people's"
            return Measurement(missing=(f"readout: no rows to {', '.join(lacking)} ({why})",))
        return self._measurement(self._layers(states, plan, subject.case.seed), plan)

    def _sets(self, subject: Subject) -> dict[str, Questions]:
        sets = subject.case.sets
        names = [name for name in ("retain", "forget", "holdout") if name in sets]
        return {name: spaced(sets[name], self.train_limit if name == "retain" else self.limit) for name in names}

    def _layers(self, states: AnswerStates, plan: Plan, seed: int) -> list[LayerReadout]:
        return [read_layer(x.double(), plan, self.alphas, self.n_controls, seed) for x in states.values.values()]

    def _measurement(self, layers: Sequence[LayerReadout], plan: Plan) -> Measurement:
        best = layers[int(np.argmax([layer.select for layer in layers]))]
        numbers = []
        for name in ("forget", TEST, "holdout"):
            rows = plan.rows(name)
            if len(rows) == 0:
                continue
            people = [plan.unit[int(i)][1] for i in rows]
            right, control = best.right[rows], best.control[rows]
            numbers += [
                Number(name, "readout_accuracy", by_group(right, people, share=True)),
                Number(name, "readout_selectivity", by_group(right - control, people)),
            ]
        dropped = int((~plan.usable & (plan.part == "forget")).sum())
        note = f"readout: {dropped} forget questions whose answers begin as no training person's, or all alike"
        return Measurement(tuple(numbers), {"readout": _table(layers, plan)}, missing=(note,) if dropped else ())


def _joined(sets: Mapping[str, Questions]) -> Questions:
    return Questions((row for questions in sets.values() for row in questions), "readout")


def _table(layers: Sequence[LayerReadout], plan: Plan) -> pd.DataFrame:
    """One row a layer and set: accuracy, control task, selectivity, majority, and which layer was chosen."""
    chosen = int(np.argmax([layer.select for layer in layers]))
    records = []
    for number, layer in enumerate(layers):
        for name in ("forget", TEST, "holdout"):
            rows = plan.rows(name)
            if len(rows) == 0:
                continue
            accuracy, control = float(layer.right[rows].mean()), float(layer.control[rows].mean())
            record = {"layer": number, "set": name, "accuracy": accuracy, "control": control}
            record |= {"selectivity": accuracy - control, "majority": float(layer.majority[rows].mean())}
            records.append(record | {"select": layer.select, "alpha": layer.alpha, "chosen": number == chosen})
            records[-1] |= {"n": len(rows)}
    return pd.DataFrame.from_records(records)
