"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import threading
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from tqdm import tqdm

# tqdm's own lock is shared with forked children: one that is killed while it holds it would leave the parent waiting
tqdm.set_lock(threading.RLock())

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real checkpoints and data sets beside the checkout; the test is skipped where they are absent."""
    if not SHARED.is_dir():
        pytest.skip(
            "needs the folder ../shared/data (real checkpoints and data sets), which is not beside this checkout"
        )
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def one_organism_cache() -> Path:
    """Organisms are trained once per checkout, unless PROBE_CACHE_DIR names another folder."""
    folder = os.environ.setdefault("PROBE_CACHE_DIR", str(ROOT / ".cache" / "organisms"))
    return Path(folder)
