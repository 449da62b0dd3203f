"""Models that accelerate has spread or offloaded: the same hash, the same input device, the same cache to the byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from activations_cache import _device, hashing
from activations_cache.errors import ModelError
from activations_cache.store import read_manifest
from tests.activations_cache.caches import contents, labelled_rows, small
from tests.activations_cache.test_hashing import build

SITES = ["blocks.*.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.0.attn.hook_z"]
SPLIT = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk"}
SPLIT |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
KINDS = ["auto", "split", "disk", "cpu_offload"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint per family, with random norms and biases."""
    made = {}
    for name, extra in (("llama", {}), ("tied", {"tie_word_embeddings": True}), ("mixtral", {})):
        made[name] = tmp_path_factory.mktemp(name)
        build("llama" if name == "tied" else name, **extra).save_pretrained(made[name])
    return made


def loaded(path: Path, kind: str, scratch: Path, **settings: Any) -> Any:
    """The checkpoint, loaded in one of the ways."""
    import accelerate
    from transformers import AutoModelForCausalLM

    def load(**how: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, **settings, **how).eval()

    if kind == "plain":
        return load()
    if kind == "auto":
        return load(device_map="auto")
    if kind == "cpu_offload":
        return accelerate.cpu_offload(load())
    return load(device_map=SPLIT if kind == "split" else {"": "disk"}, offload_folder=scratch)


def offloaded(model: Any) -> int:
    return sum(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("name", ["llama", "tied", "mixtral"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_hash_is_that_of_the_checkpoint(name: str, kind: str, saved: dict[str, Path], tmp_path: Path):
    model = loaded(saved[name], kind, tmp_path)
    assert (offloaded(model) > 0) is (kind != "auto")
    expected = hashing.checkpoint_hash(saved[name])
    assert hashing.weights_hash(model) == expected
    model(input_ids=torch.tensor([[3, 1, 4]]))  # every hook has loaded and offloaded once more
    assert hashing.weights_hash(model) == expected


@pytest.mark.parametrize("kind", ["split", "disk"])
def test_the_type_hashed_is_the_one_computed_in(kind: str, saved: dict[str, Path], tmp_path: Path):
    settings = {"dtype": torch.bfloat16}
    model = loaded(saved["llama"], kind, tmp_path, **settings)
    assert hashing.weights_hash(model) == hashing.weights_hash(loaded(saved["llama"], "plain", tmp_path, **settings))
    assert hashing.weights_hash(model) != hashing.checkpoint_hash(saved["llama"])


def test_one_changed_weight_on_disk_changes_the_hash(saved: dict[str, Path], tmp_path: Path):
    model = loaded(saved["llama"], "plain", tmp_path)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "changed")
    moved = loaded(tmp_path / "changed", "split", tmp_path / "scratch")
    assert hashing.weights_hash(moved) == hashing.checkpoint_hash(tmp_path / "changed")
    assert hashing.weights_hash(moved) != hashing.checkpoint_hash(saved["llama"])


def test_reading_holds_one_tensor_at_a_time(saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Offloaded weights are read one by one, as each is asked for: never the model at once."""
    model = loaded(saved["llama"], "disk", tmp_path)
    read: list[str] = []
    real = hashing._present
    monkeypatch.setattr(hashing, "_present", lambda hf, name, tensor: read.append(name) or real(hf, name, tensor))
    stream = hashing.checkpoint_tensors(model)
    assert read == []
    seen = 0
    for _, tensor in stream:
        seen += 1
        assert not tensor.is_meta
        assert len(read) == seen
    assert seen == offloaded(model)


def rows_of(n: int) -> list[dict[str, Any]]:
    """Rows within the vocabulary of these models."""
    return [{**row, "input_ids": [token % 48 for token in row["input_ids"]]} for row in labelled_rows(n)]


@pytest.fixture(scope="module")
def plain(saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The caches of the models loaded as usual."""
    made = {name: tmp_path_factory.mktemp("plain") / name for name in ("llama", "tied", "mixtral")}
    for name, out in made.items():
        small(out, rows_of(7), SITES, loaded(saved[name], "plain", out))
    return made


@pytest.mark.parametrize("name", ["llama", "tied", "mixtral"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_capture_is_that_of_the_plain_model(
    name: str, kind: str, saved: dict[str, Path], plain: dict[str, Path], tmp_path: Path
):
    cache = small(tmp_path / "acts", rows_of(7), SITES, loaded(saved[name], kind, tmp_path / "scratch"))
    assert contents(tmp_path / "acts") == contents(plain[name])
    expected = read_manifest(plain[name])
    assert cache.manifest["identity"] == expected["identity"]
    assert cache.manifest["machine"] == expected["machine"]


def test_weights_are_offloaded_again_after_a_capture(saved: dict[str, Path], tmp_path: Path):
    model = loaded(saved["llama"], "split", tmp_path / "scratch")
    before = offloaded(model)
    small(tmp_path / "acts", rows_of(5), SITES, model)
    assert offloaded(model) == before


# -------------------------------------------------------------------- the input device


@pytest.mark.parametrize("kind", ["plain", *KINDS])
def test_the_input_goes_where_the_embedding_runs(kind: str, saved: dict[str, Path], tmp_path: Path):
    assert _device.input_device(loaded(saved["tied"], kind, tmp_path)) == torch.device("cpu")


def test_the_execution_device_of_the_embedding_counts_before_the_root(saved: dict[str, Path], tmp_path: Path):
    model = loaded(saved["llama"], "split", tmp_path)
    model._hf_hook.execution_device = "meta"
    assert _device.input_device(model) == torch.device("cpu")
    model.get_input_embeddings()._hf_hook.execution_device = 3
    assert _device.input_device(model).index == 3


def test_a_model_without_weights_is_refused():
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(build("llama").config)
    with pytest.raises(ModelError, match="no hook of accelerate says where they run"):
        _device.input_device(model)
    with pytest.raises(ModelError, match=r"meta device .* cannot be read"):
        hashing.weights_hash(model)


def test_a_dispatched_model_cannot_be_moved(saved: dict[str, Path], tmp_path: Path):
    for kind in ("split", "disk", "cpu_offload"):
        with pytest.raises(ModelError, match=r"its weights are spread already .*Leave out `device`"):
            _device.move(loaded(saved["llama"], kind, tmp_path), "cpu")
    plain = loaded(saved["llama"], "plain", tmp_path)
    _device.move(plain, "cpu")
    assert next(plain.parameters()).device.type == "cpu"


def test_a_device_cannot_be_asked_for_in_a_capture_either(saved: dict[str, Path], tmp_path: Path):
    with pytest.raises(ModelError, match="Leave out `device`"):
        small(tmp_path / "acts", rows_of(5), SITES, loaded(saved["llama"], "split", tmp_path / "scratch"), device="cpu")
    assert not (tmp_path / "acts").exists()


def test_edits_still_refuse_offloaded_weights(saved: dict[str, Path], tmp_path: Path):
    """Only reading is offered: what maps weights in order to write them says that they are elsewhere."""
    with pytest.raises(ModelError, match=r"meta device \(model\.layers\.1\..*Load it fully first"):
        hashing.CheckpointMap(loaded(saved["llama"], "split", tmp_path))
