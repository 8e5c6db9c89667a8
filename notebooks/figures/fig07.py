"""The figure of notebook 07: one response under five rules."""

import torch
from lab.diagrams import saved, strip
from lab.plots import words
from lab.rules import entropy_gate, position_weights, prune_weights
from matplotlib.figure import Figure

import opd


def rules() -> Figure:
    """One real response under five rules: weights as colours, open gates hatched."""
    pair = dict(student="synonym_student", teacher="synonym_teacher", task="synonyms")
    world = opd.load_world(opd.Config.load(**pair))
    noise = torch.rand(64, 13, generator=opd.keyed_generator("gates"))
    text = opd.sample(world.student, world.task.prompts(64, "validation"), horizon=13, noise=noise)
    with torch.no_grad():
        logp, logq = opd.score(world.student, text), opd.score(world.teacher, text)
    A = opd.of_tokens(logq, text.tokens) - opd.of_tokens(logp, text.tokens)
    low = prune_weights(opd.overlap(logp, logq, 16).ratio, text.mask, 0.7, 0.05)
    rows = {"A = log q(a) − log p(a)": A, "plain OPD: weight": torch.ones_like(A)}
    rows |= {"IW-OPD: weight": position_weights(A, text.mask), "Prune-OPD: weight": 0.5 + low}
    gates = {"AOPD: gate A ≤ 0": A <= 0, "EOPD: gate H(q) > .8": entropy_gate(logq, 0.8)}
    rows |= dict.fromkeys(gates, torch.ones_like(A))
    rows, gates = ({name: x[1] for name, x in some.items()} for some in (rows, gates))
    title = "The same response under each rule (colour: weight; hatched: the gate is open)"
    return strip(words(world.tokenizer, text, 1), rows, title, gates=gates, scale=2.6, numbers=True)


FIGURES = {"rules.png": saved(rules)}
