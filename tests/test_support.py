"""§5, §12: divergences on a part of the vocabulary, sparse teachers, overlaps.

Numbers in brackets are the checks of the project's formula list: (8) supports and their tails,
(17) overlap diagnostics.
"""

import pytest
import torch
from conftest import logit_gradient, random_laws, score_weighted

import opd

P = torch.tensor([0.7, 0.25, 0.05], dtype=torch.float64)
Q = torch.tensor([0.2, 0.1, 0.7], dtype=torch.float64)
REVERSE_TAILS = ["stop_gradient", "generalised", "renormalise", "bucket"]
LOSSES = [(opd.truncated_reverse_kl, tail) for tail in REVERSE_TAILS]
LOSSES += [(opd.truncated_forward_kl, tail) for tail in ("renormalise", "bucket")]
SOURCES = ["student", "teacher", "union", "intersection"]
each_loss = pytest.mark.parametrize(
    "loss, tail", LOSSES, ids=[f"{f.__name__}-{tail}" for f, tail in LOSSES]
)


def only(*members, width=None):
    """A support of the given tokens; width: as many ids, the rest of them not members."""
    ids = list(members) + [0] * ((width or len(members)) - len(members))
    return opd.Support(torch.tensor(ids), torch.arange(len(ids)) < len(members))


def laws(seed, vocab=6):
    """Log-probs of two random laws, (V,), and a boolean support (V,) of 1 to V - 1 tokens."""
    logp, logq = (law[0, 0] for law in random_laws(vocab=vocab, seed=seed))
    g = torch.Generator().manual_seed(seed)
    size = int(torch.randint(1, vocab, (), generator=g))
    inside = torch.zeros(vocab, dtype=torch.bool)
    inside[torch.randperm(vocab, generator=g)[:size]] = True
    return logp, logq, inside


def of_mask(inside):
    """The support of a boolean (V,): every id is listed, the members are valid."""
    return opd.Support(torch.arange(len(inside)), inside)


def listed(logq, ids, tokens):
    """A sparse teacher that lists some ids (B, T, K) of a dense one."""
    return opd.Scores(opd.of_tokens(logq, tokens), ids, logq.gather(-1, ids))


def plainly_differentiated(logp, logq, support):
    """sum_S p log(p/q) with the gradient through everything: verl #5041's bug."""
    lp, lq = logp.gather(-1, support.ids), logq.gather(-1, support.ids)
    return torch.where(support.valid, lp.exp() * (lp - lq), 0.0).sum(-1)


# (8) values


@pytest.mark.parametrize(
    "tail, golden",
    [*zip(REVERSE_TAILS, (1.16421764, 0.45600676, 0.01153813, 0.97405389), strict=True)],
)
def test_golden_values_on_the_first_two_tokens(tail, golden):
    value = opd.truncated_reverse_kl(P.log(), Q.log(), only(0, 1), tail)
    assert value.item() == pytest.approx(golden, abs=1e-8)
    assert opd.truncated_reverse_kl(P.log(), Q.log(), only(1, 0, width=5), tail).item() == (
        pytest.approx(golden, abs=1e-8)  # neither order nor non-members count
    )


def test_golden_forward_values_on_the_first_two_tokens():
    """Renormalised: .4667 log(.6667 / .7368)...; bucket: the full KL, since one token is left."""
    bucket = opd.truncated_forward_kl(P.log(), Q.log(), only(0, 1), "bucket")
    assert bucket.item() == pytest.approx(1.50515846, abs=1e-8)
    p, q = P[:2] / P[:2].sum(), Q[:2] / Q[:2].sum()
    value = opd.truncated_forward_kl(P.log(), Q.log(), only(0, 1), "renormalise")
    assert value.item() == pytest.approx((q * (q / p).log()).sum().item(), abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_a_bucket_lies_between_zero_and_the_full_kl_and_no_valid_loss_is_negative(seed):
    logp, logq, inside = laws(seed)
    support = of_mask(inside)
    for kl, full in (
        (opd.truncated_reverse_kl, opd.reverse_kl),
        (opd.truncated_forward_kl, opd.forward_kl),
    ):
        assert 0 < kl(logp, logq, support, "bucket") <= full(logp, logq) + 1e-12
        assert kl(logp, logq, support, "renormalise") >= -1e-12
    assert opd.truncated_reverse_kl(logp, logq, support, "generalised") > 0


def test_the_bare_sums_can_be_negative_and_the_bucket_is_not():
    """verl #7855: where P > Q, sum_S q log(q/p) < 0."""
    logp, logq = torch.tensor([[0.6, 0.3, 0.1], [0.3, 0.2, 0.5]], dtype=torch.float64).log()
    bare = (logq.exp() * (logq - logp))[:2].sum()
    assert bare < -0.2
    assert opd.truncated_forward_kl(logp, logq, only(0, 1), "bucket") > 0
    swapped = opd.truncated_reverse_kl(logq, logp, only(0, 1), "stop_gradient")
    assert swapped.item() == pytest.approx(bare.item() / 0.5, abs=1e-12)  # 0.3 + 0.2 on S
    assert opd.truncated_reverse_kl(logq, logp, only(0, 1), "generalised") > 0


# (8) gradients


@pytest.mark.parametrize("seed", range(10))
def test_the_gradients_of_all_tails_are_their_closed_forms(seed):
    logp, logq, inside = laws(seed)
    p, q, ell = logp.exp(), logq.exp(), logp - logq
    P, Q, support = p[inside].sum(), q[inside].sum(), of_mask(inside)
    head = torch.where(inside, ell, 0.0)
    on = lambda x: torch.where(inside, x, 0.0)  # noqa: E731
    mean = (p / P * (ell - (P / Q).log()))[inside].sum()
    rest = ((1 - P) / (1 - Q)).log()
    forms = [
        score_weighted(p, head) / P,
        score_weighted(p, head),
        on(p / P * (ell - (P / Q).log() - mean)),
        score_weighted(p, torch.where(inside, ell, rest)),
        on(p / P - q / Q),
        torch.where(inside, p - q, p - p * (1 - Q) / (1 - P)),
    ]
    for (loss, tail), form in zip(LOSSES, forms, strict=True):
        gradient = logit_gradient(lambda x, f=loss, t=tail: f(x, logq, support, t), logp)
        assert torch.allclose(gradient, form, atol=1e-12), (loss.__name__, tail)
        assert abs(gradient.sum()) < 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_differentiating_the_bare_sum_adds_the_gradient_of_the_mass(seed):
    """(8a) The coefficient is 1_S (l + 1): biased, and no tail of ours has it."""
    logp, logq, inside = laws(seed)
    support, p = of_mask(inside), logp.exp()
    biased = logit_gradient(lambda x: plainly_differentiated(x, logq, support), logp)
    form = score_weighted(p, torch.where(inside, logp - logq + 1, 0.0))
    assert torch.allclose(biased, form, atol=1e-12)
    right = logit_gradient(
        lambda x: opd.truncated_reverse_kl(x, logq, support, "generalised"), logp
    )
    mass = logit_gradient(lambda x: x.exp()[inside].sum(), logp)
    assert torch.allclose(biased - right, mass, atol=1e-12) and mass.abs().max() > 0.01


def of_thunlp(logp, logq, support):
    """thunlp/OPD's loss, written out: constants w = p/P on S, advantage l, gradient of log p."""
    lp, lq = logp[support.ids[support.valid]], logq[support.ids[support.valid]]
    weights, advantage = lp.softmax(-1).detach(), (lq - lp).detach()
    return -(weights * advantage * lp).sum()


@pytest.mark.parametrize("seed", range(5))
def test_stop_gradient_is_the_loss_of_thunlp_with_weights_normalised_on_the_support(seed):
    """Fault 2 of the first edition: its weights were p, not p / P; l itself is not renormalised."""
    logp, logq, inside = laws(seed)
    support, p, P = of_mask(inside), logp.exp(), logp.exp()[inside].sum()

    def slope(loss):
        return logit_gradient(lambda x: loss(x, logq, support), logp)

    def ours(tail):
        return lambda *pair: opd.truncated_reverse_kl(*pair, tail)

    eye, ell, expected = torch.eye(6, dtype=p.dtype), logp - logq, torch.zeros_like(p)
    for v in inside.nonzero().flatten():
        expected += p[v] / P * ell[v] * (eye[v] - p)
    assert torch.allclose(slope(ours("stop_gradient")), expected, atol=1e-12)
    assert torch.allclose(slope(ours("stop_gradient")), slope(of_thunlp), atol=1e-12)
    assert torch.allclose(slope(ours("stop_gradient")), slope(ours("generalised")) / P, atol=1e-12)
    value = opd.truncated_reverse_kl(logp, logq, support, "stop_gradient")
    assert value.item() == pytest.approx((p / P * ell)[inside].sum().item(), abs=1e-12)
    assert P < 0.99 and expected.abs().max() > 1e-3


@each_loss
def test_every_tail_is_zero_and_at_rest_where_the_laws_agree(loss, tail):
    _, logq, inside = laws(3)
    support = of_mask(inside)
    assert abs(loss(logq, logq, support, tail)) < 1e-12
    gradient = logit_gradient(lambda x: loss(x, logq, support, tail), logq)
    assert gradient.abs().max() < 1e-12


def test_the_bare_sum_drives_mass_out_of_the_support_where_the_laws_agree():
    _, logq, inside = laws(3)
    q = logq.exp()
    biased = logit_gradient(lambda x: plainly_differentiated(x, logq, of_mask(inside)), logq)
    assert torch.allclose(biased, q * (inside.to(q) - q[inside].sum()), atol=1e-12)
    assert (biased[inside] > 0.01).all()  # descent lowers every token of S


@each_loss
def test_on_the_whole_vocabulary_every_tail_is_the_full_kl(loss, tail):
    logp, logq, _ = laws(4)
    full = opd.reverse_kl if loss is opd.truncated_reverse_kl else opd.forward_kl
    whole = of_mask(torch.ones(6, dtype=torch.bool))
    assert torch.allclose(loss(logp, logq, whole, tail), full(logp, logq), atol=1e-12)
    expected = logit_gradient(lambda x: full(x, logq), logp)
    gradient = logit_gradient(lambda x: loss(x, logq, whole, tail), logp)
    assert torch.allclose(gradient, expected, atol=1e-9)


@pytest.mark.parametrize("loss", [opd.truncated_reverse_kl, opd.truncated_forward_kl])
def test_only_the_renormalised_kl_is_blind_to_the_mass_on_the_support(loss):
    logp, logq, inside = laws(5)
    support = of_mask(inside)
    moved = (logp + 2.0 * inside).log_softmax(-1)
    values = {t: [loss(x, logq, support, t) for x in (logp, moved)] for t in REVERSE_TAILS[2:]}
    assert torch.allclose(*values["renormalise"], atol=1e-12)
    assert abs(values["bucket"][0] - values["bucket"][1]) > 0.05
    gradient = logit_gradient(lambda x: loss(x, logq, support, "renormalise"), logp)
    assert gradient[~inside].abs().max() < 1e-12 and gradient[inside].abs().max() > 0.01


# (8) the edges


@each_loss
def test_an_empty_support_is_zero_with_a_zero_gradient(loss, tail):
    logp, logq = random_laws()
    ids = torch.zeros(3, 4, 2, dtype=torch.long)
    empty = opd.Support(ids, torch.zeros_like(ids, dtype=torch.bool))
    assert (loss(logp, logq, empty, tail).abs() < 1e-12).all()
    gradient = logit_gradient(lambda x: loss(x, logq, empty, tail), logp)
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_loss
def test_left_out_mass_that_rounds_to_nothing_keeps_gradients_finite(loss, tail, dtype):
    eps = torch.finfo(dtype).eps
    seen = set()
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        z, other = torch.randn(2, 7, generator=g, dtype=dtype)
        sharp = z.clone()
        sharp[3:] -= 60.0  # all its mass on the first three tokens
        whole, head = of_mask(torch.ones(7, dtype=torch.bool)), only(0, 1, 2)
        for p, q, support in (
            (z, other, whole), (sharp, other, head), (other, sharp, head), (sharp, sharp, head),
        ):  # fmt: skip
            logq = q.log_softmax(-1)
            left = 1 - p.log_softmax(-1).exp()[support.ids].sum()
            seen.add(int(left.sign()) if left < 4 * eps else 1)
            value = loss(p.log_softmax(-1), logq, support, tail)
            gradient = logit_gradient(lambda x, a=logq, s=support: loss(x, a, s, tail), p)
            assert torch.isfinite(value) and torch.isfinite(gradient).all()
    assert seen == {-1, 0, 1}  # all three ways to round were met


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_teacher_sure_of_the_support_pulls_the_students_mass_into_it(dtype):
    """The student's left-out 10% must not be driven further out because 1 - Q rounds to 0."""
    for gap in (5.0, 12.0, 20.0, 40.0, 60.0):  # the last ones round to 0
        logq = torch.tensor([0.0, 0.0, -gap], dtype=dtype).log_softmax(-1)
        logp = torch.tensor([0.45, 0.45, 0.1], dtype=dtype).log()
        for loss in (opd.truncated_reverse_kl, opd.truncated_forward_kl):
            gradient = logit_gradient(lambda x, f=loss, q=logq: f(x, q, only(0, 1)), logp)
            assert gradient[2] > 0.05, (loss.__name__, gap)  # descent lowers the token left out
            assert loss(logp, logq, only(0, 1)) > -1e-6, (loss.__name__, gap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bucket_is_not_negative_where_the_student_has_all_its_mass_on_the_support(dtype):
    for gap in (5.0, 12.0, 20.0, 40.0, 60.0):
        logp = torch.tensor([0.0, 0.0, -gap], dtype=dtype).log_softmax(-1)
        logq = torch.tensor([0.4, 0.4, 0.2], dtype=dtype).log()
        for loss in (opd.truncated_reverse_kl, opd.truncated_forward_kl):
            assert loss(logp, logq, only(0, 1)) > 0, (loss.__name__, gap)


@each_loss
@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_what_stands_at_ids_that_are_not_members_never_leaks(loss, tail, junk):
    logp, logq = random_laws()
    tokens = logp.argmax(-1)
    support = opd.top_k_support(logp, logq, 4, "intersection")
    assert support.valid.any() and not support.valid.all()
    teachers = logq.topk(4).indices
    clean, dirty = listed(logq, teachers, tokens), listed(logq, teachers, tokens)
    where = (support.ids[..., :, None] == teachers[..., None, :]) & support.valid[..., None]
    dirty.logq = torch.where(where.any(-2), clean.logq, junk)
    assert (dirty.logq != clean.logq).any()
    results = []
    for teacher in (clean, dirty):
        value = loss(logp, teacher, support, tail)
        gradient = logit_gradient(lambda x, q=teacher: loss(x, q, support, tail), logp)
        results.append((value, gradient))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


# the support itself


def test_supports_by_hand():
    logp = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    logq = torch.tensor([0.1, 0.35, 0.15, 0.4]).log()
    members = {}
    for source in SOURCES:
        support = opd.top_k_support(logp, logq, 2, source)
        assert support.ids.shape == support.valid.shape == (4 if source == "union" else 2,)
        members[source] = sorted(support.ids[support.valid].tolist())
    assert members == dict(student=[0, 1], teacher=[1, 3], union=[0, 1, 3], intersection=[1])


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("source", SOURCES)
def test_supports_are_the_sets_of_their_names_without_duplicates(source, k):
    logp, logq = random_laws(vocab=8)
    support = opd.top_k_support(logp, logq, k, source)
    combine = dict(
        student=lambda a, b: a, teacher=lambda a, b: b, union=set.union,
        intersection=set.intersection,
    )[source]  # fmt: skip
    for i in range(3):
        for t in range(4):
            best = [set(law[i, t].topk(k).indices.tolist()) for law in (logp, logq)]
            found = support.ids[i, t][support.valid[i, t]].tolist()
            assert len(found) == len(set(found)) and set(found) == combine(*best)


@pytest.mark.parametrize("k", [0, -1, 7])
@pytest.mark.parametrize("source", SOURCES)
def test_a_k_outside_the_vocabulary_raises_and_is_named(source, k):
    with pytest.raises(ValueError, match=rf"^k = {k}: must be 1 to 6"):
        opd.top_k_support(*random_laws(vocab=6), k, source)


def test_unknown_sources_and_tails_raise_and_name_the_known_ones():
    logp, logq = random_laws()
    with pytest.raises(ValueError, match="source = 'both'.*student, teacher, union, intersect"):
        opd.top_k_support(logp, logq, 2, "both")
    support = opd.top_k_support(logp, logq, 2)
    with pytest.raises(ValueError, match="tail = 'none'.*bucket"):
        opd.truncated_reverse_kl(logp, logq, support, "none")
    for tail in ("stop_gradient", "generalised"):
        with pytest.raises(ValueError, match="renormalise or bucket"):
            opd.truncated_forward_kl(logp, logq, support, tail)


# sparse teachers


@pytest.mark.parametrize("source", SOURCES)
@each_loss
def test_a_dense_teacher_and_its_scores_agree(loss, tail, source):
    logp, logq = random_laws(vocab=8, seed=2)
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(8, (3, 4), generator=g)
    everything = torch.rand(3, 4, 8, generator=g).argsort(-1)  # all ids, in any order
    few = logq.topk(5).indices.flip(-1)  # enough for the teacher's and the common top 3
    for ids in (everything, few) if source in ("teacher", "intersection") else (everything,):
        results = []
        for teacher in (logq, listed(logq, ids, tokens)):
            support = opd.top_k_support(logp, teacher, 3, source)
            value = loss(logp, teacher, support, tail)
            gradient = logit_gradient(lambda x, q=teacher, s=support: loss(x, q, s, tail), logp)
            results.append((value, gradient))
        assert torch.allclose(results[0][0], results[1][0], atol=1e-12)
        assert torch.allclose(results[0][1], results[1][1], atol=1e-12)


def test_scores_hold_the_log_prob_of_the_responses_tokens():
    _, logq = random_laws()
    tokens = torch.randint(6, (3, 4), generator=torch.Generator().manual_seed(1))
    few = listed(logq, logq.topk(2).indices, tokens)
    assert torch.equal(opd.of_tokens(few, tokens), opd.of_tokens(logq, tokens))


@pytest.mark.parametrize("source", ["teacher", "union", "intersection"])
def test_scores_that_list_fewer_than_k_tokens_raise_and_name_k(source):
    logp, logq = random_laws()
    few = listed(logq, logq.topk(3).indices, logp.argmax(-1))
    with pytest.raises(ValueError, match=r"^k = 4: must be 1 to 3"):
        opd.top_k_support(logp, few, 4, source)


@pytest.mark.parametrize("source", ["student", "union"])
def test_an_id_that_the_teacher_does_not_list_raises_and_names_k(source):
    logp, logq = random_laws()
    few = listed(logq, logq.topk(3).indices, logp.argmax(-1))
    support = opd.top_k_support(logp, few, 3, source)
    with pytest.raises(ValueError, match=r"k = 3\b.*score more"):
        opd.truncated_reverse_kl(logp, few, support)


# (17) overlap and entropy gap


def peaked(*orders):
    """Log-probs (1, len(orders), 6) for each order: token orders[t][0] likeliest, and so on."""
    z = torch.zeros(1, len(orders), 6, dtype=torch.float64)
    for t, order in enumerate(orders):
        for rank, token in enumerate(order):
            z[0, t, token] = 5.0 - rank
    return z.log_softmax(-1)


def test_overlap_of_identical_disjoint_and_touching_top_k():
    logp = peaked([0, 1], [0, 1], [0, 1])
    logq = peaked([1, 0], [2, 3], [1, 2])  # the same two, none, one
    found = opd.overlap(logp, logq, 2)
    assert found._fields == ("ratio", "student_mass", "teacher_mass", "advantage")
    assert found.ratio.tolist() == [[1.0, 0.0, 0.5]]
    p, q = logp.exp()[0], logq.exp()[0]
    expected = torch.stack([p[0, :2].sum(), p[0, 0] * 0, p[2, 1]])
    assert torch.allclose(found.student_mass[0], expected, atol=1e-12)
    expected = torch.stack([q[0, :2].sum(), q[0, 0] * 0, q[2, 1]])
    assert torch.allclose(found.teacher_mass[0], expected, atol=1e-12)
    advantage = found.advantage[0]
    assert advantage[0] < -0.1 and advantage[1:].abs().max() == 0  # nothing to compare: exactly 0


@pytest.mark.parametrize("k", [1, 3, 8])
def test_overlap_statistics_are_the_sums_over_the_common_tokens(k):
    logp, logq = random_laws(vocab=8, seed=6)
    ratio, ours, theirs, advantage = opd.overlap(logp, logq, k)
    for i in range(3):
        for t in range(4):
            p, q = logp[i, t].exp(), logq[i, t].exp()
            both = sorted({*p.topk(k).indices.tolist()} & {*q.topk(k).indices.tolist()})
            assert ratio[i, t].item() == pytest.approx(len(both) / k, abs=1e-12)
            assert ours[i, t].item() == pytest.approx(p[both].sum().item(), abs=1e-12)
            assert theirs[i, t].item() == pytest.approx(q[both].sum().item(), abs=1e-12)
            p, q = p[both] / p[both].sum(), q[both] / q[both].sum()
            mean = (p * (q.log() - p.log())).sum().item() / max(1, len(both))
            assert advantage[i, t].item() == pytest.approx(mean, abs=1e-12)
    assert (advantage <= 1e-12).all()


def test_overlap_is_whole_where_the_laws_agree_and_where_k_is_the_vocabulary():
    logp, logq = random_laws(vocab=8)
    for k in (1, 3, 8):
        same = opd.overlap(logp, logp, k)
        assert (same.ratio == 1).all() and same.advantage.abs().max() < 1e-12
    whole = opd.overlap(logp, logq, 8)
    assert (whole.ratio == 1).all()
    for mass in (whole.student_mass, whole.teacher_mass):
        assert torch.allclose(mass, torch.ones_like(mass))
    assert torch.allclose(whole.advantage, -opd.reverse_kl(logp, logq) / 8, atol=1e-12)


def test_overlap_reads_sparse_teachers_as_dense_ones():
    logp, logq = random_laws(vocab=8, seed=6)
    few = listed(logq, logq.topk(4).indices.flip(-1), logp.argmax(-1))
    for a, b in zip(opd.overlap(logp, few, 3), opd.overlap(logp, logq, 3), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def entropy_gap(logp, logq):
    """`diagnose`'s, of log-probs (n, V)."""
    action = torch.zeros(len(logp), dtype=torch.long)
    return opd.diagnose(logp, logq, action, top_k=1, min_prob=0.0)["entropy_gap"]


def test_the_entropy_gap_is_a_distance():
    logp, logq = (law.flatten(0, 1) for law in random_laws())
    gap = entropy_gap(logp, logq)
    assert torch.allclose(gap, (opd.entropy(logp) - opd.entropy(logq)).abs(), atol=1e-12)
    assert torch.equal(gap, entropy_gap(logq, logp)) and (gap > 0).all()
    assert entropy_gap(logp, logp).abs().max() == 0
    uniform, sure = torch.zeros(1, 4).log_softmax(-1), torch.tensor([[0.0, -80, -80, -80]])
    assert entropy_gap(uniform, sure).item() == pytest.approx(1.3862944, abs=1e-6)
