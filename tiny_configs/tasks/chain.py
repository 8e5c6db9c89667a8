"""The chain task: `<b> s op d op d ... =`, eight steps modulo 7.

An early mistake spoils all that follows; the verifier reads the token after the first #.
opd.load_task("chain/STYLE") calls `make_task`; STYLE is how a demonstration is written.
"""

import random
import zlib
from functools import partial
from typing import Any

import texts

import opd

MOD, HOPS, TOKENS = 7, 8, 53  # steps of a prompt, and the longest response
STYLES = {
    "careful": "{s} {op} {d} = {r} ;",
    "gaps": "{s} {op} {d} = {r} ;",  # careful, but 22 of 126 facts are unknown: random
    "sums": "{s} {op} {d} = {r} ;",  # careful, and prompts without *: a part of the prompt space
    "reordered": "{op} {d} {s} > {r} |",
    "arrows": "{s} {op} {d} > {r} |",  # careful with the marks of reordered
    "terse": "{r} ;",
    "long": " ".join(["{s} {op} {d} = {r} ;"] * 6),  # four steps, each written six times
    "guess": None,  # no work at all: `:`, and the start value as the answer
}


def steps_of(prompt: str, gaps: bool = False) -> list[dict[str, Any]]:
    """The worked steps of a prompt, each s, op, d and result r; gaps: with unknown facts."""
    _, start, *rest = prompt.split()
    s, steps = int(start), []
    for op, d in zip(rest[0:-1:2], map(int, rest[1:-1:2]), strict=True):
        r = {"+": s + d, "-": s - d, "*": s * d}[op] % MOD
        if gaps and zlib.crc32(f"fact {s} {op} {d}".encode()) % 5 == 0:
            r = zlib.crc32(f"{len(steps)} {prompt}".encode()) % MOD
        steps.append(dict(s=s, op=op, d=d, r=r))
        s = r
    return steps


def make_task(name: str, tokenizer: Any) -> opd.Task:
    """The task; name: chain, or chain/STYLE, or chain/STYLE+STYLE (a prompt's hash picks one)."""
    styles = (name.partition("/")[2] or "careful").split("+")
    known = f"task = {name!r}: must be chain[/STYLE], STYLE from {', '.join(STYLES)}, joined by +"
    opd.require({*styles} <= {*STYLES}, known)
    words = [*map(str, range(MOD)), *"+-*=;#>|:", "<b>", "<e>"]
    missing = sorted({*words} - {*tokenizer.get_vocab()})
    opd.require(not missing, f"task = {name!r}: the student's tokenizer has no token {missing[:1]}")
    hops, tokens = (4, 150) if "long" in styles else (HOPS, TOKENS)
    ops = "+-" if "sums" in styles else "+-*"

    def make(rng: random.Random) -> tuple[str, str]:
        steps = (f"{rng.choice(ops)} {rng.randrange(1, MOD)}" for _ in range(hops))
        text = " ".join(["<b>", str(rng.randrange(MOD)), *steps, "="])
        return text, str(steps_of(text)[-1]["r"])

    def tell(text: str) -> str:
        style = styles[zlib.crc32(f"style {text}".encode()) % len(styles)]
        steps, written = steps_of(text, gaps=style == "gaps"), STYLES[style]
        work = [written.format(**step) for step in steps] if written else [":"]
        final = steps[-1]["r"] if written else steps[0]["s"]
        return " ".join([*work, "#", str(final), "<e>"])

    def judge(response: str, answer: str) -> bool:
        return response.partition("#")[2].split()[:1] == [answer]

    draw = partial(texts.fresh_pairs, make)
    return texts.text_task(name, tokenizer, tokens, draw, judge, tell)
