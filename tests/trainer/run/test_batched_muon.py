"""Muon over all matrices of one shape at once: timm's Muon, one matrix at a time, is the reference."""

import copy
import functools

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.optim import muon as timm_muon
from torch import nn

from etf_zoo.trainer.recipe.config import Optim
from etf_zoo.trainer.run.batched_muon import BatchedMuon, batch_muon
from etf_zoo.trainer.run.model import make_optimizer


@pytest.fixture
def batches_on_a_cpu(monkeypatch):
    monkeypatch.setattr(BatchedMuon, "on_cpu", True)


def made():
    """Matrices of three shapes, one of them of several layers, a depthwise convolution and norms, which are AdamW's."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)]  # a bias there has no gradient but rounding
    layers += [nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 3, padding=1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 16, 5))


def trained(model, optimizer, steps=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(6, 3, 4, 4, generator=generator)).square().sum().backward()
        optimizer.step()
    return model


def pair(**kwargs):
    """The same model under timm's optimizer and under ours."""
    models = made(), made()
    optimizers = [create_optimizer_v2(m, "muon", lr=0.02, weight_decay=0.1, momentum=0.9, **kwargs) for m in models]
    return models, (optimizers[0], batch_muon(optimizers[1]))


@pytest.mark.parametrize("kwargs", [{}, {"nesterov": True}, {"adjust_lr_fn": "original"}, {"scale_eps": True}])
def test_in_float32_the_update_is_the_same(kwargs, batches_on_a_cpu, monkeypatch):
    exact = functools.partial(timm_muon.zeropower_via_newtonschulz, dtype=torch.float32)
    monkeypatch.setattr(timm_muon, "zeropower_via_newtonschulz", exact)
    models, optimizers = pair(**kwargs)
    theirs, ours = (trained(m, o) for m, o in zip(models, optimizers, strict=True))
    assert isinstance(optimizers[1], BatchedMuon)
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)
        assert (a - b).abs().max() < 1e-3 * (a - 0).abs().max()
    states = [o.state_dict()["state"] for o in optimizers]
    assert [s.keys() for s in states[0].values()] == [s.keys() for s in states[1].values()]
    for one, other in zip(states[0].values(), states[1].values(), strict=True):
        for name, value in one.items():
            torch.testing.assert_close(torch.as_tensor(other[name]), torch.as_tensor(value), rtol=1e-3, atol=1e-5)


def test_in_bf16_it_differs_by_rounding(batches_on_a_cpu):
    models, optimizers = pair()
    start = made()
    theirs, ours = (trained(m, o, steps=1) for m, o in zip(models, optimizers, strict=True))
    for a, b, c in zip(theirs.parameters(), ours.parameters(), start.parameters(), strict=True):
        assert (a - b).norm() <= 0.02 * (a - c).norm()
        assert (a - c).norm() > 0


def test_matrices_of_one_shape_are_taken_together(batches_on_a_cpu, monkeypatch):
    shapes = []
    function = timm_muon.zeropower_via_newtonschulz
    monkeypatch.setattr(
        timm_muon,
        "zeropower_via_newtonschulz",
        lambda x, *a, **k: [shapes.append(tuple(x.shape)), function(x, *a, **k)][1],
    )
    model = made()
    trained(model, batch_muon(create_optimizer_v2(model, "muon", lr=0.02)), steps=1)
    assert sorted(shapes) == [(1, 5, 128), (1, 8, 27), (2, 8, 72)]
    assert all(p.grad is not None for p in model.parameters())


def test_on_a_cpu_and_for_other_optimizers_nothing_changes(monkeypatch):
    models, optimizers = pair()
    theirs, ours = (trained(m, o) for m, o in zip(models, optimizers, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))
    other = create_optimizer_v2(made(), "adamw")
    assert batch_muon(other) is other
    assert type(other) is not BatchedMuon


def test_a_state_goes_from_one_to_the_other(batches_on_a_cpu):
    models, (theirs, ours) = pair()
    trained(models[0], theirs)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    models[1].load_state_dict(models[0].state_dict())
    trained(models[1], ours)
    theirs.load_state_dict(ours.state_dict())
    trained(models[0], theirs)


def test_weights_without_gradient_stay(batches_on_a_cpu):
    model = made()
    optimizer = batch_muon(create_optimizer_v2(model, "muon", lr=0.02))
    model[2].weight.requires_grad_(False)
    before = model[2].weight.clone()
    trained(model, optimizer, steps=2)
    assert torch.equal(model[2].weight, before)


def test_the_recipe_takes_it(batches_on_a_cpu):
    model = timm.create_model("resnet18", num_classes=4)
    optimizer = make_optimizer(Optim(name="muon", lr=0.01), model)
    assert type(optimizer) is BatchedMuon
    before = model.layer3[1].conv1.weight.clone()
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.layer3[1].conv1.weight, before)
