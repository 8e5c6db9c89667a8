"""§12, recipes: cold start and teacher-aligned prompts; §10: the rarer diagnostics of a run."""

import copy
import json
import random

import pytest
import torch
from conftest import ROOT

import opd

MODELS = "tiny_configs/models/"
SMALL = dict(batch_size=8, eval_prompts=8, eval_every=0, warmup=0)


def ready(**fields):
    config = opd.Config.load(**{**SMALL, **fields})
    world = opd.load_world(config)
    config = config.model_copy(update=dict(max_tokens=world.task.max_tokens))
    return config, world, opd.make_optimizer(config, world)


# cold start


def test_cold_start_imitates_the_teachers_right_responses_and_then_trains_on_policy(monkeypatch):
    muddled = dict(teacher=MODELS + "student_muddled", cold_start=2)  # a third of it is right
    config, world, optimizer = ready(method="opd", **muddled, batch_size=16)
    writers, make, sums = [], opd.sample, []

    def watch(model, *args, **law):
        writers.append("teacher" if model is world.teacher else "student")
        return make(model, *args, **law)

    monkeypatch.setattr(opd, "sample", watch)
    prompts = opd.step_prompts(config, world.task, 0)
    text = opd.make_states(opd.stage(config, 0), world, prompts, 0, 53)
    right = world.task.verify(prompts, text) & text.finished
    assert 0 < right.sum() < 16
    mask = text.mask & right[:, None]
    logp = opd.score_tokens(world.student, text)
    expected = -logp[mask].mean().item()
    writers.clear()
    for step in range(3):
        sums.append(opd.train_step(config, world, optimizer, step, []))
    assert writers == ["teacher", "teacher", "student"]
    assert sums[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert sums[0]["tokens_trained"] == int(mask.sum()) and sums[0]["kl"] is None
    assert sums[0]["correct"] == pytest.approx(world.task.verify(prompts, text).float().mean())
    assert sums[2]["kl"] > 0 and sums[2]["tokens_trained"] > sums[0]["tokens_trained"]


def test_a_cold_start_without_a_right_response_changes_nothing():
    terse = dict(teacher=MODELS + "teacher_long", cold_start=1)  # never right on eight steps
    config, world, optimizer = ready(**terse)
    before = opd.weights_of(world.student)
    row = opd.train_step(config, world, optimizer, 0, [])
    assert row["correct"] == 0 and row["tokens_trained"] == 0 and row["loss"] == 0
    assert all(torch.equal(before[n], p) for n, p in world.student.named_parameters())


def test_a_cold_start_of_all_steps_is_sft_on_the_teachers_text(run_dir):
    fields = dict(SMALL, steps=3, teacher=MODELS + "teacher", student=MODELS + "student_muddled")
    cold = opd.train(opd.Config.load(**fields, cold_start=3))
    sft = opd.train(opd.Config.load(**fields, method="sft", states="teacher"))
    assert sft.result["student_before"] == cold.result["student_before"]
    pairs = zip(cold.model.parameters(), sft.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)  # this teacher is always right


# prompts


def test_aligned_prompts_come_from_the_named_task_in_their_share():
    config, world, _ = ready(aligned="chain/sums", aligned_share=0.75, batch_size=40)
    texts = opd.step_prompts(config, world.task, 3).text
    assert sum("*" not in text for text in texts[:30]) == 30
    assert sum("*" in text for text in texts[30:]) >= 8  # 1 - (2/3)^8 of the others have a *
    for split in ("validation", "test"):
        held_out = world.task.prompts(50, split)
        plain = ready()[1].task.prompts(50, split)
        assert held_out.text == plain.text
    assert texts == opd.step_prompts(config, world.task, 3).text
    assert texts != opd.step_prompts(config, world.task, 4).text


def test_confidence_takes_the_prompts_on_which_the_teacher_is_surest():
    config, world, _ = ready(
        aligned="confidence", teacher=MODELS + "student_muddled", batch_size=10
    )
    plain = ready()[1].task
    chosen = world.task.draw(10, "train", random.Random(5))
    rng = random.Random(5)
    pool = plain.draw(40, "train", rng)
    noise = torch.rand(40, 53, generator=opd.keyed_generator(rng.random()))
    prompts = plain.encode(pool)
    text = opd.sample(world.teacher, prompts, horizon=53, noise=noise, **world.law)
    sure = text.logprobs.sum(1) / text.mask.sum(1)
    best = {pool[i] for i in sure.argsort(descending=True)[:10].tolist()}
    assert {*chosen} == best and len(best) == 10


def test_aligned_prompts_use_the_teachers_chat_template(tmp_path):
    folder, file = tmp_path / "teacher", tmp_path / "rows.jsonl"
    opd.load_model(MODELS + "teacher").save_pretrained(folder)
    tokenizer = opd.load_tokenizer(MODELS + "teacher")
    tokenizer.chat_template = "{{ messages[0]['content'] }} ="
    tokenizer.save_pretrained(folder)
    rows = [
        dict(prompt=f"<b> {a} + {b}", answer=(a + b) % 7) for a in range(7) for b in range(1, 7)
    ]
    for row, split in zip(rows, ["train", "validation", "test"] * 14, strict=True):
        row["split"] = split
    file.write_text("\n".join(map(json.dumps, rows)))
    fields = dict(teacher=str(folder), task=str(file), max_tokens=8)
    _, plain, _ = ready(**fields)
    _, aligned, _ = ready(**fields, aligned="confidence")
    assert not any(text.endswith("=") for text in plain.task.prompts(5).text)
    assert all(text.endswith(" =") for text in aligned.task.prompts(5).text)
    assert aligned.tokenizer.chat_template == tokenizer.chat_template


# what a run measures now and then


def test_coherence_and_continuation_stand_at_validations_only(run_dir):
    run = opd.train(opd.Config.load(**{**SMALL, "eval_every": 2}, steps=4))
    rows = [json.loads(line) for line in (run.dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["coherence"] is not None for row in rows] == [False, True, False, True]
    assert all(0 < row["coherence"] <= 1 for row in rows[1::2])
    assert rows[1]["continuation"].keys() == {"13", "26", "39"}


def test_rare_diagnostics_do_not_touch_the_run(run_dir):
    fields = dict(SMALL, steps=4, method="gae_opd")
    runs = [opd.train(opd.Config.load(**{**fields, "eval_every": every})) for every in (0, 1)]
    a, b = ([*run.model.parameters()] for run in runs)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_coherence_of_one_prompt_repeated_is_one():
    config, world, _ = ready(prompt_pool=1, temperature=0.01)  # always the same text
    world = copy.copy(world)
    assert opd.rare_diagnostics(config, world)["coherence"] == pytest.approx(1, abs=1e-3)


def test_kl_at_is_the_kl_by_position_in_at_most_16_parts():
    config, world, optimizer = ready(batch_size=16)
    prompts = opd.step_prompts(config, world.task, 0)
    text = opd.make_states(config, world, prompts, 0, 53)
    with torch.no_grad():
        kl = opd.reverse_kl(*(opd.score(m, text) for m in (world.student, world.teacher)))
    row = opd.train_step(config, world, optimizer, 0, [])
    by_position = opd.kl_by_position(kl, text.mask)
    width = -(-text.mask.shape[1] // 16)
    expected = [part.nanmean().item() for part in by_position.split(width)]
    assert row["kl_at"] == pytest.approx(expected, rel=1e-3, abs=1e-6) and len(expected) <= 16
    assert row["top_5_percent"] == pytest.approx(opd.top_share(kl, text.mask), rel=1e-3)
    reward = opd.score_tokens(world.teacher, text) - opd.score_tokens(world.student, text)
    mean = torch.where(text.mask, reward, 0.0).sum(1) / text.mask.sum(1)
    right = world.task.verify(prompts, text)
    assert row["auroc"] == pytest.approx(opd.auroc(mean.detach(), right), abs=1e-6)


def test_sums_is_chain_without_products():
    task = opd.load_task("chain/sums", opd.load_tokenizer(MODELS + "teacher"))
    prompts = task.prompts(50)
    assert not any("*" in text for text in prompts.text)
    tokens, mask = task.demonstrations(prompts)
    nan = torch.full(tokens.shape, torch.nan)
    text = opd.Rollout(prompts.ids, prompts.mask, tokens, mask, nan, mask[:, 0])
    assert task.verify(prompts, text).all()
    assert (ROOT / "tiny_configs/build/teacher_sums.json").exists()
