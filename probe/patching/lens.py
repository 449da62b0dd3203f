"""The logit lens: what a model would say if it stopped after a layer (nostalgebraist, 2020).

Each layer's residual stream goes through the model's own final norm and unembedding. Read it with care: early layers
need not be in the last layer's coordinates, so a low probability there does not mean that nothing is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from activations_cache import sites
from probe.errors import PatchError
from probe.patching._states import RESID, answer_states
from probe.scoring import eval_mode

if TYPE_CHECKING:
    import pandas as pd

    from probe.data import Questions
    from probe.models import Model

_LOGITS = 2**24  # logits held at once (64 MiB in float32)


@dataclass(frozen=True)
class LensScores:
    """The answer's tokens through the lens.

    Attributes:
        logprob: Natural log-probability of each answer token after each layer, given all tokens before it.
        rank: Its rank among all tokens; 1 is the likeliest, ties get the worst rank.
        row: Which question each position belongs to.
    """

    logprob: Float[Tensor, "layer position"]
    rank: Int[Tensor, "layer position"]
    row: Int[Tensor, " position"]

    def probability(self) -> Float[Tensor, "layer row"]:
        """Per question exp(mean log-probability of its answer's tokens), as p(a) of TOFU (arXiv 2401.06121)."""
        return _row_means(self.logprob.double(), self.row).exp()

    def first_rank(self) -> Int[Tensor, "layer row"]:
        """Per question the rank of its answer's first token."""
        n = int(self.row.max()) + 1
        return self.rank[:, torch.searchsorted(self.row, torch.arange(n))]

    def to_df(self) -> pd.DataFrame:
        """One row a layer: mean probability, mean and median rank of the first token."""
        import pandas as pd

        rank = self.first_rank().double()
        columns = {
            "probability": self.probability().mean(1),
            "rank": rank.mean(1),
            "median_rank": rank.quantile(0.5, 1),
        }
        return pd.DataFrame({"layer": range(len(rank)), **{k: v.numpy() for k, v in columns.items()}})


def logit_lens(
    model: Model,
    questions: Questions | Sequence[tuple[str, str]],
    *,
    batch_size: int = 64,
    bos: bool | None = None,
    chat: bool = False,
    progress: bool = False,
) -> LensScores:
    """Read the answer's tokens from the residual stream after every block, under teacher forcing.

    Cost: one forward over the questions, and layers x answer tokens through the unembedding.

    Args:
        model: A causal language model with its tokenizer.
        questions: Questions, or (question, answer) tuples.
        batch_size: Rows a forward.
        bos: Whether a BOS token comes first; None leaves it to the tokenizer.
        chat: Put questions into the chat template.
        progress: Show a bar over the batches.

    Raises:
        DataError: No questions, or answers that cannot be tokenised.
        PatchError: Values that are not finite.
    """
    how = {"batch_size": batch_size, "bos": bos, "chat": chat, "progress": progress}
    states = answer_states(model, questions, RESID, **how)  # type: ignore[arg-type]
    found = [_score(model, value, states.token) for value in states.values.values()]
    return LensScores(torch.stack([f[0] for f in found]), torch.stack([f[1] for f in found]), states.row)


@torch.no_grad()
def unembed(model: Model, residual: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
    """Logits of residual vectors as if they stood after the last block.

    The vectors are put into sequences of one token each after the last block of the model itself, so its final norm,
    its unembedding and whatever it does to logits (scaling, soft caps) are its own, for every architecture.

    Raises:
        PatchError: Vectors of another width than the model's.
    """
    width = model.dims.d_model
    if residual.ndim != 2 or residual.shape[1] != width:
        raise PatchError(f"residual vectors must be [n, {width}] for this model; received {list(residual.shape)}")
    last = f"blocks.{model.dims.n_layers - 1}.hook_resid_post"
    ids = torch.full((len(residual), 1), model.pad_id, dtype=torch.long, device=model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with eval_mode(model.hf):
        run = sites.run(model, inputs, interventions={last: lambda value, _: residual[:, None].to(value)})
    assert run.logits is not None
    return run.logits[:, 0]


def _score(
    model: Model, residual: Float[Tensor, "n d_model"], token: Int[Tensor, " n"]
) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """Log-probability and rank of a token at each vector."""
    size = max(1, _LOGITS // model.dims.d_vocab)
    logprobs, ranks = [], []
    for part, own in zip(residual.split(size), token.split(size), strict=True):
        logits = unembed(model, part).float()  # [n, d_vocab]
        if not torch.isfinite(logits).all():
            raise PatchError("the lens's logits are not finite; check the model's weights and its dtype")
        picked = logits.gather(1, own.to(logits.device)[:, None])  # [n, 1]
        logprobs.append((picked - logits.logsumexp(1, keepdim=True))[:, 0].cpu())
        ranks.append((logits >= picked).sum(1).cpu())
    return torch.cat(logprobs), torch.cat(ranks)


def _row_means(values: Float[Tensor, "layer position"], row: Int[Tensor, " position"]) -> Float[Tensor, "layer row"]:
    n = int(row.max()) + 1
    sums = values.new_zeros(len(values), n).index_add_(1, row, values)
    return sums / torch.bincount(row, minlength=n)
