"""lab.geometry: the shape of an update, and of the feedback over a text and over texts."""

import math

import lab
import pytest
import torch
from conftest import tiny_llama

import opd

# the shape of an update


def test_norm_scaling():
    g = torch.Generator().manual_seed(0)
    early, final = (torch.randn(4, 7, generator=g, dtype=torch.float64) for _ in range(2))
    early *= 0.1
    assert torch.equal(lab.norm_scaled(early, final, 0.0), early)
    for beta in (0.0, 0.3, 0.8, 1.0, 1.2):
        scaled = lab.norm_scaled(early, final, beta)
        norm = (1 - beta) * early.norm() + beta * final.norm()
        assert scaled.norm().item() == pytest.approx(norm.item(), rel=1e-12)
        cosine = torch.cosine_similarity(scaled.flatten(), early.flatten(), dim=0)
        assert cosine.item() == pytest.approx(1, abs=1e-12)


def test_the_spectrum_of_known_matrices():
    g = torch.Generator().manual_seed(0)
    u, v = (torch.randn(n, generator=g, dtype=torch.float64) for n in (300, 250))
    one = lab.spectrum(torch.outer(u, v))
    assert one["norm"] == pytest.approx((u.norm() * v.norm()).item())
    assert one["spectral_norm"] == pytest.approx(one["norm"])
    for key in ("spectral_ratio", "effective_rank", "top1_ratio"):
        assert one[key] == pytest.approx(1, abs=1e-9)
    for n in (1, 5, 100, 101, 250):
        found = lab.spectrum(3 * torch.eye(n))
        assert found["norm"] == pytest.approx(3 * math.sqrt(n)) and found["spectral_norm"] == 3
        assert found["spectral_ratio"] == pytest.approx(1 / math.sqrt(n))
        assert found["effective_rank"] == pytest.approx(n)
        assert found["top1_ratio"] == pytest.approx(math.sqrt(math.ceil(n / 100) / n))
    uneven = lab.spectrum(torch.diag(torch.tensor([-3.0, 0.0, 1.0])))
    assert uneven["spectral_norm"] == pytest.approx(3) and uneven["norm"] == pytest.approx(10**0.5)
    rank = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))  # shares of s, not of s^2
    assert uneven["effective_rank"] == pytest.approx(rank)
    assert uneven["top1_ratio"] == pytest.approx(3 / 10**0.5)


def test_update_geometry_is_the_mean_over_the_matrices_that_moved():
    model = tiny_llama()
    base, names = lab.weights_of(model), [n for n, _ in model.named_parameters()]
    matrices = [n for n in names if opd.attention_and_mlp(n) and "norm" not in n]
    assert [*lab.matrices(model)] == matrices and len(matrices) == 2 * 7
    still = lab.update_geometry(base, model)
    assert still.pop("norms") == {} and len(still) == 5 and all(map(math.isnan, still.values()))
    with torch.no_grad():
        model.get_input_embeddings().weight += 1.0  # neither attention nor MLP
        assert math.isnan(lab.update_geometry(base, model)["norm"])
        two = [model.get_parameter(name) for name in (matrices[0], matrices[-1])]
        two[0] += torch.eye(*two[0].shape)
        two[1] += 2.0
    found = lab.update_geometry(base, model)
    pairs = zip((matrices[0], matrices[-1]), two, strict=True)
    shapes = [lab.spectrum(p.detach() - base[name]) for name, p in pairs]
    assert found["norms"] == {matrices[0]: shapes[0]["norm"], matrices[-1]: shapes[1]["norm"]}
    for key in shapes[0]:
        assert found[key] == pytest.approx((shapes[0][key] + shapes[1][key]) / 2)
    assert found["effective_rank"] == pytest.approx((32 + 1) / 2, rel=1e-4)


def test_subspace_alignment():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(12, 9, generator=g, dtype=torch.float64) for _ in range(2))
    for k in (1, 3, 9):
        assert lab.subspace_alignment(a, a, k) == pytest.approx(1, abs=1e-9)
        assert lab.subspace_alignment(a, -3 * a, k) == pytest.approx(1, abs=1e-9)
        found = lab.subspace_alignment(a, b, k)
        assert 0 < found < 1 and found == pytest.approx(lab.subspace_alignment(b, a, k))
        assert found == pytest.approx(lab.subspace_alignment(-a, b, k))
    u = torch.linalg.qr(a).Q  # (12, 9), orthonormal columns
    s = torch.diag(torch.tensor([4.0, 3.0, 2.0], dtype=torch.float64))
    v = torch.linalg.qr(b).Q[:, :3].T
    left, right = u[:, :3] @ s @ v, u[:, 3:6] @ s @ v
    assert lab.subspace_alignment(left, right, 3) == pytest.approx(0, abs=1e-9)
    half = u[:, [0, 4, 5]] @ s @ v  # the first of three left vectors is shared
    assert lab.subspace_alignment(left, half, 1) == pytest.approx(1)
    assert lab.subspace_alignment(left, half, 3) == pytest.approx(1 / 3)
    turned = u[:, :3] @ s @ torch.linalg.qr(a[:9]).Q[:, :3].T  # other right vectors
    assert lab.subspace_alignment(left, turned, 3) == pytest.approx(1)


def test_only_matrices_have_singular_values():
    """EffOPD moves norms and biases of attention and MLP too, which are vectors."""
    model = tiny_llama()
    base = lab.weights_of(model)
    vectors = [n for n, p in model.named_parameters() if opd.attention_and_mlp(n) and p.dim() == 1]
    assert vectors
    with torch.no_grad():
        model.get_parameter(vectors[0]).add_(1.0)
    assert lab.update_geometry(base, model)["norms"] == {}


# the feedback


def test_kl_by_position_is_the_mean_over_the_rows_that_are_there():
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]]) > 0
    kl = torch.tensor([[1.0, 2, 9, 9], [2, math.nan, 9, 9], [6, 4, 5, math.inf]]).double()
    found = lab.kl_by_position(kl, mask)
    assert found[:3].tolist() == [3, 3, 5] and math.isnan(found[3]) and found.shape == (4,)
    weighted = (found * mask.sum(0))[:3].sum() / mask.sum()
    assert weighted.item() == pytest.approx(kl[mask].mean().item())


def test_top_share():
    mask = torch.tensor([[True] * 10, [True] * 10, [False] * 10])
    flat = torch.full((3, 10), -0.5)
    assert lab.top_share(flat, mask) == pytest.approx(0.05)
    one = torch.zeros(3, 10)
    one[1, 4], one[2] = 3.0, 99.0  # the masked row has no say
    assert lab.top_share(one, mask) == 1
    one[0, 0] = -1.0
    assert lab.top_share(one, mask) == pytest.approx(0.75)
    assert lab.top_share(one, mask, share=0.1) == 1
    assert math.isnan(lab.top_share(torch.zeros(3, 10), mask))


def test_auroc():
    right = torch.tensor([True, True, False, False])
    assert lab.auroc(torch.tensor([4.0, 3.0, 2.0, 1.0]), right) == 1
    assert lab.auroc(torch.tensor([1.0, 2.0, 3.0, 4.0]), right) == 0
    assert lab.auroc(torch.tensor([1.0, 1.0, 1.0, 1.0]), right) == 0.5
    assert lab.auroc(torch.tensor([3.0, 1.0, 2.0, 1.0]), right) == pytest.approx(2.5 / 4)
    assert math.isnan(lab.auroc(torch.tensor([1.0, 2.0]), torch.tensor([True, True])))
