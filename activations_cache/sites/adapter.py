"""From a bare Hugging Face model to TransformerLens's map of it.

TransformerLens keeps, per architecture, an adapter whose `component_mapping` says which Hugging Face module plays which
part (`blocks` is `model.layers`, `attn.o` is `self_attn.o_proj`) and whose `hook_aliases` say which of those modules
carries which hook. Both are read here without booting a bridge, so that the model itself is never wrapped or changed.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from activations_cache.errors import ModelError


def bare(model: Any) -> Any:
    """The Hugging Face model inside `model`: `model.hf` where there is one, else `model` itself.

    Raises:
        ModelError: if that is no `torch.nn.Module` with a Hugging Face `config`.
    """
    hf = getattr(model, "hf", model)
    if not isinstance(hf, nn.Module) or not hasattr(hf, "config"):
        raise ModelError(
            f"a Hugging Face model (a torch module with a .config) is required, received {type(hf).__name__}; "
            "load one with transformers.AutoModelForCausalLM.from_pretrained or probe.load"
        )
    return hf


def build_adapter(hf_model: nn.Module) -> Any:
    """TransformerLens's adapter for the class of `hf_model`, from its config alone.

    Raises:
        ModelError: if TransformerLens has no adapter for it, or it is no decoder language model.
    """
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf
    from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config

    config: Any = copy.deepcopy(hf_model.config)
    config.architectures = [type(hf_model).__name__]  # what is in memory, not what the checkpoint was saved as
    try:
        architecture = determine_architecture_from_hf_config(config)
    except ValueError as error:
        raise ModelError(
            f"TransformerLens has no adapter for {type(hf_model).__name__} (model type "
            f"{getattr(config, 'model_type', None)!r}), so its sites cannot be named; a decoder language model such as "
            "LlamaForCausalLM or GPT2LMHeadModel is required"
        ) from error
    _require_decoder(hf_model, architecture)
    dtype = next((p.dtype for p in hf_model.parameters()), torch.float32)
    bridge_config = build_bridge_config_from_hf(config, architecture, str(config.name_or_path), dtype)
    return ArchitectureAdapterFactory.select_architecture_adapter(bridge_config)


def _require_decoder(hf_model: nn.Module, architecture: str) -> None:
    """Refuse encoders, encoder-decoders, vision and audio models, and headless trunks."""
    from transformer_lens.utilities import architectures as known

    other = known.SEQ2SEQ_ARCHITECTURES | known.MASKED_LM_ARCHITECTURES | known.AUDIO_ARCHITECTURES
    other |= known.VISION_ARCHITECTURES | known.AUDIO_TEXT_ARCHITECTURES
    if architecture in other:
        raise ModelError(f"a decoder language model is required, received {type(hf_model).__name__}")
    if type(hf_model).__name__ != architecture and not hasattr(hf_model, "lm_head"):
        raise ModelError(
            f"a model with its language-model head is required, received {type(hf_model).__name__}; load it with "
            f"AutoModelForCausalLM, which gives {architecture}"
        )


def submodule(root: nn.Module, path: str) -> nn.Module | None:
    """The module at `path` under `root` (the empty path is `root`), None where there is none."""
    current: Any = root
    for part in path.split(".") if path else ():
        current = getattr(current, part, None)
        if not isinstance(current, nn.Module):
            return None
    return current if isinstance(current, nn.Module) else None


def join(*parts: str | None) -> str:
    """`a.b.c` of the parts that are neither None nor empty."""
    return ".".join(part for part in parts if part)


def follow(component: Any, hook: str) -> list[tuple[str, str]]:
    """Every `(path, hook_in | hook_out)` that TransformerLens's aliases give for `hook` of `component`.

    `path` is TransformerLens's path of submodules below `component` (`"o"`, `""` for the component itself). A hook
    that is neither a base hook nor an alias leads nowhere: the list is empty.

    Example: for the attention of a Llama, `follow(attn, "hook_z") == [("o", "hook_in")]`.
    """
    *path, last = hook.split(".")
    for part in path:
        component = component.submodules.get(part)
        if component is None:
            return []
    prefix = ".".join(path)
    targets = component.hook_aliases.get(last)
    if targets is None:
        return [(prefix, last)] if last in ("hook_in", "hook_out") else []
    targets = [targets] if isinstance(targets, str) else list(targets)
    found = []
    for target in targets:
        if target != last:
            found += [(join(prefix, below), base) for below, base in follow(component, target)]
    return found


def hf_path(component: Any, path: str) -> str | None:
    """The Hugging Face path below `component`'s module of the submodule that TransformerLens calls `path`.

    None where a submodule is not declared or lies outside `component` (TransformerLens writes `../`).
    """
    names: list[str | None] = []
    for part in path.split(".") if path else ():
        component = component.submodules.get(part)
        if component is None or (component.name or "").startswith(".."):
            return None
        names.append(component.name)
    return join(*names)


def shadow(module: nn.Module, parameters: dict[str, torch.Tensor | None]) -> Any:
    """A shallow copy of `module`, without its hooks, in which `parameters` replace its own; `module` is left alone."""
    twin = copy.copy(module)
    twin.__dict__ = dict(module.__dict__)
    twin._parameters = dict(module._parameters)
    twin._modules = dict(module._modules)
    for name, value in parameters.items():
        twin._parameters[name] = None if value is None else nn.Parameter(value, requires_grad=False)
    return twin
