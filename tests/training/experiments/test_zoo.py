"""The zoo's script: a model, its controls, their folders; again, in pieces, and with other seeds."""

import json
import shutil

import pytest
import timm
import yaml

from etf_zoo.sharing.card import METRICS_NAME
from etf_zoo.trainer.recipe.config import Recipe
from etf_zoo.trainer.run.locks import acquire
from etf_zoo.weights.native import WEIGHTS_NAME
from training.experiments import zoo
from training.experiments.grid import lock_file


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """Calls the script on a list with one small model."""
    monkeypatch.setattr(zoo, "ROOT", tmp_path)  # nothing of the project's is written
    file = tmp_path / "list.yaml"
    tiny = {"model": "test_resnet_etf", "keep": ["frame", "learned"], "tag": "e1_digits", "batch_size": 64}
    base = {"data": {"source": "digits", "val_split": "test", "size": 16}, "epochs": 1, "sizes": [[0, 16]]}
    base |= {"output": str(tmp_path / "runs"), "tensorboard": False}
    file.write_text(yaml.safe_dump({"base": base, "models": {"tiny": tiny}}))

    def call(*args):
        monkeypatch.setattr("sys.argv", ["zoo.py", "--list", str(file), "--cards", str(tmp_path / "cards"), *args])
        zoo.main()
        return tmp_path / "cards"

    return call


def figures(folder, name=METRICS_NAME):
    return json.loads((folder / name).read_text())


def test_model_and_controls(listed, tmp_path):
    cards = listed("tiny")
    listed("--heads", "random", "learned_cosine")
    folders = {kind: cards / f"test_resnet_{kind}.e1_digits" for kind in zoo.KINDS.values()}
    assert sorted(cards.iterdir()) == sorted(folders.values())
    stored = {kind: (folder / WEIGHTS_NAME).is_file() for kind, folder in folders.items()}
    assert stored == {"etf": True, "control": True, "cosine_control": False, "random_control": False}
    for kind, folder in folders.items():
        others = {f.name for other, f in folders.items() if other != kind}
        assert {entry["model"] for entry in figures(folder)["references"]} == others
        assert all(name in (folder / "README.md").read_text() for name in others)
        assert figures(folder)["training"]["recipe"]["seed"] == 0
    assert timm.create_model(f"local-dir:{folders['etf']}", pretrained=True).num_classes == 10
    # what is finished is measured again, not trained again: the very same weights
    before, log = (folders["etf"] / WEIGHTS_NAME).read_bytes(), tmp_path / "runs" / folders["etf"].name
    (log / "metrics.jsonl").write_text((log / "metrics.jsonl").read_text())
    shutil.rmtree(folders["etf"])
    listed("tiny", "--heads", "frame")
    assert (folders["etf"] / WEIGHTS_NAME).read_bytes() == before
    assert len((folders["etf"] / "metrics.jsonl").read_text().splitlines()) == 1


def test_models_beside_each_other(listed, tmp_path):
    file = tmp_path / "list.yaml"
    models = yaml.safe_load(file.read_text())
    tiny = models["models"]["tiny"]
    tiny["beside"] = ["scale"]
    models["models"]["scale"] = {**tiny, "model_args": {"logit_scale": 30.0}, "tag": "e1s30_digits", "beside": ["tiny"]}
    file.write_text(yaml.safe_dump(models))
    cards = listed("--heads", "frame")
    for folder, other in (("e1_digits", "e1s30_digits"), ("e1s30_digits", "e1_digits")):
        references = figures(cards / f"test_resnet_etf.{folder}")["references"]
        assert [entry["model"] for entry in references] == [f"test_resnet_etf.{other}"]
    models["models"]["scale"]["beside"] = ["huge"]
    file.write_text(yaml.safe_dump(models))
    with pytest.raises(ValueError, match="has no model 'huge', only scale, tiny"):
        listed("--heads", "frame")


def test_other_seeds_leave_figures_alone(listed):
    cards = listed("--heads", "frame", "--seeds", "0", "1")
    (folder,) = cards.iterdir()
    assert figures(folder)["training"]["recipe"]["seed"] == 0
    assert figures(folder, "metrics_seed1.json")["training"]["recipe"]["seed"] == 1


def test_time_budget(listed):
    cards = listed("--heads", "frame", "--time-budget", "0s")
    assert not cards.exists()
    assert (listed("--heads", "frame") / "test_resnet_etf.e1_digits" / WEIGHTS_NAME).is_file()


def test_side_by_side(listed, tmp_path):
    cards = listed("--heads", "frame", "learned", "--jobs", "2")
    assert len(list(cards.iterdir())) == 2
    for folder in cards.iterdir():
        assert len(figures(folder)["references"]) == 1
        assert "epoch 1" in (tmp_path / "runs" / folder.name / "log.txt").read_text()
    beside = figures(cards / "test_resnet_etf.e1_digits")["results"]["loss"]
    shutil.rmtree(tmp_path / "runs")
    listed("--heads", "frame")
    alone = figures(cards / "test_resnet_etf.e1_digits")["results"]["loss"]
    assert beside == pytest.approx(alone, rel=1e-2)  # another number of threads adds up in another order


def test_side_by_side_the_others_go_on(listed, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "test_resnet_control.e1_digits").write_text("a file in the place of a folder")
    with pytest.raises(ValueError, match=r"1 of 2 runs failed, see above: .*test_resnet_control"):
        listed("--heads", "learned", "frame", "--jobs", "2")
    assert (tmp_path / "cards" / "test_resnet_etf.e1_digits" / WEIGHTS_NAME).is_file()


def test_a_run_that_another_process_has_is_left_to_it(listed, tmp_path):
    output = f"{tmp_path / 'runs'}/test_resnet_etf.e1_digits"
    with acquire(lock_file(tmp_path / "runs" / "locks", output)):
        cards = listed("--heads", "frame")
    assert not cards.exists()


def test_errors(listed):
    with pytest.raises(ValueError, match="--jobs is at least 1, got 0"):
        listed("--jobs", "0")
    some = zoo.Zoo(Recipe(), {"a": {"heads": ["frame", "learnd"]}, "b": {"optim": {"rate": 1}}})
    with pytest.raises(ValueError, match=r"no model 'c', only a, b"):
        zoo.entry_of(some, "c")
    with pytest.raises(ValueError, match="not learnd"):
        zoo.entry_of(some, "a")
    with pytest.raises(ValueError, match=r"no field 'optim.rate'"):
        zoo.entry_of(some, "b")
