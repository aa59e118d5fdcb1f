"""The command line, as a person would use it."""

import json
import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from PIL import Image

from etf_zoo import FrameClassifier, frame_heads
from etf_zoo.cli import share
from etf_zoo.cli.models import _head
from etf_zoo.frames import frame_report
from etf_zoo.sharing.folder import save_folder
from etf_zoo.weights.native import native_tags
from etf_zoo_cli import main
from tests.kinds import needs_onnx_exporter

HEAD_FIGURES = [
    *("frame", "width", "largest cosine", "coherence"),
    *("Rankin bound on the largest cosine", "Welch bound on the coherence"),
    *("equiangularity error", "tightness error", "feature norm", "logit scale"),
]


def assert_simplex(head, num_classes, width):
    cosine = -1 / (num_classes - 1)
    assert head["width"] == width
    assert head["largest cosine"] == pytest.approx(cosine, abs=1e-6)
    assert head["coherence"] == pytest.approx(-cosine, abs=1e-6)
    assert head["Rankin bound on the largest cosine"] == pytest.approx(cosine, abs=1e-6)
    welch = -cosine if width == num_classes - 1 else 0
    assert head["Welch bound on the coherence"] == pytest.approx(welch, abs=1e-6)
    assert head["equiangularity error"] < 1e-5
    assert head["tightness error"] < 1e-4


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(path)
    return str(path)


def test_list(capsys):
    assert main(["list", "resnet18*"]) == 0
    assert "resnet18_etf" in capsys.readouterr().out.split()
    assert main(["list", "--pretrained"]) == 0
    *here, last = capsys.readouterr().out.splitlines()
    embedded = here[: len(native_tags())]
    assert sorted(line.split()[0] for line in embedded) == sorted(native_tags())
    assert all(line.split()[1] == "embedded" for line in embedded)
    assert all("converted from the installed package" in line for line in here[len(embedded) :])
    assert last.startswith("and 1,")
    assert "more on the Hugging Face Hub" in last
    assert main(["list", "*", "--pretrained"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] == "embedded" for line in lines] == [True] * len(embedded) + [False] * (
        len(lines) - len(embedded)
    )
    assert f"and {len(lines) - len(here):,} more" in last
    sources = dict(line.split(maxsplit=1) for line in lines)
    assert sources["resnet18_etf.a1_in1k"] == "converted from hf-hub:timm/resnet18.a1_in1k"
    assert main(["list", "resnet18*", "--pretrained"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all(line.startswith("resnet18") and "_etf." in line for line in lines)


def test_info_of_a_twin_a_tag_and_a_folder(capsys, folder):
    assert main(["info", "mobilenetv3_small_100_etf", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["classes"] == 200
    assert_simplex(info["head classifier"], 200, 1024)
    assert info["head classifier"]["frame"] == "simplex ETF of 200 classes in 1024 dimensions"
    assert info["head classifier"]["logit scale"] == pytest.approx(199 / 200 * math.log(199 * 999), rel=1e-3)
    assert main(["info", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "apache-2.0" in out
    figures = [line.removeprefix("  ").split("  ")[0] for line in out.splitlines() if line.startswith("  ")]
    assert figures == HEAD_FIGURES
    assert main(["info", "vit_tiny_r_s16_p8_224_etf"]) == 0
    assert "converted, such as" in capsys.readouterr().out
    assert main(["info", "resnet10t_etf.c3_in1k"]) == 0  # without a download
    out = capsys.readouterr().out
    assert "converted from hf-hub:timm/resnet10t.c3_in1k (apache-2.0)" in out
    assert "simplex ETF of 1000 classes in 999 dimensions, in Helmert coordinates" in out
    for plain in ("resnet10t.c3_in1k", "resnet10t"):
        assert main(["info", plain, "--json"]) == 0
        info = json.loads(capsys.readouterr().out)
        assert info["head"] == "learned (not a fixed frame)"
        assert info["weights"] == "hf-hub:timm/resnet10t.c3_in1k (apache-2.0)"
    assert main(["info", "resnet10t_etf.c3_in1k", "--json"]) == 0
    assert_simplex(json.loads(capsys.readouterr().out)["head fc"], 1000, 999)


def test_info_of_frames_that_are_no_simplex_and_of_one_never_formed(capsys, tmp_path):
    model = timm.create_model("test_resnet_etf", num_classes=1000, frame="random")
    assert main(["info", str(save_folder(model, tmp_path)), "--json"]) == 0
    head, report = json.loads(capsys.readouterr().out)["head fc"], frame_report(model.fc.weight)
    assert head["largest cosine"] == pytest.approx(report.largest_cosine, abs=1e-6)
    assert head["coherence"] == pytest.approx(report.coherence, abs=1e-6)
    assert head["Rankin bound on the largest cosine"] == 0 < head["largest cosine"]
    assert head["Welch bound on the coherence"] == pytest.approx(report.welch_bound, abs=1e-6)
    assert 0 < head["Welch bound on the coherence"] < head["coherence"]
    assert head["equiangularity error"] == pytest.approx(report.equiangularity_error, rel=0.1)
    assert head["tightness error"] == pytest.approx(report.tightness_error, rel=0.1)
    assert main(["info", "test_vit_etf.r160_in1k", "--json"]) == 0
    assert_simplex(json.loads(capsys.readouterr().out)["head head"], 1000, 999)
    assert main(["info", "vit_tiny_patch16_224_etf.augreg_in21k", "--json"]) == 0  # 21,843 classes
    implicit = json.loads(capsys.readouterr().out)["head head"]
    assert_simplex(implicit, 21843, 21842)
    frame = "simplex ETF of 21843 classes in 21842 dimensions, in Helmert coordinates, computed and not stored"
    assert implicit["frame"] == frame
    assert list(implicit) == HEAD_FIGURES


def test_predict_shows_label_names(capsys, folder, image):
    assert main(["predict", str(folder), image, image, "--json", "--top", "3"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [len(r["predictions"]) for r in results] == [3, 3]
    assert {p["label"] for p in results[0]["predictions"]} <= set("abcde")
    assert main(["predict", str(folder), image]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == image
    assert len(lines) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "{folder}", "{folder}/config.json"], "config.json cannot be read: it is no image"),
        (["predict", "{folder}", "{folder}/nowhere.png"], "nowhere.png cannot be read: No such file"),
        (["info", "resnet18_etv"], "Did you mean resnet18_etf"),
        (["list", "nonsense"], "No model matches"),
        (["card", "{folder}"], "metrics.json is missing"),
        (["convert", "{folder}", "{folder}/out"], "has a fixed frame already"),
        (["convert", "resnet10t.c3_in1k", "{folder}/out"], "timm/resnet10t.c3_in1k is not in the cache"),
        (["convert", "weights.pth", "{folder}/out"], "pickles are not read"),
        (["convert", "{folder}", "{folder}/out", "--center", "train"], "mean features of --data"),
        (["export", "{folder}", "{folder}/out"], "--format plain (a checkpoint for stock timm) or --format onnx"),
        (["export", "{folder}", "{folder}/out", "--onnx", "--half"], "--half is for --format plain"),
        (["export", "{folder}", "{folder}/out", "--plain", "--output", "features"], "--output is for --format onnx"),
        (["export", "{folder}", "{folder}/out", "--onnx", "--top", "3"], "--output top_k gives: add that"),
        (["export", "{folder}", "{folder}/out", "--onnx", "--output", "top_k", "--top", "6"], "k lies between 1 and 5"),
        (["evaluate", "{folder}"], "Name the data to measure on"),
    ],
)
def test_errors_are_one_line(arguments, message, folder, capsys):
    assert main([a.format(folder=folder) for a in arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@needs_onnx_exporter
def test_export_of_the_best_of_many_classes(tmp_path, capsys):
    """What a device can hold of a Kerdock head: neither all logits nor the frame."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model = timm.create_model("test_resnet_etf", num_classes=60_000, frame="kerdock", neck="mlp", neck_features=256)
    save_folder(model.eval(), tmp_path / "model", half=False)
    arguments = ["export", str(tmp_path / "model"), str(tmp_path), "--format", "onnx", "--output", "top_k"]
    assert main([*arguments, "--top", "3"]) == 0
    file = tmp_path / "model.onnx"
    assert f"{file}: the same best classes" in capsys.readouterr().out
    assert file.stat().st_size < 10_000_000  # the frame is 61 MB
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    images = torch.randn(2, *timm.data.resolve_data_config(model=model)["input_size"])
    logits, classes = session.run(["logits", "classes"], {"images": images.numpy()})
    with torch.no_grad():
        expected = model(images).topk(3)
    assert classes.tolist() == expected.indices.tolist()
    torch.testing.assert_close(torch.from_numpy(logits), expected.values, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "given"),
    [([], ("logits", 5)), (["--output", "features"], ("features", 5)), (["--output", "top_k"], ("top_k", 5))],
)
def test_what_an_export_is_asked_for(options, given, folder, monkeypatch):
    asked = []
    monkeypatch.setattr(share, "export_onnx", lambda model, out, *, output, k: asked.append((output, k)) or out)
    assert main(["export", str(folder), "out", "--format", "onnx", *options]) == 0
    assert asked == [given]


@pytest.fixture
def image_folder(tmp_path):
    """Images by class in test/CLASS/, two of each of five classes, in another order than the model's."""
    rng = np.random.default_rng(0)
    for name in "edcba":
        (tmp_path / "images" / "test" / name).mkdir(parents=True)
        for i in range(2):
            pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / "test" / name / f"{i}.png")
    return str(tmp_path / "images")


def test_evaluate_on_a_folder_of_images(capsys, folder, image_folder, tmp_path):
    arguments = ["evaluate", str(folder), image_folder, "--split", "test", "--batch-size", "4", "--json"]
    tree = tmp_path / "tree.json"
    tree.write_text(json.dumps({"a": "x", "b": "x", "c": "y", "d": "y", "e": "y", "x": "root", "y": "root"}))
    assert main([*arguments, "--hierarchy", str(tree)]) == 0
    record = json.loads(capsys.readouterr().out)
    figures = record["results"]
    dataset = {"name": "images", "split": "test", "images": 10, "size": 32, "tree_height": 2.0}
    assert record["dataset"] == dataset
    assert 0 <= figures["top1"] <= 100
    assert "top5" not in figures  # of five classes it says nothing
    assert {"ece", "nc1_pinv", "nc4_agreement", "severity"} <= figures.keys()


def test_photos_are_turned_upright(capsys, folder, tmp_path):
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:20] = 255
    upright, turned = tmp_path / "upright.png", tmp_path / "turned.png"
    Image.fromarray(pixels).save(upright)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side: turn clockwise to look at it
    Image.fromarray(np.ascontiguousarray(np.rot90(pixels))).save(turned, exif=exif)
    assert main(["predict", str(folder), str(upright), str(turned), "--json", "--top", "5"]) == 0
    first, second = (r["predictions"] for r in json.loads(capsys.readouterr().out))
    assert first == second


def test_evaluate_refuses_images_without_labels(capsys, folder, tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("abcde"))})
    rows = {"image": [Image.new("RGB", (8, 8))] * 2, "label": [0, -1]}
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "test-0.parquet")
    assert main(["evaluate", str(folder), "--data", str(tmp_path / "data"), "--split", "test"]) == 1
    assert "label" in capsys.readouterr().err


def test_evaluate_refuses_classes_the_model_does_not_know(capsys, folder, image_folder):
    unknown = image_folder + "/test/zebra"
    Path(unknown).mkdir()
    Image.new("RGB", (8, 8)).save(unknown + "/0.png")
    assert main(["evaluate", str(folder), "--data", image_folder, "--split", "test"]) == 1
    assert "does not know 1 of the data's 6 classes, such as 'zebra'" in capsys.readouterr().err
    assert main(["evaluate", str(folder), "--data", image_folder, "--split", "train"]) == 1
    assert "Cannot load split 'train'" in capsys.readouterr().err


def test_convert_measures_before_and_after(capsys, image_folder, tmp_path):
    learned = timm.create_model("mobilenetv3_small_050", num_classes=5)
    cfg = {"input_size": (3, 32, 32), "license": "mit"}
    source = str(save_folder(learned, tmp_path / "learned", pretrained_cfg=cfg, label_names=list("abcde"), half=False))
    options = ["--data", image_folder, "--split", "test"]
    assert main(["convert", source, str(tmp_path / "exact"), *options]) == 0
    before, after, folder = capsys.readouterr().out.splitlines()
    assert before.startswith("before  top-1")
    assert before.removeprefix("before") == after.removeprefix("after ")
    assert folder == str(tmp_path / "exact")
    arguments = ["convert", source, str(tmp_path / "nearest"), "--mode", "nearest", "--center", "test", *options]
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[0] == before
    card = (tmp_path / "nearest" / "README.md").read_text()
    assert f"`etf-zoo {' '.join(arguments)}`" in card
    assert "On 10 images of images (test)" in card
    assert main(["info", str(tmp_path / "exact")]) == 0
    assert "mit" in capsys.readouterr().out


def test_export(capsys, folder, tmp_path):
    assert main(["export", str(folder), str(tmp_path / "out"), "--format", "plain", "--half"]) == 0
    assert "same top-1 predictions, another softmax" in capsys.readouterr().out
    assert not frame_heads(timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True))


@pytest.mark.parametrize("command", ["export", "convert"])
def test_a_model_is_not_written_over(command, capsys, folder):
    before = (folder / "config.json").read_text()
    extra = ["--format", "plain"] if command == "export" else []
    for out in (folder, folder.parent):  # the folder of a run holds its model in model/
        assert main([command, str(folder), str(out), *extra]) == 1
        assert "holds a model already: choose another folder" in capsys.readouterr().err
    assert (folder / "config.json").read_text() == before


def test_an_index_without_a_folder_is_refused_at_once(capsys, folder, image, monkeypatch):
    monkeypatch.setattr("etf_zoo.cli.search.load_model", None)
    assert main(["embed", str(image), "--model", str(folder), "--output", "nowhere/i.safetensors"]) == 1
    assert "no folder for --output nowhere/i.safetensors: make it first" in capsys.readouterr().err


def test_info_of_a_frame_of_a_million_classes():
    """Closed forms: nothing of K x K, nor of K x d, is computed."""
    found = _head(FrameClassifier(1024, 1_050_624, frame="kerdock"))
    assert found["frame"].endswith("computed and not stored")
    assert (found["largest cosine"], found["coherence"], found["tightness error"]) == (1 / 32, 1, 0)
    assert found["Welch bound on the coherence"] == pytest.approx(1 / 32, abs=1e-4)
