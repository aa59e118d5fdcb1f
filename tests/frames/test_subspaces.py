"""Subspaces of a tree beside a walk through its nodes: who shares an axis, and how much of a row lies on it."""

import math

import pytest
import torch

from etf_zoo.errors import EtfZooError
from etf_zoo.frames import Hierarchy, hierarchical_subspaces
from etf_zoo.frames.subspaces import node_levels, subspace_axes

UNEVEN = {
    "beagle": "dog",
    "poodle": "dog",
    "dog": "animal",
    "tabby": "cat",
    "cat": "animal",
    "animal": "root",
    "rose": "plant",
    "fern": "plant",
    "plant": "root",
    "bus": "root",
}
CLASSES = ["rose", "beagle", "bus", "tabby", "poodle", "fern"]


def slow_paths(parents, classes):
    """Of each class the sets of classes below its nodes, its own first; a node with one child is the child again."""
    paths = []
    for name in classes:
        sets, node = [], name
        while node in parents:
            below = frozenset(c for c in classes if c == node or node in ancestors(parents, c))
            if below not in sets:
                sets.append(below)
            node = parents[node]
        paths.append(sets)
    return paths


def ancestors(parents, node):
    found = []
    while node in parents:
        node = parents[node]
        found.append(node)
    return found


def test_rows_are_those_of_a_walk_up_the_tree():
    rows = hierarchical_subspaces(Hierarchy(UNEVEN).distances(CLASSES), 12).double()
    paths = slow_paths(UNEVEN, CLASSES)
    assert subspace_axes(Hierarchy(UNEVEN).distances(CLASSES)) == len(set().union(*paths)) == 9
    for k, path in enumerate(paths):
        wanted = [math.exp(1 / (i + 1)) ** 2 for i in range(len(path))]
        found = rows[k].square()[rows[k] > 0].sort(descending=True).values
        assert torch.allclose(found, torch.tensor(wanted, dtype=torch.float64) / sum(wanted), atol=1e-6)
        for other, theirs in enumerate(paths):  # they share as many axes as nodes
            assert int(((rows[k] > 0) & (rows[other] > 0)).sum()) == len(set(path) & set(theirs))
    assert not rows[:, 9:].any()


def test_a_flat_tree_gives_the_axes_and_a_deeper_one_nearer_relatives():
    flat = hierarchical_subspaces(Hierarchy(dict.fromkeys("abc", "root")).distances(list("abc")), 3)
    assert torch.equal(flat, torch.eye(3))
    rows = hierarchical_subspaces(Hierarchy(UNEVEN).distances(CLASSES), 9)
    cosines = rows @ rows.T
    assert torch.allclose(cosines.diagonal(), torch.ones(6))
    assert cosines[1, 4] > cosines[1, 3] > cosines[1, 0] == 0  # beagle: poodle, tabby, rose


def test_levels_are_the_largest_positions():
    rows = hierarchical_subspaces(Hierarchy(UNEVEN).distances(CLASSES), 10)
    # six leaves; dogs and plants lie above them; animals are second above the cat, third above the dogs
    assert node_levels(rows).tolist() == [1] * 6 + [2, 2, 3, 0]


def test_errors():
    distances = Hierarchy(UNEVEN).distances(CLASSES)
    with pytest.raises(EtfZooError, match=r"9 nodes.*8 dimensions.*neck='residual', whose output is then 9 wide"):
        hierarchical_subspaces(distances, 8)
    crooked = distances.clone()
    crooked[0, 1] = crooked[1, 0] = 1.5
    with pytest.raises(EtfZooError, match=r"no heights in a tree.*Hierarchy.distances"):
        hierarchical_subspaces(crooked, 20)
    with pytest.raises(EtfZooError, match="symmetric"):
        hierarchical_subspaces(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), 4)
