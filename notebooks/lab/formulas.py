"""The formulas of the papers' rules, which rules.py puts to use."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import opd


def divergence_advantage(
    logp_a: Tensor, logq_a: Tensor, divergence: str = "reverse_kl", beta: float = 0.5
) -> Tensor:
    """The advantage with which a policy gradient descends sum_v q f(p/q): A = -f'(p/q), detached.

        reverse_kl   log q - log p              forward_kl   q / p
        jsd          -(1 - beta) log(p/m), m = beta q + (1 - beta) p

    (B, T) -> (B, T), each up to a constant, which does not matter.  The common recipe f(u)/u in
    place of f'(u) is right for the reverse KL only.  [secondary: OPD+ 2606.01039, the claim;
    derived: the advantages]
    """
    if divergence == "jsd":
        share = torch.stack([logp_a + math.log(1 - beta), logq_a + math.log(beta)])
        return (-(1 - beta) * (logp_a - share.logsumexp(0))).detach()
    reward = opd.log_ratio_reward(logp_a, logq_a)
    return {"reverse_kl": reward, "forward_kl": reward.exp()}[divergence]


def tilted_teacher(logq: Tensor, logref: Tensor, scale: float) -> Tensor:
    """ExOPD's target: ~ q^scale ref^(1 - scale), normalised; (..., V) -> (..., V).

    Its log-ratio reward is the paper's scale (log q - log ref) - (log p - log ref) minus log Z(s),
    a constant of the state and so a baseline.  scale 1: the teacher, whatever the reference; above
    1 (the paper's 1.25) past the teacher, away from the reference.
    [code and secondary: G-OPD 2602.12125; derived: log Z]
    """
    return torch.log_softmax(scale * logq + (1 - scale) * logref, -1)


def position_weights(reward: Tensor, mask: Tensor, gamma: float = 0.5) -> Tensor:
    """IW-OPD: early tokens weigh more, (B, T), from 1 + gamma down to 1; detached.

    w_t = 1 + gamma (1 - sum_{s<t} |r_s| / sum_s |r_s|): a token loses weight as its row drifts from
    the teacher.  1 + gamma where all rewards are 0.  gamma >= 0, the paper's .5.
    [code: TRL's IW-OPD, 2606.22600]
    """
    size = torch.where(mask, reward.detach().abs(), 0.0)
    drift, whole = size.cumsum(-1) - size, size.sum(-1, keepdim=True)
    return 1 + gamma * (1 - drift / whole.clamp(min=torch.finfo(size.dtype).tiny))


def prune_weights(overlap: Tensor, mask: Tensor, tau: float, decay: float) -> Tensor:
    """Prune-OPD: each token of low overlap takes `decay` off its own and all later weights, (B, T).

    w_t = clip(1 - decay #{s <= t: overlap_s < tau}, 0, 1), non-increasing.  The paper's tau .7,
    decay .01 at top 16; its loss weight adds a base of .5.  [code: a copy of 2605.07804's]
    """
    low = mask & (overlap < tau)
    return (1 - decay * low.cumsum(-1).to(overlap)).clamp(0, 1)


def entropy_gate(logq: Tensor, threshold: float) -> Tensor:
    """True where the teacher is undecided: H(q) > threshold nats; (..., V) -> (...) bool.

    EOPD adds a forward KL there; its threshold is .8.  [secondary: EOPD 2603.07079]
    """
    return opd.entropy(logq) > threshold


def local_forward_kl(c: opd.Config, logp: Tensor, logq: Tensor) -> Tensor:
    """Forward KL on the teacher's top_k, the rest in a bucket: (n, V) -> (n,)."""
    support = opd.top_k_support(logp.detach(), logq, c.top_k, "teacher")
    return opd.truncated_forward_kl(logp, logq, support, "bucket")


@dataclass
class Read:
    """A function of n as something that answers [n], like opd.LogProbs."""

    at: Callable

    def __getitem__(self, n: slice) -> Tensor:
        return self.at(n)
