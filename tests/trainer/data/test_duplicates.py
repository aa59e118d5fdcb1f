"""Images that are there twice: by their bytes, and to the eye; and holdouts that keep them together."""

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from etf_zoo.trainer.data.batches import Split
from etf_zoo.trainer.data.duplicates import connected, difference_hash, group_rows, joined, prints, same_looks
from etf_zoo.trainer.data.holdout import holdout_indices
from etf_zoo.trainer.data.sources import open_rows
from etf_zoo.trainer.recipe.config import Data


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ETF_ZOO_CACHE", str(tmp_path / "cache"))


def scene(seed, size=(120, 90)):
    """Smooth shapes of several colors, as photos have."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3)).astype(np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def slow_hash(image):
    gray = image.convert("L").resize((9, 8), Image.Resampling.BILINEAR)
    bits = "".join(str(int(gray.getpixel((x, y)) > gray.getpixel((x + 1, y)))) for y in range(8) for x in range(8))
    return int(bits, 2)


def save(folder, images):
    for name, image in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name)
    return folder


def test_the_hash_is_that_of_its_definition():
    for seed in range(5):
        assert difference_hash(scene(seed)) == slow_hash(scene(seed))
    assert difference_hash(Image.new("RGB", (9, 8))) == 0


def test_what_looks_the_same(tmp_path):
    again = io.BytesIO()
    scene(0).save(again, "jpeg", quality=40)
    small = scene(0).resize((60, 45))
    brighter = ImageEnhance.Brightness(scene(0)).enhance(1.05)
    changed = [scene(0), Image.open(again), small, brighter, scene(0).convert("L").convert("RGB"), scene(1), scene(2)]
    folder = save(tmp_path / "made", {f"a/{i}.png": image for i, image in enumerate(changed)})
    (folder / "b").mkdir()
    scene(3).save(folder / "b/0.jpg", quality=95)
    scene(3).save(folder / "b/1.jpg", quality=60)
    rows = open_rows(Data(str(folder)), "train", resident=True)
    groups = group_rows(rows)
    assert len(set(groups[:4])) == 1
    assert len({groups[0], *groups[5:7], groups[7]}) == 4
    assert groups[7] == groups[8]
    found = prints(rows)
    assert len(set(found.exact.tolist())) == 9  # none is a copy of the file
    assert np.array_equal(found.hashes, prints(rows).hashes)  # those that were kept
    assert len(list((tmp_path / "cache" / "prints").iterdir())) == 1


def test_pairs_are_those_of_a_slow_look():
    images = np.stack([np.asarray(scene(seed % 4, (16, 16))) for seed in range(10)])
    split = Split(images, np.zeros(10, np.int64), ["a"], "made")
    pairs = {(i, j) for i in range(10) for j in range(i + 1, 10) if i % 4 == j % 4}
    own = prints(split)
    assert {tuple(pair) for pair in same_looks(own).tolist()} == pairs
    other = prints(split.subset(np.array([3, 0])))
    assert {tuple(pair) for pair in same_looks(other, own).tolist()} == {(0, 3), (0, 7), (1, 0), (1, 4), (1, 8)}
    assert group_rows(split).tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


def test_plain_images_are_the_same_by_their_color():
    images = np.stack([np.full((16, 16, 3), value, np.uint8) for value in (10, 10, 12, 200)])
    split = Split(images, np.zeros(4, np.int64), ["a"], "made")
    assert same_looks(prints(split)).tolist() == [[0, 1]]
    noise = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3)).astype(np.uint8)
    assert not len(same_looks(prints(Split(noise, np.zeros(20, np.int64), ["a"], "made"))))


def test_chains_are_groups():
    pairs = np.array([[0, 4], [4, 2], [5, 6]])
    assert connected(pairs, 7).tolist() == [0, 1, 0, 2, 0, 3, 3]
    assert connected(np.zeros((0, 2), int), 3).tolist() == [0, 1, 2]


def test_groupings_are_joined():
    a, b = np.array([0, 1, 1, 2, 3]), np.array([5, 5, 4, 3, 3])
    assert joined(a, b).tolist() == [0, 0, 0, 1, 1]
    assert joined(a).tolist() == [0, 1, 1, 2, 3]


def test_all_unreadable_files_are_named_at_once(tmp_path):
    folder = save(tmp_path / "made", {f"a/{i}.png": scene(i) for i in range(4)})
    for i in (1, 3):
        (folder / f"a/{i}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"2 of 4 images .*1.png .*3.png"):
        prints(open_rows(Data(str(folder)), "train", resident=False))
    rows = open_rows(Data(str(folder), max_corrupt=0.5), "train", resident=False)
    assert prints(rows).readable.tolist() == [True, False, True, False]
    assert len(rows.corrupt.found) == 2


@pytest.mark.parametrize("left", [0, 10, 500])
def test_a_damaged_cache_is_made_anew(tmp_path, monkeypatch, left):
    monkeypatch.setenv("ETF_ZOO_CACHE", str(tmp_path / "cache"))
    folder = save(tmp_path / "made", {f"a/{i}.png": scene(i) for i in range(4)})
    rows = open_rows(Data(str(folder)), "train", resident=False)
    whole = prints(rows)
    (file,) = (tmp_path / "cache" / "prints").iterdir()
    content = file.read_bytes()
    file.write_bytes(content[:left])
    assert np.array_equal(prints(rows).hashes, whole.hashes)
    assert [found.name for found in file.parent.iterdir()] == [file.name]
    assert file.stat().st_size == len(content)


# ---------------------------------------------------------------------------------------------------------- holdouts


def test_groups_stay_on_one_side():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 400)
    groups = rng.integers(0, 150, 400)
    for seed in range(5):
        kept, held = holdout_indices(labels, 0.2, seed, groups)
        assert sorted([*kept, *held]) == list(range(400))
        assert not set(groups[kept]) & set(groups[held])
        assert set(labels[kept]) == set(labels[held]) == set(range(5))
        assert 0.15 < len(held) / 400 < 0.3


def test_images_of_their_own_are_held_out_as_before():
    labels = np.repeat([0, 1, 2], [20, 11, 3])
    for seed in range(3):
        plain, grouped = (holdout_indices(labels, 0.3, seed, groups) for groups in (None, np.arange(34)[::-1]))
        assert plain[1].tolist() == grouped[1].tolist()


def test_a_large_group_is_held_out_only_where_there_is_no_smaller():
    labels = np.zeros(10, np.int64)
    groups = np.array([0, 0, 0, 0, 0, 0, 1, 1, 2, 2])
    assert len(holdout_indices(labels, 0.1, 0, groups)[1]) == 2
    with pytest.raises(ValueError, match="No class has two images that differ"):
        holdout_indices(labels, 0.1, 0, np.zeros(10, np.int64))
