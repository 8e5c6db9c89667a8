"""The laboratory: what the notebooks draw and measure.  The method itself is in opd.py.

Pictures use colours that stay apart for colour-blind readers, and marks or lines that stay apart
in grey.
"""

import html
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from IPython.display import HTML
from torch import Tensor

import opd

BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#7F7F7F"


def style() -> None:
    """Small figures, the colours above, everything inside the frame."""
    plt.rcParams.update({
        "figure.figsize": (6.4, 2.9), "figure.dpi": 90, "figure.constrained_layout.use": True,
        "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, PINK, GREY],
                                      linestyle=["-", "--", "-.", ":", "-"]),
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
    numbers = [float(v) for v in values]
    full = scale or max([abs(v) for v in numbers] + [1e-9])
    cells = []
    for token, value in zip(tokens, numbers, strict=True):
        rgb, strength = "0,114,178" if value > 0 else "230,159,0", min(1.0, abs(value) / full)
        cells.append(
            f'<td style="text-align:center;background:rgba({rgb},{strength:.2f});padding:2px 6px;'
            f'font-family:monospace">{html.escape(token)}<br><small>{value:+.1f}</small></td>'
        )
    lines = ("".join(cells[i : i + per_line]) for i in range(0, len(cells), per_line))
    tables = (f'<table style="margin:0"><tr>{line}</tr></table>' for line in lines)
    return HTML(f"<p><b>{html.escape(title)}</b></p>" * bool(title) + "".join(tables))


def plot_metrics(runs: dict[str, list[dict]], keys: dict[str, str], title: str) -> plt.Figure:
    """One panel a key over steps, one line a run.  runs: label -> rows; keys: key -> axis label."""
    figure, axes = plt.subplots(1, len(keys), figsize=(3.4 * len(keys), 2.8), squeeze=False)
    for axis, (key, label) in zip(axes[0], keys.items(), strict=True):
        for name, rows in runs.items():
            seen = [(r["step"], r[key]) for r in rows if r.get(key) is not None]
            if seen:
                axis.plot(*zip(*seen, strict=True), label=name, marker="o" if len(seen) < 9 else "")
        axis.set(xlabel="step", ylabel=label)
    axes[0][0].legend(fontsize=8)
    figure.suptitle(title)
    return figure


def rows_of(run: opd.Run) -> list[dict]:
    """The metrics of a run."""
    return opd.read_rows(Path(run.dir) / "metrics.jsonl", run.result["steps"])


def mean_by_position(values: Tensor, mask: Tensor) -> Tensor:
    """(B, T) -> (T,): the mean over the rows still writing; nan where there is none."""
    alive = mask.sum(0)
    total = torch.where(mask, values, 0.0).sum(0)
    return torch.where(alive > 0, total / alive.clamp(min=1), torch.nan)
