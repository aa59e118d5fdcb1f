"""Checkpoints converted to folders, twins folded for stock timm, ONNX files."""

import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import ModelCard
from torch import nn

from etf_zoo import FrameClassifier, convert_classifier
from etf_zoo.errors import MissingPackageError
from etf_zoo.frames import nearest_simplex_etf
from etf_zoo.sharing.export import convert_checkpoint, export_onnx, export_plain, fold_head, load_learned
from etf_zoo.sharing.folder import save_folder
from tests.kinds import CLASSES, build, images, shared

SMALL = "mobilenetv3_small_050"


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def learned():
    torch.manual_seed(0)
    model = timm.create_model(SMALL, num_classes=5).eval()
    nn.init.normal_(model.classifier.bias)
    return model


@pytest.fixture
def learned_folder(learned, tmp_path):
    cfg = {"input_size": (3, 32, 32), "license": "cc-by-4.0", "tag": "ours"}
    return save_folder(learned, tmp_path / "learned", pretrained_cfg=cfg, label_names=list("abcde"), half=False)


def data(model):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, 32, 32, generator=generator), torch.arange(4)) for _ in range(2)]


def load(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def assert_same_softmax(ours, theirs):
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), atol=1e-5, rtol=0)


# -------------------------------------------------------------------------------------------------------------- convert


@pytest.mark.parametrize("source", ["folder", "file beside its config", "bare file", "local-dir"])
def test_converted_from_files(source, learned, learned_folder, tmp_path):
    out, x = tmp_path / "out", torch.randn(2, 3, 32, 32)
    weights = learned_folder / "model.safetensors"
    if source == "bare file":
        weights = weights.rename(tmp_path / "weights.safetensors")
    name = {"folder": learned_folder, "local-dir": f"local-dir:{learned_folder}"}.get(source, weights)
    convert_checkpoint(str(name), out, architecture=SMALL if source == "bare file" else None)
    twin = load(out)
    assert_same_softmax(twin(x), learned(x))
    assert twin.classifier.frame == "helmert"
    card = ModelCard.load(out / "README.md")
    assert "converted" in card.data.tags
    assert f"converted: {SMALL}" in card.text
    if source == "folder":
        assert card.data.license == "cc-by-4.0"
        assert twin.pretrained_cfg["license"] == "cc-by-4.0"
        assert twin.pretrained_cfg["label_names"] == list("abcde")
    assert timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=3).classifier.neck is None


def test_measured_before_and_after(learned, learned_folder, tmp_path):
    record = {"dataset": {"name": "noise", "split": "test"}, "command": "etf-zoo convert"}
    with pytest.raises(ValueError, match="data needs record="):
        convert_checkpoint(str(learned_folder), tmp_path / "exact", data=data)
    exact = convert_checkpoint(str(learned_folder), tmp_path / "exact", data=data, record=record)
    assert exact["after"] == pytest.approx(exact["before"], abs=1e-4)
    nearest = convert_checkpoint(
        str(learned_folder), tmp_path / "nearest", mode="nearest", data=data, center=data, record=record
    )
    assert nearest["before"] == exact["before"]
    assert nearest["after"]["loss"] != pytest.approx(nearest["before"]["loss"], abs=1e-3)
    head = load(tmp_path / "nearest").classifier
    assert torch.equal(head.weight, nearest_simplex_etf(learned.classifier.weight))
    inputs = torch.cat([learned.forward_head(learned.forward_features(x), pre_logits=True) for x, _ in data(None)])
    torch.testing.assert_close(head.neck.running_mean, inputs.mean(0))
    card = ModelCard.load(tmp_path / "nearest" / "README.md")
    assert f"{nearest['after']['top1']:.2f} | {nearest['before']['top1']:.2f}" in card.text
    assert "nearest simplex frame on centerd features" in card.text
    assert card.data.eval_results[0].metric_value == round(nearest["after"]["top1"], 2)


def test_half_precision_is_asked_for(learned_folder, tmp_path):
    sizes = {}
    for half in (False, True):
        convert_checkpoint(str(learned_folder), tmp_path / "out", half=half)
        sizes[half] = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert sizes[True] < 0.6 * sizes[False]


def test_converted_from_the_hub(hub, learned, learned_folder, tmp_path):
    config = json.loads((learned_folder / "config.json").read_text())
    del config["pretrained_cfg"]["license"]  # as with most of timm's, only the card has it
    (learned_folder / "config.json").write_text(json.dumps(config))
    (learned_folder / "README.md").write_text("---\nlicense: bsd-3-clause\n---\n# A model\n")
    hub.add_folder("org/model", learned_folder)
    convert_checkpoint("hf-hub:org/model", tmp_path / "out")
    x = torch.randn(2, 3, 32, 32)
    assert_same_softmax(load(tmp_path / "out")(x), learned(x))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.base_model) == ("bsd-3-clause", "org/model")
    hub.add_folder("org/twin", tmp_path / "out")  # and what was written loads from there
    assert_same_softmax(timm.create_model("hf-hub:org/twin", pretrained=True).eval()(x), learned(x))
    with pytest.raises(RuntimeError, match="no model repository org/nothing"):
        load_learned("hf-hub:org/nothing")


def test_timm_name(hub, tmp_path):
    model = timm.create_model("test_resnet").eval()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    hub.add("timm/test_resnet.r160_in1k", {"model.safetensors": tmp_path / "model.safetensors"})
    convert_checkpoint("test_resnet.r160_in1k", tmp_path / "out")
    x = torch.randn(2, 3, 64, 64)
    assert_same_softmax(load(tmp_path / "out")(x), model(x))
    assert ModelCard.load(tmp_path / "out" / "README.md").data.base_model == "timm/test_resnet.r160_in1k"


@pytest.mark.parametrize(
    ("source", "architecture", "error", "message"),
    [
        ("weights.pth", None, ValueError, "not a .safetensors file, and pickles are not read"),
        ("nowhere", None, ValueError, "no file, folder or timm model 'nowhere'"),
        ("weights.safetensors", None, ValueError, "name it with --architecture"),
        ("weights.safetensors", "resnet19", ValueError, "no architecture 'resnet19'"),
        ("weights.safetensors", "resnet18", RuntimeError, "does not hold the weights of a resnet18"),
        ("broken.safetensors", SMALL, RuntimeError, "not a readable safetensors file"),
        ("empty", None, ValueError, "has no config.json"),
        ("pickled", None, ValueError, "has no .safetensors file"),
        ("twin", None, ValueError, "has a fixed frame already"),
        ("mobilenetv3_small_100_etf.e27_tiny", None, ValueError, "has a fixed frame already"),
        ("headless", None, ValueError, "has no classifier"),
    ],
)
def test_bad_sources(source, architecture, error, message, learned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    safetensors.torch.save_file(learned.state_dict(), "weights.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nonsense" * 10)
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    if source == "twin":
        save_folder(convert_classifier(learned), "twin")
    if source == "headless":
        save_folder(timm.create_model(SMALL, num_classes=0), "headless")
    with pytest.raises(error, match=message):
        convert_checkpoint(source, "out", architecture=architecture)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------- plain


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
def test_plain_form_of_every_kind_of_head(kind, tmp_path):
    twin, base = build(kind), shared(kind, twin=False)
    assert not export_plain(twin, tmp_path)
    plain, x = load(tmp_path), images(kind)
    assert type(plain) is type(base)
    assert plain.state_dict().keys() == base.state_dict().keys()
    assert torch.equal(plain(x).argmax(1), twin(x).argmax(1))


@pytest.mark.parametrize(
    "kind", ["pair", "norm_linear_pair", pytest.param("list_by_stage", marks=pytest.mark.slow), "aux"]
)
def test_plain_form_of_several_heads(kind, tmp_path):
    with pytest.raises(ValueError, match=r"has \d heads, each on features of length one.*--onnx"):
        export_plain(build(kind), tmp_path / "l2")
    base = build(kind, twin=False)
    x = images(kind)
    expected = base(x)
    assert export_plain(convert_classifier(base), tmp_path / "exact")
    plain = load(tmp_path / "exact")
    assert type(plain) is type(shared(kind, twin=False))
    assert_same_softmax(plain(x), expected)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: timm.create_model("resnet10t_etf", num_classes=5, neck="mlp"), "neck is not linear.*--onnx"),
        (lambda: timm.create_model("resnet10t_etf", num_classes=5, whitening=True), "no whitening layer"),
        (lambda: timm.create_model("resnet10t", num_classes=5), "no fixed frame; it is a plain model already"),
    ],
)
def test_what_has_no_plain_form(model, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_plain(model(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------------- ONNX


@pytest.mark.parametrize("name", ["test_resnet", pytest.param(SMALL, marks=pytest.mark.slow)])
def test_onnx_has_our_logits(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = timm.create_model(f"{name}_etf", num_classes=CLASSES, feature_norm="batch", neck="mlp").eval()
    model.pretrained_cfg["label_names"] = [f"class {i}" for i in range(CLASSES)]
    session = onnxruntime.InferenceSession(str(export_onnx(model, tmp_path)), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = torch.randn(batch, *timm.data.resolve_data_config(model=model)["input_size"])
        (logits,) = session.run(["logits"], {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(x), atol=1e-4, rtol=1e-3)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["label_names"])[2] == "class 2"
    assert json.loads(metadata["mean"]) == list(model.pretrained_cfg["mean"])
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_onnx_failures_are_one_line(monkeypatch, tmp_path):
    model = timm.create_model("test_resnet_etf", num_classes=5)

    def fail(*args, **kwargs):
        raise ValueError("no such operator\nand much more")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(RuntimeError, match=r"torch cannot export ResNet.* to ONNX: no such operator$"):
        export_onnx(model, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingPackageError, match="needs onnxscript: pip install"):
        export_onnx(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
