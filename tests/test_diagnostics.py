"""§10, §12, §14: every diagnostic at its limits, and what a run is judged by."""

import math

import pytest
import texts
import torch
from conftest import random_prompts, tiny_llama
from test_training import SMALL, ready

import opd

REACH = dict(top_k=3, min_prob=1e-4)


def laws(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def random_laws(n=50, size=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(2, n, size, generator=g, dtype=torch.float64)
    return *z.log_softmax(-1), torch.randint(size, (n,), generator=g)


def test_identical_models():
    logp, _, action = random_laws()
    found = opd.diagnose(logp, logp, action, **REACH)
    for name in ("kl", "reward", "entropy_gap", "overlap_advantage", "candidates"):
        assert found[name].abs().max() < 1e-12, name
    assert (found["agreement"] == 1).all() and (found["overlap"] == 1).all()
    assert torch.equal(found["overlap_mass"], found["overlap_mass_teacher"])
    assert torch.allclose(found["teacher_mass"], logp.exp().topk(4).values.sum(-1))
    assert torch.equal(found["entropy"], found["teacher_entropy"])


def test_disjoint_top_k_and_an_overlap_of_one_token():
    p = laws([0.4, 0.3, 0.2, 0.04, 0.03, 0.03])
    apart = laws([0.02, 0.03, 0.05, 0.2, 0.3, 0.4])
    found = opd.diagnose(p, apart, torch.tensor([0]), **REACH)
    for name in ("overlap", "overlap_mass", "overlap_mass_teacher", "overlap_advantage"):
        assert found[name].item() == 0, name
    assert found["agreement"].item() == 0
    assert found["teacher_mass"].item() == pytest.approx(0.02 + 0.03 + 0.05 + 0.2)
    assert found["candidates"].item() == pytest.approx(0.9)  # all three: q > p, reachable
    one = laws([0.02, 0.03, 0.3, 0.05, 0.2, 0.4])  # shares token 2 only
    found = opd.diagnose(p, one, torch.tensor([0]), **REACH)
    assert found["overlap"].item() == pytest.approx(1 / 3)
    assert found["overlap_mass"].item() == pytest.approx(0.2)
    assert found["overlap_mass_teacher"].item() == pytest.approx(0.3)
    assert found["overlap_advantage"].item() == 0  # renormalised on one token both laws are 1


def test_diagnose_is_made_of_the_public_functions():
    logp, logq, action = random_laws()
    found = opd.diagnose(logp, logq, action, **REACH)
    assert torch.equal(found["kl"], opd.reverse_kl(logp, logq))
    gap = (opd.entropy(logp) - opd.entropy(logq)).abs()
    assert torch.equal(found["entropy_gap"], gap) and gap.max() > 0.1
    names = ("overlap", "overlap_mass", "overlap_mass_teacher", "overlap_advantage")
    for name, same in zip(names, opd.overlap(logp, logq, 3), strict=True):
        assert torch.equal(found[name], same), name
    reward = opd.log_ratio_reward(opd.of_tokens(logp, action), opd.of_tokens(logq, action))
    assert torch.equal(found["reward"], reward)
    r, reachable = opd.routing_target(logp, logq, action, **REACH)
    assert torch.equal(found["candidates"] > 0, reachable)
    assert torch.allclose(found["candidates"], ((r > 0) * logq.exp()).sum(-1))
    unsupported = ((logq.exp() < opd.UNSUPPORTED) * logp.exp()).sum(-1)
    assert torch.allclose(found["unsupported"], unsupported) and unsupported.max() > 0


def test_diagnose_takes_no_gradient():
    logp, logq, action = random_laws()
    found = opd.diagnose(logp.requires_grad_(), logq, action, **REACH)
    assert not any(values.requires_grad for values in found.values())


def test_notes_are_taken_at_temperature_1():
    logp, logq, action = random_laws()
    c = opd.Config.load(method="opd", temperature=2.0, top_k=3)
    hot, hot_q = ((x / 2).log_softmax(-1) for x in (logp, logq))
    advantage = torch.linspace(-1, 1, 50).double()
    seen = opd.notes(c, hot, hot_q, action, advantage)
    expected = opd.diagnose(logp, logq, action, **REACH)
    for name, value in expected.items():
        assert torch.allclose(seen[name], value, atol=1e-9), name
    assert torch.equal(seen["gated"], advantage < 0) and seen["gated"].sum() == 25
    routed = opd.notes(c.model_copy(update=dict(negative="route")), hot, hot_q, action, advantage)
    assert torch.equal(routed["gated"], (advantage < 0) & (expected["candidates"] > 0))
    alone = opd.notes(c, hot, None, action, advantage)  # no teacher: what it can say
    assert torch.allclose(alone["entropy"], opd.entropy(logp)) and "kl" not in alone
    assert "gated" not in opd.notes(opd.Config.load(top_k=3), hot, hot_q, action, advantage)


def test_what_counts_as_gated_has_the_baseline_that_the_loss_takes_off():
    """p = (.5, .4, .1), q = (.45, .05, .5), a = 0: the reward is -.1, more than is expected."""
    logp, logq = (torch.tensor([[*x]]).log() for x in ((0.5, 0.4, 0.1), (0.45, 0.05, 0.5)))
    action = torch.tensor([0])
    reward = opd.log_ratio_reward(opd.of_tokens(logp, action), opd.of_tokens(logq, action))
    for method, gated in dict(opd=True, vopd=False).items():
        c = opd.Config.load(method=method, top_k=3)
        assert opd.notes(c, logp, logq, action, reward)["gated"].item() is gated


# the trainer's log-probs against those sampled from


def metrics_of(before, drawn, mask, **fields):
    """step_metrics on made-up log-probs of the trainer and of the sampler, (2, 3) each."""
    config = opd.Config.load(**(dict(batch_size=2, max_tokens=3) | fields))
    mask, drawn = torch.tensor(mask, dtype=torch.bool), torch.tensor(drawn)
    prompts, none = random_prompts([2, 2], vocab=19), torch.zeros(2, 3)
    rollout = opd.Rollout(prompts.ids, prompts.mask, none.long(), mask, drawn, none[:, 0].bool())
    world = opd.World(tiny_llama(vocab=19), None, None, None, {})
    world.flop[world.student] = 1.0
    gap, none = (torch.tensor(before) - drawn)[mask], none[mask]
    seen = [dict(gap=gap, loss=none, weight=none, reward=none)]
    row = opd.step_metrics(config, world, rollout, torch.zeros(2).bool(), seen)
    return [row["engine_gap"], row["ratio_max"]], row["tokens_sampled"]


LN2 = math.log(2)
TRAINER = [[-1.0 + LN2, -2.0, 99.0], [-3.0 - LN2, -1.0, -5.0 + 2 * LN2]]
SAMPLER = [[-1.0, -2.0, -99.0], [-3.0, -1.0, -5.0]]
MASK = [[1, 1, 0], [1, 0, 1]]  # ratios 2, 1, 1/2, 4


def test_engine_gap_and_ratio_by_hand():
    known, n = metrics_of(TRAINER, SAMPLER, MASK)
    assert known == pytest.approx([LN2, 4.0], rel=1e-6) and n == 4


def test_engine_gap_is_null_where_the_student_did_not_write():
    nobody = [[math.nan] * 3] * 2
    data = dict(states="data", feedback="imitation")
    assert metrics_of(TRAINER, nobody, MASK, **data) == ([None] * 2, 0)
    assert metrics_of(TRAINER, SAMPLER, MASK, states="teacher") == ([None] * 2, 4)
    mixed = dict(states="data", student_share=0.5)  # the second row is the student's
    assert metrics_of(TRAINER, [nobody[0], SAMPLER[1]], MASK, **mixed) == ([None] * 2, 2)


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_engine_gap_of_the_own_sampler_is_rounding_and_of_a_nucleus_the_mass_kept(top_p):
    config, world, optimizer = ready(max_tokens=20, top_p=top_p)
    ratios = []

    def spy(c, logp, logq, action, advantage, behaviour, n):
        ratios.extend((opd.of_tokens(logp, action) - behaviour).exp().tolist())
        return opd.token_loss(c, logp, logq, action, advantage, behaviour, n)

    row = opd.train_step(config, world, optimizer, 0, loss=spy)
    assert row["ratio_max"] == pytest.approx(max(ratios), rel=1e-6)
    gaps = [abs(math.log(ratio)) for ratio in ratios]
    assert row["engine_gap"] == pytest.approx(sum(gaps) / len(gaps), rel=1e-4, abs=1e-6)
    if top_p == 1:
        assert max(gaps) < 1e-4 and row["ratio_max"] == pytest.approx(1, abs=1e-4)
    else:
        assert top_p - 1e-5 <= min(ratios) < max(ratios) <= 1 + 1e-5
        assert row["engine_gap"] > 1e-3


# what a run is judged by


def looked_at(monkeypatch, seed):
    """What every `sample` of a run of one step was given, by split: (texts, noise)."""
    found, sample = {split: [] for split in opd.SPLITS}, opd.sample

    def watch(model, prompts, *, noise, **how):
        (split,) = {texts.split_of(text) for text in prompts.text}
        found[split].append((prompts.text, noise))
        return sample(model, prompts, noise=noise, **how)

    monkeypatch.setattr(opd, "sample", watch)
    opd.train(opd.Config.load(**SMALL, steps=1, eval_every=1, seed=seed, max_tokens=12))
    monkeypatch.setattr(opd, "sample", sample)
    return found


def test_the_final_evaluation_is_the_seeds_own_and_the_same_for_all_models(run_dir, monkeypatch):
    """Fault 8 of the first edition: all seeds shared the test's prompts and noise."""
    monkeypatch.setattr(opd, "VALIDATION_PROMPTS", 16)
    runs = [looked_at(monkeypatch, seed) for seed in (0, 1, 2)]
    for run in runs:  # before, the teacher, after; greedy and sampled
        assert len(run["test"]) == 6 and len(run["validation"]) == 1 and len(run["train"]) == 1
        texts, noise = run["test"][0]
        assert len(texts) == SMALL["eval_prompts"]
        assert all(t == texts and torch.equal(u, noise) for t, u in run["test"])
        for kind in ("validation", "test"):  # known again: the validation is the same for all
            theirs, luck = run[kind][0]
            ours, mine = runs[0][kind][0]
            same = kind == "validation" or run is runs[0]
            assert (theirs == ours) == torch.equal(luck, mine) == same, kind


def test_evaluate_repeats_exactly_and_its_noise_is_its_seeds(world):
    prompts, found = world.task.prompts(48, "test"), {}
    for seed in (0, 0, 1):
        said = []
        opd.evaluate(world.student, world.task, prompts, seed=seed, said=said, **world.vocab)
        assert found.setdefault(seed, said) == said
    assert found[0] != found[1]
    greedy = [
        opd.evaluate(world.student, world.task, prompts, seed=s, greedy=True, **world.vocab)
        for s in (0, 1)
    ]
    assert greedy[0] == greedy[1]
