"""Logistic regression against scikit-learn's, converged."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from etf_zoo.errors import EtfZooError
from etf_zoo.trainer.tune import logistic
from etf_zoo.trainer.tune.logistic import fit_logistic, principal_axes, rough_path


def made(kind):
    """Centered features `(N, d)` and labels of four classes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 4
    noise = {"separable": 0.3, "wide": 1.0}.get(kind, 2.0)
    x = F.one_hot(labels, 6).double() * 3 + noise * torch.randn(120, 6, generator=generator, dtype=torch.float64)
    if kind == "collinear":  # twelve columns of rank six, of scales four orders of magnitude apart
        x = torch.cat([x, 3 * x[:, :3] - x[:, 3:], 0.01 * x[:, :3]], 1) * torch.logspace(-2, 2, 12)
    if kind == "wide":  # more columns than rows
        x = torch.cat([x, torch.randn(120, 300, generator=generator, dtype=torch.float64)], 1)
    return x - x.mean(0), labels


@pytest.mark.parametrize("kind", ["overlapping", "separable", "collinear", "wide"])
@pytest.mark.parametrize("strength", [1e-3, 1.0, 100.0])
def test_agrees_with_scikit_learn(kind, strength):
    x, labels = made(kind)
    peer = LogisticRegression(C=strength, tol=1e-8, max_iter=100_000).fit(x.numpy(), labels.numpy())
    axes = principal_axes(x)
    fitted = fit_logistic(x @ axes, labels, 4, strength)
    probabilities = (x @ axes @ fitted.weight.T + fitted.bias).softmax(1).numpy()
    np.testing.assert_allclose(probabilities, peer.predict_proba(x.numpy()), atol=1e-4)
    np.testing.assert_allclose(fitted.weight @ axes.T, peer.coef_, atol=1e-4 * max(1, np.abs(peer.coef_).max()))
    assert fitted.gradient_norm <= 1e-6


def test_the_gradient_is_that_of_the_objective():
    x, labels = made("overlapping")
    weight, bias = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    weight.requires_grad_()
    bias.requires_grad_()
    loss = F.cross_entropy(x @ weight.T + bias, labels) + weight.square().sum() / (2 * 0.7 * len(x))
    loss.backward()
    point = torch.cat([weight, bias[:, None]], 1).detach()
    problem = logistic._Problem(x, labels)
    problem.set_strength(0.7)
    ours, gradient = problem.loss_and_gradient(point, torch.float64)
    assert ours == pytest.approx(loss.item())
    torch.testing.assert_close(gradient, torch.cat([weight.grad, bias.grad[:, None]], 1))


def test_a_start_changes_the_way_and_not_the_end():
    x, labels = made("overlapping")
    cold = fit_logistic(x, labels, 4, 1.0)
    start = torch.randn(4, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    warm = fit_logistic(x, labels, 4, 1.0, start=start)
    torch.testing.assert_close(warm.weight, cold.weight, atol=1e-4, rtol=0)
    torch.testing.assert_close(warm.bias, cold.bias, atol=1e-4, rtol=0)
    again = fit_logistic(x, labels, 4, 1.0)
    assert torch.equal(again.weight, cold.weight)


@pytest.mark.parametrize("kind", ["overlapping", "separable", "wide"])
def test_a_rough_path_is_near(kind):
    """Above the minimum by little of it, and not below it."""
    x, labels = made(kind)
    x = x @ principal_axes(x)
    strengths = [1e-3, 1e-1, 1.0, 100.0]
    problem = logistic._Problem(x, labels)
    for strength, rough in zip(strengths, rough_path(x, labels, 4, strengths), strict=True):
        fine = fit_logistic(x, labels, 4, strength)
        problem.set_strength(strength)
        ends = rough, torch.cat([fine.weight, fine.bias[:, None]], 1)
        losses = [problem.loss_and_gradient(point, torch.float64)[0] for point in ends]
        assert -1e-9 < losses[0] / losses[1] - 1 < 5e-3


@pytest.mark.parametrize(("rows", "columns"), [(50, 8), (8, 50)])
def test_principal_axes(rows, columns):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x -= x.mean(0)
    axes = principal_axes(x)
    assert axes.shape == (columns, min(columns, rows - (rows < columns)))
    torch.testing.assert_close(axes.T @ axes, torch.eye(axes.shape[1], dtype=torch.float64))
    torch.testing.assert_close(x @ axes @ axes.T, x)
    gram = (x @ axes).T @ (x @ axes)
    torch.testing.assert_close(gram, gram.diag().diag(), atol=1e-8, rtol=0)


def test_refuses_what_has_not_converged(monkeypatch):
    x, labels = made("overlapping")
    monkeypatch.setattr(logistic, "STEPS", 2)
    with pytest.raises(EtfZooError, match=r"did not converge: after .* Take a smaller strength"):
        fit_logistic(x, labels, 4, 1.0)
