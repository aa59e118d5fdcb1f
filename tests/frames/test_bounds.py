import math

import pytest

from etf_zoo.errors import EtfZooError
from etf_zoo.frames import frame_report, levenshtein_bound, random_frame, spherical_code


@pytest.mark.parametrize(
    ("num_classes", "dim", "cosine"),
    [
        (5, 4, -1 / 4),  # the simplex
        (7, 4, 0),  # Rankin's
        (8, 4, 0),
        (5, 2, math.cos(2 * math.pi / 5)),  # polygons
        (7, 2, math.cos(2 * math.pi / 7)),
        (12, 3, 1 / math.sqrt(5)),  # the icosahedron
        (16, 5, 1 / 5),  # sharp codes: Cohn and Kumar, math/0607446, table 1
        (27, 6, 1 / 4),
        (56, 7, 1 / 3),
        (240, 8, 1 / 2),
        (162, 21, 1 / 7),
        (275, 22, 1 / 6),
        (891, 22, 1 / 4),
        (4600, 23, 1 / 3),
        (196_560, 24, 1 / 2),
    ],
)
def test_codes_that_reach_the_bound(num_classes, dim, cosine):
    assert levenshtein_bound(num_classes, dim) == pytest.approx(cosine, abs=1e-9)


@pytest.mark.parametrize("dim", [3, 8, 64, 256, 1024])
def test_it_grows_with_the_classes(dim):
    sizes = sorted({round(2 * dim * 1.3**i) for i in range(30)})
    bounds = [levenshtein_bound(size, dim) for size in sizes]
    assert bounds == sorted(bounds)
    assert 0 <= bounds[0] < bounds[-1] < 1


@pytest.mark.parametrize(("num_classes", "dim"), [(20, 3), (50, 4), (100, 8), (40, 12)])
def test_no_frame_is_below(num_classes, dim):
    bound = levenshtein_bound(num_classes, dim)
    assert frame_report(spherical_code(num_classes, dim, restarts=1)).largest_cosine >= bound - 1e-6
    assert frame_report(random_frame(num_classes, dim)).largest_cosine > bound


@pytest.mark.parametrize("dim", [64, 256, 1024, 4096])
def test_kerdock_frames_come_close(dim):
    bound = levenshtein_bound(dim * (dim + 2), dim)
    assert 1 < 1 / math.sqrt(dim) / bound < 1 + 2 / dim


def test_one_dimension_and_errors():
    assert levenshtein_bound(3, 1) == 1
    with pytest.raises(EtfZooError, match="at least 2 classes"):
        levenshtein_bound(1, 3)
