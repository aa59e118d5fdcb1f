"""Kerdock frames in a classifier: computed, not stored, and the same as the stored matrix."""

import copy
import math
import warnings

import pytest
import torch

import etf_zoo.layers.classifier
import etf_zoo.layers.implicit
from etf_zoo import FrameClassifier
from etf_zoo.errors import EtfZooError
from etf_zoo.frames import kerdock_frame, random_frame
from etf_zoo.layers.implicit import frame_blocks, kerdock_sum, kerdock_vectors
from etf_zoo.layers.logit_scale import kerdock_logit_scale, solve_logit_scale


@pytest.fixture
def never_stored(monkeypatch):
    monkeypatch.setattr(etf_zoo.layers.classifier, "KERDOCK_MATRIX_CLASSES", 1)


def features(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SIZES = [(16, 288), (16, 10), (16, 40), (16, 275), (64, 4224), (100, 500), (20, 288)]


@pytest.mark.usefixtures("never_stored")
@pytest.mark.parametrize(("dim", "classes"), SIZES)
def test_logits_are_those_of_the_matrix(dim, classes):
    orientation = "random" if dim >= classes else "auto"
    head = FrameClassifier(dim, classes, frame="kerdock", orientation=orientation, seed=4, logit_scale=7.0)
    frame = kerdock_frame(classes, dim, seed=4)
    stored = FrameClassifier(dim, classes, frame=frame, logit_scale=7.0)
    assert head.implicit
    assert not stored.implicit
    for x in (features(5, dim), features(2, 3, dim), features(dim)):
        torch.testing.assert_close(head(x), stored(x), atol=1e-5, rtol=1e-5)
    x, y = (features(5, dim).requires_grad_() for _ in range(2))
    head(x).square().sum().backward()
    stored(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, atol=1e-3, rtol=1e-4)


@pytest.mark.usefixtures("never_stored")
@pytest.mark.parametrize(("dim", "classes"), SIZES)
@pytest.mark.parametrize("k", [1, 5, 10])
def test_top_k_in_blocks(dim, classes, k, monkeypatch):
    orientation = "random" if dim >= classes else "auto"
    head = FrameClassifier(dim, classes, frame="kerdock", orientation=orientation, logit_scale=7.0)
    x = features(2, 3, dim)
    expected, _ = head(x).topk(k)
    for block in (1, 10**6):
        monkeypatch.setattr(
            etf_zoo.layers.implicit, "frame_blocks", lambda *args, block=block: frame_blocks(*args, block_logits=block)
        )
        logits, classes_found = head.top_k(x, k)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(head(x).gather(-1, classes_found), expected, atol=1e-5, rtol=1e-5)
        assert all(len(row.unique()) == k for row in classes_found.view(-1, k))
    assert [found.shape for found in head.top_k(torch.zeros(0, dim), k)] == [(0, k), (0, k)]


def test_top_k_of_a_stored_frame():
    head = FrameClassifier(16, 50, frame="random")
    x = features(4, 16)
    expected = head(x).topk(50)
    for found, wanted in zip(head.top_k(x, 50), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert [found.shape for found in head.top_k(x[:0], 3)] == [(0, 3), (0, 3)]
    with pytest.raises(EtfZooError, match="k lies between 1 and 50"):
        head.top_k(x, 51)


@pytest.mark.parametrize(("dim", "classes"), [(16, 288), (16, 270), (16, 50), (16, 10)])
def test_vectors_and_their_sum(dim, classes):
    frame = kerdock_frame(classes, dim)
    signs = etf_zoo.frames.kerdock.kerdock_signs(dim)
    like = torch.empty(0, dim)
    assert torch.equal(kerdock_vectors(torch.arange(classes), signs, like), frame)
    torch.testing.assert_close(kerdock_sum(classes, signs, like), frame.sum(dim=0), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("dim", "classes"), [(16, 288), (64, 4224), (16, 32), (64, 640), (20, 288), (16, 100)])
def test_scale_in_closed_form(dim, classes):
    exact = solve_logit_scale(kerdock_frame(classes, dim))
    whole = classes % (2 * 4 ** int(math.log(dim, 4))) == 0
    assert kerdock_logit_scale(classes, dim) == pytest.approx(exact, rel=1e-3 if whole else 2e-2)
    assert kerdock_logit_scale(classes, dim) > exact - 1e-3


def test_few_classes_are_stored_and_many_are_not():
    assert FrameClassifier(256, 4096, frame="kerdock").weight.shape == (4096, 256)
    head = FrameClassifier(1024, 1_050_624, frame="kerdock")
    assert sum(b.numel() * b.element_size() for b in head.buffers()) == 1024**2 // 16 + 4
    assert 20 < head.logit_scale < 25
    x = kerdock_frame(5000, 1024)[4990:]
    assert head.top_k(x, 1)[1].flatten().tolist() == list(range(4990, 5000))


@pytest.mark.parametrize("dim", [256, 300])
def test_state_dict_and_copies(dim):
    head = FrameClassifier(dim, 5000, frame="kerdock", seed=1)
    other = FrameClassifier(dim, 5000, frame="kerdock", seed=2)
    x = features(3, dim)
    assert set(head.state_dict()) == {"weight", "signs", "logit_scale", *(["rotation"] if dim == 300 else [])}
    assert not torch.allclose(head(x), other(x), atol=0.1)
    other.load_state_dict(head.state_dict())
    assert torch.equal(head(x), other(x))
    meta = FrameClassifier(dim, 5000, frame="kerdock", device="meta")
    meta.to_empty(device="cpu").load_state_dict(head.state_dict())
    assert torch.equal(head(x), meta(x))
    assert torch.equal(head(x), copy.deepcopy(head).half()(x.half().float()).float()) is False  # inputs are rounded
    torch.testing.assert_close(copy.deepcopy(head).half()(x.half()), head(x.half()))


def test_other_frames_have_no_new_keys():
    assert set(FrameClassifier(16, 5).state_dict()) == {"weight", "logit_scale"}
    assert set(FrameClassifier(256, 300, frame="kerdock").state_dict()) == {"weight", "logit_scale"}


def test_auto_takes_it_for_very_many_classes(monkeypatch):
    monkeypatch.setattr(etf_zoo.layers.classifier, "AUTO_KERDOCK_CLASSES", 5000)
    assert FrameClassifier(256, 5000).frame == "auto"
    head = FrameClassifier(256, 5001)
    assert (head.frame, head.implicit) == ("kerdock", True)
    assert FrameClassifier(64, 5001).frame == "auto"  # where it does not fit
    assert FrameClassifier(8, 5001, neck="mlp").dim == 256


def test_auto_keeps_a_stored_frame(monkeypatch):
    """A model saved with frame='auto' and a matrix keeps its matrix, however many classes it has."""
    monkeypatch.setattr(etf_zoo.layers.classifier, "AUTO_KERDOCK_CLASSES", 5000)
    frame = random_frame(5001, 256)
    stored, head = FrameClassifier(256, 5001, frame=frame), FrameClassifier(256, 5001)
    head.load_state_dict(stored.state_dict(), strict=False)  # its sign bits are missing: they are not needed
    x = features(3, 256)
    assert torch.equal(head.weight, frame)
    assert torch.equal(head(x), stored(x))
    assert set(head.state_dict()) == {"weight", "logit_scale"}
    with pytest.raises(RuntimeError, match="frame weight has shape"):
        FrameClassifier(256, 5001, frame="kerdock").load_state_dict(stored.state_dict(), strict=False)


@pytest.mark.parametrize(("in_features", "classes", "width"), [(512, 5000, 256), (512, 70_000, 1024), (8, 5000, 256)])
def test_width_of_a_neck(in_features, classes, width):
    head = FrameClassifier(in_features, classes, frame="kerdock", neck="mlp", device="meta")
    assert head.dim == width


def test_width_of_a_neck_can_be_asked_for():
    assert FrameClassifier(8, 5, neck="residual", neck_features=16).weight.shape == (5, 16)
    with pytest.raises(EtfZooError, match="neck_features is the width"):
        FrameClassifier(8, 5, neck_features=16)
    with pytest.raises(EtfZooError, match="at least one feature"):
        FrameClassifier(8, 5, neck="mlp", neck_features=0)
    with pytest.raises(EtfZooError, match=r"70,000 classes needs 1024 dimensions, got 256.*neck='mlp'"):
        FrameClassifier(256, 70_000, frame="kerdock")


def test_report():
    assert FrameClassifier(1024, 1_000_000, frame="kerdock").frame_report().largest_cosine == 1 / 32
    assert FrameClassifier(16, 5).frame_report().largest_cosine == pytest.approx(-1 / 4)
    converted = FrameClassifier(8, 5000, frame="helmert", neck="linear", feature_norm="none")
    assert converted.frame_report().largest_cosine == -1 / 4999


@pytest.mark.usefixtures("never_stored")
@pytest.mark.parametrize("dim", [16, 20])
def test_compilers(dim):
    head = FrameClassifier(dim, 270, frame="kerdock").eval()
    x = features(4, dim)
    expected = head(x)
    torch.testing.assert_close(torch.fx.symbolic_trace(head)(x), expected)
    torch.testing.assert_close(torch.compile(head, backend="eager", fullgraph=True)(x), expected)
    torch.testing.assert_close(torch.export.export(head, (x,)).module()(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript
        torch.testing.assert_close(torch.jit.script(head)(x), expected)


@pytest.mark.usefixtures("never_stored")
def test_autocast():
    head = FrameClassifier(64, 4224, frame="kerdock")
    x = features(3, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(x), head(x).float())
        logits, top = head(x), head.top_k(x, 3)
    torch.testing.assert_close(logits, head(x))
    torch.testing.assert_close(top[0], head.top_k(x, 3)[0])
