"""The picture of notebook 01."""

from lab.diagrams import BLUE, ORANGE, saved
from matplotlib.figure import Figure

PATHS = [  # where it leaves the teacher's, its height, tokens, and what is said of it
    (0, 2, "2 + 2 = 4 ; 4 …", "the teacher's path:\nthe states its text trains on"),
    (4, 3, "5 ; 5 …", "a slip, 5 for 4: and now?"),
    (0, 1, ": # 2 ■", "a wrong turn at the first token"),
]


def states() -> Figure:
    """A tree of states: the teacher's path, two wrong turns, and what lies behind them."""
    figure = Figure(figsize=(8, 2.7))
    axis = figure.subplots()
    for x, y, tokens, about in PATHS:
        colour, line, fill = (ORANGE, "--", "w") if y == 2 else (BLUE, "-", "0.85")
        edge, last = dict(ls=line, lw=1.6), 2
        for token in tokens.split():
            style = dict(arrowstyle="-|>", color=colour, **edge)
            axis.annotate("", (x + 0.75, y), (x + 0.25, last), arrowprops=style)
            ring = dict(boxstyle="circle", fc=fill, ec=colour, **edge)
            axis.text(x + 1, y, token, ha="center", va="center", family="monospace", bbox=ring)
            x, last = x + 1, y
        axis.text(x + 0.5, y, about, va="center", fontsize=9)
    axis.text(0, 2, "prompt", ha="center", va="center", bbox=dict(boxstyle="round", fc="w"))
    axis.text(8.5, 1, "grey: states in no text\nof the teacher's", va="center", fontsize=9)
    axis.set(xlim=(-0.5, 11.8), ylim=(0.5, 3.4))
    axis.set_axis_off()
    figure.subplots_adjust(0, 0, 1, 1)
    return figure


FIGURES = {"states.png": saved(states)}
