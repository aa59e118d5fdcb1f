"""Cards say what the files beside them say."""

import dataclasses
import json
import re

import pytest
import timm
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from etf_zoo import frame_heads
from etf_zoo.frames.describe import describe_frame
from etf_zoo.sharing.card import _SECTIONS, DEFAULTS, card_problems, render_card, write_card
from etf_zoo.sharing.folder import save_folder
from etf_zoo.trainer.recipe.config import Optim, Recipe
from etf_zoo.trainer.recipe.parsing import parse_entries
from etf_zoo.trainer.tune.tuning import Finetune
from etf_zoo.weights.native import cards_folder

CARDS = sorted(path.parent.name for path in cards_folder().glob("*/metrics.json"))

METRICS = {
    "results": {"top1": 12.345, "top5": 50.0, "loss": 1.5},
    "dataset": {"name": "scikit-learn digits", "split": "test", "images": 10, "size": 32},
    "references": [{"model": "control", "results": {"top1": 11.0, "top5": 49.0, "loss": 1.6}}],
    "training": {
        "recipe": {"epochs": 1},
        "data_source": "scikit-learn digits",
        "train_images": 5,
        "steps": 2,
        "hours": 0.01,
        "device": "CPU",
        "processes": 1,
        "commit": "abc",
    },
    "command": "accelerate launch training/evaluate.py",
}


def test_card_of_a_folder(folder):
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    card = ModelCard.load(write_card(folder))
    assert card.data.license == "apache-2.0"
    assert card.data.to_dict()["library_name"] == "timm"
    assert card.data.eval_results[0].metric_value == 12.35 or card.data.eval_results[0].metric_value == 12.34
    assert "| top-1 (%) | 12.35 | 11.00 |" in card.text or "| top-1 (%) | 12.34 | 11.00 |" in card.text
    assert "simplex ETF of 5 classes in 1024 dimensions, one block of coordinates for each class" in card.text


def test_missing_file_is_named(folder):
    with pytest.raises(ValueError, match=r"metrics\.json is missing"):
        render_card(folder)


def change(folder, file="config.json", **changes):
    path = folder / file
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, **changes}))


def change_cfg(folder, **changes):
    change(folder, pretrained_cfg={**json.loads((folder / "config.json").read_text())["pretrained_cfg"], **changes})


@pytest.fixture
def measured(folder):
    """The tiny model with figures and a card."""
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    write_card(folder)
    return folder


def test_figures_stand_in_the_model_index_and_without_control_it_says_so(measured):
    index = ModelCard.load(measured / "README.md").data.to_dict()["model-index"][0]["results"][0]
    assert {m["name"]: m["value"] for m in index["metrics"]}.keys() == {"top-1 (%)", "top-5 (%)"}
    assert index["dataset"] == {"name": "scikit-learn digits", "type": "scikit-learn digits", "split": "test"}
    change(measured, "metrics.json", references=[])
    assert "No control was trained beside it" in render_card(measured)


def test_other_seeds_stand_under_the_table(measured):
    assert "seeds" not in render_card(measured)
    for seed, top1 in ((2, 14.0), (1, 12.0)):
        change(measured, f"metrics_seed{seed}.json", results={"top1": top1})
    change(measured, "metrics.json", results={**METRICS["results"], "top1": 10.0})
    assert (
        "Top-1 over 3 seeds, of which this is the first: 10.00, 12.00, 14.00 %; mean 12.00, standard deviation 2.00."
        in render_card(measured)
    )


def test_path_of_the_data_stays_at_home(measured):
    for name, shown in [("/home/me/data/birds", "birds"), ("./birds", "birds"), ("org/birds", "org/birds")]:
        change(measured, "metrics.json", dataset={**METRICS["dataset"], "name": name})
        card = ModelCard(render_card(measured))
        assert card.data.eval_results[0].dataset_name == shown
        assert f"On 10 images of {shown} (test)" in card.text
        assert card.data.datasets == (["org/birds"] if name == "org/birds" else None)


def test_usage_follows_where_the_model_lies(measured):
    assert 'create_model("local-dir:FOLDER"' in render_card(measured)
    assert 'create_model("hf-hub:org/x"' in render_card(measured, repo_id="org/x")
    (measured / "hub.json").write_text('{"repo_id": "org/y", "revision": "f00d1e"}')
    assert 'create_model("hf-hub:org/y"' in render_card(measured)
    assert "f00d1e" not in render_card(measured)  # else every publication would change the card, and that the commit
    assert render_card(measured).index("import etf_zoo, timm") < render_card(measured).index("create_model")


def test_fine_tuned_names_where_it_started(measured, monkeypatch, tmp_path):
    recipe = {"pretrained": True, "model": "resnet18.a1_in1k", "data": {"source": "org/birds"}}
    change(measured, "metrics.json", training={**METRICS["training"], "recipe": recipe})
    card = ModelCard(render_card(measured))
    assert card.data.base_model == "timm/resnet18.a1_in1k"
    assert card.data.datasets == ["org/birds"]
    assert "From the weights of `resnet18.a1_in1k`: 2 steps" in card.text
    for model, base in [("hf-hub:org/x@main", "org/x"), ("mobilenetv3_small_100_etf.e27_tiny", None)]:
        change(measured, "metrics.json", training={**METRICS["training"], "recipe": {**recipe, "model": model}})
        assert ModelCard(render_card(measured)).data.base_model == base
    published = tmp_path / "zoo" / "mobilenetv3_small_100_etf.e27_tiny"
    published.mkdir(parents=True)
    (published / "hub.json").write_text('{"repo_id": "org/mobile", "revision": "abc"}')
    monkeypatch.setattr("etf_zoo.sharing.card.cards_folder", lambda: tmp_path / "zoo")
    assert ModelCard(render_card(measured)).data.base_model == "org/mobile"


def test_converted_names_its_source_and_keeps_its_license(folder):
    change_cfg(folder, description="converted exactly from timm/resnet50.a1_in1k", license="cc-by-nc-4.0")
    change(folder, base_model="timm/resnet50.a1_in1k")
    card = ModelCard(render_card(folder))
    assert (card.data.base_model, card.data.license) == ("timm/resnet50.a1_in1k", "cc-by-nc-4.0")
    assert "converted" in card.data.tags
    assert "Source: `timm/resnet50.a1_in1k`. Nothing was trained." in card.text
    assert "Not measured." in card.text
    change(folder, "metrics.json", **{key: METRICS[key] for key in ("results", "dataset", "command")})
    assert "| top-1 (%) | 12.3" in render_card(folder)


def test_license_that_the_hub_does_not_know_gets_a_name(measured):
    change_cfg(measured, license="sapiens2-license")
    data = ModelCard(render_card(measured)).data
    assert (data.license, data.license_name) == ("other", "sapiens2-license")
    change_cfg(measured, license=None)
    change(measured, license_name="mine", license_link="https://example.org")
    data = ModelCard(render_card(measured)).data
    assert (data.license, data.license_name, data.license_link) == ("other", "mine", "https://example.org")
    write_card(measured)
    assert not card_problems(measured)


def test_problems_name_the_fix(measured):
    assert not card_problems(measured)
    change(measured, "metrics.json", results={"top1": float("nan"), "top5": 1.0, "loss": 1.0})
    write_card(measured)
    assert card_problems(measured) == ["the figures in metrics.json are not finite"]


@pytest.mark.parametrize("name", CARDS)
def test_committed_cards_are_what_their_files_give(name):
    assert (cards_folder() / name / "README.md").read_text() == render_card(cards_folder() / name)


@pytest.mark.parametrize("name", CARDS)
def test_metadata_of_committed_cards_is_valid_and_complete(name):
    """As far as can be said offline; the Hub's own validator needs a network."""
    assert not card_problems(cards_folder() / name)
    block = (cards_folder() / name / "README.md").read_text().split("---\n")[1]
    metadata = yaml.safe_load(block)
    assert {"license", "library_name", "pipeline_tag", "tags", "model-index"} <= metadata.keys()
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("timm", "image-classification")
    data = ModelCardData(**metadata, ignore_metadata_errors=False)
    results = json.loads((cards_folder() / name / "metrics.json").read_text())["results"]
    assert [entry.metric_value for entry in data.eval_results] == [round(results[k], 2) for k in ("top1", "top5")]
    for repo_id in [data.base_model, *(data.datasets or [])]:
        if repo_id:
            validate_repo_id(repo_id)


# ------------------------------------------------------------------------------------------------ usual and not usual


def _plain(recipe):
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def defaults():
    return {"pretrain": _plain(Recipe()), "finetune": _plain(Finetune(model="resnet18"))}


def test_defaults_are_those_of_the_recipes():
    assert json.loads(DEFAULTS.read_text()) == defaults(), "run python tests/sharing/test_card.py"


def test_only_unusual_settings_are_shown_and_a_training_reads_them(measured):
    recipe = _plain(Recipe(epochs=7, optim=Optim(lr=0.5), output="runs/secret", notes="*Slow*.", save_every=5))
    change(measured, "metrics.json", training={**METRICS["training"], "recipe": recipe})
    card = render_card(measured)
    shown = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert shown == {"epochs": 7, "optim": {"lr": 0.5}}
    assert parse_entries(Recipe, shown) == Recipe(epochs=7, optim=Optim(lr=0.5))
    assert "recipe.yaml" not in card
    (measured / "recipe.yaml").write_text("")
    assert "[recipe.yaml](recipe.yaml) has all" in render_card(measured)
    assert r"\*Slow\*." in card
    assert "process" not in card
    change(measured, "metrics.json", training={**METRICS["training"], "processes": 4})
    assert "on CPU in 4 processes, commit abc." in render_card(measured)


def test_severity_has_a_scale(measured):
    results = {**METRICS["results"], "severity": 2.5}
    dataset = {**METRICS["dataset"], "tree_height": 4.0}
    change(measured, "metrics.json", results=results, references=[], dataset=dataset)
    assert "| severity of a mistake: height of the lowest common ancestor, from 1 to 4 | 2.50 |" in render_card(
        measured
    )
    change(measured, "metrics.json", dataset=METRICS["dataset"])
    assert "lowest common ancestor | 2.50 |" in render_card(measured)


@pytest.mark.parametrize(
    ("recorded", "shown"),
    [
        ("accelerate launch training/evaluate.py --model /home/me/x --data.source d", "FOLDER DATA --split test"),
        ("etf-zoo evaluate MODEL DATA --split test --size 48", "FOLDER DATA --split test --size 48"),
        ("etf-zoo evaluate MODEL org/set --split test", "FOLDER org/set --split test"),
    ],
)
def test_the_command_can_be_run_elsewhere(measured, recorded, shown):
    change(measured, "metrics.json", command=recorded)
    assert f"by `etf-zoo evaluate {shown}`" in render_card(measured)
    assert ("DATA being a copy" in render_card(measured)) == ("DATA" in shown)
    (measured / "model.safetensors").unlink()
    assert "evaluate" not in render_card(measured).split("## How it")[0].split("## Results")[1]


@pytest.mark.parametrize(
    "kind", [{"neck": "mlp"}, {"frame": "random"}, {"num_classes": 1500}, {"feature_norm": "batch"}]
)
def test_the_frame_is_what_the_model_has(kind, tmp_path):
    model = timm.create_model("mobilenetv3_small_050_etf", **{"num_classes": 5, **kind})
    cfg = {"input_size": (3, 32, 32), "license": "mit"}
    folder = save_folder(model, tmp_path, pretrained_cfg=cfg, label_names=[str(i) for i in range(model.num_classes)])
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    head = next(iter(frame_heads(model).values()))
    wanted = describe_frame(head.frame, head.num_classes, head.dim)
    assert wanted in render_card(folder)
    (folder / "model.safetensors").unlink()
    assert wanted in render_card(folder)


def test_names_of_others_are_shown_as_they_are(measured):
    nasty = "</code><script>x</script>`\n# Title\n![](http://x)|"
    recipe = {"notes": nasty, "model": nasty, "pretrained": True, nasty: nasty}
    change(
        measured,
        "metrics.json",
        dataset={**METRICS["dataset"], "name": nasty, "split": nasty},
        references=[{"model": nasty, "results": METRICS["results"]}],
        training={**METRICS["training"], "recipe": recipe, "device": nasty, "data_source": nasty, "commit": nasty},
        command=f"etf-zoo evaluate MODEL DATA --split {nasty}",
    )
    change_cfg(measured, tag=nasty, license=nasty)
    text = ModelCard(render_card(measured)).text.replace(r"\`", "")
    outside = re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
    assert "<script>" not in outside
    assert not re.search(r"^# Title", text, re.MULTILINE)
    assert "![](" not in outside
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {4}
    assert [line for line in text.splitlines() if line.startswith("## ")] == [f"## {name}" for name in _SECTIONS]


if __name__ == "__main__":
    DEFAULTS.write_text(json.dumps(defaults(), indent=1) + "\n")


def test_of_a_learned_head_nothing_is_said_of_a_frame(tmp_path):
    folder = save_folder(timm.create_model("test_resnet", num_classes=3), tmp_path / "m")
    metrics = json.loads((cards_folder() / "resnet18_control.e23_tiny" / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**metrics, "references": []}))
    text = render_card(folder)
    assert "keeps its weights and gets a classifier of random weights" in text
    assert "No control was trained beside it" not in text
