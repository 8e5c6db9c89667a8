"""A real language model learns a way of talking from its own context: which losses find the word?

    python tests/benchmarks/real_language.py pirate --seeds 5        # minutes a run, two cores
    python tests/benchmarks/real_language.py letter --seeds 5
    python tests/benchmarks/real_language.py pirate --tune           # rates, on two other seeds

SmolLM2-135M-Instruct learns from a frozen copy of itself that reads three demonstrations (task
style/pirate or style/letter).  One line of tiny_configs/evidence/real_language.jsonl for each run,
which is skipped when it is there: the probability of the opening word over steps on validation
prompts; on 64 test prompts, at the end, the share of responses in the style, the word's
probability, the reverse KL to the conditioned teacher; what was forgotten: the KL to the start on
unrelated prompts.
"""

import argparse
import json
import runpy
import time

import torch
from common import ROOT
from tqdm import tqdm

import opd

EVIDENCE = ROOT / "tiny_configs/evidence/real_language.jsonl"
STEPS, EVERY, TEST, TUNING = 24, 2, 64, (100, 101)
LOSSES = {
    "reverse KL": dict(method="opd_full"),
    "CR-OPD": dict(method="cr_opd"),
    "forward KL, top 16": dict(divergence="forward_kl", support="teacher", top_k=16),
    "forward KL": dict(divergence="forward_kl"),
    "sampled token": dict(method="opd"),
    "JSD": dict(divergence="jsd"),
}
RATES = {name: (2e-5, 6e-5) for name in LOSSES}
UNRELATED = (
    "What is 12 plus 7?", "Write a Python function that adds two numbers.", "Explain gravity.",
    "Translate 'cat' to French.", "Name three primary colors.", "What is the capital of Italy?",
    "Give me a tip for sleeping well.", "Correct this sentence: he go home.",
    "List two prime numbers.", "What year did World War II end?", "How do I boil an egg?",
    "Summarize: the sun rises in the east.", "What is the opposite of hot?",
    "Write a short greeting for a birthday card.", "Which is larger, 3 or 30?",
    "Suggest a name for a bakery.",
)  # fmt: skip


def make_config(style, loss, lr, seed, steps=STEPS):
    """The run's config: the student is its own teacher, which sees more."""
    folder = str(runpy.run_path(str(ROOT / "tiny_configs/build/smollm2.py"))["folder"]())
    return opd.Config.load(
        student=folder, teacher=folder, task=f"style/{style}", batch_size=8, steps=steps, lr=lr,
        warmup=3, decay=0.0, seed=seed, eval_every=0, diagnose_every=1, eval_prompts=TEST,
        **LOSSES[loss],
    )  # fmt: skip


def opening(world, model, prompts):
    """Mean probability of the first token of the style's opening word."""
    first = world.tokenizer(prompts.answer[0], add_special_tokens=False)["input_ids"][0]
    ids = torch.full((len(prompts.ids), 1), first)
    nothing = torch.zeros(ids.shape)
    rollout = opd.Rollout(prompts.ids, prompts.mask, ids, ids > -1, nothing, ids[:, 0] < 0)
    with torch.no_grad():
        return float(opd.score_tokens(model, rollout, **scores(world)).exp().mean())


def scores(world):
    """The settings of `score` in this run."""
    return {name: value for name, value in world.vocab.items() if name != "eos_ids"}


def distance(world, one, other, prompts, theirs, seed):
    """KL(one || other) per token on one's own text, each behind its own prompts; the texts."""
    found, texts = [], []
    noise = torch.rand(len(prompts.ids), 24, generator=opd.keyed_generator("distance", seed))
    for rows in torch.arange(len(prompts.ids)).split(16):
        text = opd.sample(
            one, opd.take(prompts, rows), horizon=24, noise=noise[rows], **world.vocab
        )
        behind = opd.behind(opd.take(theirs, rows), text)
        with torch.no_grad():
            kl = opd.reverse_kl(opd.score(one, text, **scores(world)),
                                opd.score(other, behind, **scores(world)))  # fmt: skip
        found.append(kl[text.mask])
        texts += opd.response_texts(world.tokenizer, text)
    return float(torch.cat(found).mean()), texts


def unrelated(world):
    """Prompts that have nothing to do with the style."""
    ask = [dict(role="user", content=question) for question in UNRELATED]
    texts = [world.tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
             for turn in ask]  # fmt: skip
    ids, mask = opd.pad(world.tokenizer(texts, add_special_tokens=False)["input_ids"], left=True)
    return opd.Prompts(ids, mask, texts, [""] * len(texts))


def run(style, loss, lr, seed, steps=STEPS):
    """Train once and measure."""
    c = make_config(style, loss, lr, seed, steps)
    world = opd.load_world(c)
    c = c.model_copy(update=dict(max_tokens=world.task.max_tokens))
    optimizer, start = opd.make_optimizer(c, world), time.perf_counter()
    seen = opd.take(world.task.prompts(16, "validation"), torch.arange(16))
    curve, kl = [(0, opening(world, world.student, seen))], []
    for step in tqdm(range(steps), f"{style}, {loss}, {lr:g}, {seed}", leave=False):
        kl.append(opd.train_step(c, world, optimizer, step)["kl"])
        if (step + 1) % EVERY == 0:
            curve.append((step + 1, opening(world, world.student, seen)))
    minutes = (time.perf_counter() - start) / 60
    split = "validation" if seed in TUNING else "test"
    prompts = world.task.prompts(TEST, split, seed=seed)
    reverse, texts = distance(
        world, world.student, world.teacher, prompts, world.task.context(prompts), seed
    )
    others = unrelated(world)
    forgotten, _ = distance(world, world.student, world.teacher, others, others, seed)
    share = sum(text.lstrip().startswith(prompts.answer[0]) for text in texts) / len(texts)
    found = dict(style=style, loss=loss, lr=lr, seed=seed, steps=steps, curve=curve, kl=kl)
    found |= dict(opening=opening(world, world.student, prompts), share=share, test_kl=reverse)
    found |= dict(forgotten=forgotten, minutes=minutes, n=len(texts), texts=texts[:4])
    return found


def known():
    """The runs that are there."""
    lines = EVIDENCE.read_text().splitlines() if EVIDENCE.exists() else []
    return [json.loads(line) for line in lines]


def best_rate(loss):
    """The rate with the least reverse KL to the teacher on validation text, over tuning seeds."""
    tuned = [
        r for r in known() if (r["loss"], r["style"]) == (loss, "pirate") and r["seed"] in TUNING
    ]
    mean = {}
    for lr in RATES[loss]:
        found = [r["test_kl"] for r in tuned if r["lr"] == lr]
        if len(found) == len(TUNING):
            mean[lr] = sum(found) / len(found)
    return min(mean, key=mean.get) if len(mean) == len(RATES[loss]) else RATES[loss][0]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("style", choices=["pirate", "letter"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--losses", nargs="*", default=[*LOSSES], choices=[*LOSSES])
    given = parser.parse_args()
    for seed in TUNING if given.tune else range(given.seeds):
        for loss in given.losses:
            rates = RATES[loss] if given.tune else [best_rate(loss)]
            for lr in rates:
                key = [given.style, loss, lr, seed]
                if key in [[r["style"], r["loss"], r["lr"], r["seed"]] for r in known()]:
                    continue
                found = run(*key)
                with EVIDENCE.open("a") as file:
                    file.write(json.dumps(found) + "\n")
                told = "share {share:.2f}, p {opening:.1e}, KL {test_kl:.2f}, {minutes:.1f} min"
                print(*key, told.format(**found), flush=True)


if __name__ == "__main__":
    main()
