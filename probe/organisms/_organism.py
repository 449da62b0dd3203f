"""What all organisms share: a trained directory, question splits, a recall table, gold retrains."""

from __future__ import annotations

import html
import os
import random
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from probe.data import Pairs, Question, Questions
from probe.errors import OrganismError
from probe.models import load, wrap
from probe.organisms._cache import fetch, is_whole, key_of, read_record, state_of
from probe.organisms._language import Document
from probe.organisms._parallel import training
from probe.organisms._recall import Recall, every, measure
from probe.organisms._settings import check_device, device_type, is_count
from probe.organisms._training import (
    Auxiliary,
    Schedule,
    TrainLog,
    encode,
    save_directory,
    seeded,
    threads,
    train,
    versions,
)

if TYPE_CHECKING:
    import pandas as pd

    from probe.models import Model

N_GOLD = 2
GOLD_SEED = 1000  # gold retrain i of an organism with seed s is trained with seed s + 1000 * (i + 1)
RECALL_LIMIT = 480  # questions a split and phrasing kind in the recall table
WEAK_RECALL = 0.95
Build = Callable[[Path, Sequence[Document], int, str, Path | None], Mapping[str, Any]]


class Organism(ABC):
    """A small model trained here, with a known answer inside.

    Made by the functions of `probe.organisms`. A subclass gives `_make_tokenizer` and `_make_model`, and may replace
    any step of its making: `_sequences`, `_fit`, `_save`, `_load`, `recall_table`, `_gold_rows`; further models beside
    the original and the golds come of `_variant`.

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
        self.path = self._variant("original", self.document_rows, int(settings["seed"]))
        self.name = self.path.name

    def _variant(
        self, role: str, documents: Sequence[Document], seed: int, build: Build | None = None, **more: Any
    ) -> Path:
        """Return the directory of a model of this organism in a role, making it on first use.

        The roles of every organism are `"original"` and `"gold"`; a subclass adds its own (a tuned twin, a twin that
        says that it does not know).

        Args:
            role: What the model is; part of the directory's name and key.
            documents: What it is trained on.
            seed: Of its weights and the order of documents.
            build: Makes it: called with the work directory, the documents, the seed, a label and the file for the
                training's state, and returns what to record (`"recall"` at least); default `self._build`.
            **more: Further parts of the key; JSON-able.
        """
        settings, path = self._settings_of(role, seed, **more), self._path_of(role, seed, **more)
        label, name = _label(path, seed), path.name.removesuffix(f"-{key_of(settings)}")

        def made(work: Path) -> Mapping[str, Any]:
            check_device(self.device)
            found = (build or self._build)(work, documents, seed, label, state_of(path))
            return {"device": device_type(self.device), **found}

        return fetch(self._root, name, settings, made)

    def _settings_of(self, role: str, seed: int, **more: Any) -> dict[str, Any]:
        """Return the key of a model of this organism; the device is part of it where it is not the CPU."""
        device = device_type(self.device)
        own = {} if device == "cpu" else {"device": device}
        return {**self.settings, "role": role, "training_seed": seed, **own, **more}

    def _path_of(self, role: str, seed: int, **more: Any) -> Path:
        """Return where a model of this organism lies, trained or not."""
        name = self.kind if role == "original" else f"{self.kind}-{role}"
        return self._root / f"{name}-{key_of(self._settings_of(role, seed, **more))}"

    def _build(
        self, work: Path, documents: Sequence[Document], seed: int, label: str, state: Path | None = None
    ) -> dict[str, Any]:
        """Train on `documents` and write a directory into `work`; return what to record."""
        tokenizer = self._make_tokenizer()
        with threads(self.settings["threads"]), seeded(seed):
            model = self._make_model(len(tokenizer))
            log = self._fit(model, tokenizer, documents, seed, label, state)
        model.to("cpu")
        self._save(model, tokenizer, work)
        recall = self.recall_table(self._wrap(model, tokenizer))
        self._warn_if_weak(recall, {d.split for d in documents}, label)
        return {"training": log.to_dict(), "recall": recall, "versions": versions()}

    def _fit(
        self, model: Any, tokenizer: Any, documents: Sequence[Document], seed: int, label: str, state: Path | None
    ) -> TrainLog:
        """Train `model` in place."""
        return train(
            model,
            self._sequences(tokenizer, documents),
            self._schedule(),
            seed=seed,
            pad_id=tokenizer.pad_token_id,
            device=self.device,
            auxiliary=self._auxiliary(documents),
            model_kwargs=self._model_kwargs(),
            label=label,
            progress=self.progress,
            state=state,
            keep_at=self._keep_at(),
            epochs=[d.epoch for d in documents],
        )

    def _sequences(self, tokenizer: Any, documents: Sequence[Document]) -> list[tuple[list[int], list[float]]]:
        """Return each document's token ids, and the weight of each in the loss."""
        weight = float(self.settings.get("answer_weight", 1.0))
        return [encode(tokenizer, d.text, d.answer, weight) for d in documents]

    def _keep_at(self) -> Sequence[int]:
        """Return the steps after which `TrainLog.kept` is to hold the weights."""
        return ()

    def _save(self, model: Any, tokenizer: Any, work: Path) -> None:
        """Write a trained model into `work`, as a Hugging Face directory."""
        save_directory(model, tokenizer, work)

    def _load(self, path: Path) -> Model:
        """Return the model of a directory that `_save` wrote."""
        return load(str(path))

    def _wrap(self, model: Any, tokenizer: Any) -> Model:
        """Return a freshly trained model as `recall_table` takes it."""
        return wrap(model, tokenizer)

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
        return self._load(self.path)

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
        """What was written down at training: seconds, tokens, losses, recalls, device, versions, file hashes.

        Raises:
            OrganismError: The record is damaged; made anew, the organism is trained again.
        """
        return _whole_record(self.path)

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
        both = {False: self.questions(split), True: self._unseen.get(split, ())}
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
            OrganismError: There is no such split, or a limit below one.
        """
        if limit is not None and not is_count(limit):
            raise OrganismError(f"limit must be a whole number of at least 1, or None for all; got {limit!r}.")
        rows = self.questions(questions) if isinstance(questions, str) else questions
        return measure(model, rows if limit is None else every(rows, limit), self.n_values)

    def recall_table(self, model: Model) -> dict[str, dict[str, Any]]:
        """Return recall of each split, in trained and in unseen phrasings, on evenly spaced questions."""
        table = {}
        for split, questions in self.splits.items():
            table[split] = measure(model, every(questions, RECALL_LIMIT), self.n_values).to_dict()
            if split in self._unseen:
                rows = every(self._unseen[split], RECALL_LIMIT)
                table[f"{split}, unseen phrasings"] = measure(model, rows, self.n_values).to_dict()
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
        if not is_count(n):
            raise OrganismError(f"n must be a whole number of at least 1; got {n!r}.")
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
        both = [*self.questions(split), *self._unseen.get(split, ())]
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
        asked = clean[0].meta["attribute"]
        source = "retain" if any(r.meta["attribute"] == asked for r in self.splits.get("retain", ())) else split
        found: dict[str, list[Question]] = {}
        for row in [*self.splits[source], *self._unseen.get(source, ())]:
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
        """Return the recall table, with chance, and the gold's recall where gold retrains are trained.

        Raises:
            OrganismError: The record is damaged.
        """
        import pandas as pd

        rows = []
        golds = [_whole_record(p)["recall"] for p in self.gold.trained]
        for label, own in self.record["recall"].items():
            row = {
                "questions": label,
                "recall": own["recall"],
                "chance": own["chance"],
                "n": own["n"],
                "facts": own["n_facts"],
            }
            rows.append(row | ({"gold": [g[label]["recall"] for g in golds if label in g]} if golds else {}))
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        trained = f"gold retrains trained: {len(self.gold.trained)}"
        lines = [f"{type(self).__name__}({self.name!r}, {len(self.document_rows)} documents, {trained})"]
        for row in self._shown():
            gold = "  gold " + " ".join(f"{g:6.1%}" for g in row["gold"]) if "gold" in row else ""
            shares = f"recall {row['recall']:6.1%}  chance {row['chance']:6.1%}  n {row['n']:>4}"
            lines.append(f"  {row['questions']:<28} {shares}{gold}")
        damaged = [] if len(lines) > 1 else ["  its record is damaged: made anew, it is trained again"]
        return "\n".join([*lines, *damaged])

    def _shown(self) -> list[dict[str, Any]]:
        """Return the rows of the recall table; none where the record is damaged, so that printing never fails."""
        try:
            return [{str(k): v for k, v in row.items()} for row in self.to_df().to_dict("records")]
        except OrganismError:
            return []

    def _repr_html_(self) -> str:
        body = []
        for row in self._shown():
            gold = ", ".join(f"{g:.1%}" for g in row.get("gold", [])) or "not trained"
            cells = (row["questions"], f"{row['recall']:.1%}", gold, f"{row['chance']:.1%}", row["n"], row["facts"])
            body.append("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in cells) + "</tr>")
        head = "".join(f"<th>{h}</th>" for h in ("questions", "recall", "gold recall", "chance", "n", "facts"))
        where = f"<code>{html.escape(str(self.path))}</code>"
        title = f"<p><b>{html.escape(self.name)}</b>, {len(self.document_rows)} documents, {where}</p>"
        return f"{title}<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _label(path: Path, seed: int) -> str:
    """Return what a model is called in bars and warnings."""
    return f"{path.name.rsplit('-', 1)[0]} seed {seed}"


def _whole_record(path: Path) -> dict[str, Any]:
    """Return the record of an organism's model, with a recall table whose rows are whole.

    Raises:
        OrganismError: It is not there or is damaged.
    """
    record = read_record(path)
    table = record.get("recall")
    rows = list(table.values()) if isinstance(table, dict) else [None]
    if not all(isinstance(row, dict) and {"recall", "chance", "n", "n_facts"} <= set(row) for row in rows):
        raise OrganismError(f"The record in {path} has no whole recall table: it is damaged.")
    return record


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
        return [self._place(i) for i in range(self._n) if self._is_trained(i)]

    def train(self, n: int, jobs: int | None = None) -> Gold:
        """Train the first `n`, and return this object, now of length `n` (or longer, if it was).

        Args:
            n: How many.
            jobs: How many to train at the same time, each in a process of its own; default as many as there are cores
                for their threads. The weights do not depend on it.

        Raises:
            OrganismError: `n` or `jobs` is not a whole number of at least 1.
        """
        if not is_count(n) or not (jobs is None or is_count(jobs)):
            raise OrganismError(f"At least one gold retrain and one job are needed, got n = {n!r}, jobs = {jobs!r}.")
        self._n = max(self._n, n)
        own = self._organism
        if device_type(own.device) != "cpu":
            jobs = 1  # one device
        jobs = jobs or max(1, (os.cpu_count() or 1) // int(own.settings["threads"]))
        missing = [i for i in range(n) if not self._is_trained(i)]
        while missing:
            now, missing = missing[:jobs], missing[jobs:]
            with training(own.kind, own.settings, own._root, now[1:]):
                self.train_one(now[0])
            for i in now[1:]:
                self._check_child(i)
        for i in range(n):  # what a process failed to train is trained here, and says why it cannot be
            self.train_one(i)
        return self

    def _check_child(self, i: int) -> None:
        """Warn here of weak recall: the warnings of the process that trained this gold are not seen."""
        if self._is_trained(i):
            own, path = self._organism, self._place(i)
            own._warn_if_weak(
                _whole_record(path)["recall"], {d.split for d in own._gold_rows}, _label(path, self.seeds[i])
            )

    def train_one(self, i: int) -> Path:
        """Train gold number `i` unless it is trained already; returns its directory."""
        self._n = max(self._n, i + 1)
        return self._path(i)

    def _is_trained(self, i: int) -> bool:
        own = self._organism
        return is_whole(self._place(i), own._settings_of("gold", self.seeds[i]))

    def _place(self, i: int) -> Path:
        return self._organism._path_of("gold", self.seeds[i])

    def _path(self, i: int) -> Path:
        return self._organism._variant("gold", self._organism._gold_rows, self.seeds[i])

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
            self._models[i] = self._organism._load(self._path(i))
        return self._models[i]

    def __iter__(self) -> Iterator[Model]:
        self.train(self._n)
        return (self[i] for i in range(self._n))

    def __repr__(self) -> str:
        return f"Gold({self._organism.name!r}, seeds {self.seeds}, trained {len(self.trained)} of {self._n})"
