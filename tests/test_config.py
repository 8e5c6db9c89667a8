"""§0 and §13: precedence, joined methods, bad input, the command line; every field is alive."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import opd

# precedence


def write(path, **fields):
    path.write_text(json.dumps(fields))
    return path


def test_preset_then_file_then_override(tmp_path):
    file = write(tmp_path / "c.json", method="gkd", beta=0.3, steps=7)
    config = opd.Config.load(file, steps=9)
    assert (config.divergence, config.beta, config.steps) == ("jsd", 0.3, 9)
    assert opd.Config.load().divergence == "reverse_kl" and opd.Config.load().steps == 40
    assert opd.Config.load(method="sft").feedback == "imitation"
    assert opd.Config.load(method="sft", states="teacher").states == "teacher"


def test_a_file_field_that_an_overriding_method_sets_is_an_error_naming_both(tmp_path):
    file = write(tmp_path / "c.json", method="gkd", beta=0.3)
    with pytest.raises(opd.InputError, match=r"states = 'student'.*method = 'sft'"):
        opd.Config.load(write(tmp_path / "d.json", states="student"), method="sft")
    assert opd.Config.load(file, method="gkd").beta == 0.3  # the same method overrides nothing
    config = opd.Config.load(tmp_path / "d.json", method="sft", states="data")  # said twice: fine
    assert config.states == "data"


def test_joined_methods(monkeypatch):
    monkeypatch.setitem(opd.METHODS, "short", dict(horizon=5))
    config = opd.Config.load(method="opd+short")
    assert config.route == "policy_gradient" and config.horizon == 5
    with pytest.raises(opd.InputError, match="already set"):
        opd.Config.load(method="opd+sft")


def test_a_config_survives_its_own_json():
    for method in opd.METHODS:
        config = opd.Config.load(method=method)
        assert opd.Config(**json.loads(config.model_dump_json())) == config


def test_methods_set_known_fields_and_are_all_listed(capsys):
    assert opd.main(["methods"]) == 0
    printed = capsys.readouterr().out
    for name, fields in opd.METHODS.items():
        line = next(row for row in printed.splitlines() if row.split()[0] == name)
        assert fields.keys() <= opd.Config.model_fields.keys()
        assert all(f"{field}={value}" in line for field, value in fields.items())


def test_every_field_has_a_documentation_and_none_is_a_dict():
    fields = opd.Config.model_fields
    assert len(fields) <= 70
    for name, field in fields.items():
        assert field.description and field.annotation is not dict, name


# bad input: one line that names the field, the value, what is allowed; exit code 2; nothing written

BAD = [
    (["--stepz", "3"], "stepz = 3: unknown field; did you mean steps?"),
    (["--steps=-2"], "steps = -2"),
    (["--steps", "-1"], "steps = -1: input should be greater than or equal to 0"),
    (["--steps", "3.5"], "steps = 3.5"),
    (["--steps", "many"], "steps = 'many'"),
    (["--lr", "0"], "lr = 0: input should be greater than 0"),
    (["--lr", "fast"], "lr = 'fast'"),
    (["--lr", "1e999"], "lr = inf: input should be a finite number"),
    (["--lr", "NaN"], "lr = "),
    (["--batch_size", "1000000000000"], "batch_size = 1000000000000: input should be less than"),
    (["--max_tokens", "100000000000000"], "max_tokens = 100000000000000"),
    (["--teacher", "tiny_configs/build/chain_d64"], "teacher = 'tiny_configs/build/chain_d64'"),
    (["--runs", str(ROOT / "README.md")], "runs = "),
    (["--batch_size", "0"], "batch_size = 0"),
    (["--horizon", "0"], "horizon = 0"),
    (["--horizon", "1.5"], "horizon = 1.5"),
    (["--method", "magic"], "'magic' is not one of opd_full, opd, "),
    (["--method", "opd+sft"], "already set"),
    (["--route", "sideways"], "route = 'sideways': input should be 'direct' or 'policy_gradient'"),
    (["--divergence", "jsd", "--beta", "1.0"], "beta = 1.0: input should be less than 1"),
    (["--temperature", "0"], "temperature = 0"),
    (["--temperature", "1e-300"], "temperature = 1e-300"),
    (["--top_p", "1.2"], "top_p = 1.2"),
    (["--method", "opd", "--top_p", "0.9"], "allow_top_p_bias"),
    (["--method", "opd", "--states", "teacher"], "route = 'policy_gradient': needs states"),
    (["--method", "opd", "--teacher_prefix", "4"], "teacher_prefix = 4"),
    (["--states", "data", "--teacher_prefix", "4"], "teacher_prefix = 4"),
    (["--clip", "0.2"], "importance_ratio"),
    (["--importance_ratio", "true"], 'needs route = "policy_gradient"'),
    (["--gamma", "1"], 'gamma = 1.0: needs route = "policy_gradient"'),
    (["--method", "opd_plus", "--gamma", "1"], 'gamma = 1.0: needs divergence = "reverse_kl"'),
    (["--method", "cr_opd", "--importance_ratio", "true"], 'needs negative = "suppress"'),
    (["--method", "opd", "--support", "teacher"], "support = 'teacher': needs route = \"direct\""),
    (["--support", "student", "--tail", "tip"], "tail = 'tip': input should be 'stop_gradient'"),
    (["--support", "student", "--top_k", "20"], "top_k = 20: must be at most the vocabulary's 19"),
    (
        ["--support", "union", "--divergence", "forward_kl", "--tail", "generalised"],
        "tail = 'generalised': needs divergence",
    ),
    (["--reference", "student"], "reference = 'student'"),
    (["--reward_scale", "1.5"], "reference = None: a model"),
    (
        ["--method", "exopd", "--reference", "no/such"],
        "reference = 'no/such': must be a folder here",
    ),
    (["--method", "sft", "--weighting", "position"], 'needs feedback = "teacher" or "law"'),
    (["--states", "teacher", "--importance_cap", "2"], 'needs states = "student"'),
    (["--method", "reinforce", "--samples_per_prompt", "1"], "samples_per_prompt"),
    (["--method", "reinforce", "--batch_size", "10"], "must divide batch_size 10"),
    (["--schedule", "stairs"], "schedule = 'stairs': input should be 'fixed', 'staircase', "),
    (["--schedule", "adaptive", "--method", "sft"], "schedule = 'adaptive': needs feedback"),
    (["--schedule", "adaptive", "--method", "reinforce"], 'needs feedback = "teacher" or "law"'),
    (["--method", "topd+popd"], "popd sets ['schedule'], which is already set"),
    (["--student_share", "0.3"], 'student_share = 0.3: needs states = "mixed"'),
    (["--aligned_share", "0.5"], "aligned = None: needs aligned_share = 1.0"),
    (["--off_policy", "data"], "off_policy = 'data': needs states = \"mixed\""),
    (["--horizon_start", "9"], 'needs schedule = "staircase" or "linear" or "adaptive"'),
    (["--schedule", "adaptive", "--growth", "0.5"], 'needs schedule = "staircase" or "linear"'),
    (["--schedule", "linear", "--horizon_kl", "0.5"], 'needs schedule = "adaptive"'),
    (["--beta", "0.3"], 'beta = 0.3: needs divergence = "jsd"'),
    (["--method", "reinforce", "--divergence", "jsd"], 'needs feedback = "teacher" or "law"'),
    (["--tail", "renormalise"], "tail = 'renormalise': needs support = \"student\" or "),
    (["--method", "opd", "--gae_lambda", "0.5"], 'gae_lambda = 0.5: needs baseline = "value"'),
    (["--method", "opd", "--rho", "0.5"], 'rho = 0.5: needs negative = "route"'),
    (["--weight_strength", "0.4"], 'needs weighting = "position" or "overlap"'),
    (["--method", "iw_opd", "--overlap_threshold", "0.4"], 'needs weighting = "overlap"'),
    (["--accept", ">"], 'accept = \'>\': needs extrapolate = "accuracy" or "kl"'),
    (["--horizon_start", "0"], "horizon_start = 0: input should be greater than or equal to 1"),
    (["--growth", "0"], "growth = 0: input should be greater than 0"),
    (["--growth", "1.1"], "growth = 1.1: input should be less than or equal to 1"),
    (["--horizon_kl", "0"], "horizon_kl = 0: input should be greater than 0"),
    (["--extrapolate", "loss"], "extrapolate = 'loss': input should be 'none', 'accuracy' or 'kl'"),
    (
        ["--extrapolate", "kl", "--method", "sft"],
        "extrapolate = 'kl': needs feedback = \"teacher\"",
    ),
    (["--method", "effopd", "--accept", "="], "accept = '=': input should be '>=' or '>'"),
    (["--engine", "sglang"], "engine = 'sglang': input should be 'transformers', 'vllm'"),
    (
        ["--teacher_url", "http://x", "--teacher", "y"],
        "teacher_url = 'http://x': needs teacher = null",
    ),
    (["--teacher_url", "http://x", "--temperature", "0.7"], "needs temperature = 1.0"),
    (["--teacher_url", "http://x", "--cold_start", "2"], "needs cold_start = 0"),
    (["--teacher_url", "http://x", "--aligned", "confidence"], "needs aligned = null"),
    (["--resume", ""], "resume = ''"),
    (["--teacher_url", "x"], "teacher_url = 'x': must start with http"),
    (["--engine", "vllm", "--teacher_prefix", "3"], "engine = 'vllm': needs teacher_prefix = 0"),
    (["--stop_kl", "0"], "stop_kl = 0: input should be greater than 0"),
    (["--stop_kl", "0.1", "--method", "sft"], "stop_kl = 0.1: needs feedback"),
    (["--feedback", "verifier"], 'needs route = "policy_gradient"'),
    (["--micro_batch", "65"], "micro_batch = 65: must be at most batch_size = 64"),
    (["--teacher", "none"], "teacher = null"),
    (["--name", "../up"], "name = '../up'"),
    (["--device", "tpu"], "device = 'tpu'"),
    (["--seed", "-3"], "seed = -3"),
    (["--cold_start", "41"], "cold_start = 41: at most steps = 40"),
    (["--cold_start", "5", "--schedule", "adaptive"], "cold_start = 5: needs schedule = "),
    (["--cold_start", "5", "--method", "reinforce", "--teacher", "none"], "teacher = null"),
    (["--aligned", "chess"], "aligned = 'chess': must be confidence, or a task or file"),
    (["--aligned", "confidence", "--method", "sft"], "aligned = 'confidence': needs states = "),
    (["--aligned_share", "0"], "aligned_share = 0: input should be greater than 0"),
    (["check", "a", "b"], "must be [check] CONFIG.json"),
    (["check", "absent.json"], "config = 'absent.json'"),
    (["check", "--teacher", "none"], "teacher = null"),
    (["--feedback", "law"], "feedback = 'law': needs a task with an exact law"),
    (
        ["--student", "no/such-model"],
        "'no/such-model': must be a folder here, or a hub model, with a",
    ),
    (
        ["--teacher", "no/such-model"],
        "teacher = 'no/such-model': must be a folder here, or a model",
    ),
    (["--teacher", "tiny_configs/models/synonym_teacher"], "token 3 is '0' for the student, '='"),
    (["--task", "chess"], "task = 'chess': must be chain"),
    (["--task", "chain/fast"], "task = 'chain/fast'"),
    (["--task", "synonyms"], "no token"),
    (["--task", "absent.jsonl"], "task = 'absent.jsonl': must be a readable text file"),
    (["absent.json"], "config = 'absent.json'"),
    (["one.json", "two.json"], "must be [check] CONFIG.json"),
    (["dance"], "must be [check] CONFIG.json"),
    (["report", "runs/none"], "must be a finished run"),
    (["--resume", "runs/none"], "must be a run's folder"),
    (["--resume", "runs/none", "--steps", "3"], "takes no other argument"),
    (["--lr"], "--lr: needs a value"),
]


@pytest.mark.parametrize("arguments, expected", BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input(arguments, expected, run_dir, capsys):
    assert opd.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("opd.py: ") and expected in printed.err
    assert printed.err.count("\n") == 1 and printed.out == ""
    assert list(run_dir.iterdir()) == []


BROKEN_FILES = {
    "not.json": ("{steps: 3", "must be a readable JSON file of fields"),
    "list.json": ("[1]", "must be a readable JSON file of fields"),
    "unknown.json": ('{"step": 3}', "did you mean steps?"),
    "typed.json": ('{"steps": "3"}', "steps = '3': input should be a valid integer"),
    "bool.json": ('{"lr": true}', "lr = True"),
    "rows.jsonl": (
        '{"prompt": "<b> 1 ="}\n',
        "line 1: must be a JSON object with a prompt",
    ),
    "empty.jsonl": ("", "no row in split 'train'"),
    "bare.jsonl": (
        '{"prompt": "1", "answer": 1, "split": "train"}\n',
        "no row in split 'validation'",
    ),
    "split.jsonl": (
        '{"prompt": "1", "answer": 1, "split": "dev"}\n',
        "a split, if any, from train",
    ),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_broken_files(name, run_dir, capsys):
    text, expected = BROKEN_FILES[name]
    (run_dir / name).write_text(text)
    assert opd.main(["--task", name] if name.endswith("l") else [name]) == 2
    printed = capsys.readouterr().err
    assert expected in printed
    assert printed.count("\n") == 1 and not (run_dir / "runs").exists()


def test_a_taken_name_is_refused_and_a_default_one_gets_a_number(run_dir, capsys):
    (run_dir / "runs" / "mine").mkdir(parents=True)
    assert opd.main(["--name", "mine"]) == 2
    assert "name = 'mine': runs/mine exists" in capsys.readouterr().err
    base = opd.new_folder(opd.Config())
    base.mkdir()
    assert opd.new_folder(opd.Config()).name == f"{base.name}-2"


def test_a_gpu_that_is_not_there(capsys, run_dir):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert opd.main(["--device", "cuda"]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err


def test_exit_code_and_help_of_the_real_process(run_dir):
    run = lambda *words: subprocess.run(  # noqa: E731
        [sys.executable, str(ROOT / "opd.py"), *words], capture_output=True, text=True, timeout=120
    )
    wrong = run("--steps", "-1")
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)
    shown = run("--help")
    assert shown.returncode == 0 and all(f"--{f}" in shown.stdout for f in opd.Config.model_fields)


# every field is alive: changing it changes the loss, the states, the schedule or the files

BASE = dict(batch_size=8, steps=2, warmup=0, decay=0.0, eval_every=0, eval_prompts=8)
ALIVE = {
    "student": ("tiny_configs/models/student_novice", {}),
    "teacher": ("tiny_configs/models/teacher_b", {}),
    "task": ("chain/reordered", dict(method="sft", teacher=None)),
    "method": ("kd", {}),
    "states": ("teacher", {}),
    "student_share": (0.1, dict(states="mixed")),
    "off_policy": ("data", dict(states="mixed", task="chain/reordered")),
    "teacher_prefix": (9, {}),
    "batch_size": (9, {}),
    "samples_per_prompt": (4, {}),
    "prompt_pool": (3, {}),
    "aligned": ("chain/sums", {}),
    "aligned_share": (0.5, dict(aligned="chain/sums")),
    "cold_start": (1, {}),
    "temperature": (1.3, {}),
    "top_p": (0.5, {}),
    "horizon": (4, {}),
    "schedule": ("linear", {}),
    "horizon_start": (3, dict(schedule="linear")),
    "growth": (1.0, dict(schedule="linear")),
    "horizon_kl": (100.0, dict(schedule="adaptive", horizon_start=2, steps=4)),
    "max_tokens": (5, {}),
    "feedback": ("imitation", {}),
    "route": ("policy_gradient", {}),
    "divergence": ("forward_kl", {}),
    "beta": (0.1, dict(divergence="jsd")),
    "baseline": ("leave_one_out", dict(method="reinforce", baseline="none")),
    "importance_ratio": (True, dict(route="policy_gradient")),
    "clip": (0.01, dict(method="opd", updates_per_rollout=3, lr=1e-2)),
    "support": ("teacher", dict(top_k=2)),
    "top_k": (3, dict(support="student")),
    "tail": ("generalised", dict(support="student", top_k=2)),
    "gamma": (0.5, dict(route="policy_gradient")),
    "gae_lambda": (0.5, dict(method="gae_opd", steps=7)),
    "negative": ("route", dict(route="policy_gradient")),
    "rho": (0.5, dict(method="cr_opd")),
    "min_prob": (0.5, dict(method="cr_opd")),
    "weighting": ("position", {}),
    "weight_strength": (0.3, dict(weighting="position")),
    "overlap_threshold": (1.0, dict(weighting="overlap", top_k=2, overlap_threshold=0.0)),
    "entropy_threshold": (0.001, {}),
    "importance_cap": (0.5, {}),
    "reference": (
        "tiny_configs/models/student_novice",
        dict(reference="student", reference_kl=1.0, teacher="tiny_configs/models/teacher_b"),
    ),
    "reward_scale": (2.0, dict(reference="student", reference_kl=1.0)),
    "reference_kl": (2.0, dict(reference="tiny_configs/models/teacher_b", reference_kl=1.0)),
    "entropy_bonus": (0.1, {}),
    "aggregation": ("sequence_sum", {}),
    "steps": (3, {}),
    "updates_per_rollout": (2, {}),
    "micro_batch": (4, {}),
    "lr": (1e-3, {}),
    "warmup": (20, {}),
    "decay": (1.0, {}),
    "grad_clip": (1e-6, {}),
    "seed": (1, {}),
}
ELSEWHERE = {  # no effect on the loss by intention; each has its own test
    "name": "test_a_taken_name_is_refused_and_a_default_one_gets_a_number",
    "runs": "test_training.test_files_of_a_run",
    "eval_every": "test_training.test_files_of_a_run",
    "eval_prompts": "test_training.test_files_of_a_run",
    "stop_kl": "test_extrapolation.test_stop_kl_stops_the_run",
    "extrapolate": "test_extrapolation.test_it_triggers_at_powers_of_two",
    "accept": "test_extrapolation.test_the_size_of_the_validation_and_the_rule_reach_the_trigger",
    "engine": "test_engines.test_training_with_vllm_learns_like_transformers",
    "teacher_url": "test_engines.test_a_remote_teacher_teaches",
    "gradient_checkpointing": (
        "test_training.test_gradient_checkpointing_changes_nothing_but_memory"
    ),
    "checkpoint_every": "test_training.test_resume_after_sigkill",
    "save_dtype": "test_training.test_saved_model_loads_in_its_dtype",
    "device": "test_a_gpu_that_is_not_there",
    "precision": "test_training.test_bf16_autocast_changes_the_scores",
    "allow_top_p_bias": "test_the_top_p_bias_can_be_accepted",
}


def fingerprint(**fields):
    """Losses, texts and weights after a few steps."""
    config = opd.Config.load(**{**BASE, **fields})
    world = opd.load_world(config)
    config = opd.Config(**{**config.model_dump(), "max_tokens": world.task.max_tokens})
    optimizer = opd.make_optimizer(config, world)
    rows = []
    for step in range(config.steps):
        rows.append(opd.train_step(config, world, optimizer, step, rows))
    seen = [[r["loss"], r["tokens_trained"], r["lr"]] for r in rows]
    weights = sum(p.double().abs().sum().item() for p in world.student.parameters())
    return seen, weights


def test_the_top_p_bias_can_be_accepted():
    with pytest.raises(opd.InputError, match="allow_top_p_bias"):
        opd.Config.load(method="opd", top_p=0.9)
    assert opd.Config.load(method="opd", top_p=0.9, allow_top_p_bias=True).top_p == 0.9


def test_no_field_is_forgotten():
    source = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for test in ELSEWHERE.values():
        assert f"def {test.rpartition('.')[2]}(" in source, test
    assert ALIVE.keys() | ELSEWHERE.keys() == opd.Config.model_fields.keys()


@pytest.mark.parametrize("field", ALIVE)
def test_field_is_alive(field):
    value, context = ALIVE[field]
    assert fingerprint(**{**context, field: value}) != fingerprint(**context)


@pytest.mark.parametrize("method", opd.METHODS)
def test_every_method_runs_two_steps_with_a_finite_loss(method):
    seen, weights = fingerprint(method=method)
    assert len(seen) == 2 and torch.isfinite(torch.tensor(seen)).all() and weights > 0
