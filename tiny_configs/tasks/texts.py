"""What the task files share: splits, fresh pairs from a generator, tasks about texts.

opd.load_task puts this folder on the import path, so your own task file may say `import texts` too.
"""

import itertools
import random
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import opd


def split_of(text: str) -> str:
    """The split of a prompt, by its hash: validation 1 in 10, test 1 in 10, else train."""
    return {0: "validation", 1: "test"}.get(zlib.crc32(text.encode()) % 10, "train")


def fresh_pairs(make: Callable, n: int, split: str, rng: random.Random) -> list[tuple[str, str]]:
    """n pairs of one split from a generator of pairs, make(rng) -> (prompt text, answer)."""
    endless = (make(rng) for _ in itertools.count())
    return list(itertools.islice((pair for pair in endless if split_of(pair[0]) == split), n))


def through_eos(tokens: Tensor, eos_ids: list[int]) -> Tensor:
    """mask (B, T), true through the first EOS: by position, so padding may be the EOS id too."""
    is_eos = torch.isin(tokens, torch.tensor(eos_ids, device=tokens.device))
    return (is_eos.cumsum(-1) - is_eos.long()) == 0


def chat(tokenizer: Any, before: list[dict[str, str]], text: str) -> str:
    """A text as the user's turn of a chat, after other messages; thinking off."""
    how = dict(tokenize=False, add_generation_prompt=True, enable_thinking=False)
    return tokenizer.apply_chat_template([*before, {"role": "user", "content": text}], **how)


def text_task(
    name: str, tokenizer: Any, max_tokens: int, draw: Any, judge: Any, tell: Any
) -> opd.Task:
    """A task about texts: judge(response, answer) -> bool; tell(prompt text) -> response text."""

    def verify(prompts: opd.Prompts, rollout: opd.Rollout) -> Tensor:
        return torch.tensor([*map(judge, opd.response_texts(tokenizer, rollout), prompts.answer)])

    def show(prompts: opd.Prompts) -> tuple[Tensor, Tensor]:
        return opd.pad(tokenizer([*map(tell, prompts.text)], add_special_tokens=False)["input_ids"])

    return opd.Task(name, tokenizer, max_tokens, draw, verify, tell and show)
