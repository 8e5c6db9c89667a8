"""One OPD step, side by side in one run: this project, a plain loop, TRL's GKDTrainer.

    python tests/benchmarks/bench_step.py --shape A --repeats 5 --trl ENVIRONMENT/bin/python
    python tests/benchmarks/bench_step.py --shape B --first WORKTREE    # of the first edition

--first: the same step by the opd.py of another worktree (git worktree add WORKTREE 5c57ce0), with
the same models, prompts and noise, in turns with the others.

Reverse KL on the whole vocabulary, the student's own text, AdamW, clipping at 1; random Llama
models, prompts of exactly P tokens, no EOS, so every response has exactly T tokens.  Each method
runs in a process of its own, methods interleaved, two warm-up steps dropped.  Reported: the median
over repeats of the ratio of medians, peak memory (MiB) over the start of the loop, and the bound
(2 Ns + 2 Nt + 6 Ns) B (P + T) / best matmul rate, attention not counted.  TRL 1.16.0 needs an
environment of its own: pip install -r requirements.txt trl==1.16.0 accelerate==1.15.0
datasets==5.2.0; without --trl it is left out.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from statistics import median

import common

# V, B, P, T, (student hidden, intermediate, layers, heads), (teacher ...), steps
SHAPES = {
    "A": (64, 64, 16, 48, (128, 384, 2, 4), (192, 576, 4, 6), 10),
    "B": (32_000, 16, 16, 64, (256, 768, 4, 4), (384, 1152, 8, 6), 6),
}
WARM_UP, PARTS = 2, ("sample_s", "score_s", "update_s")


def models(shape):
    """Random student and teacher of a shape."""
    V, _, P, T, *sizes, _ = SHAPES[shape]
    return (common.random_llama(V, size, seed, P + T) for seed, size in enumerate(sizes, 1))


def memory():
    """Peak resident memory of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed_steps(step, n):
    """Seconds of each of n steps after the warm-up, parts of the last, memory over the start."""
    start, seconds, parts = memory(), [], {}
    for i in range(WARM_UP + n):
        t = time.perf_counter()
        parts = step(i) or {}
        seconds.append(time.perf_counter() - t)
    return dict(seconds=seconds[WARM_UP:], parts=parts, peak=memory(), over_start=memory() - start)


def run_opd(shape):
    """This project's train_step."""
    V, B, P, T, *sizes, n = SHAPES[shape]
    step = common.opd_step(V, B, P, T, *sizes)
    return timed_steps(lambda i: {k: v for k, v in step(i).items() if k in PARTS}, n)


def run_plain(shape):
    """The same step as one would write it first: generate, two forwards, log-softmax, backward."""
    import torch

    V, B, P, T, *_, n = SHAPES[shape]
    student, teacher = models(shape)
    teacher.requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)

    def step(i):
        a = time.perf_counter()
        prompt = torch.randint(V, (B, P), generator=torch.Generator().manual_seed(i))
        with torch.no_grad():
            ids = student.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=0,
                max_new_tokens=T, use_cache=True, pad_token_id=0,
            )  # fmt: skip
            assert ids.shape[1] == P + T
            b = time.perf_counter()
            logq = teacher(ids).logits[:, P - 1 : -1].log_softmax(-1)
        c = time.perf_counter()
        logp = student(ids).logits[:, P - 1 : -1].log_softmax(-1)
        (logp.exp() * (logp - logq)).sum(-1).mean().backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return dict(sample_s=b - a, score_s=c - b, update_s=time.perf_counter() - c)

    return timed_steps(step, n)


def run_trl(shape):
    """trl.experimental.gkd.GKDTrainer, lmbda 1, beta 1: reverse KL on the student's own text."""
    import tempfile
    import warnings

    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    warnings.filterwarnings("ignore")
    V, B, P, T, *_, n = SHAPES[shape]
    student, teacher = models(shape)
    words = Tokenizer(kinds.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }} {% endif %}{% endfor %}"
    )
    g = torch.Generator().manual_seed(0)
    rows = torch.randint(2, V, ((WARM_UP + n) * B, P + T), generator=g).tolist()
    text = lambda ids: " ".join(f"w{i}" for i in ids)  # noqa: E731
    data = Dataset.from_list([
        {"messages": [{"role": "user", "content": text(r[:P])},
                      {"role": "assistant", "content": text(r[P:])}]} for r in rows
    ])  # fmt: skip
    seconds, start = [], []

    class Clock(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            start.extend([memory(), time.perf_counter()])

        def on_step_end(self, args, state, control, **kwargs):
            seconds.append(time.perf_counter() - start[1])
            start[1] = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        config = GKDConfig(
            output_dir=folder, per_device_train_batch_size=B, max_steps=WARM_UP + n, lmbda=1.0,
            beta=1.0, seq_kd=False, temperature=1.0, max_new_tokens=T, learning_rate=1e-4,
            lr_scheduler_type="constant", max_grad_norm=1.0, gradient_checkpointing=False,
            bf16=False, use_cpu=True, report_to=[], logging_steps=10**6, save_strategy="no",
            disable_tqdm=True, max_length=4 * (P + T), dataloader_drop_last=True,
        )  # fmt: skip
        trainer = GKDTrainer(
            model=student, teacher_model=teacher, args=config, train_dataset=data,
            processing_class=tokenizer, callbacks=[Clock()],
        )  # fmt: skip
        trainer.generation_config.eos_token_id = V  # cannot be sampled: exactly T new tokens
        trainer.train()
    return dict(seconds=seconds[WARM_UP:], parts={}, peak=memory(), over_start=memory() - start[0])


def bound(shape):
    """Seconds of the matmuls alone at the best rate seen now, attention not counted."""
    import torch

    a = torch.randn(2048, 2048)
    best = 1e9
    for _ in range(20):
        t = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - t)
    V, B, P, T, *sizes, _ = SHAPES[shape]
    Ns, Nt = (layers * (4 * h * h + 3 * h * f) + V * h for h, f, layers, _ in sizes)
    return 8 * (Ns + Nt / 4) * B * (P + T) / (2 * 2048**3 / best)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="A")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trl", help="python of an environment with trl 1.16.0")
    parser.add_argument("--first", help="a worktree of the first edition")
    parser.add_argument(
        "--worker", choices=["opd", "plain", "trl", "bound"], help=argparse.SUPPRESS
    )
    given = parser.parse_args()
    if given.worker:
        import torch

        torch.set_num_threads(given.threads)
        run = dict(opd=run_opd, plain=run_plain, trl=run_trl, bound=bound)[given.worker]
        print("\n" + json.dumps(run(given.shape)))
        return
    methods = ["opd", "plain"] + ["trl"] * bool(given.trl) + ["first"] * bool(given.first)
    environment = {**os.environ, "OMP_NUM_THREADS": str(given.threads), "HF_HUB_OFFLINE": "1"}
    found = {name: [] for name in methods}

    def worker(name):
        python = given.trl if name == "trl" else sys.executable
        kind, tree = ("opd", given.first) if name == "first" else (name, "")
        words = [python, __file__, "--shape", given.shape, "--worker", kind, "--threads",
                 str(given.threads)]  # fmt: skip
        where = environment | dict(OPD_TREE=tree)
        done = subprocess.run(words, capture_output=True, text=True, env=where)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
        return json.loads(done.stdout.strip().splitlines()[-1])

    for repeat in range(given.repeats):
        for name in methods:
            found[name].append(worker(name))
            s = median(found[name][-1]["seconds"])
            print(f"repeat {repeat + 1}  {name:6} {s:.3f} s/step", file=sys.stderr)
    least = worker("bound")
    print(f"shape {given.shape}, {given.threads} threads; bound {least:.3f} s")
    others = ["plain"] + ["trl"] * bool(given.trl) + ["first"] * bool(given.first)
    head = ["method", "s/step, median", "best", *(f"over {o}" for o in others), "over bound", "MiB"]
    print("| " + " | ".join(head) + " |")
    print("|---" * len(head) + "|")
    medians = {m: [median(r["seconds"]) for r in found[m]] for m in methods}

    def over(method, other):
        return median(a / b for a, b in zip(medians[method], medians[other], strict=True))

    for m in methods:
        best, typical = min(min(r["seconds"]) for r in found[m]), median(medians[m])
        cells = [m, f"{typical:.3f}", f"{best:.3f}", *(f"{over(m, o):.2f}" for o in others)]
        cells.append(f"{typical / least:.1f}")
        print(
            "| " + " | ".join([*cells, f"{median(r['over_start'] for r in found[m]):.0f}"]) + " |"
        )
    parts = {m: {k: round(v, 3) for k, v in found[m][-1]["parts"].items()} for m in methods}
    print("parts of the last step:", parts)


if __name__ == "__main__":
    main()
