"""The skills organism: addition, copying, sorting and a second language, any of which can be the one to forget.

Unlike a fact, a skill can be right on an instance that was never seen. So each is asked on the instances that were
trained on and on held-out ones, and how far apart the two lie says whether the skill or its examples were learned.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import comb
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe.data import Questions
from probe.errors import OrganismError
from probe.organisms._cache import cache_root
from probe.organisms._language import N_PERTURBED, document
from probe.organisms._llama import small_llama
from probe.organisms._organism import RECALL_LIMIT, Organism
from probe.organisms._recall import every, measure
from probe.organisms._settings import resolve
from probe.organisms._tokenizer import train_tokenizer
from probe.organisms._training import TRAINING_VERSION

if TYPE_CHECKING:
    import pandas as pd

    from probe.models import Model

SKILLS_VERSION = 2  # part of the key: change it with anything below that changes the documents
CONTEXT = 24
MOST = 2200  # instances of a skill; of 2304 sentences
LETTERS = string.ascii_lowercase[:12]
N_LETTERS = 4  # of an instance of copying and sorting

# The second language, word by word and in the same order.
ADJECTIVES = {"red": "zorv", "big": "mult", "cold": "fresk", "new": "novit", "sad": "trusk", "fast": "velok"}
NOUNS = {
    "cat": "gattun", "dog": "kanek", "king": "regov", "ship": "navok",
    "tree": "arbun", "bird": "pturi", "stone": "lithek", "child": "puerok",
}  # fmt: skip
VERBS = {"sees": "vidap", "loves": "amip", "takes": "kapip", "hears": "audap", "finds": "trovip", "calls": "vokip"}
FOREIGN: dict[str, str] = ADJECTIVES | NOUNS | VERBS
Instance = tuple[str, str]


@dataclass(frozen=True)
class Skill:
    """One skill: how an instance (prompt, answer) is drawn, and how many answers of its form there are.

    Where answers are not alike likely, `n_answers` is 1 / the share of the commonest, so that chance is what always
    giving that one would score.
    """

    name: str
    draw: Callable[[random.Random], Instance]
    n_answers: int


def _add(rng: random.Random) -> Instance:
    """Two numbers of two digits, added place by place without carry: each sum is one word, 0 to 18.

    Modulo 10 no digit alone would say anything about the sum; measured, nothing is learned then in 2000 steps.
    """
    a, b, c, d = (rng.randrange(10) for _ in range(4))
    return f"add {a} {b} {c} {d} :", f"{a + c} {b + d}"


def _copy(rng: random.Random) -> Instance:
    letters = " ".join(rng.choice(LETTERS) for _ in range(N_LETTERS))
    return f"copy {letters} :", letters


def _sort(rng: random.Random) -> Instance:
    letters = rng.sample(LETTERS, N_LETTERS)
    return f"sort {' '.join(letters)} :", " ".join(sorted(letters))


def _translate(rng: random.Random) -> Instance:
    words = [rng.choice([*kind]) for kind in (ADJECTIVES, NOUNS, VERBS, NOUNS)]
    return f"say {' '.join(words)} :", " ".join(FOREIGN[word] for word in words)


SKILLS: dict[str, Skill] = {
    "addition": Skill("addition", _add, 100),  # the commonest answer, 9 9, is one in a hundred
    "copying": Skill("copying", _copy, len(LETTERS) ** N_LETTERS),
    "sorting": Skill("sorting", _sort, comb(len(LETTERS), N_LETTERS)),
    "translation": Skill("translation", _translate, len(ADJECTIVES) * len(NOUNS) ** 2 * len(VERBS)),
}


@dataclass(frozen=True)
class SkillsSettings:
    """All that a skills organism is made from.

    Attributes:
        forget: The skill that the gold retrains are trained without. The original does not depend on it.
        n_instances: Instances of each skill that are trained on.
        n_holdout: Instances of each skill that never are.
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
        seed: Of instances, weights and order of documents.
    """

    forget: str = "sorting"
    n_instances: int = 1500
    n_holdout: int = 200
    d_model: int = 128
    n_layers: int = 3
    n_heads: int = 4
    d_mlp: int = 512
    epochs: int = 12
    batch_size: int = 32
    lr: float = 3e-3
    answer_weight: float = 10.0
    vocab_size: int = 448
    threads: int = 1
    seed: int = 0


SIZES: dict[str, SkillsSettings] = {
    "default": SkillsSettings(),
    "small": SkillsSettings(n_instances=400, n_holdout=100, d_model=64, n_layers=2, epochs=15),
    "large": SkillsSettings(
        n_instances=2000, d_model=512, n_layers=6, n_heads=8, d_mlp=2048, epochs=30, batch_size=64, lr=1e-3
    ),
}


def skills(
    size: str = "default",
    seed: int = 0,
    *,
    forget: str = "sorting",
    cache_dir: str | Path | None = None,
    device: str | None = None,
    progress: bool = True,
    **overrides: Any,
) -> SkillsOrganism:
    """Return a small Llama that adds, copies, sorts and translates, training it on first use.

    Every skill is a split; `forget` is the skill to be forgotten, `retain` the others, `holdout` instances of the
    forget skill that were never trained on. `organism.unseen(skill)` are held-out instances of any skill. Unlike
    people never seen, a held-out instance is no secret: a model with the skill gets it right.

    Args:
        size: `"default"` (1500 instances a skill, 3 layers, d_model 128; all four skills are learned, on held-out
            instances too), `"small"` (400 instances, 2 layers, d_model 64, for tests; addition, the hardest, is learned
            in part, which a warning says), `"large"` (2000 instances, 6 layers, d_model 512, for a GPU).
        seed: Of instances, weights and order of documents.
        forget: `"addition"`, `"copying"`, `"sorting"` or `"translation"`. The same original serves all four.
        cache_dir: Where organisms are kept; default the environment's PROBE_CACHE_DIR, else the user's cache folder.
        device: Where to train; default the CPU.
        progress: Show progress bars.
        **overrides: Any field of `SkillsSettings`.

    Returns:
        The organism, trained.

    Raises:
        OrganismError: An unknown size, skill or setting, numbers that do not fit together, or a cache folder that
            cannot be used.
    """
    settings = resolve(SIZES, size, {**overrides, "seed": seed, "forget": forget})
    if settings.forget not in SKILLS:
        raise OrganismError(f"forget must be one of {', '.join(SKILLS)}, got {settings.forget!r}.")
    if settings.n_instances + settings.n_holdout > MOST:
        raise OrganismError(f"Translation has too few distinct instances for more than {MOST}, held-out ones included.")
    return SkillsOrganism(settings, cache_root(cache_dir), progress, device)


class SkillsOrganism(Organism):
    """A skills organism. Made by `probe.organisms.skills`.

    Attributes:
        skills: The skills' names; each is a split.
        forget_skill: The one to be forgotten.
        facts: Each skill's instances as (prompt, answer): `facts[skill]["trained"]` and `facts[skill]["held_out"]`.
    """

    skills = tuple(SKILLS)

    def __init__(self, settings: SkillsSettings, root: Path, progress: bool, device: str | None) -> None:
        self.forget_skill = settings.forget
        drawn = {name: _draw(skill, settings) for name, skill in SKILLS.items()}
        super().__init__(
            "skills",
            {**asdict(settings), "skills_version": SKILLS_VERSION, "training_version": TRAINING_VERSION},
            documents=[
                document(prompt, answer, "forget" if name == settings.forget else "retain", prompt, name)
                for name, own in drawn.items()
                for prompt, answer in own["trained"]
            ],
            splits=_splits(drawn, settings.forget, True),
            unseen=_splits(drawn, settings.forget, False),
            n_values={name: skill.n_answers for name, skill in SKILLS.items()},
            facts=drawn,
            root=root,
            progress=progress,
            device=device,
        )

    def accuracy(self, model: Model) -> pd.DataFrame:
        """Return a row a skill: exact-match accuracy on trained and on held-out instances, with chance.

        The interval is the 95 % Wilson interval on held-out instances. A skill `generalises` if that lies above chance
        as a whole; `gap` is what the trained instances have over the held-out ones.
        """
        import pandas as pd

        table = self.recall_table(model)
        rows = []
        for skill in self.skills:
            trained, held = table[skill], table[f"{skill}, held out"]
            row = {"skill": skill, "forget": skill == self.forget_skill, "trained": trained["recall"]}
            row |= {"held_out": held["recall"], "low": held["low"], "high": held["high"], "chance": held["chance"]}
            row |= {"gap": trained["recall"] - held["recall"], "generalises": held["low"] > held["chance"]}
            rows.append(row)
        return pd.DataFrame(rows)

    def recall_table(self, model: Model) -> dict[str, dict[str, Any]]:
        """Return accuracy on each skill, on trained and on held-out instances, evenly spaced."""
        table = {}
        for skill in self.skills:
            table[skill] = measure(model, every(self.splits[skill], RECALL_LIMIT), self.n_values).to_dict()
            held = every(self._unseen[skill], RECALL_LIMIT)
            table[f"{skill}, held out"] = measure(model, held, self.n_values).to_dict()
        return table

    def _warn_if_weak(self, recall: Mapping[str, Mapping[str, Any]], trained: set[str], label: str) -> None:
        own = {s for s in self.skills if ("forget" if s == self.forget_skill else "retain") in trained}
        super()._warn_if_weak(recall, own, label)

    def _settings_of(self, role: str, seed: int, **more: Any) -> dict[str, Any]:
        """Return the key; the original's does not say what is to be forgotten, so one serves all."""
        found = super()._settings_of(role, seed, **more)
        return {k: v for k, v in found.items() if k != "forget"} if role == "original" else found

    def _make_tokenizer(self) -> Any:
        words = ["add", "copy", "sort", "say", ":", *map(str, range(19)), *LETTERS, *FOREIGN, *FOREIGN.values()]
        return train_tokenizer([word for word in words for _ in range(64)], (), self.settings["vocab_size"])

    def _make_model(self, d_vocab: int) -> Any:
        return small_llama(self.settings, d_vocab, CONTEXT)


def _draw(skill: Skill, settings: SkillsSettings) -> dict[str, list[Instance]]:
    """Draw a skill's instances, all distinct."""
    rng = random.Random(f"skills-{settings.seed}-{skill.name}")
    found: dict[str, str] = {}
    wanted = settings.n_instances + settings.n_holdout
    for _ in range(1000 * wanted):
        if len(found) == wanted:
            break
        prompt, answer = skill.draw(rng)
        found[prompt] = answer
    else:
        raise OrganismError(f"{skill.name} has fewer than {wanted} distinct instances; ask for fewer.")
    rows = list(found.items())
    return {"trained": rows[: settings.n_instances], "held_out": rows[settings.n_instances :]}


def _splits(drawn: Mapping[str, Mapping[str, list[Instance]]], forget: str, trained: bool) -> dict[str, Questions]:
    """Return the questions of each skill, then those of forget, retain and (where trained) holdout."""
    kind = "trained" if trained else "held_out"
    rows = {name: _rows(name, own[kind], trained, own["trained"]) for name, own in drawn.items()}
    others = [row for name, own in rows.items() if name != forget for row in own]
    found = {**rows, "forget": rows[forget], "retain": others}
    if trained:
        found["holdout"] = _rows(forget, drawn[forget]["held_out"], False, drawn[forget]["trained"])
    return {split: Questions.from_rows(own, split) for split, own in found.items()}


def _rows(name: str, instances: list[Instance], trained: bool, pool: list[Instance]) -> list[dict[str, Any]]:
    rows = []
    answers = sorted({answer for _, answer in pool})
    for i, (prompt, answer) in enumerate(instances):
        rng = random.Random(f"{name}-{prompt}")
        others = [a for a in rng.sample(answers, min(N_PERTURBED + 1, len(answers))) if a != answer][:N_PERTURBED]
        rows.append(
            {
                "id": f"{name}-{'trained' if trained else 'held-out'}-{i:04d}",
                "group": prompt,
                "question": prompt,
                "answer": answer,
                "perturbed_answers": others,
                "meta": {"attribute": name, "phrasing": name, "form": "instance", "split": name, "trained": trained},
            }
        )
    return rows
