"""Twins folded for stock timm."""

import json
import os
import subprocess
import sys

import pytest
import timm
import torch

import etf_zoo
from etf_zoo import FrameClassifier, convert_classifier
from etf_zoo.errors import LoadError
from etf_zoo.sharing import plain
from etf_zoo.sharing.plain import export_plain, fold_head
from tests.kinds import build, images, shared


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def in_process(monkeypatch):
    """Load folders here, where many are: a process of its own takes seconds."""
    monkeypatch.setattr(plain, "_logits_in_stock_timm", lambda folder, images: load(folder)(images))


def load(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def assert_same_softmax(ours, theirs):
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("norm", ["l2", "batch", "none"])
@pytest.mark.parametrize("channels_first", [False, True])
def test_folded_head_ranks_as_the_head(norm, channels_first):
    torch.manual_seed(0)
    head = FrameClassifier(8, 6, feature_norm=norm, logit_scale=3.0, channels_first=channels_first).eval()
    if head.norm is not None:
        head.norm.bn.running_mean.normal_()
        head.norm.bn.running_var.uniform_(0.5, 2)
    x = torch.randn(5, 8, 1, 1) if channels_first else torch.randn(5, 8)
    ours, plain = head(x).flatten(1), fold_head(head)(x).flatten(1)
    lengths = plain.norm(dim=1) / ours.norm(dim=1)
    torch.testing.assert_close(plain, ours * lengths[:, None], atol=1e-5, rtol=1e-4)
    assert torch.allclose(lengths, torch.ones(5), atol=1e-5) == (norm == "none")


LOAD = """
import sys, timm, torch
model = timm.create_model(f"local-dir:{sys.argv[1]}", pretrained=True).eval()
assert "etf_zoo" not in sys.modules
assert "Frame" not in str(model) and not type(model).__name__.endswith("ETF")
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])), sys.argv[3])
"""


def stock_timm(folder, x, tmp_path):
    """Logits of a folder's model in a process without this package."""
    torch.save(x, tmp_path / "x.pt")
    command = [sys.executable, "-c", LOAD, str(folder), str(tmp_path / "x.pt"), str(tmp_path / "y.pt")]
    subprocess.run(command, check=True, cwd="/", env={**os.environ, "PYTHONPATH": ""})
    return torch.load(tmp_path / "y.pt")


def test_plain_checkpoint_loads_in_stock_timm(tmp_path):
    twin = timm.create_model("mobilenetv3_small_100_etf", pretrained=True).eval()
    assert not export_plain(twin, tmp_path / "out")
    x = torch.randn(16, *twin.pretrained_cfg["input_size"])
    ours, theirs = twin(x), stock_timm(tmp_path / "out", x, tmp_path)
    assert torch.equal(theirs.argmax(1), ours.argmax(1))
    torch.testing.assert_close(
        theirs / theirs.norm(dim=1, keepdim=True), ours / ours.norm(dim=1, keepdim=True), atol=1e-4, rtol=1e-3
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == "mobilenetv3_small_100"
    assert config["label_names"] == list(twin.pretrained_cfg["label_names"])
    assert config["pretrained_cfg"]["description"].endswith("folded into a linear classifier")
    assert not {"frame", "neck", "orientation"} & config.get("model_args", {}).keys()
    assert isinstance(twin.classifier, FrameClassifier)  # the model itself is left alone


ONE_HEAD = ["linear", "conv", pytest.param("mlp", marks=pytest.mark.slow), "norm_linear"]


@pytest.mark.parametrize("kind", ONE_HEAD)
def test_plain_form_of_every_kind_of_head(kind, tmp_path, in_process):
    twin, base = build(kind), shared(kind, twin=False)
    assert not export_plain(twin, tmp_path)
    plain, x = load(tmp_path), images(kind)
    assert type(plain) is type(base)
    assert plain.state_dict().keys() == base.state_dict().keys()
    assert torch.equal(plain(x).argmax(1), twin(x).argmax(1))


@pytest.mark.parametrize(
    "kind", ["pair", "norm_linear_pair", pytest.param("list_by_stage", marks=pytest.mark.slow), "aux"]
)
def test_plain_form_of_several_heads(kind, tmp_path, in_process):
    with pytest.raises(ValueError, match=r"has \d heads, each on features of length one.*--format onnx"):
        export_plain(build(kind), tmp_path / "l2")
    base = build(kind, twin=False)
    x = images(kind)
    expected = base(x)
    assert export_plain(convert_classifier(base), tmp_path / "exact")
    plain = load(tmp_path / "exact")
    assert type(plain) is type(shared(kind, twin=False))
    assert_same_softmax(plain(x), expected)


def changed_twin():
    twin = timm.create_model("test_resnet_etf", num_classes=5)
    twin.layer4[0].bn1 = torch.nn.GroupNorm(1, twin.layer4[0].bn1.num_features)
    return twin


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: timm.create_model("resnet10t_etf", num_classes=5, neck="mlp"), "neck is not linear.*--format onnx"),
        (lambda: timm.create_model("resnet10t_etf", num_classes=5, whitening=True), "no whitening layer"),
        (lambda: timm.create_model("resnet10t", num_classes=5), "no fixed frame; it is a plain model already"),
        (lambda: etf_zoo.add_skip(timm.create_model("test_resnet_etf"), "layer3.0"), "timm has no skip connection"),
        (lambda: timm.create_model("vit_d256_patch8_gap_64_etf", depth=1), "timm itself has no architecture 'vit_d256"),
        (changed_twin, "its layers were changed after it was created"),
    ],
)
def test_what_has_no_plain_form(model, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_plain(model(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_stock_timm_cannot_open_is_said(tmp_path, monkeypatch):
    """The check runs without this package: a folder of a model of ours fails, though it loads here."""
    twin = timm.create_model("test_resnet_etf", num_classes=5).eval()
    monkeypatch.setattr(plain, "_rebuild", lambda model: etf_zoo.add_skip(model, "layer3.0"))
    with pytest.raises(LoadError, match=r"Stock timm cannot open .*Unknown model \(skip_connection\)"):
        export_plain(twin, tmp_path)
    assert load(tmp_path)(torch.randn(1, 3, 64, 64)).shape == (1, 5)


def test_plain_form_keeps_the_arguments_of_the_base(tmp_path, in_process):
    twin = timm.create_model("test_vit_etf", num_classes=5, img_size=64, in_chans=1, global_pool="avg").eval()
    export_plain(twin, tmp_path)
    again, x = load(tmp_path), torch.randn(8, 1, 64, 64)
    assert (again.global_pool, again.patch_embed.img_size) == ("avg", (64, 64))
    assert torch.equal(again(x).argmax(1), twin(x).argmax(1))
