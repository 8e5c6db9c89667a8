"""The project's promises: sizes, layout, format, links, configs that load."""

import ast
import inspect
import re
import subprocess
import sys
from types import SimpleNamespace

import lab
import pytest
from conftest import ROOT

import opd

README = (ROOT / "README.md").read_text()


LINES, FIELDS, BODY = 1800, 50, 50  # of opd.py, of Config, of a function without its docstring


def test_size_promise():
    text = (ROOT / "opd.py").read_text()
    assert len(text.splitlines()) <= LINES
    assert len(opd.Config.model_fields) <= FIELDS
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, functions):
            documented = ast.get_docstring(node) is not None
            doc = node.body[0].end_lineno - node.body[0].lineno + 1 if documented else 0
            assert node.end_lineno - node.lineno + 1 - doc <= BODY, node.name


def test_format():
    command = [sys.executable, "-m", "ruff"]
    for words in (["format", "--check", "-q"], ["check", "-q"]):
        files = ["opd.py", "tests", "notebooks", "tiny_configs", "--exclude", "*.ipynb"]
        done = subprocess.run(command + words + files, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_public_function_is_documented():
    for name, value in vars(opd).items():
        mine = getattr(value, "__module__", None) == "opd" and callable(value)
        if mine and not name.startswith("_"):
            assert inspect.getdoc(value), name


PAGES = [
    "README.md", "notebooks/README.md", "notebooks/FORMULAS.md", "tiny_configs/README.md",
    "tiny_configs/evidence/README.md", "tests/benchmarks/README.md",
]  # fmt: skip


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_and_anchor_of_a_page_is_there(page):
    text, found = (ROOT / page).read_text(), 0
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path
        assert target.exists(), link
        found += 1
        if anchor:
            assert f'<a id=\\"{anchor}\\">' in target.read_text(), link
    assert found


def test_readme_is_a_front_page():
    lines = README.splitlines()
    assert len(lines) <= 200 and len(README) <= 16_000
    assert re.search(r"!\[[^]]+\]\(notebooks/figures/\w+\.gif\)", "\n".join(lines[:12]))
    loop = opd.__doc__.partition("    for step in range(steps):\n")[2].partition("\n\n")[0]
    same = [line.strip() for line in loop.splitlines()]
    assert "\n".join(same) in "\n".join(line.strip() for line in lines)  # opd.py's own


def test_readme_names_every_method_and_rule_and_only_fields_that_are_fields():
    named = {
        name
        for row in re.findall(r"(?m)^\| (`.*?) \|", README)
        for name in re.findall(r"`(\w+)`", row)
    }
    assert {*opd.METHODS, *lab.RULES} <= named
    commands = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S))
    commands = re.sub(r"(?m)^pip .*$", "", commands)
    for field in re.findall(r"--(\w+)", commands):
        known = opd.Config.model_fields.keys() | {"resume", "help"}
        assert field in known, field


def test_readmes_result_table_is_the_evidence():
    for name, each in lab.evidence(ROOT / "tiny_configs/evidence/baselines_novice.json").items():
        assert "| {} | {:.3f} ± {:.3f} |".format(name, *each["accuracy"]) in README


def test_the_glossary_has_every_key_of_metrics(world):
    page = (ROOT / "notebooks/README.md").read_text().partition("## What metrics.jsonl says")[2]
    told = {*re.findall(r"(?m)^\| `(\w+)` \|", page.partition("\n## ")[0])}
    config = opd.Config.load(batch_size=2, max_tokens=4, diagnose_every=1)
    row = opd.train_step(config, world, SimpleNamespace(
        param_groups=[dict(params=[*world.student.parameters()])], step=lambda: None,
        zero_grad=world.student.zero_grad), 0)  # fmt: skip
    assert told == {*row, "extrapolated", "accuracy", "step_s"}


def test_every_config_loads():
    paths = [*(ROOT / "tiny_configs").glob("*.json"), *(ROOT / "tiny_configs/build").glob("*.json")]
    assert len(paths) > 15
    trained = dict(student_improved="opd_full", student_reinforced="reinforce")
    for path in paths:
        config = opd.Config.load(path)
        if path.parent.name == "build":
            assert config.name == f"build-{path.stem}"
            assert config.method == trained.get(path.stem, "sft")


def test_layout_and_no_private_paths():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [f for f in listed.stdout.splitlines() if (ROOT / f).exists()]
    top = {f.split("/")[0] for f in files if not f.startswith(".")}
    assert top <= {"opd.py", "notebooks", "tests", "tiny_configs", "requirements.txt", "README.md"}
    private = re.compile(r"(?<![\w.])/(?:home|root|work|Users)/\w|\.\./shared")
    for f in files:
        if f.endswith((".py", ".md", ".json", ".txt")) and "test_" not in f:
            assert not private.search((ROOT / f).read_text()), f
