"""The README shows what the files say."""

import json

from training.experiments.readme import ROOT, rendered, table


def test_results_table_is_up_to_date():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == rendered(readme)
    assert "| fixed frame | embedded |" in readme
    assert "| learned (control) | in this repository |" in readme  # ResNet-18's
    assert "| learned (control) | not kept |" in readme


def test_seeds_are_averaged(tmp_path):
    folder = tmp_path / "resnet18_etf.tag"
    folder.mkdir()
    source = next((ROOT / "model_cards").glob("*_etf.*/metrics.json"))
    metrics = json.loads(source.read_text(encoding="utf-8"))
    for name, top1 in (("metrics", 50.0), ("metrics_seed1", 52.0), ("metrics_seed2", 54.0)):
        metrics["results"]["top1"] = top1
        (folder / f"{name}.json").write_text(json.dumps(metrics))
    assert "| 50.00 (mean of 3 seeds 52.00 ± 2.00) |" in table(tmp_path)


def test_quick_start_figures_are_those_of_the_committed_run():
    metrics = json.loads((ROOT / "training/results/quickstart/metrics.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"| fixed frame, pretrained | {metrics['results']['top1']:.2f} |" in readme
    for reference in metrics["references"]:
        assert f"| {reference['model']} | {reference['results']['top1']:.2f} |" in readme
