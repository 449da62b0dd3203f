"""Capture over Ray Data, on a cluster of this machine alone: the bytes of `capture`, whatever fails."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import activations_cache as ac
from activations_cache import _ray, conformance, store
from activations_cache.errors import CacheError, CacheMismatchError, DataError, ModelError, NumericsError, ParallelError
from tests.activations_cache.caches import RESID, contents, labelled_rows, llama, small, token_rows
from tests.activations_cache.ranks import rich_rows
from tests.conftest import ROOT

SETTINGS: dict[str, Any] = {"batch_tokens": 24, "shard_rows": 20, "progress": False}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Equal bytes need an equal number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray on this machine, without a dashboard. Ray's own local mode is gone; this is what it calls local."""
    ray = pytest.importorskip("ray", reason='needs the extra "ray"')
    memory = {"object_store_memory": 80 * 2**20, "_memory": 2**30}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", **memory)
    yield
    ray.shutdown()


def over_ray(out: Path, data: Any = None, model: Any = llama, sites: Any = RESID, **settings: Any) -> ac.Cache:
    data = labelled_rows() if data is None else data
    return ac.capture_ray(model, data, sites, out, **{"concurrency": 1, **SETTINGS, **settings})


def check_equal(out: Path, whole: Path) -> None:
    assert contents(out) == contents(whole)
    made, expected = store.read_manifest(out), store.read_manifest(whole)
    for manifest in (made, expected):
        del manifest["created"], manifest["digest"]
    assert made == expected
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    assert conformance.failures(out) == []


def not_finite() -> Any:
    """The model with a weight that only some sequences meet."""
    model = copy.deepcopy(llama())
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    return model


@pytest.mark.slow
def test_a_capture_begun_alone_and_gone_on_with_over_ray_is_the_same(cluster: None, tmp_path: Path):
    """One run for both: actors take seconds to start."""
    whole, out = tmp_path / "whole", tmp_path / "acts"
    small(whole)
    shards = store.read_manifest(whole)["shards"]
    assert len(shards) >= 3
    with pytest.raises(KeyboardInterrupt):
        stop_after(2, lambda: small(out))
    assert len(store.read_manifest(out)["shards"]) == 2
    cache = over_ray(out)
    assert cache.finished and len(cache) == len(ac.open(whole))
    check_equal(out, whole)
    assert over_ray(out).finished  # nothing left to run: no actor is started


def stop_after(shards: int, work: Any) -> None:
    """Interrupt a capture once its manifest names so many shards."""
    real = store.write_manifest
    holders = [
        m for name, m in sys.modules.items() if name.startswith("activations_cache") and hasattr(m, real.__name__)
    ]

    def interrupted(directory: Path, manifest: Any) -> None:
        real(directory, manifest)
        if len(manifest["shards"]) == shards:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        for module in holders:
            if module.__dict__.get(real.__name__) is real:
                patch.setattr(module, real.__name__, interrupted)
        work()


@pytest.mark.slow
def test_two_actors_of_a_saved_checkpoint(cluster: None, tmp_path: Path):
    """A saved checkpoint by its path, from nothing, in whatever order two actors finish."""
    whole, out, folder = tmp_path / "whole", tmp_path / "acts", tmp_path / "model"
    llama().save_pretrained(folder)
    from transformers import AutoModelForCausalLM

    rows = labelled_rows(30)
    small(whole, rows, model=AutoModelForCausalLM.from_pretrained(folder))
    over_ray(out, rows, folder, concurrency=2)
    check_equal(out, whole)


@pytest.mark.slow
def test_an_actors_error_is_the_packages_own_and_what_was_committed_stays(cluster: None, tmp_path: Path):
    out = tmp_path / "acts"
    rows = [[3, 4, 5, 6]] * 30 + [[7, 8]]
    with pytest.raises(NumericsError, match=r"^a Ray actor on .*: blocks\.0\.hook_resid_pre is NaN in sequence 30"):
        over_ray(out, rows, not_finite, "blocks.0.hook_resid_pre")
    with pytest.warns(UserWarning, match="unfinished"):
        cache = ac.open(out)
    assert cache.verify() == []
    assert conformance.failures(out) == []


@pytest.mark.slow
def test_an_actor_with_another_model_is_refused(cluster: None, tmp_path: Path):
    driver = os.getpid()

    def another() -> Any:
        model = copy.deepcopy(llama())
        if os.getpid() != driver:
            with torch.no_grad():
                model.model.norm.weight[0] += 1
        return model

    with pytest.raises(CacheMismatchError, match=r"is not the driver's \(different: weights_hash\)"):
        over_ray(tmp_path / "acts", model=another)
    assert store.read_manifest(tmp_path / "acts")["shards"] == []


@pytest.mark.slow
def test_an_actor_that_dies_is_an_error_of_ours(cluster: None, tmp_path: Path):
    driver = os.getpid()

    def fatal() -> Any:
        if os.getpid() != driver:
            os.kill(os.getpid(), 9)
        return llama()

    with pytest.raises(ParallelError, match="Ray could not run the capture"):
        over_ray(tmp_path / "acts", model=fatal)


# -------------------------------------------------------------------- without a cluster


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Actors in this process, given what they would be sent, which finish in the reverse order."""
    from ray import cloudpickle

    def results(ray: Any, job: Any, model: Any, device: Any, numbers: list[int], workers: Any) -> Iterator[Any]:
        fetch, maker = cloudpickle.loads(cloudpickle.dumps((partial(_given, _ray._portable(job)), model)))
        actor = _ray._Actor(fetch, maker, device)
        for number in reversed(numbers):
            sent = actor({"shard": np.array([number])})
            yield from _ray._entries(json.loads(sent["message"][0]))

    monkeypatch.setattr(_ray, "_results", results)


def _given(job: Any) -> Any:
    return job


@pytest.mark.parametrize("settings", [{}, {"positions": "mask", "token_columns": ["weight"], "logprobs": True}])
def test_what_actors_are_sent_is_enough_for_the_same_bytes(here: None, settings: dict[str, Any], tmp_path: Path):
    whole, out = tmp_path / "whole", tmp_path / "acts"
    small(whole, rich_rows(), **settings)
    over_ray(out, rich_rows(), **settings)
    check_equal(out, whole)


def test_data_in_a_temporary_file_reach_the_actors(here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from activations_cache import _spool

    whole, out = tmp_path / "whole", tmp_path / "acts"
    small(whole, rich_rows(), token_columns=["weight"])
    monkeypatch.setattr(_spool, "SPOOL_BYTES", 16)
    over_ray(out, rich_rows(), token_columns=["weight"])
    check_equal(out, whole)


def test_texts_are_read_by_the_tokenizer_beside_the_model(here: None, tmp_path: Path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "one": 1, "two": 2, "three": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    folder, texts = tmp_path / "model", ["one two", "three", "two two four one"]
    llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    small(tmp_path / "whole", texts, model=model, tokenizer=tokenizer)
    cache = over_ray(tmp_path / "acts", texts, str(folder))
    assert contents(tmp_path / "acts") == contents(tmp_path / "whole")
    assert cache.manifest["tokenizer"]["hash"] == store.read_manifest(tmp_path / "whole")["tokenizer"]["hash"]


def test_an_error_in_an_actor_is_raised_as_what_it_is(here: None, tmp_path: Path):
    rows = [[3, 4, 5, 6]] * 20 + [[7, 8]]
    with pytest.raises(NumericsError, match=r"^a Ray actor on .*: blocks\.0\.hook_resid_pre is NaN in sequence 20"):
        over_ray(tmp_path / "acts", rows, not_finite, "blocks.0.hook_resid_pre")
    again = over_ray(tmp_path / "acts", rows[:20], sites="blocks.0.hook_resid_pre")  # nothing was committed: reused
    assert again.finished


def test_a_model_that_changes_between_loads_is_refused(here: None, tmp_path: Path):
    def other_each_time() -> Any:
        model = copy.deepcopy(llama())
        with torch.no_grad():
            model.model.norm.weight[0] += torch.rand(())
        return model

    with pytest.raises(CacheMismatchError, match=r"is not the driver's \(different: weights_hash\)"):
        over_ray(tmp_path / "acts", model=other_each_time)


def test_wrong_requests_are_refused_before_anything_starts(tmp_path: Path):
    import ray

    before = ray.is_initialized()
    with pytest.raises(DataError, match="or a function that loads it, since each actor loads its own; got LlamaFor"):
        over_ray(tmp_path / "acts", model=llama())
    with pytest.raises(DataError, match="concurrency must be at least 1; got 0"):
        over_ray(tmp_path / "acts", concurrency=0)
    with pytest.raises(DataError, match=r"batch_token: no setting of capture; it has .*batch_tokens"):
        over_ray(tmp_path / "acts", batch_token=3)
    with pytest.raises(ModelError, match="no model can be loaded from"):
        over_ray(tmp_path / "acts", model=tmp_path / "nowhere")
    small(tmp_path / "acts")
    with pytest.raises(CacheMismatchError, match="token ids of the data"):
        over_ray(tmp_path / "acts", token_rows(5))
    with pytest.raises(CacheError, match="resume=False"):
        over_ray(tmp_path / "acts", resume=False)
    assert ray.is_initialized() is before


def test_a_finished_cache_is_returned_without_an_actor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small(tmp_path / "acts")
    monkeypatch.setattr(_ray, "_results", lambda *_: 1 / 0)
    assert over_ray(tmp_path / "acts").finished


def test_without_ray_the_error_says_what_to_install(tmp_path: Path):
    code = """
import sys
sys.modules["ray"] = None
import activations_cache as ac
try:
    ac.capture_ray("model", [[3]], "blocks.0.hook_resid_post", "out")
except ac.errors.ActivationsCacheError as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.stdout.startswith("ParallelError capture_ray needs Ray")
    assert 'pip install "ray[data]"' in done.stdout
    assert not (tmp_path / "out").exists()
