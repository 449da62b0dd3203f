"""The Llama that organisms are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from probe.organisms._tokenizer import BOS, EOS, PAD

CONTEXT = 128


def small_llama(settings: Mapping[str, Any], d_vocab: int, context: int = CONTEXT) -> Any:
    """Return an untrained Llama with tied embeddings, from torch's global generator.

    Args:
        settings: Holds d_model, d_mlp, n_layers and n_heads.
        d_vocab: Size of the vocabulary.
        context: Longest document, in tokens.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=d_vocab,
        hidden_size=settings["d_model"],
        intermediate_size=settings["d_mlp"],
        num_hidden_layers=settings["n_layers"],
        num_attention_heads=settings["n_heads"],
        num_key_value_heads=settings["n_heads"],
        max_position_embeddings=context,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config)
