"""The exercises' checker: `check("3.2", answer)` says in words what is right or wrong.

An answer is run on random float64 inputs of several shapes, with masks of ragged lengths and with
nan where masked, beside the right function: opd.py's or lab's, or an exact sum.  Where they differ,
the right function is made wrong in known ways (`wrong_versions`: negated, swapped, shifted,
unmasked, reduced otherwise, attached, ...), and the first that gives the same as the answer names
the mistake.  One table serves all exercises; EXERCISES holds a line or two for each.
"""

import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import broken
import lab
import torch
from torch import Tensor

import opd

UNSOLVED = "not solved yet"
SIZES = ((2, 5, 8), (4, 7, 9), (3, 6, 7), (3, 5, 6))  # B, T, V of the cases; P = 4 of prompts
UNMASKED, RAGGED, NAN, EMPTY = range(4)  # the cases: what the masks and masked values are
STUDENT = dict(logp="logq", logp_a="logq_a", z="w", lp="lq")  # the student's inputs, the teacher's
LIVE = ("logp", "logp_a", "z", "logits", "x")  # inputs in which gradients are compared
LAWS = ("logp", "logq", "logref")  # log-probs: their gradients are compared in the logits
MASKS = ("mask", "seen")
SHARES = ("beta", "scale")  # of one of two sides; the other side has the rest

# ------------------------------------------------------------------------------------------------
# Inputs: every exercise names its arguments, in order
# ------------------------------------------------------------------------------------------------


def make_inputs(key: str, names: str, case: int, empty: bool) -> tuple[dict[str, Any], Any]:
    """The arguments of one case by name, and its sizes.  Depends on its own arguments alone."""
    B, T, V = SIZES[case]
    g = torch.Generator().manual_seed(zlib.crc32(f"{key} {case}".encode()))
    lengths = torch.randint(1, T, (B,), generator=g)
    lengths[0] = T - 1 if case == NAN else T
    lengths[1] = 0 if empty else 1
    lengths = {UNMASKED: torch.full((B,), T), EMPTY: torch.zeros(B).long()}.get(case, lengths)
    mask = torch.arange(T) < lengths[:, None]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=g)

    def law() -> Tensor:
        return (2 * normal(B, T, V)).log_softmax(-1)

    def masked() -> Tensor:  # masked values are anything, in one case nan
        return torch.where(mask, normal(B, T), math.nan if case == NAN else 50 * normal(B, T))

    def text(*eos: int) -> Tensor:  # through an EOS, except in the first row; then padding
        tokens, ends = whole(3, V, B, T), lengths.clamp(min=1)[1:] - 1
        tokens[1:].scatter_(1, ends[:, None], torch.tensor(eos)[whole(0, len(eos), B - 1)][:, None])
        tokens[1:][torch.arange(T) > ends[:, None]] = 2
        return tokens

    makers = dict(
        logp=law, logq=law, logref=law,
        z=lambda: 2 * normal(B, T, V), w=lambda: 2 * normal(B, T, V),
        logp_a=lambda: -normal(B, T).abs(), logq_a=lambda: -normal(B, T).abs(),
        lp=lambda: law()[:, 0, :4], lq=lambda: law()[:, 0, :4],
        logits=lambda: 2 * normal(B, 4 + T, V), tokens=lambda: whole(0, V, B, T),
        rewards=lambda: normal(B, T, V), ids=lambda: normal(B, T, V).topk(3).indices,
        seen=lambda: torch.arange(T) >= whole(0, T, B)[:, None],
        text=lambda: text(2), eos_id=lambda: 2,
        two_texts=lambda: text(1, 2), student_eos=lambda: 1, teacher_eos=lambda: 2,
        mask=lambda: mask, x=masked, reward=masked,
        value=lambda: normal(B, T + 1), finished=lambda: torch.arange(B) % 2 == 1,
        samples=lambda: B, grouped=lambda: normal(2 * B), pieces=lambda: 2, horizon=lambda: 3,
        gamma=lambda: 0.5 + 0.1 * case, lam=lambda: 0.9, temperature=lambda: 2.0 + case,
        beta=lambda: 0.3 + 0.1 * case, scale=lambda: 1.25 + case, k=lambda: 3 + case,
        min_prob=lambda: 0.05, gate=lambda: normal(B, T) > 0,
        weight=lambda: normal(B, T), base=lambda: normal(B, T), final=lambda: normal(B, T),
        moves=lambda: normal(B, T),
        s=lambda: normal(T).abs().sort(descending=True).values * (torch.arange(T) < T - case),
        values=lambda: (2 * normal(4 * B)).round() / 2,
        correct=lambda: torch.arange(4 * B) % 3 == 0,
        gradients=lambda: normal(B, V) + 0.5,
        engine_logp=lambda: -normal(B, T).abs(),
        answers=lambda: -normal(B, 2 * T).abs(),
    )  # fmt: skip
    made = {name: makers[name]() for name in names.split()}
    return made, SimpleNamespace(B=B, T=T, V=V, case=case)


# ------------------------------------------------------------------------------------------------
# The exercises
# ------------------------------------------------------------------------------------------------


@dataclass
class Exercise:
    """names: of the arguments.  bug: what a find-the-bug cell shows.  on: what is compared.
    via: what is made of the answer first, e.g. its mean over tokens.  empty: rows without tokens.
    """

    names: str
    right: Callable
    bug: Callable | None = None
    on: str = "values gradients"
    via: Callable = lambda f: f
    empty: bool = False


def mean_over_tokens(f: Callable) -> Callable:
    """A loss of (log p(a), log q(a)) becomes its mean over all tokens a, p(a) held fixed."""

    def mean(a: dict) -> Tensor:
        with torch.no_grad():
            p = a["logp"].exp()
        return (p * f(a)).sum(-1)

    return mean


def mean_as_reward(f: Callable) -> Callable:
    """The same of an advantage: of its policy gradient's loss."""
    return mean_over_tokens(lambda a: -f(a).detach() * a["logp"])


def mean_over_actions(f: Callable) -> Callable:
    """The same of a loss of (logp, logq, action), all actions in turn."""

    def mean(a: dict) -> Tensor:
        with torch.no_grad():
            p = a["logp"].exp()  # (B, T, V)
        actions = (torch.full(p.shape[:-1], v) for v in range(p.shape[-1]))
        return sum(p[..., v] * f(a | dict(action=action)) for v, action in enumerate(actions))

    return mean


def at_real_tokens(f: Callable) -> Callable:
    return lambda a: torch.where(a["seen"], f(a), 0.0)


def jsd_gradient(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    z = logp.detach().clone().requires_grad_()
    return torch.autograd.grad(opd.jsd(z.log_softmax(-1), logq, beta).sum(), z)[0]


def first_order(logp: Tensor, action: Tensor) -> Tensor:
    """J (p - e_a): the change of the probabilities when the logits move by p - e_a."""
    p = logp.exp()
    move = p - torch.nn.functional.one_hot(action, p.shape[-1])
    J = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]  # (B, T, V, V)
    return (J @ move[..., None]).squeeze(-1)


def token_loss(p: Tensor, q: Tensor) -> Tensor:
    return -opd.log_ratio_reward(p, q) * p


def against_mean(p: Tensor, q: Tensor, a: Tensor) -> Tensor:
    """Route B with the reward's mean -KL as its baseline."""
    p_a, q_a = opd.of_tokens(p, a), opd.of_tokens(q, a)
    return -(opd.log_ratio_reward(p_a, q_a) - opd.kl_baseline(p, q)) * p_a


def on_ids(p: Tensor, q: Tensor, ids: Tensor, tail: str) -> Tensor:
    return opd.truncated_reverse_kl(p, q, opd.Support(ids, torch.ones_like(ids).bool()), tail)


def within(mask: Tensor, horizon: int) -> Tensor:
    return mask & (torch.arange(mask.shape[1]) < horizon)


def drift_weights(reward: Tensor, mask: Tensor, kappa: float) -> Tensor:
    size = torch.where(mask, reward.abs(), 0.0)
    return mask * (1 + kappa * (size - size.cumsum(-1)).exp())


def lost_return(reward: Tensor, mask: Tensor, horizon: int) -> Tensor:
    whole, kept = opd.discounted_return(reward, mask, 1.0), within(mask, horizon)
    return torch.where(kept, whole - opd.discounted_return(reward, kept, 1.0), 0.0)


def best_jump(weight: Tensor, base: Tensor, final: Tensor) -> Tensor:
    return torch.linalg.lstsq((weight - base).view(-1, 1), (final - weight).view(-1, 1))[
        0
    ].squeeze()


def walk(moves: Tensor, k: int, late: bool = False) -> Tensor:
    """EffOPD's weights from 0, k accepted each time; late: the base is without the jump."""
    w = base = torch.zeros_like(moves[0])
    for now in moves:
        now = w + now
        w = now + 2 * k * (now - base)
        base = now if late else w
    return w


def behind_prompt(answers: Tensor, seen: Tensor) -> Tensor:
    """The T entries of each row that follow its own prompt's, however long it is."""
    at = seen.sum(1, keepdim=True) + torch.arange(seen.shape[1])
    return answers.gather(1, at)


def bootstrap(value: Tensor, mask: Tensor, finished: Tensor) -> Tensor:
    """The value behind each row's own last token, 0 behind an EOS."""
    return torch.where(finished, 0.0, value.gather(1, mask.sum(1, keepdim=True)).squeeze(1))


def either(logp: Tensor, one: int, other: int) -> Tensor:
    """The log-prob of one token or the other, (B, T)."""
    return torch.logaddexp(logp[..., one], logp[..., other])


def tokens_left(logp_a: Tensor, engine_logp: Tensor, mask: Tensor) -> Tensor:
    w = (logp_a - engine_logp).exp() * mask
    return w.sum() ** 2 / w.square().sum()


def by_token(law: Tensor, tokens: Tensor) -> Tensor:
    return opd.of_tokens(law.log_softmax(-1), tokens)


EXERCISES = {
    "0.1": Exercise("logp_a logq_a mask", lambda p, q, m: ((q - p) * m).sum(1), on="values"),
    "0.2": Exercise("logp_a logq_a mask", lambda p, q, m: (q - p + 1e9 * ~m).argmin(1)),
    "0.3": Exercise("logits tokens", lambda z, a: by_token(z[:, 3:-1], a),
                    bug=lambda z, a: by_token(z[:, 4:], a)),
    "1.1": Exercise("seen", lab.positions_of, via=at_real_tokens),
    "1.2": Exercise("z w temperature", lambda z, w, t: opd.reverse_kl(
                        (z / t).log_softmax(-1), (w / t).log_softmax(-1)),
                    bug=lambda z, w, t: broken.student_temperature_only(z, w.log_softmax(-1), t)),
    "1.3": Exercise("text eos_id", lambda y, eos: lab.through_eos(y, [eos]),
                    bug=broken.mask_by_padding),
    "2.1": Exercise("logp logq beta", jsd_gradient, on="values"),
    "2.2": Exercise("logp logq", opd.reverse_kl,
                    bug=lambda p, q: broken.swapped_kl(p, q) / p.shape[-1]),
    "2.3": Exercise("logp logq beta", opd.jsd, bug=broken.jsd_of_log_probs),
    "3.1": Exercise("logp logq", lambda p, q: (q - p).exp(), on="gradients", via=mean_as_reward),
    "3.2": Exercise("logp logq tokens", against_mean,
                    bug=lambda p, q, a: broken.state_only_advantage(p, q, opd.of_tokens(p, a))),
    "3.3": Exercise("logp logq", token_loss, bug=broken.k3_as_loss, on="gradients",
                    via=mean_over_tokens),
    "4.1": Exercise("logp logq ids", lambda *a: on_ids(*a, "bucket")),
    "4.2": Exercise("logp logq ids", lambda p, q, ids: on_ids(q, p, ids, "generalised"),
                    bug=broken.clamped_truncated_forward_kl),
    "4.3": Exercise("logp logq ids", lambda *a: on_ids(*a[:3], "generalised") - (
                        broken.plainly_truncated_reverse_kl(*a[:3])
                        - broken.exact_head_and_sampled_tail(*a)),
                    bug=broken.exact_head_and_sampled_tail, on="gradients", via=mean_over_actions),
    "5.1": Exercise("reward mask gamma", opd.discounted_return),
    "5.2": Exercise("grouped samples", opd.leave_one_out, bug=broken.mean_of_all_samples),
    "5.3": Exercise("value mask finished", bootstrap, bug=lambda v, m, ended: v[:, -1]),
    "6.1": Exercise("logp tokens", first_order, on="values"),
    "6.2": Exercise("logp logq tokens k min_prob", lambda p, q, a, k, least: opd.routing_target(
                        p, q, a, top_k=k, min_prob=least, target="deficit")[0]),
    "6.3": Exercise("logp_a logq_a", opd.log_ratio_reward, bug=broken.k3_as_reward),
    "7.1": Exercise("reward mask gamma", drift_weights, on="values"),
    "7.2": Exercise("x mask gate", lambda x, m, gate: opd.masked_mean(torch.where(gate, x, 0.0), m),
                    bug=lambda x, m, gate: x[m & gate].sum() / (m & gate).sum(), empty=True),
    "7.3": Exercise("x mask pieces", lambda x, m, n: opd.masked_mean(x, m),
                    bug=lambda x, m, n: broken.mean_of_micro_batch_means(
                        [*zip(x.chunk(n), m.chunk(n), strict=True)])),
    "8.1": Exercise("reward mask horizon", lost_return),
    "8.2": Exercise("x mask horizon", lambda x, m, n: opd.masked_mean(x, within(m, n)),
                    bug=lambda x, m, n: broken.wrong_count(x, within(m, n), m)),
    "8.3": Exercise("x mask", lab.kl_by_position, on="values"),
    "9.1": Exercise("weight base final", best_jump),
    "9.2": Exercise("moves k", walk, bug=lambda moves, k: walk(moves, k, late=True)),
    "9.3": Exercise("s", lambda s: lab.spectrum(torch.diag(s))["effective_rank"]),
    "10.1": Exercise("logp logq k", lambda p, q, k: opd.overlap(p, q, k).ratio, on="values"),
    "10.2": Exercise("values correct", lab.auroc),
    "10.3": Exercise("two_texts student_eos teacher_eos",
                     lambda y, *eos: lab.through_eos(y, [*eos]),
                     bug=lambda y, _, eos: lab.through_eos(y, [eos])),
    "11.1": Exercise("gradients", lambda g: g.mean(0).square().sum() / g.square().sum(1).mean()),
    "11.2": Exercise("lp lq", lambda p, q: -opd.kl_on_support(p, q, p <= 0, "renormalise") / 4,
                     bug=lambda p, q: -(q.exp() * (q - p)).mean(-1)),
    "11.3": Exercise("x mask", opd.masked_mean, bug=broken.mean_with_padding, empty=True),
    "12.1": Exercise("logp_a engine_logp mask", tokens_left, on="values"),
    "12.2": Exercise("answers seen", behind_prompt, bug=lambda y, seen: y[:, seen.shape[1]:]),
    "12.3": Exercise("logq temperature", lambda q, t: (q / t).log_softmax(-1),
                     bug=lambda q, t: q / t),
    "13.1": Exercise("logp logq min_prob", lambda p, q, least: (
                         q.exp() * (p.exp() < least)).sum(-1), on="values"),
    "13.2": Exercise("z student_eos teacher_eos",
                     lambda z, *eos: opd.from_logits(z, stops=[*eos]).exp()),
    "13.3": Exercise("logp logq student_eos teacher_eos",
                     lambda p, q, *eos: either(q, *eos) - either(p, *eos),
                     bug=lambda p, q, eos, _: q[..., eos] - p[..., eos]),
}  # fmt: skip

# ------------------------------------------------------------------------------------------------
# What can be wrong, in words
# ------------------------------------------------------------------------------------------------


def wrong_versions(names: list[str]) -> Iterator[tuple[str, Callable]]:
    """(word, wrong): wrong(f, a, size) is f(a) with one mistake, f the right function.

    A mistake that cannot be made with these arguments raises.
    """
    yield "the sign is wrong", lambda f, a, n: -f(a)
    for by in (1, -1):
        yield "off by one", lambda f, a, n, by=by: f(a) + by
    for name in SHARES:
        yield f"`{name}` weighs the wrong side", lambda f, a, n, x=name: f(a | {x: 1 - a[x]})
    for one, other in STUDENT.items():
        yield "KL direction: student and teacher are swapped", swapped(one, other)
    yield "KL direction: student and teacher are swapped", other_kl
    for (i, one), (j, other) in combinations(enumerate(names, 1), 2):
        yield f"arguments {i} and {j} are swapped", swapped(one, other)
    for by in (1, -1):
        yield SHIFTED, lambda f, a, n, by=by: f(a).roll(by, [*f(a).shape].index(n.T))
        for name in (name for name in names if name not in MASKS):
            yield SHIFTED, lambda f, a, n, by=by, x=name: f(a | {x: a[x].roll(by, 1)})
    for name in MASKS:
        yield "the mask is ignored", lambda f, a, n, x=name: f(a | {x: torch.ones_like(a[x])})
        yield "the mask is the wrong way round", lambda f, a, n, x=name: f(a | {x: ~a[x]})
    yield "time runs the wrong way", lambda f, a, n: f(each(a, lambda x: x.flip(1), 2)).flip(1)
    yield "a gradient flows where it should be detached", attached
    for word, weight in BY_ROWS.items():
        yield f"reduction: {word}", by_rows(weight)
    for word, factor in FACTORS.items():
        yield word, lambda f, a, n, c=factor: f(a) * c(a, n)
    for name in names:
        for v in (0, 1):
            yield f"`{name}` is ignored", lambda f, a, n, x=name, v=v: f(a | {x: type(a[x])(v)})
    yield "the wrong way round: 1 minus the right value", lambda f, a, n: 1 - f(a)


SHIFTED = "shifted by one token"
BY_ROWS = {  # weight of a row's mean from its tokens, the sizes
    "a mean of the rows' means": lambda tokens, n: 1 / n.B,
    "a mean over all tokens": lambda tokens, n: tokens / tokens.sum().clamp(min=1),
    "a sum over tokens, not a mean": lambda tokens, n: tokens,
    "divided by all positions, padding included": lambda tokens, n: tokens / (n.B * n.T),
    "a mean of the rows' sums": lambda tokens, n: tokens / n.B,
}
FACTORS = {
    "reduction: a mean over the vocabulary, not a sum": lambda a, n: 1 / n.V,
    "reduction: a mean over tokens, not a sum": lambda a, n: 1 / n.T,
    "reduction: a mean over rows, not a sum": lambda a, n: 1 / n.B,
    "reduction: a sum over rows, not a mean": lambda a, n: n.B,
    "reduction: a count, not a share": lambda a, n: a["k"],
    "reduction: the mean contains the row itself": lambda a, n: 1 - 1 / a["samples"],
    "wrong base: bits, not nats": lambda a, n: 1 / math.log(2),
    "wrong base: log10, not nats": lambda a, n: 1 / math.log(10),
}
MENDS = {  # word -> what makes such an answer right
    "not normalised over the vocabulary": lambda x: x / x.sum(-1, keepdim=True),
    "not normalised over the vocabulary: the log-probs": lambda x: x.log_softmax(-1),
    "a logarithm, where its exponential is wanted": torch.exp,
    "an exponential, where its logarithm is wanted": torch.log,
}


def swapped(one: str, other: str) -> Callable:
    return lambda f, a, n: f(a | {one: a[other], other: a[one]})


def each(a: dict, change: Callable, dims: int) -> dict:
    """The arguments, with those that have so many dimensions changed."""
    return {k: change(x) if isinstance(x, Tensor) and x.dim() >= dims else x for k, x in a.items()}


def other_kl(f: Callable, a: dict, n: Any) -> Tensor:
    with patch.object(opd, "reverse_kl", opd.forward_kl):
        return f(a)


def attached(f: Callable, a: dict, n: Any) -> Tensor:
    with patch.object(Tensor, "detach", lambda x: x):
        return f(a)


def by_rows(weight: Callable) -> Callable:
    def wrong(f: Callable, a: dict, n: Any) -> Tensor:
        rows = torch.stack([f(each(a, lambda x, i=i: x[i : i + 1], 1)) for i in range(n.B)])
        opd.require(rows.dim() == 1, "not one number")
        return (rows * weight(a["mask"].sum(1), n)).sum()

    return wrong


# ------------------------------------------------------------------------------------------------
# Running and judging
# ------------------------------------------------------------------------------------------------


def call(function: Callable) -> Callable:
    """A function of positional arguments as one of their dict; a float64 tensor comes back."""

    def called(a: dict) -> Tensor:
        out = function(*a.values())
        if out is None or out is ...:
            raise NotImplementedError
        return out.double() if isinstance(out, Tensor) else torch.tensor(out, dtype=torch.float64)

    return called


def run(f: Callable, args: dict, on: str) -> dict[str, Tensor]:
    """f's values at these arguments and, by name, its gradients in the LIVE ones.

    Where only gradients are compared the values are 0, so that their shape still counts.
    """
    a = {k: x.clone() if isinstance(x, Tensor) else x for k, x in args.items()}
    leaves = {k: x.requires_grad_() for k, x in a.items() if k in LIVE and "gradients" in on}
    value = f(a | {k: a[k].log_softmax(-1) for k in LAWS if k in a})
    found = dict(values=value.detach() * ("values" in on))
    if not value.requires_grad or not leaves:
        return found | {k: torch.zeros_like(x) for k, x in leaves.items()}
    weights = 1.5 + torch.arange(value.numel(), dtype=value.dtype).cos().view(value.shape)
    total, inputs = (value * weights).sum(), [*leaves.values()]
    gradients = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
    return found | dict(zip(leaves, gradients, strict=True))


def results(e: Exercise, f: Callable, cases: list) -> Iterator[dict[str, Tensor]]:
    """f(arguments, sizes) case by case, as it is compared."""
    return (run(e.via(lambda a, n=n: f(a, n)), args, e.on) for args, n in cases)


def equal(one: Tensor, other: Tensor) -> bool:
    close = dict(rtol=1e-5, atol=1e-7, equal_nan=True)  # an answer in float32 passes
    return one.shape == other.shape and torch.allclose(one, other, **close)


def same(one: dict, other: dict, inner: int = 0) -> bool:
    """Equal results?  inner: the number of tokens, of which the first and the last do not count."""
    if inner:
        one, other = ({k: x.narrow([*x.shape].index(inner), 1, inner - 2) if inner in x.shape else x
                       for k, x in d.items() if inner in x.shape or k == "values"}
                      for d in (one, other))  # fmt: skip
    return all(equal(x, other[k]) for k, x in one.items())


def name_shape(shape: tuple[int, ...], n: Any) -> str:
    letters = {n.B: "B", n.T: "T", n.V: "V"}
    return f"({', '.join(letters.get(size, str(size)) for size in shape)})" if shape else "a number"


def judge(key: str, answer: Callable) -> str:
    """The verdict in words; "right" if it is right."""
    e = EXERCISES[key]
    cases = [make_inputs(key, e.names, case, e.empty) for case in range(4 if e.empty else 3)]
    wanted = [*results(e, lambda a, n: call(e.right)(a), cases)]
    try:
        found = [*results(e, lambda a, n: call(answer)(a), cases)]
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        if isinstance(error, NotImplementedError) and "not implemented for" not in reason:
            return UNSOLVED  # the others are torch's: an operation that a dtype does not have
        return f"it raised {type(error).__name__}: {reason}"
    values = [(x["values"], y["values"]) for x, y in zip(found, wanted, strict=True)]
    for (x, y), (_, n) in zip(values, cases, strict=True):
        if x.shape != y.shape:
            return f"wrong shape: {name_shape(x.shape, n)} instead of {name_shape(y.shape, n)}"
    if all(map(same, found, wanted)):
        return "right"
    if e.bug and all(map(same, found, results(e, lambda a, n: call(e.bug)(a), cases))):
        return f"{UNSOLVED}: it still does what the function shown does"
    holes = [bool((~x.isfinite() & y.isfinite()).any()) for x, y in values]
    keep = [i for i, hole in enumerate(holes) if not hole]
    if all(same(found[i], wanted[i]) for i in keep):
        case = cases[holes.index(True)][1].case
        return NOT_FINITE.get(case if case == NAN else e.empty, "nan or infinite")
    return explain(e, *([x[i] for i in keep] for x in (cases, found, wanted)))


NOT_FINITE = {  # the case with nan; else whether there are empty rows
    NAN: "nan where masked: masked values may be anything, nan too",
    True: "nan or infinite where no token is unmasked",
}


def explain(e: Exercise, cases: list, found: list[dict], wanted: list[dict]) -> str:
    """The mistake of a wrong answer: the first wrong version that does the same, or a remark."""
    gradients = [[x[k] for x in xs for k in x if k != "values"] for xs in (found, wanted)]
    flows = [any(bool((g.abs() > 1e-9).any()) for g in side) for side in gradients]
    values = [(x["values"], y["values"]) for x, y in zip(found, wanted, strict=True)]
    fine = "right values, but " if "values" in e.on else ""
    if flows[0] != flows[1] and all(equal(*pair) for pair in values):
        what = "a gradient flows where it should be detached"
        return fine + (what if flows[0] else "no gradient flows where it should")
    for word, wrong in wrong_versions(e.names.split()):
        inner = [n.T * (word == SHIFTED) for _, n in cases]
        with suppress(Exception):  # a mistake that cannot be made here
            tried = [*results(e, lambda a, n, w=wrong: w(call(e.right), a, n), cases)]
            if all(map(same, found, tried, inner)) and not all(map(same, tried, wanted, inner)):
                return word
    for word, mend in MENDS.items():
        if all(equal(mend(x), y) for x, y in values):
            return word
    pairs = [(x[k], y[k]) for x, y in zip(found, wanted, strict=True) for k in x]
    ratio = torch.cat([(x / y)[y.isfinite() & (y != 0)] for x, y in pairs])
    holes = [bool((x.isfinite() != y.isfinite()).any()) for x, y in pairs]
    zeros = all(equal(x[y == 0], y[y == 0]) for x, y in pairs)
    if len(ratio) and zeros and not any(holes) and equal(ratio, ratio[:1].expand_as(ratio)):
        return f"off by a factor: it is {ratio[0]:.4g} times what it should be"
    if all(equal(*pair) for pair in values):
        return f"{fine}the gradient is wrong"
    if cases[0][1].case == UNMASKED and {*MASKS} & {*cases[0][0]} and same(found[0], wanted[0]):
        return "right where nothing is masked: see what the mask does"
    x, y = next((x[off][0], y[off][0]) for x, y in values if (off := ~x.isclose(y)).any())
    return f"wrong values: for example {x:.4g} where {y:.4g} is right"


def check(key: str, answer: Callable) -> bool | None:
    """Print one line about an answer to exercise `key`.

    True only when it is right; else None, so that a notebook shows nothing below the line.
    """
    verdict = judge(key, answer) if key in EXERCISES else "there is no such exercise"
    plain = verdict == "right" or verdict.startswith((UNSOLVED, "there is"))
    print(f"{key}: {verdict if plain else f'not right: {verdict}'}")
    return True if verdict == "right" else None
