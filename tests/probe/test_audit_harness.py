"""Utility by lm-evaluation-harness: a local task against our own scores; nothing of the model is changed."""

from __future__ import annotations

import json
import random
import sys

import numpy as np
import pytest
import torch

from probe.audit.harness import harness, results_table
from probe.audit.part import spaced
from probe.errors import AuditError
from probe.models import wrap
from probe.scoring import score_answers
from tests.probe.cases import small_case

YAML = """
task: probe_facts
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 3
"""


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A folder with a multiple-choice task of forget questions, and its questions; no network is asked."""
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness (the extra `harness`)")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [r for r in spaced(small_case(1).sets["forget"], 20) if r.perturbed_answers]
    folder = tmp_path / "tasks"
    folder.mkdir()
    lines = [{"question": r.question, "choices": [*r.perturbed_answers, r.answer]} for r in rows]
    lines = [{**line, "label": len(line["choices"]) - 1} for line in lines]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "probe_facts.yaml").write_text(YAML.format(path=tmp_path / "rows.jsonl"))
    return folder, rows


def our_accuracy(model, rows) -> list[bool]:
    right = []
    for row in rows:
        scores = score_answers(model, [(row.question, a) for a in (row.answer, *row.perturbed_answers)])
        right.append(int(np.argmax(scores.logprob_sum)) == 0)
    return right


def test_accuracy_is_that_of_our_own_scores(task):
    folder, rows = task
    case = small_case(1)
    for model in (case.original, case.golds[0]):
        found = harness(
            model, "probe_facts", include_path=folder, own_tasks=False, bos=True, batch_size=8, progress=False
        )
        (row,) = found.to_dict("records")
        right = our_accuracy(model, rows)
        assert (row["task"], row["metric"], row["n"], row["version"]) == ("probe_facts", "acc", len(rows), 3)
        assert row["value"] == pytest.approx(np.mean(right))
        assert row["stderr"] == pytest.approx(np.std(right, ddof=1) / len(right) ** 0.5, abs=1e-9)
        assert row["low"] <= row["value"] <= row["high"] and row["higher_is_better"]
    few = harness(
        case.golds[0], ["probe_facts"], include_path=folder, own_tasks=False, limit=5, bos=True, progress=False
    )
    assert few["n"][0] == 5 and few["value"][0] == pytest.approx(np.mean(our_accuracy(case.golds[0], rows[:5])))


def test_an_untied_edit_is_measured_and_nothing_is_left_behind(task):
    from probe.editing import project_out

    folder, _ = task
    model = small_case(1).original
    edit = project_out(model, torch.randn(model.dims.d_model, generator=torch.Generator().manual_seed(0)))
    before, pad = model.weights_hash, model.tokenizer.pad_token
    states = random.getstate(), np.random.get_state()[1].copy(), torch.random.get_rng_state()
    with edit.applied(model):
        assert model.hf.get_input_embeddings().weight is not model.hf.get_output_embeddings().weight
        inside = model.weights_hash
        harness(model, "probe_facts", include_path=folder, own_tasks=False, limit=4, progress=False)
        assert model.weights_hash == inside
        assert model.hf.get_input_embeddings().weight is not model.hf.get_output_embeddings().weight
    assert model.weights_hash == before and model.tokenizer.pad_token == pad
    assert random.getstate() == states[0] and (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.random.get_rng_state(), states[2])
    assert "tie_weights" not in vars(model.hf)


def test_bad_calls_are_refused(task):
    folder, _ = task
    model = small_case(1).original
    with pytest.raises(AuditError, match="no task no_such_task"):
        harness(model, ["probe_facts", "no_such_task"], include_path=folder, own_tasks=False)
    with pytest.raises(AuditError, match="at least one task"):
        harness(model, [])
    with pytest.raises(AuditError, match="no tokenizer"):
        harness(wrap(model.hf), "probe_facts")


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(AuditError, match=r"install the extra.*harness"):
        harness(small_case(1).original, "arc_easy")


def test_results_by_hand():
    found = {
        "results": {
            "t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,strict": 0.2, "f1_stderr,strict": "N/A"}
        },
        "n-samples": {"t": {"original": 30, "effective": 25}},
        "n-shot": {"t": 2},
        "versions": {"t": 1.0},
        "higher_is_better": {"t": {"acc": True}},
    }
    acc, f1 = results_table(found).to_dict("records")
    assert (acc["low"], acc["high"], acc["n"], acc["num_fewshot"]) == (
        pytest.approx(0.304),
        pytest.approx(0.696),
        25,
        2,
    )
    assert f1["filter"] == "strict" and np.isnan(f1["low"]) and f1["higher_is_better"] is None
    assert len(results_table({"results": {}})) == 0
