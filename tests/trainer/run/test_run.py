"""The loop: what it computes, and that stopping and resuming changes nothing."""

import dataclasses
import errno
import fcntl
import json
import os
import resource
import sys

import numpy as np
import pytest
import timm
import torch
from torch import nn

from etf_zoo import frame_heads
from etf_zoo.trainer.data.augment import colors_of
from etf_zoo.trainer.data.batches import Split, eval_batches
from etf_zoo.trainer.recipe.config import Augment, Data, Ema, Optim, Recipe
from etf_zoo.trainer.run.checkpoint import CheckpointError, _digest
from etf_zoo.trainer.run.export import export_run
from etf_zoo.trainer.run.launching import in_float32
from etf_zoo.trainer.run.loop import Loop
from etf_zoo.trainer.run.model import make_model, make_optimizer
from etf_zoo.trainer.run.run import Run
from training.experiments.frozen import predictions

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


def rewrite_state(checkpoint, **changes):
    """Change what a checkpoint says, as one that was written so."""
    file = checkpoint / "state.json"
    state = {**json.loads(file.read_text())["state"], **changes}
    file.write_text(json.dumps({"sha256": _digest(state), "state": state}))


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
    assert "step_00000004 is passed over: it has no readable state.json" in out
    assert "step_00000003 is passed over: model.safetensors has" in out
    assert resumed.records == []  # the first epoch is not over at step 2
    assert resumed.fit()
    assert [json.loads(line)["epoch"] for line in log.read_text().splitlines()] == [1, 2]
    assert sorted(f.name for f in checkpoints.iterdir()) == ["step_00000004", "step_00000008"]


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    """The system refuses files beyond a size, in the middle of the second checkpoint's weights."""
    stopped = run(tmp_path, "run", epochs=1, time_budget="0s")
    stopped.fit()
    weights = tmp_path / "run" / "checkpoints" / "step_00000001" / "model.safetensors"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (weights.stat().st_size // 2, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"step_00000001 is intact: make room, then go on with --resume"):
            run(tmp_path, "run", epochs=1, save_steps=1, resume=True).fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [f.name for f in weights.parents[1].iterdir()] == ["step_00000001"]  # what was half written is gone
    resumed = run(tmp_path, "run", epochs=1, resume=True)
    assert resumed.step == 1
    assert resumed.fit()


def test_a_full_disk_at_the_log(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    stopped = run(tmp_path, "run", epochs=1)
    monkeypatch.setattr("etf_zoo.trainer.run.log.open", full, raising=False)
    with pytest.raises(OSError, match=r"metrics.jsonl: No space left on device. .*--resume"):
        stopped.fit()


def test_a_budget_that_ends_with_the_epoch(tmp_path, monkeypatch):
    """The epoch is evaluated and logged before the run stops, and not again after it."""
    stopped = run(tmp_path, "run", sizes=[[0, 24]])
    with monkeypatch.context() as context:
        context.setattr(Loop, "clock", lambda loop, look: (stopped.step == stopped.steps_per_epoch, False))
        assert not stopped.fit()
    assert stopped.step == stopped.steps_per_epoch
    resumed = run(tmp_path, "run", sizes=[[0, 24]], resume=True)
    assert resumed.fit()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(r["epoch"], "val_top1" in r) for r in records] == [(1, True), (2, True)]


def test_saves_by_the_clock(tmp_path):
    saving = run(tmp_path, "run", epochs=1, save_minutes=1e-9, keep_checkpoints=9)
    saving.fit()
    assert sorted(f.name for f in (tmp_path / "run" / "checkpoints").iterdir()) == [
        f"step_0000000{i}" for i in (1, 2, 3, 4)
    ]


def test_resuming_with_another_recipe(tmp_path, capsys):
    run(tmp_path, "run", time_budget="0s").fit()
    with pytest.raises(ValueError, match=r"another model, optimizer or average \(head frame -> learned\)"):
        run(tmp_path, "run", resume=True, head="learned")
    with pytest.raises(ValueError, match="4 steps in an epoch, this recipe 8"):
        run(tmp_path, "run", resume=True, batch_size=32)
    for changes, message in (
        ({"optim": Optim("sgd")}, r"optim\.name adamw -> sgd"),
        ({"ema": Ema(0.9)}, r"ema\.decay 0\.0 -> 0\.9"),
        ({"model_args": {}}, r"model_args \{'drop_rate': 0\.2\} -> \{\}"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path, "run", resume=True, **changes)
    again = run(tmp_path, "run", resume=True, optim=Optim(lr=1e-3, weight_decay=0.5, betas=[0.8, 0.9]))
    assert "another recipe than before: optim.lr 0.002 -> 0.001" in capsys.readouterr().out
    assert again.step == 1
    assert again.fit()
    assert "lr: 0.001" in (tmp_path / "run" / "recipe.yaml").read_text()
    groups = again.optimizer.param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, 0.5}  # what is announced is what is done
    assert {group["betas"] for group in groups} == {(0.8, 0.9)}


def test_several_processes_do_not_go_on_from_one(tmp_path):
    run(tmp_path, "run", time_budget="0s").fit()
    rewrite_state(tmp_path / "run" / "checkpoints" / "step_00000001", processes=2)
    with pytest.raises(ValueError, match=r"is of 2 process\(es\): resume with one if it was one"):
        run(tmp_path, "run", resume=True)


def test_one_training_a_folder(tmp_path):
    """A second one is refused before it has changed anything."""
    first, folder = run(tmp_path, "run", epochs=1), tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("of the first\n")
    (folder / "metrics.jsonl").write_text('{"epoch": 1}\n')
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="Another process trains in"):
            first.fit()
    assert (folder / "recipe.yaml").read_text() == "of the first\n"
    assert (folder / "metrics.jsonl").read_text() == '{"epoch": 1}\n'
    late = run(tmp_path, "run", epochs=1)
    assert first.fit()
    recipe, records = (folder / "recipe.yaml").read_text(), (folder / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="Another process trains in"):  # which did since this one looked
        late.fit()
    with pytest.raises(ValueError, match="holds a run already"):
        run(tmp_path, "run", epochs=2)
    assert (folder / "recipe.yaml").read_text() == recipe
    assert (folder / "metrics.jsonl").read_text() == records


def test_a_killed_save_leaves_the_recipe(tmp_path, monkeypatch):
    run(tmp_path, "run", time_budget="0s").fit()
    before = (tmp_path / "run" / "recipe.yaml").read_text()
    monkeypatch.setattr(
        "etf_zoo.trainer.recipe.config.yaml.safe_dump", lambda *args, **kwargs: (_ for _ in ()).throw(OSError())
    )
    with pytest.raises(OSError):  # noqa: PT011
        run(tmp_path, "run", resume=True, optim=Optim(lr=1e-3)).fit()
    assert (tmp_path / "run" / "recipe.yaml").read_text() == before


def test_an_old_start_keeps_its_own_checkpoints(tmp_path):
    """Later ones are of the run before it went back; they are in the way of those that count."""
    stopped = run(tmp_path, "run", epochs=1, save_steps=1, keep_checkpoints=4)
    assert stopped.fit()
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in (3, 4):
        (checkpoints / f"step_0000000{step}" / "state.json").unlink()
    resumed = run(tmp_path, "run", resume=True, save_steps=1, keep_checkpoints=1, epochs=1)
    monitored = []
    step = resumed.stepper.step
    resumed.stepper.step = lambda *batch: (
        monitored.append(sorted(f.name for f in checkpoints.iterdir())) or step(*batch)
    )
    assert resumed.fit()
    assert monitored[1] == ["step_00000003"]
    assert sorted(f.name for f in checkpoints.iterdir()) == ["step_00000004"]


def test_accumulation_changes_nothing_but_rounding(tmp_path):
    """On a model without statistics of a batch; and with several pieces a moving frame sees all of them."""
    recipe = {
        "model": "convnext_atto_etf",
        "model_args": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "moving": True},
        "optim": Optim("sgd", lr=0.02, clip_grad=1.0),
        "sizes": [[0, 32]],
        "epochs": 1,
    }
    weights = []
    for accumulate in (1, 4):
        one = run(tmp_path, f"run{accumulate}", accumulate=accumulate, **recipe)
        one.fit()
        weights.append(one.plain_model().state_dict())
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, atol=1e-5, rtol=0, msg=lambda m, key=key: f"{key}: {m}")
    with pytest.raises(ValueError, match="64 does not divide by 1 processes times accumulate 3"):
        run(tmp_path, "other", accumulate=3)


def test_average_of_the_weights(tmp_path):
    """timm's average, step by step, but with the frame of the model itself; it is what is evaluated."""
    averaged = run(tmp_path, "run", epochs=1, ema=Ema(0.5, warmup=False), model_args={"moving": True})
    expected = None
    step = averaged.stepper.step

    def watched(*batch):
        nonlocal expected
        sums = step(*batch)
        now = averaged.trained_model().conv_stem.weight.detach().clone()
        expected = now if expected is None else expected.lerp(now, 0.5)  # the first step is copied
        return sums

    averaged.stepper.step = watched
    averaged.fit()
    model, own = averaged.plain_model(), averaged.trained_model()
    torch.testing.assert_close(model.conv_stem.weight, expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(model.classifier.weight, own.classifier.weight)
    gram = model.classifier.weight.double() @ model.classifier.weight.double().T
    torch.testing.assert_close(gram, (10 * torch.eye(10) - 1).double() / 9, atol=1e-5, rtol=0)
    assert not torch.equal(model.conv_stem.weight, own.conv_stem.weight)
    loss = averaged.evaluate()["loss"]
    averaged.stepper.ema = None
    assert averaged.evaluate()["loss"] != loss


def test_learning_rate_by_layer():
    model = make_model(RECIPE, 10)
    optimizer = make_optimizer(Optim(lr=1.0, layer_decay=0.5), model)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    scales = [scale[id(p)] for p in (model.conv_stem.weight, model.blocks[0][0].conv_dw.weight, model.conv_head.weight)]
    assert scales == sorted(set(scales))
    assert all("lr_scale" not in group for group in make_optimizer(Optim(), model).param_groups)


def test_muon_leaves_the_output_layer_to_adamw_and_takes_a_neck():
    """What the matrices of a model are trained by; vectors are AdamW's anyway."""

    def by_adamw(head, **changes):
        model = make_model(dataclasses.replace(RECIPE, head=head, **changes), 10)
        groups = make_optimizer(Optim(name="muon"), model).param_groups
        chosen = {id(p) for group in groups if group.get("use_fallback") for p in group["params"]}
        return {name for name, p in model.named_parameters() if id(p) in chosen and p.ndim > 1}

    assert by_adamw("learned") == {"classifier.weight"}
    assert by_adamw("frame") == set()
    assert by_adamw("learned_cosine") == {"classifier.prototypes"}
    neck = {"model": "resnet10t_etf", "model_args": {"neck": "mlp"}}
    assert by_adamw("frame", **neck) == set()
    assert by_adamw("learned", **neck) == {"fc.1.weight"}
    # its output layer is a 1x1 convolution, two layers, a layer behind a norm, the last of two layers
    assert by_adamw("learned", model="vgg11") == {"head.fc.weight"}
    assert by_adamw("learned", model="deit_tiny_distilled_patch16_224") == {"head.weight", "head_dist.weight"}
    assert by_adamw("learned", model="levit_128s") == {"head.linear.weight", "head_dist.linear.weight"}
    assert by_adamw("learned", model="caformer_s18") == {"head.fc.fc2.weight"}


def test_schedule_ends_at_the_smallest_rate(tmp_path):
    recipe = {"optim": Optim(lr=0.1, min_lr=0.01, warmup_epochs=0.5), "epochs": 1, "batch_size": 16}
    ended = run(tmp_path, "run", **recipe)
    rates = [(ended.stepper.schedule.step_update(step), ended.stepper.lr())[1] for step in range(17)]
    assert rates[:8] == pytest.approx([0.1 * (step + 1) / 9 for step in range(8)])  # none is 0
    assert rates[8:] == sorted(rates[8:], reverse=True)
    assert rates[16] == pytest.approx(0.01)


def test_tensorboard(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, "run", epochs=1, tensorboard=True, log_every=2).fit()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4]
    assert {"train/top1", "train/lr", "train/images_per_second", "val/top1", "val/top5", "val/nc1_pinv"} <= set(
        events.Tags()["scalars"]
    )
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        run(tmp_path, "other", tensorboard=True).fit()


def test_half_precision_without_a_gpu(tmp_path):
    if torch.accelerator.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        run(tmp_path, "run", precision="fp16")
    half = run(tmp_path, "run", precision="bf16", epochs=1)
    assert half.fit()
    assert half.plain_model().classifier.weight.dtype == torch.float32
    measured = export_run(half, tmp_path / "model")["results"]  # in float32, in a process that trained in bf16
    assert measured.keys() >= {"top1", "nc1_quotient"}


def test_figures_of_a_training_in_half_precision_are_of_float32(tmp_path):
    half = run(tmp_path, "run", precision="bf16", epochs=1)
    half.fit()
    model = half.plain_model().eval()
    plain = make_model(half.recipe, 10).eval()
    plain.load_state_dict(model.state_dict())
    batches = list(eval_batches(half.val_split, size=32, batch_size=150, colors=colors_of(plain)))
    with torch.no_grad():
        expected = [plain(images) for images, _ in batches]
        assert (model(batches[0][0]) - expected[0]).abs().max() > 1e-4  # accelerate's autocast is still in it
        with in_float32(model):
            torch.testing.assert_close(model(batches[0][0]), expected[0])
        assert (model(batches[0][0]) - expected[0]).abs().max() > 1e-4
    loss = nn.functional.cross_entropy(torch.cat(expected), torch.cat([labels for _, labels in batches])).item()
    assert half.evaluate()["loss"] == pytest.approx(loss, rel=1e-5)
    under_autocast = []
    with model.conv_stem.register_forward_pre_hook(lambda *_: under_autocast.append(torch.is_autocast_enabled("cpu"))):
        assert torch.equal(predictions(model, half.val_split, 32), torch.cat(expected).argmax(1))
    assert under_autocast
    assert not any(under_autocast)


@pytest.mark.slow
def test_compiled_equals_eager(tmp_path):
    recipe = {
        "model": "convnext_atto_etf",
        "model_args": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "moving": True},
        "optim": Optim("sgd", lr=0.02),
        "ema": Ema(0.9),
        "sizes": [[0, 32]],
        "epochs": 1,
    }
    models = []
    for compiled in (False, True):
        one = run(tmp_path, f"run{compiled}", compile=compiled, **recipe)
        one.fit()
        models.append(one.plain_model().state_dict())
    for key, value in models[0].items():
        torch.testing.assert_close(models[1][key], value, atol=1e-4, rtol=0, msg=lambda m, key=key: f"{key}: {m}")


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


def test_misspelled_model_arguments():
    for name in ("test_resnet_etf", "test_resnet"):
        with pytest.raises(ValueError, match=rf"{name} cannot be made with model_args .*orientaton"):
            make_model(dataclasses.replace(RECIPE, model=name, model_args={"orientaton": "blocks"}), 10)


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
