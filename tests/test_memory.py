"""The estimate of a run's memory, and the configs for a GPU: they load, and fit their card."""

import sys

import pytest
from conftest import ROOT

import opd

SCRIPT = ROOT / "tests/benchmarks/memory.py"
sys.path.insert(0, str(SCRIPT.parent))
import memory  # noqa: E402

SHIPPED = sorted((ROOT / "tiny_configs").glob("*.json"))
PARAMETERS = {  # counted by hand from the published shapes: a tied embedding, norms, 7 matrices
    "Qwen/Qwen3-0.6B-Base": 151_936 * 1024 + 1024
    + 28 * (2 * 1024 + 2 * 128 + 2 * 1024 * 2048 + 2 * 1024 * 1024 + 3 * 1024 * 3072),
    "Qwen/Qwen3-1.7B": 151_936 * 2048 + 2048
    + 28 * (2 * 2048 + 2 * 128 + 2 * 2048 * 2048 + 2 * 2048 * 1024 + 3 * 2048 * 6144),
    "Qwen/Qwen2.5-0.5B": 151_936 * 896 + 896
    + 24 * (2 * 896 + 2 * 896 * 896 + 896 + 2 * (896 + 1) * 128 + 3 * 896 * 4864),
}  # fmt: skip


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_estimate_is_within_15_percent_of_a_measured_peak():
    # an interpreter of its own: a fork would reuse what this process has freed, and count less
    found = memory.in_process("small", MALLOC_MMAP_THRESHOLD_="131072", OMP_NUM_THREADS="1")
    assert found["mib"] > 150  # large enough to say something
    assert found["estimate"] == pytest.approx(found["mib"], rel=0.15)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_load_and_fit_their_card(path):
    config, (card, *_) = opd.Config.load(path), memory.CARDS[path.stem]
    assert config.student in memory.PUBLISHED
    assert (config.teacher in memory.PUBLISHED) == (not config.remote)
    assert f"{card}gb" in path.stem or path.stem == "remote_teacher"
    parts, minutes = memory.estimated(path)
    assert parts["peak"] < 0.8 * card * 1e9  # room for CUDA itself and for holes
    assert 1 < minutes < 24 * 60
    count = PARAMETERS[config.student]
    assert parts["student"] == 4 * count and parts["moments"] == 8 * count
    assert (parts["teacher"] == 0) == config.remote
    if not config.remote:
        assert parts["teacher"] == 2 * PARAMETERS[config.teacher.removesuffix("-Instruct")]


def test_estimate_knows_what_saves_memory():
    config, shapes = opd.Config.load(ROOT / "tiny_configs/gsm8k_24gb.json"), memory.PUBLISHED

    def estimate(half="bf16", teacher="Qwen/Qwen3-1.7B", **changes):
        changed = config.model_copy(update=changes)
        return memory.lab.memory_estimate(
            changed, shapes[config.student], shapes.get(teacher), 256, half
        )

    now = estimate()
    assert estimate(micro_batch=4)["layers"] == 2 * now["layers"]
    assert estimate(batch_size=64)["cache"] == 2 * now["cache"]
    assert estimate(teacher=None)["teacher"] == 0 and estimate(half="fp16")["casts"] == 0
    assert estimate(eval_every=10, diagnose_every=1) == now  # a look needs no second model
    assert estimate(half="none")["teacher"] == 2 * now["teacher"]


def test_the_page_of_configs_has_the_table_of_the_formula(capsys):
    memory.configs_table()
    rows = [row for row in capsys.readouterr().out.splitlines() if row.startswith("| ")]
    page = (ROOT / "tiny_configs/README.md").read_text()
    assert len(rows) == 1 + len(SHIPPED) and all(row in page for row in rows)
