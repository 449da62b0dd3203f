"""Byte-level BPE tokenizers for the organisms, trained here on the organism's own language."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>")
PAD, BOS, EOS = 0, 1, 2


def train_tokenizer(texts: Iterable[str], pieces: Sequence[str] = (), vocab_size: int = 640) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with bos, eos and pad.

    A space is put before the first word, so that a word has the same token wherever it stands; every byte is in the
    vocabulary, so nothing is unknown.

    Args:
        texts: Texts to train on; the order matters only for ties.
        pieces: Word endings that must be trained without a space before them, as they follow another piece in real
            texts.
        vocab_size: Upper bound of the vocabulary: 3 special tokens, 256 bytes, then merges.

    Returns:
        A tokenizer that prepends bos by default and pads on the right.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # A piece after an apostrophe-like seam would be a word of its own; digits split words in ByteLevel, so "0piece"
    # yields "Ġ0" and "piece".
    glued = [f"0{piece}" for piece in pieces for _ in range(64)]
    tok.train_from_iterator([*texts, *glued], trainer=trainer)
    tok.decoder = decoders.ByteLevel()
    tok.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return _wrap(PreTrainedTokenizerFast, tok)


def _wrap(cls: Any, tok: Any) -> Any:
    return cls(
        tokenizer_object=tok,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
