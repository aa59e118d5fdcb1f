"""Where a recipe's model is."""

import math

import pytest
import timm
import torch

from etf_zoo import frame_heads
from etf_zoo.models.names import timm_classifier_names
from etf_zoo.sharing.folder import save_folder
from etf_zoo.trainer.recipe.config import Data, Loss, Recipe
from etf_zoo.trainer.run.model import find_model, make_model
from etf_zoo.weights.native import native_tags


@pytest.mark.parametrize("architecture", sorted({name.partition(".")[0] for name in native_tags()}))
def test_a_name_without_a_tag_is_what_timm_makes_of_it(architecture):
    made = timm.create_model(architecture, pretrained=True).pretrained_cfg
    found = find_model(architecture, pretrained=True)
    assert found.input_size == made["input_size"][-1]
    assert found.identity == find_model(f"{architecture}.{made['tag']}").identity


def recipe(**changes):
    return Recipe(**{"model": "test_resnet_etf", "data": Data(source="digits", size=32), **changes})


@pytest.mark.parametrize(
    ("model", "args"),
    [
        ("test_resnet_etf", {}),
        ("test_resnet", {}),
        ("test_resnet", {"neck": "mlp"}),
        ("levit_128s", {}),
        ("deit_tiny_distilled_patch16_224", {}),
    ],
)
def test_a_learned_head_starts_from_zeros(model, args):
    made = make_model(recipe(model=model, head="learned", model_args=args), 7).eval()
    size = 32 if model.startswith("test") else 224
    assert not made(torch.randn(2, 3, size, size)).any()
    backbone = [p for name, p in made.named_parameters() if not name.startswith(tuple(timm_classifier_names(made)))]
    assert sum(bool(p.any()) for p in backbone) > 4


def test_a_trained_classifier_for_the_same_classes_is_kept(tmp_path):
    model = timm.create_model("test_resnet", num_classes=3)
    save_folder(model, tmp_path / "saved", pretrained_cfg={"num_classes": 3, "input_size": (3, 32, 32)}, half=False)
    start = {"model": str(tmp_path / "saved"), "head": "learned", "pretrained": True}
    assert torch.equal(make_model(recipe(**start), 3).fc.weight, model.fc.weight)
    assert not make_model(recipe(**start), 4).fc.weight.any()


def test_each_seed_draws_its_random_frame():
    def frame(**changes):
        return frame_heads(make_model(recipe(head="random", **changes), 10))["fc"].weight

    assert torch.equal(frame(seed=1), frame(seed=1))
    assert not torch.equal(frame(seed=1), frame(seed=2))
    assert torch.equal(frame(seed=1, model_args={"seed": 5}), frame(seed=2, model_args={"seed": 5}))
    assert torch.equal(frame(seed=1, model="test_resnet"), frame(seed=1))


@pytest.mark.parametrize("model", ["test_resnet_etf", "test_resnet"])
def test_learned_cosine_differs_from_the_frame_only_in_what_trains(model):
    args = {"orientation": "blocks", "logit_scale": 30.0}
    fixed = make_model(recipe(model=model, model_args=args), 10).eval()
    learned = make_model(recipe(model=model, head="learned_cosine", model_args=args), 10).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(learned(x), fixed(x))
    trained = {name for name, _ in learned.named_parameters()}
    assert trained == {name for name, _ in fixed.named_parameters()} | {"fc.prototypes"}
    assert make_model(recipe(head="learned_cosine", model_args={"moving": True}), 10) is not None


def test_the_scale_follows_label_smoothing():
    def scale(**changes):
        return frame_heads(make_model(recipe(**changes), 10))["fc"].logit_scale.item()

    assert scale(label_smoothing=0.1) == pytest.approx(0.9 * math.log(9 * 0.91 / 0.09), rel=1e-4)
    assert scale(label_smoothing=0.0) == pytest.approx(0.9 * math.log(9 * 999), rel=1e-4)
    assert scale(label_smoothing=0.1, model="test_resnet") == scale(label_smoothing=0.1)
    assert scale(label_smoothing=0.1, head="learned_cosine") == scale(label_smoothing=0.1)
    assert scale(label_smoothing=0.1, model_args={"logit_scale": 30.0}) == 30
    assert scale(label_smoothing=0.1, model_args={"feature_norm": "none"}) == 1
    assert scale(label_smoothing=0.1, loss=Loss("dot_regression")) == scale(label_smoothing=0.0)


def test_the_scale_of_weights_for_the_same_classes_is_kept(tmp_path):
    model = timm.create_model("test_resnet_etf", num_classes=3)
    save_folder(model, tmp_path / "saved", pretrained_cfg={"num_classes": 3, "input_size": (3, 32, 32)}, half=False)
    start = {"model": str(tmp_path / "saved"), "pretrained": True, "label_smoothing": 0.1}
    kept, fresh = (frame_heads(make_model(recipe(**start), k))["fc"].logit_scale.item() for k in (3, 4))
    assert kept == frame_heads(model)["fc"].logit_scale.item()
    assert fresh == pytest.approx(0.75 * math.log(3 * 0.925 / 0.075), rel=1e-4)
