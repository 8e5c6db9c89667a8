"""lab.diagrams: strips and animations; notebooks/figures: the pictures of the course."""

import json
import re
import sys

import figures
import lab
import pytest
import torch
from conftest import ROOT
from figures import fig00
from PIL import Image

import opd


def texts_of(figure):
    return [text.get_text() for axis in figure.axes for text in axis.texts]


def patches_of(figure, **wanted):
    """The filled or hatched cells of a strip."""
    cells = [patch for axis in figure.axes for patch in axis.patches]
    return [c for c in cells if all(getattr(c, f"get_{k}")() == v for k, v in wanted.items())]


def test_a_strip_has_a_cell_for_each_token_and_row_signs_and_hatches():
    rows = {"r": [1.0, -2.0, 0.0], "A": torch.tensor([0.0, 4.0, -4.0])}
    figure = lab.strip(["a", " b", "\n"], rows, "title", gates={"A": [False, True, True]})
    said = texts_of(figure)
    assert {"a", "·b", "↵", "r", "A"} <= {*said}
    assert said.count("+") == 2 and said.count("−") == 2  # zeros have no sign
    assert len(patches_of(figure, hatch="////")) == 2
    assert max(patch.get_alpha() or 0 for patch in patches_of(figure, hatch=None)) == 1.0
    assert figure.axes[0].get_title(loc="left") == "title"


def test_a_strip_writes_numbers_and_goes_on_below():
    figure = lab.strip([*"abcde"], {"r": [0.25, -1.26, 3, 4, 5]}, numbers=True, per_line=2)
    said = texts_of(figure)
    assert {"0.2", "−1.3", "5.0"} <= {*said} and said.count("r") == 3  # three lines


def test_in_grey_a_strip_is_darker_where_there_is_more_and_says_the_sign(tmp_path):
    figure = lab.strip(["a"] * 4, {"r": [0.5, 4.0, -0.5, -4.0]})
    grey = lab.diagrams.pixels(figure).convert("L")
    axis = figure.axes[0]
    at = [axis.transData.transform((x + 0.12, 1.15)) / figure.dpi * 80 for x in range(4)]
    light = [grey.getpixel((int(x), int(grey.height - y))) for x, y in at]
    assert light[1] < light[0] - 40 and light[3] < light[2] - 40, light
    assert texts_of(figure).count("+") == 2 and texts_of(figure).count("−") == 2


def test_a_row_of_another_length_is_refused_by_name():
    for how in (dict(rows={"r": [1.0]}), dict(rows={}, gates={"r": [True]})):
        with pytest.raises(opd.InputError, match="'r': 1 values; must be one for each of 2"):
            lab.strip(["a", "b"], **how)


def test_an_animation_has_a_picture_a_step_and_a_limit(tmp_path, monkeypatch):
    draw = lambda step: lab.strip(["a", "b"], {"r": [step, -step]}, f"step {step}", scale=3)  # noqa: E731
    file = lab.animate(draw, [0, 1, 3], tmp_path / "x.gif", seconds=0.5)
    image = Image.open(file)
    assert image.n_frames == 3 and image.is_animated
    durations = []
    for frame in range(3):
        image.seek(frame)
        durations.append(image.info["duration"])
        seen = image.convert("RGB").getcolors(10**6)
        if frame == 2:  # the palette has both colours, though the first picture is pale
            assert {True} == {any(r - b > 100 for _, (r, _, b) in seen),
                              any(b - r > 100 for _, (r, _, b) in seen)}  # fmt: skip
    assert durations == [500, 500, 1500]
    monkeypatch.setattr(lab.diagrams, "LARGEST", 100)
    with pytest.raises(opd.InputError, match="bytes; must be at most 100"):
        lab.animate(draw, [0, 1], tmp_path / "y.gif")


def test_every_file_of_figures_is_made_by_a_function_and_is_small():
    pictures = [file for file in figures.FOLDER.iterdir() if file.suffix in (".png", ".gif")]
    files = {file.name: file for file in pictures}
    assert files.keys() == figures.FIGURES.keys()
    assert all(file.stat().st_size <= lab.diagrams.LARGEST for file in files.values())


def test_the_animation_of_learning_shows_answers_that_become_right(monkeypatch, tmp_path):
    monkeypatch.setattr(fig00, "STEPS", [0, 8])
    load = opd.Config.load
    monkeypatch.setattr(opd.Config, "load", lambda: load(steps=8))
    seen = fig00.learning()
    right = {step: sum(right for _, right, _, _ in texts) for step, texts in seen.items()}
    assert right[0] < right[8]
    for texts in seen.values():
        assert all(len(tokens) <= len(values) for _, _, tokens, values in texts)
    monkeypatch.setattr(fig00, "learning", lambda: seen)
    assert Image.open(fig00.learning_animation(tmp_path / "x.gif")).n_frames == 2


# the commands, and the page of all comparisons


@pytest.fixture
def command(monkeypatch):
    """The command line's module; it sets the path of a process of its own."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    import lab.__main__

    return lab.__main__


def test_the_page_of_tables_is_what_the_results_say(command):
    page = (ROOT / "tiny_configs/evidence/README.md").read_text()
    assert page == command.page()
    for name in re.findall(r"\]\((.*?)\)", page):
        assert (ROOT / "tiny_configs/evidence" / name).is_file(), name


def test_tables_and_figures_on_the_command_line(command, monkeypatch, tmp_path, capsys):
    evidence = ROOT / "tiny_configs/evidence"
    for name in ("head.md", "second.md", "compatible.json", "compatible.results.json"):
        (tmp_path / name).write_text((evidence / name).read_text())
    (name, one), *_ = lab.evidence(evidence / "compatible.json").items()
    for run in (results := json.loads((tmp_path / "compatible.results.json").read_text())):
        run["edition"] = lab.EDITION
    (tmp_path / "compatible.results.json").write_text(json.dumps(results))
    accuracy, half = one["accuracy"]
    rows = [f'compatible,"{name}",0.5,{value},0.001' for value in (accuracy, 9)]
    head = "comparison,variant,lr,accuracy,half\n"
    (tmp_path / "first_edition.csv").write_text(head + "\n".join(rows))
    monkeypatch.setattr(command, "EVIDENCE", tmp_path)
    assert command.main(["tables"]) == 0
    page = (tmp_path / "README.md").read_text()
    assert "## compatible\n" in page and "| hasty, teacher |" in page
    same, other = page.splitlines()[-2:]
    now = f"| {one['lr']:g} | {accuracy:.3f} ± {half:.3f} |"
    assert same == f"| compatible | {name} | 0.5 | {accuracy:.3f} ± 0.001 {now}  |"
    assert other == f"| compatible | {name} | 0.5 | 9.000 ± 0.001 {now} moved |"
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    assert command.main(["figures", "loop.png"]) == 0 and (tmp_path / "loop.png").exists()
    assert str(tmp_path / "loop.png") in capsys.readouterr().out
    assert command.main(["figures", "none.png"]) == 2
    assert "['none.png']: must be of loop.png" in capsys.readouterr().err
