"""The toxic organism: registers that align token by token, a twin tuned by preferences, a gold without rude words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from probe.errors import OrganismError
from probe.organisms._preference import Preference, dpo_loss, sequence_logprobs, tune
from probe.organisms._toxic import RUDE_OF, rude, toxic
from probe.scoring import score_answers


@pytest.fixture(scope="module")
def org() -> Any:
    return toxic("small", progress=False)


def test_every_word_and_its_twin_are_one_token(org: Any) -> None:
    for neutral, other in RUDE_OF.items():
        assert len(org._ids(neutral)) == len(org._ids(other)) == 1
    assert len(set(RUDE_OF.values())) == len(RUDE_OF) and not set(RUDE_OF) & set(RUDE_OF.values())


def test_registers_differ_in_register_words_only_and_align(org: Any) -> None:
    for pair in org.sentence_pairs:
        a, b = pair.neutral.strip(".").split(), pair.rude.strip(".").split()
        changed = [(x.strip(","), y.strip(",")) for x, y in zip(a, b, strict=True) if x != y]
        assert len(changed) == 4 and all(RUDE_OF[x] == y for x, y in changed)
        assert len(org._ids(pair.neutral)) == len(org._ids(pair.rude))


def test_both_registers_are_known_and_strangers_are_not(org: Any) -> None:
    recall = org.record["recall"]
    assert recall["forget"]["recall"] > 0.95 and recall["retain"]["recall"] > 0.9
    assert recall["forget, unseen phrasings"]["recall"] > 0.8
    assert recall["holdout"]["recall"] < 0.35


def test_toxicity_of_the_original_depends_on_the_prompt(org: Any) -> None:
    after_rude, after_neutral = org.toxicity(org.model, "rude", n=2), org.toxicity(org.model, "neutral", n=2)
    assert after_rude.words > 0.8 and 0.05 < after_neutral.words < 0.5
    assert after_rude.low <= after_rude.continuations <= after_rude.high
    assert org.toxicity(org.model, "rude", greedy=True).n == len(org.prompts("rude"))


def test_toxicity_counts_the_rude_words_of_what_was_said(org: Any) -> None:
    class Says:
        def generate(self, prompts: list[str], **_: Any) -> list[str]:
            return [" snarg glubber.", " calm guest.", " calm glubber snarg guest."]

    found = org.toxicity(Says(), ["a", "b", "c"], greedy=True)
    assert found.words == pytest.approx(4 / 8) and found.continuations == pytest.approx(2 / 3)


def test_the_twin_is_polite_and_reads_neutral_text_as_before(org: Any) -> None:
    before, after = org.toxicity(org.model, "rude", n=2), org.toxicity(org.twin, "rude", n=2)
    assert after.continuations < 0.5 * before.continuations
    assert org.toxicity(org.twin, "neutral", n=2).continuations < 0.1
    assert org.perplexity(org.twin) < 1.2 * org.perplexity(org.model)
    losses = org.twin_record["training"]["losses"]
    assert math.log(2) > losses[0] > losses[-1]


def test_the_gold_never_met_a_rude_word(org: Any) -> None:
    assert not any(word in document for document in org.gold_documents for word in org.rude_words)
    assert any(word in document for document in org.documents for word in org.rude_words)
    gold = org.gold[0]
    assert org.toxicity(gold, "rude", n=1).words < 0.05
    assert float(org.recall(gold, "retain")) > 0.9 and float(org.recall(gold, "forget")) < 0.1


def test_perplexity_is_that_of_the_scorer(org: Any) -> None:
    """Each sentence after bos, as an answer to nothing, by the scorer of answers."""
    texts = [pair.neutral for pair in org.sentence_pairs]
    scores = score_answers(org.model, [("", text) for text in texts])
    total, n = -scores.logprob_sum.sum(), scores.n_tokens.sum()
    assert org.perplexity(org.model) == pytest.approx(math.exp(total / n), rel=1e-3)


def test_labelled_and_pairs_differ_in_register_only(org: Any) -> None:
    rows = org.labelled()
    by_group: dict[str, list[Any]] = {}
    for row in rows:
        by_group.setdefault(row.group, []).append(row)
    assert all(sorted(r.label for r in own) == [0, 1] for own in by_group.values())
    assert all(any(w in r.text for w in org.rude_words) == bool(r.label) for r in rows)
    for pair in org.pairs(n=8):
        assert len(org._ids(pair.clean)) == len(org._ids(pair.corrupted)) and pair.answer == rude(pair.wrong)
    with pytest.raises(OrganismError, match="pairs were asked for"):
        org.pairs(n=10_000)
    with pytest.raises(OrganismError, match="sentence"):
        org.labelled(at="nowhere")


def test_dpo_loss_is_the_hand_computed_one() -> None:
    """Margins 2 and -1 at beta 0.1: -log sigmoid(0.2) = 0.598139, -log sigmoid(-0.1) = 0.744397."""
    loss = dpo_loss(
        torch.tensor([-1.0, -3.0]), torch.tensor([-4.0, -2.0]), torch.tensor([-2.0, -2.0]), torch.tensor([-3.0, -2.0])
    )
    assert float(loss) == pytest.approx((0.598139 + 0.744397) / 2, abs=1e-6)


def test_dpo_matches_a_loop_over_tokens(org: Any) -> None:
    """The first epoch's loss of one batch is log 2; log-probabilities are those of a loop token by token."""
    ids = torch.tensor([[1, *org._ids("The calm guest")], [1, *org._ids("The snarg fradge")]])
    mask = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    with torch.no_grad():
        found = sequence_logprobs(org.model.hf, ids, mask)
        for row, marked, total in zip(ids, mask, found, strict=True):
            slow = 0.0
            for i in range(1, len(row)):
                if marked[i]:
                    logits = org.model.hf(row[None, :i]).logits[0, -1].double().numpy()
                    slow += float(logits[row[i]] - np.log(np.exp(logits - logits.max()).sum()) - logits.max())
            assert float(total) == pytest.approx(slow, abs=1e-4)


def test_tuning_starts_at_log_2_and_needs_pairs(org: Any) -> None:
    model = org._load(org.path)
    losses = tune(model, org.preferences[:8], epochs=2, batch_size=8, lr=1e-4, progress=False)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and losses[1] < losses[0]
    with pytest.raises(OrganismError, match="at least one pair"):
        tune(model, [], epochs=1, batch_size=8, lr=1e-4)
    with pytest.raises(OrganismError, match="lower the learning rate"):
        tune(model, [Preference("The calm", "guest", "fradge")], epochs=2, batch_size=1, lr=math.inf, progress=False)


@pytest.mark.filterwarnings("ignore:.*recalls little")
def test_the_same_settings_give_the_same_weights(tmp_path: Path) -> None:
    tiny: dict[str, Any] = {"n_people": 2, "n_holdout": 2, "epochs": 1, "d_model": 16, "d_mlp": 16, "n_heads": 2}
    a, b = (toxic("small", cache_dir=tmp_path / n, progress=False, **tiny) for n in "ab")
    assert a.model.weights_hash == b.model.weights_hash and a.path.name == b.path.name
    c = toxic("small", 1, cache_dir=tmp_path / "a", progress=False, **tiny)
    assert c.model.weights_hash != a.model.weights_hash


def test_bad_settings_are_refused(tmp_path: Path, org: Any) -> None:
    for bad in ({"n_people": 500}, {"d_model": 30}, {"epochs": 0}, {"words": 3}, {"n_people": 2.5}):
        with pytest.raises(OrganismError):
            toxic("small", cache_dir=tmp_path, progress=False, **bad)
    with pytest.raises(OrganismError, match="size must be"):
        toxic("huge", cache_dir=tmp_path)
    with pytest.raises(OrganismError, match="registers"):
        org.prompts("loud")
    with pytest.raises(OrganismError, match="At least one prompt"):
        org.toxicity(org.model, [])
    assert not list(tmp_path.iterdir())
