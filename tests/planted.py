"""A real cache whose activations are chosen by the test: they are the embedding matrix of a tiny Llama.

Token i embeds to row i of the wanted activations, so a capture of the first residual stores exactly those rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

import activations_cache as ac

SITE = "blocks.0.hook_resid_pre"


def llama(rows: np.ndarray) -> Any:
    """A one-layer Llama whose token embedding is `rows` [n, d] (d a multiple of 4)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    n, d = rows.shape
    config = LlamaConfig(
        vocab_size=n,
        hidden_size=d,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.as_tensor(rows))
    return model


def planted_cache(
    out: Path, rows: np.ndarray, columns: dict[str, list[Any]] | None = None, per_sequence: int = 1
) -> tuple[ac.Cache, Any]:
    """Capture `rows` as the first residual, `per_sequence` of them in each sequence; labels are per sequence."""
    model = llama(rows)
    n_sequences = len(rows) // per_sequence
    ids = np.arange(n_sequences * per_sequence).reshape(n_sequences, per_sequence)
    records = [
        {"input_ids": own.tolist(), **{name: values[i] for name, values in (columns or {}).items()}}
        for i, own in enumerate(ids)
    ]
    return ac.capture(model, records, SITE, out, dtype="float32", progress=False), model
