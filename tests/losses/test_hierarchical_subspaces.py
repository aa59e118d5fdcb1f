"""The loss of Hier-COS beside plain loops; features on the path of their class are where it ends."""

import math

import pytest
import torch

from etf_zoo.errors import EtfZooError
from etf_zoo.frames import Hierarchy, hierarchical_subspaces, simplex_etf
from etf_zoo.losses import LOSSES, HierarchicalSubspaceLoss

TREE = Hierarchy({"a": "ab", "b": "ab", "c": "cd", "d": "cd", "ab": "root", "cd": "root", "e": "root"})
FRAME = hierarchical_subspaces(TREE.distances(list("abcde")), 8).double()  # 5 leaves, 2 nodes above, one axis unused
LABELS = torch.tensor([0, 4, 1, 3, 4, 2])


def features(rows=6):
    return 2 * torch.randn(rows, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def slow(x, labels, alpha):
    levels = {1: range(5), 2: range(5, 7)}
    divergence, terms = 0.0, {(level, kind): [] for level in levels for kind in ("on", "off")}
    for row, label in zip(x.abs().tolist(), labels.tolist(), strict=True):
        path = [n for n in range(7) if FRAME[label, n] > 0]
        weights = {n: math.exp(1 / (i + 1)) ** 2 for i, n in enumerate(path)}
        log_sum = math.log(sum(math.exp(v) for v in row[:7]))
        for node in path:
            p = weights[node] / sum(weights.values())
            divergence += p * (math.log(p) - (row[node] - log_sum))
        for level, nodes in levels.items():
            length = math.sqrt(sum(row[n] ** 2 for n in nodes))
            if any(n in path for n in nodes):
                terms[level, "on"].append(sum(abs(row[n] / length - (n in path)) for n in nodes))
            else:
                terms[level, "off"].append(sum(row[n] for n in nodes))
    return divergence / len(x) + alpha * sum(sum(v) / len(v) for v in terms.values() if v)


@pytest.mark.parametrize("alpha", [0.0, 0.05, 1.0])
def test_matches_plain_loops(alpha):
    value = HierarchicalSubspaceLoss(alpha)(features(), LABELS, FRAME).item()
    assert math.isclose(value, slow(features(), LABELS, alpha), rel_tol=1e-6)
    assert LOSSES["hierarchical_subspaces"] is HierarchicalSubspaceLoss


def test_gradient():
    x = features().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: HierarchicalSubspaceLoss(0.3)(x, LABELS, FRAME), (x,))


def test_free_features_end_on_their_paths():
    labels = torch.arange(5)
    x = features(5).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        HierarchicalSubspaceLoss(0.05)(x, labels, FRAME).backward()
        optimizer.step()
    on_path = (FRAME > 0).double()
    own = x.detach().square() @ on_path.T
    assert torch.equal(own.argmax(1), labels)
    leaf_and_parent = own[:4].diagonal() / x.detach()[:4, :7].square().sum(1)
    assert bool((leaf_and_parent > 0.95).all())


def deep_tree():
    """Ten nodes in a chain, each with ten classes of its own: paths of one to ten nodes."""
    parents, above = {}, "root"
    for depth in range(10):
        parents |= {f"{depth}_{i}": above for i in range(10)}
        if depth < 9:
            parents[f"node{depth}"] = above
            above = f"node{depth}"
    distances = Hierarchy(parents).distances([name for name in parents if "_" in name])
    return hierarchical_subspaces(distances, 109)


@pytest.mark.parametrize(("args", "stays"), [((), True), ((0.05,), False)])  # 0.05 is CIFAR-100's
def test_at_the_default_alpha_a_deep_tree_keeps_the_target_of_unsure_features(args, stays):
    """One feature for all classes, as before anything is learned: it belongs at the mean of their targets."""
    frame, loss = deep_tree(), HierarchicalSubspaceLoss(*args)
    x = (1 + 0.2 * torch.rand(1, 109, generator=torch.Generator().manual_seed(1))).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        loss(x.expand(100, -1), torch.arange(100), frame).backward()
        optimizer.step()
    away = 0.5 * (x.detach().abs().softmax(1)[0] - frame.square().mean(0)).abs().sum()
    assert bool(away < 0.05) if stays else bool(away > 0.2)


def test_sign_and_unused_axes_do_not_count():
    loss, x = HierarchicalSubspaceLoss(), features()
    assert torch.equal(loss(x, LABELS, FRAME), loss(-x, LABELS, FRAME))
    moved = x.clone()
    moved[:, 7] += 100
    assert torch.equal(loss(x, LABELS, FRAME), loss(moved, LABELS, FRAME))


def test_errors():
    with pytest.raises(EtfZooError, match="alpha"):
        HierarchicalSubspaceLoss(-1)
    with pytest.raises(EtfZooError, match="frame='subspaces'"):
        HierarchicalSubspaceLoss()(features(), LABELS, simplex_etf(5, 8))
    with pytest.raises(EtfZooError, match="class numbers"):
        HierarchicalSubspaceLoss()(features(), LABELS.double(), FRAME)
