"""`data.label: instance`: each training image is a class of its own."""

import json
from dataclasses import replace

import numpy as np
import pytest

from etf_zoo.errors import EtfZooError
from etf_zoo.losses import FrameCrossEntropy
from etf_zoo.trainer.data.batches import load_split
from etf_zoo.trainer.recipe.config import Data, Optim, Recipe
from etf_zoo.trainer.run.run import Run

DATA = Data("digits", val_split="train", label="instance", size=16)


def test_each_image_is_a_class():
    split, plain = load_split(DATA, "train"), load_split(replace(DATA, label="class"), "train")
    assert split.labels.tolist() == list(range(len(plain)))
    assert split.label_names == [str(i) for i in range(len(plain))]
    assert split.class_counts() == [1] * len(plain)
    assert np.array_equal(split.images, plain.images)
    assert split.digest != plain.digest  # other classes are other data


@pytest.mark.parametrize("changes", [{"val_split": "test"}, {"test_split": "test"}, {"streaming": True}])
def test_there_is_nothing_to_validate_on_but_the_training_images(changes):
    with pytest.raises(EtfZooError, match=r"classes are the training images: set data\.val_split to train"):
        replace(DATA, **changes)


def test_a_run_over_instances_of_a_kerdock_frame(tmp_path, monkeypatch):
    monkeypatch.setattr("etf_zoo.layers.classifier.KERDOCK_MATRIX_CLASSES", 1000)
    recipe = Recipe(
        output=str(tmp_path / "run"),
        model="test_resnet",
        model_args={"frame": "kerdock", "neck": "mlp", "neck_features": 64},
        data=DATA,
        optim=Optim(name="sgd", lr=0.1),
        epochs=1,
        batch_size=128,
        sizes=[[0, 16]],
        label_smoothing=0.0,
        tensorboard=False,
    )
    run = Run(recipe)
    assert isinstance(run.stepper.objective.loss, FrameCrossEntropy)
    assert run.trained_model().get_classifier().implicit
    assert run.fit()
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["val_single_sample_classes"] == 1347
    assert 5 < record["train_loss"] < 12
    assert 0 <= record["val_top1"] < 5
