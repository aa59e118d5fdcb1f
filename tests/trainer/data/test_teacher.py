"""A teacher's shares: those of the model itself, kept on disk, in the order of any subset."""

import dataclasses

import numpy as np
import pytest
import timm
import torch

from etf_zoo.errors import EtfZooError
from etf_zoo.sharing.folder import save_folder
from etf_zoo.trainer.data.augment import colors_of, mix
from etf_zoo.trainer.data.batches import batch_generator, eval_batches, load_split, train_batches
from etf_zoo.trainer.data.teacher import taught
from etf_zoo.trainer.recipe.config import Augment, Data, Loss, Optim, Recipe
from etf_zoo.trainer.run.run import Run

DATA = Data("digits", val_split="test", size=32)


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    """A folder with a model of seven classes."""
    monkeypatch.setenv("ETF_ZOO_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model = timm.create_model("test_resnet_etf", num_classes=7)
    folder = tmp_path / "teacher"
    save_folder(model, folder, pretrained_cfg={"input_size": (3, 32, 32)}, label_names=list("abcdefg"))
    return folder


def test_shares_are_the_teachers_softmax(teacher, tmp_path):
    split = load_split(DATA, "train").subset(np.arange(200)[::-1][:50])
    found = taught(split, str(teacher), 24)
    assert found.label_names == list("abcdefg")
    model = timm.create_model(f"local-dir:{teacher}", pretrained=True).eval()
    (images, _), *_ = eval_batches(split, size=24, batch_size=50, colors=colors_of(model))
    expected = model(images).softmax(1)
    _, shares = found.take(np.arange(50), torch.device("cpu"), shares=True)
    torch.testing.assert_close(shares, expected, atol=2e-3, rtol=0)
    assert np.array_equal(found.labels, shares.argmax(1))
    part = found.subset(np.array([3, 1]))
    assert torch.equal(part.take(np.arange(2), torch.device("cpu"), shares=True)[1], shares[[3, 1]])
    # evaluation compares with the class that the teacher takes
    assert torch.equal(next(iter(eval_batches(part, size=24, batch_size=2)))[1], shares[[3, 1]].argmax(1))
    # the second time nothing is computed
    file = next((tmp_path / "cache").glob("teacher-*.npy"))
    before = file.stat().st_mtime_ns
    again = taught(split, str(teacher), 24)
    assert file.stat().st_mtime_ns == before
    assert np.array_equal(again.labels, found.labels)
    np.save(file, np.zeros((3, 7), np.float16))
    with pytest.raises(EtfZooError, match="damaged"):
        taught(split, str(teacher), 24)


def test_batches_and_mixing_take_shares(teacher):
    found = taught(load_split(DATA, "train").subset(np.arange(40)), str(teacher), 32)
    images, shares = next(train_batches(found, Augment(), size=32, batch_size=40, seed=0, epoch=0))
    assert isinstance(images, torch.Tensor)
    assert shares.shape == (40, 7)
    assert torch.allclose(shares.sum(1), torch.ones(40), atol=1e-2)
    settings = Augment(mixup=1.0)
    _, mixed = mix(images, shares, 7, settings, batch_generator(0, 0, 0))
    assert torch.allclose(mixed.sum(1), torch.ones(40), atol=1e-2)
    assert not torch.allclose(mixed, shares, atol=1e-2)


@pytest.mark.filterwarnings("ignore:Collapse is left out")  # an untrained teacher takes all for one class
def test_a_run_learns_from_the_teacher(teacher, tmp_path):
    data = dataclasses.replace(DATA, label="teacher", teacher=str(teacher), teacher_size=32, limit=64)
    recipe = Recipe(
        output=str(tmp_path / "run"),
        model="test_resnet_etf",
        data=data,
        optim=Optim(lr=1e-3),
        epochs=1,
        batch_size=32,
        sizes=[[0, 32]],
        label_smoothing=0.0,
    )
    run = Run(recipe)
    assert run.trained_model().num_classes == 7
    assert run.fit()
    assert 0 <= run.records[-1]["val_top1"] <= 100


def test_errors(teacher, tmp_path):
    data = dataclasses.replace(DATA, label="teacher", teacher=str(teacher), teacher_size=32, limit=64)
    recipe = Recipe(output=str(tmp_path / "run"), model="test_resnet_etf", data=data, batch_size=32, sizes=[[0, 32]])
    for changes in ({"loss": Loss("dot_regression")}, {"model_args": {"moving": True}}):
        with pytest.raises(EtfZooError, match="shares of classes"):
            Run(dataclasses.replace(recipe, **changes))
    with pytest.raises(EtfZooError, match="resident"):
        taught(None, str(teacher), 32)
    with pytest.raises(EtfZooError, match=r"no_such|no model|Unknown"):
        taught(load_split(DATA, "train"), "no_such_model", 32)
