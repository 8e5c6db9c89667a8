"""On a GPU: the acceptance of tests/benchmarks/gpu.py.  On a CPU: its rehearsal, and that no
function makes a tensor on a device of its own choice."""

import json
import sys

import pytest
import torch
from conftest import ROOT, random_laws

sys.path.insert(0, str(ROOT / "tests/benchmarks"))
import gpu  # noqa: E402

import opd  # noqa: E402

no_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: no GPU here")


@no_card
def test_losses_and_gradients_are_the_cpus():
    for name, (loss, gradient) in gpu.against_cpu("cuda").items():
        assert loss < 1e-4 and gradient < 1e-4, (name, loss, gradient)


@no_card
def test_the_main_job_reaches_its_accuracy_in_bf16():
    found = gpu.main_job(small=False)
    assert found["student_before"] < 0.7 < 0.95 < found["student_after"]


@no_card
def test_a_large_vocabulary_fits():
    assert gpu.large_vocabulary("cuda", small=False)["peak_mb"] < 8_000


@no_card
def test_vllm_and_two_processes_agree_where_they_can_be_tried():
    gap, losses = gpu.vllm_gap("cuda"), gpu.two_processes()
    assert gap is None or gap["engine_gap"] < opd.SYNC_GAP_HALF
    assert losses is None or losses < 1e-2


def test_the_rehearsal_on_a_cpu_measures_every_part(monkeypatch, tmp_path, capsys):
    out = tmp_path / "found"
    words = ["gpu.py", "--device", "cpu", "--small", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(gpu, "vllm_gap", lambda device: None)
    gpu.main()
    found = json.loads(out.with_suffix(".json").read_text())
    assert found["against_cpu"].keys() == gpu.LOSSES.keys()
    assert all(pair == [0, 0] for pair in found["against_cpu"].values())  # the CPU against itself
    assert found["tokens_per_second"]["step"] > 0 and found["large_vocabulary"]["seconds"] > 0
    assert "| against_cpu opd_full |" in out.with_suffix(".md").read_text()


# A tensor that a function makes must lie where its inputs do.  With `meta` as the default device
# one made without saying where would be a meta tensor, and the result too, or an error.

MASK = torch.tensor([[True, True, True], [True, False, False]])
DEVICELESS = {
    "inverse_cdf": lambda p, q, a: opd.inverse_cdf(p[0].exp(), torch.full((3,), 0.5, device="cpu")),
    "nucleus": lambda p, q, a: opd.nucleus(p, 0.8),
    "from_logits": lambda p, q, a: opd.from_logits(p, temperature=0.7, stops=[2, 1]),
    "of_tokens": lambda p, q, a: opd.of_tokens(p, a),
    "reverse_kl": lambda p, q, a: opd.reverse_kl(p, q),
    "forward_kl": lambda p, q, a: opd.forward_kl(p, q),
    "jsd": lambda p, q, a: opd.jsd(p, q, 0.3),
    "entropy": lambda p, q, a: opd.entropy(p),
    "log_ratio_reward": lambda p, q, a: opd.log_ratio_reward(p, q),
    "kl_baseline": lambda p, q, a: opd.kl_baseline(p, q),
    "leave_one_out": lambda p, q, a: opd.leave_one_out(p[..., 0], 2),
    "gae": lambda p, q, a: opd.gae(p[..., 0], q[..., 0], MASK, 0.9, 0.9)[0],
    "discounted_return": lambda p, q, a: opd.discounted_return(p[..., 0], MASK, 0.9),
    "policy_gradient_loss": lambda p, q, a: opd.policy_gradient_loss(
        p[..., 0], q[..., 0], MASK, p[..., 1], 0.2
    ),
    "routing_target": lambda p, q, a: opd.routing_target(p, q, a, top_k=3, min_prob=1e-4)[0],
    "cr_opd_loss": lambda p, q, a: opd.cr_opd_loss(p, q, a, top_k=3, min_prob=1e-4),
    "truncated_importance_weights": lambda p, q, a: opd.truncated_importance_weights(p, q, 2.0),
    "masked_mean": lambda p, q, a: opd.masked_mean(p[..., 0], MASK, "sequence_mean"),
    "overlap": lambda p, q, a: opd.overlap(p, q, 3).advantage,
    "diagnose": lambda p, q, a: opd.diagnose(p[0], q[0], a[0], top_k=3, min_prob=0)["kl"],
} | {
    f"{source}, {tail}": lambda p, q, a, source=source, tail=tail: opd.truncated_reverse_kl(
        p, q, opd.top_k_support(p, q, 3, source), tail
    )
    for source in ("student", "teacher", "union", "intersection")
    for tail in ("stop_gradient", "generalised", "renormalise", "bucket")
}  # fmt: skip


@pytest.mark.parametrize("name", DEVICELESS)
def test_no_function_makes_a_tensor_where_the_inputs_are_not(name):
    logp, logq = random_laws(vocab=7, rows=2, steps=3)
    action = torch.tensor([[0, 1, 2], [3, 4, 5]])
    right = DEVICELESS[name](logp, logq, action)
    with torch.device("meta"):
        found = DEVICELESS[name](logp, logq, action)
    assert found.device.type == "cpu" and torch.equal(found, right)
