"""Activations of generated text: held against hooks on the decoding itself, killed in both phases, refused early."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

import activations_cache as ac
from activations_cache import _decoding, store
from activations_cache.errors import CacheError, CacheMismatchError, DataError, SiteError
from tests.activations_cache.caches import by_hand, contents, die, in_child, token_rows
from tests.activations_cache.ranks import run_ranks
from tests.architectures import tiny

PROMPTS = token_rows(9, seed=3)
NEW = 7
SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Forked children cannot use OpenMP's threads, and equal bytes need an equal number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


def caught(model: Any, out: Path, prompts: Any = None, sites: Any = SITE, **settings: Any) -> ac.Cache:
    settings = {"max_new_tokens": NEW, "batch_tokens": 40, "shard_rows": 30, "progress": False, **settings}
    return ac.capture_generation(model, PROMPTS if prompts is None else prompts, sites, out, **settings)


def while_decoding(model: Any, block: Any, ids: list[int]) -> tuple[list[int], torch.Tensor]:
    """transformers' greedy decoding of one prompt with its key-value cache: all tokens, and what a hook saw."""
    seen: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[0].clone())

    handle = block.register_forward_hook(keep)
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=2, pad_token_id=0, use_cache=True)
    try:
        out = model.generate(torch.tensor([ids]), generation_config=settings)[0].tolist()
    finally:
        handle.remove()
    assert [len(rows) for rows in seen] == [len(ids)] + [1] * (len(out) - len(ids) - 1)  # the cache was used
    return out, torch.cat(seen)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "gemma3", "mixtral"])
def test_rows_are_those_of_the_decoding_itself(architecture: str, tmp_path: Path):
    model = tiny(architecture)
    blocks = next(m for n, m in model.named_modules() if n in ("model.layers", "transformer.h", "gpt_neox.layers"))
    cache = caught(model, tmp_path / "acts", eos=2)
    ends = np.cumsum(cache.sequences["length"])
    for number, ids in enumerate(PROMPTS):
        whole, seen = while_decoding(model, blocks[1], ids)
        assert cache.sequences["input_ids"][number].tolist() == whole
        rows = cache[SITE][int(ends[number] - len(whole)) : int(ends[number])]
        assert len(seen) == len(whole) - 1  # decoding never reads its last token
        torch.testing.assert_close(rows[:-1], seen, atol=1e-5, rtol=1e-5)


def test_every_row_and_logprob_is_that_of_a_plain_forward(model: Any, tmp_path: Path):
    cache = caught(model, tmp_path / "acts", do_sample=True, temperature=0.7, n_samples=2)
    texts = ac.Generations.load(tmp_path / "acts")
    whole = [list(row.input_ids) for row in texts]
    torch.testing.assert_close(cache[SITE][:], torch.cat(by_hand(model, whole, 1)), atol=1e-5, rtol=1e-5)
    expected = []
    for ids in whole:
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        expected += [math.nan, *logprobs[range(len(ids) - 1), ids[1:]].tolist()]
    np.testing.assert_allclose(cache.rows["logprob"], expected, atol=2e-5)
    generated = np.concatenate([row.generated for row in texts])
    assert (np.asarray(cache.rows["generated"], bool) == generated).all()
    drawn = cache.rows["sampling_logprob"]
    assert (np.isnan(drawn) == ~generated).all()
    assert np.abs(drawn - cache.rows["logprob"])[generated].max() > 0.01  # temperature 0.7 is another distribution


def test_at_temperature_one_both_logprobs_agree(model: Any, tmp_path: Path):
    """Decoding with a cache and the capture's forward compute the same distribution."""
    cache = caught(model, tmp_path / "acts", do_sample=True)
    generated = np.asarray(cache.rows["generated"], bool)
    difference = (cache.rows["sampling_logprob"] - cache.rows["logprob"])[generated]
    assert np.abs(difference).max() < 2e-5


def test_labels_say_which_prompt_and_sample(model: Any, tmp_path: Path):
    data = [{"input_ids": ids, "who": f"ä{i}"} for i, ids in enumerate(PROMPTS)]
    cache = caught(model, tmp_path / "acts", data, do_sample=True, n_samples=2)
    assert list(cache.sequences["who"]) == [f"ä{i // 2}" for i in range(18)]
    assert list(cache.sequences["prompt"]) == [i // 2 for i in range(18)]
    assert list(cache.sequences["sample"]) == [0, 1] * 9
    assert list(cache.sequences["prompt_tokens"]) == [len(PROMPTS[i // 2]) for i in range(18)]
    assert set(cache.sequences["finish"]) <= {"eos", "length"}
    assert ac.conformance.failures(tmp_path / "acts") == []
    assert cache.verify() == []


def test_positions_and_pooling(model: Any, tmp_path: Path):
    whole = caught(model, tmp_path / "all")
    marks = np.asarray(whole.rows["generated"], bool)
    last = np.append(np.diff(whole.rows["sequence"]) != 0, True)
    rows = whole[SITE][:]
    for positions, kept in (("generated", marks), ("prompt", ~marks), ("last", last)):
        cache = caught(model, tmp_path / positions, positions=positions)
        # fewer rows make other shards, and so other batches
        torch.testing.assert_close(cache[SITE][:], rows[torch.from_numpy(kept)], atol=1e-5, rtol=1e-5)
        for name in ("position", "logprob", "generated"):
            np.testing.assert_allclose(cache.rows[name], whole.rows[name][kept], atol=2e-5)
        assert cache.sequences["length"].tolist() == whole.sequences["length"].tolist()
    pooled = caught(model, tmp_path / "pooled", positions="generated", pool="mean")
    sequence = whole.rows["sequence"]
    means = [rows[torch.from_numpy(marks & (sequence == number))].mean(0) for number in range(len(PROMPTS))]
    torch.testing.assert_close(pooled[SITE][:], torch.stack(means), atol=1e-5, rtol=1e-5)


def test_generations_are_data_for_a_capture(model: Any, tmp_path: Path):
    rows = ac.generate(model, PROMPTS, max_new_tokens=NEW, batch_tokens=40, progress=False)
    settings = {"batch_tokens": 40, "shard_rows": 30, "progress": False, "token_columns": ["generated"]}
    cache = ac.capture(model, rows, SITE, tmp_path / "later", **settings)
    both = caught(model, tmp_path / "both")
    assert torch.equal(cache[SITE][:], both[SITE][:])
    assert (cache.rows["generated"] == both.rows["generated"]).all()
    assert list(cache.sequences["finish"]) == list(both.sequences["finish"])


# --- interrupted ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "acts"
    caught(model, out, do_sample=True, n_samples=2)
    return out


def texts(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (directory / "generations").glob("*.jsonl")}


def kill_at(model: Any, out: Path, step: int) -> int:
    def work() -> None:
        seen = 0

        def counted(*args: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == step:
                die()
            return real(*args)

        real, Path.replace = Path.replace, counted  # type: ignore[method-assign,assignment]
        caught(model, out, do_sample=True, n_samples=2)

    return in_child(work)


def test_killed_in_either_phase_and_resumed_has_the_same_bytes(model: Any, whole: Path, tmp_path: Path):
    """At renames spread over both phases: the folder's manifest, its batches, then the cache's manifest and shards."""
    batches, shards = len(texts(whole)), len(contents(whole)) - 1
    assert batches > 3 and shards > 3
    steps = [1, 2, batches, batches + 1, batches + 2, batches + 3, batches + 6]
    for step in steps:
        out = tmp_path / f"killed-{step}"
        assert kill_at(model, out, step) == -signal.SIGKILL
        assert not ((out / "manifest.json").exists() and step <= batches)  # the phases follow each other
        cache = caught(model, out, do_sample=True, n_samples=2)
        assert cache.finished
        assert (contents(out), texts(out)) == (contents(whole), texts(whole))


def test_a_finished_one_is_returned_without_the_model(model: Any, whole: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_decoding, "_run", None)
    monkeypatch.setattr(type(model), "forward", None)
    assert caught(model, whole, do_sample=True, n_samples=2).finished
    with pytest.raises(CacheError, match="resume=False"):
        caught(model, whole, do_sample=True, n_samples=2, resume=False)


def test_another_one_is_refused(model: Any, whole: Path):
    with pytest.raises(CacheMismatchError, match="setting temperature"):
        caught(model, whole, do_sample=True, n_samples=2, temperature=0.5)
    with pytest.raises(CacheMismatchError, match="sites"):
        caught(model, whole, sites="blocks.0.hook_resid_post", do_sample=True, n_samples=2)
    with pytest.raises(CacheMismatchError, match="positions"):
        caught(model, whole, do_sample=True, n_samples=2, positions="generated")


def test_ranks_give_the_bytes_of_one_process(model: Any, whole: Path, tmp_path: Path):
    out = tmp_path / "acts"

    def work() -> None:
        assert caught(model, out, do_sample=True, n_samples=2).finished

    assert run_ranks(tmp_path, [work, work]) == ["ok", "ok"]
    assert (contents(out), texts(out)) == (contents(whole), texts(whole))


# --- refused before anything is generated ---------------------------------------------------------------------------


def test_what_a_capture_would_refuse_is_found_first(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_decoding, "_run", None)  # generating anything at all would fail on this
    out = tmp_path / "acts"
    with pytest.raises(SiteError, match="resid_pots"):
        caught(model, out, sites="blocks.0.hook_resid_pots")
    with pytest.raises(SiteError, match="no row per token"):
        caught(model, out, sites="blocks.0.attn.hook_pattern")
    with pytest.raises(DataError, match="positions must be"):
        caught(model, out, positions="answer")
    for wrong in ({"columns": "ab"}, {"shard_rows": 8.0}, {"max_length": True}, {"batch_tokens": True}):
        with pytest.raises(DataError, match=f"{next(iter(wrong))} must be"):
            caught(model, out, **wrong)
    with pytest.raises(DataError, match="columns must be a list of names; got the text 'ab'"):
        ac.generate(model, [[3]], columns="ab")
    with pytest.raises(DataError, match="max_length must be an integer"):
        ac.generate(model, [[3]], max_length=9.5)
    with pytest.raises(DataError, match="overflow"):
        caught(model, out, overflow="split")
    with pytest.raises(DataError, match="max_new_tokens"):
        caught(model, out, max_new_tokens=0)
    with pytest.raises(DataError, match="'position'"):
        caught(model, out, [{"input_ids": [3], "position": 1}])
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(CacheError, match=r"notes\.txt"):
        caught(model, out)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    with pytest.raises(CacheError, match="is a file"):
        caught(model, out / "notes.txt")
    with pytest.raises(TypeError, match="shard_row"):
        caught(model, tmp_path / "new", shard_row=3)


def test_a_second_writer_is_refused(model: Any, tmp_path: Path):
    (tmp_path / "acts" / "generations").mkdir(parents=True)
    with store.writer_lock(tmp_path / "acts" / "generations"), pytest.raises(ac.errors.CacheLockedError):
        caught(model, tmp_path / "acts")
