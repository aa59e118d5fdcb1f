"""Logit adjustment: the numbers, and that cross-entropy with it is blind to how frequent a class is."""

import math

import pytest
import torch
from torch.nn import functional as F

from etf_zoo.errors import EtfZooError
from etf_zoo.losses import logit_adjustment


def test_is_tau_times_the_log_of_the_share():
    found = logit_adjustment([6, 3, 1], 0.5).tolist()
    assert found == pytest.approx([0.5 * math.log(n / 10) for n in (6, 3, 1)])
    assert not logit_adjustment([6, 3, 1], 0).any()


def test_best_logits_of_one_feature_are_the_balanced_ones():
    # x is seen with labels in the shares 0.9 and 0.1 because the classes have these shares: it says nothing
    counts, logits = torch.tensor([90.0, 10.0]), torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], line_search_fn="strong_wolfe")

    def step():
        optimizer.zero_grad()
        value = F.cross_entropy((logits + logit_adjustment(counts))[None], (counts / 100).double()[None])
        value.backward()
        return value

    optimizer.step(step)
    assert torch.allclose(logits[0], logits[1], atol=1e-6)


def test_errors():
    with pytest.raises(EtfZooError, match="positive count"):
        logit_adjustment([3, 0])
    with pytest.raises(EtfZooError, match="positive count"):
        logit_adjustment([])
    with pytest.raises(EtfZooError, match="tau"):
        logit_adjustment([3, 1], -1)
