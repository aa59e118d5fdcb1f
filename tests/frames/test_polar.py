"""The polar factor beside a plain SVD, over condition numbers and ranks."""

import pytest
import torch

from etf_zoo.frames import nearest_simplex_etf, polar_factor, simplex_etf


def with_condition(n, d, condition, seed=0):
    generator = torch.Generator().manual_seed(seed)
    m = torch.randn(n, d, generator=generator, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(m, full_matrices=False)
    return (u * torch.logspace(0, -condition, n, dtype=torch.float64)) @ vh, u @ vh


@pytest.mark.parametrize("condition", [0, 2, 4, 5, 6, 7, 9])
@pytest.mark.parametrize("shape", [(20, 20), (19, 50)])
def test_matches_svd(shape, condition):
    m, expected = with_condition(*shape, condition)
    factor, rank = polar_factor(m)
    assert rank == shape[0]
    assert torch.allclose(factor @ factor.T, torch.eye(shape[0], dtype=torch.float64), atol=1e-9, rtol=0)
    assert torch.allclose(factor, expected, atol=1e-6, rtol=0)


def test_no_orthonormal_rows_are_nearer():
    m, _ = with_condition(5, 8, 2)
    factor, _ = polar_factor(m)
    distance = (m - factor).norm()
    for seed in range(20):
        other = torch.linalg.qr(
            factor.T + 0.1 * torch.randn(8, 5, generator=torch.Generator().manual_seed(seed)).double()
        )
        q = other.Q * torch.sign(torch.diagonal(other.R))
        assert (m - q.T).norm() > distance


@pytest.mark.parametrize("rank", [0, 1, 7])
def test_rank_is_reported_and_rows_stay_orthonormal(rank):
    generator = torch.Generator().manual_seed(1)
    m = torch.randn(10, rank, generator=generator, dtype=torch.float64) @ torch.randn(
        rank, 15, generator=generator, dtype=torch.float64
    )
    factor, found = polar_factor(m)
    assert found == rank
    assert torch.allclose(factor @ factor.T, torch.eye(10, dtype=torch.float64), atol=1e-9, rtol=0)


def test_threads_are_left_as_they_were():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        polar_factor(torch.randn(5, 9, dtype=torch.float64))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_gives_the_nearest_simplex_etf():
    a = simplex_etf(12, 30).double() + 0.05 * torch.randn(12, 30, generator=torch.Generator().manual_seed(0)).double()
    centered = a - a.mean(dim=0)
    basis = torch.linalg.svd(torch.eye(12, dtype=torch.float64) - 1 / 12).U[:, :11]  # any basis of the hyperplane does
    expected = (12 / 11) ** 0.5 * basis @ polar_factor(basis.T @ centered)[0]
    assert torch.allclose(nearest_simplex_etf(a).double(), expected, atol=1e-6, rtol=0)


def test_errors():
    with pytest.raises(ValueError, match="4 rows and 3 columns"):
        polar_factor(torch.randn(4, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="float64"):
        polar_factor(torch.randn(3, 4))
