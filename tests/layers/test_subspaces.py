"""The classifier on subspaces of a tree: its scores, its neck, and what it does not go with."""

import copy
import math

import pytest
import timm
import torch

import etf_zoo
from etf_zoo.errors import EtfZooError
from etf_zoo.frames import Hierarchy
from etf_zoo.layers.cosine import learn_prototypes
from etf_zoo.layers.subspaces import SubspaceClassifier
from etf_zoo.losses import FrameCrossEntropy
from etf_zoo.sharing.card import render_card
from etf_zoo.sharing.folder import save_folder
from etf_zoo.sharing.plain import export_plain

TREE = Hierarchy({"a": "ab", "b": "ab", "c": "cd", "d": "cd", "ab": "root", "cd": "root", "e": "root"})
DISTANCES = TREE.distances(list("abcde"))


def head(**kwargs):
    return SubspaceClassifier(16, 5, hierarchy=DISTANCES, **kwargs)


def test_scores_are_lengths_of_projections():
    x, classifier = torch.randn(3, 16), head()
    paths = [[0, 5], [1, 5], [2, 6], [3, 6], [4]]
    for row, scores in zip(x.tolist(), classifier(x).tolist(), strict=True):
        assert scores == pytest.approx([math.sqrt(sum(row[n] ** 2 for n in path)) for path in paths], rel=1e-5)
    values, classes = classifier.top_k(x, 2)
    assert torch.equal(values, classifier(x).topk(2).values)
    assert torch.equal(classes, classifier(x).topk(2).indices)


@pytest.mark.parametrize(("likelier", "winner"), [("e", "a"), ("c", "c")])
def test_an_unsure_feature_prefers_the_longer_path(likelier, winner):
    """What the docstring says of the method: a feature that minimizes the loss, where a class is likelier than a."""
    classifier = head()
    chances = torch.zeros(5)
    chances[["abcde".index(name) for name in (likelier, "a", "b")]] = torch.tensor([0.5, 0.3, 0.2])
    wanted = chances @ classifier.weight.square()  # where softmax(|x|) is then
    x = (6 + wanted.log()).clamp_min(0)
    assert "abcde"[classifier(x[None]).argmax()] == winner


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_scripting():
    x, classifier = torch.randn(3, 16), head()
    assert torch.equal(torch.jit.script(classifier)(x), classifier(x))


def test_gradient_at_zero_is_finite_and_half_precision_keeps_float32_scores():
    x = torch.zeros(2, 16, requires_grad=True)
    head()(x).sum().backward()
    assert bool(torch.isfinite(x.grad).all())
    classifier = head()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert classifier(torch.randn(2, 16).bfloat16()).dtype == torch.float32
    assert classifier.bfloat16().weight.dtype == torch.float32


def test_a_named_neck_is_as_wide_as_the_tree():
    assert head(neck="residual").dim == 7
    assert head(neck="residual", neck_features=20).dim == 20


def test_a_twin_with_it_is_saved_and_loaded_and_reset(tmp_path):
    args = {"frame": "subspaces", "hierarchy": DISTANCES, "neck": "residual", "feature_norm": "none"}
    model = timm.create_model("test_resnet_etf", num_classes=5, **args).eval()
    images = torch.randn(2, 3, 32, 32)
    save_folder(model, tmp_path / "m", half=False, label_names=list("abcde"))
    again = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
    assert isinstance(again.get_classifier(), SubspaceClassifier)
    assert torch.equal(again(images), model(images))
    (tmp_path / "m" / "metrics.json").write_text("{}")
    assert "subspaces of a class tree for 5 classes in 7 dimensions" in render_card(tmp_path / "m")
    save_folder(again, tmp_path / "twice", half=False)  # and what was loaded can be saved again
    twice = timm.create_model(f"local-dir:{tmp_path / 'twice'}", pretrained=True).eval()
    assert torch.equal(twice(images), model(images))
    other = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True, num_classes=3)
    assert type(other.get_classifier()) is etf_zoo.FrameClassifier
    assert other(images).shape == (2, 3)
    again.reset_classifier(4)
    assert type(again.get_classifier()) is etf_zoo.FrameClassifier
    again.reset_classifier(5)
    assert isinstance(copy.deepcopy(model).get_classifier(), SubspaceClassifier)
    with pytest.raises(EtfZooError, match=r"not linear.*onnx"):
        export_plain(model, tmp_path / "plain")


def test_errors():
    for extra in ({"lengths": torch.ones(3)}, {"frame": "simplex"}):
        with pytest.raises(EtfZooError, match="without lengths or another frame"):
            SubspaceClassifier(8, 3, **extra)
    with pytest.raises(EtfZooError, match="feature_norm='none'"):
        head(feature_norm="l2")
    with pytest.raises(EtfZooError, match="reserve"):
        head(reserve=2)
    with pytest.raises(EtfZooError, match="go together"):
        SubspaceClassifier(16, 5)
    with pytest.raises(EtfZooError, match=r"6 dimensions.*neck='residual'"):
        SubspaceClassifier(6, 5, hierarchy=DISTANCES)
    with pytest.raises(EtfZooError, match="axes of a tree"):
        learn_prototypes(head())
    with pytest.raises(EtfZooError, match="cosines"):
        FrameCrossEntropy(head())
    with pytest.raises(EtfZooError, match="moving"):
        timm.create_model("test_resnet_etf", num_classes=5, subspaces=True, moving=True)
    with pytest.raises(EtfZooError, match="k lies between"):
        head().top_k(torch.randn(1, 16), 6)
