"""Directories that SAELens itself wrote, imported and held against a capture of the same tokens."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Array2D, Dataset, Features, Sequence, Value

import activations_cache as ac
from activations_cache import conformance, store
from activations_cache._import import import_saelens
from activations_cache._join import join
from activations_cache.errors import CacheError, CacheMismatchError, DataError, NumericsError, SiteError

SITE, WIDTH, LENGTH, CONTEXTS = "blocks.1.hook_resid_post", 16, 8, 24


def model() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_positions": 32, "n_embd": WIDTH, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, bos_token_id=0, eos_token_id=0, **sizes)).eval()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the real runner wrote of a tiny checkpoint, and the token ids; do not change it."""
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    place = tmp_path_factory.mktemp("saelens")
    model().save_pretrained(place / "model")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w0").save_pretrained(place / "model")
    ids = np.random.default_rng(0).integers(1, 50, (CONTEXTS, LENGTH)).tolist()
    config = CacheActivationsRunnerConfig(
        dataset_path="ids",
        model_name=str(place / "model"),
        model_class_name="AutoModelForCausalLM",
        model_batch_size=4,
        hook_name="transformer.h.1",
        d_in=WIDTH,
        training_tokens=CONTEXTS * LENGTH,
        context_size=LENGTH,
        new_cached_activations_path=str(place / "acts"),
        shuffle=False,
        dtype="float32",
        device="cpu",
        prepend_bos=False,
        streaming=False,
        buffer_size_gb=8 * LENGTH * WIDTH * 4 / 1e9,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        CacheActivationsRunner(config, override_dataset=Dataset.from_dict({"input_ids": ids})).run()
    return place / "acts", ids


def imported(written: Any, out: Path, **settings: Any) -> Any:
    return import_saelens(written[0], out, **{"shard_rows": 50, "progress": False, **settings})


def test_an_import_equals_a_capture_of_the_same_tokens(written: Any, tmp_path: Path):
    made = imported(written, tmp_path / "acts", site=SITE, model=model())
    own = ac.capture(model(), written[1], [SITE, "blocks.0.hook_resid_post"], tmp_path / "own", progress=False)
    assert conformance.failures(made.path) == []
    assert made.verify() == []
    assert made.finished
    assert len(made.manifest["shards"]) == 4
    np.testing.assert_allclose(made[SITE][:].numpy(), own[SITE][:].numpy(), atol=1e-5)
    for name in ("sequence", "position", "token"):
        assert made.rows[name].tolist() == own.rows[name].tolist()
    plain = made[SITE][:].double()
    torch.testing.assert_close(made.stats[SITE].mean, plain.mean(0))
    torch.testing.assert_close(made.stats[SITE].var, plain.var(0, correction=0))
    assert made.spec(SITE).aliases == own.spec(SITE).aliases
    assert made.model == own.model
    assert join(made, own).sites == (SITE, "blocks.0.hook_resid_post")


def test_without_a_model_its_facts_are_unknown(written: Any, tmp_path: Path):
    made = imported(written, tmp_path / "acts", dtype="bfloat16")
    assert made.sites == ("transformer.h.1",)
    assert made.manifest["sites"][0]["layer"] == 1
    assert (made.model.name, made.model.weights_hash) == ("unknown", "unknown")
    assert made["transformer.h.1"].dtype == torch.bfloat16
    assert conformance.failures(made.path) == []
    values = np.array(Dataset.load_from_disk(str(written[0]))["transformer.h.1"][:])
    expected = torch.tensor(values.reshape(-1, WIDTH)).to(torch.bfloat16)
    assert torch.equal(made["transformer.h.1"][:], expected)
    assert made.sequence(5).input_ids.tolist() == written[1][5]
    assert "unknown" in made.info()


def test_an_interrupted_import_goes_on(written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = imported(written, tmp_path / "whole")
    plain, left = store.write_shard, [2]

    def failing(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return plain(*arguments, **named)

    monkeypatch.setattr(store, "write_shard", failing)
    with pytest.raises(CacheError, match="No space left on device"):
        imported(written, tmp_path / "acts")
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="unfinished"):
        assert len(ac.open(tmp_path / "acts")) == 96
    made = imported(written, tmp_path / "acts")
    files = [entry["file"] for entry in whole.manifest["shards"]] + ["index.h5"]
    assert all((made.path / name).read_bytes() == (whole.path / name).read_bytes() for name in files)
    assert imported(written, tmp_path / "acts").manifest == made.manifest


def test_another_model_or_site_is_refused_before_anything_is_written(written: Any, tmp_path: Path):
    other = model()
    torch.nn.init.normal_(other.transformer.h[1].mlp.c_proj.weight)
    for settings, error, message in (
        ({"site": SITE, "model": other}, CacheMismatchError, "the first context differs by"),
        ({"site": "blocks.0.hook_resid_post", "model": model()}, CacheMismatchError, "another site"),
        ({"site": "blocks.1.mlp.hook_post", "model": model()}, CacheMismatchError, "rows of 16"),
        ({"model": model()}, SiteError, "as site="),
        ({"site": "a/b"}, DataError, "cannot be named"),
        ({"dtype": "int32"}, DataError, "cannot be stored as int32"),
        ({"shard_rows": 0}, DataError, "shard_rows"),
    ):
        with pytest.raises(error, match=message):
            imported(written, tmp_path / "acts", **settings)
    assert not (tmp_path / "acts").exists()


def test_a_directory_in_use_is_left_as_it_is(written: Any, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x.txt").write_text("mine")
    with pytest.raises(CacheError, match=r"is not empty \(x.txt\) and holds no cache"):
        imported(written, tmp_path / "mine")
    imported(written, tmp_path / "acts")
    with pytest.raises(CacheMismatchError, match=r"holds another capture.*setting dtype"):
        imported(written, tmp_path / "acts", dtype="float16")


def dataset(values: np.ndarray, ids: Any, name: str = "hook", dtype: str = "float32") -> Dataset:
    features = Features({name: Array2D(values.shape[1:], dtype), "token_ids": Sequence(Value("int32"))})
    return Dataset.from_dict({name: values.tolist(), "token_ids": ids}, features=features)


def test_directories_that_saelens_did_not_write_are_refused(written: Any, tmp_path: Path):
    values, ids = np.zeros((3, 4, 2)), [[1, 2, 3, 4]] * 3
    dataset(values, ids).save_to_disk(tmp_path / "good")
    Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "texts")
    dataset(values, ids).remove_columns("token_ids").save_to_disk(tmp_path / "no ids")
    dataset(values, ids).add_column("x", [1, 2, 3]).save_to_disk(tmp_path / "more")
    dataset(values, ids).select([]).save_to_disk(tmp_path / "empty")
    dataset(values, [[1, 2, 3]] * 3).save_to_disk(tmp_path / "short")
    shutil.copytree(tmp_path / "good", tmp_path / "cut")
    (tmp_path / "cut" / "data-00000-of-00001.arrow").write_bytes(b"x")
    shutil.copytree(tmp_path / "good", tmp_path / "json")
    (tmp_path / "json" / "state.json").write_text(json.dumps([]))
    (tmp_path / "none").mkdir()
    for name, message in {
        "nowhere": "no Hugging Face dataset",
        "none": "no Hugging Face dataset",
        "texts": "columns text",
        "no ids": r"columns hook \(Array2D\); a directory",
        "more": "x",
        "empty": "has 0 rows|cannot be read",
        "short": "do not have 4 token ids each",
        "cut": "cannot be read as a Hugging Face dataset",
        "json": "cannot be read as a Hugging Face dataset",
    }.items():
        with pytest.raises(DataError, match=message):
            import_saelens(tmp_path / name, tmp_path / "out", progress=False)
    assert len(import_saelens(tmp_path / "good", tmp_path / "out", progress=False)) == 12


def test_values_that_cannot_be_stored_are_refused(tmp_path: Path):
    values = np.zeros((3, 4, 2))
    values[1, 2, 0] = 1e6
    dataset(values, [[1, 2, 3, 4]] * 3).save_to_disk(tmp_path / "large")
    with pytest.raises(NumericsError, match="contexts 0 to 2: there is a value that float16 cannot hold"):
        import_saelens(tmp_path / "large", tmp_path / "a", dtype="float16", progress=False)
    values[1, 2, 0] = np.nan
    dataset(values, [[1, 2, 3, 4]] * 3).save_to_disk(tmp_path / "nan")
    with pytest.raises(NumericsError, match="a value that is not finite"):
        import_saelens(tmp_path / "nan", tmp_path / "b", progress=False)
