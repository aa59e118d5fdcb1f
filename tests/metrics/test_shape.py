"""Energy in the mean and number of directions, against plain definitions."""

import pytest
import torch

from etf_zoo.errors import EtfZooError
from etf_zoo.frames import simplex_etf
from etf_zoo.metrics import mean_energy_share, participation_ratio


def features(rows, columns, shift=1.0):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator) * torch.linspace(0.2, 2, columns) + shift


@pytest.mark.parametrize(("rows", "columns"), [(50, 6), (6, 50)])
def test_against_the_definitions(rows, columns):
    x = features(rows, columns).double()
    mean = sum(x) / rows
    energy = sum(float(row @ row) for row in x) / rows
    assert mean_energy_share(x) == pytest.approx(float(mean @ mean) / energy)
    covariance = sum(torch.outer(row - mean, row - mean) for row in x) / rows
    values = torch.linalg.eigvalsh(covariance)
    assert participation_ratio(x) == pytest.approx(float(values.sum() ** 2 / values.square().sum()))


def test_energy_is_that_of_the_mean_and_of_what_is_left():
    x = features(40, 5).double()
    centered = x - x.mean(0)
    left = centered.square().sum() / x.square().sum()
    assert mean_energy_share(x) == pytest.approx(1 - left.item())
    assert mean_energy_share(centered) == pytest.approx(0, abs=1e-12)
    assert mean_energy_share(3 * x @ torch.linalg.qr(features(5, 5).double()).Q) == pytest.approx(mean_energy_share(x))


def test_collapsed_classes_spread_over_one_direction_less():
    frame = simplex_etf(7, 20, orientation="random")
    assert participation_ratio(frame.repeat(3, 1)) == pytest.approx(6)
    assert mean_energy_share(frame) == pytest.approx(0, abs=1e-10)
    assert participation_ratio(5 * frame + 2) == pytest.approx(6, rel=1e-4)  # neither scale nor shift
    assert participation_ratio(torch.eye(2)[[0, 0, 1]]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_energy_share(torch.zeros(3, 2)), "All features are zero"),
        (lambda: participation_ratio(torch.ones(3, 2)), "All features are the same"),
        (lambda: participation_ratio(torch.ones(3)), "at least one row"),
        (lambda: mean_energy_share([[1.0]]), "got list"),
        (lambda: mean_energy_share(torch.tensor([[float("nan")]])), "not finite"),
    ],
)
def test_errors(call, message):
    with pytest.raises(EtfZooError, match=message):
        call()
