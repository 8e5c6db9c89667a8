"""§6, §10: baselines, returns and generalised advantages, enumerated over every text of a tree.

Numbers in brackets are the checks of the project's formula list: (9) baselines, (10) GAE,
(11) the two-step problem.
"""

import math

import pytest
import torch
from conftest import Tree, logit_gradient, random_laws, score_weighted, tiny_llama

import opd

# (9) baselines


@pytest.mark.parametrize("seed", range(3))
def test_the_kl_baseline_and_any_constant_leave_the_expected_gradient(seed):
    logp, logq = (law[0, 0] for law in random_laws(seed=seed))
    p, reward = logp.exp(), opd.log_ratio_reward(logp, logq)
    baseline = opd.kl_baseline(logp, logq)
    assert baseline.item() == pytest.approx((p * reward).sum().item(), abs=1e-12)  # E_a[r]
    assert abs((p * (reward - baseline)).sum()) < 1e-12
    exact = logit_gradient(lambda x: opd.reverse_kl(x, logq), logp)
    for b in (baseline, 3.0, -17.0):
        assert torch.allclose(score_weighted(p, -(reward - b)), exact, atol=1e-11)
    of_the_token = score_weighted(p, -(reward - reward**2))  # a baseline that reads the token
    assert (of_the_token - exact).abs().max() > 0.05


@pytest.mark.parametrize("seed", range(3))
def test_the_kl_baseline_has_no_gradient_and_is_not_that_of_least_variance(seed):
    logp, logq = (law[0, 0] for law in random_laws(seed=seed))
    eye, p, reward = torch.eye(6, dtype=logp.dtype), logp.exp(), logq - logp

    def variance(b):
        each = -(reward - b)[:, None] * (eye - p)  # the gradient for each token drawn
        return (p[:, None] * (each - p @ each) ** 2).sum()

    size = ((eye - p) ** 2).sum(1)
    best, ours = (p * size * reward).sum() / (p * size).sum(), opd.kl_baseline(logp, logq)
    assert variance(best) < variance(ours) and variance(best) < variance(0.0)
    assert variance(best) < min(variance(best + 1e-3), variance(best - 1e-3))
    assert not opd.kl_baseline(logp.requires_grad_(), logq).requires_grad


@pytest.mark.parametrize("gamma", [0.0, 0.7, 1.0])
def test_leave_one_out_of_each_position_is_unbiased(gamma):
    """Every pair of texts of one prompt, each with its probability."""
    tree = Tree()
    n = len(tree.tokens)
    first, second = torch.cartesian_prod(torch.arange(n), torch.arange(n)).T
    returns = opd.discounted_return(tree.reward, tree.mask, gamma)
    rows = torch.stack([first, second], 1).flatten()  # pair by pair: one prompt's two samples
    advantage = opd.leave_one_out(returns[rows], 2)
    assert torch.allclose(advantage[0::2], returns[first] - returns[second], atol=1e-12)
    chance = (tree.share[first] * tree.share[second]).repeat_interleave(2)

    def objective(x):
        loss = opd.policy_gradient_loss(x[rows], advantage, tree.mask[rows])
        return (chance[:, None] * loss).sum() / 2

    assert torch.allclose(tree.gradient(objective), tree.expected(returns), atol=1e-12)


def test_leave_one_out_does_not_read_its_own_row_nor_other_prompts_or_positions():
    g = torch.Generator().manual_seed(0)
    reward = torch.randn(6, 4, generator=g, dtype=torch.float64)
    advantage, changed = opd.leave_one_out(reward, 3), reward.clone()
    changed[1, 2] += 7.0
    moved = opd.leave_one_out(changed, 3) - advantage
    expected = torch.zeros(6, 4, dtype=torch.float64)
    expected[:3, 2] = torch.tensor([-3.5, 7.0, -3.5], dtype=torch.float64)
    assert torch.allclose(moved, expected, atol=1e-12)
    for column in range(4):  # a column by itself is the (B,) form
        alone = opd.leave_one_out(reward[:, column], 3)
        assert torch.allclose(alone, advantage[:, column], atol=1e-12)


# (10) GAE


def rows_for_gae(seed=0):
    """Rewards and values (5, 6), a mask of lengths 6, 1, 4, 0, 3, and bootstraps (5,)."""
    g = torch.Generator().manual_seed(seed)
    reward, value = torch.randn(2, 5, 6, generator=g, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([6, 1, 4, 0, 3])[:, None]
    return reward, value, mask, torch.randn(5, generator=g, dtype=torch.float64)


def double_sum(reward, value, mask, gamma, lam, bootstrap):
    """A_t = sum_k (gamma lam)^k delta_{t+k}, written out."""
    out = torch.zeros_like(reward)
    for i, n in enumerate(mask.sum(1).tolist()):
        after = [*value[i, 1:n].tolist(), 0.0 if bootstrap is None else bootstrap[i].item()]
        delta = [reward[i, t].item() + gamma * after[t] - value[i, t].item() for t in range(n)]
        for t in range(n):
            out[i, t] = sum((gamma * lam) ** k * delta[t + k] for k in range(n - t))
    return out


@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("given", [False, True])
def test_the_recursion_equals_the_double_sum(gamma, lam, given):
    reward, value, mask, bootstrap = rows_for_gae()
    bootstrap = bootstrap if given else None
    advantage, target = opd.gae(reward, value, mask, gamma, lam, bootstrap)
    expected = double_sum(reward, value, mask, gamma, lam, bootstrap)
    assert torch.allclose(advantage, expected, atol=1e-12)
    assert torch.allclose(target, torch.where(mask, expected + value, 0.0), atol=1e-12)
    assert (advantage[~mask] == 0).all() and (target[~mask] == 0).all()


def test_the_limits_of_gae():
    reward, value, mask, _ = rows_for_gae()
    kept = lambda x: torch.where(mask, x, 0.0)  # noqa: E731
    none = torch.zeros_like(value)
    returns = opd.discounted_return(reward, mask, 0.6)
    monte_carlo = opd.gae(reward, value, mask, 0.6, 1.0)
    assert torch.allclose(monte_carlo[0], kept(returns - value), atol=1e-12)
    assert torch.allclose(monte_carlo[1], returns, atol=1e-12)  # lam = 1: the target is the return
    after = torch.nn.functional.pad(kept(value)[:, 1:], (0, 1))
    one_step = opd.gae(reward, value, mask, 0.6, 0.0)[0]
    assert torch.allclose(one_step, kept(reward + 0.6 * after - value), atol=1e-12)
    for lam in (0.0, 0.5, 1.0):
        immediate = opd.gae(reward, value, mask, 0.0, lam)[0]
        assert torch.allclose(immediate, kept(reward - value), atol=1e-12)
    to_go = kept(reward).flip(1).cumsum(1).flip(1)
    assert torch.allclose(opd.gae(reward, none, mask, 1.0, 1.0)[0], kept(to_go), atol=1e-12)
    assert torch.allclose(opd.discounted_return(reward, mask, 1.0), kept(to_go), atol=1e-12)
    assert torch.equal(opd.discounted_return(reward, mask, 0.0), kept(reward))


def test_a_bootstrap_counts_where_it_is_given_and_decays_with_the_distance_to_the_cut():
    reward, value, mask, bootstrap = rows_for_gae()
    finished = torch.tensor([True, False, False, False, True])
    bootstrap = torch.where(finished, 0.0, bootstrap)
    gain = (
        opd.gae(reward, value, mask, 0.9, 0.5, bootstrap)[0]
        - opd.gae(reward, value, mask, 0.9, 0.5)[0]
    )
    left = mask.sum(1, keepdim=True) - 1 - torch.arange(6)  # steps to the last token
    expected = torch.where(mask, 0.9 * bootstrap[:, None] * 0.45 ** left.clamp(min=0), 0.0)
    assert torch.allclose(gain, expected, atol=1e-12)
    assert (gain[finished] == 0).all() and gain[2, 3].abs() > 0.01


@pytest.mark.parametrize("junk", [torch.nan, torch.inf, 1e30])
def test_masked_places_never_leak_into_advantages(junk):
    reward, value, mask, bootstrap = rows_for_gae()
    clean = opd.gae(reward, value, mask, 0.9, 0.5, bootstrap)
    dirty = [torch.where(mask, x, junk) for x in (reward, value)]
    for a, b in zip(clean, opd.gae(*dirty, mask, 0.9, 0.5, bootstrap), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(
        opd.discounted_return(dirty[0], mask, 0.9), opd.discounted_return(reward, mask, 0.9)
    )


def test_neither_reward_nor_value_gets_a_gradient_from_gae():
    reward, value, mask, bootstrap = (x.clone() for x in rows_for_gae())
    live = [x.requires_grad_() for x in (reward, value, bootstrap)]
    for x in opd.gae(*live[:2], mask, 0.9, 0.5, live[2]):
        assert not x.requires_grad


# (11) the two-step problem


@pytest.mark.parametrize("seed", range(3))
def test_return_to_go_is_the_gradient_of_the_sequence_kl_and_immediate_credit_is_not(seed):
    tree = Tree(vocab=4, seed=seed)
    exact = tree.exact()
    to_go = tree.expected(opd.discounted_return(tree.reward, tree.mask, 1.0))
    assert torch.allclose(to_go, exact, atol=1e-12)
    immediate = tree.expected(opd.discounted_return(tree.reward, tree.mask, 0.0))
    future = opd.reverse_kl(tree.logp, tree.logq)[1:]  # f(a), the KL after the first token a
    p = tree.logp[0].exp()
    gap = torch.zeros_like(exact)
    gap[0] = -p * (future - p @ future)
    assert torch.allclose(immediate - exact, gap, atol=1e-12) and gap.abs().max() > 0.01
    half = tree.expected(opd.discounted_return(tree.reward, tree.mask, 0.5))
    assert torch.allclose(half - exact, gap / 2, atol=1e-12)


def test_immediate_credit_is_the_gradient_of_each_visited_states_kl():
    tree = Tree()
    z = tree.z.clone().requires_grad_()
    kl = opd.reverse_kl(z.log_softmax(-1), tree.logq)
    visits = torch.cat([torch.ones(1, dtype=kl.dtype), tree.logp[0].exp()])  # frozen
    (visits * kl).sum().backward()
    immediate = tree.expected(opd.discounted_return(tree.reward, tree.mask, 0.0))
    assert torch.allclose(immediate, z.grad, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_at_lambda_one_any_critic_is_unbiased_and_below_one_a_wrong_critic_biases(gamma):
    tree = Tree()
    g = torch.Generator().manual_seed(5)
    value = torch.randn(len(tree.z), generator=g, dtype=torch.float64)[tree.states]  # wrong
    plain = tree.expected(opd.discounted_return(tree.reward, tree.mask, gamma))
    whole = tree.expected(opd.gae(tree.reward, value, tree.mask, gamma, 1.0)[0])
    assert torch.allclose(whole, plain, atol=1e-12)
    trusting = tree.expected(opd.gae(tree.reward, value, tree.mask, gamma, 0.0)[0])
    assert ((trusting - plain).abs().max() > 0.01) == (gamma > 0)
    future = torch.cat([torch.zeros(1).double(), -opd.reverse_kl(tree.logp, tree.logq)[1:]])
    right = tree.expected(opd.gae(tree.reward, future[tree.states], tree.mask, gamma, 0.0)[0])
    assert torch.allclose(right, plain, atol=1e-12)  # the true value of what is left does not


# §10: what a training step makes of it


class Feedback:
    """The state of a training step on some texts of a tree; no model is run."""

    def __init__(self, tree, rows, monkeypatch, critic=None, cut=False, **fields):
        self.tree, self.rows = tree, rows
        fields = dict(route="policy_gradient") | fields
        self.config = opd.Config.load(batch_size=len(rows), **fields)
        tokens, mask = tree.tokens[rows], tree.mask[rows]
        nobody = torch.zeros(len(rows), 1, dtype=torch.long)
        drawn, finished = tree.logp_a[rows], torch.full((len(rows),), not cut)
        self.rollout = opd.Rollout(nobody, nobody.bool(), tokens, mask, drawn, finished)
        self.logq = tree.logq[tree.states[rows]].flatten(0, 1)  # (N, V), a teacher that answers [n]
        vocab = dict(vocab_size=tree.logq.shape[-1], eos_ids=[])
        self.world = opd.World(tiny_llama(vocab=3), None, None, None, vocab, critic=critic)
        monkeypatch.setattr(opd, "CHUNK_LOGITS", 1)
        monkeypatch.setattr(opd, "hidden_states", self.features)

    def features(self, model, part, beyond):
        """One-hot of the state: 0, the one after the first token, and 0 again after the last."""
        first = 1 + part.tokens[:, 0]
        return torch.eye(len(self.tree.z))[torch.stack([first * 0, first, first * 0], 1)]

    def reward(self, right=None):
        right = torch.zeros(len(self.rows), dtype=torch.bool) if right is None else right
        return opd.judge(self.config, self.world, self.rollout, self.logq, right)

    def advantage(self, step=10**6, right=None):
        return opd.credit(self.config, self.world, self.rollout, self.reward(right), step)

    def loss(self, logp, advantage):
        """`token_loss` of every token, in chunks, for log-probs (1 + V, V) of the student."""
        logp = logp[self.tree.states[self.rows]].flatten(0, 1)
        each = (self.rollout.tokens, advantage, self.rollout.logprobs)
        action, advantage, drawn = (table.flatten() for table in each)
        parts = [
            opd.token_loss(self.config, logp[n], self.logq[n], action[n], advantage[n], drawn[n], n)
            for n in opd.chunks(len(action), logp.shape[-1])
        ]
        return torch.cat(parts).view(len(self.rows), -1)

    def descends(self, advantage, chance):
        """The expected gradient (1 + V, V) in the logits; chance (B,): of each row."""
        z = self.tree.z.clone().requires_grad_()
        (chance[:, None] * self.loss(z.log_softmax(-1), advantage)).sum().backward()
        return z.grad


def all_texts(tree):
    return torch.arange(len(tree.tokens))


def test_the_reward_is_that_of_the_samplers_own_log_probs(monkeypatch):
    """Whatever chunk reads the teacher; the verifier's is 1 or 0 for all tokens of a row."""
    tree = Tree()
    mine = Feedback(tree, all_texts(tree), monkeypatch)
    assert len(opd.chunks(18, 3)) == 2
    assert torch.allclose(mine.reward(), tree.reward, atol=1e-12)
    mine.rollout.logprobs = tree.logp_a - 0.25  # another engine's
    assert torch.allclose(mine.reward(), tree.reward + 0.25, atol=1e-12)
    right = torch.arange(9) % 2 == 0
    judged = Feedback(tree, all_texts(tree), monkeypatch, feedback="verifier")
    assert torch.equal(judged.reward(right), right[:, None].expand(9, 2).double())
    assert torch.equal(judged.advantage(right=right), judged.reward(right))
    direct = Feedback(tree, all_texts(tree), monkeypatch, route="direct")
    assert not direct.reward().any() and not direct.advantage().any()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("baseline", ["none", "kl"])
def test_a_baseline_does_not_change_what_training_descends(baseline, gamma, monkeypatch):
    """The baseline is taken off once, from the return: off every reward it would cancel the
    future's mean, and return-to-go would silently be immediate credit."""
    tree = Tree()
    plain = tree.expected(opd.discounted_return(tree.reward, tree.mask, gamma))
    step = Feedback(tree, all_texts(tree), monkeypatch, gamma=gamma, baseline=baseline)
    found = step.descends(step.advantage(), tree.share)
    assert torch.allclose(found, plain, atol=1e-12) and plain.abs().max() > 0.01


def test_the_kl_baseline_of_training_is_each_states_own(monkeypatch):
    """Off the advantage, in the loss: at ratio 1 the loss is minus the advantage."""
    tree = Tree()
    step = Feedback(tree, all_texts(tree), monkeypatch, gamma=0.5, baseline="kl")
    returns = opd.discounted_return(tree.reward, tree.mask, 0.5)
    assert torch.allclose(step.advantage(), returns, atol=1e-12)
    centred = returns + opd.reverse_kl(tree.logp, tree.logq)[tree.states]
    assert torch.allclose(step.loss(tree.logp, returns), -centred, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_leave_one_out_in_training_descends_what_no_baseline_does(gamma, monkeypatch):
    tree = Tree()
    n = len(tree.tokens)
    rows = torch.cartesian_prod(torch.arange(n), torch.arange(n)).flatten()
    fields = dict(gamma=gamma, baseline="leave_one_out", samples_per_prompt=2)
    step = Feedback(tree, rows, monkeypatch, **fields)
    advantage = step.advantage()
    chance = tree.share[rows].view(-1, 2).prod(1).repeat_interleave(2) / 2
    plain = tree.expected(opd.discounted_return(tree.reward, tree.mask, gamma))
    assert torch.allclose(step.descends(advantage, chance), plain, atol=1e-12)
    returns = opd.discounted_return(tree.reward, tree.mask, gamma)[rows]
    assert torch.allclose(advantage, opd.leave_one_out(returns, 2), atol=1e-12)


def test_in_training_the_critic_goes_on_after_a_cut_and_not_after_an_eos(monkeypatch):
    tree, critic = Tree(), torch.nn.Linear(4, 1)
    value = (critic.weight[0] + critic.bias).detach().double()
    fields = dict(gamma=0.9, baseline="value", gae_lambda=0.7)
    for cut in (False, True):
        step = Feedback(tree, all_texts(tree), monkeypatch, critic, cut, **fields)
        after = value[0].expand(9) * cut  # the state after the last token: see features
        args = tree.reward, value[tree.states], tree.mask, 0.9, 0.7, after
        assert torch.allclose(step.advantage(), opd.gae(*args)[0], atol=1e-6)
        first = step.advantage(step=opd.VALUE_WARMUP - 1)  # as yet the critic only learns
        assert torch.allclose(first, opd.discounted_return(tree.reward, tree.mask, 0.9))
    assert value[0].abs() > 1e-3


@pytest.mark.parametrize("micro_batch", [None, 4])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_a_critic_in_training_at_lambda_one_descends_what_no_baseline_does(
    gamma, micro_batch, monkeypatch
):
    tree, critic = Tree(), torch.nn.Linear(4, 1)  # one weight a state, random
    fields = dict(gamma=gamma, baseline="value", gae_lambda=1.0, micro_batch=micro_batch)
    step = Feedback(tree, all_texts(tree), monkeypatch, critic, **fields)
    advantage = step.advantage()
    plain = tree.expected(opd.discounted_return(tree.reward, tree.mask, gamma))
    assert torch.allclose(step.descends(advantage, tree.share), plain, atol=1e-6)  # float32 critic
    value = (critic.weight[0] + critic.bias).detach().double()[tree.states]
    expected = opd.gae(tree.reward, value, tree.mask, gamma, 1.0)
    assert torch.allclose(advantage, expected[0], atol=1e-6)
    error = (value - expected[1]).mean(0) / 2  # the mean over the texts and the two places
    slope = torch.zeros(4, dtype=torch.float64)
    slope.index_add_(0, tree.states.flatten(), ((value - expected[1]) / 18).flatten())
    assert torch.allclose(critic.weight.grad[0].double(), slope, atol=1e-6)
    assert math.isclose(critic.bias.grad.item(), error.sum().item(), abs_tol=1e-6)
