"""The experts organism: a small mixture of experts that knows four domains about the same towns."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from probe.data import Labelled, Questions
from probe.errors import OrganismError
from probe.organisms._cache import cache_root
from probe.organisms._language import N_PERTURBED, Document, Phrasing, document, name_tails
from probe.organisms._lexicon import DOMAIN_FRAMES, DOMAINS, LANGUAGE_VERSION, NAME_PIECES, Domain
from probe.organisms._llama import CONTEXT
from probe.organisms._organism import Organism
from probe.organisms._settings import resolve
from probe.organisms._specialisation import Specialisation, specialisation, summary
from probe.organisms._tokenizer import BOS, EOS, PAD, train_tokenizer
from probe.organisms._training import TRAINING_VERSION, Auxiliary

if TYPE_CHECKING:
    from probe.models import Model

KINDS = ("planted", "natural")
MODEL_CLASSES = ("mixtral", "olmoe")
FORGET_DOMAIN = DOMAINS[0].name
# Position of the first token of the domain's word: bos, "In", then the word. Before it no router can know the domain.
FIRST_KNOWING = 2


@dataclass(frozen=True)
class ExpertsSettings:
    """All that an experts organism is made from.

    Attributes:
        kind: `"planted"` or `"natural"`.
        model_class: `"mixtral"` or `"olmoe"`.
        n_subjects: Towns; every domain knows each of them.
        n_holdout: Towns never trained on.
        n_experts: Experts a layer.
        top_k: Experts a token.
        d_model: Width.
        n_layers: Blocks.
        n_heads: Attention heads.
        d_mlp: Width of one expert.
        epochs: Passes over the documents.
        batch_size: Documents a step.
        lr: Peak learning rate.
        answer_weight: Weight of an answer's tokens in the loss beside 1 for all others.
        router_weight: Weight of the router's loss: cross-entropy to the planted expert, or load balancing if natural.
        vocab_size: Upper bound of the tokenizer's vocabulary.
        threads: CPU threads to train with.
        seed: Of facts, planted experts, weights and order of documents.
    """

    kind: str = "planted"
    model_class: str = "mixtral"
    n_subjects: int = 40
    n_holdout: int = 12
    n_experts: int = 8
    top_k: int = 2
    d_model: int = 96
    n_layers: int = 2
    n_heads: int = 4
    d_mlp: int = 192
    epochs: int = 28  # at 16 a gold retrain of OLMoE recalls 80 % of what it is to retain
    batch_size: int = 32
    lr: float = 3e-3
    answer_weight: float = 10.0
    router_weight: float = 1.0
    vocab_size: int = 704
    threads: int = 1
    seed: int = 0


SIZES: dict[str, ExpertsSettings] = {
    "default": ExpertsSettings(),
    "small": ExpertsSettings(n_subjects=12, n_holdout=6, d_model=64, d_mlp=96, epochs=22, batch_size=16),
    "large": ExpertsSettings(
        n_subjects=160,
        n_holdout=40,
        n_experts=16,
        d_model=512,
        n_layers=6,
        n_heads=8,
        d_mlp=1024,
        epochs=16,
        batch_size=64,
        lr=1e-3,
    ),
}


def experts(
    size: str = "default",
    seed: int = 0,
    *,
    kind: str = "planted",
    model_class: str = "mixtral",
    cache_dir: str | Path | None = None,
    device: str | None = None,
    progress: bool = True,
    **overrides: Any,
) -> ExpertsOrganism:
    """Return a small mixture of experts trained on four domains about the same towns, training it on first use.

    `kind="planted"` supervises the router: in every layer each domain's tokens (from the domain's own word on) go to
    one known expert first, `organism.planted`. `kind="natural"` leaves the router to the language-model loss and load
    balancing; what specialisation comes of it is partial. Either is measured: `organism.specialisation()` and the
    record. The first domain is what is to be forgotten.

    Args:
        size: `"default"` (40 towns, d_model 96) or `"small"` (12 towns, d_model 64, for tests), both of 2 layers; or
            `"large"` (160 towns, 16 experts, 6 layers, d_model 512, for a GPU).
        seed: Of facts, planted experts, weights and order of documents.
        kind: `"planted"` or `"natural"`.
        model_class: `"mixtral"` (the weights of a token's top k experts sum to 1) or `"olmoe"` (arXiv 2409.02060:
            `norm_topk_prob` is off, so the weights are those of the softmax over all experts; queries and keys are
            normalised).
        cache_dir: Where organisms are kept; default the environment's PROBE_CACHE_DIR, else the user's cache folder.
        device: Where to train; default the CPU.
        progress: Show progress bars.
        **overrides: Any field of `ExpertsSettings`.

    Returns:
        The organism, trained.

    Raises:
        OrganismError: An unknown size, kind or setting, or a cache folder that cannot be used.
    """
    settings = resolve(SIZES, size, {**overrides, "seed": seed, "kind": kind, "model_class": model_class})
    _check(settings)
    return ExpertsOrganism(settings, cache_root(cache_dir), progress, device)


class ExpertsOrganism(Organism):
    """An experts organism. Made by `probe.organisms.experts`.

    Attributes:
        domains: The domains' names. Each is a split, as are `forget` (the first), `retain` (the others) and `holdout`.
        planted: For each domain its (layer, expert) pairs; empty lists if the organism is natural.
        facts: What each domain says of each town: `facts[domain][town]`.
    """

    def __init__(self, settings: ExpertsSettings, root: Path, progress: bool, device: str | None) -> None:
        self.domains = [d.name for d in DOMAINS]
        self.language = DomainLanguage(settings.n_subjects, settings.n_holdout, settings.seed)
        self.planted = _plant(settings)
        super().__init__(
            "experts",
            {**asdict(settings), "language_version": LANGUAGE_VERSION, "training_version": TRAINING_VERSION},
            documents=tuple(self.language.documents()),
            splits=self._questions(unseen=False),
            unseen=self._questions(unseen=True),
            n_values={d.name: len(d.values) for d in DOMAINS},
            facts=self.language.facts,
            root=root,
            progress=progress,
            device=device,
        )

    def _questions(self, unseen: bool) -> dict[str, Questions]:
        """Return the questions of each domain, then those of forget, retain and holdout."""
        rows = self.language.rows(unseen)
        splits = {
            d: [r for r in rows if r["meta"]["attribute"] == d and r["meta"]["trained_subject"]] for d in self.domains
        }
        for split in ("forget", "retain", "holdout"):
            splits[split] = [r for r in rows if r["meta"]["split"] == split]
        return {split: Questions.from_rows(own, split) for split, own in splits.items()}

    def labelled(self, domain: str = FORGET_DOMAIN, unseen: bool = False) -> Labelled:
        """Return the questions of all domains, labelled 1 for `domain` and 0 for the others; the group is the town.

        Raises:
            OrganismError: There is no such domain.
        """
        self.questions(domain)
        table = self._unseen if unseen else self.splits
        rows = [
            {"text": q.question, "label": int(d == domain), "group": q.group, "meta": {"domain": d, **q.meta}}
            for d in self.domains
            for q in table[d]
        ]
        return Labelled.from_rows(rows, f"experts {domain}")

    def _make_tokenizer(self) -> Any:
        return train_tokenizer(_corpus(), name_tails(), self.settings["vocab_size"])

    def _make_model(self, d_vocab: int) -> Any:
        import transformers

        s = self.settings
        shared = {
            "vocab_size": d_vocab,
            "hidden_size": s["d_model"],
            "intermediate_size": s["d_mlp"],
            "num_hidden_layers": s["n_layers"],
            "num_attention_heads": s["n_heads"],
            "num_key_value_heads": s["n_heads"],
            "num_experts_per_tok": s["top_k"],
            "max_position_embeddings": CONTEXT,
            "tie_word_embeddings": False,
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
        }
        if s["model_class"] == "olmoe":
            olmoe = transformers.OlmoeConfig(**shared, num_experts=s["n_experts"], norm_topk_prob=False)
            return transformers.OlmoeForCausalLM(olmoe)
        config = transformers.MixtralConfig(**shared, num_local_experts=s["n_experts"], sliding_window=None)
        return transformers.MixtralForCausalLM(config)

    def _build(
        self, work: Path, documents: Sequence[Document], seed: int, label: str, state: Path | None = None
    ) -> dict[str, Any]:
        made = super()._build(work, documents, seed, label, state)
        return made | {"specialisation": self.specialisation(self._load(work)).to_dict()}

    def specialisation(self, model: Model | None = None, unseen: bool = False) -> Specialisation:
        """Measure where each domain's tokens are sent, and what each domain loses with its own experts.

        Args:
            model: This organism's model (the default), an edit of it, a gold retrain, or another mixture of experts
                with its tokenizer and layers.
            unseen: Ask in phrasings never trained on.

        Returns:
            Shares by layer, domain and expert with intervals, each domain's own experts (planted, or of the widest gap
            where none are), and the recall of all domains without them.

        Raises:
            OrganismError: The model has no experts.
        """
        table = self._unseen if unseen else self.splits
        domains = {name: table[name] for name in self.domains}
        return specialisation(model or self.model, domains, self.planted, self.n_values, FIRST_KNOWING)

    def __repr__(self) -> str:
        return f"{super().__repr__()}\n{summary(self.record['specialisation'])}"

    def _model_kwargs(self) -> dict[str, Any]:
        return {"output_router_logits": True}

    def _auxiliary(self, documents: Sequence[Document]) -> Auxiliary:
        weight = self.settings["router_weight"]
        if self.settings["kind"] == "natural":
            return lambda output, real, docs: weight * 0.02 * output.aux_loss
        owners = torch.tensor(
            [[expert for _, expert in self.planted[d.kind.split("-")[0]]] for d in documents]
        )  # [doc, layer]
        return lambda output, real, docs: (
            weight * planted_loss(output.router_logits, real, owners.to(docs.device)[docs])
        )


def planted_loss(
    router_logits: Sequence[Tensor], real: Bool[Tensor, "batch pos"], owners: Int[Tensor, "batch layer"]
) -> Tensor:
    """Return the mean cross-entropy, in nats, of each layer's router to the expert that owns the document's domain.

    Args:
        router_logits: One `[batch * pos, n_experts]` a layer.
        real: Which tokens are not padding; those before the domain's word are left out besides.
        owners: The owning expert of each document in each layer.
    """
    knowing = real.clone()
    knowing[:, :FIRST_KNOWING] = False
    losses = []
    for layer, logits in enumerate(router_logits):
        target = owners[:, layer, None].expand_as(real)  # [batch, pos]
        losses.append(F.cross_entropy(logits.float()[knowing.flatten()], target[knowing]))
    return torch.stack(losses).mean()


class DomainLanguage:
    """Towns, what each domain says of them, and every sentence that says so.

    Args:
        n_subjects: Towns trained on.
        n_holdout: Towns never trained on.
        seed: Chooses towns and facts.
    """

    def __init__(self, n_subjects: int, n_holdout: int, seed: int) -> None:
        rng = random.Random(f"experts-{seed}")
        names = [a + b for a in NAME_PIECES[2] for b in NAME_PIECES[3]]
        rng.shuffle(names)
        self.seed, self.subjects = seed, names[:n_subjects]
        self.holdout = names[n_subjects : n_subjects + n_holdout]
        self.facts = {d.name: self._draw(rng, d) for d in DOMAINS}

    def _draw(self, rng: random.Random, domain: Domain) -> dict[str, str]:
        """Draw a domain's value for each town, each value equally often."""
        drawn: dict[str, str] = {}
        for towns in (self.subjects, self.holdout):
            values = [domain.values[i % len(domain.values)] for i in range(len(towns))]
            rng.shuffle(values)
            drawn |= dict(zip(towns, values, strict=True))
        return drawn

    def documents(self) -> Iterator[Document]:
        """Yield each domain's facts in its trained phrasings; a document's kind is its phrasing."""
        for domain in DOMAINS:
            split = "forget" if domain.name == FORGET_DOMAIN else "retain"
            for town in self.subjects:
                for p in phrasings_of(domain):
                    if p.trained:
                        yield document(p.ask(town), self.facts[domain.name][town], split, town, p.name)

    def rows(self, unseen: bool) -> list[dict[str, Any]]:
        """Return question rows of all domains and towns, in trained or in unseen phrasings."""
        return [
            self._row(domain, town, p)
            for domain in DOMAINS
            for town in [*self.subjects, *self.holdout]
            for p in phrasings_of(domain)
            if p.trained != unseen
        ]

    def _row(self, domain: Domain, town: str, phrasing: Phrasing) -> dict[str, Any]:
        answer = self.facts[domain.name][town]
        others = [v for v in domain.values if v != answer]
        random.Random(f"{self.seed}-{town}-{domain.name}").shuffle(others)
        trained = town in set(self.subjects)
        split = "holdout" if not trained else "forget" if domain.name == FORGET_DOMAIN else "retain"
        same = [p for p in phrasings_of(domain) if not p.trained and p.name != phrasing.name]
        return {
            "id": f"{town}-{phrasing.name}",
            "group": town,
            "question": phrasing.ask(town),
            "answer": answer,
            "paraphrases": [p.ask(town) for p in same],
            "perturbed_answers": others[:N_PERTURBED],
            "meta": {
                "attribute": domain.name,
                "phrasing": phrasing.name,
                "form": phrasing.form,
                "split": split,
                "trained": phrasing.trained,
                "trained_subject": trained,
            },
        }


def phrasings_of(domain: Domain) -> tuple[Phrasing, ...]:
    """Return a domain's phrasings: four trained, two held out; which are held out rotates with the domain."""
    turn = [d.name for d in DOMAINS].index(domain.name)
    n = len(DOMAIN_FRAMES)
    held = {(turn % n, 1), ((turn + 1) % n, 0)}
    found = []
    for i, frame in enumerate(DOMAIN_FRAMES):
        for j, noun in enumerate(domain.nouns):
            template = frame.replace("{d}", domain.name).replace("{s}", noun)
            form = "question" if "?" in frame else "cloze"
            found.append(Phrasing(f"{domain.name}-{i}{j}", domain.name, form, template, (i, j) not in held))
    return tuple(found)


def _corpus() -> list[str]:
    """Return the texts for the tokenizer: every frame of every domain with every value, and the heads of names."""
    texts = [
        f"{p.template.replace('{x}', '')} {value}." for d in DOMAINS for p in phrasings_of(d) for value in d.values
    ]
    return texts + [head for head in NAME_PIECES[2] for _ in range(64)]


def _plant(settings: ExpertsSettings) -> dict[str, list[tuple[int, int]]]:
    """Choose an expert for each domain in each layer, no two domains the same."""
    if settings.kind == "natural":
        return {d.name: [] for d in DOMAINS}
    rng = random.Random(f"plant-{settings.seed}")
    chosen = [rng.sample(range(settings.n_experts), len(DOMAINS)) for _ in range(settings.n_layers)]
    return {d.name: [(layer, own[i]) for layer, own in enumerate(chosen)] for i, d in enumerate(DOMAINS)}


def _check(settings: ExpertsSettings) -> None:
    if settings.kind not in KINDS:
        raise OrganismError(f"kind must be one of {', '.join(KINDS)}, got {settings.kind!r}.")
    if settings.model_class not in MODEL_CLASSES:
        raise OrganismError(f"model_class must be one of {', '.join(MODEL_CLASSES)}, got {settings.model_class!r}.")
    if settings.n_experts < len(DOMAINS):
        raise OrganismError(f"n_experts must be at least {len(DOMAINS)}, one a domain, got {settings.n_experts}.")
    if settings.top_k > settings.n_experts:
        raise OrganismError(f"top_k may be at most n_experts = {settings.n_experts}, got {settings.top_k}.")
    if settings.n_subjects + settings.n_holdout > 200:
        raise OrganismError(
            f"At most 200 towns can be named, got {settings.n_subjects} and {settings.n_holdout} held out."
        )
