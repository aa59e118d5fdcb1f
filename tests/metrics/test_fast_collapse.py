"""FastNeuralCollapse: the plain two-pass reference in float64, and the exact metrics, are what it has to agree with."""

import pytest
import torch

from etf_zoo.metrics import FastNeuralCollapse, NeuralCollapse, fast_collapse, products
from tests.metrics.test_collapse import reference

K, D, N = 7, 24, 400


def make(deviation, *, shift=0.0, k=K, dim=D, n=N, seed=0, sizes=None):
    """Float32 features around class means of norm about 1, off the origin by a common shift; labels; a head.

    `deviation` is the norm of a sample's distance to its class mean.
    """
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(k, dim, generator=g, dtype=torch.float64) / dim**0.5
    labels = torch.arange(n) % k if sizes is None else torch.repeat_interleave(torch.arange(k), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=g)]
    noise = torch.randn(len(labels), dim, generator=g, dtype=torch.float64) / dim**0.5
    features = (means[labels] + deviation * noise + shift).float()
    weight = means + 0.3 * torch.randn(k, dim, generator=g, dtype=torch.float64) / dim**0.5
    return features, labels, weight.float(), torch.randn(k, generator=g)


def measure(kind, x, y, weight=None, bias=None, *, batch=64, **kwargs):
    collapse = kind(kwargs.pop("k", K), x.shape[1], diagonal=kwargs.pop("diagonal", False))
    for features, labels in zip(x.split(batch), y.split(batch), strict=True):
        collapse.update(features, labels)
    if weight is not None:
        for features in x.split(batch):
            collapse.update_agreement(features, weight, bias)
    return collapse.compute(weight, bias, **kwargs)


def assert_agrees(figures, wanted, tolerance=1e-5, without=()):
    assert set(wanted) - {"samples", "classes", "single_sample_classes"} <= set(figures)
    for name, value in wanted.items():
        if name not in without:
            limit = {"vci": {"abs": tolerance}}.get(name, {"rel": tolerance, "abs": 1e-12})
            assert figures[name] == pytest.approx(value, **limit), name


@pytest.mark.parametrize("deviation", [1.0, 1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("rows", [fast_collapse._ROWS, 50])
def test_agrees_with_the_plain_reference(deviation, rows, monkeypatch):
    monkeypatch.setattr(fast_collapse, "_ROWS", rows)
    data = make(deviation)
    assert_agrees(measure(FastNeuralCollapse, *data), reference(*data))


@pytest.mark.parametrize("shift", [1.0, 30.0])
def test_a_large_common_mean_costs_nothing_more_than_it_costs_the_features(shift):
    """The common mean is up to 150 times the class means and 150,000 times the deviations."""
    data = make(1e-3, shift=shift)
    assert_agrees(measure(FastNeuralCollapse, *data), measure(NeuralCollapse, *data))
    x, y = data[:2]
    plain = (x.square().sum(0) - sum(x[y == c].sum(0).square() / (y == c).sum() for c in range(K))).sum() / N
    means = torch.stack([x[y == c].double().mean(0) for c in range(K)])
    assert abs(plain / ((x.double() - means[y]).square().sum() / N) - 1) > 1e-3  # sums of squares would have failed


@pytest.mark.parametrize("order", ["as drawn", "by class", "reversed"])
@pytest.mark.parametrize("batch", [1, 3, 400])
def test_any_order_and_any_batches(order, batch, monkeypatch):
    monkeypatch.setattr(fast_collapse, "_ROWS", 32)
    x, y, weight, bias = make(1e-3, shift=1.0)
    wanted = reference(x, y, weight, bias)
    at = {"as drawn": torch.arange(N), "by class": y.argsort(stable=True), "reversed": torch.arange(N).flip(0)}[order]
    assert_agrees(measure(FastNeuralCollapse, x[at], y[at], weight, bias, batch=batch), wanted)


def test_tiny_and_empty_classes_and_an_outlier_first(monkeypatch):
    monkeypatch.setattr(fast_collapse, "_ROWS", 40)
    data = make(1e-3, sizes=[200, 1, 0, 2, 100, 3, 60])
    assert_agrees(measure(FastNeuralCollapse, *data), reference(*data))
    assert measure(FastNeuralCollapse, *data)["single_sample_classes"] == 1
    x, y, weight, bias = make(1e-3)
    x[(y == 3).nonzero()[0]] += 100.0  # what the others of its class are first compared with
    order = torch.argsort((torch.arange(N) != (y == 3).nonzero()[0]).long(), stable=True)
    x, y = x[order], y[order]
    wanted = reference(x, y, weight, bias)  # the outlier has all variance: what is left of other directions is lost
    assert_agrees(measure(FastNeuralCollapse, x, y, weight, bias), wanted, without=("vci", "effective_rank"))


@pytest.mark.parametrize(("k", "dim"), [(40, 12), (20, 700)])
def test_more_classes_than_dimensions_and_several_blocks(k, dim):
    data = make(0.3, k=k, dim=dim, n=900)
    assert_agrees(measure(FastNeuralCollapse, *data, k=k), measure(NeuralCollapse, *data, k=k))


def test_diagonal_mode_and_weighted_means():
    data = make(0.1)
    for kwargs in ({"diagonal": True}, {"global_mean": "weighted"}):
        assert_agrees(measure(FastNeuralCollapse, *data, **kwargs), measure(NeuralCollapse, *data, **kwargs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_takes_features_of_any_precision(dtype):
    x, y, weight, bias = make(1e-3, shift=0.0 if dtype == torch.float16 else 1e4)
    x = make(1e-3)[0].double() + 1e4 if dtype == torch.float64 else x  # float32 would leave no digit of these
    data = x.to(dtype), y, weight, bias
    without = ("nc3_bias",) if dtype == torch.float64 else ()  # which sees the common mean itself
    assert_agrees(
        measure(FastNeuralCollapse, *data), measure(NeuralCollapse, *data), without=(*without, "nc4_agreement")
    )


def test_what_waits_is_a_copy():
    """A loop may reuse its buffers."""
    x, y, weight, bias = make(0.5)
    wanted = measure(NeuralCollapse, x, y, weight, bias)
    collapse, features, labels = FastNeuralCollapse(K, D), torch.empty(50, D), torch.empty(50, dtype=torch.long)
    for asks in (False, True):
        for part, numbers in zip(x.split(50), y.split(50), strict=True):
            features.copy_(part)
            labels.copy_(numbers)
            collapse.update_agreement(features, weight, bias) if asks else collapse.update(features, labels)
    assert_agrees(collapse.compute(weight, bias), wanted)


def test_agreement_waits_for_no_other_head(monkeypatch):
    x, y, weight, bias = make(1.5)
    other = weight.flip(0)
    wanted = sum(measure(NeuralCollapse, x, y, head, bias)["nc4_agreement"] for head in (weight, other))
    collapse = FastNeuralCollapse(K, D)
    collapse.update(x, y)
    collapse.update_agreement(x, weight, bias)
    weight_then = weight.clone()
    collapse.update_agreement(x, other, bias)
    assert collapse.agreement_samples == 2 * N
    assert collapse.compute()["nc4_agreement"] == pytest.approx(wanted / 2)
    collapse = FastNeuralCollapse(K, D)
    collapse.update(x, y)
    collapse.update_agreement(x, predictions=(x @ weight_then.T + bias).argmax(1))
    assert collapse.compute()["nc4_agreement"] == measure(NeuralCollapse, x, y, weight, bias)["nc4_agreement"]


def test_agreement_is_of_the_head_as_it_was():
    """An optimizer changes it in place while rows wait."""
    x, weight = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), torch.eye(4, 6)
    found = []
    for kind in (NeuralCollapse, FastNeuralCollapse):
        collapse, head = kind(4, 6), weight.clone()
        collapse.update(x, torch.arange(40) % 4)
        collapse.update_agreement(x, head)
        head.neg_()
        found.append(collapse.compute()["nc4_agreement"])
    assert found[0] == found[1]


@pytest.mark.parametrize("deviation", [1e-2, 2.0])
def test_agreement_by_the_short_cut_and_without(deviation, monkeypatch):
    monkeypatch.setattr(fast_collapse, "_ROWS", 100)
    x, y, weight, bias = make(deviation)
    data = x, y, weight, bias / 100
    asked = []
    compare = fast_collapse._is_nearest
    monkeypatch.setattr(fast_collapse, "_is_nearest", lambda x, *a: [asked.append(len(x)), compare(x, *a)][1])
    assert measure(FastNeuralCollapse, *data)["nc4_agreement"] == reference(*data)["nc4_agreement"]
    assert (sum(asked) < N) == (deviation < 1)


class Twice:
    """Two processes that saw the same: the sums of one, doubled."""

    num_processes, device = 2, "cpu"

    def reduce(self, tensor, reduction):
        return 2 * tensor


def test_over_processes():
    x, y, weight, bias = make(1e-2)
    figures = []
    for kind in (FastNeuralCollapse, NeuralCollapse):
        collapse = kind(K, D)
        collapse.update(x, y)
        collapse.reduce(Twice())
        collapse.update_agreement(x, weight, bias)
        collapse.reduce(Twice())
        figures.append(collapse.compute(weight, bias))
    assert figures[0]["samples"] == 2 * N
    assert_agrees(*figures)


def test_without_onednn_it_is_the_same(monkeypatch):
    data = make(0.1)
    own = measure(FastNeuralCollapse, *data)
    monkeypatch.setattr(products, "_has_onednn", lambda: False)
    assert_agrees(measure(FastNeuralCollapse, *data), own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [32, N, fast_collapse._ROWS])
def test_what_is_handed_over_is_left_as_it_is(rows, dtype, monkeypatch):
    monkeypatch.setattr(fast_collapse, "_ROWS", rows)
    x, y, weight, bias = (value.to(dtype) if value.is_floating_point() else value for value in make(0.1))
    kept = x.clone()
    measure(FastNeuralCollapse, x, y, weight, bias, batch=N)
    assert torch.equal(x, kept)


def test_errors_are_those_of_the_exact_metrics():
    collapse = FastNeuralCollapse(3, 4)
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    with pytest.raises(ValueError, match="not finite"):
        collapse.update(x / 0, y)
    with pytest.raises(ValueError, match="at least two classes"):
        collapse.compute()
    collapse.update(x, y)
    collapse.reduce()
    with pytest.raises(ValueError, match="reset"):
        collapse.update(x, y)
    collapse.reset()
    collapse.update(torch.full((5, 4), 3e38), y)  # a sum that overflows is no bad feature
    collapse.settle()
    assert torch.isfinite(collapse.means).all()
    with pytest.raises(ValueError, match="at least two classes"):
        FastNeuralCollapse(3, 4).update_agreement(x, torch.randn(3, 4))
