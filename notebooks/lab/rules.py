"""The papers' rules: each sets a known variable of OPD in a new way, through the hooks of `train`.

    lab.train("aopd", steps=40)                    # a rule by name, with Config fields beside it
    python notebooks/lab train --method aopd --steps 40

A rule is a function -> (Config fields, hooks).  A hook takes the place of opd's `judge`, `credit`,
`weights` or `token_loss` and has its arguments; most call the function that they replace.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import opd

# The pure functions


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


# What several rules use


@dataclass
class Read:
    """A function of n as something that answers [n], like opd.LogProbs."""

    at: Callable

    def __getitem__(self, n: slice) -> Tensor:
        return self.at(n)


def reference_of(name: str | None) -> Callable:
    """A function (c, world, rollout) -> LogProbs of a frozen model; None: the student at the start.

    The model is loaded once, when it is first asked for.
    """
    models: list[Any] = []

    def read(c: opd.Config, world: opd.World, rollout: opd.Rollout) -> opd.LogProbs:
        if not models:
            device = str(world.student.device)
            models.append(opd.load_model(name or c.student, "reference", device=device))
        return world.log_probs(c, models[0], rollout)

    return read


def local_forward_kl(c: opd.Config, logp: Tensor, logq: Tensor) -> Tensor:
    """Forward KL on the teacher's top_k, the rest in a bucket: (n, V) -> (n,)."""
    support = opd.top_k_support(logp.detach(), logq, c.top_k, "teacher")
    return opd.truncated_forward_kl(logp, logq, support, "bucket")


# The rules


def opd_plus(divergence: str = "jsd", beta: float = 0.5) -> tuple[dict, dict]:
    """OPD+ 2606.01039: another divergence with its own advantage  [reconstruction: jsd]."""

    def judge(c, world, rollout, teacher, right):
        reward = opd.judge(c, world, rollout, teacher, right)
        logq_a = rollout.logprobs + reward
        return divergence_advantage(rollout.logprobs, logq_a, divergence, beta)

    return dict(method="opd"), dict(judge=judge)


def exopd(scale: float = 1.25, reference: str | None = None) -> tuple[dict, dict]:
    """ExOPD 2602.12125: past the teacher, away from the student's own start.  [code, secondary]"""
    read = reference_of(reference)

    def judge(c, world, rollout, teacher, right):
        start = read(c, world, rollout)
        target = Read(lambda n: tilted_teacher(teacher[n], start[n], scale))
        return opd.judge(c, world, rollout, target, right)

    return dict(method="opd"), dict(judge=judge)


def aopd() -> tuple[dict, dict]:
    """AOPD 2605.06387: where A <= 0 a local KL, of our direction and support  [reconstruction]."""

    def loss(c, logp, logq, action, advantage, behaviour, n):
        plain = opd.token_loss(c, logp, logq, action, advantage, behaviour, n)
        return torch.where(advantage > 0, plain, local_forward_kl(c, logp, logq))

    return dict(method="opd", top_k=16), dict(loss=loss)


def eopd(threshold: float = 0.8) -> tuple[dict, dict]:
    """EOPD 2603.07079: plus a forward KL where the teacher is undecided  [secondary]."""

    def loss(c, logp, logq, *rest):
        plain = opd.token_loss(c, logp, logq, *rest)
        return plain + entropy_gate(logq, threshold) * local_forward_kl(c, logp, logq)

    return dict(method="opd", top_k=16), dict(loss=loss)


def iw_opd(gain: float = 0.5) -> tuple[dict, dict]:
    """IW-OPD 2606.22600: early tokens weigh more.  [code TRL]"""

    def weights(c, world, rollout, teacher, reward, right):
        plain = opd.weights(c, world, rollout, teacher, reward, right)
        return plain * position_weights(reward, rollout.mask, gain)

    return dict(method="opd"), dict(weights=weights)


def prune_opd(tau: float = 0.7, decay: float = 0.05, base: float = 0.5) -> tuple[dict, dict]:
    """Prune-OPD 2605.07804: top-k, weights that fall with low overlap.

    The paper's decay is .01, made for thousands of tokens; ours is for tens.
    [code, a copy; reconstruction: the decay]
    """

    def weights(c, world, rollout, teacher, reward, right):
        student, mask = world.log_probs(c, world.student, rollout), rollout.mask
        with torch.no_grad():
            some = opd.chunks(int(mask.sum()), world.vocab["vocab_size"])
            parts = [opd.overlap(student[n], teacher[n], c.top_k).ratio for n in some]
        shared = torch.zeros_like(rollout.logprobs).masked_scatter(mask, torch.cat(parts))
        plain = opd.weights(c, world, rollout, teacher, reward, right)
        return plain * (base + prune_weights(shared, mask, tau, decay))

    fields = dict(support="student", top_k=16, tail="stop_gradient")
    return fields, dict(weights=weights)


def reference_kl(weight: float = 0.1, reference: str | None = None) -> tuple[dict, dict]:
    """Plus weight KL(p || reference), exact at each state; the start unless named.  [derived]"""
    read, kept = reference_of(reference), {}

    def judge(c, world, rollout, teacher, right):
        kept["reference"] = read(c, world, rollout)
        return opd.judge(c, world, rollout, teacher, right)

    def loss(c, logp, logq, action, advantage, behaviour, n):
        plain = opd.token_loss(c, logp, logq, action, advantage, behaviour, n)
        return plain + weight * opd.reverse_kl(logp, kept["reference"][n])

    return dict(method="opd"), dict(judge=judge, loss=loss)


def entropy_bonus(weight: float = 0.01) -> tuple[dict, dict]:
    """Minus weight H(p) at each state.  [derived]"""

    def loss(c, logp, *rest):
        return opd.token_loss(c, logp, *rest) - weight * opd.entropy(logp)

    return dict(method="opd_full"), dict(loss=loss)


def importance_cap(cap: float = 5.0) -> tuple[dict, dict]:
    """Times min(p / p_sampler, cap): another engine's text, direct route  [paper 2605.11739]."""

    def loss(c, logp, logq, action, advantage, behaviour, n):
        plain = opd.token_loss(c, logp, logq, action, advantage, behaviour, n)
        return plain * opd.truncated_importance_weights(opd.of_tokens(logp, action), behaviour, cap)

    return dict(method="opd_full"), dict(loss=loss)


RULES: dict[str, Callable] = dict(opd_plus=opd_plus, exopd=exopd, aopd=aopd, eopd=eopd)
RULES |= dict(iw_opd=iw_opd, prune_opd=prune_opd, reference_kl=reference_kl)
RULES |= dict(entropy_bonus=entropy_bonus, importance_cap=importance_cap)


def train(rule: str, resume: str | Path | None = None, **fields: Any) -> opd.Run:
    """Train by a rule of RULES, or by a method of opd.METHODS; fields: Config's, and win.

    The run's folder is named after the rule.  resume: the folder of a run begun with this rule.
    InputError: no such rule.
    """
    known = f"method = {rule!r}: must be one of {', '.join([*RULES, *opd.METHODS])}"
    opd.require(rule in RULES or {*rule.split("+")} <= {*opd.METHODS}, known)
    own, hooks = RULES[rule]() if rule in RULES else (dict(method=rule), {})
    if resume:
        return opd.train(opd.Config.load(Path(resume) / "config.json"), resume, **hooks)
    config = opd.Config.load(**{**own, **fields})
    if config.name is None:
        named = opd.new_folder(config.model_copy(update=dict(method=rule)))
        config = config.model_copy(update=dict(name=named.name))
    return opd.train(config, **hooks)
