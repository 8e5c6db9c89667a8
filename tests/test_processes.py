"""Under torchrun: two processes are one, in metrics, weights, files and checkpoints.

The fixture `two` forks two workers that see what torchrun would tell them; one test runs torchrun.
"""

import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, agree, ended, fork, rows_of
from safetensors.torch import load_file

import opd

SMALL = dict(batch_size=8, steps=4, eval_prompts=16, eval_every=0, warmup=2, checkpoint_every=2)
SMALL |= dict(diagnose_every=1)
NOVICE = "tiny_configs/models/student_novice"  # never guesses: each row has 16 tokens
SHORT = dict(SMALL, max_tokens=16, student=NOVICE)
FULL = dict(SMALL, eval_every=4)
MUDDLED = "tiny_configs/models/student_muddled"
CASES = {
    "reinforce": dict(SMALL, method="reinforce", samples_per_prompt=4),
    "mean": dict(SHORT, aggregation="sequence_mean", micro_batch=3),  # 3 + 1 rows; alone 3 + 3 + 2
    "popd": dict(SMALL, method="opd_full+popd", horizon_start=3, max_tokens=16),
    "credit": dict(SHORT, method="opd", gamma=0.9, updates_per_rollout=2, lr=1e-4),
    "top_k": dict(SHORT, method="rethinking_topk", updates_per_rollout=2, lr=1e-4),
    "critic": dict(SHORT, method="gae_opd"),
    "right": dict(SMALL, keep="right", student=MUDDLED, aggregation="sequence_mean"),
    "shared": dict(SHORT, method="gkd"),
    "effopd": dict(SMALL, method="effopd", lr=1e-4, warmup=0),
}
COMPARED = {
    *opd.DIAGNOSED, "step", "horizon", "lr", "grad_norm", "loss", "weight", "correct", "finished",
    "length", "tokens_sampled", "tokens_scored", "tokens_trained", "flop_sample",
    "flop_score", "flop_update", "extrapolated", "accuracy",
}  # fmt: skip


def cut_off(**fields):
    """A run that is interrupted once it has saved its first checkpoint, at step 2."""
    save = opd.save_checkpoint
    with pytest.MonkeyPatch.context() as patch:

        def stop(*arguments):
            save(*arguments)
            raise KeyboardInterrupt

        patch.setattr(opd, "save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            opd.train(opd.Config.load(**fields))


def lying(load_task):
    """load_task whose verifier says the opposite of EffOPD's validation texts."""

    def load(*arguments):
        task = load_task(*arguments)
        verify = task.verify

        def judge(prompts, rollout):
            return verify(prompts, rollout) ^ (len(prompts.text) == opd.EXTRAPOLATE_PROMPTS)

        task.verify = judge
        return task

    return load


def worker(rank, port):
    """What each of the two processes does, in the folder above its own."""
    os.chdir("..")
    opd.RANK, opd.RANKS = rank, 2
    told = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="localhost", MASTER_PORT=port)
    os.environ.update({name: str(value) for name, value in told.items()})
    for name, fields in CASES.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(opd, "draw_curve", lambda *_: None)
            if name == "effopd" and opd.RANK == 1:  # process 0 decides for both
                patch.setattr(opd, "load_task", lying(opd.load_task))
            opd.train(opd.Config.load(**fields, name=f"two-{name}"))
    cut_off(**FULL, name="cut-by-two")
    if opd.RANK == 0:
        shutil.copytree("runs/cut-by-two", "runs/cut-by-two-again")
    opd.all_reduce(torch.zeros(1))  # it is there
    for name in ("cut-by-one", "cut-by-two-again"):
        resume(Path("runs", name))
    with contextlib.redirect_stderr(io.StringIO()) as said:  # at last: main leaves the group
        code = opd.main(["--batch_size", "9", "--name", "never"])
    Path(f"refused-{opd.RANK}").write_text(f"{code} {said.getvalue()}")


def resume(run):
    opd.train(opd.Config.load(run / "config.json"), run)


def torchrun(folder, *words):
    """Two processes on the CPU; returns torchrun's exit code, stdout and stderr."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    process = subprocess.Popen(
        [*command, "2", *map(str, words)], cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        said, errors = process.communicate(timeout=180)
    finally:
        process.terminate()  # torchrun then ends its two
    return process.returncode, said, errors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which one process has trained every case, and cut one run off."""
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        opd.train(opd.Config.load(**FULL, name="one-full"))
        patch.setattr(opd, "draw_curve", lambda *_: None)
        for name, fields in CASES.items():
            opd.train(opd.Config.load(**fields, name=f"one-{name}"))
        cut_off(**FULL, name="cut-by-one")
        yield folder


@pytest.fixture(scope="module")
def two(folder):
    """The folder after the workers: two processes have trained the cases, and cut a run off."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    places = [folder / f"rank-{rank}" for rank in (0, 1)]
    for place in places:  # for what they say; they work side by side
        place.mkdir()
    both = [fork(place, worker, rank, port) for rank, place in enumerate(places)]
    codes = [ended(process, 180) for process in both]
    assert codes == [0, 0], [(place / "errors").read_text() for place in places]
    return folder / "runs"


def same_run(one, other):
    """Metrics and weights within 1e-5, and the evaluations of result.json alike."""
    assert all(row.keys() == COMPARED for row in rows_of(one))
    assert len(rows_of(other)) == 4 and agree(one, other, 1e-5)
    weights = [load_file(run / "model/model.safetensors") for run in (one, other)]
    assert max((weights[0][key] - weights[1][key]).abs().max() for key in weights[0]) < 1e-5
    results = [json.loads((run / "result.json").read_text()) for run in (one, other)]
    for key in ("steps", "tokens", "student_before", "teacher", "student_after"):
        assert results[0][key] == results[1][key], key
    return True


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(two, name):
    assert same_run(two / f"one-{name}", two / f"two-{name}")


def test_the_cases_are_not_idle(two):
    found = {name: rows_of(two / f"one-{name}") for name in CASES}
    assert any(0 < row["weight"] for row in found["right"])
    assert any(row["correct"] < 1 for row in found["right"])
    tried = [row["extrapolated"] for row in found["effopd"] if row["extrapolated"] is not None]
    assert len(tried) == 3 and any(0 < k for k in tried) and any(k < 5 for k in tried)
    states = [
        torch.load(two / f"{who}-critic" / opd.CHECKPOINT, weights_only=True)
        for who in ("one", "two")
    ]
    critics = [state["critic"] for state in states]
    assert critics[0]["bias"].abs() > 1e-3
    for key, values in critics[0].items():
        assert (values - critics[1][key]).abs().max() < 1e-5, key


def test_opd_under_torchrun_writes_one_run(folder, tmp_path):
    words = [f"--{key}={value}" for key, value in FULL.items()]
    code, said, errors = torchrun(tmp_path, ROOT / "opd.py", *words)
    assert code == 0, errors
    (run,) = (tmp_path / "runs").iterdir()  # one folder, though both have looked for a name
    assert run.name == "opd_full-student_hasty-seed0"
    assert [row["step"] for row in rows_of(run)] == [1, 2, 3, 4]
    assert {x.name for x in run.iterdir()} == {x.name for x in (folder / "runs/one-full").iterdir()}
    assert said.count("see runs/") == said.count("student before") == 1
    assert same_run(folder / "runs/one-full", run)
    assert rows_of(folder / "runs/one-full")[-1]["accuracy"]


def test_two_go_on_from_one(two):
    assert same_run(two / "one-full", two / "cut-by-one")


def test_one_goes_on_from_two(two):
    run = two / "cut-by-two"
    assert len(rows_of(run)) == 2 and not (run / "result.json").exists()
    resume(run)
    assert same_run(two / "one-full", run)


def test_two_go_on_from_two(two):
    assert same_run(two / "one-full", two / "cut-by-two-again")


def test_a_batch_that_does_not_divide_is_refused(two):
    said = "2 opd.py: batch_size = 9: its 9 prompts must divide among 2 processes"
    for rank in (0, 1):
        assert (two.parent / f"refused-{rank}").read_text().splitlines() == [said]
    assert not (two / "never").exists()
