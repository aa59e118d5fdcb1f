"""timm's own tags as twins: their sources, and what comes of weights in timm's format, from memory or a Hub."""

import subprocess
import sys
from urllib.error import URLError

import pytest
import safetensors.torch
import timm
import torch
from timm.models import get_pretrained_cfg
from timm.models._builder import _resolve_pretrained_source

from etf_zoo import FrameClassifier, frame_heads
from etf_zoo.frames import best_frame
from etf_zoo.models.convert import EXACT
from etf_zoo.models.tags import classifies, is_converted
from etf_zoo.models.twins import without_classifier
from etf_zoo.weights.native import native_tags
from tests.kinds import CLASSES, KINDS, build, images, shared

TAG = "test_resnet.r160_in1k"  # timm's own tiny models: 1,000 classes
TWIN = "test_resnet_etf.r160_in1k"
CONVERTED = [name for name in timm.list_pretrained("*_etf*") if name not in native_tags()]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def twin_of(full):
    name, _, tag = full.partition(".")
    return f"{name}_etf.{tag}"


@pytest.fixture
def stock(hub, tmp_path):
    """timm's tiny model on the loopback Hub, under timm's id; and what it computes."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet").eval()
    for parameter in model.fc.parameters():
        parameter.normal_(std=0.3)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    hub.add(f"timm/{TAG}", {"model.safetensors": tmp_path / "model.safetensors"})
    return model


def assert_same_softmax(ours, theirs):
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------------- dry run


def test_every_classifying_tag_resolves_to_timms_own_source():
    bases = [name for name in timm.list_pretrained(exclude_filters="*_etf*") if classifies(get_pretrained_cfg(name))]
    skipped = without_classifier()
    assert sorted(CONVERTED) == sorted(twin_of(name) for name in bases if name.split(".")[0] not in skipped)
    sources = {"hf-hub": 0, "url": 0}
    for name in bases:
        twin, base = get_pretrained_cfg(twin_of(name)), get_pretrained_cfg(name)
        assert is_converted(twin)
        source = _resolve_pretrained_source(twin.to_dict())  # what timm's loader would read
        assert source == _resolve_pretrained_source(base.to_dict())
        sources[source[0]] += 1
        for key in ("license", "num_classes", "label_offset", "custom_load", "input_size", "mean", "std", "classifier"):
            assert getattr(twin, key) == getattr(base, key)
        assert twin.description.startswith(f"converted: timm's {name}, ")
    if timm.__version__ == "1.0.31":
        assert len(bases) == 1444
        assert sources == {"hf-hub": 1429, "url": 15}  # timm has the last 15 at an address of their own


def test_headless_weights_and_projections_are_no_classifiers():
    for name in ("vit_small_patch14_dinov2.lvd142m", "resnet50_clip.openai", "vit_base_patch16_clip_224.openai"):
        assert not classifies(get_pretrained_cfg(name))
        assert twin_of(name) not in CONVERTED
    for name in ("vit_base_patch16_clip_224.openai_ft_in1k", "vit_base_patch16_224.augreg_in21k"):
        assert twin_of(name) in CONVERTED


def test_native_tags_come_first_and_stay_native():
    name = next(iter(native_tags()))
    assert not is_converted(get_pretrained_cfg(name))
    arch = name.partition(".")[0]
    assert timm.create_model(arch, pretrained=True).pretrained_cfg["tag"] == name.partition(".")[2]


def test_import_builds_nothing():
    code = (
        "import torch, timm\n"
        "def never(*args, **kwargs): raise SystemExit('built a module')\n"
        "init, torch.nn.Module.__init__ = torch.nn.Module.__init__, never\n"
        "import etf_zoo\n"
        "assert len(timm.list_pretrained('*_etf*')) > 1000\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_weights_a_tag_is_an_ordinary_twin():
    twin = timm.create_model(TWIN)
    assert (twin.fc.neck, twin.fc.feature_norm, twin.num_classes) == (None, "l2", 1000)
    assert twin.pretrained_cfg["input_size"] == get_pretrained_cfg(TAG).input_size


# ------------------------------------------------------------------------------------------- weights in timm's format


BIG = ("list", "mlp", "aux", "pruned", "list_by_stage", "repvit")


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow if kind in BIG else ()) for kind in KINDS])
def test_weights_of_the_base_give_a_converted_twin(kind):
    name, small, _ = KINDS[kind]
    base = shared(kind, twin=False)
    overlay = {"state_dict": dict(base.state_dict()), "num_classes": CLASSES}

    def load(**kwargs):
        kwargs = {"pretrained": True, "pretrained_cfg_overlay": overlay, **small, **kwargs}
        return timm.create_model(f"{name}_etf", **kwargs).eval()

    assert_same_softmax(load()(images(kind)), base(images(kind)))
    other = load(num_classes=4)
    features = other.forward_features(images(kind))
    torch.testing.assert_close(features, base.forward_features(images(kind)))
    for head in frame_heads(other).values():
        assert (head.neck, head.feature_norm) == (None, "l2")
        assert torch.equal(head.weight, best_frame(4, head.in_features))
        assert head.logit_scale == FrameClassifier(head.in_features, 4).logit_scale  # not that of a tag's own weights


def test_label_offset():
    base = build("linear", twin=False)
    wide = dict(base.state_dict())
    for key in ("fc.weight", "fc.bias"):  # as TensorFlow's weights: a background class before the others
        wide[key] = torch.cat([torch.full_like(wide[key][:1], 9.0), wide[key]])
    overlay = {"state_dict": wide, "num_classes": CLASSES, "label_offset": 1}
    twin = timm.create_model("resnet18_etf", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=CLASSES)
    assert_same_softmax(twin.eval()(images("linear")), base(images("linear")))


def test_other_heads_classes_channels_and_uses():
    base = shared("linear", twin=False)
    overlay = {"state_dict": dict(base.state_dict()), "num_classes": CLASSES}

    def load(**kwargs):
        return timm.create_model("resnet18_etf", pretrained=True, pretrained_cfg_overlay=dict(overlay), **kwargs).eval()

    head = load(num_classes=4, frame="random", orientation="random", logit_scale=3.0, neck="mlp").fc
    assert (head.frame, head.logit_scale, head.dim) == ("random", 3, 512)
    assert head.neck is not None
    x = images("linear")
    torch.testing.assert_close(load(num_classes=0)(x), base.forward_head(base.forward_features(x), pre_logits=True))
    maps = load(features_only=True)(x)
    assert [m.shape[1] for m in maps] == [64, 64, 128, 256, 512]
    torch.testing.assert_close(maps[-1], base.forward_features(x))
    gray = load(in_chans=1)
    torch.testing.assert_close(gray.conv1.weight, base.conv1.weight.sum(1, keepdim=True))
    assert gray(images("linear", channels=1)).shape == (2, CLASSES)
    for asked in ("frame", "neck", "feature_norm"):
        with pytest.raises(ValueError, match=f"their own frame and scale, which {asked} would contradict"):
            load(**{asked: "none"})


# --------------------------------------------------------------------------------------------------------------- a Hub


def test_tag_from_the_hub(stock, hub, tmp_path):
    x = torch.randn(2, 3, 64, 64)
    twin = timm.create_model(TWIN, pretrained=True).eval()
    assert_same_softmax(twin(x), stock(x))
    assert twin.head_config is EXACT
    cfg = twin.pretrained_cfg
    assert (cfg["architecture"], cfg["hf_hub_id"], cfg["tag"]) == ("test_resnet_etf", f"timm/{TAG}", "r160_in1k")
    hub.heal()
    for name in (TWIN, "test_resnet_etf", TAG):  # cached as timm's, for timm too
        again = timm.create_model(name, pretrained=True).eval()
        assert_same_softmax(again(x), stock(x))
    assert hub.sent == 0
    fine = timm.create_model(TWIN, pretrained=True, num_classes=37).eval()
    torch.testing.assert_close(fine.forward_features(x), stock.forward_features(x))
    assert torch.equal(fine.fc.weight, best_frame(37, fine.num_features))
    resolved = timm.models.resolve_model_input_args(TWIN, {}, num_classes=37)
    assert timm.create_model(pretrained=True, **resolved).num_classes == 37
    hub.add("org/mirror", {"config.json": b"{}", "model.safetensors": tmp_path / "model.safetensors"})
    mirrored = {"hf_hub_id": "org/mirror"}
    twin = timm.create_model(TWIN, pretrained=True, pretrained_cfg_overlay=mirrored).eval()
    assert_same_softmax(twin(x), stock(x))


def test_local_copy_of_timms_file(stock, tmp_path):
    overlay = {"file": str(tmp_path / "model.safetensors")}
    twin = timm.create_model(TWIN, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x = torch.randn(2, 3, 64, 64)
    assert_same_softmax(twin(x), stock(x))
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"not a \.safetensors file"):
        timm.create_model(TWIN, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "model.bin")})


def test_offline_without_a_cache_says_what_to_do(monkeypatch):
    message = r"^timm/test_resnet\.r160_in1k is not in the cache and HF_HUB_OFFLINE is set. Load it once with a network"
    with pytest.raises(RuntimeError, match=message):
        timm.create_model(TWIN, pretrained=True)

    def unreachable(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_url", unreachable)
    with pytest.raises(RuntimeError, match=r"Cannot reach https://.*: Name or service not known. Check the network"):
        timm.create_model("gcvit_xxtiny_etf.in1k", pretrained=True)


def test_damaged_downloads(stock, hub):
    hub.fault("/store/", truncate=1000)
    with pytest.raises(RuntimeError, match="was cut short"):
        timm.create_model(TWIN, pretrained=True)
    hub.heal()
    hub.fault("/store/", corrupt=True)
    with pytest.raises(RuntimeError, match="arrived damaged, and was removed from the cache"):
        timm.create_model(TWIN, pretrained=True)
    hub.heal()
    assert timm.create_model(TWIN, pretrained=True).num_classes == 1000


def test_architecture_without_classifying_weights():
    with pytest.raises(RuntimeError, match=r"no pretrained weights for vit_small_patch14_dinov2_etf yet.*attach_frame"):
        timm.create_model("vit_small_patch14_dinov2_etf", pretrained=True)
