"""The image data sets in $ETF_ZOO_DATA: which splits and classes the readers find."""

import pytest

from etf_zoo.trainer.data.sources import open_rows
from etf_zoo.trainer.recipe.config import Data
from etf_zoo.trainer.tune.parts import load_data
from etf_zoo.trainer.tune.tuning import Finetune

SETS = {
    "flowers17": ({}, {"train": 1020, "validation": 340, "test": 340}, 17),
    "cub50": ({}, {"train": 1500, "test": 1389}, 50),
    "grocery": ({}, {"train": 2640, "validation": 296, "test": 2485}, 81),
    "cifar100": ({"label_column": "fine_label"}, {"train": 49_991, "test": 10_000}, 100),
    "tiny_imagenet": ({}, {"train": 100_000, "validation": 10_000}, 200),
}


@pytest.mark.data
@pytest.mark.parametrize("name", SETS)
def test_splits_and_classes(name):
    settings, splits, classes = SETS[name]
    for split, images in splits.items():
        rows = open_rows(Data(name, **settings), split, resident=True)
        assert (len(rows), len(rows.label_names)) == (images, classes)
        assert len(rows.encoded(0)) > 100


@pytest.mark.data
def test_a_set_with_three_splits_is_chosen_on_one_and_tested_on_another(tmp_path, monkeypatch):
    monkeypatch.setenv("ETF_ZOO_CACHE", str(tmp_path))
    parts = load_data(Finetune(model="test_resnet", pretrained=False, data=Data("grocery"), sizes=[[0, 32]]))
    assert (len(parts.train), len(parts.watched), len(parts.test)) == (2640, 296, 2485)
    assert parts.groups is not None
