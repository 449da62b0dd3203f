"""The paths that need a GPU: copies through pinned memory, batches on the device. Skipped where there is none."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from activations_cache.errors import NumericsError
from tests.activations_cache.caches import contents, llama, small, token_rows

SITE = "blocks.1.hook_resid_post"

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_capture_on_the_gpu_holds_what_the_cpu_computes(dtype: str, tmp_path: Path):
    rows = token_rows(13)
    model = copy.deepcopy(llama()).cuda()
    cache = small(tmp_path / "gpu", rows, model=model, dtype=dtype)
    plain = small(tmp_path / "cpu", rows, dtype=dtype)
    torch.testing.assert_close(cache[SITE][:].float(), plain[SITE][:].float(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(cache.stats[SITE].mean, cache[SITE][:].double().mean(0), rtol=1e-6, atol=1e-6)
    assert contents(small(tmp_path / "again", rows, model=model, dtype=dtype).path) == contents(cache.path)
    assert cache.verify() == []


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "is NaN"), (3e5, "reaches 300000")])
def test_what_does_not_fit_is_found_behind_the_forward(value: float, said: str, tmp_path: Path):
    model = copy.deepcopy(llama())
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = value
    with pytest.raises(NumericsError, match=f"hook_embed {said} in sequence 2"):
        small(tmp_path / "acts", [[4], [6], [5]], "hook_embed", model.cuda(), dtype="float16")


def test_batches_arrive_on_the_device_in_the_same_order(tmp_path: Path):
    cache = small(tmp_path / "acts", token_rows(13))
    here = torch.cat(list(cache.batches(SITE, 7, seed=3)))
    there = torch.cat(list(cache.batches(SITE, 7, seed=3, device="cuda")))
    assert there.is_cuda
    assert torch.equal(there.cpu(), here)
