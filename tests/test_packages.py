"""What holds for the packages as a whole: public names, import order, cheap imports, the repository's rules."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib

import pytest

import activations_cache
import probe
import saes
from tests.conftest import ROOT

PACKAGES = [activations_cache, saes, probe]
ROOMS = [
    "activations_cache.sites",
    "probe.audit",
    "probe.data",
    "probe.editing",
    "probe.experts",
    "probe.features",
    "probe.models",
    "probe.organisms",
    "probe.patching",
    "probe.plots",
    "probe.probing",
    "probe.recipe",
    "probe.targets",
    "probe.unlearning",
]
FACE = {
    activations_cache: {"capture", "open", "Cache", "sites", "hashing", "errors", "read_documents", "tokenize",
                        "Documents", "Tokens", "conformance", "Generations", "capture_generation", "capture_ray",
                        "concat", "generate", "import_saelens", "join", "repair", "verify"},
    saes: {"train", "load", "evaluate", "Evaluation", "separation", "errors"},
    probe: {"load", "export", "run", "report", "audit", "data", "editing", "errors", "experts", "features", "models",
            "organisms", "patching", "plots", "probing", "targets", "unlearning"},
}  # fmt: skip


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.__name__)
def test_public_names_are_these_and_all_resolve(package):
    assert set(package.__all__) == FACE[package]
    assert sorted(package.__all__) == package.__all__ or sorted(package.__all__, key=str.lower) == package.__all__
    for name in package.__all__:
        assert getattr(package, name) is not None
        assert name in dir(package)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        package.nonsense  # noqa: B018


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_state_their_public_names_and_document_them(room):
    module = importlib.import_module(room)
    assert module.__doc__
    for name in module.__all__:
        value = getattr(module, name)
        if callable(value):
            assert value.__doc__, f"{room}.{name} has no docstring"


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.__name__)
def test_each_package_has_one_error_tree(package):
    errors = importlib.import_module(f"{package.__name__}.errors")
    classes = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, Exception)]
    root = classes[0]
    assert root.__base__ is Exception
    assert all(issubclass(c, root) for c in classes)
    assert all(c.__doc__ for c in classes)


def test_importing_is_cheap():
    """torch, transformers and transformer_lens take seconds; they are imported when something needs them."""
    heavy = ("torch", "transformers", "transformer_lens", "sae_lens", "pandas", "plotly", "sklearn", "h5py")
    code = f"import sys, probe, saes, activations_cache, probe.cli; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert out.strip() == "[]"


def test_rooms_import_downwards_only(monkeypatch):
    from importlinter.cli import lint_imports

    monkeypatch.chdir(ROOT)
    assert lint_imports(no_cache=True, cache_dir=None) == 0


def test_constraints_hold_names_and_versions_only():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    wrong = [x for x in lines if not x.startswith("#") and not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!_]+", x)]
    assert wrong == []


def test_constraints_fit_what_is_required():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(x.lower().split("==") for x in (ROOT / "constraints.txt").read_text().splitlines() if "==" in x)
    pins = {name.replace("_", "-"): version for name, version in pins.items()}
    required = [Requirement(x) for x in project["dependencies"]]
    required += [
        Requirement(x)
        for extra in ("dev", "notebooks", "bench", "docs")
        for x in project["optional-dependencies"][extra]
    ]
    for r in required:
        assert r.specifier.contains(pins[r.name.lower().replace("_", "-")]), r.name


def test_nothing_loaded_may_run_code():
    """No pickle, and no `torch.load` that would read one."""
    pattern = re.compile(
        r"\bimport pickle\b|\bpickle\.load|torch\.load\((?!.*weights_only=True)|allow_pickle=True|\beval\(\""
    )
    found = [
        str(path)
        for name in ("probe", "saes", "activations_cache")
        for path in (ROOT / name).rglob("*.py")
        if pattern.search(path.read_text("utf-8"))
    ]
    assert found == []
