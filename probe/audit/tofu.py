"""Forget quality and model utility (TOFU, arXiv 2401.06121), of models and of published evaluation logs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from jaxtyping import Float

from probe.audit import metrics
from probe.audit._generation import answered
from probe.audit._numbers import Estimate, Ratio
from probe.audit.behaviour import truth
from probe.audit.part import Measurement, Metric, Number, Part, Subject, by_group, spaced
from probe.data import Questions
from probe.errors import AuditError, DataError

__all__ = ["Tofu", "TofuFigures", "from_logs", "load_tofu", "log_truth_ratios", "read_eval_log", "utility_parts"]

UTILITY_SETS = ("retain", "authors", "world")
_NORMALISED = ("authors", "world")  # sets whose probability is taken over the options
_ALSO_CALLED = {"authors": "real_authors", "world": "world_facts"}  # by the benchmark's files and the TOFU organism
_LOG_FILES = {
    "retain": "eval_log.json",
    "authors": "eval_real_author_wo_options.json",
    "world": "eval_real_world_wo_options.json",
    "forget": "eval_log_forget.json",
}
_LOG_KEYS = ("avg_gt_loss", "avg_paraphrased_loss", "average_perturb_loss", "rougeL_recall")


@dataclass(frozen=True)
class Tofu(Part):
    """Forget quality against gold, and model utility.

    Forget quality is the two-sample Kolmogorov-Smirnov p-value of the forget set's truth ratios against a gold's; of
    several golds the median, with each in the table `forget_quality`. A gold is judged against the others. Phrasings of
    a fact whose truth ratio is of one paraphrased question are one observation; facts of one person are taken for
    independent, as in TOFU, which makes p too small where they are not. Utility is
    the harmonic mean of three parts of each of `retain`, `authors` (or `real_authors`) and `world` (or `world_facts`)
    that the case has.

    Attributes:
        limit: Questions a set, evenly spaced; None for all. What the default of `Behaviour` has is computed once.
        new_tokens: Longest answer that is generated, in tokens.
        stem: Compare Porter's stems in ROUGE-L, as TOFU's evaluation does.
    """

    limit: int | None = 100
    new_tokens: int = 32
    stem: bool = False

    name: ClassVar[str] = "tofu"
    title: ClassVar[str] = "TOFU's forget quality and model utility"
    needs: ClassVar[tuple[str, ...]] = ("forget", "retain")
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("forget_quality", "forget quality (KS p-value against gold)"),
        Metric("ks_distance", "KS distance of the truth ratios to gold's"),
        Metric("model_utility", "model utility", share=True),
    )

    def measure(self, subject: Subject) -> Measurement:
        """Measure utility; keep the forget set's truth ratios for `compare`."""
        parts, missing, table = {}, [], []
        for name in UTILITY_SETS:
            own_name = name if name in subject.case.sets else _ALSO_CALLED.get(name, name)
            if own_name not in subject.case.sets:
                continue
            try:
                parts[name] = utility_parts(subject, own_name, self.limit, self.new_tokens, self.stem)
            except DataError as error:
                missing.append(f"utility of {own_name}: {error}")
        absent = [name for name in UTILITY_SETS if name not in parts]
        if absent:
            missing.append(
                f"the nine-part model utility: no {', '.join(absent)}; it is over {', '.join(parts) or 'none'}"
            )
        for name, own in parts.items():
            table += [{"set": name, "part": part, "value": ratio.value} for part, ratio in own.items()]
        numbers = [Number("retain", "model_utility", _utility(parts, subject))] if parts else []
        payload, lacking = _forget_ratios(subject, self.limit)
        tables = {"utility_parts": pd.DataFrame(table)} if table else {}
        return Measurement(tuple(numbers), tables, payload, (*missing, *lacking))

    def compare(self, measured: Mapping[str, Measurement], case: Any) -> Mapping[str, Measurement]:
        """Judge every model's truth ratios against every gold's, a gold's against those of the others."""
        ratios = {role: one.payload for role, one in measured.items() if one.payload is not None}
        golds = [role for role in ratios if role.startswith("gold")]
        if not golds:
            return {role: Measurement(missing=("forget quality: no gold",)) for role in ratios}
        n_groups = len(set(spaced(case.sets["forget"], self.limit).groups))
        return {role: _quality(role, ratios, golds, n_groups) for role in ratios}


def utility_parts(
    subject: Subject, name: str, limit: int | None = 100, new_tokens: int = 32, stem: bool = False
) -> dict[str, Ratio]:
    """Return the three parts of utility of one set, on its questions that have perturbed answers.

    `probability`: exp(-loss per token) of the answer, outside `retain` divided by its sum with the wrong answers';
    `rouge_l`: mean ROUGE-L recall of what is generated; `truth`: mean of max(0, 1 - truth ratio).

    Raises:
        DataError: No question with perturbed answers, or an answer without ASCII letters or digits.
    """
    scores = truth(subject, name, limit)
    rows, said = answered(subject, name, limit, new_tokens)
    own = {key: i for i, key in enumerate(subject.answers[name].ids)}
    places = np.array([own[rows[i].id] for i in scores.rows])
    answers = subject.answers[name]
    nll = -answers.logprob_sum[places] / answers.n_tokens[places]
    if name in (*_NORMALISED, *_ALSO_CALLED.values()):
        pairs = zip(nll, scores.perturbed_nll, strict=True)
        probability = np.array([metrics.normalised_probability(right, list(wrong)) for right, wrong in pairs])
    else:
        probability = np.exp(-nll)
    recall = [metrics.rouge_l(said[i], rows[i].answer, stem).recall for i in scores.rows]
    values: dict[str, np.ndarray] = {
        "probability": probability,
        "rouge_l": np.array(recall),
        "truth": metrics.truth_preference(scores.log_ratio),
    }
    return {part: by_group(value, scores.groups) for part, value in values.items()}


def _utility(parts: Mapping[str, Mapping[str, Ratio]], subject: Subject) -> Estimate:
    """The harmonic mean, its interval from drawing each set's groups anew."""
    case = subject.case
    value = metrics.model_utility({name: [ratio.value for ratio in own.values()] for name, own in parts.items()})
    ratios = [ratio for own in parts.values() for ratio in own.values()]
    n = int(sum(next(iter(own.values())).bottom.sum() for own in parts.values()))
    n_groups = sum(len(next(iter(own.values())).top) for own in parts.values())
    of = f"harmonic mean of {len(ratios)}"
    if min(len(ratio.top) for ratio in ratios) < 2:
        return Estimate(value, n, n_groups, how=f"none: one group ({of})")
    draws = np.stack([ratio.draws(case.n_boot, case.seed) for ratio in ratios])  # [part, boot]
    with np.errstate(divide="ignore"):
        low, high = np.quantile(len(ratios) / (1 / draws).sum(0), [0.025, 0.975])
    return Estimate(value, n, n_groups, float(low), float(high), f"95 %, bootstrap over {case.people}, {of}")


def _forget_ratios(subject: Subject, limit: int | None) -> tuple[Float[np.ndarray, " row"] | None, list[str]]:
    """Logarithms of the forget set's truth ratios, whose order is the ratios'; what was scored twice counts once."""
    if not any(row.perturbed_answers for row in spaced(subject.case.sets["forget"], limit)):
        return None, ["forget quality: the forget set has no perturbed answers"]
    scores = truth(subject, "forget", limit)
    return scores.log_ratio[scores.distinct], []


def _quality(role: str, ratios: Mapping[str, np.ndarray], golds: list[str], n_groups: int) -> Measurement:
    others = [gold for gold in golds if gold != role]
    if not others:
        return Measurement(missing=(f"forget quality of {role}: there is no other gold to compare it with",))
    try:
        tests = {gold: metrics.forget_quality(ratios[role], ratios[gold]) for gold in others}
    except AuditError as error:
        return Measurement(missing=(f"forget quality of {role}: {error}",))
    table = pd.DataFrame([{"gold": gold, "p": test.p, "d": test.d} for gold, test in tests.items()])
    n = len(ratios[role])
    numbers = (
        Number("forget", "forget_quality", _middle(table["p"].to_numpy(), n, n_groups)),
        Number("forget", "ks_distance", _middle(table["d"].to_numpy(), n, n_groups)),
    )
    return Measurement(numbers, {"forget_quality": table})


def _middle(values: Float[np.ndarray, " gold"], n: int, n_groups: int) -> Estimate:
    """The median over golds, between the lowest and the highest."""
    if len(values) == 1:
        return Estimate(float(values[0]), n, n_groups, how="none: one gold")
    ends = float(values.min()), float(values.max())
    return Estimate(float(np.median(values)), n, n_groups, *ends, how=f"lowest to highest of {len(values)} golds")


def load_tofu(folder: str | Path, split: str = "forget10", n_retain: int = 400) -> dict[str, Questions]:
    """Read TOFU's questions as the sets of a case: `forget`, `retain`, `authors`, `world`.

    For a model that was finetuned on all of TOFU; a small one that is trained here is `probe.organisms.tofu`. There is
    no holdout: such a model has seen every author.

    Args:
        folder: Where the benchmark's JSON files are.
        split: `forget01`, `forget05` or `forget10`.
        n_retain: The first so many retain questions; the benchmark evaluates on 400, of which it has wrong answers.

    Raises:
        DataError: An unknown split, a missing file, or one that is not what the benchmark publishes.
    """
    from probe.organisms._tofu import RETAIN_OF, TofuData, TofuSettings

    if split not in RETAIN_OF:
        raise DataError(f"split must be one of {', '.join(RETAIN_OF)}; received {split!r}")
    if n_retain < 1:
        raise DataError(f"n_retain must be at least 1; received {n_retain}")
    splits = TofuData(TofuSettings(str(folder), split, n_retain=n_retain, n_holdout=1)).splits
    return {name: splits[_ALSO_CALLED.get(name, name)] for name in ("forget", *UTILITY_SETS)}


@dataclass(frozen=True)
class TofuFigures:
    """What a published log says.

    Attributes:
        model_utility: The harmonic mean of the nine parts.
        parts: The three parts of each set.
        forget_quality: The Kolmogorov-Smirnov test against the gold's log; None without one.
    """

    model_utility: float
    parts: Mapping[str, tuple[float, float, float]]
    forget_quality: metrics.KolmogorovSmirnov | None = None


def read_eval_log(path: str | Path) -> dict[str, Any]:
    """Read a log of TOFU's evaluation: losses and ROUGE per question, of four sets.

    Raises:
        DataError: No such file, no JSON, or one without the four sets and their columns.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"an evaluation log is a JSON file; {path} is not a file")
    try:
        log = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    for name in _LOG_FILES.values():
        table = log.get(name) if isinstance(log, dict) else None
        lacking = [key for key in _LOG_KEYS if not isinstance(table, dict) or not isinstance(table.get(key), dict)]
        if lacking:
            raise DataError(
                f"{path.name} must have {', '.join(_LOG_KEYS)} under {name!r}; it lacks {', '.join(lacking)}"
            )
    return dict(log)


def log_truth_ratios(log: Mapping[str, Any], name: str = "forget") -> Float[np.ndarray, " row"]:
    """Return logarithms of the truth ratios of one set of a log, question by question.

    Args:
        log: As `read_eval_log` returns it.
        name: `forget`, `retain`, `authors` or `world`.
    """
    table = log[_LOG_FILES[name]]
    right, wrong = table["avg_paraphrased_loss"], table["average_perturb_loss"]
    return np.array([metrics.log_truth_ratio(right[i], wrong[i]) for i in right])


def from_logs(log: Mapping[str, Any], gold: Mapping[str, Any] | None = None) -> TofuFigures:
    """Recompute the published figures from a model's log, and forget quality from its and the retain model's.

    Args:
        log: The model's, as `read_eval_log` returns it.
        gold: The log of the model that was trained on the retain set alone.

    Raises:
        DataError: A question without wrong answers.
        AuditError: Losses that are not finite.
    """
    parts = {name: _log_parts(log, name) for name in UTILITY_SETS}
    quality = None if gold is None else metrics.forget_quality(log_truth_ratios(log), log_truth_ratios(gold))
    return TofuFigures(metrics.model_utility(parts), parts, quality)


def _log_parts(log: Mapping[str, Any], name: str) -> tuple[float, float, float]:
    table = log[_LOG_FILES[name]]
    nll, wrong = table["avg_gt_loss"], table["average_perturb_loss"]
    if name in _NORMALISED:
        probability = [metrics.normalised_probability(nll[i], wrong[i]) for i in nll]
    else:
        probability = [float(np.exp(-loss)) for loss in nll.values()]
    recall = list(table["rougeL_recall"].values())
    preferred = metrics.truth_preference(log_truth_ratios(log, name))
    return float(np.mean(probability)), float(np.mean(recall)), float(preferred.mean())
