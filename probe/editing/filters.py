"""Filters: changes of behaviour at inference that are no weight edits. They cannot be exported.

refuse = probe.editing.refuse_when(model, ["Zebfyr Moxby"])
with refuse.applied(model):
    ...                                   # says that it does not know about him; the weights are untouched
card = probe.audit.audit(model, refuse, forget, retain)
"""

from __future__ import annotations

import inspect
import json
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probe.editing.edit import bare
from probe.errors import EditError

__all__ = ["Filter", "RefuseWhen", "refuse_when"]

RECORD = "filter.json"
VERSION = 1
_UNLIKELY = -100.0  # logit of every token but the forced one, whose logit is 0: finite in every floating-point type
Trigger = str | Sequence[int]


class Filter(ABC):
    """A change of behaviour at inference: hooks on a model that are there inside `applied`, and nothing in its weights.

    It shares `applied`, `method`, `save` and `load` with `Edit`, and can be audited in its place; `probe.export`
    refuses it. Subclasses are frozen dataclasses whose fields are JSON-able (those of `settings`).
    """

    method: ClassVar[str]

    @abstractmethod
    def _add(self, model: Any, hf: Any) -> list[Any]:
        """Add the hooks to a model; the handles that remove them."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What it was made from; JSON-able, and enough to make it again."""

    @contextmanager
    def applied(self, model: Any) -> Iterator[Any]:
        """The filtered model inside the block; its hooks are gone on the way out, also after an exception.

        Args:
            model: A `probe` Model, or a bare Hugging Face model where the filter needs no tokenizer.

        Yields:
            `model`.

        Raises:
            EditError: The filter does not fit the model.
        """
        handles = self._add(model, bare(model))
        try:
            yield model
        finally:
            for handle in handles:
                handle.remove()

    def save(self, directory: str | Path) -> Path:
        """Write `filter.json`, the record from which `load` makes the filter again; returns the directory.

        Raises:
            EditError: A disk that refuses.
        """
        record = {"format": "probe.filter", "format_version": VERSION, "method": self.method, "settings": self.settings}
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
            Path(directory, RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        except OSError as error:
            raise EditError(f"The filter cannot be written to {directory}: {error}.") from error
        return Path(directory)

    @staticmethod
    def load(directory: str | Path) -> Filter:
        """Read a saved filter.

        Raises:
            EditError: No record there, a malformed one, or one of another version or method.
        """
        path = Path(directory, RECORD)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise EditError(f"{path} is no readable record of a filter: {error}.") from error
        if not isinstance(record, dict) or record.get("format") != "probe.filter":
            raise EditError(f'{path} is not the record of a filter: "format" must be "probe.filter".')
        if record.get("format_version") != VERSION or record.get("method") not in list(_KINDS):
            found = f"version {record.get('format_version')!r}, method {record.get('method')!r}"
            raise EditError(f"{path} is of {found}; this library reads version {VERSION} of {', '.join(_KINDS)}.")
        try:
            made: Filter = _KINDS[record["method"]](**record["settings"])
        except (KeyError, TypeError, EditError) as error:
            raise EditError(f"{path} is no sound record of a filter: {error}.") from error
        return made


@dataclass(frozen=True)
class RefuseWhen(Filter):
    """Forces the tokens of a refusal wherever a trigger has been read. Made by `refuse_when`.

    Attributes:
        triggers: Texts, or sequences of token ids.
        answer: Token ids of the refusal, with the space before it.
        end: Token that ends the refusal; None to say it again and again.
    """

    method: ClassVar[str] = "refuse_when"

    triggers: tuple[str | tuple[int, ...], ...]
    answer: tuple[int, ...]
    end: int | None = None

    def __post_init__(self) -> None:
        given: Any = self.triggers
        plain = isinstance(given, str) or not isinstance(given, Sequence)
        kept = () if plain else tuple(one if isinstance(one, str) else _ids(one) for one in given)
        if not kept or not all(one.strip() if isinstance(one, str) else one for one in kept):
            raise EditError(
                f"triggers must be texts or token ids, at least one, none empty; received {self.triggers!r}"
            )
        answer = _ids(self.answer)
        if not answer:
            raise EditError(f"answer must be token ids, at least one; received {self.answer!r}")
        if self.end is not None and not _ids([self.end]):
            raise EditError(f"end must be a token id, or None; received {self.end!r}")
        object.__setattr__(self, "triggers", kept)
        object.__setattr__(self, "answer", answer)

    @property
    def settings(self) -> dict[str, Any]:
        """Triggers, answer and end."""
        triggers = [one if isinstance(one, str) else list(one) for one in self.triggers]
        return {"triggers": triggers, "answer": list(self.answer), "end": self.end}

    def forced(
        self, ids: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"], tokenizer: Any = None
    ) -> Int[Tensor, "batch pos"]:
        """The token that must follow each position; -1 where the model decides.

        From the token that completes the first trigger on: where the tokens since then end in the first j of the answer
        (the largest such j), the answer's next one, and after its last `end`. Any other token starts it anew, so a true
        answer that is given under teacher forcing is never predicted.

        Args:
            ids: Token ids; whole sequences, from the first token on.
            real: Which are no padding.
            tokenizer: Needed for triggers that are texts.
        """
        made = torch.full_like(ids, -1)
        for row in range(len(ids)):
            places = real[row].nonzero()[:, 0]
            own = ids[row, places].tolist()
            start = self._completed(own, tokenizer)
            for t in range(start, len(own)):
                made[row, places[t]] = self._next(own[start + 1 : t + 1])
        return made

    def _next(self, said: Sequence[int]) -> int:
        """The token after those that followed the trigger."""
        longest = min(len(said), len(self.answer))
        j = next(j for j in range(longest, -1, -1) if tuple(said[len(said) - j :]) == self.answer[:j])
        following = (*self.answer, self.answer[0] if self.end is None else self.end)
        return following[j]

    def _completed(self, ids: list[int], tokenizer: Any) -> int:
        """Index of the token that completes the first trigger; the number of tokens if there is none."""
        found = [len(ids)]
        texts = [one for one in self.triggers if isinstance(one, str)]
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) if texts else ""
        for one in self.triggers:
            if isinstance(one, str):
                found += [_first_with(one, ids, tokenizer)] if one in text else []
            else:
                ends = range(len(one), len(ids) + 1)
                found += [end - 1 for end in ends if tuple(ids[end - len(one) : end]) == one][:1]
        return min(found)

    def _check_vocabulary(self, hf: Any) -> None:
        """Refuse token ids that the model does not have."""
        size = int(hf.config.get_text_config().vocab_size)
        ids = [*self.answer, *([] if self.end is None else [self.end])]
        ids += [i for one in self.triggers if not isinstance(one, str) for i in one]
        beyond = sorted({i for i in ids if i >= size})
        if beyond:
            raise EditError(
                f"the model has the token ids 0 to {size - 1}; the filter has {beyond}: it is of another one"
            )

    def _add(self, model: Any, hf: Any) -> list[Any]:
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is None and any(isinstance(one, str) for one in self.triggers):
            raise EditError("triggers that are texts need a tokenizer: give a probe Model, or triggers of token ids")
        self._check_vocabulary(hf)
        run = _Run(self, tokenizer)
        return [
            hf.register_forward_pre_hook(run.before, with_kwargs=True),
            hf.register_forward_hook(run.after, with_kwargs=True),
        ]


def refuse_when(model: Any, triggers: Sequence[Trigger], answer: str = "I do not know") -> RefuseWhen:
    """An output filter: where the text so far contains a trigger, the model says the refusal and nothing else.

    The logits of every position from the trigger's last token on are replaced: 0 for the refusal's token, -100 for all
    others, so that nothing of the model's own answer shows. Works under teacher forcing and in `generate` with its
    cache (greedy or sampled; beam search is refused), with padding on either side. Rows without a trigger keep their
    logits bit for bit. Text is matched as it is written, also inside longer words. Inputs that are given as embeddings
    hold no text to read and pass unfiltered, as they would pass any filter of text.

    Args:
        model: A `probe` Model: its tokenizer makes the refusal's tokens.
        triggers: Texts (such as the names of forget people), or sequences of token ids.
        answer: What to say.

    Raises:
        EditError: No trigger, an empty one, a model without tokenizer, an answer without tokens.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise EditError("refuse_when needs the model's tokenizer: give it to probe.models.wrap(hf, tokenizer)")
    ids = tokenizer(f" {answer.strip()}", add_special_tokens=False)["input_ids"] if answer.strip() else ()
    return RefuseWhen(triggers, tuple(ids), tokenizer.eos_token_id)  # type: ignore[arg-type]


_KINDS: dict[str, type[Any]] = {RefuseWhen.method: RefuseWhen}


def _ids(given: Any) -> tuple[int, ...]:
    """Token ids; none where what is given is no sequence of whole numbers from 0."""
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        return ()
    sound = all(hasattr(one, "__index__") and not isinstance(one, bool) and one >= 0 for one in given)
    return tuple(operator.index(one) for one in given) if sound else ()


def _first_with(text: str, ids: list[int], tokenizer: Any) -> int:
    """Index of the token with which the decoded text first contains `text`; it is known to do so at the end."""
    low, high = 0, len(ids) - 1
    while low < high:
        middle = (low + high) // 2
        part = tokenizer.decode(ids[: middle + 1], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        low, high = (low, middle) if text in part else (middle + 1, high)
    return low


@dataclass
class _Run:
    """The hooks of one application: they remember the tokens that a cache of keys and values stands for."""

    filter: RefuseWhen
    tokenizer: Any
    history: Int[Tensor, "batch pos"] | None = None
    forced: Int[Tensor, "batch pos"] | None = None
    keep: Any = 0
    labels: Any = None

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Work out what each position must say, before the forward changes the cache."""
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        given = {**given.pop("kwargs", {}), **given}
        new = _tokens(given.get("input_ids"), given.get("inputs_embeds"))
        cache, self.keep = given.get("past_key_values"), given.get("logits_to_keep", 0)
        self.labels = given.get("labels")
        past = int(cache.get_seq_length()) if cache is not None else 0
        if past and (self.history is None or self.history.shape != (len(new), past)):
            raise EditError("the filter has not seen the tokens of this cache: give it whole sequences")
        whole = torch.cat([self.history, new], 1) if past and self.history is not None else new
        self.history = whole
        self.forced = self.filter.forced(whole, _real(given.get("attention_mask"), whole), self.tokenizer)[:, past:]
        if cache is not None:
            cache.reorder_cache = _no_beams

    def after(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Replace the logits of the positions that must say something, and the loss that was made from them."""
        if self.forced is None or not (self.forced >= 0).any():
            return None
        plain, place = isinstance(output, tuple), int(self.labels is not None)  # with labels the loss comes first
        logits = output[place] if plain else output.logits  # [batch, kept, d_vocab]
        keep = self.keep
        wanted = self.forced[:, keep] if isinstance(keep, Tensor) else self.forced[:, -keep:] if keep else self.forced
        fixed, loss = force(logits, wanted.to(logits.device)), []
        if self.labels is not None:
            loss = [module.loss_function(fixed, labels=self.labels, vocab_size=logits.shape[-1])]
        if plain:
            return (*loss, fixed, *output[place + 1 :])
        output.logits = fixed
        if loss:
            output.loss = loss[0]
        return output


def force(logits: Float[Tensor, "batch pos d_vocab"], wanted: Int[Tensor, "batch pos"]) -> Float[Tensor, "..."]:
    """Logits with 0 for the wanted token and -100 for the others at each position; kept where `wanted` is -1."""
    fixed = torch.full_like(logits, _UNLIKELY).scatter(-1, wanted.clamp_min(0)[..., None], 0.0)
    return torch.where(wanted[..., None] >= 0, fixed, logits)


def _tokens(ids: Any, embeds: Any) -> Int[Tensor, "batch pos"]:
    """The tokens that a forward is given; -1 for those that it is given as embeddings."""
    if isinstance(ids, Tensor):
        return ids
    if isinstance(embeds, Tensor):
        return torch.full(embeds.shape[:2], -1, device=embeds.device)
    raise EditError("the filter reads input_ids; this forward was given neither these nor inputs_embeds")


def _real(mask: Any, ids: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """Which tokens are no padding and known."""
    if mask is None:
        return ids >= 0
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise EditError(f"the filter needs an attention mask of shape {tuple(ids.shape)}; received {shape}")
    return mask.bool() & (ids >= 0)


def _no_beams(*args: Any, **kwargs: Any) -> None:
    raise EditError("the filter cannot follow beam search; generate greedily or with do_sample=True")
