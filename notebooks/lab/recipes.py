"""Recipes around `opd.train`: prefixes, prompts, a cold start; the memory of a run."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module

import opd

PER_TOKEN = ("tokens", "mask", "logprobs")


def continue_rollout(
    model: Module, start: opd.Rollout, depth: int, *, horizon: int, noise: torch.Tensor, **how: Any
) -> opd.Rollout:
    """Keep the first `depth` tokens of each response and let another model write the rest.

    Rows that had stopped by then stay as they are.  noise (B, at least horizon): column t is for
    token t; how: temperature, top_p, eos_ids, vocab_size as in `opd.sample`; logprobs are of
    whoever wrote the token.
    """
    depth, go = min(depth, start.tokens.shape[1]), start.mask[:, depth:].any(1) | ~start.finished
    kept = {k: getattr(start, k)[:, :depth] for k in PER_TOKEN}
    go = go.nonzero().squeeze(1)  # (rows that go on,)
    if not len(go) or depth >= horizon:
        finished = start.finished & ~start.mask[:, depth:].any(1)
        return replace(start, **kept, finished=finished)
    some = opd.take(start, go)
    ids = torch.cat([some.prompt_ids, some.tokens[:, :depth]], dim=1)
    seen = torch.cat([some.prompt_mask, some.mask[:, :depth]], dim=1)
    noise = noise[go.to(noise.device), depth:]
    state = opd.Prompts(ids, seen, [], [])
    tail = opd.sample(model, state, horizon=horizon - depth, noise=noise, **how)
    wide = {k: torch.nn.functional.pad(x, (0, tail.tokens.shape[1])) for k, x in kept.items()}
    for name, values in wide.items():
        values[go, depth:] = getattr(tail, name)
    finished = torch.ones_like(start.finished)
    finished[go] = tail.finished
    return replace(start, **wide, finished=finished)


def teacher_prefix(
    student: Module, teacher: Module, prompts: opd.Prompts, prefix: int, *, horizon: int,
    noise: torch.Tensor, top_p: float = 1.0, **how: Any,
) -> opd.Rollout:  # fmt: skip
    """Text whose first `prefix` tokens are the teacher's; the student, at its top_p, goes on.

    noise, how: as in `continue_rollout`.  prefix 0: the student's own text.
    """
    student_how = dict(how, horizon=horizon, noise=noise, top_p=top_p)
    if prefix == 0:
        return opd.sample(student, prompts, **student_how)
    head = opd.sample(teacher, prompts, horizon=min(prefix, horizon), noise=noise, **how)
    return continue_rollout(student, head, prefix, **student_how)


def continuation_advantage(
    student: Module, teacher: Module, task: opd.Task, prompts: opd.Prompts, depths: list[int],
    **how: Any,
) -> dict[int, dict[str, float]]:  # fmt: skip
    """Who finishes the student's text better?  depth -> accuracy of student, teacher, advantage.

    The first `depth` tokens are the student's; the rest is written by each, with the same noise.
    Near 0 or below: the teacher cannot use what the student has written so far.
    [secondary: 2604.13016]
    """
    g = opd.keyed_generator("continue")
    how |= dict(
        horizon=task.max_tokens, noise=torch.rand(len(prompts.ids), task.max_tokens, generator=g)
    )
    own, found = opd.sample(student, prompts, **how), {}
    for depth in depths:
        rest = continue_rollout(teacher, opd.behind(task.context(prompts), own), depth, **how)
        right = [float(task.verify(prompts, text).float().mean()) for text in (own, rest)]
        found[depth] = dict(student=right[0], teacher=right[1], advantage=right[1] - right[0])
    return found


# Prompts are data: a task made of another one.  To train with it, write a task file like this:

TASK_FILE = """import lab
import opd


def make_task(name, tokenizer):
    task = opd.load_task({task!r}, tokenizer)
    return {made}
"""
CANDIDATES = 4  # prompts asked for each one that is taken by confidence


def prompt_pool(task: opd.Task, size: int, seed: int = 0) -> opd.Task:
    """The task with `size` training prompts for ever: each once a pass, in a new order.

    Held-out prompts stay as they are.
    """
    pool = task.draw(size, "train", random.Random(f"train {seed}"))

    def draw(n: int, split: str, rng: random.Random) -> list[tuple[str, str]]:
        if split != "train":
            return task.draw(n, split, rng)
        passes = -(-n // len(pool))
        return [pair for _ in range(passes) for pair in rng.sample(pool, len(pool))][:n]

    return replace(task, draw=draw)


def aligned_prompts(
    task: opd.Task, source: opd.Task | Module, share: float = 1.0, **how: Any
) -> opd.Task:
    """The task with training prompts that the teacher knows, in this share; held-out ones stay.

    source: a task, whose prompts are taken; or the teacher, then by confidence: of 4 times as many
    prompts of the task, those where the mean log-prob of the teacher's own response is highest.
    how: eos_ids, vocab_size, as in `opd.sample`.  The teacher's chat template comes with its
    tokenizer: load the task with that.
    [secondary: 2604.13016, template and content; reconstruction: confidence]
    """

    def surest(m: int, split: str, rng: random.Random) -> list[tuple[str, str]]:
        pool = [*dict.fromkeys(task.draw(CANDIDATES * m, split, rng))]
        g = opd.keyed_generator(rng.random())
        noise = torch.rand(len(pool), task.max_tokens, generator=g)
        prompts = replace(task, draw=lambda *_: pool).prompts(len(pool), split)
        text = opd.sample(source, prompts, horizon=task.max_tokens, noise=noise, **how)
        sure = torch.where(text.mask, text.logprobs, 0.0).sum(1) / text.mask.sum(1)  # (4m,)
        return [pool[i] for i in sure.topk(min(m, len(pool))).indices.tolist()]

    def draw(n: int, split: str, rng: random.Random) -> list[tuple[str, str]]:
        m = max(1, round(share * n)) if split == "train" else 0
        known = source.draw if isinstance(source, opd.Task) else surest
        chosen = known(m, split, rng) if m else []
        return chosen + task.draw(n - len(chosen), split, rng)

    return replace(task, draw=draw)


KEPT = (  # a cold start has these fields of the run that follows
    "student", "teacher", "task", "batch_size", "temperature", "max_tokens", "micro_batch", "lr",
    "warmup", "decay", "grad_clip", "seed", "runs", "eval_every", "eval_prompts",
    "checkpoint_every",
)  # fmt: skip


def cold_start(config: opd.Config, steps: int, **hooks: Callable) -> tuple[opd.Run, opd.Run]:
    """Two runs: imitate the teacher's right responses for `steps` steps, then `config` from there.

    The same as `--method sft --states teacher --keep right`, then `--student runs/NAME/model`; each
    run has its own optimizer and learning rate schedule.  hooks: of the second.
    [secondary: 2604.13016]
    """
    fields = {name: getattr(config, name) for name in KEPT}
    fields |= dict(name=config.name and f"{config.name}-cold", steps=steps)
    first = opd.train(opd.Config.load(method="sft", states="teacher", keep="right", **fields))
    config = config.model_copy(update=dict(student=str(first.dir / "model")))
    return first, opd.train(config, **hooks)


def with_recipe(config: opd.Config, recipe: dict[str, Any], **hooks: Callable) -> list[opd.Run]:
    """The runs of a config with a recipe around it; hooks: of the last.

    pool         64: so many training prompts for ever, see `prompt_pool`
    aligned      a task, or "confidence": training prompts the teacher knows, see `aligned_prompts`;
                 share: of them, default 1
    cold_start   20: so many of the config's steps imitate the teacher first, see `cold_start`
    InputError: another recipe.
    """
    wrong = sorted(recipe.keys() - {"pool", "aligned", "share", "cold_start"})
    opd.require(not wrong, f"recipe = {wrong}: must be pool, aligned and share, cold_start")
    if source := recipe.get("aligned"):
        by = f"opd.load_task({source!r}, tokenizer)"
        by = f"opd.load_model({config.teacher!r}, 'teacher')" if source == "confidence" else by
        made = f"lab.aligned_prompts(task, {by}, {recipe.get('share', 1.0)})"
    if "pool" in recipe:
        made = f"lab.prompt_pool(task, {recipe['pool']})"
    if {"pool", "aligned"} & {*recipe}:
        file = Path(config.runs).resolve() / "task.py"
        file.write_text(TASK_FILE.format(task=config.task, made=made))
        config = config.model_copy(update=dict(task=str(file)))
    if steps := recipe.get("cold_start"):
        config = config.model_copy(update=dict(steps=config.steps - steps))
        return [*cold_start(config, steps, **hooks)]
    return [opd.train(config, **hooks)]


def memory_estimate(
    config: opd.Config, student: Any, teacher: Any | None, prompt_tokens: int, half: str = "bf16"
) -> dict[str, float]:  # fmt: skip
    """Bytes that a run of Llama- or Qwen-like models holds, by part; peak: the worst stage's.

    student, teacher  configs of transformers; teacher None: on a server, or none
    prompt_tokens     of the longest prompt; config.max_tokens, of the response, must be set
    half              bf16: a bf16 teacher, the student's passes in bf16, its weights fp32; fp16: a
                      teacher in fp16, all else fp32; none: all in fp32, on a CPU
    earlier: gradients that are there when a micro-batch is scored; read: the teacher's last hidden
    states, which the whole step keeps.  Not in it: what CUDA itself takes, holes in the allocator,
    an engine, a rule's reference.
    [derived; checked on a CPU by tests/benchmarks/memory.py --estimate]
    """
    with torch.device("meta"):
        models = [c and opd.AutoModelForCausalLM.from_config(c) for c in (student, teacher)]
    n, m = (model.num_parameters() if model else 0 for model in models)
    rows, tokens = config.micro_batch or config.batch_size, prompt_tokens + config.max_tokens
    writers = max(config.batch_size, min(opd.EVALUATION_ROWS, 8 * rows))
    a, wide = {"bf16": (2, 2), "fp16": (4, 2), "none": (4, 4)}[half]  # bytes: passes, teacher
    V, D, L = student.vocab_size, student.hidden_size, student.num_hidden_layers
    (A, K), theirs = heads(student), teacher and teacher.num_hidden_layers * heads(teacher)[1]
    norms = 4 * D + 2 * (A + K) * ("qwen3" in student.model_type)  # stay fp32
    layer = rows * tokens * (4 * norms + a * (2 * D + 4 * A + 4 * student.intermediate_size))
    chunk = min(rows * config.max_tokens * V, max(opd.CHUNK_TOKENS * V, opd.CHUNK_LOGITS))
    parts = dict(
        student=4 * n, teacher=wide * m, moments=8 * n, gradients=4 * n, casts=2 * n * (a == 2),
        layers=L * layer,
        chunk=36 * chunk + (8 - a) * V * D, earlier=4 * (n if rows < config.batch_size else V * D),
        cache=writers * tokens * max((4 + a) * L * K, 2 * wide * (theirs or 0)),
        sampling=28 * writers * V, update=4 * n if wide == 2 else 8 * V * D,
        read=config.batch_size * config.max_tokens * wide * (teacher.hidden_size if teacher else 0),
    )  # fmt: skip
    stages = ("cache sampling casts", "earlier casts layers chunk read",
              "gradients layers read", "gradients update read")  # fmt: skip
    worst = max(sum(parts[name] for name in stage.split()) for stage in stages)
    return parts | dict(peak=parts["student"] + parts["teacher"] + parts["moments"] + worst)


def heads(c: Any) -> tuple[int, int]:
    """Numbers a token of a layer's queries, and of its keys."""
    size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return size * c.num_attention_heads, size * c.num_key_value_heads
