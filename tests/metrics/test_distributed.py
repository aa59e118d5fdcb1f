"""Statistics over two real processes (gloo): the same as in one, to rounding, and the same on both to the last bit."""

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing as mp

from etf_zoo.metrics import MistakeSeverity, NeuralCollapse, sum_over_processes
from etf_zoo.metrics.segmentation import SegmentationScores

K, D, N = 6, 20, 301


def data():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, K, (N,), generator=g)
    labels[:80] = 5  # class 5 is seen by the first process alone
    labels[80:] %= 5
    features = 2 + torch.randn(K, D, generator=g)[labels].double() + 1e-5 * torch.randn(N, D, generator=g).double()
    weight = torch.randn(K, D, generator=g).double()
    return features, labels, weight


def measured(rows, group=None):
    x, y, weight = data()
    x, y = x[rows], y[rows]
    distances = 2 - (torch.arange(K)[:, None] % 2 == torch.arange(K) % 2).float()
    distances.fill_diagonal_(0)
    collapse, severity, pixels = NeuralCollapse(K, D), MistakeSeverity(distances), SegmentationScores(K)
    for a, b in zip(x.split(32), y.split(32), strict=True):
        collapse.update(a, b)
        severity.update(a @ weight.T, b)
        pixels.update((a @ weight.T).argmax(1), b)
    collapse.reduce(group)
    for a in x.split(50):
        collapse.update_agreement(a, weight)
    collapse.reduce(group)
    collapse.reduce(group)  # once too often does no harm
    severity.reduce(group)
    pixels.reduce(group)
    return collapse.compute(weight) | severity.compute() | pixels.compute()


SPLITS = (110, N)  # unequal shares with a class that one process never sees; a process without any sample


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        for split in SPLITS:
            rows = slice(0, split) if rank == 0 else slice(split, N)
            torch.save(measured(rows, dist.group.WORLD if rank else None), f"{folder}/{rank}-{split}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_measure_what_one_does(tmp_path):
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    alone = measured(slice(None))
    rank = alone.pop("effective_rank")
    for split in SPLITS:
        first, second = (torch.load(tmp_path / f"{process}-{split}.pt") for process in range(2))
        assert first == second
        assert first.pop("effective_rank") == pytest.approx(rank, rel=1e-8)
        assert first == pytest.approx(alone, rel=1e-10, abs=1e-13)


class FakeAccelerator:
    """Two processes with the same data, by the methods of accelerate that are used."""

    device = torch.device("cpu")

    def __init__(self, num_processes):
        self.num_processes = num_processes

    def reduce(self, tensor, reduction):
        assert reduction == "sum"
        return tensor * self.num_processes


def test_an_accelerator_sums():
    x = torch.tensor([1.0, 2.0])
    assert sum_over_processes(x, FakeAccelerator(2)).tolist() == [2, 4]
    assert sum_over_processes(x, FakeAccelerator(1)) is x
    assert sum_over_processes(x) is x
    with pytest.raises(ValueError, match="Pass accelerate's Accelerator"):
        sum_over_processes(x, object())


def test_the_same_data_twice_changes_nothing_but_the_number_of_samples():
    x, y, weight = data()
    once, twice = NeuralCollapse(K, D), NeuralCollapse(K, D)
    once.update(x, y)
    twice.update(x, y)
    twice.reduce(FakeAccelerator(2))
    a, b = once.compute(weight), twice.compute(weight)
    assert b.pop("samples") == 2 * a.pop("samples")
    assert b == pytest.approx(a, rel=1e-10)
