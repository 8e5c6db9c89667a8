"""lab: token heat maps, comparisons that continue where they stopped, the command line."""

import json
import math
import os
import subprocess
import sys

import lab
import pytest
import torch
from conftest import ROOT

import opd

SPEC = {
    "about": "a small comparison",
    "base": dict(steps=2, batch_size=4, eval_prompts=8, eval_every=1, warmup=0),
    "variants": {"A": dict(method="opd_full"), "B": dict(method="opd", lr=[1e-3])},
    "lr": [1e-4, 1e-3],
}


def write(path, **changes):
    path.write_text(json.dumps({**SPEC, **changes}))
    return path


def test_compare_tunes_on_other_seeds_keeps_results_and_continues(run_dir, quick, monkeypatch):
    path, calls, real = write(run_dir / "spec.json"), [], lab.run_one

    def counted(fields, extra=None):
        calls.append(fields)
        if len(calls) == 4:
            raise KeyboardInterrupt  # the comparison is cut off
        return real(fields, extra)

    monkeypatch.setattr(lab.experiments, "run_one", counted)
    with pytest.raises(KeyboardInterrupt):
        lab.compare(path, seeds=2, workers=1)
    assert len(json.loads(lab.results_file(path).read_text())) == 3
    summary = lab.compare(path, seeds=2, workers=1)
    assert len(calls) == 1 + 4 + 4  # A has a choice: two rates, two tuning seeds; two seeds of each
    tuning = [f for f in calls if f["seed"] in lab.TUNING_SEEDS]
    assert {f["seed"] for f in calls if f not in tuning} == {0, 1}
    again = lab.compare(path, seeds=2, workers=1)
    assert len(calls) == 9 and again == summary  # nothing was run twice
    assert summary["B"]["lr"] == 1e-3 and not summary["B"]["edge"] and summary["A"]["edge"]
    runs = json.loads(lab.results_file(path).read_text())
    for name in ("A", "B"):
        mine = [r["accuracy"] for r in runs if r["fields"]["seed"] < 2
                and r["fields"]["method"] == SPEC["variants"][name]["method"]]  # fmt: skip
        assert summary[name]["accuracy"][0] == pytest.approx(sum(mine) / 2)
    table = lab.markdown_table(summary)
    assert table.count("\n") == 3 and "| B | 0.001 |" in table and "minus A" in table
    lab.plot_comparison(summary, "title")


def test_a_changed_spec_runs_again(run_dir, monkeypatch):
    path = write(run_dir / "spec.json")
    fake = dict(edition=lab.EDITION, accuracy=0.5, before=0.1, tokens=dict(sampled=1))
    fake |= dict(curve=[[1, 1, 1.0, 0.5]])
    calls = []
    monkeypatch.setattr(
        lab.experiments, "run_one", lambda f, extra: calls.append(f) or dict(fields=f, **fake)
    )
    lab.compare(path, seeds=1, workers=1)
    first = len(calls)
    write(path, base={**SPEC["base"], "steps": 3})
    lab.compare(path, seeds=1, workers=1)
    assert len(calls) == 2 * first


@pytest.mark.parametrize(
    "changes, message",
    [(dict(base=dict(stepz=3)), "stepz"), (dict(lr=[-1.0]), "lr = -1.0"),
     (dict(variants={"A": dict(method="magic")}), "magic")],
)  # fmt: skip
def test_a_bad_spec_is_one_line_before_anything_runs(changes, message, run_dir):
    with pytest.raises(opd.InputError, match=message):
        lab.compare(write(run_dir / "spec.json", **changes), workers=1)
    (run_dir / "half.json").write_text('{"base": {}}')
    for name, expected in (("half.json", "needs about, base"), ("none.json", "not a readable")):
        with pytest.raises(opd.InputError, match=expected):
            lab.load_spec(run_dir / name)


def test_gradient_noise_takes_no_step_and_is_less_for_the_whole_vocabulary():
    fields = dict(SPEC["base"], batch_size=8, student="tiny_configs/models/student_novice")
    noise = {}
    for method in ("opd", "opd_full"):
        signal, spread = lab.gradient_noise(opd.Config.load(method=method, **fields), batches=4)
        noise[method] = spread / signal
    assert noise["opd_full"] < noise["opd"]
    once, again = (lab.gradient_noise(opd.Config.load(**fields), batches=2) for _ in range(2))
    assert once == again


def test_foresight_of_a_run_of_one_step_is_the_run_itself(quick):
    fields = dict(SPEC["base"], steps=1, lr=1e-2, decay=0.0, batch_size=32, eval_prompts=128)
    found = lab.run_one(fields, "foresight")["metrics"]
    assert found["alignment"] == pytest.approx(1, abs=1e-3)
    assert found["early_norm"] == found["norm"] > 0
    assert found["recovered"] == pytest.approx(1, abs=0.02)


def test_cost_to_an_accuracy_reads_the_first_time_it_is_reached():
    def runs(*accuracies):
        return dict(runs=[dict(curve=[[i, 10 * i, 0, a, i] for i, a in enumerate(accuracies)])] * 2)

    table = lab.cost_to({"A": runs(0.1, 0.6, 0.5), "B": runs(0.1, 0.2, 0.3)}, 0.5)
    assert "| A | 1.0 ± 0.0 | 10 | 0.0 | 1.0 ± 0.0 |" in table
    assert "| B | not all: 0 of 2 seeds | | | |" in table


def test_tree_is_exact():
    tree = lab.Tree(size=3, length=3, seed=2)
    assert tree.weights().sum().item() == pytest.approx(1, abs=1e-12)
    logp, logq = tree.laws()
    chain_rule = (tree.weights()[:, None] * opd.reverse_kl(logp, logq)).sum()
    assert tree.sequence_kl().item() == pytest.approx(chain_rule.item(), abs=1e-12)
    credit = {gamma: opd.discounted_return(tree.reward(), tree.mask, gamma) for gamma in (0.0, 1.0)}
    for gamma, bias in ((1.0, "bias"), (0.0, "frozen_bias")):
        loss = lambda lp, lq, a, c=credit[gamma]: opd.policy_gradient_loss(  # noqa: E731
            opd.of_tokens(lp, a), c, tree.mask
        )
        found = tree.study(loss)
        assert found[bias] < 1e-12 < found["variance"]
    exact = (tree.weights()[:, None] * credit[1.0]).sum(0)[0].item()
    assert (tree.weights() * tree.value(1.0)[:, 0]).sum().item() == pytest.approx(exact, abs=1e-12)


def test_interval_is_students_t():
    mean, half = lab.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5))
    assert math.isnan(lab.interval([1.0])[1])


def test_show_tokens_escapes_and_colours_by_sign():
    page = lab.show_tokens(
        ["<e>", "a", "b"], torch.tensor([-2.0, 1.0, 0.0]), "title", scale=4.0
    ).data
    assert "&lt;e&gt;" in page and "<e>" not in page and "title" in page
    assert "rgba(230,159,0,0.50)" in page and "rgba(0,114,178,0.25)" in page
    assert "+1.0" in page and ">0.0<" in page and "+0.0" not in page  # 0 has no sign
    assert lab.show_tokens(["a"] * 40, [1.0] * 40).data.count("<table") == 3


def test_committed_evidence_matches_its_specs():
    """Every committed result belongs to its spec, and the table can be made from them alone."""
    specs = [p for p in (ROOT / "tiny_configs/evidence").glob("*.json") if "results" not in p.name]
    assert specs
    for path in specs:
        spec = lab.load_spec(path)
        seeds = (*lab.TUNING_SEEDS, *range(5))
        possible = [
            lab.fields_of(spec, name, lr, seed)
            for name in spec["variants"] for lr in lab.grid_of(spec, name) for seed in seeds
        ]  # fmt: skip
        found = [r["fields"] for r in json.loads(lab.results_file(path).read_text())]
        assert all(f in possible for f in found) and len(found) >= 5 * len(spec["variants"])


def test_evidence_is_read_without_running_or_checking_its_fields(monkeypatch):
    """Also that of an older edition, whose specs name fields that are gone."""
    monkeypatch.setattr(lab.experiments, "run_one", None)  # nothing may be run
    monkeypatch.setattr(opd, "Config", None)
    specs = [p for p in (ROOT / "tiny_configs/evidence").glob("*.json") if "results" not in p.name]
    for path in specs:
        summary = lab.evidence(path)
        assert summary.keys() == lab.load_spec(path)["variants"].keys(), path.name
        assert all(f"| {name} |" in lab.markdown_table(summary) for name in summary)


def test_what_is_missing_of_a_spec_is_refused_by_a_field_that_is_gone(run_dir):
    path = write(run_dir / "spec.json", variants={"A": dict(prompt_pool=64, lr=[1e-3])})
    with pytest.raises(opd.InputError, match="prompt_pool"):
        lab.compare(path, seeds=1, workers=1)


def test_results_of_another_edition_are_not_mixed_with_new_ones(run_dir):
    path = write(run_dir / "spec.json", variants={"A": dict(method="opd", lr=[1e-3])})
    old = dict(fields=lab.fields_of(lab.load_spec(path), "A", 1e-3, 0), accuracy=0.5)
    lab.results_file(path).write_text(json.dumps([old]))
    with pytest.raises(opd.InputError, match="spec.results.json: 1 results of an old edition"):
        lab.compare(path, seeds=2, workers=1)
    with pytest.raises(opd.InputError, match="no result for .*'seed': 1"):
        lab.evidence(path, seeds=2)


# rules, workers


def test_a_rule_is_a_method_of_a_comparison(run_dir, quick):
    """On the command line, from another folder; the same run here ends at the same accuracy."""
    small = dict(SPEC["base"], steps=1, eval_every=1, eval_prompts=4)
    variants = {"OPD": dict(method="opd"), "AOPD": dict(method="aopd")}
    path = write(run_dir / "spec.json", base=small, variants=variants, lr=[1e-3])
    words = ["compare", "spec.json", "--seeds", "1", "--workers", "1"]
    done = command(*words, folder=run_dir)
    assert done.returncode == 0, done.stderr
    assert "a small comparison" in done.stdout and "| AOPD | 0.001 |" in done.stdout
    assert (run_dir / "spec.png").read_bytes()[:4] == b"\x89PNG"
    summary = lab.evidence(path, seeds=1)
    kl = {name: each["metrics"]["GFLOP"] for name, each in summary.items()}
    assert kl["AOPD"] >= kl["OPD"]  # it reads the teacher's whole distribution
    here = lab.run_one(summary["AOPD"]["runs"][0]["fields"], None)
    assert here["accuracy"] == summary["AOPD"]["runs"][0]["accuracy"]


def test_workers_are_processes_of_their_own():
    """Each input once, whichever is done first; an error in one reaches the caller."""
    found = list(lab.experiments.in_processes(math.sqrt, [4.0, 9.0, 16.0], 2))
    assert sorted(found) == [2.0, 3.0, 4.0]
    (pid,) = lab.experiments.in_processes(eval, ["__import__('os').getpid()"], 2)
    assert pid != os.getpid()
    with pytest.raises(ValueError, match="math domain|nonnegative"):
        list(lab.experiments.in_processes(math.sqrt, [-1.0], 2))


@pytest.mark.parametrize("name", sorted(lab.RULES))
def test_the_config_and_hooks_of_a_rule(name):
    config, hooks = lab.config_of(dict(method=name, steps=3, seed=7))
    own, same = lab.RULES[name]()
    assert hooks.keys() == same.keys() and config.steps == 3 and config.seed == 7
    assert all(getattr(config, field) == value for field, value in own.items())
    assert lab.config_of(dict(method="opd", steps=3)) == (opd.Config(method="opd", steps=3), {})


@pytest.mark.parametrize("extra", ["noise", "diagnosis", "check", "entropy"])
def test_what_a_run_measures_besides(extra, quick, monkeypatch):
    monkeypatch.setattr(lab.reports, "CHECK_PROMPTS", 16)
    fields = dict(SPEC["base"], method="iw_opd", steps=3, eval_every=3)
    metrics = lab.run_one(fields, extra)["metrics"]
    if extra == "noise":
        config, hooks = lab.config_of(fields)
        signal, spread = lab.gradient_noise(config, 8, **hooks)
        assert metrics["noise"] == pytest.approx(spread / signal, abs=1e-3)
    if extra == "diagnosis":
        keys = {f"{key}, {w}" for key in lab.experiments.DIAGNOSIS for w in ("first", "last")}
        assert metrics.keys() == keys
        assert metrics["overlap, first"] == metrics["overlap, last"]  # three steps: the same five
    if extra == "check":
        assert metrics.keys() == {*lab.experiments.CHECKED}
    if extra == "entropy":
        assert 0 < metrics["entropy, ordinary prompts"] < math.log(19)


def test_every_step_is_diagnosed_and_means_are_over_the_last_five(quick, monkeypatch):
    seen, real = [], lab.experiments.rows_of
    monkeypatch.setattr(lab.experiments, "rows_of", lambda run: seen.append(real(run)) or seen[-1])
    fields = dict(SPEC["base"], steps=6, eval_every=3, batch_size=2)
    found = lab.run_one(fields)["metrics"]
    kl = [row["kl"] for row in seen[0]]
    assert found["kl"] == pytest.approx(sum(kl[1:]) / 5, abs=1e-5)
    sparse = lab.run_one(dict(fields, diagnose_every=3))["metrics"]  # the fields win
    kl = [row["kl"] for row in seen[1]]
    assert [value is not None for value in kl] == [False, False, True] * 2
    assert sparse["kl"] == pytest.approx((kl[2] + kl[5]) / 2, abs=1e-5)


# recipes around a run


def test_a_recipe_is_part_of_a_run(run_dir, quick):
    student = "tiny_configs/models/student_muddled"
    fields = dict(SPEC["base"], steps=4, eval_every=2, student=student, lr=1e-3, seed=3)
    plain = lab.run_one(fields)
    cold = lab.run_one(dict(fields, recipe=dict(cold_start=2)))
    assert [point[0] for point in cold["curve"]] == [2, 4]  # steps and costs are counted through
    assert cold["curve"][0][1] < cold["curve"][1][1] == cold["tokens"]["sampled"]
    assert cold["tokens"]["scored"] < cold["tokens"]["sampled"]  # imitation asks for no scores
    assert cold["before"] == plain["before"] and cold["fields"]["recipe"] == dict(cold_start=2)
    assert lab.run_one(dict(fields, recipe=dict(cold_start=4)))["tokens"]["scored"] == 0
    pool = lab.run_one(dict(fields, recipe=dict(pool=4)))
    assert pool["accuracy"] != plain["accuracy"] or pool["metrics"] != plain["metrics"]


@pytest.mark.parametrize(
    "recipe, made",
    [(dict(pool=4), "lab.prompt_pool(task, 4)"),
     (dict(aligned="chain/sums", share=0.5),
      "lab.aligned_prompts(task, opd.load_task('chain/sums', tokenizer), 0.5)"),
     (dict(aligned="confidence"),
      "lab.aligned_prompts(task, opd.load_model('tiny_configs/models/teacher', 'teacher'), 1.0)")],
    ids=str,
)  # fmt: skip
def test_a_recipe_of_prompts_is_a_task_file(recipe, made, run_dir):
    config = opd.Config.load(**dict(SPEC["base"], steps=1), runs=str(run_dir))
    (run,) = lab.with_recipe(config, recipe)
    assert run.config.task == str(run_dir / "task.py")
    assert f"return {made}" in (run_dir / "task.py").read_text()


def test_an_unknown_recipe_is_refused():
    with pytest.raises(opd.InputError, match="recipe = .'cook'.: must be pool, aligned and share"):
        lab.with_recipe(opd.Config.load(), dict(cook=3))


def test_a_rule_of_a_comparison_takes_its_own_arguments():
    fields = dict(method="reference_kl", route="direct", steps=3)
    config, hooks = lab.config_of(dict(fields, rule=dict(weight=0.5), recipe=dict(pool=4)))
    assert config.route == "direct" and hooks.keys() == {"judge", "loss"}
    with pytest.raises(TypeError, match="wait"):
        lab.config_of(dict(fields, rule=dict(wait=0.5)))


# models that a comparison needs


def test_build_makes_what_a_model_starts_from_and_saves_in_half_precision(
    run_dir, quick, monkeypatch
):
    from safetensors.torch import load_file

    begun, real = [], opd.train
    few = dict(steps=1, batch_size=4, eval_prompts=4, eval_every=0)

    def short(config, **hooks):
        begun.append((config.name, sorted(hooks)))
        return real(config.model_copy(update=few), **hooks)

    monkeypatch.setattr(opd, "train", short)
    lab.build("runs/build-student_novice/model")
    lab.build("runs/build-student_novice/model")  # it is there
    lab.build("tiny_configs/models/teacher")  # shipped
    assert begun == [("build-student_strong", []), ("build-student_novice", [])]
    assert (run_dir / "runs/build-chain_d48/model/model.safetensors").exists()  # fresh weights
    lab.build("runs/build-synonym_teacher/model")
    assert begun[2] == ("build-synonym_teacher", ["judge", "loss"])
    for name, _ in begun:
        weights = load_file(f"runs/{name}/model/model.safetensors")
        assert all(w.dtype == torch.float16 for w in weights.values())
        assert opd.load_model(f"runs/{name}/model").dtype == torch.float32


# the command line


def command(*words, folder):
    """python notebooks/lab WORDS, from another folder, with nothing on the path."""
    free = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    line = [sys.executable, str(ROOT / "notebooks/lab"), *map(str, words)]
    return subprocess.run(line, cwd=folder, env=free, capture_output=True, text=True)


@pytest.fixture
def main(monkeypatch):
    """The command line in this process."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    import lab.__main__

    return lab.__main__.main


def test_check_on_the_command_line(capsys, monkeypatch, tmp_path, main):
    monkeypatch.setattr(lab.reports, "CHECK_PROMPTS", 16)
    file = tmp_path / "pair.json"
    file.write_text(json.dumps(dict(top_k=4)))
    assert main(["check", str(file), "--batch_size", "8"]) == 0
    out = capsys.readouterr().out
    numbers, _, said = out.partition("\n}\n")
    assert said.startswith("\ngo\n") and "wanted at least 0.3" in said and '"gain"' in numbers
    assert json.loads(numbers + "}")["horizon"] == 53
    assert main(["check", str(file), "--teacher", "none", "--method", "sft"]) == 2
    said = "lab: teacher = None: check needs one, here and not on a server\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    "words, message",
    [(["check", "--stepz", "3"], "stepz = '3': unknown field; see --help"),
     (["check", "--steps", "x"], "steps = 'x'"),
     (["train", "--method", "magic"], "method = 'magic': must be one of opd_plus"),
     (["train"], "--method"), (["report", "none"], "run = 'none': must be a finished run"),
     (["compare", "none.json"], "spec = 'none.json'"), (["fly"], "fly"), ([], "must be check"),
     (["train", "--method", "aopd", "--resume", "x", "--steps", "3"], "resume = 'x'")],
)  # fmt: skip
def test_bad_input_is_one_line_and_code_2(words, message, capsys, run_dir, main):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("lab: ") and said.count("\n") == 1 and message in said
    assert not [*run_dir.iterdir()]


def test_train_and_report_on_the_command_line(run_dir, quick, capsys, main):
    fields = [str(x) for k, v in SPEC["base"].items() for x in (f"--{k}", v)]
    assert main(["train", "--method", "aopd", "--name", "mine", *fields]) == 0
    said = capsys.readouterr().out
    assert "student after" in said and "see runs/mine/curve.png" in said
    told = json.loads((run_dir / "runs/mine/config.json").read_text())
    assert told["hooks"].keys() == {"loss"} and told["steps"] == 2
    assert main(["report", "runs/mine"]) == 0
    assert capsys.readouterr().out == "runs/mine/report.md\n"
    assert "loss by lab.rules.aopd" in (run_dir / "runs/mine/report.md").read_text()


def test_a_run_of_a_rule_goes_on_by_the_same_rule(run_dir, quick, capsys, monkeypatch, main):
    base = dict(SPEC["base"], eval_every=0, steps=3, name="mine", checkpoint_every=1)
    words = ["train", "--method", "aopd"] + [str(x) for k, v in base.items() for x in (f"--{k}", v)]
    step, real = [], opd.train_step

    def stop(*args, **hooks):
        step.append(args)
        if len(step) == 2:
            raise KeyboardInterrupt
        return real(*args, **hooks)

    monkeypatch.setattr(opd, "train_step", stop)
    assert main(words) == 130
    assert main(["train", "--method", "aopd", "--resume", "runs/mine"]) == 0
    rows = [json.loads(line) for line in open("runs/mine/metrics.jsonl")]
    assert [row["step"] for row in rows] == [1, 2, 3]


def test_the_package_stays_small():
    files = [*(ROOT / "notebooks/lab").glob("*.py")]
    lines = {file.name: len(file.read_text().splitlines()) for file in files}
    assert max(lines.values()) <= 250 and sum(lines.values()) <= 2000, lines
    assert not {file.stem for file in files} & {*dir(lab)} - {*lab_modules()}


def lab_modules():
    """The names of lab that are its modules: none hides a function."""
    return {name for name, value in vars(lab).items() if type(value) is type(lab)}
