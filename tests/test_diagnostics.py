"""§10: every diagnostic at its limits, and what `check` says of the shipped pairs."""

import json
import math

import pytest
import torch
from conftest import ROOT

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


def test_check_on_the_command_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(opd, "CHECK_PROMPTS", 16)
    file = tmp_path / "pair.json"
    file.write_text(json.dumps(dict(top_k=4)))
    assert opd.main(["check", str(file), "--batch_size", "8"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("go\n") and "wanted at least 0.3" in out
    assert json.loads(out[out.index("{") :])["horizon"] == 53
    assert opd.main(["check", str(file), "--teacher", "none", "--method", "sft"]) == 2
    assert capsys.readouterr().err == "opd.py: teacher = null: check needs one\n"
