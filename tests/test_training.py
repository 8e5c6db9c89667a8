"""Sections 10 and 14: the step, its hooks, schedules, the loop, checkpoints, resume, the files."""

import ast
import inspect
import json
import math
import os
import re
import signal
import textwrap
import time
from pathlib import Path

import pytest
import torch
from conftest import ended, fork, rows_of

import opd

SMALL = dict(batch_size=8, eval_prompts=16, warmup=2, runs="runs")


@pytest.fixture(autouse=True)
def small_validation(monkeypatch):
    monkeypatch.setattr(opd, "VALIDATION_PROMPTS", 16)


def ready(**fields):
    """Config, world and optimizer of a small run."""
    config = opd.Config.load(**{**SMALL, **fields})
    world = opd.load_world(config)
    config = config.model_copy(update=dict(max_tokens=world.task.max_tokens))
    return config, world, opd.make_optimizer(config, world)


def written(config, world, step=0, horizon=None):
    """A step's prompts and rollout."""
    return opd.write(config, world, step, horizon or config.max_tokens)


def resumed(folder, **hooks):
    return opd.train(opd.Config.load(Path(folder) / "config.json"), folder, **hooks)


# the main job, in small: it learns


def test_it_learns(run_dir):
    fields = dict(steps=12, decay=0.0, eval_prompts=128, eval_every=12, diagnose_every=1)
    run = opd.train(opd.Config.load(**fields))
    before, after = run.result["student_before"], run.result["student_after"]
    assert before["high"] < after["low"] and after["accuracy"] > 0.9
    rows = rows_of(run.dir)
    assert rows[-1]["kl"] < rows[0]["kl"] / 5


# the loop in the module's docstring is the step without its variables


def test_the_loop_of_the_header_is_opd_full():
    """Its text, run as it stands with public names, has opd_full's losses over five steps."""
    code = textwrap.dedent(re.search(r"(?ms)^    optimizer = .*?\n\n", opd.__doc__)[0])
    assert len(code.strip().splitlines()) == 12
    fields = dict(steps=5, warmup=0, decay=0.0, grad_clip=1e9, lr=1e-3, seed=3, eval_every=0)
    config, world, optimizer = ready(**fields)
    expected = [opd.train_step(config, world, optimizer, step)["loss"] for step in range(5)]
    _, fresh, _ = ready(**fields)
    given = dict(
        torch=torch, student=fresh.student, teacher=fresh.teacher, task=fresh.task, lr=1e-3,
        steps=5, batch_size=8, horizon=config.max_tokens, seed=3,
    )  # fmt: skip
    public = {name: value for name, value in vars(opd).items() if not name.startswith("_")}
    used = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    assert {"keyed_generator", "sample", "score", "masked_mean", "reverse_kl"} <= used
    losses = []

    def watched(*arguments):
        losses.append(opd.masked_mean(*arguments))
        return losses[-1]

    exec(code, public | given | dict(masked_mean=watched))
    assert [x.item() for x in losses] == pytest.approx(expected, abs=1e-5)
    assert expected[-1] < expected[0]


# the step


def gradients_of_step(config, world, step=0, **hooks):
    """A step's row, and the gradients that its update would follow."""
    found = []

    def keep(c, world, optimizer, step):
        found.extend(p.grad.clone() for p in world.student.parameters())
        world.student.zero_grad()
        return 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opd, "update_student", keep)
        row = opd.train_step(config, world, opd.make_optimizer(config, world), step, **hooks)
    return row, found


def test_micro_batches_give_the_same_gradient():
    weights = []
    for micro in (None, 3):
        config, world, optimizer = ready(micro_batch=micro, warmup=0)
        opd.train_step(config, world, optimizer, 0)
        weights.append([p.detach().clone() for p in world.student.parameters()])
        moments = [row["exp_avg"] for row in optimizer.state.values()]
        weights[-1] += [m / config.lr for m in moments]
    assert all((a - b).abs().max() < 1e-3 for a, b in zip(*weights, strict=True))
    gradients = [w[len(w) // 2 :] for w in weights]
    largest = max(g.abs().max() for g in gradients[0])
    assert all((a - b).abs().max() < 1e-4 * largest for a, b in zip(*gradients, strict=True))


def whole_loss(config, world, step):
    """The step's loss from the full (B, T, V) log-probs, and its gradient: the plain way."""
    config = config.model_copy(update=dict(micro_batch=None))
    prompts, rollout = written(config, world, step, opd.horizon_at(step, config))
    right, mask = world.task.verify(prompts, rollout), rollout.mask
    how = dict(temperature=config.temperature, vocab_size=world.vocab["vocab_size"])
    logp = opd.score(world.student, rollout, **how)
    with torch.no_grad():
        logq = opd.score(world.teacher, rollout, **how)[mask]
    reward = opd.judge(config, world, rollout, logq, right)
    advantage = opd.credit(config, world, rollout, reward, step)
    tables = (table[mask] for table in (rollout.tokens, advantage, rollout.logprobs))
    each = opd.token_loss(config, logp[mask], logq, *tables, slice(None))
    each = torch.zeros(mask.shape, dtype=each.dtype).masked_scatter(mask, each)
    if config.keep == "right":
        mask = mask & (right & rollout.finished)[:, None]
    total = None if config.keep == "all" else mask.any(1).sum()
    total = mask.sum() if config.aggregation == "token" else total
    loss = opd.masked_mean(each, mask, config.aggregation, total)
    loss.backward()
    return loss.item(), [p.grad.clone() for p in world.student.parameters()], rollout


def compare_chunks_with_the_whole(fields, chunk, monkeypatch):
    """In chunks and micro-batches of 3 + 1 rows; a critic gets the same gradient too.

    Truncated divergences in float64: a bucket's gradient divides by a tail that fp32 knows to a
    digit or two.
    """
    fields = dict(horizon=9) | fields
    config, world, _ = ready(batch_size=4, micro_batch=3, eval_every=0, **fields)
    if config.route == "direct" and config.support != "full":
        world.student.double(), world.teacher.double()
    if world.critic is not None:
        torch.nn.init.constant_(world.critic.weight, 0.1)
    expected, gradients, rollout = whole_loss(config, world, step=7)
    critic = [p.grad.clone() for p in world.critic.parameters()] if world.critic else []
    for model in filter(None, (world.student, world.critic)):
        model.zero_grad()
    monkeypatch.setattr(opd, "CHUNK_LOGITS", chunk)
    monkeypatch.setattr(opd, "CHUNK_TOKENS", 1)
    sizes, getitem = [], opd.LogProbs.__getitem__

    def watched(self, n):
        logp = getitem(self, n)
        sizes.extend([len(logp)] if self.model is world.student else [])
        assert len(logp) <= max(1, chunk // 19)
        return logp

    monkeypatch.setattr(opd.LogProbs, "__getitem__", watched)
    row, found = gradients_of_step(config, world, step=7)
    assert sum(sizes) == int(rollout.mask.sum()) > 0 < abs(expected)  # response tokens, each once
    assert row["loss"] == pytest.approx(expected, abs=1e-5, rel=1e-5)
    same_gradients(gradients, found)
    if critic:
        assert max(g.abs().max() for g in critic) > 0.01
        same_gradients(critic, [p.grad for p in world.critic.parameters()])


def same_gradients(one, other):
    """Within 1e-5 of the largest entry, if that is above 1."""
    most = 1e-5 * max(1, *(g.abs().max() for g in one))
    for a, b in zip(one, other, strict=True):
        assert (a - b).abs().max() < most


@pytest.mark.parametrize("chunk", [19, 400, 10**9])
@pytest.mark.parametrize(
    "fields",
    [dict(), dict(divergence="forward_kl"), dict(divergence="jsd"), dict(method="opd"),
     dict(aggregation="sequence_mean", temperature=1.3), dict(aggregation="sequence_sum"),
     dict(support="union", top_k=3),
     dict(method="rethinking_topk", divergence="forward_kl"), dict(method="vopd"),
     dict(method="cr_opd"), dict(method="cr_opd", gamma=0.9),
     dict(method="opd", gamma=1.0, baseline="leave_one_out", samples_per_prompt=2),
     dict(method="gae_opd"), dict(method="kd"), dict(method="gkd"),
     dict(feedback="imitation", states="teacher"),
     dict(feedback="imitation", keep="right", horizon=None),
     dict(feedback="imitation", keep="right", horizon=None, aggregation="sequence_mean"),
     dict(method="reinforce", horizon=None, student="tiny_configs/models/student_muddled")],
    ids=str,
)  # fmt: skip
def test_chunks_give_the_loss_and_gradient_of_the_whole(fields, chunk, monkeypatch):
    compare_chunks_with_the_whole(fields, chunk, monkeypatch)


TRUNCATED = {
    "reverse_kl": ("stop_gradient", "generalised", "renormalise", "bucket"),
    "forward_kl": ("renormalise", "bucket"),
}


@pytest.mark.parametrize("support", ["student", "teacher", "union", "intersection"])
@pytest.mark.parametrize("divergence, tail", [(d, t) for d in TRUNCATED for t in TRUNCATED[d]])
def test_chunks_of_every_truncated_divergence(divergence, tail, support, monkeypatch):
    assert {*opd.get_args(opd.Tail)} == {t for tails in TRUNCATED.values() for t in tails}
    fields = dict(divergence=divergence, tail=tail, support=support, top_k=3)
    compare_chunks_with_the_whole(fields, 3 * 19, monkeypatch)


@pytest.mark.parametrize("rows", [None, 3])
def test_log_probs_of_chunks_are_those_of_score_and_backward_is_its_gradient(rows, monkeypatch):
    monkeypatch.setattr(opd, "CHUNK_TOKENS", 5)
    monkeypatch.setattr(opd, "CHUNK_LOGITS", 1)
    config, world, _ = ready()
    _, rollout = written(config, world, horizon=20)
    pull = torch.randn(19, generator=torch.Generator().manual_seed(0))
    whole = opd.score(world.student, rollout)[rollout.mask]
    (whole * pull).sum().backward()
    expected = [p.grad.clone() for p in world.student.parameters()]
    world.student.zero_grad()
    read, parts = opd.LogProbs(world.student, rollout, grad=True, rows=rows), []
    some = opd.chunks(len(whole), 19)
    assert [n.stop - n.start for n in some[:-1]] == [5] * (len(whole) // 5)
    for n in some:
        parts.append(read[n])
        (parts[-1] * pull).sum().backward()
    read.backward()
    assert (torch.cat(parts) - whole).abs().max() < 1e-5
    for a, b in zip(expected, world.student.parameters(), strict=True):
        assert (a - b.grad).abs().max() < 1e-4 * max(1, a.abs().max())


def test_teacher_scores_have_no_gradient_and_the_teacher_never_moves():
    config, world, optimizer = ready()
    before = [p.clone() for p in world.teacher.parameters()]
    opd.train_step(config, world, optimizer, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, world.teacher.parameters(), strict=True))
    assert all(p.grad is None for p in world.teacher.parameters())


def test_noise_does_not_depend_on_the_horizon():
    config, world, _ = ready()
    short, long = (opd.write(config, world, 3, h)[1] for h in (5, 40))
    assert torch.equal(short.tokens, long.tokens[:, :5])
    other = opd.write(config, world, 4, 40)[1]
    assert not torch.equal(other.tokens[:, :5], short.tokens)


def test_samples_per_prompt_are_neighbours():
    config, world, _ = ready(method="reinforce")
    texts = opd.write(config, world, 0, 1)[0].text
    assert len(texts) == 8 and len(set(texts)) == 2 and texts[0] == texts[3] != texts[4]


def test_learning_rate_schedule():
    config = opd.Config(steps=20, warmup=4, decay=0.5, lr=1.0)
    rates = [opd.lr_at(step, config) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4:11] == [1.0] * 7
    assert rates[11:] == pytest.approx([0.1 * k for k in range(9, 0, -1)])
    whole = opd.Config(steps=20, warmup=4, decay=1.0, lr=1.0)
    falling = [opd.lr_at(step, whole) for step in range(3, 20)]
    assert falling == pytest.approx([1.0] + [k / 16 for k in range(16, 0, -1)])
    flat = opd.Config(steps=20, warmup=0, decay=0.0, lr=1.0)
    assert {opd.lr_at(step, flat) for step in range(20)} == {1.0}


def test_the_steps_rate_reaches_the_optimizer():
    """Adam's first update has the size of the rate, wherever the gradient is not tiny."""
    moved = []
    for warmup in (0, 10):
        config, world, optimizer = ready(warmup=warmup, lr=1e-3, decay=0.0)
        before = [p.detach().clone() for p in world.student.parameters()]
        row = opd.train_step(config, world, optimizer, 0)
        gaps = zip(world.student.parameters(), before, strict=True)
        moved.append(max((p - q).abs().max().item() for p, q in gaps))
        assert moved[-1] == pytest.approx(row["lr"], rel=0.01)
    assert moved[1] == pytest.approx(moved[0] / 10, rel=0.01)


def test_horizon():
    at = lambda **f: opd.horizon_at(0, opd.Config(**f))  # noqa: E731
    assert at(max_tokens=50) == 50 and at(max_tokens=50, horizon=7) == 7
    assert at(max_tokens=50, horizon=0.1) == 5 and at(max_tokens=50, horizon=0.001) == 1
    assert at(max_tokens=50, horizon=80) == 50
    with pytest.raises(opd.InputError, match="max_tokens"):
        opd.horizon_at(0, opd.Config())


def test_a_horizon_stops_sampling_and_scores_the_students_own_eos():
    config, world, optimizer = ready(horizon=6, batch_size=32)
    _, rollout = written(config, world, horizon=6)
    row = opd.train_step(config, world, optimizer, 0)
    assert row["horizon"] == 6 and row["length"] <= 6 and 0 < row["finished"] < 1
    ended = rollout.finished.nonzero()[0, 0]
    assert rollout.tokens[ended][rollout.mask[ended]][-1] == 2  # EOS is a scored token
    assert row["tokens_trained"] == int(rollout.mask.sum())


def test_bf16_autocast_changes_the_students_scores_and_no_teachers():
    """What a GPU with bf16 does, by hand on the CPU."""
    config, world, _ = ready()
    _, rollout = written(config, world, horizon=9)
    plain = [world.log_probs(config, m, rollout)[:] for m in (world.student, world.teacher)]
    world.autocast = torch.autocast("cpu", torch.bfloat16)
    half = [world.log_probs(config, m, rollout)[:] for m in (world.student, world.teacher)]
    assert all(x.dtype == torch.float32 for x in half)
    assert 1e-4 < (plain[0] - half[0]).abs().max() < 1.0 and torch.equal(plain[1], half[1])
    row, gradients = gradients_of_step(config, world)
    assert all(p.dtype == g.dtype == torch.float32 for p, g in zip(
        world.student.parameters(), gradients, strict=True))  # fmt: skip
    assert 0 < row["engine_gap"] < 0.1 and math.isfinite(row["loss"])


def test_two_updates_use_the_ratio_to_the_sampler_and_the_credit_of_the_rollout():
    config = opd.Config.load(method="opd")
    logp = torch.tensor([[0.5, 0.5]]).log().requires_grad_()
    logq, before = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.9, 0.1]]).log()
    advantage, action = torch.tensor([math.log(0.25 / 0.9)]), torch.tensor([0])
    loss = opd.token_loss(config, logp, logq, action, advantage, before[:, 0], slice(0, 1))
    assert loss.item() == pytest.approx(-0.5 / 0.9 * math.log(0.25 / 0.9), abs=1e-6)
    loss.sum().backward()  # d(-ratio A) = -ratio A d log p
    assert logp.grad[0].tolist() == pytest.approx([loss.item(), 0.0], abs=1e-6)


def test_a_step_hands_over_the_sampler_and_credit_of_the_rollout_in_every_update():
    config, world, optimizer = ready(method="opd", updates_per_rollout=3, warmup=0, lr=1e-3)
    _, rollout = written(config, world)
    seen = []

    def spy(c, logp, logq, action, advantage, behaviour, n):
        ratio = (opd.of_tokens(logp, action) - behaviour).detach().exp()
        seen.append((advantage, behaviour, ratio))
        return opd.token_loss(c, logp, logq, action, advantage, behaviour, n)

    opd.train_step(config, world, optimizer, 0, loss=spy)
    assert len(seen) == 3
    for advantage, behaviour, _ in seen:
        assert torch.equal(advantage, seen[0][0])
        assert torch.equal(behaviour, rollout.logprobs[rollout.mask])
    gaps = [(ratio - 1).abs().max() for *_, ratio in seen]
    assert gaps[0] < 1e-4 < 0.01 < gaps[1] < gaps[2]


def test_frozen_models_are_read_once_a_rollout(monkeypatch):
    config, world, optimizer = ready(method="opd", updates_per_rollout=3, gamma=0.5, micro_batch=4)
    read, hidden_states = [], opd.hidden_states

    def counting(model, *args, **settings):
        read.append("teacher" if model is world.teacher else "student")
        return hidden_states(model, *args, **settings)

    monkeypatch.setattr(opd, "hidden_states", counting)
    opd.train_step(config, world, optimizer, 0)
    assert read.count("teacher") == 2 and read.count("student") == 2 * 3  # two micro-batches


def test_diagnosed_steps_are_the_ones_asked_for(run_dir, quick):
    def measured(**fields):
        run = opd.train(opd.Config.load(**SMALL, steps=5, max_tokens=9, **fields))
        rows, sampled = rows_of(run.dir), ("reward", "engine_gap", "ratio_max", "gated")
        for row in rows:
            known = {row[key] is not None for key in opd.DIAGNOSED if key not in sampled}
            assert len(known) == 1
        return [row["step"] for row in rows if row["kl"] is not None]

    assert measured(eval_every=2) == [2, 4, 5]  # the last one too
    assert measured(eval_every=0) == []
    assert measured(eval_every=0, diagnose_every=3) == [3, 5]
    assert measured(eval_every=5, diagnose_every=1) == [1, 2, 3, 4, 5]


# evaluation


def test_wilson_against_known_values():
    half = opd.wilson(50, 100)
    assert (round(half["low"], 4), round(half["high"], 4)) == (0.4038, 0.5962)
    assert opd.wilson(0, 10)["low"] == 0 and round(opd.wilson(0, 10)["high"], 4) == 0.2775
    assert opd.wilson(10, 10)["high"] == 1


def test_evaluation_repeats_and_does_not_depend_on_its_batches(world):
    prompts = world.task.prompts(60, "test")

    def evaluated(**how):
        said = []
        return opd.evaluate(world.student, world.task, prompts, said=said, **how), said

    found = [evaluated(rows=r) for r in (60, 60, 17)]
    assert found[0] == found[1] == found[2]
    assert evaluated(greedy=True)[0] != found[0][0]
    assert evaluated(seed=1)[1] != found[0][1]  # other noise, other texts
    assert evaluated(greedy=True, seed=1) == evaluated(greedy=True)


def test_the_test_prompts_and_noise_are_of_the_seed_and_the_same_for_all_models(
    run_dir, quick, monkeypatch
):
    """The spread over seeds holds the evaluation's own error; validation prompts are fixed."""
    met, evaluate = [], opd.evaluate

    def watched(model, task, prompts, *, seed=0, **how):
        met.append((prompts.text, seed))
        return evaluate(model, task, prompts, seed=seed, **how)

    monkeypatch.setattr(opd, "evaluate", watched)
    for seed in (4, 5):
        opd.train(opd.Config.load(**SMALL, steps=1, eval_every=1, seed=seed))
    assert len(met) == 14  # twice: greedy and sampled, of three models; and a validation
    first, second = met[:7], met[7:]
    for some, seed in ((first, 4), (second, 5)):
        tests = some[:4] + some[5:]
        assert all(one == tests[0] for one in tests) and tests[0][1] == seed
        assert len(tests[0][0]) == 16
    assert {*first[0][0]}.isdisjoint(second[0][0]) and first[4] == second[4]


# the files of a run


def test_files_of_a_run(run_dir):
    config = opd.Config.load(**SMALL, steps=4, eval_every=2, name="mine")
    run = opd.train(config)
    assert run.dir == Path("runs/mine") and run.config.max_tokens == 53
    files = {f.name for f in run.dir.iterdir()}
    assert files == {
        "config.json", "metrics.jsonl", "result.json", "curve.png", "samples.txt", "checkpoint",
        "model",
    }  # fmt: skip
    assert [f.name for f in (run.dir / "checkpoint").iterdir()] == ["last.pt"]
    told = json.loads((run.dir / "config.json").read_text())
    assert told == run.config.model_dump() and "hooks" not in told
    result = json.loads((run.dir / "result.json").read_text())
    assert result == run.result and result["steps"] == 4 and result["method"] == "opd_full"
    for who in ("student_before", "student_after", "teacher"):
        assert result[who].keys() == {"accuracy", "low", "high", "n", "greedy"}
        assert result[who]["n"] == 16
    rows = rows_of(run.dir, timeless=False)
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    assert [r["accuracy"] is not None for r in rows] == [False, True, False, True]
    assert result["tokens"]["trained"] == rows[-1]["tokens_trained"] > rows[0]["tokens_trained"]
    assert result["flop"]["update"] == rows[-1]["flop_update"] > rows[0]["flop_update"]
    assert (run.dir / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert "answer" in (run.dir / "samples.txt").read_text()
    for name in ("config.json", "metrics.jsonl", "result.json", "samples.txt"):
        assert str(run_dir) not in (run.dir / name).read_text()


def test_saved_model_is_the_student_in_fp32(run_dir):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    run = opd.train(opd.Config.load(**SMALL, steps=1, eval_every=0))
    weights = load_file(run.dir / "model" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    again = AutoModelForCausalLM.from_pretrained(run.dir / "model", dtype=torch.float32)
    for a, b in zip(again.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (
        opd.load_tokenizer(str(run.dir / "model")).get_vocab()
        == opd.load_tokenizer("tiny_configs/models/teacher").get_vocab()
    )


def test_steps_zero_only_evaluates(run_dir):
    run = opd.train(opd.Config.load(**SMALL, steps=0))
    assert run.result["student_before"] == run.result["student_after"]
    assert rows_of(run.dir) == [] and (run.dir / "result.json").exists()


# a gradient that is not finite


def nan_loss(c, logp, logq, *_):
    return opd.reverse_kl(logp, logq) * math.nan


def nan_gradient(c, logp, logq, *_):  # of a finite loss: d sqrt(0) is infinite, times 0
    return opd.reverse_kl(logp, logq) + (0 * logp).abs().sum(-1).sqrt()


@pytest.mark.parametrize("poison", [nan_loss, nan_gradient])
def test_a_gradient_that_is_not_finite_moves_nothing(poison):
    config, world, optimizer = ready()
    before = [p.detach().clone() for p in world.student.parameters()]
    with pytest.raises(opd.TrainingStopped, match="step 1: the gradient's norm is nan"):
        opd.train_step(config, world, optimizer, 0, loss=poison)
    assert all(torch.equal(a, b) for a, b in zip(before, world.student.parameters(), strict=True))
    assert not optimizer.state


def test_it_stops_the_run_with_the_last_checkpoint_in_place(run_dir, quick):
    calls = []

    def poisoned(c, logp, logq, *rest):
        calls.append(1)
        return (nan_loss if len(calls) > 4 else opd.token_loss)(c, logp, logq, *rest)

    config = opd.Config.load(**SMALL, steps=9, eval_every=0, checkpoint_every=2, name="nan")
    with pytest.raises(opd.TrainingStopped) as error:
        opd.train(config, loss=poisoned)
    assert "step 5: the gradient's norm is nan" in str(error.value)
    said = str(error.value)
    assert "stopped after step 4 of 9; go on with: " in said and "--resume runs/nan" in said
    state = torch.load("runs/nan/checkpoint/last.pt", weights_only=True)
    assert state["result"]["steps"] == 4
    assert all(torch.isfinite(x).all() for x in state["student"].values())


# hooks: a user's own rule in place of one of the step's functions, in at most five lines


def clipped_reward(c, world, rollout, teacher, right):
    return opd.judge(c, world, rollout, teacher, right).clamp(-1, 1)


def centred(c, world, rollout, reward, step):
    return reward - opd.masked_mean(reward, rollout.mask)


def first_three(c, world, rollout, teacher, reward, right):
    early = torch.arange(rollout.mask.shape[1]) < 3
    return opd.token_weights(rollout.mask & early)


def jeffreys(c, logp, logq, action, advantage, behaviour, n):
    return opd.reverse_kl(logp, logq) + opd.forward_kl(logp, logq)


RULES = {  # hook: the rule, its method
    "judge": (clipped_reward, "opd"),
    "credit": (centred, "opd"),
    "weights": (first_three, "opd_full"),
    "loss": (jeffreys, "opd_full"),
}


def step_with(method="opd_full", hooks=None, **fields):
    """A step's row and the weights after it."""
    config, world, optimizer = ready(method=method, warmup=0, diagnose_every=1, **fields)
    row = opd.train_step(config, world, optimizer, 0, **(hooks or {}))
    return row, [p.detach().clone() for p in world.student.parameters()]


@pytest.mark.parametrize("hook", RULES)
def test_a_rule_of_five_lines_changes_the_training(hook):
    rule, method = RULES[hook]
    assert len(inspect.getsource(rule).splitlines()) <= 5
    (own, after), (plain, before) = step_with(method, {hook: rule}), step_with(method)
    assert max((a - b).abs().max() for a, b in zip(after, before, strict=True)) > 1e-5
    if hook == "judge":
        assert plain["reward"] < own["reward"] < 0  # -1 at least
        assert own["loss"] == pytest.approx(-own["reward"], abs=1e-5)
    if hook == "credit":
        assert own["loss"] == pytest.approx(0, abs=1e-5) and plain["loss"] > 0.1
    if hook == "weights":  # the first three tokens of the same text
        assert own["loss"] == pytest.approx(step_with(method, horizon=3)[0]["loss"], abs=1e-5)
    if hook == "loss":
        forward = step_with(method, divergence="forward_kl")[0]["loss"]
        assert own["loss"] == pytest.approx(plain["loss"] + forward, abs=1e-4)


def test_all_four_hooks_reach_a_run_and_their_names_its_config(run_dir, quick):
    fields = dict(SMALL, steps=2, eval_every=0)
    plain = opd.train(opd.Config.load(**fields, name="plain"))
    run = opd.train(opd.Config.load(**fields, name="own"), **{k: f for k, (f, _) in RULES.items()})
    told = json.loads((run.dir / "config.json").read_text())
    assert told.pop("hooks") == {k: f"{__name__}.{f.__name__}" for k, (f, _) in RULES.items()}
    assert opd.Config(**told) == run.config
    assert rows_of(run.dir)[0]["loss"] != rows_of(plain.dir)[0]["loss"]
    assert opd.Config.load(run.dir / "config.json") == run.config


def test_a_run_with_a_hook_goes_on_only_with_it(run_dir, quick, capsys):
    fields = dict(SMALL, steps=4, eval_every=0, checkpoint_every=2)
    whole = opd.train(opd.Config.load(**fields, name="whole"), loss=jeffreys)
    cut_after_a_checkpoint(opd.Config.load(**fields, name="cut"), loss=jeffreys)
    with pytest.raises(opd.InputError, match=r"hooks = {}: this run was begun with .*jeffreys"):
        resumed("runs/cut")
    with pytest.raises(opd.InputError, match="nan_loss"):
        resumed("runs/cut", loss=nan_loss)
    assert opd.main(["--resume", "runs/cut"]) == 2
    assert "hooks = {}" in capsys.readouterr().err
    run = resumed("runs/cut", loss=jeffreys)
    assert rows_of(run.dir) == rows_of(whole.dir)
    cut_after_a_checkpoint(opd.Config.load(**fields, name="bare"))
    with pytest.raises(opd.InputError, match="this run was begun with {}"):
        resumed("runs/bare", loss=jeffreys)


def test_an_unknown_hook_is_refused_before_anything_is_written(run_dir):
    with pytest.raises(opd.InputError, match=r"hooks = \['weight'\]: must be from judge, credit"):
        opd.train(opd.Config.load(**SMALL), weight=first_three)
    assert [*run_dir.iterdir()] == []


# resume


def cut_after_a_checkpoint(config, **hooks):
    """A run that is interrupted once it has saved its first checkpoint."""
    save = opd.save_checkpoint
    with pytest.MonkeyPatch.context() as patch:

        def stop(*arguments):
            save(*arguments)
            raise KeyboardInterrupt

        patch.setattr(opd, "save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            opd.train(config, **hooks)


def quick_main(*words):
    """opd.main, with a small validation."""
    opd.VALIDATION_PROMPTS = 16
    return opd.main([str(word) for word in words])


RUN = ("--steps", 12, "--batch_size", 8, "--eval_prompts", 16, "--eval_every", 4,
       "--checkpoint_every", 3)  # fmt: skip


def wait_for_rows(run, process, n):
    file = run / "metrics.jsonl"
    for _ in range(6000):
        if file.exists() and file.read_text().count("\n") >= n:
            return
        assert process.is_alive(), (run.parent.parent / "errors").read_text()
        time.sleep(0.01)
    raise AssertionError(f"no {n} rows after a minute")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    code = ended(fork(folder, quick_main, *RUN, "--name", "whole"))
    assert code == 0, (folder / "errors").read_text()
    return folder / "runs" / "whole"


def cut_off(run, rows, number, *words):
    """Start a run in its grandparent folder, send it a signal once it has so many rows."""
    folder = run.parent.parent
    process = fork(folder, quick_main, *words)
    wait_for_rows(run, process, rows)
    os.kill(process.pid, number)
    return ended(process), (folder / "errors").read_text()


def finish(run):
    """Resume a run in a process of its own, to its end."""
    folder = run.parent.parent
    code = ended(fork(folder, quick_main, "--resume", f"runs/{run.name}"))
    assert code == 0, (folder / "errors").read_text()


def result_of(folder):
    result = json.loads((folder / "result.json").read_text())
    return {k: v for k, v in result.items() if k != "seconds"}


def same_weights(a, b):
    from safetensors.torch import load_file

    first, second = (load_file(f / "model" / "model.safetensors") for f in (a, b))
    return all(torch.equal(first[name], second[name]) for name in first)


def test_resume_after_sigkill(uninterrupted, tmp_path):
    """Killed twice at no particular moment; metrics, result and weights end bit-equal."""
    killed = tmp_path / "runs" / "cut"
    assert cut_off(killed, 5, signal.SIGKILL, *RUN, "--name", "cut")[0] == -signal.SIGKILL
    with open(killed / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "lo')  # the kill may cut a line
    (killed / "checkpoint" / "last.pt.part").write_bytes(b"half a checkpoint")
    assert cut_off(killed, 8, signal.SIGKILL, "--resume", "runs/cut")[0] == -signal.SIGKILL
    finish(killed)
    assert rows_of(killed) == rows_of(uninterrupted)
    assert result_of(killed) == result_of(uninterrupted)
    assert same_weights(killed, uninterrupted)


def test_resume_before_the_first_checkpoint_starts_again(uninterrupted, tmp_path):
    killed = tmp_path / "runs" / "early"
    assert cut_off(killed, 1, signal.SIGKILL, *RUN, "--name", "early")[0] == -signal.SIGKILL
    for file in (killed / "checkpoint").glob("*"):
        file.unlink()
    finish(killed)
    assert rows_of(killed) == rows_of(uninterrupted)


def test_ctrl_c_saves_and_says_how_to_go_on(uninterrupted, tmp_path):
    folder = tmp_path / "runs" / "stopped"
    code, errors = cut_off(folder, 4, signal.SIGINT, *RUN, "--name", "stopped")
    assert code == 130
    assert "python opd.py --resume runs/stopped" in errors and "Traceback" not in errors
    state = torch.load(folder / "checkpoint" / "last.pt", weights_only=True)
    assert state["result"]["steps"] == len(rows_of(folder))
    finish(folder)
    assert rows_of(folder) == rows_of(uninterrupted) and same_weights(folder, uninterrupted)


def test_ctrl_c_before_the_first_step_says_how_to_go_on(run_dir, monkeypatch, capsys):
    def interrupted(*args, **how):
        raise KeyboardInterrupt

    words = "--name early --steps 1 --batch_size 8 --eval_prompts 8 --eval_every 0".split()
    with monkeypatch.context() as patch:
        patch.setattr(opd, "final_evaluation", interrupted)
        assert opd.main(words) == 130
    assert "stopped after step 0 of 1; go on with: python opd.py --resume runs/early" in (
        capsys.readouterr().err
    )
    assert opd.main(["--resume", "runs/early"]) == 0


def test_a_damaged_checkpoint_is_one_line(run_dir, capsys):
    opd.train(opd.Config.load(**SMALL, steps=1, eval_every=0, name="hurt"))
    (run_dir / "runs/hurt/result.json").unlink()
    (run_dir / "runs/hurt/checkpoint/last.pt").write_bytes(b"nothing")
    assert opd.main(["--resume", "runs/hurt"]) == 2
    said = capsys.readouterr().err
    assert "last.pt: must be whole, it is damaged" in said and said.count("opd.py: ") == 1
    assert "Traceback" not in said


def test_a_critic_learns_the_value_and_survives_a_resume(run_dir, quick, monkeypatch):
    fields = dict(SMALL, method="gae_opd", lr=1e-9, checkpoint_every=3, diagnose_every=1)
    fields |= dict(eval_every=0, eval_prompts=4)
    errors, gae = [], opd.gae

    def watched(reward, value, mask, *rest, **how):
        advantage, target = gae(reward, value, mask, *rest, **how)
        if not how:  # else a discounted return, which is a gae without a value
            errors.append(opd.masked_mean((value - target) ** 2 / 2, mask).item())
        return advantage, target

    monkeypatch.setattr(opd, "gae", watched)
    monkeypatch.setattr(opd, "VALUE_LR", 1e-9)
    opd.train(opd.Config.load(**fields, steps=12, name="blank"))
    monkeypatch.setattr(opd, "VALUE_LR", 0.05)
    whole = opd.train(opd.Config.load(**fields, steps=12, name="whole"))
    constant, learned = sum(errors[6:12]), sum(errors[18:])
    assert len(errors) == 24 and learned < 0.8 * constant  # the same texts: the student stands
    cut_after_a_checkpoint(opd.Config.load(**fields, steps=12, name="cut"))
    run = resumed("runs/cut")
    assert rows_of(run.dir) == rows_of(whole.dir)
    critics = [
        torch.load(x.dir / "checkpoint" / "last.pt", weights_only=True)["critic"]
        for x in (run, whole)
    ]
    assert all(torch.equal(critics[0][key], critics[1][key]) for key in critics[1])
    assert critics[1]["weight"].abs().max() > 0.01


def test_a_critic_moves_once_a_rollout():
    """It has no gradient after the first update, and its momentum alone moves it nowhere."""
    config, world, optimizer = ready(method="gae_opd", batch_size=4, updates_per_rollout=2)
    seen, real = [], opd.update_student

    def watched(*args):
        norm = real(*args)
        seen.append(world.critic.bias.item())
        return norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opd, "update_student", watched)
        opd.train_step(config, world, optimizer, 0)
    assert seen[0] == seen[1] != 0


def test_what_a_step_keeps_for_its_row_holds_no_graph():
    config, world, optimizer = ready(batch_size=4, micro_batch=2)
    with pytest.MonkeyPatch.context() as patch:
        kept, real = [], opd.step_metrics
        patch.setattr(opd, "step_metrics", lambda *a: kept.extend(a[-1]) or real(*a))
        opd.train_step(config, world, optimizer, 0)
    assert len(kept) == 2
    assert not any(x.requires_grad for chunk in kept for x in chunk.values())


def test_a_task_that_draws_too_few_training_prompts_is_named():
    config, world, optimizer = ready(batch_size=4)
    draw = world.task.draw
    world.task.draw = lambda n, split, rng: draw(n - 1, split, rng)
    with pytest.raises(opd.InputError, match="task = 'chain': must draw the 4 prompts asked for"):
        opd.train_step(config, world, optimizer, 0)


def test_a_cut_row_goes_on_and_a_finished_one_ends():
    config, world, _ = ready(method="gae_opd", batch_size=4, horizon=20, gamma=1.0, gae_lambda=0.0)
    torch.nn.init.constant_(world.critic.bias, 7.0)  # the critic says 7 everywhere
    prompts, rollout = written(config, world, horizon=20)
    rollout.finished[:] = torch.tensor([True, False, True, False])
    right = world.task.verify(prompts, rollout)
    reward = opd.judge(
        config, world, rollout, world.log_probs(config, world.teacher, rollout), right
    )
    advantage = opd.credit(config, world, rollout, reward, step=99)
    last = rollout.mask.sum(1) - 1
    gap = (advantage - reward).gather(1, last[:, None]).squeeze(1)
    assert torch.allclose(gap, torch.tensor([-7.0, 0.0, -7.0, 0.0]), atol=1e-4)


def test_a_finished_run_is_not_resumed(uninterrupted, monkeypatch, capsys):
    monkeypatch.chdir(uninterrupted.parent.parent)
    assert opd.main(["--resume", "runs/whole"]) == 2
    assert "that run is finished" in capsys.readouterr().err


def test_an_interrupt_inside_a_step_never_saves_half_of_it(run_dir, quick, monkeypatch):
    fields = dict(SMALL, steps=4, eval_every=1, checkpoint_every=1)
    whole = rows_of(opd.train(opd.Config.load(**fields, name="whole")).dir)
    validation, calls = opd.validation, []

    def cut(*arguments):
        calls.append(1)
        if len(calls) == 2:  # the weights of step 2 have moved, its row is not written
            raise KeyboardInterrupt
        return validation(*arguments)

    monkeypatch.setattr(opd, "validation", cut)
    with pytest.raises(KeyboardInterrupt, match="after step 1 of 4"):
        opd.train(opd.Config.load(**fields, name="cut"))
    assert rows_of(resumed("runs/cut").dir) == whole


def fails(*_, **__):
    raise OSError("no space left on device")


@pytest.mark.parametrize("what", ["draw_curve", "student", "tokenizer", "result"])
def test_a_run_killed_between_its_last_step_and_its_last_file_can_go_on(what, run_dir, monkeypatch):
    config = opd.Config.load(**SMALL, steps=1, eval_every=0, name="full_disk")
    folder, write_file = Path("runs/full_disk"), opd.write_file
    with monkeypatch.context() as patch:
        if what == "draw_curve":
            patch.setattr(opd, "draw_curve", fails)
        if what == "student":
            patch.setattr(opd.transformers.PreTrainedModel, "save_pretrained", fails)
        if what == "tokenizer":
            base = opd.transformers.PreTrainedTokenizerBase
            patch.setattr(base, "save_pretrained", fails)
        if what == "result":
            last = lambda path, text: (fails if path.name == "result.json" else write_file)(  # noqa: E731
                path, text
            )
            patch.setattr(opd, "write_file", last)
        with pytest.raises(OSError, match="no space"):
            opd.train(config)
    assert not (folder / "result.json").exists()
    assert opd.main(["--resume", str(folder)]) == 0
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 1 and (folder / "curve.png").exists()
    assert (folder / "model" / "model.safetensors").exists()


def test_the_file_that_marks_the_end_is_written_last(run_dir, monkeypatch):
    written_by, there = opd.write_file, []

    def watched(path, text):
        if path.name == "result.json":
            there.append({str(f.relative_to(path.parent)) for f in path.parent.rglob("*")})
        written_by(path, text)

    monkeypatch.setattr(opd, "write_file", watched)
    run = opd.train(opd.Config.load(**SMALL, steps=1, eval_every=1))
    (before,) = there
    assert {str(f.relative_to(run.dir)) for f in run.dir.rglob("*")} - before == {"result.json"}
    assert {"curve.png", "model/model.safetensors", "model/tokenizer.json"} <= before
