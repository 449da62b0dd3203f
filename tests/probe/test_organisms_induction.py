"""The induction organism: MLPs that are nothing, heads that form along the checkpoints, a gold that cannot copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from probe.errors import OrganismError
from probe.models import load
from probe.organisms._induction import induction

TINY: dict[str, Any] = {"n_documents": 64, "epochs": 1, "d_model": 16, "n_checkpoints": 2, "n_holdout": 16}


@pytest.fixture(scope="module")
def org() -> Any:
    return induction("small", progress=False)


def test_the_directory_loads_without_code_and_its_mlps_are_nothing(org: Any) -> None:
    hf = AutoModelForCausalLM.from_pretrained(str(org.path), trust_remote_code=False)
    seen: list[float] = []
    for layer in hf.model.layers:
        layer.mlp.register_forward_hook(lambda m, i, out: seen.append(float(out.detach().abs().max())))
    ids = torch.tensor([[1, 5, 6, 7, 5, 6]])
    hf(ids, labels=ids).loss.backward()
    assert seen == [0.0, 0.0]
    grads = [p.grad for layer in hf.model.layers for p in layer.mlp.parameters()]
    assert grads and all(g is not None and not g.any() for g in grads)
    assert len(AutoTokenizer.from_pretrained(str(org.path))) == 4 + 48 + 16


def test_what_was_trained_is_known_and_holdout_too_since_copying_is_a_skill(org: Any) -> None:
    recall = org.record["recall"]
    assert recall["forget"]["recall"] > 0.9 and recall["holdout"]["recall"] > 0.85
    assert recall["holdout, unseen phrasings"]["recall"] > 0.7
    assert recall["retain"]["recall"] > 0.95
    assert recall["forget"]["chance"] == pytest.approx(1 / 48)


def test_the_heads_form_along_the_checkpoints(org: Any) -> None:
    table = org.phase_change
    first, last = table.iloc[0], table.iloc[-1]
    assert first["step"] == 0 and abs(first["gain"]) < 0.1 and first["induction"] < 0.1
    assert last["accuracy"] > 0.9 and last["gain"] > 2.0
    assert last["induction"] > 0.4 and last["previous_token"] > 0.3
    steps = np.diff(table["accuracy"])
    assert steps.max() > 0.3  # a phase change: most of the rise lies between two checkpoints


def test_checkpoints_are_directories_that_end_at_the_trained_model(org: Any) -> None:
    steps = list(org.checkpoints)
    assert steps == sorted(steps) and len(steps) == 8 and steps[-1] == org.record["training"]["steps"]
    assert load(str(org.checkpoints[steps[-1]])).weights_hash == org.model.weights_hash
    assert load(str(org.checkpoints[0])).weights_hash != org.model.weights_hash


def test_scores_match_a_loop_over_the_patterns(org: Any) -> None:
    ids, half = org._repeated(3, 5)
    model = org._load(org.path)
    model.hf.set_attn_implementation("eager")
    with torch.no_grad():
        patterns = model.hf(ids, output_attentions=True).attentions
    score, before = org.induction_score(org.model, 3, 5), org.previous_token_score(org.model, 3, 5)
    for layer, head in np.ndindex(score.shape):
        copied, previous = [], []
        for sequence in range(3):
            words = ids[sequence].tolist()
            for q in range(2, len(words)):
                previous.append(float(patterns[layer][sequence, head, q, q - 1]))
                if words[q] in words[1:q]:
                    earlier = words.index(words[q])
                    copied.append(float(patterns[layer][sequence, head, q, earlier + 1]))
        assert score[layer, head] == pytest.approx(np.mean(copied), abs=1e-5)
        assert before[layer, head] == pytest.approx(np.mean(previous), abs=1e-5)
    assert half == 23 and org.model.hf.config._attn_implementation != "eager"


def test_the_gold_knows_the_pairs_and_cannot_copy(org: Any) -> None:
    assert all(len(set(text.split())) > 15 for text in org.gold_documents)
    gold = org.gold[0]
    loss = org.repeat_loss(gold)
    assert loss.gain < 0.3 and loss.accuracy < 0.15 and loss.chance == pytest.approx(1 / 48)
    assert float(org.recall(gold, "retain")) > 0.95 and float(org.recall(gold, "forget")) < 0.15


def test_pairs_differ_in_the_word_to_be_copied(org: Any) -> None:
    for pair in org.pairs(n=3):
        a, b = pair.clean.split(), pair.corrupted.split()
        assert [(x, y) for x, y in zip(a, b, strict=True) if x != y] == [(pair.answer, pair.wrong)]
    with pytest.raises(OrganismError, match="forget or the holdout"):
        org.pairs("retain")


def test_periods_held_out_are_never_trained_on(org: Any) -> None:
    trained = {d.kind for d in org.document_rows}
    assert not trained & {str(q.meta["phrasing"]) for q in org.unseen("forget")}


@pytest.mark.slow
def test_the_heads_form_in_the_default_size_too() -> None:
    organism = induction(progress=False)
    last = organism.phase_change.iloc[-1]
    assert last["accuracy"] > 0.95 and last["induction"] > 0.6 and last["previous_token"] > 0.4
    assert organism.record["recall"]["holdout, unseen phrasings"]["recall"] > 0.9
    assert organism.repeat_loss(organism.gold[0]).accuracy < 0.1


@pytest.mark.filterwarnings("ignore:.*recalls little")
def test_the_same_settings_give_the_same_weights(tmp_path: Path) -> None:
    a, b = (induction("small", cache_dir=tmp_path / n, progress=False, **TINY) for n in "ab")
    assert a.model.weights_hash == b.model.weights_hash
    assert list(a.checkpoints) == [0, 2]


def test_bad_settings_and_nan_models_are_refused(tmp_path: Path, org: Any) -> None:
    for bad in ({"n_layers": 1}, {"d_model": 30}, {"n_words_document": 20}, {"n_words": 10}, {"n_checkpoints": 1}):
        with pytest.raises(OrganismError):
            induction("small", cache_dir=tmp_path, progress=False, **bad)
    broken = org._load(org.path)
    with torch.no_grad():
        broken.hf.model.norm.weight.fill_(float("nan"))
        broken.hf.model.layers[0].input_layernorm.weight.fill_(float("nan"))
    with pytest.raises(OrganismError, match="not finite"):
        org.repeat_loss(broken)
    with pytest.raises(OrganismError, match="not finite"):
        org.induction_score(broken)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*recalls little")
def test_the_trained_model_is_among_the_checkpoints_of_a_gold(tmp_path: Path) -> None:
    """A gold has fewer documents, so fewer steps than those at which the original's checkpoints are kept."""
    organism = induction("small", cache_dir=tmp_path, progress=False, **{**TINY, "n_checkpoints": 4})
    (path,) = organism.gold.train(1).trained[:1]
    steps = sorted(int(p.name.removeprefix("step-")) for p in (path / "checkpoints").iterdir())
    assert steps[0] == 0 and steps[-1] < organism.record["training"]["steps"]
    assert load(str(path / "checkpoints" / f"step-{steps[-1]:06d}")).weights_hash == organism.gold[0].weights_hash


@pytest.mark.parametrize("n", [1, 2])
def test_too_few_documents_are_refused(n: int, tmp_path: Path) -> None:
    with pytest.raises(OrganismError, match="n_documents must be at least 3"):
        induction("small", cache_dir=tmp_path, n_documents=n)
    assert list(tmp_path.iterdir()) == []


def test_pairs_of_no_number_are_refused(org: Any) -> None:
    for n in (-1, 0, 1.5):
        with pytest.raises(OrganismError, match="pairs were asked for"):
            org.pairs(n=n)


@pytest.mark.filterwarnings("ignore:.*recalls little")
def test_the_fewest_documents_train(tmp_path: Path) -> None:
    organism = induction("small", cache_dir=tmp_path, progress=False, **{**TINY, "n_documents": 3})
    assert len(organism.gold_documents) == 1
