import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from etf_zoo.layers.necks import NECKS, LastDimBatchNorm, ResidualNeck, build_neck, mlp_neck


def features(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_last_dim_batch_norm_is_batch_norm_over_all_other_dims():
    x = 3 * features(4, 5, 6, 7) + 1
    norm = LastDimBatchNorm(7)
    expected = (x - x.mean((0, 1, 2))) / (x.var((0, 1, 2), unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), expected)
    channels_first = x.permute(0, 3, 1, 2)
    torch.testing.assert_close(
        LastDimBatchNorm(7)(channels_first.movedim(1, -1)).movedim(-1, 1), nn.BatchNorm2d(7)(channels_first)
    )


def batch_norm(x):
    return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()


def test_mlp_neck_against_its_formula():
    neck = mlp_neck(6, 4, hidden_features=10)
    first, _, _, last = neck
    x = features(16, 6)
    expected = batch_norm(x @ first.weight.T).clamp_min(0) @ last.weight.T + last.bias
    torch.testing.assert_close(neck(x), expected)


def test_residual_neck_against_its_formula():
    neck = ResidualNeck(6, 4)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in neck.modules():
            if isinstance(module, nn.PReLU):
                module.weight.uniform_(0, 0.5, generator=generator)
    x = features(16, 6)
    h = batch_norm(x @ neck.stem[0].weight.T)
    for layer in neck.layers:
        inner = F.prelu(batch_norm(h @ layer[0].weight.T), layer[2].weight)
        h = h + F.prelu(batch_norm(inner @ layer[3].weight.T), layer[5].weight)
    torch.testing.assert_close(neck(x), h)


@pytest.mark.parametrize(("name", "layers"), [("mlp", 1), ("mlp2", 2), ("mlp3", 3)])
def test_mlps_of_several_layers_step_by_step(name, layers):
    torch.manual_seed(0)
    neck, _ = build_neck(name, 8, 5)
    x = h = features(16, 8)
    parts = list(neck)
    assert len(parts) == 3 * layers + 1
    for layer in range(layers):
        linear, norm = parts[3 * layer], parts[3 * layer + 1].bn
        assert linear.out_features == 2048
        h = F.linear(h, linear.weight)
        h = (h - h.mean(0)) / (h.var(0, correction=0) + norm.eps).sqrt()
        h = h.clamp(min=0)
    h = F.linear(h, parts[-1].weight, parts[-1].bias)
    torch.testing.assert_close(neck(x), h, atol=1e-4, rtol=1e-4)


def gradients(neck):
    return torch.cat([p.grad.float().flatten() for p in neck.parameters()])


@pytest.mark.parametrize("name", ["mlp", "residual"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(name, dtype, tolerance, autocast):
    """Outputs and gradients are those of float32, but for rounding; gradients also turn at the kinks of ReLU."""
    torch.manual_seed(0)
    reference, _ = build_neck(name, 8, 5)
    neck = copy.deepcopy(reference)
    x, direction = features(256, 8).to(dtype), features(256, 8)
    expected = reference(x.float())
    if autocast:
        with torch.autocast("cpu", dtype):
            y = neck(x.float())
    else:
        y = neck.to(dtype)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, atol=tolerance * expected.std().item(), rtol=tolerance)
    for out in (expected, y):
        out.backward(direction.to(out.dtype))
    assert torch.isfinite(gradients(neck)).all()
    assert F.cosine_similarity(gradients(neck), gradients(reference), dim=0) > 1 - tolerance


@pytest.mark.parametrize("training", [False, True])
def test_gradcheck_of_the_mlp_neck(training):
    torch.manual_seed(0)
    neck = mlp_neck(4, 3, hidden_features=6).double().train(training)
    x = features(7, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(neck, (x,))
    weights = tuple(p.detach().clone().requires_grad_() for p in neck.parameters())
    names = [name for name, _ in neck.named_parameters()]
    assert torch.autograd.gradcheck(
        lambda *values: torch.func.functional_call(neck, dict(zip(names, values, strict=True)), x.detach()), weights
    )


@pytest.mark.parametrize("name", NECKS)
def test_necks_are_not_linear(name):
    """A linear neck could absorb any classifier; these cannot be one: f(x) + f(-x) = 2 f(0) holds for affine maps."""
    torch.manual_seed(0)
    neck, _ = build_neck(name, 6, 4)
    neck.eval()
    x = features(16, 6)
    assert (neck(x) + neck(-x) - 2 * neck(torch.zeros_like(x))).abs().max() > 0.1
    assert (neck(x) < 0).any()  # both signs, as a frame needs
    assert (neck(x) > 0).any()


@pytest.mark.parametrize("name", NECKS)
@pytest.mark.parametrize(("in_features", "num_classes", "width"), [(8, 5, 8), (8, 9, 8), (8, 30, 29)])
def test_width_is_the_features_or_what_a_simplex_needs(name, in_features, num_classes, width):
    neck, out_features = build_neck(name, in_features, num_classes)
    assert out_features == width
    assert neck(features(2, 3, in_features)).shape == (2, 3, width)
    assert all(p.is_meta for p in build_neck(name, in_features, num_classes, device="meta")[0].parameters())


def test_errors():
    known = "mlp, mlp2, mlp3, projector, residual, or None"
    with pytest.raises(ValueError, match=rf"Unknown neck 'conv'. Choose one of {known}"):
        build_neck("conv", 8, 5)
