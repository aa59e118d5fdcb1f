"""Figures of the experiments on classes that come later, against plain loops."""

import numpy as np
import pytest
import torch

from etf_zoo import FrameClassifier
from etf_zoo.frames.numerics import unit
from training.experiments.fscil import FITTED, METHODS, TOGETHER, based, best_rate, choosing_part, interval, run
from training.experiments.fscil_features import held_out
from training.experiments.later_ood import compared, correlations, half_width, nc1
from training.experiments.later_retrieval import SOURCES, coordinates, difference, ranked


def test_ranking_is_what_a_loop_finds():
    generator = torch.Generator().manual_seed(0)
    queries, gallery = (unit(torch.randn(n, 5, generator=generator)) for n in (6, 20))
    wanted, labels = torch.tensor([0, 1, 2, 0, 1, 9]), torch.arange(20) % 3  # there is none of class 9
    precisions, first, ten = [], [], []
    for query, k in zip(queries[:5], wanted[:5].tolist(), strict=True):
        order = sorted(range(20), key=lambda i: -float(query @ gallery[i]))
        hits = [labels[i] == k for i in order]
        precisions.append(sum(sum(hits[: i + 1]) / (i + 1) for i, hit in enumerate(hits) if hit) / sum(hits))
        first.append(float(hits[0]))
        ten.append(float(any(hits[:10])))
    found = ranked(queries, gallery, wanted, labels)
    slow = {"map": precisions, "recall1": first, "recall10": ten}
    for key, values in slow.items():
        assert found[key].tolist() == pytest.approx([100 * float(value) for value in values])


def test_logits_of_any_shift_and_scale_have_one_embedding():
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    found = coordinates(logits)
    torch.testing.assert_close(found, coordinates(3 * logits + 5), atol=1e-5, rtol=1e-4)
    centered = unit(logits - logits.mean(1, keepdim=True))
    torch.testing.assert_close(found @ found.T, centered @ centered.T, atol=1e-5, rtol=1e-4)


def test_familiar_and_unfamiliar_are_compared_pair_by_pair():
    generator = torch.Generator().manual_seed(0)
    known, unknown = torch.randn(100, generator=generator) + 1, torch.randn(60, generator=generator)
    found = compared(known, unknown)
    assert found["auroc"] == pytest.approx(100 * (known[:, None] > unknown).float().mean().item(), abs=0.01)
    limit = known.sort(descending=True).values[94]  # with it, 95 of 100 are taken
    assert found["fpr95"] == pytest.approx(100 * (unknown >= limit).float().mean().item(), abs=0.01)


def test_the_interval_of_an_auroc_is_that_of_drawing_images_anew():
    generator = torch.Generator().manual_seed(0)
    known, unknown = torch.randn(80, generator=generator) + 1, torch.randn(50, generator=generator)
    rng, drawn = np.random.default_rng(1), []
    for _ in range(2000):
        one, other = known[rng.integers(0, 80, 80)], unknown[rng.integers(0, 50, 50)]
        drawn.append(100 * (one[:, None] > other).float().mean().item())
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert half_width(known, [unknown]) == pytest.approx((high - low) / 2, rel=0.08)
    assert half_width(known, [unknown, unknown + 0.01]) < half_width(known, [unknown])  # two sets say more


def test_nc1_is_within_over_between_class_variance():
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.arange(30) % 3
    groups = [x[labels == k] for k in range(3)]
    within = sum((group - group.mean(0)).square().sum() for group in groups) / 30
    centers = torch.stack([group.mean(0) for group in groups])
    between = (centers - centers.mean(0)).square().sum() / 3
    assert nc1(x, labels, 3) == pytest.approx((within / between).item(), abs=1e-3)


def test_collapse_and_auroc_are_correlated_over_models():
    text = correlations([1.0, 0.5, 0.25, 0.125], {"energy": [60.0, 65.0, 70.0, 75.0]})
    assert "| energy | +1.00 | " in text
    assert text.splitlines()[-1].endswith("| 4 |")


def test_a_difference_of_rankings_holds_the_queries_together():
    generator = torch.Generator().manual_seed(0)
    one = {source: 100 * torch.rand(30, generator=generator).double() for source in SOURCES}
    found = {s: {"a": {"map": v}, "b": {"map": v - 2}, "c": {"map": v.flip(0)}} for s, v in one.items()}
    assert difference(found, "a", "b") == pytest.approx((2, 2, 2))  # each query is ahead by two: nothing is uncertain
    middle, low, high = difference(found, "a", "c")
    assert middle == pytest.approx(0)
    assert low < -3
    assert high > 3


@pytest.mark.parametrize("method", METHODS)
def test_the_protocol_knows_more_classes_each_session(method):
    generator = torch.Generator().manual_seed(0)
    centers = 3 * torch.randn(20, 16, generator=generator)
    labels = torch.arange(20).repeat_interleave(12)
    x, y = (centers[labels] + 0.3 * torch.randn(240, 16, generator=generator)).relu(), labels
    held = torch.from_numpy(held_out(y.numpy(), 10))
    data = {"train": x, "train_labels": y, "held": held, "test": x, "test_labels": y}
    if method == TOGETHER:
        trained = FrameClassifier(16, 10, reserve=10, neck="mlp")
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
        for _ in range(30):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(trained(x[y < 10]), y[y < 10]).backward()
            optimizer.step()
        data |= {f"head.{name}": value for name, value in trained.state_dict().items()}
    head = based(method, data, 10, 20, 0, 1e-2 if method == "learned linear" else 1e-3)
    first = run(data, head, 2, 0, steps=50, rate=1e-2)
    assert len(first["top1"]) == 3
    assert first["top1"][0] > 90
    assert first == run(data, head, 2, 0, steps=50, rate=1e-2)  # the head was left as it was
    assert first["new"] > 20  # chance is 5
    part = choosing_part(data, 10)
    assert (len(part["train"]), len(part["test"])) == (100, 20)
    assert int(part["test_labels"].max()) == 9  # nothing of the classes to come
    assert method in (*FITTED, TOGETHER, "nearest mean")


def test_a_chosen_rate_has_worse_ones_on_both_sides():
    tried = []

    def score(rate):
        tried.append(rate)
        return -abs(rate - 3e-5)

    assert best_rate(score, 1e-3)[0] == pytest.approx(10**-4.5)
    assert min(tried) < 3e-5 < max(tried)
    assert len(tried) == len(set(tried))
    rate, top1 = best_rate(lambda rate: rate, 1e-3)  # no end: a limit
    assert rate == top1 == pytest.approx(10**0.5)
    assert best_rate(lambda rate: 1.0, 1e-3)[0] == 1e-3


def test_intervals_are_student_s():
    assert interval([1.0, 2.0, 3.0]) == "2.0 ± 2.5"  # 4.303 / sqrt(3)
    assert interval([1.0]) == "1.0"


def test_a_head_that_knows_too_much_gives_those_classes_prototypes_in_reserve():
    x, y = torch.randn(100, 8, generator=torch.Generator().manual_seed(0)), torch.arange(100) % 45
    trained = FrameClassifier(120, 60, reserve=40, neck="mlp").eval()
    data = {f"head.{name}": value for name, value in trained.state_dict().items()}
    data |= {"train": torch.nn.functional.pad(x, (0, 112)), "train_labels": y}
    head = based(TOGETHER, data, 45, 100, 0, 0.0)
    assert torch.equal(head.net.weight[:45], trained.weight[:45])
    assert torch.equal(head.net.weight[45:60], trained.weight[60:75])  # which no class has had
    assert head.net.num_classes == 45
