"""Twins through torch's and timm's compilers and exporters, wherever the base can go."""

import io
import warnings

import pytest
import timm
import torch

from etf_zoo import frame_heads
from tests.kinds import KINDS, build, images, needs_onnx_exporter, shared

SLOW = [kind for kind in KINDS if kind not in ("linear", "conv", "pair", "norm_linear_pair", "no_default_conv")]
each_kind_most_slow = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind in SLOW else ()) for kind in KINDS]
)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def where_the_base_can(kind, convert):
    """What `convert` makes of the twin; skips where it fails on the base, and only there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, on TorchScript's future and on tracing
        try:
            return convert(build(kind))  # a copy: LeViT caches what a tracer passes it
        except Exception as ours:
            try:
                convert(build(kind, twin=False))
            except Exception as theirs:
                pytest.skip(f"timm's {KINDS[kind][0]} cannot: {str(theirs).strip().splitlines()[0]}")
            raise ours


def assert_same_logits(kind, function, batch=2, **kwargs):
    x = images(kind, batch=batch, seed=1)
    torch.testing.assert_close(function(x), shared(kind)(x), **{"atol": 1e-4, "rtol": 1e-4, **kwargs})


@each_kind_most_slow
def test_symbolic_trace(kind):
    traced = where_the_base_can(kind, torch.fx.symbolic_trace)
    assert_same_logits(kind, traced)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "repvit_m0_9"])
def test_features_only_by_fx(name):
    twin = timm.create_model(f"{name}_etf", features_only=True, feature_cls="fx", out_indices=(1, 2)).eval()
    assert [f.shape[1] for f in twin(torch.randn(1, 3, 64, 64))] == twin.feature_info.channels()


@pytest.mark.parametrize("kind", ["linear", "conv", "pair", "norm_linear_pair", "repvit"])
def test_node_extraction_down_to_the_head(kind):
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    names = where_the_base_can(kind, lambda model: get_graph_node_names(model, suppress_diff_warning=True))
    last = names[1][-1]
    extractor = create_feature_extractor(build(kind), {last: "out"}, suppress_diff_warning=True)
    assert_same_logits(kind, lambda x: extractor(x)["out"])


@each_kind_most_slow
def test_export(kind):
    program = where_the_base_can(kind, lambda model: torch.export.export(model, (images(kind),)))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    for name in frame_heads(shared(kind)):
        assert f"{name}.weight" in loaded.state_dict
    assert_same_logits(kind, loaded.module())


@each_kind_most_slow
def test_compile_in_one_graph(kind):
    torch.compiler.reset()
    compiled = where_the_base_can(kind, lambda model: _compiled(model, images(kind)))
    assert_same_logits(kind, compiled)


def _compiled(model, x):
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(x)
    return compiled


@pytest.mark.slow
def test_compile_by_inductor_with_a_training_step():
    torch.compiler.reset()
    twin = timm.create_model("resnet18_etf", num_classes=5)
    compiled, x = torch.compile(twin, fullgraph=True), torch.randn(4, 3, 32, 32)
    with torch.enable_grad():
        eager = torch.autograd.grad(twin(x).square().sum(), twin.conv1.weight)[0]
        ours = torch.autograd.grad(compiled(x).square().sum(), twin.conv1.weight)[0]
    torch.testing.assert_close(ours, eager, atol=1e-2, rtol=1e-2)


@each_kind_most_slow
def test_torchscript(kind):
    scripted = where_the_base_can(kind, torch.jit.script)
    assert_same_logits(kind, scripted)
    x = images(kind)
    traced = where_the_base_can(kind, lambda model: torch.jit.trace(model, x))
    assert_same_logits(kind, traced)


@each_kind_most_slow
def test_onnx(kind, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = str(tmp_path / "model.onnx")
    where_the_base_can(kind, lambda model: torch.onnx.export(model, (images(kind),), path, dynamo=True, verbose=False))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (entry.name for entry in session.get_inputs())
    assert_same_logits(kind, lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]), atol=1e-3, rtol=1e-3)


@needs_onnx_exporter
@pytest.mark.parametrize("norm", ["l2", "batch", "none"])
def test_onnx_of_every_norm_and_neck(norm, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    from etf_zoo import FrameClassifier

    head = FrameClassifier(8, 5, feature_norm=norm, neck="mlp").eval()
    path, x = str(tmp_path / "head.onnx"), torch.randn(3, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(head, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    out = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(out), head(x), atol=1e-4, rtol=1e-4)
