"""§5, §6: the two routes.  Exact identities in float64; the vocabulary is enumerated, not sampled.

Numbers in brackets are the checks of the project's formula list: (1) logit gradients, (2) the two
routes agree, (4) k1, k2, k3, (5) the missing detach, (6) JSD, (23) Monte Carlo.
"""

import math

import pytest
import torch
from conftest import logit_gradient, random_laws, score_weighted

import opd

P = torch.tensor([0.7, 0.25, 0.05], dtype=torch.float64)
Q = torch.tensor([0.2, 0.1, 0.7], dtype=torch.float64)


# (1) values and gradients


def test_golden_values():
    assert opd.reverse_kl(P.log(), Q.log()).item() == pytest.approx(0.97405389, abs=1e-8)
    assert opd.forward_kl(P.log(), Q.log()).item() == pytest.approx(1.50515846, abs=1e-8)
    assert opd.jsd(P.log(), Q.log(), 0.5).item() == pytest.approx(0.25823345, abs=1e-8)


@pytest.mark.parametrize(
    "loss, golden",
    [
        (opd.reverse_kl, (0.19509635, -0.01444079, -0.18065556)),
        (opd.forward_kl, (0.5, 0.15, -0.65)),
        (lambda p, q: opd.jsd(p, q, 0.5), (0.05044418, 0.00737105, -0.05781524)),
    ],
)
def test_golden_gradients(loss, golden):
    gradient = logit_gradient(lambda logp: loss(logp, Q.log()), P.log())
    assert torch.allclose(gradient, torch.tensor(golden, dtype=torch.float64), atol=1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_gradients_are_the_closed_forms_and_sum_to_zero(seed):
    logp, logq = (law[0, 0] for law in random_laws(seed=seed))
    p, q, ell = logp.exp(), logq.exp(), logp - logq
    reverse = logit_gradient(lambda x: opd.reverse_kl(x, logq), logp)
    forward = logit_gradient(lambda x: opd.forward_kl(x, logq), logp)
    assert torch.allclose(reverse, p * (ell - opd.reverse_kl(logp, logq)), atol=1e-12)
    assert torch.allclose(forward, p - q, atol=1e-12)
    assert abs(reverse.sum()) < 1e-12 and abs(forward.sum()) < 1e-12


def test_gradient_against_finite_differences():
    logp, logq = (law[0, 0] for law in random_laws(seed=7))
    for loss in (opd.reverse_kl, opd.forward_kl, lambda p, q: opd.jsd(p, q, 0.3)):
        exact, h = logit_gradient(lambda x, f=loss: f(x, logq), logp), 1e-5
        for v in range(len(logp)):
            step = torch.zeros_like(logp)
            step[v] = h
            up, down = ((logp + s).log_softmax(-1) for s in (step, -step))
            slope = (loss(up, logq) - loss(down, logq)) / (2 * h)
            assert exact[v].item() == pytest.approx(slope.item(), abs=1e-8)


def test_divergences_vanish_only_at_equality_and_keep_shape():
    logp, logq = random_laws()
    for loss in (opd.reverse_kl, opd.forward_kl, lambda p, q: opd.jsd(p, q, 0.7)):
        assert loss(logp, logq).shape == (3, 4)
        assert (loss(logp, logq) > 1e-3).all()
        assert loss(logp, logp).abs().max() < 1e-12
    assert torch.allclose(opd.entropy(torch.full((5,), 0.2).log()), torch.tensor(math.log(5)))


def test_float32_stays_float32():
    logp, logq = (law.float() for law in random_laws())
    for loss in (opd.reverse_kl, opd.forward_kl, lambda p, q: opd.jsd(p, q, 0.7)):
        assert loss(logp, logq).dtype == torch.float32


# (6) JSD


def test_jsd_symmetry_bound_and_gradient():
    logp, logq = (law[0, 0] for law in random_laws(seed=3))
    assert torch.allclose(opd.jsd(logp, logq, 0.5), opd.jsd(logq, logp, 0.5))
    for beta in (0.1, 0.5, 0.8):
        bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert 0 <= opd.jsd(logp, logq, beta) <= bound
        m = beta * logq.exp() + (1 - beta) * logp.exp()
        expected = score_weighted(logp.exp(), (1 - beta) * (logp - m.log()))
        gradient = logit_gradient(lambda x, b=beta: opd.jsd(x, logq, b), logp)
        assert torch.allclose(gradient, expected, atol=1e-12)


def test_jsd_ends_are_the_two_kls_only_after_rescaling():
    logp, logq = (law[0, 0] for law in random_laws(seed=4))
    small = 1e-6
    near_forward, near_reverse = opd.jsd(logp, logq, small), opd.jsd(logp, logq, 1 - small)
    assert (near_forward / small).item() == pytest.approx(
        opd.forward_kl(logp, logq).item(), rel=1e-4
    )
    assert (near_reverse / small).item() == pytest.approx(
        opd.reverse_kl(logp, logq).item(), rel=1e-4
    )
    assert max(near_forward, near_reverse) < 1e-4  # the loss itself vanishes at both ends


@pytest.mark.parametrize("beta", [0.0, -1.0, 1.0])
def test_jsd_refuses_its_ends_and_names_the_kl(beta):
    with pytest.raises(ValueError, match=r"must be in \(0, 1\).*use a KL"):
        opd.jsd(P.log(), Q.log(), beta)


# exact zeros

INF = torch.inf
ZEROS = {  # log-probs of the student, of the teacher; reverse KL, forward KL, JSD at .5
    "one-hot, the same": ([0.0, -INF, -INF], [0.0, -INF, -INF], 0.0, 0.0, 0.0),
    "one-hot, apart": ([0.0, -INF, -INF], [-INF, 0.0, -INF], INF, INF, math.log(2)),
    "student has zeros": (
        [0.0, -INF, -INF], [math.log(0.5), math.log(0.25), math.log(0.25)], math.log(2), INF,
        math.log(4 / 3) / 2 + (math.log(2 / 3) + math.log(2)) / 4,
    ),
    "teacher has zeros": (
        [math.log(0.5), math.log(0.25), math.log(0.25)], [0.0, -INF, -INF], INF, math.log(2),
        math.log(4 / 3) / 2 + (math.log(2 / 3) + math.log(2)) / 4,
    ),
    "the same zero": (
        [math.log(0.75), math.log(0.25), -INF], [math.log(0.5), math.log(0.5), -INF],
        0.75 * math.log(1.5) - 0.25 * math.log(2), math.log(2) - math.log(3) / 2,
        0.375 * math.log(1.2) - 0.125 * math.log(1.5) + 0.25 * math.log(0.8)
        + 0.25 * math.log(4 / 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ZEROS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_zeros_have_their_value_and_no_nan(case, dtype):
    """Fault 11 of the first edition: 0 * inf gave nan where the divergence is finite."""
    logp, logq = (torch.tensor(x, dtype=dtype) for x in ZEROS[case][:2])
    losses = (opd.reverse_kl, opd.forward_kl, lambda p, q: opd.jsd(p, q, 0.5))
    for loss, value in zip(losses, ZEROS[case][2:], strict=True):
        assert loss(logp, logq).item() == pytest.approx(value, abs=1e-6)
        if math.isfinite(value):
            gradient = logit_gradient(lambda x, f=loss: f(x, logq), logp)
            assert torch.isfinite(gradient).all() and abs(gradient.sum()) < 1e-6
    direct = logp.clone().requires_grad_()  # in the log-probs themselves, too
    opd.entropy(direct).backward()
    some = logp[logp.isfinite()]
    value = -(some.exp() * some).sum().item()
    assert opd.entropy(logp).item() == pytest.approx(value, abs=1e-6)
    assert torch.isfinite(direct.grad).all()


def test_gradients_at_exact_zeros_are_those_of_the_tokens_that_are_left():
    """Fault 11: a token of probability 0 on both sides is as good as not there."""
    logp, logq = (law[0, 0] for law in random_laws())
    wide = [torch.cat([x, torch.tensor([-INF], dtype=x.dtype)]) for x in (logp, logq)]
    losses = (opd.reverse_kl, opd.forward_kl, lambda p, q: opd.jsd(p, q, 0.3))
    for loss in (*losses, lambda p, q: opd.entropy(p)):
        assert torch.allclose(loss(*wide), loss(logp, logq), atol=1e-12)
        found = logit_gradient(lambda x, f=loss: f(x, wide[1]), wide[0])
        expected = logit_gradient(lambda x, f=loss: f(x, logq), logp)
        assert torch.allclose(found[:-1], expected, atol=1e-12) and found[-1] == 0
    gone = wide[1].clone()  # the student has left a token that the teacher wants
    gone[-1] = gone[0]
    gone = gone.log_softmax(-1)
    assert opd.forward_kl(wide[0], gone) == INF and torch.isfinite(opd.reverse_kl(wide[0], gone))
    found = logit_gradient(lambda x: opd.reverse_kl(x, gone), wide[0])
    expected = score_weighted(logp.exp(), logp - gone[:-1])
    assert torch.allclose(found[:-1], expected, atol=1e-12) and found[-1] == 0


# (2) route B equals route A in expectation


@pytest.mark.parametrize("seed", range(3))
def test_expected_policy_gradient_is_the_reverse_kl_gradient(seed):
    logp, logq = (law[0, 0] for law in random_laws(seed=seed))
    total = torch.zeros_like(logp)
    for a in range(len(logp)):
        reward = opd.log_ratio_reward(logp[a], logq[a])

        def loss(x, a=a, reward=reward):
            return opd.policy_gradient_loss(x[a], reward, torch.tensor(True))

        total += logp.exp()[a] * logit_gradient(loss, logp)
    assert torch.allclose(
        total, logit_gradient(lambda x: opd.reverse_kl(x, logq), logp), atol=1e-12
    )


def test_ratio_form_has_the_same_gradient_at_ratio_one():
    logp, logq = random_laws(seed=1)
    mask, tokens = torch.ones(3, 4, dtype=torch.bool), torch.randint(6, (3, 4))
    before = opd.of_tokens(logp, tokens)
    advantage = opd.of_tokens(logq, tokens) - before

    def loss(x, behaviour, clip=None):
        logp_a = opd.of_tokens(x, tokens)
        return opd.policy_gradient_loss(logp_a, advantage, mask, behaviour, clip)

    plain = logit_gradient(lambda x: loss(x, None), logp)
    assert torch.allclose(plain, logit_gradient(lambda x: loss(x, before), logp), atol=1e-12)
    assert torch.allclose(plain, logit_gradient(lambda x: loss(x, before, 0.2), logp), atol=1e-12)


def test_clip_stops_the_gradient_only_where_it_would_go_further():
    logp_a = torch.tensor([[0.3, 0.3, -0.3, -0.3]], requires_grad=True)  # ratios e^.3, e^-.3
    advantage, mask = torch.tensor([[1.0, -1.0, 1.0, -1.0]]), torch.ones(1, 4, dtype=torch.bool)
    opd.policy_gradient_loss(logp_a, advantage, mask, torch.zeros(1, 4), clip=0.2).sum().backward()
    assert (logp_a.grad != 0).tolist() == [[False, True, True, False]]


def test_the_clip_is_one_sided():
    """Fault 12 of the first edition's text: it does not bound the loss of A < 0, ratio 5."""
    logp_a, mask = torch.tensor([[5.0]]).log(), torch.ones(1, 1, dtype=torch.bool)
    for advantage, loss in ((-1.0, 5.0), (1.0, -1.2)):
        found = opd.policy_gradient_loss(
            logp_a, torch.full((1, 1), advantage), mask, torch.zeros(1, 1), clip=0.2
        )
        assert found.item() == pytest.approx(loss)


def test_clip_without_behaviour_and_broadcasting_shapes_raise():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="behaviour_logp"):
        opd.policy_gradient_loss(x, x, mask, clip=0.2)
    with pytest.raises(ValueError, match="shapes differ"):
        opd.policy_gradient_loss(x, torch.zeros(2, 1), mask)


def test_the_advantage_never_carries_a_gradient():
    logp_a = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    logq_a = torch.tensor([[-1.5, -0.5]], requires_grad=True)
    assert not opd.log_ratio_reward(logp_a, logq_a).requires_grad
    mask = torch.ones(1, 2, dtype=torch.bool)
    opd.policy_gradient_loss(logp_a, logq_a - logp_a, mask).sum().backward()
    assert logq_a.grad is None
    assert torch.allclose(logp_a.grad, -(logq_a - logp_a).detach())


# (4) k1, k2, k3 at u = q/p: as a loss (differentiate) and as a reward (A = -k, detached)


@pytest.fixture
def pair():
    logp, logq = (law[0, 0] for law in random_laws(seed=11))
    nabla_reverse = logit_gradient(lambda x: opd.reverse_kl(x, logq), logp)
    return logp, logq, nabla_reverse, logp.exp() - logq.exp()


def as_loss(k, logp, logq):
    """Expected gradient of differentiating k at the sampled token."""
    total = torch.zeros_like(logp)
    for a in range(len(logp)):
        total += logp.exp()[a] * logit_gradient(lambda x, a=a: k(logq[a] - x[a]), logp)
    return total


KS = {
    "k1": lambda u: -u,
    "k2": lambda u: 0.5 * u**2,
    "k3": lambda u: u.exp() - 1 - u,
}  # u: log(q/p)


def test_k1_as_loss_has_no_gradient_as_reward_is_the_reverse_kl(pair):
    logp, logq, nabla_reverse, _ = pair
    assert as_loss(KS["k1"], logp, logq).abs().max() < 1e-12
    assert torch.allclose(score_weighted(logp.exp(), logp - logq), nabla_reverse, atol=1e-12)


def test_k2_as_loss_is_the_reverse_kl_as_reward_is_not(pair):
    logp, logq, nabla_reverse, _ = pair
    assert torch.allclose(as_loss(KS["k2"], logp, logq), nabla_reverse, atol=1e-12)
    as_reward = score_weighted(logp.exp(), KS["k2"](logq - logp))
    assert (as_reward - nabla_reverse).abs().max() > 0.05


def test_k3_as_loss_is_the_forward_kl_as_reward_is_the_difference(pair):
    logp, logq, nabla_reverse, nabla_forward = pair
    assert torch.allclose(as_loss(KS["k3"], logp, logq), nabla_forward, atol=1e-12)
    as_reward = score_weighted(logp.exp(), KS["k3"](logq - logp))
    assert torch.allclose(as_reward, nabla_reverse - nabla_forward, atol=1e-12)
    golden = score_weighted(P, KS["k3"](Q.log() - P.log()))
    expected = torch.tensor((-0.30490365, -0.16444079, 0.46934444), dtype=torch.float64)
    assert torch.allclose(golden, expected, atol=1e-8)


def test_k3_times_a_live_ratio_is_the_reverse_kl(pair):
    logp, logq, nabla_reverse, _ = pair
    total = torch.zeros_like(logp)
    for a in range(len(logp)):

        def loss(x, a=a):
            return (x[a] - x[a].detach()).exp() * KS["k3"](logq[a] - x[a])

        total += logp.exp()[a] * logit_gradient(loss, logp)
    assert torch.allclose(total, nabla_reverse, atol=1e-12)


def test_k1_and_k3_are_unbiased_values_of_the_reverse_kl(pair):
    logp, logq, *_ = pair
    for name in ("k1", "k3"):
        value = (logp.exp() * KS[name](logq - logp)).sum()
        assert torch.allclose(value, opd.reverse_kl(logp, logq))


# (5) the missing detach


def test_without_detach_the_optimum_is_the_root_of_the_teacher():
    root = Q.sqrt() / Q.sqrt().sum()
    golden = torch.tensor((0.27949079, 0.19762983, 0.52287938), dtype=torch.float64)
    assert torch.allclose(root, golden, atol=1e-8)

    def undetached(logp):  # expected gradient of -A log p(a) with a live A
        total = torch.zeros_like(logp)
        for a in range(len(logp)):
            total += logp.exp()[a] * logit_gradient(
                lambda x, a=a: -(Q.log()[a] - x[a]) * x[a], logp
            )
        return total

    assert undetached(root.log()).abs().max() < 1e-12
    assert undetached(Q.log()).abs().max() > 0.01  # it leaves the teacher's own distribution


# (23) sampling agrees with enumeration


def test_sampled_route_b_within_four_standard_errors():
    logp, logq = (law[0, 0] for law in random_laws(seed=5))
    n, g = 40_000, torch.Generator().manual_seed(0)
    tokens = torch.multinomial(logp.exp(), n, replacement=True, generator=g)
    reward = (logq - logp)[tokens]
    per_sample = -reward[:, None] * (torch.eye(len(logp), dtype=logp.dtype)[tokens] - logp.exp())
    exact = logit_gradient(lambda x: opd.reverse_kl(x, logq), logp)
    error = (per_sample.mean(0) - exact).abs()
    assert (error < 4 * per_sample.std(0) / math.sqrt(n)).all()
    z = logp.clone().requires_grad_()  # and policy_gradient_loss is that estimator
    sampled = z.log_softmax(-1)[tokens]
    loss = opd.policy_gradient_loss(sampled, reward, torch.ones(n, dtype=torch.bool)).mean()
    loss.backward()
    assert torch.allclose(z.grad, per_sample.mean(0), atol=1e-12)


# the verifier's baseline


def test_leave_one_out_is_unbiased_and_centres_each_prompt():
    reward = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1])
    advantage = opd.leave_one_out(reward, 4)
    assert torch.allclose(advantage[:4], torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3]))
    assert advantage[4:].abs().max() == 0
    p = torch.tensor(
        [0.3, 0.7], dtype=torch.float64
    )  # two samples of a two-armed prompt, enumerated
    expected = torch.zeros(2, dtype=torch.float64)
    for a in range(2):
        for b in range(2):
            rewards = torch.tensor([float(a == 0), float(b == 0)], dtype=torch.float64)
            adv = opd.leave_one_out(rewards, 2)
            eye = torch.eye(2, dtype=torch.float64)
            expected += p[a] * p[b] * (adv[0] * (eye[a] - p) + adv[1] * (eye[b] - p)) / 2
    plain = score_weighted(p, torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert torch.allclose(expected, plain, atol=1e-12)
