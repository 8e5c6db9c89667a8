"""The figures of notebook 06: where suppressed mass goes, and who may receive it."""

from pathlib import Path

import torch
from lab.diagrams import animate, saved
from lab.plots import BLUE, GREY, ORANGE
from matplotlib.figure import Figure

import opd


def mean_steps(rule: str, logq: torch.Tensor, steps: int) -> list[torch.Tensor]:
    """A student's probabilities step by step, each step the mean over all tokens it may draw."""
    tail = 1 / torch.arange(1, 47)
    p = torch.cat([torch.tensor([0.6, 0.001, 0.001, 0.001]), 0.397 * tail / tail.sum()])
    z, seen, drawn = p.log(), [p], torch.arange(50)
    for _ in range(steps):
        z = z.detach().requires_grad_()
        logp, how = z.log_softmax(-1), dict(top_k=16, min_prob=1e-4, rho=float(rule == "routed"))
        each = opd.cr_opd_loss(logp.expand(50, 50), logq.expand(50, 50), drawn, **how)
        (logp.detach().exp() * each).sum().backward()
        z = z - 0.3 * z.grad
        seen.append(z.detach().softmax(-1))
    return seen


def routing(file: Path) -> Path:
    """Fifty tokens under plain and under routed feedback, step by step."""
    q = torch.tensor([0.04, 0.57, 0.228, 0.152] + [0.01 / 46] * 46)
    runs = {rule: mean_steps(rule, q.log(), 30) for rule in ("plain", "routed")}
    names = ["wrong", "good", "good", "good", *[f"junk {n}" for n in (1, 2, 3, 4)], "42 more"]

    def draw(step: int) -> Figure:
        figure = Figure(figsize=(7.6, 2.9), layout="constrained")
        for axis, (rule, seen) in zip(
            figure.subplots(1, 2, sharey=True), runs.items(), strict=True
        ):
            p, best = (torch.cat([x[:8], x[8:].sum(0, True)]) for x in (seen[step], q))
            axis.bar(range(9), p, color=BLUE, width=0.62)
            axis.bar(range(9), best, fc="none", ec=ORANGE, ls="--", lw=1.6, width=0.86)
            axis.set(ylim=(0, 0.9), title=f"{rule}, step {step}")
            axis.set_xticks(range(9), names, rotation=50, ha="right", rotation_mode="anchor")
            axis.spines[["top", "right"]].set_visible(False)
        figure.axes[0].set_ylabel("student p (filled)\nteacher q (dashed)")
        return figure

    return animate(draw, [0, 1, 2, 3, 4, 6, 8, 10, 13, 16, 20, 25, 30], file, 0.6)


def recipients() -> Figure:
    """Six tokens of one state, and which condition keeps each out of C."""
    tokens = [  # student, teacher, what becomes of it
        (0.55, 0.05, "drawn: a"), (0.25, 0.1, "has enough:\nq < p"), (0.04, 0.4, "share\nr = .62"),
        (0.02, 0.25, "share\nr = .38"), (2e-5, 0.17, "out of reach:\np < ε"),
        (8e-4, 2e-3, "not in the\nteacher's top 5"),
    ]  # fmt: skip
    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    axis = figure.subplots()
    for x, (p, q, what) in enumerate(tokens):
        axis.bar(x, p, color=BLUE if "share" in what else GREY, width=0.5)
        axis.bar(x, q, fc="none", ec=ORANGE, ls="--", lw=1.6, width=0.75)
        axis.text(x, 1.4, what, ha="center", weight="bold" if "share" in what else None)
    axis.axhline(1e-4, color="k", lw=0.8, ls=":")
    axis.text(5.6, 1.2e-4, "ε", ha="right", va="bottom")
    axis.set(yscale="log", ylim=(1e-5, 9), xticks=[], xlim=(-0.6, 5.7))
    axis.set_ylabel("student p (filled)\nteacher q (dashed)")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


FIGURES = {"routing.gif": routing, "recipients.png": saved(recipients)}
