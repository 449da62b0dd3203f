"""Tiny random models of several architectures with a word-level tokenizer, for tests that need no trained model."""

from __future__ import annotations

import torch

from probe.models import Model, wrap

TEXT = (
    "the a in of at who does where what is was city country lives works born old new person called named and but "
    "Anna Karl Mira Otto Bell Stone Lane Hill Oslo Rome Lima Bern Kyiv Quito Paris Accra"
)
WORDS = TEXT.split()


def word_tokenizer(bos: bool = True):
    """One token per word; a BOS token comes first unless `bos` is False."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *WORDS])}, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def config(kind: str, n_layers: int = 2):
    """A configuration of 2 heads of width 8 (one key and value head where the architecture allows it)."""
    import transformers as tf

    common = {"vocab_size": len(WORDS) + 3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    llama = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": n_layers, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 32, "initializer_range": 0.4, **common,
    }  # fmt: skip
    if kind == "llama":
        return tf.LlamaConfig(**llama)
    if kind == "gpt2":
        return tf.GPT2Config(n_embd=16, n_layer=n_layers, n_head=2, n_positions=32, initializer_range=0.4, **common)
    if kind == "neox":
        return tf.GPTNeoXConfig(**{**llama, "use_parallel_residual": True})
    return _mixture(kind, llama)


def _mixture(kind: str, llama: dict):
    """Mixtures of 6 experts, top 2."""
    import transformers as tf

    if kind == "mixtral":
        return tf.MixtralConfig(**llama, num_local_experts=6, num_experts_per_tok=2)
    if kind == "olmoe":
        return tf.OlmoeConfig(**llama, num_experts=6, num_experts_per_tok=2)
    if kind == "qwen3_moe":
        small = {"head_dim": 8, "moe_intermediate_size": 8, "decoder_sparse_step": 1}
        return tf.Qwen3MoeConfig(**llama, **small, num_experts=6, num_experts_per_tok=2)
    if kind == "gpt_oss":
        return tf.GptOssConfig(**llama, head_dim=8, num_local_experts=6, num_experts_per_tok=2)
    if kind == "deepseek_v3":
        heads = {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "q_lora_rank": 8, "kv_lora_rank": 8}
        routed = {"n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
        llama = {**llama, "num_key_value_heads": 2}
        return tf.DeepseekV3Config(**llama, **heads, **routed, moe_intermediate_size=8, first_k_dense_replace=1)
    raise ValueError(kind)


def tiny(kind: str, seed: int = 0, n_layers: int = 2, bos: bool = True) -> Model:
    """A random model whose norms, biases and zero matrices are not at their initial values."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    hf = AutoModelForCausalLM.from_config(config(kind, n_layers)).float()
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return wrap(hf, word_tokenizer(bos), name=f"tiny-{kind}")
