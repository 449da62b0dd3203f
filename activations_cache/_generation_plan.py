"""A run of `generate` decided in full before the first token: prompts, batches, settings, and the manifest."""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from activations_cache import hashing, store
from activations_cache import sites as site_catalogue
from activations_cache._decoding import Decoding, Prompt, decode_batch
from activations_cache._device import input_device
from activations_cache._generations import OWN_COLUMNS, Generation, Labelled
from activations_cache.documents import Column, read_documents, storable_columns, tokenize, unstorable_columns
from activations_cache.errors import DataError, ModelError


@dataclass(frozen=True)
class Asked:
    """The arguments of `generate` that the plan depends on; see there."""

    model: Any
    tokenizer: Any
    prompts: Any
    decoding: Decoding
    n_samples: int
    eos: bool | int | Sequence[int]
    batch_tokens: int
    max_length: int | None
    bos: bool | None
    chat: bool


@dataclass(frozen=True)
class Plan:
    """A run of `generate`, decided: who shares a batch with whom, and how tokens are chosen."""

    hf: Any
    tokenizer: Any
    decoding: Decoding
    batches: tuple[tuple[Prompt, ...], ...]
    columns: dict[str, Column]
    manifest: dict[str, Any]

    @property
    def identity(self) -> str:
        """What another run must have to be this one."""
        return str(self.manifest["identity"])

    def run(self, number: int) -> list[Labelled]:
        """Generate one batch; `alone` must hold around it."""
        made = decode_batch(self.hf, self.tokenizer, self.batches[number], self.decoding)
        return [(row, self._labels(row)) for row in made]

    def _labels(self, row: Generation) -> dict[str, Any]:
        return {name: column.values[row.prompt] for name, column in self.columns.items()}


def strings(stop_strings: str | Sequence[str]) -> tuple[str, ...]:
    made = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
    if not all(isinstance(text, str) and text for text in made):
        raise DataError(f"stop_strings must be texts that are not empty; got {stop_strings!r}")
    return made


def check_settings(decoding: Decoding, n_samples: int, batch_tokens: int) -> None:
    """Refuse settings out of range, and those that would have no effect."""
    least = {"max_new_tokens": (decoding.max_new_tokens, 1), "n_samples": (n_samples, 1)}
    least |= {"batch_tokens": (batch_tokens, 1), "top_k": (decoding.top_k, 0), "seed": (decoding.seed, 0)}
    for name, (value, lowest) in least.items():
        if not isinstance(value, int) or value < lowest:
            raise DataError(f"{name} must be an integer of {lowest} or above; got {value!r}")
    if not 0.0 < decoding.temperature < float("inf"):
        raise DataError(f"temperature must be above 0; got {decoding.temperature} (do_sample=False decodes greedily)")
    if not 0.0 < decoding.top_p <= 1.0:
        raise DataError(f"top_p must be above 0 and at most 1; got {decoding.top_p}")
    drawn = {"temperature": decoding.temperature != 1.0, "top_p": decoding.top_p != 1.0, "top_k": decoding.top_k != 0}
    drawn["n_samples"] = n_samples > 1
    idle = [name for name, given in drawn.items() if given]
    if idle and not decoding.do_sample:
        raise DataError(f"{', '.join(idle)} would have no effect on greedy decoding: pass do_sample=True, or leave out")


def prepare(asked: Asked, wanted: Sequence[str] | None, text_column: str, progress: bool) -> Plan:
    """Read the prompts, check that each has room, plan the batches and write down what the run is."""
    hf, catalogue = hashing.hf_model(asked.model), site_catalogue.Sites(asked.model)
    if not callable(getattr(hf, "generate", None)) or getattr(hf, "generation_config", None) is None:
        raise ModelError(f"a model with a `generate` of transformers is required; {type(hf).__name__} has none")
    tokenizer = getattr(asked.model, "tokenizer", None) if asked.tokenizer is None else asked.tokenizer
    if asked.decoding.stop_strings and tokenizer is None:
        raise DataError("stop_strings need a tokenizer: pass tokenizer=")
    documents = read_documents(asked.prompts, text_column)
    columns = _columns(documents.columns, wanted)
    tokens = tokenize(tokenizer, documents, bos=asked.bos, chat=asked.chat, progress=progress)
    ids = [tuple(np.asarray(row).tolist()) for row in tokens.input_ids]
    _check_ids(ids, catalogue.dims.d_vocab)
    _check_room(ids, asked, catalogue.dims.n_ctx)
    decoding = replace(asked.decoding, eos=_eos(asked.eos, hf, tokenizer, catalogue.dims.d_vocab))
    rows = [Prompt(number, sample, row) for number, row in enumerate(ids) for sample in range(asked.n_samples)]
    batches = tuple(plan_batches(rows, decoding.max_new_tokens, asked.batch_tokens))
    facts = _facts(asked, hf, tokenizer, decoding, ids, columns, batches)
    manifest = {
        "identity": store.json_digest(facts),
        "facts": facts,
        "plan": {"batches": len(batches), "prompts": len(ids), "rows": len(rows)},
        "libraries": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers")},
        "machine": {"device": str(input_device(hf)), "threads": torch.get_num_threads()},
    }
    return Plan(hf, tokenizer, decoding, batches, columns, manifest)


def _columns(columns: Mapping[str, Sequence[Any]], wanted: Sequence[str] | None) -> dict[str, Column]:
    """Label columns that a cache can hold, none under a name that generations use themselves."""
    kept = storable_columns(columns, wanted)
    taken = [name for name in kept if name in OWN_COLUMNS]
    if taken:
        raise DataError(
            f"column {taken[0]!r} has a name that generations use themselves ({', '.join(OWN_COLUMNS)}): rename it in "
            "the data, or leave it out by naming the columns to keep with columns="
        )
    if wanted is None and (dropped := unstorable_columns(columns)):
        reasons = "; ".join(f"{name!r}: {reason}" for name, reason in dropped.items())
        warnings.warn(f"columns left out, no labels can be had of them: {reasons}", stacklevel=5)
    return kept


def _check_ids(ids: Sequence[Sequence[int]], d_vocab: int) -> None:
    for number, row in enumerate(ids):
        if max(row) >= d_vocab:
            raise DataError(
                f"prompt {number} holds token id {max(row)}; the model's vocabulary ends at {d_vocab - 1}. "
                "Is this another model's tokenizer?"
            )


def _check_room(ids: Sequence[Sequence[int]], asked: Asked, n_ctx: int) -> None:
    """A prompt is never cut: its end is what is continued, and its beginning may be what it is about."""
    limit = n_ctx if asked.max_length is None else asked.max_length
    if limit < 1 or (n_ctx and limit > n_ctx):
        raise DataError(f"max_length must be from 1 to the model's context of {n_ctx} tokens; got {limit}")
    new = asked.decoding.max_new_tokens
    full = [number for number, row in enumerate(ids) if len(row) + new > limit]
    if full:
        length = len(ids[full[0]])
        others = f" ({len(full)} prompts are too long)" if len(full) > 1 else ""
        raise DataError(
            f"prompt {full[0]} has {length} tokens; with max_new_tokens={new} that makes {length + new}, and "
            f"{limit} are allowed{others}. Shorten the prompt, or ask for at most {max(limit - length, 0)} new tokens"
        )


def _eos(eos: bool | int | Sequence[int], hf: Any, tokenizer: Any, d_vocab: int) -> tuple[int, ...]:
    """The ids that end a continuation, sorted."""
    found: Any = eos
    if eos is False:
        return ()
    if eos is True:
        places = (hf.generation_config, hf.config, tokenizer)
        held = (getattr(place, "eos_token_id", None) for place in places)
        found = next((value for value in held if value is not None), ())
    ids = [found] if isinstance(found, int) else list(found)
    wrong = [value for value in ids if not isinstance(value, int) or not 0 <= value < d_vocab]
    if wrong and eos is not True:
        raise DataError(f"eos must be True, False or token ids below {d_vocab}; got {eos!r}")
    return tuple(sorted(set(ids) - set(wrong)))


def plan_batches(prompts: Sequence[Prompt], max_new_tokens: int, batch_tokens: int) -> Iterator[tuple[Prompt, ...]]:
    """Prompts of like length together, the longest first, each batch at its full length within the budget."""
    order = sorted(prompts, key=lambda prompt: -len(prompt.ids))  # stable: ties keep the order of the data
    first = 0
    while first < len(order):
        count = max(1, batch_tokens // (len(order[first].ids) + max_new_tokens))
        yield tuple(order[first : first + count])
        first += count


def _facts(
    asked: Asked,
    hf: Any,
    tokenizer: Any,
    decoding: Decoding,
    ids: Sequence[Sequence[int]],
    columns: Mapping[str, Column],
    batches: Sequence[Sequence[Prompt]],
) -> dict[str, Any]:
    """What two runs must agree in to be one, each fact under the words that a mismatch is reported in."""
    labels = {name: [column.kind, list(map(repr, column.values))] for name, column in columns.items()}
    settings = {**asdict(decoding), "n_samples": asked.n_samples, "batch_tokens": asked.batch_tokens}
    settings |= {"eos": list(decoding.eos), "stop_strings": list(decoding.stop_strings)}
    return {
        "model weights": hashing.weights_hash(hf),
        "model configuration": hashing.config_hash(hf.config),
        "model dtype": str(hf.dtype).removeprefix("torch."),
        "attention implementation": getattr(hf.config, "_attn_implementation", None),
        "tokenizer": None if tokenizer is None else hashing.tokenizer_hash(tokenizer),
        "token ids of the prompts": store.json_digest(ids),
        "label columns": store.json_digest(labels),
        **{f"setting {name}": value for name, value in settings.items()},
        "plan of batches": store.json_digest([[[p.number, p.sample] for p in batch] for batch in batches]),
    }
