"""Reading and intervening: `hooked`, the context manager, and `run`, one forward that stops as early as it may."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from activations_cache.errors import SiteError
from activations_cache.sites._types import Site
from activations_cache.sites.adapter import bare
from activations_cache.sites.catalogue import Patterns, Sites, sites_of
from activations_cache.sites.taps import Callback, Handle

Intervention = Callable[[Tensor, Site], Tensor | None]
Interventions = Mapping[str, Intervention]


@dataclass
class Run:
    """What `run` returns.

    Attributes:
        values: per site name its value, `[batch, pos, *shape]`, after the interventions on it.
        logits: `[batch, pos, d_vocab]`; None where the forward was stopped before the head.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    logits: Float[Tensor, "batch pos d_vocab"] | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]


class _Stop(BaseException):
    """Ends a forward from inside a hook. Not an `Exception`, so that no handler in a model's own code takes it."""


@contextmanager
def hooked(model: Any, functions: Interventions) -> Iterator[Sites]:
    """While active, every forward of the model calls the functions on the values of their sites.

    A function is called as `fn(value, site)` and returns None to read, or a tensor of the same shape to put in place
    of the value for everything that follows. `value` may be the model's own tensor: do not change it in place, and
    clone what is kept beyond the forward (`run` does both). Hooks run in forward order; several functions on one site
    (by its name, an alias or a pattern) run in the order given, each on what the one before returned.

    Everything is removed on the way out, also after an exception. Hooking an attention pattern switches the model to
    eager attention meanwhile (see `activations_cache.sites.pattern`). A replaced `hook_resid_mid` changes the residual
    stream itself, so both the MLP and the skip connection around it, as in HookedTransformer (in TransformerBridge 3.9
    only the MLP sees it). Replaced router logits are routed anew.

    Args:
        model: a Hugging Face model, or anything whose `.hf` is one.
        functions: per site name, alias or pattern its function.

    Yields:
        The model's `Sites`.

    Raises:
        SiteError: for an unknown site, or a replacement of another shape.
        ModelError: if the model's sites cannot be named.

    Example:
        >>> def zero(value, site):
        ...     return torch.zeros_like(value)
        >>> with hooked(model, {"blocks.0.attn.hook_z": zero}):         # doctest: +SKIP
        ...     logits = model(**inputs).logits
    """
    with _hooked(sites_of(model), list(functions.items())) as sites:
        yield sites


@contextmanager
def _hooked(sites: Sites, functions: Sequence[tuple[str | Site, Intervention]]) -> Iterator[Sites]:
    """`hooked` with a list, in which a site may come several times."""
    chains: dict[str, list[Intervention]] = {}
    for pattern, function in functions:
        for site in sites.resolve(pattern):
            chains.setdefault(site.name, []).append(function)
    handles: list[Handle] = []
    try:
        for name in sorted(chains, key=sites.order):
            site = sites[name]
            handles += sites.tap(site).attach(_chain(chains[name], site))
        yield sites
    finally:
        for handle in reversed(handles):
            handle.remove()


def _chain(functions: list[Intervention], site: Site) -> Callback:
    """One callback that runs the functions one after the other, None if none of them replaced the value."""

    def call(value: Tensor) -> Tensor | None:
        current, replaced = value, False
        for function in functions:
            new = function(current, site)
            if new is not None:
                current, replaced = new, True
        return current if replaced else None

    return call


class _Reader:
    """Collects the values that `run` returns and ends the forward once it has them all."""

    def __init__(self, wanted: list[Site], stop: bool) -> None:
        self.values: dict[str, Tensor] = {site.name: None for site in wanted}  # type: ignore[misc]  # forward order
        self.missing = {site.name for site in wanted}
        self.stop = stop and bool(wanted)

    def __call__(self, value: Tensor, site: Site) -> Tensor | None:
        # With gradients the value must stay the tensor that the model goes on with, so that autograd can differentiate
        # with respect to it; without them a copy is safe from whatever the model does in place later, and holds no
        # larger tensor alive.
        differentiable = value.requires_grad
        self.values[site.name] = value if differentiable else value.detach().clone()
        self.missing.discard(site.name)
        if self.stop and not self.missing:
            raise _Stop
        return value if differentiable else None


def run(
    model: Any,
    inputs: Mapping[str, Tensor],
    read: Patterns = (),
    interventions: Interventions | None = None,
    stop: bool = True,
) -> Run:
    """One forward pass: read some sites, intervene on others.

    Under `torch.no_grad` the values are copies, safe from anything that happens later. With gradients enabled they are
    the tensors of the graph: `torch.autograd.grad(metric, run.values[name])` gives the gradient at a site.

    Args:
        model: a Hugging Face model, or anything whose `.hf` is one. Mode, device and gradients are the caller's.
        inputs: passed on as they are (`input_ids`, `attention_mask`, ...); `use_cache=False` is added where unset.
            Left-padded ids need their `attention_mask`.
        read: names or patterns of sites to return.
        interventions: per site name or pattern `fn(value, site) -> Tensor | None`, as in `hooked`. Where a site is
            both changed and read, the changed value is returned.
        stop: end the forward after the last site that is read. Nothing is stopped if nothing is read.

    Returns:
        The values in forward order, and the logits if the forward was not stopped.

    Raises:
        SiteError: for an unknown site, a replacement of another shape, or a site that this forward did not reach.
        ModelError: if the model's sites cannot be named.
    """
    hf, sites = bare(model), sites_of(model)
    wanted = sites.resolve(read) if read else []
    reader = _Reader(wanted, stop)
    functions: list[tuple[str | Site, Intervention]] = [*(interventions or {}).items(), *((s, reader) for s in wanted)]
    logits: Tensor | None = None
    with _hooked(sites, functions):
        try:
            logits = hf(**{"use_cache": False, **inputs}).logits
        except _Stop:
            logits = None
    if reader.missing:
        raise SiteError(f"the forward did not reach {sorted(reader.missing)}: these modules did not run for this input")
    return Run(reader.values, logits)
