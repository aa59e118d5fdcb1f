"""The moving frame: an ETF after every update, driven by observe alone, the same on every process."""

import copy
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F

from etf_zoo.frames import frame_report, nearest_simplex_etf, simplex_etf
from etf_zoo.layers.classifier import FrameClassifier
from etf_zoo.layers.moving import MovingFrameClassifier, copy_moving_frames


def make_head(num_classes=5, dim=8, **kwargs):
    return MovingFrameClassifier(dim, num_classes, **kwargs)


def batch(seed, rows=12, num_classes=5, dim=8):
    generator = torch.Generator().manual_seed(seed)
    x = F.normalize(torch.randn(rows, dim, generator=generator), dim=1)
    return x, torch.randint(0, num_classes, (rows,), generator=generator)


def is_etf(frame):
    return frame_report(frame).equiangularity_error < 1e-5 and (frame.norm(dim=1) - 1).abs().max() < 1e-5


def test_matches_a_plain_loop():
    head = make_head(momentum=0.7, update_every=2, delta=1e-2)
    means, frame = {}, head.weight.clone()
    for step in range(1, 7):
        x, labels = batch(step)
        moved = head.observe(x, labels)
        for k in range(5):
            rows = [x[i] for i in range(len(x)) if labels[i] == k]
            if rows:
                mean = sum(rows) / len(rows)
                means[k] = 0.7 * means[k] + 0.3 * mean if k in means else mean
        assert moved == (step % 2 == 0)
        if moved:
            center = sum(means.values()) / len(means)
            centered = torch.stack([means[k] - center if k in means else torch.zeros(8) for k in range(5)])
            frame = nearest_simplex_etf(centered, previous=frame, delta=1e-2)
        assert torch.allclose(head.weight, frame, atol=1e-4)
    assert torch.allclose(head.class_means, torch.stack([means[k] for k in range(5)]), atol=1e-6)


def test_a_class_not_seen_yet_lies_at_the_mean_of_the_others():
    """Not at the origin, from which all seen means may lie in one direction: its prototype would be opposite to it."""
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(30, 8, generator=generator) + 2, torch.randint(4, (30,), generator=generator)
    head = make_head()
    for _ in range(5):
        head.observe(x, labels)
    center = torch.stack([x[labels == k].mean(0) for k in range(4)]).mean(0)
    assert abs(torch.cosine_similarity(head.weight[4], center, dim=0)) < 0.5


@pytest.mark.parametrize("seed", range(3))
def test_is_an_etf_after_every_update(seed):
    head = make_head(seed=seed)
    for step in range(8):
        head.observe(*batch(100 * seed + step, rows=3))  # classes missing, at first most of them
        assert is_etf(head.weight)


def test_converges_to_a_fixed_etf_of_the_means():
    target = simplex_etf(5, 8, orientation="random", seed=9)
    head = make_head(momentum=0.5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        labels = torch.arange(5).repeat(4)
        noise = 0.02 * torch.randn(20, 8, generator=generator)
        head.observe(0.3 + target[labels] + noise, labels)  # an offset common to all classes
    assert torch.allclose(head.weight, target, atol=0.05)
    for _ in range(30):
        head.observe(2 * target, torch.arange(5))
    assert torch.allclose(head.weight, target, atol=1e-4)


def test_proximal_term_holds_what_the_means_leave_open():
    head = make_head()
    before = head.weight.clone()
    head.observe(before[:2], torch.tensor([0, 1]))  # two classes, where the frame has them already
    assert torch.allclose(head.weight, before, atol=1e-4)


def test_equal_means_leave_the_frame():
    head = make_head()
    before = head.weight.clone()
    head.observe(torch.ones(5, 8), torch.arange(5))
    assert torch.allclose(head.weight, before, atol=1e-5)
    head.observe(torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64))
    assert torch.allclose(head.weight, before, atol=1e-5)


def test_forward_moves_nothing_and_depends_on_no_batch():
    head = make_head()
    for step in range(3):
        head.observe(*batch(step))
    state = copy.deepcopy(head.state_dict())
    x = torch.randn(6, 8)
    for training in (True, False):
        head.train(training)
        alone = torch.cat([head(row[None]) for row in x])
        assert torch.allclose(head(x), alone, atol=1e-5)
    assert all(torch.equal(state[key], value) for key, value in head.state_dict().items())


def test_no_gradient_flows_into_observe():
    head = make_head()
    x = torch.randn(6, 8, requires_grad=True)
    for _ in range(2):
        head.observe(head.embed(x), torch.arange(5).repeat(2)[:6])
    for name, buffer in head.named_buffers():
        assert (buffer.requires_grad, buffer.grad_fn) == (False, None), name  # what it keeps holds no graph
    assert not list(head.parameters())
    head(x).square().sum().backward()
    (expected,) = torch.autograd.grad((head.logit_scale * F.normalize(x, dim=1) @ head.weight.T).square().sum(), x)
    assert torch.allclose(x.grad, expected, atol=1e-5)  # the frame is a constant for the gradient


@pytest.mark.parametrize("update_every", [1, 3])
def test_resumes_exactly_from_a_checkpoint(tmp_path, update_every):
    head = make_head(update_every=update_every)
    for step in range(4):
        head.observe(*batch(step, rows=4))
    torch.save(head.state_dict(), tmp_path / "head.pt")
    other = make_head(update_every=update_every, seed=7)
    other.load_state_dict(torch.load(tmp_path / "head.pt", weights_only=True))
    for step in range(4, 9):
        assert head.observe(*batch(step, rows=4)) == other.observe(*batch(step, rows=4))
    for key, value in head.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_plain_head_loads_what_the_moving_one_found():
    head = make_head()
    head.observe(*batch(0, rows=40))
    plain = FrameClassifier(8, 5)
    plain.load_state_dict({key: head.state_dict()[key] for key in plain.state_dict()})
    x = torch.randn(3, 8)
    assert torch.equal(plain(x), head(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    head = make_head().to(dtype)
    assert head.class_means.dtype == torch.float32
    x, labels = batch(0, rows=20)
    head.observe((300 * x).to(dtype), labels)
    assert is_etf(head.weight)


class WithoutFloat64(torch.Tensor):
    """What a device without float64 (MPS) does: refuses it before the tensor is on the CPU."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        if func is torch.Tensor.cpu:
            return out.as_subclass(torch.Tensor)
        if isinstance(out, cls) and out.dtype == torch.float64:
            raise TypeError("Cannot convert a tensor of this device to float64.")
        return out


def test_devices_without_float64():
    head, reference = make_head(), make_head()
    for name in ("weight", "class_means"):
        setattr(head, name, getattr(head, name).as_subclass(WithoutFloat64))
    with pytest.raises(TypeError, match="float64"):
        head.class_means.double()
    for one in (head, reference):
        one.observe(*batch(0))
    assert torch.equal(head.weight.as_subclass(torch.Tensor), reference.weight)


def test_a_neck_decides_the_width():
    head = MovingFrameClassifier(4, 9, neck="residual")
    x = torch.randn(16, 4)
    head.observe(head.embed(x), torch.arange(16) % 9)
    assert is_etf(head.weight)


def test_weight_average_keeps_an_etf_by_copying():
    model = nn.Sequential(nn.Linear(8, 8), make_head(momentum=0.0))
    ema = ModelEmaV3(model, decay=0.6)
    for step in range(3):
        model[1].observe(*batch(step, rows=40))
        ema.update(model)
    assert not is_etf(ema.module[1].weight)  # what happens without
    assert copy_moving_frames(ema, model) == 1
    assert torch.equal(ema.module[1].weight, model[1].weight)
    assert torch.equal(ema.module[1].class_means, model[1].class_means)
    head = make_head(logit_scale="learnable")
    bare = ModelEmaV3(head)  # holds the head itself as its module
    head.observe(*batch(9))
    assert copy_moving_frames(bare, head) == 1
    assert torch.equal(bare.module.weight, head.weight)
    with pytest.raises(ValueError, match="different moving heads"):
        copy_moving_frames(nn.Linear(2, 2), model)


def test_errors():
    with pytest.raises(ValueError, match="needs at least 9 dimensions"):
        make_head(10, 8)
    for kwargs, message in [
        ({"momentum": 1.0}, "momentum"),
        ({"update_every": 0}, "update_every"),
        ({"delta": 0}, "delta"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_head(**kwargs)
    head = make_head()
    state = copy.deepcopy(head.state_dict())
    with pytest.raises(ValueError, match=r"embeddings \(B, 8\)"):
        head.observe(torch.randn(3, 7), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[0, 5\)"):
        head.observe(torch.randn(3, 8), torch.tensor([0, 1, 5]))
    with pytest.raises(ValueError, match="not finite"):
        head.observe(torch.full((3, 8), torch.nan), torch.tensor([0, 1, 2]))
    assert all(torch.equal(state[key], value) for key, value in head.state_dict().items())


PROGRAM = """
    import sys
    import torch
    import torch.distributed as dist
    from etf_zoo.layers.moving import MovingFrameClassifier

    rank, folder = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    head = MovingFrameClassifier(8, 5, seed=0)
    batches = torch.load(f"{folder}/batches.pt", weights_only=True)
    for x, labels in batches:
        half = slice(0, 3) if rank == 0 else slice(3, None)  # shares of unequal size
        head.observe(x[half], labels[half])
    torch.save(head.state_dict(), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()
"""


def test_two_processes_are_as_one(tmp_path):
    batches = [batch(seed) for seed in range(4)]
    torch.save(batches, tmp_path / "batches.pt")
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen([sys.executable, tmp_path / "program.py", str(rank), tmp_path], env=env) for rank in range(2)
    ]
    assert [run.wait(timeout=300) for run in runs] == [0, 0]
    head = make_head(seed=0)
    for x, labels in batches:
        head.observe(x, labels)
    states = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for key, value in head.state_dict().items():
        assert torch.equal(states[0][key], states[1][key]), key
        assert torch.allclose(states[0][key].double(), value.double(), atol=1e-4), key


@pytest.mark.slow
def test_a_thousand_classes():
    head = MovingFrameClassifier(2048, 1000)
    x = F.normalize(torch.randn(1500, 2048, generator=torch.Generator().manual_seed(0)), dim=1)
    head.observe(x, torch.arange(1500) % 1000)
    assert is_etf(head.weight)


def test_reset_parameters_forgets_the_means():
    head = MovingFrameClassifier(8, 5)
    start = copy.deepcopy(head.state_dict())
    head.observe(torch.randn(20, 8), torch.arange(20) % 5)
    assert not torch.equal(head.weight, start["weight"])
    head(torch.randn(3, 8))  # a moved frame is a frame
    head.reset_parameters()
    assert all(torch.equal(value, start[key]) for key, value in head.state_dict().items())
