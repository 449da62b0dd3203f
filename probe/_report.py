"""`report`: a run's results as one page that can be sent to a colleague.

Summary in words, then the evidence (probes with their controls, patching, latents with their contexts, experts), the
edit, the audit against gold, and how it was made. Takes a run directory, or the results themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe._page import Report, Section
from probe.errors import DataError, TargetError

if TYPE_CHECKING:
    import pandas as pd

    from probe.audit import ReportCard
    from probe.targets import Scores

__all__ = ["Report", "Section", "report", "sections"]

# What a results mapping may hold, in the order in which the page shows it.
KEYS = ("sweep", "patch", "latents", "contexts", "experts", "removal", "candidates", "edit", "twins", "audit", "tables")
_FILES = {
    "contexts": ("contexts.parquet", "contexts.csv"),
    "removal": ("removal.parquet", "removal.csv"),
    "candidates": ("candidates.parquet", "candidates.csv"),
    "twins": ("twins.parquet", "twins.csv"),
}
_KIND_KEYS = {"direction": "sweep", "position": "patch", "head": "patch", "latent": "latents", "expert": "experts"}
_TITLES = {
    "direction": "Where a linear probe can read it",
    "position": "Where it passes through: activation patching",
    "head": "Which heads carry it: activation patching",
    "latent": "Which latents of a sparse autoencoder separate it",
    "expert": "Which experts are routed to",
    "neuron": "Which neurons",
    "layer": "Which layers",
}


def report(source: str | Path | Mapping[str, Any] | Report, out: str | Path | None = None) -> Path:
    """Write `report.html`: one file that opens offline.

    Args:
        source: A run directory; or a `Report`; or a mapping with any of `sweep`, `patch`, `latents`, `experts`
            (`Scores`; further ones under other names), `contexts`, `removal`, `candidates`, `twins` (tables), `edit`
            (an `Edit`), `audit` (a `ReportCard`), `tables` (name to table), and `title`, `subtitle`, `summary`
            (sentences), `manifest`, `command`, `recipe` (text).
        out: File to write; by default `report.html` in the run directory, or in the current one.

    Returns:
        The path of the page.

    Raises:
        DataError: The directory does not exist or holds no results, or the mapping has none.
    """
    folder = Path()
    if isinstance(source, str | Path):
        folder = Path(source)
        source = read_run(folder)
    page = source if isinstance(source, Report) else _page(source)
    return page.write(out if out is not None else folder / "report.html")


def _page(results: Mapping[str, Any]) -> Report:
    made = sections(results)
    if not made:
        raise DataError(f"a report needs at least one result among {', '.join(KEYS)}; received {sorted(results)}")
    card = results.get("audit")
    summary = [*(_gist(card) if card is not None else []), *results.get("summary", []), *_findings(results)]
    plain = {key: results[key] for key in ("manifest", "command", "recipe", "subtitle") if results.get(key)}
    return Report(str(results.get("title", "Probe report")), summary, made, **plain)


def _gist(card: ReportCard) -> list[str]:
    """What of the card belongs into the summary."""
    return [
        card.sentences[key] for key in ("forget", "verdict", "retain", "corpus", "distance") if key in card.sentences
    ]


def sections(results: Mapping[str, Any]) -> list[Section]:
    """The sections of a page for these results; see `report` for the keys."""
    made: list[Section] = []
    for key, value in _ordered(results):
        if value is None:
            continue
        if hasattr(value, "kind") and hasattr(value, "ranking"):
            made.append(_scores_section(value, "" if key in KEYS else key))
        elif key == "audit":
            made += _audit_sections(value)
        elif key in _BUILDERS:
            made.append(_BUILDERS[key](value))
        elif key == "tables":
            made += [Section(name.capitalize(), table=table, part="more") for name, table in value.items()]
    return made


def read_run(folder: Path) -> dict[str, Any]:
    """The results in a run directory: saved scores, edit, card, tables, manifest and recipe, wherever they lie in it.

    Raises:
        DataError: No such directory.
    """
    from probe.audit import ReportCard
    from probe.editing import Edit
    from probe.targets import Scores

    if not folder.is_dir():
        raise DataError(f"report needs a run directory; there is none at {folder}")
    results: dict[str, Any] = {}
    for path in sorted(folder.glob("**/scores.json")):
        scores = Scores.load(path.parent)
        key = _KIND_KEYS.get(scores.kind, scores.kind)
        results[key if key not in results else path.parent.name] = scores
    for key, pattern, load in (("audit", "card.json", ReportCard.load), ("edit", "edit.json", Edit.load)):
        found = sorted(folder.glob(f"**/{pattern}"), key=lambda path: (len(path.parts), str(path)))
        if found:
            results[key] = load(found[0].parent)
    results |= _tables(folder)
    return results | _record(folder)


def _tables(folder: Path) -> dict[str, pd.DataFrame]:
    import pandas as pd

    found = {}
    for key, names in _FILES.items():
        paths = sorted(path for name in names for path in folder.glob(f"**/{name}"))
        if paths:
            found[key] = pd.read_parquet(paths[0]) if paths[0].suffix == ".parquet" else pd.read_csv(paths[0])
    return found


def _record(folder: Path) -> dict[str, Any]:
    """Manifest, recipe, title and command."""
    made: dict[str, Any] = {}
    manifest, recipe = folder / "manifest.json", folder / "recipe.yaml"
    if manifest.is_file():
        made["manifest"] = json.loads(manifest.read_text("utf-8"))
        made["title"] = made["manifest"].get("name") or folder.name
        made["command"] = made["manifest"].get("command", "")
    if recipe.is_file():
        made["recipe"] = recipe.read_text("utf-8")
        made["command"] = made.get("command") or "probe run recipe.yaml --out DIR"
    return made


def _ordered(results: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Known keys in the page's order; scores under other names after the evidence."""
    others = [key for key in results if key not in KEYS and hasattr(results[key], "ranking")]
    evidence = KEYS[: KEYS.index("candidates")]
    order = [*evidence, *others, *KEYS[len(evidence) :]]
    return [(key, results[key]) for key in order if key in results]


def _findings(results: Mapping[str, Any]) -> list[str]:
    """One sentence per locator: its best component beside its controls."""
    found = [value for _, value in _ordered(results) if hasattr(value, "ranking")]
    return [_best_sentence(scores) for scores in found]


def _scores_section(scores: Scores, name: str) -> Section:
    """A locator's figure and table, its best row in words, its twins and its warnings."""
    text = [_best_sentence(scores)]
    if scores.twins_note:
        text.append(f"Random twins: {scores.twins_note}.")
    text += [f"Warning: {warning}" for warning in scores.warnings]
    if scores.kind == "position" and scores.table["token"].astype(str).str.contains("(+", regex=False).any():
        text.append("A label such as “a (+3)”: the first pair has “a” there, other pairs have 3 other tokens.")
    figures = []
    try:
        figures.append(scores.plot(title=_caption(scores)))
    except (DataError, TargetError) as error:
        text.append(f"There is no picture: {error}")
    title = _TITLES.get(scores.kind, scores.kind) + (f" ({name})" if name else "")
    return Section(title, "\n\n".join(text), figures, scores.table.loc[scores.ranking()])


def _caption(scores: Scores) -> str:
    unit = f", {scores.unit}" if scores.unit else ""
    what = {
        "direction": "by layer, with 95 % intervals, shuffled labels and baselines",
        "position": "by layer and position; blue helps, red hurts, white is zero",
        "head": "by layer and head; white is zero",
        "expert": "by layer and expert; white is zero",
        "latent": "of the best latents, with 95 % intervals",
    }.get(scores.kind, "")
    name = scores.score_name[:1].upper() + scores.score_name[1:]
    return f"{name}{unit} {what}".strip()


def _best_sentence(scores: Scores) -> str:
    """The best component with its interval, its n, its controls and its twins."""
    row = {name: scores.table[name].iloc[scores.ranking()[0]] for name in scores.table.columns}  # keeps whole numbers
    unit = f" {scores.unit}" if scores.unit else ""
    what = "cells (layer by position)" if scores.kind == "position" else f"{scores.kind}s"
    text = f"Of {len(scores)} {what} tried, the best is {_place(scores.kind, row)}: "
    text += f"{scores.score_name} {_number(row['score'])}{unit}{_span(row, 'low', 'high')}{_size(row)}."
    controls = []
    if not _unknown(row.get("control")):
        controls.append(f"shuffled labels {_number(row['control'])}{_span(row, 'control_low', 'control_high')}")
    for key, name in (("majority", "majority class"), ("bag_of_tokens", "bag of tokens")):
        if not _unknown(row.get(key)):
            controls.append(f"{name} {_number(row[key])}")
    if controls:
        text += f" Controls: {', '.join(controls)}."
    return text + _twins(scores)


def _twins(scores: Scores) -> str:
    from probe.plots._template import twins_range

    found = twins_range(scores.twins)
    if found is None or scores.kind == "direction":
        return ""
    return f" Of {found[2]} random twins, 95 % lie between {_number(found[0])} and {_number(found[1])}."


def _place(kind: str, row: Mapping[str, Any]) -> str:
    from probe.plots import METHOD_NAMES

    if kind == "direction":
        method = METHOD_NAMES.get(str(row.get("method")), row.get("method", "a probe"))
        return f"{method} at {row.get('site', 'layer ' + str(row.get('layer')))}"
    if kind == "latent":
        return f"latent {row.get('latent')}"
    place = f"layer {row.get('layer')}"
    if kind in row:
        place += f", {kind} {row[kind]}"
    token = row.get("token")
    return f"{place} (“{token}”)" if token not in (None, "") else place


def _span(row: Mapping[str, Any], low: str, high: str) -> str:
    ends = row.get(low), row.get(high)
    return "" if any(_unknown(end) for end in ends) else f" [{_number(ends[0])} to {_number(ends[1])}]"


def _size(row: Mapping[str, Any]) -> str:
    parts = [] if _unknown(row.get("n")) else [f"n = {row['n']:g}"]
    parts += [] if _unknown(row.get("n_groups")) else [f"{row['n_groups']:g} groups"]
    return f" ({', '.join(parts)})" if parts else ""


def _number(value: Any) -> str:
    return "not known" if _unknown(value) else f"{float(value):.3g}"


def _unknown(value: Any) -> bool:
    return value is None or bool(value != value)  # NaN is the only value that is not itself


def _contexts_section(contexts: Any) -> Section:
    """The texts on which the best latents are most active; the peak in brackets."""
    table = contexts if hasattr(contexts, "columns") else contexts.to_df()
    keep = [name for name in ("latent", "activation", "text") if name in table.columns]
    text = "For each of the best latents, the texts on which it is most active; the token of the peak is in brackets."
    return Section("What the best latents respond to", text, table=table[keep] if keep else table)


def _removal_section(table: pd.DataFrame) -> Section:
    text = "The located experts switched off, beside as many random ones: what the routing difference is worth."
    if {"arm", "set", "recall"} <= set(table.columns):
        text += " For the random ones the mean over draws, the lowest and the highest."
        table = _removal_by_set(table)
    return Section("What removing the experts does", text, table=table)


def _removal_by_set(table: pd.DataFrame) -> pd.DataFrame:
    """A row per set and measure: intact, removed, random."""
    import pandas as pd

    rows = []
    for name in table["set"].unique():
        for measure in [key for key in ("recall", "prob") if key in table.columns]:
            row = {"set": name, "measure": "probability" if measure == "prob" else measure}
            for arm in table["arm"].unique():
                values = table.loc[(table["set"] == name) & (table["arm"] == arm), measure]
                spread = f" ({_number(values.min())} to {_number(values.max())})" if len(values) > 1 else ""
                row[str(arm)] = _number(values.mean()) + spread
            rows.append(row)
    return pd.DataFrame(rows)


def _candidates_section(table: pd.DataFrame) -> Section:
    text = (
        "Settings were chosen on the select split. Chosen is the candidate that forgets most among those that keep "
        "enough."
    )
    first = [name for name in ("candidate", "rank", "chosen") if name in table.columns]
    table = table[[*first, *(name for name in table.columns if name not in first)]]
    return Section("Which edit was chosen, and from what", text, table=table, part="edit")


def _twins_section(table: pd.DataFrame) -> Section:
    text = (
        "The same edit of random targets of the same size: what is left of the effect when the place is chosen blindly."
    )
    return Section("The edit beside its random twins", text, table=table, part="edit")


def _edit_section(edit: Any) -> Section:
    """Method, base and settings in words, every changed tensor in the table."""
    base = str(edit.base.get("name") or "the base model")
    base = Path(base).name if base.startswith(("/", ".", "~")) else base  # a folder of this machine tells nobody else
    text = [f"Method: {edit.method}. It changes {len(edit.parameters)} tensors of {base} ({edit.base_hash[:12]}…)."]
    for step in edit.steps:
        settings = ", ".join(f"{key} = {json.dumps(value, default=str)}" for key, value in step.settings.items())
        text += [f"Settings of {step.method}: {settings}."] if settings else []
        text += [str(note) for note in step.notes]
    text.append("Change is the Frobenius norm of the difference; relative change is that over the tensor's own norm.")
    table = edit.to_df()
    first = [*(["step", "method"] if len(edit.steps) > 1 else []), "parameter", "kind", "shape", "relative_change"]
    table = table[[*first, *(name for name in ("change", "bytes") if name in table.columns)]]
    return Section("What was changed", "\n\n".join(text), table=table, part="edit")


def _audit_sections(card: ReportCard) -> list[Section]:
    """The verdict and what it rests on, the numbers of all models, then the attacks and the looks inside one by one."""
    return [*_verdict_sections(card), _numbers_section(card), *_detail_sections(card)]


def _verdict_sections(card: ReportCard) -> list[Section]:
    """Verdict, evidence and costs; nothing where no edit was made."""
    if card.verdict is None:
        return []
    label, evidence, cost = card.verdict.label, card.verdict.evidence, card.verdict.cost
    text = [card.verdict.sentence]
    figures = []
    if len(evidence) and evidence["share"].notna().any():
        text.append(_SHARE)
        figures.append(_evidence_figure(evidence))
    title = f"The verdict: {label}" if label else "No verdict, and what there is to judge by"
    table = _evidence_table(evidence) if len(evidence) else None
    made = [Section(title, "\n\n".join(text), figures, table, part="audit")]
    if len(cost):
        what = (
            "What was to stay, before and after. A model that never learned the forget set (gold) shows what is free."
        )
        made.append(Section("What the edit cost", what, table=_cost_table(cost), part="audit"))
    return made


_SHARE = (
    "A share is (edited - gold) / (original - gold), with the mean of the golds: 0 % is what a model does that never "
    "learned the forget set, 100 % what the original does. A share above its threshold speaks of knowledge that is "
    "still there. Evidence that cannot tell the original from the golds is not heard."
)


def _evidence_figure(evidence: pd.DataFrame) -> Any:
    from probe.audit._labels import metric_label
    from probe.plots import evidence_dots

    labels = {name: metric_label(name) for name in evidence["metric"]}
    title = "What is left: each piece of evidence between gold (0 %) and the original (100 %); a tick is its threshold"
    figure = evidence_dots(evidence, labels, title=title)
    shown = evidence.loc[evidence["share"].notna(), "share"].astype(float)
    figure.update_xaxes(range=[min(-0.25, shown.min() - 0.05), max(1.05, shown.max() + 0.05)])
    return figure.update_xaxes(title="share of what the original knows", dtick=0.25)


def _evidence_table(evidence: pd.DataFrame) -> pd.DataFrame:
    """The evidence as it is read: values with their units, gold with its range."""
    import pandas as pd

    from probe.audit._labels import metric_label, number, set_label

    def row(one: Mapping[str, Any]) -> dict[str, str]:
        own = {key: number(float(one[key]), one["metric"]) for key in ("original", "edited", "gold")}
        ends = [number(float(one[key]), one["metric"]).removesuffix(" %") for key in ("gold_low", "gold_high")]
        return {
            "evidence": metric_label(one["metric"]),
            "set": set_label(one["set"]),
            "kind": one["kind"] or "–",
            **own,
            "gold": f"{own['gold']} [{ends[0]}, {ends[1]}]",
            "share": "–" if _unknown(one["share"]) else f"{one['share']:.0%}",
            "threshold": "–" if _unknown(one["threshold"]) else f"{one['threshold']:.0%}",
            "heard": "yes" if one["heard"] else f"no: {one['why']}",
        }

    return pd.DataFrame([row({str(key): value for key, value in one.items()}) for one in evidence.to_dict("records")])


def _cost_table(cost: pd.DataFrame) -> pd.DataFrame:
    import pandas as pd

    from probe.audit._labels import metric_label, number, set_label

    rows = []
    for one in cost.to_dict("records"):
        own = {key: number(float(one[key]), one["metric"]) for key in ("original", "edited", "gold")}
        change = number(float(one["change"]), one["metric"], signed=True)
        rows.append({"what": f"{metric_label(one['metric'])}, {set_label(one['set'])}", **own, "change": change})
    return pd.DataFrame(rows)


def _numbers_section(card: ReportCard) -> Section:
    gold = int(card.settings.get("golds", 0))
    figures = [_with_set_names(card.plot(title=_bars_caption(card, gold)))]
    if (card.table["metric"] == "kl_gold_model").any():
        title = "Distance to gold, KL(gold‖model), mean over answer tokens: 0 is gold itself; lower is closer"
        figures.append(card.plot_distance(title=title))
    text = [
        *(sentence for about, sentence in card.sentences.items() if about != "verdict"),
        "Change is edited minus original on the same resampled groups; of shares, in percentage points (pts). In "
        "brackets: 95 % intervals, or why there is none; for gold, the lowest and the highest of its seeds.",
    ]
    return Section("Original, edited and gold", "\n\n".join(text), figures, card.wide(), part="audit")


def _with_set_names(figure: Any) -> Any:
    """Sets by their full names below the bars, broken where a line is full."""
    from probe.audit._labels import SETS

    names = {name: SETS[name].replace(", ", ",<br>").replace(" in ", "<br>in ") for name in ("given", "given_holdout")}
    for trace in figure.data:
        trace.x = [names.get(str(x), x) for x in trace.x]
    return figure


def _detail_sections(card: ReportCard) -> list[Section]:
    """What the single attacks and the looks inside found: a section each, with its table."""
    from probe.audit._curves import CURVES

    made = []
    for name, (title, text) in _DETAILS.items():
        if name not in card.tables:
            continue
        figures = []
        if name in CURVES:
            figure = card.plot_curves(name)
            figures = [figure.update_xaxes(dtick=1) if _few_layers(card.tables[name]) else figure]
        made.append(Section(title, text, figures, _by_model(card.tables[name]), part="audit"))
    return made


def _by_model(table: pd.DataFrame) -> pd.DataFrame:
    """Recall and probability of the models beside each other, gold as mean and range; other tables as they are."""
    import pandas as pd

    if "recall" not in table.columns or "step" in table.columns:
        return table
    values = [name for name in ("recall", "probability") if name in table.columns]
    keys = [name for name in table.columns if name not in (*values, "model")]
    rows = []
    for key, own in table.groupby(keys, sort=False, dropna=False):
        shown = {f"{value}, {who}": text for value in values for who, text in _models_of(own, value).items()}
        rows.append({**dict(zip(keys, key, strict=True)), **shown})
    return pd.DataFrame(rows)


def _models_of(rows: pd.DataFrame, value: str) -> dict[str, str]:
    """A share of the original, of the edited model, and of the golds (mean, lowest, highest)."""
    from probe.audit._labels import number

    made: dict[str, str] = {}
    for who in ("original", "edited"):
        own = rows.loc[rows["model"] == who, value]
        made |= {who: number(float(own.iloc[0]), value)} if len(own) else {}
    gold = rows.loc[rows["model"].str.startswith("gold"), value]
    if len(gold):
        mean, low, high = (number(float(one), value) for one in (gold.mean(), gold.min(), gold.max()))
        made["gold"] = mean if low == high else f"{mean} [{low.removesuffix(' %')}, {high.removesuffix(' %')}]"
    return made


def _few_layers(table: pd.DataFrame) -> bool:
    return "layer" in table.columns and bool(table["layer"].max() <= 16)


# Tables of a card that are shown: their titles, and what is in them. The others lie beside it as csv.
_DETAILS = {
    "relearning": (
        "Attack: relearning",
        "Some of the forgotten facts are trained again; shown is recall of the others, at the learning rate and data "
        "that brought back most.",
    ),
    "quantisation": ("Attack: quantisation", "Recall and probability with the weights rounded to fewer bits."),
    "prompts": (
        "Attack: prompts",
        "The same facts asked for in other ways; the plain questions come first. Told is the share of prompts that "
        "hold the answer: a model that never knew it may say it there, so those do not count for the worst case.",
    ),
    "readout": (
        "Inside: a linear probe",
        "A probe trained on retained people reads the answer's first token from the states of each layer.",
    ),
    "uds": (
        "Inside: unlearning depth",
        "The model's states put into the original, layer by layer: d2 is how much worse the original then says the "
        "answer, d1 the same with gold's states. Where d2 is small the states still hold it.",
    ),
    "lens": ("Inside: the logit lens", "The answer's probability if the model ended at that layer."),
}


def _bars_caption(card: ReportCard, golds: int) -> str:
    over = card.settings.get("people", "groups")
    text = f"Recall and probability of the answers. Error bars: 95 % intervals over {over}"
    return f"{text}; for gold, the lowest and the highest of {golds} seeds" if golds else f"{text}. No gold was given"


_BUILDERS: dict[str, Callable[[Any], Section]] = {
    "contexts": _contexts_section,
    "removal": _removal_section,
    "candidates": _candidates_section,
    "twins": _twins_section,
    "edit": _edit_section,
}
