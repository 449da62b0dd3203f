"""The one call: a case from its arguments, a bench, a card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from probe.audit._bench import Bench, check_golds
from probe.audit._card import ReportCard
from probe.audit._case import Case
from probe.audit.part import Part
from probe.data import Questions
from probe.errors import DataError
from probe.models import Model


def audit(
    model: Model,
    edit: Any,
    forget: Questions,
    retain: Questions,
    holdout: Questions | None = None,
    *,
    unseen: Questions | None = None,
    unseen_retain: Questions | None = None,
    sets: Mapping[str, Questions] | None = None,
    attacks: Mapping[str, Questions] | None = None,
    gold: Iterable[Model] | None = None,
    corpus: Iterable[str] | None = None,
    parts: Iterable[str | Part] | str | None = None,
    people: str = "people",
    bos: bool | None = None,
    chat: bool = False,
    batch_size: int = 64,
    n_boot: int = 1000,
    seed: int = 0,
    kl_bytes: int = 2 * 1024**3,
    progress: bool = True,
) -> ReportCard:
    """Measure what an edit did to a model.

    Each model (original, edited, every gold) makes one forward over each set, from which come:

    - probability: exp(mean log p) of the answer's tokens, the mean over questions (TOFU, arXiv 2401.06121);
    - recall: share of questions of which every answer token is the argmax under teacher forcing;
    - KL at the answers' positions, mean over positions, in nats: KL(original‖model), KL(gold‖model) and KL(model‖gold),
      on forget and retain. Gold against gold is the floor, the original against gold the ceiling;
    - perplexity: exp(mean loss per token in nats) on the corpus, long texts in windows of the context's length. Every
      window after a text's first begins with the text's next token, without BOS; no window's first token is predicted,
      and neither is a special token that the tokenizer appends.

    Then each part is measured on each model (`probe.audit.parts()` names them): behaviour, attacks that bring knowledge
    back, traces inside, distance to gold, membership inference. With five golds or more the card ends in a verdict:
    removed, suppressed or untouched (`probe.audit.judge`); otherwise it says what is missing.

    Intervals are 95 % percentile bootstraps over groups (people; texts for perplexity). Where every group has the same
    recall a bootstrap has no width, and the interval is Clopper and Pearson's with the groups as n, which is
    conservative. Changes are paired: the same resampled groups before and after. A recall that changed by as much in
    every group has no interval of its change (NaN), and neither has anything with one group; the column `interval` says
    which. Gold is shown with the lowest and the highest of its seeds. Intervals over the seeds of an organism come from
    several cards: `probe.audit.across`.

    Args:
        model: The original.
        edit: An `Edit` or a `Filter` (anything with `.applied(model)`), another `Model`, or None for the original
            alone. With an edit the model has its original bits again afterwards, also after an exception.
        forget: What was to go.
        retain: What was to stay; its people are others than those of `forget`.
        holdout: People that nothing was ever trained on: what chance looks like.
        unseen: The forget people in phrasings never trained on.
        unseen_retain: The retain people in phrasings never trained on.
        sets: Further sets by name: `neighbours`, `deducible`, `given`, `given_holdout` (see `Case`), or your own.
        attacks: Prompt attacks on the forget set by kind; None makes them from frames.
        gold: Models trained without the forget set.
        corpus: Texts for perplexity.
        parts: Names of parts, or parts with settings of their own; None for the default ones, `()` for none.
        people: What a group is, in the plural, for the sentence.
        bos: Whether questions, and the texts of the corpus, begin with a BOS token; None leaves it to the tokenizer
            (with `chat`, for questions to the template).
        chat: Put questions into the tokenizer's chat template. The corpus is never put into it: it is ordinary text.
        batch_size: Rows per forward.
        n_boot: Bootstrap replicates.
        seed: Of everything random.
        kl_bytes: Memory for the log-probabilities that KL needs; where all questions would take more, a seeded subset
            is used, and its size is the row's n.
        progress: Show bars.

    Raises:
        DataError: A set that is no `Questions`, an empty set, sets that share people, phrasings that are not unseen, a
            corpus without tokens.
        AuditError: A model with another vocabulary, a gold of another architecture, logits that are not finite, no
            model in `gold`, an unusable edit, an unknown part.
        BaseMismatchError: The edit was made for another model.
    """
    own = {"forget": forget, "unseen": unseen, "retain": retain, "unseen_retain": unseen_retain, "holdout": holdout}
    given = {name: rows for name, rows in {**own, **(sets or {})}.items() if rows is not None}
    case = Case(
        model,
        given,
        check_golds(gold),
        attacks=attacks or {},
        corpus=_texts(corpus),
        batch_size=batch_size,
        bos=bos,
        chat=chat,
        seed=seed,
        n_boot=n_boot,
        people=people,
        progress=progress,
    )
    return Bench(case, parts, kl_bytes=kl_bytes).card(edit)


def _texts(corpus: Iterable[str] | None) -> tuple[str, ...]:
    if corpus is None:
        return ()
    texts = (corpus,) if isinstance(corpus, str) else tuple(corpus)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DataError("corpus must be an iterable of texts with at least one; received none, or something else")
    return texts
