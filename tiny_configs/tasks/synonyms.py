"""The synonym task: 1,000 symbols, many of which say the same thing.

`<b> word op op op op op op =`, answered by `op word op word ... <e>`.  The next concept is a table
of (concept of the last word, op).  A concept has 16 words; which three of them the teacher prefers
depends on (concept, op).  The student's law prefers a fourth, wrong one, and has a noisy tail.
opd.load_task("synonyms"), or "synonyms/student" for the student's law, calls `make_task`.
"""

import random
from functools import cache, partial
from typing import Any

import texts
import torch
from torch import Tensor

import opd

# Word ids: 4 marks, 4 operators, 32 x 16 words `wCONCEPT.SYNONYM`, 480 others.
CONCEPTS, SYNONYMS, OPS, OTHERS, HOPS = 32, 16, 4, 480, 6
WORDS = ["<pad>", "<b>", "<e>", "=", *(f"op{o}" for o in range(OPS))]
FIRST_WORD = len(WORDS)
WORDS += [f"w{c}.{s}" for c in range(CONCEPTS) for s in range(SYNONYMS)]
WORDS += [f"x{i}" for i in range(OTHERS)]


@cache
def laws_of(style: str) -> tuple[Tensor, Tensor, Tensor]:
    """next concept (32, 4); words ranked for (concept, op), (32, 4, 16); law of a word (32, 4, V).

    Teacher: .95 on the first three ranks, .04 over all sixteen.  Student: .78 on the fourth rank,
    1e-3 on each other one, .2 on a Zipf tail.  Both: .01 over everything, so logs stay finite.
    """
    g = torch.Generator().manual_seed(0)
    table = torch.stack([torch.randperm(CONCEPTS, generator=g) for _ in range(OPS)], dim=1)
    ranked = torch.rand(CONCEPTS, OPS, SYNONYMS, generator=g).argsort(-1)
    ranked += FIRST_WORD + SYNONYMS * torch.arange(CONCEPTS)[:, None, None]  # as word ids
    rest, best = 1e-3, torch.tensor([0.0, 0.0, 0.0, 0.779])
    if style == "teacher":
        rest, best = 0.0025, 0.96 * torch.tensor([0.55, 0.30, 0.15, 0.0])
    share = rest + torch.nn.functional.pad(best, (0, SYNONYMS - len(best)))
    law = torch.zeros(CONCEPTS, OPS, len(WORDS))
    law.scatter_(-1, ranked, share.expand_as(ranked))
    zipf = 1 / torch.arange(1, OTHERS + 1)
    law[..., -OTHERS:] = (1 - share.sum()) * zipf / zipf.sum()
    return table, ranked, 0.99 * law + 0.01 / len(WORDS)


def state_laws(style: str) -> Tensor:
    """The law (136, V) of each state.

    Row i < 8: token i, a mark or an operator, is all but certain; row 8 + 4 c + o: a word of
    concept c after operator o.
    """
    sure = 0.999 * torch.eye(len(WORDS))[:FIRST_WORD] + 0.001 / len(WORDS)
    return torch.cat([sure, laws_of(style)[2].flatten(0, 1)])


def states_of(prompt_ids: Tensor, tokens: Tensor) -> Tensor:
    """(B, T) the state before each token, a row of `state_laws`."""
    table = laws_of("teacher")[0]  # all styles have the same
    given = prompt_ids[:, -HOPS - 2 : -1]  # word, six operators
    last = torch.cat([given[:, :1], tokens[:, :-1]], dim=1)  # the token before
    op, concept = (last - 4) % OPS, (last.roll(1, 1) - FIRST_WORD) // SYNONYMS % CONCEPTS
    word = FIRST_WORD + OPS * table[concept, op] + op
    t = torch.arange(tokens.shape[1])
    copied = torch.nn.functional.pad(given[:, 1:], (0, 1), value=2)  # operators, then EOS
    return torch.where(t % 2 == 1, word, copied[:, (t // 2).clamp(max=HOPS)])


def exact(rollout: opd.Rollout, style: str) -> Tensor:
    """The style's own log-probs (B, T, V) at every state of a text, whoever wrote it."""
    states = states_of(rollout.prompt_ids.cpu(), rollout.tokens.cpu())
    return state_laws(style).log()[states].to(rollout.tokens.device)


def make_task(name: str, tokenizer: Any) -> opd.Task:
    """The task; right means every token is one the teacher prefers.  name: see opd.load_task."""
    style = name.partition("/")[2] or "teacher"
    fine = style in ("teacher", "student")
    opd.require(fine, f"task = {name!r}: must be synonyms, synonyms/teacher or synonyms/student")
    missing = sorted({*WORDS} - {*tokenizer.get_vocab()})
    opd.require(not missing, f"task = {name!r}: the student's tokenizer has no token {missing[:1]}")
    ordered = tokenizer.convert_tokens_to_ids(WORDS) == list(range(len(WORDS)))
    opd.require(ordered, f"task = {name!r}: the tokenizer's ids must be in the task's order")
    laws = state_laws(style)
    preferred = state_laws("teacher") > 0.1  # an operator, EOS, three words

    def make(rng: random.Random) -> tuple[str, str]:
        ops = " ".join(f"op{rng.randrange(OPS)}" for _ in range(HOPS))
        return f"<b> w{rng.randrange(CONCEPTS)}.{rng.randrange(SYNONYMS)} {ops} =", ops

    def show(prompts: opd.Prompts) -> tuple[Tensor, Tensor]:
        g = opd.keyed_generator(prompts.text)
        noise = torch.rand(len(prompts.ids), 2 * HOPS + 1, generator=g)
        tokens = torch.zeros(noise.shape, dtype=torch.long)
        for t, u in enumerate(noise.T):
            tokens[:, t] = opd.inverse_cdf(laws[states_of(prompts.ids, tokens)[:, t]], u)
        return tokens, texts.through_eos(tokens, [2])

    def verify(prompts: opd.Prompts, rollout: opd.Rollout) -> Tensor:
        tokens, mask = rollout.tokens.cpu(), rollout.mask.cpu()
        right = preferred[states_of(rollout.prompt_ids.cpu(), tokens), tokens]
        return (right | ~mask).all(1) & (mask.sum(1) == 2 * HOPS + 1)

    draw = partial(texts.fresh_pairs, make)
    return opd.Task(name, tokenizer, 2 * HOPS + 1, draw, verify, show)
