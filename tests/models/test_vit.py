"""The vision transformer for 64 pixels, and its twin."""

import timm
import torch


def test_is_what_its_name_says():
    model = timm.create_model("vit_d256_patch8_gap_64").eval()
    assert model.pretrained_cfg["input_size"] == (3, 64, 64)
    assert model.forward_features(torch.randn(1, 3, 64, 64)).shape == (1, 64, 256)
    assert model.num_classes == 1000
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 7_435_752


def test_twin_takes_other_sizes():
    twin = timm.create_model("vit_d256_patch8_gap_64_etf", num_classes=200, dynamic_img_size=True).eval()
    assert twin.get_classifier().frame == "auto"
    assert twin(torch.randn(1, 3, 48, 48)).shape == (1, 200)


def test_weights_take_other_sizes():
    model = timm.create_model("vit_d256_patch8_gap_64_etf", pretrained=True, img_size=96).eval()
    assert model(torch.randn(1, 3, 96, 96)).shape == (1, 200)
