"""The picture of notebook 09."""

from pathlib import Path

import torch
from lab.diagrams import BLUE, ORANGE, animate
from matplotlib.figure import Figure

RATES = [0.01, 0.02, 0.03, 0.045, 0.06, 0.08, 0.1, 0.13, 0.16, 0.2, 0.23]
CURVATURE = torch.tensor([1.0, 8.0])  # along the valley and across it


def valley(file: Path) -> Path:
    """Eight steps down a valley, then EffOPD's five candidates, at one learning rate a frame."""

    def draw(n: int) -> Figure:
        figure, shrink = Figure(figsize=(7.6, 2.7)), 1 - RATES[n] * CURVATURE
        axis, path = (
            figure.subplots(),
            torch.tensor([-8.0, 0.8]) * shrink ** torch.arange(9)[:, None],
        )
        x, y = torch.meshgrid(
            torch.linspace(-9, 7, 60), torch.linspace(-2.2, 2.2, 60), indexing="xy"
        )
        axis.contour(x, y, x**2 + 8 * y**2, [1, 5, 15, 30, 50, 75], colors="0.8", linewidths=1)
        axis.plot(*path.T, "o-", color=BLUE, ms=4)
        axis.plot(0, 0, "*", color=ORANGE, ms=16, mec="k")
        best, k, on = (CURVATURE * path[8] ** 2).sum(), 0, True
        for i in range(1, 6):
            new = path[8] + 2 * i * (path[8] - path[4])
            score = (CURVATURE * new**2).sum()
            on = on and bool(score <= best)
            best, k = (score, i) if on else (best, k)
            axis.plot(*new, "o" if on else "x", color="k", mfc=BLUE, ms=10 if on else 7)
            axis.text(new[0], new[1] + 0.28, i, ha="center", clip_on=True)
        axis.set(xlim=(-9, 7), ylim=(-2.2, 2.2), xticks=[], yticks=[])
        axis.set_title(
            f"learning rate {RATES[n]:.3f}: candidates accepted: {k}", loc="left", fontsize=10
        )
        figure.subplots_adjust(0.01, 0.02, 0.99, 0.9)
        return figure

    return animate(draw, [*range(len(RATES))], file, 1.0)


FIGURES = {"valley.gif": valley}
