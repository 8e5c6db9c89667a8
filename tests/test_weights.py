"""§7: what a token weighs, gates, and targets beyond the teacher; sampling against enumeration.

Numbers in brackets are the checks of the project's formula list: (16) ExOPD, (18) IW-OPD and
Prune-OPD, (23) Monte Carlo.  (20) is in test_states.py and test_scores.py, (22) in test_scores.py.
"""

import math

import pytest
import torch
from conftest import Tree, logit_gradient, random_laws, score_weighted

import opd

Q = torch.tensor([0.2, 0.1, 0.7], dtype=torch.float64)
REFERENCE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)

# (16) ExOPD


def optimum(scale, logq, logref):
    """q^scale ref^(1 - scale), renormalised: log-probs."""
    return (scale * logq + (1 - scale) * logref).log_softmax(-1)


def update(logp, target):
    """The expected gradient of a policy gradient whose reward is target - log p."""
    return score_weighted(logp.exp(), -(target - logp))


def test_golden_optimum_past_the_teacher():
    rest = optimum(1.25, Q.log(), REFERENCE.log())
    golden = torch.tensor([0.13338037, 0.06371866, 0.80290097], dtype=torch.float64)
    assert torch.allclose(rest.exp(), golden, atol=1e-8)
    assert update(rest, opd.tilted_teacher(Q.log(), REFERENCE.log(), 1.25)).abs().max() < 1e-12


@pytest.mark.parametrize("scale", [0.3, 1.0, 1.25, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_tilted_teacher_is_at_rest_at_its_optimum_only(scale, seed):
    logp, logq = (law[0, 0] for law in random_laws(seed=seed))
    logref = random_laws(seed=seed + 100)[0][0, 0]
    target, rest = opd.tilted_teacher(logq, logref, scale), optimum(scale, logq, logref)
    assert update(rest, target).abs().max() < 1e-12
    assert (update(logq, target).abs().max() < 1e-12) == (scale == 1)  # it leaves the teacher
    descent = logit_gradient(lambda x: opd.reverse_kl(x, rest), logp)
    assert torch.allclose(update(logp, target), descent, atol=1e-12)  # a constant does not matter
    paper = scale * (logq - logref) - (logp - logref)
    assert (target - logp - paper).std() < 1e-12  # they differ by a constant of the state


def test_scale_one_ignores_the_reference():
    logq, logref = random_laws()
    assert torch.allclose(opd.tilted_teacher(logq, logref, 1.0), logq, atol=1e-12)
    assert (opd.tilted_teacher(logq, logref, 1.25) - logq).abs().max() > 0.05


def credit_of_each_token(logp, logq, logref, **fields):
    """The advantages (V,) that a training step notes for every token of one state."""
    config = opd.Config.load(route="policy_gradient", reference="student", **fields)
    V = len(logp)
    table = {name: torch.zeros(V, dtype=logp.dtype) for name in ("before", "advantage")}
    table["action"] = torch.arange(V)
    taught = opd.tilted_teacher(logq, logref, config.reward_scale)
    opd.first_look(config, table, torch.arange(V), logp.expand(V, V), taught.expand(V, V))
    return table["advantage"]


@pytest.mark.parametrize("scale", [0.5, 1.25])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_training_descends_the_divergence_to_the_tilted_law_itself(divergence, scale):
    """The tilted teacher must be a law here: its mass is not 1 before it is normalised."""
    logp, logq = (law[0, 0] for law in random_laws(seed=2))
    logref = random_laws(seed=102)[0][0, 0]
    rest = optimum(scale, logq, logref)
    fields = dict(divergence=divergence, reward_scale=scale)
    advantage = credit_of_each_token(logp, logq, logref, **fields)
    kind = dict(reverse_kl=opd.reverse_kl, forward_kl=opd.forward_kl)
    loss = kind.get(divergence, lambda x, y: opd.jsd(x, y, 0.5))
    descent = logit_gradient(lambda x: loss(x, rest), logp)
    assert torch.allclose(score_weighted(logp.exp(), -advantage), descent, atol=1e-12)


@pytest.mark.parametrize("scale", [0.5, 1.25])
def test_at_the_tilted_optimum_no_token_gets_negative_feedback(scale):
    """Routing and the local KL ask for the sign of A: off by log Z, all or none would be wrong."""
    logq, logref = (law[0, 0] for law in random_laws(seed=2))
    rest = optimum(scale, logq, logref)
    assert credit_of_each_token(rest, logq, logref, reward_scale=scale).abs().max() < 1e-12


# (18) weights by position


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_position_weights_fall_from_the_gain_to_one_as_the_row_drifts(gamma):
    g = torch.Generator().manual_seed(0)
    reward = torch.randn(4, 6, generator=g, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([6, 1, 4, 3])[:, None]
    weights = opd.position_weights(reward, mask, gamma)
    for i, n in enumerate(mask.sum(1).tolist()):
        size = reward[i, :n].abs()
        for t in range(n):
            expected = 1 + gamma * (1 - size[:t].sum() / size.sum())
            assert weights[i, t].item() == pytest.approx(expected.item(), abs=1e-12)
        w = weights[i, :n]
        assert w[0] == 1 + gamma and (w >= 1).all() and (w.diff() <= 1e-12).all()
        last = 1 + gamma * size[-1] / size.sum()
        assert w[-1].item() == pytest.approx(last.item(), abs=1e-12)


def test_position_weights_read_sizes_of_valid_tokens_only_and_carry_no_gradient():
    reward = torch.tensor([[1.0, -2.0, 1.0, torch.nan, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False, False]])
    expected = torch.tensor([1.5, 1.375, 1.125], dtype=torch.float64)
    weights = opd.position_weights(reward.requires_grad_(), mask, 0.5)
    assert torch.allclose(weights[0, :3], expected, atol=1e-12) and not weights.requires_grad
    assert torch.isfinite(weights).all()
    still = opd.position_weights(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), 0.5)
    assert (still == 1.5).all()  # nothing to correct: no drift


def test_prune_weights_by_hand():
    overlap = torch.tensor([[0.9, 0.6, 0.7, 0.2, 0.9], [0.1] * 5], dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    weights = opd.prune_weights(overlap, mask, tau=0.7, decay=0.3)
    low = torch.tensor([[0, 1, 1, 2, 2], [1, 2, 2, 2, 2]])  # so far, with the token itself
    assert (
        torch.allclose(weights, 1 - 0.3 * low.double(), atol=1e-6)
        and weights.dtype == overlap.dtype
    )


@pytest.mark.parametrize("tau, decay", [(0.5, 0.01), (0.5, 0.4), (0.0, 0.4), (1.1, 2.0)])
def test_prune_weights_never_rise_and_stay_between_zero_and_one(tau, decay):
    g = torch.Generator().manual_seed(1)
    overlap, mask = torch.rand(8, 20, generator=g), torch.rand(8, 20, generator=g) < 0.9
    weights = opd.prune_weights(overlap, mask, tau, decay)
    assert (weights.diff() <= 0).all() and ((weights >= 0) & (weights <= 1)).all()
    assert ((weights == 1).all(), (weights[:, -1] == 0).all()) == (tau == 0, decay * 20 * tau > 3)


# gates and importance weights


def test_the_entropy_gate_opens_above_its_threshold_only():
    logq = torch.stack([torch.zeros(4), torch.tensor([0.0, -80.0, -80.0, -80.0])]).double()
    logq = logq.log_softmax(-1)
    for threshold, opened in ((0.8, [True, False]), (1.4, [False, False]), (-1.0, [True, True])):
        assert opd.entropy_gate(logq, threshold).tolist() == opened
    exactly = opd.entropy(logq)[0].item()
    assert opd.entropy_gate(logq, exactly).tolist() == [False, False]


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
