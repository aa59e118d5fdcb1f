"""Whitening beside a plain loop over groups; identity covariance; running statistics; timm models."""

import math

import pytest
import timm
import torch
from torch import nn

from etf_zoo.layers.whitening import Whitening, newton_whitening, whiten_last_norm


def correlated(rows, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return 3 + torch.randn(rows, dim, generator=generator, dtype=torch.float64) @ mix


def covariance(x):
    x = x - x.mean(dim=0)
    return x.T @ x / len(x)


def test_newton_matches_a_plain_loop():
    sigma = covariance(correlated(50, 4))
    trace = sum(float(sigma[i, i]) for i in range(4))
    p = torch.eye(4, dtype=torch.float64)
    for _ in range(5):
        p = (3 * p - p @ p @ p @ (sigma / trace)) / 2
    assert torch.allclose(newton_whitening(sigma, 5), p / math.sqrt(trace), atol=1e-12)


def test_newton_converges_to_the_inverse_square_root():
    sigma = covariance(correlated(80, 5))
    values, vectors = torch.linalg.eigh(sigma)
    expected = vectors / values.sqrt() @ vectors.T
    assert torch.allclose(newton_whitening(sigma, 30), expected, atol=1e-8)


@pytest.mark.parametrize("group_size", [1, 3, 4, 64])
def test_matches_a_plain_loop_over_groups(group_size):
    x = correlated(40, 10)
    layer = Whitening(10, group_size=group_size, iterations=5, affine=False).double()
    columns = []
    for start in range(0, 10, group_size):
        part = x[:, start : start + group_size]
        sigma = covariance(part) + 1e-5 * torch.eye(part.shape[1], dtype=torch.float64)
        columns.append((part - part.mean(dim=0)) @ newton_whitening(sigma, 5))
    assert torch.allclose(layer(x), torch.cat(columns, dim=1), atol=1e-10)


@pytest.mark.parametrize("group_size", [4, 5, 12])
def test_output_is_white_in_each_group(group_size):
    layer = Whitening(12, group_size=group_size, iterations=40, eps=1e-12, affine=False).double()
    y = layer(correlated(200, 12))
    for start in range(0, 12, group_size):
        part = y[:, start : start + group_size]
        assert torch.allclose(covariance(part), torch.eye(part.shape[1], dtype=torch.float64), atol=1e-6)
    assert torch.allclose(y.mean(dim=0), torch.zeros(12, dtype=torch.float64), atol=1e-9)
    if group_size < 12:
        assert (covariance(y) - torch.eye(12)).abs().max() > 1e-2  # across groups nothing is promised


def test_sixty_four_correlated_channels_become_white():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q * torch.logspace(0.5, -1.5, 64)
    x = torch.randn(4096, 64, generator=generator) @ mixing.T
    white = covariance(Whitening(64, affine=False)(x))
    assert (white - torch.eye(64)).abs().max() < 0.05
    five = covariance(Whitening(64, iterations=5, affine=False)(x))
    assert five.diagonal().min() < 0.6


def test_few_iterations_leave_small_directions_short():
    layer = Whitening(6, iterations=5, affine=False).double()
    values = torch.linalg.eigvalsh(covariance(layer(correlated(300, 6))))
    assert values.max() < 1 + 1e-6
    assert values.max() > 0.9
    assert values.min() < 0.9


def test_group_of_one_is_batch_norm():
    x = correlated(30, 6).float()
    layer, norm = Whitening(6, group_size=1, iterations=20), nn.BatchNorm1d(6)
    for _ in range(100):
        assert torch.allclose(layer(x), norm(x), atol=1e-3)
    x = x[:5]
    assert torch.allclose(layer.eval()(x), norm.eval()(x), atol=5e-2)  # running variances are those of a larger sample


def test_evaluation_uses_running_statistics_alone():
    layer = Whitening(8, group_size=4, iterations=12).double()
    x = correlated(500, 8)
    for _ in range(200):
        layer(x)
    in_training = layer(x)
    layer.eval()
    assert torch.allclose(layer(x), in_training, atol=1e-6)
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    assert torch.allclose(torch.cat([layer(x[i : i + 1]) for i in range(5)]), layer(x)[:5])
    assert all(torch.equal(state[key], value) for key, value in layer.state_dict().items())
    other = Whitening(8, group_size=4).double()
    other.load_state_dict(state)
    assert torch.allclose(other.eval()(x), layer(x))


def test_momentum_is_the_share_of_the_new():
    layer = Whitening(4, momentum=0.25).double()
    x = correlated(50, 4)
    layer(x)
    assert torch.allclose(layer.running_mean, 0.25 * x.mean(dim=0))


def test_shapes():
    x = torch.randn(3, 10, 4, 5)
    first = Whitening(10, group_size=4)
    last = Whitening(10, group_size=4, channels_last=True)
    y = first(x)
    assert y.shape == x.shape
    assert torch.allclose(last(x.movedim(1, -1)), y.movedim(1, -1), atol=1e-6)
    assert Whitening(10)(torch.randn(12, 10)).shape == (12, 10)


def test_gradcheck():
    layer = Whitening(5, group_size=3).double()

    def forward(x):
        return layer(x)

    assert torch.autograd.gradcheck(forward, correlated(7, 5).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(dtype):
    layer = Whitening(6, group_size=4)
    x = (50 * correlated(40, 6)).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.square().mean().backward()
    assert y.dtype == dtype
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()
    assert layer.running_mean.dtype == torch.float32


def test_errors():
    with pytest.raises(ValueError, match="positive"):
        Whitening(4, group_size=0)
    with pytest.raises(ValueError, match="Expected 4 channels"):
        Whitening(4)(torch.randn(3, 5))
    with pytest.raises(ValueError, match="at least two samples"):
        Whitening(4)(torch.randn(1, 4))


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("resnet18", "layer4.1.bn2"),
        ("resnet10t", "layer4.0.bn2"),
        ("densenet121", "features.norm5"),
        ("convnext_atto", "head.norm"),
        ("vit_tiny_patch16_224", "norm"),
        ("mobilenetv3_small_050", "blocks.5.0.bn1"),
    ],
)
def test_takes_the_place_of_the_last_norm(name, norm):
    size = {"img_size": 32} if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=3, **size)
    before = dict(model.named_modules())
    assert whiten_last_norm(model, group_size=16) == norm
    after = set(model.modules())
    assert set(before.values()) - after == {before[norm]}  # the old norm goes; its activation stays, as all else does
    assert sum(isinstance(module, Whitening) for module in model.get_submodule(norm).modules()) == 1
    x = torch.randn(6, 3, 32, 32)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    assert torch.allclose(model(x[:1]), model(x)[:1], atol=1e-3)


FIRST = ["LayerNorm2d", "LayerNorm2dFp32", "RmsNorm2d", "RmsNorm2dFp32", "SimpleNorm2d", "SimpleNorm2dFp32"]
FIRST_ACT = ["LayerNormAct2d", "LayerNormAct2dFp32", "RmsNormAct2d", "RmsNormAct2dFp32", "GroupNorm1Act"]
LAST = ["LayerNorm", "LayerNormFp32", "RmsNorm", "RmsNormFp32", "SimpleNorm", "SimpleNormFp32"]


@pytest.mark.parametrize("norm", [*FIRST, *FIRST_ACT, *LAST, "LayerNormExp2d", "RMSNorm"])
def test_every_norm_of_timm_hands_over_its_channels_and_scale(norm):
    """Groups of one channel are batch norm; maps as large as there are channels leave no doubt which axis is meant."""
    kwargs = {"apply_act": False} if norm in FIRST_ACT else {}
    cls = next(getattr(place, norm) for place in (timm.layers, timm.layers.norm, nn) if hasattr(place, norm))
    model = nn.Sequential(cls(8, **kwargs))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(1, 9))
    assert whiten_last_norm(model, group_size=1, iterations=20) == "0"
    x = correlated(16 * 64, 8).float().view(16, 8, 8, 8)  # channels last
    reference = nn.BatchNorm1d(8)
    with torch.no_grad():
        reference.weight.copy_(torch.arange(1, 9))
    expected = reference(x.flatten(0, 2)).view_as(x)
    y = model(x) if norm in LAST or norm == "RMSNorm" else model(x.movedim(-1, 1)).movedim(1, -1)
    torch.testing.assert_close(y, expected, atol=1e-2, rtol=0)


def test_pooled_features_of_a_twin_and_its_state():
    model = timm.create_model("resnet18_etf", num_classes=4)
    assert whiten_last_norm(model) == "layer4.1.bn2"
    twin = timm.create_model("resnet18_etf", num_classes=4)
    whiten_last_norm(twin)
    twin.load_state_dict(model.state_dict())


def test_fused_activation_stays():
    model = timm.create_model("densenet121", num_classes=3)
    whiten_last_norm(model)
    model.train()
    assert model.forward_features(torch.randn(4, 3, 32, 32)).min() >= 0


def test_norm_by_name_keeps_its_affine_part_and_mode():
    model = timm.create_model("resnet18", num_classes=3).eval()
    with torch.no_grad():
        model.bn1.weight.fill_(2.0)
        model.bn1.bias.fill_(-1.0)
    assert whiten_last_norm(model, name="bn1") == "bn1"
    whitening = next(m for m in model.bn1.modules() if isinstance(m, Whitening))
    assert torch.equal(whitening.weight, torch.full((64,), 2.0))
    assert torch.equal(whitening.bias, torch.full((64,), -1.0))
    assert not whitening.training


def test_model_errors():
    model = timm.create_model("resnet18", num_classes=3)
    with pytest.raises(ValueError, match=r"no normalization layer of the model.*layer4\.1\.bn2"):
        whiten_last_norm(model, name="layer4.1.bn9")
    with pytest.raises(ValueError, match=r"whitening takes name, group_size, .*; not groups"):
        whiten_last_norm(model, groups=4)
    with pytest.raises(ValueError, match="no normalization layer to replace"):
        whiten_last_norm(nn.Linear(3, 3))
