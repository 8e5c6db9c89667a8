"""What a method's step costs next to plain sampled-token OPD, side by side in one run.

    python tests/benchmarks/bench_methods.py [--repeats 9]

Shape A of bench_step.py; the methods take turns step by step, two warm-up steps each are dropped.
Printed: the median seconds of a step, and the median over turns of the ratio to `opd` in that turn.
"""

import argparse
import time
from statistics import median

import torch
from bench_step import SHAPES
from common import opd_step

METHODS = {
    "opd (plain)": dict(method="opd"),
    "opd_full": dict(method="opd_full"),
    "vopd": dict(method="vopd"),
    "return-to-go": dict(method="opd", gamma=1.0),
    "gae_opd": dict(method="gae_opd"),
    "cr_opd": dict(method="cr_opd"),
    "aopd": dict(rule="aopd"),
    "eopd": dict(rule="eopd"),
    "prune_opd": dict(rule="prune_opd"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(2)
    V, B, P, T, *sizes, _ = SHAPES["A"]
    steps = {name: opd_step(V, B, P, T, *sizes, **fields) for name, fields in METHODS.items()}
    seconds = {name: [] for name in steps}
    for i in range(2 + repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step(i)
            seconds[name].append(time.perf_counter() - start)
    plain = seconds["opd (plain)"][2:]
    print("| method | s/step, median | over plain |\n|---|---|---|")
    for name, each in seconds.items():
        ratio = median(a / b for a, b in zip(each[2:], plain, strict=True))
        print(f"| {name} | {median(each[2:]):.3f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
