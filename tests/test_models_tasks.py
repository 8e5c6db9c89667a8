"""§1: loading, check_pair, the tasks, splits, the shipped tiny models, JSONL."""

import json
import runpy
import shutil

import lab
import pytest
import torch
from conftest import ROOT, random_prompts, tiny_llama

import opd

TASKS = ROOT / "tiny_configs" / "tasks"
NAMES = ("chain", "synonyms", "jsonl")
CHAIN, SYNONYMS, JSONL = (runpy.run_path(str(TASKS / f"{name}.py")) for name in NAMES)

MODELS = ROOT / "tiny_configs" / "models"


def demonstrated(task, prompts, horizon):
    """The task's demonstrations as text, cut at the horizon; nobody drew it."""
    tokens, mask = task.demonstrations(prompts)
    finished, nobody = ~mask[:, horizon:].any(1), torch.full(mask.shape, torch.nan)
    per_token = (x[:, :horizon] for x in (tokens, mask, nobody))
    return opd.Rollout(prompts.ids, prompts.mask, *per_token, finished)


# models and tokenizers


def test_student_learns_teacher_is_frozen_both_in_eval_mode():
    student, teacher = (
        opd.load_model(str(MODELS / "teacher")),
        opd.load_model("tiny_configs/models/teacher", "teacher"),
    )
    assert all(p.requires_grad and p.dtype == torch.float32 for p in student.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not student.training and not teacher.training


def test_fresh_weights_come_from_the_seed_alone(tmp_path):
    fresh = runpy.run_path(str(ROOT / "tiny_configs/build/build.py"))["fresh"]
    state = torch.random.get_rng_state()
    for name, seed in dict(a=0, b=0, c=1).items():
        fresh("chain_d48", tmp_path / name, seed)
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's randomness is touched
    first, again, other = (opd.load_model(str(tmp_path / n)).lm_head.weight for n in "abc")
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert opd.load_tokenizer(str(tmp_path / "a")).get_vocab()
    with pytest.raises(opd.InputError, match="safetensors"):  # a folder without weights is no model
        opd.load_model(str(ROOT / "tiny_configs/build/chain_d48"))


def test_pickled_weights_are_refused(tmp_path):
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODELS / "teacher" / file, tmp_path)
    torch.save(
        opd.load_model("tiny_configs/models/teacher").state_dict(), tmp_path / "pytorch_model.bin"
    )
    with pytest.raises(opd.InputError, match="safetensors"):
        opd.load_model(str(tmp_path))


def test_logits_that_are_changed_after_the_head_are_refused(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=9, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=2, final_logit_softcapping=0.05,
        initializer_range=1.0,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(opd.InputError, match="its head's output"):
        opd.load_model(str(tmp_path))


def resized(rows):
    model = opd.load_model("tiny_configs/models/teacher")
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def test_check_pair_cuts_padding_rows(world):
    small, large = world.student, resized(32)
    assert large.config.vocab_size == 32
    assert opd.check_pair(small, large, world.tokenizer, world.tokenizer) == 19
    with pytest.raises(opd.InputError, match="embedding rows"):
        opd.check_pair(small, resized(12), world.tokenizer, world.tokenizer)


def test_check_pair_names_the_first_token_that_differs(world):
    other = opd.load_tokenizer("tiny_configs/models/teacher")
    other.add_tokens(["hello"])
    with pytest.raises(opd.InputError, match="token 19 is None for the student, 'hello' for"):
        opd.check_pair(world.student, resized(20), world.tokenizer, other)


def test_eos_ids_fall_back_to_the_config():
    model = tiny_llama()
    assert opd.eos_ids_of(model) == [2]
    model.generation_config.eos_token_id = None
    assert opd.eos_ids_of(model) == [2]
    model.config.eos_token_id = None
    model.generation_config.eos_token_id = 0  # an id like any other
    assert opd.eos_ids_of(model) == [0]
    model.generation_config.eos_token_id = None
    assert opd.eos_ids_of(model) == []
    rollout = opd.sample(model, random_prompts([3, 4]), horizon=5)
    assert not rollout.finished.any() and rollout.mask.all()


# splits


@pytest.mark.parametrize("name, folder", [("chain", "teacher"), ("synonyms", "synonym_teacher")])
def test_splits_are_disjoint_and_prompts_repeat_by_seed(name, folder):
    task = opd.load_task(name, opd.load_tokenizer(str(MODELS / folder)))
    texts = {split: set(task.prompts(400, split).text) for split in opd.SPLITS}
    assert all(len(t) > 350 for t in texts.values())
    assert not texts["train"] & texts["test"] and not texts["validation"] & texts["test"]
    assert (
        task.prompts(5, seed=3).text == task.prompts(5, seed=3).text != task.prompts(5, seed=4).text
    )
    with pytest.raises(opd.InputError, match="split = 'dev'"):
        task.prompts(1, "dev")


def test_prompts_are_left_padded(world):
    ids, mask = opd.pad([[5, 6], [7], [8, 9, 10]], left=True)
    assert ids.tolist() == [[0, 5, 6], [0, 0, 7], [8, 9, 10]]
    assert mask.tolist() == [[False, True, True], [False, False, True], [True] * 3]
    ids, mask = opd.pad([[5, 6], [7]])
    assert ids.tolist() == [[5, 6], [7, 0]] and mask.tolist() == [[True, True], [True, False]]


# the chain


def as_rollout(task, prompts, texts):
    rows = task.tokenizer(texts, add_special_tokens=False)["input_ids"]
    tokens, mask = opd.pad(rows)
    nan = torch.full(tokens.shape, torch.nan)
    return opd.Rollout(prompts.ids, prompts.mask, tokens, mask, nan, mask[:, 0])


def test_chain_by_hand(world):
    steps = CHAIN["steps_of"]("<b> 3 + 4 * 5 - 6 =")
    assert [tuple(s.values()) for s in steps] == [(3, "+", 4, 0), (0, "*", 5, 0), (0, "-", 6, 1)]
    show = {k: " ".join(v.format(**s) for s in steps) for k, v in CHAIN["STYLES"].items() if v}
    assert show["careful"] == "3 + 4 = 0 ; 0 * 5 = 0 ; 0 - 6 = 1 ;" == show["gaps"]
    assert show["reordered"] == "+ 4 3 > 0 | * 5 0 > 0 | - 6 0 > 1 |"
    assert show["terse"] == "0 ; 0 ; 1 ;"


def test_gaps_are_the_same_facts_everywhere_and_their_results_are_random(world):
    wrong, right = {}, set()
    for text in world.task.prompts(600).text:
        for step in CHAIN["steps_of"](text, gaps=True):
            fact = (step["s"], step["op"], step["d"])
            a = {"+": fact[0] + fact[2], "-": fact[0] - fact[2], "*": fact[0] * fact[2]}[
                fact[1]
            ] % 7
            wrong.setdefault(fact, []).append(step["r"]) if step["r"] != a else right.add(fact)
    assert len(wrong) == 22 and len(wrong.keys() | right) == 126
    results = [r for row in wrong.values() for r in row]
    assert all(len(row) > 5 for row in wrong.values()) and len(set(results)) == 7


@pytest.mark.parametrize(
    "style, right",
    [("careful", 1.0), ("reordered", 1.0), ("terse", 1.0), ("guess", 0.15), ("gaps", 0.34),
     ("long", 1.0)],
)  # fmt: skip
def test_demonstrations_verify(style, right, world):
    task = opd.load_task(f"chain/{style}", world.tokenizer)
    prompts = task.prompts(300)
    rollout = demonstrated(task, prompts, task.max_tokens)
    assert abs(task.verify(prompts, rollout).float().mean() - right) < 0.07
    assert rollout.finished.all() and (rollout.mask.sum(1) <= task.max_tokens).all()
    cut = demonstrated(task, prompts, 3)
    assert cut.tokens.shape[1] == 3 and not cut.finished.any()


def test_mixed_styles_split_prompts_about_evenly(world):
    task = opd.load_task("chain/careful+guess", world.tokenizer)
    tokens, _ = task.demonstrations(task.prompts(400))
    rushed = (tokens[:, 0] == world.tokenizer.convert_tokens_to_ids(":")).float().mean()
    assert 0.4 < rushed < 0.6


def test_the_verifier_reads_the_first_answer(world):
    prompts = opd.take(world.task.prompts(1), torch.zeros(5, dtype=torch.long))
    answer = prompts.answer[0]
    wrong = str((int(answer) + 1) % 7)
    texts = [f"# {answer} <e>", f"# {answer}", f"{answer} <e>", f"# {wrong} # {answer} <e>", "#"]
    rollout = as_rollout(world.task, prompts, texts)
    assert world.task.verify(prompts, rollout).tolist() == [True, True, False, False, False]


# synonyms


@pytest.fixture(scope="module")
def synonyms():
    tokenizer = opd.load_tokenizer(str(MODELS / "synonym_teacher"))
    return {s: opd.load_task(f"synonyms/{s}", tokenizer) for s in ("teacher", "student")}


def test_synonym_laws_are_laws_with_the_stated_numbers(synonyms):
    _, ranked, teacher = SYNONYMS["laws_of"]("teacher")
    _, _, student = SYNONYMS["laws_of"]("student")
    for law in (teacher, student):
        assert law.min() > 0 and law.sum(-1).sub(1).abs().max() < 1e-5
    assert (teacher.gather(-1, ranked[..., :3]).sum(-1) - 0.95).abs().max() < 0.01
    assert (student.gather(-1, ranked[..., :3]) - 1e-3).abs().max() < 1e-4  # rare, but reachable
    assert (student.gather(-1, ranked[..., 3:4]) - 0.78).abs().max() < 0.01  # the wrong favourite
    assert student[..., -SYNONYMS["OTHERS"] :].sum(-1).mean() == pytest.approx(0.2, abs=0.02)


def test_synonym_demonstrations_follow_the_law_and_verify_as_often_as_it_says(synonyms):
    task = synonyms["teacher"]
    prompts = task.prompts(2000)
    rollout = demonstrated(task, prompts, task.max_tokens)
    expected = (0.99 * (0.96 + 3 * 0.0025) + 3e-5) ** 6 * 0.999**7
    assert task.verify(prompts, rollout).float().mean() == pytest.approx(expected, abs=0.04)
    law = SYNONYMS["exact"](rollout, "teacher")
    assert law.exp().sum(-1).sub(1).abs().max() < 1e-4
    surprise = -opd.of_tokens(law, rollout.tokens)[rollout.mask].mean()
    assert surprise.item() == pytest.approx(opd.entropy(law)[rollout.mask].mean().item(), abs=0.05)
    own = demonstrated(synonyms["student"], prompts, task.max_tokens)
    assert task.verify(prompts, own).float().mean() < 0.01


def test_shipped_synonym_student_is_within_a_factor_two_of_the_intended_probability(synonyms):
    student = opd.load_model(str(MODELS / "synonym_student"))
    prompts = synonyms["student"].prompts(128, "test")
    rollout = demonstrated(synonyms["student"], prompts, 13)
    with torch.no_grad():
        words = opd.score(student, rollout)[:, 1:12:2]
    preferred = SYNONYMS["exact"](rollout, "teacher")[:, 1:12:2].topk(3).indices
    p = words.gather(-1, preferred).exp()
    assert 0.5e-3 < p.log().mean().exp() < 2e-3
    assert ((p > 0.5e-3) & (p < 2e-3)).float().mean() > 0.95


@pytest.mark.parametrize("style", ["teacher", "student"])
def test_soft_labels_are_the_forward_kl_to_the_exact_law(style, synonyms, run_dir):
    file = ROOT / "tiny_configs/build" / f"synonym_{style}.json"
    soft = runpy.run_path(str(file.with_name("soft_labels.py")))["soft_labels"]
    small = dict(steps=2, batch_size=8, eval_prompts=4, warmup=0, decay=0.0, name=None)
    config = opd.Config.load(file, **small)
    fresh = runpy.run_path(str(file.with_name("build.py")))["fresh"]
    fresh("synonyms_d64", config.student)
    world, task = opd.load_world(config), synonyms[style]
    prompts = opd.write(config, world, 0, 1)[0]
    text = demonstrated(task, prompts, task.max_tokens)
    with torch.no_grad():
        labels, logp = SYNONYMS["exact"](text, style), opd.score(world.student, text)
    expected = (labels.exp() * (labels - logp)).sum(-1)[text.mask].mean().item()
    run = opd.train(config, **soft(config.task))
    rows = lab.read_rows(run.dir / "metrics.jsonl", 2)
    assert rows[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert rows[1]["loss"] < rows[0]["loss"]


# shipped chain models: the promises of the README


@pytest.mark.parametrize(
    "folder, sampled, greedy",
    [("teacher", (0.985, 1.0), 0.995), ("teacher_b", (0.985, 1.0), 0.995),
     ("student_hasty", (0.5, 0.6), None), ("student_novice", (0.25, 0.36), None),
     ("student_muddled", (0.22, 0.36), None)],
)  # fmt: skip
def test_shipped_accuracy(folder, sampled, greedy, world):
    model = opd.load_model(str(MODELS / folder))
    prompts = world.task.prompts(512, "test")
    found = opd.evaluate(model, world.task, prompts)
    assert sampled[0] <= found["accuracy"] <= sampled[1]
    assert found["low"] <= found["accuracy"] <= found["high"] and found["n"] == 512
    if greedy:
        assert opd.evaluate(model, world.task, prompts, greedy=True)["accuracy"] >= greedy


def test_long_models_have_short_prompts_and_long_answers(world):
    task = opd.load_task("chain/long", world.tokenizer)
    prompts = task.prompts(128, "test")
    assert prompts.ids.shape[1] == 11 and task.demonstrations(prompts)[1].sum(1).eq(147).all()
    for folder, low, high in (("teacher_long", 0.97, 1.0), ("student_long", 0.45, 0.7)):
        found = opd.evaluate(opd.load_model(str(MODELS / folder)), task, prompts)
        assert low <= found["accuracy"] <= high


def test_hasty_is_right_when_it_works_carefully(world):
    prompts = world.task.prompts(512, "test")
    noise = torch.rand(512, 53, generator=torch.Generator().manual_seed(0))
    rollout = opd.sample(world.student, prompts, horizon=53, noise=noise)
    rushed = rollout.tokens[:, 0] == world.tokenizer.convert_tokens_to_ids(":")
    right = world.task.verify(prompts, rollout)
    assert 0.35 < rushed.float().mean() < 0.65
    assert right[~rushed].float().mean() >= 0.95 and right[rushed].float().mean() < 0.3


def test_shipped_models_are_small():
    for folder in MODELS.iterdir():
        assert sum(f.stat().st_size for f in folder.iterdir()) < 500_000, folder.name


@pytest.mark.slow
def test_the_quickest_build_reproduces_the_shipped_model(run_dir):
    """The novice, from a folder without weights: about two minutes."""
    folder = run_dir / "runs/build-student_novice"
    lab.build("runs/build-student_novice/model")
    built, shipped = (opd.load_model(str(f)) for f in (folder / "model", MODELS / "student_novice"))
    for a, b in zip(shipped.parameters(), built.parameters(), strict=True):
        assert (a - b).abs().max() < 2e-2
    result = json.loads((folder / "result.json").read_text())
    assert 0.25 < result["student_after"]["accuracy"] < 0.4


# JSONL


def chat_tokenizer():
    tokenizer = opd.load_tokenizer("tiny_configs/models/teacher")
    tokenizer.chat_template = (
        "{% for m in messages %}<b> {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} ={% endif %}{% if enable_thinking %} #{% endif %}"
    )
    return tokenizer


def rows_file(path, n=40, **extra):
    rows = [{"prompt": f"{i % 7} + {i // 7} * 2", "answer": i % 7, **extra} for i in range(n)]
    path.write_text("\n".join(json.dumps(r) for r in rows))
    return str(path)


@pytest.mark.parametrize(
    "second",
    [{"prompt": "1 + 1"}, {"prompt": None, "answer": 3}, {"prompt": "", "answer": 3},
     {"prompt": "2 + 2", "answer": "three"}, {"prompt": "hello", "answer": 3}, 7, "text",
     {"prompt": "1 + 1", "answer": 2}, {"prompt": "2", "answer": 1, "split": "dev"},
     {"prompt": "2 + 2", "answer": 4, "response": "# 4"}, {"prompt": ["2"], "answer": 4}],
    ids=str,
)  # fmt: skip
def test_jsonl_refuses_a_bad_line_by_its_number(second, tmp_path, world):
    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps({"prompt": "1 + 1", "answer": 2}) + "\n" + json.dumps(second))
    with pytest.raises(opd.InputError, match="line 2: must be a JSON object"):
        opd.load_task(str(file), world.tokenizer)


def test_jsonl_uses_the_chat_template_without_thinking(tmp_path):
    task = opd.load_task(rows_file(tmp_path / "t.jsonl"), chat_tokenizer())
    prompts = task.prompts(6)
    assert all(t.startswith("<b> ") and t.endswith("* 2 =") for t in prompts.text)
    assert prompts.ids[0].tolist() == task.tokenizer(prompts.text[0])["input_ids"]


def test_jsonl_splits_by_hash_by_name_and_never_repeats_held_out_rows(tmp_path):
    task = opd.load_task(rows_file(tmp_path / "t.jsonl"), chat_tokenizer())
    texts = {s: set(task.prompts(100, s).text) for s in opd.SPLITS}
    assert sum(map(len, texts.values())) == 40 and not texts["train"] & texts["test"]
    assert len(task.prompts(100, "test").text) == len(texts["test"])
    assert len(task.prompts(100, "train").text) == 100
    named = opd.load_task(rows_file(tmp_path / "n.jsonl", split="train"), chat_tokenizer())
    assert len(set(named.prompts(40).text)) == 40
    with pytest.raises(opd.InputError, match="no row in split 'test'"):
        named.prompts(1, "test")


def test_jsonl_responses_are_demonstrations(tmp_path):
    path = rows_file(tmp_path / "t.jsonl", response="# 3")
    task = opd.load_task(path, chat_tokenizer())
    prompts = task.prompts(3)
    tokens, mask = task.demonstrations(prompts)
    assert task.tokenizer.batch_decode(tokens) == ["# 3 <e>"] * 3 and mask.all()
    bare = opd.load_task(rows_file(tmp_path / "b.jsonl"), chat_tokenizer())
    with pytest.raises(opd.InputError, match="no demonstrations"):
        bare.demonstrations(prompts)


@pytest.mark.parametrize(
    "text, number",
    [("so 3 + 4 = 7.", 7), ("#### 1,234", 1234), (r"2 then \boxed{-5} then 9", -5), ("none", None),
     ("it is 3.50 dollars", 3.5), ("12\n#### 18 apples", 18), ("$1,000,000", 1e6), ("x - 3", 3),
     (r"\boxed{\frac{1}{2}}", None), ("3/4", None), ("1e5", None), ("10-4", 4), ("(-4)", -4),
     ("9" * 400, int("9" * 400)), (r"\boxed{$1,250$}", 1250), ("5 km", 5)],
)  # fmt: skip
def test_last_number(text, number):
    assert JSONL["last_number"](text) == number
