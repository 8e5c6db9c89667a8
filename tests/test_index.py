"""The README's formula index: its functions, tags and headings are real, and nothing is missing."""

import inspect
import json
import re

import pytest
from conftest import ROOT

import opd

README = (ROOT / "README.md").read_text()
EXEMPT = {  # public functions of sections 4 to 7 and 9 without a row, and why
    "overlap": "its parts overlap_ratio, overlap_mass and overlap_advantage have rows",
    "on_both": "overlap, where the intersection is known",
    "candidates": "routing_target's formula, kept on the teacher's top k",
    "token_weights": "the weights inside masked_mean",
    "attention_and_mlp": "chooses parameters by name, no formula",
    "update_geometry": "the mean of spectrum over matrices",
}


def section(title):
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows_of_index():
    lines = [line for line in section("Formula index").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    assert all(len(row) == 4 for row in cells)
    return [row for row in cells if any(row[1:])]  # without the group's titles


ROWS = rows_of_index()


def plain(text):
    return " ".join(text.replace("`", "").split())


def headings(number):
    (path,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "markdown"]
    lines = "".join("".join(c["source"]) + "\n" for c in cells).splitlines()
    return [line.lstrip("#").strip() for line in lines if re.match("#+ ", line)]


def functions_of(sections):
    """Public functions and their section, in the order of opd.py."""
    starts = {
        int(m[1]): i
        for i, line in enumerate((ROOT / "opd.py").read_text().splitlines(), 1)
        if (m := re.match(r"# §(\d+) ", line))
    }
    functions = [f for f in vars(opd).values() if inspect.isfunction(f) and f.__module__ == "opd"]
    at = {f.__name__: inspect.unwrap(f).__code__.co_firstlineno for f in functions}
    inside = {name for name, n in at.items() for s in sections if starts[s] < n < starts[s + 1]}
    return {name for name in inside if not name.startswith("_")}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[2].strip('`')}: {row[0][:24]}")
def test_row(row):
    formula, evidence, name, notebook = row
    assert re.fullmatch(r"`\w+`", name), name
    function = getattr(opd, name.strip("`"))
    known = plain(inspect.getdoc(function))
    for other in re.findall(r"see (\w+)\]", known):  # the docstring that it points to
        known += " " + plain(inspect.getdoc(getattr(opd, other)))
    tags = re.findall(r"`(\[[^`]+\])`", evidence)
    assert (" ".join(f"`{tag}`" for tag in tags) or "–") == evidence
    for tag in tags:
        assert tag in known, tag
    if not tags:  # then the docstring has none
        assert not re.search(r"\[(paper|code|secondary|reconstruction|derived)", known), known
    assert formula.count("$") % 2 == 0 and formula.count("{") == formula.count("}")
    assert not re.search(r"\\[^a-zA-Z]", formula), "Markdown eats a backslash before a sign"
    if notebook != "–":
        number, _, heading = notebook.partition(": ")
        assert headings(number).count(heading) == 1, notebook


def test_nothing_is_missing():
    indexed = {row[2].strip("`") for row in ROWS}
    wanted = functions_of((4, 5, 6, 7, 9))
    assert wanted - indexed == EXEMPT.keys()
    assert len(wanted) > 25


def test_lecturers_table_takes_the_notebooks_own_minutes():
    """A row for each notebook, its minutes as the first cell says, and links to the exercises."""
    words = {"half a minute": "0.5", "minute and a half": "1.5", "two minutes": "2"}
    text = section("For lecturers")
    table = dict(re.findall(r"^\| (\d\d_\w+) \| [^|]+ \| ([\d.]+) \| \d+ \| [^|]+ \|$", text, re.M))
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        intro = "".join(json.loads(path.read_text())["cells"][0]["source"])
        said = re.search(r"About (.*?) on a laptop's CPU", intro, re.S | re.I)[1].lower()
        minutes = next((n for word, n in words.items() if word in said), "1")
        assert table.pop(path.stem) == minutes, path.stem
    assert not table


def test_own_rule_is_shown_as_it_was_run():
    code = (ROOT / "tests" / "benchmarks" / "own_rule.py").read_text()
    assert f"```python\n{code}```" in section("For lecturers")
