"""The project's promises: sizes, the README's glossary and first code block, what is in it."""

import ast
import inspect
import io
import json
import re
import subprocess
import sys
import tokenize

import pytest
from conftest import ROOT

import opd

README = (ROOT / "README.md").read_text()


def code_lines(path):
    """Line numbers that hold code: no docstrings, comments or blanks."""
    source = path.read_text()
    documented = set()
    for node in ast.walk(ast.parse(source)):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            documented.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
              tokenize.ENDMARKER)  # fmt: skip
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    used = {row for t in tokens if t.type not in silent for row in range(t.start[0], t.end[0] + 1)}
    return used - documented


PROMISE, NOW = 1200, 1893  # lines of code in opd.py: what was promised, and what it may not exceed


@pytest.mark.xfail(strict=True, reason="opd.py is above its promised size; see the README")
def test_opd_py_is_as_short_as_promised():
    assert len(code_lines(ROOT / "opd.py")) <= PROMISE


def test_size_promise():
    file = ROOT / "opd.py"
    lines, text = code_lines(file), file.read_text().splitlines()
    heads = {int(m[1]): i for i, row in enumerate(text, 1) if (m := re.match(r"# §(\d+) ", row))}
    mathematics = [n for n in lines if heads[2] <= n < heads[11]]  # §2 to §10
    assert len(lines) <= NOW and len(mathematics) <= 550
    assert list(heads) == sorted(heads)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            body = [n for n in lines if node.lineno <= n <= node.end_lineno]
            assert len(body) <= 50, node.name
    assert len(code_lines(ROOT / "notebooks" / "lab.py")) <= 400
    assert len([n for n in lines if n in lines_of(opd.train_step)]) <= 25


def lines_of(function):
    source, first = inspect.getsourcelines(function)
    return range(first, first + len(source))


def test_format():
    command = [sys.executable, "-m", "ruff"]
    for words in (["format", "--check", "-q"], ["check", "-q"]):
        files = ["opd.py", "tests", "notebooks/lab.py", "notebooks/broken.py"]
        done = subprocess.run(command + words + files, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_public_function_is_documented():
    for name, value in vars(opd).items():
        mine = getattr(value, "__module__", None) == "opd" and callable(value)
        if mine and not name.startswith("_"):
            assert inspect.getdoc(value), name


def test_readme_starts_with_the_inner_step_as_it_is():
    first = re.search(r"```python\n(.*?)```", README, re.S)[1]
    assert first.strip() == inspect.getsource(opd.train_step).strip()


def test_readme_glossary_explains_every_metric(run_dir):
    run = opd.train(opd.Config.load(steps=1, batch_size=4, eval_prompts=4, eval_every=0))
    keys = set(json.loads((run.dir / "metrics.jsonl").read_text()))
    section = README.partition("## What a run measures")[2].partition("\n## ")[0]
    explained = re.findall(r"^\| `(\w+)` \|.*\|.*\|.*\|$", section, re.M)
    assert set(explained) == keys and len(explained) == len(keys)


def test_readme_names_only_files_that_exist_and_fields_that_are_fields():
    for path in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / path).exists(), path
    commands = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S))
    for field in re.findall(r"--(\w+)", commands):
        known = opd.Config.model_fields.keys() | {"resume", "help"}
        assert field in known, field


def test_every_build_config_loads():
    for path in (ROOT / "tiny_configs").rglob("*.json"):
        if path.parent.name == "build":
            config, trained = opd.Config.load(path), dict(student_improved="opd_full")
            trained["student_reinforced"] = "reinforce"
            assert config.name == f"build-{path.stem}"
            assert config.method == trained.get(path.stem, "sft")


def test_layout_and_no_private_paths():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = listed.stdout.split()
    top = {f.split("/")[0] for f in files if not f.startswith(".")}
    assert top <= {"opd.py", "notebooks", "tests", "tiny_configs", "requirements.txt", "README.md"}
    private = re.compile(r"(?<![\w.])/(?:home|root|work|Users)/\w|\.\./shared")
    for f in files:
        if f.endswith((".py", ".md", ".json", ".txt")) and "test_" not in f:
            assert not private.search((ROOT / f).read_text()), f
