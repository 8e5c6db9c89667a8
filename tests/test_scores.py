"""§4 and §8: alignment, padding, masks, chunks, aggregation.  (20) to (22): the formula list."""

from collections import Counter

import pytest
import torch
from conftest import random_laws, random_prompts, tiny_llama

import opd

# (21) alignment


def test_left_padded_and_unpadded_log_probs_agree():
    model, prompts = tiny_llama(), random_prompts([3, 8, 5])
    noise = torch.rand(3, 9, generator=torch.Generator().manual_seed(0))
    padded = opd.sample(model, prompts, horizon=9, noise=noise, eos_ids=[])
    with torch.no_grad():
        together = opd.score(model, padded)
        for i, n in enumerate([3, 8, 5]):
            alone = opd.Rollout(
                prompts.ids[i : i + 1, -n:], prompts.mask[i : i + 1, -n:], padded.tokens[i : i + 1],
                padded.mask[i : i + 1], padded.logprobs[i : i + 1], padded.finished[i : i + 1],
            )  # fmt: skip
            assert (opd.score(model, alone)[0] - together[i]).abs().max() < 1e-5


def test_the_score_of_a_token_reads_the_logits_before_it():
    model, prompts = tiny_llama(), random_prompts([5])
    rollout = opd.sample(model, prompts, horizon=6, eos_ids=[])
    with torch.no_grad():
        logp = opd.score(model, rollout)
        ids = torch.cat([prompts.ids, rollout.tokens], dim=1)
        reference = model(ids).logits.log_softmax(-1)
    assert (logp[0] - reference[0, 4:10]).abs().max() < 1e-5
    changed = opd.Rollout(*(v.clone() for v in vars(rollout).values()))
    changed.tokens[0, 3] = (changed.tokens[0, 3] + 1) % 23
    with torch.no_grad():
        other = opd.score(model, changed)
    assert (other[0, :4] - logp[0, :4]).abs().max() < 1e-6  # the past does not see token 3
    assert (other[0, 4] - logp[0, 4]).abs().max() > 1e-3


def test_tokens_after_eos_change_nothing():
    model, prompts = tiny_llama(), random_prompts([4, 6])
    rollout = opd.sample(model, prompts, horizon=8, eos_ids=[])
    rollout.mask[0, 3:] = False
    loss = []
    for junk in (0, 9):
        rollout.tokens[0, 3:] = junk
        logp = opd.score(model, rollout)
        logq = opd.score(tiny_llama(seed=1), rollout)
        model.zero_grad()
        value = opd.masked_mean(opd.reverse_kl(logp, logq), rollout.mask)
        value.backward()
        loss.append((value.item(), model.model.embed_tokens.weight.grad.clone()))
    assert loss[0][0] == pytest.approx(loss[1][0], abs=1e-6)
    assert (loss[0][1] - loss[1][1]).abs().max() < 1e-5


def test_temperature_divides_the_logits():
    model = tiny_llama()
    rollout = opd.sample(model, random_prompts([5]), horizon=4, eos_ids=[])
    with torch.no_grad():
        cold, one = opd.score(model, rollout, temperature=0.5), opd.score(model, rollout)
    assert torch.allclose(cold, (2 * one).log_softmax(-1), atol=1e-5)


def test_scores_are_fp32_from_a_half_precision_model():
    model = tiny_llama().to(torch.bfloat16)
    rollout = opd.sample(model, random_prompts([5]), horizon=4, eos_ids=[])
    with torch.no_grad():
        logp = opd.score(model, rollout)
    assert logp.dtype == torch.float32 and logp.exp().sum(-1).sub(1).abs().max() < 1e-5


def test_golden_temperature_mismatch():
    """(20) Sampled at 0.5, scored at 1: E[e_a - p_1] = p_.5 - p_1."""
    p = torch.tensor([0.7, 0.25, 0.05], dtype=torch.float64)
    cold = (2 * p.log()).softmax(-1)
    golden = torch.tensor([0.18288288, -0.13738739, -0.0454955], dtype=torch.float64)
    assert torch.allclose(cold - p, golden, atol=1e-7)


# §8 aggregation


def test_masked_mean_by_hand():
    x = torch.tensor([[1.0, 2.0, 4.0], [10.0, torch.nan, torch.inf]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert opd.masked_mean(x, mask).item() == pytest.approx(17 / 4)
    assert opd.masked_mean(x, mask, "sequence_sum").item() == pytest.approx((7 + 10) / 2)
    assert opd.masked_mean(x, mask, "sequence_mean").item() == pytest.approx((7 / 3 + 10) / 2)
    with pytest.raises(ValueError, match="sequence_sum"):
        opd.masked_mean(x, mask, "tokens")


@pytest.mark.parametrize("how", ["token", "sequence_sum", "sequence_mean"])
def test_all_masked_is_zero_with_a_finite_gradient(how):
    x = torch.tensor([[torch.nan, 1.0]], requires_grad=True)
    value = opd.masked_mean(x, torch.zeros(1, 2, dtype=torch.bool), how)
    value.backward()
    assert value.item() == 0 and torch.equal(x.grad, torch.zeros(1, 2))


@pytest.mark.parametrize("how", ["token", "sequence_sum", "sequence_mean"])
def test_two_micro_batches_with_the_global_total_equal_one_batch(how):
    """(22)"""
    x, _ = random_laws(rows=4, steps=5)
    x, mask = x[..., 0].clone().requires_grad_(), torch.rand(4, 5) < 0.6
    mask[0] = True
    opd.masked_mean(x, mask, how).backward()
    whole, x.grad = x.grad.clone(), None
    total = mask.sum() if how == "token" else 4
    for rows in (slice(0, 1), slice(1, 4)):
        opd.masked_mean(x[rows], mask[rows], how, total).backward()
    assert torch.allclose(whole, x.grad, atol=1e-12)
    if how == "token":  # without it, the short part weighs more: the bug
        x.grad = None
        for rows in (slice(0, 1), slice(1, 4)):
            (opd.masked_mean(x[rows], mask[rows], how) / 2).backward()
        assert not torch.allclose(whole, x.grad, atol=1e-3)


# §4 chunks: never more logits than one chunk's


def watched(monkeypatch, chunk_logits=1):
    """The shapes of all logits from here on, with chunks of CHUNK_LOGITS."""
    shapes, from_logits = [], opd.from_logits

    def watch(logits, **settings):
        found = from_logits(logits, **settings)
        shapes.append(found.shape)
        return found

    monkeypatch.setattr(opd, "from_logits", watch)
    monkeypatch.setattr(opd, "CHUNK_LOGITS", chunk_logits)
    return shapes


def test_score_tokens_is_score_at_the_responses_own_tokens():
    model, prompts = tiny_llama(), random_prompts([4, 2, 5])
    rollout = opd.sample(model, prompts, horizon=9, eos_ids=[])
    found = opd.score_tokens(model, rollout)
    assert torch.allclose(found, rollout.logprobs, atol=1e-5) and found.requires_grad


@pytest.mark.parametrize("N", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("logits, V, size", [(1, 19, 16), (400, 19, 21), (10**9, 19, 10**9 // 19)])
def test_chunks_are_all_tokens_once_in_order(logits, V, size, N, monkeypatch):
    monkeypatch.setattr(opd, "CHUNK_LOGITS", logits)
    some = opd.chunks(N, V)
    assert [i for n in some for i in range(N)[n]] == [*range(N)]
    assert [n.stop - n.start for n in some[:-1]] == [size] * (len(some) - 1)
    assert 1 <= some[-1].stop - some[-1].start <= size and some[-1].stop == N


READINGS = [
    dict(), dict(temperature=0.7), dict(vocab_size=17), dict(rows=2), dict(rows=1, temperature=1.4),
]  # fmt: skip


@pytest.mark.parametrize("logits", [1, 400, 10**9])
@pytest.mark.parametrize("how", READINGS, ids=str)
def test_chunks_of_log_probs_give_the_loss_and_gradient_of_the_whole(how, logits, monkeypatch):
    model, other, g = tiny_llama(), tiny_llama(seed=1), torch.Generator().manual_seed(0)
    other.requires_grad_(False)
    noise, weight = torch.rand(2, 4, 14, generator=g)
    rollout = opd.sample(model, random_prompts([3, 7, 5, 4]), horizon=14, noise=noise, eos_ids=[])
    mask = rollout.mask = torch.arange(14) < torch.tensor([14, 1, 9, 11])[:, None]
    plain = {key: value for key, value in how.items() if key != "rows"}
    logp, logq = (opd.score(m, rollout, **plain) for m in (model, other))
    whole = (opd.reverse_kl(logp, logq.detach()) * weight)[mask].sum()
    expected = torch.autograd.grad(whole, [*model.parameters()])

    shapes = watched(monkeypatch, logits)
    student = opd.LogProbs(model, rollout, grad=True, **how)
    teacher, total, N = opd.LogProbs(other, rollout, **how), 0.0, int(mask.sum())
    for n in opd.chunks(N, logp.shape[-1]):
        assert torch.allclose(student[n], logp[mask][n], atol=1e-5)
        assert not teacher[n].requires_grad
        loss = (opd.reverse_kl(student[n], teacher[n]) * weight[mask][n]).sum()
        total += loss.item()
        loss.backward()
    student.backward()
    most = max(opd.CHUNK_TOKENS, logits // logp.shape[-1])
    assert max(rows for rows, _ in shapes) == min(most, N)
    assert total == pytest.approx(whole.item(), abs=1e-4)
    size = max(gradient.abs().max() for gradient in expected)
    for ours, gradient in zip(model.parameters(), expected, strict=True):
        assert (ours.grad - gradient).abs().max() < 1e-5 * size


def test_log_probs_run_the_layers_once_whatever_the_chunks(monkeypatch):
    model, calls = tiny_llama(), Counter()
    rollout = opd.sample(model, random_prompts([4] * 3), horizon=20, eos_ids=[])
    model.base_model.layers[0].register_forward_hook(lambda *_: calls.update(forward=1))
    model.base_model.layers[0].register_full_backward_hook(lambda *_: calls.update(backward=1))
    monkeypatch.setattr(opd, "CHUNK_LOGITS", 1)
    student = opd.LogProbs(model, rollout, grad=True)
    some = opd.chunks(60, 23)
    for n in some:
        student[n].sum().backward()
    assert len(some) == 4 and calls == dict(forward=1)
    student.backward()
    assert calls == dict(forward=1, backward=1)
