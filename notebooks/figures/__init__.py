"""The pictures of the course: figNN.py makes those of notebook NN, each by one function.

python notebooks/lab figures [NAME ...]   # makes them again, all or some
"""

import sys
from importlib import import_module
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
if str(FOLDER.parent) not in sys.path:
    sys.path.insert(0, str(FOLDER.parent))  # for `import lab`, which finds opd

EACH = [import_module(f".fig{number:02}", __name__) for number in range(14)]  # they need lab
FIGURES = {name: make for module in EACH for name, make in module.FIGURES.items()}
