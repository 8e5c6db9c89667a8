"""Every two values of two update variables: they train together, or Config says which cannot."""

import copy
import dataclasses
import itertools
import math
from collections import Counter

import pytest
import torch

import opd

MODELS = "tiny_configs/models/synonym_"
BASE = dict(
    student=f"{MODELS}student", teacher=f"{MODELS}teacher", task="synonyms", batch_size=4,
    max_tokens=12, top_k=8, warmup=0, eval_every=0,
)  # fmt: skip
B, REFERENCE = dict(route="policy_gradient"), dict(reference="student")
SUPPORTED = dict(route="direct", support="student")
# variable: what its values other than the default need, and the values
VARIABLES = {
    "states": ({}, ["student", "teacher", "data", "mixed"]),
    "feedback": ({}, ["teacher", "law", "verifier", "imitation"]),
    "route": ({}, ["direct", "policy_gradient"]),
    "divergence": ({}, ["reverse_kl", "forward_kl", "jsd"]),
    "support": ({}, ["full", "student", "union", "intersection"]),
    "tail": (SUPPORTED, ["stop_gradient", "generalised", "renormalise", "bucket"]),
    "gamma": (B, [0.0, 0.5, 1.0]),
    "baseline": (B | dict(samples_per_prompt=2), ["none", "leave_one_out", "kl", "value"]),
    "negative": (B, ["suppress", "route", "local_kl"]),
    "weighting": ({}, ["none", "position", "overlap"]),
    "entropy_threshold": ({}, [None, 0.5]),
    "importance_ratio": (B, [False, True]),
    "clip": (B | dict(importance_ratio=True), [None, 0.2]),
    "importance_cap": ({}, [None, 2.0]),
    "reward_scale": (REFERENCE, [1.0, 1.25]),
    "reference_kl": (REFERENCE, [0.0, 0.1]),
    "entropy_bonus": ({}, [0.0, 0.01]),
    "aggregation": ({}, ["token", "sequence_sum", "sequence_mean"]),
    "samples_per_prompt": ({}, [1, 2]),
    "updates_per_rollout": ({}, [1, 2]),
    "temperature": ({}, [1.0, 0.7]),
    "teacher_prefix": ({}, [0, 2]),
    "schedule": ({}, ["fixed", "linear", "staircase", "adaptive"]),
    "horizon_start": (dict(schedule="linear"), [6, 2]),
    "extrapolate": ({}, ["none", "accuracy", "kl"]),
    "horizon": ({}, [None, 5, 0.5]),
    "cold_start": ({}, [0, 1]),
}


def needs(variable, value):
    """What a value needs to have an effect, where the pair does not say otherwise."""
    if value == opd.Config.model_fields[variable].default:
        return {}
    return B if value == "verifier" else VARIABLES[variable][0]


def cases(first):
    """(fields, names) of every pair of a variable's values with a later variable's.

    names: the two variables, and the support beside a tail, which is a part of it.
    """
    order = list(VARIABLES)
    for second in order[order.index(first) + 1 :]:
        names = {first, second} | ({"support"} if "tail" in (first, second) else set())
        for one, other in itertools.product(VARIABLES[first][1], VARIABLES[second][1]):
            given = {first: one, second: other}
            yield needs(first, one) | needs(second, other) | given, names


def accepted(fields, names):
    """The config, or None where it is refused, in one line that names one of these fields."""
    try:
        return opd.Config.load(**BASE, **fields)
    except opd.InputError as error:
        text = str(error)
        assert "\n" not in text and any(f"{name} = " in text for name in names), (fields, text)
        return None


@pytest.fixture(scope="module")
def shared():
    """One world, the student's first weights, and what has run already."""
    world = opd.load_world(opd.Config.load(**BASE, feedback="law"))
    first = copy.deepcopy(world.student.state_dict())
    reference = copy.deepcopy(world.student).requires_grad_(False)
    return world, first, reference, set()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(opd, "EXTRAPOLATE_PROMPTS", 2)
    monkeypatch.setattr(opd, "VALUE_WARMUP", 0)


@pytest.mark.parametrize("variable", list(VARIABLES)[:-1])
def test_any_two_variables_train_together_or_one_is_refused_by_name(variable, shared):
    world, first, reference, done = shared
    first_weights = {name: p.clone() for name, p in reference.named_parameters()}
    for fields, names in cases(variable):
        config = accepted(fields, names)
        if config is None or config in done:
            continue
        done.add(config)  # most pairs with a default are the same run
        world.student.load_state_dict(first)
        critic = torch.nn.Linear(world.student.config.hidden_size, 1)
        now = dataclasses.replace(
            world,
            reference=reference if config.reference else None,
            critic=critic if config.baseline == "value" else None,
        )
        row = opd.train_step(config, now, opd.make_optimizer(config, now), 0, [])
        if config.extrapolate != "none":
            base, score_of = first_weights, opd.candidate_score(config, now, row)
            assert 0 <= opd.extrapolate(now.student, base, score_of, tries=1) <= 1
        assert math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]), fields
        nothing = config.cold_start and row["finished"] == 0  # 12 tokens: no teacher is right
        assert nothing or row["length"] > 0 and row["tokens_trained"] > 0, fields
        weights = [*now.trained().parameters()]
        assert all(bool(torch.isfinite(p).all()) for p in weights), fields
        pairs = zip(world.student.parameters(), reference.parameters(), strict=True)
        moved = any(not torch.equal(p, q) for p, q in pairs)
        silent = nothing or (config.feedback == "verifier" and row["correct"] == 0)
        assert moved or silent, fields


def test_both_happen_and_no_variable_is_always_refused(capsys):
    count, ran = Counter(), Counter()
    for variable in VARIABLES:
        for fields, names in cases(variable):
            runs = accepted(fields, names) is not None
            count["run" if runs else "refused"] += 1
            ran.update({(name, fields.get(name)): runs for name in names})
    with capsys.disabled():
        print(f"\npairs of values: {count['run']} run, {count['refused']} refused")
    assert count["run"] > 500 and count["refused"] > 100
    assert all(
        ran[variable, value] for variable, (_, values) in VARIABLES.items() for value in values
    )


# the methods are not each other

GRADIENT = dict(
    student=f"{MODELS}student",
    teacher=f"{MODELS}teacher",
    task="synonyms",
    batch_size=8,
    steps=8,
    warmup=0,
    decay=0.0,
    eval_every=0,
    grad_clip=1e9,
)


def gradient_of(method, monkeypatch):
    """The gradient of step 4 of 8, where horizons differ too (all weights in one row)."""
    config = opd.Config.load(method=method, **GRADIENT)
    world = opd.load_world(config)
    config = opd.Config(**{**config.model_dump(), "max_tokens": world.task.max_tokens})
    kept = []

    def keep(c, student, optimizer, step, sums):
        kept.append(torch.cat([p.grad.flatten().double() for p in student.parameters()]))
        sums["grad_norm"] = 0.0

    monkeypatch.setattr(opd, "update_student", keep)
    opd.train_step(config, world, opd.make_optimizer(config, world), 3, [])
    return kept[0]


def test_no_method_is_another_ones_gradient(monkeypatch):
    """They differ by far more than rounding, which is below 1e-5 of the gradient.

    All but EffOPD's, which has the gradient of the method that it is joined to.
    """
    gradients = {name: gradient_of(name, monkeypatch) for name in opd.METHODS}
    assert torch.equal(gradients.pop("effopd"), gradients["opd_full"])
    for one, other in itertools.combinations(gradients, 2):
        a, b = gradients[one], gradients[other]
        assert (a - b).norm() > 1e-3 * max(a.norm(), b.norm()), (one, other)
