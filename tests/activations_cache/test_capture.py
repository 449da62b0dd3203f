"""What a capture stores, held against a plain hook loop, and what it refuses."""

from __future__ import annotations

import copy
import re
import resource
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import activations_cache as ac
from activations_cache import _capture, _forward, _pipeline, conformance, sites, store
from activations_cache._forward import batch_moments
from activations_cache.errors import (
    CacheError,
    CacheMismatchError,
    CorruptCacheError,
    DataError,
    ModelError,
    NumericsError,
    SiteError,
)
from tests.activations_cache.caches import RESID, by_hand, contents, in_child, labelled_rows, llama, small, token_rows
from tests.architectures import tiny

SITE = "blocks.1.hook_resid_post"


# --- content --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_content_equals_a_plain_hook_loop(dtype: str, tmp_path: Path):
    rows = token_rows()
    cache = small(tmp_path / "acts", rows, dtype=dtype)
    assert len(cache.manifest["shards"]) > 2
    assert conformance.failures(cache.path) == []
    for layer in (0, 1):
        expected = torch.cat(by_hand(llama(), rows, layer))
        stored = cache[f"blocks.{layer}.hook_resid_post"][:]
        assert stored.dtype == getattr(torch, dtype)
        one_unit = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}[dtype]  # padding changes the last bit
        torch.testing.assert_close(stored.float(), expected, rtol=one_unit, atol=one_unit)


def test_plain_h5py_reads_the_same(tmp_path: Path):
    rows = labelled_rows()
    cache = small(tmp_path / "acts", rows, dtype="bfloat16")
    with h5py.File(cache.path / "index.h5") as index:
        assert np.array_equal(index["sites"][SITE][:], cache[SITE][:].float().numpy())
        starts = index["sequences/offsets"][:]
        for number, row in enumerate(rows):
            assert index["sequences/input_ids"][starts[number] : starts[number + 1]].tolist() == row["input_ids"]
        assert index["sequences/author"].asstr()[:].tolist() == [row["author"] for row in rows]
        assert index["sequences/toxic"][:].tolist() == [int(row["toxic"]) for row in rows]
        assert index["sequences/score"][:].tolist() == [row["score"] for row in rows]


def test_last_positions_are_the_last_of_all(tmp_path: Path):
    every, last = small(tmp_path / "all"), small(tmp_path / "last", positions="last")
    is_last = every.rows["position"] == every.sequences["length"][every.rows["sequence"]] - 1
    assert len(last) == 13
    assert conformance.failures(last.path) == []
    assert torch.allclose(last[SITE][:], every[SITE][is_last], atol=1e-5)
    assert list(last.rows["token"]) == [row["input_ids"][-1] for row in labelled_rows()]
    assert list(last.labels("author")) == [row["author"] for row in labelled_rows()]


def test_an_alias_is_stored_once_and_read_by_either_name(tmp_path: Path):
    cache = small(tmp_path / "acts", sites=["blocks.0.hook_out", "blocks.0.hook_resid_post"])
    assert cache.sites == ("blocks.0.hook_resid_post",)
    assert torch.equal(cache["blocks.0.hook_out"][:5], cache["blocks.0.hook_resid_post"][:5])


def test_heads_keep_their_shape(tmp_path: Path):
    rows = token_rows()
    cache = small(tmp_path / "acts", rows, sites="blocks.0.attn.hook_z")
    mask = torch.ones(1, len(rows[2]), dtype=torch.long)
    inputs = {"input_ids": torch.tensor([rows[2]]), "attention_mask": mask}
    expected = sites.run(llama(), inputs, read="blocks.0.attn.hook_z").values["blocks.0.attn.hook_z"][0]
    stored = cache["blocks.0.attn.hook_z"][cache.rows["sequence"] == 2]
    assert stored.shape == (len(rows[2]), 4, 12)
    torch.testing.assert_close(stored, expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_router_sites_of_a_mixture_of_experts(architecture: str, tmp_path: Path):
    model = tiny(architecture)
    names = [f"blocks.0.mlp.hook_{name}" for name in ("router_logits", "expert_indices", "expert_weights")]
    cache = small(tmp_path / "acts", token_rows(), names, model)
    logits, chosen, weights = (cache[name][:] for name in names)
    assert chosen.dtype == torch.int16
    assert logits.shape[1:] == (4,)
    assert weights.shape == chosen.shape == (len(cache), 2)
    top = logits.topk(2, dim=1).indices
    assert torch.equal(top.sort(1).values, chosen.long().sort(1).values)
    assert conformance.failures(cache.path) == []
    with h5py.File(cache.path / "index.h5") as index:
        assert index["sites"][names[1]].fillvalue == -1


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "gemma3", "qwen3_moe"])
def test_other_architectures(architecture: str, tmp_path: Path):
    model, rows = tiny(architecture), token_rows(5)
    cache = small(tmp_path / "acts", rows, ["*.hook_resid_post", "ln_final.hook_normalized"], model)
    inputs = {"input_ids": torch.tensor([rows[3]]), "attention_mask": torch.ones(1, len(rows[3]), dtype=torch.long)}
    with torch.no_grad():
        expected = sites.run(model, inputs, read=list(cache.sites)).values
    for name in cache.sites:
        stored = cache[name][cache.rows["sequence"] == 3]
        torch.testing.assert_close(stored, expected[name][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_by_default_nothing_is_lost(dtype: torch.dtype, tmp_path: Path):
    model, rows = tiny("llama", dtype=dtype), [[5, 6, 7]] * 4
    cache = small(tmp_path / "acts", rows, model=model)
    inputs = {"input_ids": torch.tensor(rows), "attention_mask": torch.ones(4, 3, dtype=torch.long)}
    with torch.no_grad():
        expected = sites.run(model, inputs, read=SITE).values[SITE]
    assert cache[SITE][:].dtype == dtype
    assert torch.equal(cache[SITE][:].reshape(4, 3, -1), expected)
    assert cache.model.dtype == str(dtype).removeprefix("torch.")


def test_a_wrapped_model_brings_its_name(tmp_path: Path):
    cache = small(tmp_path / "acts", model=SimpleNamespace(hf=llama(), tokenizer=None, name="my llama"))
    assert cache.model.name == "my llama"
    assert "my llama" in cache.info()


def test_the_forward_stops_after_the_last_site(tmp_path: Path):
    model = copy.deepcopy(llama())
    calls = []
    model.model.layers[1].register_forward_hook(lambda *_: calls.append("block 1"))
    model.lm_head.register_forward_hook(lambda *_: calls.append("head"))
    small(tmp_path / "acts", sites="blocks.0.hook_resid_post", model=model)
    assert calls == []


def test_the_model_is_left_as_it_was(tmp_path: Path):
    model = copy.deepcopy(llama()).train()
    small(tmp_path / "acts", model=model)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in llama().state_dict().items())


def test_each_module_gets_its_own_mode_back(tmp_path: Path):
    model = copy.deepcopy(llama()).train()
    model.model.layers[0].eval()
    model.model.norm.training = False
    before = {name: module.training for name, module in model.named_modules()}
    small(tmp_path / "acts", model=model)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert len(set(before.values())) == 2


def test_the_model_may_change_its_tensor_in_place_afterwards(tmp_path: Path):
    model = copy.deepcopy(llama())
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _m, _i, out: (out[0] if isinstance(out, tuple) else out).mul_(1.0))
    rows = [[5, 6, 7]] * 8  # equal lengths: no padding is cut out, nothing is copied by that
    expected = small(tmp_path / "a", rows)[SITE][:]
    cache = small(tmp_path / "b", rows, model=model)
    assert torch.equal(cache[SITE][:], expected)


def test_statistics_are_of_the_stored_rows(tmp_path: Path):
    cache = small(tmp_path / "acts", dtype="float16")
    values = cache[SITE][:].double()
    found = cache.stats[SITE]
    assert found.count == len(cache)
    torch.testing.assert_close(found.mean, values.mean(0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.var, values.var(0, unbiased=False), rtol=1e-5, atol=1e-8)
    assert found.norm == pytest.approx(float(values.norm(dim=1).mean()), rel=1e-6)


@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1.0), (1e4, 1e-1), (0.0, 1e25)])
def test_moments_hold_where_naive_sums_would_not(offset: float, scale: float):
    rows = torch.randn(3000, 3, generator=torch.Generator().manual_seed(0)) * scale + offset
    merged = store.Moments.empty((3,))
    for part in rows.split([1000, 1, 1999]):
        merged.add(batch_moments(part))
    exact = rows.double()
    np.testing.assert_allclose(merged.mean, exact.mean(0), rtol=1e-7, atol=1e-7 * scale)
    np.testing.assert_allclose(merged.m2 / 3000, exact.var(0, unbiased=False), rtol=1e-5)
    assert merged.norm_sum / 3000 == pytest.approx(float(exact.norm(dim=1).mean()), rel=1e-5)


def test_real_checkpoint_and_stories(shared_data: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = shared_data / "stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    stories = ac.read_documents(shared_data / "corpora" / "tinystories_1000.json").texts or []
    with pytest.warns(UserWarning, match="6 of 6 documents were cut to 64 tokens"):
        cache = ac.capture(
            model, stories[:6], RESID, tmp_path / "acts", tokenizer=tokenizer, bos=True, max_length=64, progress=False
        )
    assert cache.manifest["data"]["truncated"] == 6
    assert "6 documents truncated" in cache.info()
    tokens = ac.tokenize(tokenizer, stories[:6], 64, bos=True).input_ids
    assert [list(ids) for ids in cache.sequences["input_ids"]] == tokens
    expected = torch.cat(by_hand(model, tokens, 4))
    torch.testing.assert_close(cache["blocks.4.hook_resid_post"][:], expected, rtol=1e-4, atol=1e-4)
    assert tokenizer.decode(cache.tokens(70)[:8], skip_special_tokens=True).strip() in stories[1]


# --- resume and refuse ----------------------------------------------------------------------------------------------


def forbid_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was run")

    monkeypatch.setattr(_forward.Forward, "run", forward)


def test_a_finished_cache_is_returned_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = small(tmp_path / "acts")
    before = contents(first.path), (first.path / "manifest.json").read_bytes()
    forbid_forward(monkeypatch)
    again = small(tmp_path / "acts")
    assert torch.equal(again[SITE][:], first[SITE][:])
    assert before == (contents(first.path), (first.path / "manifest.json").read_bytes())


def changed_model() -> Any:
    model = copy.deepcopy(llama())
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] += 1
    return model


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda: {"model": changed_model()}, "model weights"),
        (lambda: {"model": tiny("qwen2")}, "model configuration"),
        (lambda: {"data": labelled_rows(12)}, "token ids of the data"),
        (lambda: {"data": [{**row, "n": 0} for row in labelled_rows()]}, "label columns"),
        (lambda: {"columns": ["n"]}, "label columns"),
        (lambda: {"sites": SITE}, r"sites \(.*2? ?blocks.0.hook_resid_post float32"),
        (lambda: {"dtype": "float16"}, r"setting dtype \('float32' in the cache, 'float16' asked for\)"),
        (lambda: {"positions": "last"}, "setting positions"),
        (lambda: {"batch_tokens": 25}, r"setting batch_tokens \(24 in the cache, 25 asked for\)"),
        (lambda: {"shard_rows": 21}, "setting shard_rows"),
        (lambda: {"max_length": 40}, "setting max_length"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_capture_is_refused_by_name(
    change: Callable[[], dict[str, Any]], named: str, finished: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "acts"
    interrupted_capture(out, monkeypatch) if not finished else small(out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(CacheMismatchError, match=named):
        small(out, **change())
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def interrupted_capture(
    out: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] = KeyboardInterrupt
) -> None:
    """Capture until the fifth batch, which raises."""
    real, seen = _forward.Forward.run, []

    def run(self: Any, batch: Any) -> Any:
        seen.append(batch)
        if len(seen) == 5:
            raise error
        return real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(_forward.Forward, "run", run)
        with pytest.raises(error) as caught:
            small(out)
    assert "shards are committed" in "".join(caught.value.__notes__)
    assert "resume=True" in "".join(caught.value.__notes__)


def test_ctrl_c_leaves_a_cache_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    interrupted_capture(tmp_path / "acts", monkeypatch)
    with pytest.warns(UserWarning, match="unfinished"):
        held = len(ac.open(tmp_path / "acts"))
    assert 0 < held < 90
    small(tmp_path / "acts")
    small(tmp_path / "straight")
    assert contents(tmp_path / "acts") == contents(tmp_path / "straight")


def test_a_cache_that_holds_nothing_yet_gives_way(tmp_path: Path):
    data, model = labelled_rows(), copy.deepcopy(llama())
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e6)
    with pytest.raises(NumericsError):
        small(tmp_path / "acts", data, model=model, dtype="float16")
    assert small(tmp_path / "acts", data, model=model, dtype="bfloat16").finished


def test_resume_false_refuses_and_deletes_nothing(tmp_path: Path):
    first = small(tmp_path / "acts")
    before = contents(first.path)
    with pytest.raises(CacheError, match="resume=False: nothing is overwritten"):
        small(tmp_path / "acts", resume=False)
    assert contents(first.path) == before
    assert small(tmp_path / "new", resume=False).finished


def test_directories_that_are_no_cache_are_left_alone(tmp_path: Path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("precious")
    with pytest.raises(CacheError, match=r"not empty \(thesis.tex\)"):
        small(tmp_path / "notes")
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["thesis.tex"]
    with pytest.raises(CacheError, match="is a file"):
        small(tmp_path / "notes" / "thesis.tex")


def test_a_damaged_cache_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    interrupted_capture(tmp_path / "acts", monkeypatch)
    with (tmp_path / "acts" / "shard-00000.h5").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CorruptCacheError, match=r"shard-00000.h5 has 1000 bytes.*sequences 0 to"):
        small(tmp_path / "acts")


def flip(path: Path, dataset: str) -> None:
    """Turn over one bit of a shard's dataset in place."""
    with h5py.File(path) as file:
        found = file[dataset]
        offset = found.id.get_offset() + found.id.get_storage_size() // 2
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("dataset", [f"sites/{SITE}", "sequences/input_ids", f"statistics/{SITE}/mean"])
@pytest.mark.parametrize("finished", [True, False])
def test_an_altered_byte_is_found_before_a_cache_is_gone_on_with(
    dataset: str, finished: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "acts"
    small(out) if finished else interrupted_capture(out, monkeypatch)
    flip(out / "shard-00000.h5", dataset)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    forbid_forward(monkeypatch)
    with pytest.raises(CorruptCacheError, match=r"shard-00000.h5 has altered bytes.*repair it"):
        small(out)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert len(ac.open(out)) > 0  # opening looks at sizes alone
        assert [problem.kind for problem in ac.open(out).verify()] == ["altered"]


def test_a_resume_under_another_version_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    interrupted_capture(tmp_path / "acts", monkeypatch)
    manifest = store.read_manifest(tmp_path / "acts")
    manifest["libraries"]["torch"] = "1.0"
    store.write_manifest(tmp_path / "acts", manifest)
    with pytest.warns(UserWarning, match="begun with another torch"):
        assert small(tmp_path / "acts").finished


# --- bad input and bad luck -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"data": [[5] * 65], "overflow": "error"}, DataError, "row 0 has 65 tokens, 64 are allowed"),
        ({"data": [[5, 96]]}, DataError, "row 0 holds token id 96; the model's vocabulary ends at 95"),
        ({"data": []}, DataError, "no document"),
        ({"data": ["text"]}, DataError, "texts need a tokenizer"),
        ({"max_length": 65}, DataError, "max_length=65 is more than the context of this model, 64"),
        ({"batch_tokens": 0}, DataError, "batch_tokens must be at least 1"),
        ({"shard_rows": 0}, DataError, "shard_rows must be at least 1"),
        ({"positions": "first"}, DataError, "positions must be one of all, last, answer, mask"),
        ({"dtype": "int8"}, DataError, "dtype must be one of float16, bfloat16, float32"),
        ({"columns": ["absent"]}, DataError, "no column 'absent'"),
        ({"sites": "blocks.7.hook_resid_post"}, SiteError, "blocks.7"),
        ({"sites": "blocks.0.hook_resid_pots"}, SiteError, "blocks.0.hook_resid_post"),
        ({"sites": "blocks.0.attn.hook_pattern"}, SiteError, "has no row per token and cannot be cached"),
        ({"sites": "*.attn.hook_pattern"}, SiteError, "fits only sites that have no row per token"),
        ({"sites": ["hook_embed", "*hook_pattern"]}, SiteError, "'[*]hook_pattern' fits only sites that have no row"),
        ({"sites": ["*", "blocks.0.attn.hook_pattern"]}, SiteError, "has no row per token and cannot be cached"),
        ({"columns": "ab"}, DataError, "columns must be a list of names; got the text 'ab'"),
        ({"batch_tokens": None}, DataError, "batch_tokens must be an integer; got None"),
        ({"device": "nope"}, ModelError, "the model cannot be moved to device='nope'"),
        ({"model": torch.nn.Linear(2, 2)}, ModelError, "Hugging Face model"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_written(
    settings: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
):
    with pytest.raises(error, match=message):
        small(tmp_path / "acts", **settings)
    assert not (tmp_path / "acts").exists()


@pytest.mark.parametrize("name", ["batch_tokens", "shard_rows", "n_tokens", "max_length"])
@pytest.mark.parametrize("value", [True, 8.0, "8", [8], 0, -1])
def test_settings_that_count_something_are_integers(name: str, value: Any, tmp_path: Path):
    with pytest.raises(DataError, match=rf"{name} must be (an integer|at least 1); got {re.escape(repr(value))}"):
        small(tmp_path / "acts", **{name: value})
    assert not (tmp_path / "acts").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(ModelError, match="the model cannot be moved to device='cuda'"):
        small(tmp_path / "acts", device="cuda")
    assert not (tmp_path / "acts").exists()


@pytest.mark.parametrize("pattern", ["*", "blocks.0.*"])
def test_a_pattern_passes_over_sites_without_rows(pattern: str, tmp_path: Path):
    fits = sites.Sites(llama()).resolve(pattern)
    assert any(not site.cacheable for site in fits)
    cache = small(tmp_path / "acts", sites=pattern)
    assert list(cache.sites) == [site.name for site in fits if not site.name.endswith("hook_pattern")]
    assert conformance.failures(cache.path) == []


def test_what_utf8_cannot_encode_is_refused_before_anything_is_written(tmp_path: Path):
    for row, message in [
        ({"who": "a\ud800"}, "column 'who': row 1 holds the lone surrogate"),
        ({"a\ud800": 1}, "its name holds the lone surrogate"),
    ]:
        with pytest.raises(DataError, match=message):
            small(tmp_path / "acts", [{"input_ids": [5, 6]}, {"input_ids": [7], **row}])
        assert not (tmp_path / "acts").exists()


def test_a_column_that_would_hide_behind_a_field_of_the_cache_is_refused(tmp_path: Path):
    rows = [{"input_ids": ids, "length": "long" if len(ids) > 6 else "short", "n": 1} for ids in token_rows()]
    with pytest.raises(DataError, match=r"column 'length' has a name .* rename it"):
        small(tmp_path / "acts", rows)
    assert not (tmp_path / "acts").exists()
    cache = small(tmp_path / "acts", rows, columns=["n"])
    assert cache.sequences["length"].tolist() == [len(row["input_ids"]) for row in rows]
    assert "columns length" in cache.info()


def test_columns_that_no_cache_can_hold_are_said(tmp_path: Path):
    rows = [
        {"input_ids": [5, 6], "flag": flag, "a/b": "x", "spans": [1, 2], "good": i}
        for i, flag in enumerate([True, None])
    ]
    with pytest.warns(UserWarning, match=r"columns left out.*'flag': it has missing.*'a/b': its name") as caught:
        cache = small(tmp_path / "acts", rows)
    assert len(caught) == 1
    assert "spans" not in str(caught[0].message)  # a list is no label by its form
    assert list(cache.labels("good")) == [0, 0, 1, 1]
    assert "left out    columns a/b, flag, spans" in cache.info()
    assert "columns a/b, flag, spans" in cache._repr_html_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "flag" in small(tmp_path / "chosen", rows, columns=["good"]).info()


def test_over_long_documents_are_cut_counted_and_said(tmp_path: Path):
    with pytest.warns(UserWarning, match="1 of 2 documents were cut to 64 tokens"):
        cache = small(tmp_path / "acts", [[5] * 65, [6]])
    assert cache.sequences["length"].tolist() == [64, 1]
    assert cache.manifest["data"]["truncated"] == 1


@pytest.mark.parametrize("positions", ["all", "last"])
def test_nan_and_overflow_name_the_site_and_the_sequence(positions: str, tmp_path: Path):
    rows = [[5, 6], [7, 8, 9], [10], [11, 12]]
    model = copy.deepcopy(llama())
    with torch.no_grad():
        model.model.embed_tokens.weight[12] = float("nan")
    with pytest.raises(NumericsError, match=r"blocks.0.hook_resid_post is NaN in sequence 3"):
        small(tmp_path / "nan", rows, model=model, positions=positions)
    with torch.no_grad():
        model.model.embed_tokens.weight[12] = 3e5
    with pytest.raises(NumericsError, match=r'blocks.0.*in sequence 3, beyond float16\'s 65504.*"bfloat16"'):
        small(tmp_path / "big", rows, model=model, positions=positions, dtype="float16")
    assert small(tmp_path / "ok", rows, model=model, positions=positions, dtype="bfloat16").finished


def test_the_largest_half_float_is_kept(tmp_path: Path):
    model = copy.deepcopy(llama())
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = 65504.0
    cache = small(tmp_path / "acts", [[5]], "hook_embed", model, dtype="float16")
    assert (cache["hook_embed"][:] == 65504.0).all()
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = -65519.0  # rounds to the largest half float, as any value is rounded
    assert (small(tmp_path / "rounded", [[5]], "hook_embed", model, dtype="float16")["hook_embed"][:] == -65504.0).all()
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = -65520.0  # rounds to infinity
    with pytest.raises(NumericsError, match="hook_embed reaches 65520"):
        small(tmp_path / "more", [[5]], "hook_embed", model, dtype="float16")


def test_out_of_memory_says_what_to_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = copy.deepcopy(llama())

    def exhausted(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(model.model.layers[1], "forward", exhausted)
    with pytest.raises(ModelError, match=r"batch of \d+ x \d+ tokens ran out of memory.*batch_tokens below 24"):
        small(tmp_path / "acts", model=model)


def test_an_error_of_the_writing_thread_surfaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(_pipeline, "write_shard", full)
        with pytest.raises(CacheError, match=r"No space left on device.*run the same capture again"):
            small(tmp_path / "acts")
    assert small(tmp_path / "acts").finished


@pytest.mark.parametrize(
    ("error", "free", "named"),
    [
        (OSError("Can't destroy cache (slist already enabled?)"), 100, True),
        (OSError(28, "No space left on device"), 100, True),
        (OSError(28, "No space left on device"), 2**40, False),  # a quota, say: the error itself names it
        (OSError("Can't destroy cache (slist already enabled?)"), 2**40, False),
        (PermissionError(13, "Permission denied"), 100, False),
    ],
)
def test_a_failed_write_names_the_room_that_is_left(
    error: OSError, free: int, named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(_pipeline, "write_shard", fail)
    monkeypatch.setattr(_capture.shutil, "disk_usage", lambda _place: SimpleNamespace(free=free))
    with pytest.raises(CacheError, match="cannot be written") as caught:
        small(tmp_path / "acts", [[5] * 60] * 100, batch_tokens=6000, shard_rows=3000)
    row_bytes = 2 * llama().config.hidden_size * 4  # sites x d_model x float32
    said = (
        f"no room is left on the disk: {free / 2**20:.1f} MiB are free, one shard takes about "
        f"{3000 * row_bytes / 2**20:.1f} MiB and the whole cache {6000 * row_bytes / 2**20:.1f} MiB"
    )
    assert (said in str(caught.value)) == named
    assert str(error) in str(caught.value)


def test_a_full_disk_leaves_a_cache_that_goes_on(tmp_path: Path):
    """A limit on the size of files stands in for the disk: the first and the last shard fit, the second does not."""
    rows, out = [[5]] * 10 + [[5] * 60] + [[6]] * 10, tmp_path / "acts"
    small(tmp_path / "straight", rows, shard_rows=60)
    sizes = [(tmp_path / "straight" / f"shard-0000{i}.h5").stat().st_size for i in range(3)]
    limit = (max(sizes[0], sizes[2]) + sizes[1]) // 2

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(CacheError, match="cannot be written"):
            small(out, rows, shard_rows=60)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    assert in_child(work) == 0
    with pytest.warns(UserWarning, match="unfinished"):
        assert len(ac.open(out)) == 10
    resumed = small(out, rows, shard_rows=60)
    torch.set_num_threads(before)
    assert resumed.finished
    assert len(sizes) == len(resumed.manifest["shards"])
    assert resumed.verify() == []


def test_warnings_are_errors_for_a_plain_capture(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert small(tmp_path / "acts").finished
