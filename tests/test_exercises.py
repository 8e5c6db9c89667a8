"""The exercises: solutions are accepted, stubs are not solved yet, mistakes get the right word.

Keys and stubs come from a notebook once it has its `## Exercises`, before that from
exercise_cells/ where that folder is, else from the list in notebooks/checks.py.
"""

import inspect
import io
import math
import re
import subprocess
import sys
from contextlib import redirect_stdout
from unittest.mock import patch

import checks
import lab
import nbformat
import pytest
import torch
from conftest import ROOT
from torch import Tensor

import opd

sys.path.append(str(ROOT / "notebooks" / "solutions"))
import solutions  # noqa: E402

KEYS = list(checks.EXERCISES)
BUGS = [key for key in KEYS if checks.EXERCISES[key].bug]
QUIZ = (ROOT / "notebooks/solutions/quiz.md").read_text()


def cells_of(number):
    """(type, source) of the exercise cells of a notebook, or nothing."""
    for path in (ROOT / "notebooks").glob(f"{number:02}_*.ipynb"):
        cells = [(c.cell_type, c.source) for c in nbformat.read(path, as_version=4).cells]
        heads = [i for i, (_, source) in enumerate(cells) if source.startswith("## Exercises")]
        if heads:
            return cells[heads[0] :]
    for path in (ROOT / "exercise_cells").glob(f"{number:02}_*.py"):
        parts = re.split(r"(?m)^# %%", path.read_text())[1:]
        return [
            ("markdown", re.sub(r"(?m)^# ?", "", part.partition("\n")[2]))
            if part.startswith(" [markdown]")
            else ("code", part.strip())
            for part in parts
        ]
    return []


CELLS = {number: cells_of(number) for number in range(14)}
STUBS = {
    match[1]: source
    for cells in CELLS.values()
    for kind, source in cells
    if kind == "code" and (match := re.search(r'^checks\.check\("([\d.]+)"', source, re.M))
}
TEXTS = {
    match[1]: source
    for cells in CELLS.values()
    for kind, source in cells
    if kind == "markdown" and (match := re.match(r"### Exercise ([\d.]+): ", source))
}


def solution(key):
    return getattr(solutions, f"ex_{key.replace('.', '_')}")


def said(source):
    """What a cell prints."""
    with redirect_stdout(io.StringIO()) as out:
        exec(source, dict(torch=torch, opd=opd, checks=checks))
    return out.getvalue().strip()


def test_enough_of_them_in_every_notebook():
    assert len(KEYS) >= 30
    for number in range(14):
        keys = [key for key in KEYS if key.startswith(f"{number}.")]
        assert keys == [f"{number}.{k}" for k in range(1, len(keys) + 1)] and 2 <= len(keys) <= 3
        if CELLS[number]:
            shown = [key for key in STUBS if key.startswith(f"{number}.")]
            assert shown == keys == [key for key in TEXTS if key.startswith(f"{number}.")]
    reported = [key for key in BUGS if re.search(r"\w #\d+", TEXTS.get(key, "x #1"))]
    assert len(reported) >= 10, "find the bug, with issue numbers"


@pytest.mark.parametrize("key", KEYS)
def test_the_solution_is_accepted_and_explained(key, capsys):
    assert checks.check(key, solution(key)) is True
    assert capsys.readouterr().out == f"{key}: right\n"
    assert inspect.getdoc(solution(key))
    assert checks.judge(key, solution(key)) == checks.judge(key, solution(key))  # deterministic


@pytest.mark.parametrize("key", KEYS)
def test_the_stub_as_given_is_not_solved_and_stops_nothing(key):
    if key not in STUBS:
        pytest.skip("this notebook has no exercises yet")
    source, bug = STUBS[key], key in BUGS
    assert "YOUR CODE HERE" in source and ("return None" in source) != bug
    assert source.splitlines()[-1].startswith(f'checks.check("{key}", my_')
    assert said(source).startswith(f"{key}: {checks.UNSOLVED}")
    assert bug == ("find" in TEXTS[key] and "bug" in TEXTS[key].partition("\n")[0])


@pytest.mark.parametrize("key", STUBS)
def test_the_text_has_a_hint_and_its_formulas_have_tags(key):
    text = TEXTS[key]
    assert "*Hint:*" in text
    assert re.search(r"`\[(?:paper|code|secondary|reconstruction|derived)", text), text


@pytest.mark.parametrize("key", KEYS)
def test_nothing_given_stops_nothing(key, capsys):
    def unwritten(*arguments):
        raise NotImplementedError("later")

    def broken(*arguments):
        raise ValueError("first\nsecond")

    for answer in (lambda *a: None, lambda *a: ..., unwritten):
        assert checks.check(key, answer) is None
        assert capsys.readouterr().out == f"{key}: {checks.UNSOLVED}\n"
    for answer in (broken, lambda: 0, "text", None, lambda *a: "text"):
        assert checks.check(key, answer) is None
        out = capsys.readouterr().out
        assert out.startswith(f"{key}: not right: it raised ") and out.count("\n") == 1


def changed(key, mutant):
    """Does the mutant differ from the solution on the checker's inputs?  None: it cannot run."""
    e, different = checks.EXERCISES[key], False
    for case in range(3 + e.empty):
        a, n = checks.make_inputs(key, e.names, case, e.empty)
        try:
            one, other = (
                checks.run(e.via(checks.call(f)), a, e.on) for f in (solution(key), mutant)
            )
        except Exception:
            return None
        different |= not checks.same(one, other)
    return different


def late(x):
    """One token later, the first one 0."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


def mutants(key):
    """(name, function): the key's solution with one mistake, whether it applies or not."""
    right, names = solution(key), checks.EXERCISES[key].names.split()
    at = {name: i for i, name in enumerate(names)}

    def unmasked(*a):
        return right(*(torch.ones_like(x) if n in ("mask", "seen") else x
                       for n, x in zip(names, a, strict=True)))  # fmt: skip

    def attached(*a):
        with patch.object(Tensor, "detach", lambda x: x):
            return right(*a)

    def rolled(*a):
        return right(a[0].roll(1, 1), *a[1:])

    yield "sign", lambda *a: -right(*a)
    yield "shift", lambda *a: late(right(*a))
    if at.keys() & {"x"} and "horizon" not in at:
        yield "shift", rolled
    yield "mask", unmasked if at.keys() & {"mask", "seen"} else None
    yield "swapped", lambda *a: right(a[1], a[0], *a[2:])
    yield "attached", attached
    yield "detached", lambda *a: right(*a).detach()
    yield "mean", lambda *a: right(*a).mean()
    yield "mean over V", lambda *a: right(*a) / a[0].shape[-1]
    yield "sum", lambda *a: right(*a) * a[at["mask"]].sum()
    yield "all positions", lambda *a: right(*a) * a[1].sum() / a[1].numel()
    yield "base", lambda *a: right(*a) / math.log(2)


WORDS = {  # mistake -> what must be said of it
    "sign": "the sign is wrong|raised",
    "shift": "shifted by one token",
    "mask": "the mask is ignored",
    "base": "bits",
    "swapped": "KL direction|are swapped|wrong side|sign|raised|gradient|ignored|wrong values",
    "detached": "no gradient flows",
    "attached": "a gradient flows|the gradient is wrong",
    "mean": "shape|gradient",
    "sum": "reduction: a sum|shape|factor|wrong|right where nothing is masked",
}
MET = {"sign": 30, "shift": 20, "mask": 7, "base": 25, "swapped": 12, "detached": 8, "attached": 2}


@pytest.mark.parametrize("key", KEYS)
def test_mistakes_are_refused_in_the_right_words(key):
    for name, mutant in mutants(key):
        if mutant is None or not changed(key, mutant):
            continue
        verdict = checks.judge(key, mutant)
        assert verdict != "right", name
        if not verdict.startswith(f"{checks.UNSOLVED}: "):  # the very bug that was shown
            assert re.search(WORDS.get(name, "."), verdict), (name, verdict)
            if name == "swapped" and checks.EXERCISES[key].names.startswith("logp logq"):
                assert re.search("KL direction|wrong side|sign|gradient", verdict), verdict


def test_every_mistake_is_tried_often_enough():
    met = [name for key in KEYS for name, f in mutants(key) if f and changed(key, f)]
    assert all(met.count(name) >= least for name, least in MET.items()), [*map(met.count, MET)]


@pytest.mark.parametrize(
    "key, answer, word",
    [
        ("0.3", lambda z, a: z.log_softmax(-1)[:, 3:-1], "wrong shape"),
        ("2.1", lambda p, q, beta: checks.jsd_gradient(p, q, 1 - beta), "weighs the wrong side"),
        ("2.2", lambda p, q: (p.exp() * (p - q)).mean(-1), "mean over the vocabulary"),
        ("2.2", lambda p, q: (q.exp() * (q - p)).sum(-1), "KL direction"),
        ("2.3", lambda p, q, beta: opd.jsd(p, q, 1 - beta), "weighs the wrong side"),
        ("3.3", lambda p, q: p - q, "no gradient flows"),
        ("3.3", lambda p, q: (p - q) * p, "a gradient flows where it should be detached"),
        ("7.1", lambda r, m, k: checks.drift_weights(r, m | True, k), "the mask is ignored"),
        ("7.2", lambda x, m, g: torch.where(m & g, x, 0.0).mean(), "padding included"),
        ("7.2", lambda x, m, g: torch.where(m & g, x, 0.0).sum() / m.sum(), "no token"),
        ("7.3", lambda x, m, n: torch.where(m, x, 0.0).mean(), "padding included"),
        ("8.3", lambda x, m: (x * m).sum(0) / m.sum(0), "nan where masked"),
        ("9.3", lambda s: -torch.special.xlogy(s / s.sum(), s / s.sum()).sum(), "a logarithm"),
        ("10.1", lambda p, q, k: k * opd.overlap(p, q, k).ratio, "a count, not a share"),
        ("10.2", lambda v, right: lab.auroc(v, ~right), "1 minus"),
        ("1.1", lambda mask: mask.cumsum(-1), "off by one"),
        ("10.3", lambda y, one, other: y >= 0, "wrong values"),
        ("12.1", lambda p, e, m: checks.tokens_left(p, e, m | True), "the mask is ignored"),
        ("12.1", lambda p, e, m: checks.tokens_left(e, p, m), "are swapped"),
        ("12.2", lambda y, seen: checks.behind_prompt(y.roll(-1, 1), seen), "shifted by one token"),
        ("12.3", lambda q, t: (q * t).log_softmax(-1), "wrong"),
        ("11.3", lambda x, m: torch.where(m, x, 0.0).sum() / m.sum(), "no token is unmasked"),
    ],
)
def test_words_for_usual_mistakes(key, answer, word):
    assert word in checks.judge(key, answer)


@pytest.mark.parametrize(
    "key, answer",
    [
        ("3.3", lambda p, q: -(q - p).detach() * p),
        ("4.3", lambda p, q, ids, a: opd.reverse_kl(p, q)),  # needs no draw at all
        ("0.1", lambda p, q, m: ((q - p) * m).sum(1).float()),
        ("1.1", lambda mask: mask.cumsum(-1) - 1),
    ],
)  # fmt: skip
def test_other_right_answers_are_right(key, answer):
    assert checks.judge(key, answer) == "right"


def test_an_answer_that_writes_into_its_arguments_is_judged_like_another():
    def careless(x, mask):
        x[~mask] = 0
        return x.sum() / max(1, int(mask.sum()))

    with pytest.raises(RuntimeError):  # in place on a leaf: not allowed outside no_grad
        careless(torch.ones(1, 2).requires_grad_(), torch.ones(1, 2) > 0)
    assert "raised RuntimeError" in checks.judge("11.3", careless)
    assert checks.judge("11.3", solution("11.3")) == "right"


def test_no_such_exercise(capsys):
    assert checks.check("99.1", len) is None
    assert capsys.readouterr().out == "99.1: there is no such exercise\n"


def test_three_quiz_questions_a_notebook_with_answers():
    parts = re.split(r"(?m)^## ", QUIZ)[1:]
    assert [part[:2] for part in parts] == [f"{number:02}" for number in range(14)]
    for part in parts:
        assert len(re.findall(r"(?m)^\d\. ", part)) == part.count("*Answer:*") == 3


def test_the_course_page_asks_the_same_questions_without_answers():
    page = (ROOT / "notebooks/README.md").read_text()
    readme = page.partition("## Quiz\n")[2].partition("</details>")[0]
    asked = re.findall(r"(?m)^\d\. (.*)$", readme)
    assert asked == re.findall(r"(?m)^\d\. (.*)$", QUIZ) and len(asked) == 42
    assert "Answer" not in readme


def test_format():
    files = ["notebooks/checks.py", "notebooks/solutions/solutions.py"]
    for words in (["format", "--check", "-q"], ["check", "-q"]):
        command = [sys.executable, "-m", "ruff", *words, *files]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
