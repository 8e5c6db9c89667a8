"""§8, §12: the step, schedules, the loop, checkpoints, resume, self-check, the files of a run."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, agree, rows_of

import opd

SMALL = dict(batch_size=8, eval_prompts=16, warmup=2, runs="runs")


def ready(**fields):
    """Config, world and optimizer of a small run."""
    config = opd.Config.load(**{**SMALL, **fields})
    world = opd.load_world(config)
    config = opd.Config(**{**config.model_dump(), "max_tokens": world.task.max_tokens})
    return config, world, opd.make_optimizer(config, world)


# the main job, in small: it learns


def test_it_learns(run_dir):
    run = opd.train(opd.Config.load(steps=12, decay=0.0, eval_prompts=128, eval_every=12))
    before, after = run.result["student_before"], run.result["student_after"]
    assert before["high"] < after["low"] and after["accuracy"] > 0.9
    rows = rows_of(run.dir)
    assert rows[-1]["kl"] < rows[0]["kl"] / 5


# the step


def test_micro_batches_give_the_same_gradient():
    weights = []
    for micro in (None, 3):
        config, world, optimizer = ready(micro_batch=micro, warmup=0)
        opd.train_step(config, world, optimizer, 0, [])
        weights.append([p.detach().clone() for p in world.student.parameters()])
        moments = [row["exp_avg"] for row in optimizer.state.values()]
        weights[-1] += [m / config.lr for m in moments]
    assert all((a - b).abs().max() < 1e-3 for a, b in zip(*weights, strict=True))
    gradients = [w[len(w) // 2 :] for w in weights]
    largest = max(g.abs().max() for g in gradients[0])
    assert all((a - b).abs().max() < 1e-4 * largest for a, b in zip(*gradients, strict=True))


def whole_loss(config, world, rollout):
    """The step's loss from the full (B, T, V) laws, and its gradient: the plain way."""
    law = dict(temperature=config.temperature, vocab_size=world.law["vocab_size"])
    logp = opd.score(world.student, rollout, **law)
    with torch.no_grad():
        logq = opd.score(world.teacher, rollout, **law)
        logref = world.reference and opd.score(world.reference, rollout, **law)
    if config.reward_scale != 1:
        logq = opd.tilted_teacher(logq, logref, config.reward_scale)
    table = opd.token_table(config, rollout, torch.zeros(len(logp), dtype=torch.bool))
    everywhere = slice(None)
    opd.first_look(config, table, everywhere, logp, logq)
    loss = opd.token_loss(config, logp, logq, logref, table) * table["emphasis"]
    loss = opd.masked_mean(loss, rollout.mask, config.aggregation)
    loss.backward()
    return loss.item(), [p.grad.clone() for p in world.student.parameters()]


@pytest.mark.parametrize("chunk", [19, 400, 10**9])
@pytest.mark.parametrize(
    "fields",
    [dict(), dict(divergence="forward_kl"), dict(divergence="jsd"), dict(method="opd"),
     dict(aggregation="sequence_mean", temperature=1.3), dict(feedback="imitation"),
     dict(support="union", top_k=3),
     dict(method="prune_opd", weighting="none", weight_strength=0.5),
     dict(method="rethinking_topk", divergence="forward_kl"), dict(method="vopd"),
     dict(method="cr_opd"), dict(method="aopd"), dict(method="eopd", entropy_threshold=1e-3),
     dict(method="exopd", reference_kl=0.5), dict(method="opd_plus", importance_cap=0.9),
     dict(entropy_bonus=0.3, reference="student", reward_scale=1.5)],
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


def compare_chunks_with_the_whole(fields, chunk, monkeypatch):
    config, world, _ = ready(batch_size=4, horizon=9, **fields)
    prompts = opd.step_prompts(config, world.task, 0)
    rollout = opd.make_states(config, world, prompts, 0, 9)
    expected, gradients = whole_loss(config, world, rollout)
    world.student.zero_grad()
    monkeypatch.setattr(opd, "CHUNK_LOGITS", chunk)
    monkeypatch.setattr(opd, "CHUNK_TOKENS", 1)
    table = opd.token_table(config, rollout, torch.zeros(4, dtype=torch.bool))
    kept, total, seen, most = {}, 0.0, 0, max(1, chunk // 19)
    for rows in (torch.arange(0, 1), torch.arange(1, 4)):
        for at, *laws in opd.score_chunks(config, world, rollout, rows, kept, lambda key: None):
            assert len(laws[0]) <= most
            opd.first_look(config, table, at, *laws[:2])
            now = {name: values[at] for name, values in table.items()}
            loss = opd.token_loss(config, *laws, now)
            loss = (loss * now["emphasis"] * now["weight"]).sum()
            loss.backward()
            total, seen = total + loss.item(), seen + len(at[0])
    assert seen == int(rollout.mask.sum()) > 0 < abs(expected)  # response tokens only, each once
    assert total == pytest.approx(expected, abs=1e-5)
    for a, b in zip(gradients, world.student.parameters(), strict=True):
        assert (a - b.grad).abs().max() < 1e-5


def test_teacher_scores_have_no_gradient_and_the_teacher_never_moves():
    config, world, optimizer = ready()
    before = [p.clone() for p in world.teacher.parameters()]
    opd.train_step(config, world, optimizer, 0, [])
    assert all(torch.equal(a, b) for a, b in zip(before, world.teacher.parameters(), strict=True))
    assert all(p.grad is None for p in world.teacher.parameters())


def test_noise_does_not_depend_on_the_horizon():
    config, world, _ = ready()
    prompts = opd.step_prompts(config, world.task, 3)
    short, long = (opd.make_states(config, world, prompts, 3, h) for h in (5, 40))
    assert torch.equal(short.tokens, long.tokens[:, :5])


def test_prompt_pool_visits_each_prompt_once_a_pass():
    config, world, _ = ready(prompt_pool=4)
    texts = [opd.step_prompts(config, world.task, step).text for step in range(5)]
    assert {t for row in texts for t in row} == set(texts[0]) and len(set(texts[0])) == 4
    assert all(sorted(row[:4]) == sorted(row[4:]) for row in texts)


def test_samples_per_prompt_are_neighbours():
    config, world, _ = ready(method="reinforce")
    texts = opd.step_prompts(config, world.task, 0).text
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


def test_horizon():
    at = lambda **f: opd.horizon_at(0, opd.Config(**f))  # noqa: E731
    assert at(max_tokens=50) == 50 and at(max_tokens=50, horizon=7) == 7
    assert at(max_tokens=50, horizon=0.1) == 5 and at(max_tokens=50, horizon=0.001) == 1
    assert at(max_tokens=50, horizon=80) == 50
    with pytest.raises(opd.InputError, match="max_tokens"):
        opd.horizon_at(0, opd.Config())


def test_a_horizon_stops_sampling_and_scores_the_students_own_eos():
    config, world, optimizer = ready(horizon=6, batch_size=32)
    rollout = opd.make_states(config, world, opd.step_prompts(config, world.task, 0), 0, 6)
    row = opd.train_step(config, world, optimizer, 0, [])
    assert row["horizon"] == 6 and row["length"] <= 6 and 0 < row["finished"] < 1
    ended = rollout.finished.nonzero()[0, 0]
    assert rollout.tokens[ended][rollout.mask[ended]][-1] == 2  # EOS is a scored token
    assert row["tokens_trained"] == int(rollout.mask.sum())


def test_bf16_autocast_changes_the_scores():
    scores = []
    for precision in ("fp32", "bf16"):
        config, world, _ = ready(precision=precision)
        prompts = opd.step_prompts(config, world.task, 0)
        rollout = opd.sample(world.teacher, prompts, horizon=9, noise=torch.full((8, 9), 0.5))
        chunks = opd.score_chunks(config, world, rollout, torch.arange(8), {}, lambda key: None)
        _, logp, logq, _ = next(chunks)
        assert logp.dtype == logq.dtype == torch.float32
        scores.append(logp.detach())
    assert 0 < (scores[0] - scores[1]).abs().max() < 1.0


# gradient checkpointing


def observed_step(**fields):
    """One step's row and gradients, the first layer's modes in its calls, the bytes kept."""
    config, world, _ = ready(**fields)
    calls, gradients, kept = [], [], []

    def called(layer, arguments):
        calls.append((layer.training, torch.is_grad_enabled()))

    def look():
        gradients.extend(p.grad.clone() for p in world.student.parameters())

    world.student.model.layers[0].register_forward_pre_hook(called)
    zero_grad = world.trained().zero_grad
    watcher = SimpleNamespace(param_groups=[{}], step=look, zero_grad=zero_grad)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.nbytes) or x, lambda x: x
    ):
        row = opd.train_step(config, world, watcher, 0, [])
    assert not any(module.training for module in world.student.modules())
    sampled = calls.index(next(filter(any, calls)))  # in eval mode without gradient until then
    again = opd.make_states(config, world, opd.step_prompts(config, world.task, 0), 0, 53)
    return row, gradients, calls[sampled:], sum(kept), again


@pytest.mark.parametrize(
    "fields",
    [dict(), dict(micro_batch=3), dict(micro_batch=3, precision="bf16"),
     dict(method="gae_opd"), dict(method="iw_opd", updates_per_rollout=2)],
    ids=str,
)  # fmt: skip
def test_gradient_checkpointing_changes_nothing_but_memory(fields):
    plain = observed_step(**fields)
    less = observed_step(**fields, gradient_checkpointing=True)
    for key in plain[0].keys() - {"memory_mb"}:
        if not key.endswith("_s"):
            assert plain[0][key] == pytest.approx(less[0][key], abs=1e-6), key
    assert plain[1] and len(plain[1]) == len(less[1])
    for a, b in zip(plain[1], less[1], strict=True):
        assert (a - b).abs().max() < 1e-6
    n = (3 if "micro_batch" in fields else 1) * fields.get("updates_per_rollout", 1)
    assert plain[2].count((False, True)) == n and not any(training for training, _ in plain[2])
    assert less[2].count((True, True)) == 2 * n  # forward, and again for the backward pass
    assert (False, True) not in less[2] and (True, False) not in less[2]
    assert less[3] < plain[3] / 3
    assert torch.equal(plain[4].tokens, less[4].tokens)
    assert torch.equal(plain[4].logprobs, less[4].logprobs)


def test_a_run_with_checkpointing_micro_batches_and_bf16_is_the_run_without_the_first(run_dir):
    fields = dict(SMALL, steps=8, eval_every=0, lr=1e-3, micro_batch=3, precision="bf16")
    plain = opd.train(opd.Config.load(**fields, name="plain"))
    less = opd.train(opd.Config.load(**fields, name="less", gradient_checkpointing=True))
    assert agree(plain.dir, less.dir, 1e-6)
    kl = [row["kl"] for row in rows_of(less.dir)]
    assert sum(kl[-2:]) < sum(kl[:2]) / 2


@pytest.mark.parametrize("chance", [dict(attention_dropout=0.1), dict(input_jitter_noise=0.01)])
def test_checkpointing_a_model_with_dropout_is_refused(chance, run_dir, capsys):
    """In training mode the scores would be of another law than the one sampled from."""
    student = opd.load_model("tiny_configs/models/student_hasty")
    student.config.update(chance)
    student.save_pretrained("chancy")
    opd.load_tokenizer("tiny_configs/models/student_hasty").save_pretrained("chancy")
    row = observed_step(student="chancy")[0]
    assert row["engine_gap_max"] < 1e-4  # without it: eval mode, where nothing is left to chance
    words = ["--student", "chancy", "--device", "cpu", "--gradient_checkpointing", "true"]
    assert opd.main(words) == 2
    said = capsys.readouterr().err
    assert said == (
        f"opd.py: gradient_checkpointing = true: needs the student's {[*chance]} at 0\n"
    )
    assert not (run_dir / "runs").exists()


# evaluation


def test_wilson_against_known_values():
    half = opd.wilson(50, 100)
    assert (round(half["low"], 4), round(half["high"], 4)) == (0.4038, 0.5962)
    assert opd.wilson(0, 10)["low"] == 0 and round(opd.wilson(0, 10)["high"], 4) == 0.2775
    assert opd.wilson(10, 10)["high"] == 1


def test_evaluation_repeats_and_does_not_depend_on_its_batches(world):
    prompts = world.task.prompts(60, "test")
    found = [opd.evaluate(world.student, world.task, prompts, rows=r) for r in (60, 60, 17)]
    assert found[0] == found[1] == found[2]
    greedy = opd.evaluate(world.student, world.task, prompts, greedy=True)
    assert greedy != found[0]


# the files of a run


def test_files_of_a_run(run_dir):
    config = opd.Config.load(**SMALL, steps=4, eval_every=2, name="mine")
    run = opd.train(config)
    assert run.dir == Path("runs/mine") and run.config.max_tokens == 53
    files = {f.name for f in run.dir.iterdir()}
    assert files == {
        "config.json", "metrics.jsonl", "result.json", "curve.png", "samples.txt", "report.md",
        "report.json", "checkpoint", "model",
    }  # fmt: skip
    result = json.loads((run.dir / "result.json").read_text())
    assert result == run.result and result["steps"] == 4 and result["method"] == "opd_full"
    for who in ("student_before", "student_after", "teacher"):
        assert result[who].keys() == {"accuracy", "low", "high", "n", "greedy"}
        assert result[who]["n"] == 16
    rows = rows_of(run.dir, timeless=False)
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    assert [r["accuracy"] is not None for r in rows] == [False, True, False, True]
    assert result["tokens"]["trained"] == rows[-1]["tokens_trained"] > rows[0]["tokens_trained"]
    assert (run.dir / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert opd.report(run.dir) == json.loads((run.dir / "report.json").read_text())
    text = (run.dir / "report.md").read_text()
    listed = re.findall(r"\w+", " ".join(opd.CHECKLIST.values()))
    elsewhere = {"student", "teacher", "name", "runs"}  # in the table of models, in the title
    assert opd.Config.model_fields.keys() - elsewhere <= {*listed}
    assert all(f"{field} " in text for field in opd.Config.model_fields.keys() - elsewhere)
    assert opd.UNKNOWN in text and "spread over seeds" in text
    assert "answer" in (run.dir / "samples.txt").read_text()
    assert str(run_dir) not in text


def test_saved_model_loads_in_its_dtype(run_dir):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    run = opd.train(opd.Config.load(**SMALL, steps=1, eval_every=0, save_dtype="fp16"))
    weights = load_file(run.dir / "model" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float16}
    again = AutoModelForCausalLM.from_pretrained(run.dir / "model", dtype=torch.float32)
    for a, b in zip(again.parameters(), run.model.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-2
    assert (
        opd.load_tokenizer(str(run.dir / "model")).get_vocab()
        == opd.load_tokenizer("tiny_configs/models/teacher").get_vocab()
    )


def test_steps_zero_only_evaluates(run_dir):
    run = opd.train(opd.Config.load(**SMALL, steps=0))
    assert run.result["student_before"] == run.result["student_after"]
    assert rows_of(run.dir) == [] and (run.dir / "report.md").exists()


# self-check


def test_self_check_passes_for_the_same_model_and_prints_one_line(run_dir, capsys):
    same = "tiny_configs/models/student_muddled"
    opd.train(opd.Config.load(**SMALL, steps=0, student=same, teacher=same))
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("self-check, teacher == student: loss") and line.endswith("fine")


@pytest.mark.parametrize("both", [False, True], ids=["teacher", "both"])
def test_self_check_notices_a_shift(both, run_dir, monkeypatch):
    """The classic bug, scores one token late; in both models it cancels in the loss."""
    config, world, _ = ready(teacher="tiny_configs/models/student_hasty")
    right = opd.score

    def shifted(model, rollout, **law):
        found = right(model, rollout, **law)
        return found if model is world.student and not both else found.roll(1, dims=1)

    monkeypatch.setattr(opd, "score", shifted)
    with pytest.raises(opd.TrainingStopped, match="allowed"):
        opd.self_check(config, world)


def test_self_check_knows_a_folder_by_its_other_names(monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")
    path = "tiny_configs/models/teacher"
    assert opd.same_model(path, str(ROOT / path)) and opd.same_model(path, f"../{path}/")
    assert not opd.same_model(path, "tiny_configs/models/teacher_b")


# a loss that is not finite


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(run_dir, monkeypatch):
    calls = []

    def poisoned(logp, logq):
        calls.extend([1] * logp.requires_grad)  # the loss, not the diagnostics
        return opd.forward_kl(logp, logq) * (float("nan") if len(calls) > 4 else 1.0)

    monkeypatch.setattr(opd, "reverse_kl", poisoned)
    config = opd.Config.load(**SMALL, steps=9, eval_every=0, checkpoint_every=2, name="nan")
    with pytest.raises(opd.TrainingStopped) as error:
        opd.train(config)
    assert "step 5: loss nan" in str(error.value)
    assert "runs/nan/checkpoint/last.safetensors" in str(error.value)
    with opd.safe_open("runs/nan/checkpoint/last.safetensors", framework="pt") as saved:
        assert json.loads(saved.metadata()["state"])["steps"] == 4
        assert all(torch.isfinite(saved.get_tensor(k)).all() for k in saved.keys())


# resume


def start(folder, *words):
    """opd.py in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "opd.py"), *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True
    )


RUN = ("--steps", 14, "--batch_size", 8, "--eval_prompts", 16, "--eval_every", 4,
       "--checkpoint_every", 3)  # fmt: skip


def wait_for_rows(folder, process, n):
    file = folder / "metrics.jsonl"
    for _ in range(6000):
        if file.exists() and file.read_text().count("\n") >= n:
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    raise AssertionError(f"no {n} rows after a minute")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder, *RUN, "--name", "whole")
    assert process.wait(120) == 0, process.stderr.read()
    return folder / "runs" / "whole"


def cut_off(run, rows, number, *words):
    """Start a run in its grandparent folder, send it a signal once it has so many rows."""
    process = start(run.parent.parent, *words)
    wait_for_rows(run, process, rows)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def finish(run):
    """Resume a run in a process of its own, to its end."""
    process = start(run.parent.parent, "--resume", f"runs/{run.name}")
    assert process.wait(120) == 0, process.stderr.read()


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
    (killed / "checkpoint" / "last.safetensors.part").write_bytes(b"half a checkpoint")
    assert cut_off(killed, 9, signal.SIGKILL, "--resume", "runs/cut")[0] == -signal.SIGKILL
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
    steps = len(rows_of(folder))
    with opd.safe_open(folder / "checkpoint" / "last.safetensors", framework="pt") as saved:
        assert json.loads(saved.metadata()["state"])["steps"] == steps
    finish(folder)
    assert rows_of(folder) == rows_of(uninterrupted) and same_weights(folder, uninterrupted)


def test_ctrl_c_before_the_first_step_says_how_to_go_on(run_dir, monkeypatch, capsys):
    def interrupted(*args, **law):
        raise KeyboardInterrupt

    words = "--name early --steps 1 --batch_size 8 --eval_prompts 8 --eval_every 0".split()
    with monkeypatch.context() as patch:
        patch.setattr(opd, "final_evaluation", interrupted)
        assert opd.main(words) == 130
    assert "stopped after step 0 of 1; go on with: python opd.py --resume runs/early" in (
        capsys.readouterr().err
    )
    assert opd.main(["--resume", "runs/early"]) == 0


def test_damaged_checkpoint_and_report_are_one_line(run_dir, capsys):
    opd.train(opd.Config.load(**SMALL, steps=1, eval_every=0, name="hurt"))
    (run_dir / "runs/hurt/result.json").unlink()
    (run_dir / "runs/hurt/checkpoint/last.safetensors").write_bytes(b"nothing")
    assert opd.main(["--resume", "runs/hurt"]) == 2
    assert "last.safetensors: must be whole, it is damaged" in capsys.readouterr().err
    (run_dir / "runs/hurt/result.json").write_text('{"steps"')
    assert opd.main(["report", "runs/hurt"]) == 2
    assert "must be a finished run" in capsys.readouterr().err


def test_advantage_stays_that_of_the_rollout_over_its_updates():
    config = opd.Config.load(method="opd")
    logp = torch.tensor([[0.5, 0.5]]).log().requires_grad_()
    logq, before = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.9, 0.1]]).log()
    table = {name: torch.zeros(1) for name in ("advantage", "baseline", "before")}
    table["action"] = torch.tensor([0])
    opd.first_look(config, table, slice(None), before, logq)
    loss = opd.token_loss(config, logp, logq, None, table)
    ratio, advantage = 0.5 / 0.9, math.log(0.25 / 0.9)
    assert loss.item() == pytest.approx(-ratio * advantage, abs=1e-6)


def test_frozen_models_are_read_once_a_rollout(monkeypatch):
    config, world, optimizer = ready(method="opd", updates_per_rollout=3, gamma=0.5, micro_batch=4)
    read, hidden_states = [], opd.hidden_states

    def counting(model, *args, **law):
        read.append("teacher" if model is world.teacher else "student")
        return hidden_states(model, *args, **law)

    monkeypatch.setattr(opd, "hidden_states", counting)
    opd.train_step(config, world, optimizer, 0, [])
    assert read.count("teacher") == 2 and read.count("student") == 2 * 4  # two micro-batches


def test_a_critic_learns_the_value_and_survives_a_resume(run_dir, monkeypatch):
    fields = dict(SMALL, method="gae_opd", lr=1e-9, checkpoint_every=3)
    monkeypatch.setattr(opd, "VALUE_LR", 1e-9)
    blank = opd.train(opd.Config.load(**fields, steps=12, name="blank"))
    monkeypatch.setattr(opd, "VALUE_LR", 0.05)
    whole = opd.train(opd.Config.load(**fields, steps=12, name="whole"))
    learned, constant = (sum(r["value_loss"] for r in rows_of(x.dir)[6:]) for x in (whole, blank))
    assert learned < 0.8 * constant  # the same texts: the student stands still
    config = opd.Config.load(**fields, steps=12, name="cut")
    save = opd.save_checkpoint
    with pytest.MonkeyPatch.context() as patch:

        def stop(run, *rest):
            save(run, *rest)
            raise KeyboardInterrupt

        patch.setattr(opd, "save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            opd.train(config)
    opd.train(opd.resumable("runs/cut"), "runs/cut")
    assert rows_of("runs/cut") == rows_of(whole.dir)


def test_a_cut_row_goes_on_and_a_finished_one_ends():
    config, world, _ = ready(method="gae_opd", batch_size=4, horizon=20, gamma=1.0, gae_lambda=0.0)
    torch.nn.init.constant_(world.critic.bias, 7.0)  # the critic says 7 everywhere
    prompts = opd.step_prompts(config, world.task, 0)
    rollout = opd.make_states(config, world, prompts, 0, 20)
    rollout.finished[:] = torch.tensor([True, False, True, False])
    table = opd.token_table(config, rollout, torch.zeros(4, dtype=torch.bool))
    opd.look_ahead(config, world, rollout, table, {}, step=99, lap=lambda key: None)
    plain = dict(config.model_dump(), baseline="none", gamma=0.0, gae_lambda=0.95, method="opd")
    reward = opd.token_table(config, rollout, torch.zeros(4, dtype=torch.bool))
    for at, *laws in opd.score_chunks(
        opd.Config(**plain), world, rollout, torch.arange(4), {}, lambda key: None
    ):
        opd.first_look(opd.Config(**plain), reward, at, *laws[:2])
    last = rollout.mask.sum(1) - 1
    gap = (table["advantage"] - reward["advantage"]).gather(1, last[:, None]).squeeze(1)
    assert torch.allclose(gap, torch.tensor([-7.0, 0.0, -7.0, 0.0]), atol=1e-4)


def test_a_finished_run_is_not_resumed(uninterrupted, monkeypatch, capsys):
    monkeypatch.chdir(uninterrupted.parent.parent)
    assert opd.main(["--resume", "runs/whole"]) == 2
    assert "that run is finished" in capsys.readouterr().err


def test_an_interrupt_inside_a_step_never_saves_half_of_it(run_dir, monkeypatch):
    fields = dict(SMALL, steps=4, eval_every=1, checkpoint_every=1)
    whole = rows_of(opd.train(opd.Config.load(**fields, name="whole")).dir)
    validate, calls = opd.validate, []

    def cut(*arguments):
        calls.append(1)
        if len(calls) == 2:  # the weights of step 2 have moved, its row is not written
            raise KeyboardInterrupt
        return validate(*arguments)

    monkeypatch.setattr(opd, "validate", cut)
    with pytest.raises(KeyboardInterrupt, match="after step 1 of 4"):
        opd.train(opd.Config.load(**fields, name="cut"))
    run = opd.train(opd.resumable("runs/cut"), "runs/cut")
    assert rows_of(run.dir) == whole


def test_a_run_whose_model_could_not_be_written_can_go_on(run_dir, monkeypatch):
    config = opd.Config.load(**SMALL, steps=1, eval_every=0, name="full_disk")
    with monkeypatch.context() as patch:
        patch.setattr(opd.transformers.PreTrainedModel, "save_pretrained", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            opd.train(config)
    assert not Path("runs/full_disk/result.json").exists()
    run = opd.train(opd.resumable("runs/full_disk"), "runs/full_disk")
    assert run.result["steps"] == 1 and (run.dir / "report.md").exists()
