"""Agreement with the `neural_collapse` package (Wu & Papyan) on the definitions both have.

It is in no package index, so no extra can name it; tried with commit c05a0b8 of rhubarbwu/neural-collapse on GitHub.
"""

import pytest
import torch

from etf_zoo.metrics import NeuralCollapse

pytest.importorskip("neural_collapse", reason="rhubarbwu/neural-collapse is not installed")

from neural_collapse import accumulate
from neural_collapse import measure as peer


@pytest.mark.parametrize("sd", [1.0, 1e-2])
def test_agrees_on_shared_definitions(sd):
    k, d, n = 9, 30, 500
    g = torch.Generator().manual_seed(0)
    y = torch.cat([torch.arange(k).repeat(2), torch.randint(0, k, (n - 2 * k,), generator=g)])
    x = (torch.randn(k, d, generator=g) + 1)[y].double() + sd * torch.randn(n, d, generator=g).double()
    weight = torch.randn(k, d, generator=g).double()

    settings = {"device": "cpu", "dtype": torch.float64}
    sums = accumulate.MeanAccumulator(k, d, **settings)
    sums.accumulate(x, y)
    means, center = sums.compute()
    within = accumulate.CovarAccumulator(k, d, M=means, **settings)
    norms = accumulate.VarNormAccumulator(k, d, M=means, **settings)
    decisions = accumulate.DecAccumulator(k, d, M=means, W=weight, **settings)
    within.accumulate(x, y, means)
    norms.accumulate(x, y, means)
    decisions.accumulate(x, y, weight, means)
    covariance = within.compute()

    collapse = NeuralCollapse(k, d)
    for a, b in zip(x.split(64), y.split(64), strict=True):
        collapse.update(a, b)
    collapse.update_agreement(x, weight)
    figures = collapse.compute(weight)

    exact = {
        "nc1_pinv": peer.covariance_ratio(covariance, means, center),
        "nc1_quotient": peer.covariance_ratio(covariance, means, center, "quotient"),
        "nc2_etf_distance": peer.simplex_etf_error(means, center),
        "nc3_etf_distance": peer.self_duality_error(weight, means, center),
        "nc3_cosine": peer.similarities(weight, means, center, cos=True).mean().item(),
        "nc4_agreement": peer.clf_ncc_agreement(decisions),
    }
    assert {name: figures[name] for name in exact} == pytest.approx(exact, rel=1e-10)
    # its grid of pairs is float32 whatever it is given
    assert figures["nc1_cdnv"] == pytest.approx(peer.variability_cdnv(norms.compute()[0], means), rel=1e-5)
    lengths = peer.mean_norms(means, center)
    assert figures["nc2_equinorm"] == pytest.approx((lengths.std(correction=0) / lengths.mean()).item(), rel=1e-10)
