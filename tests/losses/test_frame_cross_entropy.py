import math
import subprocess
import sys

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing as mp
from torch import nn
from torch.nn import functional as F

import etf_zoo.layers.classifier
import etf_zoo.layers.implicit
from etf_zoo import FrameClassifier
from etf_zoo.errors import EtfZooError
from etf_zoo.frames import kerdock_frame
from etf_zoo.layers.cosine import learn_prototypes
from etf_zoo.losses import FrameCrossEntropy


@pytest.fixture
def never_stored(monkeypatch):
    """Kerdock frames are computed for few classes too."""
    monkeypatch.setattr(etf_zoo.layers.classifier, "KERDOCK_MATRIX_CLASSES", 1)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that there are many: one basis, or seven rows."""
    original = etf_zoo.layers.implicit.frame_blocks
    monkeypatch.setattr(
        "etf_zoo.losses.frame_cross_entropy.frame_blocks", lambda *args: original(*args, block_logits=7 * len(args[0]))
    )


def data(batch, dim, classes, *, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(classes, (batch,), generator=generator)
    labels[:4] = torch.tensor([0, classes - 1, classes // 2, 1])
    return x, labels


def dense_loss(head, frame, x, labels, *, label_smoothing=0.0, angular=0.0, cosine=0.0):
    """The definition, with all logits."""
    embeddings = head.embed(x)
    cosines = embeddings @ frame.to(embeddings.dtype).T
    own = cosines.gather(1, labels[:, None])
    if angular or cosine:
        angle = torch.acos(own.clamp(-1 + 1e-7, 1 - 1e-7))
        turned = torch.where(angle + angular < math.pi, torch.cos(angle + angular), own - angular * math.sin(angular))
        cosines = cosines.scatter(1, labels[:, None], turned - cosine)
    return F.cross_entropy(head.logit_scale * cosines, labels, label_smoothing=label_smoothing)


SIZES = [(16, 288), (16, 100), (16, 40), (16, 33), (16, 270), (64, 4224), (64, 300), (100, 500)]


@pytest.mark.usefixtures("never_stored")
@pytest.mark.parametrize(("dim", "classes"), SIZES)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"angular": 0.3}, {"angular": 0.5, "cosine": 0.2}])
@pytest.mark.parametrize("blocks", [7, 10**6])
def test_equals_the_dense_head(dim, classes, options, blocks, request):
    if blocks == 7:
        request.getfixturevalue("small_blocks")
    head, frame = FrameClassifier(dim, classes, frame="kerdock", seed=3), kerdock_frame(classes, dim, seed=3)
    assert head.weight.shape == (classes, 0)
    x, labels = data(12, dim, classes)
    kwargs = {"angular": "angular_margin", "cosine": "cosine_margin", "label_smoothing": "label_smoothing"}
    loss = FrameCrossEntropy(head, **{kwargs[key]: value for key, value in options.items()})(x, labels)
    exact, y = dense_loss(head, frame, (y := x.detach().double().requires_grad_()), labels, **options), None
    torch.testing.assert_close(loss.double(), exact, atol=1e-6, rtol=2e-6)
    y = x.detach().double().requires_grad_()
    dense_loss(head, frame, y, labels, **options).backward()
    loss.backward()
    torch.testing.assert_close(x.grad.double(), y.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("frame", ["random", "code", "simplex"])
def test_stored_frames_too(frame, small_blocks):
    head = FrameClassifier(64, 50, frame=frame)
    x, labels = data(12, 64, 50)
    loss = FrameCrossEntropy(head, label_smoothing=0.1)(x, labels)
    torch.testing.assert_close(loss, F.cross_entropy(head(x), labels, label_smoothing=0.1))
    own, dense = (
        torch.autograd.grad(value, x)[0] for value in (loss, F.cross_entropy(head(x), labels, label_smoothing=0.1))
    )
    torch.testing.assert_close(own, dense, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize(("scale", "spread"), [(79.0, 1e-3), (100.0, 1.0)])
def test_stored_rows_near_the_feature_overflow_nothing(scale, spread):
    """exp(79) fits float32, and 20,000 of them do not; neither does exp(100)."""
    generator = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.ones(20_000, 8) + spread * torch.randn(20_000, 8, generator=generator))
    head = FrameClassifier(8, 20_000, frame=rows, logit_scale=scale)
    x, labels = rows[:6].clone(), torch.arange(6) + 7
    torch.testing.assert_close(FrameCrossEntropy(head)(x, labels), F.cross_entropy(head(x), labels))


@pytest.mark.usefixtures("never_stored")
def test_smoothing_with_a_margin():
    head, frame = FrameClassifier(16, 100, frame="kerdock"), kerdock_frame(100, 16)
    x, labels = data(12, 16, 100)
    own = FrameCrossEntropy(head, label_smoothing=0.3, angular_margin=0.4, cosine_margin=0.1)(x, labels)
    expected = dense_loss(head, frame, x, labels, label_smoothing=0.3, angular=0.4, cosine=0.1)
    torch.testing.assert_close(own, expected)
    gradients = [torch.autograd.grad(value, x)[0] for value in (own, expected)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


@pytest.mark.usefixtures("never_stored")
@pytest.mark.parametrize("scale", [1.0, 79.0, 300.0, 5000.0])
def test_long_features_overflow_nothing(scale, small_blocks):
    """Raw features and large scales: exponents far beyond float32's range, and losses of thousands and of 0."""
    head = FrameClassifier(16, 288, frame="kerdock", feature_norm="none", logit_scale=scale)
    frame = kerdock_frame(288, 16)
    x, labels = data(12, 16, 288)
    with torch.no_grad():
        x[5:9] = frame[labels[5:9]]  # right on their prototypes
        x[9] = 0
    y = x.detach().double().requires_grad_()
    loss, exact = FrameCrossEntropy(head)(x, labels), dense_loss(head, frame, y, labels)
    torch.testing.assert_close(loss.double(), exact, atol=1e-6, rtol=2e-6)
    loss.backward()
    exact.backward()
    assert torch.isfinite(x.grad).all()
    torch.testing.assert_close(x.grad.double(), y.grad, atol=1e-5 * scale, rtol=1e-3)


@pytest.mark.usefixtures("never_stored")
@pytest.mark.parametrize("scale", [79.0, 95.0])
def test_a_wrong_class_wins_by_a_long_feature(scale):
    head = FrameClassifier(16, 288, frame="kerdock", logit_scale=scale)
    frame, labels = kerdock_frame(288, 16), torch.arange(10)
    torch.testing.assert_close(
        FrameCrossEntropy(head)(frame[1:11], labels), dense_loss(head, frame, frame[1:11], labels)
    )


@pytest.mark.usefixtures("never_stored")
def test_a_confident_loss_keeps_its_digits():
    """Where the label has all the probability, the loss is the others' share: no difference of large numbers."""
    head = FrameClassifier(16, 288, frame="kerdock", logit_scale=40.0)
    labels = torch.arange(0, 288, 24)
    x = kerdock_frame(288, 16)[labels].requires_grad_()
    loss = FrameCrossEntropy(head)(x, labels)
    exact = dense_loss(head, kerdock_frame(288, 16), x.detach().double(), labels)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)
    assert exact < 1e-10


@pytest.mark.usefixtures("never_stored")
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"angular_margin": 0.3, "cosine_margin": 0.1}])
@pytest.mark.parametrize("scale", [8.0, 120.0])
def test_gradcheck(options, scale):
    head = FrameClassifier(16, 250, frame="kerdock", logit_scale=scale)
    x, labels = data(5, 16, 250, dtype=torch.float64)
    loss = FrameCrossEntropy(head, **options)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), x)


@pytest.mark.usefixtures("never_stored")
def test_a_learnable_scale_learns():
    head, dense = (FrameClassifier(16, 288, frame="kerdock", logit_scale="learnable") for _ in range(2))
    x, labels = data(12, 16, 288)
    FrameCrossEntropy(head)(x, labels).backward()
    F.cross_entropy(dense(x), labels).backward()
    torch.testing.assert_close(head.logit_scale.grad, dense.logit_scale.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.usefixtures("never_stored")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    head = FrameClassifier(64, 4224, frame="kerdock").to(dtype)
    x, labels = data(12, 64, 4224, dtype=dtype)
    loss = FrameCrossEntropy(head)(x, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert x.grad.dtype == dtype
    exact = dense_loss(head, kerdock_frame(4224, 64), x.detach().double(), labels)
    torch.testing.assert_close(loss.double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("never_stored")
def test_autocast_leaves_the_loss_in_float32():
    head = FrameClassifier(64, 4224, frame="kerdock", neck="mlp")
    x, labels = data(12, 64, 4224)
    loss = FrameCrossEntropy(head.eval())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lossy, embeddings, logits = loss(x, labels), head.embed(x), head(x)
    assert lossy.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(lossy, loss.from_embeddings(embeddings, labels)[0].mean())
    torch.testing.assert_close(lossy, F.cross_entropy(logits, labels))


@pytest.mark.usefixtures("never_stored")
def test_compiled():
    head = FrameClassifier(16, 288, frame="kerdock")
    loss = FrameCrossEntropy(head, label_smoothing=0.1, angular_margin=0.2)
    x, labels = data(12, 16, 288)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected, found = loss(x, labels), compiled(x, labels)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in (found, expected)))


@pytest.mark.usefixtures("never_stored")
def test_each_sample_and_whether_it_is_right(small_blocks):
    head, frame = FrameClassifier(16, 288, frame="kerdock"), kerdock_frame(288, 16)
    x, labels = data(12, 16, 288)
    with torch.no_grad():
        x[6:] = frame[labels[6:]] + 0.1 * x[6:]
    each, right = FrameCrossEntropy(head).from_embeddings(head.embed(x), labels)
    torch.testing.assert_close(each, F.cross_entropy(head(x), labels, reduction="none"), atol=1e-5, rtol=1e-5)
    assert torch.equal(right, head(x).argmax(dim=1) == labels)
    assert right[6:].all()
    with torch.no_grad():
        assert not FrameCrossEntropy(head)(x, labels).requires_grad


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        model, x, labels = distributed_model()
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped(x[rank::2], labels[rank::2]).backward()
        torch.save([p.grad for p in model.parameters()], f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


class Net(nn.Module):
    """A backbone and a head of 6,000 classes, whose forward is the loss."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(20, 256)
        self.loss = FrameCrossEntropy(FrameClassifier(256, 6000, frame="kerdock"))

    def forward(self, x, labels):
        return self.loss(self.backbone(x), labels)


def distributed_model():
    torch.manual_seed(0)
    x, labels = data(16, 20, 6000)
    return Net(), x.detach(), labels


def test_two_processes_exchange_no_classes(tmp_path):
    """All that DDP can send is parameters, and the head has none; the gradient is that of one process."""
    model, x, labels = distributed_model()
    assert not list(model.loss.parameters())
    assert sum(b.numel() * b.element_size() for b in model.loss.head.buffers()) < 256**2 / 16 + 10
    model(x, labels).backward()
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        for ours, theirs in zip(model.parameters(), torch.load(tmp_path / f"{rank}.pt"), strict=True):
            torch.testing.assert_close(ours.grad, theirs)


def test_errors():
    head = FrameClassifier(16, 288, frame="kerdock")
    loss = FrameCrossEntropy(head)
    with pytest.raises(EtfZooError, match="takes a FrameClassifier, got Linear"):
        FrameCrossEntropy(nn.Linear(4, 4))
    with pytest.raises(EtfZooError, match="converted classifier"):
        FrameCrossEntropy(FrameClassifier(8, 5000, frame="helmert", neck="linear", feature_norm="none"))
    with pytest.raises(EtfZooError, match=r"label_smoothing lies in \[0, 1\)"):
        FrameCrossEntropy(head, label_smoothing=1.0)
    with pytest.raises(EtfZooError, match="angular_margin lies in"):
        FrameCrossEntropy(head, angular_margin=2.0)
    with pytest.raises(EtfZooError, match="feature_norm='l2'"):
        FrameCrossEntropy(FrameClassifier(16, 288, frame="kerdock", feature_norm="none"), cosine_margin=0.1)
    with pytest.raises(EtfZooError, match=r"Expected embeddings \(B, 16\)"):
        loss.from_embeddings(torch.zeros(3, 8), torch.zeros(3).long())
    with pytest.raises(EtfZooError, match="Labels are rows of the frame, 0 to 287"):
        loss(torch.zeros(3, 16), torch.tensor([0, 1, 288]))
    with pytest.raises(EtfZooError, match="does not take soft labels"):
        loss(torch.zeros(3, 16), torch.zeros(3, 288))
    with pytest.raises(EtfZooError, match="batch is empty"):
        loss(torch.zeros(0, 16), torch.zeros(0).long())
    roomy = FrameCrossEntropy(FrameClassifier(16, 5, reserve=4))
    with pytest.raises(EtfZooError, match="Labels are rows of the frame, 0 to 4"):  # no class is there yet
        roomy(torch.zeros(2, 16), torch.tensor([0, 6]))
    learned = FrameCrossEntropy(learn_prototypes(FrameClassifier(16, 5)))
    with pytest.raises(EtfZooError, match="prototypes no gradient, and these learn: use cross_entropy"):
        learned(torch.randn(2, 16), torch.tensor([0, 1]))


def test_no_second_derivative_rather_than_a_wrong_one():
    loss = FrameCrossEntropy(FrameClassifier(16, 5))
    x = torch.randn(2, 16, requires_grad=True)
    with pytest.raises(EtfZooError, match="no second derivative"):
        torch.autograd.grad(loss(x, torch.tensor([0, 1])), x, create_graph=True)


STEP = """
import torch
from pathlib import Path
from etf_zoo import FrameClassifier
from etf_zoo.losses import FrameCrossEntropy
torch.set_num_threads(1)
loss = FrameCrossEntropy(FrameClassifier(1024, 1_050_624, frame="kerdock"))
def step(batch):
    x = torch.randn(batch, 1024, requires_grad=True)
    value = loss(x, torch.randint(1_050_624, (batch,)))
    value.backward()
    assert 13 < value.item() < 40, value
small = FrameCrossEntropy(FrameClassifier(1024, 5000, frame="kerdock"))
x = torch.randn(64, 1024, requires_grad=True)
small(x, torch.arange(64)).backward()  # what importing and a first step need
def peak():  # not getrusage's, which counts what the parent process had
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
before = peak()
step(64)
print(peak() - before)
held = torch.ones(10_000_000)
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_of_a_step_at_a_million_classes():
    done = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, check=True)
    step, with_more = map(int, done.stdout.split())
    assert step < 20_000  # KB; the frame alone would be 4.3 GB, the logits 269 MB
    assert with_more > 30_000  # the measure sees what is held
