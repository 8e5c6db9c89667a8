"""The picture of notebook 10: what `check` asks."""

from lab.diagrams import GREY, ORANGE, arrow, box, saved
from matplotlib.figure import Figure

QUESTIONS = {  # -> what to do where the answer is no
    "Can the teacher finish the\nstudent's text better?": "other teacher",
    "Do they agree on the\nstudent's own text?": "cold start first",
    "From its start\nto its end?": "shorten the horizon",
}


def flow() -> Figure:
    """The questions of lab.check from left to right; below each, what a no means."""
    figure = Figure(figsize=(8.6, 2.3))
    axis = figure.subplots()
    box(axis, 1.3, 3, "the student answers\n256 prompts", 2.6, GREY)
    for n, (question, advice) in enumerate(QUESTIONS.items()):
        x = 4.9 + 3.9 * n
        box(axis, x, 3, question, 3.2)
        arrow(axis, (x - 2.2, 3), (x - 1.6, 3), "yes" * (n > 0), at=(0, 0.35))
        arrow(axis, (x, 2.5), (x, 1.25), "no", at=(0.35, 0))
        box(axis, x, 0.75, advice, 2.8, ORANGE)
    arrow(axis, (14.3, 3), (14.95, 3), "yes", at=(0, 0.35))
    box(axis, 15.6, 3, "go", 1.1)
    axis.set(xlim=(-0.2, 16.4), ylim=(0.1, 3.7))
    axis.set_axis_off()
    figure.subplots_adjust(0, 0, 1, 1)
    return figure


FIGURES = {"check.png": saved(flow)}
