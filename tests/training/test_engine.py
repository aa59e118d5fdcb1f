"""The loop: what it computes, and that stopping and resuming changes nothing."""

import dataclasses
import json

import numpy as np
import pytest
import timm
import torch
from torch import nn

from etf_zoo import frame_heads
from training.config import Augment, Data, Optim, Recipe
from training.data import Split
from training.engine import Run, make_model

RECIPE = Recipe(
    model="mobilenetv3_small_050_etf",
    model_args={"drop_rate": 0.2},  # so that resuming has to restore the random state too
    data=Data("digits", val_split="test", size=32, limit=256),
    augment=Augment(flip=False),
    optim=Optim(lr=2e-3),
    tensorboard=False,
    epochs=2,
    batch_size=64,
    sizes=[[0, 24], [1, 32]],
)


def run(tmp_path, name, **changes):
    recipe = dataclasses.replace(RECIPE, output=str(tmp_path / name), **changes)
    return Run(recipe)


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path):
    whole = run(tmp_path, "whole")
    assert whole.fit()
    stopped = run(tmp_path, "stopped", time_budget="0s")
    assert not stopped.fit()  # one step, then saved
    assert stopped.step == 1
    again = run(tmp_path, "stopped", time_budget="0s", resume=True)
    assert not again.fit()
    resumed = run(tmp_path, "stopped", resume=True)
    assert resumed.step == 2
    assert resumed.fit()
    for key, value in whole.plain_model().state_dict().items():
        assert torch.equal(value, resumed.plain_model().state_dict()[key]), key
    records = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [(r["epoch"], r["size"]) for r in records] == [(1, 24), (2, 32)]
    assert records[1]["train_loss"] < records[0]["train_loss"]
    assert all("val_nc1_pinv" in r and "val_nc4_agreement" in r for r in records)
    assert run(tmp_path, "whole", resume=True).fit()  # a finished run has nothing left to do


def test_the_frame_is_not_trained_and_the_backbone_is(tmp_path):
    trained = run(tmp_path, "run", epochs=1)
    before = {k: v.clone() for k, v in trained.plain_model().state_dict().items()}
    trained.fit()
    after = trained.plain_model().state_dict()
    assert torch.equal(before["classifier.weight"], after["classifier.weight"])
    assert not torch.equal(before["conv_stem.weight"], after["conv_stem.weight"])


def test_half_written_checkpoints_are_passed_over(tmp_path, capsys):
    stopped = run(tmp_path, "run", epochs=1, save_steps=1, keep_checkpoints=3)
    assert stopped.fit()
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(f.name for f in checkpoints.iterdir()) == ["step_00000002", "step_00000003", "step_00000004"]
    (checkpoints / "step_00000004" / "state.json").write_text('{"step": 4, "fi')
    weights = checkpoints / "step_00000003" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (checkpoints / "step_00000009.part").mkdir()  # killed while saving
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_text(log.read_text() + '{"epoch": 2, "tr')  # and while writing a line
    resumed = run(tmp_path, "run", resume=True)
    assert resumed.step == 2
    out = capsys.readouterr().out
    assert "step_00000004 is passed over, it is incomplete: no readable state.json" in out
    assert "step_00000003 is passed over, it is incomplete: model.safetensors has" in out
    assert log.read_text() == ""  # the first epoch is not over at step 2
    assert resumed.fit()
    assert sorted(f.name for f in checkpoints.iterdir()) == ["step_00000004", "step_00000008"]


def test_a_finished_folder_is_not_overwritten(tmp_path):
    run(tmp_path, "run", time_budget="0s").fit()
    with pytest.raises(ValueError, match="--resume"):
        run(tmp_path, "run")
    with pytest.raises(ValueError, match="no checkpoint"):
        run(tmp_path, "elsewhere", resume=True)


def test_batch_larger_than_the_data(tmp_path):
    with pytest.raises(ValueError, match="do not fill one batch"):
        run(tmp_path, "run", batch_size=1000)


def test_diverged_loss_stops_with_advice(tmp_path):
    broken = run(tmp_path, "run")
    with torch.no_grad():
        broken.plain_model().conv_stem.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"lower --optim\.lr"):
        broken.fit()


def test_heads_share_the_backbone():
    recipe = dataclasses.replace(RECIPE, model_args={"orientation": "blocks"})
    frame, random, learned = (
        make_model(dataclasses.replace(recipe, head=head), 10) for head in ("frame", "random", "learned")
    )
    assert torch.equal(frame.conv_head.weight, learned.conv_head.weight)
    assert torch.equal(frame.conv_head.weight, random.conv_head.weight)
    assert isinstance(learned.classifier, nn.Linear)
    assert frame_heads(random)["classifier"].frame == "random"
    plain = make_model(dataclasses.replace(recipe, model="resnet10t", head="frame"), 10)
    assert list(frame_heads(plain)) == ["fc"]


def test_learned_head_on_pretrained_weights():
    recipe = dataclasses.replace(RECIPE, model="mobilenetv3_small_100_etf", model_args={}, pretrained=True)
    frame, learned = (make_model(dataclasses.replace(recipe, head=head), 10) for head in ("frame", "learned"))
    twin = timm.create_model("mobilenetv3_small_100_etf", pretrained=True)
    for model in (frame, learned):
        assert torch.equal(model.conv_head.weight, twin.conv_head.weight)
        assert torch.equal(model.bn1.running_var, twin.bn1.running_var)
    assert isinstance(learned.classifier, nn.Linear)
    assert learned.pretrained_cfg["architecture"] == "mobilenetv3_small_100"


def test_given_data_is_used(tmp_path):
    images = np.zeros((64, 32, 32, 3), np.uint8)
    split = Split(images, np.arange(64) % 3, ["a", "b", "c"], "made up")
    recipe = dataclasses.replace(RECIPE, output=str(tmp_path / "run"), epochs=1)
    given = Run(recipe, train=split, val=split)
    given.fit()
    assert given.plain_model().num_classes == 3
    assert given.summary()["data_source"] == "made up"
