"""Model folders: what is stored, and that what is stored loads."""

import json

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from etf_zoo import attach_frame, frame_heads
from etf_zoo.frames import random_frame
from etf_zoo.sharing.folder import save_folder, storage_state_dict


def load(folder, **kwargs):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()


@torch.no_grad()
def test_roundtrip_gives_the_half_precision_model_exactly(tiny_model, folder):
    x = torch.randn(2, 3, 32, 32)
    stored = {k: v.float() if v.is_floating_point() else v for k, v in storage_state_dict(tiny_model).items()}
    tiny_model.load_state_dict(stored)
    torch.testing.assert_close(load(folder)(x), tiny_model(x), rtol=0, atol=0)


def test_backbone_is_float16_frame_and_statistics_float32(tiny_model, folder):
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    assert stored["conv_stem.weight"].dtype == torch.float16
    assert stored["bn1.running_var"].dtype == torch.float32
    assert stored["classifier.logit_scale"].dtype == torch.float32
    assert torch.equal(stored["classifier.weight"], tiny_model.classifier.weight)


def test_tensor_beyond_float16_is_kept(tiny_model):
    with torch.no_grad():
        tiny_model.conv_stem.weight[0, 0, 0, 0] = 1e6
    assert storage_state_dict(tiny_model)["conv_stem.weight"].dtype == torch.float32


def test_config_names_labels_hash_and_every_head_argument(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "mobilenetv3_small_050_etf"
    assert config["label_names"] == list("abcde")
    assert len(config["weights_sha256"]) == 64
    wanted = {"frame": "auto", "feature_norm": "l2", "logit_scale": "auto", "orientation": "blocks", "seed": 0}
    assert wanted.items() <= config["model_args"].items()


@pytest.mark.parametrize(
    "args", [{"neck": "mlp"}, {"neck": "residual", "feature_norm": "batch"}, {"logit_scale": "learnable"}]
)
@torch.no_grad()
def test_every_kind_of_head_comes_back(args, tmp_path):
    model = timm.create_model("resnet18_etf", num_classes=5, **args).eval()
    again = load(save_folder(model, tmp_path))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(again(x), model(x), rtol=0.02, atol=0.05)  # float16 storage
    assert again.state_dict().keys() == model.state_dict().keys()
    assert isinstance(again.fc.logit_scale, nn.Parameter) == (args.get("logit_scale") == "learnable")


def test_frame_given_as_a_tensor_comes_back(tmp_path):
    frame = random_frame(5, 512, seed=3)
    model = timm.create_model("resnet18_etf", num_classes=5, frame=frame)
    folder = save_folder(model, tmp_path)
    assert torch.equal(load(folder).fc.weight, frame)
    assert load(folder, num_classes=7).fc.weight.shape == (7, 512)  # a fresh frame: the tensor fits five classes only


def test_plain_and_attached_models_save_too(tmp_path):
    plain = timm.create_model("resnet18", num_classes=5)
    assert not frame_heads(load(save_folder(plain, tmp_path / "plain")))
    attached = attach_frame(timm.create_model("resnet18", num_classes=5))
    again = load(save_folder(attached, tmp_path / "attached"))
    assert torch.equal(again.fc.weight, attached.fc.weight)


def test_wrong_number_of_label_names(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="2 label names for 5 classes"):
        save_folder(tiny_model, tmp_path, label_names=["a", "b"])


def test_own_neck_is_refused(tmp_path):
    model = timm.create_model("resnet18_etf", num_classes=5, neck=nn.Linear(512, 512))
    with pytest.raises(ValueError, match="neck of your own"):
        save_folder(model, tmp_path)


def test_full_disk_leaves_the_old_folder_whole(tiny_model, folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*args, **kwargs):
        (folder / "model.safetensors.new").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_folder(tiny_model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
