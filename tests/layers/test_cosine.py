"""Learned prototypes under a frame's norm and scale."""

import copy

import pytest
import timm
import torch
from torch.nn import functional as F

from etf_zoo import FrameClassifier, frame_heads
from etf_zoo.errors import EtfZooError
from etf_zoo.layers.cosine import LearnedCosineClassifier, fix_prototypes, learn_prototypes
from etf_zoo.sharing.folder import save_folder


def features(rows=6, dim=8):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(0))


def stepped(head, steps=3):
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(head(features()), torch.arange(6) % 3).backward()
        optimizer.step()
    return head


def test_starts_as_the_frame_and_then_learns():
    head = FrameClassifier(8, 3, frame="simplex")
    learned = learn_prototypes(copy.deepcopy(head))
    torch.testing.assert_close(learned(features()), head(features()))
    assert [name for name, _ in learned.named_parameters()] == ["prototypes"]
    before = learned.weight.clone()
    stepped(learned)
    assert (learned.weight - before).norm() > 0.1
    torch.testing.assert_close(learned.weight.norm(dim=1), torch.ones(3))
    assert learned.logit_scale == head.logit_scale


def test_logits_and_gradients_are_those_of_cosines():
    learned = learn_prototypes(FrameClassifier(8, 3))
    with torch.no_grad():
        learned.prototypes.mul_(torch.tensor([[1.0], [3.0], [0.2]]))  # lengths say nothing
    x = features()
    own = learned.prototypes.detach().clone().requires_grad_()
    slow = learned.logit_scale * F.normalize(x, dim=1) @ F.normalize(own, dim=1).T
    torch.testing.assert_close(learned(x), slow)
    labels = torch.arange(6) % 3
    F.cross_entropy(slow, labels).backward()
    F.cross_entropy(learned(x), labels).backward()
    torch.testing.assert_close(learned.prototypes.grad, own.grad)
    inner = (learned.prototypes.grad * learned.prototypes).sum(1)
    torch.testing.assert_close(inner, torch.zeros(3), atol=1e-6, rtol=0)


def test_state_and_copies_resume_exactly():
    learned = stepped(learn_prototypes(FrameClassifier(8, 3)))
    other = learn_prototypes(FrameClassifier(8, 3, seed=5))
    other.load_state_dict(learned.state_dict())
    assert torch.equal(other(features()), learned(features()))
    assert torch.equal(copy.deepcopy(learned)(features()), learned(features()))
    assert learned.half()(features().half()).dtype == torch.float32


@pytest.mark.parametrize("name", ["test_resnet_etf", "deit_tiny_distilled_patch16_224_etf"])
def test_a_stored_model_has_the_same_logits(name, tmp_path):
    torch.manual_seed(0)
    size = 32 if "resnet" in name else 224
    model = learn_prototypes(timm.create_model(name, num_classes=4))
    for head in frame_heads(model).values():
        with torch.no_grad():
            head.prototypes += 0.5 * torch.randn_like(head.prototypes)
    x = torch.randn(2, 3, size, size)
    model.eval()
    save_folder(model, tmp_path / "saved", half=False)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    torch.testing.assert_close(loaded(x), model(x), atol=1e-5, rtol=1e-5)
    heads = frame_heads(loaded).values()
    assert all(type(head) is FrameClassifier for head in heads)
    assert all(type(head) is LearnedCosineClassifier for head in frame_heads(model).values())  # as it was
    assert fix_prototypes(loaded) is loaded


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: torch.nn.Linear(3, 2), "has no frame"),
        (lambda: timm.create_model("test_resnet_etf", num_classes=4, moving=True), "this one moves"),
    ],
)
def test_errors(model, message):
    with pytest.raises(EtfZooError, match=message):
        learn_prototypes(model())
