"""The first edition's numbers: the first step of every method and of its variants, recorded.

golden_first.json holds, for each case, what commit 5c57ce0 gave: for each update of a step the
gradient's norm and its product with a fixed random vector, and the step's row.  The same step must
come out to 1e-5 here, but for what DIFFERENT lists.  The six methods and three terms that became
rules are read from notebooks/lab.
"""

import json
from pathlib import Path

import lab
import pytest
import torch

import opd

FIRST = json.loads((Path(__file__).parent / "golden_first.json").read_text())
SMALL = dict(batch_size=16, warmup=0, decay=0.0, eval_every=0, diagnose_every=1)
TERMS = {"reference_kl", "entropy_bonus", "importance_cap"}  # recorded as fields; now rules too
NEW = {"soft_log", "power_opd", "clipped", "veto", "kdrl", "rg_opd", "opsa"}  # since then
MIXED = ("gkd", "mixed teacher")  # the student writes whole batches; it wrote some rows of each

# By their first value in the case's name.  What is not compared, and why.
RATIO = "route B's loss is -ratio A; it was -A log p, with the same gradient at the first update"
SECOND = "the ratio is on in every update; vOPD's baseline follows p"
GENERALISED = "the old stop_gradient, now called generalised, had another value, with its gradient"
JUDGED = "the reward is what judged: a rule's advantage, right and wrong; it was the log-ratio"
TILTED = "the KL is to the teacher; it was to the tilted teacher"
WARM = "reported at temperature 1; it was at the run's"
BEFORE = {"vopd", "importance_cap", "gae_opd", "gae_opd late", "reinforce"}
BEFORE |= {"opd_plus", "exopd", "aopd", "eopd", "iw_opd"}
DIFFERENT = [  # methods (None: all), variants (None: all), keys, why
    (BEFORE, None, {"loss"}, RATIO),
    (BEFORE, {"two updates"}, {"second update"}, SECOND),
    ({"prune_opd"}, None, {"loss"}, GENERALISED),
    ({"opd_plus", "reinforce"}, None, {"reward"}, JUDGED),
    ({"exopd"}, None, {"kl"}, TILTED),
    (None, {"temperature"}, {"kl", "entropy"}, WARM),
    ({"opd_full", "rethinking_topk", "prune_opd", "topd", "popd", "prefix", "effopd", "kd",
      "sft"}, {"temperature"}, {"reward"}, WARM),
]  # fmt: skip


def settings(name):
    """The fields and hooks of a recorded case in this edition."""
    fields, hooks = dict(FIRST[name]["fields"]), {}
    fields.pop("reference", None)  # where there is one: the student's start
    method = fields.get("method")
    rule = next((term for term in TERMS if term in fields), method)
    if rule in lab.RULES:
        value = [fields.pop(rule)] if rule in TERMS else []
        own, hooks = lab.RULES[rule](*value)
        fields = own | fields
        if rule == method:
            fields["method"] = own.get("method", "opd_full")
    if method == "prune_opd":
        fields["tail"] = "generalised"  # its gradient; what is called stop_gradient has another
    return fields, hooks


def step_of(name):
    """The row of a case's step, and [gradient norm, product with a fixed vector] of each update."""
    fields, hooks = settings(name)
    config = opd.Config.load(**SMALL | fields)
    world = opd.load_world(config)
    config = config.model_copy(update=dict(max_tokens=world.task.max_tokens))
    optimizer, updates = opd.make_optimizer(config, world), []
    clip = torch.nn.utils.clip_grad_norm_

    def watched(parameters, most):
        dot = 0.0
        for key, p in world.student.named_parameters():
            g = opd.keyed_generator("golden", key)
            fixed = torch.randn(p.shape, generator=g, dtype=torch.float64)
            dot += float((p.grad.double() * fixed).sum())
        norm = clip(parameters, most)
        updates.append([float(norm), dot])
        return norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
        row = opd.train_step(config, world, optimizer, FIRST[name]["step"], **hooks)
    return row | dict(tokens=row["tokens_trained"]), updates


def close(now, then):
    """The same null, or numbers within 1e-5, above 1 relatively."""
    if None in (now, then):
        return now is then
    return abs(now - then) <= 1e-5 * max(1, abs(then))


def excused(name):
    """The keys of a case that differ by design."""
    method, variant = [*name.split(", "), "plain"][1:3]
    return {
        key
        for methods, variants, keys, _ in DIFFERENT
        if (methods is None or method in methods) and (variants is None or variant in variants)
        for key in keys
    }


@pytest.mark.parametrize("name", [name for name in FIRST if not any(x in name for x in MIXED)])
def test_the_step_is_the_first_editions(name):
    first, differ = FIRST[name], excused(name)
    row, updates = step_of(name)
    assert len(updates) == len(first["updates"])
    for i, (now, then) in enumerate(zip(updates, first["updates"], strict=True)):
        same = all(map(close, now, then))
        assert same != ("second update" in differ and i == 1), (i, now, then)
    for key, then in first["row"].items():
        excuse = key in differ and row[key] is not None and then != 0  # one that is needed
        assert close(row[key], then) != excuse, (key, row[key], then)


def test_what_is_not_compared():
    """It learns from other texts: a batch is the student's, or none of its rows is."""
    for step in range(8):
        config = opd.Config.load(method="gkd", **SMALL)
        world = opd.load_world(config)
        config = config.model_copy(update=dict(max_tokens=world.task.max_tokens))
        drawn = opd.write(config, world, step, 53)[1].logprobs.isfinite().any(1)
        assert len({*drawn.tolist()}) == 1


def test_every_method_and_rule_is_recorded_in_every_variant():
    known = {*opd.METHODS, *lab.RULES} - {*TERMS} - NEW
    variants = ["plain", "two updates", "micro-batch", "temperature"]
    assert FIRST.keys() >= {f"chain, {name}, {variant}" for name in known for variant in variants}
    assert FIRST.keys() >= {f"synonyms, {name}, plain" for name in known}
    assert FIRST.keys() >= {f"{task}, {term}" for term in TERMS for task in ("chain", "synonyms")}
