"""Sections 1 and 15: precedence, joined methods, bad input, the command line; no dead field."""

import builtins
import functools
import json
import re
import subprocess
import sys
import traceback

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


def test_a_methods_preset_gives_way_to_every_given_field(tmp_path):
    file = write(tmp_path / "c.json", method="gkd", beta=0.3)
    assert opd.Config.load(file, method="gkd").beta == 0.3
    with pytest.raises(opd.InputError, match="method = 'sft': must be as in .*c.json"):
        opd.Config.load(file, method="sft")  # with gkd's states it would be no sft
    whole = tmp_path / "whole.json"
    whole.write_text(opd.Config.load(method="opd_full").model_dump_json())
    with pytest.raises(opd.InputError, match="method = 'opd'"):  # it would train by route A
        opd.Config.load(whole, method="opd")
    config = opd.Config.load(write(tmp_path / "d.json", states="teacher"), method="sft")
    assert (config.states, config.feedback) == ("teacher", "imitation")


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
    for name, field in opd.Config.model_fields.items():
        assert field.description and field.annotation is not dict, name


# bad input: one line that names the field, the value, what is allowed; exit code 2; nothing written

AWAY = ["--teacher", "http://127.0.0.1:9"]  # nobody is there: asking it would be exit code 3
ROUTE_B = "needs route policy_gradient"
BAD = [
    (["--stepz", "3"], "stepz = '3': unknown field; see --help"),
    (["--clip", "0.2"], "clip = '0.2': unknown field"),
    (["--steps=-2"], "steps = -2"),
    (["--steps", "-1"], "steps = -1: input should be greater than or equal to 0"),
    (["--steps", "3.5"], "steps = 3.5: input should be a valid integer"),
    (["--steps", "many"], "steps = 'many'"),
    (["--lr", "0"], "lr = 0: input should be greater than 0"),
    (["--lr", "fast"], "lr = 'fast'"),
    (["--lr", "1e999"], "lr = inf: input should be a finite number"),
    (["--lr", "NaN"], "lr = 'NaN': input should be a valid number"),
    (["--batch_size", "1000000000000"], "batch_size = 1000000000000: input should be less than"),
    (["--max_tokens", "100000000000000"], "max_tokens = 100000000000000"),
    (["--teacher", "tiny_configs/build/chain_d64"], "teacher = 'tiny_configs/build/chain_d64'"),
    (["--runs", str(ROOT / "README.md")], "runs = "),
    (["--batch_size", "0"], "batch_size = 0"),
    (["--horizon", "0"], "horizon = 0"),
    (["--horizon", "1.5"], "horizon = 1.5: needs a share below 1"),
    (["--horizon", "1.0"], "horizon = 1.0: needs a share below 1"),
    (["--method", "magic"], "method = 'magic': 'magic' is not one of ['opd_full', 'opd', "),
    (["--method", "opd_plus"], "method = 'opd_plus': 'opd_plus' is not one of"),
    (["--method", "opd+sft"], "already set"),
    (["--method", "topd+popd"], "popd sets ['schedule'], which is already set"),
    (["--route", "sideways"], "route = 'sideways': input should be 'direct' or 'policy_gradient'"),
    (["--divergence", "jsd", "--beta", "1.0"], "beta = 1.0: input should be less than 1"),
    (["--temperature", "0"], "temperature = 0"),
    (["--temperature", "1e-300"], "temperature = 1e-300"),
    (["--top_p", "1.2"], "top_p = 1.2"),
    (["--method", "opd", "--top_p", "0.9"], "top_p = 0.9: needs the student's text, route direct"),
    (
        ["--method", "cr_opd", "--top_p", "0.9"],
        "top_p = 0.9: needs the student's text, route direct",
    ),
    (
        ["--method", "reinforce", "--top_p", "0.9"],
        "top_p = 0.9: needs the student's text, route direct",
    ),
    (["--method", "kd", "--top_p", "0.9"], "top_p = 0.9: needs the student's text, route direct"),
    (["--method", "sft", "--top_p", "0.9"], "top_p = 0.9: needs the student's text, route direct"),
    (["--method", "opd", "--states", "teacher"], "route = 'policy_gradient': needs states student"),
    (
        ["--method", "opd", "--feedback", "imitation"],
        "route = 'policy_gradient': needs states student",
    ),
    (["--feedback", "imitation"], "feedback = 'imitation': needs other states, or keep right"),
    (["--method", "sft", "--student_share", "0.5"], "feedback = 'imitation': needs other states"),
    (["--feedback", "verifier"], f"feedback = 'verifier': {ROUTE_B}"),
    (["--feedback", "law"], "feedback = 'law': input should be 'teacher', 'verifier'"),
    (["--gamma", "1"], f"gamma = 1.0: {ROUTE_B}, feedback teacher"),
    (["--method", "reinforce", "--gamma", "0.5"], f"gamma = 0.5: {ROUTE_B}, feedback teacher"),
    (["--negative", "route"], f"negative = 'route': {ROUTE_B}"),
    (["--negative", "local_kl"], "negative = 'local_kl': input should be 'suppress' or 'route'"),
    (["--baseline", "kl"], f"baseline = 'kl': {ROUTE_B}"),
    (
        ["--method", "reinforce", "--baseline", "value"],
        "baseline = 'value': needs feedback teacher",
    ),
    (["--baseline", "leave_one_out"], f"baseline = 'leave_one_out': {ROUTE_B}"),
    (["--method", "opd", "--divergence", "forward_kl"], "divergence = 'forward_kl': needs route"),
    (["--divergence", "jsd", "--support", "student"], "support = 'student': needs divergence"),
    (["--support", "student", "--tail", "tip"], "tail = 'tip': input should be 'stop_gradient'"),
    (["--support", "student", "--top_k", "20"], "top_k = 20: must be at most the vocabulary's 19"),
    (
        ["--support", "union", "--divergence", "forward_kl", "--tail", "generalised"],
        "tail = 'generalised': needs divergence reverse_kl",
    ),
    (["--importance_cap", "2"], "importance_cap = '2': unknown"),
    (
        ["--method", "reinforce", "--samples_per_prompt", "1"],
        "samples_per_prompt = 1: needs 2 or more, that",
    ),
    (
        ["--method", "reinforce", "--batch_size", "10"],
        "samples_per_prompt = 4: needs 2 or more, that divide 10 rows",
    ),
    (["--schedule", "stairs"], "schedule = 'stairs': input should be 'fixed', 'staircase' or"),
    (["--schedule", "adaptive"], "schedule = 'adaptive': input should be"),
    (["--states", "mixed"], "states = 'mixed': input should be 'student', 'teacher' or 'data'"),
    (["--keep", "best"], "keep = 'best': input should be 'all' or 'right'"),
    (["--horizon_start", "0"], "horizon_start = 0: input should be greater than or equal to 1"),
    (["--growth", "0"], "growth = 0: input should be greater than 0"),
    (["--growth", "1.1"], "growth = 1.1: input should be less than or equal to 1"),
    (["--extrapolate", "kl"], "extrapolate = 'kl': input should be 'none' or 'accuracy'"),
    (["--engine", "sglang"], "engine = 'sglang': input should be 'transformers' or 'vllm'"),
    (AWAY, "teacher = 'http://127.0.0.1:9': needs support teacher, or a policy"),
    (AWAY + ["--method", "vopd"], "teacher = 'http://127.0.0.1:9'"),
    (AWAY + ["--support", "student"], "teacher = 'http://127.0.0.1:9'"),
    (AWAY + ["--method", "kd", "--support", "teacher"], "teacher = 'http://127.0.0.1:9'"),
    (AWAY + ["--method", "opd", "--temperature", "0.7"], "temperature = 0.7: needs to be 1"),
    (AWAY + ["--method", "opd", "--top_k", "20"], "top_k = 20: must be at most"),
    (["--resume", ""], "resume = ''"),
    (["--micro_batch", "0"], "micro_batch = 0"),
    (["--diagnose_every", "0"], "diagnose_every = 0: input should be greater than or equal to 1"),
    (["--teacher", "none"], "teacher = None: needs a model"),
    (
        ["--method", "sft", "--states", "teacher", "--teacher", "none"],
        "teacher = None: needs a model",
    ),
    (["--name", "../up"], "name = '../up'"),
    (["--seed", "-3"], "seed = -3"),
    (["--seed", str(2**80)], f"seed = {2**80}: input should be less than"),
    (
        ["--student", "no/such-model"],
        "'no/such-model': must be a folder here, or a hub model, with a",
    ),
    (
        ["--teacher", "no/such-model"],
        "teacher = 'no/such-model': must be a folder here, or a hub model",
    ),
    (["--teacher", "tiny_configs/models/synonym_teacher"], "token 3 is '0' for the student, '='"),
    (["--task", "chess"], "task = 'chess': must be chain"),
    (["--task", "chain/fast"], "task = 'chain/fast'"),
    (["--task", "synonyms"], "no token"),
    (["--task", "absent.jsonl"], "task = 'absent.jsonl': must be a readable text file"),
    (["--task", "absent.py"], "task = 'absent.py': must be chain"),
    (["--task", str(ROOT / "tests/conftest.py")], "must define make_task(name, tokenizer)"),
    (["absent.json"], "config = 'absent.json': must be a JSON file"),
    (["one.json", "two.json"], "'one.json two.json': must be one CONFIG.json and fields"),
    (["dance"], "config = 'dance'"),
    (["check", "absent.json"], "must be one CONFIG.json and fields, or --resume RUN"),
    (["report", "runs/none"], "must be one CONFIG.json and fields, or --resume RUN"),
    (["--resume", "runs/none"], "must be a run's folder"),
    (["--resume", "runs/none", "--steps", "3"], "must be one CONFIG.json and fields, or --resume"),
    (["--lr"], "lr = '': input should be a valid number"),
]


@pytest.mark.parametrize("arguments, expected", BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input(arguments, expected, run_dir, capsys):
    assert opd.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("opd.py: ") and expected in printed.err
    assert printed.err.count("\n") == 1 and list(run_dir.iterdir()) == []
    assert re.fullmatch(r"(\S+ learns from \S+ by \S+, \d+ steps\n)?", printed.out)


BROKEN_FILES = {
    "not.json": ("{steps: 3", "config = 'not.json': must be a JSON file"),
    "list.json": ("[1]", "config = 'list.json': must be a JSON file"),
    "unknown.json": ('{"step": 3}', "step = 3: unknown field; see --help"),
    "typed.json": ('{"steps": "3"}', "steps = '3': input should be a valid integer"),
    "bool.json": ('{"lr": true}', "lr = True"),
    "method.json": ('{"method": "magic"}', "method = 'magic': 'magic' is not one of"),
    "pair.json": ('{"gamma": 1.0}', f"gamma = 1.0: {ROUTE_B}, feedback teacher"),
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


def test_what_trains_noise_is_refused_and_what_is_idle_is_not():
    """Nobody is hurt by a field that has no effect; a loss that is only noise is refused."""
    noise = [
        dict(feedback="imitation"),  # all of its own text: an expected gradient of 0
        dict(method="gkd", feedback="imitation"),
        dict(method="kd", top_p=0.9),  # the teacher writes
        dict(method="opd", top_p=0.9),  # the full softmax scores a nucleus
        dict(feedback="verifier"),  # nothing to differentiate
    ]
    for fields in noise:
        with pytest.raises(opd.InputError):
            opd.Config.load(**fields)
    idle = [
        dict(rho=0.5), dict(gae_lambda=0.5), dict(growth=0.3), dict(beta=0.1),
        dict(tail="renormalise"), dict(student_share=0.4), dict(method="opd", min_prob=0.1),
        dict(feedback="imitation", keep="right"), dict(top_p=0.9), dict(method="gkd", top_p=0.9),
    ]  # fmt: skip
    for fields in idle:
        assert opd.Config.load(**fields)


def test_a_taken_name_is_refused_and_a_default_one_gets_a_number(run_dir, capsys):
    (run_dir / "runs" / "mine").mkdir(parents=True)
    assert opd.main(["--name", "mine"]) == 2
    assert "name = 'mine': runs/mine exists" in capsys.readouterr().err
    base = opd.new_folder(opd.Config())
    base.mkdir()
    assert opd.new_folder(opd.Config()).name == f"{base.name}-2"


def test_help_names_every_field(capsys):
    assert opd.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "python opd.py --method opd" in shown
    assert all(f"--{field}" in shown for field in opd.Config.model_fields)


USERS = """import opd

chain = opd.load_task("chain", opd.load_tokenizer("tiny_configs/models/teacher"))


def draw(n, split, rng):
    {draw}
    return chain.draw(n, split, rng)


def make_task(name, tokenizer):
    {make}
    return opd.Task(name, tokenizer, 53, draw, chain.verify, chain.show)
"""


@pytest.mark.parametrize(
    "where, mistake, error",
    [
        ("make", "undefined_name", "NameError: name 'undefined_name' is not defined"),
        ("make", "dict(a=1)['b']", "KeyError: 'b'"),
        ("draw", "undefined_name", "NameError: name 'undefined_name' is not defined"),
        ("draw", "dict(a=1)['b']", "KeyError: 'b'"),
        ("draw", "int('x')", "ValueError: invalid literal for int()"),
    ],
)
def test_a_mistake_in_a_users_task_keeps_its_own_traceback(where, mistake, error, run_dir, capsys):
    """It is no bad input of ours: main lets it through, so Python shows file, line and kind."""
    lines = dict(draw="pass", make="pass") | {where: mistake}
    (run_dir / "mine.py").write_text(USERS.format(**lines))
    with pytest.raises(Exception) as raised:  # noqa: B017
        opd.main(["--task", "mine.py"])
    shown = traceback.format_exception(raised.value)
    assert type(raised.value) is getattr(builtins, error.partition(":")[0])
    assert shown[0].startswith("Traceback (most recent call last)") and error in shown[-1]
    assert raised.traceback[-1].path.name == "mine.py"
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1 and printed.err == "" and not (run_dir / "runs").exists()


def test_a_users_task_without_mistakes_trains_and_may_refuse(run_dir, quick, capsys):
    """The real process refuses too: the opd that the file imports is the one that runs."""
    (run_dir / "mine.py").write_text(USERS.format(draw="pass", make="pass"))
    words = "--task mine.py --steps 1 --batch_size 4 --eval_prompts 4 --eval_every 0".split()
    assert opd.main(words) == 0
    capsys.readouterr()
    made = "opd.require(False, f'task = {name!r}: not today')"
    (run_dir / "mine.py").write_text(USERS.format(draw="pass", make=made))
    assert opd.main(words) == 2
    said = "opd.py: task = 'mine.py': not today\n"
    assert capsys.readouterr().err == said
    command = [sys.executable, str(ROOT / "opd.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (2, 1, said)


# every field is alive: changing it changes the loss, the states, the schedule or the files

BASE = dict(batch_size=8, steps=2, warmup=0, decay=0.0, eval_every=0, eval_prompts=8, max_tokens=20)
ALIVE = {
    "student": ("tiny_configs/models/student_novice", {}),
    "teacher": ("tiny_configs/models/teacher_b", {}),
    "task": ("chain/reordered", dict(method="sft", teacher=None)),
    "method": ("kd", {}),
    "states": ("teacher", {}),
    "student_share": (1.0, dict(states="teacher")),
    "keep": ("right", dict(student="tiny_configs/models/student_muddled", max_tokens=51)),
    "batch_size": (9, {}),
    "samples_per_prompt": (4, {}),
    "temperature": (1.3, {}),
    "top_p": (0.5, {}),
    "horizon": (4, {}),
    "schedule": ("linear", {}),
    "horizon_start": (3, dict(schedule="linear")),
    "growth": (1.0, dict(schedule="linear", steps=3)),
    "max_tokens": (5, {}),
    "feedback": ("imitation", dict(states="teacher")),
    "route": ("policy_gradient", {}),
    "divergence": ("forward_kl", {}),
    "beta": (0.1, dict(divergence="jsd")),
    "baseline": ("leave_one_out", dict(method="reinforce", baseline="none")),
    "support": ("teacher", dict(top_k=2)),
    "top_k": (3, dict(support="student")),
    "tail": ("generalised", dict(support="student", top_k=2)),
    "gamma": (0.5, dict(route="policy_gradient")),
    "gae_lambda": (0.5, dict(method="gae_opd", steps=7)),
    "negative": ("route", dict(route="policy_gradient")),
    "rho": (0.5, dict(method="cr_opd")),
    "min_prob": (0.5, dict(method="cr_opd")),
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
    "diagnose_every": "test_training.test_diagnosed_steps_are_the_ones_asked_for",
    "extrapolate": "test_extrapolation.test_it_triggers_at_powers_of_two",
    "engine": "test_engines.test_training_with_vllm_learns_like_transformers",
    "checkpoint_every": "test_training.test_resume_after_sigkill",
}


def fingerprint(**fields):
    """Losses, texts and weights after a few steps."""
    return steps_of(opd.Config.load(**{**BASE, **fields}))


@functools.cache
def steps_of(config):
    """Many fields are compared with one and the same run."""
    world = opd.load_world(config)
    config = config.model_copy(update=dict(max_tokens=world.task.max_tokens))
    optimizer = opd.make_optimizer(config, world)
    rows = [opd.train_step(config, world, optimizer, step) for step in range(config.steps)]
    seen = [[r["loss"], r["tokens_trained"], r["lr"]] for r in rows]
    weights = sum(p.double().abs().sum().item() for p in world.student.parameters())
    return seen, weights


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
