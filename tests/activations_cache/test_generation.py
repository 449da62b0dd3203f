"""Generation against transformers' own, one prompt at a time; killed and resumed; refused input."""

from __future__ import annotations

import json
import math
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from activations_cache import _decoding, _generations, store
from activations_cache._decoding import Prompt, invert
from activations_cache._generation_plan import Plan, plan_batches
from activations_cache.errors import (
    CacheError,
    CacheLockedError,
    CacheMismatchError,
    CorruptCacheError,
    DataError,
    ModelError,
    NumericsError,
    UnfinishedCacheError,
)
from activations_cache.generation import Generation, Generations, generate
from tests.activations_cache.caches import die, in_child, token_rows
from tests.activations_cache.ranks import run_ranks
from tests.architectures import tiny

PROMPTS = token_rows(9, seed=3)
NEW = 7


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Forked children cannot use OpenMP's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Any:
    import probe

    return probe.load(str(shared_data / "stories260K"))


def made(model: Any, prompts: Any = None, **settings: Any) -> Generations:
    settings = {"max_new_tokens": NEW, "batch_tokens": 40, "progress": False, **settings}
    return generate(model, PROMPTS if prompts is None else prompts, **settings)


def greedy_alone(model: Any, ids: list[int], new: int = NEW, eos: int | None = 2) -> list[int]:
    """transformers' greedy continuation of one unpadded prompt."""
    settings = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=eos, pad_token_id=0)
    return model.generate(torch.tensor([ids]), generation_config=settings)[0, len(ids) :].tolist()


def next_logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    """log p of every token after each position of one unpadded sequence: [pos, vocab] in float64."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


# --- greedy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "gemma3", "mixtral", "opt", "gpt_oss"])
def test_greedy_equals_transformers_one_prompt_at_a_time(architecture: str):
    """Learned and rotary positions, sliding windows shorter than the sequences, experts: all under left padding."""
    model = tiny(architecture)
    rows = made(model, eos=2)
    assert [list(row.prompt_ids) for row in rows] == PROMPTS
    assert [list(row.ids) for row in rows] == [greedy_alone(model, ids) for ids in PROMPTS]


def test_there_are_several_batches_and_all_prompts_are_in_one():
    rows = [Prompt(number, 0, tuple(ids)) for number, ids in enumerate(PROMPTS)]
    batches = list(plan_batches(rows, NEW, 40))
    assert len(batches) > 2
    assert sorted(prompt.number for batch in batches for prompt in batch) == list(range(len(PROMPTS)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * (max(len(p.ids) for p in batch) + NEW) <= 40
    lengths = [len(prompt.ids) for batch in batches for prompt in batch]
    assert lengths == sorted(lengths, reverse=True)


def test_eos_in_the_middle_ends_a_row_and_not_its_neighbours(model: Any):
    free = made(model, eos=False)
    token = free[4].ids[2]  # what the model says anyway is made the end
    rows = made(model, eos=token)
    for row, whole in zip(rows, free, strict=True):
        if token in whole.ids:
            cut = whole.ids.index(token) + 1
            assert (row.ids, row.finish) == (whole.ids[:cut], "eos")
        else:
            assert (row.ids, row.finish) == (whole.ids, "length")
    assert {row.finish for row in rows} == {"eos", "length"}
    assert {len(row.ids) for row in free} == {NEW}
    assert made(model, eos=[token, free[0].ids[0]])[0].ids == free[0].ids[:1]


def test_the_ends_are_taken_from_the_model_and_nothing_else(monkeypatch: pytest.MonkeyPatch):
    model = tiny("llama")
    free = made(model, eos=False)
    token = free[4].ids[2]
    odd = GenerationConfig(
        eos_token_id=[token], repetition_penalty=9.0, do_sample=True, temperature=3.0, max_new_tokens=2, min_length=6
    )
    monkeypatch.setattr(model, "generation_config", odd)
    assert made(model) == made(tiny("llama"), eos=token)  # no penalty, no draw, no length
    assert model.generation_config is odd
    monkeypatch.setattr(model, "generation_config", GenerationConfig())
    assert made(model) == made(model, eos=2)  # the config's


def test_modes_and_random_state_are_given_back():
    model = tiny("llama", attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    rows = made(model, do_sample=True)
    assert torch.equal(torch.rand(3), expected)
    assert (np.random.get_state()[1] == before).all()
    assert model.training and model.model.layers[1].training and not model.model.layers[0].training
    assert rows == made(model.eval(), do_sample=True)  # no dropout acted


# --- sampling -------------------------------------------------------------------------------------------------------


def test_a_seed_is_a_text_whatever_the_batch_and_other_seeds_differ(model: Any):
    first = made(model, do_sample=True, seed=1, n_samples=2)
    assert first == made(model, do_sample=True, seed=1, n_samples=2)
    alone = made(model, do_sample=True, seed=1, n_samples=2, batch_tokens=1)
    assert [row.ids for row in alone] == [row.ids for row in first]
    fewer = made(model, PROMPTS[:4], do_sample=True, seed=1)
    assert [row.ids for row in fewer] == [row.ids for row in first if row.sample == 0][:4]
    other = made(model, do_sample=True, seed=2, n_samples=2)
    assert sum(a.ids != b.ids for a, b in zip(first, other, strict=True)) > len(first) // 2
    assert sum(first[i].ids != first[i + 1].ids for i in range(0, len(first), 2)) > len(PROMPTS) // 2
    assert [(row.prompt, row.sample) for row in first] == [(p, s) for p in range(len(PROMPTS)) for s in (0, 1)]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.7, 9, 1.0), (1.0, 0, 0.7)]
)
def test_sampling_logprobs_are_those_of_the_distribution(model: Any, temperature: float, top_k: int, top_p: float):
    """By hand: divide, keep the k largest or the fewest that hold top_p, renormalise."""
    rows = made(model, do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p, eos=False)
    for row in rows:
        plain = next_logprobs(model, list(row.input_ids))[len(row.prompt_ids) - 1 : -1]  # [new, vocab]
        for step, token in enumerate(row.ids):
            p = torch.softmax(plain[step] / temperature, -1)
            order = p.argsort(descending=True)
            kept = order[: top_k or len(order)]
            if top_p < 1:
                kept = order[: int((p[order].cumsum(0) < top_p).sum()) + 1]
            assert token in kept.tolist()
            expected = math.log(p[token] / p[kept].sum())
            assert row.sampling_logprobs[step] == pytest.approx(expected, abs=2e-5)


def test_draws_follow_the_distribution(model: Any):
    """400 samples of one token: every frequency within 4.5 standard errors of its probability."""
    rows = made(model, [PROMPTS[0]], do_sample=True, n_samples=400, max_new_tokens=1, batch_tokens=4096, eos=False)
    p = next_logprobs(model, PROMPTS[0])[-1].exp().numpy()
    counts = np.bincount([row.ids[0] for row in rows], minlength=len(p))
    assert (counts > 0).sum() > 5
    assert (np.abs(counts / 400 - p) <= 4.5 * np.sqrt(p * (1 - p) / 400) + 1 / 400).all()


def test_a_draw_is_decided_by_seed_prompt_sample_and_position():
    """Where all 96 tokens are equally probable, a number u in [0, 1) draws token 96 u, rounded down."""
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    rows = made(model, [[5, 6]] * 3, do_sample=True, n_samples=2, seed=11, eos=False)
    for row in rows:
        u = np.random.default_rng(np.random.SeedSequence([11, row.prompt, row.sample])).random(NEW)
        assert list(row.ids) == (96 * u).astype(int).tolist()


def test_inversion_takes_the_interval_and_never_the_impossible():
    p = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]], dtype=torch.float64)
    draws = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert invert(p.expand(6, -1), draws).squeeze(1).tolist() == [1, 1, 3, 3, 4, 4]
    assert invert(3 * p, draws[-1:]).item() == 4  # whatever the sum


def test_greedy_has_no_sampling_logprobs(model: Any):
    rows = made(model)
    assert not rows.sampled
    assert {row.sampling_logprobs for row in rows} == {None}
    assert set(rows.token_columns()) == {"generated"}


# --- text -----------------------------------------------------------------------------------------------------------

BEGINNINGS = ["Once upon a time", "Lily went to the park and", "The dog was sad because his", "One day"]


def test_stories_are_readable_and_join_their_prompts(stories: Any):
    rows = generate(stories, BEGINNINGS, max_new_tokens=40, progress=False)
    for row, prompt in zip(rows, BEGINNINGS, strict=True):
        assert row.prompt_text == f"<s> {prompt}"
        whole = stories.tokenizer.decode(list(row.input_ids), skip_special_tokens=True)
        assert whole == prompt + row.text
    assert rows[0].text.startswith(", there was a little girl named Lily.")


def test_chat_wraps_the_prompt_in_the_template(stories: Any):
    import copy

    tokenizer = copy.deepcopy(stories.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}Q {{ m.content }}{% endfor %} A"
    rows = generate(stories, ["Who?"], tokenizer=tokenizer, chat=True, max_new_tokens=3, progress=False)
    assert list(rows[0].prompt_ids) == tokenizer("Q Who? A", add_special_tokens=False)["input_ids"]
    assert rows[0].prompt_text == "Q Who? A"
    with_bos = generate(stories, ["Who?"], tokenizer=tokenizer, chat=True, bos=True, max_new_tokens=3, progress=False)
    assert with_bos[0].prompt_ids == (1, *rows[0].prompt_ids)


def test_a_stop_string_ends_the_text_with_the_token_that_completes_it(stories: Any):
    free = generate(stories, BEGINNINGS, max_new_tokens=40, progress=False)
    rows = generate(stories, BEGINNINGS, max_new_tokens=40, stop_strings=[" Lily", "very hap"], progress=False)
    assert "stop" in {row.finish for row in rows}
    for row, whole in zip(rows, free, strict=True):
        cut = next(
            (n for n in range(1, 41) if any(s in text_of(stories, whole, n) for s in (" Lily", "very hap"))), None
        )
        assert row.ids == whole.ids[:cut]
        assert row.finish == ("length" if cut is None else "stop")
        assert row.text == text_of(stories, whole, cut or 40)


def text_of(stories: Any, row: Generation, new: int) -> str:
    ids = list(row.prompt_ids + row.ids[:new])
    whole = stories.tokenizer.decode(ids, skip_special_tokens=True)
    return whole[len(row.prompt_text.removeprefix("<s> ")) :]


def test_a_character_of_several_tokens_at_the_border(stories: Any):
    tokenizer = stories.tokenizer
    ids = tokenizer("ö", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1  # byte tokens
    assert _decoding.continuation(
        tokenizer, ids[:1], [*ids[1:], *tokenizer("x", add_special_tokens=False)["input_ids"]]
    )


# --- as data --------------------------------------------------------------------------------------------------------


def test_label_columns_are_repeated_for_each_sample(model: Any):
    data = [{"input_ids": ids, "who": f"ä{i}", "score": None if i == 1 else i / 7} for i, ids in enumerate(PROMPTS)]
    rows = made(model, data, do_sample=True, n_samples=2)
    assert rows.columns["who"] == [f"ä{i // 2}" for i in range(2 * len(PROMPTS))]
    assert math.isnan(rows.columns["score"][2]) and rows.columns["score"][-1] == 8 / 7
    frame = rows.to_df()
    assert list(frame.loc[frame.prompt == 3, "who"]) == ["ä3", "ä3"]
    for row, ids, marks in zip(rows, frame.input_ids, frame.generated, strict=True):
        assert tuple(ids) == row.prompt_ids + row.ids
        assert marks == [False] * len(row.prompt_ids) + [True] * len(row.ids)
    only = made(model, data, columns=["who"])
    assert set(only.columns) == {"who"}
    assert [row.input_ids[span] for row, span in zip(rows, rows.spans("generated"), strict=True)] == [
        r.ids for r in rows
    ]
    assert rows[2].input_ids[rows.spans("prompt")[2]] == rows[2].prompt_ids


@pytest.mark.parametrize("sampled", [False, True])
def test_saved_and_loaded_are_equal(model: Any, sampled: bool, tmp_path: Path):
    data = [{"input_ids": ids, "who": f"ä{i}", "good": i % 2 == 0, "x": i / 3} for i, ids in enumerate(PROMPTS)]
    rows = made(model, data, do_sample=sampled, out=tmp_path / "folder")
    rows.save(tmp_path / "rows.jsonl")
    assert Generations.load(tmp_path / "rows.jsonl") == rows
    assert Generations.load(tmp_path / "folder") == rows
    assert all(json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines())


def test_repr_and_html_are_escaped():
    row = Generation(0, 0, (3,), (4, 5), "length", "<b>x", "a & b")
    rows = Generations((row,) * 12)
    assert "12 of 1 prompts, 24 generated tokens; ended: 12 by length" in repr(rows)
    assert (
        "&lt;b&gt;x" in rows._repr_html_() and "a &amp; b" in rows._repr_html_() and "and 2 more" in rows._repr_html_()
    )


# --- interrupted ----------------------------------------------------------------------------------------------------


def sampled(model: Any, out: Path | None = None, **settings: Any) -> Generations:
    return made(model, do_sample=True, n_samples=2, out=out, **settings)


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 6, 9, 20])
def test_killed_at_a_step_of_a_commit_and_resumed_equals_uninterrupted(model: Any, step: int, tmp_path: Path):
    whole, out = sampled(model, tmp_path / "whole"), tmp_path / "killed"

    def work() -> None:
        seen = 0

        def counted(real: Any) -> Any:
            def call(*args: Any) -> Any:
                nonlocal seen
                seen += 1
                if seen == step:
                    die()
                return real(*args)

            return call

        store.fsync = counted(store.fsync)
        Path.replace = counted(Path.replace)  # type: ignore[method-assign]
        sampled(model, out)

    assert in_child(work) == -signal.SIGKILL
    if (out / "manifest.json").exists():
        with pytest.raises(UnfinishedCacheError, match="batches"):
            Generations.load(out)
    assert sampled(model, out) == whole
    files = [{p.name: p.read_bytes() for p in folder.glob("*.jsonl")} for folder in (out, tmp_path / "whole")]
    assert files[0] == files[1] and len(files[0]) > 3
    assert not list(out.glob(".*.partial"))


def test_an_interrupted_run_says_how_to_go_on(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = Plan.run

    def stopped(plan: Plan, number: int) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return real(plan, number)

    monkeypatch.setattr(Plan, "run", stopped)
    with pytest.raises(KeyboardInterrupt) as caught:
        sampled(model, tmp_path / "g")
    assert caught.value.__notes__[0].startswith("2 of ")
    assert len(list((tmp_path / "g").glob("batch-*.jsonl"))) == 2


def test_a_finished_run_is_returned_without_the_model(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = sampled(model, tmp_path / "g")
    monkeypatch.setattr(_decoding, "_run", None)
    assert sampled(model, tmp_path / "g") == rows
    with pytest.raises(CacheError, match="resume=False"):
        sampled(model, tmp_path / "g", resume=False)


def test_another_run_is_refused_with_what_differs(model: Any, tmp_path: Path):
    sampled(model, tmp_path / "g", seed=1)
    with pytest.raises(CacheMismatchError, match=r"setting seed \(1 there, 2 asked for\)"):
        sampled(model, tmp_path / "g", seed=2)
    with pytest.raises(CacheMismatchError, match="model weights"):
        sampled(tiny("llama", seed=1), tmp_path / "g", seed=1)
    with pytest.raises(CacheMismatchError, match="token ids of the prompts"):
        made(model, PROMPTS[:3], do_sample=True, n_samples=2, out=tmp_path / "g", seed=1)
    with pytest.raises(CacheMismatchError, match="batch_tokens"):
        sampled(model, tmp_path / "g", seed=1, batch_tokens=41)


def test_a_run_that_had_generated_nothing_is_no_hindrance(model: Any, tmp_path: Path):
    sampled(model, tmp_path / "g", seed=1)
    for batch in (tmp_path / "g").glob("batch-*"):
        batch.unlink()
    assert sampled(model, tmp_path / "g", seed=2) == sampled(model, seed=2)


def test_altered_files_are_refused(model: Any, tmp_path: Path):
    sampled(model, tmp_path / "g")
    batch = tmp_path / "g" / "batch-00001.jsonl"
    kept = batch.read_bytes()
    for broken in (kept[:-1], kept.replace(b'"sample": 0', b'"sample": 7', 1), b"", b"[]\n"):
        batch.write_bytes(broken)
        with pytest.raises(CorruptCacheError, match="batch-00001"):
            sampled(model, tmp_path / "g")
    batch.write_bytes((tmp_path / "g" / "batch-00000.jsonl").read_bytes())  # an exchanged file
    with pytest.raises(CorruptCacheError, match="batch-00001"):
        Generations.load(tmp_path / "g")
    batch.write_bytes(kept)
    head = tmp_path / "g" / "manifest.json"
    text = head.read_text()
    for broken in (text[:-9], "{}", text.replace('"setting seed": 0', '"setting seed": 3')):
        head.write_text(broken)
        with pytest.raises(CorruptCacheError):
            Generations.load(tmp_path / "g")


def test_a_second_writer_and_foreign_folders_are_refused(model: Any, tmp_path: Path):
    (tmp_path / "held").mkdir()
    with store.writer_lock(tmp_path / "held"), pytest.raises(CacheLockedError):
        sampled(model, tmp_path / "held")
    (tmp_path / "held" / "notes.txt").write_text("mine")
    with pytest.raises(CacheError, match=r"notes\.txt"):
        sampled(model, tmp_path / "held")
    with pytest.raises(CacheError, match="is a file"):
        sampled(model, tmp_path / "held" / "notes.txt")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("mine")
    with pytest.raises(CacheError, match=r"notes\.txt"):
        sampled(model, tmp_path / "theirs")
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["notes.txt"]  # not even a lock


def test_other_versions_are_said_before_going_on(model: Any, tmp_path: Path):
    sampled(model, tmp_path / "g")
    manifest = _generations.read_head(tmp_path / "g")
    _generations.write_head(tmp_path / "g", {**manifest, "libraries": {**manifest["libraries"], "torch": "0.1"}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampled(model, tmp_path / "g")  # nothing is still to come
    (tmp_path / "g" / "batch-00002.jsonl").unlink()
    with pytest.warns(UserWarning, match="another torch"):
        sampled(model, tmp_path / "g")


# --- by several processes -------------------------------------------------------------------------------------------


def batches_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("batch-*.jsonl")}


def test_ranks_share_the_batches_and_the_result_is_that_of_one(model: Any, tmp_path: Path):
    sampled(model, tmp_path / "whole")
    ran = tmp_path / "ran"

    def work() -> None:
        real = Plan.run

        def noted(plan: Plan, number: int) -> Any:
            with ran.open("a") as file:
                file.write(f"{torch.distributed.get_rank()} {number}\n")
            return real(plan, number)

        Plan.run = noted  # type: ignore[method-assign]
        assert sampled(model, tmp_path / "shared") == Generations.load(tmp_path / "whole")

    assert run_ranks(tmp_path, [work, work]) == ["ok", "ok"]
    assert batches_in(tmp_path / "shared") == batches_in(tmp_path / "whole")
    count = len(batches_in(tmp_path / "whole"))
    assert sorted(ran.read_text().splitlines()) == sorted(f"{number % 2} {number}" for number in range(count))
    assert run_ranks(tmp_path, [work, work]) == ["ok", "ok"]  # finished: nobody runs anything
    assert len(ran.read_text().splitlines()) == count


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_ends_all_and_any_number_goes_on(model: Any, victim: int, tmp_path: Path):
    sampled(model, tmp_path / "whole")

    def killed() -> None:
        Plan.run = lambda *_: die()  # type: ignore[method-assign]
        sampled(model, tmp_path / "shared")

    works = [lambda: sampled(model, tmp_path / "shared")] * 2
    works[victim] = killed
    outcomes = run_ranks(tmp_path, works)
    assert outcomes[victim] == "signal 9"
    assert outcomes[1 - victim].startswith(f"ParallelError: rank {victim} of 2 failed: its process is gone")
    sampled(model, tmp_path / "shared")
    assert batches_in(tmp_path / "shared") == batches_in(tmp_path / "whole")


def test_ranks_that_ask_for_different_things_are_refused(model: Any, tmp_path: Path):
    works = [lambda: sampled(model, tmp_path / "g"), lambda: sampled(model, tmp_path / "g", seed=4)]
    for outcome in run_ranks(tmp_path, works):
        assert outcome.startswith("CacheMismatchError")
        assert "setting seed (0 there, 4 asked for)" in outcome
    works[1] = lambda: sampled(model, tmp_path / "g", max_new_tokens=0)
    outcomes = run_ranks(tmp_path, works, limit=20)
    assert all(outcome.startswith("DataError") for outcome in outcomes), outcomes


# --- refused --------------------------------------------------------------------------------------------------------


def test_a_prompt_that_fills_the_context_is_refused_by_number(model: Any):
    prompts = [[5] * 3, [5] * 58, [5] * 64]  # the context is 64
    message = r"prompt 1 has 58 tokens; with max_new_tokens=7 that makes 65, and 64 .* at most 6 new"
    with pytest.raises(DataError, match=message):
        made(model, prompts)
    assert len(made(model, prompts[:2], max_new_tokens=6, eos=False)[1].ids) == 6
    with pytest.raises(DataError, match=r"prompt 0 has 3 tokens.*5 are allowed"):
        made(model, [[5] * 3], max_length=5)
    with pytest.raises(DataError, match="max_length"):
        made(model, max_length=65)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of 1"),
        ({"n_samples": 0, "do_sample": True}, "n_samples"),
        ({"batch_tokens": 0}, "batch_tokens"),
        ({"seed": -1}, "seed"),
        ({"top_k": -1}, "top_k"),
        ({"temperature": 0.0, "do_sample": True}, "temperature must be above 0"),
        ({"temperature": math.nan, "do_sample": True}, "temperature"),
        ({"top_p": 0.0, "do_sample": True}, "top_p"),
        ({"top_p": 1.1, "do_sample": True}, "top_p"),
        ({"temperature": 0.5}, "no effect on greedy"),
        ({"n_samples": 2}, "n_samples would have no effect"),
        ({"eos": 96}, "eos"),
        ({"eos": ["</s>"]}, "eos"),
        ({"stop_strings": "."}, "need a tokenizer"),
        ({"stop_strings": [""]}, "not empty"),
        ({"columns": ["nothing"]}, "no column 'nothing'"),
        ({"chat": True}, "token ids"),
    ],
)
def test_bad_settings_are_refused(model: Any, settings: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        made(model, **settings)


@pytest.mark.parametrize("prompts", [[], [""], [[]], [[1], []], [[96]], [{"input_ids": [3], "sample": 1}]])
def test_bad_prompts_are_refused(model: Any, prompts: Any):
    with pytest.raises(DataError):
        made(model, prompts)


def test_a_column_that_no_cache_can_hold_is_said(model: Any):
    data = [{"input_ids": [3, 4], "mixed": 1}, {"input_ids": [4], "mixed": "x"}]
    with pytest.warns(UserWarning, match="mixed"):
        assert made(model, data).columns == {}


def test_broken_weights_and_models_that_cannot_generate():
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(NumericsError, match="NaN"):
        made(model)
    with pytest.raises(NumericsError, match="NaN"):
        made(model, do_sample=True)
    with pytest.raises(ModelError):
        made(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    "line", ["{}", "[1]", '{"prompt": 0, "sample": 0, "prompt_ids": [1], "ids": [], "finish": "eos"}']
)
def test_files_that_hold_no_generations(line: str, tmp_path: Path):
    (tmp_path / "x.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match="line 1"):
        Generations.load(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_text("")
    with pytest.raises(DataError, match="no generation"):
        Generations.load(tmp_path / "x.jsonl")
    with pytest.raises(CacheError, match="no generations"):
        Generations.load(tmp_path / "nothing")
    with pytest.raises(CacheError, match="no generations"):
        Generations.load(tmp_path)
