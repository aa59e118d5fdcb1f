"""The full spherical code: known optima, gradient, errors."""

import itertools
import math

import pytest
import torch

from etf_zoo.frames import orthogonal_simplices, quick_code, random_frame, simplex_etf, spherical_code
from etf_zoo.frames.spherical import _soft_largest_cosine


def largest_cosine(frame):
    return max(float(frame[i] @ frame[j]) for i in range(len(frame)) for j in range(i))


@pytest.mark.parametrize(
    ("num_classes", "dim", "optimum"),
    [
        (5, 2, math.cos(2 * math.pi / 5)),
        (10, 3, 0.404394),  # Sloane's tables, as 14 and 15
        (12, 3, 1 / math.sqrt(5)),
        (14, 3, 0.563951),
        (15, 3, 0.592606),
        (16, 5, 0.2),
        (27, 6, 0.25),
        (56, 7, 1 / 3),
    ],
)
def test_known_optima(num_classes, dim, optimum):
    frame = spherical_code(num_classes, dim)
    assert frame.shape == (num_classes, dim)
    assert frame.dtype == torch.float32
    assert torch.allclose(frame.norm(dim=1), torch.ones(num_classes), atol=1e-6, rtol=0)
    assert -1e-6 < largest_cosine(frame) - optimum < 1e-4


@pytest.mark.slow
def test_600_cell():
    assert largest_cosine(spherical_code(120, 4)) < 0.8092  # cos 36 degrees is 0.80902


@pytest.mark.slow
def test_a_thousand_classes():
    code = spherical_code(1000, 128)
    gram = (code @ code.T).fill_diagonal_(-1)
    assert gram.max() < 0.08


def test_beats_the_quick_code_and_chance():
    code = spherical_code(60, 12, seed=3, restarts=1)
    quick, chance = quick_code(60, 12, seed=3), random_frame(60, 12, seed=3)
    assert largest_cosine(code) < largest_cosine(quick) - 0.02 < largest_cosine(chance) - 0.1


def test_known_arrangements_where_they_are_optimal():
    assert torch.equal(spherical_code(7, 6, seed=2), simplex_etf(7, 6, orientation="random", seed=2))
    assert torch.equal(spherical_code(11, 6, seed=2), orthogonal_simplices(11, 6, seed=2))


def test_seed_decides():
    a = spherical_code(20, 4, seed=1, restarts=1)
    assert torch.equal(a, spherical_code(20, 4, seed=1, restarts=1))
    assert not torch.equal(a, spherical_code(20, 4, seed=2, restarts=1))


@pytest.mark.parametrize("sharpness", [3.0, 500.0])
def test_objective_matches_a_plain_loop(sharpness):
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    w = x / x.norm(dim=1, keepdim=True)
    terms = torch.stack([sharpness * (w[i] @ w[j]) for i in range(6) for j in range(6) if i != j])
    expected = torch.logsumexp(terms, dim=0) / sharpness
    (gradient,) = torch.autograd.grad(expected, x)
    value, found = _soft_largest_cosine(x.detach(), sharpness)
    assert torch.allclose(value, expected.detach(), atol=1e-12)
    assert torch.allclose(found, gradient, atol=1e-12)


def test_errors():
    with pytest.raises(ValueError, match="two directions"):
        spherical_code(3, 1)
    with pytest.raises(ValueError, match="positive"):
        spherical_code(9, 3, restarts=0)
    with pytest.raises(ValueError, match="at least 2 classes"):
        spherical_code(1, 3)


def test_seeds_start_elsewhere():
    codes = [spherical_code(20, 4, seed=seed) for seed in range(3)]
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in itertools.combinations(codes, 2))
