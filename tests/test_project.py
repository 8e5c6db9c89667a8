"""The project's promises: sizes, layout, format, links, configs that load."""

import ast
import inspect
import re
import subprocess
import sys

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


def test_readme_names_only_files_that_exist_and_fields_that_are_fields():
    for path in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / path).exists(), path
    commands = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S))
    for field in re.findall(r"--(\w+)", commands):
        known = opd.Config.model_fields.keys() | {"resume", "help"}
        assert field in known, field


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
