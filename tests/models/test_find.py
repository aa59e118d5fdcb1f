"""One model by every name that it has."""

import json
import shutil

import pytest
import safetensors.torch
import timm
import torch

from etf_zoo.errors import EtfZooError, LoadError
from etf_zoo.models import find
from etf_zoo.models.find import find_model, load_model, model_folder
from etf_zoo.sharing.checkpoint import load_learned
from etf_zoo.sharing.folder import save_folder
from etf_zoo.trainer.run.model import make_model
from etf_zoo.trainer.tune.tuning import Finetune
from etf_zoo.weights.native import cards_folder

TAGGED = "mobilenetv3_small_100_etf.e27_tiny"
BARE = "mobilenetv3_small_100_etf"


def test_every_name_of_an_embedded_model():
    folder = cards_folder() / TAGGED
    for name in (BARE, TAGGED, str(folder), f"local-dir:{folder}"):
        source = find_model(name)
        assert (source.folder, source.architecture, source.input_size) == (folder, BARE, 96)
        assert source.is_twin
    assert find_model(BARE).identity == find_model(TAGGED).identity == find_model(str(folder)).identity
    assert find_model(BARE, pretrained=False).input_size == 224
    assert find_model(BARE, pretrained=False).folder is None


def test_every_name_of_a_run(folder, tmp_path, monkeypatch, tiny_model):
    run = tmp_path / "runs" / "x"
    run.mkdir(parents=True)
    shutil.copytree(folder, run / "model")
    monkeypatch.chdir(tmp_path)
    images = torch.zeros(1, 3, 32, 32)
    wanted = load_model(str(folder))(images)
    for name in ("runs/x", "runs/x/", "runs/x/model", "local-dir:runs/x", str(run)):
        assert find_model(name).folder.resolve() == (run / "model").resolve()
        assert torch.equal(load_model(name)(images), wanted)


def test_a_control_in_model_cards_by_its_name():
    source = find_model("resnet18_control.e23_tiny")
    assert (source.architecture, source.is_twin) == ("resnet18", False)
    assert source.folder == cards_folder() / "resnet18_control.e23_tiny"
    assert find_model("resnet18_etf.e23_tiny").folder == cards_folder() / "resnet18_etf.e23_tiny"  # without weights


def test_a_folder_of_a_models_name_that_holds_none(tmp_path, monkeypatch):
    (tmp_path / "resnet18").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_model("resnet18").name == "resnet18"
    with pytest.raises(ValueError, match="resnet18 holds no model"):
        find_model("local-dir:resnet18")
    shutil.copy(cards_folder() / TAGGED / "config.json", tmp_path / "resnet18")
    assert find_model("resnet18").architecture == BARE  # a folder with a model comes first, as in a shell


def test_a_name_of_timm():
    source = find_model("resnet18.a1_in1k")
    assert (source.name, source.architecture, source.folder) == ("resnet18.a1_in1k", "resnet18", None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "Name a model"),
        ("resnet18_etv", "Did you mean resnet18_etf"),
        ("resnet18_etf.nonsense", r"has no tag 'nonsense'; there is resnet18_etf\."),
        ("org/name", "Then hf-hub:org/name"),
        (str(cards_folder()), "holds no model"),
        ("../resnet18", "hf-hub:"),
    ],
)
def test_what_there_is_not(name, message):
    with pytest.raises(ValueError, match=message):
        find_model(name)


def test_on_the_hub(hub, folder):
    hub.add_folder("org/tiny", folder)
    source = find_model("hf-hub:org/tiny")
    assert (source.name, source.architecture) == ("hf-hub:org/tiny", "mobilenetv3_small_050_etf")
    with pytest.raises(ValueError, match="There is no model repository org/other"):
        find_model("hf-hub:org/other")


def test_no_network_is_one_sentence():
    with pytest.raises(ValueError, match=r"org/tiny is not in the cache and HF_HUB_OFFLINE is set"):
        find_model("hf-hub:org/tiny")


def test_no_weights_are_read_to_look_up(monkeypatch, folder):
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: pytest.fail("built"))
    (folder / "model.safetensors").write_bytes(b"")
    assert find_model(str(folder)).input_size == 32
    assert model_folder(str(folder)) == folder
    assert model_folder("resnet18") is None
    config = json.loads((folder / "config.json").read_text())
    assert config["weights_sha256"] in find._identity({"mean": (0,), "std": (1,)}, folder)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("another", "truncated or altered"),
        ("half", "truncated or altered"),
        ("pickle", "has pytorch_model.bin and no model.safetensors: pickles can run code"),
    ],
)
def test_weights_of_a_learned_head_are_checked_too(tmp_path, harm, message):
    """timm reads such a folder by itself, whatever lies there."""
    model = timm.create_model("test_resnet", num_classes=3)
    folder = save_folder(model, tmp_path / "learned", label_names=list("abc"))
    file = folder / "model.safetensors"
    assert load_model(str(folder)).num_classes == 3
    if harm == "another":
        state = safetensors.torch.load_file(file)
        safetensors.torch.save_file({name: 0 * value for name, value in state.items()}, file)
    elif harm == "half":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        file.unlink()
    for load in (load_model, load_learned, lambda name: make_model(Finetune(model=name), 3)):
        with pytest.raises(LoadError, match=message):
            load(str(folder))


def test_a_folder_that_is_no_classifier(tmp_path):
    (tmp_path / "config.json").write_text('{"num_classes": 3}')
    with pytest.raises(EtfZooError, match="names no architecture"):
        load_model(str(tmp_path))
