"""The runner of grids: its file of results, its locks, its processes, and what its digests stand for."""

import dataclasses
import json
import os
import signal
from dataclasses import dataclass, field
from functools import partial

import pytest
import safetensors.torch
import timm

from etf_zoo.trainer.recipe.config import Data, Recipe
from etf_zoo.trainer.run.locks import acquire
from training.experiments.grid import (
    Results,
    digest,
    lock_file,
    run_grid,
    run_jobs,
    settings_digest,
    weights_digest,
)


@dataclass(frozen=True)
class Square:
    number: int

    @property
    def key(self):
        return f"square|{self.number}"


def measure(cell):
    if cell.number == 3:
        raise ValueError("not three")
    return {"square": cell.number**2}


def measure_or_die(cell):
    if cell.number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(cell)


CELLS = [Square(number) for number in range(5)]


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "results" / "cells.jsonl", tmp_path / "locks")


# ------------------------------------------------------------------------------------------------------------- runner


def test_what_is_missing_is_measured_and_what_fails_is_told(results, tmp_path, capsys):
    assert run_grid(CELLS, measure, results, tmp_path / "locks") == ["square|3"]
    assert {key: record["square"] for key, record in results.read().items()} == {
        f"square|{n}": n**2 for n in (0, 1, 2, 4)
    }
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [cell.key for cell in CELLS]
    assert captured.err.splitlines()[-1] == "square|3 failed: not three"
    assert run_grid(CELLS[:3], lambda cell: pytest.fail("measured again"), results, tmp_path / "locks") == []


def test_a_cell_that_another_process_has_is_left_to_it(results, tmp_path):
    with acquire(lock_file(tmp_path / "locks", CELLS[1].key)):
        assert run_grid(CELLS[:3], measure, results, tmp_path / "locks") == []
    assert set(results.read()) == {"square|0", "square|2"}


def test_a_cell_that_another_process_finished_meanwhile_is_not_measured(results, tmp_path):
    def finish_the_next(cell):
        results.append({"key": CELLS[1].key, "square": -1})
        return measure(cell)

    run_grid(CELLS[:2], finish_the_next, results, tmp_path / "locks")
    assert results.read()["square|1"]["square"] == -1


@pytest.mark.slow
@pytest.mark.parametrize(("how", "failed"), [(measure, {3}), (measure_or_die, {1, 3})])
def test_several_processes_and_one_that_dies(results, tmp_path, capfd, how, failed):
    assert set(run_grid(CELLS, how, results, tmp_path / "locks", jobs=2)) == {f"square|{n}" for n in failed}
    assert set(results.read()) == {f"square|{n}" for n in range(5) if n not in failed}
    told = capfd.readouterr().err
    assert "square|3 failed: not three" in told
    assert ("square|1 failed: its process ended (-9)." in told) == (1 in failed)


def test_jobs_in_order():
    seen = []
    assert run_jobs(seen.append, [3, 1, 2]) == []
    assert seen == [3, 1, 2]
    assert run_jobs(partial(int, base=10), ["1", "x", "2"]) == ["x"]


# ------------------------------------------------------------------------------------------------------------ results


def test_a_line_that_a_kill_cut_short_goes(results):
    results.append({"key": "a", "top1": 1.0})
    results.append({"key": "b", "top1": 2.0})
    whole = results.file.read_bytes()
    for cut in range(whole.index(b"\n") + 1, len(whole) - 1):
        results.file.write_bytes(whole[:cut])
        assert set(results.read()) == {"a"}
    results.append({"key": "b", "top1": 2.0})
    assert results.file.read_bytes() == whole


def test_a_damaged_line_in_the_middle_is_told_and_not_believed(results, capsys):
    for key in "abc":
        results.append({"key": key, "top1": 76.5})
    lines = results.file.read_bytes().splitlines(keepends=True)
    for damaged in (b"{}\n", b"[1]\n", b"\n", b"\xff\xfe\n", lines[1].replace(b"76.5", b"77.5"), lines[1][:-9] + b"\n"):
        results.file.write_bytes(lines[0] + damaged + lines[2])
        assert set(results.read()) == {"a", "c"}
        assert "cells.jsonl: damaged and not believed: line 2." in capsys.readouterr().err
    results.append({"key": "b", "top1": 76.5})
    assert set(results.read()) == {"a", "b", "c"}


def test_any_flipped_bit_is_seen(results, capsys):
    record = {"key": "a|b", "top1": 76.5, "correct": "0f"}
    results.append(record)
    whole = results.file.read_bytes()
    assert results.read() == {"a|b": record}
    for bit in range(8 * (len(whole) - 1)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        results.file.write_bytes(changed)
        assert results.read() in ({}, {"a|b": record}), changed  # the latter where only the spelling changed
    assert capsys.readouterr().err


def test_no_file_is_no_results(results):
    assert results.read() == {}
    assert not results.file.parent.exists()


# ------------------------------------------------------------------------------------------------------------ digests


def test_settings_count_where_figures_depend_on_them():
    recipe = Recipe(data=Data("x"))
    kept = settings_digest(recipe)
    for change in ({"output": "y"}, {"resume": True}, {"notes": "y"}, {"data": Data("moved")}, {"save_steps": 5}):
        assert settings_digest(dataclasses.replace(recipe, **change)) == kept
    changes = ({"epochs": 31}, {"seed": 1}, {"data": Data("x", size=32)}, {"model_args": {"neck": "mlp"}})
    changed = [settings_digest(dataclasses.replace(recipe, **change)) for change in changes]
    assert len({kept, *changed, settings_digest(recipe, "more")}) == 6


def test_a_new_field_leaves_digests_as_they_are():
    @dataclass
    class Old:
        seed: int = 0

    @dataclass
    class New(Old):
        added: dict = field(default_factory=dict)

    assert settings_digest(New(seed=2)) == settings_digest(Old(seed=2))
    assert settings_digest(New(seed=2, added={"a": 1})) != settings_digest(Old(seed=2))


def test_a_recipe_as_written_does_not_hang_on_defaults():
    said = {"epochs": 12, "data": {"size": 96, "source": "x"}, "model_args": {"model": "kept"}, "output": "y"}
    same = {"epochs": 12, "data": {"size": 96, "source": "moved"}, "model_args": {"model": "kept"}}
    assert (
        settings_digest(said)
        == settings_digest(same)
        == digest({"epochs": 12, "data.size": 96, "model_args": {"model": "kept"}})
    )
    assert settings_digest({**said, "epochs": 13}) != settings_digest(said)
    assert settings_digest({**said, "model_args": {}}) != settings_digest(said)


def test_digest_of_weights_is_that_of_their_values(tmp_path):
    model = timm.create_model("test_resnet", num_classes=3)
    folder = tmp_path / "model"
    folder.mkdir()
    cfg = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 3}
    config = {"architecture": "test_resnet", "num_classes": 3, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))

    def save():
        safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
        weights_digest.cache_clear()
        return weights_digest(str(folder))

    before = save()
    assert save() == before
    model.fc.bias.data[0] += 1e-3
    assert save() != before
    assert weights_digest("test_resnet", pretrained=False) == "random test_resnet"
    with pytest.raises(ValueError, match="no model"):
        weights_digest("resnet_of_no_one")


def test_digest_does_not_mind_the_order_of_names():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 2, "b": 1})
