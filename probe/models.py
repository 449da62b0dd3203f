"""Load a Hugging Face model by name or local path; its tokens, its sites, its TransformerLens bridge.

The bare Hugging Face model is the truth: it is what is hooked, edited and saved. The bridge sits on a twin that shares
the model's storage, because a bridge aliases the parameters of the model that it wraps: that one cannot be saved.
"""

from __future__ import annotations

import copy
import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from probe.errors import DataError, LoadError

if TYPE_CHECKING:
    from activations_cache.sites import Dims, Sites

__all__ = ["Model", "load", "pad", "token_strings", "wrap"]


class Model:
    """A causal language model with its tokenizer. Made by `probe.load` or `probe.models.wrap`.

    Attributes:
        hf: The bare Hugging Face model, in eval mode.
        tokenizer: Its tokenizer, as it was loaded (never changed: `tokens` pads by itself), or None.
        name: The hub name or path that it was loaded from.
    """

    def __init__(self, hf: nn.Module, tokenizer: Any = None, name: str = "") -> None:
        self.hf: Any = hf
        self.tokenizer: Any = tokenizer
        self.name = name
        self._bridge: Any = None
        self._twin: dict[str, int] | None = None

    @property
    def config(self) -> Any:
        """The Hugging Face configuration."""
        return self.hf.config

    @property
    def device(self) -> torch.device:
        """The device of the first parameter (where inputs go)."""
        return next(self.hf.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the first parameter."""
        return next(self.hf.parameters()).dtype

    @property
    def sites(self) -> Sites:
        """The named places in the forward pass."""
        from activations_cache.sites import Sites

        return Sites(self.hf)

    @property
    def dims(self) -> Dims:
        """Sizes by their TransformerLens names (`n_layers`, `d_model`, ...)."""
        return self.sites.dims

    @property
    def weights_hash(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes of the weights as they now are; computed anew each time."""
        from activations_cache.hashing import weights_hash

        return weights_hash(self.hf)

    @property
    def bridge(self) -> Any:
        """A `TransformerBridge` on a twin that shares storage: in-place edits of `hf` show in it.

        Made on first use, and again if a parameter of `hf` has been replaced since. Never enable its compatibility
        mode: that would rewrite the shared weights.
        """
        if self._bridge is None or not _shares_storage(self.hf, self._twin):
            twin = _twin(self.hf)
            # Booting renames the twin's parameters, so their storage is remembered first.
            self._twin = _storage(twin)
            self._bridge = _boot(twin, self.tokenizer, self.name)
        return self._bridge

    @property
    def pad_id(self) -> int:
        """The id that `tokens` pads with: the pad token, else the end of sequence, else 0. Masked in any case."""
        ids = [getattr(self.tokenizer, "pad_token_id", None), getattr(self.config, "pad_token_id", None)]
        ids += [getattr(self.tokenizer, "eos_token_id", None)]
        return next((int(i) for i in ids if isinstance(i, int) and i >= 0), 0)

    def tokens(
        self,
        texts: str | Sequence[str],
        *,
        bos: bool | None = None,
        chat: bool = False,
        max_length: int | None = None,
        overflow: Literal["truncate", "error"] = "error",
        padding_side: str = "right",
        device: str | torch.device | None = None,
    ) -> dict[str, Tensor]:
        """Tokenise and pad.

        Args:
            texts: One text or several.
            bos: True puts exactly one beginning-of-sequence token in front, False none, None what the tokenizer does.
            chat: Wrap each text as a user turn in the tokenizer's chat template.
            max_length: Longest sequence allowed, in tokens: from 1 to the model's context, which is the default.
            overflow: `"error"`, or `"truncate"` to cut longer texts.
            padding_side: `"right"` or `"left"`.
            device: Where the tensors go; default the model's device.

        Returns:
            `input_ids` and `attention_mask`, each `[batch, pos]`; with left padding also `position_ids`, without which
            models with absolute positions would count the padding.

        Raises:
            DataError: no tokenizer, no text, an empty text, one longer than `max_length`, or a `max_length` that is not
                from 1 to the context.
        """
        from activations_cache.documents import read_documents, tokenize

        if self.tokenizer is None:
            raise DataError("This model has no tokenizer; pass one to probe.models.wrap, or give token ids.")
        documents = read_documents([texts] if isinstance(texts, str) else list(texts))
        n_ctx = self.dims.n_ctx
        limit = n_ctx if max_length is None else max_length
        if not 1 <= limit <= n_ctx:
            raise DataError(f"max_length must be from 1 to the model's context of {n_ctx} tokens; got {max_length}.")
        made = tokenize(self.tokenizer, documents, max_length=limit, bos=bos, chat=chat, overflow=overflow)
        return pad(made.input_ids, self.pad_id, padding_side, device or self.device)

    def str_tokens(self, text: str, *, bos: bool | None = None) -> list[str]:
        """The text's tokens as readable strings, with their spaces."""
        return token_strings(self.tokenizer, self.tokens(text, bos=bos)["input_ids"][0].tolist())

    @torch.no_grad()
    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = 32,
        bos: bool | None = None,
        chat: bool = False,
        batch_size: int = 64,
        seed: int = 0,
        **settings: Any,
    ) -> list[str]:
        """Continue each prompt; greedy unless `do_sample=True`. Returns the new text alone.

        Args:
            prompts: One prompt or several.
            max_new_tokens: Longest continuation, in tokens; with the prompt's tokens at most the model's context.
            bos: As in `tokens`.
            chat: As in `tokens`.
            batch_size: Prompts a batch.
            seed: For sampling.
            **settings: Passed to `transformers`' `generate`.

        Raises:
            DataError: a prompt that with `max_new_tokens` is longer than the context, no new token asked for, or what
                `tokens` refuses.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        made: list[str] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for start in range(0, len(prompts), batch_size):
                batch = self.tokens(prompts[start : start + batch_size], bos=bos, chat=chat, padding_side="left")
                width = batch["input_ids"].shape[1]
                self._check_room(width, max_new_tokens)
                batch.pop("position_ids", None)  # generate derives them from the mask
                settings.setdefault("do_sample", False)
                out = self.hf.generate(**batch, max_new_tokens=max_new_tokens, pad_token_id=self.pad_id, **settings)
                made += self.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        return made

    def _check_room(self, width: int, max_new_tokens: int) -> None:
        n_ctx = self.dims.n_ctx
        if max_new_tokens < 1:
            raise DataError(f"max_new_tokens must be at least 1; got {max_new_tokens}.")
        if width + max_new_tokens > n_ctx:
            raise DataError(
                f"The longest prompt has {width} tokens; with max_new_tokens={max_new_tokens} that makes "
                f"{width + max_new_tokens}, and the model's context is {n_ctx}. Shorten the prompt or ask for fewer."
            )

    def _facts(self) -> dict[str, Any]:
        dims = self.dims
        count = sum(p.numel() for p in self.hf.parameters())
        tied = getattr(self.config, "tie_word_embeddings", False)
        facts: dict[str, Any] = {
            "class": type(self.hf).__name__,
            "parameters": f"{count:,}",
            "n_layers": dims.n_layers,
            "d_model": dims.d_model,
            "n_heads": dims.n_heads,
            "d_vocab": dims.d_vocab,
            "n_ctx": dims.n_ctx,
            "tied embedding": tied,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
        }
        return facts | ({"n_experts": dims.n_experts, "top_k": dims.top_k} if dims.n_experts else {})

    def __repr__(self) -> str:
        facts = ", ".join(f"{key}={value}" for key, value in self._facts().items())
        return f"Model({self.name!r}, {facts})"

    def _repr_html_(self) -> str:
        cells = "".join(f"<tr><th>{k}</th><td>{html.escape(str(v))}</td></tr>" for k, v in self._facts().items())
        return f"<p><b>{html.escape(self.name or 'model')}</b></p><table>{cells}</table>"


def load(
    name_or_path: str | Path,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    *,
    tokenizer: Any = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """Load a causal language model from the Hugging Face hub or a local directory.

    Args:
        name_or_path: Hub name or directory.
        dtype: Floating-point type; default the checkpoint's own.
        device: Default `cuda` where there is one, else `cpu`; `"auto"` spreads over devices with accelerate.
        tokenizer: A tokenizer, instead of the one beside the weights.
        revision: Branch, tag or commit on the hub.
        attn_implementation: As in transformers (`"eager"`, `"sdpa"`, ...); default transformers' choice.
        trust_remote_code: Run code that comes with the checkpoint. Off unless asked for.

    Raises:
        LoadError: nothing there, no causal language model, damaged weights, or a dtype or device that does not exist.
    """
    from transformers import AutoModelForCausalLM

    name = str(name_or_path)
    _check_path(name)
    place = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    settings: dict[str, Any] = {"dtype": _dtype(dtype), "revision": revision, "trust_remote_code": trust_remote_code}
    if attn_implementation:
        settings["attn_implementation"] = attn_implementation
    if place == "auto":
        settings["device_map"] = "auto"
    try:
        hf, report = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **settings)
    except Exception as error:  # transformers raises a dozen kinds here; each means the same to the user
        raise LoadError(f"Cannot load a causal language model from {name!r}: {_first_line(error)}") from error
    _check_complete(name, report)
    try:
        hf = hf if place == "auto" else hf.to(place)
    except (RuntimeError, AssertionError) as error:
        raise LoadError(f"Cannot move the model to device {place!r}: {_first_line(error)}") from error
    hf.eval()
    return Model(hf, tokenizer or _tokenizer(name, revision, trust_remote_code), name)


def wrap(hf: nn.Module, tokenizer: Any = None, name: str = "") -> Model:
    """Make a `Model` of a Hugging Face model that is already in memory."""
    if isinstance(hf, Model):
        return hf
    hf.eval()
    return Model(hf, tokenizer, name or str(getattr(getattr(hf, "config", None), "name_or_path", "")))


def token_strings(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token as the text that it adds, its leading space included.

    Decoding a token alone loses the space of SentencePiece tokens, so each is decoded behind another one. Special
    tokens, and tokens that are only part of a character, are shown by their names.
    """
    ids = [int(i) for i in ids]
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
    front = tokenizer.decode(anchor, clean_up_tokenization_spaces=False)
    texts = {i: tokenizer.decode([*anchor, i], clean_up_tokenization_spaces=False) for i in set(ids)}

    special = set(getattr(tokenizer, "all_special_ids", []))

    def own(i: int) -> str:
        if i in special:
            return str(tokenizer.convert_ids_to_tokens(i))
        text: str = texts[i].removeprefix(front) if texts[i].startswith(front) else texts[i]
        return text if text and "\ufffd" not in text else str(tokenizer.convert_ids_to_tokens(i))

    return [own(i) for i in ids]


def pad(
    input_ids: Sequence[Sequence[int]],
    pad_id: int,
    side: str = "right",
    device: str | torch.device | None = None,
) -> dict[str, Int[Tensor, "batch pos"]]:
    """Pad token ids into a batch with its mask (and `position_ids` where the padding is on the left).

    Raises:
        DataError: `side` is neither left nor right, or a sequence is empty.
    """
    if side not in ("left", "right"):
        raise DataError(f"padding_side must be 'left' or 'right'; got {side!r}.")
    if not input_ids or min(map(len, input_ids)) == 0:
        raise DataError("Every sequence needs at least one token; one has none.")
    width = max(map(len, input_ids))
    ids = torch.full((len(input_ids), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, own in enumerate(input_ids):
        place = slice(0, len(own)) if side == "right" else slice(width - len(own), width)
        ids[row, place] = torch.as_tensor(own)
        mask[row, place] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if side == "left":
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    return {key: value.to(device) for key, value in batch.items()} if device else batch


def _check_path(name: str) -> None:
    """A path that exists must be a directory with a configuration; transformers' own messages speak of the hub."""
    path = Path(name)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if path.is_dir() and not (path / "config.json").is_file():
        raise LoadError(f"{name!r} is a directory without a config.json; a Hugging Face model directory is needed.")
    if path.is_file():
        raise LoadError(f"{name!r} is a file; give the directory that holds config.json and the weights.")
    if looks_local and not path.exists():
        raise LoadError(f"There is no directory {name!r}.")


def _check_complete(name: str, report: Any) -> None:
    """Refuse a checkpoint whose weights do not fill the model: transformers would leave the rest random."""
    missing = sorted(report.get("missing_keys", []))
    wrong = sorted(str(key) for key in report.get("mismatched_keys", []))
    if missing or wrong:
        what = ", ".join((missing + wrong)[:4])
        count = len(missing) + len(wrong)
        raise LoadError(f"The checkpoint {name!r} lacks {count} tensors of its model, or has them misshapen: {what}.")


def _tokenizer(name: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The tokenizer beside the weights; None if there is none (token ids can still be used)."""
    from transformers import AutoTokenizer

    local = Path(name)
    if local.is_dir() and not any(local.glob("tokenizer*")) and not any(local.glob("vocab*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise LoadError(f"Cannot load the tokenizer of {name!r}: {_first_line(error)}") from error


def _dtype(dtype: str | torch.dtype | None) -> str | torch.dtype:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype or "auto"
    made = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(made, torch.dtype) or not made.is_floating_point:
        raise LoadError(f"dtype must be a floating-point type such as 'float32' or 'bfloat16'; got {dtype!r}.")
    return made


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _twin(hf: Any) -> Any:
    """A second module of the same class whose parameters and buffers are the first one's tensors."""
    config = copy.deepcopy(hf.config)
    with torch.device("meta"):
        twin = type(hf)._from_config(config, attn_implementation="eager", dtype=hf.dtype)
    twin.load_state_dict(hf.state_dict(), assign=True)
    buffers = dict(twin.named_buffers())
    for name, buffer in hf.named_buffers():
        if name in buffers and buffers[name].is_meta:  # non-persistent ones are not in the state dict
            owner, _, leaf = name.rpartition(".")
            twin.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
    twin.tie_weights()
    twin.generation_config = copy.deepcopy(getattr(hf, "generation_config", None))
    return twin.eval()


def _boot(twin: Any, tokenizer: Any, name: str) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    device = next(twin.parameters()).device
    if getattr(tokenizer, "name_or_path", ""):
        return TransformerBridge.boot_transformers(
            name or type(twin).__name__,
            hf_model=twin,
            tokenizer=copy.deepcopy(tokenizer),  # booting gives it a pad token
            dtype=twin.dtype,
            device=device,
        )
    return _assemble(twin, copy.deepcopy(tokenizer), str(device))


def _assemble(twin: Any, tokenizer: Any, device: str) -> Any:
    """A bridge with a tokenizer made in memory, or none: booting would look for it on the hub."""
    from transformer_lens.model_bridge import TransformerBridge

    from activations_cache.sites.adapter import build_adapter

    adapter = build_adapter(twin)
    adapter.cfg.device = device
    adapter.prepare_model(twin)
    if tokenizer is not None and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return TransformerBridge(twin, adapter, tokenizer)


def _storage(module: nn.Module) -> dict[str, int]:
    return {name: p.data_ptr() for name, p in module.named_parameters()}


def _shares_storage(hf: nn.Module, storage: dict[str, int] | None) -> bool:
    return storage is not None and _storage(hf) == storage
