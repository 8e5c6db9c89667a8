"""Solutions of the notebooks' exercises: ex_3_2 solves exercise 3.2.  Look only after trying.

They use torch alone, so that they can be read without opd.py.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import one_hot

# --- 00 tour --------------------------------------------------------------------------------------


def ex_0_1(logp: Tensor, logq: Tensor) -> Tensor:
    """The mean of the log-ratio under the student, over the vocabulary: student first."""
    return (logp.exp() * (logp - logq)).sum(-1)


def ex_0_2(logp: Tensor, logq: Tensor, tokens: Tensor) -> Tensor:
    """`gather` reads each law at the token that was written; teacher minus student."""
    at = tokens[..., None]
    return (logq.gather(-1, at) - logp.gather(-1, at)).squeeze(-1)


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


def ex_3_1(logp: Tensor, reward: Tensor) -> Tensor:
    """sum_a p_a (-r_a) (e_a - p) = -p (r - E r): a token falls whose reward is below the mean."""
    p = logp.exp()
    return -p * (reward - (p * reward).sum(-1, keepdim=True))


def ex_3_2(logp_a: Tensor, logq_a: Tensor) -> Tensor:
    """The reward is a number: detach it.  Else -r log p has a second term, and sqrt(q) wins."""
    advantage = (logq_a - logp_a).detach()
    return -advantage * logp_a


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
    """sg(p l) log p.  Subtracting p (and adding q) inside the sum has the same gradient."""
    lp, lq = logp.gather(-1, ids), logq.gather(-1, ids)
    return ((lp.exp() * (lp - lq)).detach() * lp).sum(-1)


def ex_4_3(logp: Tensor, logq: Tensor, action: Tensor) -> Tensor:
    """The drawn token's own log-ratio.  With the state's KL added, a baseline, it is right too."""
    logp_a, logq_a = (x.gather(-1, action[..., None]).squeeze(-1) for x in (logp, logq))
    return -(logq_a - logp_a).detach() * logp_a


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


def ex_5_3(
    reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float, bootstrap: Tensor
) -> Tensor:
    """Behind the last token stands `bootstrap`, which is 0 only after a true EOS."""
    advantage, carry, after = torch.zeros_like(reward), torch.zeros_like(bootstrap), bootstrap
    for t in reversed(range(reward.shape[1])):
        delta = reward[:, t] + gamma * after - value[:, t]
        carry = torch.where(mask[:, t], delta + gamma * lam * carry, carry)
        after = torch.where(mask[:, t], value[:, t], after)
        advantage[:, t] = carry
    return torch.where(mask, advantage, 0.0)


# --- 06 vocabulary routing ------------------------------------------------------------------------


def ex_6_1(logp: Tensor, action: Tensor) -> Tensor:
    """The logits move by p - e_a; then dp = p (dz - sum p dz), with sum p dz = |p|^2 - p_a."""
    p = logp.exp()
    move = p - one_hot(action, p.shape[-1])
    return p * (move - (p * move).sum(-1, keepdim=True))


def ex_6_2(logp: Tensor, logq: Tensor, action: Tensor, k: int, least: float) -> Tensor:
    """Three conditions and `not a`; then q over its sum on C.  The clamp leaves an empty C at 0."""
    p, q = logp.exp(), logq.exp()
    wanted = torch.zeros_like(p, dtype=torch.bool).scatter(-1, q.topk(k).indices, True)
    drawn = one_hot(action, p.shape[-1]).bool()
    r = torch.where(wanted & ~drawn & (p >= least) & (q > p), q, 0.0)
    return r / r.sum(-1, keepdim=True).clamp(min=1e-300)


def ex_6_3(logp_a: Tensor, logq_a: Tensor) -> Tensor:
    """The log-ratio, whose sign is the teacher's wish.  Minus k3 is never above 0."""
    return (logq_a - logp_a).detach()


# --- 07 gates, weights, regularizers --------------------------------------------------------------


def ex_7_1(x: Tensor, mask: Tensor) -> Tensor:
    """Each row's mean first, then the mean over all rows; a row without tokens counts as 0."""
    rows = torch.where(mask, x, 0.0).sum(1) / mask.sum(1).clamp(min=1)
    return rows.mean()


def ex_7_2(logq: Tensor, logref: Tensor, scale: float) -> Tensor:
    """Log-probs are scaled and added; log_softmax subtracts log Z, so that it is a law again."""
    return (scale * logq + (1 - scale) * logref).log_softmax(-1)


def ex_7_3(x: Tensor, mask: Tensor, pieces: int) -> Tensor:
    """Every piece is divided by the tokens of the whole batch; the pieces then simply add up."""
    total = mask.sum()
    parts = zip(x.chunk(pieces), mask.chunk(pieces), strict=True)
    return sum(torch.where(m, y, 0.0).sum() / total for y, m in parts)


# --- 08 horizons ----------------------------------------------------------------------------------


def ex_8_1(step: int, steps: int, start: int, end: int, growth: float) -> int:
    """The ramp of `linear`, its progress rounded down to whole quarters."""
    done = min(1.0, step / (growth * steps))
    return start + round((end - start) * math.floor(4 * done) / 4)


def ex_8_2(x: Tensor, mask: Tensor, horizon: int) -> Tensor:
    """N counts the tokens kept, those that are in the sum."""
    kept = mask & (torch.arange(x.shape[1]) < horizon)
    return torch.where(kept, x, 0.0).sum() / kept.sum()


def ex_8_3(x: Tensor, mask: Tensor) -> Tensor:
    """The mean over rows with a token there; 0/0 gives the nan wanted where no row has one."""
    return torch.where(mask, x, 0.0).sum(0) / mask.sum(0)


# --- 09 extrapolation -----------------------------------------------------------------------------


def ex_9_1(weight: Tensor, base: Tensor, k: int) -> Tensor:
    """From the weights as they are, 2k times as far again as they came."""
    return weight + 2 * k * (weight - base)


def ex_9_2(own: float, scores: Tensor) -> int:
    """Against the best so far, not against the start; the first failure ends the search."""
    best = own
    for k, score in enumerate(scores.tolist()):
        if score < best:
            return k
        best = score
    return len(scores)


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


def ex_12_1(logp_a: Tensor, engine_logp: Tensor, cap: float) -> Tensor:
    """A factor in front of a loss, not a part of it: detached.  Clipped above only."""
    return (logp_a - engine_logp).detach().exp().clamp(max=cap)


def ex_12_2(answers: Tensor, seen: Tensor) -> Tensor:
    """The server saw no padding: in row i the response starts behind seen[i].sum() entries."""
    start, T = seen.sum(1), seen.shape[1]
    return torch.stack([row[s : s + T] for row, s in zip(answers, start, strict=True)])


def ex_12_3(logq: Tensor, temperature: float) -> Tensor:
    """softmax(z / T) from log-probs at 1: they are logits up to a constant a state."""
    scaled = logq / temperature
    return scaled - scaled.logsumexp(-1, keepdim=True)
