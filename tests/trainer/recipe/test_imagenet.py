"""The recipes for ImageNet, streamed from small stand-ins of the same format."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from etf_zoo.trainer.recipe.config import Recipe, parse
from etf_zoo.trainer.run.run import Run

RECIPES = Path(__file__).parents[3] / "training" / "recipes"
SMALL = ["--model", "mobilenetv3_small_050_etf", "--epochs", "1", "--batch_size", "16", "--optim.warmup_epochs", "0.5"]
SMALL += ["--precision", "fp32", "--sizes", "[[0, 32]]", "--eval_size", "32", "--data.workers", "0"]


@pytest.fixture
def stand_in(tmp_path):
    """Parquet shards with columns image and label, pictures of many shapes and kinds; labels with or without names."""

    def make(label_feature):
        rng = np.random.default_rng(0)
        features = datasets.Features({"image": datasets.Image(), "label": label_feature})
        for split, shards in (("train", 4), ("validation", 2)):
            for shard in range(shards):
                labels = [int(i) for i in rng.integers(0, 4, 18)]
                images = [
                    Image.fromarray((rng.integers(0, 64, (40 + 9 * k, 48, 3)) + 48 * k).astype(np.uint8))
                    for k in labels
                ]
                images[0] = images[0].convert("L")  # there are gray ones and CMYK ones
                images[1] = images[1].convert("CMYK")
                rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
                file = tmp_path / "imagenet" / "data" / f"{split}-{shard:05d}-of-{shards:05d}.parquet"
                file.parent.mkdir(parents=True, exist_ok=True)
                rows.to_parquet(file)
        return str(tmp_path / "imagenet")

    return make


@pytest.mark.parametrize(
    ("recipe", "labels", "more"),
    [
        ("imagenet1k", datasets.ClassLabel(names=list("abcd")), []),
        ("imagenet21k", datasets.Value("int64"), ["--data.num_classes", "4"]),
    ],
)
def test_imagenet_by_its_recipe(recipe, labels, more, stand_in, tmp_path):
    arguments = ["--config", str(RECIPES / f"{recipe}.yaml"), "--data.source", stand_in(labels), *SMALL, *more]
    arguments += ["--data.train_images", "72", "--output", str(tmp_path / "run"), "--tensorboard", "false"]
    run = Run(parse(Recipe, arguments))
    assert run.steps_per_epoch == 4
    assert run.fit()
    assert run.plain_model().num_classes == 4
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert record["val_classes"] == 4
    assert run.evaluate()["images"] == 36  # none dropped, none doubled
    assert {"val_top1", "val_loss", "val_nc1_pinv"} <= record.keys()
