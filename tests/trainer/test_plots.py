"""Pictures: what is drawn, and in which order. How they look was judged by eye."""

import json

import pytest
import torch
from PIL import Image

from etf_zoo.trainer.plots import plot_collapse, plot_confusion, plot_cosines, tree_order

# classes 0, 2, 5 and 1, 4 are subtrees of height 1; 3 stands alone below the root, at height 2
DISTANCES = torch.full((6, 6), 2.0)
for _group in ([0, 2, 5], [1, 4]):
    for _i in _group:
        DISTANCES[_i, _group] = 1.0
DISTANCES.fill_diagonal_(0)
GROUPS = ["a", "b", "a", "c", "b", "a"]


def check_png(path):
    image = Image.open(path).convert("L")
    assert min(image.size) > 400
    dark, light = image.getextrema()
    assert light - dark > 100  # something is drawn


def test_subtrees_stand_together():
    assert tree_order(DISTANCES) == [0, 2, 5, 1, 4, 3]
    deep = DISTANCES.clone()
    deep[0, 5] = deep[5, 0] = 0.5  # a subtree within the first
    assert tree_order(deep) == [0, 5, 2, 1, 4, 3]
    assert tree_order(1 - torch.eye(4)) == [0, 1, 2, 3]


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_matrices(tmp_path, groups):
    g = torch.Generator().manual_seed(0)
    plot_cosines(torch.randn(6, 9, generator=g), tmp_path / "a.png", distances=DISTANCES, groups=groups)
    counts = torch.randint(0, 9, (6, 6), generator=g)
    counts[3] = 0  # a class without samples
    plot_confusion(counts, tmp_path / "b.png", distances=DISTANCES, names=list("uvwxyz"), groups=groups)
    for name in ("a.png", "b.png"):
        check_png(tmp_path / name)


def test_collapse_over_epochs(tmp_path):
    records = [{"epoch": e, "val_top1": 50 + e, "val_nc1_cdnv": 1 / e, "train_nc1_cdnv": 0.5 / e} for e in range(1, 9)]
    records[3].pop("val_nc1_cdnv")  # an epoch without evaluation
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    plot_collapse(tmp_path / "metrics.jsonl", tmp_path / "c.png")
    check_png(tmp_path / "c.png")
    (tmp_path / "none.jsonl").write_text('{"epoch": 1, "lr": 0.1}\n')
    with pytest.raises(ValueError, match=r"only epoch, lr"):
        plot_collapse(tmp_path / "none.jsonl", tmp_path / "d.png")
