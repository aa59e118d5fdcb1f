"""What each method trains, and the head that it starts with."""

import pytest
import timm
import torch
from torch.nn import functional as F

from etf_zoo import frame_heads
from etf_zoo.trainer.tune.methods import (
    blocks,
    pick_layer,
    prepare,
    tuned_share,
    warm_frame,
    warm_head,
    warm_learned_head,
)
from etf_zoo.trainer.tune.probes import fit_probe


def make(name="test_resnet", **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **kwargs)
    for key, parameter in model.named_parameters():
        if ".bn" in key and key.endswith("weight"):
            torch.nn.init.ones_(parameter)  # timm starts blocks at zero, which then have no gradient yet
    return model


def changed_by_a_step(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    F.cross_entropy(model(x), torch.arange(4)).backward()
    optimizer.step()
    return {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}


@pytest.mark.parametrize("name", ["test_resnet", "test_resnet_etf"])
@pytest.mark.parametrize("method", ["full", "head", "layer", "scl"])
def test_only_what_is_meant_changes(name, method):
    if (name, method) == ("test_resnet_etf", "head"):
        model = prepare(make(name, neck="mlp"), method)
    else:
        model = prepare(make(name), method, "layer3.0" if method in ("layer", "scl") else "")
    head = {k for k in model.state_dict() if k.startswith("fc.") and k not in ("fc.logit_scale",)}
    head -= {"fc.weight"} if name.endswith("_etf") else set()
    layer = {k for k in model.state_dict() if k.startswith("layer3.0.")}
    changed = changed_by_a_step(model)
    if method == "full":
        assert changed >= head | layer | {"conv1.0.weight", "bn1.running_mean"}
        return
    assert changed - (layer if method != "head" else set()) == head  # frozen batch statistics are frozen too
    if method != "head":
        assert {"layer3.0.conv1.weight", "layer3.0.bn1.running_mean"} <= changed
    # evaluation and back leaves it so
    model.eval()
    model.train()
    assert not model.bn1.training
    assert model.layer3[0].bn1.training == (method != "head")


@pytest.mark.parametrize("method", ["full", "layer"])
def test_batch_statistics_that_are_kept(method):
    model = prepare(make("test_resnet_etf", neck="mlp"), method, "layer3.0" if method == "layer" else "", True)
    buffers = {name for name, _ in model.named_buffers() if "running_" in name}
    changed = changed_by_a_step(model)
    assert {"layer3.0.conv1.weight", "layer3.0.bn1.weight", "layer3.0.bn1.bias"} <= changed
    assert changed & buffers == {name for name in buffers if name.startswith("fc.neck.")} != set()  # which is new
    assert ("conv1.0.weight" in changed) == (method == "full")


def test_share_of_parameters():
    tuned, total = tuned_share(prepare(make(), "head"))
    assert (tuned, total) == (5 * 96 + 5, sum(p.numel() for p in make().parameters()))
    assert tuned_share(make("test_resnet_etf"))[0] == total - tuned  # a frame is no parameter


def test_blocks_and_the_default_layer():
    known = blocks(make())
    assert list(known)[-3:] == ["layer2.0", "layer3.0", "layer4.0"]
    model = make()
    total = sum(p.numel() for p in model.parameters())
    assert known["layer3.0"] == sum(p.numel() for p in model.layer3[0].parameters()) / total
    assert pick_layer(model) == next(name for name in reversed(known) if known[name] <= 0.1) == "layer2.0"
    assert pick_layer(model, "layer1") == "layer1"
    assert pick_layer(timm.create_model("vit_tiny_patch16_224")) == "blocks.10"
    assert "head" not in blocks(timm.create_model("convnext_atto"))  # the classifier's parent


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prepare(make(), "prompt"), "Unknown method 'prompt'. Choose one of full, head, layer, scl"),
        (lambda: prepare(make("test_resnet_etf"), "head"), "Nothing would train.*neck"),
        (lambda: prepare(make(), "layer", "layer7"), "no layer 'layer7' with parameters. Its blocks: .*layer3.0"),
        (lambda: prepare(make(), "layer", "act1"), "with parameters"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture
def positive():
    """Positive features with a large part in common, as pooled ReLU features are."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(100) % 5
    centers = torch.rand(5, 32, generator=generator) * torch.linspace(0.2, 1.0, 5)[:, None] + 1
    return centers[labels] + 0.1 * torch.rand(100, 32, generator=generator), labels


def test_warm_frame_knows_the_classes(positive):
    features, labels = positive
    frame = warm_frame(features, labels, list("abcde"))
    cosines = frame @ frame.T
    torch.testing.assert_close(cosines, torch.full((5, 5), -0.25).fill_diagonal_(1.0))
    unit = F.normalize(features, dim=1)
    assert (unit @ frame.T).argmax(1).eq(labels).float().mean() > 0.95
    means = torch.stack([unit[labels == k].mean(0) for k in range(5)])
    torch.testing.assert_close(frame @ F.normalize(means.mean(0), dim=0), torch.zeros(5), atol=1e-6, rtol=0)


def test_warm_head_replaces_the_frame(positive):
    features, labels = positive
    model = make("test_resnet_etf")
    wide = F.pad(features, (0, 96 - 32))
    warm_head(model, wide, labels, list("abcde"), {"feature_norm": "batch", "orientation": "blocks"})
    head = frame_heads(model)["fc"]
    torch.testing.assert_close(head.weight, warm_frame(wide, labels, list("abcde")))
    assert head.feature_norm == "batch"
    with pytest.raises(ValueError, match="take the neck out"):
        warm_head(make("test_resnet_etf", neck="mlp"), wide, labels, list("abcde"), {})
    with pytest.raises(ValueError, match="needs at least 4 dimensions"):
        warm_frame(features[:, :3], labels, list("abcde"))


def test_warm_learned_head_is_the_probe(positive):
    features, labels = positive
    wide = F.pad(features, (0, 96 - 32))
    model = make()
    chosen = warm_learned_head(model, wide, labels, list("abcde"), seed=1)
    probe = fit_probe("linear_probe", wide, labels, list("abcde"), seed=1)
    assert chosen == probe.chosen
    assert torch.equal(model.fc(wide).argmax(1), torch.from_numpy(probe.predict(wide.numpy())))
    torch.testing.assert_close(model.fc.weight, probe.linear[0])
    with pytest.raises(ValueError, match="more than one linear layer"):
        warm_learned_head(timm.create_model("levit_128s"), wide, labels, list("abcde"))
