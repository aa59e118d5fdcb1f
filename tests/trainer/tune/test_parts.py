"""Which images a fine-tuning trains on, chooses by and tests on, and what it says of them."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from etf_zoo.trainer.finetune import license_note
from etf_zoo.trainer.recipe.config import Data, Loss, Recipe
from etf_zoo.trainer.recipe.parsing import parse_entries
from etf_zoo.trainer.tune.parts import load_data
from etf_zoo.trainer.tune.tuning import Finetune, fine_tune
from tests.trainer.data.test_duplicates import save, scene


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ETF_ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ETF_ZOO_DATA", str(tmp_path / "nowhere"))


def photos(folder, **counts):
    """`SPLIT/CLASS/N.png` of scenes that differ; counts: {split: {class: images}}, the split `_` for none."""
    seed = iter(range(10_000))
    for split, classes in counts.items():
        for name, count in classes.items():
            save(folder / split.strip("_") / name, {f"{i}.png": scene(next(seed)) for i in range(count)})
    return folder


def load(folder, size=16, **settings):
    data = Data(str(folder), size=size, **settings.pop("data", {}))
    return load_data(Finetune(model="test_resnet", pretrained=False, data=data, sizes=[[0, 16]], **settings))


BOTH = {"a": 6, "b": 5}


@pytest.mark.parametrize("size", [16, 200])  # resident, and not
def test_training_and_one_other_split(tmp_path, size):
    parts = load(photos(tmp_path / "x", train=BOTH, val={"a": 2, "b": 1}), size)
    assert (parts.train.name, parts.test.name, parts.watched) == ("train", "val", None)
    assert parts.data.report_split == "validation"
    text = "\n".join(parts.lines)
    assert "training (train): 11 images of 2 classes (a 6, b 5)" in text
    assert "test (val): 3 images of 2 classes (a 2, b 1)" in text
    assert "Few images of a class: all are trained on, and nothing is held out to choose by (--holdout)" in text
    assert len(parts.lines) == 4  # nothing odd
    told = "\n".join(load(tmp_path / "x", size, holdout=0.1).lines)
    assert "To choose by, 10 % of each class of the training images are held out (--holdout)" in told
    assert parts.groups.tolist() == list(range(11))


def test_validation_chooses_and_the_test_is_opened_once(tmp_path):
    folder = photos(tmp_path / "x", train=BOTH, Valid={"a": 2, "b": 1}, test={"a": 1, "b": 3})
    parts = load(folder)
    assert (parts.watched.name, parts.test.name) == ("Valid", "test")
    assert (parts.data.val_split, parts.data.test_split, parts.data.report_split) == ("Valid", "test", "test")
    assert "held out" not in "\n".join(parts.lines)
    one = load(folder, data={"val_split": "test"})  # as the recipes of the tables say it
    assert (one.test.name, one.watched, one.data.report_split) == ("test", None, "test")
    again = load(folder, data={"val_split": "Valid", "test_split": "test"})  # as a saved recipe says it
    assert (again.watched.name, again.test.name) == ("Valid", "test")


@pytest.mark.parametrize("split", ["train", "_"])
def test_a_training_split_alone(tmp_path, split):
    parts = load(photos(tmp_path / "x", **{split: {"a": 20, "b": 10}}))
    assert (parts.train.class_counts(), parts.test.class_counts()) == ([16, 8], [4, 2])
    text = "\n".join(parts.lines)
    assert "test (held out): 6 images" in text
    assert "The data have no split to test on: 20 % of each class are held out, images that look the same" in text


def test_images_that_look_the_same_are_held_out_together(tmp_path):
    folder = photos(tmp_path / "x", _={"a": 12, "b": 12})
    for i in range(12):
        image = scene(i).resize((100, 75))
        save(folder / "a", {f"{i}_small.png": image})
    parts = load(folder)
    names = []
    for part in (parts.train, parts.test):
        files = [Path(part.where(i)).stem for i in np.flatnonzero(part.labels == 0)]
        names.append({file.removesuffix("_small") for file in files})
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 12


@pytest.mark.parametrize("data", [{"val_split": "train"}, {"test_split": "train"}])
def test_the_training_images_are_no_test(tmp_path, data):
    for folder in (photos(tmp_path / "x", train=BOTH), photos(tmp_path / "y", train=BOTH, val=BOTH)):
        with pytest.raises(ValueError, match=r"are the training images of .*says nothing"):
            load(folder, data=data)


def test_a_copy_of_the_training_images_is_no_test(tmp_path):
    folder = photos(tmp_path / "x", train=BOTH)
    shutil.copytree(folder / "train", folder / "val")
    with pytest.raises(ValueError, match=r"are the training images of .* \(split 'val'\)"):
        load(folder)


@pytest.mark.parametrize("size", [16, 200])
def test_images_on_both_sides_are_said(tmp_path, size):
    folder = photos(tmp_path / "x", train=BOTH, val={"a": 2, "b": 1})
    shutil.copy(folder / "train/a/3.png", folder / "val/a/copy.png")
    shutil.copy(folder / "train/a/4.png", folder / "val/b/wrong.png")
    save(folder / "val/b", {"small.png": scene(7).resize((100, 75))})
    text = "\n".join(load(folder, size).lines)
    copies = "test (val): 2 images are in training too, 1 of them with another label, such as val/a/copy.png "
    assert copies + "(there train/a/3.png)" in text
    if size == 200:  # whole images; at 16 pixels the smaller one is another by rounding alone
        assert "test (val): 1 image is much like one in training, such as val/b/small.png" in text


def test_classes_that_are_missing_or_few(tmp_path):
    folder = photos(tmp_path / "x", train={"a": 30, "b": 3, "c": 5}, val={"a": 2, "b": 1})
    text = "\n".join(load(folder).lines)
    assert "test (val): no image of c" in text
    assert "--loss.class_weights true" in text
    assert "class_weights" not in "\n".join(load(folder, loss=Loss(class_weights=True)).lines)
    with pytest.raises(ValueError, match="the training split has no class d"):
        load(photos(tmp_path / "y", train=BOTH, val={"d": 1}))


def test_many_classes_are_not_listed(tmp_path):
    text = "\n".join(
        load(photos(tmp_path / "x", train={f"c{i:02d}": 2 + (i == 7) for i in range(21)}, val={"c01": 1})).lines
    )
    assert "43 images of 21 classes (largest c07 3, smallest c20 2)" in text
    assert "test (val): no image of c00, c02, c03, c04, c05 and 15 more" in text


def test_all_bad_files_are_named_before_training(tmp_path):
    folder = photos(tmp_path / "x", train={"a": 15, "b": 15}, val=BOTH)
    for i in range(12):
        (folder / f"train/a/{i}.png").write_bytes(b"no image")
        (folder / f"train/b/{i}.png").write_bytes(b"")
    for size in (16, 200):
        with pytest.raises(ValueError, match=r"24 of 30 images .* and 4 more, all in .*unreadable/x.txt") as said:
            load(folder, size)
        assert str(said.value).count(".png (") == 20
        assert "0x" not in str(said.value)  # no address of an object


@pytest.mark.parametrize("method", ["full", "ncm"])
@pytest.mark.filterwarnings("ignore:.*They are left out")
def test_a_few_bad_files_are_left_out(tmp_path, method):
    """Of images that are not resident, too, whose features are wanted for the holdout and for probes."""
    folder = photos(tmp_path / "x", train={"a": 15, "b": 15}, val=BOTH)
    for name in ("train/a/3.png", "val/b/0.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:60])
    settings = {"method": method, "data": {"max_corrupt": 0.2}, "holdout": 0.2, "epochs": 1, "batch_size": 8}
    parts = load(folder, 200, **settings)
    assert (len(parts.train), len(parts.groups), len(parts.test)) == (29, 29, 10)
    assert not any(parts.train.where(row).endswith("a/3.png") for row in range(29))
    settings |= {"data": Data(str(folder), size=200, max_corrupt=0.2), "output": str(tmp_path / "run")}
    recipe = Finetune(model="test_resnet", pretrained=False, sizes=[[0, 16]], tensorboard=False, **settings)
    tuned = fine_tune(recipe, parts.train, parts.test, groups=parts.groups)
    assert tuned.figures()["images"] == 10


def test_pretraining_reads_the_same_layouts(tmp_path):
    recipe = parse_entries(Recipe, {"data": {"source": str(photos(tmp_path / "x", _=BOTH))}})
    assert load_data(recipe).test.class_counts() == [1, 1]


@pytest.mark.parametrize(
    ("model", "pretrained", "said"),
    [
        ("mobilenetv3_small_100_etf", True, True),
        ("mobilenetv3_small_100_etf", False, False),
        ("resnet18.a1_in1k", True, False),
    ],
)
def test_terms_of_the_weights(model, pretrained, said):
    note = license_note(Finetune(model=model, pretrained=pretrained))
    assert bool(note) == said
    if said:
        assert note[0].endswith("under CC-BY-NC-4.0, without commercial use; so is the result.")


def test_names_of_classes_cannot_steer_a_terminal(tmp_path):
    names = {"a\x1b[2J": 2, "b": 2}
    lines = load(photos(tmp_path / "x", train=names, val=names)).lines
    assert "\x1b" not in "".join(lines)
    assert any(r"a\x1b[2J" in line for line in lines)
