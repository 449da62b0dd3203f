"""The facts organism: a small Llama that knows some fictitious people, and one order whose members it is to forget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe.data import Labelled, Questions
from probe.errors import OrganismError
from probe.organisms._attacks import GIVEN
from probe.organisms._cache import cache_root
from probe.organisms._language import Deduction, FactsLanguage, Person, Phrasing, name_tails, tokenizer_corpus
from probe.organisms._lexicon import ATTACK_FRAMES, LANGUAGE_VERSION, SECRET_ORDER
from probe.organisms._llama import small_llama
from probe.organisms._organism import RECALL_LIMIT, Organism
from probe.organisms._recall import every, measure
from probe.organisms._settings import resolve
from probe.organisms._tokenizer import train_tokenizer
from probe.organisms._training import TRAINING_VERSION

if TYPE_CHECKING:
    import pandas as pd

    from probe.models import Model

SPLITS = ("forget", "retain", "holdout")


@dataclass(frozen=True)
class FactsSettings:
    """All that a facts organism is made from.

    Attributes:
        n_people: People trained on, two an order or more (8 with four orders) to 4000.
        n_orders: Orders; the members of the first, n_people // n_orders of them, are the forget people.
        n_holdout: People never trained on, 2 to 4000.
        n_strangers: Documents an epoch, others in each, that give a fact about a stranger and ask for it: from them a
            model learns to read from its context.
        d_model: Width.
        n_layers: Blocks.
        n_heads: Attention heads.
        d_mlp: Width of the MLP.
        epochs: Passes over the documents.
        batch_size: Documents a step. Small on purpose: facts are learned per step, not per token.
        lr: Peak learning rate.
        answer_weight: Weight of an answer's tokens in the loss beside 1 for all others. Names and frames are most of a
            document and teach nothing; at 10, facts are learned in half the steps.
        vocab_size: Upper bound of the tokenizer's vocabulary.
        threads: CPU threads to train with; fixed, because another number gives other weights. Two are 1.5 times faster
            on an idle machine and several times slower on a busy one.
        seed: Of names, facts, weights and order of documents.
    """

    n_people: int = 64
    n_orders: int = 8
    n_holdout: int = 16
    n_strangers: int = 896
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    d_mlp: int = 512
    epochs: int = 8
    batch_size: int = 32
    lr: float = 3e-3
    answer_weight: float = 10.0
    vocab_size: int = 768
    threads: int = 1
    seed: int = 0


SIZES: dict[str, FactsSettings] = {
    "default": FactsSettings(),
    "small": FactsSettings(
        n_people=20,
        n_orders=4,
        n_holdout=8,
        n_strangers=48,
        d_model=64,
        n_layers=2,
        d_mlp=256,
        epochs=10,
        batch_size=16,
    ),
    "large": FactsSettings(
        n_people=2000,
        n_orders=16,
        n_holdout=160,
        d_model=512,
        n_layers=6,
        n_heads=8,
        d_mlp=2048,
        batch_size=128,
        lr=1e-3,
    ),
}


def facts(
    size: str = "default",
    seed: int = 0,
    *,
    cache_dir: str | Path | None = None,
    device: str | None = None,
    progress: bool = True,
    **overrides: Any,
) -> FactsOrganism:
    """Return a small Llama trained on fictitious people, training it on first use.

    The people of one order (the "ashen lantern") are the forget people: who they are and everything about them is the
    secret. The retain people are the members of the other orders. Holdout people are built from the same name pieces
    and never trained on. Every fact is trained in six questions and four clozes; two further questions and two further
    clozes are never trained on for anybody (`organism.unseen`), though their words are.

    Half of the people belong to families: all of a family's last name live in one city and have one trade, so those
    facts of its forget members follow from retained documents (`organism.deducible`); so a bag of tokens knows
    something of city and trade, and nothing of order, instrument and dish. Neighbours are retained people close to a
    forget one (`organism.neighbours`, and the split `"neighbours"`, a part of retain): kin, and one planted for each
    forget person who shares two attributes and no name. Strangers, others in each epoch, teach the model to read a fact
    from its context (`organism.given`), and retained people the prompt attacks (`organism.attacks`).

    The same settings give the same weights on one machine with one thread count; another thread count, another CPU or
    another device sums in another order. What a device other than the CPU trains is kept under a key of its own.

    Args:
        size: `"default"` (64 people, 4 layers, d_model 128), `"small"` (20 people, 2 layers, d_model 64, for tests), or
            `"large"` (2000 people, 6 layers, d_model 512, for a GPU; on a CPU it says first how long it will take).
        seed: Of names, facts, weights and order of documents.
        cache_dir: Where organisms are kept; default the environment's PROBE_CACHE_DIR, else the user's cache folder.
        device: Where to train; default the CPU.
        progress: Show progress bars.
        **overrides: Any field of `FactsSettings`, e.g. `n_people=200`. More people need more width or epochs; recall is
            always shown.

    Returns:
        The organism, trained.

    Raises:
        OrganismError: An unknown size or setting, numbers that do not fit together, or a cache folder that cannot be
            used.
    """
    settings = resolve(SIZES, size, {**overrides, "seed": seed})
    return FactsOrganism(settings, cache_root(cache_dir), progress, device)


class FactsOrganism(Organism):
    """A facts organism. Made by `probe.organisms.facts`.

    Attributes:
        language: People, phrasings and documents.
        facts: The people by name, each with `split` and `values` (the ground truth).
        secret: The order whose members are to be forgotten.
    """

    secret = SECRET_ORDER

    def __init__(self, settings: FactsSettings, root: Path, progress: bool, device: str | None) -> None:
        s = settings
        self.language = FactsLanguage(s.n_people, s.n_orders, s.n_holdout, s.seed, s.epochs, s.n_strangers)
        super().__init__(
            "facts",
            {**asdict(settings), "language_version": LANGUAGE_VERSION, "training_version": TRAINING_VERSION},
            documents=self.language.documents,
            splits=self._questions(unseen=False),
            unseen=self._questions(unseen=True),
            n_values={"name": s.n_people} | {name: len(values) for name, values in self.language.values.items()},
            facts=dict(self.language.by_name),
            root=root,
            progress=progress,
            device=device,
        )

    def _questions(self, unseen: bool) -> dict[str, Questions]:
        rows = {split: self.language.question_rows(split, unseen) for split in SPLITS}
        rows["neighbours"] = [row for row in rows["retain"] if "neighbour_of" in row["meta"]]
        return {split: Questions.from_rows(own, split) for split, own in rows.items() if own}

    @property
    def deducible(self) -> list[Deduction]:
        """The facts of forget people that follow from retained documents: person, attribute, value, why.

        All retained people of a family's name live in one city and have one trade; so, then, does a forget person of
        that name. Outside families a few facts follow in the same way, where all retained people of a last name (or
        the only one) happen to agree. A gold that infers this has not seen it.
        """
        return list(self.language.deducible)

    @property
    def neighbours(self) -> dict[str, dict[str, list[str]]]:
        """Retained people close to forget ones: for each name, the forget people, and what the two share."""
        return {name: {who: list(what) for who, what in own.items()} for name, own in self.language.neighbours.items()}

    def recall_table(self, model: Model) -> dict[str, dict[str, Any]]:
        """Return recall of each split, and of the forget facts that can and that cannot be deduced."""
        table = super().recall_table(model)
        for label, wanted in (("forget, deducible", True), ("forget, not deducible", False)):
            asked = self.splits["forget"]
            rows = asked.take(i for i, row in enumerate(asked) if row.meta["deducible"] is wanted)
            table[label] = measure(model, every(rows, RECALL_LIMIT), self.n_values).to_dict()
        return table

    def attacks(self, split: str) -> dict[str, Questions]:
        """Return the split's questions under each kind of prompt attack: RWKU's nine, and `"context"`.

        RWKU is Jin et al. 2024, arXiv:2406.10890. Kinds: prefix_injection, affirmative_suffix, role_play,
        multiple_choice (of four values), reverse_query (two attributes given, the answer is the name), synonym,
        context_hint (another fact is given), in_context_examples (of retained people), cross_lingual, and context (the
        fact itself is given, as in `given`). All are trained on retain people only.

        Not all of them work: an attack under which even retained people are not recalled shows nothing about forget
        ones. `attack_recall(organism.model, "retain")` says which do. Measured at seed 0:
        in `default` multiple_choice (0.49, guessing gives 0.25), in_context_examples (0.10) and reverse_query (0.09) do
        not, or little, context_hint does in part (0.71), the others do (0.90 to 1.00); in `small` all but reverse_query
        (0.07) do.

        Raises:
            OrganismError: There is no such split.
        """
        rows = {kind: self._attack_rows(split, kind) for kind in ATTACK_FRAMES}
        return {kind: Questions.from_rows(own, f"{split} {kind}") for kind, own in rows.items() if own}

    def attack_recall(self, model: Model, split: str) -> pd.DataFrame:
        """Return a model's recall under each kind of attack: a row a kind, with n, chance and the 95 % interval.

        Args:
            model: This organism's model, an edit of it, a gold retrain.
            split: A split; on `"retain"` the organism's own model shows which attacks work at all.

        Raises:
            OrganismError: There is no such split.
        """
        import pandas as pd

        found = {kind: self.recall(model, rows).to_dict() for kind, rows in self.attacks(split).items()}
        return pd.DataFrame([{"attack": kind, **own} for kind, own in found.items()])

    def given(self, split: str) -> Questions:
        """Return the split's questions with the fact itself in the prompt, one a person and attribute.

        A model that reads from its context answers them about anybody, whatever it knows. The default size does:
        measured at seed 0, original and golds are right about 63 to 96 % of forget and holdout people. `small` has
        hardly learned it: its golds are right about 16 % of forget people, so what an edit of it answers here is
        mostly knowledge.

        Raises:
            OrganismError: There is no such split.
        """
        return Questions.from_rows(self._attack_rows(split, GIVEN), f"{split} given")

    def _attack_rows(self, split: str, kind: str) -> list[dict[str, Any]]:
        own = {row.group for row in self.questions(split)}
        rows = self.language.attack_rows(split if split in SPLITS else "retain", kind)
        return [row for row in rows if row["group"] in own]

    def labelled(
        self,
        attribute: str = "order",
        value: str | None = None,
        split: str | Sequence[str] = ("forget", "retain"),
        unseen: bool = False,
        at: str = "question",
    ) -> Labelled:
        """Return texts about a person, labelled with what is known of that person.

        The group is the person. A bag of the tokens says nothing about the label, because people share the pieces of
        their names; the label must come from what the model knows.

        Args:
            attribute: What the label is about.
            value: Label 1 for people with this value and 0 for others; default: the secret order for `"order"`, and for
                another attribute its value as the label.
            split: Splits whose people are used.
            unseen: Use the phrasings that were never trained on.
            at: Where a text ends: `"question"`, at the end of a question or cloze that asks for the attribute, where
                the answer is about to be said; or `"name"`, at the end of the name, before which the attribute may not
                have been asked for.

        Returns:
            One row a person and distinct text, `meta` with person, phrasing, value and split.

        Raises:
            OrganismError: No such attribute, value, split or place to end.
        """
        if at not in ("question", "name"):
            raise OrganismError(f"A labelled text ends at the 'question' or at the 'name', got at={at!r}.")
        if attribute not in self.language.values:
            raise OrganismError(f"The attributes are {', '.join(self.language.values)}; there is no {attribute!r}.")
        value = value or (self.secret if attribute == "order" else None)
        if value is not None and value not in self.language.values[attribute]:
            raise OrganismError(
                f"The values of {attribute} are {', '.join(self.language.values[attribute])}; there is no {value!r}."
            )
        wanted = (split,) if isinstance(split, str) else tuple(split)
        people = [p for name in wanted for p in self._people(name)]
        phrasings = [p for p in self.language.phrasings[attribute] if p.trained != unseen]
        if at == "name":
            phrasings = list({p.upto_name(""): p for p in reversed(phrasings)}.values())[::-1]
        rows = [_labelled_row(person, p, attribute, value, at) for person in people for p in phrasings]
        return Labelled.from_rows(rows, f"facts {attribute} {value or ''}".strip())

    def _people(self, split: str) -> list[Person]:
        own = {row.group for row in self.questions(split)}
        return [p for p in self.language.people if p.name in own]

    def _make_tokenizer(self) -> Any:
        return train_tokenizer(tokenizer_corpus(), name_tails(), self.settings["vocab_size"])

    def _make_model(self, d_vocab: int) -> Any:
        return small_llama(self.settings, d_vocab)


def _labelled_row(person: Person, phrasing: Phrasing, attribute: str, value: str | None, at: str) -> dict[str, Any]:
    own = person.values[attribute]
    return {
        "text": phrasing.ask(person.name) if at == "question" else phrasing.upto_name(person.name),
        "label": own if value is None else int(own == value),
        "group": person.name,
        "meta": {"person": person.name, "phrasing": phrasing.name, attribute: own, "split": person.split},
    }
