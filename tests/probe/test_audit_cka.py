"""Linear CKA: numpy's formula, its invariances, and models that are alike or not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from probe.audit._case import Case
from probe.audit.cka import Cka, linear_cka
from probe.audit.part import Subject
from probe.errors import AuditError
from tests.probe.test_audit_uds import questions
from tests.probe.tiny import tiny


def by_hsic(x, y):
    """CKA from the centred Gram matrices (equations 2 and 3 of arXiv 1905.00414)."""
    n = len(x)
    h = np.eye(n) - 1 / n
    k, m = h @ (x @ x.T) @ h, h @ (y @ y.T) @ h
    return np.sum(k * m) / np.sqrt(np.sum(k * k) * np.sum(m * m))


@pytest.mark.parametrize("shape", [(30, 6, 4), (5, 12, 9)])
def test_the_formula_and_its_invariances(shape):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape[:2])
    y = x[:, : shape[2]] @ rng.normal(size=(shape[2], shape[2])) + rng.normal(size=(shape[0], shape[2]))
    a, b = torch.from_numpy(x), torch.from_numpy(y)
    value = linear_cka(a, b)
    assert value == pytest.approx(by_hsic(x, y))
    assert linear_cka(b, a) == pytest.approx(value)
    rotation = torch.linalg.qr(torch.from_numpy(rng.normal(size=(shape[1], shape[1]))))[0]
    assert linear_cka(3 * a @ rotation + 5, b) == pytest.approx(value)
    assert linear_cka(a, a) == pytest.approx(1)
    counts = torch.tensor([2.0, 0.0] + [1.0] * (shape[0] - 2))
    repeated = np.repeat(np.arange(shape[0]), counts.numpy().astype(int))
    assert linear_cka(a, b, counts) == pytest.approx(by_hsic(x[repeated], y[repeated]))


def test_bad_input_is_refused():
    x = torch.randn(6, 3)
    with pytest.raises(AuditError, match="same rows"):
        linear_cka(x, x[:4])
    with pytest.raises(AuditError, match="at least 2"):
        linear_cka(x[:1], x[:1])
    with pytest.raises(AuditError, match="same for all"):
        linear_cka(x, torch.ones(6, 3) * 0.1)
    with pytest.raises(AuditError, match="finite"):
        linear_cka(x, x * float("nan"))


def test_the_part_holds_models_against_the_original_and_the_golds():
    original, gold = tiny("llama", seed=1), tiny("llama", seed=2)
    case = Case(original, {"forget": questions(), "retain": questions()}, [gold, gold], progress=False)
    part = Cka(n_boot=20)
    models = {"original": original, "gold 1": gold, "gold 2": gold, "edited": original}
    measured = {role: part.measure(Subject(role, model, case, {})) for role, model in models.items()}
    found = part.compare(measured, case)
    value = {r: {(n.set, n.metric): n.value for n in one.numbers} for r, one in found.items()}
    assert value["original"]["forget", "cka_original"].value == pytest.approx(1)
    assert value["edited"]["retain", "cka_original"].value == pytest.approx(1)
    assert value["gold 1"]["forget", "cka_gold"].value == pytest.approx(1)
    state, other = (measured[r].payload["forget"] for r in ("original", "gold 1"))
    wanted = [by_hsic(state[s].double().numpy(), other[s].double().numpy()) for s in state]
    assert found["edited"].tables["cka"].query("set == 'forget' and metric == 'cka_gold'")["cka"].tolist() == (
        pytest.approx(wanted, rel=1e-5)
    )
    one = value["edited"]["forget", "cka_gold"]
    assert one.value == pytest.approx(np.mean(wanted), rel=1e-5)
    assert one.low <= one.high


def test_one_question_cannot_be_measured():
    model = tiny("gpt2")
    case = Case(model, {"forget": questions()[:1], "retain": questions()}, progress=False)
    found = Cka().compare({"original": Cka().measure(Subject("original", model, case, {}))}, case)["original"]
    assert {n.set for n in found.numbers} == {"retain"}
    assert "cka_original on forget" in found.missing[0]
