"""Every broken loss once: what real frameworks got wrong, small enough to read.

Nothing in opd.py imports this.  tests/test_pitfalls.py shows by exact numbers what each does,
beside the right function of opd.py; notebooks and exercises may take their bugs from here.
Arguments are as in opd.py: log-probs (..., V) or of tokens (B, T), student first.  Each docstring
names where the bug was seen; all statements about gradients are [derived].
"""

import torch
from torch import Tensor

import opd

# --- estimators -----------------------------------------------------------------------------------


def k1_as_loss(logp_a: Tensor, logq_a: Tensor) -> Tensor:
    """Differentiating log p(a) - log q(a) at samples: expected gradient 0.  verl's docs warn."""
    return logp_a - logq_a


def k3_as_loss(logp_a: Tensor, logq_a: Tensor) -> Tensor:
    """Differentiating k3: follows the forward KL.  OpenRLHF #1309, TRL #4967, verl's default."""
    log_u = logq_a - logp_a
    return log_u.exp() - 1 - log_u


def k2_as_reward(logp_a: Tensor, logq_a: Tensor) -> Tensor:
    """A = -k2: never positive, so it punishes what the teacher wants too.  See TRL #6503."""
    return -0.5 * (logq_a - logp_a).detach() ** 2


def k3_as_reward(logp_a: Tensor, logq_a: Tensor) -> Tensor:
    """A = -k3: reverse minus forward KL, which can lower the teacher's favourite.  TRL #6503."""
    return -k3_as_loss(logp_a, logq_a).detach()


def live_advantage(logp_a: Tensor, logq_a: Tensor) -> Tensor:
    """No detach: the optimum is sqrt(q), renormalised.  torchforge #527, asked in slime #1449."""
    return -(logq_a - logp_a) * logp_a


def state_only_advantage(logp: Tensor, logq: Tensor, logp_a: Tensor) -> Tensor:
    """Minus the state's KL as the advantage of its token: expected gradient 0.  miles #2362."""
    return opd.reverse_kl(logp, logq).detach() * logp_a


# --- divergences ----------------------------------------------------------------------------------


def swapped_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """torch's argument order: called reverse, is the forward KL.  Rethinking-OPD #17, OPSD #14."""
    divergence = torch.nn.functional.kl_div(logp, logq, log_target=True, reduction="none")
    return divergence.sum(-1)


def jsd_of_log_probs(logp: Tensor, logq: Tensor, beta: float = 0.5) -> Tensor:
    """Mixes log-probs: m is no law, the value has no bound.  TRL #2202."""
    logm = beta * logq + (1 - beta) * logp
    return beta * (logq.exp() * (logq - logm)).sum(-1) + (1 - beta) * (
        logp.exp() * (logp - logm)
    ).sum(-1)


def jsd_at_the_ends(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    """Accepts beta 0 and 1, where the loss is identically 0.  TRL #3043."""
    m = beta * logq.exp() + (1 - beta) * logp.exp()
    to_teacher = (logq.exp() * (logq - m.log())).sum(-1)
    return beta * to_teacher + (1 - beta) * (logp.exp() * (logp - m.log())).sum(-1)


def mean_over_vocabulary(logp: Tensor, logq: Tensor) -> Tensor:
    """Divides by V too: under SGD the learning rate depends on the vocabulary.  TRL #4105."""
    return (logp.exp() * (logp - logq)).mean(-1)


# --- supports and credit --------------------------------------------------------------------------


def plainly_truncated_reverse_kl(logp: Tensor, logq: Tensor, ids: Tensor) -> Tensor:
    """sum_S p (log p - log q), differentiated: also lowers the mass on S.  verl #5041."""
    lp, lq = logp.gather(-1, ids), logq.gather(-1, ids)
    return (lp.exp() * (lp - lq)).sum(-1)


def clamped_truncated_forward_kl(logp: Tensor, logq: Tensor, ids: Tensor) -> Tensor:
    """sum_S q (log q - log p), negative where P > Q, then cut off at 0.  verl #7855, #7856."""
    lp, lq = logp.gather(-1, ids), logq.gather(-1, ids)
    return (lq.exp() * (lq - lp)).sum(-1).clamp(min=0)


def exact_head_and_sampled_tail(logp: Tensor, logq: Tensor, ids: Tensor, action: Tensor) -> Tensor:
    """Exact sum on S, a sampled l log p(a) off S: one has l + 1, one l.  NeMo-RL #3608's review."""
    head = plainly_truncated_reverse_kl(logp, logq, ids)
    logp_a = opd.of_tokens(logp, action)
    off = (ids != action[..., None]).all(-1)
    return head + off * (logp_a - opd.of_tokens(logq, action)).detach() * logp_a


def mean_of_all_samples(reward: Tensor, samples: int) -> Tensor:
    """A baseline that has seen its own row: the gradient shrinks by (n - 1) / n.  Common in RL."""
    groups = reward.view(-1, samples)
    return (groups - groups.mean(1, keepdim=True)).flatten()


def cut_as_finished(reward: Tensor, value: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """GAE that knows no cut: behind a horizon the value is 0, as if the text had ended there."""
    return opd.gae(reward, value, mask, gamma, 0.95)[0]


# --- alignment and masks --------------------------------------------------------------------------


def late_scores(logp: Tensor) -> Tensor:
    """Scores of (B, T, V) one token late: each law is the one before.  atropos #464."""
    return logp.roll(1, dims=1)


def mask_by_padding(tokens: Tensor, pad_id: int) -> Tensor:
    """tokens != pad: with pad == eos the real EOS leaves the loss.  TRL #6357."""
    return tokens != pad_id


def mask_before_eos(tokens: Tensor, eos_id: int) -> Tensor:
    """Strictly before the first EOS: the student never learns to stop.  A public Colab notebook."""
    return (tokens == eos_id).cumsum(-1) == 0


def mean_with_padding(x: Tensor, mask: Tensor) -> Tensor:
    """Divides by B T instead of the number of tokens: padded batches count less.  TRL #2058."""
    return (x * mask).mean()


def mean_without_guard(x: Tensor, mask: Tensor) -> Tensor:
    """0/0 when nothing is unmasked.  TRL #5885."""
    return (x * mask).sum() / mask.sum()


def prompt_in_the_loss(x: Tensor, prompt_mask: Tensor, mask: Tensor) -> Tensor:
    """x (B, P + T) with the prompt's tokens kept: they were not sampled.  TRL #6006, review."""
    return opd.masked_mean(x, torch.cat([prompt_mask, mask], dim=1))


# --- normalisation --------------------------------------------------------------------------------


def mean_of_micro_batch_means(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """A mean for each micro-batch: tokens of short parts weigh more.  TRL #6006, ms-swift #10104"""
    return sum(opd.masked_mean(x, mask) for x, mask in parts) / len(parts)


def wrong_count(x: Tensor, mask: Tensor, data_mask: Tensor) -> Tensor:
    """The generated tokens' loss over the data set's token count.  TRL 1.16.0's GKDTrainer."""
    return opd.masked_mean(x, mask, total=data_mask.sum())


# --- sampling against scoring ---------------------------------------------------------------------


def student_temperature_only(z: Tensor, logq: Tensor, temperature: float) -> Tensor:
    """Student scored at a temperature, teacher at 1: the optimum is q^temperature.  verl #7769."""
    return opd.reverse_kl((z / temperature).log_softmax(-1), logq)


def renormalised_ratio(logp_a: Tensor, kept_logp_a: Tensor) -> Tensor:
    """p / p_nucleus: the kept mass for every token, instead of 1.  TRL #6789, vLLM RFC #42259."""
    return (logp_a - kept_logp_a).exp()
