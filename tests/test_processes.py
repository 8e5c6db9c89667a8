"""§12 under torchrun: two processes are one, in metrics, weights, files and checkpoints.

Run as a script by torchrun, this file is the worker of the fixture `two`: several trainings for the
price of one start.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, agree, rows_of
from safetensors.torch import load_file

import opd

SMALL = dict(batch_size=8, steps=6, eval_prompts=16, eval_every=0, warmup=2, checkpoint_every=3)
SMALL |= dict(device="cpu")
FULL = dict(SMALL, eval_every=6)
CASES = {
    "reinforce": dict(SMALL, method="reinforce", samples_per_prompt=4),
    "mean": dict(SMALL, aggregation="sequence_mean", micro_batch=3),  # 3 + 1 rows; alone 3 + 3 + 2
    "popd": dict(SMALL, method="opd_full+popd", horizon_start=3, max_tokens=40),
    "credit": dict(SMALL, method="iw_opd", gamma=0.9, updates_per_rollout=2, importance_cap=0.9),
}
COMPARED = {
    "step", "loss", "grad_norm", "lr", "value_loss", "kl", "reward", "entropy", "teacher_entropy",
    "entropy_gap", "agreement", "teacher_mass", "overlap", "overlap_mass", "overlap_mass_teacher",
    "overlap_advantage", "unsupported", "candidates", "gated", "weight", "top_5_percent", "auroc",
    "kl_at", "engine_gap", "engine_gap_max", "ratio", "ratio_max", "ratio_clipped", "correct",
    "length", "horizon", "finished", "tokens_sampled", "tokens_scored", "tokens_trained",
    "extrapolated", "flop_sample", "flop_score", "flop_update", "continuation", "accuracy",
}  # fmt: skip
ALONE = {"coherence"}  # null with several processes: its batches are smaller than they are many


def cut_off(**fields):
    """A run that is interrupted once it has saved its first checkpoint, at step 3."""
    save = opd.save_checkpoint
    with pytest.MonkeyPatch.context() as patch:

        def stop(*arguments):
            save(*arguments)
            raise KeyboardInterrupt

        patch.setattr(opd, "save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            opd.train(opd.Config.load(**fields))


def worker():
    """What each of the two processes does."""
    for name, fields in CASES.items():
        opd.train(opd.Config.load(**fields, name=f"two-{name}"))
    cut_off(**FULL, name="cut-by-two")
    if opd.process()[0] == 0:
        shutil.copytree("runs/cut-by-two", "runs/cut-by-two-again")
    opd.everyone(torch.zeros(1))  # it is there
    for name in ("cut-by-one", "cut-by-two-again"):
        opd.train(opd.resumable(f"runs/{name}"), f"runs/{name}")
    rank, _ = opd.process()
    with pytest.raises(opd.InputError) as critic:
        opd.train(opd.Config.load(**SMALL, method="gae_opd", name="never"))
    with contextlib.redirect_stderr(io.StringIO()) as said:  # at last: main leaves the group
        code = opd.main(["--batch_size", "9", "--device", "cpu", "--name", "never"])
    Path(f"refused-{rank}").write_text(f"{critic.value}\n{code} {said.getvalue()}")


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
        for name, fields in (*CASES.items(), ("full", FULL)):
            opd.train(opd.Config.load(**fields, name=f"one-{name}"))
        cut_off(**FULL, name="cut-by-one")
        yield folder


@pytest.fixture(scope="module")
def two(folder):
    """The folder after the worker: two processes have trained the cases, and cut a run off."""
    code, _, errors = torchrun(folder, __file__)
    assert code == 0, errors
    return folder / "runs"


def same_run(one, other):
    """Metrics and weights within 1e-5, and the evaluations of result.json alike."""
    assert all(row.keys() == COMPARED | ALONE for row in rows_of(one))
    assert len(rows_of(other)) == 6 and agree(one, other, 1e-5, ALONE)
    weights = [load_file(run / "model/model.safetensors") for run in (one, other)]
    assert max((weights[0][key] - weights[1][key]).abs().max() for key in weights[0]) < 1e-5
    results = [json.loads((run / "result.json").read_text()) for run in (one, other)]
    for key in ("steps", "tokens", "student_before", "teacher", "student_after"):
        assert results[0][key] == results[1][key], key
    return True


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(two, name):
    assert same_run(two / f"one-{name}", two / f"two-{name}")


def test_opd_under_torchrun_writes_one_run(folder, tmp_path):
    words = [f"--{key}={value}" for key, value in FULL.items()]
    code, said, errors = torchrun(tmp_path, ROOT / "opd.py", *words)
    assert code == 0, errors
    (run,) = (tmp_path / "runs").iterdir()  # one folder, though both have looked for a name
    assert run.name == "opd_full-student_hasty-seed0"
    assert [row["step"] for row in rows_of(run)] == [1, 2, 3, 4, 5, 6]
    assert {x.name for x in run.iterdir()} == {x.name for x in (folder / "runs/one-full").iterdir()}
    assert said.count("picture runs/") == said.count("# opd_full") == 1
    assert same_run(folder / "runs/one-full", run)
    assert {row["coherence"] for row in rows_of(run)} == {None}
    last = rows_of(folder / "runs/one-full")[-1]
    assert last["coherence"] and last["continuation"] and last["accuracy"]


def test_two_go_on_from_one(two):
    assert same_run(two / "one-full", two / "cut-by-one")


def test_one_goes_on_from_two(two):
    run = two / "cut-by-two"
    assert len(rows_of(run)) == 3 and not (run / "result.json").exists()
    opd.train(opd.resumable(run), run)
    assert same_run(two / "one-full", run)


def test_two_go_on_from_two(two):
    assert same_run(two / "one-full", two / "cut-by-two-again")


def test_a_batch_that_does_not_divide_and_a_critic_are_refused(two):
    for rank in (0, 1):
        assert (two.parent / f"refused-{rank}").read_text().splitlines() == [
            "baseline = 'value': one process only",
            "2 opd.py: batch_size = 9: its 9 prompts must divide among 2 processes",
        ]
    assert not (two / "never").exists()


if __name__ == "__main__":
    worker()
