"""HAFrame's mixed loss beside a plain loop; at its optimum features have their prototype's cosines."""

import math

import pytest
import torch
from torch.nn import functional as F

from etf_zoo.frames import Hierarchy, hierarchy_cosines, hierarchy_frame
from etf_zoo.losses import HierarchyCosineLoss

TREE = Hierarchy({"a": "ab", "b": "ab", "c": "cd", "d": "cd", "ab": "root", "cd": "root"})
DISTANCES = TREE.distances(list("abcd"))
FRAME = hierarchy_frame(DISTANCES, 6, gamma=2.0).double()
LABELS = torch.tensor([0, 2, 1, 3, 3])


def features(rows=5):
    return 2 * torch.randn(rows, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(("alpha", "scale"), [(0.0, 1.0), (1.0, 1.0), (0.4, 1.0), (0.7, 12.0)])
def test_matches_a_plain_loop(alpha, scale):
    x, cosines = features(), hierarchy_cosines(DISTANCES, gamma=2.0)[0]
    total = 0.0
    for row, label in zip(x, LABELS.tolist(), strict=True):
        logits = [scale * float(row @ w) for w in FRAME]
        entropy = math.log(sum(math.exp(v) for v in logits)) - logits[label]
        length = math.sqrt(float(row @ row))
        squares = sum((float(row @ FRAME[c]) / length - float(cosines[label, c])) ** 2 for c in range(4))
        total += (1 - alpha) * entropy + alpha * squares
    value = HierarchyCosineLoss(alpha, logit_scale=scale)(x, LABELS, FRAME).item()
    assert math.isclose(value, total / 5, rel_tol=1e-5)


def test_free_features_take_their_prototypes_cosines():
    labels, frame = torch.arange(4).repeat(5), hierarchy_frame(DISTANCES, 3, gamma=2.0).double()
    x = features(20)[:, :3].clone().requires_grad_()
    loss = HierarchyCosineLoss(1.0)
    optimizer = torch.optim.LBFGS([x], max_iter=300, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(x, labels, frame)
        value.backward()
        return value

    optimizer.step(closure)
    unit = F.normalize(x.detach(), dim=1)
    wanted = hierarchy_cosines(DISTANCES, gamma=2.0)[0]
    assert torch.allclose(unit @ unit.T, wanted[labels][:, labels], atol=1e-4)


@pytest.mark.parametrize(("kwargs", "message"), [({"alpha": 1.1}, "alpha"), ({"logit_scale": 0.0}, "logit_scale")])
def test_option_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        HierarchyCosineLoss(**kwargs)


def test_tiny_half_precision_features_keep_a_finite_gradient():
    x = (1e-4 * F.normalize(features())).half().requires_grad_()
    HierarchyCosineLoss(0.5)(x, LABELS, FRAME.float()).backward()
    assert 0 < x.grad.abs().max() < 10  # not that of cosines over so short a length
