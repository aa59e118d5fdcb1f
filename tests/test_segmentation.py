"""The segmentation model: its shapes, its head, its folder, and the command that uses it."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from etf_zoo import FrameClassifier
from etf_zoo.errors import EtfZooError, LoadError, MissingPackageError
from etf_zoo.segmentation import Segmenter, load_segmenter, overlay, palette, save_segmenter, segment, with_legend
from etf_zoo_cli import main

NAMES = ["sky", "road", "car", "tree", "sign"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Segmenter("test_efficientnet", 5).eval()


@pytest.mark.parametrize("head", ["frame", "learned"])
def test_logits_have_the_images_resolution(head):
    net = Segmenter("test_efficientnet", 5, head=head, decoder="linknet").eval()
    assert net(torch.randn(2, 3, 40, 56)).shape == (2, 5, 40, 56)
    assert isinstance(net.classifier, FrameClassifier if head == "frame" else nn.Conv2d)
    if isinstance(net.classifier, FrameClassifier):
        assert "classifier.weight" not in dict(net.named_parameters())  # the frame is not trained


@pytest.mark.parametrize("backbone", ["test_resnet", "tf_efficientnet_lite0_etf", "resnet18_etf"])
def test_pixels_are_normalized_as_the_backbones_weights_want_it(backbone):
    net = Segmenter(backbone, 5, decoder="linknet")
    cfg = timm.create_model(backbone).pretrained_cfg
    black, white = net.normalize(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1))
    for k, (mean, std) in enumerate(zip(cfg["mean"], cfg["std"], strict=True)):
        assert black[k].item() == pytest.approx(-mean / std)
        assert white[k].item() == pytest.approx((1 - mean) / std)
    assert "mean" not in net.state_dict()  # it belongs to the backbone's name


def test_padding_is_not_seen_where_there_is_none_to_do(model):
    images = torch.randn(1, 3, 64, 64)
    features = model.classifier(model.decode(images))
    logits = nn.functional.interpolate(features, size=(64, 64), mode="bilinear", align_corners=False)
    assert torch.allclose(model(images), logits)


@pytest.mark.parametrize("half", [True, False])
def test_a_folder_gives_the_model_again(model, tmp_path, half):
    save_segmenter(model, tmp_path, label_names=NAMES, image_size=[40, 56], half=half)
    again, config = load_segmenter(tmp_path)
    assert config["label_names"] == NAMES
    assert torch.equal(again.classifier.weight, model.classifier.weight)
    images = torch.randn(1, 3, 40, 56)
    torch.testing.assert_close(again(images), model(images), rtol=0, atol=0.1 if half else 0)


def test_what_is_no_such_folder(model, tmp_path):
    with pytest.raises(LoadError, match="no folder of a segmentation model"):
        load_segmenter(tmp_path)
    save_segmenter(model, tmp_path, label_names=NAMES, image_size=[40, 56])
    config = json.loads((tmp_path / "config.json").read_text())
    for change, words in [
        ({"format": "other"}, "etf-zoo predict"),
        ({"weights_sha256": "0"}, "it was changed"),
        ({"label_names": ["a"]}, "does not fit"),
        ({"num_classes": 6}, "complete"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(LoadError, match=words):
            load_segmenter(tmp_path)


def test_refused(monkeypatch):
    with pytest.raises(EtfZooError, match="Unknown decoder"):
        Segmenter("test_efficientnet", 5, decoder="x")
    with pytest.raises(EtfZooError, match="'frame' or 'learned'"):
        Segmenter("test_efficientnet", 5, head="x")
    with pytest.raises(EtfZooError, match="takes no seed"):
        Segmenter("test_efficientnet", 5, head="learned", head_args={"seed": 1})
    with pytest.raises(EtfZooError, match="cannot be the backbone"):
        Segmenter("no_such_model", 5)
    monkeypatch.setitem(__import__("sys").modules, "segmentation_models_pytorch", None)
    with pytest.raises(MissingPackageError, match=r"etf-zoo\[segment\]"):
        Segmenter("test_efficientnet", 5)


def test_overlay_paints_known_pixels_alone():
    image = np.full((2, 3, 3), 100, np.uint8)
    classes = np.array([[0, 1, 255], [1, 1, 0]])
    painted = overlay(image, classes, 2, opacity=1.0)
    assert painted[0, 2].tolist() == [100] * 3
    assert np.array_equal(painted[0, 1], palette(2)[1])
    assert len({tuple(color) for color in palette(30).tolist()}) == 30


def test_legend_has_a_square_and_a_name_for_each_entry():
    plain = Image.new("RGB", (40, 90), (1, 2, 3))
    entries = [("sky", (0, 0, 255)), ("a long name of a class", (200, 0, 0)), ("road", (0, 90, 0))]
    sheet = np.asarray(with_legend(plain, entries))
    assert np.array_equal(sheet[:, :40], np.asarray(plain))
    for row, (_, color) in enumerate(entries):
        line = sheet[6 + 18 * row : 18 + 18 * row, 40:]
        assert (line[:, 6:18] == color).all()
        assert (line[:, 24:] < 100).all(axis=2).any()  # something is written beside it
        assert (line[:, -4:] == 255).all()  # and fits
    many = with_legend(plain, entries * 9)
    assert many.height == 6 + 27 * 18
    assert np.array_equal(np.asarray(many)[:90, :40], np.asarray(plain))


def test_segment_answers_at_the_images_size(model):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8))
    classes = segment(model, image, [40, 56])
    assert classes.shape == (30, 50)
    assert set(np.unique(classes)) <= set(range(5))


def test_command(model, tmp_path, capsys):
    save_segmenter(model, tmp_path / "model", label_names=NAMES, image_size=[40, 56])
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8)).save(tmp_path / "x.png")
    call = ["segment", str(tmp_path / "model"), str(tmp_path / "x.png")]
    assert main([*call, "--output", str(tmp_path / "overlay.png"), "--json"]) == 0
    shares = json.loads(capsys.readouterr().out)
    assert sum(entry["share"] for entry in shares) == pytest.approx(1)
    with Image.open(tmp_path / "overlay.png") as painted:
        picture = np.asarray(painted)
    image, (net, config) = Image.open(tmp_path / "x.png"), load_segmenter(tmp_path / "model")
    assert np.array_equal(picture[:30, :50], overlay(np.asarray(image), segment(net, image, config["image_size"]), 5))
    for row, entry in enumerate(shares):  # a square of each class's color, the largest share first
        assert picture[6 + 18 * row, 56].tolist() == entry["color"]
    assert main(call) == 0
    assert shares[0]["class"] in capsys.readouterr().out.splitlines()[0]
    assert main([*call, "--output", str(tmp_path / "x.jpg")]) == 1
    assert "FILE.png" in capsys.readouterr().err
    assert main(["segment", str(tmp_path), str(tmp_path / "x.png")]) == 1
