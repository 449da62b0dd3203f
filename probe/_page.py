"""One self-contained HTML page from sections given as data: no server, no network, every number also in a table.

page = Report("A run", ["It worked."], [Section("Probes", "Best at layer 3.", figures=(figure,), table=table)])
page.write("report.html")
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

PARTS = {"evidence": "Evidence", "edit": "The edit", "audit": "The audit", "more": "Further tables"}
MAX_ROWS = 200
MAX_BYTES = 10_000_000
_LONG = 40  # characters after which a cell may wrap


@dataclass(frozen=True)
class Section:
    """One heading with what belongs under it.

    Attributes:
        title: The heading.
        text: Paragraphs, separated by empty lines.
        figures: Plotly figures; their titles become captions.
        table: Numbers, behind the pictures where there are some.
        html: Markup that is already safe; it is not escaped.
        part: Under which part of the page: `evidence`, `edit`, `audit` or `more`.
    """

    title: str
    text: str = ""
    figures: Sequence[Any] = ()
    table: pd.DataFrame | None = None
    html: str = ""
    part: str = "evidence"


@dataclass(frozen=True)
class Report:
    """A page.

    Attributes:
        title: Of the page.
        summary: Sentences before everything else, the first as the lead.
        sections: In their order; grouped by part.
        manifest: How it was made.
        command: What to type to make it again.
        recipe: Text of the recipe.
        subtitle: A line under the title.
    """

    title: str
    summary: Sequence[str] = ()
    sections: Sequence[Section] = ()
    manifest: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    recipe: str = ""
    subtitle: str = ""

    def html(self) -> str:
        """The page as text.

        Raises:
            DataError: A section of an unknown part.
        """
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup

        parts = self._parts()
        has_figures = any(item["figures"] for part in parts for item in part["entries"])
        page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(
            _asset("report.html.j2")
        )
        return page.render(
            report=self,
            summary=[_glued(sentence) for sentence in self.summary],
            parts=parts,
            css=Markup(_asset("report.css")),
            js=Markup(_asset("report.js")),
            plotly=Markup(_plotly() if has_figures else ""),
            templates=Markup(_templates() if has_figures else "{}"),
            has_figures=has_figures,
            manifest_rows=_facts(self.manifest),
            manifest_json=json.dumps(self.manifest, indent=1, ensure_ascii=False, default=str),
        )

    def write(self, path: str | Path) -> Path:
        """Write the page beside its final name, then rename it; returns the path.

        Raises:
            DataError: The page would be larger than 10 MB.
        """
        path = Path(path)
        body = self.html().encode()
        if len(body) > MAX_BYTES:
            raise DataError(
                f"a report must stay under {MAX_BYTES:,} bytes; this one has {len(body):,}: draw fewer points"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        partial.write_bytes(body)
        partial.replace(path)
        return path

    def _parts(self) -> list[dict[str, Any]]:
        unknown = sorted({section.part for section in self.sections} - set(PARTS))
        if unknown:
            raise DataError(f"a section's part must be one of {list(PARTS)}; received {unknown[0]!r}")
        numbered = list(enumerate(self.sections, start=1))
        parts = []
        for key, title in PARTS.items():
            items = [_item(section, i) for i, section in numbered if section.part == key]
            if items:
                parts.append({"id": key, "title": title, "entries": items})
        return parts


def _item(section: Section, number: int) -> dict[str, Any]:
    """A section, ready for the template."""
    from markupsafe import Markup

    figures = [_figure(figure, f"figure-{number}-{i}") for i, figure in enumerate(section.figures, start=1)]
    rows = 0 if section.table is None else len(section.table)
    note = f"The first {MAX_ROWS} of {rows} rows." if rows > MAX_ROWS else ""
    return {
        "id": f"section-{number}",
        "section": section,
        "paragraphs": [_glued(text.strip()) for text in section.text.split("\n\n") if text.strip()],
        "figures": figures,
        "table": Markup(table_html(section.table)) if section.table is not None and rows else "",
        "table_note": note,
        "markup": Markup(section.html),
    }


def _glued(text: str) -> str:
    """No line ends between a number and its sign: `3 %`, `n = 4`."""
    return text.replace(" %", "\u00a0%").replace("n = ", "n\u00a0=\u00a0")


def _figure(figure: Any, name: str) -> dict[str, Any]:
    """Its data without template and title: the page draws it in its own colours, and a caption can wrap."""
    import html

    from markupsafe import Markup

    spec = json.loads(figure.to_json())
    layout = spec["layout"]
    layout.pop("template", None)
    caption = html.unescape((layout.pop("title", None) or {}).get("text") or "Figure")
    layout["margin"] = {"t": 24, **layout.get("margin", {})}
    layout.setdefault("height", 420)
    axes = [html.unescape((layout.get(key, {}).get("title") or {}).get("text") or "") for key in ("yaxis", "xaxis")]
    named = " against ".join(axis for axis in axes if axis)
    alt = f"{caption}. {named}. The numbers are in the table below." if named else f"{caption}."
    body = Markup(_json_for_script(spec))
    return {"id": name, "caption": caption, "alt": alt, "json": body, "height": layout["height"]}


def table_html(table: pd.DataFrame) -> str:
    """A table as markup: everything escaped, numbers to four digits, long texts wrapped, at most 200 rows."""
    from markupsafe import escape

    shown = table.head(MAX_ROWS)
    textual = [not _numeric(shown[name]) for name in shown.columns]
    head = "".join(
        f'<th scope="col"{" class=text" if text else ""}>{escape(str(name).replace("_", " "))}</th>'
        for name, text in zip(shown.columns, textual, strict=True)
    )
    rows = []
    for values in shown.itertuples(index=False, name=None):
        cells = (_cell(value, text) for value, text in zip(values, textual, strict=True))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _numeric(column: Any) -> bool:
    import pandas as pd

    return bool(pd.api.types.is_numeric_dtype(column)) and not pd.api.types.is_bool_dtype(column)


def _cell(value: Any, text: bool) -> str:
    from markupsafe import escape

    shown = str(escape(_shown(value)))
    kind = " class=long" if text and len(shown) > _LONG else (" class=text" if text else "")
    return f"<td{kind}>{shown}</td>"


def _shown(value: Any) -> str:
    import pandas as pd

    if pd.api.types.is_scalar(value) and pd.isna(value):
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"
    return str(value)


def _facts(manifest: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The manifest's plain values, one level of nesting spelled out; the rest is in the whole manifest."""
    rows = []
    for key, value in manifest.items():
        if isinstance(value, Mapping) and not prefix:
            rows += _facts(value, f"{key}: ")
        elif not isinstance(value, Mapping | list | tuple):
            rows.append((f"{prefix}{key}", _shown(value)))
    return rows


def _json_for_script(value: Any) -> str:
    """JSON that cannot end the script element that holds it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    text: str = get_plotlyjs()
    return text


def _templates() -> str:
    from probe.plots import template

    return _json_for_script({mode: template(mode).to_plotly_json() for mode in ("light", "dark")})


def _asset(name: str) -> str:
    return resources.files("probe").joinpath("_assets").joinpath(name).read_text("utf-8")
