import copy
import pickle

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg
from timm.models._hub import save_for_hf
from timm.models._manipulate import reparameterize_model
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch import nn

import etf_zoo
from etf_zoo import FrameClassifier, attach_frame, frame_heads
from etf_zoo.frames import best_frame, random_frame, simplex_etf, turn_to_blocks
from etf_zoo.models.names import base_name, split_head
from etf_zoo.models.twins import without_classifier
from tests.kinds import CLASSES, KINDS, build, images, leaves, shared

each_kind = pytest.mark.parametrize("kind", KINDS)
# what depends less on the kind of head runs on all only with -m slow
BIG = ("linear", "list", "mlp", "aux", "no_default", "pruned")
each_kind_big_slow = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind in BIG else ()) for kind in KINDS]
)


@pytest.fixture(autouse=True)
def _no_grad():
    # LeViT and others keep attention biases of a forward with gradients, which deepcopy refuses, in timm as here
    with torch.no_grad():
        yield


def assert_same(a, b, **kwargs):
    torch.testing.assert_close(a, b, **kwargs)


# ------------------------------------------------------------------------------------------------- what a twin computes


@each_kind
def test_twin_is_its_base_with_the_frame_as_the_classifiers_weight(kind):
    """Reference: timm's own model whose learned classifiers are overwritten by the frames, biases by zero."""
    twin, base = build(kind, feature_norm="none"), build(kind, twin=False)
    heads = frame_heads(twin)
    assert heads.keys() == leaves(base).keys()
    for name, leaf in leaves(base).items():
        leaf.weight.copy_(heads[name].weight.view_as(leaf.weight))
        leaf.bias.zero_()
    backbone, base_backbone = (split_head(m.state_dict(), heads)[0] for m in (twin, base))
    assert backbone.keys() == base_backbone.keys()
    for key, value in backbone.items():
        assert torch.equal(value, base_backbone[key]), key
    assert_same(twin(images(kind)), base(images(kind)), atol=1e-5, rtol=1e-4)


@each_kind
def test_every_classifier_is_a_frame_and_nothing_of_it_is_trained(kind):
    twin = shared(kind)
    heads = frame_heads(twin)
    assert heads
    for name, head in heads.items():
        assert_same(head.weight, best_frame(CLASSES, head.in_features))
        assert not [p for p, _ in twin.named_parameters() if p.startswith(name + ".")]
        assert f"{name}.weight" in twin.state_dict()
    assert twin.num_classes == CLASSES
    assert twin(images(kind)).shape == (2, CLASSES)
    assert isinstance(twin, type(shared(kind, twin=False)))


def structure(module):
    if isinstance(module, (tuple, list, nn.ModuleList)):
        return [structure(m) for m in module]
    return type(module).__name__.replace("FrameClassifier", "Linear").replace("Conv2d", "Linear")


@each_kind
def test_forward_in_two_steps_and_get_classifier(kind):
    twin, base, x = shared(kind), shared(kind, twin=False), images(kind)
    features = twin.forward_features(x)
    assert_same(twin.forward_head(features), twin(x))
    pre_logits, base_pre_logits = (
        twin.forward_head(features, pre_logits=True),
        base.forward_head(features, pre_logits=True),
    )
    assert_same(pre_logits, base_pre_logits)  # what timm means by pre_logits: before neck and norm
    assert structure(twin.get_classifier()) == structure(base.get_classifier())


@each_kind
def test_without_a_classifier(kind):
    x = images(kind)
    created = build(kind, num_classes=0)
    assert not frame_heads(created)
    assert_same(created(x), shared(kind, twin=False, num_classes=0)(x))
    reset, base = build(kind), build(kind, twin=False)
    for model in (reset, base):
        model.reset_classifier(0)
    assert not frame_heads(reset)
    assert_same(reset(x), base(x))
    created.reset_classifier(5)  # and a frame as soon as there is a number
    assert {h.num_classes for h in frame_heads(created).values()} == {5}


@each_kind_big_slow
def test_features_only(kind):
    name, small, _ = KINDS[kind]
    try:
        torch.manual_seed(0)
        base = timm.create_model(name, features_only=True, **small).eval()
    except (RuntimeError, TypeError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"timm's {name} has no features_only: {error}")
    torch.manual_seed(0)
    twin = timm.create_model(f"{name}_etf", features_only=True, **small).eval()
    for ours, theirs in zip(twin(images(kind)), base(images(kind)), strict=True):
        assert_same(ours, theirs)
    assert twin.feature_info.channels() == base.feature_info.channels()


@each_kind_big_slow
def test_one_input_channel(kind):
    twin = shared(kind, in_chans=1)
    assert twin(images(kind, channels=1)).shape == (2, CLASSES)


@each_kind_big_slow
def test_channels_last(kind):
    twin = build(kind).to(memory_format=torch.channels_last)
    x = images(kind)
    assert_same(twin(x.to(memory_format=torch.channels_last)), shared(kind)(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "efficientnet_b1_pruned"])
def test_concatenated_pool_doubles_the_width(name):
    plain = timm.create_model(f"{name}_etf", num_classes=5)
    wide = timm.create_model(f"{name}_etf", num_classes=5, global_pool="catavgmax").eval()
    base = timm.create_model(name, num_classes=5, global_pool="catavgmax")
    assert wide.get_classifier().in_features == base.get_classifier().in_features
    if name == "resnet18":
        assert wide.get_classifier().in_features == 2 * plain.get_classifier().in_features
    assert wide(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    wide.reset_classifier(6)
    assert wide.get_classifier().weight.shape == (6, base.get_classifier().in_features)
    if name != "mobilenetv3_small_050":  # timm: its head convolution is sized for the pool
        wide.reset_classifier(6, global_pool="avg")
        assert wide.get_classifier().weight.shape == (6, plain.get_classifier().in_features)
    assert wide(torch.randn(2, 3, 64, 64)).shape == (2, 6)


def test_dla_keeps_its_convolution_without_pooling():
    twin = timm.create_model("dla46_c_etf", num_classes=5).eval()
    twin.reset_classifier(5, global_pool="")
    assert twin(torch.randn(2, 3, 64, 64)).shape == (2, 5, 2, 2)


# ----------------------------------------------------------------------------------------------------- reset_classifier


def pooling(model):
    modules = (model, getattr(model, "head", None), getattr(model, "global_pool", None))
    return [str(getattr(m, "global_pool", None) or getattr(m, "pool_type", None)) for m in modules if m is not None]


@each_kind
@pytest.mark.parametrize("copied", ["itself", "deepcopy", "pickle"])
def test_reset_gives_a_frame_again_and_leaves_the_original_alone(kind, copied):
    original = build(kind, frame="random", logit_scale=5.0)
    before = {key: value.clone() for key, value in original.state_dict().items()}
    copies = {"itself": lambda m: m, "deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}
    model = copies[copied](original)
    assert type(model) is type(original)
    assert_same(model(images(kind)), original(images(kind)))
    pool = pooling(model)
    model.reset_classifier(4)
    heads = frame_heads(model)
    base = build(kind, twin=False)
    base.reset_classifier(4)
    assert heads.keys() == leaves(base).keys()
    for head in heads.values():
        turned = turn_to_blocks(random_frame(4, head.in_features))
        assert torch.equal(head.weight, turned)  # its own arguments, not the defaults
        assert head.logit_scale == 5
        assert not head.training
    assert model.num_classes == 4
    assert pooling(model) == pool
    assert model(images(kind)).shape == (2, 4)
    if model is not original:
        assert original.num_classes == CLASSES
        after = original.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert original(images(kind)).shape == (2, CLASSES)


@pytest.mark.parametrize("kind", ["linear", "norm_linear_pair"])
def test_reset_that_fails_changes_nothing(kind):
    twin, base = build(kind, frame="simplex"), build(kind, twin=False)
    for model, change in (
        (twin, lambda: twin.reset_classifier(700)),
        (base, lambda: attach_frame(base, 700, frame="simplex")),
    ):
        modules, tensors = dict(model.named_modules()), model.state_dict()
        expected = model(images(kind))
        with pytest.raises(ValueError, match="needs at least 699 dimensions"):
            change()
        assert dict(model.named_modules()) == modules
        assert model.state_dict().keys() == tensors.keys()
        assert model.num_classes == CLASSES
        assert torch.equal(model(images(kind)), expected)
    assert not frame_heads(base)
    assert type(base) is type(shared(kind, twin=False))


@each_kind_big_slow
def test_reset_keeps_device_dtype_and_mode(kind):
    model = build(kind).to(torch.bfloat16).train()
    model.reset_classifier(4)
    assert all(head.training for head in frame_heads(model).values())
    assert {head.weight.dtype for head in frame_heads(model).values()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.eval()(images(kind).bfloat16()).shape == (2, 4)
    model = build(kind).double()
    model.reset_classifier(4)
    assert model(images(kind).double()).dtype == torch.float64
    model.to("meta").reset_classifier(5)
    assert all(value.is_meta for head in frame_heads(model).values() for value in head.state_dict().values())


def test_reset_keeps_a_necks_dtype():
    model = attach_frame(timm.create_model("resnet18", num_classes=5).half(), neck="mlp")
    attach_frame(model, 6, neck="residual")  # a head in the place of a head
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    model.reset_classifier(7)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert model.fc.weight.dtype == torch.float32


def test_frame_given_as_a_tensor_serves_its_own_number_of_classes():
    frame = random_frame(5, 512, seed=9)
    model = timm.create_model("resnet18_etf", num_classes=5, frame=frame)
    assert torch.equal(model.fc.weight, frame)
    for _ in range(2):
        model = pickle.loads(pickle.dumps(model))
        model.reset_classifier(6)
        assert torch.equal(model.fc.weight, best_frame(6, 512))
        assert model.fc.frame == "auto"
        model.reset_classifier(5)
        assert torch.equal(model.fc.weight, frame)
        assert model.fc.frame == "custom"


def test_repvit_reset_drops_the_distilled_head_as_timm_does():
    twin, base = build("repvit"), build("repvit", twin=False)
    for model in (twin, base):
        model.reset_classifier(4)
    assert set(frame_heads(twin)) == set(leaves(base)) == {"head.head.l"}
    for model in (twin, base):
        model.reset_classifier(4, distillation=True)
    assert set(frame_heads(twin)) == set(leaves(base)) == {"head.head.l", "head.head_dist.l"}


def test_heads_of_one_width_share_their_frame_and_compute_it_once(monkeypatch):
    calls = []
    from etf_zoo.layers import classifier

    build_frame = classifier.build_frame
    monkeypatch.setattr(classifier, "build_frame", lambda *a, **k: calls.append(a) or build_frame(*a, **k))
    pair = timm.create_model("levit_128s_etf", num_classes=5)
    assert len(calls) == 1
    first, second = frame_heads(pair).values()
    assert torch.equal(first.weight, second.weight)
    assert first.weight.data_ptr() != second.weight.data_ptr()
    by_stage = timm.create_model("efficientvim_m1_etf", num_classes=5)
    assert [len(calls), len({h.in_features for h in frame_heads(by_stage).values()})] == [4, 3]


# ------------------------------------------------------------------------------------------------------------- training


@each_kind_big_slow
def test_gradients_reach_what_they_reach_in_the_base(kind):
    def without_gradient(model):
        torch.manual_seed(0)
        if kind not in ("conv", "list"):  # timm's DLA and CrossViT have none
            model.set_grad_checkpointing(True)
        with torch.enable_grad():
            out = model.train()(images(kind, batch=4))
            parts = out if isinstance(out, (tuple, list)) else [out]  # VOLO: classes, auxiliary map, its box
            sum(part.float().square().mean() for part in parts if isinstance(part, torch.Tensor)).backward()
        return {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}

    twin, base = build(kind), build(kind, twin=False)
    heads = tuple(frame_heads(twin))
    ours = without_gradient(twin)
    assert ours == {name for name in without_gradient(base) if not name.startswith(heads)}
    assert not ours or kind in ("aux", "no_default_conv", "no_default", "pair", "list_by_stage")


@each_kind_big_slow
def test_optimizers_and_layer_decay(kind):
    twin = shared(kind)
    try:
        param_groups_layer_decay(shared(kind, twin=False), layer_decay=0.7)
    except (AssertionError, AttributeError) as error:
        pytest.skip(f"timm's base cannot: {error!r}")
    groups = param_groups_layer_decay(twin, weight_decay=0.05, layer_decay=0.7)
    assert sum(len(group["params"]) for group in groups) == len([p for p in twin.parameters() if p.requires_grad])
    assert len({group["lr_scale"] for group in groups}) > 1
    if hasattr(shared(kind, twin=False), "group_matcher"):  # not timm's MetaFormers
        assert twin.group_matcher() == shared(kind, twin=False).group_matcher()
    optimizer = create_optimizer_v2(twin, opt="adamw", lr=1e-3, layer_decay=0.7)
    assert optimizer.param_groups


def test_what_layer_decay_and_exclude_head_make_of_a_head_without_parameters():
    """As FrameClassifier's docstring says: the last layer of the backbone counts as the head."""
    twin, base = (timm.create_model(name, num_classes=5) for name in ("test_vit_etf", "test_vit"))
    scales = {}
    for model in (twin, base):
        groups = param_groups_layer_decay(model, layer_decay=0.75)
        by_id = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
        scales[model] = {name: by_id[id(p)] for name, p in model.named_parameters()}
    assert {name: scale * 0.75 for name, scale in scales[twin].items()} == {
        name: scale for name, scale in scales[base].items() if not name.startswith("head.")
    }
    kept = timm.models.model_parameters(twin, exclude_head=True)
    names = [name for name, _ in twin.named_parameters()]
    assert len(list(kept)) == len(names) - 2
    assert names[-1] == "norm.bias"


def test_timms_tools_that_need_a_bias_say_why_there_is_none():
    from timm.layers import apply_test_time_pool

    twin = timm.create_model("test_resnet_etf", num_classes=5)
    sentence = "A fixed frame has no bias: .*--head-init-bias, --test-pool.*leave it out"
    with pytest.raises(AttributeError, match=sentence):  # timm's train.py --head-init-bias
        nn.init.constant_(twin.get_classifier().bias, 0.1)
    with pytest.raises(AttributeError, match=sentence):  # timm's validate.py --test-pool
        apply_test_time_pool(twin, {"input_size": (3, 320, 320), "test_input_size": (3, 320, 320)})


def test_learnable_scale_is_not_decayed():
    twin = timm.create_model("resnet18_etf", num_classes=5, logit_scale="learnable")
    optimizer = create_optimizer_v2(twin, opt="adamw", lr=1e-3, weight_decay=0.1)
    (group,) = [g for g in optimizer.param_groups if any(p is twin.fc.logit_scale for p in g["params"])]
    assert group["weight_decay"] == 0


@each_kind_big_slow
def test_ema(kind):
    twin = build(kind)
    ema = ModelEmaV3(twin, decay=0.5)
    frames = {name: head.weight.clone() for name, head in frame_heads(twin).items()}
    for parameter in twin.parameters():
        parameter.add_(1)
    ema.update(twin)
    first, start = next(ema.module.parameters()), next(shared(kind).parameters())
    assert_same(first, start + 0.5, atol=1e-5, rtol=1e-5)
    for name, head in frame_heads(ema.module).items():
        assert torch.equal(head.weight, frames[name])
    ema.module.reset_classifier(4)
    assert twin.num_classes == CLASSES


@each_kind_big_slow
def test_reparameterised_model_computes_the_same(kind):
    twin = build(kind, feature_norm="batch")
    torch.manual_seed(0)
    for module in twin.modules():  # a fold that dropped the norm in front of the head, or the head's own, would show
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    expected = twin(images(kind))
    folded = reparameterize_model(twin)
    assert frame_heads(folded).keys() == frame_heads(twin).keys()
    assert_same(folded(images(kind)), expected, atol=1e-3, rtol=1e-3)
    if hasattr(twin, "fuse"):
        assert_same(copy.deepcopy(twin).fuse()(images(kind)), expected, atol=1e-3, rtol=1e-3)


# ------------------------------------------------------------------------------------------------------- creation, meta


@each_kind
def test_meta_device(kind):
    with torch.device("meta"):
        name, small, _ = KINDS[kind]
        twin = timm.create_model(f"{name}_etf", num_classes=CLASSES, **small)
    assert all(value.is_meta for value in twin.state_dict().values())
    assert {p.device.type for p in shared(kind, device="meta").parameters()} == {"meta"}
    assert twin.state_dict().keys() == shared(kind).state_dict().keys()


@each_kind_big_slow
def test_created_in_bfloat16(kind):
    twin = shared(kind, dtype=torch.bfloat16)
    assert {p.dtype for p in twin.parameters()} == {torch.bfloat16}
    assert {h.weight.dtype for h in frame_heads(twin).values()} == {torch.float32}


def test_head_arguments_reach_the_head():
    frame = {"frame": "simplex", "orientation": "blocks", "feature_norm": "batch", "logit_scale": 3.0}
    twin = timm.create_model("resnet18_etf", num_classes=5, **frame)
    assert torch.equal(twin.fc.weight, simplex_etf(5, 512, orientation="blocks"))
    assert twin.fc.norm is not None
    assert twin.fc.logit_scale == 3
    seeded = timm.create_model("resnet18_etf", num_classes=5, orientation="random", seed=3)
    assert torch.equal(seeded.fc.weight, simplex_etf(5, 512, orientation="random", seed=3))
    necked = timm.create_model("resnet18_etf", num_classes=5, neck="mlp")
    assert necked.fc.neck is not None
    assert timm.create_model("resnet18_etf", num_classes=5, neck="none").fc.neck is None


def test_base_arguments_reach_the_base():
    twin = timm.create_model("resnet18_etf", num_classes=5, drop_rate=0.25, output_stride=16)
    assert twin.drop_rate == 0.25
    assert twin.forward_features(torch.randn(1, 3, 64, 64)).shape[-1] == 4


def test_defaults_are_the_bases():
    twin = timm.create_model("mobilenetv3_small_050_etf")
    assert twin.num_classes == 1000
    assert twin.pretrained_cfg["input_size"] == (3, 224, 224)
    assert twin.pretrained_cfg["architecture"] == "mobilenetv3_small_050_etf"
    assert not twin.pretrained_cfg["tag"]  # and no tag of theirs, as none of their weights
    assert timm.create_model("vit_small_patch14_dinov2_etf", img_size=56, depth=1).num_classes == 0


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"frame": "etf"}, ValueError, "Unknown frame 'etf'"),
        ({"frame": "simplex", "num_classes": 600}, ValueError, "at least 599 dimensions, got 512"),
        ({"frame": "custom"}, ValueError, "only its weights hold"),
        ({"frame": torch.eye(3)}, ValueError, "the head needs"),
        ({"orientation": "blocks", "num_classes": 600}, ValueError, "needs dim >= num_classes"),
        ({"num_classes": 1}, ValueError, "at least 2 classes"),
        ({"drop_ratio": 0.5}, TypeError, "unexpected keyword argument 'drop_ratio'"),
        ({"frames": "auto"}, TypeError, "unexpected keyword argument 'frames'"),
        ({"pretrained_cfg": "nosuchtag"}, RuntimeError, "nosuchtag"),
    ],
)
def test_errors(kwargs, error, message):
    with pytest.raises(error, match=message):
        timm.create_model("resnet18_etf", **{"num_classes": 5, **kwargs})


def test_unknown_twin_fails_as_in_timm():
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model("resnet19_etf")


# --------------------------------------------------------------------------------------------------------- attach_frame


@each_kind
def test_attaching_gives_the_twin(kind):
    x = images(kind)
    attached = attach_frame(build(kind, twin=False))
    assert type(attached) is type(shared(kind))
    assert_same(attached(x), shared(kind)(x))
    attach_frame(attached, 4, frame="random")
    assert {h.num_classes for h in frame_heads(attached).values()} == {4}
    attached.reset_classifier(3)
    assert {(h.num_classes, h.frame) for h in frame_heads(attached).values()} == {(3, "random")}
    attach_frame(attached, 0)
    assert not frame_heads(attached)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.out = nn.Linear(8, 5)

    def forward(self, x):
        return self.out(self.body(x))


def test_attaching_to_any_module():
    model = attach_frame(Plain(), classifier="out")
    assert isinstance(model.out, FrameClassifier)
    assert model(torch.randn(3, 6)).shape == (3, 5)
    attach_frame(model, 4, classifier="out")
    assert model(torch.randn(3, 6)).shape == (3, 4)


@pytest.mark.parametrize(
    ("model", "kwargs", "message"),
    [
        (Plain(), {}, "Cannot tell which layer of Plain classifies.*classifier='...'.*body, out"),
        (Plain(), {"num_classes": 5, "classifier": "fc"}, "has no classifier named fc.*it has: body, out"),
        (Plain(), {"classifier": "fc"}, "number of classes of 'fc'"),
        (nn.Sequential(nn.Conv2d(3, 5, 3)), {"classifier": "0"}, "Only 1x1 convolutions"),
        (nn.Sequential(nn.Embedding(3, 5)), {"num_classes": 5, "classifier": "0"}, "classifier is Embedding"),
    ],
)
def test_attaching_errors(model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        attach_frame(model, **kwargs)


def test_module_as_neck_is_copied_for_each_head():
    neck = nn.Sequential(nn.Linear(192, 192), nn.ReLU())
    model = build("pair", neck=neck)
    first, second = frame_heads(model).values()
    assert first.neck is not second.neck
    assert first.neck is not neck


# ----------------------------------------------------------------------------------------------- saved and loaded again


def save(model, folder, **model_args):
    save_for_hf(model, str(folder), safe_serialization=True, model_args=model_args)
    return f"local-dir:{folder}"


def small_resnet(**kwargs):
    return timm.create_model("resnet18_etf", num_classes=5, **kwargs).eval()


def test_saved_twin_loads_with_its_own_frame(tmp_path):
    x = torch.randn(2, 3, 64, 64)
    original = small_resnet(frame="random", seed=3, feature_norm="batch", logit_scale=4.0)
    loaded = timm.create_model(save(original, tmp_path), pretrained=True).eval()
    assert_same(loaded(x), original(x))
    loaded.reset_classifier(4)
    assert torch.equal(loaded.fc.weight, turn_to_blocks(random_frame(4, 512, seed=3)))
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=4).eval()
    assert_same(other.forward_features(x), original.forward_features(x))
    assert torch.equal(other.fc.weight, turn_to_blocks(random_frame(4, 512, seed=3)))


def test_saved_frame_given_as_a_tensor(tmp_path):
    frame = random_frame(5, 512, seed=9)
    source = save(small_resnet(frame=frame), tmp_path, frame="custom")
    loaded = timm.create_model(source, pretrained=True)
    for _ in range(2):
        assert torch.equal(loaded.fc.weight, frame)
        loaded.reset_classifier(6)
        assert torch.equal(loaded.fc.weight, best_frame(6, 512))
        loaded.reset_classifier(5)
    assert torch.equal(timm.create_model(source, pretrained=True, num_classes=6).fc.weight, best_frame(6, 512))
    with pytest.raises(ValueError, match="only its weights hold"):
        timm.create_model(source)


def test_blocks_of_saved_weights_need_not_fit_more_classes(tmp_path):
    source = save(small_resnet(orientation="blocks"), tmp_path)
    assert torch.equal(timm.create_model(source, pretrained=True, num_classes=600).fc.weight, best_frame(600, 512))


def test_the_orientation_that_weights_have_may_be_asked_for(tmp_path):
    for stored, same in (({}, "blocks"), ({"orientation": "blocks"}, "auto")):
        source = save(small_resnet(**stored), tmp_path / same)
        assert torch.equal(timm.create_model(source, pretrained=True, orientation=same).fc.weight, simplex_etf(5, 512))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"frame": "simplex"},
        {"orientation": "random"},
        {"seed": 1},
        {"logit_scale": 9},
        {"neck": "mlp"},
        {"feature_norm": "batch"},
        {"feature_norm": "none"},
        {"gamma": 3.0},
        {"moving": True},
    ],
)
def test_weights_bring_their_frame_and_scale(tmp_path, kwargs):
    source = save(small_resnet(), tmp_path)
    with pytest.raises(
        ValueError, match=rf"hold their own frame and scale, which {next(iter(kwargs))} would contradict"
    ):
        timm.create_model(source, pretrained=True, **kwargs)
    timm.create_model(source, pretrained=True, logit_scale="learnable", neck="none", moving=False)  # theirs
    timm.create_model(source, pretrained=True, num_classes=4, **kwargs)


def test_attached_model_is_saved_as_the_twin(tmp_path):
    x = torch.randn(2, 3, 64, 64)
    model = attach_frame(timm.create_model("resnet18"), 5, frame=random_frame(5, 512), neck="mlp").eval()
    loaded = timm.create_model(save(model, tmp_path), pretrained=True).eval()
    assert loaded.pretrained_cfg["architecture"] == "resnet18_etf"
    assert_same(loaded(x), model(x))


# ------------------------------------------------------------------------------------------------------------- registry


def test_every_architecture_with_a_classifier_has_a_twin():
    bases = set(timm.list_models(exclude_filters=["*_etf", "skip_connection"]))
    twins = set(timm.list_models("*_etf"))
    without = set(without_classifier())
    assert len(without) == 7
    assert twins == {f"{name}_etf" for name in bases - without}
    assert all(without_classifier().values())
    if timm.__version__ == "1.0.31":
        assert (len(bases), len(twins)) == (1372, 1365)  # one is our own, see etf_zoo.models.vit


def test_registering_again_adds_nothing():
    assert etf_zoo.register() == []


def test_architectures_that_a_user_registers_later_get_a_twin():
    from timm.models import register_model

    @register_model
    def my_resnet_for_a_test(pretrained=False, **kwargs):
        return timm.models.resnet18(pretrained=pretrained, **kwargs)

    assert etf_zoo.register() == []  # without a pretrained cfg nothing says where its classifier is
    assert "my_resnet_for_a_test" in without_classifier()


def test_module_exports_only_what_it_has():
    from etf_zoo.models import twins

    assert all(hasattr(twins, name) for name in twins.__all__)


def test_twins_take_no_source_of_weights_from_their_base():
    for name in ("resnet18", "vit_base_patch32_clip_224", "vit_base_patch16_224"):
        cfg = get_pretrained_cfg(f"{name}_etf")
        assert not cfg.has_weights
        assert not cfg.license
        assert cfg.input_size == get_pretrained_cfg(name).input_size
        assert f"{name}_etf" not in timm.list_models(pretrained=True)


def test_names():
    assert base_name("resnet50_etf.tag_with_etf") == "resnet50"
    backbone, head = split_head({"head.weight": 1, "head_dist.weight": 2, "x.head.weight": 3}, ["head"], strip=True)
    assert head == {"weight": 1}
    assert backbone == {"head_dist.weight": 2, "x.head.weight": 3}
