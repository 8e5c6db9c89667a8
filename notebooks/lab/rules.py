"""The papers' rules: each sets a known variable of OPD in a new way, through the hooks of `train`.

    lab.train("aopd", steps=40)                    # a rule by name, with Config fields beside it
    python notebooks/lab train --method aopd --steps 40

A rule is a function -> (Config fields, hooks).  A hook takes the place of opd's `judge`, `credit`,
`weights` or `token_loss` and has its arguments; most call the function that they replace.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import opd

from .formulas import (
    Read,
    divergence_advantage,
    entropy_gate,
    local_forward_kl,
    position_weights,
    prune_weights,
    tilted_teacher,
)

# What several rules use


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


def reshaped(change: Callable) -> Callable:
    """A judge whose reward is change(r, log p(a)), r the log-ratio."""

    def judge(c, world, rollout, teacher, right):
        return change(opd.judge(c, world, rollout, teacher, right), rollout.logprobs)

    return judge


def soft_log() -> tuple[dict, dict]:
    """Soft-log 2607.13399: sign(r) log(1 + |r|); small r as they are  [secondary]."""
    return dict(method="opd"), dict(judge=reshaped(lambda r, logp: r.sign() * r.abs().log1p()))


def power_opd(alpha: float = 0.5) -> tuple[dict, dict]:
    """PowerOPD 2606.17199: q^alpha - p^alpha; alpha r as alpha -> 0  [secondary]."""
    change = lambda r, logp: (alpha * (logp + r)).exp() - (alpha * logp).exp()  # noqa: E731
    return dict(method="opd"), dict(judge=reshaped(change))


def clipped(most: float = 1.0) -> tuple[dict, dict]:
    """REOPOLD 2603.11137: r within -most .. most nats; opd where none is beyond  [secondary]."""
    return dict(method="opd"), dict(judge=reshaped(lambda r, logp: r.clamp(-most, most)))


def veto(beta: float = 0.5) -> tuple[dict, dict]:
    """Veto 2601.07155: the target is ~ q p^beta; beta 0: opd  [secondary]."""

    def judge(c, world, rollout, teacher, right):
        student = world.log_probs(c, world.student, rollout)
        target = Read(lambda n: (teacher[n] + beta * student[n].detach()).log_softmax(-1))
        return opd.judge(c, world, rollout, target, right)

    return dict(method="opd"), dict(judge=judge)


def kdrl(beta: float = 0.1) -> tuple[dict, dict]:
    """KDRL 2506.02208: right or wrong, minus beta k2; beta 0: reinforce  [secondary]."""

    def judge(c, world, rollout, teacher, right):  # k2 = r^2 / 2: its gradient is -r grad log p(a)
        sparse = opd.leave_one_out(right.float(), c.samples_per_prompt)[:, None]
        return sparse + beta * opd.judge(c, world, rollout, teacher, right)

    return dict(method="opd", samples_per_prompt=4), dict(judge=judge)


def rg_opd() -> tuple[dict, dict]:
    """RG-OPD 2607.04037: praise in right responses, blame in wrong ones only  [reconstruction]."""

    def weights(c, world, rollout, teacher, reward, right):
        plain = opd.weights(c, world, rollout, teacher, reward, right)
        return plain * ((reward > 0) == right[:, None])

    return dict(method="opd"), dict(weights=weights)


def opsa(share: float = 0.2) -> tuple[dict, dict]:
    """OPSA 2608.31046: no teacher, the least likely share of tokens down  [secondary]."""

    def judge(c, world, rollout, teacher, right):
        logp = rollout.logprobs
        return -(logp <= logp[rollout.mask].quantile(share)).to(logp)

    return dict(method="opd"), dict(judge=judge)


RULES: dict[str, Callable] = dict(opd_plus=opd_plus, exopd=exopd, aopd=aopd, eopd=eopd)
RULES |= dict(iw_opd=iw_opd, prune_opd=prune_opd, reference_kl=reference_kl)
RULES |= dict(entropy_bonus=entropy_bonus, importance_cap=importance_cap)
RULES |= dict(soft_log=soft_log, power_opd=power_opd, clipped=clipped, veto=veto, kdrl=kdrl)
RULES |= dict(rg_opd=rg_opd, opsa=opsa)


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
