"""Real processes: launched by the launch files, killed, resumed, sharded."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import psutil
import pytest
import timm
import torch
from PIL import Image

from etf_zoo.trainer.recipe.config import Augment, Data, Ema, Optim, Recipe, parse, save_recipe
from etf_zoo.trainer.run.run import Run
from etf_zoo.trainer.run.watch import BestEpoch

ROOT = Path(__file__).parents[2]
DRIVER = ROOT / "tests" / "training" / "run_recipes.py"
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": str(ROOT),
    "PYTHONWARNINGS": "ignore",
}
RECIPE = Recipe(
    model="mobilenetv3_small_050_etf",
    model_args={"drop_rate": 0.2, "moving": True},
    data=Data("digits", val_split="test", size=32, limit=320),
    augment=Augment(flip=False),
    optim=Optim(lr=2e-3, clip_grad=1.0),
    ema=Ema(0.9),
    tensorboard=False,
    epochs=2,
    batch_size=32,
    accumulate=2,
    sizes=[[0, 24]],
    save_steps=3,
)
PLAIN = dataclasses.replace(  # no statistics of a batch, nothing drawn in the model: processes can equal one
    RECIPE,
    model="convnext_atto_etf",
    model_args={"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]},
    optim=Optim("sgd", lr=0.02),
    ema=Ema(),
    epochs=1,
    accumulate=1,
    sizes=[[0, 32]],
)


@pytest.fixture(autouse=True)
def one_thread():
    """Sums are the same to the last bit with as many threads only."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def written(recipe, folder, name, **changes):
    """A recipe with an output folder, and its file."""
    recipe = dataclasses.replace(recipe, output=str(folder / name), **changes)
    file = folder / f"{name}{len(list(folder.iterdir()))}.yaml"
    save_recipe(recipe, file)
    return recipe, str(file)


def launched(launch, *arguments):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"{ROOT}/training/launch/{launch}"]
    return [*command, *arguments]


def finish(command):
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def kill_in_mid_epoch(command, folder):
    """kill -9 of all processes as soon as there is a checkpoint."""
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not list(folder.glob("checkpoints/step_*[0-9]")):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(process.communicate()[1][-4000:])
        time.sleep(0.02)
    victims = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for victim in victims:
        victim.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    states = [state_of(f) for f in folder.glob("checkpoints/step_*[0-9]")]
    assert max(state["step"] for state in states) % states[0]["steps_per_epoch"] > 0
    assert not (folder / "weights.pt").exists()


def state_of(checkpoint):
    return json.loads((checkpoint / "state.json").read_text())["state"]


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[key], other[key]) for key in one)


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    killed, file = written(RECIPE, tmp_path, "killed")
    kill_in_mid_epoch([sys.executable, str(DRIVER), file], Path(killed.output))
    whole = Run(dataclasses.replace(RECIPE, output=str(tmp_path / "whole")))
    assert whole.fit()
    resumed = Run(dataclasses.replace(killed, resume=True))
    assert 0 < resumed.step < 20
    assert resumed.fit()
    assert same(whole.trained_model().state_dict(), resumed.trained_model().state_dict())
    assert same(whole.plain_model().state_dict(), resumed.plain_model().state_dict())
    assert not same(whole.trained_model().state_dict(), whole.plain_model().state_dict())  # the average is another
    logs = [(Path(run.recipe.output) / "metrics.jsonl").read_text().splitlines() for run in (whole, resumed)]
    for one, other in zip(*([json.loads(line) for line in log] for log in logs), strict=True):
        for changing in ("seconds", "images_per_second"):
            del one[changing], other[changing]
        assert one == other


def stop_in_mid_epoch(command, folder, number):
    """A signal as soon as there is a new checkpoint; the exit code and what was said, without the progress bar."""
    # a shell's job in the background ignores Ctrl-C, and so would the processes that it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = set(folder.glob("checkpoints/step_*[0-9]"))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
    with subprocess.Popen(command, **pipes) as process:
        deadline = time.monotonic() + 300
        while not set(folder.glob("checkpoints/step_*[0-9]")) - before:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.fail(process.communicate()[1][-4000:])
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate()
    return process.returncode, out + "".join(line for line in err.splitlines(True) if "images/s" not in line)


def test_stopped_by_a_signal_and_resumed_equals_uninterrupted(tmp_path):
    recipe = dataclasses.replace(RECIPE, epochs=6)  # long enough for two signals, however late one comes
    stopped, file = written(recipe, tmp_path, "stopped")
    _, again = written(recipe, tmp_path, "stopped", resume=True)
    for config, number, code in ((file, signal.SIGTERM, 143), (again, signal.SIGINT, 130)):
        returned, said = stop_in_mid_epoch([sys.executable, str(DRIVER), config], Path(stopped.output), number)
        assert returned == code
        assert re.search(r"Stopped at step \d+ of 60; saved.\nGo on with the same command and --resume.", said)
        assert "Traceback" not in said
    resumed = Run(dataclasses.replace(stopped, resume=True))
    assert 0 < resumed.step < 60
    assert resumed.fit()
    whole = Run(dataclasses.replace(recipe, output=str(tmp_path / "whole")))
    assert whole.fit()
    assert same(whole.trained_model().state_dict(), resumed.trained_model().state_dict())
    assert same(whole.plain_model().state_dict(), resumed.plain_model().state_dict())


def test_two_processes(tmp_path):
    """Killed and resumed they are the same to the last bit; they equal one process to 1e-5, after ten steps."""
    killed, file = written(RECIPE, tmp_path, "killed")
    kill_in_mid_epoch(launched("cpu_processes.yaml", str(DRIVER), file), Path(killed.output))
    _, resumed = written(RECIPE, tmp_path, "killed", resume=True)
    _, whole = written(RECIPE, tmp_path, "whole")
    plain, shared = written(PLAIN, tmp_path, "shared")
    finish(launched("cpu_processes.yaml", str(DRIVER), resumed, whole, shared))
    first, second, two = (torch.load(tmp_path / name / "weights.pt") for name in ("killed", "whole", "shared"))
    assert same(first, second)
    one = Run(dataclasses.replace(plain, output=str(tmp_path / "one")))
    one.fit()
    for key, value in one.plain_model().state_dict().items():
        torch.testing.assert_close(two[key], value, atol=1e-5, rtol=0, msg=lambda m, key=key: f"{key}: {m}")
    records = [json.loads((tmp_path / name / "metrics.jsonl").read_text()) for name in ("one", "shared")]
    for figure in ("train_loss", "train_top1", "val_loss", "val_top1", "val_top5", "val_nc1_pinv", "val_nc4_agreement"):
        assert records[0][figure] == pytest.approx(records[1][figure], rel=1e-4), figure
    state = state_of(tmp_path / "shared" / "checkpoints" / "step_00000010")
    assert {"random_0.safetensors", "random_1.safetensors"} < state["files"].keys()


@pytest.fixture
def stand_in(tmp_path):
    """Parquet shards as ImageNet's on the Hub: columns image and label, images of many shapes."""
    rng = np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("abcd"))})
    folder = tmp_path / "imagenet" / "data"
    folder.mkdir(parents=True)
    for split, shards, count in (("train", 4, 24), ("validation", 2, 17)):  # 34 images: 2 and 1 batches of 16
        for shard in range(shards):
            labels = [int(i) for i in rng.integers(0, 4, count - (split == "validation" and shard))]
            images = [
                Image.fromarray((rng.integers(0, 64, (36 + 4 * k, 40, 3)) + 48 * k).astype(np.uint8)) for k in labels
            ]
            rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
            rows.to_parquet(folder / f"{split}-{shard:05d}-of-{shards:05d}.parquet")
    return folder.parent


def test_fully_sharded(tmp_path, stand_in):
    """A step, a save, a load and an export by two processes that hold half of the model each."""
    data = Data(str(stand_in), size=32)
    recipe = dataclasses.replace(PLAIN, data=data, batch_size=16, epochs=2, tag="test", notes="keep the best epoch")
    _, first = written(recipe, tmp_path, "sharded", time_budget="0s", log_every=1, tag="")
    _, second = written(recipe, tmp_path, "sharded", resume=True)
    options = ["--num_processes", "2", "--fsdp_min_num_params", "1000"]
    done = finish(launched("fsdp.yaml", *options, str(DRIVER), first, second))
    assert "used up at step 1 of 12; saved." in done.stdout
    files = state_of(tmp_path / "sharded" / "checkpoints" / "step_00000012")["files"]
    assert {f"{name}.safetensors" for name in ("model", "optimizer", "best", "random_0", "random_1")} == set(files)
    sharded = torch.load(tmp_path / "sharded" / "weights.pt")
    one = Run(dataclasses.replace(recipe, output=str(tmp_path / "one")), best=BestEpoch())
    one.fit()
    assert f"epoch {one.best.score.epoch}, " in done.stdout
    for key, value in one.plain_model().state_dict().items():
        torch.testing.assert_close(sharded[key], value, atol=1e-5, rtol=0, msg=lambda m, key=key: f"{key}: {m}")
    records = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in ("one", "sharded")
    ]
    for figure in ("val_loss", "val_top1", "val_nc1_pinv"):
        assert records[0][figure] == pytest.approx(records[1][figure], rel=1e-2), figure  # few classes: nc1 is touchy
    exported = timm.create_model(f"local-dir:{tmp_path / 'sharded' / 'model'}", pretrained=True)
    assert torch.equal(exported.head.fc.weight, sharded["head.fc.weight"])
    assert parse(Recipe, ["--config", str(tmp_path / "sharded" / "model" / "recipe.yaml")]).tag == "test"
