"""GPU acceptance in one command: does everything here hold on a card, and how fast is it?

    python tests/benchmarks/gpu.py              # under ten minutes on one card: gpu.json, gpu.md
    python tests/benchmarks/gpu.py --device cpu --small     # a rehearsal on a CPU, small

Parts: fp32 losses and gradients against the CPU's, TF32 off; the main job in bf16; a step at a
vocabulary of 151,936 with its memory; sampler and step in tokens a second against `generate` and
the bound that the card's own matrix products set; vLLM, if installed; two processes, if there are
two cards.  tests/test_gpu.py asserts what must hold.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median

import torch
from common import ROOT, lab, opd, random_llama

HERE = Path(__file__).resolve().parent
LOSSES = dict(
    opd_full={}, opd={}, cr_opd={}, vopd={}, rethinking_topk={}, gkd={},
    generalised=dict(method="rethinking_topk", tail="generalised"),
    forward=dict(method="opd_full", divergence="forward_kl"),
)  # fmt: skip


def clock(device, function, repeats):
    """Median seconds of a call, after a first one."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])


def loss_and_gradient(c, world, device, rollout):
    """The loss of a stored rollout and its gradient, on a device, in fp32; moved to the CPU."""
    student = opd.load_model(c.student, device=device)
    teacher = opd.load_model(c.teacher, "reference", device=device).float()
    rollout = opd.Rollout(*(x.to(device) for x in vars(rollout).values()))
    how = dict(vocab_size=world.vocab["vocab_size"])
    logp = opd.LogProbs(student, rollout, grad=True, **how)
    with torch.no_grad():
        logq = opd.LogProbs(teacher, rollout, **how)[slice(None)]
    action, behaviour = rollout.tokens[rollout.mask], rollout.logprobs[rollout.mask]
    advantage = opd.log_ratio_reward(behaviour, opd.of_tokens(logq, action))
    n = slice(None)
    loss = opd.token_loss(c, logp[n], logq, action, advantage, behaviour, n).mean()
    loss.backward()
    logp.backward()
    gradient = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
    return loss.item(), gradient.cpu()


def against_cpu(device):
    """name -> (relative difference of the loss, of the gradient): device against CPU."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    base, found = opd.Config.load(batch_size=32), {}
    tokenizer = opd.load_tokenizer(base.student)
    task, model = opd.load_task(base.task, tokenizer), opd.load_model(base.student)
    world = opd.World(model, None, tokenizer, task, dict(vocab_size=len(tokenizer)))
    prompts = task.prompts(32)
    noise = torch.rand(32, task.max_tokens, generator=opd.keyed_generator("gpu"))
    rollout = opd.sample(model, prompts, horizon=task.max_tokens, noise=noise)
    for name, fields in LOSSES.items():
        c = opd.Config.load(**dict(method=name) | fields)
        (here, ours), (there, theirs) = (
            loss_and_gradient(c, world, d, rollout) for d in ("cpu", device)
        )
        off = float((ours - theirs).norm() / ours.norm())
        found[name] = (abs(here - there) / max(1e-9, abs(here)), off)
    return found


def main_job(small):
    """The main job as everybody runs it; on a card in bf16, with a bf16 teacher."""
    few = dict(steps=2, eval_prompts=16, batch_size=8) if small else {}
    with tempfile.TemporaryDirectory() as runs, contextlib.redirect_stderr(io.StringIO()):
        run = opd.train(opd.Config.load(runs=runs, eval_every=0, **few))
    return {who: run.result[who]["accuracy"] for who in ("student_before", "student_after")}


def large_vocabulary(device, small):
    """A training step at a vocabulary of 151,936: seconds, MiB at the peak."""
    V, B, T = (2_000, 2, 8) if small else (151_936, 8, 256)
    size = (256, 768, 2, 4)
    student, teacher = (random_llama(V, size, seed=i, positions=512).to(device) for i in (1, 2))
    ids = torch.randint(V, (B, 16 + T), generator=opd.keyed_generator("large")).to(device)
    mask = torch.ones(B, T, dtype=torch.bool, device=device)
    logprobs = torch.zeros(B, T, device=device)
    rollout = opd.Rollout(ids[:, :16], ids[:, :16] > -1, ids[:, 16:], mask, logprobs, mask[:, 0])

    def step():
        flop = Counter()
        p, q = opd.LogProbs(student, rollout, grad=True, flop=flop), opd.LogProbs(teacher, rollout)
        for n in opd.chunks(B * T, V):
            with torch.no_grad():
                logq = q[n]
            (opd.reverse_kl(p[n], logq).sum() / (B * T)).backward()
        p.backward()
        student.zero_grad()

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = clock(device, step, 1 if small else 5)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
    return dict(vocabulary=V, tokens=B * T, seconds=seconds, peak_mb=peak)


def speed(device, small):
    """Tokens a second of our sampler, of `generate`, of a step; the bound of matrix products."""
    V, B, T = (1_000, 4, 8) if small else (32_000, 64, 256)
    size = (64, 128, 2, 2) if small else (1024, 2816, 12, 16)
    models = [random_llama(V, size, seed=i, positions=16 + T).to(device) for i in (1, 2)]
    ids = torch.randint(V, (B, 16), generator=opd.keyed_generator("speed"))
    prompts, repeats = opd.Prompts(ids, ids > -1, [], []), 1 if small else 3
    rollout = opd.sample(models[0], prompts, horizon=T, eos_ids=[])
    how = dict(do_sample=True, top_k=0, max_new_tokens=T, min_new_tokens=T, pad_token_id=0)
    flop = Counter()

    def step():
        flop.clear()
        p, q = (opd.LogProbs(m, rollout, grad=m is models[0], flop=flop, rows=16) for m in models)
        for n in opd.chunks(B * T, V):
            with torch.no_grad():
                logq = q[n]
            (opd.reverse_kl(p[n], logq).sum() / (B * T)).backward()
        p.backward()
        models[0].zero_grad()

    side = 256 if small else 8192
    a = torch.randn(side, side, device=device)
    product = clock(device, lambda: a @ a, 3)
    ours = lambda: opd.sample(models[0], prompts, horizon=T, eos_ids=[])  # noqa: E731
    theirs = lambda: models[0].generate(ids.to(device), **how)  # noqa: E731
    timed = dict(sample=ours, generate=theirs, step=step)
    seconds = {name: clock(device, function, repeats) for name, function in timed.items()}
    seconds["bound of the step"] = flop.total() * product / (2 * side**3)
    return {name: round(B * T / s) for name, s in seconds.items()}


def vllm_gap(device):
    """vLLM's gap to the trainer after a hand-over, its seconds for one; None where it is not."""
    if importlib.util.find_spec("vllm") is None:
        return None
    with tempfile.TemporaryDirectory() as runs:
        fields = dict(engine="vllm", steps=4, eval_every=0, eval_prompts=64, runs=runs)
        run = opd.train(opd.Config.load(**fields))
        rows = lab.rows_of(run)
    return dict(engine_gap=rows[-1]["engine_gap"], sample_s=median(r["sample_s"] for r in rows[1:]))


def two_processes():
    """Largest difference of the loss between one process and two; None with fewer cards."""
    if torch.cuda.device_count() < 2:
        return None
    losses = []
    with tempfile.TemporaryDirectory() as runs:
        for n in (1, 2):
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n)]
            command += [str(ROOT / "opd.py"), "--steps", "4", "--eval_every", "0"]
            subprocess.run([*command, "--runs", runs, "--name", f"n{n}"], check=True)
            file = Path(runs) / f"n{n}/metrics.jsonl"
            losses.append([json.loads(line)["loss"] for line in file.read_text().splitlines()])
    return max(abs(a - b) for a, b in zip(*losses, strict=True))


def measure(device, small):
    """All parts, by name."""
    found = dict(device=torch.cuda.get_device_name() if device == "cuda" else "CPU, a rehearsal")
    parts = dict(
        against_cpu=lambda: against_cpu(device), main_job=lambda: main_job(small),
        large_vocabulary=lambda: large_vocabulary(device, small),
        tokens_per_second=lambda: speed(device, small), vllm=lambda: vllm_gap(device),
        two_processes=two_processes,
    )  # fmt: skip
    for name, part in parts.items():
        start = time.perf_counter()
        found[name] = part()
        print(f"{name}: {found[name]}  ({time.perf_counter() - start:.0f} s)", file=sys.stderr)
    return found


def table(found):
    """The figures as Markdown, for tests/benchmarks/README.md."""
    lines = [f"GPU acceptance on {found['device']}.", "", "| what | measured |", "|---|---|"]
    for name, value in found.items():
        parts = value if isinstance(value, dict) else {"": value}
        lines += [f"| {name} {key} | {one} |" for key, one in parts.items() if name != "device"]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", default=str(HERE / "gpu"))
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu.py: no CUDA here; a rehearsal: --device cpu --small --out FILE")
    found = measure(given.device, given.small)
    Path(given.out).with_suffix(".json").write_text(json.dumps(found, indent=1))
    Path(given.out).with_suffix(".md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
