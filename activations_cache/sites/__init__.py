"""Sites: the named places in the forward pass of a bare Hugging Face model, for reading and intervening.

    from activations_cache import sites

    S = sites.Sites(model)                                              # what is there
    S.resolve("blocks.*.hook_resid_post", layers=[0, -1])
    out = sites.run(model, inputs, read="blocks.3.hook_resid_post")     # stops after block 3
    out.values["blocks.3.hook_resid_post"]                              # [batch, pos, d_model]
    with sites.hooked(model, {"blocks.0.attn.hook_z": fn}):             # fn(value, site) -> Tensor | None
        model(**inputs)
    sites.writers(model)                                                # every parameter that writes to the residual

Names, and the map from names to Hugging Face modules, are TransformerLens's; the hooks are torch's own, on the model as
it is. `q`, `k` and `v` are the outputs of the projections, before any norm and rotation; `z` is the input of W_O;
`attn_out` and `mlp_out` are what is added to the residual stream, so after the post-norm where there is one.
"""

from __future__ import annotations

from activations_cache.sites._types import Dims, Site
from activations_cache.sites.catalogue import Sites
from activations_cache.sites.hooks import Run, hooked, run
from activations_cache.sites.writers import Components, Weight, Writer, components, writers

__all__ = ["Components", "Dims", "Run", "Site", "Sites", "Weight", "Writer", "components", "hooked", "run", "writers"]
