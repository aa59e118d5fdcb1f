"""What a run does with damaged files, with files of an enemy, and with other data than it began with."""

import dataclasses
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator

from etf_zoo.errors import EtfZooError
from etf_zoo.trainer.data.batches import Split
from etf_zoo.trainer.recipe.config import Data, Ema, Optim, Recipe
from etf_zoo.trainer.run import checkpoint
from etf_zoo.trainer.run.checkpoint import _digest
from etf_zoo.trainer.run.export import export_run
from etf_zoo.trainer.run.log import read_records
from etf_zoo.trainer.run.run import Run
from etf_zoo.trainer.run.watch import BestEpoch
from etf_zoo.weights.download import sha256
from tests.made_data import write_folder

NAMES = ["a", "b", "c"]
RECIPE = Recipe(
    model="test_resnet_etf",
    data=Data("made up", size=16),
    optim=Optim(lr=1e-2),
    ema=Ema(0.5),
    tensorboard=False,
    epochs=2,
    batch_size=16,
    sizes=[[0, 16]],
)


def split(seed=0, names=NAMES):
    images = np.random.default_rng(seed).integers(0, 255, (48, 16, 16, 3), dtype=np.uint8)
    return Split(images, np.arange(48) % 3, list(names), "made up", "train")


def run(folder, train=None, val=None, **changes):
    recipe = dataclasses.replace(RECIPE, output=str(folder), **changes)
    return Run(recipe, train or split(), val or split(1), best=BestEpoch())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run's folder, with two checkpoints."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run(folder).fit()
    return folder


def flip(file, number):
    """Flip a bit of a file, by a seed."""
    content = bytearray(file.read_bytes())
    place = random.Random(number).randrange(8 * len(content))
    content[place // 8] ^= 1 << place % 8
    file.write_bytes(bytes(content))


def copied(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_a_flipped_bit_in_any_file_of_a_checkpoint_is_noticed(finished, tmp_path, capsys):
    folder = copied(finished, tmp_path) / "checkpoints"
    last, before = sorted(folder.iterdir(), reverse=True)
    files = sorted(last.iterdir())
    assert {file.suffix for file in files} == {".json", ".safetensors"}
    assert {"model", "optimizer", "average", "random_0", "best", "state"} == {file.stem for file in files}
    for file in files:
        content = file.read_bytes()
        for number in range(20):
            flip(file, number)
            found, state = checkpoint.newest(folder, Accelerator())
            assert (found, state["step"]) == (before, 3), (file.name, number)
            assert f"{last} is passed over: " in capsys.readouterr().out
            file.write_bytes(content)
    assert checkpoint.newest(folder, Accelerator())[0] == last


def test_a_damaged_checkpoint_changes_nothing_in_the_end(finished, tmp_path):
    """Trained again from the one before, the run ends where it did."""
    folder = copied(finished, tmp_path)
    flip(folder / "checkpoints" / "step_00000006" / "average.safetensors", 0)
    whole, again = run(finished, resume=True), run(folder, resume=True)
    assert (whole.step, again.step) == (6, 3)
    assert whole.fit()
    assert again.fit()
    for name, value in whole.plain_model().state_dict().items():
        assert torch.equal(value, again.plain_model().state_dict()[name]), name


def test_without_a_sound_checkpoint_nothing_is_overwritten(finished, tmp_path):
    folder = copied(finished, tmp_path)
    for last in (folder / "checkpoints").iterdir():
        flip(last / "model.safetensors", 1)
    with pytest.raises(EtfZooError, match=r"step_00000006 is passed over: model.safetensors was changed or damaged."):
        run(folder, resume=True)
    with pytest.raises(EtfZooError, match="holds a run already"):
        run(folder)
    assert len(list((folder / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize("name", ["metrics.jsonl", "recipe.yaml"])
def test_other_files_are_written_anew(finished, tmp_path, name):
    folder = copied(finished, tmp_path)
    for number in range(8):
        flip(folder / name, number)
    assert run(folder, resume=True).fit()
    expected = (finished / name).read_text().replace(str(finished), str(folder))
    assert (folder / name).read_text() == expected


def test_records_that_cannot_be_read(tmp_path):
    for line in ('{"epoch": 2, "tr', "[1]", '{"epoch": "x"}', "{}", "\x00"):
        (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n' + line)
        with pytest.raises(EtfZooError, match=r"Line 2 of .*metrics.jsonl is no record of an epoch"):
            read_records(tmp_path / "metrics.jsonl")


class Calls:
    """A pickle of it runs code."""

    def __reduce__(self):
        return (pytest.fail, ("code of a checkpoint was run",))


@pytest.mark.parametrize("name", ["model", "optimizer", "average", "random_0"])
def test_a_pickle_in_a_checkpoint_is_refused(finished, tmp_path, name):
    """By an enemy, who gives it the right hash."""
    folder = copied(finished, tmp_path)
    last = folder / "checkpoints" / "step_00000006"
    file = last / f"{name}.safetensors"
    torch.save({"optimizer": Calls(), "scaler": Calls()}, file)
    state = json.loads((last / "state.json").read_text())["state"]
    state["files"][file.name] = [file.stat().st_size, sha256(file)]
    (last / "state.json").write_text(json.dumps({"sha256": _digest(state), "state": state}))
    with pytest.raises(EtfZooError, match=rf"{file.name} is no state that etf-zoo wrote"):
        run(folder, resume=True)


def test_checkpoints_of_an_earlier_format(finished, tmp_path):
    folder = copied(finished, tmp_path)
    for last in (folder / "checkpoints").iterdir():
        (last / "state.json").write_text('{"step": 6, "files": {"optimizer.bin": 10}}')
    with pytest.raises(EtfZooError, match="it has format 1, of another version of etf-zoo"):
        run(folder, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": split(names=["a", "c", "b"])}, r"the training images have another class 1: it was 'b' and is 'c'"),
        ({"train": split(names="abcd")}, r"the training images have 4 classes, which were 3"),
        ({"train": split(2)}, r"the training images are as many, but not the same"),
        ({"train": split().subset(np.arange(47, -1, -1))}, r"the training images are as many, but not the same"),
        ({"val": split(1).subset(np.arange(40))}, r"the validation images were 48 and are 40"),
    ],
    ids=["renamed", "more classes", "other images", "another order", "fewer images"],
)
def test_other_data_than_the_run_began_with(finished, tmp_path, changes, message):
    folder = copied(finished, tmp_path)
    with pytest.raises(EtfZooError, match=rf"was trained on other data: {message}.*choose another --output"):
        run(folder, resume=True, **changes)


def test_a_full_disk_at_the_export(finished, tmp_path):
    """The folder that was there stays as it was."""
    folder = copied(finished, tmp_path)
    whole = run(folder, resume=True)
    assert whole.fit()
    data = dataclasses.replace(RECIPE.data, source="digits", val_split="test")
    whole.recipe = dataclasses.replace(whole.recipe, data=data)
    target = folder / "model"
    target.mkdir()
    (target / "model.safetensors").write_bytes(b"the earlier one")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(EtfZooError, match=r"Could not write the model folder .*/model: File too large. .*--resume"):
            export_run(whole, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [(file.name, file.read_bytes()) for file in target.iterdir()] == [("model.safetensors", b"the earlier one")]


DECODER = """
import itertools, sys, time
from etf_zoo.trainer.data import resident
from etf_zoo.trainer.data.batches import train_batches
from etf_zoo.trainer.data.sources import Rows, open_rows
from etf_zoo.trainer.recipe.config import Augment, Data

read, calls = Rows.encoded, itertools.count()

def stuck_later(rows, row):
    if next(calls) >= 4:
        time.sleep(600)
    return read(rows, row)

if __name__ == "__main__":
    data = Data(sys.argv[1], size=16, val_split="val", resident=False, workers=2)
    rows = open_rows(data, "train", resident=False)
    Rows.encoded = stuck_later
    if sys.argv[2] == "resident":
        resident.PIECE, resident.decoders = 4, lambda most: 2
        batches = resident._decoded(rows, 16, 1.0)
    else:
        batches = train_batches(rows, Augment(), size=16, batch_size=4, seed=0, epoch=0)
    iterator = iter(batches)
    next(iterator)
    print("decoding", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["resident", "as they are"])
def test_decoder_processes_end_with_their_parent(tmp_path, kind):
    """Also one that is in the middle of an image."""
    source = write_folder(tmp_path / "data", {"train": {"a": range(30), "b": range(30)}, "val": {"a": [1], "b": [2]}})
    (tmp_path / "decode.py").write_text(DECODER)
    command = [sys.executable, str(tmp_path / "decode.py"), str(source), kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline().strip() == b"decoding"
        workers = psutil.Process(parent.pid).children(recursive=True)
        assert len(workers) >= 2
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while [w for w in workers if w.is_running() and w.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
