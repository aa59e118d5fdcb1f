import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from etf_zoo import FrameClassifier
from etf_zoo.frames import best_frame, quick_code, random_frame, simplex_etf
from etf_zoo.frames.build import build_frame, check_frame
from etf_zoo.layers.logit_scale import MAX_LOGIT_SCALE, smoothed_probability, solve_logit_scale

FAR = 1 - torch.eye(10)  # ten classes, equally far from each other


def features(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slow_logits(x, frame, scale, norm=True):
    """One feature, one class at a time: scale times the cosine (or the product, without norm)."""
    out = torch.empty(len(x), len(frame), dtype=torch.float64)
    for b, feature in enumerate(x.double()):
        for k, prototype in enumerate(frame.double()):
            out[b, k] = scale * feature @ prototype / (feature.norm() if norm else 1)
    return out


def slow_scale(frame, probability=0.999):
    """Smallest scale on a fine grid at which every prototype's own softmax reaches the probability."""
    gram = frame.double() @ frame.double().T
    for scale in torch.arange(0, MAX_LOGIT_SCALE, 0.005, dtype=torch.float64):
        if torch.softmax(scale * gram, dim=1).diagonal().min() >= probability:
            return scale.item()
    raise AssertionError("no such scale")


# ----------------------------------------------------------------------------------------------------------- the logits


@pytest.mark.parametrize(
    ("num_classes", "dim", "frame"), [(5, 8, "auto"), (10, 6, "auto"), (20, 4, "auto"), (7, 9, "random")]
)
@pytest.mark.parametrize("norm", ["l2", "none"])
def test_against_plain_reference(num_classes, dim, frame, norm):
    head = FrameClassifier(dim, num_classes, frame=frame, feature_norm=norm, logit_scale=7.5)
    x = 3 * features(6, dim)
    expected = slow_logits(x, head.weight, 7.5, norm=norm == "l2")
    torch.testing.assert_close(head(x).double(), expected, atol=1e-5, rtol=1e-5)


def test_batch_norm_against_plain_reference_and_running_statistics():
    head = FrameClassifier(8, 5, feature_norm="batch", logit_scale=2.0)
    x = features(64, 8) * torch.arange(1, 9) + 10
    centered = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(head(x).double(), slow_logits(centered, head.weight, 2.0), atol=1e-5, rtol=1e-5)
    for _ in range(200):
        head(x)
    head.eval()
    centered = (x[:3] - x.mean(0)) / (x.var(0, unbiased=True) + 1e-5).sqrt()
    torch.testing.assert_close(head(x[:3]).double(), slow_logits(centered, head.weight, 2.0), atol=1e-4, rtol=1e-4)
    assert not list(head.parameters())  # no affine part: nothing there may undo the frame


def test_logits_are_scaled_cosines_with_embed():
    head = FrameClassifier(8, 5)
    x = features(4, 8)
    unit = head.embed(x)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(head(x), head.logit_scale * unit @ head.weight.T)
    torch.testing.assert_close(head(100 * x), head(x))  # lengths do not matter


def test_any_leading_shape():
    head = FrameClassifier(8, 5)
    x = features(2, 3, 4, 8)
    out = head(x)
    assert out.shape == (2, 3, 4, 5)
    torch.testing.assert_close(out.reshape(-1, 5), head(x.reshape(-1, 8)))
    assert head(features(8)).shape == (5,)


def test_channels_first_equals_a_1x1_convolution():
    head = FrameClassifier(8, 5, feature_norm="none", logit_scale=3.0, channels_first=True)
    conv = nn.Conv2d(8, 5, 1, bias=False)
    conv.weight.data = 3 * head.weight[:, :, None, None]
    x = features(2, 8, 3, 4)
    torch.testing.assert_close(head(x), conv(x))
    unit = FrameClassifier(8, 5, logit_scale=3.0, channels_first=True)
    torch.testing.assert_close(unit(x), conv(nn.functional.normalize(x, dim=1)))
    assert unit(features(2, 8, 1, 1)).shape == (2, 5, 1, 1)


@pytest.mark.parametrize("norm", ["l2", "none", "batch"])
@pytest.mark.parametrize("neck", [None, "residual"])
def test_gradient_in_float64(norm, neck):
    torch.manual_seed(0)
    head = FrameClassifier(4, 4, feature_norm=norm, neck=neck, logit_scale="learnable").double().eval()
    x = features(3, 4, dtype=torch.float64).requires_grad_()
    assert head(x).dtype == torch.float64
    assert torch.autograd.gradcheck(head, (x,))


# ------------------------------------------------------------------------------------------------------------ the scale


@pytest.mark.parametrize("k", [2, 3, 10, 100, 1000])
@pytest.mark.parametrize("p", [0.9, 0.999])
def test_scale_of_a_simplex_has_a_closed_form(k, p):
    expected = (k - 1) / k * math.log((k - 1) * p / (1 - p))
    assert solve_logit_scale(simplex_etf(k, k), probability=p) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("frame", [random_frame(20, 16), best_frame(12, 8), quick_code(40, 8), random_frame(300, 64)])
def test_scale_against_a_grid(frame):
    assert solve_logit_scale(frame) == pytest.approx(slow_scale(frame), abs=0.02)


def test_prototype_has_the_promised_probability():
    for k, dim in [(5, 8), (12, 8), (100, 8)]:
        head = FrameClassifier(dim, k)
        probability = head(head.weight).softmax(1).diagonal()
        assert probability.min().item() == pytest.approx(0.999, abs=1e-4)


def test_scale_of_many_classes_is_sampled():
    frame = simplex_etf(2050, 2050, orientation="blocks")
    expected = 2049 / 2050 * math.log(2049 * 999)
    assert solve_logit_scale(frame) == pytest.approx(expected, rel=1e-4)


def test_scale_is_capped_with_a_warning():
    twins = torch.tensor([[1.0, 0], [math.cos(0.05), math.sin(0.05)], [-1, 0]])
    with pytest.warns(UserWarning, match=r"No logit scale up to 100.*cosine 0\.9988"):
        head = FrameClassifier(2, 3, frame=twins)
    assert head.logit_scale == MAX_LOGIT_SCALE


def test_no_norm_means_scale_one_and_solves_nothing(monkeypatch):
    monkeypatch.setattr("etf_zoo.layers.guarded.solve_logit_scale", lambda frame: pytest.fail("solved for nothing"))
    assert FrameClassifier(8, 5, feature_norm="none").logit_scale == 1
    assert FrameClassifier(8, 5, logit_scale=4).logit_scale == 4
    assert FrameClassifier(8, 5, device="meta").logit_scale.is_meta


def test_learnable_scale_never_counts_as_negative():
    head = FrameClassifier(8, 5, logit_scale="learnable")
    x, labels = head.weight.clone(), torch.arange(5)
    with torch.no_grad():
        head.logit_scale.fill_(-3.0)
    logits = head(x)
    torch.testing.assert_close(logits, 0.01 * x @ head.weight.T)
    assert head.top_k(x, 1)[1].flatten().tolist() == labels.tolist()
    F.cross_entropy(logits, labels).backward()
    assert head.logit_scale.grad < 0  # a step makes it larger again
    assert set(head.state_dict()) == {"weight", "logit_scale"}


def test_scale_under_label_smoothing():
    head = FrameClassifier(16, 10, frame="simplex")
    head.probability = smoothed_probability(10, 0.1)
    head.reset_scale()
    own = head(head.weight).softmax(1).diagonal()
    torch.testing.assert_close(own, torch.full((10,), 0.91))
    # there the smoothed loss is least for features on their prototypes
    x = head.weight.clone().requires_grad_()
    F.cross_entropy(head(x), torch.arange(10), label_smoothing=0.1).backward()
    assert x.grad.abs().max() < 1e-6
    assert smoothed_probability(10, 0.0) == 0.999


def test_learnable_scale_gets_a_gradient_and_the_frame_never():
    head = FrameClassifier(8, 5, logit_scale="learnable")
    assert head.logit_scale.item() == pytest.approx(FrameClassifier(8, 5).logit_scale.item())
    head(features(4, 8)).square().sum().backward()
    assert head.logit_scale.grad.abs() > 0
    assert not head.weight.requires_grad
    assert [name for name, _ in head.named_parameters()] == ["logit_scale"]
    assert not list(FrameClassifier(8, 5).parameters())


# ------------------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["l2", "batch"])
def test_half_precision_leaves_frame_scale_and_statistics(dtype, norm):
    head = FrameClassifier(2048, 10, feature_norm=norm, logit_scale="learnable").eval()
    x = (50 * features(4, 2048)).to(dtype)  # squared length about 5e6: more than float16 can hold
    expected, before = head(x.float()), copy.deepcopy(head.state_dict())
    scale = head.logit_scale
    head.to(dtype)
    assert head.logit_scale is scale  # the same parameter, as an optimizer holds it
    for name, value in head.state_dict().items():
        assert torch.equal(value, before[name]), name
        assert value.dtype == before[name].dtype, name
    assert head(x).dtype == torch.float32
    torch.testing.assert_close(head(x), expected, atol=1e-4, rtol=1e-4)


def test_batch_norm_of_half_precision_features_is_in_float32():
    head = FrameClassifier(64, 10, feature_norm="batch").eval()
    head.norm.bn.running_mean.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).half()
    torch.testing.assert_close(head(x), head(x.float()), atol=1e-5, rtol=0)


def test_half_precision_casts_the_neck_but_nothing_else():
    head = FrameClassifier(16, 5, neck="mlp").half()
    assert {p.dtype for p in head.neck.parameters()} == {torch.float16}
    assert head.weight.dtype == head.logit_scale.dtype == torch.float32
    head.double()
    assert head.weight.dtype == head.logit_scale.dtype == torch.float64
    head.bfloat16()
    assert head.weight.dtype == head.logit_scale.dtype == torch.float32
    assert next(head.neck.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("norm", ["l2", "batch", "none"])
def test_autocast_keeps_the_product_in_float32(norm):
    head = FrameClassifier(64, 10, feature_norm=norm).eval()
    x = features(8, 64)
    expected = head(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert nn.functional.linear(x, head.weight).dtype == torch.bfloat16  # autocast is at work
        logits = head(x)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, atol=0, rtol=0)


def test_moves():
    head = FrameClassifier(8, 5, feature_norm="batch", logit_scale="learnable")
    state = copy.deepcopy(head.state_dict())
    head.to("meta")
    assert all(value.is_meta for value in head.state_dict().values())
    head.half()
    assert head.weight.dtype == torch.float32
    head.to_empty(device="cpu")
    head.load_state_dict(state)
    x = features(4, 8)
    fresh = FrameClassifier(8, 5, feature_norm="batch", logit_scale="learnable")
    torch.testing.assert_close(head(x), fresh(x))


# ------------------------------------------------------------------------------------------------------- meta and state


def test_meta_device_computes_nothing(monkeypatch):
    monkeypatch.setattr("etf_zoo.layers.classifier.build_frame", lambda *args, **kwargs: pytest.fail("built a frame"))
    head = FrameClassifier(100_000, 90_000, device="meta")
    assert head.weight.shape == (90_000, 100_000)
    with torch.device("meta"):
        assert FrameClassifier(8, 5, neck="mlp", feature_norm="batch").weight.is_meta
    assert head(torch.empty(2, 100_000, device="meta")).shape == (2, 90_000)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"frame": "etf"},
            r"Unknown frame 'etf'. Choose one of auto, .*, hierarchy, subspaces, or pass a tensor",
        ),
        ({"frame": "simplex", "num_classes": 10}, "at least 9 dimensions, got 8.*frame='auto'"),
        ({"frame": torch.eye(4)}, r"frame has shape \(4, 4\), the head needs \(5, 8\)"),
        ({"frame": torch.ones(5, 8)}, "unit rows.*row norms from 2.828.*nearest_simplex_etf"),
        ({"frame": torch.full((5, 8), math.nan)}, "unit rows"),
        ({"feature_norm": "layer"}, "Unknown feature_norm 'layer'. Choose one of l2, batch, none"),
        ({"neck": "conv"}, "Unknown neck 'conv'. Choose one of mlp, mlp2, mlp3, projector, residual, or None"),
        ({"logit_scale": "big"}, "Unknown logit_scale 'big'"),
        ({"logit_scale": 0}, "positive and finite, got 0"),
        ({"logit_scale": math.inf}, "positive and finite, got inf"),
        ({"orientation": "left"}, "Unknown orientation 'left'"),
        ({"orientation": "blocks", "num_classes": 9}, "needs dim >= num_classes"),
        ({"orientation": "blocks", "num_classes": 40}, "needs dim >= num_classes"),
        ({"orientation": "blocks", "frame": "random", "num_classes": 9}, "needs dim >= num_classes"),
        ({"num_classes": 1}, "at least 2 classes, got num_classes=1"),
        ({"frame": "hierarchy", "hierarchy": [[0, 1], [1, 0]]}, r"a tensor \(K, K\), got a list"),
        ({"frame": "hierarchy", "hierarchy": torch.ones(4, 4)}, r"hierarchy has shape \(4, 4\) for 5 classes"),
        ({"frame": "hierarchy", "hierarchy": FAR, "num_classes": 10}, "needs at least 9 dimensions, got 8.*'residual'"),
        (
            {"frame": "hierarchy", "hierarchy": FAR[:5, :5], "gamma": -1.0},
            "gamma must be positive and finite, got -1",
        ),
    ],
)
def test_errors_here_as_on_the_meta_device(kwargs, message, device):
    with pytest.raises(ValueError, match=message):
        FrameClassifier(8, **{"num_classes": 5, **kwargs}, device=device)


def test_custom_names_a_frame_that_only_weights_hold():
    given = FrameClassifier(8, 5, frame=random_frame(5, 8, seed=9))
    assert given.frame == "custom"
    assert "frame='custom'" in repr(given)
    with pytest.raises(ValueError, match=r"only its weights hold: load them \(pretrained=True\), pass the tensor"):
        FrameClassifier(8, 5, frame="custom")
    empty = FrameClassifier(8, 5, frame=given.frame, device="meta")
    empty.to_empty(device="cpu").load_state_dict(given.state_dict())
    assert torch.equal(empty.weight, given.weight)


def test_given_frame_is_copied():
    frame = random_frame(5, 8)
    head = FrameClassifier(8, 5, frame=frame)
    frame.zero_()
    torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(5))


@pytest.mark.parametrize("name", ["auto", "simplex", "random", "code"])
def test_build_frame_by_name(name):
    frame = build_frame(name, 6, 8, orientation="random", seed=4)
    assert torch.equal(frame, build_frame(name, 6, 8, orientation="random", seed=4))
    assert not torch.equal(frame, build_frame(name, 6, 8, orientation="random", seed=5))
    torch.testing.assert_close(frame.norm(dim=1), torch.ones(6))
    check_frame(name, 6, 8)


def test_seed_and_orientation_reach_the_frame():
    turned, blocks = simplex_etf(5, 8, orientation="random", seed=3), simplex_etf(5, 8, orientation="blocks")
    assert torch.equal(FrameClassifier(8, 5, orientation="random", seed=3).weight, turned)
    assert torch.equal(FrameClassifier(8, 5, orientation="blocks").weight, blocks)
    assert torch.equal(FrameClassifier(8, 5).weight, blocks)


def test_state_dict_keys():
    assert set(FrameClassifier(8, 5).state_dict()) == {"weight", "logit_scale"}
    assert set(FrameClassifier(8, 5, logit_scale="learnable").state_dict()) == {"weight", "logit_scale"}
    keys = set(FrameClassifier(8, 5, feature_norm="batch").state_dict())
    statistics = {f"norm.bn.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert keys == {"weight", "logit_scale"} | statistics


def test_checkpoint_brings_its_frame():
    source = FrameClassifier(8, 5, orientation="random", seed=1, logit_scale=9.0)
    target = FrameClassifier(8, 5, orientation="random", seed=2)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.weight, source.weight)
    assert target.logit_scale == 9
    for dtype in (
        torch.float16,
        torch.bfloat16,
    ):  # rounded frames are frames, blocks too, where all entries round alike
        blocks = FrameClassifier(55, 5, orientation="blocks")
        rounded = {key: value.to(dtype) for key, value in blocks.state_dict().items()}
        target = FrameClassifier(55, 5)
        target.load_state_dict(rounded)
        torch.testing.assert_close(target.weight, blocks.weight, atol=2e-3, rtol=4e-3)
        assert target.weight.dtype == torch.float32


@pytest.mark.parametrize("strict", [True, False])
def test_checkpoint_that_does_not_fit(strict):
    model = nn.Sequential(nn.Linear(4, 4), FrameClassifier(8, 5))
    state = model.state_dict()
    before = model[1].weight.clone()
    message = r"frame 1\.weight has shape \(7, 8\) in the checkpoint and \(5, 8\) in the model.*num_classes=7"
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict({**state, "1.weight": random_frame(7, 8)}, strict=strict)
    with pytest.raises(RuntimeError, match=r"1\.weight in the checkpoint is not a frame.*learned classifier"):
        model.load_state_dict({**state, "1.weight": torch.randn(5, 8)}, strict=strict)
    assert torch.equal(model[1].weight, before)


def test_an_error_elsewhere_does_not_hide_the_heads():
    model = nn.Sequential(nn.Linear(4, 4), FrameClassifier(8, 5))
    state = {**model.state_dict(), "0.weight": torch.zeros(3, 3)}
    frame = random_frame(5, 8, seed=8)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight") as error:
        model.load_state_dict({**state, "1.weight": frame})
    assert "frame" not in str(error.value)
    assert torch.equal(model[1].weight, frame)  # as torch does: what fits is loaded


# ----------------------------------------------------------------------------------------------------- necks, compilers


def test_given_neck_module():
    neck = nn.Sequential(nn.Linear(8, 6), nn.ReLU())
    head = FrameClassifier(8, 5, neck=neck, frame=random_frame(5, 6))
    assert head.dim == 6
    assert head(features(3, 8)).shape == (3, 5)
    assert FrameClassifier(8, 5, neck=nn.Linear(8, 12)).dim == 12


@pytest.mark.parametrize("neck", ["mlp", "residual"])
def test_neck_widens_features_so_that_the_simplex_fits(neck):
    head = FrameClassifier(8, 30, neck=neck, frame="simplex")
    assert head.dim == 29
    assert head.weight.shape == (30, 29)
    head(features(4, 8)).sum().backward()
    assert all(p.grad is not None for p in head.parameters())


@pytest.mark.parametrize("kwargs", [{}, {"neck": "mlp"}, {"feature_norm": "batch"}, {"channels_first": True}])
def test_compilers(kwargs):
    head = FrameClassifier(8, 5, **kwargs).eval()
    x = features(2, 8, 3, 3) if kwargs.get("channels_first") else features(4, 8)
    expected = head(x)
    traced = torch.fx.symbolic_trace(head)
    torch.testing.assert_close(traced(x), expected)
    torch.testing.assert_close(torch.compile(head, backend="eager", fullgraph=True)(x), expected)
    torch.testing.assert_close(torch.export.export(head, (x,)).module()(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript
        torch.testing.assert_close(torch.jit.script(head)(x), expected)
        torch.testing.assert_close(torch.jit.trace(head, x)(x), expected)


def test_repr_and_linear_names():
    head = FrameClassifier(8, 5)
    assert (head.in_features, head.out_features, head.num_classes) == (8, 5, 5)
    assert repr(head) == "FrameClassifier(8, 5, frame='auto', dim=8, feature_norm='l2')"


# --------------------------------------------------------------------------------------------------- embedding hooks


@pytest.mark.parametrize("channels_first", [False, True])
def test_embedding_hook_sees_what_the_pass_computes(channels_first):
    head = FrameClassifier(6, 4, neck="mlp", channels_first=channels_first).eval()
    x = features(3, 6, 1, 1) if channels_first else features(3, 6)
    x.requires_grad_()
    seen = []
    handle = head.register_embedding_hook(lambda *pair: seen.append(pair))
    logits = head(x)
    handle.remove()
    head(x)
    ((before, after),) = seen
    rows = x.movedim(1, -1) if channels_first else x
    torch.testing.assert_close(before, rows)
    torch.testing.assert_close(after, head.embed(rows))
    by_loss, by_logits = (torch.autograd.grad(out, x, retain_graph=True)[0] for out in (after.sum(), logits.sum()))
    assert by_loss.abs().max() > 0
    torch.testing.assert_close(
        by_logits, torch.autograd.grad(after, x, head.logit_scale * head.weight.sum(0).expand_as(after))[0]
    )


def test_several_hooks_end_each_for_itself():
    head, order = FrameClassifier(6, 4), []
    first = head.register_embedding_hook(lambda *_: order.append("first"))
    with head.register_embedding_hook(lambda *_: order.append("second")):
        head(features(2, 6))
    head(features(2, 6))
    first.remove()
    head(features(2, 6))
    assert order == ["first", "second", "first"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_copies_have_no_embedding_hooks():
    head, calls = FrameClassifier(6, 4), []
    head.register_embedding_hook(lambda *_: calls.append(1))  # a lambda, which pickle could not write
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), torch.jit.script(head)):
        twin(features(2, 6))
    assert not calls
    head(features(2, 6))
    assert calls == [1]


def test_embedding_hooks_come_and_go_under_compile():
    head = FrameClassifier(6, 4)
    compiled = torch.compile(head, backend="eager", fullgraph=True)
    x, seen = features(2, 6), []
    compiled(x)
    with head.register_embedding_hook(lambda _, embeddings: seen.append(embeddings)):
        compiled(x)
    compiled(x)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], head.embed(x))


# ------------------------------------------------------------------------------- a frame, its scale, and what breaks it


def shape_filtered(source, target):
    """The commonest transfer code there is."""
    own = target.state_dict()
    return {key: value for key, value in source.items() if key in own and own[key].shape == value.shape}


def test_a_scale_never_comes_without_its_frame():
    many, few = FrameClassifier(8, 200), FrameClassifier(8, 5)
    right = few.logit_scale.clone()
    assert many.logit_scale > right + 1
    result = few.load_state_dict(shape_filtered(many.state_dict(), few), strict=False)
    assert few.logit_scale == right
    assert set(result.missing_keys) == {"weight", "logit_scale"}
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight", "logit_scale"'):
        few.load_state_dict({"logit_scale": many.logit_scale})
    assert few.logit_scale == right


def test_a_trained_scale_without_its_frame_is_said():
    head = FrameClassifier(8, 5, logit_scale="learnable")
    with pytest.warns(UserWarning, match="logit_scale in the checkpoint was trained with a frame.*state_dict"):
        head.load_state_dict({"logit_scale": torch.tensor(3.0)}, strict=False)
    assert head.logit_scale == FrameClassifier(8, 5).logit_scale


def test_a_frame_without_its_scale_has_it_solved():
    source = FrameClassifier(8, 5, frame="random")
    for asked, expected in (("auto", source.logit_scale.item()), (7.0, 7.0)):
        head = FrameClassifier(8, 5, logit_scale=asked)
        result = head.load_state_dict({"weight": source.weight}, strict=False)
        assert result.missing_keys == ["logit_scale"]
        assert torch.equal(head.weight, source.weight)
        assert head.logit_scale == pytest.approx(expected)


@pytest.mark.parametrize("kwargs", [{}, {"frame": "random", "seed": 3}, {"logit_scale": "learnable"}, {"neck": "mlp"}])
def test_reset_parameters_builds_the_head_again(kwargs):
    head = FrameClassifier(8, 5, **kwargs)
    before = copy.deepcopy(head.state_dict())
    with torch.no_grad():
        head.weight.normal_()
        head.logit_scale.fill_(55)
    head.reset_parameters()
    assert all(torch.equal(value, before[key]) for key, value in head.state_dict().items())
    custom = FrameClassifier(8, 5, frame=random_frame(5, 8))
    with pytest.raises(ValueError, match="only its weights hold"):
        custom.reset_parameters()


@pytest.mark.parametrize("moment", ["new", "after train", "in between"])
@pytest.mark.parametrize("by_data", [False, True])
def test_an_overwritten_frame_is_noticed_in_training(moment, by_data):
    head, x = FrameClassifier(8, 5).train(), features(3, 8)
    if moment != "new":
        head(x)
    if by_data:
        head.weight.data.mul_(0.001)  # no version counter sees this
    else:
        nn.init.trunc_normal_(head.weight, std=2e-5)
    if moment == "after train":
        head.train()
    if by_data and moment == "in between":
        head(x)  # not yet
        head.train()
    with pytest.raises(ValueError, match=r"frame was overwritten.*reset_parameters\(\)"):
        head(x)
    head.eval()(x)
    head.reset_parameters()
    head.train()(x)


def test_an_intact_frame_is_looked_at_once(monkeypatch):
    head, x, calls = FrameClassifier(8, 5), features(3, 8), []
    seen = FrameClassifier.holds_frame
    monkeypatch.setattr(FrameClassifier, "holds_frame", lambda self: calls.append(1) or seen(self))
    for _ in range(3):
        head(x)
    assert len(calls) == 1
    head.eval()(x)
    assert len(calls) == 1
    head.train()(x)
    copy.deepcopy(head)(x)
    assert len(calls) == 3
    torch.compile(head, backend="eager", fullgraph=True)(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript
        torch.jit.trace(head, x)
    torch.fx.symbolic_trace(head)(x)
    assert len(calls) == 3


def test_ensembles_by_vmap_train():
    from torch.func import functional_call, stack_module_state, vmap

    heads = [FrameClassifier(8, 5, neck="residual", feature_norm="none", seed=i) for i in range(3)]
    for head in heads:
        head.neck = nn.Linear(8, 8)
    params, buffers = stack_module_state(heads)
    x = features(3, 8)
    out = vmap(lambda p, b: functional_call(heads[0], (p, b), (x,)))(params, buffers)
    torch.testing.assert_close(out, torch.stack([head(x) for head in heads]))


@pytest.mark.parametrize("loaded", [(), ("logit_scale",)])
def test_memory_in_the_place_of_the_meta_device_is_filled(loaded):
    """As transformers loads: created on meta, what the checkpoint has put in one by one, the rest left as memory."""
    head = FrameClassifier(8, 5, device="meta")
    head.weight = torch.full((5, 8), 1e30)
    head.logit_scale = torch.tensor(12.0 if loaded else float("nan"))
    head.eval()
    expected = FrameClassifier(8, 5)
    assert torch.equal(head.weight, expected.weight)
    assert head.logit_scale == expected.logit_scale
    own = FrameClassifier(8, 5, device="meta")
    own.load_state_dict(FrameClassifier(8, 5, frame="random").state_dict(), assign=True)
    assert not torch.equal(own.eval().weight, expected.weight)


def test_no_bias_and_why():
    head = FrameClassifier(8, 5)
    assert not hasattr(head, "bias")
    with pytest.raises(AttributeError, match=r"fixed frame has no bias.*leave it out"):
        nn.init.constant_(head.bias, 0.1)
    with pytest.raises(AttributeError, match="no attribute 'biases'"):
        _ = head.biases
