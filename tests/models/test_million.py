"""Models of a million classes: no layer of a million rows is built on the way."""

import pytest
import timm
import torch
from torch import nn

import etf_zoo
from etf_zoo.losses import FrameCrossEntropy
from etf_zoo.sharing.folder import save_folder

K = 1_050_624
ARGS = {"frame": "kerdock", "neck": "mlp", "neck_features": 1024}


@pytest.fixture
def no_wide_layers(monkeypatch):
    original = nn.Linear.__init__

    def checked(self, in_features, out_features, *args, **kwargs):
        assert out_features < 10_000
        original(self, in_features, out_features, *args, **kwargs)

    monkeypatch.setattr(nn.Linear, "__init__", checked)


@pytest.mark.usefixtures("no_wide_layers")
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
def test_created_attached_and_reset(name):
    created = timm.create_model(f"{name}_etf", num_classes=K, **ARGS)
    attached = etf_zoo.attach_frame(timm.create_model(name), K, **ARGS)
    was_small = timm.create_model(f"{name}_etf", num_classes=9, **ARGS)
    was_small.reset_classifier(K)
    for model in (created, attached, was_small):
        head = model.get_classifier()
        assert model.num_classes == head.num_classes == K
        assert head.implicit
        assert not any(getattr(module, "num_classes", K) == 7919 for module in model.modules())
    created.reset_classifier(9)
    assert created.num_classes == created.get_classifier().num_classes == 9


@pytest.mark.usefixtures("no_wide_layers")
def test_saved_and_loaded(tmp_path):
    model = timm.create_model("test_resnet_etf", num_classes=K, **ARGS).eval()
    save_folder(model, tmp_path, half=False)
    assert (tmp_path / "model.safetensors").stat().st_size < 20_000_000
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    features = torch.randn(2, model.num_features)
    ours, theirs = (m.get_classifier().top_k(features, 3) for m in (model, again))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert again.num_classes == K
    loss = FrameCrossEntropy(again.get_classifier())(features, torch.tensor([5, K - 1]))
    assert 10 < loss.item() < 60
