"""Comparisons: learning rates on tuning seeds and validation prompts, results on fresh seeds."""

import contextlib
import io
import itertools
import json
import multiprocessing
import runpy
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tqdm import tqdm

import opd

from . import rules
from .geometry import entropy_of, foresight, gradient_noise
from .plots import interval, rows_of
from .recipes import with_recipe
from .reports import check

EDITION = 2  # of the results: opd.py as it is now
TUNING_SEEDS = (100, 101)
MEASURED = ("kl", "entropy", "unsupported", "gated", "weight")  # of the last steps
DIAGNOSIS = ("agreement", "teacher_mass", "overlap", "overlap_mass", "overlap_mass_teacher")
DIAGNOSIS += ("overlap_advantage", "entropy_gap")


def load_spec(path: str | Path) -> dict[str, Any]:
    """A comparison: {"about", "base": fields, "variants": name -> fields, "lr": grid}, all needed.

    A variant may carry its own "lr" grid.  "choose": see best_rates; "measure": see run_one;
    "says": what the results show, in words.
    InputError names what is missing.  Only what has to run looks at the fields.
    """
    try:
        given = json.loads(Path(path).read_text())
        spec = {key: given[key] for key in ("about", "base", "variants", "lr")}
        spec |= dict(choose=given.get("choose", "accuracy"), measure=given.get("measure"))
        spec |= dict(says=given.get("says", ""))
    except (OSError, ValueError) as error:
        raise opd.InputError(f"spec = {str(path)!r}: not a readable JSON file ({error})") from None
    except (KeyError, TypeError) as error:
        why = f"needs about, base, variants, lr; no {error}"
        raise opd.InputError(f"spec = {str(path)!r}: {why}") from None
    return spec


def grid_of(spec: dict[str, Any], name: str) -> list[float]:
    """The learning rates tried for a variant."""
    return spec["variants"][name].get("lr", spec["lr"])


def fields_of(spec: dict[str, Any], name: str, lr: float, seed: int) -> dict[str, Any]:
    """The Config fields of one run."""
    return {**spec["base"], **spec["variants"][name], "lr": lr, "seed": seed}


def config_of(fields: dict[str, Any]) -> tuple[opd.Config, dict[str, Callable]]:
    """The Config of one run, and the hooks of its method where that is a rule of RULES.

    fields: Config's, and "rule", the rule's own arguments, and "recipe", which is left out here.
    """
    given = {name: value for name, value in fields.items() if name not in ("rule", "recipe")}
    rule = rules.RULES.get(given.get("method"))
    if rule is None:
        return opd.Config.load(**given), {}
    given.pop("method")
    own, hooks = rule(**fields.get("rule", {}))
    return opd.Config.load(**{**own, **given}), hooks


def gigaflop(row: dict[str, Any]) -> float:
    """All floating point operations up to this row of metrics.jsonl, in 1e9."""
    return (row["flop_sample"] + row["flop_score"] + row["flop_update"]) / 1e9


build = runpy.run_path(str(opd.HERE / "tiny_configs/build/build.py"))["build"]
CHECKED = ("student", "teacher", "gain", "agreement", "teacher_mass", "overlap", "kl", "horizon")
COUNTED = ("step", "tokens_sampled", "flop_sample", "flop_score", "flop_update")


def rows_through(runs: list[opd.Run]) -> list[dict]:
    """The metrics of runs that follow each other, as of one: steps and costs go on."""
    rows = []
    for run in runs:
        start = dict.fromkeys(COUNTED, 0) | {key: rows[-1][key] for key in COUNTED if rows}
        rows += [row | {key: row[key] + start[key] for key in COUNTED} for row in rows_of(run)]
    return rows


def run_one(fields: dict[str, Any], extra: str | None = None) -> dict[str, Any]:
    """One run, by its rule and recipe: its fields, test accuracy, costs, and a curve.

    A row of the curve: step, tokens sampled, seconds of the steps without validation, validation
    accuracy, GFLOP.  metrics: means over the last five steps, GFLOP in all, and what `extra` adds:
    noise, of one batch's gradient at the start over the norm of the mean (8 batches); foresight;
    diagnosis, means of the first and the last five steps; check, what `lab.check` said before;
    or the student's entropy at the end, on its text after validation prompts.
    """
    torch.set_num_threads(1)
    config, hooks = config_of(dict(diagnose_every=1) | fields)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        here = config.model_copy(update=dict(runs=folder))
        runs = with_recipe(here, fields.get("recipe", {}), **hooks)
        rows, run = rows_through(runs), runs[-1]
    spent = itertools.accumulate(r["sample_s"] + r["score_s"] + r["update_s"] for r in rows)
    curve = [
        [r["step"], r["tokens_sampled"], round(s, 2), r["accuracy"], round(gigaflop(r), 2)]
        for r, s in zip(rows, spent, strict=True) if r["accuracy"] is not None
    ]  # fmt: skip
    before, after = runs[0].result["student_before"], run.result["student_after"]
    at_end = dict(accuracy=after["accuracy"], greedy=after["greedy"], before=before["accuracy"])
    seen = [key for key in MEASURED if rows[-1][key] is not None]
    metrics = {key: round(mean_of(rows[-5:], key), 5) for key in seen}
    metrics["GFLOP"] = round(gigaflop(rows[-1]), 2)
    if extra == "foresight":
        metrics |= {k: round(v, 4) for k, v in foresight(fields, run).items()}
    if extra == "noise":
        signal, spread = gradient_noise(config, 8, **hooks)
        metrics["noise"] = round(spread / signal, 3)
    if extra == "diagnosis":
        parts = dict(first=rows[:5], last=rows[-5:])
        metrics = {f"{key}, {when}": round(mean_of(part, key), 4)
                   for key in DIAGNOSIS for when, part in parts.items()}  # fmt: skip
    if extra == "check":
        verdict = check(config)
        metrics = {k: round(verdict.numbers[k], 4) for k in CHECKED}
        at_end |= dict(decision=verdict.decision, teacher=run.result["teacher"]["accuracy"])
    if extra == "entropy":
        metrics["entropy, ordinary prompts"] = round(entropy_of(config, run.model), 5)
    tokens = {key: sum(each.result["tokens"][key] for each in runs) for key in run.result["tokens"]}
    found = dict(edition=EDITION, fields=fields, **at_end, tokens=tokens)
    return found | dict(curve=curve, metrics=metrics)


def mean_of(rows: list[dict], key: str) -> float:
    """The mean over the rows that have this key's value."""
    return mean(row[key] for row in rows if row[key] is not None)


def results_file(path: str | Path) -> Path:
    """Where a spec's per-seed results are: SPEC.results.json beside it."""
    return Path(path).with_suffix(".results.json")


def result_of(done: list[dict], fields: dict[str, Any]) -> dict[str, Any]:
    """The result with these fields.  InputError: it has not been run."""
    found = next((result for result in done if result["fields"] == fields), None)
    opd.require(found, f"no result for {fields}; run `python notebooks/lab compare SPEC.json`")
    return found


def best_rates(spec: dict[str, Any], done: list[dict]) -> dict[str, float]:
    """Variant -> learning rate: the best final validation accuracy on the tuning seeds.

    Ties: the best mean over the curve.  "choose": "kl" in the spec takes the lowest KL instead.
    """

    def quality(name: str, lr: float) -> tuple[float, float]:
        tuning = [result_of(done, fields_of(spec, name, lr, seed)) for seed in TUNING_SEEDS]
        if spec["choose"] == "kl":
            return -mean(t["metrics"]["kl"] for t in tuning), 0.0
        curves = [t["curve"] for t in tuning]
        return mean(c[-1][3] for c in curves), mean(row[3] for c in curves for row in c)

    grids = {name: grid_of(spec, name) for name in spec["variants"]}
    return {n: max(g, key=partial(quality, n)) if len(g) > 1 else g[0] for n, g in grids.items()}


def evidence(path: str | Path, seeds: int = 5) -> dict[str, dict[str, Any]]:
    """What a spec's results say, variant -> summary_of its seeds; nothing is run.

    InputError: a result is missing.
    """
    spec, done = load_spec(path), json.loads(results_file(path).read_text())
    rates = best_rates(spec, done)
    runs = {
        name: [result_of(done, fields_of(spec, name, lr, seed)) for seed in range(seeds)]
        for name, lr in rates.items()
    }
    first = next(iter(runs.values()))
    return {name: summary_of(runs[name], first, grid_of(spec, name)) for name in runs}


def compare(path: str | Path, seeds: int = 5, workers: int = 2) -> dict[str, dict[str, Any]]:
    """Run what is missing of a spec, keep every result beside it, and return its `evidence`.

    First every learning rate of a grid on two tuning seeds, then the best one of each variant on
    `seeds` fresh seeds, evaluated on test prompts.  A method may be a rule of RULES.
    InputError: fields of a run that is missing; results of another edition.
    """
    spec, file = load_spec(path), results_file(path)
    done = json.loads(file.read_text()) if file.exists() else []
    old = [result for result in done if result.get("edition") != EDITION]
    opd.require(not old, f"{file}: {len(old)} results of an old edition; delete it")
    grids = {name: grid_of(spec, name) for name in spec["variants"]}

    def missing(runs: list[tuple]) -> list[dict]:
        wanted = [fields_of(spec, *each) for each in runs]
        return [fields for fields in wanted if fields not in [result["fields"] for result in done]]

    def run(runs: list[tuple]) -> None:
        fields = missing(runs)
        for each in fields:
            build(each.get("student") or "")
            build(each.get("teacher") or "")
        job = partial(run_one, extra=spec["measure"])
        for result in tqdm(in_processes(job, fields, workers), file.stem, len(fields)):
            done.append(result)
            ordered = sorted(json.dumps(each, sort_keys=True) for each in done)
            opd.write_file(file, "[\n" + ",\n".join(ordered) + "\n]\n")

    for fields in missing([(name, grid[0], 0) for name, grid in grids.items()]):
        config_of(fields)  # InputError before anything runs
    choice = [(name, lr) for name, grid in grids.items() if len(grid) > 1 for lr in grid]
    run([(name, lr, seed) for name, lr in choice for seed in TUNING_SEEDS])
    run([(name, lr, seed) for name, lr in best_rates(spec, done).items() for seed in range(seeds)])
    return evidence(path, seeds)


def in_processes(function: Any, inputs: list, workers: int) -> Any:
    """Yield function(input) for all inputs as they are done; 1 worker: here, in order."""
    if workers == 1:
        yield from map(function, inputs)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            for job in as_completed([pool.submit(function, each) for each in inputs]):
                yield job.result()
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C: what has not begun does not begin


def summary_of(runs: list[dict], first: list[dict], grid: list[float]) -> dict[str, Any]:
    """A variant's accuracy, its difference to the first variant seed by seed, and its costs."""
    lr, gaps = runs[0]["fields"]["lr"], zip(runs, first, strict=True)
    return dict(
        lr=lr, edge=len(grid) > 1 and lr in (min(grid), max(grid)), before=runs[0]["before"],
        accuracy=interval([r["accuracy"] for r in runs]),
        difference=interval([r["accuracy"] - f["accuracy"] for r, f in gaps]),
        tokens=mean(r["tokens"]["sampled"] for r in runs), runs=runs,
        metrics={k: interval([r["metrics"][k] for r in runs]) for k in runs[0].get("metrics", {})},
    )  # fmt: skip
