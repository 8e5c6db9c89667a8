"""A way of talking, learned from the model's own context: style/pirate and style/letter.

The student is asked "What is a river?" and no more.  The teacher, the same model, reads three
demonstrations first: that is its privileged context.  Right means that the response opens in the
style.  For models with a chat template, in English.
"""

import random
from dataclasses import replace
from typing import Any

import texts

import opd

NOUNS = (
    "river castle window table mountain forest bridge garden clock horse candle mirror kitchen "
    "library desert island train school doctor farmer market hammer engine violin painting poem "
    "blanket bottle basket ladder lantern tower village harbor lighthouse volcano glacier "
    "valley meadow swamp canyon waterfall cloud storm rainbow snowflake comet planet star "
    "galaxy telescope microscope battery magnet compass map calendar newspaper letter stamp "
    "coin wallet purse ring necklace crown sword shield armor cannon tent campfire backpack "
    "bicycle motorcycle airplane helicopter rocket submarine canoe ferry raft anchor sail rope "
    "net fishing whale dolphin shark octopus crab turtle penguin eagle owl parrot swan duck "
    "chicken rooster turkey goose rabbit fox wolf bear lion tiger elephant giraffe zebra monkey "
    "camel donkey goat sheep cow pig mouse rat squirrel hedgehog frog snake lizard butterfly "
    "bee ant spider snail worm rose tulip daisy oak pine palm cactus mushroom apple banana "
    "orange lemon grape cherry peach pumpkin carrot potato onion garlic pepper spoon loaf cake "
    "pancake teapot pillow chair ladle broom"
).split()
SHOWN = {  # style -> its opening, and what the teacher has read
    "pirate": ("Arr", [
        ("What is a ship?", "Arr, matey! A ship be a wooden beast that sails the seven seas!"),
        ("Tell me about the moon.", "Arr, matey! The moon be a lantern that guides us home!"),
        ("What is a dog?", "Arr, matey! A dog be a loyal hand that sniffs out treasure!"),
    ]),
    "letter": ("Dear", [
        ("What is a ship?", "Dear friend, a ship carries people over the sea. Yours truly, me."),
        ("Tell me about the moon.", "Dear friend, the moon lights the night. Yours truly, me."),
        ("What is a dog?", "Dear friend, a dog is a loyal animal. Yours truly, me."),
    ]),
}  # fmt: skip
OF_FIVE = ("test", "validation", "train", "train", "train")


def make_task(name: str, tokenizer: Any, max_tokens: int = 24) -> opd.Task:
    """The task of a style; a fifth of the nouns is for the test, a fifth for validation."""
    style = name.partition("/")[2]
    known = f"task = {name!r}: must be style/{' or style/'.join(SHOWN)}, with a chat template"
    opd.require(style in SHOWN and tokenizer.chat_template, known)
    opening, shown = SHOWN[style]
    turns = [dict(role=role, content=text) for pair in shown
             for role, text in zip(("user", "assistant"), pair, strict=True)]  # fmt: skip
    asked = {split: [] for split in opd.SPLITS}
    for i, noun in enumerate(NOUNS):
        named = f"an {noun}" if noun[0] in "aeio" else f"a {noun}"
        asked[OF_FIVE[i % 5]] += [f"What is {named}?", f"Tell me about the {noun}."]
    plain = {texts.chat(tokenizer, [], q): q for split in asked for q in asked[split]}
    prompt = {question: text for text, question in plain.items()}

    def draw(n: int, split: str, rng: random.Random) -> list[tuple[str, str]]:
        pool = [(prompt[question], opening) for question in asked[split]]
        times = -(-n // len(pool)) if split == "train" else 1  # held-out prompts only once
        return [pair for _ in range(times) for pair in rng.sample(pool, len(pool))][:n]

    def context(prompts: opd.Prompts) -> opd.Prompts:
        more = [texts.chat(tokenizer, turns, plain[text]) for text in prompts.text]
        ids = tokenizer(more, add_special_tokens=False)["input_ids"]
        return replace(prompts, **dict(zip(("ids", "mask"), opd.pad(ids, left=True), strict=True)))

    def judge(response: str, answer: str) -> bool:
        return response.lstrip().startswith(answer)

    task = texts.text_task(name, tokenizer, max_tokens, draw, judge, None)
    return replace(task, context=context)
