"""Soft labels for the synonym models: the task's exact distribution, as hooks; build.py uses them.

States are the task's own text; at each of them the student descends the forward KL to the exact
distribution there.
"""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "tasks")]
import opd  # noqa: E402

exact = runpy.run_path(str(HERE.parent / "tasks/synonyms.py"))["exact"]


def soft_labels(task: str) -> dict[str, Callable]:
    """The hooks of `opd.train` for synonyms or synonyms/STYLE."""
    style, kept = task.partition("/")[2] or "teacher", {}

    def judge(c, world, rollout, teacher, right):
        kept["labels"] = exact(rollout, style)[rollout.mask]  # (N, V)
        return opd.judge(c, world, rollout, teacher, right)

    def loss(c, logp, logq, action, advantage, behaviour, n):
        return opd.forward_kl(logp, kept["labels"][n])

    return dict(judge=judge, loss=loss)
