"""notebooks/lab.py: token heat maps, positions, comparisons that continue where they stopped."""

import json
import math

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


def test_compare_tunes_on_other_seeds_keeps_results_and_continues(run_dir, monkeypatch):
    monkeypatch.setattr(opd, "VALIDATION_PROMPTS", 16)
    path, calls, real = write(run_dir / "spec.json"), [], lab.run_one

    def counted(fields, extra=None):
        calls.append(fields)
        if len(calls) == 4:
            raise KeyboardInterrupt  # the comparison is cut off
        return real(fields, extra)

    monkeypatch.setattr(lab, "run_one", counted)
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
    fake = dict(accuracy=0.5, before=0.1, tokens=dict(sampled=1), curve=[[1, 1, 1.0, 0.5]])
    calls = []
    monkeypatch.setattr(lab, "run_one", lambda f, extra: calls.append(f) or dict(fields=f, **fake))
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


def test_foresight_of_a_run_of_one_step_is_the_run_itself(monkeypatch):
    fields = dict(SPEC["base"], steps=1, lr=1e-2, decay=0.0, batch_size=32, eval_prompts=512)
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


def test_mean_by_position():
    values = torch.tensor([[1.0, 2.0, torch.nan], [3.0, 5.0, torch.nan]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    found = lab.mean_by_position(values, mask)
    assert found[:2].tolist() == [2.0, 2.0] and found[2].isnan()


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


def test_readme_tables_come_from_the_committed_results(monkeypatch):
    readme = (ROOT / "README.md").read_text()
    monkeypatch.setattr(lab, "run_one", None)  # nothing may be missing
    specs = [p for p in (ROOT / "tiny_configs/evidence").glob("*.json") if "results" not in p.name]
    for path in specs:
        assert lab.markdown_table(lab.compare(path, workers=1)) in readme, path.name
