"""Segmentation losses side by side on made scenes: cells once each, trials on validation images alone, the table."""

import pytest
import yaml

from tests.trainer.segment.test_segment import NAMES, scene, write
from training.experiments import pixels
from training.experiments.grid import CELLS, Results


@pytest.fixture
def script(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    pairs = [scene(i) for i in range(12)]
    data = write(tmp_path / "data", train=pairs[:8], validation=pairs[8:10], test=pairs[10:])
    base = {"model": "test_efficientnet", "pretrained": False, "decoder": "linknet", "image_size": [40, 56]}
    base |= {"class_names": NAMES, "epochs": 1, "batch_size": 4, "tensorboard": False, "output": str(tmp_path / "runs")}
    base |= {"data": {"source": str(data), "label_column": "mask", "val_split": "validation", "test_split": "test"}}
    variants = {"CE": {}, "frame": {"head": "frame"}, "weight 1": {"center_collapse": 1.0}}
    settings = {"results": str(tmp_path / "results"), "base": base, "variants": variants, "trials": ["weight 1"]}

    def call(**changes):
        (tmp_path / "list.yaml").write_text(yaml.safe_dump({**settings, **changes}))
        monkeypatch.setattr("sys.argv", ["pixels.py", "--config", str(tmp_path / "list.yaml")])
        pixels.main()
        return tmp_path / "results"

    return call


def test_cells_are_run_once_and_told(script, tmp_path, capsys):
    results = script()
    first = [line.split("|")[0] for line in capsys.readouterr().out.splitlines() if line.count("|") == 2]
    assert first == ["weight 1", "CE", "frame"]
    records = list(Results(results / CELLS, tmp_path).read().values())
    assert {r["variant"]: r["split"] for r in records} == {"weight 1": "validation", "CE": "test", "frame": "test"}
    text = (results / "table.md").read_text()
    miou = next(r for r in records if r["variant"] == "frame")["results"]["miou"]
    assert f"| frame | 1 | {miou:.2f} |" in text.split("Trials")[0]
    assert "| weight 1 | 1 |" in text.split("Trials")[1]
    script()
    assert not [line for line in capsys.readouterr().out.splitlines() if line.count("|") == 2]


def test_once(script, tmp_path):
    records = Results(script(seeds=[3, 4], once=["frame"]) / CELLS, tmp_path).read().values()
    ran = sorted((r["variant"], r["seed"]) for r in records)
    assert ran == [("CE", 3), ("CE", 4), ("frame", 3), ("weight 1", 3)]


def test_unknown_trials(script):
    with pytest.raises(ValueError, match="trials and once name variants that there are not: x"):
        script(trials=["x"])
