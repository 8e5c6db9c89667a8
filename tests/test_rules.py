"""The papers' rules of notebooks/lab: their pure functions against enumeration.

Numbers in brackets are the checks of the project's formula list: (7) other divergences' advantages,
(16) ExOPD, (18) IW-OPD and Prune-OPD.
"""

import lab
import pytest
import torch
from conftest import logit_gradient, random_laws, score_weighted

import opd

Q = torch.tensor([0.2, 0.1, 0.7], dtype=torch.float64)
REFERENCE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)

# (7) other divergences by their own advantage

F_OF_U = {  # sum_v q f(p/q)
    "reverse_kl": lambda u, beta: u * u.log(),
    "forward_kl": lambda u, beta: -u.log(),
    "jsd": lambda u, beta: (
        (1 - beta) * u * (u / (beta + (1 - beta) * u)).log() - beta * (beta + (1 - beta) * u).log()
    ),
}
DIVERGENCES = [("reverse_kl", 0.5), ("forward_kl", 0.5), *(("jsd", b) for b in (0.1, 0.5, 0.8))]


def direct(divergence, beta, logp, logq):
    """The divergence itself."""
    if divergence == "jsd":
        return opd.jsd(logp, logq, beta)
    return {"reverse_kl": opd.reverse_kl, "forward_kl": opd.forward_kl}[divergence](logp, logq)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("divergence, beta", DIVERGENCES)
def test_each_advantage_descends_its_own_divergence(divergence, beta, seed):
    logp, logq = (law[0, 0] for law in random_laws(seed=seed))
    advantage = lab.divergence_advantage(logp, logq, divergence, beta)
    expected = logit_gradient(lambda x: direct(divergence, beta, x, logq), logp)
    assert torch.allclose(score_weighted(logp.exp(), -advantage), expected, atol=1e-12)
    assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("divergence, beta", DIVERGENCES)
def test_f_over_u_in_place_of_its_slope_is_right_for_the_reverse_kl_only(divergence, beta):
    logp, logq = (law[0, 0] for law in random_laws(seed=1))
    u, f = (logp - logq).exp(), F_OF_U[divergence]
    value = (logq.exp() * f(u, beta)).sum()
    assert torch.allclose(value, direct(divergence, beta, logp, logq), atol=1e-12)
    recipe = score_weighted(logp.exp(), f(u, beta) / u)
    exact = score_weighted(logp.exp(), -lab.divergence_advantage(logp, logq, divergence, beta))
    assert ((recipe - exact).abs().max() < 1e-12) == (divergence == "reverse_kl")
    if divergence == "reverse_kl":  # and even there only when written as u log u
        other = score_weighted(logp.exp(), (u * u.log() - u + 1) / u)
        assert (other - exact).abs().max() > 0.01


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_no_advantage_carries_a_gradient(divergence):
    logp, logq = (law[..., 0].requires_grad_() for law in random_laws())
    assert not lab.divergence_advantage(logp, logq, divergence, 0.3).requires_grad


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
    assert update(rest, lab.tilted_teacher(Q.log(), REFERENCE.log(), 1.25)).abs().max() < 1e-12


@pytest.mark.parametrize("scale", [0.3, 1.0, 1.25, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_tilted_teacher_is_at_rest_at_its_optimum_only(scale, seed):
    logp, logq = (law[0, 0] for law in random_laws(seed=seed))
    logref = random_laws(seed=seed + 100)[0][0, 0]
    target, rest = lab.tilted_teacher(logq, logref, scale), optimum(scale, logq, logref)
    assert update(rest, target).abs().max() < 1e-12
    assert (update(logq, target).abs().max() < 1e-12) == (scale == 1)  # it leaves the teacher
    descent = logit_gradient(lambda x: opd.reverse_kl(x, rest), logp)
    assert torch.allclose(update(logp, target), descent, atol=1e-12)  # a constant does not matter
    paper = scale * (logq - logref) - (logp - logref)
    assert (target - logp - paper).std() < 1e-12  # they differ by a constant of the state


def test_scale_one_ignores_the_reference():
    logq, logref = random_laws()
    assert torch.allclose(lab.tilted_teacher(logq, logref, 1.0), logq, atol=1e-12)
    assert (lab.tilted_teacher(logq, logref, 1.25) - logq).abs().max() > 0.05


@pytest.mark.parametrize("scale", [0.5, 1.25])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_an_advantage_descends_the_divergence_to_the_tilted_teacher_itself(divergence, scale):
    """The tilted teacher must be a distribution here: normalised, its mass is 1."""
    logp, logq = (law[0, 0] for law in random_laws(seed=2))
    logref = random_laws(seed=102)[0][0, 0]
    rest, target = optimum(scale, logq, logref), lab.tilted_teacher(logq, logref, scale)
    assert target.exp().sum().item() == pytest.approx(1, abs=1e-12)
    advantage = lab.divergence_advantage(logp, target, divergence, 0.5)
    descent = logit_gradient(lambda x: direct(divergence, 0.5, x, rest), logp)
    assert torch.allclose(score_weighted(logp.exp(), -advantage), descent, atol=1e-12)


@pytest.mark.parametrize("scale", [0.5, 1.25])
def test_at_the_tilted_optimum_no_token_gets_negative_feedback(scale):
    """Routing and the local KL ask for the sign of A: off by log Z, all or none would be wrong."""
    logq, logref = (law[0, 0] for law in random_laws(seed=2))
    rest = optimum(scale, logq, logref)
    reward = opd.log_ratio_reward(rest, lab.tilted_teacher(logq, logref, scale))
    assert reward.abs().max() < 1e-12


# (18) weights by position


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_position_weights_fall_from_the_gain_to_one_as_the_row_drifts(gamma):
    g = torch.Generator().manual_seed(0)
    reward = torch.randn(4, 6, generator=g, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([6, 1, 4, 3])[:, None]
    weights = lab.position_weights(reward, mask, gamma)
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
    weights = lab.position_weights(reward.requires_grad_(), mask, 0.5)
    assert torch.allclose(weights[0, :3], expected, atol=1e-12) and not weights.requires_grad
    assert torch.isfinite(weights).all()
    still = lab.position_weights(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), 0.5)
    assert (still == 1.5).all()  # nothing to correct: no drift


def test_prune_weights_by_hand():
    overlap = torch.tensor([[0.9, 0.6, 0.7, 0.2, 0.9], [0.1] * 5], dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    weights = lab.prune_weights(overlap, mask, tau=0.7, decay=0.3)
    low = torch.tensor([[0, 1, 1, 2, 2], [1, 2, 2, 2, 2]])  # so far, with the token itself
    assert (
        torch.allclose(weights, 1 - 0.3 * low.double(), atol=1e-6)
        and weights.dtype == overlap.dtype
    )


@pytest.mark.parametrize("tau, decay", [(0.5, 0.01), (0.5, 0.4), (0.0, 0.4), (1.1, 2.0)])
def test_prune_weights_never_rise_and_stay_between_zero_and_one(tau, decay):
    g = torch.Generator().manual_seed(1)
    overlap, mask = torch.rand(8, 20, generator=g), torch.rand(8, 20, generator=g) < 0.9
    weights = lab.prune_weights(overlap, mask, tau, decay)
    assert (weights.diff() <= 0).all() and ((weights >= 0) & (weights <= 1)).all()
    assert ((weights == 1).all(), (weights[:, -1] == 0).all()) == (tau == 0, decay * 20 * tau > 3)


# gates


def test_the_entropy_gate_opens_above_its_threshold_only():
    logq = torch.stack([torch.zeros(4), torch.tensor([0.0, -80.0, -80.0, -80.0])]).double()
    logq = logq.log_softmax(-1)
    for threshold, opened in ((0.8, [True, False]), (1.4, [False, False]), (-1.0, [True, True])):
        assert lab.entropy_gate(logq, threshold).tolist() == opened
    exactly = opd.entropy(logq)[0].item()
    assert lab.entropy_gate(logq, exactly).tolist() == [False, False]


# The limits of the rules that reshape the reward: what each becomes, and where


@pytest.fixture(scope="module")
def judged():
    """A small batch: judge(hooks, method) -> what a rule's judge says, or opd's own; (B, T)."""
    fields = dict(batch_size=16, eval_every=0, max_tokens=20, samples_per_prompt=4)
    config = opd.Config.load(method="opd", **fields)
    world = opd.load_world(config)
    rollout = opd.write(config, world, 0, 20)[1]
    right = torch.arange(16) % 3 == 0
    teacher = world.log_probs(config, world.teacher, rollout)

    def judge(rule=None, *args):
        hook = lab.RULES[rule](*args)[1]["judge"] if rule else opd.judge
        return hook(config, world, rollout, teacher, right).detach()[rollout.mask]

    return judge, config, world, rollout, right


def test_soft_log_keeps_signs_and_order_and_small_rewards(judged):
    r, soft = judged[0](), judged[0]("soft_log")
    assert torch.equal(soft.sign(), r.sign()) and torch.equal(soft.argsort(), r.argsort())
    assert ((soft - r).abs() <= r**2 / 2 + 1e-7).all() and (soft.abs() <= r.abs() + 1e-7).all()
    assert r.abs().max() > 5 and soft.abs().max() == pytest.approx(r.abs().max().log1p().item())


def test_power_opd_is_the_difference_of_probabilities_at_1_and_the_log_ratio_near_0(judged):
    r, logp = judged[0](), judged[3].logprobs[judged[3].mask]
    small = judged[0]("power_opd", 1e-3) / 1e-3
    assert ((small - r).abs() <= 2e-3 * (1 + r.abs() + logp.abs()) ** 2).all()
    assert torch.allclose(judged[0]("power_opd", 1.0), (logp + r).exp() - logp.exp(), atol=1e-6)


def test_clipping_is_opd_where_nothing_is_beyond(judged):
    r = judged[0]()
    assert torch.equal(judged[0]("clipped", 1e9), r)
    assert judged[0]("clipped", 1.0).abs().max() == 1 < r.abs().max()


def test_veto_is_opd_at_0_and_its_target_is_normalised(judged):
    judge, config, world, rollout, _ = judged
    assert torch.allclose(judge("veto", 0.0), judge(), atol=1e-5)
    with torch.no_grad():
        logp, logq = (
            world.log_probs(config, m, rollout)[slice(None)] for m in (world.student, world.teacher)
        )
    target = (logq.exp() * logp.exp() ** 0.5).log().log_softmax(-1)
    action = rollout.tokens[rollout.mask]
    expected = opd.of_tokens(target, action) - rollout.logprobs[rollout.mask]
    assert torch.allclose(judge("veto", 0.5), expected, atol=1e-4)


def test_kdrl_is_reinforce_at_0_and_adds_the_gradient_of_k2(judged):
    judge, _, _, rollout, right = judged
    sparse = opd.leave_one_out(right.float(), 4)[:, None].expand(rollout.mask.shape)[rollout.mask]
    assert torch.equal(judge("kdrl", 0.0), sparse)
    assert torch.allclose((judge("kdrl", 0.5) - sparse) / 0.5, judge(), atol=1e-5)
    logp_a = torch.tensor([-1.3, -0.2], requires_grad=True)
    k2 = (torch.tensor([-0.4, -2.0]) - logp_a) ** 2 / 2
    (gradient,) = torch.autograd.grad(k2.sum(), logp_a)
    assert torch.allclose(gradient, -opd.log_ratio_reward(logp_a, torch.tensor([-0.4, -2.0])))


def test_rg_opd_is_opd_where_the_verifier_agrees_and_nothing_elsewhere(judged):
    _, config, world, rollout, _ = judged
    weights = lab.RULES["rg_opd"]()[1]["weights"]
    reward = torch.where(torch.arange(20) % 2 == 0, 1.0, -1.0).expand(rollout.mask.shape)
    plain = opd.weights(config, world, rollout, None, reward, None)
    for right in (torch.ones(16).bool(), torch.zeros(16).bool()):
        found = weights(config, world, rollout, None, reward, right)
        agrees = (reward > 0) == right[:, None]
        assert torch.equal(found[agrees], plain[agrees]) and (found[~agrees] == 0).all()


def test_opsa_pushes_the_least_likely_share_down_and_all_of_them_nowhere(judged):
    judge, _, _, rollout, _ = judged
    logp, found = rollout.logprobs[rollout.mask], judge("opsa", 0.2)
    assert found.mean() == pytest.approx(-0.2, abs=0.02) and {*found.tolist()} == {0.0, -1.0}
    assert logp[found < 0].max() <= logp[found == 0].min()
    assert (judge("opsa", 1.0) == -1).all()  # a constant: its expected gradient is 0
    law = random_laws()[0][0, 0]
    assert score_weighted(law.exp(), torch.ones_like(law)).abs().max() < 1e-12


@pytest.mark.parametrize("rule", ["soft_log", "power_opd", "clipped", "veto", "kdrl", "rg_opd",
                                  "opsa"])  # fmt: skip
def test_each_new_rule_trains(rule, run_dir, quick):
    fields = dict(batch_size=8, steps=1, eval_prompts=4, max_tokens=8, eval_every=0)
    run = lab.train(rule, **fields)
    assert run.result["steps"] == 1 and run.dir.name.startswith(rule)
