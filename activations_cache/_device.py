"""Where a model runs that accelerate has spread over devices, or whose weights wait on the CPU or on disk.

`device_map=...` and `accelerate.cpu_offload` put a hook on modules (`_hf_hook`) that brings weights and inputs to an
execution device for each call. A parameter's own device then says where the weight rests ("meta" for one that is
offloaded), not where the input belongs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch

from activations_cache.errors import ModelError


def hooks_of(module: Any) -> Iterator[Any]:
    """accelerate's hooks on one module: none, one, or those of a sequence of hooks."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))


def is_dispatched(hf: Any) -> bool:
    """Whether accelerate moves this model's weights or inputs: a plain `.to(device)` is then wrong."""
    return any(getattr(hook, "weights_map", None) is not None for m in hf.modules() for hook in hooks_of(m)) or (
        len(set(map(str, (getattr(hf, "hf_device_map", None) or {}).values()))) > 1
    )


def input_device(hf: Any) -> torch.device:
    """The device on which the model takes its token ids: where its embedding runs.

    That is accelerate's execution device of the embedding, else the device of its weight; a model without an input
    embedding takes its ids where its first parameter is.

    Raises:
        ModelError: The weights are on the meta device and nothing says where they run.
    """
    embedding = hf.get_input_embeddings() if hasattr(hf, "get_input_embeddings") else None
    for module in (embedding, hf):
        for hook in hooks_of(module):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return _device(device)
    first = next((embedding if embedding is not None else hf).parameters(), None)
    if first is None or first.is_meta:
        raise ModelError(
            "The model's weights are on the meta device, and no hook of accelerate says where they run: "
            "load it with from_pretrained (device_map=... if it does not fit in memory)."
        )
    return cast(torch.device, first.device)


def move(hf: Any, device: torch.device | str) -> None:
    """Put a model on a device.

    Raises:
        ModelError: accelerate has spread its weights over devices; there is no such device, or no memory on it.
    """
    if is_dispatched(hf):
        raise ModelError(
            f"device={str(device)!r} cannot be given for a model that was loaded with a device_map or is offloaded: "
            f"its weights are spread already (its input goes to {input_device(hf)}). Leave out `device`."
        )
    try:
        hf.to(device)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:  # torch raises each of these
        raise ModelError(
            f"the model cannot be moved to device={device!r}: {error}. Give a device that this machine has, such as "
            '"cpu", or leave out `device`.'
        ) from error


def _device(device: Any) -> torch.device:
    """accelerate's spelling of a device; a bare number is the number of an accelerator."""
    if isinstance(device, int):
        here = torch.accelerator.current_accelerator()
        return torch.device("cuda" if here is None else here.type, device)
    return torch.device(device)
