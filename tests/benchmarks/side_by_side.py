"""Twelve steps of opd_full and opd here and in the first edition: losses and gradient norms.

    git worktree add WORKTREE 5c57ce0
    python tests/benchmarks/side_by_side.py WORKTREE [--steps 12]

Each edition runs in processes of its own, on the default models, task and seed.  Exit code 1 where
a loss or a gradient norm differs by more than 1e-5 (above 1: of its size).
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
METHODS, MOST = ("opd_full", "opd"), 1e-5


def steps_of(method, steps):
    """Loss and gradient norm of each step, by the opd.py on the path."""
    import torch

    import opd

    torch.set_num_threads(1)
    first = hasattr(opd, "make_states")
    fields = dict(method=method, steps=steps, eval_every=0) | (dict(device="cpu") if first else {})
    config = opd.Config.load(**fields)
    world = opd.load_world(config)
    config = config.model_copy(update=dict(max_tokens=world.task.max_tokens))
    optimizer, rows = opd.make_optimizer(config, world), []
    for step in range(steps):
        history = [rows] if first else []
        rows.append(opd.train_step(config, world, optimizer, step, *history))
    return [(row["loss"], row["grad_norm"]) for row in rows]


def in_process(tree, method, steps):
    """`steps_of` with the opd.py of a tree."""
    words = [sys.executable, __file__, str(tree), "--steps", str(steps), "--worker", method]
    environment = os.environ | dict(PYTHONPATH=str(tree), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tree)
    if done.returncode:
        raise SystemExit(f"{tree}, {method} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def gap(now, then):
    """How far two numbers are apart, above 1 relatively."""
    return abs(now - then) / max(1, abs(then))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("first", type=Path, help="a worktree of the first edition")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--worker", choices=METHODS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print("\n" + json.dumps(steps_of(given.worker, given.steps)))
        return 0
    if not (given.first / "opd.py").exists():
        raise SystemExit(f"{given.first}: must be a worktree with opd.py")
    worst = 0.0
    print("| method | step | loss, first | here | gradient norm, first | here | largest gap |")
    print("|---" * 7 + "|")
    for method in METHODS:
        here, first = (in_process(x, method, given.steps) for x in (ROOT, given.first.resolve()))
        for step, (now, then) in enumerate(zip(here, first, strict=True), 1):
            most = max(map(gap, now, then))
            worst = max(worst, most)
            print(f"| {method} | {step} | {then[0]:.7f} | {now[0]:.7f} | {then[1]:.6f} "
                  f"| {now[1]:.6f} | {most:.1e} |")  # fmt: skip
    print(f"largest gap {worst:.1e}, allowed {MOST:.0e}")
    return int(not worst <= MOST)


if __name__ == "__main__":
    sys.exit(main())
