"""What all organisms share: a trained directory, question splits, a recall table, gold retrains."""

from __future__ import annotations

import html
import os
import random
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from probe.data import Pairs, Question, Questions
from probe.errors import OrganismError
from probe.models import load, wrap
from probe.organisms._cache import fetch, read_record
from probe.organisms._language import Document
from probe.organisms._parallel import training
from probe.organisms._recall import Recall, every, measure
from probe.organisms._training import Auxiliary, Schedule, encode, save_directory, seeded, threads, train, versions

if TYPE_CHECKING:
    import pandas as pd

    from probe.models import Model

N_GOLD = 2
GOLD_SEED = 1000  # gold retrain i of an organism with seed s is trained with seed s + 1000 * (i + 1)
RECALL_LIMIT = 480  # questions a split and phrasing kind in the recall table
WEAK_RECALL = 0.95


class Organism(ABC):
    """A small model trained here, with a known answer inside.

    Made by `probe.organisms.facts` and `probe.organisms.experts`.

    Attributes:
        name: Kind and key, e.g. `facts-1f3c...`.
        path: The Hugging Face directory (config, weights, tokenizer, generation config, and `organism.json`, the
            record).
        settings: All that it was made from.
        splits: Questions by split, in the phrasings that were trained on.
        facts: Ground truth.
        document_rows: Training documents with their split and group.
        n_values: Number of possible answers for each attribute (the inverse is the chance level).
    """

    def __init__(
        self,
        kind: str,
        settings: Mapping[str, Any],
        *,
        documents: Sequence[Document],
        splits: Mapping[str, Questions],
        unseen: Mapping[str, Questions],
        n_values: Mapping[str, int],
        facts: Any,
        root: Path,
        progress: bool,
        device: str | None,
    ) -> None:
        self.kind, self.settings, self.facts, self.n_values = kind, dict(settings), facts, dict(n_values)
        self.splits, self._unseen = dict(splits), dict(unseen)
        self.document_rows = tuple(documents)
        self.progress, self.device, self._root = progress, device, root
        self.path = self._train(self.document_rows, int(settings["seed"]), "original")
        self.name = self.path.name

    def _train(self, documents: Sequence[Document], seed: int, role: str) -> Path:
        """Return the directory of this organism, or of a gold retrain, trained on `documents`."""
        settings = {**self.settings, "role": role, "training_seed": seed}
        name = self.kind if role == "original" else f"{self.kind}-{role}"
        return fetch(self._root, name, settings, lambda work: self._build(work, documents, seed, f"{name} seed {seed}"))

    def _build(self, work: Path, documents: Sequence[Document], seed: int, label: str) -> dict[str, Any]:
        """Train on `documents` and write a Hugging Face directory into `work`; return what to record."""
        tokenizer = self._make_tokenizer()
        sequences = [encode(tokenizer, d.text, d.answer, self.settings["answer_weight"]) for d in documents]
        with threads(self.settings["threads"]), seeded(seed):
            model = self._make_model(len(tokenizer))
            log = train(
                model,
                sequences,
                self._schedule(),
                seed=seed,
                pad_id=tokenizer.pad_token_id,
                device=self.device,
                auxiliary=self._auxiliary(documents),
                model_kwargs=self._model_kwargs(),
                label=label,
                progress=self.progress,
            )
        model.to("cpu")
        save_directory(model, tokenizer, work)
        recall = self.recall_table(wrap(model, tokenizer))
        self._warn_if_weak(recall, {d.split for d in documents}, label)
        return {"training": asdict(log), "recall": recall, "versions": versions()}

    def _warn_if_weak(self, recall: Mapping[str, Mapping[str, Any]], trained: set[str], label: str) -> None:
        """Warn when what was trained on is not known: whatever is measured on such an organism means little."""
        weak = [split for split in sorted(trained & set(recall)) if recall[split]["recall"] < WEAK_RECALL]
        if weak:
            shares = ", ".join(f"{split} {recall[split]['recall']:.1%}" for split in weak)
            warnings.warn(
                f"{label} recalls little of what it was trained on ({shares}; above {WEAK_RECALL:.0%} is wanted). "
                "Train for more epochs, or give it more width.",
                stacklevel=2,
            )

    @abstractmethod
    def _make_tokenizer(self) -> Any:
        """Return the organism's tokenizer; the same for the organism and its gold retrains."""

    @abstractmethod
    def _make_model(self, d_vocab: int) -> Any:
        """Return the untrained model, from torch's global generator."""

    def _schedule(self) -> Schedule:
        s = self.settings
        return Schedule(epochs=s["epochs"], batch_size=s["batch_size"], lr=s["lr"])

    def _auxiliary(self, documents: Sequence[Document]) -> Auxiliary | None:
        """Return a further loss, or None."""
        return None

    def _model_kwargs(self) -> dict[str, Any]:
        """Return what each training forward is given besides the tokens."""
        return {}

    @cached_property
    def model(self) -> Model:
        """The trained model, loaded as `probe.load` loads it."""
        return load(str(self.path))

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.model.tokenizer

    @property
    def documents(self) -> list[str]:
        """The training texts."""
        return [d.text for d in self.document_rows]

    @property
    def gold_documents(self) -> list[str]:
        """The training texts of the gold retrains: those that do not speak of what is to be forgotten."""
        return [d.text for d in self._gold_rows]

    @property
    def _gold_rows(self) -> list[Document]:
        return [d for d in self.document_rows if d.split != "forget"]

    @cached_property
    def gold(self) -> Gold:
        """Models trained without the forget documents, two seeds; `.train(n)` for more."""
        return Gold(self)

    @property
    def record(self) -> dict[str, Any]:
        """What was written down at training: seconds, tokens, losses, recalls, versions, file hashes."""
        return read_record(self.path)

    def questions(self, split: str) -> Questions:
        """Return a split's questions in the trained phrasings.

        Raises:
            OrganismError: There is no such split.
        """
        return self._of(self.splits, split)

    def unseen(self, split: str) -> Questions:
        """Return a split's questions in the phrasings that were never trained on, for anybody.

        Raises:
            OrganismError: There is no such split.
        """
        return self._of(self._unseen, split)

    def by_phrasing(self, split: str, unseen: bool | None = None) -> dict[str, Questions]:
        """Return a split's questions by phrasing, so that locating, selecting and evaluating need share none.

        Args:
            split: A split.
            unseen: True for phrasings never trained on, False for trained ones, None for both.
        """
        both = {False: self.questions(split), True: self.unseen(split)}
        rows = [row for kind, questions in both.items() if unseen is None or unseen == kind for row in questions]
        found: dict[str, list[Question]] = {}
        for row in rows:
            found.setdefault(str(row.meta["phrasing"]), []).append(row)
        return {name: Questions(own, name) for name, own in found.items()}

    def _of(self, table: Mapping[str, Questions], split: str) -> Questions:
        if split not in table:
            raise OrganismError(f"This organism has the splits {', '.join(table)}; there is no split {split!r}.")
        return table[split]

    def recall(self, model: Model, questions: str | Questions, limit: int | None = None) -> Recall:
        """Return a model's exact-match recall, with chance and a 95 % interval.

        Greedy decoding gives an answer exactly when the argmax is right at each of its tokens under teacher forcing,
        which is what is computed.

        Args:
            model: This organism's model, an edit of it, a gold retrain.
            questions: Questions, or the name of a split.
            limit: Use at most so many questions, evenly spaced.

        Raises:
            OrganismError: There is no such split.
        """
        rows = self.questions(questions) if isinstance(questions, str) else questions
        return measure(model, rows if limit is None else every(rows, limit), self.n_values)

    def recall_table(self, model: Model) -> dict[str, dict[str, Any]]:
        """Return recall of each split, in trained and in unseen phrasings, on evenly spaced questions."""
        table = {}
        for split in self.splits:
            table[split] = measure(model, every(self.splits[split], RECALL_LIMIT), self.n_values).to_dict()
            table[f"{split}, unseen phrasings"] = measure(
                model, every(self._unseen[split], RECALL_LIMIT), self.n_values
            ).to_dict()
        return table

    def pairs(
        self,
        split: str = "forget",
        n: int = 32,
        seed: int = 0,
        attribute: str | None = None,
        phrasing: str | None = None,
    ) -> Pairs:
        """Return patching pairs that differ only in whom they ask about.

        Clean and corrupted prompt have equally many tokens (all names have), and the answers differ in their first
        token. The corrupted prompt asks about somebody of the retain split.

        Args:
            split: Split of the clean prompts.
            n: How many pairs.
            seed: Which.
            attribute: What is asked for; default: the first attribute of the split.
            phrasing: Name of one phrasing, so that all pairs align token by token; default: the first of the attribute.
                `"*"` mixes all trained ones.

        Raises:
            OrganismError: No such split, attribute or phrasing, or fewer than `n` pairs exist.
        """
        clean = self._asking(split, attribute, phrasing)
        others = self._partners(split, clean)
        found = [(a, b) for a in clean for b in others.get(str(a.meta["phrasing"]), []) if self._differ(a, b)]
        if len(found) < n:
            raise OrganismError(
                f"{n} pairs were asked for, and the {split} split has {len(found)} that fit; "
                "ask for fewer, or use phrasing='*'."
            )
        chosen = random.Random(f"pairs-{seed}").sample(found, n)
        return Pairs.from_rows([self._pair(a, b) for a, b in chosen], f"{self.kind} {split}")

    def _asking(self, split: str, attribute: str | None, phrasing: str | None) -> list[Question]:
        """Return the rows of a split that ask for an attribute in a phrasing."""
        both = [*self.questions(split), *self.unseen(split)]
        attribute = attribute or str(both[0].meta["attribute"])
        rows = [row for row in both if row.meta["attribute"] == attribute]
        if phrasing == "*":
            kept = [row for row in rows if row.meta["trained"]]
        else:
            wanted = phrasing or (str(rows[0].meta["phrasing"]) if rows else "")
            kept = [row for row in rows if row.meta["phrasing"] == wanted]
        if not kept:
            known = sorted({str(row.meta["phrasing"]) for row in both})
            raise OrganismError(
                f"No questions for attribute {attribute!r} in phrasing {phrasing!r}. "
                f"The phrasings are {', '.join(known)}."
            )
        return kept

    def _partners(self, split: str, clean: Sequence[Question]) -> dict[str, list[Question]]:
        """Return the retain rows to corrupt with, by phrasing."""
        wanted = {str(row.meta["phrasing"]) for row in clean}
        source = (
            "retain"
            if any(True for r in self.splits["retain"] if r.meta["attribute"] == clean[0].meta["attribute"])
            else split
        )
        found: dict[str, list[Question]] = {}
        for row in [*self.splits[source], *self._unseen[source]]:
            if row.meta["phrasing"] in wanted:
                found.setdefault(str(row.meta["phrasing"]), []).append(row)
        return found

    def _differ(self, a: Question, b: Question) -> bool:
        """Whether two rows ask about different people whose answers part at the first token."""
        return (
            a.group != b.group
            and self._ids(a.answer)[0] != self._ids(b.answer)[0]
            and len(self._ids(a.question)) == len(self._ids(b.question))
        )

    def _ids(self, text: str) -> list[int]:
        found = self._encoded.get(text)
        if found is None:
            found = self._encoded[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    @cached_property
    def _encoded(self) -> dict[str, list[int]]:
        return {}

    @staticmethod
    def _pair(a: Question, b: Question) -> dict[str, Any]:
        meta = {"attribute": a.meta["attribute"], "phrasing": a.meta["phrasing"], "other": b.group}
        return {
            "id": f"{a.id}|{b.group}",
            "group": a.group,
            "clean": a.question,
            "corrupted": b.question,
            "answer": a.answer,
            "wrong": b.answer,
            "meta": meta,
        }

    def to_df(self) -> pd.DataFrame:
        """Return the recall table, with chance, and the gold's recall where gold retrains are trained."""
        import pandas as pd

        rows = []
        golds = [read_record(p)["recall"] for p in self.gold.trained]
        for label, own in self.record["recall"].items():
            row = {
                "questions": label,
                "recall": own["recall"],
                "chance": own["chance"],
                "n": own["n"],
                "facts": own["n_facts"],
            }
            rows.append(row | ({"gold": [g[label]["recall"] for g in golds]} if golds else {}))
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        trained = f"gold retrains trained: {len(self.gold.trained)}"
        lines = [f"{type(self).__name__}({self.name!r}, {len(self.document_rows)} documents, {trained})"]
        for row in self.to_df().to_dict("records"):
            gold = "  gold " + " ".join(f"{g:6.1%}" for g in row["gold"]) if "gold" in row else ""
            shares = f"recall {row['recall']:6.1%}  chance {row['chance']:6.1%}  n {row['n']:>4}"
            lines.append(f"  {row['questions']:<28} {shares}{gold}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        body = []
        for row in self.to_df().to_dict("records"):
            gold = ", ".join(f"{g:.1%}" for g in row.get("gold", [])) or "not trained"
            cells = (row["questions"], f"{row['recall']:.1%}", gold, f"{row['chance']:.1%}", row["n"], row["facts"])
            body.append("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in cells) + "</tr>")
        head = "".join(f"<th>{h}</th>" for h in ("questions", "recall", "gold recall", "chance", "n", "facts"))
        where = f"<code>{html.escape(str(self.path))}</code>"
        title = f"<p><b>{html.escape(self.name)}</b>, {len(self.document_rows)} documents, {where}</p>"
        return f"{title}<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


class Gold(Sequence["Model"]):
    """Gold retrains of an organism: the same settings and documents without the forget ones, each with a seed of its
    own.

    A sequence of models, trained when first asked for and kept in the cache folder.
    """

    def __init__(self, organism: Organism, n: int = N_GOLD) -> None:
        self._organism, self._n = organism, n
        self._models: dict[int, Model] = {}

    def __len__(self) -> int:
        return self._n

    @property
    def seeds(self) -> list[int]:
        """The training seed of each."""
        first = int(self._organism.settings["seed"])
        return [first + GOLD_SEED * (i + 1) for i in range(self._n)]

    @property
    def paths(self) -> list[Path]:
        """The directory of each; trains those that are not trained yet."""
        self.train(self._n)
        return [self._path(i) for i in range(self._n)]

    @property
    def trained(self) -> list[Path]:
        """The directories of those that are trained already; trains nothing."""
        return [
            p for p in (self._organism._root / self._name(i) for i in range(self._n)) if (p / "organism.json").is_file()
        ]

    def train(self, n: int, jobs: int | None = None) -> Gold:
        """Train the first `n`, and return this object, now of length `n` (or longer, if it was).

        Args:
            n: How many.
            jobs: How many to train at the same time, each in a process of its own; default as many as there are cores
                for their threads. The weights do not depend on it.

        Raises:
            OrganismError: `n` or `jobs` is not positive.
        """
        if n < 1 or (jobs is not None and jobs < 1):
            raise OrganismError(f"At least one gold retrain and one job are needed, got n = {n}, jobs = {jobs}.")
        self._n = max(self._n, n)
        own = self._organism
        if own.device not in (None, "cpu"):
            jobs = 1  # one device
        jobs = jobs or max(1, (os.cpu_count() or 1) // int(own.settings["threads"]))
        missing = [i for i in range(n) if not (own._root / self._name(i) / "organism.json").is_file()]
        while missing:
            now, missing = missing[:jobs], missing[jobs:]
            with training(own.kind, own.settings, own._root, now[1:]):
                self.train_one(now[0])
        for i in range(n):  # what a process failed to train is trained here, and says why it cannot be
            self.train_one(i)
        return self

    def train_one(self, i: int) -> Path:
        """Train gold number `i` unless it is trained already; returns its directory."""
        self._n = max(self._n, i + 1)
        return self._path(i)

    def _settings(self, i: int) -> dict[str, Any]:
        return {**self._organism.settings, "role": "gold", "training_seed": self.seeds[i]}

    def _name(self, i: int) -> str:
        from probe.organisms._cache import key_of

        return f"{self._organism.kind}-gold-{key_of(self._settings(i))}"

    def _path(self, i: int) -> Path:
        return self._organism._train(self._organism._gold_rows, self.seeds[i], "gold")

    @overload
    def __getitem__(self, index: int) -> Model: ...
    @overload
    def __getitem__(self, index: slice) -> list[Model]: ...
    def __getitem__(self, index: int | slice) -> Model | list[Model]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._n))]
        if not -self._n <= index < self._n:
            raise IndexError(
                f"There are {self._n} gold retrains; index {index} is out of range. Use .train(n) for more."
            )
        i = index % self._n
        if i not in self._models:
            self._models[i] = load(str(self._path(i)))
        return self._models[i]

    def __iter__(self) -> Iterator[Model]:
        self.train(self._n)
        return (self[i] for i in range(self._n))

    def __repr__(self) -> str:
        return f"Gold({self._organism.name!r}, seeds {self.seeds}, trained {len(self.trained)} of {self._n})"
