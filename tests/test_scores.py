"""§3 and §7: alignment, padding, masks, aggregation.  Numbers in brackets: the formula list."""

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
        law = opd.score(model, rollout)
        ids = torch.cat([prompts.ids, rollout.tokens], dim=1)
        reference = model(ids).logits.log_softmax(-1)
    assert (law[0] - reference[0, 4:10]).abs().max() < 1e-5
    changed = opd.Rollout(*(v.clone() for v in vars(rollout).values()))
    changed.tokens[0, 3] = (changed.tokens[0, 3] + 1) % 23
    with torch.no_grad():
        other = opd.score(model, changed)
    assert (other[0, :4] - law[0, :4]).abs().max() < 1e-6  # the past does not see token 3
    assert (other[0, 4] - law[0, 4]).abs().max() > 1e-3


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
        law = opd.score(model, rollout)
    assert law.dtype == torch.float32 and law.exp().sum(-1).sub(1).abs().max() < 1e-5


def test_golden_temperature_mismatch():
    """(20) Sampled at 0.5, scored at 1: E[e_a - p_1] = p_.5 - p_1."""
    p = torch.tensor([0.7, 0.25, 0.05], dtype=torch.float64)
    cold = (2 * p.log()).softmax(-1)
    golden = torch.tensor([0.18288288, -0.13738739, -0.0454955], dtype=torch.float64)
    assert torch.allclose(cold - p, golden, atol=1e-7)


# §7 aggregation


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


def test_score_tokens_holds_one_chunk_and_has_the_same_gradient(monkeypatch):
    model, prompts = tiny_llama(), random_prompts([4, 2, 5])
    rollout = opd.sample(model, prompts, horizon=9, eos_ids=[])
    plain = opd.of_tokens(opd.score(model, rollout), rollout.tokens)
    expected = torch.autograd.grad(plain.sum(), [*model.parameters()])
    sizes, law_of = [], opd.law_of

    def watch(model, hidden, **law):
        sizes.append(len(hidden))
        return law_of(model, hidden, **law)

    monkeypatch.setattr(opd, "law_of", watch)
    monkeypatch.setattr(opd, "CHUNK_LOGITS", 1)
    found = opd.score_tokens(model, rollout)
    assert max(sizes) == opd.CHUNK_TOKENS < plain.numel()
    assert torch.allclose(found, plain, atol=1e-6)
    forward = len(sizes)
    gradient = torch.autograd.grad(found.sum(), [*model.parameters()])
    assert len(sizes) == 2 * forward  # recomputed, not kept
    for ours, whole in zip(gradient, expected, strict=True):
        assert torch.allclose(ours, whole, atol=1e-5)
