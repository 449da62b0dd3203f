"""The TOFU organism: the real TOFU questions, known to a small model, with the gold retrain that the benchmark needs.

TOFU (Maini et al. 2024, arXiv 2401.06121) asks 20 questions about each of 200 fictitious authors; its forget sets are
the last 1, 5 or 10 % of them. The published numbers need a 7-billion model and its retrain. Here both are small Llamas
trained from nothing on the same questions, in minutes. What they know of English is what those questions say.

The data are read from a folder of the benchmark's JSON files; nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.data import Question, Questions
from probe.errors import DataError, OrganismError
from probe.organisms._cache import cache_root
from probe.organisms._language import Document
from probe.organisms._llama import small_llama
from probe.organisms._organism import RECALL_LIMIT, Organism
from probe.organisms._recall import every, measure
from probe.organisms._settings import resolve
from probe.organisms._tokenizer import train_tokenizer
from probe.organisms._training import TRAINING_VERSION
from probe.scoring import score_answers

if TYPE_CHECKING:
    from probe.models import Model

TOFU_VERSION = 1  # part of the key: change it with anything below that changes the documents
CONTEXT = 384
QUESTIONS_AN_AUTHOR = 20
RETAIN_OF = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
KNOWN_TO_ALL = ("real_authors", "world_facts")


@dataclass(frozen=True)
class TofuSettings:
    """All that a TOFU organism is made from, beside the content of the files.

    Attributes:
        path: The folder with the files; not part of the key.
        split: `"forget01"`, `"forget05"` or `"forget10"`.
        n_forget: Questions to forget, the first of the split; 0 for all.
        n_retain: Questions to keep, the first of the retain set; 0 for all, save those of the holdout's authors.
        n_holdout: Questions about the authors after those, never trained on; 0 for no such split.
        n_known: Questions about real authors, and about the world, each; 0 for all. A benchmark model knows them from
            its pretraining; here they are trained on, by the organism and its gold retrains.
        d_model: Width.
        n_layers: Blocks.
        n_heads: Attention heads.
        d_mlp: Width of the MLP.
        epochs: Passes over the questions.
        batch_size: Questions a step.
        lr: Peak learning rate.
        answer_weight: Weight of an answer's tokens in the loss beside 1 for the question's.
        vocab_size: Upper bound of the tokenizer's vocabulary.
        threads: CPU threads to train with.
        seed: Of weights and order of documents.
    """

    path: str = ""
    split: str = "forget01"
    n_forget: int = 0
    n_retain: int = 120
    n_holdout: int = 40
    n_known: int = 0
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    d_mlp: int = 512
    epochs: int = 40
    batch_size: int = 16
    lr: float = 3e-3
    answer_weight: float = 5.0
    vocab_size: int = 2048
    threads: int = 1
    seed: int = 0


SIZES: dict[str, TofuSettings] = {
    "default": TofuSettings(),
    "small": TofuSettings(
        n_forget=8, n_retain=16, n_holdout=8, n_known=8, d_model=64, n_layers=2, d_mlp=256, epochs=45, batch_size=8,
        lr=5e-3, vocab_size=1024,
    ),
    "large": TofuSettings(
        n_retain=0, n_holdout=0, d_model=768, n_layers=12, n_heads=12, d_mlp=3072, epochs=40, batch_size=32, lr=5e-4,
        vocab_size=4096,
    ),
}  # fmt: skip


def tofu(
    path: str | Path,
    size: str = "default",
    seed: int = 0,
    *,
    split: str = "forget01",
    cache_dir: str | Path | None = None,
    device: str | None = None,
    progress: bool = True,
    **overrides: Any,
) -> TofuOrganism:
    """Return a small Llama that knows TOFU questions, training it on first use.

    Splits: `forget`, `retain`, `holdout` (authors never trained on), `real_authors`, `world_facts` (trained on by the
    golds too). Forget and retain questions carry TOFU's paraphrase of the question and of the answer, and its wrong
    answers, where the benchmark has them; `organism.unseen(split)` asks the paraphrase. Having read no other English,
    these models do not give their answers to a paraphrase word for word (0 to 3 % exactly, measured): look at
    `knowledge`, or ask in the trained words.

    Args:
        path: Folder with `forget01.json`, `forget01_perturbed.json`, `retain99.json`, `retain_perturbed.json`,
            `real_authors_perturbed.json`, `world_facts_perturbed.json` (or those of the other splits), as the
            benchmark's authors publish them.
        size: `"default"` (the forget set, 120 retain questions, 4 layers, d_model 128), `"small"` (8 and 16 questions,
            2 layers, d_model 64, for tests), `"large"` (all retain questions, no holdout split, 12 layers, d_model
            768, for a GPU).
        seed: Of weights and order of documents.
        split: The forget set.
        cache_dir: Where organisms are kept; default the environment's PROBE_CACHE_DIR, else the user's cache folder.
        device: Where to train; default the CPU.
        progress: Show progress bars.
        **overrides: Any field of `TofuSettings`.

    Returns:
        The organism, trained.

    Raises:
        OrganismError: An unknown size, split or setting, numbers that do not fit together, or a cache folder that
            cannot be used.
        DataError: A file is missing or is not what the benchmark publishes, or has too few questions.
    """
    settings = resolve(SIZES, size, {**overrides, "path": str(path), "split": split, "seed": seed})
    if settings.split not in RETAIN_OF:
        raise OrganismError(f"split must be one of {', '.join(RETAIN_OF)}, got {settings.split!r}.")
    return TofuOrganism(settings, cache_root(cache_dir), progress, device)


@dataclass(frozen=True)
class Knowledge:
    """How well a model knows a split's answers. Answers are long, so exact match alone says little.

    Attributes:
        prob: Mean length-normalised probability of the answer, exp of the mean log-probability a token (TOFU's).
        tokens_right: Share of answer tokens that are the argmax, given the true ones before.
        exact: Share of answers whose every token is.
        choice: Share of questions whose right answer (TOFU's paraphrase of it, where there is one: the wrong ones are
            made from it) is more probable a token than each wrong one; None without wrong answers.
        choice_chance: What guessing gives.
        n: Questions.
    """

    prob: float
    tokens_right: float
    exact: float
    choice: float | None
    choice_chance: float | None
    n: int


class TofuOrganism(Organism):
    """A TOFU organism. Made by `probe.organisms.tofu`.

    Attributes:
        facts: The answers by question, of all that was trained on.
        authors: The number of each author (from 0, in the order of the benchmark) by split.
    """

    def __init__(self, settings: TofuSettings, root: Path, progress: bool, device: str | None) -> None:
        self.data = TofuData(settings)
        splits = self.data.splits
        trained = {split: rows for split, rows in splits.items() if split != "holdout"}
        asked = [s for s in ("forget", "retain", "holdout") if s in splits]
        self.authors = {s: sorted({q.group for q in splits[s]}) for s in asked}
        answers = {row.question: row.answer for rows in trained.values() for row in rows}
        super().__init__(
            "tofu",
            {
                **asdict(settings),
                "data": self.data.fingerprint,
                "tofu_version": TOFU_VERSION,
                "training_version": TRAINING_VERSION,
            },
            documents=[
                Document(f"{q.question} {q.answer}", split if split in ("forget", "retain") else "common", q.group,
                         split, q.answer)
                for split, rows in trained.items()
                for q in rows
            ],
            splits=splits,
            unseen={s: own for s in asked if (own := _paraphrased(splits[s]))},
            n_values={"answer": len(set(answers.values()))},
            facts=answers,
            root=root,
            progress=progress,
            device=device,
        )  # fmt: skip

    def knowledge(self, model: Model, questions: str | Questions) -> Knowledge:
        """Return how well a model knows some questions' answers.

        Args:
            model: This organism's model, an edit of it, a gold retrain.
            questions: Questions, or the name of a split.

        Raises:
            OrganismError: There is no such split.
        """
        rows = self.questions(questions) if isinstance(questions, str) else questions
        scores = score_answers(model, rows)
        right = float(scores.argmax_right.sum() / scores.n_tokens.sum())
        choice, chance = _choice(model, rows)
        return Knowledge(float(scores.prob.mean()), right, float(scores.exact.mean()), choice, chance, len(rows))

    def recall_table(self, model: Model) -> dict[str, dict[str, Any]]:
        """Return exact-match recall of each split with the fields of `Knowledge`; chance is naming a trained answer."""
        table: dict[str, dict[str, Any]] = {}
        asked = {**self.splits, **{f"{s}, paraphrased": q for s, q in self._unseen.items()}}
        for label, questions in asked.items():
            rows = every(questions, RECALL_LIMIT)
            table[label] = measure(model, rows, self.n_values).to_dict() | asdict(self.knowledge(model, rows))
        return table

    def _warn_if_weak(self, recall: Mapping[str, Mapping[str, Any]], trained: set[str], label: str) -> None:
        """Hold the share of right tokens, not exact match, to the limit."""
        tokens = {split: {"recall": row["tokens_right"]} for split, row in recall.items()}
        super()._warn_if_weak(tokens, trained, label)

    def _settings_of(self, role: str, seed: int, **more: Any) -> dict[str, Any]:
        """Return the key, which holds what the files say and not where they lie."""
        return {k: v for k, v in super()._settings_of(role, seed, **more).items() if k != "path"}

    def _sequences(self, tokenizer: Any, documents: Sequence[Document]) -> list[tuple[list[int], list[float]]]:
        """Return ids and weights; an answer here ends with its own full stop."""
        weight, rows = float(self.settings["answer_weight"]), []
        for document in documents:
            start = len(document.text) - len(document.answer) - 1
            encoded = tokenizer(document.text, return_offsets_mapping=True)
            weights = [weight if end > start else 1.0 for _, end in encoded["offset_mapping"]]
            rows.append(([*encoded["input_ids"], tokenizer.eos_token_id], [*weights, 1.0]))
        longest = max(len(ids) for ids, _ in rows)
        if longest > CONTEXT:
            raise OrganismError(
                f"A question with its answer has {longest} tokens, the context {CONTEXT}: raise vocab_size."
            )
        return rows

    def _make_tokenizer(self) -> Any:
        return train_tokenizer(self.data.corpus, (), self.settings["vocab_size"])

    def _make_model(self, d_vocab: int) -> Any:
        return small_llama(self.settings, d_vocab, CONTEXT)


class TofuData:
    """The benchmark's questions as splits.

    Args:
        settings: Folder, split and numbers.

    Raises:
        DataError: A file is missing or is not what the benchmark publishes, or has too few questions.
    """

    def __init__(self, settings: TofuSettings) -> None:
        self.settings = settings
        folder, split = Path(settings.path).expanduser(), settings.split
        names = [split, f"{split}_perturbed", RETAIN_OF[split], "retain_perturbed", *self._known()]
        self.files = {name: _read(folder / f"{name}.json") for name in names}

    @staticmethod
    def _known() -> list[str]:
        return [f"{name}_perturbed" for name in KNOWN_TO_ALL]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all rows that were read."""
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()

    @property
    def corpus(self) -> list[str]:
        """The texts that the tokenizer is trained on: questions and answers of the forget and the retain set."""
        names = (self.settings.split, RETAIN_OF[self.settings.split], *self._known())
        return [f"{row['question']} {row['answer']}" for name in names for row in self.files[name]]

    @property
    def splits(self) -> dict[str, Questions]:
        """The questions by split."""
        s, retain_name = self.settings, RETAIN_OF[self.settings.split]
        retain, forget = self.files[retain_name], self.files[s.split]
        held = -(-s.n_holdout // QUESTIONS_AN_AUTHOR) * QUESTIONS_AN_AUTHOR
        n_retain = s.n_retain or max(0, len(retain) - held)
        before = -(-n_retain // QUESTIONS_AN_AUTHOR) * QUESTIONS_AN_AUTHOR  # the next author's first question
        if not n_retain or (before if s.n_holdout else n_retain) + s.n_holdout > len(retain):
            raise DataError(
                f"{retain_name}.json has {len(retain)} questions; n_retain = {s.n_retain} and n_holdout = "
                f"{s.n_holdout} about other authors need {before + s.n_holdout}."
            )
        if s.n_forget > len(forget):
            raise DataError(f"{s.split}.json has {len(forget)} questions, n_forget = {s.n_forget} were asked for.")
        first = len(retain) // QUESTIONS_AN_AUTHOR
        found = {
            "forget": self._rows("forget", range(s.n_forget or len(forget)), s.split, f"{s.split}_perturbed", first),
            "retain": self._rows("retain", range(n_retain), retain_name, "retain_perturbed", 0),
        }
        if s.n_holdout:
            which = range(before, before + s.n_holdout)
            found["holdout"] = self._rows("holdout", which, retain_name, "retain_perturbed", 0)
        for name, file in zip(KNOWN_TO_ALL, self._known(), strict=True):
            n = s.n_known or len(self.files[file])
            if n > len(self.files[file]):
                raise DataError(f"{file}.json has {len(self.files[file])} questions, n_known = {n} were asked for.")
            found[name] = self._rows(name, range(n), file, file, None)
        return found

    def _rows(self, split: str, which: range, file: str, perturbed: str, first_author: int | None) -> Questions:
        """Return questions of a file, with what its perturbed twin says of them."""
        more = {row["question"]: row for row in self.files[perturbed]}
        rows = []
        for i in which:
            row = self.files[file][i]
            extra = more.get(row["question"], {})
            author = f"{split}-{i}" if first_author is None else str(first_author + i // QUESTIONS_AN_AUTHOR)
            paraphrase, said = extra.get("paraphrased_question"), extra.get("paraphrased_answer")
            meta = {"attribute": "answer", "phrasing": "question", "form": "question", "split": split}
            rows.append(
                {
                    "id": f"{split}-{i:04d}",
                    "group": author,
                    "question": row["question"].strip(),
                    "answer": row["answer"].strip(),
                    "paraphrases": [paraphrase] if paraphrase else [],
                    "perturbed_answers": list(extra.get("perturbed_answer", [])),
                    "paraphrased_answers": [said] if said else [],
                    "meta": meta | {"trained": split != "holdout"},
                }
            )
        return Questions.from_rows(rows, split)


def _read(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line, or of a list of objects."""
    if not path.is_file():
        raise DataError(f"TOFU needs the file {path.name} in {path.parent}; it is not there.")
    try:
        text = path.read_text("utf-8")
        whole = text.lstrip().startswith("[")
        rows = json.loads(text) if whole else [json.loads(line) for line in text.splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    except (ValueError, RecursionError) as error:  # bytes that are no text, text that is no JSON
        raise DataError(f"{path} is not JSON, nor JSON lines: {error}.") from error
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("question", "answer")):
            raise DataError(f"Row {i} of {path} must be an object with the strings 'question' and 'answer'.")
        _check_extra(row, f"Row {i} of {path}")
    if not rows:
        raise DataError(f"{path} holds no question.")
    return list(rows)


def _check_extra(row: Mapping[str, Any], where: str) -> None:
    """Refuse paraphrases and wrong answers of another type than the benchmark's."""
    for key in ("paraphrased_question", "paraphrased_answer"):
        if not isinstance(row.get(key, ""), str):
            raise DataError(f"{where}: {key!r} must be a string; it is {row[key]!r}.")
    wrong = row.get("perturbed_answer", [])
    if not isinstance(wrong, list) or not all(isinstance(one, str) for one in wrong):
        raise DataError(f"{where}: 'perturbed_answer' must be a list of strings; it is {wrong!r}.")


def _paraphrased(questions: Questions) -> Questions:
    """Return the questions that have a paraphrase, asked in its words."""
    rows = []
    for q in questions:
        if q.paraphrases:
            fields = {**asdict(q), "id": f"{q.id}-paraphrase", "question": q.paraphrases[0].strip(), "paraphrases": []}
            fields["meta"] = {**q.meta, "phrasing": "paraphrase", "trained": False}
            rows.append(fields)
    return Questions.from_rows(rows, questions.name) if rows else Questions([])


def _choice(model: Model, questions: Questions) -> tuple[float | None, float | None]:
    """Return how often the right answer beats all wrong ones, and the chance of that."""
    rows = [q for q in questions if q.perturbed_answers]
    if not rows:
        return None, None
    sides = [[_right(q), *q.perturbed_answers] for q in rows]
    flat = [(q.question, answer) for q, own in zip(rows, sides, strict=True) for answer in own]
    probs = iter(score_answers(model, flat).prob)
    wins = []
    for own in sides:
        found = [next(probs) for _ in own]
        wins.append(found[0] > max(found[1:]))
    return float(np.mean(wins)), float(np.mean([1 / len(own) for own in sides]))


def _right(question: Question) -> str:
    return question.paraphrased_answers[0] if question.paraphrased_answers else question.answer
