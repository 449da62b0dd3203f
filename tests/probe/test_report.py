"""The page: it parses, asks the network for nothing, escapes everything, stays small, and a browser draws it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from probe import plots
from probe._page import MAX_ROWS, table_html
from probe._report import Report, Section, report, sections
from probe.audit import ReportCard
from probe.audit._rows import COLUMNS
from probe.errors import DataError
from probe.targets import Scores

NASTY = '</script><script>alert("x")</script><img src="http://evil.example/x.png" onerror=alert(1)>'
BROWSER = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr",
    "--allow-file-access-from-files", "--virtual-time-budget=8000", "--window-size=1400,900", "--dump-dom",
]  # fmt: skip
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Checks nesting while reading; collects elements, attributes and visible text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.data: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        self.data.setdefault(self.open[-1] if self.open else "", []).append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join("".join(v) for k, v in self.data.items() if k not in ("script", "style")).split())

    def of(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def scores(kind="direction") -> Scores:
    rng = np.random.default_rng(0)
    if kind == "direction":
        rows = [
            {"site": f"blocks.{layer}.hook_resid_post", "layer": layer, "method": "logistic", "score": 0.6 + layer / 10}
            | {"low": 0.5, "high": 0.95, "control": 0.5, "control_low": 0.4, "control_high": 0.6, "majority": 0.5}
            | {"bag_of_tokens": 0.55, "n": 120, "n_groups": 12}
            for layer in range(3)
        ]
        return Scores("sweep", kind, pd.DataFrame(rows), score_name="balanced accuracy", settings={"warnings": [NASTY]})
    rows = [
        {"layer": layer, kind: i, "score": float(layer - i), "low": -3.0, "high": 3.0, "n": 9}
        | ({"token": ["<s>", NASTY, " the", " the"][i]} if kind == "position" else {})
        for layer in range(2)
        for i in range(4)
    ]
    return Scores(
        "patch", kind, pd.DataFrame(rows), twins=rng.normal(size=20), twins_note="random vectors", signed=True
    )


def card() -> ReportCard:
    rows = []
    for name in ("forget", "retain"):
        for metric in ("recall", "probability", "kl_gold_model"):
            for model, value in (("original", 0.9), ("edited", 0.2), ("gold 1", 0.1), ("gold 2", 0.2), ("gold", 0.15)):
                rows.append((name, metric, model, value, value - 0.05, value + 0.05, 8, "", "questions", 4, "95 %"))
        for metric in ("recall", "probability"):
            rows.append((name, metric, "change", -0.7, -0.8, -0.6, 8, "", "questions", 4, "95 %"))
    return ReportCard(pd.DataFrame(rows, columns=list(COLUMNS)), {"golds": 2, "people": "people"}, ("relearning",))


@pytest.fixture(scope="module")
def results() -> dict:
    return {
        "title": NASTY,
        "sweep": scores(),
        "patch": scores("position"),
        "experts": scores("expert"),
        "contexts": pd.DataFrame({"latent": [3], "activation": [1.25], "text": [NASTY]}),
        "candidates": pd.DataFrame({"candidate": [NASTY], "forget_prob": [0.123456], "chosen": [True]}),
        "audit": card(),
        "manifest": {"seed": 0, "name": NASTY, "versions": {"torch": "2"}, "list": [NASTY]},
        "command": f"probe run {NASTY}",
        "recipe": NASTY,
    }


@pytest.fixture(scope="module")
def path(results, tmp_path_factory):
    return report(results, tmp_path_factory.mktemp("report") / "deep" / "report.html")


@pytest.fixture(scope="module")
def page(path) -> Page:
    return Page(path.read_text("utf-8"))


def test_the_page_is_well_formed_and_every_link_inside_it_leads_somewhere(page):
    assert page.open == []
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = [attrs["href"].removeprefix("#") for attrs in page.of("a")]
    assert len(targets) >= 8
    assert set(targets) <= set(ids)
    for _, attrs in page.elements:
        assert set((attrs.get("aria-labelledby") or "").split()) <= set(ids)


def test_nothing_is_asked_of_the_network_and_the_page_forbids_it(page):
    for tag, attrs in page.elements:
        for name in ("src", "href", "data", "action", "poster", "srcset"):
            assert not re.match(r"\s*(https?:|//)", attrs.get(name) or ""), (tag, attrs)
    assert not page.of("link")
    assert not page.of("img")
    policy = next(attrs["content"] for attrs in page.of("meta") if attrs.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "connect-src" not in policy


def test_what_comes_from_models_and_people_is_text_and_not_markup(page):
    assert not [attrs for _, attrs in page.elements if any(name.startswith("on") for name in attrs)]
    assert [script for script in page.data["script"] if script.lstrip().startswith("alert")] == []
    assert page.words.count('<script>alert("x")</script>') >= 6
    assert "".join(page.data["title"]) == NASTY
    assert "".join(page.data["h1"]) == NASTY


def test_the_page_is_small_and_written_whole(path):
    assert path.stat().st_size < 10_000_000
    assert [child.name for child in path.parent.iterdir()] == ["report.html"]


def test_figures_carry_the_tables_numbers_and_are_described(page, path):
    blocks = re.findall(
        r'<script type="application/json" id="(figure-[\d-]+)-data">(.*?)</script>', path.read_text("utf-8")
    )
    figures = {name: json.loads(text) for name, text in blocks}
    assert len(figures) == 5
    curve = next(trace for trace in figures["figure-1-1"]["data"] if trace.get("name") == "logistic regression")
    assert plots.probe_curves(scores().table).data[1].y.tolist() == pytest.approx(_decoded(curve["y"]))
    assert all("template" not in figure["layout"] and "title" not in figure["layout"] for figure in figures.values())
    images = [attrs for attrs in page.of("div") if attrs.get("role") == "img"]
    assert len(images) == 5
    assert all("table below" in attrs["aria-label"] for attrs in images)
    assert len(page.of("figcaption")) == 5
    assert len(page.of("details")) >= 4


def _decoded(values):
    import base64

    if isinstance(values, dict):
        return np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"]).tolist()
    return values


def test_the_summary_says_what_was_found_beside_its_controls(page):
    words = page.words.replace("\u00a0", " ")
    assert "lowered recall of the 4 forgotten people from 90 % to 20 % [15 to 25] (n = 8 questions)" in words
    assert "Of 3 directions tried, the best is logistic regression at blocks.2.hook_resid_post" in words
    assert "balanced accuracy 0.8 [0.5 to 0.95] (n = 120, 12 groups)" in words
    assert "shuffled labels 0.5 [0.4 to 0.6], majority class 0.5, bag of tokens 0.55" in words
    assert "Of 20 random twins, 95 % lie between" in words
    assert "Warning: " in words


def test_a_run_directory_is_read_and_gets_its_report(results, tmp_path):
    for name in ("sweep", "patch"):
        results[name].save(tmp_path / "scores" / name)
    results["audit"].save(tmp_path / "audit")
    results["candidates"].to_csv(tmp_path / "candidates.csv", index=False)
    (tmp_path / "manifest.json").write_text(json.dumps({"name": "a run", "seed": 3}))
    (tmp_path / "recipe.yaml").write_text("format: 1\n")
    made = report(tmp_path)
    assert made == tmp_path / "report.html"
    words = Page(made.read_text("utf-8")).words
    for part in (
        "a run",
        "Where a linear probe can read it",
        "activation patching",
        "Which edit was chosen",
        "probe run",
    ):
        assert part in words


def test_an_edit_is_shown_tensor_by_tensor():
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from probe import editing
    from probe.models import wrap
    from probe.targets import Direction

    torch.manual_seed(0)
    model = wrap(GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)), name="tiny")
    edit = editing.project_out(model, Direction("blocks.0.hook_resid_post", torch.randn(8)))
    (section,) = sections({"edit": edit})
    assert section.part == "edit"
    assert "tensors of tiny" in section.text
    assert set(section.table["parameter"]) == set(edit.parameters)


def test_the_candidates_text_claims_no_split_by_groups():
    (section,) = sections({"candidates": pd.DataFrame({"candidate": ["a"], "chosen": [True]})})
    assert section.text.startswith("Settings were chosen on the select split. Chosen is")
    assert "groups" not in section.text


def test_removal_is_shown_as_one_row_a_set_and_measure():
    rows = [("intact", "law", 1.0), ("removed", "law", 0.0), ("random", "law", 0.9), ("random", "law", 1.0)]
    (section,) = sections({"removal": pd.DataFrame(rows, columns=["arm", "set", "recall"])})
    assert section.table.to_dict("records") == [
        {"set": "law", "measure": "recall", "intact": "1", "removed": "0", "random": "0.95 (0.9 to 1)"}
    ]


def test_tables_round_align_and_cut():
    table = pd.DataFrame(
        {"a_b": [1.23456789, np.nan, 3.0], "text": ["<b>", None, "x" * 60], "yes": [True, False, True]}
    )
    text = table_html(table)
    assert "<td>1.235</td>" in text
    assert "<td>–</td>" in text
    assert "<td>3</td>" in text
    assert "<td class=text>&lt;b&gt;</td>" in text
    assert f"<td class=long>{'x' * 60}</td>" in text
    assert "<td class=text>no</td>" in text
    assert '<th scope="col">a b</th>' in text
    many = Report("t", sections=[Section("s", table=pd.DataFrame({"a": range(MAX_ROWS + 5)}))]).html()
    assert f"The first {MAX_ROWS} of {MAX_ROWS + 5} rows." in many
    assert many.count("<tr>") == MAX_ROWS + 1


def test_a_report_without_figures_carries_no_plotly(tmp_path):
    made = Report("Plain", ["One sentence."], [Section("Words", "First.\n\nSecond.")]).write(tmp_path / "plain.html")
    assert made.stat().st_size < 20_000
    page = Page(made.read_text("utf-8"))
    assert page.open == []
    assert "First." in page.words


def test_what_makes_no_report_says_why(tmp_path):
    with pytest.raises(DataError, match="there is none at"):
        report(tmp_path / "nowhere")
    with pytest.raises(DataError, match="at least one result"):
        report(tmp_path)
    with pytest.raises(DataError, match="part must be one of"):
        Report("t", sections=[Section("s", part="nonsense")]).html()
    with pytest.raises(DataError, match="must stay under"):
        Report("t", ["x" * 10_000_001]).write(tmp_path / "large.html")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def chromium() -> str:
    found = os.environ.get("PROBE_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not found:
        pytest.skip("needs a chromium on the path, or its path in PROBE_CHROMIUM")
    return found


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_draws_every_figure_without_complaint(chromium, path, tmp_path, width):
    # An iframe has the width asked for; a headless window does not get narrower than 500.
    frame = f'<iframe src="{path.as_uri()}" style="border:0;width:{width}px;height:9000px"></iframe>'
    (tmp_path / "frame.html").write_text(
        f"<body>{frame}<script>onload = () => {{ const page = document.querySelector('iframe').contentDocument;"
        "document.title = JSON.stringify({plots: page.querySelectorAll('.js-plotly-plot .main-svg').length,"
        "wide: page.documentElement.scrollWidth, drawn: page.documentElement.dataset.plots}); }</script></body>"
    )
    ran = subprocess.run(
        [chromium, *BROWSER, f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "frame.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    complaints = [line for line in ran.stderr.splitlines() if "CONSOLE" in line]
    assert complaints == []
    seen = json.loads(re.search(r"<title>(.*?)</title>", ran.stdout).group(1))
    assert seen["drawn"] == "5"
    assert seen["plots"] >= 5
    assert seen["wide"] <= width


def test_token_labels_that_stand_for_several_tokens_are_explained(tmp_path):
    plain = scores("position")
    mixed = plain.table.assign(token=[f"{token} (+2)" for token in plain.table["token"]])
    page = report({"patch": Scores("patch", "position", mixed)}, tmp_path / "mixed.html").read_text("utf-8")
    assert "A label such as" in page
    assert "A label such as" not in report({"patch": plain}, tmp_path / "plain.html").read_text("utf-8")
