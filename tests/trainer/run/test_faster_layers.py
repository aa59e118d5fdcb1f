"""Layers that choose how to compute: whatever they choose, the library's layers are the reference."""

import copy

import pytest
import timm
import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import nn

from etf_zoo.trainer.run import faster_layers
from etf_zoo.trainer.run.faster_layers import (
    FasterConv2d,
    FasterLinear,
    keep_freed_memory,
    linear_by_convolution,
    use_faster_layers,
)


@pytest.fixture
def choose(monkeypatch):
    """Have every layer take a way if it has it, however small it is; gives what was asked for."""
    asked = {}

    def take(*names):
        def chosen(key, ways):
            asked[key] = list(ways)
            for way in ways.values():
                way()  # as a measurement would
            return next((name for name in names if name in ways), next(iter(ways)))

        monkeypatch.setenv("ETF_ZOO_MEASURE", "1")
        monkeypatch.setattr(faster_layers, "WORTH_MEASURING", 0)
        monkeypatch.setattr(faster_layers, "fastest", chosen)
        return asked

    return take


def outputs_and_gradients(model, x):
    y = model(x)
    return [y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))]


def made(name, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, drop_rate=0, **kwargs).double()
    for parameter in model.parameters():  # timm starts some layers at zero
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    return model


MODELS = {
    "resnet18": {},
    "mobilenetv3_small_050": {},
    "convnext_atto": {},
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 3},
    "tf_efficientnet_lite0": {},  # pads as TensorFlow does
}


@pytest.mark.parametrize("ways", [("library",), ("products", "convolution"), ("weights",), None])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_the_same(name, ways, choose):
    asked = choose(*ways) if ways else {}  # else by the fixed rules
    model = made(name, **MODELS[name])
    own = use_faster_layers(copy.deepcopy(model))
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    for mine, theirs in zip(outputs_and_gradients(own, x), outputs_and_gradients(model, x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)
    assert list(own.state_dict()) == list(model.state_dict())
    if name.startswith(("resnet", "tf_", "mobile")) and ways:
        assert any("weights" in given for given in asked.values())


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "tf_efficientnet_lite0", "vit_tiny_patch16_224"])
def test_under_bf16_other_ways_are_as_near_to_the_truth(name, choose):
    """Each way rounds otherwise: none may be farther from float64 than the library's by more than a half."""
    model = made(name, **MODELS[name])
    x = torch.randn(8, 3, 64, 64, dtype=torch.float64)
    model.eval()  # statistics of a batch would enlarge what rounding does
    truth = model(x).detach()
    distance = {}
    for ways in (("library",), ("float32 weights", "float32", "products", "convolution")):
        asked = choose(*ways)
        own = use_faster_layers(copy.deepcopy(model).float())
        with torch.autocast("cpu", torch.bfloat16):
            y = own(x.float())
        distance[ways] = (y.double() - truth).norm().item()
    library, other = distance.values()
    assert 0 < other < 1.5 * library
    assert any("bfloat16" in key for key in asked)
    assert any(("products" if name.startswith("vit") else "float32 weights") in ways for ways in asked.values())


@pytest.mark.parametrize("size", [(7, 8), (9, 6)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 2), (3, 1), (5, 3)])
@pytest.mark.parametrize("groups", [1, 6])
def test_a_layer_pads_as_tensorflow_does(groups, kernel, stride, size, choose):
    choose("weights", "products")
    layer = Conv2dSame(6, 6, kernel, stride=stride, groups=groups, bias=False).double()
    own, x = use_faster_layers(copy.deepcopy(layer)), torch.randn(2, 6, *size, dtype=torch.float64)
    for mine, theirs in zip(outputs_and_gradients(own, x), outputs_and_gradients(layer, x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(own(x), layer(x))


def test_attention_takes_the_way_that_was_chosen(choose):
    asked = choose("products")
    model = use_faster_layers(made("vit_tiny_patch16_224", img_size=64, depth=2))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        model(x)
    assert all(block.attn.fused_attn for block in model.blocks)
    model(x)
    assert not any(block.attn.fused_attn for block in model.blocks)
    assert [ways for key, ways in asked.items() if key.startswith("attention")] == [["fused", "products"]]
    choose("fused")
    model(x)
    assert all(block.attn.fused_attn for block in model.blocks)
    copy.deepcopy(model)(x)


@pytest.mark.parametrize("shape", [(2, 5, 6), (3, 4, 2, 6), (1, 1, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_a_convolution(shape, bias):
    layer, x = nn.Linear(6, 4, bias=bias).double(), torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(linear_by_convolution(x, layer.weight, layer.bias), layer(x), rtol=0, atol=1e-14)
    torch.testing.assert_close(
        linear_by_convolution(x.transpose(0, 1), layer.weight, layer.bias), layer(x.transpose(0, 1)), rtol=0, atol=1e-14
    )


def test_measuring_draws_nothing_from_the_run(choose):
    choose("products")
    layers = use_faster_layers(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Flatten(2), nn.Linear(9, 5)))
    x = torch.randn(2, 4, 3, 3)
    before = torch.get_rng_state()
    layers(x)
    assert torch.equal(torch.get_rng_state(), before)


def test_fixed_rules_take_products_only_where_they_pay(monkeypatch):
    taken = []
    for name in ("dense_product", "depthwise_product"):
        function = getattr(faster_layers, name)
        monkeypatch.setattr(faster_layers, name, lambda *a, f=function, n=name: [taken.append(n), f(*a)][1])
    dense, depthwise = use_faster_layers(
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
        nn.Sequential(use_faster_layers(nn.Conv2d(4, 6, 3)))(torch.randn(2, 4, 2, 2))  # the library's own error


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
        Conv2dSame(4, 4, 3, dilation=2),
        Conv2dSame(4, 4, 3, stride=2),
        nn.Conv2d(4, 4, 3),
        nn.Linear(3, 3),
    )
    use_faster_layers(layers)
    assert [isinstance(layer, FasterConv2d) for layer in layers] == [False] * 8 + [True, True, False]
    assert isinstance(layers[-3], Conv2dSame)
    assert isinstance(layers[-1], FasterLinear)


def test_other_systems_keep_their_allocator(monkeypatch):
    monkeypatch.setattr("sys.platform", "win32")
    assert keep_freed_memory() is False
