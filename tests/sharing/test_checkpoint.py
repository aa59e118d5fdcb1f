"""Checkpoints converted to folders."""

import json

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import ModelCard
from torch import nn

from etf_zoo import convert_classifier
from etf_zoo.frames import nearest_simplex_etf
from etf_zoo.sharing.checkpoint import convert_checkpoint, load_learned
from etf_zoo.sharing.folder import save_folder

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
    assert "nearest simplex frame on centered features" in card.text
    assert card.data.eval_results[0].metric_value == round(nearest["after"]["top1"], 2)


def test_half_precision_is_asked_for(learned_folder, tmp_path):
    sizes = {}
    for half in (False, True):
        convert_checkpoint(str(learned_folder), tmp_path / "out", half=half)
        sizes[half] = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert sizes[True] < 0.6 * sizes[False]


def test_converted_from_the_hub(hub, learned, learned_folder, tmp_path):
    config = json.loads((learned_folder / "config.json").read_text())
    del config["config_sha256"], config["pretrained_cfg"]["license"]  # as with most of timm's, only the card has it
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
        ("pickled", None, RuntimeError, "has pytorch_model.bin and no model.safetensors: pickles can run code"),
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
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"pickle")
    if source == "twin":
        save_folder(convert_classifier(learned), "twin")
    if source == "headless":
        save_folder(timm.create_model(SMALL, num_classes=0), "headless")
    with pytest.raises(error, match=message):
        convert_checkpoint(source, "out", architecture=architecture)
    assert not (tmp_path / "out").exists()


def test_the_file_that_is_named_is_converted(learned, learned_folder):
    other = {name: value + 1 if value.is_floating_point() else value for name, value in learned.state_dict().items()}
    config = json.loads((learned_folder / "config.json").read_text())
    for recorded in ("weights_sha256", "config_sha256"):  # as timm's folders have none
        config.pop(recorded)
    (learned_folder / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(other, learned_folder / "epoch10.safetensors")
    for file, shift in (("epoch10.safetensors", 1), ("model.safetensors", 0)):
        found = load_learned(str(learned_folder / file)).classifier.bias
        torch.testing.assert_close(found, learned.classifier.bias + shift)


def test_weights_of_ones_own_are_not_timms(learned, tmp_path):
    """timm's license and tag are of timm's weights of the architecture."""
    safetensors.torch.save_file(learned.state_dict(), tmp_path / "mine.safetensors")
    convert_checkpoint(str(tmp_path / "mine.safetensors"), tmp_path / "out", architecture=SMALL)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license in (None, "other")
    assert "lamb_in1k" not in card.content
    assert "mine.safetensors" in card.text
