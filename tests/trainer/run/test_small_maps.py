"""Convolutions of small maps as products: the library's convolution is the reference."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from etf_zoo.trainer.run import small_maps
from etf_zoo.trainer.run.small_maps import SmallMapConv2d, dense_product, depthwise_product, use_products


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


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "convnext_atto"])
def test_a_model_computes_the_same(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, drop_rate=0).double()
    for parameter in model.parameters():  # timm starts some layers at zero
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    own = use_products(copy.deepcopy(model))
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)

    def run(model):
        y = model(x)
        return [y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))]

    for mine, theirs in zip(run(own), run(model), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)
    assert list(own.state_dict()) == list(model.state_dict())


def test_takes_products_only_where_they_pay(monkeypatch):
    taken = []
    for name in ("dense_product", "depthwise_product"):
        function = getattr(small_maps, name)
        monkeypatch.setattr(small_maps, name, lambda *a, f=function, n=name: [taken.append(n), f(*a)][1])
    dense, depthwise = use_products(
        nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=6))
    )
    for layer in (dense, depthwise):
        small, large = (torch.randn(2, layer.in_channels, side, side) for side in (3, 5))
        layer(large)
        with torch.no_grad():
            layer(small)
        assert taken == []
        layer(small)
        assert taken.pop() == ("dense_product" if layer is dense else "depthwise_product")
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        nn.Sequential(use_products(nn.Conv2d(4, 6, 3)))(torch.randn(2, 4, 2, 2))  # the library's own error


def test_leaves_other_layers_alone():
    class Other(nn.Conv2d):
        pass

    layers = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 8, 3, groups=4),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv1d(4, 4, 3),
        Other(4, 4, 3),
        nn.Conv2d(4, 4, 3),
    )
    use_products(layers)
    assert [isinstance(layer, SmallMapConv2d) for layer in layers] == [False] * 7 + [True]
