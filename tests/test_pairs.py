"""Every two values of two update variables: they train together, or Config says which cannot."""

import dataclasses
import itertools
import math
from collections import Counter

import pytest
import torch

import opd

MODELS = "tiny_configs/models/synonym_"
BASE = dict(  # the better model is the student: some of its texts are right, so rewards differ
    student=f"{MODELS}teacher", teacher=f"{MODELS}student", task="synonyms", batch_size=4,
    max_tokens=13, top_k=8, warmup=0, eval_every=0,
)  # fmt: skip
B = dict(route="policy_gradient")
SUPPORTED = dict(route="direct", support="student")
# variable: what its values other than the default need, and the values
VARIABLES = {
    "states": ({}, ["student", "teacher", "data"]),
    "student_share": (dict(states="data"), [0.0, 0.5]),
    "keep": ({}, ["all", "right"]),
    "feedback": ({}, ["teacher", "verifier", "imitation"]),
    "route": ({}, ["direct", "policy_gradient"]),
    "divergence": ({}, ["reverse_kl", "forward_kl", "jsd"]),
    "beta": (dict(divergence="jsd"), [0.5, 0.1]),
    "support": ({}, ["full", "student", "teacher", "union", "intersection"]),
    "tail": (SUPPORTED, ["stop_gradient", "generalised", "renormalise", "bucket"]),
    "gamma": (B, [0.0, 0.5, 1.0]),
    "baseline": (B | dict(samples_per_prompt=2), ["none", "leave_one_out", "kl", "value"]),
    "negative": (B, ["suppress", "route"]),
    "rho": (B | dict(negative="route"), [1.0, 0.5]),
    "aggregation": ({}, ["token", "sequence_sum", "sequence_mean"]),
    "samples_per_prompt": ({}, [1, 2]),
    "updates_per_rollout": ({}, [1, 2]),
    "micro_batch": ({}, [None, 3]),
    "temperature": ({}, [1.0, 0.7]),
    "top_p": ({}, [1.0, 0.9]),
    "schedule": ({}, ["fixed", "linear", "staircase"]),
    "horizon_start": (dict(schedule="linear"), [6, 2]),
    "extrapolate": ({}, ["none", "accuracy"]),
    "horizon": ({}, [None, 5, 0.5]),
}


def needs(variable, value):
    """What a value needs to have an effect, where the pair does not say otherwise."""
    if value == opd.Config.model_fields[variable].default:
        return {}
    if value == "imitation":
        return dict(states="teacher")
    return B if value == "verifier" else VARIABLES[variable][0]


def cases(first):
    """(fields, names) of every pair of a variable's values with a later variable's.

    names: the two variables and what they need, of which a refusal must name one.
    """
    order = list(VARIABLES)
    for second in order[order.index(first) + 1 :]:
        for one, other in itertools.product(VARIABLES[first][1], VARIABLES[second][1]):
            given = {first: one, second: other}
            needed = needs(first, one) | needs(second, other)
            yield needed | given, {*needed, *given}


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
    world = opd.load_world(opd.Config.load(**BASE))
    first = {name: p.detach().clone() for name, p in world.student.named_parameters()}
    return world, first, set()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(opd, "VALUE_WARMUP", 0)
    monkeypatch.setattr(opd, "EXTRAPOLATE_PROMPTS", 2)


@pytest.mark.parametrize("variable", list(VARIABLES)[:-1])
def test_any_two_variables_train_together_or_one_is_refused_by_name(variable, shared):
    world, first, done = shared
    for fields, names in cases(variable):
        config = accepted(fields, names)
        if config is None or config in done:
            continue
        done.add(config)  # most pairs with a default are the same run
        world.student.load_state_dict(first, strict=False)  # tied weights have one name
        critic = torch.nn.Linear(world.student.config.hidden_size, 1)
        now = dataclasses.replace(world, critic=critic if config.baseline == "value" else None)
        row = opd.train_step(config, now, opd.make_optimizer(config, now), 0)
        if config.extrapolate != "none":
            score_of = opd.candidate_score(config, now, row)
            assert 0 <= opd.extrapolate(now.student, first, score_of, tries=1) <= 1
        assert math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]), fields
        assert row["length"] > 0 and row["tokens_trained"] > 0, fields
        moved = [not torch.equal(p, first[name]) for name, p in world.student.named_parameters()]
        assert all(bool(torch.isfinite(p).all()) for p in world.student.parameters()), fields
        nothing = row["correct"] == 0 and (config.keep == "right" or config.feedback == "verifier")
        even = config.baseline == "leave_one_out"  # a prompt's two samples may be one text
        assert any(moved) != nothing or even, fields


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
    config = config.model_copy(update=dict(max_tokens=world.task.max_tokens))
    kept = []

    def keep(c, world, optimizer, step):
        kept.append(torch.cat([p.grad.flatten().double() for p in world.student.parameters()]))
        return 0.0

    monkeypatch.setattr(opd, "update_student", keep)
    opd.train_step(config, world, opd.make_optimizer(config, world), 3)
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
