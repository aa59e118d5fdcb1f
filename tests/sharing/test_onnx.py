"""ONNX files."""

import json
import sys

import pytest
import timm
import torch

from etf_zoo.errors import EtfZooError, ExportError, MissingPackageError
from etf_zoo.sharing import onnx
from etf_zoo.sharing.onnx import export_onnx
from tests.kinds import CLASSES, needs_onnx_exporter

SMALL = "mobilenetv3_small_050"


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@needs_onnx_exporter
@pytest.mark.parametrize("name", ["test_resnet", pytest.param(SMALL, marks=pytest.mark.slow)])
def test_onnx_has_our_logits(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = timm.create_model(f"{name}_etf", num_classes=CLASSES, feature_norm="batch", neck="mlp", reserve=2).eval()
    model.pretrained_cfg["label_names"] = [f"class {i}" for i in range(CLASSES)]
    session = onnxruntime.InferenceSession(str(export_onnx(model, tmp_path)), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = torch.randn(batch, *timm.data.resolve_data_config(model=model)["input_size"])
        (logits,) = session.run(["logits"], {"images": x.numpy()})
        assert logits.shape == (batch, CLASSES)  # none of the classes to come
        torch.testing.assert_close(torch.from_numpy(logits), model(x), atol=1e-4, rtol=1e-3)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["label_names"])[2] == "class 2"
    assert json.loads(metadata["mean"]) == list(model.pretrained_cfg["mean"])
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@needs_onnx_exporter
@pytest.mark.parametrize("output", ["logits", "features", "top_k"])
def test_a_kerdock_frame_is_not_stored_in_the_file(output, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    args = {"frame": "kerdock", "neck": "mlp", "neck_features": 300}  # a width that needs a rotation
    model = timm.create_model("test_resnet_etf", num_classes=60_000, **args).eval()
    file = export_onnx(model, tmp_path, output=output, k=3)
    assert file.stat().st_size < 10_000_000  # the frame is 72 MB
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    x = torch.randn(3, *timm.data.resolve_data_config(model=model)["input_size"])
    found = [torch.from_numpy(value) for value in session.run(None, {"images": x.numpy()})]
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    top = model.get_classifier().top_k(features, 3)
    expected = {"logits": [model(x)], "features": [features], "top_k": list(top)}[output]
    assert [value.name for value in session.get_outputs()] == (["logits", "classes"] if output == "top_k" else [output])
    for ours, theirs in zip(expected, found, strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-3)


def test_onnx_outputs_that_are_not_there(tmp_path):
    model = timm.create_model("test_resnet_etf", num_classes=5)
    with pytest.raises(EtfZooError, match=r"Unknown output 'boxes'. Choose one of logits, features, top_k"):
        export_onnx(model, tmp_path, output="boxes")
    with pytest.raises(EtfZooError, match="k lies between 1 and 5"):
        export_onnx(model, tmp_path, output="top_k", k=6)


def test_onnx_failures_are_one_line(monkeypatch, tmp_path):
    model = timm.create_model("test_resnet_etf", num_classes=5)

    def fail(*args, **kwargs):
        raise ValueError("no such operator\nand much more")

    monkeypatch.setattr(torch.onnx, "export", fail)
    monkeypatch.setattr(onnx, "_OLDEST_TORCH", (99, 0))
    with pytest.raises(ExportError, match=r"needs torch 99.0 or newer, not .*: pip install -U torch"):
        export_onnx(model, tmp_path / "out")
    monkeypatch.setattr(onnx, "_OLDEST_TORCH", (2, 6))
    with pytest.raises(RuntimeError, match=r"torch cannot export ResNet.* to ONNX: no such operator$"):
        export_onnx(model, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingPackageError, match="needs onnxscript: pip install"):
        export_onnx(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
