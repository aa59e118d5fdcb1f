"""MistakeSeverity against a plain loop over samples, on random trees and on the trees of the data sets."""

import functools
import json
import math
import os
from pathlib import Path

import pytest
import torch

from etf_zoo.errors import EtfZooError
from etf_zoo.metrics import MistakeSeverity, preference_scores


def lca_heights(parents, names):
    """Heights of lowest common ancestors, straight from the definition: child -> parent, a class at each leaf."""
    children = {}
    for child, parent in parents.items():
        children.setdefault(parent, []).append(child)

    @functools.cache
    def height(node):
        return 1 + max(map(height, children[node])) if node in children else 0

    def path(node):
        nodes = [node]
        while node in parents:
            node = parents[node]
            nodes.append(node)
        return nodes

    paths = [path(name) for name in names]
    heights = torch.zeros(len(names), len(names))
    for i, mine in enumerate(paths):
        for j, other in enumerate(paths):
            heights[i, j] = height(next(node for node in mine if node in set(other)))
    return heights


def hops_reference(order, distances, k=None):
    """HOPS of one predicted order of classes, from its definition; distances are those from the true class."""
    heights = sorted(set(distances))
    rank = [heights.index(d) for d in distances]
    ideal = sorted(rank)
    weights = []
    for position, r in enumerate(ideal):
        tied = [p for p, other in enumerate(ideal) if other == r]
        following = 2.0 ** -(r + 1) if r < ideal[-1] else 0.0
        weights.append(2.0**-r + (following - 2.0**-r) * tied.index(position) / len(tied))
    k = len(order) if k is None else k
    worst = ideal[:k][::-1]
    apart = sum(weights[p] * abs(ideal[p] - worst[p]) for p in range(k))
    found = sum(weights[p] * abs(ideal[p] - rank[order[p]]) for p in range(k))
    return min(1.0, max(0.0, 1 - found / apart))


def reference(logits, labels, distances):
    """One sample at a time, in Python numbers."""
    k, n, out = len(distances), len(labels), {}
    d = distances.double().tolist()
    rankings = {"": [], "crm_": []}
    for row in logits.double().tolist():
        odds = [math.exp(v - max(row)) for v in row]
        risks = [sum(odds[j] / sum(odds) * d[j][c] for j in range(k)) for c in range(k)]
        rankings[""].append(sorted(range(k), key=lambda c, row=row: -row[c]))
        rankings["crm_"].append(sorted(range(k), key=lambda c, risks=risks: risks[c]))
    for prefix, ranking in rankings.items():
        mistakes = [d[y][order[0]] for y, order in zip(labels.tolist(), ranking, strict=True) if order[0] != y]
        out[f"{prefix}severity"] = sum(mistakes) / len(mistakes)
        for top in (1, 5, 20):
            if top <= k:
                means = [sum(d[y][c] for c in o[:top]) / top for y, o in zip(labels.tolist(), ranking, strict=True)]
                out[f"{prefix}hier_dist@{top}"] = sum(means) / n
        for top in (None, 5, 20):
            if top is None or top <= k:
                each = [hops_reference(o, d[y], top) for y, o in zip(labels.tolist(), ranking, strict=True)]
                out[f"{prefix}hops@{top}" if top else f"{prefix}hops"] = sum(each) / n
        if prefix:
            out["crm_top1"] = 1 - len(mistakes) / n
    return out


def check(distances, n=60, seed=0):
    g = torch.Generator().manual_seed(seed)
    k = len(distances)
    labels = torch.randint(0, k, (n,), generator=g)
    logits = 2 * torch.randn(n, k, generator=g)
    logits[torch.arange(n), labels] += 3
    severity = MistakeSeverity(distances)
    for a, b in zip(logits.split(25), labels.split(25), strict=True):  # a short last batch
        severity.update(a, b)
    severity.update(logits[:0], labels[:0])
    figures = severity.compute()
    assert figures == pytest.approx(reference(logits, labels, distances), rel=1e-12)
    return figures


TREE = {"a": "ab", "b": "ab", "ab": "abc", "c": "abc", "abc": "root", "d": "de", "e": "de", "de": "root"}


def test_heights_of_a_tree_by_hand():
    heights = lca_heights(TREE, ["a", "b", "c", "d", "e"])
    assert heights.tolist() == [
        [0, 1, 2, 3, 3],
        [1, 0, 2, 3, 3],
        [2, 2, 0, 3, 3],
        [3, 3, 3, 0, 1],
        [3, 3, 3, 1, 0],
    ]


def test_agrees_with_a_plain_loop():
    figures = check(lca_heights(TREE, ["a", "b", "c", "d", "e"]))
    assert "hier_dist@5" in figures
    assert "hier_dist@20" not in figures  # there are five classes
    wide = {f"{i}": f"group {i % 6}" for i in range(30)} | {f"group {i}": "root" for i in range(6)}
    assert "crm_hier_dist@20" in check(lca_heights(wide, [str(i) for i in range(30)]), seed=1)


def test_a_mistake_by_hand():
    severity = MistakeSeverity(lca_heights(TREE, ["a", "b", "c", "d", "e"]))
    severity.update(torch.tensor([[9.0, 0, 0, 0, 0], [0, 9.0, 0, 0, 0], [0, 0, 0, 9.0, 0]]), torch.tensor([0, 0, 0]))
    figures = severity.compute()
    assert figures["severity"] == 2  # (1 + 3) / 2
    assert figures["hier_dist@1"] == pytest.approx(4 / 3)
    assert figures["hier_dist@5"] == pytest.approx(9 / 5)


def test_flat_tree_severity_is_one_and_risk_ranks_as_the_logits_do():
    """With all classes equally far apart, risk is 1 - softmax: conditional risk minimization changes nothing."""
    figures = check(torch.ones(8, 8) - torch.eye(8))
    assert figures["severity"] == 1
    plain = {k.removeprefix("crm_"): v for k, v in figures.items() if k.startswith("crm_") and k != "crm_top1"}
    assert plain == pytest.approx({k: figures[k] for k in plain})
    assert figures["crm_top1"] == pytest.approx(1 - figures["hier_dist@1"])


def test_minimizing_risk_lowers_the_distance_where_the_softmax_tells_the_truth():
    g = torch.Generator().manual_seed(5)
    distances = lca_heights(TREE, ["a", "b", "c", "d", "e"])
    logits = torch.randn(20000, 5, generator=g)
    severity = MistakeSeverity(distances)
    severity.update(logits, torch.multinomial(logits.softmax(1), 1, generator=g)[:, 0])
    figures = severity.compute()
    assert figures["crm_hier_dist@1"] < figures["hier_dist@1"] - 0.01


def test_no_mistake_no_severity():
    severity = MistakeSeverity(torch.ones(3, 3) - torch.eye(3))
    severity.update(9 * torch.eye(3), torch.arange(3))
    figures = severity.compute()
    assert math.isnan(figures["severity"])
    assert figures["hier_dist@1"] == 0
    assert figures["crm_top1"] == 1


def test_errors_name_the_fix():
    good = torch.ones(4, 4) - torch.eye(4)
    with pytest.raises(ValueError, match="shape"):
        MistakeSeverity(torch.ones(4, 3))
    with pytest.raises(ValueError, match="symmetric"):
        MistakeSeverity(good.triu())
    with pytest.raises(ValueError, match="zero on the diagonal"):
        MistakeSeverity(torch.ones(4, 4))
    with pytest.raises(ValueError, match="every class is a leaf"):
        MistakeSeverity(torch.zeros(4, 4))
    severity = MistakeSeverity(good)
    with pytest.raises(ValueError, match="call update"):
        severity.compute()
    with pytest.raises(ValueError, match="The tree has 4 classes"):
        severity.update(torch.randn(2, 5), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"0\.\.3, got 0 to 4"):
        severity.update(torch.randn(2, 4), torch.tensor([0, 4]))


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "column"), [("cifar100", "fine_label"), ("grocery", "label"), ("tiny_imagenet", "label")]
)
def test_trees_of_the_data_sets(name, column):
    import datasets

    folder = Path(os.environ["ETF_ZOO_DATA"]) / name
    tree = json.loads((folder / "hierarchy.json").read_text())
    split = "validation" if name == "tiny_imagenet" else "test"
    names = datasets.load_dataset(str(folder), split=split).features[column].names
    heights = lca_heights(tree, names)
    largest = {"cifar100": 2, "grocery": 3}.get(name)
    assert largest is None or heights.max() == largest
    check(heights, n=40)


def test_preference_scores_of_the_best_and_the_worst_order():
    distances = lca_heights({"a": "x", "b": "x", "c": "y", "d": "y", "e": "y", "x": "r", "y": "r"}, list("abcde"))
    labels = torch.arange(5)
    best = -distances
    assert torch.equal(preference_scores(best, labels, distances), torch.ones(5, dtype=torch.float64))
    assert preference_scores(-best, labels, distances).max() == 0
    assert torch.equal(preference_scores(best, labels, distances, k=1), torch.ones(5, dtype=torch.float64))
    swapped = best.clone()
    swapped[0] = torch.tensor([3.0, 4, 1, 1, 1])  # a's sibling first
    one, two = (preference_scores(swapped, labels, distances, k=k)[0] for k in (1, 2))
    assert one == 0
    assert two == 0  # the ideal first two, reversed
    assert 0.4 < preference_scores(swapped, labels, distances)[0] < 1


def test_preference_scores_do_not_mind_the_order_within_a_tie():
    distances = lca_heights({"a": "x", "b": "x", "c": "r", "d": "r", "x": "r"}, list("abcd"))
    scores = torch.tensor([[4.0, 3, 2, 1], [4.0, 3, 1, 2]])
    assert torch.equal(preference_scores(scores, torch.zeros(2, dtype=torch.int64), distances), torch.ones(2).double())


@pytest.mark.parametrize("k", [0, 4])
def test_preference_scores_of_too_many(k):
    with pytest.raises(EtfZooError, match=r"k must lie in 1\.\.3"):
        preference_scores(torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64), torch.zeros(3, 3), k=k)


def test_labels_of_any_integer_type():
    """PyTorch takes uint8 numbers for a mask."""
    distances = torch.ones(12, 12).fill_diagonal_(0)
    labels = torch.arange(1, 13) % 12
    found = []
    for dtype in (torch.int64, torch.uint8):
        measure = MistakeSeverity(distances)
        measure.update(10 * torch.eye(12)[labels], labels.to(dtype))
        found.append(measure.compute())
        assert preference_scores(torch.eye(12)[labels], labels.to(dtype), distances, k=1).mean() == 1
    assert found[0] == found[1]
