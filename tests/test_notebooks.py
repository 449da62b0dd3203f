"""Notebooks run from top to bottom, at the small size, and are committed without outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra 'notebooks'")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# a file that each notebook leaves when it has come to its end, below runs/
LEFT = {
    "01_the_whole_road": "the_whole_road_small/model/edit.json",
    "02_the_activations_cache": "the_activations_cache_small/answers.safetensors",
    "03_removed_or_suppressed": "removed_or_suppressed_small/card/card.json",
}


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == list(LEFT)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_outputs_are_committed(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ipykernel", reason="needs the extra 'notebooks'")
    nbclient = pytest.importorskip("nbclient", reason="needs the extra 'notebooks'")
    monkeypatch.setenv("PROBE_SIZE", "small")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = read(path)
    kernel(tmp_path, monkeypatch)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="here", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()  # raises CellExecutionError
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert not [out for cell in code for out in cell.outputs if out.output_type == "error"]
    assert (tmp_path / "runs" / LEFT[path.stem]).is_file()


def kernel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel named `here` that is this interpreter, whatever kernels are installed."""
    from ipykernel.kernelspec import write_kernel_spec

    write_kernel_spec(folder / "jupyter" / "kernels" / "here")
    monkeypatch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
