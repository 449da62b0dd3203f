"""Export: the directory reloads bit for bit in a fresh process, or is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from activations_cache.hashing import checkpoint_hash, weights_hash
from probe import _export
from probe._export import export
from probe.editing import Edit, project_out, remove_experts
from probe.errors import BaseMismatchError, EditError, ExportError
from probe.models import Model, load
from tests.architectures import checkpoint, inputs


def direction(seed: int = 5) -> torch.Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(seed))


def write_tokenizer(folder) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0", pad_token="w0")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)


@pytest.fixture
def base(tmp_path) -> Model:
    """A tied bfloat16 Gemma 2 with a tokenizer and a generation configuration of its own, loaded from its directory."""
    folder = checkpoint("gemma2", tmp_path / "base", dtype=torch.bfloat16)
    write_tokenizer(folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**generation, "max_new_tokens": 7}))
    return load(folder)


def logits(hf) -> torch.Tensor:
    with torch.no_grad():
        return hf(**inputs(), use_cache=False).logits


def test_untied_bfloat16_export_reloads_bit_for_bit_with_all_that_belongs_to_it(base, tmp_path):
    digest, config = weights_hash(base.hf), base.hf.config.to_dict()
    edit = project_out(base, direction()).with_audit({"verdict": "removed"})
    with edit.applied(base):
        expected, edited = logits(base.hf), weights_hash(base.hf)
    result = export(base, edit, tmp_path / "out")

    assert result.verified
    assert result.weights_hash == edited == checkpoint_hash(result)
    assert weights_hash(base.hf) == digest
    assert base.hf.config.to_dict() == config
    again = load(result)
    assert torch.equal(logits(again.hf), expected)
    assert again.hf.config.tie_word_embeddings is False
    assert again.hf.generation_config.max_new_tokens == 7
    assert again.tokenizer.chat_template == base.tokenizer.chat_template
    assert again.tokenizer("w3 w4")["input_ids"] == [3, 4]
    with Edit.load(result.path).applied(base):
        assert weights_hash(base.hf) == edited
    card = (result / "README.md").read_text()
    assert "project_out" in card
    assert "bit for bit" in card
    assert "removed" in card
    # a process of the test's own, with transformers alone, in another directory
    script = (
        "import sys, torch; from safetensors.torch import load_file;"
        "from transformers import AutoModelForCausalLM as A;"
        "torch.set_num_threads(int(sys.argv[3])); b = load_file(sys.argv[2]); e = b.pop('logits');"
        f"m = A.from_pretrained(sys.argv[1], attn_implementation={base.hf.config._attn_implementation!r}).eval();"
        "o = m(**b, use_cache=False).logits; sys.exit(0 if torch.equal(o, e) else 3)"
    )
    from safetensors.torch import save_file

    save_file({**inputs(), "logits": expected}, tmp_path / "io.safetensors")
    arguments = [str(result), str(tmp_path / "io.safetensors"), str(torch.get_num_threads())]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_pruned_mixture_reloads_bit_for_bit(tmp_path):
    model = load(checkpoint("mixtral", tmp_path))
    pruned = remove_experts(model, [(0, 1), (1, 3)], "prune")
    with pruned.applied(model):
        projected = project_out(model, direction())
        with projected.applied(model):
            expected = logits(model.hf)
    result = export(model, pruned + projected, tmp_path / "out", verify=False)  # another test pays for a process
    again = load(result)
    assert torch.equal(logits(again.hf), expected)
    assert again.hf.config.num_local_experts == 3
    assert again.dims.n_experts == 3
    assert model.dims.n_experts == 4


def test_export_without_an_edit_is_the_model_itself(base, tmp_path):
    result = export(base, None, tmp_path / "out", verify=False)
    assert checkpoint_hash(result) == weights_hash(base.hf)
    assert not (result / "edit.json").exists()
    assert not result.verified
    assert "not checked" in (result / "README.md").read_text()


def test_export_in_another_type_leaves_the_model_in_its_own(base, tmp_path):
    digest = weights_hash(base.hf)
    result = export(base, project_out(base, direction()), tmp_path / "out", dtype="float32", verify=False)
    again = load(result)
    assert again.dtype == torch.float32
    with project_out(base, direction()).applied(base):
        expected = {name: tensor.float() for name, tensor in base.hf.state_dict().items()}
    assert all(torch.equal(expected[name], tensor) for name, tensor in again.hf.state_dict().items())
    assert weights_hash(base.hf) == digest
    with pytest.raises(ExportError, match="floating-point"):
        export(base, None, tmp_path / "other", dtype="int8")


def test_only_weight_edits_are_exported(base, tmp_path):
    class Filter:
        def applied(self, model):
            return model

    with pytest.raises(ExportError, match="filter"):
        export(base, Filter(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_exists_is_kept_unless_asked_for(base, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="overwrite=True"):
        export(base, None, out, verify=False)
    with pytest.raises(ExportError, match="not a model directory"):
        export(base, None, out, verify=False, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    with pytest.raises(ExportError, match="holds the base model"):
        export(base, None, base.name, verify=False, overwrite=True)

    first = export(base, None, tmp_path / "model", verify=False)
    edit = project_out(base, direction())
    second = export(base, edit, tmp_path / "model", verify=False, overwrite=True)
    assert first.weights_hash != second.weights_hash == checkpoint_hash(tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "model", "out"]


def test_an_edit_of_another_model_is_refused_and_nothing_written(base, tmp_path):
    other = load(checkpoint("gemma2", tmp_path / "other", seed=1, dtype=torch.bfloat16))
    with pytest.raises(BaseMismatchError):
        export(base, project_out(other, direction()), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "other"]


def test_a_reload_that_differs_is_an_error_and_nothing_is_left(base, tmp_path, monkeypatch):
    def off_by_one_bit(hf, folder, batch):
        found = _export._logits(hf, batch).clone()
        found.view(torch.int16)[0, 0, 0] ^= 1
        return found

    monkeypatch.setattr(_export, "_reloaded_logits", off_by_one_bit)
    digest = weights_hash(base.hf)
    with pytest.raises(ExportError, match="other logits"):
        export(base, project_out(base, direction()), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert weights_hash(base.hf) == digest
    # the error names a buffer that .to() converted and loading would not
    base.hf.to(torch.float16)
    with pytest.raises(ExportError, match="inv_freq"):
        export(base, None, tmp_path / "out")


def test_weights_that_are_not_saved_as_they_are_stop_the_export(base, tmp_path, monkeypatch):
    honest = type(base.hf).save_pretrained

    def careless(self, folder, **settings):
        with torch.no_grad():
            self.model.norm.weight.add_(1.0)
            honest(self, folder, **settings)
            self.model.norm.weight.sub_(1.0)

    monkeypatch.setattr(type(base.hf), "save_pretrained", careless)
    with pytest.raises(ExportError, match="not those in memory"):
        export(base, None, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_full_disk_leaves_what_was_there(base, tmp_path, monkeypatch):
    earlier = export(base, None, tmp_path / "out", verify=False)

    def full(self, folder, **settings):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(base.hf), "save_pretrained", full)
    with pytest.raises(ExportError, match="No space left"):
        export(base, project_out(base, direction()), tmp_path / "out", overwrite=True)
    assert checkpoint_hash(tmp_path / "out") == earlier.weights_hash
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_a_directory_that_does_not_load_is_reported_in_one_line(base, tmp_path, monkeypatch):
    def fails(command, **settings):
        return subprocess.CompletedProcess(
            command, 1, "", "Traceback (most recent call last):\nOSError: no weights here"
        )

    monkeypatch.setattr(_export.subprocess, "run", fails)
    with pytest.raises(ExportError, match="does not load in a fresh process: OSError: no weights here"):
        export(base, None, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_generation_config_that_contradicts_itself_is_an_export_error(base, tmp_path):
    base.hf.generation_config.temperature = 0.5  # without do_sample: transformers refuses to save it
    try:
        with pytest.raises(ExportError, match="refuses to save"):
            export(base, None, tmp_path / "out")
    finally:
        base.hf.generation_config.temperature = None
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_result_is_a_path(base, tmp_path):
    result = export(base, None, tmp_path / "deep" / "out", verify=False)
    assert os.fspath(result) == str(result) == str(tmp_path / "deep" / "out")
    assert "not checked" in result._repr_html_()


def test_exporting_no_model_is_an_error(tmp_path):
    with pytest.raises(EditError, match="Hugging Face model"):
        export("name", None, tmp_path / "out")
