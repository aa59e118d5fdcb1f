"""Scores and figures of unfamiliar images are those of `pytorch-ood`, a library of the field."""

import pytest
import torch

from etf_zoo import ood
from training.experiments.later_ood import compared

pytestmark = pytest.mark.ecosystem


def test_auroc_and_fpr_are_the_same():
    metrics = pytest.importorskip("pytorch_ood.metrics")
    generator = torch.Generator().manual_seed(0)
    known, unknown = torch.randn(400, generator=generator) + 1, torch.randn(300, generator=generator)
    theirs = metrics.OODMetrics()  # its positives have negative labels: here the familiar images
    theirs.update(torch.cat([known, unknown]), torch.tensor([-1] * 400 + [0] * 300))
    found = theirs.compute()
    assert compared(known, unknown) == pytest.approx(
        {"auroc": 100 * found["AUROC"], "fpr95": 100 * found["FPR95TPR"]}, abs=0.01
    )


def test_energy_and_largest_logit_are_the_same():
    detectors = pytest.importorskip("pytorch_ood.detector")
    logits = 5 * torch.randn(20, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ood.energy(logits, 2.0), -detectors.EnergyBased.score(logits, t=2.0))
    torch.testing.assert_close(ood.familiarity(logits), -detectors.MaxLogit.score(logits))
