"""§8, §10: what a token weighs; sampling against enumeration.

Numbers in brackets are the checks of the project's formula list: (23) Monte Carlo.  (16) and (18)
are in test_rules.py, (20) is in test_states.py and test_scores.py, (22) in test_scores.py.
"""

import math

import pytest
import torch
from conftest import Tree, logit_gradient, random_laws
from test_training import gradients_of_step, ready

import opd

# the weights of a step


def written(lengths, finished):
    """A rollout with responses of these lengths."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    nobody = torch.zeros(len(lengths), 1, dtype=torch.long)
    zeros = torch.zeros(mask.shape)
    return opd.Rollout(nobody, nobody.bool(), zeros.long(), mask, zeros, torch.tensor(finished))


WEIGHED = {  # of rows of 4, 2, 3 and 1 tokens: each token's weight, all kept; only row 0 kept
    "token": ([1 / 10] * 4, [1 / 4, 0, 0, 0]),
    "sequence_sum": ([1 / 4] * 4, [1, 0, 0, 0]),
    "sequence_mean": ([1 / 16, 1 / 8, 1 / 12, 1 / 4], [1 / 4, 0, 0, 0]),
}


@pytest.mark.parametrize("how", WEIGHED)
def test_the_weights_of_a_step_are_those_of_masked_mean_and_a_rejection_weighs_nothing(how):
    rollout = written([4, 2, 3, 1], [True, True, False, False])
    right = torch.tensor([True, False, True, False])  # row 2 is right, and cut
    everything = torch.ones(4, dtype=torch.bool)
    for keep, rows in zip(("all", "right"), WEIGHED[how], strict=True):
        c = opd.Config(method="sft", states="teacher", keep=keep, aggregation=how)
        found = opd.weights(c, None, rollout, None, None, right)
        expected = rollout.mask * torch.tensor(rows)[:, None]
        assert torch.allclose(found.double(), expected.double(), atol=1e-7)
    x = torch.rand(rollout.mask.shape)
    plain = opd.Config(method="sft", aggregation=how)
    found = (opd.weights(plain, None, rollout, None, None, everything) * x).sum()
    assert torch.allclose(found, opd.masked_mean(x, rollout.mask, how))


@pytest.mark.parametrize("how", WEIGHED)
def test_nothing_kept_weighs_nothing(how):
    rollout, c = written([4, 2], [True, False]), opd.Config(method="sft", keep="right")
    c = c.model_copy(update=dict(aggregation=how))
    found = opd.weights(c, None, rollout, None, None, torch.tensor([False, True]))
    assert torch.equal(found, torch.zeros(2, 4))


REJECTS = dict(method="sft", states="teacher", teacher="tiny_configs/models/student_muddled")


def step_of(**fields):
    """A step's config, world, row and gradients."""
    config, world, _ = ready(batch_size=32, warmup=0, **fields)
    return config, world, *gradients_of_step(config, world)


def test_cost_counts_what_was_drawn_and_a_rejection_is_a_weight_of_0():
    """Fault 1 of the first edition: rejected responses had vanished from tokens and FLOPs."""
    config, world, row, found = step_of(**REJECTS, keep="right")
    *_, whole, _ = step_of(**REJECTS)
    prompts, rollout = opd.write(config, world, 0, config.max_tokens)
    kept = world.task.verify(prompts, rollout) & rollout.finished
    drawn = int(rollout.mask.sum())
    assert 0 < kept.sum() < 32 and row["correct"] == whole["correct"] == float(kept.float().mean())
    assert row["tokens_sampled"] == row["tokens_trained"] == drawn > int(rollout.mask[kept].sum())
    assert row["flop_sample"] == whole["flop_sample"] > 0
    for key in ("flop_score", "flop_update", "length", "finished", "tokens_scored"):
        assert row[key] == whole[key], key
    assert row["weight"] == pytest.approx(1) and whole["weight"] == pytest.approx(1)

    best = opd.take(rollout, kept.nonzero().squeeze(1))  # what is learned: only these
    logp_a = opd.score_tokens(world.student, best, vocab_size=world.vocab["vocab_size"])
    loss = opd.masked_mean(-logp_a, best.mask)
    loss.backward()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5) != whole["loss"]
    size = max(p.grad.abs().max() for p in world.student.parameters())
    for gradient, p in zip(found, world.student.parameters(), strict=True):
        assert (gradient - p.grad).abs().max() < 1e-4 * size


def test_a_step_that_keeps_nothing_costs_and_moves_nothing():
    """Fault 1, at its end: a horizon of 5 cuts every response."""
    *_, row, gradients = step_of(**REJECTS, keep="right", horizon=5)
    assert row["tokens_sampled"] == row["tokens_trained"] == 32 * 5 and row["flop_update"] > 0
    assert row["weight"] == 0 and row["loss"] == 0 and row["finished"] == 0
    assert not any(gradient.any() for gradient in gradients)


# importance weights


def test_truncated_importance_weights_by_hand():
    logp = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log().requires_grad_()
    engine = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64).log()
    weights = opd.truncated_importance_weights(logp, engine, 1.5)
    expected = torch.tensor([1.5, 1.0, 0.25], dtype=torch.float64)
    assert torch.allclose(weights, expected, atol=1e-12) and not weights.requires_grad


@pytest.mark.parametrize("seed", range(3))
def test_importance_weights_turn_the_engines_expectation_into_the_trainers(seed):
    logp, logq = (law[0, 0] for law in random_laws(seed=seed))
    engine = (logp + 0.3 * random_laws(seed=seed + 50)[0][0, 0]).log_softmax(-1)
    exact = logit_gradient(lambda x: opd.reverse_kl(x, logq), logp)
    reward, eye = logq - logp, torch.eye(6, dtype=torch.float64)

    def drawn_by_the_engine(weights):
        return sum(engine.exp()[a] * weights[a] * -reward[a] * (eye[a] - logp.exp())
                   for a in range(6))  # fmt: skip

    free = opd.truncated_importance_weights(logp, engine, 1e9)
    assert torch.allclose(drawn_by_the_engine(free), exact, atol=1e-12)
    assert (drawn_by_the_engine(torch.ones(6)) - exact).abs().max() > 5e-3
    capped = opd.truncated_importance_weights(logp, engine, 1.05)
    assert (drawn_by_the_engine(capped) - exact).abs().max() > 1e-3  # the price of the cap


# (23) sampling agrees with enumeration


def agrees(per_sample, exact):
    """Is the samples' mean within four standard errors of the exact gradient, and not trivially?"""
    error = (per_sample.mean(0) - exact).abs()
    allowed = 4 * per_sample.std(0) / math.sqrt(len(per_sample))
    return bool((error <= allowed + 1e-12).all() and (allowed < exact.abs().max() / 4).all())


def test_sampled_cr_opd_within_four_standard_errors():
    logp, logq = (law[0, 0] for law in random_laws(seed=5))
    n, g, reach = 40_000, torch.Generator().manual_seed(0), dict(top_k=4, min_prob=0.02)
    slopes = torch.stack([
        logit_gradient(lambda x, a=a: opd.cr_opd_loss(x, logq, torch.tensor(a), **reach), logp)
        for a in range(6)
    ])  # fmt: skip
    tokens = torch.multinomial(logp.exp(), n, replacement=True, generator=g)
    z = logp.clone().requires_grad_()
    law, teacher = z.log_softmax(-1).expand(n, -1), logq.expand(n, -1)
    opd.cr_opd_loss(law, teacher, tokens, **reach).mean().backward()
    assert torch.allclose(z.grad, slopes[tokens].mean(0), atol=1e-12)
    exact = logp.exp() @ slopes
    assert agrees(slopes[tokens], exact)
    plain = logit_gradient(lambda x: opd.reverse_kl(x, logq), logp)
    assert not agrees(slopes[tokens], plain)  # the check can tell it from the reverse KL


@pytest.mark.parametrize("credit", ["return_to_go", "gae"])
def test_sampled_credit_within_four_standard_errors(credit):
    tree = Tree(seed=1)
    n, g = 40_000, torch.Generator().manual_seed(0)
    values = torch.tensor([-0.5, -0.2, -0.8, -0.4], dtype=torch.float64)[tree.states]

    def advantage(rows):
        reward, mask = tree.reward[rows], tree.mask[rows]
        if credit == "return_to_go":
            return opd.discounted_return(reward, mask, 1.0)
        return opd.gae(reward, values[rows], mask, 1.0, 0.9)[0]

    rows = torch.multinomial(tree.share, n, replacement=True, generator=g)
    credits, eye = advantage(rows), torch.eye(3, dtype=torch.float64)
    per_sample = torch.zeros(n, *tree.z.shape, dtype=torch.float64)
    for t in range(2):
        state, token = tree.states[rows, t], tree.tokens[rows, t]
        slope = -credits[:, t, None] * (eye[token] - tree.logp.exp()[state])
        per_sample[torch.arange(n), state] += slope
    loss = lambda x: opd.policy_gradient_loss(x[rows], credits, tree.mask[rows])  # noqa: E731
    sampled = tree.gradient(lambda x: loss(x).sum() / n)
    assert torch.allclose(sampled, per_sample.mean(0), atol=1e-12)
    assert agrees(per_sample, tree.expected(advantage(torch.arange(len(tree.tokens)))))
    assert agrees(per_sample, tree.exact()) == (credit == "return_to_go")
    immediate = tree.expected(opd.discounted_return(tree.reward, tree.mask, 0.0))
    assert not agrees(per_sample, immediate)
