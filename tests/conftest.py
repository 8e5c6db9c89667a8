"""Shared pieces of the tests: the tiny world, small random models, and the notebook collector."""

import json
import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # tiny tensors: a second thread costs more than it gives
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded by the tests

import pytest
import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks"), str(ROOT / "tiny_configs/tasks")]
import opd  # noqa: E402

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--notebooks", action="store_true", help="run the notebooks, nothing else")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Two processes, a file at a time, where pytest-xdist is there and nothing else was asked."""
    here = config.pluginmanager.hasplugin("xdist") and "PYTEST_XDIST_WORKER" not in os.environ
    if here and config.option.numprocesses is None:
        how = "load" if config.option.notebooks else "loadfile"
        config.option.numprocesses, config.option.dist = 2, how


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes, run with --slow")
    config.addinivalue_line("markers", "notebook: executes a notebook, run with --notebooks")


def pytest_collection_modifyitems(config, items):
    def wanted(item):
        return (item.get_closest_marker("notebook") is not None) == config.getoption("--notebooks")

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = filter(wanted, items)
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """An empty working directory: runs/ lands there, shipped models are found beside opd.py."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def quick(monkeypatch):
    """Runs validate on 16 prompts and draw no curve: where a test looks at neither."""
    monkeypatch.setattr(opd, "VALIDATION_PROMPTS", 16)
    monkeypatch.setattr(opd, "draw_curve", lambda *_: None)


def fork(folder, function, *arguments):
    """function(*arguments) -> exit code, in a process of its own, begun in a folder.

    A fork of this process has imported everything already; a GPU forbids that, and gets a new
    interpreter.  Not for tests with threads.  The process writes its output to folder/said and
    folder/errors, and starts with Python's own Ctrl-C.
    """
    kind = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    process = kind.Process(target=_forked, args=(folder, function, *arguments), daemon=True)
    process.start()
    return process


def _forked(folder, function, *arguments):
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = open("said" if number == 1 else "errors", "w")
        os.dup2(stream.fileno(), number)
        setattr(sys, name, stream)
    tqdm.set_lock(threading.RLock())  # the inherited one is shared: a kill could leave it taken
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(function(*arguments))


def ended(process, seconds=120):
    """The exit code of a process of `fork`, or minus the signal that ended it."""
    process.join(seconds)
    late = process.exitcode is None
    if late:
        process.kill()
        process.join()
    assert not late, f"not done after {seconds} s"
    return process.exitcode


@pytest.fixture(scope="session")
def world():
    """The default run's models, tokenizer and task.  Tests must not change the weights."""
    return opd.load_world(opd.Config())


def tiny_llama(vocab=23, seed=0, **settings):
    """A random Llama whose distributions are far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, tie_word_embeddings=True, **settings,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def random_prompts(lengths, vocab=23, seed=0):
    """Left-padded random prompts of the given lengths."""
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, vocab, (n,), generator=g).tolist() for n in lengths]
    ids, mask = opd.pad(rows, left=True)
    return opd.Prompts(ids, mask, ["" for _ in rows], ["" for _ in rows])


def rows_of(folder, timeless=True):
    """metrics.jsonl, without the keys that hold seconds or memory."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    keep = lambda k: not (timeless and k.endswith(("_s", "_mb")))  # noqa: E731
    return [{k: v for k, v in row.items() if keep(k)} for row in rows]


def agree(one, other, within, but=()):
    """Have two runs' metrics.jsonl the same nulls, and numbers as close (above 1: relatively)?

    Keys that hold seconds or memory, and those of `but`, are left out.
    """

    def flat(value):
        value = [*value.items()] if isinstance(value, dict) else value
        parts = value if isinstance(value, list | tuple) else None
        return [value] if parts is None else [x for part in parts for x in flat(part)]

    first, second = rows_of(one), rows_of(other)
    assert [row.keys() for row in first] == [row.keys() for row in second] and first
    for row, twin in zip(first, second, strict=True):
        for key in row.keys() - {*but}:
            for x, y in zip(flat(row[key]), flat(twin[key]), strict=True):
                same = x == y or None not in (x, y) and abs(x - y) <= within * max(1, abs(y))
                assert same, f"step {row['step']}, {key}: {x} and {y}"
    return True


def random_laws(vocab=6, rows=3, steps=4, seed=0):
    """Log-probs (B, T, V) of two random distributions, float64: student, teacher."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(rows, steps, vocab, generator=g, dtype=torch.float64)  # noqa: E731
    return draw().log_softmax(-1), draw().log_softmax(-1)


def logit_gradient(loss_of_logp, z):
    """Gradient in logit space of a scalar function of log-probs."""
    z = z.detach().clone().requires_grad_()
    loss_of_logp(z.log_softmax(-1)).sum().backward()
    return z.grad


def score_weighted(p, c):
    """G[c] = E_{a~p}[c(a) (e_a - p)] = p (c - E_p c), enumerated over a."""
    eye = torch.eye(len(p), dtype=p.dtype)
    return sum(p[a] * c[a] * (eye[a] - p) for a in range(len(p)))


class Tree:
    """Every text of two tokens, enumerated: float64 log-probs of both at each state.

    State 0 is the prompt, state 1 + a follows the first token a.
    """

    def __init__(self, vocab=3, seed=0):
        g = torch.Generator().manual_seed(seed)
        draw = lambda: torch.randn(1 + vocab, vocab, generator=g, dtype=torch.float64)  # noqa: E731
        self.z, self.logq = draw(), draw().log_softmax(-1)  # (1 + V, V)
        self.logp = self.z.log_softmax(-1)
        self.tokens = torch.cartesian_prod(torch.arange(vocab), torch.arange(vocab))  # (V^2, 2)
        self.states = torch.stack([torch.zeros(vocab**2, dtype=torch.long), 1 + self.tokens[:, 0]])
        self.states = self.states.T  # (V^2, 2)
        self.mask = torch.ones_like(self.tokens, dtype=torch.bool)
        self.logp_a, self.logq_a = self.read(self.logp), self.read(self.logq)
        self.reward, self.share = self.logq_a - self.logp_a, self.logp_a.sum(1).exp()  # p(text)

    def read(self, table):
        """A table (1 + V, V) at the states and tokens of every text: (V^2, 2)."""
        return opd.of_tokens(table[self.states], self.tokens)

    def gradient(self, objective):
        """The gradient (1 + V, V) of objective(log-probs of the tokens, (V^2, 2)) in the logits."""
        z = self.z.clone().requires_grad_()
        objective(self.read(z.log_softmax(-1))).backward()
        return z.grad

    def exact(self):
        """The gradient of the sequence KL, differentiating the texts' probabilities too."""
        return self.gradient(lambda x: (x.sum(1).exp() * (x - self.logq_a).sum(1)).sum())

    def expected(self, advantage):
        """The expected gradient of the policy gradient with an advantage (V^2, 2)."""
        loss = opd.policy_gradient_loss
        return self.gradient(lambda x: (self.share[:, None] * loss(x, advantage, self.mask)).sum())
