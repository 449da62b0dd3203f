"""The report card: the table, the sentence, and everything needed to show, save and read them back."""

from __future__ import annotations

import html
import io
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from probe.audit._curves import CURVES, curve
from probe.audit._labels import metric_label, set_label
from probe.audit._rows import COLUMNS
from probe.audit._words import cell, counted, records, sentences
from probe.audit.verdict import Verdict
from probe.errors import AuditError
from probe.plots import before_after_bars, distance_bars, evidence_dots

FORMAT = 2
_FRAMES = ("table", "answers", "groups")
_WIDE = 132  # characters at which a value and its interval fit beside each other
_TEXTS = ("set", "metric", "model", "unit", "n_of", "interval", "id", "group")
_MODELS = {"original": "original", "edited": "edited", "change": "change", "gold": "gold"}


@dataclass(frozen=True, eq=False, repr=False)
class ReportCard:
    """What an audit returns.

    Attributes:
        table: A row per set, metric and model: `value`, its interval `low` to `high`, on how many (`n`, `n_of`,
            `n_groups`) it rests, its `unit`, and what the interval is (`interval`). Models are `original`, `edited`,
            `change` (edited minus original, paired; of shares as a fraction, shown in percentage points), `gold 1`, ...
            and `gold` (mean, lowest and highest of them).
        settings: Model, edit, sizes of the sets, seed and bootstrap.
        not_measured: What this audit says nothing about.
        answers: A row per set, model and question: which facts went and which stayed.
        tables: Details of the parts by name (relearning curves, one row a layer, ...), each with a column `model`.
        verdict: Removed, suppressed or untouched, with the number that decided; None where nothing was edited.
        groups: The sums per group behind the table: what `probe.audit.across` draws from.
    """

    table: pd.DataFrame
    settings: Mapping[str, Any] = field(default_factory=dict)
    not_measured: tuple[str, ...] = ()
    answers: pd.DataFrame = field(default_factory=pd.DataFrame)
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    verdict: Verdict | None = None
    groups: pd.DataFrame = field(default_factory=pd.DataFrame)

    def __post_init__(self) -> None:
        missing = sorted(set(COLUMNS) - set(self.table.columns))
        if missing or self.table.empty:
            raise AuditError(
                f"a report card needs a table with rows and the columns {list(COLUMNS)}; missing: {missing}"
            )

    @property
    def sentence(self) -> str:
        """The table in words: what changed, how gold compares, the verdict, what was not measured."""
        return " ".join(self.sentences.values())

    @property
    def sentences(self) -> dict[str, str]:
        """The sentence in parts, by what each is about: `forget`, `retain`, ..., `distance`, `missing`, `undecided`."""
        return sentences(self.table, self.settings, self.not_measured, self.verdict)

    def value(self, set: str, metric: str, model: str = "edited") -> float:
        """One number of the table.

        Raises:
            AuditError: There is no such row.
        """
        rows = self.table[(self.table.set == set) & (self.table.metric == metric) & (self.table.model == model)]
        if rows.empty:
            raise AuditError(f"the card has no {metric!r} of {model!r} on {set!r}; it was not measured")
        return float(rows["value"].iloc[0])

    def to_df(self) -> pd.DataFrame:
        """The table (a copy)."""
        return self.table.copy()

    def wide(self) -> pd.DataFrame:
        """For reading: a row per set and metric, a formatted column per model with its interval."""
        rows = []
        for names, part in self.table.groupby(["set", "metric"], sort=False):
            name, metric = (str(key) for key in names)
            cells = {row["model"]: cell(row) for row in records(part)}
            shown = {model: cells.get(key, "–") for key, model in _MODELS.items() if self._has(key)}
            n = part[~part["model"].isin(["gold"])]["n"].max()
            of = part.loc[~part["model"].isin(["gold"]), "n_of"]
            size = counted(n, of.iloc[0]) if len(of) else ""
            rows.append({"set": set_label(name), "metric": metric_label(metric), **shown, "n": size})
        return pd.DataFrame(rows)

    def summary(self) -> dict[str, Any]:
        """What an edit's record keeps of the audit: the sentence and the numbers of original, edited and gold."""
        rows = self.table[self.table["model"].isin(["original", "edited", "gold"])]
        names = ["set", "metric", "model", "value", "low", "high", "n"]
        plain = [{k: None if v != v else v for k, v in row.items()} for row in records(rows[names])]
        ruling = (
            None if self.verdict is None else {k: getattr(self.verdict, k) for k in ("label", "rule", "decided_by")}
        )
        said = {"sentence": self.sentence, "verdict": ruling, "not_measured": list(self.not_measured)}
        return {**said, "rows": plain}

    def plot(self, metrics: tuple[str, ...] = ("recall", "probability"), **settings: Any) -> Any:
        """Bars of the original, the edited model and gold, per set (plotly)."""
        return before_after_bars(self.table, metrics, **settings)

    def plot_distance(self, metric: str = "kl_gold_model", **settings: Any) -> Any:
        """Bars of the distance to gold between its ceiling and its floor (plotly).

        Raises:
            AuditError: No gold was given.
        """
        if not (self.table["metric"] == metric).any():
            raise AuditError(f"the card has no {metric!r}: it was made without gold")
        return distance_bars(self.table, metric, **settings)

    def plot_evidence(self, **settings: Any) -> Any:
        """What the verdict heard, between gold and the original (plotly).

        Raises:
            AuditError: There is nothing to judge, or no gold to judge by.
        """
        if self.verdict is None or not self.verdict.evidence["share"].notna().any():
            raise AuditError("the card has no evidence to draw: it needs an edit and golds")
        return evidence_dots(self.verdict.evidence, _Labels(), **settings)

    def plot_curves(self, name: str, **settings: Any) -> Any:
        """A curve a model, with gold's range, from a table of the card (plotly).

        Args:
            name: `relearning` (recall by step at the learning rate and data that brought back most), or a table with
                one row a layer (`readout`, `uds`, `lens`).
            **settings: Passed to `probe.plots.model_curves`.

        Raises:
            AuditError: The card has no such table.
        """
        if name not in CURVES or name not in self.tables:
            known = [own for own in CURVES if own in self.tables]
            raise AuditError(f"the card has curves of {', '.join(known) or 'nothing'}; there is no {name!r}")
        return curve(name, self.tables[name], **settings)

    def save(self, directory: str | Path) -> Path:
        """Write `card.json`, `table.csv`, `answers.csv`, `groups.csv` and `tables/*.csv` into a directory."""
        directory = Path(directory)
        (directory / "tables").mkdir(parents=True, exist_ok=True)
        for name in _FRAMES:
            getattr(self, name).to_csv(directory / f"{name}.csv", index=False)
        for name, table in self.tables.items():
            table.to_csv(directory / "tables" / f"{name}.csv", index=False)
        record = {
            "format": FORMAT,
            "sentence": self.sentence,
            "settings": dict(self.settings),
            "not_measured": list(self.not_measured),
            "tables": list(self.tables),
            "verdict": None if self.verdict is None else self.verdict.to_dict(),
        }
        (directory / "card.json").write_text(json.dumps(record, indent=1, ensure_ascii=False), "utf-8")
        return directory

    @classmethod
    def load(cls, directory: str | Path) -> ReportCard:
        """Read what `save` wrote.

        Raises:
            AuditError: Files missing or malformed.
        """
        directory = Path(directory)
        try:
            record = json.loads((directory / "card.json").read_text("utf-8"))
            if record["format"] != FORMAT:
                raise AuditError(f"{directory} holds a card of format {record['format']}; this version reads {FORMAT}")
            table, answers, groups = (_read_csv(directory / f"{name}.csv") for name in _FRAMES)
            tables = {name: _read_csv(directory / "tables" / f"{name}.csv") for name in record["tables"]}
            ruling = None if record["verdict"] is None else Verdict.from_dict(record["verdict"])
            return cls(table, record["settings"], tuple(record["not_measured"]), answers, tables, ruling, groups)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AuditError(f"{directory} holds no report card that can be read: {error!r}") from error

    def __repr__(self) -> str:
        from rich.console import Console

        width = min(max(shutil.get_terminal_size((_WIDE, 24)).columns, 80), _WIDE)
        # In a notebook rich would display the card as well as write it.
        console = Console(file=io.StringIO(), width=width, highlight=False, no_color=True, force_jupyter=False)
        console.print(self)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in text.splitlines()).strip("\n")

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """What rich prints: table and sentence; a narrow terminal has intervals under values and no change."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        wide = self.wide()
        roomy = options.max_width >= _WIDE
        models = [name for name in wide.columns if name in _MODELS.values() and (roomy or name != "change")]
        table = Table("", *models, box=box.SIMPLE_HEAD, pad_edge=False)
        table.columns[0].no_wrap, table.columns[0].min_width = roomy, 26
        before = " [" if roomy else "\n["
        sizes = {set_label(name): size["questions"] for name, size in self.settings.get("sets", {}).items()}
        for name, part in wide.groupby("set", sort=False):
            known = sizes.get(str(name))
            size = part["n"].iloc[0] if known is None else counted(known, "questions")
            table.add_row(Text(f"{name} ({size})", style="bold"))
            for row in records(part):
                table.add_row(f"  {row['metric']}", *[Text(row[model].replace(" [", before)) for model in models])
        yield table
        yield Text(self.sentence)

    def _repr_html_(self) -> str:
        shown: str = self.wide().to_html(index=False, border=0)
        return f"<p>{html.escape(self.sentence)}</p>{shown}"

    def _has(self, model: str) -> bool:
        return bool((self.table["model"] == model).any())


class _Labels(dict[str, str]):
    """What metrics are called."""

    def get(self, key: str, default: Any = None) -> Any:
        return metric_label(key)


def _read_csv(path: Path) -> pd.DataFrame:
    """A csv with every number bit for bit as it was written, and texts such as a group named `NA` left alone."""
    if not path.read_text("utf-8").strip():
        return pd.DataFrame()
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    return table.apply(lambda column: column if column.name in _TEXTS else _numbers(column))


def _numbers(column: pd.Series) -> pd.Series:
    """Booleans, whole numbers, floats or texts, whichever the column holds; an empty cell among numbers is NaN."""
    if column.isin(["True", "False"]).all():
        return column == "True"
    if column.str.fullmatch(r"-?\d+").all():
        return column.astype("int64")
    try:
        return column.map(lambda text: float(text or "nan")).astype("float64")
    except ValueError:
        return column
