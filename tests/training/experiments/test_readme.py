"""README and docs show what the files say."""

import json
import sys

import pytest

from training.experiments.readme import COMMAND, ROOT, TABLES, pages, rendered, source, write_tables


def test_tables_are_up_to_date():
    assert ROOT / "README.md" in pages()
    for page in pages():
        text = page.read_text(encoding="utf-8")
        assert text == rendered(text, page), f"run {COMMAND}"


def test_table_of_models():
    text = source(ROOT / "docs" / "results.md")
    assert "| fixed frame | embedded |" in text
    assert "| learned (control) | in this repository |" in text  # ResNet-18's
    assert "| learned (control) | not kept |" in text
    assert "](../model_cards/resnet18_etf.e23s30_tiny) |" in text


def test_pairs_are_of_one_recipe_and_size():
    lines = TABLES["pairs"](ROOT / "docs" / "results" / "fixed_frame.md").splitlines()
    row = next(line for line in lines if "resnet18_etf.e60_tiny" in line)
    assert row.endswith("| 30 | 96 | 96 | 3 | 58.5 | 57.0 | 5.8 | 8.6 |")  # means of metrics*.json, worked out by hand
    assert any("resnet18_64px" in line and "| 64 | 64 | 1 | 45.6 | 46.0 | 3.7 | 3.6 |" in line for line in lines)
    # the second file is of another size
    assert any("mobilenetv3_small_100_etf]" in line and "| 96 | 1 | 37.9 |" in line for line in lines)


@pytest.mark.parametrize("name", [name for name in TABLES if name != "scratch"])
def test_each_table_has_a_row(name):
    lines = TABLES[name](ROOT / "README.md").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(("|---", "| ---")))
    columns = {line.count("|") for line in lines[start - 1 : start + 2]}
    assert len(columns) == 1


def test_the_command_runs_from_a_clone():
    """Its folder comes first in the path then: no module of it may have the name of one of Python's."""
    for file in (ROOT / "training" / "experiments").glob("*.py"):
        assert file.stem not in sys.stdlib_module_names


def test_standing_is_that_of_the_runs():
    """The verdicts by the figures of the runs, worked out by hand."""
    lines = TABLES["standing"](ROOT / "README.md").splitlines()[2:]
    assert [line.split("**")[1] for line in lines] == ["ahead", "level", "behind", "behind", "ahead"]
    cells = [
        json.loads(line)
        for line in (ROOT / "training/results/transfer_e60/earlier_cells.jsonl").read_text().splitlines()
    ]
    full = {c["weights"]: c["top1"] for c in cells if (c["data"], c["method"]) == ("grocery", "full")}
    gaps = [full[f"frame, run {i}"] - full[f"learned, run {i}"] for i in range(3)]
    mean = sum(gaps) / 3
    spread = (sum((gap - mean) ** 2 for gap in gaps) / 2) ** 0.5
    assert (
        f"{mean:+.1f} ± {4.3027 * spread / 3**0.5:.1f} |" in lines[3]
    )  # 4.3027: t with two degrees of freedom, 97.5 %


def test_marks_in_any_page(tmp_path):
    folder = tmp_path / "docs" / "results"
    folder.mkdir(parents=True)
    page = folder / "speed.md"
    begin, end = f"<!-- head-cost: {COMMAND} -->", "<!-- end of head-cost -->"
    page.write_text(f"# Speed\n\n{begin}\nold\n{end}\n\nAnd {begin}{end}\n")
    (tmp_path / "other.md").write_text("no table")
    write_tables(tmp_path)
    table = TABLES["head-cost"](page)
    assert page.read_text() == f"# Speed\n\n{begin}\n{table}\n{end}\n\nAnd {begin}\n{table}\n{end}\n"
    assert pages(tmp_path) == [page]
    with pytest.raises(ValueError, match="there is no table 'heds', only results"):
        rendered(f"<!-- heds: {COMMAND} --><!-- end of heds -->", page)
    with pytest.raises(ValueError, match="has no end"):
        rendered(begin, page)


def test_seeds_are_averaged(tmp_path):
    folder = tmp_path / "resnet18_etf.tag"
    folder.mkdir()
    file = next((ROOT / "model_cards").glob("*_etf.*/metrics.json"))
    metrics = json.loads(file.read_text(encoding="utf-8"))
    for name, top1 in (("metrics", 50.0), ("metrics_seed1", 52.0), ("metrics_seed2", 54.0)):
        metrics["results"]["top1"] = top1
        (folder / f"{name}.json").write_text(json.dumps(metrics))
    assert "| 50.00 (mean of 3 seeds 52.00 ± 2.00) |" in source(tmp_path / "README.md", tmp_path)


def test_quick_start_figures_are_those_of_the_committed_run():
    metrics = json.loads((ROOT / "training/results/quickstart/metrics.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"| fixed frame, pretrained | {metrics['results']['top1']:.2f} |" in readme
    for reference in metrics["references"]:
        assert f"| {reference['model']} | {reference['results']['top1']:.2f} |" in readme
