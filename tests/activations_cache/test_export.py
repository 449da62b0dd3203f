"""Exports, read back by numpy and by safetensors."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import load_file

from activations_cache import _export
from activations_cache.errors import CacheError, DataError, NumericsError, SiteError
from probe.cli import main
from tests.activations_cache.handmade import as_float, random_content, write

SITE, EXPERTS = "blocks.0.hook_a", "blocks.0.mlp.hook_expert_indices"


@pytest.fixture(autouse=True)
def blocks_of_two_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_export, "BLOCK_BYTES", 24)


def made(path: Path, dtype: str = "float32") -> tuple[Any, Any]:
    content = random_content(seed=2, dtype=dtype)
    return write(path / "acts", content), content


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("asked", [None, "float32", torch.float64])
def test_both_formats_hold_the_values(dtype: str, asked: Any, tmp_path: Path):
    cache, content = made(tmp_path, dtype)
    values = as_float(content.sites[SITE][0], dtype)
    path = cache.export(SITE + ".alias", tmp_path / "x.safetensors", asked, progress=False)
    tensor = load_file(path)[SITE]
    assert tensor.dtype == (asked if isinstance(asked, torch.dtype) else getattr(torch, asked or dtype))
    np.testing.assert_array_equal(tensor.double().numpy(), values)
    if asked is None and dtype == "bfloat16":
        return
    array = np.load(cache.export(SITE, tmp_path / "x.npy", asked, progress=False))
    assert array.dtype == str(tensor.dtype).removeprefix("torch.")
    np.testing.assert_array_equal(array.astype(float), values)


def test_integers_views_and_chosen_rows(tmp_path: Path):
    cache, content = made(tmp_path)
    values = content.sites[EXPERTS][0]
    np.testing.assert_array_equal(np.load(cache.export(EXPERTS, tmp_path / "i.npy", progress=False)), values)
    rows = [5, 0, -1, 5]
    found = np.load(cache.export(SITE, tmp_path / "r.npy", rows=rows, progress=False))
    np.testing.assert_array_equal(found, content.sites[SITE][0][rows])
    found = np.load(cache.export(SITE, tmp_path / "s.npy", rows=slice(3, 30, 4), progress=False))
    np.testing.assert_array_equal(found, content.sites[SITE][0][3:30:4])
    view = cache.where(toxic=True)
    found = load_file(view.export(EXPERTS, tmp_path / "v.safetensors", "int64", progress=False))[EXPERTS]
    assert found.dtype == torch.int64
    np.testing.assert_array_equal(found.numpy(), values[view.row_numbers])
    assert np.load(cache.export(SITE, tmp_path / "none.npy", rows=[], progress=False)).shape == (0, 3)


def test_the_metadata_name_model_and_cache(tmp_path: Path):
    cache, _ = made(tmp_path)
    with safetensors.safe_open(cache.export(SITE, tmp_path / "x.safetensors", progress=False), "pt") as file:
        metadata = file.metadata()
    assert metadata["site"] == SITE
    assert metadata["weights_hash"] == cache.model.weights_hash
    assert metadata["cache"] == json.loads((cache.path / "manifest.json").read_text())["identity"]


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(tmp_path: Path):
    cache, content = made(tmp_path, "bfloat16")
    content.sites[SITE][0][-1] = np.array([1e30], "<f4").view("<u4") >> 16
    huge = write(tmp_path / "huge", content)
    (tmp_path / "there.npy").write_text("mine")
    (tmp_path / "folder.npy").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    refusals: list[tuple[Any, tuple[Any, ...], Any, str]] = [
        (cache, (SITE, "x.npy"), DataError, 'numpy has no bfloat16; pass dtype="float32"'),
        (cache, (SITE, "x.bin"), DataError, r"must end in \.npy or \.safetensors; got 'x.bin'"),
        (cache, ("nope", "x.npy"), SiteError, "holds no site 'nope'"),
        (cache, (SITE, "x.npy", "int32"), DataError, "holds bfloat16; it cannot be exported as int32"),
        (cache, (EXPERTS, "x.npy", "float32"), DataError, "holds int16"),
        (cache, (SITE, "x.npy", "float99"), DataError, "name of one; got 'float99'"),
        (cache, (SITE, "x.npy", "float8_e4m3fn"), DataError, "numpy has no float8_e4m3fn"),
        (cache, (EXPERTS, "x.safetensors", "int8"), DataError, "cannot be exported as int8"),
        (huge, (SITE, "x.npy", "float16"), NumericsError, r"magnitude 9\.95304e\+29, which float16 cannot hold"),
        (cache, (SITE, "there.npy", "float32"), CacheError, "exists already; pass overwrite=True"),
        (cache, (SITE, "folder.npy", "float32"), CacheError, "is a directory"),
        (cache, (SITE, "missing/x.npy", "float32"), CacheError, "cannot be written"),
    ]
    for reader, (site, name, *dtype), error, message in refusals:
        with pytest.raises(error, match=message):
            reader.export(site, tmp_path / name, *dtype, progress=False)
    with pytest.raises(DataError, match="out of range"):
        cache.export(SITE, tmp_path / "x.npy", "float32", rows=[10**6], progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "there.npy").read_text() == "mine"
    cache.export(SITE, tmp_path / "there.npy", "float32", overwrite=True, progress=False)
    assert len(np.load(tmp_path / "there.npy")) == len(cache)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache, _ = made(tmp_path)

    class Full:
        def __init__(self, file: Any) -> None:
            self.file, self.left = file, 300

        def write(self, data: Any) -> None:
            self.left -= len(bytes(data))
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.file.write(data)

    plain = _export._write
    monkeypatch.setattr(_export, "_write", lambda file, *rest: plain(Full(file), *rest))  # type: ignore[arg-type]
    with pytest.raises(CacheError, match=r"No space left on device; nothing of it is left"):
        cache.export(SITE, tmp_path / "x.npy", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["acts"]


def test_the_command_exports_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cache, content = made(tmp_path, "bfloat16")
    out = str(tmp_path / "x.npy")
    assert main(["cache", "export", str(cache.path), SITE, out]) == 2
    assert "--dtype float32" in capsys.readouterr().err
    assert main(["cache", "export", str(cache.path), SITE, out, "--dtype", "float32"]) == 0
    assert f"{len(cache)} rows" in capsys.readouterr().out
    np.testing.assert_array_equal(np.load(out), as_float(content.sites[SITE][0], "bfloat16"))
    assert main(["cache", "export", str(cache.path), SITE, out, "--dtype", "float32"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["cache", "export", str(cache.path), SITE, out, "--dtype", "float16", "--overwrite"]) == 0
    assert np.load(out).dtype == np.float16
