"""A task from a JSONL file: one {"prompt", "answer"} a line.

Optionally "response", a demonstration; "split"; "privileged_context", what the teacher alone reads:
a text, the system message (without a chat template it stands in front of the prompt), or a list of
chat messages before the user's turn.  Right means that the response's last number is the answer's.
opd.load_task("FILE.jsonl") calls `make_task`.
"""

import random
import re
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import texts
from pydantic import BaseModel, ValidationError

import opd


class Message(BaseModel, strict=True, extra="forbid"):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


class Row(BaseModel, strict=True):
    """One line of the file; other fields are ignored."""

    prompt: str
    answer: str | int | float
    response: str | None = None
    split: Literal["train", "validation", "test"] | None = None
    privileged_context: str | list[Message] | None = None


RULE = (
    "must be a JSON object with a prompt that is new and has tokens, an answer with a number, "
    f"a response in all rows or in none, a split, if any, from {', '.join(opd.SPLITS)}, and a "
    "privileged_context, if any, that is a text, or with a chat template messages"
)


def read_rows(path: str, tokenizer: Any) -> dict[str, Row]:
    """Prompt text -> row.  With a chat template the text is one user turn, thinking off.

    A row goes to the split that it names, else to its hash's.  InputError names file and line.
    """
    try:
        lines = Path(opd.find(path)).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise opd.InputError(f"task = {path!r}: must be a readable text file ({error})") from None
    rows: dict[str, Row] = {}
    for number, line in enumerate(lines, 1):
        where = f"task = {path!r}, line {number}: {RULE}"
        try:
            row = Row.model_validate_json(line)
        except ValidationError as error:
            bad = error.errors()[0]
            field = ".".join(map(str, bad["loc"])) or "the line"
            raise opd.InputError(f"{where} ({field}: {bad['msg']})") from None
        text, row.split = row.prompt, row.split or texts.split_of(row.prompt)
        if tokenizer.chat_template is not None:
            text = texts.chat(tokenizer, [], text)
        first = next(iter(rows.values()), row)
        alike = (row.response is None) == (first.response is None)
        usable = has_tokens(tokenizer, text) and last_number(str(row.answer)) is not None
        usable &= has_tokens(tokenizer, teachers_text(tokenizer, text, row))
        opd.require(usable and alike and text not in rows, f"{where} (got {row!r})")
        rows[text] = row
    return rows


def teachers_text(tokenizer: Any, text: str, row: Row) -> str:
    """What the teacher reads in place of the prompt's text; "" where that cannot be."""
    context = row.privileged_context
    if context is None:
        return text
    if tokenizer.chat_template is None:
        return context + text if isinstance(context, str) else ""
    if isinstance(context, list):
        return texts.chat(tokenizer, [message.model_dump() for message in context], row.prompt)
    try:
        return texts.chat(tokenizer, [{"role": "system", "content": context}], row.prompt)
    except Exception:  # templates raise their own where they know no system message
        return texts.chat(tokenizer, [], f"{context}\n\n{row.prompt}")


def has_tokens(tokenizer: Any, text: str) -> bool:
    """Can the tokenizer write this text, in at least one token?"""
    try:
        return bool(tokenizer(text)["input_ids"])
    except Exception:  # tokenizers raises Exception itself for a word that it does not know
        return False


def make_task(path: str, tokenizer: Any, max_tokens: int = 1024) -> opd.Task:
    """The task of a file."""
    rows = read_rows(path, tokenizer)

    def draw(n: int, split: str, rng: random.Random) -> list[tuple[str, str]]:
        pool = [(text, str(row.answer)) for text, row in rows.items() if row.split == split]
        opd.require(pool, f"task = {path!r}: no row in split {split!r}; add rows that name it")
        times = -(-n // len(pool)) if split == "train" else 1  # held-out rows only once
        return [pair for _ in range(times) for pair in rng.sample(pool, len(pool))][:n]

    def judge(response: str, answer: str) -> bool:
        return last_number(response) == last_number(answer)

    def tell(text: str) -> str:
        return rows[text].response + (tokenizer.eos_token or "")

    def context(prompts: opd.Prompts) -> opd.Prompts:
        more = [teachers_text(tokenizer, text, rows[text]) for text in prompts.text]
        special = tokenizer.chat_template is None
        ids, mask = opd.pad(tokenizer(more, add_special_tokens=special)["input_ids"], left=True)
        return replace(prompts, ids=ids, mask=mask)

    shown = all(row.response is not None for row in rows.values())
    task = texts.text_task(path, tokenizer, max_tokens, draw, judge, tell if shown else None)
    informed = any(row.privileged_context is not None for row in rows.values())
    return replace(task, context=context) if informed else task


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
