"""Where the formulas are from: opd.py's numbered sections, the tag that each formula carries."""

import inspect
import re

import lab
import pytest
from conftest import ROOT

import opd

LINES = (ROOT / "opd.py").read_text().splitlines()
HEADS = {int(m[1]): i for i, line in enumerate(LINES, 1) if (m := re.match(r"# (\d+)  \S", line))}
KINDS = ("paper", "code", "secondary", "reconstruction", "derived")
UNTAGGED = {  # functions of the formulas' sections without a tag, and why
    "candidates": "routing_target's formula, on the teacher's top k",
    "token_weights": "the weights inside masked_mean",
    "writing_flops": "forward_flops, summed over a text",
    "candidate_score": "the run's own validation, no formula",
}


def functions_of(*sections):
    """The public functions of some sections of opd.py, by name."""
    ends = {**HEADS, max(HEADS) + 1: len(LINES) + 1}
    own = [f for f in vars(opd).values() if inspect.isfunction(f) and f.__module__ == "opd"]
    at = {f: inspect.unwrap(f).__code__.co_firstlineno for f in own}
    inside = {f for f, n in at.items() for s in sections if ends[s] < n < ends[s + 1]}
    return {f.__name__: f for f in inside if not f.__name__.startswith("_")}


def tags_of(text):
    """The contents of the tags of a text, each `kind: source; kind: source`."""
    plain = " ".join(text.split())
    return [m[1] for m in re.finditer(rf"\[((?:{'|'.join(KINDS)})\b[^\]]*)\]", plain)]


FORMULAS = functions_of(5, 6, 7, 8, 9, 11, 12)


def test_sections_are_numbered_in_order():
    assert [*HEADS] == [*range(1, 16)] and [*HEADS.values()] == sorted(HEADS.values())


def test_the_sections_hold_the_formulas():
    assert len(FORMULAS) > 25
    assert {"reverse_kl", "gae", "cr_opd_loss", "masked_mean", "horizon_at"} <= FORMULAS.keys()


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_a_formula_says_where_it_is_from(name):
    tags = tags_of(inspect.getdoc(FORMULAS[name]))
    assert bool(tags) != (name in UNTAGGED), tags
    for tag in tags:
        parts = [part.strip() for part in tag.split(";")]
        assert all(part.startswith(KINDS) for part in parts), tag
        for number in re.findall(r"\b\d{4}\.\d+", tag):  # an arXiv number is whole
            assert re.fullmatch(r"\d{4}\.\d{5}", number), tag


def test_every_method_says_where_it_is_from():
    text = "\n".join(LINES).partition("METHODS: dict")[2].partition("\ndef preset")[0]
    comment, previous = "", ""
    for line in text.splitlines():
        if line.strip().startswith("#"):
            comment = line if not previous.strip().startswith("#") else comment + line
        if m := re.match(r'    "(\w+)": dict', line):
            assert tags_of(comment.replace("#", "")), m[1]
        previous = line


# notebooks/FORMULAS.md; tests/test_project.py follows its links

ROWS = [
    line.split(" | ")
    for line in (ROOT / "notebooks/FORMULAS.md").read_text().splitlines()
    if re.search(r"\.ipynb#", line)
]


def test_the_index_of_formulas_has_functions_and_their_tags():
    assert len(ROWS) > 50
    shown = set()
    for formula, tags, function, _ in ROWS:
        name = function.strip("`")
        module, _, last = name.rpartition(".")
        owner = {"": opd, "lab": lab, "lab.rules": lab.rules}[module]
        doc = " ".join(inspect.getdoc(getattr(owner, last)).split())
        for tag in re.findall(r"`(\[.*?\])`", tags):
            assert tag in doc, (formula, tag)
        shown.add(last)
    missing = {*FORMULAS} - {*UNTAGGED} - shown
    assert not missing, missing
