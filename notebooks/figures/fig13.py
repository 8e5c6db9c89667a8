"""The picture of notebook 13."""

from lab.diagrams import BLUE, GREY, ORANGE, arrow, box, saved
from matplotlib.figure import Figure


def context() -> Figure:
    """One model twice: the teacher reads more than the student, both score the same response."""
    figure = Figure(figsize=(7.6, 2.9))
    axis = figure.subplots()
    shown = "three demonstrations:\nArr, matey! A ship be ..."
    box(axis, 1.9, 3.2, "What is a river?", 3, BLUE)
    box(axis, 1.9, 0.8, shown, 3.4, ORANGE)
    box(axis, 5.5, 0.8, "What is a river?", 2.6, ORANGE)
    box(axis, 6.6, 3.2, "the model writes a response\nA river is a body of water ...", 4.6, GREY)
    box(axis, 12.4, 3.2, "student p\nscores it behind the question", 4.4, BLUE)
    box(axis, 12.4, 0.8, "teacher q, the same weights,\nscores it behind much more", 4.4, ORANGE)
    arrow(axis, (3.5, 3.2), (4.2, 3.2))
    arrow(axis, (9, 3.2), (10.1, 3.2))
    arrow(axis, (9, 2.8), (10.6, 1.4), "the same tokens", at=(-1.3, -0.1))
    arrow(axis, (6.9, 0.8), (10.1, 0.8))
    arrow(axis, (13.6, 1.3), (13.6, 2.7), "compare", at=(0.8, 0))
    axis.set(xlim=(0, 15.2), ylim=(0.1, 3.9))
    axis.set_axis_off()
    figure.subplots_adjust(0, 0, 1, 1)
    return figure


FIGURES = {"context.png": saved(context)}
