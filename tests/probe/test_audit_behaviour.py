"""What a model says and prefers, on the small organism: known answers, brute force, degenerate models."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from probe.audit import metrics
from probe.audit._generation import answered, continuations, kept
from probe.audit.behaviour import (
    ANSWER,
    PARAPHRASED_ANSWER,
    PARAPHRASED_QUESTION,
    Behaviour,
    rouge_number,
    score_truth,
    truth,
)
from probe.audit.fluency import Fluency
from probe.audit.part import scratch
from probe.data import Questions
from probe.errors import AuditError, DataError, ProbeError
from tests.probe.cases import small_case, subject

KNOWN = ("forget", "retain", "unseen_retain")


def values(measurement) -> dict:
    return {(one.set, one.metric): one.value.value for one in measurement.numbers}


@pytest.fixture(scope="module")
def case():
    full = small_case()
    sets = {name: full.sets[name] for name in ("forget", "retain", "unseen_retain", "holdout")}
    corpus = tuple(f"{row.question} {row.answer}." for row in full.sets["retain"][:40])
    return replace(full, sets=sets, corpus=corpus)


@pytest.fixture(scope="module")
def original(case):
    return subject(case)


@pytest.fixture(scope="module")
def gold(case):
    return subject(case, "gold 1")


def alike(model) -> None:
    """Make every next token equally probable, whatever was read."""
    norm = [p for name, p in model.hf.named_parameters() if "layers" not in name and "norm" in name]
    with torch.no_grad():
        norm[0].zero_()


@pytest.fixture
def uniform(case):
    with scratch(case.original) as model:
        alike(model)
        yield subject(case, "edited", model)


def rows(**given) -> Questions:
    base = {"id": "0", "group": "g", "question": "What is the order of Zeb?", "answer": "ashen lantern"}
    return Questions.from_rows([{**base, **given}])


def test_what_is_known_scores_high_and_what_is_not_low(original, gold):
    known, unknown = (values(Behaviour(limit=40, other_limit=24).measure(one)) for one in (original, gold))
    for name in KNOWN:
        for metric in ("rouge_l", "exact_memorisation", "extraction_strength", "truth_preference"):
            assert known[name, metric] > 0.85, (name, metric)
    for metric in (
        "rouge_l",
        "exact_memorisation",
        "extraction_strength",
        "truth_preference",
        "paraphrase_probability",
    ):
        assert unknown["forget", metric] < 0.6 < unknown["retain", metric], metric
        assert known["holdout", metric] < 0.6, metric
    assert known["forget", "truth_ratio"] < 0.5 < unknown["forget", "truth_ratio"]


def test_every_declared_metric_is_reported_and_no_other(original):
    measured = Behaviour(limit=8, other_limit=8).measure(original)
    names = {metric.name for metric in Behaviour.metrics}
    assert {one.metric for one in measured.numbers} == names
    assert {metric for _, metric in Behaviour.evidence} <= names
    assert measured.missing == ()
    assert len({(one.set, one.metric) for one in measured.numbers}) == len(measured.numbers)


def test_memorisation_is_that_of_all_scored_answers(original):
    found = values(Behaviour(limit=4, other_limit=4).measure(original))
    own = original.answers["holdout"]
    wanted = np.mean(own.argmax_right / own.n_tokens)
    assert found["holdout", "exact_memorisation"] == pytest.approx(wanted)
    assert found["holdout", "extraction_strength"] == pytest.approx(np.mean(1 - (own.last_wrong + 1) / own.n_tokens))


def test_greedy_text_is_the_answer_where_teacher_forcing_is_right(original):
    """What `AnswerScores.exact` says of greedy decoding holds for the text that is generated."""
    asked, said = answered(original, "holdout", 60, 32)
    exact = dict(zip(original.answers["holdout"].ids, original.answers["holdout"].exact, strict=True))
    begins = [text.strip().startswith(row.answer) for row, text in zip(asked, said, strict=True)]
    assert begins == [bool(exact[row.id]) for row in asked]
    asked, said = answered(original, "forget", 30, 32)
    assert np.mean([text.strip().startswith(row.answer) for row, text in zip(asked, said, strict=True)]) > 0.9


def test_continuations_are_those_of_one_prompt_at_a_time(original):
    """Against a loop without padding, cache or batch; `through` never ends."""
    model, hf = original.model, original.model.hf
    prompts = [model.tokenizer(row.question)["input_ids"] for row in original.case.sets["holdout"][:5]]
    end = hf.generation_config.eos_token_id
    for through in (False, True):
        made = continuations(model, prompts, 6, batch_size=3, through=through)
        for prompt, own in zip(prompts, made, strict=True):
            ids = list(prompt)
            for _ in range(6):
                with torch.no_grad():
                    logits = hf(torch.tensor([ids])).logits[0, -1]
                if through:
                    logits[end] = -torch.inf
                ids.append(int(logits.argmax()))
                if ids[-1] == end:
                    ids.pop()
                    break
            assert own == ids[len(prompt) :]


def test_continuations_refuse_what_they_cannot_make(original):
    model = original.model
    for prompts, n in (([], 3), ([[]], 3), ([[5]], 0)):
        with pytest.raises(AuditError, match="continuation needs"):
            continuations(model, prompts, n)
    with pytest.raises(AuditError, match="fills the model's context"):
        continuations(model, [[5] * model.dims.n_ctx], 3)


def test_the_models_own_generation_settings_do_not_matter(original):
    config = original.model.hf.generation_config
    prompts = [original.model.tokenizer("What is the order of")["input_ids"]]
    plain = continuations(original.model, prompts, 12, through=True)
    before = (config.repetition_penalty, config.do_sample)
    try:
        config.repetition_penalty, config.do_sample = 5.0, True
        assert continuations(original.model, prompts, 12, through=True) == plain
    finally:
        config.repetition_penalty, config.do_sample = before


def test_truth_scores_against_a_loop(original):
    """Losses one answer at a time, by the model's own cross-entropy."""
    few = original.case.sets["forget"][:3]
    scores = score_truth(original.model, few)
    for i, row in enumerate(few):
        asked = row.paraphrases[0]
        losses = []
        for answer in (row.answer, *row.perturbed_answers):
            head = len(original.model.tokenizer(asked)["input_ids"])
            ids = torch.tensor([original.model.tokenizer(f"{asked} {answer}")["input_ids"]])
            ids = ids[:, :-1] if ids[0, -1] == original.model.tokenizer.eos_token_id else ids
            head -= int(original.model.tokenizer(asked)["input_ids"][-1] == original.model.tokenizer.eos_token_id)
            with torch.no_grad():
                logprob = original.model.hf(ids).logits[0, :-1].log_softmax(-1)
            losses.append(-logprob[torch.arange(head - 1, ids.shape[1] - 1), ids[0, head:]].mean().item())
        assert scores.references[i] == PARAPHRASED_QUESTION
        assert scores.paraphrase_nll[i] == pytest.approx(losses[0], abs=1e-4)
        np.testing.assert_allclose(scores.perturbed_nll[i], losses[1:], atol=1e-4)
        assert scores.log_ratio[i] == pytest.approx(losses[0] - np.mean(losses[1:]), abs=1e-4)


def test_which_right_answer_a_truth_ratio_uses(original):
    wrong = {"perturbed_answers": ["silver heron"]}
    model = original.model
    assert score_truth(model, rows(**wrong)).references == (ANSWER,)
    assert score_truth(model, rows(**wrong, paraphrases=["Name it:"])).references == (PARAPHRASED_QUESTION,)
    two = rows(**wrong, paraphrases=["Name it:"], paraphrased_answers=["silver lantern", "the ashen lantern"])
    scores = score_truth(model, two)
    assert scores.references == (PARAPHRASED_ANSWER,)
    each = [score_truth(model, rows(**wrong, paraphrased_answers=[a])) for a in ("silver lantern", "the ashen lantern")]
    assert scores.paraphrase_nll[0] == pytest.approx(np.mean([one.paraphrase_nll[0] for one in each]), abs=1e-5)


def test_truth_ratios_that_cannot_be_measured(original):
    with pytest.raises(DataError, match="no question has any"):
        score_truth(original.model, rows())
    with pytest.raises(DataError, match="among its perturbed answers"):
        score_truth(original.model, rows(perturbed_answers=["silver heron", " ashen lantern"]))
    with pytest.raises(DataError, match="no tokens"):
        score_truth(original.model, rows(perturbed_answers=[" "]))


def test_a_set_without_perturbed_answers_is_said_to_be_so(case):
    bare = Questions([replace(row, perturbed_answers=()) for row in case.sets["holdout"][:6]])
    mixed = Questions([*bare, case.sets["retain"][0], case.sets["retain"][-1]])
    one = subject(replace(case, sets={"forget": bare, "retain": mixed}))
    measured = Behaviour().measure(one)
    assert measured.missing[0] == "truth ratio on forget: no perturbed answers"
    assert measured.missing[1] == "truth ratio on retain: 6 questions without perturbed answers are left out"
    assert ("forget", "truth_ratio") not in values(measured)
    assert [n.value.bottom.sum() for n in measured.numbers if (n.set, n.metric) == ("retain", "truth_ratio")] == [2]


def test_answers_that_rouge_cannot_see_are_left_out(original, case):
    chinese = Questions([replace(row, answer="北京") for row in case.sets["holdout"][:2]])
    numbers, missing = rouge_number(chinese, ["x", "y"], "holdout", "rouge_l", "recall")
    assert numbers == [] and missing == ["rouge_l on holdout: 2 answers have no ASCII letters or digits"]


def test_a_model_that_answers_everything_alike_has_no_truth_ratio(uniform):
    measured = Behaviour(limit=12, other_limit=12).measure(uniform)
    assert "truth ratio on forget: it is the same for every question" in measured.missing
    assert not any(metric.startswith("truth") for _, metric in values(measured))
    assert values(measured)["forget", "rouge_l"] < 0.1


def test_nan_logits_are_an_error(case, original):
    with scratch(case.original) as model:
        with torch.no_grad():
            next(p for name, p in model.hf.named_parameters() if "norm" in name).fill_(torch.nan)
        broken = replace(original, role="edited")
        with pytest.raises(AuditError, match="not finite"):
            truth(broken, "forget", 4)
        with pytest.raises(AuditError, match="not finite"):
            answered(broken, "forget", 4, 8)
        with pytest.raises(AuditError, match="not finite"):
            Fluency(limit=2).measure(broken)
        with pytest.raises(ProbeError, match="not finite"):
            subject(case, "edited", model)


def test_one_question_of_one_person(case):
    one = {name: case.sets[name][:1] for name in ("forget", "retain")}
    measured = Behaviour().measure(subject(replace(case, sets=one)))
    found = {(n.set, n.metric): n.value for n in measured.numbers}
    assert found["forget", "rouge_l"].value == 1
    assert np.isnan(found["forget", "truth_ratio"].interval(100, 0)).all()  # one group has no interval


def test_nothing_of_the_model_changes(case):
    one = subject(case)
    before, state = one.model.weights_hash, torch.get_rng_state()
    Behaviour(limit=4, other_limit=4).measure(one)
    Fluency(limit=2, new_tokens=8).measure(one)
    assert one.model.weights_hash == before
    assert torch.equal(torch.get_rng_state(), state)
    assert not one.model.hf.training


def test_what_parts_share_is_made_once(case):
    one, calls = subject(case), []
    for _ in range(2):
        kept(one, "key", lambda: calls.append(1))
    assert calls == [1]
    assert answered(one, "forget", 4, 8) is answered(one, "forget", 4, 8)
    assert truth(one, "forget", 4) is truth(one, "forget", 4)


def test_fluency_of_every_set(original):
    part = Fluency(limit=6, new_tokens=24)
    measured = part.measure(original)
    found = values(measured)
    assert {name for name, _ in found} == {"forget", "retain", "corpus"}
    assert {metric for _, metric in found} == {"generation_entropy", "repetition"} == {m.name for m in part.metrics}
    assert measured.missing == ()
    for (_, metric), value in found.items():
        assert 0 <= value <= (np.log2(23) if metric == "generation_entropy" else 1)


def test_fluency_is_that_of_the_continuations(original):
    """One prompt at a time, the formulas applied by hand."""
    part = Fluency(sets=("holdout",), limit=4, new_tokens=20)
    case = replace(original.case, corpus=())
    found = values(part.measure(replace(original, case=case)))
    texts = []
    for i in range(4):
        row = case.sets["holdout"][i * len(case.sets["holdout"]) // 4]
        ids = original.model.tokenizer(row.question)["input_ids"]
        texts.append(continuations(original.model, [ids], 20, through=True)[0])
    assert found["holdout", "generation_entropy"] == pytest.approx(np.mean([metrics.ngram_entropy(t) for t in texts]))
    assert found["holdout", "repetition"] == pytest.approx(np.mean([metrics.repetition(t) for t in texts]))


def test_a_model_that_says_one_token_for_ever_has_no_entropy(uniform):
    found = values(Fluency(limit=3, new_tokens=20).measure(uniform))
    for name in ("forget", "retain", "corpus"):
        assert found[name, "generation_entropy"] == 0
        assert found[name, "repetition"] == pytest.approx(1 - 1 / 17)


def test_fluency_without_room_or_prompts(original):
    assert Fluency(sets=()).measure(replace(original, case=replace(original.case, corpus=()))).missing == (
        "fluency: no prompts",
    )
    n_ctx = original.model.dims.n_ctx
    cut = Fluency(sets=("retain",), limit=1, new_tokens=n_ctx).measure(original)
    assert len(cut.numbers) == 4 and "the context is full" in cut.missing[0]
    with pytest.raises(DataError, match="at least two tokens"):
        Fluency().measure(replace(original, case=replace(original.case, corpus=("",))))
    long = " ".join(["lantern"] * (n_ctx * 2))
    full = Fluency(sets=(), prefix_tokens=n_ctx).measure(replace(original, case=replace(original.case, corpus=(long,))))
    assert full.numbers == () and "leave no room" in full.missing[0]


def test_phrasings_that_share_their_paraphrase_are_one_item(original):
    wrong = {"perturbed_answers": ["silver heron"], "group": "g", "answer": "ashen lantern"}
    asked = [
        ("What is the order of Zeb?", "Name it:"),
        ("Which order has Zeb?", "Name it:"),
        ("Order of Zeb?", "Say it:"),
    ]
    three = Questions.from_rows([{**wrong, "question": q, "paraphrases": [p]} for q, p in asked])
    scores = score_truth(original.model, three)
    assert scores.items.tolist() == [0, 0, 1] and scores.distinct.tolist() == [0, 2]
    assert scores.log_ratio[0] == scores.log_ratio[1] != scores.log_ratio[2]


def test_shares_are_never_differences():
    """What may fall below 0 is no share: its interval must not be one of successes among trials."""
    from probe.audit._registry import PARTS, part

    shares = {metric.name for name in PARTS for metric in part(name).metrics if metric.share}
    assert {"relearn_recall", "context_recall", "latent_recall", "uds"} <= shares
    differences = {"context_over_gold", "latent_advantage", "relearn_gain", "readout_selectivity", "inferred"}
    assert not shares & (differences | {"distance_share", "relearn_time_ratio", "truth_ratio"})
    units = {metric.name: metric.unit for name in PARTS for metric in part(name).metrics}
    assert (units["privacy_leakage"], units["distance_to_gold"], units["generation_entropy"]) == ("%", "nats", "bits")
