import math

import pytest
import torch

from etf_zoo.frames import best_frame, orthogonal_simplices, quick_code, random_frame, simplex_etf
from etf_zoo.frames.numerics import derived_seed


def cosines(frame):
    """All pairwise cosines in float64, (K, K), with -inf on the diagonal."""
    return (frame.double() @ frame.double().T).fill_diagonal_(-math.inf)


def slow_simplices_gram(sizes):
    """Gram matrix from the definition: -1/(n-1) within a simplex of n vectors, 0 between two simplices."""
    blocks = [torch.full((n, n), -1 / (n - 1), dtype=torch.float64).fill_diagonal_(1) for n in sizes]
    return torch.block_diag(*blocks)


@pytest.mark.parametrize(
    ("num_classes", "dim", "sizes"),
    [
        (4, 3, [4]),  # the simplex end
        (6, 3, [2, 2, 2]),  # the orthoplex end
        (5, 3, [3, 2]),
        (10, 7, [4, 3, 3]),
        (2, 1, [2]),
    ],
)
def test_orthogonal_simplices_against_the_definition(num_classes, dim, sizes):
    frame = orthogonal_simplices(num_classes, dim, seed=2).double()
    # classes of one simplex together, the largest simplices first
    mates = [frozenset(torch.nonzero(row.abs() > 1e-4).flatten().tolist()) for row in frame @ frame.T]
    order = [row for mate in sorted(set(mates), key=lambda m: (-len(m), min(m))) for row in sorted(mate)]
    assert sorted(order) == list(range(num_classes))
    frame = frame[order]
    torch.testing.assert_close(frame @ frame.T, slow_simplices_gram(sizes), atol=1e-6, rtol=0)


def test_neighboring_labels_share_no_simplex_by_rule():
    shares = []
    for seed in range(20):
        frame = orthogonal_simplices(64, 32, seed=seed).double()  # an orthoplex: 32 pairs of antipodes
        shares.append(((frame[::2] * frame[1::2]).sum(1) < -0.9).double().mean().item())
    assert sum(shares) / 20 < 0.1  # 1/63 by chance


def test_seeds_share_nothing():
    rows = torch.cat([quick_code(600, 8, seed=seed) for seed in range(3)])
    assert len({tuple(row) for row in rows.tolist()}) == 3 * 600
    plain = torch.cat([quick_code(4000, 512, seed=seed)[:1500] for seed in (0, 1)])  # too large to be polished
    assert (plain @ plain.T).fill_diagonal_(0).abs().max() < 0.99
    assert len({derived_seed(seed, part) for seed in range(-5, 5) for part in range(10)}) == 100


@pytest.mark.parametrize(("num_classes", "dim"), [(6, 4), (7, 4), (8, 4), (100, 64), (127, 64), (128, 64), (1000, 512)])
def test_orthogonal_simplices_reach_rankins_optimum(num_classes, dim):
    frame = orthogonal_simplices(num_classes, dim, seed=1)
    assert frame.dtype == torch.float32
    assert cosines(frame).max().item() == pytest.approx(0, abs=1e-6)
    assert (frame.norm(dim=1) - 1).abs().max() < 1e-6
    assert torch.linalg.matrix_rank(frame.double(), rtol=1e-5) == dim  # uses every dimension
    assert (frame.abs() > 1e-6).float().mean() > 0.95  # rotated, not axis-aligned


def test_one_seed_one_arrangement():
    for make in (orthogonal_simplices, random_frame, quick_code, best_frame):
        assert torch.equal(make(12, 8, seed=1), make(12, 8, seed=1)), make
        assert not torch.equal(make(12, 8, seed=1), make(12, 8, seed=2)), make


@pytest.mark.parametrize(("num_classes", "dim"), [(5, 5), (11, 5), (3, 5)])
def test_orthogonal_simplices_errors(num_classes, dim):
    with pytest.raises(ValueError, match=r"dim < num_classes <= 2 \* dim.*frame='auto'"):
        orthogonal_simplices(num_classes, dim)


def test_random_frame_is_uniform_on_the_sphere():
    frame = random_frame(4000, 16, seed=0).double()
    assert (frame.norm(dim=1) - 1).abs().max() < 1e-6
    assert frame.mean(0).norm() < 5 / math.sqrt(4000)
    second_moment = frame.T @ frame / 4000
    torch.testing.assert_close(second_moment, torch.eye(16, dtype=torch.float64) / 16, atol=6e-3, rtol=0)
    pairs = cosines(frame)[torch.triu(torch.ones(4000, 4000, dtype=torch.bool), 1)]
    assert pairs.std().item() == pytest.approx(1 / math.sqrt(16), rel=0.01)  # independent: no two repel


@pytest.mark.parametrize(("num_classes", "dim"), [(7, 3), (30, 8), (200, 32), (1000, 64)])
def test_quick_code_beats_random(num_classes, dim):
    code = quick_code(num_classes, dim)
    assert code.shape == (num_classes, dim)
    assert (code.norm(dim=1) - 1).abs().max() < 1e-5
    best_random = min(cosines(random_frame(num_classes, dim, seed=seed)).max().item() for seed in range(5))
    assert cosines(code).max().item() < 0.8 * best_random


def test_quick_code_is_near_the_known_optimum():
    # icosahedron: 12 points in 3 dimensions, largest cosine 1/sqrt(5)
    found = min(cosines(quick_code(12, 3, seed=seed)).max().item() for seed in range(5))
    assert 1 / math.sqrt(5) - 1e-6 <= found < 0.6


def test_quick_code_edges():
    assert torch.equal(quick_code(3, 1).abs(), torch.ones(3, 1))
    square = quick_code(4, 4)  # one orthonormal basis or better
    assert cosines(square).max() < 1e-6
    big = quick_code(5000, 64)  # too big to polish in a second: stacked bases
    assert big.shape == (5000, 64)
    assert (big.norm(dim=1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("make", [random_frame, quick_code, best_frame])
def test_sizes_that_make_no_sense(make):
    with pytest.raises(ValueError, match="at least 2 classes, got num_classes=1"):
        make(1, 4)
    with pytest.raises(ValueError, match="at least 1 dimension, got dim=0"):
        make(4, 0)


@pytest.mark.parametrize(
    ("num_classes", "dim", "expected"),
    [
        (4, 8, simplex_etf),
        (9, 8, simplex_etf),
        (10, 8, orthogonal_simplices),
        (16, 8, orthogonal_simplices),
        (17, 8, quick_code),
        (2, 1, simplex_etf),
        (3, 1, quick_code),
    ],
)
def test_best_frame_picks_the_best_arrangement(num_classes, dim, expected):
    assert torch.equal(best_frame(num_classes, dim, seed=3), expected(num_classes, dim, seed=3))


def test_best_frame_orientation():
    blocks = simplex_etf(8, 8, orientation="blocks")
    assert torch.equal(best_frame(8, 8, orientation="blocks"), blocks)
    for num_classes in (9, 10, 17):  # no simplex, or one too many for a coordinate each
        with pytest.raises(ValueError, match=r"needs dim >= num_classes, got dim=8.*Use orientation='auto'"):
            best_frame(num_classes, 8, orientation="blocks")
    for num_classes in (8, 17):
        with pytest.raises(ValueError, match="Unknown orientation 'sideways'"):
            best_frame(num_classes, 8, orientation="sideways")
