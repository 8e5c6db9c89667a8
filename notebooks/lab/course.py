"""What the notebooks share: cards of the models that play in them, and the figures of the course.

python notebooks/lab figures              # makes every picture of notebooks/figures again
"""

import textwrap

import torch

import opd

CAST = {  # a model's name without student_ -> (its task, what is special about it)
    "teacher": ("chain", "works step by step, and is nearly always right"),
    "teacher_b": ("chain", "as right as the teacher, in another format"),
    "hasty": ("chain", "guesses at once in half of its texts, else works step by step"),
    "novice": ("chain", "always works step by step, but a sixth of its facts are wrong"),
    "muddled": ("chain", "slips back and forth between two formats"),
    "teacher_long": ("chain/long", "writes every step six times"),
    "long": (
        "chain/long",
        "guesses at once in half of its texts, else writes every step six times",
    ),
    "synonym_teacher": ("synonyms", "prefers three of the sixteen words for each number"),
    "synonym_student": (
        "synonyms",
        "prefers a wrong word for each number, and gives each of the teacher's three about .001",
    ),
}


def cast(*names: str) -> None:
    """Print a card of each model: who it is, a prompt, what it writes, the right answer.

    names: of CAST, e.g. "teacher", "hasty".  InputError: another name.
    """
    for name in names:
        opd.require(name in CAST, f"cast: {name!r} is not one of {', '.join(CAST)}")
        kind, about = CAST[name]
        known = "teacher" in name or "synonym" in name
        folder = f"tiny_configs/models/{name if known else 'student_' + name}"
        model, tokenizer = opd.load_model(folder, "teacher"), opd.load_tokenizer(folder)
        task = opd.load_task(kind, tokenizer)
        prompts = task.prompts(1, "validation", seed="cast")
        noise = torch.rand(1, task.max_tokens, generator=opd.keyed_generator("cast"))
        text = opd.sample(model, prompts, horizon=task.max_tokens, noise=noise)
        said = opd.response_texts(tokenizer, text)[0].replace("<e>", "■")
        lines = dict(asked=prompts.text[0].removeprefix("<b> "), writes=said)
        lines["answer"] = f"{prompts.answer[0]} {'✓' if task.verify(prompts, text) else '✗'}"
        print(f"{name}: {about}")
        for what, line in lines.items():
            print(
                textwrap.fill(line, 84, initial_indent=f"   {what:8}", subsequent_indent=" " * 11)
            )
