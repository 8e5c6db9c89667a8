"""Peak memory and time of one full-vocabulary reverse-KL step: in chunks, as opd.py, and plainly.

    python tests/benchmarks/memory.py [--repeats 5]     # the comparison
    python tests/benchmarks/memory.py --estimate        # lab.memory_estimate against measured runs
    python tests/benchmarks/memory.py --configs         # estimates for tiny_configs/*.json

Student forward, teacher forward, loss, backward, on 8 responses of 256 tokens with a vocabulary of
151,936; random two-layer Llamas 256 wide, fp32, no sampling and no optimizer.  plain: whole
(B, T, V) log-probs of both models, reverse_kl, backward.  chunked: LogProbs and token_loss as
train_step calls them; with diagnostics: and notes, as on a diagnosed step.  Each run has a process
of its own, variants take turns; the faster of two steps counts.  Reported: medians, over repeats,
of the ratio to plain in the same turn; seconds by the clock, and of processor time, which a busy
machine disturbs less; peak resident memory over what was resident before
the first step, models loaded (Linux: VmHWM and VmRSS).  The gradient, 155 MiB, is in all of them.

--estimate: whole train_steps, sampling and optimizer included, of random models, one process a
case, one thread; the base is what is resident before the models are made.  There malloc is told to
give every large block back (MALLOC_MMAP_THRESHOLD_), so that what is held is measured, not holes.
--configs: minutes are unmeasured: FLOPs of reading and updating at SHARE of the card's peak, plus
sampling at DECODE seconds a token of a batch, which waits for kernel launches rather than FLOPs.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import common
import torch
from common import lab, opd
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

V, B, P, T, SIZE = 151_936, 8, 16, 256, (256, 768, 2, 4)
VARIANTS = ("plain", "chunked", "chunked, with diagnostics")
CASES = {  # V, B, P, T, student and teacher (hidden, intermediate, layers, heads), fields
    "wide": (4096, 8, 16, 32, (1024, 3072, 4, 8), (1024, 3072, 2, 8), dict(micro_batch=1)),
    "vocabulary": (100_000, 8, 16, 16, (256, 768, 2, 4), (256, 768, 2, 4), dict(micro_batch=1)),
    "deep": (4096, 8, 32, 96, (256, 768, 12, 4), (256, 768, 2, 4), {}),
    "small": (32_768, 2, 8, 16, (256, 768, 2, 4), (256, 768, 2, 4), dict(micro_batch=1)),
}  # fmt: skip
PUBLISHED = {  # the models' own config.json, what decides their size
    "Qwen/Qwen3-0.6B-Base": Qwen3Config(
        hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, intermediate_size=3072, vocab_size=151_936, tie_word_embeddings=True),
    "Qwen/Qwen3-1.7B": Qwen3Config(
        hidden_size=2048, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, intermediate_size=6144, vocab_size=151_936, tie_word_embeddings=True),
    "Qwen/Qwen2.5-0.5B": Qwen2Config(
        hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        intermediate_size=4864, vocab_size=151_936, tie_word_embeddings=True),
}  # fmt: skip
PUBLISHED["Qwen/Qwen2.5-0.5B-Instruct"] = PUBLISHED["Qwen/Qwen2.5-0.5B"]
CARDS = {  # config: the card's GB; the student's peak TFLOP/s, assumed, dense; half, as lab's
    "gsm8k_16gb_t4": (16, 8, "fp16"), "gsm8k_24gb": (24, 70, "bf16"),
    "remote_teacher": (24, 70, "bf16"), "gsm8k_80gb": (80, 312, "bf16"),
}  # fmt: skip
PROMPT, SHARE, DECODE = 256, 0.3, 0.03  # tokens of a GSM8K prompt, at most; assumed; s a token


def resident(key="VmRSS"):
    """MiB of this process that are in memory now (VmRSS), or were at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def models_and_text():
    """World, config and a rollout of random tokens."""
    student, teacher = (common.random_llama(V, SIZE, seed, P + T) for seed in (1, 2))
    teacher.requires_grad_(False)
    world = opd.World(student, teacher, None, None, dict(eos_ids=[], vocab_size=V))
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
    action, w = rollout.tokens[rollout.mask], opd.token_weights(rollout.mask)[rollout.mask]
    zero, seen = torch.zeros(len(action)), []
    teacher = world.log_probs(config, world.teacher, rollout)
    student = world.log_probs(config, world.student, rollout, grad=True)
    for n in opd.chunks(len(action), V):
        logp, logq = student[n], teacher[n]
        each = opd.token_loss(config, logp, logq, action[n], zero[n], zero[n], n)
        (each * w[n]).sum().backward()
        seen.append(each.detach() * w[n])
        if diagnostics:
            seen[-1] += 0 * opd.notes(config, logp, logq, action[n], zero[n])["kl"]
        del logp, logq, each
    student.backward()
    return torch.cat(seen).sum().item()


def measured(variant):
    """One process: loss, gradient norm, seconds of the faster step, MiB over the start."""
    case = models_and_text()
    run = plain if variant == "plain" else chunked
    extra = dict(diagnostics=True) if "diagnostics" in variant else {}
    before, seconds, busy = resident(), [], []
    for _ in range(2):
        case[1].student.zero_grad(set_to_none=True)
        start, began = time.perf_counter(), time.process_time()
        loss = run(*case, **extra)
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - began)
    norm = torch.nn.utils.get_total_norm([p.grad for p in case[1].student.parameters()]).item()
    peak = resident("VmHWM") - before
    return dict(loss=loss, norm=norm, seconds=min(seconds), busy=min(busy), mib=peak)


def measured_case(name):
    """One process: MiB that two train_steps held at most, models included, and the estimate."""
    V, B, P, T, student, teacher, fields = CASES[name]
    torch.set_num_threads(1)
    common.opd_step(64, 4, 4, 4, (32, 64, 1, 2), (32, 64, 1, 2))(0)  # libraries are loaded
    before = resident()
    step = common.opd_step(V, B, P, T, student, teacher, method="opd_full", **fields)
    for i in range(2):
        step(i)
    peak = resident("VmHWM") - before
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    configs = (
        LlamaConfig(vocab_size=V, tie_word_embeddings=True, **dict(zip(keys, size, strict=True)))
        for size in (student, teacher)
    )
    opd.EVALUATION_ROWS = B  # nothing is evaluated here
    config = opd.Config(batch_size=B, max_tokens=T, eval_every=0, **fields)
    return dict(mib=peak, estimate=lab.memory_estimate(config, *configs, P, "none")["peak"] / 2**20)


def estimated(path):
    """A config's memory parts in bytes, and minutes; teacher on a server: not in either."""
    config, (_, peak, half) = opd.Config.load(path), CARDS[path.stem]
    configs = [PUBLISHED.get(name) for name in (config.student, config.teacher)]
    parts, tokens = lab.memory_estimate(config, *configs, PROMPT, half), PROMPT + config.max_tokens
    with torch.device("meta"):
        models = [c and AutoModelForCausalLM.from_config(c) for c in configs]
    B, T = config.batch_size, config.max_tokens
    passes = (3, 1)
    flops = sum(times * opd.forward_flops(model, B * tokens, B * tokens**2, B * T)
                for times, model in zip(passes, models, strict=True) if model)  # fmt: skip
    rows = min(opd.EVALUATION_ROWS, 8 * (config.micro_batch or B))
    batches = config.steps + 2 * (2 + bool(configs[1])) * -(-config.eval_prompts // rows)
    seconds = config.steps * flops / (SHARE * peak * 1e12) + batches * T * DECODE
    return parts, seconds / 60


def configs_table():
    """The table of the shipped configs for a GPU."""
    some = ("student", "teacher", "moments", "gradients", "casts", "layers", "chunk", "cache")
    print(f"| config | {' | '.join(some)} | peak, GB | card, GB | minutes, unmeasured |")
    print("|---" * (len(some) + 4) + "|")
    for name, (card, *_) in CARDS.items():
        parts, minutes = estimated(common.ROOT / f"tiny_configs/{name}.json")
        cells = " | ".join(f"{parts[key] / 1e9:.1f}" for key in (*some, "peak"))
        print(f"| {name} | {cells} | {card} | {minutes:.0f} |")


def in_process(variant, threads=1, **environment):
    """`measured` or `measured_case` in a process of its own."""
    words = [sys.executable, __file__, "--worker", variant, "--threads", str(threads)]
    environment = os.environ | environment
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{variant} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def estimates():
    """The formula against measured runs."""
    print("| models | measured, MiB | estimate, MiB | estimate / measured |\n|---|---|---|---|")
    for name in CASES:
        found = in_process(name, MALLOC_MMAP_THRESHOLD_="131072", OMP_NUM_THREADS="1")
        print(f"| {name} | {found['mib']:,.0f} | {found['estimate']:,.0f} | "
              f"{found['estimate'] / found['mib']:.2f} |", flush=True)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--estimate", action="store_true")
    parser.add_argument("--configs", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.worker:
        run = measured_case if given.worker in CASES else measured
        print("\n" + json.dumps(run(given.worker)))
        return
    if given.estimate or given.configs:
        estimates() if given.estimate else configs_table()
        return
    found = {name: [] for name in VARIANTS}
    for repeat in range(given.repeats):
        for name in VARIANTS:
            found[name].append(now := in_process(name, given.threads))
            shown = ", ".join(f"{key} {value:.5g}" for key, value in now.items())
            print(f"# repeat {repeat}, {name}: {shown}", flush=True)
    keys = dict(mib="MiB over start", seconds="seconds", busy="processor seconds")
    print(f"| step | {' | '.join(f'{name} | of plain' for name in keys.values())} |")
    print("|---" * 7 + "|")
    for name, runs in found.items():
        cells = []
        for key in keys:
            share = median(a[key] / b[key] for a, b in zip(runs, found["plain"], strict=True))
            cells += [
                f"{median(r[key] for r in runs):,.{0 if key == 'mib' else 1}f}",
                f"{share:.2f}",
            ]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
