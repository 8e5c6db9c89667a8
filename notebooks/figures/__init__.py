"""The pictures of the course: figNN.py makes those of notebook NN, each by one function.

python notebooks/lab figures [NAME ...]   # makes them again, all or some
"""

# ruff: noqa: E402
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
if str(FOLDER.parent) not in sys.path:
    sys.path.insert(0, str(FOLDER.parent))  # for `import lab`, which finds opd

from . import (
    fig00,
    fig01,
    fig02,
    fig03,
    fig04,
    fig05,
    fig06,
    fig07,
    fig08,
    fig09,
    fig10,
    fig11,
    fig12,
    fig13,
)

EACH = (
    fig00,
    fig01,
    fig02,
    fig03,
    fig04,
    fig05,
    fig06,
    fig07,
    fig08,
    fig09,
    fig10,
    fig11,
    fig12,
    fig13,
)
FIGURES = {name: make for module in EACH for name, make in module.FIGURES.items()}
