"""§11, §14: EffOPD and the early stop.  (13) EffOPD, (15) a toy.  (14) is in test_geometry.py."""

import copy
import math
from fractions import Fraction
from functools import partial

import lab
import pytest
import torch
from conftest import rows_of, tiny_llama
from test_horizons import cut_and_resume, eager, flops, mixture, qwen3, same
from test_training import SMALL, ready
from texts import split_of

import opd


def scripted(scores):
    """validate(model) that says these scores in order, and the weights that it was shown."""
    shown, left = [], iter(scores)

    def validate(model):
        shown.append(lab.weights_of(model))
        return next(left)

    return validate, shown


def moved_model(dtype=torch.float64, make=tiny_llama, seed=0):
    """A model and a base that it has moved away from, in every parameter."""
    model, g = make().to(dtype), torch.Generator().manual_seed(seed)
    base = {
        n: (p.detach().double() + 0.01 * torch.randn(p.shape, generator=g).double()).to(dtype)
        for n, p in model.named_parameters()
    }
    return model, base


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


# (13) the candidates


def test_candidate_k_is_w_plus_2k_times_the_way_from_the_base():
    model, base = moved_model()
    own, (validate, shown) = lab.weights_of(model), scripted(range(9))
    assert opd.extrapolate(model, base, validate) == 5
    assert len(shown) == 6 and equal(shown[0], own) and equal(lab.weights_of(model), shown[5])
    for k, candidate in enumerate(shown):
        for name, w in own.items():
            alpha = 2 * k * opd.attention_and_mlp(name)
            assert torch.equal(candidate[name], w + alpha * (w - base[name])), (k, name)


def test_the_factors_in_place_telescope_to_one_plus_two_k():
    """The paper's code multiplies W - B in place by 1 + f: f = 2, then f / (1 + f)."""
    model, base = moved_model()
    w = lab.weights_of(model)
    validate, shown = scripted(range(6))
    opd.extrapolate(model, base, validate)
    f, product = Fraction(2), Fraction(1)
    for k in range(1, 6):
        assert f == Fraction(2, 2 * k - 1)
        for name in filter(opd.attention_and_mlp, w):
            w[name] += float(f) * (w[name] - base[name])
            assert torch.allclose(w[name], shown[k][name], atol=1e-12, rtol=0)
        product, f = product * (1 + f), f / (1 + f)
        assert product == 1 + 2 * k


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", [-1.0, math.nan])
def test_no_candidate_accepted_leaves_the_weights_bit_by_bit(dtype, score):
    model, base = moved_model(dtype)
    before, (validate, shown) = lab.weights_of(model), scripted([0.0, score])
    assert opd.extrapolate(model, base, validate) == 0
    assert equal(lab.weights_of(model), before) and not equal(shown[1], before)


SCRIPTS = [  # scores of W and of candidates 1, 2, ...; k by >= and by >
    ([0.5, 0.6, 0.55, 9, 9, 9], 1, 1),  # better than W, worse than candidate 1
    ([0.5, 0.4, 9, 9, 9, 9], 0, 0),
    ([0.5, 0.5, 0.6, 0.6, 0.5, 9], 3, 0),
    ([0.5, 0.6, 0.7, 0.7, 0.8, 0.9], 5, 2),
    ([0.0, 1, 2, 3, 4, 5, 6], 5, 5),  # five tries
]


@pytest.mark.parametrize("accept", [">=", ">"])
@pytest.mark.parametrize("scores, reached, beaten", SCRIPTS, ids=str)
def test_it_stops_at_the_first_failure_and_only_at_least_accepts_a_tie(
    scores, reached, beaten, accept
):
    (model, base), (validate, shown) = moved_model(torch.float32), scripted(scores)
    k = opd.extrapolate(model, base, validate, accept=accept)
    assert k == (reached if accept == ">=" else beaten)
    assert len(shown) == min(k + 2, 6)  # W, the accepted ones, the one that failed
    assert equal(lab.weights_of(model), shown[k])
    validate, shown = scripted(scores)
    model, base = moved_model(torch.float32)
    assert opd.extrapolate(model, base, validate, accept=accept, tries=1) == min(k, 1)
    assert len(shown) == 2


def test_half_precision_moves_in_single_precision():
    for dtype in (torch.bfloat16, torch.float16):
        model, base = moved_model(dtype)
        own, (validate, shown) = lab.weights_of(model), scripted([0, 1, 2, 1])
        assert opd.extrapolate(model, base, validate) == 2
        narrow = []
        for name in filter(opd.attention_and_mlp, own):
            w, b = own[name].float(), base[name].float()
            assert torch.equal(shown[2][name], (w + 4 * (w - b)).to(dtype))
            narrow.append(torch.equal(shown[2][name], own[name] + 4 * (own[name] - base[name])))
        assert not all(narrow)  # in half precision the same formula lands elsewhere


NAMES = {  # of Llama, Qwen2, Qwen3, mixtures, GPT-2 and GPT-NeoX
    "model.layers.0.self_attn.q_proj.weight": True,
    "model.layers.11.self_attn.o_proj.weight": True,
    "model.layers.0.mlp.gate_proj.weight": True,
    "transformer.h.0.attn.c_attn.weight": True,
    "gpt_neox.layers.0.attention.dense.weight": True,
    "transformer.h.0.mlp.c_fc.weight": True,
    "transformer.h.0.mlp.c_fc.bias": True,
    "model.layers.0.self_attn.q_proj.bias": True,
    "model.layers.0.self_attn.q_norm.weight": True,
    "model.layers.0.self_attn.k_norm.weight": True,
    "model.layers.0.post_attention_layernorm.weight": True,
    "model.layers.0.mlp.experts.gate_up_proj": True,
    "model.layers.0.mlp.gate.weight": True,
    "transformer.h.0.ln_1.weight": False,
    "model.layers.0.input_layernorm.weight": False,
    "model.embed_tokens.weight": False,
    "model.norm.weight": False,
    "lm_head.weight": False,
}


@pytest.mark.parametrize("name", NAMES)
def test_what_moves_by_name(name):
    """Fault 3 of the first edition: EffOPD's code asks for attn, attention, mlp in the name."""
    assert opd.attention_and_mlp(name) is NAMES[name]


MOVES = {  # a layer's parameters that move; the input's norm does not
    tiny_llama: "self_attn.{q,k,v,o}_proj.weight mlp.{gate,up,down}_proj.weight",
    partial(tiny_llama, attention_bias=True): "self_attn.{q,k,v,o}_proj.{weight,bias} "
    "mlp.{gate,up,down}_proj.weight",
    qwen3: "self_attn.{q,k,v,o}_proj.weight self_attn.{q,k}_norm.weight "
    "mlp.{gate,up,down}_proj.weight",
    mixture: "self_attn.{q,k,v,o}_proj.weight self_attn.{q,k}_norm.weight mlp.gate.weight "
    "mlp.experts.{gate_up,down}_proj",
}


def spelled(pattern):
    """a{b,c}d -> abd, acd."""
    head, brace, rest = pattern.partition("{")
    if not brace:
        return [pattern]
    choices, _, tail = rest.partition("}")
    return [name for choice in choices.split(",") for name in spelled(head + choice + tail)]


@pytest.mark.parametrize("make", MOVES, ids=["llama", "with biases", "qwen3", "mixture"])
def test_all_of_attention_and_mlp_moves_unless_told(make):
    """Fault 3: biases, q_norm, k_norm, post_attention_layernorm and fused experts too."""

    def went(**how):
        model, base = moved_model(make=make)
        before, (validate, _) = lab.weights_of(model), scripted([0, 1, 0])
        assert opd.extrapolate(model, base, validate, **how) == 1
        return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}

    patterns = MOVES[make].split() + ["post_attention_layernorm.weight"]
    names = [name for pattern in patterns for name in spelled(pattern)]
    layers = range(make().config.num_hidden_layers)
    assert went() == {f"model.layers.{i}.{name}" for i in layers for name in names}
    assert went(moves=lambda name: True) == {n for n, _ in make().named_parameters()}
    assert went(moves=lambda name: "embed" in name) == {"model.embed_tokens.weight"}


# (13) the trigger


TINY = dict(SMALL, batch_size=4, max_tokens=8, eval_every=0, eval_prompts=4)
TINY |= dict(lr=1e-3, warmup=0, decay=0.0, diagnose_every=1)


@pytest.fixture(autouse=True)
def few(quick, monkeypatch):
    monkeypatch.setattr(opd, "EXTRAPOLATE_PROMPTS", 4)


def test_it_validates_by_accuracy_alone():
    """Fault 9 of the first edition: validation by a KL ignored the temperature; it is gone."""
    with pytest.raises(opd.InputError, match="^extrapolate = 'kl'"):
        opd.Config.load(extrapolate="kl")
    for gone in ("accept", "horizon_kl"):
        with pytest.raises(opd.InputError, match=f"^{gone} = 1: unknown"):
            opd.Config.load(**{gone: 1})


def test_there_is_no_cold_start():
    """Fault 6 of the first edition: an entropy bonus acted in it; sft, keep = right does it."""
    with pytest.raises(opd.InputError, match="^cold_start = 5: unknown"):
        opd.Config.load(cold_start=5)
    assert opd.Config.load(method="sft", states="teacher", keep="right").feedback == "imitation"


def with_scores(monkeypatch, scores):
    """EffOPD whose every trigger hears these scores; what it was given and what it left."""
    seen, extrapolate = [], opd.extrapolate

    def spy(model, base, validate, **how):
        before, base = lab.weights_of(model), {n: b.clone() for n, b in base.items()}
        validate, shown = scripted(scores)
        k = extrapolate(model, base, validate, **how)
        seen.append(dict(before=before, base=base, shown=shown, after=lab.weights_of(model)))
        return k

    monkeypatch.setattr(opd, "extrapolate", spy)
    return seen


def test_it_triggers_at_powers_of_two(run_dir):
    run = opd.train(opd.Config.load(**TINY, steps=9, extrapolate="accuracy"))
    at = {row["step"]: row["extrapolated"] for row in rows_of(run.dir)}
    assert {step for step, k in at.items() if k is not None} == {1, 2, 4, 8}
    assert all(0 <= k <= 5 for k in at.values() if k is not None)


def test_without_it_nothing_triggers(run_dir, monkeypatch):
    seen = with_scores(monkeypatch, [0, 1, 0])
    run = opd.train(opd.Config.load(**TINY, steps=2))
    assert [row["extrapolated"] for row in rows_of(run.dir)] == [None, None] and seen == []


def test_the_base_becomes_the_accepted_weights(run_dir, monkeypatch):
    start = lab.weights_of(opd.load_model(opd.Config().student))
    seen = with_scores(monkeypatch, [0, 1, 2, 1])
    run = opd.train(opd.Config.load(**TINY, steps=4, extrapolate="accuracy"))
    assert [row["extrapolated"] for row in rows_of(run.dir)] == [2, 2, None, 2]
    assert len(seen) == 3 and equal(seen[0]["base"], start)
    for earlier, later in zip(seen, seen[1:], strict=False):
        assert equal(later["base"], earlier["after"]) and equal(
            earlier["after"], earlier["shown"][2]
        )
        assert not equal(earlier["after"], earlier["before"])
    assert equal(seen[1]["after"], seen[1]["shown"][2])
    assert equal(run.base, seen[2]["after"]) and equal(lab.weights_of(run.model), run.base)


def test_a_refused_trigger_renews_the_base_and_changes_nothing_else(run_dir, monkeypatch):
    fields = dict(TINY, steps=4)
    plain = opd.train(opd.Config.load(**fields, name="plain"))
    seen = with_scores(monkeypatch, [1, 0])
    run = opd.train(opd.Config.load(**fields, name="refused", extrapolate="accuracy"))
    assert len(seen) == 3 and all(equal(s["before"], s["after"]) for s in seen)
    assert not equal(seen[1]["base"], seen[0]["base"]) and equal(seen[1]["base"], seen[0]["after"])
    assert same(plain.model.parameters(), run.model.parameters())
    drop = lambda rows: [{**row, "extrapolated": 0} for row in rows]  # noqa: E731
    assert drop(rows_of(run.dir)) == drop(rows_of(plain.dir))


def test_a_trigger_leaves_the_optimizer_and_the_learning_rate_as_they_are(run_dir, monkeypatch):
    made, states, make = [], [], opd.make_optimizer
    monkeypatch.setattr(opd, "make_optimizer", lambda *args: made.append(make(*args)) or made[-1])
    seen, inner = with_scores(monkeypatch, [0, 1, 0]), opd.extrapolate

    def watched(model, *args, **how):
        states.append(copy.deepcopy(made[0].state_dict()))
        found = inner(model, *args, **how)
        states.append(copy.deepcopy(made[0].state_dict()))
        trained = [p for group in made[0].param_groups for p in group["params"]]
        assert all(a is b for a, b in zip(trained, model.parameters(), strict=True))
        return found

    monkeypatch.setattr(opd, "extrapolate", watched)
    fields = dict(TINY, steps=4, warmup=3)
    run = opd.train(opd.Config.load(**fields, extrapolate="accuracy"))
    assert len(states) == 6 and not equal(seen[0]["before"], seen[0]["after"])
    for before, after in zip(states[0::2], states[1::2], strict=True):
        assert before["param_groups"] == after["param_groups"]
        assert before["state"].keys() == after["state"].keys() and before["state"]
        assert all(equal(s, after["state"][i]) for i, s in before["state"].items())
        assert all(float(s["exp_avg_sq"].max()) > 0 for s in before["state"].values())
    assert [row["lr"] for row in rows_of(run.dir)] == [opd.lr_at(s, run.config) for s in range(4)]


@pytest.mark.parametrize("cut", [3, 4, 5])
def test_an_interrupted_effopd_run_ends_as_an_uninterrupted_one(cut, run_dir):
    """Cut between triggers and right after one; trigger 8 needs the base of step 4."""
    fields = dict(TINY, steps=9, extrapolate="accuracy", lr=1e-4)
    run = opd.train(opd.Config.load(**fields, name="whole"))
    rows = rows_of(run.dir)
    assert rows[3]["extrapolated"] > 0 and rows[7]["extrapolated"] > 0
    found, weights = cut_and_resume("cut", cut, **fields)
    assert found == rows and same(weights, run.model.parameters())


def spied(monkeypatch, world):
    """The prompts and rollouts that are sampled from here on, and the splits that are asked for."""
    texts, rollouts, splits, sample, prompts = [], [], [], opd.sample, world.task.prompts

    def watch(model, some, **how):
        rollouts.append(sample(model, some, **how))
        texts.append((some.text, how["temperature"], how["noise"]))
        return rollouts[-1]

    def ask(n, split="train", seed=0):
        splits.append((n, split))
        return prompts(n, split, seed=seed)

    monkeypatch.setattr(opd, "sample", watch)
    monkeypatch.setattr(world.task, "prompts", ask)
    return texts, rollouts, splits


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_candidates_are_validated_on_validation_prompts_with_the_same_noise(
    temperature, monkeypatch
):
    """Fault 9: at the run's temperature."""
    config, world, _ = ready(extrapolate="accuracy", temperature=temperature)
    monkeypatch.setattr(opd, "EXTRAPOLATE_PROMPTS", 7)
    texts, rollouts, splits = spied(monkeypatch, world)
    costs = dict.fromkeys(("tokens_sampled", "flop_sample"), 0)
    score_of = opd.candidate_score(config, world, costs)
    first, again = score_of(world.student), score_of(world.student)
    assert first == again and splits == [(7, "validation")]
    assert texts[0][:2] == texts[1][:2] and torch.equal(texts[0][2], texts[1][2])
    assert texts[0][1] == temperature
    assert len(texts[0][0]) == 7 and {split_of(text) for text in texts[0][0]} == {"validation"}
    assert torch.equal(rollouts[0].tokens, rollouts[1].tokens)
    tokens = sum(int(r.mask.sum()) for r in rollouts)
    assert costs["tokens_sampled"] == tokens > 0 and costs["flop_sample"] > 0
    prompts = world.task.prompts(7, "validation", seed="extrapolate")
    assert first == pytest.approx(float(world.task.verify(prompts, rollouts[0]).float().mean()))
    assert score_of(world.teacher) == 1.0 > first


def test_process_0_decides_for_all(monkeypatch):
    """Fault 13 of the first edition: each process judged a candidate for itself."""
    config, world, _ = ready(extrapolate="accuracy")
    judged, sent = world.task.verify, []
    monkeypatch.setattr(opd, "EXTRAPOLATE_PROMPTS", 7)

    def score_in(rank, verify):
        monkeypatch.setattr(opd, "RANK", rank)
        monkeypatch.setattr(opd, "RANKS", 2)
        monkeypatch.setattr(opd, "all_reduce", everyone)
        monkeypatch.setattr(world.task, "verify", verify)
        costs = dict(tokens_sampled=0, flop_sample=0)
        return opd.candidate_score(config, world, costs)(world.student)

    def everyone(x, how="SUM"):
        """The sum over two processes, of which process 0 has been here before."""
        assert how == "SUM"
        sent.append(x.clone())
        return x if opd.RANK == 0 else x + sent[0]

    first = score_in(0, judged)
    assert 0 < first < 1
    never = lambda prompts, rollout: torch.zeros(7, dtype=torch.bool)  # noqa: E731
    always = lambda prompts, rollout: torch.ones(7, dtype=torch.bool)  # noqa: E731
    for other in (never, always):  # another card's rounding, at its worst
        assert score_in(1, other) == first
    assert len(sent) == 3


def test_the_size_of_the_validation_and_the_rule_reach_the_trigger(run_dir, monkeypatch):
    monkeypatch.undo()
    config, world, _ = ready(extrapolate="accuracy")
    texts, _, splits = spied(monkeypatch, world)
    opd.candidate_score(config, world, dict(tokens_sampled=0, flop_sample=0))(world.student)
    assert splits == [(50, "validation")] and len(texts[0][0]) == 50
    with_scores(monkeypatch, [0, 0, 0, -1])  # ties are accepted
    run = opd.train(opd.Config.load(**TINY, steps=1, extrapolate="accuracy"))
    assert rows_of(run.dir)[0]["extrapolated"] == 2


def test_tokens_of_candidates_are_counted(run_dir, monkeypatch):
    """Sampled ones with the step's own, scored and trained ones never."""
    plain = rows_of(opd.train(opd.Config.load(**TINY, steps=1, name="plain")).dir)[0]
    counts, make = [], opd.candidate_score

    def spy(*args):
        score_of = make(*args)

        def counted(model):
            with pytest.MonkeyPatch.context() as patch:
                _, rollouts, _ = spied(patch, args[1])
                found = score_of(model)
            counts.append(sum(int(r.mask.sum()) for r in rollouts))
            return found

        return counted

    monkeypatch.setattr(opd, "candidate_score", spy)
    run = opd.train(opd.Config.load(**TINY, steps=1, extrapolate="accuracy", name="effopd"))
    row = rows_of(run.dir)[0]
    assert len(counts) == min(row["extrapolated"] + 2, 6) and min(counts) > 0
    assert row["tokens_sampled"] - plain["tokens_sampled"] == sum(counts)
    assert row["flop_sample"] > plain["flop_sample"]
    for key in ("tokens_scored", "tokens_trained", "flop_score", "flop_update"):
        assert row[key] == plain[key], key
    assert run.result["tokens"]["sampled"] == row["tokens_sampled"]


@pytest.mark.parametrize("method", ["opd_full", "kd"])
def test_flops_of_a_candidate_are_what_torch_counts(method):
    config, world, _ = ready(method=method, extrapolate="accuracy", max_tokens=12)
    eager(world.student)
    costs = dict.fromkeys(("tokens_sampled", "flop_sample"), 0)
    score_of = opd.candidate_score(config, world, costs)
    counted, _ = flops(lambda: score_of(world.student))
    assert costs["flop_sample"] == pytest.approx(counted, rel=1e-3)


# (15) one direction with error rho^t


class Line(torch.nn.Module):
    """One weight, whose error after t steps is rho^t."""

    def __init__(self, rho, t, goal=0.7):
        super().__init__()
        self.mlp = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
        self.goal = goal
        torch.nn.init.constant_(self.mlp.weight, goal + rho**t)

    def error(self):
        return abs(self.mlp.weight.item() - self.goal)


@pytest.mark.parametrize("m, n", [(0, 1), (1, 2), (4, 8)])
@pytest.mark.parametrize("rho", [0.5, 0.9, 0.97, 0.99])
def test_one_direction_is_exact_at_alpha_star_and_no_better_past_twice_that(rho, m, n):
    early, late = (Line(rho, t).mlp.weight.item() for t in (m, n))
    star = 1 / (rho ** (m - n) - 1)
    error = lambda alpha: late + alpha * (late - early) - 0.7  # noqa: E731
    assert error(star) == pytest.approx(0, abs=1e-12)
    assert error(2 * star) == pytest.approx(-error(0), rel=1e-9)
    assert abs(error(1.9 * star)) < error(0) < abs(error(2.1 * star))


@pytest.mark.parametrize("rho", [0.5, 0.7, 0.85, 0.9, 0.93, 0.95, 0.96, 0.97, 0.98, 0.99])
def test_extrapolation_goes_as_far_as_the_error_falls(rho):
    """Step 2k is better than 2k - 2 while the middle of the two, 2k - 1, is short of alpha*."""
    model, base = Line(rho, 8), lab.weights_of(Line(rho, 4))
    star, before = 1 / (rho**-4 - 1), model.error()
    expected = max([k for k in range(1, 6) if 2 * k - 1 < star], default=0)
    assert opd.extrapolate(model, base, lambda model: -model.error()) == expected
    assert model.error() == pytest.approx(before * abs(1 - 2 * expected / star), abs=1e-12)
    assert {0.5: 0, 0.9: 1, 0.95: 2, 0.99: 5}.get(rho, expected) == expected
