"""The exact laboratory: a tree of all texts, so that nothing is sampled."""

from typing import Any

import torch
from torch import Tensor

import opd


class Tree:
    """A tabular student and teacher on every text of `length` tokens from `size` symbols.

    Each prefix is a state s with its own logits, student[s] and teacher[s], (S, V) in float64.
    tokens (N, T) holds all N = V^T texts, states (N, T) the state at which each token is drawn.
    Expectations and variances are sums over the N texts: exact.  [derived]
    """

    def __init__(self, size: int = 4, length: int = 4, seed: int = 0, gap: float = 1.0) -> None:
        """Logits are standard normal; the teacher's are the student's plus `gap` times others."""
        self.size, self.length = size, length
        g, starts = torch.Generator().manual_seed(seed), [size**t for t in range(length)]
        self.student = torch.randn(sum(starts), size, generator=g, dtype=torch.float64)
        noise = torch.randn(self.student.shape, generator=g, dtype=torch.float64)
        self.teacher = self.student + gap * noise
        self.tokens = torch.cartesian_prod(*[torch.arange(size)] * length)
        prefix, first, columns = torch.zeros(len(self.tokens), dtype=torch.long), 0, []
        for t in range(length):  # states are numbered depth by depth, as numbers in base V
            columns.append(first + prefix)
            first, prefix = first + starts[t], prefix * size + self.tokens[:, t]
        self.states = torch.stack(columns, 1)
        self.mask = torch.ones_like(self.tokens, dtype=torch.bool)

    def laws(self) -> tuple[Tensor, Tensor]:
        """logp, logq (N, T, V) along every text."""
        return self.student.log_softmax(-1)[self.states], self.teacher.log_softmax(-1)[self.states]

    def weights(self) -> Tensor:
        """(N,) the student's probability of every text."""
        return opd.of_tokens(self.laws()[0], self.tokens).sum(1).exp()

    def reward(self) -> Tensor:
        """(N, T) log q(a) - log p(a)."""
        logp, logq = (opd.of_tokens(law, self.tokens) for law in self.laws())
        return opd.log_ratio_reward(logp, logq)

    def sequence_kl(self, student: Tensor | None = None) -> Tensor:
        """Exact KL between the two laws of whole texts; differentiable in the student's logits."""
        logits = self.student if student is None else student
        logp = opd.of_tokens(logits.log_softmax(-1)[self.states], self.tokens).sum(1)
        logq = opd.of_tokens(self.laws()[1], self.tokens).sum(1)
        return (logp.exp() * (logp - logq)).sum()

    def gradient(self) -> Tensor:
        """(S, V): the exact gradient of the sequence KL, by autograd."""
        z = self.student.clone().requires_grad_()
        return torch.autograd.grad(self.sequence_kl(z), z)[0]

    def value(self, gamma: float) -> Tensor:
        """(N, T): what a perfect critic says, -E[sum_k gamma^k K_{t+k} | s_t]."""
        logp, logq = self.student.log_softmax(-1), self.teacher.log_softmax(-1)
        value = -opd.reverse_kl(logp, logq)
        inner = (len(value) - 1) // self.size  # the states that have children: s V + 1 .. s V + V
        for s in reversed(range(inner)):
            children = value[s * self.size + 1 : (s + 1) * self.size + 1]
            value[s] += gamma * (logp[s].exp() * children).sum()
        return value[self.states]

    def study(self, loss: Any) -> dict[str, Any]:
        """An estimator's exact mean (S, V), variance, and bias to the sequence KL's gradient.

        loss: (logp, logq, tokens), of shapes (N, T, V), (N, T, V), (N, T) -> (N, T), a one-sample
        loss whose gradient estimates; frozen_bias: the distance to the frozen-state gradient.
        """
        logp, logq = self.laws()
        z = logp.clone().requires_grad_()  # logits, already normalised
        loss(z.log_softmax(-1), logq, self.tokens).sum().backward()
        each = torch.zeros(len(z), *self.student.shape, dtype=z.dtype)  # (N, S, V)
        each.scatter_add_(1, self.states[..., None].expand_as(z), z.grad)
        p = self.weights()[:, None, None]
        mean_of = (p * each).sum(0)
        frozen = torch.zeros_like(self.student)
        local = torch.autograd.grad(opd.reverse_kl(z.log_softmax(-1), logq).sum(), z)[0]
        frozen.index_put_((self.states,), p * local, accumulate=True)
        return dict(
            mean=mean_of, variance=(p * (each - mean_of) ** 2).sum().item(),
            bias=(mean_of - self.gradient()).norm().item(),
            frozen_bias=(mean_of - frozen).norm().item(),
        )  # fmt: skip


def through_eos(tokens: Tensor, eos_ids: list[int]) -> Tensor:
    """mask (B, T), true through the first EOS: by position, so padding may be the EOS id too."""
    is_eos = torch.isin(tokens, torch.tensor(eos_ids, device=tokens.device))
    return (is_eos.cumsum(-1) - is_eos.long()) == 0


def positions_of(mask: Tensor) -> Tensor:
    """Position ids (B, L) that start at 0 on the first real token of a left-padded row."""
    return (mask.cumsum(-1) - 1).clamp(min=0)
