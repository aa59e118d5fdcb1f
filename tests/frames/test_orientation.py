"""Orientations: which one fits, and the rotation that brings any frame nearest to blocks."""

import pytest
import torch

from etf_zoo.frames import hierarchy_frame, random_frame, simplex_etf, turn_to_blocks
from etf_zoo.frames.orientation import block_indicators, resolve_orientation


@pytest.mark.parametrize(("num_classes", "dim"), [(5, 5), (5, 13), (10, 64)])
def test_all_cosines_are_kept_and_no_rotation_comes_nearer(num_classes, dim):
    frame, blocks = random_frame(num_classes, dim, seed=1).double(), block_indicators(num_classes, dim)
    turned = turn_to_blocks(frame).double()
    torch.testing.assert_close(turned @ turned.T, frame @ frame.T, atol=1e-6, rtol=0)
    nearest = (turned - blocks).norm()
    assert nearest < (frame - blocks).norm()
    u, _, vt = torch.linalg.svd(frame.T @ blocks)  # Procrustes, the plain way
    torch.testing.assert_close((frame @ u @ vt - blocks).norm(), nearest, atol=1e-5, rtol=0)
    for seed in range(20):
        gaussian = torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert (frame @ torch.linalg.qr(gaussian)[0] - blocks).norm() > nearest


def test_a_simplex_turns_into_its_blocks():
    turned = turn_to_blocks(simplex_etf(7, 30, orientation="random", seed=2))
    torch.testing.assert_close(turned, simplex_etf(7, 30, orientation="blocks"), atol=1e-5, rtol=0)


def test_nonnegative_features_come_near():
    """The best cosine of a nonnegative unit vector is the length of the prototype's positive part."""
    distance = 2 - torch.block_diag(*[torch.ones(5, 5)] * 20).double()
    random = hierarchy_frame(distance.fill_diagonal_(0), 512)
    assert random.clamp_min(0).norm(dim=1).max() < 0.8
    assert turn_to_blocks(random).clamp_min(0).norm(dim=1).min() > 0.95


def test_blocks_share_all_coordinates():
    blocks = block_indicators(4, 10)
    torch.testing.assert_close(blocks @ blocks.T, torch.eye(4, dtype=torch.float64))
    assert (blocks > 0).sum(0).tolist() == [1] * 10
    assert (blocks > 0).sum(1).tolist() == [3, 3, 2, 2]


def test_resolved():
    assert resolve_orientation("auto", 8, 8) == "blocks"
    assert resolve_orientation("auto", 9, 8) == "random"
    assert resolve_orientation("random", 3, 8) == "random"
    with pytest.raises(ValueError, match="Choose one of auto, random, blocks"):
        resolve_orientation("up", 3, 8)
    with pytest.raises(ValueError, match="needs dim >= num_classes, got dim=8 for 9"):
        resolve_orientation("blocks", 9, 8)


@pytest.mark.parametrize("build", [block_indicators, lambda k, dim: turn_to_blocks(random_frame(k, dim))])
def test_more_classes_than_coordinates(build):
    with pytest.raises(ValueError, match="needs dim >= num_classes, got dim=5 for 8 classes"):
        build(8, 5)
