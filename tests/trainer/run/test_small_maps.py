"""Convolutions of small maps as products: the library's convolution is the reference."""

import pytest
import torch
from torch.nn import functional as F

from etf_zoo.trainer.run.small_maps import dense_product, depthwise_product


def gradients(function, *tensors):
    """Output of a function and its gradients under a fixed random direction."""
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*tensors)
    direction = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    return [y, *torch.autograd.grad(y, tensors, direction)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        ((1, 1), (3, 3), (1, 1), (1, 1)),
        ((2, 2), (3, 3), (1, 1), (1, 1)),
        ((2, 2), (5, 5), (1, 1), (2, 2)),
        ((4, 4), (5, 5), (2, 2), (2, 2)),
        ((4, 4), (1, 1), (2, 2), (0, 0)),
        ((3, 3), (1, 1), (1, 1), (0, 0)),
        ((1, 1), (1, 1), (1, 1), (1, 1)),  # the outer pixels meet no tap
        ((2, 2), (3, 3), (1, 1), (3, 3)),
        ((2, 1), (1, 2), (1, 1), (2, 3)),
        ((3, 4), (2, 3), (1, 2), (0, 1)),
        ((4, 3), (4, 1), (2, 1), (1, 0)),
    ],
)
def test_equals_the_library(size, kernel, stride, padding, groups, memory_format):
    x = torch.randn(5, 6, *size, dtype=torch.float64).to(memory_format=memory_format)
    weight = torch.randn(8 if groups == 1 else 6, 6 // groups, *kernel, dtype=torch.float64)
    weight, bias = weight.to(memory_format=memory_format), torch.randn(len(weight), dtype=torch.float64)
    own = dense_product if groups == 1 else depthwise_product
    for tensors in ([x, weight, bias], [x, weight]):
        ours = gradients(lambda x, w, b=None: own(x, w, b, stride, padding), *tensors)
        library = gradients(lambda x, w, b=None: F.conv2d(x, w, b, stride, padding, groups=groups), *tensors)
        for mine, theirs in zip(ours, library, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
