"""Frames of nonsense: one error of ours for every wrong type, size and seed."""

import math

import pytest
import torch

from etf_zoo import FrameClassifier, frames
from etf_zoo.errors import EtfZooError
from etf_zoo.frames import Hierarchy, nearest_simplex_etf, simplex_etf
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


JUNK = [
    None,
    2.5,
    "x",
    [],
    {},
    b"a",
    object(),
    10**30,
    torch.zeros(0, 8),
    torch.full((3, 4), math.nan),
    torch.tensor(3),
]


@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: type(junk).__name__)
def test_nonsense_is_one_error(junk, tmp_path):
    tree = Hierarchy({"a": "r", "b": "r"})
    file = tmp_path / "missing.json"
    calls = [
        lambda: FrameClassifier(junk, 4),
        lambda: FrameClassifier(6, junk),
        lambda: FrameClassifier(6, 4, logit_scale=junk),
        lambda: FrameClassifier(6, 4, frame=junk),
        lambda: simplex_etf(junk, 6),
        lambda: simplex_etf(4, junk),
        lambda: simplex_etf(4, 6, orientation="random", seed=junk),
        lambda: nearest_simplex_etf(junk),
        lambda: nearest_simplex_etf(torch.randn(3, 4), previous=0 if junk is None else junk),
        lambda: nearest_simplex_etf(torch.randn(3, 4), delta=-1 if isinstance(junk, int | float) else junk),
        lambda: Hierarchy(junk),
        lambda: Hierarchy.from_json(file if isinstance(junk, str) else junk),
        lambda: tree.distances(["a", junk]),
        lambda: tree.distances("ab" if isinstance(junk, list | dict) else junk),
    ]
    if isinstance(junk, int | float):
        del calls[2]  # a scale indeed
    for call in calls:
        with pytest.raises(EtfZooError):
            call()


def test_nesting_beyond_the_parser_is_one_error(tmp_path):
    for text in ("[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, '{"a": {"b": "c"}}', "\x00", ""):
        (tmp_path / "tree.json").write_text(text)
        with pytest.raises(EtfZooError):
            Hierarchy.from_json(tmp_path / "tree.json")
