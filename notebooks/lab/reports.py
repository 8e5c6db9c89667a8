"""Before and after a run: will this teacher teach this student?  And what has the run to tell?"""

import hashlib
import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import opd

from .geometry import top_share
from .plots import draw_report, read_rows
from .recipes import continuation_advantage


@torch.no_grad()
def diagnosed(
    c: opd.Config, world: opd.World, rollout: opd.Rollout, prompts: opd.Prompts | None = None
) -> dict[str, Tensor]:
    """What `opd.diagnose` says of every token of a rollout, name -> (B, T); 0 where masked.

    prompts: the rollout's, for a teacher with privileged context.
    """
    mask, parts = rollout.mask, []
    shown = opd.behind(world.task.context(prompts), rollout) if prompts else rollout
    student = world.log_probs(c, world.student, rollout)
    teacher = world.log_probs(c, world.teacher, shown)
    action = rollout.tokens[mask]  # (N,)
    for n in opd.chunks(len(action), world.vocab["vocab_size"]):
        how = dict(top_k=c.top_k, min_prob=c.min_prob)
        parts.append(opd.diagnose(student[n], teacher[n], action[n], **how))
    found = {name: torch.cat([part[name] for part in parts]).float() for name in parts[0]}
    blank = torch.zeros(mask.shape, device=mask.device)
    return {name: blank.masked_scatter(mask, values) for name, values in found.items()}


# `check` asks so many prompts, looks at so many parts of the text, and wants at least: the gain in
# accuracy of the teacher's continuation (a little more than two standard errors of a difference at
# 256 prompts [derived]; the maximum over depths is not corrected for), agreement and teacher_mass
# (between tiny pairs that learned and others: tiny_configs/evidence/check_known.json)
# [reconstruction]
CHECK_PROMPTS, CHECK_PARTS = 256, 8
CHECK_LEAST = dict(gain=0.1, agreement=0.15, teacher_mass=0.35)


@dataclass
class Verdict:
    """What `check` says before training: a decision, its reasons as sentences, its numbers.

    decision: go, cold start first, shorten the horizon, other teacher, or self-check.
    """

    decision: str
    reasons: list[str]
    numbers: dict[str, Any]


@torch.no_grad()
def check(config: opd.Config) -> Verdict:
    """Will this teacher teach this student?  Samples a little, trains nothing, writes nothing.

    In this order, the first that holds: *other teacher*, where it finishes the student's text
    (from nothing, or from a prefix) no better than the student; *cold start first*, where on that
    text they rarely agree, or the teacher has little mass on the student's top 4; *shorten the
    horizon*, where all later text is like that (horizon: where it begins); else *go*.
    Overlap ratios are shown and decide nothing: on tiny models they mislead.  Nor does the
    advantage by depth decide the horizon: no teacher recovers from a fatal mistake, yet it teaches.
    Of a model with itself: `self_check` too.
    [secondary: 2604.13016, the questions; reconstruction: rules and thresholds]
    Raises InputError for models that cannot work together.
    """
    here = config.teacher and not config.remote
    opd.require(here, f"teacher = {config.teacher!r}: check needs one, here and not on a server")
    c = config.model_copy(update=dict(micro_batch=config.micro_batch or config.batch_size))
    world = opd.load_world(c)
    task, numbers = world.task, {}
    prompts = task.prompts(CHECK_PROMPTS, "validation", seed="check")
    noise = torch.rand(len(prompts.text), task.max_tokens, generator=opd.keyed_generator("check"))
    whole = dict(horizon=task.max_tokens, noise=noise, temperature=c.temperature)
    own = opd.sample(world.student, prompts, **whole, **world.vocab)
    seen = diagnosed(c, world, own, prompts)
    numbers |= {name: float(values[own.mask].mean()) for name, values in seen.items()}
    numbers["top_5_percent"] = top_share(seen["kl"], own.mask)
    length = int(own.mask.sum(1).float().mean())
    depths = sorted({0, 1, *(length * part // CHECK_PARTS for part in range(CHECK_PARTS))})
    models = world.student, world.teacher
    depth = continuation_advantage(*models, task, prompts, depths, **world.vocab)
    numbers["gain"] = max(at["advantage"] for at in depth.values())
    numbers |= dict(student=depth[0]["student"], teacher=depth[0]["teacher"], by_depth=depth)
    numbers["horizon"], width = 0, max(1, own.tokens.shape[1] // CHECK_PARTS)
    for start in range(0, own.tokens.shape[1], width):  # up to the last part that is fine
        part, last = slice(start, start + width), start + width >= own.tokens.shape[1]
        kinds = ("agreement", "teacher_mass")
        here = {key: float(seen[key][:, part][own.mask[:, part]].mean()) for key in kinds}
        if all(value >= CHECK_LEAST[key] for key, value in here.items()):
            numbers["horizon"] = task.max_tokens if last else start + width
    low = {key for key, least in CHECK_LEAST.items() if numbers[key] < least}
    short = numbers["horizon"] < task.max_tokens
    rules = {"other teacher": "gain" in low, "cold start first": low, "shorten the horizon": short}
    decision = next((advice for advice, holds in rules.items() if holds), "go")
    pair = {"EOS ids": [opd.eos_ids_of(model) for model in models]}
    names = c.student, c.teacher
    pair["chat templates"] = [opd.load_tokenizer(name).chat_template for name in names]
    reasons = [f"note: {what} differ" for what, (one, other) in pair.items() if one != other]
    for key, least in CHECK_LEAST.items():
        reasons.append(f"{key} {numbers[key]:.3f}, wanted at least {least}")
    reasons.append(f"reliable up to token {numbers['horizon']} of {task.max_tokens}")
    if same_model(*names):  # it cannot teach itself: what counts is that nothing is misaligned
        decision, reasons = "self-check", [self_check(c, world)]
    return Verdict(decision, reasons, numbers)


def same_model(one: str, other: str) -> bool:
    """Do two names mean the same folder or hub model?"""
    return Path(opd.find(one)).resolve() == Path(opd.find(other)).resolve()


@torch.enable_grad()
def self_check(c: opd.Config, world: opd.World) -> str:
    """Teacher == student: the direct loss and its gradient must vanish.  Returns a line to print.

    Everything in fp32, on text that the student writes.  The scorer is held against the sampler
    too: it read every token's log-prob one at a time, from the cache, so a wrong shift, mask or
    position in either shows before it costs a run.  TrainingStopped when the loss exceeds 1e-6
    nats per token, the gradient's norm 1e-5, or a token's log-prob differs by more than 1e-3.
    """
    student, most = world.student, world.task.max_tokens
    twin = opd.load_model(c.teacher, device=str(student.device))
    prompts = world.task.prompts(min(8, c.batch_size), "train")
    noise = torch.rand(len(prompts.text), most, generator=opd.keyed_generator("check"))
    rollout = opd.sample(student, prompts, horizon=most, noise=noise, **world.vocab)
    how = dict(vocab_size=world.vocab["vocab_size"])
    logp, logq = opd.score(student, rollout, **how), opd.score(twin, rollout, **how).detach()
    loss = opd.masked_mean(opd.reverse_kl(logp, logq), rollout.mask)
    gradient = torch.autograd.grad(loss, [*student.parameters()], materialize_grads=True)
    norm = float(torch.nn.utils.get_total_norm(gradient))
    apart = opd.of_tokens(logq, rollout.tokens) - rollout.logprobs
    gap = float(apart[rollout.mask].abs().max())
    found = f"loss {loss:.1e}, gradient norm {norm:.1e}, sampler against scorer {gap:.1e}"
    if abs(loss) > 1e-6 or norm > 1e-5 or gap > 1e-3:
        raise opd.TrainingStopped(f"self-check: {found}; allowed: 1e-6, 1e-5, 1e-3")
    return f"self-check, teacher == student: {found}: fine"


def provenance(c: opd.Config) -> dict[str, Any]:
    """Models, tokenizer, versions, commit of a run, read now: ask where it ran, soon after it."""
    about, device = {}, "cuda" if torch.cuda.is_available() else "cpu"
    for role in ("student", "teacher"):
        name = getattr(c, role)
        if not name or (role == "teacher" and c.remote):
            about[role] = f"{name}: none here"
            continue
        model = opd.load_model(name, role, device=device)
        size = f"{model.num_parameters():,} parameters, {model.dtype}"
        kind = f"{model.config.model_type}, EOS {opd.eos_ids_of(model)}"
        about[role] = f"{name}: {size}, {kind}"
    tokenizer = opd.load_tokenizer(c.student)
    template = tokenizer.chat_template or ""
    digest = hashlib.sha256(template.encode()).hexdigest()[:8] if template else "none"
    size = max(tokenizer.get_vocab().values()) + 1
    about["tokenizer"] = f"{size} tokens, chat template {digest}"
    about["versions"] = f"torch {torch.__version__}, transformers {transformers.__version__}"
    git = shutil.which("git") or "true"  # no git, or no repository: nothing is printed
    describe = [git, "-C", str(opd.HERE), "describe", "--always", "--dirty"]
    done = subprocess.run(describe, capture_output=True, text=True)
    return about | dict(commit=done.stdout.strip() or "unknown")


CHECKLIST = {  # item -> its Config fields; after the bar what came of it: means over the steps
    "who writes": "states student_share keep updates_per_rollout",
    "prompts": "task samples_per_prompt",
    "sampler and scorer": "temperature top_p",
    "feedback": "feedback",
    "support and normalisation": "support top_k tail",
    "divergence and its gradient": "divergence beta route",
    "credit": "gamma baseline gae_lambda negative rho min_prob",
    "gates": "negative | gated",
    "weights": "keep | weight",
    "aggregation": "aggregation",
    "regularizers": "grad_clip | grad_norm",
    "horizon": "horizon schedule horizon_start growth max_tokens | horizon length finished",
    "update": "method lr warmup decay batch_size micro_batch steps extrapolate",
    "run": "seed engine eval_prompts eval_every diagnose_every checkpoint_every",
}
UNKNOWN = ("whether the models share a base, and their training data; the spread over seeds; "
           "overlap of training data and evaluation")  # fmt: skip


def checklist(c: opd.Config, result: dict[str, Any], rows: list[dict]) -> dict[str, str]:
    """The survey's reporting checklist, item -> what this run knows of it.  See UNKNOWN too.

    [reconstruction: the items follow 2606.22793, of which only the abstract could be read]
    """
    items = {}
    for item, names in CHECKLIST.items():
        fields, _, realised = names.partition("|")
        told = [f"{name} {getattr(c, name)}" for name in fields.split()]
        for key in realised.split():
            values = [row[key] for row in rows if row[key] is not None]
            told += [f"mean {key} {sum(values) / len(values):.4g}"] if values else []
        items[item] = ", ".join(told)
    seen = [(row["accuracy"], row["step"]) for row in rows if row["accuracy"] is not None]
    best = "best {:.3f} at step {}, ".format(*max(seen)) if seen else "none made, "
    items["validation"] = best + ("last {:.3f} at step {}".format(*seen[-1]) if seen else "")
    tokens = [f"{n:,} tokens {kind}" for kind, n in result["tokens"].items()]
    gflop = f"{sum(result['flop'].values()) / 1e9:,.0f} GFLOP"
    took = f"{result['steps']} steps, {result['seconds']:.1f} s of training, {gflop}"
    return items | dict(compute=", ".join([took, *tokens]))


def report(run_dir: str | Path) -> dict[str, Any]:
    """Write report.md, report.json and report.png from a run's own files; returns report.json's.

    InputError when the folder is not a finished run, or its models are not there any more.
    """
    folder = Path(run_dir)
    try:
        config = opd.Config.load(folder / "config.json")
        hooks = json.loads((folder / "config.json").read_text()).get("hooks", {})
        result = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError) as error:
        why = f"must be a finished run ({error})"
        raise opd.InputError(f"run = {str(run_dir)!r}: {why}") from error
    rows = read_rows(folder / "metrics.jsonl", result["steps"])
    items = provenance(config) | checklist(config, result, rows)
    items["rule"] = ", ".join(f"{hook} by {name}" for hook, name in hooks.items()) or "none"
    card = dict(run=folder.name, checklist=items, missing=UNKNOWN, result=result)
    card["config"] = config.model_dump()
    opd.write_file(folder / "report.json", json.dumps(card, indent=1))
    row = "| {} | {accuracy:.3f} | {low:.3f} to {high:.3f} | {greedy:.3f} | {n} |"
    models = [m for m in ("student_before", "student_after", "teacher") if result[m]]
    opd.write_file(folder / "report.md", "\n".join([
        f"# {folder.name}\n",
        "Accuracy on held-out test prompts, sampled "
        "at T = 1 with Wilson's 95% interval, and greedy:\n",
        "| model | sampled | interval | greedy | prompts |\n|---|---|---|---|---|",
        *(row.format(m.replace("_", " "), **result[m]) for m in models),
        "\n![the run's diagnostics over its steps](report.png)\n",
        "## Reporting checklist\n\n| item | this run |\n|---|---|",
        *(f"| {item} | {text} |" for item, text in items.items()),
        f"\nMissing, because a run cannot know it: {UNKNOWN}.\n",
    ]))  # fmt: skip
    draw_report(rows, result, folder / "report.png")
    return card
