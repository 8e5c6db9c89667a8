"""The notebooks: committed as executed, clean outputs; `pytest --notebooks` runs them all."""

import re

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PRIVATE = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|usr|Users|opt|var)/|site-packages")


def outputs_of(notebook):
    cells = [c for c in notebook.cells if c.cell_type == "code"]
    return [o for c in cells for o in c.outputs]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_as_executed_and_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    assert not any(
        o.output_type == "error" or o.get("name") == "stderr" for o in outputs_of(notebook)
    )
    assert not PRIVATE.search(str(outputs_of(notebook)))
    assert path.stat().st_size < 1_000_000
    assert any("image/png" in o.get("data", {}) for o in outputs_of(notebook)), "no picture"
    text = "\n".join(c.source for c in notebook.cells)
    for must in ("You will learn", "inspect.getsource", "by hand", "Where to read more"):
        assert must in text, must


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_displayed_formula_has_its_evidence_tag(path):
    tags = re.compile(r"\[(?:paper|code|secondary|reconstruction|derived)")
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown" and "$$" in cell.source:
            assert tags.search(cell.source), cell.source[:200]


@pytest.mark.notebook
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=240, resources=folder, kernel_name="python3").execute()
    assert any(o.get("name") == "stdout" for o in outputs_of(notebook))
