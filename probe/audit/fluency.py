"""How a model writes when it is left alone: entropy of its n-grams and how much it repeats itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from probe.audit import metrics
from probe.audit._generation import continuations
from probe.audit._measure import _text_ids
from probe.audit.part import Measurement, Metric, Number, Part, Subject, by_group, spaced
from probe.errors import DataError
from probe.scoring import answer_tokens

__all__ = ["Fluency"]

Prompt = tuple[str, str, tuple[int, ...]]  # set, group, token ids


@dataclass(frozen=True)
class Fluency(Part):
    """N-gram entropy and repetition of greedy text after questions and after beginnings of the corpus.

    Entropy is that of ROME (arXiv 2202.05262) and RWKU (arXiv 2406.10890), over the model's tokens in place of words:
    so it is there for any output, also for one of blanks. All texts have the same number of tokens (the end of text is
    never chosen, as there), because entropy grows with length; what an organism says after its answer is therefore
    part of it, and a number means something only beside the other models'.

    Attributes:
        sets: Sets whose questions are prompts, where the case has them.
        limit: Prompts of a set, and of the corpus, evenly spaced; None for all.
        new_tokens: Tokens a text (100 words in ROME).
        prefix_tokens: A text of the corpus is continued after at most so many of its tokens, and after half of them.
        n: Of the n-grams whose repetition is counted.
    """

    sets: tuple[str, ...] = ("forget", "retain")
    limit: int | None = 16
    new_tokens: int = 48
    prefix_tokens: int = 32
    n: int = 4

    name: ClassVar[str] = "fluency"
    title: ClassVar[str] = "fluency of generated text"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("generation_entropy", "n-gram entropy of generated text", unit="bits", of="texts"),
        Metric("repetition", "repeated n-grams in generated text", share=True, of="texts"),
    )

    def measure(self, subject: Subject) -> Measurement:
        """Measure one model on every set that is asked for and on the corpus."""
        prompts = self._prompts(subject)
        if not prompts:
            return Measurement(missing=("fluency: no prompts",))
        longest = max(len(ids) for _, _, ids in prompts)
        length = min(self.new_tokens, subject.model.dims.n_ctx - longest)
        if length < max(self.n, 3):
            return Measurement(missing=(f"fluency: prompts of {longest} tokens leave no room in the context",))
        all_ids = [ids for _, _, ids in prompts]
        texts = continuations(subject.model, all_ids, length, batch_size=subject.case.batch_size, through=True)
        numbers = []
        for name in dict.fromkeys(name for name, _, _ in prompts):
            own = [(group, text) for (of, group, _), text in zip(prompts, texts, strict=True) if of == name]
            groups = [group for group, _ in own]
            entropy = [metrics.ngram_entropy(text) for _, text in own]
            again = [metrics.repetition(text, self.n) for _, text in own]
            numbers.append(Number(name, "generation_entropy", by_group(entropy, groups)))
            numbers.append(Number(name, "repetition", by_group(again, groups)))
        short = length < self.new_tokens
        missing = (f"fluency: texts of {length} in place of {self.new_tokens} tokens (the context is full)",)
        return Measurement(tuple(numbers), missing=missing if short else ())

    def _prompts(self, subject: Subject) -> list[Prompt]:
        case, model = subject.case, subject.model
        found: list[Prompt] = []
        for name in self.sets:
            if name in case.sets:
                rows = spaced(case.sets[name], self.limit)
                pairs = [(row.question, row.answer) for row in rows]
                tokens = answer_tokens(model, pairs, bos=case.bos, chat=case.chat)
                found += [(name, row.group, one.input_ids[: one.start]) for row, one in zip(rows, tokens, strict=True)]
        return found + self._beginnings(subject, case.corpus)

    def _beginnings(self, subject: Subject, corpus: Sequence[str]) -> list[Prompt]:
        step = 1.0 if self.limit is None else max(1.0, len(corpus) / self.limit)
        places = [int(i * step) for i in range(int(len(corpus) / step))]
        found: list[Prompt] = []
        for i in places:
            ids = _text_ids(subject.model.tokenizer, corpus[i], subject.case.bos)
            if len(ids) > 1:
                cut = min(self.prefix_tokens, len(ids) // 2)
                found.append(("corpus", f"text {i}", tuple(ids[:cut])))
        if corpus and not found:
            raise DataError("fluency needs a text of at least two tokens in the corpus; none has")
        return found
