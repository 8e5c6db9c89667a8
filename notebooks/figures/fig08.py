"""The picture of notebook 08."""

from pathlib import Path

import torch
from lab.diagrams import animate, board
from lab.plots import words
from matplotlib.figure import Figure

import opd


def drift(file: Path) -> Path:
    """A student that is taught its first two tokens only, and what becomes of the others."""
    c = opd.Config.load(horizon=2, warmup=1, decay=0.0, max_tokens=53)
    world, seen = opd.load_world(c), {}
    optimizer, prompts = opd.make_optimizer(c, world), world.task.prompts(6, "validation")
    noise = torch.rand(6, 53, generator=opd.keyed_generator("learning"))
    for step in range(51):
        if step < 10 and step % 2 == 0 or step % 5 == 0:
            text = opd.sample(world.student, prompts, horizon=53, noise=noise, **world.vocab)
            ratio = (opd.score_tokens(world.teacher, text) - text.logprobs).tolist()
            right = world.task.verify(prompts, text).tolist()
            said = [words(world.tokenizer, text, row) for row in range(6)]
            seen[step] = [*zip(prompts.text, right, said, ratio, strict=True)]
        opd.train_step(c, world, optimizer, step)

    def draw(step: int) -> Figure:
        about = f"step {step:2}   {sum(right for _, right, _, _ in seen[step])} of 6 answers right"
        figure = board(seen[step], about + "   (taught: left of the line)", 53)
        figure.axes[0].axvline(2, color="k", ls="--", lw=1)
        return figure

    return animate(draw, [*seen], file)


FIGURES = {"drift.gif": drift}
