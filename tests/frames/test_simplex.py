import math

import pytest
import torch
from scipy.stats import kstest

from etf_zoo.frames import nearest_simplex_etf, simplex_etf
from etf_zoo.frames.simplex import haar_columns, helmert_basis

GRID = [
    (2, 1), (2, 2), (2, 3), (3, 2), (3, 7), (4, 3), (10, 9), (10, 10), (10, 13), (17, 100), (100, 99), (100, 100),
    (100, 512), (200, 1024), (512, 511), (999, 1000), (1000, 999), (1000, 1000), (1000, 1001), (1000, 2048),
]  # fmt: skip


def deviation(frame):
    """Largest distance of a pairwise cosine from -1/(K-1), and of a row's length from 1, in float64."""
    gram = frame.double() @ frame.double().T
    k = len(frame)
    ideal = torch.full_like(gram, -1 / (k - 1)).fill_diagonal_(1)
    return (gram - ideal).abs().max().item()


def slow_simplex(k):
    """K x K simplex ETF from its textbook formula, sqrt(K/(K-1)) (I - J/K)."""
    return math.sqrt(k / (k - 1)) * (torch.eye(k, dtype=torch.float64) - 1 / k)


@pytest.mark.parametrize(("num_classes", "dim"), GRID)
@pytest.mark.parametrize("orientation", ["random", "blocks"])
def test_every_cosine_is_ideal(num_classes, dim, orientation):
    if orientation == "blocks" and dim < num_classes:
        with pytest.raises(ValueError, match="needs dim >= num_classes"):
            simplex_etf(num_classes, dim, orientation=orientation)
        return
    frame = simplex_etf(num_classes, dim, orientation=orientation, seed=1)
    assert frame.shape == (num_classes, dim)
    assert frame.dtype == torch.float32
    assert deviation(frame) < 1e-6
    assert frame.double().sum(0).abs().max() < 1e-4  # a simplex is centered


@pytest.mark.parametrize("k", [2, 3, 10, 57])
def test_gram_matrix_is_the_textbook_one(k):
    """Two frames with one Gram matrix differ by a rotation: that is all `simplex_etf` may add to the formula."""
    reference = slow_simplex(k)
    frame = simplex_etf(k, k + 4).double()
    torch.testing.assert_close(frame @ frame.T, reference @ reference.T, atol=1e-6, rtol=0)


@pytest.mark.parametrize("k", [2, 3, 8, 100])
def test_helmert_basis(k):
    basis = helmert_basis(k)
    assert basis.shape == (k, k - 1)
    torch.testing.assert_close(basis.T @ basis, torch.eye(k - 1, dtype=torch.float64))
    assert basis.sum(0).abs().max() < 1e-12


def test_one_seed_one_frame_whatever_the_global_state():
    torch.manual_seed(1)
    first = simplex_etf(10, 16, orientation="random", seed=3)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    with torch.device("meta"):  # a default device moves nothing either
        second = simplex_etf(10, 16, orientation="random", seed=3)
    assert torch.equal(first, second)
    assert not torch.equal(first, simplex_etf(10, 16, orientation="random", seed=4))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not consumed


def test_blocks_are_the_default_where_they_fit():
    assert torch.equal(simplex_etf(10, 10), simplex_etf(10, 10, orientation="blocks"))
    assert torch.equal(simplex_etf(10, 9), simplex_etf(10, 9, orientation="random"))


def test_random_orientation_is_haar():
    """A Haar random unit vector's coordinate along any fixed direction has the law of one coordinate on the sphere."""
    dim, draws = 3, 2000
    ones = torch.ones(dim, dtype=torch.float64) / math.sqrt(dim)
    cosines = torch.stack(
        [simplex_etf(4, dim, orientation="random", seed=seed).double() @ ones for seed in range(draws)]
    )
    assert cosines.mean(0).abs().max() < 5 / math.sqrt(3 * draws)  # five standard errors; uniform QR gives -0.87
    for k in range(4):  # Archimedes: in three dimensions that coordinate is uniform on [-1, 1]
        assert kstest(cosines[:, k].numpy(), "uniform", args=(-1, 2)).pvalue > 1e-4
    columns = haar_columns(5, 3, seed=0)
    torch.testing.assert_close(columns.T @ columns, torch.eye(3, dtype=torch.float64))


def test_haar_signs_are_not_those_of_qr():
    """Without the sign fix LAPACK's QR leaves the first coordinate of the first column with one sign."""
    signs = torch.stack([haar_columns(4, 4, seed)[0, 0].sign() for seed in range(200)])
    assert 60 < (signs > 0).sum() < 140


@pytest.mark.parametrize(("num_classes", "dim"), [(2, 2), (4, 4), (5, 13), (10, 512)])
def test_blocks_own_their_coordinates_and_suit_nonnegative_features(num_classes, dim):
    frame = simplex_etf(num_classes, dim, orientation="blocks").double()
    owners = frame > 0
    assert (owners.sum(0) == 1).all()  # every coordinate has one owner, none is dead
    assert set(owners.sum(1).tolist()) <= {dim // num_classes, dim // num_classes + 1}
    best = torch.nn.functional.normalize(frame.clamp_min(0), dim=1)  # nearest nonnegative direction
    cosine = (best * frame).sum(1)
    expected = math.sqrt((num_classes - 1) / num_classes)
    torch.testing.assert_close(cosine, torch.full_like(cosine, expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_classes": 10, "dim": 8}, r"at least 9 dimensions, got 8.*frame='auto'.*neck='mlp'"),
        ({"num_classes": 1, "dim": 8}, "at least 2 classes"),
        ({"num_classes": 2, "dim": 0}, "at least 1 dimension"),
        ({"num_classes": 10, "dim": 9, "orientation": "blocks"}, "needs dim >= num_classes"),
        (
            {"num_classes": 10, "dim": 9, "orientation": "up"},
            "Unknown orientation 'up'. Choose one of auto, random, blocks",
        ),
    ],
)
def test_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        simplex_etf(**kwargs)


# -------------------------------------------------------------------------------------------------- nearest simplex ETF


def residual(a, frame):
    """||A - cW||_F at the best c > 0."""
    a, frame = a.double(), frame.double()
    scale = ((a * frame).sum() / frame.square().sum()).clamp_min(0)
    return (a - scale * frame).norm().item()


def slow_nearest(a, restarts=4, steps=250):
    """Nearest simplex ETF by plain gradient descent over rotations R and scales c of ||A - c W0 R^T||."""
    k, dim = a.shape
    start = torch.zeros(k, dim, dtype=torch.float64)
    start[:, :k] = slow_simplex(k)
    best = None
    for seed in range(restarts):
        # both components of O(dim): a reflection cannot be reached by a path of rotations
        flip = torch.eye(dim, dtype=torch.float64)
        flip[0, 0] = 1 if seed % 2 else -1
        generator = torch.Generator().manual_seed(seed)
        skew = torch.randn(dim, dim, generator=generator, dtype=torch.float64).requires_grad_()
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([skew, scale], lr=0.05)

        def frame(skew=skew, flip=flip):
            return start @ flip @ torch.linalg.matrix_exp(skew - skew.T)

        for _ in range(steps):
            optimizer.zero_grad()
            (a - scale * frame()).square().sum().backward()
            optimizer.step()
        found = frame().detach()
        if best is None or residual(a, found) < residual(a, best):
            best = found
    return best


@pytest.mark.parametrize("shape", [(3, 4), (4, 4)])
def test_nearest_against_gradient_descent_over_rotations(shape):
    a = torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    fast, slow = nearest_simplex_etf(a), slow_nearest(a)
    assert deviation(fast) < 1e-6
    assert residual(a, fast) <= residual(a, slow) + 1e-6
    torch.testing.assert_close(fast.double(), slow, atol=1e-2, rtol=0)


def test_no_random_frame_is_nearer():
    a = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    best = residual(a, nearest_simplex_etf(a))
    others = [residual(a, simplex_etf(5, 6, orientation="random", seed=seed)) for seed in range(500)]
    assert best < min(others)


@pytest.mark.parametrize(("k", "dim"), [(2, 1), (3, 2), (10, 9), (10, 30), (100, 512)])
def test_an_etf_is_its_own_nearest_whatever_mean_and_scale(k, dim):
    etf = simplex_etf(k, dim, orientation="random", seed=5)
    shift = torch.randn(dim, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(nearest_simplex_etf(etf), etf, atol=1e-6, rtol=0)
    torch.testing.assert_close(nearest_simplex_etf(3.7 * etf + shift), etf, atol=1e-5, rtol=0)


def test_nearest_follows_rotations():
    a = torch.randn(6, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rotation = haar_columns(9, 9, seed=2)
    torch.testing.assert_close(nearest_simplex_etf(a @ rotation), nearest_simplex_etf(a) @ rotation.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_deficient_matrix_is_reported(dtype):
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(10, 3, generator=generator), torch.randn(3, 20, generator=generator)
    flat = left.to(dtype) @ right.to(dtype) + 5  # rank 3 < 9 once centered, up to rounding in its own precision
    with pytest.warns(UserWarning, match=r"rank 3, below num_classes - 1 = 9.*previous="):
        frame = nearest_simplex_etf(flat)
    assert deviation(frame) < 1e-6
    with pytest.warns(UserWarning, match="rank 0"):
        nearest_simplex_etf(torch.ones(4, 6, dtype=dtype))


@pytest.mark.parametrize("k", [10, 400])
def test_full_rank_matrix_is_not(k):
    nearest_simplex_etf(torch.randn(k, k - 1, generator=torch.Generator().manual_seed(0)))  # warnings are errors here


def test_previous_solution_decides_where_the_matrix_does_not():
    """In the directions a rank deficient matrix says nothing about, the proximal term keeps the earlier frame."""
    earlier = simplex_etf(10, 20, orientation="random", seed=3)
    torch.testing.assert_close(nearest_simplex_etf(torch.zeros(10, 20), previous=earlier), earlier, atol=1e-6, rtol=0)
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(10, 3, generator=generator) @ torch.randn(3, 20, generator=generator)
    kept = nearest_simplex_etf(flat, previous=earlier)  # warns not: warnings are errors here
    assert deviation(kept) < 1e-6
    assert residual(flat, kept) < residual(flat, earlier)
    wobble = 1e-7 * torch.randn(10, 20, generator=generator)
    assert (nearest_simplex_etf(flat + wobble, previous=earlier) - kept).abs().max() < 1e-2  # continuous again
    assert (nearest_simplex_etf(flat.double() + wobble) - kept).abs().max() > 0.1  # the noise alone decides
    for scale in (1e-4, 1e4):
        torch.testing.assert_close(nearest_simplex_etf(scale * flat, previous=earlier), kept, atol=1e-3, rtol=0)


def test_zeros_give_the_earlier_solution_without_numbers_below_the_normal_ones():
    earlier = simplex_etf(10, 20, orientation="random", seed=3)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush them to zero")
    try:
        found = nearest_simplex_etf(torch.zeros(10, 20), previous=earlier)
    finally:
        torch.set_flush_denormal(False)
    torch.testing.assert_close(found, earlier, atol=1e-6, rtol=0)
    torch.testing.assert_close(nearest_simplex_etf(1e4 * earlier, previous=torch.zeros(10, 20)), earlier)


def test_proximal_term_interpolates():
    a = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    earlier = simplex_etf(6, 9, orientation="random", seed=8)
    free = nearest_simplex_etf(a)
    torch.testing.assert_close(nearest_simplex_etf(a, previous=earlier, delta=0.0), free)
    torch.testing.assert_close(nearest_simplex_etf(a, previous=earlier, delta=1e6), earlier, atol=1e-5, rtol=0)
    distances = [(nearest_simplex_etf(a, previous=earlier, delta=d) - earlier).norm() for d in (0.0, 0.1, 0.5, 2.0)]
    assert distances == sorted(distances, reverse=True)


@pytest.mark.parametrize(
    ("weight", "kwargs", "message"),
    [
        (torch.zeros(3), {}, r"Expected a matrix \(num_classes, dim\), got shape \(3,\)"),
        (torch.zeros(5, 3), {}, "at least 4 dimensions"),
        (torch.tensor([[1.0, math.nan], [0.0, 1.0]]), {}, "not finite"),
        (torch.eye(3), {"previous": torch.eye(4)}, r"previous has shape \(4, 4\)"),
    ],
)
def test_nearest_errors(weight, kwargs, message):
    with pytest.raises(ValueError, match=message):
        nearest_simplex_etf(weight, **kwargs)
