"""Shapes: of an update, by its singular values; of gradients; of the feedback over a text."""

import math
import tempfile
from collections.abc import Callable
from statistics import mean
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

import opd

from . import rules


def matrices(model: Module) -> dict[str, Tensor]:
    """The attention and MLP weights that EffOPD moves and that have singular values, by name."""
    named = model.named_parameters()
    return {name: p for name, p in named if p.dim() == 2 and opd.attention_and_mlp(name)}


def weights_of(model: Module) -> dict[str, Tensor]:
    """A copy of the weights that learn, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def spectrum(delta: Tensor) -> dict[str, float]:
    """Shape of one update matrix from its singular values s, largest first.

    norm |delta|_F; spectral_norm s_1; spectral_ratio s_1 / |delta|_F; effective_rank
    exp(-sum w log w), w = s / sum s; top1_ratio sqrt(sum s_i^2 over the first 1% / sum s^2).
    [paper 2605.11739, appendix]
    """
    s = torch.linalg.svdvals(delta.double())
    norm, w, top = s.norm(), s / s.sum(), s[: math.ceil(len(s) / 100)]
    rank = torch.exp(-torch.special.xlogy(w, w).sum())
    values = dict(norm=norm, spectral_norm=s[0], spectral_ratio=s[0] / norm)
    values |= dict(effective_rank=rank, top1_ratio=top.norm() / norm)
    return {name: float(value) for name, value in values.items()}


def update_geometry(base: dict[str, Tensor], model: Module) -> dict[str, Any]:
    """The mean of `spectrum` over the moved attention and MLP matrices, and their "norms" by name.

    nan where nothing has moved.
    """
    moving = {name: p.detach() - base[name] for name, p in matrices(model).items()}
    shapes = {name: spectrum(delta) for name, delta in moving.items() if delta.any()}
    keys = ("norm", "spectral_norm", "spectral_ratio", "effective_rank", "top1_ratio")
    n = len(shapes) or math.nan
    means = {key: sum(shape[key] for shape in shapes.values()) / n for key in keys}
    return means | dict(norms={name: shape["norm"] for name, shape in shapes.items()})


def subspace_alignment(delta: Tensor, final: Tensor, k: int) -> float:
    """mean over i <= k of |<u_i, u_i'>|, left singular vectors of two updates; between 0 and 1.

    [paper 2605.11739: the cosine of the k-th subspaces; reconstruction: left vectors, the sign]
    """
    u, v = (torch.linalg.svd(x.double(), full_matrices=False).U[:, :k] for x in (delta, final))
    return float((u * v).sum(0).abs().mean())


def norm_scaled(early: Tensor, final: Tensor, beta: float) -> Tensor:
    """The early update, its norm moved toward the final one's: (1 - beta)|early| + beta |final|.

    [paper 2605.11739]
    """
    return early * (1 + beta * (final.norm() - early.norm()) / early.norm())


def kl_by_position(kl: Tensor, mask: Tensor) -> Tensor:
    """(B, T) -> (T,): the mean over the rows that have a token there; nan where there is none.

    [derived]
    """
    total, rows = torch.where(mask, kl, 0.0).sum(0), mask.sum(0)
    return torch.where(rows > 0, total / rows.clamp(min=1), torch.nan)


def top_share(kl: Tensor, mask: Tensor, share: float = 0.05) -> float:
    """How much of sum |KL| the top `share` of the tokens hold: (B, T) -> between `share` and 1.

    Near 1: a few tokens teach everything.  nan where nothing is left to teach.  [reconstruction]
    """
    sizes = kl[mask].abs().sort(descending=True).values
    return float(sizes[: math.ceil(share * len(sizes))].sum() / sizes.sum())


def auroc(value: Tensor, right: Tensor) -> float:
    """P(value of a right row > value of a wrong row), ties half: (B,), (B,) bool; nan: one kind.

    With the sequence's mean reward as value: does the feedback know which responses are right?
    Rethinking OPD saw .73 where OPD worked and .75 where it failed.  [secondary: 2604.13016]
    """
    gap = value[right][:, None] - value[~right]  # (right, wrong)
    return float(((gap > 0).double() + (gap == 0).double() / 2).mean())


def gradient_moments(
    config: opd.Config, world: opd.World, batches: int, first: int = 0, **hooks: Callable
) -> tuple[float, float]:
    """(|mean g|^2, mean |g|^2) of the gradients g of some batches; no weight is touched.

    first: the first batch's number as a step; hooks: as in `opd.train`.  The ratio of the two is
    the batches' coherence: 1 when all ask for the same change, 1 / batches when they have nothing
    in common.  [reconstruction; derived: its limits]
    """
    sizes, weights = [], [*world.student.parameters()]
    total = [torch.zeros_like(p) for p in weights]
    moving = weights + [*world.critic.parameters()] if world.critic else weights
    config = config.model_copy(update=dict(grad_clip=1e9))

    def look() -> None:
        sizes.append(sum(float(p.grad.square().sum()) for p in weights))
        for whole, p in zip(total, weights, strict=True):
            whole += p.grad

    def forget() -> None:
        for p in moving:
            p.grad = None

    watcher = SimpleNamespace(param_groups=[dict(params=moving)], step=look, zero_grad=forget)
    for step in range(first, first + batches):
        opd.train_step(config, world, watcher, step, **hooks)
    return sum(float((g / batches).square().sum()) for g in total), sum(sizes) / batches


def gradient_noise(config: opd.Config, batches: int = 16, **hooks: Callable) -> tuple[float, float]:
    """Norm of the mean gradient, and root mean square distance of one batch's gradient to it."""
    world = opd.load_world(config)
    config = config.model_copy(update=dict(max_tokens=world.task.max_tokens))
    mean_of, each = gradient_moments(config, world, batches, **hooks)
    return math.sqrt(mean_of), math.sqrt((each - mean_of) * batches / (batches - 1))


def coherence(config: opd.Config, world: opd.World, prompts: int = 8, **hooks: Callable) -> float:
    """The coherence of single prompts' gradients, as after the run's last step; nan: all are 0.

    [reconstruction]
    """
    one = dict(batch_size=config.samples_per_prompt, micro_batch=None, updates_per_rollout=1)
    config = config.model_copy(update=one)
    mean_of, each = gradient_moments(config, world, prompts, first=opd.MANY, **hooks)
    return mean_of / each if each else math.nan


@torch.no_grad()
def entropy_of(config: opd.Config, model: Module) -> float:
    """The mean entropy per token of a model's own text after 256 validation prompts, in nats."""
    world = opd.load_world(config)
    prompts = world.task.prompts(256, "validation")
    noise = torch.rand(256, world.task.max_tokens, generator=opd.keyed_generator("entropy"))
    text = opd.sample(model, prompts, horizon=noise.shape[1], noise=noise, **world.vocab)
    return opd.masked_mean(opd.entropy(opd.score(model, text)), text.mask).item()


def foresight(fields: dict[str, Any], run: opd.Run) -> dict[str, float]:
    """What the run's first tenth already shows of its end.

    rank and norm of the final update (means over attention and MLP matrices), the tenth's norm,
    alignment of the two (first 5 directions), and the share of the gain in accuracy that the tenth
    has: `unscaled` as it is, `recovered` when scaled to the final norm matrix by matrix.
    """
    tenth = dict(fields, steps=max(1, fields["steps"] // 10), eval_every=0, eval_prompts=1)
    method = tenth.pop("method", "opd_full")
    with tempfile.TemporaryDirectory() as folder:
        early = rules.train(method, **tenth, runs=folder).model
    world = opd.load_world(run.config)
    base, alignments = weights_of(world.student), []
    shapes = [update_geometry(base, model) for model in (run.model, early)]
    ends = dict(run.model.named_parameters()), dict(early.named_parameters())
    moving = matrices(world.student)
    with torch.no_grad():
        for name, p in world.student.named_parameters():
            final, first = (end[name] - base[name] for end in ends)
            if name in moving:
                alignments.append(subspace_alignment(first, final, 5))
                first = norm_scaled(first, final, 1.0)
            p += first
    ends = early, world.student
    shares = [opd.final_evaluation(run.config, world, model)["accuracy"] for model in ends]
    before, after = (run.result[f"student_{when}"]["accuracy"] for when in ("before", "after"))
    return dict(
        rank=shapes[0]["effective_rank"], norm=shapes[0]["norm"], early_norm=shapes[1]["norm"],
        alignment=mean(alignments), unscaled=(shares[0] - before) / (after - before),
        recovered=(shares[1] - before) / (after - before),
    )  # fmt: skip
