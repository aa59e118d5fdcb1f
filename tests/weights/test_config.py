"""config.json of a folder or repository: damage is named by file and field, and it points nowhere else."""

import json
import logging
import random

import pytest
import safetensors.torch
import timm
import torch

from etf_zoo.errors import EtfZooError
from etf_zoo.models.find import load_model
from etf_zoo.sharing.folder import save_folder
from etf_zoo.weights.config import config_digest, read_config, without_sources
from etf_zoo.weights.native import cards_folder, native_tags


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet_etf", num_classes=3)
    return save_folder(model, tmp_path / "tiny_etf.x", pretrained_cfg={"license": "mit"}, label_names=["a", "b", "c"])


def rewrite(folder, **changes):
    """Change a config, as its owner may: without the digest. A name with a dot is of the pretrained cfg."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("config_sha256", None)
    for key, value in changes.items():
        target = config["pretrained_cfg"] if key.startswith("cfg_") else config
        target[key.removeprefix("cfg_")] = value
    (folder / "config.json").write_text(json.dumps(config))


def test_written_configs_have_their_digest(folder):
    config = read_config(folder / "config.json")
    assert config["config_sha256"] == config_digest(config)
    assert config_digest(dict(reversed(config.items()))) == config["config_sha256"]
    (folder / "config.json").write_text(json.dumps(config, indent=7))
    read_config(folder / "config.json")


def test_every_changed_character_is_noticed(folder):
    """200 flipped bits: each gives one error of ours, or changes nothing that the config says."""
    file = folder / "config.json"
    content = file.read_bytes()
    generator, messages = random.Random(0), []
    before = json.loads(content)
    for _ in range(200):
        place = generator.randrange(len(content))
        damaged = bytearray(content)
        damaged[place] ^= 1 << generator.randrange(8)
        file.write_bytes(damaged)
        try:
            now = read_config(file)
        except EtfZooError as error:
            messages.append(str(error))
            continue
        # an entry whose own name was hit is no digest any more: then what it guards is as it was
        assert {k: v for k, v in now.items() if k in before} == {k: v for k, v in before.items() if k in now}
    assert all(str(file) in message for message in messages)
    assert len(messages) > 180  # the others hit spaces


def test_folder_whose_config_was_damaged(folder):
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"b"', '"d"'))
    for load in (lambda: timm.create_model(f"local-dir:{folder}", pretrained=True), lambda: load_model(str(folder))):
        with pytest.raises(EtfZooError, match=r"config\.json is not what was written.*remove that entry"):
            load()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_names": ["a", "b"]}, "label_names has 2 names for 3 classes"),
        ({"label_names": "abc"}, "label_names must be a list of names, it is 'abc'"),
        ({"num_classes": -3}, "num_classes must be a whole number, it is '-3'"),
        ({"num_classes": True}, "num_classes must be"),
        ({"architecture": 5}, "architecture must be a name"),
        ({"model_args": [1]}, "model_args must be an object"),
        ({"pretrained_cfg": "x"}, "pretrained_cfg must be an object"),
        ({"cfg_input_size": [3, 32]}, r"pretrained_cfg\.input_size must be channels, height and width"),
        ({"cfg_mean": ["x", 0, 0]}, r"pretrained_cfg\.mean must be a list of numbers"),
        ({"cfg_std": [0.1, 0.0, 1.0]}, r"pretrained_cfg\.std must be a list of positive numbers"),
        ({"cfg_crop_pct": float("nan")}, r"pretrained_cfg\.crop_pct must be a share"),
        ({"cfg_interpolatiom": "bicubic"}, r"pretrained_cfg has unknown entries \(interpolatiom\)"),
    ],
)
def test_fields(folder, changes, message):
    rewrite(folder, **changes)
    with pytest.raises(EtfZooError, match=rf"config\.json: {message}"):
        read_config(folder / "config.json")


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '"x"', "[" * 100_000, "\ud800"])
def test_what_is_no_config(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(EtfZooError, match=r"config\.json (cannot be read|is no config)"):
        read_config(tmp_path / "config.json")


def test_every_embedded_config_is_right():
    for name in native_tags():
        assert "config_sha256" in read_config(cards_folder() / name / "config.json")


@pytest.mark.parametrize("content", ["{", "{}"])
def test_a_broken_embedded_config_is_named(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(EtfZooError, match=r"tiny_etf\.x/config\.json"):
        native_tags(folder.parent)


# ------------------------------------------------------------------------------------------------ what points elsewhere


@pytest.fixture
def other(tmp_path):
    """Weights of the user's own, that no repository may name."""
    model = timm.create_model("test_resnet_etf", num_classes=3)
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(0.5)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "own.safetensors")
    return tmp_path / "own.safetensors"


@pytest.mark.parametrize("key", ["file", "url", "hf_hub_filename", "state_dict", "custom_load"])
def test_a_repository_points_nowhere_else(hub, folder, other, key):
    value = {"state_dict": {"fc.weight": [[1.0]]}, "custom_load": True}.get(key, str(other))
    expected = timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict()
    rewrite(folder, **{f"cfg_{key}": value})
    hub.add_folder("org/tiny", folder)
    for source in ("hf-hub:org/tiny", f"local-dir:{folder}"):
        if (key, source) == ("file", f"local-dir:{folder}"):
            continue  # timm puts the folder there
        with pytest.warns(UserWarning, match=rf"says where else to take weights from \({key}\); this is not followed"):
            model = timm.create_model(source, pretrained=True)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected[name]), name


def test_a_call_may_still_name_a_file(other):
    model = timm.create_model(
        "test_resnet_etf", pretrained=True, pretrained_cfg_overlay={"file": str(other)}, num_classes=4
    )
    assert model.conv1[0].weight.eq(0.5).all()
    assert without_sources({"file": "x", "url": "y"}) == {"file": "x", "url": "y"}


def test_a_skip_connection_names_no_other_repository():
    with pytest.raises(EtfZooError, match="base of a skip connection is an architecture"):
        timm.create_model("skip_connection", base="hf-hub:org/other", layer="layer3.0")


def test_the_commit_of_a_repository_is_said_and_kept(hub, folder, caplog):
    hub.add_folder("org/tiny", folder)
    with caplog.at_level(logging.WARNING, logger="etf_zoo"):
        model = timm.create_model("hf-hub:org/tiny", pretrained=True)
    name = model.pretrained_cfg["hf_hub_id"]
    repo, _, commit = name.partition("@")
    assert repo == "org/tiny"
    assert len(commit) == 40
    assert f"hf-hub:org/tiny stands for hf-hub:{name} now" in caplog.text
    caplog.clear()
    again = timm.create_model(f"hf-hub:{name}", pretrained=True)
    assert torch.equal(again.fc.weight, model.fc.weight)
    assert not caplog.records


def test_the_commit_of_a_plain_model_is_said_too(hub, tmp_path, caplog):
    save_folder(timm.create_model("test_resnet", num_classes=3), tmp_path / "plain")
    hub.add_folder("org/plain", tmp_path / "plain")
    with caplog.at_level(logging.WARNING, logger="etf_zoo"):
        load_model("hf-hub:org/plain")
    assert "hf-hub:org/plain stands for hf-hub:org/plain@" in caplog.text
