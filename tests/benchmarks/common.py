"""Shared by the benchmarks: random models of a size, and opd.py's step on them.

OPD_TREE, in the environment: a worktree, of the first edition or of this one, whose opd.py is used
in place of this tree's.
"""

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(os.environ.get("OPD_TREE") or Path(__file__).resolve().parents[2])
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]
import lab  # noqa: E402, F401

import opd  # noqa: E402

FIRST_EDITION = hasattr(opd, "make_states")
HISTORY = [[]] if FIRST_EDITION else []  # an argument of train_step that is gone


def random_llama(V, size, seed, positions):
    """A random Llama; size: hidden, intermediate, layers, heads."""
    hidden, intermediate, layers, heads = size
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, initializer_range=0.08,
        tie_word_embeddings=True, max_position_embeddings=positions, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def opd_step(V, B, P, T, student, teacher, rule=None, **fields):
    """A function step(i) -> metrics: train_step on random prompts, exactly T tokens a response.

    fields: of the Config, e.g. method="cr_opd"; rule: one of lab.RULES.
    """
    own, hooks = lab.RULES[rule]() if rule else ({}, {})
    student = random_llama(V, student, 1, P + T)
    teacher = random_llama(V, teacher, 2, P + T).requires_grad_(False)

    def prompts(n, split="train", seed=0):
        ids = torch.randint(V, (n, P), generator=opd.keyed_generator(seed))
        return opd.Prompts(ids, torch.ones_like(ids, dtype=torch.bool), [""] * n, [""] * n)

    def verify(some, rollout):
        return torch.zeros(len(some.text), dtype=torch.bool)

    task = SimpleNamespace(prompts=prompts, max_tokens=T, verify=verify, context=lambda some: some)
    rest = [None] if FIRST_EDITION else []
    world = opd.World(student, teacher, None, task, dict(eos_ids=[], vocab_size=V), *rest)
    usual = dict(batch_size=B, max_tokens=T, lr=1e-4, warmup=0, decay=0.0)
    config = opd.Config(**usual | own | fields)
    if config.baseline == "value":
        world.critic = torch.nn.Linear(student.config.hidden_size, 1)
    optimizer = opd.make_optimizer(config, world)

    def step(i):
        start = time.perf_counter()
        row = opd.train_step(config, world, optimizer, i, *HISTORY, **hooks)
        assert row["length"] == T
        return row | dict(step_s=time.perf_counter() - start)

    return step
