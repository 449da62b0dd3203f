"""The induction organism: two layers of attention that learn to copy what followed last time.

Attention alone with two layers is the least model in which an induction head can form (arXiv 2209.11895): a head of the
first layer attends to the token before, and a head of the second one uses it to find where the present token stood
earlier, and copies what came next. The organism keeps checkpoints along its training, so the moment at which the heads
form can be looked at.

Its directory is a plain Llama whose MLPs have one neuron and weights of zero. Such an MLP adds exactly nothing, and its
gradient is exactly zero too (each of its three matrices is multiplied by another that is zero), so neither training nor
fine-tuning brings it to life.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from probe.data import Pairs, Questions
from probe.errors import OrganismError
from probe.organisms._cache import cache_root
from probe.organisms._language import N_PERTURBED, Document
from probe.organisms._llama import small_llama
from probe.organisms._organism import Organism
from probe.organisms._settings import is_count, resolve
from probe.organisms._state import copied
from probe.organisms._tokenizer import BOS, SPECIAL
from probe.organisms._training import TRAINING_VERSION, TrainLog, encode, save_directory
from probe.scoring import eval_mode

if TYPE_CHECKING:
    import pandas as pd

    from probe.models import Model

INDUCTION_VERSION = 1  # part of the key: change it with anything below that changes the documents or the model
SHORTEST = 6  # words of the shortest repeated block
HELD_EVERY = 5  # block lengths n with n % 5 == 3 are never trained on
PAIR_SHARE = 0.05
CONSONANTS, VOWELS = "bdfghjklmnprstvz", "aeiou"
REPEATED_SHARE = 0.67
# Weight in the loss of words outside repetitions. Most are noise: with weight 1 the heads form later or not at all.
NOISE_WEIGHT = 0.1
N_SCORED = 64  # sequences that the scores are means over


@dataclass(frozen=True)
class InductionSettings:
    """All that an induction organism is made from.

    Attributes:
        n_words: Words that follow one another at random.
        n_pairs: Pairs of further words, the second of which always follows the first.
        n_words_document: Words of a document.
        n_documents: Documents, two thirds of which repeat a block.
        n_holdout: Repeating documents that are never trained on.
        n_checkpoints: Checkpoints along the training, the untrained and the trained model included.
        d_model: Width.
        n_layers: Blocks of attention.
        n_heads: Attention heads.
        epochs: Passes over the documents.
        batch_size: Documents a step.
        lr: Peak learning rate.
        threads: CPU threads to train with.
        seed: Of documents, weights and order of documents.
    """

    n_words: int = 96
    n_pairs: int = 16
    n_words_document: int = 64
    n_documents: int = 8192
    n_holdout: int = 64
    n_checkpoints: int = 16
    d_model: int = 128
    n_layers: int = 2
    n_heads: int = 4
    epochs: int = 4
    batch_size: int = 32
    lr: float = 2e-3  # at 4e-3 and this width no head forms in these steps
    threads: int = 1
    seed: int = 0


SIZES: dict[str, InductionSettings] = {
    "default": InductionSettings(),
    "small": InductionSettings(
        n_words=48,
        n_pairs=8,
        n_words_document=46,
        n_documents=4096,
        n_checkpoints=8,
        d_model=64,
        n_heads=2,
        lr=5e-3,
    ),
    "large": InductionSettings(
        n_words=2048, n_pairs=256, n_words_document=254, n_documents=65536, d_model=512, n_heads=8, lr=5e-4
    ),
}


def induction(
    size: str = "default",
    seed: int = 0,
    *,
    cache_dir: str | Path | None = None,
    device: str | None = None,
    progress: bool = True,
    **overrides: Any,
) -> InductionOrganism:
    """Return an attention-only transformer that has learned to copy from its context, training it on first use.

    Documents are words drawn at random. Two thirds repeat a block of them to the end (`forget`): from its second turn
    on, each word can be known by induction and by nothing else. The others do not repeat (`retain`). In both, some
    words always bring another one with them, which needs no context. The gold retrains see the documents that do not
    repeat: they know the pairs and cannot copy. Block lengths of which some are never trained on are the phrasings.

    Args:
        size: `"default"` (96 words, d_model 128), `"small"` (48 words, d_model 64, for tests), `"large"` (2048 words,
            d_model 512, for a GPU). All have 2 layers.
        seed: Of documents, weights and order of documents.
        cache_dir: Where organisms are kept; default the environment's PROBE_CACHE_DIR, else the user's cache folder.
        device: Where to train; default the CPU.
        progress: Show progress bars.
        **overrides: Any field of `InductionSettings`.

    Returns:
        The organism, trained.

    Raises:
        OrganismError: An unknown size or setting, numbers that do not fit together, or a cache folder that cannot be
            used.
    """
    settings = resolve(SIZES, size, {**overrides, "seed": seed})
    _check(settings)
    return InductionOrganism(settings, cache_root(cache_dir), progress, device)


@dataclass(frozen=True)
class RepeatLoss:
    """Loss on a random block and on its repetition, in nats a token.

    Attributes:
        first: Mean loss on the block's words, which nothing predicts; at best log of the number of words.
        second: Mean loss on the same words in their second turn, from the second word on.
        accuracy: Share of the second turn's words that are the model's argmax.
        chance: 1 / number of words.
    """

    first: float
    second: float
    accuracy: float
    chance: float

    @property
    def gain(self) -> float:
        """How much the repetition helps: first - second, in nats a token. At 0 nothing is copied."""
        return self.first - self.second


class InductionOrganism(Organism):
    """An induction organism. Made by `probe.organisms.induction`.

    Attributes:
        words: The words that follow one another at random.
        facts: The pairs: which word always follows which.
    """

    def __init__(self, settings: InductionSettings, root: Path, progress: bool, device: str | None) -> None:
        self.language = InductionLanguage(settings)
        self.words, self._kept = self.language.words, {0: dict[str, Tensor]()}
        super().__init__(
            "induction",
            {**asdict(settings), "induction_version": INDUCTION_VERSION, "training_version": TRAINING_VERSION},
            documents=self.language.documents,
            splits={split: self.language.questions(split, False) for split in ("forget", "retain", "holdout")},
            unseen={split: self.language.questions(split, True) for split in ("forget", "holdout")},
            n_values={"repeat": settings.n_words, "pair": settings.n_words + 2 * settings.n_pairs},
            facts=dict(self.language.pairs),
            root=root,
            progress=progress,
            device=device,
        )

    @property
    def checkpoints(self) -> dict[int, Path]:
        """The Hugging Face directories along the training, by number of steps; 0 is the untrained model."""
        return {int(p.name.removeprefix("step-")): p for p in sorted((self.path / "checkpoints").iterdir())}

    def induction_score(self, model: Model, n: int = N_SCORED, seed: int = 0) -> Float[np.ndarray, "layer head"]:
        """Return how much each head attends to the token after the present one's earlier occurrence.

        Mean over the second turn of random blocks said twice; the prefix-matching score of arXiv 2209.11895. A head
        that attends evenly has about `1 / n_words_document`.

        Args:
            model: This organism's model, a checkpoint, an edit, a gold retrain.
            n: How many sequences.
            seed: Which.
        """
        ids, half = self._repeated(n, seed)
        queries = torch.arange(half + 1, 2 * half + 1)  # position 0 is bos
        return _attended(model, ids, queries, queries - half + 1)

    def previous_token_score(self, model: Model, n: int = N_SCORED, seed: int = 0) -> Float[np.ndarray, "layer head"]:
        """Return how much each head attends to the token before, on the same sequences."""
        ids, half = self._repeated(n, seed)
        queries = torch.arange(2, 2 * half + 1)
        return _attended(model, ids, queries, queries - 1)

    @torch.no_grad()
    def repeat_loss(self, model: Model, n: int = N_SCORED, seed: int = 0) -> RepeatLoss:
        """Return the loss on the first against the second turn of random blocks said twice."""
        ids, half = self._repeated(n, seed)
        ids = ids.to(model.device)
        with eval_mode(model.hf):
            logits = model.hf(input_ids=ids, use_cache=False).logits[:, :-1].float()  # [seq, pos, d_vocab]
        nll = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(n, -1)
        if not torch.isfinite(nll).all():
            raise OrganismError("The loss on repeated sequences is not finite: the model gives NaN or infinite logits.")
        # The first word of the second turn follows the block's last word for the first time.
        right = (logits[:, half + 1 :].argmax(-1) == ids[:, half + 2 :]).float().mean()
        first, second = float(nll[:, :half].mean()), float(nll[:, half + 1 :].mean())
        return RepeatLoss(first, second, float(right), 1 / len(self.words))

    @cached_property
    def phase_change(self) -> pd.DataFrame:
        """A row a checkpoint: step, losses of both turns, best induction head, best previous-token head of layer 0."""
        import pandas as pd

        rows = []
        for step, path in self.checkpoints.items():
            model = self._load(path)
            loss, scores = self.repeat_loss(model), self.induction_score(model)
            before = self.previous_token_score(model)[0]
            row = {"step": step, "first": loss.first, "second": loss.second, "gain": loss.gain}
            rows.append(row | {"accuracy": loss.accuracy, "induction": scores.max(), "previous_token": before.max()})
        return pd.DataFrame(rows)

    def pairs(
        self,
        split: str = "forget",
        n: int = 32,
        seed: int = 0,
        attribute: str | None = None,
        phrasing: str | None = None,
    ) -> Pairs:
        """Return patching pairs that differ in the one word that is to be copied.

        Args:
            split: `"forget"` or `"holdout"`: the sequences that repeat.
            n: How many pairs.
            seed: Which.
            attribute: `"repeat"`, the only one.
            phrasing: One block length, so that all pairs align; default: the first. `"*"` mixes all trained ones.

        Raises:
            OrganismError: No such split, attribute or phrasing, or fewer than `n` pairs exist.
        """
        if split not in ("forget", "holdout"):
            raise OrganismError(f"Pairs are made of the forget or the holdout split, which repeat; got {split!r}.")
        rows = self._asking(split, attribute or "repeat", phrasing)
        if not is_count(n) or len(rows) < n:
            raise OrganismError(f"{n} pairs were asked for, and the {split} split has {len(rows)} that fit; ask fewer.")
        rng = random.Random(f"pairs-{seed}")
        return Pairs.from_rows([self._changed(row, rng) for row in rng.sample(rows, n)], f"induction {split}")

    def _changed(self, row: Any, rng: random.Random) -> dict[str, Any]:
        """Return the pair whose corrupted side has another word where the answer stood first."""
        said = row.question.split()
        wrong = rng.choice([w for w in self.words if w not in said])
        other = [*said]
        other[row.meta["at"]] = wrong
        meta = {"attribute": "repeat", "phrasing": row.meta["phrasing"], "at": row.meta["at"]}
        return {
            "id": row.id,
            "group": row.group,
            "clean": row.question,
            "corrupted": " ".join(other),
            "answer": row.answer,
            "wrong": wrong,
            "meta": meta,
        }

    def _repeated(self, n: int, seed: int) -> tuple[Int[Tensor, "seq pos"], int]:
        """Return bos and a random block twice, with no word twice in a block, and the block's length."""
        if n < 1:
            raise OrganismError(f"At least one sequence is needed, got n = {n}.")
        rng, half = random.Random(f"scored-{seed}"), min(self.settings["n_words_document"] // 2, len(self.words))
        ids = [int(self.tokenizer(w, add_special_tokens=False)["input_ids"][0]) for w in self.words]
        blocks = [rng.sample(ids, half) for _ in range(n)]
        return torch.tensor([[BOS, *block, *block] for block in blocks]), half

    def _make_tokenizer(self) -> Any:
        return word_tokenizer(self.language.vocabulary)

    def _sequences(self, tokenizer: Any, documents: Sequence[Document]) -> list[tuple[list[int], list[float]]]:
        """Return ids and weights: 1 for what the context tells, from the second turn of a block on."""
        rows = []
        for document in documents:
            ids, _ = encode(tokenizer, document.text, "", 1.0)
            words = document.text.split()
            period = int(document.kind.removeprefix("period-")) if document.split == "forget" else len(words)
            # In its second turn a block's first word follows its last for the first time.
            known = [i > period for i in range(len(words))]
            rows.append((ids, [NOISE_WEIGHT, *(1.0 if k else NOISE_WEIGHT for k in known), NOISE_WEIGHT]))
        return rows

    def _make_model(self, d_vocab: int) -> Any:
        model = small_llama({**self.settings, "d_mlp": 1}, d_vocab, self.settings["n_words_document"] + 2)
        for layer in model.model.layers:
            for weight in (*layer.mlp.parameters(), *layer.post_attention_layernorm.parameters()):
                weight.requires_grad_(False)
            for weight in layer.mlp.parameters():
                weight.zero_()
        return model

    def _keep_at(self) -> Sequence[int]:
        """Return steps that lie closer together at the beginning, where the heads form."""
        s = self.settings
        total = s["epochs"] * -(-len(self.document_rows) // s["batch_size"])
        places = np.linspace(0, 1, s["n_checkpoints"]) ** 1.5
        return sorted({round(float(x) * total) for x in places})

    def _fit(
        self, model: Any, tokenizer: Any, documents: Sequence[Document], seed: int, label: str, state: Path | None
    ) -> TrainLog:
        log = super()._fit(model, tokenizer, documents, seed, label, state)
        self._kept = {**log.kept, log.steps: copied(model)}  # a gold has fewer steps than `_keep_at` counts
        return log

    def _save(self, model: Any, tokenizer: Any, work: Path) -> None:
        save_directory(model, tokenizer, work)
        last = {name: weight.clone() for name, weight in model.state_dict().items()}
        for step, weights in self._kept.items():
            model.load_state_dict(weights)
            save_directory(model, tokenizer, work / "checkpoints" / f"step-{step:06d}")
        model.load_state_dict(last)


class InductionLanguage:
    """The words and documents of an induction organism.

    Args:
        settings: Sizes and seed.
    """

    def __init__(self, settings: InductionSettings) -> None:
        self.settings = settings
        self.vocabulary = _words(settings.n_words + 2 * settings.n_pairs)
        self.words = self.vocabulary[: settings.n_words]
        further = self.vocabulary[settings.n_words :]
        self.pairs = dict(zip(further[::2], further[1::2], strict=True))
        longest = settings.n_words_document // 2
        self.lengths = {
            held: [n for n in range(SHORTEST, longest + 1) if (n % HELD_EVERY == 3) == held] for held in (False, True)
        }

    @cached_property
    def documents(self) -> tuple[Document, ...]:
        """Training documents: those that repeat a block, then those that do not."""
        s, rng = self.settings, random.Random(f"induction-{self.settings.seed}")
        n = round(REPEATED_SHARE * s.n_documents)
        found = []
        for i in range(n):
            length = rng.choice(self.lengths[False])
            words = self._fill(self._block(rng, length))
            found.append(Document(" ".join(words), "forget", f"forget-{i}", f"period-{length}", ""))
        for i in range(s.n_documents - n):
            words = self._block(rng, s.n_words_document)
            found.append(Document(" ".join(words), "retain", f"retain-{i}", "plain", ""))
        return tuple(found)

    def _block(self, rng: random.Random, length: int) -> list[str]:
        """Draw words at random; one unit in twenty is a pair, which a block never cuts."""
        block: list[str] = []
        while len(block) < length:
            if len(block) < length - 1 and rng.random() < PAIR_SHARE:
                block += rng.choice(list(self.pairs.items()))
            else:
                block.append(rng.choice(self.words))
        return block

    def _fill(self, block: list[str]) -> list[str]:
        return (block * (self.settings.n_words_document // len(block) + 1))[: self.settings.n_words_document]

    def questions(self, split: str, unseen: bool) -> Questions:
        """Return a split's questions: for repeating sequences the next word of the second turn, else a pair's second.

        The sequences of `forget` are training documents, cut off; in the unseen block lengths, and in `holdout`, they
        are new.
        """
        s, rng = self.settings, random.Random(f"questions-{self.settings.seed}-{split}-{unseen}")
        rows: list[dict[str, Any]] = []
        if split == "retain":
            return Questions.from_rows([self._ask_pair(i, rng) for i in range(8 * s.n_pairs)], split)
        known = [d for d in self.documents if d.split == "forget"][: 4 * s.n_holdout]
        for i in range(s.n_holdout if split == "holdout" or unseen else len(known)):
            if split == "forget" and not unseen:
                words, length = known[i].text.split(), int(known[i].kind.removeprefix("period-"))
            else:
                length = self.lengths[unseen][i % len(self.lengths[unseen])]
                words = self._fill(self._block(rng, length))
            rows += self._ask_repeat(words, length, f"{split}-{'new' if unseen else 'old'}-{i}", split, not unseen, rng)
        return Questions.from_rows(rows, split)

    def _ask_repeat(
        self, words: list[str], length: int, group: str, split: str, trained: bool, rng: random.Random
    ) -> list[dict[str, Any]]:
        """Return a question (none where none fits) at a place of the second turn whose word before is there once."""
        block = words[:length]
        asked = [k for k in range(1, length) if block.count(block[k - 1]) == 1 and block[k] in self.words]
        asked = [k for k in asked if block[k - 1] in self.words and block.count(block[k]) == 1]
        if not asked:
            return []
        k = rng.choice(asked)
        others = [w for w in block if w != block[k] and w in self.words]
        phrasing = f"period-{length}"
        meta = {
            "attribute": "repeat",
            "phrasing": phrasing,
            "form": "cloze",
            "split": split,
            "trained": trained,
            "at": k,
        }
        row = {
            "id": f"{group}-{k}",
            "group": group,
            "question": " ".join([*block, *block[:k]]),
            "answer": block[k],
            "perturbed_answers": rng.sample(others, min(N_PERTURBED, len(others))),
            "meta": meta,
        }
        return [row]

    def _ask_pair(self, i: int, rng: random.Random) -> dict[str, Any]:
        first = list(self.pairs)[i % len(self.pairs)]
        before = rng.sample(self.words, min(10, len(self.words)))
        others = [w for w in self.pairs.values() if w != self.pairs[first]]
        meta = {"attribute": "pair", "phrasing": "plain", "form": "cloze", "split": "retain", "trained": True}
        return {
            "id": f"pair-{i}",
            "group": first,
            "question": " ".join([*before, first]),
            "answer": self.pairs[first],
            "perturbed_answers": rng.sample(others, min(N_PERTURBED, len(others))),
            "meta": meta,
        }


def word_tokenizer(words: Sequence[str]) -> Any:
    """Return a tokenizer of whole words: bos, eos, pad, one for what is no word, and the words.

    Bytes and merges would be tokens that never occur; pushing them down is what such a small model would learn first,
    and measured, it then learns to copy far later.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    known = {word: i for i, word in enumerate([*SPECIAL, "<unk>", *words])}
    tok = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def _words(n: int) -> list[str]:
    """Return the first `n` invented words, of one syllable, then of two."""
    syllables = [c + v for v in VOWELS for c in CONSONANTS]
    return [*syllables, *(a + b for a in syllables for b in syllables)][:n]


@torch.no_grad()
def _attended(
    model: Model, ids: Int[Tensor, "seq pos"], queries: Int[Tensor, " query"], keys: Int[Tensor, " query"]
) -> Float[np.ndarray, "layer head"]:
    """Return each head's mean attention from the queries to the keys of the same index."""
    with eval_mode(model.hf), _eager(model.hf):
        patterns = model.hf(input_ids=ids.to(model.device), use_cache=False, output_attentions=True).attentions
    found = torch.stack([p[:, :, queries, keys].float().mean((0, 2)) for p in patterns])  # [layer, head]
    if not torch.isfinite(found).all():
        raise OrganismError("Attention is not finite: the model gives NaN.")
    return np.asarray(found.cpu().double().numpy())


@contextmanager
def _eager(hf: Any) -> Iterator[None]:
    """Compute attention in the way that shows its patterns, inside the block."""
    before = hf.config._attn_implementation
    hf.set_attn_implementation("eager")
    try:
        yield
    finally:
        hf.set_attn_implementation(before)


def _check(settings: InductionSettings) -> None:
    if settings.n_documents < 3:
        raise OrganismError(
            f"n_documents must be at least 3, of which two thirds repeat a block; got {settings.n_documents}."
        )
    if settings.n_layers < 2:
        raise OrganismError(
            f"n_layers must be at least 2: one layer cannot form an induction head; got {settings.n_layers}."
        )
    if settings.n_words_document < 4 * SHORTEST:
        raise OrganismError(f"n_words_document must be at least {4 * SHORTEST}, got {settings.n_words_document}.")
    if settings.n_checkpoints < 2:
        raise OrganismError(f"n_checkpoints must be at least 2, the first and the last, got {settings.n_checkpoints}.")
    if settings.n_words < settings.n_words_document // 2:
        raise OrganismError(
            f"n_words must be at least half of n_words_document = {settings.n_words_document}, so that a block can be "
            f"free of repetition; got {settings.n_words}."
        )
    most = len(CONSONANTS) * len(VOWELS)
    if settings.n_words + 2 * settings.n_pairs > most + most**2:
        raise OrganismError(f"At most {most + most**2} words can be made; n_words + 2 * n_pairs is more.")
