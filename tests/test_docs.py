"""The documentation says what the code does: its Python runs, its commands parse, its links and tables are right.

Blocks of one page share a namespace and run in a folder of their own, on the small organism. A block with an HTML
comment `<!-- not run: reason -->` on the line above is left out.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [page for page in (ROOT / "README.md", *DOCS) if page.is_file()]
FENCE = re.compile(
    r"(?P<above>[^\n]*)\n(?P<indent> *)```(?P<language>[a-z]*)[^\n]*\n(?P<body>.*?)\n(?P=indent)```", re.S
)
CODE = re.compile(r"^ *```.*?^ *```|^ {4,}\S[^\n]*$", re.S | re.M)
DOCUMENTED = (
    "activations_cache",
    "activations_cache.sites",
    "saes",
    "probe",
    "probe.audit",
    "probe.data",
    "probe.editing",
    "probe.experts",
    "probe.features",
    "probe.organisms",
    "probe.patching",
    "probe.plots",
    "probe.probing",
    "probe.targets",
    "probe.unlearning",
)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> Iterator[tuple[int, str]]:
    """Line number and text of each fenced block of a page in one of the languages, except those that are not run."""
    text = "\n" + page.read_text("utf-8")
    for found in FENCE.finditer(text):
        if found["language"] in languages and not found["above"].strip().startswith("<!-- not run:"):
            yield text[: found.start("body")].count("\n"), found["body"]


def commands(page: Path) -> Iterator[str]:
    """Every `probe ...` command line, in console blocks and in indented ones."""
    shell = [body for _, body in blocks(page, "console", "bash", "sh", "shell")]
    prose = re.sub(r"^ *```.*?^ *```", "", page.read_text("utf-8"), flags=re.S | re.M)
    indented = [line for line in prose.splitlines() if re.match(r" {4,}(\$ )?probe ", line)]
    for line in "\n".join([*shell, *indented]).replace("\\\n", " ").splitlines():
        command = line.strip().removeprefix("$ ")
        if command.startswith(("probe ", ".venv/bin/probe ")):
            yield command


# -------------------------------------------------------------------- what runs


@pytest.mark.parametrize("page", [p for p in PAGES if any(blocks(p, "python"))], ids=name_of)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "documentation"}
    ran = 0
    for line, body in blocks(page, "python"):
        try:
            exec(compile("\n" * line + body, str(page), "exec", dont_inherit=True), namespace)
        except Exception as error:
            raise AssertionError(f"{name_of(page)}:{line + 1}: {type(error).__name__}: {error}") from error
        ran += 1
    assert ran > 0


@pytest.mark.parametrize("page", [p for p in PAGES if any(commands(p))], ids=name_of)
def test_commands_parse(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from probe.cli import _parser

    wrong = []
    for command in commands(page):
        try:
            _parser().parse_args(shlex.split(command, comments=True)[1:])
        except SystemExit as left:
            if left.code:
                wrong.append(f"{command}: {capsys.readouterr().err.strip().splitlines()[-1]}")
    assert not wrong


def test_the_commands_page_has_every_command() -> None:
    from probe.cli import _parser

    shown = list(commands(ROOT / "docs" / "commands.md"))
    missing = [name for name in subcommands(_parser()) if not any(c.startswith(f"probe {name} ") for c in shown)]
    assert not missing


def subcommands(parser: argparse.ArgumentParser, prefix: str = "") -> Iterator[str]:
    """Names of all commands that do something, such as `cache info`."""
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not groups:
        yield prefix.strip()
    for group in groups:
        for name, below in group.choices.items():
            yield from subcommands(below, f"{prefix} {name}")


# -------------------------------------------------------------------- what is said


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_named_files_exist(page: Path) -> None:
    text = CODE.sub("", page.read_text("utf-8"))
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href|srcset)="([^"]+)"', text)
    local = [link.split("#")[0] for link in links if not re.match(r"[a-z]+:", link)]
    named = re.findall(r"`((?:probe|docs|notebooks|tests|benchmarks|activations_cache|saes)/[\w./-]+\.\w+)`", text)
    gone = [link for link in local if link and not (page.parent / link).exists()]
    assert gone + [name for name in named if not (ROOT / name).exists()] == []


def test_the_site_has_every_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    named = set(re.findall(r"[\w./-]+\.md", text))
    assert named == {str(page.relative_to(ROOT / "docs")) for page in DOCS}
    assert yaml.safe_load(text)["theme"]["font"] is False  # nothing is fetched


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings", reason="needs the extra 'docs'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "api" / "probing.html").read_text("utf-8")
    assert 'id="probe.probing.sweep"' in page
    assert not re.findall(r'(?:src|href)="https?://[^"]+\.(?:js|css)"', page)  # the pages open offline


@pytest.mark.parametrize("module", DOCUMENTED)
def test_the_reference_has_every_public_name(module: str) -> None:
    listed = set(re.findall(r"^::: ([\w.]+)$", "\n".join(p.read_text("utf-8") for p in DOCS), re.M))
    public = {f"{module}.{name}" for name in importlib.import_module(module).__all__}
    modules = {name for name in public if name in DOCUMENTED or f"{name}.".startswith("probe.models.")}
    assert public - modules - listed == set()


def test_everything_in_the_reference_exists() -> None:
    for page in (ROOT / "docs" / "api").glob("*.md"):
        for name in re.findall(r"^::: ([\w.]+)$", page.read_text("utf-8"), re.M):
            assert resolves(name), f"{name_of(page)} names {name}, which there is not"


def resolves(name: str) -> bool:
    """Whether a dotted name is a module or something in one."""
    try:
        return importlib.import_module(name) is not None
    except ModuleNotFoundError:
        module, _, last = name.rpartition(".")
        return bool(module) and hasattr(importlib.import_module(module), last)


# -------------------------------------------------------------------- tables


def table(page: str, header: str) -> list[list[str]]:
    """The cells of the table of a page whose first column is headed so."""
    text = (ROOT / "docs" / page).read_text("utf-8")
    rows = text.split(f"| {header} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_table_of_sites_is_complete() -> None:
    from activations_cache.sites import Sites
    from tests.architectures import ARCHITECTURES, tiny

    said = {row[0].strip("`"): row[1].strip("`") for row in table("sites.md", "site")}
    found = set()
    for architecture in ARCHITECTURES:
        sites = Sites(tiny(architecture))
        found |= {general(site.name) for site in sites}
        if architecture in ("gpt2", "llama", "mixtral"):
            sizes = {name: getattr(sites.dims, name) for name in type(sites.dims).__slots__}
            for site in sites:
                assert eval(said[general(site.name)], {}, sizes) == site.shape, site.name
    assert set(said) == found


def general(name: str) -> str:
    return re.sub(r"^blocks\.\d+", "blocks.i", name)


def test_the_table_of_the_recipe_is_complete() -> None:
    from probe import recipe

    rows = table("recipe.md", "field")
    assert {row[0].strip("`") for row in rows} == set(recipe.schema()["properties"])
    page = (ROOT / "docs" / "recipe.md").read_text("utf-8")
    words = set(re.findall(r"[a-z_0-9]+", page.split("## Fields", 1)[1]))
    assert set(nested(recipe.schema())) - words == set()


def nested(rule: Any) -> Iterator[str]:
    """Every field name of a JSON schema."""
    if isinstance(rule, dict):
        yield from rule.get("properties", {})
        for below in rule.values():
            yield from nested(below)
    elif isinstance(rule, list):
        for below in rule:
            yield from nested(below)


def test_recipes_fit_the_schema() -> None:
    from probe import recipe

    shown = [body for page in PAGES for _, body in blocks(page, "yaml")]
    made = [recipe.resolve(yaml.safe_load(body)) for body in shown if body.startswith("format:")]
    assert len(made) >= 3
    assert all(own["splits"]["evaluate"] > 0 for own in made)
