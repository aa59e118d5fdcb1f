"""Trees beside a plain walk up the ancestors; the frame beside a brute-force search for s."""

import json
import os
from pathlib import Path

import pytest
import torch

from etf_zoo.frames import Hierarchy, frame_report, hierarchy_cosines, hierarchy_frame, simplex_etf

# Leaves at different depths: "cat" sits two below the root, "trout" three.
PARENTS = {
    "pike": "fish",
    "trout": "river fish",
    "carp": "river fish",
    "river fish": "fish",
    "fish": "animal",
    "cat": "animal",
    "oak": "plant",
    "plant": "thing",
    "animal": "thing",
}
CLASSES = ["oak", "carp", "cat", "pike", "trout"]


def ancestors(parents, node):
    path = [node]
    while path[-1] in parents:
        path.append(parents[path[-1]])
    return path


def plain_height(parents, node):
    children = [c for c, p in parents.items() if p == node]
    return 1 + max(plain_height(parents, c) for c in children) if children else 0


def plain_distances(parents, classes):
    heights = {node: float(plain_height(parents, node)) for node in {*parents, *parents.values()}}
    paths = {name: ancestors(parents, name) for name in classes}
    rows = []
    for a in classes:
        row = []
        for b in classes:
            common = next(n for n in paths[a] if n in paths[b])
            row.append(heights[common])
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def random_tree(leaves, seed):
    """Leaves joined at random until one node is left: uneven depths and fan-outs."""
    generator = torch.Generator().manual_seed(seed)
    parents, tops, count = {}, [f"leaf{i}" for i in range(leaves)], 0
    while len(tops) > 1:
        size = min(len(tops), int(torch.randint(1, 5, (), generator=generator)))
        order = torch.randperm(len(tops), generator=generator).tolist()
        joined, rest = order[:size], order[size:]
        parents |= {tops[i]: f"node{count}" for i in joined}
        tops = [tops[i] for i in rest] + [f"node{count}"]
        count += 1
    return parents, [f"leaf{i}" for i in range(leaves)]


def smallest_eigenvalue(e, s):
    return torch.linalg.eigvalsh((1 - s) * e + s).min().item()


def test_distances_of_a_small_tree():
    d = Hierarchy(PARENTS).distances(CLASSES)
    expected = [[0, 4, 4, 4, 4], [4, 0, 3, 2, 1], [4, 3, 0, 3, 3], [4, 2, 3, 0, 2], [4, 1, 3, 2, 0]]
    assert d.dtype == torch.float64
    assert torch.equal(d, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(5))
def test_distances_match_a_plain_walk(seed):
    parents, classes = random_tree(25, seed)
    d = Hierarchy.from_dict(parents).distances(classes)
    assert torch.equal(d, plain_distances(parents, classes))
    ultrametric = torch.maximum(d[:, :, None], d[None])  # max(d_ij, d_jk) over j bounds d_ik
    assert bool((d[:, None] <= ultrametric.transpose(1, 2) + 1e-12).all())


def test_order_asked_for_is_kept():
    tree = Hierarchy(PARENTS)
    order = [3, 0, 4, 1, 2]
    d = tree.distances(CLASSES)
    assert torch.equal(tree.distances([CLASSES[i] for i in order]), d[order][:, order])


def test_from_json(tmp_path):
    path = tmp_path / "hierarchy.json"
    path.write_text(json.dumps(PARENTS))
    tree = Hierarchy.from_json(path)
    assert tree.root == "thing"
    assert set(tree.leaves) == set(CLASSES)
    assert tree.height("thing") == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": "r", "a": "q", "q": "r"}', "'a' is named twice, under 'r' and 'q'"),
        ('{"a": "r", "b": "r", "a": "r"}', "'a' is named twice, under 'r' and 'r'"),
        ('["a", "r"]', "holds a list"),
        ('{"a": ["r"]}', "child's name"),
        ("{", "hierarchy.json: "),
    ],
)
def test_json_errors(tmp_path, text, message):
    path = tmp_path / "hierarchy.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Hierarchy.from_json(path)


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ({}, "empty"),
        ({"a": "b", "b": "c", "c": "a"}, r"cycle: a -> b -> c -> a"),
        ({"x": "root", "a": "b", "b": "a"}, "cycle"),
        ({"a": "a"}, "cycle: a -> a"),
        ({"a": "r1", "b": "r2"}, "has 2: r1, r2"),
    ],
)
def test_tree_errors(parents, message):
    with pytest.raises(ValueError, match=message):
        Hierarchy(parents)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["cat", "fish"], "have children: fish"),
        (["cat", "oak", "cat"], "named twice: cat"),
        (["cat", "trot"], "Did you mean 'trout'"),
    ],
)
def test_class_errors(classes, message):
    with pytest.raises(ValueError, match=message):
        Hierarchy(PARENTS).distances(classes)


@pytest.mark.parametrize("gamma", [0.3, 2.0, 8.0])
@pytest.mark.parametrize("seed", range(3))
def test_offset_agrees_with_brute_force(gamma, seed):
    parents, classes = random_tree(30, seed)
    d = Hierarchy(parents).distances(classes)
    e = torch.exp(-gamma * d / d.max())
    cosines, offset = hierarchy_cosines(d, gamma=gamma)
    low, high = -100.0, 0.0  # S is indefinite at the first, positive definite at the second
    for _ in range(60):
        middle = (low + high) / 2
        if smallest_eigenvalue(e, middle) >= -1e-13:
            high = middle
        else:
            low = middle
    assert abs(high - offset) < 1e-9
    expected = (1 - high) * e + high
    assert abs(cosines.min().item() - expected.min().item()) < 1e-9


@pytest.mark.parametrize("dim", [29, 30, 64])
def test_gram_is_the_wanted_cosines(dim):
    parents, classes = random_tree(30, 1)
    d = Hierarchy(parents).distances(classes)
    cosines, _ = hierarchy_cosines(d, gamma=3.0)
    frame = hierarchy_frame(d, dim, gamma=3.0, seed=5)
    assert frame.dtype == torch.float32
    assert frame.shape == (30, dim)
    assert torch.allclose(frame.double() @ frame.double().T, cosines, atol=1e-6, rtol=0)
    assert torch.allclose(frame.norm(dim=1), torch.ones(30), atol=1e-6, rtol=0)
    assert torch.linalg.matrix_rank(cosines, atol=1e-9) == 29


def test_cosines_fall_with_distance():
    d = Hierarchy(PARENTS).distances(CLASSES)
    frame = hierarchy_frame(d, 8, gamma=2.0)
    values = {h: (frame @ frame.T)[d == h] for h in (0, 1, 2, 3, 4)}
    means = [values[h].mean().item() for h in range(5)]
    assert all(v.std() < 1e-6 for v in values.values())
    assert means == sorted(means, reverse=True)


def test_flat_tree_is_a_simplex():
    d = Hierarchy({f"c{i}": "root" for i in range(9)}).distances([f"c{i}" for i in range(9)])
    for gamma in (0.5, 4.0):
        assert frame_report(hierarchy_frame(d, 16, gamma=gamma)).equiangularity_error < 1e-6


def test_large_gamma_tends_to_a_simplex():
    d = Hierarchy(PARENTS).distances(CLASSES)
    gram = hierarchy_frame(d, 4, gamma=60.0)
    gram = gram @ gram.T
    assert torch.allclose(gram, simplex_etf(5, 4) @ simplex_etf(5, 4).T, atol=1e-5, rtol=0)


def test_seed_turns_the_frame_only():
    d = Hierarchy(PARENTS).distances(CLASSES)
    a, b = (hierarchy_frame(d, 8, seed=seed) for seed in (0, 1))
    assert not torch.allclose(a, b, atol=0.1)
    assert torch.allclose(a @ a.T, b @ b.T, atol=1e-6)
    assert torch.equal(a, hierarchy_frame(d, 8, seed=0))


def test_frame_errors():
    d = Hierarchy(PARENTS).distances(CLASSES)
    with pytest.raises(ValueError, match=r"neck='residual', whose output is 4 wide"):
        hierarchy_frame(d, 3)
    with pytest.raises(ValueError, match="gamma"):
        hierarchy_frame(d, 8, gamma=0.0)
    for bad, message in [
        (Hierarchy(PARENTS), r"a tensor \(K, K\), got a Hierarchy. For a tree: Hierarchy.distances\(class_names\)"),
        (d.tolist(), "got a list.*as_tensor"),
        (d[:3], "square"),
        (d + torch.eye(5).double(), "diagonal"),
        (torch.triu(d), "symmetric"),
        (-d, "nonnegative"),
        (d * (d != 4), "distance 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            hierarchy_frame(bad, 8)
    # a path metric no vectors can follow: two classes near each other, of which one is far from a third
    awkward = torch.tensor([[0.0, 0.1, 0.1], [0.1, 0.0, 1.0], [0.1, 1.0, 0.0]])
    with pytest.raises(ValueError, match="not positive definite"):
        hierarchy_frame(awkward, 8, gamma=2.0)


@pytest.mark.data
@pytest.mark.parametrize("name", ["cifar100", "tiny_imagenet", "grocery"])
def test_trees_of_the_data_sets(name):
    tree = Hierarchy.from_json(Path(os.environ["ETF_ZOO_DATA"]) / name / "hierarchy.json")
    d = tree.distances(sorted(tree.leaves))
    assert torch.equal(d, plain_distances(tree.parents, sorted(tree.leaves)))
    frame = hierarchy_frame(d, len(d))
    assert torch.allclose(frame @ frame.T, hierarchy_cosines(d)[0].float(), atol=1e-5)
