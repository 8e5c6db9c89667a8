"""The figure of notebook 04."""

import torch
from lab.diagrams import saved
from lab.plots import BLUE, ORANGE
from matplotlib.figure import Figure

import opd

P, Q = (0.7, 0.25, 0.03, 0.01, 0.01), (0.2, 0.1, 0.05, 0.6, 0.05)
TAILS = ("stop_gradient", "generalised", "renormalise", "bucket")


def tails(k: int, title: str = "", p: tuple = P, q: tuple = Q, steps: int = 60) -> Figure:
    """Student, teacher, the student's top k; arrows: where `steps` steps take each probability."""
    logp, logq = (torch.tensor(x, dtype=torch.float64).log() for x in (p, q))
    S, at = opd.top_k_support(logp, logq, k), range(len(p))
    figure = Figure(figsize=(8.4, 4.3), layout="constrained")
    figure.suptitle(title)
    names = [["filled: student p    dashed: teacher q"] * 3 + ["whole vocabulary"], [*TAILS]]
    for name, axis in figure.subplot_mosaic(names, sharey=True).items():
        z = logp.clone().requires_grad_()
        for _ in range(steps if " p" not in name else 0):
            x, cut = z.log_softmax(-1), name in TAILS
            loss = opd.truncated_reverse_kl(x, logq, S, name) if cut else opd.reverse_kl(x, logq)
            z.data -= torch.autograd.grad(loss, z)[0]
        axis.bar([v - 0.2 for v in at], p, 0.36, color=BLUE)
        axis.bar([v + 0.2 for v in at], q, 0.36, fc="w", ec=ORANGE, ls="--", lw=1.4)
        for v, end in enumerate(z.softmax(-1).tolist()):
            axis.axvspan(v - 0.5, v + 0.5, color="0.88" if v in S.ids else "w", lw=0, zorder=0)
            how = dict(arrowstyle="-|>", lw=2, color="k", shrinkA=0, shrinkB=0)
            if abs(end - p[v]) > 0.035:
                axis.annotate("", (v - 0.2, end), (v - 0.2, p[v]), arrowprops=how)
        axis.set(xticks=at, xticklabels="ABCDE"[: len(p)], ylim=(0, 1), title=name)
    return figure


SAYS = "Three tails empty the grey set, and none of them knows where the mass should go"
FIGURES = {"support.png": saved(lambda: tails(2, SAYS))}
