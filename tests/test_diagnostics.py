"""§10: every diagnostic at its limits, and what `check` says of the shipped pairs."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, random_prompts, tiny_llama

import opd

MODELS = ROOT / "tiny_configs" / "models"

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
    assert torch.equal(found["entropy_gap"], opd.entropy_gap(logp, logq))
    assert torch.equal(found["overlap"], opd.overlap_ratio(logp, logq, 3))
    assert torch.equal(found["overlap_advantage"], opd.overlap_advantage(logp, logq, 3))
    masses = found["overlap_mass"], found["overlap_mass_teacher"]
    for mass, same in zip(masses, opd.overlap_mass(logp, logq, 3), strict=True):
        assert torch.equal(mass, same)
    r, reachable = opd.routing_target(logp, logq, action, **REACH)
    assert torch.equal(found["candidates"] > 0, reachable)
    assert torch.allclose(found["candidates"], ((r > 0) * logq.exp()).sum(-1))
    unsupported = ((logq.exp() < opd.UNSUPPORTED) * logp.exp()).sum(-1)
    assert torch.allclose(found["unsupported"], unsupported) and unsupported.max() > 0


def test_diagnose_takes_no_gradient():
    logp, logq, action = random_laws()
    found = opd.diagnose(logp.requires_grad_(), logq, action, **REACH)
    assert not any(values.requires_grad for values in found.values())


def test_top_share():
    mask = torch.tensor([[True] * 10, [True] * 10, [False] * 10])
    flat = torch.full((3, 10), -0.5)
    assert opd.top_share(flat, mask) == pytest.approx(0.05)
    one = torch.zeros(3, 10)
    one[1, 4], one[2] = 3.0, 99.0  # the masked row has no say
    assert opd.top_share(one, mask) == 1
    one[0, 0] = -1.0
    assert opd.top_share(one, mask) == pytest.approx(0.75)
    assert opd.top_share(one, mask, share=0.1) == 1
    assert math.isnan(opd.top_share(torch.zeros(3, 10), mask))


def test_auroc():
    right = torch.tensor([True, True, False, False])
    assert opd.auroc(torch.tensor([4.0, 3.0, 2.0, 1.0]), right) == 1
    assert opd.auroc(torch.tensor([1.0, 2.0, 3.0, 4.0]), right) == 0
    assert opd.auroc(torch.tensor([1.0, 1.0, 1.0, 1.0]), right) == 0.5
    assert opd.auroc(torch.tensor([3.0, 1.0, 2.0, 1.0]), right) == pytest.approx(2.5 / 4)
    assert math.isnan(opd.auroc(torch.tensor([1.0, 2.0]), torch.tensor([True, True])))


def ready(**fields):
    config = opd.Config.load(**{**dict(batch_size=2, top_k=4), **fields})
    world = opd.load_world(config)
    return config.model_copy(update=dict(max_tokens=world.task.max_tokens)), world


def test_gradient_moments_are_those_of_the_gradients_and_touch_nothing():
    config, world = ready()
    before = opd.weights_of(world.student)
    seen = []
    for step in (7, 8, 9):
        prompts = opd.step_prompts(config, world.task, step)
        rollout = opd.make_states(config, world, prompts, step, config.max_tokens)
        loss = opd.reverse_kl(*(opd.score(m, rollout) for m in (world.student, world.teacher)))
        loss = opd.masked_mean(loss, rollout.mask)
        grads = torch.autograd.grad(loss, [*world.student.parameters()])
        seen.append(torch.cat([g.flatten() for g in grads]))
    g = torch.stack(seen)
    mean, each = opd.gradient_moments(config, world, 3, first=7)
    assert mean == pytest.approx(g.mean(0).square().sum().item(), rel=1e-4)
    assert each == pytest.approx(g.square().sum(1).mean().item(), rel=1e-4)
    assert all(torch.equal(before[n], p) for n, p in world.student.named_parameters())
    assert all(p.grad is None for p in world.student.parameters())
    one, same = opd.gradient_moments(config, world, 1)
    assert one == pytest.approx(same)  # one gradient agrees with itself


PAIRS = {
    ("student_hasty", "teacher"): "go",
    ("student_hasty", "teacher_b"): "cold start first",
    ("teacher", "student_hasty"): "other teacher",
}


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_check_on_shipped_pairs(pair):
    student, teacher = (f"tiny_configs/models/{name}" for name in pair)
    verdict = opd.check(opd.Config.load(student=student, teacher=teacher))
    assert verdict.decision == PAIRS[pair]
    n = verdict.numbers
    assert 0 <= n["agreement"] <= 1 and 0 <= n["teacher_mass"] <= 1
    assert n["by_depth"][0]["student"] == n["student"] and n["gain"] >= n["teacher"] - n["student"]


def test_each_threshold_decides(monkeypatch):
    config = opd.Config.load(student=str(MODELS / "student_hasty"))
    monkeypatch.setattr(opd, "CHECK_PROMPTS", 32)
    for key, decision in (("gain", "other teacher"), ("agreement", "cold start first"),
                          ("teacher_mass", "cold start first")):  # fmt: skip
        monkeypatch.setattr(opd, "CHECK_LEAST", {**opd.CHECK_LEAST, key: 1.1})
        assert opd.check(config).decision == decision
        monkeypatch.undo()
        monkeypatch.setattr(opd, "CHECK_PROMPTS", 32)


def test_check_shortens_the_horizon_where_all_later_text_is_foreign(monkeypatch):
    config, keep = opd.Config.load(student="tiny_configs/models/student_novice"), opd.keep
    monkeypatch.setattr(opd, "CHECK_PROMPTS", 32)

    def foreign_after_20(seen, found, at, mask):
        keep(seen, found, at, mask)
        for name in ("agreement", "teacher_mass"):
            seen[name][:, 3], seen[name][:, 20:] = 0, 0  # one bad token early does not matter

    monkeypatch.setattr(opd, "keep", foreign_after_20)
    verdict = opd.check(config)
    assert verdict.decision == "shorten the horizon" and 18 <= verdict.numbers["horizon"] <= 24


def test_check_on_the_command_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(opd, "CHECK_PROMPTS", 16)
    file = tmp_path / "pair.json"
    file.write_text(json.dumps(dict(top_k=4)))
    assert opd.main(["check", str(file), "--batch_size", "8"]) == 0
    out = capsys.readouterr().out
    numbers, _, said = out.partition("\n}\n")
    assert said.startswith("\ngo\n") and "wanted at least 0.3" in said and '"gain"' in numbers
    assert json.loads(numbers + "}")["horizon"] == 53
    assert opd.main(["check", str(file), "--teacher", "none", "--method", "sft"]) == 2
    assert (
        capsys.readouterr().err
        == "opd.py: teacher = null: check needs one, here and not behind a teacher_url\n"
    )


# the trainer's law against the one sampled from


def metrics_of(before, engine, mask, **fields):
    """step_metrics on a made-up table: log-probs of the trainer and of the sampler, (2, 3)."""
    fields = dict(batch_size=2, max_tokens=3) | fields
    config, mask = opd.Config.load(**fields), torch.tensor(mask, dtype=torch.bool)
    prompts, none = random_prompts([2, 2], vocab=19), torch.zeros(2, 3)
    rollout = opd.Rollout(
        prompts.ids, prompts.mask, none.long(), mask, torch.tensor(engine), none[:, 0].bool()
    )
    table = opd.token_table(config, rollout, torch.zeros(2))
    table["before"] = torch.tensor(before)
    world = opd.World(tiny_llama(vocab=19), None, None, None, {}, None)
    sums = dict(loss=0.0, grad_norm=0.0)
    row = opd.step_metrics(config, world, 0, 3, prompts, table, sums)
    keys = ("engine_gap", "engine_gap_max", "ratio", "ratio_max", "ratio_clipped")
    return [row[key] for key in keys], row["tokens_sampled"]


LN2 = math.log(2)
TRAINER = [[-1.0 + LN2, -2.0, 99.0], [-3.0 - LN2, -1.0, -5.0 + 2 * LN2]]
SAMPLER = [[-1.0, -2.0, -99.0], [-3.0, -1.0, -5.0]]
MASK = [[1, 1, 0], [1, 0, 1]]  # ratios 2, 1, 1/2, 4


def test_engine_gap_and_ratio_by_hand():
    known, n = metrics_of(TRAINER, SAMPLER, MASK)
    assert known == pytest.approx([LN2, 2 * LN2, 7.5 / 4, 4.0, 0.0], rel=1e-6) and n == 4
    for cap, share in ((0.9, 0.75), (1.5, 0.5), (3.0, 0.25), (5.0, 0.0)):
        assert metrics_of(TRAINER, SAMPLER, MASK, importance_cap=cap)[0][-1] == share


def test_engine_gap_is_null_where_the_student_did_not_write():
    nobody = [[math.nan] * 3] * 2
    data = dict(states="data", feedback="imitation")
    assert metrics_of(TRAINER, nobody, MASK, **data) == ([None] * 5, 0)
    assert metrics_of(TRAINER, SAMPLER, MASK, states="teacher") == ([None] * 5, 4)
    known, n = metrics_of(TRAINER, SAMPLER, MASK, teacher_prefix=2)  # the last token is left
    assert known == pytest.approx([2 * LN2, 2 * LN2, 4.0, 4.0, 0.0], rel=1e-6) and n == 4
    shares = []
    for seed in range(40):  # mixed: the rows that the student has written
        mixed = dict(states="mixed", off_policy="data", student_share=0.5, seed=seed)
        mine = opd.luck(opd.Config.load(batch_size=2, max_tokens=3, **mixed), 0)[1].tolist()
        engine = [row if own else nobody[0] for row, own in zip(SAMPLER, mine, strict=True)]
        known, n = metrics_of(TRAINER, engine, MASK, **mixed)
        assert n == 2 * sum(mine)
        gap = {(1, 1): LN2, (1, 0): LN2 / 2, (0, 1): 1.5 * LN2, (0, 0): None}[(*mine,)]
        assert known[0] == (gap and pytest.approx(gap, rel=1e-6))
        mixed["off_policy"] = "teacher"
        assert metrics_of(TRAINER, SAMPLER, MASK, **mixed)[0][0] == known[0]
        shares.append(sum(mine))
    assert {*shares} == {0, 1, 2}
    assert metrics_of(TRAINER, SAMPLER, [[0] * 3] * 2)[0] == [None] * 5


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_engine_gap_of_the_own_sampler_is_rounding_and_of_a_nucleus_the_mass_kept(top_p):
    config = opd.Config.load(batch_size=8, max_tokens=20, top_p=top_p)
    nothing = SimpleNamespace(param_groups=[{}], step=lambda: None, zero_grad=lambda: None)
    row = opd.train_step(config, opd.load_world(config), nothing, 0, [])
    if top_p == 1:
        assert row["engine_gap_max"] < 1e-4 and row["ratio"] == pytest.approx(1, abs=1e-5)
    else:
        assert top_p - 1e-5 <= row["ratio"] < row["ratio_max"] <= 1 + 1e-5
