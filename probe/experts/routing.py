"""Routing statistics from an activations cache, and experts scored by how two prompt sets are routed differently.

Two statistics of an expert on a set of tokens, both of what the model really uses:

- `gate_mass`: the mean over tokens of its gate weight, 0 where it is not among the top k (UOE, arXiv 2411.18797);
- `frequency`: the share of tokens that choose it (the resonance of MoTE, arXiv 2502.11096).

An expert's score is its statistic on the forget set minus that on the retain set.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy import ndarray

from activations_cache.sites import Sites
from probe._means import group_draws, group_means
from probe._stats import codes, corrected_p, interval
from probe.data import Questions
from probe.errors import ExpertError
from probe.targets import Scores

if TYPE_CHECKING:
    from activations_cache import Cache
    from probe.models import Model

__all__ = ["METHODS", "STATISTICS", "Routing", "attribute", "attribute_cache", "load"]

STATISTICS: dict[str, str] = {"gate_mass": "gate weight per token", "frequency": "share of tokens"}
"""Statistic to its unit."""

METHODS = ("routing",)
"""Ways to score experts."""

_SITES = ("router_logits", "expert_indices", "expert_weights")
_BLOCK = 1 << 16  # rows read at once


@dataclass(frozen=True)
class Routing:
    """Where the tokens of a data set were sent, per sequence.

    Attributes:
        layers: Layers with experts, in order.
        n_experts: Experts per layer.
        top_k: Experts per token.
        mass: Summed gate weight, [sequence, layer, expert].
        count: Tokens that chose the expert, [sequence, layer, expert].
        tokens: Tokens, [sequence].
        groups: The group of each sequence; its number where the cache has no column `group`.
        model_hash: Weights hash of the model.
    """

    layers: tuple[int, ...]
    n_experts: int
    top_k: int
    mass: Float[ndarray, "sequence layer expert"]
    count: Int[ndarray, "sequence layer expert"]
    tokens: Int[ndarray, " sequence"]
    groups: tuple[str, ...]
    model_hash: str = ""

    @classmethod
    def of(cls, cache: Cache, layers: int | Sequence[int] | None = None) -> Routing:
        """Read the routing out of a cache of `hook_router_logits`, `hook_expert_indices` and `hook_expert_weights`.

        Blocks of rows are read one after the other: memory is bounded by sequences x layers x experts.

        Raises:
            ExpertError: The cache holds no routing, or not that of these layers.
        """
        chosen = _layers_of(cache, layers)
        n_experts = cache[_name(chosen[0], "router_logits")].shape[1]
        sequence = np.asarray(cache.rows["sequence"])
        shape = (cache.n_sequences, len(chosen), n_experts)
        mass, count = np.zeros(shape), np.zeros(shape, dtype=np.int64)
        for i, layer in enumerate(chosen):
            for start in range(0, len(cache), _BLOCK):
                rows = slice(start, start + _BLOCK)
                index = cache[_name(layer, "expert_indices")][rows].numpy()  # [row, top_k]
                weight = cache[_name(layer, "expert_weights")][rows].double().numpy()  # [row, top_k]
                cell = (sequence[rows, None] * len(chosen) + i) * n_experts + index  # of the flattened arrays
                mass += np.bincount(cell.ravel(), weight.ravel(), minlength=mass.size).reshape(shape)
                count += np.bincount(cell.ravel(), minlength=mass.size).reshape(shape)
        tokens = np.bincount(sequence, minlength=cache.n_sequences)
        top_k = cache[_name(chosen[0], "expert_indices")].shape[1]
        return cls(tuple(chosen), n_experts, top_k, mass, count, tokens, _groups(cache), cache.model.weights_hash)

    def per_token(self, statistic: str) -> Float[ndarray, "sequence cell"]:
        """The statistic's mean over each sequence's tokens, a cell per layer and expert.

        Raises:
            ExpertError: An unknown statistic.
        """
        if statistic not in STATISTICS:
            raise ExpertError(f"statistic must be one of {', '.join(STATISTICS)}; got {statistic!r}")
        total = self.mass if statistic == "gate_mass" else self.count
        return (total / self.tokens[:, None, None]).reshape(len(self.tokens), -1)

    def cells(self) -> pd.DataFrame:
        """layer and expert of each cell."""
        grid = [(layer, expert) for layer in self.layers for expert in range(self.n_experts)]
        return pd.DataFrame(grid, columns=["layer", "expert"])


def load(cache: Cache, layers: int | Sequence[int] | None = None, *, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
    """How much each expert is used.

    Args:
        cache: A cache of the routing sites.
        layers: Layers; default all with experts.
        n_boot: Bootstrap replicates over the sequences' groups.
        seed: Of the bootstrap.

    Returns:
        Columns layer, expert, share (of tokens that choose it; sums to top_k over a layer), low, high (95 %),
        gate_mass, gate_mass_low, gate_mass_high, n (sequences), tokens.

    Raises:
        ExpertError: The cache holds no routing.
    """
    routing = Routing.of(cache, layers)
    table = routing.cells()
    for statistic, (mean, low, high) in {
        "frequency": ("share", "low", "high"),
        "gate_mass": ("gate_mass", "gate_mass_low", "gate_mass_high"),
    }.items():
        values = routing.per_token(statistic)
        got = group_means(values, routing.groups, n_boot=n_boot, seed=seed, weights=routing.tokens)
        table = table.assign(**{mean: got.mean, low: got.low, high: got.high})
    return table.assign(n=len(routing.tokens), tokens=int(routing.tokens.sum()))


def attribute(
    model: Model,
    forget: Questions | Any,
    retain: Questions | Any,
    *,
    layers: int | Sequence[int] | None = None,
    method: str = "routing",
    statistic: str = "gate_mass",
    positions: str = "all",
    cache_dir: str | Path | None = None,
    bos: bool | None = None,
    batch_tokens: int = 8192,
    n_permutations: int = 200,
    seed: int = 0,
    n_boot: int = 1000,
    progress: bool = True,
) -> Scores:
    """Score every expert by how much more the forget set is routed to it than the retain set.

    The routing of both sets is captured into activations caches and read back by `attribute_cache`.

    Args:
        model: A mixture of experts.
        forget: Questions (read as question, space, answer), or anything that `ac.capture` reads; a column `group` is
            the unit of intervals and permutations, else each text is its own.
        retain: The set to compare with, in the same form.
        layers: Layers; default all with experts.
        method: `"routing"`.
        statistic: `"gate_mass"` or `"frequency"`, see the module.
        positions: `"all"` tokens, or the `"last"` of each text.
        cache_dir: Keep the caches here, in `forget/` and `retain/`, and go on from them if they are there; None uses a
            temporary folder.
        bos: Whether a BOS token comes first; None leaves it to the tokenizer.
        batch_tokens: Padded tokens per forward.
        n_permutations: Permutations of the set labels for the null.
        seed: Of permutations and bootstrap.
        n_boot: Bootstrap replicates.
        progress: Show the captures' progress.

    Returns:
        As `attribute_cache`.

    Raises:
        ExpertError: A dense model, or an unknown method or statistic.
        DataError: An empty set (from `activations_cache.errors`).
    """
    import activations_cache as ac

    if method not in METHODS:
        raise ExpertError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if statistic not in STATISTICS:
        raise ExpertError(f"statistic must be one of {', '.join(STATISTICS)}; got {statistic!r}")
    names = routing_sites(model.sites, layers, type(model.hf).__name__)
    with ExitStack() as stack:
        folder = Path(cache_dir or stack.enter_context(tempfile.TemporaryDirectory(prefix="probe-routing-")))
        caches = [
            ac.capture(
                model, _documents(data), names, folder / name, positions=positions, dtype="float32", bos=bos,
                batch_tokens=batch_tokens, progress=progress,
            )
            for name, data in (("forget", forget), ("retain", retain))
        ]  # fmt: skip
        return attribute_cache(
            *caches, layers=layers, statistic=statistic, n_permutations=n_permutations, seed=seed, n_boot=n_boot
        )


def attribute_cache(
    forget: Cache,
    retain: Cache,
    *,
    layers: int | Sequence[int] | None = None,
    statistic: str = "gate_mass",
    n_permutations: int = 200,
    seed: int = 0,
    n_boot: int = 1000,
) -> Scores:
    """Score experts from caches of the routing of two sets.

    Means are over tokens; intervals are a bootstrap over groups within each set; the null permutes the set labels over
    groups, so it says what differences arise between two sets that are drawn alike.

    Args:
        forget: Cache of `hook_router_logits`, `hook_expert_indices`, `hook_expert_weights` on the forget set.
        retain: The same sites of the same model on the retain set.
        layers: Layers; default all that are cached.
        statistic: `"gate_mass"` or `"frequency"`.
        n_permutations: Permutations of the set labels; 0 for none.
        seed: Of permutations and bootstrap.
        n_boot: Bootstrap replicates.

    Returns:
        Scores of kind `"expert"` with columns layer, expert, site, score (forget - retain), low, high (95 %), forget,
        retain (the statistic on each set), twin_mean, twin_low, twin_high (of the permutations), p (corrected for the
        number of experts by the largest |difference| of each permutation), n (sequences of both sets). `.top(k)` is
        `Experts`. `.twins` holds the permutations' scores, [permutation, cell].

    Raises:
        ExpertError: No routing in a cache, caches of two models or of different layers, an unknown statistic.
    """
    sets = Routing.of(forget, layers), Routing.of(retain, layers)
    _check_alike(*sets)
    rng = np.random.default_rng(seed)
    table = _differences(sets, statistic, n_boot, rng)
    twins = _permuted(sets, statistic, n_permutations, rng) if n_permutations else None
    if twins is not None:
        low, high = interval(twins)
        p = corrected_p(np.abs(table["score"].to_numpy()), np.abs(twins).T)
        table = table.assign(twin_mean=twins.mean(0), twin_low=low, twin_high=high, p=p)
    settings = {"statistic": statistic, "seed": seed, "n_boot": n_boot, "n_permutations": n_permutations}
    return Scores(
        method="expert attribution by routing difference",
        kind="expert",
        table=table.assign(n=sum(len(routing.tokens) for routing in sets)),
        score_name=f"{statistic.replace('_', ' ')}, forget - retain",
        unit=STATISTICS[statistic],
        twins=twins,
        twins_note="the set labels permuted over groups",
        settings=settings | _facts(sets),
        model_hash=sets[0].model_hash,
    )


def _differences(sets: tuple[Routing, Routing], statistic: str, n_boot: int, rng: np.random.Generator) -> pd.DataFrame:
    """The statistic on each set, the difference, and its interval."""
    values = [routing.per_token(statistic) for routing in sets]
    means = [np.average(v, axis=0, weights=r.tokens) for v, r in zip(values, sets, strict=True)]
    score = means[0] - means[1]
    low = high = np.full_like(score, np.nan)
    if n_boot:
        draws = [group_draws(v, r.groups, n_boot, rng, r.tokens) for v, r in zip(values, sets, strict=True)]
        low, high = interval(draws[0] - draws[1])
    table = sets[0].cells()
    table["site"] = [_name(layer, "router_logits") for layer in table["layer"]]
    return table.assign(score=score, low=low, high=high, forget=means[0], retain=means[1])


def _facts(sets: tuple[Routing, Routing]) -> dict[str, Any]:
    """Sizes of the model and of both sets, and what to be careful about."""
    facts: dict[str, Any] = {"n_experts": sets[0].n_experts, "top_k": sets[0].top_k, "warnings": []}
    for name, routing in zip(("forget", "retain"), sets, strict=True):
        groups = len(set(routing.groups))
        facts |= {f"{name}_sequences": len(routing.tokens), f"{name}_groups": groups}
        facts[f"{name}_tokens"] = int(routing.tokens.sum())
        if groups < 2:
            facts["warnings"].append(f"the {name} set has one group: its sampling error is not in the interval")
    return facts


def routing_sites(sites: Sites, layers: int | Sequence[int] | None, model_class: str) -> list[str]:
    """Names of the routing sites.

    Raises:
        ExpertError: The model, or the layers asked for, have no experts.
    """
    known = [name for name in sites.names if name.endswith(tuple(f".mlp.hook_{kind}" for kind in _SITES))]
    if not known:
        raise ExpertError(
            f"{model_class} has no experts that can be seen: a mixture of experts (Mixtral, OLMoE, Qwen3-MoE, ...) is "
            "required. For a dense model use probe.patching or probe.probing"
        )
    inside = {site.layer for site in sites.resolve("blocks.*", layers)}
    chosen = [name for name in known if sites[name].layer in inside]
    if not chosen:
        with_experts = sorted({layer for name in known if (layer := sites[name].layer) is not None})
        raise ExpertError(f"layers {layers} of {model_class} have no experts; those with experts are {with_experts}")
    return chosen


def _documents(data: Any) -> Any:
    """Questions as texts with their group; anything else as it is."""
    if not isinstance(data, Questions):
        return data
    return [{"text": f"{row.question} {row.answer}", "group": row.group, "id": row.id} for row in data]


def _name(layer: int, kind: str) -> str:
    return f"blocks.{layer}.mlp.hook_{kind}"


def _layers_of(cache: Cache, layers: int | Sequence[int] | None) -> list[int]:
    """Layers whose routing the cache holds, restricted to those asked for."""
    held = [int(site.split(".")[1]) for site in cache.sites if site.endswith(".mlp.hook_expert_indices")]
    full = sorted(layer for layer in held if all(_name(layer, kind) in cache for kind in _SITES))
    if not full:
        raise ExpertError(
            f"{cache.path} holds no routing; capture the sites {', '.join(f'blocks.*.mlp.hook_{k}' for k in _SITES)}"
        )
    wanted = full if layers is None else [layers] if isinstance(layers, int) else sorted(set(layers))
    missing = [layer for layer in wanted if layer not in full]
    if missing or not wanted:
        raise ExpertError(f"{cache.path} holds the routing of layers {full}; asked for {wanted}")
    return wanted


def _groups(cache: Cache) -> tuple[str, ...]:
    if "group" in cache.sequences:
        return tuple(str(group) for group in cache.sequences["group"])
    return tuple(str(i) for i in range(cache.n_sequences))


def _check_alike(forget: Routing, retain: Routing) -> None:
    if forget.model_hash != retain.model_hash:
        raise ExpertError(
            "the two caches are of different models (weights "
            f"{forget.model_hash[:12]} and {retain.model_hash[:12]}); capture both sets from one model"
        )
    if forget.layers != retain.layers:
        raise ExpertError(f"the two caches hold different layers: {forget.layers} and {retain.layers}; pass layers=")


def _permuted(
    sets: tuple[Routing, Routing], statistic: str, n: int, rng: np.random.Generator
) -> Float[ndarray, "permutation cell"]:
    """Scores under permuted set labels. A unit is a group within a set; each keeps its tokens."""
    totals, masses = [], []
    for routing in sets:
        group = codes(routing.groups)
        weighted = routing.per_token(statistic) * routing.tokens[:, None]  # [sequence, cell]
        total = np.zeros((int(group.max()) + 1, weighted.shape[1]))
        np.add.at(total, group, weighted)
        totals.append(total)
        masses.append(np.bincount(group, weights=routing.tokens))
    total, mass = np.concatenate(totals), np.concatenate(masses)  # [unit, cell], [unit]
    label = np.arange(len(mass)) < len(masses[0])
    drawn = np.stack([rng.permutation(label) for _ in range(n)]).astype(float)  # [permutation, unit]
    first = (drawn @ total) / (drawn @ mass)[:, None]
    second = ((1 - drawn) @ total) / ((1 - drawn) @ mass)[:, None]
    return first - second
