"""The methods that are keyword arguments of any twin: hierarchy frame, moving frame, whitening."""

import copy

import pytest
import timm
import torch
from timm.models._hub import save_for_hf

import etf_zoo
from etf_zoo.frames import best_frame, hierarchy_frame, turn_to_blocks
from etf_zoo.layers.moving import MovingFrameClassifier
from etf_zoo.layers.whitening import Whitening, whiten_last_norm
from etf_zoo.sharing.folder import save_folder, storage_state_dict
from etf_zoo.sharing.plain import export_plain

DISTANCES = torch.tensor([[0, 1, 2, 2, 2], [1, 0, 2, 2, 2], [2, 2, 0, 1, 2], [2, 2, 1, 0, 2], [2, 2, 2, 2, 0.0]])
ARGS = [
    {"frame": "hierarchy", "hierarchy": DISTANCES, "gamma": 1.0},
    {"moving": True},
    {"moving": {"momentum": 0.5, "update_every": 2}, "feature_norm": "batch"},
    {"whitening": True},
    {"whitening": {"group_size": 16}, "neck": "residual"},
]
KEYS = [next(iter(args)) for args in ARGS]


def small(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("test_resnet_etf", num_classes=5, **kwargs)


def trained(net):
    """Moved away from what construction gives: norms, whitening and a moving frame have seen data."""
    images, labels = torch.randn(20, 3, 32, 32), torch.arange(20) % 5
    net.train()(images)
    head = net.get_classifier()
    if isinstance(head, MovingFrameClassifier):
        for _ in range(2):
            head.observe(torch.randn(20, head.dim), labels)
    return net.eval()


def whitenings(net):
    return [module for module in net.modules() if isinstance(module, Whitening)]


@pytest.mark.parametrize("args", ARGS, ids=KEYS)
@pytest.mark.parametrize("attached", [False, True])
def test_saved_and_loaded(tmp_path, args, attached):
    if attached:
        torch.manual_seed(0)
        net = timm.create_model("test_resnet")
        if whitening := args.get("whitening"):  # a function of its own on a model at hand
            whiten_last_norm(net, **({} if whitening is True else whitening))
        net = trained(etf_zoo.attach_frame(net, 5, **{key: v for key, v in args.items() if key != "whitening"}))
    else:
        net = trained(small(**args))
    save_folder(net, tmp_path, pretrained_cfg={"input_size": (3, 32, 32)})
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(loaded(x), net(x), atol=2e-2, rtol=0)  # stored in float16
    assert torch.equal(loaded.get_classifier().weight, net.get_classifier().weight)
    assert type(loaded.get_classifier()) is type(net.get_classifier())
    assert [m.group_size for m in whitenings(loaded)] == [m.group_size for m in whitenings(net)]
    save_folder(loaded, tmp_path / "again")
    again = timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True).eval()
    assert torch.equal(again(x), loaded(x))


@pytest.mark.parametrize("args", ARGS, ids=KEYS)
def test_reset_to_other_classes_and_back(args):
    net = copy.deepcopy(small(**args))
    first = net.get_classifier()
    net.reset_classifier(7)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert type(net.get_classifier()) is type(first)
    if "hierarchy" in args:  # the tree is of five classes
        assert torch.equal(net.get_classifier().weight, best_frame(7, first.dim))
    net.reset_classifier(5)
    assert torch.equal(net.get_classifier().weight, first.weight)


def test_hierarchy_frame():
    net = small(frame="hierarchy", hierarchy=DISTANCES, gamma=1.0, seed=3)
    head = net.get_classifier()
    assert torch.equal(head.weight, turn_to_blocks(hierarchy_frame(DISTANCES, head.dim, gamma=1.0, seed=3)))
    assert head.frame == "hierarchy"


def test_moving_arguments_reach_the_head():
    head = small(moving={"momentum": 0.5, "update_every": 2, "delta": 0.1}).get_classifier()
    assert (head.momentum, head.update_every, head.delta) == (0.5, 2, 0.1)
    with torch.device("meta"):
        assert isinstance(small(moving=True).get_classifier(), MovingFrameClassifier)


def test_empty_mappings_switch_a_method_on(tmp_path):
    for given in ({}, True):
        head = small(moving=given).get_classifier()
        assert isinstance(head, MovingFrameClassifier)
        assert (head.momentum, head.update_every, head.delta) == (0.9, 1, 1e-3)
        net = small(whitening=given)
        assert [m.group_size for m in whitenings(net)] == [64]
    for given in (False, None):
        assert not isinstance(small(moving=given).get_classifier(), MovingFrameClassifier)
        assert not whitenings(small(whitening=given))
    net = etf_zoo.attach_frame(timm.create_model("test_resnet"), 5, moving={})
    assert isinstance(net.get_classifier(), MovingFrameClassifier)
    net.reset_classifier(6)
    assert isinstance(net.get_classifier(), MovingFrameClassifier)
    save_folder(small(moving={}, whitening={}), tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, moving=True, whitening=True)
    assert isinstance(loaded.get_classifier(), MovingFrameClassifier)
    assert whitenings(loaded)
    with pytest.raises(ValueError, match="no whitening layer, so a model with one has no plain form"):
        export_plain(small(whitening={}), tmp_path / "plain")


def test_whitening_statistics_are_stored_exactly():
    stored = storage_state_dict(small(whitening={"group_size": 8}))
    statistics = {key: value.dtype for key, value in stored.items() if "running_whitening" in key}
    assert set(statistics.values()) == {torch.float32}
    assert stored["conv1.0.weight"].dtype == torch.float16


def test_whitening_stands_in_the_last_norm():
    net = small(whitening={"group_size": 8})
    assert [module.group_size for module in whitenings(net)] == [8]
    plain = small()
    assert len(list(net.modules())) == len(list(plain.modules()))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"frame": "hierarchy"}, "go together: D = etf_zoo.frames.Hierarchy"),
        ({"hierarchy": DISTANCES}, "go together"),
        ({"frame": "hierarchy", "hierarchy": DISTANCES[:4, :4]}, r"shape \(4, 4\) for 5 classes"),
        ({"frame": "hierarchy", "hierarchy": DISTANCES, "orientation": "up"}, "Unknown orientation 'up'"),
        ({"frame": "hierarchy", "hierarchy": DISTANCES, "gamma": 0.0}, "gamma must be positive"),
        ({"moving": {"momentum": 2}}, "momentum is the share"),
        ({"moving": True, "num_classes": 1000}, "at least 999 dimensions"),
        ({"whitening": {"group_size": 0}}, "must be positive"),
        ({"moving": {"momentun": 0.5}}, "moving takes momentum, update_every, delta; not momentun"),
        ({"moving": "no"}, "moving is True, False or a mapping with any of momentum, update_every, delta; got 'no'"),
        ({"whitening": {"groups": 16}}, "whitening takes name, group_size, .*, affine; not groups"),
        ({"whitening": 16}, "whitening is True, False or a mapping with any of name, .*; got 16"),
    ],
)
def test_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_resnet_etf", **{"num_classes": 5, **kwargs})
    if "moving" in kwargs:
        with pytest.raises(ValueError, match=message):
            etf_zoo.attach_frame(
                timm.create_model("test_resnet"), kwargs.get("num_classes", 5), moving=kwargs["moving"]
            )


@pytest.mark.parametrize("saver", [save_folder, lambda net, folder: save_for_hf(net, folder, safe_serialization=True)])
def test_whitening_outlives_another_head(tmp_path, saver):
    net = trained(etf_zoo.attach_frame(small(whitening={"group_size": 16}), 4, frame="random"))
    saver(net, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert [m.group_size for m in whitenings(loaded)] == [16]
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(loaded(x), net(x), atol=2e-2, rtol=0)


def test_whitening_by_name_is_saved(tmp_path):
    net = small()
    whiten_last_norm(net, name="layer3.0.bn2", group_size=8)
    x = torch.randn(4, 3, 32, 32)
    save_folder(trained(net), tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(loaded(x), net(x), atol=2e-2, rtol=0)
    assert any(isinstance(module, Whitening) for module in loaded.layer3[0].bn2.modules())


def test_whitening_that_no_folder_can_hold(tmp_path):
    learned, twice, by_hand = timm.create_model("test_resnet"), small(whitening=True), small()
    whiten_last_norm(learned)
    whiten_last_norm(twice, name="layer3.0.bn2")
    by_hand.layer4[0].bn2 = Whitening(by_hand.num_features)
    for net in (learned, twice, by_hand):
        with pytest.raises(ValueError, match="whitening cannot be saved for others to build"):
            save_folder(net, tmp_path / "out")
        with pytest.raises(ValueError, match=r"no fixed frame|no whitening layer"):
            export_plain(net, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_whitening_of_weights(tmp_path, caplog):
    """Weights with whitening load at any number of classes and channels; those without get it with a fresh head."""
    x = torch.randn(4, 3, 32, 32)
    plain, white = trained(small()), trained(small(whitening={"group_size": 16}))
    without, having = (f"local-dir:{save_folder(net, tmp_path / str(i))}" for i, net in enumerate((plain, white)))
    contradiction = pytest.raises(ValueError, match=r"which whitening would contradict.*whiten_last_norm")
    with contradiction:
        timm.create_model(without, pretrained=True, whitening=True)
    for other in (False, {"group_size": 8}):
        for num_classes in (5, 7):
            with contradiction:
                timm.create_model(having, pretrained=True, whitening=other, num_classes=num_classes)
    seven = timm.create_model(having, pretrained=True, num_classes=7).eval()
    torch.testing.assert_close(seven.forward_features(x), white.forward_features(x), atol=2e-2, rtol=0)
    gray = timm.create_model(having, pretrained=True, in_chans=1).eval()
    three = x[:, :1].expand(-1, 3, -1, -1)  # timm sums the first convolution over the channels
    torch.testing.assert_close(gray(x[:, :1]), white(three), atol=2e-2, rtol=0)
    fresh = timm.create_model(without, pretrained=True, num_classes=7, whitening={"group_size": 16})
    (place,) = [name for name, module in fresh.named_modules() if isinstance(module, Whitening)]
    stored = timm.create_model(without, pretrained=True).state_dict()
    for key, value in fresh.state_dict().items():
        if key in stored and not key.startswith("fc.") and key != f"{place}.running_mean":
            assert torch.equal(value, stored[key]), key
    assert not [record for record in caplog.records if record.levelname == "WARNING"]  # of timm, on unknown keys
    with pytest.raises(ValueError, match="features_only builds timm's feature extractor"):
        timm.create_model(having, pretrained=True, features_only=True)
