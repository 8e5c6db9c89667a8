"""§9: how long a rollout may be, and what a step costs.  (19) horizons and schedules; FLOPs."""

import itertools
import json
from fractions import Fraction

import lab
import pytest
import torch
from conftest import random_prompts, rows_of, tiny_llama
from test_training import SMALL, gradients_of_step, ready
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import opd

pytestmark = pytest.mark.usefixtures("quick")  # none looks at a curve

MODELS = "tiny_configs/models/synonym_"
SYNONYMS = dict(student=f"{MODELS}student", teacher=f"{MODELS}teacher", task="synonyms")


def one_step(rule, step=0, **fields):
    """A step's row, and every gradient before clipping, of a method or of a rule of lab."""
    given, hooks = lab.RULES[rule]() if rule in lab.RULES else (dict(method=rule), {})
    config, world, _ = ready(**{**given, **fields})
    return gradients_of_step(config, world, step, **hooks)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# (19) a horizon cuts, and does nothing else


@pytest.mark.parametrize("rule", ["opd_full", "opd", "gae_opd", "iw_opd"])
def test_a_horizon_past_the_longest_response_is_the_whole_run_bit_by_bit(rule):
    config, world, _ = ready()
    states = opd.write(config, world, 0, 53)[1]
    longest = states.tokens.shape[1]
    assert states.finished.all() and longest < config.max_tokens
    whole, gradient = one_step(rule)
    assert max(g.abs().max() for g in gradient) > 0
    for horizon in (longest, longest + 1, 10**6):
        row, other = one_step(rule, horizon=horizon)
        assert row["loss"] == whole["loss"] and same(gradient, other)
    row, other = one_step(rule, horizon=longest - 1)
    assert row["loss"] != whole["loss"] and not same(gradient, other)
    late = dict(schedule="linear", horizon_start=2, steps=10, growth=0.5)
    assert one_step(rule, 4, **late)[0]["horizon"] < config.max_tokens
    at_the_end, fixed = one_step(rule, 5, **late), one_step(rule, 5)
    assert at_the_end[0]["loss"] == fixed[0]["loss"] and same(at_the_end[1], fixed[1])


CUT = ["opd_full", "opd", "gae_opd", "cr_opd", "kd", "iw_opd", "prune_opd"]


@pytest.mark.parametrize("rule", CUT)
def test_an_update_does_not_depend_on_what_would_follow_the_horizon(rule, monkeypatch):
    """Other noise from token 3 on: other texts, and with a horizon of 3 the same update."""
    sample, found = opd.sample, {}

    def other_noise(model, prompts, *, noise, **how):
        return sample(model, prompts, noise=noise.index_fill(1, torch.arange(3, 13), 0.5), **how)

    for horizon, way in itertools.product((3, 13), (sample, other_noise)):
        monkeypatch.setattr(opd, "sample", way)
        found[horizon, way] = one_step(rule, **SYNONYMS, horizon=horizon)
    assert same(found[3, sample][1], found[3, other_noise][1])
    assert found[3, sample][0]["loss"] == found[3, other_noise][0]["loss"]
    assert not same(found[13, sample][1], found[13, other_noise][1])


@pytest.mark.parametrize("aggregation", ["token", "sequence_sum", "sequence_mean"])
def test_a_cut_run_has_the_gradient_of_the_first_tokens_alone(aggregation):
    """Positions after the horizon have gradient 0 at their logits; the kept ones lose nothing."""
    config, world, _ = ready(aggregation=aggregation, horizon=6)
    prompts, whole = opd.write(config, world, 0, 40)
    kept = whole.mask & (torch.arange(whole.mask.shape[1]) < 6)
    logp, logq = (opd.score(m, whole, vocab_size=19) for m in (world.student, world.teacher))
    logp.retain_grad()
    loss = opd.masked_mean(opd.reverse_kl(logp, logq.detach()), kept, aggregation)
    loss.backward()
    assert not logp.grad[:, 6:].any() and logp.grad[:, :6].any(-1)[kept[:, :6]].all()
    expected = [p.grad.clone() for p in world.student.parameters()]
    world.student.zero_grad()
    row, gradients = gradients_of_step(config, world)
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for a, b in zip(expected, gradients, strict=True):
        assert (a - b).abs().max() < 1e-5 * max(g.abs().max() for g in expected)


def test_an_eos_within_the_horizon_is_scored_none_is_added_and_a_cut_row_is_not_finished():
    config, world, optimizer = ready(horizon=6, batch_size=64)
    states, full = (opd.write(config, world, 0, horizon)[1] for horizon in (6, 53))
    learned = []

    def spy(c, logp, logq, action, *rest):
        learned.extend(action.tolist())
        return opd.token_loss(c, logp, logq, action, *rest)

    row = opd.train_step(config, world, optimizer, 0, loss=spy)
    cut = full.mask.sum(1) > 6
    assert 0 < cut.sum() < 64 and torch.equal(states.finished, ~cut)
    assert torch.equal(states.tokens, full.tokens[:, :6])  # what it would have said, and no more
    assert torch.equal(states.mask, full.mask[:, :6]) and states.mask[cut].all()
    assert not (states.tokens[cut] == 2).any()
    assert learned.count(2) == int((~cut).sum()) and len(learned) == row["tokens_trained"]
    assert learned == states.tokens[states.mask].tolist()
    assert row["finished"] == float((~cut).float().mean())


# (19) schedules


def horizons(config):
    """The horizon of every step and a few more."""
    return [opd.horizon_at(step, config) for step in range(config.steps + 5)]


def growing(schedule, **fields):
    given = dict(max_tokens=50, horizon_start=6, growth=0.5, steps=40)
    return opd.Config(schedule=schedule, **{**given, **fields})


def test_there_is_no_adaptive_schedule():
    """Fault 5 of the first edition, whose coherence was measured at horizon_start: it is gone."""
    with pytest.raises(opd.InputError, match="^schedule = 'adaptive'"):
        opd.Config.load(schedule="adaptive")
    with pytest.raises(opd.InputError, match="^horizon_kl = 0.1: unknown"):
        opd.Config.load(horizon_kl=0.1)


SCHEDULES = ["fixed", "linear", "staircase"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_is_monotone_starts_at_its_start_and_is_capped_at_its_end(schedule):
    for start, end, most, steps, growth in itertools.product(
        (1, 6, 80), (None, 1, 5, 30, 200, 0.1, 0.5), (1, 12, 50), (0, 1, 7, 40), (0.01, 0.5, 1.0)
    ):
        settings = dict(horizon_start=start, horizon=end, max_tokens=most, steps=steps)
        found = horizons(growing(schedule, **settings, growth=growth))
        last = most if end is None else max(1, min(most, round(end * most) if end < 1 else end))
        assert found == sorted(found) and found[0] >= 1 and found[-1] == last, settings
        assert found[0] == (last if schedule == "fixed" else min(start, last)), settings


@pytest.mark.parametrize("schedule", ["linear", "staircase"])
@pytest.mark.parametrize(
    "growth, steps", [(0.6, 40), (0.5, 10), (1.0, 7), (0.25, 3), (0.3, 11), (0.55, 100)]
)
def test_the_end_is_reached_after_growth_times_the_steps_and_not_before(growth, steps, schedule):
    found = horizons(growing(schedule, growth=growth, steps=steps, max_tokens=2000))
    done = max(1, Fraction(str(growth)) * steps)  # 0.55 * 100 is 55, though not in floats
    assert [h == 2000 for h in found] == [step >= done for step in range(len(found))]


def test_the_linear_ramp_is_a_straight_line():
    found = horizons(growing("linear", max_tokens=46))
    assert found[:21] == [6 + 2 * k for k in range(21)] and set(found[21:]) == {46}


def test_the_staircase_has_four_equal_stairs_below_the_ramp():
    stairs, ramp = (horizons(growing(s, max_tokens=46)) for s in ("staircase", "linear"))
    assert stairs[:21] == [6] * 5 + [16] * 5 + [26] * 5 + [36] * 5 + [46]
    assert all(a <= b for a, b in zip(stairs, ramp, strict=True))
    assert [a == b for a, b in zip(stairs[:20], ramp[:20], strict=True)] == [True, *[False] * 4] * 4


def test_a_float_is_a_share_of_max_tokens_whatever_the_schedule():
    for schedule in SCHEDULES:
        found = horizons(growing(schedule, horizon=0.3))
        assert found[-1] == 15 and found == horizons(growing(schedule, horizon=15))
    topd = opd.Config.load(method="topd", max_tokens=50)
    assert set(horizons(topd)) == {5}


SHORT = dict(SMALL, batch_size=4, eval_every=0, eval_prompts=4, max_tokens=20, lr=3e-3, decay=0.0)
GROWING = dict(SHORT, schedule="linear", horizon_start=2, steps=8, growth=1.0, diagnose_every=1)


def cut_and_resume(name, step, **fields):
    """The same run, interrupted right after a step and resumed: its rows and weights."""
    save = opd.save_checkpoint

    def stop(run, *rest):
        save(run, *rest)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opd, "save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            opd.train(opd.Config.load(**fields, name=name, checkpoint_every=step))
    assert len(rows_of(f"runs/{name}")) == step
    run = opd.train(opd.Config.load(f"runs/{name}/config.json"), f"runs/{name}")
    return rows_of(run.dir), [p.detach() for p in run.model.parameters()]


def test_a_resumed_growing_run_has_the_horizons_of_an_uninterrupted_one(run_dir):
    run = opd.train(opd.Config.load(**GROWING, name="whole"))
    rows = rows_of(run.dir)
    grown = [row["horizon"] for row in rows]
    assert grown[0] == 2 and len(set(grown)) == 8
    for step in (1, 5):
        found, weights = cut_and_resume(f"cut{step}", step, **GROWING)
        assert found == rows and same(weights, run.model.parameters())


def test_a_run_keeps_to_its_schedule(run_dir):
    config = opd.Config.load(**SHORT, method="opd_full+popd", steps=6, horizon_start=3)
    run = opd.train(config)
    rows = rows_of(run.dir)
    assert [r["horizon"] for r in rows] == [opd.horizon_at(s, run.config) for s in range(6)]
    assert [r["horizon"] for r in rows] == [3, 7, 11, 16, 20, 20]
    assert all(r["length"] <= r["horizon"] for r in rows)
    assert rows[0]["length"] > 2


# FLOPs, held against torch's own counter: matrix products are all that either counts


def eager(model):
    model.set_attn_implementation("eager")  # the counter does not know the CPU's fused attention
    return model


def flops(act):
    """What torch counts while act() runs, and what act() returns."""
    with FlopCounterMode(display=False) as counter:
        found = act()
    return counter.get_total_flops(), found


def qwen3():
    """Heads of 24, not of hidden_size / heads = 8; fewer keys than queries."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=41, hidden_size=32, intermediate_size=80, num_hidden_layers=3, head_dim=24,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def wide_llama():
    model = tiny_llama(vocab=300)
    model.config.update(dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4))
    return type(model)(model.config).eval()


def gpt2():
    """Its matrices are Conv1D's, with biases."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=23, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=1,
        eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def mixture(active=4):
    """Four experts in fused 3-D weights; all of them active: as dense as a model can be."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=41, hidden_size=32, intermediate_size=80, moe_intermediate_size=24, head_dim=16,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, num_experts=4,
        num_experts_per_tok=active, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).eval()
    model.set_experts_implementation("eager")  # the counter does not know the grouped product
    return model


BUILD = dict(llama=tiny_llama, wide_llama=wide_llama, qwen3=qwen3, gpt2=gpt2, mixture=mixture)


@pytest.fixture(params=BUILD, scope="module")
def built(request):
    return eager(BUILD[request.param]())


@pytest.mark.parametrize("prompt, response", [(3, 25), (19, 4)])
def test_flops_of_sampling_from_the_cache(built, prompt, response):
    prompts, (B, P, T) = random_prompts([prompt] * 3), (3, prompt, response)
    noise = torch.rand(B, T)
    counted, rollout = flops(lambda: opd.sample(built, prompts, horizon=T, noise=noise, eos_ids=[]))
    assert rollout.mask.all() and rollout.tokens.shape == (B, T)
    pairs = B * (P * P + sum(P + t for t in range(1, T)))
    assert opd.forward_flops(built, B * (P + T - 1), pairs, B * T) == pytest.approx(counted, 1e-3)


@pytest.mark.parametrize("prompt, response", [(3, 25), (19, 4)])
def test_flops_of_scoring_and_of_the_backward_pass(built, prompt, response):
    prompts, (B, P, T) = random_prompts([prompt] * 3), (3, prompt, response)
    rollout = opd.sample(built, prompts, horizon=T, noise=torch.rand(B, T), eos_ids=[])
    with torch.no_grad():
        scored, _ = flops(lambda: opd.score(built, rollout))
    trained, _ = flops(lambda: opd.score(built, rollout).logsumexp(-1).sum().backward())
    expected = opd.forward_flops(built, B * (P + T - 1), B * (P + T - 1) ** 2, B * T)
    assert expected == pytest.approx(scored, 1e-3) and 3 * expected == pytest.approx(trained, 1e-3)
    head_on_all = opd.forward_flops(built, B * (P + T - 1), B * (P + T - 1) ** 2, B * (P + T - 1))
    assert head_on_all > 1.001 * scored  # the head reads the response only


def test_flops_count_every_matrix_of_the_layers():
    """Fault 4 of the first edition: GPT-2 had 0, and fused experts were left out."""
    attention, mlp = 4 * 32 * 32, 2 * 32 * 128
    assert opd.forward_flops(gpt2(), 1, 0, 0) == 2 * 2 * (attention + mlp)
    attention, experts, router = 4 * 32 * 32, 4 * 3 * 32 * 24, 4 * 32
    for active in (1, 4):  # too much where few are active, and so documented
        found = opd.forward_flops(mixture(active), 1, 0, 0)
        assert found == 2 * 2 * (attention + experts + router)
    assert "Mixtures of experts: too much" in opd.forward_flops.__doc__


COSTS = [
    dict(), dict(method="opd"), dict(method="gae_opd"), dict(method="vopd"), dict(method="cr_opd"),
    dict(method="sft"), dict(method="reinforce"), dict(method="kd"), dict(updates_per_rollout=3),
    dict(micro_batch=3), dict(states="data"), dict(horizon=1), dict(method="gkd"),
    dict(states="teacher", student_share=0.5),
    dict(task="synonyms", updates_per_rollout=3), dict(diagnose_every=1),
]  # fmt: skip


@pytest.mark.parametrize("fields", COSTS, ids=str)
def test_a_steps_flops_are_what_torch_counts(fields):
    """Rows stop when they like, prompts are padded: the counter sees what was really computed."""
    where = dict(SYNONYMS, horizon=8) if "task" in fields else dict(horizon=14)
    config, world, optimizer = ready(**{**where, **fields})
    eager(world.student)
    world.teacher and eager(world.teacher)
    horizon = opd.horizon_at(0, config)
    sampled, _ = flops(lambda: opd.write(config, world, 0, horizon))
    total, row = flops(lambda: opd.train_step(config, world, optimizer, 0))
    assert row["flop_sample"] == pytest.approx(sampled, rel=1e-3)
    rest = row["flop_score"] + row["flop_update"]
    assert rest == pytest.approx(total - sampled, rel=0.02) and rest > 0
    assert (row["flop_score"] > 0) == (config.reads != "nothing")


def test_flops_of_a_run_are_cumulative_by_part_and_grow_with_the_tokens(run_dir, monkeypatch):
    own, train_step = [], opd.train_step

    def spy(*args, **hooks):
        row = train_step(*args, **hooks)
        own.append(dict(row))
        return row

    monkeypatch.setattr(opd, "train_step", spy)
    run = opd.train(opd.Config.load(**SHORT, method="opd+prefix", steps=4, horizon_start=2))
    rows = rows_of(run.dir)
    for part in ("sample", "score", "update"):
        steps, total = [row[f"flop_{part}"] for row in own], itertools.accumulate
        assert [row[f"flop_{part}"] for row in rows] == pytest.approx([*total(steps)])
        assert 0 < steps[0] < steps[1] < steps[2] < steps[3]  # longer horizons cost more
        assert run.result["flop"][part] == rows[-1][f"flop_{part}"]
    assert json.loads((run.dir / "result.json").read_text())["flop"] == run.result["flop"]
