"""NeuralCollapse against a plain two-pass reference in float64, written from the formulas."""

import functools
import math

import pytest
import torch

from etf_zoo.frames import simplex_etf
from etf_zoo.metrics import NeuralCollapse

K, D, N = 7, 24, 400


def make(sd, *, k=K, dim=D, n=N, seed=0, dtype=torch.float64):
    """Features (n, dim) around random class means of norm about sqrt(dim), unequal class sizes, and a head."""
    g = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=g, dtype=torch.float64)
    means = draw(k, dim) + 3
    labels = torch.cat([torch.arange(k).repeat(2), (torch.rand(n - 2 * k, generator=g).square() * k).long()])
    labels = labels[torch.randperm(n, generator=g)]
    features = means[labels] + sd * draw(n, dim) @ torch.diag(torch.linspace(0.5, 1.5, dim, dtype=torch.float64))
    weight, bias = means + 0.5 * draw(k, dim), draw(k)
    return features.to(dtype), labels, weight, bias


def reference(x, y, weight=None, bias=None, *, global_mean="balanced"):
    """All figures, in two passes and with no care for speed."""
    x = x.double()
    classes = sorted(set(y.tolist()))
    k, n = len(classes), len(y)
    groups = [x[y == c] for c in classes]
    means = torch.stack([group.mean(0) for group in groups])
    p = torch.tensor([len(g) / n for g in groups] if global_mean == "weighted" else [1 / k] * k, dtype=torch.float64)
    center = (p[:, None] * means).sum(0)
    m = means - center
    within = sum((g - mu).T @ (g - mu) for g, mu in zip(groups, means, strict=True)) / n
    between = sum(p[c] * torch.outer(m[c], m[c]) for c in range(k))
    cut = max(k, x.shape[1]) * torch.finfo(torch.float64).eps
    out = {"nc1_pinv": (within @ torch.linalg.pinv(between, rtol=cut, hermitian=True)).trace() / k}
    out["nc1_quotient"] = within.trace() / between.trace()
    variances = [(g - mu).square().sum(1).mean() for g, mu in zip(groups, means, strict=True)]
    pairs = [(i, j) for i in range(k) for j in range(k) if i != j]
    counted = [(i, j) for i, j in pairs if len(groups[i]) > 1 and len(groups[j]) > 1]
    quotients = [(variances[i] + variances[j]) / 2 / (means[i] - means[j]).square().sum() for i, j in counted]
    out["nc1_cdnv"] = torch.stack(quotients).mean()
    norms = m.norm(dim=1)
    out["nc2_equinorm"] = norms.std(correction=0) / norms.mean()
    cosines = torch.stack([m[i] @ m[j] / (norms[i] * norms[j]) for i, j in pairs])
    out["nc2_equiangularity"] = cosines.std(correction=0)
    out["nc2_maximal_angle"] = (cosines + 1 / (k - 1)).abs().mean()
    etf = (torch.eye(k, dtype=torch.float64) - 1 / k) / math.sqrt(k - 1)
    gram = m @ m.T
    out["nc2_etf_distance"] = (gram / gram.norm() - etf).norm()
    total = within + between
    # 1 - tr(pinv(T) B) / r by Woodbury's identity, as pinv of a covariance of condition 1e10 leaves six digits
    values, vectors = torch.linalg.eigh(between)
    root = vectors[:, values > cut * values.max()] * values[values > cut * values.max()].sqrt()
    inner = torch.eye(root.shape[1], dtype=torch.float64) + root.T @ torch.linalg.solve(within, root)
    out["vci"] = torch.linalg.inv(inner).trace() / root.shape[1]
    for name, matrix in (("effective_rank", total), ("effective_rank_means", between)):
        values = torch.linalg.eigvalsh(matrix)
        singular = values[values > cut * values.max()].sqrt()
        share = singular / singular.sum()
        out[name] = (-(share * share.log()).sum()).exp()
    if weight is not None:
        w = weight.double()[classes]
        product = w @ m.T
        out["nc3_self_duality"] = (w / w.norm() - m / m.norm()).norm() ** 2
        out["nc3_etf_distance"] = (product / product.norm() - etf).norm()
        out["nc3_cosine"] = torch.stack([w[c] @ m[c] / (w[c].norm() * m[c].norm()) for c in range(k)]).mean()
        hits = 0
        for row in x:
            nearest = classes[int((means - row).square().sum(1).argmin())]
            hits += nearest == int((weight.double() @ row + (0 if bias is None else bias.double())).argmax())
        out["nc4_agreement"] = hits / n
        if bias is not None:
            out["nc3_bias"] = (w @ center + bias.double()[classes]).norm()
    return {name: float(value) for name, value in out.items()}


def measure(x, y, weight=None, bias=None, *, batches=(64,), k=K, **kwargs):
    """NeuralCollapse over batches of the given sizes in turn; a last short one included."""
    collapse = NeuralCollapse(k, x.shape[1], diagonal=kwargs.pop("diagonal", False))
    start = turn = 0
    while start < len(x):
        stop = start + batches[turn % len(batches)]
        collapse.update(x[start:stop], y[start:stop])
        start, turn = stop, turn + 1
    if weight is not None:
        collapse.update_agreement(x, weight, bias)
    return collapse.compute(weight, bias, **kwargs)


def assert_agrees(figures, wanted, rel=1e-10):
    for name, value in wanted.items():
        # the index is computed as 1 minus a number near 1: near 0 it is exact absolutely
        # and singular values from a covariance are good to eps * condition: 1e10 leaves nine digits of the entropy
        tolerance = {"vci": {"abs": 1e-10}, "effective_rank": {"rel": 1e-8}}.get(name, {"rel": rel, "abs": 1e-14})
        assert figures[name] == pytest.approx(value, **tolerance), name


@pytest.mark.parametrize("sd", [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("global_mean", ["balanced", "weighted"])
def test_agrees_with_the_two_pass_reference(sd, global_mean):
    x, y, weight, bias = make(sd)
    figures = measure(x, y, weight, bias, global_mean=global_mean)
    assert_agrees(figures, reference(x, y, weight, bias, global_mean=global_mean))
    assert figures["samples"] == N
    assert figures["classes"] == K


@pytest.mark.parametrize("sd", [1.0, 1e-5])
@pytest.mark.parametrize("batches", [(1,), (3,), (400,), (1, 200, 5), (2, 2, 90)])
def test_any_order_and_any_split_into_batches(sd, batches):
    x, y, weight, bias = make(sd)
    wanted = reference(x, y, weight, bias)
    by_class = torch.argsort(y, stable=True)
    shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    for order in (torch.arange(N), by_class, shuffled):
        assert_agrees(measure(x[order], y[order], weight, bias, batches=batches), wanted)


def test_plain_sums_would_fail_where_this_holds():
    """The test above can fail: sums of squares lose five digits at this spread."""
    x, y, _, _ = make(1e-5)
    first = x[y == 0]
    plain = first.square().mean(0) - first.mean(0).square()
    true = (first - first.mean(0)).square().mean(0)
    assert (plain / true - 1).abs().max() > 1e-6


@pytest.mark.parametrize(("k", "dim"), [(40, 12), (30, 300), (12, 12)])
def test_more_classes_than_dimensions_and_several_blocks(k, dim):
    x, y, weight, bias = make(0.3, k=k, dim=dim, n=600)
    assert_agrees(measure(x, y, weight, bias, k=k), reference(x, y, weight, bias), rel=1e-9)


def test_large_gram_matrices_are_taken_in_blocks(monkeypatch):
    x, y, weight, bias = make(0.3)
    whole = measure(x, y, weight, bias)
    monkeypatch.setattr("etf_zoo.metrics.geometry._WHOLE", 3)
    monkeypatch.setattr("etf_zoo.metrics.geometry._BLOCK", 3)
    assert measure(x, y, weight, bias) == pytest.approx(whole, rel=1e-11)


def test_many_samples_at_once_are_chunked(monkeypatch):
    x, y, weight, bias = make(0.3)
    monkeypatch.setattr("etf_zoo.metrics.collapse._CHUNK", 33)
    assert_agrees(measure(x, y, weight, bias, batches=(1000,)), reference(x, y, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_features_are_taken_as_they_are(dtype):
    x, y, weight, _ = make(0.5, dtype=dtype)
    assert_agrees(measure(x, y, weight), reference(x, y, weight))


def test_diagonal_mode_gives_the_same_but_for_full_covariances():
    x, y, weight, bias = make(0.3)
    full, diagonal = measure(x, y, weight, bias), measure(x, y, weight, bias, diagonal=True)
    shared = full.keys() & diagonal.keys()
    assert full.keys() - shared == {"nc1_pinv", "vci", "effective_rank"}
    assert diagonal.keys() - shared == {"nc1_pinv_diagonal"}
    assert {n: diagonal[n] for n in shared} == pytest.approx({n: full[n] for n in shared}, rel=1e-12)
    means = torch.stack([x[y == c].mean(0) for c in range(K)])
    within = sum((x[y == c] - means[c]).square().sum(0) for c in range(K)) / N
    m = means - means.mean(0)
    wanted = (within * torch.linalg.pinv(m.T @ m / K, rtol=1e-13, hermitian=True).diagonal()).sum() / K
    assert diagonal["nc1_pinv_diagonal"] == pytest.approx(wanted.item(), rel=1e-10)


# -------------------------------------------------------------------------------------------------- the mathematics


def collapsed(k=5, dim=9, per_class=4, scale=3.0):
    frame = simplex_etf(k, dim).double()
    y = torch.arange(k).repeat(per_class)
    return scale * frame[y] + 0.7, y, frame


def test_a_collapsed_simplex_has_no_error_at_all():
    x, y, frame = collapsed()
    figures = measure(x, y, frame, -frame @ torch.full((9,), 0.7, dtype=torch.float64), k=5)
    zero = [n for n in figures if n.startswith(("nc1", "nc2", "nc3_self", "nc3_etf"))] + ["vci"]
    assert len(zero) == 10
    for name in zero:
        assert figures[name] == pytest.approx(0, abs=1e-6), name  # the frame is float32
    assert figures["nc3_bias"] == pytest.approx(0, abs=1e-5)
    assert figures["nc3_cosine"] == pytest.approx(1)
    assert figures["nc4_agreement"] == 1
    assert figures["effective_rank"] == pytest.approx(4, rel=1e-6)
    assert figures["effective_rank_means"] == pytest.approx(4, rel=1e-6)


def test_class_means_that_say_nothing_have_index_near_one():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(20000, 6, generator=g), torch.randint(0, 3, (20000,), generator=g)
    figures = measure(x, y, k=3, batches=(5000,))
    assert figures["vci"] > 0.999
    assert figures["nc1_quotient"] > 1000


def test_rotation_scale_and_shift_change_nothing():
    x, y, weight, bias = make(0.4)
    rotation = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]
    moved = 2.5 * x @ rotation + 1.5
    # the head that gives the same logits on the moved features, up to the factor that no figure sees
    head = weight @ rotation
    a = measure(x, y, weight, bias)
    b = measure(moved, y, head, 2.5 * bias - 1.5 * head.sum(1))
    a.pop("nc3_bias"), b.pop("nc3_bias")
    assert b == pytest.approx(a, rel=1e-9)


def test_the_index_survives_any_invertible_map_and_nc1_quotient_does_not():
    x, y, _, _ = make(0.4)
    g = torch.Generator().manual_seed(3)
    squeeze = torch.eye(D, dtype=torch.float64) + 0.3 * torch.randn(D, D, generator=g, dtype=torch.float64)
    a, b = measure(x, y), measure(x @ squeeze, y)
    assert b["vci"] == pytest.approx(a["vci"], rel=1e-8)
    assert b["nc1_quotient"] != pytest.approx(a["nc1_quotient"], rel=1e-2)


def test_the_index_is_what_its_definition_says():
    x, y, _, _ = make(0.4)
    means = torch.stack([x[y == c].mean(0) for c in range(K)])
    between = (means - means.mean(0)).T @ (means - means.mean(0)) / K
    total = between + (x - means[y]).T @ (x - means[y]) / N
    wanted = 1 - (torch.linalg.pinv(total) @ between).trace() / (K - 1)
    assert measure(x, y)["vci"] == pytest.approx(wanted.item(), rel=1e-9)


def test_weighted_covariances_add_up_to_the_covariance_of_the_features():
    """Then effective rank is that of the centered features themselves."""
    x, y, _, _ = make(0.4)
    singular = torch.linalg.svdvals(x - x.mean(0))
    share = singular / singular.sum()
    wanted = (-(share * share.log()).sum()).exp().item()
    assert measure(x, y, global_mean="weighted")["effective_rank"] == pytest.approx(wanted, rel=1e-10)
    assert measure(x, y)["effective_rank"] != pytest.approx(wanted, rel=1e-4)


# ------------------------------------------------------------------------------------------------------ degenerate


def test_empty_classes_are_left_out():
    x, y, weight, bias = make(0.3)
    keep = (y != 2) & (y != 5)
    figures = measure(x[keep], y[keep], weight, bias)
    assert_agrees(figures, reference(x[keep], y[keep], weight, bias))
    assert figures["classes"] == K - 2


def test_single_samples_have_a_mean_but_no_spread():
    x, y, weight, bias = make(0.3)
    keep = (y != 2) | (torch.arange(N) == (y == 2).nonzero()[0])
    figures = measure(x[keep], y[keep], weight, bias)
    assert_agrees(figures, reference(x[keep], y[keep], weight, bias))
    assert figures["single_sample_classes"] == 1
    one_each = measure(x[:3], torch.arange(3))
    assert math.isnan(one_each["nc1_cdnv"])
    assert one_each["nc1_pinv"] == 0


def test_near_singular_between_class_covariance():
    """Class means in a plane: the pseudo-inverse has rank 2, whatever rounding adds in the other directions."""
    g = torch.Generator().manual_seed(4)
    plane = torch.randn(2, D, generator=g, dtype=torch.float64)
    means = torch.randn(K, 2, generator=g, dtype=torch.float64) @ plane
    y = torch.arange(K).repeat(50)
    noise = 0.1 * torch.randn(350, D, generator=g, dtype=torch.float64)
    for c in range(K):  # the class means are then exactly in the plane
        noise[y == c] -= noise[y == c].mean(0)
    x = means[y] + noise
    figures = measure(x, y)
    assert_agrees(figures, reference(x, y), rel=1e-8)
    assert figures["effective_rank_means"] < 2.001
    assert figures["nc1_pinv"] < 1


def test_two_classes_on_one_another_have_infinite_cdnv():
    x, y, _, _ = make(0.3)
    for c in (0, 1):
        x[y == c] -= x[y == c].mean(0) - 1
    assert measure(x, y)["nc1_cdnv"] == math.inf


def test_all_class_means_on_one_point():
    figures = measure(torch.tensor([[1.0, 0.0], [-1.0, 0.0]] * 3), torch.tensor([0, 0, 1, 1, 2, 2]), k=3)
    assert figures["nc1_pinv"] == figures["nc1_quotient"] == math.inf
    assert figures["vci"] == 1
    assert math.isnan(figures["nc2_equinorm"])


# ------------------------------------------------------------------------------------------------------------- NC4


def test_agreement_takes_predictions_of_any_model():
    x, y, weight, bias = make(2.0)
    collapse = NeuralCollapse(K, D)
    collapse.update(x, y)
    collapse.update_agreement(x[:150], predictions=(x[:150] @ weight.T + bias).argmax(1))
    collapse.update_agreement(x[150:], weight, bias)
    agreement = collapse.compute()["nc4_agreement"]
    assert agreement == reference(x, y, weight, bias)["nc4_agreement"]
    assert 0.2 < agreement < 0.99  # features that overlap, or the shortcut would decide everything


def test_the_bias_counts_in_agreement():
    x, y, weight, _ = make(0.3)
    loud = torch.zeros(K, dtype=torch.float64)
    loud[3] = 1e6
    share = (y == 3).double().mean().item()
    assert measure(x, y, weight, loud)["nc4_agreement"] == pytest.approx(share)


def test_a_prediction_without_a_class_mean_never_agrees():
    x, y, _, _ = make(0.01)
    keep = y != 0
    collapse = NeuralCollapse(K, D)
    collapse.update(x[keep], y[keep])
    collapse.update_agreement(x, predictions=torch.where(y == 0, 0, y))
    assert collapse.compute()["nc4_agreement"] == pytest.approx(keep.double().mean().item())


# ---------------------------------------------------------------------------------------------------------- errors


def test_errors_name_the_fix():
    collapse = NeuralCollapse(3, 4)
    x = torch.randn(5, 4)
    y = torch.tensor([0, 1, 2, 0, 1])
    with pytest.raises(ValueError, match="2 classes and 1 dimension"):
        NeuralCollapse(1, 4)
    with pytest.raises(ValueError, match=r"shape \(batch, 4\)"):
        collapse.update(torch.randn(5, 3), y)
    with pytest.raises(ValueError, match="labels of shape"):
        collapse.update(x, y[:4])
    with pytest.raises(ValueError, match=r"0\.\.2, got 0 to 3"):
        collapse.update(x, torch.tensor([0, 1, 2, 3, 0]))
    with pytest.raises(ValueError, match="class numbers"):
        collapse.update(x, y.float())
    with pytest.raises(ValueError, match="not finite"):
        collapse.update(x / 0, y)
    with pytest.raises(ValueError, match="at least two classes"):
        collapse.compute()
    with pytest.raises(ValueError, match="at least two classes"):
        collapse.update_agreement(x, torch.randn(3, 4))
    collapse.update(x, y)
    with pytest.raises(ValueError, match="Choose one of balanced, weighted"):
        collapse.compute(global_mean="median")
    with pytest.raises(ValueError, match="Behind a neck"):
        collapse.compute(torch.randn(3, 6))
    with pytest.raises(ValueError, match="bias of shape"):
        collapse.compute(torch.randn(3, 4), torch.randn(4))
    with pytest.raises(ValueError, match="either the head's weight"):
        collapse.update_agreement(x)
    with pytest.raises(ValueError, match="predictions of shape"):
        collapse.update_agreement(x, predictions=y[:2])
    with pytest.raises(ValueError, match="Cannot sum over processes with str"):
        collapse.reduce("all")
    collapse.reduce()
    with pytest.raises(ValueError, match="reset"):
        collapse.update(x, y)
    collapse.reset()
    collapse.update(x[:0], y[:0])
    assert collapse.counts.sum() == 0
