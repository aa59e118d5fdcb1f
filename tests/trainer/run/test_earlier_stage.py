"""The second head: its loss by hand, in training alone, gone from what is exported."""

import copy
import dataclasses
from typing import Any

import pytest
import timm
import torch
from torch.nn import functional as F

from etf_zoo import frame_heads
from etf_zoo.errors import EtfZooError
from etf_zoo.layers.cosine import LearnedCosineClassifier
from etf_zoo.trainer.recipe.config import Augment, Data, Ema, Loss, Optim, Recipe
from etf_zoo.trainer.run.earlier_stage import STAGE_HEAD, add_stage_head, without_stage_head
from etf_zoo.trainer.run.model import make_model
from etf_zoo.trainer.run.objective import Objective
from etf_zoo.trainer.run.run import Run

RECIPE = Recipe(model="test_resnet_etf", loss=Loss(stage_weight=0.3), label_smoothing=0.1)
IMAGES, LABELS = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 5


@pytest.mark.parametrize("head", ["frame", "random", "learned", "learned_cosine"])
def test_the_loss_is_that_of_both_heads(head):
    model: Any = make_model(dataclasses.replace(RECIPE, head=head), 5)
    before = copy.deepcopy(model)
    _, loss = Objective(RECIPE.loss, model, [], 0.1)(model, IMAGES, LABELS)
    stages = before.forward_intermediates(IMAGES, intermediates_only=True)
    pooled = stages[-2].mean(dim=(2, 3))
    own = F.cross_entropy(before.fc(before.global_pool(stages[-1])), LABELS, label_smoothing=0.1)
    second = F.cross_entropy(before.stage_head(pooled), LABELS, label_smoothing=0.1)
    torch.testing.assert_close(loss, own + 0.3 * second)
    loss.backward()
    grads = [p.grad for p in model.stage_head.parameters()]
    assert grads
    assert all(g is not None and torch.isfinite(g).all() for g in grads)
    assert isinstance(model.stage_head, LearnedCosineClassifier) == (head == "learned_cosine")


def test_the_second_frame_has_the_scale_of_the_first():
    model = make_model(dataclasses.replace(RECIPE, model_args={"logit_scale": 9.0}), 5)
    assert {name: head.logit_scale.item() for name, head in frame_heads(model).items()} == {"fc": 9.0, STAGE_HEAD: 9.0}
    solved = frame_heads(make_model(RECIPE, 5)).values()  # by the recipe's label smoothing
    assert len({round(head.logit_scale.item(), 4) for head in solved}) == 1


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_run_trains_it_and_gives_a_model_without_it(tmp_path, decay):
    data = Data("digits", val_split="test", size=32, limit=64)
    recipe = dataclasses.replace(
        RECIPE, output=str(tmp_path), data=data, epochs=1, batch_size=32, sizes=[[0, 32]], ema=Ema(decay), seed=1
    )
    run = Run(dataclasses.replace(recipe, optim=Optim(lr=0.1, warmup_epochs=0)))
    start = run.trained_model().stage_head.neck[0].weight.clone()
    assert run.fit()
    whole, exported = run.trained_model(), run.plain_model()
    assert not torch.equal(whole.stage_head.neck[0].weight, start)
    plain = timm.create_model("test_resnet_etf", num_classes=10)
    assert exported.state_dict().keys() == plain.state_dict().keys()
    assert list(frame_heads(exported)) == ["fc"]
    assert hasattr(whole, STAGE_HEAD)  # which can go on
    resumed = Run(dataclasses.replace(recipe, resume=True))
    assert torch.equal(resumed.trained_model().stage_head.neck[0].weight, whole.stage_head.neck[0].weight)


def test_a_model_without_it_is_itself_and_shares_its_weights():
    plain = timm.create_model("test_resnet", num_classes=5)
    assert without_stage_head(plain) is plain
    model = make_model(RECIPE, 5).train()
    bare = without_stage_head(model)
    assert type(bare) is type(model)
    assert bare.fc is model.fc
    bare.eval()
    torch.testing.assert_close(bare(IMAGES), model.eval()(IMAGES))


def test_errors():
    plain = timm.create_model("test_resnet", num_classes=5)
    with pytest.raises(EtfZooError, match="second head"):
        Objective(Loss(stage_weight=0.3), plain, [])
    with pytest.raises(EtfZooError, match="none of ResNet's stages: act1, layer1"):
        add_stage_head(plain, dataclasses.replace(RECIPE, loss=Loss(stage_weight=1.0, stage="layer9")), 5)
    with pytest.raises(EtfZooError, match="compile"):
        Recipe(loss=Loss(stage_weight=0.3), compile=True)
    named: Any = make_model(dataclasses.replace(RECIPE, loss=Loss(stage_weight=1.0, stage="layer2")), 5)
    assert named.stage_head.in_features == 48
    Objective(Loss(stage_weight=1.0, stage="layer2"), named, [])(named, IMAGES, LABELS)
    assert Augment().views == 1
