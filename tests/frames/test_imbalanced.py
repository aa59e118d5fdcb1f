"""Imbalanced frames beside their optimality conditions and a numerical minimum, and what they are when balanced."""

import math

import pytest
import torch
from torch.nn import functional as F

from etf_zoo.errors import EtfZooError
from etf_zoo.frames import imbalanced_frame, seli_frame

COUNTS = [40, 17, 6, 2]
DECAYS = {"weight_decay": 2e-3, "feature_decay": 3e-4}


def objective(classifier, features, counts, weight_decay, feature_decay):
    """Written out image by image, features of a class being equal."""
    total = 0.0
    for k, n in enumerate(counts):
        logits = features[k] @ classifier.T
        total = total + n * (F.cross_entropy(logits, torch.tensor(k)) / sum(counts))
        total = total + n * feature_decay / 2 * features[k].square().sum()
    return total + weight_decay / 2 * classifier.square().sum()


def kkt_residual(classifier, features, counts, **decays):
    """Largest violation of the optimality conditions for features of at least zero."""
    w, h = (x.double().requires_grad_() for x in (classifier, features))
    gw, gh = torch.autograd.grad(objective(w, h, counts, **decays), (w, h))
    at_zero = h.detach() <= 0
    return max(gw.abs().max(), gh[~at_zero].abs().max(), (-gh[at_zero]).clamp_min(0).max()).item()


@pytest.mark.parametrize("counts", [COUNTS, [5, 5, 5], [500, 3], [1000, 100, 10, 10, 10]])
def test_optimality(counts):
    decays = {"weight_decay": 2e-4, "feature_decay": 3e-5} if max(counts) > 100 else DECAYS
    assert kkt_residual(*imbalanced_frame(counts, len(counts) + 3, **decays), counts, **decays) < 1e-7


def test_no_descent_from_a_random_start_ends_lower():
    torch.manual_seed(0)
    counts = [4.0, 2.0, 1.0]
    decays = {"weight_decay": 1e-2, "feature_decay": 1e-2}
    found = objective(*(x.double() for x in imbalanced_frame([4, 2, 1], 5, **decays)), counts, **decays).item()
    w = torch.randn(3, 5, dtype=torch.float64).requires_grad_()
    root = torch.rand(3, 5, dtype=torch.float64).requires_grad_()  # features are its squares, so never negative
    optimizer = torch.optim.LBFGS([w, root], max_iter=2000, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = objective(w, root.square(), counts, **decays)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert closure().item() == pytest.approx(found, abs=1e-8)


def test_balanced_is_a_simplex_on_orthogonal_features():
    classifier, features = imbalanced_frame([7] * 5, 12, **DECAYS)
    cosines = F.normalize(classifier, dim=1) @ F.normalize(classifier, dim=1).T
    torch.testing.assert_close(cosines, torch.eye(5) * 1.25 - 0.25, atol=1e-6, rtol=0)
    assert (features @ features.T - torch.diag(features.square().sum(1))).abs().max() == 0


def test_a_minority_class_collapses_exactly_at_the_threshold():
    counts = [60, 30, 10]
    product = 10 * 2 / (3 * 100**2)  # of the decays, at which q = 1/K for the class of 10
    for factor, collapses in ((1 - 1e-9, False), (1 + 1e-9, True)):
        root = math.sqrt(product * factor)
        _, features = imbalanced_frame(counts, 4, weight_decay=root, feature_decay=root)
        assert (features[2].norm() == 0) == collapses
        assert features[:2].norm(dim=1).min() > 0


def test_every_class_collapses():
    with pytest.raises(
        EtfZooError, match=r"all 3 classes collapse to zero\. Lower weight_decay \* feature_decay below"
    ):
        imbalanced_frame([3, 2, 1], 4, weight_decay=1.0, feature_decay=1.0)


def test_seli_beside_the_svd_of_all_labels():
    counts = [5, 3, 1]
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    encoded = F.one_hot(labels, 3).T.double() - 1 / 3
    v, s, u = torch.linalg.svd(encoded, full_matrices=False)
    classifier, features = seli_frame(counts, 6, seed=3)
    expected = (v[:, :2] * s[:2]) @ v[:, :2].T
    torch.testing.assert_close((classifier @ classifier.T).double(), expected, atol=1e-6, rtol=0)
    every = (u.T[:, :2] * s[:2]) @ u[:2]
    torch.testing.assert_close((features @ features.T).double()[labels][:, labels], every, atol=1e-6, rtol=0)
    torch.testing.assert_close(classifier @ features.T, torch.eye(3) - 1 / 3, atol=1e-6, rtol=0)


def test_seli_balanced_is_the_simplex():
    classifier, features = seli_frame([9] * 4, 3)
    cosines = F.normalize(classifier, dim=1) @ F.normalize(classifier, dim=1).T
    torch.testing.assert_close(cosines, torch.eye(4) * 4 / 3 - 1 / 3, atol=1e-6, rtol=0)
    torch.testing.assert_close(F.normalize(features, dim=1), F.normalize(classifier, dim=1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("counts", [[], [3], [3, 0], [3, -1], [3, math.nan], ["a", "b"], None, [[1, 2]]])
@pytest.mark.parametrize("frame", [lambda c: imbalanced_frame(c, 9, **DECAYS), lambda c: seli_frame(c, 9)])
def test_counts(counts, frame):
    with pytest.raises(EtfZooError, match=r"lass count|class_counts"):
        frame(counts)


@pytest.mark.parametrize("decays", [(0, 1e-3), (1e-3, -1), (math.inf, 1e-3), (1e-3, "a")])
def test_decays(decays):
    with pytest.raises(EtfZooError, match="decay must be positive"):
        imbalanced_frame(COUNTS, 9, weight_decay=decays[0], feature_decay=decays[1])


def test_room():
    with pytest.raises(EtfZooError, match="needs dim >= num_classes"):
        imbalanced_frame(COUNTS, 3, **DECAYS)
    with pytest.raises(EtfZooError, match="SELI frame of 4 classes needs at least 3 dimensions"):
        seli_frame(COUNTS, 2)
