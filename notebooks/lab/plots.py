"""Pictures and tables: token heat maps, curves of runs, comparisons, the report's figure.

Colours stay apart for colour-blind readers, marks and lines stay apart in grey.
"""

import html
import itertools
import json
import math
from operator import itemgetter
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib.pyplot as plt
import torch
from IPython.display import HTML
from matplotlib.figure import Figure
from torch import Tensor

import opd

BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#7F7F7F"
SKY, RED = "#56B4E9", "#D55E00"
MARKERS = "os^DvPX*<>hpd"  # with the lines' styles: readable in grey
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # by degrees of freedom


def style() -> None:
    """Small figures, the colours above, everything inside the frame; shown in notebooks."""
    plt.switch_backend(plt.get_backend())  # else the first figure made without pyplot is not shown
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


def read_rows(file: Path, last_step: int) -> list[dict]:
    """The rows of a metrics.jsonl up to a step; a last line that a crash cut short is dropped."""
    text = file.read_text() if file.exists() else ""
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [row for row in rows if row["step"] <= last_step]


def rows_of(run: opd.Run) -> list[dict]:
    """The metrics of a run."""
    return read_rows(Path(run.dir) / "metrics.jsonl", run.result["steps"])


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


PANELS = {  # title -> unit, and the lines: key of metrics.jsonl -> name
    "Does it learn?": ("accuracy", dict(correct="training prompts", accuracy="validation")),
    "How far from the teacher?": ("nats per token", dict(kl="KL(p || q)", loss="loss")),
    "Do they agree?": ("share", dict(agreement="same top 1", teacher_mass="q on p's top 4",
                                     overlap="overlap of the top k")),
    "How sure are they?": ("nats", dict(entropy="H(p), student", teacher_entropy="H(q), teacher",
                                        entropy_gap="mean |H(q) - H(p)|")),
    "How long is the text?": ("tokens", dict(length="mean length", horizon="horizon")),
}  # fmt: skip


def draw_report(rows: list[dict], result: dict[str, Any], path: Path) -> None:
    """The report's picture: the panels of PANELS over steps, the test's intervals at both ends."""
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    axes = list(figure.subplots(2, 3).flat)
    for axis, (title, (unit, lines)) in zip(axes, PANELS.items(), strict=False):
        for (key, name), style in zip(lines.items(), ("-", "o--", ":"), strict=False):
            seen = [(row["step"], row[key]) for row in rows if row[key] is not None]
            if seen:
                axis.plot(*zip(*seen, strict=True), style, mfc="none", ms=4, label=name)
        axis.set(title=title, xlabel="step", ylabel=unit)
    for who, style in dict(student_before="s-", student_after="o-", teacher="^--").items():
        if test := result[who]:
            x, name = len(rows) * (who != "student_before"), f"test, {who.replace('_', ' ')}"
            bar = itemgetter("low", "accuracy", "high")(test)
            axes[0].plot([x] * 3, bar, style, ms=4, label=name)
    for axis in axes:
        axis.legend(fontsize=7) if axis.lines else axis.set_axis_off()
    figure.savefig(path, dpi=100)
