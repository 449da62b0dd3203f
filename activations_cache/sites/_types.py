"""The plain data that the rest of the package passes around: `Site` and `Dims`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Site:
    """A named place in the forward pass of one model.

    Attributes:
        name: TransformerLens's hook name, e.g. `blocks.3.attn.hook_z`.
        layer: the block, or None for the embeddings and the final norm.
        kind: the name without its prefix, e.g. `resid_post`, `z`, `router_logits`.
        shape: shape of one row (one token): a value is `[batch, pos, *shape]`. The attention pattern alone is
            `[batch, n_heads, query, key]`, and its `shape` is `(n_heads,)`.
        integer: True where the values are integers (the indices of the chosen experts).
        cacheable: False where a value is not a row per token (the attention pattern).
        aliases: other names that TransformerLens has for the same tensor, e.g. `blocks.3.attn.o.hook_in`.
        dtype: "float32" where the model computes the values in that type whatever its own is (the weights of Mixtral's
            experts, DeepSeek's router); None where they have the model's own.
    """

    name: str
    layer: int | None
    kind: str
    shape: tuple[int, ...]
    integer: bool = False
    cacheable: bool = True
    aliases: tuple[str, ...] = ()
    dtype: str | None = None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Dims:
    """The sizes of a model, in TransformerLens's words.

    `d_mlp` is the width of the dense MLPs (None where every layer is a mixture of experts), `d_expert` that of one
    expert; `n_experts`, `top_k` and `d_expert` are None for a model without experts.
    """

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int | None
    d_vocab: int
    n_ctx: int
    n_experts: int | None = None
    top_k: int | None = None
    d_expert: int | None = None
