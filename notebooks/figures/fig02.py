"""The figure of notebook 02: one bump under three losses, from three starts."""

from collections.abc import Callable
from pathlib import Path

import torch
from lab.diagrams import animate
from lab.plots import BLUE, ORANGE
from matplotlib.figure import Figure

import opd

PLACES = torch.arange(30.0)
LOSSES = {"forward KL": opd.forward_kl, "reverse KL": opd.reverse_kl}
LOSSES["JSD, β = .5"] = lambda logp, logq: opd.jsd(logp, logq, 0.5)
SHOWN = [0, 2, 4, 7, 10, 14, 20, 28, 40, 60, 90, 140, 320]  # steps
SAYS = "step {}   bars: student   dashes: teacher   arrows: how a step moves a logit   number: loss"


def slide(loss: Callable, starts: list[float], steps: int) -> tuple[torch.Tensor, list]:
    """The teacher (30,), and on a bump's way (p, minus the logit gradient, loss): (starts, 30)."""
    bells = [(-((PLACES - m) ** 2) / (2 * w**2)).softmax(-1) for m, w in ((9, 1.5), (21, 2))]
    q, path = 0.65 * bells[0] + 0.35 * bells[1], []
    mean, log_width = torch.tensor(starts)[:, None], torch.full((len(starts), 1), 0.6)
    for _ in range(steps + 1):
        mean, log_width = mean.detach().requires_grad_(), log_width.detach().requires_grad_()
        z = -((PLACES - mean) ** 2) / (2 * log_width.exp() ** 2)
        value = loss(z.log_softmax(-1), q.log().expand_as(z))
        pull, move, widen = torch.autograd.grad(value.sum(), (z, mean, log_width))
        path.append((z.softmax(-1).detach(), -pull, value.detach()))
        mean = mean - (0.1 * move * log_width.exp() ** 2).clamp(-0.5, 0.5)  # in units of the width
        log_width = log_width - (0.1 * widen).clamp(-0.2, 0.2)
    return q, path


def frame(step: int, paths: dict[str, tuple]) -> Figure:
    """Nine bumps at one step; a row a loss, a column a start."""
    figure = Figure(figsize=(7.4, 4.3), layout="constrained")
    figure.suptitle(SAYS.format(f"{step:3}"), fontsize=9)
    for row, (name, (q, path)) in zip(figure.subplots(3, 3), paths.items(), strict=True):
        for axis, p, pull, value in zip(row, *path[step], strict=True):
            axis.bar(PLACES, p, 1.0, color=BLUE, alpha=0.75)
            axis.step(PLACES, q, where="mid", color=ORANGE, ls="--", lw=1.5)
            x, high = PLACES[pull.abs() > 0.008], pull[pull.abs() > 0.008].clamp(-0.12, 0.12)
            how = dict(angles="xy", scale_units="xy", scale=1, width=0.008, headwidth=5)
            axis.quiver(x, p[pull.abs() > 0.008], 0 * x, high, headlength=4, **how)
            axis.text(29, 0.3, f"{value:.2f}", ha="right", fontsize=9)
            axis.set(ylim=(-0.03, 0.36), xticks=[], yticks=[])
        row[0].set_ylabel(name)
    return figure


def bumps(file: Path) -> Path:
    """How each loss moves a bump, from three starts, toward a teacher with two groups."""
    paths = {name: slide(loss, [6.0, 15.0, 24.0], SHOWN[-1]) for name, loss in LOSSES.items()}
    return animate(lambda step: frame(step, paths), SHOWN, file, seconds=0.7)


FIGURES = {"bumps.gif": bumps}
