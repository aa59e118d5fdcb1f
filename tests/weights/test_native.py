"""Weights by tag: embedded, offline, checked; and what a wrong file says."""

import json

import pytest
import safetensors.torch
import timm
import torch

from etf_zoo import frame_heads
from etf_zoo.frames import simplex_etf
from etf_zoo.weights.native import cards_folder, native_tags, read_weights, sha256

EMBEDDED = sorted(native_tags())
MOBILE = "mobilenetv3_small_100_etf"


def local(folder, **kwargs):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs)


def rewrite(folder, change):
    """Change the stored tensors and keep the hash right, as a careless export would."""
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)
    config = json.loads((folder / "config.json").read_text())
    config["weights_sha256"] = sha256(path)
    del config["config_sha256"]
    (folder / "config.json").write_text(json.dumps(config))


# ---------------------------------------------------------------------------------------------------------- embedded


def test_listing_has_what_is_embedded():
    assert EMBEDDED
    assert timm.list_pretrained("*_etf*") == timm.list_pretrained("*_etf.*")
    assert set(EMBEDDED) <= set(timm.list_pretrained("*_etf*"))


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_weights_load_offline_and_are_exactly_the_file(name):
    model = timm.create_model(name, pretrained=True)
    stored = safetensors.torch.load_file(cards_folder() / name / "model.safetensors")
    state = model.state_dict()
    assert state.keys() == stored.keys()
    for key, value in stored.items():
        assert torch.equal(state[key], value.to(state[key].dtype)), key
    assert (
        sha256(cards_folder() / name / "model.safetensors")
        == json.loads((cards_folder() / name / "config.json").read_text())["weights_sha256"]
    )


@torch.no_grad()
def test_adapting_to_other_classes_channels_and_uses():
    reference = timm.create_model(MOBILE, pretrained=True).eval()
    size = reference.pretrained_cfg["input_size"][-1]
    x = torch.randn(2, 3, size, size)
    seven = timm.create_model(MOBILE, pretrained=True, num_classes=7).eval()
    assert seven(x).shape == (2, 7)
    torch.testing.assert_close(seven.forward_features(x), reference.forward_features(x))
    gram = seven.classifier.weight @ seven.classifier.weight.T
    torch.testing.assert_close(gram[0, 1], torch.tensor(-1 / 6), atol=1e-6, rtol=0)
    assert seven.classifier.logit_scale < reference.classifier.logit_scale  # solved anew for seven classes

    gray = timm.create_model(MOBILE, pretrained=True, in_chans=1).eval()
    summed = reference.conv_stem.weight.sum(dim=1, keepdim=True)  # timm sums before the float16 weights are widened
    torch.testing.assert_close(gray.conv_stem.weight, summed, rtol=1e-2, atol=1e-3)
    headless = timm.create_model(MOBILE, pretrained=True, num_classes=0).eval()
    torch.testing.assert_close(headless(x), reference.forward_head(reference.forward_features(x), pre_logits=True))
    maps = timm.create_model(MOBILE, pretrained=True, features_only=True).eval()(x)
    assert [m.shape[1] for m in maps] == [16, 16, 24, 48, 576]


def test_more_classes_than_width_drop_the_orientation_of_the_tag():
    model = timm.create_model(MOBILE, pretrained=True, num_classes=1500)
    assert model.classifier.weight.shape == (1500, 1024)
    with pytest.raises(ValueError, match="blocks"):  # asked for, it is an error
        timm.create_model(MOBILE, pretrained=True, num_classes=1500, orientation="blocks")


@pytest.mark.parametrize("kwargs", [{"moving": True}, {"neck": "mlp"}, {"feature_norm": "none"}, {"whitening": True}])
def test_another_head_on_the_stored_classes_is_refused_and_a_fresh_one_made(kwargs):
    (asked,) = kwargs
    with pytest.raises(ValueError, match=f"which {asked} would contradict.*num_classes=K gives a fresh head"):
        timm.create_model(MOBILE, pretrained=True, **kwargs)
    reference, fresh = timm.create_model(MOBILE, pretrained=True), timm.create_model(MOBILE, num_classes=7, **kwargs)
    seven = timm.create_model(MOBILE, pretrained=True, num_classes=7, **kwargs)
    assert seven.state_dict().keys() == fresh.state_dict().keys()
    for key, value in seven.state_dict().items():
        if key in reference.state_dict() and not key.startswith("classifier."):
            assert torch.equal(value, reference.state_dict()[key]), key
    assert type(seven.classifier) is type(fresh.classifier)


def test_untagged_without_pretrained_has_the_bases_defaults():
    model = timm.create_model(MOBILE)
    assert (model.num_classes, model.pretrained_cfg["input_size"]) == (1000, (3, 224, 224))
    tagged = timm.create_model(EMBEDDED[0])
    assert tagged.num_classes == json.loads((cards_folder() / EMBEDDED[0] / "config.json").read_text())["num_classes"]


def test_what_timms_train_script_passes_works():
    resolved = timm.models.resolve_model_input_args(MOBILE, {}, num_classes=None)
    assert timm.create_model(pretrained=True, **resolved).num_classes == 200


# ------------------------------------------------------------------------------------------------------------ errors


def test_no_weights_says_where_there_are_some():
    with pytest.raises(RuntimeError, match=r"no pretrained weights for resnet18d_etf yet.*etf-zoo list --pretrained"):
        read_weights({"architecture": "resnet18d_etf"})
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.create_model("resnet10t_etf.nonsense", pretrained=True)


@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda b: b[:5000] + bytes([b[5000] ^ 1]) + b[5001:]])
def test_truncated_or_altered_file(folder, damage):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RuntimeError, match="truncated or altered"):
        local(folder)


def test_file_that_is_no_safetensors_file(folder):
    (folder / "model.safetensors").write_bytes(b"nonsense" * 10)
    config = json.loads((folder / "config.json").read_text())
    del config["weights_sha256"], config["config_sha256"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="not a readable safetensors file"):
        local(folder)


def test_missing_file_and_foreign_format(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match="no weights file"):
        local(folder)
    timm.models.save_for_hf(timm.create_model("test_resnet_etf"), str(tmp_path / "pickle"), safe_serialization=False)
    with pytest.raises(RuntimeError, match=r"has pytorch_model\.bin and no .*safe_serialization=True"):
        local(tmp_path / "pickle")
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"not a \.safetensors file"):
        read_weights({"file": str(tmp_path / "weights.bin")})


def test_frame_of_another_shape(folder):
    rewrite(folder, lambda t: t.update({"classifier.weight": simplex_etf(5, 77)}))
    with pytest.raises(RuntimeError, match=r"shape \(5, 77\) in the checkpoint and \(5, 1024\)"):
        local(folder)


def test_learned_matrix_in_the_place_of_the_frame(folder):
    rewrite(folder, lambda t: t.update({"classifier.weight": torch.randn(5, 1024)}))
    with pytest.raises(RuntimeError, match="not a frame"):
        local(folder)


def test_weights_of_another_architecture(folder):
    rewrite(folder, lambda t: t.pop("conv_stem.weight"))
    with pytest.raises(RuntimeError, match="1 tensors are missing"):
        local(folder)


def test_weights_in_memory(tiny_model):
    overlay = {"state_dict": tiny_model.state_dict(), "num_classes": 5}
    model = timm.create_model("mobilenetv3_small_050_etf", pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.conv_head.weight, tiny_model.conv_head.weight)
    assert "state_dict" not in model.pretrained_cfg
    assert torch.equal(frame_heads(model)["classifier"].weight, tiny_model.classifier.weight)


def test_weights_in_memory_do_not_say_how_their_head_is_built():
    source = timm.create_model("test_resnet_etf", num_classes=5, neck="mlp", feature_norm="batch")

    def load(**kwargs):
        overlay = {"state_dict": source.state_dict(), "num_classes": 5}
        return timm.create_model("test_resnet_etf", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)

    assert load(neck="mlp", feature_norm="batch").state_dict().keys() == source.state_dict().keys()
    for wrong in ({}, {"neck": "mlp"}, {"neck": "residual", "feature_norm": "batch"}):
        with pytest.raises(RuntimeError, match=r"hold another head than asked for: .* missing, .* unknown. Create the"):
            load(**wrong)
