"""What a frame is called is what it is."""

import pytest
import torch

from etf_zoo.frames import frame_report
from etf_zoo.frames.build import FRAMES, build_frame
from etf_zoo.frames.describe import describe_frame


@pytest.mark.parametrize(("num_classes", "dim"), [(5, 4), (5, 64), (9, 8), (10, 8), (16, 8), (17, 8)])
def test_auto_is_called_what_it_is(num_classes, dim):
    text, weight = describe_frame("auto", num_classes, dim), build_frame("auto", num_classes, dim)
    cosines = weight @ weight.T
    report = frame_report(weight)
    is_simplex = report.equiangularity_error < 1e-5
    assert text.startswith("simplex ETF") == is_simplex
    if "mutually orthogonal" in text:
        count = int(torch.linalg.matrix_rank((cosines.abs() > 1e-4).float()))  # blocks of a graph of simplices
        assert text.startswith(f"{num_classes - dim} mutually orthogonal simplices")
        assert report.largest_cosine == pytest.approx(0, abs=1e-5)
        assert count >= num_classes - dim
    assert text.startswith("spherical code") == (num_classes > 2 * dim)
    assert f"{num_classes} classes in {dim} dimensions" in text


def test_every_name_has_words():
    texts = [describe_frame(name, 10, 64) for name in (*FRAMES, "custom", "helmert")]
    assert all("10 classes in 64 dimensions" in text for text in texts)
    assert describe_frame("auto", 10, 64) == describe_frame("simplex", 10, 64)
    assert describe_frame("auto", 10, 64, orientation="blocks").endswith("one block of coordinates for each class")
