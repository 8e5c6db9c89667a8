"""Peak memory and time of one full-vocabulary reverse-KL step: in chunks, as opd.py, and plainly.

    python tests/benchmarks/memory.py [--repeats 5]

Student forward, teacher forward, loss, backward, on 8 responses of 256 tokens with a vocabulary of
151,936; random two-layer Llamas 256 wide, fp32, no sampling and no optimizer.  plain: whole
(B, T, V) log-probs of both models, reverse_kl, backward.  chunked: score_chunks and token_loss as
train_step calls them; with diagnostics: and take_note, as train_step does.  Each run has a process
of its own, variants take turns; a step to warm up, then one by the clock.  Reported: medians, over
repeats, of the ratio to plain in the same turn; peak resident memory over what was resident before
the first step, models loaded (Linux: VmHWM and VmRSS).  The gradient, 155 MiB, is in all of them.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import common
import torch
from common import opd

V, B, P, T, SIZE = 151_936, 8, 16, 256, (256, 768, 2, 4)
VARIANTS = ("plain", "chunked", "chunked, with diagnostics")


def resident(key="VmRSS"):
    """MiB of this process that are in memory now (VmRSS), or were at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def models_and_text():
    """World, config and a rollout of random tokens."""
    student, teacher = (common.random_llama(V, SIZE, seed, P + T) for seed in (1, 2))
    teacher.requires_grad_(False)
    law = dict(eos_ids=[], vocab_size=V)
    world = opd.World(student, teacher, None, SimpleNamespace(law=None), law, None)
    ids = torch.randint(V, (B, P + T), generator=torch.Generator().manual_seed(0))
    real, zeros = torch.ones(B, P + T, dtype=torch.bool), torch.zeros(B, T)
    rollout = opd.Rollout(ids[:, :P], real[:, :P], ids[:, P:], real[:, P:], zeros, zeros[:, 0] > 0)
    return opd.Config(batch_size=B, max_tokens=T, method="opd_full"), world, rollout


def plain(config, world, rollout):
    """As one would write it first."""
    with torch.no_grad():
        logq = opd.score(world.teacher, rollout)
    logp = opd.score(world.student, rollout)
    loss = opd.masked_mean(opd.reverse_kl(logp, logq), rollout.mask)
    loss.backward()
    return loss.item()


def chunked(config, world, rollout, diagnostics=False):
    """The inner loop of train_step."""
    table = opd.token_table(config, rollout, torch.zeros(B, dtype=torch.bool))
    total, kept, lap = 0.0, {}, opd.stopwatch(Counter())
    for rows in opd.micro_batches(config):
        for at, *laws in opd.score_chunks(config, world, rollout, rows, kept, lap):
            opd.first_look(config, table, at, *laws[:2])
            now = {name: values[at] for name, values in table.items()}
            loss = opd.token_loss(config, *laws, now)
            loss = (loss * now["emphasis"] * now["weight"]).sum()
            loss.backward()
            total += loss.item()
            if diagnostics:
                opd.take_note(config, table, at, now, *laws[:2])
    return total


def measured(variant):
    """One process: loss, gradient norm, seconds of the second step, MiB over the start."""
    case = models_and_text()
    run = plain if variant == "plain" else chunked
    extra = dict(diagnostics=True) if "diagnostics" in variant else {}
    before, seconds = resident(), []
    for _ in range(2):
        case[1].student.zero_grad(set_to_none=True)
        start = time.perf_counter()
        loss = run(*case, **extra)
        seconds.append(time.perf_counter() - start)
    norm = torch.nn.utils.get_total_norm([p.grad for p in case[1].student.parameters()]).item()
    return dict(loss=loss, norm=norm, seconds=seconds[-1], mib=resident("VmHWM") - before)


def in_process(variant):
    """`measured` in a process of its own."""
    words = [sys.executable, __file__, "--worker", variant]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        raise SystemExit(f"{variant} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(2)
    if given.worker:
        print("\n" + json.dumps(measured(given.worker)))
        return
    found = {name: [] for name in VARIANTS}
    for repeat in range(given.repeats):
        for name in VARIANTS:
            found[name].append(now := in_process(name))
            print(f"# repeat {repeat}, {name}: {now['seconds']:.2f} s, {now['mib']:.0f} MiB, "
                  f"loss {now['loss']:.5f}, gradient {now['norm']:.5f}", flush=True)  # fmt: skip
    print("| step | MiB over start | of plain | seconds | of plain |\n|---|---|---|---|---|")
    for name, runs in found.items():
        share = {
            key: median(a[key] / b[key] for a, b in zip(runs, found["plain"], strict=True))
            for key in ("mib", "seconds")
        }
        mib, seconds = (median(r[key] for r in runs) for key in ("mib", "seconds"))
        print(f"| {name} | {mib:,.0f} | {share['mib']:.3f} | {seconds:.2f} | "
              f"{share['seconds']:.2f} |")  # fmt: skip


if __name__ == "__main__":
    main()
