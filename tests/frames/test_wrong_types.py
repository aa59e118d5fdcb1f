"""Frames of nonsense: one error of ours for every wrong type, size and seed."""

import math

import pytest
import torch

from etf_zoo import frames
from etf_zoo.errors import EtfZooError
from etf_zoo.frames.build import build_frame

NONSENSE = [None, "x", 2.5, math.nan, True, [3], {}, torch.tensor([3.5, 1])]
NAMES = ["simplex_etf", "orthogonal_simplices", "random_frame", "quick_code", "best_frame", "spherical_code"]
MATRICES = [None, [[1, 2]], torch.zeros(0, 8), torch.full((3, 8), math.nan), torch.ones(3), torch.ones(3, 8).bool()]


@pytest.mark.parametrize("name", [*NAMES, "kerdock_frame"])
@pytest.mark.parametrize("value", [*NONSENSE, -1, 0], ids=str)
def test_sizes(name, value):
    make = getattr(frames, name)
    with pytest.raises(EtfZooError):
        make(value, 8)
    with pytest.raises(EtfZooError):
        make(5, value)


@pytest.mark.parametrize("name", ["random_frame", "quick_code", "spherical_code", "kerdock_frame"])
@pytest.mark.parametrize("seed", [*NONSENSE, 2**70], ids=str)
def test_seeds(name, seed):
    with pytest.raises(EtfZooError, match="seed is a whole number"):
        getattr(frames, name)(20, 8, seed=seed)


@pytest.mark.parametrize("name", ["nearest_simplex_etf", "frame_report", "polar_factor", "turn_to_blocks"])
@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_matrices(name, matrix):
    with pytest.raises(EtfZooError):
        getattr(frames, name)(matrix)


@pytest.mark.parametrize("frame", [*MATRICES, 3, torch.zeros(3, 8), torch.full((3, 8), math.inf)], ids=str)
def test_given_frames(frame):
    with pytest.raises(EtfZooError):
        build_frame(frame, 3, 8)
