"""What a cache holds, as a page of text, a page of HTML, a table and a figure."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from activations_cache.errors import DataError
from activations_cache.store import SiteSpec

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from activations_cache._reader import SiteStatistics

WIDTH = 100
LABEL = 12  # columns of a fact's name
NAME = 46  # a site's name that is longer gets a line of its own
HEADINGS = ("site", "dtype", "shape", "size", "mean norm", "total variance")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f")


@dataclass(frozen=True)
class SiteRow:
    """One site in a table of sites.

    Attributes:
        site: Its name.
        kind: What it is, e.g. "resid_post".
        layer: Its layer, or None.
        dtype: Storage type.
        shape: Shape of one row.
        rows: Stored rows.
        bytes: Bytes of their values.
        mean_norm: Mean Euclidean norm of a row; None where it is not known.
        total_variance: Sum of the elements' variances; None where it is not known.
    """

    site: str
    kind: str
    layer: int | None
    dtype: str
    shape: tuple[int, ...]
    rows: int
    bytes: int
    mean_norm: float | None
    total_variance: float | None

    @classmethod
    def of(cls, spec: SiteSpec, rows: int, summary: tuple[float, float] | None) -> SiteRow:
        """Describe a site of which `rows` rows are stored."""
        norm, variance = summary or (None, None)
        size = rows * spec.row_bytes
        return cls(spec.name, spec.kind, spec.layer, spec.dtype, spec.shape, rows, size, norm, variance)

    @property
    def cells(self) -> tuple[str, ...]:
        """As text, in the order of `HEADINGS`."""
        numbers = ("-" if value is None else f"{value:.4g}" for value in (self.mean_norm, self.total_variance))
        return (self.site, self.dtype, str(list(self.shape)), size_text(self.bytes), *numbers)


def size_text(n_bytes: int) -> str:
    """A number of bytes in MiB or GiB (KiB where it is next to nothing)."""
    if n_bytes < 2**20 / 10:
        return f"{n_bytes / 2**10:.1f} KiB"
    return f"{n_bytes / 2**20:.1f} MiB" if n_bytes < 2**30 else f"{n_bytes / 2**30:.2f} GiB"


# --- facts of a manifest --------------------------------------------------------------------------------------------


def model_facts(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The model and the tokenizer of a manifest."""
    model, tokenizer = manifest["model"], manifest.get("tokenizer")
    made = ", ".join(str(model[key]) for key in ("class", "dtype") if model.get(key))
    attention = f", {model['attention']} attention" if model.get("attention") else ""
    hashes = f"weights {model['weights_hash'][:12]}, configuration {model['config_hash'][:12]}"
    facts = [("model", f"{model['name']} ({made}{attention}; {hashes})")]
    if tokenizer:
        facts.append(("tokenizer", f"{tokenizer.get('name') or 'without a name'} ({tokenizer['hash'][:12]})"))
    return facts


def data_facts(data: Mapping[str, Any], columns: Mapping[str, str], per_row: Mapping[str, str]) -> list[Any]:
    """The data of a manifest, and the columns that can be read."""
    counts = [f"{data['sequences']} sequences", f"{data['tokens']} tokens"]
    counts += [f"{data['truncated']} documents truncated"] if data.get("truncated") else []
    counts += ["each begins with BOS" if data.get("bos") else "not all begin with BOS"]
    fingerprint = str(data.get("fingerprint", ""))[:12]
    facts = [("data", ", ".join(counts) + (f" (token ids {fingerprint})" if fingerprint else ""))]
    facts.append(("columns", ", ".join(f"{name} ({kind})" for name, kind in columns.items()) or "none"))
    if per_row:
        facts.append(("per token", ", ".join(f"{name} ({kind})" for name, kind in per_row.items())))
    left = [name for name in data.get("columns_left_out") or () if name not in per_row]  # those are stored per token
    if left:
        facts.append(("left out", "columns " + ", ".join(left)))
    return facts


def setting_facts(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was stored and how, on which machine, when."""
    settings = dict(manifest.get("settings", {}))
    pool = settings.pop("pool", None)
    stored = str(settings.pop("positions", "all")) + (f", their {pool} per sequence" if pool else "")
    facts = [("positions", stored), ("compression", str(settings.pop("compression", None) or "none"))]
    facts.append(("settings", ", ".join(f"{key}={_shown(value)}" for key, value in settings.items())))
    for part in ("libraries", "machine"):
        values = manifest.get(part) or {}
        facts.append((part, ", ".join(f"{name} {value}" for name, value in values.items())))
    return [*facts, ("created", str(manifest.get("created", "")))]


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {part}" for key, part in value.items()) + "}"
    return str(value)


# --- pages ----------------------------------------------------------------------------------------------------------


def text(facts: Sequence[tuple[str, str]], sites: Sequence[SiteRow]) -> str:
    """Facts and sites in aligned columns, at most `WIDTH` wide (but for words that are longer)."""
    lines = [line for name, value in facts if value for line in _fact(name, value)]
    cells = [HEADINGS, *(site.cells for site in sites)]
    widths = [max(len(row[n]) for row in cells if n or len(row[0]) <= NAME) for n in range(len(HEADINGS))]
    return "\n".join([*lines, "", *(_site_line(row, widths) for row in cells)])


def _fact(name: str, value: str) -> list[str]:
    indent = " " * LABEL
    return textwrap.wrap(
        value, WIDTH, initial_indent=f"{name:<{LABEL}}", subsequent_indent=indent,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _site_line(row: Sequence[str], widths: Sequence[int]) -> str:
    left = [cell.ljust(width) for cell, width in zip(row[1:3], widths[1:3], strict=True)]
    right = [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
    own_line = f"{row[0]}\n{'':<{widths[0]}}" if len(row[0]) > NAME else f"{row[0]:<{widths[0]}}"
    return "  ".join([own_line, *left, *right])


def page(facts: Sequence[tuple[str, str]], sites: Sequence[SiteRow]) -> str:
    """The same as HTML that needs nothing from outside; every text in it is escaped."""
    cell = 'style="text-align:left;vertical-align:top;padding:2px 12px 2px 0"'
    number = 'style="text-align:right;padding:2px 12px 2px 0;font-variant-numeric:tabular-nums"'
    name_cell = cell.replace('style="', 'style="white-space:nowrap;')
    rows = [
        f"<tr><th {name_cell}>{html.escape(name)}</th><td {cell}>{html.escape(value)}</td></tr>"
        for name, value in facts
        if value
    ]
    styles = [cell] * 3 + [number] * 3
    head = "".join(f"<th {style}>{name}</th>" for name, style in zip(HEADINGS, styles, strict=True))
    body = [
        "<tr>"
        + "".join(f"<td {style}>{html.escape(text)}</td>" for text, style in zip(site.cells, styles, strict=True))
        + "</tr>"
        for site in sites
    ]
    return (
        f'<div style="overflow-x:auto"><table>{"".join(rows)}</table>'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def frame(sites: Sequence[SiteRow]) -> pd.DataFrame:
    """The sites as a DataFrame."""
    import pandas as pd

    columns = list(SiteRow.__dataclass_fields__)
    return pd.DataFrame([asdict(site) for site in sites], columns=columns).astype({"layer": "Int64"})


# --- figure ---------------------------------------------------------------------------------------------------------


def figure(sites: Sequence[tuple[SiteSpec, SiteStatistics]]) -> go.Figure:
    """Mean norm and root mean variance against the layer, a line per kind of site."""
    from plotly.subplots import make_subplots

    lines: dict[str, list[tuple[int, float, float]]] = {}
    for spec, stats in sites:
        if spec.layer is not None:
            points = lines.setdefault(spec.kind or spec.name, [])
            points.append((spec.layer, stats.norm, float(stats.var.mean().sqrt())))
    if not lines:
        raise DataError("nothing to plot: the cache holds no floating site of a layer, or no row")
    made = make_subplots(rows=1, cols=2, horizontal_spacing=0.12)
    for number, (kind, points) in enumerate(lines.items()):
        _add_line(made, kind, sorted(points), COLOURS[number % len(COLOURS)], number // len(COLOURS))
    last = max(layer for points in lines.values() for layer, _, _ in points)
    for column, title in ((1, "mean norm of a row"), (2, "root mean variance")):
        made.update_xaxes(title_text="layer", dtick=1 + last // 12, row=1, col=column)
        made.update_yaxes(title_text=f"{title} (activation units)", type="log", row=1, col=column)
    made.update_layout(template="plotly_white", width=960, height=420, legend={"title": "site"})
    return made


def _add_line(made: Any, kind: str, points: list[tuple[int, float, float]], colour: str, dash: int) -> None:
    layers, norms, spreads = zip(*points, strict=True)
    line = {"color": colour, "dash": ("solid", "dash", "dot")[dash % 3]}
    for column, values in ((1, norms), (2, spreads)):
        made.add_scatter(
            x=layers, y=values, mode="lines+markers", name=kind, legendgroup=kind, line=line,
            showlegend=column == 1, row=1, col=column,
        )  # fmt: skip
