"""Rows from parquet files, image folders and `datasets`: splits, classes, and what a wrong one says."""

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from etf_zoo.images import UnreadableImageError, read_image
from etf_zoo.trainer.data.decode import SHOWN, Corrupt, encoded
from etf_zoo.trainer.data.sources import open_rows
from etf_zoo.trainer.recipe.config import Data
from tests.made_data import numbers, picture, png, write_folder, write_parquet


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


def rows(source, split="train", resident=True, **settings):
    return open_rows(Data(str(source), **settings), split, resident=resident)


def pictures(found):
    return numbers(np.asarray(read_image(found.encoded(i))) for i in range(len(found)))


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


def test_a_training_split_alone_has_a_share_held_out(tmp_path):
    write_folder(tmp_path / "made", {".": {"b": range(20), "a": range(20, 30)}})
    train, test = (rows(tmp_path / "made", split, test_share=0.2) for split in ("train", "validation"))
    assert (train.name, test.name) == ("train", "held out")
    assert (train.class_counts(), test.class_counts()) == ([8, 16], [2, 4])
    assert sorted(pictures(train) + pictures(test)) == list(range(30))
    assert pictures(rows(tmp_path / "made", "test", test_share=0.2)) == pictures(test)  # whatever it is called
    assert rows(tmp_path / "made", test_share=0.5).class_counts() == [5, 10]
    assert rows(tmp_path / "made").class_counts() == [10, 20]
    with pytest.raises(ValueError, match=r"it has train.*--data.test_share 0.2"):
        rows(tmp_path / "made", "validation")
    write_folder(tmp_path / "few", {"train": {"b": [1], "a": [2]}})
    with pytest.raises(ValueError, match="no images to test on, and none can be held out"):
        rows(tmp_path / "few", test_share=0.2)


def test_another_name_of_the_held_out_split(tmp_path):
    write_parquet(tmp_path / "one", {"train": [0, 1], "test": [1]}, names=["x", "y"])
    assert rows(tmp_path / "one", "validation").name == "test"
    with pytest.raises(ValueError, match=r"Cannot load split 'trian' of .*one': it has test, train"):
        rows(tmp_path / "one", "trian")
    write_parquet(tmp_path / "two", {"train": [0, 1], "test": [1], "val": [0]}, names=["x", "y"])
    assert rows(tmp_path / "two", "validation").name == "val"
    assert rows(tmp_path / "two", "test").name == "test"
    write_parquet(tmp_path / "more", {"train": [0, 1], "test": [1], "val": [0], "valid": [0]}, names=["x", "y"])
    with pytest.raises(ValueError, match=r"it has test, train, val, valid. Set --data.train_split and --data.val"):
        rows(tmp_path / "more", "validation")


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


def _saved(folder):
    picture(4).save(folder / "4.png")
    return str(folder / "4.png")


def test_paths_in_rows_lead_nowhere_but_into_the_data(tmp_path):
    (tmp_path / "data").mkdir()
    inside, outside = _saved(tmp_path / "data"), _saved(tmp_path)
    below = (str(tmp_path / "data"), "hf://datasets/a/b@")
    content = (tmp_path / "4.png").read_bytes()
    assert encoded(tmp_path / "4.png") == content  # found by looking, not named by a row
    for text in ("4.png", inside, "sub/../4.png"):
        assert encoded({"bytes": None, "path": text}, below) == content
        assert encoded(text, below) == content
    (tmp_path / "data" / "link.png").symlink_to(outside)
    addresses = [
        f"file://{inside}",
        "ftp://x/y.png",
        "hf://datasets/a/other@main/x.png",
        "zip://x::hf://datasets/c/d@m/z",
    ]
    for text in (outside, "../4.png", "link.png", "/etc/passwd", *addresses):
        with pytest.raises(UnreadableImageError, match="not opened"):
            encoded({"bytes": None, "path": text}, below)
    for item in (None, {"bytes": None, "path": None}, {"bytes": None, "path": "absent.png"}):
        with pytest.raises(UnreadableImageError):
            encoded(item, below)


def test_a_parquet_row_does_not_choose_a_file(tmp_path):
    secret = _saved(tmp_path)
    images = [{"bytes": png(3), "path": None}, {"bytes": None, "path": secret}]
    (tmp_path / "made").mkdir()
    pq.write_table(pa.table({"image": images, "label": [0, 1]}), tmp_path / "made" / "train.parquet")
    for resident in (True, False):
        found = rows(tmp_path / "made", resident=resident)
        assert pictures(found.subset(np.array([0]))) == [3]
        with pytest.raises(UnreadableImageError, match="not opened"):
            found.encoded(1)


def test_corrupt_images_are_counted(tmp_path, monkeypatch):
    corrupt = Corrupt(0.02, 100, "birds")
    corrupt.warn()  # nothing to say
    corrupt.add("row 3", "broken")
    corrupt.add("row 9", "empty")
    corrupt.check()
    with pytest.warns(UserWarning, match=r"2 of 100 images of birds cannot be read: row 3 \(broken\), row 9 \(empty\)"):
        corrupt.warn()
    monkeypatch.setenv("ETF_ZOO_CACHE", str(tmp_path))
    for i in range(SHOWN):
        corrupt.add(f"row {20 + i}", "broken")
    with pytest.raises(
        ValueError, match=r"22 of 100 .* and 2 more, all in .*birds.txt.* --data.max_corrupt 0.02"
    ) as said:
        corrupt.check()
    assert str(said.value).count("row ") == SHOWN
    assert len((tmp_path / "unreadable" / "birds.txt").read_text().splitlines()) == 22


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": -1}, r"data.size .* in \[0, 10000\].*got -1"),
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
