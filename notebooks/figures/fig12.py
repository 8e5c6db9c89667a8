"""The picture of notebook 12, and a count of the memory that its toy holds."""

import weakref
from typing import Any

from lab.diagrams import GREY, ORANGE, arrow, box, saved
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PITFALLS = [  # where its number is, where its words are, what goes wrong there
    (7, 3.5, 8.3, 3.65, "logits that do not fit"),
    (4.85, 3.25, 4.85, 3.5, "weights\none layer left behind, or all late"),
    (4.85, 2.75, 4.85, 2.3, "tokens and their log-probs\nnot quite the trainer's"),
    (11.9, 2.75, 11.9, 2.3, "log-probs\nof a few tokens, at temperature 1"),
    (14.05, 3.5, 15.2, 3.65, "stops at another id"),
    (9.75, 2.3, 8.3, 2.2, "each process divides\nby its own count"),
]


def machine() -> Figure:
    """Sampler, trainer and teacher; what travels between them; a number where it goes wrong."""
    figure = Figure(figsize=(8.2, 2.0))
    axis = figure.subplots()
    box(axis, 8.5, 2.84, "", 2.7, GREY)  # a second process behind the first
    box(axis, 1.4, 3, "sampler\nthe student writes", 2.7)
    box(axis, 8.3, 3, "trainer\nthe student learns", 2.7)
    box(axis, 15.2, 3, "teacher\nscores", 2.3, ORANGE)
    for x, end, y in [(6.8, 2.9, 3.25), (2.9, 6.8, 2.75), (9.9, 13.9, 3.25), (13.9, 9.9, 2.75)]:
        arrow(axis, (x, y), (end, y))
    axis.text(11.9, 3.4, "the same tokens", ha="center", va="bottom", fontsize=8)
    ring = dict(boxstyle="circle,pad=0.2", fc="k")
    for n, (x, y, there, height, text) in enumerate(PITFALLS, 1):
        axis.text(x, y, n, c="w", size=8, weight="bold", bbox=ring, ha="center", va="center")
        how = dict(ha="center", va="bottom" if height > 3 else "top", fontsize=8)
        axis.text(there, height, text, **how)
    axis.set(xlim=(-0.1, 16.6), ylim=(1.6, 4.25))
    axis.set_axis_off()
    figure.subplots_adjust(0, 0, 1, 1)
    return figure


class Held(TorchDispatchMode):
    """Counts tensors: `with Held() as held: ...`; held.line: MiB in new ones, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.mib, self.line, self.known = 0.0, [], set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.known |= {store._cdata for store in stores((args, kwargs))}  # a view is not new
        out = operation(*args, **(kwargs or {}))
        for store in stores(out):
            if store._cdata not in self.known:
                self.change(store._cdata, store.nbytes())
                weakref.finalize(store, self.change, store._cdata, -store.nbytes())
        self.line.append(self.mib)
        return out

    def change(self, key: int, size: int) -> None:
        """A tensor's memory is taken, or given back."""
        self.mib += size / 2**20
        (self.known.add if size > 0 else self.known.discard)(key)


def stores(tree: Any) -> list:
    """The memory behind the tensors of an operation's arguments or results."""
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor)]


FIGURES = {"machine.png": saved(machine)}
