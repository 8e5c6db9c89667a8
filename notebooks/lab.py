"""The laboratory: what the notebooks draw and measure.  The method itself is in opd.py.

Pictures use colours that stay apart for colour-blind readers, and marks or lines that stay apart
in grey.
"""

import argparse
import contextlib
import html
import io
import itertools
import json
import math
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib.pyplot as plt
import torch
from IPython.display import HTML
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import opd  # noqa: E402

BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#7F7F7F"
SKY, RED = "#56B4E9", "#D55E00"
MARKERS = "os^DvPX*<>hpd"  # with the lines' styles: readable in grey


def style() -> None:
    """Small figures, the colours above, everything inside the frame."""
    plt.rcParams.update({
        "figure.figsize": (6.4, 2.9), "figure.dpi": 90, "figure.constrained_layout.use": True,
        "axes.prop_cycle": plt.cycler(
            color=[BLUE, ORANGE, GREEN, PINK, GREY, SKY, RED, "k", BLUE, ORANGE],
            linestyle=["-", "--", "-.", ":", "-", "--", "-.", ":", "-.", ":"]),
        "axes.spines.top": False, "axes.spines.right": False, "font.size": 9,
        "legend.frameon": False,
    })  # fmt: skip


def words(tokenizer: Any, rollout: opd.Rollout, row: int = 0) -> list[str]:
    """The response tokens of one row as text, through EOS."""
    return tokenizer.convert_ids_to_tokens(rollout.tokens[row][rollout.mask[row]].tolist())


def show_tokens(
    tokens: list[str], values: Tensor | list[float], title: str = "", scale: float | None = None,
    per_line: int = 17,
) -> HTML:  # fmt: skip
    """Tokens on coloured cells with their numbers: blue above 0, orange below, paler near 0.

    values: one number a token, e.g. log q(a) - log p(a) in nats.  scale: the |value| with the full
    colour; None: the largest.
    """
    numbers = [round(float(v), 1) + 0.0 for v in values]
    full = scale or max([abs(v) for v in numbers] + [1e-9])
    cells = []
    for token, value in zip(tokens, numbers, strict=True):
        rgb, strength = "0,114,178" if value > 0 else "230,159,0", min(1.0, abs(value) / full)
        number = f"{value:+.1f}" if value else "0.0"
        cells.append(
            f'<td style="text-align:center;background:rgba({rgb},{strength:.2f});padding:2px 6px;'
            f'font-family:monospace">{html.escape(token)}<br><small>{number}</small></td>'
        )
    lines = ("".join(cells[i : i + per_line]) for i in range(0, len(cells), per_line))
    tables = (f'<table style="margin:0"><tr>{line}</tr></table>' for line in lines)
    return HTML(f"<p><b>{html.escape(title)}</b></p>" * bool(title) + "".join(tables))


def plot_metrics(runs: dict[str, list[dict]], keys: dict[str, str], title: str) -> plt.Figure:
    """One panel a key over steps, one line a run.  runs: label -> rows; keys: key -> axis label."""
    figure, axes = plt.subplots(1, len(keys), figsize=(3.4 * len(keys), 3), squeeze=False)
    for axis, (key, label) in zip(axes[0], keys.items(), strict=True):
        for (name, rows), marker in zip(runs.items(), itertools.cycle(MARKERS)):
            seen = [(r["step"], r[key]) for r in rows if r.get(key) is not None]
            often = dict(marker=marker, markevery=max(1, len(seen) // 8), markersize=4)
            axis.plot([x for x, _ in seen], [y for _, y in seen], label=name, **often)
        axis.set(xlabel="step", ylabel=label, yscale="log" if key == "kl" else "linear")
    if len(runs) > 1:
        lines = axes[0][0].get_legend_handles_labels()
        figure.legend(*lines, loc="outside lower center", ncols=min(5, len(runs)), fontsize=8)
    figure.suptitle(title)
    return figure


def rows_of(run: opd.Run) -> list[dict]:
    """The metrics of a run."""
    return opd.read_rows(Path(run.dir) / "metrics.jsonl", run.result["steps"])


mean_by_position = opd.kl_by_position


def gradient_noise(config: opd.Config, batches: int = 16) -> tuple[float, float]:
    """Norm of the mean gradient, and root mean square distance of one batch's gradient to it."""
    world = opd.load_world(config)
    config = config.model_copy(update=dict(max_tokens=world.task.max_tokens))
    mean_of, each = opd.gradient_moments(config, world, batches)
    return math.sqrt(mean_of), math.sqrt((each - mean_of) * batches / (batches - 1))


def memory_estimate(
    config: opd.Config, student: Any, teacher: Any | None, prompt_tokens: int, half: str = "bf16"
) -> dict[str, float]:  # fmt: skip
    """Bytes that a run of Llama- or Qwen-like models holds, by part; peak: the worst stage's.

    student, teacher  configs of transformers; teacher None: on a server, or none
    prompt_tokens     of the longest prompt; config.max_tokens, of the response, must be set
    half              bf16: a bf16 teacher, the student's passes in bf16, its weights fp32; fp16: a
                      teacher in fp16, all else fp32; none: all in fp32, on a CPU
    earlier: gradients that are there when a micro-batch is scored.  Not in it: what CUDA itself
    takes, holes in the allocator, an engine, a reference.
    [derived; checked on a CPU by tests/benchmarks/memory.py --estimate]
    """
    with torch.device("meta"):
        models = [c and opd.AutoModelForCausalLM.from_config(c) for c in (student, teacher)]
    n, m = (model.num_parameters() if model else 0 for model in models)
    rows, tokens = config.micro_batch or config.batch_size, prompt_tokens + config.max_tokens
    shown = opd.DEPTH_PROMPTS * (config.eval_every > 0)
    writers = max(config.batch_size, min(opd.EVALUATION_ROWS, 8 * rows), shown)
    a, wide = {"bf16": (2, 2), "fp16": (4, 2), "none": (4, 4)}[half]  # bytes: passes, teacher
    V, D, L = student.vocab_size, student.hidden_size, student.num_hidden_layers
    (A, K), theirs = heads(student), teacher and teacher.num_hidden_layers * heads(teacher)[1]
    norms = 4 * D + 2 * (A + K) * ("qwen3" in student.model_type)  # stay fp32
    layer = rows * tokens * (4 * norms + a * (2 * D + 4 * A + 4 * student.intermediate_size))
    chunk = min(rows * config.max_tokens * V, max(opd.CHUNK_TOKENS * V, opd.CHUNK_LOGITS))
    again = config.gradient_checkpointing
    parts = dict(
        student=4 * n, teacher=wide * m, moments=8 * n, gradients=4 * n, casts=2 * n * (a == 2),
        layers=4 * rows * tokens * L * D if again else L * layer, recomputed=2 * layer * again,
        chunk=36 * chunk + (8 - a) * V * D, earlier=4 * (n if rows < config.batch_size else V * D),
        cache=writers * tokens * max((4 + a) * L * K, 2 * wide * (theirs or 0)),
        sampling=28 * writers * V, update=4 * n if wide == 2 else 8 * V * D,
        diagnostics=4 * n * (config.eval_every > 0),
    )  # fmt: skip
    stages = ("cache sampling casts", "earlier casts layers chunk", "gradients layers recomputed",
              "gradients update", "gradients diagnostics")  # fmt: skip
    worst = max(sum(parts[name] for name in stage.split()) for stage in stages)
    return parts | dict(peak=parts["student"] + parts["teacher"] + parts["moments"] + worst)


def heads(c: Any) -> tuple[int, int]:
    """Numbers a token of a layer's queries, and of its keys."""
    size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return size * c.num_attention_heads, size * c.num_key_value_heads


# ------------------------------------------------------------------------------------------------
# The exact laboratory: a tree of all texts, so that nothing is sampled
# ------------------------------------------------------------------------------------------------


class Tree:
    """A tabular student and teacher on every text of `length` tokens from `size` symbols.

    Each prefix is a state s with its own logits, student[s] and teacher[s], (S, V) in float64.
    tokens (N, T) holds all N = V^T texts, states (N, T) the state at which each token is drawn.
    Expectations and variances are sums over the N texts: exact.  [derived]
    """

    def __init__(self, size: int = 4, length: int = 4, seed: int = 0, gap: float = 1.0) -> None:
        """Logits are standard normal; the teacher's are the student's plus `gap` times others."""
        self.size, self.length = size, length
        g, starts = torch.Generator().manual_seed(seed), [size**t for t in range(length)]
        self.student = torch.randn(sum(starts), size, generator=g, dtype=torch.float64)
        noise = torch.randn(self.student.shape, generator=g, dtype=torch.float64)
        self.teacher = self.student + gap * noise
        self.tokens = torch.cartesian_prod(*[torch.arange(size)] * length)
        prefix, first, columns = torch.zeros(len(self.tokens), dtype=torch.long), 0, []
        for t in range(length):  # states are numbered depth by depth, as numbers in base V
            columns.append(first + prefix)
            first, prefix = first + starts[t], prefix * size + self.tokens[:, t]
        self.states = torch.stack(columns, 1)
        self.mask = torch.ones_like(self.tokens, dtype=torch.bool)

    def laws(self) -> tuple[Tensor, Tensor]:
        """logp, logq (N, T, V) along every text."""
        return self.student.log_softmax(-1)[self.states], self.teacher.log_softmax(-1)[self.states]

    def weights(self) -> Tensor:
        """(N,) the student's probability of every text."""
        return opd.of_tokens(self.laws()[0], self.tokens).sum(1).exp()

    def reward(self) -> Tensor:
        """(N, T) log q(a) - log p(a)."""
        logp, logq = (opd.of_tokens(law, self.tokens) for law in self.laws())
        return opd.log_ratio_reward(logp, logq)

    def sequence_kl(self, student: Tensor | None = None) -> Tensor:
        """Exact KL between the two laws of whole texts; differentiable in the student's logits."""
        logits = self.student if student is None else student
        logp = opd.of_tokens(logits.log_softmax(-1)[self.states], self.tokens).sum(1)
        logq = opd.of_tokens(self.laws()[1], self.tokens).sum(1)
        return (logp.exp() * (logp - logq)).sum()

    def gradient(self) -> Tensor:
        """(S, V): the exact gradient of the sequence KL, by autograd."""
        z = self.student.clone().requires_grad_()
        return torch.autograd.grad(self.sequence_kl(z), z)[0]

    def value(self, gamma: float) -> Tensor:
        """(N, T): what a perfect critic says, -E[sum_k gamma^k K_{t+k} | s_t]."""
        logp, logq = self.student.log_softmax(-1), self.teacher.log_softmax(-1)
        value = -opd.reverse_kl(logp, logq)
        inner = (len(value) - 1) // self.size  # the states that have children: s V + 1 .. s V + V
        for s in reversed(range(inner)):
            children = value[s * self.size + 1 : (s + 1) * self.size + 1]
            value[s] += gamma * (logp[s].exp() * children).sum()
        return value[self.states]

    def study(self, loss: Any) -> dict[str, Any]:
        """An estimator's exact mean (S, V), variance, and bias to the sequence KL's gradient.

        loss: (logp, logq, tokens), of shapes (N, T, V), (N, T, V), (N, T) -> (N, T), a one-sample
        loss whose gradient estimates; frozen_bias: the distance to the frozen-state gradient.
        """
        logp, logq = self.laws()
        z = logp.clone().requires_grad_()  # logits, already normalised
        loss(z.log_softmax(-1), logq, self.tokens).sum().backward()
        each = torch.zeros(len(z), *self.student.shape, dtype=z.dtype)  # (N, S, V)
        each.scatter_add_(1, self.states[..., None].expand_as(z), z.grad)
        p = self.weights()[:, None, None]
        mean_of = (p * each).sum(0)
        frozen = torch.zeros_like(self.student)
        local = torch.autograd.grad(opd.reverse_kl(z.log_softmax(-1), logq).sum(), z)[0]
        frozen.index_put_((self.states,), p * local, accumulate=True)
        return dict(
            mean=mean_of, variance=(p * (each - mean_of) ** 2).sum().item(),
            bias=(mean_of - self.gradient()).norm().item(),
            frozen_bias=(mean_of - frozen).norm().item(),
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Comparisons: learning rates on tuning seeds and validation prompts, results on fresh seeds
# ------------------------------------------------------------------------------------------------

TUNING_SEEDS = (100, 101)
T_95 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
)  # t quantiles, 1 to 9 degrees of freedom


MEASURED = ("kl", "entropy", "unsupported", "gated", "weight")  # of the last steps
DIAGNOSIS = ("agreement", "teacher_mass", "overlap", "overlap_mass", "overlap_mass_teacher")
DIAGNOSIS += ("overlap_advantage", "entropy_gap")


def load_spec(path: str | Path) -> dict[str, Any]:
    """A comparison: {"about", "base": fields, "variants": name -> fields, "lr": grid}, all needed.

    A variant may carry its own "lr" grid.  "choose": "kl" takes the learning rate with the lowest
    KL to the teacher instead of the best accuracy; "measure": noise, foresight, diagnosis, check or
    entropy, see run_one.
    InputError names what is missing or wrong.
    """
    try:
        given = json.loads(Path(path).read_text())
        spec = {key: given[key] for key in ("about", "base", "variants", "lr")}
        spec |= dict(choose=given.get("choose", "accuracy"), measure=given.get("measure"))
    except (OSError, ValueError) as error:
        raise opd.InputError(f"spec = {str(path)!r}: not a readable JSON file ({error})") from None
    except (KeyError, TypeError) as error:
        raise opd.InputError(
            f"spec = {str(path)!r}: needs about, base, variants, lr; no {error}"
        ) from None
    for name in spec["variants"]:
        for lr in grid_of(spec, name):
            opd.Config.load(**fields_of(spec, name, lr, 0))
    return spec


def grid_of(spec: dict[str, Any], name: str) -> list[float]:
    """The learning rates tried for a variant."""
    return spec["variants"][name].get("lr", spec["lr"])


def fields_of(spec: dict[str, Any], name: str, lr: float, seed: int) -> dict[str, Any]:
    """The Config fields of one run."""
    return {**spec["base"], **spec["variants"][name], "lr": lr, "seed": seed}


def gigaflop(row: dict[str, Any]) -> float:
    """All floating point operations up to this row of metrics.jsonl, in 1e9."""
    return (row["flop_sample"] + row["flop_score"] + row["flop_update"]) / 1e9


def foresight(fields: dict[str, Any], run: opd.Run) -> dict[str, float]:
    """What the run's first tenth already shows of its end.

    rank and norm of the final update (means over attention and MLP matrices), the tenth's norm,
    alignment of the two (first 5 directions), and the share of the gain in accuracy that the tenth
    has: `unscaled` as it is, `recovered` when scaled to the final norm matrix by matrix.
    """
    tenth = dict(fields, steps=max(1, fields["steps"] // 10), eval_every=0, eval_prompts=1)
    with tempfile.TemporaryDirectory() as folder:
        early = opd.train(opd.Config.load(**tenth, runs=folder)).model
    world = opd.load_world(opd.Config.load(**fields))
    base, alignments = opd.weights_of(world.student), []
    shapes = [opd.update_geometry(base, model) for model in (run.model, early)]
    ends = dict(run.model.named_parameters()), dict(early.named_parameters())
    with torch.no_grad():
        for name, p in world.student.named_parameters():
            final, first = (end[name] - base[name] for end in ends)
            if opd.attention_and_mlp(name):
                alignments.append(opd.subspace_alignment(first, final, 5))
                first = opd.norm_scaled(first, final, 1.0)
            p += first
    prompts = world.task.prompts(512, "test")
    shares = [
        opd.evaluate(model, world.task, prompts, **world.law)["accuracy"]
        for model in (early, world.student)
    ]
    before, after = (run.result[f"student_{when}"]["accuracy"] for when in ("before", "after"))
    return dict(
        rank=shapes[0]["effective_rank"], norm=shapes[0]["norm"], early_norm=shapes[1]["norm"],
        alignment=mean(alignments), unscaled=(shares[0] - before) / (after - before),
        recovered=(shares[1] - before) / (after - before),
    )  # fmt: skip


CHECKED = ("student", "teacher", "gain", "agreement", "teacher_mass", "overlap", "kl", "horizon")


def build(name: str) -> None:
    """Make the model runs/build-NAME/model by tiny_configs/build/NAME.json, if it is not there."""
    folder = Path(name).parent
    if not folder.name.startswith("build-") or folder.exists():
        return
    config = opd.Config.load(opd.HERE / f"tiny_configs/build/{folder.name[6:]}.json")
    build(config.student)
    if not folder.exists():
        opd.train(config)


def run_one(fields: dict[str, Any], extra: str | None = None) -> dict[str, Any]:
    """One run: its fields, test accuracy, costs, and a curve.

    A row of the curve: step, tokens sampled, seconds of the steps without validation, validation
    accuracy, GFLOP.  metrics: means over the last five steps, GFLOP in all, and what `extra` adds:
    noise, of one batch's gradient at the start over the norm of the mean (8 batches); foresight;
    diagnosis, means of the first and the last five steps; check, what `opd.check` said before;
    or the student's entropy at the end, on its text after ordinary validation prompts.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run = opd.train(opd.Config.load(**fields, runs=folder))
        rows = rows_of(run)
    spent = itertools.accumulate(r["sample_s"] + r["score_s"] + r["update_s"] for r in rows)
    curve = [
        [r["step"], r["tokens_sampled"], round(s, 2), r["accuracy"], round(gigaflop(r), 2)]
        for r, s in zip(rows, spent, strict=True) if r["accuracy"] is not None
    ]  # fmt: skip
    before, after = run.result["student_before"], run.result["student_after"]
    at_end = dict(accuracy=after["accuracy"], greedy=after["greedy"], before=before["accuracy"])
    seen = [key for key in MEASURED if rows[-1][key] is not None]
    metrics = {key: round(mean(r[key] for r in rows[-5:]), 5) for key in seen}
    metrics["GFLOP"] = round(gigaflop(rows[-1]), 2)
    if extra == "foresight":
        metrics |= {k: round(v, 4) for k, v in foresight(fields, run).items()}
    if extra == "noise":
        signal, spread = gradient_noise(opd.Config.load(**fields), batches=8)
        metrics["noise"] = round(spread / signal, 3)
    if extra == "diagnosis":
        parts = dict(first=rows[:5], last=rows[-5:])
        metrics = {f"{key}, {when}": round(mean(r[key] for r in part), 4)
                   for key in DIAGNOSIS for when, part in parts.items()}  # fmt: skip
    if extra == "check":
        verdict = opd.check(opd.Config.load(**fields))
        metrics = {k: round(verdict.numbers[k], 4) for k in CHECKED}
        at_end |= dict(decision=verdict.decision, teacher=run.result["teacher"]["accuracy"])
    if extra == "entropy":
        ordinary = opd.Config.load(**{**fields, "aligned": None, "aligned_share": 1.0})
        world = opd.load_world(ordinary)
        prompts = world.task.prompts(256, "validation")
        noise = torch.rand(256, world.task.max_tokens, generator=opd.keyed_generator("entropy"))
        text = opd.sample(run.model, prompts, horizon=noise.shape[1], noise=noise, **world.law)
        with torch.no_grad():
            values = opd.entropy(opd.score(run.model, text))
        metrics["entropy, ordinary prompts"] = round(opd.masked_mean(values, text.mask).item(), 5)
    return dict(fields=fields, **at_end, tokens=run.result["tokens"], curve=curve, metrics=metrics)


def results_file(path: str | Path) -> Path:
    """Where a spec's per-seed results are: SPEC.results.json beside it."""
    return Path(path).with_suffix(".results.json")


def compare(path: str | Path, seeds: int = 5, workers: int = 2) -> dict[str, dict[str, Any]]:
    """Run what is missing of a spec, keep every result beside it, and return variant -> summary.

    Each variant gets the learning rate with the best final validation accuracy on two tuning seeds
    (ties: the best mean over the curve; or see load_spec), then `seeds` fresh seeds, evaluated on
    test prompts.
    """
    spec, file = load_spec(path), results_file(path)
    names, done = list(spec["variants"]), json.loads(file.read_text()) if file.exists() else []

    def found(fields: dict) -> dict | None:
        return next((d for d in done if d["fields"] == fields), None)

    def keep(result: dict) -> None:
        done.append(result)
        ordered = sorted(json.dumps(each, sort_keys=True) for each in done)
        opd.write_atomically(file, "[\n" + ",\n".join(ordered) + "\n]\n")

    def run(name_lr_seed: list[tuple]) -> None:
        missing = [f for f in (fields_of(spec, *each) for each in name_lr_seed) if not found(f)]
        if not missing:
            return
        for fields in missing:
            build(fields.get("student") or "")
            build(fields.get("teacher") or "")
        job = partial(run_one, extra=spec["measure"])
        with tqdm(total=len(missing), desc=file.stem, disable=None) as bar:
            for result in in_processes(job, missing, workers):
                keep(result)
                bar.update()

    def quality(name: str, lr: float) -> tuple[float, float]:
        tuning = [found(fields_of(spec, name, lr, seed)) for seed in TUNING_SEEDS]
        if spec["choose"] == "kl":
            return -mean(t["metrics"]["kl"] for t in tuning), 0.0
        curves = [t["curve"] for t in tuning]
        return mean(c[-1][3] for c in curves), mean(row[3] for c in curves for row in c)

    grids = {n: grid_of(spec, n) for n in names}
    choice = [(n, lr) for n, grid in grids.items() if len(grid) > 1 for lr in grid]
    run([(n, lr, seed) for n, lr in choice for seed in TUNING_SEEDS])
    best = {n: max(g, key=partial(quality, n)) if len(g) > 1 else g[0] for n, g in grids.items()}
    run([(n, best[n], seed) for n in names for seed in range(seeds)])
    runs = {n: [found(fields_of(spec, n, best[n], seed)) for seed in range(seeds)] for n in names}
    return {n: summary_of(runs[n], runs[names[0]], grid_of(spec, n)) for n in names}


def in_processes(function: Any, inputs: list, workers: int) -> Any:
    """Yield function(input) for all inputs as they are done; 1 worker: here, in order."""
    if workers == 1:
        yield from map(function, inputs)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            for job in as_completed([pool.submit(function, each) for each in inputs]):
                yield job.result()
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C: what has not begun does not begin


def summary_of(runs: list[dict], first: list[dict], grid: list[float]) -> dict[str, Any]:
    """A variant's accuracy, its difference to the first variant seed by seed, and its costs."""
    lr, gaps = runs[0]["fields"]["lr"], zip(runs, first, strict=True)
    return dict(
        lr=lr, edge=len(grid) > 1 and lr in (min(grid), max(grid)), before=runs[0]["before"],
        accuracy=interval([r["accuracy"] for r in runs]),
        difference=interval([r["accuracy"] - f["accuracy"] for r, f in gaps]),
        tokens=mean(r["tokens"]["sampled"] for r in runs), runs=runs,
        metrics={k: interval([r["metrics"][k] for r in runs]) for k in runs[0].get("metrics", {})},
    )  # fmt: skip


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of its 95% t-interval over seeds (nan for one seed)."""
    n = len(values)
    if n < 2:
        return mean(values), math.nan
    t = T_95[n - 2] if n - 2 < len(T_95) else 1.96
    return mean(values), t * stdev(values) / math.sqrt(n)


def markdown_table(summary: dict[str, dict[str, Any]], measures: list[str] | None = None) -> str:
    """The comparison as a table; * marks a learning rate at the edge of its grid.

    measures: those to show; None: all that tell variants apart.
    """

    def shown(value: tuple[float, float] | None) -> str:
        return "" if value is None else "{:.3f}\u00a0±\u00a0{:.3f}".format(*value)

    first = next(iter(summary))
    keys = dict.fromkeys(key for s in summary.values() for key in s["metrics"])
    keys = [k for k in keys if len({s["metrics"].get(k) for s in summary.values()}) > 1]
    keys = keys if measures is None else measures
    head = ["variant", "lr", "accuracy", f"minus {first}", "tokens sampled", *keys]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, s in summary.items():
        (gap, half), rate = s["difference"], f"{s['lr']:g}{'*' * s['edge']}"
        paired = "" if name == first else f"{gap:+.3f}\u00a0±\u00a0{half:.3f}"
        cells = [name, rate, shown(s["accuracy"]), paired, f"{s['tokens']:,.0f}"]
        cells += [shown(s["metrics"].get(key)) for key in keys]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot_comparison(summary: dict[str, dict[str, Any]], title: str) -> plt.Figure:
    """Validation accuracy against steps and costs: mean and range over seeds.

    A run that stopped early keeps its last point.
    """
    labels = {"step": (0, 1), "response tokens sampled, thousands": (1, 1000)}
    labels |= {"seconds of training": (2, 1), "GFLOP": (4, 1)}
    width = min(len(r["curve"][0]) for s in summary.values() for r in s["runs"])
    labels = {label: at for label, at in labels.items() if at[0] < width}
    figure, axes = plt.subplots(1, len(labels), figsize=(3 * len(labels) + 1.5, 3), sharey=True)
    for axis, (label, (column, unit)) in zip(axes, labels.items(), strict=True):
        for (name, s), marker in zip(summary.items(), itertools.cycle(MARKERS)):
            longest = max(len(r["curve"]) for r in s["runs"])
            curves = [
                r["curve"] + [r["curve"][-1]] * (longest - len(r["curve"])) for r in s["runs"]
            ]
            curves = torch.tensor(curves)  # (seeds, points, columns)
            x, y = curves[..., column].mean(0) / unit, curves[..., 3]
            (line,) = axis.plot(x, y.mean(0), label=name, marker=marker, markersize=4)
            axis.fill_between(x, y.amin(0), y.amax(0), color=line.get_color(), alpha=0.15, lw=0)
        low, high = axis.dataLim.intervalx
        axis.set(xlabel=label, xscale="log" if column and high > 30 * low else "linear")
    axes[0].set(ylabel="validation accuracy")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    figure.suptitle(title)
    return figure


def cost_to(summary: dict[str, dict[str, Any]], accuracy: float) -> str:
    """A table: steps, costs at which validation first reaches an accuracy; mean over seeds.

    Where a seed never does, its variant has no mean; EffOPD's validations count as cost.
    """
    lines = [f"| to {accuracy:g} | steps | tokens sampled | seconds | GFLOP |", "|---" * 5 + "|"]
    for name, s in summary.items():
        first = [next((c for c in r["curve"] if c[3] >= accuracy), None) for r in s["runs"]]
        if None in first:
            reached = sum(f is not None for f in first)
            lines.append(f"| {name} | not all: {reached} of {len(first)} seeds | | | |")
            continue
        step, (tokens, _), (s, _), flop = (interval([f[i] for f in first]) for i in (0, 1, 2, 4))
        cells = f"{step[0]:.1f} ± {step[1]:.1f} | {tokens:,.0f} | {s:.1f} | "
        cells += f"{flop[0]:.1f} ± {flop[1]:.1f}"
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def main() -> int:
    """`python notebooks/lab.py SPEC.json --seeds 5`: run what is missing, print, write SPEC.png."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("spec")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    try:
        summary = compare(given.spec, given.seeds, given.workers)
    except opd.InputError as error:
        print(f"lab.py: {error}", file=sys.stderr)
        return 2
    style()
    about = load_spec(given.spec)["about"]
    print(f"{about}\n\n{markdown_table(summary)}")
    plot_comparison(summary, about).savefig(Path(given.spec).with_suffix(".png"), dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
