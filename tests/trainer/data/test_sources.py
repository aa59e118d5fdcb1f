"""Rows from parquet files, image folders and `datasets`: splits, classes, and what a wrong one says."""

import io
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from etf_zoo.trainer.data.decode import Corrupt, Unreadable, decode, encoded
from etf_zoo.trainer.data.sources import open_rows
from etf_zoo.trainer.recipe.config import Data
from tests.made_data import numbers, picture, png, write_folder, write_parquet


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


def rows(source, split="train", resident=True, **settings):
    return open_rows(Data(str(source), **settings), split, resident=resident)


def pictures(found):
    return numbers(np.asarray(decode(found.encoded(i))) for i in range(len(found)))


@pytest.mark.parametrize("resident", [True, False])
def test_parquet(tmp_path, resident):
    write_parquet(tmp_path / "made", {"train": [2, 0, 1, 1], "validation": [1, 0]}, names=["x", "y", "z"], shards=2)
    found = rows(tmp_path / "made", resident=resident)
    assert found.labels.tolist() == [2, 0, 1, 1]
    assert found.labels.dtype == np.int64
    assert found.label_names == ["x", "y", "z"]
    assert pictures(found) == [0, 1, 2, 3]
    assert found.where(2) == "row 2 of train"
    part = found.subset(np.array([3, 0, 1])).subset(np.array([True, False, True]))
    assert (pictures(part), part.labels.tolist(), part.where(1)) == ([3, 1], [1, 0], "row 1 of train")
    assert pictures(pickle.loads(pickle.dumps(found))) == [0, 1, 2, 3]  # as worker processes get them
    assert rows(tmp_path / "made", "validation", resident=resident).labels.tolist() == [1, 0]


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("layout", ["train.parquet", "train/0000.parquet", "train-00000-of-00001-0123abcd.parquet"])
def test_parquet_layouts(tmp_path, layout, resident):
    write_parquet(tmp_path / "made", {"train": [0, 1]}, names=["x", "y"])
    target = tmp_path / "moved" / layout
    target.parent.mkdir(parents=True)
    next((tmp_path / "made" / "data").iterdir()).rename(target)
    assert pictures(rows(tmp_path / "moved", resident=resident)) == [0, 1]
    assert pictures(rows(target, resident=resident)) == [0, 1]  # the file itself


def test_texts_become_classes_of_the_training_split(tmp_path):
    write_parquet(tmp_path / "made", {"train": ["wren", "auk", "tit"], "test": ["tit", "tit"]})
    assert rows(tmp_path / "made").label_names == ["auk", "tit", "wren"]
    assert rows(tmp_path / "made").labels.tolist() == [2, 0, 1]
    assert rows(tmp_path / "made", "test").labels.tolist() == [1, 1]
    write_parquet(tmp_path / "more", {"train": ["wren", "auk"], "test": ["tit", "auk", "owl"]})
    with pytest.raises(ValueError, match=r"'test' of .*more: the training split has no class owl, tit"):
        rows(tmp_path / "more", "test")


def test_numbers_without_names(tmp_path):
    write_parquet(tmp_path / "made", {"train": [0, 4, 1], "test": [1, 2], "val": [5]})
    for split in ("train", "test"):
        assert rows(tmp_path / "made", split).label_names == list("01234")
    with pytest.raises(ValueError, match="labels 5 to 5, but the training split has classes 0 to 4"):
        rows(tmp_path / "made", "val")


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [([0, -1], ["x", "y"], "labels -1 to 0"), ([0, None], None, "rows without a label")],
)
def test_labels_that_are_no_classes(tmp_path, labels, names, message):
    write_parquet(tmp_path / "made", {"train": labels}, names=names)
    with pytest.raises(ValueError, match=message):
        rows(tmp_path / "made")


def test_image_folder(tmp_path):
    write_folder(
        tmp_path, {"train": {"b": [3, 1], "a": [2], "empty": []}, "val": {"a": [7], "b": [8]}, "test": {"c": [9]}}
    )
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "b" / "deeper").mkdir()
    picture(5).save(tmp_path / "train" / "b" / "deeper" / "5.png")
    found = rows(tmp_path)
    assert (pictures(found), found.labels.tolist(), found.label_names) == ([2, 1, 3, 5], [0, 1, 1, 1], ["a", "b"])
    assert found.where(0) == str(tmp_path / "train" / "a" / "002.png")
    assert rows(tmp_path, "val").labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match="the training split has no class c"):
        rows(tmp_path, "test")


def test_folder_of_classes_alone(tmp_path):
    write_folder(tmp_path, {".": {"b": [3], "a": [2, 4]}})
    found = rows(tmp_path)
    assert (pictures(found), found.labels.tolist(), found.name) == ([2, 4, 3], [0, 0, 1], "train")
    with pytest.raises(ValueError, match="it has train"):
        rows(tmp_path, "validation")


def test_another_name_of_the_held_out_split(tmp_path):
    write_parquet(tmp_path / "one", {"train": [0, 1], "test": [1]}, names=["x", "y"])
    with pytest.warns(UserWarning, match="no split 'validation': 'test' takes its place"):
        assert rows(tmp_path / "one", "validation").name == "test"
    with pytest.raises(ValueError, match=r"Cannot load split 'trian' of .*one': it has test, train"):
        rows(tmp_path / "one", "trian")
    write_parquet(tmp_path / "two", {"train": [0, 1], "test": [1], "val": [0]}, names=["x", "y"])
    with pytest.raises(ValueError, match=r"it has test, train, val. Set --data.train_split and --data.val_split"):
        rows(tmp_path / "two", "validation")


def test_several_data_sets_in_a_folder(tmp_path):
    write_parquet(tmp_path / "both" / "birds", {"train": [0, 1]})
    write_parquet(tmp_path / "both" / "cars", {"train": [0, 1]})
    with pytest.raises(
        ValueError, match=r"several data sets with a split 'train': set --data.source to one of .*birds"
    ):
        rows(tmp_path / "both")


def test_columns_that_are_no_images_or_labels(tmp_path):
    write_parquet(tmp_path / "made", {"train": [0, 1]})
    with pytest.raises(ValueError, match="holds int64, not images"):
        rows(tmp_path / "made", image_column="label", label_column="image")
    pq.write_table(pa.table({"image": [png(6)], "label": [0.5], "class": [0]}), tmp_path / "plain.parquet")
    with pytest.raises(ValueError, match=r"expected class numbers or names, got 0.5. Set --data.label_column"):
        rows(tmp_path / "plain.parquet")
    assert pictures(rows(tmp_path / "plain.parquet", label_column="class")) == [6]
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(ValueError, match=r"Cannot load split 'train' of .*bad"):
        rows(tmp_path / "bad")


def test_without_datasets(tmp_path, monkeypatch):
    write_parquet(tmp_path / "made", {"train": [1, 0]}, names=["x", "y"])
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    assert pictures(rows(tmp_path / "made")) == [0, 1]
    for source in (tmp_path / "made", "some/name"):
        with pytest.raises(ValueError, match=r"without the package datasets: .*training/prepare.py"):
            rows(source, resident=False)


# --------------------------------------------------------------------------------------------------------- one image


def test_decode(tmp_path):
    assert np.array_equal(decode(png(3)), picture(3))
    assert np.array_equal(decode(encoded({"bytes": None, "path": _saved(tmp_path)})), picture(4))
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    picture(3).save(turned, "png", exif=exif)
    assert np.array_equal(decode(turned.getvalue()), picture(3).transpose(Image.Transpose.ROTATE_270))
    gray = io.BytesIO()
    picture(3).convert("LA").save(gray, "png")
    assert decode(gray.getvalue()).mode == "RGB"


def _saved(folder):
    picture(4).save(folder / "4.png")
    return str(folder / "4.png")


def test_unreadable(tmp_path):
    jpeg = io.BytesIO()
    picture(3, (64, 64)).save(jpeg, "jpeg")
    for data in (b"", b"no image", png(3)[:-40], png(3)[:60], jpeg.getvalue()[:300], b"GIF89a", png(3)[:8] + b"x" * 99):
        with pytest.raises(Unreadable):
            decode(data)
    for item in (None, {"bytes": None, "path": None}, tmp_path / "absent.png", f"file://{tmp_path}/absent.png"):
        with pytest.raises(Unreadable):
            encoded(item)
    assert encoded(f"file://{_saved(tmp_path)}") == (tmp_path / "4.png").read_bytes()


def test_corrupt_images_are_counted():
    corrupt = Corrupt(0.02, 100, "birds")
    corrupt.warn()  # nothing to say
    corrupt.add("row 3", "broken")
    corrupt.add("row 9", "empty")
    with pytest.warns(UserWarning, match=r"2 of 100 images of birds cannot be read: row 3 \(broken\), row 9 \(empty\)"):
        corrupt.warn()
    with pytest.raises(ValueError, match=r"3 of 100 .* more than --data.max_corrupt 0.02 allows"):
        corrupt.add("row 11", "broken")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, r"data.size .* in \[1, 10000\], got 0"),
        ({"workers": -1}, r"data.workers .* in \[0, 1024\], got -1"),
        ({"limit": -5}, "0 for all"),
        ({"max_corrupt": 2.0}, r"data.max_corrupt .* in \[0, 1\], got 2.0"),
        ({"image_column": "x", "label_column": "x"}, "one column"),
        ({"streaming": True, "resident": True}, "never resident"),
        ({"streaming": True, "limit": 5}, "train_images"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Data("x", **settings)
