"""The figures of notebook 03: what a drawn token does to the student, on the simplex."""

from typing import Any

import torch
from lab.diagrams import saved
from lab.plots import BLUE, GREY, ORANGE, SKY
from matplotlib.figure import Figure
from torch import Tensor

P, Q = torch.tensor([0.7, 0.25, 0.05]), torch.tensor([0.2, 0.1, 0.7])
LOOKS = (dict(color=BLUE), dict(color=GREY), dict(color=SKY))  # of the three draws


def place(p: Tensor) -> Tensor:
    """Where a distribution over three tokens lies in the triangle: (..., 3) -> (..., 2)."""
    return p @ torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.87]], dtype=p.dtype)


def triangle(axis: Any, q: Tensor = Q) -> None:
    """All distributions over three tokens, and the teacher's."""
    corners = place(torch.eye(3))
    axis.fill(*corners.T, fc="0.97", ec="k", lw=0.8, zorder=0)
    for v, (x, y) in enumerate(corners.tolist()):
        axis.text(x, y + (0.03 if v == 2 else -0.08), f"token {v}", ha="center", fontsize=8)
    axis.plot(*place(q), "D", color=ORANGE, mfc="w", mew=2, ms=8)
    axis.text(*(place(q) + torch.tensor([0.04, 0.0])), "q", fontsize=11)
    axis.set(aspect="equal", xlim=(-0.12, 1.12), ylim=(-0.12, 0.97))
    axis.set_axis_off()


def pushes(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """What descent adds to the logits: after each draw (3, 3), and by the KL itself (3,)."""
    r = (q / p).log()
    return r[:, None] * (torch.eye(len(p)) - p), p * (r - (p * r).sum())


def dart(axis: Any, start: Tensor, end: Tensor, width: float, color: str) -> None:
    """An arrow between two places; one that leads towards a corner raises that logit."""
    tip = f"-|>,head_width={0.2 + 0.03 * width},head_length={0.4 + 0.05 * width}"
    how = dict(arrowstyle=tip, lw=width, color=color, shrinkA=0, shrinkB=0, mutation_scale=12)
    axis.annotate("", end.tolist(), start.tolist(), arrowprops=how)


def routes() -> Figure:
    """Left: the push of each draw.  Right: the three, weighted and end to end, and the KL's."""
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    (draws, kl), here, at = pushes(P, Q), place(P), torch.zeros(2)
    triangle(left)
    marks = ((0.12, 0.04), (-0.17, 0.06), (0.2, 0.42)), ((0.1, -0.015), (0.2, 0.052), (0.095, 0.1))
    for v, look in enumerate(LOOKS):
        step, width = P[v] * place(draws[v]), 1 + 7 * P[v].item()
        dart(left, here, here + 0.3 * place(draws[v]), width, **look)
        dart(right, at, at + step, width, **look)
        at = at + step
        left.text(*(here + torch.tensor(marks[0][v])), f"{v} drawn:\n{P[v]:.2f}", fontsize=8)
        right.text(*marks[1][v], f"{P[v]:.2f} x push of {v}", fontsize=8)
    left.plot(*here, "o", color=BLUE, ms=8, zorder=5)
    left.text(*(here - torch.tensor([0.02, 0.09])), "p", fontsize=11)
    dart(right, torch.zeros(2), place(kl), 2, "k")
    right.text(0.005, 0.12, "route A: push\nof the KL itself", fontsize=8)
    left.set_title("Route B: three possible pushes", fontsize=10)
    right.set(xlim=(-0.03, 0.3), ylim=(-0.03, 0.18), aspect="equal")
    right.set_title("Weighted, end to end: they end where route A ends", fontsize=10)
    right.set_axis_off()
    return figure


FIGURES = {"routes.png": saved(routes)}
