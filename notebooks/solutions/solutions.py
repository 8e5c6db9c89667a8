"""Solutions of the notebooks' exercises: ex_3_2 solves exercise 3.2.  Look only after trying.

They use torch alone, so that they can be read without opd.py.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import one_hot

# --- 00 tour --------------------------------------------------------------------------------------


def ex_0_1(logp_a: Tensor, logq_a: Tensor, mask: Tensor) -> Tensor:
    """A product of probabilities is a sum of logs, and so is their ratio; not a mean."""
    return torch.where(mask, logq_a - logp_a, 0.0).sum(1)


def ex_0_2(logp_a: Tensor, logq_a: Tensor, mask: Tensor) -> Tensor:
    """Padding is made the best of all, so that it is never the worst."""
    return torch.where(mask, logq_a - logp_a, math.inf).argmin(1)


def ex_0_3(logits: Tensor, tokens: Tensor) -> Tensor:
    """The logits at t - 1 predict token t: start one earlier, and drop the last position."""
    T = tokens.shape[1]
    logp = logits[:, -T - 1 : -1].log_softmax(-1)
    return logp.gather(-1, tokens[..., None]).squeeze(-1)


# --- 01 states ------------------------------------------------------------------------------------


def ex_1_1(mask: Tensor) -> Tensor:
    """Count the real tokens so far, from 0.  Padding would get -1: any valid position will do."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def ex_1_2(z: Tensor, w: Tensor, temperature: float) -> Tensor:
    """Both models at the temperature: then p = q is the optimum again, and not q^temperature."""
    logp, logq = (z / temperature).log_softmax(-1), (w / temperature).log_softmax(-1)
    return (logp.exp() * (logp - logq)).sum(-1)


def ex_1_3(tokens: Tensor, eos_id: int) -> Tensor:
    """By position: no EOS strictly before this token.  What the padding is no longer matters."""
    is_eos = (tokens == eos_id).long()
    return is_eos.cumsum(-1) - is_eos == 0


# --- 02 divergences -------------------------------------------------------------------------------


def ex_2_1(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    """(1 - beta) p (log p/m - KL(p||m)): what m's own move adds is the same for every token."""
    p, q = logp.exp(), logq.exp()
    ratio = (p / (beta * q + (1 - beta) * p)).log()
    return (1 - beta) * p * (ratio - (p * ratio).sum(-1, keepdim=True))


def ex_2_2(logp: Tensor, logq: Tensor) -> Tensor:
    """kl_div(input, target) is KL(target || input): the student is the target.  Sum, not mean."""
    divergence = torch.nn.functional.kl_div(logq, logp, log_target=True, reduction="none")
    return divergence.sum(-1)


def ex_2_3(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    """m mixes probabilities: log m = log(beta q + (1 - beta) p), here by logaddexp."""
    logm = torch.logaddexp(logq + math.log(beta), logp + math.log(1 - beta))
    to_teacher = (logq.exp() * (logq - logm)).sum(-1)
    to_student = (logp.exp() * (logp - logm)).sum(-1)
    return beta * to_teacher + (1 - beta) * to_student


# --- 03 two routes --------------------------------------------------------------------------------


def ex_3_1(logp_a: Tensor, logq_a: Tensor) -> Tensor:
    """The mean push is p (A - E A), wanted is q - p: A = q / p, whose mean is 1."""
    return (logq_a - logp_a).exp()


def ex_3_2(logp: Tensor, logq: Tensor, tokens: Tensor) -> Tensor:
    """The reward of the token drawn, minus the mean reward, -K: A = r + K, both numbers."""
    logp_a, logq_a = (x.gather(-1, tokens[..., None]).squeeze(-1) for x in (logp, logq))
    kl = (logp.exp() * (logp - logq)).sum(-1)
    return -(logq_a - logp_a + kl).detach() * logp_a


def ex_3_3(logp_a: Tensor, logq_a: Tensor) -> Tensor:
    """k2: its gradient is l grad log p, in the mean the reverse KL's.  Or else -sg(r) log p(a)."""
    return 0.5 * (logq_a - logp_a) ** 2


# --- 04 support -----------------------------------------------------------------------------------


def ex_4_1(logp: Tensor, logq: Tensor, ids: Tensor) -> Tensor:
    """The sum over S, and the two tails 1 - P and 1 - Q as if they were one token."""
    lp, lq = logp.gather(-1, ids), logq.gather(-1, ids)
    p_tail, q_tail = (1 - x.exp().sum(-1) for x in (lp, lq))
    return (lp.exp() * (lp - lq)).sum(-1) + p_tail * (p_tail / q_tail).log()


def ex_4_2(logp: Tensor, logq: Tensor, ids: Tensor) -> Tensor:
    """The generalised form with the two sides exchanged: q log(q/p) - q + p, term by term >= 0."""
    lp, lq = logp.gather(-1, ids), logq.gather(-1, ids)
    return (lq.exp() * (lq - lp) - lq.exp() + lp.exp()).sum(-1)


def ex_4_3(logp: Tensor, logq: Tensor, ids: Tensor, action: Tensor) -> Tensor:
    """The exact half had l + 1, the sampled half l: with sg(p l) log p both have l."""
    lp, lq = logp.gather(-1, ids), logq.gather(-1, ids)
    head = ((lp.exp() * (lp - lq)).detach() * lp).sum(-1)
    logp_a, logq_a = (x.gather(-1, action[..., None]).squeeze(-1) for x in (logp, logq))
    outside = (ids != action[..., None]).all(-1)
    return head + outside * (logp_a - logq_a).detach() * logp_a


# --- 05 temporal credit ---------------------------------------------------------------------------


def ex_5_1(reward: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """From the last token back: R_t = r_t + gamma R_{t+1}.  `where`, since 0 * nan is nan."""
    reward = torch.where(mask, reward, 0.0)
    returns, carry = torch.zeros_like(reward), torch.zeros_like(reward[:, 0])
    for t in reversed(range(reward.shape[1])):
        carry = reward[:, t] + gamma * carry
        returns[:, t] = carry
    return torch.where(mask, returns, 0.0)


def ex_5_2(reward: Tensor, samples: int) -> Tensor:
    """The mean of the others: the group's sum without the row, over samples - 1."""
    groups = reward.view(-1, samples)
    others = (groups.sum(1, keepdim=True) - groups) / (samples - 1)
    return (groups - others).flatten()


def ex_5_3(value: Tensor, mask: Tensor, finished: Tensor) -> Tensor:
    """Row i has mask[i].sum() tokens: that state stands behind them; behind an EOS is nothing."""
    behind = value.gather(1, mask.sum(1, keepdim=True)).squeeze(1)
    return torch.where(finished, 0.0, behind)


# --- 06 vocabulary routing ------------------------------------------------------------------------


def ex_6_1(logp: Tensor, action: Tensor) -> Tensor:
    """The logits move by p - e_a; then dp = p (dz - sum p dz), with sum p dz = |p|^2 - p_a."""
    p = logp.exp()
    move = p - one_hot(action, p.shape[-1])
    return p * (move - (p * move).sum(-1, keepdim=True))


def ex_6_2(logp: Tensor, logq: Tensor, action: Tensor, k: int, least: float) -> Tensor:
    """C as before, then q - p over its sum; p is detached, or the student moves its own target."""
    p, q = logp.detach().exp(), logq.detach().exp()
    wanted = torch.zeros_like(p, dtype=torch.bool).scatter(-1, q.topk(k).indices, True)
    drawn = one_hot(action, p.shape[-1]).bool()
    r = torch.where(wanted & ~drawn & (p >= least) & (q > p), q - p, 0.0)
    return r / r.sum(-1, keepdim=True).clamp(min=1e-300)


def ex_6_3(logp_a: Tensor, logq_a: Tensor) -> Tensor:
    """The log-ratio, whose sign is the teacher's wish.  Minus k3 is never above 0."""
    return (logq_a - logp_a).detach()


# --- 07 gates, weights, regularizers --------------------------------------------------------------


def ex_7_1(reward: Tensor, mask: Tensor, kappa: float) -> Tensor:
    """Drift before a token: the sum through it, less its own.  Masked values are out first."""
    size = torch.where(mask, reward.abs(), 0.0)
    before = size.cumsum(1) - size
    return torch.where(mask, 1 + kappa * torch.exp(-before), 0.0)


def ex_7_2(x: Tensor, mask: Tensor, gate: Tensor) -> Tensor:
    """All response tokens below the line: a shut gate is a 0 that counts."""
    return torch.where(mask & gate, x, 0.0).sum() / mask.sum().clamp(min=1)


def ex_7_3(x: Tensor, mask: Tensor, pieces: int) -> Tensor:
    """Every piece is divided by the tokens of the whole batch; the pieces then simply add up."""
    total = mask.sum()
    parts = zip(x.chunk(pieces), mask.chunk(pieces), strict=True)
    return sum(torch.where(m, y, 0.0).sum() / total for y, m in parts)


# --- 08 horizons ----------------------------------------------------------------------------------


def ex_8_1(reward: Tensor, mask: Tensor, horizon: int) -> Tensor:
    """Every kept token misses the same number: the sum of the rewards behind the cut."""
    behind = mask & (torch.arange(mask.shape[1]) >= horizon)
    missed = torch.where(behind, reward, 0.0).sum(1, keepdim=True)
    return torch.where(mask & ~behind, missed, 0.0)


def ex_8_2(x: Tensor, mask: Tensor, horizon: int) -> Tensor:
    """N counts the tokens kept, those that are in the sum."""
    kept = mask & (torch.arange(x.shape[1]) < horizon)
    return torch.where(kept, x, 0.0).sum() / kept.sum()


def ex_8_3(x: Tensor, mask: Tensor) -> Tensor:
    """The mean over rows with a token there; 0/0 gives the nan wanted where no row has one."""
    return torch.where(mask, x, 0.0).sum(0) / mask.sum(0)


# --- 09 extrapolation -----------------------------------------------------------------------------


def ex_9_1(weight: Tensor, base: Tensor, final: Tensor) -> Tensor:
    """The projection of what is still to come on what has come."""
    moved = weight - base
    return ((final - weight) * moved).sum() / moved.square().sum()


def ex_9_2(moves: Tensor, k: int) -> Tensor:
    """The base is the accepted weights; else the next difference holds the old jump again."""
    w = base = torch.zeros_like(moves[0])
    for move in moves:
        now = w + move
        w = base = now + 2 * k * (now - base)
    return w


def ex_9_3(s: Tensor) -> Tensor:
    """exp of the entropy, with 0 log 0 = 0, which xlogy knows."""
    w = s / s.sum()
    return torch.exp(-torch.special.xlogy(w, w).sum())


# --- 10 when OPD works and when it fails ----------------------------------------------------------


def ex_10_1(logp: Tensor, logq: Tensor, k: int) -> Tensor:
    """Every pair of the two top k compared: a token of the one counts if the other holds it."""
    mine, theirs = logp.topk(k).indices, logq.topk(k).indices
    return (mine[..., :, None] == theirs[..., None, :]).any(-1).double().mean(-1)


def ex_10_2(value: Tensor, right: Tensor) -> Tensor:
    """Every right response against every wrong one: won 1, tie 1/2, lost 0; the mean."""
    gap = value[right][:, None] - value[~right]
    return ((gap > 0).double() + 0.5 * (gap == 0)).mean()


def ex_10_3(tokens: Tensor, student_eos: int, teacher_eos: int) -> Tensor:
    """Either EOS ends the text, and the one that was written is scored."""
    is_eos = ((tokens == student_eos) | (tokens == teacher_eos)).long()
    return is_eos.cumsum(-1) - is_eos == 0


# --- 11 diagnostics and reporting -----------------------------------------------------------------


def ex_11_1(g: Tensor) -> Tensor:
    """The mean gradient's square over the mean square; nothing is done parameter by parameter."""
    return g.mean(0).square().sum() / g.square().sum(1).mean()


def ex_11_2(lp: Tensor, lq: Tensor) -> Tensor:
    """Both laws renormalised on the overlap, the student's in front, the mean over its tokens."""
    lp, lq = lp.log_softmax(-1), lq.log_softmax(-1)
    return (lp.exp() * (lq - lp)).mean(-1)


def ex_11_3(x: Tensor, mask: Tensor) -> Tensor:
    """Over the unmasked tokens, at least 1; `where`, since nan * 0 is nan."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


# --- 12 from tiny to GPU --------------------------------------------------------------------------


def ex_12_1(logp_a: Tensor, engine_logp: Tensor, mask: Tensor) -> Tensor:
    """sum c^2 with c = w / sum w is 1 / n for n equal weights: n = (sum w)^2 / sum w^2."""
    w = torch.where(mask, (logp_a - engine_logp).exp(), 0.0)
    return w.sum() ** 2 / (w**2).sum()


def ex_12_2(answers: Tensor, seen: Tensor) -> Tensor:
    """The server saw no padding: in row i the response starts behind seen[i].sum() entries."""
    start, T = seen.sum(1), seen.shape[1]
    return torch.stack([row[s : s + T] for row, s in zip(answers, start, strict=True)])


def ex_12_3(logq: Tensor, temperature: float) -> Tensor:
    """softmax(z / T) from log-probs at 1: they are logits up to a constant a state."""
    scaled = logq / temperature
    return scaled - scaled.logsumexp(-1, keepdim=True)


# --- 13 real language -----------------------------------------------------------------------------


def ex_13_1(logp: Tensor, logq: Tensor, min_prob: float) -> Tensor:
    """The teacher's mass where the student has next to none: no draw reaches it."""
    return torch.where(logp.exp() < min_prob, logq.exp(), 0.0).sum(-1)


def ex_13_2(z: Tensor, student_eos: int, teacher_eos: int) -> Tensor:
    """One column gets both probabilities; built anew, since autograd dislikes writing in place."""
    p = z.softmax(-1)
    move = torch.zeros_like(p)
    move[..., student_eos], move[..., teacher_eos] = 1, -1
    return p + move * p[..., teacher_eos, None]


def ex_13_3(logp: Tensor, logq: Tensor, student_eos: int, teacher_eos: int) -> Tensor:
    """The event is at either id: probabilities add up, log-probs do not."""
    p, q = (x[..., [student_eos, teacher_eos]].exp().sum(-1) for x in (logp, logq))
    return q.log() - p.log()
