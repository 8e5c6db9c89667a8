"""lab.recipes: prefixes, prompts, a cold start, and the gradients of single batches."""

import json
import random

import lab
import pytest
import torch
from conftest import ROOT, random_prompts, tiny_llama

import opd

pytestmark = pytest.mark.usefixtures("quick")  # none looks at a curve
MODELS = "tiny_configs/models/"
SMALL = dict(batch_size=8, eval_prompts=8, eval_every=0, warmup=0)


def ready(**fields):
    config = opd.Config.load(**{**SMALL, **fields})
    world = opd.load_world(config)
    config = config.model_copy(update=dict(max_tokens=world.task.max_tokens))
    return config, world, opd.make_optimizer(config, world)


# cold start


def test_a_cold_start_imitates_the_teachers_right_responses_and_then_trains_on_policy(run_dir):
    muddled = dict(teacher=MODELS + "student_muddled", batch_size=16)  # a third of it is right
    config = opd.Config.load(**{**SMALL, **muddled}, method="opd", steps=1, diagnose_every=1)
    cold, run = lab.cold_start(config, steps=2)
    c, world, _ = ready(**muddled, states="teacher")
    prompts, text = opd.write(c, world, 0, 53)
    right = world.task.verify(prompts, text) & text.finished
    assert 0 < right.sum() < 16
    logp = opd.score_tokens(world.student, text)
    expected = -logp[text.mask & right[:, None]].mean().item()
    first, later = lab.rows_of(cold), lab.rows_of(run)
    assert len(first) == 2 and len(later) == 1
    assert first[0]["loss"] == pytest.approx(expected, rel=1e-5) and first[0]["kl"] is None
    assert first[0]["correct"] == pytest.approx(right.float().mean().item(), abs=1e-6)
    assert later[0]["kl"] > 0 and run.config.student == str(cold.dir / "model")
    assert cold.config.keep == "right" and cold.config.states == "teacher"
    assert run.result["student_before"] == cold.result["student_after"]
    for name in {*lab.recipes.KEPT} - {"student"}:
        assert getattr(run.config, name) == getattr(cold.config, name), name


def test_a_cold_start_without_a_right_response_changes_nothing(run_dir):
    terse = dict(teacher=MODELS + "teacher_long", name="terse")  # never right on eight steps
    config = opd.Config.load(**SMALL, **terse, steps=0)
    cold, _ = lab.cold_start(config, steps=1)
    (row,) = lab.rows_of(cold)
    assert cold.dir.name == "terse-cold"
    assert row["correct"] == 0 and row["weight"] == 0 and row["loss"] == 0
    assert row["tokens_sampled"] > 0  # it was drawn, and costs
    before = lab.weights_of(opd.load_model(config.student))
    assert all(torch.equal(before[n], p) for n, p in cold.model.named_parameters())


def test_a_cold_start_of_a_teacher_that_is_always_right_is_sft_on_its_text(run_dir):
    fields = dict(SMALL, teacher=MODELS + "teacher", student=MODELS + "student_muddled")
    cold, run = lab.cold_start(opd.Config.load(**fields, steps=0), steps=3)
    sft = opd.train(opd.Config.load(**fields, steps=3, method="sft", states="teacher"))
    pairs = zip(cold.model.parameters(), sft.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    pairs = zip(run.model.parameters(), sft.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)  # no step of its own


# prefixes


def test_a_teacher_prefix_and_then_the_student(world):
    prompts, most = world.task.prompts(12), world.task.max_tokens
    noise = torch.rand(12, most, generator=torch.Generator().manual_seed(0))
    how = dict(horizon=most, noise=noise, **world.vocab)
    models = world.student, world.teacher
    student, teacher = (opd.sample(model, prompts, **how) for model in models)
    text = lab.teacher_prefix(*models, prompts, 7, **how)
    assert torch.equal(text.tokens[:, :7], teacher.tokens[:, :7])
    logp = opd.score_tokens(world.student, text)
    after = text.mask.clone()
    after[:, :7] = False
    assert after.any() and (logp - text.logprobs)[after].abs().max() < 1e-4
    own = lab.teacher_prefix(*models, prompts, 0, **how)
    assert torch.equal(own.tokens * own.mask, student.tokens * student.mask)
    whole = lab.teacher_prefix(*models, prompts, 99, **how)
    assert torch.equal(whole.tokens * whole.mask, teacher.tokens * teacher.mask)


# prompts


def test_a_prompt_pool_has_each_prompt_once_a_pass_and_leaves_held_out_ones(world):
    task = lab.prompt_pool(world.task, 4, seed=3)
    texts = [task.prompts(8, seed=f"0 {step}").text for step in range(5)]
    pool = world.task.prompts(4, seed=3).text
    assert {t for row in texts for t in row} == {*pool} and len({*pool}) == 4
    assert all(sorted(row[:4]) == sorted(row[4:]) for row in texts)
    assert len({tuple(row) for row in texts}) > 1  # in another order
    for split in ("validation", "test"):
        assert task.prompts(9, split).text == world.task.prompts(9, split).text


def test_aligned_prompts_come_from_the_named_task_in_their_share(world):
    sums = opd.load_task("chain/sums", world.tokenizer)
    task = lab.aligned_prompts(world.task, sums, 0.75)
    texts = task.prompts(40, seed="0 3").text
    assert sum("*" not in text for text in texts[:30]) == 30
    assert sum("*" in text for text in texts[30:]) >= 8  # 1 - (2/3)^8 of the others have a *
    for split in ("validation", "test"):
        assert task.prompts(50, split).text == world.task.prompts(50, split).text
    assert texts == task.prompts(40, seed="0 3").text != task.prompts(40, seed="0 4").text


def test_confidence_takes_the_prompts_on_which_the_teacher_is_surest():
    _, world, _ = ready(teacher=MODELS + "student_muddled")
    task = lab.aligned_prompts(world.task, world.teacher, **world.vocab)
    chosen = task.draw(10, "train", random.Random(5))
    rng = random.Random(5)
    pool = world.task.draw(40, "train", rng)
    noise = torch.rand(40, 53, generator=opd.keyed_generator(rng.random()))
    ids, mask = opd.pad(world.tokenizer([text for text, _ in pool])["input_ids"], left=True)
    prompts = opd.Prompts(ids, mask, [], [])
    text = opd.sample(world.teacher, prompts, horizon=53, noise=noise, **world.vocab)
    sure = text.logprobs.sum(1) / text.mask.sum(1)
    best = {pool[i] for i in sure.argsort(descending=True)[:10].tolist()}
    assert {*chosen} == best and len(best) == 10


def test_a_task_of_the_teachers_tokenizer_has_its_chat_template(tmp_path):
    file, tokenizer = tmp_path / "rows.jsonl", opd.load_tokenizer(MODELS + "teacher")
    plain = opd.load_tokenizer(MODELS + "student_hasty")
    tokenizer.chat_template = "{{ messages[0]['content'] }} ="
    rows = [
        dict(prompt=f"<b> {a} + {b}", answer=(a + b) % 7) for a in range(7) for b in range(1, 7)
    ]
    for row, split in zip(rows, ["train", "validation", "test"] * 14, strict=True):
        row["split"] = split
    file.write_text("\n".join(map(json.dumps, rows)))
    teacher, how = opd.load_model(MODELS + "teacher", "teacher"), dict(eos_ids=[2], vocab_size=19)
    for own, ends in ((tokenizer, True), (plain, False)):
        task = opd.load_task(str(file), own)
        task.max_tokens = 8
        texts = lab.aligned_prompts(task, teacher, **how).prompts(5).text
        assert len(texts) == 5 and all(text.endswith(" =") == ends for text in texts)


def test_a_task_file_trains_on_a_pool(run_dir):
    (run_dir / "pool.py").write_text(
        "import lab\nimport opd\n\n\ndef make_task(name, tokenizer):\n"
        "    return lab.prompt_pool(opd.load_task('chain', tokenizer), 2)\n"
    )
    config, world, _ = ready(task="pool.py")
    texts = [opd.write(config, world, step, 1)[0].text for step in range(3)]
    assert len({text for row in texts for text in row}) == 2
    opd.train(opd.Config.load(**SMALL, task="pool.py", steps=1))


# who finishes the student's text


def test_the_student_continues_itself_without_advantage(world):
    prompts = world.task.prompts(12, "test")
    how = dict(**world.vocab)
    for model in (world.student, world.teacher):
        depths = [0, 1, 5, 30, 52, 53, 99]
        found = lab.continuation_advantage(model, model, world.task, prompts, depths, **how)
        assert list(found) == depths
        assert all(d["advantage"] == 0 and d["student"] == d["teacher"] for d in found.values())


def test_depth_zero_is_the_teachers_own_accuracy_and_the_last_the_students(world):
    prompts, most = world.task.prompts(40, "test"), world.task.max_tokens
    noise = torch.rand(40, most, generator=opd.keyed_generator("continue"))
    own, theirs = (
        world.task.verify(prompts, opd.sample(m, prompts, horizon=most, noise=noise, **world.vocab))
        for m in (world.student, world.teacher)
    )
    models = (world.student, world.teacher)
    found = lab.continuation_advantage(*models, world.task, prompts, [0, 8, most], **world.vocab)
    student, teacher = float(own.float().mean()), float(theirs.float().mean())
    assert student < teacher
    assert found[0] == dict(student=student, teacher=teacher, advantage=teacher - student)
    assert found[most] == dict(student=student, teacher=student, advantage=0)
    assert found[8]["student"] == student
    assert found[8]["advantage"] == found[8]["teacher"] - student


def test_depths_keep_the_students_tokens(world):
    """With the teacher's tokens after them: judged by a task that reads the text itself."""
    prompts, read = random_prompts([5] * 6), []
    model, other = tiny_llama(), tiny_llama(seed=1)
    task = opd.Task("read", None, 9, None, lambda _, text: read.append(text) or text.mask[:, 0])
    lab.continuation_advantage(model, other, task, prompts, [0, 4, 9])
    own = read[0].tokens
    for depth, rest in zip([0, 4, 9], read[1::2], strict=True):
        texts = [t[m] for t, m in zip(rest.tokens, rest.mask, strict=True)]
        mine = [t[m] for t, m in zip(own, read[0].mask, strict=True)]
        assert all(torch.equal(a[:depth], b[:depth]) for a, b in zip(texts, mine, strict=True))
        agree = all(torch.equal(a, b) for a, b in zip(texts, mine, strict=True))
        assert agree == (depth == 9)


# gradients of single batches


def test_gradient_moments_are_those_of_the_gradients_and_touch_nothing():
    config, world, _ = ready(batch_size=2, top_k=4)
    before = lab.weights_of(world.student)
    seen = []
    for step in (7, 8, 9):
        prompts, rollout = opd.write(config, world, step, config.max_tokens)
        loss = opd.reverse_kl(*(opd.score(m, rollout) for m in (world.student, world.teacher)))
        loss = opd.masked_mean(loss, rollout.mask)
        grads = torch.autograd.grad(loss, [*world.student.parameters()])
        seen.append(torch.cat([g.flatten() for g in grads]))
    g = torch.stack(seen)
    mean, each = lab.gradient_moments(config, world, 3, first=7)
    assert mean == pytest.approx(g.mean(0).square().sum().item(), rel=1e-4)
    assert each == pytest.approx(g.square().sum(1).mean().item(), rel=1e-4)
    assert all(torch.equal(before[n], p) for n, p in world.student.named_parameters())
    assert all(p.grad is None for p in world.student.parameters())
    one, same = lab.gradient_moments(config, world, 1)
    assert one == pytest.approx(same)  # one gradient agrees with itself


def test_gradient_moments_are_of_the_rule_whose_hooks_they_get_and_leave_a_critic_alone():
    config, world, _ = ready(method="gae_opd", batch_size=2)
    before = lab.weights_of(world.critic)
    own = lab.gradient_moments(config, world, 1, first=9)
    assert all(torch.equal(before[n], p) for n, p in world.critic.named_parameters())
    assert all(p.grad is None for p in world.critic.parameters())

    def twice(*args):
        return 2 * opd.token_loss(*args)

    assert lab.gradient_moments(config, world, 1, first=9, loss=twice) == pytest.approx(
        [4 * value for value in own], rel=1e-4
    )


def test_coherence_of_one_prompt_repeated_is_one_and_of_several_less(run_dir):
    config, world, _ = ready(temperature=0.01)  # always the same text
    several = lab.coherence(config, world)
    assert 1 / 8 <= several < 0.99
    world.task = lab.prompt_pool(world.task, 1)
    assert lab.coherence(config, world) == pytest.approx(1, abs=1e-3)


def test_coherence_does_not_touch_the_run(run_dir):
    config, world, optimizer = ready(method="gae_opd")
    before = lab.weights_of(world.student)
    assert 0 < lab.coherence(config, world) <= 1
    assert all(torch.equal(before[n], p) for n, p in world.student.named_parameters())


def test_sums_is_chain_without_products():
    task = opd.load_task("chain/sums", opd.load_tokenizer(MODELS + "teacher"))
    prompts = task.prompts(50)
    assert not any("*" in text for text in prompts.text)
    tokens, mask = task.demonstrations(prompts)
    nan = torch.full(tokens.shape, torch.nan)
    text = opd.Rollout(prompts.ids, prompts.mask, tokens, mask, nan, mask[:, 0])
    assert task.verify(prompts, text).all()
    assert (ROOT / "tiny_configs/build/teacher_sums.json").exists()
