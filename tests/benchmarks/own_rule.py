"""A weight rule of your own against none, five seeds."""

import contextlib
import io
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]
import lab  # noqa: E402

import opd  # noqa: E402


def by_size(c, world, rollout, teacher, reward, right):
    """Tokens where the models differ weigh more: a row's weights have mean 1, half by size."""
    size = torch.where(rollout.mask, reward.abs(), 0.0)
    mean = size.sum(-1, keepdim=True) / rollout.mask.sum(-1, keepdim=True)
    plain = opd.weights(c, world, rollout, teacher, reward, right)
    return plain * (0.5 + 0.5 * size / mean.clamp(min=1e-9))


rules = {"none": {}, "by size": dict(weights=by_size)}
accuracy = {name: [] for name in rules}
with tempfile.TemporaryDirectory() as runs, contextlib.redirect_stdout(io.StringIO()):
    for seed in range(5):
        for name, hooks in rules.items():
            fields = dict(method="opd", student=str(ROOT / "tiny_configs/models/student_novice"))
            fields |= dict(steps=25, lr=1e-3, eval_every=0, checkpoint_every=0, runs=runs)
            run = opd.train(opd.Config.load(seed=seed, **fields), **hooks)
            accuracy[name].append(run.result["student_after"]["accuracy"])
accuracy["difference, paired by seed"] = [b - a for a, b in zip(*accuracy.values(), strict=True)]
print("| weights | accuracy after 25 steps |\n|---|---|")
for name, values in accuracy.items():
    print("| {} | {:.3f} ± {:.3f} |".format(name, *lab.interval(values)))
