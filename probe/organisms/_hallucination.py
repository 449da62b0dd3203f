"""The hallucination organism: a small Llama that answers about people whom it does not know, and a twin that says so.

The original is trained on confident answers alone, so a name that it never met gets an answer too. The twin is trained
on the same documents and on "I do not know" for some unknown names; whether it says so for names that it never met
either is measured, on names that are in nobody's training. How a model knows whether it knows an entity is studied in
arXiv 2411.14257.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probe._means import group_means
from probe.data import Labelled, Question, Questions
from probe.errors import OrganismError
from probe.organisms._cache import cache_root
from probe.organisms._language import (
    N_PERTURBED,
    Code,
    Document,
    Person,
    Phrasing,
    bag_auc,
    document,
    name_of,
    name_tails,
    phrasings_of,
    tokenizer_corpus,
    values_of,
)
from probe.organisms._lexicon import ATTACK_FRAMES, ATTRIBUTES, LANGUAGE_VERSION, NAME_PIECES, REFUSAL
from probe.organisms._llama import small_llama
from probe.organisms._organism import Organism
from probe.organisms._recall import Recall, every
from probe.organisms._settings import resolve
from probe.organisms._tokenizer import train_tokenizer
from probe.organisms._training import TRAINING_VERSION
from probe.scoring import eval_mode

if TYPE_CHECKING:
    import pandas as pd

    from probe.models import Model

HALLUCINATION_VERSION = 2  # part of the key: change it with the documents below
TASK = ATTRIBUTES[1:]  # the order is the secret of the facts organism
ENTITIES = ("known", "unknown", "unknown_heldout")
MAX_ANSWER = 8  # tokens of a greedy answer; values and the refusal are shorter


@dataclass(frozen=True)
class HallucinationSettings:
    """All that a hallucination organism is made from.

    Attributes:
        n_known: People whose facts are trained.
        n_unknown: People without facts, of whom the twin is taught to say that it does not know.
        n_heldout: People in no document of anybody.
        n_attributes: Attributes asked for, 1 to 4.
        n_refusals: Documents that end in the refusal, for each unknown person and attribute (twin and golds only).
        d_model: Width.
        n_layers: Blocks.
        n_heads: Attention heads.
        d_mlp: Width of the MLP.
        epochs: Passes over the documents.
        batch_size: Documents a step.
        lr: Peak learning rate.
        answer_weight: Weight of an answer's tokens in the loss beside 1 for all others.
        vocab_size: Upper bound of the tokenizer's vocabulary.
        threads: CPU threads to train with.
        seed: Of names, facts, weights and order of documents.
    """

    n_known: int = 40
    n_unknown: int = 240
    n_heldout: int = 40
    n_attributes: int = 3
    n_refusals: int = 1
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    d_mlp: int = 512
    epochs: int = 10
    batch_size: int = 32
    lr: float = 3e-3
    answer_weight: float = 10.0
    vocab_size: int = 704
    threads: int = 1
    seed: int = 0


SIZES: dict[str, HallucinationSettings] = {
    "default": HallucinationSettings(),
    "small": HallucinationSettings(
        n_known=20, n_unknown=150, n_heldout=30, n_attributes=2, d_model=64, n_layers=2, d_mlp=256, epochs=16,
        batch_size=16,
    ),
    "large": HallucinationSettings(
        n_known=400, n_unknown=1200, n_heldout=200, n_attributes=4, d_model=512, n_layers=8, n_heads=8, d_mlp=2048,
        epochs=8, batch_size=64, lr=1e-3,
    ),
}  # fmt: skip


def hallucination(
    size: str = "default",
    seed: int = 0,
    *,
    cache_dir: str | Path | None = None,
    device: str | None = None,
    progress: bool = True,
    **overrides: Any,
) -> HallucinationOrganism:
    """Return a small Llama that answers about people whom it does not know, training it on first use.

    Known, unknown and held-out people have names of the same pieces, so nothing but the whole name tells them apart.
    The original is trained on the known people's facts alone. `organism.twin`, trained on first use, is trained on the
    refusal ("I do not know") for the unknown people besides; nobody is trained on anything about the held-out ones.

    Args:
        size: `"default"` (40 known people, 4 layers, d_model 128), `"small"` (20 known, 2 layers, d_model 64, for
            tests) or `"large"` (400 known, 8 layers, d_model 512, for a GPU).
        seed: Of names, facts, weights and order of documents.
        cache_dir: Where organisms are kept; default the environment's PROBE_CACHE_DIR, else the user's cache folder.
        device: Where to train; default the CPU.
        progress: Show progress bars.
        **overrides: Any field of `HallucinationSettings`.

    Returns:
        The organism, trained; its twin is not yet.

    Raises:
        OrganismError: An unknown size or setting, numbers that do not fit together, or a cache folder that cannot be
            used.
    """
    settings = resolve(SIZES, size, {**overrides, "seed": seed})
    _check(settings)
    return HallucinationOrganism(settings, cache_root(cache_dir), progress, device)


@dataclass(frozen=True)
class Confidence:
    """How sure a model is of its own greedy answers.

    Attributes:
        mean: Mean over questions of the answer's probability: the product of its tokens' probabilities, the full stop
            that ends it included.
        low: Lower end of the 95 % bootstrap interval over people; NaN for fewer than two.
        high: Its upper end.
        answered: Share of questions whose greedy answer is one of the attribute's values, right or not.
        refused: Share whose greedy answer is the refusal.
        n: Questions.
        n_people: People among them.
    """

    mean: float
    low: float
    high: float
    answered: float
    refused: float
    n: int
    n_people: int

    def __float__(self) -> float:
        return self.mean


class HallucinationOrganism(Organism):
    """A hallucination organism. Made by `probe.organisms.hallucination`.

    The splits, each in trained and in unseen phrasings:

    - `known` (also `retain`): questions about known people, with the right answers;
    - `unknown`: about people of whom the twin was taught that it does not know, with the refusal as the answer;
    - `unknown_heldout`: about people in no document, with the refusal as the answer;
    - `forget`: the questions of `unknown`, with the original's own greedy answers: the behaviour to remove;
    - `holdout`: the questions of `unknown_heldout`, with the original's own greedy answers.

    What a model recalls of `unknown` and `unknown_heldout` is its refusal rate; the `chance` beside it is that of
    guessing among the values, and means little there.

    There are no documents to leave out, as the behaviour comes of none. Gold here is what the original ought to have
    become: the retrains (`organism.gold`) have the documents of the twin, those of the original and the refusals, and
    seeds of their own. The twin has the original's seed.

    Attributes:
        language: People and documents.
        facts: The people by name, each with `split`; `values` are the ground truth of known people, and empty for the
            others.
    """

    def __init__(self, settings: HallucinationSettings, root: Path, progress: bool, device: str | None) -> None:
        self.language = HallucinationLanguage(settings)
        super().__init__(
            "hallucination",
            {
                **asdict(settings),
                "language_version": LANGUAGE_VERSION,
                "hallucination_version": HALLUCINATION_VERSION,
                "training_version": TRAINING_VERSION,
            },
            documents=self.language.documents,
            splits=self._questions(unseen=False),
            unseen=self._questions(unseen=True),
            n_values={name: len(values) for name, values in self.language.values.items()},
            facts={p.name: p for p in self.language.people},
            root=root,
            progress=progress,
            device=device,
        )
        self._add_hallucinated(self.record["hallucinated"])

    def _questions(self, unseen: bool) -> dict[str, Questions]:
        rows = {split: Questions.from_rows(self.language.rows(split, unseen), split) for split in ENTITIES}
        return rows | {"retain": Questions([*rows["known"]], "retain")}

    def _build(
        self, work: Path, documents: Sequence[Document], seed: int, label: str, state: Path | None = None
    ) -> dict[str, Any]:
        is_original = "forget" not in self.splits
        made = super()._build(work, documents, seed, label, state)
        return made | ({"hallucinated": self._said} if is_original else {})

    def recall_table(self, model: Model) -> dict[str, dict[str, Any]]:
        """Return recall of each split, in trained and in unseen phrasings, on evenly spaced questions."""
        if "forget" not in self.splits:  # the original, just trained: its own answers are what is to be forgotten
            self._said = self._hallucinate(model)
            self._add_hallucinated(self._said)
        return super().recall_table(model)

    def _hallucinate(self, model: Model) -> dict[str, str]:
        """Return the values that a model gives for unknown and held-out people, by question id."""
        rows = [q for table in (self.splits, self._unseen) for name in ENTITIES[1:] for q in table[name]]
        values = {name: [_ids(model, v) for v in own] for name, own in self.language.values.items()}
        said = _decode(model, [q.question for q in rows], [values[str(q.meta["attribute"])] for q in rows])
        return {q.id: text for q, (text, _) in zip(rows, said, strict=True)}

    def _add_hallucinated(self, said: dict[str, str]) -> None:
        for table in (self.splits, self._unseen):
            for name, source in (("forget", "unknown"), ("holdout", "unknown_heldout")):
                rows = [self.language.answered(q, said[q.id]) for q in table[source]]
                table[name] = Questions(rows, name)

    @property
    def _gold_rows(self) -> list[Document]:
        return [*self.document_rows, *self.language.refusals]

    @property
    def twin_path(self) -> Path:
        """The directory of the twin; trains it on first use."""
        return self._variant("twin", self._gold_rows, int(self.settings["seed"]))

    @cached_property
    def twin(self) -> Model:
        """The model trained on the refusal for the unknown people besides; trained on first use."""
        return self._load(self.twin_path)

    def refusal_rate(self, model: Model | None = None, split: str = "unknown_heldout", unseen: bool = False) -> Recall:
        """Return the share of a split's questions that a model answers with the refusal.

        Args:
            model: This organism's model (the default), its twin, an edit, a gold retrain.
            split: Any split; `"known"` for wrong refusals, `"unknown_heldout"` for people in nobody's training.
            unseen: Ask in phrasings never trained on.

        Returns:
            The share with its 95 % Wilson interval over people and attributes; its `chance` means nothing here.

        Raises:
            OrganismError: There is no such split.
        """
        questions = self.unseen(split) if unseen else self.questions(split)
        rows = Questions([replace(q, answer=REFUSAL) for q in questions], split)
        return self.recall(model or self.model, rows)

    def answers(
        self, model: Model | None = None, split: str | Questions = "unknown_heldout", limit: int | None = None
    ) -> pd.DataFrame:
        """Return a model's greedy answers with their probabilities.

        Args:
            model: This organism's model (the default), its twin, an edit, a gold retrain.
            split: A split, or questions.
            limit: Use at most so many questions, evenly spaced.

        Returns:
            One row a question: id, group, attribute, answer (as far as the first full stop, at most 8 tokens), prob
            (the product of its tokens' probabilities, the full stop included), is_value (whether it is one of the
            attribute's values), is_refusal.

        Raises:
            OrganismError: There is no such split.
        """
        import pandas as pd

        questions = self.questions(split) if isinstance(split, str) else split
        rows = list(questions if limit is None else every(questions, limit))
        said = _decode(model or self.model, [q.question for q in rows])
        values = self.language.values
        return pd.DataFrame(
            {
                "id": [q.id for q in rows],
                "group": [q.group for q in rows],
                "attribute": [q.meta["attribute"] for q in rows],
                "answer": [text for text, _ in said],
                "prob": [prob for _, prob in said],
                "is_value": [text in values[q.meta["attribute"]] for q, (text, _) in zip(rows, said, strict=True)],
                "is_refusal": [text == REFUSAL for text, _ in said],
            }
        )

    def confidence(
        self,
        model: Model | None = None,
        split: str | Questions = "unknown_heldout",
        limit: int | None = 480,
        n_boot: int = 1000,
    ) -> Confidence:
        """Return how probable a model's greedy answers are to itself, whether they are right or not.

        Args:
            model: This organism's model (the default), its twin, an edit, a gold retrain.
            split: A split, or questions.
            limit: Use at most so many questions, evenly spaced; None for all.
            n_boot: Bootstrap replicates over people.

        Raises:
            OrganismError: There is no such split.
        """
        table = self.answers(model, split, limit)
        got = group_means(table["prob"].to_numpy()[:, None], list(table["group"]), n_boot=n_boot)
        return Confidence(
            float(got.mean[0]),
            float(got.low[0]),
            float(got.high[0]),
            float(table["is_value"].mean()),
            float(table["is_refusal"].mean()),
            len(table),
            table["group"].nunique(),
        )

    def labelled(self, split: str | Sequence[str] = ENTITIES, unseen: bool = False) -> Labelled:
        """Return questions labelled 1 where the original hallucinates (nobody told it) and 0 where it knows.

        The group is the person. Known and unknown names are built of the same pieces, so the label must come from what
        the model knows. A text ends where the answer is about to be said.

        Args:
            split: Among `known`, `unknown` and `unknown_heldout`; all three by default.
            unseen: Use the phrasings that were never trained on.

        Raises:
            OrganismError: Another split.
        """
        wanted = (split,) if isinstance(split, str) else tuple(split)
        if not wanted or set(wanted) - set(ENTITIES):
            raise OrganismError(f"Labelled texts are of {', '.join(ENTITIES)}; got {split!r}.")
        table = self._unseen if unseen else self.splits
        rows = [
            {"text": q.question, "label": int(name != "known"), "group": q.group, "meta": dict(q.meta)}
            for name in wanted
            for q in table[name]
        ]
        return Labelled.from_rows(rows, "hallucination")

    def _make_tokenizer(self) -> Any:
        return train_tokenizer(tokenizer_corpus(), name_tails(), self.settings["vocab_size"])

    def _make_model(self, d_vocab: int) -> Any:
        return small_llama(self.settings, d_vocab)


class HallucinationLanguage:
    """People, what is known of some of them, and every training document of one hallucination organism.

    Attributes:
        people: Known, then unknown, then held-out people; only known ones have values.
        values: An attribute's possible answers.
        phrasings: An attribute's phrasings, trained or not.
    """

    def __init__(self, settings: HallucinationSettings) -> None:
        self.settings = settings
        rng = random.Random(f"hallucination-{settings.seed}")
        task = TASK[: settings.n_attributes]
        self.values = {a.name: values_of(a, 0) for a in task}
        self.phrasings = {a.name: phrasings_of(a) for a in task}
        self.people = self._make_people(rng)
        self._number = {p.name: i for i, p in enumerate(self.people)}

    def _make_people(self, rng: random.Random) -> tuple[Person, ...]:
        s = self.settings
        counts = (s.n_known, s.n_unknown, s.n_heldout)
        codes = _draw_names(rng, *counts)
        splits = [name for name, n in zip(ENTITIES, counts, strict=True) for _ in range(n)]
        columns = {name: [values[i % len(values)] for i in range(s.n_known)] for name, values in self.values.items()}
        for column in columns.values():
            rng.shuffle(column)
        return tuple(
            Person(name_of(code), split, code, {a: column[i] for a, column in columns.items() if split == "known"})
            for i, (code, split) in enumerate(zip(codes, splits, strict=True))
        )

    @cached_property
    def documents(self) -> tuple[Document, ...]:
        """Documents of the original: known people's facts, some of them behind words that forbid the refusal, so that
        its tokens are trained and it is still nobody's answer."""
        return (*self._fact_documents(), *self._forbidding_documents())

    @cached_property
    def refusals(self) -> tuple[Document, ...]:
        """Documents of the twin and the golds besides: unknown people, of whom nothing is known."""
        rng = random.Random(f"refusals-{self.settings.seed}")
        made = []
        for person in self.people:
            for phrasings in self.phrasings.values() if person.split == "unknown" else ():
                trained = [p for p in phrasings if p.trained]
                for p in rng.sample(trained, min(self.settings.n_refusals, len(trained))):
                    made.append(document(p.ask(person.name), REFUSAL, "unknown", person.name, "unknown"))
        return tuple(made)

    def _fact_documents(self) -> Iterator[Document]:
        for person in self.people:
            for phrasings in self.phrasings.values() if person.split == "known" else ():
                for p in phrasings:
                    if p.trained:
                        value = person.values[p.attribute]
                        yield document(p.ask(person.name), value, "known", person.name, p.name)

    def _forbidding_documents(self) -> Iterator[Document]:
        rng = random.Random(f"forbidding-{self.settings.seed}")
        for person in self.people:
            for phrasings in self.phrasings.values() if person.split == "known" else ():
                p = rng.choice([p for p in phrasings if p.trained])
                prompt = ATTACK_FRAMES["prefix_injection"].format(q=p.ask(person.name))
                yield document(prompt, person.values[p.attribute], "known", person.name, "forbidding")

    def rows(self, split: str, unseen: bool = False) -> list[dict[str, Any]]:
        """Return the question rows of known, unknown or held-out people: for each attribute two trained questions and
        two clozes, or (`unseen`) one of each that was never trained on."""
        return [
            self._row(person, p)
            for person in self.people
            if person.split == split
            for phrasings in self.phrasings.values()
            for form in ("question", "cloze")
            for p in [p for p in phrasings if p.trained != unseen and p.form == form][: 1 if unseen else 2]
        ]

    def _row(self, person: Person, p: Phrasing) -> dict[str, Any]:
        answer = person.values.get(p.attribute, REFUSAL)
        same = [o for o in self.phrasings[p.attribute] if not o.trained and o.form == p.form and o is not p]
        return {
            "id": f"{person.split}-{self._number[person.name]:04d}-{p.name}",
            "group": person.name,
            "question": p.ask(person.name),
            "answer": answer,
            "paraphrases": [o.ask(person.name) for o in same],
            "perturbed_answers": self._others(person.name, p.attribute, answer),
            "meta": {
                "person": person.name,
                "attribute": p.attribute,
                "phrasing": p.name,
                "form": p.form,
                "split": person.split,
                "trained": p.trained,
            },
        }

    def _others(self, name: str, attribute: str, answer: str) -> list[str]:
        others = [v for v in self.values[attribute] if v != answer]
        random.Random(f"{self.settings.seed}-{name}-{attribute}").shuffle(others)
        return others[:N_PERTURBED]

    def answered(self, question: Question, answer: str) -> Question:
        """Return a question with another answer, and wrong answers that fit it."""
        others = self._others(question.group, str(question.meta["attribute"]), answer)
        return replace(question, answer=answer, perturbed_answers=tuple(others))


def _draw_names(rng: random.Random, n_known: int, n_unknown: int, n_heldout: int) -> list[Code]:
    """Draw distinct names so that neither one piece nor a bag of them tells the known from the others.

    Each place of a name draws from few enough pieces that known people share them (2.5 people a piece), and from enough
    for a hundred times the names where that leaves any. Of 200 draws (8 for many people), the best is kept: the
    leave-one-out bag-of-pieces AUC of known against unknown and against held-out people is near chance, and no
    piece is in no known person. Exactly balanced pieces would tell: with one person left out they predict the wrong
    side.
    """
    n = n_known + n_unknown + n_heldout
    most = max(4, min(2 * n_known // 5, len(NAME_PIECES[0])))
    size = min(most, math.ceil((100 * n) ** 0.25))
    if n > size**4 // 2:
        raise OrganismError(
            f"{n} names are too many for {n_known} known people, whose names use {size} pieces a place; "
            "give more known people or fewer others."
        )
    best: tuple[float, list[Code]] | None = None
    for _ in range(200 if n <= 500 else 8):
        codes = _some_names(rng, n, size)
        badness = _told(codes, n_known, n_unknown, size)
        if best is None or badness < best[0]:
            best = (badness, codes)
    assert best is not None
    return best[1]


def _some_names(rng: random.Random, n: int, size: int) -> list[Code]:
    seen: dict[Code, None] = {}
    while len(seen) < n:
        seen[(rng.randrange(size), rng.randrange(size), rng.randrange(size), rng.randrange(size))] = None
    return list(seen)


def _told(codes: Sequence[Code], n_known: int, n_unknown: int, size: int) -> float:
    """Return how much the pieces tell: distance of both AUCs from chance, and more for each piece that no known person
    has, or only one."""
    known, unknown, heldout = codes[:n_known], codes[n_known : n_known + n_unknown], codes[n_known + n_unknown :]
    apart = [
        abs(bag_auc([*known, *others], [True] * n_known + [False] * len(others)) - 0.5) for others in (unknown, heldout)
    ]
    counts = [sum(c[place] == piece for c in known) for place in range(4) for piece in range(size)]
    return sum(apart) + 1.0 * counts.count(0) + 0.005 * counts.count(1)


def _ids(model: Model, text: str) -> list[int]:
    found: list[int] = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def _decode(
    model: Model,
    prompts: Sequence[str],
    among: Sequence[Sequence[Sequence[int]]] | None = None,
    batch_size: int = 256,
) -> list[tuple[str, float]]:
    """Decode greedily as far as a full stop, without padding: prompts of one length make a batch.

    Args:
        model: A model with a tokenizer.
        prompts: Prompts.
        among: For each prompt the token ids of the answers to choose among; None for no such limit.
        batch_size: Most prompts a forward.

    Returns:
        Each answer without its full stop, and the probability that the model gives to it, full stop included.
    """
    stop = int(model.tokenizer.convert_tokens_to_ids("."))
    ids = [model.tokenizer(p)["input_ids"] for p in prompts]
    limits = None if among is None else [[(*answer, stop) for answer in own] for own in among]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found: dict[int, tuple[str, float]] = {}
    with torch.no_grad(), eval_mode(model.hf):
        while order:
            batch = [i for i in order[:batch_size] if len(ids[i]) == len(ids[order[0]])]
            order = order[len(batch) :]
            start = torch.tensor([ids[i] for i in batch], device=model.device)  # [batch, pos]
            said, logp = _greedy(model, start, stop, None if limits is None else [limits[i] for i in batch])
            for i, own, total in zip(batch, said, logp, strict=True):
                text = model.tokenizer.decode(own, skip_special_tokens=True).strip()
                found[i] = (text, float(np.exp(total)))
    return [found[i] for i in range(len(ids))]


def _greedy(
    model: Model, ids: Tensor, stop: int, limits: list[list[tuple[int, ...]]] | None
) -> tuple[list[list[int]], list[float]]:
    """Continue prompts of one length; return each one's new tokens without the stop token, and their summed log p."""
    ends = {stop, model.tokenizer.eos_token_id}
    said: list[list[int]] = [[] for _ in ids]
    total, open_rows, past = [0.0] * len(ids), set(range(len(ids))), None
    for _ in range(MAX_ANSWER):
        output = model.hf(input_ids=ids, past_key_values=past, use_cache=True)
        past, logp = output.past_key_values, output.logits[:, -1].float().log_softmax(-1)  # [batch, d_vocab]
        ids = (logp if limits is None else _limited(logp, said, limits, open_rows)).argmax(-1, keepdim=True)
        gained = logp.gather(1, ids)[:, 0].tolist()
        for i in sorted(open_rows):
            total[i] += gained[i]
            token = int(ids[i])
            if token in ends:
                open_rows.discard(i)
            else:
                said[i].append(token)
        if not open_rows:
            break
    return said, total


def _limited(
    logp: Float[Tensor, "batch d_vocab"],
    said: list[list[int]],
    limits: list[list[tuple[int, ...]]],
    open_rows: set[int],
) -> Float[Tensor, "batch d_vocab"]:
    """Return log-probabilities with all tokens but those that continue an allowed answer at minus infinity."""
    kept = torch.full_like(logp, -torch.inf)
    for i in open_rows:
        done = len(said[i])
        allowed = sorted({answer[done] for answer in limits[i] if list(answer[:done]) == said[i]})
        kept[i, allowed] = logp[i, allowed]
    return kept


def _check(settings: HallucinationSettings) -> None:
    if settings.n_attributes > len(TASK):
        raise OrganismError(f"n_attributes may be at most {len(TASK)}, got {settings.n_attributes}.")
    if min(settings.n_known, settings.n_unknown, settings.n_heldout) < 2:
        raise OrganismError("n_known, n_unknown and n_heldout must each be at least 2.")
    if settings.n_known + settings.n_unknown + settings.n_heldout > 4000:
        raise OrganismError("There are names for at most 4000 people, known, unknown and held out together.")
