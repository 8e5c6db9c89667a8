"""The notebooks: committed as executed, clean outputs; `pytest --notebooks` runs them all."""

import re
import subprocess
import sys
from pathlib import Path

import matplotlib
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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_what_is_ours_stands_in_a_box(path):
    """A notebook that shows a reconstruction says so in a block that is seen without reading."""
    cells = nbformat.read(path, as_version=4).cells
    text = "\n".join(c.source for c in cells if c.cell_type == "markdown").partition("## Exerc")[0]
    text += "".join(
        str(o.get("text", "")) for o in outputs_of(nbformat.v4.new_notebook(cells=cells))
    )
    boxes = re.findall(
        r"(?m)^> \*\*Box: (our |an? )?(reconstruction|choices|guess|reading|estimates?)", text
    )
    shown = re.search(r"[\[;] ?reconstruction", text)
    assert boxes or not shown, "a reconstruction without a box"
    if path.stem[:2] in ("05", "06", "08", "10", "11"):  # GAE-OPD, CR-OPD, schedules, check, report
        assert ("our ", "reconstruction") in boxes and shown
    if path.stem[:2] == "12":
        assert ("an ", "estimate") in boxes


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_first_cell_is_everywhere_the_same(path):
    assert first_cell(path) == first_cell(NOTEBOOKS[0])


def first_cell(path):
    cells = nbformat.read(path, as_version=4).cells
    return next(c.source for c in cells if c.cell_type == "code")


def test_first_cell_in_a_process_of_its_own_finds_the_project_in_a_folder_here(tmp_path):
    (tmp_path / "opd-py").symlink_to(ROOT)
    code = first_cell(NOTEBOOKS[0])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.endswith("opd.py found\n"), done.stderr


@pytest.fixture
def run_cell(monkeypatch):
    """Runs the first cell in a folder, where no project is on the path and none is imported."""

    def run(folder):
        monkeypatch.chdir(folder)
        for name in [name for name in sys.modules if re.match(r"(lab|opd)(\.|$)", name)]:
            monkeypatch.delitem(sys.modules, name)
        ours = (ROOT, ROOT / "notebooks")
        monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p).resolve() not in ours])
        exec(first_cell(NOTEBOOKS[0]), {})

    with matplotlib.rc_context():  # lab.style() is for all pictures to come
        yield run


@pytest.mark.parametrize("inside", ["", "notebooks"])
def test_first_cell_finds_the_project_from_inside(inside, run_cell, capsys):
    run_cell(ROOT / inside)
    assert capsys.readouterr().out.endswith("opd.py found\n")
    assert Path(sys.modules["opd"].__file__) == ROOT / "opd.py"
    assert Path(sys.modules["lab"].__file__).parent == ROOT / "notebooks/lab"


def test_first_cell_elsewhere_says_what_to_do(run_cell, tmp_path):
    """A SystemExit with words: Python prints them without a traceback, and ends with code 1."""
    with pytest.raises(SystemExit, match="upload the project's whole folder") as ended:
        run_cell(tmp_path)
    assert isinstance(ended.value.code, str)


def test_first_cell_names_the_command_when_a_package_is_missing(run_cell, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    with pytest.raises(SystemExit, match="%pip install -r") as ended:
        run_cell(ROOT)
    assert isinstance(ended.value.code, str)


@pytest.mark.notebook
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=240, resources=folder, kernel_name="python3").execute()
    assert any(o.get("name") == "stdout" for o in outputs_of(notebook))
