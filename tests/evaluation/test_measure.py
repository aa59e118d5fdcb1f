"""evaluate() on small models against plain figures from all logits and features at once."""

import json
import math

import pytest
import timm
import torch
from torch.nn import functional as F

import etf_zoo  # noqa: F401  registers the twins
from etf_zoo.evaluation.measure import evaluate, format_table, measure
from etf_zoo.metrics import MistakeSeverity, NeuralCollapse

K = 6


def data(n=50, batch=16):
    """Batches with a short last one, as a list."""
    g = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.arange(K), torch.randint(0, K, (n - K,), generator=g)])
    images = torch.randn(K, 3, 32, 32, generator=g)[labels] + 0.7 * torch.randn(n, 3, 32, 32, generator=g)
    return list(zip(images.split(batch), labels.split(batch), strict=True))


def build(name="test_resnet.r160_in1k", **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name.split(".")[0], num_classes=K, **kwargs).eval()


@torch.no_grad()
def outputs(model, batches):
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    hidden = model.forward_features(images)
    return model.forward_head(hidden, pre_logits=True), model(images), labels


def reference_calibration(logits, labels):
    confidence, predicted = logits.double().softmax(1).max(1)
    error = 0.0
    for b in range(15):
        inside = (confidence >= b / 15) & (confidence < (b + 1) / 15 if b < 14 else confidence <= 1)
        if inside.any():
            gap = (predicted == labels)[inside].double().mean() - confidence[inside].mean()
            error += inside.double().mean().item() * abs(gap.item())
    return 100 * error


@pytest.mark.parametrize("name", ["test_resnet", "test_resnet_etf", "test_vit_etf"])
def test_figures_are_those_of_all_samples_at_once(name):
    model, batches = build(name, **({"img_size": 32} if "vit" in name else {})), data()
    figures = evaluate(model, batches)
    features, logits, labels = outputs(model, batches)
    top = logits.argsort(1, descending=True)
    wanted = {
        "images": 50,
        "top1": 100 * (top[:, 0] == labels).double().mean().item(),
        "top5": 100 * (top[:, :5] == labels[:, None]).any(1).double().mean().item(),
        "loss": F.cross_entropy(logits.double(), labels).item(),
        "ece": reference_calibration(logits, labels),
    }
    collapse = NeuralCollapse(K, features.shape[1])
    collapse.update(features, labels)
    collapse.update_agreement(features, predictions=top[:, 0])
    head = model.get_classifier()
    wanted |= collapse.compute(head.weight, getattr(head, "bias", None))
    wanted.pop("samples")
    # batches of other sizes round other bits in the convolutions
    speed = figures.pop("images_per_second")
    assert speed > 0
    assert figures == pytest.approx(wanted, rel=2e-3, abs=1e-5)
    assert ("nc3_bias" in figures) == (name == "test_resnet")


def test_a_neck_moves_nc3_to_its_own_side():
    model, batches = build("test_resnet_etf", neck="mlp"), data()
    figures = evaluate(model, batches)
    features, _, labels = outputs(model, batches)
    head = model.get_classifier()
    assert "nc3_cosine" not in figures
    with torch.no_grad():
        embedded = head.embed(features)
    means = torch.stack([embedded[labels == c].double().mean(0) for c in range(K)])
    cosine = F.cosine_similarity(means - means.mean(0), head.weight.double()).mean().item()
    assert figures["nc3_cosine_after_neck"] == pytest.approx(cosine, abs=1e-4)
    backbone = NeuralCollapse(K, features.shape[1])
    backbone.update(features, labels)
    assert figures["nc1_quotient"] == pytest.approx(backbone.compute()["nc1_quotient"], rel=1e-3)


def test_severity_and_confusion():
    model, batches = build(), data()
    distances = torch.full((K, K), 2.0)
    distances[:3, :3] = distances[3:, 3:] = 1
    distances.fill_diagonal_(0)
    found = measure(model, batches, distances=distances, confusion=True)
    features, logits, labels = outputs(model, batches)
    severity = MistakeSeverity(distances)
    severity.update(logits, labels)
    wanted = {k: v for k, v in severity.compute().items() if not math.isnan(v)}
    assert {k: found.figures[k] for k in wanted} == pytest.approx(wanted, abs=1e-6)
    counts = torch.zeros(K, K, dtype=torch.int64)
    for label, guess in zip(labels, logits.argmax(1), strict=True):
        counts[label, guess] += 1
    assert torch.equal(found.confusion, counts)
    assert torch.equal(found.counts.long(), torch.bincount(labels, minlength=K))
    means = torch.stack([features[labels == c].double().mean(0) for c in range(K)])
    torch.testing.assert_close(found.class_means, means, rtol=1e-3, atol=1e-5)


def test_second_pass_agrees_with_stored_features():
    model, batches = build(), data()
    stored = evaluate(model, batches)
    twice = evaluate(model, batches, store_limit=0)
    stored.pop("images_per_second"), twice.pop("images_per_second")
    assert stored == twice
    assert "nc4_agreement" in twice


def test_collapse_is_exact_unless_asked_to_be_fast():
    model, batches = build(), data()
    exact, fast = evaluate(model, batches), evaluate(model, batches, fast=True)
    collapse = NeuralCollapse(K, model.num_features)
    with torch.no_grad():
        for images, labels in batches:
            collapse.update(model.forward_head(model.forward_features(images), pre_logits=True), labels)
    wanted = collapse.compute()["nc1_quotient"]
    assert exact["nc1_quotient"] == pytest.approx(wanted, rel=1e-12)
    assert fast["nc1_quotient"] == pytest.approx(wanted, rel=1e-5)
    assert fast["nc1_quotient"] != exact["nc1_quotient"]


def test_a_generator_that_does_not_fit_leaves_nc4_out_and_says_so():
    model = build()
    with pytest.warns(UserWarning, match="NC4 is left out"):
        figures = evaluate(model, iter(data()), store_limit=0)
    assert "nc4_agreement" not in figures
    assert "nc4_agreement" in evaluate(model, iter(data()))


class Two:
    """An accelerator of two processes that hold the same data."""

    num_processes, device = 2, torch.device("cpu")

    def reduce(self, tensor, reduction):
        return 2 * tensor


def test_one_class_alone_has_an_accuracy_and_no_collapse():
    model = build("test_resnet_etf")
    images, labels = (torch.cat(parts) for parts in zip(*data(), strict=True))
    batches = [(images[labels == 2], labels[labels == 2])]
    with pytest.warns(UserWarning, match="needs samples of two classes"):
        figures = evaluate(model, batches)
    _, logits, truth = outputs(model, batches)
    assert figures["top1"] == pytest.approx(100 * (logits.argmax(1) == truth).double().mean().item())
    assert (figures["classes"], figures["images"]) == (1, len(truth))
    assert not [name for name in figures if name.startswith("nc")]


def test_processes_are_summed():
    model, batches = build(), data()
    alone, both = evaluate(model, batches), evaluate(model, batches, processes=Two())
    assert both.pop("images") == 2 * alone.pop("images")
    alone.pop("images_per_second"), both.pop("images_per_second")
    assert both == pytest.approx(alone, rel=1e-9)


def test_the_mode_comes_back_and_weights_stay():
    model = build("test_resnet_etf").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    evaluate(model, data())
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_any_module_with_a_forward_of_its_own():
    model = torch.nn.Linear(12, K)
    x, y = torch.randn(40, 12), torch.arange(40) % K
    figures = evaluate(model, [(x[:30], y[:30]), (x[30:], y[30:])], forward=lambda m, x: (x, m(x)))
    assert figures["images"] == 40
    assert "nc3_cosine" not in figures


def test_errors_name_the_fix():
    with pytest.raises(ValueError, match="unwrap_model"):
        evaluate(torch.nn.Linear(3, 2), [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))])
    with pytest.raises(ValueError, match="no samples"):
        evaluate(build(), [])
    with pytest.raises(ValueError, match=r"0\.\.5, got 0 to 6"):
        evaluate(build(), [(torch.randn(2, 3, 32, 32), torch.tensor([0, 6]))])
    with pytest.raises(ValueError, match="Pass forward="):
        evaluate(build(), data(), forward=lambda m, x: (x, m(x)))


def test_figures_are_json_and_read_well():
    distances = 1 - torch.eye(K)
    figures = evaluate(build("test_resnet_etf", neck="mlp"), data(), distances=distances)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    table = format_table(figures | {"some_other": 1.5})
    lines = table.splitlines()
    assert len(lines) == len(figures) + 1
    assert len({len(line) for line in lines}) == 1
    assert "top-1 accuracy" in lines[1]
    assert "cosine class mean / prototype, after the neck" in table
    assert format_table({}) == ""
