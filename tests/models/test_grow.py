"""Room for classes: nothing unseen is answered, nothing moves when classes come, and models survive saving."""

import pytest
import timm
import torch
from torch.nn import functional as F

from etf_zoo import FrameClassifier, attach_frame
from etf_zoo.errors import EtfZooError
from etf_zoo.frames import simplex_etf
from etf_zoo.layers.cosine import fix_prototypes, learn_prototypes
from etf_zoo.losses import FrameCrossEntropy
from etf_zoo.models.find import load_model
from etf_zoo.models.grow import add_classes
from etf_zoo.sharing.folder import save_folder
from etf_zoo.sharing.plain import fold_head


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
def test_the_frame_is_that_of_all_classes_and_logits_those_of_the_seen():
    head, whole = FrameClassifier(16, 4, reserve=3), FrameClassifier(16, 7)
    assert torch.equal(head.weight, simplex_etf(7, 16))
    assert head.logit_scale == whole.logit_scale
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(head(x), whole(x)[:, :4])
    assert torch.equal(head.top_k(x, 4)[1], whole(x)[:, :4].topk(4).indices)
    assert head(10 * head.weight[4:]).argmax(1).max() < 4  # even of images that are an unseen class's
    labels = torch.tensor([0, 1, 2, 3, 0])
    torch.testing.assert_close(FrameCrossEntropy(head)(x, labels), F.cross_entropy(whole(x)[:, :4], labels))
    assert torch.equal(fold_head(head)(x).argmax(1), head(x).argmax(1))
    assert "reserve=3" in repr(head)
    scripted = torch.jit.script(head)
    torch.testing.assert_close(scripted(x), head(x))


def test_added_classes_change_nothing_else():
    head, x = FrameClassifier(16, 4, reserve=3, neck="mlp"), torch.randn(5, 16)
    head.eval()
    state, before = {k: v.clone() for k, v in head.state_dict().items()}, head(x)
    head.add_classes(1)
    head.add_classes(2)
    assert (head.num_classes, head.out_features, head.reserve) == (7, 7, 0)
    assert all(torch.equal(value, state[name]) for name, value in head.state_dict().items())
    assert torch.equal(head(x)[:, :4], before)
    head.reset_parameters()
    assert torch.equal(head.weight, state["weight"])


def test_learned_prototypes_keep_their_reserve():
    head = learn_prototypes(torch.nn.Sequential(FrameClassifier(8, 3, reserve=2)))
    x = torch.randn(2, 8)
    assert head(x).shape == (2, 3)
    assert head[0].prototypes.shape == (5, 8)
    assert torch.equal(fix_prototypes(head)(x), head(x))


@pytest.mark.parametrize("args", [{}, {"neck": "mlp"}, {"frame": "random"}, {"frame": simplex_etf(8, 16)}])
def test_models_grow_and_are_loaded_again(tmp_path, args):
    torch.manual_seed(0)
    args = {"neck": "residual", **args, "neck_features": 16}
    model = attach_frame(timm.create_model("test_resnet"), 5, reserve=3, **args)
    model.eval()
    model.pretrained_cfg["label_names"] = list("abcde")
    frame, images = model.fc.weight.clone(), torch.randn(2, 3, 32, 32)
    before = model(images)
    assert add_classes(model, ["f", "g"]) is model
    assert (model.num_classes, model.head_config.reserve) == (7, 1)
    assert torch.equal(model(images)[:, :5], before)
    names = model.pretrained_cfg["label_names"]
    save_folder(model, tmp_path, pretrained_cfg={"input_size": (3, 32, 32)}, label_names=names, half=False)
    again = load_model(str(tmp_path))
    assert (again.num_classes, again.fc.reserve, again.pretrained_cfg["label_names"]) == (7, 1, list("abcdefg"))
    assert torch.equal(again.fc.weight, frame)
    torch.testing.assert_close(again(images), model(images))
    add_classes(again, ["h"])
    assert again(images).shape == (2, 8)
    again.reset_classifier(3)
    assert (again.fc.num_classes, again(images).shape) == (3, (2, 3))


def test_errors_leave_the_model_as_it_was():
    model = timm.create_model("test_resnet_etf", num_classes=5, reserve=2, neck="mlp", neck_features=8)
    model.pretrained_cfg["label_names"] = list("abcde")
    for names, words in [
        (["f", "g", "h"], "no room for 3 more classes: the frame has 5, and 2 in reserve. Train again with reserve=3"),
        ([f"n{i}" for i in range(20)], "frame='code', whose prototypes have cosines of about"),
        (["f", "f"], "'f' is there already"),
        (["a"], "'a' is there already"),
        (2, "give the names"),
        ([], "at least 1"),
    ]:
        with pytest.raises(EtfZooError, match=words):
            add_classes(model, names)
        assert (model.num_classes, model.fc.num_classes, model.fc.reserve) == (5, 5, 2)
    with pytest.raises(EtfZooError, match="--reserve 100"):
        add_classes(timm.create_model("test_resnet"), 1)
    for call in (
        lambda: FrameClassifier(8, 3, reserve=-1),
        lambda: FrameClassifier(8, 3, reserve=1.5),
        lambda: FrameClassifier(64, 4096, frame="kerdock", reserve=4),
        lambda: timm.create_model("test_resnet_etf", num_classes=5, reserve=2, moving=True),
    ):
        with pytest.raises(EtfZooError, match="reserve"):
            call()
