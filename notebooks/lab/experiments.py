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
from .geometry import foresight
from .plots import interval, rows_of
from .recipes import gradient_noise
from .reports import check

TUNING_SEEDS = (100, 101)
MEASURED = ("kl", "entropy", "unsupported", "gated", "weight")  # of the last steps
DIAGNOSIS = ("agreement", "teacher_mass", "overlap", "overlap_mass", "overlap_mass_teacher")
DIAGNOSIS += ("overlap_advantage", "entropy_gap")


def load_spec(path: str | Path) -> dict[str, Any]:
    """A comparison: {"about", "base": fields, "variants": name -> fields, "lr": grid}, all needed.

    A variant may carry its own "lr" grid.  "choose": "kl" takes the learning rate with the lowest
    KL to the teacher instead of the best accuracy; "measure": noise, foresight, diagnosis, check or
    entropy, see run_one.
    InputError names what is missing.  The fields are looked at only by what has to run: `compare`
    reads complete results whatever their fields.
    """
    try:
        given = json.loads(Path(path).read_text())
        spec = {key: given[key] for key in ("about", "base", "variants", "lr")}
        spec |= dict(choose=given.get("choose", "accuracy"), measure=given.get("measure"))
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
    """The Config of one run, and the hooks of its method where that is a rule of RULES."""
    given = dict(fields)
    rule = rules.RULES.get(given.get("method"))
    if rule is None:
        return opd.Config.load(**given), {}
    given.pop("method")
    own, hooks = rule()
    return opd.Config.load(**{**own, **given}), hooks


def gigaflop(row: dict[str, Any]) -> float:
    """All floating point operations up to this row of metrics.jsonl, in 1e9."""
    return (row["flop_sample"] + row["flop_score"] + row["flop_update"]) / 1e9


CHECKED = ("student", "teacher", "gain", "agreement", "teacher_mass", "overlap", "kl", "horizon")


def build(name: str) -> None:
    """Make the model runs/build-NAME/model by tiny_configs/build/NAME.json, if it is not there.

    The model is saved once more in half precision, as the shipped ones are.  The synonym models
    learn from soft labels, by tiny_configs/build/soft_labels.py.
    """
    folder, here = Path(name).parent, opd.HERE / "tiny_configs/build"
    if not folder.name.startswith("build-") or folder.exists():
        return
    config, hooks = opd.Config.load(here / f"{folder.name[6:]}.json"), {}
    build(config.student)
    if config.task.startswith("synonyms"):
        hooks = runpy.run_path(str(here / "soft_labels.py"))["soft_labels"](config.task)
    if not folder.exists():
        run = opd.train(config, **hooks)
        run.model.half().save_pretrained(run.dir / "model")


def run_one(fields: dict[str, Any], extra: str | None = None) -> dict[str, Any]:
    """One run: its fields, test accuracy, costs, and a curve.

    A row of the curve: step, tokens sampled, seconds of the steps without validation, validation
    accuracy, GFLOP.  metrics: means over the last five steps, GFLOP in all, and what `extra` adds:
    noise, of one batch's gradient at the start over the norm of the mean (8 batches); foresight;
    diagnosis, means of the first and the last five steps; check, what `lab.check` said before;
    or the student's entropy at the end, on its text after validation prompts.
    Every step is diagnosed where there is an `extra`, else as the fields say: means are over the
    steps that are.
    """
    torch.set_num_threads(1)
    config, hooks = config_of({**(dict(diagnose_every=1) if extra else {}), **fields})
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run = opd.train(config.model_copy(update=dict(runs=folder)), **hooks)
        rows = rows_of(run)
    spent = itertools.accumulate(r["sample_s"] + r["score_s"] + r["update_s"] for r in rows)
    curve = [
        [r["step"], r["tokens_sampled"], round(s, 2), r["accuracy"], round(gigaflop(r), 2)]
        for r, s in zip(rows, spent, strict=True) if r["accuracy"] is not None
    ]  # fmt: skip
    before, after = run.result["student_before"], run.result["student_after"]
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
        world = opd.load_world(config)
        prompts = world.task.prompts(256, "validation")
        noise = torch.rand(256, world.task.max_tokens, generator=opd.keyed_generator("entropy"))
        text = opd.sample(run.model, prompts, horizon=noise.shape[1], noise=noise, **world.vocab)
        with torch.no_grad():
            values = opd.entropy(opd.score(run.model, text))
        metrics["entropy, ordinary prompts"] = round(opd.masked_mean(values, text.mask).item(), 5)
    return dict(fields=fields, **at_end, tokens=run.result["tokens"], curve=curve, metrics=metrics)


def mean_of(rows: list[dict], key: str) -> float:
    """The mean over the rows that have this key's value."""
    return mean(row[key] for row in rows if row[key] is not None)


def results_file(path: str | Path) -> Path:
    """Where a spec's per-seed results are: SPEC.results.json beside it."""
    return Path(path).with_suffix(".results.json")


def compare(path: str | Path, seeds: int = 5, workers: int = 2) -> dict[str, dict[str, Any]]:
    """Run what is missing of a spec, keep every result beside it, and return variant -> summary.

    Each variant gets the learning rate with the best final validation accuracy on two tuning seeds
    (ties: the best mean over the curve; or see load_spec), then `seeds` fresh seeds, evaluated on
    test prompts.  A method may be a rule of RULES.  InputError: fields of a run that is missing.
    """
    spec, file = load_spec(path), results_file(path)
    names, done = list(spec["variants"]), json.loads(file.read_text()) if file.exists() else []

    def found(fields: dict) -> dict | None:
        return next((d for d in done if d["fields"] == fields), None)

    def keep(result: dict) -> None:
        done.append(result)
        ordered = sorted(json.dumps(each, sort_keys=True) for each in done)
        opd.write_file(file, "[\n" + ",\n".join(ordered) + "\n]\n")

    def missing_of(name_lr_seed: list[tuple]) -> list[dict]:
        missing = [f for f in (fields_of(spec, *each) for each in name_lr_seed) if not found(f)]
        for fields in missing:
            config_of(fields)  # raises InputError
        return missing

    def run(name_lr_seed: list[tuple]) -> None:
        missing = missing_of(name_lr_seed)
        for fields in missing:
            build(fields.get("student") or "")
            build(fields.get("teacher") or "")
        if not missing:
            return
        job = partial(run_one, extra=spec["measure"])
        with tqdm(total=len(missing), desc=file.stem, disable=None) as bar:
            for result in in_processes(job, missing, workers):
                keep(result)
                bar.update()

    def quality(name: str, lr: float) -> tuple[float, float]:
        tuning = [found(fields_of(spec, name, lr, seed)) for seed in TUNING_SEEDS]
        if spec["choose"] == "kl":
            return -mean(t["metrics"]["kl"] for t in tuning), 0.0
        curves = [t["curve"] for t in tuning]
        return mean(c[-1][3] for c in curves), mean(row[3] for c in curves for row in c)

    grids = {n: grid_of(spec, n) for n in names}
    choice = [(n, lr) for n, grid in grids.items() if len(grid) > 1 for lr in grid]
    missing_of([(n, g[0], 0) for n, g in grids.items() if len(g) == 1])  # before anything runs
    run([(n, lr, seed) for n, lr in choice for seed in TUNING_SEEDS])
    best = {n: max(g, key=partial(quality, n)) if len(g) > 1 else g[0] for n, g in grids.items()}
    run([(n, best[n], seed) for n in names for seed in range(seeds)])
    runs = {n: [found(fields_of(spec, n, best[n], seed)) for seed in range(seeds)] for n in names}
    return {n: summary_of(runs[n], runs[names[0]], grid_of(spec, n)) for n in names}


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
