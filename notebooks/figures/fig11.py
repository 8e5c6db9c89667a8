"""The picture of notebook 11: when an update can work."""

from lab.diagrams import saved
from lab.plots import BLUE, ORANGE
from matplotlib.figure import Figure

CASES = {  # p, q, the tokens that the loss looks at
    "all three: the update works": ((0.6, 0.3, 0.1), (0.1, 0.1, 0.8), (0, 1, 2)),
    "the teacher is lost here": ((0.6, 0.3, 0.1), (0.3, 0.34, 0.36), (0, 1, 2)),
    "the student has no mass there": ((0.65, 0.35, 0.0), (0.1, 0.1, 0.8), (0, 1, 2)),
    "the loss does not look there": ((0.6, 0.3, 0.1), (0.1, 0.1, 0.8), (0, 1)),
}


def actionable() -> Figure:
    """Student, teacher, and the tokens that the loss reaches (grey ground), in four cases."""
    figure = Figure(figsize=(9, 2.2), layout="constrained")
    for axis, (title, (p, q, seen)) in zip(
        figure.subplots(1, 4, sharey=True), CASES.items(), strict=True
    ):
        axis.bar([v - 0.2 for v in range(3)], p, 0.36, color=BLUE)
        axis.bar([v + 0.2 for v in range(3)], q, 0.36, fc="w", ec=ORANGE, ls="--", lw=1.6)
        for v in seen:
            axis.axvspan(v - 0.5, v + 0.5, color="0.88", lw=0, zorder=0)
        axis.set(xticks=range(3), xticklabels="ABC", yticks=[], ylim=(0, 1), title=title)
        axis.title.set_fontsize(9)
        axis.spines[["top", "right", "left"]].set_visible(False)
    said = "filled: student p    dashed: teacher q    grey: the loss looks here    wanted: C"
    figure.supxlabel(said, fontsize=9)
    return figure


FIGURES = {"actionable.png": saved(actionable)}
