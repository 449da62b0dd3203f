"""SAE latents as components: which of them tell two label sets apart, and what they fire on.

    found = probe.features.latents(cache, site, sae, "split", positive="forget", group="person")
    found.top(8)                                                    # Latents, with their decoder rows and evidence
    probe.features.contexts(cache, site, sae, found.best.latent, tokenizer=model.tokenizer)

Training and scoring on activations alone is in the package `saes`.
"""

from __future__ import annotations

from probe.features._contexts import Context, Contexts, contexts
from probe.features._latents import latents

__all__ = ["Context", "Contexts", "contexts", "latents"]
