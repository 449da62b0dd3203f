"""Tiny random checkpoints, one per architecture, for tests.

Every model has two layers and a width of 32, its norms and biases are perturbed so that an error in a gain or an offset
shows, query and key heads differ in number where the family has that, and heads are wider than `d_model / n_heads` in
several. `tiny(name)` builds one in memory, deterministic by seed; `checkpoint(name, folder)` writes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

LISTED = (
    "gpt2",
    "gpt_neox",
    "gpt_neox_sequential",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "mixtral",
    "olmoe",
    "qwen3_moe",
    "gpt_oss",
)
# architectures that the package has no code for: they come through TransformerLens's map alone
FREE = (
    "qwen2_moe",
    "olmo2",
    "phi3",
    "stablelm",
    "granite",
    "opt",
    "phi",
    "deepseek_v2",
    "deepseek_v2_lite",
    "deepseek_v3",
    "deepseek_v3_groups",
    "qwen3_moe_mixed",
)
ARCHITECTURES = LISTED + FREE
MLA = ("deepseek_v2", "deepseek_v2_lite", "deepseek_v3", "deepseek_v3_groups")  # compressed attention: no q, k and v
MOE = ("mixtral", "olmoe", "qwen3_moe", "gpt_oss", "qwen2_moe", *MLA)

_COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_MLA = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
}
_ONE_GROUP = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
_GROUPS = {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2}  # as released, but smaller

UNSET = object()  # stands for a None that is passed on
# name -> (class name, overrides of the common settings; a value of None drops the setting)
_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neox": ("GPTNeoX", {"num_key_value_heads": None, "use_parallel_residual": True, "hidden_dropout": 0.0}),
    "gpt_neox_sequential": (
        "GPTNeoX",
        {"num_key_value_heads": None, "use_parallel_residual": False, "hidden_dropout": 0.0},
    ),
    "llama": ("Llama", {"head_dim": 12, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"head_dim": 12, "sliding_window": 4}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "gemma2": ("Gemma2", {"head_dim": 12, "sliding_window": 4, "query_pre_attn_scalar": 12}),
    "gemma3": (
        "Gemma3",
        {
            "head_dim": 12,
            "sliding_window": 4,
            "query_pre_attn_scalar": 12,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 12}),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", {**_MOE, "head_dim": 12, "decoder_sparse_step": 1, "norm_topk_prob": True}),
    "qwen3_moe_mixed": ("Qwen3Moe", {**_MOE, "head_dim": 12, "decoder_sparse_step": 1, "mlp_only_layers": [0]}),
    "qwen2_moe": (
        "Qwen2Moe",
        {**_MOE, "decoder_sparse_step": 1, "shared_expert_intermediate_size": 40, "norm_topk_prob": False},
    ),
    "gpt_oss": (
        "GptOss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 12,
            "sliding_window": 4,
            "intermediate_size": 32,  # as wide as the model, as in the released checkpoints
            "swiglu_limit": 1.0,  # so low that it clamps
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "olmo2": ("Olmo2", {}),
    "phi3": ("Phi3", {}),
    "stablelm": ("StableLm", {"num_key_value_heads": 2}),
    "opt": ("OPT", {"num_key_value_heads": None, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "phi": ("Phi", {"num_key_value_heads": None}),
    "deepseek_v2": (
        "DeepseekV2",
        {**_MLA, **_GROUPS, "topk_method": "group_limited_greedy", "routed_scaling_factor": 2.0},
    ),
    "deepseek_v2_lite": ("DeepseekV2", {**_MLA, **_ONE_GROUP, "topk_method": "greedy", "q_lora_rank": UNSET}),
    "deepseek_v3": ("DeepseekV3", {**_MLA, **_ONE_GROUP}),
    "deepseek_v3_groups": ("DeepseekV3", {**_MLA, **_GROUPS, "routed_scaling_factor": 2.5}),
    "granite": ("Granite", {"residual_multiplier": 0.5, "embedding_multiplier": 3.0, "logits_scaling": 2.0}),
}


def tiny(architecture: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A random model of two layers, in eval mode, with eager attention.

    Args:
        architecture: one of `ARCHITECTURES`.
        seed: of the weights; the global random state is left as it was.
        dtype: of the parameters.
        overrides: settings of the Hugging Face config to replace.
    """
    import transformers

    if architecture == "gpt2":
        settings: dict[str, Any] = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        settings |= {"bos_token_id": 1, "eos_token_id": 2, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        names = ("GPT2Config", "GPT2LMHeadModel")
    else:
        prefix, own = _SETTINGS[architecture]
        settings = {key: value for key, value in {**_COMMON, **own}.items() if value is not None}
        settings = {key: None if value is UNSET else value for key, value in settings.items()}
        names = (f"{prefix}TextConfig" if prefix == "Gemma3" else f"{prefix}Config", f"{prefix}ForCausalLM")
    config = getattr(transformers, names[0])(**{**settings, **overrides})
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, names[1])(config)
        perturb(model)
    return model.to(dtype).eval()


def perturb(model: nn.Module) -> None:
    """Random weights of a size that makes every part matter, and norms and biases away from one and zero."""
    done: set[int] = set()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if id(parameter) in done:
                continue
            done.add(id(parameter))
            if parameter.ndim == 1 and "norm" not in name and "ln_" not in name:
                parameter.normal_(0.0, 0.3)  # biases, attention sinks
            elif parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)  # gains and shifts of norms
            else:
                parameter.normal_(0.0, 0.25)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # DeepSeek-V3's: chooses experts, does not weight them
                buffer.normal_(0.0, 0.05)


def checkpoint(architecture: str, folder: Path, **kwargs: Any) -> Path:
    """Write `tiny(architecture, **kwargs)` to `folder / architecture` with `save_pretrained`; returns that path."""
    path = Path(folder) / architecture
    tiny(architecture, **kwargs).save_pretrained(path)
    return path


def inputs(*, batch: int = 3, pos: int = 9, seed: int = 1, padding: str | None = None) -> dict[str, torch.Tensor]:
    """Random `input_ids` with their `attention_mask`; with `padding` "left" or "right", row i has i padded tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (batch, pos), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch if padding else 0):
        where = slice(0, row) if padding == "left" else slice(pos - row, pos)
        mask[row, where], ids[row, where] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}
