"""Training by `etf-zoo`: in place, in processes, and what it says without the extra packages."""

import json

import pytest

from etf_zoo.cli import train as train_module
from etf_zoo_cli import main

SHORT = ["--data", "digits", "--data.val_split", "test", "--data.limit", "64", "--sizes", "[[0, 16]]", "--epochs", "1"]
SHORT += ["--model", "test_resnet_etf", "--pretrained", "false", "--tensorboard", "false", "--batch-size", "32"]


def test_finetune_in_place(tmp_path, capsys):
    assert main(["finetune", *SHORT, "--output", str(tmp_path / "run")]) == 0
    assert f"Model:   {tmp_path / 'run' / 'model'}" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "model" / "metrics.json").read_text())["dataset"]["images"] == 450
    assert main(["info", str(tmp_path / "run")]) == 0
    assert "simplex ETF of 10 classes" in capsys.readouterr().out


def test_a_mistake_of_the_recipe_is_one_line(capsys):
    assert main(["finetune", "--data", "digits", "--learning-rate", "1"]) == 2
    error = capsys.readouterr().err
    assert "Did you mean 'optim.lr'?" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", ["finetune", "pretrain", "prepare"])
def test_all_options(command, capsys):
    assert main([command, "--all-options"]) == 0
    out = capsys.readouterr().out
    assert "--data.label_column" in out
    assert ("--optim.lr" in out) == (command != "prepare")


@pytest.mark.parametrize(
    "arguments", [["finetune", "--data", "x"], ["evaluate", "m", "d"], ["convert", "resnet18", "out", "--data", "d"]]
)
def test_without_the_extra(arguments, monkeypatch, capsys):
    monkeypatch.setattr(train_module, "PACKAGES", ("json", "accelerate_not_there"))
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "needs accelerate_not_there: pip install 'etf-zoo[training]'" in error
    assert error.count("\n") == 1


def test_processes_go_through_the_launcher(monkeypatch):
    started = []
    monkeypatch.setattr("etf_zoo.trainer.run.launcher.launch", lambda command: started.append(command) or 7)
    assert main(["finetune", "--processes", "2", "--resume", "--data", "x"]) == 7
    command = started[0]
    assert command[command.index("--num_processes") + 1] == "2"
    assert command[-6:] == ["-m", "etf_zoo.trainer", "finetune", "--resume", "--data", "x"]
    assert main(["evaluate", "m", "d", "--config_file", "f.yaml", "--split", "val"]) == 7
    assert started[1][:2] == ["--config_file", "f.yaml"]
    assert started[1][-6:] == ["--model", "m", "--data.source", "d", "--data.val_split", "val"]


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path, capfd):
    assert main(["finetune", *SHORT, "--output", str(tmp_path / "run"), "--processes", "2"]) == 0
    metrics = json.loads((tmp_path / "run" / "model" / "metrics.json").read_text())
    assert metrics["training"]["processes"] == 2
    for extra in ([], ["--processes", "2"]):
        out = tmp_path / f"{len(extra)}.json"
        errors = tmp_path / f"{len(extra)}.csv"
        arguments = ["evaluate", str(tmp_path / "run"), "digits", "--output", str(out), "--errors", str(errors)]
        assert main([*arguments, *extra]) == 0
        again = json.loads(out.read_text())
        for name in ("top1", "top5", "loss", "ece"):
            assert again["results"][name] == pytest.approx(metrics["results"][name], rel=1e-5)
    assert sorted((tmp_path / "0.csv").read_text().splitlines()) == sorted(
        (tmp_path / "2.csv").read_text().splitlines()
    )
