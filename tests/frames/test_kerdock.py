import math

import pytest
import torch

from etf_zoo.errors import EtfZooError
from etf_zoo.frames import frame_report, kerdock_frame
from etf_zoo.frames.build import build_frame
from etf_zoo.frames.kerdock import (
    hadamard,
    kerdock_capacity,
    kerdock_core,
    kerdock_signs,
    kerdock_width,
    unpack_signs,
)
from etf_zoo.frames.report import kerdock_report

ONE = torch.ones(1)


def slow_forms(dim):
    """Q_a(x, x0) by the definition, with polynomials as lists of bits: `(d/2, d)` of 0 and 1, a in order of powers."""
    degree = dim.bit_length() - 2
    modulus = {3: 0b1011, 5: 0b100101}[degree]

    def times(a, b):
        product = 0
        for i in range(degree):
            if b >> i & 1:
                product ^= a << i
        for i in range(2 * degree, degree - 1, -1):
            if product >> i & 1:
                product ^= modulus << (i - degree)
        return product

    def power(a, n):
        result = 1
        for _ in range(n):
            result = times(result, a)
        return result

    def trace(a):
        total = 0
        for i in range(degree):
            total ^= power(a, 2**i)
        assert total in (0, 1)
        return total

    rows = []
    for a in [0, *(power(2, j) for j in range(2**degree - 1))]:
        row = []
        for x0 in (0, 1):
            for x in range(2**degree):
                y = times(a, x)
                row.append(sum(trace(power(y, 2**i + 1)) for i in range(1, degree // 2 + 1)) + x0 * trace(y))
        rows.append(row)
    return torch.tensor(rows) % 2


@pytest.mark.parametrize("dim", [16, 64])
def test_signs_against_the_definition(dim):
    signs = unpack_signs(kerdock_signs(dim, seed=5), dim, ONE)
    assert torch.equal(signs, signs[:1] * (1 - 2 * slow_forms(dim)))  # row 0, a = 0, is the mirroring


@pytest.mark.parametrize("dim", [4, 16, 64, 256])
def test_any_two_bases_are_unbiased(dim):
    """The whole frame, exactly: the products are sums of integers."""
    signs = unpack_signs(kerdock_signs(dim), dim, ONE)
    assert signs.shape == (dim // 2, dim)
    transform = hadamard(dim, ONE)
    assert torch.equal(transform @ transform.T, dim * torch.eye(dim))
    first, second = torch.triu_indices(dim // 2, dim // 2, 1)
    for a, b in zip(first.split(4096), second.split(4096), strict=True):
        spectrum = (signs[a] * signs[b]) @ transform  # d times the cosines of basis a's first vector with basis b's
        assert torch.equal(spectrum.abs(), torch.full_like(spectrum, math.sqrt(dim)))


def test_a_million_vectors_are_unbiased():
    signs = unpack_signs(kerdock_signs(1024), 1024, ONE)
    transform = hadamard(1024, ONE)
    for a in (0, 1, 137, 511):
        spectrum = (signs * signs[a])[torch.arange(512) != a] @ transform
        assert torch.equal(spectrum.abs(), torch.full_like(spectrum, 32))


@pytest.mark.parametrize("dim", [16, 64])
def test_coherence_of_the_whole_frame(dim):
    frame = kerdock_frame(kerdock_capacity(dim), dim)
    assert frame.shape == (dim * (dim + 2), dim)
    cosines = (frame.double() @ frame.double().T).abs().fill_diagonal_(0)
    levels = cosines[~torch.eye(len(frame), dtype=torch.bool)].round(decimals=6).unique()
    assert levels.tolist() == [0, round(dim**-0.5, 6), 1]  # 1: of a vector and its negative
    assert len(frame.round(decimals=5).unique(dim=0)) == len(frame)
    assert torch.equal(frame.norm(dim=1).round(decimals=6), torch.ones(len(frame)))


@pytest.mark.parametrize(
    ("num_classes", "dim"), [(2, 4), (10, 16), (16, 16), (20, 16), (32, 16), (33, 16), (70, 16), (256, 16), (288, 16)]
)
def test_report_in_closed_form(num_classes, dim):
    slow, fast = frame_report(kerdock_frame(num_classes, dim)), kerdock_report(num_classes, dim)
    for name, value in vars(slow).items():
        assert getattr(fast, name) == pytest.approx(value, abs=1e-6), name


def test_report_of_a_million_classes():
    report = kerdock_report(1_050_624, 1024)
    assert report.largest_cosine == 1 / 32
    assert report.tightness_error == 0
    assert kerdock_report(16_785_408, 4096).largest_cosine == 1 / 64


@pytest.mark.parametrize(("num_classes", "dim"), [(20, 6), (300, 100), (200, 40)])
def test_other_widths_go_through_a_rotation(num_classes, dim):
    frame = kerdock_frame(num_classes, dim, seed=3)
    inside = kerdock_frame(num_classes, kerdock_core(dim), seed=3)
    torch.testing.assert_close(frame @ frame.T, inside @ inside.T)
    assert torch.linalg.matrix_rank(frame) == kerdock_core(dim)


def test_no_prototype_lies_where_relu_features_do():
    toward = kerdock_frame(4096, 64) @ torch.full((64,), 1 / 8)
    assert toward.max() < 0.6  # without the mirroring, 1


def test_seeds():
    assert torch.equal(kerdock_frame(288, 16, seed=1), kerdock_frame(288, 16, seed=1))
    assert not torch.equal(kerdock_frame(288, 16, seed=1), kerdock_frame(288, 16, seed=2))
    assert torch.equal(build_frame("kerdock", 288, 16, seed=1), kerdock_frame(288, 16, seed=1))


def test_sizes():
    assert [kerdock_capacity(d) for d in (3, 4, 16, 64, 256, 512, 1024, 4096)] == [
        0, 24, 288, 4224, 66048, 66048, 1050624, 16785408,
    ]  # fmt: skip
    assert [kerdock_core(d) for d in (4, 15, 16, 512, 768, 1024, 2048, 50000)] == [4, 4, 16, 256, 256, 1024, 1024, 4096]
    assert [kerdock_width(k) for k in (2, 24, 25, 66048, 66049, 1050624)] == [4, 4, 16, 256, 1024, 1024]
    assert kerdock_signs(1024).numel() == 1024**2 // 16  # d^2 / 2 bits


def test_errors_name_the_way_out():
    with pytest.raises(EtfZooError, match=r"289 classes needs 64 dimensions, got 16.*288 in 16.*neck='mlp'"):
        kerdock_frame(289, 16)
    with pytest.raises(EtfZooError, match=r"needs 4 dimensions, got 3.*none in fewer than 4"):
        kerdock_frame(10, 3)
    with pytest.raises(EtfZooError, match=r"end at 16,785,408 classes.*several heads"):
        kerdock_frame(17_000_000, 4096)
    with pytest.raises(EtfZooError, match="at least 2 classes"):
        kerdock_frame(1, 16)
    with pytest.raises(EtfZooError, match="at least 4 dimensions"):
        kerdock_core(3)
    with pytest.raises(EtfZooError, match="exist for dim = 4, 16"):
        kerdock_signs(32)
