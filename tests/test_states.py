"""§3: sampling.  Against a re-forward, transformers' generate, other batch splits; EOS, horizon."""

import lab
import pytest
import torch
from conftest import random_laws, random_prompts, tiny_llama

import opd


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def noise_for(rows, columns, seed=0):
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("lengths", [[5, 5, 5], [2, 7, 4]])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_log_probs_of_the_sampler_equal_a_re_forward(model, lengths, temperature):
    noise = noise_for(3, 12)
    rollout = opd.sample(
        model, random_prompts(lengths), horizon=12, temperature=temperature, noise=noise, eos_ids=[]
    )
    with torch.no_grad():
        again = opd.score_tokens(model, rollout, temperature=temperature)
    assert (rollout.logprobs - again).abs().max() < 1e-5


def test_temperature_zero_takes_the_argmax_and_reports_the_log_probs_at_one(model):
    rollout = opd.sample(model, random_prompts([4, 6]), horizon=9, temperature=0, eos_ids=[])
    with torch.no_grad():
        logp = opd.score(model, rollout)
    assert torch.equal(logp.argmax(-1), rollout.tokens)
    assert (opd.of_tokens(logp, rollout.tokens) - rollout.logprobs).abs().max() < 1e-5


@pytest.mark.parametrize("lengths", [[6, 6, 6, 6], [3, 6, 4, 5]])
def test_greedy_equals_transformers_generate(model, lengths):
    prompts = random_prompts(lengths)
    theirs = model.generate(
        prompts.ids, attention_mask=prompts.mask.long(), max_new_tokens=10, do_sample=False,
        eos_token_id=2, pad_token_id=0,
    )[:, prompts.ids.shape[1] :]  # fmt: skip
    ours = opd.sample(model, prompts, horizon=10, temperature=0, eos_ids=[2])
    T = ours.tokens.shape[1]
    assert torch.equal(torch.where(ours.mask, ours.tokens, 0), theirs[:, :T] * ours.mask)
    assert theirs.shape[1] == T


def test_same_noise_same_text_whatever_the_split_and_whoever_stopped(model):
    lengths, noise = [3, 7, 5, 6, 4, 7], noise_for(6, 20)
    prompts, eos = random_prompts(lengths), [2, 3, 4, 5]  # many stop early
    whole = opd.sample(model, prompts, horizon=20, noise=noise, eos_ids=eos)
    assert 0 < whole.finished.sum() and whole.mask.sum(1).unique().numel() > 2
    for split in (1, 2, 4):
        parts = [
            opd.sample(model, opd.take(prompts, rows), horizon=20, noise=noise[rows], eos_ids=eos)
            for rows in torch.arange(6).split(split)
        ]
        rows = zip(*(torch.arange(6).split(split), parts), strict=True)
        for part, text in rows:
            width, own = text.mask.shape[1], opd.take(whole, part)
            assert torch.equal(text.mask, own.mask[:, :width]) and not own.mask[:, width:].any()
            assert torch.equal(text.tokens * text.mask, own.tokens[:, :width] * text.mask)
            assert ((text.logprobs - own.logprobs[:, :width]) * text.mask).abs().max() < 1e-5


def test_a_shorter_horizon_is_a_prefix_of_a_longer_one(model):
    prompts, noise = random_prompts([5, 3]), noise_for(2, 16)
    short = opd.sample(model, prompts, horizon=6, noise=noise, eos_ids=[])
    long = opd.sample(model, prompts, horizon=16, noise=noise, eos_ids=[])
    assert torch.equal(short.tokens, long.tokens[:, :6])


def test_mask_ends_with_the_first_eos_and_the_horizon_adds_none(model):
    noise = noise_for(32, 15)
    rollout = opd.sample(model, random_prompts([4] * 32), horizon=15, noise=noise, eos_ids=[2, 7])
    is_eos = torch.isin(rollout.tokens, torch.tensor([2, 7])) & rollout.mask
    lengths = rollout.mask.sum(1)
    assert torch.equal(rollout.finished, is_eos.any(1))
    last = rollout.tokens.gather(1, lengths[:, None] - 1).squeeze(1)
    assert torch.isin(last[rollout.finished], torch.tensor([2, 7])).all()
    assert (is_eos.sum(1) == rollout.finished.long()).all()  # one EOS, the last token, or none
    assert (~rollout.finished).any() and (
        lengths[~rollout.finished] == rollout.tokens.shape[1]
    ).all()


def test_pad_equal_to_eos_keeps_the_first_eos():
    tokens = torch.tensor([[5, 0, 0, 0], [0, 0, 0, 0], [5, 6, 7, 8]])
    expected = [[True, True, False, False], [True, False, False, False], [True] * 4]
    assert lab.through_eos(tokens, [0]).tolist() == expected


def test_vocab_size_keeps_padding_rows_of_the_embedding_unreachable(model):
    rollout = opd.sample(
        model, random_prompts([4] * 64), horizon=8, noise=noise_for(64, 8), eos_ids=[], vocab_size=5
    )
    assert rollout.tokens.max() < 5
    with torch.no_grad():
        assert opd.score(model, rollout, vocab_size=5).exp().sum(-1).sub(1).abs().max() < 1e-5
        assert (
            opd.score_tokens(model, rollout, vocab_size=5) - rollout.logprobs
        ).abs().max() < 1e-5


# the distribution of one draw


def test_inverse_cdf_draws_each_token_on_an_interval_as_long_as_its_probability():
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    for u, token in [(0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (0.999999, 4)]:
        assert opd.inverse_cdf(probs, torch.tensor([u])).item() == token
    assert opd.inverse_cdf(2 * probs, torch.tensor([0.3])).item() == 3  # need not sum to 1


def test_sampled_frequencies_within_four_standard_errors():
    logp = random_laws(vocab=8, seed=2)[0][0, 0]
    n = 50_000
    drawn = opd.inverse_cdf(logp.exp().expand(n, -1), noise_for(1, n)[0])
    share = torch.bincount(drawn, minlength=8) / n
    error = (logp.exp() * (1 - logp.exp()) / n).sqrt()
    assert ((share - logp.exp()).abs() < 4 * error).all()


def test_nucleus_keeps_the_smallest_set_that_reaches_top_p():
    logp = torch.tensor([0.1, 0.5, 0.25, 0.15]).log()
    kept = opd.nucleus(logp, 0.7).exp()
    assert torch.allclose(kept, torch.tensor([0.0, 2 / 3, 1 / 3, 0.0]))
    assert torch.allclose(opd.nucleus(logp, 1.0).exp(), logp.exp())
    assert torch.allclose(opd.nucleus(logp, 0.1).exp(), torch.tensor([0.0, 1.0, 0.0, 0.0]))


def test_top_p_biases_the_score_function_by_exactly_the_cut():
    """(20) E_{a~nucleus}[e_a - p] = nucleus - p: not 0, so baselines no longer cancel."""
    logp = random_laws(vocab=7, seed=8)[0][0, 0]
    p, kept = logp.exp(), opd.nucleus(logp, 0.6).exp()
    eye = torch.eye(7, dtype=p.dtype)
    expected = sum(kept[a] * (eye[a] - p) for a in range(7))
    assert torch.allclose(expected, kept - p, atol=1e-12) and (kept - p).abs().max() > 0.05


def test_top_p_sampling_reports_what_it_sampled_from(model):
    noise = noise_for(4, 8)
    rollout = opd.sample(
        model, random_prompts([5] * 4), horizon=8, top_p=0.6, noise=noise, eos_ids=[]
    )
    with torch.no_grad():
        logp = opd.nucleus(opd.score(model, rollout), 0.6)
    assert (opd.of_tokens(logp, rollout.tokens) - rollout.logprobs).abs().max() < 1e-4
    assert torch.isfinite(rollout.logprobs).all()


@pytest.mark.parametrize(
    "wrong",
    [dict(horizon=0), dict(horizon=4, temperature=-1.0), dict(horizon=4, top_p=0.0),
     dict(horizon=4, top_p=1.5), dict(horizon=9, noise=torch.rand(2, 8)),
     dict(horizon=4, noise=torch.rand(3, 8))],
)  # fmt: skip
def test_sample_refuses(model, wrong):
    with pytest.raises(opd.InputError, match="must be"):
        opd.sample(model, random_prompts([4, 4]), **wrong)


# other writers


def test_continue_rollout_keeps_the_head_and_is_seamless_with_one_model(model):
    prompts, noise, eos = random_prompts([4, 6, 5, 6]), noise_for(4, 18), [2, 3, 4]
    whole = opd.sample(model, prompts, horizon=18, noise=noise, eos_ids=eos)
    for depth in (1, 5, 17, 30):
        head = opd.sample(model, prompts, horizon=min(depth, 18), noise=noise, eos_ids=eos)
        how = dict(horizon=18, noise=noise, eos_ids=eos)
        again = lab.continue_rollout(model, head, depth, **how)
        assert torch.equal(again.tokens * again.mask, whole.tokens * whole.mask)
        assert torch.equal(again.finished, whole.finished)
        cut = lab.continue_rollout(model, whole, depth, **how)  # from a longer rollout, too
        assert torch.equal(cut.tokens * cut.mask, whole.tokens * whole.mask)


def test_teacher_prefix_then_student(model):
    other, prompts, noise = tiny_llama(seed=1), random_prompts([5, 3]), noise_for(2, 10)
    head = opd.sample(other, prompts, horizon=3, noise=noise, eos_ids=[])
    both = lab.continue_rollout(model, head, 3, horizon=10, noise=noise, eos_ids=[])
    assert torch.equal(both.tokens[:, :3], head.tokens) and both.tokens.shape == (2, 10)
    with torch.no_grad():
        student, teacher = (opd.score_tokens(m, both) for m in (model, other))
    assert (both.logprobs[:, :3] - teacher[:, :3]).abs().max() < 1e-5
    assert (both.logprobs[:, 3:] - student[:, 3:]).abs().max() < 1e-5


def states(world, step=0, **fields):
    config = opd.Config(max_tokens=world.task.max_tokens, **fields)
    return opd.write(config, world, step, opd.horizon_at(step, config))[1]


def rows(rollout):
    return [t[m].tolist() for t, m in zip(rollout.tokens, rollout.mask, strict=True)]


def coin(step):
    """The uniform of write's choice of a writer, at seed 0."""
    g = opd.keyed_generator(0, "noise", step)
    torch.rand(64, 53, generator=g)
    return float(torch.rand(1, generator=g))


@pytest.mark.parametrize("others", ["teacher", "data"])
def test_mixed_states_are_batches_of_one_writer(world, others):
    """GKD tosses one coin for the batch [secondary]."""
    wrote = []
    for step in range(6):
        whole = {who: states(world, step=step, states=who) for who in ("student", others)}
        mixed = states(world, step=step, states=others, student_share=0.5)
        wrote.append("student" if coin(step) < 0.5 else others)
        assert rows(mixed) == rows(whole[wrote[-1]])
        assert bool(mixed.logprobs[mixed.mask].isnan().any()) == (wrote[-1] == "data")
        assert rows(whole["student"]) != rows(whole[others])
    assert {*wrote} == {"student", others}
    for share, who in ((1.0, "student"), (0.0, others)):
        assert rows(states(world, states=others, student_share=share)) == rows(
            states(world, states=who)
        )


def test_the_teachers_text_carries_the_teachers_log_probs(world):
    rollout = states(world, states="teacher")
    with torch.no_grad():
        again = opd.score_tokens(world.teacher, rollout, vocab_size=world.vocab["vocab_size"])
    assert (again - rollout.logprobs)[rollout.mask].abs().max() < 1e-4


def test_the_log_probs_are_exact_where_they_can_be_counted():
    """Enumerate every response of length 2: the sampler's own log-probs must sum to one."""
    model, prompts = tiny_llama(vocab=6, seed=4), random_prompts([4], vocab=6)
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    many = opd.take(prompts, torch.zeros(36, dtype=torch.long))
    rollout = opd.Rollout(
        many.ids, many.mask, pairs, torch.ones_like(pairs, dtype=torch.bool),
        torch.zeros(36, 2), torch.zeros(36, dtype=torch.bool),
    )  # fmt: skip
    with torch.no_grad():
        total = opd.score_tokens(model, rollout).sum(1).exp().sum()
    assert total.item() == pytest.approx(1.0, abs=1e-5)
