"""From a recipe: frames made from class counts, logit adjustment, subspaces of a tree; saved and loaded."""

import dataclasses
import json

import pytest
import timm
import torch
from torch.nn import functional as F

from etf_zoo import frame_heads
from etf_zoo.errors import EtfZooError
from etf_zoo.frames import Hierarchy, imbalanced_frame, seli_frame
from etf_zoo.layers.subspaces import SubspaceClassifier
from etf_zoo.sharing.folder import save_folder
from etf_zoo.trainer.data.long_tail import long_tail_counts
from etf_zoo.trainer.recipe.config import Data, Loss, Optim, Recipe
from etf_zoo.trainer.run.imbalance import default_feature_decay
from etf_zoo.trainer.run.model import make_model
from etf_zoo.trainer.run.objective import Objective
from etf_zoo.trainer.run.run import Run

COUNTS = [50, 20, 10, 4, 1]
RECIPE = Recipe(model="test_resnet", optim=Optim(weight_decay=1e-3))


def with_frame(name, **args):
    return dataclasses.replace(RECIPE, model_args={"frame": name, "feature_norm": "none", **args})


def test_a_recipe_makes_the_closed_forms():
    head = make_model(with_frame("imbalanced", feature_decay=1e-5), 5, class_counts=COUNTS).fc
    rows, _ = imbalanced_frame(COUNTS, 96, weight_decay=1e-3, feature_decay=1e-5)
    assert torch.allclose(head.weight * head.lengths[:, None], rows, atol=1e-6)
    head = make_model(with_frame("seli", seed=3), 5, class_counts=COUNTS).fc
    rows, _ = seli_frame(COUNTS, 96, seed=3)
    assert torch.allclose(F.normalize(head.weight * head.lengths[:, None]), F.normalize(rows), atol=1e-5)
    assert torch.allclose(head.lengths / head.lengths[0], rows.norm(dim=1) / rows[0].norm(), atol=1e-5)
    assert float(head.lengths.square().mean()) == pytest.approx(1, rel=1e-5)


def test_the_default_feature_decay_collapses_no_class():
    decay = default_feature_decay(COUNTS, 1e-3)
    assert bool((imbalanced_frame(COUNTS, 8, weight_decay=1e-3, feature_decay=decay)[1].norm(dim=1) > 0).all())
    _, h = imbalanced_frame(COUNTS, 8, weight_decay=1e-3, feature_decay=4.01 * decay)
    assert (h.norm(dim=1) == 0).tolist() == [False] * 4 + [True]


def test_the_backbone_is_the_same_as_with_other_heads():
    counted, plain = make_model(with_frame("seli"), 5, class_counts=COUNTS), make_model(RECIPE, 5)
    assert all(torch.equal(counted.state_dict()[k], v) for k, v in plain.state_dict().items() if "fc." not in k)


def test_a_run_counts_its_own_images_and_its_model_is_loaded_again(tmp_path):
    recipe = dataclasses.replace(
        with_frame("imbalanced"),
        output=str(tmp_path / "run"),
        data=Data("digits", val_split="test", size=16, long_tail=0.1),
        sizes=[[0, 16]],
        batch_size=16,
        epochs=1,
        label_smoothing=0.0,
    )
    run = Run(recipe)
    counts = run.train_split.class_counts()
    assert counts == long_tail_counts(10, counts[0], 0.1)
    assert len(set(counts)) > 5
    decay = default_feature_decay(counts, 1e-3)
    rows, _ = imbalanced_frame(counts, 96, weight_decay=1e-3, feature_decay=decay)
    assert torch.allclose(run.trained_model().fc.lengths, rows.norm(dim=1), atol=1e-5)
    assert run.fit()
    save_folder(run.plain_model(), tmp_path / "model", half=False)
    again = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 16)
    assert torch.allclose(again(images), run.plain_model().eval()(images), rtol=1e-3, atol=1e-3)


def test_logit_adjustment_is_added_to_the_logits_in_training_alone():
    model = make_model(dataclasses.replace(RECIPE, head="learned"), 5)
    torch.nn.init.normal_(model.fc.weight)
    images, labels = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 3, 4, 4])
    model.eval()
    right, loss = Objective(Loss(logit_adjustment=0.7), model, COUNTS)(model, images, labels)
    logits = model(images)
    total = torch.tensor(COUNTS).double()
    adjusted = logits.double() + 0.7 * torch.log(total / total.sum())
    assert loss.item() == pytest.approx(F.cross_entropy(adjusted, labels).item(), rel=1e-5)
    assert torch.equal(right, logits.argmax(1) == labels)


def test_subspaces_from_a_recipe(tmp_path):
    tree = {"a": "ab", "b": "ab", "c": "cd", "d": "cd", "ab": "root", "cd": "root", "e": "root"}
    distances = Hierarchy(json.loads(json.dumps(tree))).distances(list("abcde"))
    model = make_model(with_frame("subspaces", neck="residual"), 5, distances)
    head = model.fc
    assert isinstance(head, SubspaceClassifier)
    assert head.dim == 7
    objective = Objective(Loss("hierarchical_subspaces", {"alpha": 0.1}), model, COUNTS)
    right, loss = objective(model, torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 4]))
    loss.backward()
    assert right.shape == (4,)
    assert bool(torch.isfinite(loss))
    assert Objective(Loss(), model, COUNTS)(model, torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 4]))[1] > 0


def test_errors():
    with pytest.raises(EtfZooError, match="class counts, which a stream"):
        make_model(with_frame("seli"), 5)
    with pytest.raises(EtfZooError, match="positive"):
        make_model(dataclasses.replace(with_frame("imbalanced"), optim=Optim(weight_decay=0)), 5, class_counts=COUNTS)
    model = make_model(with_frame("seli"), 5, class_counts=COUNTS)
    with pytest.raises(EtfZooError, match="lengths needs cross_entropy"):
        Objective(Loss("dot_regression"), model, COUNTS)
    with pytest.raises(EtfZooError, match="go together"):
        Objective(Loss("hierarchical_subspaces"), make_model(RECIPE, 5), COUNTS)
    with pytest.raises(EtfZooError, match="logit_adjustment is for cross_entropy"):
        Objective(Loss("dot_regression", logit_adjustment=1.0), make_model(RECIPE, 5), COUNTS)
    with pytest.raises(EtfZooError, match="stream"):
        Objective(Loss(logit_adjustment=1.0), make_model(RECIPE, 5), [])
    assert not frame_heads(make_model(dataclasses.replace(RECIPE, head="learned"), 5))
