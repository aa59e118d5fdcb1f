"""Weight gradients by other ways: the library's, at all sizes, strides and paddings."""

import pytest
import torch
from torch.nn import functional as F

from etf_zoo.trainer.run.weight_gradients import convolve, dense_weight_gradient, depthwise_weight_gradient

KERNELS = [((3, 3), (1, 1), (1, 1)), ((5, 5), (2, 2), (2, 2)), ((3, 5), (2, 1), (0, 3)), ((1, 1), (2, 2), (0, 0))]


def made(kernel, depthwise, size=(7, 8), dtype=torch.float64):
    torch.manual_seed(0)
    x = torch.randn(2, 6, *size, dtype=dtype)
    return x, torch.randn(6 if depthwise else 4, 1 if depthwise else 6, *kernel, dtype=dtype)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("depthwise", [True, False])
@pytest.mark.parametrize(("kernel", "stride", "padding"), KERNELS)
def test_a_convolution_and_its_gradients_are_the_librarys(kernel, stride, padding, depthwise, last):
    for size in ((7, 8), (6, 9), (kernel[0], kernel[1] + 1)):
        three = made(kernel, depthwise, size)
        if last:
            three = [t.contiguous(memory_format=torch.channels_last) for t in three]
        own, theirs = ([t.clone().requires_grad_() for t in three] for _ in range(2))
        y = convolve(*own, stride, padding)
        wanted = F.conv2d(*theirs, None, stride, padding, 1, 6 if depthwise else 1)
        torch.testing.assert_close(y, wanted, rtol=0, atol=1e-13)
        direction = torch.randn_like(wanted)
        both = torch.autograd.grad(y, own, direction), torch.autograd.grad(wanted, theirs, direction)
        for a, b in zip(*both, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("depthwise", [True, False])
def test_a_weight_gradient_is_the_derivative(depthwise):
    """By differences of the layer's output, and linear in the gradient that comes in."""
    x, weight = made((3, 3), depthwise)
    way = depthwise_weight_gradient if depthwise else dense_weight_gradient
    y = F.conv2d(x, weight, None, 2, 1, 1, 6 if depthwise else 1)
    direction, step = torch.randn_like(y), torch.randn_like(weight)
    found = way(x, direction, (3, 3), (2, 2), (1, 1))
    moved = F.conv2d(x, weight + step, None, 2, 1, 1, 6 if depthwise else 1)
    torch.testing.assert_close((found * step).sum(), (direction * (moved - y)).sum())
    torch.testing.assert_close(way(x, -3 * direction, (3, 3), (2, 2), (1, 1)), -3 * found)


@pytest.mark.parametrize("depthwise", [True, False])
def test_float32_and_bf16_round_as_the_library_does(depthwise):
    for dtype, rounding in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        x, weight = made((5, 5), depthwise, (16, 16), torch.float64)
        low = [t.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_() for t in (x, weight)]
        exact = [t.detach().double().requires_grad_() for t in low]
        (found,) = torch.autograd.grad(convolve(*low, (1, 1), (2, 2)).sum(), low[1])
        (wanted,) = torch.autograd.grad(F.conv2d(*exact, None, 1, 2, 1, 6 if depthwise else 1).sum(), exact[1])
        assert found.dtype == dtype
        assert (found.double() - wanted).norm() < rounding * wanted.norm()


def test_only_what_is_wanted_is_computed(monkeypatch):
    x, weight = made((3, 3), False)
    monkeypatch.setattr(
        "etf_zoo.trainer.run.weight_gradients.dense_weight_gradient", lambda *_: pytest.fail("not asked for")
    )
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(convolve(x, weight, (1, 1), (1, 1)).sum(), x)
    (wanted,) = torch.autograd.grad(F.conv2d(x, weight, None, 1, 1).sum(), x)
    torch.testing.assert_close(gradient, wanted)
    with pytest.raises(RuntimeError, match="does not require grad"):
        convolve(x.detach(), weight, (1, 1), (1, 1)).sum().backward()


def test_a_second_derivative_is_refused():
    x, weight = made((3, 3), False)
    weight.requires_grad_()
    (gradient,) = torch.autograd.grad(convolve(x, weight, (1, 1), (1, 1)).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
