"""Any number of images, whatever some of them are."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from etf_zoo.cli import predict as predict_module
from etf_zoo.cli.predict import image_files
from etf_zoo.models.find import load_model
from etf_zoo.ood import familiarity, write_familiarity
from etf_zoo_cli import main
from tests.made_data import picture

ROOT = Path(__file__).parents[2]


@pytest.fixture
def photos(tmp_path):
    """Five images in two folders, and what lies between images."""
    folder = tmp_path / "photos"
    for i, name in enumerate(["a/0.png", "a/1.jpg", "b/2.webp", "b/3.JPG", "b/c/4.tif"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(20 * i).save(folder / name, {"JPG": "JPEG"}.get(name[-3:].upper()))
    for name in ("a/._0.png", ".hidden/x.png", "__MACOSX/x.png", "a/notes.txt", "a/Thumbs.db"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no image")
    return folder


def predicted(capsys, *arguments, status=0):
    assert main(["predict", *map(str, arguments)]) == status
    return capsys.readouterr()


def table(path):
    return list(csv.reader(path.read_text().splitlines()))


def test_folders_patterns_and_lists(capsys, folder, photos, monkeypatch):
    every = [str(photos / n) for n in ("a/0.png", "a/1.jpg", "b/2.webp", "b/3.JPG", "b/c/4.tif")]

    def files(*arguments):
        return [entry["image"] for entry in json.loads(predicted(capsys, folder, *arguments, "--json").out)]

    assert files(photos) == every
    assert files(photos / "b", photos / "a" / "0.png") == [*every[2:], every[0]]
    assert files(str(photos / "**" / "*.[jw]*")) == every[1:3]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{every[3]}\n\n{photos / 'a'}\r\n"))
    assert files("-") == [every[3], *every[:2]]
    assert "2 files are no images by their names (such as" in predicted(capsys, folder, photos).err


def test_a_bad_file_loses_nothing_else(capsys, folder, photos):
    (photos / "a" / "0.png").write_bytes(b"text")
    (photos / "b" / "2.webp").write_bytes((photos / "b" / "2.webp").read_bytes()[:40])
    shown = predicted(capsys, folder, photos, "missing.png", str(photos / "*.none"), "--json", status=1)
    entries = json.loads(shown.out)
    assert [("predictions" in entry) for entry in entries] == [False, True, False, True, True, False, False]
    assert "no image" in entries[0]["error"]
    assert "4 of 7 images cannot be read:" in shown.err
    assert "missing.png cannot be read: No such file or directory" in shown.err
    whole = json.loads(predicted(capsys, folder, photos / "b" / "3.JPG", "--json").out)
    for one, other in zip(entries[3]["predictions"], whole[0]["predictions"], strict=True):
        assert one["label"] == other["label"]
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (1, 30_000), (30_000, 1)])
def test_an_image_one_pixel_wide(capsys, folder, tmp_path, size):
    Image.new("RGB", size, "green").save(tmp_path / "strip.png")
    (entry,) = json.loads(predicted(capsys, folder, tmp_path / "strip.png", "--json").out)
    assert sum(one["probability"] for one in entry["predictions"]) > 0


def test_many_bad_files_are_named_up_to_twenty(capsys, folder, tmp_path):
    shown = predicted(capsys, folder, *[tmp_path / f"{i}.png" for i in range(25)], status=1)
    assert len(shown.err.splitlines()) == 1 + 20 + 1
    assert shown.err.splitlines()[-1].strip() == "and 5 more"


def test_sixteen_bit_images_are_not_white(capsys, folder, tmp_path):
    ramp = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    Image.fromarray(ramp).save(tmp_path / "16.png")
    Image.fromarray((ramp >> 8).astype(np.uint8)).save(tmp_path / "8.png")
    Image.new("L", (32, 32), 255).save(tmp_path / "white.png")
    files = [tmp_path / f"{name}.png" for name in ("16", "8", "white")]
    sixteen, eight, white = (
        {p["label"]: p["probability"] for p in entry["predictions"]}
        for entry in json.loads(predicted(capsys, folder, *files, "--json").out)
    )
    assert max(abs(sixteen[k] - eight[k]) for k in eight) < 0.1 * max(abs(white[k] - eight[k]) for k in eight)


def test_table_json_lines_and_csv(capsys, folder, photos, tmp_path):
    reference = json.loads(predicted(capsys, folder, photos, "--json", "--top", 2).out)
    out = predicted(capsys, folder, photos, "--top", 2, "--output", tmp_path / "p.jsonl").out
    assert out == f"5 images: {tmp_path / 'p.jsonl'}\n"
    assert [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()] == reference
    predicted(capsys, folder, photos, "--top", 2, "--output", tmp_path / "p.csv")
    rows = table(tmp_path / "p.csv")
    assert rows[0] == ["image", "label_1", "probability_1", "label_2", "probability_2"]
    for row, entry in zip(rows[1:], reference, strict=True):
        assert row[0] == entry["image"]
        assert [row[1], row[3]] == [p["label"] for p in entry["predictions"]]
        assert [float(row[2]), float(row[4])] == pytest.approx(
            [p["probability"] for p in entry["predictions"]], abs=1e-6
        )
    predicted(capsys, folder, photos, "--top", 2, "--output", tmp_path / "p.txt")
    assert len((tmp_path / "p.txt").read_text().splitlines()) == 15


def test_top_of_more_than_there_are(capsys, folder, photos, tmp_path):
    predicted(capsys, folder, photos, "--top", 50, "--output", tmp_path / "p.csv")
    assert len(table(tmp_path / "p.csv")[0]) == 1 + 2 * 5


@pytest.mark.parametrize(("batch_size", "sizes"), [(2, [2, 2, 1]), (32, [5])])
def test_in_batches_in_order(capsys, folder, photos, monkeypatch, batch_size, sizes):
    seen, original = [], predict_module._most_probable
    monkeypatch.setattr(
        predict_module,
        "_most_probable",
        lambda model, images, *a: seen.append(len(images)) or original(model, images, *a),
    )
    entries = json.loads(predicted(capsys, folder, photos, "--json", "--batch-size", batch_size).out)
    assert seen == sizes
    one_by_one = [json.loads(predicted(capsys, folder, e["image"], "--json").out)[0] for e in entries]
    for entry, alone in zip(entries, one_by_one, strict=True):
        assert entry["predictions"][0]["label"] == alone["predictions"][0]["label"]
        assert entry["predictions"][0]["probability"] == pytest.approx(alone["predictions"][0]["probability"], abs=1e-5)


def test_only_a_few_batches_are_read_ahead(folder, monkeypatch):
    asked = []

    def files():
        for i in range(1000):
            asked.append(i)
            yield str(i)

    reader = predict_module._read_ahead(files(), lambda file: file, ahead=8)
    assert [next(reader)[0] for _ in range(3)] == ["0", "1", "2"]
    assert len(asked) <= 3 + 8


def test_names_cannot_steer_the_terminal(capsys, folder, photos):
    config = json.loads((folder / "config.json").read_text())
    del config["config_sha256"]
    config["label_names"] = [f"\x1b[2J{name}\n  99.99 %  fake" for name in "abcde"]
    (folder / "config.json").write_text(json.dumps(config))
    out = predicted(capsys, folder, photos / "a" / "0.png").out
    assert "\x1b" not in out
    assert len(out.splitlines()) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{photos}/empty"], "There is no image in"),
        (["{photos}", "--output", "x.xls"], "has to end in .csv, .jsonl, .json, .txt"),
        (["{photos}", "--output", "/none/x.csv"], "There is no folder for --output"),
    ],
)
def test_refused_before_the_work(capsys, photos, arguments, message, monkeypatch):
    (photos / "empty").mkdir()
    monkeypatch.setattr(predict_module, "load_model", lambda name: pytest.fail("loaded"))
    assert message in predicted(capsys, "x", *(a.format(photos=photos) for a in arguments), status=1).err


def test_standard_input_is_read_as_it_comes(monkeypatch):
    lines = iter(["a.png\n"])
    monkeypatch.setattr("sys.stdin", lines)
    assert next(image_files(["-"])) == "a.png"


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(folder, tmp_path):
    """Peak memory over 400 photos of 3 MP is that over 40, to 60 MB; the photos would take 3.6 GB decoded."""
    Image.effect_noise((2000, 1500), 40).convert("RGB").save(tmp_path / "one.jpg")
    script = (
        "import resource, sys; from etf_zoo_cli import main; main(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, file=sys.stderr)"
    )

    def peak(count):
        command = [sys.executable, "-c", script, "predict", str(folder), "-", "--output", str(tmp_path / "p.csv")]
        names = "\n".join([str(tmp_path / "one.jpg")] * count)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, input=names, capture_output=True, text=True, env=environment, check=True)
        return float(done.stderr.split()[-1])

    assert peak(400) < peak(40) + 60
    assert torch.get_num_threads()


def test_reject_names_what_is_none_of_the_classes(capsys, folder, photos, tmp_path):
    def entries():
        return json.loads(predicted(capsys, folder, photos, "--reject", "0.5", "--json").out)

    model = load_model(str(folder))
    prepared = predict_module._preparation(model)
    files = [str(photos / n) for n in ("a/0.png", "a/1.jpg", "b/2.webp", "b/3.JPG", "b/c/4.tif")]
    with torch.inference_mode():
        scores = familiarity(model(torch.stack([prepared(file) for file in files])))
    write_familiarity(folder, scores[:4])
    limit = scores[:4].sort().values[2]
    shown = entries()
    assert [entry.get("none_of_these", False) for entry in shown] == (scores < limit - 1e-5).tolist()
    assert 2 <= sum("none_of_these" in entry for entry in shown) <= 3
    assert all(len(entry["predictions"]) == 5 for entry in shown)
    text = predicted(capsys, folder, photos, "--reject", "0.5").out.splitlines()
    assert text.count("  none of these") == sum("none_of_these" in entry for entry in shown)
    predicted(capsys, folder, photos, "--reject", "0.5", "--output", tmp_path / "x.csv")
    rows = table(tmp_path / "x.csv")
    assert {len(row) for row in rows} == {11}
    assert [row[1] == "none of these" for row in rows[1:]] == ["none_of_these" in entry for entry in shown]
    assert all("none_of_these" not in entry for entry in json.loads(predicted(capsys, folder, photos, "--json").out))


def test_reject_needs_scores_beside_the_model(capsys, folder, photos):
    assert "etf-zoo finetune writes it" in predicted(capsys, folder, photos, "--reject", "0.05", status=1).err
    write_familiarity(folder, torch.randn(50))
    assert "lies in [0, 1)" in predicted(capsys, folder, photos, "--reject", "1.5", status=1).err
    assert "take at least 0.02" in predicted(capsys, folder, photos, "--reject", "0.01", status=1).err
