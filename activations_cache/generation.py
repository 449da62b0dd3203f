"""Generation, and the activations of what is generated.

`generate` continues prompts; `capture_generation` does so and stores activations of prompt and generated tokens in an
ordinary cache, with the model's log-probability of each token. It works in two phases, each crash-safe by itself:

1. Token ids: batches of prompts, planned by length in advance, each committed to the cache's folder `generations`.
2. Activations: one ordinary capture over prompt and generated ids together.

Why a second forward, when the model has just computed these activations? While it generates, a batch shrinks and grows
with what its rows say, and a key-value cache grows with each step; which products are computed together, and so the
last bits of the floats, would depend on where a run was interrupted. The capture's batches are fixed by the data and
the settings, so that a resumed cache equals an uninterrupted one byte by byte, shards and statistics included. The
values are those of decoding up to rounding (tests hold them against hooks on the decoding itself: 1e-5 in float32).
The price is one forward without a cache over all tokens, a small part of what the decoding took. And it gives what
decoding never computes: the activations of the last generated token, which no step reads.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from activations_cache import hashing, store
from activations_cache import sites as site_catalogue
from activations_cache._capture import capture
from activations_cache._decoding import Decoding
from activations_cache._device import move
from activations_cache._generation_parallel import run_shared
from activations_cache._generation_plan import Asked, Plan, check_settings, prepare, strings
from activations_cache._generation_run import run_in_folder, run_in_memory
from activations_cache._generations import FOLDER, Generation, Generations
from activations_cache._job import cacheable_sites, check_counts
from activations_cache._parallel import world
from activations_cache.cache import Cache
from activations_cache.errors import CacheError, DataError

__all__ = ["Generation", "Generations", "capture_generation", "generate"]

Part = Literal["all", "generated", "prompt", "last"]


def generate(
    model: Any,
    prompts: Any,
    *,
    tokenizer: Any = None,
    max_new_tokens: int = 64,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    n_samples: int = 1,
    seed: int = 0,
    eos: bool | int | Sequence[int] = True,
    stop_strings: str | Sequence[str] = (),
    batch_tokens: int = 8192,
    max_length: int | None = None,
    bos: bool | None = None,
    chat: bool = False,
    columns: Sequence[str] | None = None,
    text_column: str = "text",
    out: str | Path | None = None,
    resume: bool = True,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Generations:
    """Continue prompts with a model.

    Nothing of the model's `generation_config` acts but its end-of-sequence ids: no penalty, temperature or length that
    was not asked for here. Greedy decoding takes the most probable token; sampling draws from the distribution after
    temperature, then top_k, then top_p, with draws that depend on the seed, the prompt's number and the sample's number
    alone. Batches are left-padded; a padded row's logits are those of the prompt alone up to rounding, so that another
    `batch_tokens` can change a token only where two are as good as equal. The same call gives the same tokens on one
    machine.

    With `out`, every batch is durable once it is done: killed at any moment, the same call goes on and ends with the
    same generations as a run that was never interrupted. And with `out`, processes that torchrun or accelerate launch
    started together share the batches, each returning all of the result; without, each generates everything.

    Args:
        model: A Hugging Face causal language model, or anything with one as `.hf` (and perhaps `.tokenizer`, `.name`).
            It is put in eval mode meanwhile; then each module gets its own mode back.
        prompts: Whatever `read_documents` takes: texts or token ids, in memory or in a file.
        tokenizer: By default `model.tokenizer`. Without one, prompts are token ids and no text comes back.
        max_new_tokens: Longest continuation, in tokens, an end-of-sequence token included.
        do_sample: Draw tokens; False decodes greedily.
        temperature: Divides the logits before sampling; above 0.
        top_p: Sample from the fewest tokens that together have this probability; 1.0 keeps all.
        top_k: Sample from this many most probable tokens; 0 keeps all.
        n_samples: Continuations per prompt, which needs do_sample=True if it is more than 1.
        seed: Of the draws, 0 or above.
        eos: Token ids that end a continuation: True takes those of the model's generation config, else of its config,
            else of the tokenizer; False none; or ids of your own.
        stop_strings: Texts that end a continuation with the token that completes one; the text keeps it.
        batch_tokens: Padded tokens per batch, prompt and max_new_tokens together.
        max_length: Longest prompt and continuation together; None is the model's context. A prompt is never cut: one
            that leaves no room for max_new_tokens is refused.
        bos: As in `tokenize`.
        chat: As in `tokenize`.
        columns: Label columns to keep; None keeps all whose values are strings, numbers or booleans. A column may not
            have a name that a cache or a table of generations uses itself.
        text_column: The column of the data that holds the prompts.
        out: A folder for the generations; None keeps them in memory alone.
        resume: Go on with what the folder holds of the same call. False refuses a folder that holds any.
        device: Move the model there first; None leaves it where it is.
        progress: Show a progress bar over the batches.

    Returns:
        The continuations, in the order of the prompts, samples of one prompt side by side.

    Raises:
        DataError: Unusable prompts or settings; a prompt that with max_new_tokens is longer than max_length.
        ModelError: A model that cannot generate; no memory for a batch.
        NumericsError: A logit is NaN or infinite.
        CacheMismatchError: `out` holds generations of another model, other prompts or other settings.
        CacheLockedError: Another process is writing there.
        CacheError: `out` holds something else, or cannot be written; it holds generations and resume=False.
        CorruptCacheError: A file in `out` was altered.

    Warns:
        UserWarning: Columns were left out because no cache can hold them; `out` was begun with other library versions.

    Cost: one forward with a key-value cache per new token and batch; the batch runs until its last row ends.
    """

    def plan() -> Plan:
        chosen = (max_new_tokens, do_sample, float(temperature), float(top_p), top_k, seed)
        decoding = Decoding(*chosen, eos=(), stop_strings=strings(stop_strings))
        check_settings(decoding, n_samples, batch_tokens)
        check_counts({"batch_tokens": batch_tokens, "max_length": max_length})
        if device is not None:
            move(hashing.hf_model(model), device)
        asked = Asked(model, tokenizer, prompts, decoding, n_samples, eos, batch_tokens, max_length, bos, chat)
        return prepare(asked, columns, text_column, progress)

    if out is None:
        return run_in_memory(plan(), progress)
    together = world()
    if together is None:
        return run_in_folder(plan(), Path(out), resume, progress)
    return run_shared(together, plan, Path(out), resume, progress)


def capture_generation(
    model: Any,
    prompts: Any,
    sites: str | Sequence[str],
    out: str | Path,
    *,
    tokenizer: Any = None,
    max_new_tokens: int = 64,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    n_samples: int = 1,
    seed: int = 0,
    eos: bool | int | Sequence[int] = True,
    stop_strings: str | Sequence[str] = (),
    max_length: int | None = None,
    bos: bool | None = None,
    chat: bool = False,
    columns: Sequence[str] | None = None,
    text_column: str = "text",
    positions: Part = "all",
    pool: Literal["mean"] | None = None,
    logprobs: bool = True,
    batch_tokens: int = 8192,
    resume: bool = True,
    device: torch.device | str | None = None,
    progress: bool = True,
    **capture_settings: Any,
) -> Cache:
    """Continue prompts, and store activations of prompt and generated tokens with their log-probabilities.

    The sequences of the cache are prompt and continuation end to end. Per row: `sequence`, `position`, `generated`
    (whether the model generated this token), `logprob` (the model's own log p(token | all before it) in natural
    logarithms, whatever it was sampled by; NaN for a sequence's first token), and when sampled `sampling_logprob`
    (after temperature, top_k and top_p; NaN over the prompt). Per sequence: the prompts' label columns, `prompt` and
    `sample` (numbers), `prompt_tokens`, `finish`. The texts are in `Generations.load(out)`.

    A row holds what the model computes when it reads that token. So what predicted a generated token is in the row
    before it; and the last generated token's row was never computed while generating.

    Killed in either phase, the same call goes on, and ends with the same bytes as an uninterrupted one.

    Args:
        model: As in `generate`.
        prompts: As in `generate`.
        sites: As in `capture`.
        out: The cache directory; its folder `generations` holds what was generated.
        tokenizer: As in `generate`.
        max_new_tokens: As in `generate`; so are all arguments to `text_column`.
        positions: The rows to store: "all", those of "generated" tokens, of the "prompt", or the "last" token's.
        pool: None, or "mean": one row per sequence, the mean over these positions.
        logprobs: Store `logprob`; the forward then runs through to the logits.
        batch_tokens: Padded tokens per batch of either phase.
        resume: As in `generate` and `capture`.
        device: As in `generate`.
        progress: As in `generate`.
        **capture_settings: Further arguments of `capture` (`dtype`, `shard_rows`, `compression`, ...).

    Returns:
        The finished cache, opened.

    Raises:
        DataError, SiteError, ModelError, NumericsError, CacheError: As `generate` and `capture`. Unknown sites and
            positions are found before anything is generated.
    """
    _check_capture(model, sites, positions, capture_settings | {"max_length": max_length, "batch_tokens": batch_tokens})
    place = Path(out)
    _check_place(place, resume)
    made = generate(
        model, prompts, tokenizer=tokenizer, max_new_tokens=max_new_tokens, do_sample=do_sample,
        temperature=temperature, top_p=top_p, top_k=top_k, n_samples=n_samples, seed=seed, eos=eos,
        stop_strings=stop_strings, batch_tokens=batch_tokens, max_length=max_length, bos=bos, chat=chat,
        columns=columns, text_column=text_column, out=place / FOLDER, resume=resume, device=device, progress=progress,
    )  # fmt: skip
    chosen = made.spans(positions) if positions in ("generated", "prompt") else positions
    return capture(
        model, made.documents(), sites, place, tokenizer=tokenizer, positions=chosen, pool=pool, logprobs=logprobs,
        batch_tokens=batch_tokens, max_length=max_length, columns=list(made.labels()),
        token_columns=list(made.token_columns()), overflow="error", resume=resume, progress=progress,
        **capture_settings,
    )  # fmt: skip


# --- before a capture -----------------------------------------------------------------------------------------------


def _check_capture(model: Any, sites: str | Sequence[str], positions: Any, settings: Mapping[str, Any]) -> None:
    """Find what the capture would refuse before an hour of generation, not after."""
    if positions not in ("all", "generated", "prompt", "last"):
        raise DataError(f"positions must be 'all', 'generated', 'prompt' or 'last'; got {positions!r}")
    unknown = sorted(set(settings) - set(inspect.signature(capture).parameters))
    if unknown:
        raise TypeError(f"capture_generation() got an unexpected keyword argument {unknown[0]!r}")
    own = sorted({"data", "columns", "token_columns", "overflow", "n_tokens"} & set(settings))
    if own:
        raise DataError(f"{', '.join(own)} cannot be given: capture_generation sets it from what was generated")
    check_counts(settings)
    cacheable_sites(site_catalogue.Sites(model), sites)


def _check_place(out: Path, resume: bool) -> None:
    """Refuse a directory that the capture would refuse when all is generated."""
    if not out.exists():
        return
    if not out.is_dir():
        raise CacheError(f"{out} is a file; a directory for the cache is required")
    names = {path.name for path in out.iterdir() if not path.name.endswith(store.PARTIAL)} - {store.LOCK, FOLDER}
    if store.MANIFEST in names and not resume:
        raise CacheError(
            f"{out} already holds a cache, and resume=False: nothing is overwritten. Choose another directory, delete "
            "this one yourself, or pass resume=True"
        )
    if names and store.MANIFEST not in names:
        shown = ", ".join(sorted(names)[:3])
        raise CacheError(f"{out} is not empty ({shown}) and holds no cache; choose an empty or new directory")
