"""Training on the stored inputs of a layer beside training on images: the same logits, gradients and copies."""

import copy

import numpy as np
import pytest
import timm
import torch
from torch import nn

from etf_zoo import add_skip
from etf_zoo.errors import EtfZooError
from etf_zoo.trainer.data.resident import Split
from etf_zoo.trainer.data.stored import StoredInputs
from etf_zoo.trainer.tune.trunk import layer_input, replayed, store_inputs

# architecture, layer, side in pixels
MODELS = [
    ("test_resnet", "layer4", 64),
    ("test_resnet_etf", "fc", 64),
    ("tf_efficientnet_lite0", "blocks.6.0", 64),
    ("test_vit", "blocks.3", 160),
    ("test_convnext", "stages.3.blocks.0", 64),
    ("mobilenetv3_small_050_etf", "classifier", 64),
]


def make(name, size, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **kwargs).eval()
    return model, torch.randn(3, 3, size, size)


@pytest.mark.parametrize(("name", "layer", "size"), MODELS)
def test_the_same_logits_and_gradients(name, layer, size):
    model, images = make(name, size)
    tuned = list(model.get_submodule(layer).parameters())
    stored = layer_input(model, layer, images)
    wanted = model(images)
    gradients = torch.autograd.grad(wanted.square().sum(), tuned) if tuned else ()
    with replayed(model, layer, images):
        found = model(stored)
        again = torch.autograd.grad(found.square().sum(), tuned) if tuned else ()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for one, other in zip(gradients, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())
    torch.testing.assert_close(model(images), wanted)  # takes images again


def test_a_skip_connection_from_the_layer():
    model, images = make("test_resnet", 64)
    add_skip(model, "layer4")
    stored = layer_input(model, "layer4", images)
    with replayed(model, "layer4", images):
        found = model(stored)
    torch.testing.assert_close(found, model(images), rtol=1e-4, atol=1e-5)


def test_a_copy_made_meanwhile_replays_too():
    model, images = make("test_resnet", 64)
    stored = layer_input(model, "layer4", images)
    with replayed(model, "layer4", images):
        copied = copy.deepcopy(model)
        torch.testing.assert_close(copied(stored), model(stored))


def test_the_mode_is_as_before():
    model, images = make("test_resnet", 64)
    for training in (True, False):
        model.train(training)
        with replayed(model, "layer4", images):
            assert model.training is training


def test_stored_inputs(tmp_path):
    model, _ = make("test_resnet", 64)
    images = torch.randn(5, 3, 64, 64)
    stored = store_inputs(model, "layer4", [images.split(2), images.flip(3).split(3)], 5, tmp_path / "inputs.npy")
    assert stored.shape[:2] == (2, 5)
    assert stored.dtype == np.float16
    for view, pictures in enumerate((images, images.flip(3))):
        wanted = layer_input(model, "layer4", pictures)
        torch.testing.assert_close(torch.from_numpy(stored[view]).float(), wanted, rtol=2e-3, atol=1e-3)


def test_subsets_of_stored_inputs():
    images = Split(np.zeros((6, 1, 1, 3), np.uint8), np.arange(6), list("abcdef"), "made")
    stored = StoredInputs(images, np.arange(12.0).reshape(2, 6, 1))
    some = stored.subset(np.array([5, 1, 3])).subset(np.array([2, 0]))
    assert len(some) == 2
    ((inputs, labels),) = some.batches([np.arange(2)], torch.device("cpu"))
    assert inputs.flatten().tolist() == labels.tolist() == [3, 5]
    ((inputs, _),) = some.train_batches([np.arange(2)], seed=0, epoch=0, start=0, device=torch.device("cpu"))
    assert {value % 6 for value in inputs.flatten().tolist()} == {3, 5}


def test_images_that_cannot_be_read(tmp_path):
    model, images = make("test_resnet", 64)
    with pytest.raises(EtfZooError, match=r"2 of 5 images cannot be read"):
        store_inputs(model, "layer4", [[images]], 5, tmp_path / "inputs.npy")
    with pytest.raises(EtfZooError, match=r"no images"):
        store_inputs(model, "layer4", [], 0, tmp_path / "inputs.npy")


def test_numbers_beyond_float16(tmp_path):
    model, images = make("test_resnet", 64)
    with pytest.raises(EtfZooError, match=r"do not fit float16.*--cache_views 0"):
        store_inputs(model, "conv1", [[images * 1e6]], 3, tmp_path / "inputs.npy")


class Around(nn.Module):
    """Uses the images beside the layer, and hands a layer a tuple."""

    def __init__(self, stem):
        super().__init__()
        self.stem, self.layer, self.pair = stem, nn.Linear(4, 2), nn.Identity()

    def forward(self, x):
        hidden = self.stem(x) if self.stem else x * 1.0
        return self.layer(hidden.flatten(1)[:, :4]) + self.pair((x,))[0].flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("stem", "message"),
    [
        (nn.Identity(), "Around uses its images in more than the layer 'layer'.*--cache_views 0"),
        (None, "No layer of Around gets the images as they are.*--cache_views 0"),
    ],
)
def test_models_that_cannot_be_replayed(stem, message):
    model, images = Around(stem).eval(), torch.randn(3, 3, 2, 2)
    with pytest.raises(EtfZooError, match=message), replayed(model, "layer", images):
        pass
    with pytest.raises(EtfZooError, match="'pair' of Around gets no tensor that could be stored"):
        layer_input(model, "pair", images)
    assert not any(module._forward_pre_hooks for module in model.modules())
