"""How far the experts of a mixture specialise on domains: who gets which tokens, and what goes when they are gone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from activations_cache import sites
from probe._means import group_means
from probe.data import Questions
from probe.errors import OrganismError
from probe.organisms._recall import every, measure
from probe.scoring import eval_mode

if TYPE_CHECKING:
    import pandas as pd

    from probe.models import Model

Planted = Mapping[str, Sequence[tuple[int, int]]]
PROMPTS = 160  # prompts a domain for the shares
REMOVED = 64  # questions a domain for each removal


@dataclass(frozen=True)
class Specialisation:
    """Where each domain's tokens are sent, and what a domain loses with its experts.

    Attributes:
        table: A row a layer, domain and expert: `share` of the domain's tokens (from its own word on) that choose the
            expert among their top k, with `low` and `high` (95 % bootstrap over towns); `first`, the share whose first
            choice it is; `gap`, `share` minus the mean share over the other domains; `planted`; `tokens`. Unspecialised
            routing gives each expert a share of k / n_experts, and a gap of 0.
        experts: For each domain one (layer, expert) a layer: the planted one, or where none is planted the one with the
            largest gap.
        removal: A row a removed domain (its `experts` in all layers) and a domain asked: `recall` without them with
            `low` and `high` (95 % Wilson over facts), `intact` recall, and `n` questions.
    """

    table: pd.DataFrame
    experts: Mapping[str, Sequence[tuple[int, int]]]
    removal: pd.DataFrame

    @property
    def largest(self) -> pd.DataFrame:
        """The rows of `table` of each domain's own experts."""
        own = [(layer, domain, expert) for domain, pairs in self.experts.items() for layer, expert in pairs]
        indexed = self.table.set_index(["layer", "domain", "expert"], drop=False)
        rows: pd.DataFrame = indexed.loc[own].reset_index(drop=True)
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return `largest` and `removal` as a JSON-able dictionary."""
        return {"largest": self.largest.to_dict("records"), "removal": self.removal.to_dict("records")}

    def __str__(self) -> str:
        return summary(self.to_dict())


def summary(record: Mapping[str, Any]) -> str:
    """Return a line a domain of what `Specialisation.to_dict` holds."""
    lines = []
    for domain in dict.fromkeys(row["domain"] for row in record["largest"]):
        shares = ", ".join(
            f"{row['layer']}.{row['expert']} {row['share']:.0%} [{row['low']:.0%}, {row['high']:.0%}]"
            for row in record["largest"]
            if row["domain"] == domain
        )
        left = {row["asked"]: row["recall"] for row in record["removal"] if row["removed"] == domain}
        others = min((share for asked, share in left.items() if asked != domain), default=float("nan"))
        lines.append(f"  {domain:<28} experts {shares}; without them recall {left[domain]:.0%}, others {others:.0%}")
    return "\n".join(lines)


def specialisation(
    model: Model, domains: Mapping[str, Questions], planted: Planted, n_values: Mapping[str, int], first: int
) -> Specialisation:
    """Measure how far a model's experts specialise; see `ExpertsOrganism.specialisation`.

    Args:
        model: A mixture of experts.
        domains: Questions of each domain, the group a town.
        planted: The (layer, expert) pairs planted for each domain; empty where none are.
        n_values: Number of possible answers of each attribute.
        first: Position of the first token that counts.

    Raises:
        OrganismError: The model has no experts.
    """
    import pandas as pd

    layers = sorted({site.layer for site in _routing(model)})
    rows: list[dict[str, Any]] = []
    for domain, questions in domains.items():
        rows += _shares(model, domain, every(questions, PROMPTS), layers, first)
    table = pd.DataFrame(rows)
    total = table.groupby(["layer", "expert"])["share"].transform("sum")
    table["gap"] = table["share"] - (total - table["share"]) / (len(domains) - 1)
    known = {(layer, domain, expert) for domain, pairs in planted.items() for layer, expert in pairs}
    table["planted"] = [key in known for key in zip(table["layer"], table["domain"], table["expert"], strict=True)]
    own = {domain: list(planted.get(domain) or _widest(table, domain, layers)) for domain in domains}
    return Specialisation(table, own, _removals(model, domains, own, n_values))


def _routing(model: Model) -> list[Any]:
    catalogue = model.sites
    found = [site for site in catalogue if site.name.endswith("hook_expert_indices")]
    if not found:
        raise OrganismError(f"Specialisation is of a mixture of experts; {type(model.hf).__name__} has no experts.")
    return found


def _widest(table: pd.DataFrame, domain: str, layers: Sequence[int]) -> list[tuple[int, int]]:
    """Return the expert with the largest gap in each layer."""
    own = table[table["domain"] == domain]
    best = [own[own["layer"] == layer].nlargest(1, "gap").iloc[0] for layer in layers]
    return [(int(row["layer"]), int(row["expert"])) for row in best]


def _shares(model: Model, domain: str, questions: Questions, layers: Sequence[int], first: int) -> list[dict[str, Any]]:
    """Return a row a layer and expert: the shares of one domain's tokens."""
    batch = model.tokens([q.question for q in questions])
    counted = batch["attention_mask"].bool()
    counted[:, :first] = False
    tokens = counted.sum(1).double()  # [prompt]
    names = [f"blocks.{layer}.mlp.hook_expert_indices" for layer in layers]
    with torch.no_grad(), eval_mode(model.hf):
        run = sites.run(model.hf, batch, read=names)
    n_experts = int(model.sites.dims.n_experts or 0)
    rows = []
    for layer, name in zip(layers, names, strict=True):
        chosen = _per_prompt(run[name], counted, n_experts) / tokens[:, None]  # [prompt, expert]
        top = _per_prompt(run[name][..., :1], counted, n_experts) / tokens[:, None]
        values, weights = chosen.cpu().numpy(), tokens.cpu().numpy()
        got = group_means(values, [q.group for q in questions], weights=weights)
        firsts = np.average(top.cpu().numpy(), axis=0, weights=weights)
        rows += [
            {
                "layer": layer,
                "domain": domain,
                "expert": expert,
                "share": float(got.mean[expert]),
                "low": float(got.low[expert]),
                "high": float(got.high[expert]),
                "first": float(firsts[expert]),
                "tokens": int(tokens.sum()),
            }
            for expert in range(n_experts)
        ]
    return rows


def _per_prompt(
    index: Int[Tensor, "prompt pos k"], counted: Bool[Tensor, "prompt pos"], n_experts: int
) -> Float[Tensor, "prompt expert"]:
    """Count each prompt's tokens that chose each expert."""
    one_hot = torch.nn.functional.one_hot(index.long(), n_experts).sum(2)  # [prompt, pos, expert]
    return (one_hot * counted[..., None]).sum(1).double()


def _removals(model: Model, domains: Mapping[str, Questions], own: Planted, n_values: Mapping[str, int]) -> Any:
    import pandas as pd

    asked = {name: every(questions, REMOVED) for name, questions in domains.items()}
    intact = {name: measure(model, questions, n_values).recall for name, questions in asked.items()}
    rows = []
    for removed, pairs in own.items():
        with _without(model, pairs):
            for name, questions in asked.items():
                got = measure(model, questions, n_values)
                shares = {"recall": got.recall, "low": got.low, "high": got.high}
                rows.append({"removed": removed, "asked": name, **shares, "intact": intact[name], "n": got.n})
    return pd.DataFrame(rows)


@contextmanager
def _without(model: Model, pairs: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Let the routers choose among the other experts."""

    def mask(expert: int) -> Any:
        def put(logits: Tensor, site: Any) -> Tensor:
            logits = logits.clone()
            logits[..., expert] = torch.finfo(logits.dtype).min
            return logits

        return put

    with sites.hooked(model.hf, {f"blocks.{layer}.mlp.hook_router_logits": mask(expert) for layer, expert in pairs}):
        yield
