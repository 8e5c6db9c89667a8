"""§7: CR-OPD, where the mass taken from a token goes.  All tokens are enumerated.

(12) is the check of the project's formula list.
"""

import pytest
import torch
from conftest import logit_gradient, random_laws

import opd

P = torch.tensor([0.7, 0.25, 0.05], dtype=torch.float64)
Q = torch.tensor([0.2, 0.1, 0.7], dtype=torch.float64)
WIDE = dict(top_k=4, min_prob=0.02)
EYE = torch.eye(6, dtype=torch.float64)


def one_state(seed):
    """Log-probs (6,) of two random distributions."""
    return tuple(law[0, 0] for law in random_laws(seed=seed))


def suppressed(logp, logq):
    """The tokens with negative feedback."""
    return [a for a in range(len(logp)) if logp[a] > logq[a]]


def wanted(logp, logq, a, top_k, min_prob):
    """C written out: the teacher's top_k, reachable, under-weighted, not a."""
    best = logq.topk(top_k).indices.tolist()
    p, q = logp.exp().tolist(), logq.exp().tolist()
    return {v for v in best if v != a and p[v] >= min_prob and q[v] > p[v]}


def gradient(logp, logq, a, **settings):
    """The loss's gradient in the student's logits for the sampled token a."""
    action = torch.tensor(a)
    return logit_gradient(lambda x: opd.cr_opd_loss(x, logq, action, **settings), logp)


def target_of(logp, logq, a, **settings):
    return opd.routing_target(logp, logq, torch.tensor(a), **settings)


# the target


@pytest.mark.parametrize("top_k, min_prob", [(1, 0.0), (3, 0.05), (4, 0.02), (6, 0.0), (6, 0.9)])
@pytest.mark.parametrize("target", ["teacher", "deficit"])
def test_recipients_are_supported_reachable_and_underweighted(target, top_k, min_prob):
    opened = set()
    for seed in range(5):
        logp, logq = one_state(seed)
        p, q = logp.exp(), logq.exp()
        for a in range(6):
            reach = dict(top_k=top_k, min_prob=min_prob)
            r, is_open = target_of(logp, logq, a, target=target, **reach)
            members = wanted(logp, logq, a, **reach)
            assert {v for v in range(6) if r[v] > 0} == members and bool(is_open) == bool(members)
            opened.add(bool(is_open))
            share = torch.zeros_like(p)
            for v in members:
                share[v] = q[v] if target == "teacher" else q[v] - p[v]
            share = share / share.sum() if members else share
            assert torch.allclose(r, share, atol=1e-12)
    assert opened == {True, False} or min_prob == 0.9 or top_k == 6


def test_the_candidates_do_not_depend_on_the_suppressed_token():
    logp, logq = one_state(1)
    targets = [target_of(logp, logq, a, **WIDE)[0] for a in suppressed(logp, logq)]
    assert len(targets) > 1 and all(torch.equal(targets[0], r) for r in targets)


def test_the_routing_target_is_detached_and_shaped_like_the_log_probs():
    logp, logq = (law.requires_grad_() for law in random_laws())
    action = logp.argmax(-1)
    r, is_open = opd.routing_target(logp, logq, action, **WIDE)
    assert r.shape == logp.shape and is_open.shape == action.shape
    assert not r.requires_grad and is_open.dtype == torch.bool
    opd.cr_opd_loss(logp, logq, action, **WIDE).sum().backward()
    assert logq.grad is None  # the teacher never gets a gradient


def test_an_unknown_target_raises_and_names_the_known_ones():
    logp, logq = one_state(0)
    for function in (opd.routing_target, opd.cr_opd_loss):
        with pytest.raises(ValueError, match="target = 'student'.*teacher or deficit"):
            function(logp, logq, torch.tensor(0), target="student", **WIDE)


# (12) the gradient


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("target", ["teacher", "deficit"])
def test_the_gradient_is_its_closed_form_for_every_sampled_token(target, rho, seed):
    logp, logq = one_state(seed)
    p, advantage = logp.exp(), logq - logp
    for a in range(6):
        r, is_open = target_of(logp, logq, a, target=target, **WIDE)
        routed = is_open and advantage[a] < 0
        to = rho * r + (1 - rho) * p if routed else p
        expected = -advantage[a] * (EYE[a] - to)
        found = gradient(logp, logq, a, rho=rho, target=target, **WIDE)
        assert torch.allclose(found, expected, atol=1e-12) and abs(found.sum()) < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_rho_zero_is_the_policy_gradient_loss(seed):
    logp, logq = random_laws(seed=seed)
    action = torch.randint(6, (3, 4), generator=torch.Generator().manual_seed(seed))
    reward = opd.of_tokens(logq - logp, action)
    mask = torch.ones_like(action, dtype=torch.bool)

    def plain(x):
        return opd.policy_gradient_loss(opd.of_tokens(x, action), reward, mask)

    def routed(x, rho):
        return opd.cr_opd_loss(x, logq, action, rho=rho, **WIDE)

    assert torch.allclose(routed(logp, 0.0), plain(logp), atol=1e-12)
    off = logit_gradient(plain, logp)
    assert torch.allclose(logit_gradient(lambda x: routed(x, 0.0), logp), off, atol=1e-12)
    whole = logit_gradient(lambda x: routed(x, 1.0), logp)
    assert (whole - off).abs().max() > 0.05
    half = logit_gradient(lambda x: routed(x, 0.5), logp)
    assert torch.allclose(half, (whole + off) / 2, atol=1e-12)  # rho mixes the two


@pytest.mark.parametrize("target", ["teacher", "deficit"])
def test_it_rests_where_the_laws_agree(target):
    _, logq = one_state(2)
    for a in range(6):
        assert gradient(logq, logq, a, target=target, top_k=6, min_prob=0.0).abs().max() < 1e-12


def test_odds_of_bystanders_survive_any_step_and_the_sampled_token_always_falls():
    routed = 0
    for seed in range(8):
        logp, logq = one_state(seed)
        for a in suppressed(logp, logq):
            r, is_open = target_of(logp, logq, a, **WIDE)
            bystanders = [v for v in range(6) if r[v] == 0 and v != a]
            if not is_open or len(bystanders) < 2:
                continue
            slope = gradient(logp, logq, a, **WIDE)
            assert slope[bystanders].abs().max() < 1e-15
            for size in (1e-3, 1.0, 30.0):
                after = (logp - size * slope).log_softmax(-1)
                moved = (after - logp)[bystanders]
                assert (moved - moved[0]).abs().max() < 1e-12 and after[a] < logp[a]
                routed += 1
    assert routed > 20


def test_plain_suppression_moves_the_odds_of_bystanders():
    logp, logq = one_state(0)
    a = suppressed(logp, logq)[0]
    slope = gradient(logp, logq, a, rho=0.0, **WIDE)
    moved = -slope[[v for v in range(6) if v != a]]
    assert (moved - moved[0]).abs().max() > 0.01


@pytest.mark.parametrize("target", ["teacher", "deficit"])
@pytest.mark.parametrize("seed", range(5))
def test_the_expected_update_is_the_reverse_kls_plus_a_cross_entropy(seed, target):
    """E_a[dz] = -grad KL(p||q) + m (r - p), m the mass of negative feedback."""
    logp, logq = one_state(seed)
    p, ell = logp.exp(), logp - logq
    reach = dict(top_k=6, min_prob=0.0, target=target)
    update = -sum(p[a] * gradient(logp, logq, a, **reach) for a in range(6))
    negative = (p * ell.clamp(min=0)).sum()
    r, is_open = target_of(logp, logq, suppressed(logp, logq)[0], **reach)
    assert is_open
    descent = -logit_gradient(lambda x: opd.reverse_kl(x, logq), logp)
    assert torch.allclose(update, descent + negative * (r - p), atol=1e-12)
    assert (update - descent).abs().max() > 0.01  # not an unbiased reverse KL


@pytest.mark.parametrize("rho", [0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_added_term_is_minus_rho_times_the_cross_entropy_under_its_assumptions(seed, rho):
    """Fault 10 of the first edition: its docstring had -m sum r log p, for every rho."""
    said = " ".join(opd.cr_opd_loss.__doc__.split())
    assert "adds in expectation -rho m sum_v r log p, a cross-entropy" in said
    logp, logq = one_state(seed)
    p, ell = logp.exp(), logp - logq
    reach = dict(top_k=6, min_prob=0.0)
    r, is_open = target_of(logp, logq, suppressed(logp, logq)[0], **reach)
    m = (p * ell.clamp(min=0)).sum()
    term = logit_gradient(lambda x: -rho * m * (r * x).sum(), logp)
    plain = logit_gradient(lambda x: opd.reverse_kl(x, logq), logp)

    def added(**how):
        return (
            sum(p[a] * gradient(logp, logq, a, rho=rho, **reach, **how) for a in range(6)) - plain
        )

    assert is_open and term.abs().max() > 0.01
    assert torch.allclose(added(), term, atol=1e-12)
    # the assumptions: delta = 0 (at this one nothing is routed), the bare log-ratio
    weak = ell.max().item() + 1e-9
    assert not torch.allclose(added(delta=weak), term, atol=1e-3)
    other = sum(
        p[a] * gradient(logp, logq, a, rho=rho, advantage=-ell[a] + 0.5, **reach) for a in range(6)
    )
    assert not torch.allclose(other - plain, term, atol=1e-3)


def test_golden_first_order_change_of_three_tokens():
    """(12) The teacher's rare token rises by .06 and would fall by .01275 if only suppressed."""
    to_probability = torch.diag(P) - P[:, None] * P
    size = (P[1] / Q[1]).log()
    changes = []
    for rho in (1.0, 0.0):
        slope = gradient(P.log(), Q.log(), 1, rho=rho, top_k=3, min_prob=0.0)
        changes.append(to_probability @ (-slope / size))
    golden = torch.tensor([[0.14, -0.20, 0.06], [0.2765, -0.26375, -0.01275]], dtype=P.dtype)
    assert torch.allclose(torch.stack(changes), golden, atol=1e-12)


# when nothing is routed


@pytest.mark.parametrize(
    "settings",
    [dict(top_k=6, min_prob=0.99), dict(top_k=4, min_prob=0.02, delta=50.0)],
    ids=["nobody to route to", "feedback too weak"],
)
def test_without_recipients_or_strong_feedback_it_falls_back_to_suppression(settings):
    logp, logq = one_state(1)
    for a in range(6):
        expected = -(logq - logp)[a] * (EYE[a] - logp.exp())
        assert torch.allclose(gradient(logp, logq, a, **settings), expected, atol=1e-12)
        value = opd.cr_opd_loss(logp, logq, torch.tensor(a), **settings)
        assert value.item() == pytest.approx((-(logq - logp)[a] * logp[a]).item(), abs=1e-12)


def test_a_teacher_whose_favourite_is_the_sampled_token_leaves_nobody():
    logp = torch.tensor([0.9, 0.06, 0.04], dtype=torch.float64).log()
    logq = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()
    assert not target_of(logp, logq, 0, top_k=1, min_prob=0.0)[1]
    found = gradient(logp, logq, 0, top_k=1, min_prob=0.0)
    assert torch.allclose(found, (logp[0] - logq[0]) * (EYE[0, :3] - logp.exp()), atol=1e-12)


def test_feedback_must_be_below_minus_delta_to_be_routed():
    logp, logq = one_state(0)
    advantage, routed = logq - logp, {}
    for a in suppressed(logp, logq):
        plain = gradient(logp, logq, a, rho=0.0, **WIDE)
        for delta in (0.0, -advantage[a].item() - 1e-9, -advantage[a].item(), 9.0):
            found = gradient(logp, logq, a, delta=delta, **WIDE)
            routed[delta < -advantage[a].item()] = (found - plain).abs().max() > 1e-3
            assert ((found - plain).abs().max() > 1e-3) == (delta < -advantage[a].item())
    assert routed == {True: True, False: False}


def test_positive_feedback_is_never_routed():
    logp, logq = one_state(0)
    for a in set(range(6)) - set(suppressed(logp, logq)):
        expected = -(logq - logp)[a] * (EYE[a] - logp.exp())
        assert torch.allclose(gradient(logp, logq, a, **WIDE), expected, atol=1e-12)


# other credit, other teachers


def test_the_sign_and_size_of_another_credit_decide():
    logp, logq = one_state(1)
    p = logp.exp()
    for a in range(6):
        r, is_open = target_of(logp, logq, a, **WIDE)
        assert r[a] == 0  # not even where the teacher wants a
        for given in (-2.0, 3.0):
            credit = torch.tensor(given, dtype=torch.float64, requires_grad=True)
            found = gradient(logp, logq, a, advantage=credit, **WIDE)
            to = r if is_open and given < 0 else p
            assert torch.allclose(found, -given * (EYE[a] - to), atol=1e-12)
            assert credit.grad is None


def test_the_log_ratio_is_the_default_credit():
    logp, logq = random_laws(seed=4)
    action = logp.argmax(-1)
    reward = opd.log_ratio_reward(opd.of_tokens(logp, action), opd.of_tokens(logq, action))
    for rho in (0.4, 1.0):
        one = opd.cr_opd_loss(logp, logq, action, rho=rho, **WIDE)
        other = opd.cr_opd_loss(logp, logq, action, rho=rho, advantage=reward, **WIDE)
        assert torch.equal(one, other)


@pytest.mark.parametrize("target", ["teacher", "deficit"])
def test_a_sparse_teacher_that_lists_its_top_k_agrees_with_the_dense_one(target):
    logp, logq = random_laws(vocab=8, seed=3)
    action = torch.randint(8, (3, 4), generator=torch.Generator().manual_seed(0))
    ids = logq.topk(5).indices.flip(-1)
    few = opd.Scores(opd.of_tokens(logq, action), ids, logq.gather(-1, ids))
    reach = dict(top_k=4, min_prob=0.02, target=target)
    pairs = [opd.routing_target(logp, q, action, **reach) for q in (logq, few)]
    assert torch.allclose(pairs[0][0], pairs[1][0], atol=1e-12)
    assert torch.equal(pairs[0][1], pairs[1][1]) and pairs[0][1].any()
    slopes = [
        logit_gradient(lambda x, q=q: opd.cr_opd_loss(x, q, action, **reach), logp)
        for q in (logq, few)
    ]
    assert torch.allclose(*slopes, atol=1e-12)
    with pytest.raises(ValueError, match=r"^k = 6: must be 1 to 5"):
        opd.cr_opd_loss(logp, few, action, top_k=6, min_prob=0.0)


def test_a_batch_is_its_states_one_by_one():
    logp, logq = random_laws(seed=9)
    action = torch.randint(6, (3, 4), generator=torch.Generator().manual_seed(2))
    whole = opd.cr_opd_loss(logp, logq, action, rho=0.7, **WIDE)
    assert whole.shape == (3, 4)
    for i in range(3):
        for t in range(4):
            alone = opd.cr_opd_loss(logp[i, t], logq[i, t], action[i, t], rho=0.7, **WIDE)
            assert torch.allclose(whole[i, t], alone, atol=1e-12)
