"""What teacher and student do not share: privileged context, and the id at which each stops."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, rows_of

import opd

MODELS = ROOT / "tiny_configs/models"
ROWS = [("<b> 1 + 1 =", 2), ("<b> 2 * 2 - 1 =", 3), ("<b> 3 + 1 =", 4), ("<b> 6 - 2 + 0 =", 4)]
CHAT = (  # one token for each role; a system message only first
    "{% for m in messages %}{{ {'system': '| ', 'user': '<b> ', 'assistant': '> '}[m.role] }}"
    "{{ m.content }} {% endfor %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}" + CHAT


def ready(**fields):
    """Config, world and optimizer of a run."""
    config = opd.Config.load(**fields)
    world = opd.load_world(config)
    config = config.model_copy(update=dict(max_tokens=world.task.max_tokens))
    return config, world, opd.make_optimizer(config, world)


def task_file(folder, contexts, rows=ROWS, **more):
    """A task of rows, each with its privileged context or None."""
    lines = []
    for (prompt, answer), context in zip(rows, contexts, strict=True):
        row = dict(prompt=prompt, answer=answer, split="train", **more)
        lines.append(row | (dict(privileged_context=context) if context else {}))
        others = enumerate(("validation", "test"))
        lines += [lines[-1] | dict(prompt=f"{prompt} {i}", split=split) for i, split in others]
    file = Path(folder) / "task.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def with_template(template):
    tokenizer = opd.load_tokenizer("tiny_configs/models/teacher")
    tokenizer.chat_template = template
    return tokenizer


CONTEXTS = ["1 + 1 = 2 ; ", "2 * 2 = 4 ; 4 - 1 = 3 ; ", None, "6 "]
BOTH = dict(
    student="tiny_configs/models/teacher", batch_size=4, eval_every=0, diagnose_every=1, warmup=0,
    max_tokens=12, eval_prompts=4,
)  # fmt: skip


# Privileged context


def test_the_teachers_prompt_is_the_context_and_the_prompt(run_dir):
    tokenizer = opd.load_tokenizer("tiny_configs/models/teacher")
    task = opd.load_task(task_file(run_dir, CONTEXTS), tokenizer)
    prompts = task.prompts(4)
    known = dict(zip([prompt for prompt, _ in ROWS], CONTEXTS, strict=True))
    more = task.context(prompts)
    wanted = [tokenizer((known[text] or "") + text)["input_ids"] for text in prompts.text]
    assert opd.real_tokens(more.ids, more.mask) == wanted
    assert more.text == prompts.text and more.answer == prompts.answer
    assert more.ids.shape[1] > prompts.ids.shape[1] and more.mask[:, -1].all()


def test_without_any_context_the_teacher_reads_the_prompts_themselves(run_dir):
    tokenizer = opd.load_tokenizer("tiny_configs/models/teacher")
    for task in (opd.load_task("chain", tokenizer), opd.load_task("task.jsonl", tokenizer)
                 if task_file(run_dir, [None] * 4) else None):  # fmt: skip
        prompts = task.prompts(3)
        assert task.context(prompts) is prompts


@pytest.mark.parametrize(
    ("template", "context", "wanted"),
    [
        (CHAT, "1 + 1", "| 1 + 1 <b> 3 + 1 = "),  # the system message
        (NO_SYSTEM, "1 + 1", "<b> 1 + 1\n\n3 + 1 = "),  # there is none: before the user's words
        (CHAT, [dict(role="user", content="0 + 1 ="), dict(role="assistant", content="1")],
         "<b> 0 + 1 = > 1 <b> 3 + 1 = "),
    ],
)  # fmt: skip
def test_where_a_chat_template_puts_the_context(run_dir, template, context, wanted):
    tokenizer = with_template(template)
    task = opd.load_task(task_file(run_dir, [context], rows=[("3 + 1 =", 4)]), tokenizer)
    prompts = task.prompts(1)
    assert prompts.text == ["<b> 3 + 1 = "]
    more = task.context(prompts)
    ids = tokenizer(wanted, add_special_tokens=False)["input_ids"]
    assert opd.real_tokens(more.ids, more.mask) == [ids]


@pytest.mark.parametrize(
    ("template", "context"),
    [
        (None, [dict(role="user", content="1")]),
        (CHAT, 3),
        (CHAT, [dict(role="clown", content="1")]),
    ],
)
def test_a_context_that_cannot_be_is_named_with_its_line(run_dir, template, context):
    with pytest.raises(opd.InputError, match=r"line 1: .*privileged_context"):
        opd.load_task(task_file(run_dir, [context], rows=ROWS[:1]), with_template(template))


def test_the_teachers_log_probs_are_a_plain_forward_on_the_concatenated_ids(run_dir):
    config, world, _ = ready(**BOTH, task=task_file(run_dir, CONTEXTS))
    prompts, rollout = opd.write(config, world, 0, 12)
    more = world.task.context(prompts)
    with torch.no_grad():
        found = world.log_probs(config, world.teacher, opd.behind(more, rollout))[slice(None)]
        n = 0
        texts = opd.real_tokens(rollout.tokens, rollout.mask)
        for before, response in zip(opd.real_tokens(more.ids, more.mask), texts, strict=True):
            logits = world.teacher(torch.tensor([before + response])).logits[0]
            plain = logits[len(before) - 1 : -1].log_softmax(-1)
            assert (found[n : n + len(response)] - plain).abs().max() < 2e-5
            n += len(response)
    assert n == len(found)


def test_the_same_folder_twice_has_kl_0_and_with_a_context_more(run_dir, quick):
    plain = opd.train(opd.Config.load(**BOTH, task=task_file(run_dir, [None] * 4), steps=1))
    task = task_file(run_dir, CONTEXTS)
    told = opd.train(opd.Config.load(**BOTH, task=task, steps=1, name="told"))
    one, other = rows_of(plain.dir)[0], rows_of(told.dir)[0]
    assert abs(one["kl"]) < 1e-7 and other["kl"] > 0.01
    same = ("tokens_sampled", "length", "correct", "finished", "entropy")  # the student's own text
    assert {key: one[key] for key in same} == {key: other[key] for key in same}
    assert other["flop_score"] > one["flop_score"] and other["flop_sample"] == one["flop_sample"]
    assert told.result["student_before"]["n"] == told.result["teacher"]["n"] == 4


def test_the_teacher_is_evaluated_and_writes_behind_its_context(run_dir, monkeypatch):
    config, world, _ = ready(**BOTH, task=task_file(run_dir, CONTEXTS), states="teacher")
    read = []
    real = opd.sample

    def spy(model, prompts, **how):
        read.append((model, prompts.ids.shape[1]))
        return real(model, prompts, **how)

    monkeypatch.setattr(opd, "sample", spy)
    prompts, rollout = opd.write(config, world, 0, 12)
    assert torch.equal(rollout.prompt_ids, prompts.ids)
    opd.final_evaluation(config, world, world.student)
    opd.final_evaluation(config, world, world.teacher)
    (who, wide), *evaluations = read
    assert who is world.teacher and wide > prompts.ids.shape[1]
    short, long = ({width for model, width in evaluations if model is m}
                   for m in (world.student, world.teacher))  # fmt: skip
    assert len(short) == len(long) == 1 and max(short) < min(long)


def test_a_remote_teacher_is_asked_behind_its_context(run_dir):
    fields = dict(BOTH, method="opd", task=task_file(run_dir, CONTEXTS), diagnose_every=99)
    rows, asked = [], []

    class Server:
        def score(self, rollout, k):
            asked.append(rollout)
            with torch.no_grad():
                logq = opd.score(self.model, rollout)
            top = logq.topk(k)
            return opd.Scores(opd.of_tokens(logq, rollout.tokens), top.indices, top.values)

    for server in (None, Server()):
        config, world, optimizer = ready(**fields)
        world.scorer = server
        if server:
            server.model, world.teacher = world.teacher, None
        rows.append(opd.train_step(config, world, optimizer, 0))
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-6) and rows[0]["loss"] != 0
    _, rollout = opd.write(config, ready(**fields)[1], 0, 12)
    assert asked[0].prompt_ids.shape[1] > rollout.prompt_ids.shape[1]
    assert torch.equal(asked[0].tokens, rollout.tokens)


# The stop event

PAD, EOS = 0, 2  # the tiny vocabulary's padding is never written: it can be another one's EOS


@pytest.fixture
def exchanged(run_dir):
    """The teacher's folder with EOS and padding exchanged: the same model in other ids."""
    folder = run_dir / "exchanged"
    shutil.copytree(MODELS / "teacher", folder)
    model = opd.load_model(str(folder))
    with torch.no_grad():
        for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            weight[[PAD, EOS]] = weight[[EOS, PAD]]
    model.generation_config.eos_token_id = model.config.eos_token_id = PAD
    model.generation_config.pad_token_id = model.config.pad_token_id = EOS
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def unmerged(monkeypatch):
    """from_logits without the stop event: ids are compared as they are."""
    real = opd.from_logits

    def plain(logits, *, stops=None, **how):
        return real(logits, **how)

    return lambda: monkeypatch.setattr(opd, "from_logits", plain)


def kls(config, world):
    """Reverse and forward KL, JSD, KL on the teacher's top k, log-ratio: the largest of a step."""
    _, rollout = opd.write(config, world, 0, config.max_tokens)
    with torch.no_grad():
        student, teacher = (
            world.log_probs(config, m, rollout)[slice(None)] for m in (world.student, world.teacher)
        )
    support = opd.top_k_support(student, teacher, 8, "teacher")
    action = rollout.tokens[rollout.mask]
    reward = opd.log_ratio_reward(opd.of_tokens(student, action), opd.of_tokens(teacher, action))
    found = [reward, opd.reverse_kl(student, teacher), opd.forward_kl(student, teacher)]
    found.append(opd.truncated_reverse_kl(student, teacher, support))
    found.append(opd.jsd(student, teacher, 0.5))
    return [float(x.abs().max()) for x in found], rollout


PAIR = dict(student="tiny_configs/models/teacher", batch_size=32, warmup=0, eval_every=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_copy_that_stops_at_another_id_has_kl_0_at_every_state(exchanged, unmerged, temperature):
    config, world, _ = ready(**PAIR, teacher=exchanged, temperature=temperature)
    assert world.vocab["stops"] == [EOS, PAD] == world.vocab["eos_ids"]
    merged, rollout = kls(config, world)
    assert max(merged) < 1e-4
    ends = rollout.tokens[rollout.finished][:, :].gather(
        1, rollout.mask[rollout.finished].sum(1, keepdim=True) - 1
    )
    assert len(ends) and (ends == EOS).all()  # the first stands for all
    unmerged()
    assert max(kls(config, world)[0]) > 5


def test_the_stop_event_has_the_sum_of_the_probabilities_and_their_gradient():
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    p = logits.softmax(-1)
    q = opd.from_logits(logits, stops=[3, 1]).exp()
    assert torch.allclose(q[:, 3], p[:, 3] + p[:, 1]) and (q[:, 1] == 0).all()
    others = [0, 2, 4, 5, 6]
    assert torch.allclose(q[:, others], p[:, others])
    (one,) = torch.autograd.grad(q[:, 3].log().sum(), logits, retain_graph=True)
    (two,) = torch.autograd.grad((p[:, 3] + p[:, 1]).log().sum(), logits)
    assert torch.allclose(one, two)


def test_one_list_of_stop_ids_leaves_everything_to_the_bit():
    _, world, _ = ready(**PAIR, teacher="tiny_configs/models/teacher_b")
    assert "stops" not in world.vocab  # vLLM knows no such word
    logits = torch.randn(3, 19)
    assert torch.equal(opd.from_logits(logits, stops=None), torch.log_softmax(logits, -1))


def test_a_pair_with_one_stop_id_trains_to_the_bit_as_without_the_stop_event(
    run_dir, quick, unmerged
):
    fields = dict(batch_size=8, steps=3, eval_prompts=4, eval_every=0, diagnose_every=1)
    one = opd.train(opd.Config.load(**fields, name="one"))
    unmerged()
    two = opd.train(opd.Config.load(**fields, name="two"))
    assert rows_of(one.dir) == rows_of(two.dir)


def test_an_exchanged_pair_keeps_its_length_and_without_the_merging_unlearns_to_stop(
    exchanged, unmerged, quick
):
    fields = PAIR | dict(teacher=exchanged, steps=10, max_tokens=90, eval_prompts=64, decay=0.0)
    merged = opd.train(opd.Config.load(**fields, name="merged"))
    unmerged()
    plain = opd.train(opd.Config.load(**fields, name="plain"))
    rows, lost = rows_of(merged.dir), rows_of(plain.dir)
    assert min(row["finished"] for row in rows) > 0.95
    assert max(abs(row["length"] - rows[0]["length"]) for row in rows) < 2
    assert merged.result["student_after"]["accuracy"] > 0.95
    assert min(row["finished"] for row in lost) < 0.8
    assert max(row["length"] for row in lost) > rows[0]["length"] + 8


def test_vllm_cannot_merge_and_says_so_before_it_is_looked_for(exchanged):
    config = opd.Config.load(**PAIR, teacher=exchanged, engine="vllm")
    with pytest.raises(opd.InputError, match=r"engine = vllm: .*student \[2\], teacher \[0\]"):
        opd.load_world(config)
