"""The pictures of notebook 00, the loop and a student that learns, and the map of the course."""

from pathlib import Path

import torch
from lab.diagrams import animate, arrow, board, box, cell, saved
from lab.plots import BLUE, GREY, ORANGE, words
from matplotlib.figure import Figure

import opd


def loop() -> Figure:
    """The loop of on-policy distillation: write, score, compare, update, and again."""
    figure = Figure(figsize=(7.4, 2.9), layout="none")
    axis = figure.subplots()
    box(axis, 2, 4, "student  p", 3.2)
    box(axis, 14.6, 4, "teacher  q", 3.2, ORANGE)
    for x, token, gap in zip((6.3, 7.3, 8.3, 9.3), ":#2■", (-15, -17, 0, -14), strict=True):
        cell(axis, x, 3.5, 0, 1, False, False)
        axis.text(x + 0.5, 4, token, ha="center", va="center", family="DejaVu Sans Mono")
        cell(axis, x, 0.7, gap, 20, False, True)
    axis.text(8.3, 4.75, "the student's own response", ha="center", fontsize=9)
    axis.text(8.3, 0.3, "what the teacher thinks of each token", ha="center", fontsize=9)
    arrow(axis, (3.7, 4), (6.1, 4), "1  write", at=(0, 0.3))
    arrow(axis, (10.5, 4), (12.9, 4), "2  score", at=(0, 0.3))
    arrow(axis, (14.6, 3.4), (10.5, 1.2), "3  compare q with p", -0.25, (2.5, -0.8))
    arrow(axis, (6.1, 1.2), (2, 3.4), "4  update the student, not the teacher", -0.25, (-2.2, -0.8))
    axis.set(xlim=(0.1, 16.5), ylim=(0, 5.1))
    axis.set_axis_off()
    figure.subplots_adjust(0, 0, 1, 1)
    return figure


STEPS = [0, 2, 4, 5, 6, 7, 8, 10, 12, 16, 24, 40]  # of the animation
SHOWN = 8  # prompts in it


def learning() -> dict[int, list[tuple]]:
    """The main job, watched: step -> (prompt, right, tokens, log-ratio of each) of a few prompts.

    The noise is the same at every step, so only what was learned changes a text.
    """
    c = opd.Config.load()
    world = opd.load_world(c)
    c = c.model_copy(update=dict(max_tokens=world.task.max_tokens))
    optimizer, seen = opd.make_optimizer(c, world), {}
    prompts = world.task.prompts(SHOWN, "validation")
    noise = torch.rand(SHOWN, c.max_tokens, generator=opd.keyed_generator("learning"))
    for step in range(c.steps + 1):
        if step in STEPS:
            text = opd.sample(world.student, prompts, horizon=c.max_tokens, noise=noise)
            right = world.task.verify(prompts, text).tolist()
            ratio = opd.score_tokens(world.teacher, text) - text.logprobs
            said = [words(world.tokenizer, text, row) for row in range(SHOWN)]
            seen[step] = [*zip(prompts.text, right, said, ratio.tolist(), strict=True)]
        if step < c.steps:
            opd.train_step(c, world, optimizer, step)
    return seen


def learning_animation(file: Path) -> Path:
    """What the student writes while it learns: what the teacher objects to, and the answers."""
    seen = learning()
    wide = max(len(tokens) for texts in seen.values() for _, _, tokens, _ in texts)

    def draw(step: int) -> Figure:
        right = sum(right for _, right, _, _ in seen[step])
        said = f"step {step:2}   {right} of {SHOWN} answers right   "
        return board(seen[step], said + "(orange: the teacher would not have written this)", wide)

    return animate(draw, STEPS, file)


MAP = {  # number -> column, row, name, what it needs
    "00": (0, 0, "tour", ""), "01": (1, 0, "states", "00"), "02": (2, 0, "divergences", "01"),
    "03": (3, 0, "two routes", "02"), "04": (4, 0, "support", "03"), "06": (5, 0, "routing", "04"),
    "13": (6, 0, "real language", "06"), "05": (3, 1, "credit", "03"),
    "09": (0, -1, "extrapolation", "00"), "08": (1, -1, "horizons", "01"),
    "12": (2, -1, "to a GPU", "02"), "10": (3, -1, "when it fails", "03"),
    "11": (4, -1, "diagnostics", "10"), "07": (5, -1, "papers' rules", "06"),
}  # fmt: skip


def course() -> Figure:
    """A map of the course: an arrow leads from a notebook to one that needs it."""
    figure = Figure(figsize=(9, 3))
    axis = figure.subplots()
    for number, (column, row, name, needs) in MAP.items():
        x, y, main = 2.9 * column, 1.7 * row, row == 0
        box(axis, x, y, f"{number}\n{name}", 2.2, BLUE if main else GREY)
        if needs:
            u, v = 2.9 * MAP[needs][0], 1.7 * MAP[needs][1]
            ends = ((u + 1.15, v), (x - 1.15, y)) if v == y else (
                (u, v + 0.5 * row), (x, y - 0.5 * row))  # fmt: skip
            arrow(axis, *ends)
    axis.set(xlim=(-1.4, 18.8), ylim=(-2.4, 2.4))
    axis.set_axis_off()
    figure.subplots_adjust(0, 0, 1, 1)
    return figure


FIGURES = {"loop.png": saved(loop), "learning.gif": learning_animation}
FIGURES |= {"course.png": saved(course)}
