"""HeadConfig: its defaults are the layer's, and it survives saving, another number of classes, and old folders."""

import inspect
import json

import pytest
import timm
import torch
from torch import nn

from etf_zoo import FrameClassifier, attach_frame
from etf_zoo.frames import random_frame
from etf_zoo.models.convert import EXACT
from etf_zoo.models.head_config import HEAD_ARGS, HeadConfig, split_head_args
from etf_zoo.sharing.folder import save_folder

TREE = 1 - torch.eye(5)


@pytest.mark.parametrize("function", [FrameClassifier, attach_frame])
def test_arguments_and_defaults_are_the_same_everywhere(function):
    theirs = inspect.signature(function).parameters
    shared = [name for name in HEAD_ARGS if name not in ("moving", "subspaces") or function is attach_frame]
    assert {name: theirs[name].default for name in shared} == {name: getattr(HeadConfig(), name) for name in shared}


@pytest.mark.parametrize(
    "config",
    [
        HeadConfig(),
        HeadConfig(frame="random", neck="mlp", feature_norm="batch", logit_scale=3.0, orientation="random", seed=4),
        HeadConfig(moving={"momentum": 0.5}),
        HeadConfig(moving={}),
        EXACT,
    ],
)
def test_saved_arguments_build_the_same_head(config):
    saved = json.loads(json.dumps(config.saved()))
    again = HeadConfig(**saved)
    assert again.saved() == config.saved()
    torch.manual_seed(0)
    head = config.build(8, 5)
    torch.manual_seed(0)
    twin = again.build(8, 5).state_dict()
    assert twin.keys() == head.state_dict().keys()
    assert all(torch.equal(value, twin[name]) for name, value in head.state_dict().items())


def test_frames_that_only_weights_hold_are_saved_as_custom():
    assert HeadConfig(frame=random_frame(5, 8)).saved()["frame"] == "custom"
    saved = HeadConfig(frame="hierarchy", hierarchy=TREE, gamma=1.5).saved()
    assert (saved["frame"], saved["gamma"]) == ("custom", 1.5)
    assert "hierarchy" not in saved
    assert "gamma" not in HeadConfig().saved()


def test_another_number_of_classes():
    given = HeadConfig(frame=random_frame(5, 8), seed=3)
    assert given.for_classes(5) is given
    assert (given.for_classes(6).frame, given.for_classes(6).seed) == ("auto", 3)
    tree = HeadConfig(frame="hierarchy", hierarchy=TREE).for_classes(6)
    assert (tree.frame, tree.hierarchy) == ("auto", None)
    assert EXACT.for_classes(5).saved() == HeadConfig().saved()
    blocks = HeadConfig(orientation="blocks", frame="random")
    assert blocks.refitted(9, 8, asked=()).orientation == "auto"
    assert blocks.refitted(8, 8, asked=()).orientation == "blocks"
    assert blocks.refitted(9, 8, asked={"orientation"}).orientation == "blocks"
    assert HeadConfig(frame="custom").refitted(4, 8, asked=()).frame == "auto"
    fresh = HeadConfig(frame="helmert", neck="linear", feature_norm="none", logit_scale=2.0)
    assert fresh.refitted(4, 8, asked={"logit_scale"}).saved() == HeadConfig(logit_scale=2.0).saved()


def test_none_takes_a_neck_away():
    assert HeadConfig(neck="none").neck is None
    assert HeadConfig(neck="none").build(8, 5).neck is None


def test_none_takes_a_neck_and_its_width_away_from_weights(tmp_path):
    model = timm.create_model("test_resnet_etf", num_classes=30, frame="kerdock", neck="mlp", neck_features=64)
    source = f"local-dir:{save_folder(model, tmp_path)}"
    kept = timm.create_model(source, pretrained=True, num_classes=5)
    assert kept.fc.neck is not None
    assert kept.fc.dim == 64
    bare = timm.create_model(source, pretrained=True, num_classes=5, neck="none")
    assert bare.fc.neck is None
    assert bare.fc.dim == model.num_features


def test_other_classes_leave_a_projector_out(tmp_path):
    x = torch.randn(2, 3, 32, 32)
    model = timm.create_model("test_resnet_etf", num_classes=30, frame="kerdock", neck="projector", neck_features=64)
    source = f"local-dir:{save_folder(model, tmp_path)}"
    same = timm.create_model(source, pretrained=True)
    torch.testing.assert_close(same.eval()(x), model.eval()(x), rtol=1e-2, atol=1e-2)  # half precision
    bare = timm.create_model(source, pretrained=True, num_classes=5)
    assert (bare.fc.neck, bare.fc.dim, bare.fc.frame) == (None, model.num_features, "auto")
    other = timm.create_model(source, pretrained=True, num_classes=5, neck="mlp")
    assert other.fc.neck is not None
    config = HeadConfig(frame="random", neck="projector", neck_features=64)
    assert config.refitted(5, 96, asked=()).saved() == HeadConfig(frame="random").saved()
    assert config.refitted(5, 96, asked={"neck"}).neck == "projector"


def test_a_neck_that_is_a_module_is_copied():
    neck = nn.Linear(8, 8)
    assert HeadConfig(neck=neck).build(8, 5).neck is not neck


def test_old_names():
    head, others = split_head_args({"frame_seed": 3, "num_classes": 5})
    assert (head, others) == ({"seed": 3}, {"num_classes": 5})


def test_a_folder_with_the_old_name_of_the_seed_loads(tmp_path):
    model = timm.create_model("test_resnet_etf", num_classes=5, orientation="random", seed=3)
    folder = save_folder(model, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["config_sha256"]
    config["model_args"]["frame_seed"] = config["model_args"].pop("seed")
    (folder / "config.json").write_text(json.dumps(config))
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert torch.equal(loaded.fc.weight, model.fc.weight)
    assert loaded.head_config.seed == 3
    again = json.loads((save_folder(loaded, tmp_path / "again") / "config.json").read_text())
    assert again["model_args"]["seed"] == 3
    assert "frame_seed" not in again["model_args"]
    with pytest.raises(ValueError, match="which seed would contradict"):
        timm.create_model(f"local-dir:{folder}", pretrained=True, frame_seed=4)


def test_what_timm_saves_follows_the_head(tmp_path):
    model = timm.create_model("test_resnet_etf", num_classes=5, neck="mlp", hierarchy=TREE, frame="hierarchy")
    attach_frame(model, 5, frame=random_frame(5, 96))
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert torch.equal(loaded.fc.weight, model.fc.weight)
    assert loaded.fc.neck is None


def test_a_projector_is_left_out_and_stays_so(tmp_path):
    """By weights for other classes, by a reset, and by what either is saved as, whose tag has one."""
    model = timm.create_model("resnet18_etf", pretrained=True)
    assert model.fc.neck is not None
    model.reset_classifier(7)
    other = timm.create_model("resnet18_etf", pretrained=True, num_classes=7)
    x = torch.randn(1, 3, 64, 64)
    for made in (model.eval(), other.eval()):
        assert made.fc.neck is None
        save_folder(made, tmp_path / "saved", half=False)
        again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
        assert again.fc.neck is None
        torch.testing.assert_close(again(x), made(x))
