"""What is left open until the images are known."""

import dataclasses

import numpy as np
import pytest
import timm
import torch

from etf_zoo.sharing.folder import save_folder
from etf_zoo.trainer.data.resident import Split
from etf_zoo.trainer.recipe.config import Data, Optim
from etf_zoo.trainer.tune.settle import batch_for, completed, epochs_for, head_for, settle
from etf_zoo.trainer.tune.tuning import Finetune, fine_tune

RECIPE = Finetune(model="test_resnet_etf", pretrained=False, sizes=[[0, 16]], data=Data("digits", size=16), epochs=20)


def images(per_class, size=16, classes=3):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), per_class)
    pixels = rng.integers(0, 255, (len(labels), size, size, 3), dtype=np.uint8)
    return Split(pixels, labels, [str(k) for k in range(classes)], "made", "train")


@pytest.mark.parametrize("count", [1, 15, 16, 17, 80, 160, 320, 10_000])
def test_batches_give_a_hundred_steps_where_there_are_so_many(count):
    batch = batch_for(count, 20)
    assert batch in (16, 32, 64) or batch == count < 16
    if batch < 64 and count >= 16:
        assert 20 * (count // (2 * batch)) < 100
    if batch > 16:
        assert 20 * (count // batch) >= 100


@pytest.mark.parametrize("count", [1, 15, 16, 17, 50, 79, 80, 320, 10_000])
def test_epochs_give_a_hundred_steps_however_few_images_there_are(count):
    batch = batch_for(count)
    epochs = epochs_for(count, batch)
    assert epochs * (count // batch) >= 100
    assert epochs == 20 or (epochs - 1) * (count // batch) < 100


def test_length_is_left_open_until_the_images_are_known():
    open_ = dataclasses.replace(RECIPE, epochs=0)
    for count, wanted in ((17, (16, 100)), (85, (16, 20)), (1020, (64, 20))):
        found = completed(open_, count)
        assert (found.batch_size, found.epochs) == wanted
    told = completed(dataclasses.replace(RECIPE, epochs=3, batch_size=40), 30)
    assert (told.batch_size, told.epochs) == (30, 3)
    assert completed(settle(open_, images(1)), 3).eval_every == 100  # one look at the test


def test_the_rate_goes_by_what_is_tuned():
    def rate(**changes):
        return completed(dataclasses.replace(RECIPE, **changes), 100).optim.lr

    assert RECIPE.optim.lr == 0
    assert rate(head="frame") == rate(head="warm") == rate(head="learned", method="head") == 2e-3
    assert rate(head="learned") == rate(head="warm_learned") == 5e-4
    assert rate(head="learned", lr=0.03) == rate(head="learned", optim=Optim(lr=0.03, warmup_epochs=0)) == 0.03
    with pytest.raises(ValueError, match=r"optim\.min_lr is at most optim\.lr, got 0\.01 and 0\.002"):
        rate(optim=Optim(min_lr=0.01))


def test_few_images_are_all_trained_on():
    assert settle(RECIPE, images(19)).holdout == 0
    assert settle(RECIPE, images(19)).eval_every == 20
    assert settle(RECIPE, images(20)).holdout == 0.1
    assert settle(RECIPE, images(20)).eval_every == 1
    assert settle(dataclasses.replace(RECIPE, holdout=0.3), images(9)).holdout == 0.3
    for choice in ({"patience": 2}, {"lr": "auto"}):
        assert settle(dataclasses.replace(RECIPE, **choice), images(9)).holdout == 0.1
    assert settle(RECIPE, images(9), watched=images(2)).holdout == 0.1


def test_one_image_of_each_class(tmp_path):
    recipe = dataclasses.replace(RECIPE, epochs=2, output=str(tmp_path), tensorboard=False)
    tuned = fine_tune(recipe, images(1), images(4))
    assert len(tuned.train) == 3
    assert tuned.held is None
    assert tuned.run.recipe.batch_size == 3
    assert [record["epoch"] for record in tuned.run.records if "val_top1" in record] == [2]  # one look at the test


PHOTOS = Finetune(model="mobilenetv3_small_100_etf", sizes=[[0, 32]], data=Data("digits", size=32), tensorboard=False)


def test_a_frame_lies_by_the_means_of_few_images():
    assert PHOTOS.head == "auto"
    assert head_for(PHOTOS, images(99)) == "warm"
    assert head_for(PHOTOS, images(100)) == "frame"
    assert head_for(dataclasses.replace(PHOTOS, shots=5), images(60)) == "warm"
    assert head_for(PHOTOS, images(1, classes=1024)) == "warm"
    assert head_for(PHOTOS, images(1, classes=1025)) == "frame"  # of 1024 features


@pytest.mark.parametrize(
    "changes",
    [
        {"pretrained": False},
        {"reserve": 5},
        {"model_args": {"orientation": "blocks"}},
        {"model_args": {"neck": "mlp"}},
        {"data": Data("digits", size=32, limit=10)},  # some classes may have no image
        {"method": "ncm"},
    ],
)
def test_a_frame_lies_at_random_where_something_speaks_for_it(changes):
    assert head_for(dataclasses.replace(PHOTOS, **changes), images(5)) == "frame"


@pytest.mark.parametrize(("neck", "wanted"), [(None, "warm"), ("mlp", "frame"), ("projector", "warm")])
def test_a_neck_of_the_weights_stays_between_features_and_frame(tmp_path, neck, wanted):
    model = timm.create_model("test_resnet_etf", num_classes=30, neck=neck)
    settings = dataclasses.replace(PHOTOS, model=str(save_folder(model, tmp_path)))
    assert head_for(settings, images(5)) == wanted
    assert head_for(settings, images(5, classes=30)) == "frame"  # which the weights bring


def test_batch_statistics_stay_where_images_are_very_few(tmp_path):
    assert settle(PHOTOS, images(2)).freeze_bn is True
    assert settle(PHOTOS, images(3)).freeze_bn is False
    assert settle(dataclasses.replace(PHOTOS, shots=1), images(60)).freeze_bn is True
    for changes in ({"pretrained": False}, {"method": "layer"}, {"data": Data("digits", size=32, limit=10)}):
        assert settle(dataclasses.replace(PHOTOS, **changes), images(1)).freeze_bn is False
    for said in (True, False):
        assert settle(dataclasses.replace(PHOTOS, freeze_bn=said), images(1 + 9 * said)).freeze_bn is said
    with pytest.raises(ValueError, match="Random weights have no batch statistics"):
        dataclasses.replace(PHOTOS, freeze_bn=True, pretrained=False)
    rates = [completed(settle(PHOTOS, images(count)), 3 * count).optim.lr for count in (2, 3)]
    assert rates == [5e-4, 2e-3]
    before = timm.create_model("mobilenetv3_small_100_etf", pretrained=True).bn1
    tuned = fine_tune(dataclasses.replace(PHOTOS, epochs=1, output=str(tmp_path)), images(1, 32), images(2, 32))
    assert torch.equal(tuned.model.bn1.running_mean, before.running_mean)
    assert not torch.equal(tuned.model.bn1.weight, before.weight)


def test_weights_for_as_many_classes_keep_their_frame():
    assert head_for(PHOTOS, images(1, classes=200)) == "frame"
    assert head_for(PHOTOS, images(1, classes=199)) == "warm"


def test_a_head_that_is_named_stays():
    for head in ("frame", "random", "learned", "warm"):
        assert settle(dataclasses.replace(PHOTOS, head=head), images(5)).head == head
    assert Finetune(model="resnet18", sizes=[[0, 32]]).head == "learned"


def test_a_fine_tuning_finds_its_head(tmp_path):
    tuned = fine_tune(dataclasses.replace(PHOTOS, epochs=1, output=str(tmp_path)), images(4, 32), images(2, 32))
    assert tuned.settings.head == tuned.run.record().head == "warm"  # the record is what the card is written from
    prototypes = tuned.model.get_classifier().weight
    assert torch.allclose(prototypes @ prototypes.T, 1.5 * torch.eye(3) - 0.5, atol=1e-5)
