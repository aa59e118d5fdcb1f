"""Classifiers on frozen features."""

import numpy as np
import pytest
import timm
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn import functional as F

from etf_zoo.errors import EtfZooError
from etf_zoo.trainer.data.batches import Split
from etf_zoo.trainer.data.near_duplicates import grouped_folds, near_duplicates
from etf_zoo.trainer.data.subsets import load_images
from etf_zoo.trainer.recipe.config import Data
from etf_zoo.trainer.tune import probes
from etf_zoo.trainer.tune.probes import (
    PROBES,
    _votes,
    backbone_features,
    backbone_size,
    class_means,
    fit_probe,
    linear_classifier,
)


@pytest.fixture(params=[2, 4])
def blobs(request):
    """Features around class centers, far from the origin and of unequal spread, some to fit and some to test."""
    k = request.param
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60 * k) % k
    centers = torch.randn(k, 8, generator=generator) * 2
    features = centers[labels] + torch.randn(60 * k, 8, generator=generator) * torch.linspace(0.3, 1.5, 8) + 5
    half = 30 * k
    return features[:half], labels[:half], features[half:], labels[half:], [str(i) for i in range(k)]


@pytest.mark.parametrize("method", PROBES)
def test_probes_classify(method, blobs):
    features, labels, test, truth, names = blobs
    probe = fit_probe(method, features, labels, names)
    predicted = probe.predict(test.numpy())
    assert (predicted == truth.numpy()).mean() > 0.85
    assert fit_probe(method, features, labels, names).chosen == probe.chosen
    if probe.linear is not None:  # on raw features, the standardization folded in
        weight, bias = probe.linear
        assert (F.linear(test, weight, bias).argmax(1).numpy() == predicted).all()
        assert probe.tuned == len(names) * (9 if method == "linear_probe" else 8)
    if probe.prototypes is not None:
        torch.testing.assert_close(probe.prototypes.norm(dim=1), torch.ones(len(names)))
        assert (F.normalize(test, dim=1) @ probe.prototypes.T).argmax(1).tolist() == predicted.tolist()
        assert probe.logit_scale > 1


@pytest.mark.parametrize("k", [2, 3])
def test_folded_probabilities_are_those_of_scikit_learn(k):
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(60, 4, generator=generator) * 4 + 1, torch.arange(60) % k
    features[:, 0] += labels
    features[:, 3] = 7.3  # constant
    probe = fit_probe("linear_probe", features, labels, list("abc")[:k], strength=1.0)
    x = StandardScaler().fit_transform(features.double().numpy())
    peer = LogisticRegression(C=2.0 if k == 2 else 1.0, tol=1e-10, max_iter=10_000).fit(x, labels.numpy())
    ours = F.linear(features, *probe.linear).softmax(1).numpy()
    np.testing.assert_allclose(ours, peer.predict_proba(x), atol=1e-4)
    assert probe.details["gradient_norm"] <= 1e-6


def test_a_linear_probe_chooses_what_a_search_by_hand_does(blobs):
    features, labels, _, _, names = blobs
    groups = np.arange(len(labels)) // (2 * len(names))
    x = features.double().numpy()
    scores = {}
    for scaling in ("whole", "each"):
        centered = x - x.mean(0)
        scaled = centered / (centered.std(0) if scaling == "each" else np.sqrt((centered**2).mean()))
        for power in range(-4, 3):
            right = 0
            for fit, judged in grouped_folds(labels.numpy(), groups, 3, 1):
                c = 10.0**power * (2 if len(names) == 2 else 1)
                peer = LogisticRegression(C=c, tol=1e-8, max_iter=10_000).fit(scaled[fit], labels[fit].numpy())
                right += (peer.predict(scaled[judged]) == labels[judged].numpy()).sum()
            scores[scaling, 10.0**power] = 100 * right / len(labels)
    found = fit_probe("linear_probe", features, labels, names, seed=1, groups=groups).details
    assert scores[found["scaling"], found["C"]] == pytest.approx(found["cv_top1"])
    assert found["cv_top1"] == pytest.approx(max(scores.values()))


def test_weak_penalties_are_not_tried_once_accuracy_has_fallen(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 3
    features = 0.5 * F.one_hot(labels, 200) + torch.randn(600, 200, generator=generator)  # weak signs, overfitted soon
    asked = []

    def watched(x, own, num_classes, strengths):
        for strength, point in zip(strengths, rough_path(x, own, num_classes, strengths), strict=True):
            asked.append(strength)
            yield point

    rough_path = probes.rough_path
    monkeypatch.setattr(probes, "rough_path", watched)
    monkeypatch.setattr(probes, "FALLEN", 2.0)
    early = fit_probe("linear_probe", features, labels, list("abc"), groups=np.arange(600)).details
    tried = set(asked)
    monkeypatch.setattr(probes, "FALLEN", 100.0)
    late = fit_probe("linear_probe", features, labels, list("abc"), groups=np.arange(600)).details
    assert tried < set(asked) == set(probes.STRENGTHS)
    assert {**early, "steps": 0, "gradient_norm": 0} == {**late, "steps": 0, "gradient_norm": 0}


@pytest.mark.parametrize("k", [1, 5, 20])
def test_neighbors_are_those_of_scikit_learn(k, blobs):
    features, labels, test, _, _ = blobs
    ours = torch.cat([guesses[:, 1] for _, guesses in _votes(test, features, labels, 4, [max(1, k // 2), k])])
    peer = KNeighborsClassifier(k, metric="cosine", weights="distance").fit(features.double(), labels)
    assert (ours.numpy() == peer.predict(test.double())).mean() >= 0.99  # cosines in single precision may tie


def test_series_do_not_flatter_neighbors():
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(90) % 3).repeat_interleave(4)  # 90 objects, four pictures of each
    objects = torch.randn(90, 16, generator=generator) + 1.5 * F.one_hot(labels[::4], 16) + 3
    features = objects.repeat_interleave(4, 0) + 0.02 * torch.randn(360, 16, generator=generator)
    assert len(np.unique(near_duplicates(features))) == 90
    grouped = fit_probe("knn", features, labels, list("abc")).details
    leaking = fit_probe("knn", features, labels, list("abc"), groups=np.arange(360)).details
    assert leaking["cv_top1"] > 97
    assert grouped["cv_top1"] < 90
    assert grouped["k"] >= 10


def test_nearest_mean_by_euclid(blobs):
    features, labels, test, _, names = blobs
    probe = fit_probe("ncm_euclid", features, labels, names)
    means = np.stack([features[labels == i].numpy().mean(0) for i in range(len(names))])
    nearest = ((test.numpy()[:, None] - means) ** 2).sum(-1).argmin(1)
    assert (probe.predict(test.numpy()) == nearest).all()
    assert (F.linear(test, *probe.linear).argmax(1).numpy() == nearest).all()


def test_a_choice_cannot_open_the_test(monkeypatch, blobs):
    features, labels, _, _, names = blobs

    def peeking(*args):
        return load_images(Data(source="digits", size=8, val_split="test"), "test")

    assert len(peeking())
    monkeypatch.setattr("etf_zoo.trainer.tune.probes.grouped_folds", peeking)
    for method in ("linear_probe", "knn"):
        with pytest.raises(EtfZooError, match="asked for while something is chosen"):
            fit_probe(method, features, labels, names)


def test_class_unseen_is_never_predicted():
    features, labels = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2
    weight, bias = fit_probe("linear_probe", features, labels, list("abc"), strength=1.0).linear
    far = 1000 * torch.randn(500, 4, generator=torch.Generator().manual_seed(1))
    assert not F.linear(torch.cat([features, far]), weight, bias).argmax(1).eq(2).any()
    with pytest.raises(ValueError, match="No training image of c"):
        fit_probe("ncm", features, labels, list("abc"))


def test_class_means():
    features = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 0.0]])
    means = class_means(features, torch.tensor([1, 1, 0]), ["a", "b"])
    assert means.tolist() == [[5.0, 0.0], [2.0, 3.0]]


def test_features_are_before_the_neck():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet_etf", num_classes=3, neck="mlp")
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    split = Split(images, np.arange(5) % 3, list("abc"), "made up")
    features = backbone_features(model, split, size=32, batch_size=2)
    assert features.shape == (5, model.num_features)
    assert torch.equal(features, backbone_features(model, split, size=32, batch_size=2))  # in evaluation mode
    torch.testing.assert_close(features, backbone_features(model, split, size=32))


@pytest.mark.parametrize(
    ("name", "widths"),  # of the layers that classify
    [
        ("resnet10t", [512]),
        ("dla34", [512]),  # a 1x1 convolution
        ("deit_tiny_distilled_patch16_224", [192, 192]),
        ("levit_128s", [384, 384]),  # each behind a norm
        ("repvit_m0_9", [384, 384]),
        ("crossvit_tiny_240", [96, 192]),
        ("caformer_s18", [2048]),  # behind an MLP
    ],
)
def test_classifiers_of_all_kinds(name, widths):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=7)
    total = sum(p.numel() for p in model.parameters())
    assert backbone_size(model) == total - sum(7 * width + 7 for width in widths)
    layer = linear_classifier(model)
    if name in ("resnet10t", "dla34"):
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        assert layer.weight.shape[:2] == (7, 512)
    else:
        assert layer is None


@pytest.mark.parametrize(
    ("method", "labels", "message"),
    [
        ("svm", [0, 1, 0, 1], "Unknown probe 'svm'"),
        ("ncm", [0, 0, 0, 0], "of one class"),
        ("linear_probe", [0, 1, 1, 1], "single training image"),
        ("knn", [0, 1, 1, 1], "single training image"),
    ],
)
def test_errors(method, labels, message):
    with pytest.raises(ValueError, match=message):
        fit_probe(method, torch.randn(4, 2), torch.tensor(labels), ["a", "b"])
