"""The loss of a step, against the losses called by hand; and every method of the library in a recipe."""

import copy
import dataclasses

import pytest
import timm
import torch
from torch.nn import functional as F

from etf_zoo import frame_heads, losses
from etf_zoo.errors import EtfZooError
from etf_zoo.frames import Hierarchy, frame_report, hierarchy_cosines, spherical_code
from etf_zoo.layers.moving import MovingFrameClassifier
from etf_zoo.layers.whitening import Whitening
from etf_zoo.trainer.recipe.config import Augment, Data, Loss, Optim, Recipe
from etf_zoo.trainer.run.model import make_model
from etf_zoo.trainer.run.objective import Objective
from etf_zoo.trainer.run.run import Run

COUNTS = [40, 20, 10, 5, 5]
IMAGES, LABELS = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 5


def model(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("test_resnet_etf", num_classes=5, **kwargs)


def embedded(net):
    """Features, embeddings and frame, step by step."""
    net = copy.deepcopy(net)  # batch norm's statistics move
    features = net.forward_head(net.forward_features(IMAGES), pre_logits=True)
    head = net.get_classifier()
    return features, head.embed(features), head.weight, head.logit_scale.item()


@pytest.mark.parametrize("kwargs", [{}, {"feature_norm": "batch"}, {"neck": "mlp"}, {"feature_norm": "none"}])
@pytest.mark.parametrize(
    ("settings", "by_hand"),
    [
        (Loss("dot_regression"), lambda s: losses.DotRegressionLoss()),
        (Loss("dot_regression", class_scaling=True), lambda s: losses.DotRegressionLoss(COUNTS)),
        (Loss("hierarchy_cosine", {"alpha": 0.3}), lambda s: losses.HierarchyCosineLoss(0.3, logit_scale=s)),
        # raw features have scale 1, but the cone compares cosines all the same: its own scale
        (
            Loss("separating_cone", {"radius": 20}),
            lambda s: losses.SeparatingConeLoss(20, **({"logit_scale": s} if s > 1 else {})),
        ),
        (Loss("separating_cone", {"logit_scale": 4.0}), lambda s: losses.SeparatingConeLoss(logit_scale=4.0)),
        (Loss("squared"), lambda s: losses.SquaredLoss()),
    ],
)
def test_equals_the_loss_called_by_hand(kwargs, settings, by_hand):
    net = model(**kwargs)
    _, embeddings, frame, scale = embedded(net)
    expected = by_hand(scale)(embeddings, LABELS, frame)
    right, loss = Objective(settings, net, COUNTS)(net, IMAGES, LABELS)
    torch.testing.assert_close(loss, expected)
    assert torch.equal(right, (scale * embeddings @ frame.T).argmax(dim=1) == LABELS)
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


def test_cross_entropy_smooths_labels_and_adds_the_penalty():
    net = model()
    features, embeddings, frame, scale = embedded(net)
    plain = F.cross_entropy(scale * embeddings @ frame.T, LABELS, label_smoothing=0.1)
    _, loss = Objective(Loss(), net, COUNTS, 0.1)(copy.deepcopy(net), IMAGES, LABELS)
    torch.testing.assert_close(loss, plain)
    settings = Loss(variance_covariance=0.5, penalty_args={"covariance": 1.0})
    objective = Objective(settings, net, COUNTS, 0.1)
    _, loss = objective(net, IMAGES, LABELS)
    penalty = losses.VarianceCovarianceLoss(covariance=1.0)(features)
    torch.testing.assert_close(loss, plain + 0.5 * penalty)


@pytest.mark.parametrize("name", ["cross_entropy", "dot_regression", "hierarchy_cosine", "separating_cone", "squared"])
def test_autocast_gives_a_loss_in_float32(name):
    net = model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, loss = Objective(Loss(name), net, COUNTS)(net, IMAGES, LABELS)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("settings", [Loss(), Loss("frame_cross_entropy", {"angular_margin": 0.2})])
def test_classes_that_are_not_stored_meet_the_loss_in_blocks(settings, monkeypatch):
    """The model's own forward runs, and forms no logits."""
    net = timm.create_model("test_resnet_etf", num_classes=5000, frame="kerdock", neck="mlp", neck_features=256)
    head = net.get_classifier()
    assert head.implicit
    by_hand = losses.FrameCrossEntropy(copy.deepcopy(head), label_smoothing=0.1, **settings.args)
    hidden = net.forward_head(net.forward_features(IMAGES), pre_logits=True)
    objective = Objective(settings, net, [], 0.1)
    assert not objective.takes_shares
    with monkeypatch.context() as patch:
        patch.setattr(type(head), "project", lambda *_: pytest.fail("logits were formed"))
        right, loss = objective(net, IMAGES, LABELS)
    torch.testing.assert_close(loss, by_hand(hidden, LABELS))
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())
    assert right.shape == LABELS.shape
    assert net(IMAGES).shape == (len(IMAGES), 5000)  # as ever, outside
    with pytest.raises(EtfZooError, match="is not stored: only cross_entropy and frame_cross_entropy"):
        Objective(Loss("squared"), net, [])
    with pytest.raises(EtfZooError, match=r"loss\.args of frame_cross_entropy"):
        Objective(Loss("frame_cross_entropy", {"margin": 1}), net, [])
    with pytest.raises(EtfZooError, match=r"knows neither loss.class_weights"):
        Objective(Loss(class_weights=True), net, [1] * 5000)


def test_penalty_on_a_learned_head():
    net = timm.create_model("test_resnet", num_classes=5)
    before = copy.deepcopy(net)
    _, loss = Objective(Loss(variance_covariance=2.0), net, COUNTS)(net, IMAGES, LABELS)
    features = before.forward_head(before.forward_features(IMAGES), pre_logits=True)
    expected = F.cross_entropy(before.fc(features), LABELS)
    torch.testing.assert_close(loss, expected + 2 * losses.VarianceCovarianceLoss()(features))


def test_nothing_stays_on_the_module():
    net = model()
    Objective(Loss("dot_regression", variance_covariance=1.0), net, COUNTS)(net, IMAGES, LABELS)
    head = net.get_classifier()
    assert not head._embedding_hooks
    assert not head._forward_pre_hooks
    with pytest.raises(RuntimeError):
        Objective(Loss("dot_regression"), net, COUNTS)(net, IMAGES[:, :1], LABELS)
    assert not head._embedding_hooks


def test_moving_frame_follows_after_the_step_and_not_before():
    net = model(moving={"momentum": 0.5})
    head = net.get_classifier()
    assert isinstance(head, MovingFrameClassifier)
    assert head.momentum == 0.5
    by_hand = copy.deepcopy(head)
    embeddings, before = embedded(net)[1], head.weight.clone()
    objective = Objective(Loss(), net, COUNTS)
    _, loss = objective(net, IMAGES, LABELS)
    loss.backward()
    assert torch.equal(head.weight, before)
    objective.after_step()
    by_hand.observe(embeddings.detach(), LABELS)
    torch.testing.assert_close(head.weight, by_hand.weight)
    assert not torch.equal(head.weight, before)


@pytest.mark.parametrize(
    ("settings", "kwargs", "message"),
    [
        (Loss("ce"), {}, "Unknown loss 'ce'. Choose one of cross_entropy, frame_cross_entropy, dot_regression"),
        (Loss("dot_regression", {"radius": 3}), {}, "loss.args of dot_regression: .*radius"),
        (Loss("separating_cone", {"radius": 100}), {}, "radius is in degrees"),
        (Loss("squared", class_scaling=True), {}, "class_scaling is for dot_regression"),
        (Loss(args={"x": 1}), {}, "cross_entropy takes neither"),
        (Loss("dot_regression", {"feature_length": "own"}), {}, "set model_args.feature_norm none"),
        (Loss("dot_regression", {"feature_length": None}), {"feature_norm": "batch"}, "set model_args.feature_norm"),
        (Loss(penalty_args={"variance": 1.0}), {}, "set its weight, loss.variance_covariance"),
        (Loss(variance_covariance=1.0, penalty_args={"var": 1.0}), {}, "loss.penalty_args: .*var"),
    ],
)
def test_errors(settings, kwargs, message):
    with pytest.raises(ValueError, match=message):
        Objective(settings, model(**kwargs), COUNTS)


def test_class_counts_are_needed_where_they_are_used():
    for settings in (Loss(class_weights=True), Loss("dot_regression", class_scaling=True)):
        with pytest.raises(ValueError, match="a stream does not have"):
            Objective(settings, model(), [])


def test_class_weights_do_not_depend_on_the_piece():
    net, settings = model().eval(), Loss(class_weights=True)
    objective = Objective(settings, net, COUNTS)
    whole = objective(net, IMAGES, LABELS)[1]
    single = [objective(net, IMAGES[i : i + 1], LABELS[i : i + 1])[1] for i in range(len(LABELS))]
    torch.testing.assert_close(torch.stack(single).mean(), whole)
    weight = torch.tensor([80 / (5 * count) for count in COUNTS])  # of 80 images in 5 classes
    each = F.cross_entropy(net(IMAGES), LABELS, reduction="none")
    torch.testing.assert_close(whole, (weight[LABELS] * each).mean())


@pytest.mark.parametrize("name", ["dla46_c_etf", "mobilenetv3_small_050_etf"])
def test_heads_of_every_shape(name):
    """A 1x1 convolution hands over maps of one pixel."""
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=5, moving=True)
    settings = Loss("dot_regression", {"feature_length": 10.0}, variance_covariance=0.1)
    objective, before = Objective(settings, net, COUNTS), net.get_classifier().weight.clone()
    _, loss = objective(net, IMAGES, LABELS)
    loss.backward()
    objective.after_step()
    assert torch.isfinite(loss)
    assert not torch.equal(before, net.get_classifier().weight)


def test_a_moving_frame_needs_one_head():
    net = timm.create_model("deit_tiny_distilled_patch16_224_etf", num_classes=5, img_size=32, depth=1, moving=True)
    with pytest.raises(ValueError, match="has 2"):
        Objective(Loss(), net, COUNTS)


def test_a_loss_on_cosines_needs_a_frame():
    with pytest.raises(ValueError, match="head=frame"):
        Objective(Loss("dot_regression"), timm.create_model("test_resnet", num_classes=5), COUNTS)


# ------------------------------------------------------------------------------------------------------ in a recipe

RECIPE = Recipe(
    model="test_resnet_etf",
    data=Data("digits", val_split="test", size=16, limit=64),
    augment=Augment(flip=False),
    optim=Optim(name="sgd", lr=0.1, warmup_epochs=0),
    epochs=1,
    batch_size=32,
    sizes=[[0, 16]],
    label_smoothing=0.0,
)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": Loss("dot_regression", class_scaling=True), "data": dataclasses.replace(RECIPE.data, long_tail=0.1)},
        {"loss": Loss("separating_cone")},
        {"loss": Loss("squared"), "model_args": {"feature_norm": "none"}},
        {"model_args": {"moving": True}},
        {"model_args": {"whitening": {"group_size": 16}}},
        {
            "model_args": {"whitening": True, "neck": "mlp"},
            "head": "learned",
            "loss": Loss(variance_covariance=0.1),
            "epochs": 8,  # a head from zeros passes no gradient at first
        },
    ],
)
def test_trains(tmp_path, changes):
    run = Run(dataclasses.replace(RECIPE, output=str(tmp_path), **changes))
    before = copy.deepcopy(run.plain_model().state_dict())
    assert run.fit()
    after = run.plain_model().state_dict()
    trained = {name for name, _ in run.plain_model().named_parameters()}
    assert all(not torch.equal(before[name], after[name]) for name in trained)  # a learned head among them
    moved = "moving" in changes.get("model_args", {})
    for name, head in frame_heads(run.plain_model()).items():
        assert torch.equal(before[f"{name}.weight"], head.weight) != moved
        assert frame_report(head.weight).equiangularity_error < 1e-5


def test_long_tail_thins_the_training_images(tmp_path):
    data = Data("digits", val_split="test", size=16, long_tail=0.1)
    run = Run(dataclasses.replace(RECIPE, output=str(tmp_path), data=data))
    counts = torch.bincount(torch.from_numpy(run.train_split.labels)).tolist()
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == pytest.approx(0.1 * counts[0], abs=1)
    assert len(run.val_split) == 450


def test_hierarchy_frame_from_the_datas_tree():
    tree = {**{f"{kind}{i}": kind for kind in ("a", "b") for i in range(2)}, "c0": "root", "a": "root", "b": "root"}
    distances = Hierarchy.from_dict(tree).distances(["a0", "a1", "b0", "b1", "c0"])
    net = make_model(dataclasses.replace(RECIPE, model_args={"frame": "hierarchy", "gamma": 1.0}), 5, distances)
    weight = net.get_classifier().weight.double()
    torch.testing.assert_close(weight @ weight.T, hierarchy_cosines(distances, gamma=1.0)[0], atol=1e-6, rtol=0)


def test_an_optimized_code():
    args = {"channels": [4, 4, 4, 4], "neck": "mlp", "seed": 3}
    recipe = dataclasses.replace(RECIPE, model="resnet10t_etf", model_args={**args, "neck": None})
    net = make_model(dataclasses.replace(recipe, model_args={**recipe.model_args, "frame": "spherical_code"}), 10)
    quick = make_model(recipe, 10)  # the same backbone, more classes than twice the width
    optimized, start = (frame_report(model.get_classifier().weight) for model in (net, quick))
    assert optimized.largest_cosine < start.largest_cosine
    torch.testing.assert_close(net.get_classifier().weight, spherical_code(10, 4, seed=3))
    assert torch.equal(net.layer4[0].conv1.weight, quick.layer4[0].conv1.weight)
    recipe = dataclasses.replace(recipe, head="learned", model_args={**args, "frame": "spherical_code"})
    assert not frame_heads(make_model(recipe, 10))


def test_counts_are_those_of_the_images_trained_on(tmp_path):
    run = Run(dataclasses.replace(RECIPE, output=str(tmp_path), loss=Loss(class_weights=True)))  # limit 64
    seen = torch.cat([labels for _, labels in run.batches(0, 0)]).bincount(minlength=10)
    torch.testing.assert_close(run.stepper.objective.class_weights * seen, torch.full((10,), 6.4))


def test_whitening_and_a_frame_on_a_base_name():
    net = make_model(dataclasses.replace(RECIPE, model="test_resnet", model_args={"whitening": {}, "neck": "mlp"}), 10)
    assert sum(isinstance(module, Whitening) for module in net.modules()) == 1
    assert list(frame_heads(net)) == ["fc"]


def test_a_random_control_stays_where_it_is():
    net = make_model(dataclasses.replace(RECIPE, head="random", model_args={"moving": True}), 10)
    assert not isinstance(net.get_classifier(), MovingFrameClassifier)


def test_hierarchy_frame_without_a_tree(tmp_path):
    with pytest.raises(ValueError, match=r"hierarchy\.json"):
        Run(dataclasses.replace(RECIPE, output=str(tmp_path), model_args={"frame": "hierarchy"}))


def test_learned_head_behind_a_neck_and_a_whitened_norm():
    args = {"neck": "mlp", "whitening": True}
    learned = make_model(dataclasses.replace(RECIPE, head="learned", model_args=args), 10)
    twin = make_model(dataclasses.replace(RECIPE, model_args=args), 10)
    assert learned(IMAGES).shape == twin(IMAGES).shape == (10, 10)
    for net in (learned, twin):
        assert sum(isinstance(module, Whitening) for module in net.modules()) == 1
    assert not frame_heads(learned)
    shapes = {k: v.shape for k, v in twin.get_classifier().neck.state_dict().items()}
    assert {k: v.shape for k, v in learned.get_classifier()[0].state_dict().items()} == shapes
    with pytest.raises(ValueError, match="one linear classifier"):
        make_model(dataclasses.replace(RECIPE, model="levit_128s", head="learned", model_args={"neck": "mlp"}), 10)
