"""Trained classifiers rewritten as fixed frames: what stays the same, what is stored, what is refused."""

import copy
import io
import json
import pickle
import warnings

import pytest
import timm
import torch
from torch import nn

from etf_zoo import FrameClassifier, convert_classifier, frame_heads
from etf_zoo.frames import best_frame, nearest_simplex_etf
from etf_zoo.frames.simplex import helmert_basis, helmert_coordinates
from etf_zoo.models.convert import EXACT, learned_classifiers
from etf_zoo.sharing.folder import save_folder
from tests.kinds import CLASSES, KINDS, build, images, leaves, shared

each_kind = pytest.mark.parametrize("kind", KINDS)
SMALL = "mobilenetv3_small_050"
IMPLICIT = 5000  # more classes than a stored frame matrix has


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def small(num_classes, seed=0, **kwargs):
    torch.manual_seed(seed)
    model = timm.create_model(SMALL, num_classes=num_classes, **kwargs).eval()
    nn.init.normal_(model.classifier.bias)
    nn.init.normal_(model.classifier.weight, std=0.3)  # logits as far apart as those of a trained model
    return model


def assert_same_softmax(ours, theirs, atol=1e-5):
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), atol=atol, rtol=0)


# ---------------------------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("num_classes", [2, 3, 50])
def test_helmert_coordinates_without_the_matrix(num_classes):
    matrix = torch.randn(num_classes, 4, dtype=torch.float64) + 100
    torch.testing.assert_close(helmert_coordinates(matrix), helmert_basis(num_classes).T @ matrix)


@each_kind
def test_softmax_of_every_kind_of_head(kind):
    base = build(kind, twin=False)
    for i, leaf in enumerate(leaves(base).values()):
        nn.init.normal_(leaf.bias, std=1 + i)
        nn.init.normal_(leaf.weight, std=0.3)
    expected, x = base(images(kind)), images(kind)
    trained = {name: copy.deepcopy(leaf) for name, leaf in learned_classifiers(base).items()}
    twin = convert_classifier(base)
    assert type(twin) is type(shared(kind))
    assert_same_softmax(twin(x), expected)
    assert expected.softmax(-1).std(1).min() > 1e-2  # and not because all classes are alike
    heads = frame_heads(twin)
    assert heads.keys() == trained.keys()
    assert set(leaves(shared(kind, twin=False))) - set(heads) == ({"aux_head"} if kind == "aux" else set())
    for name, leaf in trained.items():
        features = torch.randn(2, heads[name].in_features)
        if heads[name].channels_first:
            features = features[:, :, None, None]
        logits, ours = leaf(features), heads[name](features)
        torch.testing.assert_close(ours, logits - logits.mean(dim=1, keepdim=True), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_classes", [7, 1500, IMPLICIT])  # fewer and more than the 1,024 features, and far more
def test_softmax_for_any_number_of_classes(num_classes):
    base = small(num_classes)
    x = torch.randn(4, 3, 64, 64)
    expected = base(x)
    twin = convert_classifier(base)
    assert_same_softmax(twin(x), expected)
    assert torch.equal(twin(x).argmax(1), expected.argmax(1))
    torch.testing.assert_close(twin(x), expected - expected.mean(1, keepdim=True), atol=1e-4, rtol=1e-4)
    head = twin.classifier
    assert head.implicit == (num_classes == IMPLICIT)
    assert head.weight.shape == (num_classes, 0 if head.implicit else num_classes - 1)
    assert not head.weight.requires_grad


def test_classifier_without_a_bias():
    base = small(7)
    base.classifier.bias = None
    x = torch.randn(2, 3, 64, 64)
    expected = base(x)
    assert_same_softmax(convert_classifier(base)(x), expected)


def test_computed_frame_is_the_stored_one():
    stored = FrameClassifier(6, 4000, **EXACT.saved())
    computed = FrameClassifier(6, 4097, **EXACT.saved())
    features = torch.randn(3, 4096)
    computed.neck, stored.neck = nn.Identity(), nn.Identity()
    gram = stored.weight[:50] @ stored.weight[:50].T
    torch.testing.assert_close(gram[0, 1:], torch.full((49,), -1 / 3999), atol=1e-6, rtol=0)
    basis = helmert_basis(4097).float() * (4097 / 4096) ** 0.5
    torch.testing.assert_close(computed(features), features @ basis.T, atol=1e-4, rtol=1e-4)


def test_gradients_pass_a_computed_frame():
    head = FrameClassifier(6, IMPLICIT, **EXACT.saved())
    with torch.enable_grad():
        nn.functional.cross_entropy(head(torch.randn(3, 6)), torch.tensor([0, 17, IMPLICIT - 1])).backward()
    assert head.neck.weight.grad.abs().sum() > 0
    assert {name for name, _ in head.named_parameters()} == {"neck.weight", "neck.bias"}


@pytest.mark.parametrize("num_classes", [7, IMPLICIT])
def test_half_precision_and_autocast(num_classes):
    base, x = small(num_classes), torch.randn(2, 3, 64, 64)
    expected = base(x)
    twin = convert_classifier(base)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = twin(x)
    assert logits.dtype == torch.float32
    assert_same_softmax(logits, expected, atol=0.2)
    assert twin.bfloat16()(x.bfloat16()).shape == (2, num_classes)
    assert twin.classifier.weight.dtype == torch.float32


def test_computed_frame_through_compilers_and_exporters(tmp_path):
    head, x = FrameClassifier(6, IMPLICIT, **EXACT.saved()).eval(), torch.randn(2, 6)
    expected = head(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for convert in (torch.fx.symbolic_trace, torch.jit.script, lambda m: torch.export.export(m, (x,)).module()):
            torch.testing.assert_close(convert(head)(x), expected)
        onnxruntime = pytest.importorskip("onnxruntime")
        torch.onnx.export(head, (x,), str(tmp_path / "head.onnx"), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "head.onnx"), providers=["CPUExecutionProvider"])
    out = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(out), expected, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------- reset, copies, folders


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("kind", ["linear", "aux", "norm_linear_pair"])
def test_reset_gives_a_fresh_frame_without_the_neck(kind, copied):
    twin = copied(convert_classifier(build(kind, twin=False)))
    for num_classes in (4, CLASSES):
        twin.reset_classifier(num_classes)
        assert frame_heads(twin).keys() == leaves(shared(kind, twin=False)).keys()
        for head in frame_heads(twin).values():
            assert torch.equal(head.weight, best_frame(num_classes, head.in_features))
            assert (head.neck, head.feature_norm) == (None, "l2")


@pytest.mark.parametrize("kind", ["linear", "conv", "pair", "norm_linear_pair", "aux"])
def test_folder_of_a_converted_model(kind, tmp_path):
    twin = convert_classifier(build(kind, twin=False))
    folder = save_folder(twin, tmp_path / "converted", half=False)
    args = json.loads((folder / "config.json").read_text())["model_args"]
    assert EXACT.saved().items() <= args.items()
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    torch.testing.assert_close(again(images(kind)), twin(images(kind)))
    assert again.state_dict().keys() == twin.state_dict().keys()
    other = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=4).eval()
    assert all(
        (head.neck, head.feature_norm, head.frame) == (None, "l2", "auto") for head in frame_heads(other).values()
    )
    loaded = timm.create_model(f"local-dir:{save_folder(other, tmp_path / 'other')}", pretrained=True).eval()
    assert {head.neck for head in frame_heads(loaded).values()} == {None}
    twin.reset_classifier(4)
    fresh = json.loads((save_folder(twin, tmp_path / "fresh") / "config.json").read_text())["model_args"]
    assert (fresh["frame"], fresh["feature_norm"], fresh.get("neck")) == ("auto", "l2", None)
    assert timm.create_model(f"local-dir:{tmp_path / 'fresh'}", pretrained=True).num_classes == 4


def test_folder_of_many_classes_is_small(tmp_path):
    twin = convert_classifier(small(IMPLICIT))
    folder = save_folder(twin, tmp_path, half=False)
    neck = 4 * (IMPLICIT - 1) * 1025
    assert neck < (folder / "model.safetensors").stat().st_size < 1.4 * neck  # the backbone, and no frame of 100 MB
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(again(x), twin(x))
    buffer = io.BytesIO()
    torch.save(twin.state_dict(), buffer)
    assert buffer.tell() < 1.4 * neck


# -------------------------------------------------------------------------------------------------------------- nearest


def test_nearest_is_the_scaled_nearest_frame_of_the_weight():
    base, x = small(7), torch.randn(2, 3, 64, 64)
    weight = base.classifier.weight.clone()
    features = base.forward_head(base.forward_features(x), pre_logits=True)
    frame = nearest_simplex_etf(weight)
    scales = torch.linspace(0.1, 20, 2000)
    errors = (weight - scales[:, None, None] * frame).flatten(1).norm(dim=1)
    twin = convert_classifier(base, "nearest")
    assert twin.classifier.neck is None
    assert torch.equal(twin.classifier.weight, frame)
    scale = twin.classifier.logit_scale
    torch.testing.assert_close(scale, scales[errors.argmin()], atol=0.01, rtol=0)
    torch.testing.assert_close(twin(x), scale * features @ frame.T)


def test_nearest_with_centered_features(tmp_path):
    base, x, mean = small(7), torch.randn(2, 3, 64, 64), torch.rand(1024)
    uncentered = convert_classifier(copy.deepcopy(base), "nearest")
    features = base.forward_head(base.forward_features(x), pre_logits=True)
    twin = convert_classifier(base, "nearest", feature_means={"classifier": mean})
    head = twin.classifier
    torch.testing.assert_close(twin(x), head.logit_scale * (features - mean) @ head.weight.T)
    assert not torch.allclose(twin(x), uncentered(x))
    again = timm.create_model(f"local-dir:{save_folder(twin, tmp_path)}", pretrained=True).eval()
    assert torch.equal(again.classifier.neck.running_mean, mean)  # float32 in a float16 file
    assert torch.equal(again.classifier.weight, head.weight)
    again.reset_classifier(5)
    assert torch.equal(again.classifier.weight, best_frame(5, 1024))


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("model", "kwargs", "message"),
    [
        (lambda: small(1200), {"mode": "nearest"}, "no simplex ETF of 1200 classes in 1024 dimensions.*mode='exact'"),
        (lambda: small(7), {"mode": "best"}, "Unknown mode 'best'. Choose one of exact, nearest"),
        (lambda: small(7), {"feature_means": {}}, "no use for feature means"),
        (
            lambda: small(7),
            {"mode": "nearest", "feature_means": {"classifier": torch.zeros(3)}},
            r"shape \(3,\), the classifier needs \(1024,\)",
        ),
        (lambda: convert_classifier(small(7)), {}, "has a fixed frame already"),
        (lambda: timm.create_model(SMALL, num_classes=0), {}, "has no classifier"),
        (lambda: nn.Linear(3, 4), {}, "Cannot tell which layer of Linear classifies"),
    ],
)
def test_errors(model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        convert_classifier(model(), **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"neck": "linear"}, "learned classifier by another name"),
        ({"frame": "helmert"}, "needs neck='linear' and feature_norm='none'"),
        ({"frame": "helmert", "neck": "linear"}, "needs neck='linear' and feature_norm='none'"),
    ],
)
def test_linear_necks_are_for_conversion_only(kwargs, message):
    with pytest.raises(ValueError, match=message):
        FrameClassifier(8, 5, **kwargs)
