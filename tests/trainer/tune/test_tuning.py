"""Fine-tuning: early stopping, warm heads, few shots, probes that become models, and what is refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from etf_zoo import frame_heads
from etf_zoo.errors import EtfZooError
from etf_zoo.sharing.folder import save_folder
from etf_zoo.trainer import finetune
from etf_zoo.trainer.data.augment import colors_of
from etf_zoo.trainer.data.batches import Split, limited_rows, normalize
from etf_zoo.trainer.recipe.config import Augment, Data, Loss, Optim
from etf_zoo.trainer.run.export import check_storable
from etf_zoo.trainer.run.model import make_model
from etf_zoo.trainer.tune.methods import tuned_share
from etf_zoo.trainer.tune.parts import load_data
from etf_zoo.trainer.tune.tuning import Finetune, fine_tune
from etf_zoo_cli import main as cli

RECIPE = Finetune(
    model="test_resnet_etf",
    pretrained=False,
    data=Data("digits", val_split="test", size=16),
    augment=Augment(crop_scale=[1.0, 1.0], crop_ratio=[1.0, 1.0], flip=False),
    optim=Optim(lr=5e-3),
    epochs=2,
    batch_size=64,
    sizes=[[0, 16]],
    tensorboard=False,
)


@pytest.fixture(scope="module")
def digits():
    parts = load_data(RECIPE)
    return parts.train.subset(np.arange(400)), parts.test


def recipe(tmp_path, **changes):
    return dataclasses.replace(RECIPE, output=str(tmp_path / "run"), **changes)


def logged(tmp_path):
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("head", ["frame", "warm"])
def test_training_watches_held_out_images_and_not_the_test(tmp_path, digits, monkeypatch, head):
    looked = []  # at which images, by whatever way
    plain = Split.take
    monkeypatch.setattr(Split, "take", lambda split, *a, **k: looked.append(id(split)) or plain(split, *a, **k))
    tuned = fine_tune(recipe(tmp_path, head=head), *digits)
    assert len(tuned.train) + len(tuned.run.val_split) == 400
    assert set(looked) == {id(tuned.train), id(tuned.run.val_split)}
    assert tuned.figures()["images"] == 450
    assert looked[-1] == id(digits[1])
    assert tuned.run.recipe.batch_size == 64


def test_series_are_held_out_whole(tmp_path, digits, monkeypatch):
    """With pretrained weights, images with nearly the same features are on one side, whatever their pixels say."""
    train, test = digits
    order = np.random.default_rng(0).permutation(400)
    own = order // 4  # which of 100 objects
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(100, 32, generator=generator)[own] + 0.02 * torch.randn(400, 32, generator=generator)
    monkeypatch.setattr("etf_zoo.trainer.tune.tuning.features_of", lambda *args: features)
    monkeypatch.setattr("etf_zoo.trainer.tune.tuning._train", lambda settings, fitted, held, test: (fitted, held))
    save_folder(timm.create_model("test_resnet", num_classes=10), tmp_path / "start")
    for pretrained in (True, False):
        start = {"model": str(tmp_path / "start"), "pretrained": True} if pretrained else {}
        fitted, held = fine_tune(recipe(tmp_path, holdout=0.2, **start), train, test)
        rows = [np.searchsorted(train.index, split.index) for split in (fitted, held)]
        assert len(rows[0]) + len(rows[1]) == 400
        assert len(rows[1]) > 40
        assert bool(set(own[rows[0]]) & set(own[rows[1]])) is not pretrained


def test_the_best_epoch_is_the_result(tmp_path, digits, monkeypatch, capsys):
    scores, weights = iter([30.0, 50.0, 40.0] * 3), []

    def evaluate(run, split=None):
        weights.append({k: v.clone() for k, v in run.plain_model().state_dict().items()})
        return {"top1": next(scores), "loss": 1.0}

    monkeypatch.setattr("etf_zoo.trainer.run.run.Run.evaluate", evaluate)
    for keep, patience, chosen in (("best", 0, 1), ("last", 0, 2), ("last", 5, 2)):
        weights.clear()
        settings = recipe(tmp_path / f"{keep}{patience}", epochs=3, keep=keep, patience=patience)
        tuned = fine_tune(settings, *digits)
        assert all(torch.equal(tuned.model.state_dict()[k], v) for k, v in weights[chosen].items())
        assert ("Best of 3 evaluations: epoch 2, 50.00 %" in capsys.readouterr().out) == (keep == "best")
        assert ("best_epoch" in tuned.run.summary()) == (keep == "best")


@pytest.mark.parametrize("name", ["patience", "lr"])
def test_a_choice_needs_something_to_choose_by(tmp_path, digits, name):
    settings = recipe(tmp_path, holdout=0.0, **{name: {"patience": 2, "lr": "auto"}[name]})
    with pytest.raises(ValueError, match=f"{name} needs held-out images"):
        fine_tune(settings, *digits)
    assert not (tmp_path / "run").exists()


def test_a_split_to_choose_by_leaves_the_training_images_whole(tmp_path, digits):
    train, test = digits
    watched = test.subset(np.arange(40))
    tuned = fine_tune(recipe(tmp_path, epochs=1, patience=1), train, test.subset(np.arange(40, 450)), watched=watched)
    assert len(tuned.train) == 400
    assert tuned.run.val_split is watched
    assert tuned.figures()["images"] == 410


def test_early_stopping_goes_back_to_the_best(tmp_path, digits, monkeypatch):
    scores = iter([30.0, 50.0, 40.0, 50.0, 99.0])
    weights = []

    def evaluate(run, split=None):
        weights.append({k: v.clone() for k, v in run.plain_model().state_dict().items()})
        return {"top1": next(scores), "loss": 1.0}

    monkeypatch.setattr("etf_zoo.trainer.run.run.Run.evaluate", evaluate)
    tuned = fine_tune(recipe(tmp_path, epochs=5, patience=2), *digits)
    assert len(logged(tmp_path)) == 4  # two epochs without a better one
    final = tuned.run.plain_model().state_dict()
    assert all(torch.equal(final[k], v) for k, v in weights[1].items())
    assert not torch.equal(final["conv1.0.weight"], weights[3]["conv1.0.weight"])


def test_early_stopping_resumed(tmp_path, digits):
    whole = fine_tune(recipe(tmp_path / "a", epochs=4, patience=1), *digits)
    assert fine_tune(recipe(tmp_path / "b", epochs=4, patience=1, time_budget="0s"), *digits) is None
    resumed = fine_tune(recipe(tmp_path / "b", epochs=4, patience=1, resume=True), *digits)
    assert resumed.run.best.scores == whole.run.best.scores
    for key, value in whole.run.plain_model().state_dict().items():
        assert torch.equal(value, resumed.run.plain_model().state_dict()[key]), key
    again = fine_tune(recipe(tmp_path / "a", epochs=4, patience=1, resume=True), *digits)  # finished: nothing to do
    assert again.run.step == whole.run.step


def test_a_fresh_neck_is_told_of(tmp_path, digits, capsys):
    model = timm.create_model("test_resnet_etf", num_classes=30, neck="mlp", neck_features=64)
    start = {"model": str(save_folder(model, tmp_path / "start")), "pretrained": True, "holdout": 0.0, "epochs": 1}
    words = "The neck of the weights was for other classes"
    fine_tune(recipe(tmp_path, **start), *digits)
    assert words in capsys.readouterr().out
    tuned = fine_tune(recipe(tmp_path / "bare", **start, model_args={"neck": "none"}), *digits)
    assert words not in capsys.readouterr().out
    assert tuned.run.plain_model().fc.neck is None


@pytest.mark.parametrize("name", ["test_resnet_etf", "test_efficientnet_etf"])
def test_weights_with_whitening(name, tmp_path, digits):
    whitened = timm.create_model(name, num_classes=30, whitening=True).eval()
    start = {"model": str(save_folder(whitened, tmp_path / "start")), "pretrained": True}
    probe = fine_tune(recipe(tmp_path, **start, method="linear_probe"), *digits)
    assert probe.top1 > 30  # of ten classes
    base = make_model(recipe(tmp_path, **start, head="learned"), 10).eval()
    x = torch.rand(3, 3, 32, 32)
    stored = timm.create_model(f"local-dir:{tmp_path / 'start'}", pretrained=True, num_classes=0).eval()
    torch.testing.assert_close(base.forward_head(base.forward_features(x), pre_logits=True), stored(x))
    with pytest.raises(EtfZooError, match=r"no model folder.*weights with whitening"):
        check_storable(recipe(tmp_path, **start, head="learned"))
    check_storable(recipe(tmp_path, **start, head="frame"))


def test_early_stopping_begun_in_a_later_session(tmp_path, digits, monkeypatch, capsys):
    scores = iter([90.0, 30.0, 50.0, 40.0, 60.0, 60.0])
    monkeypatch.setattr(
        "etf_zoo.trainer.run.run.Run.evaluate", lambda run, split=None: {"top1": next(scores), "loss": 1.0}
    )

    def resumed(**changes):
        best = fine_tune(recipe(tmp_path, resume=True, **changes), *digits).run.best
        return [tuple(score) for score in best.scores] if best else None

    def kept():
        return [file.name for file in sorted(tmp_path.glob("run/checkpoints/*/best.safetensors"))]

    fine_tune(recipe(tmp_path, epochs=1, keep="last"), *digits)
    assert resumed(epochs=1, patience=1) == []  # had ended before: nothing was kept, and nothing is taken
    assert resumed(epochs=3, patience=3) == [(2, 30.0, 1.0), (3, 50.0, 1.0)]  # of epoch 1 there are no weights
    assert len(kept()) == 2
    assert resumed(epochs=4, patience=3) == [(2, 30.0, 1.0), (3, 50.0, 1.0), (4, 40.0, 1.0)]
    assert "Best of 3 evaluations: epoch 3, 50.00 % on held-out images" in capsys.readouterr().out
    resumed(epochs=6, keep="last")
    assert not kept()  # a session that takes the last keeps none up to date


def test_warm_head_starts_above_chance(tmp_path, digits, capsys):
    tuned = fine_tune(recipe(tmp_path, head="warm", epochs=1, optim=Optim(lr=1e-9)), *digits)
    accuracy, where = tuned.start
    assert where == "held-out images"
    assert accuracy > 30  # chance is 10, and the backbone is random
    assert f"Before any training: {accuracy:.2f} % of the held-out images" in capsys.readouterr().out
    assert frame_heads(tuned.run.plain_model())["fc"].frame == "custom"


def test_a_warm_learned_head_starts_from_the_probe(tmp_path, digits):
    tuned = fine_tune(recipe(tmp_path, head="warm_learned", strength=0.1, epochs=1, optim=Optim(lr=1e-9)), *digits)
    accuracy, where = tuned.start
    assert where == "held-out images"
    assert accuracy > 50  # chance is 10, and the backbone is random


@pytest.mark.parametrize(
    ("method", "head"), [("scl", ""), ("layer", ""), ("head", "learned"), ("head", "learned_cosine")]
)
def test_methods_become_model_folders(tmp_path, digits, method, head, capsys):
    settings = recipe(tmp_path, method=method, head=head or RECIPE.head, epochs=1, layer="layer3" * (method != "head"))
    tuned = fine_tune(settings, *digits)
    assert 0 < tuned.tuned < 0.2 * tuned.total
    assert f"Tuning {tuned.tuned:,} of {tuned.total:,} parameters" in capsys.readouterr().out
    folder = tmp_path / "run" / "model"
    stored, own = tuned.export(folder)["top1"], tuned.figures()["top1"]
    assert abs(stored - own) < 2  # measured from float16
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), tuned.run.plain_model().eval()(x), atol=0.05, rtol=0.05)
    frame = "a fixed frame, never trained" in (folder / "README.md").read_text()
    assert frame == (method != "head")
    assert ("learned prototypes" in (folder / "README.md").read_text()) == (head == "learned_cosine")
    if method == "scl":
        with pytest.raises(ValueError, match="skip connection from an earlier tuning"):
            dataclasses.replace(settings, model=str(folder))


@pytest.mark.parametrize("method", ["linear_probe", "ncm"])
def test_probes_become_model_folders(tmp_path, digits, method):
    tuned = fine_tune(recipe(tmp_path, method=method), *digits)
    assert not tuned.no_folder
    assert tuned.top1 > 40  # random features know digits already
    folder = tmp_path / "run" / "model"
    tuned.export(folder)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert bool(frame_heads(loaded)) == (method == "ncm")
    images = digits[1].take(np.arange(450), torch.device("cpu"))[0]
    with torch.no_grad():
        predicted = loaded(normalize(images.float(), colors_of(loaded))).argmax(1).numpy()
    assert abs(100 * (predicted == digits[1].labels).mean() - tuned.top1) < 2  # stored in float16
    assert "on frozen features" in (folder / "README.md").read_text()


def test_a_model_in_the_place_of_another_has_nothing_of_it(tmp_path, digits):
    """Its figures would find other columns of the data, its scores would refuse other images."""
    folder = tmp_path / "run" / "model"
    tuned = fine_tune(recipe(tmp_path, method="ncm"), *digits)
    tuned.export(folder)
    stale = json.loads((folder / "metrics.json").read_text())
    stale["training"]["recipe"]["data"]["label_column"] = "another"
    (folder / "metrics.json").write_text(json.dumps(stale))
    for name in ("metrics.jsonl", "curve.png", "familiarity.json", "memory.safetensors"):
        (folder / name).write_bytes(b"{}")
    tuned.export(folder)
    assert {file.name for file in folder.iterdir()} == {
        "README.md", "config.json", "metrics.json", "model.safetensors", "recipe.yaml"
    }  # fmt: skip


def test_a_probe_does_not_replace_a_training(tmp_path, digits):
    fine_tune(recipe(tmp_path, epochs=1), *digits)
    with pytest.raises(EtfZooError, match="holds the run of a training: choose another --output"):
        fine_tune(recipe(tmp_path, method="ncm"), *digits)


@pytest.mark.parametrize(
    "changes", [{"target_cosine": [0.9]}, {"loss": Loss("dot_regression")}, {"loss": Loss("prototype_contrast")}]
)
def test_what_a_frame_alone_can_have(tmp_path, digits, changes):
    """Features for the holdout come from the plain backbone, and the reference has a learned head."""
    settings = recipe(tmp_path, pretrained=True, model="mobilenetv3_small_100_etf", head="frame", epochs=1, **changes)
    assert fine_tune(settings, *digits).run.recipe.loss == settings.loss
    planned = finetune.plan(dataclasses.replace(settings, compare=True))
    learned = next(recipe for name, recipe in planned.items() if recipe.head == "learned")
    assert (learned.loss.name, learned.target_cosine) == ("cross_entropy", [])
    assert any("cross-entropy" in name for name in planned) == ("loss" in changes)


@pytest.mark.parametrize("method", ["linear_probe", "full"])
def test_weights_keep_their_own_colors(tmp_path, digits, method, monkeypatch):
    """Weights that were trained on pixels in -1..1 are tuned, measured and stored for these."""
    half = (0.5, 0.5, 0.5)
    start = timm.create_model("test_resnet", num_classes=10, pretrained_cfg_overlay={"mean": half, "std": half})
    save_folder(start, tmp_path / "start")
    used = set()
    monkeypatch.setattr(
        "etf_zoo.trainer.data.batches.normalize", lambda x, colors: used.add(colors) or normalize(x, colors)
    )
    settings = recipe(tmp_path, model=str(tmp_path / "start"), pretrained=True, method=method, head="learned", epochs=1)
    fine_tune(settings, *digits).export(tmp_path / "model")
    assert used == {(half, half)}
    cfg = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).pretrained_cfg
    assert (tuple(cfg["mean"]), tuple(cfg["std"])) == (half, half)


def test_nearest_neighbors_have_no_folder(tmp_path, digits):
    tuned = fine_tune(recipe(tmp_path, method="knn"), *digits)
    assert tuned.no_folder == "knn keeps the training features themselves"
    assert (tuned.tuned, tuned.top1 > 40) == (0, True)


def test_probes_of_a_model_with_two_classifiers(tmp_path, digits, monkeypatch):
    args = {"img_size": 32, "neck": "mlp"}  # a probe takes no neck
    distilled = recipe(tmp_path, model="deit_tiny_distilled_patch16_224", model_args=args, sizes=[[0, 32]])
    train, test = (split.subset(np.arange(100)) for split in digits)
    for method, tuned_numbers in (("knn", 0), ("ncm", 10 * 192)):
        settings = dataclasses.replace(distilled, method=method, output=str(tmp_path / method))
        tuned = fine_tune(settings, train, test)
        backbone = tuned.total - tuned.tuned
        assert (tuned.tuned, backbone + 2 * (10 * 192 + 10)) == (tuned_numbers, tuned_share(tuned.model)[1])
        assert tuned.top1 > 20  # chance is 10
        assert tuned.no_folder
    monkeypatch.setattr(
        "etf_zoo.trainer.tune.tuning.backbone_features", lambda *a, **k: pytest.fail("computed before the error")
    )
    with pytest.raises(ValueError, match=r"more than one linear layer.*Take --method ncm"):
        fine_tune(dataclasses.replace(distilled, method="linear_probe"), train, test)


def test_few_shots(tmp_path, digits):
    tuned = fine_tune(recipe(tmp_path, method="ncm", shots=3), *digits)
    assert len(tuned.train) == 30
    with pytest.raises(ValueError, match="Ask for at most"):
        fine_tune(recipe(tmp_path, shots=100), *digits)


def test_a_limit_holds_for_probes(tmp_path, digits):
    limited = recipe(tmp_path, data=dataclasses.replace(RECIPE.data, limit=100), epochs=1, holdout=0)
    probe = fine_tune(dataclasses.replace(limited, method="ncm", output=str(tmp_path / "ncm")), *digits)
    trained = fine_tune(limited, *digits)
    assert sorted(probe.train.index) == sorted(limited_rows(400, 100, limited.seed))
    assert sorted(probe.train.index) == sorted(trained.run.train_split.index)


def test_long_tail(tmp_path, digits):
    tail = dataclasses.replace(RECIPE.data, long_tail=0.1)
    settings = recipe(tmp_path, data=tail, epochs=1, batch_size=16, loss=Loss(class_weights=True))
    tuned = fine_tune(settings, *digits)
    counts = np.bincount(tuned.train.labels)
    assert counts[0] >= 9 * counts[9]
    weights = tuned.run.stepper.objective.class_weights
    torch.testing.assert_close(weights * torch.from_numpy(counts), torch.full((10,), float(counts.sum()) / 10))


# ---------------------------------------------------------------------------------------------------- folders of images


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """`train/CLASS/*.png`, `val/CLASS/*.png`: two classes of colors."""
    monkeypatch.setenv("ETF_ZOO_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for name, color in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(color) + rng.integers(-30, 30, (20, 24, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.png")
    return tmp_path / "data"


def run_script(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["finetune.py", *map(str, arguments)])
    finetune.main()


def test_a_folder_and_one_command(folder, tmp_path, monkeypatch, capsys):
    run_script(monkeypatch, "--data", folder, "--output", tmp_path / "run", "--epochs", "4", "--batch_size", "8")
    out = capsys.readouterr().out
    assert "Fewer than 100 images of most classes: the frame lies by their means (--head)" in out
    assert "warm frame, pretrained" in out
    model = tmp_path / "run" / "model"
    config = json.loads((model / "config.json").read_text())
    assert config["label_names"] == ["blue", "red"]
    assert config["pretrained_cfg"]["input_size"] == [3, 96, 96]  # that of the embedded weights
    metrics = json.loads((model / "metrics.json").read_text())
    assert metrics["dataset"]["images"] == 8
    assert cli(["predict", str(model), str(folder / "val" / "red" / "0.png"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["predictions"][0]["label"] == "red"
    # and on from there, by the folder of the run, to other classes
    arguments = ["--model", tmp_path / "run", "--data", folder, "--output", tmp_path / "again", "--method", "ncm"]
    run_script(monkeypatch, *arguments)
    assert "ncm, pretrained" in capsys.readouterr().out


def test_a_frame_by_the_tree_of_the_data(folder, tmp_path, monkeypatch):
    for split in ("train", "val"):
        shutil.copytree(folder / split / "red", folder / split / "crimson")
    (folder / "hierarchy.json").write_text('{"red": "reds", "crimson": "reds", "reds": "color", "blue": "color"}')
    arguments = ["--data", folder, "--output", tmp_path / "run", "--model", "test_resnet_etf", "--pretrained", "false"]
    arguments += ["--epochs", "1", "--batch_size", "8", "--sizes", "[[0, 32]]", "--model_args.frame", "hierarchy"]
    run_script(monkeypatch, *arguments, "--tensorboard", "false")
    model = timm.create_model(f"local-dir:{tmp_path / 'run' / 'model'}", pretrained=True)
    cosines = model.fc.weight @ model.fc.weight.T
    names = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["label_names"]
    blue, crimson, red = (names.index(name) for name in ("blue", "crimson", "red"))
    assert cosines[red, crimson] > cosines[red, blue] + 0.1


def refused(folder, tmp_path, monkeypatch, *more):
    common = ["--data", folder, "--output", tmp_path / "run", "--epochs", "1", "--sizes", "[[0, 32]]"]
    run_script(monkeypatch, *common, *more)


def test_bad_folders(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="fewer than 20 images"):
        refused(folder, tmp_path, monkeypatch, "--shots", "20")
    for path in (folder / "train" / "red").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="cannot be read"):
        refused(folder, tmp_path, monkeypatch)
    for path in (folder / "train" / "red").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="the training split has no class red"):
        refused(folder, tmp_path, monkeypatch)


def test_classes_that_are_missing(tmp_path, digits, monkeypatch):
    train, test = digits
    one = Split(train.images, np.zeros_like(train.labels), train.label_names, "made up")
    monkeypatch.setattr("etf_zoo.trainer.tune.parts.load_images", lambda data, split: one if split == "train" else test)
    with pytest.raises(ValueError, match="all of one class"):
        load_data(RECIPE)
    rows = np.flatnonzero(train.labels != 7)
    monkeypatch.setattr(
        "etf_zoo.trainer.tune.parts.load_images", lambda data, split: train.subset(rows) if split == "train" else test
    )
    with pytest.raises(ValueError, match="without a training image, such as '7'"):
        load_data(RECIPE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "svm"}, "method is one of full, head"),
        ({"head": "hot"}, "head takes one of frame, random, learned, learned_cosine, warm, warm_learned"),
        ({"model": "resnt18"}, "There is no model or folder 'resnt18'. Did you mean"),
        ({"lr": "auto", "method": "ncm"}, "lr is for training"),
        ({"lr": "fast"}, "lr takes a number above 0 or 'auto'"),
        ({"keep": "first"}, "keep takes 'best' or 'last'"),
        ({"compare": True, "method": "ncm"}, "compare is for training"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RECIPE, **changes)


def test_a_head_that_does_not_fit(tmp_path, digits):
    with pytest.raises(ValueError, match="needs at least 9 dimensions, got 4"):
        fine_tune(
            recipe(tmp_path, model="resnet10t_etf", model_args={"channels": [4, 4, 4, 4], "frame": "simplex"}), *digits
        )


def test_stored_images_are_as_large_as_the_largest_that_are_used():
    assert Finetune(model="test_resnet", sizes=[[0, 160]]).data.size == 160
    assert Finetune(model="test_resnet", sizes=[[0, 64], [5, 96]], eval_size=80).data.size == 96
    assert Finetune(model="test_resnet", sizes=[[0, 64]], eval_size=128).data.size == 128
    assert Finetune(model="test_resnet", sizes=[[0, 64]], data=Data(size=32)).data.size == 32  # as it says


def test_a_number_for_lr_is_that_of_the_optimizer():
    settings = Finetune(model="test_resnet", lr=0.03)
    assert (settings.optim.lr, settings.lr) == (0.03, "")


def test_defaults_follow_the_model():
    assert Finetune().head == "auto"
    assert Finetune().sizes == [[0, 96]]
    plain = Finetune(model="resnet18")
    assert (plain.head, plain.sizes, plain.data.size) == ("learned", [[0, 224]], 224)
    assert Finetune(data=Data(size=32)).data.size == 32  # what is stored; training enlarges it
