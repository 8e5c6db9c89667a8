"""Strips of tokens, animations, and what diagrams are made of; notebooks/figures uses them.

Dark is much, white is nothing; a sign or a number says which way, so that grey is enough.
"""

import io
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image

import opd

from .plots import BLUE, GREY, ORANGE

LARGEST = 400_000  # bytes of an animation


def strip(
    tokens: list[str], rows: dict[str, Any], title: str = "", *, gates: dict | None = None,
    scale: float | None = None, numbers: bool = False, per_line: int = 24,
) -> Figure:  # fmt: skip
    """A text with one row of cells for each quantity or method, as a figure.

    tokens    the text, one string a token
    rows      name -> one number a token: blue and + above 0, orange and - below, paler near 0
    gates     name -> one bool a token: hatched where true, e.g. where a rule is open
    scale     the |value| with the full colour; None: the largest of all rows
    numbers   write the values into the cells
    per_line  tokens side by side; longer texts go on below
    InputError: a row that has not one value a token.
    """
    gates = gates or {}
    for name, values in [*rows.items(), *gates.items()]:
        fine = len(values) == len(tokens)
        opd.require(fine, f"{name!r}: {len(values)} values; must be one for each of {len(tokens)}")
    values = {name: [float(v) for v in row] for name, row in rows.items()}
    full = scale or max([abs(v) for row in values.values() for v in row] + [1e-9])
    lines = [range(i, min(i + per_line, len(tokens))) for i in range(0, len(tokens), per_line)]
    wide, high = min(per_line, len(tokens)), len(lines) * (len(rows) + 1.6)
    names = max(map(len, rows), default=0)
    unit = max(0.42, 0.08 * max(len(shown(token)) for token in tokens))  # inches a token
    size = unit * wide + 0.085 * names + 0.3, 0.3 * high + 0.35 * bool(title)
    figure = Figure(figsize=size, layout="none")
    axis = figure.subplots()
    for n, line in enumerate(lines):
        top = n * (len(rows) + 1.6)
        for x, i in enumerate(line):
            axis.text(x + 0.5, top + 0.5, shown(tokens[i]), ha="center", va="center",
                      family="monospace", fontsize=8)  # fmt: skip
            for y, (name, row) in enumerate(values.items()):
                is_open = name in gates and bool(gates[name][i])
                cell(axis, x, top + 1 + y, row[i], full, is_open, numbers)
        for y, name in enumerate(values):
            axis.text(-0.2, top + 1.5 + y, name, ha="right", va="center", fontsize=8)
    axis.set(xlim=(0, wide), ylim=(high - 0.4, 0), aspect="auto")
    axis.set_axis_off()
    axis.set_title(title, fontsize=9, loc="left")
    left, top = 0.085 * names + 0.15, 0.35 * bool(title)  # inches
    left, top = left / figure.get_figwidth(), 1 - top / figure.get_figheight()
    figure.subplots_adjust(left=left, right=0.99, bottom=0.02, top=top)
    return figure


def shown(token: str) -> str:
    """A token as people read it: a space or a new line is visible."""
    return token.replace("Ġ", "·").replace("Ċ", "↵").replace(" ", "·").replace("\n", "↵")


def cell(
    axis: Any, x: float, y: float, value: float, full: float, hatched: bool, number: bool
) -> None:
    """One cell of a strip."""
    colour, strength = BLUE if value > 0 else ORANGE, min(1.0, abs(value) / full)
    axis.add_patch(Rectangle((x, y), 1, 1, fc=colour, alpha=strength, ec="none"))
    axis.add_patch(Rectangle((x, y), 1, 1, fc="none", ec="0.75", lw=0.5))
    if hatched:
        axis.add_patch(Rectangle((x, y), 1, 1, fc="none", ec="k", lw=0, hatch="////", alpha=0.6))
    mark = f"{value:.1f}".replace("-", "−") if number else ("+" if value > 0 else "−")
    dark = strength > 0.6 and value > 0
    paper = dict(fc="w", ec="none", pad=0.8) if hatched else None  # hatches do not strike it out
    if number or strength > 0.08:
        axis.text(x + 0.5, y + 0.52, mark, ha="center", va="center", fontsize=6.5 if number else 7,
                  color="w" if dark and not hatched else "k", bbox=paper)  # fmt: skip


def pixels(figure: Figure, dpi: int = 80) -> Image.Image:
    """A figure as an image."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return Image.open(buffer).convert("RGB")


def animate(
    draw: Callable[[int], Figure], steps: list[int], file: str | Path, seconds: float = 0.8
) -> Path:
    """An animation (GIF) of draw(step) over steps; the last picture stays three times as long.

    All figures have one size.  InputError: more than 400 kB; draw less, or fewer steps.
    """
    images = [pixels(draw(step)) for step in steps]
    together = Image.new("RGB", (images[0].width, images[0].height * len(images)))
    for n, image in enumerate(images):
        together.paste(image, (0, n * image.height))
    palette = together.quantize(48)  # one palette for all
    frames = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    times = [int(1000 * seconds)] * (len(frames) - 1) + [int(3000 * seconds)]
    file = Path(file)
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=times, loop=0)
    size = file.stat().st_size
    opd.require(size <= LARGEST, f"{file}: {size:,} bytes; must be at most {LARGEST:,}")
    return file


def box(axis: Any, x: float, y: float, text: str, width: float = 2.6, colour: str = BLUE) -> None:
    """A box of a diagram with its centre at (x, y)."""
    shape = FancyBboxPatch((x - width / 2, y - 0.42), width, 0.84, boxstyle="round,pad=0.04")
    shape.set(facecolor="w", edgecolor=colour, linewidth=1.6)
    axis.add_patch(shape)
    axis.text(x, y, text, ha="center", va="center", fontsize=9)


def arrow(
    axis: Any, start: tuple, end: tuple, text: str = "", bend: float = 0.0, at: tuple = (0, 0.22)
) -> None:
    """An arrow of a diagram; its text stands `at` beside the middle."""
    style = dict(arrowstyle="-|>", mutation_scale=13, color=GREY, lw=1.4)
    axis.add_patch(FancyArrowPatch(start, end, connectionstyle=f"arc3,rad={bend}", **style))
    middle = [(a + b) / 2 + d for a, b, d in zip(start, end, at, strict=True)]
    axis.text(*middle, textwrap.fill(text, 24), ha="center", va="center", fontsize=8)


def board(texts: list[tuple], title: str, wide: int, full: float = 6.0) -> Figure:
    """A few responses below each other, a cell for each token, as `learning` gives them."""
    size = 0.165 * (wide + 16), 0.27 * (len(texts) + 1.4)
    figure = Figure(figsize=size, layout="none")
    axis = figure.subplots()
    for y, (prompt, right, tokens, values) in enumerate(texts):
        asked = f"{prompt.removeprefix('<b> ')}  {'✓' if right else '✗'}"
        mono = dict(va="center", family="DejaVu Sans Mono", fontsize=8)
        axis.text(-0.5, y + 0.5, asked, ha="right", **mono)
        for x, (token, value) in enumerate(zip(tokens, values[: len(tokens)], strict=True)):
            colour, strength = BLUE if value > 0 else ORANGE, min(1.0, abs(value) / full)
            axis.add_patch(Rectangle((x, y + 0.05), 1, 0.9, fc=colour, alpha=strength, ec="none"))
            bold = "bold" if strength > 0.3 else "normal"
            axis.text(x + 0.5, y + 0.5, "■" if token == "<e>" else shown(token), ha="center",
                      va="center", family="DejaVu Sans Mono", fontsize=8, weight=bold)  # fmt: skip
    axis.set(xlim=(-15.5, wide + 0.5), ylim=(len(texts) + 0.1, -0.2))
    axis.set_axis_off()
    axis.set_title(title, fontsize=9, loc="left", family="DejaVu Sans Mono")
    figure.subplots_adjust(0.005, 0.01, 0.995, 1 - 0.3 / figure.get_figheight())
    return figure


def saved(draw: Callable[[], Figure]) -> Callable[[Path], Any]:
    """A function that saves this figure."""
    return lambda file: draw().savefig(file, dpi=110)
