"""`Sites`: what one model has, by name, by pattern and by layer."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import nn

from activations_cache.errors import SiteError
from activations_cache.sites import absent
from activations_cache.sites._types import Dims, Site
from activations_cache.sites.adapter import bare
from activations_cache.sites.layout import Layout, enumerate_sites, fused_tap
from activations_cache.sites.taps import Tap

if TYPE_CHECKING:
    from activations_cache.sites.writers import Components

Patterns = str | Site | Iterable[str | Site]
Layers = int | Sequence[int] | None


class Sites:
    """The sites of a Hugging Face model, named as TransformerLens names them.

    Args:
        model: a causal language model of transformers, or anything whose `.hf` is one. It is not changed.

    Raises:
        ModelError: if it is no such model, or TransformerLens has no adapter for its architecture.

    Example:
        >>> S = Sites(model)                                            # doctest: +SKIP
        >>> S["blocks.0.attn.hook_z"].shape                             # doctest: +SKIP
        (4, 16)
        >>> [s.name for s in S.resolve("blocks.*.hook_resid_post", layers=[0, -1])]   # doctest: +SKIP
        ['blocks.0.hook_resid_post', 'blocks.11.hook_resid_post']
    """

    def __init__(self, model: Any) -> None:
        self.layout = Layout(bare(model))
        self._sites: dict[str, Site] = {}
        self._taps: dict[str, Tap] = {}
        for site, tap in enumerate_sites(self.layout):
            self._sites[site.name] = site
            if tap is not None:
                self._taps[site.name] = tap
        self._order = {name: i for i, name in enumerate(self._sites)}
        self._alias = {alias: site for site in self._sites.values() for alias in site.aliases}

    @property
    def names(self) -> tuple[str, ...]:
        """All site names in forward order."""
        return tuple(self._sites)

    @property
    def dims(self) -> Dims:
        """The model's sizes."""
        return self.layout.dims

    @cached_property
    def modules(self) -> tuple[Components, ...]:
        """Per layer the names and orientations of its matrices, for editors: `components(model, layer)` of each."""
        from activations_cache.sites.writers import components

        return tuple(components(self.layout.hf, layer) for layer in range(self.dims.n_layers))

    def __len__(self) -> int:
        return len(self._sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites.values())

    def __contains__(self, name: object) -> bool:
        return name in self._sites or name in self._alias

    def __getitem__(self, name: str) -> Site:
        site = self._sites.get(name) or self._alias.get(name)
        if site is None:
            raise self._unknown(name)
        return site

    def __repr__(self) -> str:
        kinds = dict.fromkeys(site.kind for site in self)
        return f"Sites({type(self.layout.hf).__name__}, {self.dims.n_layers} layers: {', '.join(kinds)})"

    def resolve(self, patterns: Patterns, layers: Layers = None) -> list[Site]:
        """Sites by name, alias or pattern, in forward order, each once.

        Args:
            patterns: names; `*` stands for any text, e.g. `blocks.*.hook_resid_post`, `*hook_z`.
            layers: keep only these layers (negative from the end). Sites outside the blocks stay if named in full.

        Raises:
            SiteError: for a name or pattern that matches nothing, with the near names; for a layer that is not there;
                if nothing is left.
        """
        items = [patterns] if isinstance(patterns, str | Site) else list(patterns)
        keep = self.layer_set(layers)
        found: dict[str, Site] = {}
        for item in items:
            wildcard = isinstance(item, str) and "*" in item
            for site in [item] if isinstance(item, Site) else self._match(item):
                inside = site.layer in keep if site.layer is not None else layers is None or not wildcard
                if inside:
                    found[self[site.name].name] = self[site.name]
        if not found:
            raise SiteError(f"no site is left of {[str(i) for i in items]} at layers {layers}; name at least one")
        return sorted(found.values(), key=self.order)

    def order(self, site: Site | str) -> int:
        """Position of a site in the forward pass."""
        return self._order[str(site)]

    def tap(self, site: Site) -> Tap:
        """The tap that reads and writes `site`."""
        name = self[site.name].name
        if name not in self._taps:
            self._taps[name] = fused_tap(self.layout, site)
        return self._taps[name]

    def _match(self, pattern: str) -> list[Site]:
        if "*" not in pattern:
            return [self[pattern]]
        found = [site for name, site in self._sites.items() if fnmatchcase(name, pattern)]
        if not found:  # a pattern of aliases: there `*` stays between dots, or `blocks.*.hook_out` would match too much
            segment = re.compile(re.escape(pattern).replace(r"\*", r"[^.]*"))
            found = [site for name, site in self._alias.items() if segment.fullmatch(name)]
        if not found:
            raise self._unknown(pattern)
        return found

    def layer_set(self, layers: Layers) -> set[int]:
        """Layers as non-negative numbers: all for None.

        Raises:
            SiteError: for a layer that is not there.
        """
        n = self.dims.n_layers
        if layers is None:
            return set(range(n))
        wanted = [layers] if isinstance(layers, int) else [int(layer) for layer in layers]
        for layer in wanted:
            if not -n <= layer < n:
                raise SiteError(f"layer {layer} does not exist: the model has layers 0 to {n - 1}")
        return {layer % n for layer in wanted}

    def _unknown(self, name: str) -> SiteError:
        why = absent.reason(self.layout, str(name))
        if why is not None:
            return SiteError(f"{type(self.layout.hf).__name__} has no site {str(name)!r}: {why}")
        known = [*self._sites, *self._alias]
        near = difflib.get_close_matches(str(name), known, n=4, cutoff=0.5)
        number = re.match(r"blocks\.(-?\d+)\.", str(name))
        if number and not 0 <= int(number[1]) < self.dims.n_layers:
            hint = f"the model has layers 0 to {self.dims.n_layers - 1}"
        elif near:
            hint = f"near names: {', '.join(near)}"
        else:
            hint = f"sites of this model: {', '.join(known[:6])}, ..."
        return SiteError(f"{type(self.layout.hf).__name__} has no site {str(name)!r}; {hint}")


_HOLDER = "_activations_cache_sites"  # attribute of the model that keeps its catalogue


class _Holder:
    """Keeps a model's `Sites` on the model, so that they are dropped together; a copy of the model gets none."""

    def __init__(self, sites: Sites | None = None) -> None:
        self.sites = sites
        self.structure = () if sites is None else structure(sites.layout.hf)

    def __deepcopy__(self, memo: Any) -> _Holder:
        return _Holder()

    def __reduce__(self) -> tuple[type[_Holder], tuple[()]]:
        return _Holder, ()

    def valid_for(self, hf: nn.Module) -> bool:
        """Whether the catalogue is of this model with the modules, and the numbers of experts, that it has now."""
        return self.sites is not None and self.sites.layout.hf is hf and self.structure == structure(hf)


def structure(hf: nn.Module) -> tuple[int, ...]:
    """What a catalogue depends on: which modules there are, and the sizes of their stacked parameters."""
    found: list[int] = []
    for module in hf.modules():
        found.append(id(module))
        found += [p.shape[0] for p in module._parameters.values() if p is not None and p.ndim == 3]
    return tuple(found)


def sites_of(model: Any) -> Sites:
    """The `Sites` of a model, made once per model and again if its modules or experts have changed.

    Raises:
        ModelError: as `Sites` does.
    """
    hf = bare(model)
    holder = hf.__dict__.get(_HOLDER)
    if not isinstance(holder, _Holder) or not holder.valid_for(hf):
        holder = hf.__dict__[_HOLDER] = _Holder(Sites(hf))
    assert holder.sites is not None
    return holder.sites
