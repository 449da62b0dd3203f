"""Open an SAE that `saes.train` or sae-lens saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from saes.errors import SAELoadError


def load(path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None) -> Any:
    """Load a saved SAE (`cfg.json` and `sae_weights.safetensors`) as a sae-lens inference `SAE`, in eval mode.

    Args:
        path: the directory.
        device: where to put it.
        dtype: cast to this type; None keeps the saved one.

    Raises:
        SAELoadError: no such directory, files missing or malformed, or a training checkpoint without an inference
            form.
    """
    from sae_lens import SAE

    path = Path(path)
    missing = [name for name in ("cfg.json", "sae_weights.safetensors") if not (path / name).is_file()]
    if missing:
        raise SAELoadError(
            f"{path} holds no SAE: {' and '.join(missing)} missing. Give the directory that was saved to."
        )
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    try:
        return SAE.load_from_disk(path, device=str(device), dtype=name).eval()
    except Exception as error:  # sae-lens raises whatever its parsers raise
        raise SAELoadError(
            f"sae-lens cannot open {path}: {error!r}. A training checkpoint of a BatchTopK SAE has no inference form; "
            "save it with save_inference_model."
        ) from error
