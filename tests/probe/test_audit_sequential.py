"""Sequential, growing and worst-case requests: edits whose effect is known, and enumeration."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import combinations

import numpy as np
import pytest
import torch

from probe.audit.part import spaced
from probe.audit.sequential import growing, sequential
from probe.audit.worst_case import difficulty, hardness_of, worst_case
from probe.data import Questions
from probe.errors import AuditError, DataError
from probe.scoring import score_answers
from tests.probe.cases import small_case


class Muzzle:
    """Turns the logits round wherever a text begins as one of the questions does: they are answered wrong, no other is.

    `forgets` names what a later muzzle takes off again.
    """

    def __init__(self, model, questions, off=None):
        self.model, self.off = model, off
        self.starts = [tuple(model.tokenizer(row.question)["input_ids"]) for row in questions]
        self.on = True

    def _turn(self, _, args, kwargs, out):
        for i, row in enumerate(kwargs["input_ids"].tolist()):
            if self.on and any(tuple(row[: len(start)]) == start for start in self.starts):
                out.logits[i] = -out.logits[i]
        return out

    @contextmanager
    def applied(self, model):
        if self.off:
            self.off.on = False
        handle = model.hf.register_forward_hook(self._turn, with_kwargs=True)
        try:
            yield model
        finally:
            handle.remove()
            if self.off:
                self.off.on = True


@pytest.fixture(scope="module")
def case():
    return small_case(1)


@pytest.fixture(scope="module")
def requests(case):
    forget = case.sets["forget"]
    names = sorted(set(forget.groups))[:3]
    return [spaced(forget.select(lambda row, name=name: row.group == name), 6) for name in names]


@pytest.fixture(scope="module")
def retain(case):
    return spaced(case.sets["retain"], 10)


def recalls(curves, step):
    rows = curves.table[(curves.table["step"] == step) & (curves.table["metric"] == "recall")]
    return {row.set: (row.relation, row.value) for row in rows.itertuples() if row.set != "all"}


def test_requests_one_after_another_stay_forgotten(case, requests, retain):
    seen = []

    def make_edit(model, forget, kept):
        seen.append((len(forget), float(score_answers(model, requests[0]).exact.mean())))
        assert kept is retain
        return Muzzle(model, forget)

    curves = sequential(case.original, requests, retain, make_edit, progress=False)
    assert recalls(curves, 0)["request 1"] == ("later", 1) and recalls(curves, 0)["retain"] == ("retain", 1)
    assert recalls(curves, 2) == {
        "request 1": ("earlier", 0), "request 2": ("now", 0), "request 3": ("later", 1), "retain": ("retain", 1),
    }  # fmt: skip
    assert seen == [(6, 1.0), (6, 0.0), (6, 0.0)]  # the second edit was made for the model as the first left it
    pooled = curves.table[(curves.table["set"] == "all") & (curves.table["metric"] == "recall")]
    assert list(pooled.query("step == 3 and relation == 'earlier'")["value"]) == [0]
    assert list(pooled.query("step == 3 and relation == 'earlier'")["n"]) == [12]
    assert score_answers(case.original, requests[0]).exact.all()  # nothing is left of the edits


def test_a_request_that_brings_the_first_one_back_shows(case, requests, retain):
    first = []

    def make_edit(model, forget, kept):
        first.append(Muzzle(model, forget, off=first[0] if first else None))
        return first[-1]

    curves = sequential(case.original, requests[:2], retain, make_edit, progress=False)
    assert recalls(curves, 1)["request 1"] == ("now", 0)
    assert recalls(curves, 2)["request 1"] == ("earlier", 1)


def test_growing_requests_start_from_the_original(case, requests, retain):
    sizes = []

    def make_edit(model, forget, kept):
        sizes.append(len(forget))
        assert score_answers(model, requests[0]).exact.all()
        return Muzzle(model, forget)

    curves = growing(case.original, {"a": requests[0], "b": requests[1]}, retain, make_edit, progress=False)
    assert sizes == [6, 12]
    assert recalls(curves, 1) == {"a": ("now", 0), "b": ("later", 1), "retain": ("retain", 1)}
    assert recalls(curves, 2) == {"a": ("now", 0), "b": ("now", 0), "retain": ("retain", 1)}
    figure = curves.plot()
    assert {trace.name for trace in figure.data} == {"asked for now", "not asked for yet", "never to be forgotten"}
    with pytest.raises(DataError, match="no 'bleu'"):
        curves.plot("bleu")


def test_an_edit_may_be_a_model_and_a_real_edit_is_taken_back(case, requests, retain):
    before = case.original.weights_hash
    curves = sequential(case.original, requests[:2], retain, lambda *_: case.golds[0], progress=False)
    assert recalls(curves, 2)["request 1"][1] < 0.5 and recalls(curves, 2)["retain"][1] > 0.9

    class Broken:
        @contextmanager
        def applied(self, model):
            weight = model.hf.get_output_embeddings().weight
            old = weight.detach().clone()
            with torch.no_grad():
                weight.mul_(-1)
            try:
                yield model
            finally:
                with torch.no_grad():
                    weight.copy_(old)

    def second_fails(model, forget, kept):
        if forget is requests[1]:
            raise ValueError("no second edit")
        return Broken()

    with pytest.raises(ValueError, match="no second edit"):
        sequential(case.original, requests[:2], retain, second_fails, progress=False)
    assert case.original.weights_hash == before


def test_bad_requests_are_refused(case, requests, retain):
    def run(given, edit=lambda *_: None):
        return sequential(case.original, given, retain, edit, progress=False)

    with pytest.raises(DataError, match="at least two"):
        run(requests[:1])
    with pytest.raises(DataError, match="list or mapping"):
        run(requests[0])
    with pytest.raises(DataError, match="share a group"):
        run([requests[0], requests[0]])
    with pytest.raises(DataError, match="request 2 and retain share"):
        run([requests[0], retain])
    with pytest.raises(DataError, match="at least one row"):
        run([requests[0], Questions([])])
    with pytest.raises(DataError, match="may be called"):
        run({"retain": requests[0], "b": requests[1]})
    with pytest.raises(AuditError, match="returned NoneType"):
        run(requests)


NAMES = list("abcdefg")
WEIGHTS = dict(zip(NAMES, [0.3, 0.9, 0.1, 0.8, 0.2, 0.7, 0.4], strict=True))


def test_where_hardness_adds_up_greedy_score_and_enumeration_agree():
    found = worst_case(NAMES, lambda s: sum(WEIGHTS[n] for n in s), 3, scores=WEIGHTS, progress=False)
    chosen = found.table.set_index("how")["groups"]
    assert chosen["exact"] == chosen["greedy"] == chosen["score"] == found.worst == ("b", "d", "f")
    assert found.percentile("greedy") >= 0.97 and (found.table["how"] == "random").sum() == 20
    assert {trace.name for trace in found.plot().data} == {"random", "exact", "greedy", "score"}


def test_enumeration_finds_what_greedy_misses():
    def hardness(subset):  # d and e are hard together alone
        return (
            9.0
            if {"d", "e"} <= set(subset)
            else max(WEIGHTS[n] for n in subset if n not in "de")
            if set(subset) - set("de")
            else 0.0
        )

    found = worst_case(NAMES, hardness, 2, progress=False)
    brute = max(combinations(NAMES, 2), key=hardness)
    values = found.table.groupby("how")["hardness"].max()
    assert found.table.set_index("how").loc["exact", "groups"] == brute == ("d", "e")
    assert values["exact"] == 9 > values["greedy"]


def test_each_subset_is_tried_once_and_random_ones_differ():
    tried = []
    found = worst_case(NAMES, lambda s: tried.append(s) or float(len(tried)), 2, n_random=500, progress=False)
    assert len(tried) == len(set(tried)) == 21 + 7  # all pairs, and greedy's single groups
    random = found.table[found.table["how"] == "random"]["groups"]
    assert len(set(random)) == len(random) == 21
    few = worst_case(NAMES, lambda s: 0.0, 3, max_exact=5, greedy=False, n_random=4, seed=1, progress=False)
    assert list(few.table["how"]) == ["random"] * 4 and few.percentile("random") == 0.5


def test_bad_subsets_are_refused():
    for size in (0, 7):
        with pytest.raises(DataError, match="size from 1 to 6"):
            worst_case(NAMES, lambda s: 0.0, size, progress=False)
    with pytest.raises(DataError, match="different groups"):
        worst_case(["a", "a", "b"], lambda s: 0.0, 1, progress=False)
    with pytest.raises(DataError, match="finite number for each"):
        worst_case(NAMES, lambda s: 0.0, 1, scores={"a": 1}, progress=False)
    with pytest.raises(AuditError, match="must be finite"):
        worst_case(NAMES, lambda s: np.nan, 1, progress=False)
    with pytest.raises(DataError, match="nothing to try"):
        worst_case(NAMES, lambda s: 0.0, 3, n_random=0, max_exact=0, greedy=False, progress=False)
    with pytest.raises(DataError, match="none by 'score'"):
        worst_case(NAMES, lambda s: 0.0, 1, progress=False).percentile("score")


def test_the_people_whom_the_edit_leaves_out_are_the_hardest(case, requests, retain):
    forget = Questions(row for request in requests for row in request)
    immune = requests[1].groups[0]

    def make_edit(model, asked, kept):
        assert not set(asked.groups) & set(kept.groups) and len(kept) + len(asked) == len(retain) + len(forget)
        return Muzzle(model, asked.select(lambda row: row.group != immune))

    hardness = hardness_of(case.original, forget, retain, make_edit)
    found = worst_case(sorted(set(forget.groups)), hardness, 1, n_random=3, progress=False)
    assert found.worst == (immune,)
    assert found.table["hardness"].max() > 0.9 and found.table["hardness"].min() < 0.1
    scores = difficulty(case.original, forget)
    own = score_answers(case.original, requests[1])
    assert scores[immune] == pytest.approx(np.mean(own.logprob_sum / own.n_tokens), rel=1e-3, abs=1e-6)
