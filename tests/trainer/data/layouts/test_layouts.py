"""Folders, tables and zip files of photos as people have them: what is found, what is said, what is refused."""

import io
import os
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from etf_zoo.images import image_extensions, read_image
from etf_zoo.trainer.data.layouts import find_files, role
from etf_zoo.trainer.data.layouts.folder import walk
from etf_zoo.trainer.data.sources import open_rows
from etf_zoo.trainer.recipe.config import Data
from tests.made_data import picture, png


def write(folder, files):
    """Files by path; a number is a picture in the format of the ending, None a folder, anything else the content."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir(exist_ok=True)
        elif isinstance(content, int):
            file = io.BytesIO()
            kind = Image.registered_extensions().get(path.suffix.lower(), "PNG")
            picture(content).save(file, kind)
            path.write_bytes(file.getvalue())
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def classes(found):
    """Images of each class by split: {"train": {"a": 2}}."""
    return {split: dict(sorted(found.counts(split).items())) for split in found.splits}


TWO = {"a": 1, "b": 1}
SPLIT = {"train/a/1.png": 1, "train/b/2.png": 2, "val/a/3.png": 3, "val/b/4.png": 4}
TRAIN_VAL = {"train": TWO, "val": TWO}
HEIC = b"\x00\x00\x00\x18ftypheic no more"

# name: files, what is found, what is said
LAYOUTS = {
    "splits": (SPLIT, TRAIN_VAL, ()),
    "three splits": ({**SPLIT, "test/a/5.png": 5, "test/b/6.png": 6}, {**TRAIN_VAL, "test": TWO}, ()),
    "other names of splits": (
        {"training/a/1.png": 1, "training/b/2.png": 2, "valid/a/3.png": 3, "testing/b/4.png": 4},
        {"training": TWO, "valid": {"a": 1}, "testing": {"b": 1}},
        (),
    ),
    "capitals": ({"Train/a/1.png": 1, "Train/b/2.png": 2, "VAL/a/3.png": 3}, {"Train": TWO, "VAL": {"a": 1}}, ()),
    "training alone": ({"train/a/1.png": 1, "train/b/2.png": 2}, {"train": TWO}, ()),
    "classes alone": ({"a/1.png": 1, "b/2.png": 2}, {"train": TWO}, ("a folder for each class",)),
    "splits in classes": (
        {"a/train/1.png": 1, "b/Train/2.png": 2, "a/val/3.png": 3},
        {"train": TWO, "val": {"a": 1}},
        ("a folder for each class and split",),
    ),
    "a folder around": ({f"photos/{k}": v for k, v in SPLIT.items()}, TRAIN_VAL, ("taken from photos/",)),
    "two folders around": ({f"x/y/{k}": v for k, v in SPLIT.items()}, TRAIN_VAL, ("taken from x/y/",)),
    "a folder around classes": ({"photos/a/1.png": 1, "photos/b/2.png": 2}, {"train": TWO}, ("taken from photos/",)),
    "figures beside the data": (
        {**{f"data/{k}": v for k, v in SPLIT.items()}, "figures/plot.png": 9},
        TRAIN_VAL,
        ("1 images outside data/, such as figures/plot.png",),
    ),
    "a folder that is no split": (
        {**SPLIT, "extra/a/9.png": 9},
        TRAIN_VAL,
        ("1 images outside the folders of splits, such as extra/a/9.png",),
    ),
    "images in no class": (
        {**SPLIT, "train/8.png": 8, "train/9.png": 9, "test/7.png": 7},
        TRAIN_VAL,
        ("3 images in no class folder, such as test/7.png",),
    ),
    "deeper folders of a class": (
        {"train/a/images/1.png": 1, "train/b/images/2.png": 2, "train/b/3.png": 3},
        {"train": {"a": 1, "b": 2}},
        ("1 to 2 folders deep",),
    ),
    "groups of classes": (
        {"train/red/rose/1.png": 1, "train/red/tulip/2.png": 2, "train/blue/iris/3.png": 3},
        {"train": {"blue": 1, "red": 2}},
        (
            "outer folders, 2: blue, red",
            "Level 2 has 3 folders: iris, rose, tulip. To take these: --data.class_level 2",
        ),
    ),
    "an empty class": ({**SPLIT, "train/c": None}, TRAIN_VAL, ("Empty folders, which are no classes: train/c",)),
    "a folder of documents": ({**SPLIT, "train/notes/x.txt": "."}, TRAIN_VAL, ("no classes: train/notes",)),
    "some photos of a phone": (
        {**SPLIT, "train/a/1.heic": HEIC, "train/b/2.HEIC": HEIC},
        TRAIN_VAL,
        ("2 .heic files (pip install pillow-heif), such as train/a/1.heic",),
    ),
    "some raw photos": ({**SPLIT, "train/a/1.CR2": b"raw"}, TRAIN_VAL, ("1 .cr2 files (raw photos: convert",)),
    "videos": ({**SPLIT, "train/a/1.mp4": b"film"}, TRAIN_VAL, ("1 .mp4 files (videos)",)),
    "a Mac's leavings": (
        {**SPLIT, "train/a/._1.png": b"fork", "__MACOSX/train/a/._1.png": b"fork", "train/.DS_Store": b"x"},
        TRAIN_VAL,
        (),
    ),
    "other systems' leavings": (
        {**SPLIT, "train/a/Thumbs.db": b"x", "train/a/@eaDir/1.png": 1, "val/desktop.ini": b"x", ".git/a/1.png": 1},
        TRAIN_VAL,
        (),
    ),
    "a class with two dots": ({"train/..a/1.png": 1, "train/b/2.png": 2}, {"train": {"..a": 1, "b": 1}}, ()),
    "no ending": (
        {**SPLIT, "train/a/photo": png(7), "train/b/note": "text"},
        {**TRAIN_VAL, "train": {"a": 2, "b": 1}},
        (),
    ),
    "a wrong ending": ({**SPLIT, "train/a/7.download": png(7)}, {**TRAIN_VAL, "train": {"a": 2, "b": 1}}, ()),
    "names of the world": (
        {"train/Größe ß/1.png": 1, "train/日本 語/2.png": 2, "val/日本 語/ü.png": 3},
        {"train": {"Größe ß": 1, "日本 語": 1}, "val": {"日本 語": 1}},
        (),
    ),
    "a hierarchy and a README": ({**SPLIT, "hierarchy.json": "{}", "README.md": "x", "LICENSE": "x"}, TRAIN_VAL, ()),
    "a table": (
        {"labels.csv": "path,label\nx/1.png,a\nx/2.png,b\n", "x/1.png": 1, "x/2.png": 2},
        {"train": TWO},
        ("column 'path'",),
    ),
    "a table with splits": (
        {
            "t.csv": "file,class,split\n1.png,a,Train\n2.png,b,Train\n3.png,a,Test\n",
            **{f"{i}.png": i for i in (1, 2, 3)},
        },
        {"Train": TWO, "Test": {"a": 1}},
        (),
    ),
    "a table for each split": (
        {
            "train.csv": "id,breed\n1,a\n2,b\n",
            "test_labels.csv": "id,breed\n3,a\n",
            **{f"images/{i}.jpg": i for i in (1, 2, 3)},
        },
        {"train": TWO, "test": {"a": 1}},
        (),
    ),
    "a table without a heading": ({"l.csv": "1.png,a\n2.png,b\n", "1.png": 1, "2.png": 2}, {"train": TWO}, ()),
    "a table of a spreadsheet": (
        {"l.csv": "\ufeffFilename;Species\r\nimages\\1.png;a\r\n2.png;b\r\n", "images/1.png": 1, "2.png": 2},
        {"train": TWO},
        ("'Filename'", "'Species'"),
    ),
    "a table with tabs": ({"l.tsv": "image\tlabel\n1.png\ta\n2.png\tb\n", "1.png": 1, "2.png": 2}, {"train": TWO}, ()),
    "a table without some labels": (
        {"l.csv": "image,label\n1.png,a\n2.png,b\n3.png,\n", **{f"{i}.png": i for i in (1, 2, 3)}},
        {"train": TWO},
        ("1 rows without a label, such as row 4 of l.csv",),
    ),
    "metadata": (
        {"metadata.csv": "file_name,label\nx/1.png,a\nx/2.png,b\n", "x/1.png": 1, "x/2.png": 2},
        {"train": TWO},
        (),
    ),
    "metadata in splits": (
        {
            "Train/metadata.jsonl": '{"file_name": "1.png", "label": "a"}\n{"file_name": "2.png", "label": "b"}\n',
            "Val/metadata.jsonl": '{"file_name": "3.png", "label": "a"}\n',
            "Train/1.png": 1,
            "Train/2.png": 2,
            "Val/3.png": 3,
        },
        {"Train": TWO, "Val": {"a": 1}},
        (),
    ),
    "metadata of something else": (
        {**SPLIT, "metadata.csv": "file_name,width,height\ntrain/a/1.png,3,4\n"},
        TRAIN_VAL,
        ("The folders name the classes, and not the table",),
    ),
    "a table beside classes": ({**SPLIT, "labels.csv": "path,label\ntrain/a/1.png,x\n"}, TRAIN_VAL, ()),
}
ENDINGS = (
    ".jpg",
    ".JPEG",
    ".jfif",
    ".jpe",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".ppm",
    ".pgm",
    ".tif",
    ".TIFF",
    ".jp2",
    ".avif",
)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(tmp_path, name):
    files, expected, said = LAYOUTS[name]
    found = find_files(write(tmp_path / "photos", files))
    assert classes(found) == expected
    text = "\n".join(found.lines())
    for part in said:
        assert part in text
    if name in ("splits", "three splits", "a Mac's leavings", "other systems' leavings", "a hierarchy and a README"):
        assert len(found.lines()) == 1  # the layout, and nothing to warn of
    for split, rows in found.splits.items():
        for path, label in rows:
            assert read_image(path).size == (30, 20)
            assert role(label) == ""
            assert role(split)


@pytest.mark.parametrize("name", ["splits", "capitals", "classes alone", "a table", "a folder around"])
def test_a_zip_file_is_what_it_holds(tmp_path, monkeypatch, name):
    monkeypatch.setenv("ETF_ZOO_CACHE", str(tmp_path / "cache"))
    files, expected, _ = LAYOUTS[name]
    folder = write(tmp_path / "photos", files)
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            archive.write(file, file.relative_to(folder))
        archive.writestr("__MACOSX/train/a/._1.png", b"fork")
    for _ in range(2):  # unpacked, and found unpacked
        found = find_files(tmp_path / "photos.zip")
        assert classes(found) == expected
        assert found.source == str(tmp_path / "photos.zip")
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_zip_file_writes_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setenv("ETF_ZOO_CACHE", str(tmp_path / "cache"))
    link = zipfile.ZipInfo("a/link.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        for name in ("../outside.png", "/absolute.png", "a/../../outside.png", "a/1.png", "b/2.png"):
            archive.writestr(name, png(1))
        archive.writestr(link, "/etc/passwd")
    assert classes(find_files(tmp_path / "bad.zip")) == {"train": TWO}
    assert not list(tmp_path.rglob("outside.png")) + list(tmp_path.rglob("absolute.png"))
    assert not list(tmp_path.rglob("link.png"))
    (tmp_path / "none.zip").write_bytes(b"PK no zip")
    with pytest.raises(ValueError, match=r"Cannot unpack .*none.zip"):
        find_files(tmp_path / "none.zip")


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_ending_that_pillow_reads(tmp_path, ending):
    kind = Image.registered_extensions().get(ending.lower())
    if ending.lower() not in image_extensions() or kind not in Image.SAVE:
        pytest.skip(f"this Pillow has no {ending}")
    write(tmp_path, {f"train/a/1{ending}": 1, f"train/b/2{ending}": 2})
    assert classes(find_files(tmp_path)) == {"train": TWO}


def test_what_pillow_only_names_is_no_photo():
    assert not {".pdf", ".eps", ".mpg", ".h5"} & image_extensions()


def test_a_parquet_table_of_paths(tmp_path):
    write(tmp_path, {"x/1.png": 1, "x/2.png": 2})
    pq.write_table(pa.table({"path": ["x/1.png", "x/2.png"], "label": ["a", "b"]}), tmp_path / "labels.parquet")
    for source in (tmp_path, tmp_path / "labels.parquet"):
        rows = open_rows(Data(str(source)), "train", resident=True)
        assert (rows.label_names, rows.class_counts()) == (["a", "b"], [1, 1])
        assert np.asarray(read_image(rows.encoded(1))).mean() == pytest.approx(np.asarray(picture(2)).mean())


def test_links_are_followed_but_not_around(tmp_path):
    write(tmp_path / "elsewhere", {"rose/1.png": 1, "rose/2.png": 2})
    write(tmp_path / "photos", {"train/iris/3.png": 3})
    (tmp_path / "photos/train/rose").symlink_to(tmp_path / "elsewhere/rose")
    (tmp_path / "photos/train/iris/4.png").symlink_to(tmp_path / "elsewhere/rose/1.png")
    (tmp_path / "photos/train/iris/5.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "photos/train/iris/up").symlink_to(tmp_path / "photos/train")
    found = find_files(tmp_path / "photos")
    assert classes(found) == {"train": {"iris": 2, "rose": 2}}
    assert found.skipped["broken links"] == ["train/iris/5.png"]
    assert found.skipped["links to a folder that they lie in"] == ["train/iris/up"]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_a_folder_that_may_not_be_read(tmp_path):
    write(tmp_path, {**SPLIT, "train/c/5.png": 5})
    (tmp_path / "train/c").chmod(0)
    try:
        assert "folders that cannot be read (Permission denied)" in find_files(tmp_path).skipped
    finally:
        (tmp_path / "train/c").chmod(0o755)


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (1, {"blue": 1, "red": 2}),
        (2, {"iris": 1, "rose": 1, "tulip": 1}),
        (-1, {"iris": 1, "rose": 1, "tulip": 1}),
        (-2, {"blue": 1, "red": 2}),
    ],
)
def test_the_level_of_the_class(tmp_path, level, expected):
    write(tmp_path, LAYOUTS["groups of classes"][0])
    found = find_files(tmp_path, class_level=level)
    assert classes(found) == {"train": expected}
    assert not found.notes  # it was said which


def test_names_that_repeat_in_several_groups(tmp_path):
    write(tmp_path, {f"train/{name}/1.png": 1 for name in ("red/tall", "red/small", "blue/tall")})
    assert classes(find_files(tmp_path, class_level=2)) == {"train": {"blue/tall": 1, "red/small": 1, "red/tall": 1}}


REFUSED = {
    "nothing": ({"x": None}, "has no image in a folder of its class"),
    "a heap": (
        {"1.png": 1, "2.png": 2},
        r"no image in a folder of its class \(2 images in no class folder.*give --data a table",
    ),
    "a class of photos that cannot be read": (
        {**SPLIT, "train/c/1.heic": HEIC, "train/c/2.heic": HEIC},
        r"1 class folders no file can be read as an image: train/c \(2 .heic: pip install pillow-heif\)",
    ),
    "a class of something": ({**SPLIT, "train/c/1.xyz": b"?"}, r"train/c \(1 .xyz\)"),
    "a split among classes": (
        {"test/1.png": 1, "control/2.png": 2},
        "'test' is the name of a split and never a class, but 'control' is none",
    ),
    "a class named train": ({"train/1.png": 1, "bus/2.png": 2}, "'train' is the name of a split and never a class"),
    "splits in some classes": (
        {"a/train/1.png": 1, "a/test/2.png": 2, "b/3.png": 3},
        "'test' is the name of a split and never a class, but 'b' is none",
    ),
    "several tables": ({"a.csv": "x", "b.csv": "y", "1.png": 1}, r"several tables \(a.csv, b.csv\)"),
    "missing images": (
        {"l.csv": "path,label\n1.png,a\n" + "".join(f"x{i}.png,b\n" for i in range(30)), "1.png": 1},
        "30 images that are not there, such as x0.png, .*x19.png and 10 more",
    ),
    "a path out of the folder": ({"l.csv": "path,label\n../1.png,a\n", "1.png": 1}, "outside .*--data.image_root"),
    "an absolute path": ({"l.csv": "path,label\n/etc/passwd,a\n"}, "lies outside .*--data.image_root"),
    "an address": ({"l.csv": "path,label\nhttp://x/1.png,a\n"}, "nothing is fetched"),
    "no labels": (
        {"l.csv": "path,width,height\n1.png,3,4\n", "1.png": 1},
        "no column of labels, set --data.label_column",
    ),
    "no paths": ({"l.csv": "width,label\n3,a\n"}, "no column of paths of images, set --data.image_column"),
    "a cell too many": (
        {"l.csv": "path,label\n1.png,a,b\n", "1.png": 1},
        "Row 2 of .*l.csv has 3 cells, the heading 2",
    ),
    "an empty table": ({"l.csv": ""}, "l.csv is empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    files, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        find_files(write(tmp_path / "photos", files))


def test_a_level_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"data.class_level 3: .* has 1 levels of folders"):
        find_files(write(tmp_path, SPLIT), class_level=3)


def test_images_of_a_table_elsewhere(tmp_path):
    write(tmp_path / "pictures", {"1.png": 1, "2.png": 2})
    table = tmp_path / "tables" / "labels.csv"
    write(tmp_path, {"tables/labels.csv": f"path,label\n1.png,a\n{tmp_path / 'pictures' / '2.png'},b\n"})
    with pytest.raises(ValueError, match="lies outside"):
        find_files(table)
    assert classes(find_files(table, root=str(tmp_path / "pictures"))) == {"train": TWO}


@pytest.mark.parametrize("source", ["~/photos", "./photos", "/nowhere/photos", "photos.csv", "photos.zip"])
def test_a_source_that_is_not_there(source):
    with pytest.raises(ValueError, match="There is no folder or file"):
        open_rows(Data(source), "train", resident=True)


def test_a_quoted_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "photos", SPLIT)
    assert open_rows(Data("~/photos"), "val", resident=True).label_names == ["a", "b"]


def test_a_walk_looks_once(tmp_path, monkeypatch):
    write(tmp_path, SPLIT)
    looked = []
    scan = os.scandir
    monkeypatch.setattr("os.scandir", lambda folder: looked.append(str(folder)) or scan(folder))
    walk(tmp_path)
    assert len(looked) == len(set(looked)) == 7
