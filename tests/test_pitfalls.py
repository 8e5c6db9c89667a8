"""Real bugs by exact numbers: each function of notebooks/broken.py beside the right one."""

import inspect
import math

import broken
import lab
import pytest
import torch
from conftest import logit_gradient, random_laws

import opd

P = torch.tensor([0.7, 0.25, 0.05], dtype=torch.float64)
Q = torch.tensor([0.2, 0.1, 0.7], dtype=torch.float64)
LOGP, LOGQ = P.log(), Q.log()


def gradient(loss, at=LOGP):
    """The gradient of loss(log-probs) in the logits."""
    z = at.clone().requires_grad_()
    loss(z.log_softmax(-1)).backward()
    return z.grad


def expected(loss_of_token, at=LOGP):
    """E_{a~p} of the gradient of loss_of_token(log-probs, a), by enumeration."""
    return sum(
        at.exp()[a] * gradient(lambda x, a=a: loss_of_token(x, a), at) for a in range(len(at))
    )


def rewarded(reward):
    """The expected gradient of -A log p(a) for a reward function of (log p(a), log q(a))."""
    return expected(lambda x, a: -reward(x[a], LOGQ[a]) * x[a])


REVERSE = gradient(lambda x: opd.reverse_kl(x, LOGQ))
FORWARD = gradient(lambda x: opd.forward_kl(x, LOGQ))


def close(a, b):
    return torch.allclose(a, b, atol=1e-10)


def test_the_right_ones():
    assert close(rewarded(opd.log_ratio_reward), REVERSE)
    assert not close(REVERSE, FORWARD) and REVERSE[2] < 0  # descent raises the teacher's favourite


def test_k1_as_loss_learns_nothing():
    assert close(expected(lambda x, a: broken.k1_as_loss(x[a], LOGQ[a])), torch.zeros(3).double())


def test_k3_as_loss_is_the_forward_kl():
    assert close(expected(lambda x, a: broken.k3_as_loss(x[a], LOGQ[a])), FORWARD)


def test_k2_as_reward_lowers_the_teachers_favourite():
    assert rewarded(broken.k2_as_reward)[2] > 0.1
    assert all(broken.k2_as_reward(LOGP, LOGQ) <= 0)


def test_k3_as_reward_lowers_the_teachers_favourite():
    assert close(rewarded(broken.k3_as_reward), REVERSE - FORWARD)
    assert rewarded(broken.k3_as_reward)[2].item() == pytest.approx(0.46934444, abs=1e-8)


def test_live_advantage_rests_at_the_root_and_leaves_the_teacher():
    root = (Q.sqrt() / Q.sqrt().sum()).log()
    at_root = expected(lambda x, a: broken.live_advantage(x[a], LOGQ[a]), root)
    at_teacher = expected(lambda x, a: broken.live_advantage(x[a], LOGQ[a]), LOGQ)
    assert close(at_root, torch.zeros(3).double()) and at_teacher.abs().max() > 0.1
    right = sum(
        Q[a] * gradient(lambda x, a=a: -opd.log_ratio_reward(x[a], LOGQ[a]) * x[a], LOGQ)
        for a in range(3)
    )
    assert close(right, torch.zeros(3).double())


def test_state_only_advantage_learns_nothing_although_each_sample_moves():
    found = expected(lambda x, a: broken.state_only_advantage(LOGP, LOGQ, x[a]))
    assert close(found, torch.zeros(3).double())
    one = gradient(lambda x: broken.state_only_advantage(LOGP, LOGQ, x[0]))
    assert one.abs().max() > 0.2


def test_swapped_arguments_are_the_forward_kl():
    assert close(broken.swapped_kl(LOGP, LOGQ), opd.forward_kl(LOGP, LOGQ))
    assert not close(broken.swapped_kl(LOGP, LOGQ), opd.reverse_kl(LOGP, LOGQ))


def test_mixed_log_probs_break_the_bound():
    far = torch.tensor([1 - 1e-6, 1e-6]).double().log()
    other = far.flip(0)
    assert broken.jsd_of_log_probs(far, other) > math.log(2) > opd.jsd(far, other, 0.5)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_the_ends_of_the_jsd_are_no_loss(beta):
    assert abs(broken.jsd_at_the_ends(LOGP, LOGQ, beta)) < 1e-12
    assert close(broken.jsd_at_the_ends(LOGP, LOGQ, 0.3), opd.jsd(LOGP, LOGQ, 0.3))
    with pytest.raises(ValueError):
        opd.jsd(LOGP, LOGQ, beta)


def test_a_mean_over_the_vocabulary_shrinks_with_it():
    for vocab in (4, 400):
        logp, logq = random_laws(vocab=vocab)
        ratio = opd.reverse_kl(logp, logq) / broken.mean_over_vocabulary(logp, logq)
        assert torch.allclose(ratio, torch.full_like(ratio, vocab))


def head_of(size):
    return torch.arange(size)[None]


def test_a_plainly_truncated_reverse_kl_drains_its_support_at_p_equal_q():
    ids = head_of(2)
    g = logit_gradient(
        lambda x: broken.plainly_truncated_reverse_kl(x[None], LOGQ[None], ids), LOGQ
    )
    inside, left = torch.tensor([1.0, 1.0, 0.0]).double(), Q[:2].sum()
    assert torch.allclose(g, Q * (inside - left), atol=1e-12) and g[0] > 0 > g[2]
    support = opd.Support(ids, torch.ones_like(ids, dtype=torch.bool))
    for tail in ("stop_gradient", "generalised", "renormalise", "bucket"):
        right = logit_gradient(
            lambda x, t=tail: opd.truncated_reverse_kl(x[None], LOGQ[None], support, t), LOGQ
        )
        assert right.abs().max() < 1e-12, tail


def test_a_clamp_takes_the_gradient_of_the_truncated_forward_kl():
    ids = head_of(2)  # P = .95 > Q = .3: the bare sum is negative
    bare = lambda x: broken.clamped_truncated_forward_kl(x[None], LOGQ[None], ids)  # noqa: E731
    assert bare(LOGP).item() == 0 and logit_gradient(bare, LOGP).abs().max() == 0
    support = opd.Support(ids, torch.ones_like(ids, dtype=torch.bool))
    right = lambda x: opd.truncated_forward_kl(x[None], LOGQ[None], support)  # noqa: E731
    assert right(LOGP).item() > 1.0
    assert torch.allclose(logit_gradient(right, LOGP), P - Q, atol=1e-12)  # the bucket is token 2


def test_an_exact_head_with_a_sampled_tail_is_off_by_the_gradient_of_the_mass():
    ids, eye = head_of(1), torch.eye(3).double()
    mixed = sum(
        P[a] * logit_gradient(lambda x, a=a: broken.exact_head_and_sampled_tail(
            x[None], LOGQ[None], ids, torch.tensor([a])), LOGP)
        for a in range(3)
    )  # fmt: skip
    exact = logit_gradient(lambda x: opd.reverse_kl(x, LOGQ), LOGP)
    assert torch.allclose(mixed - exact, P[0] * (eye[0] - P), atol=1e-12)


def test_a_baseline_that_has_seen_its_own_row_shrinks_everything():
    reward = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    shrunk = broken.mean_of_all_samples(reward, 3)
    assert torch.allclose(shrunk, opd.leave_one_out(reward, 3) * 2 / 3)


def test_a_cut_that_counts_as_an_end_blames_the_last_token_for_the_horizon():
    reward, value = torch.zeros(1, 4), torch.full((1, 4), -5.0)  # steady: nothing was done wrong
    mask = torch.ones(1, 4, dtype=torch.bool)
    wrong = broken.cut_as_finished(reward, value, mask, 1.0)
    right = opd.gae(reward, value, mask, 1.0, 0.95, bootstrap=torch.tensor([-5.0]))[0]
    assert right.abs().max() == 0 and wrong[0, -1] == 5.0


def test_late_scores_are_far_from_themselves():
    logp, _ = random_laws()
    late = broken.late_scores(logp)
    assert torch.equal(late[:, 1:], logp[:, :-1])  # the scores of the token before
    assert opd.reverse_kl(logp, late).mean() > 0.3


def test_masks_that_lose_the_eos():
    tokens = torch.tensor([[7, 8, 2, 2], [7, 2, 2, 2], [7, 8, 9, 7]])
    right = lab.through_eos(tokens, [2])
    kept = lambda mask: int((mask & (tokens == 2)).sum())  # noqa: E731
    assert kept(right) == 2 and right.sum() == 9
    for wrong in (broken.mask_by_padding(tokens, 2), broken.mask_before_eos(tokens, 2)):
        assert kept(wrong) == 0 and wrong.sum() == 7  # all the rest is there


def test_padding_in_the_denominator():
    x, mask = torch.ones(2, 4), torch.tensor([[True] * 4, [True, False, False, False]])
    assert opd.masked_mean(x, mask) == 1 and broken.mean_with_padding(x, mask) == 5 / 8


def test_nothing_unmasked():
    x, mask = torch.ones(1, 3), torch.zeros(1, 3, dtype=torch.bool)
    assert broken.mean_without_guard(x, mask).isnan() and opd.masked_mean(x, mask) == 0


def test_prompt_tokens_dilute_the_loss():
    x = torch.tensor([[0.0, 0.0, 0.0, 2.0]])
    prompt, mask = torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool)
    assert broken.prompt_in_the_loss(x, prompt, mask) == 0.5
    assert opd.masked_mean(x[:, 3:], mask) == 2


def test_micro_batch_means_are_not_the_mean():
    long = torch.ones(1, 9), torch.ones(1, 9, dtype=torch.bool)
    short = torch.full((1, 1), 11.0), torch.ones(1, 1, dtype=torch.bool)
    assert broken.mean_of_micro_batch_means([long, short]) == 6
    assert sum(opd.masked_mean(x, m, total=10) for x, m in (long, short)) == pytest.approx(2)


def test_the_data_sets_count_scales_the_loss():
    x, mask = torch.ones(1, 48), torch.ones(1, 48, dtype=torch.bool)
    for length in (1, 12, 48):  # the same 48 generated tokens, other completions in the data set
        data = torch.ones(1, length, dtype=torch.bool)
        assert broken.wrong_count(x, mask, data) == pytest.approx(48 / length)
    assert opd.masked_mean(x, mask) == 1


def test_two_temperatures_move_the_optimum():
    tau = 2.0
    power = (Q**tau / (Q**tau).sum()).log()
    for z, rests in ((power, True), (LOGQ, False)):
        z = z.clone().requires_grad_()
        broken.student_temperature_only(z, LOGQ, tau).backward()
        assert (z.grad.abs().max() < 1e-10) == rests


def test_a_renormalised_ratio_is_the_kept_mass_for_every_token():
    logp = torch.tensor([0.5, 0.3, 0.15, 0.05]).double().log()
    kept = opd.nucleus(logp, 0.75)
    ratio = broken.renormalised_ratio(logp[:2], kept[:2])
    assert torch.allclose(ratio, torch.full_like(ratio, 0.8))


def test_every_broken_function_is_shown_here():
    source = open(__file__).read()
    names = [n for n, f in vars(broken).items() if inspect.isfunction(f)]
    assert len(names) == 25 and all(f"broken.{name}" in source for name in names)
