"""How the cost of a step grows with batch, response length, vocabulary and model size.

    python tests/benchmarks/bench_scaling.py [scaling.png]

One quantity moves at a time around B 16, T 32, V 1,024, student d 128 (teacher d 192), two layers.
Prints seconds a step and the slope between the last two points on log-log axes: 1 is proportional.
"""

import math
import sys
from statistics import median

import torch
from common import opd_step
from matplotlib.figure import Figure

BASE = dict(batch=16, tokens=32, vocabulary=1024, hidden=128)
SWEEPS = {
    "batch": [4, 8, 16, 32, 64, 128],
    "tokens": [8, 16, 32, 64, 128, 256],
    "vocabulary": [64, 1024, 8192, 32_768, 151_936],
    "hidden": [32, 64, 128, 256, 512],
}


def seconds(batch, tokens, vocabulary, hidden):
    """Median seconds of sampling, teacher and update over five steps."""
    sizes = [(d, 3 * d, 2, 4) for d in (hidden, 3 * hidden // 2)]
    step = opd_step(vocabulary, batch, 16, tokens, *sizes)
    rows = [step(i) for i in range(7)][2:]
    return {k: median(r[k] for r in rows) for k in ("sample_s", "score_s", "update_s", "step_s")}


def main():
    torch.set_num_threads(2)
    figure = Figure(figsize=(12, 3.3), layout="constrained")
    for axis, (name, values) in zip(
        figure.subplots(1, 4, sharey=True), SWEEPS.items(), strict=True
    ):
        found = [seconds(**{**BASE, name: value}) for value in values]
        total = [f["step_s"] for f in found]
        slope = math.log(total[-1] / total[-2]) / math.log(values[-1] / values[-2])
        print(f"{name}: slope {slope:.2f}  " + "  ".join(
            f"{v:,}: {t:.3f}" for v, t in zip(values, total, strict=True)))  # fmt: skip
        marks = {"sample_s": "o-", "score_s": "s--", "update_s": "^-.", "step_s": "k-"}
        for key, mark in marks.items():
            axis.plot(values, [f[key] for f in found], mark, label=key.removesuffix("_s"))
        axis.set(xscale="log", yscale="log", xlabel=name, title=f"slope at the end {slope:.2f}")
        axis.set_xticks(values, [f"{v:,}" for v in values], rotation=40, ha="right")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("seconds a step")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(sys.argv[1] if len(sys.argv) > 1 else "scaling.png", dpi=100)


if __name__ == "__main__":
    main()
