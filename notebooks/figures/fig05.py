"""The figure of notebook 05."""

from functools import cache
from pathlib import Path

import torch
from lab.diagrams import animate, cell
from lab.plots import ORANGE, words
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

import opd


@cache
def response(row: int = 2, most: int = 30) -> tuple[list[str], torch.Tensor]:
    """The first tokens of a response of the novice, and their log-ratio rewards (most,)."""
    world = opd.load_world(opd.Config.load(student="student_novice"))
    prompts, T = world.task.prompts(4, "validation"), world.task.max_tokens
    noise = torch.rand(4, T, generator=opd.keyed_generator("credit"))
    rollout = opd.sample(world.student, prompts, horizon=T, noise=noise)
    reward = opd.score_tokens(world.teacher, rollout) - rollout.logprobs
    return words(world.tokenizer, rollout, row)[:most], reward[row, :most].detach()


def blame(gamma: float) -> Figure:
    """Arrows from each bad reward back to the tokens that answer for it, fading with gamma."""
    tokens, r = response()
    every = torch.ones(1, len(r)).bool()
    credit = opd.discounted_return(r[None], every, gamma)[0].tolist()
    figure = Figure(figsize=(8.6, 2.6))
    axis = figure.add_axes((0.09, 0, 0.9, 0.9))
    for x, (token, reward) in enumerate(zip(tokens, r.tolist(), strict=True)):
        axis.text(x + 0.5, 0.5, token, ha="center", va="center", family="monospace")
        cell(axis, x, 1, reward, 24, False, False), cell(axis, x, 2, credit[x], 24, False, False)
        for end in range(x if reward < -5 else 0):
            how = dict(connectionstyle="arc3,rad=0.27", color=ORANGE, lw=1.4)
            axis.add_patch(FancyArrowPatch((x + 0.5, 0.1), (end + 0.5, 0.1), arrowstyle="-|>",
                           mutation_scale=9, alpha=gamma ** (x - end), **how))  # fmt: skip
    for y, name in ((1.5, "reward"), (2.5, "credit")):
        axis.text(-0.2, y, name, ha="right", va="center", fontsize=9)
    says = {0: "each token answers for itself", 1: "each token answers for all that follows"}
    title = f"gamma = {gamma:g}:  {says.get(gamma, 'blame fades with the distance')}"
    axis.set(xlim=(0, len(tokens)), ylim=(3.1, -3), title=title)
    axis.set_axis_off()
    return figure


def blames(file: Path) -> Path:
    """The same from immediate credit to return-to-go."""
    return animate(blame, [0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0], file, 1.2)


FIGURES = {"credit.gif": blames}
