"""lab.reports: what `check` says of the shipped pairs, the self-check, the report of a run."""

import json
import re

import lab
import pytest
import torch
from conftest import ROOT

import opd

pytestmark = pytest.mark.usefixtures("quick")  # none looks at a curve
MODELS = ROOT / "tiny_configs" / "models"
SMALL = dict(batch_size=8, eval_prompts=16, warmup=2)


def ready(**fields):
    config = opd.Config.load(**{**SMALL, **fields})
    world = opd.load_world(config)
    return config.model_copy(update=dict(max_tokens=world.task.max_tokens)), world


# every token's diagnoses


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_diagnosed_is_diagnose_of_every_token_in_its_place(micro_batch, monkeypatch):
    monkeypatch.setattr(opd, "CHUNK_LOGITS", 19 * 20)  # several chunks
    config, world = ready(micro_batch=micro_batch, temperature=0.8)
    prompts, text = opd.write(config, world, 0, config.max_tokens)
    how = dict(temperature=0.8, vocab_size=19)
    with torch.no_grad():
        logp, logq = (opd.score(m, text, **how) for m in (world.student, world.teacher))
    reach = dict(top_k=config.top_k, min_prob=config.min_prob)
    whole = opd.diagnose(*(x.flatten(0, 1) for x in (logp, logq, text.tokens)), **reach)
    found = lab.diagnosed(config, world, text)
    assert found.keys() == whole.keys() and not text.mask.all()
    for name, values in whole.items():
        expected = torch.where(text.mask, values.view_as(text.mask).float(), 0.0)
        assert torch.allclose(found[name], expected, atol=1e-4), name


# check


PAIRS = {
    ("student_hasty", "teacher"): "go",
    ("student_hasty", "teacher_b"): "cold start first",
    ("teacher", "student_hasty"): "other teacher",
}


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_check_on_shipped_pairs(pair):
    student, teacher = (f"tiny_configs/models/{name}" for name in pair)
    verdict = lab.check(opd.Config.load(student=student, teacher=teacher))
    assert verdict.decision == PAIRS[pair]
    n = verdict.numbers
    assert 0 <= n["agreement"] <= 1 and 0 <= n["teacher_mass"] <= 1
    assert n["by_depth"][0]["student"] == n["student"] and n["gain"] >= n["teacher"] - n["student"]


def test_each_threshold_decides(monkeypatch):
    config = opd.Config.load(student=str(MODELS / "student_hasty"))
    monkeypatch.setattr(lab.reports, "CHECK_PROMPTS", 32)
    for key, decision in (("gain", "other teacher"), ("agreement", "cold start first"),
                          ("teacher_mass", "cold start first")):  # fmt: skip
        least = {**lab.reports.CHECK_LEAST, key: 1.1}
        monkeypatch.setattr(lab.reports, "CHECK_LEAST", least)
        assert lab.check(config).decision == decision
        monkeypatch.undo()
        monkeypatch.setattr(lab.reports, "CHECK_PROMPTS", 32)


def test_check_shortens_the_horizon_where_all_later_text_is_foreign(monkeypatch):
    config = opd.Config.load(student="tiny_configs/models/student_novice")
    diagnosed = lab.diagnosed
    monkeypatch.setattr(lab.reports, "CHECK_PROMPTS", 32)

    def foreign_after_20(*args):
        seen = diagnosed(*args)
        for name in ("agreement", "teacher_mass"):
            seen[name][:, 3], seen[name][:, 20:] = 0, 0  # one bad token early does not matter
        return seen

    monkeypatch.setattr(lab.reports, "diagnosed", foreign_after_20)
    verdict = lab.check(config)
    assert verdict.decision == "shorten the horizon" and 18 <= verdict.numbers["horizon"] <= 24


def test_check_refuses_what_it_cannot_ask():
    for teacher in (None, "http://127.0.0.1:9"):
        config = opd.Config.load(method="sft", teacher=teacher)
        with pytest.raises(opd.InputError, match="check needs one, here and not on a server"):
            lab.check(config)


def test_check_writes_nothing_and_repeats(run_dir, monkeypatch):
    monkeypatch.setattr(lab.reports, "CHECK_PROMPTS", 16)
    config = opd.Config.load(batch_size=8, top_k=4)
    one, two = lab.check(config), lab.check(config)
    assert one == two and not [*run_dir.iterdir()]


# self-check


def test_check_of_a_model_with_itself_says_that_the_scores_are_right(monkeypatch):
    monkeypatch.setattr(lab.reports, "CHECK_PROMPTS", 16)
    same = "tiny_configs/models/student_muddled"
    verdict = lab.check(opd.Config.load(student=same, teacher=same, batch_size=8))
    line = verdict.reasons[-1]
    assert line.startswith("self-check, teacher == student: loss") and line.endswith("fine")
    assert verdict.decision == "self-check" and verdict.numbers["kl"] < 1e-6
    other = lab.check(opd.Config.load(batch_size=8))
    assert not any("self-check" in reason for reason in other.reasons)


@pytest.mark.parametrize("both", [False, True], ids=["teacher", "both"])
def test_self_check_notices_a_shift(both, monkeypatch):
    """The classic bug, scores one token late; in both models it cancels in the loss."""
    config, world = ready(teacher="tiny_configs/models/student_hasty")
    assert lab.self_check(config, world).endswith("fine")
    right = opd.score

    def shifted(model, rollout, **how):
        found = right(model, rollout, **how)
        return found if model is world.student and not both else found.roll(1, dims=1)

    monkeypatch.setattr(opd, "score", shifted)
    with pytest.raises(opd.TrainingStopped, match="allowed"):
        lab.self_check(config, world)


def test_a_folder_is_known_by_its_other_names(monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")
    path = "tiny_configs/models/teacher"
    assert lab.same_model(path, str(ROOT / path)) and lab.same_model(path, f"../{path}/")
    assert not lab.same_model(path, "tiny_configs/models/teacher_b")


# the report


def test_the_report_of_a_run(run_dir):
    run = opd.train(opd.Config.load(**SMALL, steps=4, eval_every=2, name="mine"))
    before = {f.name for f in run.dir.iterdir()}
    card = lab.report(run.dir)
    new = {f.name for f in run.dir.iterdir()} - before
    assert new == {"report.md", "report.json", "report.png"}
    assert card == json.loads((run.dir / "report.json").read_text())
    assert card["result"] == run.result and card["config"] == run.config.model_dump()
    text = (run.dir / "report.md").read_text()
    listed = re.findall(r"\w+", " ".join(lab.CHECKLIST.values()))
    elsewhere = {"student", "teacher", "name", "runs"}  # in the table of models, in the title
    assert opd.Config.model_fields.keys() - elsewhere <= {*listed}
    assert all(f"{field} " in text for field in opd.Config.model_fields.keys() - elsewhere)
    fields, _ = zip(*(names.split("|") if "|" in names else (names, "")
                      for names in lab.CHECKLIST.values()), strict=True)  # fmt: skip
    assert {*" ".join(fields).split()} <= opd.Config.model_fields.keys()
    assert lab.UNKNOWN in text and "spread over seeds" in text
    for who in ("student", "teacher"):
        model = opd.load_model(getattr(run.config, who))
        about = (
            f"| {who} | {getattr(run.config, who)}: {model.num_parameters():,} parameters, torch."
        )
        assert about in text
    assert "| rule | none |" in text and "19 tokens, chat template none" in text
    best = max(row["accuracy"] for row in lab.rows_of(run) if row["accuracy"] is not None)
    assert f"best {best:.3f} at step" in text
    sizes = [row["length"] for row in lab.rows_of(run)]
    assert f"mean length {sum(sizes) / 4:.4g}" in text
    assert (run.dir / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert str(run_dir) not in text


def test_the_report_of_a_run_without_steps_and_of_one_without_a_teacher(run_dir):
    run = opd.train(opd.Config.load(**SMALL, steps=0, name="none"))
    assert "none made" in lab.report(run.dir)["checklist"]["validation"]
    run = opd.train(opd.Config.load(**SMALL, steps=1, method="sft", teacher=None, name="sft"))
    assert lab.report(run.dir)["checklist"]["teacher"] == "None: none here"
    assert "| teacher |" in (run.dir / "report.md").read_text()


def test_the_report_names_a_rules_hooks(run_dir):
    run = lab.train("entropy_bonus", **SMALL, steps=1, eval_every=0)
    assert "loss by lab.rules.entropy_bonus" in lab.report(run.dir)["checklist"]["rule"]


def test_a_report_needs_a_finished_run(run_dir):
    (run_dir / "half").mkdir()
    (run_dir / "half/config.json").write_text(opd.Config().model_dump_json())
    for folder in ("half", "nothing"):
        with pytest.raises(opd.InputError, match=f"run = '{folder}': must be a finished run"):
            lab.report(folder)


def test_every_panel_of_the_report_draws_keys_that_a_run_has(run_dir):
    run = opd.train(opd.Config.load(**SMALL, steps=1))
    row = lab.rows_of(run)[0]
    for title, (_, lines) in lab.plots.PANELS.items():
        assert all(row[key] is not None for key in lines), title
