"""Skip-connection models: against a plain forward pass, and through a folder."""

import copy
import json

import pytest
import timm
import torch

import etf_zoo
from etf_zoo.models.skip import pooled_to_width
from etf_zoo.sharing.folder import save_folder


def model(name="test_resnet", **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **kwargs).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def stages(plain, x):
    x = plain.maxpool(plain.act1(plain.bn1(plain.conv1(x))))
    outputs = {}
    for name in ("layer1", "layer2", "layer3", "layer4"):
        x = outputs[name] = getattr(plain, name)(x)
    return outputs


@pytest.mark.parametrize("name", ["test_resnet", "test_resnet_etf"])
@pytest.mark.parametrize(("layer", "width"), [("layer2", 48), ("layer3", 192)])  # padded to 96, cut to 96
def test_against_a_plain_forward_pass(name, layer, width, images):
    plain = model(name)
    outputs = stages(plain, images)
    skip, feature = outputs[layer].mean((2, 3)), outputs["layer4"].mean((2, 3))
    assert (skip.shape[1], feature.shape[1]) == (width, 96)
    expected = feature.clone()
    for i in range(min(width, 96)):
        expected[:, i] += skip[:, i]
    skipped = etf_zoo.add_skip(copy.deepcopy(plain), layer)
    hidden = skipped.forward_features(images)
    torch.testing.assert_close(skipped.forward_head(hidden, pre_logits=True), expected)
    torch.testing.assert_close(skipped(images), plain.fc(expected))
    torch.testing.assert_close(skipped.forward_head(hidden), skipped(images))
    assert skipped.state_dict().keys() == plain.state_dict().keys()


def test_class_token_and_mean_of_tokens():
    vit = model("test_vit", img_size=32)
    tokens = torch.randn(2, 1 + 4, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(pooled_to_width(tokens, 6, vit), tokens[:, 0])
    vit.global_pool = "avg"
    torch.testing.assert_close(pooled_to_width(tokens, 6, vit), tokens[:, 1:].mean(1))
    vit.output_fmt = "NHWC"
    grid = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(pooled_to_width(grid, 5, vit), grid.mean((1, 2)))
    flat = torch.randn(2, 3)
    assert pooled_to_width(flat, 5, vit)[:, 3:].eq(0).all()


@pytest.mark.parametrize("name", ["test_resnet", "test_resnet_etf", "test_vit"])
def test_through_a_folder(name, images, tmp_path):
    size = {"img_size": 64} if name == "test_vit" else {}
    layer = "blocks.0" if name == "test_vit" else "layer3.0"
    skipped = etf_zoo.add_skip(model(name, **size), layer)
    folder = save_folder(skipped, tmp_path / "model", label_names=list("abcde"))
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "skip_connection"
    assert config["model_args"]["base"] == name
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    torch.testing.assert_close(loaded(images), skipped(images), atol=2e-2, rtol=2e-2)  # stored in float16
    again = save_folder(loaded, tmp_path / "again", label_names=list("abcde"))  # what was loaded can be saved
    twice = timm.create_model(f"local-dir:{again}", pretrained=True).eval()
    assert torch.equal(twice(images), loaded(images))
    assert timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7)(images).shape == (2, 7)


def test_copies_and_gradients(images):
    skipped = etf_zoo.add_skip(model(), "layer3.0")
    copied = copy.deepcopy(skipped)
    assert torch.equal(copied(images), skipped(images))
    copied(images).sum().backward()
    assert copied.layer3[0].conv1.weight.grad is not None
    assert skipped.layer3[0].conv1.weight.grad is None


@pytest.mark.parametrize(
    ("name", "layer", "message"),
    [
        ("test_resnet", "layer9", "no layer 'layer9'"),
        ("test_resnet", "", "no layer"),
        ("deit_tiny_distilled_patch16_224", "blocks.0", "one linear or fixed-frame classifier"),
    ],
)
def test_errors(name, layer, message):
    with pytest.raises(ValueError, match=message):
        etf_zoo.add_skip(model(name), layer)


def test_more_errors(images):
    skipped = etf_zoo.add_skip(model(), "layer3.0")
    with pytest.raises(ValueError, match=r"from 'layer3\.0' already"):
        etf_zoo.add_skip(skipped, "layer2.0")
    with pytest.raises(ValueError, match="gives no tensor"):  # runs in forward_head
        etf_zoo.add_skip(model(), "global_pool")(images)
    with pytest.raises(ValueError, match="needs base and layer"):
        timm.create_model("skip_connection")
