"""Classifiers on frozen features."""

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from etf_zoo.trainer.data.batches import Split
from etf_zoo.trainer.tune.probes import (
    PROBES,
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
        assert probe.tuned == len(names) * 9
    if probe.prototypes is not None:
        torch.testing.assert_close(probe.prototypes.norm(dim=1), torch.ones(len(names)))
        assert (F.normalize(test, dim=1) @ probe.prototypes.T).argmax(1).tolist() == predicted.tolist()
        assert probe.logit_scale > 1


def test_folded_probabilities_of_two_classes():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(40, 3, generator=generator) * 4 + 1, torch.arange(40) % 2
    features[:, 0] += labels
    probe = fit_probe("linear_probe", features, labels, ["a", "b"], strength=1.0)
    fitted = probe.predict.__self__
    ours = F.linear(features, *probe.linear).softmax(1).numpy()
    np.testing.assert_allclose(ours, fitted.predict_proba(features.numpy()), atol=1e-5)


def test_class_unseen_is_never_predicted():
    features, labels = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2
    weight, bias = fit_probe("linear_probe", features, labels, list("abc"), strength=1.0).linear
    assert not F.linear(features, weight, bias).argmax(1).eq(2).any()
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
