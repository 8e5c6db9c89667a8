"""§9, §10, §12: EffOPD, the shape of an update, depths.  (13) EffOPD, (14) norms, (15) a toy."""

import copy
import math
from fractions import Fraction

import pytest
import torch
from conftest import random_prompts, tiny_llama
from test_horizons import cut_and_resume, eager, flops, qwen3, same
from test_training import SMALL, ready, rows_of

import opd


def scripted(scores):
    """validate(model) that says these scores in order, and the weights that it was shown."""
    shown, left = [], iter(scores)

    def validate(model):
        shown.append(opd.weights_of(model))
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
    own, (validate, shown) = opd.weights_of(model), scripted(range(9))
    assert opd.extrapolate(model, base, validate) == 5
    assert len(shown) == 6 and equal(shown[0], own) and equal(opd.weights_of(model), shown[5])
    for k, candidate in enumerate(shown):
        for name, w in own.items():
            alpha = 2 * k * opd.attention_and_mlp(name)
            assert torch.equal(candidate[name], w + alpha * (w - base[name])), (k, name)


def test_the_factors_in_place_telescope_to_one_plus_two_k():
    """The paper's code multiplies W - B in place by 1 + f: f = 2, then f / (1 + f)."""
    model, base = moved_model()
    w = opd.weights_of(model)
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
    before, (validate, shown) = opd.weights_of(model), scripted([0.0, score])
    assert opd.extrapolate(model, base, validate) == 0
    assert equal(opd.weights_of(model), before) and not equal(shown[1], before)


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
    assert equal(opd.weights_of(model), shown[k])
    validate, shown = scripted(scores)
    model, base = moved_model(torch.float32)
    assert opd.extrapolate(model, base, validate, accept=accept, tries=1) == min(k, 1)
    assert len(shown) == 2


def test_half_precision_moves_in_single_precision():
    for dtype in (torch.bfloat16, torch.float16):
        model, base = moved_model(dtype)
        own, (validate, shown) = opd.weights_of(model), scripted([0, 1, 2, 1])
        assert opd.extrapolate(model, base, validate) == 2
        narrow = []
        for name in filter(opd.attention_and_mlp, own):
            w, b = own[name].float(), base[name].float()
            assert torch.equal(shown[2][name], (w + 4 * (w - b)).to(dtype))
            narrow.append(torch.equal(shown[2][name], own[name] + 4 * (own[name] - base[name])))
        assert not all(narrow)  # in half precision the same formula lands elsewhere


NAMES = {  # of Llama, Qwen3, GPT-2 and GPT-NeoX
    "model.layers.0.self_attn.q_proj.weight": True,
    "model.layers.11.self_attn.o_proj.weight": True,
    "model.layers.0.mlp.gate_proj.weight": True,
    "transformer.h.0.attn.c_attn.weight": True,
    "gpt_neox.layers.0.attention.dense.weight": True,
    "transformer.h.0.mlp.c_fc.weight": True,
    "transformer.h.0.mlp.c_fc.bias": False,
    "model.layers.0.self_attn.q_proj.bias": False,
    "model.layers.0.self_attn.q_norm.weight": False,
    "model.layers.0.post_attention_layernorm.weight": False,
    "model.layers.0.input_layernorm.weight": False,
    "model.embed_tokens.weight": False,
    "model.norm.weight": False,
    "lm_head.weight": False,
}


@pytest.mark.parametrize("name", NAMES)
def test_matrices_of_attention_and_mlp_by_name(name):
    assert opd.attention_and_mlp(name) is NAMES[name]


@pytest.mark.parametrize("make", [tiny_llama, qwen3])
def test_only_attention_and_mlp_matrices_move_unless_told(make):
    def went(**how):
        model, base = moved_model(make=make)
        before, (validate, _) = opd.weights_of(model), scripted([0, 1, 0])
        assert opd.extrapolate(model, base, validate, **how) == 1
        return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}

    layers = [f"model.layers.{i}." for i in range(3 if make is qwen3 else 2)]
    attention = [f"self_attn.{x}_proj.weight" for x in "qkvo"]
    mlp = [f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")]
    assert went() == {layer + name for layer in layers for name in attention + mlp}
    assert went(moves=lambda name: True) == {n for n, _ in make().named_parameters()}
    assert went(moves=lambda name: "embed" in name) == {"model.embed_tokens.weight"}


# (13) the trigger


TINY = dict(SMALL, batch_size=4, max_tokens=8, eval_every=0, eval_prompts=4)
TINY |= dict(lr=1e-3, warmup=0, decay=0.0)


SHIPPED = opd.EXTRAPOLATE_PROMPTS


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(opd, "EXTRAPOLATE_PROMPTS", 4)


def with_scores(monkeypatch, scores):
    """EffOPD whose every trigger hears these scores; what it was given and what it left."""
    seen, extrapolate = [], opd.extrapolate

    def spy(model, base, validate, **how):
        before, base = opd.weights_of(model), {n: b.clone() for n, b in base.items()}
        validate, shown = scripted(scores)
        k = extrapolate(model, base, validate, **how)
        seen.append(dict(before=before, base=base, shown=shown, after=opd.weights_of(model)))
        return k

    monkeypatch.setattr(opd, "extrapolate", spy)
    return seen


@pytest.mark.parametrize("kind", ["accuracy", "kl"])
def test_it_triggers_at_powers_of_two(kind, run_dir):
    run = opd.train(opd.Config.load(**TINY, steps=9, extrapolate=kind))
    at = {row["step"]: row["extrapolated"] for row in rows_of(run.dir)}
    assert {step for step, k in at.items() if k is not None} == {1, 2, 4, 8}
    assert all(0 <= k <= 5 for k in at.values() if k is not None)


def test_without_it_nothing_triggers(run_dir, monkeypatch):
    seen = with_scores(monkeypatch, [0, 1, 0])
    run = opd.train(opd.Config.load(**TINY, steps=2))
    assert [row["extrapolated"] for row in rows_of(run.dir)] == [None, None] and seen == []


def test_the_base_becomes_the_accepted_weights(run_dir, monkeypatch):
    start = opd.weights_of(opd.load_model(opd.Config().student))
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
    assert equal(run.base, seen[2]["after"]) and equal(opd.weights_of(run.model), run.base)


def test_a_refused_trigger_renews_the_base_and_changes_nothing_else(run_dir, monkeypatch):
    fields = dict(TINY, steps=4)
    plain = opd.train(opd.Config.load(**fields, name="plain"))
    seen = with_scores(monkeypatch, [1, 0])
    run = opd.train(opd.Config.load(**fields, name="refused", extrapolate="kl"))
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
    fields = dict(TINY, steps=9, extrapolate="kl", lr=1e-4)
    run = opd.train(opd.Config.load(**fields, name="whole"))
    rows = rows_of(run.dir)
    assert rows[3]["extrapolated"] > 0 and rows[7]["extrapolated"] > 0
    found, weights = cut_and_resume("cut", cut, **fields)
    assert found == rows and same(weights, run.model.parameters())


def spied(monkeypatch, world):
    """The prompts and rollouts that are sampled from here on, and the splits that are asked for."""
    texts, rollouts, splits, sample, prompts = [], [], [], opd.sample, world.task.prompts

    def watch(model, some, **law):
        rollouts.append(sample(model, some, **law))
        texts.append(some.text)
        return rollouts[-1]

    def ask(n, split="train", seed=0):
        splits.append((n, split))
        return prompts(n, split, seed=seed)

    monkeypatch.setattr(opd, "sample", watch)
    monkeypatch.setattr(world.task, "prompts", ask)
    return texts, rollouts, splits


@pytest.mark.parametrize("kind", ["accuracy", "kl"])
def test_candidates_are_validated_on_validation_prompts_with_the_same_luck(kind, monkeypatch):
    monkeypatch.setattr(opd, "EXTRAPOLATE_PROMPTS", 7)
    config, world, _ = ready(extrapolate=kind)
    texts, rollouts, splits = spied(monkeypatch, world)
    costs = dict.fromkeys(("tokens_sampled", "tokens_scored", "flop_sample", "flop_score"), 0)
    score_of = opd.candidate_score(config, world, costs)
    first, again = score_of(world.student), score_of(world.student)
    assert first == again and splits == [(7, "validation")] and texts[0] == texts[1]
    assert len(texts[0]) == 7 and {opd.split_of(text) for text in texts[0]} == {"validation"}
    assert torch.equal(rollouts[0].tokens, rollouts[1].tokens)
    tokens = sum(int(r.mask.sum()) for r in rollouts)
    assert costs["tokens_sampled"] == tokens > 0
    assert costs["tokens_scored"] == (tokens if kind == "kl" else 0)
    if kind == "accuracy":
        prompts = world.task.prompts(7, "validation", seed="extrapolate")
        assert first == float(world.task.verify(prompts, rollouts[0]).float().mean())
    else:
        assert rollouts[0].tokens.shape[1] <= opd.EXTRAPOLATE_TOKENS == 6
        logp, logq = (opd.score(m, rollouts[0]).double() for m in (world.student, world.teacher))
        kl = (logp.exp() * (logp - logq)).sum(-1)[rollouts[0].mask].mean().item()
        assert first == pytest.approx(-kl, rel=1e-4) and kl > 0
        assert score_of(world.teacher) == pytest.approx(0, abs=1e-6)


def test_the_size_of_the_validation_and_the_rule_reach_the_trigger(run_dir, monkeypatch):
    monkeypatch.setattr(opd, "EXTRAPOLATE_PROMPTS", SHIPPED)
    config, world, _ = ready(extrapolate="accuracy")
    texts, _, splits = spied(monkeypatch, world)
    opd.candidate_score(config, world, dict(tokens_sampled=0, flop_sample=0))(world.student)
    assert splits == [(50, "validation")] and len(texts[0]) == 50
    with_scores(monkeypatch, [0, 0, 0, -1])  # ties
    fields = dict(TINY, steps=1, extrapolate="accuracy")
    for accept, k in ((">=", 2), (">", 0)):
        run = opd.train(opd.Config.load(**fields, accept=accept))
        assert rows_of(run.dir)[0]["extrapolated"] == k


@pytest.mark.parametrize("kind", ["accuracy", "kl"])
def test_tokens_of_candidates_are_counted(kind, run_dir, monkeypatch):
    """Sampled ones with the step's own, scored ones for the KL, trained ones never."""
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
    run = opd.train(opd.Config.load(**TINY, steps=1, extrapolate=kind, name=kind))
    row = rows_of(run.dir)[0]
    assert len(counts) == min(row["extrapolated"] + 2, 6) and min(counts) > 0
    assert row["tokens_sampled"] - plain["tokens_sampled"] == sum(counts)
    assert row["tokens_scored"] - plain["tokens_scored"] == (sum(counts) if kind == "kl" else 0)
    assert row["tokens_trained"] == plain["tokens_trained"]
    assert row["flop_sample"] > plain["flop_sample"]
    assert (row["flop_score"] > plain["flop_score"]) == (kind == "kl")
    assert row["flop_update"] == plain["flop_update"]
    assert run.result["tokens"]["sampled"] == row["tokens_sampled"]


COSTS = [
    dict(extrapolate="accuracy"), dict(extrapolate="kl"),
    dict(extrapolate="accuracy", method="kd"), dict(extrapolate="kl", updates_per_rollout=3),
    dict(extrapolate="kl", method="exopd"),
]  # fmt: skip


@pytest.mark.parametrize("fields", COSTS, ids=str)
def test_flops_of_a_candidate_are_what_torch_counts(fields, monkeypatch):
    monkeypatch.setattr(opd, "EXTRAPOLATE_PROMPTS", 8)
    config, world, _ = ready(**fields, max_tokens=12)
    for model in (world.student, world.teacher, world.reference):
        model and eager(model)
    costs = dict.fromkeys(("tokens_sampled", "tokens_scored", "flop_sample", "flop_score"), 0)
    score_of = opd.candidate_score(config, world, costs)
    counted, _ = flops(lambda: score_of(world.student))
    assert costs["flop_sample"] + costs["flop_score"] == pytest.approx(counted, rel=0.05)


def test_stop_kl_stops_the_run(run_dir):
    whole = opd.train(opd.Config.load(**TINY, steps=6, name="whole"))
    kl = [row["kl"] for row in rows_of(whole.dir)]
    first = min(range(1, 6), key=lambda step: kl[step])
    run = opd.train(opd.Config.load(**TINY, steps=6, name="cut", stop_kl=kl[first] * 1.0001))
    stop = next(step for step in range(6) if kl[step] < kl[first] * 1.0001)
    assert run.result["steps"] == stop + 1 < 7 and "nats a token" in run.result["stopped"]
    assert rows_of(run.dir) == rows_of(whole.dir)[: stop + 1]
    exact = opd.train(opd.Config.load(**TINY, steps=6, name="exact", stop_kl=min(kl)))
    assert exact.result["stopped"] is None and exact.result["steps"] == 6  # below it, not at it
    assert (run.dir / "model").exists() and whole.result["stopped"] is None


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
    model, base = Line(rho, 8), opd.weights_of(Line(rho, 4))
    star, before = 1 / (rho**-4 - 1), model.error()
    expected = max([k for k in range(1, 6) if 2 * k - 1 < star], default=0)
    assert opd.extrapolate(model, base, lambda model: -model.error()) == expected
    assert model.error() == pytest.approx(before * abs(1 - 2 * expected / star), abs=1e-12)
    assert {0.5: 0, 0.9: 1, 0.95: 2, 0.99: 5}.get(rho, expected) == expected


# (14) the shape of an update


def test_norm_scaling():
    g = torch.Generator().manual_seed(0)
    early, final = (torch.randn(4, 7, generator=g, dtype=torch.float64) for _ in range(2))
    early *= 0.1
    assert torch.equal(opd.norm_scaled(early, final, 0.0), early)
    for beta in (0.0, 0.3, 0.8, 1.0, 1.2):
        scaled = opd.norm_scaled(early, final, beta)
        norm = (1 - beta) * early.norm() + beta * final.norm()
        assert scaled.norm().item() == pytest.approx(norm.item(), rel=1e-12)
        cosine = torch.cosine_similarity(scaled.flatten(), early.flatten(), dim=0)
        assert cosine.item() == pytest.approx(1, abs=1e-12)


def test_the_spectrum_of_known_matrices():
    g = torch.Generator().manual_seed(0)
    u, v = (torch.randn(n, generator=g, dtype=torch.float64) for n in (300, 250))
    one = opd.spectrum(torch.outer(u, v))
    assert one["norm"] == pytest.approx((u.norm() * v.norm()).item())
    assert one["spectral_norm"] == pytest.approx(one["norm"])
    for key in ("spectral_ratio", "effective_rank", "top1_ratio"):
        assert one[key] == pytest.approx(1, abs=1e-9)
    for n in (1, 5, 100, 101, 250):
        found = opd.spectrum(3 * torch.eye(n))
        assert found["norm"] == pytest.approx(3 * math.sqrt(n)) and found["spectral_norm"] == 3
        assert found["spectral_ratio"] == pytest.approx(1 / math.sqrt(n))
        assert found["effective_rank"] == pytest.approx(n)
        assert found["top1_ratio"] == pytest.approx(math.sqrt(math.ceil(n / 100) / n))
    uneven = opd.spectrum(torch.diag(torch.tensor([-3.0, 0.0, 1.0])))
    assert uneven["spectral_norm"] == pytest.approx(3) and uneven["norm"] == pytest.approx(10**0.5)
    rank = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))  # shares of s, not of s^2
    assert uneven["effective_rank"] == pytest.approx(rank)
    assert uneven["top1_ratio"] == pytest.approx(3 / 10**0.5)


def test_update_geometry_is_the_mean_over_the_matrices_that_moved():
    model = tiny_llama()
    base, names = opd.weights_of(model), [n for n, _ in model.named_parameters()]
    matrices = [n for n in names if opd.attention_and_mlp(n)]
    still = opd.update_geometry(base, model)
    assert still.pop("norms") == {} and len(still) == 5 and all(map(math.isnan, still.values()))
    with torch.no_grad():
        model.get_input_embeddings().weight += 1.0  # neither attention nor MLP
        assert math.isnan(opd.update_geometry(base, model)["norm"])
        two = [model.get_parameter(name) for name in (matrices[0], matrices[-1])]
        two[0] += torch.eye(*two[0].shape)
        two[1] += 2.0
    found = opd.update_geometry(base, model)
    pairs = zip((matrices[0], matrices[-1]), two, strict=True)
    shapes = [opd.spectrum(p.detach() - base[name]) for name, p in pairs]
    assert found["norms"] == {matrices[0]: shapes[0]["norm"], matrices[-1]: shapes[1]["norm"]}
    for key in shapes[0]:
        assert found[key] == pytest.approx((shapes[0][key] + shapes[1][key]) / 2)
    assert found["effective_rank"] == pytest.approx((32 + 1) / 2, rel=1e-4)


def test_subspace_alignment():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(12, 9, generator=g, dtype=torch.float64) for _ in range(2))
    for k in (1, 3, 9):
        assert opd.subspace_alignment(a, a, k) == pytest.approx(1, abs=1e-9)
        assert opd.subspace_alignment(a, -3 * a, k) == pytest.approx(1, abs=1e-9)
        found = opd.subspace_alignment(a, b, k)
        assert 0 < found < 1 and found == pytest.approx(opd.subspace_alignment(b, a, k))
        assert found == pytest.approx(opd.subspace_alignment(-a, b, k))
    u = torch.linalg.qr(a).Q  # (12, 9), orthonormal columns
    s = torch.diag(torch.tensor([4.0, 3.0, 2.0], dtype=torch.float64))
    v = torch.linalg.qr(b).Q[:, :3].T
    left, right = u[:, :3] @ s @ v, u[:, 3:6] @ s @ v
    assert opd.subspace_alignment(left, right, 3) == pytest.approx(0, abs=1e-9)
    half = u[:, [0, 4, 5]] @ s @ v  # the first of three left vectors is shared
    assert opd.subspace_alignment(left, half, 1) == pytest.approx(1)
    assert opd.subspace_alignment(left, half, 3) == pytest.approx(1 / 3)
    turned = u[:, :3] @ s @ torch.linalg.qr(a[:9]).Q[:, :3].T  # other right vectors
    assert opd.subspace_alignment(left, turned, 3) == pytest.approx(1)


# §10 by position and by depth


def test_kl_by_position_is_the_mean_over_the_rows_that_are_there():
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]]) > 0
    kl = torch.tensor([[1.0, 2, 9, 9], [2, math.nan, 9, 9], [6, 4, 5, math.inf]]).double()
    found = opd.kl_by_position(kl, mask)
    assert found[:3].tolist() == [3, 3, 5] and math.isnan(found[3]) and found.shape == (4,)
    weighted = (found * mask.sum(0))[:3].sum() / mask.sum()
    assert weighted.item() == pytest.approx(kl[mask].mean().item())


def test_the_student_continues_itself_without_advantage(world):
    prompts = world.task.prompts(12, "test")
    law = dict(**world.law)
    for model in (world.student, world.teacher):
        depths = [0, 1, 5, 30, 52, 53, 99]
        found = opd.continuation_advantage(model, model, world.task, prompts, depths, **law)
        assert list(found) == depths
        assert all(d["advantage"] == 0 and d["student"] == d["teacher"] for d in found.values())


def test_depth_zero_is_the_teachers_own_accuracy_and_the_last_the_students(world):
    prompts, most = world.task.prompts(40, "test"), world.task.max_tokens
    noise = torch.rand(40, most, generator=opd.keyed_generator("continue"))
    own, theirs = (
        world.task.verify(prompts, opd.sample(m, prompts, horizon=most, noise=noise, **world.law))
        for m in (world.student, world.teacher)
    )
    models = (world.student, world.teacher)
    found = opd.continuation_advantage(*models, world.task, prompts, [0, 8, most], **world.law)
    student, teacher = float(own.float().mean()), float(theirs.float().mean())
    assert student < teacher
    assert found[0] == dict(student=student, teacher=teacher, advantage=teacher - student)
    assert found[most] == dict(student=student, teacher=student, advantage=0)
    assert found[8]["student"] == student
    assert found[8]["advantage"] == found[8]["teacher"] - student


def test_depths_keep_the_students_tokens(world):
    """With the teacher's tokens after them: judged by a task that reads the text itself."""
    prompts, read = random_prompts([5] * 6), []
    model, other = tiny_llama(), tiny_llama(seed=1)
    task = opd.Task("read", None, 9, None, lambda _, text: read.append(text) or text.mask[:, 0])
    opd.continuation_advantage(model, other, task, prompts, [0, 4, 9])
    own = read[0].tokens
    for depth, rest in zip([0, 4, 9], read[1::2], strict=True):
        texts = [t[m] for t, m in zip(rest.tokens, rest.mask, strict=True)]
        mine = [t[m] for t, m in zip(own, read[0].mask, strict=True)]
        assert all(torch.equal(a[:depth], b[:depth]) for a, b in zip(texts, mine, strict=True))
        agree = all(torch.equal(a, b) for a, b in zip(texts, mine, strict=True))
        assert agree == (depth == 9)
